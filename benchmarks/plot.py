"""Draws docs/images/linear-*.png from results/linear.csv, bfloat16: python -m benchmarks.plot

Time over that of F.linear on one merged weight, for every format and kind of λ, at three numbers of rows.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.linear import BLEND, COPIES, MERGED, OURS, TWO
from benchmarks.record import latest
from benchmarks.tables import FORMATS, Row, is_cpu, is_gpu, measured

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
METHODS = [*((OURS, format) for format in FORMATS), (TWO, ""), (BLEND, ""), (COPIES, "")]  # from above
KINDS = {  # label, marker, colour: apart for the colour-blind too, on white and in grey
    "distinct": ("every row its own λ", "o", "#d1495b"),
    "uniform": ("a λ for each sequence", "s", "#e3a008"),
    "identical": ("one λ for all", "s", "#1f6f8b"),
    "zero": ("λ = 0 for all", "^", "#7d8597"),
}
FEWEST, MOST = 0.2, 16  # ratios shown; what is slower stands at the edge


def draw(axis: Axes, rows: list[Row], m: str) -> None:
    """One panel: a line for each method at one number of rows, a mark for each kind of λ."""
    by = latest([row for row in rows if row["m"] == m], "lam", "method", "format")
    axis.axvspan(FEWEST, 1, color="#2a9d8f", alpha=0.12, lw=0, label="faster than one merged weight")
    for beside, (kind, (label, marker, color)) in zip((-0.2, 0, 0, 0.2), KINDS.items(), strict=True):
        unit = by.get((kind, MERGED, ""))
        found = {
            place + beside: float(row["median_ms"]) / float(unit["median_ms"])
            for place, method in enumerate(METHODS)
            if unit and (row := by.get((kind, *method))) and row["date"] == unit["date"]
        }
        ratios = [min(ratio, 0.85 * MOST) for ratio in found.values()]
        if found:
            axis.plot(ratios, [*found], marker, color=color, ms=8, mec="white", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xlim(FEWEST, MOST)
    ticks = [0.25, 0.5, 1, 2, 4, 8]
    axis.set_xticks(ticks, ["¼", "½", "1", "2", "4", "8"])
    axis.set_yticks(range(len(METHODS)), [format or method for method, format in METHODS])
    axis.set_ylim(len(METHODS) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def figure(groups: dict[str, list[Row]], sizes: list[str], path: Path) -> None:
    """A picture with a line of panels for each group of rows, one for each of `sizes`; nothing where there are none."""
    groups = {name: rows for name, rows in groups.items() if rows}
    if not groups:
        return
    plt.rcParams.update({"font.size": 12})
    picture, axes = plt.subplots(
        len(groups), len(sizes), figsize=(12, 0.6 + 3.7 * len(groups)), squeeze=False, sharey=True, layout="constrained"
    )
    for line, (name, rows) in zip(axes, groups.items(), strict=True):
        for axis, m in zip(line, sizes, strict=True):
            draw(axis, rows, m)
            axis.set_title(f"{name}, {m} row{'s' if m != '1' else ''}", fontsize=12, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("time / F.linear on one merged weight")
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    picture.savefig(path, dpi=110)
    plt.close(picture)


def main() -> None:
    names = {"avx512_bf16": "AVX-512", "avx2": "AVX2"}
    cpu = {name: measured("linear.csv", is_cpu, model="square", dtype="bf16", isa=isa) for isa, name in names.items()}
    figure(cpu, ["1", "16", "256"], IMAGES / "linear-cpu.png")
    gpu = measured("linear.csv", is_gpu, model="Qwen3-4B", layer="gate_up", dtype="bf16")
    figure({"gate_up of Qwen3-4B": gpu}, ["1", "16", "4096"], IMAGES / "linear-gpu.png")


if __name__ == "__main__":
    main()
