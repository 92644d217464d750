"""Results: CSV files that are only appended to, and plain tables for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def store(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Appends rows to a CSV file. The first row sets the header of a new or empty file.

    Raises:
        ValueError: if the file has other columns.
    """
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    heading = not path.exists() or path.stat().st_size == 0
    if not heading:
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != columns:
            raise ValueError(f"{path} has other columns: {sorted({*found} ^ {*columns}) or found}")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    if heading:
        writer.writeheader()
    writer.writerows(rows)
    with path.open("a", newline="") as file:  # in one write, as a signal may end the process at any time
        file.write(text.getvalue())


def load(path: Path, **wanted: str) -> list[dict[str, str]]:
    """Returns the rows of a results file that have these values, or none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in wanted.items())]


def latest(rows: Iterable[dict[str, str]], *keys: str) -> dict[tuple[str, ...], dict[str, str]]:
    """Returns the newest row for each combination of `keys`."""
    return {tuple(row[key] for key in keys): row for row in sorted(rows, key=lambda row: row["date"])}


def text_table(lines: Sequence[Sequence[object]]) -> str:
    """Formats rows of cells as aligned text, the first column left-aligned and numbers right-aligned."""
    cells = [[str(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )
