"""Arrays of libraries that klcore does not know: shared through DLPack, and returned as the library's own."""

import importlib
import itertools

import numpy as np
import pytest
from conftest import operands

import klcore
from klcore.operations import OPERATIONS

xp = pytest.importorskip("array_api_strict", reason="array_api_strict is not installed")

SPACES = ("probs", "log_probs", "logits")
X = np.random.default_rng(0).dirichlet(np.ones(40), 6)
Y = np.random.default_rng(1).dirichlet(np.ones(40), 6)


def strict(a, device=None):
    return xp.asarray(a, device=device)


def library(name, **content):
    """The array type of a library that wraps NumPy's memory and does nothing else."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.where, self.dtype = array, device, array.dtype

    methods = {
        "__module__": f"{name}.core",
        "__init__": __init__,
        "__dlpack__": lambda self, **keywords: self.array.__dlpack__(**keywords),
        "__dlpack_device__": lambda self: self.where,
        **content,
    }
    return type("Array", (), methods)


Plain = library("plainlib")
Other = library("otherlib")


def call(operation, arrays, **keywords):
    result = getattr(klcore, operation)(*operands(operation, *arrays), **keywords)
    return result if isinstance(result, tuple) else (result,)


def same(got, expected):
    got = np.asarray(got)
    return got.dtype == expected.dtype and got.shape == expected.shape and got.tobytes() == expected.tobytes()


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_same_bits_as_numpy(operation, space, dtype):
    arrays = [(a if space == "probs" else np.log(a)).astype(dtype) for a in (X, Y)]
    weights = np.arange(6.0)
    wanted = OPERATIONS[operation].gradients
    for reduction, w in itertools.product(("row", "none", "sum", "rowmean", "batchmean", "mean"), (None, weights)):
        if reduction == "none" and not OPERATIONS[operation].has_terms:
            continue
        keywords = {"space": space, "reduction": reduction, "return_grad": wanted, **OPERATIONS[operation].needed}
        expected = call(operation, arrays, weights=w, **keywords)
        got = call(operation, [strict(a) for a in arrays], weights=None if w is None else strict(w), **keywords)
        assert all(type(a) is type(strict(X)) for a in got)
        assert all(same(a, np.asarray(b)) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("make", [strict, Other, np.asarray], ids=["strict", "another", "numpy"])
def test_lists_of_classes(make):
    """Indices, masses and temperatures of any kind with arrays of a library."""
    indices, rows = np.argsort(Y)[:, :7], np.linspace(0.25, 1, 6)
    x, y = np.take_along_axis(X, indices, -1), np.log(Y)
    more = {"indices": indices, "tail_mass": rows, "temperature": rows}
    options = {"tail": "bucket", "space": ("probs", "logits"), "return_grad": ("x", "y")}
    got = klcore.kl_div(strict(x), strict(y), **{name: make(a) for name, a in more.items()}, **options)
    assert all(type(a) is type(strict(X)) for a in got)
    assert all(same(a, b) for a, b in zip(got, klcore.kl_div(x, y, **more, **options), strict=True))


def test_totals_have_no_dimensions():
    total = klcore.kl_div(strict(X), strict(Y), reduction="sum")
    assert total.shape == ()
    assert float(total) == klcore.kl_div(X, Y, reduction="sum")
    assert klcore.kl_div(strict(X[0]), strict(Y[0])).shape == ()


@pytest.mark.parametrize("swap", [False, True])
def test_lists_go_with_the_array(swap):
    arrays = ([0.5, 0.5], strict(np.array([0.25, 0.75])))
    got = klcore.kl_div(*(arrays[::-1] if swap else arrays))
    plain = ([0.5, 0.5], [0.25, 0.75])
    assert type(got) is type(strict(X))
    assert float(got) == klcore.kl_div(*(plain[::-1] if swap else plain))


def test_integers_are_float64():
    got = klcore.kl_div(strict(np.array([1, 2])), strict(np.array([2, 1])))
    assert got.dtype == xp.float64
    assert float(got) == klcore.kl_div([1, 2], [2, 1])


def test_results_are_on_the_device_of_the_arguments():
    device = xp.Device("device1")
    for got in klcore.kl_div(strict(X, device), strict(Y, device), return_grad=("x", "y")):
        assert got.device == device


@pytest.mark.parametrize("weights", [np.arange(6.0), list(range(6)), Other(np.arange(6.0))])
def test_weights_of_any_kind(weights):
    got = klcore.kl_div(strict(X), strict(Y), reduction="sum", weights=weights)
    assert float(got) == klcore.kl_div(X, Y, reduction="sum", weights=np.arange(6.0))


def test_nothing_is_copied(monkeypatch):
    """The kernels use the memory itself."""
    seen = []
    cpu = importlib.import_module("klcore.backends.cpu")
    monkeypatch.setattr(cpu, "compute", lambda call: seen.append(call.x) or np.float64(0))
    klcore.entropy(Plain(X))
    klcore.entropy(strict(X))
    assert np.shares_memory(seen[0], X)
    assert all(isinstance(a, np.ndarray) for a in seen)


def test_read_only_memory_is_read():
    x = X.copy()
    x.flags.writeable = False
    assert same(klcore.kl_div(strict(X), strict(Y)), klcore.kl_div(x, Y))


def test_without_a_namespace_results_are_numpys():
    value, dx = klcore.kl_div(Plain(X), Plain(Y), return_grad="x")
    assert type(value) is type(dx) is np.ndarray
    assert same(value, klcore.kl_div(X, Y))
    assert type(klcore.kl_div(Plain(X), Plain(Y), reduction="sum")) is np.float64


@pytest.mark.parametrize("names", [["from_dlpack"], ["asarray"], []])
def test_namespace_that_takes_results_in_its_own_way(names):
    namespace = type("namespace", (), {name: staticmethod(lambda a, n=name: (n, a)) for name in names})
    spaced = library("spacedlib", __array_namespace__=lambda self: namespace)
    got = klcore.kl_div(spaced(X), spaced(Y))
    if names:
        assert got[0] == names[0]
    assert same(got[1] if names else got, klcore.kl_div(X, Y))


# ---- out -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="NumPy < 2.1 takes DLPack memory read-only")
def test_out():
    value, dx = strict(np.zeros(6)), strict(np.zeros_like(X))
    for out, expected in ((value, (value,)), ((value, dx), (value, dx)), ((value, None), (value,)), ((None, dx), ())):
        gradient = "x" if isinstance(out, tuple) else None
        got = klcore.kl_div(strict(X), strict(Y), return_grad=gradient, out=out)
        got = got if isinstance(got, tuple) else (got,)
        assert all(any(a is b for a in got) for b in expected)
        whole = klcore.kl_div(X, Y, return_grad="x")
        assert all(same(a, b) for a, b in zip(got, whole, strict=False))
        assert all(type(a) is type(value) for a in got)


def test_out_that_cannot_be_written():
    value = np.zeros(6)
    old = library("oldlib", __dlpack__=lambda self: self.array.__dlpack__())  # without versions: NumPy cannot know
    with pytest.raises(TypeError, match="out, a oldlib array, is read-only"):
        klcore.kl_div(Plain(X), Plain(Y), out=old(value))
    assert not value.any()


@pytest.mark.parametrize(
    ("out", "error", "words"),
    [
        (strict(np.zeros(5)), ValueError, "shape"),
        (strict(np.zeros(6, "f4")), ValueError, "dtype"),
        ([0.0] * 6, TypeError, "out for the value must be a plain numpy.ndarray"),
    ],
)
def test_wrong_out(out, error, words):
    with pytest.raises(error, match=words):
        klcore.kl_div(strict(X), strict(Y), out=out)


# ---- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lent(gpu, monkeypatch):
    """Creates arrays of a library with memory on the GPU."""
    if gpu.emulated:  # which has no DLPack
        monkeypatch.setattr(gpu.xp, "from_dlpack", lambda a: a.array, raising=False)
    on_gpu = library("gpulib", __dlpack__=lambda self, **keywords: self.array.__dlpack__(**keywords))
    return lambda a, number=0: on_gpu(gpu.put(a), (2, number))


def test_cuda(gpu, lent):
    value, dy = klcore.kl_div(lent(X), lent(Y), return_grad="y", weights=lent(np.arange(6.0)))
    assert isinstance(value, gpu.array_type())
    expected = klcore.kl_div(X, Y, return_grad="y", weights=np.arange(6.0))
    assert same(gpu.get(value), expected[0])
    assert same(gpu.get(dy), expected[1])
    assert same(gpu.get(klcore.kl_div(lent(X), lent(Y), device="cuda:0")), klcore.kl_div(X, Y))


def test_two_devices(lent):
    gpulib = type(lent(X))
    with pytest.raises(ValueError, match=r"x on cuda:0, y on cpu:0.*move one"):
        klcore.kl_div(lent(X), gpulib(Y))
    with pytest.raises(ValueError, match=r"x on cuda:0, y on cuda:1"):
        klcore.kl_div(lent(X), lent(Y, 1))
    with pytest.raises(ValueError, match=r"device='cpu'.*on cuda:0"):
        klcore.kl_div(lent(X), lent(Y), device="cpu")


def test_cuda_memory_without_cupy(python):
    code = """
