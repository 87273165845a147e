"""Keras' Kullback-Leibler divergence: the functions, the loss and the metric, with Keras 3's reductions and weights.

Keras itself is not imported. Where the process has loaded it, its epsilon and float type are used, and the classes are
made Keras' own kind, so that a model takes them.
"""

import math
import sys
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np

from klcore.compat._arguments import (
    FLOATS,
    InitSignature,
    as_array,
    broadcast,
    cast,
    cotangent_of,
    dense,
    detached,
    dtype_name,
    is_array,
    namespace,
    number,
    quietly,
    shown,
    sum_to,
    with_gradients,
    word_of,
)
from klcore.divergence import loss

if TYPE_CHECKING:
    from keras.losses import Loss as _Loss  # which for mypy is anything: Keras has no types
    from keras.metrics import Metric as _Metric
    from typing_extensions import Self  # in typing from Python 3.11
else:
    _Loss = _Metric = object  # Keras is not imported here: `_keras_loss` and `_keras_metric` bring its classes in

__all__ = [
    "KLD",
    "KLDivergence",
    "KLDivergenceMetric",
    "epsilon",
    "kl_divergence",
    "kld",
    "kullback_leibler_divergence",
    "set_epsilon",
]

_MEANS = ("sum_over_batch_size", "mean")
_REDUCTIONS = (*_MEANS, "mean_with_sample_weight", "sum", "none", None)
_epsilon = 1e-7  # where there is no Keras to hold it


def epsilon() -> float:
    """What probabilities are clipped at: that of Keras where it is loaded, else this module's.

    Examples
    --------
    >>> from klcore.compat.keras import epsilon
    >>> print(epsilon())
    1e-07
    """
    keras = _keras()
    return _epsilon if keras is None else float(keras.config.epsilon())


def set_epsilon(value: SupportsFloat) -> None:
    """Change what probabilities are clipped at: in Keras where it is loaded, else in this module.

    Parameters
    ----------
    value : float
        The smallest probability; from the next call on.

    Examples
    --------
    >>> from klcore.compat.keras import set_epsilon
    >>> set_epsilon(1e-7)
    """
    global _epsilon
    keras, value = _keras(), number(value, "epsilon")
    if keras is None:
        _epsilon = value
    else:
        keras.config.set_epsilon(value)


@quietly
def _value_and_grad(y_true: Any, y_pred: Any, *, cotangent: Any = None) -> tuple[Any, tuple[Any, Any]]:
    """:func:`kullback_leibler_divergence` and its derivatives: ``(value, (d_true, d_pred))``."""
    given = detached(y_true, y_pred)
    arrays = _arrays(*given)
    value = None if cotangent is None else _engine(*arrays)
    factors = None if value is None else cotangent_of(value, cotangent)[..., None]
    passed, d_true, d_pred = _engine(*arrays, factors=factors, return_grad=("x", "y"))
    return passed if value is None else value, _as_given((d_true, d_pred), given)


@with_gradients(_value_and_grad)
@quietly
def kullback_leibler_divergence(y_true: Any, y_pred: Any) -> Any:
    """Keras' divergence of predictions from the truth: the sum of t*log(t/p) over the last axis, in nats.

    Both arguments are clipped to [epsilon, 1] first; see :func:`epsilon`. Also called `kl_divergence`, `KLD` and `kld`.

    Parameters
    ----------
    y_true : array of shape (..., n)
        True probabilities. Cast to the dtype of `y_pred`.
    y_pred : array of shape (..., n)
        Predicted probabilities: float64, float32, float16 or bfloat16. Integers and lists are taken as Keras' float
        type, float32. The two broadcast, along any axis.

    Returns
    -------
    array of shape (...)
        In the dtype of `y_pred`. Of PyTorch's and JAX' arrays differentiable with respect to both.

    Raises
    ------
    TypeError
        For complex numbers and arrays of two libraries.
    ValueError
        For shapes that do not broadcast, and arguments without dimensions.

    Notes
    -----
    The truth comes first, unlike in the other four systems. Because both sides are clipped, a class with t = 0 still
    contributes about -1.6e-6, the value can be negative, and a prediction of 0 has the gradient 0. At the bounds of the
    clipping the gradient passes (TensorFlow's and PyTorch's convention; that of Keras on JAX is half of it). In float32
    and narrower the epsilon is rounded to the dtype.

    ``kullback_leibler_divergence.value_and_grad(y_true, y_pred, cotangent=None)`` returns the derivatives, too; see
    :meth:`KLDivergence.value_and_grad`.

    Examples
    --------
    >>> import numpy as np
    >>> from klcore.compat.keras import kullback_leibler_divergence
    >>> y_true = np.array([[0.0, 1.0], [0.5, 0.5]])
    >>> y_pred = np.array([[0.6, 0.4], [0.4, 0.6]])
    >>> print(kullback_leibler_divergence(y_true, y_pred).round(6))
    [0.916289 0.020411]
    """
    return _engine(*_arrays(y_true, y_pred))


