"""A pair as one directory: packed from two checkpoints or saved from a model, loaded, offloaded and pushed."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dami
import pytest
import torch
from dami.files import MARK
from dami.loading import packing
from dami.saving.config import PackedConfig, by_pattern
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedModel,
)

from tests.dami import architectures
from tests.dami.families import batch, merged, pair
from tests.dami.test_checkpoints import edit_config, edit_tensors, save
from tests.marks import slow

LAM = [0.0, 0.37, 1.0, 1.2]
FORMATS = ["pair", "int8", "int4", "w8d4"]
every_format = pytest.mark.parametrize("format", FORMATS)
two_formats = pytest.mark.parametrize(
    "format", ["pair", "w8d4", *slow("int8", "int4")]
)  # w8d4 stores codes of both sizes


@pytest.fixture
def ends(tmp_path: Path) -> tuple[Path, Path]:
    instruct, thinking = pair("qwen3")
    return save(instruct, tmp_path / "instruct", template="I"), save(thinking, tmp_path / "thinking", template="T")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**batch("left"), intensity=LAM).logits


def seeded_logits(model: Any) -> Tensor:
    torch.manual_seed(3)
    return logits(model)


@two_formats
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_packed_saved_and_saved_again_it_is_the_pair(family: str, format: str, tmp_path: Path) -> None:
    """Biases, tied heads, an offset of the norms and Conv1D; of one file and of several; by any way of loading."""
    instruct, thinking = pair(family)
    paths = save(instruct, tmp_path / "a"), save(thinking, tmp_path / "b", max_shard_size="20KB")
    model, _ = dami.load_pair(*paths, format)
    dami.pack(*paths, tmp_path / "packed", format, max_shard_size="15KB")
    dami.save_pair(model, tmp_path / "saved")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    stored = [
        {k: v for f in (tmp_path / d).glob("*.safetensors") for k, v in load_file(f).items()}
        for d in ("packed", "saved")
    ]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())

    expected = seeded_logits(model)
    loaded, _ = dami.load_pair(tmp_path / "packed")
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again")
    for directory in ("packed", "saved", "again"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / directory)
        assert torch.equal(seeded_logits(loaded), expected)
        assert str(dami.describe(loaded)) == str(dami.describe(model))


def test_what_is_in_the_directory(ends: tuple[Path, Path], tmp_path: Path) -> None:
    (ends[0] / "LICENSE.txt").write_text("do as you like")
    (ends[0] / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Instruct\n")
    (ends[1] / "README.md").write_text("---\nlicense: other\nlicense_name: tongyi\n---\n# Thinking\n")
    directory = dami.pack(*ends, tmp_path / "packed", "w8d4")
    assert sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()) == [
        "LICENSE.txt",
        "README.md",
        "additional_chat_templates/instruct.jinja",
        "additional_chat_templates/thinking.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((directory / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((ends[0] / "config.json").read_text())
    assert quantization.pop("interpolated")["model.layers.*.mlp.up_proj.weight"] == "w8d4"
    assert 0.01 < quantization.pop("error") < 0.1
    assert quantization == {
        "quant_method": "dami",
        "format": "w8d4",
        "parents": [{"name": "instruct", "license": "apache-2.0"}, {"name": "thinking", "license": "tongyi"}],
    }
    card = ModelCard.load(directory / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "apache-2.0 and tongyi")
    assert "| 1 | thinking | tongyi |" in card.text
    assert "`w8d4`: the base in 8 bits, the difference in 4." in card.text
    assert "Measured while packing" in card.text
    _, tokenizer = dami.load_pair(directory)
    assert tokenizer.get_chat_template() == "I"
    assert tokenizer.get_chat_template("thinking") == "T"
    _, tokenizer = dami.load_pair(directory, chat_template="thinking")
    assert tokenizer.get_chat_template() == "T"


@every_format
def test_the_measured_error_is_that_of_the_thinking_end(format: str, ends: tuple[Path, Path], tmp_path: Path) -> None:
    directory = dami.pack(*ends, tmp_path / "packed", format)
    kept = dami.materialize(dami.load_pair(directory)[0], 1.0)
    exact = AutoModelForCausalLM.from_pretrained(ends[1])
    pairs = [(a, b) for a, b in zip(kept.parameters(), exact.parameters(), strict=True) if a.dim() > 1]
    lost, whole = (
        sum(x.double().square().sum() for x in xs) for xs in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    stated = json.loads((directory / "config.json").read_text())["quantization_config"]["error"]
    assert stated == pytest.approx((lost / whole).sqrt().item(), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("first", ["dami", "transformers.quantizers"])
def test_importing_dami_is_enough_before_or_after_transformers(
    first: str, ends: tuple[Path, Path], tmp_path: Path
) -> None:
    directory = dami.pack(*ends, tmp_path / "packed")
    code = (
        f"import {first}, dami, sys; from transformers import AutoConfig, AutoModelForCausalLM as Auto; "
        "print(hasattr(Auto.from_pretrained(sys.argv[1]), 'dami_patch'))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"


@two_formats
def test_a_loaded_pair_is_patched_like_any_other(format: str, ends: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = dami.load_pair(dami.pack(*ends, tmp_path / "packed", format))
    expected = seeded_logits(model)[:1]
    assert torch.equal(seeded_logits(copy.deepcopy(model))[:1], expected)
    plain = dami.unpatch_model(model)
    torch.manual_seed(3)
    inputs = batch("left")
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits[:1], expected)
    assert type(plain).__name__ == "Qwen3ForCausalLM"
    assert plain.model.embed_tokens.weight is plain.lm_head.weight
    assert all(parameter.requires_grad for parameter in plain.parameters())
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    if format != "w8d4":
        before = AutoModelForCausalLM.from_pretrained(ends[0]).state_dict()
        assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def test_another_dtype(ends: tuple[Path, Path], tmp_path: Path) -> None:
    """The ends' dtype changes, that of the scales does not."""
    model, _ = dami.load_pair(dami.pack(*ends, tmp_path / "packed"), dtype=torch.float16)
    assert model.dtype == torch.float16
    assert model.model.norm.weight_target.dtype == torch.float16
    assert model.lm_head.weight_delta_scale.dtype == torch.bfloat16
    with torch.no_grad():
        model(**batch("left"), intensity=LAM)
    for options in ({}, {"quantization_config": dami.PairConfig(str(ends[1]))}):
        directory = ends[0] if options else tmp_path / "packed"
        with pytest.raises(ValueError, match=r"dtype must be float32, bfloat16 or float16 for a pair, got .*64"):
            AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, **options)


