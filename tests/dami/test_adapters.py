"""A LoRA adapter as the λ=1 end, against PEFT itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import dami
import pytest
import torch
from dami.loading.adapters import Adapter
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.dami.families import batch, pair
from tests.dami.test_checkpoints import Harmful, save

peft = pytest.importorskip("peft")


def adapted(family: str, path: Path, **config: Any) -> tuple[Path, Path, PreTrainedModel]:
    """Directories of a tiny model and of an adapter on it, and PEFT's model of both."""
    base = pair(family)[0]
    save(base, path / "base")
    torch.manual_seed(2)
    config = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, **config}
    model = peft.get_peft_model(base, peft.LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # as if it had been trained, and of a rank that `lowrank` holds
                parameter += 0.1 * torch.randn(len(parameter), *[1] * (parameter.dim() - 1))
    model.save_pretrained(path / "adapter")
    return path / "base", path / "adapter", model.eval()


PATTERNS = {"r": 2, "use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 9}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "rank stabilised": ("qwen3", {"target_modules": ["v_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 5}, "alpha_pattern": {"up_proj": 20}},
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "whole modules": ("llama", {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "all biases": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "their biases": ("llama", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    **{
        f"{init}": ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4, "init_lora_weights": init})
        for init in (True, "gaussian", "orthogonal", "mica", "pissa", "olora")
    },
    "pissa, patterns": (
        "llama",
        {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "pissa", **PATTERNS},
    ),
    "olora, patterns": ("llama", {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "olora", **PATTERNS}),
    "pissa, transposed": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "init_lora_weights": "pissa"},
    ),
}


