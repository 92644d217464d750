"""Attention sinks of a pair in vLLM: a number for each head that takes part in the softmax, as in GPT-OSS.

vLLM's kernels take one number for all tokens. For a sink s they return N / (D + exp(s)), where D is the sum of
exp(scores). So the results for both ends' sinks tell what any other sink gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dami.serving.vllm.ends import Ends, ends_in, ends_of
from dami.serving.vllm.rows import StepIntensities
from dami.serving.vllm.support import replace
from dami_kernels.rows import lerp


class Sinks:
    """Attends with the sinks at the λ of each token, in place of an attention's own method."""

    def __init__(self, impl: Any, ends: Ends, rows: StepIntensities) -> None:
        """
        Args:
            impl: vLLM's implementation of an attention.
            ends: both ends of its sinks [heads].
            rows: λ of the step.
        """
        self.impl, self.rows = impl, rows
        layer, name = ends.places[0]
        self.base, self.target = ends_of(layer, name).tensors
        self.own = replace(impl, "forward", self.forward)

    def forward(self, *inputs: Any, output: Tensor, **options: Any) -> Tensor:
        def attended(sinks: Tensor) -> Tensor:
            self.impl.sinks = sinks.to(self.impl.sinks.dtype)  # some kernels want another
            self.own(*inputs, output=output, **options)
            return output.to(torch.float32, copy=True)

        return output.copy_(self.at_rows(attended))

    def at_rows(self, attended: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns what an attention gives with the sinks at the λ of each token.

        Args:
            attended: gives it for sinks [heads] that are the same for all tokens: float32 [tokens, heads, columns].
        """
        base, target = attended(self.base), attended(self.target)
        first, last = self.base.float(), self.target.float()
        sinks = lerp(first, last, self.rows.tokens[: base.shape[0]].unsqueeze(1))
        share = torch.where(first == last, 0 * sinks, torch.expm1(sinks - first) / torch.expm1(last - first))
        lengths = base.norm(dim=-1), target.norm(dim=-1)
        ratio = torch.where(lengths[1] > 0, lengths[0] / lengths[1], 1)  # of D + exp(s) at λ = 1 to that at λ = 0
        return base / (1 + share * (ratio - 1)).unsqueeze(-1)

    @contextmanager
    def at(self, lam: Tensor, see: Callable[[torch.Size], None]) -> Iterator[None]:
        """Attends with the sinks at one λ, and calls `see` with the shape of the rows."""

        def plain(attended: Callable[[Tensor], Tensor]) -> Tensor:
            y = attended(lerp(self.base.float(), self.target.float(), lam.to(self.base.device)))
            see(y.shape[:1])
            return y

        before = replace(self, "at_rows", plain)
        yield
        replace(self, "at_rows", before)


def convert(attention: Any, ends: Ends, rows: StepIntensities) -> None:
    """Lets an attention take sinks at the λ of each token."""
    attention.sinks_at_rows = Sinks(attention.impl, ends, rows)
    ends_in(attention)["sinks"] = ends