def test_without_its_head(ends: tuple[Path, Path], tmp_path: Path) -> None:
    directory = dami.pack(*ends, tmp_path / "packed")
    base, whole = AutoModel.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    inputs = batch("left")
    with torch.no_grad():
        mine = base(**inputs, intensity=LAM).last_hidden_state
        with dami.intensity(whole, LAM):
            assert torch.equal(mine, whole.model(**inputs).last_hidden_state)


def test_only_some_layers_differ(tmp_path: Path) -> None:
    """What is the same in both ends is stored once, and by the names of its layers."""
    instruct, thinking = pair("llama")
    with torch.no_grad():
        for name, parameter in thinking.named_parameters():
            if "layers.1" not in name or "up_proj" in name:
                parameter.copy_(instruct.get_parameter(name))
    paths = save(instruct, tmp_path / "a"), save(thinking, tmp_path / "b")
    directory = dami.pack(*paths, tmp_path / "packed", "pair")
    interpolated = json.loads((directory / "config.json").read_text())["quantization_config"]["interpolated"]
    assert interpolated["model.layers.1.mlp.down_proj.weight"] == "pair"
    assert not any("up_proj" in name or "layers.0" in name or "*" in name for name in interpolated)
    expected = dami.load_pair(*paths)[0]
    assert torch.equal(seeded_logits(dami.load_pair(directory)[0]), seeded_logits(expected))


