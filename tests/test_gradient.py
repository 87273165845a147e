"""The derivatives, against the oracle and against finite differences of it, with every other argument of a call."""

import itertools

import ml_dtypes
import numpy as np
import oracle
import pytest
from conftest import call

import klcore
from klcore.operations import OPERATIONS

PAIRS = oracle.CALLS
REDUCTIONS = ["row", "none", "sum", "rowmean", "batchmean", "mean"]
ALL_DTYPES = ["float64", "float32", "float16", "bfloat16"]


def dtype_of(name):
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def with_gradients(operation, x, y, return_grad=None, **options):
    """(value, dx, dy), with None for what was not requested or does not exist."""
    names = tuple(return_grad or OPERATIONS[operation].gradients)
    value, *gradients = call(operation, x, y, return_grad=names, **options)
    found = dict(zip(names, gradients, strict=True))
    return value, found.get("x"), found.get("y")


def temperature_of(space):
    return 1.7 if "logits" in space else 1.0


def into(z, space, dtype):
    """Logits as numbers of a space."""
    if space != "logits":
        z = z - z.max(axis=-1, keepdims=True)
        z = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
        z = {"probs": np.exp(z), "counts": 50 * np.exp(z)}.get(space, z)
    return z.astype(dtype_of(dtype))


def arguments(space, dtype, shape=(4, 3, 11), distance=0.5, scale=2.0, seed=0):
    """Two arrays; `distance` 0 for equal ones."""
    rng = np.random.default_rng(seed)
    a = scale * rng.normal(size=shape)
    b = a + distance * rng.normal(size=shape)
    return into(a, space[0], dtype), into(b, space[1], dtype)


def scale_of(reduction, shape, weights):
    """The factor of a row's derivative: its weight over the denominator."""
    batch, n = shape[:-1], shape[-1]
    w = np.broadcast_to(np.float64(1.0 if weights is None else weights), batch)
    rows = np.prod(batch)
    total = {"rowmean": w.sum(), "batchmean": shape[0], "mean": rows * n}.get(reduction, 1.0)
    return w / total


def assert_gradients(got, answer, operation, space, scale):
    """(dx, dy) against the oracle's for rows, times a factor for each row."""
    n = answer.dx.shape[-1]
    scale = scale.reshape(-1)
    for name, g in zip(("dx", "dy"), got, strict=True):
        if g is None:
            continue
        relative, absolute = oracle.tolerance(operation, space, g.dtype, "gradient")
        size = getattr(answer, f"{name}_size") * scale
        expected = getattr(answer, name) * scale[:, None]
        what = f"{name} of {operation} in {space}, {g.dtype}"
        oracle.assert_close(g.reshape(-1, n), expected, size, (relative, absolute), what)


def oracle_rows(operation, x, y, space):
    n = x.shape[-1]
    rows = oracle.exact if n < 64 else oracle.fast
    return rows(operation, x.reshape(-1, n), y.reshape(-1, n), space, temperature_of(space))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("operation", "space"), PAIRS)
def test_against_oracle(operation, space, reduction, weighted, dtype):
    x, y = arguments(space, dtype)
    weights = np.random.default_rng(1).uniform(0.1, 3, (4, 3)) if weighted else None
    if weighted:
        weights[1, 1] = 0
    options = {"space": space, "reduction": reduction, "temperature": temperature_of(space), "weights": weights}
    value, dx, dy = with_gradients(operation, x, y, **options)
    assert dx.dtype == x.dtype
    true = oracle_rows(operation, x, y, space)
    scale = scale_of(reduction, x.shape, weights)
    assert_gradients((dx, dy), true, operation, space, scale)

    # and the value beside it
    value_dtype = "float64" if dtype == "float64" else "float32"
    assert value.dtype == value_dtype
    s = scale.reshape(-1)
    relative, _ = oracle.tolerance(operation, space, value_dtype)
    if reduction == "row":
        oracle.assert_close(value.reshape(-1), true.value * s, true.value_size * s, (relative, 0.0), operation)
    elif reduction == "none":
        bounds = oracle.tolerance(operation, space, value_dtype, "gradient")
        oracle.assert_close(value.reshape(-1, 11), true.terms * s[:, None], true.terms_size * s, bounds, operation)
    else:
        # rounding of the total, where rows of both signs cancel
        size = (true.value_size * s + oracle.EPS32**2 * np.abs(true.value * s)).sum()
        oracle.assert_close(value, (true.value * s).sum(), size, (relative, 0.0), operation)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("n", [2, 128, 1024, 1500, 5000])
