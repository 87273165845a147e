"""The relatives of the divergence, one function each, with the parameters that only they have.

All of them sum a function of p and q over the classes, whose terms are non-negative, and exactly 0 where p equals q
(src/kl_family.h). So no value is negative, whatever is rounded. `kl_div` explains the common options.
"""

from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex, overload

from klcore.backends import find
from klcore.operations import (
    ALPHA_DIV,
    CHI2_DIV,
    JS_DIV,
    MIXED_KL_DIV,
    RENYI_DIV,
    SKEW_KL_DIV,
    SQ_HELLINGER,
    TV_DIST,
    Call,
)
from klcore.parameters import number, refuse_base, units_per_nat
from klcore.typing import ArrayT, BothGrads, OneGrad, Plain, ReturnGrad, Temperature, Total

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11

    from klcore.typing import (
        AlphaOptions,
        AlphaTotalOptions,
        BetaOptions,
        BetaTotalOptions,
        ForwardOptions,
        ForwardTotalOptions,
        ListedOptions,
        ListedTotalOptions,
        OfNumPy,
        Options,
        RenyiOptions,
        RenyiTotalOptions,
        TotalOptions,
    )


# The smallest parameter above 0: products of smaller ones with probabilities would leave the range of float32.
_LEAST = 1e-20


@overload
def js_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: None = None, **options: "Unpack[BetaTotalOptions]"
) -> Any: ...
@overload
def js_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: OneGrad, **options: "Unpack[BetaTotalOptions]"
) -> tuple[Any, Any]: ...
@overload
def js_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: BothGrads, **options: "Unpack[BetaTotalOptions]"
) -> tuple[Any, Any, Any]: ...
@overload
def js_div(x: Plain, y: Plain, *, return_grad: ReturnGrad | None = None, **options: "Unpack[BetaOptions]") -> Any: ...
@overload
def js_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: None = None, **options: "Unpack[BetaOptions]"
) -> ArrayT: ...
@overload
def js_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: OneGrad, **options: "Unpack[BetaOptions]"
) -> tuple[ArrayT, ArrayT]: ...
@overload
def js_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: BothGrads, **options: "Unpack[BetaOptions]"
) -> tuple[ArrayT, ArrayT, ArrayT]: ...
@overload
def js_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: ReturnGrad | None, **options: "Unpack[BetaOptions]"
) -> Any: ...
def js_div(
    x: Any,
    y: Any,
    *,
    beta: SupportsFloat = 0.5,
    scaled: bool = False,
    space: str | tuple[str, str] = "probs",
    axis: SupportsIndex = -1,
    reduction: str = "row",
    weights: Any = None,
    denominator: Any = None,
    temperature: Temperature = 1.0,
    base: SupportsFloat | None = None,
    indices: Any = None,
    tail: str | None = None,
    tail_mass: Any = None,
    return_grad: str | tuple[str, ...] | None = None,
    out: Any = None,
    device: str | None = None,
) -> Any:
    """Jensen-Shannon divergence beta KL(x || m) + (1 - beta) KL(y || m), where m = beta x + (1 - beta) y, in nats.

    This is Lin's divergence [1]_ with weights beta and 1 - beta.

    Parameters
    ----------
    x, y : array of shape (..., n, ...)
        The truth and the model.
    beta : float
        The weight of x, at least 1e-20 and below 1. It is also the beta of GKD, TRL and Liger-Kernel, except that they
        define 0 and 1 as the two KL divergences; see `scaled`.
    scaled : bool
        Divide by ``beta*(1 - beta)``. The result is then continuous in beta, which can also be 0 and 1: it is
        ``kl_div(x, y)`` at beta=0 and ``kl_div(y, x)`` at beta=1.
    space, axis, reduction, weights, denominator, temperature, base, return_grad, out, device
        As for :func:`kl_div`.
    indices, tail, tail_mass
        For an x that lists only some of the classes of y, as for :func:`kl_div`.

    Returns
    -------
    value, gradients
        As for :func:`kl_div`. For distributions, the value is at most ``-beta*log(beta) - (1 - beta)*log(1 - beta)``,
        which is log(2) for beta=0.5. It is finite even if one argument is 0 where the other is not.

    Raises
    ------
    ValueError
        For a `beta` outside of its range, and as for :func:`kl_div`.
    TypeError, klcore.BackendUnavailableError
        As for :func:`kl_div`.

    See Also
    --------
    kl_div : Explains all other options, results and errors.
    mixed_kl_div : The weighted sum of the divergences in both directions.
    skew_kl_div : Only one of the two divergences from a mixture.

    Notes
    -----
    The terms are ``beta D(p, m) + (1 - beta) D(q, m)``, with ``D(w, v) = w log(w/v) - w + v``. Per class, x = 0
    contributes ``-(1 - beta) log(1 - beta) y``; y = 0 contributes ``-beta log(beta) x``; negative numbers and NaN give
    NaN.

    ``scipy.spatial.distance.jensenshannon`` is a distance: the square root of this divergence at beta=0.5, of arguments
    that it normalises first.

    References
    ----------
    .. [1] Lin, J., "Divergence Measures Based on the Shannon Entropy", IEEE Transactions on Information Theory 37
       (1991).

    Examples
    --------
    >>> import klcore
    >>> print(round(float(klcore.js_div([0.5, 0.5], [0.9, 0.1])), 6))
    0.101749
    """
    beta = number(beta, "beta")
    if not (0 <= beta <= 1 if scaled else 0 < beta < 1):
        if not scaled and beta in (0, 1):
            pair = "x, y" if beta == 0 else "y, x"
            raise ValueError(
                f"at beta={beta:g} the Jensen-Shannon divergence is 0 for all x and y; TRL and Liger-Kernel return "
                f"kl_div({pair}) there: call that, or pass scaled=True"
            )
        raise ValueError(f"beta must be in {'[0, 1]' if scaled else '(0, 1)'}; found {beta!r}")
    if 0 < beta < _LEAST:
        raise ValueError(f"beta must be 0 with scaled=True, or at least {_LEAST:g}; found {beta!r}")
    operation, parameter, factor = JS_DIV, beta, units_per_nat(base)
    if scaled and beta in (0, 1):
        operation, parameter = MIXED_KL_DIV, 1 - beta
    elif scaled:
        factor /= beta * (1 - beta)
    return find(x, y, device).compute(Call(
        operation, x, y, space, axis, reduction, weights, temperature, return_grad, out, device, denominator,
        parameter, factor,
        indices=indices, tail=tail, tail_mass=tail_mass,
    ))  # fmt: skip


