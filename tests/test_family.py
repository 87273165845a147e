"""The relatives of the divergence: accurate to the published bounds, in every space, for every kind of array.

What all operations have in common (bits, layouts, weights, errors) is tested in other files, with js_div as the
example.
"""

import itertools
from unittest import mock

import numpy as np
import oracle
import pytest
import relatives
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import klcore
from klcore import _cpu
from klcore.backends import cpu
from klcore.operations import OPERATIONS

FAMILY = [name for name, o in OPERATIONS.items() if o.form == _cpu.BY_CLASS]
CASES = [(name, p) for name in FAMILY for p in relatives.PARAMETERS[name]]
WITH_TERMS = [name for name in FAMILY if OPERATIONS[name].has_terms]
SAME = ("probs", "log_probs", "logits")


def shown(case):
    return f"{case[0]} {', '.join(f'{k}={v}' for k, v in case[1].items())}"


cases = pytest.mark.parametrize("case", CASES, ids=shown)
names = pytest.mark.parametrize("name", FAMILY)


def call(name, *arrays, **options):
    return getattr(klcore, name)(*arrays, **options)


def logits(far, n=7, rows=2, seed=0):
    """Rows at about this distance: KL is close to `far`; "far" means classes in which one side has almost no mass."""
    rng = np.random.default_rng(seed)
    a = rng.normal(0, 3, (rows, n))
    if far == "far":
        return 7 * a, rng.normal(0, 20, (rows, n))
    return a, a + rng.normal(0, np.sqrt(2 * far), (rows, n))


