"""What gpu_run.py checks of the kernels on a GPU apart from their time: first light, the bits, every role for
compute-sanitizer, large arrays, launches for a profiler.

Problems are reported as sentences; there should be none. gpu_carry.py makes the same calls without a GPU, to find out
which kernels they need.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from gpu_device import Gpu, launched, numpy_dtype
from gpu_lines import sentence

import klcore
from klcore import _cpu
from klcore.operations import OPERATIONS

# (rows, n): every way in which launches.py processes rows. Rows of one class; rows that share a warp; one chunk per
# row, or just one class more, and odd numbers of classes, so that rows differ in alignment; enough rows for each to
# stay in one block; few rows of many chunks, spread over the device. And (held_rows, HELD) where logits are swept more
# than once.
SHAPES = ((70, 1), (33, 3), (5, 128), (9, 129), (6, 1024), (150, 2500), (3, 5003), (16, 40_001), (1, (1 << 20) + 1029))
EMULATED_SHAPES = ((33, 3), (6, 1025), (33, 1025))
HELD = 1030  # classes: a block holds such rows if there are enough of them
LAYOUT_SHAPE = (17, 300)
# Both results are rounded, each by half a unit: the bound is a unit, relative, and absolute for subnormal numbers.
UNITS = {"float16": (2.0**-10, 2.0**-24), "bfloat16": (2.0**-7, 2.0**-133)}


def held_rows(gpu: Gpu) -> int:
    """Enough rows for each to be held by a block for all sweeps, instead of being read again."""
    return 8 * int(gpu.cupy.cuda.Device().attributes["MultiProcessorCount"]) + 1


# ---- data ------------------------------------------------------------------------------------------------------------


def numbers(rows: int, n: int, space: str, dtype: str, side: int) -> np.ndarray:
    """Rows of seven kinds in turn: ordinary, close, equal, far apart, with excluded classes, NaN."""
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
    if space in ("probs", "counts"):
        z = np.exp(z) * (50 if space == "counts" else 1)
    if rows > 6:
        z[6, rng.integers(n)] = np.nan
    return z.astype(numpy_dtype(dtype))


def groups() -> list[str]:
    """The names that check_group accepts, the most important first."""
    names = []
    for dtype, operation in itertools.product(("float32", "bfloat16", "float64", "float16"), OPERATIONS):
        pairs = sorted(OPERATIONS[operation].pairs, key=lambda pair: (pair[0] != pair[1], "counts" in pair))
        if OPERATIONS[operation].form == _cpu.BY_CLASS:  # alike, and many: in double only for pairs of one space
            pairs = pairs[:4] if dtype == "float32" else []
        names += [f"{operation} {sx} {sy} {dtype}" for sx, sy in pairs]
    return names


EMULATED_GROUPS = ("kl_div probs probs float32", "kl_div logits logits float32")


# ---- comparison ------------------------------------------------------------------------------------------------------


def as_integers(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a).view(f"u{a.dtype.itemsize}")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal including the sign of zero; the sign and payload of a NaN are not promised."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    wide_a, wide_b = (v.astype(np.float64) for v in (a, b))
    return bool(((as_integers(a) == as_integers(b)) | (np.isnan(wide_a) & np.isnan(wide_b))).all())


def difference(found: np.ndarray, expected: np.ndarray, exact: bool, gradient: bool) -> str:
    """How `found` differs from the CPU's result, or ''."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype}{found.shape} instead of {expected.dtype}{expected.shape}"
    if same_bits(found, expected):
        return ""
    f, e = found.astype(np.float64), expected.astype(np.float64)
    unlike = ~((as_integers(found) == as_integers(expected)) | (np.isnan(f) & np.isnan(e)))
    if not exact:
        # 16-bit rows of one space use the GPU's own exponential
        if gradient:
            size = np.where(np.isfinite(e), abs(e), 0)
            unit, least = UNITS[expected.dtype.name]
            bound = np.maximum(unit * size, least) + 1e-5 * size.max(axis=-1, keepdims=True, initial=0)
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
    beside = (
        sx != sy and "logits" in (sx, sy) and OPERATIONS[operation].form == _cpu.BY_RATIO
    )  # computed in the same way for every dtype
    return beside or dtype in ("float64", "float32")


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


class Case:
    """One call, on the CPU and on the GPU; `view` is applied to the arrays on both, to change their strides."""

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
        keywords = {**OPERATIONS[operation].needed, **keywords}
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

    def compare(self, found: list[np.ndarray]) -> Iterator[str]:
        """Compare the results with the CPU's."""
        for k, (f, e) in enumerate(zip(found, self.cpu(), strict=True)):
            words = difference(f, e, self.exact, gradient=k > 0)
            if words:
                yield f"{'gradient' if k else 'value'}: {words}"


