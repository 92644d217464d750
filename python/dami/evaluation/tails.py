"""Measures how much of a prompt must be read at the λ of the answer: accuracy and tokens over `prompt_tail`.

Every question is answered at every λ, with its whole prompt at that λ and with its beginning at another. A tail costs
nothing if two things stay. One is the frontier of the answers, measured by the worth of the best λ, accuracy − price ·
tokens, averaged over prices: λ may mean less behind a prompt at another λ, which alone is no loss. The other is the
accuracy at the λ farthest from the prompt's: no other λ can make up for what is lost there, and a λ chosen per query
goes there, even if the best single λ is the prompt's own, behind which a tail changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dami.callers import TURN
from dami.dial.patch import patch_of
from dami.estimators.files import StoredIntensity
from dami.evaluation.frontier import Frontier
from dami.evaluation.statistics import Array, Interval
from dami.evaluation.sweeps import Record
from dami.evaluation.tasks import TO_EVALUATE, Task, check_distinct, check_enough
from dami.evaluation.ways import Way, answer_in
from dami.files import write_text

TAILS = (1, 8, TURN)
INTENSITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
PRICES = (0.0, 0.1, 0.2, 0.5, 1.0)  # accuracy that as many tokens as those of the costliest λ must bring
NOTHING = 0.01  # a loss of this much, if its interval reaches 0


@dataclass(frozen=True)
class TailPoint:
    """A λ with a tail; tail None is the whole prompt at that λ."""

    tail: int | str | None
    intensity: float
    accuracy: Interval
    tokens: Interval


class Loss(NamedTuple):
    """What a tail costs; negative if it gains.

    Attributes:
        worth: of the best λ.
        accuracy: at the λ farthest from the prompt's.
    """

    worth: Interval
    accuracy: Interval

    @property
    def is_nothing(self) -> bool:
        """Whether neither is lost: at most a hundredth, with an interval that reaches 0."""
        return all(lost.value <= NOTHING and lost.low <= 0 for lost in self)


@dataclass(frozen=True)
class Tails:
    """What tails cost.

    Attributes:
        prompt_intensity: λ of the prompts before their tails.
        points: accuracy and tokens at every tail and λ, those of whole prompts first.
        losses: what each tail loses.
        least: the least number of tokens that costs nothing; None if none of those measured does.
        questions: their number.
    """

    prompt_intensity: float
    points: Sequence[TailPoint]
    losses: Mapping[int | str, Loss]
    least: int | None
    questions: int

    def to_json(self) -> dict[str, Any]:
        """Returns the contents of `tails.json`."""
        losses = {str(tail): {"worth": loss.worth, "accuracy": loss.accuracy} for tail, loss in self.losses.items()}
        return {**asdict(self), "points": [asdict(point) for point in self.points], "losses": losses}


def measure_tails(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    directory: str | Path,
    tails: Sequence[int | str] = TAILS,
    intensities: Sequence[float] = INTENSITIES,
    *,
    prompt_intensity: float = 0.0,
    samples: int = 1,
    rows: int = 64,
    seed: int = 0,
    on_batch: Callable[[list[Record]], None] = lambda records: None,
    **options: Any,
) -> Tails:
    """Measures tails on a task's questions, and saves the result with the pair's estimator and presets to a directory.

    `dami.attach(model, directory)` takes it from there, and `model.dami.prompt_tail` tells it. Answers are saved to
    `tails.jsonl` batch by batch, from which an interrupted run resumes.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        task: questions and verifier.
        directory: created if missing.
        tails: numbers of tokens, or "turn": from the text of the last user message on.
        intensities: distinct λ of the answers.
        prompt_intensity: λ of the prompts before their tails.
        samples, rows, seed, on_batch, options: as in `dami.evaluation.ways.answer_in`.

    Raises:
        TypeError, ValueError: an argument is wrong, which the message names; or as in `answer_in`.
    """
    check_enough(task, TO_EVALUATE)
    check_distinct(intensities)
    if not tails or len(set(tails)) < len(tails) or not all(_is_tail(tail) for tail in tails):
        raise ValueError(f"tails must be distinct positive numbers of tokens, or 'turn', got {list(tails)}")
    static = [Way(lam) for lam in intensities]
    ways = static + [Way(lam, None, prompt_intensity, tail) for tail in tails for lam in intensities]
    asked = {number: way for number, way in enumerate(ways) if way.prompt != way.thought}  # else as a static one
    directory = Path(directory)
    records = answer_in(
        model, tokenizer, task, asked, range(len(task.questions)), directory / "tails.jsonl",
        samples=samples, rows=rows, seed=seed, on_batch=on_batch, **options,
    )  # fmt: skip
    found = tails_of(Frontier.of(records, seed), tails, intensities, prompt_intensity)
    write_text(directory / "tails.json", json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n")
    patch = patch_of(model)
    frontier = {**patch.frontier, "prompt tails": found.to_json()}
    StoredIntensity(patch.estimator, patch.presets, frontier, found.least).save(directory)
    return found


def _is_tail(tail: Any) -> bool:
    return tail == TURN or (isinstance(tail, int) and not isinstance(tail, bool) and tail > 0)


def tails_of(
    frontier: Frontier, tails: Sequence[int | str], intensities: Sequence[float], prompt_intensity: float
) -> Tails:
    """Compares tails on the answers of `measure_tails`, whose ways a frontier has in place of λ."""
    column = {int(number): place for place, number in enumerate(frontier.intensities)}
    count = len(intensities)
    columns = {
        tail: [
            column.get((row + 1) * count + place, column[place])  # with the prompt's own λ: that of the whole prompt
            for place in range(count)
        ]
        for row, tail in enumerate(tails)
    }
    whole = [column[place] for place in range(count)]
    points = [
        TailPoint(tail, lam, frontier.points[at].accuracy, frontier.points[at].tokens)
        for tail, ats in ({None: whole} | columns).items()
        for lam, at in zip(intensities, ats, strict=True)
    ]

    farthest = int(np.argmax(np.abs(np.array(intensities) - prompt_intensity)))

    def losses(scores: Array, tokens: Array) -> Array:
        prices = np.array(PRICES)[:, None] / tokens[whole].max()

        def kept(at: Sequence[int]) -> Array:
            return np.array([(scores[at] - prices * tokens[at]).max(1).mean(), scores[at[farthest]]])

        return np.concatenate([kept(whole) - kept(columns[tail]) for tail in tails])

    found = frontier.interval(losses)
    lost = dict(zip(tails, map(Loss, found[::2], found[1::2]), strict=True))
    free = [tail for tail, loss in lost.items() if isinstance(tail, int) and loss.is_nothing]
    return Tails(prompt_intensity, points, lost, min(free, default=None), len(frontier))
