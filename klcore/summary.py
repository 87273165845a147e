"""Statistics of row values that are exact, and the same to the bit however the values were split, ordered and merged.

Nothing is added up in floating point. A float32 is an integer times 2^-149, so the sums of values and of their squares
are Python integers, which are exact; every statistic is a quotient of two of them, rounded once. Quantiles come from a
histogram over the upper bits of the float32 values: 512 bins for every factor of two.
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
_SHIFT = 14  # the number of lower bits of a float32 that the histogram ignores
_BINS = 1 << (31 - _SHIFT)  # for each sign
_PIECE = 1 << 18  # values at a time: a few megabytes of working memory, and sums that are exact in float64
_FORMAT = 1  # the version of what to_dict returns


class Summary:
    """Exact, mergeable statistics of row values: mean, standard errors, quantiles, extremes and their positions.

    The results have the same bits for any split of the values into updates, any order of the updates, and any tree of
    merges.

    Parameters
    ----------
    quantiles : bool
        Keep the histogram that :meth:`quantile` and :meth:`histogram` need: 1 MiB, or 2 MiB with `signed`.
    signed : bool
        Accept negative values, such as differences. By default they raise, because divergences are never negative.

    Attributes
    ----------
    count : int
        The number of finite values.
    n_inf, n_nan : int
        The number of infinite values and of NaNs. They enter no other statistic.
    seen : int
        The position after the last value.

    See Also
    --------
    kl_div : Returns row values with ``reduction="row"``.

    Notes
    -----
    Values are rounded to float32, the dtype of most row values of klcore; values that are too large for it count as
    infinite. Memory does not grow with the number of values; with `groups`, it grows with the number of groups.

    The rows of one text are alike, so the usual standard error, which assumes that they are independent, is too small.
    Pass the text of each row as `groups`, and :meth:`stderr` returns the clustered standard error [1]_.

    Pass a mask to :meth:`update`, not to the divergence: there, masked rows become zeros, which would count.

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
        self._groups: dict[int, tuple[int, int]] = {}  # group -> number of finite values, their sum
        self._histogram = np.zeros(_BINS * (1 + self.signed), np.int64) if quantiles else None

    # ---- adding values -------------------------------------------------------------------------------------------

    @classmethod
    def of(
        cls, values: Any, weights: Any = None, groups: Any = None, *, quantiles: bool = True, signed: bool = False
    ) -> Any:
        """The summary of these values; for a Dask array a lazy one, computed per chunk and merged in a tree.

        Parameters
        ----------
        values, weights, groups
            As for :meth:`update`. If `values` is a Dask array, the others can be Dask arrays, too.
        quantiles, signed
            As for the class.

        Returns
        -------
        Summary or dask.delayed.Delayed
            For a Dask array, a Delayed whose result is a Summary with the same bits as that of the array in one piece.

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
        """Add these values.

        Parameters
        ----------
        values : array
            Real numbers of any shape, on any device, of any library that klcore knows; they are copied to the host. For
            Dask arrays, use :meth:`of`.
        weights : array of bool, optional
            Broadcastable to the shape of `values`. Values with weight False are ignored.
        groups : array of int, optional
            Broadcastable to the shape of `values`: the text, or other cluster, to which each value belongs.
        start : int, optional
            The position of the first of these values, in C order. None means right after the values seen so far.

        Returns
        -------
        Summary
            This summary.

        Raises
        ------
        TypeError
            If `weights` are not boolean or `groups` are not integers.
        ValueError
            If a value is negative without `signed`, or the shapes do not match. The summary is then unchanged.
        """
        arrays = {"values": values, "weights": weights, "groups": groups}
        lazy = next((name for name, a in arrays.items() if _is_dask(a)), None)
        if lazy:
            raise TypeError(f"{lazy} is a dask array, which has no values yet; use klcore.Summary.of(values, ...)")
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
        """Add one piece, given as 1-d arrays; `at` is the position of its first value."""
        with np.errstate(over="ignore", under="ignore"):  # the overflow to infinity is counted below
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
        x = x + np.float32(0)  # -0 becomes 0
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
        square = mantissa.astype(np.int64) ** 2  # below 2^48: their sum over a piece would be rounded in float64
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
        """Add everything that `other` holds.

        Positions in `other` stay as they are, so pass `start` to :meth:`update` if positions matter.

        Parameters
        ----------
        other : Summary
            A summary with the same `quantiles` and `signed`.

        Returns
        -------
        Summary
            This summary. ``a + b`` and ``sum(summaries)`` return a new one.

        Raises
        ------
        TypeError
            If `other` is not a Summary.
        ValueError
            If `other` has another `quantiles` or `signed`.
        """
        if not isinstance(other, Summary):
            raise TypeError(f"other must be a klcore.Summary; found a {type(other).__name__}")
        if (self._histogram is None, self.signed) != (other._histogram is None, other.signed):
            raise ValueError(
                f"only summaries of the same kind can be merged; this one has {self._kind()}, the other {other._kind()}"
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
            return self.copy() if isinstance(other, int) and other == 0 else NotImplemented  # sum() starts with 0
        return self.copy().merge(other)

    __radd__ = __add__

    def copy(self) -> "Summary":
        """An independent copy."""
        return Summary(quantiles=self._histogram is not None, signed=self.signed).merge(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Summary) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # summaries are mutable

    # ---- statistics ----------------------------------------------------------------------------------------------

    @property
    def sum(self) -> float:
        """The sum of the finite values, rounded once."""
        return _quotient(self._sum, 1 << _UNIT)

    @property
    def mean(self) -> float:
        """The mean of the finite values, rounded once; NaN if there are none."""
        return _quotient(self._sum, self.count << _UNIT)

    @property
    def rms(self) -> float:
        """The root mean square of the finite values; NaN if there are none."""
        return math.sqrt(_quotient(self._squares, self.count << 2 * _UNIT))

    @property
    def min(self) -> float:
        """The smallest finite value; NaN if there are none."""
        return math.nan if self._least is None else self._least[0]

    @property
    def max(self) -> float:
        """The largest finite value; NaN if there are none."""
        return math.nan if self._most is None else self._most[0]

    @property
    def argmin(self) -> int | None:
        """The position of the smallest finite value, the first one if several are equal; None if there are none."""
        return None if self._least is None else self._least[1]

    @property
    def argmax(self) -> int | None:
        """The position of the largest finite value, the first one if several are equal; None if there are none."""
        return None if self._most is None else self._most[1]

    @property
    def n_groups(self) -> int:
        """The number of groups with a finite value."""
        return len(self._groups)

    def stderr(self, cluster: bool | None = None) -> float:
        """The standard error of the mean.

        Parameters
        ----------
        cluster : bool, optional
            Assume that values are independent between groups only, not within them. None means to do so if there are
            groups.

        Returns
        -------
        float
            NaN for fewer than two values, or fewer than two groups.

        Raises
        ------
        ValueError
            With `cluster`, if some values have no group.
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
        """A confidence interval of the mean, or of a quantile.

        Parameters
        ----------
        level : float
            Between 0 and 1.
        cluster : bool, optional
            As for :meth:`stderr`. The interval then uses Student's t distribution with one degree of freedom less than
            there are groups.
        quantile : float, optional
            Return an interval of this quantile instead of the mean. It lies between two order statistics, whatever the
            distribution [1]_, and assumes that the values are independent. An end is infinite (0 at the lower end,
            without `signed`) if there are too few values on that side.

        Returns
        -------
        tuple of float
            The lower and the upper end.

        Raises
        ------
        ValueError
            For a `level` or `quantile` out of range, and as for :meth:`stderr`.

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
        """Quantiles of the finite values, interpolated linearly between order statistics, as in ``numpy.quantile``.

        Parameters
        ----------
        q : float or array of float
            Between 0 and 1.

        Returns
        -------
        float or array
            float64; NaN if there are no finite values. The smallest value, the largest value and zeros are exact; other
            order statistics have a relative error below 2^-10. Below 2^-126, where a float32 has fewer digits, the
            absolute error is below 2^-136.

        Raises
        ------
        ValueError
            For a `q` out of range, and if the summary keeps no histogram.
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
        """Count the finite values between consecutive edges.

        Parameters
        ----------
        edges : array of float of shape (n + 1,)
            Increasing. Each edge is moved to the next bin edge of the summary, a relative shift of less than 2^-9.

        Returns
        -------
        array of int of shape (n,)
            The number of values at or above each edge and below the next.

        Raises
        ------
        ValueError
            For negative edges without `signed`, and if the summary keeps no histogram.
        """
        histogram = self._kept()
        with np.errstate(over="ignore", under="ignore"):
            bits = np.asarray(edges, np.float64).astype(np.float32).view(np.int32)
        bins = (bits & 0x7FFFFFFF) >> _SHIFT
        if self.signed:
            bins = np.where(bits < 0, _BINS - bins, _BINS + bins)
        elif (bits < 0).any():
            raise ValueError("edges must not be negative; this summary has no negative values")
        below = np.concatenate([[0], np.cumsum(histogram)])
        return np.diff(below[np.minimum(bins, histogram.size)])

    def _kept(self) -> Any:
        if self._histogram is None:
            raise ValueError("this summary keeps no histogram; create it with quantiles=True")
        return self._histogram

    def _ordered(self, ranks: Any) -> Any:
        """The order statistics with these ranks, counted from 0, up to the width of the histogram's bins."""
        histogram, ranks = self._kept(), np.asarray(ranks)
        if not self.count:
            return np.full(ranks.shape, math.nan)
        bins = np.searchsorted(np.cumsum(histogram), ranks, side="right")
        values = np.clip(_middles(bins - _BINS if self.signed else bins), self.min, self.max)
        return np.where(ranks == 0, self.min, np.where(ranks == self.count - 1, self.max, values))

    # ---- serialisation -------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The summary as a dict that JSON can hold; the sums, which are large integers, are hexadecimal strings.

        Returns
        -------
        dict
            For :meth:`from_dict`.

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
        """The summary from which :meth:`to_dict` made this dict.

        Parameters
        ----------
        state : dict
            What :meth:`to_dict` returned.

        Returns
        -------
        Summary
            A new summary.

        Raises
        ------
        ValueError
            If `state` is not such a dict, or was written by a later version of klcore.
        """
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(f"state is not a dict of klcore.Summary.to_dict in format {_FORMAT}")
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
            raise ValueError(f"state is not a dict of klcore.Summary.to_dict: {error!r}") from error
        return new

    def __repr__(self) -> str:
        figures = f"count={self.count}, mean={self.mean:.6g}, min={self.min:.6g}, max={self.max:.6g}"
        return f"Summary({figures}, n_inf={self.n_inf}, n_nan={self.n_nan})"


