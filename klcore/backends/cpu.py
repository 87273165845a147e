"""NumPy arrays on the CPU: arguments arranged by rows.py, rows computed by klcore._cpu (src/kl_cpu.pyx).

The contract of a backend, with a short cut for the commonest calls (`_cpu.plain`), which must give the bits of the long
way; `gradient`, for the adapters of PyTorch and JAX; and blocks of arrays, for the one of dask.
"""

import os
from functools import partial
from typing import Any

import numpy as np

from klcore import _cpu
from klcore.backends import rows
from klcore.backends.threads import get_num_threads

_QUICK = {word: code for code, word in enumerate(("row", "sum", "rowmean", "batchmean", "mean"))}
_WANTED: dict[Any, int] = {None: 0, "x": 1, "y": 2, ("x",): 1, ("y",): 2, ("x", "y"): 3}
_NUMBERS, _WORDS = (float, int), (type(None), str, tuple)  # others are rows.py's to understand, or to refuse
_PLAIN = {ord("d"): np.dtype("float64"), ord("f"): np.dtype("float32")}  # by buffer format


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


def _asarray(a: Any, name: str) -> Any:
    if type(a) is not np.ndarray:
        # device="cpu" was asked for, if it is CuPy's
        a = a.get() if hasattr(a, "__cuda_array_interface__") and hasattr(a, "get") else rows.as_numpy(a, name)
    if a.dtype.char in "dfe" and a.dtype.isnative:
        return a
    rows.refuse(a, name)
    if a.dtype.kind in "iub" and name != "weights":  # which kernels read as they are
        return a.astype(np.float64)
    return a if a.dtype.isnative else a.astype(a.dtype.newbyteorder("="))


def _lent(a: Any) -> Any:
    """The array as the kernel reads it: bfloat16 has no buffer format, so two bytes are lent."""
    return a.view("V2") if a is not None and a.dtype.kind == "V" else a


def _run(
    operation: int,
    x: Any,
    y: Any,
    space: Any,
    axis: int,
    reduction: str,
    weights: Any,
    temperature: float,
    return_grad: Any,
    out: Any,
    device: str | None,
) -> Any:
    try:
        is_quick = (
            type(x) is np.ndarray
            and type(y) is np.ndarray
            and type(axis) is int
            and axis == -1
            and weights is out is None
            and type(space) is str
            and space in rows.SPACES
            and type(temperature) in _NUMBERS
            and temperature == 1.0
            and type(reduction) is str
            and reduction in _QUICK
            and type(return_grad) in _WORDS
            and return_grad in _WANTED
        )
    except (TypeError, ValueError):  # a tuple with something in it that is no key: rows.py says so
        is_quick = False
    if is_quick:
        code, wanted = rows.SPACES[space], _WANTED[return_grad]
        found = _cpu.plain(
            operation, code, code, False, x, y, _QUICK[reduction], 1.0, 0.0, wanted, 1.0, get_num_threads(), np.empty,
            _PLAIN,
        )  # fmt: skip
        if found is not None:
            return _chosen(found, wanted)

    return _compute(
        rows.arrange(np, _asarray, operation, x, y, space, axis, reduction, weights, temperature, return_grad, out)
    )


def _chosen(found: tuple[Any, Any, Any], wanted: int) -> Any:
    return found if wanted == 3 else (found[0], found[wanted]) if wanted else found[0]


def _compute(task: rows.Task) -> Any:
    threads = get_num_threads()
    denominator = _weigh(task) if task.by_weights else task.denominator
    scale = 1.0 / denominator if denominator else np.nan
    if task.cotangent is not None:
        scale *= float(task.cotangent)

    # the gradients of operands that are not broadcast come with the value, in one pass
    direct = {g.of: _lent(g.view) for g in task.gradients if not g.inner}
    calls = [
        _cpu.call(
            task.operation, *task.spaces, task.output, _lent(task.x), _lent(task.y), _lent(task.weights),
            _lent(task.value_view), direct.get("x"), direct.get("y"), task.wide, task.temperature, scale, threads,
            task.factors, task.epsilon,
        )
    ]  # fmt: skip
    for g in task.gradients:
        if g.inner and task.rows:
            calls.append(_summed_gradient(task, g, scale, threads))
        elif g.inner:
            g.array[...] = 0
    total = _cpu.run(calls)

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
        total = _sum(task.weights)
        factor = rows.weight_factor(total)
        if factor != 1:
            task.weights = rows.scaled_weights(task.weights, factor)
            total = _sum(task.weights)
    return total if task.denominator is None else task.denominator * factor


def _sum(weights: Any) -> float:
    return add_up(chunk_sums(weights))


def _summed_gradient(task: rows.Task, g: rows.Gradient, scale: float, threads: int) -> Any:
    """The call for the gradient of a broadcast operand."""
    to, (x, y, weights, factors), _ = _turned(task, g)
    return _cpu.call(
        task.operation, *task.spaces, rows.PER_ROW, x, y, weights, None,
        to if g.of == "x" else None, to if g.of == "y" else None,
        task.wide, task.temperature, scale, threads, factors, task.epsilon, len(g.inner),
    )  # fmt: skip


