"""NumPy arrays on the CPU: arguments arranged by rows.py, rows computed by klcore._cpu (src/kl_cpu.pyx)."""

import os
from functools import partial
from typing import Any

import numpy as np

from klcore import _cpu
from klcore.backends import rows
from klcore.backends.threads import get_num_threads

_QUICK = {word: code for code, word in enumerate(("row", "sum", "rowmean", "batchmean", "mean"))}
_WANTED: dict[Any, int] = {None: 0, "x": 1, "y": 2, ("x",): 1, ("y",): 2, ("x", "y"): 3}
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
    if isinstance(a, np.ma.MaskedArray):
        rows.refuse(a, name)
    if hasattr(a, "__cuda_array_interface__"):
        a = a.get()  # device="cpu" was asked for
    a = np.asarray(a)
    if a.dtype.char in "dfe" and a.dtype.isnative:
        return a
    rows.refuse(a, name)
    if a.dtype.kind in "iub":
        return a.astype(np.float64)
    return a if a.dtype.isnative else a.astype(a.dtype.newbyteorder("="))


def _lent(a: Any) -> Any:
    """The array as the kernel reads it: bfloat16 has no buffer format, so its bits are lent."""
    return a.view(np.uint16) if a is not None and a.dtype.kind == "V" else a


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
    if (
        type(x) is np.ndarray
        and type(y) is np.ndarray
        and axis == -1
        and weights is out is None
        and type(space) is str
        and space in rows.SPACES
        and temperature == 1.0
        and type(reduction) is str
        and reduction in _QUICK
        and type(return_grad) is not list
        and return_grad in _WANTED
    ):
        code, wanted = rows.SPACES[space], _WANTED[return_grad]
        wide = operation == rows.CROSS_ENTROPY and space == "logits"
        found = _cpu.plain(
            operation, code, code, wide, x, y, _QUICK[reduction], 1.0, 0.0, wanted, 1.0, get_num_threads(), np.empty,
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
    denominator = task.denominator
    if denominator is None:
        denominator = _sum(task.weights)
    scale = 1.0 / denominator if denominator else np.nan
    if task.cotangent is not None:
        scale *= float(task.cotangent)

    # the gradients of operands that are not broadcast come with the value, in one pass
    direct = {g.of: _lent(g.view) for g in task.gradients if not g.inner}
    total = _cpu.run(
        task.operation, *task.spaces, task.output, _lent(task.x), _lent(task.y), task.weights, _lent(task.value_view),
        direct.get("x"), direct.get("y"), task.wide, task.temperature, scale, threads, -1, task.factors, task.epsilon,
    )  # fmt: skip
    for g in task.gradients:
        if g.inner:
            _sum_gradient(task, g, scale, threads)

    if task.output == rows.TOTAL:
        with np.errstate(over="ignore"):  # a float64 total may be infinite as float32
            value = task.scalar_dtype.type(total / denominator if denominator else np.nan)
        if task.out is not None:
            task.out[...] = value
            value = task.out
    else:
        value = task.value if task.value.ndim or task.given else task.value[()]
    return rows.result(task, value)


def _sum(weights: Any) -> float:
    """The sum of a view of any layout, in klcore's order of addition, 1024 at a time."""
    flat = weights.flat
    chunks = [_cpu.add_up(flat[i : i + 1024].astype(np.float64)) for i in range(0, weights.size, 1024)]
    return _cpu.add_up(np.array(chunks, np.float64))


def _sum_gradient(task: rows.Task, g: rows.Gradient, scale: float, threads: int) -> None:
    """The gradient of a broadcast operand: its batch axes in front, those to sum over behind."""
    ndim = task.x.ndim - 1
    order = (*(d for d in range(ndim) if d not in g.inner), *g.inner)
    if not task.rows:
        g.array[...] = 0
        return

    def turn(a: Any) -> Any:
        return None if a is None else _lent(a.transpose(*order, *range(ndim, a.ndim)))

    to = turn(g.view)
    _cpu.run(
        task.operation, *task.spaces, rows.PER_ROW, turn(task.x), turn(task.y), turn(task.weights), None,
        to if g.of == "x" else None, to if g.of == "y" else None,
        task.wide, task.temperature, scale, threads, len(g.inner), turn(task.factors), task.epsilon,
    )  # fmt: skip


def _entropy(
    x: Any, space: Any, axis: int, reduction: str, weights: Any, temperature: float, return_grad: Any, out: Any,
    device: str | None,
) -> Any:  # fmt: skip
    return _run(rows.ENTROPY, x, None, space, axis, reduction, weights, temperature, return_grad, out, device)


kl_div = partial(_run, rows.KL_DIV)
rel_entr = partial(_run, rows.REL_ENTR)
cross_entropy = partial(_run, rows.CROSS_ENTROPY)
entropy = _entropy


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