@overload
def mixed_kl_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: None = None, **options: "Unpack[ForwardTotalOptions]"
) -> Any: ...
@overload
def mixed_kl_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: OneGrad, **options: "Unpack[ForwardTotalOptions]"
) -> tuple[Any, Any]: ...
@overload
def mixed_kl_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: BothGrads, **options: "Unpack[ForwardTotalOptions]"
) -> tuple[Any, Any, Any]: ...
@overload
def mixed_kl_div(
    x: Plain, y: Plain, *, return_grad: ReturnGrad | None = None, **options: "Unpack[ForwardOptions]"
) -> Any: ...
@overload
def mixed_kl_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: None = None, **options: "Unpack[ForwardOptions]"
) -> ArrayT: ...
@overload
def mixed_kl_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: OneGrad, **options: "Unpack[ForwardOptions]"
) -> tuple[ArrayT, ArrayT]: ...
@overload
def mixed_kl_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: BothGrads, **options: "Unpack[ForwardOptions]"
) -> tuple[ArrayT, ArrayT, ArrayT]: ...
@overload
def mixed_kl_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: ReturnGrad | None, **options: "Unpack[ForwardOptions]"
) -> Any: ...
def mixed_kl_div(
    x: Any,
    y: Any,
    *,
    forward: SupportsFloat = 0.5,
    space: str | tuple[str, str] = "probs",
    axis: SupportsIndex = -1,
    reduction: str = "row",
    weights: Any = None,
    denominator: Any = None,
    temperature: Temperature = 1.0,
    base: SupportsFloat | None = None,
    indices: Any = None,
    tail: str | None = None,
    tail_mass: Any = None,
    return_grad: str | tuple[str, ...] | None = None,
    out: Any = None,
    device: str | None = None,
) -> Any:
    """Forward and reverse divergence, forward KL(x || y) + (1 - forward) KL(y || x), in nats.

    Twice the value at forward=0.5 is Jeffreys' divergence [1]_.

    Parameters
    ----------
    x, y : array of shape (..., n, ...)
        The truth and the model.
    forward : float
        The weight of KL(x || y), from 0 to 1. NeMo calls it ``mixed_kl_weight``, torchtune ``sym_kd_ratio``.
    space, axis, reduction, weights, denominator, temperature, base, return_grad, out, device
        As for :func:`kl_div`.
    indices, tail, tail_mass
        For an x that lists only some of the classes of y, as for :func:`kl_div`.

    Returns
    -------
    value, gradients
        As for :func:`kl_div`.

    Raises
    ------
    ValueError
        For a `forward` outside of [0, 1], and as for :func:`kl_div`.
    TypeError, klcore.BackendUnavailableError
        As for :func:`kl_div`.

    See Also
    --------
    kl_div : Explains all other options, results and errors.
    js_div : Another symmetric combination, which is always finite.

    Notes
    -----
    Per class, if one argument is 0 and the other is not, the result is +inf, unless the weight of the divergence that
    is infinite there is 0; negative numbers and NaN give NaN.

    References
    ----------
    .. [1] Jeffreys, H., "An Invariant Form for the Prior Probability in Estimation Problems", Proceedings of the Royal
       Society A 186 (1946).

    Examples
    --------
    >>> import klcore
    >>> print(round(float(klcore.mixed_kl_div([0.5, 0.5], [0.9, 0.1])), 6))
    0.439445
    """
    forward = number(forward, "forward")
    if not 0 <= forward <= 1:
        raise ValueError(f"forward must be in [0, 1]; found {forward!r}")
    return find(x, y, device).compute(Call(
        MIXED_KL_DIV, x, y, space, axis, reduction, weights, temperature, return_grad, out, device, denominator,
        forward, units_per_nat(base),
        indices=indices, tail=tail, tail_mass=tail_mass,
    ))  # fmt: skip


