"""Dask arrays: lazy, whatever their chunks; the bits of the whole array where promised, elsewhere the published
bounds."""

import functools
import importlib
import itertools
import operator
import pickle
import sys
import threading
import warnings

import conftest
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_accuracy import into, pairs_of

import klcore
from klcore.operations import OPERATIONS

dask = pytest.importorskip("dask", reason="dask is not installed")
da = pytest.importorskip("dask.array", reason="dask.array is not installed")

SPACES, PAIRS, CALLS = oracle.SPACES, oracle.PAIRS, oracle.CALLS
REDUCTIONS = ("row", "none", "sum", "rowmean", "batchmean", "mean")
DTYPES = {"float64": np.dtype("f8"), "float32": np.dtype("f4"), "float16": np.dtype("f2")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(autouse=True)
def scheduler():
    """In this thread, unless a test says otherwise."""
    with dask.config.set(scheduler="synchronous"):
        yield


# ---- data and calls --------------------------------------------------------------------------------------------------


@functools.cache
def numbers(shape, space, dtype, side, kind="ordinary"):
    """Numbers of a space, the classes last; `kind` "special" has a row with NaN, zeros and excluded classes."""
    rng = np.random.default_rng([shape[-1], side == "x"])
    z = rng.normal(size=shape) * np.linspace(0.1, 5, shape[-1])
    if kind == "special":
        z.reshape(-1, shape[-1])[1, rng.random(shape[-1]) < 0.4] = -np.inf
    a = into(z, space, DTYPES[dtype])
    if kind == "special":
        a.reshape(-1, shape[-1])[2, 3] = np.nan
    a.flags.writeable = False
    return a


def arguments(operation, spaces, shape, dtype, kind="ordinary"):
    of = OPERATIONS[operation].gradients
    return [numbers(shape, s, dtype, side, kind) for s, side in zip(spaces, of, strict=False)]


def call(operation, arrays, space, gradient=True, **keywords):
    wanted = {"return_grad": OPERATIONS[operation].gradients} if gradient else {}
    result = conftest.call(operation, arrays[0], arrays[-1], space, **wanted, **keywords)
    return result if isinstance(result, tuple) else (result,)


def chunked(arrays, *chunks):
    return [da.from_array(a, chunks=c) for a, c in zip(arrays, chunks * 2, strict=False)]


def assert_same_bits(got, expected, what=""):
    got, expected = np.asarray(got), np.asarray(expected)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), what
    assert got.tobytes() == expected.tobytes(), what


