"""Teachers of which only K classes per row are known: indices=, tail= and tail_mass=.

The values and gradients are compared with tests/relatives.py, which lists classes in 50 digits, and with PyTorch's
autograd of the textbook's formula; the rest is what docs/choosing.md and the docstring of kl_div promise.
"""

import itertools
import subprocess
import sys

import conftest
import ml_dtypes
import numpy as np
import oracle
import pytest
import relatives
from conftest import DTYPES, as_here
from hypothesis import given, settings
from hypothesis import strategies as st

import klcore
from klcore import _cpu
from klcore.operations import OPERATIONS

NAMES = [name for name, o in OPERATIONS.items() if o.takes_indices]
CASES = [(name, p) for name in NAMES for p in relatives.PARAMETERS.get(name, ({},))[:3]]
TAILS = ("bucket", "bucket with tail_mass", "zero", "renorm")
PAIRS = (
    ("log_probs", "logits"),
    ("probs", "logits"),
    ("log_probs", "log_probs"),
    ("probs", "probs"),
    ("log_probs", "counts"),
)
RENORMED = (("logits", "logits"), ("counts", "probs"))  # x by numbers of which the sum says nothing
# the mass of the other classes, and about how far the student is off: t, the log ratio, is sqrt(2 far)
ROWS = ((0.1, 1e-12), (1e-3, 1e-6), (1e-6, 1.0), (1e-9, "far"), (1e-12, 1e-12), (1e-12, 1.0))
NEAR = ROWS[:3]

names = pytest.mark.parametrize("name", NAMES)
tails = pytest.mark.parametrize("tail", TAILS)
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {', '.join(f'{k}={v}' for k, v in c[1].items())}")


# ---- rows, and what is asked of them ---------------------------------------------------------------------------------


def log_softmax(a):
    a = a - a.max(-1, keepdims=True)
    return a - np.log(np.exp(a).sum(-1, keepdims=True))


def rows(pair, dtype="float64", of=ROWS, n=11, k=4, seed=0, at=None):
    """(x, y, indices): one row for each of `of`. `at`: the listed classes."""
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(n)[:k] if at is None else rng.permutation(at) for _ in of])
    base, noise = rng.normal(0, 2, (2, len(of), n))
    listed = np.zeros(base.shape, bool)
    np.put_along_axis(listed, indices, True, -1)
    tail = np.array([row[0] for row in of])[:, None]
    with np.errstate(invalid="ignore"):  # if all are listed
        known, left = (log_softmax(np.where(listed == of_it, base, -np.inf)) for of_it in (True, False))
    a = np.where(listed, known + np.log1p(-tail), left + np.log(tail))
    b = a + noise / 2 * np.array([40.0 if far == "far" else np.sqrt(2 * far) for _, far in of])[:, None]
    x, y = np.take_along_axis(a, indices, -1), log_softmax(b)
    return *(in_space(*v, dtype) for v in zip((x, y), pair, strict=True)), indices


def in_space(a, space, dtype):
    dtype = DTYPES[dtype]
    if space in ("probs", "counts"):
        a = np.maximum(np.exp(a) * (1000 if space == "counts" else 1), float(ml_dtypes.finfo(dtype).tiny))
    return (a + 3.5 if space == "logits" else a).astype(dtype)


def words(tail, of=ROWS):
    """The keywords."""
    tail, _, mass = tail.partition(" with ")
    return {"tail": tail} | ({"tail_mass": np.array([row[0] * (1 + 1e-7) for row in of])} if mass else {})


def pairs(tail):
    return (*PAIRS, *RENORMED) if tail == "renorm" else PAIRS


def call(name, x, y, **options):
    return getattr(klcore, name)(x, y, **options)


def logits(**options):
    """The arguments of most tests."""
    return {"space": ("log_probs", "logits"), "tail": "bucket", **options}


def all_of(name, x, y, **options):
    """Value, gradients and terms."""
    return (*call(name, x, y, return_grad=("x", "y"), **options), call(name, x, y, reduction="none", **options))


def assert_same(found, expected, what=""):
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), what
        assert a.tobytes() == b.tobytes(), f"{what}: {a} instead of {b}"


def assert_right(name, found, true, pair, x, y, temperature=1.0):
    """Within the bounds of pairs of two spaces: those of kl_div, plus the errors of double logarithms and of a double
    1 - sum p, times the derivatives with respect to these."""
    value, dx, dy, terms = found
    what, off, finite = f"{name} {pair} {x.dtype}", 8 * oracle.EPS64 * (1 + true.logs), np.isfinite(true.value)
    sizes = np.abs(true.terms).sum(-1)
    bounds = oracle.tolerance("rel_entr" if name == "rel_entr" else "kl_div", "probs", value.dtype)
    floor = np.where(finite, off * true.slope + true.value_off, 0.0)
    oracle.assert_close(value, true.value, sizes, bounds, f"value of {what}", floor)
    oracle.assert_close(terms[finite], true.terms[finite], sizes[finite], bounds, f"terms of {what}", 2 * floor[finite])
    for got, right, moved, a, space in zip(
        (dx, dy), (true.dx, true.dy), (true.dx_off, true.dy_off), (x, y), pair, strict=True
    ):
        size = np.abs(right).sum(-1)
        by = right.shape[-1] if space in ("probs", "counts") else 1  # an error for each number, if none is small
        by = by / np.nansum(a.astype(float), -1) if space == "counts" else by
        floor, keep = off * (by + size) / temperature + moved.sum(-1), np.isfinite(size) & finite
        bounds = oracle.tolerance("kl_div", "logits", got.dtype, "gradient")
        oracle.assert_close(got[keep], right[keep], size[keep], bounds, f"gradient of {what} by {space}", floor[keep])


# ---- values and gradients --------------------------------------------------------------------------------------------


def true_of(name, x, y, indices, pair, **options):
    return relatives.top_k(name, x, y, indices, space=pair, **options)


@tails
@cases
def test_accuracy(case, tail):
    """Tails from 1e-1 to 1e-12, and students close to and far from the teacher."""
    name, parameters = case
    for pair, dtype in itertools.product(pairs(tail), ("float64", "float32")):
        x, y, indices = rows(pair, dtype)
        options = {**words(tail), **parameters}
        found = all_of(name, x, y, indices=indices, space=pair, **options)
        assert found[0].dtype == found[-1].dtype == dtype
        assert [g.dtype for g in found[1:3]] == [dtype] * 2
        if name != "rel_entr":
            assert (found[0] >= 0).all()
            assert (found[-1] >= 0).all()
        assert_right(name, found, true_of(name, x, y, indices, pair, **options), pair, x, y)


