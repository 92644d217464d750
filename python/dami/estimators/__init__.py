"""Estimators choose λ for each prompt: `dami.attach(model, estimator)`, then `generate(intensity="auto")`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dami.dial.patch import Estimator as Estimator
from dami.estimators.registry import register_estimator


@register_estimator("static")
@dataclass(frozen=True)
class StaticIntensity:
    """Chooses the same λ for every prompt: the baseline that other estimators have to beat."""

    intensity: float

    def estimate(self, model: Any, batch: Mapping[str, Tensor]) -> list[float]:
        """Returns λ for each prompt of a batch of tensors [prompts, ...]."""
        return [self.intensity] * len(next(iter(batch.values())))