def assert_close(got, expected, factor=1):
    """Two results of klcore, each within its bound."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    base = "float64" if got.dtype == np.float64 else "float32"
    relative = oracle.TOLERANCES["gradient", base] + oracle.TOLERANCES["rounding", got.dtype.name] * 2
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    finite = expected[np.isfinite(expected)]
    scale = np.max(np.abs(finite), initial=1e-300)
    np.testing.assert_allclose(got, expected, rtol=relative * factor, atol=relative * factor * scale)


def check(lazy, whole, compare):
    """Lazy results against those of the whole arrays; announced shapes, dtypes and chunks against the real ones."""
    assert all(isinstance(a, da.Array) for a in lazy)
    for a, b, computed in zip(lazy, whole, dask.compute(*lazy), strict=True):
        assert (a.shape, a.dtype) == (np.shape(b), b.dtype)
        compare(computed, b)
        if a.ndim:  # every block by itself
            blocks = np.empty(a.numblocks, object)
            for at, block in zip(np.ndindex(*a.numblocks), a.to_delayed().ravel(), strict=True):
                blocks[at] = block
                assert block.compute().shape == tuple(c[k] for c, k in zip(a.chunks, at, strict=True))


# ---- lazy ------------------------------------------------------------------------------------------------------------


def explode(block):
    raise RuntimeError("computed")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunks", [(2, 2100), (2, 500)])
def test_nothing_is_computed_before_it_is_asked_for(reduction, chunks):
    x, y = (da.zeros((6, 2100), chunks=chunks).map_blocks(explode, dtype="f8", meta=np.empty((0, 0))) for _ in "xy")
    weights = da.ones(6, chunks=2).map_blocks(explode, dtype="f8", meta=np.empty(0))
    for pair in PAIRS:
        results = call("kl_div", (x, y), pair, reduction=reduction, weights=weights)
        assert all(isinstance(a, da.Array) for a in results)
        for a in results:
            with pytest.raises(RuntimeError, match="computed"):
                a.compute()


def test_huge_arrays_cost_nothing():
    """Four petabytes: shapes, dtypes and chunks are known, and no array of such a size is created."""
    x = da.zeros((1 << 25, 1 << 24), dtype="f8", chunks=(1 << 24, 1 << 23))
    value, dx, dy = klcore.kl_div(x, x[:1], space="logits", return_grad=("x", "y"), reduction="mean")
    assert (value.shape, dx.shape, dy.shape) == ((), x.shape, (1, 1 << 24))
    assert klcore.kl_div(x, x, reduction="none").chunks == x.chunks


@pytest.mark.parametrize("chunks", [(2, 40), (2, 15)])
def test_names_are_those_of_the_computation(chunks):
    """The same call has the same keys, so that dask computes it once; another call has different keys."""
    x, y = chunked(arguments("kl_div", ("logits", "logits"), (6, 40), "float32"), chunks)
    first, again = (klcore.kl_div(x, y, space="logits", temperature=2.0) for _ in range(2))
    assert first.name == again.name
    others = {
        klcore.kl_div(x, y, space="logits").name,
        klcore.rel_entr(x, y, space="logits", temperature=2.0).name,
        klcore.kl_div(y, x, space="logits", temperature=2.0).name,
        klcore.kl_div(x, y, space="logits", temperature=2.0, weights=[1, 1, 1, 1, 1, 2]).name,
    }
    assert len(others | {first.name}) == 5


# ---- the class axis in one chunk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operation", "space"), CALLS)
def test_rows_have_the_bits_of_the_whole(operation, space, dtype):
    arrays = arguments(operation, space, (7, 130), dtype, "special")
    weights = np.array([1, 0.5, 0, 2, 1, 1, 3])  # the row with NaN is skipped
    for reduction, w in itertools.product(("row", "none"), (None, weights)):
        whole = call(operation, arrays, space, reduction=reduction, weights=w)
        lazy = call(operation, chunked(arrays, (3, 130), ((2, 4, 1), 130)), space, reduction=reduction, weights=w)
        for a, b in zip(dask.compute(*lazy), whole, strict=True):
            assert_same_bits(a, b, (reduction, w is None))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("space", [("probs", "probs"), ("logits", "logits"), ("log_probs", "logits")])
def test_any_axis(axis, parts, space):
    arrays = [np.moveaxis(a, -1, axis) for a in arguments("kl_div", space, (4, 5, 2100), "float32")]
    chunks = [2, 3]
    chunks.insert(axis % 3, 2100 if parts == 1 else 1024)
    for reduction in ("row", "none", "sum"):
        keywords = {"axis": axis, "reduction": reduction}
        whole = call("kl_div", arrays, space, **keywords)
        lazy = call("kl_div", chunked(arrays, tuple(chunks)), space, **keywords)
        check(lazy, whole, assert_close if reduction == "sum" else assert_same_bits)


@pytest.mark.quick(3)
@pytest.mark.parametrize("chunks", [(2, 3, 4000), (2, 3, 1500)])
@pytest.mark.parametrize(
    ("of_x", "of_y"),
    [((6, 5), (1, 5)), ((6, 5), (5,)), ((6, 1), (1, 5)), ((1, 1), (6, 5)), ((), (6, 5)), ((1,), (6, 1)), ((6, 5), ())],
)
def test_broadcasting(of_x, of_y, chunks):
    """Between x and y; gradients of the broadcast operand are summed over all blocks."""
    for space in (("probs", "probs"), ("logits", "logits"), ("logits", "probs")):
        arrays = [numbers((*b, 2100), s, "float32", side) for b, s, side in zip((of_x, of_y), space, "xy", strict=True)]
        lazy = [da.from_array(a, chunks=chunks[3 - a.ndim :]) for a in arrays]
        for reduction, weights in (("row", None), ("rowmean", np.linspace(0, 2, 5)[None]), ("none", 2)):
            keywords = {"reduction": reduction, "weights": weights}
            if weights is not None and np.broadcast_shapes(of_x, of_y) != (6, 5):
                keywords["weights"] = 2
            check(call("kl_div", lazy, space, **keywords), call("kl_div", arrays, space, **keywords), assert_close)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("chunks", [(50, 40), (50, 15)])
def test_parts_of_a_gradient_are_not_rounded(dtype, chunks):
    """Summed over 2000 rows in 40 blocks, a 16-bit gradient is as accurate as in one block."""
    x = numbers((2000, 40), "probs", dtype, "x")
    y = numbers((40,), "probs", dtype, "y")
    whole = klcore.kl_div(x, y, return_grad="y")[1]
    lazy = klcore.kl_div(da.from_array(x, chunks=chunks), da.from_array(y, chunks=-1), return_grad="y")[1]
    np.testing.assert_array_equal(lazy.compute(), whole)


# ---- the class axis in several chunks --------------------------------------------------------------------------------

UNEVEN = (1, 699, 0, 1024, 376)  # 2100


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("space", PAIRS)
@pytest.mark.parametrize("target", [1e-12, 1e-6, 1.0, 900.0])
def test_kl_of_any_size(space, dtype, target):
    """The published bounds, whatever the chunks."""
    a, b = pairs_of(2100, target, "flat", rows=1)
    factor = 1.0
    if target > 50:  # as probabilities of float32, only for masses above 1
        factor, b = (40.0 if "probs" in space else 1.0), np.maximum(b, b.max() - 30) if "probs" in space else b
    arrays = [into(z, s, DTYPES[dtype], factor if s == "probs" else 1.0) for z, s in zip((a, b), space, strict=True)]
    true = oracle.fast("kl_div", *arrays, space)
    got = klcore.kl_div(*chunked(arrays, (1, UNEVEN)), space=space)
    oracle.assert_answer({"value": got.compute()}, true, "kl_div", space)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("operation", "space"), CALLS)
def test_everything_against_the_oracle(operation, space, dtype):
    arrays = arguments(operation, space, (2, 2100), dtype)
    lazy = chunked(arrays, ((1, 1), UNEVEN), (2, (1000, 1100)))
    value, *gradients = call(operation, lazy, space)
    (terms,) = call(operation, lazy, space, gradient=False, reduction="none")
    value, terms, *gradients = dask.compute(value, terms, *gradients)
    names = dict(zip(("dx", "dy"), gradients, strict=False))
    x, y = arrays[0], arrays[-1]
    true = oracle.fast(operation, x, y, space)
    oracle.assert_answer({"value": value, "terms": terms, **names}, true, operation, space)


@pytest.mark.quick(3)
@pytest.mark.parametrize(("operation", "space"), CALLS)
def test_multiples_of_1024_classes_have_the_bits_of_the_whole(operation, space):
    for dtype in DTYPES:
        arrays = arguments(operation, space, (3, 5000), dtype, "special")
        for reduction in ("row", "none"):
            weights = [1, 2, 1]
            whole = call(operation, arrays, space, reduction=reduction, weights=weights)
            lazy = call(
                operation, chunked(arrays, (2, 1024), (1, (3072, 1928))), space, reduction=reduction, weights=weights
            )
            for a, b in zip(dask.compute(*lazy), whole, strict=True):
                assert_same_bits(a, b, (dtype, reduction))


def test_millions_of_classes_have_the_bits_of_the_whole():
    """More chunks of 1024 than are merged at a time."""
    n = 1024 * 1024 + 70_000
    for space in (("probs", "probs"), ("logits", "logits"), ("logits", "probs")):
        arrays = arguments("kl_div", space, (1, n), "float32")
        lazy = klcore.kl_div(*chunked(arrays, (1, 300 * 1024)), space=space)
        assert_same_bits(lazy.compute(), klcore.kl_div(*arrays, space=space))


@pytest.mark.quick(3)
@pytest.mark.parametrize("space", PAIRS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_rows_in_parts(space, dtype):
    """Excluded classes, NaN, and rows whose blocks have nothing in common."""
    arrays = [a.copy() for a in arguments("kl_div", space, (5, 2100), dtype, "special")]
    zero = [0.0 if s == "probs" else -np.inf for s in space]
    arrays[0][3, :1500] = zero[0]
    arrays[1][3, 1600:] = zero[1]  # impossible for y
    arrays[0][4, 700:] = zero[0]
    arrays[1][4, :600] = arrays[0][4, :600]
    for operation, reduction in itertools.product(("kl_div", "cross_entropy"), ("row", "none")):
        whole = call(operation, arrays, space, reduction=reduction)
        check(call(operation, chunked(arrays, (2, UNEVEN)), space, reduction=reduction), whole, assert_close)


@pytest.mark.parametrize("space", [*SPACES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", [(2, 2100), (2, 300), (1, UNEVEN)])
def test_equal_is_exactly_zero(space, dtype, chunks):
    x = numbers((4, 2100), space, dtype, "x")
    lazy = da.from_array(x, chunks=chunks)
    other = da.from_array(x.copy(), chunks=(4, 1024))
    for reduction in REDUCTIONS:
        value, dy = klcore.kl_div(lazy, other, space=space, reduction=reduction, return_grad="y")
        assert not np.any(value.compute())
        assert not np.any(dy.compute()[x != 0])  # at zero probabilities it is 1


# ---- totals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS[2:])
@pytest.mark.parametrize("chunks", [(7, 40), (7, 15), (100, 40)])
@pytest.mark.parametrize(
    "weights", [None, "numpy", "dask", "list", "scalar", "float32 dask in one chunk"], ids=lambda w: str(w)
)
def test_totals(reduction, chunks, weights):
    for space in (("probs", "probs"), ("logits", "logits"), ("log_probs", "probs")):
        arrays = arguments("kl_div", space, (100, 40), "float32")
        w = np.arange(100) % 5 / 2.0
        given = {
            None: None, "numpy": w, "dask": da.from_array(w, chunks=13), "list": w.tolist(), "scalar": 2,
            "float32 dask in one chunk": da.from_array(w.astype("f4"), chunks=-1),
        }[weights]  # fmt: skip
        w = 2 if weights == "scalar" else w if weights else None
        whole = call("kl_div", [a.astype("f8") for a in arrays], space, reduction=reduction, weights=w)
        lazy = call("kl_div", chunked(arrays, chunks), space, reduction=reduction, weights=given)
        value, *gradients = dask.compute(*lazy)
        # for float32, as if rows had never been rounded to it
        bound = oracle.TOLERANCES["kl", "float32"]
        assert value.dtype == np.float32
        assert abs(value - whole[0]) <= bound * whole[0]
        for got, expected in zip(gradients, whole[1:], strict=True):
            assert_close(got, expected.astype("f4"))
        wide = call(
            "kl_div", chunked([a.astype("f8") for a in arrays], chunks), space, reduction=reduction, weights=given
        )
        for got, expected in zip(dask.compute(*wide), whole, strict=True):
            assert_close(got, expected)


@pytest.mark.parametrize("reduction", ["rowmean", "mean"])
@pytest.mark.parametrize("chunks", [(2, 40), (3, 15)])
@pytest.mark.parametrize("exponent", [-1074, 1020])
def test_weights_at_an_end_of_the_range(reduction, chunks, exponent):
    weights = np.ldexp([5.0, 2, 0, 9, 1, 7], exponent)
    arrays = arguments("kl_div", ("probs", "probs"), (6, 40), "float64")
    lazy = call("kl_div", chunked(arrays, chunks), "probs", reduction=reduction, weights=da.from_array(weights, 4))
    whole = call("kl_div", arrays, "probs", reduction=reduction, weights=weights)
    check(lazy, whole, assert_close)
    assert np.isfinite(whole[0])


@pytest.mark.parametrize("classes", [30, 12])
@pytest.mark.parametrize("space", [("probs", "probs"), ("logits", "logits"), ("probs", "logits")])
def test_totals_over_multiples_of_1024_rows_have_the_bits_of_the_whole(space, classes):
    """Over the first batch axis, with the classes in one chunk."""
    arrays = arguments("kl_div", space, (5000, 30), "float64")
    weights = np.random.default_rng(1).random(5000)
    for reduction in REDUCTIONS[2:]:
        whole = call("kl_div", arrays, space, reduction=reduction, weights=weights)
        lazy = call("kl_div", chunked(arrays, (2048, 30), (1024, 30)), space, reduction=reduction, weights=weights)
        for got, expected in zip(dask.compute(*lazy), whole, strict=True):
            assert_same_bits(got, expected, reduction)


def test_rows_are_not_rounded_before_they_are_added():
    """A total of 20000 float32 rows is that of their float64 values, up to rounding."""
    x, y = arguments("kl_div", ("probs", "probs"), (20000, 3), "float32")
    exact = np.sum(np.array(oracle.fast("kl_div", x[:2000], y[:2000]).value))
    got = klcore.kl_div(*chunked((x[:2000], y[:2000]), (16, 3)), reduction="sum").compute()
    # a row's value is off by up to its bound, but these errors have different signs
    assert abs(got - exact) <= 0.1 * oracle.TOLERANCES["kl", "float32"] * exact


# ---- scheduling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(5, 1200), (5, 500)])
def test_scheduling_changes_no_bit(chunks):
    for space in (("probs", "probs"), ("logits", "logits"), ("logits", "probs")):
        x, y = arguments("kl_div", space, (30, 1200), "float32")
        lazy = call("kl_div", chunked((x, y[:1]), chunks), space, reduction="rowmean", weights=np.arange(30))
        once = dask.compute(*lazy)
        for workers, optimize in itertools.product((1, 2, 5), (True, False)):
            again = dask.compute(*lazy, scheduler="threads", num_workers=workers, optimize_graph=optimize)
            for a, b in zip(again, once, strict=True):
                assert_same_bits(a, b, (space, workers))


@st.composite
def chunkings(draw, size):
    """Sizes of chunks that add up to `size`."""
    cuts = sorted(draw(st.sets(st.integers(1, size - 1), max_size=4)) if size > 1 else [])
    return tuple(b - a for a, b in itertools.pairwise([0, *cuts, size]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_chunks(data):
    """x, y and weights with different chunks."""
    rows, n = data.draw(st.sampled_from([(1, 1), (3, 2), (6, 17), (5, 130), (2, 1500)]))
    space = data.draw(st.sampled_from(PAIRS))
    operation = data.draw(st.sampled_from(conftest.OF_TWO))
    dtype = data.draw(st.sampled_from(["float32", "float64"]))
    arrays = arguments(operation, space, (rows, n), dtype)
    of_y = 1 if data.draw(st.booleans()) else rows
    arrays[1] = arrays[1][:of_y]
    lazy = [da.from_array(a, chunks=tuple(data.draw(chunkings(k)) for k in a.shape)) for a in arrays]
    weights = (np.arange(1, rows + 1) % 4).astype(data.draw(st.sampled_from(["i4", "f2", "f4", ">f8"])))
    keywords = {"reduction": data.draw(st.sampled_from(REDUCTIONS)), "weights": weights}
    if "logits" in space:
        keywords["temperature"] = data.draw(st.sampled_from([1.0, 0.5, 3.0, np.arange(1, rows + 1) / 2]))
    whole = call(operation, arrays, space, **keywords)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", da.PerformanceWarning)  # chunks that cut each other up
        keywords["weights"] = da.from_array(weights, chunks=(data.draw(chunkings(rows)),))
        if isinstance(keywords.get("temperature"), np.ndarray) and data.draw(st.booleans()):
            keywords["temperature"] = da.from_array(keywords["temperature"], chunks=(data.draw(chunkings(rows)),))
        check(call(operation, lazy, space, **keywords), whole, assert_close)


@pytest.mark.parametrize("chunks", [(3, 1200), (3, 500)])
def test_one_thread_a_block_where_dask_has_several(chunks, monkeypatch):
    found = {}
    cpu = importlib.import_module("klcore.backends.cpu")

    def spy(name):
        original = getattr(cpu, name)

        def recorded(*arguments, **keywords):
            found.setdefault(threading.current_thread() is threading.main_thread(), set()).add(klcore.get_num_threads())
            return original(*arguments, **keywords)

        return recorded

    for name in ("block", "states", "merge", "outputs"):
        monkeypatch.setattr(cpu, name, spy(name))
    lazy = call(
        "kl_div", chunked(arguments("kl_div", ("logits", "probs"), (9, 1200), "float32"), chunks), ("logits", "probs")
    )
    with klcore.threads(3):
        dask.compute(*lazy)
    dask.compute(*lazy, scheduler="threads", num_workers=2)
    assert found == {True: {3}, False: {1}}


def test_functions_travel(python):
    """A graph can be pickled, and computed by a process that did not create it."""
    x, y = chunked(arguments("kl_div", ("logits", "logits"), (4, 30), "float32"), (2, 20))
    lazy = klcore.kl_div(x, y, space="logits")
    code = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).compute(scheduler='sync').tolist())"
    assert eval(python(code, pickle.dumps(lazy).hex())) == lazy.compute().tolist()


# ---- workers in processes, with less memory than the data
# --------------------------------------------------------------

ROOM = 96 << 20  # memory for a worker beyond what it takes when idle; blocks of 4 MiB need 40 MiB of it


def memory(field):
    """Bytes of this process from /proc: VmRSS now, VmHWM at its peak. Not getrusage, which begins with the parent's
    peak."""
    import pathlib

    import klcore.backends.dask  # noqa: F401 - idle includes all libraries: by far the most of a worker

    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


@pytest.fixture(scope="module")
def cluster():
    """Two workers that keep their data in memory, and are never stopped because of memory, or because they are slow.

    On a busy machine they answer late. If their memory grows, a test that measures it says by how much; dask's
    supervisor would only say that workers died.
    """
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    of_memory = dict.fromkeys(("spill", "target", "pause", "terminate"), False)
    with (
        dask.config.set(
            {
                **{f"distributed.worker.memory.{measure}": off for measure, off in of_memory.items()},
                "distributed.scheduler.worker-ttl": None,
                "distributed.comm.timeouts.connect": "10 minutes",
                "distributed.comm.timeouts.tcp": "10 minutes",
            }
        ),
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",  # any free port: each of pytest's processes may have a cluster
            local_directory=None,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from Linux's /proc")
@pytest.mark.parametrize("chunks", [(16, 65536), (64, 8192)])
def test_more_data_than_memory(cluster, chunks):
    """2 x 256 MiB of random logits through two workers of 96 MiB: the bits of the same rows computed here."""
    rng = da.random.default_rng(1)
    x = rng.standard_normal((1024, 65536), dtype="f4", chunks=chunks)
    y = x + 0.1 * rng.standard_normal((1024, 65536), dtype="f4", chunks=chunks)
    rows = klcore.kl_div(x, y, space="logits")
    total = klcore.kl_div(x, y, space="logits", reduction="rowmean")
    idle = cluster.run(memory, "VmRSS")
    values, mean = cluster.compute([rows, total], sync=True)
    peak = cluster.run(memory, "VmHWM")
    assert x.nbytes + y.nbytes > 2.5 * len(peak) * ROOM
    taken = {worker: peak[worker] - idle[worker] for worker in idle}
    assert max(taken.values()) < ROOM, {worker: f"{size >> 20} MiB" for worker, size in taken.items()}
    some = slice(100, 102)
    xs, ys = dask.compute(x[some], y[some])
    assert_same_bits(values[some], klcore.kl_div(xs, ys, space="logits"))
    true = oracle.fast("kl_div", xs[:1], ys[:1], "logits")
    oracle.assert_answer({"value": values[some][:1]}, true, "kl_div", "logits")
    assert abs(mean - values.mean(dtype="f8")) <= oracle.TOLERANCES["kl", "float32"] * mean


def test_gradients_on_workers(cluster):
    """Data that workers exchange is read-only."""
    for space, chunks in itertools.product(
        (("probs", "probs"), ("logits", "logits"), ("log_probs", "logits")), (2100, 700)
    ):
        arrays = arguments("kl_div", space, (6, 2100), "float32")
        arrays[1] = arrays[1][:1]
        lazy = call("kl_div", chunked(arrays, (2, chunks)), space, reduction="rowmean", weights=[1, 2, 0, 1, 1, 1])
        here = dask.compute(*lazy, scheduler="synchronous")
        for a, b in zip(cluster.compute(list(lazy), sync=True), here, strict=True):
            assert_same_bits(a, b)


# ---- CuPy chunks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(gpu):
    """Dask arrays with chunks on the device; for the emulator, dask cannot concatenate them."""
    if gpu.emulated:
        from dask.array.backends import concatenate_lookup

        def join(arrays, axis=0):
            return gpu.put(np.concatenate([gpu.get(a) for a in arrays], axis))

        concatenate_lookup.register(gpu.array_type(), join)
    return lambda a, chunks: da.from_array(gpu.put(a), chunks=chunks, asarray=False)


@pytest.mark.parametrize("chunks", [(3, 1300), (3, 1024)])  # the latter's states are merged
def test_cupy_chunks(gpu, on_gpu, chunks):
    weights = np.array([0, 1, 2, 0.5, 1, 1, 3])
    for space, reduction in itertools.product(
        (("probs", "probs"), ("logits", "logits")), ("row", "none", "sum", "rowmean")
    ):
        arrays = arguments("kl_div", space, (7, 1300), "float32")
        keywords = {"reduction": reduction, "weights": weights}
        if "logits" in space:
            keywords["temperature"] = np.arange(1, 8) / 2
        whole = call("kl_div", arrays, space, **keywords)
        lazy = call("kl_div", [on_gpu(a, chunks) for a in arrays], space, **keywords)
        for a, computed, expected in zip(lazy, dask.compute(*lazy), whole, strict=True):
            assert isinstance(a._meta, gpu.array_type())
            assert isinstance(computed, gpu.array_type())
            (assert_close if computed.ndim == 0 else assert_same_bits)(gpu.get(computed), expected)


def test_cupy_chunks_broadcast(gpu, on_gpu):
    x, y = arguments("kl_div", ("probs", "probs"), (7, 300), "float16")
    whole = klcore.kl_div(x, y[0], return_grad="y")[1]
    lazy = klcore.kl_div(on_gpu(x, (2, 300)), on_gpu(y[0], -1), return_grad="y")[1]
    assert_close(gpu.get(lazy.compute()), whole)


def test_lists_go_with_cupy_chunks(gpu, on_gpu):
    x = numbers((7, 30), "probs", "float32", "x")
    y = numbers((30,), "probs", "float64", "y")
    for arrays, whole in (((on_gpu(x, (3, 30)), y.tolist()), (x, y)), ((y.tolist(), on_gpu(x, (3, 30))), (y, x))):
        assert_same_bits(gpu.get(klcore.kl_div(*arrays).compute()), klcore.kl_div(*whole))


def test_chunks_of_two_libraries(gpu, on_gpu):
    x = np.full((2, 2), 0.5)
    with pytest.raises(TypeError, match=r"found x of cupy and y of numpy.*map_blocks\(cupy.asarray\)"):
        klcore.kl_div(on_gpu(x, 1), da.from_array(x))


# ---- shapes and sizes ------------------------------------------------------------------------------------------------


def test_no_dimensions():
    x, y = da.from_array(np.array(0.5)), da.from_array(np.array(0.25))
    for reduction in REDUCTIONS:
        whole = klcore.kl_div(0.5, 0.25, reduction=reduction, return_grad=("x", "y"))
        lazy = klcore.kl_div(x, y, reduction=reduction, return_grad=("x", "y"))
        assert [a.shape for a in lazy] == [()] * 3
        assert [float(a) for a in dask.compute(*lazy)] == [float(a) for a in whole]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 0, 3)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_in_it(shape, reduction):
    x = np.ones(shape)
    for space in (("probs", "probs"), ("logits", "logits"), ("probs", "logits")):
        with np.errstate(all="ignore"):
            whole = call("kl_div", (x, x), space, reduction=reduction)
        check(call("kl_div", chunked((x, x), 2), space, reduction=reduction), whole, assert_same_bits)


def test_lists_and_integers():
    x = da.from_array(np.array([[1, 2], [3, 4]]), chunks=1)
    np.testing.assert_array_equal(klcore.kl_div(x, [1, 2]).compute(), klcore.kl_div([[1, 2], [3, 4]], [1, 2]))
    np.testing.assert_array_equal(klcore.kl_div([1.0, 2.0], x).compute(), klcore.kl_div([1, 2], [[1, 2], [3, 4]]))
    swapped = np.array([0.5, 0.25], ">f8")
    value, dx = klcore.entropy(da.from_array(swapped), return_grad="x")
    assert dx.dtype == dx.compute().dtype == np.dtype("f8")
    assert value.compute() == klcore.entropy(swapped)


def unknown(n=30):
    x, y = chunked(arguments("kl_div", ("probs", "probs"), (12, n), "float64"), (5, n))
    kept = da.from_array(np.arange(12) % 3 > 0, chunks=5)
    return x[kept], y[kept]


def test_unknown_sizes():
    x, y = unknown()
    here = [a.compute() for a in (x, y)]
    assert np.isnan(x.shape[0])
    for reduction in ("row", "none", "sum"):
        for weights in (None, 2.0):
            keywords = {"reduction": reduction, "weights": weights, "return_grad": ("x", "y")}
            for got, expected in zip(
                dask.compute(*klcore.kl_div(x, y, **keywords)), klcore.kl_div(*here, **keywords), strict=True
            ):
                assert_close(got, expected)
    one = numbers((30,), "probs", "float64", "y")
    value, dy = dask.compute(*klcore.kl_div(x, da.from_array(one), return_grad="y"))
    assert_close(value, klcore.kl_div(here[0], one))
    assert_close(dy, klcore.kl_div(here[0], one, return_grad="y")[1])
    np.testing.assert_array_equal(klcore.kl_div(x.T, y.T, axis=0).compute(), klcore.kl_div(*here))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reduction": "rowmean"}, "x has an unknown size along axis 0.*rowmean.*x.compute_chunk_sizes"),
        ({"reduction": "mean"}, "reduction='mean' divides"),
        ({"reduction": "batchmean"}, "reduction='batchmean' divides"),
        ({"weights": np.ones(8)}, "x has an unknown size.*might not match"),
        ({"weights": da.ones(8)}, "x has an unknown size.*might not match"),
        ({"y": da.ones((8, 30))}, "x has an unknown size.*might not match"),
        ({"axis": 0}, "number of classes must be known"),
        ({"x": da.ones((8, 30)), "y": da.ones((8, 30)), "weights": unknown()[0][:, 0]}, "weights.compute_chunk_sizes"),
    ],
)
def test_sizes_that_must_be_known(change, words):
    x, y = unknown()
    with pytest.raises(ValueError, match=words):
        klcore.kl_div(**{"x": x, "y": y, **change})


# rows selected from three blocks of four: in blocks of 2, 1, 2 and of 1, 1, 2; a block broadcast by chance, and a total
KEPT = {"x": [0, 3, 5, 8, 9], "y": [0, 5, 8, 9]}


def left(a, rows, chunks):
    """Rows of an array in blocks of four, which dask counts when it computes."""
    return da.from_array(a, chunks=chunks)[da.from_array(np.isin(np.arange(12), rows), chunks=4)]


@pytest.mark.parametrize("classes", [30, 12])
@pytest.mark.parametrize("reduction", ["row", "none", "sum"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_unknown_sizes_must_match(operation, reduction, classes):
    """Block by block: x and y, or either and the weights; for values and for gradients."""
    row = OPERATIONS[operation]
    if not row.has_terms and reduction == "none":
        return
    space = ("logits",) * len(row.gradients)
    x, *y = arguments(operation, space, (12, 30), "float64")
    weights = np.linspace(1, 2, 12)
    for rows in [{"y": KEPT["y"]}, {"weights": KEPT["y"]}] if y else [{"weights": KEPT["y"]}]:
        rows = {name: rows.get(name, KEPT["x"]) for name in ("x", "y", "weights")}
        arrays = [left(a, rows[name], (4, classes)) for a, name in zip((x, *y), "xy", strict=False)]
        for result in call(operation, arrays, space, reduction=reduction, weights=left(weights, rows["weights"], 4)):
            with pytest.raises(ValueError, match=r"size 2 along axis 0.* of size 1 along axis 0.*compute_chunk_sizes"):
                result.compute()


@pytest.mark.parametrize("classes", [30, 12])
def test_axes_of_size_1_broadcast_beside_unknown_ones(classes):
    """Like a known size of 1: for an operand, for the weights, and along another axis."""
    (x, y), one = arguments("kl_div", ("logits", "logits"), (12, 3, 30), "float64"), np.s_[:, :1]
    weights = np.linspace(1, 2, 12)[:, None]
    kept, chunks = KEPT["x"], (4, 2, classes)
    lazy_y, lazy_w = left(y[one], kept, chunks), left(weights, kept, (4, 1))
    for lazy, here in [
        ((left(x, kept, chunks), lazy_y, lazy_w), (x[kept], y[kept][one], weights[kept])),
        ((da.from_array(x[:1]), lazy_y, lazy_w), (x[:1], y[kept][one], weights[kept])),
        ((left(x, kept, chunks), da.from_array(y[0]), lazy_w), (x[kept], y[0], weights[kept])),
        ((left(x, kept, chunks), lazy_y, da.ones((1, 3))), (x[kept], y[kept][one], np.ones((1, 3)))),
    ]:
        for keywords in ({"reduction": "none"}, {"reduction": "sum", "denominator": 7.0}):
            keywords |= {"space": "logits", "return_grad": ("x", "y")}
            results = dask.compute(*klcore.kl_div(*lazy[:2], weights=lazy[2], **keywords))
            for got, expected in zip(results, klcore.kl_div(*here[:2], weights=here[2], **keywords), strict=True):
                assert_close(got, expected)


@pytest.mark.parametrize("exponent", [-1074, 1020])
def test_weights_at_an_end_of_the_range_beside_a_denominator(exponent):
    """With an unknown number of rows."""
    x, y = arguments("kl_div", ("probs", "probs"), (12, 30), "float64")
    kept, weights = KEPT["x"], np.full(12, 2.0**exponent)
    keywords = {"reduction": "sum", "denominator": 5 * 2.0**exponent}
    expected = klcore.kl_div(x[kept], y[kept], weights=weights[kept], **keywords)
    lazy = [left(a, kept, (4, 30)) for a in (x, y)]
    for w in (left(weights, kept, 4), da.from_array(weights[:1])):
        assert_close(klcore.kl_div(*lazy, weights=w, **keywords).compute(), expected)


# ---- lists of classes ------------------------------------------------------------------------------------------------

LISTED = [name for name, operation in OPERATIONS.items() if operation.takes_indices]
TAILS = {"bucket": ("probs", "logits"), "mass": ("log_probs", "probs"), "zero": ("probs", "counts")}
TAILS["renorm"] = ("logits", "logits")


def listing(tail, batch=(7,), n=30, dtype="float32"):
    """x of six of y's classes, y, and the other arguments by name: a row of weight 0 must be skipped."""
    rng = np.random.default_rng(3)
    x, y = (numbers((*batch, n), s, dtype, side) for s, side in zip(TAILS[tail], "xy", strict=True))
    indices = np.argsort(rng.random((*batch, n)))[..., :6].astype(np.int32)
    x = np.take_along_axis(x, indices, -1)
    indices[..., 2] = -1
    more = {"indices": indices, "weights": np.resize([1, 0.5, 0, 2, 1, 1, 3], batch)}
    more["indices"][more["weights"] == 0] = 99
    if tail == "mass":
        more["tail_mass"] = rng.random(batch)
    if "logits" in TAILS[tail]:
        more["temperature"] = rng.uniform(0.5, 2, batch)
    return x, y, more


