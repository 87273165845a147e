"""What PyTorch's compilers and transforms are promised beyond test_torch.py: numbers that are inputs of a program, the
same gradient in every way of computing it, exported programs for any size.
"""

import importlib
import itertools
import logging
import math
import pickle
import warnings

import numpy as np
import pytest
from test_torch import FLOATS, compiled, kl, logits  # noqa: F401  # `compiled` is a fixture

import klcore
from klcore.operations import LOSSES, OPERATIONS

torch = pytest.importorskip("torch", reason="no PyTorch: its adapter is not tested")
cpu = importlib.import_module("klcore.backends.cpu")

TOTALS = ("sum", "rowmean", "batchmean", "mean")


def value_of(name, x, y, **options):
    """The value of any operation, from logits."""
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
    """At most a second program, for all numbers; its gradients have eager bits."""

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
    """A tensor is an input of the program, which has a single operator."""

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
    """They are refused when the program runs, in NumPy's words."""

    def loss(x, temperature):
        return kl(x, x, temperature=temperature)

    call = {"eager": loss, "compile": compiled(loss), "vmap": lambda x, t: torch.func.vmap(loss, (0, None))(x, t)}
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        call[transform](logits(2, 2, 3), torch.tensor(bad))


def test_temperature_of_probabilities_within_a_program(compiled):  # noqa: F811
    for kind in (float, torch.tensor):
        loss = compiled(lambda x, t: klcore.kl_div(x, x, temperature=t), fullgraph=False)
        with pytest.raises(ValueError, match="temperature divides logits, so it needs space='logits'"):
            loss(torch.rand(2, 3), kind(2.0))


def test_a_temperature_that_changes_before_backward():
    x, y = logits(2, 3, requires_grad=True), logits(2, 3)
    temperature = torch.tensor(2.0)
    value = kl(x, y, "row", temperature=temperature)
    temperature.mul_(5)
    value.sum().backward()
    equal(x.grad, kl(x, y, temperature=2.0, return_grad="x")[1])


def test_an_array_that_changes_before_the_temperatures_backward():
    x, y, t = logits(2, 3), logits(2, 3, seed=1), torch.tensor(2.0, requires_grad=True)
    expected = torch.autograd.grad(kl(x, y, "row", temperature=t).sum(), t)
    array = x.clone().numpy()
    value = kl(array, y, "row", temperature=t)
    array[...] = 5.0
    equal(torch.autograd.grad(value.sum(), t), expected)


@pytest.mark.parametrize("shape", [(4, 3), (3,), (4, 1), (1,)], ids=str)
def test_a_temperature_a_row(compiled, shape):  # noqa: F811
    """Each row as with its own number, whoever calls."""
    x, y = (logits(4, 3, 7, seed=i, dtype=torch.float32) for i in range(2))
    temperature = torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.5
    of_rows = temperature.expand(4, 3).reshape(-1).tolist()
    alone = [
        value_and_gradients(lambda x, y, t=t: kl(x, y, "row", temperature=t), *pair)
        for *pair, t in zip(x.reshape(-1, 7), y.reshape(-1, 7), of_rows, strict=True)
    ]
    expected = [torch.stack(a) for a in zip(*alone, strict=True)]
    expected = [a.reshape(4, 3, *a.shape[1:]) for a in expected]

    def loss(x, y):
        return kl(x, y, "row", temperature=temperature)

    for function in (loss, compiled(loss)):
        for found, e in zip(value_and_gradients(function, x, y), expected, strict=True):
            equal(found, e)
    by_example = torch.func.vmap(lambda x, y, t: kl(x, y, "row", temperature=t))
    equal(by_example(x, y, temperature.expand(4, 3)), expected[0])


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradient_of_a_temperature(name):
    x, y = logits(2, 3, 5), logits(2, 3, 5, seed=1)
    temperature = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    for reduction in ("row", "rowmean"):
        assert torch.autograd.gradcheck(
            lambda t, r=reduction: value_of(name, x, y, temperature=t, reduction=r), temperature
        )


