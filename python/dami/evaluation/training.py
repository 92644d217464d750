"""`train_estimator`: trains an estimator of λ on questions with verifiers, measures it and saves it to a directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dami.chat import ChatTemplate, encode
from dami.dial.patch import patch_of
from dami.estimators.files import StoredIntensity
from dami.estimators.preference import Features, PreferenceEstimator, fit
from dami.estimators.priced import Reader
from dami.evaluation.findings import Findings
from dami.evaluation.frontier import Frontier
from dami.evaluation.policies import Outcome, play
from dami.evaluation.presets import presets_of
from dami.evaluation.sweeps import Record, sweep
from dami.evaluation.tasks import TO_TRAIN, Task, check_distinct, check_enough

PRICES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0)
CHOICES = 21  # number of λ that an estimator chooses from, evenly spaced over the range it was fitted to


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained estimator and its measured results.

    Attributes:
        stored: the estimator as saved.
        outcomes: results on the held-out questions, by price.
        held_out: number of these questions.
    """

    stored: StoredIntensity
    outcomes: Mapping[float, Outcome]
    held_out: int


def train_estimator(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
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
    """Answers a task's questions at several λ, fits a `PreferenceEstimator` to the answers, and measures it.

    Saves answers to `records.jsonl` in the directory batch by batch, and resumes an interrupted run from there. A share
    of the questions is held out from the fit. The estimator is measured on these at every price, which determines the
    budgets for `within`. Presets use all questions.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        task: questions like those that the estimator will see, with a verifier. About a thousand are recommended, and
            at least 20 are required.
        directory: where the estimator is saved. Load it with `dami.attach(model, directory)`.
        intensities: λ to answer at. With two, the estimator is a router between them.
        samples: number of answers to a question at each λ.
        trial: tokens of a trial answer whose confidence is a feature too; 0 to use the prompt's states only.
        price: see `PreferenceEstimator`.
        held_out: share of the questions to hold out.
        rows, seed, on_batch, options: as in `sweep`.

    Raises:
        ValueError: there are fewer than 20 questions, or the held-out or fitted share is empty; or as in `sweep`.
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
    estimator, outcomes = _fitted(frontier, features, held, PreferenceEstimator((), read, {}, price), seed)
    about = {"task": task.name, **Findings.of(frontier).to_json(), "estimator, on questions held out": {
        str(p): asdict(outcome) for p, outcome in outcomes.items()
    }}  # fmt: skip
    stored = StoredIntensity(estimator, presets_of(frontier), about, patch_of(model).prompt_tail)
    stored.save(directory)
    return Trained(stored, outcomes, int(held.sum()))


def _fitted(
    frontier: Frontier, features: Tensor, held: NDArray[np.bool_], empty: PreferenceEstimator, seed: int
) -> tuple[PreferenceEstimator, dict[float, Outcome]]:
    """Fits an estimator to the questions that are not held out. Also returns its results on the others, by price."""
    lams = frontier.intensities
    fitted = frontier.select(np.flatnonzero(~held))
    weights = fit(features[torch.tensor(~held)], fitted.scores, fitted.tokens, lams, seed)
    choices = lams if len(lams) == 2 else tuple(np.linspace(lams[0], lams[-1], CHOICES).round(6).tolist())
    estimator = replace(empty, intensities=choices, weights=weights)
    measured, unseen = frontier.select(np.flatnonzero(held)), features[torch.tensor(held)]
    outcomes = {p: play(measured, estimator.at(p).choose(unseen).double().numpy().round(6)) for p in PRICES}
    return replace(estimator, budgets={p: outcome.tokens.value for p, outcome in outcomes.items()}), outcomes


@torch.no_grad()
def features_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    read: Reader,
    rows: int = 64,
    chat_template: ChatTemplate | None = "default",
) -> Tensor:
    """Returns the features of all questions of a task, float32 [questions, F] on the CPU."""
    prompts = [question.question for question in task.questions]
    template = chat_template if chat_template is None or isinstance(chat_template, str) else "instruct"
    found = []
    for start in range(0, len(prompts), rows):
        _, batch = encode(tokenizer, prompts[start : start + rows], template)
        found.append(read(model, {name: tensor.to(model.device) for name, tensor in batch.items()}))
    return torch.cat(found)
