"""Liger-Kernel's LigerJSD, LigerTVDLoss and LigerKLDIVLoss: modules and functions on klcore's own, without Triton.

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
    """The generalised Jensen-Shannon divergence of log-probabilities, with KL divergences at beta=0 and beta=1.

    Parameters
    ----------
    beta : float
        The weight of the teacher; see :func:`liger_jsd`.
    ignore_index : int
        The label of rows that are left out.

    Attributes
    ----------
    beta, ignore_index
        As given; they can be changed.

    See Also
    --------
    liger_jsd : The same as a function, with types, errors and differences from the original.

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
        """The loss of the student's and the teacher's log-probabilities; the arguments are as for :func:`liger_jsd`."""
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
        Rows with label `ignore_index` are left out. Other labels are ignored.
    beta : float
        0 means KL(P || Q), 1 means KL(Q || P). The formula itself is 0 there, so the loss is discontinuous at both
        ends.
    ignore_index : int
        The label of rows that are left out.

    Returns
    -------
    tensor
        The sum divided by the number of rows that are not left out, or 0 if there are none. In the dtype of the input.
        Differentiable with respect to the input.

    Raises
    ------
    TypeError
        If an argument is not a tensor.
    ValueError
        For other shapes, and for a `beta` outside of [0, 1] or between 0 and 1e-20.
    AssertionError
        If the labels are not one per row.

    See Also
    --------
    klcore.js_div : For new code; takes logits, which saves two arrays of their size.

    Notes
    -----
    As in Liger-Kernel 0.8.2, with these differences. A probability of 0, which is -inf, contributes what the divergence
    says; the original has NaN from 0 log 0. float64 is computed in float64. For 0 < beta < 1 the value is never
    negative; at both ends it is the literal sum of p log(p/q), as in the original, whose rounding error can have either
    sign. Nothing synchronises with the GPU.

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
        rel_entr,  # it has the derivative of the original; that of kl_div includes the terms -p + q
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
        As for :func:`liger_tvd`, which has another default.
    ignore_index : int
        The label of rows that are left out.

    Attributes
    ----------
    reduction, ignore_index
        As given; they can be changed.

    See Also
    --------
    liger_tvd : The same as a function, with types, errors and differences from the original.

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
        """The loss of the student's and the teacher's probabilities; the arguments are as for :func:`liger_tvd`."""
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
        Rows with label `ignore_index` are left out. Other labels are ignored.
    reduction : {"mean", "batchmean", "sum", "none"}
        "batchmean": the sum divided by the number of rows that are not left out. "mean": the sum divided by that number
        times classes. "none": the terms, of shape (rows, classes), which are 0 in rows that are left out.
    ignore_index : int
        The label of rows that are left out.

    Returns
    -------
    tensor
        A scalar, except for "none"; float64 if an argument is float64, else float32. Differentiable with respect to the
        input.

    Raises
    ------
    TypeError
        If an argument is not a tensor.
    ValueError
        For other shapes, and for an unknown reduction.
    AssertionError
        If the labels are not one per row.

    See Also
    --------
    klcore.tv_dist : For new code; takes logits.

    Notes
    -----
    As in Liger-Kernel 0.8.2, with these differences. Where p = q the derivative is 0; in the original it is -1/2. If
    all rows are left out the means are 0, like its Jensen-Shannon divergence; the original raises ZeroDivisionError.
    Negative numbers, which are not probabilities, give NaN. 16-bit numbers are subtracted in float32. Nothing
    synchronises with the GPU.

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
    """The divergence of a target from the model's log-probabilities: ``torch.nn.KLDivLoss`` with an extra `eps`.

    Parameters
    ----------
    eps : float
        Accepted, but not used; see :func:`liger_kl_div`.
    size_average, reduce : bool, optional
        Deprecated; as for ``torch.nn.KLDivLoss``, which warns.
    reduction : {"mean", "batchmean", "sum", "none"}
        As for :func:`liger_kl_div`. "mean" divides by the number of elements.
    log_target : bool
        The target holds log-probabilities.

    Attributes
    ----------
    eps, reduction, log_target
        As given; they can be changed.

    See Also
    --------
    liger_kl_div : The same as a function, with types, errors and differences from the original.

    Notes
    -----
    The order of the arguments is that of the original: `eps` comes first, so pass ``reduction="batchmean"`` by name.

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
        """The loss of the model's log-probabilities and the target; the arguments are as for :func:`liger_kl_div`."""
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
        Accepted, but ignored, as in the original.
    reduction : {"mean", "batchmean", "sum", "none"}
        "batchmean": the sum divided by the number of rows. "mean": the sum divided by the number of elements. "none":
        the terms.
    log_target : bool
        The target holds log-probabilities.
    eps : float
        Accepted, but not used: klcore does not need it.

    Returns
    -------
    tensor
        A scalar, except for "none"; float64 if an argument is float64, else float32. Differentiable with respect to the
        input; a term has the derivative -t.

    Raises
    ------
    TypeError
        If an argument is not a tensor.
    ValueError
        For other shapes, and for an unknown reduction.

    See Also
    --------
    klcore.kl_div : For new code; takes logits, and is never negative.

    Notes
    -----
    As in Liger-Kernel 0.8.2, this is the literal sum, which rounding can make negative for close rows; the means of no
    rows are NaN.

    Differences from Liger-Kernel: the original uses log(eps) as the logarithm of probabilities below `eps`, which adds
    up to ``eps/e`` per class, 4e-11 by default. A target of 0 contributes 0 whatever the input is; the original has NaN
    if the input is -inf, and with `log_target` for every 0. Negative targets give NaN. 16-bit numbers are computed in
    float32; Triton has no logarithm of them.

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
            f"{' and '.join(tensors)} must have the same shape, (rows, classes); found {shapes[0]} and {shapes[1]}"
        )


def _rows(input: torch.Tensor, labels: "torch.Tensor | None", ignore_index: int) -> "tuple[torch.Tensor | None, Any]":
    """(the mask of the rows that count, their number, at least 1)."""
    if labels is None:
        return None, max(input.shape[0], 1)
    check_tensors(shift_labels=labels)
    if labels.shape != input.shape[:1]:
        raise AssertionError(
            f"shift_labels must have one label per row, shape {tuple(input.shape[:1])}; found {tuple(labels.shape)}"
        )
    mask = (labels != ignore_index).to(input.device)
    return mask, mask.sum().clamp_min(1)  # stays on the device, without synchronisation


def _denominator(reduction: str, rows: Any, classes: int) -> Any:
    return {"sum": None, "batchmean": rows, "mean": rows * classes}[reduction]
