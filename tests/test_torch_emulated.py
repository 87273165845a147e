"""PyTorch's road to the GPU, without one: the emulator's GPU memory is the CPU's, so tensors there pass for CUDA's.

What PyTorch itself does on a GPU is asked in test_torch_cuda.py, where there is one.
"""

import importlib
import re
import types

import numpy as np
import pytest
from conftest import COMMON, DEVICES, DTYPES, computing_on, some_pairs
from test_estimate import tokens
from test_gradient import REDUCTIONS
from test_torch import array, kl, logits, operands, options, same, tensor
from test_torch_topk import OF_PROBS, WAYS, lists

import klcore
from klcore.operations import KL_DIV, Call

torch = pytest.importorskip("torch", reason="no PyTorch: its adapter is not tested")
adapter = importlib.import_module("klcore.backends.torch")
STREAM = 7
SAME = [(op, pair) for op in COMMON for pair in some_pairs(op) if pair[0] == pair[1]]


def pose_as_cuda(monkeypatch):
    """Make every tensor claim that it is on device 0, whose current stream is STREAM."""
    importlib.import_module("torch._dynamo")  # on its first import it would permanently record what tensors claim
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda t: False), raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True), raising=False)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda t: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=STREAM))


@pytest.fixture(scope="module")
def emulated():
    if "emulated" not in DEVICES:
        pytest.skip("the emulator is not among the devices of these tests")
    with computing_on("emulated") as device:
        yield device


@pytest.fixture
def posing(emulated, monkeypatch):
    pose_as_cuda(monkeypatch)
    return emulated


@pytest.mark.quick(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("operation", "space"), SAME)
def test_bits_of_cupy(emulated, monkeypatch, operation, space, reduction, dtype):
    """In every eager way: plain, with requested gradients, out=, backward."""
    tensors = operands(operation, space, dtype)
    keywords = options(operation, space, reduction=reduction, return_grad=COMMON[operation].gradients)
    function = getattr(klcore, operation)
    expected = tuple(map(emulated.get, function(*(emulated.put(array(t)) for t in tensors), **keywords)))
    pose_as_cuda(monkeypatch)
    found = function(*tensors, **keywords)
    for got, a in zip(found, expected, strict=True):
        same(got, a)
    out = tuple(torch.full_like(t, 7) for t in found)
    for got, given, a in zip(function(*tensors, **keywords, out=out), out, expected, strict=True):
        assert got is given
        same(got, a)
    out = (None, *out[1:])
    for got, a in zip(function(*tensors, **keywords, out=out), expected, strict=True):
        same(got, a)
    leaves = [t.clone().requires_grad_() for t in tensors]
    del keywords["return_grad"]
    same(function(*tensors, **keywords), expected[0])
    value = function(*leaves, **keywords)
    value.sum().backward()
    same(value.detach(), expected[0])
    for leaf, a in zip(leaves, expected[1:], strict=True):
        if reduction == "none" and "logits" in space:  # a separate cotangent for every term: another computation
            np.testing.assert_allclose(
                array(leaf.grad).astype(float), a.astype(float), rtol=2e-2 if dtype == "bfloat16" else 1e-5, atol=1e-6
            )
        else:
            same(leaf.grad, a)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", DTYPES)
def test_strides_and_numbers(posing, name):
    x = logits(4, 6).to(getattr(torch, name))
    whole = kl(x, [0.5] * 6, "row", weights=[1.0, 0.5, 0.0, 2.0], return_grad="x")
    for view in (x.T.contiguous().T, x.repeat_interleave(2, 1)[:, ::2], x.expand(2, 4, 6)[1]):
        for got, a in zip(
            kl(view, [0.5] * 6, "row", weights=[1.0, 0.5, 0.0, 2.0], return_grad="x"), whole, strict=True
        ):
            same(got, array(a))
    integers = torch.tensor([[1, 2, 3]])
    assert kl(integers, integers + 1).item() == 0


def test_nothing_to_compute(posing):
    x = logits(4, 6, dtype=torch.float32)[:0]
    value, dx, dy = kl(x, x.clone(), "row", return_grad=("x", "y"))
    assert (value.shape, dx.shape, dy.shape) == ((0,), (0, 6), (0, 6))
    assert torch.isnan(kl(x, x, "mean"))


