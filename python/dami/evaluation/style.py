"""The style of all pictures: readable at README width, for colour-blind readers, on light and dark pages.

@styled()
def draw() -> Figure:
    figure, (axes,) = panels(6, 4)
    axes.plot(…, color=BLUE)

An SVG of `svg` has its own style sheet, which swaps the colours below if the reader prefers dark pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dami.files import write_text, written_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = NDArray[np.float64]  # [2], in figure points

# Okabe and Ito's colours (jfly.uni-koeln.de/color), safe for colour-blind readers; GitHub's for text and background.
INK, MUTED, GRID, PAPER = "#1f2328", "#59636e", "#d1d9e0", "#ffffff"
BLUE, VERMILION, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
SERIES = (BLUE, VERMILION, GREEN, PURPLE, SKY)
DARK = {INK: "#e6edf3", MUTED: "#9198a1", GRID: "#3d444d", PAPER: "#0d1117", BLUE: "#4da3d9", VERMILION: "#f0803c"}
SETTINGS: Any = {  # matplotlib's settings; Any, because its newest releases type every key
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.hashsalt": "dami",  # makes files reproducible
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Label(NamedTuple):
    """A text next to a point, in data coordinates."""

    x: float
    y: float
    text: str
    color: str = INK


@contextmanager
def styled() -> Iterator[None]:
    """Applies the style, as a context manager or a decorator."""
    import matplotlib  # slow to import

    with matplotlib.rc_context(SETTINGS):
        yield


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **shared: Any) -> tuple[Figure, list[Axes]]:
    """Creates a figure of the given size in inches, and its panels row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def svg(figure: Figure) -> str:
    """Returns the figure as an SVG element for light and dark pages."""
    text = io.StringIO()
    with styled():
        figure.savefig(text, format="svg", metadata=NO_METADATA)
    drawn = re.sub(r'<g id="[^"]*"', "<g", text.getvalue())  # no id is referenced, and a page has several pictures
    rules = "".join(
        f'[style*="{property}: {light}"]{{{property}:{dark}!important}}'
        for light, dark in DARK.items()
        for property in ("fill", "stroke")
    )
    head, end, rest = drawn[drawn.index("<svg") :].partition(">")
    return f"{head}{end}<style>@media (prefers-color-scheme: dark){{{rules}}}</style>{rest}"


def save(figure: Figure, path: Path) -> None:
    """Saves the figure in the format of its extension: an SVG, or else a picture for light pages."""
    if path.suffix == ".svg":
        write_text(path, svg(figure))
    else:
        with styled(), written_file(path) as file:
            figure.savefig(file)


def line_or_points(count: int) -> str:
    """Returns the format for a line through `count` points, or for points only if there are at most two."""
    return "o-" if count > 2 else "o"


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Labels the right ends of lines, without overlap.

    Args:
        axes: with its limits set. Lines end at its right side.
        ends: y in data coordinates, label and colour of each line.
    """
    figure: Any = axes.figure  # typed as Figure | SubFigure
    rows = axes.get_gridspec().nrows  # type: ignore[union-attr]  # `panels` has made one
    least = 1.25 * SETTINGS["font.size"] / 72 / (0.75 * figure.get_figheight() / rows)  # approximate, needs no layout
    ends = sorted(ends)
    places: list[float] = []
    for y, _, _ in ends:
        place = axes.transAxes.inverted().transform(axes.transData.transform((axes.get_xlim()[1], y)))[1]
        places.append(max(place, places[-1] + least if places else -1.0))
    above = 1.0
    for i in reversed(range(len(places))):
        places[i] = above = min(places[i], above)
        above -= least
    for place, (_, label, color) in zip(places, ends, strict=True):
        axes.text(1.03, place, label, transform=axes.transAxes, va="center", color=color)


def label_points(axes: Axes, line: Sequence[tuple[float, float]], labels: Sequence[Label]) -> None:
    """Labels points where the labels hide neither a line nor each other.

    Args:
        axes: with its limits set.
        line: the points on the line, in data coordinates.
        labels: x and y in data coordinates, text and colour of each label.
    """
    figure: Any = axes.figure  # typed as Figure | SubFigure
    figure.draw_without_rendering()  # computes the layout, and with it the points' positions
    in_points = 72 / figure.dpi * axes.transData.transform([*line, *((label.x, label.y) for label in labels)])
    through, at = in_points[: len(line)], in_points[len(line) :]
    steps = np.linspace(0, 1, 12)[:, None]
    avoided = np.concatenate([at, *(a + steps * (b - a) for a, b in pairwise(through))])
    bottom, top = 72 / figure.dpi * axes.bbox.get_points()
    taken: list[tuple[Point, Point]] = []  # low and high corners

    def hidden(low: Point, high: Point) -> float:
        labels = sum((a < high).all() and (b > low).all() for a, b in taken)
        outside = (low < bottom).any() or (high > top + 2).any()
        return float(((avoided > low) & (avoided < high)).all(1).sum() + 20 * labels + 10 * outside)

    for label, place in zip(labels, at, strict=True):
        half = SETTINGS["font.size"] * np.array([0.62 * len(label.text), 1.1]) / 2
        offsets = [
            np.array([dx, dy]) * (half + away)
            for away in (6, 14, 26)
            for dx, dy in ((0.7, -1), (1, 0), (-0.7, 1), (0, -1), (0, 1), (-1, 0), (0.7, 1), (-0.7, -1))
        ]
        corners = [(place + offset - half, place + offset + half) for offset in offsets]
        best = min(range(len(offsets)), key=[hidden(*each) for each in corners].__getitem__)
        taken.append(corners[best])
        axes.annotate(
            label.text, (label.x, label.y), xytext=offsets[best], textcoords="offset points", ha="center", va="center",
            color=label.color,
        )  # fmt: skip
