"""The run of a study: asks the pair and its controls in every setting, and reads the texts.

All λ and all ablations of a question are rows of one mixed batch, both where it is answered and where texts are read.
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

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much

ENDS = (0.0, 1.0)
ENDS_OF_TEXTS = {"instruct": "0", "thinking": "1"}  # whose answers they are, by the setting's name
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
    """Studies a pair on a task. Answers are kept in `directory`, and a run that was interrupted goes on with them.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        task: questions and verifier.
        directory: of the answers, made if need be.
        controls: "permuted", the thinking end with its neurons and heads in another order; or other checkpoints of the
            architecture, with the same tokens, by directory or hub name.
        intensities: λ of the paths; 0 and 1 must be among them.
        rows: of a batch of answers, at most; but no fewer than λ and ablations together.
        seed: of the permutations, and of the sampling if `options` say so.
        progress: is told what is being done.
        options: of `model.generate`, those of `dami.generation.pieces.KNOWN`.

    Raises:
        ValueError: 0 or 1 is not among the λ; λ or controls are not distinct; fewer than 4 questions; a control
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
    """What all models of a study are asked and read with."""

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
        """Of every question in every setting, kept in a file of that name."""
        told, count = self.stage(f"{name}: answers"), len(self.task.questions)
        return answer(
            model, self.tokenizer, self.task, settings, self.directory / f"{name}.jsonl", rows=self.rows,
            seed=self.seed, on_batch=lambda done: told(done, count), **self.options,
        )  # fmt: skip

    def texts(self, trials: Sequence[Trial]) -> dict[str, list[str]]:
        """What is read after each question, by kind: its right answer, and what either end said itself."""
        ends = {kind: [trial.said for trial in trials if trial.setting == end] for kind, end in ENDS_OF_TEXTS.items()}
        end_token = self.tokenizer.eos_token or ""
        return {"answer": [question.answer + end_token for question in self.task.questions], **ends}

    def readings(
        self, model: PreTrainedModel, texts: Mapping[str, Sequence[str]], settings: Sequence[Setting], name: str
    ) -> TeacherForced:
        told, count = self.stage(f"{name}: reading"), len(self.task.questions)
        return read_texts(model, self.tokenizer, self.task, texts, settings, lambda done: told(done, count))