@names
def test_others_next_to_nothing(name):
    """The student has at most e^-700 of them, and the teacher a quarter, or as little: everything is in range."""
    indices = np.array([[4, 0], [0, 4]])
    log_q = log_softmax(np.array([[0.0, -700.5, -702.0, -745.0, -1.0], [0.0, -90.0, -95.0, -103.0, 1.0]]))
    for pair, dtype in itertools.product(PAIRS[:3], ("float64", "float32")):
        x, y = in_space(np.log([[0.5, 0.25], [0.25, 0.5]]), pair[0], dtype), in_space(log_q, pair[1], dtype)
        for mass in (0.25, 1e-300, 1e-40):
            found = all_of(name, x, y, indices=indices, space=pair, tail="bucket", tail_mass=mass)
            true = true_of(name, x, y, indices, pair, tail="bucket", tail_mass=[mass] * 2, digits=400)
            assert_right(name, found, true, pair, x, y)


@names
def test_accuracy_of_half_types(name):
    """Cached numbers have 16 bits, and a student's logits may have."""
    half, brain = "float16", "bfloat16"
    for of_x, of_y in ((half, half), (brain, brain), (half, brain), (half, "float32")):
        for tail, space in (("bucket", "log_probs"), ("bucket with tail_mass", "probs"), ("renorm", "logits")):
            pair = space, "logits"
            x, _, indices = rows(pair, of_x, NEAR)
            y = rows(pair, of_y, NEAR)[1]
            options = words(tail, NEAR)
            found = all_of(name, x, y, indices=indices, space=pair, **options)
            assert [a.dtype for a in found] == ["float32", x.dtype, y.dtype, "float32"]
            assert_right(name, found, true_of(name, x, y, indices, pair, **options), pair, x, y)


@names
def test_accuracy_of_long_rows(name):
    """With many chunks, whose ends are listed."""
    n = 9 * 1024 + 1
    pair, of, at = ("log_probs", "logits"), ((1e-3, 1e-6),), np.array([0, 1023, 1024, n - 1])
    x, y, indices = rows(pair, "float32", of, n, at=at)
    for tail in ("bucket with tail_mass", "renorm") if name == NAMES[0] else ("bucket with tail_mass",):
        options = words(tail, of)
        found = all_of(name, x, y, indices=indices, space=pair, **options)
        assert_right(name, found, true_of(name, x, y, indices, pair, **options), pair, x, y)


@tails
@names
def test_every_class_listed(name, tail):
    """There are no others then, and it is the divergence of all classes."""
    of = ((1e-13, 1e-6), (1e-13, 1.0))
    for pair in pairs(tail):
        x, y, indices = rows(pair, n=7, k=7, of=of)
        found = all_of(name, x, y, indices=indices, space=pair, **words(tail, of))
        true = true_of(name, x, y, indices, pair, tail="renorm" if tail == "renorm" else "zero")
        assert_right(name, found, true, pair, x, y)
        value, dx, dy, terms = found
        if tail != "renorm":
            assert not terms[:, 7:].any()
            order = np.argsort(indices)
            sorted_x, dx, terms = (np.take_along_axis(a, order, -1) for a in (x, dx, terms))
            for a, b in zip((value, dx, dy, terms), all_of(name, sorted_x, y, space=pair), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13)


def naive(torch, name, x, y, indices, pair, tail, tail_mass=None, temperature=1.0, beta=0.5, forward=0.5):
    """As written in textbooks and training loops."""
    p = x if pair[0] == "probs" else x.exp() if pair[0] == "log_probs" else torch.softmax(x / temperature, -1)
    log_q = torch.log_softmax(y / temperature, -1) if pair[1] == "logits" else y
    listed = log_q.gather(-1, indices)
    if tail == "renorm":
        p, log_q = p / p.sum(-1, keepdim=True), torch.log_softmax(listed, -1)
    else:
        others = log_q.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
        left = 1 - p.sum(-1, keepdim=True)
        left = torch.zeros_like(left) if tail == "zero" else left if tail_mass is None else tail_mass[:, None]
        p, log_q = torch.cat([p, left], -1), torch.cat([listed, others], -1)
    q = log_q.exp()

    def kl(a, b):
        return torch.xlogy(a, a) - torch.xlogy(a, b) - a + b

    m = beta * p + (1 - beta) * q
    terms = {
        "kl_div": lambda: kl(p, q),
        "rel_entr": lambda: torch.xlogy(p, p) - p * log_q,
        "js_div": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "mixed_kl_div": lambda: forward * kl(p, q) + (1 - forward) * kl(q, p),
        "tv_dist": lambda: (p - q).abs() / 2,
    }
    return terms[name]().sum(-1)


@tails
@names
def test_autograd(name, tail):
    """PyTorch's derivatives of the textbook's formula, in float64, where that is accurate to nine digits."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    of = ((0.3, 1.0), (0.1, 0.1), (0.01, 2.0))
    for pair in (("log_probs", "logits"), ("probs", "logits"), ("probs", "log_probs"), ("logits", "logits")):
        if (pair[0] == "logits" and tail != "renorm") or (name, tail) == ("mixed_kl_div", "zero"):
            continue
        for temperature in (1.0, 2.5) if "logits" in pair else (1.0,):
            x, y, indices = rows(pair, of=of)
            options = words(tail, of)
            a, b = (torch.tensor(v, requires_grad=True) for v in (x, y))
            of_torch = {k: torch.tensor(v) if k == "tail_mass" else v for k, v in options.items()}
            expected = naive(torch, name, a, b, torch.tensor(indices), pair, **of_torch, temperature=temperature)
            expected.sum().backward()
            options.update(indices=indices, space=pair, temperature=temperature, return_grad=("x", "y"))
            for got, right in zip(call(name, x, y, **options), (expected.detach(), a.grad, b.grad), strict=True):
                np.testing.assert_allclose(got, right.numpy(), rtol=1e-9, atol=1e-12)


@names
def test_temperature(name):
    """It divides the logits: y's, and x's if x holds logits."""
    warmths = np.array([2.5, 0.3, 1.0])
    for space, tail in (("log_probs", "bucket"), ("probs", "zero"), ("logits", "renorm")):
        pair = space, "logits"
        x, y, indices = rows(pair, of=NEAR)
        options = {"space": pair, "tail": tail}
        together = all_of(name, x, y, indices=indices, temperature=warmths, **options)
        for r, t in enumerate(warmths):
            row = slice(r, r + 1)
            found = all_of(name, x[row], y[row], indices=indices[row], temperature=float(t), **options)
            assert_same(found, [a[row] for a in together], (pair, t))
            true = true_of(name, x[row], y[row], indices[row], pair, tail=tail, temperature=float(t))
            assert_right(name, found, true, pair, x[row], y[row], float(t))


def test_base():
    x, y, indices = rows(("log_probs", "logits"), of=NEAR)
    for name in NAMES:
        if name == "tv_dist":
            with pytest.raises(ValueError, match="has no unit"):
                call(name, x, y, **logits(indices=indices), base=2)
            continue
        nats, bits = (all_of(name, x, y, **logits(indices=indices), base=base) for base in (None, 2))
        for a, b in zip(nats, bits, strict=True):
            np.testing.assert_allclose(b, a / np.log(2), rtol=1e-14, atol=1e-15)


def test_scaled():
    """js_div's limits are those of all classes."""
    x, y, indices = rows(("log_probs", "logits"), of=NEAR)
    options = logits(indices=indices)
    for beta, forward in ((0, 1.0), (1, 0.0)):
        limit = all_of("js_div", x, y, beta=beta, scaled=True, **options)
        assert_same(limit, all_of("mixed_kl_div", x, y, forward=forward, **options))
    plain, scaled = (all_of("js_div", x, y, beta=0.2, scaled=s, **options) for s in (False, True))
    for a, b in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(b, a / 0.16, rtol=1e-13)


