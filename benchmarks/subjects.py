"""The pairs that estimators of λ are measured on."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dami
import torch
from dami.evaluation import load_task
from dami.evaluation.tasks import Task, spread
from dami.evaluation.training import train_estimator
from dami.loading.load import example_pair
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.zoo import ZOO
from benchmarks.zoo.recipes import PAIRS

ROOT = Path(__file__).resolve().parents[1]
TENTHS, FIFTHS = ([place / steps for place in range(steps + 1)] for steps in (10, 5))


@dataclass(frozen=True)
class Subject:
    """A pair, the settings for asking it, and what estimators may learn from.

    Attributes:
        model, tokenizer: the pair; its estimator, if it has one, comes with it.
        task: held-out questions.
        lams, samples, rows, options: as for `sweep`.
        training: the directory of a `train_estimator`, with the questions that it asked as `unseen.jsonl`.
        calibration: options for answers that are compared with each other: sampled ones.
        tuned_on: whether rules for λ were chosen by results on this pair.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    lams: list[float]
    samples: int
    rows: int
    training: Path
    tuned_on: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)

    @property
    def unseen(self) -> Task:
        """Questions for estimators to learn from, with their answers."""
        return load_task(str(self.training / "unseen.jsonl"), verifier="word")


def names() -> list[str]:
    """Returns the names of all subjects."""
    return ["shipped", "smollm2", "smollm2-sampled", *(f"zoo/{name}" for name in PAIRS)]


def subject(name: str, training: Path | None, work: Path) -> Subject:
    """Loads a subject.

    Args:
        name: one of `names`.
        training: the directory of its estimator's training; None for a pair of the zoo, whose estimator is trained.
        work: folder for that.

    Raises:
        ValueError: `training` is missing, or given for a pair of the zoo.
    """
    if name.startswith("zoo/") != (training is None):
        raise ValueError(f"--training must be given for pairs outside the zoo only, got {training} for {name}")
    if training is None:
        return of_zoo(name.removeprefix("zoo/"), work / "training")
    return {"shipped": shipped, "smollm2": smollm2, "smollm2-sampled": sampled_smollm2}[name](training)


def shipped(training: Path) -> Subject:
    task = load_task(str(example_pair()[0].parent / "questions.jsonl"), verifier="word")
    task.questions = sorted(task.questions, key=lambda question: question.level)
    return Subject(*dami.load_pair(*example_pair()), task, TENTHS, samples=8, rows=440, training=training)


def smollm2(training: Path) -> Subject:
    example = ROOT / "examples" / "smollm2"
    sys.path.append(str(example))
    from instruct import smollm2_file

    pair = dami.load_pair(smollm2_file(), example / "adapter", format="lowrank", dtype=torch.bfloat16)
    options = {"do_sample": False, "max_new_tokens": 128}
    task = load_task(str(example / "mixed.jsonl"))
    sampled = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 128}
    return Subject(*pair, task, FIFTHS, samples=1, rows=120, training=training, options=options, calibration=sampled)


def sampled_smollm2(training: Path) -> Subject:
    greedy = smollm2(training)
    return replace(greedy, samples=3, options=greedy.calibration)


def of_zoo(name: str, training: Path) -> Subject:
    """Loads a pair of the zoo, and trains its estimator if that has not been done."""
    model, tokenizer = dami.load_pair(ZOO / name / "instruct", ZOO / name / "thinking")
    training.mkdir(parents=True, exist_ok=True)
    shutil.copy(ZOO / name / "known.jsonl", training / "unseen.jsonl")
    task = load_task(str(ZOO / name / "questions.jsonl"))
    found = Subject(
        model, tokenizer, task, FIFTHS, samples=8, rows=480, training=training, tuned_on=PAIRS[name].tuned_on
    )
    train_estimator(model, tokenizer, found.unseen, training, FIFTHS, samples=2, rows=480)
    dami.attach(model, training)
    return found


def unlabelled(known: Subject, count: int) -> list[Any]:
    """Returns some of the questions for estimators, without their answers."""
    return [question.question for question in spread(known.unseen.questions, count)]
