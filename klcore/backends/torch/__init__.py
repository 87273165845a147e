"""PyTorch tensors: their memory is lent to klcore.backends.cpu or klcore.backends.cuda; autograd learns the gradient.

Nothing is copied, not even bfloat16. torch.compile, torch.export and torch.func see the operator
``torch.ops.klcore.value``. Ordinary eager calls go through an autograd.Function instead, or, if no gradient is needed,
straight to the kernels; for small tensors, that takes a fifth of the operator's time. On a GPU, everything runs on
PyTorch's current stream, and results are in PyTorch's own memory.

This file has the main path of a call. Each of the other files imports only those before it: private.py, memory.py,
kernels.py, operator.py, batches.py, autograd.py. DTensors go through sharded.py, which calls this file with the part of
each process; parts.py is for klcore.Shard.
"""

from typing import Any

import torch

from klcore.backends import destinations, labels, options, rows
from klcore.backends.torch import autograd, kernels, memory, private
from klcore.operations import Call, named

_HALVES = ("float16", "bfloat16")
_PLAIN = {*private.PLAIN, type(None), float, int}  # types that are never stand-ins


def compute(call: Call) -> Any:
    if type(call.x) is not torch.Tensor and private.is_distributed(call.x):
        return _sharded(call)
    arguments = call.x, call.y, call.weights, call.ratio, call.temperature, call.denominator
    plain = torch.compiler.is_compiling() or (call.indices is None and _PLAIN.issuperset(map(type, arguments)))
    stand_ins = () if plain else tuple(filter(private.stands_in, call))
    if stand_ins:
        return torch.overrides.handle_torch_function(called, stand_ins, call.operation.name, *call[1:])
    given = call
    x, y = memory.operands(call.x, call.y, call.device)
    if call.operation.name == "puzzlelib":  # it returns no gradient, but a direction of descent, the opposite sign
        x, y = x.detach(), y.detach()
    estimate = "klcore.kl_estimate(...)" if call.operation.is_estimator else None
    name = "factors" if call.operation.is_loss else "weights"
    weights = memory.weights_beside(call.weights, x, call.device, name, estimate)
    ratio = memory.weights_beside(call.ratio, x, call.device, "ratio", estimate)
    if call.indices is not None or call.tail is not None or call.tail_mass is not None:
        options.check_list(call, options.space_pair(call.space, call.operation))
        indices, mass = memory.list_beside(call.indices, call.tail_mass, x, call.device)
        call = call._replace(indices=indices, tail_mass=mass)
    before = given.x, given.y, given.weights, given.ratio
    same = x is before[0] and y is before[1] and weights is before[2] and ratio is before[3]
    as_given = same and call.indices is None
    if not as_given and not torch.compiler.is_compiling():
        _check_labels(given, call, x, y)
    if not as_given and _needs_grad(x, y, call.temperature):  # an array may change before backward reads it
        x, y, weights, ratio = (
            t if t is a or t is None or isinstance(a, torch.Tensor) else t.clone()
            for t, a in zip((x, y, weights, ratio), before, strict=True)
        )
    call = _with_numbers(call, x)
    of_value = call.dtype
    if call.operation.name == "pytorch" and of_value in _HALVES and torch.is_autocast_enabled(x.device.type):
        of_value = "float32"  # under autocast, PyTorch's own loss computes in float32
    if not as_given or call.device is not None or of_value is not call.dtype:
        call = call._replace(x=x, y=y, weights=weights, ratio=ratio, device=None, dtype=of_value)
    return _history_or_not(call) if call.out is None else _into(call)


def _check_labels(given: Call, call: Call, x: Any, y: Any) -> None:
    """Check the labels of the caller's arguments, before they were converted to tensors."""
    arrays = given.x, given.y, given.weights, given.ratio, given.temperature, given.indices, given.tail_mass
    if labels.are_there(*arrays):
        labels.check(rows.class_axis_of(call, x, y), *arrays)


def _with_numbers(call: Call, x: Any) -> Call:
    """The call with temperature and denominator as numbers, or as tensors next to x: data for the compiler."""
    if torch.compiler.is_compiling() and not call.operation.is_loss:
        call = call._replace(temperature=memory.data(call.temperature), denominator=memory.data(call.denominator))
    if isinstance(call.denominator, torch.Tensor):
        options.check_denominator(call)
        if call.denominator.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                "denominator requires a gradient, but klcore has no gradient for it; divide the sum by it instead"
            )
        if call.denominator.requires_grad:
            call = call._replace(denominator=call.denominator.detach())
    if isinstance(call.temperature, (float, int)):
        return call
    return call._replace(temperature=memory.temperature_beside(call.temperature, x))


def called(operation: str, *arguments: Any) -> Any:
    """A call, as torch.fx.symbolic_trace records it in its graph."""
    return compute(Call(named(operation), *arguments))


def _sharded(call: Call) -> Any:
    from klcore.backends.torch import sharded  # torch.distributed may be unavailable

    return sharded.compute(call, compute)


