"""Verifiers of one's own: registered in Python, or named on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dami.cli import app
from dami.evaluation import JsonLines, load_task, read_records, register_verifier, verifiers
from dami.evaluation.verifiers import contains, verify
from typer.testing import CliRunner

NEAR = """
from dami.evaluation import register_verifier

@register_verifier("long")
def long(text, answer):
    return min(1.0, len(text) / int(answer))

def near(text, answer):
    return abs(float(text) - float(answer)) <= 1

wrong = 3
"""


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiers, "VERIFIERS", dict(verifiers.VERIFIERS))


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_registered_verifier_scores_the_lines_that_name_it(tmp_path: Path) -> None:
    @register_verifier("near", can_judge=str.isdigit)
    def near(text: str, answer: str) -> float:
        return max(0.0, 1 - abs(int(text) - int(answer)) / 10)

    path = write(
        tmp_path / "q.jsonl",
        {"question": "3 + 4 =", "answer": 7, "verifier": "near"},
        {"question": "Where?", "answer": "Peru", "verifier": "contains"},
    )
    task = load_task(str(path))
    assert [task.score(0, text) for text in ("7", "9", "70")] == pytest.approx([1, 0.8, 0])
    assert task.score(1, "In Peru") == 1
    assert near("9", "7") == pytest.approx(0.8)  # the decorator leaves it as it is
    write(path, {"question": "?", "answer": "seven", "verifier": "near"})
    with pytest.raises(ValueError, match=r"q.jsonl:1: the verifier 'near' cannot judge the answer 'seven'"):
        load_task(str(path))
    write(path, {"question": "?", "answer": "seven", "verifier": "far"})
    with pytest.raises(
        ValueError, match=r"q.jsonl:1: verifier must be one of \['contains', 'math', 'near', 'word'\], got 'far'"
    ):
        load_task(str(path))
    write(path, {"question": "?", "answer": "seven", "verifier": ["near"]})
    with pytest.raises(ValueError, match=r"q.jsonl:1: verifier must be one of .*, got \['near'\]"):
        load_task(str(path))


def test_a_name_means_one_verifier() -> None:
    with pytest.raises(ValueError, match=r"'word' is a verifier already: dami.evaluation.verifiers.last_word"):
        register_verifier("word")(lambda text, answer: 1.0)
    register_verifier("contains")(contains)  # the same once more, as a cell of a notebook that runs again
    with pytest.raises(ValueError, match="name must be a word without ':', got 'os:system'"):
        register_verifier("os:system")


def test_a_verifier_that_fails_or_returns_no_share_is_named() -> None:
    register_verifier("two")(lambda text, answer: 2)
    register_verifier("none")(lambda text, answer: None)  # type: ignore[arg-type, return-value]
    register_verifier("nan")(lambda text, answer: float(text))
    for name, text, message in [
        ("two", "a", "'two' must return a number from 0 to 1, got 2.0 for the text 'a'"),
        ("nan", "nan", "'nan' must return a number from 0 to 1, got nan"),
        ("none", "a", "'none' failed on the text 'a' and the answer 'b': TypeError"),
        ("nan", "x", "'nan' failed on the text 'x' and the answer 'b': ValueError"),
    ]:
        with pytest.raises(ValueError, match=message):
            verify(name, text, "b")


def test_a_function_of_a_file_or_module_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_verifiers.py").write_text(NEAR)
    path = write(
        tmp_path / "q.jsonl",
        {"question": "?", "answer": 7},
        {"question": "?", "answer": 4, "verifier": "long"},  # registered by the file
    )
    for name in (f"{tmp_path / 'own_verifiers.py'}:near", "own_verifiers:near"):
        if name.startswith("own"):
            del verifiers.VERIFIERS["long"]  # two modules from one file are two
            monkeypatch.syspath_prepend(tmp_path)
        for _ in range(2):
            task = JsonLines(path, name)
        assert [task.score(0, text) for text in ("8", "9")] == [1, 0]
        assert task.score(1, "ab") == 0.5


def test_a_questions_file_imports_nothing(tmp_path: Path) -> None:
    """It may come from anywhere."""
    path = write(tmp_path / "q.jsonl", {"question": "?", "answer": "ls", "verifier": "os:system"})
    with pytest.raises(ValueError, match=r"q.jsonl:1: verifier must be one of .*, got 'os:system'"):
        JsonLines(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}/none.py:near", "FILE.py:FUNCTION: there is no file .*none.py"),
        ("{}/own.py:far", "FILE.py:FUNCTION: module .* has no attribute 'far'"),
        ("{}/own.py:wrong", "must be a function of a text and an answer, got 3"),
        ("{}/broken.py:near", r"FILE.py:FUNCTION: .*\(broken.py, line 2\)"),
        ("no_such_module:near", "MODULE:FUNCTION or FILE.py:FUNCTION: No module named 'no_such_module'"),
        (":near", "MODULE:FUNCTION or FILE.py:FUNCTION: Empty module name"),
        ("far", r"verifier must be one of \['contains', 'math', 'word'\], got 'far'"),
    ],
)
def test_a_function_that_is_not_there_is_named(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(NEAR)
    (tmp_path / "broken.py").write_text("\ndef near(:")
    with pytest.raises(ValueError, match=message):
        JsonLines(write(tmp_path / "q.jsonl", {"question": "?", "answer": 7}), name.format(tmp_path))


def test_the_command_takes_a_function_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def any(text, answer):\n    return 0.5\n")
    path = write(tmp_path / "q.jsonl", {"question": "1 + 1 =", "answer": 2}, {"question": "1 + 2 =", "answer": 3})
    arguments = ["evaluate", str(path), "--verifier", f"{tmp_path / 'own.py'}:any", "-l", "0", "--greedy"]
    result = CliRunner().invoke(app, [*arguments, "--max-tokens", "4", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert [record.score for record in read_records(tmp_path / "out" / "records.jsonl")] == [0.5, 0.5]
    result = CliRunner().invoke(app, ["evaluate", str(path), "--verifier", "judge"])
    assert result.exit_code == 2
    assert "'contains', 'math', 'word'], got 'judge'" in " ".join(result.output.split())