# ---- indices ---------------------------------------------------------------------------------------------------------

# classes 3 and 5 are listed again, and -1 is none
TWICE = np.array([[3, -1, 5, 3, 0, 5, -1, 3], [5, 7, 5, -1, 3, 3, 10, 3], [-1, 0, 1, 2, 3, 3, 5, 5]])


def listed_twice(pair, dtype="float64"):
    """Each number of a class gets part of the probability; NaN where there is no class."""
    rng = np.random.default_rng(3)
    p, parts = rng.dirichlet(np.ones(11), 3), np.zeros(TWICE.shape)
    for r, c in np.ndindex(3, 11):
        at = np.flatnonzero(TWICE[r] == c)
        parts[r, at] = p[r, c] * rng.permutation(np.arange(len(at)) + 1) / max(1, len(at) * (len(at) + 1) / 2)
    parts[TWICE < 0] = 1
    x = in_space(np.log(parts), pair[0], dtype)
    x[TWICE < 0] = np.nan
    return x, in_space(np.log(rng.dirichlet(np.ones(11), 3)), pair[1], dtype)


@tails
@names
def test_listed_twice_and_absent(name, tail):
    """The probabilities of a class that is listed twice are added; numbers at -1 are ignored."""
    of = ((0.2, 0), (0.1, 0), (0.3, 0))
    for pair, dtype in itertools.product(pairs(tail), ("float64", "float32")):
        x, y = listed_twice(pair, dtype)
        found = all_of(name, x, y, indices=TWICE, space=pair, **words(tail, of))
        assert_right(name, found, true_of(name, x, y, TWICE, pair, **words(tail, of)), pair, x, y)
        dx, terms = found[1], found[3]
        assert not dx[TWICE < 0].any()
        assert not terms[:, :8][TWICE < 0].any()
        for r, c in ((0, 3), (0, 5), (1, 3), (1, 5), (2, 3), (2, 5)):  # the term is at the largest number
            at = np.flatnonzero(TWICE[r] == c)
            assert np.count_nonzero(terms[r, at]) <= 1
            assert terms[r, at[x[r, at].argmax()]] == terms[r, at].sum()
            if pair[0] == "probs":
                assert len(set(dx[r, at])) == 1


@tails
@names
def test_no_class_changes_no_bit(name, tail):
    """Rows that list fewer classes than others of their batch are padded with -1."""
    of = ((0.2, 0), (0.1, 0), (0.3, 0))
    for pair, dtype in itertools.product(pairs(tail), ("float64", "float32")):
        x, y, indices = rows(pair, dtype, of=of, n=1200)
        padding = np.full((3, 1100), -1)
        options = {"space": pair, **words(tail, of)}
        value, dx, dy, terms = all_of(name, x, y, indices=indices, **options)
        wide = np.append(padding.astype(x.dtype) * np.nan, x, -1), np.append(padding, indices, -1)
        found = all_of(name, wide[0], y, indices=wide[1], **options)
        assert_same((found[0], found[1][:, 1100:], found[2], found[3][:, 1100:]), (value, dx, dy, terms), (pair, dtype))


@names
def test_what_is_no_probability_spoils_its_class(name, device):
    """For NaN of either sign, at any place among the numbers of one class."""
    nan, other = np.array([0x7FF8 << 48, 0xFFF8 << 48], np.uint64).view(float)
    y = np.log([0.4, 0.3, 0.2, 0.1])
    rows = [[-np.inf, nan, -0.5], [-np.inf, other, -0.5], [-1, nan, -1], [other, -1, -1]]
    for space, tail in itertools.product(("log_probs", "logits"), ("bucket", "renorm")):
        if (space, tail) == ("logits", "bucket"):
            continue
        for x in rows:
            options = {"indices": device.put(np.array([1, 1, 0])), "tail": tail, "space": (space, "logits")}
            value, dx = (
                device.get(v) for v in call(name, device.put(np.array(x)), device.put(y), return_grad="x", **options)
            )
            assert np.isnan(value), (space, tail, x)
            assert np.isnan(dx[:2]).all()
    for x, kind, tail in (([0.5, -0.1, 0.2], "probs", "bucket"), ([5.0, -1, 1], "counts", "renorm")):
        value = call(name, np.array(x), y, indices=[1, 1, 0], tail=tail, space=(kind, "logits"))
        assert np.isnan(value), (kind, tail)


def test_derivatives_of_zeros():
    """Classes that x excludes have no part in the remaining mass; shares of nothing are equal; -1 changes none."""
    words = {"tail": "bucket", "space": ("log_probs", "logits"), "return_grad": "x"}
    value, dx = klcore.kl_div([-np.inf, -1.0], [0.0, 0.0, -np.inf, -np.inf], indices=[1, 0], **words)
    assert (value, dx[0]) == (np.inf, 0)
    y = np.log([0.4, 0.3, 0.2, 0.1])
    _, once = klcore.mixed_kl_div([-np.inf, -1.0], y, indices=[1, 0], **words)
    _, twice = klcore.mixed_kl_div([-np.inf, -np.inf, -1.0], y, indices=[1, 1, 0], **words)
    np.testing.assert_allclose(twice, [once[0] / 2, once[0] / 2, once[1]], rtol=1e-15)
    words |= {"tail": "zero", "return_grad": "y"}
    for indices in ([0], [0, -1]):
        _, dy = klcore.mixed_kl_div([-1.0] * len(indices), y, indices=indices, **words)
        np.testing.assert_array_equal(dy, [np.nan, np.inf, np.inf, np.inf])


def test_numbers_that_change_meanwhile():
    """A class that is listed twice is ordered by x: writing x at the same time gives wrong numbers, but nothing
    worse."""
    script = """if True:
        import threading, time
        import numpy as np, klcore
        x, y, end = np.random.rand(50, 200), np.zeros(1000), time.monotonic() + 1
        def write():
            while time.monotonic() < end:
                x[...] = np.random.rand(50, 200)
        thread = threading.Thread(target=write)
        thread.start()
        while time.monotonic() < end:
            klcore.kl_div(x, y, indices=np.zeros(200, int), tail="bucket", space=("probs", "logits"))
        thread.join()
    """
    assert subprocess.run([sys.executable, "-c", script], timeout=60, **as_here()).returncode == 0


