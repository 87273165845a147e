"""How the libraries beside which klcore is measured are asked for its divergence, in each space: what the benchmarks of
speed and of accuracy, on the CPU and on the GPU, have in common.
"""

from collections.abc import Callable
from typing import Any

import numpy as np


def to_probs(space: str) -> Callable[[Any], Any]:
    """SciPy's functions take probabilities."""
    from scipy.special import softmax

    return {"probs": np.asarray, "log_probs": np.exp, "logits": lambda a: softmax(a, axis=-1)}[space]


def torch_loss(space: str, kl: Callable[[Any, Any, bool], Any]) -> Callable[[Any, Any], Any]:
    """The loss of x and y, by PyTorch's function, or Liger's: of log y, x, and whether that is a logarithm as well."""
    import torch.nn.functional as F

    return {
        "probs": lambda x, y: kl(y.log(), x, False),
        "log_probs": lambda x, y: kl(y, x, True),
        "logits": lambda x, y: kl(F.log_softmax(y, -1), F.log_softmax(x, -1), True),
    }[space]


def jax_terms(space: str, x: Any, y: Any) -> Any:
    """Not yet summed."""
    import jax
    import jax.numpy as jnp

    if space == "probs":
        return x * jnp.log(x / y)
    if space == "logits":
        x, y = jax.nn.log_softmax(x), jax.nn.log_softmax(y)
    return jnp.exp(x) * (x - y)


# ---- a teacher's top k: values of rows, of the student's logits y, and the teacher's log_p at `indices` --------------
#
# Written from descriptions of what the systems compute, on tensors of PyTorch; on one device, and of the KL forward.


def _listed(y: Any, indices: Any) -> Any:
    return y.log_softmax(-1).gather(-1, indices)


def _sum(log_p: Any, log_q: Any) -> Any:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def verl_topk(y: Any, log_p: Any, indices: Any, least: float = -10.0) -> Any:
    """The log-softmax in the logits' dtype; no logarithm below `least`, and no negative sum."""
    log_q = _listed(y, indices).float().clamp_min(least)
    return _sum(log_p.clamp_min(least), log_q).clamp_min(0)


def nemo_topk(y: Any, log_p: Any, indices: Any) -> Any:
    """Both normalised on the k columns; the whole y in float32 before."""
    return _sum(log_p.log_softmax(-1), y.float().gather(-1, indices).log_softmax(-1))


def nemo_zero_topk(y: Any, log_p: Any, indices: Any) -> Any:
    """zero_outside_topk."""
    return _sum(log_p, _listed(y.float(), indices))


def _with_rest(log_p: Any, log_q: Any, log_rest: Callable[[Any], Any]) -> Any:
    """One class more, of the probability that the others leave."""
    p, q = log_rest(log_p), log_rest(log_q)
    return _sum(log_p, log_q) + p.exp() * (p - q)


def trl_topk(y: Any, log_p: Any, indices: Any) -> Any:
    """loss_add_tail."""
    log_rest = lambda a: (-a.logsumexp(-1).clamp(max=-1e-7).expm1()).log()  # noqa: E731
    return _with_rest(log_p, _listed(y, indices), log_rest)


def megatron_topk(y: Any, log_p: Any, indices: Any) -> Any:
    """add_ghost_token."""
    log_rest = lambda a: (1 - a.exp().sum(-1)).clamp(min=1e-8).log()  # noqa: E731
    return _with_rest(log_p, _listed(y.float(), indices), log_rest)
