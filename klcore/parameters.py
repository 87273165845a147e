"""Numbers that public functions take, checked: what is wrong raises before anything is computed."""

import math
from typing import Any

import numpy as np


def number(value: Any, name: str) -> float:
    """A float, of whatever stands for a number, or TypeError."""
    value = _plain(value) if isinstance(value, np.ndarray) else value
    if type(value) is float:
        return value
    if getattr(value, "requires_grad", False):
        raise TypeError(f"{name} requires a gradient, and klcore gives none with respect to it; pass {name}.detach()")
    try:
        if not is_number(value):
            raise TypeError("no number")
        return float(value)
    except OverflowError:  # an integer that no float holds
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        refuse_traced(value, name)
        raise TypeError(f"{name} must be a number, found one of the type {type(value).__name__}") from None


def _plain(value: Any) -> Any:
    """Of a 0-d array its number: torch.compile shows no dtype of such, and floor refuses what is none."""
    try:
        np.floor(value)
        return float(value) if value.shape == () else value
    except TypeError:
        return value


def refuse_traced(value: Any, name: str) -> None:
    """For what a call has to know before JAX compiles it."""
    if type(value).__name__.endswith("Tracer"):
        raise TypeError(
            f"{name} is traced by JAX (jit, grad, vmap), and has to be known when klcore is called; make it a static "
            f"argument, as in jax.jit(function, static_argnames={name!r})"
        ) from None


def is_number(value: Any) -> bool:
    """Or a 0-d array of such: what float() takes, but for strings and complex numbers."""
    dtype = getattr(value, "dtype", None)
    odd = getattr(dtype, "kind", "f") in "cSUOMm" or getattr(dtype, "is_complex", False)
    takes = hasattr(value, "__float__") or hasattr(value, "__index__")
    return takes and not odd and getattr(value, "shape", ()) == () and not isinstance(value, (str, complex))


def units_per_nat(base: Any) -> float:
    """What turns nats into the unit that belongs to logarithms of this base."""
    if base is None:
        return 1.0
    b = number(base, "base")
    if not 1 < b < math.inf:
        raise ValueError(f"base must be a finite number > 1 (2 for bits), or None for nats; found {b!r}")
    return 1 / math.log(b)


def check_divides(denominator: Any, reduction: Any) -> None:
    """All of a denominator but its value."""
    if denominator is None:
        return
    if reduction != "sum":
        raise ValueError(
            f"denominator divides a sum: it goes with reduction='sum'; found reduction={reduction!r}, and "
            f"denominator={shown(denominator)}"
        )
    if isinstance(denominator, (int, float)):  # torch.compile asks no symbol for a shape
        return
    if getattr(denominator, "shape", ()) != ():
        shape = tuple(denominator.shape)
        raise ValueError(f"denominator must be a number or a 0-d array; found one of the shape {shape}")
    if not is_number(_plain(denominator) if isinstance(denominator, np.ndarray) else denominator):
        raise TypeError(f"denominator must be a number, found one of the type {type(denominator).__name__}")


def shown(value: Any) -> str:
    """What was found, for a message: its repr, unless that is long, or fails, as that of a huge integer does."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:200] + "..."


def refuse_base(base: Any, name: str) -> None:
    """For functions that contain no logarithm."""
    if base is not None:
        raise ValueError(f"{name} has no unit: there is no logarithm in it that base={base!r} could be of")
