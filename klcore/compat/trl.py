"""TRL's generalized_jsd_loss, the loss of its GKDTrainer: logits, labels and denominators on klcore's functions."""

from typing import Any

from klcore.compat._arguments import word_of
from klcore.compat._distillation import check_tensors, of_beta, torch
from klcore.divergence import kl_div, rel_entr

__all__ = ["generalized_jsd_loss"]

_REDUCTIONS = ("batchmean", "sum", "mean", "none")
_HALVES = (torch.float16, torch.bfloat16)


def generalized_jsd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: "torch.Tensor | None" = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Any = None,
) -> torch.Tensor:
    """The loss of TRL's ``GKDTrainer``, beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S.

    T and S are the softmax of the teacher's and the student's logits; in nats.

    Parameters
    ----------
    student_logits, teacher_logits : tensor of shape (..., classes)
        Usually (batch, tokens, classes): float64, float32, float16 or bfloat16.
    labels : tensor of integers, of shape (...), optional
        Tokens with label -100 are left out. Other labels are ignored.
    beta : float
        0 means KL(T || S), 1 means KL(S || T). The formula itself is 0 there, so the loss is discontinuous at both
        ends.
    temperature : float
        Divides the logits. The result is not multiplied by its square.
    reduction : {"batchmean", "sum", "mean", "none"}
        "batchmean": the sum divided by the number of tokens that are not left out, or by 1 if there are none; without
        labels, by the size of the first axis. "mean": the sum divided by that number times classes; without labels, by
        the number of elements. "none": the terms, of shape (tokens not left out, classes) with labels, else of the
        shape of the logits.
    num_items_in_batch : number or 0-d tensor, optional
        Divides the sum, whatever `reduction` is. A tensor on a GPU is read there, without synchronisation.

    Returns
    -------
    tensor
        A scalar, except for "none". The dtype is the wider one of the logits, and float32 under autocast.
        Differentiable with respect to both logits.

    Raises
    ------
    TypeError
        If an argument is not a tensor.
    RuntimeError
        If the logits have different shapes.
    IndexError
        If the labels are not one per token.
    ValueError
        For an unknown reduction, a `beta` outside of [0, 1] or between 0 and 1e-20, a temperature that is not positive,
        and a `num_items_in_batch` that is negative or has dimensions.

    See Also
    --------
    klcore.js_div : For new code, with arrays of any library; with ``scaled=True`` it is continuous in beta.

    Notes
    -----
    As in TRL 1.10: if all tokens are left out, "batchmean" and "sum" are 0, with gradient 0, and "mean" is NaN.

    Differences from TRL: sums are never negative, and exactly 0 for equal logits. 16-bit numbers are computed in
    float32 and rounded once, and `beta` is not rounded to their dtype. Classes that are -inf in both logits contribute
    0, not NaN, and a token that is left out may hold anything. An unknown reduction raises, where the original returns
    the terms. A `num_items_in_batch` of 0 gives NaN. Except for "none", the only array of the size of the logits is the
    gradient.

    ``GOLDTrainer`` has another parameter, `logits_are_probs`, before `num_items_in_batch`; it is not supported.

    Examples
    --------
    >>> import torch
    >>> from klcore.compat.trl import generalized_jsd_loss
    >>> student = torch.tensor([[[1.0, 1.0], [0.0, 5.0]]], requires_grad=True)
    >>> teacher = torch.tensor([[[2.0, 0.0], [9.0, 9.0]]])
    >>> loss = generalized_jsd_loss(student, teacher, labels=torch.tensor([[7, -100]]), beta=0.1)
    >>> loss.backward()
    >>> print(round(loss.item(), 6), student.grad.tolist()[0][1])
    0.029878 [0.0, 0.0]
    """
    check_tensors(student_logits=student_logits, teacher_logits=teacher_logits)
    shape = tuple(student_logits.shape)
    if not shape or shape != tuple(teacher_logits.shape):
        raise RuntimeError(
            "student_logits and teacher_logits must have the same shape, (..., classes); found "
            f"{shape} and {tuple(teacher_logits.shape)}"
        )
    mask = None if labels is None else _mask(labels, student_logits)
    options: dict[str, Any] = {"space": "logits", "temperature": temperature, "weights": mask}
    if num_items_in_batch is None and word_of(reduction, "reduction", _REDUCTIONS) == "none":
        value = of_beta(teacher_logits, student_logits, beta, rel_entr, reduction="none", **options)
        value = value if mask is None else value[mask]
    else:  # kl_div has the same sum as rel_entr, but is never negative
        denominator = _denominator(student_logits, mask, reduction, num_items_in_batch)
        value = of_beta(
            teacher_logits, student_logits, beta, kl_div, reduction="sum", denominator=denominator, **options
        )
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    if isinstance(num_items_in_batch, torch.Tensor):
        dtype = torch.promote_types(dtype, num_items_in_batch.dtype)
    if dtype in _HALVES and not torch.is_autocast_enabled(student_logits.device.type):
        return value.to(dtype)
    return value  # under autocast, the original computes in float32


def _mask(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The mask of the tokens that count."""
    check_tensors(labels=labels)
    if labels.shape != logits.shape[:-1]:
        raise IndexError(
            f"labels must have one label per token, shape {tuple(logits.shape[:-1])}; found {tuple(labels.shape)}"
        )
    return (labels != -100).to(logits.device)


def _denominator(logits: torch.Tensor, mask: "torch.Tensor | None", reduction: str, items: Any) -> Any:
    if isinstance(items, torch.Tensor):
        if items.ndim:
            raise ValueError(f"num_items_in_batch must be a number or a 0-d tensor; found shape {tuple(items.shape)}")
        return items.to(logits.device)
    if items is not None or reduction == "sum":
        return items
    if mask is None:
        return max(logits.shape[0], 1) if reduction == "batchmean" else logits.numel()
    return mask.sum().clamp_min(1) if reduction == "batchmean" else mask.sum() * logits.shape[-1]
