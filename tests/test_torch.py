"""PyTorch tensors: the bits of NumPy's results, gradients to both arguments, and everything PyTorch does with
operators.

The computation is tested elsewhere with NumPy arrays; here, that tensors give the same, whoever calls: eager code,
autograd, torch.func, torch.compile, torch.export.
"""

import contextlib
import importlib
import os
import shutil
import threading

import ml_dtypes
import numpy as np
import pytest
from conftest import CHOSEN, COMMON, call
from test_gradient import PAIRS, REDUCTIONS, arguments, temperature_of

import klcore
from klcore.operations import KL_DIV, LOSSES, Call

torch = pytest.importorskip("torch", reason="no PyTorch: its adapter is not tested")
private = importlib.import_module("klcore.backends.torch.private")
operators = importlib.import_module("klcore.backends.torch.operator")
cpu = importlib.import_module("klcore.backends.cpu")

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WITH_DX = [(name, pair) for name, o in LOSSES.items() if "x" in o.gradients for pair in o.pairs]
GPU = ["cuda"] if "cuda" in CHOSEN else []
SCRIPT = "ignore:.torch.jit.script. is deprecated:DeprecationWarning"  # PyTorch's own, in its forward mode


def tensor(a, requires_grad=False):
    """The array's memory as a tensor."""
    a = np.asarray(a)
    t = (
        torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        if a.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(a)
    )
    return t.requires_grad_(requires_grad)


def array(t):
    t = t.detach().cpu()
    return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy()


def operands(operation, space, dtype="float64", shape=(3, 2, 5), requires_grad=False):
    """The operands of the operation, as tensors."""
    both = [tensor(a, requires_grad) for a in arguments(space, dtype, shape)]
    return both[: len(COMMON[operation].gradients)]


def options(operation, space, **others):
    space = space[0] if COMMON[operation].single or space[0] == space[1] else space
    return {"space": space, "temperature": temperature_of(space), **others}


def same(got, expected):
    """Bits, shape and dtype."""
    assert isinstance(got, torch.Tensor)
    assert not got.requires_grad
    found, expected = array(got), np.asarray(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == expected.tobytes()


def logits(*shape, requires_grad=False, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_(requires_grad)


def kl(x, y, reduction="sum", **others):
    return klcore.kl_div(x, y, space="logits", reduction=reduction, **others)


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", *GPU])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("operation", "space"), PAIRS)
def test_bits_of_numpy(operation, space, reduction, dtype, device):
    """In every way: plain, with requested gradients, backward, the operator."""
    tensors = [t.to(device) for t in operands(operation, space, dtype)]
    arrays = [array(t) for t in tensors]
    which = COMMON[operation].gradients
    keywords = options(operation, space, reduction=reduction)
    function = getattr(klcore, operation)
    expected = function(*arrays, **keywords, return_grad=which)
    if device == "cuda":  # 16-bit inputs are computed differently there; that is tested with CuPy arrays
        cupy = importlib.import_module("cupy")
        on_gpu = function(*map(cupy.asarray, arrays), **keywords, return_grad=which)
        expected = tuple(cupy.asnumpy(a) for a in on_gpu)

    value = function(*tensors, **keywords)
    assert value.device.type == device
    same(value, expected[0])
    for got, a in zip(function(*tensors, **keywords, return_grad=which), expected, strict=True):
        same(got, a)

    leaves = [t.clone().requires_grad_() for t in tensors]
    value = function(*leaves, **keywords)
    value.sum().backward()
    same(value.detach(), expected[0])
    for leaf, a in zip(leaves, expected[1:], strict=True):
        if reduction == "none" and "logits" in space:  # a separate cotangent for every term: another computation
            torch.testing.assert_close(leaf.grad.cpu(), tensor(a))
        else:
            same(leaf.grad, a)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("operation", "space"), PAIRS)
def test_gradcheck(operation, space, reduction, weighted):
    weights = torch.tensor([[0.5, 2.0], [0.0, 1.0]], dtype=torch.float64) if weighted else None
    keywords = options(operation, space, reduction=reduction, weights=weights)
    tensors = operands(operation, space, shape=(2, 2, 3), requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: getattr(klcore, operation)(*t, **keywords), tensors, fast_mode=True)


@pytest.mark.parametrize(
    "shapes", [((2, 1, 3), (4, 3)), ((3,), (2, 3)), ((2, 3), (2, 3)), ((), ()), ((0, 3), (0, 3)), ((2, 0), (2, 0))]
)
@pytest.mark.parametrize("reduction", ["row", "none", "sum"])
def test_gradcheck_of_shapes(shapes, reduction):
    x, y = (logits(*shape, requires_grad=True, seed=i) for i, shape in enumerate(shapes))
    assert torch.autograd.gradcheck(lambda *t: kl(*t, reduction), (x, y))


@pytest.mark.parametrize("reduction", ["row", "none", "sum"])
@pytest.mark.parametrize("factors", [None, (2, 3), (2, 1), (1,), ()], ids=str)
@pytest.mark.parametrize(("term", "space"), WITH_DX)
def test_gradcheck_of_losses(term, space, factors, reduction):
    """With factors of the terms, of the rows, of everything; they multiply gradients as they multiply values."""
    x, y = (tensor(a, True) for a in arguments(space, "float64", (2, 3)))
    factors = None if factors is None else logits(*factors)

    def loss(*t):
        return klcore.divergence.loss(
            term, *t, space=space, reduction=reduction, factors=factors, denominator=3, epsilon=1e-12
        )

    assert torch.autograd.gradcheck(loss, (x, y), fast_mode=True)
    keywords = {"space": space, "reduction": reduction, "denominator": 3, "epsilon": 1e-12}
    expected = klcore.divergence.loss(
        term, array(x), array(y), factors=None if factors is None else array(factors), **keywords
    )
    same(loss(x, y).detach(), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: logits(3, 4, 5).transpose(0, 2),
        lambda: logits(3, 4, 10)[..., ::2],
        lambda: logits(3, 8, 5)[:, 1::3],
        lambda: logits(1, 1, 5).expand(3, 4, 5),
        lambda: logits(3, 4, 1).expand(3, 4, 5),
        lambda: logits(4, 5).unsqueeze(1),
        lambda: logits(60).as_strided((3, 4, 5), (1, 2, 8)),
        lambda: torch.view_as_complex(logits(3, 5, 2)).imag,
        lambda: torch.view_as_complex(logits(3, 5, 2)).conj().imag,  # memory to be read negated
        lambda: torch.nn.Parameter(logits(3, 5), requires_grad=False),
        lambda: logits(3, 5, dtype=torch.bfloat16).T,
        lambda: logits(3, 5).mul(9).to(torch.int32),
        lambda: logits(3, 5) > 0,
    ],
)
@pytest.mark.parametrize("reduction", ["row", "none", "sum"])
@pytest.mark.parametrize("axis", [0, -1])
def test_layouts(make, reduction, axis):
    """For the operator, also the strides that it promises the compiler."""
    x = make()
    a = array(x.resolve_neg().clone(memory_format=torch.contiguous_format))
    y = tensor(np.ascontiguousarray(a[::-1]))
    keywords = {"space": "logits", "axis": axis, "reduction": reduction, "return_grad": ("x", "y")}
    expected = klcore.kl_div(a, array(y), **keywords)
    for got, e in zip(klcore.kl_div(x, y, **keywords), expected, strict=True):
        same(got, e)

    def operator(x, y):
        call = operators.arguments_of(Call(KL_DIV, x, y, "logits", axis, reduction))
        value = torch.ops.klcore.value(*call, None)
        return value, *torch.ops.klcore.gradients(*call, torch.ones_like(value), True, True)

    def laid_out(t):
        return t.shape, t.dtype, [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1]

    meta = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (x, y)]
    for got, promised, e in zip(operator(x, y), operator(*meta), expected, strict=True):
        assert laid_out(got) == laid_out(promised)
        if reduction == "none":  # a separate cotangent for every term: another computation
            torch.testing.assert_close(got, tensor(e))
        else:
            same(got, e)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