@pytest.mark.parametrize("shapes", [((2, 3, 5), (2, 3, 5)), ((5,), (2, 3, 5)), ((2, 1, 5), (3, 5))], ids=str)
@pytest.mark.parametrize("space", ["logits", ("probs", "logits"), ("logits", "log_probs")], ids=str)
@pytest.mark.parametrize("shape", [(), (2, 3), (3,)], ids=str)
def test_gradient_of_temperatures(shape, space, shapes):
    """One for all, one per row; with operands that rows share, whose own gradients do not change."""
    x, y = (logits(*s, seed=i, requires_grad=True) for i, s in enumerate(shapes))
    temperature = torch.linspace(0.5, 2, math.prod(shape), dtype=torch.float64).reshape(shape).requires_grad_()

    def loss(x, y, t):
        x = x.softmax(-1) if space[0] == "probs" else x
        y = y.log_softmax(-1) if space[1] == "log_probs" else y
        return klcore.kl_div(x, y, space=space, temperature=t, reduction="sum")

    assert torch.autograd.gradcheck(loss, (x, y, temperature))
    found = torch.func.grad(loss, argnums=2)(x, y, temperature)
    torch.testing.assert_close(found, torch.autograd.grad(loss(x, y, temperature), temperature)[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_of_a_temperature_beside_pytorchs(compiled, dtype):  # noqa: F811
    """A common offset does not drown it; masked classes, and rows that are left out, do not affect it."""
    x, y = logits(4, 50, dtype=dtype), logits(4, 50, seed=1, dtype=dtype)
    y[0] += 64
    x[:, :5] = y[:, :5] = float("-inf")
    x[3] = float("nan")
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])

    def loss(t):
        return kl(x, y, weights=weights, temperature=t)

    def of_pytorch(t):
        p, q = ((a[:3, 5:].double() / t).log_softmax(-1) for a in (x, y))
        return torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)

    t = torch.tensor(2.0, requires_grad=True)
    expected = torch.autograd.grad(of_pytorch(t), t)
    for function in (loss, compiled(loss)):
        found = torch.autograd.grad(function(t), t)
        rough = {"rtol": 3e-2, "atol": 1e-3} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(found, expected, **rough)
    with pytest.raises(RuntimeError, match="a second derivative was requested"):
        torch.autograd.grad(torch.autograd.grad(loss(t), t, create_graph=True), t)


def test_gradients_of_temperatures_are_those_of_the_call():
    """The axis refers to the broadcast shape, nothing is broadcast over the classes, and the result has the shape of
    its argument, although the temperature requires a gradient."""
    x, y = logits(5), logits(4, 5, seed=1)
    of_rows = torch.linspace(0.5, 2, 4, dtype=torch.float64).requires_grad_()
    for t in (of_rows, torch.tensor(1.3, dtype=torch.float64, requires_grad=True)):
        expected = torch.autograd.grad(kl(x.expand(4, 5), y, temperature=t), t)
        equal(torch.autograd.grad(kl(x, y, temperature=t, axis=1), t), expected)
        found = kl(x, y, temperature=t, return_grad=("x", "y"))
        equal(found, kl(x, y, temperature=t.detach(), return_grad=("x", "y")))
        with pytest.raises(ValueError, match="the same number of classes"):
            kl(y[:, :1], y, temperature=t)
        with pytest.raises(ValueError, match="must have batch shapes"):
            kl(y[:3], y, temperature=t)
    empty = logits(4, 0)
    equal(torch.autograd.grad(kl(empty, empty, temperature=of_rows), of_rows), (torch.zeros_like(of_rows),))


