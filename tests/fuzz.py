"""Random calls of klcore on the CPU, compared with the oracle and with each other, for as long as you like.

`make fuzz` runs this with an extension that setup.py built with gcc's sanitizers; without --sanitized it uses the
installed klcore. A call is drawn from its seed and its number alone, so these two reproduce a failure.

A call is computed as drawn: layouts, axes, dtypes, weights, outputs, threads, instruction set. It is compared with a
plain call: contiguous rows, the classes last, one thread, float32 instead of 16 bits. Rows of the plain call are
compared with tests/oracle.py, or with tests/relatives.py where the oracle has no bound. The drawn call must have the
bits of the plain one wherever the contract says so, which is nearly everywhere. Operations, spaces and parameters come
from klcore's table.
"""

import argparse
import collections
import dataclasses
import importlib
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from unittest import mock

import conftest
import ml_dtypes
import numpy as np
import oracle
import ranges
import relatives
import test_estimate
import test_losses

import klcore
from klcore import _cpu
from klcore.backends import cpu  # chooses the instruction set of klcore._cpu
from klcore.operations import ESTIMATORS, OPERATIONS

_cpu.pretend_processors(64)  # numbers of threads are compared, on however small a machine

KINDS = ("ordinary", "special", "scattered", "equal", "wide", "extreme")  # of numbers
GUARD = 0xA5
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float64", "float32", "float16", "bfloat16")}
DTYPES |= {name: np.dtype(name) for name in ("int32", "uint8", "bool")}
REDUCTIONS = ("row", "none", "sum", "rowmean", "batchmean", "mean")
LISTING = [name for name, o in OPERATIONS.items() if o.takes_indices]
OF_TWO = [name for name, o in OPERATIONS.items() if not o.single]
# sums of terms of both signs, or that do not vanish where x and y agree
SIGNED = ("rel_entr", *(name for name, o in OPERATIONS.items() if o.form == _cpu.BY_COST))


# ---- what is asked for -----------------------------------------------------------------------------------------------


def takes(operation, **options):
    """Whether an operation accepts these arguments; everything that is refused is refused with ValueError."""
    try:
        conftest.call(operation, [1.0], [1.0], **options)
    except ValueError:
        return False
    return True


def own(rng, operation):
    """The operation's own parameters, and its unit: the ends of their ranges, numbers close to the ends, and any
    others."""
    while True:
        near = 10 ** rng.uniform(-20, -1)
        ends = 0, 1, 0.5, near, 1 - near, 1 + near, -near, rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(-3, 4)
        drawn = {
            name: bool(rng.random() < 0.5) if name == "scaled" else float(rng.choice(ends))
            for name in OPERATIONS[operation].parameters
        }
        if takes(operation, **drawn):
            break
    base = float(rng.choice([2, 10, 1.0001, 1e300]))
    return drawn | ({"base": base} if rng.random() < 0.2 and takes(operation, base=base, **drawn) else {})