@with_gradients(_value_and_grad)
def kl_divergence(y_true: Any, y_pred: Any) -> Any:
    """:func:`~klcore.compat.keras.kullback_leibler_divergence`, under the name that Keras 3 writes into its logs."""
    return kullback_leibler_divergence(y_true, y_pred)


KLD = kld = kl_divergence


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
        keras, kind = _keras(), cls  # type: Any, Any
        return object.__new__(kind if keras is None else _keras_loss(keras, kind))

    def __init__(
        self, reduction: str | None = "sum_over_batch_size", name: str = "kl_divergence", dtype: Any = None
    ) -> None:
        self.reduction = word_of(reduction, "reduction", _REDUCTIONS)
        self.name = name
        self._dtype = _dtype(dtype)

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
        """
        mask = _mask(y_pred)
        y_true, y_pred = self._arrays(y_true, y_pred)
        shape, weight = self._weight(_values_shape(y_true, y_pred), y_pred, sample_weight, mask)
        return self._value(y_true, y_pred, shape, weight)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """The values before weights and reduction, of shape (...)."""
        return _engine(*self._arrays(y_true, y_pred))

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
        mask = _mask(y_pred)
        given = detached(y_true, y_pred)
        arrays = self._arrays(*given)
        values_shape = _values_shape(*arrays)
        shape, weight = self._weight(values_shape, arrays[1], *detached(sample_weight, mask))
        divisor = self._divisor(shape, weight)
        if weight is None and cotangent is None:
            reduced = {} if divisor is None else {"reduction": "sum", "denominator": float(divisor or 1)}
            value, *gradients = _engine(*arrays, **reduced, return_grad=("x", "y"))
            return value, _as_given(gradients, given)

        value = self._value(*arrays, shape, weight)
        factors = cotangent_of(value, 1.0 if cotangent is None else cotangent)
        if weight is not None:
            factors = factors * weight
        if divisor is not None:
            factors = _ratio(factors, divisor)
        if factors.ndim:  # one factor for every value: of their shape, with an axis of size 1 for the classes
            full = shape if weight is None else broadcast(shape, tuple(weight.shape), "the values and their weights")
            factors = sum_to(factors, full, shape).reshape((*values_shape, 1))
        _, *gradients = _engine(*arrays, factors=factors, return_grad=("x", "y"))
        return value, _as_given(gradients, given)

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
        y_true, y_pred = _arrays(y_true, y_pred, self.dtype)
        of_true, of_pred = _aligned(tuple(y_true.shape), tuple(y_pred.shape))
        return y_true.reshape(of_true), y_pred.reshape(of_pred)

    def _weight(self, shape: tuple[int, ...], like: Any, sample_weight: Any, mask: Any) -> tuple[tuple[int, ...], Any]:
        """The shape of the values, aligned with their weight, and that: sample_weight and mask in one, or None."""
        weight = None if sample_weight is None else _like(sample_weight, like, self.dtype)
        if mask is not None:
            valid = _like(mask, like, self.dtype)
            if self.reduction in _MEANS:  # so that the mean is over what is not masked
                valid = valid * _ratio(float(math.prod(valid.shape)), valid.sum())
            weight = valid if weight is None else _product(valid, weight)
        if weight is None:
            return shape, None
        shape, of_weight = _aligned(shape, tuple(weight.shape))
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
            return _engine(y_true, y_pred, reduction="sum", denominator=float(divisor or 1))
        values = self.call(y_true, y_pred)
        if weight is not None:
            values = values.reshape(shape) * weight
        return values if divisor is None else cast(_ratio(values.sum(), divisor), self.dtype)


class KLDivergenceMetric(_Metric):  # type: ignore[misc]
    """The metric ``keras.metrics.KLDivergence``: the mean divergence of all samples so far, in nats.

    Where Keras is loaded, instances are ``keras.metrics.MeanMetricWrapper``, with Keras' own state.

    Parameters
    ----------
    name : str
        For Keras' logs.
    dtype : str, optional
        Of the state: None is Keras' float type, float32.

    Attributes
    ----------
    total, count : scalar
        The weighted sum of the divergences so far, and of the weights.

    Examples
    --------
    >>> import numpy as np
    >>> from klcore.compat.keras import KLDivergenceMetric
    >>> metric = KLDivergenceMetric()
    >>> metric.update_state(np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([[0.6, 0.4], [0.4, 0.6]]))
    >>> print(round(float(metric.result()), 6))
    0.458143
    """

    __signature__ = InitSignature()

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Self":
        keras, kind = _keras(), cls  # type: Any, Any
        return object.__new__(kind if keras is None else _keras_metric(keras, kind))

    def __init__(self, name: str = "kl_divergence", dtype: Any = None) -> None:
        self.name = name
        self.dtype = _dtype(dtype)
        self.total: Any = 0.0
        self.count: Any = 0.0

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Update, and return the result."""
        self.update_state(y_true, y_pred, sample_weight)
        return self.result()

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Take a batch in.

        Parameters
        ----------
        y_true, y_pred : array of shape (batch, ..., n)
            As for :func:`kullback_leibler_divergence`.
        sample_weight : array, optional
            A vector is one weight a sample; more axes weigh the values of the function, shape (batch, ...).
        """
        values = cast(kullback_leibler_divergence(y_true, y_pred), self.dtype)
        mask = _mask(y_pred)
        weight = None if sample_weight is None else _like(sample_weight, values, self.dtype)
        if mask is not None:
            valid = _like(mask, values, self.dtype)
            weight = valid if weight is None else _product(valid, weight)
        if weight is None:
            count: Any = values.shape[0] if values.ndim else 1
        else:
            of_values, of_weight = _aligned(tuple(values.shape), tuple(weight.shape))
            values = _mean_after(values.reshape(of_values), len(of_weight))
            weight = namespace(values).broadcast_to(weight.reshape(of_weight), tuple(values.shape))
            values = values * weight
            count = _mean_after(weight, 1).sum()
        self.total = self.total + _mean_after(values, 1).sum()
        self.count = self.count + count

    def result(self) -> Any:
        """The mean so far; 0 before the first batch."""
        return _ratio(self.total, self.count)

    def reset_state(self) -> None:
        """Forget all batches."""
        self.total = self.count = 0.0

    def get_config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs."""
        return {"name": self.name, "dtype": self.dtype}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "KLDivergenceMetric":
        """An instance from what :meth:`get_config` returned."""
        return KLDivergenceMetric(**config)