def softmax(a):
    p = np.exp(a - a.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def log_sum_exp(v):
    top = v.max(-1, keepdims=True)
    return (top + np.log(np.exp(v - top).sum(-1, keepdims=True)))[..., 0]


def in_space(space, *arrays, dtype="float64"):
    pair = (space,) * 2 if isinstance(space, str) else space
    made = []
    for a, s in zip(arrays, pair, strict=True):
        v = a if s == "logits" else softmax(a) if s == "probs" else a - log_sum_exp(a)[..., None]
        # a probability that is subnormal in float32 has lost digits, and an underflow is an exact zero
        made.append(np.maximum(v, np.finfo(dtype).tiny).astype(dtype) if s == "probs" else v.astype(dtype))
    return made


def assert_right(name, parameters, x, y, space, got, temperature=1.0):
    """Value, dx and dy within the bounds of kl_div, relative to the value and to the L1 norm of a gradient's row."""
    value, dx, dy = got
    right = relatives.exact(name, x, y, space, temperature, **parameters)
    kinds = "value", "gradient", "gradient"
    for of, a, b in zip(kinds, (value, dx, dy), (right.value, right.dx, right.dy), strict=True):
        relative, absolute = oracle.tolerance("kl_div", "logits", a.dtype, of)
        if a.dtype == np.float32:
            # half an ulp of log q - log p is 3.8e-6 where a term is above 1e3
            relative = max(relative, 1e-5) if np.nanmax(np.abs(right.value)) > 1e3 else relative
            b = np.where(np.abs(b) > 3.4e38, np.inf * np.sign(b), b)
        size = np.abs(b).sum(-1) if of == "gradient" else np.abs(b)
        keep = np.isfinite(size)  # what float32 can represent
        oracle.assert_close(a[keep], b[keep], size[keep], (relative, absolute), f"{of} of {name} {parameters} {space}")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("space", SAME)
@cases
def test_accuracy(case, space, dtype):
    """Close rows and distant ones; logits with an offset between them."""
    name, parameters = case
    for far, offset in itertools.product((1e-12, 1e-6, 1.0, "far"), (0.0, 37.0, 1e4) if space == "logits" else (0.0,)):
        a, b = logits(far)
        x, y = in_space(space, a, b + offset, dtype=dtype)
        got = call(name, x, y, space=space, return_grad=("x", "y"), **parameters)
        assert_right(name, parameters, x, y, space, got)


@pytest.mark.parametrize("space", [("probs", "logits"), ("logits", "probs"), ("log_probs", "probs")], ids="-".join)
@cases
def test_accuracy_of_two_spaces(case, space):
    """float32, computed in double: the rounding of the inputs is not klcore's error."""
    name, parameters = case
    for far in (1e-2, 1.0):
        x, y = in_space(space, *logits(far), dtype="float32")
        got = call(name, x, y, space=space, return_grad=("x", "y"), **parameters)
        assert_right(name, parameters, x, y, space, got)


@pytest.mark.quick(2)
@names
def test_accuracy_of_long_rows(name):
    """Several chunks, whose states are merged: the likeliest class in the first, the last, and a short one."""
    parameters = relatives.PARAMETERS[name][0]
    for far, at in ((1e-6, 5), (1.0, 1500), ("far", 2059)):
        a, b = logits(far, 2060, 1)
        a[:, at], b[:, at] = a.max() + 9, b.max() + 8
        got = call(name, a, b, space="logits", return_grad=("x", "y"), **parameters)
        assert_right(name, parameters, a, b, "logits", got)


@names
def test_accuracy_of_nearly_one_hot_rows(name):
    """Where log q - log p of the class with nearly all the mass is tiny, and matters as much as the others'."""
    parameters = relatives.PARAMETERS[name][0]
    for far, offset in itertools.product((1e-10, 1e-6, 1.0), (0.0, 37.0, 1e4)):
        a, b = logits(far, 9)
        a[:, 4] += 25
        b[:, 4] += 25
        x, y = in_space("logits", a, b + offset, dtype="float32")
        got = call(name, x, y, space="logits", return_grad=("x", "y"), **parameters)
        assert_right(name, parameters, x, y, "logits", got)


@names
def test_float_and_double(name, gpu):
    """Chunks of float32 logits: near ones, one with a class that is not near, and one with nearly equal scores."""
    parameters = relatives.PARAMETERS[name][0]
    a, b = logits(0.1, 3072, 3)
    b[1, 1500] -= 30
    b[:2, 2048:] = a[:2, 2048:] + 1 + 1e-4 * (b - a)[:2, 2048:]
    b[2] = a[2] + 1e-5 * (b - a)[2]
    b[2, 7] += 9
    x, y = in_space("logits", a, b + 37, dtype="float32")
    got = call(name, x, y, space="logits", return_grad=("x", "y"), **parameters)
    assert_right(name, parameters, x, y, "logits", got)
    np.testing.assert_array_equal(call(name, x, y, space="logits", **parameters), got[0])
    there = call(name, gpu.put(x), gpu.put(y), space="logits", return_grad=("x", "y"), **parameters)
    alike(map(gpu.get, there), got)
    for k, of in enumerate("xy", 1):  # one side at a time
        alike(call(name, x, y, space="logits", return_grad=of, **parameters), (got[0], got[k]))


@names
def test_temperature(name):
    parameters = relatives.PARAMETERS[name][0]
    for dtype, temperature in (("float32", 2.5), ("float64", 0.3)):
        x, y = in_space("logits", *logits(1e-3), dtype=dtype)
        got = call(name, x, y, space="logits", temperature=temperature, return_grad=("x", "y"), **parameters)
        assert_right(name, parameters, x, y, "logits", got, temperature)


# ---- zeros -----------------------------------------------------------------------------------------------------------

# the contribution of a class, divided by the probability that is not 0: where p = 0 < q, and where q = 0 < p
AT_ZERO = {
    "js_div": (-0.75 * np.log(0.75), -0.25 * np.log(0.25), {"beta": 0.25}),
    "mixed_kl_div": (np.inf, np.inf, {}),
    "skew_kl_div": (0.75, -np.log(0.25) - 0.75, {"alpha": 0.25}),
    "alpha_div": (4.0, 4 / 3, {"alpha": 0.25}),
    "tv_dist": (0.5, 0.5, {}),
    "sq_hellinger": (0.5, 0.5, {}),
    "chi2_div": (1.0, np.inf, {}),
}
MORE_ZEROS = [  # the weight of an infinite part may be 0; signs of alpha
    ("mixed_kl_div", 1.0, np.inf, {"forward": 1.0}),
    ("mixed_kl_div", np.inf, 1.0, {"forward": 0.0}),
    ("skew_kl_div", 1.0, np.inf, {"alpha": 0.0}),
    ("alpha_div", 0.5, np.inf, {"alpha": 2.0}),
    ("alpha_div", np.inf, 0.5, {"alpha": -1.0}),
    ("alpha_div", 1.0, np.inf, {"alpha": 1.0}),
    ("alpha_div", np.inf, 1.0, {"alpha": 0.0}),
]
ZEROS = [(name, *AT_ZERO.get(name, ())) for name in WITH_TERMS] + MORE_ZEROS


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("space", ["probs", "log_probs", ("probs", "log_probs"), "logits"], ids=str)
@pytest.mark.parametrize(("name", "no_p", "no_q", "parameters"), ZEROS)
def test_zeros(name, no_p, no_q, parameters, space, dtype):
    """The terms of excluded classes; if both exclude a class, nothing; and the rest of the row is unchanged."""
    p = np.array([0.25, 0.0, 0.75, 0.0, 0.0])
    q = np.array([0.5, 0.25, 0.0, 0.25, 0.0])
    pair = (space, space) if isinstance(space, str) else space
    with np.errstate(divide="ignore"):
        x, y = ((v if s == "probs" else np.log(v)).astype(dtype) for v, s in zip((p, q), pair, strict=True))
    got = call(name, x, y, space=space, reduction="none", **parameters)
    expected = [None, 0.25 * no_p, 0.75 * no_q, 0.25 * no_p, 0.0]
    np.testing.assert_allclose(got[1:], expected[1:], rtol=2e-6 if dtype == "float32" else 1e-14)
    alone = call(name, np.float64([0.25]), np.float64([0.5]), reduction="none", **parameters)
    np.testing.assert_allclose(got[:1], alone, rtol=2e-6 if dtype == "float32" else 1e-13)
    value, dx, dy = call(name, x, y, space=space, return_grad=("x", "y"), **parameters)
    np.testing.assert_allclose(value, got.astype("float64").sum(), rtol=4e-6)
    if space == "logits" and np.isfinite(value):
        assert np.isfinite([dx, dy]).all()
        assert dx[4] == dy[4] == 0
        np.testing.assert_allclose((dx.sum(), dy.sum()), 0, atol=2e-7)


@names
@pytest.mark.parametrize("space", ["probs", "log_probs", "logits"])
def test_bad_numbers(name, space):
    """NaN and negative probabilities make NaN of the term, or of the row of logits."""
    x, y = in_space(space, *logits(0.1))
    for of, bad in itertools.product((0, 1), (np.nan, -0.5) if space == "probs" else (np.nan,)):
        arrays = [x.copy(), y.copy()]
        arrays[of][0, 2] = bad
        before = [a.copy() for a in arrays]
        terms = "none" if name in WITH_TERMS else "row"
        options = {"space": space, "return_grad": ("x", "y"), **relatives.PARAMETERS[name][0]}
        for found in call(name, *arrays, reduction=terms, **options):
            spoiled = np.isnan(found)
            of_terms = space != "logits" and terms == "none"
            assert spoiled[0].tolist() == [k == 2 for k in range(7)] if of_terms else spoiled[0].all()
            assert not spoiled[1].any()
        np.testing.assert_array_equal(arrays, before)


def assert_undefined_beside_nothing(name, n, parameters, put=np.asarray, get=np.asarray):
    row, nothing = np.arange(n, dtype=float), np.full(n, -np.inf)
    for first, second in ((row, nothing), (nothing, row), (nothing, nothing)):
        x, y = (put(np.array([a, row])) for a in (first, second))
        for reduction in ("row", "none")[: 1 + (name in WITH_TERMS)]:
            options = {"space": "logits", "reduction": reduction, "return_grad": ("x", "y"), **parameters}
            for found in map(get, call(name, x, y, **options)):
                assert np.isnan(found[0]).all()
                assert not np.any(found[1])


@cases
@pytest.mark.parametrize("n", [1, 3, 1500])
def test_rows_of_logits_that_exclude_everything(case, n):
    """They are undefined, whatever the other row is; the next row is unchanged."""
    name, parameters = case
    assert_undefined_beside_nothing(name, n, parameters)


@names
def test_rows_that_exclude_everything_on_the_gpu(gpu, name):
    assert_undefined_beside_nothing(name, 3, relatives.PARAMETERS[name][0], gpu.put, gpu.get)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("space", [("probs", "probs"), ("counts", "counts"), ("counts", "probs")])
@pytest.mark.parametrize(
    "case", [*CASES, *((name, {}) for name, o in OPERATIONS.items() if not o.single and name not in FAMILY)], ids=shown
)
def test_negative_zeros(case, space, dtype):
    """They count as zeros."""
    name, parameters = case
    x, y = np.array([[[0.5, 0.5, 0.0, 0.0]], [[0.5, 0.0, 0.5, 0.0]]], dtype)
    terms = "none" if OPERATIONS[name].has_terms else "row"
    options = {"space": space, "reduction": terms, "return_grad": ("x", "y"), **parameters}
    expected = call(name, x, y, **options)
    found = call(name, *(np.where(a == 0, -a, a) for a in (x, y)), **options)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@cases
def test_never_negative_among_the_smallest(case, dtype):
    """Subnormal numbers, whose rounding errors are as large as their difference."""
    name, parameters = case
    small = np.arange(6, dtype=dtype) * np.finfo(dtype).smallest_subnormal
    x, y = (a.ravel()[:, None] for a in np.meshgrid(small, small))
    logs = np.log(np.where(y == 0, 1, y), where=y != 0, out=np.full_like(y, -1e4))  # 0 after an exponential, too
    for space, b in (("probs", y), (("probs", "log_probs"), logs)):
        value = call(name, x, b, space=space, **parameters)
        assert (value >= 0).all(), (space, x[value < 0], b[value < 0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_probabilities_out_of_range(dtype):
    """Logits so far apart that p or q is 0 as a float: only classes at -infinity count as excluded."""
    far = np.array([[0.0, -1000.0], [1000.0, 0.0]], dtype)
    near, one = np.zeros((2, 2), dtype), np.array([0.0, -np.inf], dtype)
    kl = klcore.kl_div(near, far, space="logits", return_grad=("x", "y"))
    for name, parameters in (
        ("skew_kl_div", {"alpha": 0}),
        ("alpha_div", {"alpha": 1}),
        ("mixed_kl_div", {"forward": 1}),
    ):
        got = call(name, near, far, space="logits", return_grad=("x", "y"), **parameters)
        for a, b in zip(got, kl, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6 if dtype == "float32" else 1e-13)
    apart = [np.array(a, dtype) for a in ([0, -800], [-10, 0])]
    right = klcore.kl_div(*apart, space="logits")
    np.testing.assert_allclose(klcore.alpha_div(*apart, alpha=1, space="logits"), right, rtol=2e-7)
    np.testing.assert_allclose(klcore.alpha_div(*apart[::-1], alpha=0, space="logits"), right, rtol=2e-7)
    for name in ("chi2_div", "mixed_kl_div", "kl_div"):  # y excludes a class in which x has almost no mass
        assert call(name, far[1], one[::-1], space="logits") == np.inf
        assert call(name, np.array([1000, 0], dtype), one, space="logits") == np.inf
    got = klcore.alpha_div(far[0], far[0][::-1], alpha=0.999, space="logits", return_grad=("x", "y"))
    np.testing.assert_allclose(got[2], [-0.3682477, 0.3682477], rtol=1e-6)  # -(q e^(-a t) - q)/a, t = 1000
    got = klcore.alpha_div(
        *(np.array(a, dtype) for a in ([0, -np.inf], [1, 0])), alpha=1e-20, space="logits", return_grad="x"
    )
    np.testing.assert_array_equal(got[1], 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_skew_next_to_1(dtype):
    """Where m is close to p, and the derivative cancels most."""
    x, y = np.array([[0.2, 0.3, 0.5]], dtype), np.array([[0.21, 0.31, 0.48]], dtype)
    for alpha, space in itertools.product((0.999, 1 - 1e-6, 1 - 1e-9), SAME):
        a, b = (x, y) if space == "probs" else (np.log(x), np.log(y))
        got = klcore.skew_kl_div(a, b, alpha=alpha, space=space, return_grad=("x", "y"))
        assert_right("skew_kl_div", {"alpha": alpha}, a, b, space, got)


ENDS = [("skew_kl_div", {"alpha": alpha}) for alpha in (0.9, 1 - 1e-9, 1 - 2**-52)]
ENDS += [("js_div", {"beta": beta}) for beta in (1e-10, 1e-6, 1 - 2**-52)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [20, 200, 1500])
@pytest.mark.parametrize("case", ENDS, ids=str)
def test_next_to_an_end_from_the_limit_of_scores(case, n, dtype):
    """Flat x and peaked y: scores are measured from that of a class in which y has no mass."""
    name, parameters = case
    x, y = np.zeros((4, n), dtype), np.random.default_rng(2).normal(0, 20, (4, n)).astype(dtype)
    got = getattr(klcore, name)(x, y, space="logits", return_grad=("x", "y"), **parameters)
    assert_right(name, parameters, x, y, "logits", got)


@pytest.mark.parametrize("name", ["kl_div", *WITH_TERMS])
def test_gradients_of_terms_of_rows_that_are_nearly_one_hot(name):
    """The bound of docs/accuracy.md, for a cotangent per term; both rows have the same likeliest class, or not."""
    rng = np.random.default_rng(0)
    parameters = relatives.PARAMETERS.get(name, ({},))[0]
    for lead, other in itertools.product((0, 20, 40), (2, 4)):
        x, y, c = rng.normal(size=(3, 1, 6))
        x[:, 2] += lead
        y[:, other] += lead
        with mock.patch.object(cpu, "compute") as asked:
            call(name, x, y, space="logits", reduction="none", return_grad=("x", "y"), **parameters)
        found = cpu.compute(asked.call_args.args[0]._replace(cotangent=c))
        right = relatives.exact(name, x, y, "logits", 1.0, c, **parameters)
        bound = 4 * oracle.EPS64 * abs(c).max(-1) * right.slope * (lead + 10)
        for got, expected in zip(found, (right.dx, right.dy), strict=True):
            assert (abs(got - expected).sum(-1) <= bound).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_skew_next_to_0(dtype):
    """Where x allows classes in which y has almost no mass, and the formula for values close to 1 would cancel."""
    x, y = np.array([[0.2, 0.3, 0.5]], dtype), np.array([[1e-30, 0.3, 0.7]], dtype)
    for alpha, space in itertools.product((1e-3, 1e-6, 1e-10, 1e-19), SAME):
        a, b = (x, y) if space == "probs" else (np.log(x), np.log(y))
        got = klcore.skew_kl_div(a, b, alpha=alpha, space=space, return_grad=("x", "y"))
        assert_right("skew_kl_div", {"alpha": alpha}, a, b, space, got)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradient_of_tv_dist_next_to_one_hot(dtype):
    """The score of the class with nearly all the mass is 1/2 or -1/2, and the mean of the scores is close to that."""
    for x, y in (([16.14063, -23.827412], [4.967296, -23.752518]), ([0, 0.5, 29], [-0.0625, 0.25, 39.75])):
        a, b = np.array([x], dtype), np.array([y], dtype)
        got = klcore.tv_dist(a, b, space="logits", return_grad=("x", "y"))
        assert_right("tv_dist", {}, a, b, "logits", got)


@pytest.mark.parametrize("alpha", [-20.0, -5.0, -1.0, 2.5, 5.0, 1e3])
def test_alpha_multiplies_what_t_is_off_by(alpha):
    """float32 rows whose shift is that of a class with a large t."""
    rows = (
        ([-0.09862039, 2.0377414], [48.899956, 32.363594]),
        ([14.646183, -1.8782212, 1.9735494], [3.4084294, 5.7012057, 1.9735497]),
        ([0.0, 17.384], [1.976, 0.0]),
        (
            [9.797602, 6.757716, -1.7173711, -2.8473666, -5.2771845],
            [31.997318, 48.57547, 20.489733, 19.347324, 16.919682],
        ),
    )
    for x, y in rows:
        a, b = np.array([x], "float32"), np.array([y], "float32")
        with np.errstate(over="ignore"):
            got = klcore.alpha_div(a, b, alpha=alpha, space="logits", return_grad=("x", "y"))
        if np.isfinite(got[0]).all():
            assert_right("alpha_div", {"alpha": alpha}, a, b, "logits", got)


@pytest.mark.parametrize("beta", [0.01, 0.1])
def test_mixtures_next_to_three_quarters(beta):
    """Three quarters of p: p and m are in two octaves, and the logarithm would cancel."""
    a = np.array([[11.920706, -5.2660513]], "float32") - np.zeros((64, 1), "float32")
    b = a + np.array([[0.0, 1.0]]) * np.log1p(-np.linspace(0.25, 0.26, 64) / (1 - beta))[:, None]
    x, y = in_space("logits", a, b, dtype="float32")
    for name, parameter in (("js_div", "beta"), ("skew_kl_div", "alpha")):
        got = call(name, x, y, space="logits", **{parameter: beta})
        right = relatives.exact(name, x, y, "logits", **{parameter: beta}).value
        np.testing.assert_allclose(got, right, rtol=2.6e-6)


# ---- Rényi divergence, which is not a sum
# ------------------------------------------------------------------------------


def tilted_rows(n, rows=6, dtype="float32", seed=0):
    """Logits of close rows and, every other one, of rows so far apart that the sum no longer determines the value."""
    rng = np.random.default_rng(seed)
    a = rng.normal(0, 3, (rows, n)).astype(dtype)
    b = a + rng.normal(0, 0.3, (rows, n)).astype(dtype)
    for r in range(1, rows, 2):
        b[r] = rng.normal(0, 10.0**r, n)
    return a, b


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.5, 30.0])
@pytest.mark.parametrize("space", SAME)
def test_renyi_of_rows_far_apart(space, alpha):
    """Where alpha_div is close to its bound, or beyond float64, against its definition in NumPy."""
    x, y = in_space(space, *tilted_rows(6, dtype="float64"))
    with np.errstate(divide="ignore"):
        log_p, log_q = (np.log(v) if space == "probs" else v - log_sum_exp(v)[..., None] for v in (x, y))
        expected = log_sum_exp(alpha * log_p + (1 - alpha) * log_q) / (alpha - 1)
    got = klcore.renyi_div(x, y, alpha=alpha, space=space)
    np.testing.assert_allclose(got[1::2], expected[1::2], rtol=1e-12)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("alpha", [1e3, 1e6, 1e10])
def test_renyi_of_close_rows_at_a_large_alpha(alpha, dtype):
    """They are tilted as well: alpha multiplies the error of log q - log p."""
    for far, offset in itertools.product((1e-12, 1e-6, 1e-2), (0.0, 37.0)):
        a, b = logits(far)
        x, y = in_space("logits", a, b + offset, dtype=dtype)
        got = klcore.renyi_div(x, y, alpha=alpha, space="logits", return_grad=("x", "y"))
        assert_right("renyi_div", {"alpha": alpha}, x, y, "logits", got)
    x = np.array([[0.25, 0.25, 0.5], [0.25, 0.75, 1e-35]], dtype)
    y = np.array([[0.5, 0.4375, 0.0625], [0.5, 0.5, 1e-37]], dtype)
    dx, dy = klcore.renyi_div(x, y, alpha=alpha, return_grad=("x", "y"))[1:]
    rtol = 1e-6 if dtype == "float32" else 1e-11
    np.testing.assert_allclose(dx, [[0, 0, 2 * alpha / (alpha - 1)], [0, 0, alpha / (alpha - 1) / x[1, 2]]], rtol)
    np.testing.assert_allclose(dy, [[0, 0, -16], [0, 0, -1 / y[1, 2]]], rtol)


def test_renyi_where_the_gradient_of_alpha_div_is_out_of_range(gpu):
    """In float32, while its own gradient is in range."""
    x, y = np.float32([[0.3, 0.7, 1e-10]]), np.float32([[1e-22, 0.9, 1e-30]])
    for alpha in (2.0, 3.0):
        got = klcore.renyi_div(x, y, alpha=alpha, return_grad=("x", "y"))
        right = klcore.renyi_div(x.astype("float64"), y.astype("float64"), alpha=alpha, return_grad=("x", "y"))
        for a, b in zip(got, right, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-5 * np.abs(b).sum())
        alike(map(gpu.get, klcore.renyi_div(gpu.put(x), gpu.put(y), alpha=alpha, return_grad=("x", "y"))), got)


@pytest.mark.parametrize("alpha", [0.25, 2.0])
@pytest.mark.parametrize("space", [*SAME, "counts", ("probs", "logits")], ids=str)
def test_renyi_at_zeros(space, alpha):
    p, q = np.array([[0.25, 0.0, 0.75, 0.0]] * 2), np.array([[0.5, 0.25, 0.25, 0.0], [0.5, 0.5, 0.0, 0.0]])
    pair = (space, space) if isinstance(space, str) else space
    with np.errstate(divide="ignore"):
        made = {"probs": p, "counts": 8 * p, "logits": np.log(p) + 3, "log_probs": np.log(p)}[pair[0]]
        other = {"probs": q, "counts": 8 * q, "logits": np.log(q) + 3, "log_probs": np.log(q)}[pair[1]]
        terms = np.where(p > 0, p**alpha * np.where(q > 0, q, 1) ** (1 - alpha), 0)
        terms = np.where((p > 0) & (q == 0), np.inf if alpha > 1 else 0.0, terms)
        expected = np.log(terms.sum(-1)) / (alpha - 1)
    np.testing.assert_allclose(klcore.renyi_div(made, other, alpha=alpha, space=space), expected, rtol=1e-13)
    apart = klcore.renyi_div([[1.0, 0.0]], [[0.0, 1.0]], alpha=alpha, return_grad=("x", "y"))
    assert apart[0] == np.inf
    assert np.isnan(apart[1:]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("space", ["logits", "counts", "probs", "log_probs", ("counts", "logits")], ids=str)
def test_renyi_by_differences(space, dtype):
    """The gradient of tilted rows, in every space, against differences of the value."""
    pair = (space, space) if isinstance(space, str) else space
    x, y = (np.abs(a) + 0.1 if s == "counts" else a for a, s in zip(tilted_rows(5, 2), pair, strict=True))
    x, y = (
        softmax(a) if s == "probs" else np.log(softmax(a)) if s == "log_probs" else a
        for a, s in zip((x, y), pair, strict=True)
    )
    x, y = x.astype(dtype).astype("float64"), y.astype(dtype).astype("float64")
    if pair[0] == "probs":
        y = np.maximum(y, 1e-9)
    for alpha in (0.1, 3.0):

        def value(x, y, alpha=alpha):
            return klcore.renyi_div(x, y, alpha=alpha, space=space)

        found = klcore.renyi_div(x.astype(dtype), y.astype(dtype), alpha=alpha, space=space, return_grad=("x", "y"))
        for of, got in enumerate(found[1:]):
            expected = np.zeros_like(x)
            by = (x, y)[of] if pair[of] in ("probs", "counts") else np.ones_like(x)  # for these, by the logarithm
            for i in range(x.shape[-1]):
                step = np.zeros_like(x)
                step[:, i] = 1e-6 * by[:, i]
                up, down = [x, y], [x, y]
                up[of], down[of] = up[of] + step, down[of] - step
                expected[:, i] = (value(*up) - value(*down)) / 2e-6
            scale = np.abs(expected).sum(-1, keepdims=True)
            np.testing.assert_allclose(got * by / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [5, 300, 2100])
def test_renyi_on_the_gpu(gpu, n):
    """A warp with tilted rows beside others; chunks of tilted rows, merged."""
    for space, alpha in itertools.product(("logits", "probs", "counts", ("probs", "logits")), (0.1, 4.0)):
        pair = (space, space) if isinstance(space, str) else space
        made = (
            np.abs(a) if s == "counts" else softmax(a) if s == "probs" else a
            for a, s in zip(tilted_rows(n), pair, strict=True)
        )
        x, y = (a.astype("float32") for a in made)
        options = {"alpha": alpha, "space": space, "return_grad": ("x", "y"), "reduction": "mean"}
        expected = klcore.renyi_div(x, y, **options)
        alike(map(gpu.get, klcore.renyi_div(gpu.put(x), gpu.put(y), **options)), expected)


# ---- what they promise -----------------------------------------------------------------------------------------------

rows_of_logits = hnp.arrays(
    st.sampled_from(["float32", "float64"]),
    st.tuples(st.just(2), st.integers(1, 9)),
    elements=st.floats(-60, 60, width=32) | st.just(-float("inf")),
)


@pytest.mark.quick(4)
@cases
@given(rows=rows_of_logits, space=st.sampled_from(SAME))
def test_never_negative(case, rows, space):
    """And exactly 0 for equal rows."""
    name, parameters = case
    rows[:, 0] = 0  # a row that excludes every class is undefined
    with np.errstate(divide="ignore"):
        made = rows if space == "logits" else softmax(rows) if space == "probs" else np.log(softmax(rows))
    x, y = made.astype(rows.dtype)
    value, dx, dy = call(name, x, y, space=space, return_grad=("x", "y"), **parameters)
    assert value >= 0
    if name in WITH_TERMS:
        terms = call(name, x, y, space=space, reduction="none", **parameters)
        assert (terms >= 0).all()
    value, dx, dy = call(name, x, x, space=space, return_grad=("x", "y"), **parameters)
    assert value == 0
    inside = (x > 0) if space == "probs" else np.isfinite(x)
    assert (dx[inside] == 0).all()
    assert (dy[inside] == 0).all()


@given(seed=st.integers(0, 2**31), far=st.sampled_from([1e-9, 1e-3, 1.0, "far"]), beta=st.floats(0.01, 0.99))
def test_what_is_bounded_by_what(seed, far, beta):
    """Identities and inequalities between them, which no implementation uses."""
    a, b = logits(far, 9, 3, seed)
    kl, tv, hellinger = (call(name, a, b, space="logits") for name in ("kl_div", "tv_dist", "sq_hellinger"))
    slack = 1 + 1e-12
    assert (2 * tv**2 <= kl * slack).all()  # Pinsker
    assert (hellinger <= tv * slack).all()
    assert (tv**2 <= 2 * hellinger * slack).all()
    js = klcore.js_div(a, b, beta=beta, space="logits")
    np.testing.assert_allclose(klcore.js_div(b, a, beta=1 - beta, space="logits"), js, rtol=1e-12)
    assert (js <= (-beta * np.log(beta) - (1 - beta) * np.log1p(-beta)) * slack).all()
    scaled = klcore.js_div(a, b, beta=beta, scaled=True, space="logits")
    np.testing.assert_allclose(scaled, js / (beta * (1 - beta)), rtol=1e-13)
    alpha = {k: klcore.alpha_div(a, b, alpha=k, space="logits") for k in (0.5, 2.0, 0.3)}
    np.testing.assert_allclose(alpha[0.5], 4 * hellinger, rtol=1e-12)
    np.testing.assert_allclose(alpha[2.0], klcore.chi2_div(a, b, space="logits") / 2, rtol=1e-12)
    np.testing.assert_allclose(klcore.alpha_div(b, a, alpha=0.7, space="logits"), alpha[0.3], rtol=1e-12)
    renyi = {k: klcore.renyi_div(a, b, alpha=k, space="logits") for k in (0.3, 0.5, 0.7, 1.0, 2.0)}
    np.testing.assert_allclose(np.expm1(-renyi[0.5] / 2), -hellinger, rtol=1e-12)
    np.testing.assert_allclose(renyi[2.0], np.log1p(2 * alpha[2.0]), rtol=1e-12)
    swapped = klcore.renyi_div(b, a, alpha=0.7, space="logits")
    np.testing.assert_allclose(renyi[0.3] / 0.3, swapped / 0.7, rtol=1e-12)
    assert all((np.diff([renyi[k] for k in sorted(renyi)], axis=0) >= -1e-12 * renyi[2.0]).ravel())
    skew = beta * klcore.skew_kl_div(a, b, alpha=beta, space="logits")
    skew = skew + (1 - beta) * klcore.skew_kl_div(b, a, alpha=1 - beta, space="logits")
    np.testing.assert_allclose(skew, js, rtol=1e-12)


def test_limits():
    """Where a parameter turns one function into another, it does so continuously."""
    a, b = logits(0.7, 9, 3)
    kl, reverse = klcore.kl_div(a, b, space="logits"), klcore.kl_div(b, a, space="logits")
    for parameter, expected in ((0, kl), (1, reverse), (1e-9, kl), (1 - 1e-9, reverse)):
        got = klcore.js_div(a, b, beta=parameter, scaled=True, space="logits")
        np.testing.assert_allclose(got, expected, rtol=1e-8 if parameter % 1 else 1e-14)
    for parameter, expected in ((1, kl), (0, reverse), (1 + 1e-12, kl), (1 - 1e-12, kl), (1e-12, reverse)):
        got = klcore.alpha_div(a, b, alpha=parameter, space="logits")
        np.testing.assert_allclose(got, expected, rtol=1e-11 if parameter % 1 else 1e-14)
    for parameter in (1, 1 - 1e-12, 1 + 1e-12):
        got = klcore.renyi_div(a, b, alpha=parameter, space="logits")
        np.testing.assert_allclose(got, kl, rtol=1e-11 if parameter % 1 else 1e-14)
    np.testing.assert_allclose(klcore.skew_kl_div(a, b, alpha=0, space="logits"), kl, rtol=1e-14)
    np.testing.assert_allclose(klcore.mixed_kl_div(a, b, space="logits"), (kl + reverse) / 2, rtol=1e-14)


@names
def test_words(name):
    """Reductions, weights, axes and broadcasting mean the same as for kl_div."""
    parameters = relatives.PARAMETERS[name][-1]
    x, y = (a.reshape(2, 3, 8) for a in in_space("logits", *logits(0.5, 8, 6)))
    options = {"space": "logits", **parameters}
    by_row = call(name, x, y, **options)
    assert by_row.shape == (2, 3)
    if name in WITH_TERMS:
        terms = call(name, x, y, reduction="none", **options)
        assert terms.shape == x.shape
        np.testing.assert_allclose(terms.sum(-1), by_row, rtol=1e-12)
    weights = np.array([[1.0, 0.0, 2.5], [0.5, 1.0, 0.0]])
    spoiled = np.where(weights[..., None] == 0, np.nan, x)  # rows of weight 0 are skipped
    wanted = {"sum": 1, "rowmean": weights.sum(), "batchmean": 2, "mean": x.size}
    for reduction, divisor in wanted.items():
        got, dx = call(name, spoiled, y, reduction=reduction, weights=weights, return_grad="x", **options)
        np.testing.assert_allclose(got, (weights * by_row).sum() / divisor, rtol=1e-13)
        alone = call(name, x, y, return_grad="x", **options)[1]
        np.testing.assert_allclose(dx, alone * weights[..., None] / divisor, rtol=1e-12, atol=1e-300)
    moved = call(name, np.moveaxis(x, -1, 0), np.moveaxis(y, -1, 0), axis=0, **options)
    np.testing.assert_array_equal(moved, by_row)
    value, dy = call(name, x, y[:, :1], return_grad="y", **options)
    every = call(name, x, np.repeat(y[:, :1], 3, 1), return_grad="y", **options)
    np.testing.assert_array_equal(value, every[0])
    np.testing.assert_allclose(dy, every[1].sum(1, keepdims=True), rtol=1e-12, atol=1e-16)
    out = np.empty((2, 3)), np.empty_like(x)
    got = call(name, x, y, out=out, return_grad="x", **options)
    assert all(a is b for a, b in zip(got, out, strict=True))
    np.testing.assert_array_equal(out[0], by_row)


@names
def test_narrow_numbers(name):
    """16 bits: computed as the float32 numbers that they are."""
    bfloat16 = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed").bfloat16
    for space, dtype in itertools.product(SAME, (np.float16, bfloat16)):
        x, y = (a.astype(dtype) for a in in_space(space, *logits(0.5), dtype="float32"))
        options = {"space": space, "return_grad": ("x", "y"), **relatives.PARAMETERS[name][0]}
        got = call(name, x, y, **options)
        like = call(name, x.astype("float32"), y.astype("float32"), **options)
        np.testing.assert_array_equal(got[0], like[0])
        for a, b in zip(got[1:], like[1:], strict=True):
            assert a.dtype == dtype
            np.testing.assert_array_equal(a, b.astype(dtype))


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("js_div", {"beta": 0}, "at beta=0 the Jensen-Shannon divergence is 0 for all x and y; TRL and Liger-Kernel "),
        ("js_div", {"beta": 0}, r"return kl_div\(x, y\) there: call that, or pass scaled=True"),
        ("js_div", {"beta": 1.0}, r"at beta=1 .* return kl_div\(y, x\) there"),
        ("js_div", {"beta": -0.1}, r"beta must be in \(0, 1\); found -0.1"),
        ("js_div", {"beta": float("nan")}, r"beta must be in \(0, 1\); found nan"),
        ("js_div", {"beta": 1.5, "scaled": True}, r"beta must be in \[0, 1\]; found 1.5"),
        ("mixed_kl_div", {"forward": 1.01}, r"forward must be in \[0, 1\]; found 1.01"),
        ("mixed_kl_div", {"forward": float("nan")}, r"forward must be in \[0, 1\]; found nan"),
        ("skew_kl_div", {"alpha": 1}, r"alpha must be in \[0, 1\); found 1.0"),
        ("alpha_div", {"alpha": float("inf")}, "alpha must be 0, or a number of magnitude 1e-20 to 1e.20; found inf"),
        ("alpha_div", {"alpha": 1e-44}, "alpha must be 0, or a number of magnitude 1e-20 to 1e.20; found 1e-44"),
        ("alpha_div", {"alpha": 10**400}, "alpha must be 0, or a number of magnitude"),
        ("js_div", {"beta": 1e-50, "scaled": True}, "beta must be 0 with scaled=True, or at least 1e-20; found 1e-50"),
        ("skew_kl_div", {"alpha": 1e-50}, "alpha must be 0, or at least 1e-20; found 1e-50"),
        ("renyi_div", {"alpha": 0}, "alpha must be a number from 1e-20 to 1e.20; found 0.0"),
        ("renyi_div", {"alpha": float("inf")}, "alpha must be a number from 1e-20 to 1e.20; found inf"),
        ("renyi_div", {"alpha": 2, "reduction": "none"}, "renyi_div is not a sum over classes, so it has no terms"),
        (
            "renyi_div",
            {"alpha": 2, "reduction": "each"},
            "must be one of 'row', 'sum', 'rowmean', 'batchmean', 'mean'; found 'each'",
        ),
    ],
)
def test_wrong_parameters(name, parameters, message):
    out = np.full(2, 7.0)
    with pytest.raises(ValueError, match=message):
        call(name, np.ones((2, 3)), np.ones((2, 3)), out=out, **parameters)
    assert (out == 7).all()


@pytest.mark.parametrize("value", ["0.5", b"0.5", bytearray(b"0.5"), None, [0.5, 0.5], 1j])
def test_parameters_that_are_no_numbers(value):
    for name, keyword in (("js_div", "beta"), ("mixed_kl_div", "forward"), ("alpha_div", "alpha")):
        with pytest.raises(TypeError, match=f"{keyword} must be a number; found"):
            call(name, [1.0], [1.0], **{keyword: value})


# ---- the same bits, and other libraries ------------------------------------------------------------------------------


def alike(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("n", [5, 1500])
@names
def test_threads_and_instruction_sets(name, n):
    """And each row separately."""
    for space, dtype in itertools.product(SAME, ("float32", "float64")):
        x, y = in_space(space, *logits(0.5, n, 6), dtype=dtype)
        if space == "logits":
            x[1, 3], y[2, 4], x[3] = -np.inf, -np.inf, 9 * x[3]
        options = {"space": space, "return_grad": ("x", "y"), **relatives.PARAMETERS[name][0]}
        with klcore.threads(1):
            expected = call(name, x, y, **options)
        before = _cpu.instruction_set()
        try:
            for isa in (k for k, supported in _cpu.instruction_sets().items() if supported):
                _cpu.use_instruction_set(isa)
                with klcore.threads(4):
                    alike(call(name, x, y, **options), expected)
        finally:
            _cpu.use_instruction_set(before)
        for k in range(len(x)):
            alike(call(name, x[k], y[k], **options), [a[k] for a in expected])


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in FAMILY), (FAMILY[0], "float64"), (FAMILY[0], "float16")]
)
def test_bits_of_the_gpu(gpu, name, dtype):
    """Rows that share a warp, rows of one chunk, and rows of several, each with its own kernels."""
    parameters = relatives.PARAMETERS[name][-1]
    for space, (rows, n) in zip(
        ("logits", "logits", "logits", "probs", "log_probs", ("probs", "logits")),
        ((3, 5), (2, 300), (2, 2100), (3, 40), (3, 40), (2, 300)),
        strict=True,
    ):
        x, y = in_space(space, *logits(0.5, n, rows), dtype="float32")
        if "logits" in (space, space[-1]):
            y[1, 3] = -np.inf
        x, y = x.astype(dtype), y.astype(dtype)
        options = {"space": space, **parameters}
        expected = call(name, x, y, return_grad=("x", "y"), **options)
        there = gpu.put(x), gpu.put(y)
        alike(map(gpu.get, call(name, *there, return_grad=("x", "y"), **options)), expected)
        if name in WITH_TERMS:
            terms = call(name, *there, reduction="none", **options)
            alike([gpu.get(terms)], [call(name, x, y, reduction="none", **options)])


