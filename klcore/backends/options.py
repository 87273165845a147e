"""The options of a call: their values, and the errors for any others."""

import math
import operator
from typing import Any

import numpy as np

from klcore import _cpu
from klcore.backends import arguments
from klcore.operations import Call, Operation
from klcore.parameters import check_divides, number, refuse_traced, shown

SPACES = _cpu.SPACES

LOGITS = SPACES["logits"]

REDUCTIONS = ("row", "sum", "rowmean", "none", "batchmean", "mean")

TAILS = _cpu.TAILS

_MEANINGS = (
    "tail='bucket' (merge the other classes into one, with the remaining mass of x), tail='zero' (x is 0 there), "
    "tail='renorm' (renormalise x and y over the listed classes), or rel_entr with tail='zero' (the truncated sum of "
    "x*log(x/y), which can be negative)"
)

GRADIENTS: dict[Any, tuple[str, ...]] = {
    None: (),
    "x": ("x",),
    "y": ("y",),
    ("x",): ("x",),
    ("y",): ("y",),
    ("x", "y"): ("x", "y"),
}


def _list(options: Any) -> str:
    return ", ".join(map(repr, options))


def check(call: Call) -> tuple[tuple[int, int], Any, tuple[str, ...]]:
    """The checked options of a call: the codes of both spaces, the temperature, the names of the gradients. An array of
    temperatures is returned as given; its values are checked later."""
    operation = call.operation
    spaces = space_pair(call.space, operation)
    check_list(call, spaces)
    temperature = temperature_of(call.temperature, spaces)
    check_reduction(call.reduction, operation)
    check_denominator(call)
    return spaces, temperature, _wanted(call.return_grad, operation)


def check_list(call: Call, spaces: tuple[int, int]) -> None:
    """Check the options of a call whose x lists some classes (sparse.py), or raise if they do not fit together."""
    if call.indices is None:
        if call.tail is not None or call.tail_mass is not None:
            option = "tail" if call.tail is not None else "tail_mass"
            raise TypeError(f"{option}= describes the classes that indices= does not list; pass indices, too")
        return
    if call.tail is None:
        raise TypeError(f"indices= needs tail=, which says what x has in the other classes: {_MEANINGS}")
    if not isinstance(call.tail, str) or call.tail not in TAILS:
        raise ValueError(f"tail must be one of {_list(TAILS)}; found {shown(call.tail)}")
    if call.tail_mass is not None and call.tail != "bucket":
        raise ValueError(f"tail_mass needs tail='bucket'; found tail={call.tail!r}")
    if spaces[0] in (LOGITS, SPACES["counts"]) and call.tail != "renorm":
        numbers = "logits" if spaces[0] == LOGITS else "counts"
        raise ValueError(
            f"x is {numbers} of the listed classes only, which can only be normalised over the list, with "
            f"tail='renorm'; with tail={call.tail!r}, pass x as probabilities or log-probabilities"
        )


def check_reduction(reduction: Any, operation: Operation) -> None:
    known = tuple(r for r in REDUCTIONS if operation.has_terms or r != "none")
    if isinstance(reduction, str) and reduction in known:
        return
    if isinstance(reduction, str) and reduction in REDUCTIONS:
        raise ValueError(
            f"{operation.name} is not a sum over classes, so it has no terms for reduction='none'; "
            f"use one of {_list(known)}"
        )
    raise ValueError(f"reduction must be one of {_list(known)}; found {shown(reduction)}")


def check_denominator(call: Call) -> None:
    """Check everything about the denominator except its value."""
    if not call.operation.is_loss:
        check_divides(call.denominator, call.reduction)


def denominator_of(call: Call) -> float:
    """The value of the denominator."""
    d = number(call.denominator, "denominator")
    if not 0 <= d < math.inf:
        raise ValueError(f"denominator must be finite and >= 0; found {d!r}")
    return d


