"""The look of the examples' pictures, and of docs/plots: an SVG for light pages and one for dark pages.

Seven inches wide, panels one above the other, large letters: readable on a telephone. Text stays text.
"""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

OUTPUT = Path(__file__).parent / "output"
WIDTH = 7.0  # inches

# Darker on white, lighter on dark. After Okabe and Ito; of any two colours at least 12 units of CIELAB remain for the
# colour-blind, by the simulation of Machado, Oliveira and Fernandes (2009). Vary markers or lines as well.
THEMES = {
    "light": {
        "paper": "#ffffff", "ink": "#1f2328", "grid": "#d0d7de", "blue": "#0060a8", "orange": "#dd6b0a",
        "green": "#008f6b", "pink": "#a03070", "yellow": "#5c4a00", "grey": "#8c959f",
    },
    "dark": {
        "paper": "#0d1117", "ink": "#e6edf3", "grid": "#30363d", "blue": "#4aa8ee", "orange": "#f5803a",
        "green": "#2ab58f", "pink": "#ffc0e0", "yellow": "#f5dc55", "grey": "#7d8792",
    },
}  # fmt: skip


def figure(height, width=WIDTH):
    """An empty figure that no backend or global state knows of."""
    return Figure(figsize=(width, height), layout="constrained")


def head(picture, title, handles=(), ncols=3):
    """Title and legend, above everything."""
    found = picture.legend(
        handles=list(handles), loc="outside upper left", ncols=ncols, frameon=False, handlelength=1.6, title=title,
        title_fontproperties={"size": 13, "weight": "bold"}, alignment="left", borderpad=0.2, columnspacing=1.2,
    )  # fmt: skip
    found.get_title().set_position((0, 4))
    picture.get_layout_engine().set(h_pad=0.1)


def write(folder, name, draw, source="klcore"):
    """Write NAME-light.svg and NAME-dark.svg to the folder: of ``draw(theme)``, the same bytes for the same figure."""
    folder.mkdir(exist_ok=True)
    for kind, theme in THEMES.items():
        ink, grid = theme["ink"], theme["grid"]
        style = {
            "svg.hashsalt": "klcore", "svg.fonttype": "none", "font.size": 12, "axes.titlesize": 12,
            "axes.titlelocation": "left", "text.color": ink, "axes.labelcolor": ink, "xtick.color": ink,
            "ytick.color": ink, "axes.edgecolor": grid, "axes.grid": True, "grid.color": grid, "axes.axisbelow": True,
            "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "legend.frameon": False,
        }  # fmt: skip
        path = folder / f"{name}-{kind}.svg"
        with matplotlib.rc_context(style):
            metadata = {"Date": None, "Creator": None, "Source": source}
            draw(theme).savefig(path, transparent=True, metadata=metadata)
        yield path


def save(name, draw):
    """For examples: into examples/output; says where."""
    for path in write(OUTPUT, name, draw):
        print(f"Picture: {path}")
