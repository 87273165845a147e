"""Rows of few classes on the CPU, which src/kl_few.h computes in blocks: they have the bits of single rows.

Fewer than four rows are computed one by one, whatever their layout, so batches are compared with their rows in
threes.
"""

import functools
import itertools

import ml_dtypes
import numpy as np
import pytest
from conftest import call, some_pairs

import klcore
from klcore import _cpu
from klcore.operations import OPERATIONS

DTYPES = {name: np.dtype(name) for name in ("float64", "float32", "float16")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
SPACES = tuple(_cpu.SPACES)
LENGTHS = (*range(1, 34), 64, 65, 80, 127, 128)
ROWS = 70
KINDS = 16


def numbers(n, space, dtype, side):
    """Rows of all kinds in turn: ordinary ones, and those that a block's short forms cannot handle."""
    rng = np.random.default_rng((n, side))
    a = rng.normal(size=(ROWS, n)) + np.random.default_rng(n).normal(size=(ROWS, n))
    kind = np.arange(ROWS) % KINDS
    some = rng.random((ROWS, n)) < 0.3
    a[kind == 1] *= 200
    a[kind == 2] += 3e4
    a[(kind == 3) & (side == 0)] = 0.0
    a[kind == 4] = np.where(rng.random((ROWS, n)) < 0.5, 0.0, -0.0)[kind == 4]
    if space in ("probs", "counts"):
        a = np.exp(a - a.max(axis=1, keepdims=True)) / n
        a[(kind == 5)[:, None] & some] = 0
        a[(kind == 7) & (side == 0), 0] = -1
    else:
        a = a - np.log(n) - 2 if space == "log_probs" else a
        a[((kind == 5) | ((kind == 6) & (side == 1)))[:, None] & some] = -np.inf
        a[kind == 7] = -np.inf
        a[(kind == 8) & (side == 0), 0] = -1e9
    a[(kind == 9) & (side == 0), -1] = np.nan
    a[(kind == 10) & (side == 1), 0] = np.nan
    a[(kind == 11) & (side == 0), -1] = np.inf
    with np.errstate(over="ignore"):
        return a.astype(dtype)


def last(a):
    return a, -1


def first(a):
    return np.ascontiguousarray(a.T), 0


def middle(a):
    return np.ascontiguousarray(np.moveaxis(a.reshape(2, len(a) // 2, -1), 2, 1)), 1


def padded(a):
    wide = np.full((len(a), a.shape[1] + 3), 9, a.dtype)
    wide[:, 1:-2] = a
    return wide[:, 1:-2], -1


def strided(a):
    wide = np.full((3 * len(a), 2 * a.shape[1]), 9, a.dtype)
    wide[::-3, ::-2] = a
    return wide[::-3, ::-2], -1


LAYOUTS = (last, first, middle, padded, strided)


def compute(operation, arrays, space, axis, **arguments):
    f = functools.partial(call, operation, arrays[0], arrays[-1], space, axis=axis, **arguments)
    with_gradients = f(return_grad=OPERATIONS[operation].gradients, reduction="row")
    return (*with_gradients, f(reduction="none")) if OPERATIONS[operation].has_terms else with_gradients


def in_rows(results, axis):
    """Values of shape (rows,), the others of shape (rows, n)."""
    value, *others = results
    n = others[0].shape[axis]
    return [value.reshape(-1), *(np.moveaxis(a, axis, -1).reshape(-1, n) for a in others)]


def as_bits(a):
    """One NaN for all: processors keep the first of two, and compilers choose which that is."""
    a = np.where(np.isnan(a), np.nan, a).astype(a.dtype)
    return np.ascontiguousarray(a).view(f"u{a.dtype.itemsize}")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_which_rows_are_in_blocks(operation):
    """From four rows on, and up to 128 classes, so that the tests below do compare two implementations."""
    code = OPERATIONS[operation].code
    for pair, wide in itertools.product(OPERATIONS[operation].pairs, (False, True)):
        codes = [SPACES.index(s) for s in pair]
        at_once = {(rows, n): _cpu.few_at_once(code, *codes, wide, rows, n) for rows in (3, 4) for n in (1, 128, 129)}
        assert [k for k, count in at_once.items() if count] == [(4, 1), (4, 128)]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_has_the_bits_of_its_rows(operation, layout, dtype):
    for k, (n, pair) in enumerate(itertools.product(LENGTHS, some_pairs(operation))):
        if (k + LAYOUTS.index(layout)) % 5 and (n, layout) != (10, last):
            continue  # each layout is tested for some
        rows = ROWS if k % 3 else 4 + 2 * (7 * k % 31)
        sides = len(OPERATIONS[operation].gradients)
        arrays = [numbers(n, s, DTYPES[dtype], side)[:rows] for side, s in enumerate(pair[:sides])]
        weights = None if k % 4 else np.array([1, 0, 0.5, 3])[np.arange(rows) % 4]
        temperature = 1.0 if "logits" not in pair or n % 2 else 0.7
        laid_out, axes = zip(*(layout(a) for a in arrays), strict=True)
        batch = weights if weights is None or layout is not middle else weights.reshape(2, -1)
        found = in_rows(compute(operation, laid_out, pair, axes[0], temperature=temperature, weights=batch), axes[0])
        for i in range(0, rows, 3):
            few = [a[i : i + 3] for a in arrays]
            w = None if weights is None else weights[i : i + 3]
            expected = compute(operation, few, pair, -1, temperature=temperature, weights=w)
            names = ("value", "dx", "dy", "terms") if sides == 2 else ("value", "dx", "terms")
            for name, a, b in zip(names[: len(found)], found, expected, strict=True):
                np.testing.assert_array_equal(
                    as_bits(a[i : i + 3]), as_bits(b), f"{name} {pair} {n=} rows {i}.. of {rows}"
                )


PARAMETERS = [("alpha_div", {"alpha": a}) for a in (-4.0, 0.0, 0.3, 1.0, 3.0, 30.0)]
PARAMETERS += [("renyi_div", {"alpha": a}) for a in (0.25, 1.0, 2.0, 30.0)]
PARAMETERS += [("js_div", {"beta": b, "scaled": b == 0.9}) for b in (1e-10, 0.1, 0.9, 1 - 2**-52)]
PARAMETERS += [("mixed_kl_div", {"forward": f}) for f in (0.0, 0.3, 1.0)]
PARAMETERS += [("skew_kl_div", {"alpha": a}) for a in (1e-3, 1 - 2**-52)]


@pytest.mark.parametrize("case", PARAMETERS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_block_of_every_parameter(case, dtype):
    """With weights that a factor of the gradient turns into 0."""
    operation, parameters = case
    for n, space in itertools.product((2, 10, 33), ("logits", "probs", "counts")):
        arrays = [numbers(n, space, DTYPES[dtype], side) for side in range(2)]
        weights = np.array([1, 0, 0.5, 5e-324, 1e-300])[np.arange(ROWS) % 5]
        f = functools.partial(call, operation, space=space, temperature=1.0 if space != "logits" else 0.9, **parameters)
        found = f(*arrays, weights=weights, return_grad=("x", "y"))
        for i in range(0, ROWS, 2):
            expected = f(*(a[i : i + 2] for a in arrays), weights=weights[i : i + 2], return_grad=("x", "y"))
            for name, a, b in zip(("value", "dx", "dy"), found, expected, strict=True):
                np.testing.assert_array_equal(as_bits(a[i : i + 2]), as_bits(b), f"{name} {space} {n=} rows {i}..")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("rows", [*range(1, 71, 3), 300, 1000])
def test_the_total_of_any_number_of_rows(operation, rows):
    """It is the sum of the rows' values, whichever of them the last block holds."""
    for n, space in itertools.product((2, 10, 33), SPACES):
        sides = len(OPERATIONS[operation].gradients)
        arrays = [np.resize(numbers(n, space, np.float64, side)[[0, 12, 13, 14]], (rows, n)) for side in range(sides)]
        f = functools.partial(getattr(klcore, operation), **OPERATIONS[operation].needed)
        each = f(*arrays, space=space)
        assert np.isfinite(each).all()
        np.testing.assert_array_equal(f(*arrays, space=space, reduction="sum"), _cpu.add_up(each.copy()))
