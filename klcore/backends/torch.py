"""PyTorch tensors: their memory is lent to klcore.backends.cpu or klcore.backends.cuda; autograd learns the gradient.

Nothing is copied, bfloat16 included. The operator ``torch.ops.klcore.value`` is what torch.compile, torch.export and
torch.func see; ordinary eager calls go through an autograd.Function instead, or, where no gradient is needed, straight
to the kernels: that takes a fifth of the operator's time on small tensors. On a GPU everything runs on PyTorch's
current stream, and results are PyTorch's own memory. First derivatives only, but for the term of PyTorch itself, whose
second ones are PyTorch's.
"""

import contextlib
import importlib
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from klcore.backends import BackendUnavailableError, cpu, labels, rows
from klcore.operations import LOSSES, OPERATIONS, Call

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HALVES = ("float16", "bfloat16")
_NUMBERS = (bool, int, float, complex, list, tuple)


# ---- memory ----------------------------------------------------------------------------------------------------------


def _bfloat16() -> Any:
    try:
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError as error:
        raise BackendUnavailableError(
            "bfloat16 tensors need the package ml_dtypes, which cannot be imported; install it with: "
            "pip install 'klcore[bfloat16]'"
        ) from error


def _lend(t: Any) -> Any:
    """The tensor's memory as a NumPy or CuPy array; anything that is no tensor as it is."""
    if not isinstance(t, torch.Tensor):
        return t
    t = t.detach()
    if t.is_cuda:
        cupy, t, size = _cuda().ready(), t.resolve_neg(), t.element_size()
        memory = cupy.cuda.UnownedMemory(t.data_ptr(), t.numel() * size, t, t.get_device())
        strides = tuple(size * step for step in t.stride())
        return cupy.ndarray(tuple(t.shape), _numpy_dtype(t.dtype), cupy.cuda.MemoryPointer(memory, 0), strides)
    if t.dtype is torch.bfloat16:
        return _lend(t.view(torch.int16)).view(_bfloat16())
    try:
        return t.numpy()
    except RuntimeError:
        if t.is_nested:
            raise TypeError("klcore takes dense tensors, found a nested one; pass x.to_padded_tensor(value)") from None
        # else the imaginary part of a conjugate: memory that is to be read negated
        return t.resolve_neg().numpy()


@cache
def _numpy_dtype(dtype: torch.dtype) -> Any:
    return _bfloat16() if dtype is torch.bfloat16 else np.dtype(str(dtype).removeprefix("torch."))


def _cuda() -> Any:
    return importlib.import_module("klcore.backends.cuda")


def _tensor(a: Any) -> Any:
    """The same the other way, of what the CPU returned."""
    a = np.asarray(a)
    if a.dtype.kind == "V":
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


class _Writable:
    """An array's memory as if it could be written to: PyTorch knows no other, and warns. Nobody writes to arguments."""

    def __init__(self, a: Any) -> None:
        self._owner = a
        self.__array_interface__ = {**a.__array_interface__, "data": (a.ctypes.data, False)}


def _lent_by(a: Any, name: str) -> Any:
    """A tensor on the memory of a NumPy array, or of what NumPy makes one of; a copy where PyTorch has no such strides,
    dtype or byte order."""
    a = cpu._asarray(a, name)
    if any(step < 0 or step % a.dtype.itemsize for step in a.strides):
        a = a.copy()
    if not a.flags.writeable:
        a = a.view(np.int16) if a.dtype.kind == "V" else a
        t = torch.from_numpy(np.asarray(_Writable(a)))
        return t.view(torch.bfloat16) if t.dtype is torch.int16 else t
    return _tensor(a)


@contextlib.contextmanager
def _as_pytorch(x: Any) -> Any:
    """Compute on PyTorch's current stream of the device of `x`, and take all memory from PyTorch: a CUDA graph that
    PyTorch captures owns what is allocated meanwhile, which CuPy's pool would lend to others."""

    def allocate(nbytes: int) -> Any:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=x.device)
        owned = cupy.cuda.UnownedMemory(memory.data_ptr(), nbytes, memory, x.get_device())
        return cupy.cuda.MemoryPointer(owned, 0)

    stream = torch.cuda.current_stream(x.device).cuda_stream
    with _cuda().on_stream(x.get_device(), stream) as cupy, cupy.cuda.using_allocator(allocate):
        yield