def space_pair(space: Any, operation: Operation) -> tuple[int, int]:
    """The codes of the spaces of x and y, or ValueError."""
    pair = (space, space) if isinstance(space, str) else space
    known = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(s, str) and s in SPACES for s in pair)
    if not known or (operation.single and not isinstance(space, str)):
        or_a_pair = "" if operation.single else ", or a pair (space of x, space of y)"
        raise ValueError(f"space must be one of {_list(SPACES)}{or_a_pair}; found {shown(space)}")
    if operation.is_loss and tuple(pair) not in operation.pairs:
        raise ValueError(f"the term {operation.name!r} does not support the spaces {space!r}")
    return SPACES[pair[0]], SPACES[pair[1]]


def has_numbers(temperature: Any) -> bool:
    """Whether a temperature is an array; a 0-d NumPy array counts as a number."""
    if isinstance(temperature, (int, float)):
        return False
    if isinstance(temperature, (np.ndarray, np.generic)) and arguments.on_host(temperature) is not None:
        return temperature.ndim > 0
    return hasattr(temperature, "shape") or isinstance(temperature, (list, tuple))


def temperature_of(temperature: Any, spaces: tuple[int, int]) -> Any:
    if has_numbers(temperature):
        if LOGITS not in spaces:
            raise ValueError("temperature divides logits, so it needs space='logits' for x or y; found an array")
        return temperature
    try:
        t = float(temperature)
    except OverflowError:  # an integer too large for a float
        t = math.inf
    except (TypeError, ValueError):
        t = None
    if t is None or isinstance(temperature, (str, bytes)):
        raise TypeError(f"temperature must be a number, found {shown(temperature)} ({type(temperature).__name__})")
    if not (t > 0 and _POSITIVE[0] <= t <= _POSITIVE[1]):
        raise ValueError(f"temperature must {_BE_POSITIVE}; found {shown(temperature)}")
    if t != 1 and LOGITS not in spaces:
        raise ValueError(f"temperature divides logits, so it needs space='logits' for x or y; found temperature={t!r}")
    return t


def _wanted(return_grad: Any, operation: Operation) -> tuple[str, ...]:
    key = tuple(return_grad) if isinstance(return_grad, list) else return_grad
    try:
        wanted = GRADIENTS.get(key)
    except TypeError:  # not hashable
        wanted = None
    if wanted is None or (len(operation.gradients) < 2 and wanted not in ((), operation.gradients)):
        known = (None, *operation.gradients, *([("x", "y")] if len(operation.gradients) > 1 else []))
        raise ValueError(
            f"return_grad must be one of {_list(known)}{' for ' + repr(operation.name) if operation.is_loss else ''}; "
            f"found {shown(return_grad)}"
        )
    return wanted


def integer(axis: Any, name: str) -> int:
    """A plain int from anything with ``__index__``."""
    try:
        if isinstance(axis, (float, str, tuple, list, type(None))):  # torch.compile 2.11 fails in index() of these
            raise TypeError
        return int(operator.index(axis))
    except TypeError:
        refuse_traced(axis, name)
        raise TypeError(f"{name} must be an integer, found {type(axis).__name__}") from None


# The range of temperatures, in double and in float32; outside of the latter, the logarithms of a row overflow float32.
# The sign is checked, too, because the threads of XLA flush the lower limit, a subnormal number, to 0.
_POSITIVE, _NARROW = _cpu.TEMPERATURES, _cpu.NARROW_TEMPERATURES

_BE_POSITIVE = "be positive and finite, and so must 1 / temperature"


def check_temperatures(t: Any, weights: Any, double: bool) -> None:
    """Raise ValueError for an invalid temperature of a row whose weight is not 0. `double`: an argument is float64."""
    t = t.astype(np.float64)
    narrow = "be between 2**-20 and 2**100 if it is an array and no argument is float64; pass x or y as float64"
    for (low, high), must in ((_POSITIVE, _BE_POSITIVE), (_NARROW, narrow))[: 1 if double else 2]:
        good = (t > 0) & (t >= low) & (t <= high)
        if weights is not None and arguments.on_host(weights) is not None:
            good |= weights == 0
        if not good.all():
            raise ValueError(f"temperature must {must}; found {arguments.bad_ones(t, ~good)}")
