"""Statistics of row values that are exact, and the same to the bit however the values were split, ordered and merged.

Nothing is added up in floating point. A float32 is an integer times 2^-149, so sums of values and of their squares are
Python's integers, which lose nothing; every figure is a quotient of two of them, rounded once. Quantiles come from a
count of the values by the upper bits of their float32: 512 bins for every factor of two.
"""

import functools
import importlib
import math
import operator
from collections.abc import Iterable
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np

from klcore.backends.host import to_numpy
from klcore.normal import normal_quantile, t_quantile
from klcore.parameters import number

_UNIT = 149  # 2^-149 is the smallest float32: all finite ones are multiples of it
_SHIFT = 14  # lower bits of a float32 that the histogram does not see
_BINS = 1 << (31 - _SHIFT)  # for each sign
_PIECE = 1 << 18  # values at a time: some megabytes of working memory, and sums in float64 that are still exact
_FORMAT = 1  # of to_dict


class Summary:
    """Exact, mergeable statistics of row values: mean, errors, quantiles, extremes and where they are.

    The same bits for any split of the values into updates, any order of these, and any tree of merges.

    Parameters
    ----------
    quantiles : bool
        Keep the histogram that :meth:`quantile` reads: 1 MiB, or 2 MiB with `signed`.
    signed : bool
        Take negative values as well, as those of a difference. Without it they raise: divergences have none.

    Attributes
    ----------
    count : int
        The number of finite values.
    n_inf, n_nan : int
        That of infinite values, and of NaN. They are in no other figure.
    seen : int
        The position after the last value.

    Notes
    -----
    Values are rounded to float32, as which klcore returns most row values; what is too large for it counts as infinite.
    Memory does not grow with the number of values; with `groups` it grows with the number of groups.

    The rows of one text are alike, so the usual standard error, which takes them to be independent, is too small. Name
    the text of each row in `groups`, and :meth:`stderr` is the clustered one [1]_.

    References
    ----------
    .. [1] Liang, K.-Y. and Zeger, S. L., "Longitudinal data analysis using generalized linear models", Biometrika 73
       (1986).

    Examples
    --------
    >>> import klcore
    >>> first = klcore.Summary().update([0.25, 1.0, float("nan")])
    >>> second = klcore.Summary().update([0.5, 4.0], start=3)
    >>> both = first + second
    >>> both.mean, both.max, both.argmax, both.n_nan
    (1.4375, 4.0, 4, 1)
    >>> print(round(both.stderr(), 6), both.quantile([0.0, 0.5, 1.0]).round(2))
    0.868278 [0.25 0.75 4.  ]
    """

    def __init__(self, *, quantiles: bool = True, signed: bool = False) -> None:
        self.signed = bool(signed)
        self.seen = 0
        self.count = 0
        self.n_inf = 0
        self.n_nan = 0
        self._sum = 0  # in units of 2^-149
        self._squares = 0  # in units of 2^-298
        self._least: tuple[float, int] | None = None  # value, position
        self._most: tuple[float, int] | None = None
        self._groups: dict[int, tuple[int, int]] = {}  # name -> number of finite values, their sum
        self._histogram = np.zeros(_BINS * (1 + self.signed), np.int64) if quantiles else None

    # ---- taking values in ----------------------------------------------------------------------------------------

    @classmethod
    def of(
        cls, values: Any, weights: Any = None, groups: Any = None, *, quantiles: bool = True, signed: bool = False
    ) -> Any:
        """The summary of these values; of a dask array a lazy one, each chunk by itself and then merged in a tree.

        Parameters
        ----------
        values, weights, groups
            As of :meth:`update`. Beside a dask array the others may be dask's too.
        quantiles, signed
            As of the class.

        Returns
        -------
        Summary or dask.delayed.Delayed
            Of a dask array what computes to a Summary, with the bits of the array in one piece.

        Examples
        --------
        >>> import klcore
        >>> klcore.Summary.of(klcore.kl_div([[0.5, 0.5], [0.9, 0.1]], [0.9, 0.1])).argmax
        0
        """
        if _is_dask(values):
            leaf = functools.partial(_of_block, quantiles=quantiles, signed=signed)
            lazy = importlib.import_module("klcore.backends.dask")
            return lazy.reduced(values, {"weights": weights, "groups": groups}, leaf, _merged)
        return cls(quantiles=quantiles, signed=signed).update(values, weights, groups)

    def update(
        self, values: Any, weights: Any = None, groups: Any = None, *, start: SupportsIndex | None = None
    ) -> "Summary":
        """Take these values in.

        Parameters
        ----------
        values : array
            Real numbers of any shape, of whatever library and device klcore knows: they are copied to the host. Of
            dask arrays :meth:`of` makes a lazy summary.
        weights : array of bool, optional
            Broadcastable to the shape of `values`: a value whose weight is False is not looked at.
        groups : array of int, optional
            Broadcastable to the shape of `values`: the text, or another cluster, that each value belongs to.
        start : int, optional
            The position of the first of these values, in C order. None: after those that were seen.

        Returns
        -------
        Summary
            This one.

        Raises
        ------
        TypeError
            If `weights` are not boolean, or `groups` not integers.
        ValueError
            If a value is negative without `signed`, or shapes do not match. Nothing was taken in then.
        """
        arrays = {"values": values, "weights": weights, "groups": groups}
        lazy = next((name for name, a in arrays.items() if _is_dask(a)), None)
        if lazy:
            raise TypeError(f"{lazy} is a dask array, which holds no values yet; use klcore.Summary.of(values, ...)")
        at = self.seen if start is None else operator.index(start)
        if at < 0:
            raise ValueError(f"start must be at least 0; found {at}")
        found = to_numpy(values, "values")
        mask, names = _beside(weights, "weights", "b", found.shape), _beside(groups, "groups", "iu", found.shape)
        flat = [None if a is None else a.reshape(-1) for a in (found, mask, names)]
        pieces = [
            (low, [None if a is None else a[low : low + _PIECE] for a in flat]) for low in range(0, found.size, _PIECE)
        ]
        if not self.signed:
            for low, (part, part_mask, _) in pieces:
                _refuse_negative(at + low, part, part_mask)
        for low, parts in pieces:
            self._take(at + low, *parts)
        self.seen = max(self.seen, at + found.size)
        return self

    def _take(self, at: int, values: Any, mask: Any, names: Any) -> None:
        """One piece, of 1-d arrays; `at` is the position of its first value."""
        with np.errstate(over="ignore"):  # to infinity, which is counted
            x = values.astype(np.float32)
        finite = np.isfinite(x)
        if mask is not None:
            self.n_nan += int(np.count_nonzero(np.isnan(x) & mask))
            self.n_inf += int(np.count_nonzero(np.isinf(x) & mask))
            finite &= mask
        elif not finite.all():
            self.n_nan += int(np.count_nonzero(np.isnan(x)))
            self.n_inf += int(np.count_nonzero(np.isinf(x)))
        where = None
        if not finite.all():
            where = np.flatnonzero(finite)
            x, names = x[where], None if names is None else names[where]
        if not x.size:
            return
        x = x + np.float32(0)  # -0 is 0
        for k, keep in ((int(x.argmin()), self._keep_least), (int(x.argmax()), self._keep_most)):
            keep((float(x[k]), at + (k if where is None else int(where[k]))))
        bits = x.view(np.int32)
        positive, negative = bits & 0x7FFFFFFF, bits < 0
        exponent = positive >> 23
        mantissa = (positive & 0x7FFFFF) | ((exponent > 0).astype(np.int32) << 23)
        signed = np.where(negative, -mantissa, mantissa) if self.signed else mantissa
        power = np.maximum(exponent, 1) - 1  # the value is mantissa * 2^(power - 149)
        self.count += x.size
        self._sum += _total(power, signed)
        square = mantissa.astype(np.int64) ** 2  # below 2^48, of which a piece in float64 would be rounded
        self._squares += _total(2 * power, square & 0xFFFFFF) + (_total(2 * power, square >> 24) << 24)
        if names is not None:
            self._take_groups(names, power, signed)
        if self._histogram is not None:
            bins = positive >> _SHIFT
            if self.signed:
                bins = np.where(negative, _BINS - 1 - bins, _BINS + bins)
            self._histogram += np.bincount(bins, minlength=self._histogram.size)

    def _take_groups(self, names: Any, power: Any, mantissa: Any) -> None:
        known, index = np.unique(names, return_inverse=True)
        counts = np.bincount(index)
        sums = [0] * known.size
        keys, slot = np.unique(index * 256 + power, return_inverse=True)
        for key, part in zip(keys.tolist(), np.bincount(slot, weights=mantissa).tolist(), strict=True):
            sums[key >> 8] += int(part) << (key & 255)
        for name, count, total in zip(known.tolist(), counts.tolist(), sums, strict=True):
            self._add_group(name, count, total)

    def _add_group(self, name: int, count: int, total: int) -> None:
        before = self._groups.get(name, (0, 0))
        self._groups[name] = before[0] + count, before[1] + total

    def _keep_least(self, found: tuple[float, int]) -> None:
        self._least = found if self._least is None else min(self._least, found)

    def _keep_most(self, found: tuple[float, int]) -> None:
        self._most = found if self._most is None else max(self._most, found, key=lambda v: (v[0], -v[1]))

    # ---- merging -------------------------------------------------------------------------------------------------

    def merge(self, other: "Summary") -> "Summary":
        """Take in what `other` took in; its positions stay what they are, so give `start` where they matter.

        Parameters
        ----------
        other : Summary
            Of the same `quantiles` and `signed`.

        Returns
        -------
        Summary
            This one. ``a + b`` is a new one, and so is ``sum(summaries)``.

        Raises
        ------
        TypeError, ValueError
            If `other` is no Summary, or one of another kind.
        """
        if not isinstance(other, Summary):
            raise TypeError(f"other must be a klcore.Summary; found a {type(other).__name__}")
        if (self._histogram is None, self.signed) != (other._histogram is None, other.signed):
            raise ValueError(
                f"two summaries of one kind can be merged; this one has {self._kind()} and the other {other._kind()}"
            )
        self.seen = max(self.seen, other.seen)
        self.count += other.count
        self.n_inf += other.n_inf
        self.n_nan += other.n_nan
        self._sum += other._sum
        self._squares += other._squares
        if other._least is not None and other._most is not None:
            self._keep_least(other._least)
            self._keep_most(other._most)
        for name, (count, total) in list(other._groups.items()):
            self._add_group(name, count, total)
        if self._histogram is not None and other._histogram is not None:
            self._histogram += other._histogram
        return self

    def _kind(self) -> str:
        return f"quantiles={self._histogram is not None}, signed={self.signed}"

    def __add__(self, other: Any) -> "Summary":
        if not isinstance(other, Summary):
            return self.copy() if isinstance(other, int) and other == 0 else NotImplemented  # sum() begins with 0
        return self.copy().merge(other)

    __radd__ = __add__

    def copy(self) -> "Summary":
        """A summary of the same values, of its own."""
        return Summary(quantiles=self._histogram is not None, signed=self.signed).merge(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Summary) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it changes

    # ---- figures -------------------------------------------------------------------------------------------------

    @property
    def sum(self) -> float:
        """Of the finite values, rounded once."""
        return _quotient(self._sum, 1 << _UNIT)

    @property
    def mean(self) -> float:
        """Of the finite values, rounded once; NaN if there is none."""
        return _quotient(self._sum, self.count << _UNIT)

    @property
    def rms(self) -> float:
        """The root of the mean of their squares; NaN if there is none."""
        return math.sqrt(_quotient(self._squares, self.count << 2 * _UNIT))

    @property
    def min(self) -> float:
        """The smallest finite value; NaN if there is none."""
        return math.nan if self._least is None else self._least[0]

    @property
    def max(self) -> float:
        """The largest finite value; NaN if there is none."""
        return math.nan if self._most is None else self._most[0]

    @property
    def argmin(self) -> int | None:
        """Where the smallest is: the first of equals."""
        return None if self._least is None else self._least[1]

    @property
    def argmax(self) -> int | None:
        """Where the largest is: the first of equals."""
        return None if self._most is None else self._most[1]

    @property
    def n_groups(self) -> int:
        """The number of groups of which a finite value was seen."""
        return len(self._groups)

    def stderr(self, cluster: bool | None = None) -> float:
        """The standard error of the mean; NaN of fewer than two values, or groups.

        Parameters
        ----------
        cluster : bool, optional
            Take values to be independent between groups only, and not within them. None: where there are groups.

        Raises
        ------
        ValueError
            With `cluster`, if there are values without a group.
        """
        n, k = self.count, self.n_groups
        if not (k > 0 if cluster is None else cluster):
            # sum of (x - mean)^2 / (n (n - 1)), over n (n - 1) n
            return math.sqrt(_quotient(n * self._squares - self._sum**2, (n * n * (n - 1)) << 2 * _UNIT))
        if sum(count for count, _ in self._groups.values()) != n:
            raise ValueError("a clustered error needs the group of every value; pass groups= to each update")
        # k / (k - 1) times the sum of (S_g - mean n_g)^2 / n^2, over n^2
        spread = sum((total * n - self._sum * count) ** 2 for count, total in self._groups.values())
        return math.sqrt(_quotient(k * spread, ((k - 1) * n**4) << 2 * _UNIT))

    def interval(
        self, level: SupportsFloat = 0.95, *, cluster: bool | None = None, quantile: SupportsFloat | None = None
    ) -> tuple[float, float]:
        """A confidence interval, of the mean or of a quantile.

        Parameters
        ----------
        level : float
            Between 0 and 1.
        cluster : bool, optional
            As of :meth:`stderr`; then by Student's t distribution with a degree of freedom less than there are groups.
        quantile : float, optional
            Of this quantile, not of the mean: between two order statistics, whatever the distribution [1]_. Takes the
            values to be independent. Infinite (0 below, without `signed`) where no value is that far out.

        References
        ----------
        .. [1] David, H. A. and Nagaraja, H. N., "Order Statistics" (2003), 7.1.
        """
        level = _fraction(level, "level", closed=False)
        upper = (1 + level) / 2
        if quantile is not None:
            f, n = _fraction(quantile, "quantile"), self.count
            reach = normal_quantile(upper) * math.sqrt(n * f * (1 - f))
            low, high = math.floor(n * f - reach), math.ceil(n * f + reach)
            lowest = -math.inf if self.signed else 0.0
            ends = self._ordered([min(max(low, 1), n) - 1, min(max(high + 1, 1), n) - 1])
            return lowest if low < 1 else float(ends[0]), math.inf if high + 1 > n else float(ends[1])
        clustered = self.n_groups > 0 if cluster is None else cluster
        error, mean = self.stderr(clustered), self.mean
        if math.isnan(error):
            return math.nan, math.nan
        reach = t_quantile(upper, self.n_groups - 1) if clustered else normal_quantile(upper)
        return mean - reach * error, mean + reach * error

    def quantile(self, q: Any) -> Any:
        """Quantiles of the finite values, linear between order statistics as NumPy's; NaN if there are none.

        Parameters
        ----------
        q : float or array of float
            Between 0 and 1.

        Returns
        -------
        float or array
            float64. An order statistic is within 2^-10 of its own; the smallest and the largest are exact, and so are
            zeros. Below 2^-126, where a float32 has fewer digits, it is within 2^-136.
        """
        fractions = np.asarray(q, np.float64)
        if not ((fractions >= 0) & (fractions <= 1)).all():
            raise ValueError(f"q must be between 0 and 1; found {q!r}")
        at = (max(self.count, 1) - 1) * fractions.reshape(-1)
        low = np.floor(at)
        high = np.minimum(low + 1, max(self.count, 1) - 1)
        ends = np.reshape(self._ordered(np.concatenate([low, high]).astype(np.int64)), (2, -1))
        found = (ends[0] + (at - low) * (ends[1] - ends[0])).reshape(fractions.shape)
        return found if fractions.ndim else float(found)

    def histogram(self, edges: Any) -> Any:
        """How many finite values are between each two of these edges.

        Parameters
        ----------
        edges : array of float of shape (n + 1,)
            Increasing. Each is moved to the next edge of a bin of the summary's, by less than 2^-9 of itself.

        Returns
        -------
        array of int of shape (n,)
            Of the values at an edge or above it, and below the next.
        """
        histogram = self._kept()
        with np.errstate(over="ignore"):
            bits = np.asarray(edges, np.float64).astype(np.float32).view(np.int32)
        bins = (bits & 0x7FFFFFFF) >> _SHIFT
        if self.signed:
            bins = np.where(bits < 0, _BINS - bins, _BINS + bins)
        elif (bits < 0).any():
            raise ValueError("edges must not be negative; this summary has no such values")
        below = np.concatenate([[0], np.cumsum(histogram)])
        return np.diff(below[np.minimum(bins, histogram.size)])

    def _kept(self) -> Any:
        if self._histogram is None:
            raise ValueError("this summary keeps no histogram; make it with quantiles=True")
        return self._histogram

    def _ordered(self, ranks: Any) -> Any:
        """The order statistics of these ranks, from 0, as the histogram knows them."""
        histogram, ranks = self._kept(), np.asarray(ranks)
        if not self.count:
            return np.full(ranks.shape, math.nan)
        bins = np.searchsorted(np.cumsum(histogram), ranks, side="right")
        values = np.clip(_middles(bins - _BINS if self.signed else bins), self.min, self.max)
        return np.where(ranks == 0, self.min, np.where(ranks == self.count - 1, self.max, values))

    # ---- for files -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it: sums, which are large integers, in hexadecimal digits.

        Examples
        --------
        >>> import json, klcore
        >>> s = klcore.Summary().update([0.5, 0.25])
        >>> klcore.Summary.from_dict(json.loads(json.dumps(s.to_dict()))) == s
        True
        """
        bins = None if self._histogram is None else np.flatnonzero(self._histogram)
        return {
            "format": _FORMAT,
            "signed": self.signed,
            "seen": self.seen,
            "count": self.count,
            "n_inf": self.n_inf,
            "n_nan": self.n_nan,
            "sum": hex(self._sum),
            "squares": hex(self._squares),
            "min": None if self._least is None else list(self._least),
            "max": None if self._most is None else list(self._most),
            "groups": [[name, count, hex(total)] for name, (count, total) in sorted(self._groups.items())],
            "histogram": None
            if bins is None or self._histogram is None
            else [bins.tolist(), self._histogram[bins].tolist()],
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "Summary":
        """The summary of which :meth:`to_dict` made this.

        Raises
        ------
        ValueError
            If it is not such a dict, or one of a later version's.
        """
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(f"this is no dict of klcore.Summary.to_dict, of format {_FORMAT}")
        try:
            new = cls(quantiles=state["histogram"] is not None, signed=state["signed"])
            new.seen, new.count, new.n_inf, new.n_nan = (int(state[k]) for k in ("seen", "count", "n_inf", "n_nan"))
            new._sum, new._squares = int(state["sum"], 16), int(state["squares"], 16)
            least, most = state["min"], state["max"]
            new._least = None if least is None else (float(least[0]), int(least[1]))
            new._most = None if most is None else (float(most[0]), int(most[1]))
            new._groups = {int(name): (int(count), int(total, 16)) for name, count, total in state["groups"]}
            if new._histogram is not None:
                bins, counts = state["histogram"]
                new._histogram[bins] = counts
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"this is no dict of klcore.Summary.to_dict: {error!r}") from error
        return new

    def __repr__(self) -> str:
        figures = f"count={self.count}, mean={self.mean:.6g}, min={self.min:.6g}, max={self.max:.6g}"
        return f"Summary({figures}, n_inf={self.n_inf}, n_nan={self.n_nan})"


# ---- the parts of it -----------------------------------------------------------------------------------------------


def _total(power: Any, mantissa: Any) -> int:
    """The sum of mantissa * 2^power, exactly: at most 2^18 mantissas below 2^24 are added up in float64."""
    sums = np.bincount(power, weights=mantissa)
    return sum(int(sums[k]) << int(k) for k in np.flatnonzero(sums))


def _quotient(a: int, b: int) -> float:
    """Python rounds the quotient of two integers correctly, however large they are."""
    if b == 0:
        return math.nan
    return a / b


def _middles(bins: Any) -> Any:
    """The middle of each bin, as float64; 0 for the two that hold zeros."""
    far = np.where(bins < 0, -1 - bins, bins).astype(np.int64)
    edges = [((far + k) << _SHIFT).astype(np.int32).view(np.float32).astype(np.float64) for k in (0, 1)]
    infinite = np.isinf(edges[1])  # the last bin ends where float32 does
    upper = np.where(infinite, 2.0**128, edges[1])
    return np.where(far == 0, 0.0, np.where(bins < 0, -1.0, 1.0) * (edges[0] + upper) / 2)


def _fraction(value: Any, name: str, closed: bool = True) -> float:
    found = number(value, name)
    if not (0 <= found <= 1 if closed else 0 < found < 1):
        raise ValueError(f"{name} must be between 0 and 1; found {found!r}")
    return found


def _beside(a: Any, name: str, kinds: str, shape: tuple[int, ...]) -> Any:
    """`a` as a NumPy array of the shape of the values, or None."""
    if a is None:
        return None
    found = to_numpy(a, name)
    if found.dtype.kind not in kinds and found.size:  # no numbers are no numbers of a kind
        what = "booleans, True for a value that counts" if kinds == "b" else "integers"
        raise TypeError(f"{name} must be {what}; found dtype {found.dtype}")
    try:
        return np.broadcast_to(found, shape)
    except ValueError:
        raise ValueError(f"{name} has shape {found.shape}, which does not go with values of shape {shape}") from None


def _refuse_negative(at: int, values: Any, mask: Any) -> None:
    wrong = values < 0 if mask is None else (values < 0) & mask
    if wrong.any():
        k = int(np.argmax(wrong))
        raise ValueError(
            f"value {float(values[k])!r} at position {at + k} is negative, as no divergence is; Summary(signed=True) "
            "takes differences"
        )


def _is_dask(a: Any) -> bool:
    return type(a).__module__.partition(".")[0] == "dask"


# ---- what dask's workers call --------------------------------------------------------------------------------------


def _of_block(
    values: Any,
    weights: Any,
    groups: Any,
    origin: tuple[int, ...],
    shape: tuple[int, ...],
    quantiles: bool,
    signed: bool,
) -> Summary:
    """The summary of a block that begins at `origin` in an array of that shape."""
    new = Summary(quantiles=quantiles, signed=signed).update(values, weights, groups)

    def moved(found: tuple[float, int] | None) -> tuple[float, int] | None:
        if found is None:
            return None
        inside = np.unravel_index(found[1], values.shape) if values.shape else ()
        return found[0], _position([int(i) + o for i, o in zip(inside, origin, strict=True)], shape)

    new._least, new._most = moved(new._least), moved(new._most)
    if values.size:
        last = [o + n - 1 for o, n in zip(origin, values.shape, strict=True)]
        new.seen = _position(last, shape) + 1
    return new


def _position(index: list[int], shape: tuple[int, ...]) -> int:
    """In C order, whatever the size."""
    at = 0
    for i, n in zip(index, shape, strict=True):
        at = at * n + i
    return at


def _merged(parts: Iterable[Summary]) -> Summary:
    first, *others = parts
    first = first.copy()  # dask may hand out what it gives us to others as well
    for other in others:
        first.merge(other)
    return first
