"""NumPy arrays on the CPU: arguments arranged by rows.py, rows computed by klcore._cpu (src/kl_cpu.pyx).

This is the contract of a backend, with a shortcut for the most common calls (`_cpu.plain`), which must give the same
bits as the long way; and functions for blocks of arrays, for the Dask adapter and klcore.Shard.
"""

import os
from typing import Any

import numpy as np

from klcore import _cpu
from klcore.backends import arguments, options, rows, sparse
from klcore.backends.threads import get_num_threads
from klcore.operations import Call, Operation


def _choose_instruction_set() -> None:
    """Use the best instruction set of this processor, or the one named by KLCORE_ISA."""
    built = _cpu.instruction_sets()
    name = os.environ.get("KLCORE_ISA") or next(n for n in reversed(built) if built[n])
    if name not in built:
        raise ValueError(f"KLCORE_ISA must be one of {', '.join(built)}, which klcore was built with; found {name!r}")
    if not built[name]:
        usable = ", ".join(n for n in built if built[n])
        raise ValueError(f"KLCORE_ISA={name}, but this processor does not support it; it supports {usable}")
    _cpu.use_instruction_set(name)


_choose_instruction_set()


def asarray(a: Any, name: str) -> Any:
    """Convert to a NumPy array of a dtype that klcore supports, or raise TypeError naming the argument."""
    if type(a) is not np.ndarray:
        # a CuPy array gets here only with device="cpu"
        a = a.get() if hasattr(a, "__cuda_array_interface__") and hasattr(a, "get") else arguments.as_numpy(a, name)
    if a.dtype.char in "dfe" and a.dtype.isnative:
        return a
    arguments.refuse(a, name)
    if a.dtype.kind in "iub" and name not in ("weights", "temperature", "indices"):  # kernels read these as integers
        return a.astype(np.float64)
    return a if a.dtype.isnative else a.astype(a.dtype.newbyteorder("="))


def _lent(a: Any) -> Any:
    """The array as the kernel reads it: bfloat16 has no buffer format, so it is passed as pairs of bytes."""
    return a.view("V2") if isinstance(a, np.ndarray) and a.dtype.kind == "V" else a


def compute(call: Call) -> Any:
    """The value, or (value, *gradients); with a cotangent, only the gradients."""
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

    # the gradients of operands that are not broadcast are computed with the value, in one pass
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
        with np.errstate(over="ignore", under="ignore"):  # a finite float64 total can be infinite as float32
            value = task.scalar_dtype.type(total / denominator if denominator else np.nan)
        if task.out is not None:
            task.out[...] = value
            value = task.out
    else:
        value = task.value if task.value.ndim or task.given else task.value[()]
    return rows.result(task, value)


def _weigh(task: rows.Task) -> float:
    """The divisor of a weighted mean. Very large or very small weights are moved to the middle of the range."""
    factor = 1.0
    largest = float(np.max(task.weights, initial=0))
    if task.denominator is None or not 2.0**-400 < largest < 2.0**400:  # else their sum is in range
        counted = task.weights if task.counted is None else task.counted
        total = sum_of(counted)
        factor = rows.weight_factor(total)
        if factor != 1:
            task.weights = rows.scaled_weights(task.weights, factor)
            total = sum_of(task.weights if task.counted is None else rows.scaled_weights(counted, factor))
    return total if task.denominator is None else task.denominator * factor


def _summed_gradient(task: rows.Task, g: rows.Gradient, scale: float, threads: int) -> Any:
    """The plan for the gradient of a broadcast operand."""
    to, (x, y, weights, temperature, factors), _ = _turned(task, g)
    return _cpu.plan(
        task.operation.code, *task.spaces, rows.PER_ROW, x, y, weights, None,
        to if g.of == "x" else None, to if g.of == "y" else None,
        task.wide, temperature, scale, threads, factors, task.parameter, task.factor, len(g.inner),
    )  # fmt: skip