def test_gradient_of_a_temperature_of_a_row_that_is_left_out():
    x, y = logits(3, 5), logits(3, 5, seed=1)
    t = torch.tensor([2.0, 0.0, float("nan")], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(kl(x, y, weights=torch.tensor([1.0, 0.0, 0.0]), temperature=t), t)
    assert found[0] != 0
    equal(found[1:], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("kind", [list, np.array], ids=["list", "array"])
def test_temperatures_of_other_kinds(compiled, kind):  # noqa: F811
    """As in eager mode, with their values at the time of the call: not those that its caller sets before backward."""
    x, y = logits(4, 5), logits(4, 5, seed=1)
    given = [0.1, 1.0, 2.0, 0.7]
    expected = value_and_gradients(lambda x: kl(x, y, "row", temperature=torch.tensor(given, dtype=torch.float64)), x)

    def loss(x):
        return kl(x, y, "row", temperature=kind(given))

    equal(value_and_gradients(compiled(loss), x), expected)
    equal(torch.func.vmap(loss)(x[None])[0], expected[0])
    temperature, x = kind(given), x.requires_grad_()
    value = kl(x, y, "row", temperature=temperature)
    temperature[0] = 5.0
    equal(torch.autograd.grad(value.sum(), x), expected[1:])


def test_labels_of_temperatures():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    weights, temperature = (pandas.Series([1.0, 2.0], index=index) for index in (["a", "b"], ["b", "a"]))
    with pytest.raises(ValueError, match="weights and axis 0 of temperature have different labels"):
        kl(logits(2, 5), logits(2, 5), weights=weights, temperature=temperature)


# ---- one gradient, in every way of computing it
# -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", TOTALS)
def test_bits_of_a_multiple(compiled, reduction, dtype):  # noqa: F811
    """For the first backward, a second one, create_graph, the compiler, torch.func, a checkpoint."""
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
        again.backward()  # a reentrant one requires it
        roads[f"checkpoint {reentrant}"], leaf.grad = leaf.grad, None
    assert [name for name, g in roads.items() if not torch.equal(g, first)] == []


def leaving_out(x, terms):
    return torch.where(x > 0, terms, 0)


@pytest.mark.parametrize(
    ("dtype", "zero"), [(torch.float32, 0.0), (torch.float64, -0.0), (torch.bfloat16, 0.0)], ids=str
)
@pytest.mark.parametrize("reduction", ["row", "none", "sum", "rowmean"])
def test_a_cotangent_of_zero(compiled, reduction, dtype, zero):  # noqa: F811
    """It gives 0, even for infinite derivatives: a coefficient that grows from 0, a term that torch.where drops."""
    x = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=dtype)
    y = torch.tensor([[0.2, 0.8], [0.5, 0.5]], dtype=dtype)

    def loss(x):
        value = klcore.kl_div(x, y, reduction=reduction)
        return (leaving_out(x, value) if reduction == "none" else zero * value).sum()

    dx = torch.log(x / y) * (reduction == "none")
    dx[1, 1] = 0
    for function in (loss, compiled(loss)):
        torch.testing.assert_close(value_and_gradients(function, x)[1], dx)
    torch.testing.assert_close(torch.func.grad(loss)(x), dx)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss), out_dims=0)(x[None]), dx[None])


@pytest.mark.parametrize("space", ["probs", "logits", "counts", ("probs", "logits")], ids=str)
def test_terms_that_are_dropped(space):
    """The infinite term of a class that y excludes does not affect the others."""
    x, y = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.5, 0.0])
    x = x.log() if space == "logits" else x
    y = y.log() if "logits" in space else y

    def loss(x, y):
        return klcore.kl_div(x, y, space=space, reduction="none")[:2].sum()

    found = value_and_gradients(loss, x, y)
    assert all(torch.isfinite(g).all() for g in found)
    near = y.clone()
    near[2] = -60.0 if "logits" in space else 1e-30
    for got, expected in zip(found, value_and_gradients(loss, x, near), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_other_systems_losses_and_a_cotangent_of_zero():
    from klcore.compat import keras, pytorch

    target, log_y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]).log()
    for reduction in ("sum", "batchmean", "none"):
        (dx,) = value_and_gradients(lambda x, r=reduction: 0.0 * pytorch.kl_div(log_y, x, reduction=r), target)[1:]
        equal(dx, torch.zeros(1, 2))
    equal(value_and_gradients(lambda x: 0.0 * keras.KLDivergence()(x, log_y.exp()), target)[1], torch.zeros(1, 2))


