"""What klcore should compute: the definitions, in far higher precision than any result needs, and the bounds.

Written from the mathematics; imports nothing of klcore. Two arithmetics share the same definitions:

* `exact`: mpmath, 50 digits or more, for any input (subnormal, huge, infinite). It takes about 0.1 ms per class, so it
  is for rows of up to a few thousand classes.
* `fast`: pairs of doubles (Dekker 1971; Hida, Li and Bailey 2001), 106 bits, about ten microseconds per class, for rows
  of up to a million. The error of an operation or function is below 1e-30. A divergence of 1e-12 is a sum of terms of
  order 1 that cancel, so it is still accurate to 1e-18, far inside the tightest bound (1e-13), by the literal
  definition, without any of the rearrangements that klcore needs. Not for numbers whose products leave the range of a
  double (below 1e-290 the lower half is lost). test_accuracy.py compares it with `exact`.

Both take rows, shape (rows, n), and return float64: rounding the exact answer to 53 bits is an error of 1.1e-16.
"""

from dataclasses import dataclass, fields
from functools import cache, lru_cache
from typing import Any, NamedTuple

import mpmath
import numpy as np


class Definition(NamedTuple):
    """An operation: its terms as functions of p, q and their logarithms a and b, in any arithmetic, and the properties
    that the bounds below depend on."""

    terms: Any
    by_p: Any  # their derivatives
    by_log_q: Any
    at_p_0: float | None = None  # the derivative by p where p = 0 < q; None: what by_p returns
    at_q_0: float = 0.0  # the derivative by q where q = 0 = p
    part: Any = None  # the factor of p in a term, if it is not by_p
    relative: bool = False  # no terms cancel
    cost: bool = False  # -log q, or -log p, is summed as it is
    single: bool = False  # takes one argument


DEFINITIONS = {
    "kl_div": Definition(
        terms=lambda p, q, a, b: p * (a - b) - p + q,
        by_p=lambda p, q, a, b: a - b,
        by_log_q=lambda p, q, a, b: q - p,
        at_p_0=-np.inf,
        at_q_0=1.0,
        relative=True,
    ),
    "rel_entr": Definition(
        terms=lambda p, q, a, b: p * (a - b),
        by_p=lambda p, q, a, b: a - b + 1.0,
        by_log_q=lambda p, q, a, b: -p,
        at_p_0=-np.inf,
        part=lambda p, q, a, b: a - b,
    ),
    "cross_entropy": Definition(
        terms=lambda p, q, a, b: p * -b,
        by_p=lambda p, q, a, b: -b,
        by_log_q=lambda p, q, a, b: -p,
        cost=True,
    ),
    "entropy": Definition(
        terms=lambda p, q, a, b: p * -a,
        by_p=lambda p, q, a, b: -a - 1.0,
        by_log_q=lambda p, q, a, b: -p,
        at_p_0=np.inf,
        part=lambda p, q, a, b: -a,
        cost=True,
        single=True,
    ),
}
OPERATIONS = tuple(DEFINITIONS)
SPACES = ("probs", "log_probs", "logits")
PAIRS = tuple((sx, sy) for sx in SPACES for sy in SPACES)
CALLS = tuple((op, pair) for op, d in DEFINITIONS.items() for pair in PAIRS if not d.single or pair[0] == pair[1])

