"""klcore.compat.trl and klcore.compat.liger against their formulas, written out in PyTorch and float64.

Where klcore decided to differ from the originals, the test is called deviation.
"""

import copy
import inspect
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch", reason="not run: PyTorch is not installed")

from klcore.compat import liger, trl  # noqa: E402

BETAS = (0, 0.1, 0.5, 0.9, 1)
DTYPES = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
LABELS = {
    "no labels": None,
    "none left out": [[3, 1, 4], [1, 5, 0]],
    "some left out": [[-100, 1, 4], [-100, -100, 0]],
    "all left out": [[-100] * 3] * 2,
}


def logits(*shape, seed, dtype="float64"):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * numbers).to(getattr(torch, dtype))


def student(dtype="float64"):
    return logits(2, 3, 7, seed=1, dtype=dtype).requires_grad_()


def teacher(dtype="float64"):
    return logits(2, 3, 7, seed=2, dtype=dtype).requires_grad_()


def labels_of(name):
    return None if LABELS[name] is None else torch.tensor(LABELS[name])


# ---- the formulas ----------------------------------------------------------------------------------------------------


def divergence(log_p, log_q):
    return log_p.exp() * (log_p - log_q)


def jensen_shannon(log_q, log_p, beta):
    """Terms, of the student's and the teacher's log-probabilities."""
    if beta == 0:
        return divergence(log_p, log_q)
    if beta == 1:
        return divergence(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * divergence(log_p, log_m) + (1 - beta) * divergence(log_q, log_m)


def reduced(terms, reduction, kept, first):
    """`kept`: a mask of rows, or None; `first`: what "batchmean" divides by where there is none."""
    rows = terms.reshape(-1, terms.shape[-1])
    if kept is not None:
        rows, first = rows[kept.reshape(-1)], max(int(kept.sum()), 1)
    if reduction == "none":
        return terms if kept is None else rows
    return {"sum": rows.sum(), "mean": rows.mean(), "batchmean": rows.sum() / first}[reduction]


def gradients(value, *leaves):
    """With a different cotangent for each number."""
    cotangent = torch.linspace(1, 2, value.numel(), dtype=torch.float64).reshape(value.shape).to(value.dtype)
    return torch.autograd.grad(value, leaves, cotangent, retain_graph=True)


def compare(found, expected, tolerance):
    torch.testing.assert_close(
        found.detach().double(), expected.detach().double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def wide(*tensors):
    """The dtype of the formulas."""
    return [t.detach().double().requires_grad_() for t in tensors]


# ---- TRL -------------------------------------------------------------------------------------------------------------


def of_trl(s, t, labels, beta=0.5, temperature=1.0, reduction="batchmean", num_items_in_batch=None):
    terms = jensen_shannon((s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1), beta)
    kept = None if labels is None else labels != -100
    if num_items_in_batch is not None:
        return reduced(terms, "sum", kept, 1) / num_items_in_batch
    return reduced(terms, reduction, kept, terms.shape[0])


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("beta", BETAS)
def test_trl(beta, reduction, labels):
    s, t, labels = student(), teacher(), labels_of(labels)
    for temperature in (1, 0.7, 3.0):
        found = trl.generalized_jsd_loss(s, t, labels, beta, temperature, reduction)
        expected = of_trl(s, t, labels, beta, temperature, reduction)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        compare(found, expected, 1e-12)
        if not expected.isnan().any():  # the mean of nothing
            for got, wanted in zip(gradients(found, s, t), gradients(expected, s, t), strict=True):
                compare(got, wanted, 1e-12)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("items", [5, 2.5, torch.tensor(5), torch.tensor(5.0), torch.tensor(5, dtype=torch.int32)])
def test_trl_items_win(items, labels):
    s, t, labels = student(), teacher(), labels_of(labels)
    for reduction in ("batchmean", "none", "whatever"):
        found = trl.generalized_jsd_loss(s, t, labels, 0.1, 1.0, reduction, items)
        expected = of_trl(s, t, labels, 0.1, num_items_in_batch=float(items))
        compare(found, expected, 1e-12)
        compare(*(gradients(value, s)[0] for value in (found, expected)), 1e-12)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
def test_trl_two_axes(reduction):
    """Without labels "batchmean" divides by the first axis, even if that is tokens."""
    s, t = logits(5, 7, seed=1), logits(5, 7, seed=2)
    compare(trl.generalized_jsd_loss(s, t, reduction=reduction), of_trl(s, t, None, reduction=reduction), 1e-12)
    labels = torch.tensor([-100, 1, 2, -100, 3])
    found = trl.generalized_jsd_loss(s, t, labels, reduction=reduction)
    compare(found, of_trl(s, t, labels, reduction=reduction), 1e-12)


def test_trl_shifted():
    """As GKDTrainer calls it: views, and keywords."""
    s, t, labels = student(), teacher(), labels_of("some left out")
    found = trl.generalized_jsd_loss(
        student_logits=s[:, :-1, :],
        teacher_logits=t[:, :-1, :],
        labels=labels[:, 1:],
        beta=0.5,
        num_items_in_batch=torch.tensor(4),
    )
    compare(found, of_trl(s[:, :-1], t[:, :-1], labels[:, 1:], num_items_in_batch=4), 1e-12)


def test_trl_nothing_left():
    for reduction, expected in (("batchmean", 0), ("sum", 0), ("mean", torch.nan)):
        s = student("float32")
        value = trl.generalized_jsd_loss(s, teacher("float32"), labels_of("all left out"), reduction=reduction)
        compare(value, torch.tensor(expected), 0)
        if reduction != "mean":
            value.backward()
            assert not s.grad.any()
    empty = torch.zeros(0, 3, 7)
    assert trl.generalized_jsd_loss(empty, empty) == 0
    assert trl.generalized_jsd_loss(empty, empty, reduction="mean").isnan()
    assert trl.generalized_jsd_loss(empty, empty, reduction="none").shape == (0, 3, 7)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_trl_dtypes(dtype, beta, reduction):
    """Computed in float32 or float64, and rounded once."""
    s, t, labels = student(dtype), teacher(dtype), labels_of("some left out")
    found = trl.generalized_jsd_loss(s, t, labels, beta, reduction=reduction)
    assert found.dtype == s.dtype
    a, b = wide(s, t)
    expected = of_trl(a, b, labels, beta, reduction=reduction)
    compare(found, expected, DTYPES[dtype])
    (got,) = torch.autograd.grad(found.sum(), s)
    assert got.dtype == s.dtype
    compare(got, torch.autograd.grad(expected.sum(), a)[0], DTYPES[dtype])


def test_trl_dtypes_of_two():
    halves = student("bfloat16"), teacher("float16")
    assert trl.generalized_jsd_loss(*halves).dtype == torch.float32
    assert trl.generalized_jsd_loss(student("bfloat16"), teacher("float64")).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trl.generalized_jsd_loss(student("bfloat16"), teacher("bfloat16")).dtype == torch.float32


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trl_close_rows_deviation(dtype, beta):
    """The original rounds its terms, and returns values of either sign."""
    t = logits(64, 1000, seed=1, dtype=dtype)
    assert trl.generalized_jsd_loss(t, t.clone(), beta=beta) == 0
    s = (t.float() + 1e-4 * logits(64, 1000, seed=2, dtype="float32")).to(t.dtype)
    for a, b in zip(s, t, strict=True):
        assert trl.generalized_jsd_loss(a, b, beta=beta, reduction="sum") >= 0
    a, b = wide(s, t)
    found = trl.generalized_jsd_loss(s.float(), t.float(), beta=beta)
    torch.testing.assert_close(found.double(), of_trl(a, b, None, beta).detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_trl_excluded_classes_deviation(beta):
    """The original returns NaN, and so do its gradients."""
    s, t = student("float32"), teacher("float32")
    excluded = torch.tensor([False] * 5 + [True] * 2)
    masked = [x.masked_fill(excluded, -torch.inf) for x in (s, t)]
    value = trl.generalized_jsd_loss(*masked, beta=beta)
    compare(value, trl.generalized_jsd_loss(s[..., :5], t[..., :5], beta=beta), 1e-6)
    value.backward()
    assert s.grad.isfinite().all()
    assert of_trl(*masked, None, beta).isnan()


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_trl_left_out_may_be_anything_deviation(reduction):
    """The original's value does not depend on them, but its gradient is NaN."""
    s, labels = student("float32"), labels_of("some left out")
    hidden = s.masked_fill((labels == -100)[..., None], torch.nan)
    value = trl.generalized_jsd_loss(hidden, teacher("float32"), labels, reduction=reduction)
    compare(value, trl.generalized_jsd_loss(s, teacher("float32"), labels, reduction=reduction), 0)
    value.sum().backward()
    assert s.grad.isfinite().all()


def test_trl_beta_is_not_rounded_deviation():
    """The original rounds beta to the dtype of the logits: 0.10009765625 in bfloat16."""
    s, t = student("bfloat16"), teacher("bfloat16")
    with torch.autocast("cpu", dtype=torch.bfloat16):  # for a result in float32
        found = trl.generalized_jsd_loss(s, t, beta=0.1)
    s, t = wide(s, t)
    compare(found, of_trl(s, t, None, 0.1), 1e-6)
    assert not torch.isclose(found.double(), of_trl(s, t, None, float(torch.tensor(0.1).bfloat16())), rtol=1e-4)


S, T = torch.zeros(2, 3, 7), torch.ones(2, 3, 7)


@pytest.mark.parametrize(
    ("arguments", "words", "error", "message"),
    [
        ((S.numpy(), T), {}, TypeError, "student_logits must be a torch.Tensor, found ndarray"),
        ((S, T.tolist()), {}, TypeError, "teacher_logits must be a torch.Tensor, found list"),
        ((S, T, [[1, 2, 3]] * 2), {}, TypeError, "labels must be a torch.Tensor, found list"),
        ((S, T[:1]), {}, RuntimeError, r"the same shape, \(..., classes\); found \(2, 3, 7\) and \(1, 3, 7\)"),
        ((S, T[..., :6]), {}, RuntimeError, "the same shape"),
        ((S[0, 0, 0], T[0, 0, 0]), {}, RuntimeError, "the same shape"),
        ((S, T, torch.ones(2)), {}, IndexError, r"labels must have one label per token, shape \(2, 3\); found \(2,\)"),
        ((S, T), {"reduction": "batch"}, ValueError, "reduction must be one of 'batchmean', 'sum', 'mean', 'none'"),
        ((S, T), {"reduction": None}, ValueError, "reduction must be one of"),
        ((S, T), {"beta": -0.1}, ValueError, r"beta must be in \[0, 1\]; found -0.1"),
        ((S, T), {"beta": 1.5}, ValueError, "beta must be in"),
        ((S, T), {"beta": float("nan")}, ValueError, "beta must be in"),
        ((S, T), {"beta": 1e-21}, ValueError, "at least 1e-20"),
        ((S, T), {"beta": None}, TypeError, "beta must be a number"),
        ((S, T), {"temperature": 0}, ValueError, "temperature"),
        ((S, T), {"num_items_in_batch": torch.ones(2)}, ValueError, "num_items_in_batch must be a number or a 0-d"),
        ((S, T), {"num_items_in_batch": -1}, ValueError, ">= 0"),
    ],
)
def test_trl_refuses(arguments, words, error, message):
    with pytest.raises(error, match=message):
        trl.generalized_jsd_loss(*arguments, **words)


# ---- Liger-Kernel ----------------------------------------------------------------------------------------------------

ROWS = {name: None if rows is None else rows[0] + rows[1] for name, rows in LABELS.items()}


def log_probs(seed, dtype="float64"):
    return logits(6, 7, seed=seed).log_softmax(-1).to(getattr(torch, dtype)).requires_grad_()


def probs(seed, dtype="float64"):
    return logits(6, 7, seed=seed).softmax(-1).to(getattr(torch, dtype)).requires_grad_()


def rows_of(name):
    """(labels, mask)."""
    labels = None if ROWS[name] is None else torch.tensor(ROWS[name])
    return labels, None if labels is None else labels != -100


def teachers_have_none(value, first, second):
    assert torch.autograd.grad(value.sum(), second, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(value.sum(), first, retain_graph=True)[0].shape == first.shape


@pytest.mark.parametrize("labels", ROWS)
@pytest.mark.parametrize("beta", BETAS)
def test_liger_jsd(beta, labels):
    log_q, log_p = log_probs(1), log_probs(2)
    labels, kept = rows_of(labels)
    found = liger.LigerJSD(beta)(log_q, log_p, labels)
    terms = jensen_shannon(log_q, log_p, beta)
    compare(found, reduced(terms, "batchmean", kept, 6), 1e-12)
    teachers_have_none(found, log_q, log_p)
    # the original's derivative, which is that of its terms
    q, p = log_q.exp(), log_p.exp()
    by_input = {0: -p, 1: q * (log_q - log_p) + q}.get(beta)
    if by_input is None:
        by_input = (1 - beta) * q * (log_q - (beta * p + (1 - beta) * q).log())
    weights = torch.ones(6) if kept is None else kept
    (grad,) = torch.autograd.grad(3 * found, log_q)
    compare(grad, 3 * by_input * weights[:, None] / max(float(weights.sum()), 1), 1e-12)
    assert torch.equal(liger.liger_jsd(log_q, log_p, labels, beta), found)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_liger_jsd_dtypes(dtype, beta):
    log_q, log_p = log_probs(1, dtype), log_probs(2, dtype)
    found = liger.liger_jsd(log_q, log_p, beta=beta)
    a, b = wide(log_q, log_p)
    expected = reduced(jensen_shannon(a, b, beta), "batchmean", None, 6)
    assert found.dtype == log_q.dtype
    compare(found, expected, DTYPES[dtype])
    grad = torch.autograd.grad(found, log_q)[0]
    assert grad.dtype == log_q.dtype
    compare(grad, torch.autograd.grad(expected, a)[0], DTYPES[dtype])
    assert liger.liger_jsd(log_q.float(), log_p.double(), beta=beta).dtype == torch.float32


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_liger_jsd_of_close_rows_deviation(beta):
    """The original rounds its terms, and returns values of either sign."""
    log_p = logits(64, 1000, seed=1, dtype="float32").log_softmax(-1)
    assert liger.liger_jsd(log_p, log_p.clone(), beta=beta) == 0
    log_q = log_p + 1e-5 * logits(64, 1000, seed=2, dtype="float32")
    for a, b in zip(log_q.split(1), log_p.split(1), strict=True):
        assert liger.liger_jsd(a, b, beta=beta) >= 0


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9])
def test_liger_jsd_of_zeros_deviation(beta):
    """The original has NaN from 0 log 0; the true value for beta = 1 is infinite."""
    p, q = torch.tensor([[0.0, 0.5, 0.5]]), torch.tensor([[0.25, 0.25, 0.5]], requires_grad=True)
    found = liger.liger_jsd(q.log(), p.log(), beta=beta)
    tiny = torch.tensor([[1e-300, 0.5, 0.5]], dtype=torch.float64)
    compare(found, jensen_shannon(q.double().log(), tiny.log(), beta).sum(), 1e-6)
    found.backward()
    assert q.grad.isfinite().all()
    excluded = torch.tensor([[0.0, 1.0]]).log()
    assert liger.liger_jsd(excluded, excluded, beta=beta) == 0


@pytest.mark.parametrize("labels", ROWS)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
def test_liger_tvd(reduction, labels):
    p, q = probs(1), probs(2)
    labels, kept = rows_of(labels)
    found = liger.LigerTVDLoss(reduction)(p, q, labels)
    terms = (p - q).abs() / 2
    terms = terms if kept is None else torch.where(kept[:, None], terms, 0.0)
    left = 6 if kept is None else max(int(kept.sum()), 1)
    expected = {"sum": terms.sum(), "batchmean": terms.sum() / left, "mean": terms.sum() / (7 * left), "none": terms}
    compare(found, expected[reduction], 1e-14)
    compare(gradients(found, p)[0], gradients(expected[reduction], p)[0], 1e-14)
    teachers_have_none(found, p, q)
    assert torch.equal(liger.liger_tvd(p, q, labels, reduction), found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_liger_tvd_dtypes(dtype):
    p, q = probs(1, dtype), probs(2, dtype)
    for reduction in ("batchmean", "none"):
        found = liger.liger_tvd(p, q, reduction=reduction)
        assert found.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        terms = (p.detach().double() - q.detach().double()).abs() / 2  # 16-bit inputs were rounded before
        compare(found, reduced(terms, reduction, None, 6), 1e-6)
        assert torch.autograd.grad(found.sum(), p)[0].dtype == p.dtype


def test_liger_tvd_of_equal_numbers_deviation():
    """The original's derivative is -1/2 where p = q, and it subtracts 16-bit numbers in 16 bits."""
    p = torch.tensor([[0.25, 0.25, 0.5]], requires_grad=True)
    q = torch.tensor([[0.25, 0.5, 0.25]])
    liger.liger_tvd(p, q, reduction="sum").backward()
    assert p.grad.tolist() == [[0.0, -0.5, 0.5]]
    assert liger.liger_tvd(torch.tensor([[-0.1, 1.1]]), torch.tensor([[0.5, 0.5]])).isnan()


def test_liger_tvd_nothing_left_deviation():
    """The original raises ZeroDivisionError for the means, which asks the GPU for the count."""
    p = probs(1)
    value = liger.LigerTVDLoss()(p, probs(2), torch.full((6,), -100))
    value.backward()
    assert value == 0
    assert not p.grad.any()


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
def test_liger_kl_div(reduction, log_target):
    log_q, target = log_probs(1), (log_probs if log_target else probs)(2)
    log_p = target if log_target else target.log()
    found = liger.LigerKLDIVLoss(reduction=reduction, log_target=log_target)(log_q, target)
    expected = reduced(divergence(log_p, log_q), reduction, None, 6)
    compare(found, expected, 1e-12)
    compare(gradients(found, log_q)[0], gradients(expected, log_q)[0], 1e-12)
    teachers_have_none(found, log_q, target)
    assert torch.equal(liger.liger_kl_div(log_q, target, reduction=reduction, log_target=log_target), found)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_liger_kl_div_dtypes(dtype, log_target):
    log_q, target = log_probs(1, dtype), (log_probs if log_target else probs)(2, dtype)
    a, b = wide(log_q, target)
    for reduction in ("batchmean", "none"):
        found = liger.liger_kl_div(log_q, target, reduction=reduction, log_target=log_target)
        assert found.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        expected = reduced(divergence(b if log_target else b.log(), a), reduction, None, 6)
        compare(found, expected, 2e-6)
        grad = torch.autograd.grad(found.sum(), log_q)[0]
        assert grad.dtype == log_q.dtype
        compare(grad, torch.autograd.grad(expected.sum(), a)[0], DTYPES[dtype])


def test_liger_kl_div_epsilon_deviation():
    """It would add at most eps/e per class; klcore does not need it."""
    target = torch.tensor([[0.0, 1e-11, 1 - 1e-11]], dtype=torch.float64)
    log_q = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log()
    found = liger.liger_kl_div(log_q, target, reduction="sum")
    with_epsilon = (target * (target.clamp_min(1e-10).log() - log_q)).sum()
    compare(found, torch.special.xlogy(target, target).sum() - (target * log_q).sum(), 1e-15)
    assert 0 < with_epsilon - found < 1e-10 / 2.7
    assert torch.equal(liger.LigerKLDIVLoss(eps=0.1, reduction="sum")(log_q, target), found)


def test_liger_kl_div_of_zeros_deviation():
    """The original returns NaN for the first, and for the second, whatever the input is."""
    excluded = torch.tensor([[0.0, 1.0]])
    assert liger.liger_kl_div(excluded.log(), excluded) == 0
    log_q = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    value = liger.liger_kl_div(log_q, excluded.log(), reduction="sum", log_target=True)
    value.backward()
    compare(value, torch.tensor(2.0).log(), 1e-6)
    assert log_q.grad.tolist() == [[0.0, -1.0]]


def test_liger_no_rows():
    empty = torch.zeros(0, 7)
    assert liger.liger_jsd(empty, empty) == liger.liger_tvd(empty, empty, reduction="sum") == 0
    assert liger.liger_kl_div(empty, empty, reduction="sum") == 0
    assert liger.liger_kl_div(empty, empty).isnan()
    assert liger.LigerKLDIVLoss(reduction="batchmean")(empty, empty).isnan()
    assert liger.liger_kl_div(empty, empty, reduction="none").shape == (0, 7)


def test_liger_modules():
    """Their defaults, which differ from the functions', their state, and pickles."""
    log_q, log_p, labels = log_probs(1), log_probs(2), torch.tensor([0, 1, -1, 2, -1, 3])
    jsd = liger.LigerJSD(beta=0.2, ignore_index=-1)
    tvd, kl = liger.LigerTVDLoss(ignore_index=-1), liger.LigerKLDIVLoss()
    assert (tvd.reduction, kl.reduction, kl.log_target, kl.eps) == ("batchmean", "mean", False, 1e-10)
    assert isinstance(kl, torch.nn.KLDivLoss)
    expected = liger.liger_jsd(log_q[labels >= 0], log_p[labels >= 0], beta=0.2)
    for module in (jsd, copy.deepcopy(jsd), pickle.loads(pickle.dumps(jsd))):
        assert torch.equal(module(log_q, log_p, labels), expected)
        assert list(module.parameters()) == []
    p, q = log_q.exp(), log_p.exp()
    by_rows = liger.liger_tvd(p[labels >= 0], q[labels >= 0], reduction="batchmean")
    compare(tvd(p, q, labels), by_rows, 1e-15)
    compare(liger.liger_tvd(p, q, labels, ignore_index=-1), by_rows / 7, 1e-15)
    tvd.reduction = kl.reduction = "sum"
    compare(tvd(p, q), liger.liger_tvd(p, q, reduction="sum"), 0)
    compare(kl(log_q, q), liger.liger_kl_div(log_q, q, reduction="sum"), 0)
    with pytest.warns(UserWarning, match="size_average and reduce"):
        assert liger.LigerKLDIVLoss(size_average=False).reduction == "sum"


A = torch.full((2, 3), 1 / 3)


@pytest.mark.parametrize("call", [liger.liger_jsd, liger.liger_tvd, liger.liger_kl_div, liger.LigerJSD()])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((A.numpy(), A), TypeError, "must be a torch.Tensor, found ndarray"),
        ((A, A.tolist()), TypeError, "must be a torch.Tensor, found list"),
        ((A, A[:1]), ValueError, r"the same shape, \(rows, classes\); found \(2, 3\) and \(1, 3\)"),
        ((A[0], A[0]), ValueError, "the same shape"),
        ((A[None], A[None]), ValueError, "the same shape"),
    ],
)
def test_liger_refuses_operands(call, arguments, error, message):
    with pytest.raises(error, match=message):
        call(*arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: liger.liger_jsd(A, A, torch.ones(3)), AssertionError, r"label per row, shape \(2,\); found \(3,\)"),
        (lambda: liger.liger_tvd(A, A, torch.ones(2, 1)), AssertionError, "shift_labels must have one label per row"),
        (lambda: liger.liger_tvd(A, A, [1, 2]), TypeError, "shift_labels must be a torch.Tensor, found list"),
        (lambda: liger.liger_jsd(A, A, beta=2), ValueError, r"beta must be in \[0, 1\]; found 2.0"),
        (lambda: liger.LigerTVDLoss("rows")(A, A), ValueError, "reduction must be one of 'batchmean', 'sum'"),
        (lambda: liger.LigerKLDIVLoss(reduction="rows")(A, A), ValueError, "reduction must be one of"),
        (lambda: liger.LigerKLDIVLoss("batchmean"), TypeError, "eps must be a number, found 'batchmean'"),
        (lambda: liger.liger_kl_div(A, A, log_target=A), TypeError, "log_target must be a bool"),
    ],
)
def test_liger_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- both ------------------------------------------------------------------------------------------------------------


