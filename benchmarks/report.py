"""Tables, plots and docs/performance.md, from the results of gpu_run.py and side_by_side.py.

    python benchmarks/report.py [FOLDER ...] [--to DIR]

turns the folders of one run of gpu_run.py into the record docs/benchmarks/GPU-DATE-COMMIT.json, and writes a page (.md)
and, if matplotlib is installed, a plot (.svg) beside it. Then it puts the newest records, of the CPU and of a GPU, into
the marked sections of docs/performance.md, with the times of earlier records of the same GPU. It measures nothing and
needs no GPU. gpu_run.py uses it to find out how stages ended, and for the table that it prints last.
"""

import argparse
import functools
import importlib.util
import json
import operator
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_lines

from klcore.operations import OPERATIONS

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "performance.md"
OURS = "klcore"
SHOWN = 12  # entries of a list; the record has all of them
SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}  # bytes
PERCENT = "percent of copy"
LARGE = 1e9  # bytes of both inputs: the bandwidth targets are about these
# percent of the copy's bandwidth: targets for the value, and for value and gradient
TARGETS = {"H100": {"float32": 90, "bfloat16": 85}, "H200": {"float32": 85, "bfloat16": 75}}
CALL_US = 20.0  # a warm call from Python
MARKERS = "osD^v<>ph*"  # of a plot
AHEAD = {"torch.compile": 1.0, "Liger-Kernel": 1.0, "torch eager": 4.0}


