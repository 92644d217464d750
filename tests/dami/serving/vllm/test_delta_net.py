"""Qwen's gated delta nets: what vLLM's kernels get, and Qwen3-Next against merged models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.dami.serving.vllm.engines import ask, engine, tokens_of
from tests.dami.serving.vllm.pairs import LAMS, answers, prompts_of

vllm = pytest.importorskip("vllm")

from dami.serving.vllm import delta_net  # noqa: E402

PROMPTS = prompts_of(5, 17, 33, 9, 21)


def test_a_state_that_decays_as_at_the_intensity() -> None:
    generator = torch.Generator().manual_seed(0)
    a, decay, bias = (torch.randn(4096, generator=generator) * scale for scale in (6, 3, 6))
    wanted = decay.double().exp() * F.softplus(a.double() + bias.double())
    found = F.softplus(delta_net.as_decaying(a, decay, bias).double())
    plain = decay.exp() * F.softplus(a + bias)
    error, unit = ((torch.exp(-x.double()) - torch.exp(-wanted)).abs().max() for x in (found, plain))
    assert error <= 4 * unit
    assert delta_net.as_decaying(torch.tensor(-1e4), torch.tensor(0.0), torch.tensor(0.0)).isfinite()


def test_sequences_are_convolved_at_their_intensities() -> None:
    """With one token, more than the width, fewer, and none; each goes on where another step has ended."""
    generator = torch.Generator().manual_seed(0)
    lengths, width, channels = [1, 6, 2, 0, 3], 4, 8
    x = torch.randn(sum(lengths), channels, generator=generator)
    before = torch.randn(len(lengths), width - 1, channels, generator=generator)
    base, target = (torch.randn(channels, width, generator=generator) for _ in range(2))
    lam = torch.rand(len(x), 1, generator=generator)
    starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    y, last = delta_net.convolved(x, before, starts, base, target, lam)
    wanted, kept = [], []
    for own, history, each in zip(x.split(lengths), before, lam.double().split(lengths), strict=True):
        inputs = torch.cat([history, own])
        for number, at in enumerate(each):
            weight = base.double() + at * (target.double() - base.double())
            wanted.append((inputs[number : number + width].double().T * weight).sum(1))
        kept.append(inputs[-(width - 1) :])
    torch.testing.assert_close(y.double(), torch.stack(wanted), rtol=1e-5, atol=1e-5)
    assert torch.equal(last, torch.stack(kept))


def in_torch(mixed_qkv: Tensor, b: Tensor, a: Tensor, out: Tensor, name: str) -> None:
    """What vLLM's kernels compute, by transformers' own functions in float32: those for the CPU take bfloat16 only."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    layer: Any = context.no_compile_layers[name]
    if context.attn_metadata is None:
        return
    step: Any = context.attn_metadata[name]
    starts = step.non_spec_query_start_loc.tolist()
    conv, state = layer.kv_cache
    for number, slot in enumerate(step.non_spec_state_indices_tensor[: step.num_prefills + step.num_decodes].tolist()):
        rows = slice(starts[number], starts[number + 1])
        if step.has_initial_state is not None and not step.has_initial_state[number]:
            conv[slot], state[slot] = 0, 0
        inputs = torch.cat([conv[slot], mixed_qkv[rows]])
        conv[slot] = inputs[1 - layer.conv_kernel_size :]
        x = F.conv1d(inputs.T, layer.conv1d.weight, groups=inputs.shape[1]).T
        x = F.silu(x) if layer.activation else x
        q, k, v = (part.unsqueeze(0) for part in x.split([layer.key_dim, layer.key_dim, layer.value_dim], 1))
        each = layer.num_v_heads // layer.num_k_heads
        q, k = (part.unflatten(2, (layer.num_k_heads, -1)).repeat_interleave(each, 2) for part in (q, k))
        g = -layer.A_log.exp() * F.softplus(a[rows] + layer.dt_bias)
        y, after = torch_recurrent_gated_delta_rule(
            q,
            k,
            v.unflatten(2, (layer.num_v_heads, -1)),
            g=g.unsqueeze(0),
            beta=b[rows].sigmoid().unsqueeze(0),
            initial_state=state[slot].transpose(1, 2).unsqueeze(0),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        out[rows], state[slot] = y[0], after[0].transpose(1, 2)


@pytest.mark.parametrize("format", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_qwen3_next(packed: Any, ends: Any, format: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ends, or a packed pair, with prompts that come in pieces."""
    monkeypatch.setattr(delta_net, "cpu_gdn_attention_core", in_torch)
    pair = packed("qwen3_next", format or "pair")
    expected = answers(pair, PROMPTS, LAMS, 16)
    with engine(*([pair] if format else ends("qwen3_next")), max_num_batched_tokens=32) as llm:
        assert tokens_of(ask(llm, PROMPTS)) == expected


@pytest.mark.slow
def test_qwen3_next_by_vllm_s_kernels(ends: Any) -> None:
    """They take bfloat16 only, and a rounding may change a token, so the self-test decides."""
    with engine(*ends("qwen3_next"), dtype="bfloat16") as llm:
        ask(llm, PROMPTS)
