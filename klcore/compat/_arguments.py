"""Shared by the front-ends: arrays of any library, handled with what NumPy, CuPy, PyTorch and JAX have in common.

Used by the modules of klcore.compat. No library is imported here: if there is an array, its library is loaded.
"""

import functools
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np

from klcore.backends.arguments import TABLES
from klcore.backends.rows import broadcast_shapes
from klcore.parameters import shown as shown  # re-exported

FLOATS = ("float16", "bfloat16", "float32", "float64")
F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
Q = ParamSpec("Q")


class Differentiable(Protocol[P, Q]):
    """A function with an attribute `value_and_grad`, which also returns its derivatives."""

    def __call__(self, *arguments: P.args, **keywords: P.kwargs) -> Any: ...
    @property
    def value_and_grad(self) -> Callable[Q, tuple[Any, tuple[Any, Any]]]: ...


def with_gradients(
    value_and_grad: Callable[Q, tuple[Any, tuple[Any, Any]]],
) -> Callable[[Callable[P, Any]], Differentiable[P, Q]]:
    """Give a function the attribute `value_and_grad`, visible to type checkers."""

    def give(function: Any) -> Differentiable[P, Q]:
        function.value_and_grad = value_and_grad
        return function

    return give


def quietly(function: F) -> F:
    """Suppress NumPy's warnings: infinities and NaN are valid results, also when they are weighted or rounded later."""

    @functools.wraps(function)
    def quiet(*arguments: Any, **keywords: Any) -> Any:
        if not any(isinstance(a, np.ndarray) for a in arguments):  # only NumPy warns; compilers should see a plain call
            return function(*arguments, **keywords)
        with np.errstate(invalid="ignore", over="ignore"):
            return function(*arguments, **keywords)

    return quiet  # type: ignore[return-value]


class InitSignature:
    """The `__signature__` of a class whose `__new__` takes anything: that of `__init__`, for help() and editors."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")  # instances have the signature of __call__
        signature = inspect.signature(owner.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def traced() -> bool:
    """Whether torch.compile is tracing: it cannot trace warnings, and drops those of PyTorch's own losses."""
    compiler = getattr(sys.modules.get("torch"), "compiler", None)  # missing if torch is old or partly imported
    return compiler is not None and compiler.is_compiling()


def is_array(value: Any) -> bool:
    """Whether it is an array, not a number, list or table; tables of pandas, polars and xarray may have a dtype."""
    roots = {base.__module__.partition(".")[0] for base in type(value).__mro__}
    return hasattr(value, "dtype") and roots.isdisjoint(TABLES)


def namespace(array: Any) -> Any:
    """The module with functions for this array: numpy, cupy, torch or jax.numpy."""
    for base in type(array).__mro__:
        root = base.__module__.partition(".")[0]
        if root in ("numpy", "cupy", "torch"):
            return sys.modules[root]
        if root == "jax":
            return sys.modules["jax.numpy"]
    raise TypeError(f"expected an array of NumPy, CuPy, PyTorch or JAX, found {type(array).__name__}")


def word_of(value: Any, name: str, known: tuple[Any, ...]) -> Any:
    """`value`, if it is one of the known options (strings or None); arrays that compare equal do not count."""
    if not (value is None or isinstance(value, str)) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; found {shown(value)}")
    return value


def number(value: Any, name: str) -> float:
    """`value` as a float, or TypeError or ValueError naming the argument."""
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float, found {shown(value)}") from None
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, found {shown(value)}") from None


def truth(value: Any, name: str) -> bool:
    """The truth value, or TypeError naming the argument, for example for arrays of several elements."""
    try:
        return bool(value)
    except Exception:
        raise TypeError(f"{name} must be a bool, found {shown(value)}") from None


def divisor_of(count: Any) -> Any:
    """The divisor of a mean: NaN instead of 0. A symbolic count of torch.export is returned unchanged."""
    return float(count) or math.nan if isinstance(count, (int, float)) else count


def dense(**arrays: Any) -> None:
    """Raise TypeError, naming the argument, for PyTorch's nested tensors and proxies, which have no shape."""
    for name, array in arrays.items():
        if hasattr(array, "__torch_function__") and not hasattr(type(array), "shape"):
            raise TypeError(
                f"{name} is a {type(array).__name__} of PyTorch, which has no shape and no dtype yet; let torch.fx "
                "record the loss as one node, with torch.fx.wrap of a function that calls it"
            )
        if getattr(array, "is_nested", False):
            raise TypeError(
                f"{name} is a nested tensor, but klcore takes dense ones; pass {name}.to_padded_tensor(value)"
            )


def one_library(**arrays: Any) -> None:
    """Raise TypeError, naming the arguments, for arrays of two libraries, or of an unsupported one."""
    found = {name: namespace(array).__name__ for name, array in arrays.items()}
    if len(set(found.values())) > 1:
        raise TypeError(
            "the arrays must be of one library, found "
            + " and ".join(f"{name} of {library}" for name, library in found.items())
            + "; convert one of them, for example with torch.from_numpy or jax.numpy.asarray"
        )


def cotangent_of(value: Any, cotangent: Any) -> Any:
    """The cotangent of a value, as an array of the same library and dtype."""
    cotangent = as_array(cotangent, value, dtype_name(value))
    if cotangent.ndim and tuple(cotangent.shape) != tuple(value.shape):
        raise ValueError(
            f"cotangent must be a number or have the shape of the value, {tuple(value.shape)}; found "
            f"{tuple(cotangent.shape)}"
        )
    return cotangent


def dtype_name(array: Any) -> str:
    """The name of the dtype in NumPy, such as "float32" for torch.float32."""
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
        # PyTorch would create it on the default device, and fail later
        value = xp.asarray(value, device=like.device) if xp.__name__ == "torch" else xp.asarray(value)
    return cast(value, name)


def detached(*arrays: Any) -> tuple[Any, ...]:
    """The arrays without PyTorch's autograd history. Other libraries record no history on arrays."""
    return tuple(a.detach() if hasattr(a, "detach") else a for a in arrays)


def sum_to(array: Any, full: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """Broadcast the array to `full`, and sum it over the axes along which `shape` broadcasts to `full`."""
    array = namespace(array).broadcast_to(array, full)
    extra = len(full) - len(shape)
    axes = (*range(extra), *(extra + i for i, n in enumerate(shape) if n == 1 and full[extra + i] != 1))
    return (array.sum(axes) if axes else array).reshape(shape)


def broadcast(
    a: Any, b: Any, names: str, error: type[Exception] = ValueError, of: Callable[[Any, Any], Any] = broadcast_shapes
) -> Any:
    """The shape to which two shapes broadcast, computed by `of`; `names` are for the message."""
    if a == b:
        return a
    try:
        return of(a, b)
    except ValueError:
        raise error(f"the shapes of {names} must be equal or broadcast, found {a} and {b}") from None
