"""What the command line prints in terminals of 80 and 40 columns, and into files: whole numbers, nothing too wide."""

from __future__ import annotations

import re
from io import StringIO

import pytest
from dami.chat import Answer
from dami.cli.demo import Cost, price_table
from dami.cli.terminal import parameters, point_table, side_by_side
from dami.doctor import Check, Problem, Report
from dami.evaluation.frontier import Interval, Point
from dami.layers.describe import Description, ParameterRow
from dami.tables import FittedTable
from rich.cells import cell_len
from rich.console import Console, RenderableType

POINTS = [Point(lam, Interval(0.5, 0.4375, 0.5625), Interval(1234.5, 1200, 1300), 1.0, 1.0) for lam in (0.0, 0.35, 1.0)]
LAYER = "model.layers.{}.self_attn.q_proj.weight"
DESCRIPTION = Description(
    tuple(
        ParameterRow(
            name=LAYER.format(layer), kind="linear", shape=(4096, 1024), dtype="bfloat16", format="int4",
            nbytes=12_345_678, tied_to=None,
        )
        for layer in range(12)
    )
)  # fmt: skip
COST = Cost(123_456_789, 98_765_432, 1234.5, [[1]] * 55, [""])
CHECK = Check("cpu", "lerp_rms_norm", "w8d4", "native avx512_bf16", None, 1.2e-3, 12345.0, 67890.0)
REPORT = Report(
    {"torch": "2.13.0+cpu"}, {"CPU": "a name of many words"}, (CHECK,), (Problem("what is wrong", "do this"),)
)
RENDERED: dict[str, tuple[RenderableType, list[str]]] = {
    "points": (point_table(POINTS), ["0.35", "44% to 56%", "1200 to 1300"]),
    "parameters": (parameters(DESCRIPTION), ["4096×1024", "148,148,136", "int4 bfloat16"]),
    "price": (price_table(COST, COST, 11), ["1234.5 s", "123 MB", "+ 98.8 MB", "55"]),
    "doctor": (REPORT, ["1.2e-03", "12345", "67890", "2.13.0+cpu"]),
}


def printed(what: RenderableType, width: int, terminal: bool = False) -> str:
    text = StringIO()
    Console(file=text, width=width, force_terminal=terminal, highlight=False).print(what)
    return text.getvalue()


@pytest.mark.parametrize("width", [120, 80, 40])
@pytest.mark.parametrize("name", RENDERED)
def test_numbers_stay_whole_and_lines_fit(name: str, width: int) -> None:
    what, numbers = RENDERED[name]
    text = printed(what, width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text
    assert "\x1b" not in text  # a file gets no colours
    for number in numbers:
        assert number in text
    coloured = printed(what, width, terminal=True)
    assert re.sub("\x1b\\[[0-9;]*m", "", coloured).split() == text.split()


@pytest.mark.parametrize("width", [80, 40, 24])
def test_answers_fit_the_terminal(width: int) -> None:
    answers = [Answer("2 + 3 =", lam, "so " * 40, "the answer is 12345", 1234, True) for lam in (0.0, 0.35, 1.0)]
    console = Console(file=StringIO(), width=width, highlight=False)
    text = printed(side_by_side(answers, console, verdicts=[True, False, True]), width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert text.count("1234 ") == text.count("12345") == 3
    assert (text.count("✓"), text.count("✗")) == (2, 1)


def test_columns_stand_side_by_side_where_they_fit() -> None:
    table = FittedTable(("name", "value"), [("a", "1"), ("bcd", "23")], left=1)
    assert printed(table, 12).splitlines() == ["name  value", "a         1", "bcd      23"]
    assert [line.rstrip() for line in printed(table, 10).splitlines()] == [
        "name   a",
        "value  1",
        "",
        "name   bcd",
        "value  23",
    ]


def test_a_long_name_is_broken_after_dots_if_that_is_enough() -> None:
    name = "model.layers.self_attn.q_proj.weight"
    table = FittedTable(("name", "value"), [(name, "1"), ("b", "2")], left=1, breaks=".")
    lines = printed(table, 32).splitlines()
    assert [line.rstrip() for line in lines[1:3]] == ["model.layers.self_attn.      1", "   q_proj.weight"]
    assert "".join(line.partition("  1")[0].strip() for line in lines[1:3]) == name
    narrow = printed(table, 20).splitlines()
    assert narrow[0].startswith("name   model.")  # records, for the name would have 11 columns


def test_the_row_that_was_chosen_is_bold() -> None:
    table = FittedTable(("a", "b"), [("1", "2"), ("3", "4")], marked=frozenset({1}))
    assert "\x1b[1m" not in printed(table, 40, terminal=True).splitlines()[1]
    assert "\x1b[1m" in printed(table, 40, terminal=True).splitlines()[2]


def test_an_empty_table_has_its_heads() -> None:
    assert printed(FittedTable(("a", "b"), []), 40).split() == ["a", "b"]
