"""The pictures of a comparison, with matplotlib: KL of the rows, KL by position, agreement by confidence of base."""

import importlib
import io
import math
from typing import Any

import numpy as np

from klcore.compare.errors import InputError
from klcore.compare.report import percent
from klcore.compare.tally import PLACES, Tally

SUFFIXES = (".png", ".svg", ".pdf")
_MARKED = {False: (0.01, 0.5, 0.9, 0.99, 0.999), True: (0.5, 0.99)}  # quantiles; fewer fit if narrow
_BARS = 60
_WIDE, _NARROW = [["rows", "rows"], ["place", "trust"]], [["rows"], ["place"], ["trust"]]  # panels
_CURVES = (
    ("quant_confidence", "probability by quant", "main", "o"),
    ("same_top", "same top token", "second", "s"),
)

# After Okabe and Ito, darker on white and lighter on dark.
THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1f2328", "grid": "#d8dee4", "main": "#0060a8", "second": "#c2570c"},
    "dark": {"paper": "#0d1117", "ink": "#e6edf3", "grid": "#30363d", "main": "#4aa8ee", "second": "#f5803a"},
}


def draw(tally: Tally, report: dict[str, Any], theme: str, file_format: str, narrow: bool = False) -> bytes:
    """The picture, as the bytes of a file; with `narrow`, the panels are stacked."""
    matplotlib = _matplotlib()
    colours = THEMES[theme]
    style = {
        "font.size": 10.5, "svg.fonttype": "path", "svg.hashsalt": "klcore", "figure.facecolor": colours["paper"],
        "axes.facecolor": colours["paper"], "savefig.facecolor": colours["paper"], "text.color": colours["ink"],
        "axes.labelcolor": colours["ink"], "axes.edgecolor": colours["grid"], "xtick.color": colours["ink"],
        "ytick.color": colours["ink"], "grid.color": colours["grid"], "axes.spines.top": False,
        "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11.5, "axes.axisbelow": True,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        # without pyplot, which would keep figures and set a backend in the caller's Python process
        figure = matplotlib.figure.Figure(figsize=(5.6, 10.4) if narrow else (10, 7), layout="constrained")
        axes = figure.subplot_mosaic(_NARROW if narrow else _WIDE)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        _rows(axes["rows"], tally, _MARKED[narrow], colours)
        _along(axes["place"], tally, report, colours)
        _trust(axes["trust"], report, colours)
        out = io.BytesIO()
        stamp = {"Date": None} if file_format == "svg" else {"CreationDate": None} if file_format == "pdf" else {}
        figure.savefig(out, format=file_format, dpi=144, metadata=stamp)  # the same report, the same bytes
    return out.getvalue()


def _matplotlib() -> Any:
    try:
        importlib.import_module("matplotlib.figure")
        return importlib.import_module("matplotlib")
    except ImportError as error:
        raise InputError("pictures need the package matplotlib: pip install 'klcore[compare]'") from error


def check_plots() -> None:
    """Raise InputError, before anything is computed, if pictures cannot be drawn."""
    _matplotlib()


def _rows(axes: Any, tally: Tally, marked: tuple[float, ...], colours: dict[str, str]) -> None:
    """A histogram of the KL with a logarithmic axis and marked quantiles."""
    kl = tally.summaries["kl"]
    axes.set_title(f"KL(base || quant) of {kl.count:,} rows: mean {_short(kl.mean)} nats")
    axes.set_ylabel("rows")
    axes.set_xlabel("nats (logarithmic)")
    low, high = kl.quantile([0.0005, 1.0]).tolist()
    if not high > 0:
        axes.text(0.5, 0.5, "all rows are equal", ha="center", va="center", transform=axes.transAxes)
        axes.set_yticks([])
        return
    low = max(min(low, high / 30), high * 1e-12, 2.0**-126)  # zeros have no place on this axis
    edges = np.geomspace(low * 0.8, high * 1.25, _BARS + 1)
    counts = kl.histogram(edges)
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colours["main"], alpha=0.85)
    axes.set_xscale("log")
    axes.set_ylim(0, max(counts.max(), 1) * 1.35)
    axes.grid(axis="y")
    outside = kl.count - int(counts.sum())
    if outside:
        axes.text(
            0.01, 0.72, f"to the left: {outside:,}", transform=axes.transAxes, fontsize=9,
            bbox={"facecolor": colours["paper"], "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    for step, (q, value) in enumerate(zip(marked, kl.quantile(list(marked)).tolist(), strict=True)):
        if value >= edges[0]:
            axes.axvline(value, color=colours["second"], linewidth=1.4, ymax=0.8)
            axes.annotate(
                f"{percent(q)}: {_short(value)}", (value, 0.83 + 0.08 * (step % 2)), fontsize=9, ha="center",
                xycoords=("data", "axes fraction"), color=colours["ink"],
            )  # fmt: skip


def _along(axes: Any, tally: Tally, report: dict[str, Any], colours: dict[str, str]) -> None:
    """The mean KL by position in the text or the file, with twice its standard error."""
    where = report["along"]
    axes.set_title(f"Mean KL by position in the {where}")
    axes.set_xlabel(f"position in the {where}")
    axes.set_ylabel("nats")
    of_texts = where == "text"  # otherwise a place may lie in one text, and errors cannot be clustered
    found = [((k + 0.5) / PLACES, s.mean, s.stderr(of_texts)) for k, s in enumerate(tally.places) if s.count]
    place, mean, error = np.array(found).reshape(-1, 3).T
    error = np.nan_to_num(error)  # NaN for a place with only one text
    axes.fill_between(place, np.maximum(mean - 2 * error, 0), mean + 2 * error, color=colours["main"], alpha=0.25, lw=0)
    axes.plot(place, mean, color=colours["main"], linewidth=1.8)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
    axes.grid()


def _trust(axes: Any, report: dict[str, Any], colours: dict[str, str]) -> None:
    """For each bucket of base's confidence: how sure quant is of the same token, and how often it agrees."""
    axes.set_title("By the confidence of base in its top token")
    axes.set_xlabel("probability by base")
    axes.axline((0, 0), slope=1, color=colours["grid"], linewidth=1.5)
    for name, label, colour, marker in _CURVES:
        points = [
            (b["base_confidence"]["mean"], b[name]["mean"], b[name]["stderr"])
            for b in report["confidence"]
            if b["rows"]
        ]
        x, y, error = zip(*points, strict=True) if points else ((), (), ())
        spread = [2 * (e or 0) for e in error]
        axes.errorbar(x, y, spread, color=colours[colour], marker=marker, markersize=6, linewidth=1.4, label=label)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.05)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
    axes.legend(frameon=False, loc="lower right", labelcolor=colours["ink"])
    axes.grid()


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
