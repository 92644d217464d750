"""Chooses λ by a calibration without labels: learns from unlabelled prompts what signals say of the answers.

The answers to the prompts at every λ are compared with each other, and what most of them say counts as right. A ridge
regression then predicts agreement with that and tokens of every λ from the signals. `dami.evaluation.calibration` asks
the prompts; here are the estimator and its fit. With signals that say nothing, the regression predicts the same for
every prompt, and the estimator is the best static λ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dami.estimators.priced import PricedEstimator
from dami.estimators.registry import register_estimator
from dami.estimators.signals import SIGNALS, read

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array = NDArray[np.float64]
STRENGTHS = tuple(
    10.0 ** (power / 2) for power in range(-4, 9)
)  # of the ridge, per prompt; the last one ignores signals


@dataclass(frozen=True)
class Signature:
    """Which signals of a prompt are read.

    Attributes:
        names: of `SIGNALS`.
        tokens: maximum length of the trial answer that some of them need.
    """

    names: tuple[str, ...]
    tokens: int = 8

    def __post_init__(self) -> None:
        if not self.names or not set(self.names) <= set(SIGNALS):
            raise ValueError(f"names must be of {sorted(SIGNALS)}, one at least, got {list(self.names)}")
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise ValueError(f"tokens must be a positive integer, got {self.tokens!r}")

    def __call__(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the signals side by side, float32 [B, features] on the CPU."""
        return torch.cat(read(model, batch, self.names, self.tokens), 1)


@register_estimator("calibrated")
@dataclass(frozen=True, eq=False)
class CalibratedEstimator(PricedEstimator):
    """Chooses among usable λ the one of the greatest utility, by a calibration without labels.

    Attributes as in `PricedEstimator`; gain is the predicted agreement with what most answers say.
    """

    features: Signature

    @property
    def takes_cache(self) -> bool:
        """Whether it goes on from a cache, as `Estimator` says: only if no signal needs a trial answer."""
        return self.features.names == ("states",)

    @classmethod
    def reader(cls, settings: Mapping[str, Any]) -> Signature:
        """Returns the signals with these settings, as read from JSON."""
        return Signature(tuple(settings["names"]), settings["tokens"])

    def gain_and_cost(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Computes gain and cost of every λ, linear in the signals."""
        signals = (features - self.weights["mean"]) / self.weights["scale"]
        gain, cost = (signals @ self.weights["slope"] + self.weights["level"]).chunk(2, 1)
        return gain, cost


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fit.

    Attributes:
        weights: of the estimator.
        gain, cost: what is predicted for each prompt by a fit to all others, [Q, L].
    """

    weights: dict[str, Tensor]
    gain: Array
    cost: Array

    def choose(self, price: float) -> NDArray[np.int64]:
        """Returns the place of the λ chosen for each prompt by the fit to all others, [Q]."""
        return (self.gain - price * self.cost).argmax(1)


def fit(signals: Sequence[Tensor], scores: Array, tokens: Array) -> Fitted:
    """Fits the weights of a `CalibratedEstimator` to answers to Q prompts at L λ.

    Each kind of signal counts alike, however many numbers it has. The strength of the ridge is the one that predicts
    best when each prompt is left out in turn, once for the gain and once for the cost.

    Args:
        signals: of the prompts by kind, float32 [Q, features of the kind] each.
        scores: [Q, L], in [0, 1].
        tokens: [Q, L], the greatest λ last.

    Raises:
        ValueError: the sizes do not agree, or there are fewer than two λ.
    """
    count = len(scores)
    if scores.ndim != 2 or scores.shape[1] < 2 or tokens.shape != scores.shape or {*map(len, signals)} != {count}:
        raise ValueError(
            f"signals, scores and tokens must be of the same prompts, at two λ or more, got {[*map(len, signals)]}, "
            f"{list(scores.shape)} and {list(tokens.shape)}"
        )
    x = torch.cat(list(signals), 1).double()
    width = torch.cat([torch.full((s.shape[1],), float(s.shape[1]) * len(signals)) for s in signals]).double()
    mean, scale = x.mean(0), (x.std(0) + 1e-6) * width.sqrt()
    x = (x - mean) / scale
    gain = torch.tensor(scores - scores.mean(1, keepdims=True))
    cost = torch.tensor(tokens / tokens[:, -1].mean())
    fits = [_ridge(x, target) for target in (gain, cost)]
    weights = {"mean": mean, "scale": scale, "slope": torch.cat([slope for slope, _ in fits], 1)}
    weights["level"] = torch.cat([gain.mean(0), cost.mean(0)])
    left_out = [predicted.numpy() for _, predicted in fits]
    return Fitted({name: weight.float() for name, weight in weights.items()}, *left_out)


def _ridge(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the slopes, and what is predicted for each row by a fit to all others.

    A row's prediction without itself is (ŷ − h y) / (1 − h), with its leverage h, the diagonal of the hat matrix.

    Args:
        x: [Q, F], with columns of mean 0.
        target: [Q, T].
    """
    count = len(x)
    values, vectors = torch.linalg.eigh(x @ x.T)
    centred = target - target.mean(0)
    best: tuple[float, Tensor, Tensor] | None = None
    for strength in STRENGTHS:
        shrunk = values.clamp(min=0) / (values.clamp(min=0) + strength * count)
        leverage = (vectors**2 * shrunk).sum(1, keepdim=True) + 1 / count
        fitted = vectors @ (shrunk[:, None] * (vectors.T @ centred)) + target.mean(0)
        left_out = (fitted - leverage * target) / (1 - leverage)
        error = float(((left_out - target) ** 2).sum())
        if best is None or error <= best[0]:
            dual = vectors @ ((vectors.T @ centred) / (values.clamp(min=0) + strength * count)[:, None])
            best = error, x.T @ dual, left_out
    assert best is not None
    return best[1], best[2]
