"""The same bits regardless of threads, instruction set, batch, position and memory layout.

Each test compares digests of all results. Another instruction set is computed in a separate process, which imports this
file. The order of addition is also checked against a second implementation, written from the comment of
src/kl_tree.h.
"""

import functools
import hashlib
import itertools
import json
import pathlib
import random
import zlib

import conftest
import ml_dtypes
import numpy as np
import pytest
from conftest import COMMON

import klcore
import klcore.backends.cpu  # chooses the instruction set of klcore._cpu
from klcore import _cpu

DTYPES = {name: np.dtype(name) for name in ("float64", "float32", "float16")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
SPACES = ("probs", "log_probs", "logits")
THREADS = (1, 2, 5)
LENGTHS = (1, 2, 15, 16, 17, 127, 128, 129, 1023, 1024, 1025, 2049)
# above the size below which one thread does everything; the last one so that five threads share a row's chunks
SHARED = ((2700, 17), (360, 129), (48, 1025), (2, 20 * 1024 + 1))
INSTRUCTION_SETS = [name for name, supported in _cpu.instruction_sets().items() if supported]
SLOW = "generic"  # fma is a call of libm there on x86-64


# ---- data ------------------------------------------------------------------------------------------------------------


@functools.cache
def numbers(rows, n, space, dtype, side):
    """Rows in `space`, of eight kinds in turn; rows 8 and 9 are not distributions."""
    shared = np.random.default_rng(n)
    z = shared.normal(size=(rows, n))
    masked = shared.random((rows, n)) < 0.3
    masked[:, 0] = False
    rng = np.random.default_rng(zlib.crc32(f"{n} {side}".encode()))
    kind = np.arange(rows) % 8
    z += rng.normal(size=z.shape) * np.array([1, 1, 0, 1e-3, 1, 1, 1, 1e-7])[kind, None]
    z[kind == 2] = rng.normal(size=z[kind == 2].shape) * 200  # far apart: e^z leaves the range
    excluded = (kind == 4) | ((kind == 5) & (side == "x")) | ((kind == 6) & (side == "y"))
    z[masked & excluded[:, None]] = -np.inf
    a = z
    if space != "logits":
        top = z.max(axis=1, keepdims=True)
        e = np.exp(z - top)
        total = e.sum(axis=1, keepdims=True)
        a = z - top - np.log(total) if space == "log_probs" else e if space == "counts" else e / total
    if rows > 9:
        a[8, rng.random(n) < 0.2] = np.nan
        a[9] = -1.0 if space in ("probs", "counts") else -np.inf
    a = a.astype(DTYPES[dtype])
    a.flags.writeable = False
    return a


def finite(arrays):
    """The rows whose divergence is finite in any dtype."""
    kept = [r for r in range(len(arrays[0])) if r % 8 not in (2, 6) and r not in (8, 9)]
    return [a[kept] for a in arrays]


def both(operation, rows, n, space, dtype):
    sides = COMMON[operation].gradients
    return tuple(numbers(rows, n, s, dtype, side) for s, side in zip(space, sides, strict=False))


def call(operation, arrays, space, gradient=None, **arguments):
    gradient = COMMON[operation].gradients if gradient is None else gradient
    result = conftest.call(operation, arrays[0], arrays[-1], space, return_grad=gradient or None, **arguments)
    return result if isinstance(result, tuple) else (result,)


# ---- where arrays may lie --------------------------------------------------------------------------------------------


def fortran(a):
    return np.asfortranarray(a)


def sliced(a):
    steps = (*[2] * (a.ndim - 1), 3)
    wide = np.full([size * step + 1 for size, step in zip(a.shape, steps, strict=True)], 9, a.dtype)
    view = wide[tuple(slice(1, None, step) for step in steps)]
    view[...] = a
    return view


def padded(a):
    wide = np.full((*a.shape[:-1], a.shape[-1] + 7), 9, a.dtype)
    wide[..., 5:-2] = a
    return wide[..., 5:-2]


def negative(a):
    turned = (slice(None, None, -1),) * a.ndim
    return a[turned].copy()[turned]


def unaligned(a):
    raw = np.zeros(a.nbytes + 1, np.uint8)
    view = raw[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def byte_swapped(a):
    return a if a.dtype.name == "bfloat16" else a.astype(a.dtype.newbyteorder())


def mixed_layout(a):
    return fortran(a) if a.flat[0] > a.flat[-1] else negative(a)


LAYOUTS = {f.__name__: f for f in (fortran, sliced, padded, negative, unaligned, byte_swapped, mixed_layout)}


def in_layout(layout, operation, arrays, space):
    return call(operation, [LAYOUTS[layout](a) for a in arrays], space)


def class_axis_first(operation, arrays, space):
    v, *g = call(operation, [np.ascontiguousarray(a.T) for a in arrays], space, axis=0)
    return (v, *(a.T for a in g))


def class_axis_in_the_middle(operation, arrays, space):
    rows, n = arrays[0].shape
    threes = [np.ascontiguousarray(np.moveaxis(a.reshape(2, rows // 2, n), 2, 1)) for a in arrays]
    v, *g = call(operation, threes, space, axis=1)
    return (v.reshape(rows), *(np.moveaxis(a, 1, 2).reshape(rows, n) for a in g))


def one_at_a_time(operation, arrays, space):
    parts = [call(operation, row, space) for row in zip(*arrays, strict=True)]
    return tuple(np.stack(column) for column in zip(*parts, strict=True))


def backwards_in_a_larger_batch(operation, arrays, space):
    larger = [np.concatenate([a[3:5], a[::-1], a[:2]]) for a in arrays]
    return tuple(a[2:-2][::-1] for a in call(operation, larger, space))


def into_given_arrays(operation, arrays, space):
    n = arrays[0].shape[1]
    value = np.zeros(2 * len(arrays[0]), "f8" if arrays[0].dtype == "f8" else "f4")[::2]
    out = (value, *(np.zeros((n, len(a)), a.dtype).T[:, ::-1] for a in arrays))
    return call(operation, arrays, space, out=out)


def with_unit_weights(operation, arrays, space):
    return call(operation, arrays, space, weights=np.ones(len(arrays[0]), np.float32))


ARRANGEMENTS = {name: functools.partial(in_layout, name) for name in LAYOUTS}
ARRANGEMENTS |= {
    f.__name__: f
    for f in (
        class_axis_first,
        class_axis_in_the_middle,
        one_at_a_time,
        backwards_in_a_larger_batch,
        into_given_arrays,
        with_unit_weights,
    )
}


# ---- digests ---------------------------------------------------------------------------------------------------------


def digest(results):
    sha = hashlib.sha256()
    for a in results:
        a = np.asarray(a)
        sha.update(f"{a.dtype} {a.shape} ".encode())
        sha.update(a.tobytes())  # in C order, including the bits of NaN
    return sha.hexdigest()


def small(operation, arrangement, dtype):
    """Digests of small batches, one per length and space, in one arrangement (None: contiguous rows)."""
    found = {}
    for n, space in itertools.product(LENGTHS, conftest.pairs(operation)):
        arrays = both(operation, 10, n, space, dtype)
        results = ARRANGEMENTS[arrangement](operation, arrays, space) if arrangement else call(operation, arrays, space)
        found[f"{space} n={n}"] = digest(results)
    return found


def terms(operation, arrangement, dtype):
    """The same for reduction="none", rows computed with and without gradients."""
    found = {}
    for n, space in itertools.product((17, 128, 1025), conftest.pairs(operation)):
        arrays = [LAYOUTS[arrangement](a) if arrangement else a for a in both(operation, 10, n, space, dtype)]
        found[f"{space} n={n}"] = digest(call(operation, arrays, space, reduction="none"))
        found[f"{space} n={n} terms"] = digest(call(operation, arrays, space, reduction="none", gradient=()))
    return found


def shared(operation, threads, dtypes, layouts=(None,), shapes=SHARED):
    """Digests of batches large enough for several threads: every reduction, weights, gradients."""
    found = {}
    with klcore.threads(threads):
        for (rows, n), dtype, space in itertools.product(shapes, dtypes, conftest.some_pairs(operation)):
            given = finite(both(operation, rows, n, space, dtype))
            weights = np.arange(len(given[0])) % 3 / 2
            for layout in layouts:
                arrays = [LAYOUTS[layout](a) if layout else a for a in given]
                name = f"{dtype} {space} {rows} x {n}"
                total = call(operation, arrays, space, gradient=(), reduction="sum")
                assert np.isfinite(total[0]), name  # an infinite sum would show nothing
                mean = call(operation, arrays, space, reduction="rowmean", weights=weights)
                found[f"{name} {layout}"] = digest(call(operation, arrays, space) + total + mean)
            if not COMMON[operation].single:
                # an operand shared by all rows, whose gradient is a sum over them
                arrays = given[0], given[1][0]
                found[f"{name} broadcast"] = digest(call(operation, arrays, space, reduction="mean", weights=weights))
    return found


def long_rows(operation, threads, lengths, dtypes, spaces):
    found = {}
    with klcore.threads(threads):
        for n, dtype, space in itertools.product(lengths, dtypes, spaces):
            arrays = both(operation, 1, n, space, dtype)
            found[f"{dtype} {space} n={n}"] = digest(
                call(operation, arrays, space) + call(operation, arrays, space, gradient=(), reduction="sum")
            )
    return found


def differences(found, expected):
    assert found.keys() <= expected.keys()
    return [name for name in found if found[name] != expected[name]]


@pytest.fixture(scope="module", autouse=True)
def forget():
    """Rows of millions of classes are kept for this module's tests alone."""
    yield
    numbers.cache_clear()


EXPECTED = functools.cache(small)
EXPECTED_TERMS = functools.cache(terms)


# ---- threads, layout, batch, in this process -------------------------------------------------------------------------


@pytest.mark.parametrize("operation", COMMON)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrangement(operation, arrangement, dtype):
    assert not differences(small(operation, arrangement, dtype), EXPECTED(operation, None, dtype))


@pytest.mark.parametrize("operation", COMMON)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_terms_in_any_layout(operation, layout, dtype):
    assert not differences(terms(operation, layout, dtype), EXPECTED_TERMS(operation, None, dtype))


@pytest.mark.parametrize("operation", COMMON)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_is_the_same_with_and_without_gradients(operation, dtype):
    for n, space in itertools.product(LENGTHS, conftest.pairs(operation)):
        arrays = both(operation, 10, n, space, dtype)
        value, *gradients = call(operation, arrays, space)
        assert digest(call(operation, arrays, space, gradient=())) == digest([value]), (n, space)
        for name, gradient in zip("xy", gradients, strict=False):
            alone = call(operation, arrays, space, gradient=name)
            assert digest(alone) == digest([value, gradient]), (n, space, name)


@pytest.mark.parametrize("operation", conftest.OF_TWO)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operand", [0, 1])
def test_broadcast_operand(operation, dtype, operand):
    for n, space in itertools.product(LENGTHS, conftest.pairs(operation)):
        arrays = both(operation, 10, n, space, dtype)
        row = arrays[operand][3]
        other = "xy"[1 - operand]

        def with_operand(a, operation=operation, arrays=arrays, space=space, other=other):
            both = [a, arrays[1]] if operand == 0 else [arrays[0], a]
            return digest(call(operation, both, space, gradient=other))

        expected = with_operand(np.repeat(row[None], 10, axis=0))
        assert with_operand(row) == expected, (n, space)
        assert with_operand(row[None]) == expected, (n, space)
        assert with_operand(np.broadcast_to(row, (10, n))) == expected, (n, space)


@pytest.mark.quick(2)
@pytest.mark.parametrize("operation", COMMON)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads(operation, dtype):
    layouts = (None, "fortran")
    expected = shared(operation, 1, [dtype], layouts)
    for threads in THREADS[1:]:
        assert not differences(shared(operation, threads, [dtype], layouts), expected), threads
    for layout in layouts[1:]:
        for name in (n for n in expected if n.endswith(f" {layout}")):
            assert expected[name] == expected[name.removesuffix(layout) + "None"], name


LONG = (("probs", "probs"), ("log_probs", "log_probs"), ("logits", "logits"), ("probs", "logits"))


@pytest.mark.quick(2)
@pytest.mark.parametrize("operation", COMMON)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_long_row(operation, dtype):
    """Its chunks are spread over the threads, and its total goes through all levels of the tree."""
    run = functools.partial(long_rows, operation, lengths=(3_000_001,), dtypes=[dtype], spaces=LONG)
    expected = run(1)
    for threads in THREADS[1:]:
        assert not differences(run(threads), expected), threads


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sum_over_many_rows(space, dtype):
    """More rows than are held at once."""
    x, y = (np.tile(numbers(8, 40, space, dtype, side)[[0, 1, 3]], (7000, 1))[:20_000] for side in "xy")
    found = set()
    for threads, view in itertools.product(THREADS, (np.asarray, fortran, padded)):
        with klcore.threads(threads):
            found.add(digest(call("kl_div", (view(x), view(y)), space, reduction="sum")))
    assert len(found) == 1


# ---- results, and how they are requested
# ------------------------------------------------------------------------------

REDUCTIONS = ("row", "sum", "rowmean", "none", "batchmean", "mean")
AXES = {"first": 0, "middle": 1, "last": -1}
# all combinations of these,
ASKED = {"reduction": REDUCTIONS, "gradient": ((), ("x",), ("y",), ("x", "y")), "axis": tuple(AXES)}
# with these dealt out like cards, so that each occurs equally often; `out`: how given results are laid out
GIVEN = {
    "size": tuple(itertools.product((1, 15, 16, 17, 300), (1, 2, 7, 128, 129, 1024, 1025, 1500, 2500))),
    "layout": (None, *LAYOUTS),
    "out": (None, None, "fortran", "sliced", "padded", "negative", "unaligned"),
    "weights": (None, "float32", "float64"),
    "dtype": tuple(DTYPES),
    "threads": THREADS,
}
BATCH = {1: (1, 1), 15: (3, 5), 16: (1, 16), 17: (17, 1), 300: (2, 150)}  # rows as two axes


def dealt(rng, values):
    while True:
        yield from rng.sample(values, len(values))


def cases(operation, seed, deals, asked=ASKED, given=GIVEN):
    """All results that an operation can return, and how each is given; `deals` times if there are terms."""
    rng = random.Random(seed)
    decks = {name: dealt(rng, values) for name, values in given.items()}
    for choice in itertools.product(*asked.values()):
        case = dict(zip(asked, choice, strict=True))
        if not set(case["gradient"]) <= set(COMMON[operation].gradients):
            continue
        if (case["reduction"], case["axis"]) == ("batchmean", "first"):
            continue  # divides by the number of classes there, and by the number of rows elsewhere
        for _ in range(deals if case["reduction"] == "none" else 1):
            yield case | {name: next(deck) for name, deck in decks.items()}


def rows_of(operation, space, case):
    """Arrays with the classes last, of rows whose divergence is finite, and weights, of which some are 0."""
    rows, n = case["size"]
    arrays = finite(both(operation, 40, n, space, case["dtype"]))
    order = np.resize(np.arange(len(arrays[0])), rows)
    weights = case["weights"] and (np.arange(rows) % 5 / 2).astype(case["weights"]).reshape(BATCH[rows])
    return [a[order].reshape(*BATCH[rows], n) for a in arrays], weights


def laid_out(a, layout):
    return LAYOUTS[layout](a) if layout and a.ndim else a.copy()


def assert_plain(operation, space, case, place=laid_out, get=np.asarray):
    """The results of a case have the bits of plain calls: contiguous, the classes last, no out=; the value without
    gradients, and each gradient without the other."""
    arrays, weights = rows_of(operation, space, case)
    words = {"reduction": case["reduction"], "weights": weights}
    (value,) = call(operation, arrays, space, gradient=(), **words)
    gradients = dict(zip("xy", call(operation, arrays, space, **words)[1:], strict=False))
    expected = [value, *(gradients[name] for name in case["gradient"])]

    axis = AXES[case["axis"]]
    of_classes = [a.ndim == 3 for a in expected]
    turned = [np.moveaxis(a, -1, axis) if t else a for a, t in zip(expected, of_classes, strict=True)]
    if weights is not None:
        words["weights"] = place(weights, case["layout"])
    if case["out"]:
        words["out"] = tuple(place(np.full_like(np.asarray(a), 7), case["out"]) for a in turned)
    arrays = [place(np.moveaxis(a, -1, axis), case["layout"]) for a in arrays]
    found = call(operation, arrays, space, gradient=case["gradient"], axis=axis, **words)
    for k, (f, e, t) in enumerate(zip(found, expected, of_classes, strict=True)):
        f = np.moveaxis(get(f), axis, -1) if t else get(f)
        assert digest([f]) == digest([e]), f"result {k} of {operation} {space} {case}"


@pytest.mark.parametrize(("operation", "space"), [(op, pair) for op in COMMON for pair in conftest.pairs(op)])
def test_all_that_can_be_asked(operation, space):
    for case in cases(operation, f"{operation} {space}", deals=4):
        with klcore.threads(case["threads"]):
            assert_plain(operation, space, case)


# ---- instruction sets, each in a process of its own ------------------------------------------------------------------

OTHER = "import json, sys; sys.path.insert(0, sys.argv[1]); import test_bits; print(json.dumps(test_bits.%s))"


def everything(operation, few):
    """All digests of one operation with this process's instruction set, by (kind, threads or arrangement), or a few."""
    found = {}
    arrangements = ("fortran", "one_at_a_time") if few else ARRANGEMENTS
    for dtype, arrangement in itertools.product(DTYPES, (None, *arrangements)):
        found[f"small {dtype} {arrangement}"] = small(operation, arrangement, dtype)
    for dtype, layout in itertools.product(DTYPES, (None, "negative")):
        found[f"terms {dtype} {layout}"] = terms(operation, layout, dtype)
    for threads in (2,) if few else THREADS:
        dtypes = ("float32", "float16") if few else ("float32", "float64", "bfloat16")
        found[f"shared {threads}"] = shared(operation, threads, dtypes)
        found[f"long {threads}"] = long_rows(
            operation, threads, (1024 * 1024 + 1,), ("float32",), LONG[: 2 if few else 4]
        )
    return found


def expected_everything(operation, found):
    """What `everything` must have found, with one thread and contiguous rows, in this process."""
    long_expected = long_rows(operation, 1, (1024 * 1024 + 1,), ("float32",), LONG)
    shared_expected = shared(operation, 1, DTYPES)
    expected = {}
    for name in found:
        kind, which, *_ = name.split()
        if kind == "small":
            expected[name] = EXPECTED(operation, None, which)
        elif kind == "terms":
            expected[name] = EXPECTED_TERMS(operation, None, which)
        else:
            expected[name] = shared_expected if kind == "shared" else long_expected
    return expected


@pytest.mark.quick(3)
@pytest.mark.parametrize("operation", COMMON)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_instruction_set(python, operation, isa):
    """The tests above cover the instruction set of this process."""
    path = pathlib.Path(__file__).parent
    code = OTHER % f"everything({operation!r}, {isa in (SLOW, _cpu.instruction_set())})"
    found = json.loads(python(code, path, KLCORE_ISA=isa))
    expected = expected_everything(operation, found)
    assert {name: d for name in found if (d := differences(found[name], expected[name]))} == {}


# ---- the order of addition, a second time ----------------------------------------------------------------------------


def tree(t):
    """The sum of `t` as the comment in src/kl_tree.h describes it, with a missing element counting as +0."""
    t = np.asarray(t)
    while True:
        chunks = -(-len(t) // 1024)
        c = np.zeros((chunks, 8, 128), t.dtype)
        c.reshape(-1)[: len(t)] = t
        columns = np.zeros((chunks, 128), t.dtype)
        for k in range(8):
            columns = columns + c[:, k]
        columns = columns.astype(np.float64)
        while columns.shape[1] > 1:
            half = columns.shape[1] // 2
            columns = columns[:, :half] + columns[:, half:]
        t = columns[:, 0]
        if chunks == 1:
            return t[0]


TREE_LENGTHS = (*LENGTHS, 255, 1152, 1024 * 1024, 1024 * 1024 + 1, 3_000_001)


@pytest.mark.parametrize("n", TREE_LENGTHS)
def test_order_of_addition(n):
    rng = np.random.default_rng([n, 2])
    values = rng.normal(size=n) * 10.0 ** rng.integers(-3, 3, size=n)
    expected = tree(values)
    assert _cpu.add_up(values.copy()) == expected
    if n > 200:  # the values are such that another order would show
        assert {np.cumsum(values)[-1], np.cumsum(values[::-1])[-1]} != {expected}


def test_order_of_addition_of_nothing():
    assert _cpu.add_up(np.zeros(0)) == 0.0


def test_negative_zero_is_added_to_missing_positive_zeros():
    total = _cpu.add_up(np.full(5, -0.0))
    assert total == 0
    assert not np.signbit(total)


SUMMED = [
    (operation, space, dtype)
    for operation in COMMON
    for space in conftest.pairs(operation)
    for dtype in DTYPES
    if "logits" not in space  # of which a row's value is not the sum of its terms
    and not _cpu.is_wide(
        COMMON[operation].code, *(_cpu.SPACES[s] for s in space), 1.0
    )  # nor of these, as they are rounded
]


@pytest.mark.parametrize(("operation", "space", "dtype"), SUMMED)
def test_sum_is_the_tree_over_terms(operation, space, dtype):
    for rows, n in ((1, 1), (4, 17), (4, 129), (4, 1025), (1030, 130), (1, 200_001)):
        arrays = finite(both(operation, rows, n, space, dtype))
        (each,) = call(operation, arrays, space, gradient=(), reduction="none")
        (row,) = call(operation, arrays, space, gradient=())
        (total,) = call(operation, arrays, space, gradient=(), reduction="sum")
        totals = np.array([tree(t) for t in each])
        np.testing.assert_array_equal(row, totals.astype(row.dtype))
        np.testing.assert_array_equal(total, tree(totals).astype(row.dtype))
        assert total.dtype == each.dtype == (np.float64 if dtype == "float64" else np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("space", [(a, b) for a in SPACES[:2] for b in SPACES[:2]])
def test_a_neighbour_that_takes_the_long_form_changes_no_bit(space, dtype):
    """log q - log p on both sides of wherever the short forms end."""
    rng = np.random.default_rng(0)
    log_p = rng.uniform(-5, 0, (141, 200))  # rows too long to be computed several at once
    log_q = log_p + np.linspace(-70, 70, 141)[:, None] + rng.uniform(-0.5, 0.5, log_p.shape)
    x, y = ((np.exp(v) if s == "probs" else v).astype(dtype) for v, s in zip((log_p, log_q), space, strict=True))
    options = {"space": space, "reduction": "none", "return_grad": ("x", "y")}
    short = klcore.kl_div(x, y, **options)
    x[:, 0] = 0 if space[0] == "probs" else -np.inf
    for a, b in zip(short, klcore.kl_div(x, y, **options), strict=True):
        np.testing.assert_array_equal(a[:, 1:], b[:, 1:])


@pytest.mark.parametrize("n", [16, 128, 300])
@pytest.mark.parametrize("pair", [p for p in itertools.product(SPACES, SPACES) if "log_probs" in p])
@pytest.mark.parametrize("operation", conftest.RATIOS)
def test_neighbours_that_are_out_of_the_ordinary(operation, pair, n):
    """Such a neighbour makes a row take the longer form: also where results are subnormal."""
    rng = np.random.default_rng(n)
    a = np.full((8, n), -86.0, "float32")
    a[:, 0] = 0
    b = a + rng.uniform(0, 1, a.shape).astype("float32")
    b[7, 3] = -500
    x, y = (np.exp(v) if s == "probs" else v for v, s in zip((a, b), pair, strict=True))
    run = functools.partial(getattr(klcore, operation), space=pair, return_grad=("x", "y"))
    for reduction in ("row", "none"):
        together = run(x, y, reduction=reduction)
        for i in range(7):
            for one, all_of_them in zip(run(x[i : i + 1], y[i : i + 1], reduction=reduction), together, strict=True):
                assert one.tobytes() == np.ascontiguousarray(all_of_them[i : i + 1]).tobytes()
