"""Promise 1, "right": elementary functions to one unit in the last place, values within the published bounds."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import mpmath
import numpy as np
import oracle
import pytest
import ranges
from conftest import OF_TWO, RATIOS, call

import klcore
import klcore.backends.cpu  # chooses the instruction set of klcore._cpu
from klcore import _cpu
from klcore.operations import OPERATIONS

ml_dtypes = pytest.importorskip("ml_dtypes")

FUNCTIONS = ("log", "exp", "log1p", "expm1")


# ---- elementary functions --------------------------------------------------------------------------------------------

BLOCK = 1 << 16  # inputs at a time: everything stays in the second-level cache
# (first, last) bits of float32 -> the single result there, or None for x itself, where there is nothing to approximate
TINY = [(0x00000000, 0x307FFFFF), (0x80000000, 0xB07FFFFF)]  # |x| < 2^-30
ONE_RESULT = {
    "log": [(0x80000001, 0xFFFFFFFF, np.nan)],  # negative numbers and NaN
    "exp": [(0x43000000, 0x7F800000, np.inf), (0xC3000000, 0xFF800000, 0.0), *((*ends, 1.0) for ends in TINY)],
    "log1p": [(0xBF800001, 0xFFFFFFFF, np.nan), *((*ends, None) for ends in TINY)],  # x < -1 and NaN
    "expm1": [(0x43000000, 0x7F800000, np.inf), (0xC3000000, 0xFF800000, -1.0), *((*ends, None) for ends in TINY)],
}  # |x| >= 128


def check_blocks(function, firsts):
    """The largest error in ulp over the inputs with the bits first ... first + BLOCK - 1, for each first."""
    count = np.arange(BLOCK, dtype=np.uint32)
    bits, got = np.empty_like(count), np.empty(BLOCK, np.float32)
    exact, error, ulp = np.empty((3, BLOCK))  # kept: allocating them again would take longer than computing
    x, worst = bits.view(np.float32), 0.0
    for first in firsts:
        np.add(count, np.uint32(first), out=bits)
        _cpu.elementary(function, x, got)
        same = [r for low, high, r in ONE_RESULT[function] if low <= first and first + BLOCK - 1 <= high]
        if same:
            expected = x if same[0] is None else same[0]
            nan = expected is not x and np.isnan(expected)
            assert np.isnan(got).all() if nan else (got == expected).all(), f"{function} at {x[0]}"
            continue
        with np.errstate(all="ignore"):
            getattr(np, function)(x, out=exact, dtype=np.float64)
            special = ~np.isfinite(exact)
            if special.any():
                expected = exact[special].astype(np.float32)
                np.testing.assert_array_equal(got[special], expected, f"{function} near {x[0]}")
            # an infinite result where the exact one is beyond the largest float32: as if float32 had one octave more
            np.minimum(exact, 2.0**128, out=exact)
            np.minimum(got, 2.0**128, out=error, dtype=np.float64)
            np.abs(np.subtract(error, exact, out=error), out=error)
            np.bitwise_and(exact.view(np.int64), 0x7FF0000000000000, out=ulp.view(np.int64))  # the power of two below
            np.maximum(np.multiply(ulp, 2.0**-23, out=ulp), 2.0**-149, out=ulp)
            np.divide(error, ulp, out=error)
        error[special] = 0
        worst = np.maximum(worst, error.max())  # NaN propagates
    return worst


@pytest.mark.exhaustive
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_float32(function):
    parts = 2
    with ThreadPoolExecutor(parts) as pool:
        worst = list(pool.map(lambda k: check_blocks(function, range(k * BLOCK, 1 << 32, parts * BLOCK)), range(parts)))
    # NumPy's float64 functions are good to 2^-50
    bound = oracle.TOLERANCES["elementary", "float32"] + 2.0**-20
    assert all(w <= bound for w in worst), worst  # not of `max`, which may ignore NaN


def hard_cases(function):
    """float64 inputs at which such functions tend to fail."""
    rng = np.random.default_rng(1)
    spread = np.concatenate([[0.0], 2.0 ** rng.uniform(-60, 0, 150)])
    signs = rng.choice([-1.0, 1.0], 300)
    bits = rng.integers(0, 1 << 64, 300, dtype=np.uint64).view(np.float64)
    ulps = np.arange(-20, 21) * 2.0**-52
    near = {
        # around 1, the edges of the octave reduction, subnormal numbers
        "log": [1 + spread, 1 - spread / 2, 1 + ulps, 2**0.5 * (1 + ulps), 1.5 * (1 + ulps), 0.75 * (1 + ulps),
                np.arange(1, 40) * 5e-324, 2.0 ** np.arange(-1074, 1024, 37), 2.2250738585072014e-308 * (1 + ulps),
                1.7976931348623157e308 * (1 - np.arange(20) * 2.0**-53)],
        # overflow, underflow into subnormals and to zero, halfway between two octaves
        "exp": [709.782712893384 * (1 + ulps), -745.1332191019411 * (1 + ulps), -708.3964185322641 * (1 + ulps),
                rng.uniform(-746, -707, 200), rng.uniform(-707, 709.78, 400),
                (np.arange(-1070, 1024) + 0.5) * np.log(2)],
        "log1p": [-1 + spread[1:], -0.5 * (1 + ulps), rng.uniform(-1, 3, 300), 2.0 ** rng.uniform(0, 1023, 100),
                  2.0 ** np.arange(-1074, 1024, 37), -(2.0 ** np.arange(-1074, 0, 37)), 2.0**53 * (1 + ulps)],
        "expm1": [709.782712893384 * (1 + ulps), rng.uniform(-60, 60, 400), rng.uniform(-745, 709.78, 200),
                  (np.arange(-60, 1024) + 0.5) * np.log(2), 2.0 ** np.arange(-1074, 9, 37), rng.uniform(-1, 1, 400)],
    }[function]  # fmt: skip
    special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 5e-324, -5e-324]
    return np.concatenate([special, spread, spread[:1], signs * 2.0 ** rng.uniform(-80, 10, 300), bits, *near])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float64_on_hard_cases(function):
    x = hard_cases(function)
    got = np.empty_like(x)
    _cpu.elementary(function, x, got)
    with np.errstate(all="ignore"):
        expected = getattr(np, function)(x)
    special = ~np.isfinite(expected)
    np.testing.assert_array_equal(got[special], expected[special])
    with mpmath.workdps(60):
        for a, g in zip(x[~special].tolist(), got[~special].tolist(), strict=True):
            true = getattr(mpmath, function)(mpmath.mpf(a))
            exponent = mpmath.frexp(true)[1] if true else -1073
            ulp = mpmath.ldexp(1, max(int(exponent) - 53, -1074))
            assert abs(mpmath.mpf(g) - true) <= ulp * oracle.TOLERANCES["elementary", "float64"], (a, g)


# ---- values ----------------------------------------------------------------------------------------------------------


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def into(z, space, dtype, factor=1.0):
    """Logits as numbers of a space, rounded to the dtype; probabilities times a factor."""
    if space == "logits":
        return z.astype(dtype)
    log = log_softmax(z)
    return (np.exp(log) * factor if space == "probs" else log).astype(dtype)


SHAPES = {"flat": 1.0, "peaked": 6.0}


def pairs_of(n, target, shape, rows=2):
    """Teachers' and students' logits whose divergence is about `target`, with a common offset between them."""
    rng = np.random.default_rng([n, int(np.log10(target) + 40), len(shape)])
    a = SHAPES[shape] * rng.normal(size=(rows, n))
    noise = rng.normal(size=a.shape)
    if target >= 10:  # most of x's mass lies where y has next to none
        a[:, 0] = a.max(axis=-1) + 4
        b = a + noise
        b[:, 0] -= target + 4
        return a, b + 5
    log_p = log_softmax(a)
    p = np.exp(log_p)
    noise -= (p * noise).sum(axis=-1, keepdims=True)
    scale = np.sqrt(2 * target / (p * noise**2).sum(axis=-1, keepdims=True))
    for _ in range(40 if n < 2000 and target > 1e-4 else 0):  # where the divergence is no longer a square
        t = log_softmax(a + scale * noise) - log_p
        scale *= (target / (p * (np.expm1(t) - t)).sum(axis=-1, keepdims=True)) ** 0.25
    return a, a + 5 + scale * noise


def stacked(n, choices):
    """`pairs_of` for each (target, shape), concatenated, and each row's target."""
    rows = 2 if n < 2000 else 1
    x, y = (np.concatenate(side) for side in zip(*(pairs_of(n, *choice, rows) for choice in choices), strict=True))
    return x, y, np.repeat([target for target, _ in choices], rows)


