"""What the divergence's relatives should be: their literal definitions, in 60 digits; imports nothing of klcore.

A derivative is a central difference of the definition, which is exact to 30 digits unless it is below 1e-60 itself:
rows of logits that are further apart need more digits. So this file contains no formula of a derivative, and none of
the rearrangements that klcore needs.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import oracle

# each with parameters to try: the defaults, the ends, and numbers close to the ends
PARAMETERS: dict[str, tuple[dict[str, Any], ...]] = {
    "js_div": tuple({"beta": b} for b in (0.5, 0.1, 0.999)) + tuple({"beta": b, "scaled": True} for b in (1e-9, 0, 1)),
    "mixed_kl_div": tuple({"forward": w} for w in (0.5, 0.0, 1.0, 0.9)),
    "skew_kl_div": tuple({"alpha": a} for a in (0.1, 0.0, 0.9)),
    "alpha_div": tuple({"alpha": a} for a in (0.5, 1.0, 0.0, 1 + 1e-12, 2.0, -1.0, 0.3, 3.0)),
    "renyi_div": tuple({"alpha": a} for a in (0.5, 1.0, 1 + 1e-12, 2.0, 0.1, 7.0)),
    "tv_dist": ({},),
    "sq_hellinger": ({},),
    "chi2_div": ({},),
}


class Definitions:
    """Terms of one class; p and q are positive mpmath numbers. The operations of tests/oracle.py are included, for what
    it does not cover: counts, and cotangents."""

    def __init__(self, mp: Any) -> None:
        self.mp = mp

    def kl(self, p: Any, q: Any) -> Any:
        return p * self.mp.log(p / q) - p + q

    kl_div = kl

    def rel_entr(self, p: Any, q: Any) -> Any:
        return p * self.mp.log(p / q)

    def cross_entropy(self, p: Any, q: Any) -> Any:
        return -p * self.mp.log(q)

    def entropy(self, p: Any, q: Any) -> Any:
        return -p * self.mp.log(p)

    def js_div(self, p: Any, q: Any, beta: float = 0.5, scaled: bool = False) -> Any:
        b = self.mp.mpf(beta)
        if scaled and beta in (0, 1):
            return self.kl(p, q) if beta == 0 else self.kl(q, p)
        m = b * p + (1 - b) * q
        v = b * self.kl(p, m) + (1 - b) * self.kl(q, m)
        return v / (b * (1 - b)) if scaled else v

    def mixed_kl_div(self, p: Any, q: Any, forward: float = 0.5) -> Any:
        w = self.mp.mpf(forward)
        return w * self.kl(p, q) + (1 - w) * self.kl(q, p)

    def skew_kl_div(self, p: Any, q: Any, alpha: float = 0.1) -> Any:
        a = self.mp.mpf(alpha)
        return self.kl(p, a * p + (1 - a) * q)

    def alpha_div(self, p: Any, q: Any, alpha: float = 0.5) -> Any:
        a = self.mp.mpf(alpha)
        if alpha in (0, 1):
            return self.kl(p, q) if alpha == 1 else self.kl(q, p)
        return (p**a * q ** (1 - a) - a * p - (1 - a) * q) / (a * (a - 1))

    def renyi_div(self, p: Any, q: Any, alpha: float) -> "Summed":
        """Not a sum, but a function of one: of alpha_div's or, where that is far from 1, of the sum of p^a q^(1 -
        a)."""
        a = self.mp.mpf(alpha)
        if alpha == 1:
            return Summed(self.kl, lambda s: s)
        x = a * (a - 1) * sum(self.alpha_div(i, j, alpha) for i, j in zip(p, q, strict=True))
        if -0.5 <= x <= 2.0**100:
            return Summed(lambda p, q: self.alpha_div(p, q, alpha), lambda s: self.mp.log1p(a * (a - 1) * s) / (a - 1))
        return Summed(lambda p, q: p**a * q ** (1 - a), lambda s: self.mp.log(s) / (a - 1))

    def tv_dist(self, p: Any, q: Any) -> Any:
        return abs(p - q) / 2

    def sq_hellinger(self, p: Any, q: Any) -> Any:
        return (self.mp.sqrt(p) - self.mp.sqrt(q)) ** 2 / 2

    def chi2_div(self, p: Any, q: Any) -> Any:
        return (p - q) ** 2 / q


@dataclass
class Summed:
    """A function of a row's sum of terms."""

    term: Any
    of_sum: Any


@dataclass
class Answer:
    """As float64: the rows' values, the terms (empty if the value is not a sum of terms), and the derivatives."""

    value: np.ndarray
    terms: np.ndarray
    dx: np.ndarray
    dy: np.ndarray
    slope: np.ndarray  # of the value, with respect to all log p and log q: how much an error in these changes it


