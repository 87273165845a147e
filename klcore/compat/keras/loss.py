"""The loss ``keras.losses.KLDivergence``: the values of the function, weighted and reduced."""

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
    from keras.losses import Loss as _Loss  # Any for mypy: Keras has no types
    from typing_extensions import Self  # in typing from Python 3.11
else:
    _Loss = object  # Keras is not imported here: `_keras_loss` adds its class

_MEANS = ("sum_over_batch_size", "mean")
_REDUCTIONS = (*_MEANS, "mean_with_sample_weight", "sum", "none", None)


class KLDivergence(_Loss):  # type: ignore[misc]
    """The loss of ``keras.losses.KLDivergence``, in nats. If Keras is loaded, instances are ``keras.losses.Loss``.

    Parameters
    ----------
    reduction : {"sum_over_batch_size", "mean", "mean_with_sample_weight", "sum", "none", None}
        "sum_over_batch_size" and "mean" are the same: they divide by the number of values of the function, which for
        sequences is larger than the batch. "mean_with_sample_weight" divides by the sum of the weights, as given. A
        divisor of 0 gives 0.
    name : str
        The name in Keras's logs.
    dtype : str, optional
        Both arguments are converted to it, including float64. None is Keras's float type, float32. A Keras dtype policy
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
    kullback_leibler_divergence : The values that are reduced.

    Notes
    -----
    Ranks are aligned as in Keras: if one array has one axis more than the other, and that last axis has size 1, the
    axis is removed; but if the other array is a vector, an axis of size 1 is added to it instead. Then NumPy's rules
    apply. So weights of shape (batch,) weight the *last* axis of values of shape (batch, steps), as in Keras 3; Keras 2
    weighted the first. Use (batch, 1).

    As in the original, values that are a scalar or an empty vector are not reduced.

    Import Keras before you create instances: an instance created without it stays a plain object, and Keras would apply
    weights to its reduced value. To load a model that was saved with it, import Keras and this module, in this order.

    float16 is computed in float32 and rounded once: the result is finite where Keras's own ratio overflows to infinity.

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
            As for :func:`kullback_leibler_divergence`, but converted to `dtype`, and with aligned ranks. A mask that
            Keras attached to `y_pred` becomes a weight.
        sample_weight : array or float, optional
            Multiplies the values of the function, of shape (...), after aligning the ranks.

        Returns
        -------
        array
            A scalar, or for "none" an array of the shape of the weighted values. In `dtype`.

        Raises
        ------
        TypeError, NotImplementedError
            As for :func:`kullback_leibler_divergence`.
        ValueError
            As for :func:`kullback_leibler_divergence`, and for weights that do not fit.
        """
        if tensorflow.are_there(y_true, y_pred, sample_weight):
            tensorflow.need_keras(self)
            return super().__call__(y_true, y_pred, sample_weight)  # Keras calls `call`, then weights and reduces
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
            As for a call. Arrays of PyTorch and JAX are taken without their history, and the results are plain arrays.
        cotangent : array or float, optional
            Multiplies the derivatives; of the shape of the value. None means ones.

        Returns
        -------
        value : array
            The loss.
        gradients : (array, array)
            With respect to y_true and y_pred, in their shapes and dtypes; in `dtype` for integers.

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
        if factors.ndim:  # one factor per value, with an axis of size 1 for the classes
            full = shape if weight is None else broadcast(shape, tuple(weight.shape), "the values and their weights")
            factors = sum_to(factors, full, shape).reshape((*values_shape, 1))
        _, *gradients = functions.engine(*arrays, factors=factors, return_grad=("x", "y"))
        return value, arguments.as_given(gradients, given)

    def get_config(self) -> dict[str, Any]:
        """The arguments for :meth:`from_config`."""
        return {"name": self.name, "reduction": self.reduction}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "KLDivergence":
        """An instance made from the result of :meth:`get_config`."""
        return KLDivergence(**config)

    def __reduce__(self) -> Any:
        return KLDivergence, (self.reduction, self.name, self.dtype)

    def _arrays(self, y_true: Any, y_pred: Any) -> tuple[Any, Any]:
        """Both in `dtype`, with aligned ranks."""
        y_true, y_pred = arguments.arrays_of(y_true, y_pred, self.dtype)
        of_true, of_pred = arguments.aligned(tuple(y_true.shape), tuple(y_pred.shape))
        return arguments.reshaped(y_true, of_true), arguments.reshaped(y_pred, of_pred)

    def _weight(self, shape: tuple[int, ...], like: Any, sample_weight: Any, mask: Any) -> tuple[tuple[int, ...], Any]:
        """The shape of the values, aligned with their weight, and the weight: sample_weight times mask, or None."""
        weight = None if sample_weight is None else arguments.converted(sample_weight, like, self.dtype)
        if mask is not None:
            valid = arguments.converted(mask, like, self.dtype)
            if self.reduction in _MEANS:  # so that the mean is over the values that are not masked
                valid = valid * arguments.ratio(float(math.prod(valid.shape)), valid.sum())
            weight = valid if weight is None else arguments.product(valid, weight)
        if weight is None:
            return shape, None
        shape, of_weight = arguments.aligned(shape, tuple(weight.shape))
        broadcast(shape, of_weight, "the values and their weights")
        return shape, weight.reshape(of_weight)

    def _divisor(self, shape: tuple[int, ...], weight: Any) -> Any:
        """The divisor of the sum of the weighted values; None if they are not reduced."""
        if weight is not None:
            shape = broadcast(shape, tuple(weight.shape), "the values and their weights")
        if self.reduction in ("none", None) or shape in ((), (0,)):
            return None
        if self.reduction == "mean_with_sample_weight" and weight is not None:
            return weight.sum()
        return 1 if self.reduction == "sum" else math.prod(shape)

    def _value(self, y_true: Any, y_pred: Any, shape: tuple[int, ...], weight: Any) -> Any:
        divisor = self._divisor(shape, weight)
        if weight is None and divisor is not None and type(self).call is KLDivergence.call:  # everything in one pass
            return functions.engine(y_true, y_pred, reduction="sum", denominator=divisor_of(divisor or 1))
        values = self.call(y_true, y_pred)
        if weight is not None:
            values = values.reshape(shape) * weight
        return values if divisor is None else cast(arguments.ratio(values.sum(), divisor), self.dtype)


@cache
def _keras_loss(keras: ModuleType, cls: type) -> type:
    """KLDivergence, or a subclass, as a Keras loss; attributes that both define are ours."""
    if issubclass(cls, keras.losses.Loss):
        return cls
    made = registration.named(cls, (cls, keras.losses.Loss), {})
    return registration.registered(keras, made) if cls is KLDivergence else made
