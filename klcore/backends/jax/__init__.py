"""JAX arrays: their memory is lent to klcore.backends.cpu or cuda, and JAX learns the gradients. No formulas are here.

Compiled code calls back into Python (``jax.experimental.buffer_callback``, an XLA FFI handler that comes with jaxlib),
whether the call is traced or not. The callback gets the buffers of arguments and results where they lie: NumPy views on
the CPU, CuPy views and XLA's stream on an NVIDIA GPU. Nothing is copied except results of a few kilobytes. The callback
never calls JAX, so it cannot wait for a thread that waits for it, which can happen with callbacks that are passed JAX
arrays (``jax.pure_callback``). The device is known when the program is compiled: a program for CUDA runs the CUDA
kernels, JAX refuses a program for a TPU, and nothing is moved implicitly.

Concrete arrays go the same way, through a ``jax.jit`` that caches a program for each shape and each choice of options,
as JAX's own functions do. But if the CPU is JAX's only device, large arrays are computed at once, like NumPy arrays.
Programs run in the calling thread or in a thread of XLA. There ``klcore.set_num_threads`` holds, but
``klcore.threads``, which belongs to the caller's thread, does not. JAX turns exceptions that a signal handler raises
there into its own error.
"""

import math
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from klcore.backends import BackendUnavailableError, arguments, cpu, labels, options, rows, sparse
from klcore.backends.jax import partition, private
from klcore.backends.jax.primitives import value
from klcore.backends.jax.programs import SMALL, Program, as_data
from klcore.operations import Call

_DTYPES = frozenset(jnp.dtype(name) for name in arguments.FLOATS)
_ARRAYS = ("x", "y", "weights", "ratio", "temperature", "indices", "tail_mass")  # the arguments that may be arrays
_OF_CLASSES = ("x", "y", "indices")


# ---- the contract of a backend ---------------------------------------------------------------------------------------


def _arranged(call: Call, arrays: dict[str, Any], known: tuple[str, ...] = ()) -> rows.Task:
    """Check the arguments of a call as for NumPy arrays; only those in `known` have values to check."""

    def to_check(name: str, a: Any) -> Any:
        if name in known:
            return np.asarray(a)
        # an array without memory: ones pass every check, and zeros for weights and indices prevent checks of rows
        return np.broadcast_to(np.array(name not in ("weights", "indices"), a.dtype), a.shape)

    arranged = rows.arrange if call.tail is None else sparse.outcome
    return arranged(np, lambda a, name: a, call._replace(**{name: to_check(name, a) for name, a in arrays.items()}))


@partial(jax.jit, static_argnums=0)
def _compute(call: Call, arrays: dict[str, Any], numbers: dict[str, Any]) -> tuple[Any, ...]:
    """The value and the gradients that were asked for. Errors in the arguments are raised while JAX traces this."""
    task = _arranged(call, arrays)
    shape = () if task.output == rows.TOTAL else task.value.shape
    operands = {name: arrays[name] for name in _OF_CLASSES if name in arrays}
    ndim = max(0 if call.operation.is_estimator else 1, *(a.ndim for a in operands.values()))
    of_rows = ndim if call.operation.is_loss or call.operation.is_estimator else ndim - 1
    axes = frozenset[str]().union(*map(private.varying_axes, arrays.values()))

    def whole(name: str, a: Any) -> Any:
        # vmap adds leading axes, so axes that broadcast must exist already. A number is one class.
        a = jnp.expand_dims(a, tuple(range((ndim if name in operands else of_rows) - a.ndim)))
        return private.varying(a, axes)

    value_shape = (1,) if call.reduction == "none" and not shape else shape
    of_value = jax.dtypes.canonicalize_dtype(task.scalar_dtype)
    axis = call.axis if call.axis < 0 else call.axis - ndim
    # the dtype of the value is one that JAX has, also for losses and integer arguments
    of_call = call._replace(axis=axis, dtype=of_value.name if call.operation.is_loss else None)
    wanted = tuple(g.of for g in task.gradients)
    program = Program(of_call, ndim, value_shape, of_value, wanted, divided=task.denominator)
    whole_arrays = {name: whole(name, a) for name, a in arrays.items()} | numbers
    result, *gradients = partition.in_explicit_mesh(program, partial(value, program), whole_arrays)

    def back(a: Any, ndim: int) -> Any:
        return jnp.squeeze(a, tuple(range(a.ndim - ndim)))

    return back(result, len(shape)), *(back(g, operands[n].ndim) for n, g in zip(wanted, gradients, strict=True))