def test_a_temperature_that_changes_in_place(posing):
    """Between two calls, and between a call and its backward."""
    x, y, temperature = logits(3, 5), logits(3, 5, seed=1), torch.tensor(2.0)
    gradients = []
    for value in (2.0, 4.0):
        temperature.fill_(value)
        leaf = y.clone().requires_grad_()
        result = kl(x, leaf, "row", temperature=temperature)
        same(result.detach(), array(kl(x, y, "row", temperature=value)))
        temperature.fill_(9.0)
        gradients.append(torch.autograd.grad(result.sum(), leaf)[0])
        same(gradients[-1], array(kl(x, y, "row", temperature=value, return_grad="y")[1]))
    kept = importlib.import_module("klcore.backends.cuda")._kept
    assert not any(isinstance(word, torch.Tensor) for words, *_ in kept for word in words)


@pytest.mark.quick(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("reduction", "n"), [("row", 2), ("none", 2), ("sum", 2), ("sum", 300), ("rowmean", 3000)])
def test_a_cotangent_of_zero(posing, reduction, n, dtype):
    """It gives 0, even for infinite derivatives; for a total within the kernels, for rows that share a warp, or do
    not."""
    x = torch.eye(2, n, dtype=getattr(torch, dtype), requires_grad=True)
    y = torch.full((2, n), 1 / n, dtype=x.dtype)
    (0 * klcore.kl_div(x, y, reduction=reduction)).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def calls():
    x, y = logits(6, 40, dtype=torch.float32), logits(6, 40, seed=1, dtype=torch.float32)
    weights = torch.arange(6) / 6
    for space in ("logits", ("log_probs", "logits")):
        for reduction in REDUCTIONS:
            yield x, y, {"space": space, "reduction": reduction, "weights": weights, "return_grad": ("x", "y")}
        yield x, y[:1], {"space": space, "return_grad": "y"}
        yield x.requires_grad_(), y, {"space": space, "reduction": "rowmean", "weights": weights > 0.3}
    best, indices = x.detach().softmax(-1).topk(3)
    for words in ({"return_grad": ("x", "y")}, {"reduction": "mean"}):
        words |= {"indices": indices, "tail": "bucket", "space": OF_PROBS}
        yield best.requires_grad_("reduction" in words), y, words


@pytest.mark.exhaustive
def test_all_memory_is_pytorchs(posing, monkeypatch):
    """A CUDA graph captured by PyTorch owns what PyTorch allocated meanwhile, and nothing else."""
    device = importlib.import_module("emulator.device")

    def refused(nbytes):
        raise AssertionError(f"{nbytes} bytes of CuPy's own")

    monkeypatch.setattr(device, "_Memory", refused)
    for x, y, keywords in calls():
        value = klcore.kl_div(x, y, **keywords)
        if "return_grad" not in keywords:
            value.backward()


def test_the_stream_is_pytorchs(posing, monkeypatch):
    device = importlib.import_module("emulator.device")
    seen, run = [], device.Function.__call__

    def watched(function, *arguments):
        seen.append(device._stream().ptr)
        run(function, *arguments)

    monkeypatch.setattr(device.Function, "__call__", watched)
    before = device._stream()
    for x, y, keywords in calls():
        value = klcore.kl_div(x, y, **keywords)
        if "return_grad" not in keywords:
            value.backward()
    assert set(seen) == {STREAM}
    assert device._stream() is before


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"reduction": "average"}, ("reduction", "'average'", "'rowmean'")),
        ({"return_grad": "z"}, ("return_grad", "'z'")),
        ({"space": "odds"}, ("space", "'odds'")),
        ({"axis": 2}, ("axis 2", "2 dimensions")),
        ({"temperature": 0}, ("temperature", "positive")),
        ({"y": torch.ones(2, 4)}, ("number of classes", "(2, 3)", "(2, 4)")),
        ({"y": torch.ones(5, 3)}, ("broadcast", "(2, 3)", "(5, 3)")),
        ({"weights": torch.ones(3)}, ("weights", "(3,)", "(2,)")),
    ],
)
@pytest.mark.parametrize("given", [False, True], ids=["", "out"])
def test_messages_of_numpy(posing, keywords, words, given):
    x, y = torch.ones(2, 3), keywords.get("y", torch.ones(2, 3))
    rest = (
        {"space": "logits"}
        | {k: v for k, v in keywords.items() if k != "y"}
        | ({"out": torch.ones(2)} if given else {})
    )
    with pytest.raises(ValueError, match=re.escape(words[0])) as raised:
        klcore.kl_div(x, y, **rest)
    assert [word for word in words if word not in str(raised.value)] == [], raised.value


