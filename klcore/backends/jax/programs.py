"""What compiled code calls back to: the engine, on the buffers of arguments and results as they lie in memory.

NumPy views on the CPU, CuPy views and XLA's stream on an NVIDIA GPU. Nothing here calls JAX, so nothing can wait for a
thread that waits for it. Called by XLA, in its threads; primitives.py and partition.py say what with.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import jax
import numpy as np

from klcore.backends import cpu
from klcore.operations import Call

_ON_CPU = 1  # kDLCPU
SMALL = 1 << 16  # bytes of results, which are copied in less time than klcore takes to look at `out`


NUMBERS = ("temperature", "denominator")  # the arguments that may be numbers


def as_data(number: float) -> Any:
    """A number as an argument of a program, which is then one for all numbers: the bits of a float64, which JAX itself
    may not have."""
    return np.array([number]).view(np.uint32)


def is_data(a: Any) -> bool:
    """Whether that is what an array is: no argument of the engine is of this dtype."""
    return bool(a.dtype == np.uint32)


def number_of(a: Any) -> Any:
    """What it was, and of several their sum; of another array its one element. On a GPU not waited for."""
    numbers = a.reshape(-1).view(np.float64) if is_data(a) else a
    return math.fsum(numbers.reshape(-1).tolist()) if isinstance(numbers, np.ndarray) else numbers.sum()


@dataclass(frozen=True)
class Program:
    """What to compute, as compiled code refers to it: equal ones are equal objects, so that JAX compiles them once.

    Its arrays may have axes in front that vmap has put there, of size 1 where an argument is not mapped.
    """

    call: Call  # without arrays; its axis counted from the end
    ndim: int  # of x and y
    shape: tuple[int, ...]  # of the value
    dtype: Any
    gradients: tuple[str, ...] = ()
    pull: bool = False  # the gradients only, of sum(cotangent * value)
    names: tuple[str, ...] = ()  # of the arguments, in their order, as Call has them

    @property
    def total(self) -> bool:
        return self.call.reduction not in ("row", "none")

    def mapped(self, arguments: Any) -> tuple[int, ...]:
        """The axes in front."""
        count = arguments[self.names.index("x")].ndim - self.ndim
        return np.broadcast_shapes(*(a.shape[:count] for a in arguments))

    def results(self, arguments: Any) -> tuple[Any, ...]:
        """Shapes and dtypes of what is computed."""
        mapped = self.mapped(arguments)
        result: Any = jax.ShapeDtypeStruct
        value = () if self.pull else (result(mapped + self.shape, self.dtype),)
        operands = [arguments[self.names.index(name)] for name in self.gradients]
        return *value, *(result(mapped + a.shape[len(mapped) :], a.dtype) for a in operands)

    def __call__(self, backend: Any, xp: Any, out: list[Any], arguments: list[Any]) -> None:
        """Compute `out`."""
        mapped = self.mapped(arguments)
        count = len(mapped)
        if count and self.total:  # one for each mapped example
            spread = [xp.broadcast_to(a, mapped + a.shape[count:]) for a in arguments]
            for i in np.ndindex(mapped):
                at = (*i, ...)
                self._compute(backend, [o[at] for o in out], [a[at] for a in spread])
        else:  # more rows
            self._compute(backend, out, [self.over_rows(xp, a, mapped) for a in arguments])

    def over_rows(self, xp: Any, a: Any, mapped: tuple[int, ...]) -> Any:
        """An argument whose mapped axes are more rows; a number is the same for all."""
        return a.reshape(-1) if is_data(a) else xp.broadcast_to(a, mapped + a.shape[len(mapped) :])

    def call_of(self, arguments: list[Any], **more: Any) -> Call:
        """The call with its arrays, and its numbers."""
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
    """Where they are not yet there."""
    for o, result in zip(out, results, strict=True):
        if result is not o:
            o[...] = result


def on_buffers(compute: Callable[..., None], context: Any, out: Any, arguments: Any) -> None:
    """Have `compute` write `out`, buffers of XLA's."""
    kind, number = arguments[0].__dlpack_device__()
    if kind == _ON_CPU:
        compute(cpu, np, [np.asarray(o) for o in out], [np.asarray(a) for a in arguments])
        return
    cuda = import_module("klcore.backends.cuda")
    with cuda.on_stream(number, context.stream) as cupy:
        compute(cuda, cupy, [cupy.from_dlpack(o) for o in out], [cupy.from_dlpack(a) for a in arguments])