def of_list(operation, x, y, tail, more, **keywords):
    keywords |= {"tail": "bucket" if tail == "mass" else tail, "space": TAILS[tail], "return_grad": ("x", "y")}
    return getattr(klcore, operation)(x, y, **more, **keywords)


def in_chunks(arrays, rows):
    """Rows in chunks, the classes in one."""
    return {name: da.from_array(a, chunks=(*rows, *[-1] * (a.ndim - len(rows)))) for name, a in arrays.items()}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("operation", LISTED)
def test_lists_of_classes_have_the_bits_of_the_whole(operation, tail):
    """All reductions of one operation; NumPy lists with dask arrays."""
    x, y, more = listing(tail)
    lazy = in_chunks({"x": x, "y": y}, [3]), in_chunks(more, [(2, 4, 1)])
    for reduction in REDUCTIONS if operation == "kl_div" else ["row"]:
        whole = of_list(operation, x, y, tail, more, reduction=reduction)
        for rest in (lazy[1], more) if reduction == "row" else lazy[1:]:
            found = of_list(operation, *lazy[0].values(), tail, rest, reduction=reduction)
            check(found, whole, assert_same_bits)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_lists_along_any_axis(dtype):
    """Gradients of broadcast operands are summed over all blocks, for lists too."""
    x, y, more = listing("mass", (4, 5), dtype=dtype)
    more["indices"] = np.maximum(more["indices"] % 30, 0)
    for axis in (0, 1, -1):
        arrays = {"x": x[0], "y": y[:, :1], "indices": more["indices"]}
        arrays = {name: np.moveaxis(a[(None,) * (3 - a.ndim)], -1, axis) for name, a in arrays.items()}
        lazy = {
            name: da.from_array(a, chunks=[-1 if k == axis % 3 else 2 for k in range(3)]) for name, a in arrays.items()
        }
        by_row = {"tail_mass": more["tail_mass"][:, :1], "weights": more["weights"][0]}
        for reduction in ("row", "none", "batchmean"):
            options = {"axis": axis, "reduction": reduction}
            whole = of_list(
                "kl_div", arrays["x"], arrays["y"], "mass", by_row | {"indices": arrays["indices"]}, **options
            )
            found = of_list("kl_div", lazy["x"], lazy["y"], "mass", by_row | {"indices": lazy["indices"]}, **options)
            check(found, whole, assert_close)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_lists_of_cupy_chunks(gpu, on_gpu, dtype):
    """With NumPy lists; gradients of an operand that blocks share."""
    x, y, more = listing("mass", dtype=dtype)
    for of_x, of_y, indices in ((x, y, more["indices"]), (x[0], y, more["indices"][0]), (x, y[0], more["indices"])):
        rest = more | {"indices": indices}
        lazy = on_gpu(of_x, (3, -1) if of_x.ndim > 1 else -1), on_gpu(of_y, (2, -1) if of_y.ndim > 1 else -1)
        shared = min(of_x.ndim, of_y.ndim) == 1
        for reduction in ("row", "none", "rowmean"):
            whole = of_list("kl_div", of_x, of_y, "mass", rest, reduction=reduction)
            for a, b in zip(of_list("kl_div", *lazy, "mass", rest, reduction=reduction), whole, strict=True):
                computed = a.compute()
                assert isinstance(computed, gpu.array_type())
                (assert_close if shared or a.ndim == 0 else assert_same_bits)(gpu.get(computed), b)


