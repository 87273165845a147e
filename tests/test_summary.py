"""klcore.Summary against exact fractions, sorted values and NumPy; no split, order or merge changes a bit."""

import importlib
import json
import math
import pickle
from fractions import Fraction

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import klcore
from klcore.normal import t_quantile

checked = settings(max_examples=100, deadline=None, derandomize=True)
ORDER = oracle.TOLERANCES["order statistic", "float32"]
ROUNDED = oracle.TOLERANCES["rounding", "float64 quotient"]

row_values = st.one_of(
    st.floats(0, 100, width=32),
    st.floats(0, 2.0**-120, width=32),
    st.floats(0, width=32, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1e-45, 3.4e38, math.inf, math.nan]),
)
signed_values = st.one_of(row_values, st.floats(-100, 100, width=32), st.just(-math.inf))


def fractions(values):
    return [Fraction(float(v)) for v in np.asarray(values, np.float32) if math.isfinite(v)]


def nearest(exact, found):
    """Whether `found` is `exact`, a fraction, rounded to float64."""
    return found == exact.numerator / exact.denominator


def order_statistics(values):
    return np.sort(np.array([v for v in np.asarray(values, np.float32) if math.isfinite(v)], np.float64))


# ---- figures ---------------------------------------------------------------------------------------------------------


@checked
@given(st.lists(signed_values, max_size=60))
def test_sums_are_exact(values):
    s = klcore.Summary(signed=True).update(values)
    exact = fractions(values)
    assert s.count == len(exact)
    assert s.n_nan == sum(map(math.isnan, values))
    assert s.n_inf == sum(map(math.isinf, values))
    assert nearest(sum(exact, Fraction(0)), s.sum)
    if not exact:
        assert all(map(math.isnan, (s.mean, s.min, s.max, s.rms, s.stderr(), s.quantile(0.5))))
        assert s.argmin is s.argmax is None
        return
    assert nearest(sum(exact) / len(exact), s.mean)
    mean_square = sum(v * v for v in exact) / len(exact)
    assert s.rms == math.sqrt(mean_square.numerator / mean_square.denominator)
    floats = np.asarray(values, np.float32)
    finite = np.isfinite(floats)
    assert s.argmin == int(np.where(finite, floats, np.inf).argmin()) or not finite.any()
    assert s.argmax == int(np.where(finite, floats, -np.inf).argmax())
    assert (s.min, s.max) == (floats[s.argmin], floats[s.argmax])


@checked
@given(st.lists(row_values, min_size=2, max_size=60))
def test_standard_error(values):
    exact = fractions(values)
    s = klcore.Summary().update(values)
    if len(exact) < 2:
        assert math.isnan(s.stderr())
        return
    n, mean = len(exact), sum(exact) / len(exact)
    square = sum((v - mean) ** 2 for v in exact) / (n - 1) / n
    assert s.stderr() == math.sqrt(square.numerator / square.denominator)


@checked
@given(st.lists(st.tuples(row_values, st.integers(-3, 4)), min_size=1, max_size=60))
def test_clustered_error(pairs):
    values, groups = map(list, zip(*pairs, strict=True))
    s = klcore.Summary().update(values, groups=groups)
    by_group = {}
    for value, group in pairs:
        if math.isfinite(value):
            by_group.setdefault(group, []).append(Fraction(float(np.float32(value))))
    n, k = sum(map(len, by_group.values())), len(by_group)
    assert s.n_groups == k
    if k < 2:
        assert math.isnan(s.stderr(cluster=True))
        return
    mean = sum(map(sum, by_group.values())) / n
    square = Fraction(k, k - 1) * sum((sum(g) - mean * len(g)) ** 2 for g in by_group.values()) / n**2
    assert s.stderr() == s.stderr(cluster=True) == math.sqrt(square.numerator / square.denominator)
    assert s.stderr(cluster=False) == klcore.Summary().update(values).stderr()


