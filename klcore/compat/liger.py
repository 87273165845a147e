"""Liger-Kernel's LigerJSD, LigerTVDLoss and LigerKLDIVLoss: modules and functions over klcore's, without Triton.

The student comes first, and has a gradient; the teacher has none. All tensors are (rows, classes).
"""

from typing import Any

from klcore.compat._arguments import InitSignature, number, truth, word_of
from klcore.compat._distillation import check_tensors, of_beta, torch
from klcore.divergence import rel_entr
from klcore.family import tv_dist

__all__ = ["LigerJSD", "LigerKLDIVLoss", "LigerTVDLoss", "liger_jsd", "liger_kl_div", "liger_tvd"]

_REDUCTIONS = ("batchmean", "sum", "mean", "none")


class LigerJSD(torch.nn.Module):
    """The generalised Jensen-Shannon divergence of log-probabilities, with beta=0 and beta=1 as KL divergences.

    Parameters
    ----------
    beta : float
        The teacher's weight; see :func:`liger_jsd`.
    ignore_index : int
        The label of rows that are left out.

    Attributes
    ----------
    beta, ignore_index
        As given; they may be changed.

    See Also
    --------
    liger_jsd : the same as a function, with types, errors and differences from the original.

    Examples
    --------
    >>> import torch
    >>> from klcore.compat.liger import LigerJSD
    >>> log_q = torch.tensor([[1.0, 1.0], [0.0, 5.0]]).log_softmax(-1)
    >>> log_p = torch.tensor([[2.0, 0.0], [9.0, 9.0]]).log_softmax(-1)
    >>> print(round(LigerJSD(beta=0.1)(log_q, log_p, torch.tensor([7, -100])).item(), 6))
    0.029878
    """

    __signature__ = InitSignature()

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(
        self, log_q: torch.Tensor, log_p: torch.Tensor, shift_labels: "torch.Tensor | None" = None
    ) -> torch.Tensor:
        """The loss of the student's and the teacher's log-probabilities, as :func:`liger_jsd` takes them."""
        return liger_jsd(log_q, log_p, shift_labels, self.beta, self.ignore_index)


