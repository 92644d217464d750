"""Ways to answer a question, which differ in λ of the prompt, of the thought and of the answer.

All ways of a question are answered in one batch, in which what they read at one λ is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dami.callers import TURN
from dami.chat import Answer, ChatTemplate, answers_of, encode, last_turns
from dami.evaluation.journal import answered_batches, run_settings
from dami.evaluation.sweeps import Record, record_of
from dami.evaluation.tasks import Task
from dami.generation.pieces import generate_in_pieces
from dami.prompts import Prompt
from dami.schedules import Schedule, switch_after
from dami.thoughts import Reader, tags_of

WHOLE = 1 << 30  # a tail that no prompt is longer than


@dataclass(frozen=True)
class Way:
    """A way to answer.

    Attributes:
        thought: λ until the thought has ended, and of the prompt's tail.
        answer: λ after that; None for that of the thought.
        prompt: λ of the prompt before its tail; None for that of the thought, as in a merged model.
        tail: `prompt_tail`, or "turn".
        parts: λ of parts of the model in thought and answer, by group or pattern.
    """

    thought: float
    answer: float | None = None
    prompt: float | None = None
    tail: int | str = 1
    parts: tuple[tuple[str, float], ...] = ()

    @property
    def is_static(self) -> bool:
        """Whether there is only one λ."""
        return self.answer is None and self.prompt is None and not self.parts

    @property
    def name(self) -> str:
        """All that differs from one λ for everything, in words."""
        said = [f"λ={self.thought:g}"]
        if self.answer is not None:
            said.append(f"answer {self.answer:g}")
        if self.prompt is not None:
            said.append(f"prompt {self.prompt:g}" + (f" but {self.tail}" if self.tail != 1 else ""))
        return ", ".join([*said, *(f"{part} {lam:g}" for part, lam in self.parts)])

    def arguments(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Returns the keyword arguments with which `generate` answers so."""
        one = _lam(self, end_of_thought(tokenizer))
        reading = {} if self.prompt is None else {"prompt_intensity": self.prompt, "prompt_tail": self.tail}
        return {"intensity": {"*": one, **dict(self.parts)} if self.parts else one, **reading}


@cache
def _switch(ids: tuple[int, ...], thought: float, answer: float) -> Schedule:
    return switch_after(ids, thought, answer)


def _lam(way: Way, end: tuple[int, ...]) -> float | Schedule:
    """Returns λ over the steps: one schedule for all ways alike, so that it is asked once for all their rows."""
    return way.thought if way.answer in (None, way.thought) else _switch(end, way.thought, way.answer or 0.0)


def end_of_thought(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the tokens of the tag that ends a thought."""
    return tuple(tokenizer.encode(tags_of(tokenizer).ends[-1], add_special_tokens=False))


def ask_in(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    ways: Sequence[Way],
    chat_template: ChatTemplate | None = "default",
    **options: Any,
) -> list[Answer]:
    """Answers prompts in one batch, each in its way.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        prompts, ways: one per row.
        chat_template: as in `dami.chat.render`, but independent of λ.
        options: options of `generate_in_pieces`.
    """
    end = end_of_thought(tokenizer)
    lams = [_lam(way, end) for way in ways]
    parts = list(dict.fromkeys(part for way in ways for part, _ in way.parts))
    of_parts = {part: [dict(way.parts).get(part, lam) for way, lam in zip(ways, lams, strict=True)] for part in parts}
    turns = last_turns(tokenizer, prompts, chat_template) if any(way.tail == TURN for way in ways) else [0] * len(ways)
    reading = [_reading(way, turn) for way, turn in zip(ways, turns, strict=True)]
    with torch.inference_mode():
        texts, batch = encode(tokenizer, prompts, chat_template)
        ids = generate_in_pieces(
            model,
            {name: tensor.to(model.device) for name, tensor in batch.items()},
            {"*": lams, **of_parts} if parts else lams,
            prompt_intensity=[lam for lam, _ in reading],
            prompt_tail=[tail for _, tail in reading],
            **options,
        )
    return answers_of(model, Reader.of(tokenizer), ids.cpu(), prompts, [way.thought for way in ways], texts)


def _reading(way: Way, turn: int) -> tuple[float, int]:
    """Returns λ of the prompt, and the tail; in a way without the one, what comes to the same."""
    if way.prompt is None:
        return (0.0, WHOLE) if way.parts else (way.thought, 1)
    return way.prompt, turn if isinstance(way.tail, str) else way.tail


def answer_in(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    ways: Mapping[int, Way],
    questions: Sequence[int],
    path: Path,
    *,
    samples: int = 1,
    rows: int = 64,
    seed: int = 0,
    on_batch: Callable[[list[Record]], None] = lambda records: None,
    **options: Any,
) -> list[Record]:
    """Answers questions in several ways, all ways of a question in one batch, as `dami.evaluation.sweep` does at λ.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        task: questions and verifier.
        ways: by their number, which a record has in place of λ.
        questions: indices of the questions to ask.
        path: a file of JSON lines, from which an interrupted run resumes.
        samples, rows, seed, on_batch: as in `sweep`.
        options: passed to `ask_in`.

    Raises:
        ValueError: the file belongs to a run with another pair or other settings, which the message names.
    """
    units = [(index, sample) for index in questions for sample in range(samples)]
    step = max(1, rows // len(ways))
    batches = [
        [(*unit, number) for unit in units[start : start + step] for number in ways]
        for start in range(0, len(units), step)
    ]
    settings = run_settings(model, task, rows, seed, options)
    settings |= {"ways": {str(number): way.name for number, way in ways.items()}, "samples": samples}
    settings |= {"asked": list(questions)}

    def answer(asked: Sequence[tuple[int, int, int]]) -> list[Record]:
        prompts = [task.questions[index].question for index, _, _ in asked]
        answers = ask_in(model, tokenizer, prompts, [ways[number] for _, _, number in asked], **options)
        return [
            record_of(task, (index, sample, float(number)), said)
            for (index, sample, number), said in zip(asked, answers, strict=True)
        ]

    records: list[Record] = []
    for news in answered_batches(Record, batches, answer, path, settings):
        records += news
        on_batch(news)
    return records
