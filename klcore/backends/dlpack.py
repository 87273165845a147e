"""Arrays of any other library with DLPack: their memory is lent to klcore.backends.cpu or klcore.backends.cuda.

Nothing is copied. Results are arrays of that library, 0-d arrays where NumPy returns scalars, if its arrays have an
array API namespace (``__array_namespace__``) that can import them; otherwise they are NumPy's or CuPy's.
"""

import importlib
import itertools
from typing import Any

import numpy as np

from klcore.backends import cpu
from klcore.operations import Call

# DLDeviceType in dlpack.h
_CPU, _CUDA = (1, 3), (2, 13)  # including pinned host memory and managed memory
_OTHERS = {
    4: "OpenCL", 7: "Vulkan", 8: "Metal", 9: "VPI", 10: "ROCm", 11: "ROCm host", 12: "extension", 14: "oneAPI",
    15: "WebGPU", 16: "Hexagon", 17: "MAIA",
}  # fmt: skip


def _library(a: Any) -> str:
    return type(a).__module__.partition(".")[0]


def _lends(a: Any) -> bool:
    """Whether this module is for the array `a`; NumPy's and CuPy's arrays do not need it."""
    return hasattr(a, "__dlpack__") and _library(a) not in ("numpy", "cupy")


def lend(a: Any, name: str) -> Any:
    """The array's memory as a NumPy or CuPy array; numbers, lists and None are returned unchanged."""
    if not _lends(a):
        return a
    kind, _ = _place(a, name)
    # ready() returns CuPy, or raises with what is missing
    xp = np if kind == "cpu" else importlib.import_module("klcore.backends.cuda").ready()
    try:
        return xp.from_dlpack(a)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name}, a {_library(a)} array of dtype {getattr(a, 'dtype', 'unknown')}, cannot be imported through "
            f"DLPack: {error}"
        ) from error


def _place(a: Any, name: str) -> tuple[str, int]:
    """("cpu" or "cuda", number of the device)."""
    if not hasattr(a, "__dlpack_device__"):
        raise TypeError(
            f"{name}, of type {type(a).__module__}.{type(a).__qualname__}, has __dlpack__ but not __dlpack_device__, "
            "without which klcore cannot tell where its memory is"
        )
    kind, number = (int(part) for part in a.__dlpack_device__())
    if kind not in _CPU + _CUDA:
        raise TypeError(
            f"{name}, a {_library(a)} array, is on a device of type {_OTHERS.get(kind, 'unknown')} (DLPack: {kind}), "
            "but klcore computes on the CPU and on CUDA; move it to one of them"
        )
    return ("cpu", 0) if kind in _CPU else ("cuda", number)


def _backend(arrays: dict[str, Any], device: str | None) -> Any:
    """The backend for the device of these arrays."""
    places = {name: _place(a, name) for name, a in arrays.items() if _lends(a)}
    libraries = {name: _library(a) for name, a in arrays.items() if _lends(a)}
    if len(set(libraries.values())) > 1:
        found = ", ".join(f"{name} of {library}" for name, library in libraries.items())
        raise TypeError(f"the arrays are of different libraries ({found}); convert one of them")
    if len(set(places.values())) > 1:
        found = ", ".join(f"{name} on {kind}:{number}" for name, (kind, number) in places.items())
        raise ValueError(f"the arrays are on different devices ({found}); move one of them")
    kind, number = next(iter(places.values()))
    if device not in (None, kind, f"{kind}:{number}"):
        raise ValueError(
            f"device={device!r}, but the arrays are on {kind}:{number}; move them first, with their own library"
        )
    if kind == "cpu":
        return cpu
    return importlib.import_module("klcore.backends.cuda")


def _back(result: Any, like: Any) -> Any:
    """A result as an array of the library of `like`, on its device, if that library can import it."""
    namespace = like.__array_namespace__() if hasattr(like, "__array_namespace__") else None
    take = getattr(namespace, "from_dlpack", None) or getattr(namespace, "asarray", None)
    if take is None:
        return result
    back = take(np.asarray(result) if isinstance(result, np.generic) else result)
    device = getattr(like, "device", None)
    return back if getattr(back, "device", None) == device else back.to_device(device)


def _outs(out: Any) -> Any:
    """`out`, with its memory lent for writing."""
    if isinstance(out, tuple):
        return tuple(_outs(a) for a in out)
    lent = lend(out, "out")
    if _lends(out) and not getattr(lent.flags, "writeable", True):
        raise TypeError(
            f"out, a {_library(out)} array, is read-only through DLPack; omit out= and use the returned array"
        )
    return lent


def _results(found: Any, out: Any, like: Any) -> Any:
    """The results of the backend, as arrays of the caller's library, or the caller's arrays of `out`."""
    results = found if isinstance(found, tuple) else (found,)
    given = out if isinstance(out, tuple) else (out,)
    results = tuple(_back(a, like) if b is None else b for a, b in itertools.zip_longest(results, given))
    return results if isinstance(found, tuple) else results[0]


_ARGUMENTS = ("x", "y", "weights", "ratio", "temperature", "indices", "tail_mass")


def compute(call: Call) -> Any:
    x, y, out = call.x, call.y, call.out
    backend = _backend({"x": x, "y": y}, call.device)
    lent = {name: lend(getattr(call, name), name) for name in _ARGUMENTS}
    found = backend.compute(call._replace(**lent, out=_outs(out), device=None))
    return _results(found, out, x if _lends(x) else y)
