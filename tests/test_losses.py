"""Other systems' terms in the engine, and products of cotangent and Jacobian: what klcore.compat and the adapters use.

The front-ends are tested against what the systems returned in test_compat_*.py; here against their formulas in extended
precision, on every device, with the CPU's bits on the GPU.
"""

import functools
import importlib

import numpy as np
import oracle
import pytest
from conftest import DTYPES, call

import klcore
from klcore.divergence import loss
from klcore.operations import KL_DIV, OPERATIONS, Call
from klcore.operations import LOSSES as LOSSES_TABLE

NAN, INF = float("nan"), float("inf")
PROBS = (0.0, -0.0, 1e-45, 1e-30, 1e-7, 1e-3, 0.25, 0.5, 1.0, 2.0, -0.5, -1e-13, INF, -INF, NAN)
LOGS = (0.0, -1e-3, -1.0, -30.0, -200.0, 5.0, INF, -INF, NAN)
EPSILON = {"keras": 1e-7, "mxnet": 1e-12}
# term and spaces of x and y
LOSSES = tuple((name, *pair) for name, o in LOSSES_TABLE.items() for pair in o.pairs)
WITH_DX = tuple(named for named in LOSSES if "x" in LOSSES_TABLE[named[0]].gradients)
SEPARABLE = tuple(named for named in LOSSES if "logits" not in named)
NAMES = ["-".join(named) for named in LOSSES]


def backend(device):
    return importlib.import_module("klcore.backends.cpu" if device.numpy else "klcore.backends.cuda")


# ---- the formulas, in extended precision -----------------------------------------------------------------------------


def clip(a, e):
    return np.where(a < e, e, np.where(a > 1, 1, a))


def log_softmax(a):
    a = a - a.max(-1, keepdims=True)
    return a - np.log(np.exp(a).sum(-1, keepdims=True))


def formula(term, space_x, x, y, e, least):
    """(value, d value/dx, d value/dy) of each term; y as logarithms. Exponentials below `least` are zero."""
    if term == "pytorch" and space_x == "probs":
        value = np.where(x == 0, 0, x * np.log(x)) - x * y
        return value, np.log(x) + x / x - y, -x
    if term == "pytorch":
        p = np.where(np.exp(x) < least, 0, np.exp(x))
        return p * (x - y), p * (x - y + 1), -p
    if term == "keras":
        a, b = clip(x, e), clip(y, e)
        dx = np.where((x >= e) & (x <= 1), np.log(a / b) + 1, 0)
        return a * np.log(a / b), dx, np.where((y >= e) & (y <= 1), -a / b, 0)
    if term == "mxnet":
        return x * (np.log(x + e) - y), np.log(x + e) - y + x / (x + e), -x
    p = x if space_x == "probs" else np.exp(x)
    log_p = np.log(x) if space_x == "probs" else x
    return np.where(p > 0, p * (log_p - y), 0), None, p - np.exp(y)


def exact(named, x, y):
    """The same of x and y as they are given, and the derivatives through the softmax."""
    term, space_x, space_y = named
    dtype = np.result_type(x, y)
    e = np.longdouble(dtype.type(EPSILON.get(term, 0)))
    x, y = np.broadcast_arrays(np.asarray(x, np.longdouble), np.asarray(y, np.longdouble))
    with np.errstate(all="ignore"):
        x = log_softmax(x) if space_x == "logits" else x
        ly = log_softmax(y) if space_y == "logits" else y
        value, dx, dy = formula(term, space_x, x, ly, e, np.longdouble(np.finfo(dtype).smallest_subnormal) / 2)
        if space_y == "logits" and term != "puzzlelib":
            dy = dy - np.exp(ly) * dy.sum(-1, keepdims=True)
    return value, dx, dy


def assert_near(found, expected, dtype, size=1.0):
    found, expected = np.asarray(found, np.longdouble), np.asarray(expected, np.longdouble)
    assert found.shape == expected.shape
    with np.errstate(all="ignore"):
        same = (found == expected) | (np.isnan(found) & np.isnan(expected))
        # a few roundings of the numbers that a term is made of; beyond the dtype's range, infinite
        near = np.abs(found - expected) <= 8 * np.finfo(dtype).eps * np.maximum(size, np.abs(expected))
        far = (np.abs(expected) > np.finfo(dtype).max) & (found == np.copysign(np.inf, expected))
    assert (same | near | far).all(), (found[~(same | near | far)][:5], expected[~(same | near | far)][:5])


def table(named, dtype):
    x, y = (np.array(PROBS if space == "probs" else LOGS, dtype) for space in named[1:])
    grid = np.meshgrid(x, y, indexing="ij")
    return tuple(a.reshape(-1, 1).copy() for a in grid)


