"""What PyTorch's compilers and transforms are promised beyond test_torch.py: numbers that are data of a program, one
gradient on every road, exported programs for any size.
"""

import itertools
import logging
import warnings

import pytest
from test_torch import FLOATS, compiled, kl, logits  # noqa: F401  # `compiled` is a fixture

import klcore
from klcore.operations import OPERATIONS

torch = pytest.importorskip("torch", reason="no PyTorch: its adapter is not tested")

TOTALS = ("sum", "rowmean", "batchmean", "mean")


def value_of(name, x, y, **options):
    """Of any operation, from logits."""
    both = (x,) if OPERATIONS[name].single else (x, y)
    return getattr(klcore, name)(*both, space="logits", **{**OPERATIONS[name].needed, **options})


def value_and_gradients(function, *tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves, allow_unused=True)


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ---- temperature -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("reduction", ["row", "rowmean"])
def test_compile_for_any_temperature(compiled, of, reduction):  # noqa: F811
    """A second program at most, for all numbers; its gradients have eager bits."""

    def loss(x, y, temperature):
        return kl(x, y, reduction, temperature=temperature)

    x, y = (logits(3, 20, seed=i, dtype=torch.float32) for i in range(2))
    both = compiled(loss)
    for step in range(5):
        temperature = of(2 - 0.25 * step)
        found = value_and_gradients(lambda x, y, t=temperature: both(x, y, t), x, y)
        equal(found, value_and_gradients(lambda x, y, t=temperature: loss(x, y, float(t)), x, y))
    assert both.counter.frame_count <= 2


@pytest.mark.parametrize("name", OPERATIONS)
def test_export_for_any_temperature(name):
    """A tensor is an input of the program, which has one operator."""

    class Loss(torch.nn.Module):
        def forward(self, x, y, temperature):
            return value_of(name, x, y, temperature=temperature)

    x, y = logits(3, 5), logits(3, 5, seed=1)
    exported = torch.export.export(Loss(), (x, y, torch.tensor(2.0)))
    for temperature in (0.5, 3.0):
        equal(exported.module()(x, y, torch.tensor(temperature)), value_of(name, x, y, temperature=temperature))
    assert [n.target for n in exported.graph.nodes if n.op == "call_function"] == [torch.ops.klcore.value.default]


@pytest.mark.parametrize("transform", ["eager", "vmap", "compile"])
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_that_are_none(compiled, transform, bad):  # noqa: F811
    """Are refused when the program runs, in NumPy's words."""

    def loss(x, temperature):
        return kl(x, x, temperature=temperature)

    call = {"eager": loss, "compile": compiled(loss), "vmap": lambda x, t: torch.func.vmap(loss, (0, None))(x, t)}
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        call[transform](logits(2, 2, 3), torch.tensor(bad))


def test_temperature_of_probabilities_within_a_program(compiled):  # noqa: F811
    for kind in (float, torch.tensor):
        loss = compiled(lambda x, t: klcore.kl_div(x, x, temperature=t), fullgraph=False)
        with pytest.raises(ValueError, match="temperature divides logits: it needs space='logits'"):
            loss(torch.rand(2, 3), kind(2.0))


def test_a_temperature_that_changes_before_backward():
    x, y = logits(2, 3, requires_grad=True), logits(2, 3)
    temperature = torch.tensor(2.0)
    value = kl(x, y, "row", temperature=temperature)
    temperature.mul_(5)
    value.sum().backward()
    equal(x.grad, kl(x, y, temperature=2.0, return_grad="x")[1])


