"""The labels of tables: klcore computes by position, and refuses arguments whose labels contradict their positions.

Called by rows.py, and by the adapters that convert their arguments themselves. Tables of pandas, polars and xarray are
recognised by their attributes: no library is imported, and look-alikes work, too. Nothing is aligned, and results carry
no labels.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

# for every axis: the name of the dimension or None, and its labels or None
Axes = list[tuple[Any, Any]]

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
        reader, shape = _reader(type(a)), tuple(getattr(a, "shape", None) or np.shape(a))
        axes = reader(a) if reader else [(None, None)] * len(shape)
        for k, (n, (dimension, labels)) in enumerate(zip(shape, axes, strict=True)):
            at = k - len(shape)  # the axis in the broadcast shape of x and y, counted from the end
            at -= name in ("weights", "temperature", "tail_mass") and at <= last < 0  # these have no class axis
            if indices is not None and at == last and name in ("x", "indices"):
                at = 1  # their class axis is not that of y
            found[name, at] = f"axis {k} of {name}", n, dimension, labels
    for ((one, at), a), ((other, to), b) in itertools.combinations(found.items(), 2):
        if at == to:
            _compare(one, other, a, b)


def _compare(one: str, other: str, a: Any, b: Any) -> None:
    """Compare one axis of two arguments."""
    (of_a, n, dimension, labels), (of_b, m, other_dimension, other_labels) = a, b
    by_position = f"pass {one}.to_numpy() and {other}.to_numpy() to ignore the labels"
    if dimension is not None and other_dimension is not None and dimension != other_dimension:
        raise ValueError(
            f"{of_a} is the dimension {dimension!r} and {of_b} is {other_dimension!r}, but klcore matches axes by "
            f"position; transpose one of them, or {by_position}"
        )
    if n != m or (labels is None and other_labels is None):
        return  # broadcast, or a shape error that is raised elsewhere, or no labels
    if labels is not None and other_labels is not None:
        if not _equal(labels, other_labels):
            raise ValueError(
                f"{of_a} and {of_b} have different labels ({_difference(labels, other_labels)}), but klcore does not "
                f"align them; reindex one like the other, or {by_position}"
            )
        return
    name, of, alone = (one, of_a, other) if other_labels is None else (other, of_b, one)
    labels = other_labels if labels is None else labels
    if _reordered(labels):
        raise TypeError(
            f"the labels of {of} ({_first(labels)}) are not in the order of the positions, and {alone} has no labels "
            f"there to decide which one is meant; sort {name} by its labels, or pass {name}.to_numpy() to ignore them"
        )


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
    k, (one, other) = next(
        ((k, pair) for k, pair in pairs if type(pair[0]) is not type(pair[1]) or pair[0] != pair[1]), (0, (a, b))
    )
    kinds = "" if type(one) is type(other) else f" ({type(one).__name__} and {type(other).__name__})"
    return f"first at position {k}: {one!r} and {other!r}{kinds}"


def _first(labels: Any) -> str:
    first = ", ".join(str(label) for label in itertools.islice(labels, 3))
    return first + ", ..." if len(labels) > 3 else first
