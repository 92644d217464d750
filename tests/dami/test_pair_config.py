"""A pair by `quantization_config=dami.PairConfig(…)`, wherever transformers loads a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dami
import pytest
import torch
from dami.sources import End
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tests.dami.families import batch, pair
from tests.dami.test_checkpoints import edit_config, edit_tensors, save
from tests.dami.test_policies import in_fp8, write_tokenizer

LAM = [0.0, 0.37, 1.0, 1.2]


@pytest.fixture
def ends(tmp_path: Path) -> tuple[Path, Path]:
    instruct, thinking = pair("qwen3")
    return save(instruct, tmp_path / "instruct", template="I"), save(thinking, tmp_path / "thinking", template="T")


@torch.no_grad()
def logits(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(3)
    return model(**batch("left"), **options).logits


@pytest.mark.parametrize("format", ["pair", "int8", "int4", "w8d4"])
def test_it_is_the_pair_that_load_pair_loads(
    format: str, ends: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = dami.load_pair(*ends, format)
    config = dami.PairConfig(ends[1], format=format)
    model = AutoModelForCausalLM.from_pretrained(ends[0], quantization_config=config)
    assert "second model" not in caplog.text
    assert torch.equal(logits(model, intensity=LAM), logits(expected, intensity=LAM))
    assert str(dami.describe(model)) == str(dami.describe(expected))
    assert str(model.dami) == str(expected.dami)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "packed")
    again, tokenizer = dami.load_pair(dami.save_pair(model, tmp_path / "saved"))
    assert torch.equal(logits(again, intensity=LAM), logits(expected, intensity=LAM))
    assert tokenizer.get_chat_template("thinking") == "T"
    plain = dami.unpatch_model(model)
    assert type(plain).__name__ == "Qwen3ForCausalLM"


def test_lam_is_that_of_the_config_until_another_is_set(ends: tuple[Path, Path]) -> None:
    expected, _ = dami.load_pair(*ends)
    config = {"quant_method": "dami-pair", "thinking": str(ends[1]), "intensity": 0.7}  # as a file of JSON has it
    model = AutoModelForCausalLM.from_pretrained(ends[0], quantization_config=config)
    assert torch.equal(logits(model), logits(expected, intensity=0.7))
    dami.set_intensity(model, 0.2)
    assert torch.equal(logits(model), logits(expected, intensity=0.2))


@pytest.mark.parametrize("rope", ["instruct", "thinking"])
def test_whose_rotary_embedding_the_pair_has(rope: End, ends: tuple[Path, Path]) -> None:
    edit_config(ends[1], rope_parameters={"rope_type": "default", "rope_theta": 300.0})
    with pytest.raises(ValueError, match=r"rotary embedding: .*choose whose"):
        AutoModelForCausalLM.from_pretrained(ends[0], quantization_config=dami.PairConfig(ends[1]))
    expected, _ = dami.load_pair(*ends, rope=rope)
    model = AutoModelForCausalLM.from_pretrained(ends[0], quantization_config=dami.PairConfig(ends[1], rope=rope))
    assert torch.equal(logits(model, intensity=LAM), logits(expected, intensity=LAM))
    assert model.config.rope_parameters == expected.config.rope_parameters
    plain = AutoModelForCausalLM.from_pretrained(ends[rope == "thinking"])
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("tokenizer", ["instruct", "thinking"])
def test_whose_tokenizer_the_pair_has(tokenizer: End, ends: tuple[Path, Path], tmp_path: Path) -> None:
    for end, name in zip(ends, ("<|user|>", "<|User|>"), strict=True):
        write_tokenizer(end, (name, "<|end|>"))
    config = {"quant_method": "dami-pair", "thinking": str(ends[1]), "tokenizer": tokenizer}
    model = AutoModelForCausalLM.from_pretrained(ends[0], quantization_config=config)
    _, words = dami.load_pair(dami.save_pair(model, tmp_path / "saved"))
    assert ("<|User|>" in words.get_vocab()) == (tokenizer == "thinking")


def test_choices_that_are_none() -> None:
    with pytest.raises(ValueError, match="rope must be 'instruct' or 'thinking', got 'mean'"):
        dami.PairConfig("thinking", rope="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokenizer must be 'instruct' or 'thinking', got 0"):
        dami.PairConfig("thinking", tokenizer=0)  # type: ignore[arg-type]
    assert dami.PairConfig("thinking").to_dict().keys().isdisjoint({"rope", "tokenizer"})
    assert dami.PairConfig("thinking", rope="thinking").to_dict()["rope"] == "thinking"


def test_a_pipeline_takes_an_intensity_for_each_call() -> None:
    instruct, thinking = map(str, dami.example_pair())
    options = {"quantization_config": dami.PairConfig(thinking)}
    answer = pipeline("text-generation", instruct, model_kwargs=options)
    chat = [{"role": "user", "content": "State the final answer to the following arithmetic problem: 42 + 69 + 22 ="}]
    said = [
        answer(chat, intensity=lam, do_sample=False, return_full_text=False)[0]["generated_text"] for lam in (0.0, 1.0)
    ]
    assert said[0].endswith("130")
    assert said[1].endswith("133")
    presets = AutoModelForCausalLM.from_pretrained(instruct, **options).dami_patch.presets
    assert {"low", "medium", "high"} <= presets.keys()


def test_an_adapter_as_the_thinking_end(ends: tuple[Path, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(pair("qwen3")[0], peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    config = dami.PairConfig(tmp_path / "adapter", "lowrank")
    patched = AutoModelForCausalLM.from_pretrained(ends[0], quantization_config=config)
    torch.testing.assert_close(logits(patched, intensity=1.0), logits(model.eval()), rtol=1e-4, atol=1e-4)


def test_options_of_the_thinking_end_reach_it(
    ends: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, allow_patterns: list[str], **options: Any) -> str:
        asked.append((name, options))
        return str(ends[1].parent)

    monkeypatch.setattr("dami.loading.checkpoint.snapshot_download", download)
    config = dami.PairConfig("someone/pair", revision="v2", token="secret", cache_dir="c", subfolder="thinking")
    assert "secret" not in repr(config) + str(config.to_dict())
    AutoModelForCausalLM.from_pretrained(ends[0], quantization_config=config)
    assert asked == [("someone/pair", {"revision": "v2", "token": "secret", "cache_dir": "c"})]


def test_a_checkpoint_whose_config_names_its_thinking_end(ends: tuple[Path, Path]) -> None:
    """For programs that pass no quantization_config on."""
    expected, _ = dami.load_pair(*ends)
    edit_config(ends[0], quantization_config={"quant_method": "dami-pair", "thinking": str(ends[1]), "intensity": 0.7})
    model = AutoModelForCausalLM.from_pretrained(ends[0])
    assert torch.equal(logits(model), logits(expected, intensity=0.7))


def test_unknown_options_are_refused_by_name(ends: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"PairConfig takes options of \['revision', .*, got \['revison'\]"):
        dami.PairConfig(ends[1], revison="v2")
    with pytest.raises(ValueError, match="format must be one of"):
        dami.PairConfig(ends[1], "int3")
    with pytest.raises(TypeError, match=r"got \['formt'\]"):
        AutoModelForCausalLM.from_pretrained(
            ends[0], quantization_config={"quant_method": "dami-pair", "thinking": "x", "formt": "int4"}
        )
    packed = dami.pack(*ends, tmp_path / "packed")
    with pytest.raises(ValueError, match="quantized with PackedConfig but you are passing a PairConfig config"):
        AutoModelForCausalLM.from_pretrained(packed, quantization_config=dami.PairConfig(ends[1]))
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["of_tomorrow"] = 1
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(TypeError, match=r"quantization_config of a packed pair has no \['of_tomorrow'\]: a newer dami"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_what_does_not_match_is_told_before_a_weight_is_read(
    ends: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dami.PairConfig(ends[1])
    with pytest.raises(OSError, match=r"there is no checkpoint .*nowhere"):
        AutoModelForCausalLM.from_pretrained(ends[0], quantization_config=dami.PairConfig(tmp_path / "nowhere"))
    packed = dami.pack(*ends, tmp_path / "packed")
    with pytest.raises(ValueError, match="packed is a packed pair, not one end of a pair"):
        AutoModelForCausalLM.from_pretrained(ends[0], quantization_config=dami.PairConfig(packed))
    edit_tensors(ends[1], lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    half = AutoModelForCausalLM.from_pretrained(ends[0], dtype=torch.float16, quantization_config=config)
    assert half.lm_head.weight_target.dtype == torch.float16
    edit_tensors(ends[0], lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    edit_tensors(ends[1], lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    edit_config(ends[0], dtype="float16")
    with pytest.raises(ValueError, match=r"float16, which does not hold thinking: use dtype=torch\.float32"):
        AutoModelForCausalLM.from_pretrained(ends[0], quantization_config=config)
    edit_config(ends[1], rms_norm_eps=1e-3)
    monkeypatch.setattr(
        "transformers.modeling_utils.PreTrainedModel._load_pretrained_model", lambda *_: pytest.fail("read weights")
    )
    with pytest.raises(ValueError, match=r"do not match:\n  config\.rms_norm_eps"):
        AutoModelForCausalLM.from_pretrained(ends[0], quantization_config=config)


def test_a_quantised_instruct_end_is_for_load_pair(ends: tuple[Path, Path]) -> None:
    for path in ends:
        in_fp8(path)
    with pytest.raises(ValueError, match="is quantized with FineGrainedFP8Config but you are passing a PairConfig"):
        AutoModelForCausalLM.from_pretrained(ends[0], quantization_config=dami.PairConfig(ends[1]))
    dami.load_pair(*ends)


def test_vocabularies_are_compared_where_there_are_tokenizers(
    ends: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    save(pair("qwen3")[1], ends[1], words=7)
    with pytest.raises(ValueError, match=r"do not match:\n  tokenizer: 2 tokens have another id"):
        AutoModelForCausalLM.from_pretrained(ends[0], quantization_config=dami.PairConfig(ends[1]))
    for file in ends[0].glob("*token*"):
        file.unlink()
    assert not caplog.text
    AutoModelForCausalLM.from_pretrained(ends[0], quantization_config=dami.PairConfig(ends[1]))
    told = "instruct has no tokenizer beside its weights: whether the vocabularies match is not checked"
    assert told in caplog.text


def test_where_the_tensors_are_given_there_is_nothing_to_compare(ends: tuple[Path, Path]) -> None:
    model = pair("qwen3")[0]
    with pytest.raises(ValueError, match="needs an instruct end that is read from files"):
        type(model).from_pretrained(
            None, config=model.config, state_dict=model.state_dict(), quantization_config=dami.PairConfig(ends[1])
        )


@pytest.mark.slow
def test_lm_eval_through_its_own_hf_model(ends: tuple[Path, Path], tmp_path: Path) -> None:
    """It takes the model, and a packed pair or a config that names the thinking end."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    instruct, thinking = dami.example_pair()
    config = dami.PairConfig(thinking, intensity=1.0)
    model = AutoModelForCausalLM.from_pretrained(instruct, quantization_config=config, dtype=torch.float32)
    common = {"device": "cpu", "dtype": "float32", "batch_size": 2}
    plain = huggingface.HFLM(pretrained=str(thinking), **common)
    ours = huggingface.HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(instruct), batch_size=2)
    packed = huggingface.HFLM(pretrained=str(dami.pack(instruct, thinking, tmp_path / "packed", "pair")), **common)
    dami.set_intensity(packed.model, 1.0)
    context = "<|user|>What is 2 + 3?<|assistant|>"
    asked = [Instance("loglikelihood", {}, (context, end), i) for i, end in enumerate("567")]
    wanted = plain.loglikelihood(asked)
    for each in (ours, packed):
        for (value, greedy), (expected, same) in zip(each.loglikelihood(asked), wanted, strict=True):
            assert value == pytest.approx(expected, rel=1e-4)
            assert greedy == same
    settings = {"until": ["\n\n\n"], "do_sample": False, "max_gen_toks": 12}
    dami.set_intensity(packed.model, 0.0)
    (said,) = plain.generate_until([Instance("generate_until", {}, (context, dict(settings)), 0)])
    (same,) = packed.generate_until([Instance("generate_until", {}, (context, {**settings, "intensity": 1.0}), 0)])
    assert said == same != ""
