"""The front-ends of klcore.compat against what the five systems return: tests/golden/, and how they behave.

Every case of the golden files is run over NumPy arrays, a part over the emulated or real GPU, PyTorch's and JAX'
arrays. The cases that are not, and where klcore decided to differ, are named with the reason: NOT_RUN, the tests called
deviation, and comments that begin with the word.
"""

import builtins
import contextlib
import copy
import importlib.util
import inspect
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
        yield Arrays(
            request.param, lambda a, dtype: device.put(a.astype(DTYPES.get(dtype, dtype), copy=False)), device.get
        )


@pytest.fixture(autouse=True)
def without_keras(request, monkeypatch):
    """Keras may be loaded by other tests; here it is not, unless a test asks for it."""
    if "keras" not in request.fixturenames:
        monkeypatch.delitem(sys.modules, "keras", raising=False)


def needs(*libraries):
    """Skip a test whose own process would import what is not there."""
    for name in libraries:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"not run: {name} is not installed")


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
            if name not in ("cpu", "torch"):  # only to these arrays can others than Keras attach a mask
                cases = [c for c in cases if c.family != "mask"]
            if name == "jax":  # which has no float64 unless it is told so, for the whole process
                cases = [c for c in cases if {a.dtype.name for a in map(c.__getitem__, c.names)} <= {"float32", "bool"}]
            elif name == "emulated":
                weighted = [c for c in cases if c.family == "sample_weight" and "f32" in c.id]
                cases = [*(few(filter(small, cases)) or cases[:3]), *weighted[:4]]
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


def gradients_of(function, inputs, value, cotangent, arrays, count):
    """The first `count` gradients, in every way there is: value_and_grad, and the library's own differentiation."""
    again, gradients = function.value_and_grad(*inputs, cotangent=cotangent)
    np.testing.assert_array_equal(arrays.get(again), arrays.get(value))
    ways = [gradients]
    if arrays.name == "torch":
        leaves = [a.clone().requires_grad_() for a in inputs]
        function(*leaves).backward(cotangent)
        ways.append([leaf.grad for leaf in leaves])
    elif arrays.name == "jax":
        _, pull = importlib.import_module("jax").vjp(function, *inputs)
        ways.append(pull(cotangent))
    return [[arrays.get(g) for g in gradients[:count]] for gradients in ways]


def run(function, case, arrays, compared, inputs, loose=None):
    """Value and gradients of a case against what the system returned. `inputs`: names, in the order of the call."""
    given = [arrays.put(case[name], case.dtype(name)) for name in inputs]
    value = function(*given)
    assert str(value.dtype).removeprefix("torch.") == case.dtype("out")
    check(arrays.get(value), case["out"], case.dtype("out"), compared, case.system, loose)
    if "grad_out" not in case.names:
        return
    cotangent = arrays.put(case["grad_out"], case.dtype("out"))
    for gradients in gradients_of(function, given, value, cotangent, arrays, len(inputs)):
        for name, gradient in zip(inputs, gradients, strict=True):
            expected = case[f"grad_{name}"]
            if case.system == "keras" and case.family == "half":
                # deviation: t/p, formed in float16, overflows there; in float32 here
                assert np.isfinite(gradient.astype(F64)).all()
                gradient = np.where(np.isfinite(expected), gradient, expected)
            check(gradient, expected, case.dtype(name), compared, case.system, loose)


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
            run(loss, case, arrays, compared, ("input", "target"), narrow)


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
    warns = (
        pytest.warns(UserWarning, match="not the divergence") if case.params["warnings"] else contextlib.nullcontext()
    )
    inputs = [arrays.put(case[name]) for name in ("input", "target")]
    with warns:
        value, (d_input, _) = loss.value_and_grad(*inputs)
    with quiet():
        np.testing.assert_array_equal(
            arrays.get(rtorch.nnf_kl_div(*inputs, case.params["reduction"])), arrays.get(value)
        )
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
    inner = keras_call(case)
    weight = (arrays.put(case["sample_weight"]),) if "sample_weight" in case.names else ()

    def function(y_true, y_pred):
        if case.family == "mask":
            y_pred = y_pred.view(Masked) if arrays.name == "cpu" else y_pred
            y_pred._keras_mask = arrays.put(case["mask"])
        return inner(y_true, y_pred, *weight)

    function.value_and_grad = lambda *a, cotangent: inner.value_and_grad(*a, *weight, cotangent=cotangent)
    of_keras.set_epsilon(case.params.get("epsilon", 1e-7))
    try:
        run(function, case, arrays, compared, ("y_true", "y_pred"))
    finally:
        of_keras.set_epsilon(1e-7)


