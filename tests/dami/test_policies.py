"""Differences of published pairs, on tiny models: which are resolved, how, and what a pair computes at its ends."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dami
import pytest
import torch
from dami.loading.checkpoint import Checkpoint
from dami.loading.match import Match
from dami.loading.policies import ENDS, Choices
from dami.loading.preview import preview
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.dami.families import batch, pair

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|box_start|>")
RENAMED = ("<|User|>", "<|Assistant|>", "<think>")
TEMPLATE = "{{ bos_token }}{% for m in messages %}USER{{ m['content'] }}END{% endfor %}"


def write_tokenizer(path: Path, names: tuple[str, ...], words: int = 9, bos: str | None = None) -> None:
    """A word-level tokenizer with special tokens of these names at the last ids."""
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    core.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", pad_token="w0", bos_token=bos)
    tokenizer.chat_template = TEMPLATE.replace("USER", names[0]).replace("END", names[1])
    tokenizer.save_pretrained(path)


def edit_config(path: Path, file: str = "config.json", **changes: Any) -> None:
    (path / file).write_text(json.dumps({**json.loads((path / file).read_text()), **changes}))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def resized(path: Path, size: int) -> None:
    """Gives a checkpoint a vocabulary of another size; added rows are random."""
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(size, mean_resizing=False)
    model.save_pretrained(path)


def untie(path: Path) -> None:
    """Gives a tied checkpoint a head of its own."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = head + 0.1 * torch.randn_like(head)

    edit_tensors(path, edit)
    edit_config(path, tie_word_embeddings=False)


