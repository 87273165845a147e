"""The GPU as gpu_run.py's stages see it: data created there, streams, graphs, clocks; or the emulator in its place.

`open_device` returns one or the other. The emulated one runs the same stages in the same order, immediately and on the
CPU: it shows that the scripts work, and its times mean nothing. `launched` records which kernels a call starts.
"""

import contextlib
import functools
import hashlib
import importlib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SPACES = ("probs", "log_probs", "logits")
DTYPES = ("float64", "float32", "float16", "bfloat16")

# Includes nothing, so that no CUDA toolkit is needed. `fill` creates rows of logits z = 2 N(0, 1), and for y z + N(0,
# 1): a teacher and a student that agree more or less. Other spaces are computed from these. `read`, `triad` and `copy`
# only move bytes: no kernel that reads, or reads and writes, can be faster. `copy` issues four loads before it stores,
# and processes tiles of four times the block's threads.
KERNELS = r"""
typedef long long i64;
typedef unsigned long long u64;

__device__ u64 hash(u64 v) {
  v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9ull;
  v = (v ^ (v >> 27)) * 0x94d049bb133111ebull;
  return v ^ (v >> 31);
}
__device__ float normal(u64 counter) {
  u64 h = hash(counter * 0x9e3779b97f4a7c15ull + 1);
  float u = ((unsigned)(h >> 40) + 0.5f) * (1.f / 16777216), v = (unsigned)(h & 0xffffff) * (1.f / 16777216);
  return sqrtf(-2.f * logf(u)) * cosf(6.2831853f * v);
}
__device__ float logit(u64 seed, u64 i, int side) {
  float z = 2.f * normal((seed << 40) + 2 * i);
  return side ? z + normal((seed << 40) + 2 * i + 1) : z;
}
__device__ void store(char* out, i64 i, int dtype, float v) {
  if (dtype == 0) ((double*)out)[i] = v;
  if (dtype == 1) ((float*)out)[i] = v;
  if (dtype == 2) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    ((unsigned short*)out)[i] = bits;
  }
  if (dtype == 3) {
    unsigned bits = __float_as_uint(v);
    ((unsigned short*)out)[i] = (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}
extern "C" __global__ void fill(char* out, i64 rows, i64 n, i64 dtype, i64 space, i64 seed, i64 side) {
  __shared__ double part[1024];
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    double sum = 0;
    if (space < 2)
      for (i64 c = threadIdx.x; c < n; c += blockDim.x) sum += expf(logit(seed, row * n + c, (int)side));
    part[threadIdx.x] = sum;
    __syncthreads();
    for (int o = blockDim.x / 2; o; o /= 2) {
      if ((int)threadIdx.x < o) part[threadIdx.x] += part[threadIdx.x + o];
      __syncthreads();
    }
    float lse = space < 2 ? (float)log(part[0]) : 0.f;
    for (i64 c = threadIdx.x; c < n; c += blockDim.x) {
      float z = logit(seed, row * n + c, (int)side) - lse;
      float p = dtype == 2 ? fmaxf(expf(z), 0x1p-24f) : expf(z);   // float16 has nothing smaller: else it were zero
      store(out, row * n + c, (int)dtype, space == 0 ? p : z);
    }
    __syncthreads();
  }
}
extern "C" __global__ void spin(i64 cycles) {
  i64 start = clock64();
  while (clock64() - start < cycles) {}
}
extern "C" __global__ void read(const uint4* a, i64 n, unsigned* out) {
  unsigned v = 0;
  i64 step = (i64)gridDim.x * blockDim.x;
#pragma unroll 4
  for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
    uint4 q = __ldcs(a + i);
    v ^= q.x ^ q.y ^ q.z ^ q.w;
  }
  if (v == 0x12345678u) *out = v;   // hardly ever, but the compiler cannot know
}
extern "C" __global__ void triad(const uint4* a, const uint4* b, uint4* c, i64 n) {
  i64 step = (i64)gridDim.x * blockDim.x;
#pragma unroll 4
  for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
    uint4 p = __ldcs(a + i), q = __ldcs(b + i);
    __stcs(c + i, make_uint4(p.x ^ q.x, p.y ^ q.y, p.z ^ q.z, p.w ^ q.w));
  }
}
extern "C" __global__ void copy(const uint4* a, uint4* c, i64 tiles) {
  for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    i64 at = 4 * tile * blockDim.x + threadIdx.x;
    uint4 v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = __ldcs(a + at + k * blockDim.x);
#pragma unroll
    for (int k = 0; k < 4; ++k) __stcs(c + at + k * blockDim.x, v[k]);
  }
}
"""


def numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(importlib.import_module("ml_dtypes"), name)) if name == "bfloat16" else np.dtype(name)


def smi(*fields: str) -> dict[str, str]:
    """The output of nvidia-smi; it changes nothing."""
    try:
        words = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"not to be had: {error}"}
    return dict(zip(fields, (w.strip() for w in done.stdout.splitlines()[0].split(",")), strict=False))


def clocks() -> dict[str, str]:
    return smi("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def own_kernels(arch: int) -> Path:
    """The path of KERNELS as a cubin, in the folder where klcore keeps its own."""
    nvrtc = importlib.import_module("klcore.backends.cuda.nvrtc")
    key = hashlib.sha256(repr((KERNELS, nvrtc._OPTIONS, nvrtc.version(), arch)).encode()).hexdigest()[:32]
    path = nvrtc._folder() / f"gpu_device-{key}.cubin"
    return path if path.exists() else nvrtc._write(path.parent, path.name, nvrtc.compile(KERNELS, (), arch))


# ---- launches --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def launched() -> Iterator[Counter[str]]:
    """Counts kernels, by name, as calls launch them."""
    cuda = importlib.import_module("klcore.backends.cuda")
    kept, found = cuda._start, Counter[str]()

    def note(launches: Any, *rest: Any) -> None:
        found.update(launch.name for launch in launches)
        kept(launches, *rest)

    cuda._start = note
    try:
        yield found
    finally:
        cuda._start = kept


# ---- the device ------------------------------------------------------------------------------------------------------


class Graph:
    """A captured sequence of calls. It keeps its memory: what ran in it wrote there, and will do so again."""

    def __init__(self, graph: Any, stream: Any, pool: Any) -> None:
        self._graph, self.stream, self._pool = graph, stream, pool

    def launch(self) -> None:
        self._graph.launch(self.stream)

    def milliseconds(self) -> float:
        cupy = importlib.import_module("cupy")
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(self.stream)
        self._graph.launch(self.stream)
        end.record(self.stream)
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, end))