def _check(t: Any, name: str) -> None:
    if t.is_nested:
        raise TypeError(f"{name} is a nested tensor; klcore takes dense ones: pass {name}.to_padded_tensor(value)")
    if t.layout is not torch.strided:
        raise TypeError(f"{name} is a tensor of layout {t.layout}; klcore takes dense ones: pass {name}.to_dense()")
    if t.is_quantized:
        raise TypeError(f"{name} is a quantized tensor; pass {name}.dequantize()")
    if t.dtype not in _FLOATS and (t.dtype.is_complex or t.dtype.is_floating_point):  # those of 8 bits
        raise TypeError(
            f"{name} has dtype {t.dtype}; klcore computes with {', '.join(rows.FLOATS)}, and with integers and "
            "booleans as float64"
        )
    if t.device.type not in ("cpu", "cuda", "meta"):
        raise TypeError(
            f"{name} is on the device {str(t.device)!r}, and klcore computes on 'cpu' and 'cuda'; move it with "
            f"{name}.to('cpu')"
        )


def _operands(x: Any, y: Any, device: str | None) -> tuple[Any, Any]:
    """x and y as tensors on one device; y may be None."""
    if device is None and _is_ordinary(x) and (y is None or _is_ordinary(y)):
        return x, y
    for name, t in (("x", x), ("y", y)):
        if isinstance(t, torch.Tensor):
            _check(t, name)
        elif type(t).__module__.partition(".")[0] == "torch":
            raise TypeError(
                f"{name} is a {type(t).__module__}.{type(t).__qualname__}; klcore takes tensors, NumPy arrays, and "
                "numbers, lists and tuples"
            )
    found = next((t.device for t in (x, y) if isinstance(t, torch.Tensor)), torch.device("cpu"))
    where = found if device is None else _named(device)
    for name, t in (("x", x), ("y", y)):
        if where.type == "cuda" and device is None and not isinstance(t, (torch.Tensor, *_NUMBERS, type(None))):
            raise TypeError(
                f"{name} is a {type(t).__module__}.{type(t).__qualname__}, in the host's memory, and the other "
                f"argument a tensor on {where}; move one of them, as with torch.asarray({name}, "
                f"device={str(where)!r}), or pass device= to have klcore do it"
            )
    return _on(where, x, "x", device), _on(where, y, "y", device)


def _named(device: str) -> Any:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"device={device!r}: PyTorch finds no usable CUDA device (torch.cuda.is_available() is False)"
        )
    number = device.partition(":")[2]
    if number and int(number) >= torch.cuda.device_count():
        raise BackendUnavailableError(f"device={device!r}: PyTorch finds {torch.cuda.device_count()} CUDA device(s)")
    return torch.device(device)


def _on(where: Any, t: Any, name: str, device: str | None) -> Any:
    """A tensor that is there, or may be moved there because a device is named; lists and numbers become one."""
    if t is None or not isinstance(t, torch.Tensor):
        return None if t is None else _number(t, name, where)
    if t.device != where:
        if device is None:
            raise ValueError(
                f"the tensors are on different devices (x on {where}, {name} on {t.device}); move one of them"
            )
        t = t.to(where)
    return t


def _is_ordinary(t: Any) -> bool:
    return type(t) in _PLAIN and t.is_cpu and t.dtype in _FLOATS and t.layout is torch.strided


def _number(a: Any, name: str, device: Any) -> Any:
    """Lists, numbers and other libraries' arrays, understood and refused as NumPy's are."""
    if torch.compiler.is_compiling() and isinstance(a, _NUMBERS):
        return torch.as_tensor(a, dtype=torch.float64, device=device)
    if torch.compiler.is_compiling() and isinstance(a, np.ndarray) and not isinstance(a, np.ma.MaskedArray):
        return torch.as_tensor(a, device=device)
    return _lent_by(a, name).to(device)


def _weights(weights: Any, like: Any, device: str | None, name: str = "weights") -> Any:
    if weights is None or (_is_ordinary(weights) and like.is_cpu and not weights.requires_grad):
        return weights
    if isinstance(weights, torch.Tensor):
        _check(weights, name)
        if weights.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{name} must not require a gradient: klcore gives none with respect to {name}; pass {name}.detach(), "
                'or multiply the values of reduction="row" by them'
            )
    return _on(like.device, weights, name, device)


# ---- what the operator computes --------------------------------------------------------------------------------------


