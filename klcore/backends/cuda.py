"""CuPy arrays on NVIDIA GPUs: arguments arranged by rows.py, kernels of src/kl_cuda.cu planned and launched here.

A call becomes a few launches on the caller's current stream, all prepared, their working memory included, before the
first one starts: nothing waits for the GPU, and what fails, fails before anything is written. Which launches, and how
numbers are grouped in them, depends on the shapes alone; how many blocks run them does not change a bit.

Launches are prepared without the addresses of the arrays, and kept: the next call of the same words, shapes, strides
and dtypes only fills its own addresses in.
"""

import contextlib
import importlib
import math
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from klcore import _cpu
from klcore.backends import BackendUnavailableError, nvrtc, rows
from klcore.operations import KL_DIV, Call, Operation

_SIZES = _cpu.SIZES  # bytes, by the code of a dtype
CHUNK, NARROW, MAX_STATS = _cpu.CHUNK, _cpu.COLUMNS, _cpu.MAX_STATS  # rows of up to NARROW classes share a warp
KNOWN = 2 * MAX_STATS  # doubles for each warp, in shared memory
MAX_DIMS = 32
_RESERVED = 1024  # bytes of shared memory that CUDA takes for itself in every block
_WARPS = 4  # in a block that keeps chunks in shared memory, at most: warps that wait for each other are better few
# What part of a multiprocessor's warps must be busy for a block to have a row each (decision 16): rows that are swept
# once; several times; several times with 16-bit inputs, which is never so.
_BUSY_ENOUGH = (0.5, 0.75, 2.0)
_FEW_CHUNKS = 8  # of logits: their fold takes longer than their sweep
_MOST_BLOCKS = 32  # a multiprocessor in one launch; those share what there is to do

# kl::Plan, in words of eight bytes
_FIELDS = (
    ("shape", MAX_DIMS), *((name, 1) for name in (
        "ndim", "rows", "n", "chunks", "output", "first", "last", "columns", "dense", "slots", "count", "groups",
        "rows_on", "chunks_on", "inner", "any_weights", "inverse_temperature", "gradient_scale", "scale", "epsilon",
        "denominator", "cotangent", "states", "stats", "sums",
    )),
    *((name, MAX_DIMS + 3) for name in ("x", "y", "weights", "factors", "value", "dx", "dy")),
)  # fmt: skip
_AT = {name: sum(words for _, words in _FIELDS[:k]) for k, (name, _) in enumerate(_FIELDS)}
_WORDS = sum(words for _, words in _FIELDS)
_OUTPUTS, _TERMS = {"x": 1, "y": 2}, 4  # KL_OUTPUTS
# What has an address: what a call reads, in this order, then its value and gradients, then its working memory.
_READ = ("x", "y", "weights", "factors", "cotangent")
_CHECKED = 3  # of these out= may not overlap
_SCRATCH = -1  # the last address of all
_MOST_KEPT = 1024  # prepared calls; 2.4 KB a launch
_DOUBLES = ("inverse_temperature", "gradient_scale", "scale", "epsilon")


_FLOAT64, _FLOAT32 = np.dtype("float64"), np.dtype("float32")  # NumPy takes its time to make one of a type