def choices_for(n, targets):
    """Every target with every shape; long rows, which are slow for the oracle, with one of them."""
    if n > 2000:
        return [(target, "flat" if target < 1 else "peaked") for target in targets]
    return list(itertools.product(targets, SHAPES))


def oracle_for(n):
    return oracle.exact if n <= 10 else oracle.fast


def cases():
    """(n, space, temperature)"""
    for n in (2, 3, 10, 100, 1000, 1024, 1025, 50257, 262144):
        for space in oracle.SPACES:
            for temperature in (1.0, 2.0, 0.7) if space == "logits" and n < 2000 else (1.0,):
                yield n, space, temperature


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "space", "temperature"), list(cases()))
def test_kl_of_any_size(n, space, temperature, dtype):
    targets = (1e-12, 1e-9, 1e-6, 1e-3, 1.0, 30.0, 900.0)
    if n > 2000:
        targets = (1e-12, 1e-6, 1.0, 900.0)
    if n > 200000:  # half of them each dtype
        targets = targets[dtype == "float32" :: 2]
    a, b, target = stacked(n, choices_for(n, targets))
    factor = np.ones((len(a), 1))
    if space == "probs":  # as probabilities of float32, only the largest come from masses above 1
        far = target > 50
        factor[far], b[far] = 40.0, np.maximum(b[far], b[far].max(axis=-1, keepdims=True) - 30)
    x, y = into(a * temperature, space, dtype, factor), into(b * temperature, space, dtype, factor)
    true = oracle_for(n)("kl_div", x, y, space, temperature)
    # rounding the inputs to float32 adds up to n * eps^2, relative to 1, to the divergence
    assert (true.value > target * 1e-3).all()
    assert (true.value < 2e3).all()
    got = klcore.kl_div(x, y, space=space, temperature=temperature)
    assert got.dtype == dtype
    oracle.assert_answer({"value": got}, true, "kl_div", space)


