"""The words that the public functions take, as types: for their annotations, and for those of your own wrappers.

>>> import klcore
>>> from klcore.typing import Reduction
>>> def loss(x, y, reduction: Reduction = "row"):
...     return klcore.kl_div(x, y, reduction=reduction)

Arrays are `Any`: they go in, and come out, of whichever library the caller uses.
"""

from typing import Any, Literal, TypedDict

__all__ = ["EntropyGrad", "EntropyOptions", "Options", "Reduction", "ReturnGrad", "Space", "Spaces"]

Space = Literal["probs", "log_probs", "logits"]
Spaces = Space | tuple[Space, Space]
Reduction = Literal["row", "sum", "rowmean", "none", "batchmean", "mean"]
OneGrad = Literal["x", "y"] | tuple[Literal["x", "y"]]
BothGrads = tuple[Literal["x"], Literal["y"]]
ReturnGrad = OneGrad | BothGrads
EntropyGrad = Literal["x"] | tuple[Literal["x"]]


class _CommonOptions(TypedDict, total=False):
    axis: int
    reduction: Reduction
    weights: Any
    temperature: float
    out: Any
    device: str | None


class Options(_CommonOptions, total=False):
    """The keywords of kl_div, rel_entr and cross_entropy but `return_grad`; for ``**options: Unpack[Options]``."""

    space: Spaces


class EntropyOptions(_CommonOptions, total=False):
    """Those of entropy."""

    space: Space