def test_nothing_is_copied(monkeypatch, dtype, requires_grad):
    """The kernels read the tensors' memory, and write to the results' memory."""
    lent, given = [], []

    def spied(real):
        def spy(call):
            lent.extend(a for a in (call.x, call.y, call.weights, call.cotangent) if isinstance(a, np.ndarray))
            given.append(real(call))
            return given[-1]

        return spy

    monkeypatch.setattr(cpu, "compute", spied(cpu.compute))
    x, y = logits(3, 5, dtype=dtype, requires_grad=requires_grad), logits(3, 5, dtype=dtype)
    weights, cotangent = torch.ones(3), torch.arange(3.0, dtype=torch.float64 if dtype is FLOATS[0] else None)
    value = kl(x, y, "row", weights=weights)
    tensors, results = [x, y, weights], [value]
    if requires_grad:
        value.backward(cotangent)
        tensors += [x, y, weights, cotangent]
        results.append(x.grad)
        given[1] = given[1][0]
    assert [a.ctypes.data for a in lent] == [t.data_ptr() for t in tensors]
    assert [a.ctypes.data for a in given] == [t.data_ptr() for t in results]


@pytest.mark.parametrize("of_x", FLOATS, ids=str)
@pytest.mark.parametrize("of_y", FLOATS, ids=str)
def test_mixed_dtypes(of_x, of_y):
    x, y = logits(2, 3, dtype=of_x, requires_grad=True), logits(2, 3, dtype=of_y, requires_grad=True, seed=1)
    value = kl(x, y)
    assert value.dtype == (torch.float64 if torch.float64 in (of_x, of_y) else torch.float32)
    value.backward()
    _, dx, dy = klcore.kl_div(array(x), array(y), space="logits", reduction="sum", return_grad=("x", "y"))
    same(x.grad, dx)
    same(y.grad, dy)


@pytest.mark.parametrize("call", [lambda x: kl(x, [0.5, -1.0]), lambda x: kl(((1, 2), (True, 4)), x)])
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_numbers_beside_tensors(call, dtype):
    """They are float64, as beside NumPy arrays."""
    x = logits(2, 2, dtype=dtype)
    same(call(x), call(array(x)))
    same(klcore.kl_div(x[0, 0].exp(), 2.0), klcore.kl_div(array(x[0, 0].exp()), 2.0))


@pytest.mark.parametrize(
    "weights",
    [
        [0.1, 0.3],
        np.array([0.1, 0.3], np.float32)[::-1],
        (1, 0),
        torch.tensor([True, False]),
        torch.ones(()).bfloat16(),
    ],
    ids=repr,
)
def test_weights(weights):
    x, y = logits(2, 3), logits(2, 3, seed=1)
    of_numpy = array(weights) if isinstance(weights, torch.Tensor) else weights
    expected = klcore.kl_div(array(x), array(y), space="logits", reduction="rowmean", weights=of_numpy)
    same(kl(x, y, "rowmean", weights=weights), expected)