# deviation: Keras 2 weighs the first axis of the values where ours, as Keras 3, weighs the last. A (batch, 1) weight of
# a vector of values makes a column in Keras 3, a vector in Keras 2. The other cases agree.
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
        run(function, case, arrays, compared, ("y_true", "y_pred"))


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
    run(mxnet_loss(case), case, arrays, compared, inputs, loose)


@pytest.mark.parametrize(
    "case", [c for s in ("mxnet", "mxnet_1.9") for c in CASES[s] if c.family == "broadcast"], ids=repr
)
def test_mxnet_deviation_shapes_must_match(case):
    """It broadcasts where it is not hybridized, and only there."""
    with pytest.raises(ValueError, match="the same shape"):
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


# ---- behaviour: all --------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(5)
LOGITS = RNG.normal(size=(4, 3, 5))
LOG_PROBS = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
PROBS = RNG.dirichlet(np.ones(5), (4, 3))

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
    """Of PyTorch's and JAX' arrays, with the numbers of NumPy's."""
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


@pytest.mark.parametrize("function", [pytorch.kl_div, pytorch.KLDivLoss(), rtorch.nnf_kl_div, rtorch.nn_kl_div_loss()])
def test_torch_compile_drops_warnings(function):
    """As it does those of PyTorch's own loss: it has no way to follow them."""
    torch = pytest.importorskip("torch", reason="not run: PyTorch is not installed")
    inputs = [torch.from_numpy(a.copy()) for a in (LOG_PROBS, PROBS)]
    with quiet():
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


# ---- behaviour: PyTorch and R ----------------------------------------------------------------------------------------


def test_pytorch_module():
    loss = pytorch.KLDivLoss(reduction="sum")
    assert repr(loss) == "KLDivLoss()"
    total = loss(LOG_PROBS, PROBS)
    loss.reduction = "batchmean"
    np.testing.assert_array_equal(loss(LOG_PROBS, PROBS), pytorch.kl_div(LOG_PROBS, PROBS, reduction="batchmean"))
    assert loss(LOG_PROBS, PROBS) == pytest.approx(total / 4)
    loss.log_target = True
    assert loss(LOG_PROBS, LOG_PROBS) == 0
    loss.log_target = 1
    with pytest.raises(TypeError, match="log_target must be a bool"):
        loss(LOG_PROBS, LOG_PROBS)


def test_pytorch_module_is_one_of_pytorch():
    """What people do with a loss of torch.nn: move it, keep it in a model, copy it, save it."""
    torch = pytest.importorskip("torch", reason="not run: PyTorch is not installed")
    loss = pytorch.KLDivLoss(reduction="sum", log_target=True).to("cpu").eval()
    assert isinstance(loss, torch.nn.Module)
    assert isinstance(loss, pytorch.KLDivLoss)
    assert not list(loss.parameters())
    assert not loss.state_dict()
    arrays = [torch.from_numpy(a.copy()) for a in (LOG_PROBS, LOG_PROBS)]
    for same in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), torch.nn.Sequential(loss)[0], loss.forward):
        assert torch.equal(same(*arrays), loss(*arrays))