def liger_jsd(
    input: torch.Tensor,
    target: torch.Tensor,
    shift_labels: "torch.Tensor | None" = None,
    beta: float = 0.5,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The function ``liger_jsd``: beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q, in nats.

    Parameters
    ----------
    input, target : tensor of shape (rows, classes)
        Log-probabilities of the student, Q, and of the teacher, P: float64, float32, float16 or bfloat16.
    shift_labels : tensor of integers, of shape (rows,), optional
        A row whose label is `ignore_index` is left out. Other labels are not looked at.
    beta : float
        0 means KL(P || Q), 1 means KL(Q || P). The formula itself is 0 there, so next to these the loss jumps.
    ignore_index : int
        The label of rows that are left out.

    Returns
    -------
    tensor
        The sum divided by the number of rows that are not left out, or 0 where there are none. Of the input's dtype.
        Differentiable with respect to the input.

    Raises
    ------
    TypeError
        For what is no tensor.
    ValueError
        For other shapes, and a beta outside of [0, 1] or nearer than 1e-20 to 0.
    AssertionError
        For labels that are not one a row.

    See Also
    --------
    klcore.js_div : in new code; takes logits, which saves two arrays of their size.

    Notes
    -----
    As in Liger-Kernel 0.8.2. Different from it: a probability of 0, which is -inf, contributes what the divergence
    says, where the original has NaN from 0 log 0. float64 is computed in float64. Between the ends no value is
    negative; at the ends it is the literal sum of p log(p/q), as there, whose rounding may have either sign. Nothing
    waits for the GPU.

    Examples
    --------
    >>> import torch
    >>> from klcore.compat.liger import liger_jsd
    >>> print(round(liger_jsd(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()).item(), 6))
    0.101749
    """
    _check(input=input, target=target)
    mask, rows = _rows(input, shift_labels, ignore_index)
    value = of_beta(
        target.detach(),
        input,
        beta,
        rel_entr,  # whose derivative is the original's: kl_div's has the terms -p + q, too
        space="log_probs",
        reduction="sum",
        weights=mask,
        denominator=rows,
    )
    return value.to(input.dtype)


class LigerTVDLoss(torch.nn.Module):
    """The total variation distance of probabilities.

    Parameters
    ----------
    reduction : {"batchmean", "sum", "mean", "none"}
        As in :func:`liger_tvd`, whose default is another.
    ignore_index : int
        The label of rows that are left out.

    Attributes
    ----------
    reduction, ignore_index
        As given; they may be changed.

    See Also
    --------
    liger_tvd : the same as a function, with types, errors and differences from the original.

    Examples
    --------
    >>> import torch
    >>> from klcore.compat.liger import LigerTVDLoss
    >>> print(round(LigerTVDLoss()(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])).item(), 6))
    0.4
    """

    __signature__ = InitSignature()

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__()
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(self, p: torch.Tensor, q: torch.Tensor, shift_labels: "torch.Tensor | None" = None) -> torch.Tensor:
        """The loss of the student's and the teacher's probabilities, as :func:`liger_tvd` takes them."""
        return liger_tvd(p, q, shift_labels, self.reduction, self.ignore_index)


def liger_tvd(
    input: torch.Tensor,
    target: torch.Tensor,
    shift_labels: "torch.Tensor | None" = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> torch.Tensor:
    """The function ``liger_tvd``: abs(p - q)/2, reduced.

    Parameters
    ----------
    input, target : tensor of shape (rows, classes)
        Probabilities of the student and of the teacher: float64, float32, float16 or bfloat16.
    shift_labels : tensor of integers, of shape (rows,), optional
        A row whose label is `ignore_index` is left out. Other labels are not looked at.
    reduction : {"mean", "batchmean", "sum", "none"}
        "batchmean": the sum divided by the number of rows that are not left out. "mean": by that number times classes.
        "none": the terms, of shape (rows, classes), 0 in rows that are left out.
    ignore_index : int
        The label of rows that are left out.

    Returns
    -------
    tensor
        A scalar, but for "none"; float32, or float64 if an argument is. Differentiable with respect to the input.

    Raises
    ------
    TypeError
        For what is no tensor.
    ValueError
        For other shapes, and an unknown reduction.
    AssertionError
        For labels that are not one a row.

    See Also
    --------
    klcore.tv_dist : in new code; takes logits.

    Notes
    -----
    As in Liger-Kernel 0.8.2. Different from it: where p = q the derivative is 0; the original's is -1/2. Where no row
    is left the means are 0, as its Jensen-Shannon divergence is; it raises ZeroDivisionError. Negative numbers, which
    are no probabilities, make NaN. 16-bit numbers are subtracted in float32. Nothing waits for the GPU.

    Examples
    --------
    >>> import torch
    >>> from klcore.compat.liger import liger_tvd
    >>> print(round(liger_tvd(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])).item(), 6))
    0.2
    """
    _check(input=input, target=target)
    word_of(reduction, "reduction", _REDUCTIONS)
    mask, rows = _rows(input, shift_labels, ignore_index)
    if reduction == "none":
        return tv_dist(target.detach(), input, reduction="none", weights=mask)
    return tv_dist(
        target.detach(),
        input,
        reduction="sum",
        weights=mask,
        denominator=_denominator(reduction, rows, input.shape[1]),
    )


class LigerKLDIVLoss(torch.nn.KLDivLoss):
    """The divergence of a target from the model's log-probabilities: ``torch.nn.KLDivLoss`` with an epsilon before it.

    Parameters
    ----------
    eps : float
        Taken, and not used; see :func:`liger_kl_div`.
    size_average, reduce : bool, optional
        Deprecated; as in ``torch.nn.KLDivLoss``, which warns.
    reduction : {"mean", "batchmean", "sum", "none"}
        As in :func:`liger_kl_div`. "mean" divides by the number of elements.
    log_target : bool
        The target holds log-probabilities.

    Attributes
    ----------
    eps, reduction, log_target
        As given; they may be changed.

    See Also
    --------
    liger_kl_div : the same as a function, with types, errors and differences from the original.

    Notes
    -----
    The order of the arguments is the original's: `eps` comes first, so say ``reduction="batchmean"`` by its name.

    Examples
    --------
    >>> import torch
    >>> from klcore.compat.liger import LigerKLDIVLoss
    >>> loss = LigerKLDIVLoss(reduction="batchmean")
    >>> print(round(loss(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]])).item(), 6))
    0.510826
    """

    __signature__ = InitSignature()

    def __init__(
        self,
        eps: float = 1e-10,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
    ) -> None:
        number(eps, "eps")
        super().__init__(size_average, reduce, reduction, log_target)
        self.eps = eps

    def forward(self, y_pred: torch.Tensor, y_true: torch.Tensor) -> torch.Tensor:
        """The loss of the model's log-probabilities and the target, as :func:`liger_kl_div` takes them."""
        return liger_kl_div(y_pred, y_true, reduction=self.reduction, log_target=self.log_target, eps=self.eps)


