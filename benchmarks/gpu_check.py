"""Everything there is to know about klcore on this machine's GPU, in one command of less than ten minutes.

    make gpu-check PYTHON=python3 ARGS="--out DIR"
    python benchmarks/gpu_check.py [--only STEP] [--seconds N] [--quick] [--out DIR] [--ncu] [--emulated]

The steps, each in processes of its own, so that a kernel that kills its process ends nothing else:

environment   GPU, driver, clocks, temperature, versions, the sources
tests         the tests that use devices, on the CPU and on the GPU
bits          every operation, pair of spaces and dtype against the CPU: gpu_bits.py
sanitizer     compute-sanitizer's four tools, on one small launch of every kernel
large         arrays of more than 2^31 elements
benchmark     speed, beside the memory's and beside other libraries: gpu_bench.py

A failure ends its step and no other; the exit status is 1 if there was one. Everything is written to
DIR/GPU-DATE.json (docs/benchmarks by default), and from it, by gpu_report.py, a table and a plot beside it. A file of
the same day and the same sources is added to, so that steps can be run one at a time.

--emulated runs all of it on tests/emulator, with tiny arrays: it shows that this command works, and no more.
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RECORDS = ROOT / "docs" / "benchmarks"
SECONDS = 530.0  # of ten minutes; the rest is for building klcore, and for the report
# of the time, to each step; the benchmark takes all that the others leave
SHARES = {"environment": 40, "tests": 120, "bits": 150, "sanitizer": 100, "large": 50, "benchmark": 130}
NEEDED_BY_TESTS = ("pytest", "hypothesis", "mpmath", "ml_dtypes")
LIBRARIES = (
    "klcore", "numpy", "cupy-cuda13x", "cupy-cuda12x", "ml_dtypes", "torch", "triton", "jax", "liger_kernel",
    "nvidia-cuda-nvrtc",
)  # fmt: skip
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TOOL_FOUND = 77  # compute-sanitizer's exit status for errors of kernels
RESTARTS = 6  # of a benchmark whose process died
SHOWN = 20


@dataclass
class Result:
    """What a step found."""

    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: Any = None
    skipped: str = ""
    seconds: float = 0.0

    @property
    def status(self) -> str:
        return "failed" if self.failures else "skipped" if self.skipped else "ok"


@dataclass
class Run:
    """One run of this command."""

    emulated: bool
    quick: bool
    log: Path
    deadline: float = 0.0  # of the step that is under way
    known: Any = None  # what the step "environment" found

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    def start(self, words: list[str], limit: float | None = None, **environment: str) -> tuple[int | None, str]:
        """Exit status and output of a process; None if it ran out of time."""
        limit = self.left if limit is None else limit
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                words, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=surroundings() | environment,
                start_new_session=True,
            )  # fmt: skip
            try:
                status: int | None = process.wait(max(1.0, limit))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and those that it started
                process.wait()
            output.seek(0)
            text = output.read()
        with self.log.open("a") as log:
            log.write(f"$ {shlex.join(words)}\n{text}\n[{'out of time' if status is None else status}]\n\n")
        return status, text

    def worker(self, name: str, *arguments: str, prefix: tuple[str, ...] = (), **environment: str) -> tuple[Any, str]:
        """What `--run name` gives, and, if it gave nothing, why."""
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder, "result.json")
            words = [*prefix, *self.words(name, *arguments, "--result", str(result))]
            status, text = self.start(words, **environment)
            if status is None:
                return None, "out of time"
            if status == 0 and result.exists():
                return json.loads(result.read_text()), ""
            return None, f"exit status {status}: {ending(text)}"

    def words(self, name: str, *arguments: str) -> list[str]:
        emulated = ["--emulated"] if self.emulated else []
        return [sys.executable, str(HERE / "gpu_check.py"), "--run", name, *emulated, *arguments]


def ending(text: str, lines: int = 6) -> str:
    """The last lines of an output, where the reason stands; of a traceback, the last."""
    if "Traceback (most recent call last)" in text:
        lines = 1
    return " | ".join(line.strip() for line in text.strip().splitlines()[-lines:])[-1200:]


# ---- the sources and the machine -------------------------------------------------------------------------------------


def source_digest() -> str:
    """Of all that makes klcore: a commit says it only where git is, and nothing is uncommitted."""
    digest = hashlib.sha256()
    for path in sorted(
        [*ROOT.glob("src/*.h"), *ROOT.glob("src/*.cu"), *ROOT.glob("src/*.pyx"), *ROOT.glob("klcore/**/*.py")]
    ):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    given = os.environ.get("KLCORE_COMMIT")
    if given:
        return given
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return "unknown"


def surroundings() -> dict[str, str]:
    """The environment of a child: a pytest there must not take itself for a worker of the one that may run this."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def work_on_environment(emulated: bool) -> dict[str, Any]:
    from gpu_device import open_device, version

    from klcore.backends import nvrtc

    if not emulated:
        missing = importlib.import_module("klcore.backends.cuda").missing()
        if missing:
            return {"missing": missing}
    try:
        found = open_device(emulated).describe()
    except Exception as error:  # what cannot be described may still compute
        found = {"gpu": "unknown GPU", "not described": f"{type(error).__name__}: {error}"}
    return found | {
        "NVRTC": "emulated" if emulated else ".".join(map(str, nvrtc.version())),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "processors": os.cpu_count(),
        "kernel": platform.release(),
    }


