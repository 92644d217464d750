"""The λ at which each token of a batched request is read: of its prompt, of the prompt's tail, of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
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


def parse_tails(value: Any, prompts: int | None = None) -> list[int]:
    """Returns the tail of each prompt, or of one if `prompts` is None.

    Args:
        value: tokens at the end of a prompt that are read at the answer's λ: an integer of at least 0, or one per
            prompt; None for `TAIL`.
        prompts: number of prompts; None if only one integer is taken.

    Raises:
        TypeError, ValueError: it is none of these.
    """
    several = prompts is not None and isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    each = list(value) if several else [TAIL if value is None else value] * (1 if prompts is None else prompts)
    wanted = "prompt_tail must be an integer of at least 0" + (", or one per prompt" if prompts is not None else "")
    if not all(isinstance(tail, Integral) and not isinstance(tail, bool) for tail in each):
        raise TypeError(f"{wanted}, got {value!r}")
    if any(tail < 0 for tail in each):
        raise ValueError(f"{wanted}, got {value!r}")
    if prompts is not None and len(each) != prompts:
        raise ValueError(f"{wanted}, got {len(each)} for {prompts} prompts")
    return [int(tail) for tail in each]