def test_lists_are_lazy():
    """Nothing is computed, and nothing of the arrays' size is created; the same call has the same keys."""
    y = da.zeros((1 << 25, 1 << 24), dtype="f4", chunks=(1 << 24, -1)).map_blocks(
        explode, dtype="f4", meta=np.empty((0, 0))
    )
    x, w = y[:, :64], y[:, 0]
    options = {"indices": x.astype("i4"), "tail": "bucket", "tail_mass": w, "weights": w, "return_grad": ("x", "y")}
    terms, dx, dy = klcore.kl_div(x, y, reduction="none", **options)
    assert (terms.shape, dx.shape, dy.shape) == ((1 << 25, 65), x.shape, y.shape)
    assert terms.name == klcore.kl_div(x, y, reduction="none", **options)[0].name
    assert klcore.kl_div(x, y, reduction="mean", **options)[0].shape == ()
    with pytest.raises(RuntimeError, match="computed"):
        terms[:1].compute()


def test_lists_of_unknown_sizes():
    x, y, more = listing("bucket", (12,))
    kept = KEPT["x"]
    here = {name: a[kept] for name, a in ({"x": x, "y": y} | more).items()}
    lazy = {name: left(a, kept, (4, *[-1] * (a.ndim - 1))) for name, a in ({"x": x, "y": y} | more).items()}
    for reduction in ("row", "none", "sum"):
        whole, found = (
            of_list("kl_div", a.pop("x"), a.pop("y"), "bucket", a, reduction=reduction)
            for a in (dict(here), dict(lazy))
        )
        for a, b in zip(dask.compute(*found), whole, strict=True):
            assert_close(a, b)
    with pytest.raises(ValueError, match=r"x has an unknown size along axis 0.*mean.*compute_chunk_sizes"):
        of_list("kl_div", lazy.pop("x"), lazy.pop("y"), "bucket", lazy, reduction="mean")