def draw(rng):
    """The parameters of a call, by name."""

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    def some(share):
        return rng.random() < share

    n = pick(
        rng.integers(0, 3), rng.integers(2, 131), rng.integers(2, 131), rng.integers(120, 1000),
        1024 * rng.integers(1, 6) + rng.integers(-2, 3), 5000 + rng.integers(-9, 9),
    )  # fmt: skip
    rows = min(pick(0, 1, 2, 3, 4, 5, 15, 16, 17, 33, 64, 300, 1025, 2100), max(1, 80_000 // max(1, n)))
    first = pick(1, 1, 2, 3, 5)
    batch = pick((rows,), (rows,), (first, -(-rows // first)), (rows, 1), (1, rows), (2, first, -(-rows // 2 // first)))
    p = {
        "operation": pick(*OPERATIONS, *oracle.OPERATIONS), "kind": pick(*KINDS, *KINDS[:2]),
        "dtypes": (pick(*DTYPES, "float32", "float64", "float32"),) * 2, "shape": "drawn", "n": n, "batch": batch,
        "axis": pick(-1, -1, *range(-len(batch) - 1, 0)), "broadcast": pick(None, None, None, "x", "y"),
        "reduction": pick(*REDUCTIONS), "grad": pick(None, "x", "y", ("x", "y"), ("x", "y")), "out": some(0.4),
        "denominator": pick(None, None, 3, 0.07, 7e6, np.float32(17), np.array(5), 0),
        "weights": pick(None, None, None, "float32", "float64", "bool", "int32", "float16"), "threads": pick(1, 2, 5),
        "temperature": pick(1.0, 1.0, 0.07, 0.5, 2, 17.0, 100.0), "by_row": some(0.3), "dask": some(0.08),
    }  # fmt: skip
    pairs = OPERATIONS[p["operation"]].pairs
    p["space"] = pairs[rng.integers(len(pairs))]
    if some(0.2) and p["kind"] not in ("equal", "wide"):
        p["dtypes"] = p["dtypes"][0], pick(*DTYPES)
    if p["kind"] in ("wide", "extreme") and not set(p["dtypes"]) <= {"float32", "float64", "bfloat16"}:
        p["dtypes"] = (pick("float32", "float64"),) * 2
    # rare by chance; the first of these once exposed stale memory
    if some(0.04):
        p |= {"shape": "turned", "n": 1025 + n % 3000, "batch": (16 + rows % 9,), "axis": -2, "broadcast": None}
        p |= {"reduction": "none", "grad": pick("x", "y", ("x", "y")), "operation": pick(*OF_TWO)}
        p |= {"space": pick(("logits", "probs"), ("log_probs", "logits"), p["space"])}
    elif some(0.03):
        p |= {"shape": "long", "n": pick(8 * 1024 + 1, 20_500, 40_000, 120_001), "batch": (pick(1, 2, 3, 7),)}
        p |= {"axis": pick(-1, -2), "threads": pick(2, 5)}
    elif some(0.02):
        p |= {"shape": "many", "n": pick(1, 2, 3, 7), "batch": (pick(16_384, 16_385, 20_000),), "axis": pick(-1, -2)}
    elif some(0.03):
        p |= {"shape": "summed", "n": pick(33, 129, 1100), "batch": (pick(2, 3), pick(70, 1025)), "axis": -1}
        p |= {"broadcast": pick("x", "y")}
    elif some(0.003):  # so large that it is written past the caches
        p |= {"shape": "streamed", "n": 20_007, "batch": (285,), "axis": -1, "broadcast": None, "reduction": "none"}
        p |= {"operation": "kl_div", "space": ("probs", "probs"), "grad": ("x", "y"), "dtypes": ("float32", "float32")}
    elif some(0.02):
        p |= {"shape": "scalar", "n": 1, "batch": (), "axis": -1, "weights": None, "dask": False}
    if p["kind"] == "wide":
        p |= {"operation": pick(*OF_TWO), "space": ("logits", "logits")}
    if OPERATIONS[p["operation"]].single:
        p |= {"space": (p["space"][0],) * 2, "grad": p["grad"] and "x", "broadcast": None}
    p["own"] = own(rng, p["operation"])
    p["terms"] = OPERATIONS[p["operation"]].has_terms
    p["reduction"] = p["reduction"] if p["terms"] or p["reduction"] != "none" else "row"
    p["denominator"] = p["denominator"] if p["reduction"] == "sum" else None
    if "logits" not in p["space"]:
        p |= {"temperature": 1.0, "by_row": False}
    p["n"], batch = int(p["n"]), tuple(map(int, p["batch"]))
    p["batch"] = p["x"] = p["y"] = batch
    if p["broadcast"]:
        cut = [1 if some(0.6) or (p["shape"] == "summed" and d == len(batch) - 1) else s for d, s in enumerate(batch)]
        drop = int(rng.integers(0, len(batch) + 1)) if some(0.5) else 0
        p[p["broadcast"]] = tuple(cut[min(drop, len(batch) + 1 + p["axis"]) :])  # no axis in front of the classes
    p["batch"] = np.broadcast_shapes(p["x"], p["y"])
    return p


def into(z, space, dtype):
    """Logits as numbers of a space."""
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        if space != "logits" and z.shape[-1]:
            z = z - z.max(axis=-1, keepdims=True)
            z = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
        if space == "counts":
            z = z + 8
        return (np.exp(z) if space in ("probs", "counts") else z).astype(dtype)


def operands(rng, p):
    """x and y, of shape batch + (n,), contiguous."""
    n, kind, batch = p["n"], p["kind"], tuple(max(1, size) for size in p["batch"])
    dtypes = [DTYPES[name] for name in p["dtypes"]]
    rows = math.prod(batch)
    if kind == "wide" and n:
        a, b = (v.astype(np.float64) for v in ranges.rows(rng, p["dtypes"][0], n, rows, p["temperature"]))
        a, b = a.reshape(*batch, n), b.reshape(*batch, n)
    else:
        each = (*batch, 1)
        a = rng.normal(size=(*batch, n)) * rng.choice([0.3, 1, 4], each)
        noise = 10 ** rng.uniform(-6, 0.7, each) * rng.normal(size=a.shape)
        b = a + noise * (rng.choice([1, 20], each) if kind == "scattered" else 1) + rng.choice([0, 0, 5], each)
    if kind == "special" and n:
        masked = rng.random(a.shape) < rng.choice([0, 0.05, 0.5], each)
        side = rng.integers(0, 3, each)
        a, b = np.where(masked & (side != 1), -np.inf, a), np.where(masked & (side != 2), -np.inf, b)
    made = []
    for v, space, dtype, name in zip((a, b), p["space"], dtypes, "xy", strict=True):
        batch = p[name]
        v = v[(0,) * (v.ndim - 1 - len(batch))]
        v = v[tuple(slice(0, size) for size in batch)]  # of a broadcast operand, the first
        if dtype.kind in "iub":
            v = rng.integers(0, 2 if dtype.kind == "b" else 6, v.shape).astype(dtype)
            v = -v if space == "log_probs" and dtype.kind == "i" else v
        else:
            v = into(v, space, dtype)
        if kind == "special" and v.size and dtype.kind not in "iub" and rng.random() < 0.5:
            spoilers = [np.nan, -1.0, 0.0, -0.0, -np.inf, np.inf][: None if space in ("logits", "counts") else 4]
            v[rng.random(v.shape[:-1]) < 0.2, rng.integers(n)] = rng.choice(spoilers)
        if kind == "extreme" and v.size and dtype.kind not in "iub":
            about = ml_dtypes.finfo(dtype)
            ends = np.log2(float(about.smallest_subnormal)), np.log2(float(about.max)) - 1e-9
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                m = np.exp2(rng.uniform(*ends, v.shape))
                m = np.where(rng.random(v.shape) < 0.05, rng.choice([0.0, np.inf, np.nan], v.shape), m)
                m = m * rng.choice([1] if space in ("probs", "counts") and rng.random() < 0.8 else [-1, 1], v.shape)
                v = np.where(rng.random((*v.shape[:-1], 1)) < 0.5, m.astype(dtype), v)
        if v.ndim and v.size and rng.random() < 0.1:  # equal along an axis, so that its step may be 0
            k = rng.integers(v.ndim)
            v = v.take([0], k).repeat(v.shape[k], k)
        made.append(v)
    if kind == "equal" and made[0].shape == made[1].shape:
        made[1] = made[0].copy()
    return made


# ---- where arrays lie ------------------------------------------------------------------------------------------------


class Memory:
    """Lays arrays out at random, and detects writes outside of them."""

    def __init__(self, rng):
        self.rng, self.held, self.used = rng, [], collections.Counter()

    def lay(self, a, written=False):
        """The array `a` in a random layout; its buffer ends where it ends."""
        rng, a = self.rng, np.asarray(a)
        how = (
            "contiguous"
            if not a.ndim
            else rng.choice(["contiguous", "fortran", "steps", "negative", "unaligned", "mixed", "repeated", "swapped"])
        )
        order, steps, offset = np.arange(a.ndim), np.ones(a.ndim, int), 0
        if how == "repeated":  # a step of 0, along one axis or more
            same = [k for k in range(a.ndim) if a.shape[k] and (a == a.take([0], k)).all()]
            if same and not written:
                one = a[tuple(slice(0, 1) if k in same else slice(None) for k in range(a.ndim))]
                view = np.broadcast_to(self.lay(one), a.shape)
                self.used["repeated"] += 1
                return view
            how = "contiguous"
        if how == "swapped":
            if written or a.dtype.kind == "V" or a.dtype.itemsize == 1:
                how = "contiguous"
            else:
                a = a.astype(a.dtype.newbyteorder())
        if how in ("fortran", "mixed"):
            order = order[::-1] if how == "fortran" else rng.permutation(a.ndim)
        if how in ("steps", "negative", "mixed"):
            steps = rng.choice({"steps": [1, 2, 3], "negative": [-1], "mixed": [1, 1, -1, 2, -3]}[how], a.ndim)
        if how in ("unaligned", "mixed"):
            offset = 1
        self.used[how] += 1
        sizes = [(a.shape[k] - 1) * abs(steps[k]) + 1 if a.shape[k] else 0 for k in order]
        base = np.full(math.prod(sizes) * a.dtype.itemsize + offset + 64 * written, GUARD, np.uint8)
        wide = base[offset : base.size - 64 * written].view(a.dtype).reshape(sizes).transpose(np.argsort(order))
        view = wide[(..., *(slice(None, None, s) for s in steps))]
        view[...] = a
        self.held.append((base, base.tobytes(), view if written else None))
        return view

    def check(self):
        for base, before, view in self.held:
            if view is not None and view.size:  # what was written there is as it should be
                bits = f"u{view.dtype.itemsize}"
                now = np.frombuffer(bytearray(before), np.uint8)
                start = view.__array_interface__["data"][0] - base.__array_interface__["data"][0]
                np.ndarray(view.shape, bits, now, start, view.strides)[...] = view.view(bits)
                before = now.tobytes()
            assert base.tobytes() == before, "memory around a result, or of an input, was written"


def same(got, expected, what):
    """Bit by bit, except that all NaNs are equal."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), f"{what}: {got.shape} {got.dtype}"
    if got.tobytes() != expected.tobytes():
        bits = f"u{got.dtype.itemsize}"
        other = (got.copy(order="C")[None].view(bits) != expected.copy(order="C")[None].view(bits))[0]
        other &= ~(np.isnan(got) & np.isnan(expected))
        if other.any():
            at = tuple(map(int, np.argwhere(other)[0]))
            raise AssertionError(
                f"{what}: {got[at]!r}, not {expected[at]!r}, at {at}, one of {other.sum()} in {got.size}"
            )


def near(got, expected, size, dtype, what, count, extreme):
    """Within rounding errors of `size`, and of the result; with the same infinities, or past the end of the dtype's
    range.

    `size`: the sum of the magnitudes of the `count` numbers that were added, here from results of float32 or
    float64.
    """
    about = ml_dtypes.finfo(dtype)
    eps, tiny = (2 * oracle.EPS32, 2.0**-149) if about.bits < 64 else ((16 + count) * oracle.EPS64, 2.0**-1074)
    got, expected = np.asarray(got).astype(np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"{what}: shape {got.shape} instead of {expected.shape}"
    with np.errstate(invalid="ignore", over="ignore"):
        # a subnormal probability is off by half of the smallest, times its logarithm
        bound = eps * size + 1024 * count * tiny + float(about.eps) * np.abs(expected) + float(about.smallest_subnormal)
        fine = (got == expected) | (np.isnan(got) & np.isnan(expected)) | (np.abs(got - expected) <= bound)
        fine |= (np.abs(expected) > 0.999 * float(about.max)) & (np.sign(got) == np.sign(expected))
        fine |= extreme & ~(size < 1e300)  # infinite or not depending on the order of addition, and of weighting
    if not fine.all():
        at = tuple(np.argwhere(~fine)[0])
        raise AssertionError(
            f"{what}: {got[at]!r}, not {expected[at]!r}, at {at}, one of {(~fine).sum()} in {got.size}"
        )


# ---- the oracle ------------------------------------------------------------------------------------------------------


class Long:
    """The arithmetic of x86's long doubles, for oracle._answer: fast, and accurate enough for results of float32."""

    number = staticmethod(lambda a: np.asarray(a, np.longdouble))
    log, exp, where = np.log, np.exp, np.where
    sum = staticmethod(lambda a: a.sum(axis=-1, keepdims=True))
    double = staticmethod(lambda a: a.astype(np.float64))


def multipliers(weights, p, rows):
    """The factor of a row's value."""
    w = np.ones(len(rows)) if weights is None else weights[rows]
    return w / np.log(p["own"]["base"]) if "base" in p["own"] else w


def undefined(a, space):
    """Which rows are NaN."""
    bad = np.isnan(a) | ((a < 0) if space in ("probs", "counts") else False)
    if space in ("logits", "counts"):
        nothing = (a == (-np.inf if space == "logits" else 0)).all(axis=-1, keepdims=True)
        bad = bad | (a == np.inf) | nothing
    return bad.any(axis=-1)


def apart(x, y, space, temperature):
    """KL(x || y) of rows, and the largest magnitude of the logarithms; accurate to a digit or two."""

    def log(a, space):
        a = a.astype(np.longdouble)
        if space in ("probs", "counts"):
            return np.log(a / (a.sum(axis=-1, keepdims=True) if space == "counts" else 1))
        if space == "log_probs":
            return a
        a = (a - a.max(axis=-1, keepdims=True)) / temperature
        return a - np.log(np.exp(a).sum(axis=-1, keepdims=True))

    with np.errstate(all="ignore"):
        p, q = (log(a, s) for a, s in zip((x, y), space, strict=True))
        t = np.where(np.isneginf(p) & np.isneginf(q), 0, q - p)
        kl = np.where(np.isneginf(p), np.exp(q), np.exp(p) * (np.expm1(t) - t)).sum(axis=-1)
        largest = np.max([np.where(np.isfinite(v), abs(v), 0).max(axis=-1) for v in (p, q)], axis=0)
    return kl, np.maximum(largest, 10)


def judge_by_digits(results, x, y, weights, p, rng, cotangent=None):
    """The same against tests/relatives.py, by mpmath, for few classes. With a cotangent of the terms, their
    gradients."""
    n, double = p["n"], x.dtype == np.float64
    if not x.size:
        return 0
    rows = np.unique(rng.integers(0, len(x), max(1, 60 // n)))
    if (n > 150 and rng.random() > 60 / n) or any(ranges.beyond(v[rows]).any() for v in (x, y)):
        return 0
    a, b, w = x[rows].astype("f8"), y[rows].astype("f8"), multipliers(weights, p, rows)
    bad = (w != 0) & (undefined(a, p["space"][0]) | undefined(b, p["space"][1]))
    if "value" in results:
        assert np.isnan(results["value"][rows][bad]).all(), "a row that is undefined is not NaN"
    kl, largest = apart(a, b, p["space"], p["temperature"])
    kept = ~bad & (w != 0) & ((kl >= 1e-12) & (kl <= 1e3) | (kl == np.inf))
    if "logits" in p["space"]:
        kept &= ranges.promised(a, b, p["temperature"], np.clip(kl.astype("f8"), 1e-12, 1e3))
    if not kept.any():
        return 0
    a, b, w, largest, rows = a[kept], b[kept], w[kept], largest[kept].astype("f8"), rows[kept]
    options = {name: v for name, v in p["own"].items() if name != "base"}
    c = None if cotangent is None else cotangent[rows].astype("f8")
    divided = [v for v, space in zip((a, b), p["space"], strict=True) if space in ("probs", "counts")]
    small = any(((v > 0) & (v < 1e-25 * v.sum(-1, keepdims=True))).any() for v in divided)
    true = relatives.exact(p["operation"], a, b, p["space"], p["temperature"], c, 420 if small else 90, **options)
    rounded = p["space"][0] != p["space"][1] or "counts" in p["space"] or c is not None  # a logarithm
    with np.errstate(all="ignore"):
        for name, got in results.items():
            expected, of = getattr(true, name), "gradient" if name in ("dx", "dy") else "value"
            got, about = got[rows].astype("f8"), np.finfo(got.dtype)
            base = "float64" if double else "float32"
            by_row = (slice(None),) + (None,) * (expected.ndim - 1)
            m = np.abs(w)[by_row]
            relative = oracle.TOLERANCES["gradient" if of == "gradient" else "kl", base]
            relative = np.where((np.abs(true.value) > 1e3) & (not double), max(relative, 1e-5), relative)
            slack = 16 * oracle.EPS64 * largest[by_row] * rounded
            if name == "terms" and "logits" in p["space"]:  # log q - log p is rounded, and cancels in their sum
                slack = 16 * (oracle.EPS64 if double else oracle.EPS32) * largest[by_row]
            size, off = np.abs(expected), true.slope[by_row]
            if of == "gradient":
                own, space = (a, p["space"][0]) if name == "dx" else (b, p["space"][1])
                counted = (own != 0) | (space not in ("probs", "counts"))
                by_class = p["terms"] and space in ("probs", "log_probs")
                counted &= np.isfinite(true.terms if by_class else true.value[:, None])
                # of terms: what a softmax subtracts from their derivatives may be nearly all of them
                off = n if c is None else np.abs(c).max(-1, keepdims=True) * np.maximum(n, true.slope[by_row])
                off = off / (own.sum(-1, keepdims=True) if space == "counts" else 1) / min(1, p["temperature"])
                size = np.where(counted & np.isfinite(expected), size, 0).sum(-1, keepdims=True)
            else:
                counted = np.ones(expected.shape, bool)
                size = np.maximum(size, 1) if p["operation"] in SIGNED else size
            off = np.where(slack > 0, off, 0) * slack + 1e-50  # and where the oracle's differences end
            if of == "gradient" and space == "logits":  # the part common to all classes is subtracted
                off = off + 16 * oracle.EPS64 * true.slope[by_row] / p["temperature"]
            bound = m * (size * (relative[by_row] + slack) + off) + n * float(about.smallest_subnormal)
            e = expected * w[by_row]
            out = (np.maximum(1, m) * np.abs(expected) > 0.999 * float(about.max)) & (np.abs(got) > 0.99 * about.max)
            wrong = counted & ~(out & (np.sign(got) == np.sign(e))) & ~(np.abs(got - e) <= bound) & (got != e)
            if wrong.any():
                r = np.argwhere(wrong)[0]
                raise AssertionError(
                    f"{name}: {got[tuple(r)]!r}, not {e[tuple(r)]!r}, off by {abs(got - e)[tuple(r)]:.3g}, bound "
                    f"{np.broadcast_to(bound, e.shape)[tuple(r)]:.3g}; x = {a[r[0]].tolist()[:9]}, y = "
                    f"{b[r[0]].tolist()[:9]}, got {got[r[0]]}, not {e[r[0]]}"
                )
    return len(rows)


def judge(results, x, y, weights, p, rng, budget):
    """Compare some rows of results (value, terms, dx, dy, by name) with the oracle; returns how many."""
    if p["kind"] == "extreme" or not x.size:
        return 0
    if p["operation"] not in oracle.OPERATIONS or "counts" in p["space"]:
        return judge_by_digits(results, x, y, weights, p, rng)
    double = x.dtype == np.float64
    huge = any(ranges.beyond(v).any() for v in (x, y))  # pairs of doubles cannot represent them
    count = max(1, int(budget / (500 if huge else 20 if double else 1) / p["n"]))
    if huge and count * p["n"] > 1000:
        return 0
    rows = np.unique(rng.integers(0, len(x), count)) if count < len(x) else np.arange(len(x))

    def verified(rows, arithmetic):
        """How many of these rows have a bound, which holds."""
        a, b = x[rows].astype(np.float64), y[rows].astype(np.float64)
        asked = p["operation"], a, b, p["space"], p["temperature"]
        with np.errstate(all="ignore"):
            true = oracle._answer(arithmetic, *asked, double)
            # what the bounds apply to: docs/accuracy.md
            special = np.isnan(true.value) | np.isinf(true.value) & ~(ranges.beyond(a) | ranges.beyond(b))
            kept = special | (np.abs(true.value) <= 1e3) & (np.abs(true.value) >= 1e-12)
            if "logits" in p["space"]:
                kept &= special | ranges.promised(a, b, p["temperature"], np.clip(true.value, 1e-12, 1e3))
            w = multipliers(weights, p, rows)
            parts = {f.name: getattr(true, f.name) for f in dataclasses.fields(oracle.Answer)}
            by = {name: w.reshape(-1, *[1] * (v.ndim - 1)) for name, v in parts.items()}
            parts = {name: np.where(by[name] == 0, 0.0, v * by[name]) for name, v in parts.items()}
            for name, got in results.items():
                far = np.maximum(1, by[name]) * np.abs(getattr(true, name)) > 0.999 * float(np.finfo(got.dtype).max)
                far &= np.isfinite(parts[name])  # out of range, before or after weighting
                parts[name] = np.where(far, 0.0, parts[name])
                answer = oracle.at(oracle.Answer(**parts), kept)
                oracle.assert_answer({name: np.where(far, 0, got[rows])[kept]}, answer, p["operation"], p["space"])
        return int(kept.sum())

    exact = oracle._digits(60)
    quick = exact if huge else oracle.Doubles if double else Long
    try:
        return verified(rows, quick)
    except AssertionError:  # was it the oracle's arithmetic?
        for r in rows:
            try:
                verified([r], quick)
            except AssertionError:
                verified([r], exact if p["n"] < 2000 else oracle.Doubles)
        return len(rows)


# ---- one call --------------------------------------------------------------------------------------------------------


def gradient_dtype(a):
    return a.dtype.newbyteorder("=") if a.dtype.kind not in "iub" else np.dtype("f8")


def klcore_call(p, arrays, **options):
    grad = options.get("return_grad")
    options = {"temperature": p["temperature"], **p["own"], **options}
    with klcore.threads(options.pop("threads", p["threads"])):
        found = conftest.call(p["operation"], *arrays, p["space"], **options)
    return found if grad else (found,)


def pulled(p, arrays, cotangent, **options):
    """The gradients of sum(cotangent * terms), which adapters ask a backend for."""
    with mock.patch.object(cpu, "compute") as asked:
        klcore_call(p, arrays, reduction="none", return_grad=OPERATIONS[p["operation"]].gradients, **options)
    (call,) = asked.call_args.args
    return cpu.compute(call._replace(cotangent=cotangent))


def check(p, rng):
    """One call of the public functions; returns what to count."""
    sets = [name for name, usable in _cpu.instruction_sets().items() if usable]
    both = OPERATIONS[p["operation"]].gradients
    x, y = operands(rng, p)
    y = y if "y" in both else x
    if p["shape"] == "scalar":
        x, y = x.reshape(()), y.reshape(())
    n, batch, last = p["n"], p["batch"], p["axis"]
    rows = math.prod(batch)
    wanted = () if p["grad"] is None else tuple(p["grad"])
    weights = p["weights"]
    if weights is not None:
        shape = tuple(size if rng.random() < 0.7 else 1 for size in batch)[rng.integers(0, len(batch) + 1) :]
        w = rng.choice([0.0, 1.0, 1.0, 3.0, 0.25, 1e-3, 700.0], shape)
        weights = w.astype(weights) if weights != "bool" else w > 0.5

    # the plain call, with all results: rows in float32 or float64
    double = any(DTYPES[d].itemsize == 8 or DTYPES[d].kind in "iub" for d in p["dtypes"][: len(both)])
    flat = [np.broadcast_to(v.astype("f8" if double else "f4"), (*batch, n)).reshape(rows, n) for v in (x, y)]
    each = None if weights is None else np.broadcast_to(weights.astype("f8"), batch).reshape(rows)
    of = [np.ascontiguousarray(v) for v in flat]
    _cpu.use_instruction_set(sets[0])
    value, *grads = klcore_call(p, of, return_grad=both, weights=each, threads=1)
    plain = dict(zip(("value", "dx", "dy"), (value, *grads), strict=False))
    terms = klcore_call(p, of, reduction="none", weights=each, threads=1)[0] if p["terms"] else None
    if p["terms"]:
        plain["terms"] = terms
    judged = judge(plain, *of, each, p, rng, 30_000)
    if p["operation"] not in SIGNED and (p["terms"] or {"logits", "counts"} >= set(p["space"])):  # else: distributions
        values = [v for v in (value, terms) if v is not None]
        assert not any((v < 0).any() for v in values), "negative"
        if p["kind"] == "equal" and x.shape == y.shape and p["space"][0] == p["space"][1]:
            assert not any(v[v == v].any() for v in values), "not 0 of equal arguments"
    if p["terms"] and x.size and p["kind"] != "extreme" and rng.random() < 0.3:
        c = rng.normal(size=(rows, n)).astype(of[0].dtype)
        gradients = dict(zip(("dx", "dy"), pulled(p, of, c, weights=each), strict=False))
        judged += judge_by_digits(gradients, *of, each, p, rng, c)
    _cpu.use_instruction_set(sets[-1])
    for r in {0, rows - 1, *rng.integers(0, max(1, rows), 3)} if rows else ():
        w = None if each is None else each[r]
        alone = klcore_call(p, [v[r] for v in of], return_grad=both, weights=w)
        for name, got in zip(("value", "dx", "dy"), alone, strict=False):
            same(got, plain[name][r], f"{name} of row {r} alone")
        if p["terms"]:
            same(
                klcore_call(p, [v[r] for v in of], reduction="none", weights=w)[0], terms[r], f"terms of row {r} alone"
            )

    if p["by_row"]:  # among other temperatures
        t = rng.choice([p["temperature"], p["temperature"], 1.0, 3.0, 0.2], rows)
        like = t == p["temperature"]
        for name, got in zip(plain, klcore_call(p, of, return_grad=both, weights=each, temperature=t), strict=False):
            same(got[like], plain[name][like], f"{name}, one temperature a row")

    # the drawn call
    _cpu.use_instruction_set(sets[rng.integers(len(sets))])
    memory = Memory(rng)

    def moved(a):  # from classes last to the axis of the call
        return a if p["shape"] == "scalar" else np.moveaxis(a, -1, last)

    given = [memory.lay(moved(v)) for v in (x, y)]
    given_wanted = [v for v, name in zip(given, "xy", strict=True) if name in wanted]
    given_weights = None if weights is None else memory.lay(weights)
    options = {"reduction": p["reduction"], "axis": last, "denominator": p["denominator"]}
    if p["by_row"]:
        shape = tuple(size if rng.random() < 0.7 else 1 for size in batch)[rng.integers(0, len(batch) + 1) :]
        options["temperature"] = memory.lay(np.full(shape, float(p["temperature"])))
    terms_shape = moved(np.empty((*batch, n), bool)).shape if p["shape"] != "scalar" else ()
    shape = batch if p["reduction"] == "row" else terms_shape if p["reduction"] == "none" else ()
    out = None
    if p["out"]:
        like = [(shape, "f8" if double else "f4"), *((v.shape, gradient_dtype(v)) for v in given_wanted)]
        out = tuple(memory.lay(np.full(size, np.nan, dtype), written=True) for size, dtype in like)
    found = klcore_call(p, given, return_grad=p["grad"], weights=given_weights, out=out, **options)
    if out is not None:
        assert all(a is b for a, b in zip(found, out, strict=True)), "out is not returned"
    memory.check()
    assert (found[0].shape, found[0].dtype) == (shape, "f8" if double else "f4")

    # in another layout, with other threads, without out: the same bits
    again_axis = last if p["reduction"] == "batchmean" else -1
    copies = [np.array(v if again_axis == -1 else moved(v), order="C") for v in (x, y)]
    _cpu.use_instruction_set(sets[rng.integers(len(sets))])
    again = klcore_call(p, copies, return_grad=p["grad"], weights=weights, threads=int(rng.choice([1, 2, 5])),
                        reduction=p["reduction"], axis=again_axis, denominator=p["denominator"])  # fmt: skip
    for k, (a, b) in enumerate(zip(found, again, strict=True)):
        if again_axis == -1 and (k or p["reduction"] == "none"):
            b = moved(b)
        same(a, b, f"result {k} in another layout")
    options = {"reduction": p["reduction"], "axis": again_axis, "denominator": p["denominator"]}
    alone = klcore_call(p, copies, weights=weights, **options)
    same(alone[0], again[0], "the value without its gradients")
    if "y" in wanted and p["space"][1] == "logits" and copies[0].shape == copies[1].shape and y.dtype.kind not in "iub":
        over = copies[1].copy()
        into = (None,) * len(wanted) + (over,)
        found_over = klcore_call(p, [copies[0], over], return_grad=p["grad"], weights=weights, out=into, **options)
        assert found_over[-1] is over
        for k, (a, b) in enumerate(zip(found_over, again, strict=True)):
            same(a, b, f"result {k}, with dy written over y")

    # compared with the plain call
    if p["reduction"] == "row":
        same(found[0], value.reshape(batch), "row values")
    elif p["reduction"] == "none":
        same(found[0], moved(terms.reshape(*batch, n)) if p["shape"] != "scalar" else terms.reshape(()), "terms")
    total = float(rows) if each is None else float(each.sum())
    by = {
        "sum": 1.0 if p["denominator"] is None else float(p["denominator"]),
        "rowmean": total,
        "batchmean": float(terms_shape[0]) if terms_shape else 1.0,
        "mean": float(rows * n),
    }
    denominator = np.float64(by.get(p["reduction"], 1.0))
    with np.errstate(all="ignore"):
        if p["reduction"] not in ("row", "none"):
            wide = value.astype(np.float64) / denominator
            total = wide.sum() if rows and denominator else 0 / denominator
            near(found[0], total, np.abs(wide).sum(), found[0].dtype, p["reduction"], rows, p["kind"] == "extreme")
        for name, got in zip(wanted, found[1:], strict=True):
            a = x if name == "x" else y
            dtype = gradient_dtype(a)
            wide = plain[f"d{name}"].reshape(*batch, n)
            own = (1,) * (len(batch) + 1 - a.ndim) + a.shape
            axes = tuple(k for k, size in enumerate(batch) if own[k] != size)  # over which its copies are summed
            assert got.dtype == dtype
            if not axes and denominator == 1:
                wide = moved(wide.reshape(a.shape))
                once = p["operation"] in oracle.OPERATIONS and "counts" not in p["space"] and wide.dtype == np.float32
                if dtype.itemsize > 2 or once:
                    same(got, wide.astype(dtype), f"d{name}")
                else:  # what is computed in double is rounded to 16 bits directly, and here by way of float32
                    near(got, wide, np.abs(wide), dtype, f"d{name}", 1, p["kind"] == "extreme")
                continue
            if not denominator:
                assert (np.isnan(got) | (got == 0)).all()
                continue
            w64 = wide.astype(np.float64)
            expected = moved((w64.sum(axes) / denominator).reshape(a.shape))
            size = moved((np.abs(w64).sum(axes) / denominator).reshape(a.shape))
            near(got, expected, size, dtype, f"d{name} with {p['reduction']}", rows, p["kind"] == "extreme")
    counted = {"rows judged": judged, **{f"layout {k}": c for k, c in memory.used.items()}}
    if p["dask"] and rows and n:
        dask_call(p, rng, [moved(v) for v in (x, y)], weights, again, moved, last)
        counted["dask"] = 1
    return counted


def dask_call(p, rng, arrays, weights, whole, moved, last):
    """The same through dask, whose blocks go through kl_partial.h."""
    import dask
    import dask.array as da

    aligned = rng.random() < 0.5
    size = int(1024 * rng.integers(1, 3) if aligned else rng.integers(1, p["n"] + 1))

    def chunks(a):
        sizes = [int(rng.integers(1, s + 1)) if s else 1 for s in a.shape]
        sizes[last] = size
        return tuple(sizes)

    exact = (size % 1024 == 0 or size >= p["n"]) and p["reduction"] in ("row", "none") and not p["broadcast"]
    lazy = [da.from_array(a.copy(), chunks=chunks(a)) for a in arrays]
    with dask.config.set(scheduler="synchronous"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        temperature = np.full(p["batch"], float(p["temperature"])) if p["by_row"] else p["temperature"]
        found = klcore_call(p, lazy, return_grad=p["grad"], weights=weights, reduction=p["reduction"], axis=last,
                            denominator=p["denominator"], temperature=temperature)  # fmt: skip
        found = dask.compute(*found)
    for k, (a, b) in enumerate(zip(found, whole, strict=True)):
        b = moved(b) if (k or p["reduction"] == "none") and p["reduction"] != "batchmean" else b
        if exact:
            same(a, b, f"result {k} by dask")
        else:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            if p["kind"] not in ("wide", "extreme"):
                base = "float64" if a.dtype == np.float64 else "float32"
                bound = oracle.TOLERANCES["gradient", base] + 2 * oracle.TOLERANCES["rounding", a.dtype.name]
                a, b = a.astype("f8"), b.astype("f8")
                largest = np.abs(b[np.isfinite(b)]).max(initial=0)
                if p["space"][0] != p["space"][1] or OPERATIONS[p["operation"]].form == _cpu.BY_COST:
                    largest += 8 * oracle.EPS64 / oracle.TOLERANCES["gradient", "float64"]  # p and q cancel
                np.testing.assert_allclose(a, b, bound, bound * largest, err_msg=f"result {k} by dask")


# ---- the losses of other systems -------------------------------------------------------------------------------------


def check_loss(rng):
    """One call of klcore.compat, against the formulas of tests/test_losses.py."""
    named = name, space_x, space_y = test_losses.LOSSES[rng.integers(len(test_losses.LOSSES))]
    dtype = "float32" if name == "puzzlelib" or rng.random() < 0.5 else "float64"
    n = int(rng.choice([1, 2, 17, 100, 129, 1024, 1025, 2500]))
    rows = int(rng.choice([1, 3, 16, 40]))
    z = rng.normal(size=(2, rows, n)) * 2
    x, y = (into(v, space, dtype) for v, space in zip(z, (space_x, space_y), strict=True))
    if space_x == "probs":
        x[rng.random(x.shape) < 0.1] = 0
    reduction = str(rng.choice(["mean", "batchmean", "sum", "none"] if name == "pytorch" else ["sum", "none", "mean"]))
    module = importlib.import_module(f"klcore.compat.{name}")
    each = (rows, n) if name == "pytorch" else (rows,)  # of the shape of the value
    signed = name != "puzzlelib" and (name == "mxnet" or reduction == "none") and rng.random() < 0.5
    factors = {"cotangent": rng.choice([-1.5, 0.0, 1.0, 3.0], each).astype(dtype)} if signed else {}
    memory = Memory(rng)
    results = []
    for lay, threads in ((memory.lay, 2), (lambda a: a, int(rng.choice([1, 5])))):
        t, i = lay(x), lay(y)
        with klcore.threads(threads), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name == "pytorch":
                given = {"reduction": reduction, "log_target": space_x == "log_probs"}
                value, (di, dt) = module.kl_div.value_and_grad(i, t, **given, **factors)
            elif name == "keras":
                loss = module.KLDivergence(reduction=reduction, dtype=dtype)
                value, (dt, di) = loss.value_and_grad(t, i, **factors)
            elif name == "mxnet":
                value, (di, dt) = module.KLDivLoss(space_y == "log_probs").value_and_grad(i, t, **factors)
            else:
                value, di = module.KLDivergence(normTarget=space_x == "logits")(i, t)
                dt = None
        results.append((np.asarray(value), di, dt))
    memory.check()
    for k, (a, b) in enumerate(zip(*results, strict=True)):
        if a is not None:
            same(a, b, f"result {k} in another layout")
    with np.errstate(all="ignore"):
        terms, dt, di = test_losses.exact(named, x, y)
    by, kept = {  # what the sum is divided by, and which axes are not summed
        "pytorch": ({"mean": terms.size, "batchmean": rows}.get(reduction, 1), (0, 1) if reduction == "none" else ()),
        "keras": ({"mean": rows}.get(reduction, 1), (0,) if reduction == "none" else ()),
        "mxnet": (n, (0,)),
        "puzzlelib": (rows, ()),
    }[name]
    gone = tuple(k for k in (0, 1) if k not in kept)
    test_losses.assert_near(results[0][0], terms.sum(gone) / by, dtype, (1 + np.abs(terms).sum(gone)) / by)
    by_value = factors.get("cotangent", np.ones(1)).reshape(rows if factors else 1, -1).astype("longdouble")
    for got, d in zip(results[0][1:], (di, dt), strict=True):
        if got is not None:
            zero = by_value == 0  # not read, or left out
            test_losses.assert_near(got, np.where(zero, 0, d * by_value) / by, dtype, 32 / by)  # logarithms of some 10
    return collections.Counter([f"loss {' '.join(named)}", f"dtype {dtype}", f"classes {bucket(n)}"])


# ---- estimators ------------------------------------------------------------------------------------------------------


def check_estimate(rng):
    """One call of klcore.kl_estimate, against its formulas in 60 digits; and in other layouts, by its bits."""

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    shape = pick((), (0,), (1,), (7,), (5, 6), (2, 1, 9), (3000,), (40, 90))
    kind, dtypes = pick(*ESTIMATORS), [pick("float64", "float32", "float32", "float16", "bfloat16", "int32")] * 2
    if rng.random() < 0.2:
        dtypes[1] = pick(*DTYPES)
    double = any(DTYPES[d].itemsize == 8 or DTYPES[d].kind in "iub" for d in dtypes)
    sizes = 10 ** rng.uniform(-12, rng.choice([0, 2, 4]), shape)
    x = (rng.exponential(3.0, shape) * rng.choice([-1, 0], shape)).astype(DTYPES[dtypes[0]])
    y = (x.astype("f8") + sizes * rng.choice([-1, 1], shape)).astype(DTYPES[dtypes[1]])

    def thinned(a):  # of which copies are made
        a = a[tuple(slice(0, 1) if rng.random() < 0.2 else slice(None) for _ in a.shape)]
        return a[0] if a.ndim and a.shape[0] == 1 and rng.random() < 0.5 else a

    x, y = pick((x, y), (x, y), (thinned(x), y), (x, thinned(y)))
    batch = np.broadcast_shapes(x.shape, y.shape)
    like = np.zeros(batch)
    weights = (
        thinned(rng.choice([0, 1, 0.3, 5], like.shape)).astype(pick("f8", "f4", "?")) if rng.random() < 0.5 else None
    )
    ratio = thinned(rng.choice([0, 1, 1.3, 20], like.shape)).astype(pick("f8", "f4")) if rng.random() < 0.5 else None
    reduction, limit = pick("none", "sum", "mean"), pick(None, None, 0.5, 20.0, 1e-3)
    base = pick(None, None, 2, 1.5)
    denominator = pick(None, 3, np.array(0.7)) if reduction == "sum" else None
    wanted = pick(None, "x", "y", ("x", "y"))
    options = {"kind": kind, "limit": limit, "reduction": reduction, "base": base, "denominator": denominator}
    memory, results = Memory(rng), []
    sets = [name for name, usable in _cpu.instruction_sets().items() if usable]
    for lay, threads in ((memory.lay, 2), (lambda a: a, pick(1, 5))):
        _cpu.use_instruction_set(pick(*sets))
        arrays = {"weights": None if weights is None else lay(weights), "ratio": None if ratio is None else lay(ratio)}
        with klcore.threads(threads):
            results.append(klcore.kl_estimate(lay(x), lay(y), **arrays, **options, return_grad=("x", "y")))
    memory.check()
    for k, (a, b) in enumerate(zip(*results, strict=True)):
        same(a, b, f"result {k} in another layout")
    got = results[0]
    some = klcore.kl_estimate(x, y, weights=weights, ratio=ratio, **options, return_grad=wanted)
    some = some if wanted else (some,)
    for k, name in enumerate(("", *(wanted or ()))):
        same(some[k], got[1 + "xy".index(name) if name else 0], f"d{name} alone")
    value_dtype = np.dtype("f8" if double else "f4")
    assert [(a.shape, a.dtype) for a in got] == [
        (batch if reduction == "none" else (), value_dtype),
        (x.shape, gradient_dtype(x)),
        (y.shape, gradient_dtype(y)),
    ]
    words = [f"estimator {kind}", f"reduction {reduction}", *(f"dtype {d}" for d in dtypes)]
    if like.size > 300:
        return collections.Counter(words)
    w = np.broadcast_to(1.0 if weights is None else weights.astype("f8"), batch)
    by = w * (1.0 if ratio is None else ratio.astype("f8"))
    unit = 1.0 if base is None else 1 / np.log(base)
    r = np.broadcast_to(y.astype(value_dtype) - x.astype(value_dtype), batch)  # rounded as it is said to be
    clipped = r if limit is None else np.clip(r, -value_dtype.type(limit), value_dtype.type(limit))
    exact = [test_estimate.true(kind, v) for v in clipped.ravel()]
    value, slope = (np.array([float(e[k]) for e in exact]).reshape(batch) * unit for k in (0, 1))
    slope = np.where(np.abs(r) > (np.inf if limit is None else limit), 0, slope)
    with np.errstate(all="ignore"):
        value, slope = (np.where(by == 0, 0, v * by) for v in (value, slope))
        d = {"none": 1.0, "sum": 1.0 if denominator is None else float(denominator)}
        d = np.float64(d.get(reduction, like.size if weights is None else w.sum()))
        if not d:
            assert all(np.isnan(a).all() or not np.any(a) for a in got)
            return collections.Counter(words)
        expected = value if reduction == "none" else value.sum() / d
        size = np.abs(value) if reduction == "none" else np.abs(value).sum() / d
        near(got[0], expected, 6 * size, value_dtype, "value", like.size, False)
        for a, sign, g in zip((x, y), (-1, 1), got[1:], strict=True):
            gone = tuple(range(len(batch) - a.ndim))
            gone += tuple(k + len(gone) for k in range(a.ndim) if a.shape[k] != batch[k + len(gone)])
            near(g, (sign * slope / d).sum(gone).reshape(a.shape), 6 * np.abs(slope / d).sum(gone).reshape(a.shape),
                 gradient_dtype(a), "gradient", like.size, False)  # fmt: skip
    return collections.Counter([*words, *["tokens judged"] * like.size])


def check_lists(rng):
    """One call in which x lists classes of y: in other layouts, orders and threads by its bits, and for ordinary
    numbers against the dense call of K + 1 classes that NumPy computes."""

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    name, tail = pick(*LISTING), pick(*_cpu.TAILS)
    n = int(pick(1, 2, 17, 128, 129, 1023, 1024, 1025, 3000, rng.integers(1, 9000)))
    count, batch = int(pick(0, 1, n, rng.integers(0, min(n, 60) + 1))), pick((), (0,), (1,), (3,), (2, 3), (70,))
    spaces = pick("log_probs", "probs", *(["logits", "counts"] if tail == "renorm" else [])), pick(*_cpu.SPACES)
    dtypes = [pick("float64", "float32", "float32", "float16", "bfloat16") for _ in "xy"]
    indices = rng.permuted(np.broadcast_to(np.arange(n), (*batch, n)), axis=-1)[..., :count].copy()
    ordinary = rng.random() < 0.7
    if not ordinary and count:  # twice, and absent
        indices[rng.random(indices.shape) < 0.2] = -1
        indices = np.where(rng.random(indices.shape) < 0.2, indices[..., :1], indices)
    spread = pick(0.1, 3, 30)
    logs = [spread * rng.normal(size=(*batch, k)) for k in (count, n)]
    if not ordinary:
        logs = [np.where(rng.random(a.shape) < 0.05, pick(-np.inf, np.nan, -1e4), a) for a in logs]
    with np.errstate(all="ignore"):
        logs[0] = logs[0] - np.logaddexp.reduce(logs[0], -1, keepdims=True, initial=0.0)  # some mass is left
        if spaces[1] in ("log_probs", "probs"):
            logs[1] = logs[1] - np.logaddexp.reduce(logs[1], -1, keepdims=True)
        x, y = (
            (a if "log" in space else np.exp(a)).astype(DTYPES[dtype])
            for a, space, dtype in zip(logs, spaces, dtypes, strict=True)
        )
    mass = rng.uniform(0, 1, batch) if tail == "bucket" and rng.random() < 0.5 else None
    weights = rng.choice([0, 1, 0.3], batch) if rng.random() < 0.4 else None
    temperature = pick(1.0, 2.5, rng.uniform(0.5, 4, batch)) if "logits" in spaces else 1.0
    options = {"tail": tail, "space": spaces, "reduction": pick("row", "none", "sum", "rowmean", "batchmean", "mean")}
    memory, results = Memory(rng), []
    sets = [isa for isa, usable in _cpu.instruction_sets().items() if usable]
    order = rng.permuted(np.broadcast_to(np.arange(count), (*batch, count)), axis=-1)
    for lay, threads in ((memory.lay, 2), (lambda a: a, pick(1, 5))):
        _cpu.use_instruction_set(pick(*sets))
        turned = order if lay == memory.lay else np.broadcast_to(np.arange(count), order.shape)
        a, i = np.take_along_axis(x, turned, -1), np.take_along_axis(indices, turned, -1).astype(pick("i2", "i4", "i8"))
        more = {"weights": weights, "tail_mass": mass, "temperature": temperature}
        more = {k: lay(v) if isinstance(v, np.ndarray) else v for k, v in more.items()}
        with klcore.threads(threads):
            value, dx, dy = klcore.__dict__[name](
                lay(a), lay(y), indices=lay(i), return_grad=("x", "y"), **options, **more
            )
        back = np.argsort(turned, -1)
        if options["reduction"] == "none":
            terms = np.take_along_axis(value[..., :count], back, -1)
            terms = terms if ordinary else np.sort(terms, -1)  # the term of equal numbers may be at any of them
            value = np.append(terms, value[..., count:], -1)
        results.append((value, np.take_along_axis(dx, back, -1), dy))
    memory.check()
    for k, (a, b) in enumerate(zip(*results, strict=True)):
        same(a, b, f"result {k} in another layout or order")
    words = [f"listing {name}", f"tail {tail}", f"reduction {options['reduction']}", *(f"dtype {d}" for d in dtypes)]
    if not ordinary or options["reduction"] != "row" or spread > 3 or math.prod(batch) == 0 or count == 0:
        return collections.Counter(words)
    by = np.asarray(temperature)[..., None]
    a, b = (v.astype("f8") / (by if space == "logits" else 1) for v, space in zip((x, y), spaces, strict=True))
    p, q = (np.exp(v) if "log" in space else v for v, space in zip((a, b), spaces, strict=True))
    q = q / q.sum(-1, keepdims=True) if spaces[1] in ("logits", "counts") else q
    listed = np.take_along_axis(q, indices, -1)
    if tail == "renorm":
        p, listed = p / p.sum(-1, keepdims=True), listed / listed.sum(-1, keepdims=True)
    else:
        np.put_along_axis(q, indices, 0, -1)
        left = np.clip(1 - p.sum(-1), 0, None) if mass is None else mass
        left = 0 * left if tail == "zero" or count == n else left
        p, listed = np.append(p, left[..., None], -1), np.append(listed, q.sum(-1, keepdims=True), -1)
    expected = getattr(klcore, name)(p, listed, weights=weights)
    with np.errstate(invalid="ignore"):
        size = np.abs(expected) + (1.0 if name == "rel_entr" else 0)
        assert (np.isclose(value, expected, rtol=1e-4, atol=1e-7) | (np.abs(value - expected) <= 1e-4 * size)).all()
    return collections.Counter([*words, *["rows of lists judged"] * math.prod(batch)])


# ---- all of them -----------------------------------------------------------------------------------------------------


def bucket(n):
    return next((f"to {top}" for top in (0, 1, 16, 128, 1023, 1024, 5120) if n <= top), "more")


def one(seed, call, note=lambda p: None):
    """Draw a call and make it; returns what to count."""
    rng = np.random.default_rng([seed, call])
    if call % 8 == 7:
        note("a loss of klcore.compat")
        return check_loss(rng)
    if call % 8 == 3:
        note("klcore.kl_estimate")
        return check_estimate(rng)
    if call % 8 == 5:
        note("a call with indices")
        return check_lists(rng)
    p = draw(rng)
    note(p)
    seen = collections.Counter(check(p, rng))
    for word in ("operation", "reduction", "kind", "shape", "threads", "weights", "out", "grad", "broadcast"):
        seen[f"{word} {p[word]}"] += 1
    seen[f"space {' '.join(p['space'])}"] += 1
    seen[f"dtypes {' '.join(sorted(set(p['dtypes'])))}"] += 1
    first, axis = -1 - len(p["batch"]), p["axis"]
    seen[f"classes {bucket(p['n'])}"] += 1
    seen[f"rows {bucket(math.prod(p['batch']))}"] += 1
    seen[f"axis {'last' if axis == -1 else 'first' if axis == first else 'middle'}"] += 1
    return seen


def run(args):
    """Make calls until the time is over; returns 0, or 1 at the first failure."""
    if args.sanitized:
        assert os.path.realpath(klcore.__file__).startswith(os.path.realpath(args.sanitized)), klcore.__file__
    start, seen, done = time.monotonic(), collections.Counter(), 0
    asked = [""]  # the current call

    def note(p):
        asked[0] = f"call {call} of seed {args.seed}: {p}\nagain: make fuzz SEED={args.seed} CALL={call}"
        if args.note is not None:
            os.pwrite(args.note, asked[0].encode() + b"\0", 0)

    for call in itertools.count() if args.call is None else (args.call,):
        if args.call is None and time.monotonic() - start > args.seconds:
            break
        try:
            seen += one(args.seed, call, note)
        except Exception:
            traceback.print_exc()
            print(f"\nfailed after {done} others: {asked[0]}", file=sys.stderr)
            return 1
        done += 1
    for word, group in itertools.groupby(sorted(seen.items()), lambda item: item[0].partition(" ")[0]):
        print(f"{word}: " + ", ".join(f"{name.partition(' ')[2]} {count}" for name, count in group))
    print(f"{done} calls in {time.monotonic() - start:.0f} s, seed {args.seed}")
    return 0


def sanitized(args):
    """Run this file again, with gcc's sanitizers preloaded; reports which call they stopped."""
    libraries = [
        subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    # fresh memory holds NaN, so that reading it before writing shows in the results
    fill = "max_malloc_fill_size=1000000000:malloc_fill_byte=255"
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": f"exitcode=2:detect_leaks=0:detect_stack_use_after_return=1:{fill}",
        "UBSAN_OPTIONS": "exitcode=2:print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([os.path.abspath(args.sanitized), os.environ.get("PYTHONPATH", "")]),
    }
    with tempfile.TemporaryFile() as note:
        fd = note.fileno()
        done = subprocess.run([sys.executable, *sys.argv, f"--note={fd}"], env=environment, pass_fds=[fd])
        if done.returncode not in (0, 1):
            print("\nstopped in", os.pread(fd, 1 << 16, 0).split(b"\0")[0].decode(), file=sys.stderr)
        return min(abs(done.returncode), 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--call", type=int, help="this one call only")
    parser.add_argument("--sanitized", metavar="DIRECTORY", help="where setup.py built klcore with KLCORE_SANITIZE")
    parser.add_argument("--note", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    return sanitized(args) if args.sanitized and args.note is None else run(args)


if __name__ == "__main__":
    sys.exit(main())
