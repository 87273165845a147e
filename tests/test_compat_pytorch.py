"""klcore.compat.pytorch and rtorch: compared with what PyTorch and R torch returned (golden.py), and behaviour."""

import contextlib
import copy
import math
import pickle
import warnings

import numpy as np
import oracle
import pytest
from conftest import DTYPES
from golden import F32, F64, HALF, LOG_PROBS, PROBS, check, check_error, each, ones, quiet, run, runs

from klcore.compat import pytorch, rtorch

# ---- PyTorch: values -------------------------------------------------------------------------------------------------

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


@each("noncontig", "pytorch")
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


@each("legacy", "pytorch")
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


@each("double_backward", "pytorch")
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


# ---- PyTorch: behaviour ----------------------------------------------------------------------------------------------

ERRORS = {
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
    # R torch
    "log_target_fn": lambda: rtorch.nnf_kl_div(HALF, HALF, "sum", log_target=True),
    "reduction_null": lambda: rtorch.nnf_kl_div(HALF, HALF, None),
}


@each("error", "pytorch", "r_torch")
def test_errors(case, compared):
    classes = {"log_target_fn": TypeError, "reduction_null": ValueError}
    taken = ("numpy", "module_ctor_bogus")  # PyTorch accepts the second too
    check_error(case, ERRORS, compared, classes, taken)


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


@pytest.mark.parametrize("function", [pytorch.kl_div, pytorch.KLDivLoss(), rtorch.nnf_kl_div, rtorch.nn_kl_div_loss()])
def test_torch_compile_drops_warnings(function):
    """As it does those of PyTorch's own loss: it has no way to follow them."""
    torch = pytest.importorskip("torch", reason="not run: PyTorch is not installed")
    inputs = [torch.from_numpy(a.copy()) for a in (LOG_PROBS, PROBS)]
    with quiet():
        found = torch.compile(lambda x, y: function(x, y), backend="eager", fullgraph=True)(*inputs)
        assert torch.equal(found, function(*inputs))


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


@pytest.mark.parametrize("function", [pytorch.kl_div, pytorch.KLDivLoss()])
def test_pytorch_warns_as_python_does(function):
    assert count_warnings("always", function) == 3
    assert count_warnings("default", function) == 1


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


@each("unknown_reduction", "r_torch")
def test_rtorch_deviation_unknown_reductions_raise(case):
    """In R they are silently "none"."""
    for attempt in (rtorch.nn_kl_div_loss, lambda word: rtorch.nnf_kl_div(case["input"], case["target"], word)):
        with pytest.raises(ValueError, match="reduction must be"):
            attempt(case.params["reduction"])


@pytest.mark.parametrize(
    "function", [rtorch.nnf_kl_div, rtorch.nn_kl_div_loss(), rtorch.nn_kl_div_loss().value_and_grad]
)
def test_rtorch_warns_at_every_call(function):
    assert count_warnings("default", function) == 3  # where Python shows others once
    assert count_warnings("ignore", function) == 0
    with pytest.raises(UserWarning, match="batchmean"):
        count_warnings("error", function)


def test_rtorch_has_no_log_target():
    loss = rtorch.nn_kl_div_loss(reduction="none")
    assert loss.reduction == "none"
    assert loss(LOG_PROBS, PROBS).shape == PROBS.shape
    with pytest.raises(TypeError):
        rtorch.nn_kl_div_loss(log_target=True)
    with pytest.raises(ValueError, match="batch axis"):
        rtorch.nnf_kl_div(np.array(-1.0), np.array(0.5), "batchmean")