def test_signatures():
    """Names, order and defaults are the originals'."""
    found = {}
    for module in (trl, liger):
        for name in module.__all__:
            parameters = inspect.signature(getattr(module, name)).parameters.values()
            plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
            found[name] = str(inspect.Signature(plain))
    assert found == {
        "generalized_jsd_loss": "(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, "
        "reduction='batchmean', num_items_in_batch=None)",
        "LigerJSD": "(beta=0.5, ignore_index=-100)",
        "liger_jsd": "(input, target, shift_labels=None, beta=0.5, ignore_index=-100)",
        "LigerTVDLoss": "(reduction='batchmean', ignore_index=-100)",
        "liger_tvd": "(input, target, shift_labels=None, reduction='mean', ignore_index=-100)",
        "LigerKLDIVLoss": "(eps=1e-10, size_average=None, reduce=None, reduction='mean', log_target=False)",
        "liger_kl_div": "(input, target, size_average=True, reduce=True, reduction='mean', log_target=False, "
        "eps=1e-10)",
    }


SOME = torch.tensor([3, -100, 1, 4, -100, 0])
COMPILED = {
    "trl": lambda a, b: trl.generalized_jsd_loss(a, b, SOME, 0.1, 2.0),
    "trl without labels": lambda a, b: trl.generalized_jsd_loss(a, b, reduction="mean"),
    "trl beta 0": lambda a, b: trl.generalized_jsd_loss(a, b, SOME, 0, num_items_in_batch=torch.tensor(5)),
    "trl beta 1": lambda a, b: trl.generalized_jsd_loss(a, b, SOME, 1, reduction="mean"),
    "trl none": lambda a, b: trl.generalized_jsd_loss(a, b, reduction="none"),
    "jsd": lambda a, b: liger.LigerJSD(0.9)(a.log_softmax(-1), b.log_softmax(-1), SOME),
    "jsd beta 1": lambda a, b: liger.liger_jsd(a.log_softmax(-1), b.log_softmax(-1), beta=1),
    "tvd": lambda a, b: liger.LigerTVDLoss()(a.softmax(-1), b.softmax(-1), SOME),
    "tvd none": lambda a, b: liger.liger_tvd(a.softmax(-1), b.softmax(-1), SOME, "none"),
    "kl_div": lambda a, b: liger.LigerKLDIVLoss()(a.log_softmax(-1), b.softmax(-1)),
    "kl_div none": lambda a, b: liger.liger_kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none"),
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compile(name, dynamic):
    """In one graph: nothing reads a number, for which a GPU would have to be waited for."""
    torch.compiler.reset()

    def both(function):
        a, b = logits(6, 7, seed=1).requires_grad_(), logits(6, 7, seed=2)
        value = function(a, b)
        return value.detach(), torch.autograd.grad(value.sum(), a)[0]

    expected = both(COMPILED[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the compiler's own modules
        found = both(torch.compile(COMPILED[name], backend="aot_eager", fullgraph=True, dynamic=dynamic))
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", COMPILED)
def test_nothing_asks_for_numbers(name):
    """Tensors without memory have no numbers."""
    a, b = torch.empty(6, 7, device="meta", requires_grad=True), torch.empty(6, 7, device="meta")
    value = COMPILED[name](a, b)
    value.sum().backward()
    assert a.grad.shape == a.shape


@pytest.mark.parametrize("module", ["trl", "liger"])
def test_without_pytorch(python, module):
    code = f"""
import sys
sys.modules["torch"] = None
import klcore.compat
try:
    import klcore.compat.{module}
except ImportError as error:
    print(error)
"""
    assert python(code).startswith("klcore.compat.trl and klcore.compat.liger need PyTorch, which cannot be imported (")
