"""Pictures of a study. Each has panels, which are side by side in a file and separate on a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from dami.evaluation.path import Similarity
from dami.evaluation.statistics import Interval
from dami.evaluation.study.results import PathResult, Study
from dami.evaluation.style import BLUE, INK, MUTED, SERIES, VERMILION, label_ends, line_or_points, panels, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Measure = Literal["cka", "cosine"]
SMALLEST = 1e-6  # smallest distance from 1 that is drawn
MOST_LABELS = 8  # of layers per panel
TEXTS = {
    "answer": "loss of the right answer",
    "instruct": "loss of the instruct end's answers",
    "thinking": "loss of the thinking end's answers",
    "both": "loss of both ends' answers",
}


@dataclass(frozen=True)
class Picture:
    """Panels of one size.

    Attributes:
        panels: functions that draw them, by title.
        columns: number of columns in the file.
        width, height: of a panel, in inches.
    """

    panels: Mapping[str, Callable[[Axes], None]]
    columns: int
    width: float = 4.4
    height: float = 3.3

    @styled()
    def together(self) -> Figure:
        """Draws all panels in one figure."""
        rows = -(-len(self.panels) // self.columns)
        figure, axes = panels(self.width * self.columns, self.height * rows, rows, self.columns)
        for each, (title, draw) in zip(axes, self.panels.items(), strict=True):
            each.set_title(title)
            draw(each)
        return figure

    @styled()
    def apart(self) -> dict[str, Figure]:
        """Draws each panel in its own figure, by title."""
        figures = {}
        for title, draw in self.panels.items():
            figures[title], (axes,) = panels(self.width, self.height)
            draw(axes)
        return figures


def pictures(study: Study) -> dict[str, Picture]:
    """Returns all pictures of a study, by file name."""
    count = 1 + len(study.controls)
    return {
        "path": Picture(_path_panels(study), 3),
        "cka": Picture(_similarity_panels(study, "cka", "debiased linear CKA"), count),
        "cosine": Picture(_similarity_panels(study, "cosine", "mean cosine"), count),
        "ablations": Picture(_ablation_panels(study), 3, height=1 + 0.25 * len(ends_and_ablations(study))),
    }


def paths_of(study: Study) -> dict[str, PathResult]:
    """Returns all paths by name, the pair's first."""
    controls = {f"control: {'/'.join(Path(name).parts[-2:])}": path for name, path in study.controls.items()}
    return {"the pair": study.pair, **controls}


def _path_panels(study: Study) -> dict[str, Callable[[Axes], None]]:
    """Draws losses, accuracy, tokens and thoughts along every path, with intervals and the chords between the ends."""
    paths = paths_of(study).values()
    values: dict[str, list[list[Interval]]] = {
        f"{TEXTS[kind]}, nats per token": [path.losses[kind] for path in paths]
        for kind in ("answer", "instruct", "thinking")
    }
    values["right answers, %"] = [path.accuracy for path in paths]
    values["tokens per answer"] = [path.tokens for path in paths]
    values["answers with a thought, %"] = [path.thoughts for path in paths]
    chords = [title for title in values if "loss" in title or "right" in title]
    names = [name.removeprefix("control: ") for name in paths_of(study)]
    lams = study.pair.intensities
    return {
        title: partial(_draw_paths, lams, names, found, 100.0 if title.endswith("%") else 1.0, title in chords)
        for title, found in values.items()
    }


def _draw_paths(
    lams: Sequence[float], names: Sequence[str], found: Sequence[Sequence[Interval]], scale: float, chord: bool,
    axes: Axes,
) -> None:  # fmt: skip
    labels = []
    for place, (name, values) in enumerate(zip(names, found, strict=True)):
        color = SERIES[place % len(SERIES)]
        middle, low, high = (scale * np.array(each) for each in zip(*values, strict=True))
        axes.plot(lams, middle, line_or_points(len(lams)), color=color, clip_on=False)
        if len(lams) > 2:
            axes.fill_between(lams, low, high, color=color, alpha=0.18, lw=0)
        else:
            axes.vlines(lams, low, high, color=color, alpha=0.5)
        if chord and len(lams) > 2:
            axes.plot([0, 1], [middle[lams.index(end)] for end in (0.0, 1.0)], "--", color=color, lw=1, alpha=0.8)
        labels.append((float(middle[-1]), name, color))
    _between(axes, lams)
    axes.set_ylim(bottom=0)
    label_ends(axes, labels)


def _between(axes: Axes, lams: Sequence[float]) -> None:
    """Sets λ as the x axis and marks the ends of the pair if the path goes beyond them."""
    axes.set(xlabel="intensity λ", xlim=(lams[0], lams[-1]))
    for end in (0, 1):
        if lams[0] < end < lams[-1]:
            axes.axvline(end, color=MUTED, lw=1, zorder=0)


