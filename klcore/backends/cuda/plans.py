"""The arguments of a launch, kl::Plan of src/kl_cuda.cu or kl::Listing of src/kl_sparse.cu, without addresses."""

import math
from typing import Any, NamedTuple

import numpy as np

from klcore import _cpu
from klcore.backends.cuda import devices, nvrtc


class _Field(NamedTuple):
    name: str
    words: int  # of eight bytes
    double: bool  # else an integer or an address


def _fields(struct: str) -> list[_Field]:
    """The members of a struct, parsed from the CUDA source, which alone defines its layout; all are whole words."""
    body = nvrtc.source().partition(f"struct {struct} {{")[2].partition("\n};")[0]
    found = []
    for line in body.splitlines()[1:]:
        kind, _, names = line.partition(";")[0].removeprefix("  const ").strip().partition(" ")
        for name in names.split(", "):
            words = _ARRAY if kind == "Array" else MAX_DIMS if "[MAX_DIMS]" in name else 1
            found.append(_Field(name.strip("*").partition("[")[0], words, kind == "double" and "*" not in name))
    return found


MAX_DIMS = int(nvrtc.source().partition("constexpr int MAX_DIMS = ")[2].partition(";")[0])
_ARRAY = sum(field.words for field in _fields("Array"))


class Struct:
    """The offsets of the members of a struct, in words."""

    def __init__(self, name: str) -> None:
        fields = _fields(name)
        self.at = {field.name: sum(f.words for f in fields[:k]) for k, field in enumerate(fields)}
        self.words = sum(field.words for field in fields)
        self.doubles = {field.name for field in fields if field.double}


PLAN, LISTING = Struct("Plan"), Struct("Listing")
AT, WORDS = PLAN.at, PLAN.words
# The addresses of a call: the arrays that it reads, in this order, then its value and gradients, then scratch memory.
READ = ("x", "y", "weights", "temperatures", "factors", "cotangent", "divisor", "counted")
_SCRATCH = -1  # the number of the last address


class Place(NamedTuple):
    """A future address: `offset` bytes after address number `of`, in the order of READ."""

    of: int
    offset: int = 0


class Scratch:
    """The scratch memory of a call, laid out piece by piece, so that one allocation serves all launches."""

    def __init__(self) -> None:
        self.nbytes = 0

    def doubles(self, count: int) -> Place:
        place = Place(_SCRATCH, self.nbytes)
        self.nbytes += -(-8 * count // 256) * 256
        return place


class View(NamedTuple):
    """An array as kl::Array describes it."""

    place: Place | int  # a future address, or an address
    stride: int
    batch: tuple[int, ...]
    dtype: int
    size: int


def view_of(a: Any, place: Place | int, classes: bool) -> View:
    strides = a.strides
    code = devices.code_of(a.dtype)
    assert code is not None  # devices.asarray and rows.py ensure this
    if classes:
        return View(place, strides[-1], strides[:-1], code, _cpu.SIZES[code])
    return View(place, 0, strides, code, _cpu.SIZES[code])


class Layout(NamedTuple):
    """The batch axes, merged where the strides of all arrays allow it, and the arrays over these axes."""

    shape: tuple[int, ...]
    views: dict[str, View]
    columns: bool
    dense: bool


def layout_of(shape: tuple[int, ...], n: int, views: dict[str, View], keep_order: bool = False) -> Layout:
    order = list(range(len(shape)))
    columns = False
    x = views.get("x")
    if x and not keep_order and n > 1 and abs(x.stride) > x.size:
        # the classes are not contiguous: make the axis with the smallest stride the innermost batch axis
        apart = {d: abs(x.batch[d]) for d in order if shape[d] > 1 and x.batch[d]}
        nearest = min(apart, key=apart.__getitem__, default=None)
        if nearest is not None and apart[nearest] < abs(x.stride):
            columns = True
            order.append(order.pop(nearest))
    order = [d for d in order if shape[d] != 1]
    groups: list[list[int]] = []
    for d in order:
        even = groups and all(v.batch[groups[-1][-1]] == v.batch[d] * shape[d] for v in views.values())
        if even:
            groups[-1].append(d)
        else:
            groups.append([d])
    joined = tuple(math.prod(shape[d] for d in g) for g in groups)
    views = {name: v._replace(batch=tuple(v.batch[g[-1]] for g in groups)) for name, v in views.items()}
    dense = len(joined) <= 1 and all(
        v.stride == v.size and (not joined or v.batch[0] == n * v.size)
        for name, v in views.items()
        if name in ("x", "y", "dx", "dy")
    )
    return Layout(joined, views, columns, dense)


class Plan:
    """kl::Plan, or another struct, as eight-byte words, and the places of the addresses that some words will hold."""

    __slots__ = ("places", "struct", "words")

    def __init__(self, words: np.ndarray, places: dict[int, Place], struct: Struct) -> None:
        self.words, self.places, self.struct = words, places, struct

    def with_fields(self, **fields: Any) -> "Plan":
        """A copy with some fields changed; None means the null address."""
        plan = Plan(self.words.copy(), self.places.copy(), self.struct)
        for name, value in fields.items():
            plan.put(self.struct.at[name], value, name in self.struct.doubles)
        return plan

    def put(self, at: int, value: Any, double: bool = False) -> None:
        self.places.pop(at, None)
        if isinstance(value, Place):
            self.places[at] = value
        elif double:
            self.words.view(np.float64)[at] = value
        else:
            self.words[at] = 0 if value is None else value


def plan_of(layout: Layout, n: int, struct: Struct = PLAN, **fields: Any) -> Plan:
    plan = Plan(np.zeros(struct.words, np.int64), {}, struct)
    words, where = plan.words, struct.at
    words[: len(layout.shape)] = layout.shape
    words[where["ndim"]] = len(layout.shape)
    words[where["rows"]] = math.prod(layout.shape)
    words[where["n"]] = n
    words[where["chunks"]] = -(-n // _cpu.CHUNK)
    for name, v in layout.views.items():
        at = where[name]
        plan.put(at, v.place)
        words[at + 1] = v.stride
        words[at + 2 : at + 2 + len(v.batch)] = v.batch
        words[at + 2 + MAX_DIMS] = v.dtype
    return plan.with_fields(**fields)
