"""Shared by the losses between two language models: PyTorch, the labels that mask tokens, and the meaning of beta.

Used by klcore.compat.trl and klcore.compat.liger.
"""

from collections.abc import Callable
from typing import Any

try:
    import torch as torch  # re-exported
except ImportError as error:
    raise ImportError(
        f"klcore.compat.trl and klcore.compat.liger need PyTorch, which cannot be imported ({error}); install it "
        "with: pip install 'klcore[torch]'"
    ) from error

from klcore.compat._arguments import dense, number
from klcore.family import js_div


def check_tensors(**given: Any) -> None:
    """Raise TypeError, naming the argument, for anything that is not a dense tensor."""
    dense(**given)
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, found {type(value).__name__}")


def of_beta(
    x: torch.Tensor, y: torch.Tensor, beta: Any, at_the_ends: Callable[..., Any], **options: Any
) -> torch.Tensor:
    """The Jensen-Shannon divergence as these libraries define it: a KL divergence at beta=0 and beta=1."""
    beta = number(beta, "beta")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1]; found {beta!r}")
    if beta == 0:
        return at_the_ends(x, y, **options)
    if beta == 1:
        return at_the_ends(y, x, **options)
    return js_div(x, y, beta=beta, **options)
