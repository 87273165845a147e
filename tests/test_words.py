"""The options for the scale of a result and for where it is written: base=, denominator=, and out= that is y itself."""

import importlib
import itertools
import math

import numpy as np
import pytest
from conftest import COMMON, DTYPES, operands

import klcore
from klcore.operations import FAMILY, OPERATIONS

NO_UNIT = ["alpha_div", "chi2_div", "sq_hellinger", "tv_dist"]
IN_NATS = [name for name in OPERATIONS if name not in NO_UNIT]
PAIRS = [("probs", "probs"), ("logits", "logits"), ("probs", "logits"), ("log_probs", "log_probs")]
GRADIENTS = {name: o.gradients if o.single else ("x", "y") for name, o in OPERATIONS.items()}


def rows(pair, shape=(3, 40), seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, *shape)) * 2
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    of = {"logits": logits, "probs": probs, "log_probs": np.log(probs)}
    return tuple(of[space][k].astype(dtype) for k, space in enumerate(pair))


def call(name, pair, arrays, **options):
    single = OPERATIONS[name].single
    options = {**OPERATIONS[name].needed, **options}
    return getattr(klcore, name)(*operands(name, *arrays), space=pair[0] if single else pair, **options)


def same(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert got.tobytes() == expected.tobytes()


# ---- base ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [2, 10.0, np.float32(1.5), 1e300])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", IN_NATS)
def test_base(device, name, pair, base):
    arrays = [device.put(a) for a in rows(pair)]
    for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"weights": device.put(np.array([0.5, 0, 2.0]))}):
        if options.get("reduction") == "none" and not OPERATIONS[name].has_terms:
            continue
        wanted = {"return_grad": GRADIENTS[name], **options}
        nats, units = (call(name, pair, arrays, base=b, **wanted) for b in (None, base))
        for a, b in zip(nats, units, strict=True):
            np.testing.assert_allclose(device.get(b), device.get(a) / math.log(base), rtol=1e-14, atol=1e-300)


def test_base_of_a_scaled_divergence():
    x, y = rows(("probs", "probs"))
    for beta in (0, 0.25, 1):
        nats, bits = (klcore.js_div(x, y, beta=beta, scaled=True, base=base) for base in (None, 2))
        np.testing.assert_allclose(bits, nats / math.log(2), rtol=1e-15)


@pytest.mark.parametrize("base", [1, 0.5, 0, -2, math.inf, math.nan, True])
@pytest.mark.parametrize("name", IN_NATS)
def test_wrong_base(name, base):
    with pytest.raises(ValueError, match="base must be a finite number > 1"):
        call(name, ("probs", "probs"), rows(("probs", "probs")), base=base)


@pytest.mark.parametrize("base", ["2", [2], b"e", 2j, np.complex128(2), np.str_("2"), np.array([2.0])])
def test_base_that_is_no_number(base):
    with pytest.raises(TypeError, match="base must be a number"):
        klcore.kl_div([1.0], [1.0], base=base)


@pytest.mark.parametrize("name", NO_UNIT)
def test_no_unit(name):
    with pytest.raises(ValueError, match=f"{name} has no unit"):
        getattr(klcore, name)([1.0], [1.0], base=2)


def test_every_function_is_one_of_both():
    assert sorted(NO_UNIT + IN_NATS) == sorted(OPERATIONS)
    assert set(NO_UNIT) < {o.name for o in FAMILY}


