"""klcore.Shard: the bits of whole rows where promised, elsewhere the published bounds; and its errors for wrong use."""

import importlib
import itertools
import re

import conftest
import numpy as np
import oracle
import pytest
import relatives
from conftest import DTYPES, FIRST, operands
from test_counts import side as counts_side
from test_family import assert_right, in_space, logits

import klcore
from klcore.operations import OPERATIONS

CALLS = [(name, pair) for name, o in OPERATIONS.items() for pair in o.pairs]
calls = pytest.mark.parametrize(("name", "pair"), CALLS, ids=lambda v: v if isinstance(v, str) else "-".join(v))


def space_of(name, pair):
    return pair[0] if OPERATIONS[name].single else pair


def exchanged(shards, fold=False, through=lambda states: states):
    """All exchanges, as between processes."""
    for _ in range(shards[0].exchanges):
        states = through([s.state(fold=fold) for s in shards])
        for s in shards:
            s.join(states)
    return shards


def spread(name, arrays, sizes, axis=-1, fold=False, **words):
    """Shards of so many classes each, all at the same step."""
    ends = np.cumsum(sizes)[:-1]
    parts = zip(*(np.split(a, ends, axis) for a in operands(name, *arrays)), strict=True)
    words = {**OPERATIONS[name].needed, **words}
    return exchanged([klcore.Shard(name, *part, axis=axis, **words) for part in parts], fold)


def joined(found, axis=-1):
    return np.concatenate(found, axis)


def assert_bits(got, expected, what=""):
    got, expected = np.asarray(got), np.asarray(expected)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), what
    assert got.tobytes() == expected.tobytes(), what


def numbers(space, z, dtype):
    with np.errstate(invalid="ignore"):
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        with np.errstate(divide="ignore"):
            found = {"logits": z, "probs": p, "log_probs": np.log(p), "counts": p * 1000}[space]
    return found.astype(dtype)


WEIGHTS = np.array([1.0, 0.5, 1.0, 0.0, 1.0, 3.0])


def special(pair, n, dtype):
    """Rows: an ordinary one, one that excludes classes, NaN, NaN with weight 0, one that excludes everything, one far
    apart."""
    rng = np.random.default_rng(n)
    x = rng.normal(size=(6, n)) * np.linspace(0.1, 5, n)
    y = x + rng.normal(size=(6, n))
    x[1, rng.random(n) < 0.3] = -np.inf
    y[1, rng.random(n) < 0.1] = -np.inf
    x[4] = -np.inf
    y[5] = 20 * rng.normal(size=n)
    arrays = [numbers(space, z, dtype) for space, z in zip(pair, (x, y), strict=True)]
    for a in arrays:
        a[2, 3] = a[3, n // 2] = np.nan
    return arrays


# ---- the bits of whole rows ------------------------------------------------------------------------------------------


@calls
def test_bits(name, pair):
    """Shards of multiples of 1024 classes, some of them empty: values, terms and gradients of whole rows."""
    of, space = OPERATIONS[name].gradients, space_of(name, pair)
    dtype = list(DTYPES)[CALLS.index((name, pair)) % 4]
    arrays = special(pair, 3000, DTYPES[dtype])
    words = {"space": space, "weights": WEIGHTS}
    cotangent = np.array([1.0, 2.0, 0.5, 1.0, 1.0, 0.25])
    shards = spread(name, arrays, (1024, 0, 1024, 952, 0), **words)
    value, *gradients = conftest.call(name, *arrays, return_grad=of, **words)
    for shard in shards:
        assert_bits(shard.values(), value)
    for k, g in enumerate(gradients):
        assert_bits(joined([s.gradient(of)[k] if len(of) > 1 else s.gradient(of[0]) for s in shards]), g, of[k])
    _, *gradients = conftest.call(name, *arrays, return_grad=of, **{**words, "weights": WEIGHTS * cotangent})
    for k, g in zip(of, gradients, strict=True):
        assert_bits(joined([s.gradient(k, cotangent) for s in shards]), g, k)
    if OPERATIONS[name].has_terms:
        assert_bits(joined([s.terms() for s in shards]), conftest.call(name, *arrays, reduction="none", **words))
    else:
        with pytest.raises(ValueError, match="no terms"):
            shards[0].terms()


def test_bits_of_more_chunks_than_are_merged_at_once():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(1, 1024 * 1025 + 7)).astype("float32") for _ in range(2)]
    shards = spread("kl_div", arrays, (1024 * 1000, 1024 * 25 + 7), space="logits")
    assert_bits(shards[1].values(), klcore.kl_div(*arrays, space="logits"))