# ---- the bounds ------------------------------------------------------------------------------------------------------
#
# Bounds are relative to a size that `exact` returns with every answer, `value_size`, `dx_size` or `dy_size`:
#   plain   kl_div of two arguments of one space: the answer itself (for its gradient: the row's L1 norm). The other
#           operations: the sum of the magnitudes of the terms.
#   wide    arguments of two spaces, one of which is float64. A logarithm l = log p has an error of eps*|l|, which
#           shifts a term by its derivative times that, so the size is the sum of magnitudes times
#           1 + |log p| + |log q|; the bound is in eps of double.
#   mixed   arguments of two spaces, narrower than float64: plain, plus the error of a logarithm in two floats times the
#           term's derivative. A gradient that goes through a softmax inherits the errors of the whole row.
# If the result is narrower than the arithmetic, rounding it adds half an eps of the result's dtype (`rounding`).
EPS32, EPS64 = 2.0**-23, 2.0**-52
TOLERANCES = {
    # the published bounds of kl_div, three same-space pairs, KL from 1e-12 to 1e3
    ("kl", "float32"): 4e-6,
    ("kl", "float64"): 1e-13,
    ("gradient", "float32"): 2e-5,
    ("gradient", "float64"): 1e-11,
    # the error of a term is up to 2 eps (an elementary function 1 ulp, its argument and a product half an eps each).
    # Each of at most seven additions in the input's precision, before the sum goes on in double, adds half an eps of
    # the column's sum so far: of half its sum, if terms are alike
    ("sum", "float32"): 4 * EPS32,
    # the whole sum is in double there; fourteen additions of half an eps, which grow like the root of their number
    ("sum", "float64"): 4 * EPS64,
    # two 16-bit inputs on a GPU: a hardware exponential is off by 2 units, and by 1.5 more for every unit of its
    # argument; weighted with the exponential, a few of these matter. A hardware reciprocal is off by 1; so is each
    # product
    ("fast16", "float32"): 32 * EPS32,
    # logarithm, normalisation, exponential and product, each half an eps to one eps of its part of the size
    ("wide", "float64"): 4 * EPS64,
    # log p as two floats, absolute, relative to 1 + |log p|: a few numbers below 2^-17 that round by half an eps each,
    # and the constants; measured are 2.2e-12 for p > 2^-6, and less of the size elsewhere
    ("logarithm", "float32"): 2.0**-39,
    # rounding a result to its dtype, relative; float16 is subnormal below 2^-14: half of 2^-24 absolute, per class
    ("rounding", "float64"): 0.0,
    ("rounding", "float32"): 0.5 * EPS32,
    ("rounding", "float16"): 2.0**-11,
    ("rounding", "bfloat16"): 2.0**-8,
    ("absolute", "float64"): 2.0**-1074,
    ("absolute", "float32"): 2.0**-150,
    ("absolute", "float16"): 2.0**-25,
    ("absolute", "bfloat16"): 2.0**-134,
    # klcore.Summary: half of a bin of the histogram, of which there are 512 for every factor of two; and a quotient
    ("order statistic", "float32"): 2.0**-10,
    ("rounding", "float64 quotient"): 0.5 * EPS64,
    # the textbook's formula in float64, absolute: terms of order 1 that cancel, a few thousand of them at most
    ("textbook", "float64"): 1e-12,
    # klcore's elementary functions, in units in the last place of the exact result
    ("elementary", "float32"): 1.0,
    ("elementary", "float64"): 1.0,
    # what other systems return (tests/golden), relative to max(1, magnitude): they compute in the dtype itself, and
    # float32 sums, sequential or in trees, are off by about ten eps; half types round after every operation
    ("golden", "float64"): 1e-12,
    ("golden", "float32"): 3e-6,
    ("golden", "float16"): 4e-3,
    ("golden", "bfloat16"): 3e-2,
    # MXNet's float32 log-softmax is off by up to 3.5e-6 absolute per class, which a sum over the classes multiplies
    ("golden softmax", "float32"): 3e-5,
    # double-double against 50 digits: a hundred operations of 2^-104 on terms up to 1e12 times the divergence
    ("oracle", "float64"): 2 * EPS64,
}


def is_mixed(operation: str, space: Any) -> bool:
    sx, sy = (space, space) if isinstance(space, str) else space
    return sx != sy and not is_cross(operation, space)


def is_cross(operation: str, space: Any) -> bool:
    return DEFINITIONS[operation].cost and "logits" in ((space, space) if isinstance(space, str) else space)


