"""The CUDA kernels give the CPU's bits, whatever the launch; and the backend around them refuses what it must.

Without a GPU the kernels are executed by tests/emulator; KLCORE_TEST_DEVICES=cuda uses a GPU. The kernels that are
compiled (one for each operation, pair of spaces, dtypes, outputs, temperature and architecture) and their arguments are
chosen so that every pair of these choices occurs: see `cover`.
"""

import contextlib
import functools
import gc
import importlib
import itertools
import os
import random
import subprocess
import sys
import threading
import weakref

import conftest
import numpy as np
import oracle
import pytest
import test_bits
from conftest import COMMON, RATIOS, as_here, some_pairs
from test_accuracy import anywhere
from test_bits import DTYPES, SPACES

import klcore
from klcore.operations import KL_DIV, LOSSES, Call

PAIR = ("x", "y")


def backend(part=""):
    return importlib.import_module(f"klcore.backends.cuda{part}")


def emulator():
    return importlib.import_module("emulator.device")


@pytest.fixture
def emulated(gpu):
    """For what hardware does not show, or not reproducibly."""
    if not gpu.emulated:
        pytest.skip("a GPU shows no schedules and refuses other things: what this asks only the emulator can see")
    return gpu


def settings(gpu, **changes):
    return emulator().using(**changes) if gpu.emulated else contextlib.nullcontext()


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched."""
    return launches(monkeypatch)


def launches(monkeypatch, what=lambda launch: launch.name):
    found, cuda = [], backend()
    start = cuda._start

    def started(planned, plans):
        found.extend(map(what, planned))
        start(planned, plans)

    monkeypatch.setattr(cuda, "_start", started)
    return found


def hold(monkeypatch, share):
    """Make blocks hold rows that are swept several times, if they have such a share of a multiprocessor's warps."""
    monkeypatch.setattr(backend(".launches"), "_BUSY_ENOUGH", (0, share, share))
    monkeypatch.setattr(backend(".launches"), "_FEW_CHUNKS", 0)
    monkeypatch.setattr(backend(), "_kept", {})


# ---- comparisons -----------------------------------------------------------------------------------------------------


def bits(a):
    """As integers, with all NaNs equal."""
    a = np.ascontiguousarray(a)
    found = a.reshape(a.shape).view(f"u{a.dtype.itemsize}").copy()
    found[np.isnan(a.astype(np.float64))] = 0x7E57
    return found


def call(operation, arrays, **keywords):
    arrays = tuple(arrays)
    result = conftest.call(operation, arrays[0], arrays[-1], **keywords)
    return result if isinstance(result, tuple) else (result,)


def assert_bits(gpu, compared, found, expected, what=""):
    assert len(found) == len(expected)
    for k, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert type(f) is gpu.array_type(), what
        f, e = gpu.get(f), np.asarray(e)
        assert (f.dtype, f.shape) == (e.dtype, e.shape), f"{what}, result {k}"
        different = bits(f) != bits(e)
        assert not different.any(), f"{what}, result {k}: {f[different][:5]} instead of {e[different][:5]}"
    compared["arrays of the CUDA kernels that have the CPU's bits"] += len(found)


# ---- covering designs ------------------------------------------------------------------------------------------------


def cover(factors, fits, seed=0):
    """A list of choices, each with one value of every factor, so that every valid pair of values occurs; greedily.

    `fits` says whether a choice, which may still be incomplete, is valid.
    """
    rng = random.Random(seed)
    names = list(factors)
    pairs = {
        ((a, u), (b, v))
        for a, b in itertools.combinations(names, 2)
        for u in range(len(factors[a]))
        for v in range(len(factors[b]))
    }
    numbered = {name: range(len(values)) for name, values in factors.items()}

    def values(choice):
        return {name: factors[name][choice[name]] for name in names if name in choice}

    def completed(choice):
        for name in rng.sample(names, len(names)):
            if name in choice:
                continue
            options = [(name, k) for k in numbered[name] if fits(values({**choice, name: k}))]
            if not options:
                return None
            rng.shuffle(options)
            new = [sum(pair(o, other) in uncovered for other in choice.items()) for o in options]
            choice = {**choice, name: options[max(range(len(options)), key=new.__getitem__)][1]}
        return choice

    def pair(a, b):
        return (a, b) if names.index(a[0]) < names.index(b[0]) else (b, a)

    def gain(choice):
        return sum(pair in uncovered for pair in itertools.combinations([(n, choice[n]) for n in names], 2))

    uncovered = {pair for pair in pairs if fits(values(dict(pair)))}
    found = []
    while uncovered:
        start = min(uncovered)
        candidates = [c for c in (completed(dict(start)) for _ in range(4)) if c]
        if not candidates:  # no three values fit together
            uncovered.discard(start)
            continue
        best = max(candidates, key=gain)
        uncovered -= set(itertools.combinations([(n, best[n]) for n in names], 2))
        found.append(values(best))
    return found


# ---- every kernel, bit for bit ---------------------------------------------------------------------------------------

KINDS = [(op, space) for op in COMMON for space in some_pairs(op)]
# path -> the kernel that it tests, and numbers of classes
PATHS = {
    "narrow": ("kl_narrow", (1, 2, 5, 31, 33, 64, 100, 128)),
    "units": ("kl_units", (129, 256, 257, 1000, 1024)),
    "rows": ("kl_rows", (1025, 2049, 5000)),
    "folded": ("kl_fold", (1025, 2049, 3072)),
    "summed": ("kl_summed", (1, 33, 128, 257, 1025)),
}
BUILDS = {
    "kind": KINDS,
    "dtypes": [
        ("float32", "float32"),
        ("float64", "float64"),
        ("float32", "float16"),
        ("bfloat16", "float32"),
        ("float16", "float64"),
    ],
    "path": list(PATHS),
    "outputs": ["value", "x", "y", "xy", "terms", "terms xy"],
    "temperature": [1.0, 2.5, "rows"],  # the last: one per row
    "architecture": ["90", "75", "80", "120"],
}


def may_be_built(choice):
    kind, outputs, path = choice.get("kind"), choice.get("outputs"), choice.get("path")
    two = path == "summed" or (outputs or "value").endswith("y") or not fits_single(choice.get("dtypes"))
    if kind and COMMON[kind[0]].single and two:
        return False
    if choice.get("temperature", 1) != 1 and kind and "logits" not in kind[1]:
        return False
    # "x" or "y" is the operand that is broadcast
    return not (path == "summed" and outputs and outputs not in ("x", "y"))


def fits_single(dtypes):
    return dtypes is None or dtypes[0] not in ("float16", "bfloat16")  # of its own, below


def key(choice):
    kind = choice["kind"]
    words = [kind[0], "/".join(kind[1]), *choice["dtypes"], choice["path"], choice["outputs"]]
    return " ".join([*words, f"T={choice['temperature']}", f"sm_{choice['architecture']}"])


CASES = cover(BUILDS, may_be_built)

# the arguments of a kernel; "last" etc.: where the classes are
GIVEN = {
    "layout": ["plain", "behind", "padded", "apart", "backwards", "turned", "rows apart", "mixed"],
    "axis": ["last", "first", "middle of four"],
    "reduction": ["row", "sum", "rowmean", "batchmean", "mean"],
    "weights": [None, "float32", "float64"],
    "seed": [0, 1, 2, 3],
    "threads": [1, 2],
    "out": [False, True],
}
RUNS = {axes: cover({**GIVEN, "axis": axes}, lambda choice: True) for axes in (("last",), tuple(GIVEN["axis"]))}


def test_designs_cover_every_pair():
    def pairs(choices):
        return {pair for c in choices for pair in itertools.combinations(c.items(), 2)}

    possible = {
        ((a, u), (b, v))
        for a, b in itertools.combinations(BUILDS, 2)
        for u in BUILDS[a]
        for v in BUILDS[b]
        if may_be_built({a: u, b: v})
    }
    assert pairs(CASES) <= possible
    # operands of one argument are not broadcast; everything else is possible
    single = {f"('{o.name}'" for o in COMMON.values() if o.single}
    assert [p for p in possible - pairs(CASES) if not any(name in str(p) for name in single)] == []
    for axes, runs in RUNS.items():
        given = {**GIVEN, "axis": axes}
        assert len(pairs(runs)) == sum(len(given[a]) * len(given[b]) for a, b in itertools.combinations(given, 2))


