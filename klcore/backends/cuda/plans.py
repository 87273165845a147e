"""What one launch is told: kl::Plan of src/kl_cuda.cu, with places where addresses will be."""

import math
from typing import Any, NamedTuple

import numpy as np

from klcore import _cpu
from klcore.backends.cuda import devices

MAX_DIMS = 32
# kl::Plan, in words of eight bytes
_FIELDS = (
    ("shape", MAX_DIMS), *((name, 1) for name in (
        "ndim", "rows", "n", "chunks", "output", "first", "last", "columns", "dense", "slots", "count", "groups",
        "rows_on", "chunks_on", "inner", "any_weights", "inverse_temperature", "gradient_scale", "scale",
        "parameter", "factor", "denominator", "cotangent", "states", "stats", "sums",
    )),
    *((name, MAX_DIMS + 3) for name in ("x", "y", "weights", "factors", "value", "dx", "dy")),
)  # fmt: skip
AT = {name: sum(words for _, words in _FIELDS[:k]) for k, (name, _) in enumerate(_FIELDS)}
WORDS = sum(words for _, words in _FIELDS)
# What has an address: what a call reads, in this order, then its value and gradients, then its working memory.
READ = ("x", "y", "weights", "factors", "cotangent")
_SCRATCH = -1  # the last address of all
_DOUBLES = ("inverse_temperature", "gradient_scale", "scale", "parameter", "factor")


class Place(NamedTuple):
    """Where something will lie: so many bytes behind the address of number `of`, in the order of READ."""

    of: int
    offset: int = 0


class Scratch:
    """The working memory of a call, laid out piece by piece, so that one allocation serves all launches."""

    def __init__(self) -> None:
        self.nbytes = 0

    def doubles(self, count: int) -> Place:
        place = Place(_SCRATCH, self.nbytes)
        self.nbytes += -(-8 * count // 256) * 256
        return place


class View(NamedTuple):
    """An array as kl::Array describes it."""

    place: Place
    stride: int
    batch: tuple[int, ...]
    dtype: int
    size: int


def view_of(a: Any, place: Place, classes: bool) -> View:
    strides = a.strides
    code = devices.code_of(a.dtype)
    assert code is not None  # devices.asarray and rows.py have seen to it
    if classes:
        return View(place, strides[-1], strides[:-1], code, _cpu.SIZES[code])
    return View(place, 0, strides, code, _cpu.SIZES[code])


class Layout(NamedTuple):
    """The batch axes, joined where all arrays move over them in even steps, and the arrays over them."""

    shape: tuple[int, ...]
    views: dict[str, View]
    columns: bool
    dense: bool


def layout_of(shape: tuple[int, ...], n: int, views: dict[str, View], keep_order: bool = False) -> Layout:
    order = list(range(len(shape)))
    columns = False
    x = views.get("x")
    if x and not keep_order and n > 1 and abs(x.stride) > x.size:
        # the classes lie apart: have the rows that are closest to each other follow each other
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
    """kl::Plan in words of eight bytes, and the places whose addresses some of them are to hold."""

    __slots__ = ("places", "words")

    def __init__(self, words: np.ndarray, places: dict[int, Place]) -> None:
        self.words, self.places = words, places

    def with_fields(self, **fields: Any) -> "Plan":
        """A copy with some fields changed; None stands for the address 0."""
        plan = Plan(self.words.copy(), self.places.copy())
        for name, value in fields.items():
            plan.put(AT[name], value, name in _DOUBLES)
        return plan

    def put(self, at: int, value: Any, double: bool = False) -> None:
        self.places.pop(at, None)
        if isinstance(value, Place):
            self.places[at] = value
        elif double:
            self.words.view(np.float64)[at] = value
        else:
            self.words[at] = 0 if value is None else value


def plan_of(layout: Layout, n: int, **fields: Any) -> Plan:
    plan = Plan(np.zeros(WORDS, np.int64), {})
    words = plan.words
    words[: len(layout.shape)] = layout.shape
    words[AT["ndim"]] = len(layout.shape)
    words[AT["rows"]] = math.prod(layout.shape)
    words[AT["n"]] = n
    words[AT["chunks"]] = -(-n // _cpu.CHUNK)
    for name, v in layout.views.items():
        at = AT[name]
        plan.put(at, v.place)
        words[at + 1] = v.stride
        words[at + 2 : at + 2 + len(v.batch)] = v.batch
        words[at + 2 + MAX_DIMS] = v.dtype
    return plan.with_fields(**fields)
