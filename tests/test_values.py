"""The results of each operation at limits, infinities and undefined arguments: the domain table, class by class."""

import functools

import numpy as np
import oracle
import pytest
from conftest import OF_TWO, RATIOS, call

import klcore
from klcore.operations import OPERATIONS

DTYPES = ["float32", "float64"]
INF, NAN = np.inf, np.nan
TINY = {"float32": 1e-45, "float64": 5e-324}
HUGE = {"float32": 3e38, "float64": 1e308}


def with_gradients(operation, x, y, **options):
    """(value, dx, dy); dy is None for operations of one argument."""
    found = call(operation, x, y, return_grad=OPERATIONS[operation].gradients, **options)
    return (*found, None)[:3]


# ---- the table, in probabilities -------------------------------------------------------------------------------------

# x, y -> kl_div, rel_entr, cross_entropy; None: an ordinary number, compared with the oracle
TABLE = [
    (0.0, 0.0, 0.0, 0.0, 0.0),
    (0.0, 0.25, 0.25, 0.0, 0.0),
    (0.0, 3.0, 3.0, 0.0, 0.0),
    (-0.0, 0.25, 0.25, 0.0, 0.0),
    (0.25, 0.0, INF, INF, INF),
    (0.25, -0.0, INF, INF, INF),
    (0.25, 0.25, 0.0, 0.0, None),
    (0.1, 0.1, 0.0, 0.0, None),
    (1.0, 1.0, 0.0, 0.0, 0.0),
    (7.7, 7.7, 0.0, 0.0, None),
    ("tiny", "tiny", 0.0, 0.0, None),
    ("huge", "huge", 0.0, 0.0, -INF),  # x * log(x) overflows
    (0.5, 0.25, None, None, None),
    (0.25, 0.5, None, None, None),
    ("tiny", 0.5, None, None, None),
    (0.5, "tiny", None, None, None),
    (-0.25, 0.5, NAN, NAN, NAN),
    (-0.25, 0.0, NAN, NAN, NAN),
    (-0.25, -0.25, NAN, NAN, NAN),
    ("-tiny", 0.5, NAN, NAN, NAN),
    (0.5, -0.25, NAN, NAN, NAN),
    (0.0, -0.25, NAN, NAN, NAN),
    (0.5, "-tiny", NAN, NAN, NAN),
    (NAN, 0.5, NAN, NAN, NAN),
    (NAN, 0.0, NAN, NAN, NAN),
    (0.5, NAN, NAN, NAN, NAN),
    (0.0, NAN, NAN, NAN, NAN),
    (NAN, NAN, NAN, NAN, NAN),
    (-INF, 0.5, NAN, NAN, NAN),
    (0.5, -INF, NAN, NAN, NAN),
    (0.0, INF, INF, 0.0, 0.0),
    (0.5, INF, INF, -INF, -INF),
    ("huge", INF, INF, -INF, -INF),
]


def number(v, dtype):
    sign = -1 if isinstance(v, str) and v[0] == "-" else 1
    v = {"tiny": TINY[dtype], "huge": HUGE[dtype]}[v.lstrip("-")] * sign if isinstance(v, str) else v
    return np.array([v], dtype)