@tails
@names
def test_order_means_nothing(name, tail):
    of = ((0.2, 0), (0.1, 0), (0.3, 0))
    order = np.random.default_rng(0).permuted(np.tile(np.arange(8), (3, 1)), axis=1)
    for pair, dtype in itertools.product(pairs(tail), DTYPES):
        x, y = listed_twice(pair, dtype)
        options = {"space": pair, **words(tail, of)}
        value, dx, dy, terms = all_of(name, x, y, indices=TWICE, **options)
        x, indices, dx, listed = (np.take_along_axis(a[..., :8], order, -1) for a in (x, TWICE, dx, terms))
        found = all_of(name, x, y, indices=indices, **options)
        expected = value, dx, dy, np.append(listed, terms[:, 8:], -1)
        assert_same(found, expected, (pair, dtype))


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", ">i4"])
def test_any_integers(device, kind):
    x, y, indices = (device.put(a) for a in rows(("log_probs", "logits"), of=NEAR))
    expected = [device.get(a) for a in all_of("kl_div", x, y, **logits(indices=indices))]
    wide = np.zeros((6, 12), kind)[::-2, 1:9:2]
    wide[...] = device.get(indices)
    for made in (device.get(indices).astype(kind), wide):
        assert_same(map(device.get, all_of("kl_div", x, y, **logits(indices=device.put(made)))), expected)
    if np.dtype(kind).kind == "i":  # -1 of each
        absent = np.array(device.get(indices), kind)
        absent[:, 2] = -1
        given = [device.get(a) for a in all_of("kl_div", x, y, **logits(indices=device.put(absent)))]
        without = np.delete(device.get(x), 2, -1), np.delete(absent, 2, -1)
        few = all_of("kl_div", device.put(without[0]), y, **logits(indices=device.put(without[1])))
        for a, b in zip((given[0], given[2]), (few[0], few[2]), strict=True):
            np.testing.assert_allclose(a, device.get(b), rtol=1e-13, atol=1e-15)


def test_lists():
    x, y, indices = rows(("log_probs", "logits"), of=NEAR)
    expected = klcore.kl_div(x, y, **logits(indices=indices))
    assert_same([klcore.kl_div(x.tolist(), y, **logits(indices=indices.tolist()))], [expected])


# ---- shapes ----------------------------------------------------------------------------------------------------------


@names
def test_axis(device, name):
    for tail in ("bucket", "renorm"):
        x, y, indices = rows(("log_probs", "logits"), of=ROWS)
        expected = all_of(name, x, y, **logits(indices=indices, tail=tail))
        value, *others = (a.reshape(2, 3, *a.shape[1:]) for a in expected)
        for axis in (0, 1, -2, -3):
            moved = [np.moveaxis(a.reshape(2, 3, -1), -1, axis) for a in (x, y, indices)]
            a, b, i = (device.put(np.ascontiguousarray(v)) for v in moved)
            found = all_of(name, a, b, **logits(indices=i, tail=tail, axis=axis))
            right = value, *(np.moveaxis(v, -1, axis) for v in others)
            assert_same(map(device.get, found), right, axis)


# batch axes of x, indices, y, weights and tail_mass
BATCHES = (
    ((), (), (3,), (3,), ()),
    ((3,), (3,), (), (), (3,)),
    ((), (2, 3), (), (1,), (3,)),
    ((2, 1), (2, 1), (3,), (2, 3), (1, 1)),
    ((3,), (), (2, 1), (2, 1), (2, 3)),
    ((2, 3), (1, 3), (1, 1), (3,), (2, 1)),
)


@pytest.mark.parametrize("batches", BATCHES, ids=str)
def test_broadcasting(device, batches):
    """Over each other, with the results of copies; gradients are the sums of the copies' gradients."""
    rng = np.random.default_rng(0)
    whole = np.broadcast_shapes(*batches)
    p, y = rng.dirichlet(np.ones(9), batches[0] or 1), rng.normal(size=(*batches[2], 9))
    x = np.log(p[..., :4]).reshape(*batches[0], 4)
    indices = rng.permuted(np.broadcast_to(np.arange(9), (*batches[1], 9)), axis=-1)[..., :4]
    weights, mass = rng.uniform(0.5, 2, batches[3]), rng.uniform(0.1, 0.9, batches[4])
    temperature = rng.uniform(0.5, 2, batches[2])
    for name, tail in (("kl_div", "bucket"), ("js_div", "bucket with tail_mass"), ("mixed_kl_div", "renorm")):
        options = {"weights": weights, "temperature": temperature, "reduction": "rowmean"}
        options |= {"tail_mass": mass} if "mass" in tail else {}
        full = {k: v if k == "reduction" else np.broadcast_to(v, whole).copy() for k, v in options.items()}
        large = [np.broadcast_to(a, (*whole, a.shape[-1])).copy() for a in (x, y, indices)]
        tail = tail.partition(" ")[0]
        expected = call(name, *large[:2], **logits(indices=large[2], tail=tail, return_grad=("x", "y"), **full))
        on_device = {k: device.put(v) if k != "reduction" else v for k, v in options.items()}
        found = call(
            name,
            device.put(x),
            device.put(y),
            **logits(indices=device.put(indices), tail=tail, return_grad=("x", "y"), **on_device),
        )
        value, *gradients = map(device.get, found)
        np.testing.assert_allclose(value, expected[0], rtol=1e-14)
        for got, right, a in zip(gradients, expected[1:], (x, y), strict=True):
            assert got.shape == a.shape
            lead = right.ndim - a.ndim
            right = right.sum(tuple(range(lead))) if lead else right
            gone = tuple(d for d in range(a.ndim) if a.shape[d] != right.shape[d])
            np.testing.assert_allclose(got, right.sum(gone, keepdims=True), rtol=1e-12, atol=1e-15)
        options["reduction"] = full["reduction"] = "none"
        terms = call(name, x, y, **logits(indices=indices, tail=tail, **options))
        assert_same([terms], [call(name, *large[:2], **logits(indices=large[2], tail=tail, **full))])


@names
def test_no_classes_listed(device, name):
    """Everything is in the bucket: two numbers, and both are 1 for a student's logits."""
    y = np.random.default_rng(0).normal(size=(3, 5))
    nothing, none = np.zeros((3, 0)), np.zeros((3, 0), np.int32)
    absent = np.full((3, 2), np.nan), np.full((3, 2), -1)
    for x, indices in ((nothing, none), absent):
        a, b, i = (device.put(v) for v in (x, y, indices))
        value, dx, dy, terms = map(device.get, all_of(name, a, b, **logits(indices=i)))
        np.testing.assert_allclose(value, 0, atol=1e-15)
        np.testing.assert_allclose(dy, 0, atol=1e-15)
        assert dx.shape == x.shape
        assert not dx.any()
        assert terms.shape == (3, x.shape[-1] + 1)
    zero = device.get(call("kl_div", device.put(nothing), b, **logits(indices=device.put(none), tail="zero")))
    np.testing.assert_allclose(zero, 1, rtol=1e-15)
    half = device.put(np.full(3, 0.5))
    found = device.get(call("kl_div", device.put(nothing), b, **logits(indices=device.put(none), tail_mass=half)))
    np.testing.assert_allclose(found, 0.5 * np.log(0.5) + 0.5, rtol=1e-14)