def test_weights_of_any_size(gpu):
    """A factor of the result, and weights whose sum is out of range, which are first scaled to its middle."""
    x, y = in_space("logits", *logits(0.5, 5, 3), dtype="float32")
    for size in (5e-324, 1.0, 1e308):
        options = {"beta": 0.3, "scaled": True, "space": "logits", "reduction": "rowmean", "return_grad": ("x", "y")}
        weights = np.array([1.0, 1.0, 0.0]) * size
        expected = klcore.js_div(x, y, weights=weights, **options)
        found = klcore.js_div(gpu.put(x), gpu.put(y), weights=gpu.put(weights), **options)
        alike(map(gpu.get, found), expected)
        np.testing.assert_allclose(expected[0], klcore.js_div(x[:2], y[:2], **options)[0], rtol=2e-7)


@pytest.mark.quick(3)
@names
def test_pytorch(name):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    parameters = relatives.PARAMETERS[name][0]
    for space in SAME:
        x, y = in_space(space, *logits(0.5, 5, 2))
        a, b = (torch.tensor(v, requires_grad=True) for v in (x, y))

        def loss(a, b, space=space):
            return call(name, a, b, space=space, reduction="rowmean", **parameters)

        expected = call(name, x, y, space=space, reduction="rowmean", return_grad=("x", "y"), **parameters)
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        torch.compiler.reset()
        for f in (loss, compiled):
            a.grad = b.grad = None
            value = f(a, b)
            value.backward()
            assert value.item() == expected[0]
            alike([a.grad.numpy(), b.grad.numpy()], expected[1:])
        assert torch.autograd.gradcheck(loss, (a, b))
        mapped = torch.vmap(lambda a, b, space=space: call(name, a, b, space=space, **parameters))(a, b)
        alike([mapped.detach().numpy()], [call(name, x, y, space=space, **parameters)])