# ---- torch.func.vmap -------------------------------------------------------------------------------------------------


def of_examples(function, *batches):
    found = [function(*example) for example in zip(*batches, strict=True)]
    return tuple(map(torch.stack, zip(*found, strict=True))) if isinstance(found[0], tuple) else torch.stack(found)


def with_gradients(loss, count=2):
    """Value and gradients of 0.37 times the loss, within torch.func."""

    def both(*arguments):
        def scaled(*first):
            return 0.37 * loss(*first, *arguments[count:]).sum()

        gradients, value = torch.func.grad_and_value(scaled, argnums=tuple(range(count)))(*arguments[:count])
        return value, *gradients

    return both


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (300, 4), (1100, 2), ()], ids=str)
@pytest.mark.parametrize("reduction", ["row", "none", *TOTALS])
def test_bits_of_examples(reduction, shape, dtype):
    """The bits of each example alone, for a batch of gradients and for the gradient of a batch; with and without
    weights."""
    x, y = (logits(3, *shape, seed=i, dtype=dtype) for i in range(2))
    weights = torch.rand(3, *shape[:-1], generator=torch.Generator().manual_seed(2))
    weights[..., 1:2] *= weights.ndim < 2  # a row of weight 0

    def loss(x, y, w=None):
        return kl(x, y, reduction, weights=w)

    for batches in ((x, y), (x, y, weights)):
        equal(torch.func.vmap(loss)(*batches), of_examples(loss, *batches))
        expected = of_examples(with_gradients(loss), *batches)
        equal(torch.func.vmap(with_gradients(loss))(*batches), expected)
        found = with_gradients(lambda *b: torch.func.vmap(loss)(*b))(*batches)
        equal(found[1:], expected[1:])


@pytest.mark.parametrize("name", OPERATIONS)
def test_bits_of_examples_of_all_operations(name):
    x, y = logits(3, 2, 5, dtype=torch.float32), logits(3, 2, 5, dtype=torch.float32, seed=1)
    single = OPERATIONS[name].single
    arguments, count = ((x,), 1) if single else ((x, y), 2)

    def loss(x, y=None):
        return value_of(name, x, y, reduction="rowmean", temperature=2.0)

    equal(
        torch.func.vmap(with_gradients(loss, count))(*arguments), of_examples(with_gradients(loss, count), *arguments)
    )


@pytest.mark.parametrize("reduction", ["row", "sum", "none"])
@pytest.mark.parametrize(("term", "space"), [(name, pair) for name, o in LOSSES.items() for pair in o.pairs])
def test_bits_of_examples_of_losses(term, space, reduction):
    x, y = logits(3, 2, 5, dtype=torch.float32), logits(3, 2, 5, dtype=torch.float32, seed=1)
    x, y = (t.softmax(-1) if s == "probs" else t for t, s in zip((x, y), space, strict=True))
    factors = torch.tensor([[[0.5], [2.0]], [[0.0], [1.0]], [[-1.0], [3.0]]])

    def loss(x, y, factors=None, axis=1):
        return klcore.divergence.loss(
            term, x, y, space=space, reduction=reduction, factors=factors, denominator=3.0, epsilon=1e-7, axis=axis
        )

    function = loss if term == "puzzlelib" else with_gradients(loss)
    for batches in ((x, y), (x, y, factors)):
        equal(torch.func.vmap(function)(*batches), of_examples(function, *batches))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_bits_of_examples_of_estimates(reduction):
    x, y = logits(3, 2, 4).neg().exp().neg(), logits(3, 2, 4, seed=1).neg().exp().neg()
    weights, ratio = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1))

    def loss(x, y, w, r):
        return klcore.kl_estimate(x, y, reduction=reduction, weights=w, ratio=r)

    batches = (x, y, weights, ratio)
    equal(torch.func.vmap(with_gradients(loss))(*batches), of_examples(with_gradients(loss), *batches))


