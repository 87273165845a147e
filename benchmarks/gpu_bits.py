"""What gpu_check.py asks of the kernels on a GPU before it measures them: the bits, great arrays, every kernel once.

Each function returns sentences about what is wrong; an empty list is what is wanted. `check_group` is called in a
process of its own for each operation, pair of spaces and dtype: a kernel that kills its process takes nobody along.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from gpu_device import SPACES, Gpu, numpy_dtype

import klcore

OPERATIONS = ("kl_div", "rel_entr", "cross_entropy", "entropy")
# (rows, n): every way of treating rows that cuda.py has. Rows of one class; rows that share a warp; a chunk a row, just
# one class more, and odd numbers of classes, so that no two rows are aligned alike; enough rows that each stays in one
# block; few rows of many chunks, spread over the device; rows that stay in a cluster of blocks.
SHAPES = ((70, 1), (33, 3), (5, 128), (9, 129), (6, 1024), (150, 2500), (3, 5003), (16, 40_001))
CLUSTER = (12, 128_256)
EMULATED_SHAPES = ((33, 3), (6, 1025))
LAYOUT_SHAPE = (17, 300)
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
SHOWN = 12  # sentences a group


# ---- data ------------------------------------------------------------------------------------------------------------


def numbers(rows: int, n: int, space: str, dtype: str, side: int) -> np.ndarray:
    """Rows of seven kinds that take turns: ordinary, close, equal, far apart, with excluded classes, NaN."""
    shared = np.random.default_rng([rows, n])
    z = shared.normal(size=(rows, n))
    masked = shared.random((rows, n)) < 0.3
    masked[:, 0] = False
    rng = np.random.default_rng([rows, n, side])
    kind = np.arange(rows) % 7
    z += rng.normal(size=z.shape) * np.array([1, 1e-3, 0, 1, 1, 1, 1])[kind, None]
    z[kind == 3] *= 200
    z[masked & ((kind == 4) | ((kind == 5) & (side == 1)))[:, None]] = -np.inf
    if space != "logits":
        z = z - z.max(axis=1, keepdims=True)
        z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
    if space == "probs":
        z = np.exp(z)
    if rows > 6:
        z[6, rng.integers(n)] = np.nan
    return z.astype(numpy_dtype(dtype))


def groups() -> list[str]:
    """The names that check_group takes; those that matter most come first."""
    names = []
    for dtype, operation in itertools.product(("float32", "bfloat16", "float64", "float16"), OPERATIONS):
        pairs = [(s, s) for s in SPACES]
        if operation != "entropy":
            pairs += [pair for pair in itertools.product(SPACES, SPACES) if pair[0] != pair[1]]
        names += [f"{operation} {sx} {sy} {dtype}" for sx, sy in pairs]
    return names


EMULATED_GROUPS = ("kl_div probs probs float32", "kl_div logits logits float32")


# ---- comparison ------------------------------------------------------------------------------------------------------


def as_integers(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a).view(f"u{a.dtype.itemsize}")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the sign of zero; of a NaN, sign and payload are nobody's promise."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    wide_a, wide_b = (v.astype(np.float64) for v in (a, b))
    return bool(((as_integers(a) == as_integers(b)) | (np.isnan(wide_a) & np.isnan(wide_b))).all())


def difference(found: np.ndarray, expected: np.ndarray, exact: bool, gradient: bool) -> str:
    """What keeps `found` from being what the CPU says, or ''."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype}{found.shape} instead of {expected.dtype}{expected.shape}"
    if same_bits(found, expected):
        return ""
    f, e = found.astype(np.float64), expected.astype(np.float64)
    unlike = ~((as_integers(found) == as_integers(expected)) | (np.isnan(f) & np.isnan(e)))
    if not exact:
        # 16-bit rows of one space are computed with the GPU's own exponential
        if gradient:
            size = np.where(np.isfinite(e), abs(e), 0)
            bound = EPS[expected.dtype.name] * size + 1e-5 * size.max(axis=-1, keepdims=True, initial=0)
        else:
            bound = 1e-5 * abs(e) + 1e-6
        with np.errstate(invalid="ignore"):
            unlike &= ~((abs(f - e) <= bound) | (f == e))
        if not unlike.any():
            return ""
    at = tuple(int(i) for i in np.argwhere(unlike)[0])
    return f"{int(unlike.sum())} of {found.size} differ, first at {at}: {found[at]!r} instead of {expected[at]!r}"


