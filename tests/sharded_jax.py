"""JAX arrays that are sharded over four devices; run by test_jax_sharded.py, in a process that has four devices.

Every device computes only its own rows; if the classes are sharded, it also sees the states of the other devices.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_jax import arguments, on

import klcore
from klcore.backends import cpu
from klcore.divergence import loss
from klcore.operations import LOSSES, OPERATIONS

MESH = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
ROWS, SOME_ROWS, CLASSES, BOTH = P(("a", "b")), P("b"), P(None, ("a", "b")), P("a", "b")
CHUNKS = 4 * 1024  # classes: at least one chunk per device
EACH = [*((name, "row") for name in OPERATIONS), *(("kl_div", r) for r in ("none", "sum", "rowmean", "batchmean"))]


@pytest.fixture(params=["shardy", "gspmd"])
def partitioner(request):
    """JAX's two partitioners; one of them is going away."""
    if not hasattr(jax.config, "jax_use_shardy_partitioner"):
        pytest.skip("JAX has one partitioner")
    jax.config.update("jax_use_shardy_partitioner", request.param == "shardy")
    jax.clear_caches()
    yield
    jax.config.update("jax_use_shardy_partitioner", True)
    jax.clear_caches()


@pytest.fixture
def shapes(monkeypatch):
    """The shapes of what the engine receives."""
    seen = []
    for name in ("compute", "states"):
        original = getattr(cpu, name)

        def watched(call, *more, original=original):
            seen.append(call.x.shape)
            return original(call, *more)

        monkeypatch.setattr(cpu, name, watched)
    return seen


def put(a, spec):
    """A broadcast axis is not split."""
    spec = (*spec, *[None] * a.ndim)[: a.ndim]
    return jax.device_put(
        a, NamedSharding(MESH, P(*(s if n > 1 else None for s, n in zip(spec, a.shape, strict=True))))
    )