@names
def test_jax(name):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    parameters = relatives.PARAMETERS[name][0]
    x, y = in_space("logits", *logits(0.5, 5, 2), dtype="float32")

    def loss(a, b):
        return call(name, a, b, space="logits", reduction="rowmean", **parameters)

    expected = call(name, x, y, space="logits", reduction="rowmean", return_grad=("x", "y"), **parameters)
    for f in (jax.value_and_grad(loss, (0, 1)), jax.jit(jax.value_and_grad(loss, (0, 1)))):
        value, gradients = f(x, y)
        alike(map(np.asarray, (value, *gradients)), expected)


@names
def test_dask(name):
    """Chunks along the classes, too: they are multiples of klcore's chunks, so the bits are those of whole rows."""
    da = pytest.importorskip("dask.array", reason="dask is not installed")
    parameters = relatives.PARAMETERS[name][0]
    x, y = in_space("logits", *logits(0.5, 2500, 3))
    a, b = (da.from_array(v, chunks=(2, 1024)) for v in (x, y))
    options = {"space": "logits", "weights": np.array([1.0, 0.0, 2.0]), **parameters}
    for reduction in ("row", "rowmean"):
        expected = call(name, x, y, reduction=reduction, return_grad=("x", "y"), **options)
        found = call(name, a, b, reduction=reduction, return_grad=("x", "y"), **options)
        alike([v.compute() for v in found], expected)
    if name in WITH_TERMS:
        expected = call(name, x, y, reduction="none", **options)
        alike([call(name, a, b, reduction="none", **options).compute()], [expected])