# ---- one group -------------------------------------------------------------------------------------------------------


def check_group(gpu: Gpu, name: str) -> dict[str, Any]:
    """Every shape and layout for one operation, pair of spaces and dtype."""
    checked, wrong = 0, []
    with launched() as found:
        for title, make in cases(gpu, name).items():
            checked += 1
            try:
                wrong += [f"{title}: {words}" for words in check(gpu, make())]
            except Exception as error:  # of any kind: the following cases are worth as much
                wrong.append(f"{title}: {sentence(error)}")
                gpu.synchronize()  # raises if this process has lost the GPU
    return {"checked": checked, "wrong": wrong, "launched": dict(sorted(found.items()))}


def cases(gpu: Gpu, name: str) -> dict[str, Callable[[], Case]]:
    """title -> function that creates the case."""
    operation, sx, sy, dtype = name.split()
    exact, single = is_exact(operation, sx, sy, dtype), OPERATIONS[operation].single
    every: Any = "x" if single else ("x", "y")
    space: Any = sx if single else (sx, sy)
    rows, n = LAYOUT_SHAPE
    weights = np.arange(rows) % 4 / 4
    found: dict[str, Callable[[], Case]] = {}

    def add(title: str, shape: Any = LAYOUT_SHAPE, change: Any = lambda *arrays: arrays, **keywords: Any) -> None:
        """Add a call on arrays of that shape; `change` is applied to them on the host."""

        def make() -> Case:
            spaces = (sx,) if single else (sx, sy)
            arrays = (numbers(*shape, s, dtype, side) for side, s in enumerate(spaces))
            return Case(gpu, operation, change(*arrays), exact, **({"space": space} | keywords))

        found[title] = make

    for shape in EMULATED_SHAPES if gpu.emulated else SHAPES:
        add(f"{shape}", shape)
        for wanted in (every,) if single or gpu.emulated else (every, "y"):
            add(f"{shape}, gradient {wanted}", shape, return_grad=wanted)
    if not gpu.emulated:
        wider = (rows + 2, 2 * n + 1)
        add("every second class", wider, view=lambda a: a[1:-1, 1::2], return_grad=every)
        add("backwards", wider, view=lambda a: a[::-1, ::-1], return_grad=every)
        add("unaligned", wider, view=lambda a: a[:, 1:], return_grad=every)
        add("axis 0", change=turned, axis=0, return_grad=every)
        add("classes first in memory", change=turned, view=lambda a: a.T, return_grad=every)
        for reduction in ("sum", "rowmean", "batchmean", "mean", "none")[: 5 if OPERATIONS[operation].has_terms else 4]:
            add(reduction, reduction=reduction, return_grad=every)
            add(f"{reduction}, weighted", reduction=reduction, weights=weights, return_grad=every)
        add("many rows, sum", (2500, 3), reduction="sum")
        if "logits" in (sx, sy):
            add("temperature", temperature=2.5, return_grad=every)
            held = held_rows(gpu), HELD
            for wanted in dict.fromkeys((every, every[-1])):
                add(f"{held}, gradient {wanted}", held, return_grad=wanted)
        if not single:
            add("y broadcast", change=lambda x, y: (x, y[:1]), return_grad=every)
            add("x broadcast over many rows", (1100, 7), lambda x, y: (x[:1], y), return_grad=every)
    return found


def turned(*arrays: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(a.T) for a in arrays]


# ---- every kernel once, for compute-sanitizer ------------------------------------------------------------------------

SANITIZED = ("logits logits float32", "probs probs float32", "logits logits bfloat16", "log_probs log_probs float16",
             "probs logits float32")  # fmt: skip


def roles(gpu: Gpu) -> dict[str, Callable[[], Case]]:
    """At least one call of every kernel in every role, the kinds of rows in turn."""
    found = []
    for kind in SANITIZED[: 2 if gpu.emulated else None]:
        for k, (title, make) in enumerate(cases(gpu, f"kl_div {kind}").items()):
            if title.endswith("'y')") if "(" in title else "mean" not in title:  # one call per shape is enough
                found.append((k, f"{kind}, {title}", make))
    return {title: make for _, title, make in sorted(found, key=lambda role: role[0])}


def check_role(make: Callable[[], Case]) -> dict[str, Any]:
    case = make()
    with launched() as started:
        results = case.get(case.run())
    return {"wrong": list(case.compare(results)), "launched": dict(sorted(started.items()))}


# ---- one case --------------------------------------------------------------------------------------------------------


