"""The registry of backends: which module computes for which arrays.

A backend is a module with a function ``compute(call)``. It gets a ``klcore.operations.Call`` with arrays of its
library, and returns what ``klcore.kl_div`` promises, as arrays of its library. The losses of ``klcore.compat`` and the
estimators of ``klcore.kl_estimate`` come as calls, too. In calls with ``indices``, x has only some of the classes of y.
cpu.py and cuda/ accept more (a cotangent) and have more functions (`block`), for the adapters that lend them arrays.

A backend is imported when the first array of its library arrives. A library may be absent, slow to import or broken,
and should not affect anyone who does not use it. So this file imports no array library and no backend.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klcore.operations import Call

# the top-level package that defines an array's type -> the backend
_MODULES = {
    "numpy": "klcore.backends.cpu",
    "cupy": "klcore.backends.cuda",
    "torch": "klcore.backends.torch",
    "jax": "klcore.backends.jax",
    "dask": "klcore.backends.dask",
    "dlpack": "klcore.backends.dlpack",  # any other library that supports DLPack
}
_DEVICES = {"cpu": "numpy", "cuda": "cupy"}
_MOVABLE = (None, *_DEVICES.values())  # device= chooses between these; the adapters handle it themselves
# Caches. They are dicts because torch.compile warns about functools.cache. register_backend replaces them, so that a
# lookup by the old registry in another thread does not survive; so each call reads each of these names only once.
_libraries: dict[type, str | None] = {}
_tensors: set[type] = set()  # PyTorch's types, separately: torch.compile recompiles when a dict that it read has grown
_loaded: dict[str, ModuleType] = {}
_NUMBERS = (bool, int, float, complex)  # like sequences, they become arrays of the other argument's library, or NumPy's
_TEXT = (str, bytes, bytearray)
_TAKE_NUMPY = ("torch", "jax")  # their arrays can be combined with NumPy's; the results are theirs


class BackendUnavailableError(RuntimeError):
    """The requested device or library cannot be used here; the message says what is missing and how to get it."""


class Unevaluated:
    """A backend that returns the call without computing it; klcore.Shard passes it as the device of a function."""

    @staticmethod
    def compute(call: "Call") -> "Call":
        return call._replace(device=None)


def find(x: object, y: object, device: Any) -> Any:
    """The backend for two arrays: their library decides, and between NumPy and CuPy an explicit device.

    Raises
    ------
    TypeError
        If an array is of an unknown library, or the two libraries do not go together and no device is given.
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
            hint = ", or pass device= to let klcore move it" if of_x in _MOVABLE and of_y in _MOVABLE else ""
            hint = ", for example with dask.array.from_array" if "dask" in (of_x, of_y) else hint
            raise TypeError(f"x is a {of_x} array and y is a {of_y} array; convert one of them{hint}")
        of_x = of_x or of_y
    return _module(of_x or "numpy")


def compute(call: "Call") -> Any:
    """Compute a call with the backend of its arrays."""
    return find(call.x, call.x if call.y is None else call.y, call.device).compute(call)


def library(array: object, name: str) -> str | None:
    """The name of the array's library in the registry; None for numbers and sequences. TypeError if it is unknown."""
    return _library(type(array), name)


def _library(cls: type, name: str) -> str | None:
    """The library of an array type, looking through its base classes; None for numbers and sequences."""
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
    # whatever NumPy can convert; also sparse arrays and TensorFlow tensors, for which arguments.py has a better message
    if is_tensorflow or any(hasattr(cls, name) for name in ("__array__", "__array_interface__", "toarray", "todense")):
        return "numpy"
    if issubclass(cls, (*_NUMBERS, Sequence)) and not issubclass(cls, _TEXT):
        return None
    known = ", ".join(sorted(_MODULES.keys() - {"dlpack"}))
    raise TypeError(
        f"{name} is of type {cls.__module__}.{cls.__qualname__}, which klcore does not support; it takes arrays of "
        f"{known}, arrays with __dlpack__ or __array__, numbers, lists and other sequences of numbers. "
        "klcore.register_backend adds a library"
    )


def _of_device(device: str) -> str:
    if not isinstance(device, str):
        raise ValueError(
            f"device must be None, 'cpu', 'cuda' or 'cuda:N', found {device!r}; for a torch.device, pass str(device)"
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
            from klcore.backends import torch  # torch.compile can trace import statements, but not import_module

            return torch
        return importlib.import_module(_MODULES[library])
    except ImportError as error:
        raise BackendUnavailableError(
            f"cannot import {_MODULES[library]}, the backend for {library} arrays: {error}"
        ) from error


def list_backends() -> dict[str, str]:
    """The registered backends.

    Returns
    -------
    dict of str to str
        The name of each array library, and the module that computes for its arrays. A new dict.

    See Also
    --------
    register_backend : Adds a library.

    Examples
    --------
    >>> import klcore
    >>> klcore.list_backends()["numpy"]
    'klcore.backends.cpu'
    """
    return dict(_MODULES)


def register_backend(library: str, module: str) -> None:
    """Let `module` compute for the arrays of `library`.

    docs/backends.md explains how to write such a module.

    Parameters
    ----------
    library : str
        The top-level package that defines the array type, such as ``"torch"`` for ``torch.Tensor``.
    module : str
        The import path of a module with a function ``compute(call)``, which takes a :class:`klcore.operations.Call` and
        returns what the public function of its operation returns. The module is imported when the first such array
        arrives. Three kinds of calls are optional, and a backend without them raises TypeError: the losses of
        ``klcore.compat`` (``call.operation.is_loss``), the estimators of :func:`kl_estimate`
        (``call.operation.is_estimator``), and calls in which x lists some of y's classes (``call.indices`` is not
        None).

    Raises
    ------
    TypeError
        If an argument is not a string.
    ValueError
        If an argument is not a module name.

    See Also
    --------
    list_backends : The registered backends.
    """
    for word, text in (("library", library), ("module", module)):
        if not isinstance(text, str):
            raise TypeError(f"{word} must be a string, found {type(text).__name__}")
        if not all(part.isidentifier() for part in text.split(".")):
            raise ValueError(f"{word} must be the name of a module, found {text!r}")
    if "." in library:
        raise ValueError(f"library must be a top-level package, such as 'torch'; found {library!r}")
    global _libraries, _tensors, _loaded
    _MODULES[library] = module
    _libraries, _tensors, _loaded = {}, set(), {}
