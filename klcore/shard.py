"""Rows whose classes are spread over processes: what each process sends of its shard, and its part of the results.

It holds no formula: a shard calls its backend's `states`, `merge` and `outputs` in their order (src/kl_partial.h).
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
    """A process's shard of rows whose classes are spread over several, as the logits of a vocabulary-parallel model.

    Each process makes a shard of its classes. A few numbers a row are exchanged, by whatever means the processes have,
    and then every one of them knows the values, and computes its own classes' part of the gradients.

    Parameters
    ----------
    operation : str or callable
        The public function, or its name: ``klcore.js_div`` or ``"js_div"``.
    x, y : array of shape (..., n, ...)
        This process's classes of both arguments, of NumPy, CuPy or PyTorch; `x` alone for :func:`entropy`. All
        processes have the same rows; a shard may have no classes.
    space, axis, weights, temperature, base
        As of the function; the same in every process.
    **parameters
        The function's own, as ``beta=0.1``.

    Attributes
    ----------
    exchanges : int
        How often states are to be exchanged: once for probabilities, log-probabilities and :func:`kl_div` of logits,
        twice or three times for others.

    Raises
    ------
    TypeError
        For arrays of other libraries; for tensors that require a gradient where autograd would record; for a reduction
        and the like, which are the caller's; and as the function does.
    ValueError
        As the function does.

    See Also
    --------
    kl_div : says what the words mean.

    Notes
    -----
    A state is at most nine doubles for every 1024 classes. ``state(fold=True)`` merges those of a shard into one: at
    most 72 bytes a row. Values and gradients are then within the published bounds, and the same in all processes; but
    their last bits depend on how the classes are spread. Without `fold` they have the bits of the whole rows in one
    process, if every shard but the last holds a multiple of 1024 classes (:doc:`/sharding`).

    Tensors are taken without their history. In a ``torch.autograd.Function`` the forward returns the values, and
    the backward the gradient: no derivative goes through the exchange.

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
            raise TypeError(f"{name} takes {'x alone' if of.single else 'x and y'}")
        for word in parameters.keys() - set(of.parameters):
            why = "it has one value a row, and gradients for a cotangent of each; reduce the values yourself"
            if of.takes_indices and word in _OF_LISTS:
                why = (
                    f"where x lists some of y's classes y's rows have to be whole; gather them, and call klcore.{name}"
                )
            raise TypeError(f"a shard of {name} takes no {word!r}: {why}")
        given = (x,) if of.single else (x, y)
        words = {"space": space, "axis": axis, "weights": weights, "temperature": temperature, "base": base}
        self._lender = parts.lender_of(function(*given, **words, **parameters, device=Unevaluated))
        self._call: Call = self._lender.call
        with self._lender.here():
            self._task = self._lender.backend.arrange(self._call)
        self.exchanges = len(self._sweeps())
        self._stats: list[Any] = [None]  # before each sweep
        self._left = False  # whether this exchange's state has been asked for

    def _sweeps(self, terms: bool = False, gradient: bool = False) -> tuple[int, ...]:
        cpu = importlib.import_module("klcore.backends.cpu")
        found: tuple[int, ...] = cpu.sweeps(self._task.operation, self._task.spaces, terms, gradient)
        return found

    def state(self, *, fold: bool = False) -> Any:
        """What this shard's classes leave for the next exchange.

        Parameters
        ----------
        fold : bool
            Merge the states of the shard's chunks of 1024 classes into one; the same in all processes.

        Returns
        -------
        array
            float64, of shape batch + (numbers, chunks), with 1 for `chunks` if folded; in the library of the arguments.
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
        """Take the states of all shards, this one's included, in the order of their classes.

        Parameters
        ----------
        states : sequence of arrays
            What :meth:`state` returned in every process, in the order of the processes' classes.
        """
        number = self._number()
        if not self._left:
            raise RuntimeError("join() takes what state() returned in every process: call that first, and exchange it")
        shape = (*self._task.x.shape[:-1], self._sweeps()[number])
        xp = _library(self._task.x)
        with self._lender.here():
            found = [xp.asarray(self._lender.lend(s)) for s in states]
            for k, s in enumerate(found):
                if s.shape[:-1] != shape or s.dtype != np.float64:
                    raise ValueError(
                        f"states[{k}] has the shape {s.shape} and the dtype {s.dtype}, and this shard's exchange "
                        f"{number + 1} of {self.exchanges} takes float64 of {(*shape, 'chunks')}: all processes make "
                        "their shards of the same rows, with the same words, and exchange in step"
                    )
            if not found:
                raise ValueError("states are those of all shards, this one's included; found none")
            states = xp.concatenate(found, axis=-1)
            self._stats.append(self._lender.backend.merge(self._task, number, states, self._stats[-1]))
        self._left = False

    def values(self) -> Any:
        """One value a row, of whole rows, times its weight: the same in every process."""
        self._finished()
        with self._lender.here(), np.errstate(over="ignore"):  # a float64 value may be infinite as float32
            return self._lender.give(self._stats[-1][..., 0].astype(self._task.scalar_dtype)[()])

    def terms(self) -> Any:
        """This shard's terms, as of ``reduction="none"``."""
        return self._outputs(self._call._replace(reduction="none"), True)[0]

    def gradient(self, of: str | tuple[str, ...], cotangent: Any = None) -> Any:
        """This shard's part of the gradients of ``sum(cotangent * values)``.

        Parameters
        ----------
        of : {"x", "y", ("x", "y")}
            With respect to what.
        cotangent : array, optional
            One number a row, broadcastable to the batch shape. None: 1.

        Returns
        -------
        array, or tuple of two
            In the shape and dtype of the argument. Of one that is broadcast over the batch: the sum over its rows.
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
        """Of the exchange that is next."""
        number = len(self._stats) - 1
        if number == self.exchanges:
            raise RuntimeError(f"all exchanges are done ({number}): ask for values(), terms() or gradient()")
        return number

    def _finished(self) -> None:
        done = len(self._stats) - 1
        if done < self.exchanges:
            raise RuntimeError(
                f"{done} of {self.exchanges} exchanges are done: values, terms and gradients take whole rows; call "
                "state() and join() for each of range(shard.exchanges)"
            )


def _public(operation: Any) -> tuple[Callable[..., Any], Operation]:
    """The public function, and its row of the table."""
    name = operation if isinstance(operation, str) else getattr(operation, "__name__", "")
    function: Any = getattr(divergence, name, None) or getattr(family, name, None)
    if name not in OPERATIONS or not (isinstance(operation, str) or operation is function):
        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, or its function; found {shown(operation)}")
    return function, OPERATIONS[name]


def _library(a: Any) -> Any:
    """NumPy or CuPy."""
    return importlib.import_module(type(a).__module__.partition(".")[0])


def _excluded(task: Any, call: Call) -> Call:
    """The call of one class that both arguments exclude, which adds nothing: so a shard of no classes has a state."""

    def one(a: Any, space: str) -> Any:
        return _library(a).full((*a.shape[:-1], 1), 0.0 if space in ("probs", "counts") else -math.inf, a.dtype)

    of_x, of_y = (call.space, call.space) if isinstance(call.space, str) else call.space
    return call._replace(x=one(task.x, of_x), y=None if call.y is None else one(task.y, of_y), axis=-1)
