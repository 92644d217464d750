"""Tiny random pairs that vLLM's CPU kernels take, packed in every format, and merged models to compare with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import dami
import torch
import transformers
from dami.loading.quantizer import QUANT_METHOD
from dami.saving.config import PackedConfig
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dami_kernels import LerpWeight, formats

VOCABULARY = 384
LAMS = (0.0, 0.3, 0.5, 1.0, -0.4)
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**_SMALL, attention_bias=True),
    "mistral": lambda: transformers.MistralConfig(**_SMALL, sliding_window=None, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**{**_SMALL, "hidden_size": 128, "head_dim": 32}),
    "qwen3": lambda: transformers.Qwen3Config(**_SMALL, tie_word_embeddings=True),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**_SMALL, **_EXPERTS),
}


def write_ends(family: str, directory: Path, same: Sequence[str] = ()) -> tuple[Path, Path]:
    """Writes a random instruct model and a thinking one at some distance, in every parameter but those named `same`."""
    torch.manual_seed(1)
    instruct = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for parameter in instruct.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        thinking = copy.deepcopy(instruct)
        for name, parameter in thinking.named_parameters():
            if not any(part in name for part in same):
                parameter += 0.1 * torch.randn_like(parameter)
    ends = directory / "instruct", directory / "thinking"
    for model, end in zip((instruct, thinking), ends, strict=True):
        model.save_pretrained(end)
    return ends


def write_adapted(directory: Path, rank: int = 3) -> tuple[Path, Path]:
    """As `write_ends`, but that linear weights and the embedding differ by a matrix of a low rank."""
    instruct, thinking = write_ends("qwen3", directory)
    models = [AutoModelForCausalLM.from_pretrained(end, dtype=torch.bfloat16) for end in (instruct, thinking)]
    with torch.no_grad():
        for base, target in zip(*(model.parameters() for model in models), strict=True):
            if base.dim() == 2:
                down, up = torch.randn(rank, base.shape[1]), torch.randn(base.shape[0], rank)
                target.copy_(base.double() + 0.05 * up.double() @ down.double())  # rounded once
    for model, end in zip(models, (instruct, thinking), strict=True):
        model.save_pretrained(end)
    return instruct, thinking


def merged(packed: Path, lam: float) -> PreTrainedModel:
    """A plain model in float32 of a packed pair's weights at λ, blended in float64."""
    config = AutoConfig.from_pretrained(packed)
    stored = config.quantization_config
    del config.quantization_config
    assert stored.pop("quant_method") == QUANT_METHOD
    pair = PackedConfig(**stored)
    tensors = {name: tensor for file in packed.glob("*.safetensors") for name, tensor in load_file(file).items()}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            format = pair.format_of(name)
            if format is None:
                parameter.copy_(tensors[name])
                continue
            parts = tuple(tensors[name + suffix] for suffix in formats.get(format).TENSORS)
            dtype = parts[0].dtype if parts[0].is_floating_point() else parameter.dtype  # as stored
            base, target = LerpWeight(parts, format, parameter.shape, dtype).unpack()
            parameter.copy_(base.double() + lam * (target.double() - base.double()))
    return model


@cache
def reference(packed: Path, lam: float) -> PreTrainedModel:
    return merged(packed, lam)


def answer(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """What a plain model answers greedily."""
    out = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


def answers(packed: Path, prompts: list[list[int]], lams: Sequence[float], tokens: int) -> list[list[int]]:
    """What merged models answer greedily, one for each λ."""
    return [answer(reference(packed, lam), prompt, tokens) for prompt, lam in zip(prompts, lams, strict=True)]


def prompts_of(*lengths: int, seed: int = 3) -> list[list[int]]:
    """Random prompts of so many tokens each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def pack(ends: tuple[Path, Path], format: str) -> Path:
    """A packed pair beside its ends."""
    return dami.pack(*ends, ends[0].parent / format, format=format, overwrite=True)
