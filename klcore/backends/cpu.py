"""NumPy arrays on the CPU: arguments arranged by rows.py, rows computed by klcore._cpu (src/kl_cpu.pyx).

The contract of a backend, with a short cut for the commonest calls (`_cpu.plain`), which must give the bits of the long
way; and blocks of arrays, for the adapter of dask.
"""

import os
from typing import Any

import numpy as np

from klcore import _cpu
from klcore.backends import rows, sparse
from klcore.backends.threads import get_num_threads
from klcore.operations import Call, Operation


def _choose_instruction_set() -> None:
    """The best one that this processor has, or the one that KLCORE_ISA names."""
    built = _cpu.instruction_sets()
    name = os.environ.get("KLCORE_ISA") or next(n for n in reversed(built) if built[n])
    if name not in built:
        raise ValueError(f"KLCORE_ISA must be one of {', '.join(built)} (those built in); found {name!r}")
    if not built[name]:
        usable = ", ".join(n for n in built if built[n])
        raise ValueError(f"KLCORE_ISA={name}: this processor does not have it; it has {usable}")
    _cpu.use_instruction_set(name)


_choose_instruction_set()


def asarray(a: Any, name: str) -> Any:
    """Whatever NumPy makes an array of, as one of a dtype that klcore computes with; or TypeError, by name."""
    if type(a) is not np.ndarray:
        # device="cpu" was asked for, if it is CuPy's
        a = a.get() if hasattr(a, "__cuda_array_interface__") and hasattr(a, "get") else rows.as_numpy(a, name)
    if a.dtype.char in "dfe" and a.dtype.isnative:
        return a
    rows.refuse(a, name)
    if a.dtype.kind in "iub" and name not in ("weights", "temperature", "indices"):  # which are read as they are
        return a.astype(np.float64)
    return a if a.dtype.isnative else a.astype(a.dtype.newbyteorder("="))


def _lent(a: Any) -> Any:
    """The array as the kernel reads it: bfloat16 has no buffer format, so two bytes are lent."""
    return a.view("V2") if isinstance(a, np.ndarray) and a.dtype.kind == "V" else a


def compute(call: Call) -> Any:
    """The value, or (value, *gradients); with a cotangent, the gradients alone."""
    if call.indices is not None:
        return sparse.compute(np, asarray, _Listed, _arranged, call)
    found = _cpu.plain(call, get_num_threads())
    return _arranged(call) if found is None else found


def _arranged(call: Call) -> Any:
    return _compute(rows.arrange(np, asarray, call))


def _compute(task: rows.Task) -> Any:
    threads = get_num_threads()
    denominator = _weigh(task) if task.by_weights else task.denominator
    scale = rows.scale(denominator, task.cotangent)

    # the gradients of operands that are not broadcast come with the value, in one pass
    direct = {g.of: _lent(g.view) for g in task.gradients if not g.inner}
    plans = [
        _cpu.plan(
            task.operation.code, *task.spaces, task.output, _lent(task.x), _lent(task.y), _lent(task.weights),
            _lent(task.value_view), direct.get("x"), direct.get("y"), task.wide, _lent(task.temperature), scale,
            threads, task.factors, task.parameter, task.factor,
        )
    ]  # fmt: skip
    for g in task.gradients:
        if g.inner and task.rows:
            plans.append(_summed_gradient(task, g, scale, threads))
        elif g.inner:
            g.array[...] = 0
    total = _cpu.run(plans)

    if not task.value_wanted:
        return rows.gradients(task)
    if task.output == rows.TOTAL:
        with np.errstate(over="ignore"):  # a float64 total may be infinite as float32
            value = task.scalar_dtype.type(total / denominator if denominator else np.nan)
        if task.out is not None:
            task.out[...] = value
            value = task.out
    else:
        value = task.value if task.value.ndim or task.given else task.value[()]
    return rows.result(task, value)