@pytest.mark.parametrize("dtype", ranges.DTYPES)
@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 17.0, 100.0])
@pytest.mark.parametrize(("n", "count"), [(2, 400), (3, 300), (5, 200), (10, 100), (100, 20), (1500, 4), (5000, 1)])
@pytest.mark.parametrize("operation", RATIOS)
def test_offsets_temperatures_and_masks(operation, n, count, temperature, dtype):
    rng = np.random.default_rng([n, int(temperature * 100)])
    x, y = ranges.rows(rng, dtype, n, count, temperature)
    plain = np.isfinite(x).all(axis=-1) & np.isfinite(y).all(axis=-1)
    options = {"space": "logits", "temperature": temperature}
    value, dx, dy = getattr(klcore, operation)(x, y, return_grad=("x", "y"), **options)
    terms = getattr(klcore, operation)(x, y, reduction="none", **options)
    assert (value[plain] >= 0).all()  # false for NaN
    for result in (dx, dy, terms):
        assert not np.isnan(result[plain].astype(np.float64)).any()
    within = ~(ranges.beyond(x) | ranges.beyond(y))  # of pairs of doubles
    x, y, results = x[within], y[within], {"value": value, "dx": dx, "dy": dy, "terms": terms}
    true = oracle.fast(operation, x, y, "logits", temperature)
    kept = ranges.promised(x, y, temperature, true.value)
    assert kept.any() or count == 1
    results = {name: got[within][kept] for name, got in results.items()}
    oracle.assert_answer(results, oracle.at(true, kept), operation, ("logits", "logits"))


CROSS = [(op, pair) for op, pair in oracle.CALLS if oracle.is_cross(op, pair)]


