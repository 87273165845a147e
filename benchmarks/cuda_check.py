"""What the compiler generates for every CUDA kernel, on every architecture. Needs no GPU.

    python benchmarks/cuda_check.py [--quick] [--arch 90,120] [--only TEXT] [--json FILE]

Fails, with a sentence for each problem, if a kernel does not compile or draws a warning, if it spills (uses any local
memory), if a hot kernel has no 16-byte load from global memory, if it cannot be counted because it has an unknown loop,
or if it takes more instructions than its budget (BUDGETS). Everything else that it prints is for information.

The hot kernels are *counted*: how many instructions a lane issues per class, all loops and the code between them
included, for a full chunk of 1024 classes of ordinary, contiguous, 16-byte aligned rows without weights. The machine
code does not say how often a loop runs, but the `for` line that it comes from does (LOOPS), and line information tells
which line that is. Between the loops, the *way* through a chunk is the path that passes most of these loops, then most
of what must not be left out (`wanted`), and among those paths the shortest: slow paths for rare values are left out.
Each sweep over a chunk has its own way, and their instructions are added up. One instruction of a warp per chunk is
32/1024 of an instruction per class.

The parts are the loops; "per chunk" is everything around them: totals in double, the state, locating the row, the way
into the copies. kl_rows: a chunk that is staged once, in the first sweep, or not at all if that is the only sweep; what
is done once per row (fold, finish, barriers) is left out. kl_units: a row of one chunk with what finishes it, except
writing the value. kl_narrow: eight rows of 128 classes, likewise. An H200 has time for 6.9 instructions per byte read
or written (132 SMs x 128 lanes x 1.755 GHz / 4.3 TB/s).
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from klcore import _cpu
from klcore.backends.cuda import kernels, nvrtc
from klcore.operations import LOSSES, OPERATIONS

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
OLD = 70  # dropped by CUDA 13: needs NVRTC 12; only the resources of its machine code can be read
SHOWN = 100  # messages about problems
QUICK = (75, 90)


class Build(NamedTuple):
    """A cubin: its name, the macros it is compiled with, the kernels in it."""

    name: str
    options: tuple[str, ...]
    kernels: tuple[str, ...]
    hot: tuple[str, ...]  # those that should be limited by memory, not by arithmetic


def every_build() -> Iterator[Build]:
    """What calls compile, over all operations, pairs of spaces and dtypes.

    With the most and the fewest outputs; for hot kernels, also with the most common gradient.
    """
    options, rows = map(importlib.import_module, ("klcore.backends.options", "klcore.backends.rows"))
    sweeping, folding = ("kl_units", "kl_narrow", "kl_rows"), ("kl_summed", "kl_summed_fold", "kl_fold")
    for operation in (*OPERATIONS.values(), *LOSSES.values()):
        for (sx, sy), (dtype, code) in itertools.product(operation.pairs, rows.CODES.items()):
            if "counts" in (sx, sy) and sx != sy and operation.name != "kl_div":  # like kl_div's
                continue
            spaces = options.SPACES[sx], options.SPACES[sy]
            wide = dtype == "float64" or rows.is_wide(operation, spaces)
            build = functools.partial(kernels.macros, operation, spaces, (code, code), wide)
            hot = () if wide or (not operation.is_loss and kernels.is_beside(operation, spaces)) else sweeping
            if operation.form == _cpu.BY_CLASS:  # similar to each other, and many
                label = f"{operation.name} {sx}/{sy} {dtype}"
                if sx == sy and dtype in ("float64", "float32"):
                    yield Build(f"{label} value", build(0, sweeping), sweeping, ())
                    yield Build(f"{label} terms dx dy", build(7, sweeping), sweeping, ())
                    yield Build(f"{label} summed", build(1, folding), folding, ())
                continue
            if operation.is_loss:
                label = f"{operation.name} {sx}/{sy} {dtype}"
                yield Build(f"{label} value", build(0, sweeping), sweeping, hot)
                yield Build(f"{label} dy", build(2, sweeping), sweeping, hot)
                yield Build(f"{label} terms dx dy, factors", build(7, sweeping, factors=True), sweeping, ())
                continue
            label = f"{operation.name} {sx}" + (f"/{sy}" if sy != sx else "") + f" {dtype}"
            yield Build(f"{label} value", build(0, sweeping), sweeping, hot)
            everything = "terms dx" if operation.single else "terms dx dy"
            yield Build(f"{label} {everything}", build(5 if operation.single else 7, sweeping), sweeping, hot)
            if not wide:
                last = operation.gradients[-1]
                yield Build(f"{label} d{last}", build(1 if last == "x" else 2, sweeping), sweeping, hot)
            if dtype == "float32" and "logits" in (sx, sy):
                tempered = build(0, sweeping, tempered="TEMPERATURES")
                yield Build(f"{label} value, temperatures", tempered, sweeping, hot)
            if dtype in ("float64", "float32") or not wide:
                yield Build(f"{label} summed", build(1, folding), folding, ())
    yield Build("sum", kernels.sum_macros(), ("kl_sum", "kl_weights"), ())
    of_rows = ("kl_keys", "kl_others_fold", "kl_classes"), ("kl_by_x", "kl_by_y")
    spreading = ("kl_spread", "kl_spread_fold")
    for entries in of_rows:
        yield Build(f"listed {entries[-1]}", kernels.listed_macros(entries[0], ("float32",) * 2, False), entries, ())
    for dtype in rows.CODES:
        wide = dtype == "float64"
        same, parts = (dtype, dtype), (dtype, "float64")  # parts of a gradient that blocks share
        yield Build(f"listed {dtype} others", kernels.listed_macros("kl_others", same, wide), ("kl_others",), ())
        yield Build(f"listed {dtype} dx", kernels.listed_macros("kl_spread", same, True), spreading, ())
        if not wide:
            yield Build(f"listed {dtype} dy", kernels.listed_macros("kl_spread", same, False), spreading, ())
            yield Build(f"listed {dtype} dy parts", kernels.listed_macros("kl_spread", parts, False), spreading, ())


class Budget(NamedTuple):
    """Instructions per class: the goal, which is printed, and the limit beyond which the check fails."""

    aim: int
    most: int


# For sm_90, by build and kernel, the one for long rows. `most`: the result of NVRTC 13.5, with a margin.
BUDGETS = {
    r"kl_div logits float32 value: kl_rows": Budget(60, 86),
    r"kl_div logits float32 dy: kl_units": Budget(75, 111),
    r"kl_div (probs|log_probs) float32 value: kl_rows": Budget(45, 47),
    r"kl_div (probs|log_probs) float32 dy: kl_rows": Budget(55, 55),
    r"kl_div probs b?float16 value: kl_rows": Budget(40, 40),
    r"kl_div probs b?float16 dy: kl_rows": Budget(48, 44),
    r"kl_div log_probs b?float16 value: kl_rows": Budget(40, 32),
    r"kl_div log_probs b?float16 dy: kl_rows": Budget(48, 40),
    r"kl_div logits b?float16 value: kl_rows": Budget(40, 49),
    r"kl_div logits b?float16 dy: kl_units": Budget(48, 95),
}
BUDGETED = 90

# What the counting knows about src/kl_cuda.cu. A place in the source is written "function: line".
CHUNK = 1024
PER_CHUNK, SWEEP = "per chunk", "the sweep it is in"
PARTS = ("staging", "reading sweep", "writing sweep", "copy-out", PER_CHUNK)
# kernel -> the loop that processes one chunk per iteration; and the loop that runs once per sweep
ROWS = r"int c = warp_of\(\).* {$"
UNITS = {"kl_rows": ROWS, "kl_units": r"unit = after\(p, unit\)", "kl_narrow": r"i64 g = .*groups"}
EACH_SWEEP = rf"{ROWS}|int sweep = "
# how full chunks of aligned rows are swept if one sweep suffices: they take no other path
DIRECT = "terms_direct"
# function of a sweep -> its part, and what belongs to other sweeps: flags decide that, which a way does not see
SWEEPS = {
    "terms_chunk": ("reading sweep", ""),
    DIRECT: ("reading sweep", r"^chunk: |stage_chunk|store_outputs|pad: |kl_units: Row row = locate\(p, r\)"),
    "spread_chunk": ("reading sweep", r"spread_outputs|store_outputs"),
    "spread_outputs": ("writing sweep", r"spread_chunk|stage_chunk|finish"),
    "cross_state": ("reading sweep", r"cross_outputs|store_outputs"),
    "cross_outputs": ("writing sweep", r"cross_state|stage_chunk|finish"),
}
# what ordinary rows without weights do not reach; and what no way may leave out, although it depends on flags
RARE = r"far_chunk: |look_closer: |stage_again: |far_output: |far_row: |p\.weights\.data \?"
WANTED = r"near_term: "
# places of a loop's `for` -> the part that the loop is, and its number of iterations
LOOPS = (
    (r"copy_in: .*\n.*copy_in<16>", "staging", None),  # None: as many as make up a chunk
    (r"copy_out: .*\n.*copy_out<16>", "copy-out", None),
    (r"copy_(in|out): ", PER_CHUNK, 0),
    (r".*for \(int step = 0", SWEEP, 4),  # 256 classes per step
    (r".*for \(int pair = ", SWEEP, 2),  # of steps
    (r".*for \(int r = lane_of\(\) / lanes", SWEEP, 8),  # rows of 128 classes
    (r".*for \(int r = lane_of\(\);", PER_CHUNK, 1),  # one row per lane
    (r".*for \(int means = |spread_once: if \(more\)", SWEEP, 1),  # one, unless it cancels
    (r".*for \(int d = ", PER_CHUNK, 1),  # one batch axis
    (r".*for \(int o = lanes / 2;", PER_CHUNK, 5),
    (r".*for \(int ([eij]|pass|sweep) = ", PER_CHUNK, 0),  # element by element; rare; only flags
)


# --- machine code ----------------------------------------------------------------------------------------------------

# as  /*0b40*/  @!P0 BRA `(.L_x_7) ;
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
GLOBAL = re.compile(r"(?:LDG|LDGSTS|STG|LD|ST)\b")
SHARED = re.compile(r"(?:LDS|STS)\b")
LOAD = re.compile(r"(?:LDG|LDGSTS)\b")
LOCAL = re.compile(r"(?:LDL|STL)\b")
PLACE = re.compile(
    r'//## File "(?:[^"]*[/\\\\])?([^"]+)", line (\d+)'
)  # of the instructions below; those of its callers follow
LABEL = re.compile(r"([.$][\w.$]+):$")
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass
class Instruction:
    address: int
    guarded: bool
    opcode: str
    operands: str
    places: tuple[str, ...] = ()  # in the source: the line itself, then the line that calls it, ...

    @property
    def bytes(self) -> int:
        """What one lane moves from or to global or shared memory."""
        if not GLOBAL.match(self.opcode) and not SHARED.match(self.opcode):
            return 0
        return next((WIDTHS[part] for part in self.opcode.split(".")[1:] if part in WIDTHS), 4)

    @property
    def wide_load(self) -> bool:
        return bool(LOAD.match(self.opcode)) and self.bytes >= 16

    @property
    def wanted(self) -> int:
        """How much a way gains by it: it leaves states and gradients, and is no detour."""
        left = self.opcode.startswith("STS") and self.bytes >= 8 and not self.is_at("^copy_in: ")
        left |= self.opcode.startswith("STG") and self.is_at("^write: ")
        return 0 if self.is_at(RARE) else self.bytes * left + self.is_at(WANTED)

    def is_at(self, pattern: str) -> bool:
        return bool(pattern) and any(re.search(pattern, place) for place in self.places)

    @property
    def target(self) -> int:
        return int(re.findall(r"0x([0-9a-f]+)", self.operands)[-1], 16)

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may be the next one."""
        name = self.opcode.split(".")[0]
        if name == "BRA":  # one with more than a guard as condition has more operands
            return self.guarded or self.opcode != "BRA" or "," in self.operands or "P" in self.operands
        return self.guarded or name not in ("EXIT", "RET", "BRX", "JMX", "JMP", "BPT")


