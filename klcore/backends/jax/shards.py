"""A program whose classes are sharded over devices: what each device computes between two exchanges (src/kl_partial.h).

A sweep of a device over its own classes leaves states. Those of all devices are merged into the stats of the rows. The
values follow from the stats, and so does each device's own part of the gradients. All functions are called back as
programs are, with the arguments of the program and more; partition.py says which devices exchange what. JAX may not
have float64 enabled, so float64 numbers pass through it as pairs of 32-bit integers.
"""

from typing import Any

import jax
import numpy as np

from klcore import _cpu
from klcore.backends import cpu
from klcore.backends.jax.programs import Program, number_of, put
from klcore.operations import Call

CHUNK = _cpu.CHUNK
DOUBLE = 2  # how many uint32 make a float64


def doubles(*shape: int) -> Any:
    """The type of a float64 array, as uint32."""
    array: Any = jax.ShapeDtypeStruct
    return array((*shape[:-1], shape[-1] * DOUBLE), np.uint32)


def sweeps(program: Program, outputs: str = "") -> tuple[int, ...]:
    """How many numbers a state has, for each sweep that the value, or the outputs "terms" or "gradients", need."""
    spaces = program.spaces["x"], program.spaces["y"]
    return cpu.sweeps(program.call.operation, spaces, outputs == "terms", outputs == "gradients")


def chunks(n: int) -> int:
    """The number of states of n classes to exchange. If all chunks are whole, one per chunk, which gives the bits of
    unsharded classes; otherwise the states are folded into one."""
    return 1 if n % CHUNK else n // CHUNK


def states(program: Program, number: int, backend: Any, xp: Any, out: list[Any], arguments: list[Any]) -> None:
    """The states that a sweep leaves; `arguments`: those of the program, and the stats before the sweep, if any."""
    given, (stats,) = _split(program, arguments, 1)
    call = _by_row(program, program.as_rows(xp, given))
    left = backend.states(call, number, stats)
    if left.shape[-1] * DOUBLE != out[0].shape[-1]:
        left = _merged(call, number, backend, left, stats, True)
    out[0][...] = left.view(np.uint32)


def merge(program: Program, number: int, backend: Any, xp: Any, out: list[Any], arguments: list[Any]) -> None:
    """Merge the states of all classes into stats; `arguments`: those of the program, the states, the stats before."""
    given, (left, stats) = _split(program, arguments, 2)
    call = _by_row(program, program.as_rows(xp, given))
    out[0][...] = _merged(call, number, backend, left, stats, False).view(np.uint32)


def _merged(call: Call, number: int, backend: Any, left: Any, stats: Any, fold: bool) -> Any:
    return backend.merge(backend.arrange(call._replace(return_grad=None)), number, left, stats, fold)


def finish(program: Program, backend: Any, xp: Any, out: list[Any], arguments: list[Any]) -> None:
    """The value; `arguments`: those of the program, and the stats after the last sweep."""
    given, (stats,) = _split(program, arguments, 1)
    values = stats[..., 0]
    with np.errstate(all="ignore"):  # a finite float64 can be infinite as float32, and a denominator can be 0
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
    """What a sweep writes for these classes, "terms" or "gradients"; `arguments` as in `states`."""
    given, (stats,) = _split(program, arguments, 1)
    for at, one in program.examples(xp, given):
        call = _by_row(program, one)
        if outputs == "terms":
            call = call._replace(reduction="none", return_grad=None)
        elif program.pull:  # the cotangent of a total belongs to all its rows
            call = call._replace(cotangent=one[program.names.index("cotangent")])
        known = None if stats is None else stats[at]
        put([o[at] for o in out], backend.outputs(call, number, known, _denominator(program, one), ()))


def weigh(backend: Any, xp: Any, out: list[Any], arguments: list[Any]) -> None:
    """The sum of the weights of these rows, for each mapped example."""
    (weights,) = arguments
    summed = weights.astype(np.float64).sum(axis=tuple(range(out[0].ndim - 1, weights.ndim)))
    out[0][...] = xp.asarray(summed)[..., None].view(np.uint32)


def _split(program: Program, arguments: list[Any], more: int) -> tuple[list[Any], list[Any]]:
    """The arguments of the program, and `more` arrays after them as float64; None for those that are missing."""
    count = len(program.names)
    behind: list[Any] = [a.view(np.float64) for a in arguments[count:]]
    return arguments[:count], behind + [None] * (more - len(behind))


def _by_row(program: Program, arguments: list[Any]) -> Call:
    """The call that computes the rows, before they are added up."""
    by_row: Any = {"reduction": "row", "denominator": None, "cotangent": None}
    return program.call_of(arguments)._replace(**by_row, return_grad=program.gradients or None)


def _denominator(program: Program, arguments: list[Any]) -> Any:
    if "denominator" not in program.names:
        return program.divided
    return number_of(arguments[program.names.index("denominator")])