def tolerance(operation: str, space: Any, dtype: Any, of: str = "value") -> tuple[float, float]:
    """The bounds (relative to the size, absolute per class) of a value, or of a gradient's row-wise L1 distance.

    `dtype` is that of the result: float64, float32, or, for gradients, a 16-bit one.
    """
    dtype = np.dtype(dtype).name
    base = "float64" if dtype == "float64" else "float32"
    if is_mixed(operation, space) and dtype == "float64":
        relative = TOLERANCES["wide", "float64"]
    elif of == "gradient":
        relative = TOLERANCES["gradient", base]
    elif DEFINITIONS[operation].relative or space in ("logits", ("logits", "logits")) or is_cross(operation, space):
        relative = TOLERANCES["kl", base]
    else:
        relative = TOLERANCES["sum", base]
    return relative + TOLERANCES["rounding", dtype], TOLERANCES["absolute", dtype]


# ---- two arithmetics -------------------------------------------------------------------------------------------------


def _elementwise(f: Any) -> Any:
    return np.frompyfunc(f, 1, 1)


class Digits:
    """Arrays of mpmath numbers, with a separate context, so that no other precision changes."""

    def __init__(self, digits: int) -> None:
        self.mp = mpmath.MPContext()
        self.mp.dps = digits
        self.number = _elementwise(lambda v: self.mp.mpf(float(v)))
        self.log = _elementwise(self.mp.log)
        self.exp = _elementwise(self.mp.exp)

    @staticmethod
    def sum(a: Any) -> Any:
        return a.sum(axis=-1, keepdims=True)

    @staticmethod
    def double(a: Any) -> np.ndarray:
        return a.astype(np.float64)

    @staticmethod
    def where(mask: np.ndarray, a: Any, b: Any) -> Any:
        return np.where(mask, a, b)


def _two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    s = a + b
    v = s - a
    return s, (a - (s - v)) + (b - v)


def _ordered_sum(a: Any, b: Any) -> tuple[Any, Any]:
    s = a + b  # |a| >= |b|, or a is 0
    return s, b - (s - a)


def _split(a: Any) -> tuple[Any, Any]:
    c = 134217729.0 * a  # 2^27 + 1
    high = c - (c - a)
    return high, a - high


def _two_product(a: Any, b: Any) -> tuple[Any, Any]:
    p = a * b
    (ah, al), (bh, bl) = _split(a), _split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


class Pair:
    """An array of sums hi + lo of two doubles."""

    def __init__(self, hi: Any, lo: Any = 0.0) -> None:
        self.hi = np.asarray(hi, dtype=np.float64)
        self.lo = np.broadcast_to(np.asarray(lo, dtype=np.float64), self.hi.shape)

    @staticmethod
    def of(a: Any) -> "Pair":
        return a if isinstance(a, Pair) else Pair(a)

    def __neg__(self) -> "Pair":
        return Pair(-self.hi, -self.lo)

    def __add__(self, other: Any) -> "Pair":
        other = Pair.of(other)
        s, e = _two_sum(self.hi, other.hi)
        t, f = _two_sum(self.lo, other.lo)
        s, e = _ordered_sum(s, e + t)
        return Pair(*_ordered_sum(s, e + f))

    def __sub__(self, other: Any) -> "Pair":
        return self + -Pair.of(other)

    def __mul__(self, other: Any) -> "Pair":
        other = Pair.of(other)
        p, e = _two_product(self.hi, other.hi)
        return Pair(*_ordered_sum(p, e + (self.hi * other.lo + self.lo * other.hi)))

    def __truediv__(self, other: Any) -> "Pair":
        other = Pair.of(other)
        q = Pair(self.hi / other.hi)
        for _ in range(2):
            q = q + (self - other * q).hi / other.hi
        return q

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Any) -> "Pair":
        return Pair(other) - self

    def scaled(self, octaves: Any) -> "Pair":
        return Pair(np.ldexp(self.hi, octaves), np.ldexp(self.lo, octaves))