def liger_kl_div(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool = True,
    reduce: bool = True,
    reduction: str = "mean",
    log_target: bool = False,
    eps: float = 1e-10,
) -> torch.Tensor:
    """The function ``liger_kl_div``: t (log(t) - x), or exp(t) (t - x), reduced; in nats.

    Parameters
    ----------
    input : tensor of shape (rows, classes)
        Log-probabilities of the model: float64, float32, float16 or bfloat16.
    target : tensor of the same shape
        Probabilities, or log-probabilities with `log_target`.
    size_average, reduce : bool
        Taken, and not looked at, as in the original.
    reduction : {"mean", "batchmean", "sum", "none"}
        "batchmean": the sum divided by the number of rows. "mean": by the number of elements. "none": the terms.
    log_target : bool
        The target holds log-probabilities.
    eps : float
        Taken, and not used: klcore needs none.

    Returns
    -------
    tensor
        A scalar, but for "none"; float32, or float64 if an argument is. Differentiable with respect to the input, with
        the derivative -t of a term.

    Raises
    ------
    TypeError
        For what is no tensor.
    ValueError
        For other shapes, and an unknown reduction.

    See Also
    --------
    klcore.kl_div : in new code; takes logits, and is never negative.

    Notes
    -----
    As in Liger-Kernel 0.8.2: the literal sum, whose rounding may be negative for close rows; the means of no rows are
    NaN.

    Different from it: the original takes log(eps) as the logarithm of probabilities below `eps`, which adds up to
    ``eps/e`` a class, 4e-11 by default. A target of 0 contributes 0 whatever the input is; the original has NaN where
    that is -inf, and with `log_target` for every 0. Negative targets make NaN. 16-bit numbers are computed in float32;
    Triton has no logarithm of them.

    Examples
    --------
    >>> import torch
    >>> from klcore.compat.liger import liger_kl_div
    >>> print(round(liger_kl_div(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]])).item(), 6))
    0.255413
    """
    _check(input=input, target=target)
    word_of(reduction, "reduction", _REDUCTIONS)
    number(eps, "eps")
    space: Any = ("log_probs" if truth(log_target, "log_target") else "probs", "log_probs")
    if reduction == "none":
        return rel_entr(target.detach(), input, space=space, reduction="none")
    rows, classes = input.shape
    denominator = _denominator(reduction, rows, classes)
    return rel_entr(target.detach(), input, space=space, reduction="sum", denominator=denominator)


# ---- rows and denominators -------------------------------------------------------------------------------------------


def _check(**tensors: Any) -> None:
    check_tensors(**tensors)
    shapes = [tuple(t.shape) for t in tensors.values()]
    if len(shapes[0]) != 2 or shapes[0] != shapes[1]:
        raise ValueError(
            f"{' and '.join(tensors)} must be of one shape, (rows, classes); found {shapes[0]} and {shapes[1]}"
        )


def _rows(input: torch.Tensor, labels: "torch.Tensor | None", ignore_index: int) -> "tuple[torch.Tensor | None, Any]":
    """(which rows count, how many they are, at least 1)."""
    if labels is None:
        return None, max(input.shape[0], 1)
    check_tensors(shift_labels=labels)
    if labels.shape != input.shape[:1]:
        raise AssertionError(
            f"shift_labels must be one a row, of shape {tuple(input.shape[:1])}; found {tuple(labels.shape)}"
        )
    mask = (labels != ignore_index).to(input.device)
    return mask, mask.sum().clamp_min(1)  # counted where it is: the host need not know


def _denominator(reduction: str, rows: Any, classes: int) -> Any:
    return {"sum": None, "batchmean": rows, "mean": rows * classes}[reduction]