def environment(run: Run) -> Result:
    details, why = run.worker("environment")
    if details is None or "missing" in details:
        return Result([why or details["missing"]], details=details)
    run.known = details
    notes = [f"{details['gpu']}, NVRTC {details['NVRTC']}"]
    notes += [f"{name} {v}" for name, v in details["versions"].items()]
    return Result(notes=notes, details=details)


# ---- the tests -------------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """This file is a plugin as well (-p gpu_check): of the tests those that run on devices."""

    def is_of_a_device(item: Any) -> bool:
        by_name = getattr(getattr(item, "callspec", None), "params", {}).values()  # beside other kinds of arrays
        return bool({"device", "gpu"} & set(getattr(item, "fixturenames", ()))) or "cuda" in map(str, by_name)

    chosen = [item for item in items if is_of_a_device(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        note_test(report)


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        note_test(report)


def note_test(report: Any) -> None:
    """Write down how a test ended, at once: there may be no time for an end."""
    path = os.environ.get("KLCORE_GPU_CHECK_TESTS")
    if path is None or "PYTEST_XDIST_WORKER" in os.environ:  # a worker's reports come to the first process as well
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    why = crash.message.splitlines()[0] if crash else str(report.longrepr or "").strip().rpartition("\n")[2]
    with open(path, "a") as file:
        file.write(json.dumps([report.nodeid, report.outcome, why[:300]]) + "\n")


def work_on_tests(emulated: bool) -> int:
    import pytest

    words = [
        "tests",
        "-q",
        "-p",
        "gpu_check",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "--tb=short",
    ]
    if emulated:
        words += ["-k", "same_array_twice"]
    elif importlib.util.find_spec("xdist"):
        words += ["-n", str(workers()), "--dist", "worksteal"]
    return int(pytest.main(words))


def tests(run: Run) -> Result:
    missing = [name for name in NEEDED_BY_TESTS if importlib.util.find_spec(name) is None]
    if missing:
        return Result([f"the tests need {', '.join(missing)}, not installed here: pip install {' '.join(missing)}"])
    devices = "cpu,emulated" if run.emulated else "cpu,cuda"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "tests")
        status, text = run.start(
            run.words("tests"),
            KLCORE_TEST_DEVICES=devices,
            KLCORE_GPU_CHECK_TESTS=str(report),
            PYTHONPATH=python_path(),
        )
        ended = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    failures = [f"{name}: {why}" for name, outcome, why in ended if outcome == "failed"]
    skipped = sum(outcome == "skipped" for _, outcome, _ in ended)
    if (status and not failures) or not ended:
        failures.append(f"{'out of time' if status is None else f'exit status {status}'}: {ending(text)}")
    notes = [f"{len(ended)} tests, {skipped} of them skipped"]
    if status is None:
        notes.append("out of time: more were not run")
    return Result(failures, notes, {"tests": len(ended), "skipped": skipped, "devices": devices})


def workers() -> int:
    """Processes at once: most of their time is compilation, and all share the GPU."""
    return max(2, min(14, (os.cpu_count() or 2) - 2))


def python_path() -> str:
    """For processes that look for gpu_check by name."""
    return os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))


