"""CuPy arrays on NVIDIA GPUs: arguments arranged by rows.py, kernels of src/kl_cuda.cu planned and launched here.

A call becomes a few launches on the caller's current stream, all prepared, their working memory included, before the
first one starts: nothing waits for the GPU, and what fails, fails before anything is written. Which launches, and how
numbers are grouped in them, depends on the shapes alone; how many blocks run them does not change a bit.
"""

import importlib
import math
from collections.abc import Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from klcore.backends import BackendUnavailableError, nvrtc, rows

_SIZES = (8, 4, 2, 2)
CHUNK, NARROW = 1024, 128  # kl_tree.h; rows of up to NARROW classes share a warp
MAX_STATS, LOGITS_STATES, NORM_STATES, SUM_STATES = 12, 9, 3, 3
MAX_DIMS = 32
_RESERVED = 1024  # bytes of shared memory that CUDA takes for itself in every block

# kl::Plan, in words of eight bytes
_FIELDS = (
    ("shape", MAX_DIMS), *((name, 1) for name in (
        "ndim", "rows", "n", "chunks", "output", "first", "last", "columns", "dense", "slots", "count", "groups",
        "inner", "any_weights", "inverse_temperature", "gradient_scale", "scale", "epsilon", "denominator", "cotangent",
        "states", "stats", "sums",
    )),
    *((name, MAX_DIMS + 3) for name in ("x", "y", "weights", "factors", "value", "dx", "dy")),
)  # fmt: skip
_AT = {name: sum(words for _, words in _FIELDS[:k]) for k, (name, _) in enumerate(_FIELDS)}
_WORDS = sum(words for _, words in _FIELDS)
_OUTPUTS, _TERMS = {"x": 1, "y": 2}, 4  # KL_OUTPUTS
_READ = ("x", "y", "weights", "factors")
_DOUBLES = ("inverse_temperature", "gradient_scale", "scale", "epsilon")


@cache
def _code(dtype: Any) -> int | None:
    """The code of a dtype in kl_store.h, or None. A dtype's name takes NumPy a microsecond: hence the cache."""
    return rows.FLOATS.index(dtype.name) if dtype.name in rows.FLOATS else None


# ---- the library and the device --------------------------------------------------------------------------------------


@cache
def _cupy() -> Any:
    """CuPy, or why there is none."""
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise BackendUnavailableError(
            f"CUDA needs CuPy, which cannot be imported ({error}); install it with: pip install 'klcore[cuda13]' "
            "(or 'klcore[cuda12]' where the driver is older than 580)"
        ) from error


def missing() -> str | None:
    """What keeps this machine from computing on a GPU, as a sentence; None if nothing does."""
    try:
        cupy = _cupy()
        nvrtc.version()
    except BackendUnavailableError as error:
        return str(error)
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CUDARuntimeError, of whatever kind
        return (
            f"CUDA finds no usable NVIDIA driver ({error}); install or update the driver and check with: nvidia-smi. "
            "Inside a container, start it with GPU access (docker run --gpus all)"
        )
    if count == 0:
        return "CUDA finds no NVIDIA device; check with: nvidia-smi, and look at the variable CUDA_VISIBLE_DEVICES"
    return None


@cache
def _ready() -> Any:
    sentence = missing()
    if sentence:
        raise BackendUnavailableError(sentence)
    return _cupy()


class _Device(NamedTuple):
    """What the choice of launches needs to know."""

    arch: int
    multiprocessors: int
    shared: int  # bytes of shared memory that a block may have
    shared_all: int  # and that a multiprocessor has


@cache
def _properties(device: int) -> _Device:
    d = _cupy().cuda.Device(device)
    a = d.attributes
    return _Device(
        int(d.compute_capability),
        a["MultiProcessorCount"],
        a["MaxSharedMemoryPerBlockOptin"],
        a["MaxSharedMemoryPerMultiprocessor"],
    )


