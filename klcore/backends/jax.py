"""JAX arrays: their memory is lent to klcore.backends.cpu or cuda, and JAX is taught the gradients; no formulas here.

A call, traced or not, is one call from compiled code back to Python (``jax.experimental.buffer_callback``, an XLA FFI
handler that comes with jaxlib), which gets the buffers of arguments and results as they lie in memory: NumPy views on
the CPU, CuPy views and XLA's stream on an NVIDIA GPU. Nothing is copied, but results of a few kilobytes. The callback
never calls JAX, so it cannot wait for a thread that waits for it, as one that is handed JAX arrays may
(``jax.pure_callback``). Which device computes is decided where the program is compiled for one: a program for CUDA runs
the CUDA kernels, one for a TPU is refused by JAX, nothing is moved unasked.

Concrete arrays take the same way, through a ``jax.jit`` that keeps a program for each shape and each choice of words,
as JAX's own functions do; but where the CPU is JAX' only device large ones are computed at once, as NumPy's are.
Programs run in the calling thread or in one of XLA's, where ``klcore.set_num_threads`` holds and ``klcore.threads``,
which is of the caller's thread, does not; what a signal handler raises within one, JAX makes an error of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.experimental.buffer_callback import buffer_callback

from klcore.backends import BackendUnavailableError, cpu, labels, rows
from klcore.operations import Call

_DTYPES = frozenset(jnp.dtype(name) for name in rows.FLOATS)
_ON_CPU = 1  # kDLCPU
_SMALL = 1 << 16  # bytes of results, which are copied in less time than klcore takes to look at `out`


@dataclass(frozen=True)
class _Program:
    """What to compute, as compiled code refers to it: equal ones are equal objects, so that JAX compiles them once."""

    call: Call  # without arrays; its axis counted from the end, which vmap leaves alone: it puts its axes in front
    ndim: int  # of x and y
    shape: tuple[int, ...]  # of the value
    dtype: Any
    gradients: tuple[str, ...] = ()
    pull: bool = False  # the gradients only, of sum(cotangent * value)

    @property
    def total(self) -> bool:
        return self.call.reduction not in ("row", "none")

    def results(self, x: Any, y: Any) -> tuple[Any, ...]:
        """Shapes and dtypes of what is computed."""
        result: Any = jax.ShapeDtypeStruct
        value = () if self.pull else (result(self.shape, self.dtype),)
        operands = {"x": x, "y": y}
        return *value, *(result(operands[name].shape, operands[name].dtype) for name in self.gradients)

    def __call__(self, context: Any, out: Any, *arguments: Any) -> None:
        """Called by XLA, where it runs: compute `out` from the arguments of `_execute`, all of them buffers."""
        kind, number = arguments[0].__dlpack_device__()
        if kind == _ON_CPU:
            self._on(cpu, np, np.asarray, out, arguments)
            return
        cuda = import_module("klcore.backends.cuda")
        with cuda.on_stream(number, context.stream) as cupy:
            self._on(cuda, cupy, cupy.from_dlpack, out, arguments)

    def _on(self, backend: Any, xp: Any, lend: Callable[[Any], Any], out: Any, arguments: Any) -> None:
        results = [lend(o) for o in out]
        arrays = [None if a is None else lend(a) for a in arguments]
        count = results[0].ndim - (self.ndim if self.pull else len(self.shape))
        if count == 0:
            self._compute(backend, results, *arrays)
            return
        # the axes that vmap has put in front: of the size 1 where an argument is not mapped
        mapped = results[0].shape[:count]
        arrays = [None if a is None else xp.broadcast_to(a, mapped + a.shape[count:]) for a in arrays]
        if self.total:  # one for each mapped example
            for i in np.ndindex(mapped):
                at = (*i, ...)
                self._compute(backend, [r[at] for r in results], *(a if a is None else a[at] for a in arrays))
        else:  # more rows
            self._compute(backend, results, *arrays)

    def _compute(
        self, backend: Any, out: list[Any], x: Any, y: Any, weights: Any, ratio: Any, divisor: Any, cotangent: Any
    ) -> None:
        call = self.call if divisor is None else self.call._replace(denominator=_denominator(divisor))
        to: Any = tuple(out) if sum(o.nbytes for o in out) > _SMALL else None
        results = backend.compute(
            call._replace(
                x=x, y=y, weights=weights, ratio=ratio, cotangent=cotangent, return_grad=self.gradients or None, out=to
            )
        )
        for o, result in zip(out, results if self.gradients else (results,), strict=True):
            if result is not o:
                o[...] = result


# ---- what JAX knows of it --------------------------------------------------------------------------------------------


def _divisor(call: Call) -> Any:
    """The denominator as an argument of a program, which is then one for all numbers: what is not JAX' own as the bits
    of a float64, which JAX itself may not have."""
    if isinstance(call.denominator, jax.Array) and _platform(call.denominator) != "cpu":  # not waited for
        return call.denominator
    if call.denominator is None:
        return None
    return np.array([rows.denominator_of(call)]).view(np.uint32)


def _denominator(divisor: Any) -> Any:
    """What it was."""
    d = divisor.view(np.float64)[0] if divisor.ndim else divisor
    return float(d) if isinstance(d, (np.ndarray, np.generic)) else d


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _execute(program: _Program, x: Any, y: Any, weights: Any, ratio: Any, divisor: Any, cotangent: Any) -> Any:
    call = buffer_callback(program, program.results(x, y), vmap_method="expand_dims")
    return call(x, y, weights, ratio, divisor, cotangent)


@_execute.defjvp
def _no_second_derivative(program: _Program, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        f"klcore.{program.call.operation.function} has first derivatives only; second ones (jax.hessian, grad of grad) "
        "are not available"
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _value(program: _Program, x: Any, y: Any, weights: Any, ratio: Any, divisor: Any) -> Any:
    """The value and the gradients that `program` names."""
    return _execute(program, x, y, weights, ratio, divisor, None)


def _forward(program: _Program, x: Any, y: Any, weights: Any, ratio: Any, divisor: Any) -> Any:
    if program.call.operation.name == "puzzlelib":
        raise NotImplementedError(
            "PuzzleLib's loss returns a direction of descent, which is not its derivative; use that, or klcore.kl_div"
        )
    for name, a in (("weights", weights), ("ratio", ratio), ("denominator", divisor)):
        if a is not None and a.perturbed:
            raise NotImplementedError(
                f"klcore.{program.call.operation.function} has no derivative with respect to {name}; pass "
                f"jax.lax.stop_gradient({name})"
            )
    wanted = tuple(name for name, a in (("x", x), ("y", y)) if a is not None and a.perturbed)
    arguments = tuple(None if a is None else a.value for a in (x, y, weights, ratio, divisor))
    x, y, *_ = arguments
    # The gradients of a total come in the same pass, and are multiplied by its cotangent afterwards. Not so those of 16
    # bits: what the cotangent (a loss scale) is to save from underflow would be lost by then.
    if program.total and all(a is None or a.dtype.itemsize > 2 for a in (x, y)):
        both = tuple(name for name in "xy" if name in wanted or name in program.gradients)
        value, *gradients = _execute(replace(program, gradients=both), *arguments, None)
        found = dict(zip(both, gradients, strict=True))
        return (value, *(found[name] for name in program.gradients)), ({name: found[name] for name in wanted}, None)
    # what is kept has to be arrays, but for the keys
    return _execute(program, *arguments, None), (dict.fromkeys(wanted), arguments)


def _backward(program: _Program, kept: Any, cotangents: Any) -> Any:
    found, arguments = kept
    cotangent, *others = cotangents
    if not all(isinstance(other, SymbolicZero) for other in others):
        _no_second_derivative(program, None, None)
    if isinstance(cotangent, SymbolicZero):
        return (None,) * 5
    if arguments is None:
        found = {name: cotangent.astype(gradient.dtype) * gradient for name, gradient in found.items()}
    else:
        gradients = _execute(replace(program, gradients=tuple(found), pull=True), *arguments, cotangent)
        found = dict(zip(found, gradients, strict=True))
    return found.get("x"), found.get("y"), None, None, None


_value.defvjp(_forward, _backward, symbolic_zeros=True)


# ---- the contract of a backend ---------------------------------------------------------------------------------------


def _stand_in(a: Any) -> Any:
    """An array of NumPy's of the shape and dtype, of no size in memory."""
    return None if a is None else np.broadcast_to(np.ones((), a.dtype), a.shape)


