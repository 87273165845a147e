"""examples/linear_distillation.py: values and gradients of PyTorch's own functions, and no more memory than it says."""

import functools
import importlib
import math
from pathlib import Path

import pytest
from conftest import DEVICES

import klcore

torch = pytest.importorskip("torch", reason="PyTorch is not installed here")
EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.exists():
    pytest.skip("no examples beside the tests: these are of an installed package", allow_module_level=True)

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn import functional as F  # noqa: E402

ROWS, FEATURES, CLASSES, TILE = 23, 8, 61, 13  # none is a multiple of another
CHUNK = 5 * 2 * CLASSES * 4  # bytes of five rows of float32


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("linear_distillation")
    monkeypatch.setattr(module, "TILE", TILE)
    return module


def sides(example, dtype, bias=False, softcap=None, device="cpu"):
    """A teacher with another number of features, a student that learns, and labels, some of which are padding."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    def side(features):
        return example.Side(
            normal(ROWS, features), normal(CLASSES, features), normal(CLASSES) if bias else None, softcap
        )

    teacher, student = side(2 * FEATURES), side(FEATURES)
    labels = torch.arange(ROWS, device=device)
    labels[::4] = example.PADDING
    return teacher, student._replace(**{n: t.requires_grad_() for n, t in parts(student)}), labels


def parts(side):
    return [(name, t) for name, t in side._asdict().items() if torch.is_tensor(t)]


def gradients(value, side):
    return torch.autograd.grad(value, [t for _, t in parts(side)])


def plain(teacher, student, labels, divergence, temperature=1.0):
    """All logits at once, by PyTorch's functions."""
    logs = []
    for side in (teacher, student):
        logits = F.linear(side.hidden, side.weight, side.bias)
        logits = logits if side.softcap is None else side.softcap * torch.tanh(logits / side.softcap)
        logs.append(F.log_softmax(logits[labels != -100] / temperature, -1))
    return divergence(*logs)


def kl(x, y):
    return F.kl_div(y, x, reduction="batchmean", log_target=True)


def js(x, y, beta=0.1):
    m = torch.logaddexp(x + math.log(beta), y + math.log1p(-beta))
    return beta * kl(x, m) + (1 - beta) * kl(y, m)


DIVERGENCES = {
    "kl": (klcore.kl_div, kl, 1.0),
    "js": (functools.partial(klcore.js_div, beta=0.1, temperature=2.0), js, 2.0),
}


def widened(side):
    """The same numbers in float64."""
    return side._replace(**{name: t.detach().double().requires_grad_() for name, t in parts(side)})


@pytest.mark.parametrize("device", [name for name in DEVICES if name != "emulated"])  # which PyTorch supports
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, 5.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_value_and_gradients(example, device, dtype, bias, softcap, name):
    divergence, reference, temperature = DIVERGENCES[name]
    teacher, student, labels = sides(example, dtype, bias, softcap, device)
    value = example.linear_divergence(teacher, student, labels, divergence=divergence, chunk_bytes=CHUNK)
    found = gradients(3 * value, student)
    wide = widened(student)
    expected = plain(widened(teacher), wide, labels, reference, temperature)
    eps = torch.finfo(dtype).eps
    assert value.dtype is torch.promote_types(dtype, torch.float32)
    assert value.item() == pytest.approx(expected.item(), rel=max(1e-12, 20 * torch.finfo(value.dtype).eps))
    for g, e, (_, t) in zip(found, gradients(3 * expected, wide), parts(student), strict=True):
        assert g.dtype is t.dtype
        assert (g.double() - e).abs().max() <= max(1e-12, 8 * eps) * e.abs().max()


def test_gradients_of_the_layer_are_added_up_in_float32(example):
    """One chunk per row: sums of bfloat16 numbers would be off by much more than one rounding."""
    teacher, student, labels = sides(example, torch.bfloat16)
    found = gradients(example.linear_divergence(teacher, student, labels, chunk_bytes=1), student)
    whole = gradients(example.linear_divergence(teacher, student, labels), student)
    wide = widened(student)
    expected = gradients(plain(widened(teacher), wide, labels, kl), wide)
    for g, w, e in zip(found, whole, expected, strict=True):
        for each in (g, w):
            torch.testing.assert_close(each.double(), e, rtol=2**-8, atol=1e-5 * float(e.abs().max()))


def test_padded_rows_are_not_multiplied(example, monkeypatch):
    """Nor read. Their gradient is 0. A mask works like labels, with any batch shape."""
    teacher, student, labels = sides(example, torch.float32)
    expected = example.linear_divergence(teacher, student, labels)
    of_student = gradients(expected, student)
    kept, rows = labels != example.PADDING, []
    product = example.product
    monkeypatch.setattr(example, "product", lambda a, b, out=None: rows.append(len(a)) or product(a, b, out))
    with torch.no_grad():
        teacher.hidden[~kept] = torch.nan
        student.hidden[~kept] = torch.nan
        batch = [side._replace(hidden=side.hidden.view(1, ROWS, -1)) for side in (teacher, student)]
        assert example.linear_divergence(*batch, kept[None]) == expected
    assert rows == [int(kept.sum())] * len(rows)
    found = gradients(example.linear_divergence(teacher, student, kept), student)
    for g, e in zip(found, of_student, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=0)
    assert (found[0][~kept] == 0).all()


