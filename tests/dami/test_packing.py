"""Packing from a hub whose weights stay there, packing that was interrupted, and packing of experts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dami
import pytest
import torch
from dami.files import MARK
from dami.loading import packing, shards
from dami.loading.checkpoint import Checkpoint
from dami.loading.match import Match
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from tests.dami import architectures
from tests.dami.hub import Hub, run_on, serving
from tests.dami.test_policies import edit_config, in_fp8, to_dtype
from tests.dami.test_policies import ends as ends  # a fixture

SMALL_FILES = "6KB"


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a packed pair by name."""
    return {file.name: file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture
def hub(ends: tuple[Path, Path]) -> Iterator[str]:
    with serving({"someone/instruct": ends[0], "someone/thinking": ends[1]}) as address:
        yield address


def test_a_pair_is_packed_from_the_hub_with_neither_checkpoint_on_disk(
    hub: str, ends: tuple[Path, Path], tmp_path: Path
) -> None:
    """What a broken connection did not bring is asked for again; an interrupted run goes on where it stopped."""
    expected = dami.pack(*ends, tmp_path / "expected", "pair", max_shard_size="1GiB")
    stored = sum(file.stat().st_size for end in ends for file in end.glob("*.safetensors"))
    command = ("pack", "someone/instruct", "someone/thinking", "--format", "pair", "--stream", "--resume")
    Hub.cuts, Hub.stop = 3, stored // 2
    done = run_on(hub, tmp_path, *command, "-o", str(tmp_path / "packed"))
    assert done.returncode == 2
    assert "403" in done.stderr
    assert (tmp_path / "packed.partial" / MARK).exists()
    Hub.stop = None
    done = run_on(hub, tmp_path, *command, "-o", str(tmp_path / "packed"))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "packed.partial").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    packed, other = contents(tmp_path / "packed"), contents(expected)
    assert packed.keys() == other.keys()
    assert all(packed[name] == other[name] for name in other if name.endswith(".safetensors"))
    model, _ = dami.load_pair(tmp_path / "packed")
    assert [parent["name"] for parent in model.dami_patch.origin.parents] == ["someone/instruct", "someone/thinking"]


