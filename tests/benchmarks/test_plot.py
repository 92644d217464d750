"""The pictures of the docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import plot
from benchmarks.tables import MERGED, OURS, is_cpu, measured
from tests.benchmarks.test_tables import row

ROOT = Path(plot.__file__).resolve().parents[1]


def test_a_ratio_is_to_the_merged_weight_that_ran_with_it() -> None:
    rows = [
        row(MERGED, "", 2),
        row(OURS, "int4", 3),
        row(OURS, "pair", 5, date="2025-01-01"),  # with another merged weight
        row(OURS, "int8", 7, m="16"),
    ]
    assert plot.ratios(rows, "4") == {("distinct", MERGED, ""): 1, ("distinct", OURS, "int4"): 1.5}


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx2"])
def test_every_result_stands_inside_its_panel_on_the_line_of_its_name(isa: str) -> None:
    rows = measured("linear.csv", is_cpu, model="square", dtype="bf16", isa=isa)
    sizes = ["1", "16", "256"]
    axes = plot.linear(rows, sizes).axes
    assert [each.get_title(loc="left") for each in axes] == ["1 row", "16 rows", "256 rows"]
    names = [label.get_text() for label in axes[0].get_yticklabels()]
    assert names == ["pair", "int8", "int4", "w8d4", "lowrank", "two F.linear + lerp", "blend + F.linear", plot.COPIES]
    for each, m in zip(axes, sizes, strict=True):
        wanted = {
            (kind, format or method): ratio
            for (kind, method, format), ratio in plot.ratios(rows, m).items()
            if (method, format) in plot.METHODS
        }
        kinds = {label: kind for kind, (label, *_) in plot.KINDS.items()}
        drawn = {
            (kinds[line.get_label()], names[round(y)]): x
            for line in each.lines
            if line.get_label() in kinds
            for x, y in line.get_xydata()
        }
        assert drawn == pytest.approx(wanted)
        low, high = each.get_xlim()
        assert all(low < x < high for x in drawn.values())


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "images").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_have_colors_for_dark_pages_and_are_shown(picture: Path) -> None:
    assert "prefers-color-scheme: dark" in picture.read_text(encoding="utf-8")
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert any(f"images/{picture.name})" in page.read_text(encoding="utf-8") for page in pages)
