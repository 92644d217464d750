"""A tiny random pair of every causal-LM type that transformers knows, and how well a patched pair answers."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import dami
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Gemma3nVisionConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

LAM = (0.0, 0.37, 1.0, 1.2)
LENGTHS = (7, 8)
TOLERANCE = 1e-4
LAYERS = 2
VOCABULARY = 96


class Tower(PreTrainedModel):
    """Stands in for Gemma 3n's vision tower, which needs a package of its own, and which tokens don't reach."""

    config_class = Gemma3nVisionConfig

    def __init__(self, config: Gemma3nVisionConfig) -> None:
        super().__init__(config)
        self.projection = nn.Linear(4, 4)
        self.post_init()


AutoModel.register(Gemma3nVisionConfig, Tower, exist_ok=True)

# sizes by the pattern of their names, first match
SMALL: dict[str, Any] = {
    r"n_group|num_expert_group|n_groups|topk_group": 2,
    r"num_kv_shared_layers|num_nextn_predict_layers": 0,
    r".*vocab_size.*|unpadded_vocab_size": VOCABULARY,
    r"num_key_value_heads|num_kv_heads|.*_num_key_value_heads|kv_n_heads|num_query_groups": 2,
    r"(.*_)?(num_)?(hidden_|decoder_|encoder_)?layers|n_layers?|num_.*_layers|depth": LAYERS,
    r"(.*_)?(num_)?(attention_)?heads|n_heads?|.*_attention_heads|.*_n_heads|heads_per_ngram": 4,
    r"hidden_size_global|adapter_(in|out)_dim|adapter_input_size": 32,
    r"hidden_size|d_model|n_embd|dim|embedding_size|.*_hidden_size|emb_dim|embed_dim|embedding_dim|lru_width": 32,
    r"head_dim|.*_head_dim|d_kv|dim_head|d_head|head_size|attention_head_size|kv_channels": 8,
    r".*intermediate_size.*|.*ffn_dim|ffn_hidden_size|.*intermediate_dim": 64,
    r"d_inner|dim_ff|dff|d_ff|mlp_dim|feed_forward_size": 64,
    r"(moe_)?(num_|n_routed_)?(local_|routed_)?experts": 4,
    r"num_experts_per_tok(en)?|moe_top_?k|moe_k": 2,
    r"encoder_hash_byte_group_vocab": VOCABULARY,
    r"nemo_conv_channels|ext_pw_out_channel|depthwise_separable_out_channel|mamba_d_ssm": 64,
    r"image_size|crop_size|block_multiple_of": 32,
    r"(mamba_)?chunk_size": 4,
    r"mamba_d_state|state_size|ssm_state_size": 8,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_.*_positions|model_max_length": 64,
}


CODEBOOKS = {"musicgen": 4, "musicgen_melody": 4}  # rows of a batch that are one sequence

# Gemma's models that draft for another: all their layers attend to what that one has computed
DRAFTER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_kv_shared_layers": LAYERS,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "sliding_window": 64,
    "vocab_size_per_layer_input": 0,
    "hidden_size_per_layer_input": 0,
}

# what the patterns do not get right, by type
OWN: dict[str, dict[str, Any]] = {
    "blt": {"num_hidden_layers": 2},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "longcat_flash": {"qk_head_dim": 16, "head_dim": 8, "zero_expert_num": 2},
    "nemotron": {"num_key_value_heads": 2},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **DRAFTER}, "backbone_hidden_size": 16},
    "gemma4_unified_assistant": {
        "text_config": {"model_type": "gemma4_unified_text", **DRAFTER},
        "backbone_hidden_size": 16,
    },
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "mamba_head_dim": 16},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [8, 24],
        "axial_pos_shape": [8, 8],
        "attn_layers": ["local", "lsh"],
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # its heads are padded to 64 features
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def small(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A config of a class with every size small, those of its parts too."""
    own = OWN.get(cls.model_type, {})
    try:
        default = cls()
    except Exception:
        default = cls(**own)
    settings: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig) and name not in own:
            settings[name] = small(type(value))
        elif re.fullmatch(".*_token_id|.*_token_index", name) and isinstance(value, int):
            settings[name] = value if value < 3 else 3
        elif (value is None and name == "head_dim") or (isinstance(value, int) and not isinstance(value, bool)):
            for pattern, number in SMALL.items():
                if re.fullmatch(pattern, name):
                    settings[name] = number
                    break
    if settings.get("num_key_value_heads") and "kv_lora_rank" in vars(default):
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    depth = getattr(default, "num_hidden_layers", 0)
    per_layer = {
        name: kinds
        for name, value in vars(default).items()
        if isinstance(value, list) and len(value) == depth > 1 and isinstance(value[0], (int, str))
        if len(kinds := list(dict.fromkeys(value))) < 5
    }
    if per_layer:
        layers = max(LAYERS, *map(len, per_layer.values()))
        settings["num_hidden_layers"] = layers
        settings |= {name: (kinds * layers)[:layers] for name, kinds in per_layer.items()}
    return cls(**{**settings, **own})


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter and floating-point buffer that is stored with a model, tied ones once."""
    state = {id(t): (name, t) for name, t in reversed(model.state_dict(keep_vars=True).items())}
    return {name: t for name, t in state.values() if t.is_floating_point()}


def pair(cls: type[PreTrainedConfig]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A random model, and another at some distance from it in every tensor."""
    torch.manual_seed(1)
    config, name = small(cls), MODEL_FOR_CAUSAL_LM_MAPPING[cls]
    if cls.model_type in CODEBOOKS:  # the causal model is the decoder, of which transformers' class takes the config
        model = name(config.decoder)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return perturbed(model.eval())