def _turned(task: rows.Task, g: rows.Gradient) -> tuple[Any, tuple[Any, ...], tuple[int, ...]]:
    """The gradient, what is read, and their batch axes' order: the operand's own in front, those to sum over behind."""
    ndim = task.x.ndim - 1
    order = (*(d for d in range(ndim) if d not in g.inner), *g.inner)

    def turn(a: Any) -> Any:
        return None if a is None else _lent(a.transpose(*order, *range(ndim, a.ndim)))

    return turn(g.view), tuple(turn(a) for a in (task.x, task.y, task.weights, task.factors)), order


def entropy(
    x: Any, space: Any, axis: int, reduction: str, weights: Any, temperature: float, return_grad: Any, out: Any,
    device: str | None,
) -> Any:  # fmt: skip
    return _run(rows.ENTROPY, x, None, space, axis, reduction, weights, temperature, return_grad, out, device)


kl_div = partial(_run, rows.KL_DIV)
rel_entr = partial(_run, rows.REL_ENTR)
cross_entropy = partial(_run, rows.CROSS_ENTROPY)


def loss(
    term: str, x: Any, y: Any, space: Any, axis: int, reduction: str, factors: Any, denominator: float, epsilon: float,
    dtype: str | None, return_grad: Any, out: Any = None,
) -> Any:  # fmt: skip
    if (
        type(x) is np.ndarray
        and type(y) is np.ndarray
        and axis == -1
        and factors is dtype is out is None
        and reduction in ("row", "sum")
    ):
        operation, spaces = rows.coded(term, space, return_grad)
        wanted = _WANTED[return_grad]
        found = _cpu.plain(
            operation, *spaces, rows.is_wide(operation, spaces), x, y, _QUICK[reduction], denominator, epsilon, wanted,
            1.0, get_num_threads(), np.empty, _PLAIN,
        )  # fmt: skip
        if found is not None:
            if reduction == "row" and denominator != 1:
                found = (found[0] / denominator, *found[1:])
            return _chosen(found, wanted)
    return _compute(
        rows.arrange_loss(
            np, _asarray, term, x, y, space, axis, reduction, factors, denominator, epsilon, dtype, return_grad, out
        )
    )