def markdown(header: list[str], rows: Iterable[list[str]], text: Sequence[int] = (0,)) -> str:
    """A table; the given columns are text, the others are numbers."""
    lines = [header, ["---" if k in text else "--:" for k in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- the CPU ---------------------------------------------------------------------------------------------------------


def cpu_section(path: Path) -> str:
    """Median milliseconds from side_by_side.py's record."""
    record = json.loads(path.read_text())
    machine = record["machine"]
    names: list[str] = []
    for figures in record["operations"].values():
        names += [
            f["contender"] for f in figures if f["contender"] not in names and not f["contender"].startswith("floor")
        ]
    rows = []
    for title, figures in record["operations"].items():
        times = {f["contender"]: f["median_ms"] for f in figures if "median_ms" in f}
        floors = [t for name, t in times.items() if name.startswith("floor")]
        cells = [f"{min(floors):.0f}" if floors else "", f"{times[OURS] / min(floors):.2f}" if floors else ""]
        for name in names:
            text = f"{times[name]:.0f}" if name in times else ""
            cells.append(f"**{text}**" if name == OURS else text)
        rows.append([title, *cells])
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if name != OURS)
    calls = record["call on (10, 10), microseconds"]
    return "\n".join(
        [
            f"{machine['processor']}, {machine['instruction set of klcore']}, {machine['threads']} threads, last-level "
            f"cache {machine['last-level cache']}; arrays {machine['arrays']}; {machine['date'][:10]}; {versions}. "
            "Median milliseconds:",
            "",
            markdown(["", "floor", "klcore / floor", *names], rows),
            "",
            "A call on (10, 10), in microseconds: " + ", ".join(f"{n} {t:.2f}" for n, t in calls.items()) + ".",
            "",
            f"From [{path.name}](benchmarks/{path.name}).",
        ]
    )


# ---- how stages ended ------------------------------------------------------------------------------------------------

STAGES = ("environment", "first-light", "ceilings", "alone", "profile", "bits", "sanitizer", "peers", "tests", "large",
          "more")  # fmt: skip
BENCHMARKS = ("alone", "peers", "more")  # of them


@dataclass
class Verdict:
    """How a stage ended, from all lines about it."""

    status: str  # ok, failed, skipped, not run, out of time, or cut off with the whole run
    seconds: float
    why: str
    done: int  # items
    not_run: int
    checked: int  # comparisons
    failures: list[str]


def judge(stage: str, lines: list[dict[str, Any]]) -> Verdict:
    mine = [line for line in lines if line["stage"] == stage or line["stage"].startswith(f"{stage} ")]
    ends = [line for line in mine if "status" in line and "tool" not in line]
    found = {(line["stage"], line["item"]): line for line in mine if "item" in line and "begin" not in line}
    done = {key: line for key, line in found.items() if "died" not in line}
    failures = [*ends[-1].get("failures", [])] if ends else []
    tools = {("", line["tool"]): line for line in mine if "tool" in line}
    for (_, item), line in (found | tools).items():
        failures += [f"{item}: {words}" for words in wrongs(line)]
    planned: dict[str, Any] = {}
    for line in mine:  # a second call does only what was left: the first one counts
        if "planned" in line:
            planned.setdefault(line["stage"], line["planned"])
    not_run = 0
    for name, items in planned.items():
        ended = {item for where, item in done if where == name}
        not_run += max(0, items - len(ended)) if isinstance(items, int) else len(set(items) - ended)
    status = ends[-1]["status"] if ends else "cut off" if mine else "not run"
    if failures:
        status = "failed"
    elif status == "ok" and not_run:
        status = "out of time"
    seconds = sum(line.get("seconds", 0) for line in ends)
    why = ends[-1].get("why", "") if ends else ""
    checked = sum(line.get("checked", 0) for line in done.values())
    return Verdict(status, round(seconds, 1), why, len(done), not_run, checked, list(dict.fromkeys(failures)))


def wrongs(line: dict[str, Any]) -> list[str]:
    """The problems of an item."""
    found = [line[key] for key in ("failed", "died") if key in line] + line.get("wrong", [])
    if line.get("outcome") == "failed":
        found.append(line["why"])
    for c in line.get("figures", {}).get("contenders", ()):
        if c["name"] == OURS and ("absent" in c or c["wrong"]):
            found.append(str(c.get("absent") or f"errors {c['errors']}"))
    return found


def notes(stage: str, verdict: Verdict, lines: list[dict[str, Any]]) -> str:
    """What to say about a stage, in a few words."""
    if verdict.why:
        return verdict.why
    words = [f"{verdict.done} done"] if verdict.done else []
    words += [f"{verdict.not_run} not run"] if verdict.not_run else []
    words += [f"{verdict.checked} comparisons"] if verdict.checked else []
    if stage == "sanitizer":
        words += [f"{line['tool']}: {line['said']}" for line in lines if "tool" in line]
    if stage == "tests":
        skipped = sum(line.get("outcome") == "skipped" for line in lines)
        words += [f"{skipped} of them skipped"] if skipped else []
    words += [line["note"] for line in lines if line["stage"] == stage and "note" in line]
    return "; ".join(dict.fromkeys(words))  # a second call repeats them


def ceiling(copies: dict[str, float]) -> str:
    """What counts as 100 percent: the fastest kernel that reads and writes. The driver's copy may be far below the
    limit."""
    return max((name for name in copies if name != "read"), key=lambda name: copies[name], default="")


def necessary_bytes(case: dict[str, Any]) -> int:
    """Each input read once, a gradient written once."""
    arrays = len(OPERATIONS[case.get("operation", "kl_div")].gradients) + case["outputs"].count("+")
    return int(arrays * case["rows"] * case["n"] * SIZES[case["dtype"]])


def of_item(name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The latest figures of an item, if there are any."""
    return next((line["figures"] for line in reversed(lines) if line["item"] == name and "figures" in line), {})


def measured(lines: list[dict[str, Any]], most: float | None) -> dict[str, Any]:
    """Cases by item, with percent of `most`, in bytes per second, if that is known."""
    found = {}
    for line in lines:
        if "contenders" in line.get("figures", ()):
            case = line["figures"]
            share = 100 * necessary_bytes(case) / (1e-3 * most) if most else None
            contenders = [c | {PERCENT: share / c["ms"]} if share and "ms" in c else c for c in case["contenders"]]
            found[line["item"]] = case | {"contenders": contenders}
    return found


# a metric's name in ncu's text -> in the record
METRICS = {
    "Duration": "ms", "DRAM Throughput": "DRAM %", "Compute (SM) Throughput": "SM %",
    "Achieved Active Warps Per SM": "warps an SM", "Registers Per Thread": "registers",
    "Dynamic Shared Memory Per Block": "KB a block", "Block Size": "threads",
    "Warp Cycles Per Issued Instruction": "cycles between a warp's instructions", "Issue Slots Busy": "issue slots %",
}  # fmt: skip
MILLI = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3, "second": 1e3}


def profile_of(text: str) -> list[dict[str, Any]]:
    """For each kernel that ncu ran: the call it is in, and the figures that show what limits its speed."""
    calls, title, found = [], "", list[dict[str, Any]]()
    for line in text.splitlines():
        kernel = re.match(r"  (kl_\w+) \(\d+, \d+, \d+\)x", line)
        metric = re.match(r"    (\S.*?)\s{2,}(?:(\S+)\s+)?([\d,.]+)$", line)
        if line.startswith("==PROF== Profiling"):
            calls.append(title)
        elif not line.startswith(("==", " ", "$", "[")):
            title = line
        elif kernel:
            found.append({"call": calls[len(found)] if len(found) < len(calls) else "", "kernel": kernel[1]})
        elif found and metric and metric[1] in METRICS:
            value = float(metric[3].replace(",", "")) * (MILLI.get(metric[2], 1) if metric[1] == "Duration" else 1)
            found[-1].setdefault(METRICS[metric[1]], value)
    return found


def record_of(lines: list[dict[str, Any]], profile: str = "") -> dict[str, Any]:
    """All results of one run, in one or two calls, as docs/benchmarks keeps them; `profile` is the output of ncu."""
    runs = [line for line in lines if line["stage"] == "run"]
    if len({(line["sources"], line["emulated"]) for line in runs}) != 1:
        raise ValueError("these are not the results of one run: there must be one state of the sources")
    environments = [line["found"] for line in lines if line["stage"] == "environment" and "found" in line]
    benchmark = [line for line in lines if "item" in line and line["stage"] in (*BENCHMARKS, "ceilings")]
    copies, calls = (of_item(name, benchmark) for name in ("copies", "calls"))
    figures = measured(benchmark, copies.get(ceiling(copies)))
    failed = {line["item"]: line[key] for line in benchmark for key in ("failed", "died") if key in line}
    planned = [name for line in lines if line["stage"] in BENCHMARKS for name in line.get("planned", ())]
    stages = {}
    for name in STAGES:
        verdict = judge(name, lines)
        stages[name] = asdict(verdict) | {"notes": notes(name, verdict, lines)}
    return {
        "date": runs[0]["date"],
        "emulated": runs[0]["emulated"],
        "commit": runs[0]["commit"],
        "sources": runs[0]["sources"],
        "environment": environments[-1] if environments else {},
        "stages": stages,
        "launched": {
            f"{line['stage']}: {line['item']}": line["launched"]
            for line in lines
            if "launched" in line and line["stage"] in ("first-light", "bits")
        },
        "profile": profile_of(profile),
        "benchmark": {
            "ceilings": copies,
            "100 percent": ceiling(copies),
            "overhead, microseconds": calls,
            "cases": list(figures.values()),
            "failed": {name: why for name, why in failed.items() if name not in figures},
            "not run": [name for name in dict.fromkeys(planned) if name not in figures and name not in failed],
            "clocks": [line["clocks"] for line in lines if "clocks" in line],
        },
    }


def table(lines: list[dict[str, Any]]) -> list[str]:
    """What gpu_run.py prints last: the page, without the long parts."""
    record = record_of(lines)
    found = benchmark_of(record)
    found["cases"] = [case for case in found["cases"] if case["part"] != "sweep"]
    made = [line[:400] for line in gpu_section(record, "", "").splitlines() if line and "| --" not in line]
    for name, stage in record["stages"].items():
        made += [f"{name} FAILED {words}"[:400] for words in stage["failures"][:3]]
    return made


# ---- a GPU's record --------------------------------------------------------------------------------------------------


def of(case: dict[str, Any], name: str) -> dict[str, Any]:
    """A contender's figures, if it was measured."""
    return next((c for c in case["contenders"] if c["name"] == name), {})


def percent(figures: dict[str, Any]) -> str:
    return f"{figures[PERCENT]:.0f}" if PERCENT in figures else ""


def title(case: dict[str, Any]) -> str:
    return f"({case['rows']}, {case['n']}) {case['dtype']} {case['space']} {case['outputs']}"


def benchmark_of(record: dict[str, Any]) -> dict[str, Any]:
    return record.get("benchmark") or {}


def peers_table(cases: list[dict[str, Any]]) -> str:
    """Milliseconds, percent of the copy, and the others' times as multiples of klcore's."""
    names: list[str] = []
    for case in cases:
        names += [c["name"] for c in case["contenders"] if c["name"] not in names and c["name"] != OURS]
    rows = []
    for case in cases:
        ours = of(case, OURS)
        if "ms" not in ours:
            rows.append([title(case), ours.get("absent", ""), "", *([""] * len(names))])
            continue
        cells = []
        for name in names:
            c = of(case, name)
            cells.append(f"{c['ms'] / ours['ms']:.2f}{' (wrong)' if c['wrong'] else ''}" if "ms" in c else "")
        rows.append([title(case), f"{ours['ms']:.3f}", f"**{percent(ours)}**", *cells])
    return markdown(["", "klcore ms", "% of copy", *(f"{name} / klcore" for name in names)], rows)


def ours_table(cases: list[dict[str, Any]], row: Sequence[str], column: Sequence[str]) -> str:
    """klcore's percent of the copy: a line for what is computed, by those names of a case, and columns for the other
    names."""

    def words(case: dict[str, Any], names: Sequence[str]) -> str:
        found = [case.get(name, "kl_div") for name in names]
        return f"({found[0]}, {found[1]})" if names[0] == "rows" else " ".join(found)

    at = {(words(c, row), words(c, column)): percent(of(c, OURS)) for c in cases}
    columns = list(dict.fromkeys(c for _, c in at))
    rows = [[r, *(at.get((r, c), "") for c in columns)] for r in dict.fromkeys(r for r, _ in at)]
    return markdown(["% of copy", *columns], rows)


def profile_table(kernels: list[dict[str, Any]]) -> str:
    """The figures from ncu."""
    names = ("ms", "DRAM %", "SM %", "warps an SM", "registers")
    rows = [[f"{k['call']}: {k['kernel']}", *(f"{k[n]:.3g}" if k.get(n) else "" for n in names)] for k in kernels]
    return markdown(["call: kernel", *names], rows)


def development(record: dict[str, Any], earlier: list[dict[str, Any]]) -> str:
    """klcore's milliseconds at the first shape, beside those of earlier records; the newest first."""
    cases = [c for c in benchmark_of(record)["cases"] if c["part"] == "alone" and "ms" in of(c, OURS)]
    cases = [c for c in cases if (c["rows"], c["n"]) == (cases[0]["rows"], cases[0]["n"])]
    records = [record, *earlier]
    times = [
        {title(c): of(c, OURS).get("ms") for c in benchmark_of(r)["cases"] if c["part"] == "alone"} for r in records
    ]
    rows = [[title(c), *(f"{t[title(c)]:.3f}" if t.get(title(c)) else "" for t in times)] for c in cases]
    return markdown(["ms", *(f"{r['commit']}, {r['date'][:10]}" for r in records)], rows) if cases else ""


def absent(cases: list[dict[str, Any]]) -> list[str]:
    """The contenders that could not be measured, and why."""
    found = {f"{c['name']}: {c['absent']}": None for case in cases for c in case["contenders"] if "absent" in c}
    return [f"Absent from some cases: {some(list(found))}."] if found else []


def some(entries: list[str], shown: int = SHOWN) -> str:
    rest = f"; and {len(entries) - shown} more" if len(entries) > shown else ""
    return "; ".join(entries[:shown]) + rest


def targets(record: dict[str, Any]) -> str:
    """A table of whether each target was met. The target that is missed by most comes first."""
    found = benchmark_of(record)
    ours = [(case, of(case, OURS)) for case in found.get("cases", []) if case["part"] in ("alone", "peers")]
    rows = []

    def add(words: str, reached: dict[str, float], met: Callable[[float], bool], form: str) -> None:
        missed = sorted((name for name in reached if not met(reached[name])), key=lambda name: reached[name])
        if form.endswith("us"):
            missed.reverse()
        count = f"{len(reached) - len(missed)} of {len(reached)}" if reached else ""
        result = "not measured" if not reached else "**missed**" if missed else "met"
        rows.append([words, result, count, some([f"{m} {form.format(reached[m])}" for m in missed], 3)])

    names = [name for name in TARGETS if name in record["environment"].get("gpu", "")]
    for dtype, least in (TARGETS[names[0]] if names else {}).items():
        for space in ("probs", "log_probs", "logits"):
            large = {
                f"({case['rows']}, {case['n']}) {case['outputs']}": c[PERCENT]
                for case, c in ours
                if PERCENT in c
                and (case["dtype"], case["space"]) == (dtype, space)
                and 2 * case["rows"] * case["n"] * SIZES[dtype] >= LARGE
            }
            words = f"{dtype} {space}, inputs of 1 GB and more: {least} % of a copy"
            add(words, large, functools.partial(operator.le, least), "{:.0f}")
    for name, times in AHEAD.items():
        ratios = {title(case): of(case, name)["ms"] / c["ms"] for case, c in ours if "ms" in of(case, name)}
        words = f"ahead of {name}" if times == 1 else f"{times:.0f} times as fast as {name}"
        add(words, ratios, functools.partial(operator.lt, times), "{:.2f}")
    calls = {name: us for name, us in found["overhead, microseconds"].items() if name.startswith(OURS)}
    add(f"a call from Python in {CALL_US:.0f} us", calls, functools.partial(operator.ge, CALL_US), "{:.1f} us")
    return markdown(["target", "result", "cases that met it", "farthest from it"], rows, text=(0, 1, 3))


def checks_table(record: dict[str, Any]) -> str:
    rows = []
    for name, stage in record["stages"].items():
        what = stage["notes"]
        if stage["failures"]:
            count = len(stage["failures"])
            what = f"{f'{count} failures, the first' if count > 1 else 'a failure'}: {stage['failures'][0]}; {what}"
        rows.append([name, stage["status"], f"{stage['seconds']:.0f}", what.replace("|", "/")[:400]])
    return markdown(["stage", "result", "seconds", ""], rows, text=(0, 1, 3))


PICTURE = """<picture>
  <source media="(prefers-color-scheme: dark)" srcset="plots/gpu-dark.svg">
  <img src="plots/gpu-light.svg" alt="Time as a multiple of a copy on the device, for klcore and other libraries.">
</picture>"""


def gpu_section(record: dict[str, Any], name: str, folder: str, earlier: Sequence[dict[str, Any]] = ()) -> str:
    """A whole record as Markdown; `folder` is the path to it, and `name` its name there."""
    about, found = record["environment"], benchmark_of(record)
    versions = ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items() if v != "not installed")
    parts = ["**Emulated on a CPU: these times mean nothing.**"] if record["emulated"] else []
    parts += [
        f"{about.get('gpu', 'unknown GPU')}, driver {about.get('nvidia-smi', {}).get('driver_version', 'unknown')}, "
        f"NVRTC {about.get('NVRTC', 'unknown')}; {record['date'][:10]}; klcore {record['commit']} (sources "
        f"{record['sources']}); {versions}."
    ]
    cases = found["cases"]
    compared = [c for c in cases if len(c["contenders"]) > 1]
    parts += ["Beside other libraries:", peers_table(compared), *absent(compared)] if compared else []
    if folder and cases:
        parts.append(PICTURE)
    if cases:
        parts += ["Targets:", targets(record)]
    unknown = [name for name, stage in record["stages"].items() if stage["status"] == "not run"]
    parts += [f"**Not run, so nothing is known about it: {', '.join(unknown)}.**"] if unknown else []
    if found["ceilings"]:
        speeds = sorted(found["ceilings"].items(), key=lambda entry: -entry[1])
        parts.append(
            "Memory, GB/s: " + "; ".join(f"{k} {v / 1e9:.0f}" for k, v in speeds) + ". 100 % is the fastest that "
            f'reads and writes, here "{found["100 percent"]}"; a value alone only reads, and can exceed it. Bytes are '
            "the necessary ones: each input read once, each gradient written once."
        )
    calls = found["overhead, microseconds"]
    if calls:
        parts.append(
            "A call on (10, 10), in microseconds: " + ", ".join(f"{n} {t:.1f}" for n, t in calls.items()) + "."
        )
    what, shape = ("dtype", "space", "outputs"), ("rows", "n")
    for part, words, row, column in (
        ("alone", "klcore by shape:", what, shape),
        ("operations", "Other operations and pairs of spaces:", ("operation", "space"), ("dtype", "outputs")),
        ("sweep", "By row length, 2^28 elements:", shape, what),
    ):
        chosen = [c for c in cases if c["part"] == part]
        parts += [words, ours_table(chosen, row, column)] if chosen else []
    if earlier and cases:
        parts += ["This and earlier versions of klcore on the same kind of GPU:", development(record, list(earlier))]
    if record["profile"]:
        parts += [
            "Under ncu, which slows launches somewhat. SM is the use of the busiest part of the multiprocessors, "
            "mostly instruction issue:",
            profile_table(record["profile"]),
        ]
    parts += ["Stages of the run:", checks_table(record)]
    parts += [f"Cases not run: {some(found['not run'])}."] if found["not run"] else []
    failed = [f"{key} ({why})" for key, why in found["failed"].items()]
    parts += [f"Not measured: {some(failed)}."] if failed else []
    parts += [f"From [{name}.json]({folder}{name}.json)."] if name else []
    return "\n\n".join(parts)


def plot(record: dict[str, Any], path: Path) -> bool:
    """Percent of the copy: klcore by what is computed and shape, every contender by case, klcore by row length. Needs
    matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    def what(case: dict[str, Any]) -> str:
        return f"{case['dtype']} {case['space']} {case['outputs']}"

    def dots(panel: Any, rows: list[str], points: dict[str, list[tuple[float, int]]]) -> None:
        for (name, found), marker in zip(points.items(), MARKERS * len(points), strict=False):
            if found:
                panel.plot(*zip(*found, strict=True), marker, ms=6 if name == OURS else 5, label=name)
        panel.set_yticks(range(len(rows)), rows)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.set_xlim(left=0)
        panel.set_xlabel("percent of a copy, on necessary bytes")
        panel.grid(alpha=0.3)
        panel.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=min(6, len(points)))

    def shapes(panel: Any, cases: list[dict[str, Any]]) -> None:
        rows = list(dict.fromkeys(map(what, cases)))
        points: dict[str, list[tuple[float, int]]] = {f"({c['rows']}, {c['n']})": [] for c in cases}
        for c in cases:
            points[f"({c['rows']}, {c['n']})"].append((of(c, OURS)[PERCENT], rows.index(what(c))))
        dots(panel, rows, points)

    def contenders(panel: Any, cases: list[dict[str, Any]]) -> None:
        names = list(dict.fromkeys(c["name"] for case in cases for c in case["contenders"]))
        dots(panel, list(map(title, cases)), {
            name: [(of(c, name)[PERCENT], k) for k, c in enumerate(cases) if PERCENT in of(c, name)] for name in names
        })  # fmt: skip

    def lengths(panel: Any, cases: list[dict[str, Any]]) -> None:
        for kind in dict.fromkeys(map(what, cases)):
            line = [(c["n"], of(c, OURS)[PERCENT]) for c in cases if what(c) == kind]
            panel.plot(*zip(*line, strict=True), ".-", label=kind)
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("classes a row")
        panel.set_ylabel("percent of a copy")
        panel.grid(alpha=0.3)
        panel.legend()

    cases = [c for c in benchmark_of(record).get("cases", []) if PERCENT in of(c, OURS)]
    chosen = (
        (shapes, [c for c in cases if c["part"] == "alone"]),
        (contenders, [c for c in cases if len(c["contenders"]) > 1]),
        (lengths, [c for c in cases if c["part"] == "sweep"]),
    )
    panels = [(draw, found) for draw, found in chosen if found]
    if not panels:
        return False
    # the same file for the same record
    with matplotlib.rc_context({"svg.hashsalt": "klcore", "svg.fonttype": "none", "font.size": 9}):
        heights = [3.5 if draw is not contenders else 1 + 0.25 * len(found) for draw, found in panels]
        figure, axes = pyplot.subplots(
            len(panels), 1, figsize=(9, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
        )
        for (draw, found), panel in zip(panels, axes[:, 0], strict=True):
            draw(panel, found)
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return True


def write(record: dict[str, Any], folder: Path) -> list[Path]:
    """The record, its page and its plot."""
    gpu = record["environment"].get("gpu", "unknown GPU")
    name = "-".join((re.sub("[^a-z0-9]+", "-", gpu.lower()).strip("-"), record["date"][:10], record["commit"]))
    path = folder / f"{name}.json"
    page, picture = path.with_suffix(".md"), path.with_suffix(".svg")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record) + "\n")
    drawn = [picture] if plot(record, picture) else []
    text = f"# klcore on {gpu}, {record['date'][:10]}\n\n{gpu_section(record, name, '')}\n"
    page.write_text(text + f"\n![Percent of copy bandwidth]({picture.name})\n" * len(drawn))
    return [path, page, *drawn]


# ---- docs/performance.md ---------------------------------------------------------------------------------------------

NO_GPU = (
    "There is no record of a GPU yet: the CUDA kernels are tested on an emulator, and their speed is unknown. "
    "`make gpu-check` makes a record on a machine with a GPU."
)


def newest_cpu(folder: Path) -> Path | None:
    records = [(json.loads(p.read_text())["machine"]["date"], p) for p in folder.glob("cpu-*.json")]
    return max(records)[1] if records else None


def gpus(folder: Path) -> list[Path]:
    """Records of real GPUs with figures, the newest first."""
    found = []
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        if benchmark_of(record).get("cases") and not record["emulated"]:
            found.append((record["date"], path))
    return [path for _, path in sorted(found, reverse=True)]


def newest_gpu(folder: Path) -> Path | None:
    return next(iter(gpus(folder)), None)


def newest_gpu_section(folder: Path) -> str:
    """The newest record, and earlier records of the same GPU."""
    paths = gpus(folder)
    if not paths:
        return NO_GPU
    newest, *others = [json.loads(path.read_text()) for path in paths]
    earlier = [r for r in others if r["environment"].get("gpu") == newest["environment"].get("gpu")]
    section = gpu_section(newest, paths[0].stem, "benchmarks/", earlier)
    links = [f"[{path.stem}](benchmarks/{path.name})" for path in paths[1:]]
    return section + (f"\n\nEarlier records: {', '.join(links)}." if links else "")


def marked(text: str, name: str, section: str, script: str) -> str:
    """`text`, a page, with the section between its marks of that name replaced."""
    start, end = f"<!-- {name}: made by benchmarks/{script} -->", f"<!-- {name}: end -->"
    made = f"{start}\n\n{section}\n\n{end}"
    text, count = re.subn(f"{re.escape(start)}.*{re.escape(end)}", lambda _: made, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page must have one section {name!r} by {script}, found {count}")
    return text


def page(text: str, folder: Path = RECORDS) -> str:
    """docs/performance.md with its marked sections regenerated from the records in `folder`."""
    cpu = newest_cpu(folder)
    sections = {
        "cpu": cpu_section(cpu) if cpu else "There is no record of a CPU yet: `make bench` makes one.",
        "gpu": newest_gpu_section(folder),
    }
    for name, section in sections.items():
        text = marked(text, name, section, "report.py")
    return text


def update_page() -> None:
    PAGE.write_text(page(PAGE.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="of gpu_run.py, that of the first call first")
    parser.add_argument("--to", type=Path, default=RECORDS, help="where the record goes: docs/benchmarks")
    args = parser.parse_args()
    if args.folders:
        missing = [str(folder / gpu_lines.NAME) for folder in args.folders if not (folder / gpu_lines.NAME).exists()]
        if missing:
            sys.exit(f"there is no {missing[0]}: name the folders that gpu_run.py wrote")
        lines = [line for folder in args.folders for line in gpu_lines.read(folder / gpu_lines.NAME)]
        profiles = [folder / "ncu.txt" for folder in args.folders if (folder / "ncu.txt").exists()]
        try:
            record = record_of(lines, "".join(path.read_text(errors="replace") for path in profiles[-1:]))
        except ValueError as error:
            sys.exit(f"{error}; one command a run")
        if record["emulated"] and args.to == RECORDS:
            sys.exit("these figures are emulated: they are no record of a GPU; --to DIR writes them elsewhere")
        for written in write(record, args.to):
            print(written)
    if args.to == RECORDS:
        update_page()
        print(PAGE)


if __name__ == "__main__":
    main()