# ---- arrays ----------------------------------------------------------------------------------------------------------


def _arrays(y_true: Any, y_pred: Any, name: str | None = None) -> tuple[Any, Any]:
    """Both as arrays of one library and dtype: that called `name`, or that of y_pred."""
    dense(y_true=y_true, y_pred=y_pred)
    y_pred = y_pred if is_array(y_pred) else np.asarray(y_pred, _dtype(None))
    for array in (y_true, y_pred):
        if is_array(array) and dtype_name(array).startswith("complex"):
            raise TypeError(f"y_true and y_pred must be real, found {dtype_name(array)}")
    if name is None:
        name = dtype_name(y_pred) if dtype_name(y_pred) in FLOATS else _dtype(None)
    return _like(y_true, y_pred, name), _like(y_pred, y_pred, name)


def _values_shape(y_true: Any, y_pred: Any) -> tuple[int, ...]:
    if not y_true.ndim or not y_pred.ndim:
        raise ValueError("y_true and y_pred must have an axis of classes, found an array without dimensions")
    return broadcast(tuple(y_true.shape), tuple(y_pred.shape), "y_true and y_pred")[:-1]


def _engine(y_true: Any, y_pred: Any, **options: Any) -> Any:
    """The values, or what `options` make of them. Both arrays are of one dtype."""
    _values_shape(y_true, y_pred)
    name = dtype_name(y_pred)
    return loss(
        "keras",
        y_true,
        y_pred,
        space=("probs", "probs"),
        epsilon=_rounded(epsilon(), name),
        dtype=name if name in ("float16", "bfloat16") else None,  # else the engine's own choice, its quickest way
        **options,
    )


def _as_given(gradients: Any, given: tuple[Any, Any]) -> tuple[Any, Any]:
    """The gradients in the shapes and dtypes of the arguments."""
    of_true, of_pred = (
        cast(g.reshape(a.shape), dtype_name(a) if dtype_name(a) in FLOATS else dtype_name(g)) if is_array(a) else g
        for g, a in zip(gradients, given, strict=True)
    )
    return of_true, of_pred


def _rounded(value: float, name: str) -> float:
    """A number as the dtype called `name` holds it."""
    if name == "bfloat16":  # a float32 without its lower half, rounded to even; NumPy may not know the type
        bits = int(np.float32(value).view(np.uint32))
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return float(np.uint32(bits).view(np.float32))
    return float(np.dtype(name).type(value))


def _dtype(dtype: Any) -> str:
    """The name of a dtype, of a policy of Keras', or for None of the float type."""
    if dtype is None:
        keras = _keras()
        return "float32" if keras is None else str(keras.config.floatx())
    name = getattr(dtype, "compute_dtype", None) or dtype
    if not isinstance(name, str):
        try:
            name = np.dtype(name).name
        except Exception:
            name = shown(name).rpartition(".")[2]  # torch.float32
    if name not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(FLOATS)} or None, found {shown(dtype)}")
    return name


