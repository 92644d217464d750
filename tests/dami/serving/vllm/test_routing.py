"""Routers whose choice is corrected by a bias, with and without vLLM's own heeding it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

vllm = pytest.importorskip("vllm")

from dami.serving.vllm.ends import twice  # noqa: E402
from dami.serving.vllm.routing import BIAS, Routing  # noqa: E402
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter  # noqa: E402

EXPERTS, TOKENS = 8, 32


@pytest.mark.parametrize("groups", [None, 2])
def test_the_reference_has_the_bias_where_vllm_s_own_router_leaves_it_out(groups: int | None) -> None:
    """vLLM's router for CPUs does so without groups: what the self-test compares with must have it all the same."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Module()
    layer.register_parameter(BIAS, nn.Parameter(torch.rand(EXPERTS, generator=generator), requires_grad=False))
    grouped: dict[str, Any] = {"use_grouped_topk": True, "num_expert_group": groups, "topk_group": 1} if groups else {}
    router = CPURouter(2, EXPERTS, e_score_correction_bias=getattr(layer, BIAS), **grouped)
    ends = twice(layer, BIAS, getattr(layer, BIAS))
    ends.tensors[1].data.copy_(torch.rand(EXPERTS, generator=generator))
    ends.keep()
    rows: Any = SimpleNamespace(tokens=torch.full((TOKENS,), 0.25))
    routing = Routing(router, ends, rows)
    assert routing.knows_bias == bool(groups)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    weights, indices = router._compute_routing(logits, logits, None)
    with routing.at(torch.tensor(0.25)):
        known = router._compute_routing(logits, logits, None)
    order, others = (each.argsort(-1) for each in (indices, known[1]))
    assert torch.equal(indices.gather(1, order), known[1].gather(1, others))
    torch.testing.assert_close(weights.gather(1, order), known[0].gather(1, others))
    plain = logits.softmax(-1).topk(2).indices
    assert not torch.equal(plain.sort(-1).values, indices.sort(-1).values.long())
