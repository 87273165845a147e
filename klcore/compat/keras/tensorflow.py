"""TensorFlow tensors: the engine as a TensorFlow operation, with its derivative, in eager mode and in graphs.

The engine computes NumPy arrays in host memory. TensorFlow is imported when the first of its tensors arrives.
"""

import functools
from collections.abc import Callable
from typing import Any

from klcore.compat._arguments import broadcast, is_array, namespace


def are_there(*arrays: Any) -> bool:
    """Whether any of them is a TensorFlow tensor or variable, or a Keras variable that wraps one."""
    return any(base.__module__.partition(".")[0] == "tensorflow" for a in arrays for base in type(a).__mro__)


def converted(value: Any, name: str) -> Any:
    """`value`, an array of TensorFlow or NumPy, a number or a list, as a tensor of the dtype called `name`."""
    import tensorflow as tf

    if is_array(value) and not are_there(value) and namespace(value).__name__ != "numpy":
        raise TypeError(
            f"the arrays must be of one library, found a TensorFlow tensor and an array of {namespace(value).__name__}"
        )
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        raise TypeError(
            f"found a {type(value).__name__}, but klcore takes dense tensors; pass value.to_tensor() for a ragged "
            "tensor, tf.sparse.to_dense(value) for a sparse one"
        )
    return tf.cast(tf.convert_to_tensor(value), name)


def reshaped(a: Any, ndim: int) -> Any:
    """Add or remove a last axis of size 1; the sizes of other axes may be unknown."""
    import tensorflow as tf

    return tf.expand_dims(a, -1) if a.shape.rank < ndim else tf.squeeze(a, -1) if a.shape.rank > ndim else a


def refuse(*arrays: Any) -> None:
    """Raise TypeError for TensorFlow tensors in functions that return gradients."""
    if are_there(*arrays):
        raise TypeError(
            "value_and_grad is for arrays without automatic differentiation; for TensorFlow tensors, use "
            "tensorflow.GradientTape, or pass tensor.numpy()"
        )


def need_keras(ours: Any) -> None:
    """Raise TypeError if an instance of our classes is not a Keras object, which would apply weights and reductions."""
    if not any(base.__module__.partition(".")[0] == "keras" for base in type(ours).__mro__):
        raise TypeError(
            f"this {type(ours).__name__} cannot take TensorFlow tensors; import Keras before you create it, with "
            "KERAS_BACKEND=tensorflow in the environment"
        )


def values_shape(y_true: Any, y_pred: Any) -> Any:
    """The static shape of the values; unknown sizes are checked by the engine."""
    import tensorflow as tf

    return broadcast(y_true.shape, y_pred.shape, "y_true and y_pred", of=tf.broadcast_static_shape)[:-1]


def row_values(engine: Callable[..., Any], y_true: Any, y_pred: Any, shape: Any) -> Any:
    """The values of two tensors of the same dtype, computed by `engine`, differentiable with respect to both."""
    import tensorflow as tf

    def gradients(t: Any, p: Any, cotangent: Any) -> Any:
        return engine(t, p, factors=cotangent[..., None], return_grad=("x", "y"))[1:]

    @tf.custom_gradient
    def derivatives(t: Any, p: Any, cotangent: Any) -> Any:
        return _on_host(gradients, (t, p, cotangent), (t.shape, p.shape)), _no_second

    @tf.custom_gradient
    def values(t: Any, p: Any) -> Any:
        (value,) = _on_host(engine, (t, p), (shape,))
        return value, functools.partial(derivatives, t, p)

    return values(y_true, y_pred)


def _no_second(*cotangents: Any) -> Any:
    raise NotImplementedError(
        "klcore.compat.keras has first derivatives in reverse mode only; second derivatives (nested tapes, "
        "tf.hessians) and forward mode are not available"
    )


def _on_host(function: Callable[..., Any], tensors: tuple[Any, ...], shapes: tuple[Any, ...]) -> list[Any]:
    """Call the function with the tensors as NumPy arrays; returns tensors of the same dtype, of these shapes."""
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util  # no public function says whether XLA is compiling

    if not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise NotImplementedError(
            "klcore.compat.keras cannot be compiled by XLA; pass jit_compile=False to model.compile or tf.function "
            '(the "auto" of model.compile means True on a machine with a GPU)'
        )
    dtypes = [tensors[0].dtype] * len(shapes)
    results = tf.nest.flatten(tf.numpy_function(function, tensors, dtypes, stateful=False, name="klcore"))
    for result, shape in zip(results, shapes, strict=True):
        result.set_shape(shape)
    return results
