"""Tables, plots and docs/performance.md, from the records in docs/benchmarks.

    python benchmarks/gpu_report.py [FILE.json ...]

writes FILE.md and, if matplotlib is there, FILE.svg beside each record of gpu_check.py, and puts the newest records, of
the CPU and of a GPU, into the marked sections of docs/performance.md. It measures nothing and needs no GPU.
"""

import importlib.util
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "performance.md"
OURS = "klcore"
SHOWN = 12  # entries of a list; the record has them all
LARGE = 1e9  # bytes of both inputs: what the target of bandwidth is about
PERCENT = 90  # of the copy, of large arrays; value, or value and one gradient, float32 and bfloat16
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


# ---- a GPU -----------------------------------------------------------------------------------------------------------


def of(case: dict[str, Any], name: str) -> dict[str, Any]:
    """A contender's figures; none if it was not there."""
    return next((c for c in case["contenders"] if c["name"] == name), {})


def title(case: dict[str, Any]) -> str:
    return f"({case['rows']}, {case['n']}) {case['dtype']} {case['space']} {case['outputs']}"


def benchmark_of(record: dict[str, Any]) -> dict[str, Any]:
    return record["steps"].get("benchmark", {}).get("details") or {}


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


def details_table(cases: list[dict[str, Any]]) -> str:
    """What else was seen of each contender: memory, errors, first calls, launches."""
    names = list(dict.fromkeys(c["name"] for case in cases for c in case["contenders"]))
    rows = []
    for name in names:
        found = [c for case in cases for c in case["contenders"] if c["name"] == name and "ms" in c]
        reasons = {c["absent"] for case in cases for c in case["contenders"] if c["name"] == name and "absent" in c}
        if not found:
            rows.append([name, "", "", "", "", "; ".join(sorted(reasons))])
            continue
        extra = [c["extra bytes"] for c in found if c["extra bytes"] is not None]
        exact = [
            max(of(case, name)["errors"].values())
            for case in cases
            if case["dtype"] == "float32" and "ms" in of(case, name)
        ]
        rows.append(
            [
                name,
                f"{max(c['first call s'] for c in found):.2f}",
                f"{min(c['wall us'] for c in found):.1f}",
                f"{max(extra) / 2**20:.1f}" if extra else "",
                f"{max(exact):.1e}" if exact else "",
                "; ".join(sorted(reasons)),
            ]
        )
    header = [
        "",
        "longest first call, s",
        "shortest call from Python, us",
        "most extra memory, MiB",
        "greatest float32 error",
    ]
    return markdown([*header, "absent from some cases because"], rows)


def some(entries: list[str]) -> str:
    rest = f"; and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return "; ".join(entries[:SHOWN]) + rest


def targets(cases: list[dict[str, Any]]) -> list[str]:
    """Whether each target was met, as a list; where not, by which cases."""
    ours = [(case, of(case, OURS)) for case in cases if "ms" in of(case, OURS)]

    def line(words: str, asked: list[str], missed: list[str]) -> str:
        if not asked:
            return f"* {words}: not measured."
        met = f"{len(asked) - len(missed)} of {len(asked)} cases"
        return f"* {words}: {met}{f'; not {some(missed)}' if missed else ''}."

    large = [
        (case, c)
        for case, c in ours
        if case["part"] != "sweep"
        and case["dtype"] != "float16"
        and case["outputs"] != "value+dx+dy"
        and case["rows"] * case["n"] * (8 if case["dtype"] == "float32" else 4) >= LARGE
    ]
    slow = [f"{title(case)} ({c['percent of copy']:.0f})" for case, c in large if c["percent of copy"] < PERCENT]
    lines = [line(f"{PERCENT} percent of the copy, inputs of 1 GB and more", [title(c) for c, _ in large], slow)]
    for name, times in AHEAD.items():
        ratios = {title(case): of(case, name)["ms"] / c["ms"] for case, c in ours if "ms" in of(case, name)}
        behind = [f"{t} ({r:.2f})" for t, r in ratios.items() if r <= times]
        words = f"ahead of {name}" if times == 1 else f"{times:.0f} times as fast as {name}"
        lines.append(line(words, list(ratios), behind))
    return lines


