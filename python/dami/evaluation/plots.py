"""Draws the accuracy–tokens curve as a picture or in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.text import Text

from dami.evaluation.frontier import Frontier, Point
from dami.evaluation.statistics import Array, Interval
from dami.evaluation.style import (
    BLUE,
    INK,
    VERMILION,
    Label,
    label_ends,
    label_points,
    line_or_points,
    panels,
    save,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ((59, 76, 192), (170, 130, 190), (180, 4, 38))  # λ = 0, 0.5, 1: cool to warm


def color(intensity: float) -> tuple[int, int, int]:
    """Returns the colour of a λ as red, green and blue in 0..255. λ outside [0, 1] get the nearer end's colour."""
    place = min(max(intensity, 0.0), 1.0) * 2
    low = min(int(place), 1)
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in zip(COLORS[low], COLORS[low + 1], strict=True))
    return red, green, blue


class Reached(NamedTuple):
    """The result of a policy other than a static λ, shown next to the static ones."""

    name: str
    tokens: Interval
    accuracy: Interval


def draw_frontier(axes: Axes, points: Sequence[Point], reached: Sequence[Reached] = ()) -> None:
    """Draws accuracy against tokens, labelled with λ. 95 % intervals are a band if tokens increase, else error bars."""
    tokens, accuracy = ([getattr(p, name) for p in points] for name in ("tokens", "accuracy"))
    x, y = [each.value for each in tokens], [100 * each.value for each in accuracy]
    axes.plot(x, y, line_or_points(len(points)), color=BLUE)
    if len(points) > 2 and all(a < b for a, b in pairwise(x)):
        low, high = ([100 * getattr(each, end) for each in accuracy] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=BLUE, alpha=0.18, lw=0)
    else:
        axes.errorbar(x, y, _reach(accuracy), fmt="none", ecolor=BLUE, elinewidth=1.2, alpha=0.6)
    for each in reached:
        axes.errorbar(
            each.tokens.value, 100 * each.accuracy.value, _reach([each.accuracy]), fmt="D", color=VERMILION, ms=7,
            elinewidth=1.2,
        )  # fmt: skip
    costliest = max([*x, *(each.tokens.value for each in reached)])
    axes.set(xlabel="tokens per answer", ylabel="right answers, %", xlim=(0, 1.08 * costliest), ylim=(0, 104))
    labels = [
        Label(a, b, f"{'λ = ' if p in (points[0], points[-1]) else ''}{p.intensity:g}")
        for a, b, p in zip(x, y, points, strict=True)
    ]
    labels += [Label(each.tokens.value, 100 * each.accuracy.value, each.name, VERMILION) for each in reached]
    label_points(axes, [*zip(x, y, strict=True)], labels)


def _reach(shares: Sequence[Interval]) -> Array:
    """Returns the lengths of error bars in percent, [2, points]."""
    percent = 100 * np.array(shares)
    return np.abs(percent[:, 1:] - percent[:, :1]).T


def draw_levels(axes: Axes, frontier: Frontier) -> None:
    """Draws accuracy over λ, one line per level of difficulty, the hardest darkest."""
    levels = sorted(set(frontier.levels.tolist()))
    lams = frontier.intensities
    axes.set(
        xlabel="intensity λ", ylabel="right answers, %", xlim=(lams[0], max(lams[-1], lams[0] + 0.1)), ylim=(0, 104)
    )
    ends = []
    for place, level in enumerate(levels):
        values = 100 * frontier.of_level(level).scores.mean(0)
        alpha = 1 - 0.65 * (len(levels) - 1 - place) / max(1, len(levels) - 1)
        axes.plot(lams, values, line_or_points(len(lams)), color=BLUE, alpha=alpha, clip_on=False)
        ends.append((float(values[-1]), f"level {level}" if len(levels) > 1 else "", INK))
    label_ends(axes, ends)


@styled()
def curve_figures(frontier: Frontier, reached: Sequence[Reached] = ()) -> dict[str, Figure]:
    """Returns two figures by title: accuracy against tokens, and accuracy over λ."""
    drawn: dict[str, Figure] = {}
    by_level = ", by level of difficulty" if len(set(frontier.levels.tolist())) > 1 else ""
    for title, draw in (
        ("Right answers against tokens, λ at each point", lambda axes: draw_frontier(axes, frontier.points, reached)),
        (f"Right answers over λ{by_level}", lambda axes: draw_levels(axes, frontier)),
    ):
        drawn[title], (axes,) = panels(4.8, 3.7)
        draw(axes)
    return drawn


@styled()
def curve_figure(frontier: Frontier, title: str, reached: Sequence[Reached] = ()) -> Figure:
    """Returns both figures in one picture."""
    figure, (left, right) = panels(11, 4.4, columns=2, width_ratios=(1.25, 1))
    figure.suptitle(title, x=0.01, ha="left")
    draw_levels(right, frontier)
    draw_frontier(left, frontier.points, reached)
    return figure


def save_curve(frontier: Frontier, path: Path, title: str, reached: Sequence[Reached] = ()) -> None:
    """Saves accuracy against tokens and each level's accuracy over λ as PNG or SVG, depending on the file name."""
    save(curve_figure(frontier, title, reached), path)


def draw_curve(points: Sequence[Point], width: int, height: int = 15, reached: Sequence[Reached] = ()) -> Text:
    """Draws accuracy in percent (upwards) against mean tokens (to the right) in `width` columns of text.

    A dot is a λ, the bar through it is its 95 % interval, and the thin line joins neighbouring λ. Diamonds are
    policies.
    """
    left = 6
    columns, rows = width - left - 1, height
    # Round the limits to tens, and leave some room on the right for the labels.
    drawn: list[Point | Reached] = [*points, *reached]
    x_low, x_high = 0.0, 10 * (1.05 * max(p.tokens.value for p in drawn) // 10 + 1)
    y_low = 10 * (min(p.accuracy.low for p in drawn) * 10 // 1)
    y_high = min(100.0, 10 * (max(p.accuracy.high for p in drawn) * 10 // 1 + 1))

    def place(tokens: float, accuracy: float) -> tuple[int, int]:
        x = (tokens - x_low) / (x_high - x_low) * (columns - 1)
        y = (y_high - 100 * accuracy) / (y_high - y_low) * (rows - 1)
        return round(x), round(min(max(y, 0), rows - 1))

    def at(p: Point | Reached) -> tuple[float, float]:
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
    marks = [("●", f"{p.intensity:g}", at(p), "bold rgb({},{},{})".format(*color(p.intensity))) for p in points]
    marks += [("◆", each.name, at(each), "bold green") for each in reached]
    for sign, label, where, style in marks:
        x, y = place(*where)
        grid[y][x] = (sign, style)
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