@pytest.mark.parametrize("reduction", ["row", "none", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("operation", "x", "y", "expected"),
    [(op, *row[:2], row[2 + k]) for k, op in enumerate(("kl_div", "rel_entr", "cross_entropy")) for row in TABLE]
    + [("entropy", x, x, v) for x, v in [(0.0, 0.0), (-0.0, 0.0), (1.0, 0.0), (0.3, None), (7.7, None), ("tiny", None),
                                         ("huge", -INF), (-0.3, NAN), ("-tiny", NAN), (NAN, NAN), (-INF, NAN)]],
)  # fmt: skip
def test_table(operation, x, y, expected, dtype, reduction):
    x, y = number(x, dtype), number(y, dtype)
    value = np.asarray(call(operation, x, y, reduction=reduction), np.float64).reshape(())
    if expected is not None:
        np.testing.assert_array_equal(value, expected)
        assert not (expected == 0 and np.signbit(value)), "a zero is +0"
    else:
        true = oracle.exact(operation, x, y)
        relative, absolute = oracle.tolerance(operation, "probs", dtype)
        assert abs(value - true.value[0]) <= relative * true.value_size[0] + absolute


# ---- the same limits in every pair of spaces, beside ordinary classes ------------------------------------------------

# probabilities with zeros on both sides (first class), on one, with a class that is impossible under y, and ordinary
# ones
X = np.array(
    [[0.0, 0.0, 0.2, 0.5, 0.3], [0.0, 0.25, 0.25, 0.0, 0.5], [0.0, 0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0, 1.0]]
)
Y = np.array(
    [[0.0, 0.1, 0.2, 0.4, 0.3], [0.0, 0.00, 0.25, 0.25, 0.5], [0.0, 0.40, 0.30, 0.20, 0.10], [0.0, 0.0, 0.3, 0.0, 0.7]]
)


def as_space(p, space, dtype, shift=0.0):
    if space == "probs":
        return p.astype(dtype)
    with np.errstate(divide="ignore"):
        return (np.log(p) + (shift if space == "logits" else 0.0)).astype(dtype)


def assert_rows(operation, x, y, space, temperature=1.0, rows=oracle.exact):
    """Value, terms and gradients of rows against the oracle."""
    x, y = np.atleast_2d(x, y)
    true = rows(operation, x, y, space, temperature)
    options = {"space": space, "temperature": temperature}
    results = dict(zip(("value", "dx", "dy"), with_gradients(operation, x, y, **options), strict=True))
    results["terms"] = call(operation, x, y, reduction="none", **options)
    if space[0] == "logits" and not OPERATIONS[operation].single:
        # an infinite value has no derivative with respect to x: any number there would look like one
        infinite = true.value == INF
        assert not np.isfinite(results["dx"][infinite]).any()
        results["dx"][infinite] = NAN
    oracle.assert_answer(results, true, operation, space)


PAIRS = oracle.CALLS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operation", "space"), PAIRS)
def test_excluded_classes(operation, space, dtype):
    x, y = as_space(X, space[0], dtype, 3.0), as_space(Y, space[1], dtype, -2.0)
    assert_rows(operation, x, y, space)


# ---- logits ----------------------------------------------------------------------------------------------------------


def logits(n, dtype, seed=0):
    rng = np.random.default_rng(seed)
    a = 3 * rng.normal(size=n)
    return a.astype(dtype), (a + rng.normal(size=n)).astype(dtype)


def into(a, space, dtype=None):
    """Logits as numbers of a space."""
    if space != "logits":
        z = a.astype(np.float64)
        z = z - z.max(axis=-1, keepdims=True)
        z = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
        return (np.exp(z) if space == "probs" else z).astype(dtype or a.dtype)
    return a.astype(dtype or a.dtype)


WITH_LOGITS = [(op, pair) for op, pair in PAIRS if "logits" in pair]
SPOILERS = {
    "all -inf": lambda a: np.full_like(a, -INF),
    "+inf": lambda a: np.where(np.arange(a.size) == 2, INF, a),
    "NaN": lambda a: np.where(np.arange(a.size) == a.size - 1, NAN, a),
    "-inf and NaN": lambda a: np.where(np.arange(a.size) == 0, NAN, -INF),
    "-inf and +inf": lambda a: np.where(np.arange(a.size) == 0, INF, -INF),
}


@pytest.mark.parametrize("n", [3, 50, 1024, 1500])
@pytest.mark.parametrize("spoiler", SPOILERS)
@pytest.mark.parametrize(
    ("operation", "space", "side"),
    [(op, pair, i) for op, pair in WITH_LOGITS for i in (0, 1) if pair[i] == "logits" and OPERATIONS[op].gradients[i:]],
)
def test_undefined_logits(operation, space, side, spoiler, n):
    sides = [into(v, s) for v, s in zip(logits(n, "float32"), space, strict=True)]
    stacked = [np.stack([v, v, v]) for v in sides]
    stacked[side][1] = SPOILERS[spoiler](sides[side])
    options = {"space": space}
    results = with_gradients(operation, *stacked, **options)
    alone = with_gradients(operation, *sides, **options)
    for got, expected in zip(results, alone, strict=True):
        if got is not None:
            assert np.isnan(got[1]).all()
            # no row affects another
            assert got[0].tobytes() == got[2].tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(
    "blocks",
    [
        # which classes are excluded: on both sides; by x only
        {"both": slice(0, 1024), "x": slice(0, 0)},
        {"both": slice(1024, 2048), "x": slice(0, 0)},
        {"both": slice(2048, 3000), "x": slice(0, 0)},
        {"both": slice(0, 2999), "x": slice(0, 0)},
        {"both": slice(0, 0), "x": slice(0, 1024)},
        {"both": slice(0, 0), "x": slice(1000, 2999)},
        {"both": slice(0, 1024), "x": slice(1024, 2048)},
        {"both": slice(5, 2000, 2), "x": slice(4, 2999, 2)},
    ],
    ids=lambda b: f"both {b['both'].start}-{b['both'].stop}, x {b['x'].start}-{b['x'].stop}",
)
@pytest.mark.parametrize(("operation", "space"), [("kl_div", ("logits",) * 2), ("kl_div", ("log_probs",) * 2),
                                                  ("kl_div", ("probs", "logits")), ("rel_entr", ("logits",) * 2),
                                                  ("cross_entropy", ("logits",) * 2)])  # fmt: skip
def test_excluded_blocks(operation, space, blocks, temperature, dtype):
    """Whole chunks of the sum without any class."""
    if "logits" not in space:
        temperature = 1.0
    a, b = logits(3000, "float64")
    a[blocks["both"]] = b[blocks["both"]] = a[blocks["x"]] = -INF
    x, y = (into(v, s, dtype) for v, s in zip((a, b), space, strict=True))
    assert_rows(operation, x, y, space, temperature, oracle.fast)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e30, "lowest"])