# ---- denominator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", COMMON)
def test_denominator(device, name, pair, dtype):
    """A number or an array without dimensions, of any dtype, on the host or on the device: the same bits."""
    arrays = [device.put(a) for a in rows(pair, dtype=DTYPES[dtype])]
    for weights in (None, np.array([0.5, 0, 2.0]), np.array([True, False, True])):
        options = {"reduction": "sum", "return_grad": GRADIENTS[name], "weights": weights}
        if weights is not None:
            options["weights"] = device.put(weights)
        total, *gradients = (device.get(a) for a in call(name, pair, arrays, **options))
        found = [device.get(a) for a in call(name, pair, arrays, **options, denominator=48)]
        wide = np.float64 if dtype == "float64" else np.float32
        np.testing.assert_allclose(found[0], total.astype(wide) / 48, rtol=4 * np.finfo(wide).eps)
        eps = float(np.finfo(wide).eps) * 4 if dtype != "bfloat16" else 2**-7
        for a, b in zip(found[1:], gradients, strict=True):
            np.testing.assert_allclose(a.astype(float), b.astype(float) / 48, rtol=eps, atol=1e-40)
        for d in (48.0, np.float32(48), np.array(48), device.put(np.array(48)), device.put(np.array(48.0, np.float32))):
            for a, b in zip(call(name, pair, arrays, **options, denominator=d), found, strict=True):
                same(device.get(a), b)
        plain = dict(options, return_grad=None)
        same(device.get(call(name, pair, arrays, **plain, denominator=48)), found[0])
        same(device.get(call(name, pair, arrays, **plain, denominator=device.put(np.array(48)))), found[0])


def test_denominator_is_the_one_of_rowmean(device):
    """If it is the sum of the weights."""
    x, y = (device.put(a) for a in rows(("logits", "logits")))
    weights = device.put(np.array([0.5, 0, 2.0]))
    options = {"space": "logits", "weights": weights, "return_grad": ("x", "y")}
    mean = klcore.kl_div(x, y, reduction="rowmean", **options)
    for denominator in (2.5, device.put(np.array(2.5))):
        for a, b in zip(klcore.kl_div(x, y, reduction="sum", denominator=denominator, **options), mean, strict=True):
            same(device.get(a), device.get(b))


@pytest.mark.parametrize("tiny", [1e-310, 1e-200, 1e250])
def test_denominator_of_weights_at_an_end_of_the_range(device, tiny):
    x, y = (device.put(a) for a in rows(("logits", "logits")))
    weights = device.put(np.full(3, tiny))
    expected = float(device.get(klcore.kl_div(x, y, space="logits", reduction="sum"))) / 4
    for denominator in (4 * tiny, device.put(np.array(4 * tiny))):
        found = klcore.kl_div(x, y, space="logits", reduction="sum", weights=weights, denominator=denominator)
        np.testing.assert_allclose(float(device.get(found)), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(2, 5), (0, 5), (2, 0)])
def test_a_denominator_of_0(device, shape):
    x = device.put(np.ones(shape))
    for denominator in (0, 0.0, np.array(0), device.put(np.array(0))):
        for weights in (None, np.ones(shape[0], bool), np.full(shape[0], 0.5), np.zeros(shape[0])):
            value, dy = klcore.kl_div(
                x, 2 * x, reduction="sum", denominator=denominator, return_grad="y",
                weights=None if weights is None else device.put(weights),
            )  # fmt: skip
            assert np.isnan(device.get(value))
            assert np.isnan(device.get(dy)).all() or not weights.any()


def test_denominators_of_nothing(device):
    x = device.put(np.ones((0, 5)))
    for denominator in (3, device.put(np.array(3))):
        assert float(device.get(klcore.kl_div(x, x, reduction="sum", denominator=denominator))) == 0


@pytest.mark.parametrize("reduction", ["row", "none", "rowmean", "batchmean", "mean"])
@pytest.mark.parametrize("return_grad", [None, "y"])
def test_denominator_goes_with_a_sum(device, reduction, return_grad):
    x = device.put(np.ones((2, 5)))
    for denominator in (4, device.put(np.array(4))):
        with pytest.raises(ValueError, match="so it needs reduction='sum'; found reduction='" + reduction):
            klcore.kl_div(x, x, reduction=reduction, denominator=denominator, return_grad=return_grad)


@pytest.mark.parametrize(
    ("denominator", "error", "message"),
    [
        (-1, ValueError, "finite and >= 0; found -1.0"),
        (math.inf, ValueError, "finite and >= 0; found inf"),
        (math.nan, ValueError, "finite and >= 0; found nan"),
        ("4", TypeError, "denominator must be a number"),
        ([4], TypeError, "denominator must be a number"),
        (np.array([4]), ValueError, r"a number or a 0-d array; found shape \(1,\)"),
        (np.ones((2, 2)), ValueError, r"found shape \(2, 2\)"),
        (4j, TypeError, "denominator must be a number"),
        (np.complex64(4), TypeError, "denominator must be a number"),
        (np.str_("4"), TypeError, "denominator must be a number"),
        (np.array("4", object), TypeError, "denominator must be a number"),
        (10**400, ValueError, "finite and >= 0; found inf"),
    ],
)
def test_wrong_denominators(device, denominator, error, message):
    x = device.put(np.ones((2, 5)))
    with pytest.raises(error, match=message):
        klcore.kl_div(x, x, reduction="sum", denominator=denominator)


def test_a_denominator_on_the_device_is_kept_apart(gpu):
    """Calls that are prepared once and then repeated read the current denominator each time."""
    x, y = (gpu.put(a) for a in rows(("logits", "logits")))
    total = float(gpu.get(klcore.kl_div(x, y, space="logits", reduction="sum")))
    for d in (2.0, 4.0, 8.0, 2.0):
        found, dy = klcore.kl_div(
            x, y, space="logits", reduction="sum", denominator=gpu.put(np.array(d)), return_grad="y"
        )
        assert float(gpu.get(found)) == total / d
        same(gpu.get(dy), gpu.get(klcore.kl_div(x, y, space="logits", reduction="sum", return_grad="y")[1]) / d)


# ---- the same in other libraries -------------------------------------------------------------------------------------