def _value_like(call: Call) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a value."""
    x, y, shape = call.x, call.y, call.x.shape
    if y is not None and y.shape != shape:
        try:
            shape = torch.broadcast_shapes(shape, y.shape)
        except RuntimeError:
            raise rows.batches_differ(x, y, call.axis) from None
    dtype = None if call.dtype is None else getattr(torch, call.dtype)
    if dtype is None:
        wide = [t.dtype not in _FLOATS[1:] for t in ((x,) if y is None else (x, y))]
        dtype = torch.float64 if any(wide) else torch.float32
    if call.reduction == "none":
        return tuple(shape), dtype
    if call.reduction != "row" or not shape:
        return (), dtype
    axis = call.axis % len(shape)
    return (*shape[:axis], *shape[axis + 1 :]), dtype


def _like(t: Any) -> Any:
    """Memory for a gradient; integers were taken as float64."""
    return torch.empty_like(t.detach(), dtype=t.dtype if t.dtype in _FLOATS else torch.float64)


def _lent(call: Call) -> Call:
    """The call of the kernels' library."""
    if call.dtype == "bfloat16":
        _bfloat16()  # or what to install
    weights, out, cotangent = call.weights, call.out, call.cotangent
    if out is not None:
        out = tuple(map(_lend, out)) if isinstance(out, tuple) else _lend(out)
    return Call(  # in half of the time that _replace takes
        call.operation, _lend(call.x), _lend(call.y), call.space, call.axis, call.reduction,
        None if weights is None else _lend(weights), call.temperature, call.return_grad, out, None, call.denominator,
        call.epsilon, call.dtype, None if cotangent is None else _lend(cotangent),
    )  # fmt: skip


def _compute(call: Call) -> Any:
    """What the contract says, as tensors without history."""
    if call.x.is_cpu:
        found = cpu.compute(_lent(call))
        return tuple(map(_tensor, found)) if isinstance(found, tuple) else _tensor(found)
    outs = tuple(_outs(call))
    with _as_pytorch(call.x):
        _cuda().compute(_lent(call._replace(out=outs)))
    return outs if call.return_grad is not None else outs[0]


def _outs(call: Call) -> list[Any]:
    """New tensors for the results of a call, whose words are checked."""
    wanted = rows.words(call)[2]
    if not call.operation.is_loss:
        rows.class_axis(call.x, call.y, call.axis)
    gradients = [_like(call.x if of == "x" else call.y) for of in wanted]
    if call.cotangent is not None:
        return gradients
    shape, dtype = _value_like(call)
    return [torch.empty(shape, dtype=dtype, device=call.x.device), *gradients]


# ---- the operator ----------------------------------------------------------------------------------------------------

_ARGUMENTS = (
    "str operation, Tensor x, Tensor? y, str space_x, str space_y, int axis, str reduction, Tensor? weights, "
    "float temperature, Scalar denominator, float epsilon"
)
_library = torch.library.Library("klcore", "DEF")
_library.define(f"value({_ARGUMENTS}, ScalarType? dtype) -> Tensor")
_library.define(f"gradients({_ARGUMENTS}, Tensor cotangent, bool of_x, bool of_y) -> (Tensor, Tensor)")


def _call(
    operation: str, x: Any, y: Any, space_x: str, space_y: str, axis: int, reduction: str, weights: Any,
    temperature: float, denominator: float, epsilon: float,
) -> Call:  # fmt: skip
    """The call that the operator's arguments stand for."""
    space = space_x if space_x == space_y else (space_x, space_y)
    found = OPERATIONS.get(operation) or LOSSES[operation]
    space = (space_x, space_y) if found.is_loss else space
    return Call(found, x, y, space, axis, reduction, weights, temperature, denominator=denominator, epsilon=epsilon)


def _arguments(call: Call) -> tuple[Any, ...]:
    """The operator's arguments for a call."""
    space_x, space_y = (call.space, call.space) if isinstance(call.space, str) else call.space
    return (
        call.operation.name, call.x, call.y, space_x, space_y, call.axis, call.reduction, call.weights,
        call.temperature, call.denominator, call.epsilon,
    )  # fmt: skip


def _value(*arguments: Any) -> Any:
    *rest, dtype = arguments
    return _compute(_call(*rest)._replace(dtype=_dtype_name(dtype)))


