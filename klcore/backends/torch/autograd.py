"""What PyTorch's transforms have to know: gradients, for autograd and torch.func, and batches, for vmap.

First derivatives only, but for the term of PyTorch itself, whose second ones are PyTorch's.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from klcore.backends.torch import kernels, operator, private
from klcore.operations import Call


def _setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    ctx.call = _save(ctx, operator.call_of(*inputs[:-1]))


def _save(ctx: Any, call: Call, *others: Any) -> Call:
    """Keep the call's tensors, and `others`; the call without them."""
    temperature, divisor = (a if isinstance(a, torch.Tensor) else None for a in (call.temperature, call.denominator))
    ctx.save_for_backward(call.x, call.y, call.weights, call.ratio, temperature, divisor, *others)
    return call._replace(
        x=None, y=None, weights=None, ratio=None,
        temperature=call.temperature if temperature is None else None,
        denominator=call.denominator if divisor is None else None,
    )  # fmt: skip


def _saved(call: Call, x: Any, y: Any, weights: Any, ratio: Any, temperature: Any, divisor: Any) -> Call:
    return call._replace(
        x=x, y=y, weights=weights, ratio=ratio,
        temperature=call.temperature if temperature is None else temperature,
        denominator=call.denominator if divisor is None else divisor,
    )  # fmt: skip


def traceable(name: str) -> Any:
    """What tracing and transforming see."""
    if private.is_transformed():
        return (_TransformedValue if name == "value" else _TransformedGradients).apply
    return getattr(torch.ops.klcore, name).default


def _backward(ctx: Any, cotangent: Any) -> tuple[Any, ...]:
    call = _saved(ctx.call, *ctx.saved_tensors)
    x = call.x
    _, of_x, of_y, *_ = ctx.needs_input_grad
    if torch.is_grad_enabled() or not private.is_eager(x, cotangent) or private.is_batched(cotangent):
        # the operator keeps the history that a second derivative needs, or refuses one
        dx, dy = traceable("gradients")(*operator.arguments_of(call), cotangent, of_x, of_y)
    else:
        found = kernels.compute(call._replace(cotangent=cotangent, return_grad=operator.names(of_x, of_y)))
        dx, dy = found[0], found[-1]
    return (None, dx if of_x else None, dy if of_y else None, *[None] * (len(ctx.needs_input_grad) - 3))