def test_pytorch():
    torch = pytest.importorskip("torch")
    x, y = rows(("logits", "logits"), dtype="float32")
    bits = klcore.kl_div(x, y, space="logits", reduction="sum", denominator=48, base=2, return_grad=("x", "y"))

    def of(d, **options):
        return lambda a, b: klcore.kl_div(a, b, space="logits", reduction="sum", denominator=d, base=2, **options)

    for d in (48, torch.tensor(48), torch.tensor(48.0)):
        a, b = (torch.from_numpy(v).requires_grad_() for v in (x, y))
        value = of(d)(a, b)
        value.backward()
        for got, expected in zip((value.detach(), a.grad, b.grad), bits, strict=True):
            same(got.numpy(), expected)
        for got, expected in zip(of(d, return_grad=("x", "y"))(a.detach(), b.detach()), bits, strict=True):
            same(got.numpy(), expected)
        with torch.no_grad():
            same(of(d)(a, b).numpy(), bits[0])
        dx, dy = torch.func.grad(of(d), argnums=(0, 1))(a.detach(), b.detach())
        np.testing.assert_allclose(dx.numpy(), bits[1], rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(dy.numpy(), bits[2], rtol=1e-5, atol=1e-9)
    # one denominator per example
    many = torch.func.vmap(lambda a, b, d: of(d)(a, b), in_dims=(None, None, 0))(
        torch.from_numpy(x), torch.from_numpy(y), torch.tensor([48.0, 24.0])
    )
    same(many[0].numpy(), bits[0])
    np.testing.assert_allclose(many[1], 2 * bits[0], rtol=1e-6)
    with pytest.raises(TypeError, match="denominator requires a gradient"):
        of(torch.tensor(48.0, requires_grad=True))(torch.from_numpy(x), torch.from_numpy(y))
    with pytest.raises(ValueError, match="so it needs reduction='sum'"):
        klcore.kl_div(torch.from_numpy(x).requires_grad_(), torch.from_numpy(y), denominator=torch.tensor(3))
    with pytest.raises(ValueError, match="so it needs reduction='sum'"):
        klcore.kl_div(torch.from_numpy(x).requires_grad_(), torch.from_numpy(y), denominator=3)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_pytorch_has_no_derivative_by_the_words():
    torch = pytest.importorskip("torch")
    x, y = (torch.from_numpy(a) for a in rows(("logits", "logits")))
    d = torch.tensor(2.0)
    with pytest.raises(NotImplementedError, match="no derivatives in forward mode"):
        torch.func.jvp(
            lambda d: klcore.kl_div(x, y, space="logits", reduction="sum", denominator=d), (d,), (torch.ones(()),)
        )
    for name, word in (("kl_div", "base"), ("js_div", "beta"), ("mixed_kl_div", "forward"), ("alpha_div", "alpha")):
        with pytest.raises(TypeError, match=f"{word} requires a gradient"):
            getattr(klcore, name)(x, y, space="logits", **{word: torch.tensor(0.5, requires_grad=True)})


def test_pytorch_saves_the_denominator():
    """Backward divides by the denominator of forward, or raises."""
    torch = pytest.importorskip("torch")
    x, y = (torch.from_numpy(a).to(torch.float16) for a in rows(("logits", "logits")))
    d = torch.tensor(48.0)
    y.requires_grad_()
    value = klcore.kl_div(x, y, space="logits", reduction="sum", denominator=d)
    d.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_pytorch_compiled(dynamic):
    torch = pytest.importorskip("torch")
    x, y = rows(("logits", "logits"), dtype="float32")
    expected = klcore.kl_div(x, y, space="logits", reduction="sum", denominator=3, return_grad="y")
    klcore.kl_div(torch.ones(2), torch.ones(2))  # so that what the first call loads causes no recompilation
    counts = importlib.import_module("torch._dynamo.testing").CompileCounter()
    torch._dynamo.reset()

    @torch.compile(backend=counts, fullgraph=True, dynamic=dynamic)
    def loss(x, y, mask):
        return klcore.kl_div(x, y, space="logits", reduction="sum", denominator=mask.sum())

    for k in (3, 2, 1):
        a, b, mask = torch.from_numpy(x), torch.from_numpy(y).requires_grad_(), torch.arange(3) < k
        value = loss(a, b, mask)
        value.backward()
        np.testing.assert_allclose(value.item(), expected[0] * 3 / k, rtol=1e-6)
        np.testing.assert_allclose(b.grad, expected[1] * 3 / k, rtol=1e-5, atol=1e-8)
    assert counts.frame_count == 1


def test_jax():
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    x, y = rows(("logits", "logits"), dtype="float32")
    bits = klcore.kl_div(x, y, space="logits", reduction="sum", denominator=48, base=2, return_grad=("x", "y"))
    a, b = jnp.asarray(x), jnp.asarray(y)

    def of(a, b, d, **options):
        return klcore.kl_div(a, b, space="logits", reduction="sum", denominator=d, base=2, **options)

    for d in (48, 48.0, np.float64(48), jnp.asarray(48), jnp.asarray(48.0)):
        for got, expected in zip(of(a, b, d, return_grad=("x", "y")), bits, strict=True):
            same(got, expected)
        for got, expected in zip(jax.grad(of, (0, 1))(a, b, d), bits[1:], strict=True):
            same(got, expected)
    traced = jax.jit(jax.value_and_grad(of, (0, 1)))
    for d in (48, 24):
        value, gradients = traced(a, b, d)
        for got, expected in zip((value, *gradients), bits, strict=True):
            np.testing.assert_allclose(got, expected * (48 / d), rtol=1e-6)
    many = jax.vmap(of, (None, None, 0))(a, b, jnp.asarray([48.0, 24.0]))
    np.testing.assert_allclose(many, [bits[0], 2 * bits[0]], rtol=1e-6)
    exact = 2.0**25 + 1  # float32 cannot represent it
    same(of(a, b, exact), np.float32(klcore.kl_div(x, y, space="logits", reduction="sum", denominator=exact, base=2)))
    with pytest.raises(NotImplementedError, match="no derivative with respect to denominator"):
        jax.grad(of, 2)(a, b, 48.0)
    for d in (-1, math.nan):
        with pytest.raises(ValueError, match="finite and >= 0"):
            of(a, b, d)


def test_jax_keeps_one_program_for_all_denominators():
    jax = pytest.importorskip("jax")
    module = pytest.importorskip("klcore.backends.jax")
    a, b = (jax.numpy.asarray(v) for v in rows(("logits", "logits"), (2, 11), dtype="float32"))
    before = module._compute._cache_size()
    for d in (3, 4.5, 1e-3):
        klcore.kl_div(a, b, space="logits", reduction="sum", denominator=d)
    assert module._compute._cache_size() == before + 1


@pytest.mark.parametrize("chunks", [(1, 40), (2, 16)])
def test_dask(chunks):
    da = pytest.importorskip("dask.array")
    x, y = rows(("logits", "logits"))
    weights = np.array([0.5, 0, 2.0])
    for w in (None, weights):
        options = {"space": "logits", "reduction": "sum", "base": 2, "return_grad": ("x", "y"), "weights": w}
        expected = klcore.kl_div(x, y, denominator=48, **options)
        for d in (48, 48.0, np.array(48), da.asarray(np.array(48.0)), da.asarray(np.arange(49)).max()):
            found = klcore.kl_div(da.from_array(x, chunks), da.from_array(y, chunks), denominator=d, **options)
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a.compute(), b, rtol=1e-12, atol=1e-17)
    with pytest.raises(ValueError, match="so it needs reduction='sum'"):
        klcore.kl_div(da.ones((2, 3)), da.ones((2, 3)), denominator=2)
    with pytest.raises(ValueError, match="finite and >= 0"):
        klcore.kl_div(da.ones((2, 3)), da.ones((2, 3)), reduction="sum", denominator=-2)


