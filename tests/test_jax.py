"""JAX arrays: NumPy's bits, under jit, grad, vmap and their compositions, without copies and without deadlocks."""

import contextlib
import importlib
import types
from functools import partial

import ml_dtypes
import numpy as np
import oracle
import pytest
from conftest import call

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import klcore  # noqa: E402
from klcore.backends import cpu  # noqa: E402
from klcore.divergence import loss  # noqa: E402
from klcore.operations import LOSSES, OPERATIONS, Call  # noqa: E402

PAIRS = oracle.CALLS
REDUCTIONS = ["row", "none", "sum", "rowmean", "batchmean", "mean"]
TOTALS = REDUCTIONS[2:]
X64 = pytest.mark.usefixtures("x64")


@pytest.fixture
def x64():
    """float64 arrays, for one test."""
    with jax.enable_x64(True):
        yield


def into(z, space):
    """Logits as numbers of a space."""
    if space != "logits":
        z = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return {"probs": np.exp(z), "counts": 50 * np.exp(z)}.get(space, z)


def arguments(space, shape=(4, 3, 5), other=None, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (shape, other or shape)
    return tuple(into(rng.normal(size=n), s).astype(dtype) for n, s in zip(shapes, space, strict=True))


def on(operation, x, y, space, **options):
    """The public function of two arrays, or of the first one only."""
    if "logits" in space:
        options.setdefault("temperature", 1.7)
    if options.get("return_grad") and OPERATIONS[operation].single:
        options["return_grad"] = "x"
    return call(operation, x, y, space, **options)


def same(found, expected):
    """JAX arrays of the same bits."""
    several = isinstance(expected, tuple)
    assert isinstance(found, tuple) == several
    for f, e in zip(found, expected, strict=True) if several else [(found, expected)]:
        assert isinstance(f, jax.Array)
        assert f.dtype == e.dtype
        np.testing.assert_array_equal(np.asarray(f), e)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("operation", "space"), PAIRS)
def test_bits_are_numpys(operation, space, reduction):
    """The value, and the gradients beside it."""
    x, y = arguments(space)
    options = {"reduction": reduction, "return_grad": ("x", "y")}
    expected = on(operation, x, y, space, **options)
    same(on(operation, jnp.asarray(x), jnp.asarray(y), space, **options), expected)
    if operation == "kl_div":
        same(on(operation, jnp.asarray(x), jnp.asarray(y), space, reduction=reduction), expected[0])


@pytest.mark.parametrize("x_64", [False, True], ids=["", "x64"])
@pytest.mark.parametrize("reduction", ["row", "none", "sum"])
@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes(name, reduction, x_64):
    """Gradients in the operand's dtype, values like NumPy's; without jax_enable_x64 JAX has no float64."""
    dtype = {"bfloat16": ml_dtypes.bfloat16}.get(name, name)
    x, y = arguments(("logits", "logits"), dtype=dtype)
    with jax.enable_x64(x_64):
        a, b = jnp.asarray(x), jnp.asarray(y)
        options = {"space": "logits", "reduction": reduction, "return_grad": ("x", "y")}
        expected = klcore.kl_div(np.asarray(a), np.asarray(b), **options)
        same(klcore.kl_div(a, b, **options), expected)
        same(jax.jit(lambda a, b: klcore.kl_div(a, b, **options))(a, b), expected)
        g = jax.grad(lambda a: klcore.kl_div(a, b, space="logits", reduction=reduction).sum())(a)
        assert g.dtype == a.dtype
        if reduction != "none":  # it multiplies by the terms' factors, which are all 1
            same(g, expected[1])


@pytest.mark.parametrize("x_64", [False, True], ids=["", "x64"])
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_integers_and_lists_become_jaxs_float(dtype, x_64):
    with jax.enable_x64(x_64):
        kind = jnp.float64 if x_64 else jnp.float32
        x = np.array([[1, 0, 1], [1, 1, 1]], dtype)
        expected = klcore.kl_div(x.astype(kind), np.array([[0.25, 0.25, 0.5]], kind))
        same(klcore.kl_div(jnp.asarray(x), [[0.25, 0.25, 0.5]]), expected)
        same(
            klcore.kl_div([[0.25, 0.25, 0.5]], jnp.asarray(x)),
            klcore.kl_div(np.array([0.25, 0.25, 0.5], kind), x.astype(kind)),
        )
        found = klcore.kl_div(jnp.asarray(x), jnp.array([0.25, 0.25, 0.5], jnp.bfloat16))
        assert found.dtype == kind


def test_differentiating_beside_integers():
    target = jnp.array([[1, 0, 0]])
    y = jnp.array([[0.5, 0.25, 0.25]])
    g = jax.grad(lambda y: klcore.rel_entr(target, y, reduction="sum"))(y)
    np.testing.assert_array_equal(g, [[-2, 0, 0]])
    g = jax.grad(lambda x: klcore.kl_div(x, y, reduction="sum"), allow_int=True)(target)
    assert g.dtype == jax.dtypes.float0