@pytest.mark.parametrize("count", [1, 3, 1024])
@pytest.mark.parametrize(
    ("operation", "space", "masked"),
    [
        (op, pair, m)
        for op, pair in WITH_LOGITS
        for m in ("x", "xy")
        if m == "x" or (op in OF_TWO and pair[1] == "logits")
    ],
)
def test_finite_masks(operation, space, masked, mask, count, dtype):
    """Large negative logits instead of -inf, as in many programs, have the same effect as -inf."""
    a, b = (into(v, s) for v, s in zip(logits(1500 if count == 1024 else 7, dtype), space, strict=True))
    mask = float(np.finfo(dtype).min) if mask == "lowest" else mask
    a[1 : 1 + count] = {"probs": 0.0, "log_probs": -INF, "logits": mask}[space[0]]
    if masked == "xy":
        b[1 : 1 + count] = mask
    assert_rows(operation, a, b, space, rows=oracle.fast if count == 1024 and mask > -1e200 else oracle.exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e30])
@pytest.mark.parametrize("operation", RATIOS)
def test_finite_mask_on_y(operation, mask, dtype):
    """Only y's class is masked: a large divergence, not an infinite one."""
    a, b = logits(7, dtype)
    b[3] = mask
    assert_rows(operation, a, b, ("logits", "logits"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", RATIOS)
def test_lowest_on_y(operation, dtype):
    """A mask at the end of the range: the divergence is at least as large as any ordinary one, and not NaN."""
    a, b = logits(7, dtype)
    b[3] = np.finfo(dtype).min
    assert call(operation, a, b, space="logits") > 1e30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [5, 200, 1100])
@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("operation", "space"), [pair for pair in WITH_LOGITS if pair[0] in OF_TWO])
def test_terms_of_undefined_rows(operation, space, bad, side, n, dtype):
    """A row of logits that contains NaN or +inf is no distribution: all its terms are NaN, and so is its value."""
    a, b = logits(n, dtype)
    if space["xy".index(side)] != "logits":
        return
    (a if side == "x" else b)[2] = bad
    a, b = into(a, space[0]), into(b, space[1])
    for batch in (1, 9):  # alone, and with neighbours
        x, y = (np.repeat(v[None], batch, 0) for v in (a, b))
        assert np.isnan(call(operation, x, y, space=space)).all()
        assert np.isnan(call(operation, x, y, space=space, reduction="none")).all()


# ---- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", ["subnormal", "smallest normal", "mixed"])
@pytest.mark.parametrize("operation", oracle.OPERATIONS)
def test_subnormal_probabilities(operation, exponent, dtype):
    rng = np.random.default_rng(3)
    smallest, normal = TINY[dtype], float(np.finfo(dtype).smallest_normal)
    x, y = {
        "subnormal": lambda: rng.integers(1, 1 << 20, (2, 4, 9)) * smallest,
        "smallest normal": lambda: normal * rng.uniform(0.5, 2, (2, 4, 9)),
        "mixed": lambda: np.exp(rng.uniform(np.log(normal) - 5, 0, (2, 4, 9))),
    }[exponent]()
    true = oracle.exact(operation, x.astype(dtype), y.astype(dtype))
    value, dx, dy = with_gradients(operation, x.astype(dtype), y.astype(dtype))
    # a term that is itself subnormal, a difference of numbers at the end of the range, is off by a few units there
    relative, _ = oracle.tolerance(operation, "probs", dtype)
    oracle.assert_close(value, true.value, true.value_size, (relative, 9 * 4 * smallest), operation)
    oracle.assert_answer({"dx": dx}, true, operation, "probs")
    if dy is not None and exponent != "mixed":  # -x/y overflows there
        oracle.assert_answer({"dy": dy}, true, operation, "probs")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1e-3, 1e3, 1e10])