@pytest.mark.parametrize(("operation", "space"), PAIRS)
def test_lengths_and_distances(operation, space, n, dtype):
    """One row for each distance of the arguments, flat and peaked."""
    choices = list(itertools.product((1e-6, 1e-3, 1.0, 10.0), (0.5, 5.0)))
    rows = [arguments(space, dtype, (1, n), *choice, seed=n + k) for k, choice in enumerate(choices)]
    x, y = map(np.concatenate, zip(*rows, strict=True))
    got = with_gradients(operation, x, y, space=space, temperature=temperature_of(space))[1:]
    assert_gradients(got, oracle_rows(operation, x, y, space), operation, space, np.ones(len(rows)))


@pytest.mark.parametrize(("operation", "space"), PAIRS)
def test_against_differences(operation, space):
    """Of the value, by steps in each number: independent of any formula for the derivative."""
    n, h = 5, 1e-3
    x, y = arguments(space, "float64", (n,), scale=1.0)
    temperature = temperature_of(space)
    _, dx, dy = with_gradients(operation, x, y, space=space, temperature=temperature)
    for which, gradient in enumerate((dx, dy)):
        if gradient is None:
            continue
        steps = [-2, -1, 1, 2]
        arrays = [np.tile(v, (n, 4, 1)) for v in (x, y)]
        size = h * np.abs(arrays[which][0, 0]) if space[which] == "probs" else np.full(n, h)
        for i in range(n):
            arrays[which][i, :, i] += np.array(steps) * size[i]
        v = call(operation, *arrays, space, temperature=temperature)
        difference = (v[:, 0] - 8 * v[:, 1] + 8 * v[:, 2] - v[:, 3]) / (12 * size)
        # truncation h^4 / 30 times the fifth derivative, and rounding eps / h
        np.testing.assert_allclose(difference, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 1, 7), (1, 4, 7)),
        ((7,), (3, 4, 7)),
        ((3, 4, 7), (1, 7)),
        ((3, 4, 7), (3, 1, 7)),
        ((1, 1, 7), (3, 4, 7)),
        ((2, 1, 1500), (1, 3, 1500)),
    ],
)
@pytest.mark.parametrize("reduction", ["row", "sum", "rowmean"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize(("operation", "space"), [(op, s) for op, s in PAIRS if op in ("kl_div", "cross_entropy")])
def test_broadcast_operand(operation, space, shapes, reduction, weighted, dtype):
    """Its gradient is summed over the axes along which it is repeated."""
    rng = np.random.default_rng(2)
    x, y = (into(rng.normal(size=s), p, dtype) for s, p in zip(shapes, space, strict=True))
    batch = np.broadcast_shapes(shapes[0], shapes[1])
    weights = rng.uniform(0.1, 3, batch[:-1]) if weighted else None
    options = {"space": space, "temperature": temperature_of(space), "reduction": reduction, "weights": weights}
    _, dx, dy = with_gradients(operation, x, y, **options)
    full_x, full_y = (np.broadcast_to(v, batch) for v in (x, y))
    true = oracle_rows(operation, full_x, full_y, space)
    scale = scale_of(reduction, batch, weights)
    for got, operand, rows, size in ((dx, x, true.dx, true.dx_size), (dy, y, true.dy, true.dy_size)):
        assert got.shape == operand.shape
        assert got.dtype == operand.dtype
        lead = len(batch) - operand.ndim
        axes = (*range(lead), *(d for d in range(lead, len(batch)) if operand.shape[d - lead] != batch[d]))
        expected = (rows.reshape(batch) * scale[..., None]).sum(axis=axes).reshape(operand.shape)
        sizes = (size.reshape(batch[:-1]) * scale).sum(axis=axes).reshape(operand.shape[:-1])
        bounds = oracle.tolerance(operation, space, got.dtype, "gradient")
        oracle.assert_close(got, expected, sizes, bounds, f"{operation} in {space}, {got.dtype}")


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("n", [1, 11, 1024, 2500])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("operation", "space"), PAIRS)
def test_same_bits_whatever_is_asked_for(operation, space, reduction, n, dtype):
    x, y = arguments(space, dtype, (3, n))
    options = {"space": space, "temperature": temperature_of(space), "reduction": reduction}
    value, dx, dy = with_gradients(operation, x, y, **options)
    plain = call(operation, x, y, **options)
    if not OPERATIONS[operation].single:
        for which, both in (("x", dx), ("y", dy)):
            alone = with_gradients(operation, x, y, return_grad=which, **options)
            assert alone[0].tobytes() == value.tobytes()
            assert alone[1 if which == "x" else 2].tobytes() == both.tobytes()
    assert plain.tobytes() == value.tobytes()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("n", [1, 2, 11, 1024, 1025, 5000])
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("space", oracle.SPACES)
def test_exactly_zero_where_equal(space, n, scale, temperature, dtype):
    if space != "logits":
        temperature = 1.0
    x, y = arguments((space, space), dtype, (3, n), distance=0.0, scale=scale)
    value, dx, dy = klcore.kl_div(x, y, space=space, temperature=temperature, return_grad=("x", "y"))
    assert not value.any()
    # a probability that is too small for the dtype is 0, and log(0/0) has no derivative there
    possible = x > 0 if space == "probs" else np.isfinite(x)
    assert not dx[possible].astype(np.float64).any()
    assert not dy[possible].astype(np.float64).any()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("operation", "space"), PAIRS)
