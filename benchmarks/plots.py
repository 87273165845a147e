"""The plots of README.md, docs/accuracy.md, docs/performance.md and docs/choosing.md: ``make plots``.

    python benchmarks/plots.py

writes docs/plots/NAME-light.svg and NAME-dark.svg, for light and dark pages, and the tables of docs/accuracy.md. It
measures nothing: it draws the newest records in docs/benchmarks, written by accuracy.py, side_by_side.py and
report.py, and the divergences as klcore computes them. examples/style.py has their look. The same record
gives the same file.
"""

import functools
import hashlib
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from report import OURS, PERCENT, RECORDS, benchmark_of, markdown, marked, newest_cpu, newest_gpu

import klcore
from klcore.operations import OPERATIONS

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from style import WIDTH, head, write

PLOTS = RECORDS.parent / "plots"
PAGE = RECORDS.parent / "accuracy.md"
# contender -> colour, marker, line
LOOKS = {
    OURS: ("blue", "o", "-"),
    "klcore, new arrays": ("blue", "o", "-"),
    "PyTorch": ("orange", "s", "-"),
    "torch eager": ("orange", "s", "-"),
    "torch.compile": ("orange", "D", "-"),
    "JAX": ("green", "^", "-"),
    "JAX jit": ("green", "^", "-"),
    "Liger-Kernel": ("pink", "P", "-"),
    "NumPy": ("pink", "v", "-"),
    "SciPy": ("yellow", "X", "-"),
    "SciPy kl_div": ("yellow", "X", "-"),
    "SciPy entropy": ("yellow", "*", ":"),
    "numba": ("grey", "<", "-"),
    "numexpr": ("grey", ">", "-"),
}
OTHER = ("grey", "d", "-")
ORDER = {name: k for k, name in enumerate(LOOKS)}
HOLLOW = "klcore, new arrays"
WORDS = {"probs": "probabilities", "log_probs": "log-probabilities", "logits": "logits"}

Theme = dict[str, str]


def look(name: str, theme: Theme, **more: Any) -> dict[str, Any]:
    """How a contender is drawn; klcore above the others."""
    colour, marker, line = LOOKS.get(name, OTHER)
    ours = name == OURS
    style = {
        "color": theme[colour], "marker": marker, "linestyle": line, "linewidth": 2.4 if ours else 1.2,
        "markersize": 7 if ours else 6, "markeredgewidth": 1.2, "zorder": 5 if ours else 3, "label": name,
        "markerfacecolor": "none" if name == HOLLOW else theme[colour],
    }  # fmt: skip
    return style | more


def array(found: list[float | None]) -> np.ndarray:
    return np.array(found, np.float64)


# ---- elementary functions --------------------------------------------------------------------------------------------

LEAST, TOP = 0.35, 8.0  # ulp; a larger error is written as a number


def elementary(record: dict[str, Any], theme: Theme) -> Figure:
    """Worst error in ulp by octave: a row of panels per function, a column per dtype."""
    about = record["elementary"]
    functions = list(dict.fromkeys(name.split()[0] for name in about["ulp"]))
    dtypes = list(about["bounds"])
    figure, axes = pyplot.subplots(
        len(functions), len(dtypes), figsize=(WIDTH, 8), sharex=True, sharey=True, layout="constrained"
    )
    centres = 2.0 ** (np.array(about["octaves"]) + 0.5)
    bound = {"color": theme["ink"], "linestyle": "--", "linewidth": 1.4}
    for row, function in zip(axes, functions, strict=True):
        row[0].set_ylabel(f"{function}, ulp")
        for panel, dtype in zip(row, dtypes, strict=True):
            panel.axhline(about["bounds"][dtype], **bound)
            for k, (name, found) in enumerate(about["ulp"][f"{function} {dtype}"].items()):
                errors = array(found)
                style = look(name, theme, markersize=5)
                panel.plot(centres, np.where(errors >= LEAST, errors, np.nan), markevery=(4 * k, 16), **style)
                if np.nanmax(errors) > TOP:
                    at = centres[np.nanargmax(errors)]
                    words = f"{name} {np.nanmax(errors):.0f} \N{UPWARDS ARROW}"
                    panel.annotate(
                        words, (at, TOP), (6, -4), textcoords="offset points", va="top", color=style["color"], size=11
                    )
    for panel, dtype in zip(axes[0], dtypes, strict=True):
        panel.set_title(dtype, loc="left")
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_xlim(2.0 ** about["octaves"][0], 2.0 ** (about["octaves"][-1] + 1))
    axes[0, 0].set_xticks([2.0**k for k in (-24, 0, 24)])
    axes[0, 0].set_yscale("log", base=2)
    axes[0, 0].set_ylim(LEAST, TOP)
    axes[0, 0].set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    figure.supxlabel("size of the argument", size=12)
    names = next(iter(about["ulp"].values()))
    handles = [Line2D([], [], **look(name, theme)) for name in names]
    handles.append(Line2D([], [], label="klcore's bound", **bound))
    head(figure, "Elementary functions: klcore stays within 1 ulp", handles)
    return figure


