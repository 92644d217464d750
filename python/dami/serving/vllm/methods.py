"""The layers of a pair in vLLM: how each stores both ends, and the operator that reads them.

Weights have vLLM's layout, sharded and merged by its own loaders: q, k and v are one weight, and so are gate and up.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from dami.layers.routing import by_expert
from dami.serving.vllm.rows import StepIntensities
from dami.upstream import parameters_of
from dami_kernels import LerpWeight, formats, lerp_embedding, lerp_experts, lerp_linear, lerp_rms_norm
from dami_kernels.quantize import GROUP

LAM = "intensity"  # name of the buffer that layers share


def suffix_of(suffix: str) -> str:
    """Returns a format's suffix for vLLM's parameter names. vLLM's loaders would take "scale" for one of their own."""
    return suffix.replace("_scale", "_step")


def register_pair(
    layer: nn.Module, name: str, format: str, shape: Sequence[int], dtype: torch.dtype, **attrs: Any
) -> None:
    """Registers empty parameters for both ends of a weight in a format.

    Args:
        layer: the layer to add them to.
        name: the weight's name.
        format: the weight's storage format.
        shape: shape of either end in this process: [..., N, K].
        dtype: dtype of either end.
        attrs: attributes of the parameters, which vLLM's weight loaders read.
    """
    row = torch.zeros(*([1] * (len(shape) - 1)), shape[-1], dtype=dtype, device="cpu")
    for suffix, like in zip(formats.get(format).TENSORS, LerpWeight.pack(row, row, format).tensors, strict=True):
        if format == "lowrank" and suffix:
            continue  # see register_factors
        parameter = nn.Parameter(torch.empty(*shape[:-1], like.shape[-1], dtype=like.dtype), requires_grad=False)
        set_weight_attrs(parameter, attrs)
        layer.register_parameter(name + suffix_of(suffix), parameter)


