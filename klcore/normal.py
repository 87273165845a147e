"""Quantiles of the normal distribution and of Student's t distribution, for the intervals of klcore.Summary."""

import importlib
import math

_FEW = 300  # degrees of freedom up to which the sum is evaluated


def normal_quantile(probability: float) -> float:
    """Wichura's AS241, from the standard library; imported on first use, because that would slow `import klcore`."""
    return float(importlib.import_module("statistics").NormalDist().inv_cdf(probability))


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of a probability >= 1/2, for a whole number of degrees of freedom, to 9 digits.

    Up to 300 degrees by bisection of the distribution function, which is a finite sum [1]_; above that by the expansion
    around the normal quantile.

    References
    ----------
    .. [1] Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), 26.7.3, 26.7.4 and 26.7.5.
    """
    if degrees <= _FEW:
        low, high = 0.0, math.pi / 2  # bounds of the angle whose tangent is t / sqrt(degrees)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if _within(middle, degrees) < 2 * probability - 1 else (low, middle)
        return math.tan(low) * math.sqrt(degrees)
    z = normal_quantile(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**k for k, term in enumerate(terms))


def _within(angle: float, degrees: int) -> float:
    """The probability of |t| < sqrt(degrees) tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(degrees // 2):
        total += term
        term *= cosine**2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    return (angle + sine * total) * 2 / math.pi if odd else sine * total