# ---- one gradient, whichever road leads to it ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", TOTALS)
def test_bits_of_a_multiple(compiled, reduction, dtype):  # noqa: F811
    """Of the first backward, of a second one, of create_graph, of the compiler, of torch.func, of a checkpoint."""
    x, y = (logits(3, 2, 50, seed=i, dtype=dtype) for i in range(2))

    def loss(y):
        return 0.37 * kl(x, y, reduction, temperature=1.5)

    leaf = y.clone().requires_grad_()
    value = loss(leaf)
    (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
    (with_history,) = torch.autograd.grad(value, leaf, create_graph=True, retain_graph=True)
    (second,) = torch.autograd.grad(value, leaf)
    roads = {"second": second, "create_graph": with_history.detach(), "func": torch.func.grad(loss)(y)}
    roads["compiled"] = value_and_gradients(compiled(loss), y)[1]
    for reentrant in (False, True):
        again = torch.utils.checkpoint.checkpoint(loss, leaf, use_reentrant=reentrant)
        again.backward()  # a reentrant one insists on it
        roads[f"checkpoint {reentrant}"], leaf.grad = leaf.grad, None
    assert [name for name, g in roads.items() if not torch.equal(g, first)] == []


# ---- torch.export ----------------------------------------------------------------------------------------------------


def _losses():
    """By name, functions of two arrays of logits."""
    from klcore.compat import keras, liger, mxnet, puzzlelib, pytorch, rtorch, trl

    def log(t):
        return t.log_softmax(-1)

    def probs(t):
        return t.softmax(-1)

    def labels(t):
        return -100 * (t[:, 0] > 0)

    def metric(x, y):
        mean = keras.KLDivergenceMetric()
        mean.update_state(probs(x), probs(y))
        mean.update_state(probs(x), probs(y), x[:, 0].exp())
        return mean.result()

    yield "pytorch's arguments", lambda x, y: pytorch.kl_div(log(y), probs(x), size_average=True)
    yield "keras metric", metric
    yield "mxnet scores", lambda x, y: mxnet.KLDivLoss(from_logits=False, weight=2.0)(y, probs(x))
    yield "mxnet axis", lambda x, y: mxnet.KLDivLoss(batch_axis=1)(log(y), probs(x))
    yield "mxnet weights", lambda x, y: mxnet.KLDivLoss(nonbatch="sum")(log(y), probs(x), x[:, :1])
    yield "puzzlelib", lambda x, y: puzzlelib.KLDivergence()(y.float(), probs(x.float()))
    yield "puzzlelib scores", lambda x, y: puzzlelib.KLDivergence(normTarget=True)(y.float(), x.float())
    yield "liger_jsd", lambda x, y: liger.liger_jsd(log(y), log(x), labels(x), 0.3)
    yield "kl_estimate", lambda x, y: klcore.kl_estimate(x[:, 0], y[:, 0], reduction="mean", weights=y[:, 1] > 0)
    yield "gradients", lambda x, y: kl(x, y, "mean", return_grad=("x", "y"))
    for r in ("mean", "batchmean", "sum", "none"):
        yield f"pytorch {r}", lambda x, y, r=r: pytorch.KLDivLoss(reduction=r, log_target=True)(log(y), log(x))
        yield f"rtorch {r}", lambda x, y, r=r: rtorch.nnf_kl_div(log(y), probs(x), r)
        yield f"liger_kl_div {r}", lambda x, y, r=r: liger.liger_kl_div(log(y), probs(x), reduction=r)
        yield f"liger_tvd {r}", lambda x, y, r=r: liger.liger_tvd(probs(y), probs(x), labels(x), reduction=r)
        yield f"trl {r}", lambda x, y, r=r: trl.generalized_jsd_loss(y, x, reduction=r, temperature=2.0)
    for r in ("sum_over_batch_size", "mean_with_sample_weight", None):
        yield f"keras {r}", lambda x, y, r=r: keras.KLDivergence(reduction=r)(probs(x), probs(y))
        yield f"keras {r} weights", lambda x, y, r=r: keras.KLDivergence(reduction=r)(probs(x), probs(y), x[:, 0].exp())
    for name, r in itertools.product(OPERATIONS, ("row", "rowmean", "batchmean", "mean")):
        yield f"{name} {r}", lambda x, y, name=name, r=r: value_of(name, x, y, reduction=r)


@pytest.fixture
def silent(monkeypatch):
    """torch.export logs what it fails at, and some losses warn of their means."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("named", list(_losses()), ids=lambda named: named[0])
def test_export_for_any_size(silent, named):
    """Of rows and of classes."""
    _, loss = named

    class Loss(torch.nn.Module):
        def forward(self, x, y):
            return loss(x, y)

    sizes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("classes")}
    exported = torch.export.export(Loss(), (logits(3, 5), logits(3, 5)), dynamic_shapes=(sizes, sizes))
    x, y = logits(7, 6), logits(7, 6, seed=1)
    equal(exported.module()(x, y), loss(x, y))
