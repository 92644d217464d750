"""Runs a study: the pair and its controls answer in every setting, and texts are read.

All λ and all ablations of a question are rows of one mixed batch, both for answering and for reading texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dami.evaluation.study.answers import Trial, answer
from dami.evaluation.study.controls import PERMUTED, check_tokens, control_pair
from dami.evaluation.study.reading import TeacherForced, read_texts
from dami.evaluation.study.results import Study, ablations, path_result
from dami.evaluation.study.settings import Setting, model_parts
from dami.evaluation.tasks import TO_STUDY, Task, check_distinct, check_enough

Progress = Callable[[str, int, int], None]  # (current step, amount done, total)

ENDS = (0.0, 1.0)
ENDS_OF_TEXTS = {"instruct": "0", "thinking": "1"}  # setting whose answers are the texts, by kind
PATH = tuple(tenth / 10 for tenth in range(-2, 13))


def study(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    directory: str | Path,
    *,
    controls: Sequence[str] = (),
    intensities: Sequence[float] = PATH,
    rows: int = 256,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
    **options: Any,
) -> Study:
    """Studies a pair on a task. Saves answers in `directory`, from which an interrupted run resumes.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        task: questions and verifier.
        directory: where answers are saved; created if missing.
        controls: "permuted", the thinking end with permuted neurons and heads, or other checkpoints of the same
            architecture and tokens, by directory or hub name.
        intensities: λ of the paths, including 0 and 1.
        rows: the most rows in a batch of answers; at least the number of λ and ablations together.
        seed: of the permutations, and of the sampling if `options` enable it.
        progress: called with the current step and its progress.
        options: options of `model.generate` that are in `dami.generation.pieces.KNOWN`.

    Raises:
        ValueError: λ lack 0 or 1; λ or controls are not distinct; there are fewer than 4 questions; a control
            cannot be loaded or does not match the pair; the directory's answers belong to a run with other settings.
    """
    lams = tuple(sorted(float(lam) for lam in intensities))
    check_distinct(lams, ENDS)
    if len(set(controls)) < len(controls):
        raise ValueError(f"controls must be distinct, got {list(controls)}")
    check_enough(task, TO_STUDY)
    for control in set(controls) - {PERMUTED}:
        check_tokens(tokenizer, control)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    run = _Run(tokenizer, task, directory, rows, seed, progress, options)

    path = [Setting(lam) for lam in lams]
    settings = [*path, *(Setting(end, part) for end in ENDS for part in model_parts(model))]
    trials = run.answers(model, settings, "pair")
    texts = run.texts(trials)
    reading = run.readings(model, texts, settings, "pair")
    results, permuted = {}, []
    for control in controls:
        name = PERMUTED if control == PERMUTED else "control-" + re.sub(r"[^\w.-]+", "-", control).strip("-.")
        other, permuted_now = control_pair(model, tokenizer, control, task, seed)
        permuted += permuted_now
        answered, read = run.answers(other, path, name), run.readings(other, texts, path, name)
        del other
        results[control] = path_result(lams, answered, read, run.stage(f"{name}: layers"))
    pair = path_result(lams, trials, reading, run.stage("pair: layers"))
    return Study(task.name, len(task.questions), pair, results, permuted, ablations(settings, trials, reading))


@dataclass(frozen=True)
class _Run:
    """Inputs shared by all models of a study."""

    tokenizer: PreTrainedTokenizerBase
    task: Task
    directory: Path
    rows: int
    seed: int
    progress: Progress
    options: Mapping[str, Any]

    def stage(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(name, done, total)

    def answers(self, model: PreTrainedModel, settings: Sequence[Setting], name: str) -> list[Trial]:
        """Answers every question in every setting, and saves the answers in a file of the given name."""
        told, count = self.stage(f"{name}: answers"), len(self.task.questions)
        return answer(
            model, self.tokenizer, self.task, settings, self.directory / f"{name}.jsonl", rows=self.rows,
            seed=self.seed, on_batch=lambda done: told(done, count), **self.options,
        )  # fmt: skip

    def texts(self, trials: Sequence[Trial]) -> dict[str, list[str]]:
        """Returns the texts to read after each question, by kind: the right answer, and each end's own output."""
        ends = {kind: [trial.said for trial in trials if trial.setting == end] for kind, end in ENDS_OF_TEXTS.items()}
        end_token = self.tokenizer.eos_token or ""
        return {"answer": [question.answer + end_token for question in self.task.questions], **ends}

    def readings(
        self, model: PreTrainedModel, texts: Mapping[str, Sequence[str]], settings: Sequence[Setting], name: str
    ) -> TeacherForced:
        told, count = self.stage(f"{name}: reading"), len(self.task.questions)
        return read_texts(model, self.tokenizer, self.task, texts, settings, lambda done: told(done, count))