class Stopped:
    """Stands in for `save_file`: raises an error instead of writing a file for the n-th time, and counts."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.files = at, 0

    def __call__(self, tensors: dict[str, Tensor], file: Path, **options: Any) -> None:
        self.files += 1
        if self.files == self.at:
            file.write_bytes(b"some")
            raise KeyboardInterrupt
        save_file(tensors, file, **options)


@pytest.mark.parametrize("format", ["int4", "w8d4"])
def test_an_interrupted_run_goes_on_where_it_stopped(
    format: str, ends: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"format": format, "max_shard_size": SMALL_FILES, "resume": True}
    expected = contents(dami.pack(*ends, tmp_path / "expected", **{**options, "resume": False}))
    files = sum(name.endswith(".safetensors") for name in expected)
    assert files > 3
    monkeypatch.setattr(shards, "save_file", Stopped(3))
    with pytest.raises(KeyboardInterrupt):
        dami.pack(*ends, tmp_path / "packed", **options)
    partial = tmp_path / "packed.partial"
    assert [file.name for file in sorted(partial.glob("*.safetensors"))] == [f"0000{i}.safetensors" for i in range(3)]
    monkeypatch.setattr(shards, "save_file", counted := Stopped())
    dami.pack(*ends, tmp_path / "packed", **options)
    assert counted.files == files - 2
    assert contents(tmp_path / "packed") == expected
    assert not partial.exists()


def test_what_was_lost_of_an_interrupted_run_is_packed_again(
    ends: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a run that was interrupted when all files were complete, and half of them had their names."""
    options: dict[str, Any] = {"max_shard_size": SMALL_FILES, "resume": True}
    expected = contents(dami.pack(*ends, tmp_path / "expected", max_shard_size=SMALL_FILES))

    def stopped(*_: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(packing, "_describe", stopped)
        with pytest.raises(OSError, match="the disk is full"):
            dami.pack(*ends, tmp_path / "packed", **options)
    partial = tmp_path / "packed.partial"
    (partial / "00001.safetensors").rename(partial / "model-00002-of-00009.safetensors")
    with (partial / shards.RECORD).open("a") as record:
        record.write('{"tensors": [')  # a line that was cut
    dami.pack(*ends, tmp_path / "packed", **options)
    assert contents(tmp_path / "packed") == expected


def test_a_run_of_something_else_is_not_gone_on_with(
    ends: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shards, "save_file", Stopped(2))
        with pytest.raises(KeyboardInterrupt):
            dami.pack(*ends, tmp_path / "packed", max_shard_size=SMALL_FILES, resume=True)
    with pytest.raises(ValueError, match=r"packed.partial is of a run that differs in format, max_shard_size"):
        dami.pack(*ends, tmp_path / "packed", "w8d4", resume=True)
    (ends[1] / "model.safetensors").touch()
    with pytest.raises(ValueError, match="differs in ends: remove it, or do not resume"):
        dami.pack(*ends, tmp_path / "packed", max_shard_size=SMALL_FILES, resume=True)
    dami.pack(*ends, tmp_path / "packed", max_shard_size=SMALL_FILES)
    dami.load_pair(tmp_path / "packed")


def test_what_cannot_be_read_tensor_by_tensor_is_not_streamed(ends: tuple[Path, Path], tmp_path: Path) -> None:
    torch.save(load_file(ends[1] / "model.safetensors"), ends[1] / "pytorch_model.bin")
    (ends[1] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"stream must be False: .*thinking is not stored as the model is"):
        dami.pack(*ends, tmp_path / "packed", stream=True)


@pytest.fixture
def experts(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints whose experts are stored one by one, and are one weight in the model."""
    models = architectures.pair(Qwen3MoeConfig)
    for model, name in zip(models, ("instruct", "thinking"), strict=True):
        model.save_pretrained(tmp_path / name)
    return tmp_path / "instruct", tmp_path / "thinking"


@torch.no_grad()
def logits(model: Any, lam: Any = architectures.LAM) -> Tensor:
    torch.manual_seed(3)
    return model(torch.randint(4, architectures.VOCABULARY, (4, 7)), intensity=lam).logits


@pytest.mark.parametrize("format", ["pair", "w8d4"])
def test_experts_are_read_layer_by_layer(
    format: str, experts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither end is ever a whole model, but for the instruct end where it is loaded."""
    assert any("experts.3.up_proj" in name for name in load_file(experts[1] / "model.safetensors"))
    plain = [AutoModelForCausalLM.from_pretrained(end) for end in experts]
    expected = logits(dami.patch_model(*plain, format))
    loaded = []
    whole = Checkpoint.model
    monkeypatch.setattr(Checkpoint, "model", lambda self, **how: loaded.append(self.name) or whole(self, **how))
    packed = dami.pack(*experts, tmp_path / "packed", format)
    assert not loaded
    assert torch.equal(logits(dami.load_pair(*experts, format)[0]), expected)
    assert loaded == ["instruct"]
    assert torch.equal(logits(dami.load_pair(packed)[0]), expected)
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert config["interpolated"]["model.layers.*.mlp.experts.gate_up_proj"] == format


def test_experts_in_fp8_have_the_bits_that_transformers_gives_them(experts: tuple[Path, Path], tmp_path: Path) -> None:
    for end in experts:
        to_dtype(end, torch.bfloat16)
        in_fp8(end)
    plain = [Checkpoint.find(end).model() for end in experts]
    expected = logits(dami.patch_model(*plain))
    assert torch.equal(logits(dami.load_pair(dami.pack(*experts, tmp_path / "packed", "pair"))[0]), expected)


def test_a_missing_expert_is_told(experts: tuple[Path, Path], tmp_path: Path) -> None:
    file = experts[1] / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.2.down_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1.mlp.experts.down_proj: .*\[4, .*instruct end, .*\[3, .*thinking end"):
        dami.pack(*experts, tmp_path / "packed")


def test_the_order_of_experts_is_that_of_their_numbers(tmp_path: Path) -> None:
    """Of twelve, the eleventh comes after the third."""
    config = architectures.small(Qwen3MoeConfig)
    config.num_experts = 12
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    end = Checkpoint.find(tmp_path / "a")
    stored = Match.of(end, Checkpoint.find(tmp_path / "b")).stored[0]
    assert stored.complete
    for name, tensor in model.state_dict().items():
        if name in stored.headers:
            assert torch.equal(stored.read(end, name), tensor), name
    assert {name for name, _ in stored.tensors(end)} == stored.headers.keys()


def test_what_is_sampled_of_experts_is_the_first_of_a_few_layers(experts: tuple[Path, Path]) -> None:
    from dami.loading.preview import preview

    edit_config(experts[1])
    found = preview(*map(Checkpoint.find, experts))
    assert found.streams
    sampled = {each.part: each.tensors for each in found.distances}
    assert sampled["experts"] == 2 * 3  # gate, up and down in both layers