@pytest.mark.parametrize("traced", [False, True], ids=["", "jit"])
@pytest.mark.parametrize("weights", [2.0, [1, 2, 0], np.array([[1.0], [0.5], [2.0], [0.0]]), "jax"])
def test_weights(weights, traced):
    space = ("log_probs", "logits")
    x, y = arguments(space)
    weights = jnp.arange(12.0).reshape(4, 3) if isinstance(weights, str) else weights
    w = np.asarray(weights, np.float32)
    expected = on("kl_div", x, y, space, reduction="rowmean", weights=w, return_grad="y")

    def f(x, y, w):
        return on("kl_div", x, y, space, reduction="rowmean", weights=w, return_grad="y")

    same((jax.jit(f) if traced else f)(x=jnp.asarray(x), y=jnp.asarray(y), w=weights), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_axis(axis, reduction):
    x, y = arguments(("probs", "probs"), (3, 4, 5), (5,) if axis == -1 else (1, 4, 5) if axis == 1 else None)
    options = {"axis": axis, "reduction": reduction, "return_grad": ("x", "y")}
    same(klcore.kl_div(jnp.asarray(x), jnp.asarray(y), **options), klcore.kl_div(x, y, **options))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_number_is_one_class(reduction):
    options = {"reduction": reduction, "return_grad": ("x", "y")}
    expected = klcore.kl_div(np.float32(0.3), np.float32(0.5), **options)
    x, y = jnp.float32(0.3), jnp.float32(0.5)
    same(klcore.kl_div(x, y, **options), expected)
    same(jax.grad(lambda x, y: klcore.kl_div(x, y, reduction=reduction), (0, 1))(x, y), expected[1:])
    same(jax.vmap(lambda x: klcore.kl_div(x, y, **options)[0])(x[None]), expected[0][None])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3)])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_nothing_to_add_up(shape, reduction):
    x = np.ones(shape, np.float32)
    options = {"reduction": reduction, "return_grad": ("x", "y")}
    same(klcore.kl_div(jnp.asarray(x), jnp.asarray(x), **options), klcore.kl_div(x, x, **options))


# ---- gradients -------------------------------------------------------------------------------------------------------


@X64
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("space", oracle.PAIRS)
def test_check_grads(space, reduction):
    """Against differences, with random cotangents of either sign, and y broadcast."""
    x, y = (jnp.asarray(a) for a in arguments(space, (2, 3), (3,), np.float64))
    weights = jnp.array([0.5, 2.0])
    check_grads(
        lambda x, y: on("kl_div", x, y, space, reduction=reduction, weights=weights), (x, y), order=1, modes=["rev"]
    )


@X64
@pytest.mark.parametrize(("operation", "space"), [pair for pair in PAIRS if pair[0] != "kl_div"])
def test_check_grads_of_the_others(operation, space):
    x, y = (jnp.asarray(a) for a in arguments(space, (2, 3), dtype=np.float64))
    check_grads(lambda x, y: on(operation, x, y, space), (x, y), order=1, modes=["rev"])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("operation", "space"), PAIRS)
def test_gradients_are_the_engines(operation, space, reduction):
    """The bits of klcore's products of cotangent and Jacobian; for totals, multiplied afterwards."""
    x, y = arguments(space)
    value, back = jax.vjp(lambda x, y: on(operation, x, y, space, reduction=reduction), jnp.asarray(x), jnp.asarray(y))
    row = OPERATIONS[operation]
    names = row.gradients
    found = back(jnp.ones_like(value))[: len(names)]
    if reduction in TOTALS:
        same(found, on(operation, x, y, space, reduction=reduction, return_grad=names)[1:])
        return
    cotangent = np.random.default_rng(1).normal(size=value.shape).astype(np.float32)
    found = back(jnp.asarray(cotangent))[: len(names)]
    words, y = (space[0], None) if row.single else (space, y)
    temperature = 1.7 if "logits" in space else 1.0
    asked = Call(row, x, y, words, -1, reduction, None, temperature, names, cotangent=cotangent)
    same(found, cpu.compute(asked))


def test_cotangent_of_a_total():
    x, y = (jnp.asarray(a) for a in arguments(("probs", "probs")))
    g = jax.grad(lambda y: klcore.kl_div(x, y, reduction="sum"))(y)
    np.testing.assert_array_equal(jax.grad(lambda y: -3 * klcore.kl_div(x, y, reduction="sum"))(y), -3 * g)


def test_loss_scale_keeps_float16_from_underflow():
    x, y = (jnp.asarray(a) for a in arguments(("logits", "logits"), (512, 64), dtype=np.float16))
    scale = 65536.0
    g = jax.grad(lambda y: scale * klcore.kl_div(x, y, space="logits", reduction="mean"))(y)
    _, expected = klcore.kl_div(
        x.astype("float32"), y.astype("float32"), space="logits", reduction="mean", return_grad="y"
    )
    np.testing.assert_allclose(g.astype("float32"), expected * scale, rtol=1e-3, atol=1e-7)
    assert jnp.median(jnp.abs(expected)) < 1e-6  # float16 has only a few bits left there


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_what_is_differentiated_is_computed(reduction, monkeypatch):
    wanted = set()
    original = cpu.compute

    def watched(call):
        wanted.update(call.return_grad or ())
        return original(call)

    monkeypatch.setattr(cpu, "compute", watched)
    x, y = (jnp.asarray(a) for a in arguments(("probs", "probs"), (7, 3)))
    jax.grad(lambda y: klcore.kl_div(x, y, reduction=reduction).sum())(y).block_until_ready()
    assert wanted == {"y"}


def test_both_arguments_the_same():
    x = jnp.asarray(arguments(("probs", "probs"))[0])
    np.testing.assert_array_equal(jax.grad(lambda x: klcore.kl_div(x, x, reduction="sum"))(x), jnp.zeros_like(x))