def test_one_class(device):
    x, y = device.put(np.array([[-0.5], [0.0]])), device.put(np.array([[3.0], [-2.0]]))
    for tail in ("bucket", "zero"):
        found = all_of("kl_div", x, y, **logits(indices=device.put(np.zeros((2, 1), int)), tail=tail))
        value, dx, dy, terms = map(device.get, found)
        p = np.exp([-0.5, 0.0])
        np.testing.assert_allclose(value, p * np.log(p) - p + 1, rtol=1e-14)
        np.testing.assert_allclose(dx[:, 0], p * np.log(p), rtol=1e-14)
        np.testing.assert_array_equal(dy[1], 0)
        assert terms.shape == (2, 2)
    renormed = call("kl_div", x, y, **logits(indices=device.put(np.zeros((2, 1), int)), tail="renorm"))
    np.testing.assert_array_equal(device.get(renormed), 0)


def test_no_rows(device):
    x, y = device.put(np.zeros((0, 2))), device.put(np.zeros((0, 5)))
    indices = device.put(np.zeros((0, 2), int))
    for reduction, shape in (("row", (0,)), ("none", (0, 3)), ("sum", ())):
        value, dx, dy = call("kl_div", x, y, **logits(indices=indices, reduction=reduction, return_grad=("x", "y")))
        assert [np.shape(a) for a in (value, dx, dy)] == [shape, (0, 2), (0, 5)]
        assert reduction != "sum" or float(value) == 0
    assert np.isnan(device.get(call("kl_div", x, y, **logits(indices=indices, reduction="rowmean"))))


def test_labels():
    """Row labels must agree; x and the indices have their own class labels."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    x, y, indices = rows(("log_probs", "logits"), of=NEAR, n=4)
    frames = {
        "x": pandas.DataFrame(x),
        "y": pandas.DataFrame(y, columns=list("abcd")),
        "indices": pandas.DataFrame(indices),
    }
    expected = klcore.kl_div(x, y, **logits(indices=indices))
    assert_same([klcore.kl_div(frames["x"], frames["y"], **logits(indices=frames["indices"]))], [expected])
    for name in frames:
        given = dict(frames)
        given[name] = given[name].iloc[::-1]
        with pytest.raises(ValueError, match="have different labels"):
            klcore.kl_div(given["x"], given["y"], **logits(indices=given["indices"]))
    turned = {name: frame.set_axis([2, 0, 1]) for name, frame in frames.items()}
    weights = np.array([0.5, 0.0, 2.0])
    found = klcore.kl_div(
        turned["x"], turned["y"], **logits(indices=turned["indices"], weights=pandas.Series(weights, [2, 0, 1]))
    )
    assert_same([found], [klcore.kl_div(x, y, **logits(indices=indices, weights=weights))])
    masses = pandas.Series([0.1, 0.2, 0.3], index=[2, 1, 0])
    with pytest.raises(ValueError, match="tail_mass have different labels"):
        klcore.kl_div(frames["x"], y, **logits(indices=indices, tail_mass=masses))
    other = frames["indices"].set_axis(list("wxyz"), axis=1)
    with pytest.raises(ValueError, match="indices have different labels"):
        klcore.kl_div(frames["x"], y, **logits(indices=other))


# ---- reductions, weights, out ----------------------------------------------------------------------------------------


@names
def test_reductions(device, name):
    """A mean is over rows, over the first axis, or over the student's elements."""
    arrays = [a.reshape(2, 3, -1) for a in rows(("log_probs", "logits"))]
    x, y, indices = map(device.put, arrays)
    for w in (None, np.array([[1.0, 0.0, 2.0], [0.5, 1.0, 0.25]]), np.array([True, False, True])):
        options = logits(indices=indices) | ({} if w is None else {"weights": device.put(w)})
        values, dx, dy = map(device.get, call(name, x, y, return_grad=("x", "y"), **options))
        terms = device.get(call(name, x, y, reduction="none", **options))
        np.testing.assert_allclose(terms.sum(-1), values, rtol=1e-13, atol=1e-15)
        rows_counted = 6 if w is None else np.broadcast_to(w, (2, 3)).sum()
        divisors = {"sum": 1, "rowmean": rows_counted, "batchmean": 2, "mean": y.size}
        for reduction, divisor in divisors.items():
            found = call(name, x, y, reduction=reduction, return_grad=("x", "y"), **options)
            for got, all_rows in zip(map(device.get, found), (values.sum(), dx, dy), strict=True):
                np.testing.assert_allclose(got, all_rows / divisor, rtol=1e-13, atol=1e-15)
        found = call(name, x, y, reduction="sum", denominator=48, return_grad=("x", "y"), **options)
        for got, all_rows in zip(map(device.get, found), (values.sum(), dx, dy), strict=True):
            np.testing.assert_allclose(got, all_rows / 48, rtol=1e-13, atol=1e-15)


@tails
def test_a_row_of_weight_0_is_not_read(device, tail):
    """Whatever it contains: numbers, indices, tail_mass, temperature."""
    x, y, indices = (np.array(a) for a in rows(("log_probs", "logits"), of=NEAR))
    options, warmth = words(tail, NEAR), np.array([1.5, 1.0, 2.0])
    expected = all_of("kl_div", x[::2], y[::2], **logits(indices=indices[::2], temperature=warmth[::2], **{
        k: v if k == "tail" else v[::2] for k, v in options.items()
    }))  # fmt: skip
    x[1], y[1], indices[1], warmth[1] = np.nan, np.inf, [99, -7, 10**9, 0], 0.0
    if "tail_mass" in options:
        options["tail_mass"][1] = -3
    options = {k: v if k == "tail" else device.put(v) for k, v in options.items()}
    a, b = map(device.put, (x, y))
    for w in (np.array([1.0, 0.0, 1.0]), np.array([True, False, True])):
        given = logits(indices=device.put(indices), temperature=device.put(warmth), weights=device.put(w), **options)
        found = [device.get(v) for v in all_of("kl_div", a, b, **given)]
        assert_same([v[::2] for v in found], expected)
        assert not any(v[1].any() for v in found)
        mean = call("kl_div", a, b, reduction="rowmean", **given)
        np.testing.assert_allclose(device.get(mean), expected[0].mean(), rtol=1e-14)


@tails
def test_out(device, tail):
    for dtype in ("float64", "float32"):
        x, y, indices = map(device.put, rows(("log_probs", "logits"), dtype))
        options = logits(indices=indices, return_grad=("x", "y"), **words(tail))
        expected = call("kl_div", x, y, **options)
        out = tuple(device.put(np.full_like(device.get(a), 7)) for a in expected)
        found = call("kl_div", x, y, **options, out=out)
        assert all(a is b for a, b in zip(found, out, strict=True))
        assert_same(map(device.get, out), map(device.get, expected))
        terms = call("kl_div", x, y, **{**options, "return_grad": None}, reduction="none")
        given = device.put(np.full_like(device.get(terms), 7))
        assert call("kl_div", x, y, **{**options, "return_grad": None}, reduction="none", out=given) is given
        assert_same([device.get(given)], [device.get(terms)])


