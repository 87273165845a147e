"""DTensors: every process computes from the part that it holds, and the results are DTensors.

Batch axes may be sharded in any way: nothing is exchanged, and a total is Partial, as for PyTorch's own loss. If the
classes are sharded, each process leaves a state for every 1024 of its classes (src/kl_partial.h). Before the value is
known, all states are gathered, and merged by every process. The value and the gradients of its own part then follow
without another exchange. So autograd sees no exchange, and backward needs none.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from klcore import _cpu
from klcore.backends import cpu, options, rows, sparse
from klcore.backends.torch import autograd, kernels, memory, operator
from klcore.operations import Call

# ---- placements ------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """How a call is sharded. Axes are those of the broadcast shape, counted from the end."""

    mesh: Any
    divided: tuple[int | None, ...]  # for each dimension of the mesh, the axis that it divides
    classes: int  # the class axis; 0 if there is none
    exchanged: bool  # whether the class axis is divided, and states of its shards are exchanged

    def placements(self, shape: Any, of_rows: bool = False, missing: Any = Replicate) -> tuple[Any, ...]:
        """The placements of a tensor of this shape; `of_rows`: it lacks the class axis; `missing`: the placement along
        mesh dimensions that divide an axis which it does not have."""
        found: list[Any] = []
        for axis in self.divided:
            lost = of_rows and axis == self.classes
            if axis is None or (lost and self.exchanged):
                found.append(Replicate())
                continue
            k = len(shape) + axis + (of_rows and axis < self.classes)
            found.append(Shard(k) if not lost and k >= 0 and shape[k] > 1 else missing())
        return tuple(found)

    def part(self, t: Any, of_rows: bool = False) -> Any:
        """This process's part of a DTensor, redistributed to this layout; anything else unchanged."""
        if not isinstance(t, DTensor):
            return t
        placements = self.placements(t.shape, of_rows)
        t = t if t.placements == placements else t.redistribute(placements=placements)
        return t.to_local(grad_placements=self.placements(t.shape, of_rows, Partial))

    def whole(self, t: Any, shape: Any, stride: Any, placements: tuple[Any, ...]) -> Any:
        """The DTensor that consists of the parts of all processes."""
        return DTensor.from_local(t, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def shards(self, n: int) -> list[int]:
        """The sizes of all shards of n classes, in order."""
        sizes = [n]
        for k, axis in enumerate(self.divided):
            if axis == self.classes:
                parts = self.mesh.size(k)
                sizes = [max(0, min(-(-m // parts), m - j * -(-m // parts))) for m in sizes for j in range(parts)]
        return sizes

    def gathered(self, states: Any) -> Any:
        """The states of all shards of the classes, in order, along the last axis."""
        of_classes = [Shard(states.ndim - 1) if axis == self.classes else Replicate() for axis in self.divided]
        whole = DTensor.from_local(states, self.mesh, of_classes, run_check=False)  # rows are not exchanged
        return whole.redistribute(placements=[Replicate()] * len(of_classes)).to_local()


def _layout(x: Any, y: Any, classes: int) -> _Layout:
    """Choose the layout: sharded axes stay sharded. If x and y differ, the smaller one is moved; of two equally large
    ones, the one whose classes are sharded."""

    def divided(t: Any) -> tuple[int | None, ...]:
        # by comparison, because torch.compile would treat p.dim itself as dynamic
        found = [[d for d in range(t.ndim) if d == getattr(p, "dim", None) and t.shape[d] > 1] for p in t.placements]
        return tuple(d[0] - t.ndim if d else None for d in found)

    axes = divided(x)
    if y is not None:
        of_x, of_y = ((t.numel() * t.element_size(), classes not in divided(t)) for t in (x, y))
        first, second = (x, y) if of_x >= of_y else (y, x)
        axes = tuple(b if a is None else a for a, b in zip(divided(first), divided(second), strict=True))
    return _Layout(x.device_mesh, axes, classes, classes in axes)


def _check(call: Call) -> None:
    """Raise for arguments that do not go together with DTensors."""
    if call.out is not None:
        raise TypeError("out= is not supported with DTensors; use the returned DTensors")
    if call.device is not None:
        raise ValueError(f"device={call.device!r}, but DTensors are computed on their mesh; omit device=")
    for name in ("x", "y", "weights", "ratio", "temperature", "denominator", "indices", "tail_mass"):
        t = getattr(call, name)
        if isinstance(t, DTensor):
            memory.check(t, name)
            if isinstance(call.x, DTensor) and t.device_mesh != call.x.device_mesh:
                raise ValueError(f"x and {name} are DTensors on different meshes; distribute {name} over x.device_mesh")
        elif t is not None and (
            name in ("x", "y", "indices") or getattr(t, "shape", ()) != () or isinstance(t, (list, tuple))
        ):
            raise TypeError(
                f"{name} is a {type(t).__module__}.{type(t).__qualname__}, but other arguments are DTensors, so it may "
                f"be a part or the whole; pass distribute_tensor({name}, mesh, placements) of the whole, or "
                "DTensor.from_local of a part"
            )


def _check_gradient(temperature: Any, layout: _Layout) -> None:
    """Raise if the temperature requires a gradient that klcore cannot compute: it needs all rows, and whole ones."""
    if not isinstance(temperature, DTensor):
        raise TypeError(
            "temperature requires a gradient, of which each process would only have the part of its rows; pass it as a "
            "DTensor, distribute_tensor(temperature, mesh, [Replicate()])"
        )
    if layout.exchanged:
        raise TypeError(
            "temperature requires a gradient, but klcore has no gradient for it if the classes are sharded; divide the "
            "logits by it instead"
        )


def compute(call: Call, locally: Callable[[Call], Any]) -> Any:
    """Compute a call with DTensors; `locally` is klcore.backends.torch.compute, for plain tensors."""
    _check(call)
    operation, x, y = call.operation, call.x, call.y
    if isinstance(call.denominator, DTensor):
        call = call._replace(denominator=call.denominator.full_tensor())
    options.check(call)
    terms = kernels.shape_of(call)
    if operation.is_loss:
        classes = call.axis - len(terms) if call.axis >= 0 else call.axis
    else:
        classes = rows.class_axis_of(call, x, y)
    if not torch.compiler.is_compiling():
        if x.device_mesh.get_coordinate() is None:
            raise ValueError(
                "this process is not in x.device_mesh and has no part of x; call klcore only in processes of the mesh"
            )
        arrange = rows.arrange if call.indices is None else sparse.arrange
        arrange(np, _shape_of, call._replace(return_grad=None, reduction="row", denominator=None, dtype=None))
    layout = _layout(x, y, classes)
    if layout.exchanged and call.indices is not None:
        raise TypeError(
            "with indices, the batch may be sharded, but not the classes; move them, for example with "
            "redistribute(placements=[Shard(0)]) or full_tensor()"
        )
    if layout.exchanged and (call.reduction == "none" or operation.is_loss) and _sweeps(call, True, False) == 1:
        layout = layout._replace(exchanged=False)  # every class is computed by itself
    if call.return_grad is None and torch.is_grad_enabled() and getattr(call.temperature, "requires_grad", False):
        _check_gradient(call.temperature, layout)

    alone = operation.is_estimator
    batch = terms if alone or not terms else (*terms[:classes], *terms[len(terms) + classes + 1 :])
    shape, _ = kernels.value_like(call)
    if not shape and call.reduction != "sum":
        call = call._replace(**_divided(call, terms, batch))
    by_row = not (alone or operation.is_loss)
    parts = call._replace(
        x=layout.part(x),
        y=layout.part(y),
        axis=classes,
        weights=layout.part(call.weights, by_row),
        ratio=layout.part(call.ratio, by_row),
        temperature=layout.part(call.temperature, by_row),
        indices=layout.part(call.indices),
        tail_mass=layout.part(call.tail_mass, by_row),
    )
    found = _exchanging(parts, layout, x.shape[classes]) if layout.exchanged else locally(parts)
    value, *gradients = found if isinstance(found, tuple) else (found,)
    strides = tuple(math.prod(max(n, 1) for n in shape[k + 1 :]) for k in range(len(shape)))
    of_rows = call.reduction != "none" and not alone
    value = layout.whole(value, shape, strides, layout.placements(shape, of_rows, Partial))
    if not gradients:
        return value
    wanted = [{"x": x, "y": y}[of] for of in options.check(call)[2]]
    return value, *(
        layout.whole(g, t.shape, t.stride(), layout.placements(t.shape, missing=Partial))
        for g, t in zip(gradients, wanted, strict=True)
    )


def _shape_of(a: Any, name: str) -> Any:
    """An array without memory for the checks of rows.py: ones, or -1 for indices, which are not checked here."""
    return np.broadcast_to(-1 if name == "indices" else 1.0, getattr(a, "shape", ()))


def _divided(call: Call, terms: tuple[int, ...], batch: tuple[int, ...]) -> dict[str, Any]:
    """The changes to a call that turn a mean over the whole batch into a sum of its parts."""
    weights, count = call.weights, math.prod(batch)
    if call.reduction != "rowmean" or weights is None:
        denominator: Any = rows.denominator(call, terms, batch, None)
    elif not isinstance(weights, DTensor):
        denominator = weights * count
    else:
        denominator = _sum(weights, count)
        factor = 1.0 if torch.compiler.is_compiling() else rows.weight_factor(float(denominator))
        if factor != 1:  # move the weights to the middle of the range, where their sum is finite
            weights = weights.to(torch.float64) * factor
            denominator = _sum(weights, count)
    return {"reduction": "sum", "weights": weights, "denominator": denominator}


def _sum(weights: Any, count: int) -> Any:
    """The sum of the weights of all rows."""
    return weights.detach().to(torch.float64).sum().full_tensor() * (count // max(weights.numel(), 1))


# ---- sharded classes -------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _count(code: int, space_x: int, space_y: int, terms: bool, gradient: bool) -> int:
    return len(_cpu.sweeps(code, space_x, space_y, False, terms, gradient))


def _sweeps(call: Call, terms: bool, gradient: bool) -> int:
    """The number of sweeps over the rows that these outputs need."""
    return _count(call.operation.code, *options.space_pair(call.space, call.operation), terms, gradient)


def _exchanging(call: Call, layout: _Layout, classes: int) -> Any:
    """The value of this process's rows, and the gradients for its classes."""
    _, temperature, wanted = options.check(call)
    x, y = (t if t is None or not wanted else t.detach() for t in (call.x, call.y))
    weights = memory.weights_beside(call.weights, x, None, "weights")
    terms = call.reduction == "none"
    if call.operation.is_loss:
        raise TypeError(
            "if a loss of klcore.compat takes logits, the classes of its DTensors must not be sharded; move them, for "
            "example with redistribute(placements=[Shard(0)])"
        )
    call = call._replace(x=x, y=y, weights=weights, temperature=temperature, return_grad=None)
    of_x, of_y = "x" in wanted, "y" in wanted
    if not wanted and torch.is_grad_enabled():
        of_x, of_y = x.requires_grad, y is not None and y.requires_grad
        if terms and (of_x or of_y):
            raise NotImplementedError(
                "reduction='none' has no gradient if the classes of logits or counts are sharded; use "
                "reduction='row', or torch.no_grad()"
            )
    counts = [cpu.chunks(n) for n in layout.shards(classes)]
    ops, arguments = torch.ops.klcore, operator.arguments_of(call)
    stats: list[Any] = [None]  # the stats before each sweep, and after the last
    with torch.no_grad():
        for number in range(_sweeps(call, False, False)):
            states = ops.states.default(*arguments, number, stats[-1], of_x, of_y, max(counts))
            states = layout.gathered(states)
            stats.append(ops.merged.default(*arguments, number, stats[-1], states, counts))
    at = _sweeps(call, True, False) - 1 if terms else -1
    value = ops.value_of_stats.default(*arguments, stats[at])
    if not wanted:
        return value
    of_sum = operator.arguments_of(call._replace(reduction="sum"))
    both = ops.gradients_of_stats.default(*of_sum, stats[-1], value.new_ones(()), of_x, of_y)
    return (value, *(g for g, of in zip(both, (of_x, of_y), strict=True) if of))


# The operators that torch.compile sees: the arguments are those of operator.py, and the stats of the rows.
_define, _arguments = operator.LIBRARY.define, operator.ARGUMENTS
_define(f"states({_arguments}, int number, Tensor? stats, bool of_x, bool of_y, int count) -> Tensor")
_define(f"merged({_arguments}, int number, Tensor? stats, Tensor states, int[] counts) -> Tensor")
_define(f"value_of_stats({_arguments}, Tensor stats) -> Tensor")
_define(f"gradients_of_stats({_arguments}, Tensor stats, Tensor cotangent, bool of_x, bool of_y) -> (Tensor, Tensor)")


def _lent(arguments: Sequence[Any], of_x: bool = False, of_y: bool = False) -> Call:
    call = operator.call_of(*arguments)
    return kernels.lent(call._replace(return_grad=operator.names(of_x, of_y) or None))


def _states(*arguments: Any) -> Any:
    """The states that sweep `number` leaves for this process's classes, padded with zeros to `count` chunks."""
    *rest, number, stats, of_x, of_y, count = arguments
    call = _lent(rest, of_x, of_y)._replace(reduction="row", denominator=None)
    with memory.backend_of(rest[1]) as backend:
        found = memory.as_tensor(backend.states(call, number, memory.lend(stats)))
    return torch.nn.functional.pad(found, (0, count - found.shape[-1]))


def _merged(*arguments: Any) -> Any:
    """The stats of the rows, from the states of all shards; `counts` are their numbers of chunks."""
    *rest, number, stats, states, counts = arguments
    most = max(counts)
    if set(counts) != {most}:
        states = torch.cat([states[..., k * most : k * most + m] for k, m in enumerate(counts)], -1)
    with memory.backend_of(rest[1]) as backend:
        task = backend.arrange(_lent(rest)._replace(reduction="row", denominator=None))
        return memory.as_tensor(backend.merge(task, number, memory.lend(states), memory.lend(stats)))


def _value_of_stats(*arguments: Any) -> Any:
    *rest, stats = arguments
    call = operator.call_of(*rest)
    _, dtype = kernels.value_like(call)
    if call.reduction == "none":
        with memory.backend_of(call.x) as backend:
            number = _sweeps(call, True, False) - 1
            (terms,) = backend.outputs(_lent(rest), number, memory.lend(stats), 1.0, ())
            return memory.as_tensor(terms)
    values = stats[..., 0]
    if call.reduction == "row":
        return values.to(dtype, copy=True)
    total = values.sum()
    if values.is_cpu:
        total = torch.tensor(cpu.sum_of(memory.lend(values)), dtype=torch.float64)
    denominator = _denominator(call)
    return (total / denominator if denominator else total * math.nan).to(dtype)


def _denominator(call: Call) -> float:
    return 1.0 if call.denominator is None else options.denominator_of(call)


def _gradients_of_stats(*arguments: Any) -> tuple[Any, Any]:
    *rest, stats, cotangent, of_x, of_y = arguments
    afterwards = kernels.is_total_of_wide(operator.call_of(*rest))
    before = torch.ones_like(cotangent) if afterwards else cotangent
    call = _lent(rest, of_x, of_y)._replace(cotangent=memory.lend(before))
    number = _sweeps(call, False, True) - 1
    _, x, y, *_ = rest
    with memory.backend_of(x) as backend:
        found = backend.outputs(call, number, memory.lend(stats) if number else None, _denominator(call), ())
        found = tuple(map(memory.as_tensor, found))
    return operator.both_of(x, y, kernels.scaled(found, cotangent) if afterwards else found, of_x, of_y)


for _name, _function in {
    "states": _states,
    "merged": _merged,
    "value_of_stats": _value_of_stats,
    "gradients_of_stats": _gradients_of_stats,
}.items():
    operator.LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


def _batch(arguments: Sequence[Any]) -> tuple[int, ...]:
    return kernels.value_like(operator.call_of(*arguments)._replace(reduction="row"))[0]


@torch.library.register_fake("klcore::states", lib=operator.LIBRARY)
def _fake_states(*arguments: Any) -> Any:
    *rest, number, _, of_x, of_y, count = arguments
    call = operator.call_of(*rest)
    numbers = cpu.sweeps(call.operation, options.space_pair(call.space, call.operation), gradient=of_x or of_y)
    return call.x.new_empty((*_batch(rest), numbers[number], count), dtype=torch.float64)


@torch.library.register_fake("klcore::merged", lib=operator.LIBRARY)
def _fake_merged(*arguments: Any) -> Any:
    *rest, _, _, states, _ = arguments
    return states.new_empty((*_batch(rest), cpu.STATS))


@torch.library.register_fake("klcore::value_of_stats", lib=operator.LIBRARY)
def _fake_value(*arguments: Any) -> Any:
    *rest, stats = arguments
    shape, dtype = kernels.value_like(operator.call_of(*rest))
    return stats.new_empty(shape, dtype=dtype)


def _keep(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    ctx.tensors = [k for k, a in enumerate(inputs) if isinstance(a, torch.Tensor)]
    ctx.save_for_backward(*(inputs[k] for k in ctx.tensors))
    ctx.others = [None if isinstance(a, torch.Tensor) else a for a in inputs]


def _backward(ctx: Any, cotangent: Any) -> tuple[Any, ...]:
    arguments = list(ctx.others)
    for k, t in zip(ctx.tensors, ctx.saved_tensors, strict=True):
        arguments[k] = t
    _, of_x, of_y, *rest = ctx.needs_input_grad
    dx, dy = torch.ops.klcore.gradients_of_stats.default(*arguments, cotangent, of_x, of_y)
    return (None, dx if of_x else None, dy if of_y else None, *[None] * len(rest))


torch.library.register_fake("klcore::gradients_of_stats", operator.fake_gradients, lib=operator.LIBRARY)
torch.library.register_autograd("klcore::value_of_stats", _backward, setup_context=_keep, lib=operator.LIBRARY)
torch.library.register_autograd("klcore::gradients_of_stats", autograd.refuse_second, lib=operator.LIBRARY)