@overload
def skew_kl_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: None = None, **options: "Unpack[AlphaTotalOptions]"
) -> Any: ...
@overload
def skew_kl_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: OneGrad, **options: "Unpack[AlphaTotalOptions]"
) -> tuple[Any, Any]: ...
@overload
def skew_kl_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: BothGrads, **options: "Unpack[AlphaTotalOptions]"
) -> tuple[Any, Any, Any]: ...
@overload
def skew_kl_div(
    x: Plain, y: Plain, *, return_grad: ReturnGrad | None = None, **options: "Unpack[AlphaOptions]"
) -> Any: ...
@overload
def skew_kl_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: None = None, **options: "Unpack[AlphaOptions]"
) -> ArrayT: ...
@overload
def skew_kl_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: OneGrad, **options: "Unpack[AlphaOptions]"
) -> tuple[ArrayT, ArrayT]: ...
@overload
def skew_kl_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: BothGrads, **options: "Unpack[AlphaOptions]"
) -> tuple[ArrayT, ArrayT, ArrayT]: ...
@overload
def skew_kl_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: ReturnGrad | None, **options: "Unpack[AlphaOptions]"
) -> Any: ...
def skew_kl_div(
    x: Any,
    y: Any,
    *,
    alpha: SupportsFloat = 0.1,
    space: str | tuple[str, str] = "probs",
    axis: SupportsIndex = -1,
    reduction: str = "row",
    weights: Any = None,
    denominator: Any = None,
    temperature: Temperature = 1.0,
    base: SupportsFloat | None = None,
    return_grad: str | tuple[str, ...] | None = None,
    out: Any = None,
    device: str | None = None,
) -> Any:
    """Skew divergence KL(x || m), where m = alpha x + (1 - alpha) y, in nats.

    The skew divergence of Lee [1]_, and the loss of DistiLLM [2]_, whose reverse loss is ``skew_kl_div(y, x)``.

    Parameters
    ----------
    x, y : array of shape (..., n, ...)
        The truth and the model.
    alpha : float
        The weight of x in m: 0, which is ``kl_div(x, y)``, or at least 1e-20 and below 1.
    space, axis, reduction, weights, denominator, temperature, base, return_grad, out, device
        As for :func:`kl_div`.

    Returns
    -------
    value, gradients
        As for :func:`kl_div`. For distributions, the value is at most ``-log(alpha)``.

    Raises
    ------
    ValueError
        For an `alpha` outside of its range, and as for :func:`kl_div`.
    TypeError, klcore.BackendUnavailableError
        As for :func:`kl_div`.

    See Also
    --------
    kl_div : Explains all other options, results and errors.
    js_div : The divergences of both x and y from a mixture.

    Notes
    -----
    Per class, x = 0 contributes ``(1 - alpha) y``; y = 0 contributes ``(alpha - 1 - log(alpha)) x``; negative numbers
    and NaN give NaN.

    References
    ----------
    .. [1] Lee, L., "On the Effectiveness of the Skew Divergence for Statistical Language Analysis", AISTATS (2001).
    .. [2] Ko, J., et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML (2024).

    Examples
    --------
    >>> import klcore
    >>> print(round(float(klcore.skew_kl_div([0.5, 0.5], [0.9, 0.1])), 6))
    0.365321
    """
    alpha = number(alpha, "alpha")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be in [0, 1); found {alpha!r}")
    if 0 < alpha < _LEAST:
        raise ValueError(f"alpha must be 0, or at least {_LEAST:g}; found {alpha!r}")
    operation, parameter = (SKEW_KL_DIV, alpha) if alpha else (MIXED_KL_DIV, 1.0)
    return find(x, y, device).compute(Call(
        operation, x, y, space, axis, reduction, weights, temperature, return_grad, out, device, denominator,
        parameter, units_per_nat(base),
    ))  # fmt: skip


