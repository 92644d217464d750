"""Draws docs/images/linear-*.png from results/linear.csv, bfloat16: python -m benchmarks.plot

Time over that of F.linear on one merged weight, by rows; a dashed line is the limit of what has its colour.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.lams import KINDS
from benchmarks.linear import BLEND, COPIES, MERGED, OURS, TWO
from benchmarks.record import latest
from benchmarks.tables import Row, is_cpu, is_gpu, measured

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
COLORS = {
    (OURS, "pair"): "#5b2a86",
    (OURS, "int8"): "#2a6fbb",
    (OURS, "int4"): "#1b998b",
    (OURS, "w8d4"): "#e4572e",
    (MERGED, ""): "#222222",
    (TWO, ""): "#bbbbbb",
    (BLEND, ""): "#d8c3a5",
    (COPIES, ""): "#e8b4b8",
}


def draw(axis: Axes, rows: list[Row], kind: str) -> None:
    """One panel: all methods at one kind of λ."""
    by = latest(rows, "lam", "method", "format", "m")
    sizes = sorted({row["m"] for row in rows if row["lam"] == kind}, key=int)
    for (method, format), color in COLORS.items():
        cases = {m: (by.get((kind, method, format, m)), by.get((kind, MERGED, "", m))) for m in sizes}
        ran_together = {
            m: (row, unit) for m, (row, unit) in cases.items() if row and unit and row["date"] == unit["date"]
        }
        for column, style in (("median_ms", "o-"), ("limit_ms", "--")):
            values = [float(row[column]) / float(unit["median_ms"]) for row, unit in ran_together.values()]
            if style == "o-":
                label = format or method
                axis.plot(
                    [int(m) for m in ran_together], values, style, color=color, label=label, linewidth=2, markersize=4
                )
            elif method in (OURS, MERGED):
                axis.plot([int(m) for m in ran_together], values, style, color=color, linewidth=0.8)
    ticks = [int(m) for m in sizes]
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(m) for m in ticks], fontsize=7)
    axis.set_yscale("log", base=2)
    axis.set_yticks([0.125, 0.25, 0.5, 1, 2, 4, 8], ["⅛", "¼", "½", "1", "2", "4", "8"])
    axis.set_ylim(0.125, 8)
    axis.set_xlabel("rows M")
    axis.grid(alpha=0.3)
    axis.set_title(KINDS[kind], fontsize=9)


def figure(groups: dict[str, list[Row]], kinds: list[str], path: Path) -> None:
    """A picture with a line of panels for each group of rows; nothing where there are none."""
    groups = {name: rows for name, rows in groups.items() if rows}
    if not groups:
        return
    picture, axes = plt.subplots(
        len(groups), len(kinds), figsize=(3.8 * len(kinds), 3.5 * len(groups)), squeeze=False, sharey=True
    )
    for line, (name, rows) in zip(axes, groups.items(), strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            draw(axis, rows, kind)
        line[0].set_ylabel(f"{name}\ntime / F.linear of one weight")
    row = next(iter(groups.values()))[0]
    picture.suptitle(
        f"lerp_linear, bfloat16, N={row['n']}, K={row['k']}, {row['device']}; dashed: the limit", fontsize=10
    )
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    picture.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False, fontsize=8)
    picture.tight_layout(rect=(0, 0.05, 1, 1))
    picture.savefig(path, dpi=120)
    plt.close(picture)


def main() -> None:
    cpu = {
        isa: measured("linear.csv", is_cpu, model="square", dtype="bf16", isa=isa) for isa in ("avx512_bf16", "avx2")
    }
    figure(cpu, ["distinct", "identical", "zero"], IMAGES / "linear-cpu.png")
    gpu = measured("linear.csv", is_gpu, model="Qwen3-4B", layer="gate_up", dtype="bf16")
    figure({"gate_up of Qwen3-4B": gpu}, ["distinct", "uniform", "zero"], IMAGES / "linear-gpu.png")


if __name__ == "__main__":
    main()
