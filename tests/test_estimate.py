"""klcore.kl_estimate: correct, in every dtype and library; what is unbiased; masks, limits, and what it refuses."""

import functools
import importlib

import mpmath
import numpy as np
import pytest
from conftest import DTYPES
from hypothesis import given
from hypothesis import strategies as st

import klcore

KINDS = ("k1", "k2", "k3")
BOTH = ("x", "y")
# relative, in units of the dtype's eps; the slope is d/dr
BOUNDS = {"k1": (0, 0), "k2": (1, 0), "k3": (4, 1)}


def true(kind, r):
    """Value and slope, in mpmath."""
    r = mpmath.mpf(float(r))
    with mpmath.workdps(60):
        return {"k1": (-r, mpmath.mpf(-1)), "k2": (r * r / 2, r), "k3": (mpmath.expm1(r) - r, mpmath.expm1(r))}[kind]


def simple(kind, x, y):
    """The formulas, for arrays of any library; in float64 they are accurate enough for these comparisons."""
    r = y - x
    if kind == "k3":
        expm1 = getattr(r, "expm1", None)
        return (expm1() if expm1 else np.expm1(r)) - r
    return -r if kind == "k1" else r * r / 2


def tokens(shape=(5, 7), seed=0, dtype="float64", apart=0.5):
    rng = np.random.default_rng(seed)
    x = -rng.exponential(2.0, shape)
    return x.astype(dtype), (x + apart * rng.normal(size=shape)).astype(dtype)


def close(found, expected, rtol=1e-12):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-300)


def equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert a.dtype == b.dtype


# ---- right -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_mpmath(device, kind, dtype):
    """From tiny numbers to where e^r overflows in float32, and on both sides of the switch between formulas."""
    near = np.array([0.33, 0.34, 0.3465, 0.35, 0.7, 1, 31.9, 32.1, 88])
    sizes = np.concatenate([10 ** np.random.default_rng(0).uniform(-12, 2, 300), near, np.nextafter(near, 0)])
    r = np.concatenate([sizes, -sizes]).astype(dtype)
    r = r[r <= 88]
    x = device.put(np.zeros_like(r))
    value, dx, dy = map(device.get, klcore.kl_estimate(x, device.put(r), kind=kind, return_grad=BOTH))
    assert value.dtype == dx.dtype == dy.dtype == dtype
    np.testing.assert_array_equal(dx, -dy)
    for found, part, bound in zip((value, dy), (0, 1), BOUNDS[kind], strict=True):
        for got, of in zip(found, r, strict=True):
            expected = true(kind, of)[part]
            assert abs(mpmath.mpf(float(got)) - expected) <= bound * np.finfo(dtype).eps * abs(expected), (of, got)


@pytest.mark.parametrize(
    "pair", [("float16", "float16"), ("bfloat16", "float32"), ("float32", "float64"), ("int64",) * 2]
)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind, pair):
    """r is computed in the wider dtype, at least float32; gradients have the dtype of their argument."""
    of = [DTYPES.get(name, np.dtype(name)) for name in pair]
    x, y = (np.round(8 * a).astype(d) for a, d in zip(tokens(), of, strict=True))
    value, dx, dy = klcore.kl_estimate(x, y, kind=kind, return_grad=BOTH)
    wide = np.dtype("float64" if "64" in "".join(pair) else "float32")
    assert (value.dtype, dx.dtype, dy.dtype) == (wide, *(np.dtype("float64") if d.kind == "i" else d for d in of))
    exact = simple(kind, x.astype("float64"), y.astype("float64"))
    close(value, exact, 1e-6 if wide == np.float32 else 1e-13)
    slope = {"k1": -np.ones_like(exact), "k2": (y.astype("f8") - x.astype("f8")), "k3": exact + (y - x)}[kind]
    close(dy.astype("float64"), slope, 1e-2 if of[1].itemsize == 2 else 1e-6)


