"""Writes the tables of README.md from results/*.csv, between `<!-- table: NAME -->` and `<!-- end -->`.

python benchmarks/tables.py
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path

from dami.demo import wilson

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
OURS = "lerp_linear"
SHOWN = {  # methods by the λ of the batch
    "mixed": (OURS, "a merged copy per λ", "two F.linear + lerp", "F.linear, one merged, fp32"),
    "one": (OURS, "blend + F.linear"),
    "zero": (OURS,),
}


def newest(path: Path, **wanted: str) -> list[dict[str, str]]:
    """Lines of a results file's newest run among those with the wanted values."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row[key] == value for key, value in wanted.items())]
    date = max(row["date"] for row in rows)
    return [row for row in rows if row["date"] == date]


def markdown(lines: Iterable[Iterable[object]]) -> str:
    head, *body = [[str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])


def pair() -> str:
    """Accuracy and tokens of the shipped pair over λ: easy questions, hard ones, and all."""
    rows = newest(HERE / "results" / "pair_curve.csv", sampling="temperature 0.8, top_p 0.95")
    lines = [["λ", "accuracy, %", "tokens", "level 1: accuracy, tokens", "level 5: accuracy, tokens"]]
    for lam in sorted({row["intensity"] for row in rows}, key=float):

        def summary(levels: str, lam: str = lam) -> tuple[int, float, float]:
            some = [row for row in rows if row["intensity"] == lam and row["level"] in levels]
            n = sum(int(row["n"]) for row in some)
            means = [sum(int(row["n"]) * float(row[key]) for row in some) / n for key in ("accuracy", "tokens_mean")]
            return n, *means  # type: ignore[return-value]

        n, accuracy, tokens = summary("12345")
        low, high = wilson(round(accuracy * n), n)
        cells = [f"{float(lam):g}", f"{accuracy:.0%} ({low:.0%} to {high:.0%})".replace("%", ""), f"{tokens:.0f}"]
        for level in "15":
            _, accuracy, tokens = summary(level)
            cells.append(f"{100 * accuracy:.0f}, {tokens:.0f}")
        lines.append(cells)
    return markdown(lines)


def linear(isa: str) -> str:
    """Time of every method as a ratio to F.linear on one merged weight; of lerp_linear also the share of the limit."""
    rows = newest(HERE / "results" / "linear.csv", isa=isa, dtype="bf16")
    by = {(row["lam"], row["method"], int(row["m"])): row for row in rows}
    sizes = sorted({int(row["m"]) for row in rows})
    unit = "F.linear, one merged"

    def cell(lam: str, method: str, m: int) -> str:
        row = by[lam, method, m]
        ratio = f"{float(row['median_ms']) / float(by[lam, unit, m]['median_ms']):.2f}"
        return f"**{ratio}** ({float(row['limit_ms']) / float(row['median_ms']):.0%})" if method == OURS else ratio

    lines = [["λ", "method", *(f"M={m}" for m in sizes)]]
    lines.append(
        ["any", "`F.linear` on one merged weight", *(f"{by['mixed', unit, m]['median_ms'][:-2]} ms" for m in sizes)]
    )
    for lam, methods in SHOWN.items():
        lines += [[lam, method, *(cell(lam, method, m) for m in sizes)] for method in methods]
    return markdown(lines)


TABLES = {"pair": pair, "linear avx2": lambda: linear("avx2"), "linear avx512_bf16": lambda: linear("avx512_bf16")}


def filled(text: str) -> str:
    """`text` with every table made anew."""
    return re.sub(
        r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
