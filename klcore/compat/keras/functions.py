"""The divergence of each row, with Keras's epsilon, as a function; the loss and the metric reduce it."""

from typing import Any, SupportsFloat

import numpy as np

from klcore.compat._arguments import cotangent_of, detached, dtype_name, number, quietly, with_gradients
from klcore.compat.keras import arguments, registration, tensorflow
from klcore.divergence import loss

_epsilon = 1e-7  # used if Keras is not loaded


def epsilon() -> float:
    """The value to which probabilities are clipped: Keras's epsilon if Keras is loaded, else this module's.

    Returns
    -------
    float
        The smallest probability.

    See Also
    --------
    set_epsilon : Changes it.

    Examples
    --------
    >>> from klcore.compat.keras import epsilon
    >>> print(epsilon())
    1e-07
    """
    keras = registration.loaded()
    return _epsilon if keras is None else float(keras.config.epsilon())


def set_epsilon(value: SupportsFloat) -> None:
    """Change the value to which probabilities are clipped: in Keras if Keras is loaded, else in this module.

    Parameters
    ----------
    value : float
        The smallest probability, from the next call on.

    See Also
    --------
    epsilon : Returns it.

    Examples
    --------
    >>> from klcore.compat.keras import set_epsilon
    >>> set_epsilon(1e-7)
    """
    global _epsilon
    keras, value = registration.loaded(), number(value, "epsilon")
    if keras is None:
        _epsilon = value
    else:
        keras.config.set_epsilon(value)


def engine(y_true: Any, y_pred: Any, **options: Any) -> Any:
    """The values, reduced or differentiated as `options` say. Both arrays have the same dtype."""
    shape = arguments.values_shape(y_true, y_pred)
    if tensorflow.are_there(y_pred):
        return tensorflow.row_values(engine, y_true, y_pred, shape)
    name = dtype_name(y_pred)
    return loss(
        "keras",
        y_true,
        y_pred,
        space=("probs", "probs"),
        epsilon=_rounded(epsilon(), name),
        dtype=name if name in ("float16", "bfloat16") else None,  # None lets the engine take its fastest path
        **options,
    )


def _rounded(value: float, name: str) -> float:
    """A number rounded to the dtype called `name`."""
    if name == "bfloat16":  # a float32 without its lower half, rounded to even; NumPy may not have the type
        bits = int(np.float32(value).view(np.uint32))
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return float(np.uint32(bits).view(np.float32))
    return float(np.dtype(name).type(value))


@quietly
def _value_and_grad(y_true: Any, y_pred: Any, *, cotangent: Any = None) -> tuple[Any, tuple[Any, Any]]:
    """:func:`kullback_leibler_divergence` and its derivatives: ``(value, (d_true, d_pred))``."""
    tensorflow.refuse(y_true, y_pred)
    given = detached(y_true, y_pred)
    arrays = arguments.arrays_of(*given)
    value = None if cotangent is None else engine(*arrays)
    factors = None if value is None else cotangent_of(value, cotangent)[..., None]
    passed, d_true, d_pred = engine(*arrays, factors=factors, return_grad=("x", "y"))
    return passed if value is None else value, arguments.as_given((d_true, d_pred), given)


@with_gradients(_value_and_grad)
@quietly
def kullback_leibler_divergence(y_true: Any, y_pred: Any) -> Any:
    """Keras's divergence of predictions from the truth: the sum of t*log(t/p) over the last axis, in nats.

    Both arguments are clipped to [epsilon, 1] first; see :func:`epsilon`. Also called `kl_divergence`, `KLD` and `kld`.

    Parameters
    ----------
    y_true : array of shape (..., n)
        True probabilities. Converted to the dtype of `y_pred`.
    y_pred : array of shape (..., n)
        Predicted probabilities: float64, float32, float16 or bfloat16. Integers and lists are converted to Keras's
        float type, float32. The two arguments broadcast, along any axis.

    Returns
    -------
    array of shape (...)
        In the dtype of `y_pred`. For arrays of PyTorch, JAX and TensorFlow, differentiable with respect to both.

    Raises
    ------
    TypeError
        For complex numbers and arrays of two libraries.
    NotImplementedError
        For TensorFlow tensors in functions compiled by XLA, as with ``model.compile(jit_compile=True)``.
    ValueError
        For shapes that do not broadcast, and for 0-d arguments.

    See Also
    --------
    klcore.kl_div : For new code; takes logits, and is never negative.

    Notes
    -----
    The truth comes first, unlike in the losses of PyTorch, R torch, MXNet and PuzzleLib. Because both arguments are
    clipped, a class with t = 0 still contributes about -1.6e-6, the value can be negative, and a prediction of 0 has
    gradient 0. At the bounds of the clipping, the gradient passes unchanged, as in TensorFlow and PyTorch; Keras on JAX
    halves it. In float32 and narrower dtypes, the epsilon is rounded to the dtype.

    ``kullback_leibler_divergence.value_and_grad(y_true, y_pred, cotangent=None)`` also returns the derivatives; see
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
    return engine(*arguments.arrays_of(y_true, y_pred))


@with_gradients(_value_and_grad)
def kl_divergence(y_true: Any, y_pred: Any) -> Any:
    """:func:`~klcore.compat.keras.kullback_leibler_divergence` under the name that Keras 3 uses in its logs."""
    return kullback_leibler_divergence(y_true, y_pred)


KLD = kld = kl_divergence
