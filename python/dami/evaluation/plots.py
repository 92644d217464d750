"""The accuracy–tokens curve as a picture and in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TextIO

from rich.text import Text

from dami.evaluation.frontier import Frontier, Interval, Point
from dami.files import written_file

COLORS = ((59, 76, 192), (170, 130, 190), (180, 4, 38))  # λ = 0, 0.5, 1: cool to warm


def color(intensity: float) -> tuple[int, int, int]:
    """Colour of a λ, red, green and blue in 0..255; beyond [0, 1] that of the nearer end."""
    place = min(max(intensity, 0.0), 1.0) * 2
    low = min(int(place), 1)
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in zip(COLORS[low], COLORS[low + 1], strict=True))
    return red, green, blue


def save_curve(frontier: Frontier, to: Path | TextIO, title: str) -> None:
    """Draws accuracy against tokens, and that of every level against λ: a PNG or SVG by its name, or an SVG as text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    figure.suptitle(title)

    points = frontier.points
    cost, right_share = [p.tokens.value for p in points], [100 * p.accuracy.value for p in points]
    left.plot(
        [cost[0], cost[-1]], [right_share[0], right_share[-1]], "--", color="0.6", lw=1,
        label="each question to one end or the other, by lot",
    )  # fmt: skip
    left.plot(cost, right_share, color="0.35", lw=1.2, zorder=1)
    for p in points:
        rgb = tuple(channel / 255 for channel in color(p.intensity))
        tokens, accuracy = p.tokens, Interval(*(100 * value for value in p.accuracy))
        left.errorbar(
            tokens.value,
            accuracy.value,
            xerr=[[tokens.value - tokens.low], [tokens.high - tokens.value]],
            yerr=[[accuracy.value - accuracy.low], [accuracy.high - accuracy.value]],
            fmt="none", ecolor=(*rgb, 0.45), elinewidth=1, zorder=2,
        )  # fmt: skip
        left.plot(tokens.value, accuracy.value, "o", color=rgb, ms=6, zorder=3)
        left.annotate(
            f"{'λ = ' if p is points[0] else ''}{p.intensity:g}",
            (tokens.value, accuracy.value),
            xytext=(-5, 6),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=rgb,
        )
    left.set(xlabel="tokens per answer", ylabel="right answers, %", ylim=(0, 100))
    left.set_xlim(left=0)
    left.legend(loc="lower right", frameon=False, fontsize=8)

    levels = sorted(set(frontier.levels.tolist()))
    for place, level in enumerate(levels):
        shade = 0.8 * (1 - place / max(1, len(levels) - 1))
        right.plot(
            frontier.intensities, 100 * frontier.of_level(level).scores.mean(0), "o-", ms=3.5, lw=1.4,
            color=(shade, shade, shade), label=f"level {level}",
        )  # fmt: skip
    right.set(xlabel="intensity λ", ylabel="right answers, %", ylim=(0, 103))
    right.legend(frameon=False, fontsize=8, title="difficulty", title_fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if isinstance(to, Path):
        with written_file(to) as file:
            figure.savefig(file, dpi=150)
    else:
        figure.savefig(to, format="svg")


def draw_curve(points: Sequence[Point], width: int, height: int = 15) -> Text:
    """Draws accuracy in percent (upwards) against mean tokens (to the right) in `width` columns of text.

    A dot is a λ, the bar through it its 95 % interval, the fine line joins neighbours in λ.
    """
    left = 6
    columns, rows = width - left - 1, height
    # Whole tens at the ends, and a little room on the right for the labels.
    x_low, x_high = 0.0, 10 * (1.05 * max(p.tokens.value for p in points) // 10 + 1)
    y_low = 10 * (min(p.accuracy.low for p in points) * 10 // 1)
    y_high = min(100.0, 10 * (max(p.accuracy.high for p in points) * 10 // 1 + 1))

    def place(tokens: float, accuracy: float) -> tuple[int, int]:
        x = (tokens - x_low) / (x_high - x_low) * (columns - 1)
        y = (y_high - 100 * accuracy) / (y_high - y_low) * (rows - 1)
        return round(x), round(min(max(y, 0), rows - 1))

    def at(p: Point) -> tuple[float, float]:
        return p.tokens.value, p.accuracy.value

    grid: list[list[tuple[str, str]]] = [[(" ", "")] * columns for _ in range(rows)]
    for a, b in pairwise(points):
        for step in range(4 * columns):
            t = step / (4 * columns)
            x, y = place(*(a_ + t * (b_ - a_) for a_, b_ in zip(at(a), at(b), strict=True)))
            grid[y][x] = ("·", "dim")
    for p in points:
        style = "dim rgb({},{},{})".format(*color(p.intensity))
        x, top = place(p.tokens.value, p.accuracy.high)
        for y in range(top, place(p.tokens.value, p.accuracy.low)[1] + 1):
            grid[y][x] = ("│", style)
    for p in points:
        style = "bold rgb({},{},{})".format(*color(p.intensity))
        x, y = place(*at(p))
        grid[y][x] = ("●", style)
        label = f"{p.intensity:g}"
        free = slice(x + 1, x + 1 + len(label))
        if all(cell[0] in " ·" for cell in grid[y][free]) and free.stop <= columns:
            grid[y][free] = [(letter, style) for letter in label]

    text = Text(no_wrap=True)
    for y, line in enumerate(grid):
        percent = y_high - (y_high - y_low) * y / (rows - 1)
        text.append(f"{percent:4.0f}% " if y in (0, rows // 2, rows - 1) else " " * left, "dim")
        text.append("┤" if y in (0, rows // 2, rows - 1) else "│", "dim")
        for letter, style in line:
            text.append(letter, style)
        text.append("\n")
    text.append(" " * left + "└" + "─" * columns + "\n", "dim")
    end = f"{x_high:.0f}"
    text.append(" " * (left + 1) + "0" + "tokens per answer".center(columns - 1 - len(end)) + end, "dim")
    return text
