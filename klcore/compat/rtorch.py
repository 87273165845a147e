"""R torch's nn_kl_div_loss and nnf_kl_div: their arguments and their warning, on what they share with PyTorch."""

import sys
import warnings
from typing import Any

from klcore.compat._arguments import traced, with_gradients, word_of
from klcore.compat.pytorch import aten, aten_and_grad

__all__ = ["nn_kl_div_loss", "nnf_kl_div"]


class nn_kl_div_loss:
    """The loss of R's ``torch::nn_kl_div_loss``: created with a reduction, called with arrays; in nats.

    Parameters
    ----------
    reduction : {"mean", "batchmean", "sum", "none"}
        As for :func:`nnf_kl_div`.

    Attributes
    ----------
    reduction : str
        As given; it can be changed.

    Raises
    ------
    ValueError
        For an unknown reduction.

    See Also
    --------
    nnf_kl_div : The same as a function, with types, errors and differences from the original.

    Notes
    -----
    There is no `log_target`, as in the original, although its page describes one.

    Examples
    --------
    >>> import numpy as np
    >>> from klcore.compat.rtorch import nn_kl_div_loss
    >>> loss = nn_kl_div_loss(reduction="batchmean")
    >>> print(loss(np.log([[0.5, 0.5]]), np.array([[0.25, 0.75]])).round(6))
    0.130812
    """

    def __init__(self, reduction: str = "mean") -> None:
        _checked(reduction)
        self.reduction = reduction

    def __call__(self, input: Any, target: Any) -> Any:
        """The loss; input and target are as for :func:`nnf_kl_div`."""
        return aten(input, target, *_reduction(input, self.reduction))

    def value_and_grad(self, input: Any, target: Any, *, cotangent: Any = None) -> tuple[Any, tuple[Any, Any]]:
        """``(value, (d_input, d_target))``, as :meth:`klcore.compat.pytorch.KLDivLoss.value_and_grad`."""
        return aten_and_grad(input, target, *_reduction(input, self.reduction), False, cotangent)


def _value_and_grad(
    input: Any, target: Any, reduction: str = "mean", *, cotangent: Any = None
) -> tuple[Any, tuple[Any, Any]]:
    """:func:`nnf_kl_div` and its derivatives: ``(value, (d_input, d_target))``."""
    return aten_and_grad(input, target, *_reduction(input, reduction), False, cotangent)


@with_gradients(_value_and_grad)
def nnf_kl_div(input: Any, target: Any, reduction: str = "mean") -> Any:
    """R's ``torch::nnf_kl_div``: xlogy(t, t) - t*x, reduced; in nats.

    Parameters
    ----------
    input : array of any shape
        Log-probabilities of the model: float64, float32, float16 or bfloat16.
    target : array
        Probabilities. Broadcasts with the input, along any axis.
    reduction : {"mean", "batchmean", "sum", "none"}
        As for :func:`klcore.compat.pytorch.kl_div`.

    Returns
    -------
    array
        As for :func:`klcore.compat.pytorch.kl_div`.

    Raises
    ------
    ValueError
        For an unknown reduction, and for "batchmean" of a 0-d input.
    TypeError, RuntimeError
        As for :func:`klcore.compat.pytorch.kl_div`.

    Warns
    -----
    UserWarning
        For "mean", at every call, not only once per line as usual in Python. Filters that ignore it, or make it an
        error, apply.

    See Also
    --------
    klcore.kl_div : For new code; takes logits, and is never negative.

    Notes
    -----
    The original silently treats any unknown reduction as "none"; here it raises.

    ``nnf_kl_div.value_and_grad(...)`` takes the same arguments and `cotangent`.

    Examples
    --------
    >>> import numpy as np
    >>> from klcore.compat.rtorch import nnf_kl_div
    >>> print(nnf_kl_div(np.log([0.5, 0.5]), np.array([0.25, 0.75]), "none").round(6))
    [-0.173287  0.304099]
    """
    return aten(input, target, *_reduction(input, reduction))


def _checked(reduction: str) -> None:
    word_of(reduction, "reduction", ("mean", "batchmean", "sum", "none"))


def _reduction(input: Any, reduction: str) -> tuple[str, bool]:
    """(what to do with the terms, whether to divide by the batch size). Warnings point to the caller's caller."""
    _checked(reduction)
    if reduction == "batchmean":
        if not getattr(input, "shape", True):
            raise ValueError("reduction='batchmean' needs an input with a batch axis, found a 0-d array")
        return "sum", True
    if reduction == "mean" and not traced():
        # without a registry, in which Python would record that this line has warned already
        caller = sys._getframe(2)
        warnings.warn_explicit(
            "reduction='mean' divides by the number of elements, which is not the divergence; use 'batchmean'",
            UserWarning,
            caller.f_code.co_filename,
            caller.f_lineno,
            module=caller.f_globals.get("__name__"),
        )
    return reduction, False
