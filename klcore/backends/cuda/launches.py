"""Which launches sweep over rows, and which add numbers up. This depends on shapes, never on addresses: decision 16."""

import math
from typing import Any, NamedTuple

from klcore import _cpu
from klcore.backends import options
from klcore.backends.cuda import devices, kernels, plans
from klcore.operations import Operation

CHUNK, NARROW, MAX_STATS = _cpu.CHUNK, _cpu.COLUMNS, _cpu.MAX_STATS  # rows of up to NARROW classes share a warp
KNOWN = 2 * MAX_STATS  # float64 numbers per warp, in shared memory
_WARPS = 4  # at most, in a block that stages chunks in shared memory: fewer warps wait less for each other
# The fraction of a multiprocessor's warps that must be busy to give each row a block (decision 16): for rows that are
# swept once; several times; several times with 16-bit inputs, which is never reached.
_BUSY_ENOUGH = (0.5, 0.75, 2.0)
_FEW_CHUNKS = 8  # with fewer chunks of logits, the fold takes longer than the sweep
_MOST_BLOCKS = 32  # per multiprocessor in one launch; the blocks share the work


class Launch(NamedTuple):
    name: str
    function: Any
    grid: tuple[int]
    block: tuple[int]
    shared: int


Planned = tuple[Launch, plans.Plan]


class Kind(NamedTuple):
    """What all launches of a call have in common."""

    device: int
    operation: Operation
    spaces: tuple[int, int]
    dtypes: tuple[int, int]
    wide: bool
    outputs: int
    tempered: str
    factors: bool
    n: int

    def until(self, last: int) -> "Kind":
        """The kind for the sweeps before `last`: if there are several sweeps, the first one has no outputs."""
        return self._replace(outputs=0) if last == 1 < self.sweeps else self

    def kernel(self, name: str) -> Any:
        folds = name == "kl_fold" and not self.of_logits  # these states do not depend on the outputs
        outputs = 0 if folds else self.outputs
        macros = kernels.macros(
            self.operation, self.spaces, self.dtypes, self.wide, outputs, (name,), self.tempered, self.factors
        )
        return kernels.kernel(self.device, macros, name)

    @property
    def states(self) -> tuple[int, ...]:
        """The float64 numbers in the state of a chunk, for each sweep over the rows that these outputs need."""
        return kernels.states(self.operation.code, self.spaces, self.outputs, self.factors)

    def row_bytes(self, chunks: int) -> int:
        """The bytes of a row in kl_rows: the states of its chunks, and its stats."""
        fold = 0 if not self.of_logits or self.extra_bytes() else 4 * 3 * 32  # for warps that add up together
        return 8 * (max(self.states) * chunks + MAX_STATS + fold)

    @property
    def sweeps(self) -> int:
        return len(self.states)

    @property
    def of_logits(self) -> bool:
        return self.spaces == (options.LOGITS,) * 2 and self.operation.form == _cpu.BY_RATIO and not self.factors

    @property
    def of_members(self) -> bool:
        return self.spaces == (options.LOGITS,) * 2 and self.operation.form == _cpu.BY_CLASS and not self.factors

    @property
    def of_cross(self) -> bool:
        return options.LOGITS in self.spaces and self.operation.form == _cpu.BY_COST and not self.factors

    def bytes_a_class(self) -> int:
        return _cpu.SIZES[self.dtypes[0]] + (0 if self.operation.single else _cpu.SIZES[self.dtypes[1]])

    def number(self) -> int:
        return 8 if self.wide else 4

    @property
    def fast(self) -> bool:
        return kernels.is_fast(self.operation, self.spaces, self.dtypes, self.wide)

    def extra_bytes(self) -> int:
        """The bytes per class besides its inputs: two rows of logits keep weights, and terms are staged."""
        weights = (self.of_logits and not self.fast) or self.of_members
        return self.number() if weights or self.outputs & kernels.TERMS else 0

    def most_warps(self) -> int:
        """The number of warps whose registers fit on a multiprocessor: four times BLOCKS in kl_cuda.cu (or 16)."""
        if self.wide or self.of_members or kernels.is_beside(self.operation, self.spaces):
            return 8
        if self.of_logits and devices.properties(self.device).arch >= 120:
            return 8
        if self.fast and options.LOGITS not in self.spaces and not self.outputs & kernels.TERMS:
            return 32 if not self.outputs else 24 if self.spaces == (options.SPACES["probs"],) * 2 else 16
        if self.fast and self.of_logits and not self.outputs:
            return 20
        return 16 if self.of_logits or self.of_cross or self.outputs & ~kernels.TERMS else 24

    def warps(self, bytes_a_warp: int) -> int:
        """The number of warps in a block that gives a multiprocessor the most warps."""
        blocks, most = devices.properties(self.device).blocks, self.most_warps()
        return max(range(1, _WARPS + 1), key=lambda w: (w * blocks(w * bytes_a_warp, w, most), w))