@dataclass
class Block:
    """Instructions without an entry or exit between them."""

    instructions: list[Instruction]
    after: list[int] = field(default_factory=list)  # numbers of blocks


def blocks_of(code: list[Instruction]) -> tuple[list[Block], list[int]]:
    """The control flow graph, and the numbers of the entry blocks: of the kernel, and of what it calls."""
    after = {i.address: n.address for i, n in itertools.pairwise(code)}
    reconverge: dict[str, set[int]] = {}
    for i in code:
        if i.opcode.startswith("BSSY"):
            reconverge.setdefault(i.operands.split(",")[0].strip(), set()).add(i.target)
    jumps: dict[int, list[int]] = {}
    entries = [code[0].address]
    for i in code:
        name = i.opcode.split(".")[0]
        if name in ("BRA", "JMP") or (name == "CALL" and i.guarded and "0x" in i.operands):  # leaves a loop for good
            jumps[i.address] = [i.target]
        elif name == "BRX" and "TARGETS" in i.operands:
            jumps[i.address] = [int(t, 16) for t in re.findall(r"0x([0-9a-f]+)", i.operands.partition("TARGETS")[2])]
        elif name == "CALL" and ".REL" in i.opcode and "0x" in i.operands:
            entries.append(i.target)
        elif name == "BSYNC":  # continues where its BSSY says, which is nearly always the next instruction
            places = reconverge.get(i.operands.strip(), set())
            if places and after.get(i.address) not in places:
                jumps[i.address] = sorted(places)
        if not i.falls_through:
            jumps.setdefault(i.address, [])

    starts = {*entries, *(t for targets in jumps.values() for t in targets)}
    starts |= {after[a] for a in jumps if a in after}
    blocks: list[Block] = []
    number: dict[int, int] = {}
    for i in code:
        if i.address in starts or not blocks:
            number[i.address] = len(blocks)
            blocks.append(Block([]))
        blocks[-1].instructions.append(i)
    for block in blocks:
        last = block.instructions[-1]
        onward = list(jumps.get(last.address, []))
        if last.address in after and (last.falls_through if last.opcode[:5] != "BSYNC" else not onward):
            onward.append(after[last.address])
        block.after = sorted({number[a] for a in onward if a in number})
    return blocks, sorted({number[a] for a in entries if a in number})


