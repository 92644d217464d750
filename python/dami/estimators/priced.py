"""`PricedEstimator`: what estimators have in common that weigh the gain of every λ against its cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

P = TypeVar("P", bound="PricedEstimator")


class Reader(Protocol):
    """Reads features of prompts before they are answered. It is a dataclass whose fields JSON can hold."""

    def __call__(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the features, float32 [B, features] on the CPU."""
        ...


@dataclass(frozen=True, eq=False)
class PricedEstimator:
    """Chooses the λ of the greatest utility for each prompt: u(q, λ) = gain(q, λ) − price · cost(q, λ).

    Attributes:
        intensities: λ to choose from.
        features: reads the features of a prompt.
        weights: what `utilities` computes with, by name; "scale" has one number for each feature.
        price: the minimum gain in accuracy that an average thinking answer's worth of tokens must bring. At 0, tokens
            are free; at 0.5, they must raise accuracy by at least 0.5.
        budgets: mean tokens per answer at each price, measured on questions held out from the fit, by price.
    """

    intensities: tuple[float, ...]
    features: Any  # a Reader; each subclass names its own
    weights: Mapping[str, Tensor]
    price: float = 0.2
    budgets: Mapping[float, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.price >= 0:
            raise ValueError(f"price must be a number of at least 0, got {self.price!r}")

    def state(self) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """Returns settings and weights, for `from_state`."""
        settings = {"intensities": self.intensities, "features": asdict(self.features), "price": self.price}
        return {**settings, "budgets": [*map(list, self.budgets.items())]}, self.weights

    @classmethod
    def from_state(cls: type[P], settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> P:
        """Returns the estimator with these settings, as read from JSON, and weights."""
        return cls(
            tuple(settings["intensities"]),
            cls.reader(settings["features"]),
            weights,
            settings["price"],
            {float(price): float(tokens) for price, tokens in settings["budgets"]},
        )

    @classmethod
    def reader(cls, settings: Mapping[str, Any]) -> Reader:
        """Returns the reader of features with these settings, as read from JSON."""
        raise NotImplementedError

    def at(self: P, price: float) -> P:
        """Returns this estimator at another price."""
        return replace(self, price=price)

    def within(self: P, tokens: float) -> P:
        """Returns this estimator at the lowest price whose answers had a mean length of at most `tokens`.

        Raises:
            ValueError: no price led to so few tokens, or none has been measured.
        """
        fitting = [price for price, mean in self.budgets.items() if mean <= tokens]
        if not fitting:
            least = f"at least {min(self.budgets.values()):.1f}" if self.budgets else "measured, and no budget has been"
            raise ValueError(f"tokens must be {least}, got {tokens}")
        return self.at(min(fitting))

    def utilities(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns gain and cost of every λ, float32 [B, L] each, for features [B, F]. Only differences have a meaning.

        Raises:
            ValueError: the features are those of another model.
        """
        known = self.weights["scale"].shape[0]
        if features.shape[1] != known:
            raise ValueError(
                f"the estimator reads {known} features of a prompt, got {features.shape[1]}: it was fitted to another "
                "model"
            )
        return self.gain_and_cost(features)

    def gain_and_cost(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Computes `utilities`."""
        raise NotImplementedError

    def choose(self, features: Tensor) -> Tensor:
        """Returns λ for every row of features, float32 [B]."""
        gain, cost = self.utilities(features)
        return torch.tensor(self.intensities, dtype=torch.float32)[(gain - self.price * cost).argmax(1)]

    def estimate(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns λ for each prompt, float32 [B], as `Estimator` says."""
        return self.choose(self.features(model, batch))
