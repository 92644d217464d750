"""Draws the pictures of the docs from results: python -m benchmarks.plot

linear-*.svg, from linear.csv, bfloat16: time over that of F.linear on one merged weight, for every format and kind of
λ, at three numbers of rows. study-path.svg, from study_shipped.json, and tuned.svg, from tuning_shipped.csv. The
README's picture is of examples/train_pair/measure.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dami.evaluation.statistics import Interval
from dami.evaluation.study import read_study
from dami.evaluation.study.figures import pictures
from dami.evaluation.style import BLUE, GREEN, INK, MUTED, PURPLE, VERMILION, panels, save, styled
from dami.evaluation.tuning import Finalist, tuned_figure
from dami.evaluation.ways import Way
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.linear import BLEND, COPIES, MERGED, OURS, TWO
from benchmarks.record import RESULTS, latest
from benchmarks.tables import FORMATS, Row, is_cpu, is_gpu, measured, newest

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
METHODS = [*((OURS, format) for format in FORMATS), (TWO, ""), (BLEND, ""), (COPIES, "")]  # from top to bottom
KINDS = {  # label, marker, colour, and offset from the middle of its line
    "distinct": ("every row its own λ", "o", VERMILION, -0.16),
    "uniform": ("a λ for each sequence", "D", PURPLE, 0.0),
    "identical": ("one λ for all", "s", BLUE, 0.0),
    "zero": ("λ = 0 for all", "^", MUTED, 0.16),
}
FEWEST, MOST = 0.11, 34  # ratios shown


def ratios(rows: Sequence[Row], m: str) -> dict[tuple[str, str, str], float]:
    """Returns times relative to F.linear on one merged weight in the same run, by kind of λ, method and format."""
    by = latest([row for row in rows if row["m"] == m], "lam", "method", "format")
    found = {}
    for (kind, method, format), row in by.items():
        unit = by.get((kind, MERGED, ""))
        if unit and unit["date"] == row["date"]:  # compare only within one run
            found[kind, method, format] = float(row["median_ms"]) / float(unit["median_ms"])
    return found


def draw(axes: Axes, found: dict[tuple[str, str, str], float]) -> None:
    """Draws one panel: a line per method, with a mark per kind of λ."""
    axes.axvspan(FEWEST, 1, color=GREEN, alpha=0.12, lw=0)
    axes.text(
        0.03, 0.03, "faster than\none merged\nmodel", transform=axes.transAxes, va="bottom", color=MUTED, fontsize=10
    )
    for place, (method, format) in enumerate(METHODS):
        line = [value for (_, *key), value in found.items() if key == [method, format]]
        if line:
            axes.plot([min(line), max(line)], [place, place], color=MUTED, lw=1, alpha=0.6, zorder=1)
    for kind, (label, marker, color, beside) in KINDS.items():
        at = {place + beside: found.get((kind, *method)) for place, method in enumerate(METHODS)}
        y, x = [y for y, value in at.items() if value], [value for value in at.values() if value]
        if x:
            axes.plot(x, y, marker, color=color, ms=7, label=label)
    axes.set_xscale("log", base=2)
    axes.set(xlim=(FEWEST, MOST), ylim=(len(METHODS) - 0.4, -0.6))
    axes.set_xticks([0.125, 0.25, 0.5, 1, 2, 4, 8, 16], ["⅛", "¼", "½", "1", "2", "4", "8", "16"])
    axes.set_yticks(range(len(METHODS)), [format or method for method, format in METHODS])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


@styled()
def linear(rows: Sequence[Row], sizes: Sequence[str]) -> Figure:
    """Draws a panel for each number of rows."""
    figure, axes = panels(11, 4.6, columns=len(sizes), sharey=True)
    for each, m in zip(axes, sizes, strict=True):
        draw(each, ratios(rows, m))
        each.set_title(f"{m} row{'s' if m != '1' else ''}")
    figure.supxlabel("time relative to F.linear on one merged weight", color=INK, fontsize=11)
    handles = {label: handle for each in axes for handle, label in zip(*each.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=len(handles))
    return figure


def finalist(row: Row) -> Finalist:
    """Returns a way to answer, from a row of tuning_PAIR.csv."""
    answer, prompt = (float(row[name]) if row[name] else None for name in ("answer", "prompt"))
    numbers = (
        Interval(*(float(row[f"{name}{end}"]) for end in ("", "_low", "_high")))
        for name in ("accuracy", "tokens", "gain")
    )
    return Finalist(Way(float(row["thought"]), answer, prompt), *numbers)


def main() -> None:
    for name, isa in (("linear-cpu", "avx512_bf16"), ("linear-cpu-avx2", "avx2")):
        rows = measured("linear.csv", is_cpu, model="square", dtype="bf16", isa=isa)
        save(linear(rows, ["1", "16", "256"]), IMAGES / f"{name}.svg")
    gpu = measured("linear.csv", is_gpu, model="Qwen3-4B", layer="gate_up", dtype="bf16")
    if gpu:
        save(linear(gpu, ["1", "16", "4096"]), IMAGES / "linear-gpu.svg")
    save(pictures(read_study(RESULTS / "study_shipped.json"))["path"].together(), IMAGES / "study-path.svg")
    ways = newest(RESULTS / "tuning_shipped.csv")
    title = f"The shipped pair: {ways[0]['held_out']} questions held out, 95 % intervals"
    save(tuned_figure([finalist(row) for row in ways], title), IMAGES / "tuned.svg")


if __name__ == "__main__":
    main()
