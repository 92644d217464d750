"""Estimators choose λ for each prompt: `dami.attach(model, estimator)`, then `generate(intensity="auto")`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Estimator(Protocol):
    """What chooses λ for the prompts of a batch."""

    def estimate(self, model: Any, batch: Mapping[str, Tensor]) -> Sequence[float] | Tensor:
        """λ of every prompt.

        Args:
            model: the patched model that is asked; it may be run, at any λ.
            batch: the tensors that `generate` was given, by name: `input_ids` [B, T] or `inputs_embeds` [B, T, D], and
                mostly `attention_mask` [B, T].

        Returns:
            B finite real numbers.
        """
        ...


@dataclass(frozen=True)
class StaticIntensity:
    """The same λ for every prompt: the baseline that any other estimator has to beat."""

    intensity: float

    def estimate(self, model: Any, batch: Mapping[str, Tensor]) -> list[float]:
        return [self.intensity] * len(next(iter(batch.values())))