def grid_of(device: int, items: int) -> tuple[int]:
    """The grid for this many blocks of work."""
    return (max(1, min(items, int(_MOST_BLOCKS * devices.properties(device).multiprocessors))),)


def launch_of(kind: Kind, name: str, plan: plans.Plan, items: int, warps: int, shared: int) -> Planned:
    """One launch, for `items` blocks of work."""
    return Launch(name, kind.kernel(name), grid_of(kind.device, items), (32 * warps,), shared), plan


def units(kind: Kind, plan: plans.Plan, layout: plans.Layout, first: int, last: int) -> Planned:
    """Sweeps `first` to last - 1 over all chunks, one chunk per warp."""
    batch, chunks = math.prod(layout.shape), -(-kind.n // CHUNK)
    bytes_a_warp = CHUNK * (kind.bytes_a_class() + kind.extra_bytes()) + 8 * KNOWN
    warps = kind.warps(bytes_a_warp)
    p = plan.with_fields(first=first, last=last, slots=1, columns=layout.columns)
    tiles = -(-batch // warps) * chunks if layout.columns else -(-batch * chunks // warps)
    launch, p = launch_of(kind.until(last), "kl_units", p, tiles, warps, warps * bytes_a_warp)
    rows_on, chunks_on = divmod(launch.grid[0] * (1 if layout.columns else warps), chunks)
    return launch, p.with_fields(rows_on=rows_on * (warps if layout.columns else 1), chunks_on=chunks_on)


def folds(
    kind: Kind, plan: plans.Plan, sweep: int, rows: int, count: int, states: plans.Place, scratch: plans.Scratch,
    into: plans.Place | None = None,
) -> list[Planned]:  # fmt: skip
    """Merge the `count` states of each row that `sweep` left into one, which finishes the row or is written `into`."""
    launches = []
    while True:
        groups = -(-count // CHUNK)
        up = into if groups == 1 else scratch.doubles(rows * kind.states[sweep] * groups)
        p = plan.with_fields(first=sweep, states=states, sums=up, count=count, groups=groups)
        launches.append(launch_of(kind, "kl_fold", p, -(-rows * groups // 8), 8, 0))
        if groups == 1 or up is None:
            return launches
        states, count = up, groups


def sweep(kind: Kind, plan: plans.Plan, layout: plans.Layout, last: int, scratch: plans.Scratch) -> list[Planned]:
    """The launches that run sweeps 0 to last - 1 over all rows."""
    n, chunks = kind.n, -(-kind.n // CHUNK)
    batch = math.prod(layout.shape)
    kind = kind.until(last)

    if n <= NARROW:
        at_once = _rows_at_once(kind, n)
        bytes_a_warp = _narrow_bytes(kind, n, at_once)
        warps = kind.warps(bytes_a_warp)
        plan = plan.with_fields(first=0, last=last, count=at_once, dense=layout.dense, columns=layout.columns)
        return [launch_of(kind, "kl_narrow", plan, -(-batch // (at_once * warps)), warps, warps * bytes_a_warp)]

    if chunks == 1:
        return [units(kind, plan, layout, 0, last)]

    if not layout.columns and chunks <= CHUNK:
        slot, beside = CHUNK * kind.bytes_a_class(), CHUNK * kind.extra_bytes() + 8 * KNOWN
        a_row = _a_block_a_row(kind, batch, chunks, last, slot, beside)
        if a_row:
            warps_a_row, slots, shared = a_row
            p = plan.with_fields(first=0, last=last, slots=slots)
            return [launch_of(kind, "kl_rows", p, batch, warps_a_row, shared)]

    # spread the chunks over the whole device, one launch per sweep
    if plans.AT["stats"] not in plan.places:
        plan = plan.with_fields(stats=scratch.doubles(batch * MAX_STATS))
    plan = plan.with_fields(packed=chunks <= CHUNK)
    launches = []
    for sweep in range(last):
        if not kind.states[sweep]:  # it reads the states of an earlier sweep
            launches.append(units(kind, plan, layout, sweep, sweep + 1))
            continue
        states = scratch.doubles(batch * kind.states[sweep] * chunks)
        plan = plan.with_fields(states=states)
        launches.append(units(kind, plan, layout, sweep, sweep + 1))
        launches += folds(kind, plan, sweep, batch, chunks, states, scratch)
    return launches


def _narrow_bytes(kind: Kind, n: int, count: int) -> int:
    """The shared memory of a warp that computes `count` rows of n classes at a time."""
    classes = -(-(count * n + NARROW) // 8) * 8
    return classes * (kind.bytes_a_class() + kind.extra_bytes()) + count * MAX_STATS * 8


def _rows_at_once(kind: Kind, n: int) -> int:
    """The number of rows that fit in a chunk and leave room for all warps; a multiple of the rows side by side."""
    properties, most = devices.properties(kind.device), kind.most_warps()
    side_by_side = 32
    while side_by_side > 1 and 32 // side_by_side * 4 < n:
        side_by_side //= 2
    count = max(min(CHUNK // n, 64) // side_by_side, 1) * side_by_side
    room = properties.shared_all // most - devices.RESERVED // _WARPS
    while count > side_by_side and _narrow_bytes(kind, n, count) > room:
        count -= side_by_side
    return count


def _a_block_a_row(
    kind: Kind, batch: int, chunks: int, last: int, slot: int, beside: int
) -> tuple[int, int, int] | None:
    """For a block that computes a row in one launch: its warps, the chunks that each holds, and its shared memory.

    None if one launch per sweep over all chunks is faster: if a row that is swept several times leaves too little
    shared memory for other rows, if a row has so few chunks that its fold takes longer than its sweep, or if there are
    too few rows. Decision 16.
    """
    properties, most, fixed = devices.properties(kind.device), kind.most_warps(), kind.row_bytes(chunks)
    enough = most * _BUSY_ENOUGH[0 if last == 1 else 1 + kind.fast]
    if last == 1 and options.LOGITS in kind.spaces and chunks < _FEW_CHUNKS:
        return None
    found = []
    for warps in range(1, _WARPS + 1):
        share = -(-chunks // warps)
        slots = 1 if last == 1 else share
        shared = warps * (slots * slot + beside) + fixed
        blocks = min(properties.blocks(shared, warps, most), batch // properties.multiprocessors)
        busy = blocks * chunks / share  # busy warps per multiprocessor on average: some have a chunk less
        found.append((busy, warps, slots, shared))
    busy, warps, slots, shared = max(found)
    return (warps, slots, shared) if busy >= enough else None


def added_up(
    kind: Kind, name: str, sums: int, values: plans.Place | None, count: int, plan: plans.Plan, scratch: plans.Scratch
) -> list[Planned]:
    """Write the sum of `count` doubles, divided, to the plan's value; or `sums` sums of its weights to its sums."""
    launches = []
    function = kernels.kernel(kind.device, kernels.sum_macros(), name)
    while True:
        groups = max(1, -(-count // CHUNK))
        p = plan.with_fields(states=values, count=count, groups=groups)
        up = None
        if groups > 1:
            up = scratch.doubles(sums * groups)
            p = p.with_fields(sums=up, value=None)
        launches.append((Launch(name, function, (max(1, min(-(-groups // 8), 1 << 16)),), (256,), 0), p))
        if up is None:
            return launches
        plan = plan.with_fields(weights=None)  # the next level adds up the sums of this one
        values, count = up, groups