@pytest.mark.parametrize("dtype", ranges.DTYPES)
@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
@pytest.mark.parametrize(("n", "count"), [(2, 200), (3, 100), (10, 100), (1500, 4), (5000, 1)])
@pytest.mark.parametrize(("operation", "space"), CROSS)
def test_cross_entropy_of_such_rows(operation, space, n, count, temperature, dtype):
    rng = np.random.default_rng([n, int(temperature * 100)])
    a, b = ranges.rows(rng, dtype, n, count, temperature)
    within = ~(ranges.beyond(a) | ranges.beyond(b))
    a, b = a[within], b[within]
    with np.errstate(over="ignore", divide="ignore"):
        x, y = (
            into(v.astype(np.float64) / (temperature if s != "logits" else 1), s, v.dtype)
            for v, s in zip((a, b), space, strict=True)
        )
    options = {"temperature": temperature}
    gradients = OPERATIONS[operation].gradients
    value, *grads = call(operation, x, y, space, return_grad=gradients, **options)
    terms = call(operation, x, y, space, reduction="none", **options)
    with np.errstate(over="ignore", invalid="ignore"):
        true = oracle.fast(operation, x, y, space, temperature)
    # except gradients that leave float32, and gradients of probabilities below the range of pairs of doubles
    kept = ranges.promised(a, b, temperature, true.value)
    kept &= (np.abs(np.stack([true.dx, true.dy])) < 1e30).all(axis=(0, -1))
    results = dict(zip(("value", "terms", "dx", "dy"), (value, terms, *grads), strict=False))
    oracle.assert_answer({k: v[kept] for k, v in results.items()}, oracle.at(true, kept), operation, space)


LOWEST = -3.4028234663852886e38
# (x, y, temperature, dtype) that failed in the past: offsets too far apart for their difference to fit two numbers
HARD = {
    "float32, 1e7 and 7e17": ([9847887.0, 9847881.0], [6.6e17, 6.6e17], 0.33333993304822335, "float32"),
    "float32, y masked throughout": ([549961.1875, 549961.0], [LOWEST, LOWEST], 0.0248284128, "float32"),
    "float32, several chunks": (np.linspace(-17, 16, 1500), np.full(1500, -2.6e20), 1.0, "float32"),
    "float32, nearly one-hot": ([1.19, -2.14, -2.35], [37924656.0, 37924652.0, 37924652.0], 0.12203, "float32"),
    "float64, -1e9 and -5e26": ([-1000000020.0, -1e9], [-5e26, -5e26], 1.0, "float64"),
    "float64, x masked throughout": ([-1.797e308] * 2, [106566601035655.72, 106566601035649.88], 1.0, "float64"),
    "float64, 5e16 and 2e17": ([4.9122376754672e16] * 2, [1.83269131590853e17, 1.8326913159085304e17], 0.61, "float64"),
    "float64, y masked but for one": ([11.5, 23.0, 22.9], [-1e9, 23.06, 23.01], 0.307, "float64"),
}


@pytest.mark.parametrize("operation", RATIOS)
@pytest.mark.parametrize("name", HARD)
def test_hard_rows(name, operation):
    x, y, temperature, dtype = HARD[name]
    x, y = np.array(x, dtype), np.array(y, dtype)
    true = oracle.exact(operation, x, y, "logits", temperature)
    options = {"space": "logits", "temperature": temperature}
    value, dx, dy = getattr(klcore, operation)(x, y, return_grad=("x", "y"), **options)
    terms = getattr(klcore, operation)(x, y, reduction="none", **options)
    results = {"value": value, "dx": dx, "dy": dy, "terms": terms}
    oracle.assert_answer({k: v[None] for k, v in results.items()}, true, operation, ("logits", "logits"))


ALL = oracle.CALLS


@pytest.mark.parametrize(("operation", "pair"), ALL)
def test_what_overflows_is_not_excluded(operation, pair):
    """(x - max x)/T of the lowest finite number is -inf in float64; the class stays possible."""
    z = np.array([[0.0, -1.7976931348623157e308, 1.0]])
    x, y = (into(z, s, "float64") if s != "logits" else z for s in pair)
    options = {"temperature": 0.1} if "logits" in pair else {}
    value = call(operation, x, y, pair, **options)
    # as a probability it is 0: where x > 0 = y the value is infinite, however small x is
    assert np.isfinite(value) != (operation in OF_TWO and pair[1] == "probs" != pair[0])
    assert not np.isnan(value)