def gradient(
    operation: str, x: Any, y: Any, space: Any, axis: int, reduction: str, weights: Any, temperature: float,
    cotangent: Any, return_grad: Any, denominator: float = 1.0, epsilon: float = 0.0, out: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The gradients of sum(cotangent * value), for adapters; arguments as in :func:`rows.arrange_gradient`."""
    if (
        type(x) is np.ndarray
        and type(y) is np.ndarray
        and axis == -1
        and weights is out is None
        and temperature == 1.0
        and reduction in _QUICK
        and reduction != "row"
    ):
        code, spaces = rows.coded(operation, space, return_grad)
        found = _cpu.plain(
            code, *spaces, rows.is_wide(code, spaces), x, y, _QUICK[reduction], denominator, epsilon,
            _WANTED[return_grad], float(cotangent), get_num_threads(), np.empty, _PLAIN,
        )  # fmt: skip
        if found is not None:
            return tuple(g for g in found[1:] if g is not None)
    return _compute(
        rows.arrange_gradient(
            np, _asarray, operation, x, y, space, axis, reduction, weights, temperature, cotangent, return_grad,
            denominator, epsilon, out,
        )
    )[1:]  # fmt: skip


# ---- blocks of arrays that are never in one place, for backends/dask.py ----------------------------------------------
#
# `totals`: row values as float64, whatever the input. `shared`: the operands of which other blocks hold copies; their
# gradients are yet to be added up, and come as float64, of shape batch + (n,) with a 1 where they are broadcast.

CHUNK = 1024  # kl_tree.h
STATS = _cpu.MAX_STATS  # numbers that say what the outputs of a row need


def chunks(n: int) -> int:
    """How many chunks n classes are."""
    return -(-n // CHUNK)


def chunk_sums(values: Any) -> Any:
    """The sums of every CHUNK values of a real array of any layout, in C order: what `add_up` goes on with."""
    sums = np.empty(chunks(values.size))
    _cpu.chunk_sums(_lent(_asarray(values, "weights")), sums)
    return sums


def add_up(sums: Any) -> float:
    """The sum of a vector of float64, in klcore's order of addition; overwrites it."""
    return _cpu.add_up(sums)


def block(
    operation: int, x: Any, y: Any, space: Any, axis: int, reduction: str, weights: Any, temperature: float,
    return_grad: Any, denominator: float, totals: bool, shared: tuple[str, ...],
) -> tuple[Any, ...]:  # fmt: skip
    """A block of whole rows: (value, *gradients) for reduction="row" or "none", the gradients divided."""
    task = _arrange_block(operation, x, y, space, axis, reduction, weights, temperature, return_grad, shared, totals)
    task.cotangent = 1.0 / denominator if denominator else np.nan
    _compute(task)
    return task.value, *(g.array for g in task.gradients)


def sweeps(operation: int, spaces: tuple[int, int], wide: bool, terms: bool, gradient: bool) -> tuple[int, ...]:
    """How many numbers a chunk of a row's classes leaves behind, for each sweep over the row that these outputs take.

    The value is known after the sweeps it takes without outputs; outputs are written by the last sweep they take.
    """
    return _cpu.sweeps(operation, *spaces, wide, terms, gradient)


def states(
    operation: int, number: int, x: Any, y: Any, stats: Any, space: Any, axis: int, weights: Any, temperature: float,
    return_grad: Any,
) -> Any:  # fmt: skip
    """What sweep `number` leaves of a block of the classes, of shape batch + (numbers, chunks).

    `stats`, if it is not the first sweep: what :func:`merge` made of the one before.
    """
    task = _arrange_block(operation, x, y, space, axis, "row", weights, temperature, return_grad, ())
    numbers = _cpu.sweeps(operation, *task.spaces, task.wide, False, bool(task.gradients))[number]
    left = np.zeros((*task.x.shape[:-1], numbers, chunks(task.n)))
    wanted = {g.of for g in task.gradients}
    x, y = _lent(task.x), _lent(task.y)
    _cpu.sweep(
        number, operation, *task.spaces, x, y, _lent(task.weights), None, x if "x" in wanted else None,
        y if "y" in wanted else None, task.wide, task.temperature, 1.0, get_num_threads(), _flat(stats),
        left.reshape(-1),
    )  # fmt: skip
    return left


def merge(
    operation: int, number: int, states: Any, stats: Any, weights: Any, spaces: tuple[int, int], wide: bool,
    temperature: float,
) -> Any:  # fmt: skip
    """The states of all blocks, joined along the chunks, into the rows' stats, of shape batch + (STATS,).

    stats[..., 0] is a row's value, once that is known, times its weight.
    """
    batch, count = states.shape[:-2], states.shape[-1]
    merged = np.zeros((*batch, _cpu.MAX_STATS)) if stats is None else np.array(stats, order="C")
    if weights is not None:
        weights = _lent(np.broadcast_to(_asarray(weights, "weights"), batch))
    _cpu.merge(
        number, operation, *spaces, weights, wide, temperature, get_num_threads(), np.array(states).reshape(-1), count,
        merged.reshape(-1),
    )  # fmt: skip
    return merged


def outputs(
    operation: int, number: int, x: Any, y: Any, stats: Any, space: Any, axis: int, reduction: str, weights: Any,
    temperature: float, return_grad: Any, denominator: float, shared: tuple[str, ...],
) -> tuple[Any, ...]:  # fmt: skip
    """What sweep `number` writes for a block of the classes: the terms for reduction="none", or the gradients."""
    threads = get_num_threads()
    task = _arrange_block(operation, x, y, space, axis, reduction, weights, temperature, return_grad, shared)
    scale = 1.0 / denominator if denominator else np.nan
    terms = task.value_view if reduction == "none" else None
    direct = {g.of: _lent(g.view) for g in task.gradients if not g.inner}
    if direct or terms is not None:
        _cpu.sweep(
            number, operation, *task.spaces, _lent(task.x), _lent(task.y), _lent(task.weights), terms, direct.get("x"),
            direct.get("y"), task.wide, task.temperature, scale, threads, _flat(stats), None,
        )  # fmt: skip
    for g in task.gradients:
        if g.inner:
            to, (x, y, weights, _), order = _turned(task, g)
            known = None if stats is None else _flat(stats.transpose(*order, len(order)))
            _cpu.sweep(
                number, operation, *task.spaces, x, y, weights, None, to if g.of == "x" else None,
                to if g.of == "y" else None, task.wide, task.temperature, scale, threads, known, None, len(g.inner),
            )  # fmt: skip
    return (task.value,) if terms is not None else tuple(g.array for g in task.gradients)


def _arrange_block(
    operation: int, x: Any, y: Any, space: Any, axis: int, reduction: str, weights: Any, temperature: float,
    return_grad: Any, shared: tuple[str, ...], totals: bool = False,
) -> rows.Task:  # fmt: skip
    task = rows.arrange(
        np, _asarray, operation, x, y, space, axis, reduction, weights, temperature, return_grad, None,
        dtype=np.dtype(np.float64) if totals else None,
    )  # fmt: skip
    for g in task.gradients:
        if g.of in shared:
            g.array = g.view = np.zeros(g.view.shape, np.float64)
    return task


def _flat(stats: Any) -> Any:
    return None if stats is None else np.ascontiguousarray(stats).reshape(-1)
