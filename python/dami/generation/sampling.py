"""Picks each row's next token by its request's own settings: greedy or sampled, seeded, optionally with logprobs.

A row's random number depends on its request's seed and the length of its sequence only. So neither the other rows nor
an eviction change what it draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingAsyncIOs, ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from dami.generation.courses import Course, course_of
from dami.upstream import replace_method


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: draws from the likeliest tokens whose probabilities add up to this; 1 means all tokens.
        top_k: draws from the k likeliest tokens; 0 means all tokens.
        seed: any integer; equal seeds draw equal tokens.
        logprobs: how many of the likeliest tokens' log-probabilities to return, besides the chosen token's; None for
            no log-probabilities.

    A request's `Course` may add a bias to its scores, or choose the token itself.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    logprobs: int | None = None


@dataclass(frozen=True)
class Logprobs:
    """Natural log-probabilities of one step, before any bias, temperature and truncation.

    Attributes:
        chosen: log-probability of the chosen token.
        top: (id, log-probability) of the likeliest tokens, best first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


def uniform(seed: int, position: int) -> float:
    """Returns a number in [0, 1), which depends on the arguments only."""
    digest = blake2b(f"{seed} {position}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "little") >> 8) / (1 << 24)  # as many bits as a float32 holds


DEFAULT = Sampling()


class _Setting(ContinuousBatchingLogitsProcessor):
    """Brings one number of each request's `Sampling` to the device, as `values` [rows], for the sampler to read."""

    supported_kwargs = {"sampling": Sampling, "course": Course}  # noqa: RUF012 (an attribute of the parent's)
    ignored_kwargs = ()

    def __init__(self, of: Callable[[RequestState], float], dtype: torch.dtype = torch.float32) -> None:
        self.of, self.dtype = of, dtype
        self.values = torch.empty(0, dtype=dtype)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        numbers = [self.of(request.state) for request in requests_with_new_token]
        return torch.tensor(numbers, dtype=self.dtype).view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        self.values = tensor_arg[: len(scores)].view(self.dtype)
        return scores


class Sampler(_Setting):
    """Draws the next tokens of a step, in which some rows may be greedy and others sampled.

    In a captured graph, nothing of this runs again but its operations on the device. So what the host reads after a
    step lies in a tensor that stays.

    Args:
        kept: float32 [most rows, vocabulary], to receive the scores of each step; None if steps are not captured.
            The biases of a step then lie in a tensor of the same shape.

    Attributes:
        processors: the processors to add to transformers' list: those that bring the requests' settings, then itself.
    """

    def __init__(self, kept: Tensor | None = None) -> None:
        super().__init__(_chance)
        self._kept = self._scores = kept
        self._biases = None if kept is None else torch.zeros_like(kept)
        self._bias_of: dict[int, Tensor] = {}  # by row, those of the step
        self.temperature = _Setting(lambda state: sampling_of(state).temperature)
        self.top_p = _Setting(lambda state: sampling_of(state).top_p)
        self.top_k = _Setting(lambda state: sampling_of(state).top_k, torch.int32)
        self.forced = _Setting(_forced, torch.int32)
        self.processors = (self.temperature, self.top_p, self.top_k, self.forced, self)
        self._wanted: list[int | None] = []

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        self._wanted = [sampling_of(request.state).logprobs for request in requests_with_new_token]
        self._scores = self._kept
        courses = [course_of(request.state) for request in requests_with_new_token]
        before, self._bias_of = self._bias_of, {
            row: course.bias for row, course in enumerate(courses) if course is not None and course.bias is not None
        }  # fmt: skip
        if self._biases is not None:
            for row in before:
                self._biases[row] = 0.0
            for row, bias in self._bias_of.items():
                self._biases[row].copy_(bias)
        return super().prepare_tensor_args(requests_with_new_token)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Returns scores [rows, vocabulary] in which each row's maximum is the token to take."""
        scores = super().__call__(scores, tensor_arg)
        temperature, top_p, chance = (each.values.unsqueeze(1) for each in (self.temperature, self.top_p, self))
        forced = self.forced.values.unsqueeze(1)
        if self._kept is None:
            self._scores = scores
        else:
            self._kept[: len(scores)].copy_(scores)
        scores = self._biased(scores)
        if self._kept is None and scores.device.type == "cpu" and not bool(temperature.any() | forced.any()):
            return scores  # all rows are greedy
        drawn = draw(scores, temperature, top_p, self.top_k.values, chance, looks=self._kept is None)
        chosen = torch.where(temperature > 0, drawn, scores.argmax(1, True))
        chosen = torch.where(forced > 0, forced.long() - 1, chosen)
        return scores.scatter(1, chosen, torch.inf)

    def _biased(self, scores: Tensor) -> Tensor:
        """Adds the biases of the requests' courses. Rows without one keep their bits."""
        if self._biases is not None:
            return scores + self._biases[: len(scores)]
        if not self._bias_of:
            return scores
        scores = scores.clone()
        for row, bias in self._bias_of.items():
            scores[row] += bias.to(scores.device)
        return scores

    def _look_up(self, tokens: list[int]) -> list[Logprobs | None] | None:
        """Returns the log-probabilities of a step that has chosen these tokens, for the requests that want them."""
        if self._scores is None or all(wanted is None for wanted in self._wanted):
            return None
        logprobs = self._scores[: len(self._wanted)].log_softmax(1)
        chosen = torch.tensor(tokens[: len(logprobs)], device=logprobs.device).unsqueeze(1)
        most = max(wanted or 0 for wanted in self._wanted)
        values, ids = (x.tolist() for x in logprobs.topk(most, 1))
        own = logprobs.gather(1, chosen).squeeze(1).tolist()
        return [
            None
            if wanted is None
            else Logprobs(own[row], tuple(zip(ids[row][:wanted], values[row][:wanted], strict=True)))
            for row, wanted in enumerate(self._wanted)
        ]

    def report_through(self, outputs: ContinuousBatchingIOs | ContinuousBatchingAsyncIOs) -> None:
        """Passes the log-probabilities of a step to transformers' requests, which store them with their tokens."""
        prepare = outputs.prepare_batch_update

        def prepare_batch_update() -> tuple[Any, Any, Any]:
            requests, tokens, _ = prepare()
            return requests, tokens, self._look_up(tokens)

        replace_method(outputs, "prepare_batch_update", prepare_batch_update)


def sampling_of(state: RequestState) -> Sampling:
    """Returns how a request's tokens are drawn."""
    return state.logit_processor_kwargs.get("sampling", DEFAULT)


def _forced(state: RequestState) -> int:
    """Returns one more than the token that a request's course has chosen; 0 if it leaves that to the sampler."""
    course = course_of(state)
    return 0 if course is None or course.forced is None else course.forced + 1


def _chance(state: RequestState) -> float:
    sampling = sampling_of(state)
    if sampling.temperature == 0:
        return 0.0  # which nobody reads
    return uniform(sampling.seed, len(state.initial_tokens) + len(state.generated_tokens))


def draw(
    scores: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, chance: Tensor, looks: bool = True
) -> Tensor:
    """Draws one token per row, int64 [rows, 1]: the first whose cumulative probability exceeds the row's `chance`.

    Probabilities are summed in the order of the vocabulary or, in rows with top_p or top_k, from the likeliest on.

    Args:
        scores: float32 [rows, vocabulary].
        temperature, top_p, chance: [rows, 1]; a temperature of 0 gives an arbitrary token.
        top_k: int32 [rows]; 0 for all tokens.
        looks: whether the host may look at the settings, which saves time on a CPU.
    """
    # Devices may flush subnormal numbers to 0, so the temperature is clamped to a normal one. The largest score is
    # shifted to 0, as it would overflow when divided by such a temperature. Others become -inf, with probability 0.
    temperature = torch.where(temperature > 0, temperature.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    scores, top_k = (scores - scores.amax(1, True)) / temperature, top_k.unsqueeze(1)
    probabilities, cut = scores.softmax(1), (top_p < 1) | (top_k > 0)
    drawn = _first_beyond(probabilities, chance)
    if looks and scores.device.type == "cpu" and not bool(cut.any()):
        return drawn  # skips sorting, which is slow
    probabilities, order = probabilities.sort(1, descending=True)
    place = torch.arange(scores.shape[1], device=scores.device)
    probabilities = probabilities.masked_fill((top_k > 0) & (place >= top_k), 0.0)
    before = probabilities.cumsum(1) - probabilities
    left_out = (before >= top_p * probabilities.sum(1, True)) & (place > 0)
    place = _first_beyond(probabilities.masked_fill(left_out, 0.0), chance)
    return torch.where(cut, order.gather(1, place), drawn)


def _first_beyond(probabilities: Tensor, chance: Tensor) -> Tensor:
    """Returns where a row's cumulative probability first exceeds the share `chance` of its total, int64 [rows, 1].

    `probabilities` is [rows, tokens].
    """
    cumulated = probabilities.cumsum(1)
    place = torch.searchsorted(cumulated, chance * cumulated[:, -1:], right=True)
    return torch.minimum(place, cumulated.argmax(1, True))  # despite rounding, not past the last possible token
