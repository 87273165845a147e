"""What the front-ends share: arrays of any library, handled by what NumPy, CuPy, PyTorch and JAX have in common.

Called by the modules of klcore.compat. No library is imported here: an array of a library proves that it is loaded.
"""

import functools
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np

from klcore.backends.rows import TABLES, broadcast_shapes
from klcore.parameters import shown as shown  # for the front-ends, too

FLOATS = ("float16", "bfloat16", "float32", "float64")
F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
Q = ParamSpec("Q")


class Differentiable(Protocol[P, Q]):
    """A function that has its derivatives beside it."""

    def __call__(self, *arguments: P.args, **keywords: P.kwargs) -> Any: ...
    @property
    def value_and_grad(self) -> Callable[Q, tuple[Any, tuple[Any, Any]]]: ...


def with_gradients(
    value_and_grad: Callable[Q, tuple[Any, tuple[Any, Any]]],
) -> Callable[[Callable[P, Any]], Differentiable[P, Q]]:
    """Give a function the attribute `value_and_grad`, in the eyes of type checkers as well."""

    def give(function: Any) -> Differentiable[P, Q]:
        function.value_and_grad = value_and_grad
        return function

    return give


def quietly(function: F) -> F:
    """Infinities and NaN are answers: NumPy shall not warn where one is weighted or rounded after the engine's work."""

    @functools.wraps(function)
    def quiet(*arguments: Any, **keywords: Any) -> Any:
        if not any(isinstance(a, np.ndarray) for a in arguments):  # no other library warns; compilers see a plain call
            return function(*arguments, **keywords)
        with np.errstate(invalid="ignore", over="ignore"):
            return function(*arguments, **keywords)

    return quiet  # type: ignore[return-value]


class InitSignature:
    """The `__signature__` of a class whose `__new__` takes anything: that of its `__init__`, for help() and editors."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")  # a call's is that of __call__
        signature = inspect.signature(owner.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def traced() -> bool:
    """Whether torch.compile is looking, which cannot follow a warning, and drops those of PyTorch's own losses."""
    compiler = getattr(sys.modules.get("torch"), "compiler", None)  # half-imported or old, it has none
    return compiler is not None and compiler.is_compiling()


def is_array(value: Any) -> bool:
    """Whether it is more than numbers, lists and tables; those of pandas, polars and xarray may have a dtype, too."""
    roots = {base.__module__.partition(".")[0] for base in type(value).__mro__}
    return hasattr(value, "dtype") and roots.isdisjoint(TABLES)


def namespace(array: Any) -> Any:
    """The module with the functions for an array: numpy, cupy, torch or jax.numpy."""
    for base in type(array).__mro__:
        root = base.__module__.partition(".")[0]
        if root in ("numpy", "cupy", "torch"):
            return sys.modules[root]
        if root == "jax":
            return sys.modules["jax.numpy"]
    raise TypeError(f"expected an array of NumPy, CuPy, PyTorch or JAX, found {type(array).__name__}")


def word_of(value: Any, name: str, known: tuple[Any, ...]) -> Any:
    """`value`, if it is one of the words (or None) that are known; what only equals one, as arrays do, is not."""
    if not (value is None or isinstance(value, str)) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; found {shown(value)}")
    return value


def number(value: Any, name: str) -> float:
    """A float of a number, or TypeError or ValueError, by its name."""
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is larger than any float, found {shown(value)}") from None
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, found {shown(value)}") from None


def truth(value: Any, name: str) -> bool:
    """Whether it counts as true, or TypeError by its name, as for arrays of several elements."""
    try:
        return bool(value)
    except Exception:
        raise TypeError(f"{name} must be a bool, found {shown(value)}") from None


def divisor_of(count: Any) -> Any:
    """What a mean over so many is divided by, NaN for nothing; what torch.export does not know yet as it is."""
    return float(count) or math.nan if isinstance(count, (int, float)) else count


def dense(**arrays: Any) -> None:
    """Raise TypeError, by the arguments' names, for what has no shape: PyTorch's nested tensors, and its proxies."""
    for name, array in arrays.items():
        if hasattr(array, "__torch_function__") and not hasattr(type(array), "shape"):
            raise TypeError(
                f"{name} is a {type(array).__name__} of PyTorch's, which has no shape and no dtype yet; have torch.fx "
                "record the loss as one node, with torch.fx.wrap of a function that calls it"
            )
        if getattr(array, "is_nested", False):
            raise TypeError(f"{name} is a nested tensor; klcore takes dense ones: pass {name}.to_padded_tensor(value)")


def one_library(**arrays: Any) -> None:
    """Raise TypeError, by the arguments' names, for arrays of two libraries, or of one that is not known here."""
    found = {name: namespace(array).__name__ for name, array in arrays.items()}
    if len(set(found.values())) > 1:
        raise TypeError(
            "the arrays must be of one library, found "
            + " and ".join(f"{name} of {library}" for name, library in found.items())
            + "; convert one of them, with torch.from_numpy, jax.numpy.asarray or the like"
        )


def cotangent_of(value: Any, cotangent: Any) -> Any:
    """The cotangent of a value as an array of its library and dtype."""
    cotangent = as_array(cotangent, value, dtype_name(value))
    if cotangent.ndim and tuple(cotangent.shape) != tuple(value.shape):
        raise ValueError(
            f"cotangent must be a number, or of the shape of the value, {tuple(value.shape)}; found "
            f"{tuple(cotangent.shape)}"
        )
    return cotangent


def dtype_name(array: Any) -> str:
    """As NumPy calls it; "float32" for torch.float32."""
    name = _name.__wrapped__ if traced() else _name  # torch.compile warns about functools.cache
    return name(array.dtype)


@functools.cache
def _name(dtype: Any) -> str:
    return getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]


def cast(array: Any, name: str) -> Any:
    if dtype_name(array) == name:
        return array
    if hasattr(array, "astype"):
        return array.astype(name)
    return array.to(getattr(namespace(array), name))


def as_array(value: Any, like: Any, name: str) -> Any:
    """`value`, an array, number or list, as an array of the library of `like` with the dtype called `name`."""
    if not is_array(value):
        value = np.asarray(value) if hasattr(value, "__array__") else value
        xp = namespace(like)
        # only PyTorch lets arrays of two devices meet by default, and fails later
        value = xp.asarray(value, device=like.device) if xp.__name__ == "torch" else xp.asarray(value)
    return cast(value, name)


def detached(*arrays: Any) -> tuple[Any, ...]:
    """The arrays, outside of PyTorch's autograd. The others record nothing on arrays."""
    return tuple(a.detach() if hasattr(a, "detach") else a for a in arrays)


def sum_to(array: Any, full: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """The array, broadcast to `full`, summed over the axes along which `shape` is broadcast to `full`."""
    array = namespace(array).broadcast_to(array, full)
    extra = len(full) - len(shape)
    axes = (*range(extra), *(extra + i for i, n in enumerate(shape) if n == 1 and full[extra + i] != 1))
    return (array.sum(axes) if axes else array).reshape(shape)


def broadcast(
    a: Any, b: Any, names: str, error: type[Exception] = ValueError, of: Callable[[Any, Any], Any] = broadcast_shapes
) -> Any:
    """The shape to which two shapes, of what is called `names`, broadcast: what `of` makes of them."""
    if a == b:
        return a
    try:
        return of(a, b)
    except ValueError:
        raise error(f"the shapes of {names} must be equal or broadcast, found {a} and {b}") from None