def in_order(blocks: list[Block], entries: list[int]) -> list[int]:
    """The reachable blocks, each before those that follow it, except for back edges of loops."""
    order: list[int] = []
    seen: set[int] = set()
    for entry in entries:
        stack = [(entry, iter(blocks[entry].after))] if entry not in seen else []
        seen.add(entry)
        while stack:
            n, rest = stack[-1]
            m = next((m for m in rest if m not in seen), None)
            if m is None:
                order.append(n)
                stack.pop()
            else:
                seen.add(m)
                stack.append((m, iter(blocks[m].after)))
    return order[::-1]


def dominators(blocks: list[Block], entries: list[int], order: list[int]) -> list[set[int]]:
    """For each block, the blocks that every path to it passes through; empty if there is no path."""
    before: dict[int, list[int]] = {n: [] for n in order}
    for n in order:
        for m in blocks[n].after:
            before[m].append(n)
    found: list[set[int]] = [set() for _ in blocks]
    changed = True
    while changed:
        changed = False
        for n in order:
            over = [found[m] for m in before[n] if found[m]]
            new = {n} | (set.intersection(*over) if over and n not in entries else set())
            if new != found[n]:
                found[n] = new
                changed = True
    return found


def loops_of(blocks: list[Block], over: list[set[int]]) -> dict[int, set[int]]:
    """The natural loops: header -> blocks. (Cold code lies after a kernel and jumps back: that is no loop.)"""
    before: dict[int, list[int]] = {n: [] for n in range(len(blocks))}
    for n, block in enumerate(blocks):
        for m in block.after:
            before[m].append(n)
    loops: dict[int, set[int]] = {}
    for n, block in enumerate(blocks):
        for header in block.after:
            if header in over[n]:
                body = loops.setdefault(header, {header})
                stack = [n]
                while stack:
                    m = stack.pop()
                    if m not in body and over[m]:
                        body.add(m)
                        stack += before[m]
    return loops


