"""CuPy, its devices, arrays and streams; and what is missing if CUDA cannot be used."""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from klcore.backends import BackendUnavailableError, arguments, rows
from klcore.backends.cuda import nvrtc

RESERVED = 1024  # bytes of shared memory that CUDA reserves in every block
FLOAT64, FLOAT32 = np.dtype("float64"), np.dtype("float32")  # constants, because creating a dtype is slow


@cache
def code_of(dtype: Any) -> int | None:
    """The code of a dtype in kl_store.h, or None. Cached, because dtype.name takes a microsecond."""
    return rows.CODES.get(dtype.name)


@cache
def library() -> Any:
    """CuPy; BackendUnavailableError if it cannot be imported."""
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise BackendUnavailableError(
            f"CUDA needs CuPy, which cannot be imported ({error}); install it with: pip install 'klcore[cuda13]' "
            "(or 'klcore[cuda12]' if the driver is older than 580)"
        ) from error


def missing() -> str | None:
    """Why this machine cannot compute on a GPU, as a sentence; None if it can."""
    try:
        cupy = library()
        nvrtc.version()
    except BackendUnavailableError as error:
        return str(error)
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CUDARuntimeError or another
        return (
            f"CUDA finds no usable NVIDIA driver ({error}); install or update the driver and check with: nvidia-smi. "
            "Inside a container, start it with GPU access (docker run --gpus all)"
        )
    if count == 0:
        return "CUDA finds no NVIDIA device; check with: nvidia-smi, and check the variable CUDA_VISIBLE_DEVICES"
    return None


@cache
def ready() -> Any:
    sentence = missing()
    if sentence:
        raise BackendUnavailableError(sentence)
    return library()


class _Device(NamedTuple):
    """The properties of a device that the choice of launches depends on."""

    arch: int
    multiprocessors: int
    shared: int  # bytes of shared memory, at most, for a block
    shared_all: int  # bytes of shared memory of a multiprocessor

    def blocks(self, nbytes: int, warps: int, most: int) -> int:
        """How many blocks fit on a multiprocessor, given the shared memory of each and registers for `most` warps."""
        return min(self.shared_all // (nbytes + RESERVED), most // warps) if nbytes <= self.shared else 0


@cache
def properties(device: int) -> _Device:
    d = library().cuda.Device(device)
    a = d.attributes
    return _Device(
        int(d.compute_capability),
        a["MultiProcessorCount"],
        a["MaxSharedMemoryPerBlockOptin"],
        a["MaxSharedMemoryPerMultiprocessor"],
    )


def as_read(cupy: Any, a: Any, dtype: Any = None, name: str = "weights") -> Any:
    """Weights, temperatures, factors or a cotangent as kernels read them. rows.py would convert them too late: the
    cache key of a call is made of the arrays that kernels read. Only for CuPy arrays on the current device."""
    if type(a) is not cupy.ndarray:
        # rows.py checks the values of arrays on the host with NumPy
        foreign = hasattr(type(a), "__dlpack__") and not hasattr(a, "__cuda_array_interface__")
        return arguments.as_numpy(a, name) if foreign else a
    if a.data.device_id != cupy.cuda.runtime.getDevice():
        return a
    if dtype is None and a.dtype.kind in "biu":
        dtype = FLOAT64
    elif dtype is None and a.dtype.itemsize == 2:
        dtype = FLOAT32
    return a if dtype is None or a.dtype is dtype or a.dtype.kind == "c" else a.astype(dtype)


def is_here(a: Any, cupy: Any) -> bool:
    return isinstance(a, cupy.ndarray)


def choose(cupy: Any, device: str | None, arrays: dict[str, Any], outs: Sequence[Any]) -> int:
    """The number of the device to compute on; `outs` must be there."""
    chosen = _named_or_found(cupy, device, arrays | {f"out[{k}]": a for k, a in enumerate(outs)})
    for k, a in enumerate(outs):
        if is_here(a, cupy) and a.device.id != chosen:
            raise ValueError(
                f"out[{k}] is on cuda:{a.device.id}, but the computation is on cuda:{chosen}; pass an array on that one"
            )
    return chosen


def _named_or_found(cupy: Any, device: str | None, arrays: dict[str, Any]) -> int:
    number = None if device is None else device.partition(":")[2]
    if number:
        count = cupy.cuda.runtime.getDeviceCount()
        if int(number) >= count:
            raise BackendUnavailableError(
                f"device={device!r}, but this machine has {count} CUDA device(s), 'cuda:0' to 'cuda:{count - 1}'"
            )
        return int(number)
    found = {name: a.device.id for name, a in arrays.items() if is_here(a, cupy)}
    if len(set(found.values())) > 1:
        where = ", ".join(f"{name} on cuda:{k}" for name, k in found.items())
        raise ValueError(f"the arrays are on different devices ({where}); move them, or pass device='cuda:N'")
    return next(iter(found.values()), None) if found else cupy.cuda.Device().id  # type: ignore[return-value]


def asarray(cupy: Any, device: int, a: Any, name: str) -> Any:
    """`a` on the current device, in one of the four dtypes; indices keep theirs."""
    if not is_here(a, cupy):
        a = arguments.as_numpy(a, name)
        if not a.dtype.isnative:
            a = a.astype(a.dtype.newbyteorder("="))
    if code_of(a.dtype) is None:
        arguments.refuse(a, name)
    if not is_here(a, cupy):
        a = cupy.asarray(a)
    elif a.device.id != device:
        a = cupy.array(a)  # copies to the current device
    if a.dtype.kind in "iub":
        return a if name == "indices" else a.astype(np.float64)
    by_row = name in ("weights", "temperature")
    return a.astype(np.float32) if by_row and a.dtype.itemsize == 2 else a  # kernels do not read 16 bits of these


class _Foreign:
    """A stream of another library, in the form that CuPy accepts."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


@contextlib.contextmanager
def on_stream(device: int, pointer: int) -> Iterator[Any]:
    """CuPy with the device and stream of another library as the current ones; for the adapter of that library."""
    cupy = ready()
    with cupy.cuda.Device(device), cupy.cuda.Stream.from_external(_Foreign(pointer)):
        yield cupy
