"""What all modules of klcore.compat have in common; test_compat_*.py test each of them."""

import inspect
import warnings
from collections import Counter

import numpy as np
import pytest
from conftest import jax_arrays, torch_arrays
from golden import CASES, COUNTS, F32, FAMILIES, LOG_PROBS, LOGITS, NOT_RUN, OWN_TESTS, PROBS, quiet

from klcore.compat import keras as of_keras
from klcore.compat import mxnet, puzzlelib, pytorch, rtorch

pytestmark = pytest.mark.usefixtures("without_keras")


def test_every_case_has_a_test():
    for system, cases in CASES.items():
        assert len(cases) == COUNTS[system]
        families = Counter(c.family for c in cases)
        assert set(families) == {*FAMILIES[system], *OWN_TESTS[system], *NOT_RUN.get(system, {})}
        assert sum(families[f] for f in NOT_RUN.get(system, {})) == (6 if system == "pytorch" else 0)


# module, function of two arrays with value_and_grad, its two inputs
FRONT_ENDS = {
    "pytorch module": (pytorch, pytorch.KLDivLoss(reduction="batchmean"), LOG_PROBS, PROBS),
    "pytorch function": (pytorch, pytorch.kl_div, LOG_PROBS, PROBS),
    "rtorch module": (rtorch, rtorch.nn_kl_div_loss("batchmean"), LOG_PROBS, PROBS),
    "rtorch function": (rtorch, rtorch.nnf_kl_div, LOG_PROBS, PROBS),
    "keras function": (of_keras.functions, of_keras.kld, PROBS, np.exp(LOG_PROBS)),
    "keras class": (of_keras.functions, of_keras.KLDivergence(dtype="float64"), PROBS, np.exp(LOG_PROBS)),
    "keras values": (of_keras.functions, of_keras.KLDivergence("none", dtype="float64"), PROBS, np.exp(LOG_PROBS)),
    "mxnet": (mxnet, mxnet.KLDivLoss(), LOG_PROBS, PROBS),
    "mxnet scores": (mxnet, mxnet.KLDivLoss(False, 1, 0.5, nonbatch="sum"), LOGITS, PROBS),
    "puzzlelib": (puzzlelib, puzzlelib.KLDivergence(), LOGITS.astype(F32), PROBS.astype(F32)),
}


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_value_and_gradients_in_one_pass(name, monkeypatch):
    module, function, *inputs = FRONT_ENDS[name]
    calls = []
    engine = pytorch.loss  # every module has the same
    for holder in (module, pytorch):
        monkeypatch.setattr(holder, "loss", lambda *a, **k: calls.append(k) or engine(*a, **k), raising=False)
    with quiet():
        value, gradients = function.value_and_grad(*inputs)
        assert len(calls) == 1
        again = function(*inputs)
    np.testing.assert_array_equal(value, again[0] if name == "puzzlelib" else again)
    assert [g.shape for g in gradients] == [a.shape for a in inputs][: len(gradients)]
    assert all(g.dtype == a.dtype for g, a in zip(gradients, inputs, strict=False))


@pytest.mark.parametrize("library", [torch_arrays, jax_arrays])
@pytest.mark.parametrize("name", FRONT_ENDS)
def test_value_and_gradients_are_plain_arrays(name, library):
    """Of PyTorch's and JAX's arrays, with the numbers of NumPy's."""
    arrays = library()
    _, function, *inputs = FRONT_ENDS[name]
    inputs = [a.astype(F32) for a in inputs]
    if "keras" in name and name != "keras function":
        function = of_keras.KLDivergence(function.reduction)
    given = [arrays.put(a) for a in inputs]
    if arrays.name == "torch":
        given[0].requires_grad_()
    for cotangent in (None, 0.5):
        with quiet():
            value, gradients = function.value_and_grad(*given, cotangent=cotangent)
            expected, wanted = function.value_and_grad(*inputs, cotangent=cotangent)
        for found, like in zip((value, *gradients), (expected, *wanted), strict=True):
            assert type(found) is type(given[1])
            assert not getattr(found, "requires_grad", False)
            np.testing.assert_array_equal(arrays.get(found), like)


@pytest.mark.parametrize("name", [n for n in FRONT_ENDS if n != "puzzlelib"])
def test_gradients_are_derivatives(name):
    """By central differences: the cotangent reaches both arguments."""
    _, function, *inputs = FRONT_ENDS[name]
    rng = np.random.default_rng(6)
    with quiet():
        cotangent = rng.normal(size=np.shape(function(*inputs)))
        _, gradients = function.value_and_grad(*inputs, cotangent=cotangent)
        for k, gradient in enumerate(gradients):
            direction = rng.normal(size=inputs[k].shape)
            ends = []
            for step in (1e-6, -1e-6):
                moved = list(inputs)
                moved[k] = inputs[k] + step * direction
                ends.append((function(*moved) * cotangent).sum())
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx((gradient * direction).sum(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", [n for n in FRONT_ENDS if n != "puzzlelib"])
def test_jit(name):
    """JAX sees shapes and dtypes only."""
    jax = pytest.importorskip("jax", reason="not run: JAX is not installed")
    _, function, *inputs = FRONT_ENDS[name]
    inputs = [jax.numpy.asarray(a, F32) for a in inputs]
    if isinstance(function, of_keras.KLDivergence):
        function = of_keras.KLDivergence(function.reduction)
    with quiet():
        np.testing.assert_array_equal(jax.jit(lambda x, y: function(x, y))(*inputs), function(*inputs))


@pytest.mark.parametrize("name", ["pytorch module", "keras function", "keras class", "mxnet", "mxnet scores"])
def test_torch_compile(name):
    """One graph, without a break."""
    torch = pytest.importorskip("torch", reason="not run: PyTorch is not installed")
    _, function, *inputs = FRONT_ENDS[name]
    inputs = [torch.from_numpy(a.copy()) for a in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the compiler's own modules
        found = torch.compile(lambda x, y: function(x, y), backend="eager", fullgraph=True)(*inputs)
    assert torch.equal(found, function(*inputs))


def test_import_brings_numpy_at_most(python):
    code = """
import sys
from klcore.compat import keras, mxnet, puzzlelib, pytorch, rtorch
import numpy as np
half = np.full((2, 3), 0.5)
pytorch.kl_div(half, half, reduction="sum"), keras.KLDivergence()(half, half), mxnet.KLDivLoss()(half, half)
keras.KLDivergenceMetric()(half, half)
print(sorted({"torch", "jax", "keras", "cupy", "tensorflow", "ml_dtypes"} & set(sys.modules)))
"""
    assert python(code).strip() == "[]"


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_cotangent_of_another_shape(name):
    _, function, *inputs = FRONT_ENDS[name]
    with quiet(), pytest.raises(ValueError, match="cotangent must be a number or have the shape of the value"):
        function.value_and_grad(*inputs, cotangent=np.ones((2, 1, 7)))


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (pytorch.KLDivLoss, ["size_average", "reduce", "reduction", "log_target"]),
        (of_keras.KLDivergence, ["reduction", "name", "dtype"]),
        (of_keras.KLDivergenceMetric, ["name", "dtype"]),
    ],
)
def test_signatures_are_those_of_init(cls, words):
    """help() and editors show what can be passed, also of subclasses; and of objects what a call takes."""
    assert list(inspect.signature(cls).parameters) == words

    class Sub(cls):
        def __init__(self, factor):
            super().__init__()

    assert list(inspect.signature(Sub).parameters) == ["factor"]
    assert not hasattr(cls(), "__signature__")
