"""DeepSeek's attention (MLA) of a pair in vLLM, whose projection from latents to keys and values has two forms.

New tokens and chunks of their context are projected as any rows are, but these are not the tokens of the step. Decoding
leaves the latents as they are and moves the projection to queries and outputs. vLLM computes its matrices for that
when it loads a model, which a pair must do for each end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.attention.attention import set_default_quant_scales

from dami.serving.vllm.ends import ends_of
from dami.serving.vllm.methods import LinearMethod
from dami.serving.vllm.rows import StepIntensities
from dami_kernels import lerp_linear
from dami_kernels.rows import lerp


class LatentProjection(LinearMethod):
    """The projection of latents, for rows whose λ its attention tells beforehand.

    Attributes:
        lams: λ of the rows of each call to come: float32 [rows].
    """

    def __init__(self, method: LinearMethod) -> None:
        super().__init__(method.rows, method.format, method.ranks)
        self.lams: deque[Tensor] = deque()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return lerp_linear(x, ends_of(layer, "weight"), self.lams.popleft())


class Absorbed:
    """A matrix for each head at the λ of each token, in place of the one that vLLM would compute when it loads a model.

    `torch.bmm` is the only function that takes it.
    """

    def __init__(self, rows: StepIntensities, base: Tensor, target: Tensor) -> None:
        """
        Args:
            rows: λ of the step. The tokens that decode come first.
            base, target: both ends [heads, K, N].
        """
        self.base, self.target, self.rows = base.contiguous(), target.contiguous(), rows
        self.shape = base.shape

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        if func is not torch.bmm:
            raise TypeError(f"a pair's projection of latents is read by torch.bmm only, got {func}")
        (x, weight), out = args, (kwargs or {}).get("out")
        lam = weight.rows.tokens[: x.shape[1]].view(1, -1, 1)
        base, target = (torch.bmm(x, end).float() for end in (weight.base, weight.target))
        y = lerp(base, target, lam).to(x.dtype)
        return y if out is None else out.copy_(y)


class PairMLA(MLAAttention):
    """MLA at λ: vLLM's own with its class changed."""

    kv_b_proj: Any
    rows: StepIntensities

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.impl.process_weights_after_loading(act_dtype)
        heads, keys = self.num_heads, self.qk_nope_head_dim
        ends = [
            end.to(act_dtype).view(heads, keys + self.v_head_dim, self.kv_lora_rank).split([keys, self.v_head_dim], 1)
            for end in ends_of(self.kv_b_proj, "weight").unpack()
        ]
        keys_of, values_of = zip(*ends, strict=True)
        self.__dict__["W_UK_T"] = Absorbed(self.rows, *keys_of)
        self.__dict__["W_UV"] = Absorbed(self.rows, *(end.transpose(1, 2) for end in values_of))
        set_default_quant_scales(self, register_buffer=False)


def convert(attention: Any) -> None:
    """Turns an attention whose projection of latents is a pair into one at λ.

    Raises:
        ValueError: if it is of a kind that computes otherwise.
    """
    projection = attention.kv_b_proj
    kinds = {
        "sparse": attention.impl.is_sparse,
        "AMX's": attention.is_amx_bmm_enabled,
        "AITER's": attention.is_aiter_triton_fp4_bmm_enabled or attention.is_aiter_triton_fp8_bmm_enabled,
        "replicated queries'": attention.dcp_q_replicate,
        "subclass": type(attention) is not MLAAttention,
    }
    if any(kinds.values()) or projection.bias is not None:
        named = ", ".join(name for name, found in kinds.items() if found) or "one with a bias"
        raise ValueError(
            f"{attention.layer_name}: a pair's MLA cannot be of this kind: {named}; VLLM_MLA_DISABLE=1 takes another, "
            "and on CPUs --attention-backend CPU_MLA"
        )
    attention.__class__ = PairMLA
    projection.quant_method = method = LatentProjection(projection.quant_method)
    attention.rows = method.rows
    forward = attention.impl.forward_mha

    def forward_mha(q: Tensor, latents: Tensor, k_pe: Tensor, cache: Any, metadata: Any, *rest: Any, **own: Any) -> Any:
        method.lams.extend(lams_of_calls(method.rows, latents.shape[0], metadata))
        return forward(q, latents, k_pe, cache, metadata, *rest, **own)

    attention.impl.forward_mha = forward_mha


def lams_of_calls(rows: StepIntensities, count: int, metadata: Any) -> Iterator[Tensor]:
    """Yields the λ of the rows that a step projects: of its new tokens first, then of each chunk of their context."""
    new = rows.tokens[metadata.num_decode_tokens :][:count]
    yield new
    prefill = metadata.prefill
    if prefill.chunked_context is not None:
        each = new[prefill.query_start_loc[:-1].long()]
        for chunk in prefill.chunked_context.chunks:
            yield each[chunk.request_slice][chunk.token_to_seq[: chunk.num_context_tokens].long()]
