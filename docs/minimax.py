"""Print the polynomials of src/kl_math.h with their errors: ``make minimax``.

Chebyshev interpolation at 60 digits, coefficients then rounded to their type; within a factor of two of the best
possible, and one call of mpmath.
"""

import mpmath as mp
import numpy as np

mp.mp.dps = 60


def exp_tail(r):
    """(e^r - 1 - r) / r^2."""
    return mp.mpf(1) / 2 + r / 6 if abs(r) < mp.mpf(10) ** -25 else (mp.expm1(r) - r) / r**2


def atanh_tail(w):
    """(2 atanh(s)/s - 2) / w with w = s^2."""
    s = mp.sqrt(w)
    return mp.mpf(2) / 3 if w < mp.mpf(10) ** -25 else (2 * mp.atanh(s) / s - 2) / w


def atanh_rest(w):
    """(2 atanh(s)/s - 2 - 2/3 w) / w^2."""
    return mp.mpf(2) / 5 if w < mp.mpf(10) ** -15 else (atanh_tail(w) - mp.mpf(2) / 3) / w


def show(name, f, interval, terms, dtype):
    """Print one polynomial, lowest power first, and its largest relative error after rounding."""
    coefficients = [dtype(float(c)) for c in mp.chebyfit(f, interval, terms)[::-1]]
    a, b = interval
    points = [a + (b - a) * mp.mpf(k) / 999 for k in range(1000)]
    error = max(abs(mp.polyval([mp.mpf(float(c)) for c in coefficients[::-1]], x) / f(x) - 1) for x in points)
    print(f"{name}, {np.dtype(dtype).name}: relative error 2^{mp.nstr(mp.log(error, 2), 4)}")
    for c in coefficients:
        print(f"    {float(c).hex()}")


if __name__ == "__main__":
    half = mp.mpf(0.3467)  # a little beyond ln(2)/2
    for dtype, of_exp, of_atanh in ((np.float32, 6, 4), (np.float64, 11, 8)):
        show("exp_tail", exp_tail, [-half, half], of_exp, dtype)
        show("atanh_tail", atanh_tail, [mp.mpf(0), mp.mpf("0.0402")], of_atanh, dtype)
    show("atanh_rest", atanh_rest, [mp.mpf(0), mp.mpf("0.0108")], 3, np.float32)
    show("expm1_minus_near", exp_tail, [mp.mpf(-0.5), mp.mpf(0.5)], 5, np.float32)
