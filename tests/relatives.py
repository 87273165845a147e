"""What the divergence's relatives should be: their definitions, literally, in 60 digits; imports nothing of klcore.

A derivative is a central difference of the definition, which is exact to 30 digits where it is not below 1e-60 itself:
rows of logits that are further apart want more digits. So no formula of a derivative stands here, and none of the
rearrangements that klcore needs.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import oracle

# each with parameters to try: the defaults, the ends, and what is next to them
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
    """Terms of one class; p and q are positive mpmath numbers."""

    def __init__(self, mp: Any) -> None:
        self.mp = mp

    def kl(self, p: Any, q: Any) -> Any:
        return p * self.mp.log(p / q) - p + q

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
        """No sum, but a function of one: of alpha_div's, or where that is far from 1, of that of p^a q^(1 - a)."""
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
    """As float64: the rows' values, the terms (empty if it is no sum of these), and the derivatives."""

    value: np.ndarray
    terms: np.ndarray
    dx: np.ndarray
    dy: np.ndarray


def _of_sum(ar: Any, p: Any, q: Any, step: Any, **parameters: Any) -> tuple[Any, Any, Any]:
    """A row's value, and its derivatives by log p and log q."""
    of = Definitions(ar.mp).renyi_div(p, q, **parameters)
    total = sum(map(of.term, p, q))
    by_sum = (of.of_sum(total * (1 + step)) - of.of_sum(total * (1 - step))) / (2 * step * total)
    up, down = 1 + step, 1 - step
    dx = [by_sum * (of.term(i * up, j) - of.term(i * down, j)) / (2 * step) for i, j in zip(p, q, strict=True)]
    dy = [by_sum * (of.term(i, j * up) - of.term(i, j * down)) / (2 * step) for i, j in zip(p, q, strict=True)]
    return of.of_sum(total), np.array(dx), np.array(dy)


@cache
def _digits() -> oracle.Digits:
    return oracle.Digits(90)


def exact(operation: str, x: Any, y: Any, space: Any = "probs", temperature: float = 1.0, **parameters: Any) -> Answer:
    """Of rows of numbers that are positive as probabilities, shape (rows, n)."""
    ar = _digits()
    sx, sy = (space, space) if isinstance(space, str) else space
    x, y = np.broadcast_arrays(*(np.atleast_2d(np.asarray(v).astype(np.float64)) for v in (x, y)))
    p, q = (oracle._side(ar, a, s, temperature).p for a, s in ((x, sx), (y, sy)))
    step = ar.mp.mpf(10) ** -30

    def through(d: Any, p: Any, space: str) -> np.ndarray:
        if space == "logits":
            d = (d - p * ar.sum(d)) / ar.mp.mpf(temperature)
        return ar.double(d / p if space == "probs" else d)

    if operation == "renyi_div":
        rows = [_of_sum(ar, p[r], q[r], step, **parameters) for r in range(len(p))]
        value, dx, dy = (np.stack([row[k] for row in rows]) for k in range(3))
        return Answer(ar.double(value), np.zeros(0), through(dx, p, sx), through(dy, q, sy))
    term = getattr(Definitions(ar.mp), operation)

    def of(p: Any, q: Any) -> Any:
        return term(p, q, **parameters)

    def by_log(p: Any, q: Any) -> Any:
        return (of(p * (1 + step), q) - of(p * (1 - step), q)) / (2 * step)

    def by_log_q(p: Any, q: Any) -> Any:
        return (of(p, q * (1 + step)) - of(p, q * (1 - step))) / (2 * step)

    terms = np.frompyfunc(of, 2, 1)(p, q)
    dx, dy = (np.frompyfunc(f, 2, 1)(p, q) for f in (by_log, by_log_q))
    if operation == "tv_dist":  # of no derivative where both agree, klcore says 0
        dx, dy = (np.where(p == q, ar.mp.mpf(0), d) for d in (dx, dy))
    value = ar.double(ar.sum(terms))[..., 0]
    return Answer(value, ar.double(terms), through(dx, p, sx), through(dy, q, sy))