@pytest.mark.parametrize("scale", [1e-308, 1.0, 1e305])
def test_examples_with_weights_at_the_ends_of_the_range(scale):
    x, y = logits(3, 20, 5), logits(3, 20, 5, seed=1)
    weights = torch.arange(60.0, dtype=torch.float64).reshape(3, 20)
    weights[[0, 2]] *= scale
    for reduction in ("rowmean", "batchmean"):

        def loss(x, y, w, reduction=reduction):
            return kl(x, y, reduction, weights=w)

        equal(torch.func.vmap(with_gradients(loss))(x, y, weights), of_examples(with_gradients(loss), x, y, weights))


def test_examples_with_denominators_of_their_own():
    x, y, denominators = logits(4, 2, 3), logits(4, 2, 3, seed=1), torch.tensor([2.0, 0.7, 0.0, 3.0])

    def loss(x, y, d):
        return kl(x, y, denominator=d)

    for found, expected in zip(
        torch.func.vmap(with_gradients(loss))(x, y, denominators),
        of_examples(with_gradients(loss), x, y, denominators),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match=r"denominator must be finite and >= 0; found -1.0"):
        torch.func.vmap(loss)(x, y, -torch.ones(4))


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (1, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["row", "none", "mean"])
def test_examples_that_share_an_operand(reduction, dims):
    both = logits(4, 3, 5), logits(4, 3, 5, seed=1)
    x, y = (t[0] if d is None else t.movedim(0, d) for t, d in zip(both, dims, strict=True))
    loss = with_gradients(lambda x, y: kl(x, y, reduction))
    whole = (t.expand(4, 3, 5) if d is None else t.movedim(d, 0) for t, d in zip((x, y), dims, strict=True))
    equal(torch.func.vmap(loss, dims)(x, y), of_examples(loss, *whole))


@pytest.mark.parametrize("reduction", ["row", "none", "sum", "mean"])
def test_examples_within_which_an_operand_is_broadcast(reduction):
    x, y = logits(4, 5, dtype=torch.float32), logits(4, 3, 5, seed=1, dtype=torch.float32)
    loss = with_gradients(lambda x, y: kl(x, y, reduction))
    torch.testing.assert_close(torch.func.vmap(loss)(x, y), of_examples(loss, x, y), rtol=1e-6, atol=1e-7)


def test_examples_of_examples():
    x, y, weights = logits(2, 3, 4, 5), logits(2, 3, 4, 5, seed=1), torch.rand(3, 4)
    loss = with_gradients(lambda x, y, w: kl(x, y, "rowmean", weights=w))
    found = torch.func.vmap(torch.func.vmap(loss), (0, 0, None))(x, y, weights)
    equal(found, of_examples(lambda x, y: of_examples(loss, x, y, weights), x, y))


@pytest.mark.parametrize("reduction", ["row", "none", *TOTALS])
def test_no_examples(reduction):
    loss = torch.func.grad_and_value(lambda x, y: kl(x, y, reduction).sum(), argnums=(0, 1))
    (dx, dy), value = torch.func.vmap(loss)(torch.empty(0, 3, 5), torch.empty(0, 3, 5))
    assert (value.shape, dx.shape, dy.shape) == ((0,), (0, 3, 5), (0, 3, 5))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["row", *TOTALS])
def test_examples_of_nothing(reduction, shape):
    x = torch.empty(3, *shape)

    def loss(x):
        return kl(x, x, reduction)

    torch.testing.assert_close(torch.func.vmap(loss)(x), of_examples(loss, x), equal_nan=True)


@pytest.mark.parametrize("reduction", TOTALS)
def test_examples_are_one_call(monkeypatch, reduction):
    calls = []
    for name in ("compute", "block"):
        real = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    loss = with_gradients(lambda x, y: kl(x, y, reduction))
    torch.func.vmap(loss)(logits(50, 2, 3), logits(50, 2, 3, seed=1))
    assert calls == ["block"]


