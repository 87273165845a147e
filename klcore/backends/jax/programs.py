"""What compiled code calls back into: the engine, on the buffers of arguments and results where they lie.

NumPy views on the CPU, CuPy views and XLA's stream on an NVIDIA GPU. Nothing here calls JAX, so nothing can wait for a
thread that waits for it. XLA calls this in its own threads; primitives.py and partition.py set up these calls.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from klcore.backends import cpu, options, rows
from klcore.operations import Call

_ON_CPU = 1  # kDLCPU
SMALL = 1 << 16  # bytes: copying smaller results takes less time than checking `out`


BY_CLASS = tuple(options.SPACES[name] for name in ("probs", "log_probs"))  # spaces in which a term depends on one class
NUMBERS = ("temperature", "denominator")  # the arguments that may be numbers


def as_data(number: float) -> Any:
    """A number as data, so that one program serves all numbers: the bits of a float64, a dtype that JAX may not have
    enabled."""
    return np.array([number]).view(np.uint32)


def is_data(a: Any) -> bool:
    """Whether an array was made by `as_data`: no other argument has this dtype."""
    return bool(a.dtype == np.uint32)


def number_of(a: Any) -> Any:
    """The number in an array from `as_data`, or the sum of several; for other arrays, their one element. Does not
    synchronise with a GPU."""
    numbers = a.reshape(-1).view(np.float64) if is_data(a) else a
    return math.fsum(numbers.reshape(-1).tolist()) if isinstance(numbers, np.ndarray) else numbers.sum()


@dataclass(frozen=True, repr=False)
class Program:
    """What compiled code computes. Equal programs compare equal, so JAX compiles them only once.

    The arrays may have leading axes from vmap, of size 1 for arguments that are not mapped.
    """

    call: Call  # without arrays; its axis is counted from the end
    ndim: int  # of x and y
    shape: tuple[int, ...]  # of the value
    dtype: Any
    gradients: tuple[str, ...] = ()
    pull: bool = False  # only the gradients, of sum(cotangent * value)
    names: tuple[str, ...] = ()  # the arguments in order, by their names in Call
    # what divides a total, if no argument does; None: the sum of the weights
    divided: float | None = 1.0

    def __repr__(self) -> str:  # shown by jax.make_jaxpr
        call = self.call
        return f"{call.operation.name} of {call.space}, reduction={call.reduction!r}, return_grad={self.gradients}"

    @property
    def total(self) -> bool:
        return self.call.reduction not in ("row", "none")

    @property
    def spaces(self) -> dict[str, int]:
        """The codes of the spaces of x and y."""
        return dict(zip("xy", options.space_pair(self.call.space, self.call.operation), strict=True))

    def whole(self, arrays: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shapes of x, y and indices, broadcast over all rows."""
        of = {name: tuple(arrays[name].shape) for name in ("x", "y", "indices") if name in arrays}
        if "indices" not in of:
            return dict.fromkeys(of, np.broadcast_shapes(*of.values()))
        batch = np.broadcast_shapes(*(self.with_classes(shape, 1) for shape in of.values()))
        return {name: self.with_classes(batch, shape[self.call.axis]) for name, shape in of.items()}

    def with_classes(self, shape: tuple[int, ...], n: int) -> tuple[int, ...]:
        """The shape with n classes on its class axis."""
        return rows.with_classes(shape, self.call.axis, n)

    def mapped(self, arguments: Any) -> tuple[int, ...]:
        """The leading axes from vmap."""
        count = arguments[self.names.index("x")].ndim - self.ndim
        return np.broadcast_shapes(*(a.shape[:count] for a in arguments))

    def results(self, arguments: Any) -> tuple[Any, ...]:
        """The shapes and dtypes of the results."""
        mapped = self.mapped(arguments)
        result: Any = jax.ShapeDtypeStruct
        value = () if self.pull else (result(mapped + self.shape, self.dtype),)
        operands = [arguments[self.names.index(name)] for name in self.gradients]
        return *value, *(result(mapped + a.shape[len(mapped) :], a.dtype) for a in operands)

    def __call__(self, backend: Any, xp: Any, out: list[Any], arguments: list[Any]) -> None:
        """Compute the results into `out`."""
        for at, given in self.examples(xp, arguments):
            self._compute(backend, [o[at] for o in out], given)

    def examples(self, xp: Any, arguments: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
        """For each mapped example, its index in the results, and its arguments; all at once if examples are rows."""
        mapped = self.mapped(arguments)
        if not self.total:
            yield ..., self.as_rows(xp, arguments)
            return
        spread = [xp.broadcast_to(a, mapped + a.shape[len(mapped) :]) for a in arguments]
        for i in np.ndindex(mapped):
            at = (*i, ...)
            yield at, [a[at] for a in spread]

    def as_rows(self, xp: Any, arguments: list[Any]) -> list[Any]:
        """The arguments with their mapped axes as more rows; a number is the same for all rows."""
        mapped = self.mapped(arguments)
        return [a if is_data(a) else xp.broadcast_to(a, mapped + a.shape[len(mapped) :]) for a in arguments]

    def call_of(self, arguments: list[Any], **more: Any) -> Call:
        """The call with its arrays and numbers."""
        arrays = dict(zip(self.names, arguments, strict=True))
        for name in self.names:
            if name in NUMBERS and (is_data(arrays[name]) or arrays[name].size == 1):
                arrays[name] = number_of(arrays[name])
        return self.call._replace(**arrays, **more)

    def _compute(self, backend: Any, out: list[Any], arguments: list[Any]) -> None:
        to: Any = tuple(out) if sum(o.nbytes for o in out) > SMALL else None
        results = backend.compute(self.call_of(arguments, return_grad=self.gradients or None, out=to))
        put(out, results if self.gradients else (results,))


def put(out: list[Any], results: Any) -> None:
    """Copy the results to `out`, unless they are there already."""
    for o, result in zip(out, results, strict=True):
        if result is not o:
            o[...] = result


def on_buffers(compute: Callable[..., None], several: bool, context: Any, out: Any, *arguments: Any) -> None:
    """Let `compute` write the XLA buffers `out`. With `several` devices, invalid numbers give NaN, as on GPUs, instead
    of raising: the other devices would wait for this one, and XLA would end the process."""
    kind, number = arguments[0].__dlpack_device__()
    if kind == _ON_CPU:
        results = [np.asarray(o) for o in out]
        try:
            compute(cpu, np, results, [np.asarray(a) for a in arguments])
        except ValueError:
            if not several:
                raise
            for o in results:
                (o.view(np.float64) if is_data(o) else o)[...] = np.nan
        return
    cuda = import_module("klcore.backends.cuda")
    with cuda.on_stream(number, context.stream) as cupy:
        compute(cuda, cupy, [cupy.from_dlpack(o) for o in out], [cupy.from_dlpack(a) for a in arguments])


def call_back(program: Program, several: bool, *arguments: Any) -> Any:
    """The results of a program, by a callback from compiled code; `several`: whether several devices run it."""

    def callback(context: Any, out: Any, *buffers: Any) -> None:
        on_buffers(program, several, context, out, *buffers)

    return buffer_callback(callback, program.results(arguments))(*arguments)