def _arranged(call: Call, x: Any, y: Any, weights: Any, ratio: Any = None) -> rows.Task:
    """A call's arguments, checked as those of NumPy arrays are."""

    def asis(a: Any, name: str) -> Any:
        return a

    return rows.arrange(np, asis, call._replace(x=x, y=y, weights=weights, ratio=ratio))


@partial(jax.jit, static_argnums=0)
def _compute(call: Call, x: Any, y: Any, weights: Any, ratio: Any, divisor: Any) -> tuple[Any, ...]:
    """The value and the gradients asked for; what is wrong with the arguments is raised while JAX traces this."""
    task = _arranged(call, *(_stand_in(a) for a in (x, y, weights, ratio)))
    shape = () if task.output == rows.TOTAL else task.value.shape
    least = 0 if call.operation.is_estimator else 1
    ndim = max(least, x.ndim, 0 if y is None else y.ndim)
    # vmap puts axes in front: those that broadcast have to be there already. A number is one class.
    a, b = (None if v is None else v.reshape((1,) * (ndim - v.ndim) + v.shape) for v in (x, y))
    of_rows = ndim if call.operation.is_loss or call.operation.is_estimator else ndim - 1
    weights, ratio = (None if v is None else v.reshape((1,) * (of_rows - v.ndim) + v.shape) for v in (weights, ratio))
    value_shape = (1,) if call.reduction == "none" and not shape else shape
    of_value = jax.dtypes.canonicalize_dtype(task.scalar_dtype)
    axis = call.axis if call.axis < 0 else call.axis - ndim
    # the value's dtype is what JAX has, of a loss and a row of integers alike
    of_call = call._replace(axis=axis, dtype=of_value.name if call.operation.is_loss else None)
    wanted = tuple(g.of for g in task.gradients)
    value, *gradients = _value(_Program(of_call, ndim, value_shape, of_value, wanted), a, b, weights, ratio, divisor)
    shapes = {"x": x.shape, "y": None if y is None else y.shape}
    return value.reshape(shape), *(g.reshape(shapes[n]) for n, g in zip(wanted, gradients, strict=True))