def _array(a: Any, name: str) -> Any:
    """A JAX array of one of klcore's dtypes. Integers become JAX's default float, which is float64 only if
    jax_enable_x64 is set; indices become JAX's default integer."""
    if isinstance(a, jax.Array) and a.dtype in _DTYPES and name != "indices":
        return a
    if not isinstance(a, jax.Array) and not _holds_jax(a):
        a = arguments.as_numpy(a, name)
        arguments.refuse(a, name)
        a = a if a.dtype.isnative else a.astype(a.dtype.newbyteorder("="))
    with jax.ensure_compile_time_eval():  # constants stay concrete while JAX traces, so that weights can be checked
        if name == "indices":
            return _indices(a)
        a = jnp.asarray(a)
        if jnp.issubdtype(a.dtype, jax.dtypes.extended):
            raise TypeError(f"{name} has dtype {a.dtype}; klcore supports {', '.join(arguments.FLOATS)} and integers")
        arguments.refuse(a, name)
        return a.astype(float) if a.dtype.kind in "iub" else a


def _indices(a: Any) -> Any:
    """Indices as JAX's default integer. An index that overflows it is out of range for y; clipping keeps it so."""
    a = jnp.asarray(a) if _holds_jax(a) else a
    info: Any = jnp.iinfo  # without types
    own = info(jax.dtypes.canonicalize_dtype(int))
    if not a.size:  # NumPy converts an empty list to float64
        return jnp.zeros(a.shape, own.dtype)
    arguments.check_indices_dtype(a.dtype, jnp.issubdtype(a.dtype, jnp.integer))
    if isinstance(a, jax.Array) and a.dtype == own.dtype:
        return a
    xp: Any = jnp if isinstance(a, jax.Array) else np
    given = info(a.dtype)
    return jnp.asarray(xp.clip(a, max(own.min, given.min), min(own.max, given.max)), own.dtype)


def _holds_jax(a: Any) -> bool:
    """Whether `a` is a list that contains JAX arrays, which may be traced."""
    return isinstance(a, (list, tuple)) and any(isinstance(part, jax.Array) or _holds_jax(part) for part in a)


def _moved(device: str, arrays: dict[str, Any]) -> dict[str, Any]:
    if any(isinstance(a, jax.core.Tracer) for a in arrays.values()):
        raise ValueError(
            f"device={device!r} has no meaning while JAX traces a function (jit, grad, vmap), because the program runs "
            "where its arguments are; use device=None, and move the arguments with jax.device_put first"
        )
    platform, _, number = device.partition(":")
    try:
        to = jax.local_devices(backend=platform)[int(number or 0)]
    except (RuntimeError, IndexError) as error:
        raise BackendUnavailableError(
            f"device={device!r}, but JAX has no such device ({error}); see jax.devices(). For NVIDIA GPUs, install JAX "
            "with: pip install 'jax[cuda13]'"
        ) from error
    return {name: jax.device_put(a, to) for name, a in arrays.items()}


def _platform(a: Any) -> str | None:
    """The platform of an array; None while JAX traces, when it is not decided yet."""
    return None if a is None or isinstance(a, jax.core.Tracer) else next(iter(a.devices())).platform