def test_nothing_but_padding(example):
    teacher, student, labels = sides(example, torch.float32, bias=True, softcap=3.0)
    value = example.linear_divergence(teacher, student, torch.full_like(labels, example.PADDING))
    assert value == 0
    assert all((g == 0).all() for g in gradients(value, student))


@pytest.mark.parametrize("wrong", ["a row less", "a mask of floats", "rows of the teacher"])
def test_refused(example, wrong):
    teacher, student, labels = sides(example, torch.float32)
    labels = labels[1:] if wrong == "a row less" else labels.float() if "floats" in wrong else labels
    if wrong == "rows of the teacher":
        teacher = teacher._replace(hidden=torch.cat([teacher.hidden, teacher.hidden]))
    with pytest.raises(ValueError, match="one per row of both sides"):
        example.linear_divergence(teacher, student, labels)


def test_parts_of_a_batch(example):
    """Divided by the number of all rows, they add up to the whole."""
    teacher, student, labels = sides(example, torch.float64)
    whole = example.linear_divergence(teacher, student, labels)
    n = (labels != example.PADDING).sum()
    total = 0
    for rows in torch.arange(ROWS).split(9):
        pair = (side._replace(hidden=side.hidden[rows]) for side in (teacher, student))
        total += example.linear_divergence(*pair, labels[rows], denominator=n)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(gradients(total, student), gradients(whole, student))


@pytest.mark.parametrize("learning", [(), ("hidden",), ("weight",), ("bias",)], ids=str)
def test_only_what_learns_has_a_gradient(example, learning):
    teacher, student, labels = sides(example, torch.float32, bias=True)
    teacher = teacher._replace(weight=teacher.weight.requires_grad_())
    whole = gradients(example.linear_divergence(teacher, student, labels), student)
    expected = {name: g for (name, _), g in zip(parts(student), whole, strict=True)}
    student = student._replace(**{name: t.detach().requires_grad_(name in learning) for name, t in parts(student)})
    value = example.linear_divergence(teacher, student, labels)
    assert value.requires_grad == bool(learning)
    if learning:
        value.backward()
    for name, t in parts(student):
        if name in learning:
            torch.testing.assert_close(t.grad, expected[name], rtol=0, atol=0)
        else:
            assert t.grad is None
    assert teacher.weight.grad is None


def test_without_gradients_there_are_only_the_logits(example, monkeypatch):
    teacher, student, labels = sides(example, torch.float32, softcap=5.0)
    expected, products, product = example.linear_divergence(teacher, student, labels), [], example.product
    monkeypatch.setattr(example, "product", lambda a, b, out=None: products.append(b.shape) or product(a, b, out))
    with torch.no_grad():
        value = example.linear_divergence(teacher, student, labels)
    assert value == expected
    assert not value.requires_grad
    assert len(products) == 2 * math.ceil(CLASSES / TILE)


def test_backward_once(example):
    """Its gradients are multiplied in place, and cannot be returned twice."""
    value = example.linear_divergence(*sides(example, torch.float32))
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_autocast_changes_nothing(example):
    arguments = sides(example, torch.float32)
    expected = example.linear_divergence(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        value = example.linear_divergence(*arguments)
    assert value == expected
    for found in (gradients(value, arguments[1]), gradients(expected, arguments[1])):
        assert all(g.dtype is torch.float32 for g in found)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_memory(example, softcap):
    """Chunks have the requested size, and use the same memory one after the other, where y becomes its gradient."""
    seen = []

    def divergence(x, y, out, **options):
        seen.append([x, y, out[1]])
        return klcore.kl_div(x, y, out=out, **options)

    teacher, student, labels = sides(example, torch.float32, softcap=softcap)
    example.linear_divergence(teacher, student, labels, divergence=divergence, chunk_bytes=CHUNK)
    places = {tuple(t.data_ptr() for t in call) for call in seen}
    different = {t.data_ptr(): t.nbytes for t in seen[0]}
    assert len(places) == 1
    assert len(different) == (2 if softcap is None else 3)
    assert CHUNK - len(different) * 4 * CLASSES < sum(different.values()) <= CHUNK
    assert sum(len(x) for x, _, _ in seen) == (labels != example.PADDING).sum()


def test_products_on_a_gpu(example, monkeypatch):
    """16-bit matrices are not widened there. PyTorch has fake GPU tensors, which need no GPU."""
    mm, seen = torch.mm, []
    monkeypatch.setattr(torch, "mm", lambda a, b, **options: seen.append((a.dtype, b.dtype)) or mm(a, b, **options))
    with FakeTensorMode():
        a, b = torch.empty(3, 4, device="cuda"), torch.empty(4, 5, device="cuda", dtype=torch.bfloat16)
        assert example.product(a, b).dtype is torch.float32
    assert seen == [(torch.bfloat16, torch.bfloat16)]


def test_vocabularies_that_differ(example):
    teacher, student, labels = sides(example, torch.float32)
    with pytest.raises(ValueError, match="classes"):
        example.linear_divergence(teacher, student._replace(weight=student.weight[:-1]), labels)
