"""The front-ends of klcore.compat against what the five systems return: tests/golden/, and how they behave.

Every case of the golden files is run over NumPy arrays, a part over the emulated or real GPU, PyTorch's and JAX' arrays.
The cases that are not, and where klcore decided to differ, are named here, with the reason: NOT_RUN and the tests
called deviation.
"""

import builtins
import contextlib
import copy
import importlib
import json
import math
import os
import pathlib
import pickle
import sys
import warnings
from collections import Counter

import numpy as np
import oracle
import pytest
from conftest import DEVICES, DTYPES, computing_on

from klcore.compat import keras as of_keras
from klcore.compat import mxnet, puzzlelib, pytorch, rtorch

# ---- the golden files ------------------------------------------------------------------------------------------------

GOLDEN = pathlib.Path(__file__).with_name("golden")
SHORT = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64"}


class Case:
    """One case of a file: what it was called with, and its arrays by name."""

    def __init__(self, system, content, arrays):
        self.system = system
        self.id = content["id"]
        self.family = self.id.partition("/")[0]
        self.params = content["params"]
        self.error = content.get("error")
        self.names = list(content["arrays"])
        self._arrays = arrays

    def __repr__(self):
        return f"{self.system}/{self.id}"

    def __getitem__(self, name):
        return self._arrays[f"{self.id}/{name}"]

    def dtype(self, name):
        """Of an array, by its name; bfloat16 is stored widened."""
        side = "target" if "target" in name else "input" if "input" in name else "out"
        short = self.params.get(f"{side}_dtype") or self.params.get("dtype") or self[name].dtype.name
        return SHORT.get(short, short)


def load(system):
    arrays = np.load(GOLDEN / f"{system}.npz")
    return [Case(system, content, arrays) for content in json.loads(str(arrays["__index__"]))["cases"]]


CASES = {
    system: load(system) for system in ("pytorch", "r_torch", "keras", "keras_2", "mxnet", "mxnet_1.9", "puzzlelib")
}
COUNTS = {"pytorch": 305, "r_torch": 92, "keras": 233, "keras_2": 30, "mxnet": 135, "mxnet_1.9": 134, "puzzlelib": 62}
BY_NAME = {repr(case): case for cases in CASES.values() for case in cases}

# what there is to compare with, beside the families that have tests of their own
FAMILIES = {
    "pytorch": ("grid", "broadcast", "mixed", "half", "empty", "edge", "noncontig"),
    "r_torch": ("grid",),
    "keras": ("func", "class", "sample_weight", "half", "epsilon", "broadcast", "rank", "edge", "empty", "mask"),
    "keras_2": ("func", "sample_weight"),
    "mxnet": ("grid", "axis", "batch_axis", "weight", "sample_weight", "edge", "logits_extreme", "f16"),
    "mxnet_1.9": ("grid", "axis", "batch_axis", "weight", "sample_weight", "edge", "logits_extreme", "f16"),
    "puzzlelib": ("grid", "edge_target", "edge_pred", "edge_norm_target", "maxlabels"),
}
OWN_TESTS = {
    "pytorch": ("legacy", "double_backward", "error"),
    "r_torch": ("unknown_reduction", "error"),
    "keras": ("metric", "error"),
    "keras_2": (),
    "mxnet": ("broadcast", "error"),
    "mxnet_1.9": ("broadcast", "error"),
    "puzzlelib": ("accumulate", "error"),
}
NOT_RUN = {"pytorch": {"large": "the file holds their results, not their inputs; test_large_sums has others"}}
MAXLABELS_ERRORS = [c for c in CASES["puzzlelib"] if c.family == "maxlabels" and c.error]


def values(system):
    """The cases that have a value."""
    return [c for c in CASES[system] if c.family in FAMILIES[system] and not c.error]


def test_every_case_has_a_test():
    for system, cases in CASES.items():
        assert len(cases) == COUNTS[system]
        families = Counter(c.family for c in cases)
        assert set(families) == {*FAMILIES[system], *OWN_TESTS[system], *NOT_RUN.get(system, {})}
        assert sum(families[f] for f in NOT_RUN.get(system, {})) == (6 if system == "pytorch" else 0)


