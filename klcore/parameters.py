"""Checks of the numbers that public functions take; they raise before anything is computed."""

import math
from typing import Any

import numpy as np


def number(value: Any, name: str) -> float:
    """`value` as a float; TypeError if it is not a number."""
    value = _plain(value) if isinstance(value, np.ndarray) else value
    if type(value) is float:
        return value
    if getattr(value, "requires_grad", False):
        raise TypeError(f"{name} requires a gradient, but klcore has no gradient for it; pass {name}.detach()")
    try:
        if not is_number(value):
            raise TypeError("not a number")
        return float(value)
    except OverflowError:  # an integer too large for a float
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        refuse_traced(value, name)
        raise TypeError(f"{name} must be a number; found {type(value).__name__}") from None


def _plain(value: Any) -> Any:
    """A 0-d array as a float. torch.compile hides the dtype of 0-d arrays; floor raises for what is not a number."""
    try:
        np.floor(value)
        return float(value) if value.shape == () else value
    except TypeError:
        return value


def refuse_traced(value: Any, name: str) -> None:
    """Raise TypeError if JAX is tracing a value that must be known before it compiles."""
    if type(value).__name__.endswith("Tracer"):
        raise TypeError(
            f"{name} is traced by JAX (jit, grad, vmap), but its value must be known when klcore is called; make it a "
            f"static argument, as in jax.jit(function, static_argnames={name!r})"
        ) from None


def is_number(value: Any) -> bool:
    """Whether float() accepts `value`, a scalar or a 0-d array, and it is neither a string nor complex."""
    dtype = getattr(value, "dtype", None)
    odd = getattr(dtype, "kind", "f") in "cSUOMm" or getattr(dtype, "is_complex", False)
    takes = hasattr(value, "__float__") or hasattr(value, "__index__")
    return takes and not odd and getattr(value, "shape", ()) == () and not isinstance(value, (str, complex))


def units_per_nat(base: Any) -> float:
    """The factor from nats to the unit of logarithms to this base."""
    if base is None:
        return 1.0
    b = number(base, "base")
    if not 1 < b < math.inf:
        raise ValueError(f"base must be a finite number > 1, for example 2 for bits, or None for nats; found {b!r}")
    return 1 / math.log(b)


def check_divides(denominator: Any, reduction: Any) -> None:
    """Check everything about a denominator except its value."""
    if denominator is None:
        return
    if reduction != "sum":
        raise ValueError(
            f"denominator divides a sum, so it needs reduction='sum'; found reduction={reduction!r} and "
            f"denominator={shown(denominator)}"
        )
    if isinstance(denominator, (int, float)):  # torch.compile cannot look up .shape of a symbolic number
        return
    if getattr(denominator, "shape", ()) != ():
        shape = tuple(denominator.shape)
        raise ValueError(f"denominator must be a number or a 0-d array; found shape {shape}")
    if not is_number(_plain(denominator) if isinstance(denominator, np.ndarray) else denominator):
        raise TypeError(f"denominator must be a number; found {type(denominator).__name__}")


def shown(value: Any) -> str:
    """`value` as text for a message: its repr, shortened if long; its type if repr fails, as for a huge integer."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:200] + "..."


def refuse_base(base: Any, name: str) -> None:
    """Raise ValueError for a base given to a function that contains no logarithm."""
    if base is not None:
        raise ValueError(f"{name} has no unit, because it contains no logarithm; leave out base={base!r}")