# ---- bits ------------------------------------------------------------------------------------------------------------


def bits(run: Run) -> Result:
    from gpu_bits import EMULATED_GROUPS, groups

    names = list(EMULATED_GROUPS) if run.emulated else groups()
    if run.quick:
        names = [name for name in names if name.startswith("kl_div") and name.endswith(("float32", "bfloat16"))]
    checked, failures, not_run = 0, [], []
    died: dict[str, list[str]] = {}

    def one(name: str) -> tuple[str, Any, str]:
        if run.left < 5:
            return name, None, "not run"
        # each process uses two threads for the CPU's side
        return name, *run.worker("group", "--group", name, KLCORE_NUM_THREADS="2")

    with ThreadPoolExecutor(workers()) as pool:
        for name, found, why in pool.map(one, names):
            if found is not None:
                checked += found["checked"]
                failures += found["wrong"]
            elif why in ("not run", "out of time"):
                not_run.append(name)
            else:
                died.setdefault(why, []).append(name)
    failures += [f"{len(group)} groups ended, {group[0]} the first: {why}" for why, group in died.items()]
    notes = [f"{checked} comparisons in {len(names) - len(not_run)} of {len(names)} groups"]
    if not_run:
        notes.append(f"not run for lack of time: {', '.join(not_run)}")
    details = {"checked": checked, "groups": len(names), "not run": not_run}
    if not checked and not failures:
        failures.append("nothing was compared: no time")
    return Result(failures, notes, details)


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------


def sanitizer(run: Run) -> Result:
    # the same without a tool first: it compiles what the tools would else wait for, and what it computes is compared
    found, why = run.worker("kernels")
    if found is None:
        return Result([f"without a tool: {why}"])
    result = Result([f"without a tool: {sentence}" for sentence in found])
    command = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if run.emulated:
        result.skipped = "the emulator checks what compute-sanitizer would"
    elif command is None:
        result.skipped = "compute-sanitizer was not found: it comes with the CUDA toolkit"
    if result.skipped:
        return result
    result.details = {}
    for k, tool in enumerate(TOOLS):
        limit = run.left / (len(TOOLS) - k)
        words = [str(command), "--tool", tool, "--error-exitcode", str(TOOL_FOUND), "--print-limit", "20"]
        start = time.time()
        with tempfile.TemporaryDirectory() as folder:
            worker = run.words("kernels", "--result", str(Path(folder, "result.json")))
            status, text = run.start([*words, *worker], limit)
        summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY.*)", text)
        said = summary[-1] if summary else ending(text)
        result.details[tool] = {"status": status, "said": said, "seconds": time.time() - start}
        if status is None:
            result.notes.append(f"{tool}: out of time after {limit:.0f} s")
        elif "Device not supported" in text:
            result.notes.append(f"{tool}: does not support this device")
        elif status:
            errors = [line.strip("= ") for line in text.splitlines() if line.startswith("=====")]
            result.failures.append(f"{tool}: {said}: {' | '.join(errors[1:8])}")
        else:
            result.notes.append(f"{tool}: {said}")
    return result


# ---- great arrays ----------------------------------------------------------------------------------------------------


def large(run: Run) -> Result:
    found, why = run.worker("large")
    if found is None:
        return Result([why])
    return Result(found["wrong"], [f"computed: {title}" for title in found["done"]])


# ---- the benchmark ---------------------------------------------------------------------------------------------------


def summary(case: dict[str, Any]) -> str:
    """One line: klcore's time and bandwidth, and the others' times in units of it."""
    import gpu_report

    ours = gpu_report.of(case, "klcore")
    if "ms" not in ours:
        return f"{gpu_report.title(case)}: {ours['absent']}"
    others = [
        f"{c['name']} x{c['ms'] / ours['ms']:.2f}" if "ms" in c else f"{c['name']} -" for c in case["contenders"][1:]
    ]
    return f"{gpu_report.title(case)}: {ours['ms']:.3f} ms, {ours['percent of copy']:.0f} %; {', '.join(others)}"


