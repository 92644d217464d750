"""Chooses λ by preference: learns a utility of every λ for every prompt from which of two λ did better on it.

For a question answered at two λ, the preferred λ is the one of higher worth, score − price · tokens: the more accurate
one or, if both are equally accurate, the cheaper. The utility has the same form:
u(q, λ) = gain(q, λ) − price · cost(q, λ). A small network computes gain and cost from the instruct end's features of
the prompt. It is fitted at all prices at once, by the Bradley–Terry likelihood of the preferences. Each preference is
weighted by the difference in worth: only with that weight is the λ that is likelier to be preferred also worth more on
average. The price stays adjustable when λ is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dami.estimators.features import middle_and_last, prompt_states, trial_signals
from dami.estimators.priced import PricedEstimator
from dami.estimators.registry import register_estimator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEGREE = 3  # of the utility in λ: enough for all shapes seen so far, and smooth enough that nearby λ share data
PRICES = (0.005, 2.0)  # range of prices that utilities are fitted at, sampled log-uniformly
WIDTH, EPOCHS, BATCH, RATE, DECAY, DROPOUT = 64, 60, 256, 2e-3, 1e-2, 0.2
SHARPNESS = 4.0  # of the likelihood: gives utilities the scale of scores


@dataclass(frozen=True)
class Features:
    """Which features of a prompt are used.

    Attributes:
        layers: layers whose states at the prompt's last token are used, as in `prompt_states`; one pass at λ=0.
        trial: maximum length of a trial answer, whose `signals` are used too; 0 for none.
    """

    layers: tuple[int, ...]
    trial: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel, trial: int = 0) -> Features:
        """Uses the layers of `middle_and_last`."""
        return cls(middle_and_last(model), trial)

    def __call__(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the features, float32 [B, features] on the CPU."""
        found = [prompt_states(model, batch, self.layers)]
        if self.trial:
            found.append(trial_signals(model, batch, self.trial))
        return torch.cat(found, 1)


@register_estimator("preference")
@dataclass(frozen=True, eq=False)
class PreferenceEstimator(PricedEstimator):
    """Chooses the λ of the greatest utility for each prompt, as learned from preferences.

    Attributes as in `PricedEstimator`; the weights are those of a small network.
    """

    features: Features

    @property
    def takes_cache(self) -> bool:
        """Whether it goes on from a cache, as `Estimator` says: not if it generates a trial answer."""
        return not self.features.trial

    @classmethod
    def reader(cls, settings: Mapping[str, Any]) -> Features:
        """Returns the features with these settings, as read from JSON."""
        return Features(tuple(settings["layers"]), settings["trial"])

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose states `choose` takes, as `Estimator` says; none if it needs a trial answer, too."""
        return () if self.features.trial else self.features.layers

    def gain_and_cost(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Computes gain and cost of every λ with the network."""
        return _network(self.weights, features, torch.tensor(self.intensities, dtype=torch.float32))


def fit(
    features: Tensor,
    scores: NDArray[np.float64],
    tokens: NDArray[np.float64],
    intensities: Sequence[float],
    seed: int = 0,
) -> dict[str, Tensor]:
    """Fits the weights of a `PreferenceEstimator` to answers to Q questions at L λ, and returns them.

    Minimises Σ |w_a − w_b| · softplus(−sign(w_a − w_b) · s (u_a − u_b)) over questions, pairs (a, b) of λ and prices,
    where w is the worth of an answer and u its utility, both at that price.

    Args:
        features: float32 [Q, F].
        scores: [Q, L], in [0, 1].
        tokens: [Q, L].
        intensities: L λ, at least two.
        seed: seed of all randomness in the fit; the state of torch's own generator does not change.

    Raises:
        ValueError: the sizes do not agree, or there are fewer than two λ.
    """
    shape = (len(features), len(intensities))
    if shape[1] < 2 or scores.shape != shape or tokens.shape != shape:
        raise ValueError(
            f"scores and tokens must be [{shape[0]} questions, 2 λ or more], as features and intensities, got "
            f"{list(scores.shape)} and {list(tokens.shape)} for {shape[1]} intensities"
        )
    right = torch.tensor(scores, dtype=torch.float32)
    cost = torch.tensor(tokens / tokens[:, int(np.argmax(intensities))].mean(), dtype=torch.float32)
    lams = torch.tensor(intensities, dtype=torch.float32)
    low, high = map(math.log, PRICES)
    with torch.random.fork_rng(devices=()), torch.enable_grad():
        torch.manual_seed(seed)
        hidden = nn.Linear(features.shape[1], WIDTH, dtype=torch.float32)
        out = nn.Linear(WIDTH, 2 * DEGREE, dtype=torch.float32)
        trained = {
            "hidden.weight": hidden.weight, "hidden.bias": hidden.bias, "out.weight": out.weight, "out.bias": out.bias,
        }  # fmt: skip
        scaling = {"mean": features.mean(0), "scale": features.std(0) + 1e-6}
        optimizer = torch.optim.AdamW(trained.values(), weight_decay=DECAY)
        batches = -(-len(features) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * batches)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(features)).chunk(batches):
                price = torch.empty(len(rows), 1, dtype=torch.float32).uniform_(low, high).exp()
                gained, spent = _network({**trained, **scaling}, features[rows], lams, DROPOUT)
                worth = _differences(right[rows] - price * cost[rows])
                utility = _differences(gained - price * spent)
                loss = (worth.abs() * F.softplus(-worth.sign() * SHARPNESS * utility)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return {name: weight.detach() for name, weight in {**trained, **scaling}.items()}


def _network(
    weights: Mapping[str, Tensor], features: Tensor, lams: Tensor, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns gain and cost, [B, L] each: polynomials in λ without constant, with coefficients from a small MLP."""
    hidden = F.linear((features - weights["mean"]) / weights["scale"], weights["hidden.weight"], weights["hidden.bias"])
    hidden = F.dropout(F.gelu(hidden), dropout, training=dropout > 0)
    coefficients = F.linear(hidden, weights["out.weight"], weights["out.bias"]).unflatten(1, (2, DEGREE))
    powers = lams ** torch.arange(1, DEGREE + 1)[:, None]
    gain, cost = (coefficients @ powers).unbind(1)
    return gain, cost


def _differences(values: Tensor) -> Tensor:
    """Returns all pairwise differences, [B, L] → [B, L, L]."""
    return values[:, :, None] - values[:, None]