# ---- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["row", "none"])
@pytest.mark.parametrize(
    "make",
    [
        lambda shape: torch.tensor(-2.5).expand(shape),
        lambda shape: torch.zeros(shape),
        lambda shape: logits(*shape, dtype=torch.float32),
        lambda shape: logits(*shape[::-1]).float().permute(*range(len(shape))[::-1]),
        lambda shape: torch.where(torch.arange(shape[-1]) == 1, torch.nan, 1.0).expand(shape),
    ],
    ids=["expanded", "zero", "any", "transposed", "NaN"],
)
def test_cotangents(make, reduction):
    x, y = (logits(2, 3, 4, dtype=torch.float32, requires_grad=True, seed=i) for i in range(2))
    value = kl(x, y, reduction)
    cotangent = make(tuple(value.shape))
    found = torch.autograd.grad(value, (x, y), cotangent)
    rows = [(*divmod(i, 3), array(cotangent)[divmod(i, 3)]) for i in range(6)]
    for which, got in zip("xy", found, strict=True):
        for i, j, c in rows:
            a, b = array(x)[i, j], array(y)[i, j]
            if reduction == "row":
                _, g = klcore.kl_div(a, b, space="logits", return_grad=which)
                expected = c * g if c else 0 * g
            else:  # through the Jacobian of the terms, one class at a time
                jacobian = torch.autograd.functional.jacobian(
                    lambda t, a=a, b=b, which=which: kl(*((t, tensor(b)) if which == "x" else (tensor(a), t)), "none"),
                    tensor(a if which == "x" else b),
                )
                expected = array(jacobian.double()).T @ c.astype(np.float64)
            np.testing.assert_allclose(array(got)[i, j], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of", ["x", "y"])
def test_only_one_requires_a_gradient(of):
    x, y = logits(2, 3, requires_grad=of == "x"), logits(2, 3, requires_grad=of == "y", seed=1)
    kl(x, y).backward()
    assert (x.grad is None) == (of == "y")
    assert (y.grad is None) == (of == "x")


def test_backward_again_and_again():
    x, y = logits(2, 3, requires_grad=True), logits(2, 3)
    value = kl(x, 2 * y)
    seen = []
    x.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    value.backward(retain_graph=True)
    once = x.grad.clone()
    value.backward()
    torch.testing.assert_close(x.grad, 2 * once, rtol=0, atol=0)
    torch.testing.assert_close(once, 2 * seen[0], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


def test_one_tensor_as_both():
    x = logits(2, 3, requires_grad=True)
    value = klcore.cross_entropy(x, x, space="logits", reduction="sum")
    value.backward()
    torch.testing.assert_close(value, klcore.entropy(x, space="logits", reduction="sum"))
    assert torch.autograd.gradcheck(lambda t: klcore.cross_entropy(t, t, space="logits"), (x,))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_history(context):
    x, y = logits(2, 3, requires_grad=True), logits(2, 3)
    weights, temperature = torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True)
    with context():
        value = kl(x, y, "rowmean", weights=weights, temperature=temperature)
        out = torch.empty((), dtype=torch.float64)
        assert kl(x, y, "rowmean", out=out) is out
    assert value.grad_fn is None
    assert value.is_inference() == (context is torch.inference_mode)
    torch.testing.assert_close(value, out, rtol=0, atol=0)


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        x = logits(2, 3)
        out = torch.empty(2, dtype=torch.float64)
    same(kl(x, x.clone(), out=torch.empty((), dtype=torch.float64)), 0.0)
    assert kl(x, x, "row", out=out) is out
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        kl(x, logits(2, 3, requires_grad=True))


def test_gradients_on_request_have_no_history():
    x, y = logits(2, 3, requires_grad=True), logits(2, 3)
    assert not any(t.requires_grad for t in kl(x, y, return_grad=("x", "y")))


def test_saved_tensors_are_watched():
    """Overwriting one before the backward pass is detected, with klcore's own out= too."""
    x, y = logits(2, 3, requires_grad=True), logits(2, 3)
    value = kl(x, y, "row")
    klcore.kl_div(logits(2, 3), logits(2, 3), space="logits", reduction="none", out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_saved_tensors_hooks():
    packed = []
    x, y = logits(2, 3, requires_grad=True), logits(2, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        value = kl(x, y, "row")
    value.sum().backward()
    assert {t.data_ptr() for t in packed} == {x.data_ptr(), y.data_ptr()}


@pytest.mark.parametrize("operation", [*COMMON, "keras"])
def test_second_derivatives_are_refused(operation):
    x = torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True)
    if operation == "keras":
        value = klcore.divergence.loss("keras", x, x, space=("probs", "probs"), epsilon=1e-7)
    else:
        value = call(operation, x, x.detach())
    (dx,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives .* second derivative was requested \(create_graph=True"):
        dx.sum().backward()


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((3,), (2, 3)), ((2, 1), (1, 3)), ((), ())], ids=str)
@pytest.mark.parametrize("reduction", ["row", "none", "sum"])
@pytest.mark.parametrize("factors", [None, [[2.0], [0.5]]], ids=["", "factors"])
@pytest.mark.parametrize("space", ["probs", "log_probs"])
def test_second_derivatives_of_pytorchs_term(space, shapes, reduction, factors):
    x, y = (logits(*shape, seed=i) for i, shape in enumerate(shapes))
    x = (x.exp() if space == "probs" else x).requires_grad_()
    y.requires_grad_()

    def loss(x, y):
        return klcore.divergence.loss(
            "pytorch", x, y, space=(space, "log_probs"), reduction=reduction, factors=factors, denominator=3
        )

    if factors is not None and shapes[1] != (2, 3):
        return  # these factors are for two rows
    assert torch.autograd.gradgradcheck(loss, (x, y), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda y: loss(x.detach(), y), (y,), fast_mode=True)


def test_third_derivatives_of_pytorchs_term():
    x, y = logits(3, requires_grad=True), logits(3, requires_grad=True, seed=1)

    def third(loss):
        found = loss()
        for _ in range(2):
            (found,) = torch.autograd.grad((found**2).sum(), x, create_graph=True)
        return torch.autograd.grad((found**2).sum(), (x, y))

    found = third(lambda: klcore.divergence.loss("pytorch", x, y, space=("log_probs", "log_probs"), reduction="sum"))
    expected = third(lambda: torch.nn.functional.kl_div(y, x, reduction="sum", log_target=True))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("value", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("dtypes", [(0, 1), (2, 1), (3, 2), (1, 3)], ids=str)
def test_second_derivatives_of_mixed_dtypes(dtypes, value):
    x, y = (logits(2, 3, dtype=FLOATS[i], requires_grad=True) for i in dtypes)
    found = klcore.divergence.loss("pytorch", x, y, space=("log_probs", "log_probs"), dtype=value)
    assert value is None or found.dtype == getattr(torch, value)
    first = torch.autograd.grad(found.sum(), (x, y), create_graph=True)
    second = torch.autograd.grad(sum((g.double() ** 2).sum() for g in first), (x, y))
    assert [g.dtype for g in (*first, *second)] == [x.dtype, y.dtype] * 2
    assert not any(g.requires_grad for g in second)


def test_autocast():
    """klcore widens 16-bit inputs itself; the term of PyTorch gives what PyTorch's loss would."""
    x, y = logits(2, 3, dtype=torch.bfloat16, requires_grad=True), logits(2, 3, dtype=torch.bfloat16)
    expected = kl(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        value = kl(x, y)
        found = klcore.divergence.loss("pytorch", x, y, space=("log_probs", "log_probs"), dtype="bfloat16")
        assert found.dtype == torch.nn.functional.kl_div(y, x, reduction="sum", log_target=True).dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    value.backward()
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.device("meta"),
        lambda: torch.autograd.set_detect_anomaly(True),
        lambda: torch.autograd.graph.save_on_cpu(),
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_contexts(context):
    """Changes of PyTorch's defaults change nothing here."""
    x, y = logits(2, 3, requires_grad=True), logits(2, 3, seed=1)
    expected, dx = klcore.kl_div(array(x), array(y), space="logits", reduction="sum", return_grad="x")
    with context():
        value = kl(x, y)
        value.backward()
        assert klcore.kl_div(y, [1.0, 2.0, 3.0], space="logits").device.type == "cpu"
    same(value.detach(), expected)
    same(x.grad, dx)


FLUSHED = """
import hashlib
import sys

import numpy as np
import torch

if sys.argv[1] == "flush":
    assert torch.set_flush_denormal(True)
    assert np.float32(1e-40) * np.float32(1.0) == 0
import klcore

rng = np.random.default_rng(0)
found = hashlib.sha256()
for shape in ((3, 20), (300, 1500), (1, 200_000)):  # one thread; rows over two; a row over two
    for bits, dtype in ((16, "float16"), (32, "float32"), (64, "float64")):  # subnormal numbers, made of integers
        x, y = rng.integers(1 << bits // 2, size=(2, *shape), dtype=f"uint{bits}").view(dtype)
        for y in (y, y[:1]):
            for array in klcore.kl_div(x, y, return_grad=("x", "y")):
                found.update(array.tobytes())
print(found.hexdigest())
if sys.argv[1] == "flush":
    assert np.float32(1e-40) * np.float32(1.0) == 0  # left as it was
"""


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor has no such mode")
def test_flushing_subnormals_changes_no_bit(python):
    """A mode of the processor that threads inherit; a library linked with -ffast-math sets it as well."""
    plain, flushed = (python(FLUSHED, how, KLCORE_NUM_THREADS=2) for how in ("keep", "flush"))
    assert plain == flushed


# ---- torch.library, torch.func ---------------------------------------------------------------------------------------


def test_arguments_of_the_operator():
    """Every field of a call survives the conversion, except those that the operator does not have."""
    x, y, weights, ratio, indices, mass = torch.ones(6)
    call = Call(
        KL_DIV, x, y, ("probs", "logits"), 1, "sum", weights, 2.5, parameter=0.25, factor=7.0, ratio=ratio, examples=2,
        indices=indices, tail="bucket", tail_mass=mass,
    )  # fmt: skip
    for number in (0.5, 3, torch.ones(())):
        call = call._replace(temperature=number, denominator=number)
        assert operators.call_of(*operators.arguments_of(call)) == call
        placed = operators.arguments_of(call)
        assert all(placed[operators.TENSORS[name]] is t for name, t in operators.tensors_of(call).items())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("operation", "space"), PAIRS)
def test_opcheck(operation, space, reduction):
    """Schema, registration of autograd, fake; and, for one operation because it is slow, ahead-of-time autograd."""
    x, y = (*operands(operation, space, "float32", (2, 3), requires_grad=True), None)[:2]
    words = operators.arguments_of(
        Call(COMMON[operation], x, y, space, -1, reduction, torch.ones(2), temperature_of(space))
    )
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if operation == "kl_div" and space in (("logits", "logits"), ("probs", "log_probs")):
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.klcore.value.default, (*words, None), test_utils=tests)
    value = torch.ops.klcore.value(*words, None).detach()
    words = [t.detach() if isinstance(t, torch.Tensor) else t for t in words]
    of_y = not COMMON[operation].single
    torch.library.opcheck(
        torch.ops.klcore.gradients.default, (*words, torch.ones_like(value), True, of_y), test_utils=tests[:3]
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_func(reduction):
    """grad, vjp and jacrev, also of a batch."""
    x, y = logits(2, 3), logits(2, 3, seed=1)
    jacobians = torch.autograd.functional.jacobian(lambda x, y: kl(x, y, reduction), (x, y))
    found = torch.func.jacrev(lambda x, y: kl(x, y, reduction), argnums=(0, 1))(x, y)
    torch.testing.assert_close(found, jacobians, rtol=0, atol=0)
    vectorised = torch.autograd.functional.jacobian(lambda x, y: kl(x, y, reduction), (x, y), vectorize=True)
    torch.testing.assert_close(vectorised, jacobians, rtol=0, atol=0)
    gradients = torch.func.grad(lambda x, y: kl(x, y, reduction).sum(), argnums=(0, 1))(x, y)
    asked = klcore.kl_div(x, y, space="logits", reduction=reduction, return_grad=("x", "y"))
    exact = {} if reduction == "none" else {"rtol": 0, "atol": 0}  # a cotangent for every term: another computation
    torch.testing.assert_close(gradients, asked[1:], **exact)
    value, pull = torch.func.vjp(lambda x: kl(x, y, reduction), x)
    torch.testing.assert_close(pull(torch.ones_like(value))[0], asked[1], **exact)


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (1, 2), (-1, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["row", "none", "mean"])
@pytest.mark.parametrize("return_grad", [None, ("x", "y")], ids=["", "gradients"])
def test_vmap(capfd, dims, reduction, return_grad):
    """The bits of each example, in a batch too, and no warning about speed."""
    x, y = (logits(4, 3, 5, seed=i) for i in range(2))
    batch = [t[0] if d is None else t.movedim(0, d) for t, d in zip((x, y), dims, strict=True)]
    found = torch.func.vmap(lambda x, y: kl(x, y, reduction, axis=0, return_grad=return_grad), dims)(*batch)
    members = [[t[0] if d is None else t[i] for t, d in zip((x, y), dims, strict=True)] for i in range(4)]
    alone = [kl(*pair, reduction, axis=0, return_grad=return_grad) for pair in members]
    expected = torch.stack(alone) if return_grad is None else tuple(map(torch.stack, zip(*alone, strict=True)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert capfd.readouterr() == ("", "")


def test_vmap_of_vmap_of_grad():
    x, y = (logits(2, 4, 3, seed=i) for i in range(2))
    found = torch.func.vmap(torch.func.vmap(torch.func.grad(kl)))(x, y)
    torch.testing.assert_close(found, klcore.kl_div(x, y, space="logits", return_grad="x")[1], rtol=0, atol=0)


def dual(x, y):
    with torch.autograd.forward_ad.dual_level():
        return kl(torch.autograd.forward_ad.make_dual(x, y), y)


@pytest.mark.parametrize(
    "call",
    [
        dual,
        lambda x, y: dual(x, y.requires_grad_()),
        lambda x, y: torch.func.jvp(lambda x: kl(x, y), (x,), (y,)),
        lambda x, y: torch.func.jacfwd(lambda x: kl(x, y))(x),
        lambda x, y: torch.func.hessian(lambda x: kl(x, y))(x),
    ],
    ids=["dual", "dual and gradient", "jvp", "jacfwd", "hessian"],
)
@pytest.mark.filterwarnings(SCRIPT)
def test_forward_mode_is_refused(call):
    """A tangent is never dropped silently."""
    with pytest.raises(NotImplementedError, match=r"no derivatives in forward mode .* use reverse mode: vjp"):
        call(logits(3), logits(3, seed=1))


class Passing(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def in_a_mode(look, x):
    with Passing():
        look(x)


def in_forward_mode(look, x):
    with torch.autograd.forward_ad.dual_level():
        look(torch.autograd.forward_ad.make_dual(x, x))


def in_backward_of_many(look, x):
    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, cotangent):
            return look(cotangent)

    x.requires_grad_()
    torch.autograd.grad(Watched.apply(x), x, torch.ones(4, *x.shape), is_grads_batched=True)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (lambda look, x: look(x), (True, False, False)),
        (lambda look, x: look(torch.nn.Parameter(x)), (True, False, False)),
        (lambda look, x: torch.func.vmap(look)(x), (False, True, False)),
        (lambda look, x: torch.func.grad(lambda x: look(x).sum())(x), (False, True, False)),
        (lambda look, x: torch.func.vjp(look, x), (False, True, False)),
        (lambda look, x: torch.func.jvp(look, (x,), (x,)), (False, True, False)),
        (in_forward_mode, (False, True, False)),
        (in_a_mode, (False, False, False)),
        (lambda look, x: torch.jit.trace(look, x, check_trace=False), (False, False, False)),
        (in_backward_of_many, (True, False, True)),
    ],
    ids=["eager", "parameter", "vmap", "grad", "vjp", "jvp", "forward mode", "dispatch mode", "jit.trace", "batched"],
)
@pytest.mark.filterwarnings(SCRIPT, "ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
def test_what_pytorch_is_doing(state, expected):
    """PyTorch's private interfaces mean what klcore expects, in each state, and no longer afterwards."""
    found = []

    def look(x):
        found.append((private.is_eager(x), private.is_transformed(), private.is_batched(x)))
        return x * 2

    state(look, logits(2, 3))
    look(logits(2, 3))
    assert found == [expected, (True, False, False)]


def test_second_derivatives_of_func():
    def twice(loss):
        return torch.func.jacrev(torch.func.jacrev(loss))(logits(3))

    y = logits(3, seed=1)
    with pytest.raises(RuntimeError, match="a second derivative was requested"):
        twice(lambda x: kl(x, y))
    found = twice(lambda x: klcore.divergence.loss("pytorch", x, y, space=("log_probs", "log_probs"), reduction="sum"))
    expected = twice(lambda x: torch.nn.functional.kl_div(y, x, reduction="sum", log_target=True))
    torch.testing.assert_close(found, expected)


# ---- torch.compile, torch.export, tensors without memory -------------------------------------------------------------


@pytest.fixture
def compiled():
    """Compile a whole function, without code generation; count how often."""
    testing = importlib.import_module("torch._dynamo.testing")
    torch._dynamo.reset()

    def compile_(function, backend="aot_eager", **how):
        counter = testing.CompileCounterWithBackend(backend)
        found = torch.compile(function, backend=counter, **{"fullgraph": True, **how})
        found.counter = counter
        return found

    yield compile_
    torch._dynamo.reset()


@pytest.mark.parametrize("of", [float, np.array, np.float64, lambda v: torch.tensor(v, dtype=torch.float64)],
                         ids=["float", "array", "scalar", "tensor"])  # fmt: skip
@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("kl_div", "denominator"), ("kl_div", "temperature"), ("kl_div", "base"), ("js_div", "beta"),
        ("kl_estimate", "limit"), ("kl_estimate", "ratio"),
    ],
)  # fmt: skip
def test_compile_with_numbers_of_any_kind(compiled, function, name, of):
    """0-d arrays too, and with another value than the one at compile time."""
    x, y = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.5, 0.6]])
    space = {"space": "logits"} if name == "temperature" else {}

    def f(number):
        return getattr(klcore, function)(x, y, reduction="sum", **{name: number}, **space)

    g = compiled(f)
    base = 1.5 if name == "base" else 0
    for value in (base + 0.25, base + 0.5):
        assert g(of(value)) == f(of(value)) == f(value)


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("operation", ["kl_div", "entropy", "pytorch"])
def test_compile(compiled, operation, dynamic):
    def loss(x, y):
        if operation == "entropy":
            return klcore.entropy(x, space="logits", weights=[1.0, 0.5])
        if operation == "pytorch":
            return klcore.divergence.loss(
                "pytorch", x, y, space=("log_probs", "log_probs"), reduction="sum", denominator=x.shape[0]
            )
        return kl(x, y, "batchmean", temperature=2.0)

    def both(function):
        x, y = (logits(2, 5, requires_grad=True, seed=i) for i in range(2))
        value = function(x, y)
        value.sum().backward()
        return value.detach(), x.grad, y.grad

    torch.testing.assert_close(both(compiled(loss, dynamic=dynamic)), both(loss), rtol=0, atol=0)


