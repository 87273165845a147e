"""PyTorch tensors: the bits of NumPy's results, gradients to both arguments, and all that PyTorch does with operators.

What is computed is tested elsewhere, of NumPy arrays; here, that a tensor gives the same, whoever calls: eager code,
autograd, torch.func, torch.compile, torch.export.
"""

import importlib

import ml_dtypes
import numpy as np
import pytest
from conftest import CHOSEN
from test_gradient import PAIRS, REDUCTIONS, arguments, temperature_of

import klcore

torch = pytest.importorskip("torch", reason="no PyTorch: its adapter is not tested")
adapter = importlib.import_module("klcore.backends.torch")
cpu = importlib.import_module("klcore.backends.cpu")

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LOSSES = [
    ("pytorch", ("probs", "log_probs")),
    ("pytorch", ("log_probs", "log_probs")),
    ("keras", ("probs", "probs")),
    ("mxnet", ("probs", "log_probs")),
    ("mxnet", ("probs", "logits")),
]
GPU = ["cuda"] if "cuda" in CHOSEN and torch.cuda.is_available() else []
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
    """What the operation is called with, as tensors."""
    both = [tensor(a, requires_grad) for a in arguments(space, dtype, shape)]
    return both[:1] if operation == "entropy" else both


def options(operation, space, **others):
    space = space[0] if operation == "entropy" or space[0] == space[1] else space
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
    """On every road: plain, gradients asked for, backward, the operator."""
    tensors = [t.to(device) for t in operands(operation, space, dtype)]
    arrays = [array(t) for t in tensors]
    which = "x" if operation == "entropy" else ("x", "y")
    keywords = options(operation, space, reduction=reduction)
    function = getattr(klcore, operation)
    expected = function(*arrays, **keywords, return_grad=which)
    if device == "cuda":  # 16-bit inputs are computed otherwise there; that is tested with CuPy's arrays
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
        if reduction == "none" and "logits" in space:  # a cotangent of its own for every term: another computation
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
@pytest.mark.parametrize(("term", "space"), LOSSES)
def test_gradcheck_of_losses(term, space, factors, reduction):
    """With factors of the terms, of the rows, of all; they multiply gradients as they do values."""
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
    """Of the operator, the strides too that it promises the compiler."""
    x = make()
    a = array(x.resolve_neg().clone(memory_format=torch.contiguous_format))
    y = tensor(np.ascontiguousarray(a[::-1]))
    keywords = {"space": "logits", "axis": axis, "reduction": reduction, "return_grad": ("x", "y")}
    expected = klcore.kl_div(a, array(y), **keywords)
    for got, e in zip(klcore.kl_div(x, y, **keywords), expected, strict=True):
        same(got, e)

    def operator(x, y):
        call = ("kl_div", x, y, "logits", "logits", axis, reduction, None, 1.0, 1, 0.0)
        value = torch.ops.klcore.value(*call, None)
        return value, *torch.ops.klcore.gradients(*call, torch.ones_like(value), True, True)

    def laid_out(t):
        return t.shape, t.dtype, [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1]

    meta = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (x, y)]
    for got, promised, e in zip(operator(x, y), operator(*meta), expected, strict=True):
        assert laid_out(got) == laid_out(promised)
        same(got, e)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