# ---- helpers -------------------------------------------------------------------------------------------------------


def _total(power: Any, mantissa: Any) -> int:
    """The exact sum of mantissa * 2^power: float64 holds the sum of at most 2^18 mantissas below 2^24."""
    sums = np.bincount(power, weights=mantissa)
    return sum(int(sums[k]) << int(k) for k in np.flatnonzero(sums))


def _quotient(a: int, b: int) -> float:
    """The correctly rounded quotient: Python's division of integers, however large."""
    if b == 0:
        return math.nan
    return a / b


def _middles(bins: Any) -> Any:
    """The middle of each bin as float64; 0 for the two bins that hold zeros."""
    far = np.where(bins < 0, -1 - bins, bins).astype(np.int64)
    edges = [((far + k) << _SHIFT).astype(np.int32).view(np.float32).astype(np.float64) for k in (0, 1)]
    infinite = np.isinf(edges[1])  # the last bin ends at the limit of float32
    upper = np.where(infinite, 2.0**128, edges[1])
    return np.where(far == 0, 0.0, np.where(bins < 0, -1.0, 1.0) * (edges[0] + upper) / 2)


def _fraction(value: Any, name: str, closed: bool = True) -> float:
    found = number(value, name)
    if not (0 <= found <= 1 if closed else 0 < found < 1):
        raise ValueError(f"{name} must be between 0 and 1; found {found!r}")
    return found