@dataclass
class OfTopK:
    """The same for rows that list some classes. As float64, per row and, where applicable, per number."""

    value: np.ndarray
    terms: np.ndarray  # the last is that of all other classes, unless these are left out
    dx: np.ndarray
    dy: np.ndarray
    slope: np.ndarray
    logs: np.ndarray  # the largest logarithm of the row
    value_off: np.ndarray  # how far the double 1 - sum p may be off, and how that changes the value,
    dx_off: np.ndarray  # and each derivative
    dy_off: np.ndarray


_digits = cache(oracle.Digits)


def _side(ar: Any, a: np.ndarray, space: str, temperature: float) -> Any:
    """The probabilities."""
    return ar.number(a) / ar.sum(ar.number(a)) if space == "counts" else oracle._side(ar, a, space, temperature).p


@cache
def _least(ar: Any) -> Any:
    """A number as good as a limit at zero: even its logarithm is more than float64 holds."""
    return ar.mp.mpf(10) ** -(10**700)


def _positive(ar: Any, p: Any) -> Any:
    return np.where(p == 0, _least(ar), p)


def _through(ar: Any, d: Any, a: np.ndarray, p: Any, space: str, temperature: float) -> np.ndarray:
    """The derivatives with respect to the given numbers, from those with respect to log p."""
    if space == "logits":
        d = (d - p * ar.sum(d)) / ar.mp.mpf(temperature)
    if space == "counts":
        return ar.double((d / p - ar.sum(d)) / ar.sum(ar.number(a)))
    return ar.double(d / p if space == "probs" else d)


def _by_logs(of: Any, p: Any, q: Any, step: Any) -> tuple[Any, Any]:
    """The derivatives of a function of p and q, class by class, with respect to log p and log q."""
    up, down = 1 + step, 1 - step
    return (of(p * up, q) - of(p * down, q)) / (2 * step), (of(p, q * up) - of(p, q * down)) / (2 * step)


def _of_sum(ar: Any, p: Any, q: Any, step: Any, **parameters: Any) -> tuple[Any, Any, Any]:
    """A row's value, and its derivatives with respect to log p and log q."""
    of = Definitions(ar.mp).renyi_div(p, q, **parameters)
    total = sum(map(of.term, p, q))
    by_sum = (of.of_sum(total * (1 + step)) - of.of_sum(total * (1 - step))) / (2 * step * total)
    up, down = 1 + step, 1 - step
    dx = [by_sum * (of.term(i * up, j) - of.term(i * down, j)) / (2 * step) for i, j in zip(p, q, strict=True)]
    dy = [by_sum * (of.term(i, j * up) - of.term(i, j * down)) / (2 * step) for i, j in zip(p, q, strict=True)]
    return of.of_sum(total), np.array(dx), np.array(dy)


def exact(
    operation: str, x: Any, y: Any, space: Any = "probs", temperature: float = 1.0, cotangent: Any = None,
    digits: int = 90, **parameters: Any,
) -> Answer:  # fmt: skip
    """For rows of numbers, shape (rows, n); with `cotangent` the derivatives of the sums of cotangent * terms.

    A zero is replaced by a number as good as a limit. The derivative with respect to a probability of 0 is tested
    elsewhere; with respect to a probability below 1e-25 it takes as many digits more.
    """
    ar = _digits(digits)
    sx, sy = (space, space) if isinstance(space, str) else space
    x, y = np.broadcast_arrays(*(np.atleast_2d(np.asarray(v).astype(np.float64)) for v in (x, y)))
    step = ar.mp.mpf(10) ** -30
    p, q = (_positive(ar, _side(ar, a, s, temperature)) for a, s in ((x, sx), (y, sy)))

    def through(d: Any, a: np.ndarray, p: Any, space: str) -> np.ndarray:
        return _through(ar, d if cotangent is None else d * ar.number(cotangent), a, p, space, temperature)

    if operation == "renyi_div":
        rows = [_of_sum(ar, p[r], q[r], step, **parameters) for r in range(len(p))]
        value, dx, dy = (np.stack([row[k] for row in rows]) for k in range(3))
        slope = ar.double(ar.sum(abs(dx) + abs(dy)))[..., 0]
        return Answer(ar.double(value), np.zeros(0), through(dx, x, p, sx), through(dy, y, q, sy), slope)
    term = getattr(Definitions(ar.mp), operation)

    def of(p: Any, q: Any) -> Any:
        return term(p, q, **parameters)

    terms = np.frompyfunc(of, 2, 1)(p, q)
    dx, dy = _by_logs(np.frompyfunc(of, 2, 1), p, q, step)
    if operation == "tv_dist":  # where both are equal there is no derivative, and klcore returns 0
        dx, dy = (np.where(p == q, ar.mp.mpf(0), d) for d in (dx, dy))
    value = ar.double(ar.sum(terms))[..., 0]
    slope = ar.double(ar.sum(abs(dx) + abs(dy)))[..., 0]
    return Answer(value, ar.double(terms), through(dx, x, p, sx), through(dy, y, q, sy), slope)


