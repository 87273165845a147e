"""The registry: which module computes for which arrays.

A backend is a module with a function ``compute(call)``: it gets a ``klcore.operations.Call`` with arrays of its
library, and returns what ``klcore.kl_div`` says, as arrays of its library. Calls of losses come from ``klcore.compat``,
those of estimators from ``klcore.kl_estimate``. In those with ``indices`` x has some of y's classes only.
What cpu.py and cuda/ take besides (a cotangent) or offer (`block`) is for the adapters, which lend them their arrays.

A backend is imported when the first array of its library arrives: a library may be absent, heavy or broken, and nobody
who does not use it should notice. This file imports no array library, and no backend when it is imported.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klcore.operations import Call

# the first word of the module that defines an array's type -> the backend
_MODULES = {
    "numpy": "klcore.backends.cpu",
    "cupy": "klcore.backends.cuda",
    "torch": "klcore.backends.torch",
    "jax": "klcore.backends.jax",
    "dask": "klcore.backends.dask",
    "dlpack": "klcore.backends.dlpack",  # whatever else lends its memory through DLPack
}
_DEVICES = {"cpu": "numpy", "cuda": "cupy"}
_MOVABLE = (None, *_DEVICES.values())  # between these a device that is named decides; adapters look at it themselves
# What was found, in dicts: torch.compile warns about functools.cache. register_backend puts new ones in their place, so
# that what other threads are finding meanwhile, by the old registry, is not kept; hence each is looked at once a call.
_libraries: dict[type, str | None] = {}
_tensors: set[type] = set()  # PyTorch's apart: torch.compile compiles anew when a dict that a call looks into has grown
_loaded: dict[str, ModuleType] = {}
_NUMBERS = (bool, int, float, complex)  # become arrays of the other argument's library, or NumPy's; so do sequences
_TEXT = (str, bytes, bytearray)
_TAKE_NUMPY = ("torch", "jax")  # whose arrays may stand beside NumPy's, and make the results


class BackendUnavailableError(RuntimeError):
    """The device or library asked for cannot be used here; the message says what is missing and how to get it."""


class Unevaluated:
    """As the device of a public function: a backend that returns the call, and computes nothing. For klcore.Shard."""

    @staticmethod
    def compute(call: "Call") -> "Call":
        return call._replace(device=None)


def find(x: object, y: object, device: Any) -> Any:
    """The backend module for two arrays: the arrays decide, and between NumPy's and CuPy's a device that is named.

    Raises
    ------
    TypeError
        If an array is of no known library, or the two are of different ones that do not go together and no device is
        named.
    ValueError
        If the device is unknown.
    BackendUnavailableError
        If the backend cannot be imported.
    """
    of_x, of_y = _library(type(x), "x"), _library(type(y), "y")
    if device is Unevaluated:
        return Unevaluated
    if device is not None:
        named = _of_device(device)
        if of_x in _MOVABLE and of_y in _MOVABLE:
            return _module(named)
    if of_x != of_y:
        if "numpy" in (of_x, of_y) and (of_x in _TAKE_NUMPY or of_y in _TAKE_NUMPY):
            of_x = of_y if of_x == "numpy" else of_x
        elif of_x is not None and of_y is not None:
            hint = ", or pass device= to have klcore do it" if of_x in _MOVABLE and of_y in _MOVABLE else ""
            hint = ", as with dask.array.from_array" if "dask" in (of_x, of_y) else hint
            raise TypeError(f"x is a {of_x} array and y a {of_y} one; move one of them{hint}")
        of_x = of_x or of_y
    return _module(of_x or "numpy")


def compute(call: "Call") -> Any:
    """What the backend of the call's arrays makes of it."""
    return find(call.x, call.x if call.y is None else call.y, call.device).compute(call)


def library(array: object, name: str) -> str | None:
    """The word of the registry under which the array's library is, or TypeError; None for numbers and sequences."""
    return _library(type(array), name)