def _pair(text: str) -> Pair:
    with mpmath.workdps(50):
        v = mpmath.mpf(text)
        return Pair(float(v), float(v - float(v)))


_LN2 = _pair("0.69314718055994530941723212145817656807550013436025525412068")
_FACTORIALS = [_pair(str(mpmath.mpf(1))) / Pair(float(mpmath.factorial(k))) for k in range(15)]


class Doubles:
    """Arrays of pairs of doubles."""

    number = staticmethod(lambda a: Pair(a))

    @staticmethod
    def exp(x: Pair) -> Pair:
        inside = np.abs(x.hi) < 1500.0  # beyond, the result is 0 or infinite
        x = Doubles.where(inside, x, np.sign(x.hi) * 1500.0)
        octave = np.rint(x.hi / _LN2.hi)
        r = (x - _LN2 * Pair(octave)).scaled(-6)  # |r| < 0.0055: r^14/14! < 1e-42
        tail = np.zeros_like(x.hi)
        for c in _FACTORIALS[:6:-1]:
            tail = (tail + c.hi) * r.hi  # from r^7/7! on, less than 1e-17 of the whole: a double suffices
        t = Pair(tail)
        for c in _FACTORIALS[6:0:-1]:
            t = (t + c) * r  # e^r - 1, by Horner's rule
        for _ in range(6):
            t = t.scaled(1) + t * t
        return (t + 1.0).scaled(octave.astype(np.int64))

    @staticmethod
    def log(x: Pair) -> Pair:
        _, octave = np.frexp(x.hi)
        x = x.scaled(-octave)
        y = Pair(np.log(x.hi))
        u = x * Doubles.exp(-y) - 1.0  # about 1e-16, so that two terms of log(1 + u) suffice
        return y + u - u * u * 0.5 + _LN2 * Pair(octave.astype(np.float64))

    @staticmethod
    def sum(a: Pair) -> Pair:
        hi, lo = a.hi, a.lo
        while hi.shape[-1] > 1:
            if hi.shape[-1] % 2:
                hi, lo = (np.concatenate([v, np.zeros_like(v[..., :1])], axis=-1) for v in (hi, lo))
            s = Pair(hi[..., ::2], lo[..., ::2]) + Pair(hi[..., 1::2], lo[..., 1::2])
            hi, lo = s.hi, s.lo
        return Pair(hi, lo)

    @staticmethod
    def double(a: Pair) -> np.ndarray:
        return a.hi + a.lo

    @staticmethod
    def where(mask: np.ndarray, a: Any, b: Any) -> Pair:
        a, b = Pair.of(a), Pair.of(b)
        return Pair(np.where(mask, a.hi, b.hi), np.where(mask, a.lo, b.lo))


# ---- the definitions -------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One argument: p and log p (0 if p is 0 or undefined), which classes are excluded (p = 0), which undefined."""

    p: Any
    log: Any
    excluded: np.ndarray
    undefined: np.ndarray


@dataclass
class Answer:
    """float64. Per row: value and the sizes (see TOLERANCES); per class: terms, dx, dy.

    dx and dy are the derivatives of each row's value. If that is infinite, dx is NaN where x is logits.
    """

    value: np.ndarray
    terms: np.ndarray
    dx: np.ndarray
    dy: np.ndarray
    value_size: np.ndarray
    terms_size: np.ndarray  # of all terms of a row, whose errors do not cancel
    dx_size: np.ndarray
    dy_size: np.ndarray
    dy_floor: np.ndarray  # absolute, for every dtype; added to the bound by size