def test_gradient_that_is_returned():
    """It is a result like any other, beside a value that can be differentiated; its own derivative is not available."""
    x, y = (jnp.asarray(a) for a in arguments(("probs", "probs")))

    def f(y):
        return klcore.kl_div(x, y, reduction="sum", return_grad="y")

    (value, aux), g = jax.jit(jax.value_and_grad(f, has_aux=True))(y)
    same((value, aux), klcore.kl_div(np.asarray(x), np.asarray(y), reduction="sum", return_grad="y"))
    np.testing.assert_array_equal(aux, g)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.grad(lambda y: f(y)[1].sum())(y)


@pytest.mark.parametrize("reduction", ["row", "sum"])
@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
def test_no_second_derivatives(reduction, jit):
    x, y = (jnp.asarray(a) for a in arguments(("logits", "logits"), (2, 3)))

    def f(y):
        return klcore.kl_div(x, y, space="logits", reduction=reduction).sum()

    maybe = jax.jit if jit else lambda f: f
    for second in (jax.hessian(f), jax.jacfwd(jax.grad(f)), jax.grad(lambda y: jax.grad(f)(y).sum())):
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            maybe(second)(y)


def test_no_derivative_by_weights():
    x, y = (jnp.asarray(a) for a in arguments(("probs", "probs")))
    with pytest.raises(NotImplementedError, match=r"with respect to weights; pass jax\.lax\.stop_gradient"):
        jax.grad(lambda w: klcore.kl_div(x, y, weights=w).sum())(jnp.ones(3))
    jax.grad(lambda y, w: klcore.kl_div(x, y, weights=jax.lax.stop_gradient(w)).sum(), (0, 1))(y, jnp.ones(3))


# ---- forward mode ----------------------------------------------------------------------------------------------------