def test_small_ones_are_precise_in_float32():
    r = np.float32([1e-6, -3e-6, 1e-4])
    close(klcore.kl_estimate(np.zeros_like(r), r), r.astype("f8") ** 2 / 2 + r.astype("f8") ** 3 / 6, 2e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_all_reductions_and_units(device, kind):
    x, y = tokens()
    rng = np.random.default_rng(1)
    ratio, weights = rng.uniform(0, 3, x.shape), rng.uniform(0, 2, x.shape)
    weights[0, 3] = 0
    put = device.put
    k = simple(kind, x, y)
    estimate = functools.partial(klcore.kl_estimate, put(x), put(y), kind=kind)
    get = device.get
    close(get(estimate()), k)
    close(get(estimate(base=2)), k / np.log(2))
    close(get(estimate(ratio=put(ratio))), ratio * k)
    close(get(estimate(ratio=put(ratio), weights=put(weights))), ratio * weights * k)
    close(get(estimate(reduction="sum")), k.sum())
    close(get(estimate(reduction="mean")), k.mean())
    close(get(estimate(reduction="mean", ratio=put(ratio))), (ratio * k).mean())
    close(get(estimate(reduction="mean", weights=put(weights))), (weights * k).sum() / weights.sum())
    of_all = (weights * ratio * k).sum()
    both = {"ratio": put(ratio), "weights": put(weights)}
    close(get(estimate(reduction="mean", **both)), of_all / weights.sum())
    close(get(estimate(reduction="sum", **both, denominator=4.0)), of_all / 4)
    close(get(estimate(reduction="sum", **both, denominator=put(np.array(4.0)))), of_all / 4)
    value, dy = estimate(reduction="mean", **both, base=2, return_grad="y")
    close(get(value), of_all / weights.sum() / np.log(2))
    slope = {"k1": -1.0, "k2": y - x, "k3": np.expm1(y - x)}[kind]
    close(get(dy), ratio * weights * slope / weights.sum() / np.log(2))


def test_weights_at_the_ends_of_the_range(device):
    x, y = tokens()
    k, weights = simple("k3", x, y), np.random.default_rng(1).uniform(1, 2, x.shape)
    for scale in (2.0**-1060, 2.0**1020):
        for ratio in (None, device.put(np.full(x.shape, 0.5))):
            found = klcore.kl_estimate(
                device.put(x), device.put(y), weights=device.put(weights * scale), ratio=ratio, reduction="mean"
            )
            expected = (weights * k).sum() / weights.sum() * (1 if ratio is None else 0.5)
            close(device.get(found), expected, 1e-3 if scale < 1 else 1e-12)


def test_everything_broadcasts(device):
    rng = np.random.default_rng(0)
    x, y = -rng.exponential(size=(4, 1, 3)), -rng.exponential(size=(5, 1))
    weights, ratio = rng.uniform(size=3), rng.uniform(size=(4, 1, 1))
    k, r = simple("k3", x, y), y - x
    arrays = {"weights": device.put(weights), "ratio": device.put(ratio), "return_grad": BOTH}
    value, dx, dy = map(device.get, klcore.kl_estimate(device.put(x), device.put(y), **arrays))
    close(value, weights * ratio * k)
    slope = weights * ratio * np.expm1(r)
    close(dx, -slope.sum(1, keepdims=True))
    close(dy, slope.sum((0, 2))[:, None])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4)])
def test_shapes(device, shape):
    x, y = tokens(shape)
    for reduction in ("none", "sum"):
        value, dx, dy = klcore.kl_estimate(device.put(x), device.put(y), reduction=reduction, return_grad=BOTH)
        assert value.shape == (shape if reduction == "none" else ())
        assert dx.shape == dy.shape == shape
        close(device.get(value), simple("k3", x, y) if reduction == "none" else simple("k3", x, y).sum())
    assert np.isnan(device.get(klcore.kl_estimate(device.put(x), device.put(y), reduction="mean"))) == (x.size == 0)


