"""What klcore accepts as an array, and what it says about anything else.

NumPy would convert masked, sparse and labelled arrays, and those with a unit, to plain numbers without a word.
"""

import sys
from typing import Any

import numpy as np

from klcore import _cpu
from klcore.backends import labels

FLOATS = tuple(_cpu.DTYPES)  # the names, in the order of their codes

_OWN = np.ndarray.__array_ufunc__

TABLES = ("pandas", "polars", "xarray")  # NumPy's functions have their usual meaning for these, except for labels

_PLAIN_NUMBERS = (  # how to get the plain numbers of an array with a unit or the like: the attribute, the expression
    ("compute", "compute()"), ("value", "value"), ("magnitude", "magnitude"),
)  # fmt: skip


def refuse(a: Any, name: str) -> None:
    """Raise TypeError for arrays that no backend accepts, because of their type or their dtype."""
    _refuse_kind(a, name)
    dtype = getattr(a, "dtype", None)
    if dtype is not None and dtype.kind not in "iub" and dtype.name not in FLOATS:
        columns = f"pass its columns as one array: numpy.lib.recfunctions.structured_to_unstructured({name})"
        numbers = f"pass {name}.astype({'int' if name == 'indices' else 'float'})"
        hint = columns if dtype.names else "" if dtype.kind == "c" else numbers
        if dtype.kind == "O" and a.size and isinstance(np.ravel(a)[0], (list, tuple, np.ndarray)):
            hint = _of_rows(name)
        raise TypeError(
            f"{name} has dtype {dtype}; klcore supports {', '.join(FLOATS)}, and converts integers and booleans to "
            f"float64{'; ' + hint if hint else ''}"
        )


def check_indices_dtype(dtype: Any, are_integers: bool) -> None:
    """Raise TypeError for indices of another dtype than integer."""
    if not are_integers:
        raise TypeError(f"indices must be integers, the numbers of classes; found dtype {dtype}")


def _refuse_kind(a: Any, name: str) -> None:
    """Raise TypeError for masked and sparse arrays, and those with a meaning beyond their numbers, such as units."""
    if is_masked(a):
        raise TypeError(
            f"{name} is a masked array, but klcore would ignore the mask; pass {name}.filled(value), or weights=0 for "
            "the rows to leave out"
        )
    cls = type(a)
    _refuse_tensorflow(cls, name)
    dense = next((f"{name}.{method}()" for method in ("toarray", "todense") if hasattr(cls, method)), None)
    if dense is not None:
        raise TypeError(f"{name} is a sparse {cls.__name__}, but klcore takes dense arrays; pass {dense}")
    unit = None if isinstance(a, np.ndarray) or _is_known(cls) else getattr(a, "unit", None)
    if unit is not None or has_meaning(cls):
        raise TypeError(
            f"{name} is of type {_type_name(cls)}, which redefines NumPy's functions, for example for units, but "
            f"klcore would ignore that; pass the plain numbers, {_plain_numbers(a, name)}"
        )


def _refuse_tensorflow(cls: type, name: str) -> None:
    if "tensorflow" in _roots(cls):
        raise TypeError(
            f"{name} is of type {_type_name(cls)}, but klcore has no adapter for TensorFlow; train with the losses "
            f"of klcore.compat.keras, or, if you need no gradient, pass the NumPy array that its numpy() returns"
        )


def is_masked(a: Any) -> bool:
    """Whether this is a masked array. The module, which NumPy imports at its first use, is not imported for that."""
    ma = sys.modules.get("numpy.ma")
    return ma is not None and isinstance(a, ma.MaskedArray)


def has_meaning(cls: type) -> bool:
    """Whether arrays of this type redefine NumPy's functions."""
    return getattr(cls, "__array_ufunc__", _OWN) is not _OWN and not _is_known(cls)


