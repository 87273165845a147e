"""Check and measure everything about klcore on this machine's GPU, the most valuable first.

    python benchmarks/gpu_run.py OUT [--seconds N] [--second] [--only STAGE]... [--carry DIR] [--emulated]

For a GPU borrowed for a quarter of an hour: `--seconds 520` ends in time whatever happens, and `--second --seconds
170`, called right after it on the same machine, does what failed or was not reached. `make gpu-carry` prepares the
files for this. `make gpu-check` is the same for owners of a GPU: the stages that matter to them, without a limit.

environment    GPU, driver, clocks, versions; prepared files are unpacked; klcore is built in the background if needed
first-light    every family of kernels against float64. If that fails, the rest is not run
ceilings       the limits of memory, and the cost of a small call
alone          speed of klcore, beside those ceilings: shapes, operations, pairs of spaces
profile        launches under ncu: what limits the speed of a kernel
bits           every operation, pair of spaces and dtype against the CPU
sanitizer      the four tools of compute-sanitizer at the same time, on every kernel in every role
peers          speed beside other libraries, in the same rounds
tests          the tests of the CUDA kernels
large          arrays of more than 2^31 elements
more           more cases beside other libraries, and klcore over row lengths

Each stage has its own processes, which end with it: a kernel that kills its process ends nothing else. Every result is
immediately written as a line of OUT/results.jsonl; processes write to OUT/log.txt, each tool to its own file, and
OUT/table.txt is printed last. The exit status is 1 if something failed. `make gpu-report` turns such folders into
pages.

--emulated runs everything on tests/emulator, with tiny arrays: it only shows that this command works.
"""

import argparse
import contextlib
import ctypes
import datetime
import hashlib
import importlib
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_lines
import report
from gpu_lines import each, known, say, sentence

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
KEEP = ROOT / "build" / "gpu-run"  # kept between calls
LIBRARIES = (
    "klcore", "numpy", "cupy-cuda13x", "cupy-cuda12x", "ml_dtypes", "torch", "triton", "jax", "liger_kernel",
    "nvidia-cuda-nvrtc",
)  # fmt: skip
NEEDED_BY_TESTS = ("pytest", "hypothesis", "mpmath", "ml_dtypes")
TESTS = (
    "tests/test_cuda.py", "tests/test_cuda_topk.py", "tests/test_torch_cuda.py", "tests/test_losses.py",
    "tests/test_dispatch.py",
)  # fmt: skip
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TOOL_FOUND = 77  # exit status of compute-sanitizer if kernels have errors
SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables",
    "SchedulerStats", "WarpStateStats", "Occupancy", "LaunchStats",
)  # fmt: skip
RESTARTS = 6  # of a process that died
LAST = 8.0  # seconds kept for the table


class Skip(Exception):
    """A stage cannot run here, with the reason."""


class Stop(Exception):
    """Raised if everything that follows would be worthless."""


@dataclass
class Run:
    """One call of this command."""

    out: Path
    emulated: bool
    end: float
    carry: Path
    keep: Path
    site: Path  # klcore, installed from these sources, if it is built during the run
    deadline: float = 0.0  # of the current stage
    out_of_time: bool = False  # in the current stage
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    builder: subprocess.Popen[bytes] | None = None

    def start(self, words: Sequence[str], to: str = "log.txt") -> subprocess.Popen[bytes]:
        """Start a process in a separate session, so that it can be killed with everything that it started."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment |= {"KLCORE_GPU_DEADLINE": str(self.deadline), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        with open(self.out / to, "ab", buffering=0) as log:
            log.write(f"$ {shlex.join(words)}\n".encode())
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        self.children.append(process)
        return process

    def work(self, *arguments: str) -> subprocess.Popen[bytes]:
        return self.start(self.words(*arguments))

    def words(self, *arguments: str) -> list[str]:
        emulated = ["--emulated"] if self.emulated else []
        return [sys.executable, str(HERE / "gpu_run.py"), str(self.out), *emulated, "--work", *arguments]

    def wait(self, process: subprocess.Popen[bytes]) -> int | None:
        """Its exit status; None if it was killed because the stage was out of time."""
        try:
            status = process.wait(None if self.deadline == math.inf else max(0.1, self.deadline - time.time()))
        except subprocess.TimeoutExpired:
            status, self.out_of_time = None, True
        self.kill(process)
        return status

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with all processes that it started
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs must not end the run
            process.wait(5)
        if process in self.children:
            self.children.remove(process)

    def items(self, stage: str, processes: int = 1) -> list[str]:
        """Have workers go through a stage's items, and start others for those that died; returns what else went
        wrong."""
        failures = []
        running = {k: self.work(stage, f"{k}/{processes}") for k in range(processes)}
        left = RESTARTS
        while running:
            time.sleep(0.02)
            over = time.time() > self.deadline
            for shard, process in list(running.items()):
                if process.poll() is None and not over:
                    continue
                status = self.wait(process)
                del running[shard]
                if not status:
                    continue
                items = [line for line in known() if line["stage"] == stage and "item" in line]
                begun = {line["item"] for line in items if line.get("begin") == process.pid}
                for item in begun - {line["item"] for line in items if "begin" not in line}:
                    say(stage=stage, item=item, died=f"its process ended, exit status {status}")
                left -= 1
                if begun and left >= 0:
                    running[shard] = self.work(stage, f"{shard}/{processes}")
                else:
                    failures.append(f"a process ended, exit status {status}; why stands in log.txt")
        return failures

    def needs_core(self) -> None:
        """Wait until klcore's extension exists: results are compared with the CPU."""
        if self.builder is None:
            return
        try:
            status = self.builder.wait(None if self.deadline == math.inf else max(0.1, self.deadline - time.time()))
        except subprocess.TimeoutExpired:  # a later stage may still find it
            raise RuntimeError("klcore is still being built") from None
        if status:
            raise RuntimeError("klcore could not be built; why stands in log.txt")