def _weigh(task: rows.Task) -> float:
    """What a mean with weights is divided by. Weights at an end of the range are moved to its middle."""
    factor = 1.0
    largest = float(np.max(task.weights, initial=0))
    if task.denominator is None or not 2.0**-400 < largest < 2.0**400:  # else their sum is fine
        counted = task.weights if task.counted is None else task.counted
        total = sum_of(counted)
        factor = rows.weight_factor(total)
        if factor != 1:
            task.weights = rows.scaled_weights(task.weights, factor)
            total = sum_of(task.weights if task.counted is None else rows.scaled_weights(counted, factor))
    return total if task.denominator is None else task.denominator * factor


def _summed_gradient(task: rows.Task, g: rows.Gradient, scale: float, threads: int) -> Any:
    """The call for the gradient of a broadcast operand."""
    to, (x, y, weights, temperature, factors), _ = _turned(task, g)
    return _cpu.plan(
        task.operation.code, *task.spaces, rows.PER_ROW, x, y, weights, None,
        to if g.of == "x" else None, to if g.of == "y" else None,
        task.wide, temperature, scale, threads, factors, task.parameter, task.factor, len(g.inner),
    )  # fmt: skip


def _turned(task: rows.Task, g: rows.Gradient) -> tuple[Any, tuple[Any, ...], tuple[int, ...]]:
    """The gradient, what is read, and their batch axes' order: the operand's own in front, those to sum over behind."""
    order = g.order

    def turn(a: Any) -> Any:  # None and a number as they are
        return _lent(a.transpose(*order, *range(len(order), a.ndim))) if isinstance(a, np.ndarray) else a

    read = task.x, task.y, task.weights, task.temperature, task.factors
    return turn(g.view), tuple(map(turn, read)), order


class _Listed(_cpu.Listed):
    """The steps of sparse.py, of arrays as C++ reads them."""

    def __init__(self, x: Any, indices: Any, y: Any, weights: Any, temperature: Any, mass: Any, *words: int) -> None:
        read: tuple[Any, ...] = _lent(x), indices, _lent(y), _lent(weights), _lent(temperature), mass
        super().__init__(*(*read, *words, get_num_threads()))

    def spread(self, dys: Any, y: Any, weights: Any, temperature: Any, known: Any, dy: Any, inner_axes: int) -> None:
        super().spread(dys, _lent(y), _lent(weights), _lent(temperature), known, _lent(dy), inner_axes)

    def copy(self, values: Any, dx: Any, inner_axes: int) -> None:
        super().copy(values, _lent(dx), inner_axes)


# ---- blocks of arrays that are never in one place, for backends/dask.py and klcore.Shard -----------------------------
#
# `shared`: the operands of which other blocks hold copies; their gradients are yet to be added up, and come as float64,
# of shape batch + (n,) with a 1 where they are broadcast.

STATS = _cpu.MAX_STATS  # numbers that say what the outputs of a row need


