"""Tensors lend their memory to klcore.backends.cpu or cuda as NumPy or CuPy arrays, and results become tensors.

Also the checks of what can be lent (devices, dtypes, layouts), and the conversion of other arguments to tensors on the
same device.
"""

import contextlib
import importlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch

from klcore.backends import BackendUnavailableError, arguments, cpu, options
from klcore.backends.torch.private import PLAIN, is_known

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NUMBERS = (bool, int, float, complex, list, tuple)


def bfloat16() -> Any:
    try:
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError as error:
        raise BackendUnavailableError(
            "bfloat16 tensors need the package ml_dtypes, which cannot be imported; install it with: "
            "pip install 'klcore[bfloat16]'"
        ) from error


def lend(t: Any) -> Any:
    """The tensor's memory as a NumPy or CuPy array; anything that is not a tensor is returned unchanged."""
    if not isinstance(t, torch.Tensor):
        return t
    t = t.detach()
    if t.is_cuda:
        cupy, t, size = cuda().ready(), t.resolve_neg(), t.element_size()
        memory = cupy.cuda.UnownedMemory(t.data_ptr(), t.numel() * size, t, t.get_device())
        strides = tuple(size * step for step in t.stride())
        return cupy.ndarray(tuple(t.shape), _numpy_dtype(t.dtype), cupy.cuda.MemoryPointer(memory, 0), strides)
    if t.dtype is torch.bfloat16:
        return lend(t.view(torch.int16)).view(bfloat16())
    try:
        return t.numpy()
    except RuntimeError:
        if t.is_nested:
            raise TypeError("klcore takes dense tensors, found a nested one; pass x.to_padded_tensor(value)") from None
        # otherwise the imaginary part of a conjugate, whose memory must be read negated
        return t.resolve_neg().numpy()


@cache
def _numpy_dtype(dtype: torch.dtype) -> Any:
    return bfloat16() if dtype is torch.bfloat16 else np.dtype(str(dtype).removeprefix("torch."))


def cuda() -> Any:
    return importlib.import_module("klcore.backends.cuda")


@contextlib.contextmanager
def backend_of(x: Any) -> Iterator[Any]:
    """The backend for the device of this tensor, with PyTorch's stream and allocator if it is a GPU."""
    if x.is_cpu:
        yield cpu
        return
    with as_pytorch(x):
        yield cuda()


def as_tensor(a: Any) -> Any:
    """The memory of a NumPy or CuPy array as a tensor."""
    take: Any = torch.utils.dlpack.from_dlpack
    if not hasattr(a, "__cuda_array_interface__"):
        a, take = np.asarray(a), torch.from_numpy
    if a.dtype.kind == "V":
        return take(a.view(np.int16)).view(torch.bfloat16)
    return take(a)


class _Writable:
    """A read-only array presented as writable: PyTorch would warn about a read-only one. klcore only reads it."""

    def __init__(self, a: Any) -> None:
        self._owner = a
        self.__array_interface__ = {**a.__array_interface__, "data": (a.ctypes.data, False)}


def _lent_by(a: Any, name: str) -> Any:
    """A tensor on the memory of a NumPy array, or of anything that NumPy can convert; a copy if PyTorch does not have
    its strides, dtype or byte order."""
    a = cpu.asarray(a, name)
    if any(step < 0 or step % a.dtype.itemsize for step in a.strides):
        a = a.copy()
    if not a.flags.writeable:
        a = a.view(np.int16) if a.dtype.kind == "V" else a
        t = torch.from_numpy(np.asarray(_Writable(a)))
        return t.view(torch.bfloat16) if t.dtype is torch.int16 else t
    return as_tensor(a)


@contextlib.contextmanager
def as_pytorch(x: Any) -> Any:
    """Compute on PyTorch's current stream of the device of `x`, with memory from PyTorch. A CUDA graph that PyTorch is
    capturing must own the memory that is allocated during capture, which CuPy's pool would reuse."""

    def allocate(nbytes: int) -> Any:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=x.device)
        owned = cupy.cuda.UnownedMemory(memory.data_ptr(), nbytes, memory, x.get_device())
        return cupy.cuda.MemoryPointer(owned, 0)

    stream = torch.cuda.current_stream(x.device).cuda_stream
    with cuda().on_stream(x.get_device(), stream) as cupy, cupy.cuda.using_allocator(allocate):
        yield


def check(t: Any, name: str) -> None:
    if t.is_nested:
        raise TypeError(f"{name} is a nested tensor, but klcore takes dense ones; pass {name}.to_padded_tensor(value)")
    if t.layout is not torch.strided:
        raise TypeError(f"{name} is a tensor of layout {t.layout}, but klcore takes dense ones; pass {name}.to_dense()")
    if t.is_quantized:
        raise TypeError(f"{name} is a quantized tensor; pass {name}.dequantize()")
    if t.dtype not in FLOATS and (t.dtype.is_complex or t.dtype.is_floating_point):  # complex, or 8 bits
        raise TypeError(
            f"{name} has dtype {t.dtype}; klcore supports {', '.join(arguments.FLOATS)}, and converts integers "
            "and booleans to float64"
        )
    if t.device.type not in ("cpu", "cuda", "meta"):
        raise TypeError(
            f"{name} is on the device {str(t.device)!r}, but klcore computes on 'cpu' and 'cuda'; move it with "
            f"{name}.to('cpu')"
        )