def register_factors(
    layer: Any, ranks: Sequence[int], shape: Sequence[int], columns: int, dtype: torch.dtype, weight_loader: Any
) -> None:
    """Registers the factors of a low-rank difference, with those of merged weights side by side.

    The factor up is then block-diagonal, because each part contributes to its own outputs only.

    Args:
        layer: the layer that has the weight.
        ranks: rank of each part.
        shape: [N, K] of the weight in this process.
        columns: K of the whole weight.
        dtype: dtype of the factors.
        weight_loader: the layer's weight loader, which knows the rows of each part.
    """
    bounds = list(itertools.accumulate(ranks, initial=0))
    down = nn.Parameter(torch.zeros(bounds[-1], shape[1], dtype=dtype), requires_grad=False)
    up = nn.Parameter(torch.zeros(shape[0], bounds[-1], dtype=dtype), requires_grad=False)

    def columns_of(shard: Any) -> slice:
        part = {"q": 0, "k": 1, "v": 2, None: 0}.get(shard, shard)
        return slice(bounds[part], bounds[part + 1])

    def load_down(parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
        first = 0 if shape[1] == columns else layer.tp_rank * shape[1]
        parameter.data[columns_of(shard)] = loaded.narrow(1, first, shape[1])

    def load_up(parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
        part = nn.Parameter(parameter.new_zeros(shape[0], loaded.shape[1]), requires_grad=False)
        set_weight_attrs(part, {"output_dim": 0})
        weight_loader(part, loaded, *([] if shard is None else [shard]))
        parameter.data[:, columns_of(shard)] = part.data

    set_weight_attrs(down, {"weight_loader": load_down})
    set_weight_attrs(up, {"weight_loader": load_up})
    layer.register_parameter("weight_down", down)
    layer.register_parameter("weight_up", up)


def ends_of(layer: nn.Module, name: str, format: str, shape: Sequence[int], dtype: torch.dtype) -> LerpWeight:
    """Returns both ends of a weight as the operators take them."""
    own = parameters_of(layer)
    tensors = tuple(own[name + suffix_of(suffix)] for suffix in formats.get(format).TENSORS)
    return LerpWeight(tensors, format, torch.Size(shape), dtype)  # type: ignore[arg-type]


def vector_ends(layer: nn.Module, name: str) -> LerpWeight | None:
    """Returns both ends of a norm's weight or of a bias (one tensor twice if they are equal), or None without one."""
    base = parameters_of(layer).get(name)
    if base is None:
        return None
    target = parameters_of(layer).get(f"{name}_target")
    return LerpWeight((base, base if target is None else target), "pair", base.shape, base.dtype)


def check_groups(layer: Any, format: str, size: int, whole: int) -> None:
    """Raises ValueError if input features that share a scale would be split."""
    if size != whole and format not in ("pair", "lowrank") and size % GROUP:
        raise ValueError(
            f"{layer.prefix or type(layer).__name__}: {whole} input features cannot be split into parts of {size}, as "
            f"{GROUP} of them share a scale in the format {format!r}: use fewer processes, or the format 'pair'"
        )


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
        layer.pair_shape = sum(output_partition_sizes), input_size_per_partition
        layer.pair_dtype = params_dtype
        attrs = {"input_dim": 1, "output_dim": 0, **extra_weight_attrs}
        if self.format == "lowrank":
            register_factors(layer, self.ranks, layer.pair_shape, input_size, params_dtype, attrs["weight_loader"])
        register_pair(layer, "weight", self.format, layer.pair_shape, params_dtype, **attrs)
        layer.register_buffer(LAM, self.rows.tokens, persistent=False)

    def ends(self, layer: Any) -> LerpWeight:
        return ends_of(layer, "weight", self.format, layer.pair_shape, layer.pair_dtype)


class LinearMethod(PairMethod, LinearMethodBase):
    """A linear layer at λ. Merged layers take one launch."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        lam = layer.intensity[: x.shape[:-1].numel()]
        return lerp_linear(x, self.ends(layer), lam, None if bias is None else vector_ends(layer, "bias"))


class EmbeddingMethod(PairMethod, LinearMethodBase):
    """An embedding at λ, or the output layer, which may be tied to it."""

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        return lerp_embedding(input_, self.ends(layer), layer.intensity[: input_.numel()])

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        lam = self.rows.of_logits(x)
        return lerp_linear(x, self.ends(layer), lam, None if bias is None else vector_ends(layer, "bias"))

    tied_to: Any = None

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        self.tied_to = embed_tokens  # it may not be a pair yet
        return layer

    def share(self, layer: Any) -> None:
        """Ties a layer's weight to that of `tied_to`."""
        for suffix in formats.get(self.format).TENSORS:
            name = "weight" + suffix_of(suffix)
            parameters_of(layer)[name] = parameters_of(self.tied_to)[name]


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
            "biases": self.moe.has_bias,
            f"the activation {layer.activation.value}": layer.activation is not MoEActivation.SILU,
            "router weights on their input": layer.apply_router_weight_on_input,
            "sizes that are rounded up": (hidden_size, intermediate_size_per_partition)
            != (self.moe.hidden_dim_unpadded, self.moe.intermediate_size_per_partition_unpadded),
        }
        if any(refused.values()):
            raise ValueError(f"a pair's experts cannot have {', '.join(name for name, it in refused.items() if it)}")
        check_groups(layer, self.down, intermediate_size_per_partition, self.moe.intermediate_size)
        attrs = {key: extra_weight_attrs[key] for key in ("weight_loader",)}
        layer.pair_up = num_experts, 2 * intermediate_size_per_partition, hidden_size
        layer.pair_down = num_experts, hidden_size, intermediate_size_per_partition
        layer.pair_dtype = params_dtype
        register_pair(layer, "w13_weight", self.up, layer.pair_up, params_dtype, **attrs)
        register_pair(layer, "w2_weight", self.down, layer.pair_down, params_dtype, **attrs)
        layer.register_buffer(LAM, self.rows.tokens, persistent=False)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def ends(self, layer: Any) -> tuple[LerpWeight, LerpWeight]:
        return (
            ends_of(layer, "w13_weight", self.up, layer.pair_up, layer.pair_dtype),
            ends_of(layer, "w2_weight", self.down, layer.pair_down, layer.pair_dtype),
        )

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        up, down = self.ends(layer)
        k = topk_ids.shape[-1]
        _, pair, offsets = by_expert(topk_ids, up.shape[0], layer.expert_map)
        token = pair // k
        where = {"expert_offsets": offsets, "lam": layer.intensity[: x.shape[0]], "row_to_lam": token.int()}
        gate, value = lerp_experts(x[token], up, **where).chunk(2, -1)
        rows = lerp_experts(F.silu(gate) * value, down, **where)
        y = torch.empty_like(rows)
        y[pair] = rows  # each token's k rows side by side again
        return (y.unflatten(0, (-1, k)) * topk_weights.unsqueeze(-1)).sum(1).to(x.dtype)


class PairNorm(nn.Module):
    """An RMS norm at λ: a vLLM norm with its class changed and the thinking end of its weight added."""

    intensity: Tensor
    variance_epsilon: float
    offset: float

    def forward(self, x: Any, residual: Any = None) -> Any:
        if residual is not None:
            x = residual = x + residual
        heads = x.shape[1:-1].numel()  # queries and keys have several heads per token, at one λ
        lam = self.intensity[: x.shape[0]]
        ends: Any = vector_ends(self, "weight")
        y = lerp_rms_norm(x, ends, lam, self.variance_epsilon, offset=self.offset, rows_per_lam=heads)
        return y if residual is None else (y, residual)


class PairRMSNorm(PairNorm, RMSNorm):
    """x / rms(x) · w(λ)."""

    offset = 0.0


class PairGemmaRMSNorm(PairNorm, GemmaRMSNorm):
    """x / rms(x) · (1 + w(λ))."""

    offset = 1.0


NORMS = {RMSNorm: PairRMSNorm, GemmaRMSNorm: PairGemmaRMSNorm}
