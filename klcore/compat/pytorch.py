"""PyTorch's KLDivLoss and kl_div: the arguments of torch.nn and torch.nn.functional on klcore's engine.

The terms are in src/kl_compat.h; options, warnings, checks and dtypes are here. klcore.compat.rtorch uses `aten`.
"""

import math
import sys
import warnings
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from klcore.compat._arguments import (
    FLOATS,
    InitSignature,
    broadcast,
    cotangent_of,
    dense,
    detached,
    divisor_of,
    dtype_name,
    one_library,
    shown,
    traced,
    truth,
    with_gradients,
)
from klcore.divergence import loss

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import KLDivLoss as _Original  # Any for type checkers without PyTorch
    from typing_extensions import Self  # in typing from Python 3.11
else:
    _Original = object  # PyTorch is not imported here: `_module` adds its class if it is loaded

__all__ = ["KLDivLoss", "kl_div"]


class KLDivLoss(_Original):
    """The loss of ``torch.nn.KLDivLoss``: the divergence of `target` from the model's log-probabilities, in nats.

    If PyTorch is loaded, instances are ``torch.nn.KLDivLoss`` modules, also those of subclasses, with hooks,
    ``.to(device)`` and so on.

    Parameters
    ----------
    size_average, reduce : bool, optional
        Deprecated. If either is given, `reduction` is ignored, and is "none" if `reduce` is false, else "mean" if
        `size_average` is true, else "sum". If only one is given, the other counts as true.
    reduction : {"mean", "batchmean", "sum", "none"}
        "batchmean", the sum divided by the size of the first axis of the input, is the divergence. "mean" divides by
        the number of elements. An unknown value raises when the loss is called.
    log_target : bool
        The target holds log-probabilities.

    Attributes
    ----------
    reduction, log_target
        As given; they can be changed.

    See Also
    --------
    kl_div : The same as a function, with types, errors and differences from the original.

    Notes
    -----
    The order of the arguments is PyTorch's: ``KLDivLoss("sum")`` sets `size_average`, and is a mean.

    Examples
    --------
    >>> import numpy as np
    >>> from klcore.compat.pytorch import KLDivLoss
    >>> loss = KLDivLoss(reduction="batchmean")
    >>> input = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
    >>> target = np.array([[0.25, 0.75], [0.9, 0.1]])
    >>> print(loss(input, target).round(6))
    0.065406
    >>> value, (d_input, d_target) = loss.value_and_grad(input, target)
    >>> print(d_input)
    [[-0.125 -0.375]
     [-0.45  -0.05 ]]
    """

    __signature__ = InitSignature()

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Self":
        torch = sys.modules.get("torch")
        kind: Any = cls
        return object.__new__(_module(torch, kind) if torch is not None and hasattr(torch, "nn") else kind)

    def __init__(
        self, size_average: Any = None, reduce: Any = None, reduction: str = "mean", log_target: bool = False
    ) -> None:
        super().__init__()
        if size_average is not None or reduce is not None:
            reduction = _legacy(size_average, reduce)
        self.reduction = reduction
        self.log_target = log_target

    def __repr__(self) -> str:
        return "KLDivLoss()"

    def __call__(self, input: Any, target: Any) -> Any:
        """The loss; input and target are as for :func:`kl_div`."""
        return self.forward(input, target)

    def forward(self, input: Any, target: Any) -> "Tensor":
        """Computes a call; subclasses can override it."""
        return aten(input, target, *_reduction(None, None, self.reduction), self.log_target)

    def value_and_grad(self, input: Any, target: Any, *, cotangent: Any = None) -> tuple[Any, tuple[Any, Any]]:
        """The loss and its derivatives, for arrays without automatic differentiation.

        Parameters
        ----------
        input, target : array
            As for a call. Arrays of PyTorch and JAX are taken without their history, and the results are plain arrays.
        cotangent : array or float, optional
            Multiplies the derivatives; of the shape of the value. None means ones.

        Returns
        -------
        value : array
            The loss.
        gradients : (array, array)
            With respect to input and target, in their shapes and dtypes.

        Notes
        -----
        A row whose cotangent is 0 has the derivative 0, where the original may have NaN.
        """
        return aten_and_grad(input, target, *_reduction(None, None, self.reduction), self.log_target, cotangent)