@pytest.mark.parametrize("temperature", [2.5, [[2.5, 0.5], [1.0, 9.0], [3.0, 0.1]]], ids=["all", "by-row"])
@pytest.mark.parametrize("space", ["logits", ("probs", "logits")])
def test_bits_of_any_layout(space, temperature):
    """The classes first, rows of x that are broadcast, a base, temperatures, and one row without a batch."""
    pair = (space,) * 2 if isinstance(space, str) else space
    x, y = (numbers(s, np.random.default_rng(k).normal(size=(3, 2, 2000)), "float32") for k, s in enumerate(pair))
    x = np.moveaxis(x[:1], -1, 0)
    y = np.asfortranarray(np.moveaxis(y, -1, 0))
    words = {"space": space, "temperature": temperature, "base": 2.0, "beta": 0.1, "axis": 0}
    shards = spread("js_div", (x, y), (1024, 976), **words)
    value, dy = klcore.js_div(x, y, return_grad="y", **words)
    assert value.shape == (3, 2)
    assert_bits(shards[0].values(), value)
    assert_bits(joined([s.gradient("y") for s in shards], 0), dy)
    _, dx = klcore.js_div(x, y, return_grad="x", **words)
    dx_found = joined([s.gradient("x") for s in shards], 0)
    assert dx_found.shape == x.shape  # summed over the rows
    assert_bits(dx_found, dx)
    words |= {"axis": -1, "temperature": 2.5}
    row = x[:, 0, 0], y[:, 0, 0]
    (alone, _) = spread("js_div", row, (1024, 976), **words)
    assert_bits(alone.values(), klcore.js_div(*row, **words))
    assert type(alone.values()) is np.float32


# ---- the published bounds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(("name", "pair"), oracle.CALLS)
def test_bounds(name, pair, fold):
    """Shards of few classes, of one and of none."""
    for dtype, far in itertools.product(("float32", "float64"), (1e-6, 1.0)):
        x, y = in_space(pair, *logits(far, n=9, rows=3), dtype=dtype)
        shards = spread(name, (x, y), (1, 0, 5, 3), fold=fold, space=space_of(name, pair))
        found = {"value": shards[1].values(), "terms": joined([s.terms() for s in shards])}
        found |= {f"d{of}": joined([s.gradient(of) for s in shards]) for of in OPERATIONS[name].gradients}
        other = None if OPERATIONS[name].single else y
        oracle.assert_answer(found, oracle.fast(name, x, other, space_of(name, pair)), name, space_of(name, pair))