@pytest.mark.parametrize("n", [5, 200, 2000])
@pytest.mark.parametrize("space_x", ["probs", "log_probs"])
@pytest.mark.parametrize("operation", RATIOS)
def test_a_log_probability_that_overflows_float32(operation, space_x, n):
    """A mask of the lowest number overflows at a temperature below 1; it matters to a teacher that gives it some
    mass."""
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=(2, 6, n))
    a[:, 1] = [-20, -40, -60, -80, -86, -np.inf]
    b[:5, 1] = b[::2, n - 1] = np.finfo("float32").min
    a[::2, n - 1] = -np.inf
    b[3, 1] /= 2
    space, options = (space_x, "logits"), {"temperature": 0.3}
    x, y = into(a, space_x, "float32"), b.astype("float32")
    true = oracle.exact(operation, x, y, space, digits=60, **options)
    call = getattr(klcore, operation)
    value, dx, dy = call(x, y, space=space, return_grad=("x", "y"), **options)
    terms = call(x, y, space=space, reduction="none", **options)
    results = {"value": value, "dx": dx, "dy": dy, "terms": terms}
    if space_x == "probs":  # log p - log q, which no float32 holds
        assert np.isinf(dx[:5, 1]).all()
        del results["dx"]
    assert (value[:3] > 1e5).all()
    oracle.assert_answer(results, true, operation, space)


LOGS = [p for p in oracle.PAIRS if "probs" not in p and p != ("logits", "logits")]


@pytest.mark.parametrize("n", [2, 200])
@pytest.mark.parametrize("temperature", [0.3, 1, 2, 100, 2.0**90])
@pytest.mark.parametrize("top", [0.0, 1e30, 1e32, 3e38])
@pytest.mark.parametrize("pair", [("probs", "logits"), *LOGS])
@pytest.mark.parametrize("operation", RATIOS)
def test_a_class_at_the_end_of_float32(operation, pair, top, temperature, n):
    """Minus the largest logit it overflows; or its share of x brings a term back into range."""
    if "logits" not in pair:
        temperature = 1.0
    lowest = np.finfo("float32").min
    a, b = np.zeros((2, 5, n), "float32")
    a[:, 1] = [0.3, 1e-3, 1e-9, -1, -3]
    a = np.log(np.exp(a) / np.exp(a).sum(-1, keepdims=True)).astype("float32")
    b[:, 0] = lowest
    b[:, 1] += np.float32(top) if pair[1] == "logits" else 0
    x, y = (np.exp(a) if pair[0] == "probs" else a), b
    options = {"temperature": temperature} if "logits" in pair else {}
    true = oracle.exact(operation, x, y, pair, digits=60, **options)
    run = getattr(klcore, operation)
    results = {
        "value": run(x, y, space=pair, **options),
        "terms": run(x, y, space=pair, reduction="none", **options),
        "dy": run(x, y, space=pair, return_grad="y", **options)[1],
    }
    if pair[0] != "probs" and np.abs(true.dx).max() < -lowest:
        results["dx"] = run(x, y, space=pair, return_grad="x", **options)[1]
    if np.abs(true.value).max() < -lowest:
        oracle.assert_answer(results, true, operation, pair)
    else:
        assert not any(np.isnan(v).any() for v in results.values())


