"""Linear layers, embeddings and experts of a pair in vLLM: the operators that read both ends.

Weights have vLLM's layout, sharded and merged by its own loaders: q, k and v are one weight, and so are gate and up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearMethodBase

from dami.layers.routing import by_expert
from dami.serving.vllm.ends import add_factors, check_groups, create, ends_in, ends_of, optional_ends
from dami.serving.vllm.rows import StepIntensities
from dami_kernels import lerp_embedding, lerp_experts, lerp_linear

LAM = "intensity"  # name of the buffer that layers share


def rows_of(layer: Any, x: Tensor) -> dict[str, Any]:
    """Returns λ of the rows of a layer's input, as the operators take it.

    Args:
        layer: the layer, whose `rows_per_token` is how many rows each token has there.
        x: its input, [..., K]: rows in the order of the tokens.
    """
    each = layer.rows_per_token
    return {"lam": layer.intensity[: x.shape[:-1].numel() // each], "rows_per_lam": each}


def give_rows(layer: Any, rows: StepIntensities) -> None:
    """Gives a layer the λ of each token. How many rows a token has there is found by the self-test."""
    layer.register_buffer(LAM, rows.tokens, persistent=False)
    layer.rows_per_token = 1


class PairMethod:
    """The common part of linear layers and embeddings."""

    def __init__(self, rows: StepIntensities, format: str, ranks: Sequence[int]) -> None:
        """
        Args:
            rows: λ of the model's steps.
            format: format of the weight, or of all weights merged into it.
            ranks: ranks of those weights, if the format is "lowrank".
        """
        self.rows, self.format, self.ranks = rows, format, ranks

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        check_groups(layer, self.format, input_size_per_partition, input_size)
        shape = sum(output_partition_sizes), input_size_per_partition
        attrs = {"input_dim": 1, "output_dim": 0, **extra_weight_attrs}
        ends = create(layer, "weight", self.format, shape, params_dtype, **attrs)
        if self.format == "lowrank":
            add_factors(ends, self.ranks, input_size, attrs["weight_loader"])
        ends_in(layer)["weight"] = ends
        give_rows(layer, self.rows)


class LinearMethod(PairMethod, LinearMethodBase):
    """A linear layer at λ. Merged layers take one launch."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        ends = None if bias is None else ends_of(layer, "bias")
        return lerp_linear(x, ends_of(layer, "weight"), bias=ends, **rows_of(layer, x))


class EmbeddingMethod(PairMethod, LinearMethodBase):
    """An embedding at λ, or the output layer, which may be tied to it."""

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        return lerp_embedding(input_, ends_of(layer, "weight"), layer.intensity[: input_.numel()])

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        ends = None if bias is None else ends_of(layer, "bias")
        return lerp_linear(x, ends_of(layer, "weight"), self.rows.of_logits(x), ends)

    tied_to: Any = None

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        self.tied_to = embed_tokens  # it may not be a pair yet
        return layer

    def share(self, layer: Any) -> None:
        """Ties a layer's weight to that of `tied_to`."""
        ends = ends_in(layer)["weight"] = ends_in(self.tied_to)["weight"]
        ends.places.append((layer, "weight"))
        ends.show(ends.tensors[0])


def adopt(layer: Any, method: PairMethod) -> None:
    """Turns a layer into a pair if its model built it without asking for a quantisation method."""
    weight_loader = layer.weight.weight_loader
    del layer.weight
    layer.quant_method = method
    method.create_weights(
        layer,
        getattr(layer, "input_size_per_partition", layer.input_size),
        layer.output_partition_sizes,
        layer.input_size,
        layer.output_size,
        layer.params_dtype,
        weight_loader=weight_loader,
    )


def swiglu(x: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """Computes GPT-OSS's activation: gates and values take turns, and are limited."""
    gate, value = x[..., ::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
    return (value + 1) * gate * torch.sigmoid(alpha * gate)


def halves(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns a gated activation: all gates come first, then all values."""

    def gated(x: Tensor) -> Tensor:
        gate, value = x.chunk(2, -1)
        return function(gate) * value

    return gated


ACTIVATIONS = {
    MoEActivation.SILU: halves(F.silu),
    MoEActivation.GELU: halves(F.gelu),
    MoEActivation.GELU_TANH: halves(partial(F.gelu, approximate="tanh")),
    MoEActivation.SWIGLUOAI: swiglu,
}


class ExpertsMethod(FusedMoEMethodBase):
    """The experts of each token at its λ, which the router also uses."""

    def __init__(self, moe: Any, rows: StepIntensities, formats: dict[str, str | None]) -> None:
        super().__init__(moe)
        self.rows = rows
        # if only one of the two differs, the other is stored as a pair as well
        self.up, self.down = formats["gate_up_proj"] or "pair", formats["down_proj"] or "pair"

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        refused = {
            f"the activation {layer.activation.value}": layer.activation not in ACTIVATIONS,
            "a limit of their own": (layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta) != (None, None, None),
            # vLLM cuts down's features by their number, and codes and scales have others
            "biases in another format than 'pair' over several processes (--enable-expert-parallel)": self.moe.has_bias
            and self.down != "pair"
            and self.moe.moe_parallel_config.tp_size > 1,
            "router weights on their input": layer.apply_router_weight_on_input,
            "sizes that are rounded up": (hidden_size, intermediate_size_per_partition)
            != (self.moe.hidden_dim_unpadded, self.moe.intermediate_size_per_partition_unpadded),
        }
        if any(refused.values()):
            raise ValueError(f"a pair's experts cannot have {', '.join(name for name, it in refused.items() if it)}")
        check_groups(layer, self.down, intermediate_size_per_partition, self.moe.intermediate_size)
        up = num_experts, 2 * intermediate_size_per_partition, hidden_size
        down = num_experts, hidden_size, intermediate_size_per_partition
        loader = extra_weight_attrs["weight_loader"]
        created: list[tuple[str, str, tuple[int, ...]]]
        created = [("w13_weight", self.up, up), ("w2_weight", self.down, down)]
        if self.moe.has_bias:
            created += [("w13_bias", "pair", up[:2]), ("w2_bias", "pair", down[:2])]
        for name, format, shape in created:
            ends_in(layer)[name] = create(layer, name, format, shape, params_dtype, weight_loader=loader)
        give_rows(layer, self.rows)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        up, down = ends_of(layer, "w13_weight"), ends_of(layer, "w2_weight")
        k = topk_ids.shape[-1]
        _, pair, offsets = by_expert(topk_ids, up.shape[0], layer.expert_map)
        token = pair // k
        where = {"expert_offsets": offsets, "lam": layer.intensity[: x.shape[0]], "row_to_lam": token.int()}
        rows = lerp_experts(x[token], up, bias=optional_ends(layer, "w13_bias"), **where)
        rows = ACTIVATIONS[layer.activation](rows)
        rows = lerp_experts(rows, down, bias=optional_ends(layer, "w2_bias"), **where)
        y = torch.empty_like(rows)
        y[pair] = rows  # each token's k rows side by side again
        return (y.unflatten(0, (-1, k)) * topk_weights.unsqueeze(-1)).sum(1).to(x.dtype)
