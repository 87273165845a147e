"""torch.func.vmap: the examples of a batch become rows of one call; a total is computed per example.

Each tensor of a call for one example may have one more axis, that of the batch; `dims` gives its position, by field of
the call. autograd.py registers these functions with PyTorch, and passes them the function that computes a call.
"""

from collections.abc import Callable
from typing import Any

from klcore.backends.torch import kernels
from klcore.operations import Call

Dims = dict[str, int | None]


def value(function: Callable[[Call], Any], info: Any, dims: Dims, call: Call) -> tuple[Any, int]:
    found = function(_of_all(info, dims, call))
    return found.reshape(found.shape[: 1 + _ndim(dims, call)]), 0  # drops the class axis of a term of 0-d arguments


def value_and_gradients(function: Callable[[Call], Any], info: Any, dims: Dims, call: Call) -> tuple[Any, Any]:
    """A total and the gradients that `call.return_grad` names."""
    total, *found = function(_of_all(info, dims, call))
    shapes = (_shape(dims, name, getattr(call, name)) for name in call.return_grad)
    found = [g.reshape(info.batch_size, *shape) for g, shape in zip(found, shapes, strict=True)]
    return (total, *found), (0,) * (1 + len(found))


def gradients(
    function: Callable[..., Any], info: Any, dims: Dims, call: Call, cotangent: Any, of_x: bool, of_y: bool
) -> tuple[tuple[Any, Any], tuple[int, int]]:
    of_all = _of_all(info, dims, call)
    ndim = len(kernels.value_like(of_all)[0]) - 1
    dx, dy = function(of_all, _in_front(info, dims.get("cotangent"), cotangent, ndim), of_x, of_y)
    dx = dx.reshape(info.batch_size, *_shape(dims, "x", call.x)) if of_x else dx.expand(info.batch_size, 0)
    dy = dy.reshape(info.batch_size, *_shape(dims, "y", call.y)) if of_y else dy.expand(info.batch_size, 0)
    return (dx, dy), (0, 0)


def _of_all(info: Any, dims: Dims, call: Call) -> Call:
    """The call for all examples: the batch axis comes first, then axes of size 1 where other arguments have more."""
    estimate, ndim = call.operation.is_estimator, _ndim(dims, call)
    if not estimate:
        ndim = max(ndim, call.examples + 1)  # a 0-d tensor is one class
    batch = ndim if estimate else ndim - 1
    behind = {
        "x": ndim, "y": ndim, "indices": ndim, "weights": ndim if call.operation.is_loss else batch,
        "denominator": call.examples,
    }  # fmt: skip
    whole = ("x",) if call.operation.single else ("x", "y")  # each example has its own gradient for these
    laid = {
        name: _in_front(info, dims.get(name), getattr(call, name), behind.get(name, batch))
        for name in {*whole, *(name for name, d in dims.items() if d is not None)} - {"cotangent"}
    }
    axis = call.axis if estimate or call.axis < 0 else call.axis - ndim
    return call._replace(**laid, axis=axis, examples=call.examples + 1)


def _in_front(info: Any, d: int | None, t: Any, ndim: int) -> Any:
    t = t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
    return t.reshape(t.shape[:1] + (1,) * (ndim + 1 - t.ndim) + t.shape[1:])


def _shape(dims: Dims, name: str, t: Any) -> tuple[int, ...]:
    """The shape for one example."""
    d = dims.get(name)
    return tuple(t.shape) if d is None else (*t.shape[:d], *t.shape[d + 1 :])


def _ndim(dims: Dims, call: Call) -> int:
    """The number of axes of the terms of one example."""
    arrays = ("x", call.x), ("y", call.y), ("indices", call.indices)
    return max(len(_shape(dims, name, t)) for name, t in arrays if t is not None)
