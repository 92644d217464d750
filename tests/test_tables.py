"""The README's tables are those of benchmarks/results."""

from __future__ import annotations

from benchmarks import tables


def test_readme_shows_the_newest_results() -> None:
    text = tables.README.read_text()
    assert all(f"<!-- table: {name} -->" in text for name in tables.TABLES)
    assert tables.filled(text) == text, "run: python benchmarks/tables.py"