@pytest.mark.parametrize("name", relatives.PARAMETERS)
def test_bounds_of_the_relatives(name):
    """All parameters, folded; for Rényi divergence also rows so far apart that another exchange is needed."""
    given = relatives.PARAMETERS[name]
    for k in range(max(3, len(given))):
        parameters, far = given[k % len(given)], (1.0, "far", 1e-6)[k % 3]
        space = ("logits", "probs", "log_probs")[(k + k // 3) % 3]
        x, y = in_space(space, *logits(far, n=7))
        shards = spread(name, (x, y), (2, 4, 1), fold=True, space=space, **parameters)
        gradients = (joined([s.gradient(of) for s in shards]) for of in "xy")
        assert_right(name, parameters, x, y, space, (shards[0].values(), *gradients))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_counts(name, dtype):
    """Against probabilities, which are the normalised counts of whole rows."""
    counts = np.random.default_rng(0).integers(1, 50, (2, 4, 11)).astype(dtype)
    p, q = ([[float(v) for v in counts_side("counts", row)] for row in a] for a in counts)
    true = conftest.call(name, np.array(p), np.array(q))
    shards = spread(name, counts, (4, 6, 1), fold=True, space="counts")
    np.testing.assert_allclose(shards[2].values(), true, rtol=1e-5 if dtype == "float32" else 1e-12)
    for of in OPERATIONS[name].gradients:  # the derivative of what does not depend on the counts' scale
        dx = joined([s.gradient(of) for s in shards]).astype(float)
        along = (dx * counts[int(of == "y")]).sum(-1)
        np.testing.assert_allclose(along, 0, atol=1e-4 if dtype == "float32" else 1e-13)


@calls
def test_folded_states_are_small_and_alike(name, pair):
    """One state of at most 72 bytes per row, whatever the shard; and special rows are as in one process."""
    space = space_of(name, pair)
    arrays = special(pair, 3000, "float64")
    shards = [
        klcore.Shard(name, *operands(name, *(a[:, part] for a in arrays)), space=space, weights=WEIGHTS,
                     **OPERATIONS[name].needed)
        for part in (slice(0, 1), slice(1, 1999), slice(1999, 1999), slice(1999, None))
    ]  # fmt: skip

    def small(states):
        assert len({s.shape for s in states}) == 1
        assert all(s.nbytes <= 72 * len(WEIGHTS) for s in states)
        return states

    exchanged(shards, True, small)
    value, dx = conftest.call(name, *arrays, space=space, weights=WEIGHTS, return_grad="x")
    np.testing.assert_allclose(shards[2].values(), value, rtol=1e-9, atol=1e-12)
    for row, (found, expected) in enumerate(zip(joined([s.gradient("x") for s in shards]), dx, strict=True)):
        size = np.abs(expected[np.isfinite(expected)]).sum()
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * size, err_msg=f"row {row}")


# ---- what it says ----------------------------------------------------------------------------------------------------

X, Y = np.random.default_rng(0).dirichlet(np.ones(5), (2, 3))


@pytest.mark.parametrize(
    ("arguments", "words", "error", "message"),
    [
        (("kl", X, Y), {}, ValueError, "operation must be one of kl_div"),
        ((np.exp, X, Y), {}, ValueError, "operation must be one of kl_div"),
        (("kl_div", X), {}, TypeError, "kl_div takes x and y"),
        ((klcore.entropy, X, Y), {}, TypeError, "entropy takes only x"),
        ((klcore.kl_div, X, Y), {"reduction": "sum"}, TypeError, "does not take 'reduction'"),
        ((klcore.js_div, X, Y), {"alpha": 0.5}, TypeError, "does not take 'alpha'"),
        ((klcore.kl_div, X, Y), {"indices": [0]}, TypeError, "does not take 'indices': with indices, the rows of y"),
        ((klcore.kl_div, X, Y), {"tail": "zero"}, TypeError, "does not take 'tail': with indices, the rows"),
        ((klcore.js_div, X, Y), {"beta": 2}, ValueError, "beta must be in"),
        (("renyi_div", X, Y), {}, TypeError, "alpha"),
        (("kl_div", X, Y[:, :4]), {}, ValueError, "same number of classes"),
        (("kl_div", X, Y), {"space": "prob"}, ValueError, "space must be one of"),
        (("kl_div", X, Y), {"temperature": 2}, ValueError, "needs space='logits'"),
        (("kl_div", X, Y), {"weights": [1, -1, 1]}, ValueError, "weights must be finite"),
        (("tv_dist", X, Y), {"base": 2}, ValueError, "no unit"),
    ],
)
def test_wrong_arguments(arguments, words, error, message):
    with pytest.raises(error, match=re.escape(message)):
        klcore.Shard(*arguments, **words)


def test_wrong_order():
    shard = klcore.Shard(klcore.tv_dist, X, Y)
    other = klcore.Shard(klcore.kl_div, np.log(X), np.log(Y), space="logits")
    with pytest.raises(RuntimeError, match=r"call state\(\) first"):
        shard.join([])
    for ask in (shard.values, shard.terms, lambda: shard.gradient("y")):
        with pytest.raises(RuntimeError, match="0 of 1 exchanges are done"):
            ask()
    state = shard.state()
    for wrong in (other.state(), state[:2], state.astype("float32"), state[..., 0]):
        with pytest.raises(ValueError, match=r"states\[1\] has shape .* takes float64 of shape \(3, 1, 'chunks'\)"):
            shard.join([state, wrong])
    with pytest.raises(ValueError, match="found none"):
        shard.join([])
    shard.join(np.stack([state]))  # an array of them will do
    np.testing.assert_allclose(shard.values(), abs(X - Y).sum(-1) / 2)
    for ask in (shard.state, lambda: shard.join([state])):
        with pytest.raises(RuntimeError, match=re.escape("all exchanges are done (1)")):
            ask()
    with pytest.raises(ValueError, match="return_grad must be one of"):
        shard.gradient("z")
    with pytest.raises(ValueError, match=r"cotangent of shape \(4,\) does not broadcast"):
        shard.gradient("y", np.ones(4))


def test_no_classes_at_all():
    shards = spread("kl_div", (X[:, :0], Y[:, :0]), (0, 0), space="logits")
    assert_bits(shards[0].values(), klcore.kl_div(X[:, :0], Y[:, :0], space="logits"))
    assert shards[0].gradient("y").shape == (3, 0)


@pytest.mark.parametrize(
    ("library", "message"), [("jax.numpy", "shard the arrays over a mesh"), ("dask.array", "chunk the class axis")]
)
def test_libraries_that_do_it_themselves(library, message):
    module = pytest.importorskip(library, reason=f"{library} is not installed")
    with pytest.raises(TypeError, match=message):
        klcore.Shard("kl_div", module.asarray(X), module.asarray(Y))


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def loss_of(torch):
    """A loss over shards of a student's logits, all in one process; examples/tensor_parallel.py uses two."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, name, teachers, weights, *students):
            ctx.shards = exchanged(
                [
                    klcore.Shard(name, t, s, space="logits", weights=weights, temperature=2.0)
                    for t, s in zip(teachers, students, strict=True)
                ]
            )
            return ctx.shards[0].values()

        @staticmethod
        def backward(ctx, cotangent):
            return (None, None, None, *(s.gradient("y", cotangent) for s in ctx.shards))

    return Loss.apply


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in FIRST if not OPERATIONS[name].single])
def test_in_an_autograd_function(name, dtype):
    """Value and gradient have the bits of PyTorch's autograd for whole rows; cotangents of both signs."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    teacher, student = torch.randn(2, 4, 2500, dtype=torch.float64).to(getattr(torch, dtype)) * 2
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5])
    cotangent = torch.tensor([1.0, -2.0, 3.0, 0.5]).to(torch.float64 if dtype == "float64" else torch.float32)
    sizes = (2048, 452)
    whole, leaf = (student.clone().requires_grad_() for _ in range(2))
    expected = getattr(klcore, name)(teacher, whole, space="logits", weights=weights, temperature=2.0)
    expected.backward(cotangent)
    found = loss_of(torch)(name, teacher.split(sizes, -1), weights, *leaf.split(sizes, -1))
    found.backward(cotangent)
    assert torch.equal(found, expected)
    assert found.dtype is expected.dtype
    assert torch.equal(leaf.grad, whole.grad)