@pytest.mark.parametrize("name", ["x", "y", "indices"])
def test_lists_and_classes_in_several_chunks(name):
    x, y, more = listing("bucket")
    arrays = in_chunks({"x": x, "y": y, "indices": more["indices"]}, [3])
    arrays[name] = arrays[name].rechunk({1: 4})
    for axis in (-1, 1):
        with pytest.raises(ValueError, match=rf"{name} has its classes in \d chunks.*{name}\.rechunk\({{-1: -1}}\)"):
            klcore.kl_div(**arrays, tail="bucket", axis=axis)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ({"indices": np.array([[9]])}, ValueError, r"indices must lie in \[0, 3\).*found 9"),
        ({"indices": np.array([[0.5]])}, TypeError, "indices must be integers"),
        ({"indices": da.zeros((2, 1))}, TypeError, "indices must be integers"),
        ({"indices": da.zeros((2, 2), dtype=int)}, ValueError, "the same number of classes"),
        ({"tail_mass": 1.5}, ValueError, r"tail_mass must lie in \[0, 1\]; found 1.5"),
        ({"tail": None}, TypeError, "indices= needs tail="),
        ({"indices": None}, TypeError, "tail= describes"),
    ],
)
def test_lists_that_are_wrong(bad, error, words):
    """They are refused immediately, as far as they are known."""
    x, y = da.full((2, 1), 0.5), da.full((2, 3), 0.25)
    with pytest.raises(error, match=words):
        klcore.kl_div(x, y, **{"indices": np.array([[0]]), "tail": "bucket", **bad})