def test_names_of_all_layers() -> None:
    names = ["h.0.w", "h.1.w", "h.0.b", "h.1.b", "norm1.w"]
    assert by_pattern({"h.0.w": "int4", "h.1.w": "int4", "h.1.b": "pair", "norm1.w": "pair"}, names) == {
        "h.*.w": "int4",
        "h.1.b": "pair",
        "norm1.w": "pair",
    }
    config = PackedConfig("int4", {"h.*.w": "int4", "h.1.b": "pair"})
    assert [config.format_of(name) for name in names] == ["int4", "int4", None, "pair", None]


def test_a_directory_that_exists_is_left_alone(ends: tuple[Path, Path], tmp_path: Path) -> None:
    directory = tmp_path / "packed"
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")
    model, _ = dami.load_pair(*ends)
    for write in (
        lambda **how: dami.pack(*ends, directory, **how),
        lambda **how: dami.save_pair(model, directory, **how),
    ):
        with pytest.raises(FileExistsError, match="packed exists already: name another directory, or overwrite it"):
            write()
        assert (directory / "notes.txt").exists()
    dami.pack(*ends, directory, overwrite=True)
    assert not (directory / "notes.txt").exists()
    dami.load_pair(directory)


def test_the_ends_are_never_lost(ends: tuple[Path, Path], tmp_path: Path) -> None:
    for directory in (tmp_path, ends[0], ends[1] / "additional_chat_templates"):
        directory.mkdir(exist_ok=True)
        (directory / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match=r"must not be overwritten: .*, which is read, would be lost with it"):
            dami.pack(*ends, directory, overwrite=True)
        assert (directory / "notes.txt").exists()
    dami.load_pair(*ends)


def most_files_mapped(directory: Path, run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Returns how many files in a directory are in memory at once, at most, when `dami.pack` has read a tensor."""
    mapped, read = [0], packing._Reader.read

    def counted(self: Any, name: str) -> Tensor:
        tensor = read(self, name)
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped.append(len({line.split()[-1] for line in lines if f"{directory}/" in line}))
        return tensor

    with monkeypatch.context() as patched:
        patched.setattr(packing._Reader, "read", counted)
        run()
    return max(mapped)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("format", ["pair", "w8d4"])
def test_of_many_files_few_are_in_memory_at_once(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the tensors that one file of the packed pair takes, however many layers there are."""
    most = []
    for layers in (4, 12):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=layers)
        where, to = tmp_path / str(layers), tmp_path / f"packed-{layers}"
        ends = [save(LlamaForCausalLM(config), where / name, max_shard_size="4KB") for name in ("a", "b")]
        count = len([*where.rglob("*.safetensors")])
        assert count > 10 * layers
        run = functools.partial(dami.pack, *ends, to, format, max_shard_size="24KB")
        most.append(most_files_mapped(where, run, monkeypatch))
        assert max(file.stat().st_size for file in to.glob("*.safetensors")) < 30_000
        assert 2 <= most[-1] < count / 3
    assert most[1] <= most[0] + 2


