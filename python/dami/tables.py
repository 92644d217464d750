"""Tables that fit a terminal of any width, or a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Cell = str | Text
NARROWEST = 16  # columns below which wrapped names become unreadable


@dataclass(frozen=True)
class FittedTable:
    """A table whose numbers are never wrapped: if the columns do not fit, each row becomes a record of several lines.

    Attributes:
        heads: the column headings.
        rows: the cells of each row.
        left: this many columns, from the first, are left-aligned; the others are right-aligned.
        breaks: the first column may be wrapped after these characters, if that makes the others fit.
        marked: indices of the rows in bold.
        title: printed above the table.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: int = 0
    breaks: str = ""
    marked: frozenset[int] = frozenset()
    title: Text | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title is not None:
            yield self.title
        rows = self.rows
        room = options.max_width - sum(2 + self._width(column) for column in range(1, len(self.heads)))
        if self.breaks and NARROWEST <= room < self._width(0):
            rows = [(_broken(str(first), self.breaks, room), *others) for first, *others in rows]
        table = self._columns(rows)
        wanted = Measurement.get(console, options.update(max_width=1 << 16), table).maximum
        yield table if wanted <= options.max_width else self._records(options.max_width)

    def _width(self, column: int) -> int:
        return max(cell_len(str(cell)) for cell in (self.heads[column], *(row[column] for row in self.rows)))

    def _columns(self, rows: Sequence[Sequence[Cell]]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for place, head in enumerate(self.heads):
            table.add_column(head, no_wrap=True, justify="left" if place < self.left else "right")
        for place, row in enumerate(rows):
            table.add_row(*row, style="bold" if place in self.marked else None)
        return table

    def _records(self, width: int) -> Table:
        room = width - 2 - max(map(cell_len, self.heads))
        records = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        records.add_column(style="dim")
        records.add_column(overflow="fold")
        for place, row in enumerate(self.rows):
            if place:
                records.add_row()
            first = _broken(str(row[0]), self.breaks, room) if self.breaks else row[0]
            for head, cell in zip(self.heads, (first, *row[1:]), strict=True):
                records.add_row(head, cell, style="bold" if place in self.marked else None)
        return records


def _broken(name: str, breaks: str, room: int) -> str:
    """Wraps a name to `room` columns after the characters in `breaks`, and indents all lines but the first."""
    lines = [""]
    for piece in re.findall(f"[^{re.escape(breaks)}]*[{re.escape(breaks)}]?", name):
        if lines[-1].strip() and cell_len(lines[-1] + piece) > room:
            lines.append("   ")
        lines[-1] += piece
    return "\n".join(lines)