def is_exact(operation: str, sx: str, sy: str, dtype: str) -> bool:
    """Whether GPU and CPU promise the same bits."""
    wide = sx != sy or (operation in OPERATIONS[2:] and sx == "logits")
    return wide or dtype in ("float64", "float32")


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


class Case:
    """One call, on the CPU and on the GPU; `view` is applied to the arrays on either, for strides of its own."""

    def __init__(
        self,
        gpu: Gpu,
        operation: str,
        arrays: Sequence[np.ndarray],
        exact: bool,
        view: Callable[[Any], Any] = lambda a: a,
        **keywords: Any,
    ) -> None:
        self.gpu, self.exact = gpu, exact
        self._function, self._keywords = getattr(klcore, operation), keywords
        self._hosts = [view(a) for a in arrays]
        self.bases = [gpu.put(a) for a in arrays]
        self.arrays = [view(a) for a in self.bases]
        weights = keywords.get("weights")
        self._gpu_keywords = keywords | ({} if weights is None else {"weights": gpu.put(weights)})

    def cpu(self) -> list[np.ndarray]:
        return [np.asarray(r) for r in as_tuple(self._function(*self._hosts, **self._keywords))]

    def run(self, out: Any = None) -> tuple[Any, ...]:
        if isinstance(out, tuple) and len(out) == 1:
            (out,) = out
        return as_tuple(self._function(*self.arrays, out=out, **self._gpu_keywords))

    def get(self, results: tuple[Any, ...]) -> list[np.ndarray]:
        return [self.gpu.get(r) for r in results]


# ---- one group -------------------------------------------------------------------------------------------------------


def check_group(gpu: Gpu, name: str) -> tuple[int, list[str]]:
    """Every shape and layout for one operation, pair of spaces and dtype; the number of comparisons, and sentences."""
    operation, sx, sy, dtype = name.split()
    checked, wrong = 0, []
    for title, case in cases(gpu, operation, sx, sy, dtype):
        try:
            sentences = list(check(gpu, case))
        except Exception as error:  # of any kind: the cases that follow are worth as much
            sentences = [f"{type(error).__name__}: {error}"]
        checked += 1
        wrong += [f"{name}, {title}: {sentence}" for sentence in sentences]
    return checked, wrong


def cases(gpu: Gpu, operation: str, sx: str, sy: str, dtype: str) -> Iterator[tuple[str, Case]]:
    exact = is_exact(operation, sx, sy, dtype)
    single = operation == "entropy"
    wanted: Any = "x" if single else ("x", "y")
    space: Any = sx if single else (sx, sy)

    def both(rows: int, n: int) -> tuple[np.ndarray, ...]:
        return tuple(numbers(rows, n, s, dtype, side) for side, s in enumerate((sx,) if single else (sx, sy)))

    def case(arrays: Sequence[np.ndarray], **keywords: Any) -> Case:
        return Case(gpu, operation, arrays, exact, **({"space": space} | keywords))

    shapes = list(EMULATED_SHAPES if gpu.emulated else SHAPES)
    if not gpu.emulated and operation == "kl_div":
        shapes.append(CLUSTER)
    for shape in shapes:
        arrays = both(*shape)
        yield f"{shape}", case(arrays)
        for gradient in (wanted,) if single or gpu.emulated else (wanted, "y"):
            yield f"{shape}, gradient {gradient}", case(arrays, return_grad=gradient)
    if gpu.emulated:
        return

    rows, n = LAYOUT_SHAPE
    arrays = both(rows, n)
    both_ways = both(rows + 2, 2 * n + 1)
    layouts: dict[str, Callable[[Any], Any]] = {
        "every second class": lambda a: a[1:-1, 1::2],
        "backwards": lambda a: a[::-1, ::-1],
        "unaligned": lambda a: a[:, 1:],
    }
    for title, view in layouts.items():
        yield title, case(both_ways, view=view, return_grad=wanted)
    turned = [np.ascontiguousarray(a.T) for a in arrays]
    yield "axis 0", case(turned, axis=0, return_grad=wanted)
    yield "classes first in memory", case(turned, view=lambda a: a.T, return_grad=wanted)
    weights = np.arange(rows) % 4 / 4
    for reduction in ("sum", "rowmean", "batchmean", "mean", "none"):
        yield reduction, case(arrays, reduction=reduction, return_grad=wanted)
        yield f"{reduction}, weighted", case(arrays, reduction=reduction, weights=weights, return_grad=wanted)
    yield "many rows, sum", case(both(2500, 3), reduction="sum")
    if "logits" in (sx, sy):
        yield "temperature", case(arrays, temperature=2.5, return_grad=wanted)
    if not single:
        yield "y broadcast", case((arrays[0], arrays[1][:1]), return_grad=wanted)
        long = both(1100, 7)
        yield "x broadcast over many rows", case((long[0][:1], long[1]), return_grad=wanted)