# ---- divergences -----------------------------------------------------------------------------------------------------

PANELS = {
    ("probs", "values"): "value, from probabilities",
    ("log_probs", "values"): "value, from log-probabilities",
    ("logits", "values"): "value, from logits",
    ("logits", "gradients"): "gradient with respect to logits",
}
RANGES = {"float32": (1e-8, 1e8), "float64": (1e-16, 1e1)}
TICKS = {"float32": [1e-8, 1e-4, 1, 1e4, 1e8], "float64": [1e-16, 1e-12, 1e-8, 1e-4, 1]}
LIKE_NUMPY = "SciPy rel_entr"  # its errors are NumPy's; the tables show both
LITERAL, DIVERGENCE = "x log(x/y)", "x log(x/y) - x + y"


def divergence(record: dict[str, Any], theme: Theme, dtype: str) -> Figure:
    """Worst error by decade of the divergence, one panel per kind of input."""
    about = record["divergence"]
    figure, axes = pyplot.subplots(
        len(PANELS), 1, figsize=(WIDTH, 10.5), sharex=True, sharey=True, layout="constrained"
    )
    centres = 10.0 ** (np.array(about["decades"]) + 0.5)
    of_bound = {"color": theme["ink"], "linestyle": "--", "linewidth": 1.4, "label": "klcore's bound"}
    of_literal = {"color": theme["ink"], "linestyle": ":", "linewidth": 2, "label": f"exact {LITERAL}"}
    names: dict[str, None] = {}
    for panel, ((space, of_what), title) in zip(axes, PANELS.items(), strict=True):
        found = about[f"{space} {dtype}"]
        bound = np.full(len(centres), about["bounds"][of_what][dtype])
        if "formulas" in found:
            bound += array(found["formulas"][DIVERGENCE]["worst"])
            panel.plot(centres, array(found["formulas"][LITERAL]["worst"]), **of_literal, zorder=6)
        panel.plot(centres, bound, **of_bound, zorder=2)
        shown = {name: errors for name, errors in found[of_what].items() if name != LIKE_NUMPY}
        for k, (name, errors) in enumerate(shown.items()):  # markers at alternating points: many of the lines coincide
            panel.plot(centres, array(errors["worst"]), markevery=(k % 3, 3), **look(name, theme))
        names |= dict.fromkeys(shown)
        remarks = []
        for what in ("negative", "not finite"):
            counts = {name: sum(errors[what]) for name, errors in shown.items() if sum(errors.get(what, []))}
            words = f"{what}, of {sum(found['pairs'])}: " + ", ".join(f"{name} {k}" for name, k in counts.items())
            remarks += textwrap.wrap(words, 42) if counts else []
        panel.text(0.99, 0.97, "\n".join(remarks), transform=panel.transAxes, ha="right", va="top", size=10.5)
        panel.set_title(title, loc="left")
        panel.minorticks_off()
    axes[0].set(xscale="log", yscale="log", xlim=(0.7 * centres[0], 1.4 * centres[-1]), ylim=RANGES[dtype])
    axes[0].set(xticks=[10.0**k for k in (-12, -9, -6, -3, 0)], yticks=TICKS[dtype])
    axes[-1].set_xlabel("KL divergence, nats")
    figure.supylabel("worst relative error", size=12)
    handles = [Line2D([], [], **look(name, theme)) for name in names]
    handles += [Line2D([], [], **of_bound), Line2D([], [], **of_literal)]
    head(figure, f"{dtype}: klcore keeps its digits when distributions are close", handles)
    return figure


# ---- speed -----------------------------------------------------------------------------------------------------------