@overload
def alpha_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: None = None, **options: "Unpack[AlphaTotalOptions]"
) -> Any: ...
@overload
def alpha_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: OneGrad, **options: "Unpack[AlphaTotalOptions]"
) -> tuple[Any, Any]: ...
@overload
def alpha_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: BothGrads, **options: "Unpack[AlphaTotalOptions]"
) -> tuple[Any, Any, Any]: ...
@overload
def alpha_div(
    x: Plain, y: Plain, *, return_grad: ReturnGrad | None = None, **options: "Unpack[AlphaOptions]"
) -> Any: ...
@overload
def alpha_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: None = None, **options: "Unpack[AlphaOptions]"
) -> ArrayT: ...
@overload
def alpha_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: OneGrad, **options: "Unpack[AlphaOptions]"
) -> tuple[ArrayT, ArrayT]: ...
@overload
def alpha_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: BothGrads, **options: "Unpack[AlphaOptions]"
) -> tuple[ArrayT, ArrayT, ArrayT]: ...
@overload
def alpha_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: ReturnGrad | None, **options: "Unpack[AlphaOptions]"
) -> Any: ...
def alpha_div(
    x: Any,
    y: Any,
    *,
    alpha: SupportsFloat = 0.5,
    space: str | tuple[str, str] = "probs",
    axis: SupportsIndex = -1,
    reduction: str = "row",
    weights: Any = None,
    denominator: Any = None,
    temperature: Temperature = 1.0,
    base: Any = None,
    return_grad: str | tuple[str, ...] | None = None,
    out: Any = None,
    device: str | None = None,
) -> Any:
    """Alpha divergence (sum(x**alpha * y**(1 - alpha)) - 1)/(alpha*(alpha - 1)).

    This is the divergence of Cressie and Read [1]_ and of Amari [2]_. It is continuous in alpha: KL(x || y) at alpha=1
    and KL(y || x) at alpha=0. It is 4 times :func:`sq_hellinger` at alpha=0.5, and half of :func:`chi2_div` at alpha=2.
    The relative entropy of Tsallis is alpha times this divergence.

    Parameters
    ----------
    x, y : array of shape (..., n, ...)
        The truth and the model.
    alpha : float
        0, or any number of magnitude 1e-20 to 1e20.
    space, axis, reduction, weights, denominator, temperature, return_grad, out, device
        As for :func:`kl_div`.
    base : None
        Not supported: there is no logarithm in this divergence.

    Returns
    -------
    value, gradients
        As for :func:`kl_div`. For distributions and 0 < alpha < 1, the value is at most ``1/(alpha*(1 - alpha))``.

    Raises
    ------
    ValueError
        For an `alpha` outside of its range, for a `base`, and as for :func:`kl_div`.
    TypeError, klcore.BackendUnavailableError
        As for :func:`kl_div`.

    See Also
    --------
    kl_div : Explains all other options, results and errors.
    renyi_div : A function of this divergence, in nats.

    Notes
    -----
    The terms are ``(p**a q**(1-a) - a p - (1-a) q)/(a (a-1))``. They are never negative, and for distributions their
    sum is the formula above. Per class, x = 0 contributes ``y/alpha``, or +inf if alpha <= 0; y = 0 contributes
    ``x/(1 - alpha)``, or +inf if alpha >= 1; negative numbers and NaN give NaN.

    References
    ----------
    .. [1] Cressie, N., and Read, T. R. C., "Multinomial Goodness-of-Fit Tests", Journal of the Royal Statistical
       Society B 46 (1984).
    .. [2] Amari, S., "Differential-Geometrical Methods in Statistics", Springer (1985).

    Examples
    --------
    >>> import klcore
    >>> print(round(float(klcore.alpha_div([0.5, 0.5], [0.9, 0.1])), 6))
    0.422291
    """
    refuse_base(base, "alpha_div")
    alpha = number(alpha, "alpha")
    if not (alpha == 0 or _LEAST <= abs(alpha) <= 1 / _LEAST):
        raise ValueError(f"alpha must be 0, or a number of magnitude {_LEAST:g} to {1 / _LEAST:g}; found {alpha!r}")
    return find(x, y, device).compute(Call(
        ALPHA_DIV, x, y, space, axis, reduction, weights, temperature, return_grad, out, device, denominator,
        alpha,
    ))  # fmt: skip