def check(gpu: Gpu, case: Case) -> Iterator[str]:
    """The CPU's bits; then its own, in every way of asking again."""
    expected = case.cpu()
    new = case.run()
    found = case.get(new)
    for k, (f, e) in enumerate(zip(found, expected, strict=True)):
        sentence = difference(f, e, case.exact, gradient=k > 0)
        if sentence:
            yield f"{'gradient' if k else 'value'}: {sentence}"

    def again(how: str, results: tuple[Any, ...]) -> Iterator[str]:
        if not all(map(same_bits, case.get(results), found)):
            yield f"other bits {how}"

    yield from again("in a second run", case.run())

    out = tuple(gpu.cupy.empty_like(a) for a in new)
    gpu.poison(*out)
    case.run(out)
    yield from again("with out=", out)

    # Behind other work on a stream that waits for nobody: arguments arrive late, and whoever looks early finds NaN.
    gpu.poison(*out)
    right = [a.copy() for a in case.bases]
    gpu.poison(*case.bases)
    gpu.synchronize()
    with gpu.stream:
        gpu.keep_busy()
        for a, given in zip(case.bases, right, strict=True):
            a[...] = given
        case.run(out)
    gpu.synchronize()
    yield from again("on another stream, behind other work", out)

    graph = gpu.capture([lambda: case.run(out)])
    for _ in range(2):
        gpu.poison(*out)
        gpu.synchronize()
        graph.launch()
        gpu.synchronize()
        yield from again("when a graph is replayed", out)


# ---- great arrays ----------------------------------------------------------------------------------------------------


