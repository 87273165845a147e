"""Numbers that public functions take, checked: what is wrong raises before anything is computed."""

import math
from typing import Any


def number(value: Any, name: str) -> float:
    """A float, of whatever stands for a number, or TypeError."""
    if type(value) is float:
        return value
    try:
        if not hasattr(value, "__float__") and not hasattr(value, "__index__"):  # strings have neither
            raise TypeError
        return float(value)
    except OverflowError:  # an integer that no float holds
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, found one of the type {type(value).__name__}") from None


def units_per_nat(base: Any) -> float:
    """What turns nats into the unit that belongs to logarithms of this base."""
    if base is None:
        return 1.0
    b = number(base, "base")
    if not 1 < b < math.inf:
        raise ValueError(f"base must be a finite number > 1 (2 for bits), or None for nats; found {b!r}")
    return 1 / math.log(b)


def refuse_base(base: Any, name: str) -> None:
    """For functions that contain no logarithm."""
    if base is not None:
        raise ValueError(f"{name} has no unit: there is no logarithm in it that base={base!r} could be of")