def test_pytorch_subclasses_hooks_and_copies():
    """As of a module: forward is what subclasses override, hooks are called, attributes are copied."""
    torch = pytest.importorskip("torch", reason="not run: PyTorch is not installed")

    class Scaled(pytorch.KLDivLoss):
        def __init__(self):
            super().__init__(reduction="sum")
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, input, target):
            return 3 * super().forward(input, target)

    arrays = [torch.from_numpy(a.copy()) for a in (LOG_PROBS, PROBS)]
    loss = Scaled()
    called = []
    loss.register_forward_hook(lambda *_: called.append(True))
    assert isinstance(loss, torch.nn.KLDivLoss)
    assert torch.equal(loss(*arrays), 3 * pytorch.kl_div(*arrays, reduction="sum"))
    assert called
    loss.tag = "kept"
    same = copy.deepcopy(loss.eval())
    assert (same.tag, same.training, len(list(same.parameters()))) == ("kept", False, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is on its way out
def test_pytorch_jit_trace():
    """Records the call, not what it returned."""
    torch = pytest.importorskip("torch", reason="not run: PyTorch is not installed")
    arrays = [torch.from_numpy(a.copy()) for a in (LOG_PROBS, PROBS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that shapes are constants, which they are
        traced = torch.jit.trace(lambda x, y: pytorch.kl_div(x, y, reduction="sum"), arrays)
    other = [arrays[0] * 2, arrays[1]]
    assert torch.equal(traced(*other), pytorch.kl_div(*other, reduction="sum"))


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_cotangent_of_another_shape(name):
    _, function, *inputs = FRONT_ENDS[name]
    with quiet(), pytest.raises(ValueError, match="cotangent must be a number or have the shape of the value"):
        function.value_and_grad(*inputs, cotangent=np.ones((2, 1, 7)))


def test_arrays_of_two_libraries_are_named():
    torch = pytest.importorskip("torch", reason="not run: PyTorch is not installed")
    with pytest.raises(TypeError, match=r"input of torch and target of numpy; convert one .*torch\.from_numpy"):
        pytorch.kl_div(torch.zeros(3), np.ones(3), reduction="sum")


def test_pytorch_positional_reduction_is_a_mean():
    """The trap of the original: the first argument is size_average."""
    with pytest.warns(UserWarning, match="deprecated"):
        loss = pytorch.KLDivLoss("sum")
    with pytest.warns(UserWarning, match="not the divergence"):
        mean = loss(LOG_PROBS, PROBS)
    assert mean == pytest.approx(pytorch.kl_div(LOG_PROBS, PROBS, reduction="sum") / PROBS.size)


@pytest.mark.parametrize(
    ("input", "target", "expected"),
    [
        (ones(3), F64(0.5), F32),
        (F64(-1.0), ones(3), F32),
        (F32(-1.0), F64(0.5), F64),
        (ones(3).astype(np.float16), F32(0.5), np.float16),
        (ones(3).astype(np.float16), ones(1), F32),
        (ones(3).astype(np.float16), ones(3).astype(DTYPES["bfloat16"]), F32),
        (ones(3).astype(DTYPES["bfloat16"]), F32(0.5), DTYPES["bfloat16"]),
    ],
)
def test_pytorch_promotion(input, target, expected):
    for reduction in ("none", "sum", "batchmean"):
        value, gradients = pytorch.kl_div.value_and_grad(input, target, reduction=reduction)
        assert value.dtype == expected
        assert [g.dtype for g in gradients] == [input.dtype, target.dtype]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.5], HALF), TypeError, "input must be an array"),
        ((HALF, 0.5), TypeError, "target must be an array"),
        ((HALF.astype(object), HALF), TypeError, "must have dtype float16"),
        ((np.ones((2, 3), np.uint8), np.ones((2, 4))), RuntimeError, "floating-point"),
        ((np.ones((0, 3), int), np.ones((0, 3))), RuntimeError, "floating-point"),
        ((np.ones(3, int), np.ones(3, np.complex64)), RuntimeError, "must be real"),
        ((np.ma.ones(3), np.ones(3)), TypeError, "mask"),
    ],
)
def test_pytorch_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        pytorch.kl_div(*arguments, reduction="sum")