def test_out_of_the_wrong_length(posing):
    x = torch.ones(2, 3)
    for out in ((torch.ones(2),), (None, None, None)):
        with pytest.raises(ValueError, match=r"tuple of 2 \(value, then gradients"):
            klcore.kl_div(x, x, return_grad="y", out=out)


def test_without_cupy(python):
    """Tensors and other libraries' arrays on a GPU, without CuPy: the error says what to install."""
    code = """
import sys, types
sys.modules["cupy"] = None
import torch, klcore
torch.Tensor.is_cpu, torch.Tensor.is_cuda = property(lambda t: False), property(lambda t: True)
torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=0)
class Foreign:
    shape = (3,)
    def __dlpack_device__(self): return 2, 0
    def __dlpack__(self, **keywords): raise AssertionError("asked for its memory")
x = torch.ones(2, 3)
leaf = torch.ones(2, 3, requires_grad=True)
calls = (
    lambda: klcore.kl_div(x, x),
    lambda: klcore.kl_div(leaf, x),
    lambda: klcore.kl_div(x, x, out=torch.ones(2)),
    lambda: klcore.compat.pytorch.kl_div(x, x, reduction="sum"),
    lambda: klcore.kl_div(Foreign(), Foreign()),
)
import klcore.compat.pytorch
for call in calls:
    try:
        call()
    except klcore.BackendUnavailableError as error:
        assert "CuPy" in str(error) and "pip install 'klcore[cuda13]'" in str(error), error
    else:
        raise AssertionError("computed somewhere else")
print("named")
"""
    assert python(code).strip() == "named"


CUPY_ITSELF = """
import importlib.util, types, warnings
if not importlib.util.find_spec("cupy"):
    print("no CuPy")
    raise SystemExit
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it finds no CUDA
    import cupy
import numpy as np, torch
from klcore.backends import cuda
from klcore.backends.cuda import devices
from klcore.backends.torch import memory
assert cupy.cuda.Stream.from_external(devices._Foreign(7)).ptr == 7
cuda.ready = lambda: cupy
torch.Tensor.is_cpu, torch.Tensor.is_cuda = property(lambda t: False), property(lambda t: True)
torch.Tensor.get_device = lambda t: 0
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool):
    t = torch.ones(4, 6).to(dtype)
    for view in (t, t.T, t[1:, ::2], t.expand(3, 4, 6), t[:0], t[0, 0]):
        a = memory.lend(view)
        strides = tuple(view.element_size() * step for step in view.stride())
        assert type(a) is cupy.ndarray
        assert (a.data.ptr, a.shape, a.strides) == (view.data_ptr(), tuple(view.shape), strides)
        assert a.dtype.name == str(dtype).removeprefix("torch.")
        assert (a.data.device_id, a.data.mem._owner.data_ptr()) == (0, view.data_ptr())
print("lent")
"""