def test_second_derivatives_of_examples():
    """The term of PyTorch has PyTorch's; the others raise."""
    x, y = logits(3, 2, 4).log_softmax(-1), logits(3, 2, 4, seed=1).log_softmax(-1)
    from klcore.compat.pytorch import kl_div

    def hessian(loss):
        return torch.func.vmap(torch.func.jacrev(torch.func.jacrev(lambda y, x: loss(y, x, reduction="sum"))))(y, x)

    torch.testing.assert_close(hessian(kl_div), hessian(torch.nn.functional.kl_div))
    with pytest.raises(RuntimeError, match="a second derivative was requested"):
        hessian(kl)


# ---- torch.fx.symbolic_trace -----------------------------------------------------------------------------------------


class Distilled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("teacher", logits(3, 5, dtype=torch.float32))
        self.student = torch.nn.Linear(5, 5)

    def forward(self, x, temperature, weights):
        y = self.student(x)
        value, dy = klcore.kl_div(self.teacher, y, space="logits", return_grad="y", reduction="rowmean")
        loss = kl(y, self.teacher, "rowmean", temperature=temperature, weights=weights)
        return loss + klcore.entropy(y, space="logits", reduction="sum"), value, dy


def test_symbolic_trace():
    """A call is a node; the graph computes what the module does, with its gradients, and can be traced again."""
    module = Distilled()
    traced = torch.fx.symbolic_trace(module)
    targets = [
        n.target.__name__
        for n in traced.graph.nodes
        if n.op == "call_function" and "klcore" in str(n.target.__module__)
    ]
    assert targets == ["called"] * 3
    inputs = logits(3, 5, dtype=torch.float32), 2.0, torch.tensor([1.0, 0.0, 2.0])
    expected, of_student = module(*inputs), []
    for graph in (traced, pickle.loads(pickle.dumps(traced)), torch.compile(traced, backend="eager", fullgraph=True)):
        found = graph(*inputs)
        equal(found, expected)
    for model in (module, traced):
        model.zero_grad()
        model(*inputs)[0].backward()
        of_student.append(model.student.weight.grad)
    equal(*of_student)


@pytest.mark.parametrize("name", ["temperature", "weights", "denominator"])
def test_symbolic_trace_of_one_argument(name):
    """Of either one: the function may hold the other arguments as tensors."""
    x, y, t = logits(4, 5), logits(4, 5, seed=1), torch.tensor(2.0)
    traced = torch.fx.symbolic_trace(lambda t: kl(x, y, **{name: t}))
    equal(traced(t), kl(x, y, **{name: t}))


def two_arguments(loss):
    return lambda x, y: loss(x, y)


@pytest.mark.filterwarnings("ignore:reduction='mean' divides:UserWarning")
def test_symbolic_trace_of_other_systems_losses():
    from klcore.compat import keras, liger, mxnet, puzzlelib, pytorch, rtorch, trl

    for loss in (
        pytorch.kl_div, pytorch.KLDivLoss(), rtorch.nnf_kl_div, keras.KLDivergence(), keras.kl_divergence,
        mxnet.KLDivLoss(), puzzlelib.KLDivergence(), liger.liger_jsd, trl.generalized_jsd_loss,
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"is a Proxy of PyTorch, .* torch.fx.wrap of a function that calls it"):
            torch.fx.symbolic_trace(two_arguments(loss))


# ---- DTensors, of one process ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    distributed = importlib.import_module("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("reduction", ["sum", "rowmean", "mean"])
def test_bits_of_a_multiple_of_dtensors(mesh, reduction, axis):
    tensors = importlib.import_module("torch.distributed.tensor")
    x, y = (logits(6, 50, seed=i, dtype=torch.float32) for i in range(2))
    a, b = (tensors.distribute_tensor(t, mesh, [tensors.Shard(axis)]) for t in (x, y))
    found = value_and_gradients(lambda b: 0.37 * kl(a, b, reduction), b)
    equal([t.full_tensor() for t in found], [*value_and_gradients(lambda y: 0.37 * kl(x, y, reduction), y)])