def perturbed(instruct: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with noise on every tensor, and another at some distance from it in each."""
    thinking = copy.deepcopy(instruct)
    with torch.no_grad():
        for name, base in tensors(instruct).items():
            base += 0.1 * torch.randn_like(base)
            tensors(thinking)[name].copy_(base + 0.1 * torch.randn_like(base))
    return instruct, thinking


def merged(instruct: PreTrainedModel, thinking: PreTrainedModel, lam: float) -> PreTrainedModel:
    """A plain model of the weights at λ, blended in float64 and rounded once."""
    model = copy.deepcopy(instruct)
    ends = tensors(thinking)
    with torch.no_grad():
        for name, base in tensors(model).items():
            base.copy_(torch.lerp(base.double(), ends[name].double(), lam))
    return model


def distance(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of `expected`."""
    if not expected.isfinite().all():
        raise ArithmeticError("the plain model's own answer is not finite")
    return ((actual - expected).norm() / expected.norm()).nan_to_num(float("inf")).item()


@dataclass(frozen=True)
class Verdict:
    """How a patched pair of a type answers.

    Attributes:
        type: the config's `model_type`.
        name: the model's class.
        result: "right", "wrong", "refused" if it takes one λ for a whole batch only, or "not built" if transformers
            does not build the model from a shrunken config, or does not run it on tokens.
        error: the worst relative error of a row's logits; None if nothing was computed.
        reason: what refused it, or failed.
    """

    type: str
    name: str
    result: str
    error: float | None = None
    reason: str = ""


@torch.no_grad()
def verdict(cls: type[PreTrainedConfig], lengths: tuple[int, ...] = LENGTHS) -> Verdict:
    """Runs a pair of a type on a batch at four λ, of these lengths and through `generate`, against merged models."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING[cls]
    about = cls.model_type, (name[0] if isinstance(name, tuple) else name).__name__
    torch.manual_seed(3)
    each = CODEBOOKS.get(cls.model_type, 1)
    inputs = [torch.randint(4, VOCABULARY, (len(LAM) * each, length)) for length in lengths]
    square = inputs[0][:, : len(LAM)]
    try:
        ends = pair(cls)
        plain = [_answers(one, inputs) + _answers(one, [square])[:1] for lam in LAM for one in [merged(*ends, lam)]]
    except Exception as error:
        return Verdict(*about, "not built", reason=_short(error))
    model = dami.patch_model(*ends)
    torch.manual_seed(2)
    worst = distance(model(**_given(model, inputs[0]), intensity=LAM[1]).logits, plain[1][0])
    try:
        mixed = _answers(model, inputs, intensity=LAM)
    except ValueError as error:
        return Verdict(*about, "refused" if worst < TOLERANCE else "wrong", worst, _short(error))
    reason = ""
    try:
        mixed += _answers(model, [square], intensity=LAM)[:1]
    except ValueError as error:
        reason = f"refused with as many tokens as sequences: {_short(error)}"
    for row in range(len(LAM)):
        own = slice(row * each, (row + 1) * each)
        worst = max(worst, *(distance(a[own], b[own]) for a, b in zip(mixed, plain[row], strict=False)))
    return Verdict(*about, "right" if worst < TOLERANCE else "wrong", worst, reason)


def _answers(model: PreTrainedModel, inputs: list[Tensor], **intensity: Any) -> list[Tensor]:
    """The logits for each input, and those of four tokens generated after the first."""
    answers = []
    for ids in inputs:
        torch.manual_seed(2)  # some draw random numbers, for hashes
        answers.append(model(**_given(model, ids), **intensity).logits)
    if not model.can_generate() or model.config.model_type.removesuffix("_decoder") in CODEBOOKS or _drafts(model):
        return answers
    torch.manual_seed(2)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    new = model.generate(inputs[0], output_logits=True, return_dict_in_generate=True, **options, **intensity)
    return [*answers, torch.stack(new.logits, 1)]


def _drafts(model: PreTrainedModel) -> bool:
    """Whether a model only goes on from what another has computed."""
    return model.config.model_type.endswith("_assistant")


def _given(model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """What a model takes for tokens: their ids, or if it drafts the next, the states of the other model."""
    if not _drafts(model):
        return {"input_ids": ids}
    generator, width = torch.Generator().manual_seed(4), 2 * model.config.backbone_hidden_size
    table = torch.randn(VOCABULARY, width + 2 * 2 * 8, generator=generator)[ids]  # keys and values of two heads
    states = table[..., width:].view(*ids.shape, 2, 2, 8).permute(2, 0, 3, 1, 4)
    shared = dict.fromkeys(("full_attention", "sliding_attention"), (states[0], states[1]))
    return {"inputs_embeds": table[:, -1:, :width], "shared_kv_states": shared}


def _short(error: Exception) -> str:
    """The first sentence of an error, without what differs from run to run."""
    return re.sub(r"\s+", " ", str(error)).strip().split(". ")[0][:240]
