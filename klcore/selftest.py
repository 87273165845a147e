"""Check klcore's promises on this machine: `python -m klcore --selftest`, which calls `run`.

Needs only NumPy. The exact answers in exact.py were computed without klcore. All other inputs are made from integers
and single IEEE operations, so that they, and the digests of the results, are the same on every machine.
"""

import hashlib
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np

from klcore import _cpu, divergence, estimate, family
from klcore.backends.threads import get_num_threads, threads
from klcore.config import show_config
from klcore.exact import ANSWERS
from klcore.operations import ESTIMATORS, OPERATIONS, Operation

FUNCTIONS = vars(divergence) | vars(family) | vars(estimate)
SPACES = ("probs", "log_probs", "logits")
DTYPES = ("float64", "float32", "float16", "bfloat16")
# On a GPU, each combination of a pair of spaces, a dtype and a launch strategy is a kernel that takes a second to
# compile. So only these pairs are checked there, in both dtypes, and each launch strategy once.
GPU_PAIRS = (*((space, space) for space in SPACES), ("probs", "logits"))
BOUNDS = {  # docs/accuracy.md: relative errors; for gradients, relative to the largest of the row
    ("values", "float32"): 4e-6,
    ("values", "float64"): 1e-13,
    ("gradients", "float32"): 2e-5,
    ("gradients", "float64"): 1e-11,
}
INF, NAN = math.inf, math.nan
DOMAIN = (  # space, x, y, KL(x || y)
    ("probs", (0.0, 1.0), (0.25, 1.0), 0.25),
    ("probs", (0.0, 0.0), (0.0, 0.0), 0.0),
    ("probs", (0.5, 0.5), (0.0, 1.0), INF),
    ("probs", (-0.5, 1.5), (0.5, 0.5), NAN),
    ("probs", (0.5, 0.5), (-0.5, 1.5), NAN),
    ("probs", (NAN, 1.0), (1.0, 1.0), NAN),
    ("log_probs", (-INF, 0.0), (0.0, 0.0), 1.0),
    ("log_probs", (-INF, 0.0), (-INF, 0.0), 0.0),
    ("log_probs", (-1.0, 0.0), (-INF, 0.0), INF),
    ("log_probs", (NAN, 0.0), (0.0, 0.0), NAN),
    ("logits", (-INF, 1.0), (-INF, 3.0), 0.0),
    ("logits", (1.0, 1.0), (-INF, 1.0), INF),
    ("logits", (-INF, -INF), (1.0, 1.0), NAN),
    ("logits", (INF, 1.0), (1.0, 1.0), NAN),
)
# The first 64 bits of the SHA-256 of all results of a group of calls. Only a new version of the numerics, now v2,
# changes them.
DIGESTS = {
    "kernels": "ee6c028047469bf0",
    "kl_div float64": "87a1b958b344259d",
    "rel_entr float64": "908ab85fa951f6e0",
    "cross_entropy float64": "982d50015e5cab6f",
    "entropy float64": "7ed58e587cc23c8a",
    "kl_div float32": "68438fd155246588",
    "rel_entr float32": "317f88d61e10861f",
    "cross_entropy float32": "f785f936b42eeb66",
    "entropy float32": "a498ef4313be9202",
    "kl_div float16": "4d7931512ee5a90e",
    "rel_entr float16": "76b4f37ff5b5f252",
    "cross_entropy float16": "8bd2041802b3263c",
    "entropy float16": "74783acd09f1f7fd",
    "kl_div bfloat16": "742b221201827992",
    "rel_entr bfloat16": "2273f55218d20234",
    "cross_entropy bfloat16": "be16c8dd56890157",
    "entropy bfloat16": "8884072ecd2ec9fb",
    "js_div float64": "820b64a93f06e8c5",
    "mixed_kl_div float64": "72a70e4e65e1fc93",
    "skew_kl_div float64": "e86703ba0d1bfbb9",
    "alpha_div float64": "eb7eb04d850e7e19",
    "renyi_div float64": "dc9fc16258224ff2",
    "tv_dist float64": "b7b06209acc06f4e",
    "sq_hellinger float64": "b9600ca1aacbe131",
    "chi2_div float64": "d9029f8b0d369f3e",
    "js_div float32": "5e80a864beefc8f6",
    "mixed_kl_div float32": "bbd1fdf9e08e98bc",
    "skew_kl_div float32": "141d447180f3a75f",
    "alpha_div float32": "2b17d78eee2a09e8",
    "renyi_div float32": "5044067e11ffe892",
    "tv_dist float32": "d92ebe47a164e409",
    "sq_hellinger float32": "5da79e7fd3108490",
    "chi2_div float32": "a90211b51c314a26",
    "kl_div counts": "e9f4573fd59d99bc",
    "rel_entr counts": "b759f9607fa739b6",
    "cross_entropy counts": "1c23370a9f800d7e",
    "entropy counts": "e13bb5e17ca0e865",
    "js_div counts": "a1bc64b258ef8fc9",
    "mixed_kl_div counts": "dfe26e722332300f",
    "skew_kl_div counts": "75fe7b4dd19ea08d",
    "alpha_div counts": "b56cbce4913f2ca8",
    "renyi_div counts": "d745330c0a4d4608",
    "tv_dist counts": "0d7c50ab1b874b1a",
    "sq_hellinger counts": "2f1472f2237e11e4",
    "chi2_div counts": "79ab83908f85a75c",
    "kl_div listed": "83a5fece9bffab6e",
    "rel_entr listed": "95da7a91b47c455b",
    "js_div listed": "5ef94f08b207369c",
    "mixed_kl_div listed": "9f07169cc536e637",
    "tv_dist listed": "9741c4a903c4de3a",
    "k1 float64": "18b6fc8cf7970175",
    "k2 float64": "f13179a9aacaba7d",
    "k3 float64": "25d70d58c422e5bf",
    "k1 float32": "43ee428f8970f745",
    "k2 float32": "19006c24204d778c",
    "k3 float32": "f9d0f9b1fcba0dbd",
}