@overload
def renyi_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: None = None, **options: "Unpack[RenyiTotalOptions]"
) -> Any: ...
@overload
def renyi_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: OneGrad, **options: "Unpack[RenyiTotalOptions]"
) -> tuple[Any, Any]: ...
@overload
def renyi_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: BothGrads, **options: "Unpack[RenyiTotalOptions]"
) -> tuple[Any, Any, Any]: ...
@overload
def renyi_div(
    x: Plain, y: Plain, *, return_grad: ReturnGrad | None = None, **options: "Unpack[RenyiOptions]"
) -> Any: ...
@overload
def renyi_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: None = None, **options: "Unpack[RenyiOptions]"
) -> ArrayT: ...
@overload
def renyi_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: OneGrad, **options: "Unpack[RenyiOptions]"
) -> tuple[ArrayT, ArrayT]: ...
@overload
def renyi_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: BothGrads, **options: "Unpack[RenyiOptions]"
) -> tuple[ArrayT, ArrayT, ArrayT]: ...
@overload
def renyi_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: ReturnGrad | None, **options: "Unpack[RenyiOptions]"
) -> Any: ...
def renyi_div(
    x: Any,
    y: Any,
    *,
    alpha: SupportsFloat,
    space: str | tuple[str, str] = "probs",
    axis: SupportsIndex = -1,
    reduction: str = "row",
    weights: Any = None,
    denominator: Any = None,
    temperature: Temperature = 1.0,
    base: SupportsFloat | None = None,
    return_grad: str | tuple[str, ...] | None = None,
    out: Any = None,
    device: str | None = None,
) -> Any:
    """Rényi divergence log(sum(x**alpha * y**(1 - alpha)))/(alpha - 1), in nats.

    The divergence of Rényi [1]_, whose properties are collected in [2]_. It is continuous in alpha: KL(x || y) at
    alpha=1. It is ``-2*log(1 - sq_hellinger(x, y))`` at alpha=0.5, and ``log(1 + chi2_div(x, y))`` at alpha=2.

    Parameters
    ----------
    x, y : array of shape (..., n, ...)
        The truth and the model, both distributions. For numbers that do not sum to 1 the value means nothing. Pass
        counts with ``space="counts"``, which normalises them.
    alpha : float
        From 1e-20 to 1e20. There is no default.
    space, axis, weights, denominator, temperature, base, return_grad, out, device
        As for :func:`kl_div`.
    reduction : {"row", "sum", "rowmean", "batchmean", "mean"}
        As for :func:`kl_div`. There is no "none", because this divergence is not a sum over the classes.

    Returns
    -------
    value, gradients
        As for :func:`kl_div`. The value does not decrease as alpha increases.

    Raises
    ------
    ValueError
        For an `alpha` outside of its range, for ``reduction="none"``, and as for :func:`kl_div`.
    TypeError, klcore.BackendUnavailableError
        As for :func:`kl_div`.

    See Also
    --------
    kl_div : Explains all other options, results and errors.
    alpha_div : The divergence from which this one is computed.

    Notes
    -----
    Computed as ``log1p(alpha*(alpha - 1)*A)/(alpha - 1)`` with ``A = alpha_div(x, y, alpha=alpha)``, which is as
    accurate as A if x and y are close. If ``sum(x**alpha * y**(1 - alpha))`` is below 1/2 or out of range, the
    logarithm of this sum is computed directly.

    The value is +inf for alpha < 1 if x and y have no class in common, and for alpha >= 1 if y is 0 where x is not;
    negative numbers and NaN give NaN.

    References
    ----------
    .. [1] Rényi, A., "On Measures of Entropy and Information", Proceedings of the 4th Berkeley Symposium (1961).
    .. [2] van Erven, T., and Harremoës, P., "Rényi Divergence and Kullback-Leibler Divergence", IEEE Transactions on
       Information Theory 60 (2014).

    Examples
    --------
    >>> import klcore
    >>> print(round(float(klcore.renyi_div([0.5, 0.5], [0.9, 0.1], alpha=2.0)), 6))
    1.021651
    """
    alpha = number(alpha, "alpha")
    if not _LEAST <= alpha <= 1 / _LEAST:
        raise ValueError(f"alpha must be a number from {_LEAST:g} to {1 / _LEAST:g}; found {alpha!r}")
    return find(x, y, device).compute(Call(
        RENYI_DIV, x, y, space, axis, reduction, weights, temperature, return_grad, out, device, denominator,
        alpha, units_per_nat(base),
    ))  # fmt: skip