def operands(x: Any, y: Any, device: str | None) -> tuple[Any, Any]:
    """x and y as tensors on one device; y may be None."""
    if device is None and _is_ordinary(x) and (y is None or _is_ordinary(y)):
        return x, y
    for name, t in (("x", x), ("y", y)):
        if isinstance(t, torch.Tensor):
            check(t, name)
        elif type(t).__module__.partition(".")[0] == "torch":
            raise TypeError(
                f"{name} is a {type(t).__module__}.{type(t).__qualname__}; klcore takes tensors, NumPy arrays, "
                "numbers, lists and tuples"
            )
    found = next((t.device for t in (x, y) if isinstance(t, torch.Tensor)), torch.device("cpu"))
    where = found if device is None else _named(device)
    for name, t in (("x", x), ("y", y)):
        _refuse_host(t, name, where, device)
    return _on(where, x, "x", device), _on(where, y, "y", device)


def _refuse_host(t: Any, name: str, where: Any, device: str | None) -> None:
    """Raise TypeError for an array on the host next to tensors on a GPU, unless device= says to move it."""
    if where.type == "cuda" and device is None and not isinstance(t, (torch.Tensor, *_NUMBERS, type(None))):
        raise TypeError(
            f"{name} is a {type(t).__module__}.{type(t).__qualname__} in host memory, but the other argument is a "
            f"tensor on {where}; move one of them, for example with torch.asarray({name}, device={str(where)!r}), or "
            "pass device= to let klcore move it"
        )


def _named(device: str) -> Any:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"device={device!r}, but PyTorch finds no usable CUDA device (torch.cuda.is_available() is False)"
        )
    number = device.partition(":")[2]
    if number and int(number) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise BackendUnavailableError(f"device={device!r}, but PyTorch finds {count} CUDA device(s)")
    return torch.device(device)


def _on(where: Any, t: Any, name: str, device: str | None) -> Any:
    """`t` as a tensor on the device `where`. Tensors are moved only if `device` is given."""
    if t is None or not isinstance(t, torch.Tensor):
        return None if t is None else _number(t, name, where)
    if t.device != where:
        if device is None:
            raise ValueError(
                f"the tensors are on different devices (x on {where}, {name} on {t.device}); move one of them"
            )
        t = t.to(where)
    return t


def _is_ordinary(t: Any) -> bool:
    return type(t) in PLAIN and t.is_cpu and t.dtype in FLOATS and t.layout is torch.strided


def _number(a: Any, name: str, device: Any) -> Any:
    """A list, number or array of another library as a tensor, with the checks for NumPy arrays."""
    if torch.compiler.is_compiling() and isinstance(a, _NUMBERS):
        return torch.as_tensor(a, dtype=torch.float64, device=device)
    if torch.compiler.is_compiling() and isinstance(a, np.ndarray) and not arguments.is_masked(a):
        return torch.as_tensor(a, device=device)
    return _lent_by(a, name).to(device)


def data(number: Any) -> Any:
    """For the compiler: an array, or a number that it does not know, as a tensor, so that it does not recompile for
    every new number."""
    if isinstance(number, np.ndarray):
        return torch.as_tensor(number)
    if isinstance(number, float) and not is_known(number):
        return torch.ones((), dtype=torch.float64) * number
    return number


def temperature_beside(temperature: Any, like: Any) -> Any:
    """The temperature as a number, a 0-d tensor on any device, or a tensor on the device of the others."""
    if not isinstance(temperature, torch.Tensor) and options.has_numbers(temperature):  # cloned: it may change later
        temperature = _number(temperature, "temperature", like.device).clone()
    if not isinstance(temperature, torch.Tensor) or (_is_ordinary(temperature) and temperature.ndim == 0):
        return temperature
    check(temperature, "temperature")
    return _on(like.device, temperature, "temperature", None) if temperature.ndim else temperature


def weights_beside(weights: Any, like: Any, device: str | None, name: str, estimate: str | None = None) -> Any:
    """The weights on the device of the tensors. `estimate`: for an estimator, the text of its call, for a message."""
    if weights is None or (_is_ordinary(weights) and like.is_cpu and not weights.requires_grad):
        return weights
    if isinstance(weights, torch.Tensor):
        check(weights, name)
        if weights.requires_grad and torch.is_grad_enabled():
            instead = f"result by it instead: {name} * {estimate}" if estimate else 'values of reduction="row" by them'
            raise TypeError(
                f"{name} requires a gradient, but klcore has no gradient for it; pass {name}.detach(), or multiply the "
                f"{instead}"
            )
    return _on(like.device, weights, name, device)


def list_beside(indices: Any, mass: Any, like: Any, device: str | None) -> tuple[Any, Any]:
    """The indices of the classes that x lists, and the mass of all others, on the device of the tensors. What is not a
    tensor is copied, because it may change before backward."""
    if isinstance(mass, torch.Tensor) and mass.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            "tail_mass requires a gradient, but klcore has no gradient for it; pass tail_mass.detach(), or omit it: "
            "the mass is then 1 minus the sum of x, and differentiated as part of x"
        )
    mass = data(mass) if torch.compiler.is_compiling() else mass
    beside = weights_beside(mass, like, device, "tail_mass")
    beside = beside if mass is None or isinstance(mass, torch.Tensor) else beside.clone()
    return _indices_beside(indices, like, device), beside


def _indices_beside(indices: Any, like: Any, device: str | None) -> Any:
    if isinstance(indices, torch.Tensor):
        check(indices, "indices")
        found = _on(like.device, indices, "indices", device)
    else:
        _refuse_host(indices, "indices", like.device, device)
        found = torch.as_tensor(indices) if torch.compiler.is_compiling() else _lent_by(indices, "indices")
        found = (found.clone() if found.numel() else found.long()).to(like.device)  # NumPy converts [] to float64
    odd = found.dtype is torch.bool or found.dtype.is_floating_point or found.dtype.is_complex
    arguments.check_indices_dtype(found.dtype, not odd)
    return found