def test_compile_for_all_shapes_at_once(compiled):
    """One more compilation makes the sizes variable, and another the position of broadcasting."""
    loss = compiled(lambda x, y: kl(x, y, "mean"))
    of_pytorch = compiled(
        lambda x, y: klcore.divergence.loss(
            "pytorch", x, y, space=("log_probs", "log_probs"), reduction="sum", denominator=x.shape[0]
        )
    )
    for n in range(2, 20):
        x, y = logits(n, n + 3), logits(n, n + 3, seed=1)
        torch.testing.assert_close(loss(x, y), kl(x, y, "mean"), rtol=0, atol=0)
        of_pytorch(x, y)
    assert loss.counter.frame_count <= 2
    assert of_pytorch.counter.frame_count <= 3


def test_compile_once_whatever_else_is_computed(compiled):
    """At most once more for another library's backend, and for another type of tensor."""
    x = logits(2, 3)
    loss = compiled(kl)
    klcore.kl_div(x, x)
    loss(x, x)

    class Mine(np.ndarray):
        pass

    for others in ([1.0], np.ones(2), np.ones(2).view(Mine), torch.nn.Parameter(x), 0.5, (1.0,), np.float32(1)):
        klcore.entropy(others)
        loss(x, x)
    assert loss.counter.frame_count <= 3