@checked
@given(st.lists(signed_values, min_size=1, max_size=80), st.lists(st.floats(0, 1), max_size=5))
def test_quantiles(values, fractions):
    ordered = order_statistics(values)
    if not ordered.size:
        return
    s = klcore.Summary(signed=True).update(values)
    assert (s.quantile(0), s.quantile(1)) == (ordered[0], ordered[-1])
    for f in fractions:
        at = (len(ordered) - 1) * f
        low = math.floor(at)
        ends = ordered[[low, min(low + 1, len(ordered) - 1)]]
        expected = np.quantile(ordered, f)
        # a bin's width; for subnormal numbers that of the smallest numbers' bins; and NumPy's own rounding
        bound = np.abs(ends).max() * (ORDER + 4 * ROUNDED) + 2.0**-136
        assert abs(s.quantile(f) - expected) <= bound
    assert s.quantile(np.array([[0.0, 1.0]])).shape == (1, 2)


def test_a_million_values():
    """Like the divergences of a text: far apart, and alike within a chunk of it."""
    values = 1_000_003
    rng = np.random.default_rng(2)
    groups = np.arange(values) // 512
    x = np.exp(rng.normal(-6, 1, values) + 0.8 * rng.normal(size=groups[-1] + 1)[groups]).astype(np.float32)
    s = klcore.Summary().update(x, groups=groups)
    assert s.mean == math.fsum(x.tolist()) / values
    assert s.stderr(False) == pytest.approx(x.astype(np.float64).std(ddof=1) / math.sqrt(values), rel=1e-12)
    sums = np.bincount(groups, weights=x.astype(np.float64))
    gaps = sums - s.mean * np.bincount(groups)
    k = len(sums)
    assert s.stderr() == pytest.approx(math.sqrt(k / (k - 1) * math.fsum(gaps**2)) / values, rel=1e-9)
    assert s.stderr() > 5 * s.stderr(False)
    q = np.array([0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999])
    np.testing.assert_allclose(s.quantile(q), np.quantile(x.astype(np.float64), q), rtol=ORDER)
    assert (s.argmin, s.argmax) == (x.argmin(), x.argmax())


def test_more_values_than_int64_would_hold():
    """2^60 times the same value, by doubling."""
    s = klcore.Summary().update([3.0e38, 1.0])
    for _ in range(60):
        s = s + s
    assert s.count == 2**61
    assert nearest((Fraction(float(np.float32(3e38))) + 1) / 2, s.mean)
    assert s.stderr() == pytest.approx(s.max / 2 / 2**30.5)


# ---- bits ------------------------------------------------------------------------------------------------------------


@checked
@given(st.lists(signed_values, max_size=60), st.randoms(use_true_random=False))
def test_no_split_order_or_merge_changes_anything(values, random):
    floats = np.array(values, np.float32)
    groups = np.arange(len(values)) // 7
    whole = klcore.Summary(signed=True).update(floats, groups=groups)
    cuts = sorted(random.randint(0, len(values)) for _ in range(4))
    bounds = list(zip([0, *cuts], [*cuts, len(values)], strict=True))
    random.shuffle(bounds)
    parts = [klcore.Summary(signed=True).update(floats[a:b], groups=groups[a:b], start=a) for a, b in bounds]
    while len(parts) > 1:
        left = parts.pop(random.randrange(len(parts)))
        parts.append(left + parts.pop(random.randrange(len(parts))))
    assert parts[0].to_dict() == whole.to_dict()
    again = klcore.Summary(signed=True)
    for a, b in bounds:
        again.update(floats[a:b], groups=groups[a:b], start=a)
    assert again == whole


def test_pieces_of_a_large_update():
    x = np.random.default_rng(3).random(700_001, np.float32)
    parts = [klcore.Summary().update(x[k::3][:, None]) for k in range(3)]
    assert sum(parts).sum == klcore.Summary().update(x).sum == math.fsum(x.tolist())


