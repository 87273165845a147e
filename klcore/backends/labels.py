"""The labels of tables: klcore computes by position, and refuses arguments whose labels contradict their positions.

Called by rows.py, and by the adapters that convert their arguments themselves. Tables of pandas, polars and xarray are
recognised by their attributes: no library is imported, and look-alikes work, too. Nothing is aligned, and results carry
no labels.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# for every axis: the name of the dimension or None, and its labels or None
Axes = list[tuple[Any, Any]]


class _Axis(NamedTuple):
    """One axis of an argument."""

    name: str  # of the argument
    k: int
    n: int
    dimension: Any
    labels: Any

    def __str__(self) -> str:
        return f"axis {self.k} of {self.name}"

    @property
    def place(self) -> str:
        """Where a table of pandas has the labels."""
        return f"{self.name}.{'columns' if self.k else 'index'}"


_readers: dict[type, Callable[[Any], Axes] | None] = {}


def _of_pandas(a: Any) -> Axes:
    return [(None, index) for index in a.axes]


def _of_polars(a: Any) -> Axes:
    return [(None, None), (None, a.columns)]


def _of_xarray(a: Any) -> Axes:
    indexes = getattr(a, "indexes", {})  # a Variable has none
    return [(name, indexes.get(name)) for name in a.dims]


def _reader(cls: type) -> Callable[[Any], Axes] | None:
    if cls not in _readers:
        pandas, polars = hasattr(cls, "iloc"), hasattr(cls, "get_column_index")
        xarray = hasattr(cls, "dims") and hasattr(cls, "isel")
        _readers[cls] = _of_pandas if pandas else _of_polars if polars else _of_xarray if xarray else None
    return _readers[cls]


def are_there(*arrays: Any) -> bool:
    """Whether any of the arrays has labels or dimension names."""
    return any(_reader(type(a)) for a in arrays)


def check(
    last: int, x: Any, y: Any, weights: Any, ratio: Any = None, temperature: Any = None, indices: Any = None,
    tail_mass: Any = None,
) -> None:  # fmt: skip
    """Raise ValueError if labels contradict positions, and TypeError if they might and it cannot be decided.

    Parameters
    ----------
    last : int
        The class axis, counted from the end; 0 if there is none.
    x, y, weights, ratio, temperature, indices, tail_mass
        As the caller gave them; all but x may be None. With `indices`, the classes of x are not those of y.
    """
    found = {}
    given = {
        "x": x, "y": y, "weights": weights, "ratio": ratio, "temperature": temperature, "indices": indices,
        "tail_mass": tail_mass,
    }  # fmt: skip
    for name, a in given.items():
        if a is None:
            continue
        axes = _axes(name, a)
        for axis in axes:
            at = axis.k - len(axes)  # the axis in the broadcast shape of x and y, counted from the end
            at -= name in ("weights", "temperature", "tail_mass") and at <= last < 0  # these have no class axis
            if indices is not None and at == last and name in ("x", "indices"):
                at = 1  # their class axis is not that of y
            found[name, at] = axis
    for ((_, at), a), ((_, to), b) in itertools.combinations(found.items(), 2):
        if at == to:
            _compare(a, b, at == last)


def missing_classes(x: Any, y: Any, last: int) -> str:
    """Which classes only one of two tables has, and what to do; "" unless both have labels on the class axis `last`."""
    sides = [axes[last] for axes in (_axes("x", x), _axes("y", y)) if len(axes) >= -last]
    return _missing(*sides) if len(sides) == 2 and all(side.labels is not None for side in sides) else ""


def _axes(name: str, a: Any) -> list[_Axis]:
    reader, shape = _reader(type(a)), tuple(getattr(a, "shape", None) or np.shape(a))
    axes = reader(a) if reader else [(None, None)] * len(shape)
    return [_Axis(name, k, n, *axis) for k, (n, axis) in enumerate(zip(shape, axes, strict=True))]


def _compare(a: _Axis, b: _Axis, classes: bool) -> None:
    """Compare one axis of two arguments."""
    by_position = f"pass {a.name}.to_numpy() and {b.name}.to_numpy() to ignore the labels"
    if a.dimension is not None and b.dimension is not None and a.dimension != b.dimension:
        raise ValueError(
            f"{a} is the dimension {a.dimension!r} and {b} is {b.dimension!r}, but klcore matches axes by position; "
            f"transpose one of them, or {by_position}"
        )
    if a.n != b.n or (a.labels is None and b.labels is None):
        return  # broadcast, or a shape error that is raised elsewhere, or no labels
    if a.labels is not None and b.labels is not None:
        if not _equal(a.labels, b.labels):
            raise ValueError(
                f"{a} and {b} have different labels ({_difference(a.labels, b.labels)}), but klcore does not align "
                f"them; {(classes and _missing(a, b)) or 'reindex one like the other'}, or {by_position}"
            )
        return
    one, other = (a, b) if b.labels is None else (b, a)
    if _reordered(one.labels):
        raise TypeError(
            f"the labels of {one} ({_first(one.labels)}) are not in the order of the positions, and {other.name} has "
            f"no labels there to decide which one is meant; sort {one.name} by its labels, or pass "
            f"{one.name}.to_numpy() to ignore them"
        )


def _missing(a: _Axis, b: _Axis) -> str:
    """Which labels only one side has, and how to give both sides all labels of both; "" if none is missing."""
    sides = [(has, lacks, [v for v in has.labels if v not in lacks.labels]) for has, lacks in ((a, b), (b, a))]
    sides = [side for side in sides if side[2]]
    if not sides:
        return ""
    found = " and ".join(f"only {has.name} has {_first([*map(repr, only)])}" for has, _, only in sides)
    if len(sides) == 2:
        return f"{found}; for counts, reindex both with {a.place}.union({b.place}) and fill_value=0"
    has, lacks, _ = sides[0]
    return f"{found}; for counts, pass {lacks.name}.reindex({'columns=' * lacks.k}{has.place}, fill_value=0)"


def _equal(a: Any, b: Any) -> bool:
    return bool(a.equals(b)) if hasattr(a, "equals") and hasattr(b, "equals") else list(a) == list(b)


def _reordered(labels: Any) -> bool:
    """Whether the labels are the numbers from 0 on, but not in order."""
    numbers, order = np.asarray(labels), np.arange(len(labels))
    if numbers.dtype.kind not in "iufO" or any(not isinstance(v, (int, float)) for v in numbers.tolist()):
        return False
    return not np.array_equal(numbers, order) and np.array_equal(np.sort(numbers), order)


def _difference(a: Any, b: Any) -> str:
    """Where two label sequences of the same length first differ."""
    pairs = enumerate(zip(a, b, strict=True))
    k, (one, other) = next(((k, pair) for k, pair in pairs if not _is_same(*pair)), (0, (a, b)))
    kinds = "" if type(one) is type(other) else f" ({type(one).__name__} and {type(other).__name__})"
    return f"first at position {k}: {one!r} and {other!r}{kinds}"


def _is_same(one: Any, other: Any) -> bool:
    """Also of missing labels: None, pandas.NA and NaT are one object each, NaN differs from itself."""
    return one is other or (type(one) is type(other) and bool(one == other or (one != one and other != other)))


def _first(labels: Any) -> str:
    first = ", ".join(str(label) for label in itertools.islice(labels, 3))
    return first + ", ..." if len(labels) > 3 else first