# ---- weights ---------------------------------------------------------------------------------------------------------


def _aligned(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes, of which one is one axis longer and ends in one of size 1, with the same number of axes."""
    if len(a) < len(b):
        return _aligned(b, a)[::-1]
    if len(a) == len(b) + 1 and a[-1] == 1:
        return (a, (*b, 1)) if len(b) == 1 else (a[:-1], b)
    return a, b


def _product(a: Any, b: Any) -> Any:
    of_a, of_b = _aligned(tuple(a.shape), tuple(b.shape))
    return a.reshape(of_a) * b.reshape(of_b)


def _ratio(a: Any, b: Any) -> Any:
    """a / b, and 0 where b is 0."""
    if not hasattr(b, "dtype"):
        return a / b if b else a * 0.0
    xp = namespace(b)
    ratio = a / xp.where(b == 0, xp.ones_like(b), b)
    return xp.where(b == 0, xp.zeros_like(ratio), ratio)


def _mean_after(array: Any, ndim: int) -> Any:
    """The mean over the axes after the first `ndim`."""
    return array.mean(tuple(range(ndim, array.ndim))) if array.ndim > ndim else array


# ---- Keras, where it is loaded ---------------------------------------------------------------------------------------


def _keras() -> ModuleType | None:
    keras = sys.modules.get("keras")
    return keras if hasattr(keras, "metrics") else None  # half-imported, it has no parts yet


def _mask(y_pred: Any) -> Any:
    """The mask that Keras attached to a tensor."""
    mask = getattr(y_pred, "_keras_mask", None)
    keras = _keras()
    # beside those that can't have attributes it keeps them elsewhere
    return keras.src.backend.get_keras_mask(y_pred) if mask is None and keras is not None else mask


def _like(value: Any, like: Any, name: str) -> Any:
    """`value` as an array of the library and dtype of another; beside a tensor of Keras' it becomes one.

    In training the truth and the weights come as the data has them, on another device maybe.
    """
    keras = _keras()
    if keras is not None and keras.ops.is_tensor(like):
        return keras.ops.convert_to_tensor(value, dtype=name)
    return as_array(value, like, name)


@cache
def _keras_loss(keras: ModuleType, cls: type) -> type:
    """KLDivergence, or a subclass, as a loss of Keras'; what both define is ours."""
    if issubclass(cls, keras.losses.Loss):
        return cls
    made = _named(cls, (cls, keras.losses.Loss), {})
    return _registered(keras, made) if cls is KLDivergence else made


@cache
def _keras_metric(keras: ModuleType, cls: type) -> type:
    """KLDivergenceMetric, or a subclass, as a metric of Keras', with its state in variables that trainers can see."""
    if issubclass(cls, keras.metrics.Metric):
        return cls
    if cls is not KLDivergenceMetric:
        return _named(cls, (cls, _keras_metric(keras, KLDivergenceMetric)), {})

    def init(self: Any, name: str = "kl_divergence", dtype: Any = None) -> None:
        keras.metrics.MeanMetricWrapper.__init__(self, kullback_leibler_divergence, name=name, dtype=dtype)
        self._direction = "down"  # for callbacks: less is better

    def get_config(self: Any) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype}

    def reduce(self: Any) -> Any:  # by the class that can be imported
        return KLDivergenceMetric, (self.name, self.dtype), [float(v) for v in self.variables]

    def set_state(self: Any, values: list[Any]) -> None:
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)

    members = {
        "__init__": init, "get_config": get_config, "from_config": classmethod(lambda cls, config: cls(**config)),
        "__reduce__": reduce, "__setstate__": set_state, "__deepcopy__": lambda self, memo: _rebuilt(*reduce(self)),
    }  # fmt: skip
    return _registered(keras, _named(cls, (keras.metrics.MeanMetricWrapper, cls), members))


def _rebuilt(make: Any, arguments: tuple[Any, ...], state: Any) -> Any:
    made = make(*arguments)
    made.__setstate__(state)
    return made


def _named(ours: type, bases: tuple[type, ...], members: dict[str, Any]) -> type:
    """A class that goes by the name of ours: under it, a saved model finds its way back."""
    return type(ours.__name__, bases, {"__module__": ours.__module__, "__qualname__": ours.__qualname__, **members})


def _registered(keras: ModuleType, ours: Any) -> Any:
    """Known to Keras, so that it loads models saved with it."""
    return keras.saving.register_keras_serializable(package="klcore")(ours)


if _keras() is not None:
    for known in (kullback_leibler_divergence, kl_divergence):
        _registered(sys.modules["keras"], known)
    KLDivergence(), KLDivergenceMetric()