# ---- arrays of a library ---------------------------------------------------------------------------------------------


class Arrays:
    """Where a test computes: `put` makes an array of the library of a NumPy one, `get` brings a result back."""

    def __init__(self, name, put, get):
        self.name, self._put, self.get = name, put, get

    def put(self, array, dtype=None):
        array = np.asarray(array) if not isinstance(array, np.ndarray) else array
        return self._put(array, dtype or array.dtype.name)

    def __repr__(self):
        return self.name


def torch_arrays():
    torch = pytest.importorskip("torch", reason="not run: PyTorch is not installed")

    def put(array, dtype):
        return torch.from_numpy(np.array(array)).to(getattr(torch, dtype))

    def get(tensor):
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()

    return Arrays("torch", put, get)


def jax_arrays():
    jax = pytest.importorskip("jax", reason="not run: JAX is not installed")
    return Arrays("jax", lambda array, dtype: jax.numpy.asarray(array, dtype), np.asarray)


@pytest.fixture(scope="module")
def arrays(request):
    """By name: a device of KLCORE_TEST_DEVICES, "torch" or "jax"."""
    if request.param in ("torch", "jax"):
        yield {"torch": torch_arrays, "jax": jax_arrays}[request.param]()
        return
    with computing_on(request.param) as device:
        yield Arrays(request.param, lambda a, dtype: device.put(a.astype(DTYPES.get(dtype, dtype), copy=False)), device.get)


@pytest.fixture(autouse=True)
def without_keras(request, monkeypatch):
    """Keras may be loaded by other tests; here it is not, unless a test asks for it."""
    if "keras" not in request.fixturenames:
        monkeypatch.delitem(sys.modules, "keras", raising=False)


@pytest.fixture
def keras():
    os.environ.setdefault("KERAS_BACKEND", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the import are not ours
        return pytest.importorskip("keras", reason="not run: Keras is not installed")


def small(case):
    """Some of the ordinary cases, for where a run is slow: one of each kernel that a front-end uses."""
    shapes = ("/4x5/", "/2x3x4/", "/3x7/")
    return case.family in ("grid", "func", "class") and "f64" not in case.id and any(s in case.id for s in shapes)


def few(cases):
    """One case each of those that differ in what they ask for, not in the numbers."""
    found = {}
    for case in cases:
        key = json.dumps({k: v for k, v in case.params.items() if k != "kind"}, sort_keys=True)
        found.setdefault(key, case)
    return list(found.values())


def runs(*systems):
    """(arrays, case): all over NumPy, part of them elsewhere."""
    pairs = []
    for system in systems:
        for name in [*DEVICES, "torch", "jax"]:
            cases = values(system)
            if name == "torch":
                cases = cases if system == "pytorch" else [c for c in cases if c.family in ("grid", "func", "class")]
            elif name == "jax":
                cases = [c for c in cases if c.family in ("grid", "func", "class") and "f32" in c.id]
            elif name == "emulated":
                cases = few(filter(small, cases)) or cases[:3]
            if system == "puzzlelib" and name in ("torch", "jax"):
                continue  # its users have neither, and it has no derivative to teach them
            pairs += [pytest.param(name, case, id=f"{name}-{case!r}") for case in cases]
    return pytest.mark.parametrize(("arrays", "case"), pairs, indirect=["arrays"])


def check(got, expected, dtype, compared, what, loose=None):
    """Equal within the tolerance of the golden files, infinities and NaN exactly."""
    got = np.asarray(got).astype(np.float64)
    expected = np.asarray(expected).astype(np.float64)
    assert got.shape == expected.shape
    relative = loose or oracle.TOLERANCES["golden", dtype]
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.where(finite, 0, got), np.where(finite, 0, expected))
    wanted = np.where(finite, expected, 0)
    excess = np.abs(np.where(finite, got, 0) - wanted) / np.maximum(1, np.abs(wanted)) / relative
    worst = excess.max(initial=0)
    assert worst <= 1, f"off by {worst:.3g} tolerances"
    compared[f"golden arrays of {what} compared"] += 1