Call = tuple[str, list[Any], dict[str, Any]]
Line = tuple[bool, str]  # whether the check passed, and a sentence about it


def run() -> bool:
    """Check every device, and print one line per promise.

    Returns
    -------
    bool
        Whether all checks passed. A device that is missing is not checked.
    """
    config = show_config("dicts")
    devices = {"cpu": f"{config['cpu']['instruction set in use']}, {get_num_threads()} threads"}
    devices |= {name: about for name, about in config["cuda"].items() if name.startswith("cuda:")}
    holds = True
    for device, about in devices.items():
        print(f"{device} ({about}):", flush=True)
        for check in (_answers, _domain, _signs, _bits):
            for good, sentence in _lines(check, device):
                print(f"  {'ok    ' if good else 'FAILED'}  {sentence}", flush=True)
                holds &= good
    if len(devices) == 1:
        print(f"cuda: not checked: {config['cuda']['available'].removeprefix('no: ')}")
    print(
        f"klcore keeps its promises on {', '.join(devices)}."
        if holds
        else "klcore does NOT keep its promises here. Please report this, with everything above: "
        "https://github.com/klcore/klcore/issues"
    )
    return holds


def _lines(check: Callable[[str], Iterator[Line]], device: str) -> Iterator[Line]:
    try:
        yield from check(device)
    except Exception as error:  # of any kind: a line of the report is more useful than a traceback
        yield False, f"{check.__name__[1:]}: {type(error).__name__}: {error}"


# ---- inputs ----------------------------------------------------------------------------------------------------------


