"""Totals of many examples in one call, for libraries that map a function over a batch, such as torch.func.vmap.

The first `call.examples` axes of x and y count examples, each with a total of its own. The backend computes the rows of
all examples as one batch, and this module adds them up per example. The results have the same bits as those of each
example alone, except for the gradient of an operand that is broadcast within its example. `xp` is numpy or cupy, and
`backend` is cpu.py or cuda/. Called by klcore.backends.torch.kernels.
"""

import math
from typing import Any

import numpy as np

from klcore import _cpu
from klcore.backends import options, rows
from klcore.operations import Call


def compute(xp: Any, backend: Any, call: Call) -> tuple[Any, ...]:
    """The totals in float64, and the gradients. With cotangents, one per example, only the gradients."""
    with np.errstate(all="ignore"):
        by_row, denominator = _divided(xp, call)
        in_one_pass = call.cotangent is None and isinstance(denominator, float)
        if call.return_grad is not None and in_one_pass:
            values, *gradients = backend.block(by_row, denominator, ())
            return _totals(xp, values, denominator, call), *gradients
        gradients = []
        if call.return_grad is not None:
            scale = xp.where(xp.asarray(denominator) == 0, math.nan, 1 / xp.asarray(denominator))
            scale = scale if call.cotangent is None else scale * call.cotangent
            if call.ratio is not None:  # multiply the weights first, in the same order as for an example alone
                ratio = xp.broadcast_to(call.ratio, _batch(call))
                by_row = by_row._replace(weights=rows.times_ratio(xp, by_row.weights, ratio), ratio=None)
            gradients = [*backend.compute(by_row._replace(cotangent=_for_rows(xp, scale, call), dtype=None))]
        if call.cotangent is not None:
            return tuple(gradients)
        return _totals(xp, backend.compute(by_row._replace(return_grad=None)), denominator, call), *gradients


def _totals(xp: Any, values: Any, denominator: Any, call: Call) -> Any:
    return xp.where(xp.asarray(denominator) == 0, math.nan, _sums(xp, values, call) / denominator)


def _divided(xp: Any, call: Call) -> tuple[Call, Any]:
    """The call for the rows, and what divides the total of each example: one number for all, or an array."""
    by_row = call._replace(reduction="row", denominator=None, examples=0, dtype="float64")
    weights, denominator = call.weights, _denominator(xp, call)
    if weights is None or call.operation.is_loss or (call.reduction == "sum" and call.denominator is None):
        return by_row, denominator
    weights = xp.broadcast_to(weights, _batch(call)).astype("float64")
    weights = rows.scaled_weights(weights, _for_rows(xp, factor := rows.weight_factor(_sums(xp, weights, call)), call))
    return by_row._replace(weights=weights), _sums(xp, weights, call) if denominator is None else denominator * factor


def _denominator(xp: Any, call: Call) -> Any:
    """What divides each example's total; None means the sum of its weights."""
    d = call.denominator
    if not hasattr(d, "shape"):
        return rows.denominator(call, _terms(call)[call.examples :], _batch(call)[call.examples :], call.weights)
    if isinstance(d, np.ndarray):  # checking arrays on a GPU would synchronise
        bad = d[~((d >= 0) & (d < math.inf))]
        options.denominator_of(call._replace(denominator=bad[0] if bad.size else 1.0))
    return d.astype("float64")


def _for_rows(xp: Any, a: Any, call: Call) -> Any:
    """Broadcast an array of one number per example, or a number, to the rows."""
    batch = _batch(call)
    a = xp.broadcast_to(a, batch[: call.examples])
    return xp.broadcast_to(a.reshape(a.shape + (1,) * (len(batch) - call.examples)), batch)


def _sums(xp: Any, a: Any, call: Call) -> Any:
    """The sum over the rows of each example."""
    return add_up(xp, a.reshape(*a.shape[: call.examples], math.prod(a.shape[call.examples :])))


def _batch(call: Call) -> tuple[int, ...]:
    terms = _terms(call)
    axis = call.axis % len(terms)
    return terms if call.operation.is_estimator else (*terms[:axis], *terms[axis + 1 :])


def _terms(call: Call) -> tuple[int, ...]:
    if call.indices is not None:
        return rows.lay_list(call.x, call.y, call.indices, call.axis)[1]
    return tuple(call.x.shape) if call.y is None else rows.broadcast_shapes(call.x.shape, call.y.shape)


def add_up(xp: Any, a: Any) -> Any:
    """The sums along the last axis, in the order of src/kl_tree.h."""
    *others, n = a.shape
    width = min(_cpu.COLUMNS, 1 << max(n - 1, 0).bit_length())
    chunks, depth = max(-(-n // _cpu.CHUNK), 1), max(-(-min(n, _cpu.CHUNK) // width), 1)
    elements = xp.zeros((*others, chunks * depth * width))
    elements[..., :n] = a
    elements = elements.reshape(*others, chunks, depth, width)
    sums = xp.zeros((*others, chunks, width))
    for k in range(depth):
        sums = sums + elements[..., k, :]
    while width > 1:
        width //= 2
        sums = sums[..., :width] + sums[..., width:]
    return add_up(xp, sums[..., 0]) if chunks > 1 else sums[..., 0, 0]