def test_lists_that_are_wrong_when_they_are_there():
    """Or when computed, unless their row has no weight."""
    x, y = da.full((2, 1), 0.5), da.full((2, 3), 0.25)
    lazy = klcore.kl_div(x, y, indices=da.full((2, 1), 9), tail="bucket", tail_mass=da.full(2, 0.5))
    with pytest.raises(ValueError, match="indices must lie in"):
        lazy.compute()
    more = {"indices": np.array([[0], [9]]), "tail": "bucket", "tail_mass": np.array([0.5, 7])}
    found = klcore.kl_div(x, y, weights=da.from_array([1, 0]), **more)
    np.testing.assert_array_equal(found, klcore.kl_div(np.asarray(x), np.asarray(y), weights=[1, 0], **more))
    lazy = klcore.kl_div(x, y, weights=da.ones(2), **more)
    with pytest.raises(ValueError, match="tail_mass must lie in"):
        lazy.compute()


# ---- temperatures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [5000, (3072, 1928), 1024])
@pytest.mark.parametrize(
    "temperature",
    [
        np.array(2.5),
        np.array([0.5]),
        np.array([[0.5], [1.0]]),
        np.array([0.5, 1.0, 7.0]),
        np.array([[2, 1, 3], [1, 5, 1]]),
    ],
    ids=lambda t: str(t.shape),
)
def test_one_temperature_a_row(temperature, classes):
    for (operation, space), dtype in itertools.product(
        [("kl_div", ("logits", "logits")), ("cross_entropy", ("probs", "logits")), ("renyi_div", ("logits", "logits"))],
        ("float32", "float64"),
    ):
        arrays = arguments(operation, space, (2, 3, 5000), dtype, "special")
        arrays[1] = arrays[1][:, :1]
        whole = call(operation, arrays, space, temperature=temperature)
        for t in (temperature, da.from_array(temperature, chunks=1)):
            lazy = call(
                operation, chunked(arrays, ((1, 1), (2, 1), classes), ((1, 1), 1, classes)), space, temperature=t
            )
            for a, b, compare in zip(
                dask.compute(*lazy), whole, (assert_same_bits, assert_same_bits, assert_close), strict=True
            ):
                compare(a, b)


