"""`train_estimator`: from questions with verifiers to an estimator of λ, measured, in a directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dami.chat import encode
from dami.estimators.files import StoredIntensity
from dami.estimators.preference import Features, PreferenceEstimator, fit
from dami.evaluation.frontier import Frontier
from dami.evaluation.policies import Outcome, play
from dami.evaluation.presets import presets_of
from dami.evaluation.report import summary
from dami.evaluation.sweeps import Record, sweep
from dami.evaluation.tasks import TO_TRAIN, Task, check_distinct, check_enough

PRICES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0)
CHOICES = 21  # λ that an estimator chooses from, evenly from the least to the greatest it was fitted to


@dataclass(frozen=True, eq=False)
class Trained:
    """An estimator and what it is worth.

    Attributes:
        stored: what was written.
        outcomes: on the questions held out from the fit, by price.
    """

    stored: StoredIntensity
    outcomes: Mapping[float, Outcome]


def train_estimator(
    model: Any,
    tokenizer: Any,
    task: Task,
    directory: str | Path,
    intensities: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    *,
    samples: int = 2,
    trial: int = 0,
    price: float = 0.2,
    held_out: float = 0.25,
    rows: int = 64,
    seed: int = 0,
    on_batch: Callable[[list[Record]], None] = lambda records: None,
    **options: Any,
) -> Trained:
    """Answers the questions of a task at several λ, fits a `PreferenceEstimator` to the answers, and measures it.

    The answers go to `records.jsonl` in the directory as they come, and a run that was interrupted goes on from there.
    Of the questions a share is held out from the fit; on those the estimator is measured at every price, which gives
    it the budgets that `within` knows. Presets come from all questions.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        task: questions like those that the estimator will be asked about, with a verifier; a thousand is a good number,
            20 the least.
        directory: where the estimator goes; `dami.attach(model, directory)` takes it from there.
        intensities: λ to answer at. With two, the estimator is a router between these.
        samples: answers to a question at one λ.
        trial: tokens of a trial answer whose confidence is read too; 0 for the prompt's states only.
        price: see `PreferenceEstimator`.
        held_out: share of the questions.
        rows, seed, on_batch, options: as in `sweep`.

    Raises:
        ValueError: fewer than 20 questions, or none on either side of those held out; or as `sweep`.
    """
    check_enough(task, TO_TRAIN)
    check_distinct(intensities)
    count = len(task.questions)
    held = np.random.default_rng(seed).permutation(count) < held_out * count
    if not 0 < held.sum() < count:
        raise ValueError(f"held_out must leave questions on either side, got {held_out} of {count}")
    records = sweep(
        model, tokenizer, task, intensities,
        path=Path(directory) / "records.jsonl", samples=samples, rows=rows, seed=seed, on_batch=on_batch, **options,
    )  # fmt: skip
    frontier = Frontier.of(records)
    read = Features.of(model, trial)
    features = features_of(model, tokenizer, task, read, rows, options.get("chat_template", "default"))

    fitted = frontier.select(np.flatnonzero(~held))
    weights = fit(features[torch.tensor(~held)], fitted.scores, fitted.tokens, frontier.intensities, seed)
    lams = np.linspace(frontier.intensities[0], frontier.intensities[-1], CHOICES).round(6).tolist()
    choices = frontier.intensities if len(intensities) == 2 else tuple(lams)
    estimator = PreferenceEstimator(choices, read, weights, price)
    measured, unseen = frontier.select(np.flatnonzero(held)), features[torch.tensor(held)]
    outcomes = {p: play(measured, estimator.at(p).choose(unseen).double().numpy().round(6)) for p in PRICES}
    budgets = {p: outcome.tokens.value for p, outcome in outcomes.items()}
    estimator = replace(estimator, budgets=budgets)
    about = {"task": task.name, **summary(frontier), "estimator, on questions held out": {
        str(p): asdict(outcome) for p, outcome in outcomes.items()
    }}  # fmt: skip
    stored = StoredIntensity(estimator, presets_of(frontier), about)
    stored.save(directory)
    return Trained(stored, outcomes)


@torch.no_grad()
def features_of(
    model: Any, tokenizer: Any, task: Task, read: Features, rows: int = 64, chat_template: Any = "default"
) -> Tensor:
    """The features of all questions of a task, float32 [questions, F] on the CPU."""
    prompts = [question.question for question in task.questions]
    template = chat_template if chat_template is None or isinstance(chat_template, str) else "instruct"
    found = []
    for start in range(0, len(prompts), rows):
        _, batch = encode(tokenizer, prompts[start : start + rows], template)
        found.append(read(model, {name: tensor.to(model.device) for name, tensor in batch.items()}))
    return torch.cat(found)
