"""GGUF files as ends, written here as llama.cpp would, and read by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dami
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from tests.dami.families import VOCABULARY, batch
from tests.dami.test_checkpoints import save

gguf = pytest.importorskip("gguf")

LAM = [0.0, 0.37, 1.0, 1.2]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
}


def write(model: PreTrainedModel, file: Path, kind: Any = None) -> Path:
    """Writes a tiny Qwen2 in float32, or its matrices in the type `kind`."""
    config = model.config
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*(f"w{i}" for i in range(config.vocab_size - 2)), "w", "1"])
    writer.add_token_merges(["w 1"])
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        values = tensor.float().numpy()
        if kind is not None and tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def models(hidden: int = 24) -> list[PreTrainedModel]:
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(AutoModelForCausalLM.from_config(config).eval())
    return found


@pytest.fixture
def ends(tmp_path: Path) -> tuple[Path, ...]:
    return tuple(write(model, tmp_path / f"{name}.gguf") for name, model in zip("ab", models(), strict=True))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(3)
    return model(**batch("left"), intensity=LAM).logits


def test_two_files(ends: tuple[Path, ...], tmp_path: Path) -> None:
    expected = logits(dami.patch_model(*models()))
    model, tokenizer = dami.load_pair(*ends)
    assert torch.equal(logits(model), expected)
    assert tokenizer.get_vocab()["w8"] == 8
    packed, _ = dami.load_pair(dami.pack(*ends, tmp_path / "packed", "pair"))
    assert torch.equal(logits(packed), expected)


@pytest.mark.parametrize("which", [0, 1], ids=["instruct", "thinking"])
def test_a_file_and_a_checkpoint(which: int, ends: tuple[Path, ...], tmp_path: Path) -> None:
    other = save(models()[1 - which], tmp_path / "other", words=101)
    sources = [ends[0], other] if which == 0 else [other, ends[1]]
    for end in other.glob("*token*"):
        end.unlink()  # of another kind
    model, _ = dami.load_pair(*sources, dtype=torch.float32)
    assert torch.equal(logits(model), logits(dami.patch_model(*models())))


def test_an_adapter_on_a_file(ends: tuple[Path, ...], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(models()[0], peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = batch("left")
    with torch.no_grad():
        found = dami.load_pair(ends[0], tmp_path / "adapter", "lowrank")[0](**inputs, intensity=1.0).logits
        torch.testing.assert_close(found, adapted.eval()(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_quantised_files(tmp_path: Path) -> None:
    """The ends are what transformers makes of the codes."""
    kind = gguf.GGMLQuantizationType.Q8_0
    files = [write(model, tmp_path / f"{i}.gguf", kind) for i, model in enumerate(models(hidden=64))]
    load = AutoModelForCausalLM.from_pretrained
    plain = [load(tmp_path, gguf_file=file.name, dtype=torch.float32) for file in files]
    assert torch.equal(logits(dami.load_pair(*files)[0]), logits(dami.patch_model(*plain)))
