"""Routers of a pair in vLLM whose choice of experts is corrected by a bias for each expert, as DeepSeek-V3's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dami.serving.vllm.ends import Ends, ends_of
from dami.serving.vllm.rows import StepIntensities
from dami.serving.vllm.support import replace
from dami_kernels.rows import lerp

BIAS, METHOD = "e_score_correction_bias", "_compute_routing"


class Routing:
    """Chooses the experts of each token by the bias at its λ, in place of a router's own method."""

    def __init__(self, router: Any, bias: Ends, rows: StepIntensities) -> None:
        """
        Args:
            router: vLLM's router.
            bias: both ends of its bias.
            rows: λ of the step.

        Raises:
            ValueError: if the router does more than choose the experts with the greatest sums of score and bias.
        """
        unknown = {
            f"scores by {router.scoring_func}": router.scoring_func not in ("softmax", "sigmoid"),
            "shared experts among the others": getattr(router, "num_fused_shared_experts", 0),
            "a bias for images": getattr(router, "bias_vl", None) is not None,
            "a function of its own": getattr(router, "custom_routing_function", None) is not None,
        }
        if any(unknown.values()):
            named = ", ".join(name for name, found in unknown.items() if found)
            raise ValueError(f"a pair's router with a bias cannot have {named}")
        self.router, self.rows = router, rows
        self.layer, self.name = bias.places[0]
        self.knows_bias = self._knows_bias()
        setattr(router, BIAS, getattr(self.layer, self.name))
        self.own = replace(router, METHOD, self.at_rows)

    def _knows_bias(self) -> bool:
        """Returns whether the router's own method heeds its bias, which vLLM's for CPUs does with groups only."""
        bias = torch.zeros_like(ends_of(self.layer, self.name).tensors[0])
        logits = -torch.arange(len(bias), dtype=torch.float32, device=bias.device).unsqueeze(0)
        bias[-1] = 2  # more than any score
        setattr(self.router, BIAS, bias)
        _, indices = getattr(self.router, METHOD)(logits, logits, None)
        return bool((indices == len(bias) - 1).any())

    def at_rows(
        self, hidden_states: Tensor, router_logits: Tensor, indices_type: torch.dtype | None, **inputs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns weights and indices [tokens, k] of the experts that each token goes to."""
        base, target = (end.float() for end in ends_of(self.layer, self.name).tensors)
        bias = lerp(base, target, self.rows.tokens[: router_logits.shape[0]].unsqueeze(1))
        return self._chosen(router_logits, bias, indices_type)

    def _chosen(self, logits: Tensor, bias: Tensor, indices_type: torch.dtype | None) -> tuple[Tensor, Tensor]:
        router = self.router
        scores = logits.float().softmax(-1) if router.scoring_func == "softmax" else logits.float().sigmoid()
        biased = scores + bias
        groups = getattr(router, "num_expert_group", None) or 1
        if groups > 1:
            grouped = biased.unflatten(-1, (groups, -1))
            best = grouped.topk(2, -1).values.sum(-1).topk(router.topk_group, -1).indices
            kept = torch.zeros_like(grouped[..., 0]).scatter(1, best, 1.0).unsqueeze(-1)
            biased = torch.where(kept > 0, grouped, -torch.inf).flatten(-2)
        indices = biased.topk(router.top_k, -1).indices
        weights = scores.gather(1, indices)
        if router.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * router.routed_scaling_factor, indices.to(indices_type or torch.int32)

    @contextmanager
    def at(self, lam: Tensor) -> Iterator[None]:
        """Chooses as vLLM does, by the bias at one λ for all tokens; as `at_rows` does where vLLM's has no bias."""

        def chosen(hidden_states: Tensor, logits: Tensor, indices_type: torch.dtype | None, **inputs: Any) -> Any:
            return self._chosen(logits, blended, indices_type)

        base, target = ends_of(self.layer, self.name).tensors
        nan = getattr(self.router, BIAS)
        blended = lerp(base.float(), target.float(), lam.to(base.device)).to(base.dtype)
        setattr(self.router, BIAS, blended)
        replace(self.router, METHOD, self.own if self.knows_bias else chosen)
        yield
        setattr(self.router, BIAS, nan)
        replace(self.router, METHOD, self.at_rows)


def convert(runner: Any, bias: Ends, rows: StepIntensities) -> None:
    """Lets experts be chosen by the bias at the λ of each token."""
    runner.routed_experts.routing = Routing(runner.router, bias, rows)