def _setup_second(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    *rest, cotangent, of_x, of_y = inputs
    ctx.call, ctx.wants = _save(ctx, operator.call_of(*rest), cotangent), (of_x, of_y)


def _backward_second(ctx: Any, of_dx: Any, of_dy: Any) -> tuple[Any, ...]:
    call, (wants_x, wants_y) = ctx.call, ctx.wants
    if call.operation.name != "pytorch":
        raise RuntimeError(
            "klcore gives first derivatives of its divergences, and this asks for a second one (create_graph=True, or "
            "a gradient of a gradient)"
        )
    x, y, factors, *_, cotangent = (
        t if t is None or torch.is_grad_enabled() else t.detach() for t in ctx.saved_tensors
    )

    def value(x: Any, y: Any) -> Any:  # PyTorch's own loss, in the precision of klcore's
        wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        terms = torch.nn.functional.kl_div(
            y.to(wide), x.to(wide), reduction="none", log_target=call.space[0] == "log_probs"
        )
        terms = terms if factors is None else terms * factors
        if call.reduction != "none" and terms.ndim:
            terms = terms.sum(call.axis) if call.reduction == "row" else terms.sum()
        return (terms / (1 if call.denominator is None else call.denominator)).to(cotangent.dtype)

    def first(x: Any, y: Any, cotangent: Any) -> Any:
        of_x, of_y = torch.func.vjp(value, x, y)[1](cotangent)
        return (of_x,) * wants_x + (of_y,) * wants_y

    with torch.enable_grad():
        second = torch.func.vjp(first, x, y, cotangent)[1]((of_dx,) * wants_x + (of_dy,) * wants_y)
    return (None, second[0], second[1], *[None] * (len(ctx.needs_input_grad) - 6), second[2], None, None)


class _Value(torch.autograd.Function):
    """The operator, for eager calls: PyTorch takes less time to call this, and it is told beforehand which gradients
    will be wanted. Those of a total then come in the same pass, and are multiplied by its cotangent afterwards."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        _setup(ctx, arguments, None)
        *rest, dtype = arguments
        call = operator.call_of(*rest)._replace(dtype=operator.dtype_name(dtype))
        ctx.unit = None
        if not kernels.is_total_of_wide(call):
            return kernels.compute(call)
        value, *ctx.unit = kernels.compute(call._replace(return_grad=operator.names(*ctx.needs_input_grad[1:3])))
        return value

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (cotangent,) = cotangents
        unit, ctx.unit = ctx.unit, None  # ours to give away, once
        if unit is None or torch.is_grad_enabled() or not private.is_eager(cotangent) or private.is_batched(cotangent):
            return _backward(ctx, cotangent)
        unit = kernels.scaled(unit, cotangent)
        _, of_x, of_y, *_ = ctx.needs_input_grad
        return (None, unit[0] if of_x else None, unit[-1] if of_y else None, *[None] * (len(ctx.needs_input_grad) - 3))


eager_value = _Value.apply


def _no_tangents(*_: Any) -> Any:
    raise NotImplementedError(
        "klcore has no derivatives in forward mode (jvp, jacfwd, hessian); use reverse mode: vjp, jacrev, grad"
    )


class _TransformedValue(torch.autograd.Function):
    """The operator, for torch.func."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.klcore.value.default(*arguments)

    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)
    jvp = staticmethod(_no_tangents)  # type: ignore[assignment]

    @staticmethod
    def vmap(info: Any, dims: Any, *arguments: Any) -> Any:
        return _values(_TransformedValue.apply, info, dims, *arguments)


class _TransformedGradients(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.klcore.gradients.default(*arguments)

    setup_context = staticmethod(_setup_second)
    backward = staticmethod(_backward_second)
    jvp = staticmethod(_no_tangents)  # type: ignore[assignment]

    @staticmethod
    def vmap(info: Any, dims: Any, *arguments: Any) -> Any:
        return _pairs(_TransformedGradients.apply, info, dims, *arguments)


def _one_by_one(function: Any, info: Any, dims: Any, *arguments: Any) -> list[Any]:
    """Of every member of a batch of torch.func.vmap's: the bits that it has alone."""
    return [
        function(*(a if d is None else a.select(d, i) for a, d in zip(arguments, dims, strict=True)))
        for i in range(info.batch_size)
    ]


def _of_none(function: Any, info: Any, dims: Any, *arguments: Any) -> Any:
    """What an example would have, had the batch one: sums over no example keep shapes, and their place in history."""
    return function(*(a if d is None else a.sum(d, dtype=a.dtype) for a, d in zip(arguments, dims, strict=True)))


def _values(*call: Any) -> tuple[Any, int]:
    _, info, *_ = call
    return (torch.stack(_one_by_one(*call)) if info.batch_size else _of_none(*call)[None][:0]), 0


def _pairs(*call: Any) -> tuple[tuple[Any, ...], tuple[int, int]]:
    _, info, *_ = call
    if not info.batch_size:
        return tuple(t[None][:0] for t in _of_none(*call)), (0, 0)
    return tuple(map(torch.stack, zip(*_one_by_one(*call), strict=True))), (0, 0)


torch.library.register_autograd("klcore::value", _backward, setup_context=_setup, lib=operator.LIBRARY)
torch.library.register_autograd(
    "klcore::gradients", _backward_second, setup_context=_setup_second, lib=operator.LIBRARY
)
# for vmap within torch.compile
torch.library.register_vmap("klcore::value", partial(_values, torch.ops.klcore.value.default), lib=operator.LIBRARY)
torch.library.register_vmap(
    "klcore::gradients", partial(_pairs, torch.ops.klcore.gradients.default), lib=operator.LIBRARY
)