def check_large(gpu: Gpu) -> tuple[list[str], list[str]]:
    """More than 2^31 elements: what was computed, and what is wrong. Single rows say what the right bits are."""
    rows, n = (40, 300) if gpu.emulated else (8_200, 262_144)
    done, wrong = [], []
    edge = (1 << 31) // n  # the row that holds element 2^31
    sample = sorted({0, 1, rows // 2, rows - 1, *(r for r in (edge - 1, edge, edge + 1) if 0 <= r < rows)})
    for dtype, space in (("bfloat16", "logits"), ("float16", "probs")):
        if gpu.emulated and dtype == "bfloat16":
            dtype = "float32"  # kernels that other steps compile anyway
        nbytes = rows * n * numpy_dtype(dtype).itemsize
        gpu.free()
        if gpu.memory() < 3.2 * nbytes:
            wrong.append(f"{space} {dtype}: not computed, {gpu.memory() >> 20} MiB are free")
            continue
        x, y = (gpu.fill(rows, n, dtype, space, 7, side) for side in (0, 1))
        for gradient in (None, "y"):
            title = f"({rows}, {n}) {dtype} {space}" + (", gradient y" if gradient else "")
            results = as_tuple(klcore.kl_div(x, y, space=space, return_grad=gradient))
            gpu.synchronize()
            for r in sample:
                found = [gpu.get(a[r : r + 1]) for a in results]
                alone = as_tuple(
                    klcore.kl_div(x[r : r + 1].copy(), y[r : r + 1].copy(), space=space, return_grad=gradient)
                )
                if not all(map(same_bits, found, map(gpu.get, alone))):
                    wrong.append(f"{title}: row {r} has other bits than when it is computed alone")
                hosts = [gpu.get(a[r : r + 1]) for a in (x, y)]
                cpu = as_tuple(klcore.kl_div(*hosts, space=space, return_grad=gradient))
                for k, (f, e) in enumerate(zip(found, map(np.asarray, cpu), strict=True)):
                    sentence = difference(f, e, dtype == "float32", gradient=k > 0)
                    if sentence:
                        wrong.append(f"{title}: row {r}: {sentence}")
            values = gpu.get(results[0])
            if not np.isfinite(values).all():
                wrong.append(f"{title}: {int((~np.isfinite(values)).sum())} values are not finite")
            done.append(title)
            del results
        del x, y
    return done, wrong


# ---- every kernel once -----------------------------------------------------------------------------------------------


def every_kernel(gpu: Gpu) -> list[str]:
    """One small launch or more of every kernel in every role; for compute-sanitizer, so little data."""
    if not gpu.emulated:
        gpu.cupy.cuda.set_allocator(None)  # an allocation an array: else what lies beside one is another, not an error
    wrong = []
    roles: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
        ("narrow", (33, 3), {}),
        ("narrow, odd", (7, 101), {}),
        ("units, odd", (5, 997), {}),
        ("units and folds", (3, 5003), {}),
        ("sums", (1030, 3), {"reduction": "sum"}),
        ("weighted mean", (33, 3), {"reduction": "rowmean", "weights": np.arange(33) % 3 / 3}),
    ]
    if not gpu.emulated:
        roles += [
            ("rows", (140, 2051), {}),
            ("terms", (9, 1025), {"reduction": "none"}),
            ("cluster", CLUSTER, {}),
            ("folds of folds", (1, (1 << 20) + 1029), {}),
        ]
    kinds = (("logits", "logits", "float32"), ("probs", "probs", "float32"))
    if not gpu.emulated:
        kinds += (
            ("logits", "logits", "bfloat16"),
            ("log_probs", "log_probs", "float16"),
            ("probs", "logits", "float32"),
        )
    for sx, sy, dtype in kinds:
        exact = is_exact("kl_div", sx, sy, dtype)

        def compare(title: str, case: Case, kind: str = f"{sx} {sy} {dtype}", exact: bool = exact) -> None:
            for k, (f, e) in enumerate(zip(case.get(case.run()), case.cpu(), strict=True)):
                sentence = difference(f, e, exact, gradient=k > 0)
                if sentence:
                    wrong.append(f"{kind}, {title}: {sentence}")

        def both(rows: int, n: int, spaces: tuple[str, str] = (sx, sy), dtype: str = dtype) -> tuple[np.ndarray, ...]:
            return tuple(numbers(rows, n, s, dtype, side) for side, s in enumerate(spaces))

        for title, shape, keywords in roles:
            gradient = {} if "reduction" in keywords else {"return_grad": ("x", "y")}
            given = {"space": (sx, sy)} | gradient | keywords
            compare(title, Case(gpu, "kl_div", both(*shape), exact, **given))
        if gpu.emulated:
            continue
        x, y = both(17, 300)
        gradients = {"space": (sx, sy), "return_grad": ("x", "y")}
        compare("summed", Case(gpu, "kl_div", (x, y[:1]), exact, **gradients))
        turned = [np.ascontiguousarray(a.T) for a in (x, y)]
        compare("columns", Case(gpu, "kl_div", turned, exact, axis=0, **gradients))
        for title, view in (("unaligned rows", lambda a: a[:, 1:]), ("every third class", lambda a: a[:, ::3])):
            compare(title, Case(gpu, "kl_div", (x, y), exact, view=view, **gradients))
    gpu.synchronize()
    return wrong


# ---- for a profiler --------------------------------------------------------------------------------------------------

PROFILED = (
    # title, rows, n, dtype, space, gradient: one launch of every kernel whose speed counts
    ("narrow", 1 << 21, 64, "float32", "probs", None),
    ("units", 1 << 18, 1024, "float32", "probs", "y"),
    ("units", 1 << 18, 1024, "bfloat16", "logits", "y"),
    ("rows", 8192, 32_768, "float32", "probs", "y"),
    ("rows", 8192, 32_768, "float32", "logits", None),
    ("rows", 8192, 32_768, "bfloat16", "logits", None),
    ("cluster", 8192, 32_768, "float32", "logits", "y"),
    ("cluster", 4096, 128_256, "float32", "logits", "y"),
    ("cluster", 4096, 128_256, "bfloat16", "logits", "y"),
    ("spread", 1, 1 << 27, "float32", "logits", "y"),
)


def profile(gpu: Gpu) -> None:
    """One call of each, for ncu to look into."""
    for title, rows, n, dtype, space, gradient in PROFILED:
        gpu.free()
        x, y = (gpu.fill(rows, n, dtype, space, 3, side) for side in (0, 1))
        klcore.kl_div(x, y, space=space, return_grad=gradient)
        gpu.synchronize()
        print(f"{title}: ({rows}, {n}) {dtype} {space}" + (f", gradient {gradient}" if gradient else ""), flush=True)
