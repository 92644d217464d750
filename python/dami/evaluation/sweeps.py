"""Sweeps: every question at every λ, all λ of a question in one mixed batch, each batch on disk when it is done."""

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

Row = tuple[int, int, float]  # a question's place, which of its samples, and λ


@dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        task: the task's name.
        index: the question's place in it.
        level: the question's.
        intensity: λ.
        sample: which of the answers to this question at this λ.
        score: from 0 to 1.
        tokens: generated, thought and end token included.
        thought, text: what was said.
        finished: False where it was cut off.
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
        """Whether there is an answer, and it came to its end."""
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

    What a run gives does not depend on whether it was interrupted. Other batch sizes give other samples.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        task: questions and verifier.
        intensities: distinct λ.
        path: a file of JSON lines that each batch is appended to. If it is there, and of this pair with these settings,
            the run goes on where it ended.
        samples: answers to a question at one λ.
        rows: of a batch, at most; but no fewer than λ.
        seed: of the sampling.
        on_batch: is given the records of each batch when it is done, and those found in the file first.
        options: passed to `dami.chat.ask`, and so to `model.generate`.

    Raises:
        ValueError: the file belongs to a run with another pair or other settings; they are named.
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
        return [_record(task, row, said) for row, said in zip(asked, answers, strict=True)]

    records: list[Record] = []
    for news in answered_batches(Record, batches, answer, None if path is None else Path(path), settings):
        records += news
        on_batch(news)
    return records


def _record(task: Task, row: Row, said: Answer) -> Record:
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
    """The records of a sweep's file, whole batches or not."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")  # an answer may hold other ends of lines
    return [Record(**json.loads(line)) for line in lines[1:-1]]