def test_tensors():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x, y = torch.tensor(X), torch.tensor(Y, requires_grad=True)
    with pytest.raises(TypeError, match=r"torch\.no_grad\(\), or .* a torch\.autograd\.Function"):
        klcore.Shard("kl_div", x, y)
    warm = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(TypeError, match="an argument requires a gradient"):
        klcore.Shard("kl_div", x, x, space="logits", temperature=warm)
    with torch.no_grad():
        (tempered,) = exchanged([klcore.Shard("kl_div", x, y, space="logits", temperature=warm)])
        shard = klcore.Shard("kl_div", x, y)
    assert_bits(tempered.values().numpy(), klcore.kl_div(X, Y, space="logits", temperature=2.0))
    state = shard.state()
    assert (type(state), state.dtype) == (torch.Tensor, torch.float64)
    shard.join([state.numpy()])  # from any transport
    assert_bits(shard.values().numpy(), klcore.kl_div(X, Y))
    assert torch.equal(shard.terms(), klcore.kl_div(x, y.detach(), reduction="none"))
    assert shard.values().requires_grad is False
    beside = klcore.Shard("kl_div", x, Y)  # NumPy with PyTorch
    assert torch.equal(beside.state(), state)
    with torch.device("meta"), pytest.raises(TypeError, match="plain tensors with memory"):
        klcore.Shard("kl_div", torch.ones(3, 5), torch.ones(3, 5))
    traced = torch.func.vmap(lambda a: klcore.Shard("kl_div", a, a).state())
    with pytest.raises(TypeError, match=r"torch\.func"):
        traced(x)