import sys
sys.modules["cupy"] = None
import klcore
class Array:
    __module__ = "gpulib"
    def __dlpack__(self): raise AssertionError
    def __dlpack_device__(self): return 2, 0
try:
    klcore.entropy(Array())
except klcore.BackendUnavailableError as error:
    print(error)
"""
    message = python(code)
    assert "CuPy" in message
    assert "pip install" in message


# ---- errors ----------------------------------------------------------------------------------------------------------


class Silent:
    __module__ = "silentlib"

    def __dlpack__(self):
        raise AssertionError


def raising(error):
    def __dlpack__(self, **keywords):
        raise error

    return library("raisinglib", __dlpack__=__dlpack__)(X)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"x": Plain(X), "y": Other(Y)}, TypeError, "x of plainlib, y of otherlib"),
        ({"x": Plain(X), "y": Y}, TypeError, "x is a dlpack array and y is a numpy array"),
        ({"x": Plain(X, (8, 0)), "y": Plain(Y)}, TypeError, r"x, a plainlib array, .* Metal \(DLPack: 8\), but klcore"),
        ({"x": Plain(X), "y": Plain(Y, (10, 0))}, TypeError, "y, .* ROCm"),
        ({"x": Plain(X), "y": Plain(Y, (99, 0))}, TypeError, r"unknown \(DLPack: 99\)"),
        ({"x": Silent(), "y": Silent()}, TypeError, "silentlib.Silent.*not __dlpack_device__"),
        ({"x": raising(BufferError("no")), "y": [1.0]}, TypeError, "x, a raisinglib array of dtype float64.*: no"),
        ({"x": raising(RuntimeError("requires grad")), "y": [1.0]}, TypeError, "requires grad"),
        ({"x": Plain(X + 0j), "y": Plain(Y)}, TypeError, "x has dtype complex128"),
        ({"x": strict(X), "y": strict(Y.astype("c8"))}, TypeError, "y has dtype complex64"),
        ({"x": strict(X), "y": strict(Y[:, :3])}, ValueError, "same number of classes"),
        ({"x": strict(X), "y": strict(Y), "space": "prob"}, ValueError, "space must be one of"),
        ({"x": strict(X), "y": strict(Y), "device": "cuda"}, ValueError, "device='cuda'.*on cpu:0"),
        ({"x": strict(X), "y": strict(Y), "weights": Plain(np.ones(6), (8, 0))}, TypeError, "weights, .*Metal"),
        ({"x": object(), "y": [1.0]}, TypeError, "x is of type builtins.object, which klcore does not.*__dlpack__"),
    ],
)
def test_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        klcore.kl_div(**arguments)


def test_device_cpu_is_where_they_are():
    assert same(klcore.kl_div(strict(X), strict(Y), device="cpu"), klcore.kl_div(X, Y))


# ---- other systems' losses -----------------------------------------------------------------------------------------


def test_loss():
    keywords = {"space": ("probs", "log_probs"), "reduction": "sum", "denominator": 6.0, "return_grad": "y"}
    log_y, factors = np.log(Y), np.arange(6.0)[:, None]
    expected = klcore.divergence.loss("pytorch", X, log_y, factors=factors, **keywords)
    got = klcore.divergence.loss("pytorch", strict(X), strict(log_y), factors=strict(factors), **keywords)
    assert all(type(a) is type(strict(X)) for a in got)
    assert all(same(a, np.asarray(b)) for a, b in zip(got, expected, strict=True))