def to_dtype(path: Path, dtype: torch.dtype) -> None:
    edit_tensors(path, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    edit_config(path, dtype=str(dtype).removeprefix("torch."))


def with_mtp_head(path: Path) -> None:
    edit_tensors(path, lambda tensors: tensors.update({"mtp.layers.0.fc.weight": torch.ones(3, 3)}))


def generating(path: Path, **settings: Any) -> None:
    (path / "generation_config.json").write_text(json.dumps(settings))


def in_fp8(path: Path, block: int | None = 4) -> None:
    """Quantises the layers' weights as DeepSeek-V3 and the FP8 twins of Qwen3 do; with None, one scale for each."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            weight = tensors[name].float()
            size = weight.shape if block is None else (block, block)
            blocks = weight.unfold(0, size[0], size[0]).unfold(1, size[1], size[1])
            scale = blocks.abs().amax((-2, -1)) / 448
            whole = scale.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
            tensors[name] = (weight / whole).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale if block is not None else scale.reshape(())

    to_dtype(path, torch.bfloat16)
    edit_tensors(path, edit)
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": None if block is None else [block, block],
        "modules_to_not_convert": ["lm_head"],
    }
    edit_config(path, quantization_config=quantization)


@pytest.fixture
def ends(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "instruct", tmp_path / "thinking"
    for model, path in zip(pair("qwen3"), paths, strict=True):
        model.save_pretrained(path)
        generating(path, eos_token_id=2)
        write_tokenizer(path, SPECIAL)
    return paths


Edit = Callable[[Path, Path], Any]
# what is done to the ends, the subjects of the report, and what it says of them; None for an end of the text: any
DIFFERENCES: dict[str, tuple[Edit, list[str]]] = {
    "head, thinking's own": (
        lambda instruct, thinking: untie(thinking),
        ["head: tied to the embedding in the instruct end, a weight of its own in the thinking end → a weight"],
    ),
    "head, instruct's own": (
        lambda instruct, thinking: untie(instruct),
        ["head: a weight of its own in the instruct end, tied to the embedding in the thinking end → a weight"],
    ),
    "vocabulary, thinking's longer": (
        lambda instruct, thinking: resized(thinking, 110),
        ["vocabulary: 101 rows in the instruct end, 110 rows in the thinking end → 110 rows"],
    ),
    "vocabulary, instruct's longer, heads of their own": (
        lambda instruct, thinking: (untie(instruct), untie(thinking), resized(instruct, 110)),
        ["vocabulary: 110 rows in the instruct end, 101 rows in the thinking end → 110 rows"],
    ),
    "vocabulary and head": (
        lambda instruct, thinking: (untie(thinking), resized(thinking, 110)),
        ["head: tied", "vocabulary: 101 rows in the instruct end, 110 rows in the thinking end → 110 rows"],
    ),
    "bfloat16 beside float16": (
        lambda instruct, thinking: (to_dtype(instruct, torch.bfloat16), to_dtype(thinking, torch.float16)),
        ["dtype: bfloat16 in the instruct end, float16 in the thinking end → float32, which holds both; dtype=… sets"],
    ),
    "float32 beside bfloat16": (
        lambda instruct, thinking: to_dtype(instruct, torch.bfloat16),
        ["dtype: bfloat16 in the instruct end, float32 in the thinking end → float32, which holds both; dtype=… sets"],
    ),
    "an MTP head": (
        lambda instruct, thinking: with_mtp_head(thinking),
        ["unused tensors: mtp.layers.0.fc.weight in the thinking end only → dropped: transformers does not run them"],
    ),
    "two MTP heads": (
        lambda instruct, thinking: (with_mtp_head(instruct), with_mtp_head(thinking)),
        ["unused tensors: mtp.layers.0.fc.weight in both ends → dropped: transformers does not run them"],
    ),
    "special tokens renamed": (
        lambda instruct, thinking: write_tokenizer(thinking, RENAMED),
        [
            "renamed tokens: 9 is <|im_start|> in the instruct end, <|User|> in the thinking end; 10 is <|im_end|> in "
            "the instruct end, <|Assistant|> in the thinking end; and 1 more → the thinking end's tokenizer"
        ],
    ),
    "special tokens added": (
        lambda instruct, thinking: write_tokenizer(thinking, (*SPECIAL, "<think>", "</think>")),
        ["added tokens: 12 is no token in the instruct end, <think> in the thinking end; 13 is no token in the"],
    ),
    "end tokens and sampling": (
        lambda instruct, thinking: (
            generating(instruct, eos_token_id=[2, 3], do_sample=True, temperature=0.7),
            generating(thinking, eos_token_id=4, do_sample=True, temperature=0.6),
        ),
        [
            "end tokens: [2, 3] in the instruct end, [4] in the thinking end → any of [2, 3, 4]; generate(eos",
            "sampling: {'do_sample': True, 'temperature': 0.7} in the instruct end, {'do_sample': True, 'temperature': "
            "0.6} in the thinking end → the instruct end's are the default, in dami serve the nearer end's; the pair's "
            "config keeps both",
        ],
    ),
    "context length": (
        lambda instruct, thinking: edit_config(thinking, max_position_embeddings=512),
        ["context length: 64 in the instruct end, 512 in the thinking end → 64, the smaller; max_position_embed"],
    ),
    "FP8 in one end": (
        lambda instruct, thinking: (to_dtype(instruct, torch.bfloat16), in_fp8(thinking)),
        ["quantisation: not quantised in the instruct end, fp8 in the thinking end → dequantised while reading"],
    ),
    "FP8 in both ends": (
        lambda instruct, thinking: (in_fp8(instruct, None), in_fp8(thinking)),
        ["quantisation: fp8 in the instruct end, fp8 in the thinking end → dequantised while reading, as transformers"],
    ),
}


def alone(path: Path) -> PreTrainedModel:
    """An end as transformers loads it, dequantised, in float32."""
    return Checkpoint.find(path).model(dtype=torch.float32)


@pytest.mark.parametrize("difference", DIFFERENCES)
@torch.no_grad()
def test_what_published_pairs_differ_in_is_resolved(difference: str, ends: tuple[Path, Path], tmp_path: Path) -> None:
    """Loaded, packed and saved again, each end computes what transformers does with that end alone; and it is told."""
    edit, told = DIFFERENCES[difference]
    edit(*ends)
    report = Match.of(*map(Checkpoint.find, ends)).report
    assert not report.blocking
    assert len(report.resolved) == len(told)
    for line, start in zip(map(str, report.resolved), told, strict=True):
        assert line.startswith(start), line
    asked = Match.of(*map(Checkpoint.find, ends), Choices(torch.float32)).report.to_dicts()
    plain, inputs = [alone(path) for path in ends], batch("left")
    loaded, _ = dami.load_pair(*ends, dtype=torch.float32)
    packed = dami.pack(*ends, tmp_path / "packed", "pair", dtype="float32")
    again = dami.save_pair(loaded, tmp_path / "saved")
    for model in (loaded, dami.load_pair(packed)[0], dami.load_pair(again)[0]):
        assert list(model.dami_patch.origin.differences) == asked
        for lam, end in enumerate(plain):
            expected, logits = end(**inputs).logits, model(**inputs, intensity=float(lam)).logits
            known = expected.shape[-1]
            torch.testing.assert_close(logits[..., :known], expected, rtol=1e-4, atol=1e-4)
            assert logits[..., known:].isneginf().all()
        rows = model(**inputs, intensity=[0.0, 0.5, 1.0, 1.0]).logits
        torch.testing.assert_close(rows[1:2], model(**{n: t[1:2] for n, t in inputs.items()}, intensity=0.5).logits)
        card = json.loads((packed / "config.json").read_text())
        assert "fp8" not in json.dumps({**card, "quantization_config": None})


@pytest.mark.parametrize("difference", ["FP8 in one end", "FP8 in both ends"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_fp8_is_dequantised_bit_for_bit_as_by_transformers(
    difference: str, dtype: torch.dtype, ends: tuple[Path, Path], tmp_path: Path
) -> None:
    DIFFERENCES[difference][0](*ends)
    expected = [dict(Checkpoint.find(path).model(dtype=dtype).state_dict()) for path in ends]
    loaded = dami.load_pair(*ends, dtype=dtype)[0]
    packed = dami.load_pair(dami.pack(*ends, tmp_path / "packed", "pair", dtype=dtype))[0]
    for model in (loaded, packed):
        state = model.state_dict()
        assert getattr(model.config, "quantization_config", None) is None or model is packed
        for name in expected[0]:
            assert torch.equal(state[name], expected[0][name]), name
            assert torch.equal(state.get(name + "_target", state[name]), expected[1][name]), name


def test_blocks_of_fp8_that_do_not_divide_the_weight(ends: tuple[Path, Path]) -> None:
    """DeepSeek-V3's kv_a_proj has 576 rows in blocks of 128, which transformers refuses."""
    in_fp8(ends[0])
    checkpoint, name = Checkpoint.find(ends[0]), "model.layers.0.mlp.up_proj.weight"
    codes = torch.randn(40, 24).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2) + 0.5
    edit_tensors(ends[0], lambda tensors: tensors.update({name: codes, name + "_scale_inv": scale}))
    edit_config(ends[0], quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    checkpoint = Checkpoint.find(ends[0])
    rows, columns = torch.arange(40) // 16, torch.arange(24) // 16
    expected = codes.float() * scale[rows][:, columns]
    assert torch.equal(checkpoint.read(name), expected)
    assert torch.equal(checkpoint.read(name, slice(30, 37)), expected[30:37])


@torch.no_grad()
def test_tokens_of_one_end_fade_towards_the_other(ends: tuple[Path, Path]) -> None:
    """Their odds are those of the shared rows times λ, in float64; the gradient is finite even where they are 0."""
    resized(ends[1], 110)
    model, _ = dami.load_pair(*ends)
    inputs = batch("left")
    for lam in (-0.5, 0.0, 0.3, 1.0, 1.5):
        logits = model(**inputs, intensity=lam).logits.double()
        origin, model.dami_patch.origin.vocabulary = model.dami_patch.origin.vocabulary, None
        plain = model(**inputs, intensity=lam).logits.double()
        model.dami_patch.origin.vocabulary = origin
        assert torch.equal(logits[..., :101], plain[..., :101])
        expected = plain[..., 101:] + torch.tensor(min(max(lam, 0.0), 1.0), dtype=torch.float64).log()
        torch.testing.assert_close(logits[..., 101:], expected, rtol=1e-6, atol=1e-5)
    with torch.enable_grad():
        for lam in (0.0, 0.3, 1.0):
            given = torch.tensor(lam, requires_grad=True)
            model(**inputs, intensity=given).logits.softmax(-1)[..., 5].sum().backward()
            assert given.grad is not None
            assert given.grad.isfinite()


@torch.no_grad()
def test_tokens_of_one_end_in_every_way_of_generating(ends: tuple[Path, Path]) -> None:
    """Tokens that only the thinking end knows and often wants: in beams and in continuous batching, at several λ."""
    resized(ends[1], 110)

    def want(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][101:] *= 100  # some of the nine have a large logit in any state

    edit_tensors(ends[1], want)
    model, _ = dami.load_pair(*ends)
    ids = torch.randint(3, 101, (2, 5))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1}
    one = model.generate(ids, intensity=[0.0, 1.0], **options)
    beams = model.generate(ids, intensity=[0.0, 1.0], num_beams=3, **options)
    assert one[0].max() < 101 <= one[1].max()
    assert beams[0].max() < 101
    single = model.generate(ids[1:], intensity=1.0, num_beams=3, **options)
    assert torch.equal(beams[1], single[0])
    batching = ContinuousBatchingConfig(page_size=4, num_blocks=16, max_batch_tokens=16)
    greedy = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1)
    batched = model.generate_batch(ids.tolist(), greedy, batching, intensity=[0.0, 1.0])
    assert [list(batched[key].generated_tokens) for key in sorted(batched)] == one[:, 5:].tolist()