def _dtype_name(dtype: Any) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _both_gradients(*arguments: Any) -> tuple[Any, Any]:
    """An empty tensor for one that is not wanted."""
    *rest, cotangent, of_x, of_y = arguments
    call = _call(*rest)._replace(cotangent=cotangent, return_grad=_names(of_x, of_y))
    found = _compute(call)
    return (
        _laid_out_like(call.x, found[0]) if of_x else call.x.new_empty(0),
        _laid_out_like(call.y, found[-1]) if of_y else call.x.new_empty(0),
    )


def _laid_out_like(t: Any, found: Any) -> Any:
    """What the compiler relies on: for views with gaps or steps of 0 NumPy would choose other strides than PyTorch."""
    promised = _like(t)
    return found if found.stride() == promised.stride() else promised.copy_(found)


def _names(of_x: bool, of_y: bool) -> tuple[str, ...]:
    return ("x",) * of_x + ("y",) * of_y


def _setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    call = _call(*inputs[:-1])
    ctx.save_for_backward(call.x, call.y, call.weights)
    ctx.call = call._replace(x=None, y=None, weights=None)


def _operator(name: str) -> Any:
    """What tracing and transforming see. torch.func differentiates a Function, but no operator (torch 2.13), and only a
    Function notices a tangent."""
    transformed = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
    if transformed or forward_ad._current_level >= 0:
        return (_TransformedValue if name == "value" else _TransformedGradients).apply
    return getattr(torch.ops.klcore, name).default


def _is_batched(cotangent: Any) -> bool:
    """Several at once, as torch.autograd.grad(is_grads_batched=True) hands them over."""
    return torch._C._functorch.is_legacy_batchedtensor(cotangent)


def _backward(ctx: Any, cotangent: Any) -> tuple[Any, ...]:
    x, y, weights = ctx.saved_tensors
    call = ctx.call._replace(x=x, y=y, weights=weights)
    _, of_x, of_y, *_ = ctx.needs_input_grad
    if torch.is_grad_enabled() or not _eager(x, cotangent) or _is_batched(cotangent):
        # the operator keeps the history that a second derivative needs, or refuses one
        dx, dy = _operator("gradients")(*_arguments(call), cotangent, of_x, of_y)
    else:
        found = _compute(call._replace(cotangent=cotangent, return_grad=_names(of_x, of_y)))
        dx, dy = found[0], found[-1]
    return (None, dx if of_x else None, dy if of_y else None, *[None] * 9)


