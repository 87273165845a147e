"""Calls in which x lists only some classes of y, for example a teacher's top K. For NumPy and CuPy alike.

Each row becomes one of K + 1 classes: the listed classes, and all others as one (src/kl_sparse.h). Their divergence is
another call to the same backend, with two dense arrays, and its derivatives are mapped back to x and y. So the kernels
that compute an operation, reduction or weight anyway compute it here, too. y is read once, and once more for its
gradient.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from klcore import _cpu
from klcore.backends import arguments, destinations, labels, options, rows
from klcore.operations import Call

RENORM = options.TAILS["renorm"]
_LOGS = (options.SPACES["log_probs"], options.LOGITS)


@dataclass(slots=True)
class Task:
    """A checked call. Views have shape batch + (K,), batch + (n,) or batch."""

    laid: rows.Laid
    indices: Any  # int64
    tail: int
    tail_mass: Any
    spaces: tuple[int, int]
    weights: Any  # 0 for rows that are skipped
    temperature: Any
    gradients: list[rows.Gradient]
    inner: Call  # the call of the K + 1 classes, without their arrays
    value: Any  # the caller's output array for the value, or None


def compute(xp: Any, asarray: Any, listed: Any, dense: Any, call: Call, shared: tuple[str, ...] = ()) -> Any:
    """Compute such a call; returns what the `compute` of a backend returns.

    Parameters
    ----------
    xp, asarray
        As for ``rows.arrange``.
    listed : callable
        Makes the K + 1 classes: ``_cpu.Listed`` or an equivalent. All its arrays are float64.
    dense : callable
        The `compute` of the backend, for calls without indices.
    call : Call
        With indices.
    shared : tuple
        As for ``cpu.block``, which is then `dense`.
    """
    task = arrange(xp, asarray, call)
    rows.share(xp, task.gradients, shared)
    laid = task.laid
    steps = listed(
        laid.x, task.indices, laid.y, task.weights, task.temperature, task.tail_mass, *task.spaces, task.tail
    )
    value, *found = _of_classes(xp, task, steps, dense, call)
    for g, d in zip(task.gradients, found, strict=True):
        if not math.prod(laid.batch):
            g.array[...] = 0
            continue
        order, inner = g.order, len(g.inner) or -1

        def turned(a: Any, order: tuple[int, ...] = order) -> Any:  # None and a number are returned unchanged
            return a.transpose(*order, *range(len(order), a.ndim)) if hasattr(a, "transpose") else a

        if g.of == "x":
            steps.copy(turned(steps.by_x(d)), turned(g.view), inner)
        else:
            steps.by_y(d)
            steps.spread(
                d, turned(laid.y), turned(task.weights), turned(task.temperature), turned(steps.known), turned(g.view),
                inner,
            )  # fmt: skip
    arrays = tuple(g.array for g in task.gradients)
    if call.cotangent is not None:
        return arrays
    if task.value is not None:
        task.value[...] = value
        value = task.value
    return (value, *arrays) if arrays else value


def _of_classes(xp: Any, task: Task, steps: Any, dense: Any, call: Call) -> tuple[Any, ...]:
    """The value of the K + 1 classes, or None, and the gradients with respect to them."""
    inner = task.inner._replace(x=steps.xs, y=steps.ys)
    count = task.indices.shape[-1]
    places = None
    if call.reduction == "none":
        places = (steps.keys & _cpu.PLACE_OF_KEY).astype(np.int64)
        if call.cotangent is not None:
            inner = inner._replace(cotangent=_sorted(xp, task, places, count, call.cotangent))
    found = dense(inner)
    if call.cotangent is not None:
        return (None, *found)
    value, *gradients = found if isinstance(found, tuple) else (found,)
    if places is not None:
        value = _as_listed(xp, task, places, count, value)
    return (value, *gradients)


def _terms(task: Task) -> int:
    """The number of terms in a row; "renorm" has no term for the other classes."""
    return task.indices.shape[-1] + (task.tail != RENORM)


def _as_listed(xp: Any, task: Task, places: Any, count: int, terms: Any) -> Any:
    """The terms in the caller's order, on the caller's class axis."""
    found = xp.zeros_like(terms)
    if terms.size:
        xp.put_along_axis(found[..., :count], places, terms[..., 1:], -1)
        found[..., count] = terms[..., 0]
    return xp.moveaxis(found[..., : _terms(task)], -1, task.laid.last)


def _sorted(xp: Any, task: Task, places: Any, count: int, cotangent: Any) -> Any:
    """The cotangents of the terms, in the order of the classes."""
    batch, last, terms = task.laid.batch, task.laid.last, _terms(task)
    c = xp.broadcast_to(xp.asarray(cotangent), rows.with_classes(task.laid.terms, last, terms))
    c = xp.moveaxis(c, last, -1)
    found = xp.zeros((*batch, count + 1))
    found[..., 1:] = xp.take_along_axis(c[..., :count], places, -1)
    if terms > count:
        found[..., 0] = c[..., count]
    return found


def arrange(xp: Any, asarray: Any, call: Call) -> Task:
    """Check the arguments of a call, before anything is computed."""
    spaces, temperature, wanted = options.check(call)
    tail = options.TAILS[call.tail]
    laid, indices = _lay(xp, asarray, call)
    batch, n = laid.batch, laid.n
    weights = rows.read_weights(xp, asarray, call.weights, batch, False)
    if not isinstance(temperature, float):
        temperature = rows.read_temperatures(xp, asarray, temperature, batch, weights, True)
    mass = None if call.tail_mass is None else rows.multiplier(asarray, call.tail_mass, "tail_mass")
    if mass is not None:
        mass = rows.over_rows(xp, mass, batch, "tail_mass")
        _check(mass, 0, 1, weights, "tail_mass must lie in [0, 1]")
    no_class = "or be -1, in a signed dtype, for no class; to leave out a row, give it weight 0"
    _check(indices, -1, n - 1, weights, f"indices must lie in [0, {n}), {no_class}")
    given = call.x, call.y, call.weights, call.ratio, call.temperature, call.indices, call.tail_mass
    if labels.are_there(*given):
        labels.check(laid.last, *given)
    double = max(a.dtype.itemsize for a in laid.operands.values()) == 8
    dtype = call.dtype or ("float64" if double else "float32")

    out = call.out if call.cotangent is None or call.out is None else (None, *call.out)
    value, *into = destinations.results_in(out, wanted)
    if out is not None:
        shape = laid.batch if call.reduction == "row" else ()
        if call.reduction == "none":
            shape = rows.with_classes(laid.terms, laid.last, laid.x.shape[-1] + (tail != RENORM))
        over_y = "y" in wanted and spaces[1] == options.LOGITS and laid.operands["y"].shape == laid.terms
        read = indices, mass, weights, temperature
        rows.check_results(xp, laid, shape, xp.dtype(dtype), value, dict(zip(wanted, into, strict=True)), read, over_y)
    gradients = [
        rows.gradient_of(laid, name, xp.empty_like(laid.operands[name]) if a is None else a)
        for name, a in zip(wanted, into, strict=True)
    ]
    # spaces that are normalised for "renorm", else spaces that are not
    log, plain = ("logits", "counts") if tail == RENORM else ("log_probs", "probs")
    inner = call._replace(
        space=tuple(log if space in _LOGS else plain for space in spaces), axis=-1, weights=weights, temperature=1.0,
        out=None, dtype=dtype, indices=None, tail=None, tail_mass=None, device=None,
    )  # fmt: skip
    if call.reduction in ("mean", "batchmean"):  # these divide by sizes of y, not of the K + 1 classes
        inner = inner._replace(reduction="sum", denominator=rows.denominator(call, laid.terms, batch, weights))
    if indices.dtype == np.uint64:  # the largest uint64 would become -1
        indices = xp.minimum(indices, 2**63 - 1)
    indices = indices.astype(np.int64, copy=False)
    seen = weights
    # a row whose cotangent is 0 has gradient 0, even if its value is NaN
    if call.cotangent is not None and call.reduction == "row":
        seen = rows.over_rows(xp, rows.multiplier(asarray, call.cotangent, "cotangent"), batch, "cotangent") != 0
        seen = seen if weights is None else seen & (weights != 0)
    return Task(laid, indices, tail, mass, spaces, seen, temperature, gradients, inner, value)


def outcome(xp: Any, asarray: Any, call: Call) -> rows.Task:
    """Check a call without computing it, for adapters: the task of the K + 1 classes, with the value, gradients and
    temperature of the call itself."""
    task = arrange(xp, asarray, call)
    one = xp.broadcast_to(np.ones((), task.inner.dtype), (*task.laid.batch, task.indices.shape[-1] + 1))
    found = rows.arrange(xp, asarray, task.inner._replace(x=one, y=one, weights=call.weights, return_grad=None))
    value = found.value
    if found.output == rows.TERMS:
        value = xp.moveaxis(value[..., : _terms(task)], -1, task.laid.last)
    return replace(found, value=value, gradients=task.gradients, temperature=task.temperature)


def _check(a: Any, low: int, high: int, weights: Any, must: str) -> None:
    """Raise ValueError for numbers out of range on the host, in rows with weight; a GPU makes such rows NaN."""
    if arguments.on_host(a) is None:
        return
    once = a[tuple(slice(0, 1) if step == 0 else slice(None) for step in a.strides)]  # broadcast elements only once
    if ((once >= low) & (once <= high)).all():
        return
    good = (a >= low) & (a <= high)
    if weights is not None and arguments.on_host(weights) is not None:
        good = good | (weights == 0).reshape(*weights.shape, *[1] * (good.ndim - weights.ndim))
    if not good.all():
        raise ValueError(f"{must}; found {arguments.bad_ones(a, ~good)}")


def _lay(xp: Any, asarray: Any, call: Call) -> tuple[rows.Laid, Any]:
    """x and y as rows, of K and n classes, and the indices."""
    x, y, indices = asarray(call.x, "x"), asarray(call.y, "y"), asarray(call.indices, "indices")
    if indices.size or isinstance(call.indices, type(indices)):  # NumPy converts an empty list to float64
        arguments.check_indices_dtype(indices.dtype, indices.dtype.kind in "iu")
    last, terms = rows.lay_list(x, y, indices, call.axis)
    count, n = x.shape[last], y.shape[last]
    if count > n:
        raise ValueError(f"x and indices list {count} classes along axis {call.axis}, but y has only {n}")
    if n > _cpu.MOST_CLASSES:
        raise ValueError(f"with indices, y must have at most {_cpu.MOST_CLASSES} classes; found {n}")
    batch = (*terms[:last], *terms[last:][1:])
    xs, of, ys = (rows.broadcast(xp, rows.classes_last(a, last), (*batch, a.shape[last])) for a in (x, indices, y))
    return rows.Laid({"x": x, "y": y}, xs, ys, batch, n, last, False, terms), of