def processes() -> int:
    """The number of processes at the same time: they mostly use the CPU, and all share the GPU."""
    return max(2, min(14, (os.cpu_count() or 2) - 2))


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    if found is None:
        raise Skip(f"{name} was not found: it comes with the CUDA toolkit")
    return found


# ---- the environment -------------------------------------------------------------------------------------------------


def source_digest() -> str:
    """A digest of everything that makes up klcore: a commit identifies it only with git, and without local changes."""
    digest = hashlib.sha256()
    for pattern in ("src/*.h", "src/kl_isa_*.cpp", "src/*.cu", "src/*.pyx", "klcore/**/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            if "_src" not in path.parts:
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def kernel_digest() -> str:
    """A digest of everything that makes up a kernel except compiler and options: prepared files must have the same
    one."""
    nvrtc = importlib.import_module("klcore.backends.cuda.nvrtc")
    return hashlib.sha256(repr((nvrtc.source(), nvrtc._OPTIONS)).encode()).hexdigest()[:16]


def commit() -> str:
    """The commit, or KLCORE_COMMIT where there is no git."""
    given = os.environ.get("KLCORE_COMMIT")
    if given:
        return given
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return "unknown"


def prepare_paths(keep: Path, site: Path) -> None:
    """For this process and its children: use klcore as installed, or else from this tree, without its extension.

    What is built and installed during the run comes first, as soon as it exists.
    """
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    paths = [str(site), str(keep / "extra"), str(HERE), *given]
    if importlib.util.find_spec("klcore") is None:
        paths.append(str(lay_out(keep / f"plain-{site.name}")))
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def lay_out(folder: Path) -> Path:
    """Lay out klcore like an installed package, with its sources and a version."""
    package = folder / "klcore"
    package.mkdir(parents=True, exist_ok=True)
    entries = {path.name: path for path in (ROOT / "klcore").iterdir()} | {"_src": ROOT / "src"}
    for name, path in entries.items():
        if not (package / name).exists():
            (package / name).symlink_to(path)
    version = re.search('^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    about = folder / "klcore-0.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: klcore\nVersion: {version and version[1]}\n")
    return folder


def unpack(run: Run) -> str:
    """Unpack the prepared files into run.keep; returns what became of them."""
    manifest = run.carry / "manifest.json"
    if not manifest.exists():
        return "nothing was carried: kernels are compiled as they are needed"
    os.environ["KLCORE_CACHE_DIR"] = str(run.keep / "cache")
    about = json.loads(manifest.read_text())
    if about["kernels"] != kernel_digest():
        return f"the kernels in {run.carry.name} are of other sources: they are compiled as they are needed"
    mark = run.keep / "cache" / f"unpacked-{about['kernels']}"
    if not mark.exists():
        with tarfile.open(run.carry / "cache.tar.xz") as archive:
            archive.extractall(run.keep / "cache", filter="data")
        mark.touch()
    return f"{about['cubins']} kernels were carried, compiled by NVRTC {about['nvrtc']}"


def start_build(run: Run) -> str:
    """Install the prepared wheels, and build klcore's extension if it is missing, while stages run that do not need
    it."""
    pip = f"{shlex.quote(sys.executable)} -m pip install -q --no-index --no-deps --upgrade --target"
    tools, extra, part = (shlex.quote(str(run.keep / name)) for name in ("tools", "extra", "part"))
    built = importlib.util.find_spec("klcore._cpu") is not None
    lines = []
    for folder, names, needed in ((extra, "liger_kernel-*.whl", True), (tools, "[!l]*.whl", not built)):
        wheels = sorted(map(str, run.carry.glob(names)))
        if wheels and needed:  # a useless wheel must not prevent the rest from being built
            lines.append(f"{pip} {folder} {shlex.join(wheels)} || true")
    if not built:  # atomically: other processes look there meanwhile
        lines.append(f"PYTHONPATH={tools} {pip} {part} --no-build-isolation {shlex.quote(str(ROOT))}")
        lines.append(f"mv {part} {shlex.quote(str(run.site))}")
    if lines:
        run.builder = run.start(["bash", "-ec", "\n".join(lines)])
    return "klcore is built already" if built else "klcore is built in the background"


def environment(run: Run) -> list[str]:
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUPY_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR"):
        os.environ.setdefault(variable, str(run.keep / variable.lower()))  # the stages compile for each other
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    say(stage="environment", note=unpack(run))
    say(stage="environment", note=start_build(run))
    status = run.wait(run.work("environment"))
    found = [line["found"] for line in known() if line["stage"] == "environment" and "found" in line]
    if not found:
        raise Stop(f"the GPU could not be looked at: exit status {status}; why stands in log.txt")
    if "missing" in found[-1]:
        raise Stop(found[-1]["missing"])
    return []


def work_on_environment(emulated: bool) -> None:
    from gpu_device import open_device
    from peers import version

    from klcore.backends.cuda import nvrtc

    if not emulated:
        missing = importlib.import_module("klcore.backends.cuda").missing()
        if missing:
            say(stage="environment", found={"missing": missing})
            return
    about = open_device(emulated).describe() | {
        "NVRTC": "emulated" if emulated else ".".join(map(str, nvrtc.version())),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "processors": os.cpu_count(),
        "kernel": platform.release(),
    }
    say(stage="environment", found=about)


# ---- stages ----------------------------------------------------------------------------------------------------------


def first_light(run: Run) -> list[str]:
    failures = run.items("first-light") + report.judge("first-light", known()).failures
    if failures or run.out_of_time:
        raise Stop("; ".join(failures[:3]) or "out of time")
    return []


def bench(stage: str) -> Callable[[Run], list[str]]:
    return lambda run: run.items(stage)


def bits(run: Run) -> list[str]:
    run.needs_core()
    warming = [] if run.emulated else [run.work("warm", f"{k}/2") for k in (0, 1)]
    failures = run.items("bits", 2 if run.emulated else processes())
    for process in warming:  # what they have not done, the stage that needs it will do
        run.kill(process)
    return failures


def sanitizer(run: Run) -> list[str]:
    run.needs_core()
    command = tool("compute-sanitizer")
    done = {line["tool"] for line in known() if "tool" in line and line["status"] is not None}
    running = {}
    for name in TOOLS:
        if name not in done:
            words = [command, "--tool", name, "--error-exitcode", str(TOOL_FOUND), "--print-limit", "20"]
            running[name] = run.start([*words, *run.words("sanitizer", name)], to=f"sanitizer-{name}.txt")
    for name, process in running.items():
        status = run.wait(process)
        text = (run.out / f"sanitizer-{name}.txt").read_text(errors="replace")
        summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY.*)", text)
        errors = [line.strip("= ") for line in text.splitlines() if line.startswith("=====")]
        said = summary[-1] if summary else "out of time" if status is None else f"exit status {status}"
        failed = {}
        if status and "Device not supported" not in text:
            failed = {"failed": f"{said}: {' | '.join(errors[1:8])}"[:1000]}
        say(stage="sanitizer", tool=name, status=status, said=said, **failed)
    return []


def tests(run: Run) -> list[str]:
    run.needs_core()
    missing = [name for name in NEEDED_BY_TESTS if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"the tests need {', '.join(missing)}: pip install {' '.join(missing)}")
    status = run.wait(run.work("tests"))
    return [f"pytest's exit status is {status}; why stands in log.txt"] if status not in (0, 1, None) else []


def large(run: Run) -> list[str]:
    run.needs_core()
    return run.items("large")


def profile(run: Run) -> list[str]:
    words = [tool("ncu"), "--clock-control", "none", "--print-details", "all", "--kernel-name", "regex:^kl_"]
    words += [word for section in SECTIONS for word in ("--section", section)]
    status = run.wait(run.start([*words, *run.words("profile")], to="ncu.txt"))
    return [f"ncu: exit status {status}; why stands in ncu.txt"] if status else []


@dataclass(frozen=True)
class Stage:
    name: str
    limit: float  # seconds, if the call has a limit
    run: Callable[[Run], list[str]]


# On an H200, with prepared kernels: 4 s, 2, 7, 20 for 72 of the cases of `alone`, 10 for six launches, 28, tests 90.
STAGES = (
    Stage("environment", 40, environment),
    Stage("first-light", 60, first_light),
    Stage("ceilings", 25, bench("ceilings")),
    Stage("alone", 90, bench("alone")),
    Stage("profile", 45, profile),
    Stage("bits", 70, bits),
    Stage("sanitizer", 80, sanitizer),
    Stage("peers", 100, bench("peers")),
    Stage("tests", 120, tests),
    Stage("large", 40, large),
    Stage("more", math.inf, bench("more")),
)
NAMES = [stage.name for stage in STAGES]


# ---- the processes of a stage ----------------------------------------------------------------------------------------


def work(name: str, argument: str, emulated: bool) -> int:
    if sys.platform == "linux" and name not in ("sanitizer", "profile"):  # their tools end those
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end when the parent process ends
    deadline = float(os.environ["KLCORE_GPU_DEADLINE"])
    if name == "environment":
        work_on_environment(emulated)
        return 0
    if name == "tests":
        return work_on_tests(emulated)
    os.environ.setdefault("KLCORE_NUM_THREADS", "2")  # many such processes share the CPU
    import gpu_bench
    import gpu_bits
    from gpu_device import clocks, open_device

    k, _, count = argument.partition("/")
    shard = (int(k), int(count)) if count else (0, 1)
    gpu = open_device(emulated)
    go = {"deadline": deadline, "alive": gpu.synchronize, "shard": shard}
    if name == "first-light":
        each(name, gpu_bits.light_cases(gpu), lambda title: gpu_bits.first_light(gpu, title), **go)
    elif name == "bits":
        groups = gpu_bits.EMULATED_GROUPS if emulated else gpu_bits.groups()
        each(name, groups, lambda group: gpu_bits.check_group(gpu, group), **go)
    elif name == "sanitizer":
        if not emulated:
            gpu.cupy.cuda.set_allocator(None)  # one allocation per array; otherwise an overrun hits its neighbour
        roles = gpu_bits.roles(gpu)
        each(
            f"sanitizer {argument}",
            roles,
            lambda role: gpu_bits.check_role(roles[role]),
            needs=5.0,
            patience=math.inf,
            **go,
        )
    elif name == "large":
        each(name, gpu_bits.LARGE, lambda item: gpu_bits.check_large(gpu, item), needs=5.0, **go)
    elif name == "profile":
        for title, call in gpu_bits.profiled(gpu):
            say(stage="profile", item=title)
            print(title, flush=True)
            call()
    elif name == "ceilings":
        measures = {"copies": gpu.copies, "calls": lambda: gpu_bench.overhead(gpu)}
        each(name, measures, lambda item: {"figures": measures[item]()}, **go)
        say(stage=name, clocks=clocks())
    elif name == "warm":
        warmer = gpu_bench.Bench(gpu, "peers")
        each(f"warming {k}", list(warmer.tasks)[shard[0] :: shard[1]], warmer.warm, deadline, gpu.synchronize)
    else:
        measure = gpu_bench.Bench(gpu, name)
        several = any(len(task.contenders) > 1 for task in measure.tasks.values())
        times = {"needs": 8.0, "patience": 90.0} if several else {}
        each(name, measure.tasks, measure, **times, **go)
        say(stage=name, clocks=clocks())
    return 0


# This file is also a pytest plugin (-p gpu_run): it reports how each test ended, immediately.


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out the tests that passed in an earlier call."""
    ended = [line for line in known() if line.get("outcome") == "passed" and line["call"] < gpu_lines.call()]
    earlier = {line["item"] for line in ended}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in earlier])
    items[:] = [item for item in items if item.nodeid not in earlier]


def pytest_collection_finish(session: Any) -> None:
    if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
        if os.environ.get("PYTEST_XDIST_WORKER") == "gw0":
            say(stage="tests", planned=len(session.items))
    elif session.items:
        say(stage="tests", planned=len(session.items))


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        say_test(report)


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        say_test(report)


def say_test(report: Any) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the first process receives a worker's reports too
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    why = crash.message.partition("\n")[0] if crash else str(report.longrepr or "").strip().rpartition("\n")[2]
    say(stage="tests", item=report.nodeid, outcome=report.outcome, why=why[:300])


def work_on_tests(emulated: bool) -> int:
    import pytest

    os.environ["KLCORE_TEST_DEVICES"] = "emulated" if emulated else "cuda"
    words = [*(TESTS if not emulated else TESTS[-1:]), "-q", "-p", "gpu_run", "-p", "no:cacheprovider", "-W", "default"]
    words += ["--continue-on-collection-errors", "--tb=short"]
    if emulated:
        words += ["-k", "emulated"]
    elif importlib.util.find_spec("xdist"):
        words += ["-n", str(processes()), "--dist", "worksteal"]
    return int(pytest.main(words))


# ---- all stages ------------------------------------------------------------------------------------------------------


def chosen(second: bool, only: list[str]) -> list[Stage]:
    """The stages of this call, in order."""
    found = []
    for stage in STAGES:
        if only:
            wanted = stage.name in only or stage.name == "environment"
        elif not second or stage.name == "environment":
            wanted = True
        else:
            wanted = report.judge(stage.name, known()).status not in ("ok", "skipped")
        if wanted:
            found.append(stage)
    return found


def run_stages(run: Run, stages: list[Stage], limited: bool) -> None:
    began = time.time()
    stopped = ""
    for stage in stages:
        start = time.time()
        run.deadline = min(run.end - LAST, start + stage.limit) if limited else math.inf
        run.out_of_time = False
        if stopped or run.deadline - start < 2:
            say(stage=stage.name, status="not run", why=stopped or "no time was left")
            continue
        say(stage=stage.name, started=round(start - began, 1))
        failures, status, why = [], "ok", ""
        try:
            failures = stage.run(run)
        except Skip as reason:
            status, why = "skipped", str(reason)
        except Stop as reason:
            failures, stopped = [str(reason)], f"{stage.name} failed"
        except Exception as error:  # the following stages are worth as much
            failures = [sentence(error)]
        for process in [p for p in run.children if p is not run.builder]:
            run.kill(process)
        status = "failed" if failures else "out of time" if run.out_of_time else status
        say(stage=stage.name, status=status, why=why, failures=failures, seconds=round(time.time() - start, 1))
        print(f"{stage.name}: {status}, {time.time() - start:.0f} s {why}", *failures[:3], sep="\n  ", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder for the results")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all stages; without it there is no limit")
    parser.add_argument("--second", action="store_true", help="what a first call left to do")
    parser.add_argument(
        "--only", action="append", choices=NAMES, metavar="STAGE", help=f"of {', '.join(NAMES)}; repeat"
    )
    parser.add_argument("--carry", type=Path, default=ROOT / ".carry", help="the output of make gpu-carry: .carry")
    parser.add_argument("--keep", type=Path, default=KEEP, help="files for a second call: build/gpu-run")
    parser.add_argument("--emulated", action="store_true", help="without a GPU: does this command work?")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)  # for processes of this command
    args = parser.parse_args()
    if args.work:
        return work(args.work[0], " ".join(args.work[1:]), args.emulated)

    end = time.time() + args.seconds
    keep = args.keep.absolute()
    out, sources = args.out.absolute(), source_digest()
    site = keep / f"site-{sources}"
    prepare_paths(keep, site)
    memory = keep / f"results-{sources}{'-emulated' if args.emulated else ''}.jsonl"
    for folder in (out, keep):
        folder.mkdir(parents=True, exist_ok=True)
    if not args.second:
        memory.unlink(missing_ok=True)
    os.environ[gpu_lines.FILES] = os.pathsep.join([str(out / gpu_lines.NAME), str(memory)])
    os.environ[gpu_lines.CALL] = "2" if args.second else "1"
    run = Run(out, args.emulated, end, args.carry.absolute(), keep, site)
    stages = chosen(args.second, args.only or [])
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    about = {"date": now, "commit": commit(), "sources": sources, "emulated": args.emulated}
    say(stage="run", stages=[stage.name for stage in stages], seconds=min(args.seconds, 1e9), **about)
    try:
        run_stages(run, stages, args.seconds < math.inf)
    finally:
        for process in list(run.children):
            run.kill(process)
    lines = gpu_lines.read(out / gpu_lines.NAME)
    table = "\n".join(report.table(lines)) + "\n"
    (out / "table.txt").write_text(table)
    print(table, end="", flush=True)
    return int(any(report.judge(stage.name, lines).failures for stage in stages))


if __name__ == "__main__":
    sys.exit(main())
