"""PuzzleLib's Cost.KLDivergence: its call, its state and its checks on klcore's engine."""

import math
import warnings
from typing import Any, SupportsIndex

from klcore.compat._arguments import cast, cotangent_of, dense, detached, divisor_of, dtype_name, one_library, truth
from klcore.divergence import loss

__all__ = ["KLDivergence"]


class KLDivergence:
    """The cost of PuzzleLib: the divergence of a target from the softmax of scores, and a direction of descent.

    Parameters
    ----------
    maxlabels : int, optional
        The exact size of axis 1 of the scores, which is checked. None and 0 check nothing.
    normTarget : bool
        The target holds scores, too, and its softmax is used.

    Attributes
    ----------
    maxlabels, normTarget
        As given.
    error, valError : scalar
        The error of the last call, and of the last :meth:`validate`, in nats.
    grad : array
        The gradient of the last call.
    devErr, accumErr : scalar
        The undivided sum over the last batch, and over all batches since :meth:`resetAccumulator`.
    batchsize, numOfSamples : int
        The size of the last batch, and of all batches since :meth:`resetAccumulator`.
    dirty : bool
        `error` is not yet that of the last call; :meth:`getError` updates it.

    See Also
    --------
    klcore.kl_div : For new code; returns the derivative, and is never negative.

    Notes
    -----
    The softmax is over all axes except the first, together. The error is the sum of y*(log(y) - log(softmax)) over the
    classes with y > 0, divided by the size of the batch: zero, negative and NaN targets contribute nothing.

    The gradient is (y - softmax) / batch, which PuzzleLib's optimisers *add* to the parameters. It is the negative
    derivative only if the targets of a sample are non-negative and sum to one. The derivative is what
    ``klcore.kl_div(..., return_grad="y")`` returns.

    Differences from the original: the logarithm of the softmax is computed directly, so a score far below the others
    gives a large error, not an infinite one. NumPy arrays are accepted like device arrays; both arguments must be of
    the same library. The sum does not depend on the number of threads or the device.

    Examples
    --------
    >>> import numpy as np
    >>> from klcore.compat.puzzlelib import KLDivergence
    >>> div = KLDivergence()
    >>> pred = np.array([[0.0, 0.0], [1.0, 3.0]], np.float32)
    >>> target = np.array([[0.5, 0.5], [1.0, 0.0]], np.float32)
    >>> error, grad = div(pred, target)
    >>> print(round(float(error), 6))
    1.063464
    >>> print(grad.round(4))
    [[ 0.      0.    ]
     [ 0.4404 -0.4404]]
    """

    def __init__(self, maxlabels: SupportsIndex | None = None, normTarget: bool = False) -> None:
        self.maxlabels = maxlabels
        self.normTarget = normTarget
        self.error: Any = None
        self.valError: Any = None
        self.grad: Any = None
        self.devErr: Any = 0.0
        self.dirty = True
        self.accumErr: Any = 0.0
        self.batchsize = 0
        self.numOfSamples = 0

    def __call__(self, pred: Any, target: Any, queryError: bool = True) -> Any:
        """The error and the gradient of a batch; both are also stored.

        Parameters
        ----------
        pred : float32 array of shape (batch, ...)
            Scores; their softmax is used.
        target : float32 array of the same shape
            Probabilities, or scores with `normTarget`.
        queryError : bool
            False returns only the gradient.

        Returns
        -------
        error : scalar
            The average error of a sample, in nats.
        grad : float32 array
            The direction of descent, in the shape of pred.

        Raises
        ------
        AssertionError
            For different shapes, and if the size of axis 1 is not `maxlabels`.
        AttributeError
            If an argument is not an array.
        KeyError
            For floating-point scores of another dtype than float32, including a target with `normTarget`.
        ValueError
            For probabilities of another dtype.
        TypeError
            For scores that are not floating-point, and arrays of two libraries.
        IndexError
            For 0-d arrays, and for `maxlabels` with 1-d arrays.
        ZeroDivisionError
            For an empty batch.
        """
        error, self.grad = self._compute(pred, target, "y")
        self.batchsize = pred.shape[0]
        self.devErr = error * self.batchsize
        self.accumErr = self.accumErr + self.devErr
        self.numOfSamples += self.batchsize
        self.dirty = not queryError
        if not queryError:
            return self.grad
        self.error = error
        return error, self.grad

    def value_and_grad(self, pred: Any, target: Any, *, cotangent: Any = None) -> tuple[Any, tuple[Any]]:
        """``(error, (grad,))`` with the gradient of a call, a direction of descent; nothing is stored.

        Parameters
        ----------
        pred, target : array
            As for a call. Arrays of PyTorch and JAX are taken without their history, and the results are plain arrays.
        cotangent : array or float, optional
            Multiplies the gradient.

        Returns
        -------
        error : scalar
            The average error of a sample, in nats.
        gradients : (array,)
            The direction of descent, in the shape of pred.
        """
        pred, target = detached(pred, target)
        error, grad = self._compute(pred, target, "y")
        if cotangent is not None:
            grad = grad * cast(cotangent_of(error, cotangent), "float32")
        return error, (grad,)

    def validate(self, pred: Any, target: Any) -> Any:
        """The error of a batch, which is stored only as `valError`."""
        self.valError = self._compute(pred, target, None)
        return self.valError

    def getError(self) -> Any:
        """The error of the last call."""
        if self.dirty:
            self.error = _mean(self.devErr, self.batchsize)
            self.dirty = False
        return self.error

    def getValError(self) -> Any:
        """The error of the last :meth:`validate`."""
        return self.valError

    def getMeanError(self) -> Any:
        """The average error of a sample over all batches since :meth:`resetAccumulator`."""
        return _mean(self.accumErr, self.numOfSamples)

    def resetAccumulator(self) -> None:
        """Forget the batches so far."""
        self.accumErr = 0.0
        self.batchsize = 0
        self.numOfSamples = 0

    def _compute(self, pred: Any, target: Any, return_grad: str | None) -> Any:
        self._check(pred, target)
        shape = tuple(pred.shape)
        batch = shape[0]
        if batch == 0:
            raise ZeroDivisionError("the batch is empty")
        rows = (batch, math.prod(shape[1:]))
        result = loss(
            "puzzlelib",
            target.reshape(rows),
            pred.reshape(rows),
            space=("logits" if self.normTarget else "probs", "logits"),
            reduction="sum",
            denominator=divisor_of(batch),
            return_grad=return_grad,
        )
        return result if return_grad is None else (result[0], result[1].reshape(shape))

    def _check(self, pred: Any, target: Any) -> None:
        truth(self.normTarget, "normTarget")
        dense(pred=pred, target=target)
        for name, array in (("pred", pred), ("target", target)):
            if not hasattr(array, "dtype") or not hasattr(array, "shape"):
                raise AttributeError(f"{name} must be an array, found {type(array).__name__}")
        one_library(pred=pred, target=target)
        if not pred.ndim or not target.ndim:
            raise IndexError("pred and target must have a batch axis, found a 0-d array")
        shapes = f"{tuple(pred.shape)} and {tuple(target.shape)}"
        if tuple(pred.shape) != tuple(target.shape):
            raise AssertionError(f"pred and target must have the same shape, found {shapes}")
        if truth(self.maxlabels, "maxlabels"):
            if pred.ndim == 1:
                raise IndexError("maxlabels is the size of axis 1, but pred has only one axis")
            if pred.shape[1] != self.maxlabels:
                raise AssertionError(f"axis 1 of pred must have size maxlabels={self.maxlabels}, found {shapes}")
        for name, array in (("pred", pred), ("target", target)):
            dtype = dtype_name(array)
            if dtype == "float32":
                continue
            message = f"{name} must be float32, found {dtype}; convert it first"
            if name == "target" and not self.normTarget:
                raise ValueError(message)
            raise KeyError(message) if "float" in dtype else TypeError(message)


def _mean(total: Any, count: int) -> Any:
    if count:
        return total / count
    warnings.warn("the mean error is NaN, because there was no batch yet", RuntimeWarning, stacklevel=3)
    return math.nan
