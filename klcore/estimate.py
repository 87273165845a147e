"""The divergence of a policy, estimated from the tokens that it sampled: of each the two log-probabilities are enough.

The terms stand in src/kl_estimate.h. A token is a row of one class, so rows.py and the kernels see to weights, sums and
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

_REDUCTIONS = {"none": "row", "sum": "sum", "mean": "rowmean"}  # as rows.py calls them


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
    """Estimates of KL(x || y) from tokens that were drawn from x: of each r = log_y - log_x alone.

    For RL with a KL penalty, where x is the policy and y the reference, and no more is kept of their distributions than
    the log-probabilities of the sampled tokens. Where the logits are at hand, :func:`kl_div` is exact.

    Parameters
    ----------
    log_x : array
        The log-probabilities of the tokens under x, which sampled them: one number a token, of the class that was
        drawn, and not of the whole vocabulary. Of any shape; of the libraries and dtypes that :func:`kl_div` takes, but
        dask's.
    log_y : array
        Those of the same tokens under y. Both broadcast.
    kind : {"k3", "k1", "k2"}
        "k1": -r, unbiased, of either sign. "k2": r**2 / 2, biased, never negative. "k3": exp(r) - 1 - r, unbiased,
        never negative, and exactly 0 at r = 0; small ones are as precise as large ones.
    ratio : array, optional
        Importance weights, the probability of each token under x divided by the one under whatever sampled it; finite
        numbers >= 0, broadcastable to the tokens. Multiplies the values, and is no part of what "mean" divides by.
        What is none makes NaN. No gradient is given with respect to it.
    limit : float, optional
        Above 0: r is clipped to [-limit, limit], and beyond the gradient is 0. None: nothing is clipped, and where
        exp(r) is more than the dtype holds (r > 88 in float32), "k3" and its gradient are +inf.
    reduction : {"none", "sum", "mean"}
        "none": a value a token. "mean": their sum, divided by that of the weights, or by the number of tokens.
    weights : array, optional
        One weight >= 0 a token, broadcastable to the tokens; a boolean mask, say. A token of weight 0 is not read, and
        yields 0, even if it holds NaN.
    denominator : float or 0-d array, optional
        Divides the value, and the gradients with it; only with "sum", as in :func:`kl_div`.
    base : float, optional
        Of the logarithms, above 1: the value and the gradients are divided by ln(base). None: nats. r, and `limit`, are
        always in nats.
    return_grad : {"x", "y", ("x", "y")}, optional
        Also return the derivative of the sum of what is returned with respect to log_x, log_y: with the tokens, and
        `ratio`, fixed. PyTorch's autograd and ``jax.grad`` need no such word.
    out, device
        As for :func:`kl_div`.

    Returns
    -------
    value : array or scalar
        float64 if log_x or log_y is, else float32. Of the shape to which they broadcast for "none", else a scalar.
    gradients : arrays
        Of the shape and dtype of log_x and log_y, if `return_grad` asks for them.

    Raises
    ------
    TypeError, ValueError, klcore.BackendUnavailableError
        As :func:`kl_div`; TypeError also for a `ratio` or `weights` of PyTorch's that require a gradient: multiply the
        result instead, ``ratio * klcore.kl_estimate(...)``.

    See Also
    --------
    kl_div : the divergence itself, of whole distributions.

    Notes
    -----
    An unbiased value does not make an unbiased gradient. With the tokens fixed, what autograd finds with respect to x
    is on average 0 for "k1", the gradient of KL(x || y) for "k2", and that of KL(y || x) for "k3". With a `ratio` of
    which the gradient is taken as well, ``ratio * kl_estimate(...)``, "k1" and "k3" have that of KL(x || y).

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
        raise ValueError(f"limit must be a number > 0, or None to clip nothing; found {found!r}")
    return found


def _list(words: Any) -> str:
    return ", ".join(repr(w) for w in words)