def chunks(n: int) -> int:
    """How many chunks n classes are."""
    return -(-n // _cpu.CHUNK)


def chunk_sums(values: Any) -> Any:
    """The sums of every 1024 values of a real array of any layout, in C order: what `add_up` goes on with."""
    sums = np.empty(chunks(values.size))
    _cpu.chunk_sums(_lent(asarray(values, "weights")), sums)
    return sums


def add_up(sums: Any) -> float:
    """The sum of a vector of float64, in klcore's order of addition; overwrites it."""
    return _cpu.add_up(sums)


def sum_of(values: Any) -> float:
    """Of a real array of any layout, in this order."""
    return add_up(chunk_sums(values))


def block(call: Call, denominator: float, shared: tuple[str, ...]) -> tuple[Any, ...]:
    """A block of whole rows: (value, *gradients) for reduction="row" or "none", the gradients divided."""
    if call.indices is not None:
        found = sparse.compute(np, asarray, _Listed, lambda dense: block(dense, denominator, ()), call, shared)
        return found if isinstance(found, tuple) else (found,)
    task = arrange(call, shared)
    task.cotangent = rows.scale(denominator)
    _compute(task)
    return task.value, *(g.array for g in task.gradients)


def sweeps(
    operation: Operation, spaces: tuple[int, int], terms: bool = False, gradient: bool = False
) -> tuple[int, ...]:
    """How many numbers a chunk of a row's classes leaves behind, for each sweep over the row that these outputs take.

    The value is known after the sweeps it takes without outputs; outputs are written by the last sweep they take.
    """
    return _cpu.sweeps(operation.code, *spaces, False, terms, gradient)  # as many in float32 as in float64


def states(call: Call, number: int, stats: Any) -> Any:
    """What sweep `number` leaves of a block of the classes, of shape batch + (numbers, chunks).

    `stats`, if it is not the first sweep: what :func:`merge` made of the one before.
    """
    spaces, _, wanted = rows.words(call)
    task = arrange(call._replace(return_grad=None))
    operation = call.operation.code
    numbers = sweeps(call.operation, spaces, gradient=bool(wanted))[number]
    left = np.zeros((*task.x.shape[:-1], numbers, chunks(task.n)))
    x, y = _lent(task.x), _lent(task.y)
    _cpu.sweep(
        number, operation, *spaces, x, y, _lent(task.weights), None, x if "x" in wanted else None,
        y if "y" in wanted else None, task.wide, _lent(task.temperature), 1.0, get_num_threads(), task.parameter,
        task.factor, _flat(stats), left.reshape(-1),
    )  # fmt: skip
    return left


def merge(task: rows.Task, number: int, states: Any, stats: Any, fold: bool = False) -> Any:
    """The states of all blocks, joined along the chunks, into the rows' stats, of shape batch + (STATS,).

    stats[..., 0] is a row's value, once that is known, times its weight. With `fold`, the states of some chunks, at
    least one, into one that stands for them, of shape batch + (numbers, 1). `task`: of any block of these rows, or
    what has its words, its weights and its temperature.
    """
    batch, count = states.shape[:-2], states.shape[-1]
    if fold:
        merged = np.zeros((*states.shape[:-1], 1))
    else:
        merged = np.zeros((*batch, STATS)) if stats is None else np.array(stats, order="C")

    def by_row(a: Any, name: str) -> Any:  # None and a number as they are
        return a if a is None or isinstance(a, float) else _lent(np.broadcast_to(asarray(a, name), batch))

    _cpu.merge(
        number, task.operation.code, *task.spaces, by_row(task.weights, "weights"), task.wide,
        by_row(task.temperature, "temperature"), get_num_threads(), task.parameter, task.factor,
        np.array(states).reshape(-1), count, merged.reshape(-1), fold,
    )  # fmt: skip
    return merged


def outputs(call: Call, number: int, stats: Any, denominator: float, shared: tuple[str, ...]) -> tuple[Any, ...]:
    """What sweep `number` writes for a block of the classes: the terms for reduction="none", or the gradients."""
    threads = get_num_threads()
    task = arrange(call, shared)
    operation = call.operation.code
    scale = rows.scale(denominator, task.cotangent)
    terms = task.value_view if call.reduction == "none" else None
    direct = {g.of: _lent(g.view) for g in task.gradients if not g.inner}
    if direct or terms is not None:
        _cpu.sweep(
            number, operation, *task.spaces, _lent(task.x), _lent(task.y), _lent(task.weights), terms, direct.get("x"),
            direct.get("y"), task.wide, _lent(task.temperature), scale, threads, task.parameter, task.factor,
            _flat(stats), None,
        )  # fmt: skip
    for g in task.gradients:
        if g.inner:
            to, (x, y, weights, temperature, _), order = _turned(task, g)
            known = None if stats is None else _flat(stats.transpose(*order, len(order)))
            _cpu.sweep(
                number, operation, *task.spaces, x, y, weights, None, to if g.of == "x" else None,
                to if g.of == "y" else None, task.wide, temperature, scale, threads, task.parameter, task.factor,
                known, None, len(g.inner),
            )  # fmt: skip
    return (task.value,) if terms is not None else tuple(g.array for g in task.gradients)


def arrange(call: Call, shared: tuple[str, ...] = ()) -> rows.Task:
    """The call, checked and laid out in rows."""
    task = rows.arrange(np, asarray, call)
    rows.share(np, task.gradients, shared)
    return task


def _flat(stats: Any) -> Any:
    return None if stats is None else np.ascontiguousarray(stats).reshape(-1)
