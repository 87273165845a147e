"""Tables, plots and docs/performance.md, from what gpu_run.py and side_by_side.py found.

    python benchmarks/gpu_report.py [FOLDER ...] [--to DIR]

makes of gpu_run.py's folders, those of one run, the record docs/benchmarks/GPU-DATE.json, and of that a page (.md) and,
if matplotlib is there, a plot (.svg) beside it; then it puts the newest records, of the CPU and of a GPU, into the
marked sections of docs/performance.md. It measures nothing and needs no GPU. gpu_run.py asks it how stages ended, and
for the table that it prints last.
"""

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_lines

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "performance.md"
OURS = "klcore"
SHOWN = 12  # entries of a list; the record has them all
LARGE = 1e9  # bytes of both inputs: what the targets of bandwidth are about
# percent of the copy that value, and value and gradient, are to reach
PERCENT = {"H100": {"float32": 90, "bfloat16": 85}, "H200": {"float32": 85, "bfloat16": 75}}
CALL_US = 20.0  # a call from Python, warm
AHEAD = {"torch.compile": 1.0, "Liger-Kernel": 1.0, "torch eager": 4.0}


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- the CPU ---------------------------------------------------------------------------------------------------------


def cpu_section(path: Path) -> str:
    """Median milliseconds of side_by_side.py's record."""
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

BENCHMARKS = ("alone", "peers", "more")  # stages


@dataclass
class Verdict:
    """How a stage ended, of all lines about it."""

    status: str  # ok, failed, skipped, not run, out of time, or cut off: with the whole run
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
    for line in mine:  # of a second call only what was left: the first counts
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
    """What is wrong with an item."""
    found = [line[key] for key in ("failed", "died") if key in line] + line.get("wrong", [])
    if line.get("outcome") == "failed":
        found.append(line["why"])
    for c in line.get("figures", {}).get("contenders", ()):
        if c["name"] == OURS and ("absent" in c or c["wrong"]):
            found.append(str(c.get("absent") or f"errors {c['errors']}"))
    return found


def notes(stage: str, verdict: Verdict, lines: list[dict[str, Any]]) -> str:
    """What is to be said about a stage, in a few words."""
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
    return "; ".join(dict.fromkeys(words))  # a second call says the same


def stages_of(lines: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for line in lines if line["stage"] == "run" for name in line["stages"]))


def record_of(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """All that one run found, in one or two calls, as docs/benchmarks keeps it."""
    runs = [line for line in lines if line["stage"] == "run"]
    if len({(line["sources"], line["emulated"]) for line in runs}) != 1:
        raise ValueError("these are not the results of one run: there must be one state of the sources")
    environments = [line["found"] for line in lines if line["stage"] == "environment" and "found" in line]
    measured = [line for line in lines if "item" in line and line["stage"] in (*BENCHMARKS, "ceilings")]
    figures = {line["item"]: line["figures"] for line in measured if "figures" in line}
    failed = {line["item"]: line[key] for line in measured for key in ("failed", "died") if key in line}
    planned = [name for line in lines if line["stage"] in BENCHMARKS for name in line.get("planned", ())]
    copies, calls = figures.pop("copies", {}), figures.pop("calls", {})
    stages = {}
    for name in stages_of(lines):
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
        "benchmark": {
            "ceilings": copies,
            "overhead, microseconds": calls,
            "cases": list(figures.values()),
            "failed": {name: why for name, why in failed.items() if name not in figures},
            "not run": [name for name in dict.fromkeys(planned) if name not in figures and name not in failed],
            "clocks": [line["clocks"] for line in lines if "clocks" in line],
        },
    }


def table(lines: list[dict[str, Any]]) -> list[str]:
    """What gpu_run.py prints last: the page, without what is long."""
    record = record_of(lines)
    found = benchmark_of(record)
    found["cases"] = [case for case in found["cases"] if case["part"] != "sweep"]
    made = [line[:400] for line in gpu_section(record, "", "").splitlines() if line and "| --" not in line]
    for name, stage in record["stages"].items():
        made += [f"{name} FAILED {words}"[:400] for words in stage["failures"][:3]]
    return made