@overload
def tv_dist(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: None = None, **options: "Unpack[ListedTotalOptions]"
) -> Any: ...
@overload
def tv_dist(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: OneGrad, **options: "Unpack[ListedTotalOptions]"
) -> tuple[Any, Any]: ...
@overload
def tv_dist(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: BothGrads, **options: "Unpack[ListedTotalOptions]"
) -> tuple[Any, Any, Any]: ...
@overload
def tv_dist(
    x: Plain, y: Plain, *, return_grad: ReturnGrad | None = None, **options: "Unpack[ListedOptions]"
) -> Any: ...
@overload
def tv_dist(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: None = None, **options: "Unpack[ListedOptions]"
) -> ArrayT: ...
@overload
def tv_dist(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: OneGrad, **options: "Unpack[ListedOptions]"
) -> tuple[ArrayT, ArrayT]: ...
@overload
def tv_dist(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: BothGrads, **options: "Unpack[ListedOptions]"
) -> tuple[ArrayT, ArrayT, ArrayT]: ...
@overload
def tv_dist(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: ReturnGrad | None, **options: "Unpack[ListedOptions]"
) -> Any: ...
def tv_dist(
    x: Any,
    y: Any,
    *,
    space: str | tuple[str, str] = "probs",
    axis: SupportsIndex = -1,
    reduction: str = "row",
    weights: Any = None,
    denominator: Any = None,
    temperature: Temperature = 1.0,
    base: Any = None,
    indices: Any = None,
    tail: str | None = None,
    tail_mass: Any = None,
    return_grad: str | tuple[str, ...] | None = None,
    out: Any = None,
    device: str | None = None,
) -> Any:
    """Total variation distance sum(abs(x - y))/2.

    If x and y are the target and the draft model of speculative decoding, its acceptance rate is 1 minus this distance.

    Parameters
    ----------
    x, y : array of shape (..., n, ...)
        The truth and the model.
    space, axis, reduction, weights, denominator, temperature, return_grad, out, device
        As for :func:`kl_div`.
    base : None
        Not supported: there is no logarithm in this divergence.
    indices, tail, tail_mass
        For an x that lists only some of the classes of y, as for :func:`kl_div`.

    Returns
    -------
    value, gradients
        As for :func:`kl_div`. For distributions, the value is at most 1. The derivative of a term is 0 where x equals
        y.

    Raises
    ------
    ValueError
        For a `base`, and as for :func:`kl_div`.
    TypeError, klcore.BackendUnavailableError
        As for :func:`kl_div`.

    See Also
    --------
    kl_div : Explains all other options, results and errors.
    sq_hellinger : The squared Hellinger distance, never larger for distributions.

    Examples
    --------
    >>> import klcore
    >>> print(round(float(klcore.tv_dist([0.5, 0.5], [0.9, 0.1])), 6))
    0.4
    """
    refuse_base(base, "tv_dist")
    return find(x, y, device).compute(Call(
        TV_DIST, x, y, space, axis, reduction, weights, temperature, return_grad, out, device, denominator,
        indices=indices, tail=tail, tail_mass=tail_mass,
    ))  # fmt: skip


