"""What the compiler made of every CUDA kernel, on every architecture. Needs no GPU.

    python benchmarks/cuda_check.py [--quick] [--arch 90,120] [--only TEXT] [--json FILE]

Fails, with a sentence each, if a kernel does not compile or draws a warning, if it spills (uses any local memory), or
if one of the hot ones has no 16-byte load from global memory. Everything else it prints is for reading.

The *hot loop* of a kernel is the innermost loop with the most floating-point instructions. Its *way* is the path once
round that loads the most by accesses of 8 bytes or more, and of those the shortest:
what most rows take, slow paths for rare values left out. The *writing way* is the one that loads and stores the most.
Instructions on the way, divided by the bytes it moves, say what the kernel waits for: on an H200 memory keeps up with
6.9 instructions per byte (132 SMs x 128 lanes x 1.755 GHz / 4.3 TB/s); with more, arithmetic is the limit. The bytes
are those of global memory, or, in a loop that touches none, of shared memory, where others have copied them. A loop
without such accesses has no figure.
"""

import argparse
import contextlib
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from klcore.backends import nvrtc

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
OLD = 70  # CUDA 13 has dropped it: needs NVRTC 12; of its machine code no more than the resources can be read
PER_BYTE = 6.9
FEW = 16  # floating-point instructions of a loop that only adds up, or copies
SHOWN = 100  # sentences about what is wrong
QUICK = (75, 90)
COMMON = (" value", " dx", " dy", " cluster")  # ends of the names of the builds that --quick takes, if hot
ELEMENTS = {"kl_units": 8, "kl_rows": 8, "kl_narrow": 4}  # that one lane treats on the way round
BUDGETS = {  # bytes of global memory per element
    "value, two float32 rows": 8,
    "value, two 16-bit rows": 4,
    "value and one gradient, float32": 12,
    "value and one gradient, 16-bit": 6,
}


# --- machine code ----------------------------------------------------------------------------------------------------