def _similarity_panels(study: Study, measure: Measure, title: str) -> dict[str, Callable[[Axes], None]]:
    """Draws how far a similarity falls short of 1, to both ends and between neighbours, one line per layer."""
    kinds: dict[str, Callable[[PathResult], list[list[tuple[float, Interval]]]]] = {
        "λ and 0": lambda path: _by_layer(path, measure, lambda each: each.other == 0.0, lambda each: each.intensity),
        "λ and 1": lambda path: _by_layer(path, measure, lambda each: each.other == 1.0, lambda each: each.intensity),
        "λ and the next": lambda path: _by_layer(
            path, measure, lambda each: (each.intensity, each.other) in {*pairwise(path.intensities)},
            lambda each: (each.intensity + each.other) / 2,
        ),
    }  # fmt: skip
    drawn: dict[str, Callable[[Axes], None]] = {}
    for kind, points_of in kinds.items():
        found = {name: points_of(path) for name, path in paths_of(study).items()}
        short = [max(1 - each.value, SMALLEST) for layers in found.values() for line in layers for _, each in line]
        limits = (min(short) / 1.6, max(short) * 1.6)  # the same for all paths
        for name, layers in found.items():
            draw = partial(_draw_layers, layers, study.pair.intensities, limits)
            drawn[f"{name}: 1 − {title}, {kind}"] = draw
    return drawn


def _by_layer(
    path: PathResult,
    measure: Measure,
    wanted: Callable[[Similarity], bool],
    lam: Callable[[Similarity], float],
) -> list[list[tuple[float, Interval]]]:
    """Returns λ and similarity of the wanted pairs by layer, sorted by λ."""
    layers: dict[int, list[tuple[float, Interval]]] = {each.layer: [] for each in path.similarity}
    for each in path.similarity:
        if wanted(each):
            layers[each.layer].append((lam(each), getattr(each, measure)))
    return [sorted(layers[layer]) for layer in sorted(layers)]


def _draw_layers(
    layers: Sequence[Sequence[tuple[float, Interval]]],
    lams: Sequence[float],
    limits: tuple[float, float],
    axes: Axes,
) -> None:
    axes.set_yscale("log")
    axes.set_ylim(limits)
    _between(axes, lams)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    last = len(layers) - 1
    labelled = set(np.linspace(0, last, min(len(layers), MOST_LABELS)).round().astype(int).tolist())
    labels = []
    for layer, points in enumerate(layers):
        x = [lam for lam, _ in points]
        short, most, least = (
            np.maximum(1 - np.array(each), SMALLEST) for each in zip(*(p for _, p in points), strict=True)
        )
        alpha = 0.35 + 0.65 * layer / max(1, last)
        axes.plot(x, short, line_or_points(len(x)), color=BLUE, alpha=alpha, ms=3.5, lw=1.2, clip_on=False)
        axes.fill_between(x, least, most, color=BLUE, alpha=0.08, lw=0)
        if layer in labelled:
            labels.append((float(short[-1]), "embeddings" if layer == 0 else f"layer {layer}", INK))
    label_ends(axes, labels)


def ends_and_ablations(study: Study) -> list[tuple[str, dict[str, Interval]]]:
    """Returns the values of ends and ablations by name, as in `Ablation`. Each end precedes its ablations."""
    rows = []
    for end, start in ((0.0, "only"), (1.0, "all but")):
        at = study.pair.intensities.index(end)
        columns = {
            "accuracy": study.pair.accuracy,
            "tokens": study.pair.tokens,
            "thoughts": study.pair.thoughts,
            "well_formed": study.pair.well_formed,
            "loss": study.pair.losses["thinking"],
        }
        rows.append((f"λ = {end:g}", {name: values[at] for name, values in columns.items()}))
        rows += [(each.name, vars(each)) for each in study.ablations if each.name.startswith(start)]
    return rows


def _ablation_panels(study: Study) -> dict[str, Callable[[Axes], None]]:
    """Draws accuracy, tokens and thoughts of every ablation, with intervals, and lines that mark the ends."""
    rows = ends_and_ablations(study)
    columns = {"right answers, %": "accuracy", "tokens per answer": "tokens", "answers with a thought, %": "thoughts"}
    return {
        title: partial(_draw_ablations, rows, column, 100 if title.endswith("%") else 1)
        for title, column in columns.items()
    }


def _draw_ablations(rows: Sequence[tuple[str, Mapping[str, Interval]]], column: str, scale: float, axes: Axes) -> None:
    for place, (name, values) in enumerate(rows):
        value, low, high = (scale * number for number in values[column])
        color = BLUE if name == "λ = 0" or name.startswith("only") else VERMILION
        is_end = name.startswith("λ")
        reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axes.errorbar(value, -place, xerr=reach, fmt="D" if is_end else "o", color=color, elinewidth=1.2)
        if is_end:
            axes.axvline(value, color=color, lw=1, ls="--", alpha=0.6)
    axes.set_yticks([-place for place in range(len(rows))], [name for name, _ in rows])
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