def _side(ar: Any, a: np.ndarray, space: str, temperature: float) -> Side:
    undefined = ~(a >= 0) if space == "probs" else np.isnan(a)
    excluded = a == (0 if space == "probs" else -np.inf)
    if space == "logits":
        undefined = undefined | (a == np.inf) | excluded.all(axis=-1, keepdims=True)
        undefined = np.broadcast_to(undefined.any(axis=-1, keepdims=True), a.shape)
    missing = undefined | excluded
    zero = ar.number(np.zeros(a.shape))
    if space == "probs":
        p = ar.number(np.where(missing, 1.0, a))
        log = ar.log(p)
    else:
        log = ar.number(np.where(missing, 0.0, a))
        if space == "logits":  # softmax: any shift cancels; subtracting the largest keeps every e^z representable
            top = np.max(np.where(missing, -np.inf, a), axis=-1, keepdims=True, initial=-np.inf)
            top = ar.number(np.broadcast_to(np.where(np.isfinite(top), top, 0.0), a.shape))
            log = ar.where(missing, zero, (log - top) / ar.number(np.full(a.shape, temperature)))
            total = ar.sum(ar.where(missing, zero, ar.exp(log)))
            log = log - ar.log(ar.where(undefined[..., :1], ar.number(np.ones((*a.shape[:-1], 1))), total))
        p = ar.exp(log)
    return Side(ar.where(missing, zero, p), ar.where(missing, zero, log), excluded & ~undefined, undefined)


def _answer(ar: Any, operation: str, x: Any, y: Any, space: Any, temperature: float, double: bool) -> Answer:
    sx, sy = (space, space) if isinstance(space, str) else space
    defined = DEFINITIONS[operation]
    x, y = np.broadcast_arrays(*(np.atleast_2d(v) for v in (x, x if defined.single else y)))
    a = _side(ar, x, sx, temperature)
    b = a if defined.single else _side(ar, y, sy, temperature)
    undefined = a.undefined | b.undefined
    impossible = b.excluded & ~a.excluded & ~undefined  # p > 0 = q
    p, q, one = a.p, b.p, ar.number(np.ones(x.shape))
    of = p, q, a.log, b.log
    terms, by_p, by_log_q = defined.terms(*of), defined.by_p(*of), defined.by_log_q(*of)
    part = (defined.part or defined.by_p)(*of)

    def softmax(side: Side, g: Any) -> Any:
        return (g - side.p * ar.sum(g)) / ar.number(np.full(x.shape, temperature))

    if sx == "probs":
        dx = ar.double(by_p)
        if defined.at_p_0 is not None:
            dx[a.excluded] = defined.at_p_0
        if not defined.single:
            dx[b.excluded] = np.inf
    else:
        dx = ar.double(softmax(a, p * by_p) if sx == "logits" else p * by_p)
        dx[impossible] = np.inf
        if sx == "logits":
            dx[impossible.any(axis=-1)] = np.nan
    if sy == "probs":
        dy = ar.double(by_log_q / ar.where(b.excluded | b.undefined, one, q))
        dy[b.excluded] = defined.at_q_0
        dy[impossible] = -np.inf
    else:
        dy = ar.double(softmax(b, by_log_q) if sy == "logits" else by_log_q)

    values = ar.double(ar.sum(terms))[..., 0] if x.shape[-1] else np.zeros(x.shape[:-1])
    values[impossible.any(axis=-1)] = np.inf
    values[undefined.any(axis=-1)] = np.nan
    terms = ar.double(terms)
    terms[impossible] = np.inf
    terms[undefined] = np.nan
    of_row = undefined.any(axis=-1, keepdims=True)
    dx[np.broadcast_to(of_row, x.shape) if sx == "logits" else undefined] = np.nan
    dy[np.broadcast_to(of_row, x.shape) if sy == "logits" else undefined] = np.nan

    # sizes: ordinary doubles suffice
    with np.errstate(over="ignore", invalid="ignore"):
        sizes = _sizes(ar, operation, sx, sy, temperature, a, b, part, values, terms, dx, dy, double)
    return Answer(values, terms, dx, dy, *sizes)


