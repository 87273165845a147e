"""Arguments as Keras handles them: dtypes, aligned ranks, masks and weights. Keras itself is not needed."""

from typing import Any

import numpy as np

from klcore.compat._arguments import (
    FLOATS,
    as_array,
    broadcast,
    cast,
    dense,
    dtype_name,
    is_array,
    namespace,
    shown,
)
from klcore.compat.keras import registration, tensorflow


def arrays_of(y_true: Any, y_pred: Any, name: str | None = None) -> tuple[Any, Any]:
    """Both as arrays of the same library and dtype: the dtype called `name`, or that of y_pred."""
    dense(y_true=y_true, y_pred=y_pred)
    y_pred = y_pred if is_array(y_pred) else np.asarray(y_pred, dtype_of(None))
    for array in (y_true, y_pred):
        if is_array(array) and dtype_name(array).startswith("complex"):
            raise TypeError(f"y_true and y_pred must be real, found {dtype_name(array)}")
    if name is None:
        name = dtype_name(y_pred) if dtype_name(y_pred) in FLOATS else dtype_of(None)
    like = y_true if tensorflow.are_there(y_true) else y_pred
    return converted(y_true, like, name), converted(y_pred, like, name)


def values_shape(y_true: Any, y_pred: Any) -> tuple[int, ...]:
    if 0 in (y_true.ndim, y_pred.ndim):
        raise ValueError("y_true and y_pred must have a class axis, found a 0-d array")
    if tensorflow.are_there(y_pred):
        return tensorflow.values_shape(y_true, y_pred)
    return broadcast(tuple(y_true.shape), tuple(y_pred.shape), "y_true and y_pred")[:-1]


def converted(value: Any, like: Any, name: str) -> Any:
    """`value` as an array of the library of `like`, of the dtype called `name`; for a Keras tensor, a Keras tensor.

    In training, the truth and the weights have the type of the data, and may be on another device.
    """
    if tensorflow.are_there(like):
        return tensorflow.converted(value, name)
    keras = registration.loaded()
    if keras is not None and keras.ops.is_tensor(like):
        return keras.ops.convert_to_tensor(value, dtype=name)
    return as_array(value, like, name)


def mask_of(y_pred: Any) -> Any:
    """The mask that Keras attached to a tensor, or None."""
    mask = getattr(y_pred, "_keras_mask", None)
    keras = registration.loaded()
    # for tensors that cannot have attributes, Keras keeps masks elsewhere
    return keras.src.backend.get_keras_mask(y_pred) if mask is None and keras is not None else mask


def dtype_of(dtype: Any) -> str:
    """The name of a dtype, or of the compute dtype of a Keras policy; None means Keras's float type."""
    if dtype is None:
        keras = registration.loaded()
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


def as_given(gradients: Any, given: tuple[Any, Any]) -> tuple[Any, Any]:
    """The gradients in the shapes and dtypes of the arguments."""
    of_true, of_pred = (
        cast(g.reshape(a.shape), dtype_name(a) if dtype_name(a) in FLOATS else dtype_name(g)) if is_array(a) else g
        for g, a in zip(gradients, given, strict=True)
    )
    return of_true, of_pred


def aligned(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Align two shapes as Keras does, if one has one axis more than the other, of size 1, at its end."""
    if len(a) < len(b):
        return aligned(b, a)[::-1]
    if len(a) == len(b) + 1 and a[-1] == 1:
        return (a, (*b, 1)) if len(b) == 1 else (a[:-1], b)
    return a, b


def reshaped(array: Any, shape: tuple[int, ...]) -> Any:
    """The array in a shape from :func:`aligned`."""
    return tensorflow.reshaped(array, len(shape)) if tensorflow.are_there(array) else array.reshape(shape)


def product(a: Any, b: Any) -> Any:
    of_a, of_b = aligned(tuple(a.shape), tuple(b.shape))
    return a.reshape(of_a) * b.reshape(of_b)


def ratio(a: Any, b: Any) -> Any:
    """a / b, and 0 where b is 0."""
    if not hasattr(b, "dtype"):
        return a / b if b else a * 0.0
    xp = namespace(b)
    ratio = a / xp.where(b == 0, xp.ones_like(b), b)
    return xp.where(b == 0, xp.zeros_like(ratio), ratio)


def mean_after(array: Any, ndim: int) -> Any:
    """The mean over the axes after the first `ndim`."""
    return array.mean(tuple(range(ndim, array.ndim))) if array.ndim > ndim else array
