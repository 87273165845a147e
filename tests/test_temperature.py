"""One temperature per row: the bits of each row computed alone with its temperature, however it is computed.

A single row gets its temperature as a float, which takes another path through the kernels than an array. mpmath gives
the expected results, here for a few rows; the tests of each operation check the rest.
"""

import functools
import importlib
import itertools

import numpy as np
import oracle
import pytest
from conftest import DTYPES, OF_TWO, call
from scipy.special import log_softmax
from test_few import as_bits, numbers

import klcore
from klcore import _cpu
from klcore.operations import OPERATIONS

LENGTHS = (1, 5, 40, 129, 2049)
WARMTHS = np.array([1.0, 0.5, 2.5, 0.07, 17.0, 1.0, 100.0])


def temperatures(rows):
    return np.resize(WARMTHS, rows)


def tempered(operation):
    """Pairs of spaces that take a temperature."""
    return [pair for pair in OPERATIONS[operation].pairs if "logits" in pair]


def arguments(operation, pair, n, dtype, rows):
    sides = len(OPERATIONS[operation].gradients)
    return [numbers(n, space, DTYPES[dtype], side)[:rows] for side, space in enumerate(pair[:sides])]


def compute(operation, arrays, space, **options):
    """Value, gradients and, for operations that have them, terms."""
    f = functools.partial(call, operation, arrays[0], arrays[-1], space, **options)
    found = f(return_grad=OPERATIONS[operation].gradients)
    return (*found, f(reduction="none")) if OPERATIONS[operation].has_terms else found


def assert_same(found, expected, *about):
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_array_equal(as_bits(np.asarray(a)), as_bits(np.asarray(b)), f"{about} result {k}")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_has_the_bits_of_its_number(operation, dtype):
    for n, pair in itertools.product(LENGTHS, tempered(operation)):
        rows = 14 if n < 2000 else 5
        arrays, t = arguments(operation, pair, n, dtype, rows), temperatures(rows)
        found = compute(operation, arrays, pair, temperature=t)
        for r in range(rows):
            alone = compute(operation, [a[r] for a in arrays], pair, temperature=float(t[r]))
            assert_same([a[r] for a in found], alone, pair, n, r)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("isa", [name for name, supported in _cpu.instruction_sets().items() if supported])
def test_on_each_instruction_set(operation, isa):
    chosen = _cpu.instruction_set()
    for (n, pair), dtype in itertools.product([(5, tempered(operation)[-1]), (1030, tempered(operation)[0])], DTYPES):
        arrays, t = arguments(operation, pair, n, dtype, 9), temperatures(9)
        expected = compute(operation, arrays, pair, temperature=t)
        _cpu.use_instruction_set(isa)
        try:
            assert_same(compute(operation, arrays, pair, temperature=t), expected, pair, n, dtype)
        finally:
            _cpu.use_instruction_set(chosen)


@pytest.mark.parametrize("space", [("logits", "logits"), ("probs", "logits"), ("logits", "log_probs")], ids="/".join)
@pytest.mark.parametrize("operation", [name for name in OF_TWO if name in oracle.OPERATIONS])
def test_near_the_exact_answer(operation, space):
    rng = np.random.default_rng(5)
    logs = [log_softmax(rng.normal(size=(7, 12)), axis=-1) for _ in "xy"]
    x, y = (np.exp(a) if s == "probs" else a for a, s in zip(logs, space, strict=True))
    found = call(operation, x, y, space, temperature=WARMTHS, return_grad=("x", "y"))
    for r, t in enumerate(WARMTHS):
        true = oracle.exact(operation, x[r : r + 1], y[r : r + 1], space, float(t))
        for a, b in zip(found, (true.value, true.dx, true.dy), strict=True):
            np.testing.assert_allclose(a[r], b[0], rtol=1e-12, atol=1e-14)


# ---- where arrays lie, and what they hold ----------------------------------------------------------------------------


