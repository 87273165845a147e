"""The metric ``keras.metrics.KLDivergence``: the mean of the function's values over batches."""

from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from klcore.compat._arguments import InitSignature, cast, namespace
from klcore.compat.keras import arguments, registration, tensorflow
from klcore.compat.keras.functions import kullback_leibler_divergence

if TYPE_CHECKING:
    from keras.metrics import Metric as _Metric  # Any for mypy: Keras has no types
    from typing_extensions import Self  # in typing from Python 3.11
else:
    _Metric = object  # Keras is not imported here: `_keras_metric` adds its class


class KLDivergenceMetric(_Metric):  # type: ignore[misc]
    """The metric ``keras.metrics.KLDivergence``: the mean divergence of all samples so far, in nats.

    If Keras is loaded, instances are ``keras.metrics.MeanMetricWrapper``, with Keras's own state.

    Parameters
    ----------
    name : str
        The name in Keras's logs.
    dtype : str, optional
        The dtype of the state. None is Keras's float type, float32.

    Attributes
    ----------
    total, count : scalar
        The weighted sum of the divergences so far, and the sum of the weights.

    See Also
    --------
    kullback_leibler_divergence : The values that are averaged.

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
        keras, kind = registration.loaded(), cls  # type: Any, Any
        return object.__new__(kind if keras is None else _keras_metric(keras, kind))

    def __init__(self, name: str = "kl_divergence", dtype: Any = None) -> None:
        self.name = name
        self.dtype = arguments.dtype_of(dtype)
        self.total: Any = 0.0
        self.count: Any = 0.0

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Update the state and return the result."""
        self.update_state(y_true, y_pred, sample_weight)
        return self.result()

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Add a batch.

        Parameters
        ----------
        y_true, y_pred : array of shape (batch, ..., n)
            As for :func:`kullback_leibler_divergence`.
        sample_weight : array, optional
            A vector has one weight per sample; with more axes, the weights multiply the values of the function, of
            shape (batch, ...).
        """
        if tensorflow.are_there(y_true, y_pred, sample_weight):
            tensorflow.need_keras(self)
        values = cast(kullback_leibler_divergence(y_true, y_pred), self.dtype)
        mask = arguments.mask_of(y_pred)
        weight = None if sample_weight is None else arguments.converted(sample_weight, values, self.dtype)
        if mask is not None:
            valid = arguments.converted(mask, values, self.dtype)
            weight = valid if weight is None else arguments.product(valid, weight)
        if weight is None:
            count: Any = values.shape[0] if values.ndim else 1
        else:
            of_values, of_weight = arguments.aligned(tuple(values.shape), tuple(weight.shape))
            values = arguments.mean_after(values.reshape(of_values), len(of_weight))
            weight = namespace(values).broadcast_to(weight.reshape(of_weight), tuple(values.shape))
            values = values * weight
            count = arguments.mean_after(weight, 1).sum()
        self.total = self.total + arguments.mean_after(values, 1).sum()
        self.count = self.count + count

    def result(self) -> Any:
        """The mean so far; 0 before the first batch."""
        return arguments.ratio(self.total, self.count)

    def reset_state(self) -> None:
        """Forget all batches."""
        self.total = self.count = 0.0

    def get_config(self) -> dict[str, Any]:
        """The arguments for :meth:`from_config`."""
        return {"name": self.name, "dtype": self.dtype}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "KLDivergenceMetric":
        """An instance made from the result of :meth:`get_config`."""
        return KLDivergenceMetric(**config)


@cache
def _keras_metric(keras: ModuleType, cls: type) -> type:
    """KLDivergenceMetric, or a subclass, as a Keras metric, with its state in variables that trainers can see."""
    if issubclass(cls, keras.metrics.Metric):
        return cls
    if cls is not KLDivergenceMetric:
        return registration.named(cls, (cls, _keras_metric(keras, KLDivergenceMetric)), {})

    def init(self: Any, name: str = "kl_divergence", dtype: Any = None) -> None:
        keras.metrics.MeanMetricWrapper.__init__(self, kullback_leibler_divergence, name=name, dtype=dtype)
        self._direction = "down"  # for callbacks: lower is better

    def get_config(self: Any) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype}

    def reduce(self: Any) -> Any:  # pickle by the class that can be imported
        return KLDivergenceMetric, (self.name, self.dtype), [float(v) for v in self.variables]

    def set_state(self: Any, values: list[Any]) -> None:
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)

    members = {
        "__init__": init, "get_config": get_config, "from_config": classmethod(lambda cls, config: cls(**config)),
        "__reduce__": reduce, "__setstate__": set_state, "__deepcopy__": lambda self, memo: _rebuilt(*reduce(self)),
    }  # fmt: skip
    return registration.registered(keras, registration.named(cls, (keras.metrics.MeanMetricWrapper, cls), members))


def _rebuilt(make: Any, arguments: tuple[Any, ...], state: Any) -> Any:
    made = make(*arguments)
    made.__setstate__(state)
    return made