# --- counting --------------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    loops: int  # number of LOOPS that it passes
    wanted: int
    parts: Counter[str]  # instructions

    def then(self, other: "Way") -> "Way":
        return Way(self.loops + other.loops, self.wanted + other.wanted, self.parts + other.parts)

    def times(self, trips: int) -> "Way":
        return Way(1 + self.loops, trips * self.wanted, Counter({part: trips * n for part, n in self.parts.items()}))

    def worse(self) -> tuple[int, int, int]:
        return -self.loops, -self.wanted, sum(self.parts.values())


NOTHING = Way(0, 0, Counter())


class Counting:
    """The instructions of one kernel for a full chunk of elements of `size` bytes."""

    def __init__(self, code: list[Instruction], size: int) -> None:
        self.size = size
        self.blocks, entries = blocks_of(code)
        self.order = in_order(self.blocks, entries)
        self.loops = loops_of(self.blocks, dominators(self.blocks, entries, self.order))
        self.sweeps = [name for name in SWEEPS if any(i.is_at(f"^{name}: ") for i in code)]
        if DIRECT in self.sweeps:
            self.sweeps = [DIRECT]

    def whole(self, kernel: str) -> dict[str, float]:
        """Instructions per class, by part."""
        units = [h for h in self.loops if any(re.search(UNITS[kernel], jump.places[0]) for jump in self.jumps(h))]
        unit = max(units, key=lambda h: len(self.loops[h]), default=None)
        if unit is None or not self.sweeps:
            raise LookupError("that over the chunks is missing")
        each = self.sweeps == [DIRECT] or self.goes_round_each_sweep(unit)
        parts = (self.each_sweep(unit) if each else self.round(unit)).parts
        return {part: parts[part] * 32 / CHUNK for part in PARTS if parts[part]}

    def round(self, header: int, part: str = PER_CHUNK, sweep: str | None = None) -> Way:
        """The way through one iteration of a loop; `part`: what all of it counts as, except for inner loops of a
        chunk's loop."""
        own, unrelated = SWEEPS[sweep] if sweep else (part, "")
        inner: dict[int, Way] = {}  # all iterations of a loop, at its header
        hidden: set[int] = set()  # the other blocks of these loops
        idle: set[int] = set()  # of loops without iterations
        for h in self.order:  # outer loops come first
            if h not in self.loops or h not in self.loops[header] - hidden - idle - {header}:
                continue
            if sweep is None and self.goes_round_each_sweep(h):
                inner[h] = self.each_sweep(h)
            elif (kind := self.kind(h, unrelated))[1]:
                its = part if part != PER_CHUNK else own if kind[0] == SWEEP else kind[0]
                inner[h] = self.round(h, its, sweep).times(kind[1])
            else:
                idle |= self.loops[h]
                continue
            hidden |= self.loops[h] - {h}

        best: dict[int, Way] = {}  # from a block to the end of the iteration
        for n in reversed(self.order):
            if n not in self.loops[header] - hidden:
                continue
            if n in inner:
                here = inner[n]
                after = {m for k in self.loops[n] for m in self.blocks[k].after} - self.loops[n]
            else:
                code, after = self.blocks[n].instructions, set(self.blocks[n].after)
                wanted = 0 if n in idle else sum(i.wanted for i in code if not i.is_at(unrelated))
                here = Way(0, wanted, Counter({part: len(code)}))
            ways = [best[m] for m in after if m in best] + [NOTHING] * (header in after)
            if ways:
                best[n] = here.then(min(ways, key=Way.worse))
        return best[header]

    def each_sweep(self, header: int) -> Way:
        way = NOTHING
        for sweep in self.sweeps:
            way = way.then(self.round(header, sweep=sweep))
        return way

    def goes_round_each_sweep(self, header: int) -> bool:
        code = (i for n in self.loops[header] for i in self.blocks[n].instructions)
        return any(re.search(EACH_SWEEP, jump.places[0]) for jump in self.jumps(header)) and any(
            i.is_at("|".join(f"^{sweep}: " for sweep in self.sweeps)) for i in code
        )

    def kind(self, header: int, unrelated: str) -> tuple[str, int]:
        """The part of the work that a loop is, and its number of iterations."""
        jumps = self.jumps(header)
        waits = len(self.loops[header]) == 2 and any(  # waits for the other lanes, which have arrived
            i.opcode == "YIELD" for n in self.loops[header] for i in self.blocks[n].instructions
        )
        if waits or any(jump.is_at(RARE) or jump.is_at(unrelated) for jump in jumps):
            return PER_CHUNK, 0
        for pattern, part, trips in LOOPS:
            for jump in jumps:
                if re.match(pattern, "\n".join(jump.places)):
                    return part, self.copies(header, jump) if trips is None else trips
        raise LookupError(jumps[0].places[0] if jumps else "it comes from no line")

    def copies(self, header: int, jump: Instruction) -> int:
        size = 4 if jump.is_at("^unstage_terms: ") else self.size
        moved = (i.bytes for n in self.loops[header] for i in self.blocks[n].instructions if GLOBAL.match(i.opcode))
        return CHUNK * size // 32 // sum(moved)

    def jumps(self, header: int) -> list[Instruction]:
        """The back edges of a loop: the jumps that come from its `for` line."""
        ends = (self.blocks[n] for n in self.loops[header] if header in self.blocks[n].after)
        return [end.instructions[-1] for end in ends if end.instructions[-1].places]