@contextlib.contextmanager
def quiet():
    """For the warnings that a system gives; that they come has tests of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def call(function, inputs, arrays, case, wrt=(), grad_out=None):
    """(value, gradients) as NumPy arrays: by value_and_grad, and where the library can by its own differentiation."""
    value = function(*inputs)
    if grad_out is None:
        return value, {"value": []}
    cotangent = arrays.put(grad_out, case.dtype("out"))
    found = {}
    again, gradients = function.value_and_grad(*inputs, cotangent=cotangent)
    np.testing.assert_array_equal(arrays.get(again), arrays.get(value))
    found["value_and_grad"] = [arrays.get(g) for g in gradients[: len(wrt)]]
    if arrays.name == "torch":
        leaves = [a.clone().requires_grad_() for a in inputs]
        function(*leaves).backward(cotangent)
        found["backward"] = [arrays.get(a.grad) for a in leaves[: len(wrt)]]
    elif arrays.name == "jax":
        jax = importlib.import_module("jax")
        _, pull = jax.vjp(function, *inputs)
        found["vjp"] = [arrays.get(g) for g in pull(cotangent)[: len(wrt)]]
    return value, found


def run(function, inputs, arrays, case, compared, wrt, loose=None, grad_out="grad_out", prefix="grad_"):
    """Value and gradients of a case against what the system returned."""
    inputs = [arrays.put(case[name], case.dtype(name)) for name in inputs]
    grad_out = case[grad_out] if grad_out in case.names else None
    value, found = call(function, inputs, arrays, case, wrt, grad_out)
    dtype = np.asarray(value).dtype.name if arrays.name != "torch" else str(value.dtype).removeprefix("torch.")
    assert dtype == case.dtype("out")
    check(arrays.get(value), case["out"], case.dtype("out"), compared, case.system, loose)
    if grad_out is None:
        return
    for gradients in found.values():
        for name, gradient in zip(wrt, gradients, strict=True):
            assert gradient.shape == case[name].shape
            check(gradient, case[prefix + name], case.dtype(name), compared, case.system, loose)


# ---- PyTorch ---------------------------------------------------------------------------------------------------------

VIEWS = {
    "permute0231": lambda a: a.transpose(0, 2, 3, 1),
    "step2": lambda a: a[:, ::2],
    "transpose01": lambda a: a.swapaxes(0, 1),
    "narrow": lambda a: a[..., 1:4],
}


@runs("pytorch")
def test_pytorch(arrays, case, compared):
    loss = pytorch.KLDivLoss(reduction=case.params["reduction"], log_target=case.params.get("log_target", False))
    # deviation: PyTorch rounds xlogy(t, t) to the dtype of the target, klcore only the result
    narrow = max(oracle.TOLERANCES["golden", case.dtype(name)] for name in ("input", "target"))
    with quiet():
        if case.id == "half/f16/overflow_batchmean":  # deviation: as well its sum, which overflows
            assert np.isinf(case["out"])
            value = loss(*(arrays.put(case[name]) for name in ("input", "target")))
            assert str(value.dtype).endswith("float16")
            assert 1.6 < float(value) < 1.7
        else:
            run(loss, ("input", "target"), arrays, case, compared, ("input", "target"), narrow)


@pytest.mark.parametrize("case", [c for c in CASES["pytorch"] if c.family == "noncontig"], ids=repr)
def test_pytorch_views(case):
    """The same bits from a view as from a copy of it."""
    view = VIEWS[case.params["view"]]
    views = view(case["base_input"]), view(case["base_target"])
    np.testing.assert_array_equal(views[0], case["input"])
    loss = pytorch.KLDivLoss(reduction=case.params["reduction"])
    with quiet():
        np.testing.assert_array_equal(loss(*views), loss(case["input"], case["target"]))


LEGACY = {
    "mean_is_not_batchmean": "not the divergence",
    "legacy_args_deprecated": "size_average and reduce are deprecated",
    "elementwise_mean_deprecated": "'elementwise_mean' is deprecated",
}


@pytest.mark.parametrize("case", [c for c in CASES["pytorch"] if c.family == "legacy"], ids=repr)
def test_pytorch_legacy(case, compared):
    words = {k: case.params[k] for k in ("size_average", "reduce", "reduction") if k in case.params}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if case.params["api"] == "M":
            value = pytorch.KLDivLoss(**words)(case["input"], case["target"])
        else:
            value = pytorch.kl_div(case["input"], case["target"], **words)
    expected = case.params.get("warnings", ["elementwise_mean_deprecated"])
    assert len(caught) == len(expected)
    for warning, word in zip(caught, expected, strict=True):
        assert warning.category is UserWarning
        assert LEGACY[word] in str(warning.message)
        assert warning.filename == __file__
    check(value, case["out"], "float64", compared, "pytorch")


@pytest.mark.parametrize("case", [c for c in CASES["pytorch"] if c.family == "double_backward"], ids=repr)
def test_pytorch_double_backward(case, compared):
    torch = pytest.importorskip("torch", reason="not run: PyTorch is not installed")
    x, t, u, v = (torch.from_numpy(case[name].copy()) for name in ("input", "target", "u", "v"))
    x.requires_grad_()
    t.requires_grad_()
    value = pytorch.kl_div(x, t, reduction=case.params["reduction"], log_target=case.params["log_target"])
    first = torch.autograd.grad(value, (x, t), create_graph=True)
    second = torch.autograd.grad((first[0] * u).sum() + (first[1] * v).sum(), (x, t))
    for name, found in zip(("grad_input", "grad_target", "hvp_input", "hvp_target"), (*first, *second), strict=True):
        check(found.detach().numpy(), case[name], "float64", compared, "pytorch")


F32, F64 = np.float32, np.float64
HALF = np.full((2, 3), 0.5)

PYTORCH_ERRORS = {
    "int_input": lambda: pytorch.kl_div(np.ones((2, 3), int), HALF, reduction="sum"),
    "bool_target": lambda: pytorch.kl_div(HALF, HALF > 0, reduction="sum"),
    "complex": lambda: pytorch.kl_div(HALF * 1j, HALF, reduction="sum"),
    "int_and_complex": lambda: pytorch.kl_div(HALF * 1j, np.ones((2, 3), int), reduction="sum"),
    "shape": lambda: pytorch.kl_div(HALF, np.ones((2, 4)), reduction="sum"),
    "reduction_bogus": lambda: pytorch.kl_div(HALF, HALF, reduction="bogus"),
    "module_ctor_bogus": lambda: pytorch.KLDivLoss(reduction="bogus"),
    "module_call_bogus": lambda: pytorch.KLDivLoss(reduction="bogus")(HALF, HALF),
    "log_target_int": lambda: pytorch.kl_div(HALF, HALF, reduction="sum", log_target=1),
    # deviation: NumPy arrays are taken
    "numpy": lambda: pytorch.kl_div(HALF, HALF, reduction="sum"),
}
RTORCH_ERRORS = {
    "log_target_fn": lambda: rtorch.nnf_kl_div(HALF, HALF, "sum", log_target=True),
    "reduction_null": lambda: rtorch.nnf_kl_div(HALF, HALF, None),
}
KERAS_ERRORS = {
    # deviation: Keras looks metrics up by name, and not by this one; here `kld` is a function, and there is no look-up
    "metric_get_kld": lambda: of_keras.kld(HALF, HALF),
    "shape": lambda: of_keras.kld(np.ones((2, 3)), np.ones((2, 4))),
    "shape_rank": lambda: of_keras.kld(np.ones((2, 3, 1)), np.ones((2, 3))),
    "0d": lambda: of_keras.kld(np.float64(0.5), np.array(0.5)),
}
MXNET_ERRORS = {
    "weight_str": lambda: mxnet.KLDivLoss(weight="2")(HALF, HALF),
    "size_mismatch": lambda: mxnet.KLDivLoss()(HALF, HALF.reshape(6)),
    "dtype_mismatch": lambda: mxnet.KLDivLoss()(HALF, HALF.astype(F32)),
    "kw_sample_weight": lambda: mxnet.KLDivLoss()(HALF, HALF, sample_weight=np.ones((2, 1))),
    "unknown_kw": lambda: mxnet.KLDivLoss(epsilon=1),
    # deviation: NumPy arrays are taken
    "numpy": lambda: mxnet.KLDivLoss()(HALF, HALF),
}
PUZZLELIB_ERRORS = {
    "batch_mismatch": lambda: puzzlelib.KLDivergence()(ones(4, 3), ones(3, 3)),
    "broadcast_batch": lambda: puzzlelib.KLDivergence()(ones(4, 3), ones(1, 3)),
    "shape_tail": lambda: puzzlelib.KLDivergence()(ones(4, 3), ones(4, 2)),
    "ndim": lambda: puzzlelib.KLDivergence()(ones(4, 3), ones(4, 3, 1)),
    "empty_batch": lambda: puzzlelib.KLDivergence()(ones(0, 3), ones(0, 3)),
    "pred_f64": lambda: puzzlelib.KLDivergence()(HALF, ones(2, 3)),
    "target_f64": lambda: puzzlelib.KLDivergence()(ones(2, 3), HALF),
    "target_f64_norm": lambda: puzzlelib.KLDivergence(normTarget=True)(ones(2, 3), HALF),
    "target_i32": lambda: puzzlelib.KLDivergence()(ones(2, 3), np.ones((2, 3), np.int32)),
    "list": lambda: puzzlelib.KLDivergence()([[0.5, 0.5]], ones(1, 2)),
}
ERRORS = {
    "pytorch": PYTORCH_ERRORS,
    "r_torch": RTORCH_ERRORS,
    "keras": KERAS_ERRORS,
    "mxnet": MXNET_ERRORS,
    "mxnet_1.9": MXNET_ERRORS,
    "puzzlelib": PUZZLELIB_ERRORS,
}
TAKEN = ("numpy", "metric_get_kld", "module_ctor_bogus")  # the last one by PyTorch, too
# classes that only the originals have -> ours, by the case where it depends
CLASSES = {
    "simpleError": {"log_target_fn": TypeError, "reduction_null": ValueError},
    "InvalidArgumentError": {"shape": ValueError, "shape_rank": ValueError, "0d": ValueError},
    "MXNetError": {"size_mismatch": ValueError, "dtype_mismatch": TypeError},
}


def ones(*shape):
    return np.ones(shape, F32)


@pytest.mark.parametrize("case", [c for cs in CASES.values() for c in cs if c.family == "error"], ids=repr)
def test_errors(case, compared):
    name = case.id.removeprefix("error/")
    attempt = ERRORS[case.system][name]
    if name in TAKEN:
        attempt()
    else:
        error = CLASSES[case.error][name] if case.error in CLASSES else getattr(builtins, case.error)
        with pytest.raises(error):
            attempt()
    compared[f"golden errors of {case.system} raised"] += 1


# ---- R torch ---------------------------------------------------------------------------------------------------------


@runs("r_torch")
def test_rtorch(arrays, case, compared):
    loss = rtorch.nn_kl_div_loss(case.params["reduction"])
    warns = pytest.warns(UserWarning, match="not the divergence") if case.params["warnings"] else contextlib.nullcontext()
    inputs = [arrays.put(case[name]) for name in ("input", "target")]
    with warns:
        value, (d_input, _) = loss.value_and_grad(*inputs)
    with quiet():
        np.testing.assert_array_equal(arrays.get(rtorch.nnf_kl_div(*inputs, case.params["reduction"])), arrays.get(value))
    check(arrays.get(value), case["out"], case.dtype("out"), compared, "r_torch")
    check(arrays.get(d_input), case["grad_input_of_sum"], case.dtype("input"), compared, "r_torch")


@pytest.mark.parametrize("case", [c for c in CASES["r_torch"] if c.family == "unknown_reduction"], ids=repr)
def test_rtorch_deviation_unknown_reductions_raise(case):
    """In R they are silently "none"."""
    for attempt in (rtorch.nn_kl_div_loss, lambda word: rtorch.nnf_kl_div(case["input"], case["target"], word)):
        with pytest.raises(ValueError, match="reduction must be"):
            attempt(case.params["reduction"])


# ---- Keras -----------------------------------------------------------------------------------------------------------


class Masked(np.ndarray):
    """An array that Keras' mask can be attached to."""