def _sizes(
    ar: Any, operation: str, sx: str, sy: str, temperature: float, a: Side, b: Side, part: Any, values: Any, terms: Any,
    dx: Any, dy: Any, double: bool,
) -> list[np.ndarray]:  # fmt: skip
    """The sizes of value, terms, dx and dy, per row, and dy's floor; see TOLERANCES. Infinite and NaN terms do not
    count."""
    defined = DEFINITIONS[operation]
    p, q, lp, lq, part = (ar.double(v) for v in (a.p, b.p, a.log, b.log, part))
    log_ratio = lp - lq
    logs = np.minimum(1 + np.abs(lp) + np.abs(lq), 1e150)  # their squares stay finite
    finite = np.where(np.isfinite(terms), terms, 0.0)
    mixed = is_mixed(operation, (sx, sy))
    if mixed and double:
        magnitudes = (finite + np.abs(q - p) if defined.relative else p * np.abs(part) + p * (sx != sy)) * logs
        if defined.relative:  # for nearly equal rows, the square of the error of log q - log p
            magnitudes = magnitudes + EPS64 * p * logs * logs
        x_size = logs if sx == "probs" else p * logs * logs
        y_size = (p + q) * logs / (np.where(q > 0, q, 1.0) if sy == "probs" else 1.0)
        if sx == "logits":
            x_size = (x_size + p * x_size.sum(axis=-1, keepdims=True)) / temperature
        if sy == "logits":
            y_size = (y_size + q * y_size.sum(axis=-1, keepdims=True)) / temperature
    else:
        magnitudes, x_size, y_size = np.abs(finite), np.abs(dx), np.abs(dy)
        if is_cross(operation, (sx, sy)):  # -p (log q + H) and q - p cancel where q is flat, and where q is close to p
            of_row = np.where(np.isfinite(values), values, 0.0)[..., None]
            x_size = p * (np.abs(part) + np.abs(of_row)) / temperature if sx == "logits" else x_size
            y_size = (p + q * p.sum(axis=-1, keepdims=True)) / temperature if sy == "logits" else y_size
        elif (sx, sy) == ("logits", "logits"):  # rel_entr is kl_div there, to the relative precision of kl_div
            magnitudes = np.where(np.isfinite(values), values, 0.0)[..., None]
            # where p is nearly 1, -p (log q - log p + KL) cancels down to the sum of the other classes
            x_size = x_size + 2.0**-20 * p * (np.abs(part) + np.abs(magnitudes)) / temperature
        if defined.part and sx != "logits":  # by_p is 1 plus a logarithm: they may cancel
            x_size = (1 + np.abs(part)) * (p if sx == "log_probs" else 1.0)
        if mixed and not defined.cost:
            off = TOLERANCES["logarithm", "float32"] * logs
            by_value, by_gradient = (
                off / tolerance(operation, (sx, sy), "float32", of)[0] for of in ("value", "gradient")
            )
            magnitudes = magnitudes + by_value * p * (np.abs(part) + off if defined.relative else 1.0)
            if sx == "logits":
                x_size = p * (np.where(np.isfinite(log_ratio), np.abs(log_ratio), 0.0) + by_gradient)
                x_size = (x_size + p * x_size.sum(axis=-1, keepdims=True)) / temperature
            else:
                x_size = x_size + by_gradient * (p if sx == "log_probs" else 1.0)
            if sy == "logits":
                y_size = np.abs(q - p) + by_gradient * p
                y_size = (y_size + q * y_size.sum(axis=-1, keepdims=True)) / temperature
            elif defined.relative or sx == "logits":
                y_size = y_size + by_gradient * p / (np.where(q > 0, q, 1.0) if sy == "probs" else 1.0)
    # two rows of logits: q - p cancels too if a mask makes KL large in comparison; such chunks are computed in double,
    # and log q - log p is accurate to five eps of double times KL
    y_floor = np.zeros_like(p)
    if (sx, sy) == ("logits", "logits") and not defined.cost:
        y_floor = 5 * EPS64 * p * np.where(np.isfinite(values), values, 1.0)[..., None] / temperature
    terms_size = np.abs(finite) + magnitudes
    if "logits" in (sx, sy) and (double or not mixed):  # log q - log p carries the error of two normalisations
        terms_size = terms_size + (np.abs(q - p) if defined.relative else p) * logs
    return [np.where(np.isfinite(v), v, 0.0).sum(axis=-1) for v in (magnitudes, terms_size, x_size, y_size, y_floor)]


