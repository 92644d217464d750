"""Sweeps: what is in a batch, what is on disk, and what an interruption costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dami
import pytest
import torch
from dami.chat import Answer
from dami.evaluation import JsonLines, Record, load_task, read_records, sweep
from dami.evaluation.journal import fingerprint
from dami.evaluation.tasks import spread
from torch import nn

from tests.dami.families import pair

LAMS = (0.0, 0.5, 1.0)
MODEL = nn.Linear(3, 2)


@pytest.fixture
def task() -> Any:
    return load_task(str(dami.example_pair()[0].parent / "questions.jsonl"), 5, verifier="word")


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, float]]]:
    """Every batch that is asked of a stand-in, which answers at random."""
    seen: list[list[tuple[str, float]]] = []

    def ask(model: object, tokenizer: object, prompts: list[str], lams: list[float]) -> list[Answer]:
        if tokenizer == "interrupted" and len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(list(zip(prompts, lams, strict=True)))
        numbers = torch.randint(100, (len(lams),)).tolist()
        return [Answer(p, lam, "", str(n), n, True) for p, lam, n in zip(prompts, lams, numbers, strict=True)]

    monkeypatch.setattr("dami.evaluation.sweeps.ask", ask)
    return seen


def test_all_intensities_of_a_question_are_in_one_batch(task: JsonLines, batches: list[Any]) -> None:
    done: list[int] = []
    records = sweep(MODEL, None, task, LAMS, rows=7, on_batch=lambda news: done.append(len(news)))
    assert done == [6, 6, 3]
    assert [(r.index, r.intensity) for r in records] == [(i, lam) for i in range(5) for lam in LAMS]
    for batch in batches:
        assert all(batch.count((prompt, lam)) == 1 for prompt, _ in batch for lam in LAMS)
    assert records[0].score == task.score(0, records[0].text)
    assert records[0].level == task.questions[0].level


def test_there_are_never_fewer_rows_than_intensities(task: JsonLines, batches: list[Any]) -> None:
    sweep(MODEL, None, task, LAMS, rows=1, samples=2)
    assert [len(batch) for batch in batches] == [3] * 10


@pytest.mark.parametrize("torn", [0, 10, 25])
def test_an_interrupted_run_goes_on_where_it_ended(
    task: JsonLines, batches: list[Any], tmp_path: Path, torn: int
) -> None:
    """With the very records of a run in one piece, also if the last batch is only half on disk."""
    whole = sweep(MODEL, None, task, LAMS, rows=6, path=tmp_path / "whole.jsonl")
    batches.clear()
    path = tmp_path / "a" / "run.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sweep(MODEL, "interrupted", task, LAMS, rows=6, path=path)
    if torn:
        path.write_bytes((tmp_path / "whole.jsonl").read_bytes()[: len(path.read_bytes()) + 10 * torn])
    batches.clear()
    told: list[int] = []
    assert sweep(MODEL, None, task, LAMS, rows=6, path=path, on_batch=lambda news: told.append(len(news))) == whole
    assert len(batches) == 2
    assert told == [6, 6, 3]
    assert read_records(path) == whole
    assert sweep(MODEL, None, task, LAMS, rows=6, path=path) == whole
    assert len(batches) == 2


def test_a_file_of_another_pair_or_other_settings_is_not_continued(
    task: JsonLines, batches: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    sweep(MODEL, None, task, LAMS, path=path)
    before = path.read_text()
    other = nn.Linear(3, 2)
    here, there = fingerprint(other), fingerprint(MODEL)
    for model, seed, told in (
        (MODEL, 1, "seed: 0 there, 1 now"),
        (other, 0, f"weights: {there} there, {here} now"),
        (other, 1, f"weights: {there} there, {here} now; seed: 0 there, 1 now"),
    ):
        with pytest.raises(ValueError, match=rf"other settings \({told}\): name another file or delete it"):
            sweep(model, None, task, LAMS, path=path, seed=seed)
    asked = list(task.questions)
    task.questions = [*asked[1:], asked[0]]
    with pytest.raises(ValueError, match=r"questions: \d \(\w{8}\) there, \d \(\w{8}\) now"):
        sweep(MODEL, None, task, LAMS, path=path)
    task.questions = asked
    assert path.read_text() == before
    head, *rest = before.splitlines()
    settings = json.loads(head)
    del settings["weights"]
    path.write_text("\n".join([json.dumps(settings), *rest]) + "\n")  # nobody knows whose answers these are
    with pytest.raises(ValueError, match=rf"\(weights: not told there, {there} now\)"):
        sweep(MODEL, None, task, LAMS, path=path)


def test_answers_may_hold_any_letter(task: JsonLines, batches: list[Any], tmp_path: Path) -> None:
    """Ends of lines of other alphabets, and one of several bytes at which the file was cut off."""
    path = tmp_path / "run.jsonl"
    whole = sweep(MODEL, None, task, LAMS, rows=6, path=path)
    head, *lines = path.read_bytes().splitlines(keepends=True)
    said = "\u2028\x85\x0b\r\nλ"
    found = [json.dumps(json.loads(line) | {"text": said}, ensure_ascii=False).encode() + b"\n" for line in lines]
    path.write_bytes(b"".join([head, *found]))
    assert [record.text for record in read_records(path)] == [said] * 15
    torn = b"".join([head, *found[:7]])
    path.write_bytes(torn[: torn.rindex("λ".encode()) + 1])
    again = sweep(MODEL, None, task, LAMS, rows=6, path=path)
    assert [record.text for record in again] == [said] * 6 + [record.text for record in whole[6:]]


@pytest.mark.parametrize("text", ["notes", "[1]\n", '{"question": "1+1"}', '{"weights": 1}\n{"task"'])
def test_a_file_that_is_none_of_a_sweep_stays_as_it_is(
    task: JsonLines, batches: list[Any], tmp_path: Path, text: str
) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"is no file of a sweep, by line 1|holds a sweep with other settings"):
        sweep(MODEL, None, task, LAMS, path=path)
    assert path.read_text() == text
    path.write_text("")
    assert len(sweep(MODEL, None, task, LAMS, path=path)) == 15


def test_a_full_disk_loses_no_answers(
    task: JsonLines, batches: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.jsonl"
    whole = sweep(MODEL, None, task, LAMS, rows=6, path=path)
    path.write_bytes(path.read_bytes()[:-10])
    torn = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=r"No space left on device: .*run.jsonl"):
            sweep(MODEL, None, task, LAMS, rows=6, path=path)
    assert path.read_bytes() == torn
    assert sweep(MODEL, None, task, LAMS, rows=6, path=path) == whole


@pytest.mark.parametrize("format", ["pair", "int8", "int4", "w8d4"])
def test_a_fingerprint_is_that_of_both_ends(format: str) -> None:
    def found(instruct: float, thinking: float) -> int:
        """Of a pair whose ends have been moved by so much."""
        ends = pair("qwen3")
        with torch.no_grad():
            for end, distance in zip(ends, (instruct, thinking), strict=True):
                for parameter in end.parameters():
                    parameter += distance * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
        return fingerprint(dami.patch_model(*ends, format=format))

    assert found(0, 0) == found(0, 0)
    assert len({found(0, 0), found(0.1, 0), found(0, 0.1)}) == 3


@pytest.mark.parametrize("lams", [[], [0.5, 0.5]])
def test_intensities_must_be_distinct(task: JsonLines, lams: list[float]) -> None:
    with pytest.raises(ValueError, match="intensities must be distinct numbers, one at least, got"):
        sweep(MODEL, None, task, lams)


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return dami.load_pair(*dami.example_pair())


def test_the_shipped_pair_thinks_more_and_solves_more(shipped: tuple[Any, Any]) -> None:
    task = JsonLines(dami.example_pair()[0].parent / "questions.jsonl", "word")
    task.questions = spread([q for q in task.questions if q.task in ("leg_counting", "calendar_arithmetic")], 8)
    records = sweep(*shipped, task, (0.0, 1.0), max_new_tokens=200)
    ends: dict[float, list[Record]] = {lam: [r for r in records if r.intensity == lam] for lam in (0.0, 1.0)}
    assert sum(r.tokens for r in ends[1.0]) > 2 * sum(r.tokens for r in ends[0.0])
    assert sum(r.score for r in ends[1.0]) > sum(r.score for r in ends[0.0])
    assert all(r.thought for r in ends[1.0])
    assert all(r.well_formed for r in records)