def check(gpu: Gpu, case: Case) -> Iterator[str]:
    """Compare with the CPU's bits, then with its own bits in every other way of making the call."""
    new = case.run()
    found = case.get(new)
    yield from case.compare(found)

    def again(how: str, results: tuple[Any, ...]) -> Iterator[str]:
        if not all(map(same_bits, case.get(results), found)):
            yield f"other bits {how}"

    yield from again("in a second run", case.run())

    out = tuple(gpu.cupy.empty_like(a) for a in new)
    gpu.poison(*out)
    case.run(out)
    yield from again("with out=", out)

    # After other work on a non-blocking stream: arguments arrive late, and reading them early finds NaN.
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


# ---- large arrays ----------------------------------------------------------------------------------------------------

LARGE = ("bfloat16 logits", "float16 probs")


def check_large(gpu: Gpu, name: str) -> dict[str, Any]:
    """More than 2^31 elements. Single rows provide the expected bits."""
    dtype, space = name.split()
    if gpu.emulated and dtype == "bfloat16":
        dtype = "float32"  # kernels that other stages compile in any case
    rows, n = (40, 300) if gpu.emulated else (8_200, 262_144)
    wrong: list[str] = []
    edge = (1 << 31) // n  # the row that holds element 2^31
    sample = sorted({0, 1, rows // 2, rows - 1, *(r for r in (edge - 1, edge, edge + 1) if 0 <= r < rows)})
    gpu.free()
    if gpu.memory() < 3.2 * rows * n * numpy_dtype(dtype).itemsize:
        return {"failed": f"not computed, {gpu.memory() >> 20} MiB are free"}
    x, y = (gpu.fill(rows, n, dtype, space, 7, side) for side in (0, 1))
    for gradient in (None, "y"):
        title = f"({rows}, {n})" + (", gradient y" if gradient else "")
        results = as_tuple(klcore.kl_div(x, y, space=space, return_grad=gradient))
        gpu.synchronize()
        for r in sample:
            found = [gpu.get(a[r : r + 1]) for a in results]
            alone = as_tuple(klcore.kl_div(x[r : r + 1].copy(), y[r : r + 1].copy(), space=space, return_grad=gradient))
            if not all(map(same_bits, found, map(gpu.get, alone))):
                wrong.append(f"{title}: row {r} has other bits than when it is computed alone")
            hosts = [gpu.get(a[r : r + 1]) for a in (x, y)]
            cpu = as_tuple(klcore.kl_div(*hosts, space=space, return_grad=gradient))
            for k, (f, e) in enumerate(zip(found, map(np.asarray, cpu), strict=True)):
                words = difference(f, e, dtype == "float32", gradient=k > 0)
                if words:
                    wrong.append(f"{title}: row {r}: {words}")
        values = gpu.get(results[0])
        if not np.isfinite(values).all():
            wrong.append(f"{title}: {int((~np.isfinite(values)).sum())} values are not finite")
        del results
    return {"checked": 2 * len(sample), "wrong": wrong}


# ---- first light -----------------------------------------------------------------------------------------------------
# Every family of kernels in every role, compared with NumPy in float64, so that klcore's extension is not needed yet.


def light_cases(gpu: Gpu) -> dict[str, tuple[Any, ...]]:
    """title -> shape, dtype, space, and the other arguments of the call."""
    many = held_rows(gpu)
    found = {
        "narrow": ((33, 3), "float32", "probs", {}),
        "narrow, odd": ((70, 101), "bfloat16", "logits", {}),
        "units": ((9, 997), "float32", "logits", {}),
        "units, odd": ((9, 997), "bfloat16", "log_probs", {}),
        "folds": ((3, 5003), "float32", "logits", {}),
        "rows": ((many, 2051), "float32", "probs", {}),
        "rows of 16 bits": ((many, 2048), "float16", "probs", {}),
        "sum": ((1030, 3), "float32", "probs", {"reduction": "sum"}),
        "summed": ((17, 300), "float32", "logits", {"broadcast": True}),
    }
    found["float32, held"] = ((many, 3000), "float32", "logits", {})  # never with 16 bits
    for dtype in ("float32", "bfloat16"):
        found[f"{dtype}, read again"] = ((40, 50_257), dtype, "logits", {})
    if gpu.emulated:  # kernels that other stages compile in any case
        return {title: found[title] for title in ("narrow", "folds", "sum", "float32, held")}
    return found


def light_call(gpu: Gpu, arrays: Sequence[Any], space: str, **keywords: Any) -> tuple[Any, ...]:
    return as_tuple(klcore.kl_div(*arrays, space=space, return_grad="y", **keywords))


def first_light(gpu: Gpu, title: str) -> dict[str, Any]:
    shape, dtype, space, given = light_cases(gpu)[title]
    keywords = dict(given)
    hosts = light_data(*shape, dtype, space)
    if keywords.pop("broadcast", False):
        hosts[1] = hosts[1][:1]
    arrays = [gpu.put(a) for a in hosts]
    with launched() as started:
        results = light_call(gpu, arrays, space, **keywords)
    value, dy = (gpu.get(r) for r in results)
    again = [gpu.get(r) for r in light_call(gpu, arrays, space, **keywords)]
    right, right_dy = light_reference(*hosts, space)
    if "reduction" in keywords:
        right = right.sum()
    errors = {
        "value": float((abs(value - right) / (abs(right) + 1e-6)).max()),
        "dy": float((abs(dy.astype(np.float64) - right_dy).max(-1) / abs(right_dy).max(-1)).max()),
    }
    wrong = []
    if not (errors["value"] < 1e-4 and errors["dy"] < (2e-2 if dtype == "bfloat16" else 2e-3)):
        wrong.append(f"errors {errors}")
    if not (same_bits(value, again[0]) and same_bits(dy, again[1])):
        wrong.append("other bits in a second run")
    return {"shape": shape, "errors": errors, "wrong": wrong, "launched": dict(sorted(started.items()))}


def light_data(rows: int, n: int, dtype: str, space: str) -> list[np.ndarray]:
    """Ordinary rows. float16 has no numbers below 2^-24, and a zero would be another case."""
    shared, found = 2 * np.random.default_rng([rows, n]).normal(size=(rows, n)), []
    for side in (0, 1):
        z = shared + np.random.default_rng([rows, n, side]).normal(size=(rows, n))
        if space != "logits":
            z -= np.log(np.exp(z).sum(-1, keepdims=True))
        found.append((np.maximum(np.exp(z), 2.0**-24) if space == "probs" else z).astype(numpy_dtype(dtype)))
    return found


def distribution(a: Any, space: str) -> tuple[Any, Any]:
    """p and log p by the formulas, for a float64 array of NumPy or CuPy."""
    if space == "probs":
        return a, np.log(a)
    if space == "logits":
        a = a - a.max(-1, keepdims=True)
        a -= np.log(np.exp(a).sum(-1, keepdims=True))
    return np.exp(a), a


def light_reference(x: np.ndarray, y: np.ndarray, space: str) -> tuple[np.ndarray, np.ndarray]:
    (p, log_p), (q, log_q) = (distribution(v.astype(np.float64), space) for v in (x, y))
    dy = 1 - p / q if space == "probs" else q - p
    return (p * (log_p - log_q) - p + q).sum(-1), dy if y.shape == x.shape else dy.sum(0, keepdims=True)


# ---- for a profiler --------------------------------------------------------------------------------------------------


def profiled(gpu: Gpu) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A launch of each kernel whose speed matters, the most informative first."""
    chosen: list[tuple[int, int, str, str, Any]] = [
        (8_192, 32_768, "float32", "logits", "y"),
        (8_192, 32_768, "float32", "logits", None),
        (8_192, 32_768, "bfloat16", "logits", "y"),
        (8_192, 32_768, "bfloat16", "logits", None),
        (8_192, 32_768, "float32", "probs", "y"),
        (8_192, 32_768, "float32", "probs", None),
        (8_192, 32_768, "bfloat16", "probs", None),
        (4_096, 128_256, "float32", "logits", "y"),
        (4_096, 151_936, "float32", "logits", "y"),
        (4_096, 50_257, "float32", "logits", "y"),
        (1_000_000, 100, "float32", "logits", "y"),
        (1_000_000, 100, "float32", "probs", None),
        (1_000_000, 10, "float32", "logits", "y"),
        (8_192, 32_768, "bfloat16", "log_probs", None),
        (4_096, 50_257, "bfloat16", "probs", None),
    ]
    if gpu.emulated:  # kernels that other stages compile in any case
        chosen = [(20, 3, "float32", "probs", None), (20, 3, "float32", "logits", "y")]
    for rows, n, dtype, space, gradient in chosen:

        def call(rows: int = rows, n: int = n, dtype: str = dtype, space: str = space, gradient: Any = gradient) -> Any:
            gpu.free()
            x, y = (gpu.fill(rows, n, dtype, space, 3, side) for side in (0, 1))
            result = klcore.kl_div(x, y, space=space, return_grad=gradient)
            gpu.synchronize()
            return result

        yield f"({rows}, {n}) {dtype} {space} value" + (f"+d{gradient}" if gradient else ""), call
