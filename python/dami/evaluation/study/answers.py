"""The answers of a pair in every setting of the study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dami.chat import answers_of, encode
from dami.evaluation.journal import answered_batches, run_settings
from dami.evaluation.study.settings import Setting, row_intensities
from dami.evaluation.tasks import Task
from dami.generation.pieces import generate_in_pieces
from dami.thoughts import Reader


@dataclass(frozen=True)
class Trial:
    """One answer.

    Attributes:
        index: the question's index.
        setting: the setting's name.
        score: from 0 to 1.
        tokens: number of generated tokens, including thought and end token.
        thought: whether there is a thought.
        well_formed: whether there is an answer and it is complete.
        said: the whole output, including special tokens.
    """

    index: int
    setting: str
    score: float
    tokens: int
    thought: bool
    well_formed: bool
    said: str


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: Sequence[Setting],
    path: Path,
    *,
    rows: int = 64,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> list[Trial]:
    """Answers every question in every setting. A question's rows share a batch, and each finished batch is saved.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        task: questions and verifier.
        settings: distinct settings.
        path: a file of JSON lines, from which an interrupted run resumes.
        rows: the most rows in a batch; at least the number of settings.
        seed: of the sampling, if `options` enable it.
        on_batch: called with the number of finished questions.
        options: options of `model.generate` that are in `dami.generation.pieces.KNOWN`.
    """
    count = len(task.questions)
    step = max(1, rows // len(settings))
    batches = [
        [(index, setting) for index in range(start, min(start + step, count)) for setting in settings]
        for start in range(0, count, step)
    ]
    reader = Reader.of(tokenizer)

    def ask(asked: Sequence[tuple[int, Setting]]) -> list[Trial]:
        prompts = [task.questions[index].question for index, _ in asked]
        texts, inputs = encode(tokenizer, prompts)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        lams = row_intensities([setting for _, setting in asked], model)
        with torch.inference_mode():
            ids = generate_in_pieces(model, inputs, lams, **options).cpu()
        answers = answers_of(model, reader, ids, prompts, None, texts)
        return [
            Trial(
                index=index,
                setting=setting.name,
                score=task.score(index, said.text),
                tokens=said.tokens,
                thought=bool(said.thought),
                well_formed=said.finished and bool(said.text),
                said=str(tokenizer.decode(row[: said.tokens])),
            )
            for (index, setting), said, row in zip(asked, answers, ids, strict=True)
        ]

    told = run_settings(model, task, rows, seed, options) | {"settings": [each.name for each in settings]}
    trials: list[Trial] = []
    for news in answered_batches(Trial, batches, ask, path, told):
        trials += news
        on_batch(len(trials) // len(settings))
    return trials