# --- one cubin -------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One build for one architecture; picklable."""

    build: str
    options: tuple[str, ...]
    kernels: tuple[str, ...]
    hot: tuple[str, ...]  # those of `kernels` that must load wide, and are counted
    arch: int

    @property
    def size(self) -> int:
        """Bytes of an element of x, and of y: builds of every_build have one dtype."""
        return (8, 4, 2, 2)[int(next(o for o in self.options if o.startswith("-DKL_X="))[-1])]


@dataclass
class Kernel:
    build: str
    kernel: str
    arch: int
    hot: bool
    registers: int
    stack: int
    local: int
    shared: int
    instructions: int  # 0: not disassembled
    local_accesses: int
    wide_loads: int
    parts: dict[str, float]  # instructions per class; empty: not counted

    @property
    def a_class(self) -> float:
        return sum(self.parts.values())

    @property
    def budget(self) -> Budget | None:
        found = (budget for kernel, budget in BUDGETS.items() if re.fullmatch(kernel, f"{self.build}: {self.kernel}"))
        return next(found, None) if self.arch == BUDGETED else None

    @property
    def cell(self) -> str:
        loads = self.wide_loads if self.instructions else "?"
        return f"{self.registers} {self.stack} {loads} " + (f"{self.a_class:.1f}" if self.parts else "-")


