"""Sweeps: answers every question at every λ, in mixed batches of all λ of a question, saved batch by batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dami.chat import Answer, ask
from dami.evaluation.journal import answered_batches, run_settings
from dami.evaluation.tasks import Task, check_distinct

Row = tuple[int, int, float]  # question index, sample index, λ


@dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        task: the task's name.
        index: the question's index in the task.
        level: the question's difficulty.
        intensity: λ.
        sample: index among the answers to this question at this λ.
        score: from 0 to 1.
        tokens: number of generated tokens, including thought and end token.
        thought, text: of the answer.
        finished: False if the answer was cut off.
    """

    task: str
    index: int
    level: int
    intensity: float
    sample: int
    score: float
    tokens: int
    thought: str
    text: str
    finished: bool

    @property
    def well_formed(self) -> bool:
        """Whether there is an answer and it is complete."""
        return self.finished and bool(self.text)


def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    intensities: Sequence[float],
    *,
    path: str | Path | None = None,
    samples: int = 1,
    rows: int = 64,
    seed: int = 0,
    on_batch: Callable[[list[Record]], None] = lambda records: None,
    **options: Any,
) -> list[Record]:
    """Answers every question of a task at every λ, in mixed batches that hold all λ of a question.

    An interruption does not change the results of a run. Other batch sizes give other samples.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        task: questions and verifier.
        intensities: distinct λ.
        path: a file of JSON lines that each batch is appended to. If it exists and belongs to this pair and these
            settings, the run resumes from it.
        samples: number of answers to a question at each λ.
        rows: the most rows in a batch; at least the number of λ.
        seed: of the sampling.
        on_batch: called with the records found in the file, then with those of each finished batch.
        options: passed to `dami.chat.ask`, and so to `model.generate`.

    Raises:
        ValueError: the file belongs to a run with another pair or other settings, which the message names.
    """
    check_distinct(intensities)
    units = [(index, sample) for index in range(len(task.questions)) for sample in range(samples)]
    step = max(1, rows // len(intensities))
    batches = [
        [(*unit, float(lam)) for unit in units[start : start + step] for lam in intensities]
        for start in range(0, len(units), step)
    ]
    settings = run_settings(model, task, rows, seed, options)
    settings |= {"intensities": [float(lam) for lam in intensities], "samples": samples}

    def answer(asked: Sequence[Row]) -> list[Record]:
        prompts = [task.questions[index].question for index, _, _ in asked]
        answers = ask(model, tokenizer, prompts, [lam for _, _, lam in asked], **options)
        return [record_of(task, row, said) for row, said in zip(asked, answers, strict=True)]

    records: list[Record] = []
    for news in answered_batches(Record, batches, answer, None if path is None else Path(path), settings):
        records += news
        on_batch(news)
    return records


def record_of(task: Task, row: Row, said: Answer) -> Record:
    """Scores an answer."""
    index, sample, lam = row
    question = task.questions[index]
    return Record(
        task=question.task or task.name,
        index=index,
        level=question.level,
        intensity=lam,
        sample=sample,
        score=task.score(index, said.text),
        tokens=said.tokens,
        thought=said.thought,
        text=said.text,
        finished=said.finished,
    )


def read_records(path: str | Path) -> list[Record]:
    """Reads the records of a sweep's file, whether or not its last batch is complete."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")  # an answer may contain other line separators
    return [Record(**json.loads(line)) for line in lines[1:-1]]