def _is_here(a: Any, cupy: Any) -> bool:
    return isinstance(a, cupy.ndarray)


def _choose_device(cupy: Any, device: str | None, arrays: dict[str, Any]) -> int:
    """The number of the device to compute on."""
    number = None if device is None else device.partition(":")[2]
    if number:
        count = cupy.cuda.runtime.getDeviceCount()
        if int(number) >= count:
            raise BackendUnavailableError(
                f"device={device!r}: this machine has {count} CUDA device(s), 'cuda:0' to 'cuda:{count - 1}'"
            )
        return int(number)
    found = {name: a.device.id for name, a in arrays.items() if _is_here(a, cupy)}
    if len(set(found.values())) > 1:
        where = ", ".join(f"{name} on cuda:{k}" for name, k in found.items())
        raise ValueError(f"the arrays are on different devices ({where}); move them, or pass device='cuda:N'")
    return next(iter(found.values()), None) if found else cupy.cuda.Device().id  # type: ignore[return-value]


def _asarray(cupy: Any, device: int, a: Any, name: str) -> Any:
    """`a` on the current device, of one of the four dtypes."""
    if isinstance(a, np.ma.MaskedArray):
        rows.refuse(a, name)
    if not _is_here(a, cupy):
        a = np.asarray(a)
        if not a.dtype.isnative:
            a = a.astype(a.dtype.newbyteorder("="))
    if _code(a.dtype) is None:
        rows.refuse(a, name)
    if not _is_here(a, cupy):
        a = cupy.asarray(a)
    elif a.device.id != device:
        a = cupy.array(a)  # copies to the current device
    return a.astype(np.float64) if a.dtype.kind in "iub" else a


# ---- kernels ---------------------------------------------------------------------------------------------------------


class Build(NamedTuple):
    """A cubin: its name, the macros it is compiled with, the kernels in it."""

    name: str
    options: tuple[str, ...]
    kernels: tuple[str, ...]
    hot: tuple[str, ...]  # those that should wait for memory, not for arithmetic
    oldest: int = 0  # architecture that it can be compiled for


_ENTRIES = {
    "kl_units": "KL_UNITS", "kl_narrow": "KL_NARROW", "kl_rows": "KL_ROWS", "kl_fold": "KL_FOLD", "kl_sum": "KL_SUM",
    "kl_summed": "KL_SUMMED", "kl_summed_fold": "KL_SUMMED",
}  # fmt: skip


def options(
    operation: int, spaces: tuple[int, int], dtypes: tuple[int, int], wide: bool, outputs: int,
    entries: tuple[str, ...], cluster: int = 1, unit: bool = True, factors: bool = False,
) -> tuple[str, ...]:  # fmt: skip
    """The macros that kl_cuda.cu is compiled with for these kernels; `unit` if the temperature is 1."""
    values = {
        "OPERATION": operation, "SPACE_X": spaces[0], "SPACE_Y": spaces[1], "X": dtypes[0], "Y": dtypes[1],
        "WIDE": int(wide), "OUTPUTS": outputs,
    }  # fmt: skip
    if cluster > 1:
        values["CLUSTER"] = cluster
    if not unit:
        values["TEMPERATURE"] = 1
    if factors:
        values["FACTORS"] = 1
    if not wide and max(_SIZES[d] for d in dtypes) == 2:
        values["FAST16"] = 1
    return (
        *(f"-DKL_{name}={value}" for name, value in values.items()),
        *sorted({f"-D{_ENTRIES[entry]}" for entry in entries}),
    )


