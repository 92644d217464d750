"""Chooses λ of a request by what its own prompt shows, so that the prompt is read once for both.

The prompt is read at `prompt_intensity` up to its end, and the states at its last token go to `Choice.choose`. Then the
request goes back to where its tail begins, and reads the tail again, at the λ chosen. That is all it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus

from dami import upstream
from dami.generation.reading import Reading


@dataclass(frozen=True, eq=False)
class Choice:
    """How λ of a request is chosen, whose `intensity` is that of its prompt until then.

    Attributes:
        layers: indices into transformers' `hidden_states` of the layers whose states are looked at.
        choose: given float32 [1, features] on the CPU, the states of the layers one after the other, returns the
            "intensity", and other arguments of the request that change with it. It is called in the thread that
            generates, and must not raise.
        tail: tokens at the end of the prompt that are read at that λ.
    """

    layers: Sequence[int]
    choose: Callable[[Tensor], dict[str, Any]]
    tail: int

    def __deepcopy__(self, memo: object) -> Choice:
        """Returns itself: transformers copies a request's arguments when it evicts the request."""
        return self

    def settled(self, tokens: int) -> int:
        """Returns how many of a prompt's tokens need not be read again."""
        return max(0, tokens - max(1, self.tail))  # the last one gives the first token of the answer


def settled(state: RequestState) -> int:
    """Returns how many tokens of a request have the λ that they will keep."""
    choice: Choice | None = state.logit_processor_kwargs.get("choice")
    whole = len(state.initial_tokens)
    return whole + len(state.generated_tokens) if choice is None else choice.settled(whole)


class Choices:
    """The choices that are due at the end of a step."""

    def __init__(self, processor: ContinuousBatchProcessor) -> None:
        self._due: list[tuple[int, RequestState, Choice]] = []  # with the row of the prompt's last token
        outputs = processor.inputs_and_outputs
        prepare = outputs.prepare_batch_tensors

        def prepare_batch_tensors(requests_in_batch: list[FutureRequestState], *args: Any, **options: Any) -> None:
            self._note(requests_in_batch)
            prepare(requests_in_batch, *args, **options)

        upstream.replace_method(outputs, "prepare_batch_tensors", prepare_batch_tensors)

    def _note(self, requests: list[FutureRequestState]) -> None:
        """Notes whose prompts end in this step. They get no token yet."""
        self._due, end = [], 0
        for request in requests:
            end += request.query_length
            choice = request.state.logit_processor_kwargs.get("choice")
            if choice is not None and request.has_new_token:
                request.has_new_token = False
                self._due.append((end - 1, request.state, choice))

    def arguments(self) -> dict[str, Any]:
        """Returns what the step has to tell the model beside transformers' own arguments."""
        return {"on_states": self._decide} if self._due else {}

    def _decide(self, states: Sequence[Tensor]) -> None:
        """Chooses λ given the hidden states of all layers, [1, tokens, features] each."""
        for row, state, choice in self._due:
            seen = torch.cat([states[layer][:, row].float().cpu() for layer in choice.layers], 1)
            given, tokens = state.logit_processor_kwargs, len(state.initial_tokens)
            read, chosen = given["intensity"], choice.choose(seen)
            del given["choice"]
            given |= chosen | Reading.of_prompt(tokens, chosen["intensity"], read, choice.tail).arguments
            state.position_offset = choice.settled(tokens)
            state.remaining_prefill_tokens = state.initial_tokens[state.position_offset :]
            state.status = RequestStatus.PREFILLING
