"""`out=`: where results go, if the caller says so. An output overlaps no input and no other output."""

from typing import Any

import numpy as np

from klcore.backends import arguments


def results_in(out: Any, wanted: tuple[str, ...]) -> tuple[Any, ...]:
    """The output arrays of the value and the gradients; None for those to allocate."""
    results = out if isinstance(out, tuple) else (out, *[None] * len(wanted))
    if len(results) != 1 + len(wanted):
        count = len(wanted)
        asked = f"asks for {count} gradient{'s' * (count > 1)}" if wanted else "is None"
        raise ValueError(
            f"out must be an array for the value, or a tuple of {1 + count} (value, then gradients; None to allocate), "
            f"since return_grad {asked}; found a tuple of {len(results)}"
        )
    return results


def check(xp: Any, out: Any, what: str, shape: tuple[int, ...], dtype: Any) -> None:
    hint = "; to write a gradient, pass a tuple, for example out=(None, array)" if what == "the value" else ""
    if not isinstance(out, xp.ndarray) or hasattr(out, "mask") or arguments.has_meaning(type(out)):
        raise TypeError(f"out for {what} must be a plain {xp.__name__}.ndarray, found {type(out).__name__}{hint}")
    if out.shape != shape:
        raise ValueError(f"out for {what} must have shape {shape}, found {out.shape}{hint}")
    if out.dtype != dtype:
        raise ValueError(f"out for {what} must have dtype {dtype}, found {out.dtype}")
    if not getattr(out.flags, "writeable", True):
        raise ValueError(f"out for {what} is read-only")
    if shares_with_itself(out.shape, out.strides, out.dtype.itemsize):
        raise ValueError(f"out for {what} is a view whose elements share memory; pass a new array")


def shares_with_itself(shape: Any, strides: Any, size: int) -> bool:
    """Whether elements of `size` bytes may share memory. They do not if each axis steps over everything that the axes
    of smaller steps cover, as in slices, transposes and reversals of ordinary arrays. Anything else counts as
    shared."""
    if 0 in shape:
        return False
    covered = size
    for step, n in sorted((abs(step), n) for step, n in zip(strides, shape, strict=True) if n > 1):
        if step < covered:
            return True
        covered += step * (n - 1)
    return False


def check_overlap(outs: list[Any], inputs: list[Any], over_y: Any = None) -> None:
    """Raise ValueError if an output overlaps an input or another output. `over_y`: the output that may be the second
    input itself, whose shape and dtype it has."""
    for i, out in enumerate(outs):
        if any(_overlap(out, a) and not (k == 1 and out is over_y and _is_same(out, a)) for k, a in enumerate(inputs)):
            raise ValueError(
                "out overlaps the memory of an input; pass a separate array (only the gradient for y can be written "
                "over y, if y is logits and no argument with a gradient is broadcast)"
            )
        if any(_overlap(out, other) for other in outs[:i]):
            raise ValueError("two arrays of out overlap; pass separate ones")


def _overlap(a: Any, b: Any) -> bool:
    a, b = _memory(a), _memory(b)
    if not np.may_share_memory(a, b):  # cheap: compares two address ranges
        return False
    try:
        return bool(np.shares_memory(a, b, max_work=100_000))  # type: ignore[arg-type]  # any integer will do
    except (OverflowError, RuntimeError):  # too large or too expensive to decide; a signal handler's exception passes
        return True


def _is_same(a: Any, b: Any) -> bool:
    """Whether two arrays of equal shape and dtype are the same memory."""
    a, b = _memory(a).__array_interface__, _memory(b).__array_interface__
    return a["data"][0] == b["data"][0] and a["strides"] == b["strides"]


class _memory_of:
    """The address of an array on another device, for NumPy to compare; the memory is never read."""

    def __init__(self, a: Any) -> None:
        interface = a.__cuda_array_interface__
        self.__array_interface__ = {
            "shape": interface["shape"],
            "strides": a.strides,
            "typestr": f"|V{a.dtype.itemsize}",
            "data": (interface["data"][0], True),
            "version": 3,
        }


def _memory(a: Any) -> Any:
    return np.asarray(_memory_of(a)) if hasattr(a, "__cuda_array_interface__") else a