@pytest.mark.parametrize(("operation", "space"), WITH_LOGITS)
def test_extreme_temperatures(operation, space, temperature, dtype):
    a, b = logits(40, dtype)
    rows = functools.partial(oracle.exact, digits=800)
    assert_rows(operation, into(a, space[0]), into(b, space[1]), space, temperature, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", RATIOS)
@pytest.mark.parametrize("magnitude", [80.0, 1e3, 1e5, 1e30])
def test_large_logits(operation, magnitude, dtype):
    rng = np.random.default_rng(4)
    a, b = (magnitude * rng.normal(size=(2, 6, 30))).astype(dtype)
    assert_rows(operation, a, b, ("logits", "logits"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 0, 0)])
@pytest.mark.parametrize(("operation", "space"), PAIRS)
def test_no_classes(operation, space, shape, dtype):
    a = np.zeros(shape, dtype)
    options = {"space": space}
    value = call(operation, a, a, **options)
    assert value.shape == shape[:-1]
    assert value.dtype == dtype
    assert not np.any(value)
    assert call(operation, a, a, reduction="sum", **options) == 0
    assert call(operation, a, a, reduction="none", **options).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
@pytest.mark.parametrize(("operation", "space"), PAIRS)
def test_no_rows(operation, space, shape, dtype):
    a = np.zeros(shape, dtype)
    options = {"space": space}
    assert call(operation, a, a, **options).shape == shape[:-1]
    assert call(operation, a, a, reduction="sum", **options) == 0
    for mean in ("rowmean", "mean"):
        assert np.isnan(call(operation, a, a, reduction=mean, **options))
    if shape[0] == 0:
        assert np.isnan(call(operation, a, a, reduction="batchmean", **options))
    for gradient in with_gradients(operation, a, a, **options)[1:]:
        assert gradient is None or gradient.shape == shape


# ---- cross-entropy with logits, at the ends of the range ------------------------------------------------------------

# x, y, their spaces, temperature; the expected value, terms, dx and dy; None: not compared
ENDS = {
    "NaN under y": ([0, 0], [NAN, -1], ("logits", "log_probs"), 1, NAN, [NAN, 0.5], None, [NAN, -0.5]),
    "negative probability of an excluded class": (
        [-1, 0.5], [-INF, 0], ("probs", "logits"), 1, NAN, [NAN, 0], [NAN, 0], None),
    "NaN of an excluded class": ([NAN, -0.5], [-INF, 0], ("log_probs", "logits"), 1, NAN, [NAN, 0], [NAN, 0], None),
    "a cost that overflows beside x = 0": (
        [1, 0], [3e38, -3e38], ("probs", "logits"), 100, 0, [0, 0], [0, 6e36], [0, 0]),
    "e^x that overflows": (
        [89, 0], [0, -1], ("log_probs", "logits"), 1, 1.4064237e+38, [1.4064237e+38, 1.3132617],
        [1.4064237e+38, 1.3132617], [-1.2074429e+38, 1.2074429e+38]),
    "probabilities whose sum overflows": (
        [2e38, 2e38], [0, -INF], ("probs", "logits"), 1, INF, [0, INF], [0, INF], [2e38, -2e38]),
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 4])  # a single row, and a block
@pytest.mark.parametrize("n", [2, 1030])
@pytest.mark.parametrize("name", ENDS)
def test_cross_entropy_at_the_ends(device, name, rows, n):
    x, y, space, temperature, *expected = ENDS[name]
    never = {"probs": 0, "log_probs": -INF, "logits": -INF}
    x, y = (
        np.array([*a[:1], *[never[s]] * (n - 2), *a[1:]], np.float32)[None].repeat(rows, axis=0)
        for a, s in zip((x, y), space, strict=True)
    )
    put = device.put(x), device.put(y)
    options = {"space": space, "temperature": temperature}
    found = [device.get(a) for a in klcore.cross_entropy(*put, return_grad=("x", "y"), **options)]
    found.insert(1, device.get(klcore.cross_entropy(*put, reduction="none", **options)))
    for got, wanted in zip(found, expected, strict=True):
        if wanted is not None:
            got = got if got.ndim == 1 else got[:, [0, -1]]
            np.testing.assert_allclose(got, np.broadcast_to(wanted, got.shape), rtol=1e-6)