def test_out(device):
    x, y = map(device.put, tokens(dtype="float32"))
    expected = klcore.kl_estimate(x, y, return_grad=BOTH)
    out = tuple(device.xp.empty_like(x) for _ in range(3))
    found = klcore.kl_estimate(x, y, return_grad=BOTH, out=out)
    assert all(a is b for a, b in zip(found, out, strict=True))
    equal(map(device.get, found), list(map(device.get, expected)))
    with pytest.raises(ValueError, match="overlaps"):
        klcore.kl_estimate(x, y, return_grad="y", out=(None, y))


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_bits(device, kind, dtype):
    """Across threads, layouts and devices; twice on each, the second time with what was cached by the first."""
    x, y = tokens((70, 90), dtype=dtype, apart=10.0)
    rng = np.random.default_rng(2)
    mask, ratio = rng.uniform(size=x.shape) < 0.7, rng.uniform(size=x.shape).astype(dtype)
    for reduction in ("none", "sum", "mean"):
        for more in ({}, {"weights": mask}, {"weights": mask, "ratio": ratio, "limit": 20.0}, {"ratio": ratio[:1]}):
            options = {"kind": kind, "reduction": reduction, "return_grad": BOTH}
            with klcore.threads(1):
                expected = klcore.kl_estimate(x, y, **options, **more)
            there = {name: device.put(a) if isinstance(a, np.ndarray) else a for name, a in more.items()}
            for _ in range(2):
                found = klcore.kl_estimate(device.put(x), device.put(y), **options, **there)
                equal([np.asarray(device.get(a)) for a in found], expected)
            turned = [device.put(np.asfortranarray(a)) for a in (x, y)]
            equal([np.asarray(device.get(a)) for a in klcore.kl_estimate(*turned, **options, **there)], expected)
            with klcore.threads(5):
                equal(klcore.kl_estimate(x, y, **options, **more), expected)


def test_a_ratio_does_not_go_by_what_was_kept(device):
    """GPU calls are cached by their arrays; a call with a ratio is not the one without."""
    x, y = map(device.put, tokens())
    ratio = device.put(np.full((5, 7), 2.0))
    plain = device.get(klcore.kl_estimate(x, y))
    close(device.get(klcore.kl_estimate(x, y, ratio=ratio)), 2 * plain)
    close(device.get(klcore.kl_estimate(x, y)), plain)


# ---- the ends of the range -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_nan_from_finite_numbers(device, kind, dtype):
    """Not even where k3 is infinite, and a ratio or a weight is 0."""
    largest = np.finfo(dtype).max
    r = np.array([0, 88, 89, 711, 1e30, largest, -88, -746, -1e30, -largest, 1e-30, -1e-30], dtype)
    x = device.put(np.zeros_like(r))
    for more in ({}, {"ratio": np.zeros_like(r)}, {"weights": np.zeros_like(r)}, {"limit": 20.0}):
        there = {name: device.put(a) if isinstance(a, np.ndarray) else a for name, a in more.items()}
        value, dx, dy = map(device.get, klcore.kl_estimate(x, device.put(r), kind=kind, **there, return_grad=BOTH))
        assert not np.isnan([value, dx, dy]).any()
        if {"ratio", "weights"} & more.keys():
            assert not np.any([value, dx, dy])
        if not more and kind == "k3":
            far = r > (88.8 if dtype == "float32" else 709.9)
            assert np.isposinf(value[far]).all()
            assert np.isposinf(dy[far]).all()
            assert np.isfinite(value[~far]).all()


def test_infinite_log_probabilities(device):
    x, y = np.array([0.0, -np.inf, -np.inf]), np.array([-np.inf, 0.0, -np.inf])
    for kind, expected in (("k1", [np.inf, -np.inf]), ("k2", [np.inf, np.inf]), ("k3", [np.inf, np.inf])):
        value, dy = map(device.get, klcore.kl_estimate(device.put(x), device.put(y), kind=kind, return_grad="y"))
        np.testing.assert_array_equal(value, [*expected, np.nan])
        assert np.isnan(dy[2])