class Gpu:
    """CuPy's current device."""

    emulated = False

    def __init__(self) -> None:
        self.cupy = importlib.import_module("cupy")
        self.stream = self.cupy.cuda.Stream(non_blocking=True)  # waits only for what it is asked to

    @functools.cached_property
    def _module(self) -> Any:
        return self.cupy.RawModule(path=str(own_kernels(int(self.cupy.cuda.Device().compute_capability))))

    def _kernel(self, name: str, blocks: int, threads: int, *arguments: Any) -> None:
        given = tuple(np.int64(a) if isinstance(a, int) else a for a in arguments)
        self._module.get_function(name)((blocks,), (threads,), given)

    def synchronize(self) -> None:
        self.cupy.cuda.runtime.deviceSynchronize()

    def put(self, array: np.ndarray) -> Any:
        return self.cupy.asarray(array)

    def get(self, array: Any) -> np.ndarray:
        return np.asarray(self.cupy.asnumpy(array))

    def fill(self, rows: int, n: int, dtype: str, space: str, seed: int, side: int) -> Any:
        a = self.cupy.empty((rows, n), numpy_dtype(dtype))
        codes = DTYPES.index(dtype), SPACES.index(space)
        self._kernel("fill", min(rows, 1 << 16), 1024 if n > 2048 else 128, a, rows, n, *codes, seed, side)
        return a

    def poison(self, *arrays: Any) -> None:
        """NaN in every element, whatever the dtype: shows what a kernel does not write."""
        for a in arrays:
            self.cupy.cuda.runtime.memsetAsync(a.data.ptr, 0xFF, a.nbytes, self.cupy.cuda.get_current_stream().ptr)

    def keep_busy(self) -> None:
        """A few milliseconds of work on the current stream: what is launched after it has to wait."""
        self._kernel("spin", 1, 1, 4_000_000)

    def copies(self) -> dict[str, float]:
        """Bytes per second, read and written, of several ways to copy, of reading, and of reading two arrays and
        writing one. The driver's copy is timed in a graph, like everything else, and without."""
        nbytes = 2 << 30
        a, b = (self.fill(1 << 14, nbytes >> 16, "float32", "logits", seed, 0) for seed in (0, 1))
        c = self.cupy.empty_like(a)
        self.synchronize()
        out = self.cupy.empty(1, np.uint32)
        blocks, n = 16 * self.cupy.cuda.Device().attributes["MultiProcessorCount"], nbytes // 16
        tiles = n // (4 * 512)

        def by_driver() -> None:
            c.data.copy_from_device_async(a.data, nbytes, self.stream)

        calls: dict[str, tuple[int, Callable[[], Any]]] = {
            "copy by the driver": (2, by_driver),
            "copy by a kernel": (2, lambda: self._kernel("copy", blocks, 512, a, c, tiles)),
            "copy by a kernel, a block a tile": (2, lambda: self._kernel("copy", tiles, 512, a, c, tiles)),
            "read": (1, lambda: self._kernel("read", blocks, 512, a, n, out)),
            "read two, write one": (3, lambda: self._kernel("triad", blocks, 512, a, b, c, n)),
        }
        timed = {name: (arrays, self.capture([call] * 4).milliseconds) for name, (arrays, call) in calls.items()}
        timed["copy by the driver, no graph"] = 2, lambda: self._milliseconds(lambda: [by_driver() for _ in range(4)])
        found = {}
        for name, (arrays, milliseconds) in timed.items():
            for _ in range(100):  # until the clocks are up
                milliseconds()
            times = [milliseconds() / 4 for _ in range(20)]
            found[name] = arrays * nbytes / (1e-3 * float(np.median(times)))
        return found

    def _milliseconds(self, work: Callable[[], Any]) -> float:
        """Of the work that `work` submits to the stream."""
        start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start.record(self.stream)
        work()
        end.record(self.stream)
        end.synchronize()
        return float(self.cupy.cuda.get_elapsed_time(start, end))

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Graph:
        self.synchronize()
        # memory allocated in a graph must not be reused while the graph lives
        pool = self.cupy.cuda.MemoryPool()
        with self.cupy.cuda.using_allocator(pool.malloc), self.stream:
            self.stream.begin_capture()
            try:
                for call in calls:
                    call()
            finally:
                graph = self.stream.end_capture()
        return Graph(graph, self.stream, pool)

    def free(self) -> None:
        self.cupy.get_default_memory_pool().free_all_blocks()

    def memory(self) -> int:
        """Free memory, in bytes."""
        return int(self.cupy.cuda.runtime.memGetInfo()[0])

    def cache_bytes(self) -> int:
        return int(self.cupy.cuda.Device().attributes["L2CacheSize"])

    def describe(self) -> dict[str, Any]:
        runtime = self.cupy.cuda.runtime
        properties = runtime.getDeviceProperties(self.cupy.cuda.Device().id)
        return {
            "gpu": properties["name"].decode(),
            "compute capability": self.cupy.cuda.Device().compute_capability,
            "multiprocessors": properties["multiProcessorCount"],
            "memory": properties["totalGlobalMem"],
            "L2": self.cache_bytes(),
            "CUDA of the driver": runtime.driverGetVersion(),
            "CUDA of CuPy": runtime.runtimeGetVersion(),
            "nvidia-smi": smi("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "pstate") | clocks(),
        }


class _Replay:
    """A graph of the emulator: just the calls."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self._calls = calls
        self.stream = None

    def launch(self) -> None:
        for call in self._calls:
            call()

    def milliseconds(self) -> float:
        start = time.perf_counter()
        self.launch()
        return 1e3 * (time.perf_counter() - start)


class Emulated(Gpu):
    """tests/emulator: kernels run immediately, on the CPU."""

    emulated = True

    def __init__(self) -> None:
        sys.path.insert(0, str(ROOT / "tests"))
        importlib.import_module("emulator.device").install()
        super().__init__()

    def synchronize(self) -> None:
        pass

    def fill(self, rows: int, n: int, dtype: str, space: str, seed: int, side: int) -> Any:
        rng = np.random.default_rng([seed, 0])
        z = 2 * rng.standard_normal((rows, n))
        if side:
            z += np.random.default_rng([seed, 1]).standard_normal((rows, n))
        if space != "logits":
            z -= np.log(np.exp(z).sum(axis=-1, keepdims=True))
        return self.put((np.exp(z) if space == "probs" else z).astype(numpy_dtype(dtype)))

    def poison(self, *arrays: Any) -> None:
        for a in arrays:
            a[...] = np.nan

    def keep_busy(self) -> None:
        pass

    def copies(self) -> dict[str, float]:
        return {"copy by the driver": 1e9, "copy by a kernel": 1e9, "read": 1e9}

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Any:
        return _Replay(calls)

    def free(self) -> None:
        pass

    def memory(self) -> int:
        return 1 << 30

    def cache_bytes(self) -> int:
        return 1 << 10

    def describe(self) -> dict[str, Any]:
        return {"gpu": "emulated"}


def open_device(emulated: bool) -> Gpu:
    return Emulated() if emulated else Gpu()