@checked
@given(st.lists(signed_values, max_size=40), st.booleans(), st.booleans())
def test_written_and_read_again(values, quantiles, grouped):
    groups = [k // 3 - 2 for k in range(len(values))] if grouped else None
    s = klcore.Summary(signed=True, quantiles=quantiles).update(values, groups=groups)
    assert klcore.Summary.from_dict(json.loads(json.dumps(s.to_dict(), allow_nan=False))) == s
    assert pickle.loads(pickle.dumps(s)) == s
    assert s + klcore.Summary(signed=True, quantiles=quantiles) == s


# ---- masks, groups, arrays -------------------------------------------------------------------------------------------


def test_a_mask_hides_everything():
    values = np.array([[0.5, -1.0], [math.nan, 2.0]])
    mask = np.array([[True, False], [False, True]])
    s = klcore.Summary().update(values, mask, [[7], [8]])
    assert (s.count, s.n_nan, s.mean, s.argmax, s.seen) == (2, 0, 1.25, 3, 4)
    assert s.n_groups == 2
    assert klcore.Summary().update(values, False).count == 0


@pytest.mark.parametrize("make", ["torch", "jax.numpy", "list", "float16", "bfloat16", "strict"])
def test_values_of_any_library(make):
    values = [0.5, 0.25, 4.0, math.inf]
    expected = klcore.Summary().update(np.array(values))
    if make == "list":
        found = values
    elif make == "torch":
        torch = pytest.importorskip(make)
        found = torch.tensor(values, requires_grad=True)
        assert klcore.Summary.of(torch.tensor(values, dtype=torch.bfloat16), torch.tensor([True] * 4)) == expected
    elif make == "jax.numpy":
        found = pytest.importorskip(make).asarray(values)
    elif make == "strict":
        found = pytest.importorskip("array_api_strict").asarray(values)
    else:
        dtype = make if make == "float16" else importlib.import_module("ml_dtypes").bfloat16
        found = np.array(values, dtype)
    assert klcore.Summary.of(found) == expected


def test_values_on_a_device(device):
    values = device.put(np.array([[0.5, 1.5]], np.float32))
    assert klcore.Summary.of(values, device.put(np.array([True, False]))).mean == 0.5


def test_integers_and_what_float32_does_not_hold():
    s = klcore.Summary().update(np.array([1, 2**24 + 1]))
    assert s.max == 2**24
    assert klcore.Summary().update([1e300]).n_inf == 1


@pytest.mark.parametrize("chunks", [(3, 4), (10, 2), (1, 9), (10, 9)])
def test_of_dask_arrays(chunks):
    da = pytest.importorskip("dask.array")
    rng = np.random.default_rng(4)
    x = rng.normal(size=(10, 9, 50)).astype(np.float32)
    y = x + 0.1 * rng.normal(size=x.shape).astype(np.float32)
    mask, groups = rng.random((10, 9)) < 0.8, np.arange(10)[:, None]
    rows = klcore.kl_div(x, y, space="logits")
    rows[3, 4] = math.nan
    lazy = klcore.kl_div(*(da.from_array(a, chunks=(*chunks, 50)) for a in (x, y)), space="logits")
    lazy = da.where(da.from_array(np.isnan(rows), chunks=-1), np.float32(math.nan), lazy)
    whole = klcore.Summary.of(rows, mask, groups)
    found = klcore.Summary.of(lazy, da.from_array(mask, chunks=4), groups)
    assert not isinstance(found, klcore.Summary)
    assert found.compute(scheduler="threads") == whole
    assert whole.argmax == np.where(mask, np.nan_to_num(rows), 0).argmax()


def test_dask_arrays_elsewhere():
    da = pytest.importorskip("dask.array")
    lazy = da.ones(4, chunks=2)
    with pytest.raises(TypeError, match=r"values is a dask array.*Summary\.of"):
        klcore.Summary().update(lazy)
    with pytest.raises(ValueError, match="compute_chunk_sizes"):
        klcore.Summary.of(lazy[lazy > 0])
    with pytest.raises(ValueError, match=r"weights of shape \(3,\) do not broadcast"):
        klcore.Summary.of(lazy, np.ones(3, bool))
    assert klcore.Summary.of(da.zeros((0, 3))).compute() == klcore.Summary()


# ---- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.5, 0.75, 0.95, 0.975, 0.9995])
def test_quantiles_of_student(probability):
    degrees = [*range(1, 130), 1000, 10**6]
    found = [t_quantile(probability, k) for k in degrees]
    np.testing.assert_allclose(found, stats.t.ppf(probability, degrees), rtol=1e-9, atol=1e-15)


def test_interval_of_the_mean():
    values, groups = [0.0, 1.0, 2.0, 5.0], [0, 0, 1, 2]
    plain = klcore.Summary().update(values)
    np.testing.assert_allclose(plain.interval(0.9), stats.norm.interval(0.9, plain.mean, plain.stderr()), rtol=1e-12)
    s = klcore.Summary().update(values, groups=groups)
    np.testing.assert_allclose(s.interval(0.9), stats.t.interval(0.9, 2, s.mean, s.stderr()), rtol=1e-9)
    assert s.interval(0.9, cluster=False) == plain.interval(0.9)
    assert all(map(math.isnan, klcore.Summary().update(1.0).interval()))


@pytest.mark.parametrize(("n", "f"), [(500, 0.5), (500, 0.95), (5000, 0.99)])
def test_interval_of_a_quantile(n, f):
    """It contains the true quantile about as often as it should: 400 times, so within 3 percent."""
    rng = np.random.default_rng(6)
    held = 0
    for _ in range(400):
        u = rng.random(n)
        low, high = klcore.Summary().update(u / (1 - u)).interval(0.9, quantile=f)
        held += low <= f / (1 - f) <= high
    assert 0.87 <= held / 400 <= 0.97


def test_interval_of_a_quantile_that_nothing_is_beyond():
    s = klcore.Summary().update(np.arange(1.0, 51.0))
    assert s.interval(quantile=0.999)[1] == math.inf
    assert s.interval(quantile=0.001)[0] == 0
    assert {type(end) for f in (0, 0.5, 1) for end in s.interval(quantile=f)} == {float}
    assert klcore.Summary(signed=True).update([1.0, 2.0]).interval(quantile=0.5) == (-math.inf, math.inf)


# ---- what raises -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([1.0, -0.5],), ValueError, "value -0.5 at position 2 is negative"),
        (([1.0 + 1j],), TypeError, "values has dtype complex128"),
        (([1.0], [1.0]), TypeError, "weights must be booleans"),
        (([1.0], [True, False]), ValueError, r"weights of shape \(2,\) do not broadcast"),
        (([1.0], None, [0.5]), TypeError, "groups must be integers"),
        ((np.ma.masked_array([1.0], [True]),), TypeError, "masked array"),
    ],
)
def test_what_raises_takes_nothing_in(arguments, error, words):
    s = klcore.Summary().update([2.0])
    before = s.copy()
    with pytest.raises(error, match=words):
        s.update(*arguments)
    assert s == before


def test_what_else_raises():
    s = klcore.Summary().update([1.0, 2.0], groups=[0, 1])
    s.update([3.0])
    with pytest.raises(ValueError, match="the group of every value"):
        s.stderr()
    assert s.stderr(cluster=False) > 0
    with pytest.raises(ValueError, match="of the same kind"):
        s.merge(klcore.Summary(quantiles=False))
    with pytest.raises(TypeError, match="must be a klcore"):
        s.merge(1)
    with pytest.raises(ValueError, match="keeps no histogram"):
        klcore.Summary(quantiles=False).quantile(0.5)
    for wrong in ({}, {"format": 1}, {**s.to_dict(), "sum": "x"}, {**s.to_dict(), "histogram": [[-9], [1, 2]]}):
        with pytest.raises(ValueError, match="not a dict of klcore"):
            klcore.Summary.from_dict(wrong)
    for call in (lambda: s.quantile(1.5), lambda: s.interval(1.0), lambda: s.interval(quantile=2)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            call()
    with pytest.raises(ValueError, match="start must be"):
        s.update([1.0], start=-1)
    with pytest.raises(TypeError, match="unhashable"):
        hash(s)