def rows_of(named, shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    out = []
    for space in named[1:]:
        z = rng.normal(size=shape) * 2
        if space != "logits":
            z -= np.log(np.exp(z).sum(-1, keepdims=True))
        out.append((np.exp(z) if space == "probs" else z).astype(dtype))
    if named[1] == "probs":
        out[0][rng.random(shape) < 0.1] = 0
    return out


# ---- values and derivatives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("named", SEPARABLE, ids="-".join)
def test_every_corner(device, named, dtype):
    x, y = table(named, dtype)
    epsilon = EPSILON.get(named[0], 0.0)
    found = loss(
        named[0], device.put(x), device.put(y), space=named[1:], reduction="none", epsilon=epsilon,
        return_grad=("x", "y"),
    )  # fmt: skip
    with np.errstate(all="ignore"):
        size = np.nan_to_num(1 + np.abs(x) * (1 + np.abs(y)), nan=1.0, posinf=1.0, neginf=1.0)
        size *= np.exp(np.clip(np.nan_to_num(x), 0, 80)) if named[1] == "log_probs" else 1
    for f, e in zip(found, exact(named, x, y), strict=True):
        assert_near(device.get(f), e, dtype, size)


@pytest.mark.parametrize("n", [1, 5, 300, 2100])
@pytest.mark.parametrize("named", LOSSES, ids=NAMES)
def test_rows(device, named, n):
    x, y = rows_of(named, (7, n), "float32")
    epsilon = EPSILON.get(named[0], 0.0)
    value, _, dy = exact(named, x, y)
    found, gradient = loss(
        named[0], device.put(x), device.put(y), space=named[1:], epsilon=epsilon, return_grad="y", denominator=4.0
    )
    assert_near(device.get(found), value.sum(-1) / 4, "float32", 1 + np.abs(value).sum(-1))
    assert_near(device.get(gradient), dy / 4, "float32")
    total = loss(named[0], device.put(x), device.put(y), space=named[1:], epsilon=epsilon, reduction="sum")
    assert_near(device.get(total), value.sum(), "float32", 1 + np.abs(value).sum())


@pytest.mark.parametrize("named", LOSSES, ids=NAMES)
def test_bits_of_the_gpu(gpu, named, record_property):
    """And with factors: of rows, of terms."""
    x, y = rows_of(named, (5, 1100), "float32", 1)
    rng = np.random.default_rng(2)
    wanted = "y" if named[0] == "puzzlelib" else ("x", "y")
    for factors in (None, rng.normal(size=(5, 1)), rng.normal(size=(5, 1100)).astype("float32")):
        arguments = {
            "space": named[1:], "epsilon": EPSILON.get(named[0], 0.0), "reduction": "row", "return_grad": wanted
        }  # fmt: skip
        expected = loss(named[0], x, y, factors=factors, **arguments)
        put = None if factors is None else gpu.put(factors)
        found = loss(named[0], gpu.put(x), gpu.put(y), factors=put, **arguments)
        for f, e in zip(found, expected, strict=True):
            np.testing.assert_array_equal(gpu.get(f), e)


def test_quick_way_in_has_the_same_bits():
    """Contiguous arrays take it; others, and other dtypes of the value, do not."""
    for named in LOSSES:
        x, y = rows_of(named, (6, 40), "float32", 3)
        apart = [np.repeat(a, 2, axis=1)[:, ::2] for a in (x, y)]
        for reduction in ("row", "sum"):
            arguments = {"space": named[1:], "epsilon": 1e-7, "reduction": reduction, "return_grad": "y"}
            for f, e in zip(loss(named[0], x, y, **arguments), loss(named[0], *apart, **arguments), strict=True):
                np.testing.assert_array_equal(f, e)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("reduction", ["row", "sum", "none"])
def test_dtype_of_the_value(device, name, reduction):
    x, y = rows_of(LOSSES[0], (4, 30), DTYPES[name], 4)
    a, b = device.put(x), device.put(y)
    wide = loss("pytorch", a, b, space=LOSSES[0][1:], reduction=reduction)
    found = loss("pytorch", a, b, space=LOSSES[0][1:], reduction=reduction, dtype=name)
    assert found.dtype == DTYPES[name]
    np.testing.assert_array_equal(device.get(found), device.get(wide).astype(DTYPES[name]))


SHAPES = (((3, 4), (4,)), ((3, 4), (3, 1)), ((1, 4), (3, 1)), ((3, 1), (3, 4)), ((2, 1, 4), (3, 4)), ((), (3, 4)))


@pytest.mark.parametrize(("shape_x", "shape_y"), SHAPES)
@pytest.mark.parametrize("reduction", ["row", "none", "sum"])
def test_broadcasting_over_all_axes(device, shape_x, shape_y, reduction):
    rng = np.random.default_rng(5)
    x, y = rng.random(shape_x) + 0.1, rng.normal(size=shape_y)
    value, dx, dy = exact(LOSSES[0], x, y)
    found = loss(
        "pytorch", device.put(x), device.put(y), space=LOSSES[0][1:], reduction=reduction, return_grad=("x", "y")
    )
    expected = {"row": value.sum(-1), "none": value, "sum": value.sum()}[reduction]
    assert_near(device.get(found[0]), expected, "float64", 10)
    for f, d, operand in ((found[1], dx, x), (found[2], dy, y)):
        lead = tuple(range(d.ndim - operand.ndim))
        kept = tuple(k for k, size in enumerate(operand.shape) if size == 1 and d.shape[k + len(lead)] > 1)
        assert_near(device.get(f), d.sum(lead).sum(kept, keepdims=True), "float64", 10)


def test_pairs_of_spaces_are_checked():
    with pytest.raises(ValueError, match=r"'keras' does not support the spaces \('probs', 'logits'\)"):
        loss("keras", [0.5], [0.5], space=("probs", "logits"))


def test_puzzlelib_is_not_differentiated():
    """What it calls a gradient is a direction of descent: autograd would go the other way."""
    torch = pytest.importorskip("torch", reason="not run: PyTorch is not installed")
    jax = pytest.importorskip("jax", reason="not run: JAX is not installed")
    a = np.ones((2, 3), np.float32)
    value = loss("puzzlelib", torch.from_numpy(a), torch.from_numpy(a).requires_grad_(), space=("probs", "logits"))
    assert not value.requires_grad
    b = jax.numpy.asarray(a)
    with pytest.raises(NotImplementedError, match="direction of descent"):
        jax.grad(lambda y: loss("puzzlelib", b, y, space=("logits", "logits"), reduction="sum"))(b)


@pytest.mark.parametrize("of", ["x", ("x", "y")])
def test_gradient_that_puzzlelib_does_not_have(of):
    with pytest.raises(ValueError, match="must be one of None, 'y' for 'puzzlelib'"):
        loss("puzzlelib", np.ones((2, 2)), np.ones((2, 2)), space=("probs", "logits"), return_grad=of)


# ---- products of cotangent and Jacobian ------------------------------------------------------------------------------


def numbers(space, shape, seed):
    z = np.random.default_rng(seed).normal(size=shape)
    return np.exp(z) if space == "probs" else z


def jacobian_product(function, x, cotangent, step=1e-6):
    """Central differences of sum(cotangent * function(x))."""
    out = np.empty_like(x)
    for index in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            ends.append(np.sum(cotangent * function(moved)))
        out[index] = (ends[0] - ends[1]) / (2 * step)
    return out


@pytest.mark.parametrize("reduction", ["row", "none", "sum", "rowmean", "batchmean", "mean"])
@pytest.mark.parametrize(("operation", "space"), oracle.CALLS)
def test_product_with_the_jacobian(operation, space, reduction):
    row, x, y = OPERATIONS[operation], numbers(space[0], (3, 4), 6), numbers(space[1], (3, 4), 7)
    weights = np.array([0.5, 2.0, 1.0])
    function = functools.partial(call, operation, space=space, reduction=reduction, weights=weights)
    cotangent = np.random.default_rng(8).normal(size=np.shape(function(x, y)))
    cpu = importlib.import_module("klcore.backends.cpu")
    of = (x, None, space[0]) if row.single else (x, y, space)
    found = cpu.compute(Call(row, *of, -1, reduction, weights, return_grad=row.gradients, cotangent=cotangent))
    expected = [
        jacobian_product(lambda a: function(a, y), x, cotangent),
        jacobian_product(lambda b: function(x, b), y, cotangent),
    ]
    for f, e in zip(found, expected[: len(row.gradients)], strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["row", "none", "sum"])
@pytest.mark.parametrize("named", WITH_DX, ids="-".join)
def test_product_with_the_jacobian_of_a_loss(named, reduction):
    x, y = (numbers(space, (3, 4), seed) for seed, space in enumerate(named[1:]))
    x, y = (a / 4 if space == "probs" else a for a, space in zip((x, y), named[1:], strict=True))
    keywords = {"space": named[1:], "reduction": reduction, "epsilon": 1e-7, "denominator": 3.0}
    cotangent = np.random.default_rng(9).normal(size=np.shape(loss(named[0], x, y, **keywords)))
    cpu = importlib.import_module("klcore.backends.cpu")
    asked = Call(LOSSES_TABLE[named[0]], x, y, named[1:], -1, reduction, denominator=3.0, parameter=1e-7)
    found = cpu.compute(asked._replace(cotangent=cotangent, return_grad=("x", "y")))
    expected = (
        jacobian_product(lambda a: loss(named[0], a, y, **keywords), x, cotangent),
        jacobian_product(lambda b: loss(named[0], x, b, **keywords), y, cotangent),
    )
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("space", ["probs", "logits"])
@pytest.mark.parametrize("reduction", ["row", "none", "rowmean", "sum"])
def test_products_have_the_bits_of_the_cpu(gpu, space, reduction):
    """Weighted, y broadcast, and from a cotangent that only the GPU knows."""
    x, y = (numbers(space, shape, seed).astype("float32") for seed, shape in enumerate(((5, 1100), (1100,))))
    weights = np.arange(5.0)
    value = klcore.kl_div(x, y, space=space, reduction=reduction, weights=weights)
    cotangent = np.random.default_rng(10).normal(size=np.shape(value))
    cpu = importlib.import_module("klcore.backends.cpu")
    call = Call(KL_DIV, x, y, space, -1, reduction, weights, return_grad=("x", "y"), cotangent=cotangent)
    expected = cpu.compute(call)
    found = backend(gpu).compute(
        call._replace(x=gpu.put(x), y=gpu.put(y), weights=gpu.put(weights), cotangent=gpu.put(cotangent))
    )
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_array_equal(gpu.get(f), e)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean", "rowmean"])
def test_products_have_the_bits_of_any_layout(reduction):
    """Contiguous arrays take a shorter way; the divisor and the cotangent are rounded as on the longer one."""
    x, y = (numbers("probs", (7, 33), seed) for seed in (13, 14))
    cpu = importlib.import_module("klcore.backends.cpu")
    for cotangent in (0.3, 3.3, 1e-3):
        call = Call(KL_DIV, x, y, "probs", -1, reduction, return_grad=("x", "y"), cotangent=cotangent)
        expected = cpu.compute(call._replace(x=np.asfortranarray(x), y=np.asfortranarray(y)))
        found = cpu.compute(call)
        for f, e in zip(found, expected, strict=True):
            np.testing.assert_array_equal(f, e)


def test_products_of_close_logits():
    """Factors keep two rows of logits from the form that does not cancel: docs/accuracy.md says what that costs."""
    cpu = importlib.import_module("klcore.backends.cpu")
    x = numbers("logits", (20, 50), 17)
    y = x + 2e-6 * numbers("logits", x.shape, 18)
    _, *exact = klcore.kl_div(x, y, space="logits", return_grad=("x", "y"))
    call = Call(KL_DIV, x, y, "logits", -1, "none", return_grad=("x", "y"), cotangent=np.ones_like(x))
    found = cpu.compute(call)
    for f, e in zip(found, exact, strict=True):
        assert (abs(f - e).max(-1) <= 1e-9 * abs(e).max(-1)).all()


def test_product_of_a_row_of_weight_zero(device):
    """Zero, whatever becomes of its value afterwards: the derivative of its logarithm is infinite."""
    x, y = (numbers("probs", (3, 6), seed).astype("float32") for seed in (15, 16))
    x[0] = np.nan
    weights, cotangent = np.float32([0, 1, 1e30]), np.float32([np.inf, 2, 1e30])
    call = Call(KL_DIV, device.put(x), device.put(y), "probs", -1, "row", device.put(weights), return_grad="y")
    (dy,) = backend(device).compute(call._replace(cotangent=device.put(cotangent)))
    dy = device.get(dy)
    assert (dy[0] == 0).all()
    np.testing.assert_array_equal(dy[1], 2 * klcore.kl_div(x[1], y[1], return_grad="y")[1])
    assert np.isinf(dy[2]).all()


def test_products_go_where_they_are_told(device):
    x, y = numbers("logits", (4, 6), 11), numbers("logits", (1, 6), 12)
    a, b = device.put(x), device.put(y)
    call = Call(KL_DIV, a, b, "logits", -1, "row", return_grad=("x", "y"), cotangent=device.put(np.ones(4)))
    out = device.xp.empty_like(a), device.xp.empty_like(b)
    expected = backend(device).compute(call)
    found = backend(device).compute(call._replace(out=out))
    for f, e, o in zip(found, expected, out, strict=True):
        assert f is o
        np.testing.assert_array_equal(device.get(f), device.get(e))