@pytest.mark.parametrize("return_grad", [None, "y", ("x", "y")])
@pytest.mark.parametrize("given", [False, True], ids=["", "out"])
def test_compile_what_is_asked_for(compiled, return_grad, given):
    x, y = logits(2, 3), logits(2, 3, seed=1)
    expected = kl(x, y, "row", return_grad=return_grad)
    out = torch.empty(2, dtype=torch.float64)
    outs = out if return_grad is None else (out, *map(torch.empty_like, expected[1:]))
    found = compiled(lambda x, y: kl(x, y, "row", return_grad=return_grad, out=outs if given else None))(x, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    if given:
        torch.testing.assert_close(outs, expected, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["row", "sum"])
def test_compile_vmap(compiled, capfd, reduction):
    x, y = logits(4, 2, 3), logits(4, 2, 3, seed=1)
    function = torch.func.vmap(lambda x, y: kl(x, y, reduction))
    torch.testing.assert_close(compiled(function)(x, y), function(x, y), rtol=0, atol=0)
    assert "performance" not in capfd.readouterr().err


FIRST = """
import torch, {module}
x, y = (torch.linspace(0, 1, 12, dtype=torch.float64).reshape(4, 3).pow(i).requires_grad_() for i in (1, 2))
def loss(x, y):
    return {module}.kl_div(x, y, {options}, reduction="batchmean")
value = torch.compile(loss, backend="{backend}", fullgraph=True)(x, y)
value.backward()
found = x.grad.clone()
x.grad = None
loss(x, y).backward()
assert torch.equal(found, x.grad) and torch.equal(value, loss(x, y))
print("first")
"""


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("module", "options", "backend"),
    [
        ("klcore", 'space="logits"', "aot_eager"),
        pytest.param(
            *("klcore", 'space="logits"', "inductor"),
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler"),
        ),
        ("klcore.compat.pytorch", "log_target=True", "aot_eager"),
    ],
)
def test_compile_before_anything_else(python, module, options, backend):
    """The adapter is imported while PyTorch traces, and klcore causes no warning."""
    ignored = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
    assert python(
        FIRST.format(module=module, options=options, backend=backend), warnings=("error", *ignored)
    ).split() == ["first"]


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, x, y):
            return kl(x, y, "mean")

    sizes = {"x": {0: torch.export.Dim("batch", min=2)}, "y": {0: torch.export.Dim("batch", min=2)}}
    exported = torch.export.export(Loss(), (logits(4, 3), logits(4, 3)), dynamic_shapes=sizes)
    x, y = logits(7, 3), logits(7, 3, seed=1)
    torch.testing.assert_close(exported.module()(x, y), kl(x, y, "mean"), rtol=0, atol=0)
    assert [n.target for n in exported.graph.nodes if n.op == "call_function"] == [torch.ops.klcore.value.default]


