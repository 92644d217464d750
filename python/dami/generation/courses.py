"""The course of a request in continuous batching: what is decided before each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers.generation.continuous_batching.requests import RequestState


class Course:
    """Decides at which λ the last token of a request is read, and what its next token may be.

    Each request has its own, passed to `add_request(…, course=…)`. `follow` is called before each step that gives the
    request a token, in the generation thread. The prompt is read as the request says, and the answer begins at its
    `intensity`, which may have been chosen while the prompt was read.

    Args:
        prompt: number of tokens of the request's prompt.

    Attributes:
        shared: tokens of the prompt that were not read, because the KV cache had them.
        tokens: those generated so far.
        intensity: λ at which the last of them is read.
        lams: λ of the step that gave each token.
        forced: the next token; None if the sampler chooses it.
        bias: float32 [vocabulary] on the CPU, added to the scores before the sampler chooses; None for none.
    """

    def __init__(self, prompt: int) -> None:
        self.prompt, self.shared, self.intensity = prompt, 0, 0.0
        self.tokens: list[int] = []
        self.lams: list[float] = []
        self.forced: int | None = None
        self.bias: Tensor | None = None

    def follow(self, state: RequestState) -> None:
        """Takes up the tokens that the request has generated since the last call, and decides about the next."""
        known, evicted = len(self.tokens), len(state.initial_tokens) - self.prompt
        news = state.initial_tokens[self.prompt + known :] + state.generated_tokens[max(known - evicted, 0) :]
        self.tokens += news
        given = state.logit_processor_kwargs
        if not self.lams:
            self.begin(given["intensity"])
        self.decide(news)
        self.lams.append(self.intensity)
        if self.tokens and self.intensity != given["intensity"]:
            read = self.prompt + len(self.tokens) - 1
            given["earlier"] = (*given.get("earlier", ()), (read, given["intensity"]))
            given["intensity"] = self.intensity

    def begin(self, intensity: float) -> None:
        """Takes the λ at which the answer begins."""
        self.intensity = intensity

    def decide(self, news: Sequence[int]) -> None:
        """Sets `intensity`, `forced` and `bias` for the next step, after these new tokens."""

    def __deepcopy__(self, memo: object) -> Course:
        """Returns itself: transformers copies a request's arguments when it evicts the request."""
        return self


def course_of(state: RequestState) -> Course | None:
    """Returns the course of a request, if it has one."""
    return state.logit_processor_kwargs.get("course")