# as  /*0b40*/  @!P0 BRA 0xee0 ;
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
FLOATING = re.compile(r"(?:FFMA|FADD|FMUL|DFMA|DADD|DMUL)2?\b|MUFU\b")
GLOBAL = re.compile(r"(?:LDG|LDGSTS|STG|LD|ST)\b")
SHARED = re.compile(r"(?:LDS|STS)\b")
LOAD = re.compile(r"(?:LDG|LDGSTS)\b")
LOCAL = re.compile(r"(?:LDL|STL)\b")
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass
class Instruction:
    address: int
    guarded: bool
    opcode: str
    operands: str

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
    def target(self) -> int:
        return int(re.findall(r"0x([0-9a-f]+)", self.operands)[-1], 16)

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may be the next one."""
        name = self.opcode.split(".")[0]
        if name == "BRA":  # one that depends on more than a guard has more operands
            return self.guarded or self.opcode != "BRA" or "," in self.operands or "P" in self.operands
        return self.guarded or name not in ("EXIT", "RET", "BRX", "JMX", "JMP", "BPT")


@dataclass
class Block:
    """Instructions without a way in or out between them."""

    instructions: list[Instruction]
    after: list[int] = field(default_factory=list)  # numbers of blocks

    @cached_property
    def wide_loads(self) -> int:
        return sum(i.bytes for i in self.instructions if i.bytes >= 8 and i.opcode.startswith("LD"))

    @cached_property
    def wide_bytes(self) -> int:
        return sum(i.bytes for i in self.instructions if i.bytes >= 8)


@dataclass
class Way:
    instructions: int
    global_bytes: int
    shared_bytes: int

    @property
    def per_byte(self) -> float:
        return self.instructions / (self.global_bytes or self.shared_bytes)


@dataclass
class Loop:
    """The hot loop."""

    instructions: int  # all, of slow paths and of loops inside too
    floating: int
    mufu: int
    wide_loads: int  # from global memory
    way: Way | None
    writing_way: Way | None  # if it is another


def count(instructions: Iterable[Instruction], pattern: re.Pattern[str]) -> int:
    return sum(bool(pattern.match(i.opcode)) for i in instructions)


def blocks_of(code: list[Instruction]) -> tuple[list[Block], list[int]]:
    """The control flow graph, and the numbers of the blocks where it is entered: the kernel, and what it calls."""
    after = {i.address: n.address for i, n in itertools.pairwise(code)}
    reconverge: dict[str, set[int]] = {}
    for i in code:
        if i.opcode.startswith("BSSY"):
            reconverge.setdefault(i.operands.split(",")[0].strip(), set()).add(i.target)
    jumps: dict[int, list[int]] = {}
    entries = [code[0].address]
    for i in code:
        name = i.opcode.split(".")[0]
        if name in ("BRA", "JMP"):
            jumps[i.address] = [i.target]
        elif name == "BRX" and "TARGETS" in i.operands:
            jumps[i.address] = [int(t, 16) for t in re.findall(r"0x([0-9a-f]+)", i.operands.partition("TARGETS")[2])]
        elif name == "CALL" and ".REL" in i.opcode and "0x" in i.operands:
            entries.append(i.target)
        elif name == "BSYNC":  # goes on where its BSSY said, which is nearly always the next instruction
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


def dominators(blocks: list[Block], entries: list[int]) -> list[set[int]]:
    """For each block, those that every way to it passes through; empty if there is none."""
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
    order.reverse()
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
    """The natural loops: header -> blocks. (Cold code stands behind a kernel and jumps back: that makes no loop.)"""
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


def way_round(
    blocks: list[Block], over: list[set[int]], header: int, body: set[int], wide: Callable[[Block], int]
) -> Way | None:
    """The path once round that is the widest, and of those the shortest."""
    best: dict[int, tuple[int, int, list[int]] | None] = {}  # block -> (- width, instructions, blocks) to the end

    def from_block(n: int) -> tuple[int, int, list[int]] | None:
        if n not in best:
            best[n] = None  # also for whom a graph that is no proper loop leads back here
            onward: list[tuple[int, int, list[int]]] = [(0, 0, [])] if header in blocks[n].after else []
            onward += [w for m in blocks[n].after if m in body and m not in over[n] and (w := from_block(m))]
            if onward:
                width, instructions, path = min(onward)
                best[n] = (width - wide(blocks[n]), instructions + len(blocks[n].instructions), [n, *path])
        return best[n]

    found = from_block(header)
    if not found or not found[0]:
        return None
    path = [i for n in found[2] for i in blocks[n].instructions]
    return Way(len(path), *(sum(i.bytes for i in path if kind.match(i.opcode)) for kind in (GLOBAL, SHARED)))


def hot_loop(code: list[Instruction]) -> Loop | None:
    blocks, entries = blocks_of(code)
    over = dominators(blocks, entries)
    loops = loops_of(blocks, over)

    def own(header: int) -> int:
        inside = set().union(*(b for h, b in loops.items() if h != header and h in loops[header]), set())
        return sum(count(blocks[n].instructions, FLOATING) for n in loops[header] - inside)

    if not loops:
        return None
    innermost = [h for h in loops if not any(o != h and o in loops[h] for o in loops)]
    header = max((h for h in innermost if own(h) >= FEW), key=own, default=max(loops, key=own))
    all_of_it = [i for n in loops[header] for i in blocks[n].instructions]
    way, writing = (
        way_round(blocks, over, header, loops[header], wide)
        for wide in (lambda block: block.wide_loads, lambda block: block.wide_bytes)
    )
    return Loop(
        instructions=len(all_of_it),
        floating=count(all_of_it, FLOATING),
        mufu=count(all_of_it, re.compile("MUFU")),
        wide_loads=sum(i.wide_load for i in all_of_it),
        way=way,
        writing_way=writing if writing != way else None,
    )


# --- one cubin -------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One build for one architecture; picklable."""

    build: str
    options: tuple[str, ...]
    kernels: tuple[str, ...]
    hot: tuple[str, ...]  # those of `kernels` that have to load wide
    arch: int


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
    mufu: int
    loop: Loop | None
    per_byte: list[float]  # on the way, and on the writing way
    per_element: list[float]

    @property
    def cell(self) -> str:
        if not self.instructions:
            return f"{self.registers} {self.stack} ? ? ?"
        loop = "-" if self.loop is None else str(self.loop.instructions)
        figures, unit = (self.per_element, "e") if self.per_element else (self.per_byte, "B")
        speed = ",".join(f"{x:.1f}" for x in figures) + f"/{unit}" if figures else "-"
        return f"{self.registers} {self.stack} {loop} {self.wide_loads} {speed}"