@torch.no_grad()
def test_a_chat_template_keeps_its_tokens_in_the_other_tokenizer(ends: tuple[Path, Path]) -> None:
    """Whichever tokenizer a pair has, each end's template gives the ids that it gives with that end's own."""
    write_tokenizer(ends[0], SPECIAL, bos="w3")
    write_tokenizer(ends[1], RENAMED, bos="<think>")
    chat = [{"role": "user", "content": "w5"}]
    own = [Checkpoint.find(path).tokenizer() for path in ends]
    expected = [tokenizer.apply_chat_template(chat)["input_ids"] for tokenizer in own if tokenizer is not None]
    assert expected == [[3, 9, 5, 10], [11, 9, 5, 10]]
    for choice in ("instruct", "thinking", None):
        _, tokenizer = dami.load_pair(*ends, tokenizer=choice)
        assert tokenizer.convert_ids_to_tokens(9) == ("<|im_start|>" if choice == "instruct" else "<|User|>")
        for name, ids in zip(("instruct", "thinking"), expected, strict=True):
            assert tokenizer.apply_chat_template(chat, chat_template=name)["input_ids"] == ids, (choice, name)
        assert tokenizer.apply_chat_template(chat)["input_ids"] == expected[0]
    with pytest.raises(ValueError, match="tokenizer must be 'instruct' or 'thinking', got 'both'"):
        dami.load_pair(*ends, tokenizer="both")  # type: ignore[arg-type]


def rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **scaling}


@pytest.mark.parametrize(
    "parameters",
    [rope(5e5), {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}],
    ids=["theta", "yarn"],
)
@torch.no_grad()
def test_another_rotary_embedding_is_refused_unless_one_is_chosen(
    parameters: dict[str, Any], ends: tuple[Path, Path], tmp_path: Path
) -> None:
    edit_config(ends[1], rope_parameters=parameters, max_position_embeddings=128)
    with pytest.raises(ValueError, match=r"rotary embedding: .*; a row at λ has one rotation: choose whose, rope="):
        dami.load_pair(*ends)
    with pytest.raises(ValueError, match="rope must be 'instruct' or 'thinking', got 'mean'"):
        dami.load_pair(*ends, rope="mean")  # type: ignore[arg-type]
    configs = [json.loads((path / "config.json").read_text()) for path in ends]
    inputs = batch("left")
    for chosen in (0, 1):
        plain = []
        for path in ends:
            own = shutil.copytree(path, tmp_path / f"{path.name}-{chosen}")
            settings = {name: configs[chosen][name] for name in ("rope_parameters", "max_position_embeddings")}
            edit_config(own, **settings)
            plain.append(alone(own))
        name = ("instruct", "thinking")[chosen]
        loaded, _ = dami.load_pair(*ends, rope=name)
        packed, _ = dami.load_pair(dami.pack(*ends, tmp_path / f"packed-{name}", "pair", rope=name))
        for model in (loaded, packed):
            assert any("every λ" in each["resolution"] for each in model.dami_patch.origin.differences)
            for lam, end in enumerate(plain):
                logits = model(**inputs, intensity=float(lam)).logits
                torch.testing.assert_close(logits, end(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_the_resolutions_can_be_changed(ends: tuple[Path, Path], tmp_path: Path) -> None:
    edit_config(ends[1], max_position_embeddings=512)
    to_dtype(ends[1], torch.float16)
    model, _ = dami.load_pair(*ends)
    assert model.config.max_position_embeddings == 64
    assert model.dtype == torch.float32
    model, _ = dami.load_pair(*ends, max_position_embeddings=300, dtype="bfloat16")
    assert model.config.max_position_embeddings == 300
    assert model.dtype == torch.bfloat16
    told = {each["subject"]: each["resolution"] for each in model.dami_patch.origin.differences}
    assert told == {"dtype": "bfloat16, as asked", "context length": "300, as asked"}
    packed = dami.pack(*ends, tmp_path / "packed", dtype="float16", max_position_embeddings=200)
    model, _ = dami.load_pair(packed)
    assert model.config.max_position_embeddings == 200
    assert model.dtype == torch.float16
    with pytest.raises(ValueError, match="max_position_embeddings must be a positive number of tokens, got -1"):
        dami.pack(*ends, tmp_path / "other", max_position_embeddings=-1)
    with pytest.raises(ValueError, match="dtype must be 'auto', float32, bfloat16 or float16, got 'int8'"):
        dami.pack(*ends, tmp_path / "other", dtype="int8")


def test_end_tokens_of_both_and_the_sampling_of_each_are_kept(ends: tuple[Path, Path], tmp_path: Path) -> None:
    DIFFERENCES["end tokens and sampling"][0](*ends)
    loaded, _ = dami.load_pair(*ends)
    for model in (loaded, dami.load_pair(dami.pack(*ends, tmp_path / "packed"))[0]):
        assert model.generation_config.eos_token_id == [2, 3, 4]
        assert model.generation_config.temperature == 0.7
        assert model.dami_patch.origin.sampling["thinking"] == {"do_sample": True, "temperature": 0.6}


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_quantisation_that_cannot_be_undone_names_the_remedy(method: str, ends: tuple[Path, Path]) -> None:
    edit_config(ends[1], quantization_config={"quant_method": method, "bits": 4})
    remedy = f"{method} in the thinking end; {method} cannot be undone while loading: name the checkpoint that it was"
    with pytest.raises(ValueError, match=remedy):
        dami.load_pair(*ends)


def test_a_quantisation_without_a_method_is_refused(ends: tuple[Path, Path]) -> None:
    edit_config(ends[1], quantization_config={"bits": 4})
    with pytest.raises(ValueError, match="an unnamed method in the thinking end; an unnamed method cannot be undone"):
        dami.load_pair(*ends)


def test_a_quantisation_that_needs_a_package_names_it(ends: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(config: object) -> None:
        raise ImportError("compressed-tensors>=1 is required")

    monkeypatch.setattr("dami.loading.checkpoint.AutoQuantizationConfig.from_dict", lacks)
    edit_config(ends[1], quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(ValueError, match="compressed-tensors in the thinking end; compressed-tensors>=1 is required"):
        dami.load_pair(*ends)


FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a quantisation that is no object": ("config.json", {"quantization_config": "fp8"}, "must have an object as quan"),
    "a validator of transformers": ("config.json", {"layer_types": ["full_attention"]}, "`num_hidden_layers` (2) must"),
    "an unknown model": ("config.json", {"model_type": "nonesuch"}, "has model type `nonesuch`"),
    "how it generates": ("generation_config.json", {"max_new_tokens": -5}, "`max_new_tokens` must be greater than 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("end", [0, 1])
def test_a_fault_of_a_config_names_the_checkpoint(fault: str, end: int, ends: tuple[Path, Path]) -> None:
    file, changes, told = FAULTS[fault]
    edit_config(ends[end], file, **changes)
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        dami.load_pair(*ends)
    assert str(ends[end]) in str(caught.value)


@pytest.mark.parametrize("end", [0, 1])
def test_files_that_contradict_their_config_are_refused(end: int, ends: tuple[Path, Path]) -> None:
    size = json.loads((ends[end] / "config.json").read_text())["vocab_size"]
    edit_config(ends[end], vocab_size=size - 8)
    told = rf"embed_tokens.weight: \[{size}, 24\] in the files of the {ENDS[end]} end, \[{size - 8}, 24\] by its config"
    with pytest.raises(ValueError, match=told):
        dami.load_pair(*ends)


def in_int4(path: Path) -> None:
    """Quantises the layers' weights as Kimi-K2-Thinking's experts are: compressed-tensors, in groups."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=8)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        compressor = BaseCompressor.get_value_from_registry("pack-quantized")
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            weight = tensors.pop(name)
            scale = (weight.float().unflatten(1, (-1, 8)).abs().amax(-1) / 7.5).bfloat16()
            packed = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
            tensors.update({name.removesuffix("weight") + key: value for key, value in packed.items()})

    to_dtype(path, torch.bfloat16)
    edit_tensors(path, edit)
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights.model_dump(mode="json")}},
    }
    edit_config(path, quantization_config=quantization)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int4_of_compressed_tensors_beside_fp8(dtype: torch.dtype, ends: tuple[Path, Path], tmp_path: Path) -> None:
    """As Kimi-K2's Instruct and Thinking ends are stored."""
    pytest.importorskip("compressed_tensors")
    in_fp8(ends[0])
    in_int4(ends[1])
    expected = [dict(Checkpoint.find(path).model(dtype=dtype).state_dict()) for path in ends]
    loaded, _ = dami.load_pair(*ends, dtype=dtype)
    packed, _ = dami.load_pair(dami.pack(*ends, tmp_path / "packed", "pair", dtype=dtype))
    for model in (loaded, packed):
        state = model.state_dict()
        for name in expected[0]:
            assert torch.equal(state[name], expected[0][name]), name
            assert torch.equal(state.get(name + "_target", state[name]), expected[1][name]), name


@torch.no_grad()
def test_experts_in_int4_are_read_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors")
    ends = experts(tmp_path)
    to_dtype(ends[0], torch.bfloat16)
    in_int4(ends[1])
    expected = dict(Checkpoint.find(ends[1]).model(dtype=torch.bfloat16).state_dict())
    found = preview(*map(Checkpoint.find, ends))
    assert found.streams
    assert "attn" not in {each.part for each in found.distances}  # as no rows of it can be read alone
    monkeypatch.setattr(Checkpoint, "model", lambda *_, **__: pytest.fail("loaded whole"))
    packed = dami.pack(*ends, tmp_path / "packed", "pair")
    monkeypatch.undo()
    state = dami.load_pair(packed)[0].state_dict()
    for name in expected:
        assert torch.equal(state.get(name + "_target", state[name]), expected[name]), name


def in_mxfp4(path: Path) -> None:
    """Gives the experts of a GPT-OSS random codes, as its checkpoints store them."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            number, inputs, outputs = tensors.pop(name).shape
            blocks = (number, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(118, 124, blocks, dtype=torch.uint8)

    edit_tensors(path, edit)
    edit_config(path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mxfp4_is_read_tensor_by_tensor_with_the_bits_of_transformers(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 1}
    config = GptOssConfig(vocab_size=101, hidden_size=64, intermediate_size=32, num_local_experts=3, **heads)
    ends = tmp_path / "instruct", tmp_path / "thinking"
    for seed, path in enumerate(ends):
        torch.manual_seed(seed)
        GptOssForCausalLM(config).bfloat16().save_pretrained(path)
        in_mxfp4(path)
    expected = [dict(Checkpoint.find(path).model(dtype=dtype).state_dict()) for path in ends]
    monkeypatch.setattr(Checkpoint, "model", lambda *_, **__: pytest.fail("loaded whole"))
    packed = dami.pack(*ends, tmp_path / "packed", "pair", dtype=dtype)
    monkeypatch.undo()
    state = dami.load_pair(packed)[0].state_dict()
    assert any(name.endswith("experts.down_proj_target") for name in state)
    for name in expected[0]:
        assert torch.equal(state[name], expected[0][name]), name
        assert torch.equal(state.get(name + "_target", state[name]), expected[1][name]), name


def experts(folder: Path) -> tuple[Path, Path]:
    """Two ends with experts that are stored one by one."""
    shape: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "num_hidden_layers": 1}
    config = Qwen3MoeConfig(vocab_size=101, num_experts=4, num_experts_per_tok=2, **shape, **heads)
    ends = folder / "instruct", folder / "thinking"
    for seed, path in enumerate(ends):
        torch.manual_seed(seed)
        Qwen3MoeForCausalLM(config).save_pretrained(path)
    return ends


@torch.no_grad()
def test_experts_that_transformers_converts_and_mtp_heads_of_experts(tmp_path: Path) -> None:
    """Stored expert by expert, in FP8 in one end, with an MTP head whose experts neither model runs."""
    ends = experts(tmp_path)
    for path in ends:
        to_dtype(path, torch.bfloat16)
    stored = load_file(ends[0] / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in stored
    mtp = {f"mtp.{name}": tensor for name, tensor in stored.items() if "experts.3" in name}
    in_fp8(ends[1])
    edit_tensors(ends[1], lambda tensors: tensors.update(mtp))
    report = Match.of(*map(Checkpoint.find, ends)).report
    assert not report.blocking
    assert [each.subject for each in report.resolved] == ["quantisation", "unused tensors"]
    assert "mtp.model.layers.0.mlp.experts.3.up_proj.weight" in report.resolved[1].ends
    plain, inputs = [alone(path) for path in ends], batch("left")
    loaded, _ = dami.load_pair(*ends, dtype=torch.float32)
    packed, _ = dami.load_pair(dami.pack(*ends, tmp_path / "packed", "pair", dtype="float32"))
    for model in (loaded, packed):
        for lam, end in enumerate(plain):
            logits = model(**inputs, intensity=float(lam)).logits
            torch.testing.assert_close(logits, end(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_choices_are_refused_where_nothing_is_left_to_choose(ends: tuple[Path, Path], tmp_path: Path) -> None:
    packed = dami.pack(*ends, tmp_path / "packed")
    with pytest.raises(ValueError, match="rope must be left out of a packed pair, whose ends were resolved when it"):
        dami.load_pair(packed, rope="thinking")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer must be left out with an adapter, which has the tokenizer of its"):
        dami.load_pair(ends[0], tmp_path / "adapter", tokenizer="thinking")


def test_the_modes_of_one_hybrid_model_are_no_pair(ends: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="must be two checkpoints, got instruct twice: the chat modes of one hybrid"):
        dami.load_pair(ends[0], ends[0])


def test_what_is_resolved_is_told_while_loading_and_on_the_card(
    ends: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_mtp_head(ends[1])
    untie(ends[0])
    packed = dami.pack(*ends, tmp_path / "packed")
    for text in (caplog.text, (packed / "README.md").read_text()):
        assert "mtp.layers.0.fc.weight in the thinking end only" in text
        assert "a weight of its own, for the tied end a copy of its embedding" in text


def test_choices_are_copied_to_no_config_of_an_end(ends: tuple[Path, Path]) -> None:
    before = [copy.deepcopy(Checkpoint.find(path).config().to_dict()) for path in ends]
    edit_config(ends[1], max_position_embeddings=512)
    before[1]["max_position_embeddings"] = 512
    Match.of(*map(Checkpoint.find, ends), Choices(context=7))
    assert [Checkpoint.find(path).config().to_dict() for path in ends] == before