def every_build() -> Iterator[Build]:
    """What calls compile, over all operations, pairs of spaces and dtypes, for checks of what the compiler makes of it.

    Of the outputs, those that are the most and the least; for the hot ones, the commonest gradient as well.
    """
    names = ("kl_div", "rel_entr", "cross_entropy", "entropy")
    words = tuple(rows.SPACES)
    sweeping, folding = ("kl_units", "kl_narrow", "kl_rows"), ("kl_summed", "kl_summed_fold", "kl_fold")
    for operation, name in enumerate(names):
        single = operation == rows.ENTROPY
        for sx, sy in ((sx, sy) for sx in range(3) for sy in range(3) if not single or sx == sy):
            for code, dtype in enumerate(rows.FLOATS):
                wide = code == 0 or rows.is_wide(operation, (sx, sy))
                hot = () if wide else sweeping
                build = partial(options, operation, (sx, sy), (code, code), wide)
                label = f"{name} {words[sx]}" + (f"/{words[sy]}" if sy != sx else "") + f" {dtype}"
                yield Build(f"{label} value", build(0, sweeping), sweeping, hot)
                everything = "terms dx" if single else "terms dx dy"
                yield Build(f"{label} {everything}", build(5 if single else 7, sweeping), sweeping, hot)
                if not wide:
                    gradient = "dx" if single else "dy"
                    yield Build(f"{label} {gradient}", build(_OUTPUTS[gradient[1]], sweeping), sweeping, hot)
                if code < 2 or not wide:
                    yield Build(f"{label} summed", build(1, folding), folding, ())
                if sx == sy == 2 and operation == rows.KL_DIV:
                    yield Build(f"{label} dy cluster", build(2, ("kl_rows",), 8), ("kl_rows",), hot[2:], 90)
    for term, (operation, pairs) in rows.LOSSES.items():
        for sx, sy in pairs:
            for code, dtype in enumerate(rows.FLOATS):
                wide = code == 0 or rows.is_wide(operation, (sx, sy))
                hot = () if wide else sweeping
                build = partial(options, operation, (sx, sy), (code, code), wide)
                label = f"{term} {words[sx]}/{words[sy]} {dtype}"
                yield Build(f"{label} value", build(0, sweeping), sweeping, hot)
                yield Build(f"{label} dy", build(2, sweeping), sweeping, hot)
                yield Build(f"{label} terms dx dy, factors", build(7, sweeping, factors=True), sweeping, ())
    yield Build("sum", _sum_options(), ("kl_sum",), ())


def _sum_options() -> tuple[str, ...]:
    return options(rows.KL_DIV, (0, 0), (1, 1), False, 0, ("kl_sum",))


@cache
def _kernel(device: int, options: tuple[str, ...], name: str) -> Any:
    """A kernel, compiled if need be and loaded on the current device."""
    module = _cupy().RawModule(path=str(nvrtc.build(options, _properties(device).arch)))
    return module.get_function(name)


class _Launch(NamedTuple):
    kernel: Any
    grid: int
    warps: int
    shared: int
    plan: np.ndarray


def _start(launches: list[_Launch]) -> None:
    for launch in launches:
        launch.kernel(
            (launch.grid,), (32 * launch.warps,), (launch.plan.view(f"V{8 * _WORDS}"),), shared_mem=launch.shared
        )


# ---- plans -----------------------------------------------------------------------------------------------------------


class _View(NamedTuple):
    """An array as kl::Array describes it."""

    data: int
    stride: int
    batch: tuple[int, ...]
    dtype: int
    size: int


def _view(a: Any, classes: bool) -> _View:
    strides = a.strides
    code = _code(a.dtype)
    assert code is not None  # _asarray and rows.py have seen to it
    if classes:
        return _View(a.data.ptr, strides[-1], strides[:-1], code, _SIZES[code])
    return _View(a.data.ptr, 0, strides, code, _SIZES[code])


class _Layout(NamedTuple):
    """The batch axes, joined where all arrays move over them in even steps, and the arrays over them."""

    shape: tuple[int, ...]
    views: dict[str, _View]
    columns: bool
    dense: bool


