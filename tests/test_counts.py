"""space="counts": numbers that are divided by their sum as part of the computation, and of its derivative."""

import itertools

import mpmath
import numpy as np
import pytest
from conftest import COMMON, DTYPES, operands
from hypothesis import given
from hypothesis import strategies as st
from relatives import Definitions

import klcore
from klcore import _cpu
from klcore.operations import OPERATIONS

MP = mpmath.mp.clone()
MP.dps = 60
SPACES = ("counts", "probs", "log_probs", "logits")
PAIRS = [pair for pair in itertools.product(SPACES, SPACES) if "counts" in pair]
CALLS = [
    (name, pair) for name, o in OPERATIONS.items() for pair in PAIRS if not o.single or pair == ("counts", "counts")
]
# sums of terms of both signs, or that do not vanish where x and y agree
SIGNED = ("rel_entr", *(name for name, o in OPERATIONS.items() if o.form == _cpu.BY_COST))


def call(name, pair, arrays, **options):
    space = pair[0] if OPERATIONS[name].single else pair
    return getattr(klcore, name)(*operands(name, *arrays), space=space, **{**OPERATIONS[name].needed, **options})


def gradients(name):
    return OPERATIONS[name].gradients


def rows(pair, shape=(3, 7), seed=0, dtype="float64", far=1.0):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=shape) * 2
    logits = base, base + far * rng.normal(size=shape)

    def of(space, z):
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        found = {"logits": z, "probs": p, "log_probs": np.log(p), "counts": p * 1000}
        return found[space].astype(dtype)

    return tuple(of(space, z) for space, z in zip(pair, logits, strict=True))


# ---- the oracle ------------------------------------------------------------------------------------------------------


def side(space, row):
    numbers = [MP.mpf(float(v)) for v in row]
    if space == "probs":
        return numbers
    if space == "log_probs":
        return [MP.exp(v) for v in numbers]
    numbers = numbers if space == "counts" else [MP.exp(v) for v in numbers]
    return [v / MP.fsum(numbers) for v in numbers]


def exact(name, pair, x, y, options):
    """The value of one row and its derivatives, by central differences."""

    def of_row(p, q):
        of = getattr(Definitions(MP), name)
        if not OPERATIONS[name].has_terms:
            of = of(p, q, **options)
            return of.of_sum(MP.fsum(map(of.term, p, q)))
        return MP.fsum(of(*pair, **options) for pair in zip(p, q, strict=True))

    def value(x, y):
        return of_row(side(pair[0], x), side(pair[1], y))

    def derivative(k, i):
        arrays = [[MP.mpf(float(v)) for v in a] for a in (x, y)]
        step = MP.mpf(10) ** -25
        values = []
        for sign in (1, -1):
            moved = [list(a) for a in arrays]
            moved[k][i] += sign * step * max(abs(moved[k][i]), MP.mpf(10) ** -5)
            values.append(value_of(moved))
        return (values[0] - values[1]) / (2 * step * max(abs(arrays[k][i]), MP.mpf(10) ** -5))

    def value_of(arrays):
        return of_row(*map(side_of, pair, arrays))

    def side_of(space, numbers):
        if space == "probs":
            return numbers
        numbers = numbers if space == "counts" else [MP.exp(v) for v in numbers]
        return numbers if space == "log_probs" else [v / MP.fsum(numbers) for v in numbers]

    n = len(x)
    dx, dy = ([float(derivative(k, i)) for i in range(n)] for k in (0, 1))
    return float(value(x, y)), np.array(dx), np.array(dy)


# where some numbers are equal, total variation has no derivative
CASES = [
    (name, pair, dtype, far)
    for (name, pair), dtype, far in itertools.product(CALLS, ("float64", "float32", "bfloat16"), (1e-5, 1.0, 8.0))
    if name != "tv_dist" or far > 1e-3 or dtype == "float64"
]


@pytest.mark.parametrize(("name", "pair", "dtype", "far"), CASES)
def test_accuracy(name, pair, dtype, far):
    """The bounds of pairs of two spaces: the sum that normalises is rounded, and so are the parts of log q - log p."""
    x, y = rows(pair, (1, 7), dtype=DTYPES[dtype], far=far)
    value, *found = call(name, pair, (x, y), return_grad=gradients(name))
    true, dx, dy = exact(name, pair, x[0], y[0], OPERATIONS[name].needed)
    eps = np.finfo(np.float64).eps
    size = max(abs(true), 1.0) if name in SIGNED else abs(true)
    least = max(size, 1e-300)
    amplified = 1 / least if name == "tv_dist" else np.sqrt(2 / least)  # of first and of second order in q - p
    bound = 1e-13 + 80 * eps * amplified if dtype == "float64" else 4e-6
    assert abs(float(value[0]) - true) <= bound * size + 1e-50
    for got, expected in zip(found, (dx, dy), strict=False):
        size = np.abs(expected).sum()
        bound = 1e-11 * size + 80 * eps if dtype == "float64" else 2e-5 * size
        bound = 2**-8 * size if dtype == "bfloat16" else bound
        assert np.abs(got[0].astype(float) - expected).sum() <= bound + 1e-20