def test_probabilities_whose_sum_float32_does_not_hold():
    x = np.array([[3e38, 3e38, 1e38], [1, 1, 1], [3e38, 1e38, 3e38], [0, 0, 1]] * 2, "float32")
    y = np.random.default_rng(2).normal(size=x.shape).astype("float32")
    for rows in (slice(0, 2), slice(None)):
        dy = klcore.kl_div(x[rows], y[rows], space=("probs", "logits"), return_grad="y")[1]
        true = oracle.exact("kl_div", x[rows], y[rows], ("probs", "logits")).dy
        np.testing.assert_allclose(dy, true, rtol=1e-5, atol=1e-6 * np.abs(true).max(axis=-1).min())


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-35, 1e35, 1e40, 1e300])
@pytest.mark.parametrize(("operation", "pair"), [(op, pair) for op, pair in ALL if "logits" in pair])
def test_temperatures_for_which_float32_has_no_room(operation, pair, temperature):
    a, b = np.random.default_rng(3).normal(size=(2, 6, 9)).astype("float32")
    a[0] = b[0] = 0
    x, y = (into(v, s, "float32") for v, s in zip((a, b), pair, strict=True))
    gradient = OPERATIONS[operation].gradients
    found, expected = (
        call(operation, x.astype(d), y.astype(d), pair, temperature=temperature, return_grad=gradient)
        for d in ("float32", "float64")
    )
    assert not np.isnan(found[0]).any()
    for f, e in zip(found, expected, strict=True):
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(f, e.astype("float32"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spread", [3.0, 30.0, 100.0])
@pytest.mark.parametrize(("n", "possible"), [(10, 10), (1026, 4), (2060, 20), (5000, 5000)])
@pytest.mark.parametrize(
    ("operation", "space"),
    [
        ("kl_div", ("logits", "logits")),
        ("rel_entr", ("logits", "logits")),
        ("kl_div", ("logits", "log_probs")),
        ("kl_div", ("log_probs", "logits")),
        ("kl_div", ("log_probs", "log_probs")),
    ],
)
def test_scattered(operation, space, n, possible, spread, dtype):
    """Students that have little to do with their teachers, and rows whose chunks have little to do with each other."""
    rng = np.random.default_rng([n, int(spread)])
    a = 4 * rng.normal(size=(10, n))
    b = a + spread * rng.normal(size=a.shape)
    a[:, possible // 2 : n - possible // 2] = b[:, possible // 2 : n - possible // 2] = -np.inf
    x, y = (into(v, s, dtype) for v, s in zip((a, b), space, strict=True))
    true = oracle_for(n)(operation, x, y, space)
    value, dx, dy = getattr(klcore, operation)(x, y, space=space, return_grad=("x", "y"))
    oracle.assert_answer({"value": value, "dx": dx, "dy": dy}, true, operation, space)


MIXED = [(op, pair) for op, pair in ALL if op != "kl_div" or pair[0] != pair[1]]  # all others than those above


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [2, 10, 1000, 1025, 50257])
@pytest.mark.parametrize(("operation", "space"), MIXED)
def test_other_operations_and_pairs(operation, space, n, dtype):
    targets = (1e-12, 1e-6, 1.0, 30.0)
    if n > 2000:  # half of them each dtype
        targets = targets[dtype == "float32" :: 2]
    a, b, _ = stacked(n, choices_for(n, targets))
    x, y = into(a, space[0], dtype), into(b, space[1], dtype)
    true = oracle_for(n)(operation, x, y, space)
    got = call(operation, x, y, space)
    assert got.dtype == dtype
    oracle.assert_answer({"value": got}, true, operation, space)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("n", [2, 10, 1000, 1025])
@pytest.mark.parametrize(("operation", "space"), MIXED + [("kl_div", (s, s)) for s in oracle.SPACES])
def test_sixteen_bits(operation, space, n, dtype):
    """Inputs are widened exactly: values are as accurate as for the same numbers in float32."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    a, b, _ = stacked(n, [(target, "flat") for target in (1e-6, 1e-3, 1.0, 30.0)])
    x, y = into(a, space[0], dtype), into(b, space[1], dtype)
    true = oracle_for(n)(operation, x, y, space)
    value = call(operation, x, y, space)
    assert value.dtype == np.float32
    oracle.assert_answer({"value": value}, true, operation, space)
    assert value.tobytes() == call(operation, x.astype("float32"), y.astype("float32"), space).tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_of_sixteen_bits_is_widened_exactly(dtype):
    """Subnormal ones, infinities and NaN included: the terms are those of the same numbers in float32."""
    x = np.arange(1 << 16, dtype=np.uint16).view(getattr(ml_dtypes, dtype, dtype))
    wide = x.astype("float32")
    for operation in (name for name, o in OPERATIONS.items() if o.has_terms):
        terms = call(operation, x, x[::-1], reduction="none")
        np.testing.assert_array_equal(terms, call(operation, wide, wide[::-1], reduction="none"))
    value = klcore.entropy(x[:, None])
    np.testing.assert_array_equal(value, klcore.entropy(wide[:, None]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rest", [1e-3, 1e-7, 1e-12, 1e-30])
@pytest.mark.parametrize("n", [2, 100, 1025])
@pytest.mark.parametrize("space", oracle.SPACES)
@pytest.mark.parametrize("operation", [name for name, d in oracle.DEFINITIONS.items() if d.cost])
def test_nearly_one_hot(operation, space, n, rest, dtype):
    """-log p of a p close to 1 is small; computed as a difference of large logits it would be lost."""
    z = np.random.default_rng(n).normal(size=(3, n)) + np.log(rest / n)
    z[[0, 1, 2], [0, n // 2, n - 1]] = 0
    for offset in (0.0, 25.0) if space == "logits" else (0.0,):
        x = into(z + offset, space, dtype)
        true = oracle.exact(operation, x, x, space, digits=80)
        oracle.assert_answer({"value": call(operation, x, x, (space, space))}, true, operation, (space, space))


@pytest.mark.parametrize("n", [1 << 10, 1 << 16, 1 << 20, (1 << 20) + 1])
@pytest.mark.parametrize("order", ["mixed", "ascending", "descending"])
def test_sums_of_long_rows(n, order):
    """A row's sum in float32 is accurate to 2 ulp for any length; with x = 0 the terms of kl_div are y itself."""
    y = np.exp(3 * np.random.default_rng(n).normal(size=n)).astype(np.float32)
    y = {"mixed": y, "ascending": np.sort(y), "descending": np.sort(y)[::-1].copy()}[order]
    true = np.sum(y.astype(np.longdouble))
    got = klcore.kl_div(np.zeros_like(y), y)
    assert abs(got - true) <= 2 * np.spacing(np.float32(true))


# ---- the whole range -------------------------------------------------------------------------------------------------


def magnitudes(rng, shape, dtype, signs=(1,)):
    """Numbers of a dtype, log-uniform from its smallest subnormal to its largest."""
    about = np.finfo(dtype)
    low, high = np.log2(about.smallest_subnormal), np.log2(about.max)
    with np.errstate(under="ignore"):
        m = np.exp2(rng.uniform(low, np.nextafter(high, 0), shape)).astype(dtype)
    return (m * rng.choice(signs, shape)).astype(dtype)


def anywhere(space, dtype, rows, n):
    """Pairs of rows from the whole range. If both are in one space, half of their classes are close together."""
    rng = np.random.default_rng(n)
    most = float(np.finfo(dtype).max)

    def side(space):
        m = magnitudes(rng, (rows, n), dtype)
        if space == "probs":
            return m
        # in the range where exponentials are neither 0 nor infinite, or nearly so; and others, of any size that matters
        # beside 1
        near = rng.uniform(-1.3 * np.log(most), 1.1 * np.log(most), (rows, n))
        return np.where(rng.random((rows, n)) < 0.7, near, -m.clip(1e-40)).astype(dtype)

    x, y = map(side, space)
    if space[0] == space[1]:
        apart = magnitudes(rng, (rows, n), "float32", (-1, 1)).astype(dtype)
        with np.errstate(over="ignore"):
            close = x * (1 + apart.clip(-0.5, 1)) if space[0] == "probs" else x + apart.clip(-30, 30)
        y = np.where(rng.random((rows, n)) < 0.5, close.clip(-most, most), y)
    return x, y


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("operation", "space"),
    [(op, pair) for op, pair in [*MIXED, *(("kl_div", (s, s)) for s in oracle.SPACES)] if "logits" not in pair],
)
def test_the_whole_range(operation, space, dtype):
    """The bounds hold for all numbers of a dtype; for subnormal results, to a few units. Checked term by term, with
    gradients; and for sums of a few, wherever they and their terms are in range."""
    about = np.finfo(dtype)
    for rows, n in ((300, 1), (30, 7)):
        x, y = anywhere(space, dtype, rows, n)
        true = oracle.exact(operation, x, y, space, digits=150)  # e^x - e^y, both next to 1
        value, *gradients = call(operation, x, y, space, return_grad=OPERATIONS[operation].gradients)
        found = {"value": value, "dx": gradients[0], "dy": gradients[-1], "terms": None}
        found["terms"] = call(operation, x, y, space, reduction="none")
        in_range = (np.abs(true.terms) <= about.max).all(axis=-1) & (np.abs(true.value) <= about.max)
        for name in ("value",) if n > 1 else ("value", "terms", "dx", "dy")[: 3 + (operation in OF_TWO)]:
            bounds = oracle.tolerance(operation, space, dtype, "gradient" if name[0] == "d" else "value")[0], 0.0
            expected, size, got = getattr(true, name), getattr(true, f"{name}_size"), found[name]
            with np.errstate(over="ignore"):
                expected = np.where(np.abs(expected) > about.max, np.copysign(np.inf, expected), expected)
            kept = in_range if n > 1 else slice(None)
            own = np.where(np.isfinite(expected), np.abs(expected), 0.0).reshape(rows, -1).sum(axis=-1)
            # a size outside the range of doubles is replaced by the answer's, and by logarithms of up to 1500
            size = np.where(size > 0, size, 2048 * own.clip(max=2.0**1000))
            size = size + 4 * n * float(about.smallest_subnormal) / bounds[0]
            oracle.assert_close(got[kept], expected[kept], size[kept], bounds, f"{name} of {operation} in {space}")


# ---- the oracle itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1e-12, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("operation", "space"), [*MIXED, ("kl_div", ("logits",) * 2), ("kl_div", ("probs",) * 2)])
def test_pairs_of_doubles_agree_with_fifty_digits(operation, space, shape, target):
    a, b = pairs_of(50, target, shape)
    x, y = into(a, space[0], "float64"), into(b, space[1], "float64")
    temperature = 1.7 if "logits" in space else 1.0
    digits = oracle.exact(operation, x, y, space, temperature)
    doubles = oracle.fast(operation, x, y, space, temperature)
    bound = oracle.TOLERANCES["oracle", "float64"]
    for name in ("value", "dx", "dy"):
        if operation not in OF_TWO and name == "dy":
            continue
        d, f = getattr(digits, name), getattr(doubles, name)
        np.testing.assert_allclose(f, d, rtol=bound, atol=bound * np.abs(d).max() * (name != "value"))


LOWEST = {dtype: float(np.finfo(dtype).min) for dtype in ("float32", "float64")}
FLAT, NOISE = np.zeros(2048), np.random.default_rng(0).normal(size=2048)


def masked_from(start, value, a=FLAT):
    return np.where(np.arange(a.size) < start, a, value)


APART = {  # rows in which a whole chunk is far below the rest, on one side or both
    "x masked, y flat": (masked_from(1024, -1e9), FLAT),
    "x masked, y noise": (masked_from(1024, -1e9, NOISE), NOISE[::-1]),
    "y masked": (NOISE, masked_from(1024, -1e4)),
    "both masked": (masked_from(1024, -1e12, NOISE), masked_from(1024, -1e12, NOISE[::-1])),
    "a chunk of each": (masked_from(1024, -1e5, NOISE), np.where(np.arange(2048) < 1024, -1e5, NOISE)),
    "x one-hot": (np.where(np.arange(2048) == 0, 1e20, 0.0), NOISE),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", APART)
def test_chunks_far_apart(case, dtype):
    x, y = (v[None].astype(dtype) for v in APART[case])
    true = oracle.exact("kl_div", x, y, "logits")
    value, dx, dy = klcore.kl_div(x, y, space="logits", return_grad=("x", "y"))
    oracle.assert_answer({"value": value, "dx": dx, "dy": dy}, true, "kl_div", ("logits", "logits"))
    for low in (LOWEST[dtype], LOWEST[dtype] / 2):  # like any other mask
        masked = np.where(x < -1e8, low, x).astype(dtype)
        if case.startswith("x masked"):
            found = klcore.kl_div(masked, y, space="logits", return_grad="y")[1]
            np.testing.assert_allclose(found, dy, rtol=0, atol=4 * np.finfo(dtype).eps * np.abs(dy).max())


@pytest.mark.parametrize("n", [2, 8, 202, 1025])
@pytest.mark.parametrize(
    ("top", "temperature", "dtype"),
    [(3.4e38, 10.0, "float32"), (3e31, 1.0, "float32"), (1e299, 1.0, "float64")],
)
def test_differences_that_overflow(n, top, temperature, dtype):
    """x excludes, by the lowest number, the class in which y has most mass: KL is about its distance from the
    others."""
    x, y = np.zeros((5, n), dtype), np.zeros((5, n), dtype)
    x[:, 0], y[:, 0] = LOWEST[dtype], top
    value, dy = klcore.kl_div(x, y, space="logits", temperature=temperature, return_grad="y")
    np.testing.assert_allclose(value, top / temperature, rtol=1e-6)
    np.testing.assert_allclose(dy[:, 0], 1 / temperature, rtol=1e-6)
    np.testing.assert_allclose(dy[:, 1:], -1 / (temperature * (n - 1)), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [3, 1025, 5000])
@pytest.mark.parametrize(("high", "low"), [(707.5, 0.0), (740.0, 0.0), (88.0, 0.0), (1.0, 0.9), (1.0, -1e-8)])
def test_equal_rows_with_far_chunks(high, low, n, dtype):
    """For every distance of the first class from the others, up to nearly the whole range."""
    limit = -LOWEST[dtype] if high == 1.0 else 1.0
    x = np.full(n, -low * limit, dtype)
    x[0] = high * limit
    value, dx, dy = klcore.kl_div(x, x, space="logits", return_grad=("x", "y"))
    assert value == 0
    assert not dx.any()
    assert not dy.any()