def logits(n, dtype, rows):
    return arguments("kl_div", ("logits", "logits"), n, dtype, rows)


def kl(x, y, **options):
    return klcore.kl_div(x, y, space="logits", return_grad=("x", "y"), **options)


@pytest.mark.parametrize("kind", [*DTYPES, "int64", "uint8", "bool", ">f8"])
def test_any_dtype(kind):
    """Its numbers, as doubles, are what matters."""
    t = np.array([1, 2, 3, 1, 1, 1]) if kind != "bool" else np.ones(6)
    t = (t / 3 if kind in DTYPES else t).astype(DTYPES.get(kind, kind))
    for n, dtype in itertools.product((10, 200), ("float64", "float32")):
        x, y = logits(n, dtype, 6)
        found = kl(x, y, temperature=t)
        assert_same(found, kl(x, y, temperature=t.astype("f8")))
        assert_same([a[1] for a in found], kl(x[1], y[1], temperature=float(t[1])))


@pytest.mark.parametrize("shape", [(3, 4), (4,), (3, 1), (1, 1), (1,)], ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("n", [6, 150])
def test_broadcast_and_strided(shape, axis, n):
    x, y = (np.moveaxis(a.reshape(3, 4, n), -1, axis) for a in logits(n, "float32", 12))
    wide = np.full([2 * size for size in shape], np.nan)
    t = wide[(slice(None, None, -2),) * len(shape)]
    t[...] = temperatures(t.size).reshape(shape)
    weights, each = np.array([1.0, 0.5, 0.0, 2.0]), np.broadcast_to(t, (3, 4))
    value, dx, dy = kl(x, y, axis=axis, weights=weights, temperature=t)
    for i, j in np.ndindex(3, 4):
        at = tuple(np.insert(np.array([i, j], object), axis, slice(None)))
        alone = kl(x[at], y[at], weights=weights[j], temperature=float(each[i, j]))
        assert_same((value[i, j], dx[at], dy[at]), alone, i, j)


def test_no_dimensions():
    """A number at which float32 may be computed in double."""
    x, y = logits(10, "float32", 6)
    for number, kind in itertools.product((2.5, 1e-9, 1e35), (np.array, np.float64, np.float32)):
        assert_same(kl(x, y, temperature=kind(number)), kl(x, y, temperature=float(kind(number))))


@pytest.mark.parametrize("kind", ["list", "tuple", "pandas.Series", "xarray.DataArray", "torch.tensor"])
def test_other_containers(kind):
    x, y = logits(10, "float32", 6)
    library, _, name = kind.rpartition(".")
    given = WARMTHS[:6].tolist()
    made = getattr(pytest.importorskip(library or "builtins", reason=f"{library} is not installed"), name)(given)
    assert_same(kl(x, y, temperature=made), kl(x, y, temperature=np.array(given, "f4" if library == "torch" else "f8")))


def test_labels():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    x, y = (pandas.DataFrame(a) for a in logits(10, "float32", 3))
    t = pandas.Series([1.0, 2.0, 3.0], index=[2, 0, 1])
    with pytest.raises(ValueError, match="axis 0 of temperature have different labels"):
        kl(x, y, temperature=t)
    with pytest.raises(TypeError, match="axis 0 of temperature"):
        kl(x.to_numpy(), y.to_numpy(), temperature=t)


# ---- totals, summed gradients, threads -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [7, 300])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_totals(operation, n):
    x, y = (np.resize(numbers(n, "logits", DTYPES["float64"], side)[[0, 12, 13, 14]], (2100, n)) for side in (0, 1))
    t, w = temperatures(2100), np.resize([1.0, 0.25, 0.0, 3.0, 1.5], 2100)
    f = functools.partial(call, operation, x, y, "logits", temperature=t, weights=w)
    values, dx, *_ = f(return_grad=OPERATIONS[operation].gradients)
    total = _cpu.add_up(values.copy())
    for reduction, divisor in (("sum", 1), ("rowmean", _cpu.add_up(w.copy())), ("batchmean", 2100), ("mean", 2100 * n)):
        value, gradient = f(reduction=reduction, return_grad="x")
        assert value == total / divisor
        np.testing.assert_allclose(gradient, dx / divisor, rtol=1e-14)


@pytest.mark.parametrize("rows", [5, 1500])
@pytest.mark.parametrize(("operation", "side"), [(o, side) for o in OF_TWO for side in (0, 1)])
def test_gradients_that_are_summed(operation, side, rows):
    """Row by row in blocks of 1024, then the blocks."""
    arrays = [np.resize(numbers(9, "logits", DTYPES["float64"], k)[[0, 2, 4, 12, 13]], (rows, 9)) for k in (0, 1)]
    arrays[side] = arrays[side][0]
    t, w, of = temperatures(rows), np.resize([1.0, 0.5, 0.0], rows), "xy"[side]
    f = functools.partial(call, operation, space="logits", weights=w, return_grad=of)
    _, found = f(*arrays, temperature=t)
    expected = np.zeros(9)
    for first in range(0, rows, 1024):
        block = np.zeros(9)
        for r in range(first, min(rows, first + 1024)):
            row = [a if a.ndim == 1 else a[r] for a in arrays]
            block += f(*row, temperature=float(t[r]), weights=w[r])[1]
        expected += block
    assert_same([found], [expected])


@pytest.mark.parametrize(("rows", "n"), [(2700, 17), (360, 129), (48, 1025), (2, 20 * 1024 + 1)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_number_of_threads(operation, rows, n):
    pair = tempered(operation)[0]
    arrays = [np.resize(a, (rows, n)) for a in arguments(operation, pair, n, "float32", 4)]
    found = []
    for count in (1, 2, 5):
        with klcore.threads(count):
            found.append(compute(operation, arrays, pair, temperature=temperatures(rows)))
    for other in found[1:]:
        assert_same(found[0], other, operation)


# ---- what is refused -------------------------------------------------------------------------------------------------

F4 = np.zeros((2, 3), "float32")
REFUSED = {
    "shape": (np.ones(3), ValueError, "temperature of shape (3,) does not broadcast to the batch shape (2,)"),
    "two axes": (np.ones((1, 2)), ValueError, "temperature of shape (1, 2) does not broadcast"),
    "zero": ([1.0, 0.0], ValueError, "temperature must be positive and finite", "found 0.0 at index (1,)"),
    "negative": ([-1.0, -2.0], ValueError, "positive", "-1.0 at index (0,), and 1 more"),
    "NaN": ([np.nan, 1.0], ValueError, "positive and finite", "nan at index (0,)"),
    "infinite": ([np.inf, 1.0], ValueError, "positive and finite", "inf at index (0,)"),
    "inverse": ([2.0**-1024, 1.0], ValueError, "1 / temperature", "5.56"),
    "one for all": (np.array([0.0]), ValueError, "0.0 at index (0,), and 1 more"),
    "complex": (np.ones(2) + 0j, TypeError, "temperature has dtype complex128"),
    "text": (["a", "b"], TypeError, "temperature has dtype <U1"),
    "masked": (np.ma.ones(2), TypeError, "temperature is a masked array"),
    "low": ([2.0**-21, 1.0], ValueError, "between 2**-20 and 2**100", "pass x or y as float64"),
    "high": ([1.0, 2.0**101], ValueError, "between 2**-20 and 2**100", "index (1,)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    temperature, error, *words = REFUSED[case]
    out = np.full(2, 7.0, "float32")
    with pytest.raises(error) as raised:
        klcore.kl_div(F4, F4, space="logits", temperature=temperature, out=out)
    assert [word for word in words if word not in str(raised.value)] == [], str(raised.value)
    assert (out == 7).all()


def test_refused_without_logits():
    with pytest.raises(ValueError, match="it needs space='logits' for x or y; found an array"):
        klcore.kl_div(F4, F4, temperature=np.ones(2))


def test_doubles_have_no_such_bounds():
    x, y = logits(10, "float64", 6)
    t = np.array([1e-300, 1e-30, 2.0**-1023, 1e30, 1e300, 1.7e308])
    found = kl(x, y, temperature=t)
    for r in range(6):
        assert_same([a[r] for a in found], kl(x[r], y[r], temperature=float(t[r])), r)


def test_that_of_a_row_without_weight_is_not_looked_at():
    x, y = np.random.default_rng(0).normal(size=(2, 3, 5))
    value, dx, dy = kl(x, y, temperature=[2.0, 0.0, np.nan], weights=[1.0, 0.0, 0.0])
    assert_same((value[0], dx[0], dy[0]), kl(x[0], y[0], temperature=2.0))
    assert not any(a[1:].any() for a in (value, dx, dy))


def test_results_may_not_be_written_over_it():
    x, y, t = *np.random.default_rng(0).normal(size=(2, 3, 5)), np.ones(3)
    with pytest.raises(ValueError, match="overlaps the memory of an input"):
        klcore.kl_div(x, y, space="logits", temperature=t, out=t)


# ---- on a GPU: test_cuda.py compares bits over all kernels -----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int32"])
@pytest.mark.parametrize("shape", [(), (1,), (6,)], ids=str)
def test_a_new_value_is_nothing_new_to_the_gpu(gpu, monkeypatch, shape, dtype):
    """Without dimensions, or one per row: the kernels read it in place."""
    x, y = logits(300, "float32", 6)
    arrays = [gpu.put(a) for a in (x, y)]
    t = (4 * np.resize(WARMTHS, shape) + 1).astype(dtype)
    kl(*arrays, temperature=gpu.put(t))
    monkeypatch.setattr(importlib.import_module("klcore.backends.cuda"), "prepare", None)
    for new in (t, t + t):
        found = kl(*arrays, temperature=gpu.put(new))
        assert_same(map(gpu.get, found), kl(x, y, temperature=np.broadcast_to(new, 6)), new)


@pytest.mark.parametrize("n", [5, 300, 5000])
def test_a_bad_one_makes_its_row_nan(gpu, n):
    x, y = (np.repeat(a, 8, axis=0) for a in logits(n, "float32", 1))
    t, w = np.array([1.0, 0.0, -1.0, np.nan, np.inf, 2.0**-21, 2.0**101, 0.0]), np.array([1.0] * 7 + [0.0])
    arrays = [gpu.put(a) for a in (x, y)]
    found = [gpu.get(a) for a in kl(*arrays, temperature=gpu.put(t), weights=gpu.put(w))]
    assert_same([a[0] for a in found], kl(x[0], y[0]))
    assert all(np.isnan(a[1:7]).all() for a in found)
    assert not any(a[7].any() for a in found)
    doubles = kl(*(a.astype("float64") for a in arrays), temperature=gpu.put(t))
    assert np.isnan(gpu.get(doubles[0])).tolist() == [False, True, True, True, True, False, False, True]


def test_what_the_host_holds_is_looked_at_for_the_gpu_too(gpu):
    x = gpu.put(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"temperature must be positive.*0.0 at index \(1,\)"):
        kl(x, x, temperature=np.array([1.0, 0.0]))


def test_results_may_not_be_written_over_that_of_the_gpu(gpu):
    x, t = gpu.put(np.zeros((2, 3))), gpu.put(np.ones(2))
    klcore.kl_div(x, x, space="logits", temperature=t, out=gpu.put(np.ones(2)))  # the call is cached from now on
    for _ in range(2):
        with pytest.raises(ValueError, match="overlaps the memory of an input"):
            klcore.kl_div(x, x, space="logits", temperature=t, out=t)
