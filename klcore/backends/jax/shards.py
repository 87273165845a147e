"""A program whose classes are sharded over devices: what each computes between two exchanges (src/kl_partial.h).

A device's sweep over its own classes leaves states; those of all devices are joined into the rows' stats, from which
the values follow, and with which a device writes its own part of the gradients. All are called back as programs are,
with a program's arguments and more; which devices exchange what is said in partition.py. Doubles go through JAX, which
may have none, as pairs of integers.
"""

from typing import Any

import jax
import numpy as np

from klcore import _cpu
from klcore.backends import cpu
from klcore.backends.jax.programs import Program, number_of, put
from klcore.operations import Call

CHUNK = _cpu.CHUNK
DOUBLE = 2  # of JAX' integers


def doubles(*shape: int) -> Any:
    """The type of an array of these."""
    array: Any = jax.ShapeDtypeStruct
    return array((*shape[:-1], shape[-1] * DOUBLE), np.uint32)


def sweeps(program: Program, outputs: str = "") -> tuple[int, ...]:
    """How many numbers the states have of each sweep that the value takes, or "terms" or "gradients"."""
    spaces = program.spaces["x"], program.spaces["y"]
    return cpu.sweeps(program.call.operation, spaces, outputs == "terms", outputs == "gradients")


def chunks(n: int) -> int:
    """Of how many chunks the states of n classes are exchanged: of each where they are whole, as they would be of
    unsharded classes, for the same bits; else they are folded into one."""
    return 1 if n % CHUNK else n // CHUNK


def states(program: Program, number: int, backend: Any, xp: Any, out: list[Any], arguments: list[Any]) -> None:
    """What a sweep leaves of these classes; `arguments`: the program's, and the stats before it, if any."""
    given, (stats,) = _split(program, arguments, 1)
    call = _by_row(program, program.as_rows(xp, given))
    left = backend.states(call, number, stats)
    if left.shape[-1] * DOUBLE != out[0].shape[-1]:
        left = _merged(call, number, backend, left, stats, True)
    out[0][...] = left.view(np.uint32)


def merge(program: Program, number: int, backend: Any, xp: Any, out: list[Any], arguments: list[Any]) -> None:
    """The states of all classes into stats; `arguments`: the program's, the states, and the stats before, if any."""
    given, (left, stats) = _split(program, arguments, 2)
    call = _by_row(program, program.as_rows(xp, given))
    out[0][...] = _merged(call, number, backend, left, stats, False).view(np.uint32)


def _merged(call: Call, number: int, backend: Any, left: Any, stats: Any, fold: bool) -> Any:
    return backend.merge(backend.arrange(call._replace(return_grad=None)), number, left, stats, fold)


def finish(program: Program, backend: Any, xp: Any, out: list[Any], arguments: list[Any]) -> None:
    """The value; `arguments`: the program's, and the stats after the last sweep."""
    given, (stats,) = _split(program, arguments, 1)
    values = stats[..., 0]
    with np.errstate(all="ignore"):  # what is finite as float64 may be infinite as float32, and a denominator 0
        if not program.total:
            out[0][...] = values
            return
        for at, one in program.examples(xp, given):
            total = np.float64(cpu.sum_of(values[at])) if xp is np else values[at].sum()
            denominator = _denominator(program, one)
            out[0][at] = xp.where(denominator == 0, np.nan, total / denominator)


def write(
    program: Program, outputs: str, number: int, backend: Any, xp: Any, out: list[Any], arguments: list[Any]
) -> None:
    """What a sweep writes of these classes, "terms" or "gradients"; `arguments`: as those of `states`."""
    given, (stats,) = _split(program, arguments, 1)
    for at, one in program.examples(xp, given):
        call = _by_row(program, one)
        if outputs == "terms":
            call = call._replace(reduction="none", return_grad=None)
        elif program.pull:  # a total's cotangent is that of all its rows
            call = call._replace(cotangent=one[program.names.index("cotangent")])
        known = None if stats is None else stats[at]
        put([o[at] for o in out], backend.outputs(call, number, known, _denominator(program, one), ()))


def weigh(backend: Any, xp: Any, out: list[Any], arguments: list[Any]) -> None:
    """The sum of these rows' weights, of each mapped example; one a row for all the axes of rows behind."""
    (weights,) = arguments
    summed = weights.astype(np.float64).sum(axis=tuple(range(out[0].ndim - 1, weights.ndim)))
    out[0][...] = xp.asarray(summed)[..., None].view(np.uint32)


def _split(program: Program, arguments: list[Any], more: int) -> tuple[list[Any], list[Any]]:
    """The program's own arguments, and what comes behind, as doubles: None for what is not there."""
    count = len(program.names)
    behind: list[Any] = [a.view(np.float64) for a in arguments[count:]]
    return arguments[:count], behind + [None] * (more - len(behind))


def _by_row(program: Program, arguments: list[Any]) -> Call:
    """The call of rows that are no total yet."""
    by_row: Any = {"reduction": "row", "denominator": None, "cotangent": None}
    return program.call_of(arguments)._replace(**by_row, return_grad=program.gradients or None)


def _denominator(program: Program, arguments: list[Any]) -> Any:
    if "denominator" not in program.names:
        return program.divided
    return number_of(arguments[program.names.index("denominator")])