_source = ""
_cuobjdump = ""
_nvdisasm = ""


def prepare(source: str, library: str | None, cuobjdump: str, nvdisasm: str) -> None:
    """In each worker. All compile the same source, even if the files change meanwhile."""
    global _source, _cuobjdump, _nvdisasm
    _source, _cuobjdump, _nvdisasm = source, cuobjdump, nvdisasm
    if library:
        loaded = nvrtc._load(library)
        nvrtc._library = lambda: loaded  # type: ignore[assignment]


def check(job: Job) -> tuple[list[Kernel], list[str]]:
    """The kernels of a build, and their problems."""
    try:
        lines = ("--generate-line-info",) if job.hot else ()
        cubin, log = nvrtc._compile(_source, (*job.options, *lines), job.arch)
    except RuntimeError as error:
        return [], [f"{job.build} fails: {error}"]
    # the compiler's announcements about retired architectures are no warnings about the code
    log = "\n".join(line for line in log.splitlines() if line and not line.startswith("nvrtc: warning: Architectures"))
    wrong = [f"{job.build}: the compiler warns:\n{log}"] if log else []
    found = {}
    for name, usage, code in functions(cubin, _source):
        parts = {}
        if name in job.hot and not code and job.arch != OLD:
            wrong.append(f"{job.build}: {name} cannot be disassembled")
        elif name in job.hot and code:
            try:
                parts = Counting(code, job.size).whole(name)
            except LookupError as error:
                wrong.append(
                    f"{job.build}: {name} cannot be counted, for a loop that is not known here: {error.args[0]}"
                )
        found[name] = kernel = Kernel(
            build=job.build,
            kernel=name,
            arch=job.arch,
            hot=name in job.hot,
            registers=usage["REG"],
            stack=usage["STACK"],
            local=usage["LOCAL"],
            shared=usage["SHARED"],
            instructions=len(code),
            local_accesses=sum(bool(LOCAL.match(i.opcode)) for i in code),
            wide_loads=sum(i.wide_load for i in code),
            parts=parts,
        )
        if kernel.stack or kernel.local or kernel.local_accesses:
            wrong.append(f"{job.build}: {name} spills registers, or keeps an array, in local memory")
        if kernel.hot and kernel.instructions and not kernel.wide_loads:
            wrong.append(f"{job.build}: {name} is hot and has no 16-byte load from global memory")
        if kernel.budget and kernel.a_class > kernel.budget.most:
            took = f"{kernel.a_class:.1f} instructions per class, more than the {kernel.budget.most} that it may take"
            wrong.append(f"{job.build}: {name} takes {took}; see BUDGETS")
    wrong += [f"{job.build}: there is no kernel {name}" for name in job.kernels if name not in found]
    return [found[name] for name in job.kernels if name in found], wrong