def benchmark(run: Run) -> Result:
    import gpu_bench
    from gpu_device import clocks

    result = Result()
    before = clocks()
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "benchmark.jsonl")
        quick = ["--quick"] if run.quick else []
        for _ in range(RESTARTS):
            words = run.words("benchmark", "--result", str(lines), "--deadline", str(run.deadline - 15), *quick)
            status, text = run.start(words)
            if not status:  # done, or out of time
                break
            entries = gpu_bench.read(lines)
            at_work = entries[-1].get("begin", "between cases") if entries else "the start"
            result.failures.append(f"the process died at {at_work}: {ending(text)}")
            if not entries or "begin" not in entries[-1] or run.left < 30:
                break
        entries = gpu_bench.read(lines)
    figures = {entry["key"]: entry["figures"] for entry in entries if "figures" in entry}
    failed = {entry["key"]: entry["failed"] for entry in entries if "failed" in entry}
    copies, overhead = figures.pop("ceilings", {}), figures.pop("overhead", {})
    todo = [task.key for task in gpu_bench.tasks(run.emulated, run.quick)]
    not_run = [key for key in todo if key not in figures and key not in failed]
    result.details = {
        "ceilings": copies,
        "overhead, microseconds": overhead,
        "cases": list(figures.values()),
        "failed": failed,
        "not run": not_run,
        "clocks": {"before": before, "after": clocks()},
    }
    for case in figures.values():
        for c in case["contenders"]:
            if c["name"] == "klcore" and ("absent" in c or c["wrong"]):
                title = gpu_bench.Case(*(case[k] for k in ("rows", "n", "dtype", "space", "outputs"))).title
                result.failures.append(f"klcore, {title}: {c.get('absent') or c['errors']}")
    result.notes = [f"{name}: {rate / 1e9:.0f} GB/s" for name, rate in copies.items()]
    result.notes += [summary(case) for case in figures.values() if case["part"] == "first"]
    result.notes.append(f"{len(figures)} of {len(todo)} cases measured, {len(failed)} could not be")
    if not figures and not result.failures:
        result.failures.append("nothing was measured: no time")
    return result


# ---- all steps -------------------------------------------------------------------------------------------------------

STEPS: dict[str, Callable[[Run], Result]] = {
    "environment": environment,
    "tests": tests,
    "bits": bits,
    "sanitizer": sanitizer,
    "large": large,
    "benchmark": benchmark,
}


def run_steps(
    run: Run, chosen: list[str], seconds: float, save: Callable[[dict[str, Result]], Any]
) -> dict[str, Result]:
    """`save` is called after each step: whoever ends this process early shall find what there was."""
    end = time.time() + seconds
    shares = sum(SHARES[name] for name in chosen)
    results: dict[str, Result] = {}
    for name in STEPS:
        if name not in chosen:
            continue
        start = time.time()
        last = name == chosen[-1]
        run.deadline = end if last else min(end, start + seconds * SHARES[name] / shares)
        try:
            lost = "missing" in (results.get("environment", Result()).details or {})
            result = STEPS[name](run) if not lost else Result(skipped="there is no GPU that could be used")
        except Exception as error:  # the steps that follow are worth as much
            result = Result([f"{type(error).__name__}: {error}"])
        result.seconds = time.time() - start
        results[name] = result
        print(f"{name}: {result.status}, {result.seconds:.0f} s" + (f": {result.skipped}" if result.skipped else ""))
        for note in result.notes:
            print(f"  {note[:400]}")
        for failure in result.failures[:SHOWN]:
            print(f"  FAILED {failure[:1000]}")
        if len(result.failures) > SHOWN:
            print(f"  FAILED and {len(result.failures) - SHOWN} more, in the record")
        sys.stdout.flush()
        save(results)
    return results