# ---- what numbers mean -----------------------------------------------------------------------------------------------

EXACT = np.array([[2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 4.0, 2.0]]), np.array([[1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 2.0, 2.0]])


@pytest.mark.parametrize("name", OPERATIONS)
def test_probabilities_that_are_exact(device, name):
    """Sums that are powers of two: the value is that of probabilities, zeros included, and the derivatives follow."""
    counts = EXACT
    probs = tuple(c / c.sum(-1, keepdims=True) for c in counts)
    wanted = gradients(name)
    of_counts = [device.get(a) for a in call(name, ("counts", "counts"), map(device.put, counts), return_grad=wanted)]
    of_probs = [device.get(a) for a in call(name, ("probs", "probs"), map(device.put, probs), return_grad=wanted)]
    np.testing.assert_allclose(of_counts[0], of_probs[0], rtol=2e-16)
    finite = np.isfinite(of_probs[0])
    sides = dict(zip("xy", zip(counts, probs, strict=True), strict=True))
    for of, got, g in zip(wanted, of_counts[1:], of_probs[1:], strict=True):
        c, p = sides[of]
        with np.errstate(invalid="ignore"):  # infinite rows, which are left out
            mean = np.where(p == 0, 0, p * g).sum(-1, keepdims=True)
            expected = (g - mean) / c.sum(-1, keepdims=True)
        np.testing.assert_allclose(got[finite], expected[finite], rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("times", [3.0, 1e-300, 1e300, 2.0**-1060])
def test_any_scale(device, name, times):
    """Also with sums that float64 cannot hold, and with tiny numbers."""
    x, y = (np.round(a) + 1 for a in rows(("counts", "counts")))
    x, y = (a / a.max() if times > 1 else a for a in (x, y))
    scaled = x * times * (1.7 if times == 1e300 else 1) * (1e8 if times == 1e300 else 1), y
    expected = call(name, ("counts", "counts"), (scaled[0] / scaled[0].max(), y))
    found = device.get(call(name, ("counts", "counts"), [device.put(a) for a in scaled]))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("bad", [-1.0, np.inf, np.nan, -np.inf])
@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_that_are_no_counts(device, name, bad):
    """Such a row is NaN, and so is a row of zeros; no other row is."""
    for spoil in ([bad], [0.0] * 7):
        for k in range(1 if OPERATIONS[name].single else 2):
            arrays = [a.copy() for a in rows(("counts", "counts"))]
            clean = call(name, ("counts", "counts"), arrays)
            arrays[k][1, : len(spoil)] = spoil
            value = device.get(call(name, ("counts", "counts"), [device.put(a) for a in arrays]))
            assert np.isnan(value).tolist() == [False, True, False]
            np.testing.assert_array_equal(value[[0, 2]], clean[[0, 2]])
            weights = device.put(np.array([1, 0, 1]))
            value, *found = call(
                name,
                ("counts", "counts"),
                [device.put(a) for a in arrays],
                weights=weights,
                return_grad=gradients(name),
            )
            assert device.get(value)[1] == 0
            assert all((device.get(g)[1] == 0).all() for g in found)


def test_integers_and_booleans():
    counts = np.array([[3, 0, 5], [1, 1, 1]])
    expected = klcore.entropy(counts / counts.sum(-1, keepdims=True))
    for a in (counts, counts.astype(np.uint8), counts.tolist(), counts.astype(np.int64)):
        np.testing.assert_allclose(klcore.entropy(a, space="counts"), expected, rtol=1e-15)
    np.testing.assert_allclose(klcore.entropy([True, True, False], space="counts"), np.log(2))
    bits = klcore.entropy(np.ones((2, 8)), space="counts", base=2)
    np.testing.assert_allclose(bits, 3)


def test_nothing():
    assert klcore.kl_div(np.ones((2, 0)), np.ones((2, 0)), space="counts").tolist() == [0, 0]
    assert klcore.kl_div(np.ones((0, 3)), np.ones((0, 3)), space="counts").shape == (0,)
    assert klcore.kl_div(3.0, 5.0, space="counts") == 0


@pytest.mark.parametrize("total", [1.0, 3.0, 49.0, 1e-310, 0.1, 1e305])
def test_one_class_that_has_them_all(device, total):
    """Its share is exactly 1, whatever is rounded."""
    x = device.put(np.array([[total, 0.0, 0.0]]))
    assert device.get(klcore.entropy(x, space="counts")) == 0
    y = device.put(np.array([[1.0, 0.0, 0.0]]))
    for name in ("kl_div", "tv_dist"):
        assert device.get(getattr(klcore, name)(x, y, space=("counts", "probs"))) == 0
    assert device.get(klcore.cross_entropy(y, x, space=("probs", "counts"))) == 0


def test_temperature():
    with pytest.raises(ValueError, match="temperature divides logits"):
        klcore.kl_div([1.0], [1.0], space="counts", temperature=2)
    x, y = rows(("counts", "logits"))
    expected = klcore.kl_div(x, y / 2, space=("counts", "logits"))
    np.testing.assert_allclose(klcore.kl_div(x, y, space=("counts", "logits"), temperature=2), expected, rtol=1e-14)


def test_message():
    with pytest.raises(ValueError, match="'probs', 'log_probs', 'logits', 'counts'"):
        klcore.kl_div([1.0], [1.0], space="count")


COUNTS = st.lists(st.floats(0, 1e6), min_size=5, max_size=5)


@given(COUNTS, COUNTS, st.sampled_from([name for name in OPERATIONS if name not in SIGNED]))
def test_never_negative(x, y, name):
    if any(x) and any(y):
        assert call(name, ("counts", "counts"), (np.array(x), np.array(y))) >= 0
        assert call(name, ("counts", "counts"), (np.array(x), np.array(x))) == 0


@given(COUNTS)
def test_derivatives_along_a_row_vanish(x):
    """The value does not depend on the scale: c . df/dc = 0."""
    x = np.array(x) + 0.5
    _, dx, dy = klcore.kl_div(x, x[::-1].copy(), space="counts", return_grad=("x", "y"))
    assert abs((x * dx).sum()) <= 1e-12 * (1 + np.abs(x * dx).sum())
    assert abs((x[::-1] * dy).sum()) <= 1e-12 * (1 + np.abs(x[::-1] * dy).sum())


# ---- the same bits ---------------------------------------------------------------------------------------------------


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.mark.parametrize("n", [7, 2100])
@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("name", COMMON)
def test_bits(device, name, dtype, n):
    for pair in (("counts", "counts"), ("counts", "logits"), ("probs", "counts")):
        if name != "kl_div" and pair != ("counts", "counts"):
            continue
        arrays = rows(pair, (6, n), dtype=DTYPES[dtype])
        options = {"return_grad": gradients(name)}
        with klcore.threads(1):
            expected = call(name, pair, arrays, **options)
        with klcore.threads(7):
            same(call(name, pair, arrays, **options), expected)
        for row in (0, 5):
            same(call(name, pair, [a[row] for a in arrays], **options), [e[row] for e in expected])
        turned = [np.ascontiguousarray(a.T) for a in arrays]
        found = call(name, pair, turned, axis=0, **options)
        same((found[0], *(g.T.copy() for g in found[1:])), expected)
        found = call(name, pair, [device.put(a) for a in arrays], **options)
        same([device.get(a) for a in found], expected)
        terms = call(name, pair, [device.put(a) for a in arrays], reduction="none")
        same([device.get(terms)], [call(name, pair, arrays, reduction="none")])


# ---- other libraries -------------------------------------------------------------------------------------------------


def test_pytorch():
    torch = pytest.importorskip("torch")
    x, y = (torch.from_numpy(a).requires_grad_() for a in rows(("counts", "counts")))
    for name in ("kl_div", "js_div"):
        assert torch.autograd.gradcheck(lambda a, b, n=name: getattr(klcore, n)(a, b, space="counts"), (x, y))
        assert torch.autograd.gradcheck(
            lambda a, b, n=name: getattr(klcore, n)(a, b, space="counts", reduction="none"), (x, y)
        )


def test_jax():
    jax = pytest.importorskip("jax")
    x, y = rows(("counts", "counts"), dtype="float32")
    dx = jax.grad(lambda a: klcore.kl_div(a, y, space="counts", reduction="sum"))(x)
    same([dx], klcore.kl_div(x, y, space="counts", reduction="sum", return_grad="x")[1:])


@pytest.mark.parametrize("chunks", [(2, 3000), (3, 1024)])
def test_dask(chunks):
    da = pytest.importorskip("dask.array")
    for pair in (("counts", "counts"), ("counts", "logits")):
        arrays = rows(pair, (3, 3000))
        lazy = [da.from_array(a, chunks) for a in arrays]
        found = klcore.kl_div(*lazy, space=pair, return_grad=("x", "y"))
        same([a.compute() for a in found], klcore.kl_div(*arrays, space=pair, return_grad=("x", "y")))