_source = ""
_cuobjdump = ""
_path = ""


def prepare(source: str, library: str | None, cuobjdump: str, path: str) -> None:
    """In each worker. All compile the same source, whatever happens to the files meanwhile."""
    global _source, _cuobjdump, _path
    _source, _cuobjdump, _path = source, cuobjdump, path
    if library:
        loaded = nvrtc._load(library)
        nvrtc._library = lambda: loaded  # type: ignore[assignment]


def check(job: Job) -> tuple[list[Kernel], list[str]]:
    """The kernels of a build, and what is wrong with them."""
    try:
        cubin, log = nvrtc._compile(_source, job.options, job.arch)
    except RuntimeError as error:
        return [], [f"{job.build} fails: {error}"]
    # the compiler's own retirement plans are no warning about the code
    log = "\n".join(line for line in log.splitlines() if line and not line.startswith("nvrtc: warning: Architectures"))
    wrong = [f"{job.build}: the compiler warns:\n{log}"] if log else []
    found = {}
    for name, usage, code in functions(cubin):
        found[name] = kernel = describe(job, name, usage, code)
        if kernel.stack or kernel.local or kernel.local_accesses:
            wrong.append(f"{job.build}: {name} spills registers, or keeps an array, in local memory")
        if kernel.hot and kernel.instructions and not kernel.wide_loads:
            wrong.append(f"{job.build}: {name} is hot and has no 16-byte load from global memory")
    wrong += [f"{job.build}: there is no kernel {name}" for name in job.kernels if name not in found]
    return [found[name] for name in job.kernels if name in found], wrong