@pytest.mark.parametrize("chunks", [4, 8])
@pytest.mark.parametrize("shape", [(), (6,)], ids=str)
def test_temperatures_are_looked_at_when_they_are_there(chunks, shape):
    x = da.ones((6, 8), chunks=(2, chunks), dtype="float32")
    for bad, words in ((0.0, "must be positive and finite"), (1e-9, r"between 2\*\*-20 and 2\*\*100")):
        lazy = klcore.kl_div(x, x, space="logits", temperature=da.full(shape, bad, chunks=2))
        with pytest.raises(ValueError, match=words):
            lazy.compute()


# ---- errors ----------------------------------------------------------------------------------------------------------

LAZY = da.ones((6, 8), chunks=(2, 4))
WHOLE = np.ones((6, 8))


@pytest.mark.parametrize(
    "change",
    [
        {"space": "prob"}, {"space": ("probs",)}, {"reduction": "total"}, {"axis": 2}, {"axis": "last"},
        {"temperature": 0, "space": "logits"}, {"temperature": 2.0}, {"temperature": "hot"}, {"return_grad": "z"},
        {"temperature": np.ones(5), "space": "logits"}, {"temperature": [0.0] * 6, "space": "logits"},
        {"temperature": np.ones(6)},
        {"y": WHOLE[:, :5]}, {"y": WHOLE[:4]}, {"y": WHOLE[0, 0]}, {"weights": np.ones(5)},
        {"weights": np.ones((1, 1, 6))},
        {"weights": [-1.0] * 6}, {"weights": [np.nan] * 6}, {"x": WHOLE.astype(complex)}, {"y": WHOLE.astype("c8")},
        {"x": WHOLE.astype("M8[s]")}, {"weights": np.ones(6, complex)}, {"axis": 1.5},
    ],
    ids=lambda change: " ".join(f"{k}" for k in change),
)  # fmt: skip
def test_wrong_arguments_say_what_they_say_for_numpy(change):
    """Immediately, and in the same words."""
    with pytest.raises((TypeError, ValueError)) as expected:
        klcore.kl_div(**{"x": WHOLE, "y": WHOLE, **change})
    lazy = {
        k: da.from_array(a) if k in "xy" and isinstance(a, np.generic | np.ndarray) else a for k, a in change.items()
    }
    with pytest.raises(expected.type) as raised:
        klcore.kl_div(**{"x": LAZY, "y": LAZY, **lazy})
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"y": WHOLE}, TypeError, "x is a dask array and y is a numpy array.*dask.array.from_array"),
        ({"x": WHOLE}, TypeError, "x is a numpy array and y is a dask array.*dask.array.from_array"),
        ({"y": WHOLE, "device": "cpu"}, TypeError, "dask.array.from_array"),
        ({"out": np.ones(6)}, TypeError, "out= is not supported with dask"),
        ({"device": "cuda"}, ValueError, r"device='cuda'.*map_blocks\(cupy.asarray\)"),
        ({"device": "cpu"}, ValueError, "device='cpu'"),
        ({"device": "tpu"}, ValueError, "device must be"),
        ({"x": da.ma.masked_equal(LAZY, 1)}, TypeError, "masked"),
        ({"y": dask.delayed(1)}, TypeError, "y is a dask.delayed.*from_delayed"),
        ({"weights": dask.delayed(1)}, TypeError, "weights is a dask.delayed"),
        ({"weights": da.ones(5)}, ValueError, r"weights of shape \(5,\) do not broadcast to the batch shape \(6,\)"),
        ({"weights": np.ma.masked_equal(np.ones(6), 1)}, TypeError, "masked"),
    ],
)
def test_wrong_arguments(change, error, words):
    with pytest.raises(error, match=words):
        klcore.kl_div(**{"x": LAZY, "y": LAZY, **change})