def ratios(times: dict[str, dict[str, float]], device: str, floor: str, theme: Theme) -> Figure:
    """The contenders' times as multiples of the floor, one line per operation."""
    names = sorted({name for found in times.values() for name in found}, key=lambda name: (ORDER.get(name, 99), name))
    figure, panel = pyplot.subplots(figsize=(WIDTH, 2.2 + 0.55 * len(times)), layout="constrained")
    panel.axvline(1, color=theme["ink"], linestyle="--", linewidth=1.4)
    for name in names:
        at = [(found[name], k) for k, found in enumerate(times.values()) if name in found]
        panel.plot(*zip(*at, strict=True), **look(name, theme, linestyle="", markersize=11 if name == OURS else 8))
    panel.set_xscale("log")
    panel.set_xlim(0.8, None)
    panel.xaxis.set_major_formatter("{x:g}")
    if panel.get_xlim()[1] < 10:  # a power-of-ten axis would show a single label
        panel.set_xticks([t for t in (1, 1.5, 2, 3, 4, 6, 8) if t < panel.get_xlim()[1]])
        panel.minorticks_off()
    panel.set_yticks(range(len(times)), list(times))
    panel.set_ylim(len(times) - 0.5, -0.5)
    panel.set_xlabel(f"time, multiples of {floor}")
    ours = [found[OURS] for found in times.values() if OURS in found]
    title = f"{device}: klcore takes {min(ours):.1f} to {max(ours):.1f} times {floor}"
    head(figure, title, [Line2D([], [], **look(name, theme, linestyle="", markersize=8)) for name in names])
    return figure


def cpu(record: dict[str, Any], theme: Theme) -> Figure:
    """From side_by_side.py's record, the values of rows: a sum over them takes as long."""
    times: dict[str, dict[str, float]] = {}
    for title, figures in record["operations"].items():
        what, space, reduction = title.split(", ")
        if reduction == "'row'":
            label = f"{WORDS[space]}\n{what}"
            times[label] = {f["contender"]: f["times_floor"] for f in figures if f.get("times_floor")}
            times[label] = {name: t for name, t in times[label].items() if not name.startswith("floor")}
    order = sorted(times, key=lambda label: ("gradient" in label, list(WORDS.values()).index(label.partition("\n")[0])))
    return ratios({label: times[label] for label in order}, "CPU", "the floor", theme)


def gpu(record: dict[str, Any], theme: Theme) -> Figure:
    """From a GPU's record, the first shape at which all contenders ran; report.py draws every case."""
    cases = benchmark_of(record)["cases"]
    compared = [c for c in cases if len(c["contenders"]) > 1] or cases
    shape = [(c["rows"], c["n"]) for c in compared][:1]
    times = {}
    for case in compared:
        if (case["rows"], case["n"]) in shape and case["outputs"] in ("value", "value+dy"):
            what = "value" if case["outputs"] == "value" else "value and gradient"
            found = [c for c in case["contenders"] if PERCENT in c and not c["wrong"]]
            label = f"{WORDS[case['space']]}\n{what}, {case['dtype']}"
            times[label] = {c["name"]: 100 / c[PERCENT] for c in found}
    return ratios(times, "GPU", "a copy", theme)


# ---- the front page --------------------------------------------------------------------------------------------------

LOST = 1e-7  # nats: float32's rounding of a sum of terms of order 1
TIMED = "value and gradient, logits, 'row'"
NAMED = {
    OURS: "klcore, out=", HOLLOW: "klcore, new arrays", "torch.compile": "torch.compile", "numba": "numba",
    "JAX jit": "JAX jit", "torch eager": "PyTorch",
}  # fmt: skip


def returned(panel: Axes, record: dict[str, Any], theme: Theme) -> None:
    """What is returned for pairs of rows, against the exact divergence; below the line at 0 the negative ones."""
    exact = array(record["exact"])
    panel.plot(exact, exact, color=theme["ink"], linewidth=1.2, zorder=4)
    panel.axhspan(-1, 0, color=theme["orange"], alpha=0.12, linewidth=0)
    others = [name for name in record["returned"] if name != OURS]
    for name in [*others, OURS]:
        style = look(name, theme, linestyle="", markersize=6 if name == OURS else 5)
        panel.plot(exact, array(record["returned"][name]), **style)
    below = exact < LOST
    negative = sum(int((array(record["returned"][name])[below] < 0).sum()) for name in others)
    panel.set_title(
        f"Below {short(LOST)} the usual lines return noise:\n"
        f"{negative} of {len(others) * below.sum()} values are negative",
        x=-0.3, ha="left", weight="bold", pad=12,
    )  # fmt: skip
    panel.set_xscale("log")
    panel.set_yscale("symlog", linthresh=1e-12, linscale=0.3)
    panel.set(xlim=(1e-12, 1), ylim=(-1e-6, 1), xticks=[1e-12, 1e-8, 1e-4, 1], yticks=[-1e-8, 0, 1e-8, 1e-4, 1])
    panel.minorticks_off()
    panel.set(xlabel="exact KL of float32 logits, nats", ylabel="returned")
    panel.legend(frameon=False, loc="upper left", handletextpad=0.2, borderaxespad=0.2)