# ---- a GPU's record --------------------------------------------------------------------------------------------------


def of(case: dict[str, Any], name: str) -> dict[str, Any]:
    """A contender's figures; none if it was not there."""
    return next((c for c in case["contenders"] if c["name"] == name), {})


def title(case: dict[str, Any]) -> str:
    return f"({case['rows']}, {case['n']}) {case['dtype']} {case['space']} {case['outputs']}"


def benchmark_of(record: dict[str, Any]) -> dict[str, Any]:
    return record.get("benchmark") or {}


def peers_table(cases: list[dict[str, Any]]) -> str:
    """Milliseconds, percent of the copy, and how many times klcore's time the others take."""
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
        rows.append([title(case), f"{ours['ms']:.3f}", f"**{ours['percent of copy']:.0f}**", *cells])
    return markdown(["", "klcore ms", "% of copy", *(f"{name}, times klcore" for name in names)], rows)


def ours_table(cases: list[dict[str, Any]]) -> str:
    """Percent of the copy: shapes by what is computed."""
    columns = list(dict.fromkeys((c["dtype"], c["space"], c["outputs"]) for c in cases))
    shapes = list(dict.fromkeys((c["rows"], c["n"]) for c in cases))
    at = {(c["rows"], c["n"], c["dtype"], c["space"], c["outputs"]): of(c, OURS).get("percent of copy") for c in cases}
    rows = []
    for shape in shapes:
        found = [at.get((*shape, *column)) for column in columns]
        rows.append([f"{shape}", *("" if v is None else f"{v:.0f}" for v in found)])
    return markdown(["% of copy", *(" ".join(column) for column in columns)], rows)


def absent(cases: list[dict[str, Any]]) -> list[str]:
    """Who could not be measured, and why."""
    found = {f"{c['name']}: {c['absent']}": None for case in cases for c in case["contenders"] if "absent" in c}
    return [f"Absent from some cases: {some(list(found))}."] if found else []


def some(entries: list[str], shown: int = SHOWN) -> str:
    rest = f"; and {len(entries) - shown} more" if len(entries) > shown else ""
    return "; ".join(entries[:shown]) + rest


def targets(record: dict[str, Any]) -> list[str]:
    """Whether each target was met, as a list; where not, by which cases."""
    found = benchmark_of(record)
    ours = [(case, of(case, OURS)) for case in found.get("cases", []) if "ms" in of(case, OURS)]
    if not ours:
        return []

    def line(words: str, asked: list[str], missed: list[str]) -> str:
        if not asked:
            return f"* {words}: not measured."
        met = f"{len(asked) - len(missed)} of {len(asked)} cases"
        return f"* {words}: {f'missed, {met}; not {some(missed)}' if missed else f'met, {met}'}."

    lines = []
    names = [name for name in PERCENT if name in record["environment"].get("gpu", "")]
    for dtype, percent in (PERCENT[names[0]] if names else {}).items():
        size = 8 if dtype == "float32" else 4  # bytes of both inputs
        large = [
            (f"{title(case)} ({c['percent of copy']:.0f})", c["percent of copy"])
            for case, c in ours
            if case["part"] != "sweep" and case["dtype"] == dtype and case["rows"] * case["n"] * size >= LARGE
        ]
        missed = [words for words, reached in large if reached < percent]
        lines.append(
            line(f"{dtype}, inputs of 1 GB and more, {percent} percent of the copy", [w for w, _ in large], missed)
        )
    for name, times in AHEAD.items():
        ratios = {title(case): of(case, name)["ms"] / c["ms"] for case, c in ours if "ms" in of(case, name)}
        behind = [f"{t} ({r:.2f})" for t, r in ratios.items() if r <= times]
        words = f"ahead of {name}" if times == 1 else f"{times:.0f} times as fast as {name}"
        lines.append(line(words, list(ratios), behind))
    calls = {name: us for name, us in found["overhead, microseconds"].items() if name.startswith(OURS)}
    slow = [f"{name} ({us:.1f})" for name, us in calls.items() if us > CALL_US]
    lines.append(line(f"a call from Python in {CALL_US:.0f} microseconds", list(calls), slow))
    return lines


