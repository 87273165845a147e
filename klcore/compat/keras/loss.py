"""The loss ``keras.losses.KLDivergence``: the function's values, weighted and reduced."""

import math
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from klcore.compat._arguments import (
    InitSignature,
    broadcast,
    cast,
    cotangent_of,
    detached,
    divisor_of,
    quietly,
    sum_to,
    word_of,
)
from klcore.compat.keras import arguments, functions, registration, tensorflow

if TYPE_CHECKING:
    from keras.losses import Loss as _Loss  # which for mypy is anything: Keras has no types
    from typing_extensions import Self  # in typing from Python 3.11
else:
    _Loss = object  # Keras is not imported here: `_keras_loss` brings its class in

_MEANS = ("sum_over_batch_size", "mean")
_REDUCTIONS = (*_MEANS, "mean_with_sample_weight", "sum", "none", None)


class KLDivergence(_Loss):  # type: ignore[misc]
    """The loss of ``keras.losses.KLDivergence``, in nats. Where Keras is loaded, instances are ``keras.losses.Loss``.

    Parameters
    ----------
    reduction : {"sum_over_batch_size", "mean", "mean_with_sample_weight", "sum", "none", None}
        "sum_over_batch_size" and "mean", which are the same, divide by the number of values of the function, which for
        sequences is more than the size of the batch. "mean_with_sample_weight" divides by the sum of the weights, as
        they are given. A divisor of 0 makes 0.
    name : str
        For Keras' logs.
    dtype : str, optional
        To which both arguments are cast, float64 included: None is Keras' float type, float32. A policy of Keras'
        stands for its compute dtype.

    Attributes
    ----------
    reduction, name, dtype
        As given.

    Raises
    ------
    ValueError
        For an unknown reduction.

    See Also
    --------
    kullback_leibler_divergence : the values that are reduced.

    Notes
    -----
    Ranks are aligned as Keras does: if two arrays differ by one axis, and the longer ends in one of size 1, it loses
    that; but if the shorter is a vector, this gets one. Then NumPy's rules apply. So weights of shape (batch,) weigh
    the *last* axis of values of shape (batch, steps), as in Keras 3; Keras 2 weighed the first. Say (batch, 1).

    As in the original, values that are a scalar or an empty vector are not reduced.

    Import Keras before instances are made: one made without it stays a plain object, whose weights Keras would apply to
    the reduced value. Models that were saved with it load where Keras and this module are imported, in this order.

    float16 is computed in float32 and rounded once: where Keras' own ratio overflows to infinity, this is finite.

    Examples
    --------
    >>> import numpy as np
    >>> from klcore.compat.keras import KLDivergence
    >>> y_true = np.array([[0.0, 1.0], [0.5, 0.5]])
    >>> y_pred = np.array([[0.6, 0.4], [0.4, 0.6]])
    >>> loss = KLDivergence(dtype="float64")
    >>> print(loss(y_true, y_pred).round(6), loss(y_true, y_pred, sample_weight=np.array([0.0, 2.0])).round(6))
    0.46835 0.020411
    >>> value, (d_true, d_pred) = loss.value_and_grad(y_true, y_pred)
    >>> print(d_pred.round(4))
    [[-0.     -1.25  ]
     [-0.625  -0.4167]]
    """

    __signature__ = InitSignature()

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Self":
        keras, kind = registration.loaded(), cls  # type: Any, Any
        return object.__new__(kind if keras is None else _keras_loss(keras, kind))

    def __init__(
        self, reduction: str | None = "sum_over_batch_size", name: str = "kl_divergence", dtype: Any = None
    ) -> None:
        self.reduction = word_of(reduction, "reduction", _REDUCTIONS)
        self.name = name
        self._dtype = arguments.dtype_of(dtype)

    @property
    def dtype(self) -> str:
        return self._dtype

    @quietly
    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The reduced loss.

        Parameters
        ----------
        y_true, y_pred : array of shape (..., n)
            As for :func:`kullback_leibler_divergence`; but cast to `dtype`, and their ranks aligned. A mask that Keras
            attached to `y_pred` becomes a weight.
        sample_weight : array or float, optional
            Aligned with the values of the function, shape (...), and multiplied with them.

        Returns
        -------
        array
            A scalar; for "none" of the shape of the weighted values. In `dtype`.

        Raises
        ------
        TypeError, ValueError
            As :func:`kullback_leibler_divergence`, and ValueError for weights that do not fit.
        NotImplementedError
            As :func:`kullback_leibler_divergence`.
        """
        if tensorflow.are_there(y_true, y_pred, sample_weight):
            tensorflow.need_keras(self)
            return super().__call__(y_true, y_pred, sample_weight)  # weights and reductions by Keras, around `call`
        mask = arguments.mask_of(y_pred)
        y_true, y_pred = self._arrays(y_true, y_pred)
        shape, weight = self._weight(arguments.values_shape(y_true, y_pred), y_pred, sample_weight, mask)
        return self._value(y_true, y_pred, shape, weight)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """The values before weights and reduction, of shape (...)."""
        return functions.engine(*self._arrays(y_true, y_pred))

    @quietly
    def value_and_grad(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None, *, cotangent: Any = None
    ) -> tuple[Any, tuple[Any, Any]]:
        """The loss and its derivatives, for arrays without automatic differentiation.

        Parameters
        ----------
        y_true, y_pred, sample_weight : array
            As for a call. Of PyTorch's and JAX' arrays the values are taken, and plain arrays are returned.
        cotangent : array or float, optional
            What the derivatives are multiplied with, of the shape of the value; None: ones.

        Returns
        -------
        value : array
            The loss.
        gradients : (array, array)
            With respect to y_true and y_pred, in their shapes and dtypes; in `dtype` where those are integers.

        Notes
        -----
        A row whose cotangent or weight is 0 has the derivative 0, where the original may have NaN.
        """
        tensorflow.refuse(y_true, y_pred, sample_weight)
        mask = arguments.mask_of(y_pred)
        given = detached(y_true, y_pred)
        arrays = self._arrays(*given)
        values_shape = arguments.values_shape(*arrays)
        shape, weight = self._weight(values_shape, arrays[1], *detached(sample_weight, mask))
        divisor = self._divisor(shape, weight)
        if weight is None and cotangent is None:
            reduced = {} if divisor is None else {"reduction": "sum", "denominator": divisor_of(divisor or 1)}
            value, *gradients = functions.engine(*arrays, **reduced, return_grad=("x", "y"))
            return value, arguments.as_given(gradients, given)

        value = self._value(*arrays, shape, weight)
        factors = cotangent_of(value, 1.0 if cotangent is None else cotangent)
        if weight is not None:
            factors = factors * weight
        if divisor is not None:
            factors = arguments.ratio(factors, divisor)
        if factors.ndim:  # one factor for every value: of their shape, with an axis of size 1 for the classes
            full = shape if weight is None else broadcast(shape, tuple(weight.shape), "the values and their weights")
            factors = sum_to(factors, full, shape).reshape((*values_shape, 1))
        _, *gradients = functions.engine(*arrays, factors=factors, return_grad=("x", "y"))
        return value, arguments.as_given(gradients, given)

    def get_config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs."""
        return {"name": self.name, "reduction": self.reduction}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "KLDivergence":
        """An instance from what :meth:`get_config` returned."""
        return KLDivergence(**config)

    def __reduce__(self) -> Any:
        return KLDivergence, (self.reduction, self.name, self.dtype)

    def _arrays(self, y_true: Any, y_pred: Any) -> tuple[Any, Any]:
        """Both in `dtype`, their ranks aligned."""
        y_true, y_pred = arguments.arrays_of(y_true, y_pred, self.dtype)
        of_true, of_pred = arguments.aligned(tuple(y_true.shape), tuple(y_pred.shape))
        return arguments.reshaped(y_true, of_true), arguments.reshaped(y_pred, of_pred)

    def _weight(self, shape: tuple[int, ...], like: Any, sample_weight: Any, mask: Any) -> tuple[tuple[int, ...], Any]:
        """The shape of the values, aligned with their weight, and that: sample_weight and mask in one, or None."""
        weight = None if sample_weight is None else arguments.converted(sample_weight, like, self.dtype)
        if mask is not None:
            valid = arguments.converted(mask, like, self.dtype)
            if self.reduction in _MEANS:  # so that the mean is over what is not masked
                valid = valid * arguments.ratio(float(math.prod(valid.shape)), valid.sum())
            weight = valid if weight is None else arguments.product(valid, weight)
        if weight is None:
            return shape, None
        shape, of_weight = arguments.aligned(shape, tuple(weight.shape))
        broadcast(shape, of_weight, "the values and their weights")
        return shape, weight.reshape(of_weight)

    def _divisor(self, shape: tuple[int, ...], weight: Any) -> Any:
        """What the sum of the weighted values is divided by; None: they are not reduced."""
        if weight is not None:
            shape = broadcast(shape, tuple(weight.shape), "the values and their weights")
        if self.reduction in ("none", None) or shape in ((), (0,)):
            return None
        if self.reduction == "mean_with_sample_weight" and weight is not None:
            return weight.sum()
        return 1 if self.reduction == "sum" else math.prod(shape)

    def _value(self, y_true: Any, y_pred: Any, shape: tuple[int, ...], weight: Any) -> Any:
        divisor = self._divisor(shape, weight)
        if weight is None and divisor is not None and type(self).call is KLDivergence.call:  # all of it in one pass
            return functions.engine(y_true, y_pred, reduction="sum", denominator=divisor_of(divisor or 1))
        values = self.call(y_true, y_pred)
        if weight is not None:
            values = values.reshape(shape) * weight
        return values if divisor is None else cast(arguments.ratio(values.sum(), divisor), self.dtype)


@cache
def _keras_loss(keras: ModuleType, cls: type) -> type:
    """KLDivergence, or a subclass, as a loss of Keras'; what both define is ours."""
    if issubclass(cls, keras.losses.Loss):
        return cls
    made = registration.named(cls, (cls, keras.losses.Loss), {})
    return registration.registered(keras, made) if cls is KLDivergence else made
