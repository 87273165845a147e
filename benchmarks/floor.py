"""The limit of memory: C loops that only read two float32 arrays, or read two and write one, compiled at run time.

Used by side_by_side.py and by asv_bench/benchmarks/bandwidth.py. No operation on these arrays can be faster than moving
each necessary byte once.
"""

import ctypes
import functools
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import klcore


class Unavailable(Exception):
    """A tool that a measurement needs is missing."""


# Ordinary stores first read the line that they overwrite, a fourth array to move; streamed stores do not. Which is
# faster depends on the processor, so both are measured, and the faster one is the floor. No -ffast-math: a library
# linked with it makes the whole process flush denormals to zero.
SOURCE = """
#include <stddef.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif
#define BLOCK 8192

float read_both(const float *x, const float *y, ptrdiff_t n, int threads) {
  float sum = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : sum) schedule(static)
  for (ptrdiff_t b = 0; b < n; b += BLOCK) {
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (int i = 0; i < BLOCK; i++) s += x[b + i] * y[b + i];
    sum += s;
  }
  return sum;
}

void read_write(const float *restrict x, const float *restrict y, float *restrict z, ptrdiff_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (ptrdiff_t b = 0; b < n; b += BLOCK)
#pragma omp simd
    for (int i = 0; i < BLOCK; i++) z[b + i] = x[b + i] + y[b + i];
}

void read_stream(const float *restrict x, const float *restrict y, float *restrict z, ptrdiff_t n, int threads) {
#if defined(__AVX512F__)
#pragma omp parallel for num_threads(threads) schedule(static)
  for (ptrdiff_t i = 0; i < n; i += 16)
    _mm512_stream_ps(z + i, _mm512_add_ps(_mm512_load_ps(x + i), _mm512_load_ps(y + i)));
#elif defined(__SSE2__)
#pragma omp parallel for num_threads(threads) schedule(static)
  for (ptrdiff_t i = 0; i < n; i += 4)
    _mm_stream_ps(z + i, _mm_add_ps(_mm_load_ps(x + i), _mm_load_ps(y + i)));
#else
  read_write(x, y, z, n, threads);
#endif
}
"""


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler.split()[0]) is None:
        raise Unavailable("needs a C compiler")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "floor.c"), Path(folder, "floor.so")
        source.write_text(SOURCE)
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([*compiler.split(), *flags, source, "-o", library], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.read_both.restype = ctypes.c_float
    return loaded


def floor(function: str, *arrays: np.ndarray) -> Callable[[], Any]:
    """A function that runs "read_both" (x, y), "read_write" or "read_stream" (x, y, z) with klcore's number of threads.

    The arrays have one size, a multiple of 8192, and come from `buffer`.
    """
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
    return functools.partial(
        getattr(_library(), function), *pointers, ctypes.c_ssize_t(arrays[0].size), klcore.get_num_threads()
    )


def buffer(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Zeros aligned to a cache line, as JAX needs to share them and streamed stores need to work; every page is
    touched."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + size].view(dtype).reshape(shape)
    array[...] = 0
    return array