def keras_call(case):
    """A callable of the arrays for a case, or None where Keras 2 and 3 differ."""
    reduction = case.params.get("reduction", "function")
    if reduction == "function":
        return of_keras.kullback_leibler_divergence
    dtype = SHORT.get(case.params.get("dtype"))
    return of_keras.KLDivergence(reduction=reduction, dtype=dtype)


@runs("keras")
def test_keras(arrays, case, compared):
    function = keras_call(case)
    inputs = [arrays.put(case[name], case.dtype(name)) for name in ("y_true", "y_pred")]
    of_keras.set_epsilon(case.params.get("epsilon", 1e-7))
    try:
        if case.family == "mask":
            inputs[1] = inputs[1].view(Masked)
            inputs[1]._keras_mask = case["mask"]
        if "sample_weight" in case.names:
            weight = arrays.put(case["sample_weight"])
            plain, function = function, lambda *a: plain(*a, weight)
            function.value_and_grad = lambda *a, cotangent: plain.value_and_grad(*a, weight, cotangent=cotangent)
        if case.family == "mask":
            value, grad_out = function(*inputs), None
        else:
            grad_out = case["grad_out"] if "grad_out" in case.names else None
            value, found = call(function, inputs, arrays, case, ("y_true", "y_pred"), grad_out)
    finally:
        of_keras.set_epsilon(1e-7)
    check(arrays.get(value), case["out"], case.dtype("out"), compared, "keras")
    if grad_out is None:
        return
    for gradients in found.values():
        for name, gradient in zip(("y_true", "y_pred"), gradients, strict=True):
            expected = case[f"grad_{name}"]
            if case.family == "half":  # deviation: t/p, formed in float16, overflows there; klcore forms it in float32
                assert np.isfinite(gradient.astype(F64)).all()
                gradient = np.where(np.isfinite(expected), gradient, expected)
            check(gradient, expected, case.dtype(name), compared, "keras")