def checks_table(record: dict[str, Any]) -> str:
    rows = []
    for name, stage in record["stages"].items():
        what = stage["notes"]
        if stage["failures"]:
            what = f"{len(stage['failures'])} failures, the first: {stage['failures'][0]}; {what}"
        rows.append([name, stage["status"], f"{stage['seconds']:.0f}", what.replace("|", "/")[:400]])
    return markdown(["stage", "result", "seconds", ""], rows)


PICTURE = """<picture>
  <source media="(prefers-color-scheme: dark)" srcset="plots/gpu-dark.svg">
  <img src="plots/gpu-light.svg" alt="Time as a multiple of a copy on the device, for klcore and other libraries.">
</picture>"""


def gpu_section(record: dict[str, Any], name: str, folder: str) -> str:
    """A whole record as Markdown; `folder` leads to it, and `name` is what it is called there."""
    about, found = record["environment"], benchmark_of(record)
    versions = ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items() if v != "not installed")
    parts = ["**Emulated on a CPU: not one of these times means anything.**"] if record["emulated"] else []
    parts += [
        f"{about.get('gpu', 'unknown GPU')}, driver {about.get('nvidia-smi', {}).get('driver_version', 'unknown')}, "
        f"NVRTC {about.get('NVRTC', 'unknown')}; {record['date'][:10]}; klcore {record['commit']} (sources "
        f"{record['sources']}); {versions}."
    ]
    if folder:
        parts.append(PICTURE)
    if found["ceilings"]:
        parts.append(
            "Memory: " + ", ".join(f"{k} {v / 1e9:.0f} GB/s" for k, v in found["ceilings"].items()) + ". "
            "Percentages below are of the copy, on necessary bytes."
        )
    calls = found["overhead, microseconds"]
    if calls:
        parts.append(
            "A call on (10, 10), in microseconds: " + ", ".join(f"{n} {t:.1f}" for n, t in calls.items()) + "."
        )
    cases = found["cases"]
    for part, words in (("alone", "klcore over shapes:"), ("sweep", "klcore over row lengths, 2^28 elements:")):
        chosen = [c for c in cases if c["part"] == part]
        parts += [words, ours_table(chosen)] if chosen else []
    compared = [c for c in cases if len(c["contenders"]) > 1]
    parts += ["Beside other libraries:", peers_table(compared), *absent(compared)] if compared else []
    parts += ["\n".join(targets(record))] if cases else []
    parts += ["Stages of the run:", checks_table(record)]
    parts += [f"Not run: {some(found['not run'])}."] if found["not run"] else []
    failed = [f"{key} ({why})" for key, why in found["failed"].items()]
    parts += [f"Not measured: {some(failed)}."] if failed else []
    parts += [f"From [{name}.json]({folder}{name}.json)."] if name else []
    return "\n\n".join(parts)