def test_gradient_of_a_temperature_of_dtensors(mesh):
    """For sharded rows; if the classes are sharded, or a process would have only a part of it, an error."""
    tensors = importlib.import_module("torch.distributed.tensor")
    x, y = logits(4, 5), logits(4, 5, seed=1)
    t = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(kl(x, y, temperature=t), t)
    of_mesh = tensors.distribute_tensor(t.detach(), mesh, [tensors.Replicate()]).requires_grad_()
    a, b = (tensors.distribute_tensor(v, mesh, [tensors.Shard(0)]) for v in (x, y))
    (found,) = torch.autograd.grad(kl(a, b, temperature=of_mesh), of_mesh)
    torch.testing.assert_close(found.full_tensor(), expected)
    with pytest.raises(
        TypeError, match=r"the part of its rows; pass it as a DTensor, distribute_tensor\(temperature, mesh"
    ):
        kl(a, b, temperature=t)
    a, b = (tensors.distribute_tensor(v, mesh, [tensors.Shard(1)]) for v in (x, y))
    with pytest.raises(TypeError, match="if the classes are sharded; divide the logits by it instead"):
        kl(a, b, temperature=of_mesh)


# ---- what else PyTorch does with a loss ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace():
    x, y, z = (logits(3, 5, seed=i) for i in range(3))
    traced = torch.jit.trace(lambda x, y: kl(x, y, "rowmean", temperature=2.0), (x, y))
    equal(traced(x, z), kl(x, z, "rowmean", temperature=2.0))
    equal(
        value_and_gradients(lambda z: traced(x, z), z),
        value_and_gradients(lambda z: kl(x, z, "rowmean", temperature=2.0), z),
    )


def test_a_module_as_a_function():
    """torch.func.functional_call, one gradient per sample; and hooks on the module, which torch.func does not
    support."""
    module, seen = torch.nn.Linear(5, 5), []
    parameters, x, teacher = dict(module.named_parameters()), torch.randn(4, 5), torch.randn(4, 5)

    def loss(parameters, x, teacher):
        return kl(teacher, torch.func.functional_call(module, parameters, (x,)))

    detached = {name: p.detach() for name, p in parameters.items()}
    of_samples = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(detached, x, teacher)
    module.register_full_backward_hook(lambda *_: seen.append(1))
    kl(teacher, module(x.requires_grad_())).backward()
    for name, p in parameters.items():
        torch.testing.assert_close(of_samples[name].sum(0), p.grad)
    assert seen


def test_grad_scaler():
    """Scaled gradients are unscaled; infinite ones skip the step, as they should."""
    x, y = logits(3, 5, dtype=torch.float32), torch.nn.Parameter(logits(3, 5, seed=1, dtype=torch.float32))
    optimizer, scaler = torch.optim.SGD([y], 1.0), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    expected = y.detach() - kl(x, y.detach(), "rowmean", return_grad="y")[1]
    scaler.scale(kl(x, y, "rowmean")).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(y.detach(), expected)


# ---- torch.export ----------------------------------------------------------------------------------------------------


def _losses():
    """Functions of two arrays of logits, by name."""
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
    """torch.export logs its failures, and some losses warn about their means."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.quick(8)
@pytest.mark.parametrize("named", list(_losses()), ids=lambda named: named[0])
def test_export_for_any_size(silent, without_keras, named):
    """For any number of rows and classes."""
    _, loss = named

    class Loss(torch.nn.Module):
        def forward(self, x, y):
            return loss(x, y)

    sizes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("classes")}
    exported = torch.export.export(Loss(), (logits(3, 5), logits(3, 5)), dynamic_shapes=(sizes, sizes))
    x, y = logits(7, 6), logits(7, 6, seed=1)
    equal(exported.module()(x, y), loss(x, y))