def _array(a: Any, name: str) -> Any:
    """A JAX array of one of klcore's dtypes. Integers become JAX's own float: float64 only if jax_enable_x64 is set."""
    if isinstance(a, jax.Array) and a.dtype in _DTYPES:
        return a
    if not isinstance(a, jax.Array) and not _holds_jax(a):
        a = rows.as_numpy(a, name)
        rows.refuse(a, name)
        a = a if a.dtype.isnative else a.astype(a.dtype.newbyteorder("="))
    with jax.ensure_compile_time_eval():  # numbers stay known while JAX traces, so that weights can be checked
        a = jnp.asarray(a)
        if jnp.issubdtype(a.dtype, jax.dtypes.extended):
            raise TypeError(f"{name} has dtype {a.dtype}; klcore computes with {', '.join(rows.FLOATS)} and integers")
        rows.refuse(a, name)
        return a.astype(float) if a.dtype.kind in "iub" else a


def _holds_jax(a: Any) -> bool:
    """Lists of numbers, which may be traced."""
    return isinstance(a, (list, tuple)) and any(isinstance(part, jax.Array) or _holds_jax(part) for part in a)


def _moved(device: str, arrays: list[Any]) -> list[Any]:
    if any(isinstance(a, jax.core.Tracer) for a in arrays):
        raise ValueError(
            f"device={device!r} has no meaning while JAX traces a function (jit, grad, vmap): the program runs where "
            "its arguments are. Leave device=None, and move the arguments with jax.device_put before"
        )
    platform, _, number = device.partition(":")
    try:
        to = jax.local_devices(backend=platform)[int(number or 0)]
    except (RuntimeError, IndexError) as error:
        raise BackendUnavailableError(
            f"device={device!r}: JAX has no such device ({error}); see jax.devices(). For NVIDIA GPUs install it with: "
            "pip install 'jax[cuda13]'"
        ) from error
    return [None if a is None else jax.device_put(a, to) for a in arrays]


