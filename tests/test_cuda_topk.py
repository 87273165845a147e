"""Calls in which x lists some classes of y give the CPU's bits on a GPU; invalid numbers make their row NaN there.

test_topk.py shows that the CPU's results are right.
"""

import importlib
import math

import numpy as np
import pytest
from conftest import DTYPES
from test_cuda import PAIR, assert_bits, backend, bits, emulated, settings, unseen  # noqa: F401

import klcore
from klcore.operations import KL_DIV, Call

LOGS = ("log_probs", "logits")
# operation, spaces, tail, dtypes, classes of y, and the number of listed classes
CASES = [
    ("kl_div", LOGS, "bucket", ("float32", "float32"), 5000, 33),
    ("kl_div", LOGS, "bucket", ("float32", "float32"), 1500, 1025),
    ("kl_div", LOGS, "bucket", ("float32", "float64"), 1025, 1025),
    ("kl_div", LOGS, "zero", ("float64", "float32"), 1025, 1024),
    ("kl_div", LOGS, "bucket", ("float16", "bfloat16"), 1024, 32),
    ("kl_div", ("probs", "probs"), "mass", ("float32", "float64"), 127, 127),
    ("js_div", ("probs", "logits"), "zero", ("bfloat16", "float32"), 1024, 100),
    ("mixed_kl_div", ("logits", "logits"), "renorm", ("float32", "float32"), 127, 40),
    ("rel_entr", ("log_probs", "log_probs"), "zero", ("float64", "float64"), 1, 1),
    ("tv_dist", ("probs", "counts"), "bucket", ("float32", "float16"), 2500, 0),
]


def numbers(space, shape, dtype, seed=0):
    a = np.random.default_rng(seed).normal(0, 2, shape)
    if space != "logits":
        a -= np.log(np.exp(a).sum(-1, keepdims=True) * 1.1) if shape[-1] else 0
    return (np.exp(a) if space in ("probs", "counts") else a).astype(DTYPES[dtype])


def teacher(space, dtypes, batch, n, count, seed=0):
    """(x, y, indices): some indices are -1, and some are equal; all of row 1 are."""
    indices = np.random.default_rng(seed).integers(-1, n, (*batch, count))
    indices.reshape(math.prod(batch), count)[1:2] = n // 2
    x = numbers(space[0], (*batch, count), dtypes[0], seed)
    return x, numbers(space[1], (*batch, n), dtypes[1], seed + 1), indices


def assert_same(gpu, compared, what, x, y, indices, operation="kl_div", **options):
    def put(a):
        return gpu.put(a) if isinstance(a, np.ndarray) else a

    function = getattr(klcore, operation)
    with np.errstate(all="ignore"):
        expected = function(x, y, indices=indices, **options)
        found = function(put(x), put(y), indices=put(indices), **{k: put(v) for k, v in options.items()})
    pack = [r if isinstance(r, tuple) else (r,) for r in (found, expected)]
    assert_bits(gpu, compared, *pack, what)


@pytest.mark.parametrize("case", CASES, ids=lambda c: " ".join(map(str, c[:1] + c[2:3] + c[4:])))
def test_bits(gpu, compared, case):
    operation, space, tail, dtypes, n, count = case
    options = {"tail": tail, "space": space, "return_grad": PAIR, "weights": np.array([1, 2, 0.0, 0.5])}
    if tail == "mass":
        options |= {"tail": "bucket", "tail_mass": np.array([0, 0.1, 2, 1])}  # the mass of a row that does not count
    if "logits" in space:
        options["temperature"] = np.array([0.5, 1, 2, 8.0])
    for seed in (0, 1, 2):  # of the emulator's schedule, too
        with settings(gpu, seed=seed):
            assert_same(gpu, compared, case, *teacher(space, dtypes, (4,), n, count, seed), operation, **options)


@pytest.mark.parametrize("space", [LOGS, ("probs", "probs")], ids="/".join)
@pytest.mark.parametrize("tail", ["bucket", "renorm"])
def test_gradients_summed_over_rows(gpu, compared, space, tail):
    """Of x, of y, and of both over different axes; over more than 1024 rows."""
    dtypes = ("float32", "float32")
    options = {"tail": tail, "space": space, "return_grad": PAIR}
    for batch, of_x, of_y, n in (
        ((2100,), np.s_[:], np.s_[0], 40),
        ((2100,), np.s_[0], np.s_[:], 40),
        ((3, 2), np.s_[:, :1], np.s_[:1], 1100),
        ((2, 3), np.s_[0], np.s_[:, :1], 130),
    ):
        x, y, indices = teacher(space, dtypes, batch, n, 5)
        weights = (np.arange(np.prod(batch)) % 3 / 2).reshape(batch)
        assert_same(
            gpu, compared, (batch, n), x[of_x], y[of_y], indices, reduction="rowmean", weights=weights, **options
        )