# Keras 2 weighs the first axis of the values where ours, as Keras 3, weighs the last; a (batch, 1) weight of a vector of
# values makes a column in Keras 3, a vector in Keras 2; and "sum_over_batch_size" is over the values in both
KERAS_2_DIFFERS = ("2x3x4_w2/", "4x4x3_w4/")


@runs("keras_2")
def test_keras_2(arrays, case, compared):
    function = keras_call(case)
    inputs = [arrays.put(case[name]) for name in ("y_true", "y_pred")]
    if "sample_weight" in case.names:
        weight = arrays.put(case["sample_weight"])
        if any(shape in case.id for shape in KERAS_2_DIFFERS):
            if "2x3x4_w2/" in case.id:  # does not fit the last axis
                with pytest.raises(ValueError, match="must be equal or broadcast"):
                    function(*inputs, weight)
            else:  # fits both
                assert not np.allclose(arrays.get(function(*inputs, weight)), case["out"], rtol=1e-4)
            weight = weight[:, None]  # what says it in Keras 3
        value = function(*inputs, weight)
        if case.params["reduction"] == "none" and "4x5_w4x1" in case.id:
            value = value.reshape(-1)
        check(arrays.get(value), case["out"], case.dtype("out"), compared, "keras_2")
    else:
        run(function, ("y_true", "y_pred"), arrays, case, compared, ("y_true", "y_pred"))


