"""`calibrate`: finds out without labels which λ of a pair are usable, and which of them a prompt deserves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dami.chat import ChatTemplate
from dami.dial.patch import Estimator
from dami.estimators import StaticIntensity
from dami.estimators.calibrated import CalibratedEstimator, Fitted, Signature, fit
from dami.estimators.files import StoredIntensity
from dami.evaluation.consensus import COMPARABLE, agreed, check_comparable
from dami.evaluation.frontier import Frontier, Point
from dami.evaluation.presets import presets_of
from dami.evaluation.sweeps import Record, sweep
from dami.evaluation.tasks import TO_TRAIN, Question, Task, check_distinct, check_enough
from dami.evaluation.training import PRICES, features_of
from dami.files import write_text
from dami.prompts import Prompt, as_prompts

WHOLE = 0.8  # least share of complete answers at a usable λ, relative to that of the best λ


@dataclass
class Unlabelled:
    """Prompts as a task: answers to them cannot be scored."""

    questions: list[Question]
    name: str = "prompts"

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> Unlabelled:
        """Returns a task of prompts."""
        return cls([Question(prompt, "") for prompt in as_prompts(prompts)])

    def score(self, index: int, text: str) -> float:
        return 0.0


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a calibration found.

    Attributes:
        stored: the estimator as saved, and presets.
        points: every λ that was tried; the accuracy of a point is the agreement with what most answers say.
        usable: the λ at which answers come to their end.
    """

    stored: StoredIntensity
    points: tuple[Point, ...]
    usable: tuple[float, ...]


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    directory: str | Path,
    intensities: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    *,
    signals: Sequence[str] = ("states",),
    trial: int = 8,
    samples: int = 4,
    compare: str = "word",
    price: float = 0.2,
    rows: int = 64,
    seed: int = 0,
    on_batch: Callable[[list[Record]], None] = lambda records: None,
    **options: Any,
) -> Calibration:
    """Answers prompts at several λ, and fits a `CalibratedEstimator` to what the answers say of each other.

    Saves answers to `records.jsonl` in the directory batch by batch, and resumes an interrupted run from there.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        prompts: like those that the estimator will see. 50 to 200 are recommended, and at least 20 are required.
        directory: where the estimator is saved. Load it with `dami.attach(model, directory)`.
        intensities: λ to try.
        signals: what the estimator reads of a prompt, names of `dami.estimators.signals.SIGNALS`. With "states" alone,
            it generates nothing and goes on from a prompt that has been read at λ=0.
        trial: tokens of the trial answer that some signals need.
        samples: number of answers to a prompt at each λ.
        compare: how two answers are compared, a name of `dami.evaluation.consensus.COMPARABLE`.
        price: see `PricedEstimator`.
        rows, seed, on_batch, options: as in `sweep`.

    Raises:
        ValueError: there are fewer than 20 prompts, or fewer than 20 with answers that agree; a name is unknown; or as
            in `sweep`.
    """
    check_comparable(compare)
    check_distinct(intensities)
    signature, task = Signature(tuple(signals), trial), Unlabelled.of(prompts)
    check_enough(task, TO_TRAIN)
    records = sweep(
        model, tokenizer, task, intensities,
        path=Path(directory) / "records.jsonl", samples=samples, rows=rows, seed=seed, on_batch=on_batch, **options,
    )  # fmt: skip
    frontier, points = agreement_of(records, compare)
    comparable = int((frontier.scores.max(1) > 0).sum())
    if comparable < TO_TRAIN:
        raise ValueError(
            f"answers must agree on at least {TO_TRAIN} prompts, compared by {compare!r}, got {comparable} of "
            f"{len(prompts)}: ask prompts with short answers, or take more samples"
        )
    estimator: Estimator = StaticIntensity(frontier.intensities[0])
    if len(frontier.intensities) > 1:
        template = options.get("chat_template", "default")
        read = signals_of(model, tokenizer, task, signature, rows, template)
        estimator = fitted_to(frontier, read, signature, price)
    stored = StoredIntensity(estimator, presets_of(frontier))
    stored.save(directory)
    told = {"prompts": len(prompts), "usable": frontier.intensities, "points": [asdict(point) for point in points]}
    write_text(Path(directory) / "calibration.json", json.dumps(told, indent=1) + "\n")
    return Calibration(stored, points, frontier.intensities)


def agreement_of(records: Sequence[Record], compare: str) -> tuple[Frontier, tuple[Point, ...]]:
    """Returns how far the answers at the usable λ agree with what most of these say, and a point for every λ.

    A λ is usable if nearly as many answers come to their end as at the best λ.
    """
    found = Frontier.of(records)
    whole = found.well_formed.mean(0)
    usable = [lam for lam, share in zip(found.intensities, whole, strict=True) if share >= WHOLE * whole.max()]
    scored = agreed(records, COMPARABLE[compare], usable)
    points = Frontier.of(scored).points
    return Frontier.of([record for record in scored if record.intensity in usable]), tuple(points)


def signals_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    signature: Signature,
    rows: int = 64,
    chat_template: ChatTemplate | None = "default",
) -> list[Tensor]:
    """Returns the signals of all questions of a task by kind, float32 [questions, features of the kind] each."""
    kinds = [replace(signature, names=(name,)) for name in signature.names]
    return [features_of(model, tokenizer, task, kind, rows, chat_template) for kind in kinds]


def fitted_to(frontier: Frontier, read: Sequence[Tensor], signature: Signature, price: float) -> CalibratedEstimator:
    """Fits an estimator to a frontier of agreement. Its budgets are those of prompts left out of the fit."""
    fitted = fit(read, frontier.scores, frontier.tokens)
    budgets = {each: _tokens(frontier, fitted, each) for each in PRICES}
    return CalibratedEstimator(frontier.intensities, signature, fitted.weights, price, budgets)


def _tokens(frontier: Frontier, fitted: Fitted, price: float) -> float:
    chosen = fitted.choose(price)
    return float(frontier.tokens[np.arange(len(chosen)), chosen].mean())