# ---- out= that is y --------------------------------------------------------------------------------------------------

SHAPES = [(3, 40), (1, 2100), (33, 10)]
OF_Y = [name for name, o in COMMON.items() if not o.single]
ONE_A_FORM = {COMMON[name].form: name for name in reversed(OF_Y)}.values()  # the first


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("pair", [("logits", "logits"), ("probs", "logits")])
@pytest.mark.parametrize("name", OF_Y[::-1])  # in `make test` the emulator tries the first: kl_div has most kernels
def test_out_over_y(device, name, pair, dtype):
    """The emulator takes seconds to compile a kernel: so those of kl_div, of one operation of each other form in
    float32, and of one of the rest."""
    all_roads = not device.emulated or name == "kl_div" or (name in ONE_A_FORM and dtype == "float32")
    for shape in SHAPES:
        x, y = (device.put(a) for a in rows(pair, shape, dtype=DTYPES[dtype]))
        for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"temperature": 2.0})[: 4 if all_roads else 1]:
            for wanted in ("y", ("x", "y"))[: 2 if all_roads else 1]:
                expected = call(name, pair, (x, y), return_grad=wanted, **options)
                for _ in range(2):  # on a GPU the second one takes another path
                    over = y.copy()
                    out = (None,) * len(wanted) + (over,)
                    found = call(name, pair, (x, over), return_grad=wanted, out=out, **options)
                    assert found[-1] is over
                    for a, b in zip(found, expected, strict=True):
                        same(device.get(a), device.get(b))


@pytest.mark.parametrize("shape", [(5, 7), (3, 40, 6)])
def test_out_over_y_of_any_layout(device, shape):
    for axis in (0, 1, -1):
        x, y = (device.put(a) for a in rows(("logits", "logits"), shape))
        options = {"space": "logits", "axis": axis, "return_grad": "y"}
        expected = klcore.kl_div(x, y, **options)
        for y_of in (lambda a: a.copy(), lambda a: a.T.copy().T, lambda a: a[::-1].copy()[::-1]):
            over = y_of(y)
            found = klcore.kl_div(x, over, out=(None, over), **options)
            for a, b in zip(found, expected, strict=True):
                same(device.get(a), device.get(b))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", OF_Y)