def _layout(shape: tuple[int, ...], n: int, views: dict[str, _View], keep_order: bool = False) -> _Layout:
    order = list(range(len(shape)))
    columns = False
    x = views.get("x")
    if x and not keep_order and n > 1 and abs(x.stride) > x.size:
        # the classes lie apart: have the rows that are closest to each other follow each other
        apart = {d: abs(x.batch[d]) for d in order if shape[d] > 1 and x.batch[d]}
        nearest = min(apart, key=apart.__getitem__, default=None)
        if nearest is not None and apart[nearest] < abs(x.stride):
            columns = True
            order.append(order.pop(nearest))
    order = [d for d in order if shape[d] != 1]
    groups: list[list[int]] = []
    for d in order:
        even = groups and all(v.batch[groups[-1][-1]] == v.batch[d] * shape[d] for v in views.values())
        if even:
            groups[-1].append(d)
        else:
            groups.append([d])
    joined = tuple(math.prod(shape[d] for d in g) for g in groups)
    views = {name: v._replace(batch=tuple(v.batch[g[-1]] for g in groups)) for name, v in views.items()}
    dense = len(joined) <= 1 and all(
        v.stride == v.size and (not joined or v.batch[0] == n * v.size)
        for name, v in views.items()
        if name in ("x", "y", "dx", "dy")
    )
    return _Layout(joined, views, columns, dense)


