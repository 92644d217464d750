"""A self-test at load time: compares a few tokens at λ=0 and λ=1 in one batch with both ends computed in plain torch.

It runs the model as it will be served, except for attention, which adds each token's queries, keys and values instead.
So tokens don't interact and no cache is needed, but every parameter affects the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from dami.layers.routing import by_expert
from dami.serving.vllm.methods import EmbeddingMethod, ExpertsMethod, LinearMethod, PairNorm, vector_ends
from dami.serving.vllm.quantization import PairQuantization
from dami_kernels import LerpWeight, formats

TOKENS = 8


@torch.inference_mode()
def run(model: Any, config: VllmConfig) -> None:
    """Compares the model at λ = 0, 1, 0, 1, … with the ends.

    Raises:
        RuntimeError: if rows at λ=0 differ from the instruct end or rows at λ=1 from the thinking end, or if the model
            has an attention that cannot be replaced. Without a cache that would return zeros and hide errors before it.
    """
    pair: Any = PairQuantization.of(config)
    device = pair.rows.tokens.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.model_config.get_vocab_size(), (TOKENS,), generator=generator).to(device)
    positions = torch.arange(TOKENS, device=device)

    def outputs() -> list[Tensor]:
        with set_forward_context(None, config, num_tokens=TOKENS):
            states = model(ids, positions)
        logits = model.compute_logits(states)
        return [states.float()] if logits is None else [states.float(), logits.float()]  # only one process has logits

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, AttentionLayerBase):
                if getattr(type(module), "forward", None) is not Attention.forward:
                    raise RuntimeError(
                        f"the pair cannot be tested: {name} is a {type(module).__name__}, an attention of a kind that "
                        "the self-test does not know; it is not served"
                    )
                stack.enter_context(attribute(module, "forward", partial(added, module)))
            if hasattr(module, "do_not_compile"):
                stack.enter_context(attribute(module, "do_not_compile", True))
        lam = positions.remainder(2).float()
        pair.rows.set(lam, positions)
        mixed = outputs()
        pair.rows.set(torch.zeros_like(lam), positions)
        ends = []
        for end in (0, 1):
            with plain(model, end):
                ends.append(outputs())
    eps = torch.finfo(config.model_config.dtype).eps
    for ours, instruct, thinking in zip(mixed, *ends, strict=True):
        for end, own, other in ((0, instruct, thinking), (1, thinking, instruct)):
            rows = slice(end, None, 2)
            error, size, distance = ((x[rows].norm(dim=1)) for x in (ours - own, own, other - own))
            # rounding may route a token to another expert, so not every row has to agree
            allowed = size * max(8 * eps, 1e-3)
            if not (error <= allowed).float().mean() > 0.5:
                raise RuntimeError(
                    f"the pair fails its self-test: at λ={end} a token's output is off by {error.median():.3g}, "
                    f"where the ends are {distance.median():.3g} apart; it is not served"
                )


def added(attention: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
    """Replaces attention by the sum of each token's queries, keys and values."""
    heads, shared = attention.num_heads, attention.num_kv_heads
    both = (key + value).unflatten(-1, (shared, -1)).repeat_interleave(heads // shared, 1)
    return query + both.flatten(-2)


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of an object inside a `with` block."""
    before = owner.__dict__.get(name, owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is owner:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def plain(model: nn.Module, end: int) -> Iterator[None]:
    """Makes a model compute its pairs at one end, 0 or 1, in plain torch and float32, layer by layer."""
    with ExitStack() as stack:
        for module in model.modules():
            method: Any = getattr(module, "quant_method", None)
            if isinstance(method, (LinearMethod, EmbeddingMethod)):
                stack.enter_context(attribute(method, "apply", partial(_linear, method, end=end)))
            if isinstance(method, EmbeddingMethod):
                stack.enter_context(attribute(method, "embedding", partial(_embedding, method, end=end)))
            if isinstance(method, ExpertsMethod):
                stack.enter_context(attribute(method, "apply", partial(_experts, method, end=end)))
            if isinstance(module, PairNorm):
                stack.enter_context(attribute(module, "forward", partial(_norm, module, end=end)))
        yield


def _product(x: Tensor, weight: LerpWeight, end: int) -> Tensor:
    """Computes x · W_endᵀ in float32, a block of rows of W at a time."""
    blocks = formats.float_blocks(weight.format, weight.tensors, weight.shape[-1])
    return torch.cat([F.linear(x.float(), (base, target)[end]) for _, base, target in blocks], -1)


def _linear(method: Any, layer: Any, x: Tensor, bias: Tensor | None = None, *, end: int) -> Tensor:
    y = _product(x, method.ends(layer), end)
    if bias is not None:
        ends: Any = vector_ends(layer, "bias")
        y = y + ends.tensors[end].float()
    return y.to(x.dtype)


def _embedding(method: Any, layer: Any, ids: Tensor, *, end: int) -> Tensor:
    weight = method.ends(layer)
    found = formats.get(weight.format).unpack(*weight.tensors, columns=weight.shape[-1], rows=ids)
    return found[end].to(weight.dtype)


def _experts(
    method: Any, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *rest: Any, end: int, **options: Any
) -> Tensor:
    y = x.new_zeros(x.shape, dtype=torch.float32)
    up, down = method.ends(layer)
    expert, pairs, _ = by_expert(topk_ids, up.shape[0], layer.expert_map)
    for which, index in zip(expert.tolist(), pairs.tolist(), strict=True):
        if which < up.shape[0]:
            token, slot = divmod(index, topk_ids.shape[-1])
            gate, value = _product(x[token], _one(up, which), end).chunk(2, -1)
            y[token] += topk_weights[token, slot] * _product(F.silu(gate) * value, _one(down, which), end)
    return y.to(x.dtype)


def _one(experts: LerpWeight, which: int) -> LerpWeight:
    """Returns the weight of one expert."""
    tensors = tuple(tensor[which] for tensor in experts.tensors)
    return LerpWeight(tensors, experts.format, experts.shape[1:], experts.dtype)


def _norm(norm: Any, x: Tensor, residual: Tensor | None = None, *, end: int) -> Any:
    if residual is not None:
        x = residual = x + residual
    ends: Any = vector_ends(norm, "weight")
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    y = (wide * scale * (norm.offset + ends.tensors[end].float())).to(x.dtype)
    return y if residual is None else (y, residual)
