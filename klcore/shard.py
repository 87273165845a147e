"""Rows whose classes are spread over several processes: what each process sends, and its part of the results.

This file contains no formulas. A shard calls the functions `states`, `merge` and `outputs` of its backend in order
(src/kl_partial.h).
"""

import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np

from klcore import divergence, family
from klcore.backends import Unevaluated, parts
from klcore.operations import OPERATIONS, Call, Operation
from klcore.parameters import shown
from klcore.typing import Temperature

_OF_LISTS = ("indices", "tail", "tail_mass")


class Shard:
    """One process's shard of rows whose classes are spread over several processes.

    For example, the logits of a vocabulary-parallel model. Each process makes a `Shard` of its classes. The processes
    exchange a few numbers per row, by any means that they have. Then each of them knows the values, and computes the
    part of the gradients that belongs to its own classes.

    Parameters
    ----------
    operation : str or callable
        The public function or its name: ``klcore.js_div`` or ``"js_div"``.
    x, y : array of shape (..., n, ...)
        This process's classes of both arguments, as arrays of NumPy, CuPy or PyTorch; only `x` for :func:`entropy`. All
        processes have the same rows. A shard can have no classes.
    space, axis, weights, temperature, base
        As for the function, and the same in every process.
    **parameters
        The parameters that only this function has, for example ``beta=0.1``.

    Attributes
    ----------
    exchanges : int
        The number of exchanges: one for probabilities, log-probabilities and :func:`kl_div` of logits, two or three
        otherwise.

    Raises
    ------
    TypeError
        For arrays of other libraries; for tensors that require a gradient while autograd is recording; for options that
        a shard does not have, such as `reduction`; and as for the function.
    ValueError
        As for the function.

    See Also
    --------
    kl_div : Explains the options.

    Notes
    -----
    A state is at most nine float64 numbers for every 1024 classes. ``state(fold=True)`` merges the states of a shard
    into one, of at most 72 bytes per row. Values and gradients are then within the published bounds, and the same in
    all processes, but their last bits depend on how the classes are spread. Without `fold` they have the same bits as
    the whole rows in one process, if every shard except the last holds a multiple of 1024 classes; see
    docs/sharding.md.

    Autograd does not see a shard: it takes the values of tensors without their history. Use it in a
    ``torch.autograd.Function`` whose forward returns the values and whose backward returns the gradient; no derivative
    goes through the exchange.

    Examples
    --------
    Two shards of the same rows, here in one process:

    >>> import numpy as np
    >>> import klcore
    >>> x, y = np.array([[0.5, 0.2, 0.3], [0.6, 0.3, 0.1]])
    >>> shards = [klcore.Shard("js_div", x[k], y[k]) for k in (slice(0, 2), slice(2, 3))]
    >>> for _ in range(shards[0].exchanges):
    ...     states = [shard.state(fold=True) for shard in shards]
    ...     for shard in shards:
    ...         shard.join(states)
    >>> print(f"{shards[0].values():.6f}, {shards[1].values():.6f}, {klcore.js_div(x, y):.6f}")
    0.033472, 0.033472, 0.033472
    >>> np.concatenate([shard.gradient("y") for shard in shards]).round(4)
    array([ 0.0435,  0.0912, -0.3466])
    """

    def __init__(
        self,
        operation: str | Callable[..., Any],
        x: Any,
        y: Any = None,
        *,
        space: str | tuple[str, str] = "probs",
        axis: SupportsIndex = -1,
        weights: Any = None,
        temperature: Temperature = 1.0,
        base: SupportsFloat | None = None,
        **parameters: Any,
    ) -> None:
        function, of = _public(operation)
        name = of.name
        if (y is None) != of.single:
            raise TypeError(f"{name} takes {'only x' if of.single else 'x and y'}")
        for option in parameters.keys() - set(of.parameters):
            why = "it has one value per row, and gradients for one cotangent per row; reduce the values yourself"
            if of.takes_indices and option in _OF_LISTS:
                why = f"with indices, the rows of y must be whole; gather them and call klcore.{name}"
            raise TypeError(f"a shard of {name} does not take {option!r}: {why}")
        given = (x,) if of.single else (x, y)
        options = {"space": space, "axis": axis, "weights": weights, "temperature": temperature, "base": base}
        self._lender = parts.lender_of(function(*given, **options, **parameters, device=Unevaluated))
        self._call: Call = self._lender.call
        with self._lender.here():
            self._task = self._lender.backend.arrange(self._call)
        self.exchanges = len(self._sweeps())
        self._stats: list[Any] = [None]  # the statistics of the rows before each sweep
        self._left = False  # whether state() was called for the current exchange

    def _sweeps(self, terms: bool = False, gradient: bool = False) -> tuple[int, ...]:
        cpu = importlib.import_module("klcore.backends.cpu")
        found: tuple[int, ...] = cpu.sweeps(self._task.operation, self._task.spaces, terms, gradient)
        return found

    def state(self, *, fold: bool = False) -> Any:
        """The state of this shard's classes, for the next exchange.

        Parameters
        ----------
        fold : bool
            Merge the states of the shard's chunks of 1024 classes into one. Must be the same in all processes.

        Returns
        -------
        array
            float64, of shape batch + (numbers, chunks), where `chunks` is 1 if folded; an array of the library of the
            arguments.

        Raises
        ------
        RuntimeError
            If all exchanges are done.
        """
        number = self._number()
        call = self._call._replace(return_grad=self._task.operation.gradients)
        if fold and not self._task.n:
            call = _excluded(self._task, call)
        with self._lender.here():
            left = self._lender.backend.states(call, number, self._stats[-1])
            if fold:
                left = self._lender.backend.merge(self._task, number, left, self._stats[-1], fold)
            self._left = True
            return self._lender.give(left)

    def join(self, states: Iterable[Any]) -> None:
        """Take in the states of all shards, including this one, in the order of their classes.

        Parameters
        ----------
        states : sequence of arrays
            What :meth:`state` returned in each process, in the order of the processes' classes.

        Raises
        ------
        RuntimeError
            If all exchanges are done, or :meth:`state` was not called for this one.
        ValueError
            If there are no states, or they do not fit this shard.
        """
        number = self._number()
        if not self._left:
            raise RuntimeError("join() takes what state() returned in every process; call state() first")
        shape = (*self._task.x.shape[:-1], self._sweeps()[number])
        xp = _library(self._task.x)
        with self._lender.here():
            found = [xp.asarray(self._lender.lend(s)) for s in states]
            for k, s in enumerate(found):
                if s.shape[:-1] != shape or s.dtype != np.float64:
                    raise ValueError(
                        f"states[{k}] has shape {s.shape} and dtype {s.dtype}, but exchange {number + 1} of "
                        f"{self.exchanges} of this shard takes float64 of shape {(*shape, 'chunks')}; all processes "
                        "must make their shards of the same rows with the same options, and exchange in step"
                    )
            if not found:
                raise ValueError("states must hold the states of all shards, including this one; found none")
            states = xp.concatenate(found, axis=-1)
            self._stats.append(self._lender.backend.merge(self._task, number, states, self._stats[-1]))
        self._left = False

    def values(self) -> Any:
        """One value per row, of the whole row, times its weight; the same in every process.

        Returns
        -------
        array or scalar
            In the dtype that the function returns, and of the batch shape.

        Raises
        ------
        RuntimeError
            If not all exchanges are done.
        """
        self._finished()
        with self._lender.here(), np.errstate(over="ignore"):  # a finite float64 can be infinite as float32
            return self._lender.give(self._stats[-1][..., 0].astype(self._task.scalar_dtype)[()])

    def terms(self) -> Any:
        """The terms of this shard's classes, as with ``reduction="none"``.

        Returns
        -------
        array
            Of the shape to which this shard's x and y broadcast.

        Raises
        ------
        RuntimeError
            If not all exchanges are done.
        ValueError
            For an operation without terms, :func:`renyi_div`.
        """
        return self._outputs(self._call._replace(reduction="none"), True)[0]

    def gradient(self, of: str | tuple[str, ...], cotangent: Any = None) -> Any:
        """This shard's part of the gradients of ``sum(cotangent * values)``.

        Parameters
        ----------
        of : {"x", "y", ("x", "y")}
            The arguments with respect to which the gradient is taken.
        cotangent : array, optional
            One number per row, broadcastable to the batch shape. None means 1.

        Returns
        -------
        array, or tuple of two arrays
            In the shape and dtype of the argument. If the argument is broadcast over the batch, the sum over its rows.

        Raises
        ------
        RuntimeError
            If not all exchanges are done.
        ValueError
            For a `cotangent` that does not broadcast, or an unknown `of`.
        """
        batch, shape = self._task.x.shape[:-1], () if cotangent is None else tuple(np.shape(cotangent))
        if len(shape) > len(batch) or any(n not in (1, m) for n, m in zip(shape[::-1], batch[::-1], strict=False)):
            raise ValueError(f"cotangent of shape {shape} does not broadcast to the batch shape {batch}")
        found = self._outputs(self._call._replace(return_grad=of, cotangent=self._lender.lend(cotangent)), False)
        return found[0] if isinstance(of, str) or len(of) == 1 else found

    def _outputs(self, call: Call, terms: bool) -> tuple[Any, ...]:
        self._finished()
        number = len(self._sweeps(terms, not terms)) - 1
        with self._lender.here():
            found = self._lender.backend.outputs(call, number, self._stats[number], 1.0, ())
            return tuple(map(self._lender.give, found))

    def _number(self) -> int:
        """The number of the next exchange."""
        number = len(self._stats) - 1
        if number == self.exchanges:
            raise RuntimeError(f"all exchanges are done ({number}); call values(), terms() or gradient()")
        return number

    def _finished(self) -> None:
        done = len(self._stats) - 1
        if done < self.exchanges:
            raise RuntimeError(
                f"{done} of {self.exchanges} exchanges are done, but values, terms and gradients need whole rows; call "
                "state() and join() for each of range(shard.exchanges)"
            )


def _public(operation: Any) -> tuple[Callable[..., Any], Operation]:
    """The public function and its operation."""
    name = operation if isinstance(operation, str) else getattr(operation, "__name__", "")
    function: Any = getattr(divergence, name, None) or getattr(family, name, None)
    if name not in OPERATIONS or not (isinstance(operation, str) or operation is function):
        raise ValueError(
            f"operation must be one of {', '.join(OPERATIONS)}, or the function of that name; found {shown(operation)}"
        )
    return function, OPERATIONS[name]


def _library(a: Any) -> Any:
    """NumPy or CuPy."""
    return importlib.import_module(type(a).__module__.partition(".")[0])


def _excluded(task: Any, call: Call) -> Call:
    """The call with one class that both arguments exclude: it adds nothing, but gives a shard of no classes a state."""

    def one(a: Any, space: str) -> Any:
        return _library(a).full((*a.shape[:-1], 1), 0.0 if space in ("probs", "counts") else -math.inf, a.dtype)

    of_x, of_y = (call.space, call.space) if isinstance(call.space, str) else call.space
    return call._replace(x=one(task.x, of_x), y=None if call.y is None else one(task.y, of_y), axis=-1)
