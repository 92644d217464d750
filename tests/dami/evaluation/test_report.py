"""The report of a sweep: one page, one picture, one file of numbers; and `dami evaluate`, which writes them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import dami
import pytest
from dami.cli import app
from dami.evaluation import JsonLines, load_task, read_records
from dami.evaluation.pages import excerpt
from dami.evaluation.report import verifiers_of, write_report
from typer.testing import CliRunner

from tests.dami.evaluation.test_frontier import RISING, records


class Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_report_shows_numbers_and_answers_and_escapes_them(tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    line = json.dumps({"question": "Is 1 < 2 & <b>so</b>?", "answer": "x"})
    questions.write_text("\n".join([line] * 6))
    task = JsonLines(questions, "word")
    frontier = write_report(task, records(*RISING, questions=6), tmp_path / "out", {"pair": "a & b"})
    page = (tmp_path / "out" / "report.html").read_text()
    parser = Text()
    parser.feed(page)
    assert "Is 1 < 2 & <b>so</b>?" in parser.text
    assert "b" not in parser.open
    assert "a & b" in parser.text
    assert parser.open.count("svg") == 2  # that of the icon is in an attribute
    assert parser.open.count("link") == 1
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    numbers = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert numbers["questions"] == len(frontier) == 6
    assert len(numbers["points"]) == 4
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "frontier.svg").read_text()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Short\n  enough", "Short enough"),
        ("What is the sum of these numbers: " + "17 + " * 40, "What is the sum of these numbers: 17 + 17 + …"),
        ("问题很长" * 30, "问题很长" * 11 + "…"),  # no spaces to cut at
        ("x" * 50, "x" * 44 + "…"),
    ],
)
def test_an_excerpt_ends_between_words(text: str, shown: str) -> None:
    found = excerpt(text, 45)
    assert found == shown
    assert len(found) <= 45


def test_a_page_says_which_verifiers_judge(tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    lines = [{"question": "1 + 1", "answer": 2, "verifier": name} for name in ("word", "math", "word")]
    questions.write_text("\n".join(map(json.dumps, lines)))
    assert verifiers_of(JsonLines(questions)) == ["math", "word"]
    write_report(JsonLines(questions), records(*RISING, questions=3), tmp_path, {"format": "pair"})
    assert json.loads((tmp_path / "frontier.json").read_text())["verifier"] == "math, word"
    assert "<dt>verifier</dt><dd>math, word</dd>" in (tmp_path / "report.html").read_text()
    assert verifiers_of(load_task("chain_sum", 2)) == ["that of chain_sum"]


def test_an_estimators_choice_is_shown_on_the_page(tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text("\n".join([json.dumps({"question": "1 + 1 =", "answer": "2"})] * 6))
    lams = sorted({record.intensity for record in records(*RISING)})
    write_report(JsonLines(questions, "word"), records(*RISING, questions=6), tmp_path, {}, [lams[1]] * 6)
    page = (tmp_path / "report.html").read_text()
    assert page.count("The estimator's choice: ") == 6
    outcome = json.loads((tmp_path / "frontier.json").read_text())["estimator"]
    assert f"{outcome['accuracy'][0]:.0%}" in page[page.index("<dt>estimator</dt>") :]


def test_evaluate_asks_reports_and_goes_on(tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text(
        "\n".join(json.dumps({"question": f"What is {n} + 1 =", "answer": str(n + 1)}) for n in range(4))
    )
    arguments = [
        "evaluate",
        str(questions),
        "--verifier",
        "word",
        "-l",
        "0",
        "-l",
        "1",
        "--max-tokens",
        "8",
        "--greedy",
    ]
    arguments += ["--max-tokens", "8", "-o", str(tmp_path / "out"), "--rows", "4"]
    for _ in range(2):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert "report.html" in result.output
    lines = (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 8
    result = CliRunner().invoke(app, [*arguments, "--seed", "5"])
    assert result.exit_code == 2
    assert "other settings" in result.output


def test_evaluate_asks_the_shipped_questions_unless_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["evaluate", "--questions", "4", "-l", "1", "--max-tokens", "64", "--greedy", "-o", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    found = read_records(tmp_path / "records.jsonl")
    asked = load_task(str(dami.example_pair()[0].parent / "questions.jsonl"), 4).questions
    assert [record.score for record in found] == [record.text == asked[record.index].answer for record in found]
    assert any(record.score for record in found if record.task == "calendar_arithmetic")  # weekdays count too


@pytest.mark.parametrize(("task", "message"), [("no/such.jsonl", "No such file"), ("sudokus", "reasoning-gym's")])
def test_evaluate_tells_of_a_task_that_is_not_there(task: str, message: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", task])
    assert result.exit_code == 2
    assert message in result.output