def _value_and_grad(
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
    *,
    cotangent: Any = None,
) -> tuple[Any, tuple[Any, Any]]:
    """:func:`kl_div` and its derivatives; see :meth:`KLDivLoss.value_and_grad`."""
    return aten_and_grad(input, target, *_reduction(size_average, reduce, reduction), log_target, cotangent)


@with_gradients(_value_and_grad)
def kl_div(
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    """The function ``torch.nn.functional.kl_div``: xlogy(t, t) - t*x, or exp(t)*(t - x), reduced; in nats.

    Parameters
    ----------
    input : array of any shape
        Log-probabilities of the model: float64, float32, float16 or bfloat16.
    target : array
        Probabilities, or log-probabilities with `log_target`. Broadcasts with the input, along any axis.
    size_average, reduce : bool, optional
        Deprecated; see :class:`KLDivLoss`. Here ``reduction="batchmean"`` still divides the result that they ask for.
    reduction : {"mean", "batchmean", "sum", "none"}
        "mean" divides by the number of elements of the broadcast arrays. "batchmean" divides the sum by the size of the
        first axis of the input, if it has one. "none" returns the terms.
    log_target : bool
        The target holds log-probabilities.

    Returns
    -------
    array
        A scalar, or for "none" an array of the broadcast shape. The dtype is the wider of the two, and float32 for
        float16 with bfloat16; a 0-d array does not widen an array that has dimensions. For arrays of PyTorch and JAX,
        differentiable with respect to both.

    Raises
    ------
    ValueError
        For an unknown reduction.
    TypeError
        If an argument is not an array, the arrays are of two libraries, or `log_target` is not a bool.
    RuntimeError
        For complex numbers, integers and booleans, and for shapes that do not broadcast.

    Warns
    -----
    UserWarning
        For "mean", and for the deprecated arguments and option values.

    See Also
    --------
    klcore.kl_div : For new code; takes logits, and is never negative.

    Notes
    -----
    As in PyTorch 1.13 and later: a target of 0 contributes 0 if the input is finite, else NaN; a negative target gives
    NaN. The derivative with respect to a target of 0 is NaN. With `log_target`, -inf gives NaN.

    Differences from PyTorch: NumPy and CuPy arrays are supported. float16 and bfloat16 are computed in float32 and
    rounded once, so that "batchmean" in float16 does not overflow in between.

    ``kl_div.value_and_grad(...)`` takes the same arguments and `cotangent`; see :meth:`KLDivLoss.value_and_grad`.

    Examples
    --------
    >>> import numpy as np
    >>> from klcore.compat.pytorch import kl_div
    >>> print(kl_div(np.log([[0.5, 0.5]]), np.array([[0.25, 0.75]]), reduction="batchmean").round(6))
    0.130812
    """
    return aten(input, target, *_reduction(size_average, reduce, reduction), log_target)


@cache
def _module(torch: ModuleType, cls: type) -> type:
    """KLDivLoss, or a subclass, as a PyTorch module."""
    if issubclass(cls, torch.nn.Module):
        return cls

    def reduce(self: Any) -> Any:  # pickle by the class that can be imported
        return cls.__new__, (cls,), self.__dict__

    members = {"__call__": torch.nn.Module.__call__, "__reduce__": reduce, "__module__": cls.__module__}
    return type(cls.__name__, (cls, torch.nn.KLDivLoss), {**members, "__qualname__": cls.__qualname__})


# ---- options ---------------------------------------------------------------------------------------------------------


def _legacy(size_average: Any, reduce: Any) -> str:
    """The reduction that the deprecated arguments ask for; at least one of them is given."""
    average = size_average is None or truth(size_average, "size_average")
    word = "none" if reduce is not None and not truth(reduce, "reduce") else "mean" if average else "sum"
    _warn(f"size_average and reduce are deprecated; use reduction={word!r} instead")
    return word


def _warn(message: str) -> None:
    """A UserWarning about the line that called klcore, directly or through a PyTorch module."""
    if traced():
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("klcore.compat.", "torch.nn.modules.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _reduction(size_average: Any, reduce: Any, reduction: str) -> tuple[str, bool]:
    """(what to do with the terms, whether to divide by the size of the batch)."""
    by_batch = isinstance(reduction, str) and reduction == "batchmean"
    if size_average is not None or reduce is not None:
        return _legacy(size_average, reduce), by_batch
    word = reduction if isinstance(reduction, str) else None  # an array may equal several
    if word == "mean":
        _warn("reduction='mean' divides by the number of elements, which is not the divergence; use 'batchmean'")
    elif word == "elementwise_mean":
        _warn("reduction='elementwise_mean' is deprecated; use 'mean'")
        return "mean", False
    elif word not in ("batchmean", "none", "sum"):
        raise ValueError(f"reduction must be 'mean', 'batchmean', 'sum' or 'none', found {shown(reduction)}")
    return "sum" if by_batch else reduction, by_batch


# ---- the call --------------------------------------------------------------------------------------------------------


def _checked(input: Any, target: Any, log_target: bool) -> tuple[tuple[int, ...], str]:
    """(shape, name of the dtype) of the terms. The checks and their exceptions are in PyTorch's order."""
    dense(input=input, target=target)
    for name, array in (("input", input), ("target", target)):
        if not hasattr(array, "dtype") or not hasattr(array, "shape"):
            raise TypeError(f"{name} must be an array, found {type(array).__name__}")
    one_library(input=input, target=target)
    if not isinstance(log_target, bool):
        raise TypeError(f"log_target must be a bool, found {shown(log_target)}")
    found = [dtype_name(input), dtype_name(target)]
    if any(name.startswith("complex") for name in found):
        raise RuntimeError(f"input and target must be real, found {' and '.join(found)}")
    if any(name.startswith(("int", "uint", "bool")) for name in found):
        raise RuntimeError(f"input and target must be floating-point, found {' and '.join(found)}; convert them first")
    if not set(found) <= set(FLOATS):
        raise TypeError(f"input and target must have dtype {', '.join(FLOATS)}; found {' and '.join(found)}")
    shape = broadcast(tuple(input.shape), tuple(target.shape), "input and target", RuntimeError)
    if len(set(found)) == 1 or (not input.ndim and target.ndim):
        return shape, found[1]
    if input.ndim and not target.ndim:
        return shape, found[0]
    return shape, "float64" if "float64" in found else "float32"


def aten(
    input: Any,
    target: Any,
    word: str,
    by_batch: bool,
    log_target: bool = False,
    cotangent: Any = None,
    return_grad: tuple[str, str] | None = None,
) -> Any:
    """The function behind PyTorch and R torch: the terms, not reduced ("none"), added up ("sum") or averaged ("mean").

    `by_batch` also divides by the size of the first axis of the input.
    """
    shape, dtype = _checked(input, target, log_target)
    wide = "float64" if "float64" in (dtype_name(input), dtype_name(target)) else "float32"
    denominator = math.prod(shape) if word == "mean" else 1
    if by_batch and input.ndim:
        denominator *= input.shape[0]
    return loss(
        "pytorch",
        target,
        input,
        space=("log_probs" if log_target else "probs", "log_probs"),
        reduction="none" if word == "none" else "sum",
        factors=cotangent,
        denominator=divisor_of(denominator),
        dtype=None if dtype == wide else dtype,  # None lets the engine take its fastest path
        return_grad=return_grad,
    )


def aten_and_grad(
    input: Any, target: Any, word: str, by_batch: bool, log_target: bool, cotangent: Any
) -> tuple[Any, tuple[Any, Any]]:
    """The value of `aten`, and its derivatives with respect to input and target."""
    input, target = detached(input, target)
    value = None
    if cotangent is not None:  # it multiplies the gradients, not the value
        value = aten(input, target, word, by_batch, log_target)
        cotangent = cotangent_of(value, cotangent)
    passed, d_target, d_input = aten(input, target, word, by_batch, log_target, cotangent, ("x", "y"))
    return passed if value is None else value, (d_input, d_target)
