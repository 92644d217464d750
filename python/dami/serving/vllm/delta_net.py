"""Qwen's gated delta nets of a pair in vLLM, whose kernels take one convolution and one decay for all tokens.

A pair convolves by itself, at the λ of each token, and gives the kernels a convolution that changes nothing. The cache
still holds what goes into the convolution. The state decays by exp(−exp(A) · softplus(a + bias)), with A and a bias for
each head, and a for each token. The kernels get zeros for A and the bias, and an a that decays as at the token's λ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.cpu.gdn_attention import cpu_gdn_attention_core

from dami.serving.vllm.ends import Ends, ends_in, ends_of
from dami.serving.vllm.rows import StepIntensities
from dami.upstream import parameters_of
from dami_kernels.rows import lerp

DECAY = ("A_log", "dt_bias")


class PairDeltaNet(QwenGatedDeltaNetAttention):
    """A gated delta net at λ: vLLM's own with its class changed.

    Attributes:
        rows: λ of the step.
        own_activation: name of the activation after the convolution.
    """

    rows: StepIntensities
    own_activation: str

    def _forward_core(self, mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor) -> None:
        steps: Any = get_forward_context().attn_metadata
        step = steps.get(self.prefix) if steps else None
        if step is None:  # a step that warms up
            return self.kernels(mixed_qkv, b, a, core_attn_out)
        count, x = step.num_actual_tokens, mixed_qkv[: step.num_actual_tokens]
        lam = self.rows.tokens[:count].unsqueeze(1)
        slots = step.non_spec_state_indices_tensor[: step.num_decodes + step.num_prefills].long()
        starts = step.non_spec_query_start_loc[: len(slots) + 1].long()
        cache = self.kv_cache[0].transpose(1, 2) if is_conv_state_dim_first() else self.kv_cache[0]
        before = cache[slots]
        if step.has_initial_state is not None:
            before = torch.where(step.has_initial_state[: len(slots), None, None], before, 0)
        first, final = (end.float().flatten(1) for end in ends_of(self.conv1d, "weight").tensors)
        y, last = convolved(x, before, starts, first, final, lam)
        decay, bias = (
            lerp(base.float(), target.float(), lam) for base, target in (ends_of(self, name).tensors for name in DECAY)
        )
        self.kernels(F.silu(y).to(x.dtype), b[:count], as_decaying(a[:count], decay, bias), core_attn_out)
        cache[slots] = last
        return None

    def kernels(self, *tensors: Tensor) -> None:
        """Calls vLLM's kernels, which read the layer's parameters under the names that vLLM knows."""
        if tensors[0].is_cpu:
            cpu_gdn_attention_core(*tensors, self.prefix)
        else:
            QwenGatedDeltaNetAttention._forward_core(self, *tensors)

    @contextmanager
    def at(self, lam: Tensor, see: Callable[[torch.Size], None]) -> Iterator[None]:
        """Computes as vLLM does, at one λ, and calls `see` with the shape of the rows."""

        def plain(mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor) -> None:
            see(mixed_qkv.shape[:-1])
            self.kernels(mixed_qkv, b, a, core_attn_out)

        neutral = {}
        for part, name in parts(self):
            neutral[part, name] = parameters_of(part)[name]
            base, target = ends_of(part, name).tensors
            blended = lerp(base.float(), target.float(), lam.to(base.device)).to(base.dtype)
            parameters_of(part)[name] = nn.Parameter(blended, requires_grad=False)
        self.conv1d.quant_method.process_weights_after_loading(self.conv1d)  # which some kernels want packed
        self.__dict__.update(_forward_core=plain, activation=self.own_activation)
        yield
        del self.__dict__["_forward_core"]
        self.__dict__["activation"] = None
        for (part, name), tensor in neutral.items():
            parameters_of(part)[name] = tensor


def convolved(
    x: Tensor, before: Tensor, starts: Tensor, base: Tensor, target: Tensor, lam: Tensor
) -> tuple[Tensor, Tensor]:
    """Convolves sequences, each channel by itself, at the λ of each token.

    Args:
        x: inputs [tokens, channels] of all sequences, one after the other.
        before: the inputs before these of each sequence [sequences, width − 1, channels].
        starts: where the sequences start, and the end: int64 [sequences + 1].
        base, target: both ends of the weight [channels, width].
        lam: [tokens, 1].

    Returns:
        the result in float32, and the last inputs of each sequence, as in `before`.
    """
    reach = before.shape[1]
    inputs = torch.cat([before.flatten(0, 1), x])

    def at(sequence: Tensor, place: Tensor) -> Tensor:
        """Returns the inputs of these sequences at these places, where those of `before` are negative."""
        old, new = (sequence + 1) * reach + place, before.shape[0] * reach + starts[sequence] + place
        return inputs[torch.where(place < 0, old, new)]

    token, each = (torch.arange(len(of), device=x.device) for of in (x, before))
    owner = torch.searchsorted(starts[1:], token, right=True).clamp(max=len(before) - 1)
    place = token - starts[owner] - reach
    taps = enumerate(zip(base.T, target.T, strict=True))
    y = sum(at(owner, place + number).float() * lerp(*ends, lam) for number, ends in taps)
    last = torch.stack([at(each, starts.diff() - reach + number) for number in range(reach)], 1)
    return y, last  # type: ignore[return-value]


def as_decaying(a: Tensor, decay: Tensor, bias: Tensor) -> Tensor:
    """Returns the x with softplus(x) = exp(decay) · softplus(a + bias), in the dtype of a."""
    wanted = (decay.exp() * F.softplus(a.float() + bias)).clamp_min(torch.finfo(torch.float32).tiny)
    return (wanted + torch.log(-torch.expm1(-wanted))).to(a.dtype)


def parts(layer: Any) -> list[tuple[nn.Module, str]]:
    """Returns the parameters that the kernels read, by their modules and names."""
    return [(layer.conv1d, "weight"), *((layer, name) for name in DECAY)]


def convert(layer: Any, rows: StepIntensities) -> None:
    """Turns a gated delta net into one at λ.

    Raises:
        ValueError: if it computes otherwise than `PairDeltaNet`.
    """
    refused = {
        "speculation": layer.num_spec,
        f"the activation {layer.activation}": layer.activation not in ("silu", "swish"),
        "a bias of its convolution": layer.conv1d.bias is not None,
    }
    if any(refused.values()):
        named = ", ".join(name for name, found in refused.items() if found)
        raise ValueError(f"{layer.prefix}: a pair's gated delta net cannot have {named}")
    for part, name in parts(layer):
        tensor: Any = parameters_of(part)[name]
        if name not in ends_in(part):  # the same in both ends
            Ends("pair", tensor.shape, tensor.dtype, [tensor, tensor], [(part, name)]).keep()
        neutral = torch.zeros_like(tensor)
        if part is layer.conv1d:
            neutral[..., -1] = 1
        parameters_of(part)[name] = nn.Parameter(neutral, requires_grad=False)
    layer.__class__ = PairDeltaNet
    layer.__dict__.update(
        rows=rows, own_activation=layer.activation, activation=None, _forward_method=layer.forward_cuda
    )