def _numbers(call: Call) -> tuple[Call, dict[str, Any]]:
    """The call without its numbers, and the numbers, which are data: one program then serves all numbers."""
    numbers: dict[str, Any] = {}
    if not call.operation.is_loss and call.denominator is not None:  # that of a loss is part of the program
        waits = isinstance(call.denominator, jax.Array) and _platform(call.denominator) != "cpu"
        numbers["denominator"] = call.denominator if waits else as_data(options.denominator_of(call))
        call = call._replace(denominator=None)
    if isinstance(call.temperature, float) and call.temperature != 1:
        numbers["temperature"] = as_data(call.temperature)
        call = call._replace(temperature=1.0)
    return call, numbers


def compute(call: Call) -> Any:
    if call.out is not None:
        raise TypeError("JAX arrays cannot be written to, so out= is not supported; use the returned arrays")
    # check first: JAX would take an invalid option that equals a valid one for a program that it has compiled already
    _, temperature, wanted = options.check(call)
    device, several = call.device, options.has_numbers(temperature)
    given = {name: a for name in _ARRAYS if (a := getattr(call, name)) is not None}
    if not several:
        del given["temperature"]
    call = call._replace(
        x=None, y=None, weights=None, ratio=None, indices=None, tail_mass=None, device=None,
        space=call.space if isinstance(call.space, str) else tuple(call.space),
        axis=options.integer(call.axis, "axis"), temperature=1.0 if several else temperature,
        return_grad=wanted or None,
    )  # fmt: skip
    arrays = {name: _array(a, name) for name, a in given.items()}
    if labels.are_there(*given.values()):
        last = rows.class_axis_of(call._replace(indices=arrays.get("indices")), arrays["x"], arrays.get("y"))
        labels.check(last, *map(given.get, _ARRAYS))
    if device is not None:
        arrays = _moved(device, arrays)
    # In this thread, a signal can end the call: JAX does not check for signals while its programs run. Only if there is
    # one device, where the results must be; not for small arrays, for which JAX takes a third of the time; and not for
    # gradients in bfloat16, which JAX copies.
    operands = [arrays[name] for name in "xy" if name in arrays]
    here = jax.default_backend() == "cpu" and jax.device_count() == 1
    here = here and not any(isinstance(a, jax.core.Tracer) for a in (*arrays.values(), call.denominator))
    here = here and any(a.nbytes > SMALL for a in operands)
    if here and not (wanted and any(a.dtype.kind == "V" for a in operands)):
        return _in_this_thread(call, arrays)
    call, numbers = _numbers(call)
    known = tuple(name for name in arrays if name not in ("x", "y", "ratio") and _platform(arrays[name]) == "cpu")
    if known:  # check values now: from compiled code, JAX would raise its own error instead
        _arranged(call, arrays, known)
    if "gpu" in map(_platform, operands):
        import_module("klcore.backends.cuda").ready()
    results = _compute(call, arrays, numbers)
    return results if len(results) > 1 else results[0]


def _in_this_thread(call: Call, arrays: dict[str, Any]) -> Any:
    """Compute concrete arrays on the CPU at once, without a JAX program."""
    arrays = {name: np.asarray(a) for name, a in arrays.items()}
    task = _arranged(call, {name: a for name, a in arrays.items() if name != "weights"})
    out = [None if task.value is None else _to_be_taken_over(task.value.shape, task.scalar_dtype)]
    out += [_to_be_taken_over(arrays[g.of].shape, arrays[g.of].dtype) for g in task.gradients]
    to = None if all(a is None for a in out) else tuple(out)
    found = cpu.compute(call._replace(**arrays, out=to))
    results = found if isinstance(found, tuple) else (found,)
    given = tuple(jnp.asarray(a) if b is None else jax.dlpack.from_dlpack(b) for a, b in zip(results, out, strict=True))
    return given if isinstance(found, tuple) else given[0]


def _to_be_taken_over(shape: tuple[int, ...], dtype: Any) -> Any:
    """New memory, aligned to 64 bytes, that JAX takes over without a copy. None for small arrays, which are copied, and
    for bfloat16, which NumPy cannot export."""
    size = math.prod(shape) * dtype.itemsize
    if size <= SMALL or dtype.kind == "V":
        return None
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