def functions(cubin: bytes) -> Iterator[tuple[str, dict[str, int], list[Instruction]]]:
    """Name, resources and machine code; without code where the disassembler has forgotten the architecture."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "klcore.cubin")
        path.write_bytes(cubin)
        command = [_cuobjdump, str(path), "--dump-resource-usage"]
        for tail in (["--dump-sass"], []):
            done = subprocess.run([*command, *tail], capture_output=True, text=True, env=os.environ | {"PATH": _path})
            if "is deprecated" not in done.stderr:
                break
    if done.returncode:
        raise SystemExit(f"cuobjdump fails: {done.stderr.strip() or done.stdout.strip()}")
    resources, _, sass = done.stdout.partition("code for sm_")
    usage = {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        for name, line in re.findall(r"Function (\S+):\s*\n\s*(.*)", resources)
    }
    code: dict[str, list[Instruction]] = {}
    for text in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]:
        found = INSTRUCTION.findall(text)
        code[text.split(maxsplit=1)[0]] = [Instruction(int(a, 16), bool(g), o, rest.strip()) for a, g, o, rest in found]
    for name in usage:
        yield name, usage[name], code.get(name, [])


def describe(job: Job, name: str, usage: dict[str, int], code: list[Instruction]) -> Kernel:
    loop = hot_loop(code) if code else None
    elements = ELEMENTS.get(name)
    ways = [way for way in (loop.way, loop.writing_way) if way] if loop else []
    lengths = [way.instructions for way in ways] or ([loop.instructions] if loop else [])
    return Kernel(
        build=job.build,
        kernel=name,
        arch=job.arch,
        hot=name in job.hot,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=usage["SHARED"],
        instructions=len(code),
        local_accesses=count(code, LOCAL),
        wide_loads=sum(i.wide_load for i in code),
        mufu=count(code, re.compile("MUFU")),
        loop=loop,
        per_byte=[way.per_byte for way in ways],
        per_element=[length / elements for length in lengths] if elements else [],
    )


# --- all of them -----------------------------------------------------------------------------------------------------


def jobs_for(builds: Iterable[Any], archs: Iterable[int]) -> Iterator[Job]:
    archs = tuple(archs)
    for build in builds:
        for arch in archs:
            if arch >= build.oldest:
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
    """An NVRTC of CUDA 12, which pip installs beside that of CUDA 13."""
    try:
        spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        return None
    folders = spec.submodule_search_locations or [] if spec else []
    files = (path for folder in folders for path in Path(folder).glob("*/*nvrtc*"))
    return next((str(f) for f in files if re.search(r"nvrtc(\.so\.12|64_120_0\.dll)$", f.name)), None)


def run(jobs: list[Job]) -> tuple[list[Kernel], list[str]]:
    path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ.get("PATH", "")])
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    source = nvrtc.source()
    kernels: list[Kernel] = []
    wrong: dict[str, list[int]] = {}  # what -> on which architectures
    with tqdm(total=len(jobs), desc="compile", disable=None) as bar:
        for old in (False, True):
            mine = [job for job in jobs if (job.arch not in nvrtc.supported()) == old]
            if not mine:
                continue
            library = nvrtc_12() if old else None
            arguments = (source, library, tool("cuobjdump"), path)
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
    yield "registers, bytes of stack, instructions of the hot loop, 16-byte loads from global memory, instructions per"
    yield "byte (B) or element (e) on the way and, if it is another, on the writing way:"
    yield " " * first + "".join(f"  {f'sm_{a}':>{widths[a]}}" for a in archs)
    for name, cells in lines.items():
        yield f"{name:{first}}" + "".join(f"  {cells.get(a, ''):>{widths[a]}}" for a in archs)
    yield f"* hot. An H200 has time for {PER_BYTE} instructions per byte; per element: " + "; ".join(
        f"{name} {PER_BYTE * size:.1f}" for name, size in BUDGETS.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", help="as 90,120; all: " + ",".join(map(str, ARCHITECTURES)))
    parser.add_argument("--only", metavar="TEXT", default="", help="builds whose name contains this")
    parser.add_argument("--quick", action="store_true", help="the commonest hot builds, on few architectures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures there")
    args = parser.parse_args()

    archs = [int(a) for a in args.arch.split(",")] if args.arch else list(QUICK if args.quick else ARCHITECTURES)
    if OLD in archs and OLD not in nvrtc.supported() and not nvrtc_12():
        print(f"sm_{OLD} is left out: it needs pip install nvidia-cuda-nvrtc-cu12")
        archs.remove(OLD)
    builds = list(importlib.import_module("klcore.backends.cuda").every_build())
    chosen = [b for b in builds if args.only in b.name and (not args.quick or (b.hot and b.name.endswith(COMMON)))]
    if not chosen or not archs:
        sys.exit("nothing to check")
    kernels, wrong = run(list(jobs_for(chosen, archs)))
    print(*table(kernels), sep="\n")
    print(f"{len(kernels)} kernels, compiled by NVRTC {'.'.join(map(str, nvrtc.version()))}")
    if args.json:
        args.json.write_text(json.dumps([asdict(k) for k in kernels], indent=1) + "\n")
    if wrong:
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        sys.exit("\n".join(["", *wrong[:SHOWN], *more]))


if __name__ == "__main__":
    main()
