"""What five systems returned (tests/golden/), and how the modules of klcore.compat are compared with them.

Every case of the files is run with NumPy arrays, and some of the cases on the emulated or real GPU and with PyTorch and
JAX arrays. Cases that are not run, and cases where klcore differs on purpose, are named with the reason: NOT_RUN, the
tests called deviation, and comments that begin with that word.
"""

import builtins
import contextlib
import importlib
import json
import pathlib
import warnings

import numpy as np
import oracle
import pytest
from conftest import DEVICES

# ---- the files -------------------------------------------------------------------------------------------------------

GOLDEN = pathlib.Path(__file__).with_name("golden")
SHORT = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64"}


class Case:
    """One case of a file: the arguments of the call, and the arrays by name."""

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
        """The dtype of an array; bfloat16 is stored as float32."""
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

# the families that have values to compare with; OWN_TESTS have tests of their own
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


def values(system):
    """The cases that have a value."""
    return [c for c in CASES[system] if c.family in FAMILIES[system] and not c.error]


def each(family, *systems):
    """Parametrize a test over the cases of a family."""
    return pytest.mark.parametrize("case", [c for s in systems for c in CASES[s] if c.family == family], ids=repr)


# ---- the comparison --------------------------------------------------------------------------------------------------


def small(case):
    """Whether it is one of the few ordinary cases that use every kernel of a front-end, for slow runs."""
    shapes = ("/4x5/", "/2x3x4/", "/3x7/")
    return case.family in ("grid", "func", "class") and "f64" not in case.id and any(s in case.id for s in shapes)


def few(cases):
    """One case of each set of options, whatever the numbers are."""
    found = {}
    for case in cases:
        key = json.dumps({k: v for k, v in case.params.items() if k != "kind"}, sort_keys=True)
        found.setdefault(key, case)
    return list(found.values())


def runs(*systems):
    """Parametrize a test over (arrays, case): all cases with NumPy, some of them elsewhere."""
    pairs = []
    for system in systems:
        for name in [*DEVICES, "torch", "jax"]:
            cases = values(system)
            if name not in ("cpu", "torch"):  # only these arrays can carry a mask without Keras
                cases = [c for c in cases if c.family != "mask"]
            if name == "jax":  # it has no float64 unless the whole process does
                cases = [c for c in cases if {a.dtype.name for a in map(c.__getitem__, c.names)} <= {"float32", "bool"}]
            elif name == "emulated":
                weighted = [c for c in cases if c.family == "sample_weight" and "f32" in c.id]
                cases = [*(few(filter(small, cases)) or cases[:3]), *weighted[:4]]
            if system == "puzzlelib" and name in ("torch", "jax"):
                continue  # PuzzleLib's users have neither
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
    """Ignore a system's warnings; other tests check that they are raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def gradients_of(function, inputs, value, cotangent, arrays, count):
    """The first `count` gradients, by value_and_grad and by the library's own automatic differentiation."""
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
    """Compare value and gradients of a case with what the system returned. `inputs`: names, in the call's order."""
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


def check_error(case, attempts, compared, classes=None, taken=()):
    """A call raises the system's exception; `classes` replaces those that only the system has, by case.

    klcore accepts the calls in `taken`.
    """
    name = case.id.removeprefix("error/")
    if name in taken:
        attempts[name]()
    else:
        error = getattr(builtins, case.error, None) or classes[name]
        with pytest.raises(error):
            attempts[name]()
    compared[f"golden errors of {case.system} raised"] += 1


# ---- inputs of other tests -------------------------------------------------------------------------------------------

F32, F64 = np.float32, np.float64
HALF = np.full((2, 3), 0.5)
RNG = np.random.default_rng(5)
LOGITS = RNG.normal(size=(4, 3, 5))
LOG_PROBS = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
PROBS = RNG.dirichlet(np.ones(5), (4, 3))


def ones(*shape):
    return np.ones(shape, F32)