# ---- the GPU ---------------------------------------------------------------------------------------------------------


def near_without_mass(states):
    """For two rows of logits, the last number but one is set only by a far chunk (src/kl_logits.h: Spread)."""
    if states.shape[1] != 9:
        return states
    return np.where((np.arange(9)[:, None] == 7) & (states[:, 8:] % 2 == 0), 0.0, states)


ON_GPU = {"temperature": 0.5, "base": 2.0}  # as few kernels to compile as possible
KINDS = [
    ("kl_div", "logits", "float32"),
    ("js_div", ("probs", "logits"), "float64"),
    ("renyi_div", "logits", "float32"),
]


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(("name", "space", "dtype"), KINDS)
def test_bits_of_the_gpu(gpu, compared, name, space, dtype, fold):
    """Shards of two chunks, of one, of few classes and of none. The first kind with terms, and a gradient that is a
    sum; the others with both gradients at once, and one temperature per row."""
    pair = (space,) * 2 if isinstance(space, str) else space
    x, y = special(pair, 3000, dtype)
    first = name == KINDS[0][0]
    x = x[:1] if first else x
    words = {"space": space, "weights": WEIGHTS, **ON_GPU, **OPERATIONS[name].needed}
    parts = [slice(0, 1024), slice(1024, 1124), slice(1124, 1124), slice(1124, 3000)]
    if not first:
        words["temperature"] = np.linspace(0.5, 3, 6)
    here = [klcore.Shard(name, x[:, k], y[:, k], **words) for k in parts]
    if not first:
        words["temperature"] = gpu.put(words["temperature"])
    there = [klcore.Shard(name, gpu.put(x[:, k]), gpu.put(y[:, k]), **words) for k in parts]
    for _ in range(here[0].exchanges):
        states = [s.state(fold=fold) for s in here]
        found = [s.state(fold=fold) for s in there]
        for f, e in zip(found, states, strict=True):
            np.testing.assert_array_equal(near_without_mass(gpu.get(f)), near_without_mass(e))
        for of_cpu, of_gpu in zip(here, there, strict=True):
            of_cpu.join(states)
            of_gpu.join(found)

    cotangent = np.array([1.0, -2.0, 1.0, 1.0, 0.5, 1.0])
    asked = [lambda s, c: s.values()]
    if first:
        asked += [lambda s, c: s.terms(), lambda s, c: s.gradient("x", c), lambda s, c: s.gradient("y", c)]
    else:
        asked += [lambda s, c: s.gradient(("x", "y"), c)[0], lambda s, c: s.gradient(("x", "y"), c)[1]]
    for k, ask in enumerate(asked):
        for of_cpu, of_gpu in zip(here, there, strict=True):
            expected, result = ask(of_cpu, cotangent), ask(of_gpu, gpu.put(cotangent))
            assert (type(result), result.dtype) == (gpu.array_type(), expected.dtype)
            np.testing.assert_array_equal(gpu.get(result), expected, err_msg=f"result {k}")
            compared["arrays of shards on the GPU that have the CPU's bits"] += 1


def test_tensors_on_the_gpu(gpu, monkeypatch):
    """klcore treats them as CuPy arrays, and returns tensors."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    memory = importlib.import_module("klcore.backends.torch.memory")
    tensors = torch.randn(2, 3, 1500, generator=torch.Generator().manual_seed(0))
    words = {"space": "logits", **ON_GPU}
    (expected,) = exchanged([klcore.Shard("kl_div", *map(gpu.put, tensors.numpy()), **words)])
    if gpu.emulated:
        importlib.import_module("test_torch_emulated").pose_as_cuda(monkeypatch)
    else:
        tensors = tensors.cuda()
    (found,) = exchanged([klcore.Shard("kl_div", *tensors, **words)])
    for ask in (klcore.Shard.values, klcore.Shard.terms, lambda shard: shard.gradient("y")):
        tensor = ask(found)
        assert type(tensor) is torch.Tensor
        assert_bits(gpu.get(memory.lend(tensor)), gpu.get(ask(expected)))
    narrow = tensors.bfloat16()
    assert torch.equal(memory.as_tensor(memory.lend(narrow)), narrow)
