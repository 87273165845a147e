"""CuPy and NVRTC without a GPU and without work: arrays that only have addresses, and launches that do nothing.

What remains of a call is klcore's own Python. host_time.py times it, gpu_carry.py uses it to find the kernels that a
run on a GPU will need, and tests/test_host.py counts allocations and launches. The device is an H100, unless
`installed` is given another one.
"""

import contextlib
import importlib
import itertools
import math
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

H100 = {
    "MultiProcessorCount": 132,
    "MaxSharedMemoryPerBlockOptin": 227 << 10,
    "MaxSharedMemoryPerMultiprocessor": 228 << 10,
    "L2CacheSize": 50 << 20,
}
counts: Counter[str] = Counter()  # "allocations", "launches"
builds: dict[tuple[tuple[str, ...], int], None] = {}  # (options, architecture) of every requested kernel, in order
_addresses = itertools.count(1 << 40, 1 << 40)  # a terabyte per array: none touches another


class MemoryPointer:
    __slots__ = ("device_id", "ptr")

    def __init__(self, ptr: int, device_id: int = 0) -> None:
        self.ptr, self.device_id = ptr, device_id


def alloc(nbytes: int) -> MemoryPointer:
    counts["allocations"] += 1
    return MemoryPointer(next(_addresses))


class Device:
    id, compute_capability, attributes = 0, "90", dict(H100)

    def __init__(self, number: int = 0) -> None:
        pass

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *error: object) -> None:
        pass


class ndarray:
    """cupy.ndarray: a shape and strides over memory that is never accessed."""

    __module__ = "cupy"
    __slots__ = ("_strides", "data", "dtype", "ndim", "packed", "shape")
    device = Device()

    def __init__(self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None) -> None:
        self.shape = shape if isinstance(shape, tuple) else (shape,)
        self.dtype = dtype if isinstance(dtype, np.dtype) else np.dtype(dtype)
        self.ndim = len(self.shape)
        self.data = alloc(0) if memptr is None else memptr
        self._strides, self.packed = strides, strides is None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        if self._strides is None:
            self._strides = _packed(self.shape, self.dtype.itemsize, range(self.ndim))
        return self._strides

    def _like_numpy(self) -> np.ndarray:
        """NumPy's view of such an array; there is no memory behind it, so it must not be read."""
        return np.lib.stride_tricks.as_strided(np.empty(0, self.dtype), self.shape, self.strides)

    def view_by(self, change: Callable[[np.ndarray], np.ndarray]) -> "ndarray":
        whole = self._like_numpy()
        found = change(whole)
        offset = found.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
        at = MemoryPointer(self.data.ptr + offset, self.data.device_id)
        return ndarray(found.shape, found.dtype, at, found.strides)

    def __getitem__(self, key: Any) -> "ndarray":
        return self.view_by(lambda a: a[(*key, ...) if isinstance(key, tuple) else (key, ...)])

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def reshape(self, *shape: int) -> "ndarray":
        return self.view_by(lambda a: a.reshape(*shape))

    def transpose(self, *axes: int) -> "ndarray":
        return self.view_by(lambda a: a.transpose(*axes))

    T = property(transpose)

    def astype(self, dtype: Any, copy: bool = True) -> "ndarray":
        return self if not copy and self.dtype == dtype else ndarray(self.shape, dtype)

    def copy(self) -> "ndarray":
        return ndarray(self.shape, self.dtype)

    def sum(self, axis: Any = None, **keywords: Any) -> "ndarray":
        return ndarray((), self.dtype)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def flags(self) -> Any:
        packed = _packed(self.shape, self.dtype.itemsize, range(self.ndim))
        return types.SimpleNamespace(c_contiguous=self.strides == packed)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "data": (self.data.ptr, False), "strides": self.strides, "version": 3}

    def _combined(self, other: Any) -> "ndarray":
        return ndarray(np.broadcast_shapes(self.shape, getattr(other, "shape", ())), self.dtype)

    __mul__ = __rmul__ = __truediv__ = __itruediv__ = __rtruediv__ = _combined


class Function:
    """cupy.cuda.Function"""

    def __call__(self, grid: Any, block: Any, args: Any, shared_mem: int = 0) -> None:
        counts["launches"] += 1