def functions(cubin: bytes, source: str) -> Iterator[tuple[str, dict[str, int], list[Instruction]]]:
    """Name, resources and machine code; no code if the disassembler no longer knows the architecture."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "klcore.cubin")
        path.write_bytes(cubin)
        resources = [_cuobjdump, "--dump-resource-usage", str(path)]
        lines = [_nvdisasm, "--print-code", "--print-line-info-inline", str(path)]
        done, sass = (subprocess.run(command, capture_output=True, text=True) for command in (resources, lines))
    if done.returncode:
        raise SystemExit(f"cuobjdump fails: {done.stderr.strip() or done.stdout.strip()}")
    usage = {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        for name, line in re.findall(r"Function (\S+):\s*\n\s*(.*)", done.stdout)
    }
    code = dict(read(sass.stdout, places_of(source)))
    for name in usage:
        yield name, usage[name], code.get(name, [])


def places_of(source: str) -> dict[tuple[str, int], str]:
    """(file, line) -> "function: line"; the first line of a function names it."""
    places: dict[tuple[str, int], str] = {}
    file, number, function = "", 0, ""
    for line in source.splitlines():
        if mark := re.match(r'#line (\d+) "(.*)"', line):
            file, number = mark[2], int(mark[1]) - 1
            continue
        number += 1
        if start := re.search(r"\b(?:KL_DEVICE|KL_FN|__global__) .*?\b(?!__)(\w+)\(", line):
            function = start[1]
        places[file, number] = f"{function}: {line.strip()}"
    return places


def read(sass: str, places: dict[tuple[str, int], str]) -> Iterator[tuple[str, list[Instruction]]]:
    """The kernels that nvdisasm prints."""
    for text in re.split(r"^\.text\.", sass, flags=re.MULTILINE)[1:]:
        name, _, lines = text.partition(":\n")
        yield name, instructions(lines, places)


def instructions(text: str, places: dict[tuple[str, int], str]) -> list[Instruction]:
    code: list[Instruction] = []
    labels: dict[str, str] = {}
    waiting: list[str] = []
    at: list[str] = []
    last = ""
    for line in text.splitlines():
        if found := PLACE.search(line):
            at = [*(at if "//##" in last else []), places.get((found[1], int(found[2])), "")]
        elif found := LABEL.match(line):
            waiting.append(found[1])
        elif found := INSTRUCTION.match(line):
            labels |= dict.fromkeys(waiting, "0x" + found[1])
            waiting = []
            code.append(Instruction(int(found[1], 16), bool(found[2]), found[3], found[4].strip(), tuple(at)))
        last = line
    for i in code:
        i.operands = re.sub(r"[.$]\w[\w.$]*", lambda label: labels.get(label[0], label[0]), i.operands)
    return code


# --- all of them -----------------------------------------------------------------------------------------------------


def jobs_for(builds: Iterable[Any], archs: Iterable[int]) -> Iterator[Job]:
    archs = tuple(archs)
    for build in builds:
        for arch in archs:
            yield Job(build.name, build.options, build.kernels, build.hot, arch)


def tool(name: str) -> str:
    found = shutil.which(name)
    if not found:
        with contextlib.suppress(ImportError):
            found = importlib.import_module("cuda.pathfinder").find_nvidia_binary_utility(name)
    if not found:
        sys.exit(f"{name} is not installed; it comes with: pip install cuda-pathfinder nvidia-cuda-{name}")
    return found


def nvrtc_12() -> str | None:
    """An NVRTC of CUDA 12, which pip installs beside the one of CUDA 13."""
    try:
        spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        return None
    folders = spec.submodule_search_locations or [] if spec else []
    files = (path for folder in folders for path in Path(folder).glob("*/*nvrtc*"))
    return next((str(f) for f in files if re.search(r"nvrtc(\.so\.12|64_120_0\.dll)$", f.name)), None)


def run(jobs: list[Job]) -> tuple[list[Kernel], list[str]]:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    source = nvrtc.source()
    kernels: list[Kernel] = []
    wrong: dict[str, list[int]] = {}  # problem -> indices of architectures
    with tqdm(total=len(jobs), desc="compile", disable=None) as bar:
        for old in (False, True):
            mine = [job for job in jobs if (job.arch not in nvrtc.supported()) == old]
            if not mine:
                continue
            library = nvrtc_12() if old else None
            arguments = (source, library, tool("cuobjdump"), tool("nvdisasm"))
            with ProcessPoolExecutor(min(processors, len(mine)), spawn, prepare, arguments) as pool:
                futures = {pool.submit(check, job): job for job in mine}
                for future in as_completed(futures):
                    some, errors = future.result()
                    kernels += some
                    for error in errors:
                        wrong.setdefault(error, []).append(futures[future].arch)
                    bar.update()
    place = {(job.build, job.arch): n for n, job in enumerate(jobs)}
    kernels.sort(key=lambda k: place[k.build, k.arch])
    return kernels, sorted(f"sm_{', '.join(map(str, sorted(archs)))}: {error}" for error, archs in wrong.items())


def table(kernels: list[Kernel]) -> Iterator[str]:
    archs = sorted({k.arch for k in kernels})
    lines: dict[str, dict[int, str]] = {}
    for k in kernels:
        name = k.kernel if k.kernel == k.build else f"{k.build}: {k.kernel}"
        lines.setdefault(("* " if k.hot else "  ") + name, {})[k.arch] = k.cell
    first = max(map(len, lines), default=0)
    widths = {a: max(6, *(len(cells.get(a, "")) for cells in lines.values())) for a in archs}
    yield "registers, bytes of stack, 16-byte loads from global memory, instructions per class:"
    yield " " * first + "".join(f"  {f'sm_{a}':>{widths[a]}}" for a in archs)
    for name, cells in lines.items():
        yield f"{name:{first}}" + "".join(f"  {cells.get(a, ''):>{widths[a]}}" for a in archs)
    yield "* hot"


def counts(kernels: list[Kernel]) -> Iterator[str]:
    """Where the instructions are, on one architecture."""
    archs = {k.arch for k in kernels if k.parts}
    arch = BUDGETED if BUDGETED in archs else max(archs, default=0)
    counted = [k for k in kernels if k.arch == arch and k.parts]
    first = max((len(f"{k.build}: {k.kernel}") for k in counted), default=0)
    if counted:
        yield f"{f'instructions per class, sm_{arch}':{first}}" + "".join(f"  {name:>13}" for name in (*PARTS, "all"))
    for k in counted:
        figures = [f"{k.parts[part]:.1f}" if part in k.parts else "" for part in PARTS] + [f"{k.a_class:.1f}"]
        verdict = f"  {'met' if k.a_class <= k.budget.aim else 'missed'}: {k.budget.aim}" if k.budget else ""
        yield f"{f'{k.build}: {k.kernel}':{first}}" + "".join(f"  {figure:>13}" for figure in figures) + verdict


def is_common(build: Any) -> bool:
    """Whether --quick includes it: hot, and of one space in float32, or else with one output at a time and not both a
    pair of spaces and 16 bits. Of lists, what has no dtype, or float32."""
    pair, narrow = "/" in build.name, "16" in build.name
    if build.name.startswith("listed"):
        return not narrow and "64" not in build.name
    return build.hot and ("terms" not in build.name or not (pair or narrow)) and not (pair and narrow)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", help="such as 90,120; all: " + ",".join(map(str, ARCHITECTURES)))
    parser.add_argument("--only", metavar="TEXT", default="", help="builds whose name contains this")
    parser.add_argument("--quick", action="store_true", help="the most common hot builds, on few architectures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures there")
    args = parser.parse_args()

    archs = [int(a) for a in args.arch.split(",")] if args.arch else list(QUICK if args.quick else ARCHITECTURES)
    if OLD in archs and OLD not in nvrtc.supported() and not nvrtc_12():
        print(f"sm_{OLD} is left out: it needs pip install nvidia-cuda-nvrtc-cu12")
        archs.remove(OLD)
    builds = list(every_build())
    chosen = [b for b in builds if args.only in b.name and (not args.quick or is_common(b))]
    if not chosen or not archs:
        sys.exit("nothing to check")
    kernels, wrong = run(list(jobs_for(chosen, archs)))
    print(*table(kernels), "", *counts(kernels), sep="\n")
    print(f"{len(kernels)} kernels, compiled by NVRTC {'.'.join(map(str, nvrtc.version()))}")
    if args.json:
        args.json.write_text(json.dumps([asdict(k) for k in kernels], indent=1) + "\n")
    if wrong:
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        sys.exit("\n".join(["", *wrong[:SHOWN], *more]))


if __name__ == "__main__":
    main()
