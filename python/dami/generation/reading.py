"""The λ at which each token of a batched request is read: of its prompt, of the prompt's tail, of its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.generation.continuous_batching.requests import RequestState

TAIL = 1  # tokens at the end of a prompt that are read at the answer's λ, where nothing else is said


@dataclass(frozen=True)
class Reading:
    """λ of the tokens of a sequence, by place.

    Attributes:
        intensity: λ of all tokens after those of `earlier`.
        earlier: (end, λ) in ascending order: the tokens before the place `end`, from the one before it on, have this λ.
    """

    intensity: float = 0.0
    earlier: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of_prompt(cls, tokens: int, intensity: float, prompt_intensity: float | None, tail: int) -> Reading:
        """Returns the λ of a prompt and its answer.

        Args:
            tokens: length of the prompt.
            intensity: λ of the answer, and of the last `tail` tokens of the prompt.
            prompt_intensity: λ of the prompt before them; None for `intensity`.
            tail: at least 0.
        """
        before = max(0, tokens - tail)
        same = prompt_intensity in (None, intensity) or before == 0
        return cls(intensity, () if same else ((before, float(prompt_intensity)),))  # type: ignore[arg-type]

    @classmethod
    def of(cls, state: RequestState) -> Reading:
        """Returns the λ of a request, as `arguments` has passed it to transformers."""
        given = state.logit_processor_kwargs
        return cls(given.get("intensity", 0.0), given.get("earlier", ()))

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of a request that carry this."""
        return {"intensity": self.intensity, "earlier": self.earlier}

    def lam(self, start: int, end: int) -> list[float]:
        """Returns λ of each of the tokens from the place `start` to before `end`."""
        found: list[float] = []
        for until, value in self.earlier:
            found += [value] * (min(until, end) - start - len(found))
        return found + [self.intensity] * (end - start - len(found))