@pytest.mark.parametrize(
    ("library", "array", "make"),
    [
        ("torch", "tensor", r"numpy.asarray\(weights"),
        ("jax", "numpy.asarray", r"numpy.asarray\(weights"),
        ("xarray", "DataArray", "weights.data"),  # of dask's: NumPy would compute it at once
    ],
)
def test_weights_of_another_library(library, array, make):
    pytest.importorskip(library, reason=f"{library} is not installed")
    weights = da.ones(6) if library == "xarray" else np.ones(6)
    other = operator.attrgetter(array)(importlib.import_module(library))(weights)
    with pytest.raises(TypeError, match=f"weights is .* {library} array, which cannot be combined with dask .*{make}"):
        klcore.kl_div(LAZY, LAZY, weights=other)


def test_other_chunks():
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    other = LAZY.map_blocks(sparse.csr_array, meta=sparse.csr_array((0, 0)))
    with pytest.raises(TypeError, match=r"x is a dask array with chunks of type scipy.*csr_array.*numpy or cupy"):
        klcore.entropy(other)


@pytest.mark.parametrize("chunks", [4, 8])
def test_weights_are_looked_at_when_they_are_there(chunks):
    x = da.ones((6, 8), chunks=(2, chunks))
    lazy = klcore.kl_div(x, x, weights=-da.ones(6, chunks=2))
    with pytest.raises(ValueError, match="weights must be finite and >= 0"):
        lazy.compute()


def test_loss():
    with pytest.raises(TypeError, match="map_blocks"):
        klcore.divergence.loss("pytorch", LAZY, LAZY, space=("probs", "log_probs"))
