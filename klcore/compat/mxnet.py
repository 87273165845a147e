"""MXNet gluon's KLDivLoss: its parameters, axes and weights over klcore's engine."""

import math
import numbers
from typing import Any, NamedTuple

from klcore.compat._arguments import FLOATS, as_array, broadcast, cast, detached, dtype_name, quietly, sum_to
from klcore.divergence import loss

__all__ = ["KLDivLoss"]


class KLDivLoss:
    """The loss of ``mxnet.gluon.loss.KLDivLoss``: the mean of label*(log(label + 1e-12) - log_prob), for every sample.

    Parameters
    ----------
    from_logits : bool
        True: `pred` holds log-probabilities (the word means the opposite in other libraries). False: scores, whose
        log-softmax over `axis` is taken.
    axis : int
        Of the softmax; used with ``from_logits=False`` only.
    weight : float, optional
        What the loss is multiplied with.
    batch_axis : int
        The axis of the samples, which is kept.
    nonbatch : {"mean", "sum"}
        What is done with the terms of a sample. The mean is what MXNet's page says and all its versions do but 1.9.0
        and 1.9.1, which add up.

    Notes
    -----
    The mean is over all elements of a sample, not over its distributions, and weights are not in its denominator. The
    result is a vector of one loss a sample.

    ``MXNetError`` of the original is here a ValueError (shapes, axes) or a TypeError (dtypes). Different from it:
    pred and label must have one shape (the original broadcasts them by accident where it is not hybridized), integers
    are refused, 16-bit arrays are computed in float32 and rounded once. In float16, 1e-12 is 0, as in the original,
    and so a label of 0 gives NaN there.

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
        axis: int = -1,
        weight: float | None = None,
        batch_axis: int = 0,
        *,
        nonbatch: str = "mean",
    ) -> None:
        if nonbatch not in ("mean", "sum"):
            raise ValueError(f"nonbatch must be 'mean' or 'sum', found {nonbatch!r}")
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
            What the terms are multiplied with; broadcasts with them: (batch, 1, ...) for one weight a sample. Other
            shapes take memory of the size of pred.

        Returns
        -------
        array of shape (batch,)
            In the dtype of pred. Of PyTorch's and JAX' arrays differentiable with respect to all three.

        Raises
        ------
        AssertionError
            If `weight` is no number.
        TypeError
            For what is no array, dtypes that differ or are not floating-point, an axis that is no integer, and
            arguments by keyword.
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
            As for a call. Of PyTorch's and JAX' arrays the values are taken, and plain arrays are returned.
        cotangent : array of shape (batch,) or float, optional
            What the derivatives are multiplied with; None: ones.

        Returns
        -------
        value : array of shape (batch,)
            The loss.
        gradients : tuple of arrays
            With respect to pred, label and, where it is given, sample_weight, in their shapes and dtypes.

        Notes
        -----
        A row whose cotangent or weight is 0 has the derivative 0, where the original may have NaN.
        """
        pred, label, weights = self._checked(*detached(pred, label, sample_weight))
        call = self._engine_call(pred, label)
        if weights is None and cotangent is None:
            value, d_label, d_pred = call.loss(return_grad=("x", "y"))
            return call.finish(value), (d_pred.reshape(pred.shape), d_label.reshape(pred.shape))

        value = self._value(pred, label, weights)
        name = dtype_name(pred)
        shape = tuple(pred.shape)
        full = (
            shape if weights is None else broadcast(tuple(pred.shape), tuple(weights.shape), "pred and sample_weight")
        )
        spread = [1] * len(full)
        spread[_axis("batch_axis", self.batch_axis, len(full))] = -1
        factors = as_array(1.0 if cotangent is None else cotangent, value, name)
        factors = factors.reshape(spread) if factors.ndim else factors
        plain = call._replace(view=shape, axis=call.axis if not self.from_logits else -1)
        if weights is None:
            _, d_label, d_pred = plain.loss("sum", factors=factors, return_grad=("x", "y"))
            return value, (d_pred, d_label)
        weighted = plain._replace(denominator=self._denominator(full))
        products = factors * weights
        if full != shape:
            products = sum_to(products, full, shape)
        _, d_label, d_pred = weighted.loss("sum", factors=products, return_grad=("x", "y"))
        d_weight = sum_to(weighted.loss("none") * factors, full, tuple(weights.shape))
        return value, (d_pred, d_label, cast(d_weight, dtype_name(weights)))

    def _checked(self, pred: Any, label: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
        if not (self.weight is None or isinstance(self.weight, numbers.Number)):
            raise AssertionError(f"weight must be a number, found {self.weight!r}")
        for word, array in (("pred", pred), ("label", label)):
            if not hasattr(array, "dtype") or not hasattr(array, "shape"):
                raise TypeError(f"{word} must be an array, found {type(array).__name__}")
            if dtype_name(array) not in FLOATS:
                raise TypeError(f"{word} must be of {', '.join(FLOATS)}, found {dtype_name(array)}")
        if dtype_name(pred) != dtype_name(label):
            raise TypeError(
                f"pred and label must be of one dtype, found {dtype_name(pred)} and {dtype_name(label)}; convert one"
            )
        if tuple(pred.shape) != tuple(label.shape):
            raise ValueError(f"pred and label must be of one shape, found {tuple(pred.shape)} and {tuple(label.shape)}")
        if not pred.ndim:
            raise ValueError("pred must have a batch axis, found an array without dimensions")
        weights = None if sample_weight is None else as_array(sample_weight, pred, dtype_name(pred))
        return pred, label, weights

    def _denominator(self, shape: tuple[int, ...]) -> float:
        """What the sum over a sample of this shape is divided by; the weight is in it, 0 as its infinite inverse."""
        batch = shape[_axis("batch_axis", self.batch_axis, len(shape))]
        count = 1.0 if self.nonbatch == "sum" else math.prod(shape) / batch if batch else 1.0
        weight = 1.0 if self.weight is None else float(self.weight)
        return (count / weight if weight else math.inf) or math.nan  # the mean of nothing is NaN

    def _engine_call(self, pred: Any, label: Any) -> "_Call":
        """How the engine adds up as much as it can in its pass."""
        shape = tuple(pred.shape)
        batch = _axis("batch_axis", self.batch_axis, len(shape))
        before, n, after = math.prod(shape[:batch]), shape[batch], math.prod(shape[batch + 1 :])
        view = shape
        leftover: tuple[int, ...] = ()
        if not self.from_logits:
            axis = _axis("axis", self.axis, len(shape))
            if axis == batch:
                reduction, leftover = "none", tuple(k for k in range(len(shape)) if k != batch)
            else:
                reduction = "row"
                kept = [k for k in range(len(shape)) if k != axis]
                leftover = tuple(i for i, k in enumerate(kept) if k != batch)
        elif len(shape) == 1:
            axis, reduction = 0, "none"
        elif before == 1:  # any axis may be that of the classes: all of a sample, if its elements are neighbours
            view, axis, reduction = (n, after), 1, "row"
        elif after == 1:
            view, axis, reduction = (before, n), 0, "row"
        else:
            view, axis, reduction, leftover = (before, n, after), 2, "row", (0,)
        return _Call(pred, label, view, axis, reduction, leftover, self._denominator(shape), bool(self.from_logits))

    def _value(self, pred: Any, label: Any, weights: Any) -> Any:
        call = self._engine_call(pred, label)
        if weights is None:
            return call.finish(call.loss())
        full = broadcast(tuple(pred.shape), tuple(weights.shape), "pred and sample_weight")
        batch = _axis("batch_axis", self.batch_axis, len(full))
        if len(full) == pred.ndim and math.prod(weights.shape) == (
            weights.shape[batch] if weights.ndim == len(full) else 1
        ):
            return call.finish(call.loss()) * weights.reshape(-1)  # one weight a sample
        terms = call._replace(
            view=tuple(pred.shape), axis=-1 if self.from_logits else call.axis, denominator=self._denominator(full)
        )
        leftover = tuple(k for k in range(len(full)) if k != batch)
        return terms._replace(leftover=leftover).finish(terms.loss("none") * weights)


class _Call(NamedTuple):
    """The arguments of a call of the engine, and which axes of its result are to be added up after it."""

    pred: Any
    label: Any
    view: tuple[int, ...]
    axis: int
    reduction: str
    leftover: tuple[int, ...]
    denominator: float
    from_logits: bool

    def loss(self, reduction: str | None = None, factors: Any = None, return_grad: Any = None) -> Any:
        return loss(
            "mxnet",
            self.label.reshape(self.view),
            self.pred.reshape(self.view),
            space=("probs", "log_probs" if self.from_logits else "logits"),
            axis=self.axis,
            reduction=reduction or self.reduction,
            factors=factors,
            denominator=self.denominator,
            epsilon=0.0 if dtype_name(self.pred) == "float16" else 1e-12,
            return_grad=return_grad,
        )

    def finish(self, value: Any) -> Any:
        return cast(value.sum(self.leftover) if self.leftover else value, dtype_name(self.pred))


def _axis(word: str, axis: int, ndim: int) -> int:
    if not isinstance(axis, numbers.Integral):
        raise TypeError(f"{word} must be an integer, found {axis!r}")
    if not -ndim <= axis < ndim:
        raise ValueError(f"{word} must be within [{-ndim}, {ndim}) for arrays of {ndim} axes, found {axis}")
    return int(axis) % ndim