@pytest.mark.parametrize("kind", KINDS)
def test_limit(device, kind):
    """The value stays constant, and the gradient is 0 beyond the limit, but not at it."""
    r = np.array([0.5, 2.0, 2.5, 1e9, np.inf, np.nan])
    r = np.concatenate([r, -r])
    x = device.put(np.zeros_like(r))
    value, dx, dy = map(device.get, klcore.kl_estimate(x, device.put(r), kind=kind, limit=2, base=2, return_grad=BOTH))
    clipped = np.clip(r, -2, 2)
    close(value, simple(kind, 0, clipped) / np.log(2))
    slope = {"k1": -1 + 0 * clipped, "k2": clipped, "k3": np.expm1(clipped)}[kind]
    close(dy, np.where(np.abs(r) > 2, 0, slope) / np.log(2))
    np.testing.assert_array_equal(dx, 0 - dy)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [bool, "float64", "int8"])
def test_a_token_of_weight_0_is_not_there(device, kind, mask):
    x, y = tokens((3, 4))
    ratio, weights = np.ones_like(x), np.ones(x.shape, mask)
    weights[1, 2] = weights[2, 0] = 0
    here = weights != 0
    expected = klcore.kl_estimate(x[here], y[here], kind=kind, reduction="sum")
    for broken in (x, y, ratio):
        kept = broken.copy()
        broken[1, 2], broken[2, 0] = np.nan, np.inf
        arrays = {"weights": device.put(weights), "ratio": device.put(ratio), "return_grad": BOTH, "kind": kind}
        for reduction in ("none", "sum", "mean"):
            found = klcore.kl_estimate(device.put(x), device.put(y), reduction=reduction, **arrays)
            value, dx, dy = map(device.get, found)
            assert not np.any([dx[~here], dy[~here]])
            assert np.isfinite([dx, dy]).all()
            if reduction == "none":
                assert not value[~here].any()
            close(np.sum(value), expected / (here.sum() if reduction == "mean" else 1))
        broken[...] = kept


def test_a_ratio_that_is_none(device):
    """It gives NaN, like a bad weight where nothing waits for the device."""
    x, y = tokens((5,))
    found = klcore.kl_estimate(device.put(x), device.put(y), ratio=device.put(np.array([-1.0, np.nan, np.inf, 0, 1])))
    np.testing.assert_array_equal(np.isnan(device.get(found)), [True, True, True, False, False])


# ---- never negative --------------------------------------------------------------------------------------------------

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(finite, finite), min_size=1), st.sampled_from(["float32", "float64"]))
def test_never_negative(pairs, dtype):
    x, y = np.array(pairs, dtype).T
    for kind in ("k2", "k3"):
        value = klcore.kl_estimate(x, y, kind=kind)
        assert (value >= 0).all()
        same = klcore.kl_estimate(x, x, kind=kind, return_grad=BOTH)
        assert not np.any(same)
        assert not np.signbit(same[0]).any()
    assert not np.any(klcore.kl_estimate(x, x, kind="k1"))


@given(st.floats(-80, 0), st.floats(-80, 0))
def test_beside_the_term_of_kl_div(x, y):
    """k3, times the probability, is the term that kl_div sums."""
    close(np.exp(x) * klcore.kl_estimate(x, y), klcore.kl_div(x, y, space="log_probs"), 1e-12)


# ---- unbiased --------------------------------------------------------------------------------------------------------

CLASSES = 40


def policies(seed=0):
    rng = np.random.default_rng(seed)
    a, b, c = rng.normal(size=(3, CLASSES))
    return a, b, c, *(v - np.logaddexp.reduce(v) for v in (a, b, c))


def test_expected_values():
    """The mean over all tokens, each as often as the policy draws it."""
    _, _, _, x, y, _ = policies()
    exact = klcore.kl_div(x, y, space="log_probs")
    means = {kind: np.exp(x) @ klcore.kl_estimate(x, y, kind=kind) for kind in KINDS}
    close(means["k1"], exact)
    close(means["k3"], exact)
    assert abs(means["k2"] / exact - 1) > 0.05


def through_softmax(logits, d):
    """From a derivative with respect to log-probabilities to the one with respect to logits."""
    return d - np.exp(logits - np.logaddexp.reduce(logits)) * d.sum()