_digits = cache(Digits)


# Tests request the same rows many times, with different reductions, weights or results.
@lru_cache(maxsize=8)
def _known(
    digits: int | None, operation: str, space: Any, temperature: float, double: bool, *operands: tuple
) -> Answer:
    x, y = (np.frombuffer(data).reshape(shape) for data, shape in operands)
    answer = _answer(_digits(digits) if digits else Doubles, operation, x, y, space, temperature, double)
    for f in fields(answer):
        getattr(answer, f.name).flags.writeable = False
    return answer


def _asked(digits: int | None, operation: str, x: Any, y: Any, space: Any, temperature: float) -> Answer:
    given = [np.asarray(v) for v in (x, x if DEFINITIONS[operation].single else y)]
    double, arrays = any(a.dtype.itemsize == 8 for a in given), [a.astype(np.float64) for a in given]
    return _known(digits, operation, space, temperature, double, *((a.tobytes(), a.shape) for a in arrays))


def exact(
    operation: str, x: Any, y: Any = None, space: Any = "probs", temperature: float = 1.0, digits: int = 50
) -> Answer:
    """By mpmath, for any input. 50 digits resolve a divergence of 1e-32; smaller ones need more."""
    return _asked(digits, operation, x, y, space, temperature)


def fast(operation: str, x: Any, y: Any = None, space: Any = "probs", temperature: float = 1.0) -> Answer:
    """By pairs of doubles; for long rows of ordinary numbers."""
    return _asked(None, operation, x, y, space, temperature)


def at(answer: Answer, rows: Any) -> Answer:
    """The answer for some of the rows."""
    return Answer(*(getattr(answer, f.name)[rows] for f in fields(Answer)))


# ---- comparisons -----------------------------------------------------------------------------------------------------


def assert_close(
    got: Any, expected: Any, size: Any, bounds: tuple[float, float], what: str = "", floor: Any = 0.0
) -> None:
    """Compare each value or, with one axis more than `size`, each row's L1 distance: within relative*size + absolute*n
    + floor.

    Infinities and NaN must be exactly where the expected array has them.
    """
    got, expected, size = (np.asarray(v, np.float64) for v in (got, expected, size))
    assert got.shape == expected.shape, f"{what}: shape {got.shape} instead of {expected.shape}"
    special = ~np.isfinite(expected)
    np.testing.assert_array_equal(got[special], expected[special], f"{what}: infinite or NaN")
    assert np.isfinite(got[~special]).all(), f"{what}: {got} instead of {expected}"
    error = np.abs(np.where(special, 0.0, got) - np.where(special, 0.0, expected))
    n = 1
    if error.ndim > size.ndim:
        n, error = error.shape[-1], error.sum(axis=-1)
    limit = bounds[0] * size + bounds[1] * n + floor
    worst = np.max(error / np.maximum(limit, 2.0**-1074), initial=0.0)
    assert worst <= 1, f"{what}: error {worst:.3g} times the bound\n{got}\ninstead of\n{expected}"


def assert_answer(results: dict[str, Any], answer: Answer, operation: str, space: Any) -> None:
    """Compare results by name (value, terms, dx, dy) with the oracle's; results that are None are skipped."""
    for name, got in results.items():
        if got is None:
            continue
        of = "value" if name == "value" or (name == "terms" and "logits" not in space) else "gradient"
        bounds = tolerance(operation, space, got.dtype, of)
        size = getattr(answer, f"{name}_size")
        floor = answer.dy_floor if name == "dy" else 0.0
        assert_close(got, getattr(answer, name), size, bounds, f"{name} of {operation} in {space}, {got.dtype}", floor)