@pytest.mark.parametrize("axis", [0, 1])
def test_class_axis(gpu, compared, axis):
    arrays = [np.moveaxis(a, -1, axis) for a in teacher(LOGS, ("float32", "float32"), (3, 2), 1500, 7)]
    options = {"space": LOGS, "tail": "bucket", "axis": axis, "temperature": 2.0}
    for laid in (arrays, [np.ascontiguousarray(a) for a in arrays]):
        assert_same(gpu, compared, axis, *laid, return_grad=PAIR, reduction="mean", **options)
        assert_same(gpu, compared, axis, *laid, reduction="none", **options)


@pytest.mark.parametrize("reduction", ["row", "none", "sum"])
@pytest.mark.parametrize("tail", ["bucket", "renorm"])
def test_cotangents(gpu, compared, reduction, tail):
    cpu = importlib.import_module("klcore.backends.cpu")
    x, y, indices = teacher(LOGS, ("float32", "float32"), (3,), 300, 7)
    terms = indices.shape[-1] + (tail == "bucket")
    cotangent = np.random.default_rng(0).normal(size={"row": 3, "none": (3, terms)}.get(reduction, ()))
    cotangent = cotangent * (np.arange(3) > 0) if reduction == "row" else cotangent  # of one row nothing is asked
    call = Call(KL_DIV, x, y, LOGS, -1, reduction, return_grad=PAIR, cotangent=cotangent, indices=indices, tail=tail)
    put = {name: gpu.put(getattr(call, name)) for name in ("x", "y", "cotangent", "indices")}
    assert_bits(gpu, compared, backend().compute(call._replace(**put)), cpu.compute(call), reduction)


def test_integers(gpu, compared):
    x, y, indices = teacher(LOGS, ("float32", "float32"), (2,), 100, 7)
    for dtype in ("int8", "int32", "uint16", "uint64"):
        given = np.maximum(indices, 0 if dtype[0] == "u" else -1).astype(dtype)
        assert_same(gpu, compared, dtype, x, y, given, space=LOGS, tail="bucket", return_grad=PAIR)


def test_nothing_to_compute(gpu, compared):
    x, y, indices = teacher(LOGS, ("float32", "float32"), (2,), 100, 7)
    for given in ((x[:0], y[:0], indices[:0]), (x[:, :0], y[:, :0], indices[:, :0]), (x[0], y[0], indices[0])):
        assert_same(gpu, compared, "", *given, space=LOGS, tail="bucket", return_grad=PAIR)


@pytest.mark.parametrize("tail", ["bucket", "zero", "renorm"])
def test_what_the_cpu_refuses_makes_its_row_nan(gpu, tail):
    x, y, indices = teacher(LOGS, ("float32", "float32"), (3,), 100, 7)
    options = {"space": LOGS, "tail": tail, "return_grad": PAIR}
    expected = klcore.kl_div(x, y, indices=indices, **options)
    bad = {"indices": np.where(np.arange(3)[:, None] == 1, 100, indices), "temperature": np.array([1, -1, 1.0])}
    bad |= {"tail_mass": np.array([0.5, 1.5, 0.5])} if tail == "bucket" else {}
    for name, wrong in bad.items():
        given = {"indices": indices, **options, name: wrong}
        if name == "tail_mass":
            expected = klcore.kl_div(x, y, **given | {name: np.full(3, 0.5)})
        with pytest.raises(ValueError, match=name):
            klcore.kl_div(x, y, **given)
        on = {k: gpu.put(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}
        for f, e in zip(klcore.kl_div(gpu.put(x), gpu.put(y), **on), expected, strict=True):
            f = gpu.get(f)
            assert np.isnan(f[1]).all(), name
            assert (bits(f[::2]) == bits(e[::2])).all(), name
        weights = gpu.put(np.array([1, 0, 1.0]))
        for f in klcore.kl_div(gpu.put(x), gpu.put(y), **on, weights=weights):
            assert (gpu.get(f)[1] == 0).all(), name


def test_gradient_over_y(gpu):
    x, y, indices = teacher(LOGS, ("float32", "float32"), (3,), 2500, 7)
    options = {"space": LOGS, "tail": "bucket", "return_grad": "y"}
    _, expected = klcore.kl_div(x, y, indices=indices, **options)
    out = gpu.put(y)
    found = klcore.kl_div(gpu.put(x), out, indices=gpu.put(indices), out=(None, out), **options)[1]
    assert found is out
    assert (bits(gpu.get(out)) == bits(expected)).all()


def test_nothing_waits_for_the_device(emulated, monkeypatch):  # noqa: F811
    x, y, indices = (emulated.put(a) for a in teacher(LOGS, ("float32", "float32"), (3,), 100, 7))
    mass, weights = emulated.put(np.full(3, 0.1)), emulated.put(np.ones(3))
    with unseen(monkeypatch):
        for reduction in ("row", "none", "rowmean", "mean"):
            klcore.kl_div(
                x, y, indices=indices, tail="bucket", tail_mass=mass, space=LOGS, reduction=reduction, weights=weights,
                return_grad=PAIR if reduction != "none" else None, temperature=emulated.put(np.ones(3)),
            )  # fmt: skip
