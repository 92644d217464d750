"""The λ of every row of a step, in buffers with fixed addresses, from which captured graphs read each step's λ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from vllm.config import VllmConfig


class StepIntensities:
    """The λ of a step.

    Attributes:
        tokens: float32 [most], λ of each token of the forward pass.
        sampled: float32 [most], λ of each row that is sampled from.
    """

    def __init__(self, config: VllmConfig) -> None:
        """Creates the buffers on the default device, large enough for any step.

        They hold NaN until the self-test, so what a model computes from its weights while it is loaded becomes NaN.
        """
        scheduler, speculation = config.scheduler_config, config.speculative_config
        each = 1 + (speculation.num_speculative_tokens if speculation else 0)
        most = max(
            scheduler.max_num_batched_tokens,
            scheduler.max_num_seqs * each,
            config.compilation_config.max_cudagraph_capture_size or 0,
        )
        self.tokens = torch.full((most,), torch.nan, dtype=torch.float32)
        self.sampled = torch.full((most,), torch.nan, dtype=torch.float32)
        self._states: Tensor | None = None

    def clear(self) -> None:
        """Sets every λ to 0, for steps that are no request's, such as those that warm up."""
        self.tokens.zero_()
        self.sampled.zero_()

    def set(self, tokens: Tensor, sampled_from: Tensor) -> None:
        """Sets the λ of a step on the device, without waiting for it.

        Args:
            tokens: float32, λ of each token.
            sampled_from: int, indices of the tokens whose logits are sampled from.
        """
        self.tokens[: tokens.shape[0]].copy_(tokens, non_blocking=True)
        torch.index_select(self.tokens, 0, sampled_from, out=self.sampled[: sampled_from.shape[0]])

    @contextmanager
    def of_prompts(self, states: Tensor) -> Iterator[None]:
        """Makes `of_logits` expect slices of the hidden states of all tokens, instead of the sampled rows."""
        self._states = states
        try:
            yield
        finally:
            self._states = None

    def of_logits(self, states: Tensor) -> Tensor:
        """Returns the λ of the hidden states that the output layer gets."""
        count, whole = states.shape[0], self._states
        if whole is None:
            return self.sampled[:count]
        if states.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            raise RuntimeError("logits of a prompt were asked for rows that are no slice of the step's hidden states")
        first = (states.storage_offset() - whole.storage_offset()) // whole.stride(0)
        return self.tokens[first : first + count]