def test_memory_as_cupy_itself_takes_it(python):
    """CuPy creates arrays over foreign memory without a driver; nothing here comes from the emulator."""
    said = python(CUPY_ITSELF).strip()
    if said == "no CuPy":
        pytest.skip("not run: CuPy is not installed")
    assert said == "lent"


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_estimates(emulated, monkeypatch, reduction):
    """For tokens, with weights and ratios, and a denominator on the device: the bits of CuPy's arrays."""
    x, y = tokens((30, 40), dtype="float32")
    arrays = {"weights": x > -2, "ratio": np.exp(x)}
    if reduction == "sum":
        arrays["denominator"] = np.array(3.0)
    options = {"reduction": reduction, "limit": 2.0}
    there = {name: emulated.put(a) for name, a in arrays.items()}
    found = klcore.kl_estimate(emulated.put(x), emulated.put(y), **there, **options, return_grad=("x", "y"))
    expected = tuple(map(emulated.get, found))
    pose_as_cuda(monkeypatch)
    tensors = {name: torch.tensor(a) for name, a in arrays.items()}
    x, y = (torch.tensor(a, requires_grad=True) for a in (x, y))
    asked = klcore.kl_estimate(x.detach(), y.detach(), **tensors, **options, return_grad=("x", "y"))
    for got, a in zip(asked, expected, strict=True):
        same(got, a)
    value = klcore.kl_estimate(x, y, **tensors, **options)
    same(value.detach(), expected[0])
    value.backward(torch.ones_like(value))
    np.testing.assert_allclose(x.grad, expected[1], rtol=1e-6)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("way", "reduction", "dtype"),
    [(0, "row", "float32"), (1, "mean", "bfloat16"), (2, "none", "float32"), (3, "none", "bfloat16")],
)
def test_lists_of_classes(emulated, monkeypatch, way, reduction, dtype):
    """The bits of CuPy's arrays; with weights and one temperature per row, which stay where they are."""
    (tail, mass), (x, y, indices) = WAYS[way], lists(OF_PROBS, getattr(torch, dtype))
    tensors = {"weights": torch.tensor([1.0, 0.5, 0.0, 2.0]), "temperature": torch.tensor([0.5, 2.0, 1.0, 3.0])}
    tensors |= {"indices": indices} | ({} if mass is None else {"tail_mass": mass})
    options = {"space": OF_PROBS, "tail": tail, "reduction": reduction}
    there = {name: emulated.put(array(t)) for name, t in tensors.items()}
    both = (emulated.put(array(t)) for t in (x, y))
    expected = tuple(map(emulated.get, klcore.kl_div(*both, **there, **options, return_grad=("x", "y"))))
    pose_as_cuda(monkeypatch)
    found = klcore.kl_div(x, y, **tensors, **options, return_grad=("x", "y"))
    out = tuple(torch.full_like(t, 7) for t in found)
    into = klcore.kl_div(x, y, **tensors, **options, return_grad=("x", "y"), out=out)
    for got, given, written, a in zip(found, into, out, expected, strict=True):
        assert given is written
        same(got, a)
        same(given, a)
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    value = klcore.kl_div(*leaves, **tensors, **options)
    value.sum().backward()
    same(value.detach(), expected[0])
    for leaf, a in zip(leaves, expected[1:], strict=True):
        if reduction == "none":  # a separate cotangent for every term: another computation
            torch.testing.assert_close(leaf.grad, tensor(a))
        else:
            same(leaf.grad, a)


def test_lists_that_are_no_lists(posing):
    """Nothing waits for a GPU to validate numbers: such a row is NaN."""
    x, y, indices = lists(OF_PROBS)
    indices[1, 0] = 9
    value, dx, dy = klcore.kl_div(x, y, indices=indices, tail="bucket", space=OF_PROBS, return_grad=("x", "y"))
    for result in (value, dx, dy):
        assert torch.isnan(result[1]).all()
        assert not torch.isnan(result[[0, 2, 3]]).any()


@pytest.mark.quick(1)
@pytest.mark.parametrize("reduction", ["row", "sum"])
def test_shards_of_the_classes(posing, reduction):
    """The operators of DTensors, with two shards: the values and gradients of whole rows, exactly or within a
    rounding."""
    sharded = importlib.import_module("klcore.backends.torch.sharded")
    x, y = logits(3, 1500), logits(3, 1500) * 0.9
    whole = klcore.kl_div(x, y, space="logits", reduction=reduction, return_grad=("x", "y"), weights=[1.0, 0.0, 2.0])
    ops, parts, counts = torch.ops.klcore, [(x[:, k], y[:, k]) for k in (slice(0, 1024), slice(1024, 1500))], [1, 1]
    calls = [
        sharded.operator.arguments_of(Call(KL_DIV, *part, "logits", -1, reduction, torch.tensor([1.0, 0.0, 2.0])))
        for part in parts
    ]
    states = [ops.states.default(*call, 0, None, True, True, 1) for call in calls]
    stats = [ops.merged.default(*call, 0, None, torch.cat(states, -1), counts) for call in calls]
    for call, known in zip(calls, stats, strict=True):
        torch.testing.assert_close(ops.value_of_stats.default(*call, known), whole[0], rtol=1e-15, atol=0)
    summed = [(*call[:6], "sum", *call[7:]) for call in calls]
    pairs = [
        ops.gradients_of_stats.default(*c, s, torch.ones(()), True, True) for c, s in zip(summed, stats, strict=True)
    ]
    for k, g in enumerate(whole[1:]):
        same(torch.cat([pair[k] for pair in pairs], -1), array(g))
