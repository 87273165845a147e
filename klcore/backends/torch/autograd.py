"""What PyTorch's transforms need: gradients for autograd and torch.func, and batches for vmap.

There are first derivatives only, except for PyTorch's own term, whose second derivatives are computed by PyTorch.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch

from klcore.backends.torch import batches, kernels, operator, private
from klcore.operations import Call


def value(call: Call) -> Any:
    """The value of a call that is traced or transformed."""
    if not private.is_transformed():
        return operator.value(call)
    tensors = operator.tensors_of(call)
    wanted = tuple(name for name, t in tensors.items() if t.requires_grad and torch.is_grad_enabled())
    first_only = call.operation.name != "pytorch" and set(wanted) <= {"x", "y"}
    if wanted and first_only and kernels.is_total_of_wide(call):
        total, *_ = _TransformedTotal.apply(*tensors.values(), _Rest(call._replace(return_grad=wanted)))
        return total
    return _TransformedValue.apply(*tensors.values(), _Rest(call))


def gradients(call: Call, cotangent: Any, of_x: bool, of_y: bool) -> Any:
    """The gradients of a call that is traced or transformed; an empty tensor for one that is not wanted."""
    if not private.is_transformed():
        return operator.gradients(call, cotangent, of_x, of_y)
    return _TransformedGradients.apply(*operator.tensors_of(call).values(), cotangent, _Rest(call, of_x, of_y))


def eager_value(call: Call) -> Any:
    """The value of an eager call, recorded by autograd, without the operator."""
    return _Value.apply(*operator.tensors_of(call).values(), _Rest(call))


class _Rest:
    """All of a call except its tensors, as one object: torch.func traverses every tuple, which is slow."""

    def __init__(self, call: Call, *wants: bool) -> None:
        tensors = operator.tensors_of(call)
        self.names, self.wants = tuple(tensors), wants
        self.places = _places(self.names)
        self.call = call._replace(**dict.fromkeys(tensors, cast(Any, None)))

    def whole(self, tensors: Sequence[Any]) -> Call:
        return self.call._replace(**dict(zip(self.names, tensors, strict=False)))


@cache
def _places(names: tuple[str, ...]) -> dict[str, int]:
    """The positions of a call's tensors among the inputs of a Function, where a cotangent may follow."""
    return {name: k for k, name in enumerate((*names, "cotangent"))}


# ---- gradients -------------------------------------------------------------------------------------------------------


def _keep(ctx: Any, rest: _Rest, places: dict[str, int], *tensors: Any) -> None:
    ctx.rest, ctx.places = rest, places
    ctx.save_for_backward(*tensors)


def _needs(ctx: Any, name: str) -> bool:
    return name in ctx.places and ctx.needs_input_grad[ctx.places[name]]


def _of_inputs(ctx: Any, **gradients: Any) -> tuple[Any, ...]:
    """The tuple that a backward returns."""
    found: list[Any] = [None] * len(ctx.needs_input_grad)
    for name, g in gradients.items():
        if _needs(ctx, name):
            found[ctx.places[name]] = g
    return tuple(found)


def _setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    call = operator.call_of(*inputs[:-1])
    _keep(ctx, _Rest(call), operator.TENSORS, *operator.tensors_of(call).values())


def _backward(ctx: Any, cotangent: Any) -> tuple[Any, ...]:
    call = ctx.rest.whole(ctx.saved_tensors)
    of_x, of_y = _read_off(ctx, call)
    if torch.is_grad_enabled() or not private.is_eager(call.x, cotangent) or private.is_batched(cotangent):
        # the operator records the history for a second derivative, or raises
        dx, dy = gradients(call, cotangent, of_x, of_y)
    else:
        found = kernels.compute(call._replace(cotangent=cotangent, return_grad=operator.names(of_x, of_y)))
        dx, dy = found[0], found[-1]
    return _of_inputs(ctx, x=dx, y=dy, temperature=_of_temperature(ctx, call, dx, dy))


def _read_off(ctx: Any, call: Call) -> tuple[bool, bool]:
    """Which gradients to compute: that of the temperature follows from those of all logits."""
    of_x, of_y = (
        _needs(ctx, name) or (space == "logits" and _needs(ctx, "temperature"))
        for name, space in zip("xy", operator.pair_of(call), strict=True)
    )
    return of_x, of_y and not call.operation.single


