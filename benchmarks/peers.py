"""The expressions by which other libraries compute what klcore computes, each written once.

The benchmarks of speed, memory and accuracy, on the CPU and on the GPU, take them from here. x is the teacher, y the
student. A library is imported where it is used, since no machine needs all of them.
"""

import functools
import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

import numpy as np


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# ---- NumPy, CuPy, SciPy, numexpr -------------------------------------------------------------------------------------


def array_kl(xp: Any, space: str, x: Any, y: Any, total: Callable[[Any], Any], gradient: bool) -> Any:
    """With NumPy or CuPy: `total(terms)`, and with `gradient` the derivative of their sum with respect to y."""

    def log_softmax(a: Any) -> Any:
        a = a - a.max(axis=-1, keepdims=True)
        return a - xp.log(xp.exp(a).sum(axis=-1, keepdims=True))

    if space == "probs":
        ratio = x / y
        value = total(x * xp.log(ratio))
        return (value, -ratio) if gradient else value
    if space == "logits":
        x, y = log_softmax(x), log_softmax(y)
    p = xp.exp(x)
    value = total(p * (x - y))
    if not gradient:
        return value
    return value, xp.exp(y) - p if space == "logits" else -p


def scipy_kl(name: str, space: str, x: Any, y: Any) -> Any:
    """One value per row, by scipy.special.kl_div, scipy.special.rel_entr or scipy.stats.entropy."""
    from scipy import special, stats

    to_probs = {"probs": np.asarray, "log_probs": np.exp, "logits": functools.partial(special.softmax, axis=-1)}[space]
    x, y = to_probs(x), to_probs(y)
    return stats.entropy(x, y, axis=-1) if name == "entropy" else getattr(special, name)(x, y).sum(axis=-1)


def numexpr_kl(space: str, x: Any, y: Any, work: Any, total: Callable[[Any], Any], gradient: bool) -> Any:
    """As array_kl, evaluated into `work` over threads; NumPy sums, since numexpr is no faster at that."""
    import numexpr

    def evaluate(expression: str, **names: Any) -> Any:
        return numexpr.evaluate(expression, names, out=work)

    def log_of_sum(a: Any) -> Any:
        top = a.max(axis=-1, keepdims=True)
        return top + np.log(evaluate("exp(a - top)", a=a, top=top).sum(axis=-1, keepdims=True))

    terms, derivative = {
        "probs": ("x * log(x / y)", "-x / y"),
        "log_probs": ("exp(x) * (x - y)", "-exp(x)"),
        "logits": ("exp(x - lx) * ((x - lx) - (y - ly))", "exp(y - ly) - exp(x - lx)"),
    }[space]
    names = {"x": x, "y": y}
    if space == "logits":
        names |= {"lx": log_of_sum(x), "ly": log_of_sum(y)}
    value = total(evaluate(terms, **names))
    return (value, evaluate(derivative, **names)) if gradient else value


# ---- numba: one fused parallel kernel per space ----------------------------------------------------------------------


@functools.cache
def numba_kernels() -> dict[tuple[str, bool], Any]:
    from numba import njit, prange

    kernel = njit(parallel=True, fastmath=True)
    zero = np.float32(0)

    @kernel
    def probs(x: Any, y: Any, values: Any) -> None:
        for r in prange(x.shape[0]):
            s = zero
            for i in range(x.shape[1]):
                s += x[r, i] * np.log(x[r, i] / y[r, i])
            values[r] = s

    @kernel
    def probs_gradient(x: Any, y: Any, values: Any, grad: Any) -> None:
        for r in prange(x.shape[0]):
            s = zero
            for i in range(x.shape[1]):
                ratio = x[r, i] / y[r, i]
                s += x[r, i] * np.log(ratio)
                grad[r, i] = -ratio
            values[r] = s

    @kernel
    def log_probs(x: Any, y: Any, values: Any) -> None:
        for r in prange(x.shape[0]):
            s = zero
            for i in range(x.shape[1]):
                s += np.exp(x[r, i]) * (x[r, i] - y[r, i])
            values[r] = s

    @kernel
    def log_probs_gradient(x: Any, y: Any, values: Any, grad: Any) -> None:
        for r in prange(x.shape[0]):
            s = zero
            for i in range(x.shape[1]):
                p = np.exp(x[r, i])
                s += p * (x[r, i] - y[r, i])
                grad[r, i] = -p
            values[r] = s

    @njit(fastmath=True)
    def log_of_sum(row: Any) -> Any:
        top = row[0]
        for i in range(row.size):
            top = max(top, row[i])
        s = zero
        for i in range(row.size):
            s += np.exp(row[i] - top)
        return top + np.log(s)

    @kernel
    def logits(x: Any, y: Any, values: Any) -> None:
        for r in prange(x.shape[0]):
            lx, ly = log_of_sum(x[r]), log_of_sum(y[r])
            s = zero
            for i in range(x.shape[1]):
                a = x[r, i] - lx
                s += np.exp(a) * (a - (y[r, i] - ly))
            values[r] = s

    @kernel
    def logits_gradient(x: Any, y: Any, values: Any, grad: Any) -> None:
        for r in prange(x.shape[0]):
            lx, ly = log_of_sum(x[r]), log_of_sum(y[r])
            s = zero
            for i in range(x.shape[1]):
                a, b = x[r, i] - lx, y[r, i] - ly
                p = np.exp(a)
                s += p * (a - b)
                grad[r, i] = np.exp(b) - p
            values[r] = s

    return {
        ("probs", False): probs,
        ("probs", True): probs_gradient,
        ("log_probs", False): log_probs,
        ("log_probs", True): log_probs_gradient,
        ("logits", False): logits,
        ("logits", True): logits_gradient,
    }