def _beside(a: Any, name: str, kinds: str, shape: tuple[int, ...]) -> Any:
    """`a` as a NumPy array, broadcast to the shape of the values, or None."""
    if a is None:
        return None
    found = to_numpy(a, name)
    if found.dtype.kind not in kinds and found.size:  # an empty list becomes float64
        what = "booleans, True for values that count" if kinds == "b" else "integers"
        raise TypeError(f"{name} must be {what}; found dtype {found.dtype}")
    try:
        return np.broadcast_to(found, shape)
    except ValueError:
        raise ValueError(f"{name} of shape {found.shape} do not broadcast to the shape of values, {shape}") from None


def _refuse_negative(at: int, values: Any, mask: Any) -> None:
    wrong = values < 0 if mask is None else (values < 0) & mask
    if wrong.any():
        k = int(np.argmax(wrong))
        raise ValueError(
            f"value {float(values[k])!r} at position {at + k} is negative, but divergences are not; use "
            "Summary(signed=True) for differences"
        )


def _is_dask(a: Any) -> bool:
    return type(a).__module__.partition(".")[0] == "dask"


# ---- called by Dask's workers --------------------------------------------------------------------------------------


def _of_block(
    values: Any,
    weights: Any,
    groups: Any,
    origin: tuple[int, ...],
    shape: tuple[int, ...],
    quantiles: bool,
    signed: bool,
) -> Summary:
    """The summary of a block that starts at `origin` in an array of this shape."""
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
    """The position in C order, as a Python integer of any size."""
    at = 0
    for i, n in zip(index, shape, strict=True):
        at = at * n + i
    return at


def _merged(parts: Iterable[Summary]) -> Summary:
    first, *others = parts
    first = first.copy()  # Dask may pass the same object to other tasks
    for other in others:
        first.merge(other)
    return first