def _of_temperature(ctx: Any, call: Call, dx: Any, dy: Any) -> Any:
    """The gradient for the temperature T. Values depend only on logits / T, so T times the gradient is the negative sum
    of the logits times their gradients. A constant offset of a row cancels in this sum, so it is subtracted first."""
    if not _needs(ctx, "temperature"):
        return None
    t = call.temperature
    found = torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32))
    for logits, g, space in zip((call.x, call.y), (dx, dy), operator.pair_of(call), strict=True):
        if space == "logits" and logits is not None and logits.numel():
            wide = torch.promote_types(logits.dtype, torch.float32)
            a, g = logits.to(wide), g.to(wide)
            a = torch.where(g == 0, -math.inf, a)  # excluded or unlisted classes, and rows that are left out
            terms = torch.where(g == 0, 0, (a - a.amax(call.axis, keepdim=True)) * g)
            found = found - terms.sum(call.axis).sum_to_size(t.shape).to(found.device)
    return torch.where(found == 0, 0, found / t).to(t.dtype)  # the temperature of a left-out row may be 0 or NaN


def _setup_second(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    *arguments, cotangent, of_x, of_y = inputs
    call, places = operator.call_of(*arguments), {**operator.TENSORS, "cotangent": len(arguments)}
    _keep(ctx, _Rest(call, of_x, of_y), places, *operator.tensors_of(call).values(), cotangent)


def refuse_second(*_: Any) -> Any:
    raise RuntimeError(
        "klcore has first derivatives only, but a second derivative was requested (create_graph=True, or a gradient of "
        "a gradient)"
    )


def _backward_second(ctx: Any, of_dx: Any, of_dy: Any) -> tuple[Any, ...]:
    if ctx.rest.call.operation.name != "pytorch":
        refuse_second()
    wants_x, wants_y = ctx.rest.wants
    *tensors, cotangent = (t if torch.is_grad_enabled() else t.detach() for t in ctx.saved_tensors)
    call = ctx.rest.whole(tensors)
    x, y, factors = call.x, call.y, call.weights

    def value(x: Any, y: Any) -> Any:  # PyTorch's own loss, in the precision of klcore
        wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        terms = torch.nn.functional.kl_div(
            y.to(wide), x.to(wide), reduction="none", log_target=call.space[0] == "log_probs"
        )
        terms = terms if factors is None else terms * factors
        if call.reduction != "none" and terms.ndim:
            terms = terms.sum(call.axis) if call.reduction == "row" else terms.flatten(call.examples).sum(-1)
        return (terms / (1 if call.denominator is None else call.denominator)).to(cotangent.dtype)

    def first(x: Any, y: Any, cotangent: Any) -> Any:
        of_x, of_y = torch.func.vjp(value, x, y)[1](cotangent)
        return (of_x,) * wants_x + (of_y,) * wants_y

    with torch.enable_grad():
        second = torch.func.vjp(first, x, y, cotangent)[1]((of_dx,) * wants_x + (of_dy,) * wants_y)
    return _of_inputs(ctx, x=second[0], y=second[1], cotangent=second[2])


class _Value(torch.autograd.Function):
    """The operator, for eager calls: PyTorch calls a Function faster, and a Function knows in advance which gradients
    are needed. Those of a total are computed in the same pass, and multiplied by its cotangent later."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *tensors, rest = inputs
        call = rest.whole(tensors)
        _keep(ctx, rest, rest.places, *tensors)
        ctx.unit = None
        if not kernels.is_total_of_wide(call):
            return kernels.compute(call)
        value, *ctx.unit = kernels.compute(call._replace(return_grad=operator.names(*_read_off(ctx, call))))
        return value

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (cotangent,) = cotangents
        unit, ctx.unit = ctx.unit, None  # they are scaled in place, so they can be used only once
        if unit is None or torch.is_grad_enabled() or not private.is_eager(cotangent) or private.is_batched(cotangent):
            return _backward(ctx, cotangent)
        unit = kernels.scaled(unit, cotangent)
        dx, dy = unit[0], unit[-1]
        if not _needs(ctx, "temperature"):
            return _of_inputs(ctx, x=dx, y=dy)
        call = ctx.rest.whole(ctx.saved_tensors)
        return _of_inputs(ctx, x=dx, y=dy, temperature=_of_temperature(ctx, call, dx, dy))


# ---- torch.func ------------------------------------------------------------------------------------------------------


def _no_tangents(*_: Any) -> Any:
    raise NotImplementedError(
        "klcore has no derivatives in forward mode (jvp, jacfwd, hessian); use reverse mode: vjp, jacrev, grad"
    )


class _TransformedValue(torch.autograd.Function):
    """The operator, for torch.func."""

    backward = staticmethod(_backward)
    jvp = staticmethod(_no_tangents)  # type: ignore[assignment]

    @staticmethod
    def forward(*inputs: Any) -> Any:
        *tensors, rest = inputs
        return (kernels.compute if private.is_eager(*tensors) else operator.value)(rest.whole(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, rest = inputs
        _keep(ctx, rest, rest.places, *tensors)

    @staticmethod
    def vmap(info: Any, dims: Any, *inputs: Any) -> Any:
        *tensors, rest = inputs
        return batches.value(value, info, dict(zip(rest.names, dims, strict=False)), rest.whole(tensors))


class _TransformedGradients(torch.autograd.Function):
    backward = staticmethod(_backward_second)
    jvp = staticmethod(_no_tangents)  # type: ignore[assignment]

    @staticmethod
    def forward(*inputs: Any) -> Any:
        *tensors, cotangent, rest = inputs
        return operator.gradients(rest.whole(tensors), cotangent, *rest.wants)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, rest = inputs
        _keep(ctx, rest, rest.places, *tensors)

    @staticmethod
    def vmap(info: Any, dims: Any, *inputs: Any) -> Any:
        *tensors, cotangent, rest = inputs
        of = dict(zip(rest.places, dims, strict=False))
        return batches.gradients(gradients, info, of, rest.whole(tensors), cotangent, *rest.wants)


class _TransformedTotal(torch.autograd.Function):
    """A total together with the gradients that are needed, as in _Value: within torch.func, a Function takes PyTorch
    longer than thousands of rows take klcore."""

    jvp = staticmethod(_no_tangents)  # type: ignore[assignment]

    @staticmethod
    def forward(*inputs: Any) -> Any:
        *tensors, rest = inputs
        call = rest.whole(tensors)
        if private.is_eager(*tensors):
            return kernels.compute(call)
        total, wants = operator.value(call), [name in call.return_grad for name in "xy"]
        both = operator.gradients(call, torch.ones_like(total), *wants)
        return total, *(g for g, wanted in zip(both, wants, strict=True) if wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _keep(ctx, inputs[-1], inputs[-1].places, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        cotangent, *of_gradients = cotangents
        if any(c is not None for c in of_gradients):
            refuse_second()
        if cotangent is None:
            return _of_inputs(ctx)
        found = (kernels.times(g, cotangent) for g in ctx.saved_tensors)
        return _of_inputs(ctx, **dict(zip(ctx.rest.call.return_grad, found, strict=True)))

    @staticmethod
    def vmap(info: Any, dims: Any, *inputs: Any) -> Any:
        *tensors, rest = inputs
        dims = dict(zip(rest.names, dims, strict=False))
        return batches.value_and_gradients(_TransformedTotal._of_call, info, dims, rest.whole(tensors))

    @staticmethod
    def _of_call(call: Call) -> Any:
        return _TransformedTotal.apply(*operator.tensors_of(call).values(), _Rest(call))


# ---- the operators, within torch.compile -----------------------------------------------------------------------------


def _values_of_operator(info: Any, dims: Any, *arguments: Any) -> Any:
    *rest, dtype = arguments
    call = operator.call_of(*rest)._replace(dtype=operator.dtype_name(dtype))
    return batches.value(operator.value, info, {name: dims[k] for name, k in operator.TENSORS.items()}, call)


def _gradients_of_operator(info: Any, dims: Any, *arguments: Any) -> Any:
    *rest, cotangent, of_x, of_y = arguments
    of = {name: dims[k] for name, k in operator.TENSORS.items()} | {"cotangent": dims[-3]}
    return batches.gradients(operator.gradients, info, of, operator.call_of(*rest), cotangent, of_x, of_y)


torch.library.register_autograd("klcore::value", _backward, setup_context=_setup, lib=operator.LIBRARY)
torch.library.register_autograd(
    "klcore::gradients", _backward_second, setup_context=_setup_second, lib=operator.LIBRARY
)
torch.library.register_vmap("klcore::value", _values_of_operator, lib=operator.LIBRARY)
torch.library.register_vmap("klcore::gradients", _gradients_of_operator, lib=operator.LIBRARY)
