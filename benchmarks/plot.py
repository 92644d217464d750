"""Draws docs/images/linear-cpu.png from results/linear.csv: the newest run of every instruction set, bfloat16."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tables import newest

HERE = Path(__file__).parent
METHODS = {  # and their colours
    "F.linear, one merged": "#999999",
    "a merged copy per λ": "#d99a6c",
    "two F.linear + lerp": "#c7c76a",
    "blend + F.linear": "#8fb8de",
    "lerp_linear": "#5b2a86",
}
LAMS = {"mixed": "every row its own λ", "one": "one λ", "zero": "λ = 0"}


def main() -> None:
    results = HERE / "results" / "linear.csv"
    with open(results, newline="") as file:
        isas = sorted({row["isa"] for row in csv.DictReader(file) if row["dtype"] == "bf16"})
    figure, axes = plt.subplots(len(isas), len(LAMS), figsize=(11, 3.4 * len(isas)), squeeze=False, sharey=True)
    for line, isa in zip(axes, isas, strict=True):
        rows = newest(results, isa=isa, dtype="bf16")
        units = {
            (row["lam"], row["m"]): float(row["median_ms"]) for row in rows if row["method"] == next(iter(METHODS))
        }
        for axis, lam in zip(line, LAMS, strict=True):
            for method, color in METHODS.items():
                points = [row for row in rows if row["lam"] == lam and row["method"] == method]
                if points:
                    x = [int(row["m"]) for row in points]
                    y = [float(row["median_ms"]) / units[lam, row["m"]] for row in points]
                    axis.plot(x, y, "o-", color=color, label=method, linewidth=2 + (method == "lerp_linear"))
            axis.set_xscale("log", base=4)
            axis.set_yscale("log", base=2)
            axis.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
            axis.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16, 32, 64], ["¼", "½", "1", "2", "4", "8", "16", "32", "64"])
            axis.set_title(f"{LAMS[lam]}, {isa}", fontsize=10)
            axis.set_xlabel("rows M")
            axis.grid(alpha=0.3)
        line[0].set_ylabel("time / F.linear of one weight")
    first = rows[0]
    figure.suptitle(
        f"lerp_linear, bfloat16, N={first['n']}, K={first['k']}, {first['device']}, {first['threads']} threads"
    )
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(HERE.parent / "docs" / "images" / "linear-cpu.png", dpi=120)


if __name__ == "__main__":
    main()
