"""What JAX learns: two primitives, one that calls the engine, and its derivative, a linear function.

The adapter calls `value`. JAX differentiates it by `_jvp`. The gradients of a total come in the same pass as its value;
otherwise backward asks the engine for the cotangent-Jacobian product. `_tangent` is that derivative as one linear
operation, which JAX applies (jvp), transposes (grad) and batches (vmap). There are no second derivatives.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from klcore.backends import options
from klcore.backends.jax import partition, private
from klcore.backends.jax.programs import BY_CLASS, Program, call_back

Arrays = dict[str, Any]  # the arguments that are given, by their names in Call


def _refuse_second(program: Program) -> Any:
    raise NotImplementedError(
        f"klcore.{program.call.operation.function} has first derivatives only; second derivatives (jax.hessian, grad "
        "of grad) are not available"
    )


def _in_front(a: Any, at: int | None, size: int | None = None) -> Any:
    """Move the axis that vmap maps to the front; without one, add an axis of size 1, or of `size`."""
    if at is not None:
        return jnp.moveaxis(a, at, 0)
    return jnp.expand_dims(a, 0) if size is None else jnp.broadcast_to(a, (size, *a.shape))


def _mapped_size(arguments: Any, at: Any) -> int:
    return next(a.shape[d] for a, d in zip(arguments, at, strict=True) if d is not None)


# ---- the engine ------------------------------------------------------------------------------------------------------

_engine: Any = Primitive("klcore")
_engine.multiple_results = True
private.needs_devices(_engine)


def _run(*arguments: Any, program: Program) -> Any:
    with jax.disable_jit(False):  # the primitive can only run in compiled code
        return _compiled(program, *arguments)


@partial(jax.jit, static_argnums=0)
def _compiled(program: Program, *arguments: Any) -> Any:
    return _engine.bind(*arguments, program=program)


def _types(*arguments: Any, program: Program) -> Any:
    return [private.result(r.shape, r.dtype, arguments) for r in program.results(arguments)]


def _batch(arguments: Any, at: Any, *, program: Program) -> Any:
    found = _engine.bind(*map(_in_front, arguments, at), program=program)
    return found, [0] * len(found)


def _lower(context: Any, *arguments: Any, program: Program) -> Any:
    if private.for_export(context):
        raise NotImplementedError(
            f"klcore.{program.call.operation.function} cannot be exported by jax.export, because its programs call "
            "back into the process that made them. Export the function that computes its arguments instead, and call "
            "klcore on their values where you load it"
        )
    split = private.is_to_be_partitioned(context)
    alone: Any = partial(call_back, program, private.devices(context) > 1)
    function = partition.over_devices(program, context) if split else alone
    return mlir.lower_fun(function, multiple_results=True)(context, *arguments)


def _differentiate(primals: Any, tangents: Any, *, program: Program) -> Any:
    _refuse_second(program)


_engine.def_impl(_run)
_engine.def_abstract_eval(_types)
ad.primitive_jvps[_engine] = _differentiate
batching.primitive_batchers[_engine] = _batch
mlir.register_lowering(_engine, _lower)


def execute(program: Program, arrays: Arrays) -> Any:
    """The results of a program; within jax.shard_map they vary over devices as the arguments do."""
    found = _engine.bind(*arrays.values(), program=replace(program, names=tuple(arrays)))
    axes = frozenset[str]().union(*map(private.varying_axes, arrays.values()))
    return [private.varying(a, axes) for a in found]


# ---- its derivative --------------------------------------------------------------------------------------------------
#
# The arguments of _tangent: `result`, which has the type of the tangent; then arrays with the names `known`, either the
# gradients of a total, dx and dy, or the arguments of the program; then the tangents of the operands that
# `program.gradients` names.

_tangent: Any = Primitive("klcore_tangent")
_PARTS = {"x": "dx", "y": "dy"}


def _split(arguments: Any, known: tuple[str, ...]) -> tuple[Arrays, Any]:
    return dict(zip(known, arguments, strict=False)), arguments[len(known) :]


def _apply(result: Any, *arguments: Any, program: Program, known: tuple[str, ...], second: bool) -> Any:
    """Forward mode."""
    if second:
        _refuse_second(program)
    arrays, tangents = _split(arguments, known)
    named = dict(zip(program.gradients, tangents, strict=True))
    summed: tuple[int, ...] = tuple(range(-program.ndim, 0))
    if not program.total:
        arrays, named, summed = _by_row(program, arrays, named)
    elif "x" in arrays:
        arrays = _gradients(replace(program, pull=False), arrays)
    terms = [_times(arrays[_PARTS[name]].astype(result.dtype), t).sum(summed) for name, t in named.items()]
    return jnp.broadcast_to(sum(terms[1:], terms[0]), result.shape)


def _gradients(program: Program, arrays: Arrays) -> Arrays:
    found = execute(program, arrays)[0 if program.pull else 1 :]
    return {_PARTS[name]: a for name, a in zip(program.gradients, found, strict=True)}


def _by_row(program: Program, arrays: Arrays, tangents: Arrays) -> tuple[Arrays, Arrays, tuple[int, ...]]:
    """The derivatives of rows or terms with respect to their operands, the tangents, and the axes to sum over."""
    call, listed = program.call, "indices" in arrays
    if call.reduction == "none" and (listed or not all(program.spaces[name] in BY_CLASS for name in tangents)):
        of = "with indices" if listed else "of logits or counts"
        raise NotImplementedError(
            f"klcore.{call.operation.function} has no forward mode (jax.jvp, jax.linearize, jax.jacfwd) for "
            f"reduction='none' {of}, because every term depends on the whole row; use reduction='row', or jax.grad, "
            "jax.vjp or jax.jacrev"
        )
    whole = program.whole(arrays)
    spread = arrays | {name: jnp.broadcast_to(arrays[name], shape) for name, shape in whole.items()}
    count = len(whole["x"]) - program.ndim
    one = jnp.ones(whole["x"][:count] + program.shape, jnp.float32)
    pulled = _gradients(replace(program, pull=True), spread | {"cotangent": one})
    summed = () if call.reduction == "none" or call.operation.is_estimator else (call.axis,)
    rows_of = {name: jnp.broadcast_to(t, t.shape[:count] + whole[name][count:]) for name, t in tangents.items()}
    return pulled, rows_of, summed


def _transpose(cotangent: Any, result: Any, *arguments: Any, program: Program, known: Any, second: bool) -> Any:
    """Reverse mode."""
    arrays, tangents = _split(arguments, known)
    nothing = [None] * (1 + len(known))
    if isinstance(cotangent, ad.Zero):
        return [*nothing, *(None for _ in tangents)]
    if second:
        _refuse_second(program)
    if program.total and "x" not in arrays:
        found = [_times(arrays[_PARTS[name]], _under(cotangent, program)) for name in program.gradients]
    else:
        given = arrays | {"cotangent": cotangent}
        found = list(_gradients(replace(program, pull=True), given).values())
        if program.call.reduction != "row":  # the engine itself leaves out rows with a cotangent of 0
            zero, listed = _under(cotangent, program) == 0, "indices" in arrays
            found = [
                _left_out(program, name, listed, zero, g) for name, g in zip(program.gradients, found, strict=True)
            ]
    return [*nothing, *(g if isinstance(t, ad.UndefinedPrimal) else None for g, t in zip(found, tangents, strict=True))]


def _left_out(program: Program, name: str, listed: bool, zero: Any, g: Any) -> Any:
    """A gradient of totals or terms: 0 if all totals or terms that it belongs to have a cotangent of 0, even if their
    derivative is infinite."""
    of_row = not program.total and (listed or program.spaces[name] not in BY_CLASS)  # else a term has its own number
    if of_row:
        zero = zero.all(program.call.axis, keepdims=True)
    shapes = [program.with_classes(a.shape, 1) if of_row else a.shape for a in (zero, g)]
    return jnp.where(zero, 0, g) if program.total or shapes[0] == shapes[1] else g


def _under(cotangent: Any, program: Program) -> Any:
    """A cotangent of totals or terms, with as many axes as x."""
    count = cotangent.ndim - len(program.shape)
    return cotangent.reshape(cotangent.shape[:count] + (1,) * (program.ndim - len(program.shape)) + program.shape)


def _times(gradient: Any, factor: Any) -> Any:
    """The product in the dtype of the gradient; 0 if the factor is 0, even if the gradient is infinite."""
    return jnp.where(factor == 0, 0, factor.astype(gradient.dtype) * gradient)


def _type(result: Any, *arguments: Any, **parameters: Any) -> Any:
    return result


def _batch_tangent(arguments: Any, at: Any, *, known: tuple[str, ...], **parameters: Any) -> Any:
    size = _mapped_size(arguments, at)
    full = [size] + [None] * len(known) + [size] * (len(arguments) - 1 - len(known))
    return _tangent.bind(*map(_in_front, arguments, at, full), known=known, **parameters), 0


def _differentiate_tangent(primals: Any, tangents: Any, *, program: Program, known: Any, second: bool) -> Any:
    """It is linear in its tangents."""
    if not all(isinstance(t, ad.Zero) for t in tangents[1 : 1 + len(known)]):
        _refuse_second(program)
    moving = map(ad.instantiate_zeros, tangents[1 + len(known) :])
    bind = partial(_tangent.bind, program=program, known=known, second=second)
    return bind(*primals), bind(*primals[: 1 + len(known)], *moving)


_tangent.def_impl(_apply)
_tangent.def_abstract_eval(_type)
ad.primitive_jvps[_tangent] = _differentiate_tangent
ad.primitive_transposes[_tangent] = _transpose
batching.primitive_batchers[_tangent] = _batch_tangent
mlir.register_lowering(_tangent, mlir.lower_fun(_apply, multiple_results=False))


# ---- the two together ------------------------------------------------------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def value(program: Program, arrays: Arrays) -> Any:
    """The value and the gradients that `program` names."""
    return execute(program, arrays)


@partial(value.defjvp, symbolic_zeros=True)
def _jvp(program: Program, primals: Any, tangents: Any) -> Any:
    (arrays,), (given,) = primals, tangents
    moving = {name: t for name, t in given.items() if not isinstance(t, SymbolicZero)}
    function = program.call.operation.function
    if program.call.operation.name == "puzzlelib":
        raise NotImplementedError(
            "PuzzleLib's loss has no derivative, because it returns a direction of descent; use that direction, or "
            "klcore.kl_div"
        )
    for name in moving.keys() - {"x", "y", "temperature"}:
        raise NotImplementedError(
            f"klcore.{function} has no derivative with respect to {name}; pass jax.lax.stop_gradient({name})"
        )
    known = arrays
    if "temperature" in moving:
        known, moving = _by_temperature(program, arrays, moving)
    wanted = tuple(name for name in "xy" if name in moving)
    # The gradients of a total are computed in the same pass, and multiplied by its cotangent later. Not in 16 bits: the
    # cotangent, a loss scale, should save them from underflow, and would come too late.
    wide = all(arrays[name].dtype.itemsize > 2 for name in "xy" if name in arrays)
    one_pass = program.total and wide and all(known[name] is arrays[name] for name in wanted)
    names = tuple(name for name in "xy" if name in program.gradients or (one_pass and name in wanted))
    result, *gradients = value(replace(program, gradients=names), arrays)
    found = dict(zip(names, gradients, strict=True))
    results = [result, *(found[name] for name in program.gradients)]
    if one_pass:
        known = {_PARTS[name]: found[name] for name in wanted}
    derivative = partial(_tangent.bind, program=replace(program, gradients=wanted), known=tuple(known))
    read = *known.values(), *(moving[name] for name in wanted)
    return results, [derivative(r, *read, second=k > 0) for k, r in enumerate(results)]


def _by_temperature(program: Program, arrays: Arrays, moving: Arrays) -> tuple[Arrays, Arrays]:
    """The tangent of the temperature as a tangent of the logits: x / T changes by -x / T**2, as if x changed by -x / T.
    A constant added to all logits of a row changes nothing, so the largest logit may be subtracted first."""
    call = program.call
    t, dt = (jnp.expand_dims(a, call.axis) for a in (arrays["temperature"], moving["temperature"]))
    logits = [name for name, space in program.spaces.items() if name in arrays and space == options.LOGITS]
    spread = {name: jnp.broadcast_to(arrays[name], _whole(arrays[name], t)) for name in logits}
    moved = {name: moving[name] for name in "xy" if name in moving}
    for name, a in spread.items():
        if name == "x" and "indices" in arrays:  # the number at an index of -1 means nothing
            a = jnp.where(arrays["indices"] < 0, -jnp.inf, a)
        a = a if a.dtype.itemsize > 2 else a.astype(jnp.float32)
        greatest = jnp.max(a, call.axis, keepdims=True, where=jnp.isfinite(a), initial=-jnp.inf)
        share = (greatest - a) / t
        own = jnp.where(jnp.isfinite(share), share, 0) * dt  # excluded classes have gradient 0
        own = own.astype(spread[name].dtype)
        moved[name] = own + jnp.broadcast_to(moved[name], own.shape) if name in moved else own
    same = {name: arrays[name] for name in logits if spread[name].shape == arrays[name].shape}
    return arrays | spread | same, moved


def _whole(a: Any, t: Any) -> tuple[int, ...]:
    return jnp.broadcast_shapes(a.shape, t.shape)