def plot(record: dict[str, Any], path: Path) -> bool:
    """Percent of copy bandwidth: every contender by case, and klcore by row length. Needs matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    cases = benchmark_of(record).get("cases", [])
    compared = [c for c in cases if len(c["contenders"]) > 1] or cases[:40]
    swept = [c for c in cases if c["part"] == "sweep"]
    if not compared:
        return False
    # the same file for the same record
    with matplotlib.rc_context({"svg.hashsalt": "klcore", "svg.fonttype": "none", "font.size": 8}):
        heights = [max(2.0, 0.2 * len(compared)), 3.5 if swept else 0.1]
        figure, (above, below) = pyplot.subplots(
            2, 1, figsize=(9, sum(heights)), height_ratios=heights, layout="constrained"
        )
        names = list(dict.fromkeys(c["name"] for case in compared for c in case["contenders"]))
        for name, marker in zip(names, "osD^v<>ph*", strict=False):
            points = [(of(c, name)["percent of copy"], k) for k, c in enumerate(compared) if "ms" in of(c, name)]
            if points:
                above.plot(*zip(*points, strict=True), marker, ms=5 if name == OURS else 4, label=name)
        above.set_yticks(range(len(compared)), [title(c) for c in compared])
        above.invert_yaxis()
        above.set_xlim(left=0)
        above.set_xlabel("percent of copy bandwidth, on necessary bytes")
        above.grid(axis="x", alpha=0.3)
        above.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=len(names))
        if swept:
            for kind in dict.fromkeys((c["dtype"], c["space"], c["outputs"]) for c in swept):
                line = [
                    (c["n"], of(c, OURS)["percent of copy"])
                    for c in swept
                    if (c["dtype"], c["space"], c["outputs"]) == kind and "ms" in of(c, OURS)
                ]
                below.plot(*zip(*line, strict=True), ".-", label=" ".join(kind))
            below.set_xscale("log", base=2)
            below.set_ylim(bottom=0)
            below.set_xlabel("classes a row")
            below.set_ylabel("percent of copy")
            below.grid(alpha=0.3)
            below.legend()
        else:
            below.axis("off")
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return True


def write(record: dict[str, Any], folder: Path) -> list[Path]:
    """The record, its page and its plot."""
    gpu = record["environment"].get("gpu", "unknown GPU")
    name = f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{record['date'][:10]}"
    path = folder / f"{name}.json"
    page, picture = path.with_suffix(".md"), path.with_suffix(".svg")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    drawn = [picture] if plot(record, picture) else []
    text = f"# klcore on {gpu}, {record['date'][:10]}\n\n{gpu_section(record, name, '')}\n"
    page.write_text(text + f"\n![Percent of copy bandwidth]({picture.name})\n" * len(drawn))
    return [path, page, *drawn]


# ---- docs/performance.md ---------------------------------------------------------------------------------------------

NO_GPU = (
    "There is no record of a GPU yet: the CUDA kernels are tested on an emulator, and no figure of theirs is known. On "
    "a machine with a GPU, `make gpu-check` makes one."
)


def newest_cpu(folder: Path) -> Path | None:
    records = [(json.loads(p.read_text())["machine"]["date"], p) for p in folder.glob("cpu-*.json")]
    return max(records)[1] if records else None


def newest_gpu(folder: Path) -> Path | None:
    found = []
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        if benchmark_of(record).get("cases") and not record["emulated"]:
            found.append((record["date"], path))
    return max(found)[1] if found else None


def marked(text: str, name: str, section: str, script: str) -> str:
    """`text`, a page, with what is between its marks of that name made anew."""
    start, end = f"<!-- {name}: made by benchmarks/{script} -->", f"<!-- {name}: end -->"
    made = f"{start}\n\n{section}\n\n{end}"
    text, count = re.subn(f"{re.escape(start)}.*{re.escape(end)}", lambda _: made, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page must have one section {name!r} by {script}, found {count}")
    return text


def page(text: str, folder: Path = RECORDS) -> str:
    """docs/performance.md with its marked sections made anew from the records in `folder`."""
    cpu, gpu = newest_cpu(folder), newest_gpu(folder)
    sections = {
        "cpu": cpu_section(cpu) if cpu else "There is no record of a CPU: `make bench` makes one.",
        "gpu": gpu_section(json.loads(gpu.read_text()), gpu.stem, "benchmarks/") if gpu else NO_GPU,
    }
    for name, section in sections.items():
        text = marked(text, name, section, "gpu_report.py")
    return text


def update_page() -> None:
    PAGE.write_text(page(PAGE.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="of gpu_run.py, the first call's first")
    parser.add_argument("--to", type=Path, default=RECORDS, help="where the record goes: docs/benchmarks")
    args = parser.parse_args()
    if args.folders:
        missing = [str(folder / gpu_lines.NAME) for folder in args.folders if not (folder / gpu_lines.NAME).exists()]
        if missing:
            sys.exit(f"there is no {missing[0]}: name the folders that gpu_run.py wrote")
        record = record_of([line for folder in args.folders for line in gpu_lines.read(folder / gpu_lines.NAME)])
        if record["emulated"] and args.to == RECORDS:
            sys.exit("these figures are emulated: they are no record of a GPU; --to DIR writes them elsewhere")
        for written in write(record, args.to):
            print(written)
    if args.to == RECORDS:
        update_page()
        print(PAGE)


if __name__ == "__main__":
    main()