# ---- PyTorch, Liger-Kernel -------------------------------------------------------------------------------------------


def torch_kl(reduction: str) -> Callable[[Any, Any, bool], Any]:
    """PyTorch's kl_div as a function of log y, x, and whether x is a logarithm too. "row": one value per row."""
    import torch.nn.functional as F

    if reduction == "row":
        return lambda log_y, x, log_target: F.kl_div(log_y, x, reduction="none", log_target=log_target).sum(-1)
    return lambda log_y, x, log_target: F.kl_div(log_y, x, reduction=reduction, log_target=log_target)


def liger_kl() -> Callable[[Any, Any, bool], Any]:
    """Liger-Kernel's loss as such a function; the sum over all rows."""
    from liger_kernel.transformers import LigerKLDIVLoss

    losses = [LigerKLDIVLoss(reduction="sum", log_target=flag) for flag in (False, True)]
    return lambda log_y, x, log_target: losses[log_target](log_y, x)


def torch_loss(space: str, kl: Callable[[Any, Any, bool], Any]) -> Callable[[Any, Any], Any]:
    """The loss of x and y, by torch_kl or liger_kl. "soft targets": logits too, of which x becomes probabilities."""
    import torch.nn.functional as F

    return {
        "probs": lambda x, y: kl(y.log(), x, False),
        "log_probs": lambda x, y: kl(y, x, True),
        "probs log_probs": lambda x, y: kl(y, x, False),
        "logits": lambda x, y: kl(F.log_softmax(y, -1), F.log_softmax(x, -1), True),
        "soft targets": lambda x, y: kl(F.log_softmax(y, -1), F.softmax(x, -1), False),
    }[space]


def torch_step(loss: Callable[[Any], Any], y: Any) -> Callable[[], Any]:
    """A call that returns the losses of the rows of y, and the gradient of their sum by autograd."""

    def step() -> Any:
        student = y.detach().requires_grad_()
        value = loss(student)
        value.sum().backward()
        return value.detach(), student.grad

    return step


# ---- JAX -------------------------------------------------------------------------------------------------------------


def jax_terms(space: str, x: Any, y: Any) -> Any:
    """The terms, not yet summed."""
    import jax
    import jax.numpy as jnp

    if space == "probs":
        return x * jnp.log(x / y)
    if space == "logits":
        x, y = jax.nn.log_softmax(x), jax.nn.log_softmax(y)
    return jnp.exp(x) * (x - y)


def jax_js(x: Any, y: Any) -> Any:
    """TRL's formula of the Jensen-Shannon divergence, for rows of logits."""
    import jax
    import jax.numpy as jnp

    t, s = jax.nn.log_softmax(x), jax.nn.log_softmax(y)
    m = jnp.logaddexp(s, t) - math.log(2)
    return (jnp.exp(t) * (t - m) + jnp.exp(s) * (s - m)).sum(-1) / 2


# ---- the Jensen-Shannon divergence and the total variation distance of rows of logits --------------------------------
#
# Here and below: written from descriptions of what the systems compute, for PyTorch tensors.


def trl_js(x: Any, y: Any, beta: float = 0.5) -> Any:
    """The logarithm of the mixture by log-sum-exp."""
    import torch
    import torch.nn.functional as F

    s, t, w = y.log_softmax(-1), x.log_softmax(-1), torch.tensor(beta, dtype=x.dtype)
    m = torch.logsumexp(torch.stack([s + torch.log1p(-w), t + torch.log(w)]), 0)
    of_t, of_s = (F.kl_div(m, v, reduction="none", log_target=True) for v in (t, s))
    return (w * of_t + (1 - w) * of_s).sum(-1)


def liger_js(x: Any, y: Any, beta: float = 0.5) -> Any:
    """Entropies of the parts, minus that of the mixture."""
    s, t = y.log_softmax(-1), x.log_softmax(-1)
    of_t, of_s = beta * t.exp(), (1 - beta) * s.exp()
    m = of_t + of_s
    return (of_t * t + of_s * s - m * m.log()).sum(-1)


def mlx_js(x: Any, y: Any) -> Any:
    s, t = y.log_softmax(-1), x.log_softmax(-1)
    of_t, of_s = (v.exp() * (math.log(2) - (1 + (o - v).exp()).log()) for v, o in ((t, s), (s, t)))
    return (of_t + of_s).sum(-1) / 2


def torchmetrics_js(x: Any, y: Any) -> Any:
    p, q = x.softmax(-1), y.softmax(-1)
    m = (p + q) / 2
    return sum(v.xlogy(v / m).sum(-1) for v in (p, q)) / 2


def scipy_js(x: Any, y: Any) -> Any:
    from scipy.spatial.distance import jensenshannon

    return jensenshannon(x.softmax(-1).numpy(), y.softmax(-1).numpy(), axis=-1) ** 2


def liger_tvd(x: Any, y: Any) -> Any:
    return (x.softmax(-1) - y.softmax(-1)).abs().sum(-1) / 2


# ---- a teacher's top k: values of rows, of the student's logits y, and the teacher's log_p at `indices` --------------
#
# On one device, and of the KL forward.


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
