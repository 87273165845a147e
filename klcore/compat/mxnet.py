"""MXNet Gluon's KLDivLoss: its parameters, axes and weights on klcore's engine."""

import math
import numbers
from typing import Any, SupportsFloat, SupportsIndex

from klcore.compat._arguments import (
    FLOATS,
    as_array,
    broadcast,
    cast,
    cotangent_of,
    dense,
    detached,
    divisor_of,
    dtype_name,
    number,
    one_library,
    quietly,
    shown,
    sum_to,
    truth,
    word_of,
)
from klcore.divergence import loss

__all__ = ["KLDivLoss"]


class KLDivLoss:
    """The loss of ``mxnet.gluon.loss.KLDivLoss``: the mean of label*(log(label + 1e-12) - log_prob) for every sample.

    Parameters
    ----------
    from_logits : bool
        True: `pred` holds log-probabilities (other libraries use this name with the opposite meaning). False: `pred`
        holds scores, and their log-softmax over `axis` is used.
    axis : int
        The axis of the softmax; only with ``from_logits=False``.
    weight : float, optional
        Multiplies the loss.
    batch_axis : int
        The axis of the samples, which is kept.
    nonbatch : {"mean", "sum"}
        How the terms of a sample are reduced. "mean" is documented by MXNet, and computed by all its versions except
        1.9.0 and 1.9.1, which compute the sum.

    See Also
    --------
    klcore.kl_div : For new code; takes logits, and is never negative.

    Notes
    -----
    The mean is over all elements of a sample, not over its distributions, and does not divide by the weights. The
    result is a vector with one loss per sample.

    Where the original raises ``MXNetError``, this raises ValueError (shapes, axes) or TypeError (dtypes). Other
    differences: pred and label must have the same shape (if it is not hybridized, the original accidentally broadcasts
    them); integers raise; 16-bit arrays are computed in float32 and rounded once. In float16, 1e-12 is 0, as in the
    original, so a label of 0 gives NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from klcore.compat.mxnet import KLDivLoss
    >>> pred = np.log([[0.5, 0.5], [0.9, 0.1]])
    >>> label = np.array([[0.25, 0.75], [0.9, 0.1]])
    >>> print(KLDivLoss()(pred, label).round(6) + 0.0)
    [0.065406 0.      ]
    >>> print(KLDivLoss(nonbatch="sum")(pred, label, np.array([[1.0], [2.0]])).round(6) + 0.0)
    [0.130812 0.      ]
    """

    def __init__(
        self,
        from_logits: Any = True,
        axis: SupportsIndex = -1,
        weight: SupportsFloat | None = None,
        batch_axis: SupportsIndex = 0,
        *,
        nonbatch: str = "mean",
    ) -> None:
        word_of(nonbatch, "nonbatch", ("mean", "sum"))
        self.from_logits = from_logits
        self.axis = axis
        self.weight = weight
        self.batch_axis = batch_axis
        self.nonbatch = nonbatch

    def __repr__(self) -> str:
        return f"KLDivLoss(batch_axis={self.batch_axis}, w={self.weight})"

    @quietly
    def __call__(self, pred: Any, label: Any, sample_weight: Any = None, /) -> Any:
        """The loss of every sample, in nats.

        Parameters
        ----------
        pred : array of shape (..., batch, ...)
            Log-probabilities, or scores: float64, float32, float16 or bfloat16.
        label : array of the same shape and dtype
            Probabilities.
        sample_weight : array, optional
            Multiplies the terms, with which it broadcasts: (batch, 1, ...) for one weight per sample. Other shapes need
            memory of the size of pred.

        Returns
        -------
        array of shape (batch,)
            In the dtype of pred. For arrays of PyTorch and JAX, differentiable with respect to all three arguments.

        Raises
        ------
        AssertionError
            If `weight` is not a number.
        TypeError
            If an argument is not an array, for dtypes that differ or are not floating-point, for an axis that is not an
            integer, and for arguments passed by keyword.
        ValueError
            For shapes that differ or do not broadcast, and axes out of range.
        """
        return self._value(*self._checked(pred, label, sample_weight))

    @quietly
    def value_and_grad(
        self, pred: Any, label: Any, sample_weight: Any = None, /, *, cotangent: Any = None
    ) -> tuple[Any, tuple[Any, ...]]:
        """The loss and its derivatives, for arrays without automatic differentiation.

        Parameters
        ----------
        pred, label, sample_weight : array
            As for a call. Arrays of PyTorch and JAX are taken without their history, and the results are plain arrays.
        cotangent : array of shape (batch,) or float, optional
            Multiplies the derivatives. None means ones.

        Returns
        -------
        value : array of shape (batch,)
            The loss.
        gradients : tuple of arrays
            With respect to pred, label and, if given, sample_weight, in their shapes and dtypes.

        Notes
        -----
        A row whose cotangent or weight is 0 has the derivative 0, where the original may have NaN.
        """
        pred, label, weights = self._checked(*detached(pred, label, sample_weight))
        if weights is None and cotangent is None:
            value, d_label, d_pred = self._sums(pred, label, ("x", "y"))
            return value, (d_pred, d_label)

        value = self._value(pred, label, weights)
        shape = tuple(pred.shape)
        full = shape if weights is None else broadcast(shape, tuple(weights.shape), "pred and sample_weight")
        factors = cotangent_of(value, 1.0 if cotangent is None else cotangent)
        if factors.ndim:  # along the batch axis
            factors = factors.reshape([-1 if k == self._batch(full) else 1 for k in range(len(full))])
        options = {"denominator": self._denominator(full)}
        if weights is None:
            _, d_label, d_pred = self._engine(pred, label, "sum", factors=factors, return_grad=("x", "y"), **options)
            return value, (d_pred, d_label)
        d_weight = sum_to(self._engine(pred, label, "none", **options) * factors, full, tuple(weights.shape))
        factors = factors * weights
        if full != shape:
            factors = sum_to(factors, full, shape)
        _, d_label, d_pred = self._engine(pred, label, "sum", factors=factors, return_grad=("x", "y"), **options)
        return value, (d_pred, d_label, cast(d_weight, dtype_name(weights)))

    def _checked(self, pred: Any, label: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
        if not (self.weight is None or isinstance(self.weight, numbers.Number)):
            raise AssertionError(f"weight must be a number, found {shown(self.weight)}")
        truth(self.from_logits, "from_logits")
        dense(pred=pred, label=label)
        for word, array in (("pred", pred), ("label", label)):
            if not hasattr(array, "dtype") or not hasattr(array, "shape"):
                raise TypeError(f"{word} must be an array, found {type(array).__name__}")
            if dtype_name(array) not in FLOATS:
                raise TypeError(f"{word} must have dtype {', '.join(FLOATS)}, found {dtype_name(array)}")
        one_library(pred=pred, label=label)
        if dtype_name(pred) != dtype_name(label):
            raise TypeError(
                f"pred and label must have the same dtype, found {dtype_name(pred)} and {dtype_name(label)}; convert "
                "one of them"
            )
        if tuple(pred.shape) != tuple(label.shape):
            raise ValueError(
                f"pred and label must have the same shape, found {tuple(pred.shape)} and {tuple(label.shape)}"
            )
        if not pred.ndim:
            raise ValueError("pred must have a batch axis, found a 0-d array")
        weights = None if sample_weight is None else as_array(sample_weight, pred, dtype_name(pred))
        return pred, label, weights

    def _batch(self, shape: tuple[int, ...]) -> int:
        return _axis("batch_axis", self.batch_axis, len(shape))

    def _denominator(self, shape: tuple[int, ...]) -> float:
        """The divisor of the sum over a sample, for terms of this shape.

        It includes the inverse of the weight, which saves a pass. A weight of 0 gives inf, and so NaN for infinite
        terms.
        """
        batch = self._batch(shape)
        count = 1 if self.nonbatch == "sum" else math.prod(shape[:batch] + shape[batch + 1 :])
        weight = 1.0 if self.weight is None else number(self.weight, "weight")
        return divisor_of(count / weight) if weight else math.inf

    def _engine(self, pred: Any, label: Any, reduction: str, **options: Any) -> Any:
        """The loss of the engine. With `from_logits`, any axis can be the class axis."""
        axis = options.pop("axis", -1 if self.from_logits else self.axis)
        return loss(
            "mxnet",
            label,
            pred,
            space=("probs", "log_probs" if self.from_logits else "logits"),
            axis=axis,
            reduction=reduction,
            epsilon=0.0 if dtype_name(pred) == "float16" else 1e-12,
            **options,
        )

    def _value(self, pred: Any, label: Any, weights: Any) -> Any:
        if weights is None:
            return self._sums(pred, label)[0]
        shape, of_weights = tuple(pred.shape), tuple(weights.shape)
        full = broadcast(shape, of_weights, "pred and sample_weight")
        batch = self._batch(full)
        samples = of_weights[batch] if len(of_weights) == len(full) else 1
        if len(full) == len(shape) and math.prod(of_weights) == samples:  # one weight per sample
            return self._sums(pred, label)[0] * weights.reshape(-1)
        terms = self._engine(pred, label, "none", denominator=self._denominator(full)) * weights
        return cast(_sum(terms, [k for k in range(len(full)) if k != batch]), dtype_name(pred))

    def _sums(self, pred: Any, label: Any, return_grad: tuple[str, str] | None = None) -> list[Any]:
        """The losses of the samples, without sample weights, and the gradients that `return_grad` asks for."""
        shape = tuple(pred.shape)
        view, axis, reduction, leftover = self._layout(shape)
        found = self._engine(
            pred.reshape(view),
            label.reshape(view),
            reduction,
            axis=axis,
            denominator=self._denominator(shape),
            return_grad=return_grad,
        )
        value, *gradients = found if return_grad else (found,)
        return [cast(_sum(value, leftover), dtype_name(pred)), *(g.reshape(shape) for g in gradients)]

    def _layout(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, str, list[int]]:
        """(shape for the engine, class axis, reduction, axes left to sum), so that the engine adds up all it can."""
        batch = self._batch(shape)
        others = [k for k in range(len(shape)) if k != batch]
        if self.from_logits:  # a whole sample can be one row
            before, n, after = math.prod(shape[:batch]), shape[batch], math.prod(shape[batch + 1 :])
            if not others:
                return shape, 0, "none", []
            if before == 1:
                return (n, after), 1, "row", []
            return ((before, n), 0, "row", []) if after == 1 else ((before, n, after), 2, "row", [0])
        axis = _axis("axis", self.axis, len(shape))
        if axis == batch:
            return shape, axis, "none", others
        return shape, axis, "row", [k - (k > axis) for k in others if k != axis]


def _sum(array: Any, axes: list[int]) -> Any:
    return array.sum(tuple(axes)) if axes else array


def _axis(word: str, axis: Any, ndim: int) -> int:
    if not isinstance(axis, numbers.Integral):
        raise TypeError(f"{word} must be an integer, found {shown(axis)}")
    axis = int(axis)
    if not -ndim <= axis < ndim:
        raise ValueError(f"{word} must be in [{-ndim}, {ndim}) for arrays with {ndim} axes, found {shown(axis)}")
    return axis % ndim