def test_nothing_is_copied(monkeypatch, dtype, requires_grad):
    """The kernels read the tensors' memory, and what they write is the results' memory."""
    lent, given = [], []

    def spied(real):
        def spy(*call):
            lent.extend(a for a in call if isinstance(a, np.ndarray))
            given.append(real(*call))
            return given[-1]

        return spy

    for name in ("kl_div", "gradient"):
        monkeypatch.setattr(cpu, name, spied(getattr(cpu, name)))
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
    """Are float64, as beside NumPy arrays."""
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
        lambda shape: torch.full(shape, torch.inf),
    ],
    ids=["expanded", "zero", "any", "transposed", "NaN", "inf"],
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
            else:  # through the Jacobian of the terms, a class at a time
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
    """Whoever overwrites one before the backward pass hears of it, by klcore's own out= too."""
    x, y = logits(2, 3, requires_grad=True), logits(2, 3)
    value = kl(x, y)
    klcore.kl_div(logits(2, 3), logits(2, 3), space="logits", reduction="none", out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_saved_tensors_hooks():
    packed = []
    x, y = logits(2, 3, requires_grad=True), logits(2, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        value = kl(x, y)
    value.backward()
    assert {t.data_ptr() for t in packed} == {x.data_ptr(), y.data_ptr()}


@pytest.mark.parametrize("operation", ["kl_div", "rel_entr", "cross_entropy", "entropy", "keras"])
def test_second_derivatives_are_refused(operation):
    x = torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True)
    if operation == "keras":
        value = klcore.divergence.loss("keras", x, x, space=("probs", "probs"), epsilon=1e-7)
    else:
        value = getattr(klcore, operation)(*([x] if operation == "entropy" else [x, x.detach()]))
    (dx,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives .* this asks for a second one \(create_graph=True"):
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
    """klcore widens what is narrow by itself; the term of PyTorch gives what PyTorch's would."""
    x, y = logits(2, 3, dtype=torch.bfloat16, requires_grad=True), logits(2, 3, dtype=torch.bfloat16)
    expected = kl(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        value = kl(x, y)
        found = klcore.divergence.loss("pytorch", x, y, space=("log_probs", "log_probs"), dtype="bfloat16")
        assert found.dtype == torch.nn.functional.kl_div(y, x, log_target=True).dtype == torch.float32
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
    """What changes PyTorch's defaults changes nothing here."""
    x, y = logits(2, 3, requires_grad=True), logits(2, 3, seed=1)
    expected, dx = klcore.kl_div(array(x), array(y), space="logits", reduction="sum", return_grad="x")
    with context():
        value = kl(x, y)
        value.backward()
        assert klcore.kl_div(y, [1.0, 2.0, 3.0], space="logits").device.type == "cpu"
    same(value.detach(), expected)
    same(x.grad, dx)


# ---- torch.library, torch.func ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("operation", "space"), PAIRS)
def test_opcheck(operation, space, reduction):
    """Schema, registration of autograd, fake; and, where it takes long, for one operation, ahead-of-time autograd."""
    x, y = (*operands(operation, space, "float32", (2, 3), requires_grad=True), None)[:2]
    words = (operation, x, y, *space, -1, reduction, torch.ones(2), temperature_of(space), 1, 0.0)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if operation == "kl_div" and space in (("logits", "logits"), ("probs", "log_probs")):
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.klcore.value.default, (*words, None), test_utils=tests)
    value = torch.ops.klcore.value(*words, None).detach()
    words = [t.detach() if isinstance(t, torch.Tensor) else t for t in words]
    of_y = operation != "entropy"
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
    torch.testing.assert_close(gradients, asked[1:], rtol=0, atol=0)
    value, pull = torch.func.vjp(lambda x: kl(x, y, reduction), x)
    torch.testing.assert_close(pull(torch.ones_like(value))[0], asked[1], rtol=0, atol=0)


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (1, 2), (-1, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["row", "none", "mean"])
@pytest.mark.parametrize("return_grad", [None, ("x", "y")], ids=["", "gradients"])
def test_vmap(capfd, dims, reduction, return_grad):
    """The members' own bits, in a batch too, and no word about speed."""
    x, y = (logits(4, 3, 5, seed=i) for i in range(2))
    batch = [t if d is None else t.movedim(0, d) for t, d in zip((x, y), dims, strict=True)]
    found = torch.func.vmap(lambda x, y: kl(x, y, reduction, axis=0, return_grad=return_grad), dims)(*batch)
    members = [[t if d is None else t[i] for t, d in zip((x, y), dims, strict=True)] for i in range(4)]
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
    """A tangent is never dropped in silence."""
    with pytest.raises(NotImplementedError, match=r"no derivatives in forward mode .* use reverse mode: vjp"):
        call(logits(3), logits(3, seed=1))


def test_second_derivatives_of_func():
    def twice(loss):
        return torch.func.jacrev(torch.func.jacrev(loss))(logits(3))

    y = logits(3, seed=1)
    with pytest.raises(RuntimeError, match="asks for a second one"):
        twice(lambda x: kl(x, y))
    found = twice(lambda x: klcore.divergence.loss("pytorch", x, y, space=("log_probs", "log_probs"), reduction="sum"))
    expected = twice(lambda x: torch.nn.functional.kl_div(y, x, reduction="sum", log_target=True))
    torch.testing.assert_close(found, expected)