# ---- rows that list some classes -------------------------------------------------------------------------------------


def _of_listed(
    ar: Any, of: Any, x: np.ndarray, y: np.ndarray, indices: np.ndarray, tail: str, mass: float | None, space: Any,
    temperature: float, off: float,
) -> list[Any]:  # fmt: skip
    """One row: value, terms, dx, dy, slope, logs. `off` is added to 1 - sum p."""
    (sx, sy), step = space, ar.mp.mpf(10) ** -20
    given = np.flatnonzero(indices >= 0)
    classes, at = np.unique(indices[given].astype(np.int64), return_inverse=True)
    others = np.setdiff1d(np.arange(len(y)), classes)
    each, all_q = _side(ar, x[given], sx, temperature), _side(ar, y, sy, temperature)
    p = np.array([sum(each[at == k], ar.mp.mpf(0)) for k in range(len(classes))], object)
    q, kept = all_q[classes], tail != "renorm" and len(others) > 0
    share = each / np.where(p == 0, ar.mp.mpf(1), p)[at]
    free = tail == "bucket" and mass is None and 1 - sum(p) + off > 0  # p of all others depends on x
    if tail == "renorm":
        p_sum, q_sum = sum(p), sum(q)
        p, q = p / p_sum, q / q_sum
    elif kept:
        left = 1 - sum(p) + off if free else ar.mp.mpf(mass or 0.0) if tail == "bucket" else ar.mp.mpf(0)
        p, q = np.append(p, left), np.append(q, sum(all_q[others]))
    p, q, each, all_q = (_positive(ar, v) for v in (p, q, each, all_q))
    of = np.frompyfunc(of, 2, 1)
    terms, (by_p, by_q) = of(p, q), _by_logs(of, p, q, step)

    by_each = share * by_p[: len(classes)][at]
    by_all = np.full(len(y), ar.mp.mpf(0))
    by_all[classes] = by_q[: len(classes)]
    if tail == "renorm":
        by_each = by_each - each / p_sum * sum(by_p)
        by_all[classes] -= q * sum(by_q)
    elif kept:
        by_each = by_each - each * (by_p[-1] / p[-1] if free else 0)
        by_all[others] = all_q[others] * (by_q[-1] / q[-1])
    dx = np.zeros(len(x))
    dx[given] = _through(ar, by_each, x[given], each, sx, temperature)
    dy = _through(ar, by_all, y, all_q, sy, temperature)

    listed = np.full(len(x), ar.mp.mpf(0))
    for k in range(len(classes)):  # the term of duplicates is at the largest number
        listed[max(given[at == k], key=lambda i: (x[i], i))] = terms[k]
    listed = listed if tail == "renorm" else np.append(listed, terms[-1] if kept else 0)
    logs = max((abs(ar.mp.log(v)) for v in (*p, *q) if v > _least(ar)), default=0)
    return [sum(terms), ar.double(listed), dx, dy, sum(abs(by_p)) + sum(abs(by_q)), logs]


def top_k(
    operation: str, x: Any, y: Any, indices: Any, tail: str, tail_mass: Any = None, space: Any = "probs",
    temperature: float = 1.0, digits: int = 50, **parameters: Any,
) -> OfTopK:  # fmt: skip
    """For rows of numbers x, shape (rows, K), at `indices`, and y, shape (rows, n)."""
    ar = _digits(digits)
    x, y = (np.asarray(v).astype(np.float64) for v in (x, y))
    space = (space, space) if isinstance(space, str) else space
    masses = [None] * len(x) if tail_mass is None else [float(v) for v in tail_mass]
    term = getattr(Definitions(ar.mp), operation)

    def rows(off: float) -> list[np.ndarray]:
        found = [
            _of_listed(ar, lambda p, q: term(p, q, **parameters), *row, tail, mass, space, temperature, off)
            for *row, mass in zip(x, y, np.asarray(indices), masses, strict=True)
        ]
        return [np.array([row[k] for row in found]).astype(np.float64) for k in range(6)]

    value, terms, dx, dy, slope, logs = rows(0.0)
    off = [np.zeros(1)] * 4
    if tail == "bucket" and tail_mass is None:  # K additions of up to half an eps, and exponentials
        with np.errstate(invalid="ignore"):
            moved = rows((2 + x.shape[-1] / 2) * oracle.EPS64)
            off = [abs(a - b) for a, b in zip(moved, (value, terms, dx, dy), strict=False)]
    return OfTopK(value, terms, dx, dy, slope, logs, off[0], off[2], off[3])