def _uniform(seed: int, shape: tuple[int, ...]) -> Any:
    """Multiples of 2^-53 in [0, 1): the finaliser of SplitMix64 (Steele, Lea and Flood 2014) applied to a counter."""
    k = np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed << 32)
    k = (k ^ (k >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    k = (k ^ (k >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((k ^ (k >> np.uint64(31))) >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53


@cache
def _arrays(shape: tuple[int, int], spaces: tuple[str, ...], dtype: str) -> list[Any]:
    """One array per space. Rows alternate between four kinds: far apart, close, equal, and with excluded classes."""
    u, v = _uniform(1, shape), _uniform(2, shape)
    kind = np.arange(shape[0])[:, None] % 4
    v = np.where(kind == 1, u * (1 - 2.0**-12) + v * 2.0**-12, np.where(kind == 2, u, v))
    excluded = (kind == 3) & (_uniform(3, shape) < 0.25)
    excluded[:, 0] = False
    arrays = []
    for numbers, space, some in zip((u, v), spaces, (excluded, excluded & (u < 0.5)), strict=False):
        a = numbers if space in ("probs", "counts") else numbers * -16 if space == "log_probs" else numbers * 32 - 16
        a = np.where(some, 0.0 if space in ("probs", "counts") else -INF, a)
        if dtype == "bfloat16":
            arrays.append(a.astype(np.float32).astype(importlib.import_module("ml_dtypes").bfloat16))
        else:
            arrays.append(a.astype(dtype))
    return arrays


def _options(row: Operation, pair: tuple[str, str]) -> dict[str, Any]:
    return {"space": pair[0] if row.single else pair, "return_grad": row.gradients, **row.needed}


def _calls(operation: str, dtype: str) -> Iterator[Call]:
    """Every pair of spaces over short and longer rows; reductions, weights, temperature, broadcasting; a long row."""
    row = OPERATIONS[operation]
    for pair in (pair for pair in row.pairs if "counts" not in pair):
        options = _options(row, pair)
        of = pair[: len(row.gradients)]
        for shape in ((8, 1), (8, 17), (8, 130), (4, 1025)):
            yield operation, _arrays(shape, of, dtype), options
        if len(set(pair)) > 1:
            continue
        x, *y = _arrays((200, 257), of, dtype)
        yield operation, [x, *y], {**options, "reduction": "rowmean", "weights": np.arange(200) % 3 / 2}
        yield operation, [x, *(a[:1] for a in y)], {**options, "reduction": "mean"}
        yield (
            operation,
            [a[:, ::-3].T for a in (x, *y)],
            {**options, "reduction": "none" if row.has_terms else "row", "axis": 0},
        )
        if "logits" in pair:
            yield operation, [x, *y], {**options, "reduction": "batchmean", "temperature": 2.5}
        if dtype == "float32":
            yield operation, _arrays((1, 140_001), of, dtype), {**options, "reduction": "sum"}


def _counts(operation: str) -> Iterator[Call]:
    """Counts with counts, and for kl_div also counts with every other space."""
    row = OPERATIONS[operation]
    for pair, dtype in product(row.pairs, DTYPES[:2]):
        if pair == ("counts", "counts") or ("counts" in pair and operation == "kl_div"):
            for shape in ((8, 17), (4, 1025)):
                yield operation, _arrays(shape, pair[: len(row.gradients)], dtype), _options(row, pair)


def _listed(operation: str) -> Iterator[Call]:
    """x lists some classes, unordered; one of them twice, and some entries list no class."""
    u = _uniform(5, (6, 40))
    indices = (u * 2500).astype(np.int64)
    indices[:, 7], indices[::2, 9] = -1, indices[::2, 8]
    for dtype, tail in product(DTYPES[:2], _cpu.TAILS):
        (y,) = _arrays((6, 2500), ("logits",), dtype)
        options = {"indices": indices, "tail": tail, "return_grad": ("x", "y")}
        yield operation, [(u * -12 - 4).astype(dtype), y], {**options, "space": ("log_probs", "logits")}
    yield operation, [u / 40, _arrays((1, 2500), ("probs",), "float32")[0]], {**options, "tail": "bucket"}


def _estimates(kind: str, dtype: str) -> Iterator[Call]:
    """Tokens with r = log_y - log_x close to 0, about 1, and far from 0; with weights, ratios and limits."""
    u, v = _uniform(1, (60, 70)), _uniform(2, (60, 70))
    size = 2.0 ** np.array([-20.0, 1.0, 6.0])[np.arange(60) % 3, None]
    arrays = [a.astype(dtype) for a in (u * -16, u * -16 + (v - 0.5) * size)]
    options = {"kind": kind, "return_grad": ("x", "y")}
    by = {"weights": np.arange(70) % 3 / 2, "ratio": u * 2}
    yield "kl_estimate", arrays, options
    yield "kl_estimate", arrays, {**options, **by, "limit": 3.0, "reduction": "mean"}
    yield "kl_estimate", [arrays[0], arrays[1][:1]], {**options, **by, "denominator": 3, "reduction": "sum"}


def _kernels() -> Iterator[Call]:
    """Every kernel of kl_cuda.cu: short, longer, few and many rows, and columns; sums, and summed gradients."""
    both = {"return_grad": ("x", "y")}
    for dtype, pair in product(("float32", "float64"), GPU_PAIRS):
        yield "kl_div", _arrays((8, 17), pair, dtype), {**both, "space": pair}
    for shape in ((5, 1000), (200, 1500), (1, 140_001)):
        yield "kl_div", _arrays(shape, ("logits", "logits"), "float32"), {**both, "space": "logits"}
    apart = [np.ascontiguousarray(a.T) for a in _arrays((9, 2500), ("logits", "logits"), "float32")]
    yield "kl_div", apart, {**both, "space": "logits", "axis": 0}
    x, y = _arrays((2100, 40), ("probs", "probs"), "float32")
    yield "kl_div", [x, y], {**both, "reduction": "rowmean", "weights": np.arange(2100) % 3 / 2}
    yield "kl_div", [x, y[0]], {**both, "reduction": "sum"}


def _compute(device: str, call: Call) -> tuple[Any, ...]:
    """The results of klcore as NumPy arrays."""
    operation, arrays, options = call
    found = FUNCTIONS[operation](*arrays, device=device, **options)
    results = found if isinstance(found, tuple) else (found,)
    return tuple(a.get() if hasattr(a, "get") else np.asarray(a) for a in results)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _answers(device: str) -> Iterator[Line]:
    """The exact answers, and rows that repeat them."""
    worst = dict.fromkeys(BOUNDS, 0.0)
    count = 0
    pairs = GPU_PAIRS if device != "cpu" else tuple(product(SPACES, SPACES))
    for pair, dtype in product(pairs, ("float32", "float64")):
        x, y, value, dx, dy = (np.array(a) for a in zip(*(a[2:] for a in ANSWERS if a[:2] == pair), strict=True))
        softmax = pair == ("logits", "logits")  # a repeated row has smaller probabilities, but the same divergence
        repeats = (1, 40, 500, 45_000) if device == "cpu" else (1, 40)
        for times in repeats if softmax or "logits" not in pair else (1,):
            arrays = [np.tile(a, times).astype(dtype) for a in (x, y)]
            call = "kl_div", arrays, {"space": pair, "return_grad": ("x", "y")}
            found, *gradients = _compute(device, call)
            total = value * (1 if softmax else times)
            errors = {"values": np.max(abs(found - total) / total)}
            exact = [np.tile(d / (times if softmax else 1), times) for d in (dx, dy)]
            off = [np.max(abs(g - e), 1) / np.max(abs(e), 1) for g, e in zip(gradients, exact, strict=True)]
            errors["gradients"] = np.max(off)
            for what, error in errors.items():
                worst[what, dtype] = max(worst[what, dtype], error if error >= 0 else INF)  # NaN is a failure
            count += len(value)
    for what in ("values", "gradients"):
        of = {dtype: (worst[what, dtype], BOUNDS[what, dtype]) for dtype in ("float32", "float64")}
        text = " and ".join(f"{dtype} to {error:.1e} (promised: {bound:.0e})" for dtype, (error, bound) in of.items())
        yield all(error <= bound for error, bound in of.values()), f"{what}: {count} exact answers, {text}"


def _domain(device: str) -> Iterator[Line]:
    wrong = []
    for space in SPACES:
        x, y, expected = zip(*(row[1:] for row in DOMAIN if row[0] == space), strict=True)
        arrays = [np.array(a, np.float32) for a in (x, y)]
        found, *_ = _compute(device, ("kl_div", arrays, {"space": space, "return_grad": ("x", "y")}))
        for a, b, f, e in zip(x, y, found, expected, strict=True):
            if f != e and not (math.isnan(f) and math.isnan(e)):
                wrong.append(f"KL({list(a)} || {list(b)}) of {space} is {f}, not {e}")
    yield not wrong, "zeros, infinities and NaN: " + ("; ".join(wrong) or f"{len(DOMAIN)} rows as documented")


def _signs(device: str) -> Iterator[Line]:
    positive = equal = rows = 0
    for space, dtype in product(SPACES, ("float32", "float64")):
        options = {"space": space, "return_grad": ("x", "y")}
        x, y = _arrays((2000, 30), (space, space), dtype)
        positive += int(np.sum(_compute(device, ("kl_div", [x, y], options))[0] >= 0))
        equal += int(np.sum(_compute(device, ("kl_div", [x, x], options))[0] == 0))
        rows += len(x)
    yield positive == rows, f"KL(p || q) >= 0: in {positive} of {rows} rows"
    yield equal == rows, f"KL(p || p) = 0: in {equal} of {rows} rows"


def _bits(device: str) -> Iterator[Line]:
    """On the CPU with every instruction set, and with several numbers of threads."""
    if device != "cpu":
        yield _digests(device, {"kernels": _kernels, "kl_div listed": partial(_listed, "kl_div")}, "")
        return
    groups: dict[str, Callable[[], Iterator[Call]]] = {"kernels": _kernels}
    bfloat16 = importlib.util.find_spec("ml_dtypes") is not None
    if not bfloat16:
        yield True, "bits of bfloat16: not checked, because ml_dtypes is not installed"
    for operation, dtype in product(OPERATIONS, DTYPES if bfloat16 else DTYPES[:3]):
        # the 16-bit dtypes of these are computed as float32
        if OPERATIONS[operation].form != _cpu.BY_CLASS or dtype in DTYPES[:2]:
            groups[f"{operation} {dtype}"] = partial(_calls, operation, dtype)
    groups |= {f"{operation} counts": partial(_counts, operation) for operation in OPERATIONS}
    groups |= {f"{o.name} listed": partial(_listed, o.name) for o in OPERATIONS.values() if o.takes_indices}
    for dtype in DTYPES[:2]:  # 16-bit dtypes are computed as float32
        groups |= {f"{kind} {dtype}": partial(_estimates, kind, dtype) for kind in ESTIMATORS}
    in_use = _cpu.instruction_set()
    try:
        for name, usable in _cpu.instruction_sets().items():
            if usable:
                _cpu.use_instruction_set(name)
                yield _digests(device, groups, f" with {name} instructions")
    finally:
        _cpu.use_instruction_set(in_use)
    for n in sorted({1, 2, 3, get_num_threads()}):
        with threads(n):
            line = _digests(device, groups, f" with {n} thread{'s' * (n > 1)}")
        yield line


def _digests(device: str, groups: dict[str, Callable[[], Iterator[Call]]], how: str) -> Line:
    """Check that all results have the bits of numerics v2."""
    differ, count = [], 0
    for name, calls in groups.items():
        digest = hashlib.sha256()
        for call in calls():
            for a in _compute(device, call):
                digest.update(a.astype(a.dtype.newbyteorder("<"), copy=False).tobytes())
                count += a.size
        if digest.hexdigest()[:16] != DIGESTS.get(name):
            differ.append(f"{name} ({digest.hexdigest()[:16]})")
    if differ:
        return False, f"bits{how}: these differ from numerics v2: {', '.join(differ)}"
    return True, f"bits{how}: {count:,} numbers, all equal to numerics v2"