METRICS = [c for c in CASES["keras"] if c.family == "metric"]


def check_metric(case, put, compared):
    metric = of_keras.KLDivergenceMetric()
    for k, (result, total, count) in enumerate(case["results"]):
        names = [n for n in (f"y_true_{k}", f"y_pred_{k}", f"sample_weight_{k}") if n in case.names]
        metric.update_state(*(put(case[n]) for n in names))
        for found, expected in ((metric.result(), result), (metric.total, total), (metric.count, count)):
            check(np.float64(float(found)), expected, "float32", compared, "keras")
    metric.reset_state()
    assert float(metric.result()) == 0.0


@pytest.mark.parametrize("case", METRICS, ids=repr)
def test_keras_metric(case, compared):
    check_metric(case, np.asarray, compared)


@pytest.mark.parametrize("case", METRICS, ids=repr)
def test_keras_metric_is_one_of_keras(case, compared, keras):
    metric = of_keras.KLDivergenceMetric(name="kl")
    assert isinstance(metric, keras.metrics.Metric)
    assert isinstance(metric, of_keras.KLDivergenceMetric)
    assert metric.name == "kl"
    check_metric(case, np.asarray, compared)


# ---- MXNet -----------------------------------------------------------------------------------------------------------


def mxnet_loss(case):
    words = {k: case.params[k] for k in ("from_logits", "axis", "batch_axis", "weight") if k in case.params}
    if case.id.endswith("weighted_raw"):
        assert case.params["from_logits"] is False
    return mxnet.KLDivLoss(**words, nonbatch=case.params["reduction_over_nonbatch"])