def placed(gpu, a, layout, other=False):
    """A device array that equals `a`, at another address."""
    xp, n = gpu.xp, a.shape[-1]
    if layout == "mixed":
        layout = "turned" if other else "behind"
    if layout == "plain":
        return gpu.put(a)
    if layout == "behind":  # not aligned to 16 bytes
        view = xp.empty(a.size + 1, a.dtype)[1:].reshape(a.shape)
    elif layout == "padded":
        view = xp.empty((*a.shape[:-1], n + 3), a.dtype)[..., 1:-2]
    elif layout == "apart":
        view = xp.empty((*a.shape[:-1], 2 * n + 1), a.dtype)[..., 1::2]
    elif layout == "backwards":
        turn = tuple(slice(None, None, -1) for _ in a.shape)
        view = xp.empty(a.shape, a.dtype)[turn]
    elif layout == "turned":
        view = xp.empty(a.shape[::-1], a.dtype).transpose()
    elif layout == "rows apart":
        view = xp.empty((2 * a.shape[0] + 1, *a.shape[1:]), a.dtype)[1::2]
    view[...] = gpu.put(a)
    return view


def arranged(a, axis):
    """Rows as an array with the classes on another axis."""
    if axis == "first":
        return np.ascontiguousarray(a.T)
    if axis == "middle of four":
        return np.ascontiguousarray(np.moveaxis(a.reshape(2, 1, -1, a.shape[-1]), (0, 3), (2, 1)))
    return a


AXES = {"last": -1, "first": 0, "middle of four": 1}


def weights_like(shape, zero, dtype):
    """One weight per row; 0 where `zero`."""
    w = (1 + np.arange(zero.size) % 3 / 2).astype(dtype)
    w[zero] = 0
    return w.reshape(shape)


def rows_in(path, gpu):
    """As many rows as make the launch take this path."""
    many = max(16, backend(".devices").properties(0).multiprocessors)
    return {"rows": many + many % 2, "folded": 2}.get(path, 16)


def arguments(case, n, rows):
    """Rows of every kind, (rows, n), and which of them are finite."""
    operation, space = case["kind"]
    dtypes = case["dtypes"][:1] * 2 if COMMON[operation].single else case["dtypes"]
    sides = zip(space, dtypes, COMMON[operation].gradients, strict=False)
    arrays = [test_bits.numbers(16, n, s, d, side) for s, d, side in sides]
    with np.errstate(all="ignore"):
        finite = np.isfinite(call(operation, [a.astype(np.float64) for a in arrays], space=space)[0])
    finite &= ~np.isin(np.arange(16), (2, 6, 8, 9))
    if case["path"] == "folded":
        few = [n % 16, 10 + n % 6] if n % 2 else [4, 8]
        return [a[few] for a in arrays], finite[few]
    order = np.resize(np.arange(16), rows)
    return [a[order] for a in arrays], finite[order]


