"""What holds for every distribution: Hypothesis searches for counterexamples."""

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import klcore

DTYPES = ["float32", "float64"]
EPS = {"float32": oracle.EPS32, "float64": oracle.EPS64}
SAME = [(s, s) for s in oracle.SPACES]
checked = settings(max_examples=150, deadline=None, derandomize=True)

any_dtype = st.sampled_from(DTYPES)

# the exponents of probabilities: ordinary ones, tied ones and far apart ones; None is an excluded class
logit = st.one_of(st.floats(-5, 5), st.sampled_from([-3.0, 0.0, 3.0]), st.floats(-80, 0), st.none())


@st.composite
def rows(draw, count=2, most=40, excluded=True):
    """Logits, (count, n), as float64; at least one class of each is possible."""
    n = draw(st.integers(1, most))
    elements = logit if excluded else st.floats(-20, 20)
    out = np.array(draw(st.lists(elements, min_size=count * n, max_size=count * n)), dtype=object).reshape(count, n)
    z = np.where(out == None, -np.inf, out).astype(np.float64)  # noqa: E711
    z[:, draw(st.integers(0, n - 1))] = draw(st.floats(-2, 2))
    return z


# the shift of a row of logits: none, some, or so much that little else is left of it
offset = st.one_of(st.just(0.0), st.floats(-1e4, 1e4), st.floats(-1e30, 1e30))
any_temperature = st.one_of(st.just(1.0), st.floats(-2, 2).map(lambda e: 10.0**e))


@st.composite
def any_logits(draw, most=40):
    """Two rows of logits, a dtype and a temperature, from the whole range of offsets, magnitudes and masks."""
    dtype, temperature, z = draw(any_dtype), draw(any_temperature), draw(rows(most=most, excluded=False))
    lowest = float(np.finfo(dtype).min)
    magnitude = draw(st.floats(-7, 3).map(lambda e: 10.0**e)) * draw(st.sampled_from([1.0, temperature]))
    z = magnitude * z + draw(st.one_of(offset, st.tuples(offset, offset).map(lambda o: np.array(o)[:, None])))
    mask = draw(st.sampled_from([-1e9, lowest]))
    masked = draw(st.lists(st.booleans(), min_size=z.shape[1], max_size=z.shape[1]).map(np.array))
    side = draw(st.sampled_from(["none", "x", "y", "both", "all of x", "all of y"]))
    for row, name in enumerate("xy"):
        if side in (name, "both"):
            z[row, masked] = mask
        elif side == f"all of {name}":
            z[row] = mask
    return np.clip(z, lowest, -lowest).astype(dtype), temperature


def into(z, space, dtype):
    if space == "logits":
        return z.astype(dtype)
    z = z - z.max(axis=-1, keepdims=True)
    z = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return (np.exp(z) if space == "probs" else z).astype(dtype)


any_space = st.sampled_from(oracle.SPACES)
any_pair = st.sampled_from(oracle.PAIRS)


@checked
@given(rows(), any_pair, any_dtype)
def test_never_negative(z, space, dtype):
    x, y = into(z[0], space[0], dtype), into(z[1], space[1], dtype)
    assert klcore.kl_div(x, y, space=space) >= 0
    assert klcore.kl_div(y, x, space=space[::-1]) >= 0


@checked
@given(any_logits())
def test_any_finite_logits(drawn):
    """Not negative, and never NaN, whatever the offset, the magnitude, the mask and the temperature."""
    (x, y), temperature = drawn
    options = {"space": "logits", "temperature": temperature}
    value, dx, dy = klcore.kl_div(x, y, return_grad=("x", "y"), **options)
    terms = klcore.kl_div(x, y, reduction="none", **options)
    assert value >= 0
    assert (terms >= 0).all()
    assert not np.isnan([dx, dy]).any()
    for operation in (klcore.rel_entr, klcore.cross_entropy):
        assert not np.isnan(operation(x, y, return_grad="y", **options)[0])
    assert klcore.entropy(x, **options) >= 0
    assert klcore.kl_div(x, x.copy(), **options) == 0


@checked
@given(rows(count=1, most=2000), any_space, any_dtype, any_temperature)
def test_zero_of_equal(z, space, dtype, temperature):
    x = into(z[0], space, dtype)
    temperature = temperature if space == "logits" else 1.0
    value, dx, dy = klcore.kl_div(x, x.copy(), space=space, temperature=temperature, return_grad=("x", "y"))
    assert value == 0
    # with respect to a probability of 0, log(0/0) has no value
    assert not np.any(dx[np.isfinite(x) & (x != 0) if space == "probs" else slice(None)])
    assert not np.any(dy[x != 0 if space == "probs" else slice(None)])


@checked
@given(rows(excluded=False), any_pair, any_dtype)
def test_cross_entropy_minus_entropy(z, space, dtype):
    """KL(p || q) = H(p, q) - H(p) = sum of rel_entr; for distributions rounded to the dtype, kl_div adds sum(q - p)."""
    x, y = into(z[0], space[0], dtype), into(z[1], space[1], dtype)
    cross, own = klcore.cross_entropy(x, y, space=space), klcore.entropy(x, space=space[0])
    answers = [oracle.exact(op, x, y, space) for op in ("cross_entropy", "entropy", "rel_entr")]
    bound = sum(a.value_size[0] for a in answers) * 10 * EPS[dtype]
    assert abs(np.float64(cross) - own - klcore.rel_entr(x, y, space=space)) <= bound
    # every probability and every sum is off by at most an eps, times its logarithm if that was rounded
    mass = (1 + np.abs(z).max() * 3 + np.log(z.shape[1])) * 4 * EPS[dtype]
    assert abs(np.float64(cross) - own - klcore.kl_div(x, y, space=space)) <= bound + mass