def checks_table(record: dict[str, Any]) -> str:
    rows = []
    for name, step in record["steps"].items():
        what = step["skipped"] or "; ".join(step["notes"])
        if step["failures"]:
            what = f"{len(step['failures'])} failures, the first: {step['failures'][0]}"
        rows.append([name, step["status"], f"{step['seconds']:.0f}", what.replace("|", "/")[:400]])
    return markdown(["step", "result", "seconds", ""], rows)


def gpu_section(record: dict[str, Any], name: str, folder: str) -> str:
    """A whole record as Markdown; `folder` leads to it."""
    about, found = record["environment"] or {}, benchmark_of(record)
    versions = ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items() if v != "not installed")
    parts = [
        f"{about.get('gpu', 'unknown GPU')}, driver {about.get('nvidia-smi', {}).get('driver_version', 'unknown')}, "
        f"NVRTC {about.get('NVRTC', 'unknown')}; {record['date'][:10]}; klcore {record['commit']} (sources "
        f"{record['sources']}); {versions}.",
        checks_table(record),
    ]
    if record["emulated"]:
        parts.insert(0, "**Emulated on a CPU: not one of these times means anything.**")
    if found.get("ceilings"):
        parts.append(
            "Memory: " + ", ".join(f"{k} {v / 1e9:.0f} GB/s" for k, v in found["ceilings"].items()) + ". "
            "Percentages below are of the copy, on necessary bytes."
        )
    cases = found.get("cases", [])
    compared = [c for c in cases if len(c["contenders"]) > 1]
    if compared:
        parts += ["Beside other libraries:", peers_table(compared)]
    for part, words in (("klcore alone", "klcore over shapes:"), ("sweep", "klcore over row lengths, 2^28 elements:")):
        chosen = [c for c in cases if c["part"] == part]
        if chosen:
            parts += [words, ours_table(chosen)]
    if compared:
        parts.append(details_table(compared))
    calls = found.get("overhead, microseconds")
    if calls:
        parts.append(
            "A call on (10, 10), in microseconds: " + ", ".join(f"{n} {t:.1f}" for n, t in calls.items()) + "."
        )
    if cases:
        parts.append("\n".join(targets(cases)))
    if found.get("not run"):
        parts.append(f"Not run: {some(found['not run'])}.")
    if found.get("failed"):
        parts.append(f"Not measured: {some([f'{key} ({why})' for key, why in found['failed'].items()])}.")
    if (RECORDS / f"{name}.svg").exists() and folder:
        parts.append(f"![Percent of copy bandwidth]({folder}{name}.svg)")
    parts.append(f"From [{name}.json]({folder}{name}.json).")
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


def write(path: Path) -> list[Path]:
    """The table and the plot of one record, beside it."""
    record = json.loads(path.read_text())
    table, picture = path.with_suffix(".md"), path.with_suffix(".svg")
    written = [picture] if plot(record, picture) else []
    heading = f"# klcore on {(record['environment'] or {}).get('gpu', 'an unknown GPU')}, {record['date'][:10]}"
    text = f"{heading}\n\n{gpu_section(record, path.stem, '')}\n"
    if written:
        text += f"\n![Percent of copy bandwidth]({picture.name})\n"
    table.write_text(text)
    return [table, *written]


# ---- docs/performance.md ---------------------------------------------------------------------------------------------

NO_GPU = (
    "There is no record of a GPU yet: the CUDA kernels are tested on an emulator, and no figure of theirs is known. On "
    "a machine with a GPU, `make gpu-check` makes one, in less than ten minutes."
)


def newest_cpu(folder: Path) -> Path | None:
    records = [(json.loads(p.read_text())["machine"]["date"], p) for p in folder.glob("cpu-*.json")]
    return max(records)[1] if records else None


def newest_gpu(folder: Path) -> Path | None:
    found = []
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        if "steps" in record and not record["emulated"] and benchmark_of(record).get("cases"):
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
    for argument in sys.argv[1:]:
        if argument.startswith("-"):
            sys.exit((__doc__ or "").strip())
        for written in write(Path(argument)):
            print(written)
    update_page()
    print(PAGE)


if __name__ == "__main__":
    main()