def assert_run(gpu, compared, case, n, run):
    operation, space = case["kind"]
    path, outputs = case["path"], case["outputs"]
    arrays, finite = arguments(case, n, rows_in(path, gpu))
    terms = outputs.startswith("terms")
    wanted = tuple(outputs.replace("terms", "").replace("value", "").strip())
    reduction = "none" if terms else run["reduction"]
    axis = run["axis"] if len(arrays[0]) % 2 == 0 else "last"
    if reduction not in ("row", "none") and not run["weights"] and finite.any():
        kept = np.flatnonzero(finite)  # a total that is NaN would show nothing
        arrays = [a[kept[: len(kept) // 2 * 2 or 1]] for a in arrays]
        finite = finite[kept[: len(kept) // 2 * 2 or 1]]
        axis = axis if len(finite) % 2 == 0 else "last"
        if path == "rows":
            arrays = [np.concatenate([a] * 3) for a in arrays]
            finite = np.concatenate([finite] * 3)
    keywords = {"space": space, "reduction": reduction, "return_grad": wanted or None}
    if COMMON[operation].single:
        keywords["return_grad"] = "x" if wanted else None
    arrays = [arranged(a, axis) for a in arrays]
    keywords["axis"] = AXES[axis]
    batch = np.moveaxis(arrays[0], AXES[axis], -1).shape[:-1]
    if path == "summed":
        which = outputs == "y"
        arrays[which] = np.take(arrays[which], [0], axis={"last": 0, "first": 1}.get(axis, 3))
    weights = None
    if run["weights"]:
        weights = weights_like(batch, ~finite, run["weights"])
        keywords["weights"] = weights
    temperatures = np.resize([1.0, 2.5, 0.3, 60.0, 0.07], batch).astype(run["weights"] or "float64")
    if case["temperature"] != 1:
        keywords["temperature"] = temperatures if case["temperature"] == "rows" else case["temperature"]
    expected = call(operation, arrays, **keywords)

    on_device = [placed(gpu, a, run["layout"], other=bool(k)) for k, a in enumerate(arrays)]
    if weights is not None:
        keywords["weights"] = placed(gpu, weights, "behind" if weights.ndim == 1 else run["layout"])
    if case["temperature"] == "rows":
        keywords["temperature"] = placed(
            gpu, temperatures, "behind" if batch == (len(temperatures),) else run["layout"]
        )
    if run["out"]:
        keywords["out"] = tuple(
            placed(gpu, np.zeros_like(e), run["layout"] if e.ndim else "plain", other=True)
            if e.ndim
            else gpu.put(np.asarray(e))
            for e in map(np.asarray, expected)
        )
    before = [gpu.get(a) for a in on_device]
    with settings(gpu, seed=run["seed"], threads=run["threads"]):
        found = call(operation, on_device, **keywords)
    if run["out"]:
        assert all(f is o for f, o in zip(found, keywords["out"], strict=True))
    assert_bits(gpu, compared, found, expected, f"n={n} {run}")
    for a, b in zip(on_device, before, strict=True):
        assert (bits(gpu.get(a)) == bits(b)).all(), "an input was modified"
    return found


@pytest.mark.quick(12)
@pytest.mark.parametrize("case", CASES, ids=key)
def test_bits_of_the_cpu(gpu, compared, monkeypatch, case):
    kernel, lengths = PATHS[case["path"]]
    # rows with strided classes are not for kl_rows
    runs = RUNS[("last",) if case["path"] == "rows" else tuple(GIVEN["axis"])]
    if case["path"] == "rows":
        runs = [r for r in runs if r["layout"] not in ("turned", "mixed", "apart", "backwards")] + [
            {**r, "layout": "behind"} for r in runs if r["layout"] == "backwards"
        ]
    at = CASES.index(case) * 7
    with settings(gpu, architecture=case["architecture"]):
        used = launches(monkeypatch)
        if case["path"] == "rows":
            hold(monkeypatch, 0.1)  # although for some kinds it is faster to read them again
        if case["path"] == "summed":  # beside the value, by a kernel that depends on n
            lengths = [[n for n in lengths if n <= 128], [257], [1025]][at % 3]
        for k, n in enumerate(lengths):
            for run in (runs[(at + 2 * k) % len(runs)], runs[(at + 2 * k + 1) % len(runs)]):
                assert_run(gpu, compared, case, n, run)
        assert kernel in used


# Rows that take two sweeps, and three: with fewer results than on the CPU, since each is a kernel to compile.
ASKED = {"reduction": ("none", "row"), "gradient": (("x", "y"),), "axis": ("first", "middle", "last")}
GIVEN_ALL = {
    **test_bits.GIVEN,
    "size": tuple(itertools.product((1, 16, 17), (1, 7, 128, 129, 1024, 1025, 2500))),
    "layout": ("plain", "padded", "apart", "backwards", "turned"),
    "out": (None, "plain", "apart", "turned"),
    "dtype": ("float32",),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("space", [("logits", "logits"), ("probs", "logits")])
def test_all_that_can_be_asked(gpu, space):
    for case in test_bits.cases("kl_div", str(space), 8, ASKED, GIVEN_ALL):
        with settings(gpu, threads=min(case["threads"], 2)):
            test_bits.assert_plain("kl_div", space, case, functools.partial(placed, gpu), gpu.get)


@pytest.mark.parametrize("space", ["probs", "log_probs"])
def test_the_whole_range(gpu, compared, space):
    """Numbers of any size have the CPU's bits too."""
    both(gpu, compared, "kl_div", anywhere((space, space), "float32", 300, 7), space=space, return_grad=PAIR)


# ---- what is special -------------------------------------------------------------------------------------------------


def logits(rows, n, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(rows, n)) * 3
    return a.astype(DTYPES[dtype]), (a + rng.normal(size=a.shape)).astype(DTYPES[dtype])


def into(a, space):
    with np.errstate(divide="ignore"):
        z = a.astype(np.float64)
        z = z - z.max(axis=-1, keepdims=True)
        z = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
        of = {"probs": np.exp(z), "counts": 50 * np.exp(z)}
        return a if space == "logits" else of.get(space, z).astype(a.dtype)


def both(gpu, compared, operation, arrays, what="", **keywords):
    """The call on the device and on the CPU: the same bits."""
    on_device = {k: gpu.put(v) if isinstance(v, np.ndarray) else v for k, v in keywords.items()}
    found = call(operation, [gpu.put(a) for a in arrays], **on_device)
    assert_bits(gpu, compared, found, call(operation, arrays, **keywords), what)
    return found


@pytest.mark.parametrize("n", [5, 300, 1500])
@pytest.mark.parametrize("space", [p for p in oracle.PAIRS if "logits" in p and p[0] != p[1]])
@pytest.mark.parametrize("operation", RATIOS)
def test_a_log_probability_that_overflows_float32(gpu, compared, operation, space, n):
    a, b = logits(6, n, "float32")
    (b if space[1] == "logits" else a)[::2, 1::9] = np.finfo("float32").min
    b[1, 3] = -np.inf
    arrays = [into(v, s) for v, s in zip((a, b), space, strict=True)]
    both(gpu, compared, operation, arrays, space=space, temperature=0.3, return_grad=PAIR)
    both(gpu, compared, operation, arrays, space=space, temperature=0.3, reduction="none")


@pytest.mark.parametrize(
    ("operation", "space", "gradient", "dtype", "n"),
    [
        ("kl_div", "logits", "y", "float32", 1025),
        ("kl_div", "logits", PAIR, "float32", 5000),
        ("kl_div", "logits", "y", "float32", 12_001),
        ("kl_div", "logits", "y", "float32", 50_257),
        ("rel_entr", "logits", PAIR, "float64", 4100),
        ("kl_div", ("probs", "logits"), "y", "float32", 3333),
        ("cross_entropy", "logits", PAIR, "float32", 9001),
        ("entropy", "logits", "x", "float32", 7000),
        ("kl_div", "logits", "y", "bfloat16", 3001),
        ("kl_div", "logits", PAIR, "float16", 5025),
        ("kl_div", "logits", "y", "bfloat16", 12_288),
        ("kl_div", "logits", "y", "bfloat16", 128_256),
    ],
)
def test_rows_that_are_held_or_read_again(gpu, compared, monkeypatch, operation, space, gradient, dtype, n):
    """Two blocks process the rows in turn, and each warp gets several: what is known of one row must not stay for the
    next."""
    rows = 13 if n < 50_000 else 5
    x, y = logits(rows, n, "float64" if dtype == "float64" else "float32")
    x[1, ::3] = -np.inf
    y[2, 7] = -np.inf
    x[3, n - 1] = np.nan
    x[4] *= 100
    spaces = (space, space) if isinstance(space, str) else space
    arrays = [into(a, s) for a, s in zip((x, y), spaces, strict=True)][: len(COMMON[operation].gradients)]
    arrays = [a.astype(DTYPES[dtype]) for a in arrays]
    keywords = {"space": space, "return_grad": gradient}
    monkeypatch.setattr(backend(".launches"), "_MOST_BLOCKS", 2 / backend(".devices").properties(0).multiprocessors)
    used, results = launches(monkeypatch), []
    for share, kernels in ((0, {"kl_rows"}), (1000, {"kl_units", "kl_fold"})):
        if not share and sum(a[0].nbytes for a in arrays) > backend(".devices").properties(0).shared // 2:
            continue  # no block can hold them, or not on every device
        hold(monkeypatch, share)
        used.clear()
        for seed in (0, 3) if gpu.emulated else (0,):  # an odd seed holds a warp back
            with settings(gpu, seed=seed):
                if dtype in ("float64", "float32"):
                    both(gpu, compared, operation, arrays, **keywords)
                else:
                    results.append(near_the_cpu(gpu, arrays, **keywords))
        assert set(used) == kernels
    for found in results[1:]:
        assert all((bits(f) == bits(e)).all() for f, e in zip(found, results[0], strict=True))
        compared["arrays of 16 bits that the CUDA kernels treat alike anywhere"] += len(found)


@pytest.mark.parametrize(("operation", "space", "gradient", "dtype"), [
    ("kl_div", "logits", PAIR, "float32"), ("kl_div", ("probs", "logits"), "y", "float64"),
    ("entropy", "logits", "x", "float32"), ("kl_div", "probs", None, "float32"),
])  # fmt: skip
def test_rows_side_by_side_that_are_read_again(gpu, compared, monkeypatch, operation, space, gradient, dtype):
    """Their classes are strided. A block's warps go from chunk to chunk together, even if only some of them have a
    row."""
    monkeypatch.setattr(backend(".launches"), "_MOST_BLOCKS", 2 / backend(".devices").properties(0).multiprocessors)
    monkeypatch.setattr(backend(), "_kept", {})
    used = launches(monkeypatch)
    spaces = (space, space) if isinstance(space, str) else space
    arrays = [into(a, s).T.copy() for a, s in zip(logits(21, 2500, dtype), spaces, strict=True)]
    for seed in (0, 3) if gpu.emulated else (0,):
        with settings(gpu, seed=seed):
            arguments = arrays[: len(COMMON[operation].gradients)]
            both(gpu, compared, operation, arguments, space=space, axis=0, return_grad=gradient)
    assert set(used) == {"kl_units", "kl_fold"}


LOGITS_OF_16_BITS = {  # y for x, random numbers and the place of x's largest
    "apart": lambda x, r, top: 3 * r,
    "near": lambda x, r, top: x + 0.03 * r,
    "sharper": lambda x, r, top: 2.5 * x,
    "moved": lambda x, r, top: x + 300,
    "the top is lower": lambda x, r, top: x - 30 * top,
    "the top is much lower": lambda x, r, top: x - 300 * top,
    "the top is higher": lambda x, r, top: x + 5 * top,
    "masked": lambda x, r, top: np.where(r > 0.5, -np.inf, x + r),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", LOGITS_OF_16_BITS)
@pytest.mark.parametrize("spread", [0.05, 2, 20])
def test_logits_of_16_bits(gpu, kind, spread):
    """Wherever the mean of log q - log p is: sums are about a probable class first, and about the mean where they
    cancel."""
    rng = np.random.default_rng(int(10 * spread))
    for n in (3, 100, 1500):
        x, r = (rng.standard_normal((8, n)) for _ in range(2))
        x *= spread
        y = LOGITS_OF_16_BITS[kind](x, r, x == x.max(-1, keepdims=True))
        if kind == "masked":
            x = np.where(r > 0.5, -np.inf, x)
        for dtype, gradient in itertools.product(("float16", "bfloat16"), "xy"):
            arrays = [a.astype(DTYPES[dtype]) for a in (x, y)]
            near_the_cpu(gpu, arrays, space="logits", return_grad=gradient)


@pytest.mark.parametrize("n", [2, 100, 1000, 2500])
@pytest.mark.parametrize("temperature", [1, 0.5])
def test_logits_of_16_bits_far_below(gpu, n, temperature):
    """y has almost no mass where x has all of it: e^z is lost beside z, and z times a probability may overflow."""
    rng = np.random.default_rng(n)
    x = np.concatenate([np.zeros((2, n)), rng.standard_normal((3, n))])
    for low in (-10, -60, -1e3, -3e4, -1e9, -17039360.0, -1.7e38):
        y = np.where(np.arange(n) == n // 2, 2.0, low) + 0 * x
        y[1] = np.where(x[3] > 0.5, low, x[3])
        y[3:] = np.where(x[3:] > 1, low, x[3:])
        for gradient in "xy":
            arrays = [a.astype(DTYPES["bfloat16"]) for a in (x, y)]
            near_the_cpu(gpu, arrays, space="logits", temperature=temperature, return_grad=gradient)
            if low == -1e3:
                arrays = [a.astype(DTYPES["float16"]) for a in (x, y)]
                near_the_cpu(gpu, arrays, space="logits", temperature=temperature, return_grad=gradient)


def test_terms_of_few_classes_that_leave_the_range(gpu, compared):
    x = np.array([[0, 0, -100], [0, 0, 0]], "float32")
    y = np.array([[0, 0, -2e18], [0, 0, -1e19]], "float32")
    both(gpu, compared, "kl_div", (x, y), space="logits", reduction="none")


def near_the_cpu(gpu, arrays, **keywords):
    """Results of 16-bit inputs, for which the GPU uses its own exponentials, compared with the CPU's."""
    found = [gpu.get(a) for a in call("kl_div", map(gpu.put, arrays), **keywords)]
    for f, e in zip(found, call("kl_div", arrays, **keywords), strict=True):
        step = 2.0**-24 if f.dtype == np.float16 else 0  # of its subnormal numbers
        f, e = f.astype(np.float64), np.asarray(e).astype(np.float64)
        size = np.where(np.isfinite(e), abs(e), 0)
        bound = 1e-5 * size if e.ndim == 1 else 2.0**-7 * size + 1e-5 * size.max(axis=-1, keepdims=True) + step
        with np.errstate(invalid="ignore"):  # infinite values
            near = (abs(f - e) <= bound) | (f == e)
        assert (near | (np.isnan(f) & np.isnan(e))).all()
    return found


@pytest.mark.parametrize("warps", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [32 * 1024 + 1, 70_000, 131_000])
def test_warps_that_fold_together(gpu, compared, monkeypatch, warps, n):
    """Two, three and four warps have states to merge, if there are enough; in float64, which shows the order."""

    def chosen(call, batch, chunks, last, slot, beside):
        return warps, 1, warps * (slot + beside) + call.row_bytes(chunks)

    monkeypatch.setattr(backend(), "_kept", {})
    monkeypatch.setattr(backend(".launches"), "_a_block_a_row", chosen)
    used = launches(monkeypatch, lambda launch: (launch.name, launch.block))
    x, y = logits(backend(".devices").properties(0).multiprocessors, n, "float64")
    y[1, n - 1] += 200
    x[2, n // 2] = -np.inf
    with settings(gpu, seed=warps - 1):
        both(gpu, compared, "kl_div", (x, y), space="logits")
    assert used == [("kl_rows", (32 * warps,))]


def test_which_rows_are_held(gpu, monkeypatch):
    """Those that leave other rows enough of a multiprocessor, if there are enough for each block to get one."""
    devices, launches = backend(".devices"), backend(".launches")
    h200 = devices._Device(90, 132, 227 << 10, 228 << 10)
    monkeypatch.setattr(devices, "properties", lambda device: h200)

    def is_held(dtype, chunks, outputs=2, rows=8192):
        code = importlib.import_module("klcore.backends.rows").CODES[dtype]
        call = launches.Kind(0, KL_DIV, (2, 2), (code, code), dtype == "float64", outputs, True, False, 1024 * chunks)
        slot, beside = 1024 * call.bytes_a_class(), 1024 * call.extra_bytes() + 8 * launches.KNOWN
        found = launches._a_block_a_row(call, rows, chunks, call.sweeps, slot, beside)
        if found:
            warps, slots, shared = found
            blocks = min(h200.shared_all // (shared + 1024), call.most_warps() // warps)
            assert warps * (slots * slot + beside) < shared <= h200.shared
            assert blocks * warps >= call.most_warps() * (0.75 if outputs else 0.5)
            assert not outputs or warps * (slots - 1) < chunks <= warps * slots
        return found is not None

    for chunks in range(2, 1025):
        dtype = ("float32", "bfloat16", "float64")[chunks % 3]
        if chunks <= 300:  # swept once; few chunks are folded elsewhere, and the states of many need memory
            assert is_held(dtype, chunks, outputs=0) == (chunks >= 8), chunks
        assert not is_held(dtype, chunks, rows=132)
        assert is_held("float32", chunks) == (chunks <= 4), chunks
        assert not is_held("bfloat16", chunks)


@pytest.mark.parametrize("n", [9000, 50_257])
@pytest.mark.parametrize("space", ["logits", ("probs", "logits")])
def test_rows_that_nothing_can_hold(emulated, compared, monkeypatch, space, n):
    with settings(emulated, architecture="75"):
        used = launches(monkeypatch)
        x, y = logits(6, n)
        both(
            emulated,
            compared,
            "kl_div",
            [into(x, space if space == "logits" else "probs"), y],
            space=space,
            return_grad="y",
        )
        assert set(used) == {"kl_units", "kl_fold"}


def shifted(gpu, a, by, apart=0):
    """A device array that equals `a`, whose rows begin `by` elements after a multiple of 16 bytes, with gaps between
    rows."""
    n = a.shape[-1] + apart
    flat = gpu.xp.empty(a.shape[0] * n + by, a.dtype)
    view = flat[by:].reshape(a.shape[0], n)[:, : a.shape[-1]]
    view[...] = gpu.put(a)
    return view


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1020, 1024, 1028, 2048, 3076])
@pytest.mark.parametrize(("space", "gradient"), [("probs", PAIR), ("log_probs", "y"), ("probs", None)], ids=str)
def test_rows_that_need_no_staging(gpu, compared, dtype, n, space, gradient):
    """Full chunks are read and written in place if the whole row is aligned. The results do not show it."""
    rows = max(6, backend(".devices").properties(0).multiprocessors)
    arrays = [into(a, space).astype(DTYPES[dtype]) for a in logits(rows, n)]
    nothing = 0 if space == "probs" else -np.inf
    arrays[0][1, 300] = arrays[0][2, ::2] = nothing  # one step, and a whole row, are not ordinary
    arrays[1][3, n // 2] = np.nan
    keywords = {"space": space, "return_grad": gradient}
    staged = call("kl_div", [shifted(gpu, a, 1) for a in arrays], **keywords)
    size = arrays[0].itemsize
    if size > 2:  # otherwise the GPU uses its own exponentials
        assert_bits(gpu, compared, staged, call("kl_div", arrays, **keywords), "staged")
    value, *gradients = map(gpu.get, staged)
    whole = [*arrays, *gradients]
    for k, by in itertools.product(range(len(whole) + 1), (1, 8 // size)):  # one of them is shifted, or none
        x, y, *out = (shifted(gpu, a, by * (j == k), 16 // size) for j, a in enumerate(whole))
        for a in out:
            a[...] = 7
        out = (gpu.put(np.zeros_like(value)), *out) if out else None
        with settings(gpu, seed=k):
            found = call("kl_div", (x, y), **keywords, out=out)
        assert_bits(gpu, compared, found, (value, *gradients), f"{k} by {by}")


@pytest.mark.parametrize(("operation", "space", "gradient", "sweeps", "folded"), [
    ("kl_div", "probs", None, 1, 1), ("kl_div", "logits", "y", 2, 1), ("kl_div", ("log_probs", "logits"), PAIR, 3, 2),
    ("cross_entropy", ("log_probs", "logits"), PAIR, 2, 1),
])  # fmt: skip
@pytest.mark.parametrize("rows", [1, 2])
def test_a_million_classes(gpu, compared, launched, operation, space, gradient, sweeps, folded, rows):
    """More than 1024 chunks: they are folded twice."""
    spaces = (space, space) if isinstance(space, str) else space
    x, y = (into(a, s) for a, s in zip(logits(rows, 1_100_000), spaces, strict=True))
    with settings(gpu, seed=rows):
        both(gpu, compared, operation, (x, y), space=space, return_grad=gradient, reduction="sum")
    assert launched.count("kl_units") == sweeps
    assert launched.count("kl_fold") == 2 * folded


@pytest.mark.parametrize("weighted", [False, True])
def test_a_million_rows(gpu, compared, launched, weighted):
    """Their total takes several launches."""
    x, y = (np.random.default_rng(k).random((1_100_000, 1), dtype="float32") for k in (0, 1))
    weights = np.random.default_rng(2).random(len(x), dtype="float32") if weighted else None
    both(gpu, compared, "kl_div", (x, y), reduction="rowmean", weights=weights)
    assert (launched.count("kl_sum"), launched.count("kl_weights")) == (3, 3 if weighted else 0)


@pytest.mark.parametrize(
    ("shapes", "axis"),
    [
        (((2500, 5), (1, 5)), -1),
        (((7,), (3, 400, 7)), -1),
        (((2, 1, 520, 6), (3, 1, 6)), -1),
        (((2, 6, 1100), (1, 6, 1)), 1),
        (((1, 1, 140), (1030, 140)), -1),
    ],
)
@pytest.mark.parametrize("space", ["probs", "logits"])
def test_broadcast_operands(gpu, compared, shapes, axis, space):
    """Both gradients; those of more than 1024 rows take two rounds."""
    rng = np.random.default_rng(5)
    x, y = (rng.uniform(0.1, 1, s).astype("float32") for s in shapes)
    batch = klcore.kl_div(x, y, axis=axis).shape
    zero = rng.random(batch) < 0.2
    weights = rng.random(batch) * ~zero
    for keywords in ({}, {"reduction": "rowmean", "weights": weights}, {"reduction": "batchmean"}):
        both(gpu, compared, "kl_div", (x, y), space=space, axis=axis, return_grad=PAIR, **keywords)


@pytest.mark.exhaustive
def test_random_calls(gpu, compared):
    """Cases that no design covers: shapes, axes, broadcasting, weights and reductions at random, always the same."""
    rng = np.random.default_rng(7)
    for _ in range(300):
        space = str(rng.choice(["probs", "logits"]))  # test_broadcast_operands has compiled most of these
        n = int(rng.choice([1, 2, 3, 16, 31, 100, 128]))
        batch = tuple(int(v) for v in rng.choice([1, 2, 3, 5, 7], rng.integers(0, 4)))
        x, y = (rng.uniform(0.1, 3, (*batch, n)).astype("float32") for _ in range(2))
        x[rng.random(x.shape) < 0.05] = rng.choice([0, np.nan, np.inf, -np.inf])
        if batch and rng.random() < 0.4:
            d = rng.integers(len(batch))
            x = x.take([0], axis=d) if rng.random() < 0.5 else x
            y = y[(0,) * int(rng.integers(len(batch) + 1))] if rng.random() < 0.5 else y
        axis = int(rng.integers(-min(x.ndim, y.ndim), 0))
        x, y = (np.moveaxis(a, -1, axis) for a in (x, y))
        x = x[..., ::-1].copy()[..., ::-1] if rng.random() < 0.3 else x
        weights = None
        if rng.random() < 0.4:
            shape = np.broadcast_shapes(*(np.moveaxis(a, axis, -1).shape[:-1] for a in (x, y)))
            weights = rng.random(shape) * (rng.random(shape) < 0.7)
        reduction = str(rng.choice(["row", "sum", "rowmean", "none", "batchmean", "mean"]))
        with settings(gpu, seed=int(rng.integers(4)), threads=int(rng.integers(1, 3))):
            keywords = {"space": space, "axis": axis, "reduction": reduction, "weights": weights}
            about = str((x.shape, y.shape, keywords))
            both(gpu, compared, "kl_div", (x, y), about, return_grad=PAIR, **keywords)


@pytest.mark.parametrize("bad", [-1.0, -np.inf, np.nan, np.inf])
@pytest.mark.parametrize("n", [5, 300, 1500])
def test_a_bad_weight_on_the_device_makes_its_row_nan(gpu, compared, n, bad):
    """It is not validated: that would mean waiting for the GPU."""
    x, y = logits(16, n)
    weights = np.ones(16)
    expected = call("kl_div", (x, y), space="logits", weights=weights, return_grad=PAIR)
    weights[3] = bad
    on_device = [gpu.put(a) for a in (x, y)]
    found = call("kl_div", on_device, space="logits", weights=gpu.put(weights), return_grad=PAIR)
    for f, e in zip(found, expected, strict=True):
        f = gpu.get(f)
        assert np.isnan(f[3]).all()
        assert (np.delete(bits(f), 3, 0) == np.delete(bits(e), 3, 0)).all()
    for reduction in ("sum", "rowmean"):
        assert np.isnan(
            gpu.get(klcore.kl_div(*on_device, space="logits", weights=gpu.put(weights), reduction=reduction))
        )


# ---- against the definition, and two 16-bit inputs -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in KINDS if k in oracle.CALLS], ids=lambda k: f"{k[0]} {'/'.join(k[1])}")
def test_values_are_right(gpu, kind):
    """Not only equal to the CPU's: two 16-bit inputs use the GPU's own exponentials and reciprocals."""
    operation, spaces = kind
    wanted = COMMON[operation].gradients
    rng = np.random.default_rng(11)
    for n in (33, 300):
        a = rng.normal(size=(6, n)) * np.array([0.3, 1, 2, 2, 2, 3])[:, None]
        b = a + rng.normal(size=a.shape) * np.array([1, 0.03, 1, 1, 2, 0])[:, None]
        a[3, ::5] = b[3, ::5] = -np.inf
        x, y = (into(v, s).astype("float16") for v, s in zip((a, b), spaces, strict=True))
        if spaces[-1] == "probs":  # finite values and gradients only
            y = np.where(np.isinf(b), 0, np.maximum(y, 2.0**-14)).astype("float16")
        arrays = [gpu.put(v) for v in (x, y)[: len(wanted)]]
        found = call(operation, arrays, space=spaces, return_grad=wanted)
        true = oracle.exact(operation, x, y, spaces)
        for name, f in zip(("value", "dx", "dy"), map(gpu.get, found), strict=False):
            relative, absolute = oracle.tolerance(
                operation, spaces, f.dtype, "value" if name == "value" else "gradient"
            )
            if not (oracle.is_mixed(operation, spaces) and "logits" in spaces):  # those take no hardware exponentials
                relative += oracle.TOLERANCES["fast16", "float32"]
            expected, size = getattr(true, name), getattr(true, f"{name}_size")
            oracle.assert_close(f, expected, size, (relative, absolute), f"{name} of {kind}, n={n}")


@pytest.mark.parametrize("dtypes", [("float16",) * 2, ("bfloat16",) * 2, ("float16", "bfloat16")])
@pytest.mark.parametrize("space", SPACES)
def test_two_16_bit_inputs(gpu, compared, space, dtypes):
    """Zero of equal arguments, never negative, and the same bits wherever a row stands."""
    for n in (33, 300):
        x, y = (test_bits.numbers(16, n, space, d, side) for d, side in zip(dtypes, "xy", strict=True))
        value, *gradients = (gpu.get(r) for r in call("kl_div", map(gpu.put, (x, y)), space=space, return_grad=PAIR))
        assert not (value < 0).any()
        good = np.isfinite(klcore.kl_div(x, y, space=space))
        assert (np.isfinite(value) == good).all()
        whole = [value, *gradients]
        for r in range(16):
            alone = [gpu.get(a) for a in call("kl_div", [gpu.put(a[r]) for a in (x, y)], space=space, return_grad=PAIR)]
            for f, e in zip(alone, whole, strict=True):
                assert (bits(f) == bits(e[r])).all(), f"n={n}, row {r}: {f} alone, {e[r]} among others"
        for layout in ("behind", "apart", "turned"):
            on_device = [placed(gpu, a, layout) for a in (x, y)]
            for f, e in zip(call("kl_div", on_device, space=space, return_grad=PAIR), whole, strict=True):
                assert (bits(gpu.get(f)) == bits(e)).all(), (n, layout)
        if dtypes[0] == dtypes[1]:
            z = np.nan_to_num(x.astype(np.float64), neginf=-50, nan=1).astype(x.dtype)
            z = np.where(z < 0, -z, z) if space == "probs" else z
            same = klcore.kl_div(gpu.put(z), gpu.put(z.copy()), space=space)
            assert not gpu.get(same).any()
        compared["arrays of 16 bits that the CUDA kernels treat alike anywhere"] += 19 * len(whole)


# ---- what is launched, and what waits --------------------------------------------------------------------------------


def test_launches(gpu, launched):
    def after(shape, **keywords):
        launched.clear()
        x = gpu.put(np.full(shape, 0.5, "float32"))
        klcore.kl_div(x, x, **keywords)
        return " ".join(name.removeprefix("kl_") for name in launched)

    many = backend(".devices").properties(0).multiprocessors
    assert after((6, 5)) == "narrow"
    assert after((6, 5), space="logits", return_grad=PAIR, temperature=2) == "narrow"
    assert after((6, 5), reduction="none") == "narrow"
    assert after((6, 5), reduction="sum") == "narrow sum"
    assert after((6, 5), reduction="rowmean", weights=gpu.put(np.ones(6, "float32"))) == "weights narrow sum"
    assert after((6, 5), reduction="mean", weights=gpu.put(np.ones(6))) == "weights narrow sum"
    assert after((6, 5), reduction="mean", weights=gpu.put(np.ones(6, "float32"))) == "narrow sum"
    assert after((6, 500)) == "units"
    assert after((5, 6), axis=0) == "narrow"
    assert after((500, 6), axis=0) == "units"
    assert after((8 * many, 5000)) == "rows"
    assert after((many, 5000)) == "units fold"
    assert after((8 * many, 4096), space="logits", return_grad="y") == "rows"
    assert after((8 * many, 9000), space="logits", return_grad="y") == "units fold units"
    assert after((many, 4096), space="logits", return_grad="y") == "units fold units"
    assert after((2, 5000)) == "units fold"
    assert after((2, 5000), space="logits") == "units fold"
    assert after((2, 5000), space="logits", return_grad="y") == "units fold units"
    assert after((5000, many), axis=0) == "units fold"


@pytest.mark.parametrize("space", ["probs", "logits", ("probs", "logits")], ids=str)
@pytest.mark.parametrize("shapes", [((6, 40), (6, 40)), ((6, 40), (1, 40)), ((3, 2000), (3, 2000))], ids=str)
@pytest.mark.parametrize("reduction", ["row", "none", "sum", "rowmean"])
def test_a_call_that_is_known(gpu, compared, monkeypatch, space, shapes, reduction):
    """Its launches are reused; its addresses, working memory and results are its own."""
    of = (space, space) if isinstance(space, str) else space

    def check(seed):
        weights = np.arange(shapes[0][0]) + seed + 0.5
        arrays = [into(logits(*shape, seed=seed)[k], s) for k, (shape, s) in enumerate(zip(shapes, of, strict=True))]
        return both(
            gpu, compared, "kl_div", arrays, space=space, reduction=reduction, weights=weights, return_grad=PAIR
        )

    first = check(0)
    before = [gpu.get(a) for a in first]
    with monkeypatch.context() as patch:
        patch.setattr(backend(), "prepare", None)
        check(1)
    assert all((gpu.get(a) == b).all() for a, b in zip(first, before, strict=True))


@pytest.mark.parametrize("reduction", ["row", "none", "rowmean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_products_that_are_known(gpu, reduction, weighted):
    """With the cotangents, weights and factors of the second call, not of the first."""
    cpu = importlib.import_module("klcore.backends.cpu")
    for seed in range(3):
        x, y = logits(5, 40, seed=seed)
        rng = np.random.default_rng(seed)
        cotangent = rng.normal(size={"row": 5, "none": (5, 40)}.get(reduction, ())).astype("float32")
        weights = rng.random(5).astype("float32") if weighted else None
        rest = ("logits", -1, reduction)
        call = Call(KL_DIV, x, y, *rest, weights, return_grad=("x", "y"), cotangent=cotangent)
        expected = cpu.compute(call)
        put = [gpu.put(a) if a is not None else None for a in (x, y, weights, cotangent)]
        found = backend().compute(call._replace(x=put[0], y=put[1], weights=put[2], cotangent=put[3]))
        for f, e in zip(found, expected, strict=True):
            assert (bits(gpu.get(f)) == bits(e)).all(), seed


@pytest.mark.parametrize("factored", [False, True])
def test_losses_that_are_known(gpu, factored):
    cpu = importlib.import_module("klcore.backends.cpu")
    for seed in range(3):
        x, y = (into(a, s) for a, s in zip(logits(5, 40, seed=seed), ("probs", "log_probs"), strict=True))
        factors = np.random.default_rng(seed).random((5, 40)) if factored else None
        rest = (("probs", "log_probs"), -1, "sum")
        call = Call(LOSSES["pytorch"], x, y, *rest, factors, return_grad="y", denominator=7.0)
        expected = cpu.compute(call)
        on = [gpu.put(a) if a is not None else None for a in (x, y, factors)]
        for f, e in zip(backend().compute(call._replace(x=on[0], y=on[1], weights=on[2])), expected, strict=True):
            assert (bits(gpu.get(f)) == bits(np.asarray(e))).all(), seed


def test_nothing_is_kept_alive(emulated):
    x, y = (emulated.put(a) for a in logits(3, 40))
    kept = [weakref.ref(a) for a in (x, y, *klcore.kl_div(x, y, space="logits", reduction="sum", return_grad=PAIR))]
    del x, y
    gc.collect()
    assert [ref() for ref in kept] == [None] * 5


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 3)])
def test_nothing_is_launched_for_nothing(gpu, launched, shape):
    x = gpu.put(np.zeros(shape, "float32"))
    for space, reduction in itertools.product(SPACES, ("row", "none", "sum", "rowmean", "mean")):
        klcore.kl_div(x, x, space=space, reduction=reduction, return_grad=PAIR)
    assert launched == []


@contextlib.contextmanager
def unseen(monkeypatch):
    """Raises an error if numbers on the device are read."""
    device = emulator()

    def looked(*_, **__):
        raise AssertionError("looked at a device's array: it has to be waited for")

    with monkeypatch.context() as patch:
        for name in ("get", "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__len__", "__iter__"):
            patch.setattr(device.ndarray, name, looked)
        patch.setattr(device.cupy, "asnumpy", looked)
        patch.setattr(device.Device, "synchronize", looked)
        patch.setattr(device.Stream, "synchronize", looked)
        patch.setattr(device._runtime, "deviceSynchronize", looked)
        with pytest.raises(AssertionError, match="looked"):  # the patches take effect
            bool(device.cupy.zeros(1)[0] > 0)
        yield


def test_nothing_waits_for_the_device(emulated, monkeypatch):
    x, y = (emulated.put(a) for a in logits(6, 40))
    weights = emulated.put(np.ones(6))
    out = emulated.put(np.zeros((), "float32"))
    with unseen(monkeypatch):
        for reduction in ("row", "none", "sum", "rowmean", "batchmean", "mean"):
            klcore.kl_div(x, y, space="logits", reduction=reduction, weights=weights, return_grad=PAIR)
        klcore.kl_div(x, y[0], space="logits", return_grad=PAIR)
        assert klcore.kl_div(x, y, space="logits", reduction="sum", out=out) is out
    assert emulated.get(out) > 0


def test_too_little_memory(emulated, launched):
    """Whichever allocation fails, nothing has been written. All working memory is a single allocation."""
    x, y = (emulated.put(a) for a in logits(2, 3000))
    weights = emulated.put(np.ones(2))
    keywords = {"space": "logits", "reduction": "rowmean", "weights": weights, "return_grad": PAIR}
    call("kl_div", (x, y[0]), **keywords)  # compiled
    left = [0]

    def limited(nbytes):
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError("out of memory")
        with emulated.xp.cuda.using_allocator(None):
            return emulated.xp.cuda.alloc(nbytes)

    for known in (False, True):  # whether a similar call was made before
        for given in ((0, 1, 2), (1,), ()):
            for count in itertools.count():
                left[0] = count
                out = tuple(emulated.xp.full(s, 7, "float32") for s in ((), x.shape, y[0].shape))
                launched.clear()
                try:
                    with emulated.xp.cuda.using_allocator(limited):
                        call(
                            "kl_div",
                            (x, y[0]),
                            out=tuple(o if k in given else None for k, o in enumerate(out)),
                            **keywords,
                        )
                    break
                except MemoryError:
                    assert launched == []
                    assert all((emulated.get(o) == 7).all() for o in out)
            assert count == 1 + 3 - len(given), known
            assert [bool((emulated.get(o) == 7).any()) for o in out] == [k not in given for k in range(3)]


def test_threads_at_once(gpu):
    """Calls of several Python threads, each on its own stream."""
    x, y = logits(40, 300)
    expected = klcore.kl_div(x, y, space="logits")
    found = {}

    def work(k):
        with gpu.xp.cuda.Stream():
            found[k] = gpu.get(klcore.kl_div(gpu.put(x), gpu.put(y), space="logits"))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all((bits(found[k]) == bits(expected)).all() for k in range(4))


def test_stream_of_the_caller(emulated, monkeypatch):
    """Kernels go to the caller's current stream, which is current again afterwards."""
    device = emulator()
    seen, run = [], device.Function.__call__

    def on(kernel, *arguments, **keywords):
        seen.append(device._stream())
        return run(kernel, *arguments, **keywords)

    monkeypatch.setattr(device.Function, "__call__", on)
    x = emulated.put(np.full((3, 4), 0.25))
    stream = emulated.xp.cuda.Stream(non_blocking=True)
    with stream:
        klcore.kl_div(x, x, reduction="sum")
        assert device._stream() is stream
    assert len(seen) == 2
    assert all(s is stream for s in seen)


# ---- where arrays are ------------------------------------------------------------------------------------------------


@pytest.fixture
def two(emulated):
    """Two devices."""
    with settings(emulated, devices=2):
        yield emulated
    emulator()._forget()


def on(gpu, number, a):
    with gpu.xp.cuda.Device(number):
        return gpu.xp.asarray(a)


def test_second_device(two, compared):
    x, y = logits(3, 2000)
    for _ in range(2):  # a repeated call, with the other device current
        there = [on(two, 1, a) for a in (x, y)]
        found = call("kl_div", there, space="logits", reduction="sum", return_grad=PAIR)
        assert {a.device.id for a in found} == {1}
        assert_bits(two, compared, found, call("kl_div", (x, y), space="logits", reduction="sum", return_grad=PAIR))
    assert two.xp.cuda.runtime.getDevice() == 0


def test_device_by_number(two):
    x, y = logits(3, 20)
    for arrays in ((x, y), (on(two, 0, x), on(two, 1, y)), (on(two, 0, x), y), (x.tolist(), on(two, 0, y))):
        value, dx = klcore.kl_div(
            *arrays, space="logits", device="cuda:1", return_grad="x", weights=on(two, 0, np.ones(3))
        )
        assert value.device.id == dx.device.id == 1
        np.testing.assert_allclose(two.get(value), klcore.kl_div(x, y, space="logits"), rtol=1e-6)
    assert two.xp.cuda.runtime.getDevice() == 0
    assert klcore.kl_div(on(two, 1, x), y, space="logits", device="cuda").device.id == 1  # where its arrays are


def test_no_device_of_that_number(two):
    with pytest.raises(klcore.BackendUnavailableError, match=r"'cuda:7'.*2 CUDA device.*'cuda:0' to 'cuda:1'"):
        klcore.kl_div([0.5, 0.5], [0.5, 0.5], device="cuda:7")


@pytest.mark.parametrize("which", ["y", "weights", "out"])
def test_arrays_on_different_devices(two, which):
    x = np.full((3, 4), 0.25)
    arrays = {"x": on(two, 0, x), "y": on(two, 0, x), "weights": on(two, 0, np.ones(3)), "out": on(two, 0, np.ones(3))}
    arrays[which] = on(two, 1, two.get(arrays[which]))
    with pytest.raises(ValueError, match=r"different devices \(.*x on cuda:0.*cuda:1.*device='cuda:N'"):
        klcore.kl_div(**{"x": arrays.pop("x"), "y": arrays.pop("y")}, **arrays)


def test_out_on_another_device_than_the_named_one(two):
    x, out = np.full((3, 4), 0.25), on(two, 1, np.full(3, 7.0))
    with pytest.raises(ValueError, match=r"out\[0\] is on cuda:1, but the computation is on cuda:0"):
        klcore.kl_div(on(two, 0, x), on(two, 0, x), device="cuda:0", out=out)
    assert (two.get(out) == 7).all()


def test_numpy_arrays_on_the_device(gpu, compared):
    """Results stay there."""
    x, y = logits(4, 6, "float64")
    swapped = y.astype(y.dtype.newbyteorder())
    expected = call("kl_div", (x, y), space="logits", weights=np.arange(4), return_grad=PAIR)
    for arrays in ((x, y), (x, swapped), (x.tolist(), y), (x[::-1][::-1], y), (gpu.put(x), y)):
        keywords = {"space": "logits", "weights": [0, 1, 2, 3], "return_grad": PAIR}
        assert_bits(gpu, compared, call("kl_div", arrays, device="cuda", **keywords), expected)
    assert type(klcore.entropy([0.5, 0.5], device="cuda:0")) is gpu.array_type()
    assert type(klcore.kl_div(gpu.put(x), [0.5] * 6)) is gpu.array_type()
    assert type(klcore.kl_div(1, gpu.put(np.array(2.0)))) is gpu.array_type()


def test_device_arrays_on_the_cpu(gpu):
    x, y = logits(4, 6)
    for arrays in ((gpu.put(x), gpu.put(y)), (gpu.put(x), y)):
        value, dy = klcore.kl_div(*arrays, space="logits", device="cpu", weights=gpu.put(np.ones(4)), return_grad="y")
        assert type(value) is type(dy) is np.ndarray
        assert (value == klcore.kl_div(x, y, space="logits")).all()


# ---- bad input -------------------------------------------------------------------------------------------------------

ROWS = np.full((2, 3), 0.25)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, ("x is a cupy array and y is a numpy array", "device="), lambda put: {"y": ROWS}),
        (TypeError, ("x has dtype complex", "float64"), lambda put: {"x": put(ROWS + 0j)}),
        (TypeError, ("x is a masked array", "filled"), lambda put: {"x": np.ma.masked_less(ROWS, 1), "device": "cuda"}),
        (TypeError, ("x has dtype object", "float64"), lambda put: {"x": ROWS.astype(object), "device": "cuda"}),
        (TypeError, ("x has dtype <U", "float64"), lambda put: {"x": ROWS.astype(str), "device": "cuda"}),
        (ValueError, ("(2, 3)", "(2, 4)", "classes"), lambda put: {"y": put(np.ones((2, 4)))}),
        (ValueError, ("(2, 3)", "(5, 3)", "broadcast"), lambda put: {"y": put(np.ones((5, 3)))}),
        (ValueError, ("weights", "(3,)", "(2,)"), lambda put: {"weights": put(np.ones(3))}),
        (ValueError, ("weights", "-1.0 at index (1,)"), lambda put: {"weights": [1.0, -1.0]}),
        (ValueError, ("weights", "nan at index (1,)"), lambda put: {"weights": np.array([1.0, np.nan])}),
        (TypeError, ("the value", "cupy.ndarray", "found ndarray"), lambda put: {"out": np.zeros(2)}),
        (ValueError, ("the value", "(2,)", "(3,)"), lambda put: {"out": put(np.zeros(3))}),
        (ValueError, ("the value", "float64", "float32"), lambda put: {"out": put(np.zeros(2, "float32"))}),
        (ValueError, ("'cuda'", "'gpu'"), lambda put: {"device": "gpu"}),
    ],
)
def test_bad_input(gpu, launched, error, words, arguments):
    given = {"x": gpu.put(ROWS), "y": gpu.put(ROWS), **arguments(gpu.put)}
    with pytest.raises(error) as raised:
        klcore.kl_div(given.pop("x"), given.pop("y"), **given)
    assert [word for word in words if word not in str(raised.value)] == [], raised.value
    assert launched == []


def test_out_that_overlaps(gpu, launched):
    x, y = gpu.put(ROWS), gpu.put(ROWS)
    two = gpu.xp.zeros((3, 3))
    with pytest.raises(ValueError, match="overlaps the memory of an input"):
        klcore.kl_div(x, y, return_grad="x", out=(None, x))
    with pytest.raises(ValueError, match="overlaps the memory of an input"):
        klcore.kl_div(x, y, out=y[:, 1])
    with pytest.raises(ValueError, match="two arrays of out overlap"):
        klcore.kl_div(x, y, return_grad=PAIR, out=(None, two[:2], two[1:]))
    with pytest.raises(ValueError, match="elements share memory"):
        klcore.kl_div(x, y, out=gpu.xp.broadcast_to(gpu.xp.zeros(1), (2,)))
    assert launched == []
    columns = gpu.xp.zeros((2, 6))  # interleaved arrays do not overlap
    columns[:, ::2] = x
    for _ in range(2):
        klcore.kl_div(columns[:, ::2], y, return_grad="x", out=(None, columns[:, 1::2]))


def test_out_that_overlaps_in_a_call_that_is_known(gpu, launched):
    """Of two calls that differ only in addresses, one may write over its input."""
    x, y, weights, dx, dy = (gpu.put(np.full((2, 3), 0.25)) for _ in range(5))
    weights = weights[:, 0]
    whole, flat = gpu.xp.zeros((3, 3)), gpu.xp.zeros(8)
    keywords = {"return_grad": PAIR, "weights": weights}
    klcore.kl_div(x, y, out=(None, dx, dy), **keywords)
    klcore.kl_div(x, y, out=(flat[:2], dx, dy), **keywords)
    launched.clear()
    for out in ((None, x, dy), (None, dx, y), (None, y, x), (x[0, :2], dx, dy)):
        with pytest.raises(ValueError, match="overlaps the memory of an input"):
            klcore.kl_div(x, y, out=out, **keywords)
    for out in ((None, whole[:2], whole[1:]), (None, dx, dx), (dx[1, 1:], dx, dy), (dy[0, :2], dx, dy)):
        with pytest.raises(ValueError, match="two arrays of out overlap"):
            klcore.kl_div(x, y, out=out, **keywords)
    assert launched == []
    klcore.kl_div(x, y, out=(None, whole[:2], dy), **keywords)
    assert len(launched) == 1


UNUSABLE = """
import sys, types
{setup}
import klcore
from klcore.operations import KL_DIV, LOSSES, Call
config = klcore.show_config("dicts")["cuda"]
for _ in range(2):
    for device in ("cuda", "cuda:3"):
        try:
            klcore.kl_div([0.5], [0.5], device=device)
        except klcore.BackendUnavailableError as error:
            assert "no: " + str(error) == config["available"], (str(error), config)
        else:
            raise AssertionError("computed somewhere else in silence")
print(config["available"])
"""
NO_DRIVER = """
def refuse(): raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
runtime = types.SimpleNamespace(getDeviceCount=refuse)
cupy = sys.modules["cupy"] = types.ModuleType("cupy")
cupy.cuda = types.SimpleNamespace(runtime=runtime)
"""
NO_NVRTC = """
import ctypes
def refuse(name, *_, **__): raise OSError(name)
ctypes.CDLL = refuse
sys.modules["cuda.pathfinder"] = None
"""


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        ("sys.modules['cupy'] = None", ("CuPy", "pip install 'klcore[cuda13]'", "klcore[cuda12]")),
        (NO_DRIVER, ("driver", "cudaErrorInsufficientDriver", "nvidia-smi", "docker run --gpus all")),
        (NO_DRIVER + "runtime.getDeviceCount = lambda: 0", ("no NVIDIA device", "nvidia-smi", "CUDA_VISIBLE_DEVICES")),
        (NO_DRIVER + NO_NVRTC, ("NVRTC", 'pip install "klcore[cuda13]"', "klcore[cuda12]")),
    ],
    ids=["no CuPy", "no driver", "no device", "no NVRTC"],
)
def test_what_is_missing_is_named(python, setup, words):
    if sys.platform == "darwin" and "NVRTC" not in words:
        pytest.skip("NVIDIA has no NVRTC for this system")
    sentence = python(UNUSABLE.format(setup=setup))
    assert [word for word in words if word not in sentence] == [], sentence


def test_cupy_itself_without_a_driver(python):
    """Real CuPy, if it is installed, without a driver."""
    code = """
import importlib.util, klcore
if importlib.util.find_spec("cupy"):
    print(klcore.show_config("dicts")["cuda"]["available"])
"""
    found = python(code, CUDA_VISIBLE_DEVICES="", warnings="ignore").strip()
    assert found in ("", "yes") or all(word in found for word in ("nvidia-smi", "driver"))


def test_show_config(two, capsys):
    config = klcore.show_config("dicts")["cuda"]
    nvrtc = importlib.import_module("klcore.backends.cuda.nvrtc")
    assert config == {
        "available": "yes",
        "CuPy": two.xp.__version__,
        "NVRTC": ".".join(map(str, nvrtc.version())),
        "driver": "of CUDA 13.0",
        "cuda:0": "emulated, compute capability 9.0, 8 GiB",
        "cuda:1": "emulated, compute capability 9.0, 8 GiB",
    }
    klcore.show_config()
    assert "  cuda:1: emulated, compute capability 9.0, 8 GiB\n" in capsys.readouterr().out


# ---- the sanitizers --------------------------------------------------------------------------------------------------

SANITIZED = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import klcore
from klcore.operations import KL_DIV, LOSSES, Call
from emulator import device

device.settings.sanitize = True
device.install()
import cupy

def rows(rows, n, first):
    a = np.random.default_rng(n).uniform(0.1, 1, (rows, n)).astype("float32")
    view = cupy.empty(a.size + first, "float32")[first:].reshape(a.shape)
    view[...] = cupy.asarray(a)
    return a, view

for which in sys.argv[2].split():
    space, gradient, classes, *shapes = which.split(":")
    for shape in shapes:
        m, n = map(int, shape.split("x"))
        for first in (0, 1, 3):
            device.settings.seed = first
            (x, cx), (y, cy) = rows(m, n, first), rows(m, n, 4 - first)
            if classes == "one":
                y, cy = y[0], cy[0]
            keywords = dict(space=space, return_grad=tuple(gradient), reduction="rowmean", axis=-1)
            if classes == "first":
                x, cx, y, cy, keywords["axis"] = x.T, cx.T, y.T, cy.T, 0
            expected = klcore.kl_div(x, y, weights=np.ones(m), **keywords)
            for f, e in zip(klcore.kl_div(cx, cy, weights=cupy.ones(m), **keywords), expected):
                assert (cupy.asnumpy(f) == e).all(), which
print("clean")
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs g++'s sanitizers")
@pytest.mark.parametrize(
    "which",
    [
        "logits:xy:last:5x1:5x7:70x33:3x128:5x131:4x1023:6x1027:1x2051 logits:y:last:1x16391",
        "probs:y:one:9x5:1100x3:5x130 probs:xy:first:9x5:5x131:6x1027 probs:xy:last:5x2052:1x3072",
    ],
)
def test_sanitizers_find_nothing(emulated, which):
    """Address and undefined behaviour, for rows that begin and end anywhere."""
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, os.path.dirname(__file__), which],
        capture_output=True,
        text=True,
        timeout=600,
        **as_here(**emulator().sanitizer_environment()),
    )
    assert done.stdout == "clean\n", done.stdout + done.stderr
