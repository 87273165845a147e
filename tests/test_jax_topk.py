"""JAX arrays in which x lists some classes of y, such as a teacher's top K: NumPy's bits, and the derivatives of a
naive function that builds whole rows from the list."""

import importlib
import types
from functools import partial

import ml_dtypes
import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402
from test_jax import buffer, into, same  # noqa: E402, F401

import klcore  # noqa: E402
from klcore.operations import OPERATIONS, Call  # noqa: E402

LISTED = [name for name, operation in OPERATIONS.items() if operation.takes_indices]
REDUCTIONS = ["row", "none", "sum", "rowmean", "batchmean", "mean"]
# tail -> the pairs of spaces to test
CASES = [
    ("bucket", ("probs", "logits")),
    ("bucket", ("log_probs", "probs")),
    ("mass", ("probs", "logits")),
    ("mass", ("log_probs", "counts")),
    ("zero", ("probs", "log_probs")),
    ("renorm", ("logits", "logits")),
    ("renorm", ("counts", "probs")),
]
# all of one operation, and one of the others
BY_CASE = pytest.mark.parametrize(
    ("operation", "tail", "space"),
    [*(("kl_div", *case) for case in CASES), *((name, *CASES[0]) for name in LISTED if name != "kl_div")],
    ids=lambda a: a if isinstance(a, str) else "/".join(a),
)
SHAPE, CLASSES, COUNT = (4, 3), 9, 4


def arguments(tail, space, dtype=np.float32, batch=SHAPE):
    """x, y, and the other arguments by name; some indices are -1."""
    rng = np.random.default_rng(1)
    teacher, student = rng.normal(size=(2, *batch, CLASSES))
    indices = np.argsort(rng.random((*batch, CLASSES)))[..., :COUNT].astype(np.int32)
    indices[rng.random(indices.shape) < 0.2] = -1
    x = np.take_along_axis(into(teacher, space[0]), np.maximum(indices, 0), -1)
    if tail == "bucket":  # the rest should not be 0
        x = x - np.log(1.5) if space[0] == "log_probs" else x / 1.5
    more = {"indices": indices}
    if tail == "mass":
        more["tail_mass"] = rng.uniform(0.1, 0.5, batch).astype(dtype)
    return x.astype(dtype), into(student, space[1]).astype(dtype), more


def on(operation, x, y, tail, space, more, **options):
    name = "bucket" if tail == "mass" else tail
    return getattr(klcore, operation)(x, y, tail=name, space=space, **more, **options)


def on_jax(x, y, more):
    return jnp.asarray(x), jnp.asarray(y), {name: jnp.asarray(a) for name, a in more.items()}


# ---- values ----------------------------------------------------------------------------------------------------------


@BY_CASE
def test_bits_are_numpys(operation, tail, space):
    """For values and gradients, traced or not; all reductions of one operation."""
    x, y, more = arguments(tail, space)
    temperature = 1.7 if "logits" in space else 1.0
    for reduction in REDUCTIONS if operation == "kl_div" else ["row"]:
        options = {"reduction": reduction, "return_grad": ("x", "y"), "temperature": temperature}
        expected = on(operation, x, y, tail, space, more, **options)
        a, b, rest = on_jax(x, y, more)
        same(on(operation, a, b, tail, space, rest, **options), expected)
    traced = jax.jit(lambda a, b, rest: on(operation, a, b, tail, space, rest, **options))
    same(traced(a, b, rest), expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["row", "none", "mean"])