def _history_or_not(call: Call) -> Any:
    x, y = call.x, call.y
    t = call.temperature if isinstance(call.temperature, torch.Tensor) else None
    beside: tuple[Any, ...] = (y, call.weights, call.ratio, t)
    beside = beside if call.indices is None else (*beside, call.indices, call.tail_mass)
    eager = private.is_eager(x, *beside)
    if not eager and private.is_distributed(*beside):
        return _sharded(call)
    if call.return_grad is None and t is not None and _needs_grad(t):
        call = call._replace(axis=rows.class_axis_of(call, x, y))
        if t.ndim and y is not None:  # rows that share an operand may have different temperatures
            shape, axis = kernels.shape_of(call), call.axis
            x, y = (a.expand(rows.with_classes(shape, axis, a.shape[axis])) for a in (x, y))
            call = call._replace(x=x, y=y)
    elif eager and t is not None and t.ndim == 0:
        call = call._replace(temperature=t.item() if t.is_cpu else t.clone())  # it may change before backward
    if eager and (call.return_grad is not None or not _needs_grad(x, y, t)):
        return kernels.compute(call)
    options.check_reduction(call.reduction, call.operation)
    options.check_denominator(call)
    options.space_pair(call.space, call.operation)
    wanted: tuple[str, ...] = ()
    if not eager:
        # the values of a tensor are checked when they are known
        _, temperature, wanted = options.check(call if t is None else call._replace(temperature=1.0))
        axis = call.axis if call.operation.is_loss else rows.class_axis_of(call, x, y)
        call = call._replace(temperature=temperature if t is None else t, axis=axis)
    if call.return_grad is None:
        return autograd.eager_value(call) if eager else autograd.value(call)
    call = call._replace(x=x.detach(), y=None if y is None else y.detach())
    call = call if t is None else call._replace(temperature=t.detach())
    value = autograd.value(call)
    if call.reduction in ("row", "none"):  # the gradient is that of the sum of the returned values
        call = call._replace(reduction="sum")
    both = autograd.gradients(call, value.new_ones(()), "x" in wanted, "y" in wanted)
    return (value, *(g for name, g in zip("xy", both, strict=True) if name in wanted))


def _needs_grad(*arguments: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in arguments)


def _into(call: Call) -> Any:
    """Compute into the caller's output tensors."""
    x, y, out = call.x, call.y, call.out
    if _needs_grad(x, y, call.temperature):
        raise TypeError(
            "out= does not support autograd, but an argument requires a gradient; omit out=, or detach the arguments, "
            "or use torch.no_grad()"
        )
    outs = list(out) if isinstance(out, tuple) else [out]
    for t in outs:
        if t is not None and not (isinstance(t, torch.Tensor) and t.device == x.device):
            found = f"one on {t.device}" if isinstance(t, torch.Tensor) else type(t).__name__
            raise TypeError(f"out must be a tensor on {x.device}, or a tuple of such tensors; found {found}")
        if t is not None:
            memory.check(t, "out")
            if destinations.shares_with_itself(t.shape, t.stride(), 1):
                raise ValueError("out is a view whose elements share memory; pass a new tensor")
            if t.requires_grad and torch.is_grad_enabled():
                raise TypeError("out requires a gradient, but out= does not support autograd; pass a detached tensor")
    beside = y, call.weights, call.ratio, call.indices, call.tail_mass, *outs
    if not private.is_eager(x, *beside) or any(t is not None and t.is_neg() for t in outs):
        return _copied(_history_or_not(call._replace(out=None)), out, outs)
    if not x.is_cpu:  # all results must be in PyTorch's own memory
        new = kernels.outs_of(call)
        given = destinations.results_in(out, ("",) * (len(new) - 1))
        outs = [b if a is None else a for a, b in zip(given, new, strict=True)]
        out = tuple(outs)
    with memory.backend_of(x) as backend:
        results = backend.compute(kernels.lent(call._replace(out=out)))
    results = results if isinstance(results, tuple) else (results,)
    outs += [None] * (len(results) - len(outs))
    kept = tuple(memory.as_tensor(a) if t is None else t for a, t in zip(results, outs, strict=True))
    torch.autograd.graph.increment_version([t for t in outs if t is not None])  # autograd must see that they changed
    return kept if call.return_grad is not None else kept[0]


def _copied(found: Any, out: Any, outs: list[Any]) -> Any:
    """Copy results into the caller's output tensors."""
    results = found if isinstance(found, tuple) else (found,)
    if isinstance(out, tuple) and len(out) != len(results):
        raise ValueError(f"out must be a tuple of {len(results)} (value, then gradients); found a tuple of {len(out)}")
    for r, t in zip(results, outs, strict=False):
        if t is not None and (t.shape, t.dtype) != (r.shape, r.dtype):
            raise ValueError(
                f"out must have shape {tuple(r.shape)} and dtype {r.dtype}; found {tuple(t.shape)} and {t.dtype}"
            )
    outs = outs + [None] * (len(results) - len(outs))
    kept = tuple(r if t is None else t.copy_(r) for r, t in zip(results, outs, strict=True))
    return kept if isinstance(found, tuple) else kept[0]