def test_out_over_y_of_hard_rows(device, name, dtype):
    """Also with few classes: rows that the short form cannot handle are computed again."""
    low = np.finfo(dtype).min
    for space_x, scale in itertools.product(("logits", "probs"), (30, 800)):
        for n in (2, 5, 70, 300):
            x, y = rows((space_x, "logits"), (40, n), dtype=dtype)
            y = y * np.asarray(scale, dtype)
            x = x * np.asarray(scale, dtype) if space_x == "logits" else x
            y[::7, 0], y[1::7, 0], y[2::7, 1] = -np.inf, low, low / 2
            for temperature in (1.0, 0.5):
                options = {"return_grad": "y", "temperature": temperature}
                expected = call(name, (space_x, "logits"), (x, y), **options)
                over = device.put(y.copy())
                found = call(name, (space_x, "logits"), (device.put(x), over), out=(None, over), **options)
                for a, b in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(device.get(a), b)


def test_out_over_y_with_threads():
    x, y = rows(("logits", "logits"), (500, 300), dtype="float32")
    expected = klcore.kl_div(x, y, space="logits", return_grad="y")
    for n in (1, 7):
        with klcore.threads(n):
            over = y.copy()
            for a, b in zip(
                klcore.kl_div(x, over, space="logits", return_grad="y", out=(None, over)), expected, strict=True
            ):
                same(a, b)


def refused(*arrays, **options):
    kept = [a.copy() for a in arrays]
    with pytest.raises(ValueError, match="out overlaps the memory of an input"):
        klcore.kl_div(*arrays, **options)
    for a, b in zip(arrays, kept, strict=True):
        assert (a == b).all()


def test_out_over_y_refused(device):
    """At any other position, and wherever y is read again after it is written."""
    x, y = (device.put(a) for a in rows(("logits", "logits"), (4, 6)))
    for _ in range(2):
        refused(x, y, space="logits", return_grad="x", out=(None, y))
        refused(x, y, space="logits", return_grad="x", out=(None, x))
        refused(x, y, space="logits", return_grad=("x", "y"), out=(None, y, None))
        refused(y, y, space="logits", return_grad="y", out=(None, y))
        refused(x, y, space=("logits", "probs"), return_grad="y", out=(None, y))
        refused(x, y, space="log_probs", return_grad="y", out=(None, y))
        refused(x, y[::-1], space="logits", return_grad="y", out=(None, y))
        refused(x, y, space="logits", reduction="none", out=y)
        refused(device.put(np.ones((2, 4, 6))), y, space="logits", return_grad="y", out=(None, y))
        refused(x[:1], y, space="logits", return_grad=("x", "y"), out=(None, None, y))
    big = device.put(np.zeros((5, 6)))
    refused(x, big[:4], space="logits", return_grad="y", out=(None, big[1:]))
    both = klcore.kl_div(x[:1], y, space="logits", return_grad="y")  # only x is broadcast, and it has no gradient
    over = y.copy()
    for a, b in zip(klcore.kl_div(x[:1], over, space="logits", return_grad="y", out=(None, over)), both, strict=True):
        same(device.get(a), device.get(b))


def test_out_over_y_of_pytorch():
    torch = pytest.importorskip("torch")
    x, y = (torch.from_numpy(a) for a in rows(("logits", "logits")))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        a, b = x.to(dtype), y.to(dtype)
        expected = klcore.kl_div(a, b, space="logits", return_grad="y")
        version = b._version
        found = klcore.kl_div(a, b, space="logits", return_grad="y", out=(None, b))
        assert found[1] is b
        assert b._version > version
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got, want)
    leaf = y.clone().requires_grad_()
    with pytest.raises(TypeError, match="requires a gradient"):
        klcore.kl_div(x, leaf, space="logits", return_grad="y", out=(None, leaf))