@tails
@names
def test_out_over_y(device, name, tail):
    """The gradient for y from logits may be written over y."""
    for dtype, shape in itertools.product(("float64", "float32", "bfloat16"), ((6, 11), (6, 2060))):
        x, y, indices = rows(("log_probs", "logits"), dtype, n=shape[1])
        options = logits(indices=device.put(indices), **words(tail))
        for wanted in ("y", ("x", "y")):
            expected = call(name, device.put(x), device.put(y), return_grad=wanted, **options)
            over = device.put(y.copy())
            out = (None,) * len(wanted) + (over,)
            found = call(name, device.put(x), over, return_grad=wanted, out=out, **options)
            assert found[-1] is over
            assert_same(map(device.get, found), map(device.get, expected), dtype)


def test_out_refused(device):
    """Elsewhere no result may overwrite an input."""
    x, y, indices = (device.put(a.copy()) for a in rows(("log_probs", "logits"), of=NEAR))
    mass = device.put(np.full(3, 0.25))
    options = logits(indices=indices, tail_mass=mass)
    for pair, more in (
        (("log_probs", "logits"), {"return_grad": "x", "out": (None, x)}),
        (("log_probs", "log_probs"), {"return_grad": "y", "out": (None, y)}),
        (("log_probs", "logits"), {"out": mass}),
        (("log_probs", "logits"), {"return_grad": "x", "out": (None, indices.view("float64"))}),
    ):
        before = [device.get(a).copy() for a in (x, y, indices, mass)]
        with pytest.raises(ValueError, match="out overlaps the memory of an input"):
            klcore.kl_div(x, y, **{**options, "space": pair}, **more)
        assert_same(map(device.get, (x, y, indices, mass)), before)


@names
def test_dtype_of_the_result(name):
    """float64 if x or y is; tail_mass and the weights do not matter."""
    x, y, indices = rows(("log_probs", "logits"), of=NEAR)
    mass, weights = np.array([0.25, 0.5, 0.125]), np.ones(3)
    for kinds, expected in ((("f8", "f4"), "f8"), (("f4", "f8"), "f8"), (("f4", "f4"), "f4"), (("f2", "f2"), "f4")):
        a, b = (v.astype(kind) for v, kind in zip((x, y), kinds, strict=True))
        found = all_of(name, a, b, **logits(indices=indices, tail_mass=mass, weights=weights))
        assert [v.dtype for v in found] == [expected, *kinds, expected]


# ---- zeros, and what is undefined ------------------------------------------------------------------------------------

INF, LOG2 = np.inf, np.log(2)
# p and q of the others, where one is 0: their contributions
AT_ZERO = {
    "kl_div": (0.25, INF),
    "rel_entr": (0.0, INF),
    "js_div": (0.125 * LOG2, 0.125 * LOG2),
    "mixed_kl_div": (INF, INF),
    "tv_dist": (0.125, 0.125),
}


@names
def test_others_excluded(name):
    """p of the others, or q, is 0: the contribution is that of a class; and +inf makes the value infinite."""
    no_p, no_q = AT_ZERO[name]
    # 1/2 and 1/4 of the teacher's are listed: 1/4 is left, or nothing, if they are 3/4 and 1/4
    student, all_of_it = np.array([0.5, 0.25, 0.25, 0.0]), np.array([0.5, 0.5, 0.0, 0.0])
    for x, y, expected in (([0.5, 0.5], student, no_p), ([0.5, 0.25], all_of_it, no_q)):
        for space, of_y in itertools.product(("probs", "log_probs"), ("probs", "log_probs", "logits")):
            a = x if space == "probs" else [0.0, -INF] if x[1] == 0.5 else np.log(x)
            b = y if of_y == "probs" else log_of(y)
            for dtype in ("float64", "float32"):
                options = {"indices": [0, 1], "space": (space, of_y), "tail": "bucket"}
                value, dx, dy, terms = all_of(name, np.asarray(a, dtype), np.asarray(b, dtype), **options)
                np.testing.assert_allclose(terms[2], expected, rtol=1e-6 if dtype == "float32" else 1e-14, atol=1e-7)
                np.testing.assert_allclose(value, terms.sum(), rtol=1e-6, atol=1e-7)
                if np.isfinite(expected):
                    assert np.isfinite(dx[: 2 if space == "log_probs" else 0]).all()
                    assert np.isfinite(dy).all() or of_y == "probs"  # by log(q/m), say
                    assert not np.isnan(dy).any()


def log_of(p):
    with np.errstate(divide="ignore"):
        return np.log(p)


@names
def test_zero_is_a_bucket_of_no_mass(name):
    x, y, indices = rows(("log_probs", "logits"), of=NEAR)
    options = {"indices": indices, "space": ("log_probs", "logits")}
    zero = all_of(name, x, y, tail="zero", **options)
    assert_same(zero, all_of(name, x, y, tail="bucket", tail_mass=np.zeros(3), **options))
    assert_same(zero, all_of(name, x, y, tail="bucket", tail_mass=0, **options))


def test_mixed_of_others_that_the_teacher_excludes():
    """The student's divergence from the teacher is infinite there, unless its weight is 0."""
    x, y, indices = rows(("log_probs", "logits"), of=NEAR)
    for options in ({"tail": "zero"}, {"tail": "bucket", "tail_mass": 0.0}):
        value = klcore.mixed_kl_div(x, y, **logits(indices=indices, **options))
        assert (value == INF).all()
        forward = klcore.mixed_kl_div(x, y, forward=1, **logits(indices=indices, **options))
        np.testing.assert_allclose(forward, klcore.kl_div(x, y, **logits(indices=indices, **options)), rtol=1e-13)


@names
def test_excluded_classes(name):
    """Listed or not, as in a row of all classes. The other numbers are as if they were absent."""
    x, indices = np.log([0.5, 0.25, 0.125]), np.array([4, 1, 2])
    y = np.array([-INF, 0.5, 1.5, -INF, 1.0, 0.25])
    without = np.array([0.5, 1.5, 1.0, 0.25])
    for tail in ("bucket", "zero", "renorm"):
        if (name, tail) == ("mixed_kl_div", "zero"):
            continue
        expected = all_of(name, x, without, **logits(indices=[2, 0, 1], tail=tail))
        found = all_of(name, x, y, **logits(indices=indices, tail=tail))
        for a, b in zip((found[0], found[1], found[2][[1, 2, 4, 5]], found[3]), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-14, atol=1e-17)
        assert not found[2][[0, 3]].any()
        # of the teacher as well: a class that both exclude
        more = all_of(name, np.append(x, -INF), y, **logits(indices=np.append(indices, 3), tail=tail))
        np.testing.assert_allclose(more[0], found[0], rtol=1e-14)
        assert more[1][3] == more[3][3] == 0
    # listed with mass, but excluded by the student
    value, dx, dy = call(name, x, y, **logits(indices=[4, 1, 3], return_grad=("x", "y")))
    assert value == INF if np.isinf(AT_ZERO[name][1]) else np.isfinite([value, *dx, *dy]).all()