@overload
def sq_hellinger(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: None = None, **options: "Unpack[TotalOptions]"
) -> Any: ...
@overload
def sq_hellinger(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: OneGrad, **options: "Unpack[TotalOptions]"
) -> tuple[Any, Any]: ...
@overload
def sq_hellinger(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: BothGrads, **options: "Unpack[TotalOptions]"
) -> tuple[Any, Any, Any]: ...
@overload
def sq_hellinger(x: Plain, y: Plain, *, return_grad: ReturnGrad | None = None, **options: "Unpack[Options]") -> Any: ...
@overload
def sq_hellinger(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: None = None, **options: "Unpack[Options]"
) -> ArrayT: ...
@overload
def sq_hellinger(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: OneGrad, **options: "Unpack[Options]"
) -> tuple[ArrayT, ArrayT]: ...
@overload
def sq_hellinger(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: BothGrads, **options: "Unpack[Options]"
) -> tuple[ArrayT, ArrayT, ArrayT]: ...
@overload
def sq_hellinger(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: ReturnGrad | None, **options: "Unpack[Options]"
) -> Any: ...
def sq_hellinger(
    x: Any,
    y: Any,
    *,
    space: str | tuple[str, str] = "probs",
    axis: SupportsIndex = -1,
    reduction: str = "row",
    weights: Any = None,
    denominator: Any = None,
    temperature: Temperature = 1.0,
    base: Any = None,
    return_grad: str | tuple[str, ...] | None = None,
    out: Any = None,
    device: str | None = None,
) -> Any:
    """Squared Hellinger distance sum((sqrt(x) - sqrt(y))**2)/2, which is 1 - sum(sqrt(x*y)) for distributions.

    Parameters
    ----------
    x, y : array of shape (..., n, ...)
        The truth and the model.
    space, axis, reduction, weights, denominator, temperature, return_grad, out, device
        As for :func:`kl_div`.
    base : None
        Not supported: there is no logarithm in this divergence.

    Returns
    -------
    value, gradients
        As for :func:`kl_div`. For distributions, the value is at most 1, and never above :func:`tv_dist`.

    Raises
    ------
    ValueError
        For a `base`, and as for :func:`kl_div`.
    TypeError, klcore.BackendUnavailableError
        As for :func:`kl_div`.

    See Also
    --------
    kl_div : Explains all other options, results and errors.
    tv_dist : The total variation distance.

    Examples
    --------
    >>> import klcore
    >>> print(round(float(klcore.sq_hellinger([0.5, 0.5], [0.9, 0.1])), 6))
    0.105573
    """
    refuse_base(base, "sq_hellinger")
    return find(x, y, device).compute(Call(
        SQ_HELLINGER, x, y, space, axis, reduction, weights, temperature, return_grad, out, device, denominator,
    ))  # fmt: skip