def test_axis_and_batch(axis, reduction):
    """Batch axes that only some of the arguments have, with weights and one temperature per row."""
    space, at = ("probs", "logits"), axis - 3
    x, y, more = arguments("mass", space)
    more["tail_mass"] = more["tail_mass"][0]
    x, y, more["indices"] = (
        np.moveaxis(a[(None,) * (-at - a.ndim)], -1, at) for a in (x[0], y[:, :1], more["indices"])
    )
    more["weights"] = np.arange(12, dtype=np.float32).reshape(SHAPE)
    more["temperature"] = np.float32([[1], [2], [3], [0.5]])
    options = {"axis": axis, "reduction": reduction, "return_grad": ("x", "y")}
    expected = on("kl_div", x, y, "mass", space, more, **options)
    a, b, rest = on_jax(x, y, more)
    same(on("kl_div", a, b, "mass", space, rest, **options), expected)
    same(jax.jit(lambda a, b, rest: on("kl_div", a, b, "mass", space, rest, **options))(a, b, rest), expected)


@pytest.mark.parametrize("tail", ["bucket", "renorm"])
@pytest.mark.parametrize("reduction", ["row", "none", "sum"])
def test_large_arrays(tail, reduction):
    """They are computed immediately, outside of JAX's programs."""
    rng = np.random.default_rng(2)
    y = rng.normal(size=(60, 700)).astype(np.float32)
    x = rng.dirichlet(np.ones(21), 60).astype(np.float32)[:, :20]
    more = {"indices": np.argsort(rng.random(y.shape))[:, :20], "weights": np.arange(60.0)}
    options = {"reduction": reduction, "return_grad": ("x", "y")}
    expected = on("kl_div", x, y, tail, ("probs", "logits"), more, **options)
    same(on("kl_div", *on_jax(x, y, more)[:2], tail, ("probs", "logits"), more, **options), expected)


@pytest.mark.parametrize("x_64", [False, True], ids=["", "x64"])
@pytest.mark.parametrize("name", ["float64", "float16", "bfloat16"])
def test_dtypes(name, x_64):
    x, y, more = arguments("mass", ("probs", "logits"), {"bfloat16": ml_dtypes.bfloat16}.get(name, name))
    with jax.enable_x64(x_64):
        a, b, rest = on_jax(x, y, more)
        plain = np.asarray(a), np.asarray(b), {name: np.asarray(v) for name, v in rest.items()}
        for reduction in ("row", "sum"):
            f = partial(on, "kl_div", tail="mass", space=("probs", "logits"), reduction=reduction)
            expected = f(plain[0], plain[1], more=plain[2], return_grad=("x", "y"))
            same(f(a, b, more=rest, return_grad=("x", "y")), expected)
            found = jax.jit(jax.grad(lambda a, b, f=f: f(a, b, more=rest).sum(), (0, 1)))(a, b)
            if reduction == "row":
                same(found, expected[1:])
            assert [g.dtype for g in found] == [a.dtype, b.dtype]