def forwards_and_backwards(f, arguments):
    """The same numbers, for random tangents and cotangents; also linearised, and compiled by JAX."""
    tangents = tuple(jax.random.normal(jax.random.key(k), a.shape, a.dtype) for k, a in enumerate(arguments))
    value, pull = jax.vjp(f, *arguments)
    cotangent = jax.random.normal(jax.random.key(9), value.shape, value.dtype)
    expected = sum((g.astype(float) * t).sum() for g, t in zip(pull(cotangent), tangents, strict=True))
    for g in (f, jax.jit(f)):
        found, tangent = jax.jvp(g, arguments, tangents)
        np.testing.assert_array_equal(found, value)
        assert tangent.dtype == value.dtype
        np.testing.assert_allclose((tangent * cotangent).sum(), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(jax.linearize(f, *arguments)[1](*tangents), tangent, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("operation", oracle.OPERATIONS)
def test_forward_mode(operation):
    """With an operand that is broadcast, and weights."""
    space = ("logits", "logits") if OPERATIONS[operation].single else ("logits", "probs")
    x, y = (jnp.asarray(a) for a in arguments(space, (4, 5), (5,)))
    for reduction in ("row", "rowmean"):
        options = {"reduction": reduction, "weights": jnp.arange(4.0)}
        forwards_and_backwards(lambda x, y, o=options: on(operation, x, y, space, **o), (x, y))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("reduction", ["row", "sum"])
def test_forward_mode_of_16_bits(reduction, dtype):
    x, y = (jnp.asarray(a).astype(dtype) for a in arguments(("probs", "probs"), (4, 5), (5,)))
    _, tangent = jax.jvp(lambda x, y: klcore.kl_div(x, y, reduction=reduction), (x, y), (x, y))
    wide = tuple(a.astype("float32") for a in (x, y))
    _, expected = jax.jvp(lambda x, y: klcore.kl_div(x, y, reduction=reduction), wide, wide)
    np.testing.assert_allclose(tangent, expected, atol=0.02)


@pytest.mark.parametrize("axis", [0, -1])
def test_forward_mode_of_terms(axis):
    x, y = (jnp.asarray(a) for a in arguments(("probs", "log_probs"), (4, 5), (4, 5)))
    options = {"space": ("probs", "log_probs"), "reduction": "none", "axis": axis}
    forwards_and_backwards(lambda x, y: klcore.rel_entr(x, y, **options), (x, y))
    with pytest.raises(NotImplementedError, match=r"no forward mode .* for reduction='none' of logits"):
        jax.jvp(lambda y: klcore.kl_div(y, y, space="logits", reduction="none"), (y,), (y,))


def test_jacobian_in_forward_mode():
    """As many tangents as classes, in one call."""
    x, y = (jnp.asarray(a) for a in arguments(("logits", "logits"), (3, 4)))
    f = jax.jit(lambda y: klcore.kl_div(x, y, space="logits"))
    np.testing.assert_allclose(jax.jacfwd(f)(y), jax.jacrev(f)(y), rtol=1e-5, atol=1e-7)


def test_forward_mode_of_a_loss_and_of_an_estimator():
    x, y = (jnp.asarray(a) for a in arguments(("probs", "log_probs"), (4, 5)))
    for reduction in ("row", "sum", "none"):
        options = {"space": ("probs", "log_probs"), "reduction": reduction, "denominator": 3.0}
        forwards_and_backwards(lambda x, y, o=options: loss("pytorch", x, y, **o), (x, y))
    for reduction in ("none", "mean"):
        forwards_and_backwards(lambda x, y, r=reduction: klcore.kl_estimate(x, y, reduction=r), (y, x))


def test_no_forward_mode_beside_gradients():
    """Their own derivative is a second one."""
    x, y = (jnp.asarray(a) for a in arguments(("probs", "probs")))
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.jvp(lambda y: klcore.kl_div(x, y, return_grad="y"), (y,), (y,))


# ---- a cotangent of 0 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["row", "sum", "none"])
@pytest.mark.parametrize("operation", [name for name in oracle.OPERATIONS if OPERATIONS[name].has_terms])
def test_cotangent_of_zero_gives_zero(operation, reduction):
    """Even if the derivative is infinite: at probabilities of 0."""
    x, y = jnp.array([[0.5, 0.5], [1, 0]]), jnp.array([[0.5, 0.5], [0.0, 1.0]])

    def f(x, y):
        return (0 * on(operation, x, y, ("probs", "probs"), reduction=reduction)).sum()

    g = jax.jit(jax.grad(f, (0, 1)))
    assert all((a == 0).all() for a in (*g(x, y), *jax.vmap(g)(x[None], y[None])))


def test_terms_that_are_masked():
    """With jnp.where, whose cotangent is 0 where it selects the other argument."""
    x, q = jnp.array([[0.5, 0.5], [1, 0]]), jnp.array([[0.5, 0.5], [0.5, 0.5]])
    g = jax.grad(lambda x: jnp.where(x > 0, klcore.kl_div(x, q, reduction="none"), 0).sum())(x)
    np.testing.assert_allclose(g, [[0, 0], [np.log(2), 0]], rtol=1e-6)


@pytest.mark.parametrize("space", oracle.PAIRS)
def test_gradient_of_a_few_terms(space):
    """A cotangent of 0 applies to one term: the other terms depend on the same numbers if these are normalised."""
    x, y = map(jnp.asarray, arguments(space))
    _, back = jax.vjp(lambda x, y: klcore.kl_div(x, y, space=space, reduction="none"), x, y)
    c = jnp.zeros(x.shape).at[1, 2, 3].set(2).at[0].set(1)
    nearly = jnp.where(c == 0, 1e-30, c)
    for found, expected in zip(back(c), back(nearly), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
        assert (found[2:] == 0).all()


@pytest.mark.parametrize("reduction", ["row", "sum", "none"])
@pytest.mark.parametrize("term", ["pytorch", "keras"])
def test_cotangent_of_zero_of_a_loss(term, reduction):
    x, y = jnp.array([[0.5, 0.5], [1, 0]]), jnp.array([[0.5, 0.5], [0.5, 0.0]])
    space = ("probs", "log_probs" if term == "pytorch" else "probs")
    g = jax.grad(lambda x, y: (0 * loss(term, x, y, space=space, reduction=reduction)).sum(), (0, 1))(x, jnp.log(y))
    assert all((a == 0).all() for a in g)


# ---- transformations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wrap", ["jit(grad)", "grad(jit)", "value_and_grad", "checkpoint", "scan", "cond", "disabled"])
def test_compositions(wrap, reduction):
    x, y = (jnp.asarray(a) for a in arguments(("probs", "logits")))

    def f(y):
        return klcore.kl_div(x, y, space=("probs", "logits"), reduction=reduction).sum()

    expected = jax.grad(f)(y)
    found = {
        "jit(grad)": lambda: jax.jit(jax.grad(f))(y),
        "grad(jit)": lambda: jax.grad(jax.jit(f))(y),
        "value_and_grad": lambda: jax.jit(jax.value_and_grad(f))(y)[1],
        "checkpoint": lambda: jax.grad(jax.checkpoint(f))(y),
        "scan": lambda: jax.grad(lambda y: jax.lax.scan(lambda c, _: (c + f(y), None), 0.0, length=1)[0])(y),
        "cond": lambda: jax.jit(jax.grad(lambda y: jax.lax.cond(y[0, 0, 0] < 9, f, lambda y: y.sum(), y)))(y),
        "disabled": lambda: jax.grad(f)(y),
    }
    with jax.disable_jit(wrap == "disabled"):
        same(found[wrap](), np.asarray(expected))


IN_AXES = [(0, 0), (1, 2), (-1, 0), (0, None), (None, 1)]


@pytest.mark.parametrize(("in_axes", "axis"), [*((at, -1) for at in IN_AXES), ((1, 2), 0)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vmap(reduction, in_axes, axis):
    """Value and gradients of each example equal those of a loop, with an unmapped argument of fewer axes."""
    count, shape = 3, (4, 5)
    rng = np.random.default_rng(0)
    arrays = []
    for at, unmapped in zip(in_axes, (shape, shape[-1:] if axis == -1 else shape), strict=True):
        a = rng.uniform(0.1, 1, unmapped if at is None else (count, *shape)).astype(np.float32)
        arrays.append(jnp.asarray(a if at is None else np.moveaxis(a, 0, at)))

    def f(x, y):
        value, dx = klcore.kl_div(x, y, axis=axis, reduction=reduction, return_grad="x")
        return (
            value,
            dx,
            *jax.grad(lambda x, y: klcore.kl_div(x, y, axis=axis, reduction=reduction).sum(), (0, 1))(x, y),
        )

    def example(i):
        return tuple(a if at is None else jnp.take(a, i, at) for a, at in zip(arrays, in_axes, strict=True))

    found = jax.vmap(f, in_axes)(*arrays)
    expected = tuple(np.stack(a) for a in zip(*(f(*example(i)) for i in range(count)), strict=True))
    same(found, expected)
    same(jax.jit(jax.vmap(f, in_axes))(*arrays), expected)


@pytest.mark.parametrize("weighted", ["", "weights", "mapped weights"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nested_vmap(reduction, weighted):
    x, y = (jnp.asarray(a) for a in arguments(("probs", "logits"), (2, 3, 4, 5), (2, 5)))
    w = {"weights": jnp.arange(4.0), "mapped weights": jnp.arange(12.0).reshape(3, 4)}.get(weighted, jnp.ones(()))
    at = 0 if weighted == "mapped weights" else None

    def f(x, y, w):
        options = {"space": ("probs", "logits"), "reduction": reduction, "weights": w if weighted else None}
        return jax.value_and_grad(lambda y: klcore.kl_div(x, y, **options).sum())(y)

    found = jax.vmap(jax.vmap(f, (0, None, at)), (0, 0, None))(x, y, w)
    each = [[f(x[i, j], y[i], w if at is None else w[j]) for j in range(3)] for i in range(2)]
    for k in range(2):
        np.testing.assert_array_equal(found[k], np.stack([np.stack([e[k] for e in line]) for line in each]))


def test_vmap_of_no_examples():
    x = jnp.ones((0, 4, 5))
    assert jax.vmap(lambda x: klcore.kl_div(x, x, reduction="sum"))(x).shape == (0,)


def test_jacobian():
    """One row of cotangents for each value: vmap of the backward rule."""
    x, y = (jnp.asarray(a) for a in arguments(("probs", "probs"), (3, 4)))
    found = jax.jacrev(lambda y: klcore.kl_div(x, y))(y)
    _, dy = klcore.kl_div(x, y, return_grad="y")
    np.testing.assert_array_equal(found, np.eye(3, dtype="f")[:, :, None] * dy)


def test_equal_calls_are_compiled_once(caplog):
    x, y = (jnp.asarray(a) for a in arguments(("probs", "probs"), (3, 7)))

    def once():
        klcore.kl_div(x, y, reduction="sum")
        jax.vmap(klcore.kl_div)(x, y)
        jax.grad(lambda y: klcore.kl_div(x, y, reduction="sum"))(y)
        jax.grad(lambda y: klcore.kl_div(x, y).sum())(y)

    once()
    with jax.log_compiles():
        once()
    assert [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()] == []


# ---- losses of other systems -----------------------------------------------------------------------------------------


@X64
@pytest.mark.parametrize("factors", [None, (3, 5), (4, 1, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["row", "sum", "none"])
@pytest.mark.parametrize(("term", "space"), [(o.name, pair) for o in LOSSES.values() for pair in o.pairs])
def test_loss(term, space, reduction, factors):
    """With operands that broadcast, also over the classes: gradients have the shape of their operand."""
    x, _ = arguments(space, (4, 3, 5), dtype=np.float64)
    y = np.random.default_rng(1).uniform(0.1, 1, (3, 1))
    options = {"space": space, "reduction": reduction, "denominator": 3.0, "epsilon": 1e-3}
    options["factors"] = None if factors is None else np.random.default_rng(2).normal(size=factors)
    a, b = jnp.asarray(x), jnp.asarray(y)
    same(loss(term, a, b, return_grad="y", **options), loss(term, x, y, return_grad="y", **options))
    if term == "puzzlelib":  # its gradient is not that of its value
        with pytest.raises(NotImplementedError, match="direction of descent"):
            jax.grad(lambda b: loss(term, a, b, **options).sum())(b)
    else:
        check_grads(lambda a, b: loss(term, a, b, **options), (a, b), order=1, modes=["rev"])
    mapped = jax.vmap(lambda a: loss(term, a, b, **{**options, "factors": None}))(a)
    same(mapped, np.stack([loss(term, a, y, **{**options, "factors": None}) for a in x]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_loss_dtype(dtype):
    x, y = arguments(("probs", "log_probs"), dtype=np.float16)
    options = {"space": ("probs", "log_probs"), "dtype": dtype}
    same(loss("pytorch", jnp.asarray(x), jnp.asarray(y), **options), loss("pytorch", x, y, **options))
    g = jax.grad(lambda y: loss("pytorch", jnp.asarray(x), y, **options).sum())(jnp.asarray(y))
    assert g.dtype == "float16"


# ---- temperatures ----------------------------------------------------------------------------------------------------


def softened(x, y, t, reduction="row"):
    """The divergence written with jnp."""
    t = jnp.asarray(t)
    t = t[..., None] if t.ndim else t
    a, b = jax.nn.log_softmax(x / t), jax.nn.log_softmax(y / t)
    rows = (jnp.exp(a) * (a - b)).sum(-1)
    return {"row": rows, "sum": rows.sum(), "rowmean": rows.mean()}[reduction]


def compilations(caplog, function):
    caplog.clear()
    with jax.log_compiles():
        function()
    return sum("Compiling" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("shape", [(3, 7), (300, 70)], ids=["small", "large"])
def test_a_temperature_for_each_step(shape, caplog):
    """One program for all numbers, and one for all arrays, with gradients too; NumPy's bits."""
    x, y = arguments(("logits", "logits"), shape)
    a, b = jnp.asarray(x), jnp.asarray(y)
    g = jax.jit(jax.grad(lambda y, t: klcore.kl_div(a, y, space="logits", temperature=t, reduction="rowmean")))

    def steps(temperatures):
        for t in temperatures:
            same(klcore.kl_div(a, b, space="logits", temperature=t), klcore.kl_div(x, y, space="logits", temperature=t))
            expected = klcore.kl_div(x, y, space="logits", temperature=float(np.float32(t)))
            same(klcore.kl_div(a, b, space="logits", temperature=jnp.float32(t)), expected)
            jax.grad(lambda y, t=t: klcore.kl_div(a, y, space="logits", temperature=t).sum())(b)
            g(b, t)

    steps([3.0])
    assert compilations(caplog, lambda: steps([2.5, 2.0, 1.7])) == 0


@pytest.mark.parametrize("reduction", ["row", "sum", "rowmean"])
def test_temperature_that_is_traced(reduction):
    x, y = (jnp.asarray(a) for a in arguments(("logits", "logits"), (4, 5)))

    def f(t, y=y):
        return klcore.kl_div(x, y, space="logits", temperature=t, reduction=reduction)

    for t in (0.5, 1.0, 2.5):
        np.testing.assert_array_equal(jax.jit(f)(t), f(t))
    t = jnp.array([0.5, 1.0, 2.5])
    np.testing.assert_array_equal(jax.vmap(f)(t), np.stack([f(one) for one in t]))
    found = jax.vmap(jax.value_and_grad(lambda y, t: f(t, y).sum()), (None, 0))(y, t)
    expected = jax.vmap(jax.value_and_grad(lambda y, t: softened(x, y, t, reduction).sum()), (None, 0))(y, t)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize(("reduction", "other"), [("row", (4, 5)), ("row", (5,)), ("rowmean", (5,))], ids=str)
def test_derivative_by_the_temperature(reduction, other):
    """It follows from the derivative with respect to the logits, which is computed in any case."""
    x, y = (jnp.asarray(a) for a in arguments(("logits", "logits"), (4, 5), other))

    def f(t, x, y):
        return klcore.kl_div(x, y, space="logits", temperature=t, reduction=reduction)

    def jnps(t, x, y):
        return softened(x, y, t, reduction)

    t = 0.7
    found = jax.jit(jax.grad(lambda *a: 3 * f(*a).sum(), (0, 1, 2)))(t, x, y)
    expected = jax.grad(lambda *a: 3 * jnps(*a).sum(), (0, 1, 2))(t, x, y)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected)
    found = jax.jvp(lambda t: f(t, x, y), (t,), (1.0,))[1]
    np.testing.assert_allclose(found, jax.jvp(lambda t: jnps(t, x, y), (t,), (1.0,))[1], rtol=1e-4, atol=1e-6)


@X64
@pytest.mark.parametrize("operation", OPERATIONS)
def test_derivatives_by_the_temperature(operation):
    """For all operations, against differences, with an excluded class and all logits far from 0."""
    space = ("logits", "logits") if OPERATIONS[operation].single else ("logits", "probs")
    x, y = arguments(space, (2, 4), dtype=np.float64)
    x, y = (a + 1e3 * (s == "logits") for a, s in zip((x, y), space, strict=True))
    for a, s in zip((x, y), space, strict=True):
        a[0, 1] = {"logits": -np.inf, "log_probs": -np.inf}.get(s, 0)
    a, b = jnp.asarray(x), jnp.asarray(y)
    t = jnp.array([1.7, 0.6])
    check_grads(lambda t: on(operation, a, b, space, temperature=t), (t,), order=1, modes=["rev"])


def test_temperatures_that_are_wrong():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="temperature divides logits"):
        jax.jit(lambda t: klcore.kl_div(x, x, temperature=t))(2.0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="temperature must be positive"):
        jax.jit(lambda t: klcore.kl_div(x, x, space="logits", temperature=t))(0.0).block_until_ready()


# ---- what is refused -------------------------------------------------------------------------------------------------

BAD = {
    "space": {"space": "odds"},
    "space of no kind": {"space": {}},
    "three spaces": {"space": ["probs"] * 3},
    "axis": {"axis": 2},
    "axis of no kind": {"axis": [0]},
    "fractional axis": {"axis": 0.5},
    "reduction": {"reduction": "rows"},
    "reductions": {"reduction": ["row"]},
    "temperature": {"space": "logits", "temperature": 0.0},
    "no temperature": {"space": "logits", "temperature": None},
    "temperatures": {"space": "logits", "temperature": [1.0, 2.0]},
    "temperature of probabilities": {"temperature": 2},
    "return_grad": {"return_grad": "z"},
    "weights' shape": {"weights": [1, 1, 1, 1, 1]},
    "negative weights": {"weights": [-1, 1, 1]},
    "masked weights": {"weights": np.ma.ones(3)},
    "classes": {"y": np.ones((3, 5))},
    "batch": {"y": np.ones((2, 4))},
    "dtype": {"y": np.ones((3, 4), complex)},
}


@pytest.mark.parametrize("traced", [False, True], ids=["", "jit"])
@pytest.mark.parametrize("case", BAD)
def test_errors_are_numpys(case, traced):
    """The same class and message when JAX traces a function, not when it runs."""
    options = dict(BAD[case])
    x = np.ones((3, 4), np.float32)
    y = options.pop("y", x)
    with pytest.raises((TypeError, ValueError)) as expected:
        klcore.kl_div(x, y, **options)

    def f(x, y):
        return klcore.kl_div(x, y, **options)

    with pytest.raises(expected.type) as found:
        (jax.jit(f) if traced else f)(jnp.asarray(x), jnp.asarray(y))
    if case not in ("dtype", "batch", "classes"):  # those name what they have found
        assert str(found.value).partition(";")[0] == str(expected.value).partition(";")[0]


def test_weights_known_only_when_it_runs():
    x = jnp.ones((2, 3))
    with pytest.raises(jax.errors.JaxRuntimeError, match="weights must be finite and >= 0"):
        jax.jit(lambda w: klcore.kl_div(x, x, weights=w))(jnp.array([-1.0, 1])).block_until_ready()


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (lambda: jax.random.key(0), "x has dtype key<fry>"),
        (lambda: jnp.ones(3, jnp.complex64), "x has dtype complex64"),
        (lambda: jnp.ones(3, jnp.float8_e4m3fn), "x has dtype float8_e4m3fn"),
    ],
    ids=["key", "complex64", "float8"],
)
def test_dtypes_that_are_refused(array, match):
    with pytest.raises(TypeError, match=match):
        klcore.entropy(array())


@pytest.mark.parametrize("operation", oracle.OPERATIONS)
def test_out_is_refused(operation):
    x = jnp.ones((2, 3))
    with pytest.raises(TypeError, match="JAX arrays cannot be written to"):
        on(operation, x, x, ("probs", "probs"), out=jnp.ones(2))


def test_libraries_are_not_mixed():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    with pytest.raises(TypeError, match=r"x is a jax array and y is a torch array; convert one of them"):
        klcore.kl_div(jnp.ones(3), torch.ones(3))


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("kl_div", "base"), ("js_div", "beta"), ("alpha_div", "alpha"), ("mixed_kl_div", "forward"),
        ("kl_estimate", "limit"), ("kl_estimate", "base"),
    ],
)  # fmt: skip
def test_numbers_that_are_traced(function, name, transform):
    """They are refused with advice, and the advice works."""
    x, y = jnp.array([0.2, 0.8]), jnp.array([0.5, 0.5])

    def f(**number):
        return getattr(klcore, function)(x, y, reduction="sum", **number)

    one = jnp.array([0.5]) if transform is jax.vmap else 0.5
    with pytest.raises(TypeError, match=rf"{name} is traced by JAX.*static_argnames='{name}'"):
        transform(lambda number: f(**{name: number}))(one)
    np.testing.assert_array_equal(
        jax.jit(f, static_argnames=name)(**{name: 1.5 if name == "base" else 0.5}),
        f(**{name: 1.5 if name == "base" else 0.5}),
    )


def test_an_axis_that_is_traced():
    x = jnp.ones((2, 3))
    with pytest.raises(TypeError, match="axis is traced by JAX"):
        jax.jit(lambda axis: klcore.kl_div(x, x, axis=axis))(0)


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_device():
    x, y = (jnp.asarray(a) for a in arguments(("probs", "probs")))
    found = klcore.kl_div(x, y, device="cpu")
    same(found, klcore.kl_div(np.asarray(x), np.asarray(y)))
    assert found.devices() == {jax.local_devices(backend="cpu")[0]}
    with pytest.raises(ValueError, match="no meaning while JAX traces"):
        jax.jit(lambda x: klcore.kl_div(x, y, device="cpu"))(x)
    with pytest.raises(ValueError, match="device must be None"):
        klcore.kl_div(x, y, device="tpu")


def test_device_that_is_missing():
    with contextlib.suppress(RuntimeError):
        jax.devices("cuda")
        pytest.skip("JAX has a CUDA device")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(klcore.BackendUnavailableError, match=rf"device='{device}', but JAX has no such device"):
            klcore.kl_div(jnp.ones(3), jnp.ones(3), device=device)


def test_gpu_that_klcore_cannot_use(monkeypatch):
    """The error comes before anything runs."""
    adapter = importlib.import_module("klcore.backends.jax")
    cuda = importlib.import_module("klcore.backends.cuda")

    def missing():
        raise klcore.BackendUnavailableError("CUDA needs CuPy")

    monkeypatch.setattr(cuda, "ready", missing)
    monkeypatch.setattr(adapter, "_platform", lambda a: "gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(klcore.BackendUnavailableError, match="CUDA needs CuPy"):
        klcore.kl_div(jnp.ones(3), jnp.ones(3))


def test_platforms():
    """A program for the CPU calls the CPU, one for CUDA the GPU, and there is none for other platforms."""
    x = jnp.ones((2, 3))
    traced = jax.jit(lambda x: klcore.kl_div(x, x)).trace(x)
    assert "python_cpu_callback" in traced.lower(lowering_platforms=("cpu",)).as_text()
    cuda = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "python_gpu_callback" in cuda
    assert "python_cpu_callback" not in cuda
    with pytest.raises(ValueError, match="not supported on tpu"):
        traced.lower(lowering_platforms=("tpu",))


@pytest.fixture
def buffer(gpu, monkeypatch):
    """A stand-in for a buffer that XLA passes on a GPU: JAX itself cannot be emulated."""
    if not gpu.emulated:
        pytest.skip("stand-ins for JAX's buffers are of the emulator's arrays")
    monkeypatch.setattr(gpu.xp, "from_dlpack", lambda b: b.array, raising=False)
    return lambda a: types.SimpleNamespace(array=gpu.put(a), __dlpack_device__=lambda: (2, 0))


def test_buffers_on_a_gpu(gpu, buffer, monkeypatch):
    """What XLA would call there."""
    seen = []

    class Watched(gpu.xp.cuda.Stream):
        def __enter__(self):
            seen.append((self.ptr, gpu.xp.cuda.Device().id))
            return super().__enter__()

    monkeypatch.setattr(gpu.xp.cuda, "Stream", Watched)
    programs = importlib.import_module("klcore.backends.jax.programs")
    x, y = arguments(("logits", "probs"), (2, 4, 5), (1, 4, 5))  # an axis added by vmap in front, y not mapped
    value = np.empty(2, np.float32)
    dy = np.empty((2, 4, 5), np.float32)
    call = Call(OPERATIONS["kl_div"], None, None, ("logits", "probs"), -1, "sum")
    results = [buffer(value), buffer(dy)]
    program = programs.Program(call, 2, (), np.dtype("float32"), ("y",), names=("x", "y", "temperature"))
    given = [buffer(a) for a in (x, y, programs.as_data(2.0)[None])]
    programs.on_buffers(program, False, types.SimpleNamespace(stream=7), results, *given)
    assert seen == [(7, 0)]
    for i in range(2):
        expected = klcore.kl_div(
            x[i], y[0], space=("logits", "probs"), reduction="sum", temperature=2.0, return_grad="y"
        )
        for result, e in zip(results, expected, strict=True):
            np.testing.assert_array_equal(gpu.get(result.array)[i], e)


@pytest.mark.parametrize("n", [1024, 40], ids=["whole chunks", "folded"])
@pytest.mark.parametrize("reduction", ["row", "rowmean"])
def test_shards_on_a_gpu(gpu, buffer, reduction, n):
    """Two devices' sweeps over their classes, what they exchange, and the results."""
    programs, shards = (importlib.import_module(f"klcore.backends.jax.{name}") for name in ("programs", "shards"))
    x, y = arguments(("logits", "logits"), (3, 2 * n))
    w = np.array([1, 0, 2], np.float32)
    options = {"space": "logits", "weights": w, "temperature": 2.0, "return_grad": ("x", "y")}
    total = reduction == "rowmean"
    expected = klcore.kl_div(x, y, reduction="sum" if total else "row", denominator=3.0 if total else None, **options)
    call = Call(OPERATIONS["kl_div"], None, None, "logits", -1, "sum" if total else "row")
    names = ("x", "y", "weights", "temperature", "denominator")[: 5 if total else 4]
    program = programs.Program(call, 2, (), np.dtype("float32"), ("x", "y"), names=names)

    def run(function, shape, dtype, *given):
        out = [buffer(np.empty(s, dtype)) for s in shape]
        programs.on_buffers(function, True, types.SimpleNamespace(stream=0), out, *map(buffer, given))
        found = [gpu.get(o.array) for o in out]
        return found if len(found) > 1 else found[0]

    numbers = [programs.as_data(a) for a in (2.0, 3.0)][: len(names) - 3]
    given = [(x[:, part], y[:, part], w, *numbers) for part in (slice(0, n), slice(n, None))]
    (numbers,) = shards.sweeps(program)
    left = [run(partial(shards.states, program, 0), [(3, numbers, 2)], np.uint32, *g) for g in given]
    stats = run(partial(shards.merge, program, 0), [(3, 32)], np.uint32, *given[0], np.concatenate(left, -1))
    value = run(partial(shards.finish, program), [() if total else (3,)], np.float32, *given[0], stats)
    write = partial(shards.write, program, "gradients", 1)
    parts = [run(write, [(3, n)] * 2, np.float32, *g, stats) for g in given]
    found = [value, *(np.concatenate(a, -1) for a in zip(*parts, strict=True))]
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-6 if n == 40 else 0, atol=1e-9)
    sums = run(shards.weigh, [(2,)], np.uint32, w)
    assert programs.number_of(sums) == 3


# ---- memory and threads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("traced", [False, True], ids=["", "jit"])
def test_no_copies(name, traced, monkeypatch):
    """The engine reads JAX's memory and writes the arrays that JAX returns."""
    pointers = []
    original = cpu.compute

    def watched(call):
        pointers.extend(a.__array_interface__["data"][0] for a in (call.x, call.y, *call.out))
        return original(call)

    monkeypatch.setattr(cpu, "compute", watched)
    x, y = (jnp.asarray(a).astype(name) for a in arguments(("probs", "probs"), (640, 100)))

    def f(x, y):
        return klcore.kl_div(x, y, reduction="none", return_grad=("x", "y"))

    results = (jax.jit(f) if traced else f)(x, y)
    jax.block_until_ready(results)
    assert pointers == [a.unsafe_buffer_pointer() for a in (x, y, *results)]


def test_arguments_stay_as_they_are():
    x, y = (jnp.asarray(a) for a in arguments(("probs", "probs")))
    before = np.array(x), np.array(y)
    klcore.kl_div(x, y, return_grad=("x", "y"))
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])


@pytest.mark.exhaustive
def test_no_deadlock(python):
    """Arrays large enough for XLA's threads, calls that wait for each other, from several threads at the same time."""
    code = """
import threading
import jax, jax.numpy as jnp, numpy as np
import klcore

x, y = (jax.random.normal(jax.random.key(k), (4096, 4096)) for k in range(2))

@jax.jit
def f(x, y):
    inner = jax.jit(lambda y: klcore.kl_div(y * 1.5, x, space="logits").mean())
    return klcore.kl_div(x + 1, y, space="logits", reduction="rowmean") + inner(y)

g = jax.grad(jax.jit(f), (0, 1))

def work():
    for _ in range(2):
        jax.block_until_ready([f(x, y), g(x, y), klcore.kl_div(x, y, space="logits")])

threads = [threading.Thread(target=work) for _ in range(3)]
for t in threads: t.start()
for t in threads: t.join()
print("done")
"""
    assert python(code, JAX_PLATFORMS="cpu").strip() == "done"


def test_numpy_arrays_do_not_import_jax(python):
    code = "import sys, numpy as np, klcore; klcore.kl_div(np.ones(3), np.ones(3)); print('jax' in sys.modules)"
    assert python(code).strip() == "False"