@pytest.mark.parametrize("format", ["lowrank", "pair"])
@pytest.mark.parametrize("case", CASES)
def test_ends_are_the_model_without_and_with_the_adapter(case: str, format: str, tmp_path: Path) -> None:
    family, config = CASES[case]
    base, adapter, model = adapted(family, tmp_path, **config)
    patched, _ = dami.load_pair(base, adapter, format=format)
    inputs = batch("left")
    with torch.inference_mode():
        with_adapter = model(**inputs).logits
        without = pair(family)[0](**inputs).logits
        for lam, expected in ((0.0, without), (1.0, with_adapter)):
            with dami.intensity(patched, lam):
                torch.testing.assert_close(patched(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    formats = {row.format for row in dami.describe(patched).rows} - {None}
    assert format in formats


def test_lam_scales_the_adapter(tmp_path: Path) -> None:
    base, adapter, model = adapted("llama", tmp_path, target_modules=["q_proj"])
    patched, _ = dami.load_pair(base, adapter, format="lowrank")
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: 0.4 * value for name, value in module.scaling.items()}
    inputs = batch("left")
    with torch.inference_mode(), dami.intensity(patched, 0.4):
        torch.testing.assert_close(patched(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_bias": True},
        {"trainable_token_indices": [1, 2]},
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"alora_invocation_tokens": [1, 2]},
        {"use_qalora": True},
        {"ensure_weight_tying": True},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"a_setting_of_tomorrow": 3},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "an_initialisation_of_tomorrow"},
        {"peft_type": "IA3"},
    ],
    ids=str,
)
def test_what_is_no_plain_lora_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    """By name and with a remedy: whatever is not known to be a low-rank difference to the base."""
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings})
    )
    [(name, value)] = settings.items()
    message = rf"must be a plain LoRA, got {name}={re.escape(repr(value))}[,:].* merge it into its base"
    with pytest.raises(ValueError, match=message):
        Adapter.read(tmp_path)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    base, adapter, _ = adapted("llama", tmp_path, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    layer = "base_model.model.model.layers.0.self_attn"
    tensors[f"{layer}.k_proj.lora_B.weight"] = torch.zeros(7, 3)
    del tensors[f"{layer}.v_proj.lora_A.weight"]
    tensors["base_model.model.model.norms.weight"] = torch.zeros(7)
    tensors["base_model.model.model.norm.weight"] = torch.zeros(7)
    save_file(tensors, file)
    expected = [
        "model.layers.0.self_attn.k_proj.weight: [12, 24] in the instruct end, [7, 24] in the adapter",
        "model.layers.0.self_attn.v_proj.weight: the adapter has only one of its factors",
        "model.norm.weight: [24] in the instruct end, [7] in the adapter",
        "model.norms.weight: in the adapter only; name the checkpoint that the adapter was trained on",
    ]
    with pytest.raises(ValueError, match=re.escape("\n  ".join(["do not match:", *expected]))):
        dami.load_pair(base, adapter)


TIED: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "a head of its own": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("format", ["lowrank", "pair"])
@pytest.mark.parametrize("case", TIED)
def test_one_of_a_tied_head_and_embedding(case: str, format: str, tmp_path: Path) -> None:
    """Is two tensors in the pair, as it is in PEFT's model, and one again when the patch is taken off."""
    base, adapter, model = adapted("qwen3", tmp_path, **TIED[case])
    inputs = batch("left")
    patched, _ = dami.load_pair(base, adapter, format)
    packed, _ = dami.load_pair(dami.pack(base, adapter, tmp_path / "packed", format))
    plain = pair("qwen3")[0]
    with torch.inference_mode():
        for lam, expected in ((0.0, plain), (1.0, model)):
            for each in (patched, packed):
                logits = each(**inputs, intensity=lam).logits
                torch.testing.assert_close(logits, expected(**inputs).logits, rtol=1e-4, atol=1e-4)
        again = dami.unpatch_model(patched)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        torch.testing.assert_close(again(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_an_adapted_embedding_as_the_instruct_end_and_a_tied_head_as_the_other(tmp_path: Path) -> None:
    base, adapter, model = adapted("qwen3", tmp_path, **TIED["embedding"])
    thinking = save(pair("qwen3")[1], tmp_path / "thinking")
    patched, _ = dami.load_pair(adapter, thinking, base=base)
    inputs = batch("left")
    for lam, expected in ((0.0, model), (1.0, pair("qwen3")[1])):
        logits = patched(**inputs, intensity=lam).logits
        torch.testing.assert_close(logits, expected(**inputs).logits, rtol=1e-4, atol=1e-4)


DORA = {
    "linear": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "patterns, biases": ("llama", {"target_modules": ["q_proj", "up_proj"], "bias": "all", **PATTERNS}),
}


@pytest.mark.parametrize("case", DORA)
@torch.inference_mode()
def test_dora_is_folded_in(case: str, tmp_path: Path) -> None:
    """Loaded and packed."""
    family, config = DORA[case]
    base, adapter, model = adapted(family, tmp_path, use_dora=True, **config)
    inputs = batch("left")
    expected = model(**inputs).logits
    packed = dami.pack(base, adapter, tmp_path / "packed", "pair")
    for sources in ((base, adapter), (packed,)):
        patched, _ = dami.load_pair(*sources)
        torch.testing.assert_close(patched(**inputs, intensity=1.0).logits, expected, rtol=1e-4, atol=1e-5)
        without = pair(family)[0](**inputs).logits
        torch.testing.assert_close(patched(**inputs, intensity=0.0).logits, without, rtol=1e-4, atol=1e-5)


def two_adapters(family: str, path: Path, first: dict[str, Any], second: dict[str, Any]) -> tuple[Any, ...]:
    """Directories of two adapters on one base, which they name, and PEFT's models of each."""
    found = [adapted(family, path / str(i), **config) for i, config in enumerate((first, second))]
    for base, adapter, _ in found:
        name_base(adapter, found[0][0])
        assert (base / "model.safetensors").read_bytes() == (found[0][0] / "model.safetensors").read_bytes()
    return found[0][1], found[1][1], found[0][2], found[1][2]


def name_base(adapter: Path, base: Path | str | None, **more: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base and str(base), **more}))


Q = {"target_modules": ["q_proj", "down_proj"]}
TWO: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "of other ranks": ("llama", Q, {"target_modules": ["q_proj", "v_proj"], "r": 5, "use_rslora": True}),
    "whole modules and biases": ("llama", {**Q, "modules_to_save": ["lm_head"]}, {**Q, "bias": "all"}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head", "embed_tokens"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, {"target_modules": ["c_proj"]}),
    "pissa and patterns": ("llama", {**Q, "init_lora_weights": "pissa"}, {"target_modules": ["q_proj"], **PATTERNS}),
}


@pytest.mark.parametrize(
    ("case", "format"),
    [(case, format) for case in TWO for format in ("lowrank", "pair") if format == "pair" or "whole" not in case],
)
@torch.inference_mode()
def test_two_adapters_on_one_base(case: str, format: str, tmp_path: Path) -> None:
    """The ends are the base with one and with the other; and what is packed of them."""
    *ends, first, second = two_adapters(TWO[case][0], tmp_path, *TWO[case][1:])
    inputs = batch("left")
    model, tokenizer = dami.load_pair(*ends, format)
    for lam, expected in ((0.0, first), (1.0, second)):
        logits = model(**inputs, intensity=lam).logits
        torch.testing.assert_close(logits, expected(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert tokenizer.get_vocab()["w8"] == 8
    assert format in {row.format for row in dami.describe(model).rows}
    again, _ = dami.load_pair(dami.pack(*ends, tmp_path / "packed", format))
    logits = [each(**inputs, intensity=[0.0, 0.3, 0.7, 1.0]).logits for each in (model, again)]
    assert torch.equal(*logits)


@torch.inference_mode()
def test_two_of_dora(tmp_path: Path) -> None:
    *ends, first, second = two_adapters("llama", tmp_path, {**Q, "use_dora": True}, Q)
    model, _ = dami.load_pair(*ends)
    inputs = batch("left")
    for lam, expected in ((0.0, first), (1.0, second)):
        logits = model(**inputs, intensity=lam).logits
        torch.testing.assert_close(logits, expected(**inputs).logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_an_adapter_as_the_instruct_end_of_a_whole_checkpoint(tmp_path: Path) -> None:
    base, adapter, model = adapted("llama", tmp_path, **Q)
    name_base(adapter, tmp_path / "gone")
    thinking = save(pair("llama")[1], tmp_path / "thinking")
    inputs = batch("left")
    with pytest.raises(OSError, match=r"adapter is an adapter, and its base cannot be found: .*gone; base=…"):
        dami.load_pair(adapter, thinking)
    for end, expected in ((thinking, pair("llama")[1]), (base, pair("llama")[0])):
        for patched in (
            dami.load_pair(adapter, end, base=base)[0],
            dami.load_pair(dami.pack(adapter, end, tmp_path / f"packed-{end.name}", "pair", base=base))[0],
        ):
            for lam, plain in ((0.0, model), (1.0, expected)):
                logits = patched(**inputs, intensity=lam).logits
                torch.testing.assert_close(logits, plain(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_the_base_of_adapters_is_found_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *ends, _, _ = two_adapters("llama", tmp_path, Q, Q)
    base = tmp_path / "0" / "base"
    name_base(ends[1], "someone/other")
    with pytest.raises(ValueError, match=r"must be adapters on one base, got '.*base' and 'someone/other': if these"):
        dami.load_pair(*ends)
    dami.load_pair(*ends, base=base)
    name_base(ends[0], None)
    name_base(ends[1], None)
    with pytest.raises(ValueError, match="does not say what it was trained on: name it, base=…"):
        dami.load_pair(*ends)
    with pytest.raises(TypeError, match=r"base is for an adapter as the instruct end, which .*base is not"):
        dami.load_pair(base, ends[1], base=base)
    with pytest.raises(TypeError, match="base is for two adapters, got a packed pair: leave it out"):
        dami.load_pair(base, base=base)
    for end in ends:
        name_base(end, "someone/base", revision="v5")
    asked = []

    def download(name: str, allow_patterns: list[str], **options: Any) -> str:
        asked.append((name, options))
        return str(base)

    monkeypatch.setattr("dami.loading.checkpoint.snapshot_download", download)
    dami.load_pair(*ends, token="t", revision="of the adapters")
    assert asked == [("someone/base", {"token": "t", "revision": "v5"})]


@torch.inference_mode()
def test_an_adapter_in_a_bin_file_is_read_but_never_run(tmp_path: Path) -> None:
    base, adapter, model = adapted("llama", tmp_path, **Q)
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    inputs = batch("left")
    logits = dami.load_pair(base, adapter)[0](**inputs, intensity=1.0).logits
    torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
    torch.save({**tensors, "x": Harmful(tmp_path / "harm")}, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin cannot be read: Weights only load failed"):
        dami.load_pair(base, adapter)
    assert not (tmp_path / "harm").exists()


def test_a_damaged_adapter_is_told(tmp_path: Path) -> None:
    base, adapter, _ = adapted("llama", tmp_path, **Q)
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors cannot be read: "):
        dami.load_pair(base, adapter)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin cannot be read: "):
        dami.load_pair(base, adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json must be a JSON object: "):
        dami.load_pair(base, adapter)