@pytest.mark.parametrize("x_64", [False, True], ids=["", "x64"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint32", "uint64", "list"])
def test_indices_of_any_integers(dtype, x_64):
    """An index that does not fit JAX's own integers is outside of y, and does not become another class."""
    x, y = np.float32([[0.5, 0.25]]), np.float32([[0.25, 0.25, 0.5]])
    with jax.enable_x64(x_64):
        f = partial(klcore.kl_div, jnp.asarray(x), jnp.asarray(y), tail="bucket")
        one = [[2, 0]] if dtype == "list" else jnp.asarray(np.array([[2, 0]], dtype))
        expected = klcore.kl_div(x, y, indices=[[2, 0]], tail="bucket")
        same(f(indices=one), expected)
        same(jax.jit(lambda i: f(indices=i))(one), expected)
        if dtype.endswith(("32", "64")):
            far = np.array([[2, np.iinfo(dtype).max]], dtype)
            with pytest.raises(ValueError, match=r"indices must lie in \[0, 3\)"):
                f(indices=far)
            with pytest.raises(ValueError, match=r"indices must lie in \[0, 3\)"):
                f(indices=jnp.asarray(far) if x_64 or dtype == "uint32" else far)


def test_no_rows_and_no_classes():
    """Zero rows; and for rows that list no class, all classes are one."""
    y = np.float32([[0.25, 0.75]])
    for shape in ((0, 1), (1, 0)):
        x, b = np.zeros(shape, np.float32), y[: shape[0]]
        options = {"indices": np.zeros(shape, int), "tail": "bucket", "return_grad": ("x", "y")}
        same(klcore.kl_div(jnp.asarray(x), jnp.asarray(b), **options), klcore.kl_div(x, b, **options))


# ---- derivatives -----------------------------------------------------------------------------------------------------


def divergence(p, q):
    there = p > 0
    return jnp.where(there, p * jnp.log(jnp.where(there, p, 1) / jnp.where(q > 0, q, 1)), 0) - p + q


def probabilities(a, space, temperature, there=True):
    """The probabilities of the listed classes."""
    if space == "logits":
        return jax.nn.softmax(jnp.where(there, a / temperature, -jnp.inf))
    a = jnp.where(there, jnp.exp(a) if space == "log_probs" else a, 0)
    return a / a.sum() if space == "counts" else a


def naive(operation, tail, space, arrays):
    """The value of a row of all classes, plus one for the unlisted ones; one operation only with JAX."""
    x, y, indices, temperature, n = arrays["x"], arrays["y"], arrays["indices"], arrays.get("temperature"), CLASSES
    listed = jnp.zeros(n + 1).at[indices].set(1)[:n]  # -1 is the class after the last
    p = jnp.zeros(n + 1).at[indices].add(probabilities(x, space[0], temperature, indices >= 0))[:n]
    q = probabilities(y, space[1], temperature)
    rest_p, rest_q = {"bucket": 1 - p.sum(), "mass": arrays.get("tail_mass")}.get(tail, 0.0), (q * (1 - listed)).sum()
    q = q * listed
    if tail == "renorm":
        p, q, rest_p, rest_q = p / p.sum(), q / q.sum(), 0.0, 0.0
    p, q = jnp.append(p, rest_p), jnp.append(q, rest_q)
    return divergence(p, q).sum() if operation == "kl_div" else getattr(klcore, operation)(p, q)


@BY_CASE
def test_derivatives_are_those_of_a_naive_function(operation, tail, space):
    """With respect to x, y and temperatures; in reverse mode, and for rows in forward mode. One class is listed
    twice."""
    with jax.enable_x64(True):
        compare_derivatives(operation, tail, space)


def compare_derivatives(operation, tail, space):
    x, y, more = on_jax(*arguments(tail, space, np.float64))
    more["indices"] = more["indices"].at[0, 0, 1].set(more["indices"][0, 0, 0])
    arrays = {"x": x, "y": y} | ({"temperature": jnp.linspace(0.7, 2, 12).reshape(SHAPE)} if "logits" in space else {})
    c, moved = jnp.linspace(-1, 2, 12).reshape(SHAPE), jax.tree.map(jnp.cos, arrays)

    def klcores(x, y, **temperature):
        return on(operation, x, y, tail, space, more | temperature)

    def naives(**arrays):
        return jax.vmap(jax.vmap(partial(naive, operation, tail, space)))(arrays | more)

    def derivatives(f):
        value, back = jax.vjp(lambda arrays: f(**arrays), arrays)
        return value, back(c), jax.jvp(lambda arrays: f(**arrays), (arrays,), (moved,))[1]

    found, expected = (jax.tree.leaves(jax.jit(partial(derivatives, f))()) for f in (klcores, naives))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


def test_no_class_has_no_derivative():
    """Whatever x contains where no class is listed; including the temperature's."""
    x, y, more = arguments("renorm", ("logits", "logits"))
    assert (more["indices"] < 0).any()

    def gradients(nothing):
        a = np.where(more["indices"] < 0, np.float32(nothing), x)
        f = jax.grad(
            lambda x, y, t: on("kl_div", x, y, "renorm", ("logits", "logits"), more, temperature=t).sum(), (0, 1, 2)
        )
        return f(a, y, jnp.full(SHAPE, 1.5))

    expected = gradients(0)
    assert (np.asarray(expected[0])[more["indices"] < 0] == 0).all()
    for nothing in (1e30, np.inf, np.nan):
        same(gradients(nothing), expected)


def test_gradients_beside_a_value_and_by_terms():
    """The cotangents of terms; and those of a total, in one pass."""
    x, y, more = arguments("bucket", ("probs", "logits"))
    a, b, rest = on_jax(x, y, more)
    f = partial(on, "kl_div", tail="bucket", space=("probs", "logits"), more=rest)
    c = jnp.arange(12.0 * (COUNT + 1)).reshape(*SHAPE, COUNT + 1) % 7
    _, back = jax.vjp(partial(f, reduction="none"), a, b)
    each = [back(jnp.zeros_like(c).at[..., k].set(c[..., k])) for k in range(COUNT + 1)]
    for found, parts in zip(back(c), zip(*each, strict=True), strict=True):
        np.testing.assert_allclose(found, sum(parts), rtol=1e-5, atol=1e-6)
    expected = on("kl_div", x, y, "bucket", ("probs", "logits"), more, reduction="sum", return_grad=("x", "y"))
    same(jax.value_and_grad(partial(f, reduction="sum"), (0, 1))(a, b)[1], expected[1:])


@pytest.mark.parametrize("tail", ["zero", "bucket", "renorm"])
@pytest.mark.parametrize("reduction", ["row", "none", "sum"])
def test_cotangent_of_zero_gives_zero(tail, reduction):
    """Even if the derivative is infinite, or nothing is left to normalise."""
    x, y, indices = jnp.float32([[0.5], [0.5]]), jnp.float32([[0, 1], [0.5, 0.5]]), jnp.array([[0], [0]])

    def f(x, y, c):
        value = klcore.kl_div(x, y, indices=indices, tail=tail, reduction=reduction)
        return (c.reshape((2,) + (1,) * (value.ndim - 1)) * value).sum() if value.ndim else c[0] * value

    for found in jax.grad(f, (0, 1))(x, y, jnp.float32([0, 1])):
        assert np.isfinite(found).all()
        assert (found[0] == 0).all()


def test_as_many_terms_as_classes():
    """The terms of y's row are not those of y's classes, even if there are as many: K + 1 = V."""
    x, y = jnp.float32([[0.5, 0.25]]), jnp.float32([[0.125, 0.375, 0.5]])
    f = partial(klcore.kl_div, x, indices=jnp.array([[2, 0]]), tail="bucket", reduction="none")
    found = jax.grad(lambda y: f(y)[0, 0])(y)
    np.testing.assert_allclose(found, [[0, 0, 1 - 0.5 / 0.5]], atol=1e-7)
    found = jax.grad(lambda y: f(y)[0, 1])(y)
    np.testing.assert_allclose(found, [[1 - 0.25 / 0.125, 0, 0]])


# ---- transformations -------------------------------------------------------------------------------------------------

MAPPED = ("x", "y", "indices", "tail_mass", "weights", "temperature")


@pytest.mark.parametrize(
    ("mapped", "reduction"),
    [*(((name,), "row") for name in MAPPED), (MAPPED, "row"), (MAPPED, "none"), (("x", "indices"), "rowmean")],
    ids=lambda a: a if isinstance(a, str) else "-".join(a),
)
def test_vmap(mapped, reduction, monkeypatch):
    """Over any of the arguments, with their gradients. All examples are rows of one call."""
    x, y, more = arguments("mass", ("probs", "logits"), batch=(4, 5))
    given = {"x": x, "y": y, **more, "weights": np.arange(20, dtype=np.float32).reshape(4, 5)}
    given["temperature"] = np.linspace(0.5, 2, 20, dtype=np.float32).reshape(4, 5)
    given = {name: jnp.asarray(a if name in mapped else a[1]) for name, a in given.items()}

    def f(given):
        x, y, rest = given["x"], given["y"], {name: a for name, a in given.items() if name not in "xy"}
        return on("kl_div", x, y, "mass", ("probs", "logits"), rest, reduction=reduction, return_grad=("x", "y"))

    calls = []
    cpu = importlib.import_module("klcore.backends.cpu")
    compute = cpu.compute
    expected = [f({name: a[k] if name in mapped else a for name, a in given.items()}) for k in range(4)]
    expected = tuple(np.stack(parts) for parts in zip(*expected, strict=True))
    monkeypatch.setattr(cpu, "compute", lambda call: calls.append(call) or compute(call))
    found = jax.vmap(f, ({name: 0 if name in mapped else None for name in given},))(given)
    jax.block_until_ready(found)
    same(found, expected)
    assert sum(call.indices is not None for call in calls) == (4 if reduction == "rowmean" else 1)


def test_vmap_of_gradients():
    """Over axes other than the first, of differentiated and other arguments."""
    x, y, more = on_jax(*arguments("bucket", ("probs", "logits")))
    indices = more["indices"]

    def f(x, y, i, t):
        return klcore.kl_div(x, y, indices=i, tail="bucket", space=("probs", "logits"), temperature=t, reduction="sum")

    g = jax.jit(jax.grad(f, (0, 1, 3)))
    found = jax.vmap(g, (1, 1, 1, None))(x, y, indices, 1.5)
    expected = [g(x[:, k], y[:, k], indices[:, k], 1.5) for k in range(3)]
    for a, b in zip(found, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(a, np.stack(b), rtol=1e-6, atol=1e-9)


def test_jacobians():
    x, y, more = on_jax(*arguments("bucket", ("probs", "logits"), batch=(3,)))
    f = partial(klcore.kl_div, x, indices=more["indices"], tail="bucket", space=("probs", "logits"))
    np.testing.assert_allclose(jax.jit(jax.jacrev(f))(y), jax.jit(jax.jacfwd(f))(y), rtol=1e-6, atol=1e-7)


def test_lowering():
    """The numbers of a list are data: one program for all lists."""
    x, y, more = on_jax(*arguments("bucket", ("probs", "logits")))
    f = jax.jit(lambda x, y, i: klcore.kl_div(x, y, indices=i, tail="bucket", space=("probs", "logits")))
    compiled = f.lower(x, y, more["indices"]).compile()
    turned = more["indices"][::-1]
    same(compiled(x, y, turned), np.asarray(f(x, y, turned)))
    with pytest.raises(NotImplementedError, match=r"cannot be exported"):
        jax.export.export(f)(x, y, turned)


def test_buffers_on_a_gpu(gpu, buffer):  # noqa: F811
    """What XLA would call there: an index outside of y makes its row NaN."""
    x, y, more = arguments("mass", ("probs", "logits"), batch=(3,))
    more["indices"][1, 2] = CLASSES
    call = Call(OPERATIONS["kl_div"], None, None, ("probs", "logits"), -1, "row", tail="bucket")
    programs = importlib.import_module("klcore.backends.jax.programs")
    names = ("x", "y", "indices", "tail_mass")
    program = programs.Program(call, 2, (3,), np.dtype("float32"), ("x", "y"), names=names)
    results = [buffer(np.empty_like(a)) for a in (y[:, 0], x, y)]
    given = [buffer(a) for a in (x, y, more["indices"], more["tail_mass"])]
    programs.on_buffers(program, False, types.SimpleNamespace(stream=0), results, *given)
    expected = on("kl_div", x, y, "mass", ("probs", "logits"), more | {"weights": [1, 0, 1]}, return_grad=("x", "y"))
    for result, e in zip(results, expected, strict=True):
        found = gpu.get(result.array)
        np.testing.assert_array_equal(found[::2], e[::2])
        assert np.isnan(found[1]).any()


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("traced", [False, True], ids=["", "jit"])
@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ({"indices": np.array([[0, 9]])}, ValueError, r"indices must lie in \[0, 3\).*found 9 at index \(0, 1\)"),
        ({"indices": np.array([[0, -2]])}, ValueError, r"indices must lie in"),
        ({"indices": np.array([[0.0, 1.0]])}, TypeError, r"indices must be integers"),
        ({"indices": np.array([[True, False]])}, TypeError, r"indices must be integers"),
        ({"indices": np.array([[0, 1, 2]])}, ValueError, r"the same number of classes"),
        ({"indices": np.zeros((2, 3, 2), int)}, ValueError, r"broadcast"),
        ({"tail_mass": np.float32(1.5)}, ValueError, r"tail_mass must lie in \[0, 1\]; found 1.5"),
        ({"tail_mass": np.float32([1, 0, 0])}, ValueError, r"tail_mass of shape \(3,\) does not broadcast"),
        ({"tail": None}, TypeError, r"indices= needs tail="),
        ({"indices": None}, TypeError, r"tail= describes the classes"),
        ({"indices": None, "tail": None, "tail_mass": 0.5}, TypeError, r"tail_mass= describes the classes"),
        ({"tail": "renorm", "tail_mass": 0.5}, ValueError, r"tail_mass needs tail='bucket'"),
        ({"space": "logits"}, ValueError, r"with tail='renorm'; with"),
    ],
)
def test_errors_are_numpys(bad, error, match, traced):
    """For what is known when JAX traces: an index too, unless its row may have no weight."""
    x, y = np.float32([[0.5, 0.25], [0.5, 0.25]]), np.float32([[0.5, 0.25, 0.25]])
    options = {"indices": np.array([[0, 1]]), "tail": "bucket", **bad}

    def f(x, y):
        return klcore.kl_div(x, y, **options)

    with pytest.raises(error, match=match):
        f(x, y)
    with pytest.raises(error, match=match):
        (jax.jit(f) if traced else f)(jnp.asarray(x), jnp.asarray(y))


@pytest.mark.parametrize("name", ["indices", "tail_mass"])
def test_numbers_known_only_when_it_runs(name):
    """They are validated at run time; those of rows without weight are not, even if they are known before."""
    x, y = jnp.float32([[0.5, 0.25]] * 2), jnp.float32([[0.5, 0.25, 0.25]])
    good = {"indices": np.array([[0, 1], [1, 2]]), "tail_mass": np.float32([0.5, 0.25])}
    bad = good | {
        name: good[name] + np.array([0, 7], np.float32).astype(good[name].dtype).reshape((2, -1)[: good[name].ndim])
    }

    def f(weights, given):
        return klcore.kl_div(x, y, tail="bucket", weights=weights, **good | given)

    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{name} must lie in"):
        jax.block_until_ready(jax.jit(partial(f, None))({name: bad[name]}))
    without = np.float32([2, 0])
    expected = np.asarray(f(without, {}))
    same(f(without, bad), expected)
    same(jax.jit(f)(without, bad), expected)
    same(jax.jit(lambda w: f(w, bad))(without), expected)


def test_what_has_no_derivative():
    """tail_mass; second derivatives; and terms in forward mode."""
    x, y, more = on_jax(*arguments("mass", ("probs", "logits")))
    f = partial(on, "kl_div", tail="mass", space=("probs", "logits"))

    def of_mass(m, reduction="row"):
        return f(x, y, more=more | {"tail_mass": m}, reduction=reduction).sum()

    with pytest.raises(
        NotImplementedError, match=r"no derivative with respect to tail_mass.*stop_gradient\(tail_mass\)"
    ):
        jax.grad(of_mass)(more["tail_mass"])
    assert (jax.grad(lambda m: of_mass(jax.lax.stop_gradient(m)))(more["tail_mass"]) == 0).all()
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.grad(lambda y: jax.grad(lambda y: f(x, y, more=more).sum())(y).sum())(y)
    with pytest.raises(NotImplementedError, match=r"no forward mode.*with indices"):
        jax.jvp(lambda y: f(x, y, more=more, reduction="none"), (y,), (y,))


def test_operations_without_lists():
    with pytest.raises(TypeError, match="indices"):
        klcore.sq_hellinger(jnp.ones(2), jnp.ones(3), indices=jnp.array([0, 1]), tail="zero")
