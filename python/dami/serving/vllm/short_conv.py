"""LFM2's short convolutions of a pair in vLLM: both ends' convolutions run, and λ applies to their results.

A convolution is linear in its weight, and its cache holds its inputs, which both ends share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.short_conv import ShortConv

from dami.serving.vllm.ends import ends_in, ends_of
from dami.serving.vllm.rows import StepIntensities
from dami.upstream import parameters_of
from dami_kernels.rows import lerp


class PairShortConv(ShortConv):
    """A short convolution at λ: vLLM's own with its class changed."""

    rows: StepIntensities

    def forward_native(self, hidden_states: Tensor, output: Tensor) -> None:
        self._forward(super().forward_native, hidden_states, output)

    def forward_cuda(self, hidden_states: Tensor, output: Tensor) -> None:
        self._forward(super().forward_cuda, hidden_states, output)

    def _forward(self, forward: Callable[..., Any], hidden_states: Tensor, output: Tensor) -> None:
        projected = self.in_proj(hidden_states)
        found: list[Tensor] = []

        def keep(states: Tensor) -> tuple[Tensor, None]:
            found.append(states)
            return states, None

        used = self._used()
        before = self.kv_cache[0][used]
        self.__dict__.update(in_proj=lambda _: projected, out_proj=keep)
        try:
            for index in (0, 1):
                if index:
                    self.kv_cache[0][used] = before  # the base's run has moved the inputs on
                with self.shown(index):
                    forward(hidden_states, torch.empty_like(output))
        finally:
            del self.__dict__["in_proj"], self.__dict__["out_proj"]
        base, target = found
        lam = self.rows.tokens[: base.shape[0]].unsqueeze(1)
        states = lerp(base.float(), target.float(), lam).to(base.dtype)
        output[: states.shape[0]] = self.out_proj(states)[0]

    def _used(self) -> Tensor:
        """Returns the places of the step's sequences in the cache."""
        steps: Any = get_forward_context().attn_metadata
        step = steps.get(self.prefix) if steps else None
        places = [] if step is None else [step.state_indices_tensor_d, step.state_indices_tensor_p]
        known = [place.flatten().long() for place in places if place is not None]
        return torch.cat(known) if known else torch.empty(0, dtype=torch.long, device=self.kv_cache[0].device)

    @contextmanager
    def shown(self, index: int) -> Iterator[None]:
        """Gives the convolution the values of one end."""
        own: Any = parameters_of(self.conv)
        nan = {name: own[name] for name in ends_in(self.conv)}
        own.update({name: own[ends.names[index]] for name, ends in ends_in(self.conv).items()})
        yield
        own.update(nan)

    @contextmanager
    def at(self, lam: Tensor, see: Callable[[torch.Size], None]) -> Iterator[None]:
        """Computes as vLLM does, at one λ, and calls `see` with the shape of the rows."""
        own: Any = parameters_of(self.conv)
        nan = {name: own[name] for name in ends_in(self.conv)}

        def plain(method: Callable[..., Any], hidden_states: Tensor, output: Tensor) -> None:
            see(hidden_states.shape[:-1])
            for name in nan:
                base, target = (end.float() for end in ends_of(self.conv, name).tensors)
                own[name] = torch.nn.Parameter(lerp(base, target, lam.to(base.device)).to(nan[name].dtype), False)
            method(self, hidden_states, output)
            own.update(nan)

        self.__dict__.update(
            forward_native=lambda **inputs: plain(ShortConv.forward_native, **inputs),
            forward_cuda=lambda **inputs: plain(ShortConv.forward_cuda, **inputs),
        )
        yield
        del self.__dict__["forward_native"], self.__dict__["forward_cuda"]


def convert(layer: Any, rows: StepIntensities) -> None:
    """Turns a short convolution into one at λ."""
    layer.__class__ = PairShortConv
    layer.rows = rows