def _refuse_parts(a: Any, name: str) -> None:
    """Raise TypeError for lists of objects that NumPy would convert to plain numbers, losing their meaning."""
    lists, seen = [a], set()  # a list may contain itself
    while lists:
        part = lists.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        for cls in set(map(type, part)) - {int, float, np.ndarray}:
            if cls in (list, tuple):
                lists += [b for b in part if type(b) is cls]
                continue
            _refuse_tensorflow(cls, f"an element of {name}")
            one = next(b for b in part if type(b) is cls)
            if is_masked(one) or has_meaning(cls) or labels.are_there(one) or _is_tensor(one):
                make = "torch.stack" if _is_tensor(one) else "numpy.ma.stack" if is_masked(one) else "numpy.stack"
                call = f"{make}({name})" + ".filled(value)" * is_masked(one)
                raise TypeError(
                    f"{name} is a {type(part).__name__} of {_type_name(cls)}, whose labels, mask, unit or history "
                    f"klcore would ignore; pass one array, such as {call}"
                )


def _is_tensor(a: Any) -> bool:
    return type(a).__module__.partition(".")[0] == "torch" and hasattr(a, "ndim") and a.ndim > 0


def _of_rows(name: str) -> str:
    return f"its elements are lists or arrays; pass numpy.stack({name}) to make them the rows of one array"


def _type_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")


def _is_known(cls: type) -> bool:
    return not _roots(cls).isdisjoint(("cupy", *TABLES))


def _roots(cls: type) -> set[str]:
    return {base.__module__.partition(".")[0] for base in cls.__mro__}


def _plain_numbers(a: Any, name: str) -> str:
    attribute = next((f" or {name}.{text}" for word, text in _PLAIN_NUMBERS if hasattr(a, word)), "")
    if isinstance(a, np.ndarray):
        return f"{name}.view(numpy.ndarray){attribute}"
    return attribute.removeprefix(" or ") or f"as a NumPy array made from {name}"


def as_numpy(a: Any, name: str) -> Any:
    """Convert `a` with NumPy; TypeError or ValueError, naming the argument, if NumPy cannot or would misread it."""
    if type(a) is np.ndarray:
        return a
    _refuse_kind(a, name)
    cls = type(a)
    if isinstance(a, (str, bytes, bytearray)):
        raise TypeError(f"{name} is of type {_type_name(cls)}; klcore takes arrays and sequences of numbers")
    if isinstance(a, (list, tuple)):
        _refuse_parts(a, name)
    try:
        lends = hasattr(a, "__dlpack__") and not hasattr(a, "__array__")
        found = np.from_dlpack(a) if lends else np.asarray(a)
    except Exception as error:  # whatever the container raises
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{name}, of type {_type_name(cls)}, cannot be converted to a NumPy array: {error}") from error
    if found.dtype == object and not isinstance(a, np.ndarray):
        if not found.ndim and not isinstance(a, (int, np.generic)):
            raise TypeError(f"{name} is of type {_type_name(cls)}, which NumPy cannot convert to an array of numbers")
        if found.size and isinstance(np.ravel(found)[0], (list, tuple, np.ndarray)):
            hint = _of_rows(name)
        elif hasattr(cls, "iloc"):
            hint = f"select the numeric columns, or pass {name}.to_numpy(dtype=float), which makes missing values NaN"
        else:
            hint = f"pass numpy.asarray({name}, dtype=float)"
        raise TypeError(
            f"{name}, of type {_type_name(cls)}, becomes an array of dtype object, not {', '.join(FLOATS)}; {hint}"
        )
    return found


def on_host(*same: Any) -> Any:
    """The first of these equivalent arrays that is on the host, or None: reading from a GPU would synchronise."""
    return next((a for a in same if not hasattr(a, "__cuda_array_interface__")), None)


def bad_ones(a: Any, bad: Any) -> str:
    """The first bad element, its index, and how many more there are, for a message."""
    where = np.argwhere(bad)
    at = tuple(where[0].tolist())
    return f"{a[at]!s}{f' at index {at}' if at else ''}{f', and {len(where) - 1} more' if len(where) > 1 else ''}"