def test_expected_gradients_of_fixed_tokens():
    a, b, _, x, y, _ = policies()
    mean = {}
    for kind in KINDS:
        _, dx = klcore.kl_estimate(x, y, kind=kind, weights=np.exp(x), return_grad="x")
        mean[kind] = through_softmax(a, dx)
    _, forward = klcore.kl_div(a, b, space="logits", return_grad="x")
    _, reverse = klcore.kl_div(b, a, space="logits", return_grad="y")
    np.testing.assert_allclose(mean["k1"], 0, atol=1e-15)
    np.testing.assert_allclose(mean["k2"], forward, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(mean["k3"], reverse, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_expected_gradient_with_a_ratio(kind):
    """For tokens from elsewhere, with the ratio's own gradient: ratio * k."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    a, b, _, _, y, sampler = policies()
    logits = torch.tensor(a, requires_grad=True)
    x = torch.log_softmax(logits, -1)
    ratio = torch.exp(x - torch.tensor(sampler))
    estimates = ratio * klcore.kl_estimate(x, torch.tensor(y), kind=kind)
    (torch.tensor(np.exp(sampler)) * estimates).sum().backward()
    value, exact = klcore.kl_div(a, b, space="logits", return_grad="x")
    np.testing.assert_allclose(logits.grad, exact, rtol=1e-11, atol=1e-15)
    fixed = klcore.kl_estimate(x.detach(), y, kind=kind, ratio=ratio.detach(), weights=np.exp(sampler), reduction="sum")
    close(fixed, value)


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


@functools.cache
def numbers():
    rng = np.random.default_rng(3)
    return {"ratio": rng.uniform(0.5, 2, (5, 7)), "weights": rng.uniform(0, 2, (5, 7))}


SETTINGS = [set(), {"ratio"}, {"weights"}, {"limit"}, {"ratio", "weights", "limit"}]


def both(torch, kind, setting, reduction, x, y):
    """klcore's results, and those of the simple formulas."""
    options = {name: torch.tensor(a) for name, a in numbers().items() if name in setting}
    limit = 0.4 if "limit" in setting else None
    r = y - x
    r = r if limit is None else r.clamp(-limit, limit)
    expected = simple(kind, 0 * r, r) * options.get("ratio", 1) * options.get("weights", 1)
    count = options["weights"].sum() if "weights" in setting else r.numel()
    expected = expected if reduction == "none" else expected.sum() / (count if reduction == "mean" else 1)
    return klcore.kl_estimate(x, y, kind=kind, limit=limit, reduction=reduction, **options), expected


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(sorted(s)) or "plain")
@pytest.mark.parametrize("kind", KINDS)
def test_autograd(torch, kind, setting, reduction):
    x, y = (torch.tensor(a, requires_grad=True) for a in tokens())
    found, expected = both(torch, kind, setting, reduction, x, y)
    close(found.detach(), expected.detach())
    cotangent = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    of_found, of_expected = (torch.autograd.grad(v, (x, y), cotangent) for v in (found, expected))
    for a, b in zip(of_found, of_expected, strict=True):
        close(a, b, 1e-11)


def test_torch_has_the_bits_of_numpy(torch):
    x, y = tokens((30, 40), dtype="float32")
    mask, ratio = x > -2, np.exp(x)
    for reduction in ("none", "sum", "mean"):
        options = {"reduction": reduction, "return_grad": BOTH}
        expected = klcore.kl_estimate(x, y, weights=mask, ratio=ratio, **options)
        tensors = {"weights": torch.tensor(mask), "ratio": torch.tensor(ratio)}
        equal((t.numpy() for t in klcore.kl_estimate(torch.tensor(x), torch.tensor(y), **tensors, **options)), expected)


@pytest.mark.quick(1)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_torch_compile(torch, reduction):
    x, y = (torch.tensor(a, requires_grad=True) for a in tokens())
    options = {name: torch.tensor(a) for name, a in numbers().items()}

    def loss(x, y, **options):
        return (2 * klcore.kl_estimate(x, y, reduction=reduction, limit=1.0, **options)).sum()

    expected = torch.autograd.grad(loss(x, y, **options), (x, y))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    equal(torch.autograd.grad(compiled(x, y, **options), (x, y)), expected)

    def asked(x, y, **options):
        return klcore.kl_estimate(x, y, reduction=reduction, return_grad=BOTH, **options)

    compiled = torch.compile(asked, backend="aot_eager", fullgraph=True)
    x, y = x.detach(), y.detach()
    equal(compiled(x, y, **options), asked(x, y, **options))
    assert compiled(x[0], y, **options)[1].shape == (7,)


def test_torch_func(torch):
    x, y = map(torch.tensor, tokens())
    ratio = torch.tensor(numbers()["ratio"])
    estimate = functools.partial(klcore.kl_estimate, reduction="mean")
    found = torch.func.vmap(lambda x, y, r: estimate(x, y, ratio=r))(x, y, ratio)
    equal(found, [estimate(*pair[:2], ratio=pair[2]) for pair in zip(x, y, ratio, strict=True)])
    grads = torch.func.vmap(torch.func.grad(lambda x, y, r: estimate(x, y, ratio=r)), (0, 0, None))(x, y, ratio[0])
    close(grads, -ratio[0] * torch.expm1(y - x) / 7, 1e-11)
    slope = torch.func.grad(lambda x: estimate(x, y[0]))
    with pytest.raises(RuntimeError, match="first derivatives"):
        torch.func.grad(lambda x: slope(x).sum())(x[0])


@pytest.mark.parametrize("name", ["ratio", "weights"])
def test_a_gradient_of_the_ratio_is_refused(torch, name):
    x, y = map(torch.tensor, tokens())
    with pytest.raises(TypeError, match=rf"multiply the result by it instead: {name} \* klcore.kl_estimate"):
        klcore.kl_estimate(x, y, **{name: torch.ones(5, 7, requires_grad=True)})


def test_half_precision_of_torch(torch):
    x, y = (torch.tensor(a).to(torch.bfloat16).requires_grad_() for a in tokens())
    value = klcore.kl_estimate(x, y, reduction="mean", weights=torch.ones(5, 7, dtype=torch.bool))
    assert value.dtype == torch.float32
    value.backward()
    assert x.grad.dtype == y.grad.dtype == torch.bfloat16


# ---- JAX -------------------------------------------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("shape", [(), (5, 7), (300, 100)], ids=str)
def test_jax(shape):
    """Without dimensions, small, and so large that it takes the other path."""
    pytest.importorskip("jax", reason="jax is not installed")
    jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")
    x, y = tokens(shape, dtype="float32")
    ratio, mask = np.exp(x / 4), x < -0.1
    for reduction in ("none", "sum", "mean"):
        options = {"reduction": reduction, "limit": 3.0}
        expected = klcore.kl_estimate(x, y, ratio=ratio, weights=mask, return_grad=BOTH, **options)
        arrays = jnp.asarray(x), jnp.asarray(y), jnp.asarray(ratio), jnp.asarray(mask)

        def estimate(x, y, ratio, mask, options=options, **more):
            return klcore.kl_estimate(x, y, ratio=ratio, weights=mask, **options, **more)

        equal(map(np.asarray, estimate(*arrays, return_grad=BOTH)), map(np.asarray, expected))
        equal([np.asarray(jax.jit(estimate)(*arrays))], [np.asarray(expected[0])])
        found = jax.jit(jax.grad(lambda *a, f=estimate: f(*a).sum(), (0, 1)))(*arrays)
        for a, b in zip(found, expected[1:], strict=True):
            close(a, b, 1e-6)
        if len(shape) == 2:
            mapped = jax.vmap(estimate)(*arrays)
            close(mapped, [estimate(*row) for row in zip(*arrays, strict=True)], 0)
            slopes = jax.vmap(jax.grad(lambda *a, f=estimate: f(*a).sum()))(*arrays)
            assert slopes.shape == shape
    with pytest.raises(NotImplementedError, match=r"kl_estimate has no derivative with respect to ratio"):
        jax.grad(lambda r: klcore.kl_estimate(arrays[0], arrays[1], ratio=r, reduction="sum"))(arrays[2])


# ---- other arrays ----------------------------------------------------------------------------------------------------


def test_lists_and_tables():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    x, y = tokens((3, 4))
    expected = klcore.kl_estimate(x, y)
    equal([klcore.kl_estimate(x.tolist(), y.tolist())], [expected])
    table = pandas.DataFrame(x, columns=list("abcd"))
    equal([klcore.kl_estimate(table, pandas.DataFrame(y, columns=list("abcd")))], [expected])
    other = pandas.DataFrame(y, columns=list("abdc"))
    for first, options in ((table, {}), (x, {"weights": -table}), (x, {"ratio": table})):
        with pytest.raises(ValueError, match="different labels"):
            klcore.kl_estimate(first, other, **options)


def test_dask_is_told_what_to_do():
    da = pytest.importorskip("dask.array", reason="dask is not installed")
    x, y = tokens((6, 4))
    chunks = [da.from_array(a, (2, 4)) for a in (x, y)]
    with pytest.raises(TypeError, match=r"dask.array.map_blocks\(klcore.kl_estimate, log_x, log_y, dtype='float32'\)"):
        klcore.kl_estimate(*chunks)
    equal([da.map_blocks(klcore.kl_estimate, *chunks, dtype="float64").compute()], [klcore.kl_estimate(x, y)])


# ---- messages --------------------------------------------------------------------------------------------------------

X, Y = tokens((2, 3))
WRONG = [
    ({"kind": "k4"}, ValueError, r"kind must be one of 'k1', 'k2', 'k3'; found 'k4'"),
    ({"kind": ["k1"]}, ValueError, r"kind must be one of .*; found \['k1'\]"),
    ({"reduction": "row"}, ValueError, r"reduction must be one of 'none', 'sum', 'mean'; found 'row'"),
    ({"reduction": None}, ValueError, r"reduction must be one of"),
    ({"limit": 0}, ValueError, r"limit must be a number > 0, or None for no clipping; found 0"),
    ({"limit": float("nan")}, ValueError, r"limit must be a number > 0"),
    ({"limit": "20"}, TypeError, r"limit must be a number"),
    ({"base": 1}, ValueError, r"base must be a finite number > 1"),
    ({"denominator": 3}, ValueError, r"denominator divides a sum.*found reduction='none' and denominator=3"),
    ({"denominator": 3, "reduction": "mean"}, ValueError, r"found reduction='mean'"),
    ({"denominator": [3.0], "reduction": "sum"}, TypeError, r"denominator must be a number"),
    ({"denominator": np.ones(1), "reduction": "sum"}, ValueError, r"denominator must be a number or a 0-d array"),
    ({"denominator": -1, "reduction": "sum"}, ValueError, r"denominator must be finite and >= 0"),
    ({"return_grad": "z"}, ValueError, r"return_grad must be one of None, 'x', 'y', \('x', 'y'\)"),
    ({"weights": np.ones(2)}, ValueError, r"weights of shape \(2,\) do not broadcast"),
    ({"weights": [[-1.0]]}, ValueError, r"weights must be finite and >= 0; found -1.0"),
    ({"ratio": np.ones((4, 3))}, ValueError, r"ratio of shape \(4, 3\) does not broadcast"),
    ({"ratio": "1"}, TypeError, r"ratio"),
    ({"device": "tpu"}, ValueError, r"device must be"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_messages(options, error, message):
    with pytest.raises(error, match=message):
        klcore.kl_estimate(X, Y, **options)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy"])
def test_shapes_that_do_not_match(library):
    xp = pytest.importorskip(library, reason=f"{library} is not installed")
    with pytest.raises(ValueError, match=r"log_x and log_y must have shapes that broadcast; found \(2, 3\) and \(2,\)"):
        klcore.kl_estimate(xp.ones((2, 3)), xp.ones(2))