def test_an_interrupted_run_leaves_no_half_made_directory(
    ends: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def stopped(tensors: Any, file: Path, metadata: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(file)
        file.write_bytes(b"some")

    with monkeypatch.context() as patched:
        patched.setattr("dami.loading.shards.save_file", stopped)
        with pytest.raises(KeyboardInterrupt):
            dami.pack(*ends, tmp_path / "packed", shard_bytes=10_000)
    assert written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["instruct", "thinking"]
    (tmp_path / "packed.partial").mkdir()  # of a run that could not even do that
    (tmp_path / "packed.partial" / "00003.safetensors").write_bytes(b"some")
    (tmp_path / "packed.partial" / MARK).touch()
    dami.pack(*ends, tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["instruct", "packed", "thinking"]
    assert not list((tmp_path / "packed").glob("00003*"))


def test_what_cannot_be_packed(ends: tuple[Path, Path], tmp_path: Path) -> None:
    edit_config(ends[1], rms_norm_eps=1e-3)
    with pytest.raises(ValueError, match=r"do not match:\n  config.rms_norm_eps"):
        dami.pack(*ends, tmp_path / "packed")
    with pytest.raises(ValueError, match="format must be one of"):
        dami.pack(*ends, tmp_path / "packed", "int3")
    assert not (tmp_path / "packed").exists()


def test_what_is_not_stored_as_the_model_is_packed_all_the_same(
    ends: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = seeded_logits(dami.load_pair(*ends, "int4")[0])
    torch.save(load_file(ends[1] / "model.safetensors"), ends[1] / "pytorch_model.bin")
    (ends[1] / "model.safetensors").unlink()
    model, _ = dami.load_pair(dami.pack(*ends, tmp_path / "packed"))
    assert torch.equal(seeded_logits(model), expected)


def test_a_packed_pair_and_a_checkpoint_are_told_apart(ends: tuple[Path, Path], tmp_path: Path) -> None:
    directory = dami.pack(*ends, tmp_path / "packed")
    with pytest.raises(ValueError, match="packed is a packed pair, not one end of a pair: load it alone"):
        dami.load_pair(directory, ends[1])
    with pytest.raises(ValueError, match=r"thinking must be given: .*instruct is a checkpoint, not a packed pair"):
        dami.load_pair(ends[0])
    with pytest.raises(ValueError, match=r"format must be None or 'int4', in which .*packed is packed, got 'w8d4'"):
        dami.load_pair(directory, format="w8d4")
    dami.load_pair(directory, format="int4")


def test_a_damaged_packed_pair_is_refused(ends: tuple[Path, Path], tmp_path: Path) -> None:
    directory = dami.pack(*ends, tmp_path / "packed")
    (shard,) = directory.glob("*.safetensors")
    shard.rename(directory / "model.safetensors")
    (directory / "model.safetensors.index.json").unlink()
    edit_tensors(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight_delta_scale"))
    with pytest.raises(ValueError, match="does not fit its model") as caught:
        AutoModelForCausalLM.from_pretrained(directory)
    assert str(caught.value).split("\n  ")[1:] == [
        "model.layers.1.mlp.up_proj.weight (Linear): the files lack _delta_scale"
    ]
    edit_tensors(directory, lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(ValueError, match=r"down_proj.weight \(Linear\): the files lack the base"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_packed_pair_that_is_cut_short_is_named(ends: tuple[Path, Path], tmp_path: Path) -> None:
    directory = dami.pack(*ends, tmp_path / "packed")
    (shard,) = directory.glob("*.safetensors")
    whole = shard.read_bytes()
    for length in (0, 100, len(whole) // 2):
        shard.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"packed is damaged:\n  {re.escape(str(shard))} is corrupt: "):
            dami.load_pair(directory)
        with pytest.raises(ValueError, match=rf"{re.escape(str(shard))} is corrupt: "):
            AutoModelForCausalLM.from_pretrained(directory)
    shard.write_bytes(whole)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"the tokenizer of {re.escape(str(directory))} cannot be loaded: "):
        dami.load_pair(directory)
    index = directory / "model.safetensors.index.json"
    for damaged in ("{", "{}", "[]"):
        index.write_text(damaged)
        with pytest.raises(ValueError, match=f"{re.escape(str(index))} must "):
            dami.load_pair(directory)


def test_others_may_read_what_the_system_lets_them_read(ends: tuple[Path, Path], tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.touch()
    model, tokenizer = dami.load_pair(*ends)
    directories = [dami.pack(*ends, tmp_path / "packed"), dami.save_pair(model, tmp_path / "saved", tokenizer)]
    for directory in directories:
        modes = {file.stat().st_mode for file in directory.rglob("*") if file.is_file()}
        assert modes == {new.stat().st_mode}


def test_a_config_of_other_sizes_is_refused(ends: tuple[Path, Path], tmp_path: Path) -> None:
    directory = dami.pack(*ends, tmp_path / "packed", format="pair")
    config = AutoConfig.from_pretrained(directory)
    config.intermediate_size += 8
    with pytest.raises(ValueError, match="does not fit its model") as caught:
        AutoModelForCausalLM.from_pretrained(directory, config=config, ignore_mismatched_sizes=True)
    lines = str(caught.value).split("\n  ")[1:]
    assert len(lines) == 2 * 3
    assert re.match(r"model.layers.0.mlp.gate_proj.weight \(Linear\): .*shape \[48, 24\].*got .*\[40, 24\]", lines[0])


@pytest.mark.parametrize("lam", [0.0, 0.37, 1.0, *slow(1.2)])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3"])
def test_a_merged_copy_is_the_model_at_one_intensity(family: str, lam: float, tmp_path: Path) -> None:
    ends = pair(family, torch.bfloat16)
    paths = save(ends[0], tmp_path / "a"), save(ends[1], tmp_path / "b")
    copied, exact = dami.materialize(dami.load_pair(*paths)[0], lam), merged(*ends, lam, torch.float64)
    assert type(copied) is type(ends[0])
    names = [name for name, _ in copied.named_parameters()]
    assert names == [name for name, _ in exact.named_parameters()]
    for name, parameter in copied.named_parameters():
        rounding = 0.5 * torch.finfo(torch.bfloat16).eps * exact.get_parameter(name).abs() + 1e-6
        assert ((parameter - exact.get_parameter(name)).abs() <= rounding).all()
    copied.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    inputs = batch("left")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, copied(**inputs).logits)
    assert not hasattr(loaded, "dami_patch")


@pytest.mark.parametrize("tokenizer", [None, object()])
def test_what_cannot_be_merged(ends: tuple[Path, Path], tokenizer: Any) -> None:
    model, _ = dami.load_pair(*ends)
    with pytest.raises(ValueError, match="intensity must be one number, got 2"):
        dami.materialize(model, [0.0, 1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be patched"):
        dami.materialize(dami.unpatch_model(model), 0.5)
    with pytest.raises(TypeError, match="model must be patched"):
        dami.save_pair(model, "nowhere", tokenizer)


class FakeApi:
    """Stands in for the hub: keeps what is uploaded."""

    def __init__(self, token: Any = None) -> None:
        pass

    def create_repo(self, repo_id: str, private: Any, exist_ok: bool) -> Any:
        return type("Repository", (), {"repo_id": f"someone/{repo_id}"})

    def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> dict[str, Any]:
        files = {str(file.relative_to(folder_path)) for file in folder_path.rglob("*") if file.is_file()}
        return {"repo_id": repo_id, "files": files, "card": ModelCard.load(folder_path / "README.md")}


def test_a_push_carries_the_model_card_and_the_tokenizer(
    ends: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dami.saving.directory.HfApi", FakeApi)
    monkeypatch.setattr("dami.loading.checkpoint.snapshot_download", lambda name, **_: str(ends["thinking" in name]))
    for end in ends:
        (end / "README.md").write_text("---\nlicense: mit\n---\n")
    packed = dami.pack("a/instruct", "a/thinking", tmp_path / "packed")
    for model in (dami.load_pair("a/instruct", "a/thinking", "int4")[0], dami.load_pair(packed)[0]):
        pushed = model.push_to_hub("pair-int4")
        assert pushed["repo_id"] == "someone/pair-int4"
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= pushed["files"]
        assert pushed["card"].data.base_model == ["a/instruct", "a/thinking"]
        assert pushed["card"].data.license == "mit"
        assert "chat_template=" in pushed["card"].text
    with pytest.raises(ValueError, match="push_to_hub must be False for a patched model"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True)


def _device_maps(model: PreTrainedModel) -> dict[str, dict[str, str]]:
    """Device maps that put a part, or all, on the disk."""
    some = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    return {"some": {**some, "model.rotary_emb": "cpu", "lm_head": "cpu"}, "all": {"": "disk"}}


@pytest.mark.parametrize("how", ["pack", "pack, old name", "pack what is loaded", "save_pair", "save_pretrained"])
def test_files_are_no_larger_than_asked_for(ends: tuple[Path, Path], how: str, tmp_path: Path) -> None:
    to = tmp_path / "pair"
    if how == "pack what is loaded":
        AutoModelForCausalLM.from_pretrained(ends[1]).save_pretrained(ends[1], safe_serialization=False)
    if how.startswith("pack"):
        dami.pack(*ends, to, **({"shard_bytes": 20_000} if "old" in how else {"max_shard_size": "20KB"}))
    elif how == "save_pair":
        dami.save_pair(dami.load_pair(*ends)[0], to, max_shard_size="20KB")
    else:
        dami.load_pair(*ends)[0].save_pretrained(to, max_shard_size="20KB")
    files = list(to.glob("*.safetensors"))
    assert len(files) > 1
    assert all(len(load_file(file)) == 1 or file.stat().st_size < 22_000 for file in files)
    assert torch.isfinite(logits(dami.load_pair(to)[0])).all()


def test_what_is_no_size_is_refused(ends: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`size` much is not in a valid format"):
        dami.pack(*ends, tmp_path / "pair", max_shard_size="much")
    assert not (tmp_path / "pair").exists()


@two_formats
@pytest.mark.parametrize(
    ("family", "which"), [("qwen3", "some"), ("llama", "all"), *slow(("qwen3", "all"), ("llama", "some"))]
)
def test_offloading_to_the_disk(family: str, which: str, format: str, tmp_path: Path) -> None:
    instruct, thinking = pair(family)
    directory = dami.pack(save(instruct, tmp_path / "a"), save(thinking, tmp_path / "b"), tmp_path / "packed", format)
    whole, _ = dami.load_pair(directory)
    device_map = _device_maps(whole)[which]
    model, _ = dami.load_pair(directory, device_map=device_map, offload_folder=tmp_path / "offloaded")
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    for _ in range(2):
        assert torch.equal(seeded_logits(model), seeded_logits(whole))
    with pytest.raises(ValueError, match="model must be on devices to make a merged copy, not offloaded"):
        dami.materialize(model, 0.5)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(seeded_logits(dami.load_pair(tmp_path / "again")[0]), seeded_logits(whole))


@two_formats
def test_what_a_module_reads_of_a_child_is_at_its_lam_when_offloaded(format: str, tmp_path: Path) -> None:
    """Mamba's mixer brings its convolution's weight from the disk by the child's hook, and never calls the child."""
    dami.save_pair(dami.patch_model(*architectures.pair(MambaConfig), format), tmp_path / "packed")
    whole, _ = dami.load_pair(tmp_path / "packed")
    device_map = {"backbone.embeddings": "cpu", "backbone.norm_f": "cpu", "lm_head": "cpu", "backbone.layers": "disk"}
    model, _ = dami.load_pair(tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offloaded")
    assert model.backbone.layers[0].mixer.conv1d.weight.is_meta
    ids = torch.randint(4, architectures.VOCABULARY, (4, 7))
    for lam in (0.37, LAM):
        with torch.no_grad():
            assert torch.equal(model(ids, intensity=lam).logits, whole(ids, intensity=lam).logits)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out
"""


def test_models_with_code_of_their_own(tmp_path: Path) -> None:
    """The code goes along into the packed pair, and runs only where it is trusted."""
    instruct, thinking = pair("llama")
    ends = save(instruct, tmp_path / "a"), save(thinking, tmp_path / "b")
    for end in ends:
        (end / "modeling_own.py").write_text(OWN_CODE)
        config = json.loads((end / "config.json").read_text())
        auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
        config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto}
        (end / "config.json").write_text(json.dumps(config))
    expected = 2 * seeded_logits(dami.patch_model(instruct, thinking))
    packed = dami.pack(*ends, tmp_path / "packed", "pair", trust_remote_code=True)
    for sources in (ends, (packed,)):
        model, _ = dami.load_pair(*sources, trust_remote_code=True)
        assert type(model).__name__ == "OwnForCausalLM"
        assert torch.equal(seeded_logits(model), expected)
        with pytest.raises(ValueError, match="trust_remote_code"):
            dami.load_pair(*sources)
