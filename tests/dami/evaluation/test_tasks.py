"""Questions from files and from reasoning-gym, and their verifiers."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import dami
import pytest
from dami.evaluation import JsonLines, Question, ReasoningGym, load_task
from dami.evaluation.tasks import last_word, same_math, spread

ROOT = Path(__file__).resolve().parents[3]
QUESTIONS = [
    Question(f"{task} {level} {n}", str(n), task, level)
    for task in ("gcd", "sum")
    for level in (1, 2, 3)
    for n in range(4)
]


@pytest.mark.parametrize(
    ("said", "wanted", "right"),
    [
        ("73", "73", True),
        ("The answer is 73.", "73", True),
        ("it is **1,073** legs", "1073", True),
        ("-73", "73", False),
        ("-73", "-73", True),
        ("73 or 74", "73", False),
        ("730", "73", False),
        ("", "73", False),
        ("It was a Tuesday.", "Tuesday", True),
        ("Monday", "Tuesday", False),
    ],
)
def test_the_last_number_or_word_counts(said: str, wanted: str, right: bool) -> None:
    assert last_word(said, wanted) == right


@pytest.mark.parametrize(
    ("said", "wanted", "right"),
    [
        (r"So it is \boxed{\frac{1}{2}}.", "0.5", True),
        (r"The answer is $\frac{2}{4}$.", r"\frac{1}{2}", True),
        ("The answer is 7", "7", True),
        (r"\boxed{8}", "7", False),
        ("", "7", False),
    ],
)
def test_math_is_compared_by_its_meaning(said: str, wanted: str, right: bool) -> None:
    assert same_math(said, wanted) == right


def test_spread_takes_alike_of_every_task_and_level() -> None:
    chosen = spread(QUESTIONS, 12)
    assert [q.level for q in chosen] == sorted(q.level for q in chosen)
    counts = [sum((q.task, q.level) == group for q in chosen) for group in {(q.task, q.level) for q in QUESTIONS}]
    assert counts == [2] * 6
    assert sorted(spread(QUESTIONS, 10**6), key=str) == sorted(QUESTIONS, key=str)


def test_the_shipped_questions_can_be_read_and_have_every_level_of_every_task() -> None:
    questions = load_task(str(dami.example_pair()[0].parent / "questions.jsonl"), verifier="word").questions
    tasks, levels = {q.task for q in questions}, {q.level for q in questions}
    assert {(q.task, q.level) for q in questions} == {(t, level) for t in tasks for level in levels}
    assert len(tasks) >= 3
    assert len(levels) == 5


def test_questions_of_a_file_may_be_spelled_as_the_usual_data_sets_do(tmp_path: Path) -> None:
    lines = [
        {"problem": "1+1", "answer": 2},
        {"prompt": [{"role": "user", "content": "2+2"}], "answer": "4", "level": 3},
    ]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    task = JsonLines(path, "word")
    assert task.name == "sums"
    assert task.questions == [
        Question("1+1", "2", "sums", verifier="word"),
        Question([{"role": "user", "content": "2+2"}], "4", "sums", 3, "word"),
    ]  # fmt: skip
    assert [task.score(1, "It is 4."), task.score(1, "5")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("verifier", "answers"),
    [
        ("math", ["7", "-7.5", "1,073", r"\frac{1}{2}", "x^2+1", "(1, 2)", "xy", "$Tuesday$", "5 apples"]),
        ("word", ["7", "-7", "Tuesday"]),
        ("contains", ["7", "7.5", "Kuala Lumpur", "N'Djamena"]),
    ],
)
def test_a_verifier_takes_answers_that_it_can_judge(verifier: str, answers: list[str], tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps({"question": "?", "answer": answer}) for answer in answers))
    assert [question.answer for question in JsonLines(path, verifier).questions] == answers


@pytest.mark.parametrize(
    ("verifier", "answer"),
    [
        ("math", "Tuesday"),
        ("math", "New York"),
        ("math", r"\text{Monday}"),
        ("math", ""),
        ("word", "New York"),
        ("word", "0.5"),
        ("word", ""),
        ("contains", ""),
    ],
)
def test_a_verifier_that_cannot_judge_an_answer_says_so(verifier: str, answer: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(
        json.dumps({"question": "1 + 1", "answer": 2}) + "\n" + json.dumps({"problem": "?", "answer": answer})
    )
    with pytest.raises(
        ValueError, match=f"q.jsonl:2: the verifier '{verifier}' cannot judge the answer .*: name another"
    ):
        JsonLines(path, verifier)


def test_a_file_may_hold_any_text_and_must_hold_questions(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "a\u2028b", "answer": 1}, ensure_ascii=False), encoding="utf-8-sig")
    assert JsonLines(path).questions[0].question == "a\u2028b"
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"q.jsonl must hold questions, and is empty"):
        JsonLines(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"q.jsonl must be text in UTF-8: 'utf-8' codec can't decode"):
        JsonLines(path)
    (tmp_path / "q.json").write_text("")
    with pytest.raises(ValueError, match=r"a file of questions must end in .jsonl, got .*q.json"):
        load_task(str(tmp_path / "q.json"))


@pytest.mark.parametrize("file", [dami.example_pair()[0].parent, ROOT / "examples" / "smollm2"])
def test_questions_files_name_their_verifiers(file: Path) -> None:
    """So that no verifier has to be given: every right answer is found right."""
    task = load_task(str(file / "questions.jsonl"))
    assert {question.verifier for question in task.questions} == {"word"}
    assert all(task.score(index, question.answer) for index, question in enumerate(task.questions))


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        '{"question": "1+1"}',
        '{"answer": "2"}',
        "[1]",
        '{"question": 1, "answer": 1}',
        '{"prompt": [], "answer": 1}',
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text('{"question": "1", "answer": "1"}\n' + line)
    with pytest.raises(ValueError, match=r"sums.jsonl:2 must be a JSON object with question .* and answer, got"):
        JsonLines(path)


def test_an_unknown_verifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"verifier must be one of \['contains', 'math', 'word'\], got 'judge'"):
        JsonLines(tmp_path / "none.jsonl", "judge")
    path = tmp_path / "judged.jsonl"
    path.write_text('\n{"question": "1+1", "answer": 2, "verifier": "judge"}')
    with pytest.raises(ValueError, match=r"judged.jsonl:2: verifier must be one of .*, got 'judge'"):
        JsonLines(path)


def test_a_question_may_have_a_verifier_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    lines = [{"question": "3 + 4 =", "answer": 7}, {"question": "Where?", "answer": "Peru", "verifier": "contains"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    task = load_task(str(path), verifier="word")
    assert [task.score(0, text) for text in ("3 + 4 = 7", "7, as 3 + 4")] == [1.0, 0.0]
    assert [task.score(1, text) for text in ("In Peru, I think.", "Peruvian")] == [1.0, 0.0]
    task.questions = task.questions[::-1]
    assert task.score(0, "In Peru, I think.") == 1.0  # the verifier goes with its question


def test_reasoning_gym_makes_the_same_questions_of_a_seed_and_scores_answers() -> None:
    task, again = (load_task("chain_sum", 5, seed=3, max_terms=2) for _ in range(2))
    assert isinstance(task, ReasoningGym)
    assert task.questions == again.questions
    assert len(task.questions) == 5
    assert [task.score(i, question.answer) for i, question in enumerate(task.questions)] == [1.0] * 5
    assert task.score(0, "not a number") < 1
    assert task.questions != load_task("chain_sum", 5, seed=4, max_terms=2).questions


def test_an_unknown_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="dataset must be one of reasoning-gym's, such as 'chain_sum', got 'sudokus'"):
        load_task("sudokus")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """When the task is loaded, not at the first answer."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    (tmp_path / "q.jsonl").write_text('{"question": "1 + 1", "answer": 2}')
    with pytest.raises(ImportError, match=r"this needs math_verify: pip install .*math-verify"):
        JsonLines(tmp_path / "q.jsonl")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match="this needs reasoning_gym: pip install 'reasoning-gym>="):
        load_task("chain_sum")


def test_the_harness_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "dami.evaluation.harness", raising=False)
    with pytest.raises(ImportError, match=r"harness needs lm_eval: pip install .*'lm-eval\[hf\]>="):
        importlib.import_module("dami.evaluation.harness")