def _setup_second(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    *rest, cotangent, of_x, of_y = inputs
    call = _call(*rest)
    ctx.save_for_backward(call.x, call.y, call.weights, cotangent)
    ctx.call, ctx.wants = call._replace(x=None, y=None, weights=None), (of_x, of_y)


def _backward_second(ctx: Any, of_dx: Any, of_dy: Any) -> tuple[Any, ...]:
    call, (wants_x, wants_y) = ctx.call, ctx.wants
    if call.operation.name != "pytorch":
        raise RuntimeError(
            "klcore gives first derivatives of its divergences, and this asks for a second one (create_graph=True, or "
            "a gradient of a gradient)"
        )
    x, y, factors, cotangent = (t if t is None or torch.is_grad_enabled() else t.detach() for t in ctx.saved_tensors)

    def value(x: Any, y: Any) -> Any:  # PyTorch's own loss, in the precision of klcore's
        wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        terms = torch.nn.functional.kl_div(
            y.to(wide), x.to(wide), reduction="none", log_target=call.space[0] == "log_probs"
        )
        terms = terms if factors is None else terms * factors
        if call.reduction != "none" and terms.ndim:
            terms = terms.sum(call.axis) if call.reduction == "row" else terms.sum()
        return (terms / call.denominator).to(cotangent.dtype)

    def first(x: Any, y: Any, cotangent: Any) -> Any:
        of_x, of_y = torch.func.vjp(value, x, y)[1](cotangent)
        return (of_x,) * wants_x + (of_y,) * wants_y

    with torch.enable_grad():
        second = torch.func.vjp(first, x, y, cotangent)[1]((of_dx,) * wants_x + (of_dy,) * wants_y)
    return (None, second[0], second[1], *[None] * 8, second[2], None, None)


_library.impl("value", _value, "CompositeExplicitAutograd")
_library.impl("gradients", _both_gradients, "CompositeExplicitAutograd")
torch.library.register_autograd("klcore::value", _backward, setup_context=_setup, lib=_library)
torch.library.register_autograd("klcore::gradients", _backward_second, setup_context=_setup_second, lib=_library)


@torch.library.register_fake("klcore::value", lib=_library)
def _fake_value(*arguments: Any) -> Any:
    *rest, dtype = arguments
    call = _call(*rest)._replace(dtype=_dtype_name(dtype))
    shape, of_value = _value_like(call)
    return call.x.new_empty(shape, dtype=of_value)


@torch.library.register_fake("klcore::gradients", lib=_library)
def _fake_gradients(*arguments: Any) -> tuple[Any, Any]:
    _, x, y, *_, of_x, of_y = arguments
    return _like(x) if of_x else x.new_empty(0), _like(y) if of_y else x.new_empty(0)


class _Value(torch.autograd.Function):
    """The operator, for eager calls: PyTorch takes less time to call this, and it is told beforehand which gradients
    will be wanted. Those of a total then come in the same pass, and are multiplied by its cotangent afterwards. (Not
    those of 16 bits: what the cotangent, a loss scale, is to save from underflow would be lost by then.)"""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        _setup(ctx, arguments, None)
        *rest, dtype = arguments
        call = _call(*rest)._replace(dtype=_dtype_name(dtype))
        ctx.unit, y = None, call.y
        if call.reduction in ("row", "none") or call.x.dtype.itemsize < 4 or (y is not None and y.dtype.itemsize < 4):
            return _compute(call)
        value, *ctx.unit = _compute(call._replace(return_grad=_names(*ctx.needs_input_grad[1:3])))
        return value

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (cotangent,) = cotangents
        unit, ctx.unit = ctx.unit, None  # ours to give away, once
        if unit is None or torch.is_grad_enabled() or not _eager(cotangent) or _is_batched(cotangent):
            return _backward(ctx, cotangent)
        if not cotangent.is_cpu or cotangent != 1:
            unit = [g.mul_(cotangent) for g in unit]
        _, of_x, of_y, *_ = ctx.needs_input_grad
        return (None, unit[0] if of_x else None, unit[-1] if of_y else None, *[None] * 9)


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


# for vmap within torch.compile
torch.library.register_vmap("klcore::value", partial(_values, torch.ops.klcore.value.default), lib=_library)
torch.library.register_vmap("klcore::gradients", partial(_pairs, torch.ops.klcore.gradients.default), lib=_library)


def _eager(*tensors: Any) -> bool:
    """Whether these are tensors with memory, and nobody is tracing or transforming what is done with them."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()  # torch.jit.trace, which would keep the numbers
        and all(t is None or type(t) in _PLAIN for t in tensors)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not tensors[0].is_meta
        and forward_ad._current_level < 0
    )


# ---- the contract ----------------------------------------------------------------------------------------------------


def compute(call: Call) -> Any:
    given = call.x, call.y, call.weights
    x, y = _operands(*given[:2], call.device)
    if call.operation.name == "puzzlelib":  # its gradient is none: autograd would descend where it should ascend
        x, y = x.detach(), y.detach()
    weights = _weights(given[2], x, call.device, "factors" if call.operation.is_loss else "weights")
    as_given = x is given[0] and y is given[1] and weights is given[2]
    if not as_given and not torch.compiler.is_compiling() and labels.are_there(*given):
        labels.check(rows.class_axis(x, y, call.axis), *given)
    if not as_given and _needs_grad(x, y):  # a NumPy array may change before backward looks at it again
        x, y, weights = (
            t if t is a or t is None or isinstance(a, torch.Tensor) else t.clone()
            for t, a in zip((x, y, weights), given, strict=True)
        )
    if isinstance(call.temperature, torch.Tensor):
        if call.temperature.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                "temperature requires a gradient, and klcore gives none with respect to it; divide the logits by it "
                "instead"
            )
        call = call._replace(temperature=call.temperature.detach())
    of_value = call.dtype
    if call.operation.name == "pytorch" and of_value in _HALVES and torch.is_autocast_enabled(x.device.type):
        of_value = "float32"  # autocast has PyTorch's own loss compute in it
    if not as_given or call.device is not None or of_value is not call.dtype:
        call = call._replace(x=x, y=y, weights=weights, device=None, dtype=of_value)
    return _history_or_not(call) if call.out is None else _into(call)


def _history_or_not(call: Call) -> Any:
    x, y, weights = call.x, call.y, call.weights
    eager = _eager(x, y, weights)
    if eager and isinstance(call.temperature, torch.Tensor) and call.temperature.numel() == 1:
        call = call._replace(temperature=float(call.temperature))  # that of now: backward comes later
    if eager and (call.return_grad is not None or not _needs_grad(x, y)):
        return _compute(call)
    rows.check_reduction(call.reduction)
    rows.space_pair(call.space, call.operation)
    wanted: tuple[str, ...] = ()
    if not eager:
        _, temperature, wanted = rows.words(call)
        axis = call.axis if call.operation.is_loss else rows.class_axis(x, y, call.axis)
        call = call._replace(temperature=temperature, axis=axis)
    dtype = None if call.dtype is None else getattr(torch, call.dtype)
    if call.return_grad is None:
        return (_Value.apply if eager else _operator("value"))(*_arguments(call), dtype)
    call = call._replace(x=x.detach(), y=None if y is None else y.detach())
    value = _operator("value")(*_arguments(call), dtype)
    if call.reduction in ("row", "none"):  # of the sum of what is returned
        call = call._replace(reduction="sum")
    both = _operator("gradients")(*_arguments(call), value.new_ones(()), "x" in wanted, "y" in wanted)
    return (value, *(g for name, g in zip("xy", both, strict=True) if name in wanted))


def _needs_grad(x: Any, y: Any) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (y is not None and y.requires_grad))


def _into(call: Call) -> Any:
    """The same, into tensors of the caller's."""
    x, y, weights, out = call.x, call.y, call.weights, call.out
    if _needs_grad(x, y):
        raise TypeError(
            "out= has no place in autograd's history, and an argument requires a gradient; leave out= away, or detach "
            "the arguments, or compute within torch.no_grad()"
        )
    outs = list(out) if isinstance(out, tuple) else [out]
    for t in outs:
        if t is not None and not (isinstance(t, torch.Tensor) and t.device == x.device):
            found = f"one on {t.device}" if isinstance(t, torch.Tensor) else type(t).__name__
            raise TypeError(f"out must be a tensor on {x.device}, or a tuple of such; found {found}")
        if t is not None:
            _check(t, "out")
            if rows.shares_with_itself(t.shape, t.stride(), 1):
                raise ValueError("out is a view whose elements share memory; pass a tensor of its own")
            if t.requires_grad and torch.is_grad_enabled():
                raise TypeError("out requires a gradient, and its history would not know of the call; pass another")
    if not _eager(x, y, weights, *outs) or any(t is not None and t.is_neg() for t in outs):
        return _copied(_history_or_not(call._replace(out=None)), out, outs)
    if not x.is_cpu:  # all results are to be PyTorch's own memory
        new = _outs(call)
        given = rows.results_in(out, ("",) * (len(new) - 1))
        outs = [b if a is None else a for a, b in zip(given, new, strict=True)]
        out = tuple(outs)
    with contextlib.nullcontext() if x.is_cpu else _as_pytorch(x):
        results = (cpu if x.is_cpu else _cuda()).compute(_lent(call._replace(out=out)))
    results = results if isinstance(results, tuple) else (results,)
    outs += [None] * (len(results) - len(outs))
    kept = tuple(_tensor(a) if t is None else t for a, t in zip(results, outs, strict=True))
    torch.autograd.graph.increment_version([t for t in outs if t is not None])  # who saved one for backward, is told
    return kept if call.return_grad is not None else kept[0]


def _copied(found: Any, out: Any, outs: list[Any]) -> Any:
    """What was computed elsewhere, into the tensors given."""
    results = found if isinstance(found, tuple) else (found,)
    if isinstance(out, tuple) and len(out) != len(results):
        raise ValueError(f"out must be a tuple of {len(results)} (value, then gradients); found a tuple of {len(out)}")
    for r, t in zip(results, outs, strict=False):
        if t is not None and (t.shape, t.dtype) != (r.shape, r.dtype):
            raise ValueError(
                f"out must have the shape {tuple(r.shape)} and the dtype {r.dtype}; found {tuple(t.shape)}, {t.dtype}"
            )
    outs = outs + [None] * (len(results) - len(outs))
    kept = tuple(r if t is None else t.copy_(r) for r, t in zip(results, outs, strict=True))
    return kept if isinstance(found, tuple) else kept[0]