def _plan(layout: _Layout, n: int, **fields: Any) -> np.ndarray:
    plan = np.zeros(_WORDS, np.int64)
    plan[: len(layout.shape)] = layout.shape
    plan[_AT["ndim"]] = len(layout.shape)
    plan[_AT["rows"]] = math.prod(layout.shape)
    plan[_AT["n"]] = n
    plan[_AT["chunks"]] = -(-n // CHUNK)
    for name, v in layout.views.items():
        at = _AT[name]
        plan[at : at + 2] = v.data, v.stride
        plan[at + 2 : at + 2 + len(v.batch)] = v.batch
        plan[at + 2 + MAX_DIMS] = v.dtype
    return _with(plan, **fields)


def _with(plan: np.ndarray, **fields: Any) -> np.ndarray:
    """A copy of a plan with some fields changed; an array stands for where it lies."""
    plan = plan.copy()
    doubles = plan.view(np.float64)
    for name, value in fields.items():
        if name in _DOUBLES:
            doubles[_AT[name]] = value
        else:
            plan[_AT[name]] = value if isinstance(value, (int, bool)) else 0 if value is None else value.data.ptr
    return plan


class _Call(NamedTuple):
    """What all launches of one call share."""

    cupy: Any
    device: int
    operation: int
    spaces: tuple[int, int]
    dtypes: tuple[int, int]
    wide: bool
    outputs: int
    unit: bool
    factors: bool
    n: int

    def kernel(self, name: str, cluster: int = 1) -> Any:
        outputs = 0 if name == "kl_fold" else self.outputs  # what is folded does not depend on it
        macros = options(
            self.operation, self.spaces, self.dtypes, self.wide, outputs, (name,), cluster, self.unit, self.factors
        )
        return _kernel(self.device, macros, name)

    def states(self, sweep: int) -> int:
        """Doubles that a chunk leaves behind."""
        if self.of_logits:
            return LOGITS_STATES if sweep == 0 else 0
        if 2 in self.spaces:
            return (2 * NORM_STATES, SUM_STATES, 0)[sweep]
        return 1

    @property
    def sweeps(self) -> int:
        """Over the rows, for these outputs."""
        if self.of_logits:
            return 2 if self.outputs else 1
        if 2 in self.spaces:
            return 3 if self.outputs & ~_TERMS else 2
        return 1

    @property
    def of_logits(self) -> bool:
        return self.spaces == (2, 2) and self.operation <= rows.REL_ENTR and not self.factors

    def bytes_a_class(self) -> int:
        return _SIZES[self.dtypes[0]] + (0 if self.operation == rows.ENTROPY else _SIZES[self.dtypes[1]])

    def number(self) -> int:
        return 8 if self.wide else 4


def _warps(properties: _Device, bytes_a_warp: int, fixed: int = 0) -> int:
    """Warps in a block: if possible so that three blocks share a multiprocessor, and one computes while others load."""
    for blocks in (3, 2, 1):
        for warps in (8, 4, 2, 1):
            bytes_a_block = warps * bytes_a_warp + fixed
            if blocks * (bytes_a_block + _RESERVED) <= properties.shared_all and bytes_a_block <= properties.shared:
                return warps
    return 1


def _launch(call: _Call, name: str, plan: np.ndarray, items: int, warps: int, shared: int, cluster: int = 1) -> _Launch:
    """One launch; `items` blocks' (clusters') worth of work."""
    kernel = call.kernel(name, cluster)
    if shared > 48 * 1024 and kernel.max_dynamic_shared_size_bytes < shared:
        kernel.max_dynamic_shared_size_bytes = shared
    if cluster > 8:  # more blocks than every device must support: a function attribute says that it is meant
        driver = importlib.import_module("cupy_backends.cuda.api.driver")
        driver.funcSetAttribute(kernel.kernel.ptr, 14, 1)
    most = 32 * _properties(call.device).multiprocessors
    return _Launch(kernel, cluster * max(1, min(items, most)), warps, shared, plan)


def _sweep(call: _Call, plan: np.ndarray, layout: _Layout, last: int, keep: list[Any]) -> list[_Launch]:
    """The launches that run sweeps 0 to last - 1 over all rows. Working memory is appended to `keep`."""
    properties = _properties(call.device)
    n, chunks = call.n, -(-call.n // CHUNK)
    batch = math.prod(layout.shape)
    extra = call.number() if call.of_logits or call.outputs & _TERMS else 0

    if n <= NARROW:
        at_once = min(CHUNK // n, 64)
        bytes_a_warp = (CHUNK + NARROW) * (call.bytes_a_class() + extra) + at_once * MAX_STATS * 8
        warps = _warps(properties, bytes_a_warp)
        plan = _with(plan, first=0, last=last, count=at_once, dense=layout.dense, columns=layout.columns)
        return [_launch(call, "kl_narrow", plan, -(-batch // (at_once * warps)), warps, warps * bytes_a_warp)]

    slot = CHUNK * call.bytes_a_class()
    bytes_a_warp = slot + CHUNK * extra + 8 * MAX_STATS
    warps = _warps(properties, bytes_a_warp)

    def units(first: int, last: int) -> _Launch:
        p = _with(plan, first=first, last=last, slots=1, columns=layout.columns)
        tiles = -(-batch // warps) * chunks if layout.columns else -(-batch * chunks // warps)
        return _launch(call, "kl_units", p, tiles, warps, warps * bytes_a_warp)

    if chunks == 1:
        return [units(0, last)]

    if not layout.columns and chunks <= CHUNK:
        cluster, slots, warps_a_row = _residence(call, properties, chunks, last, slot, CHUNK * extra + 8 * MAX_STATS)
        if batch * cluster >= properties.multiprocessors:
            p = _with(plan, first=0, last=last, slots=slots)
            shared = warps_a_row * (slots * slot + CHUNK * extra + 8 * MAX_STATS) + 8 * (
                LOGITS_STATES * chunks + MAX_STATS
            )
            return [_launch(call, "kl_rows", p, batch, warps_a_row, shared, cluster)]

    # few rows of many classes, or classes apart: the chunks over the whole device, one sweep a launch
    empty = call.cupy.empty
    if not plan[_AT["stats"]]:
        stats = empty(batch * MAX_STATS, np.float64)
        keep.append(stats)
        plan = _with(plan, stats=stats)
    launches = []
    for sweep in range(last):
        states, count = call.states(sweep), chunks
        level = empty(batch * states * count, np.float64)
        keep.append(level)
        plan = _with(plan, states=level)
        launches.append(units(sweep, sweep + 1))
        while states:
            groups = -(-count // CHUNK)
            up = empty(batch * states * groups, np.float64) if groups > 1 else None
            keep.append(up)
            p = _with(plan, first=sweep, states=level, sums=up, count=count, groups=groups)
            launches.append(_launch(call, "kl_fold", p, -(-batch * groups // 8), 8, 0))
            if groups == 1:
                break
            level, count = up, groups
    return launches


def _residence(
    call: _Call, properties: _Device, chunks: int, sweeps: int, slot: int, extra: int
) -> tuple[int, int, int]:
    """Blocks a row, chunks a warp holds, warps a block: so that a row that is needed twice is read once, if it fits."""
    fixed = 8 * (LOGITS_STATES * chunks + MAX_STATS)
    warps = _warps(properties, slot + extra, fixed)
    if sweeps == 1:
        return 1, 1, warps
    clusters = (1, 2, 4, 8, 16) if properties.arch >= 90 else (1,)
    for room in (properties.shared_all // 2 - _RESERVED, properties.shared):  # two blocks a multiprocessor, or one
        for cluster in clusters:
            for warps_a_block in (8, 4):
                slots = -(-chunks // (cluster * warps_a_block))
                if warps_a_block * (slots * slot + extra) + fixed <= min(room, properties.shared):
                    return cluster, slots, warps_a_block
    return 1, 1, warps


def _total(call: _Call, values: Any, count: int, plan: np.ndarray, keep: list[Any]) -> list[_Launch]:
    """The sum of `count` doubles, divided, into the plan's value; or of the plan's weights into its `sums`."""
    launches = []
    level, last = values, plan[_AT["sums"]]
    while True:
        groups = max(1, -(-count // CHUNK))
        p = _with(plan, states=level, count=count, groups=groups, sums=int(last))
        if groups > 1:
            up = call.cupy.empty(groups, np.float64)
            keep.append(up)
            p = _with(p, sums=up)
            p[_AT["value"]] = 0
        kernel = _kernel(call.device, _sum_options(), "kl_sum")
        launches.append(_Launch(kernel, max(1, min(-(-groups // 8), 1 << 16)), 8, 0, p))
        if groups == 1:
            return launches
        plan = plan.copy()
        plan[_AT["weights"]] = 0  # from now on the sums of the level below
        level, count = up, groups


def _run(
    operation: int,
    x: Any,
    y: Any,
    space: Any,
    axis: int,
    reduction: str,
    weights: Any,
    temperature: float,
    return_grad: Any,
    out: Any,
    device: str | None,
) -> Any:
    given = {"x": x, "y": y, "weights": weights}
    given.update({f"out[{k}]": a for k, a in enumerate(out if isinstance(out, tuple) else (out,))})
    arguments = (operation, x, y, space, axis, reduction, weights, temperature, return_grad, out)
    return _on_device(device, given, rows.arrange, arguments)


def _on_device(device: str | None, given: dict[str, Any], arrange: Any, arguments: Any) -> Any:
    """Arrange a call and compute it, where the `given` arrays are, or where `device` says."""
    cupy = _ready()
    number = _choose_device(cupy, device, given)
    for name, a in given.items():
        if name.startswith("out") and _is_here(a, cupy) and a.device.id != number:
            raise ValueError(
                f"{name} is on cuda:{a.device.id} and the computation on cuda:{number}; pass one from there"
            )
    with cupy.cuda.Device(number):
        task = arrange(cupy, partial(_asarray, cupy, number), *arguments)
        return rows.result(task, _compute(cupy, number, task))


def _compute(cupy: Any, device: int, task: rows.Task) -> Any:
    """Prepare all launches of a task, start them, and return the value's array."""
    value = task.value if task.out is None else task.out
    if value is None:
        value = cupy.empty((), task.scalar_dtype)
    totals = cupy.empty(task.x.shape[:-1], np.float64) if task.output == rows.TOTAL else None
    views = {"x": _view(task.x, True)}
    if task.y is not None:
        views["y"] = _view(task.y, True)
    if task.weights is not None:
        views["weights"] = _view(task.weights, False)
    if task.factors is not None:
        views["factors"] = _view(task.factors, True)
    views["value"] = _view(task.value_view, task.output == rows.TERMS) if totals is None else _view(totals, False)
    views.update({"d" + g.of: _view(g.view, True) for g in task.gradients if not g.inner})
    call = _Call(
        cupy, device, task.operation, task.spaces, (views["x"].dtype, views.get("y", views["x"]).dtype), task.wide,
        sum(_OUTPUTS[g.of] for g in task.gradients if not g.inner) + (_TERMS if task.output == rows.TERMS else 0),
        task.temperature == 1, task.factors is not None, task.n,
    )  # fmt: skip

    if task.rows == 0 or task.n == 0:  # none of our launches; CuPy fills what is not empty
        of = task.denominator
        if totals is None:
            value[...] = 0
        elif of is not None:
            value[...] = 0 if of else math.nan
        else:
            value[...] = 0.0 / task.weights.sum()
        for g in task.gradients:
            g.array[...] = 0
        return value

    keep: list[Any] = [totals]  # working memory, until everything is launched; CuPy then reuses it in stream order
    launches: list[_Launch] = []
    divisor, denominator = task.denominator, None
    if divisor is None:  # the sum of the weights, known to the device only
        divisor, denominator = 0.0, cupy.empty((), np.float64)
        over = _layout(task.x.shape[:-1], 1, {"weights": views["weights"]})
        launches += _total(call, None, task.rows, _plan(over, 1, sums=denominator), keep)
    gradient_scale = 1.0 / divisor if divisor else math.nan
    cotangent = None
    if task.cotangent is not None:
        if denominator is None and not _is_here(task.cotangent, cupy):
            gradient_scale *= float(task.cotangent)
        else:
            cotangent = cupy.asarray(task.cotangent, np.float64)
    fields = {
        "output": task.output,
        "any_weights": task.signed,
        "epsilon": task.epsilon,
        "inverse_temperature": 1.0 / task.temperature,
        "gradient_scale": gradient_scale,
        "scale": divisor,
        "denominator": denominator,
        "cotangent": cotangent,
    }

    layout = _layout(task.x.shape[:-1], task.n, views)
    launches += _sweep(call, _plan(layout, task.n, **fields), layout, call.sweeps, keep)
    for g in task.gradients:
        if g.inner:
            launches += _summed(call, task, g, views, fields, keep)
    if totals is not None:
        plan = _plan(_Layout((), {"value": _view(value, False)}, False, False), 1, **fields)
        launches += _total(call, totals, task.rows, plan, keep)
    _start(launches)
    return value


def _summed(
    call: _Call, task: rows.Task, g: rows.Gradient, views: dict[str, _View], fields: dict[str, Any], keep: list[Any]
) -> list[_Launch]:
    """The gradient of a broadcast operand: its batch axes in front, those to sum over behind, 1024 rows at a time."""
    batch = task.x.shape[:-1]
    order = (*(d for d in range(len(batch)) if d not in g.inner), *g.inner)
    shape = tuple(batch[d] for d in order)
    inner = math.prod(batch[d] for d in g.inner)
    turned = {name: v._replace(batch=tuple(v.batch[d] for d in order)) for name, v in views.items() if name in _READ}
    to = _view(g.view, True)
    turned["d" + g.of] = to._replace(batch=tuple(to.batch[d] for d in order))
    layout = _layout(shape, call.n, turned, keep_order=True)
    stats = None
    launches: list[_Launch] = []
    call = call._replace(outputs=_OUTPUTS[g.of])
    if call.sweeps > 1:
        stats = call.cupy.empty(task.rows * MAX_STATS, np.float64)
        keep.append(stats)
        known = _layout(shape, call.n, {k: v for k, v in turned.items() if k[0] != "d"}, keep_order=True)
        plan = _plan(known, call.n, stats=stats, **{**fields, "output": rows.PER_ROW})
        launches += _sweep(call, plan, known, call.sweeps - 1, keep)
    groups = -(-inner // CHUNK)
    sums = call.cupy.empty(task.rows // inner * groups * call.n, np.float64)
    keep.append(sums)
    plan = _plan(
        layout, call.n, stats=stats, sums=sums, inner=inner, groups=groups, first=call.sweeps - 1,
        **{**fields, "output": rows.PER_ROW},
    )  # fmt: skip
    bytes_a_warp = CHUNK * (8 + call.bytes_a_class() + call.number())
    items = task.rows // inner * groups * -(-call.n // CHUNK)
    warps = _warps(_properties(call.device), bytes_a_warp)
    launches.append(_launch(call, "kl_summed", plan, -(-items // warps), warps, warps * bytes_a_warp))
    elements = task.rows // inner * call.n
    launches.append(_launch(call, "kl_summed_fold", plan, -(-elements // 256), 8, 0))
    return launches


def entropy(
    x: Any, space: Any, axis: int, reduction: str, weights: Any, temperature: float, return_grad: Any, out: Any,
    device: str | None,
) -> Any:  # fmt: skip
    return _run(rows.ENTROPY, x, None, space, axis, reduction, weights, temperature, return_grad, out, device)


kl_div = partial(_run, rows.KL_DIV)
rel_entr = partial(_run, rows.REL_ENTR)
cross_entropy = partial(_run, rows.CROSS_ENTROPY)


def loss(
    term: str, x: Any, y: Any, space: Any, axis: int, reduction: str, factors: Any, denominator: float, epsilon: float,
    dtype: str | None, return_grad: Any, out: Any = None,
) -> Any:  # fmt: skip
    arguments = (term, x, y, space, axis, reduction, factors, denominator, epsilon, dtype, return_grad, out)
    return _on_device(None, {"x": x, "y": y, "factors": factors}, rows.arrange_loss, arguments)


def gradient(
    operation: str, x: Any, y: Any, space: Any, axis: int, reduction: str, weights: Any, temperature: float,
    cotangent: Any, return_grad: Any, denominator: float = 1.0, epsilon: float = 0.0, out: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The gradients of sum(cotangent * value), for adapters; arguments as in :func:`rows.arrange_gradient`."""
    arguments = (
        operation, x, y, space, axis, reduction, weights, temperature, cotangent, return_grad, denominator, epsilon, out
    )  # fmt: skip
    given = {"x": x, "y": y, "weights": weights, "cotangent": cotangent}
    return _on_device(None, given, rows.arrange_gradient, arguments)[1:]


def block(
    operation: int, x: Any, y: Any, space: Any, axis: int, reduction: str, weights: Any, temperature: float,
    return_grad: Any, denominator: float, totals: bool, shared: tuple[str, ...],
) -> tuple[Any, ...]:  # fmt: skip
    """What cpu.block does, for backends/dask.py."""
    cupy = _ready()
    number = _choose_device(cupy, None, {"x": x, "y": y, "weights": weights})
    with cupy.cuda.Device(number):
        # the kernels write a gradient in its operand's dtype, and parts of a sum should not be rounded to 16 bits
        x, y = (
            a.astype(np.float32) if name in shared and a.dtype.itemsize == 2 else a for name, a in (("x", x), ("y", y))
        )
        task = rows.arrange(
            cupy, partial(_asarray, cupy, number), operation, x, y, space, axis, reduction, weights, temperature,
            return_grad, None, dtype=cupy.dtype("float64") if totals else None,
        )  # fmt: skip
        task.cotangent = 1.0 / denominator if denominator else math.nan
        _compute(cupy, number, task)
        return task.value, *(g.view.astype(np.float64) if g.of in shared else g.array for g in task.gradients)
