"""Tasks: questions, and a verifier that scores an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dami.evaluation.verifiers import can_judge, check_known, import_optional, import_verifier, verify
from dami.evaluation.verifiers import last_word as last_word
from dami.evaluation.verifiers import same_math as same_math
from dami.prompts import Prompt, as_prompt


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        question: a user's message, or a conversation as chat templates take it.
        answer: what is right, in the words of its task.
        task: the task's name, or its part's.
        level: its difficulty, 0 if nothing is known of it.
        verifier: by name, of a question from a file.
    """

    question: Prompt
    answer: str
    task: str = ""
    level: int = 0
    verifier: str = ""


class Task(Protocol):
    """Questions, each known by its place, and how well a text answers one of them.

    Attributes:
        name: as records and reports show it.
        questions: in a fixed order.
    """

    @property
    def name(self) -> str: ...

    @property
    def questions(self) -> Sequence[Question]: ...

    def score(self, index: int, text: str) -> float:
        """How right `text` is as the answer to `questions[index]`, from 0 to 1; thoughts are cut off already."""


@dataclass
class JsonLines:
    """Questions from a file of JSON objects, one a line, with `question` (or `problem`, or `prompt`) and `answer`.

    `task`, `level` and a `verifier` of its own may come with each.

    Args:
        path: the file.
        verifier: of lines that name none: "math" (math-verify), "word" (the last number, or word, of the text must be
            the answer), "contains" (the answer must stand anywhere in the text), another that is registered, or
            MODULE:FUNCTION or FILE.py:FUNCTION, which is imported. Lines can only name what is registered then.

    Raises:
        ValueError: an unknown verifier, one that cannot judge an answer, a line that is no question, or a file without
            any; all are named.
        ImportError: math-verify is needed, and not installed.
    """

    path: Path
    verifier: str = "math"
    name: str = field(init=False)
    questions: list[Question] = field(init=False)

    def __post_init__(self) -> None:
        import_verifier(self.verifier)
        self.name = Path(self.path).stem
        self.questions = [self._question(number, line) for number, line in lines_of(Path(self.path))]
        if not self.questions:
            raise ValueError(f"{self.path} must hold questions, and is empty")

    def _question(self, number: int, line: str) -> Question:
        try:
            fields = json.loads(line)
            asked = next(fields[key] for key in ("question", "problem", "prompt") if key in fields)
            question = Question(
                as_prompt(asked),
                str(fields["answer"]),
                fields.get("task", self.name),
                int(fields.get("level", 0)),
                fields.get("verifier", self.verifier),
            )
        except (ValueError, KeyError, StopIteration, TypeError) as error:
            raise ValueError(
                f"{self.path}:{number} must be a JSON object with question (or problem, or prompt) and answer, got "
                f"{line[:80]!r}"
            ) from error
        try:
            check_known(question.verifier)
        except ValueError as error:
            raise ValueError(f"{self.path}:{number}: {error}") from error
        if not can_judge(question.verifier, question.answer):
            raise ValueError(
                f"{self.path}:{number}: the verifier {question.verifier!r} cannot judge the answer "
                f"{question.answer!r}: name another for the line or for the file, "
                "'word' for a number or one word, 'contains' for any text, 'math' for mathematics"
            )
        return question

    def score(self, index: int, text: str) -> float:
        question = self.questions[index]
        return verify(question.verifier, text, question.answer)


class ReasoningGym:
    """Questions that reasoning-gym makes up, scored by its own verifier.

    Args:
        dataset: the name of one of its datasets, such as "chain_sum".
        count: how many questions.
        seed: of the questions.
        config: its other settings, such as `min_terms`.

    Raises:
        ValueError: there is no such dataset.
    """

    def __init__(self, dataset: str, count: int = 100, seed: int = 0, **config: Any) -> None:
        reasoning_gym = import_optional("reasoning_gym")
        known = reasoning_gym.factory.DATASETS
        if dataset not in known:
            raise ValueError(f"dataset must be one of reasoning-gym's, such as 'chain_sum', got {dataset!r}")
        self.name = dataset
        self._dataset = reasoning_gym.create_dataset(dataset, size=count, seed=seed, **config)
        self._entries = [self._dataset[i] for i in range(count)]
        self.questions = [Question(entry["question"], str(entry["answer"]), dataset) for entry in self._entries]

    def score(self, index: int, text: str) -> float:
        return float(self._dataset.score_answer(text, self._entries[index]))


def load_task(name: str, count: int | None = None, seed: int = 0, **config: Any) -> Task:
    """The task of a name: a path that ends in `.jsonl`, or a dataset of reasoning-gym.

    Args:
        name: the path, or the dataset's name.
        count: how many questions: of a file those that `spread` takes, all if None; of a dataset 100 if None.
        seed: of a dataset's questions.
        config: `verifier` of a file, or the dataset's settings.
    """
    if not name.endswith(".jsonl"):
        if Path(name).exists():
            raise ValueError(f"a file of questions must end in .jsonl, got {name}")
        if "verifier" in config:
            raise ValueError(f"verifier is for a file of questions, and {name}, of reasoning-gym, has its own")
        return ReasoningGym(name, 100 if count is None else count, seed, **config)
    task = JsonLines(Path(name), **config)
    if count is not None:
        task.questions = spread(task.questions, count)
    return task


TO_EVALUATE, TO_STUDY, TO_TRAIN = 2, 4, 20  # questions that a report, `study` and `train_estimator` need


def check_enough(task: Task, fewest: int) -> None:
    """Raises ValueError if a task has fewer questions."""
    if len(task.questions) < fewest:
        raise ValueError(f"questions must be at least {fewest}, got {len(task.questions)}")


def check_distinct(intensities: Sequence[float], among: Sequence[float] = ()) -> None:
    """Raises ValueError unless λ are distinct, at least one, and hold those of `among`."""
    if len(set(intensities)) < len(intensities) or not intensities or not set(among) <= set(intensities):
        held = f" and hold {' and '.join(f'{lam:g}' for lam in among)}" if among else " numbers, one at least"
        raise ValueError(f"intensities must be distinct{held}, got {list(intensities)}")


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """`count` questions at even distances, so that a file in order of task and level gives of each alike; by level."""
    count = min(count, len(questions))
    return sorted((questions[i * len(questions) // count] for i in range(count)), key=lambda q: q.level)


def lines_of(path: Path) -> list[tuple[int, str]]:
    """The lines of a file in UTF-8 that are not blank, with their numbers.

    Raises:
        ValueError: it is no such text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from error
    # JSON may hold what str.splitlines takes for the end of a line
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