def test_zero_probabilities():
    """For a teacher: the derivative is that of the divergence of all classes, minus the others'."""
    x, y = np.array([0.5, 0.0, 0.25]), np.array([0.5, 0.125, 0.125, 0.25])
    value, dx = klcore.kl_div(x, y, indices=[0, 1, 2], tail="bucket", return_grad="x")
    np.testing.assert_allclose(value, 0.25 * LOG2 - 0.125 + 0.125, rtol=1e-15)
    np.testing.assert_allclose(dx, [0, -INF, LOG2], rtol=1e-15)


@names
def test_more_than_everything_listed(name):
    """Numbers that add up to more than 1 leave nothing, and their sum does not matter."""
    x, y = np.array([0.75, 0.5]), np.array([0.5, 0.25, 0.25])
    found = all_of(name, x, y, indices=[0, 1], tail="bucket")
    assert_same(found, all_of(name, x, y, indices=[0, 1], tail="zero"))


@names
def test_undefined_rows(device, name):
    """NaN and +inf in a student's logits, and rows that exclude everything, make their row NaN, and no other. With
    "renorm" the other classes do not matter."""
    x, y, indices = rows(("log_probs", "logits"), of=NEAR, n=9)
    other = next(c for c in range(9) if c not in indices[1])
    for tail, (column, bad) in itertools.product(
        ("bucket", "zero", "renorm"), ((indices[1, 0], np.nan), (indices[1, 0], INF), (other, np.nan), (..., -INF))
    ):
        spoiled = y.copy()
        spoiled[1, column] = bad
        options = logits(indices=device.put(indices), tail=tail)
        found = [device.get(a) for a in all_of(name, device.put(x), device.put(spoiled), **options)]
        expected = all_of(name, x, y, **logits(indices=indices, tail=tail))
        assert_same([a[::2] for a in found], [a[::2] for a in expected])
        value, dx, dy, terms = (a[1] for a in found)
        if tail == "renorm" and column == other:
            assert_same((value, dx, dy, terms), [a[1] for a in expected])
            continue
        asked = indices[1] if tail == "renorm" else slice(None)
        assert all(np.isnan(a).all() for a in (value, dx, dy[asked], terms))
        assert not np.delete(dy, asked).any()


@names
def test_bad_numbers(name):
    """In a teacher's list; and in a student's probabilities, listed or not."""
    for pair, of in ((("probs", "probs"), "xy"), (("log_probs", "log_probs"), "xy"), (("log_probs", "logits"), "x")):
        for side, bad in itertools.product(of, (np.nan, -0.5) if pair[0] == "probs" else (np.nan,)):
            x, y, indices = (np.array(a) for a in rows(pair, of=NEAR, n=9))
            (x if side == "x" else y)[1, 2] = bad
            for tail in ("bucket", "zero"):
                options = {"indices": indices, "space": pair, "tail": tail}
                value = call(name, x, y, **options)
                assert np.isnan(value).tolist() == [False, True, False], (pair, side, bad)


# ---- the same bits ---------------------------------------------------------------------------------------------------