@overload
def chi2_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: None = None, **options: "Unpack[TotalOptions]"
) -> Any: ...
@overload
def chi2_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: OneGrad, **options: "Unpack[TotalOptions]"
) -> tuple[Any, Any]: ...
@overload
def chi2_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: BothGrads, **options: "Unpack[TotalOptions]"
) -> tuple[Any, Any, Any]: ...
@overload
def chi2_div(x: Plain, y: Plain, *, return_grad: ReturnGrad | None = None, **options: "Unpack[Options]") -> Any: ...
@overload
def chi2_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: None = None, **options: "Unpack[Options]"
) -> ArrayT: ...
@overload
def chi2_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: OneGrad, **options: "Unpack[Options]"
) -> tuple[ArrayT, ArrayT]: ...
@overload
def chi2_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: BothGrads, **options: "Unpack[Options]"
) -> tuple[ArrayT, ArrayT, ArrayT]: ...
@overload
def chi2_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: ReturnGrad | None, **options: "Unpack[Options]"
) -> Any: ...
def chi2_div(
    x: Any,
    y: Any,
    *,
    space: str | tuple[str, str] = "probs",
    axis: SupportsIndex = -1,
    reduction: str = "row",
    weights: Any = None,
    denominator: Any = None,
    temperature: Temperature = 1.0,
    base: Any = None,
    return_grad: str | tuple[str, ...] | None = None,
    out: Any = None,
    device: str | None = None,
) -> Any:
    """Pearson's chi-squared divergence sum((x - y)**2 / y), where y is the model.

    Pearson's statistic [1]_ is this divergence of observed from expected shares, times the sample size.

    Parameters
    ----------
    x, y : array of shape (..., n, ...)
        The truth and the model.
    space, axis, reduction, weights, denominator, temperature, return_grad, out, device
        As for :func:`kl_div`.
    base : None
        Not supported: there is no logarithm in this divergence.

    Returns
    -------
    value, gradients
        As for :func:`kl_div`.

    Raises
    ------
    ValueError
        For a `base`, and as for :func:`kl_div`.
    TypeError, klcore.BackendUnavailableError
        As for :func:`kl_div`.

    See Also
    --------
    kl_div : Explains all other options, results and errors.
    alpha_div : Half of this divergence at alpha=2.

    Notes
    -----
    Per class, x = 0 contributes y; x > 0 with y = 0 gives +inf; negative numbers and NaN give NaN.

    References
    ----------
    .. [1] Pearson, K., "On the Criterion that a Given System of Deviations from the Probable ...", Philosophical
       Magazine 50 (1900).

    Examples
    --------
    >>> import klcore
    >>> print(round(float(klcore.chi2_div([0.5, 0.5], [0.9, 0.1])), 6))
    1.777778
    """
    refuse_base(base, "chi2_div")
    return find(x, y, device).compute(Call(
        CHI2_DIV, x, y, space, axis, reduction, weights, temperature, return_grad, out, device, denominator,
    ))  # fmt: skip