def _turned(task: rows.Task, g: rows.Gradient) -> tuple[Any, tuple[Any, ...], tuple[int, ...]]:
    """The gradient and the arrays to read, with the batch axes in the order `g.order`; and that order."""
    order = g.order

    def turn(a: Any) -> Any:  # None and a number are returned unchanged
        return _lent(a.transpose(*order, *range(len(order), a.ndim))) if isinstance(a, np.ndarray) else a

    read = task.x, task.y, task.weights, task.temperature, task.factors
    return turn(g.view), tuple(map(turn, read)), order


class _Listed(_cpu.Listed):
    """The steps of sparse.py, with arrays as C++ reads them."""

    def __init__(self, x: Any, indices: Any, y: Any, weights: Any, temperature: Any, mass: Any, *words: int) -> None:
        read: tuple[Any, ...] = _lent(x), indices, _lent(y), _lent(weights), _lent(temperature), mass
        super().__init__(*(*read, *words, get_num_threads()))

    def spread(self, dys: Any, y: Any, weights: Any, temperature: Any, known: Any, dy: Any, inner_axes: int) -> None:
        super().spread(dys, _lent(y), _lent(weights), _lent(temperature), known, _lent(dy), inner_axes)

    def copy(self, values: Any, dx: Any, inner_axes: int) -> None:
        super().copy(values, _lent(dx), inner_axes)


# ---- blocks of arrays that are never in one place, for backends/dask.py and klcore.Shard -----------------------------
#
# `shared` names the operands of which other blocks hold copies. Their gradients still have to be added up over the
# blocks; they are float64, of shape batch + (n,), with a 1 for axes along which the operand is broadcast.

STATS = _cpu.MAX_STATS  # how many numbers of a row its outputs depend on


def chunks(n: int) -> int:
    """The number of chunks of n classes."""
    return -(-n // _cpu.CHUNK)


def chunk_sums(values: Any) -> Any:
    """The sums of every 1024 values of a real array of any layout, in C order, for `add_up`."""
    sums = np.empty(chunks(values.size))
    _cpu.chunk_sums(_lent(asarray(values, "weights")), sums)
    return sums


def add_up(sums: Any) -> float:
    """The sum of a vector of float64, in klcore's order of addition; overwrites it."""
    return _cpu.add_up(sums)


def sum_of(values: Any) -> float:
    """The sum of a real array of any layout, in klcore's order of addition."""
    return add_up(chunk_sums(values))


def block(call: Call, denominator: float, shared: tuple[str, ...]) -> tuple[Any, ...]:
    """Compute a block of whole rows: (value, *gradients) for reduction="row" or "none", the gradients divided."""
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
    """The number of numbers in the state of a chunk of classes, for each sweep over the row that these outputs need.

    Without outputs, the value is known after the last sweep. Outputs are written by the last sweep.
    """
    return _cpu.sweeps(operation.code, *spaces, False, terms, gradient)  # as many in float32 as in float64


def states(call: Call, number: int, stats: Any) -> Any:
    """The states that sweep `number` leaves for a block of the classes, of shape batch + (numbers, chunks).

    `stats` is what :func:`merge` made of the previous sweep, or None for the first one.
    """
    spaces, _, wanted = options.check(call)
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
    """Merge the states of all blocks, joined along the chunks, into the stats of the rows, of shape batch + (STATS,).

    stats[..., 0] is the value of a row, once it is known, times its weight. With `fold`, merge the states of at least
    one chunk into one state, of shape batch + (numbers, 1). `task` is that of any block of these rows, or an object
    with its options, weights and temperature.
    """
    batch, count = states.shape[:-2], states.shape[-1]
    if fold:
        merged = np.zeros((*states.shape[:-1], 1))
    else:
        merged = np.zeros((*batch, STATS)) if stats is None else np.array(stats, order="C")

    def by_row(a: Any, name: str) -> Any:  # None and a number are returned unchanged
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
    """Check a call and lay it out in rows."""
    task = rows.arrange(np, asarray, call)
    rows.share(np, task.gradients, shared)
    return task


def _flat(stats: Any) -> Any:
    return None if stats is None else np.ascontiguousarray(stats).reshape(-1)