class RawKernel:
    """cupy.RawKernel; called by trees of klcore from before it kept functions."""

    max_dynamic_shared_size_bytes, preferred_shared_memory_carveout = 48 << 10, -1

    def __init__(self) -> None:
        self.kernel = self._launch = Function()

    def __call__(self, grid: Any, block: Any, args: Any, shared_mem: int = 0) -> None:
        self._launch(grid, block, args, shared_mem)


class RawModule:
    def __init__(self, *, path: str) -> None:
        pass

    def get_function(self, name: str) -> RawKernel:
        return RawKernel()


def _asarray(a: Any, dtype: Any = None) -> ndarray:
    if isinstance(a, ndarray):
        return a if dtype is None else a.astype(dtype, copy=False)
    a = np.asarray(a, dtype)
    return ndarray(a.shape, a.dtype, None, a.strides)


def _build(options: tuple[str, ...], arch: int) -> Path:
    builds[tuple(options), arch] = None
    return Path("none.cubin")


def _module(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(content)
    return module


@contextlib.contextmanager
def installed(**device: int) -> Iterator[types.ModuleType]:
    """Replace CuPy and NVRTC for a while; `device`: attributes that differ from an H100's."""
    nvrtc, backends = (importlib.import_module(f"klcore.backends{name}") for name in (".cuda.nvrtc", ""))
    Device.attributes = H100 | device
    runtime = _module("cupy.cuda.runtime", getDevice=lambda: 0, getDeviceCount=lambda: 1)
    cuda = _module("cupy.cuda", Device=Device, MemoryPointer=MemoryPointer, alloc=alloc, runtime=runtime)
    cupy = _module(
        "cupy", __version__="stub", cuda=cuda, RawModule=RawModule, ndarray=ndarray, dtype=np.dtype,
        empty=lambda shape, dtype=float: ndarray(shape, dtype),
        empty_like=lambda a: ndarray(a.shape, a.dtype, None, _strides_like(a)),
        asarray=_asarray, array=_asarray, broadcast_shapes=np.broadcast_shapes,
        broadcast_to=lambda a, shape: a.view_by(lambda v: np.broadcast_to(v, shape)),
        moveaxis=lambda a, source, to: a.view_by(lambda v: np.moveaxis(v, source, to)),
        expand_dims=lambda a, axis: a.view_by(lambda v: np.expand_dims(v, axis)),
        squeeze=lambda a, axis: a.view_by(lambda v: np.squeeze(v, axis)),
        where=lambda condition, number, a: a,
    )  # fmt: skip
    before = {name: sys.modules.get(name) for name in ("cupy", "cupy.cuda", *_backend())}
    kept = nvrtc.build, nvrtc.version
    sys.modules |= {"cupy": cupy, "cupy.cuda": cuda}
    nvrtc.build, nvrtc.version = _build, lambda: (0, 0)
    try:
        _forget(backends)
        yield cupy
    finally:
        nvrtc.build, nvrtc.version = kept
        for name in (*before, *_backend()):
            sys.modules.pop(name, None)
        sys.modules |= {name: module for name, module in before.items() if module is not None}
        vars(backends).pop("cuda", None)
        backends._loaded.clear()


def _backend() -> list[str]:
    """The backend's modules, except the compiler's, whose functions are replaced instead."""
    return [name for name in sys.modules if name.startswith("klcore.backends.cuda") and not name.endswith(".nvrtc")]


def _forget(backends: types.ModuleType) -> None:
    """Make Python import the backend again: it keeps the CuPy that it found first."""
    for name in _backend():
        del sys.modules[name]
    backends._loaded.clear()


def _strides_like(a: ndarray) -> tuple[int, ...] | None:
    """Strides of a new array in the order of `a`, without its gaps, as for NumPy's empty_like."""
    if a.packed:
        return None
    return _packed(a.shape, a.dtype.itemsize, sorted(range(a.ndim), key=lambda d: (-abs(a.strides[d]), d)))


def _packed(shape: tuple[int, ...], itemsize: int, order: Iterable[int]) -> tuple[int, ...]:
    """Strides without gaps; `order`: the axes, the innermost one last."""
    strides, step = [0] * len(shape), itemsize
    for d in reversed(list(order)):
        strides[d] = step
        step *= max(shape[d], 1)
    return tuple(strides)