@tails
@names
def test_threads_and_instruction_sets(name, tail):
    """And single rows; short rows and long ones, which threads share."""
    for (count, n), dtype in itertools.product(((700, 17), (24, 1500), (2, 20 * 1024 + 1)), ("float32", "float64")):
        of = (ROWS * (count // 6 + 1))[:count]
        pair = pairs(tail)[(n == 17) * -1]
        x, y, indices = rows(pair, dtype, of, n, k=7)
        options = {"space": pair, **words(tail, of)}
        with klcore.threads(1):
            expected = all_of(name, x, y, indices=indices, **options)
        before = _cpu.instruction_set()
        try:
            for isa in (k for k, supported in _cpu.instruction_sets().items() if supported):
                _cpu.use_instruction_set(isa)
                with klcore.threads(5):
                    assert_same(all_of(name, x, y, indices=indices, **options), expected, (n, dtype, isa))
        finally:
            _cpu.use_instruction_set(before)
        for r in range(min(count, 4)):
            alone = {k: v[r] if k == "tail_mass" else v for k, v in options.items()}
            assert_same(all_of(name, x[r], y[r], indices=indices[r], **alone), [a[r] for a in expected], (n, dtype, r))


def test_layouts():
    """Strides, byte orders and read-only memory change nothing."""
    x, y, indices = rows(("log_probs", "logits"))
    expected = all_of("kl_div", x, y, **logits(indices=indices))

    def apart(a):
        wide = np.zeros((2 * a.shape[0], 3 * a.shape[1]), a.dtype)
        wide[::2, ::3] = a
        return wide[::2, ::3]

    def swapped(a):
        return a.astype(a.dtype.newbyteorder())

    for turned in (np.asfortranarray, apart, swapped, lambda a: a[::-1, ::-1].copy()[::-1, ::-1]):
        assert_same(all_of("kl_div", turned(x), turned(y), **logits(indices=turned(indices))), expected)


@tails
@names
def test_bits_of_the_gpu(gpu, name, tail):
    """Every kernel of the first function; its relatives differ only in what comes between them."""
    first = name == NAMES[0]
    for pair, dtype in itertools.product(pairs(tail)[: None if first else 1], DTYPES if first else ["float32"]):
        for count, n in ((6, 11), (6, 300), (2, 2100)) if first else ((2, 1100),):
            of = ROWS[:count]
            x, y, indices = rows(pair, dtype, of, n)
            options = {"space": pair, **words(tail, of)}
            found = all_of(name, *map(gpu.put, (x, y)), indices=gpu.put(indices), **options)
            assert_same(map(gpu.get, found), all_of(name, x, y, indices=indices, **options), (pair, n, dtype))


def test_bad_rows_on_the_gpu(gpu):
    """Nothing waits to find out: the rows are NaN."""
    x, y, indices = (np.array(a) for a in rows(("log_probs", "logits"), of=NEAR))
    for bad in (11, -2, 2**40):
        wrong = indices.copy()
        wrong[1, 2] = bad
        found = all_of("kl_div", gpu.put(x), gpu.put(y), **logits(indices=gpu.put(wrong)))
        expected = all_of("kl_div", x[::2], y[::2], **logits(indices=indices[::2]))
        assert all(np.isnan(gpu.get(a)[1]).all() for a in found)
        assert_same([gpu.get(a)[::2] for a in found], expected)
    masses = gpu.put(np.array([0.1, 1.5, 0.1]))
    value = call("kl_div", gpu.put(x), gpu.put(y), **logits(indices=gpu.put(indices), tail_mass=masses))
    assert np.isnan(gpu.get(value)).tolist() == [False, True, False]


# ---- what is refused -------------------------------------------------------------------------------------------------

I = np.array([[0, 2], [4, 1]])  # noqa: E741
REFUSED = {
    "no tail": ({"tail": None}, TypeError, ("bucket", "zero", "renorm", "rel_entr")),
    "no indices": ({"indices": None}, TypeError, ("tail", "indices")),
    "mass without indices": ({"indices": None, "tail": None, "tail_mass": 0.5}, TypeError, ("tail_mass", "indices")),
    "unknown tail": ({"tail": "others"}, ValueError, ("tail", "'bucket'", "'zero'", "'renorm'", "'others'")),
    "tail of another type": ({"tail": 0}, (TypeError, ValueError), ("tail", "'bucket'")),
    "mass and zero": ({"tail": "zero", "tail_mass": 0.5}, ValueError, ("tail_mass", "bucket", "zero")),
    "mass and renorm": ({"tail": "renorm", "tail_mass": 0.5}, ValueError, ("tail_mass", "bucket", "renorm")),
    "too large an index": ({"indices": I + 1}, ValueError, ("indices", "5", "-1")),
    "too small an index": ({"indices": I - 2}, ValueError, ("indices", "-2")),
    "the largest index": ({"indices": np.full((2, 2), 2**64 - 1, np.uint64)}, ValueError, ("indices", str(2**64 - 1))),
    "an index of 8 bits": ({"indices": np.full((2, 2), 255, np.uint8)}, ValueError, ("indices", "255")),
    "more than all": ({"x": np.zeros((2, 6)), "indices": np.zeros((2, 6), int)}, ValueError, ("6", "5")),
    "other lengths": ({"indices": I[:, :1]}, ValueError, ("indices", "x", "(2, 1)", "(2, 2)")),
    "one number for all": ({"x": np.zeros((2, 1))}, ValueError, ("indices", "x", "(2, 1)", "(2, 2)")),
    "batch of indices": ({"indices": np.zeros((3, 2), int)}, ValueError, ("indices", "(3, 2)")),
    "batch of x": ({"x": np.zeros((3, 2)), "indices": I[0]}, ValueError, ("(3, 2)", "(2, 5)")),
    "no axis": ({"indices": np.array(0)}, ValueError, ("indices",)),
    "shape of tail_mass": ({"tail_mass": np.zeros(3)}, ValueError, ("tail_mass", "(3,)", "(2,)")),
    "negative mass": ({"tail_mass": [0.5, -0.25]}, ValueError, ("tail_mass", "-0.25", "[0, 1]")),
    "mass above 1": ({"tail_mass": 1.5}, ValueError, ("tail_mass", "1.5", "[0, 1]")),
    "NaN as mass": ({"tail_mass": [np.nan, 0.5]}, ValueError, ("tail_mass", "nan", "[0, 1]")),
    "mass of text": ({"tail_mass": ["a", "b"]}, TypeError, ("tail_mass",)),
    "complex mass": ({"tail_mass": np.ones(2) + 0j}, TypeError, ("tail_mass",)),
    "floats": ({"indices": I.astype(float)}, TypeError, ("indices", "integer", "float64")),
    "booleans": ({"indices": I > 0}, TypeError, ("indices", "integer", "bool")),
    "complex indices": ({"indices": I + 0j}, TypeError, ("indices", "integer")),
    "text": ({"indices": I.astype(str)}, TypeError, ("indices", "integer")),
    "objects": ({"indices": I.astype(object)}, TypeError, ("indices", "integer")),
    "masked": ({"indices": np.ma.array(I)}, TypeError, ("indices", "masked")),
    "bucket of logits": ({"space": "logits"}, ValueError, ("logits", "renorm", "bucket")),
    "zero of logits": ({"space": "logits", "tail": "zero"}, ValueError, ("logits", "renorm", "zero")),
    "bucket of counts": ({"space": ("counts", "logits")}, ValueError, ("counts", "renorm")),
    "temperature of nothing": ({"space": "log_probs", "temperature": 2.0}, ValueError, ("temperature", "logits")),
    "axis": ({"axis": 2}, Exception, ("axis",)),
    "space": ({"space": "odds"}, ValueError, ("space", "odds")),
    "reduction": ({"reduction": "each"}, ValueError, ("each",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    """Before anything is written."""
    changes, error, said = REFUSED[case]
    given = {"x": np.full((2, 2), -1.0), "y": np.zeros((2, 5)), **logits(indices=I), **changes}
    x, y = given.pop("x"), given.pop("y")
    out = np.full(2, 7.0), np.full(x.shape, 7.0), np.full(y.shape, 7.0)
    for name in NAMES:
        with pytest.raises(error) as raised:
            call(name, x, y, **given, return_grad=("x", "y"), out=out)
        assert [word for word in said if word not in str(raised.value)] == [], str(raised.value)
        assert all((a == 7).all() for a in out)


def test_who_takes_indices():
    """Divergences that are sums over the classes, for which other systems have a top-k form."""
    assert len(NAMES) == 5
    assert NAMES[:2] == ["kl_div", "rel_entr"]
    assert set(NAMES[2:]) == {"js_div", "mixed_kl_div", "tv_dist"}
    for name in OPERATIONS.keys() - set(NAMES):
        with pytest.raises(TypeError, match="indices"):
            conftest.call(name, [1.0], [1.0], indices=[0], tail="bucket")


# ---- whatever the rows -----------------------------------------------------------------------------------------------


@st.composite
def some_rows(draw):
    """p and q of all classes, some of them tiny, and the classes in some order."""
    n = draw(st.integers(2, 12))
    exponents = st.one_of(st.floats(-3, 3), st.sampled_from([-20.0, 0.0]), st.floats(-40, 0))
    a, b = (np.array(draw(st.lists(exponents, min_size=n, max_size=n))) for _ in range(2))
    b = a + 10.0 ** draw(st.sampled_from([-6, -3, 0])) * b if draw(st.booleans()) else b
    return log_softmax(a), log_softmax(b), draw(st.permutations(range(n))), draw(st.integers(1, n - 1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(some_rows(), st.sampled_from(("float64", "float32")))
def test_bounds(drawn, dtype):
    """Never negative; never above the divergence of all classes; never less if one more class is listed."""
    a, b, order, k = drawn
    order = np.array(order)
    a, b = a.astype(dtype), b.astype(dtype)
    p = np.exp(a.astype("float64"))
    eps = float(np.finfo(dtype).eps)
    for name in NAMES:
        if name == "rel_entr":
            continue
        values = []
        for listed in (order[:k], order[: k + 1], order):
            left = min(1.0, p[np.setdiff1d(np.arange(len(a)), listed)].sum())
            options = logits(indices=listed)
            value = call(name, a[listed], b, **options, tail_mass=left)
            values.append(value)
            for tail in ("bucket", "zero", "renorm"):
                assert call(name, a[listed], b, **{**options, "tail": tail}) >= 0
        few, more, everything = values
        full = call(name, a, b, space=("log_probs", "logits"))
        assert 0 <= few <= more * (1 + 16 * eps) + 1e-15
        assert more <= everything * (1 + 16 * eps) + 1e-15
        np.testing.assert_allclose(everything, full, rtol=4e-6 if dtype == "float32" else 1e-12, atol=1e-15)