@cache
def _code(dtype: Any) -> int | None:
    """The code of a dtype in kl_store.h, or None. A dtype's name takes NumPy a microsecond: hence the cache."""
    return rows.CODES.get(dtype.name)


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
def ready() -> Any:
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

    def blocks(self, nbytes: int, warps: int, most: int) -> int:
        """How many blocks share a multiprocessor, by the shared memory of each and the registers of `most` warps."""
        return min(self.shared_all // (nbytes + _RESERVED), most // warps) if nbytes <= self.shared else 0


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


def _as_read(cupy: Any, a: Any, dtype: Any = None) -> Any:
    """Weights, factors or a cotangent as kernels read them, which rows.py would see to as well, but too late: a call is
    known by the arrays that kernels read. Only for CuPy's arrays on the current device."""
    if type(a) is not cupy.ndarray:
        # rows.py looks at weights that are on the host, by NumPy
        foreign = hasattr(type(a), "__dlpack__") and not hasattr(a, "__cuda_array_interface__")
        return rows.as_numpy(a, "weights") if foreign else a
    if a.data.device_id != cupy.cuda.runtime.getDevice():
        return a
    if dtype is None and a.dtype.kind in "biu":
        dtype = _FLOAT64
    elif dtype is None and a.dtype.itemsize == 2:
        dtype = _FLOAT32
    return a if dtype is None or a.dtype is dtype or a.dtype.kind == "c" else a.astype(dtype)


def _is_here(a: Any, cupy: Any) -> bool:
    return isinstance(a, cupy.ndarray)


def _choose_device(cupy: Any, device: str | None, arrays: dict[str, Any], outs: Sequence[Any]) -> int:
    """The number of the device to compute on, where `outs` have to be."""
    chosen = _named_or_found(cupy, device, arrays | {f"out[{k}]": a for k, a in enumerate(outs)})
    for k, a in enumerate(outs):
        if _is_here(a, cupy) and a.device.id != chosen:
            raise ValueError(
                f"out[{k}] is on cuda:{a.device.id} and the computation on cuda:{chosen}; pass one from there"
            )
    return chosen


def _named_or_found(cupy: Any, device: str | None, arrays: dict[str, Any]) -> int:
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
    if not _is_here(a, cupy):
        a = rows.as_numpy(a, name)
        if not a.dtype.isnative:
            a = a.astype(a.dtype.newbyteorder("="))
    if _code(a.dtype) is None:
        rows.refuse(a, name)
    if not _is_here(a, cupy):
        a = cupy.asarray(a)
    elif a.device.id != device:
        a = cupy.array(a)  # copies to the current device
    if a.dtype.kind in "iub":
        return a.astype(np.float64)
    return a.astype(np.float32) if name == "weights" and a.dtype.itemsize == 2 else a  # as kernels read them


class _Foreign:
    """A stream of another library's, as CuPy takes it."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


@contextlib.contextmanager
def on_stream(device: int, pointer: int) -> Iterator[Any]:
    """CuPy, with another library's device and stream as its current ones; for that library's adapter."""
    cupy = ready()
    with cupy.cuda.Device(device), cupy.cuda.Stream.from_external(_Foreign(pointer)):
        yield cupy


# ---- kernels ---------------------------------------------------------------------------------------------------------


_ENTRIES = {
    "kl_units": "KL_UNITS", "kl_narrow": "KL_NARROW", "kl_rows": "KL_ROWS", "kl_fold": "KL_FOLD", "kl_sum": "KL_SUM",
    "kl_weights": "KL_SUM", "kl_summed": "KL_SUMMED", "kl_summed_fold": "KL_SUMMED",
}  # fmt: skip


def _beside(operation: Operation, spaces: tuple[int, int]) -> bool:
    """Whether it is the divergence of logits beside another space: norms in double, log-probabilities in two parts.

    So it takes as many registers as what is wide, and no hardware exponentials.
    """
    return rows.LOGITS in spaces and spaces[0] != spaces[1] and operation.form == _cpu.BY_RATIO


def _is_fast(operation: Operation, spaces: tuple[int, int], dtypes: tuple[int, int], wide: bool) -> bool:
    """Whether exponentials are the hardware's: 16-bit inputs come faster than others could be computed."""
    return not wide and not _beside(operation, spaces) and max(_SIZES[d] for d in dtypes) == 2


def options(
    operation: Operation, spaces: tuple[int, int], dtypes: tuple[int, int], wide: bool, outputs: int,
    entries: tuple[str, ...], unit: bool = True, factors: bool = False,
) -> tuple[str, ...]:  # fmt: skip
    """The macros that kl_cuda.cu is compiled with for these kernels; `unit` if the temperature is 1."""
    values = {
        "OPERATION": operation.code, "SPACE_X": spaces[0], "SPACE_Y": spaces[1], "X": dtypes[0], "Y": dtypes[1],
        "WIDE": int(wide), "OUTPUTS": outputs,
    }  # fmt: skip
    if not unit:
        values["TEMPERATURE"] = 1
    if factors:
        values["FACTORS"] = 1
    if _is_fast(operation, spaces, dtypes, wide):
        values["FAST16"] = 1
    return (
        *(f"-DKL_{name}={value}" for name, value in values.items()),
        *sorted({f"-D{_ENTRIES[entry]}" for entry in entries}),
    )


def _sum_options() -> tuple[str, ...]:
    pair, float32 = (rows.SPACES["probs"],) * 2, (rows.CODES["float32"],) * 2
    return options(KL_DIV, pair, float32, False, 0, ("kl_sum",))  # which looks at none of these


@cache
def _states(operation: int, spaces: tuple[int, int], wide: bool, outputs: int, factors: bool) -> tuple[int, ...]:
    return _cpu.sweeps(operation, *spaces, wide, bool(outputs & _TERMS), bool(outputs & ~_TERMS), factors)


_STAGING = ("kl_units", "kl_narrow", "kl_rows", "kl_summed")  # kernels that keep chunks in shared memory


@cache
def _kernel(device: int, options: tuple[str, ...], name: str) -> Any:
    """A kernel, compiled if need be, loaded on the current device, and told what it may use there: CuPy's Function,
    which has less to do for a launch than a RawKernel."""
    properties = _properties(device)
    kernel = _cupy().RawModule(path=str(nvrtc.build(options, properties.arch))).get_function(name)
    if name in _STAGING:
        kernel.max_dynamic_shared_size_bytes = properties.shared
        kernel.preferred_shared_memory_carveout = 100  # percent: how many blocks fit was reckoned with all of it
    return kernel.kernel


# ---- plans -----------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where something will lie: so many bytes behind the address of number `of`, in the order of _READ."""

    of: int
    offset: int = 0


class _Scratch:
    """The working memory of a call, laid out piece by piece, so that one allocation serves all launches."""

    def __init__(self) -> None:
        self.nbytes = 0

    def doubles(self, count: int) -> _Place:
        place = _Place(_SCRATCH, self.nbytes)
        self.nbytes += -(-8 * count // 256) * 256
        return place


class _View(NamedTuple):
    """An array as kl::Array describes it."""

    place: _Place
    stride: int
    batch: tuple[int, ...]
    dtype: int
    size: int


def _view(a: Any, place: _Place, classes: bool) -> _View:
    strides = a.strides
    code = _code(a.dtype)
    assert code is not None  # _asarray and rows.py have seen to it
    if classes:
        return _View(place, strides[-1], strides[:-1], code, _SIZES[code])
    return _View(place, 0, strides, code, _SIZES[code])


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


class _Plan:
    """kl::Plan in words of eight bytes, and the places whose addresses some of them are to hold."""

    __slots__ = ("places", "words")

    def __init__(self, words: np.ndarray, places: dict[int, _Place]) -> None:
        self.words, self.places = words, places

    def with_fields(self, **fields: Any) -> "_Plan":
        """A copy with some fields changed; None stands for the address 0."""
        plan = _Plan(self.words.copy(), self.places.copy())
        for name, value in fields.items():
            plan.put(_AT[name], value, name in _DOUBLES)
        return plan

    def put(self, at: int, value: Any, double: bool = False) -> None:
        self.places.pop(at, None)
        if isinstance(value, _Place):
            self.places[at] = value
        elif double:
            self.words.view(np.float64)[at] = value
        else:
            self.words[at] = 0 if value is None else value


def _plan(layout: _Layout, n: int, **fields: Any) -> _Plan:
    plan = _Plan(np.zeros(_WORDS, np.int64), {})
    words = plan.words
    words[: len(layout.shape)] = layout.shape
    words[_AT["ndim"]] = len(layout.shape)
    words[_AT["rows"]] = math.prod(layout.shape)
    words[_AT["n"]] = n
    words[_AT["chunks"]] = -(-n // CHUNK)
    for name, v in layout.views.items():
        at = _AT[name]
        plan.put(at, v.place)
        words[at + 1] = v.stride
        words[at + 2 : at + 2 + len(v.batch)] = v.batch
        words[at + 2 + MAX_DIMS] = v.dtype
    return plan.with_fields(**fields)


class _Launch(NamedTuple):
    name: str
    function: Any
    grid: tuple[int]
    block: tuple[int]
    shared: int


_Planned = tuple[_Launch, _Plan]


class _Kind(NamedTuple):
    """What all launches of one call share."""

    device: int
    operation: Operation
    spaces: tuple[int, int]
    dtypes: tuple[int, int]
    wide: bool
    outputs: int
    unit: bool
    factors: bool
    n: int

    def until(self, last: int) -> "_Kind":
        """What is compiled for the sweeps before `last`: of several, the first leaves nothing but states."""
        return self._replace(outputs=0) if last == 1 < self.sweeps else self

    def kernel(self, name: str) -> Any:
        folds = name == "kl_fold" and not self.of_logits  # what is folded does not depend on the outputs
        outputs = 0 if folds else self.outputs
        macros = options(self.operation, self.spaces, self.dtypes, self.wide, outputs, (name,), self.unit, self.factors)
        return _kernel(self.device, macros, name)

    @property
    def states(self) -> tuple[int, ...]:
        """Doubles that a chunk leaves behind, for each sweep over the rows that these outputs take."""
        return _states(self.operation.code, self.spaces, self.wide, self.outputs, self.factors)

    def row_bytes(self, chunks: int) -> int:
        """Of a row in kl_rows: what its chunks leave behind, and what is known of it."""
        fold = 0 if not self.of_logits or self.extra_bytes() else 4 * 3 * 32  # of warps that add up together
        return 8 * (max(self.states) * chunks + MAX_STATS + fold)

    @property
    def sweeps(self) -> int:
        return len(self.states)

    @property
    def of_logits(self) -> bool:
        return self.spaces == (rows.LOGITS,) * 2 and self.operation.form == _cpu.BY_RATIO and not self.factors

    @property
    def of_cross(self) -> bool:
        return rows.LOGITS in self.spaces and self.operation.form == _cpu.BY_COST and not self.factors

    def bytes_a_class(self) -> int:
        return _SIZES[self.dtypes[0]] + (0 if self.operation.single else _SIZES[self.dtypes[1]])

    def number(self) -> int:
        return 8 if self.wide else 4

    @property
    def fast(self) -> bool:
        return _is_fast(self.operation, self.spaces, self.dtypes, self.wide)

    def extra_bytes(self) -> int:
        """A class beside its inputs: two rows of logits keep weights, terms are written from there."""
        return self.number() if (self.of_logits and not self.fast) or self.outputs & _TERMS else 0

    def most_warps(self) -> int:
        """On a multiprocessor, with the registers that they want: four times BLOCKS in kl_cuda.cu (or 16)."""
        if self.wide or _beside(self.operation, self.spaces):
            return 8
        if self.of_logits and _properties(self.device).arch >= 120:
            return 8
        if self.fast and rows.LOGITS not in self.spaces and not self.outputs & _TERMS:
            return 32 if not self.outputs else 24 if self.spaces == (rows.SPACES["probs"],) * 2 else 16
        if self.fast and self.of_logits and not self.outputs:
            return 20
        return 16 if self.of_logits or self.of_cross or self.outputs & ~_TERMS else 24

    def warps(self, bytes_a_warp: int) -> int:
        """In a block: so that a multiprocessor has the most of them."""
        blocks, most = _properties(self.device).blocks, self.most_warps()
        return max(range(1, _WARPS + 1), key=lambda w: (w * blocks(w * bytes_a_warp, w, most), w))


def _launch(kind: _Kind, name: str, plan: _Plan, items: int, warps: int, shared: int) -> _Planned:
    """One launch; `items` blocks' worth of work."""
    most = int(_MOST_BLOCKS * _properties(kind.device).multiprocessors)
    return _Launch(name, kind.kernel(name), (max(1, min(items, most)),), (32 * warps,), shared), plan


def _sweep(kind: _Kind, plan: _Plan, layout: _Layout, last: int, scratch: _Scratch) -> list[_Planned]:
    """The launches that run sweeps 0 to last - 1 over all rows."""
    n, chunks = kind.n, -(-kind.n // CHUNK)
    batch = math.prod(layout.shape)
    kind = kind.until(last)
    extra = kind.extra_bytes()

    if n <= NARROW:
        at_once = _rows_at_once(kind, n)
        bytes_a_warp = _narrow_bytes(kind, n, at_once)
        warps = kind.warps(bytes_a_warp)
        plan = plan.with_fields(first=0, last=last, count=at_once, dense=layout.dense, columns=layout.columns)
        return [_launch(kind, "kl_narrow", plan, -(-batch // (at_once * warps)), warps, warps * bytes_a_warp)]

    slot = CHUNK * kind.bytes_a_class()
    beside = CHUNK * extra + 8 * KNOWN
    bytes_a_warp = slot + beside
    warps = kind.warps(bytes_a_warp)

    def units(first: int, last: int) -> _Planned:
        p = plan.with_fields(first=first, last=last, slots=1, columns=layout.columns)
        tiles = -(-batch // warps) * chunks if layout.columns else -(-batch * chunks // warps)
        launch, p = _launch(kind.until(last), "kl_units", p, tiles, warps, warps * bytes_a_warp)
        rows_on, chunks_on = divmod(launch.grid[0] * (1 if layout.columns else warps), chunks)
        return launch, p.with_fields(rows_on=rows_on * (warps if layout.columns else 1), chunks_on=chunks_on)

    if chunks == 1:
        return [units(0, last)]

    if not layout.columns and chunks <= CHUNK:
        a_row = _a_block_a_row(kind, batch, chunks, last, slot, beside)
        if a_row:
            warps_a_row, slots, shared = a_row
            p = plan.with_fields(first=0, last=last, slots=slots)
            return [_launch(kind, "kl_rows", p, batch, warps_a_row, shared)]

    # the chunks over the whole device, one sweep a launch
    if _AT["stats"] not in plan.places:
        plan = plan.with_fields(stats=scratch.doubles(batch * MAX_STATS))
    launches = []
    for sweep in range(last):
        states, count = kind.states[sweep], chunks
        level = scratch.doubles(batch * states * count)
        if states:  # else the sweep looks at those that an earlier one left
            plan = plan.with_fields(states=level)
        launches.append(units(sweep, sweep + 1))
        while states:
            groups = -(-count // CHUNK)
            up = scratch.doubles(batch * states * groups) if groups > 1 else None
            p = plan.with_fields(first=sweep, states=level, sums=up, count=count, groups=groups)
            launches.append(_launch(kind, "kl_fold", p, -(-batch * groups // 8), 8, 0))
            if up is None:
                break
            level, count = up, groups
    return launches


def _narrow_bytes(kind: _Kind, n: int, count: int) -> int:
    """Of a warp that treats so many rows of n classes at a time."""
    classes = -(-(count * n + NARROW) // 8) * 8
    return classes * (kind.bytes_a_class() + kind.extra_bytes()) + count * MAX_STATS * 8


def _rows_at_once(kind: _Kind, n: int) -> int:
    """As many as fit in a chunk and leave room for all warps that have registers: multiples of those side by side."""
    properties, most = _properties(kind.device), kind.most_warps()
    side_by_side = 32
    while side_by_side > 1 and 32 // side_by_side * 4 < n:
        side_by_side //= 2
    count = max(min(CHUNK // n, 64) // side_by_side, 1) * side_by_side
    room = properties.shared_all // most - _RESERVED // _WARPS
    while count > side_by_side and _narrow_bytes(kind, n, count) > room:
        count -= side_by_side
    return count


def _a_block_a_row(
    kind: _Kind, batch: int, chunks: int, last: int, slot: int, beside: int
) -> tuple[int, int, int] | None:
    """Warps, chunks that each of them holds, and bytes of shared memory of a block that treats a row in one launch.

    None where a launch for each sweep over all chunks is faster: a row that is swept several times must leave enough
    shared memory to others; one with few chunks costs more to fold than to sweep; and rows may be few. Decision 16.
    """
    properties, most, fixed = _properties(kind.device), kind.most_warps(), kind.row_bytes(chunks)
    enough = most * _BUSY_ENOUGH[0 if last == 1 else 1 + kind.fast]
    if last == 1 and rows.LOGITS in kind.spaces and chunks < _FEW_CHUNKS:
        return None
    found = []
    for warps in range(1, _WARPS + 1):
        share = -(-chunks // warps)
        slots = 1 if last == 1 else share
        shared = warps * (slots * slot + beside) + fixed
        blocks = min(properties.blocks(shared, warps, most), batch // properties.multiprocessors)
        busy = blocks * chunks / share  # warps on a multiprocessor, on average: some have a chunk less
        found.append((busy, warps, slots, shared))
    busy, warps, slots, shared = max(found)
    return (warps, slots, shared) if busy >= enough else None


def _added_up(
    kind: _Kind, name: str, sums: int, values: _Place | None, count: int, plan: _Plan, scratch: _Scratch
) -> list[_Planned]:
    """The sum of `count` doubles, divided, into the plan's value; or so many sums of the plan's weights into `sums`."""
    launches = []
    function = _kernel(kind.device, _sum_options(), name)
    while True:
        groups = max(1, -(-count // CHUNK))
        p = plan.with_fields(states=values, count=count, groups=groups)
        up = None
        if groups > 1:
            up = scratch.doubles(sums * groups)
            p = p.with_fields(sums=up, value=None)
        launches.append((_Launch(name, function, (max(1, min(-(-groups // 8), 1 << 16)),), (256,), 0), p))
        if up is None:
            return launches
        plan = plan.with_fields(weights=None)  # from now on the sums of the level below
        values, count = up, groups


# ---- calls -----------------------------------------------------------------------------------------------------------


class _Prepared(NamedTuple):
    """The launches of a call, but for addresses; and what the next such call needs to know besides."""

    device: int
    launches: tuple[_Launch, ...]
    plans: np.ndarray  # one element a launch, as kl::Plan lies in memory
    addresses: tuple[tuple[int, int, int], ...]  # word of `plans`, number of the address, bytes to add
    scratch: int  # bytes of working memory
    results: tuple[tuple[Any, Any, int | None], ...]  # shape, dtype, and which argument each is laid out like
    spans: tuple[tuple[int, int], ...]  # by _span, of arguments and results


_kept: dict[Any, _Prepared] = {}  # by _key


def _key(cupy: Any, words: tuple[Any, ...], arrays: tuple[Any, ...]) -> Any:
    """What tells calls apart that differ by more than addresses; None for one that has to be looked at each time."""
    key: list[Any] = [words]
    for a in arrays:
        if a is None:
            key.append(None)
        elif type(a) is cupy.ndarray:
            key.append((a.shape, a.strides, a.dtype, a.data.device_id))
        else:
            return None
    return tuple(key)


# What equals it must mean the same, now and later: 1.0 == 1 is no axis, and an object may be another number tomorrow.
_WORDS_OF = frozenset((str, int, float, tuple, type(None)))


def _integer(axis: Any) -> Any:
    try:
        return rows.integer(axis, "axis")
    except TypeError:
        return axis  # for rows.py to refuse


def _number(temperature: Any) -> Any:
    try:
        return float(temperature) if hasattr(temperature, "__float__") else temperature
    except (TypeError, ValueError, OverflowError):
        return temperature


def compute(call: Call) -> Any:
    """The value, or (value, *gradients); with a cotangent, the gradients alone."""
    cupy = ready()
    total = call.cotangent is not None and call.reduction not in ("row", "none")
    weights = _as_read(cupy, call.weights)
    cotangent = _as_read(cupy, call.cotangent, _FLOAT64 if total else None)
    call = call._replace(
        weights=weights, cotangent=cotangent, axis=_integer(call.axis), temperature=_number(call.temperature)
    )
    # the arrays that kernels read, in the order of _READ, and what there is beside them
    read: tuple[Any, ...] = (call.x, call.y, weights, None, cotangent)
    if cotangent is not None and weights is None and not total:  # it multiplies each row, or each term
        by_row = call.reduction == "row"
        read = (call.x, call.y, cotangent, None, None) if by_row else (call.x, call.y, None, cotangent, None)
    elif call.operation.is_loss:
        read = (call.x, call.y, None, weights, cotangent)
    words = (
        call.operation.code, call.space, call.axis, call.reduction, call.temperature, call.return_grad,
        call.denominator, call.epsilon, call.dtype,
    )  # fmt: skip
    out = call.out if cotangent is None or call.out is None else (None, *call.out)
    given = out if isinstance(out, tuple) else (out,)
    types = tuple(map(type, words))
    key = None
    if _WORDS_OF.issuperset(types):
        key = _key(cupy, (call.device, given is out, cotangent is None, words, types), (*read, *given))
    try:
        prepared = _kept.get(key)
    except TypeError:  # a tuple with something in it that cannot be a key
        key = prepared = None
    if prepared is not None:
        if cupy.cuda.runtime.getDevice() == prepared.device:
            return _again(cupy, prepared, read, given, cotangent is None)
        with cupy.cuda.Device(prepared.device):
            return _again(cupy, prepared, read, given, cotangent is None)

    number = _choose_device(cupy, call.device, dict(zip(_READ, read, strict=True)), given)
    with cupy.cuda.Device(number):
        task = rows.arrange(cupy, partial(_asarray, cupy, number), call)
        value, prepared, arrays = _compute(cupy, number, task)
        if key is not None and prepared is not None and _can_be_kept(task, arrays, read):
            if len(_kept) >= _MOST_KEPT:
                _kept.clear()
            _kept[key] = prepared
        return rows.result(task, value) if task.value_wanted else rows.gradients(task)


def _can_be_kept(task: rows.Task, arrays: list[Any], read: tuple[Any, ...]) -> bool:
    """Whether the kernels read the caller's own arrays, none of them converted or moved, and finish the results."""
    pairs = zip(arrays, read, strict=True)
    return (
        all(a is b if a is None or b is None else a.data.ptr == b.data.ptr for a, b in pairs)
        and all(g.spread is None for g in task.gradients)
        and (task.output == rows.TOTAL or task.denominator == 1)
    )


def _again(cupy: Any, prepared: _Prepared, read: tuple[Any, ...], given: tuple[Any, ...], value_wanted: bool) -> Any:
    """A call that was prepared before, with other addresses."""
    arrays = list(read)
    for k, (shape, dtype, like) in enumerate(prepared.results):
        a = given[k] if k < len(given) else None
        if a is None:
            a = cupy.empty(shape, dtype) if like is None else cupy.empty_like(read[like])
        arrays.append(a)
    addresses = [0 if a is None else a.data.ptr for a in arrays]
    if len(given) > 1 or given[0] is not None:
        _check_overlap(prepared, arrays, addresses, given)
    _execute(cupy, prepared, addresses)
    results = tuple(arrays[len(read) :])
    return results[1:] if not value_wanted else results if len(results) > 1 else results[0]


def _span(a: Any) -> tuple[int, int]:
    """The bytes that an array covers, counted from the address of its first element: from, to."""
    steps = [(n - 1) * step for n, step in zip(a.shape, a.strides, strict=True)]
    return sum(s for s in steps if s < 0), sum(s for s in steps if s > 0) + a.dtype.itemsize


def _check_overlap(prepared: _Prepared, arrays: list[Any], addresses: list[int], given: tuple[Any, ...]) -> None:
    """What rows.arrange checks as well; here most pairs of arrays are told apart by integers that are known already."""
    starts, ends = [], []
    for at, (low, high) in zip(addresses, prepared.spans, strict=True):
        starts.append(at + low)
        ends.append(at + high)
    first = len(_READ)
    for k, a in enumerate(given, first):
        if a is not None:
            start, end = starts[k], ends[k]
            for j in (*range(_CHECKED), *range(first, k)):
                if start < ends[j] and starts[j] < end:
                    inputs = [b for b in arrays[:_CHECKED] if b is not None]
                    rows.check_overlap(arrays[first : k + 1], inputs)


def _execute(cupy: Any, prepared: _Prepared, addresses: list[int]) -> None:
    """Launch everything; `addresses`: of arguments and results, in the order of _READ."""
    # CuPy takes the memory back at the end of this function, and reuses it in the order of the stream
    memory = cupy.cuda.alloc(prepared.scratch) if prepared.scratch else None
    addresses.append(0 if memory is None else memory.ptr)
    plans = prepared.plans.copy()
    words = plans.view(np.int64)
    for word, of, offset in prepared.addresses:
        words[word] = addresses[of] + offset
    _start(prepared.launches, plans)


def _start(launches: Sequence[_Launch], plans: np.ndarray) -> None:
    """All launches of a call pass here: whoever wants to know what is launched wraps this function."""
    for k, launch in enumerate(launches):
        launch.function(launch.grid, launch.block, (plans[k : k + 1],), launch.shared)


def _compute(cupy: Any, device: int, task: rows.Task) -> tuple[Any, _Prepared | None, list[Any]]:
    """The value's array, how it was computed, and the arrays that were read, in the order of _READ."""
    value = task.value if task.out is None else task.out
    if value is None:
        value = cupy.empty((), task.scalar_dtype)

    if task.rows == 0 or task.n == 0:  # none of our launches; CuPy fills what is not empty
        of = task.denominator
        if task.output != rows.TOTAL:
            value[...] = 0
        elif of is not None:
            value[...] = 0 if of else math.nan
        else:
            value[...] = 0.0 / task.weights.sum()
        for g in task.gradients:
            g.array[...] = 0
        return value, None, []

    cotangent = task.cotangent
    if cotangent is not None and (task.by_weights or _is_here(cotangent, cupy)):
        cotangent = task.cotangent = cupy.asarray(cotangent, np.float64)  # multiplied where the denominator is known
    arrays = [task.x, task.y, task.weights, task.factors, cotangent if _is_here(cotangent, cupy) else None]
    results = [value, *(g.array for g in task.gradients)]
    prepared = _prepare(device, task, arrays, results)
    _execute(cupy, prepared, [0 if a is None else a.data.ptr for a in (*arrays, *results)])
    return value, prepared, arrays


def _prepare(device: int, task: rows.Task, arrays: list[Any], results: list[Any]) -> _Prepared:
    """All launches of a task, which reads `arrays`, in the order of _READ, and writes `results`."""
    names = (*_READ, "value", *("d" + g.of for g in task.gradients))
    places = {name: _Place(k) for k, name in enumerate(names)}
    cotangent = arrays[_READ.index("cotangent")] is not None
    scratch = _Scratch()
    views = {"x": _view(task.x, places["x"], True)}
    if task.y is not None:
        views["y"] = _view(task.y, places["y"], True)
    if task.weights is not None:
        views["weights"] = _view(task.weights, places["weights"], False)
    if task.factors is not None:
        views["factors"] = _view(task.factors, places["factors"], True)
    totals = None
    if task.value_wanted and task.output == rows.TOTAL:  # one number a row, behind each other
        totals = scratch.doubles(task.rows)
        batch = task.x.shape[:-1]
        strides = tuple(8 * math.prod(batch[d + 1 :]) for d in range(len(batch)))
        views["value"] = _View(totals, 0, strides, rows.FLOATS.index("float64"), 8)
    elif task.value_wanted:
        views["value"] = _view(task.value_view, places["value"], task.output == rows.TERMS)
    gradients = {g.of: _view(g.view, places["d" + g.of], True) for g in task.gradients}
    views.update({"d" + g.of: gradients[g.of] for g in task.gradients if not g.inner})
    kind = _Kind(
        device, task.operation, task.spaces, (views["x"].dtype, views.get("y", views["x"]).dtype), task.wide,
        sum(_OUTPUTS[g.of] for g in task.gradients if not g.inner) + (_TERMS if task.output == rows.TERMS else 0),
        task.temperature == 1, task.factors is not None, task.n,
    )  # fmt: skip

    launches: list[_Planned] = []
    divisor, denominator = task.denominator or 0.0, None
    if task.by_weights:  # whose sum is known to the device only
        denominator = scratch.doubles(2)
        over = _layout(task.x.shape[:-1], 1, {"weights": views["weights"]})
        plan = _plan(over, 1, sums=denominator, scale=divisor)
        launches += _added_up(kind, "kl_weights", len(rows.WEIGHT_FACTORS), None, task.rows, plan, scratch)
    gradient_scale = 1.0 / divisor if divisor else math.nan
    if task.cotangent is not None and not cotangent:
        gradient_scale *= float(task.cotangent)
    fields = {
        "output": task.output,
        "any_weights": task.signed,
        "epsilon": task.epsilon,
        "inverse_temperature": 1.0 / task.temperature,
        "gradient_scale": gradient_scale,
        "scale": divisor,
        "denominator": denominator,
        "cotangent": places["cotangent"] if cotangent else None,
    }

    layout = _layout(task.x.shape[:-1], task.n, views)
    launches += _sweep(kind, _plan(layout, task.n, **fields), layout, kind.sweeps, scratch)
    for g in task.gradients:
        if g.inner:
            launches += _summed(kind, task, g, gradients[g.of], views, fields, scratch)
    if totals is not None:
        plan = _plan(_Layout((), {"value": _view(results[0], places["value"], False)}, False, False), 1, **fields)
        launches += _added_up(kind, "kl_sum", 1, totals, task.rows, plan, scratch)
    kernels, plans = zip(*launches, strict=True)
    places_of_all = ((k * _WORDS + at, place) for k, plan in enumerate(plans) for at, place in plan.places.items())
    like = (None, *(_READ.index(g.of) for g in task.gradients))
    return _Prepared(
        device,
        kernels,
        np.concatenate([plan.words for plan in plans]).view(f"V{8 * _WORDS}"),
        tuple((at, place.of, place.offset) for at, place in places_of_all),
        scratch.nbytes,
        tuple((a.shape, a.dtype, of) for a, of in zip(results, like, strict=True)),
        tuple((0, 0) if a is None else _span(a) for a in (*arrays, *results)),
    )


def _summed(
    kind: _Kind, task: rows.Task, g: rows.Gradient, to: _View, views: dict[str, _View], fields: dict[str, Any],
    scratch: _Scratch,
) -> list[_Planned]:  # fmt: skip
    """The gradient of a broadcast operand: its batch axes in front, those to sum over behind, 1024 rows at a time."""
    batch = task.x.shape[:-1]
    order = (*(d for d in range(len(batch)) if d not in g.inner), *g.inner)
    shape = tuple(batch[d] for d in order)
    inner = math.prod(batch[d] for d in g.inner)
    turned = {name: v._replace(batch=tuple(v.batch[d] for d in order)) for name, v in views.items() if name in _READ}
    turned["d" + g.of] = to._replace(batch=tuple(to.batch[d] for d in order))
    layout = _layout(shape, kind.n, turned, keep_order=True)
    stats = None
    launches: list[_Planned] = []
    kind = kind._replace(outputs=_OUTPUTS[g.of])
    if kind.sweeps > 1:
        stats = scratch.doubles(task.rows * MAX_STATS)
        known = _layout(shape, kind.n, {k: v for k, v in turned.items() if k[0] != "d"}, keep_order=True)
        plan = _plan(known, kind.n, stats=stats, **{**fields, "output": rows.PER_ROW})
        launches += _sweep(kind, plan, known, kind.sweeps - 1, scratch)
    groups = -(-inner // CHUNK)
    sums = scratch.doubles(task.rows // inner * groups * kind.n)
    plan = _plan(
        layout, kind.n, stats=stats, sums=sums, inner=inner, groups=groups, first=kind.sweeps - 1,
        **{**fields, "output": rows.PER_ROW},
    )  # fmt: skip
    bytes_a_warp = CHUNK * (8 + kind.bytes_a_class() + kind.number())
    items = task.rows // inner * groups * -(-kind.n // CHUNK)
    warps = kind.warps(bytes_a_warp)
    launches.append(_launch(kind, "kl_summed", plan, -(-items // warps), warps, warps * bytes_a_warp))
    elements = task.rows // inner * kind.n
    launches.append(_launch(kind, "kl_summed_fold", plan, -(-elements // 256), 8, 0))
    return launches


def block(call: Call, denominator: float, shared: tuple[str, ...]) -> tuple[Any, ...]:
    """What cpu.block does, for backends/dask.py."""
    cupy = ready()
    number = _choose_device(cupy, None, {"x": call.x, "y": call.y, "weights": call.weights}, ())
    with cupy.cuda.Device(number):
        # the kernels write a gradient in its operand's dtype, and parts of a sum should not be rounded to 16 bits
        x, y = (
            a.astype(np.float32) if name in shared and a.dtype.itemsize == 2 else a
            for name, a in (("x", call.x), ("y", call.y))
        )
        task = rows.arrange(cupy, partial(_asarray, cupy, number), call._replace(x=x, y=y))
        task.cotangent = 1.0 / denominator if denominator else math.nan
        _compute(cupy, number, task)
        return task.value, *(g.view.astype(np.float64) if g.of in shared else g.array for g in task.gradients)