def collectives(function, *arguments):
    """How many bytes of arrays each collective of a compiled program makes."""
    text = function.lower(*arguments).compile().as_text()
    found = re.findall(r"= \(?(\w+?)(\d+)\[([\d,]*)\][^=]* (all-\w+|reduce-scatter|collective-permute)\(", text)
    return [
        (name, int(bits) // 8 * int(np.prod([int(n) for n in shape.split(",") if n]))) for _, bits, shape, name in found
    ]


def same(found, expected, of=slice(None)):
    for f, e in zip(found[of], expected[of], strict=True):
        assert f.dtype == e.dtype
        np.testing.assert_array_equal(f, e)


def close(found, expected):
    """Within the error of sums over the devices, in float32."""
    for f, e in zip(found, expected, strict=True):
        scale = np.abs(e).max(initial=0, where=np.isfinite(e))
        np.testing.assert_allclose(f, e, rtol=1e-6, atol=1e-6 * scale)


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("partitioner")
@pytest.mark.parametrize("reduction", ["row", "none", "sum"])
def test_every_device_computes_its_own_rows(reduction, shapes):
    """Value and gradients, without communication except for the sum of a total; and the results stay where they are."""
    x, y = arguments(("logits", "logits"), (8, 50))
    a, b = put(x, ROWS), put(y, ROWS)
    options = {"space": "logits", "reduction": reduction, "return_grad": ("x", "y")}
    f = jax.jit(partial(klcore.kl_div, **options))
    g = jax.jit(jax.grad(lambda a, b: f(a, b)[0].sum(), (0, 1)))
    found = jax.block_until_ready((f(a, b), g(a, b)))
    assert set(shapes) == {(2, 50)}
    assert len(shapes) == 4 * 2
    total = [("all-reduce", 4)] if reduction == "sum" else []
    assert collectives(f, a, b) == total
    assert {name for name, size in collectives(g, a, b) if size > 4} == set()
    expected = klcore.kl_div(x, y, **options)
    same(found[0], expected, slice(reduction == "sum", None))
    close(found[0][:1], expected[:1])
    close(found[1], expected[1:])
    same(klcore.kl_div(a, b, **options), found[0])  # outside of jit as well
    by_row = (*found[0][reduction == "sum" :], *found[1])
    assert all(v.sharding.is_equivalent_to(NamedSharding(MESH, ROWS), v.ndim) for v in by_row)


@pytest.mark.parametrize(("operation", "reduction"), EACH)
def test_rows_of_all_operations(operation, reduction):
    """One side sharded differently, or not at all; with weights."""
    space = ("logits", "logits") if OPERATIONS[operation].single else ("counts", "logits")
    x, y = arguments(space, (8, 50))
    w = np.arange(8, dtype=np.float32)
    options = {"reduction": reduction, "return_grad": ("x", "y")}
    expected = on(operation, x, y, space, weights=w, **options)
    f = jax.jit(lambda a, b, w: on(operation, a, b, space, weights=w, **options))
    found = f(put(x, SOME_ROWS), put(y, P()), put(w, ROWS))
    same(found, expected, slice(reduction not in ("row", "none"), None))
    close(found[:1], expected[:1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(50,), (1, 3, 50), (8, 1, 50)], ids=str)
def test_an_operand_that_rows_share(shape, dtype):
    """Its gradient is the sum of all devices' parts, which are rounded once."""
    x, y = (jnp.asarray(a).astype(dtype) for a in arguments(("logits", "logits"), (8, 3, 50), shape))
    f = jax.jit(jax.grad(lambda a, b: klcore.kl_div(a, b, space="logits", reduction="sum"), (0, 1)))
    found = f(put(x, ROWS), put(y, ROWS if y.ndim == 3 else P()))
    whole = klcore.kl_div(*(np.asarray(a) for a in (x, y)), space="logits", reduction="sum", return_grad=("x", "y"))
    close([np.asarray(v, np.float32) for v in found], [np.asarray(v, np.float32) for v in whole[1:]])
    assert found[1].dtype == dtype


def test_batches_that_do_not_divide():
    """They are computed whole, by every device."""
    x, y = arguments(("logits", "logits"), (6, 50))
    f = jax.jit(lambda a, b: klcore.kl_div(a[1:], b[1:], space="logits"))
    np.testing.assert_array_equal(f(put(x, P("a")), put(y, P("a"))), klcore.kl_div(x[1:], y[1:], space="logits"))


def test_vmap_of_what_is_sharded(shapes):
    """Over examples that are sharded, over rows, and with an operand and temperatures that are replicated."""
    x, y = arguments(("logits", "logits"), (8, 4, 50), (4, 50))
    t = np.linspace(0.5, 2, 8, dtype=np.float32)

    def f(x, y, reduction):
        return klcore.kl_div(x, y, space="logits", reduction=reduction, return_grad="x")

    for reduction in ("row", "sum", "rowmean"):
        expected = jax.vmap(partial(f, reduction=reduction), (0, None))(x, y)
        for spec in (ROWS, BOTH):
            del shapes[:]
            found = jax.jit(jax.vmap(partial(f, reduction=reduction), (0, None)))(put(x, spec), put(y, P()))
            close(found, expected)
            assert {np.prod(shape[:-1]) for shape in shapes} in ({8}, {2}, {4})
    g = jax.jit(jax.vmap(lambda x, t: klcore.kl_div(x, y, space="logits", temperature=t)))
    expected = np.stack([klcore.kl_div(a, y, space="logits", temperature=one) for a, one in zip(x, t, strict=True)])
    close([g(put(x, ROWS), put(t, ROWS))], [expected])


@pytest.mark.parametrize("term", LOSSES)
def test_losses(term):
    """Losses of other systems, with factors, which are sharded as well, and an operand that is broadcast over the
    classes."""
    space = LOSSES[term].pairs[0]
    x, y = arguments(space, (8, 52), (8, 1))
    factors = np.random.default_rng(2).normal(size=(8, 1)).astype(np.float32)
    for reduction in ("row", "none", "sum"):
        options = {"space": space, "reduction": reduction, "denominator": 3.0, "return_grad": "y", "epsilon": 1e-3}
        expected = loss(term, x, y, factors=factors, **options)
        f = jax.jit(lambda a, b, w, o=options: loss(term, a, b, factors=w, **o))
        for spec in (ROWS, CLASSES):
            close(f(put(x, spec), put(y, spec), put(factors, spec)), expected)


def test_estimators():
    x, y = (-np.abs(a) for a in arguments(("logits", "logits"), (8, 6)))
    w = np.arange(48, dtype=np.float32).reshape(8, 6)
    for reduction in ("none", "sum", "mean"):
        expected = klcore.kl_estimate(x, y, weights=w, reduction=reduction, return_grad=("x", "y"))
        f = jax.jit(partial(klcore.kl_estimate, reduction=reduction, return_grad=("x", "y")))
        for spec in (ROWS, BOTH):
            close(f(put(x, spec), put(y, spec), weights=put(w, spec)), expected)


# ---- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operation", "reduction"), EACH)
def test_sharded_classes_exchange_states(operation, reduction, shapes):
    """The bits of unsharded classes, if every shard holds whole chunks; only a total is the sum of the devices'
    totals."""
    space = ("logits", "logits")
    x, y = arguments(space, (4, CHUNKS))
    w = np.arange(4, dtype=np.float32)
    options = {"reduction": reduction, "weights": w, "return_grad": ("x", "y")}
    expected = on(operation, x, y, space, **options)
    f = jax.jit(lambda a, b: on(operation, a, b, space, **options))
    for spec, part in ((CLASSES, (4, CHUNKS // 4)), (BOTH, (2, CHUNKS // 2))):
        a, b = put(x, spec), put(y, spec)
        del shapes[:]
        found = jax.block_until_ready(f(a, b))
        assert set(shapes) == {part}
        same(found, expected, slice(reduction not in ("row", "none") and spec == BOTH, None))
        close(found[:1], expected[:1])
        assert found[1].sharding.is_equivalent_to(a.sharding, 2)


@pytest.mark.usefixtures("partitioner")
@pytest.mark.parametrize(("classes", "chunks"), [(CHUNKS, 1), (2 * CHUNKS, 2), (CHUNKS + 4, 1), (300, 1)])
def test_bytes_that_are_exchanged(classes, chunks):
    """Nine doubles per row of logits: for every 1024 classes if chunks are whole, else for each device. No more for the
    gradients."""
    x, y = (put(a, CLASSES) for a in arguments(("logits", "logits"), (4, classes)))
    for f in (
        lambda a, b: klcore.kl_div(a, b, space="logits"),
        jax.grad(lambda a, b: klcore.kl_div(a, b, space="logits", reduction="sum"), (0, 1)),
    ):
        assert collectives(jax.jit(f), x, y) == [("all-gather", 4 * 72 * 4 * chunks)]


@pytest.mark.parametrize("space", [("probs", "probs"), ("logits", "probs"), ("counts", "log_probs")], ids=str)
@pytest.mark.parametrize("reduction", ["row", "none", "sum"])
def test_sharded_classes_of_any_number(space, reduction):
    """Differentiated by JAX; with the classes first; and shards that do not hold whole chunks: within rounding."""
    x, y = arguments(space, (3, 4, 1200), (4, 1200))
    c = np.random.default_rng(3).normal(size=(3, 4)).astype(np.float32)

    def f(x, y):
        value = klcore.kl_div(x, y, space=space, axis=-1, reduction=reduction)
        return (value.reshape(3, 4, -1) * c[..., None]).sum() if reduction != "sum" else 3 * value

    expected = jax.value_and_grad(f, (0, 1))(x, y)
    found = jax.jit(jax.value_and_grad(f, (0, 1)))(put(x, P(None, "a", "b")), put(y, P("a", "b")))
    close([found[0], *found[1]], [expected[0], *expected[1]])
    turned = jax.jit(lambda a, b: klcore.kl_div(a, b, space=space, axis=0))
    a, b = (np.moveaxis(v, -1, 0) for v in (x, np.broadcast_to(y, x.shape)))
    close([turned(put(a, ROWS), put(b, ROWS))], [klcore.kl_div(x, y, space=space)])


def test_a_temperature_for_each_row():
    """And the derivative with respect to it, which devices that share a row add up."""
    x, y = arguments(("logits", "logits"), (8, CHUNKS))
    t = np.linspace(0.5, 2, 8, dtype=np.float32)

    def f(x, y, t):
        return klcore.kl_div(x, y, space="logits", temperature=t, reduction="rowmean")

    expected = jax.grad(f, (0, 1, 2))(*map(jnp.asarray, (x, y, t)))
    for spec in (ROWS, CLASSES, BOTH):
        found = jax.jit(jax.grad(f, (0, 1, 2)))(put(x, spec), put(y, spec), put(t, P(*spec[:1])))
        same(found[:2], expected[:2])
        np.testing.assert_allclose(found[2], expected[2], rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sharded_classes_of_16_bits(dtype):
    """With a loss scale in the cotangent."""
    x, y = (jnp.asarray(a).astype(dtype) for a in arguments(("logits", "logits"), (4, 1200)))
    g = jax.grad(lambda a, b: 1024 * klcore.kl_div(a, b, space="logits", reduction="mean"), (0, 1))
    for found, expected in zip(jax.jit(g)(put(x, BOTH), put(y, BOTH)), g(x, y), strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=float(jnp.finfo(dtype).eps))


def test_sharded_classes_under_vmap():
    x, y = arguments(("logits", "logits"), (3, 4, 1200))
    for reduction in ("row", "sum"):
        g = jax.vmap(
            jax.value_and_grad(lambda a, b, r=reduction: klcore.kl_div(a, b, space="logits", reduction=r).sum())
        )
        found, expected = jax.jit(g)(put(x, P(None, "a", "b")), put(y, P(None, "a", "b"))), g(x, y)
        close(found, expected)


# ---- lists of classes ------------------------------------------------------------------------------------------------


def listing(count=8, n=40, rows=8):
    """x, y and indices."""
    rng = np.random.default_rng(4)
    indices = np.argsort(rng.random((rows, n)))[:, :count].astype(np.int32)
    x = rng.dirichlet(np.ones(n), rows).astype(np.float32)
    return np.take_along_axis(x, indices, -1), rng.normal(size=(rows, n)).astype(np.float32), indices


@pytest.mark.usefixtures("partitioner")
@pytest.mark.parametrize(("reduction", "count"), [("row", 8), ("none", 40), ("rowmean", 8)])
def test_lists_of_classes(reduction, count, shapes):
    """Every device computes only its own rows; sharded classes are gathered."""
    x, y, indices = listing(count)
    w = np.arange(8, dtype=np.float32)

    def f(x, y, i, w):
        return klcore.kl_div(
            x, y, indices=i, tail="bucket", space=("probs", "logits"), weights=w, reduction=reduction,
            return_grad=("x", "y"),
        )  # fmt: skip

    expected = f(x, y, indices, w)
    for specs, rows in (((ROWS,) * 4, 2), ((CLASSES,) * 3 + (P(),), 8), ((P(), BOTH, SOME_ROWS, ROWS), 4)):
        given = [put(a, spec) for a, spec in zip((x, y, indices, w), specs, strict=True)]
        del shapes[:]
        found = jax.block_until_ready(jax.jit(f)(*given))
        same(found, expected, slice(reduction == "rowmean", None))
        close(found[:1], expected[:1])
        assert set(shapes) == {(rows, count)}
    by_jax = jax.jit(jax.grad(lambda *a: f(*a)[0].sum(), (0, 1)))
    close(by_jax(*(put(a, ROWS) for a in (x, y, indices, w))), expected[1:])


def test_lists_that_rows_share():
    """In shard_map, under vmap, on a mesh with explicit axes; a list and an operand that are replicated."""
    x, y, indices = listing()

    def f(x, y, i):
        return klcore.kl_div(x, y, indices=i, tail="renorm", space=("probs", "logits"), reduction="sum")

    g = jax.grad(f, (0, 1))
    expected = g(x[0], y, indices[0])
    close(jax.jit(g)(put(x[0], P()), put(y, ROWS), put(indices[0], P())), expected)
    mapped = partial(jax.shard_map, mesh=MESH, in_specs=(P(), ROWS, P()))
    close(jax.jit(mapped(g, out_specs=(P(), ROWS)))(x[0], y, indices[0]), expected)
    each = jax.jit(jax.vmap(g))
    close(each(*(put(a, ROWS) for a in (x, y, indices))), each(x, y, indices))
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    for spec in (ROWS, BOTH):
        a, b, i = (jax.device_put(v, NamedSharding(mesh, spec)) for v in (x, y, indices))
        close(jax.jit(g)(a, b, i), g(x, y, indices))


def test_lists_that_are_wrong():
    """They give NaN if compiled code finds them."""
    x, y, indices = listing()
    indices[5, 0] = 40
    found = jax.jit(partial(klcore.kl_div, tail="bucket"))(
        *(put(np.abs(a), ROWS) for a in (x, y)), indices=put(indices, ROWS)
    )
    assert np.isnan(found[5])
    assert np.isfinite(found[:4]).all()


# ---- meshes with explicit and manual axes ----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [ROWS, BOTH], ids=str)
def test_explicit_axes(spec):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x, y = arguments(("logits", "logits"), (8, CHUNKS))
    a, b = (jax.device_put(v, NamedSharding(mesh, spec)) for v in (x, y))
    f = partial(klcore.kl_div, space="logits", return_grad=("x", "y"))
    found = jax.jit(f)(a, b)
    same(found, f(x, y))
    assert found[0].sharding.spec == P(spec[0])
    g = jax.jit(jax.grad(lambda a, b: f(a, b)[0].sum(), (0, 1)))(a, b)
    assert all(v.sharding.is_equivalent_to(a.sharding, 2) for v in (*found[1:], *g))
    each = jax.jit(jax.vmap(jax.grad(lambda a, b: f(a, b)[0], (0, 1))))(a, b)
    same(each, g)


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_in_and_around_shard_map(operation, where):
    """With its checks, and an operand that is replicated."""
    space = ("logits", "logits") if OPERATIONS[operation].single else ("probs", "logits")
    x, y = arguments(space, (8, 50), (50,))

    def f(x, y):
        return on(operation, x, y, space).sum()

    mapped = partial(jax.shard_map, mesh=MESH, in_specs=(ROWS, P()))
    if where == "inside":
        g = mapped(jax.grad(f, (0, 1)), out_specs=(ROWS, P()))
    else:
        g = jax.grad(mapped(lambda a, b: jax.lax.psum(f(a, b), ("a", "b")), out_specs=P()), (0, 1))
    close(jax.jit(g)(x, y), jax.grad(f, (0, 1))(x, y))


@pytest.mark.parametrize("reduction", ["row", "none", "sum"])
@pytest.mark.parametrize("term", ["pytorch", "keras", "mxnet"])
def test_losses_in_shard_map(term, reduction):
    space = LOSSES[term].pairs[0]
    x, y = arguments(space, (8, 50))
    f = jax.grad(lambda a, b: loss(term, a, b, space=space, reduction=reduction, epsilon=1e-3).sum(), 1)
    found = jax.jit(jax.shard_map(f, mesh=MESH, in_specs=(ROWS, ROWS), out_specs=ROWS))(x, y)
    close([found], [f(x, y)])


def test_shard_map_untraced_with_vmap_and_temperatures():
    x, y = (jnp.asarray(a) for a in arguments(("logits", "logits"), (8, 3, 50)))
    t = jnp.linspace(0.5, 2, 8)

    def f(x, y, t):
        return jax.vmap(jax.value_and_grad(lambda t: klcore.kl_div(x, y, space="logits", temperature=t).sum()))(t)

    mapped = jax.shard_map(f, mesh=MESH, in_specs=(ROWS, ROWS, P()), out_specs=ROWS)
    values, slopes = (
        np.stack(a) for a in zip(*(f(x[k : k + 2], y[k : k + 2], t) for k in range(0, 8, 2)), strict=True)
    )
    # a temperature that all devices share has the derivative of all their rows
    close(mapped(x, y, t), [values.reshape(-1), np.tile(slopes.sum(axis=0), 4)])


def test_one_device_of_several():
    """A call on arrays that lie on one device is not split."""
    second = jax.devices()[1]
    x, y = (jax.device_put(a, second) for a in arguments(("probs", "probs")))
    found = klcore.kl_div(x, y)
    assert found.devices() == {second}
    np.testing.assert_array_equal(found, klcore.kl_div(np.asarray(x), np.asarray(y)))


@pytest.mark.parametrize("spec", [ROWS, CLASSES, BOTH], ids=str)
@pytest.mark.parametrize("name", ["weights", "temperature"])
def test_numbers_that_are_wrong(name, spec):
    """They give NaN, as on a GPU: a device that raised would leave the others waiting for it."""
    x, y = arguments(("logits", "logits"), (8, CHUNKS))
    bad = put(np.array([1, 1, 1, 1, 1, 1, -1, 1], np.float32), P(*spec[:1]))

    def f(x, y, bad):
        return klcore.kl_div(x, y, space="logits", reduction="sum", **{name: bad})

    value, gradient = jax.jit(jax.value_and_grad(f))(put(x, spec), put(y, spec), bad)
    assert np.isnan(value)
    assert np.isnan(gradient[6]).all()
    by_hand = jax.shard_map(lambda *a: jax.lax.psum(f(*a), ("a", "b")), mesh=MESH, in_specs=ROWS, out_specs=P())
    assert np.isnan(jax.jit(by_hand)(x, y, bad))


def test_weights_that_are_wrong_untraced():
    """They are checked first."""
    x = put(np.ones((8, 3), np.float32), ROWS)
    with pytest.raises(ValueError, match="weights must be finite and >= 0"):
        klcore.kl_div(x, x, weights=put(-np.ones(8, np.float32), ROWS))
