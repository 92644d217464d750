"""Tiny random pairs of every model family, and merged models to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 101

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _config(name: str, **own: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: getattr(transformers, name)(**{**_SMALL, **own})


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _config("LlamaConfig", attention_bias=True, mlp_bias=True),
    "qwen2": _config("Qwen2Config", tie_word_embeddings=True),
    "qwen3": _config("Qwen3Config", tie_word_embeddings=True),
    "mistral": _config("MistralConfig", sliding_window=4),
    "gemma2": _config("Gemma2Config", query_pre_attn_scalar=6, sliding_window=4),
    "gemma3": _config("Gemma3TextConfig", query_pre_attn_scalar=6, sliding_window=4),
    "phi3": _config("Phi3Config"),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
}


def pair(family: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A random instruct model and a thinking model at some distance: every parameter differs, norms and biases too."""
    torch.manual_seed(1)
    instruct = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for parameter in instruct.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        thinking = copy.deepcopy(instruct)
        for parameter in thinking.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return instruct.to(dtype), thinking.to(dtype)


@cache
def references(family: str, lam: float) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Plain models of `pair(family)` at λ: in float32, and in float64 as the oracle."""
    ends = pair(family)
    return merged(*ends, lam, torch.float32), merged(*ends, lam, torch.float64)


def merged(instruct: PreTrainedModel, thinking: PreTrainedModel, lam: float, dtype: torch.dtype) -> PreTrainedModel:
    """A plain model of the weights at λ, blended in float64 and rounded once to `dtype`."""
    model = copy.deepcopy(instruct).double()
    with torch.no_grad():
        for parameter, end in zip(model.parameters(), thinking.parameters(), strict=True):
            parameter += lam * (end.double() - parameter)
    return model.to(dtype)


def batch(padding: str, rows: int = 4) -> dict[str, Tensor]:
    """Random prompts of different lengths, padded on the left or on the right, none of them of length 1."""
    length = 7
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        pad = (2 * row) % (length - 2)
        mask[row, slice(0, pad) if padding == "left" else slice(length - pad, length)] = 0
    ids = torch.randint(3, VOCABULARY, (rows, length)) * mask
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