def times(panel: Axes, record: dict[str, Any], theme: Theme) -> None:
    """Milliseconds of one call for value and gradient."""
    found = {f["contender"]: f["median_ms"] for f in record["operations"][TIMED] if f["contender"] in NAMED}
    names = sorted(found, key=lambda name: found[name])
    for k, name in enumerate(names):
        colour = theme["blue" if name in (OURS, HOLLOW) else "grey"]
        panel.barh(k, found[name], color="none" if name == HOLLOW else colour, edgecolor=colour, linewidth=1.6)
        panel.annotate(f"{found[name]:,.0f}", (found[name], k), (4, 0), textcoords="offset points", va="center")
    other = found["torch.compile"]
    panel.set_title(
        f"{other / found[OURS]:.1f} times the speed of torch.compile with out=,\n"
        f"{other / found[HOLLOW]:.1f} times without",
        x=-0.53, ha="left", weight="bold", pad=12,
    )  # fmt: skip
    panel.set_yticks(range(len(names)), [NAMED[name] for name in names])
    panel.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, 1.18 * max(found.values())), xticks=[])
    panel.tick_params(length=0)
    panel.spines["bottom"].set_visible(False)
    panel.grid(visible=False)
    panel.set_xlabel("ms, value + gradient of logits")


def front(close: dict[str, Any], speed: dict[str, Any], theme: Theme) -> Figure:
    """For README.md: right and fast."""
    with pyplot.rc_context({"font.size": 14, "axes.titlesize": 14}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
        returned(left, close, theme)
        times(right, speed, theme)
    return figure


# ---- the divergences -------------------------------------------------------------------------------------------------

HEIGHT = 1.5  # nats
# colour, line, and position of the name: after the line's right end, or above the end if the line leaves the picture
MEMBERS = {
    "chi2_div": ("orange", "-", "right"),
    "kl_div": ("blue", "-", "left"),
    "mixed_kl_div": ("pink", "--", "far right"),
    "alpha_div": ("green", "-", ""),
    "skew_kl_div": ("blue", "--", ""),
    "tv_dist": ("yellow", "-", ""),
    "sq_hellinger": ("green", "--", ""),
    "renyi_div": ("orange", "--", ""),
    "js_div": ("pink", "-", ""),
}


def family(theme: Theme) -> Figure:
    """All divergences of (1/2, 1/2) from (s, 1 - s), with the default parameters."""
    s = np.linspace(0, 1, 2001)
    y = np.stack([s, 1 - s], -1)
    figure, panel = pyplot.subplots(figsize=(WIDTH, 5), layout="constrained")
    for name, (colour, line, place) in MEMBERS.items():
        values = getattr(klcore, name)([0.5, 0.5], y, **OPERATIONS[name].needed)
        style = {"color": theme[colour], "linestyle": line}
        panel.plot(s, np.where(values <= HEIGHT, values, np.nan), linewidth=2.4 if name == "kl_div" else 1.8, **style)
        words = {"text": name, "color": theme[colour], "textcoords": "offset points", "annotation_clip": False}
        if place:
            inside = s[values <= HEIGHT]
            at = inside[0] if place == "left" else inside[-1]
            sides = {"left": "left", "right": "center", "far right": "left"}
            panel.annotate(xy=(at, HEIGHT), xytext=(0, 5), ha=sides[place], va="bottom", **words)
        else:
            up = -3 if name == "js_div" else 3 if name == "sq_hellinger" else 0  # whose ends are next to each other
            panel.annotate(xy=(1, values[-1]), xytext=(6, up), ha="left", va="center", **words)
    panel.set(xlim=(0, 1), ylim=(0, HEIGHT), xlabel="s", ylabel="nats, or no unit")
    panel.set_title("Divergences of (1/2, 1/2) from (s, 1 - s)", loc="left", pad=26, size=13, weight="bold")
    return figure


# ---- the tables of docs/accuracy.md ----------------------------------------------------------------------------------

SHOWN = (-12, -6, 0)  # decades


def short(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-").replace("e+0", "e")


def elementary_table(record: dict[str, Any]) -> str:
    found = record["elementary"]["ulp"]
    names = list(next(iter(found.values())))
    rows = [
        [name.replace(" ", ", "), *(f"{np.nanmax(array(errors[n])):.3g}" for n in names)]
        for name, errors in found.items()
    ]
    return markdown(["worst error, ulp", *names], rows)


def negative_table(record: dict[str, Any]) -> str:
    about = {space: record["divergence"][f"{space} float32"] for space in WORDS}
    names = list(about["logits"]["values"])
    rows = [[name, *(f"{sum(found['values'][name]['negative'])}" for found in about.values())] for name in names]
    header = [f"{WORDS[space]}, of {sum(found['pairs'])}" for space, found in about.items()]
    return markdown(["negative, float32", *header], rows)


def errors_table(record: dict[str, Any]) -> str:
    about = record["divergence"]
    columns = [(dtype, about["decades"].index(d), d) for dtype in RANGES for d in SHOWN]
    rows = []
    for name in about["logits float32"]["values"]:
        worst = [about[f"logits {dtype}"]["values"][name]["worst"][k] for dtype, k, _ in columns]
        rows.append([name, *(short(w) for w in worst)])
    header = [f"{dtype}, {short(10.0**d)} to {short(10.0 ** (d + 1))}" for dtype, _, d in columns]
    return markdown(["worst error, from logits", *header], rows)


def page(text: str, folder: Path = RECORDS) -> str:
    """docs/accuracy.md with its marked sections regenerated from the newest record in `folder`."""
    path = newest_accuracy(folder)
    if path is None:
        raise FileNotFoundError(f"no accuracy-*.json in {folder}: `make accuracy` writes one")
    record = json.loads(path.read_text())
    versions = ", ".join(f"{name} {v}" for name, v in record["machine"]["versions"].items() if name != OURS)
    source = f"From [{path.name}](benchmarks/{path.name}): {record['machine']['processor']}, {versions}."
    divergences = "\n\n".join([errors_table(record), negative_table(record), source])
    sections = {"elementary": f"{elementary_table(record)}\n\n{source}", "divergence": divergences}
    for name, section in sections.items():
        text = marked(text, name, section, "plots.py")
    return text


# ---- files -----------------------------------------------------------------------------------------------------------


def newest_accuracy(folder: Path) -> Path | None:
    return max(folder.glob("accuracy-*.json"), default=None)


def plots(folder: Path = RECORDS) -> Iterator[tuple[str, list[Path], Callable[[Theme], Figure]]]:
    """Name, records and drawing of every plot whose records are there."""
    accuracy, on_cpu = newest_accuracy(folder), newest_cpu(folder)
    close = max(folder.glob("close-*.json"), default=None)
    drawings: dict[str, tuple[Callable[..., Figure], list[Path | None]]] = {
        "family": (family, []),
        "elementary": (elementary, [accuracy]),
        "divergence-float32": (functools.partial(divergence, dtype="float32"), [accuracy]),
        "divergence-float64": (functools.partial(divergence, dtype="float64"), [accuracy]),
        "front": (front, [close, on_cpu]),
        "cpu": (cpu, [on_cpu]),
        "gpu": (gpu, [newest_gpu(folder)]),
    }
    for name, (drawing, paths) in drawings.items():
        found = [path for path in paths if path]
        if len(found) == len(paths):
            yield name, found, functools.partial(drawing, *(json.loads(path.read_text()) for path in found))


def draw(folder: Path, records: Path = RECORDS) -> list[Path]:
    """All plots, each for light and for dark pages."""
    written: list[Path] = []
    for name, paths, drawing in plots(records):
        digests = [f"{path.name}, sha256 {hashlib.sha256(path.read_text().encode()).hexdigest()}" for path in paths]
        written += write(folder, name, drawing, "; ".join(digests) or "klcore")
    pyplot.close("all")
    return written


def main() -> None:
    matplotlib.use("svg")
    PAGE.write_text(page(PAGE.read_text()))
    for path in [PAGE, *draw(PLOTS)]:
        print(path)


if __name__ == "__main__":
    main()