@checked
@given(rows(count=4), st.floats(0, 1), any_dtype)
def test_jointly_convex(z, part, dtype):
    x, y, x2, y2 = into(z, "probs", dtype).astype(np.float64)
    mixed = klcore.kl_div(part * x + (1 - part) * x2, part * y + (1 - part) * y2)
    apart = part * klcore.kl_div(x, y) + (1 - part) * klcore.kl_div(x2, y2) if 0 < part < 1 else np.inf
    assert mixed <= apart * (1 + 1e-12) + 1e-14


@checked
@given(rows(), any_pair, any_dtype, st.randoms(use_true_random=False))
def test_order_of_rows_and_classes(z, space, dtype, random):
    x, y = into(z[0], space[0], dtype), into(z[1], space[1], dtype)
    value = klcore.kl_div(x, y, space=space)
    # rows: the same bits at every position
    noise = into(np.linspace(-3, 3, 5 * x.size).reshape(5, -1), "logits", dtype)
    many_x = np.concatenate([into(noise, space[0], dtype), x[None]])
    many_y = np.concatenate([into(noise[::-1], space[1], dtype), y[None]])
    order = list(range(6))
    random.shuffle(order)
    values = klcore.kl_div(many_x, many_y, space=space)
    assert klcore.kl_div(many_x[order], many_y[order], space=space).tobytes() == values[order].tobytes()
    assert values[5] == value
    # classes: the same number
    classes = list(range(x.size))
    random.shuffle(classes)
    assert_near(klcore.kl_div(x[classes], y[classes], space=space), value, x, y, space, dtype)


def assert_near(a, b, x, y, space, dtype, temperature=1.0):
    """Two computations of the same divergence, each within the bound."""
    if np.isinf(a) or np.isinf(b):
        assert a == b
        return
    relative, absolute = oracle.tolerance("kl_div", space, dtype)
    assert abs(np.float64(a) - b) <= 2 * (
        relative * oracle.exact("kl_div", x, y, space, temperature).value_size[0] + absolute * x.size
    )


@checked
@given(rows(), any_pair, any_dtype, st.integers(1, 2100), st.booleans())
def test_padding_with_excluded_classes(z, space, dtype, count, front):
    x, y = into(z[0], space[0], dtype), into(z[1], space[1], dtype)

    def padded(v, s):
        padding = np.full(count, 0.0 if s == "probs" else -np.inf, dtype)
        return np.concatenate([padding, v] if front else [v, padding])

    more = klcore.kl_div(padded(x, space[0]), padded(y, space[1]), space=space)
    assert_near(more, klcore.kl_div(x, y, space=space), x, y, space, dtype)


@checked
@given(rows(), st.integers(-2000, 2000), st.integers(-2000, 2000), st.integers(0, 80), any_dtype)
def test_shifted_logits(z, left, right, octaves, dtype):
    # multiples of 2^-8, so that shifting by an integer rounds nothing; then all of it in larger or smaller units
    unit = dtype_power(octaves - 20, dtype)
    x, y = np.round(z * 256).astype(dtype) / 256
    options = {"space": "logits", "temperature": 1.0 if octaves < 20 else float(unit)}
    shifted = klcore.kl_div((x + left).astype(dtype) * unit, (y + right).astype(dtype) * unit, **options)
    expected = klcore.kl_div(x * unit, y * unit, **options)
    assert_near(shifted, expected, x * unit, y * unit, ("logits", "logits"), dtype, options["temperature"])


@checked
@given(arrays(np.float64, (2, 30), elements=st.floats(2.0**-20, 2.0**20)), st.integers(-30, 30), any_dtype)
def test_homogeneous(p, octaves, dtype):
    x, y = p.astype(dtype)
    c = dtype_power(octaves, dtype)
    for operation in (klcore.kl_div, klcore.rel_entr):
        value, dx, dy = operation(x, y, return_grad=("x", "y"))
        scaled, scaled_dx, scaled_dy = operation(c * x, c * y, return_grad=("x", "y"))
        assert scaled == c * value
        assert scaled_dx.tobytes() == dx.tobytes()
        assert scaled_dy.tobytes() == dy.tobytes()


def dtype_power(octaves, dtype):
    return np.dtype(dtype).type(2.0) ** octaves


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("space", oracle.SPACES)
@pytest.mark.parametrize("distance", [0.0, 1e-8, 1e-7, 1e-6, 1e-4, 1e-2, 1.0, 30.0])
def test_a_million_pairs_never_negative(space, distance, dtype):
    """Over all parameters; rounding would show in close pairs."""
    rng = np.random.default_rng(5)
    for n, count in ((2, 8500), (3, 6000), (10, 5000), (100, 1500), (1000, 150), (2000, 50)):
        a = rng.normal(size=(count, n)) * rng.uniform(0.1, 10, (count, 1))
        b = a + distance * rng.normal(size=a.shape)
        x, y = into(a, space, dtype), into(b, space, dtype)
        value = klcore.kl_div(x, y, space=space)
        assert (value >= 0).all()
        assert (klcore.kl_div(x, y, space=space, reduction="none") >= 0).all()
        if distance == 0:
            assert not value.any()
