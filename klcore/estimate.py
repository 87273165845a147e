"""Estimates of the divergence of a policy from the tokens that it sampled, given only their two log-probabilities.

The terms are in src/kl_estimate.h. A token is a row of one class, so rows.py and the kernels handle weights, sums and
gradients as they do for `kl_div`.
"""

import math
from typing import TYPE_CHECKING, Any, SupportsFloat, overload

from klcore.backends import find
from klcore.operations import ESTIMATORS, Call
from klcore.parameters import check_divides, number, shown, units_per_nat
from klcore.typing import ArrayT, BothGrads, EstimateTotal, OneGrad, Plain, ReturnGrad

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11

    from klcore.typing import EstimateOptions, EstimateTotalOptions, OfNumPy

_REDUCTIONS = {"none": "row", "sum": "sum", "mean": "rowmean"}  # the name here -> the name in backends/options.py


@overload
def kl_estimate(
    log_x: "OfNumPy", log_y: "OfNumPy", *, reduction: EstimateTotal, return_grad: None = None,
    **options: "Unpack[EstimateTotalOptions]",
) -> Any: ...  # fmt: skip
@overload
def kl_estimate(
    log_x: "OfNumPy", log_y: "OfNumPy", *, reduction: EstimateTotal, return_grad: OneGrad,
    **options: "Unpack[EstimateTotalOptions]",
) -> tuple[Any, Any]: ...  # fmt: skip
@overload
def kl_estimate(
    log_x: "OfNumPy", log_y: "OfNumPy", *, reduction: EstimateTotal, return_grad: BothGrads,
    **options: "Unpack[EstimateTotalOptions]",
) -> tuple[Any, Any, Any]: ...  # fmt: skip
@overload
def kl_estimate(
    log_x: Plain, log_y: Plain, *, return_grad: ReturnGrad | None = None, **options: "Unpack[EstimateOptions]"
) -> Any: ...
@overload
def kl_estimate(
    log_x: ArrayT | Plain, log_y: ArrayT | Plain, *, return_grad: None = None, **options: "Unpack[EstimateOptions]"
) -> ArrayT: ...
@overload
def kl_estimate(
    log_x: ArrayT | Plain, log_y: ArrayT | Plain, *, return_grad: OneGrad, **options: "Unpack[EstimateOptions]"
) -> tuple[ArrayT, ArrayT]: ...
@overload
def kl_estimate(
    log_x: ArrayT | Plain, log_y: ArrayT | Plain, *, return_grad: BothGrads, **options: "Unpack[EstimateOptions]"
) -> tuple[ArrayT, ArrayT, ArrayT]: ...
@overload
def kl_estimate(
    log_x: ArrayT | Plain, log_y: ArrayT | Plain, *, return_grad: ReturnGrad | None,
    **options: "Unpack[EstimateOptions]",
) -> Any: ...  # fmt: skip
def kl_estimate(
    log_x: Any,
    log_y: Any,
    *,
    kind: str = "k3",
    ratio: Any = None,
    limit: SupportsFloat | None = None,
    reduction: str = "none",
    weights: Any = None,
    denominator: Any = None,
    base: SupportsFloat | None = None,
    return_grad: str | tuple[str, ...] | None = None,
    out: Any = None,
    device: str | None = None,
) -> Any:
    """Estimate KL(x || y) from tokens that were sampled from x, using only r = log_y - log_x of each token.

    For reinforcement learning with a KL penalty, where x is the policy, y is the reference, and only the
    log-probabilities of the sampled tokens are kept. If you have the logits, :func:`kl_div` is exact. The estimators
    are Schulman's [1]_.

    Parameters
    ----------
    log_x : array
        The log-probability of each token under x, from which it was sampled: one number per token, for the class that
        was sampled, not for the whole vocabulary. Any shape, and any library and dtype that :func:`kl_div` takes,
        except Dask.
    log_y : array
        The log-probability of the same tokens under y. Both broadcast.
    kind : {"k3", "k1", "k2"}
        "k1": -r, unbiased, of either sign. "k2": r**2 / 2, biased, never negative. "k3": exp(r) - 1 - r, unbiased,
        never negative, and exactly 0 at r = 0; small values are as precise as large ones.
    ratio : array, optional
        Importance weights: the probability of each token under x divided by its probability under the distribution that
        sampled it. Finite numbers >= 0, broadcastable to the tokens; anything else gives NaN. They multiply the values,
        and "mean" does not divide by them. They have no gradient.
    limit : float, optional
        Above 0: r is clipped to [-limit, limit], and the gradient is 0 outside of it. None means no clipping; "k3" and
        its gradient are then +inf where exp(r) overflows, which is r > 88 in float32.
    reduction : {"none", "sum", "mean"}
        "none": one value per token. "sum": the sum over all tokens. "mean": the sum divided by the sum of the weights,
        or by the number of tokens.
    weights : array, optional
        One weight >= 0 per token, broadcastable to the tokens; for example a boolean mask. Tokens with weight 0 are
        skipped and give 0, even if they hold NaN.
    denominator : float or 0-d array, optional
        Divides the value and the gradients; only with ``reduction="sum"``, as for :func:`kl_div`.
    base : float, optional
        The base of the logarithms, above 1: the value and the gradients are divided by ln(base). None gives nats. r and
        `limit` are always in nats.
    return_grad : {"x", "y", ("x", "y")}, optional
        Also return the gradient of the sum of the returned values with respect to log_x, log_y or both, with the tokens
        and `ratio` held fixed. PyTorch's autograd and ``jax.grad`` do not need this option.
    out, device
        As for :func:`kl_div`.

    Returns
    -------
    value : array or scalar
        float64 if log_x or log_y is float64 or was converted to it, else float32. It has the shape to which they
        broadcast for "none", and is a scalar otherwise.
    gradients : arrays
        In the shapes and dtypes of log_x and log_y, if `return_grad` asks for them.

    Raises
    ------
    TypeError
        As for :func:`kl_div`, and for a `ratio` or `weights` tensor of PyTorch that requires a gradient: multiply the
        result instead, ``ratio * klcore.kl_estimate(...)``.
    ValueError, klcore.BackendUnavailableError
        As for :func:`kl_div`.

    See Also
    --------
    kl_div : The exact divergence of whole distributions.

    Notes
    -----
    An unbiased value does not make an unbiased gradient. With the tokens held fixed, the expectation of the gradient
    with respect to x that autograd computes is 0 for "k1", the gradient of KL(x || y) for "k2", and the gradient of
    KL(y || x) for "k3". If the gradient of a `ratio` is taken as well, ``ratio * kl_estimate(...)``, "k1" and "k3" have
    the gradient of KL(x || y).

    References
    ----------
    .. [1] Schulman, J., "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html.

    Examples
    --------
    >>> import klcore
    >>> log_x, log_y, mask = [-0.5, -2.0, -0.1], [-0.7, -1.8, float("nan")], [True, True, False]
    >>> for kind in ("k1", "k2", "k3"):
    ...     print(kind, klcore.kl_estimate(log_x, log_y, kind=kind, weights=mask).round(4))
    k1 [ 0.2 -0.2  0. ]
    k2 [0.02 0.02 0.  ]
    k3 [0.0187 0.0214 0.    ]
    >>> print(klcore.kl_estimate(log_x, log_y, weights=mask, reduction="mean").round(4))
    0.0201
    """
    if not isinstance(kind, str) or kind not in ESTIMATORS:
        raise ValueError(f"kind must be one of {_list(ESTIMATORS)}; found {shown(kind)}")
    if not isinstance(reduction, str) or reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_list(_REDUCTIONS)}; found {shown(reduction)}")
    check_divides(denominator, reduction)
    return find(log_x, log_y, device).compute(Call(
        ESTIMATORS[kind], log_x, log_y, "log_probs", 0, _REDUCTIONS[reduction], weights, 1.0, return_grad, out, device,
        denominator, _limit(limit), units_per_nat(base), ratio=ratio,
    ))  # fmt: skip


def _limit(limit: Any) -> float:
    if limit is None:
        return math.inf
    found = number(limit, "limit")
    if not found > 0:
        raise ValueError(f"limit must be a number > 0, or None for no clipping; found {found!r}")
    return found


def _list(options: Any) -> str:
    return ", ".join(map(repr, options))