def write_record(run: Run, results: dict[str, Result], folder: Path) -> Path:
    """The record of today, this GPU and these sources, with these steps in it."""
    now = datetime.datetime.now().astimezone()
    gpu = "emulated" if run.emulated else (run.known or {}).get("gpu", "unknown GPU")
    path = folder / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{now.date()}.json"
    record: dict[str, Any] = {"sources": source_digest(), "steps": {}}
    if path.exists():
        with contextlib.suppress(ValueError):
            before = json.loads(path.read_text())
            if before.get("sources") == record["sources"]:
                record = before
    record |= {
        "date": now.isoformat(timespec="seconds"),
        "emulated": run.emulated,
        "commit": commit(),
        "environment": run.known or record.get("environment"),
    }
    for name, result in results.items():
        record["steps"][name] = {
            "status": result.status,
            "seconds": round(result.seconds, 1),
            "failures": result.failures,
            "notes": result.notes,
            "skipped": result.skipped,
        } | ({} if name == "environment" else {"details": result.details})
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def write_report(path: Path) -> None:
    import gpu_report

    for written in (path, *gpu_report.write(path)):
        print(written)
    if path.parent.resolve() == RECORDS:
        gpu_report.update_page()


def print_ncu() -> None:
    """How to look into one launch of every kernel whose speed counts."""
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
    words = ["ncu", "--clock-control", "none", *(w for s in sections for w in ("--section", s))]
    words += ["--kernel-name", "regex:^kl_", "--export", "klcore", "--force-overwrite"]
    words += [sys.executable, os.path.relpath(HERE / "gpu_check.py"), "--run", "profile"]
    print(shlex.join(words))
    print("ncu --import klcore.ncu-rep --page details")


def work(args: argparse.Namespace) -> int:
    """What `--run` asks for: one process of a step."""
    from gpu_device import open_device

    if args.run == "tests":
        return work_on_tests(args.emulated)
    if args.run == "benchmark":
        import gpu_bench

        gpu_bench.run(Path(args.result), args.emulated, args.quick, args.deadline)
        return 0
    if args.run == "environment":
        found: Any = work_on_environment(args.emulated)
    else:
        import gpu_bits

        gpu = open_device(args.emulated)
        if args.run == "group":
            checked, wrong = gpu_bits.check_group(gpu, args.group)
            found = {"checked": checked, "wrong": wrong}
        elif args.run == "kernels":
            found = gpu_bits.every_kernel(gpu)
        elif args.run == "large":
            done, wrong = gpu_bits.check_large(gpu)
            found = {"done": done, "wrong": wrong}
        else:
            found = gpu_bits.profile(gpu)
    if args.result:
        Path(args.result).write_text(json.dumps(found))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=STEPS, metavar="STEP", help=f"of {', '.join(STEPS)}; repeat")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything; steps share it")
    parser.add_argument("--quick", action="store_true", help="fewer cases: for a first look")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="where the record goes: docs/benchmarks")
    parser.add_argument("--ncu", action="store_true", help="print the command that profiles every kernel, and no more")
    parser.add_argument("--emulated", action="store_true", help="without a GPU: does this command work?")
    works = ("environment", "tests", "group", "kernels", "large", "benchmark", "profile")
    for name, kind in {"--run": str, "--result": str, "--group": str, "--deadline": float}.items():
        choices = works if name == "--run" else None
        parser.add_argument(name, type=kind, choices=choices, help=argparse.SUPPRESS)  # for processes of this command
    args = parser.parse_args()
    if args.ncu:
        print_ncu()
        return 0
    if args.run:
        return work(args)

    out = args.out or (Path(tempfile.mkdtemp(prefix="gpu-check-")) if args.emulated else RECORDS)
    log = (ROOT / "build" if args.out is None and not args.emulated else out) / "gpu-check.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    run = Run(args.emulated, args.quick, log)
    chosen = [name for name in STEPS if not args.only or name in args.only]
    start = time.time()
    if "environment" not in chosen:  # it names the record
        run.deadline = start + 60
        environment(run)
    results = run_steps(run, chosen, args.seconds, lambda results: write_record(run, results, out))
    write_report(write_record(run, results, out))
    print(log)
    failed = [name for name, result in results.items() if result.failures]
    print(f"{time.time() - start:.0f} s; " + (f"FAILED: {', '.join(failed)}" if failed else "no failures"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
