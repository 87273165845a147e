"""Calls of the kernels: tensors in, and new tensors without autograd history out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from klcore.backends import cpu, examples, options, rows
from klcore.backends.torch.memory import FLOATS, as_pytorch, as_tensor, backend_of, bfloat16, cuda, lend
from klcore.operations import Call


def shape_of(call: Call) -> tuple[int, ...]:
    """The shape to which x and y broadcast; if x lists some classes, that of y in the broadcast batch."""
    x, y, shape = call.x, call.y, call.x.shape
    if call.indices is not None:
        return rows.lay_list(x, y, call.indices, call.axis)[1]
    if y is not None and y.shape != shape:
        try:
            shape = torch.broadcast_shapes(shape, y.shape)
        except RuntimeError:
            rows.class_axis_of(call, x, y)
            raise rows.batches_differ(x, y, call.axis) from None
    return tuple(shape)


def value_like(call: Call) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and dtype of the value."""
    x, y, shape = call.x, call.y, shape_of(call)
    dtype = None if call.dtype is None else getattr(torch, call.dtype)
    if dtype is None:
        wide = [t.dtype not in FLOATS[1:] for t in ((x,) if y is None else (x, y))]
        dtype = torch.float64 if any(wide) else torch.float32
    if call.examples and call.reduction not in ("row", "none"):
        return shape[: call.examples], dtype
    if call.reduction == "none" or (call.reduction == "row" and call.operation.is_estimator):
        return shape if call.indices is None else _listed(call, shape), dtype
    if call.reduction != "row" or not shape:
        return (), dtype
    axis = call.axis % len(shape)
    return (*shape[:axis], *shape[axis + 1 :]), dtype


def _listed(call: Call, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the terms: those of the listed classes, and that of all others."""
    axis = rows.class_axis_of(call, call.x, call.y)
    return rows.with_classes(shape, axis, call.x.shape[axis] + (call.tail != "renorm"))


def gradient_like(t: Any) -> Any:
    """Memory for a gradient; integers were converted to float64."""
    return torch.empty_like(t.detach(), dtype=t.dtype if t.dtype in FLOATS else torch.float64)


def lent(call: Call) -> Call:
    """The call with arrays of the library of the kernels."""
    if call.dtype == "bfloat16":
        bfloat16()  # raises if ml_dtypes is missing
    weights, out, cotangent, ratio = call.weights, call.out, call.cotangent, call.ratio
    temperature, denominator, indices, mass = call.temperature, call.denominator, call.indices, call.tail_mass
    if isinstance(temperature, torch.Tensor):
        temperature = _number_or_array(temperature, call.x)
    if isinstance(denominator, torch.Tensor):
        denominator = _number_or_array(denominator, call.x)
    if out is not None:
        out = tuple(map(lend, out)) if isinstance(out, tuple) else lend(out)
    return Call(  # twice as fast as _replace
        call.operation, lend(call.x), lend(call.y), call.space, call.axis, call.reduction,
        None if weights is None else lend(weights), temperature, call.return_grad, out, None,
        denominator, call.parameter, call.factor, call.dtype,
        None if cotangent is None else lend(cotangent), None if ratio is None else lend(ratio),
        call.examples, None if indices is None else lend(indices), call.tail, None if mass is None else lend(mass),
    )  # fmt: skip


def _number_or_array(t: Any, x: Any) -> Any:
    """A 0-d tensor as a number, unless that would synchronise with a GPU."""
    return t.item() if t.ndim == 0 and (t.is_cpu or x.is_cpu) else lend(t)


def compute(call: Call) -> Any:
    """The results of a call, as tensors without history."""
    if call.examples and call.reduction not in ("row", "none"):
        return _of_examples(call)
    of_total = call.cotangent is not None and call.reduction not in ("row", "none")
    if of_total and is_total_of_wide(call):
        return scaled(compute(call._replace(cotangent=None))[1:], call.cotangent)
    if of_total and call.cotangent.is_cpu and call.cotangent.item() == 0:
        return tuple(torch.zeros_like(call.x if of == "x" else call.y) for of in call.return_grad)
    if call.x.is_cpu:
        found = cpu.compute(lent(call))
        return tuple(map(as_tensor, found)) if isinstance(found, tuple) else as_tensor(found)
    outs = tuple(outs_of(call))
    with as_pytorch(call.x):
        cuda().compute(lent(call._replace(out=outs)))
    return outs if call.return_grad is not None else outs[0]


def is_total_of_wide(call: Call) -> bool:
    """Whether a gradient is rounded before it is multiplied by its cotangent: always for a total, so that every path
    gives the same bits. Not in 16 bits: the cotangent, a loss scale, should save the gradient from underflow."""
    wide = call.x.dtype.itemsize > 2 and (call.y is None or call.y.dtype.itemsize > 2)
    return wide and call.reduction not in ("row", "none")


def scaled(gradients: Sequence[Any], cotangent: Any) -> tuple[Any, ...]:
    """Multiply gradients of a total, or of one total per example, by its cotangent, in place. 0 times infinity is 0."""
    some_are_zero = True
    if cotangent.is_cpu:  # reading it from a GPU would synchronise
        all_are_one, some_are_zero = _look_at(cotangent)
        if all_are_one:
            return tuple(gradients)
    for g in gradients:
        c = _along(cotangent, g)
        g.mul_(c)
        if some_are_zero:
            g.masked_fill_(c == 0, 0)
    return tuple(gradients)


def _look_at(cotangent: Any) -> tuple[bool, bool]:
    """Whether all are 1, and whether some are 0; fast for a 0-d tensor."""
    if cotangent.ndim == 0:
        c = cotangent.item()
        return c == 1, c == 0
    return bool((cotangent == 1).all()), bool((cotangent == 0).any())


def times(gradient: Any, cotangent: Any) -> Any:
    """A gradient times its cotangent, out of place, for transforms."""
    c = _along(cotangent, gradient)
    return torch.where(c == 0, 0, gradient * c)


def _along(cotangent: Any, gradient: Any) -> Any:
    return cotangent.to(gradient.dtype).reshape(cotangent.shape + (1,) * (gradient.ndim - cotangent.ndim))


def _of_examples(call: Call) -> Any:
    """The results of a call with one total per example."""
    afterwards = call.cotangent is not None and is_total_of_wide(call)
    with backend_of(call.x) as backend:
        xp = np if call.x.is_cpu else backend.ready()
        given = call._replace(cotangent=torch.ones_like(call.cotangent)) if afterwards else call
        found = tuple(map(as_tensor, examples.compute(xp, backend, lent(given))))
    if call.cotangent is not None:
        return scaled(found, call.cotangent) if afterwards else found
    total = found[0].to(value_like(call)[1])
    return (total, *found[1:]) if call.return_grad is not None else total


def outs_of(call: Call) -> list[Any]:
    """New tensors for the results of a call, after checking its options."""
    wanted = options.check(call)[2]
    if not call.operation.is_loss:
        rows.class_axis_of(call, call.x, call.y)
    gradients = [gradient_like(call.x if of == "x" else call.y) for of in wanted]
    if call.cotangent is not None:
        return gradients
    shape, dtype = value_like(call)
    return [torch.empty(shape, dtype=dtype, device=call.x.device), *gradients]