def _library(cls: type, name: str) -> str | None:
    """The library an array type belongs to, looking through its base classes; None for numbers and sequences."""
    libraries, tensors = _libraries, _tensors
    if cls in tensors:
        return "torch"
    library = libraries.get(cls, "")
    if library == "":
        library = _look_up(cls, name)
        if library == "torch":
            tensors.add(cls)
        else:
            libraries[cls] = library
    return library


def _look_up(cls: type, name: str) -> str | None:
    for base in cls.__mro__:
        root = base.__module__.partition(".")[0]
        if root in _MODULES:
            return root
    is_tensorflow = any(base.__module__.partition(".")[0] == "tensorflow" for base in cls.__mro__)
    if hasattr(cls, "__dlpack__") and not is_tensorflow:
        return "dlpack"
    # what NumPy makes an array of; and what is sparse, or TensorFlow's, for rows.py to say what to do with them
    if is_tensorflow or any(hasattr(cls, name) for name in ("__array__", "__array_interface__", "toarray", "todense")):
        return "numpy"
    if issubclass(cls, (*_NUMBERS, Sequence)) and not issubclass(cls, _TEXT):
        return None
    known = ", ".join(sorted(_MODULES.keys() - {"dlpack"}))
    raise TypeError(
        f"{name} is of the type {cls.__module__}.{cls.__qualname__}, which klcore does not know; it takes arrays of "
        f"{known}, those with __dlpack__ or __array__, numbers, lists and other sequences of numbers. "
        "klcore.register_backend adds a library"
    )


def _of_device(device: str) -> str:
    if not isinstance(device, str):
        raise ValueError(
            f"device must be None, 'cpu', 'cuda' or 'cuda:N', found {device!r}; of PyTorch's devices pass str(device)"
        )
    name, colon, number = device.partition(":")
    if name not in _DEVICES or (colon and not (name == "cuda" and number.isdecimal() and len(number) < 10)):
        raise ValueError(f"device must be None, 'cpu', 'cuda' or 'cuda:N', found {device!r}")
    return _DEVICES[name]


def _module(library: str) -> ModuleType:
    loaded = _loaded
    module = loaded.get(library)
    if module is None:
        module = loaded[library] = _load(library)
    return module


def _load(library: str) -> ModuleType:
    try:
        if _MODULES[library] == "klcore.backends.torch":
            from klcore.backends import torch  # torch.compile follows import statements, not import_module

            return torch
        return importlib.import_module(_MODULES[library])
    except ImportError as error:
        raise BackendUnavailableError(
            f"the backend for {library} arrays, {_MODULES[library]}, cannot be imported: {error}"
        ) from error


def list_backends() -> dict[str, str]:
    """The registry, as a new dict: the name of an array library -> the module that computes for its arrays.

    Examples
    --------
    >>> import klcore
    >>> klcore.list_backends()["numpy"]
    'klcore.backends.cpu'
    """
    return dict(_MODULES)


def register_backend(library: str, module: str) -> None:
    """Have `module` compute for the arrays of `library`.

    Parameters
    ----------
    library : str
        The first word of the module that defines the array type, as ``"torch"`` for ``torch.Tensor``.
    module : str
        Import path of a module with a function ``compute(call)``, which takes a ``klcore.operations.Call`` and returns
        what the public function of its operation does. If ``call.operation.is_loss`` it comes from ``klcore.compat``,
        if ``is_estimator`` from ``klcore.kl_estimate``, and if ``call.indices`` is not None, x has some of y's classes
        only: a backend without these raises TypeError. It is imported when the first such array arrives.

    Raises
    ------
    TypeError
        If either is not a string.
    ValueError
        If either is not a name that could be imported.
    """
    for word, text in (("library", library), ("module", module)):
        if not isinstance(text, str):
            raise TypeError(f"{word} must be a string, found {type(text).__name__}")
        if not all(part.isidentifier() for part in text.split(".")):
            raise ValueError(f"{word} must be the name of a module, found {text!r}")
    if "." in library:
        raise ValueError(f"library is the first word of a module's name, as 'torch'; found {library!r}")
    global _libraries, _tensors, _loaded
    _MODULES[library] = module
    _libraries, _tensors, _loaded = {}, set(), {}