@pytest.mark.parametrize("return_grad", [None, ("x", "y")], ids=["", "gradients"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mode", [None, "cpu", "cuda"])
def test_tensors_without_memory(mode, reduction, return_grad):
    """On the device "meta", and fake ones of either device: shapes and dtypes."""
    fakes = importlib.import_module("torch._subclasses.fake_tensor")
    shapes = (2, 1, 5), (3, 5)
    real = kl(*(logits(*shape, dtype=torch.float32) for shape in shapes), reduction, return_grad=return_grad)
    with fakes.FakeTensorMode() if mode else contextlib.nullcontext():
        x, y = (torch.empty(shape, device=mode or "meta") for shape in shapes)
        found = kl(x, y, reduction, return_grad=return_grad)
        out = found if return_grad is None else found[0]
        if mode != "cuda":  # a PyTorch without CUDA cannot copy there, not even fake tensors
            assert kl(x, y, reduction, out=torch.empty_like(out)).shape == out.shape
    real, found = (t if isinstance(t, tuple) else (t,) for t in (real, found))
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in real]
    assert {t.device.type for t in found} == {mode or "meta"}


def test_subclasses():
    """They are preserved, as in PyTorch's own functions; those that do not support custom operators raise."""

    class Mine(torch.Tensor):
        pass

    x, y = logits(2, 3).as_subclass(Mine), logits(2, 3, seed=1)
    value, dx = kl(x, y, "row", return_grad="x")
    assert type(value) is type(dx) is type(kl(x, y)) is Mine
    same(value.as_subclass(torch.Tensor), klcore.kl_div(array(logits(2, 3)), array(y), space="logits"))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: logits(2, 3).to_sparse(), ("layout torch.sparse_coo", "to_dense()")),
        (lambda: logits(2, 3).float().to_mkldnn(), ("layout torch._mkldnn", "to_dense()")),
        (lambda: torch.nested.nested_tensor([logits(2), logits(3)], layout=torch.jagged), ("nested", "padded")),
        (lambda: torch.nested.nested_tensor([logits(2), logits(3)]), ("nested", "padded")),
        (lambda: torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.quint8), ("quantized", "dequantize")),
        (lambda: torch.complex(logits(2, 3), logits(2, 3)), ("complex128", "float64, float32, float16, bfloat16")),
        (lambda: torch.ones(2, 3, dtype=torch.float8_e4m3fn), ("float8_e4m3fn", "bfloat16")),
    ],
)
@pytest.mark.parametrize("place", ["x", "y", "weights", "out"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_kinds_of_tensors(make, words, place):
    call = {"x": logits(2, 3), "y": logits(2, 3), place: make()}
    with pytest.raises(TypeError) as raised:
        klcore.kl_div(**call, space="logits")
    assert [word for word in words if word not in str(raised.value)] == []
    assert place in str(raised.value) or "nested" in words


@pytest.mark.parametrize(
    "keywords",
    [
        {"space": "prob"},
        {"space": ("probs",)},
        {"space": None},
        {"reduction": "none_"},
        {"reduction": None},
        {"axis": 2},
        {"axis": 0.0},
        {"temperature": 2.0},
        {"temperature": "hot", "space": "logits"},
        {"temperature": -1.0, "space": "logits"},
        {"return_grad": "z"},
        {"weights": [1.0, 2.0, 3.0]},
        {"weights": [1.0, -2.0]},
        {"weights": ["a", "b"]},
        {"weights": np.ma.array([1.0, 2.0], mask=[True, False])},
        {"device": "mps"},
        {"y": [1.0, 2.0]},
        {"y": ["a", "b", "c"]},
        {"y": [1j, 2, 3]},
    ],
    ids=str,
)
@pytest.mark.parametrize("road", ["plain", "gradient", "compiled", "meta"])
def test_messages_of_numpy(compiled, keywords, road):
    """The same exceptions and messages, whoever calls."""
    weights = keywords.get("weights")
    if road == "meta" and weights is not None and not isinstance(weights, np.ma.MaskedArray) and weights[1] != "b":
        return  # their values and shape are validated where something is computed
    if road == "compiled" and ("a" in str(weights) or isinstance(keywords.get("y", [0])[0], (str, complex))):
        return  # PyTorch's tracer is the first to see lists, and has its own messages
    x, y = torch.rand(2, 3), keywords.get("y", torch.rand(2, 3))
    others = {k: v for k, v in keywords.items() if k != "y"}
    with pytest.raises((TypeError, ValueError)) as of_numpy:
        klcore.kl_div(x.numpy(), y.numpy() if isinstance(y, torch.Tensor) else y, **others)

    def call(x):
        return klcore.kl_div(x, y.to(x.device) if isinstance(y, torch.Tensor) else y, **others)

    given = x.to("meta") if road == "meta" else x.requires_grad_(road == "gradient")
    with pytest.raises(of_numpy.type) as raised:
        (compiled(call, fullgraph=False) if road == "compiled" else call)(given)
    assert str(raised.value).splitlines()[0] == str(of_numpy.value)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x: klcore.kl_div(x, x.to("meta")), ValueError, r"different devices \(x on cpu, y on meta\)"),
        (
            lambda x: klcore.kl_div(x, x, weights=torch.ones(2, device="meta")),
            ValueError,
            r"different devices \(x on cpu, weights on meta\)",
        ),
        (
            lambda x: klcore.kl_div(x, x, out=torch.ones(2, device="meta")),
            TypeError,
            "out must be a tensor on cpu, .* found one on meta",
        ),
        (lambda x: klcore.kl_div(x, x, out=np.empty(2)), TypeError, "out must be a tensor on cpu, .* found ndarray"),
        (lambda x: klcore.kl_div(x, x, out=[torch.empty(2)]), TypeError, "out must be a tensor on cpu, .* found list"),
        (lambda x: klcore.kl_div(x, x, out=x[0]), ValueError, "out"),
        (
            lambda x: klcore.kl_div(x.clone().requires_grad_(), x, out=torch.empty(2)),
            TypeError,
            "out= does not support autograd",
        ),
        (
            lambda x: klcore.kl_div(x, x, out=torch.empty(2, requires_grad=True)),
            TypeError,
            "out requires a gradient",
        ),
        (
            lambda x: klcore.kl_div(x.to("meta"), x.to("meta"), out=torch.empty(3, device="meta")),
            ValueError,
            r"out must have shape \(2,\) .* found \(3,\)",
        ),
        (
            lambda x: klcore.kl_div(x, x, weights=torch.ones(2, requires_grad=True)),
            TypeError,
            "weights requires a gradient",
        ),
        (lambda x: klcore.entropy(torch.nn.Linear(1, 1)), TypeError, "x is a torch.nn.*Linear; klcore takes tensors"),
        (
            lambda x: klcore.kl_div(x, torch.distributions.Normal(0.0, 1.0)),
            TypeError,
            "y is a torch.distributions.*Normal; klcore takes tensors",
        ),
        (lambda x: klcore.kl_div(x, [[x.clone().requires_grad_()[0, 0]] * 3] * 2), TypeError, "requires grad"),
    ],
)
def test_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.rand(2, 3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this PyTorch has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_other_device_is_used_instead(device):
    with pytest.raises(klcore.BackendUnavailableError, match=f"device='{device}', but PyTorch finds no usable CUDA"):
        klcore.kl_div(torch.ones(2), torch.ones(2), device=device)


def test_a_device_that_nobody_serves():
    fakes = importlib.import_module("torch._subclasses.fake_tensor")
    with (
        fakes.FakeTensorMode(),
        pytest.raises(TypeError, match=r"on the device 'xpu:0', .* move it with x.to\('cpu'\)"),
    ):
        klcore.entropy(torch.empty(2, 3, device="xpu"))


def test_device_cpu():
    x = logits(2, 3, requires_grad=True)
    kl(x, x.detach(), device="cpu", weights=torch.ones(2)).backward()
    assert x.grad is not None


def test_bfloat16_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(importlib.import_module("sys").modules, "ml_dtypes", None)
    with pytest.raises(klcore.BackendUnavailableError, match=r"ml_dtypes.*pip install 'klcore\[bfloat16\]'"):
        klcore.entropy(torch.ones(2, dtype=torch.bfloat16))


# ---- out= ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)])
def test_out(dtype, given):
    x, y = logits(2, 3, dtype=dtype), logits(2, 3, dtype=dtype, seed=1)
    expected = kl(x, y, "row", return_grad="y")
    outs = tuple(torch.empty_like(t) if wanted else None for t, wanted in zip(expected, given, strict=True))
    found = kl(x, y, "row", return_grad="y", out=outs)
    for got, out, e in zip(found, outs, expected, strict=True):
        assert out is None or got is out
        torch.testing.assert_close(got, e, rtol=0, atol=0)
    value = torch.empty_like(expected[0])
    assert kl(x, y, "row", out=value) is value
    torch.testing.assert_close(value, expected[0], rtol=0, atol=0)


def test_out_that_is_read_negated():
    x, y = logits(2, 3), logits(2, 3, seed=1)
    out = torch.zeros(2, dtype=torch.complex128).conj().imag
    assert kl(x, y, "row", out=out) is out
    torch.testing.assert_close(out.resolve_neg(), kl(x, y, "row"), rtol=0, atol=0)


def test_out_over_y_beside_a_cross_entropy():
    """As docs/distil.md saves memory: the gradient of a sum of two losses, one of which overwrote the logits."""
    x, labels = logits(6, 10), torch.arange(6)
    hidden, layer, t = logits(6, 4, seed=1).requires_grad_(), logits(4, 10, seed=2), 2.0
    options = {"space": "logits", "temperature": t, "reduction": "rowmean"}
    y = hidden @ layer
    loss = t**2 * klcore.kl_div(x, y, **options) + torch.nn.functional.cross_entropy(y, labels)
    (expected,) = torch.autograd.grad(loss, hidden)

    y = hidden @ layer
    hard = torch.nn.functional.cross_entropy(y, labels)
    with torch.no_grad():
        _, grad = klcore.kl_div(x, y, **options, return_grad="y", out=(None, y))
        grad *= t**2
    torch.autograd.backward([hard, y], [None, grad])
    torch.testing.assert_close(hidden.grad, expected)


# ---- threads and processes -------------------------------------------------------------------------------------------


def test_threads():
    x, y = logits(200, 300), logits(200, 300, seed=1)
    expected = klcore.kl_div(x, y, space="logits", reduction="sum", return_grad="x")
    found, errors = [], []

    def work():
        try:
            for _ in range(5):
                leaf = x.clone().requires_grad_()
                value = kl(leaf, y)
                value.backward()
                found.append((value.detach(), leaf.grad))
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    assert len(found) == 20
    for pair in found:
        torch.testing.assert_close(pair, expected, rtol=0, atol=0)


FORKED = """
import torch, klcore
class Set(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        x = torch.full((100, 1000), 0.001 * (i + 1), requires_grad=True)
        klcore.kl_div(x, x.detach() * 2, reduction="sum").backward()
        return x.grad
klcore.kl_div(torch.rand(100, 1000), torch.rand(100, 1000))  # threads are running before the fork
found = list(torch.utils.data.DataLoader(Set(), num_workers=2, multiprocessing_context="fork"))
print(torch.equal(torch.cat(found), torch.stack([Set()[i] for i in range(4)])))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_workers_of_a_data_loader(python):
    assert python(FORKED, warnings=("error", "ignore::DeprecationWarning")).strip() == "True"
