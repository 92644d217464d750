"""Attention sinks at the λ of each token, against their softmax in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

vllm = pytest.importorskip("vllm")

from dami.serving.vllm.ends import twice  # noqa: E402
from dami.serving.vllm.sinks import Sinks  # noqa: E402


def attended(scores: Tensor, values: Tensor, sinks: Tensor) -> Tensor:
    """What an attention gives for the scores [tokens, heads, keys] of values [heads, keys, columns]."""
    column = sinks.expand(scores.shape[:2]).unsqueeze(-1)
    return torch.einsum("thk,hkc->thc", torch.cat([scores, column], -1).softmax(-1)[..., :-1], values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_between_those_of_both_ends(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, heads = 64, 4
    scores = torch.randn(tokens, heads, 9, generator=generator)
    values = torch.randn(heads, 9, 16, generator=generator)
    layer = nn.Module()
    layer.register_parameter("sinks", nn.Parameter(torch.randn(heads, generator=generator), requires_grad=False))
    ends = twice(layer, "sinks", layer.sinks)
    ends.tensors[1].data += torch.tensor([1.0, -2.0, 1e-3, 0.0])  # the last is the same in both ends
    ends.keep()
    lam = torch.rand(tokens, generator=generator) * 2 - 0.5
    lam[:2] = torch.tensor([0.0, 1.0])

    def forward(*inputs: Any, output: Tensor) -> Tensor:
        return output.copy_(attended(scores, values, impl.sinks))

    impl = SimpleNamespace(forward=forward, sinks=ends.tensors[0])
    Sinks(impl, ends, SimpleNamespace(tokens=lam))  # type: ignore[arg-type]
    y = impl.forward(None, output=torch.empty(tokens, heads, 16, dtype=dtype))
    base, target = (end.double() for end in ends.tensors)
    sinks = base + lam.double().unsqueeze(1) * (target - base)
    wanted = attended(scores.double(), values.double(), sinks)
    plain = attended(scores, values, sinks.float()).to(dtype)
    error, unit = ((x - wanted).norm(dim=-1).max() for x in (y, plain))
    assert error <= 8 * unit