def test_weight_zero(operation, space, reduction, dtype):
    """A row of weight 0 may hold anything."""
    x, y = arguments(space, dtype, (3, 7))
    x[1], y[1] = np.nan, np.nan
    options = {"space": space, "temperature": temperature_of(space), "reduction": reduction, "weights": [1.0, 0.0, 1.0]}
    value, *gradients = with_gradients(operation, x, y, **options)
    assert np.isfinite(value).all()
    if value.ndim:
        assert not value[1].any()
    for g in gradients:
        assert g is None or (np.isfinite(g.astype(np.float64)).all() and not g[1].astype(np.float64).any())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_of_16_bits_beside_float64_is_rounded_once(device, dtype):
    """By way of float32 a number close to the middle of two others would become the middle, and round the wrong way."""
    eps = 2.0 ** {"float16": -10, "bfloat16": -7}[dtype]
    y = -np.array([1 + eps / 2 + 2.0**-40, 1 + 3 * eps / 2 - 2.0**-40, 1 + eps / 2, 1.0, 1e-300, 1e300, np.nan])
    y = np.append(y, np.random.default_rng(0).normal(size=1000) - 4)
    x = np.ones_like(y).astype(dtype_of(dtype))
    _, dx = klcore.cross_entropy(device.put(x), device.put(y), space=("probs", "log_probs"), return_grad="x")
    dx = device.get(dx).astype(np.float64)
    np.testing.assert_array_equal(dx[:7], [1 + eps, 1 + eps, 1, 1, 0, np.inf, np.nan])
    if dtype == "float16":
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(dx, (-y).astype(dtype))