@runs("mxnet", "mxnet_1.9")
def test_mxnet(arrays, case, compared):
    inputs = [n for n in ("pred", "label", "sample_weight") if n in case.names]
    raw = not case.params.get("from_logits", True) and case.dtype("out") == "float32"
    loose = oracle.TOLERANCES["golden softmax", "float32"] if raw else None
    run(mxnet_loss(case), inputs, arrays, case, compared, inputs, loose)


@pytest.mark.parametrize(
    "case", [c for s in ("mxnet", "mxnet_1.9") for c in CASES[s] if c.family == "broadcast"], ids=repr
)
def test_mxnet_deviation_shapes_must_match(case):
    """It broadcasts where it is not hybridized, and only there."""
    with pytest.raises(ValueError, match="of one shape"):
        mxnet_loss(case)(case["pred"], case["label"])


# ---- PuzzleLib -------------------------------------------------------------------------------------------------------

# Its softmax underflows, or meets NaN and infinities as the one library does that it ran on. Ours: the divergence of
# the log-softmax, finite; and NaN in a row makes the row NaN. value, gradient:
PUZZLELIB_DIFFERS = {
    "edge_pred/1/soft": (798.9703, [[-0.8, 0.3, 0.5]]),
    "edge_pred/2/hot": (1000.6931, [[1, -0.5, -0.5]]),
    "edge_pred/4/soft": (np.nan, [[np.nan] * 3]),
    "edge_pred/4/hot": (np.nan, [[np.nan] * 3]),
    "edge_pred/6/soft": (78.97035, [[-0.8, 0.3, 0.5]]),
    "edge_pred/7/soft": (np.nan, [[np.nan] * 3]),
    "edge_pred/7/hot": (np.nan, [[np.nan] * 3]),
    "edge_norm_target/3": (0.0, [[np.nan] * 3]),
}


@runs("puzzlelib")
def test_puzzlelib(arrays, case, compared):
    cost = puzzlelib.KLDivergence(case.params.get("maxlabels"), case.params.get("normTarget", False))
    pred, target = arrays.put(case["pred"]), arrays.put(case["target"])
    expected = PUZZLELIB_DIFFERS.get(case.id, (case["error"], case["grad"]))
    error, grad = cost(pred, target)
    for found in (error, cost.validate(pred, target), cost.getMeanError(), cost.getError(), cost.getValError()):
        check(arrays.get(found), expected[0], "float32", compared, "puzzlelib")
    assert grad is cost.grad
    assert np.asarray(arrays.get(grad)).dtype == F32
    check(arrays.get(grad), expected[1], "float32", compared, "puzzlelib")
    again, (same,) = cost.value_and_grad(pred, target)
    np.testing.assert_array_equal(arrays.get(again), arrays.get(error))
    np.testing.assert_array_equal(arrays.get(same), arrays.get(grad))


@pytest.mark.parametrize("case", MAXLABELS_ERRORS, ids=repr)
def test_puzzlelib_maxlabels(case):
    with pytest.raises(AssertionError, match="maxlabels"):
        puzzlelib.KLDivergence(case.params["maxlabels"])(case["pred"], case["target"])


def test_puzzlelib_accumulates(compared):
    cost = puzzlelib.KLDivergence()
    for case in (c for c in CASES["puzzlelib"] if c.family == "accumulate"):
        error, _ = cost(case["pred"], case["target"])
        check(error, case["error"], "float32", compared, "puzzlelib")
        check(cost.getMeanError(), case["mean_error_after"], "float32", compared, "puzzlelib")
        assert (cost.batchsize, cost.numOfSamples) == (case.params["batchsize"], case.params["numOfSamples"])
