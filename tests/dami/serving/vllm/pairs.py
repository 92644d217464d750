"""Tiny random pairs that vLLM's CPU kernels take, packed in every format, and merged models to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import dami
import torch
import transformers
from dami.loading.quantizer import QUANT_METHOD
from dami.saving.config import PackedConfig
from safetensors.torch import load_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)

from dami_kernels import LerpWeight, formats

# Before vLLM is imported: engines in this process, one after another, and room for a small cache (in GiB).
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
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
_MLA = {
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "head_dim": 64,
    "num_key_value_heads": 4,
}
_SPARSE = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1}
_GROUPS = {
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
}


def _config(name: str, **own: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: getattr(transformers, name)(**{**_SMALL, **own})


def _with_tower(
    name: str, text: str, tower: dict[str, Any], tied: bool = False, **own: Any
) -> Callable[[], PreTrainedConfig]:
    """A model of text and images: `text` names the config of its language model."""
    return lambda: getattr(transformers, name)(
        text_config=_config(text, tie_word_embeddings=tied, **own)().to_dict(),
        vision_config=tower,
        tie_word_embeddings=tied,
    )


_TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
_TOWER |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
_SIGLIP = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
_SIGLIP |= {"image_size": 64, "patch_size": 16}
_PIXTRAL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
_PIXTRAL |= {"image_size": 64, "patch_size": 16}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}}


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _config("LlamaConfig", attention_bias=True),
    "mistral": _config("MistralConfig", sliding_window=None, tie_word_embeddings=True),
    "qwen2": _config("Qwen2Config", hidden_size=128),
    "qwen3": _config("Qwen3Config", tie_word_embeddings=True),
    "qwen3_moe": _config("Qwen3MoeConfig", **_EXPERTS),
    "cohere2": _config("Cohere2Config", sliding_window=64, num_hidden_layers=4),
    "deepseek_v3": _config("DeepseekV3Config", **_MLA, **_SPARSE, **_GROUPS),
    "deepseek_v2": _config("DeepseekV2Config", **{**_MLA, "q_lora_rank": None}, **_SPARSE, n_group=1, topk_group=1),
    "ernie4_5": _config("Ernie4_5Config"),
    "ernie4_5_moe": _config(
        "Ernie4_5_MoeConfig", moe_num_experts=8, moe_k=2, moe_intermediate_size=64, moe_num_shared_experts=1
    ),
    "exaone4": _config("Exaone4Config", sliding_window=None, layer_types=["full_attention"] * 2),
    "gemma": _config("GemmaConfig"),
    "gemma2": _config("Gemma2Config", query_pre_attn_scalar=32, sliding_window=64),
    "gemma3": _with_tower(
        "Gemma3Config", "Gemma3TextConfig", _SIGLIP, tied=True, query_pre_attn_scalar=32, sliding_window=64
    ),
    "gemma3_text": _config("Gemma3TextConfig", query_pre_attn_scalar=32, sliding_window=64),
    "glm4": _config("Glm4Config"),
    "glm4_moe": _config("Glm4MoeConfig", **_SPARSE, **_GROUPS, use_qk_norm=True),
    "gpt_oss": _config("GptOssConfig", num_local_experts=8, num_experts_per_tok=2),
    "granite": _config("GraniteConfig", attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=2.0),
    "lfm2": _config("Lfm2Config", hidden_size=128, conv_dim=128, block_dim=128, layer_types=["conv", "full_attention"]),
    "mellum": _config(
        "MellumConfig", **_EXPERTS, sliding_window=64, layer_types=["sliding_attention", "full_attention"]
    ),
    "ministral3": _config("Ministral3Config"),
    "mistral3": _with_tower("Mistral3Config", "Ministral3Config", _PIXTRAL, tied=True),
    "mixtral": _config("MixtralConfig", num_local_experts=8),
    "olmo2": _config("Olmo2Config"),
    "olmo3": _config("Olmo3Config", sliding_window=64),
    "olmoe": _config("OlmoeConfig", hidden_size=128, num_experts=8, num_experts_per_tok=2),
    "phi3": _config("Phi3Config", sliding_window=None),
    "qwen2_moe": _config("Qwen2MoeConfig", hidden_size=128, **_EXPERTS, shared_expert_intermediate_size=64),
    "qwen3_next": _config(
        "Qwen3NextConfig",
        **_EXPERTS,
        shared_expert_intermediate_size=64,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
    ),
    "qwen3_vl": _with_tower("Qwen3VLConfig", "Qwen3VLTextConfig", _TOWER, **_SECTIONS),
    "qwen3_vl_moe": _with_tower(
        "Qwen3VLMoeConfig", "Qwen3VLMoeTextConfig", _TOWER, **_EXPERTS, **_SECTIONS, mlp_only_layers=[]
    ),
    "seed_oss": _config("SeedOssConfig"),
    "smollm3": _config("SmolLM3Config", no_rope_layers=[1, 0]),
    "stablelm": _config("StableLmConfig", hidden_size=128),
}


WITH_TOWER = {"gemma3", "mistral3", "qwen3_vl", "qwen3_vl_moe"}  # models of text and images


def model_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that makes a config's model."""
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def stored_in(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and floating-point buffer that is stored with a model, tied ones once."""
    tensors = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return ((name, tensor) for name, tensor in reversed(tensors.values()) if tensor.is_floating_point())


def _size(name: str) -> float:
    """Returns by how much a parameter is changed: so that answers depend on it."""
    return 2.0 if name.endswith("sinks") else 0.1


def write_ends(family: str, directory: Path, same: Sequence[str] = ()) -> tuple[Path, Path]:
    """Writes a random instruct model and a thinking one at some distance, in every parameter but those named `same`."""
    torch.manual_seed(1)
    config = FAMILIES[family]()
    instruct = model_class(config).from_config(config).eval()
    with torch.no_grad():
        for name, tensor in stored_in(instruct):
            tensor += _size(name) * torch.randn_like(tensor)
        thinking = copy.deepcopy(instruct)
        for name, tensor in stored_in(thinking):
            if not any(part in name for part in same):
                tensor += _size(name) * torch.randn_like(tensor)
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
    model = model_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in stored_in(model):
            format = pair.format_of(name)
            if format is None:
                tensor.copy_(tensors[name])
                continue
            parts = tuple(tensors[name + suffix] for suffix in formats.get(format).TENSORS)
            dtype = parts[0].dtype if parts[0].is_floating_point() else tensor.dtype  # as stored
            if config.model_type == "gpt_oss" and tensor.dim() == 3:  # stored transposed
                parts, tensor = tuple(part.mT for part in parts), tensor.mT
            base, target = LerpWeight(parts, format, tensor.shape, dtype).unpack()
            tensor.copy_(base.double() + lam * (target.double() - base.double()))
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


def answer_by_place(packed: Path, prompt: list[int], tokens: int, lam: Callable[[int], float]) -> list[int]:
    """What is answered greedily where each token is read by a merged model of its own place's λ."""
    cache, sequence, read = DynamicCache(), [*prompt], 0
    while len(sequence) < len(prompt) + tokens:
        end = next((place for place in range(read, len(sequence)) if lam(place) != lam(read)), len(sequence))
        logits = reference(packed, lam(read))(torch.tensor([sequence[read:end]]), past_key_values=cache).logits
        read = end
        if read == len(sequence):
            sequence.append(int(logits[0, -1].argmax()))
    return sequence[len(prompt) :]


def followers(packed: Path, sequence: list[int], lam: Callable[[int], float]) -> list[int]:
    """What greedily follows each token of a sequence where each is read by a merged model of its own place's λ."""
    cache, found, read = DynamicCache(), [], 0
    for lam_of_run, places in groupby(range(len(sequence)), lam):
        end = read + len([*places])
        logits = reference(packed, lam_of_run)(torch.tensor([sequence[read:end]]), past_key_values=cache).logits
        found += logits[0].argmax(-1).tolist()
        read = end
    return found


def prompts_of(*lengths: int, seed: int = 3) -> list[list[int]]:
    """Random prompts of so many tokens each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def pack(ends: tuple[Path, Path], format: str) -> Path:
    """A packed pair beside its ends."""
    return dami.pack(*ends, ends[0].parent / format, format=format, overwrite=True)