@pytest.mark.parametrize("reduction", [None, "MEAN", "batch_mean", "", 1])
def test_pytorch_unknown_reductions(reduction):
    with pytest.raises(ValueError, match="reduction must be"):
        pytorch.KLDivLoss(reduction=reduction)([1], None)  # before anything else is looked at


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_sums(dtype):
    """Of 64,000 terms, against the terms added up exactly."""
    rng = np.random.default_rng(61)
    input = np.log(rng.dirichlet(np.ones(1000), 64)).astype(dtype)
    target = rng.dirichlet(np.ones(1000), 64).astype(dtype)
    t, x = target.astype(F64), input.astype(F64)
    exact = math.fsum((t * np.log(t) - t * x).ravel())
    assert pytorch.kl_div(input, target, reduction="sum") == pytest.approx(
        exact, rel=1e-6 if dtype == "float32" else 1e-13
    )
    assert pytorch.kl_div(input, target, reduction="batchmean") == pytest.approx(exact / 64, rel=1e-6)


def count_warnings(action, function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        for _ in range(3):
            function(LOG_PROBS, PROBS)
    assert all(w.category is UserWarning and w.filename == __file__ for w in caught)
    return len(caught)


@pytest.mark.parametrize(
    "function", [rtorch.nnf_kl_div, rtorch.nn_kl_div_loss(), rtorch.nn_kl_div_loss().value_and_grad]
)
def test_rtorch_warns_at_every_call(function):
    assert count_warnings("default", function) == 3  # where Python shows others once
    assert count_warnings("ignore", function) == 0
    with pytest.raises(UserWarning, match="batchmean"):
        count_warnings("error", function)


@pytest.mark.parametrize("function", [pytorch.kl_div, pytorch.KLDivLoss()])
def test_pytorch_warns_as_python_does(function):
    assert count_warnings("always", function) == 3
    assert count_warnings("default", function) == 1


def test_rtorch_has_no_log_target():
    loss = rtorch.nn_kl_div_loss(reduction="none")
    assert loss.reduction == "none"
    assert loss(LOG_PROBS, PROBS).shape == PROBS.shape
    with pytest.raises(TypeError):
        rtorch.nn_kl_div_loss(log_target=True)
    with pytest.raises(ValueError, match="batch axis"):
        rtorch.nnf_kl_div(np.array(-1.0), np.array(0.5), "batchmean")


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


# ---- behaviour: Keras ------------------------------------------------------------------------------------------------


def test_keras_names():
    """The names are what Keras writes into its logs."""
    assert of_keras.kl_divergence is of_keras.KLD is of_keras.kld
    assert of_keras.kl_divergence.__name__ == "kl_divergence"
    assert of_keras.kullback_leibler_divergence.__name__ == "kullback_leibler_divergence"
    for name in of_keras.__all__:  # where pickles and saved models look for them
        public = getattr(of_keras, name)
        assert public.__module__ == "klcore.compat.keras"
        assert pickle.loads(pickle.dumps(public)) is public
    np.testing.assert_array_equal(of_keras.kld(PROBS, PROBS), of_keras.kullback_leibler_divergence(PROBS, PROBS))


@pytest.mark.parametrize("loaded", [False, True])
def test_keras_epsilon(loaded, request):
    keras = request.getfixturevalue("keras") if loaded else None
    assert of_keras.epsilon() == 1e-7
    y_true, y_pred = np.array([1.0]), np.array([0.0])
    before = of_keras.kld(y_true, y_pred)
    of_keras.set_epsilon(1e-3)
    try:
        assert of_keras.epsilon() == 1e-3
        assert not loaded or keras.config.epsilon() == 1e-3
        assert of_keras.kld(y_true, y_pred) == pytest.approx(-math.log(1e-3))
    finally:
        of_keras.set_epsilon(1e-7)
    assert before == pytest.approx(-math.log(1e-7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keras_epsilon_is_rounded(dtype):
    """To the dtype: what is clipped equals the bound, and so contributes nothing."""
    bound = np.array([1e-7]).astype(DTYPES[dtype])
    assert of_keras.kld(bound, np.zeros_like(bound)) == 0
    _, (d_true, d_pred) = of_keras.kld.value_and_grad(bound, bound)
    assert (d_true, d_pred) == (1, -1)  # the bound is inside


@pytest.mark.parametrize(
    ("y_true", "y_pred", "dtype"),
    [
        ([[0, 1]], np.array([[0.25, 0.75]]), F64),
        (np.array([[False, True]]), np.array([[0.25, 0.75]], F32), F32),
        (np.array([[0.0, 1.0]]), np.array([[0.25, 0.75]], np.float16), np.float16),
        ([[0.0, 1.0]], [[0.25, 0.75]], F32),
    ],
)
def test_keras_function_dtypes(y_true, y_pred, dtype):
    value, (d_true, _) = of_keras.kld.value_and_grad(y_true, y_pred)
    assert value.dtype == dtype
    assert value == pytest.approx([-math.log(0.75)], rel=1e-3)
    assert d_true.shape == (1, 2)


def test_keras_integer_predictions_are_floats():
    np.testing.assert_allclose(of_keras.kld(np.array([[0, 1]]), np.array([[0, 1]])), 0, atol=1e-6)
    with pytest.raises(TypeError, match="must be real"):
        of_keras.kld(PROBS, PROBS * 1j)


def test_keras_class_casts():
    assert of_keras.KLDivergence()(PROBS, PROBS).dtype == F32
    assert of_keras.KLDivergence(dtype="float64")(PROBS.astype(F32), PROBS).dtype == F64
    with pytest.raises(ValueError, match="dtype must be one of"):
        of_keras.KLDivergence(dtype="int32")


@pytest.mark.parametrize("reduction", ["auto", "batchmean", "SUM", 1])
def test_keras_unknown_reductions(reduction):
    with pytest.raises(ValueError, match="reduction must be one of"):
        of_keras.KLDivergence(reduction=reduction)


def test_keras_weights_that_do_not_fit():
    loss = of_keras.KLDivergence()
    for shape in ((2,), (4, 5), (3, 4)):
        with pytest.raises(ValueError, match="must be equal or broadcast"):
            loss(PROBS, PROBS, np.ones(shape))


def test_keras_weight_of_zero():
    """The value is the original's; the gradient of a row that does not count is 0."""
    y_pred = PROBS[0].copy()
    y_pred[1] = np.nan
    weight = np.array([1.0, 0.0, 1.0])
    loss = of_keras.KLDivergence("none", dtype="float64")
    value, (_, d_pred) = loss.value_and_grad(PROBS[0], y_pred, weight)
    np.testing.assert_array_equal(np.isnan(value), [False, True, False])
    np.testing.assert_array_equal(d_pred[1], 0)
    assert of_keras.KLDivergence("mean_with_sample_weight")(PROBS[0], PROBS[0], np.zeros(3)) == 0


@pytest.mark.parametrize("loaded", [False, True])
def test_keras_config(loaded, request):
    keras = request.getfixturevalue("keras") if loaded else None
    loss = of_keras.KLDivergence("sum", name="kl", dtype="float64")
    assert loss.get_config() == {"name": "kl", "reduction": "sum"}
    for other in (
        of_keras.KLDivergence.from_config(loss.get_config()),
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
    ):
        assert isinstance(other, of_keras.KLDivergence)
        assert other.get_config() == loss.get_config()
        assert not loaded or isinstance(other, keras.losses.Loss)
    assert pickle.loads(pickle.dumps(loss)).dtype == "float64"
    metric = of_keras.KLDivergenceMetric("kl")
    assert metric.get_config() == {"name": "kl", "dtype": "float32"}
    assert of_keras.KLDivergenceMetric.from_config(metric.get_config()).name == "kl"
    if loaded:
        again = keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(loss), custom_objects={"KLDivergence": of_keras.KLDivergence}
        )
        assert isinstance(again, of_keras.KLDivergence)
        assert again.get_config() == loss.get_config()


def test_keras_policy():
    class Policy:
        compute_dtype = "float16"

    assert of_keras.KLDivergence(dtype=Policy())(PROBS, PROBS).dtype == np.float16


@pytest.mark.parametrize("backend", ["torch", "jax", "tensorflow"])
def test_keras_trains(python, backend):
    """A model that learns by our losses, as functions and as objects, ends where Keras' own takes it."""
    needs("keras", backend)
    code = """
import numpy as np, keras
from klcore.compat import keras as ours
rng = np.random.default_rng(0)
x, y = rng.normal(size=(32, 6)).astype("float32"), rng.dirichlet(np.ones(4), 32).astype("float32")
weight = rng.uniform(0.5, 2, 32).astype("float32")

def train(loss, metric):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.layers.Dense(8, "tanh"), keras.layers.Dense(4, "softmax")])
    model.compile(loss=loss, optimizer=keras.optimizers.SGD(0.1), metrics=[metric], weighted_metrics=[])
    history = model.fit(x, y, sample_weight=weight, batch_size=8, epochs=2, verbose=0, shuffle=False).history
    found = model.evaluate(x, y, verbose=0)
    return [w.tolist() for w in model.get_weights()], list(history.values()), found

class Subclass(ours.KLDivergence):
    def call(self, y_true, y_pred):
        return 0.5 * super().call(y_true, y_pred) + 0.5 * super().call(y_true, y_pred)

class Metric(ours.KLDivergenceMetric):
    pass

theirs = train(keras.losses.KLDivergence(), keras.metrics.KLDivergence())
for loss, metric in (
    (ours.kullback_leibler_divergence, ours.KLDivergenceMetric()), (ours.KLDivergence(), ours.KLDivergenceMetric()),
    (Subclass(), Metric()),
):
    mine = train(loss, metric)
    for a, b in zip(keras.tree.flatten(theirs), keras.tree.flatten(mine), strict=True):
        assert abs(a - b) <= 1e-5 * max(1, abs(a)), (loss, a, b)
total = train(ours.KLDivergence(reduction="sum"), ours.KLDivergenceMetric())
assert total[0] != mine[0]
print("trained")
"""
    assert python(code, KERAS_BACKEND=backend, warnings="ignore").strip().endswith("trained")


SAVED = """
import sys, keras, numpy as np
from klcore.compat import keras as ours
x = np.ones((4, 3), "float32")
for loss in (ours.KLDivergence("sum"), ours.kl_divergence, ours.kullback_leibler_divergence):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, "softmax")])
    model.compile(loss=loss, metrics=[ours.KLDivergenceMetric()])
    model.evaluate(x, x / 3, verbose=0)
    model.save(sys.argv[1])
    loaded = keras.models.load_model(sys.argv[1])
    assert type(loaded.loss) is type(loss) and "klcore" in type(loaded.loss).__module__ + str(loaded.loss.__module__)
    assert loaded.evaluate(x, x / 3, verbose=0) == model.evaluate(x, x / 3, verbose=0)
print("loaded")
"""


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_keras_saved_models(python, tmp_path, backend):
    needs("keras", backend)
    code = SAVED.replace("sys.argv[1]", repr(str(tmp_path / "model.keras")))
    assert python(code, KERAS_BACKEND=backend, warnings="ignore").strip().endswith("loaded")


def test_keras_copies_of_metrics(keras):
    metric = of_keras.KLDivergenceMetric()
    metric.update_state(PROBS, np.exp(LOG_PROBS))
    for same in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert isinstance(same, keras.metrics.Metric)
        assert float(same.result()) == float(metric.result()) > 0


def test_keras_divisor_of_zero_hides_nan():
    loss = of_keras.KLDivergence("mean_with_sample_weight")
    assert loss(np.array([[np.nan, 1]]), np.array([[0.5, 0.5]]), np.zeros(1)) == 0


def test_keras_masks_of_tensors(keras):
    """As Keras attaches them in a model."""
    torch = pytest.importorskip("torch", reason="not run: PyTorch is not installed")
    if keras.config.backend() != "torch":
        pytest.skip(f"not run: Keras computes with {keras.config.backend()} here")
    y_true, y_pred = (torch.tensor(a, dtype=torch.float32) for a in (PROBS, np.exp(LOG_PROBS)))
    y_pred._keras_mask = torch.tensor(RNG.uniform(size=(4, 3)) < 0.5)
    for weight in (None, np.full((4, 3), 0.5, F32)):
        for reduction in ("sum_over_batch_size", "sum", "none"):
            expected = keras.losses.KLDivergence(reduction)(y_true, y_pred, weight)
            found = of_keras.KLDivergence(reduction)(PROBS, y_pred, weight)  # the truth as the data has it
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ---- behaviour: MXNet ------------------------------------------------------------------------------------------------


def test_mxnet_repr_and_words():
    assert repr(mxnet.KLDivLoss(weight=2.0, batch_axis=1)) == "KLDivLoss(batch_axis=1, w=2.0)"
    with pytest.raises(ValueError, match="nonbatch must be"):
        mxnet.KLDivLoss(nonbatch="max")
    with pytest.raises(TypeError):
        mxnet.KLDivLoss()(LOG_PROBS, label=PROBS)


@pytest.mark.parametrize(
    ("words", "arguments", "error", "message"),
    [
        ({}, (LOG_PROBS.tolist(), PROBS), TypeError, "pred must be an array"),
        ({}, (LOG_PROBS.astype(int), PROBS.astype(int)), TypeError, "must have dtype float16"),
        ({}, (np.array(-1.0), np.array(0.5)), ValueError, "batch axis"),
        ({"batch_axis": 3}, (LOG_PROBS, PROBS), ValueError, "batch_axis must be in"),
        ({"batch_axis": None}, (LOG_PROBS, PROBS), TypeError, "batch_axis must be an integer"),
        ({"batch_axis": (0, 1)}, (LOG_PROBS, PROBS), TypeError, "batch_axis must be an integer"),
        ({"from_logits": 0, "axis": -4}, (LOG_PROBS, PROBS), ValueError, "axis must be in"),
        ({}, (LOG_PROBS, PROBS, np.ones(4)), ValueError, "must be equal or broadcast"),
        ({"weight": "1"}, (LOG_PROBS, PROBS), AssertionError, "weight must be a number"),
    ],
)
def test_mxnet_refuses(words, arguments, error, message):
    with pytest.raises(error, match=message):
        mxnet.KLDivLoss(**words)(*arguments)


def test_mxnet_empty():
    assert mxnet.KLDivLoss()(np.ones((0, 3)), np.ones((0, 3))).shape == (0,)
    np.testing.assert_array_equal(mxnet.KLDivLoss()(np.ones((2, 0)), np.ones((2, 0))), [np.nan] * 2)
    np.testing.assert_array_equal(mxnet.KLDivLoss(nonbatch="sum")(np.ones((2, 0)), np.ones((2, 0))), [0.0] * 2)


@pytest.mark.parametrize("weight", [2, 0.5, True, np.float32(2), -1.5, 0, 0.0, np.nan])
@pytest.mark.parametrize("from_logits", [True, False])
def test_mxnet_weight_multiplies(weight, from_logits):
    plain, weighted = (mxnet.KLDivLoss(from_logits, weight=w) for w in (None, weight))
    for a, b in zip(plain.value_and_grad(LOGITS, PROBS), weighted.value_and_grad(LOGITS, PROBS), strict=True):
        np.testing.assert_allclose(np.asarray(b), np.asarray(a) * float(weight), rtol=1e-14)


def test_mxnet_weight_of_zero_keeps_nan():
    pred = np.array([[-np.inf, 0.0], [-1.0, -1.0]])
    label = np.array([[1.0, 0.0], [0.5, 0.5]])
    np.testing.assert_array_equal(mxnet.KLDivLoss(weight=0.0)(pred, label), [np.nan, 0.0])
    np.testing.assert_array_equal(mxnet.KLDivLoss()(pred, label, np.array([[0.0], [0.0]])), [np.nan, 0.0])


@pytest.mark.parametrize(("words", "shape"), [({}, (4, 1, 1)), ({"batch_axis": 1}, (1, 3, 1)), ({}, (1,)),
                                              ({"from_logits": False}, (4, 1, 1)), ({}, None)])  # fmt: skip
def test_mxnet_needs_no_array_of_terms(words, shape, monkeypatch):
    """Where one weight holds for a sample."""
    calls = []
    engine = mxnet.loss
    monkeypatch.setattr(mxnet, "loss", lambda *a, **k: calls.append(k["reduction"]) or engine(*a, **k))
    loss = mxnet.KLDivLoss(**words)
    weights = () if shape is None else (RNG.uniform(size=shape),)
    value = loss(LOGITS, PROBS, *weights)
    assert calls == ["row"]
    if shape is not None:
        np.testing.assert_allclose(value, loss(LOGITS, PROBS, np.broadcast_to(weights[0], PROBS.shape)), rtol=1e-13)
        assert calls[1:] == ["none"]


# ---- behaviour: PuzzleLib --------------------------------------------------------------------------------------------

SCORES, TARGETS = LOGITS.astype(F32), (PROBS / 3).astype(F32)


def test_puzzlelib_state():
    cost = puzzlelib.KLDivergence()
    with pytest.warns(RuntimeWarning, match="no batch yet"):
        assert np.isnan(cost.getError())
    with pytest.warns(RuntimeWarning, match="no batch yet"):
        assert np.isnan(cost.getMeanError())
    cost.validate(SCORES, TARGETS)
    assert (cost.error is None or np.isnan(cost.error), cost.grad, cost.batchsize) == (True, None, 0)
    grad = cost(SCORES, TARGETS, queryError=False)
    assert grad is cost.grad
    assert cost.dirty
    assert cost.getError() == pytest.approx(cost.valError, rel=1e-6)
    assert not cost.dirty
    first = cost.error
    error, _ = cost(SCORES[:1], TARGETS[:1])
    assert (cost.batchsize, cost.numOfSamples) == (1, 5)
    assert cost.getMeanError() == pytest.approx((4 * first + error) / 5, rel=1e-6)
    cost.resetAccumulator()
    assert (cost.accumErr, cost.batchsize, cost.numOfSamples) == (0, 0, 0)
    before = dict(vars(cost))
    cost.value_and_grad(SCORES, TARGETS)
    assert vars(cost) == before


def test_puzzlelib_softmax_spans_all_axes():
    for shape in ((4, 15), (4, 5, 3), (4, 3, 5, 1)):
        error, grad = puzzlelib.KLDivergence()(SCORES.reshape(shape), TARGETS.reshape(shape))
        assert grad.shape == shape
        assert error == pytest.approx(puzzlelib.KLDivergence()(SCORES, TARGETS)[0], rel=1e-6)


def test_puzzlelib_gradient_descends_where_targets_sum_to_one():
    _, (grad,) = puzzlelib.KLDivergence().value_and_grad(SCORES, TARGETS, cotangent=4.0)
    scores = LOGITS.reshape(4, 15)
    softmax = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(grad.reshape(4, 15), TARGETS.reshape(4, 15) - softmax, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "pred", "target", "error"),
    [
        ({"maxlabels": 3}, ones(4), ones(4), IndexError),
        ({}, np.float32(1), np.float32(1), IndexError),
        ({}, np.ones((2, 3), np.int32), ones(2, 3), TypeError),
        ({}, np.ones((2, 3), np.float16), ones(2, 3), KeyError),
        ({"normTarget": True}, ones(2, 3), np.ones((2, 3), np.int32), TypeError),
        ({}, ones(2, 3), [[1.0]], AttributeError),
    ],
)
def test_puzzlelib_refuses(words, pred, target, error):
    with pytest.raises(error):
        puzzlelib.KLDivergence(**words)(pred, target)


def test_puzzlelib_no_classes():
    error, grad = puzzlelib.KLDivergence()(ones(2, 0), ones(2, 0))
    assert error == 0
    assert grad.shape == (2, 0)
    assert puzzlelib.KLDivergence(maxlabels=0)(ones(2, 3), ones(2, 3))[1].shape == (2, 3)