def _platform(a: Any) -> str | None:
    """Where an array is; None if JAX traces, when that is not decided yet."""
    return None if a is None or isinstance(a, jax.core.Tracer) else next(iter(a.devices())).platform


def compute(call: Call) -> Any:
    if call.out is not None:
        raise TypeError("JAX arrays cannot be written to, so out= is not possible with them; use what is returned")
    if isinstance(call.temperature, jax.core.Tracer):
        raise TypeError(
            "temperature is traced by JAX, and klcore needs its number; divide the logits by it instead, or make it a "
            "static argument"
        )
    given, device = (call.x, call.y, call.weights, call.ratio), call.device
    # JAX looks calls up among those of the programs it has compiled: what equals a right one is to be refused first
    _, temperature, wanted = rows.words(call)
    call = call._replace(
        x=None, y=None, weights=None, ratio=None, device=None,
        space=call.space if isinstance(call.space, str) else tuple(call.space),
        axis=rows.integer(call.axis, "axis"), temperature=temperature, return_grad=wanted or None,
    )  # fmt: skip
    x, y, weights, ratio = (
        None if a is None else _array(a, name) for a, name in zip(given, ("x", "y", "weights", "ratio"), strict=True)
    )
    if labels.are_there(*given):
        labels.check(rows.class_axis_of(call, x, y), *given)
    if device is not None:
        x, y, weights, ratio = _moved(device, [x, y, weights, ratio])
    # In this thread a signal ends the call: JAX does not look for any while its programs run. Only where there is one
    # device, to which results are bound; not for little, of which JAX' own way takes a third of the time, nor for
    # gradients in bfloat16, which JAX does not take over without a copy.
    operands = [a for a in (x, y) if a is not None]
    here = jax.default_backend() == "cpu" and jax.device_count() == 1
    here = here and not any(isinstance(a, jax.core.Tracer) for a in (*operands, weights, ratio, call.denominator))
    here = here and any(a.nbytes > _SMALL for a in operands)
    if here and not (wanted and any(a.dtype.kind == "V" for a in operands)):
        return _in_this_thread(call, x, y, weights, ratio)
    divisor = None
    if not call.operation.is_loss:  # not a word of the program
        divisor, call = _divisor(call), call._replace(denominator=None)
    if _platform(weights) == "cpu":  # compiled code would raise JAX's own error
        _arranged(call, _stand_in(x), _stand_in(y), None if weights is None else np.asarray(weights))
    if "gpu" in (_platform(x), _platform(y)):
        import_module("klcore.backends.cuda").ready()
    results = _compute(call, x, y, weights, ratio, divisor)
    return results if len(results) > 1 else results[0]


def _in_this_thread(call: Call, x: Any, y: Any, weights: Any, ratio: Any) -> Any:
    """The same for arrays of numbers on the CPU, outside of JAX' programs."""
    x, y, weights, ratio = (None if a is None else np.asarray(a) for a in (x, y, weights, ratio))
    task = _arranged(call, _stand_in(x), _stand_in(y), None)
    out = [None if task.value is None else _to_be_taken_over(task.value.shape, task.scalar_dtype)]
    out += [_to_be_taken_over(a.shape, a.dtype) for a in (x if g.of == "x" else y for g in task.gradients)]
    to = None if all(a is None for a in out) else tuple(out)
    found = cpu.compute(call._replace(x=x, y=y, weights=weights, ratio=ratio, out=to))
    results = found if isinstance(found, tuple) else (found,)
    given = tuple(jnp.asarray(a) if b is None else jax.dlpack.from_dlpack(b) for a, b in zip(results, out, strict=True))
    return given if isinstance(found, tuple) else given[0]


def _to_be_taken_over(shape: tuple[int, ...], dtype: Any) -> Any:
    """New memory that JAX takes over as it is: its arrays begin at multiples of 64 bytes. None for what is copied:
    little, or bfloat16, which NumPy does not lend."""
    size = math.prod(shape) * dtype.itemsize
    if size <= _SMALL or dtype.kind == "V":
        return None
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
