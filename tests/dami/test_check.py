"""`dami check`: what it says about two checkpoints, on disk and on a hub, without reading their weights."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dami
import pytest
import torch
from dami import cli
from dami.loading.checkpoint import Checkpoint
from dami.loading.preview import GPUS, SHARE, preview
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from tests.dami.families import pair
from tests.dami.hub import Hub, run_on, serving
from tests.dami.test_policies import DIFFERENCES, edit_config, edit_tensors, untie
from tests.dami.test_policies import ends as ends  # a fixture


def check(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["check", *map(str, arguments)], env={"COLUMNS": "100"})


def as_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    result = check(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_the_shipped_pair_matches_and_its_sizes_are_those_it_has() -> None:
    found = as_json()
    assert found["pair"] is True
    assert found["differences"] == []
    assert found["engines"] == {"transformers": "yes", "vLLM": "if it passes the self-test there"}
    for format in ("pair", "int8", "int4", "w8d4"):
        model, _ = dami.load_pair(*dami.example_pair(), format=format)
        assert found["sizes"][format] == dami.describe(model).nbytes
    assert found["parameters"] == sum(p.numel() for p in dami.materialize(model, 0).parameters())
    assert found["dtype"] == "bfloat16"
    assert found["fits"]["pair"] == sorted(GPUS, key=lambda name: GPUS[name])


def test_distances_are_those_of_the_rows_that_were_read() -> None:
    found = {each["part"]: each for each in as_json()["distances"]}
    assert found.keys() == {"attn", "embed", "mlp", "norm"}
    files = [load_file(path / "model.safetensors") for path in dami.example_pair()]
    rows = [file["model.embed_tokens.weight"][:64].double() for file in files]
    assert found["embed"]["relative"] == pytest.approx(((rows[1] - rows[0]).norm() / rows[0].norm()).item(), rel=1e-9)
    layers = [0, 2, 5]  # the first, the middle one, the last
    names = [f"model.layers.{i}.mlp.{each}_proj.weight" for i in layers for each in ("gate", "up", "down")]
    base = torch.cat([files[0][name][:64].double().flatten() for name in names])
    target = torch.cat([files[1][name][:64].double().flatten() for name in names])
    assert found["mlp"]["tensors"] == 9
    assert found["mlp"]["relative"] == pytest.approx(((target - base).norm() / base.norm()).item(), rel=1e-9)


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_it_tells_what_loading_resolves(difference: str, ends: tuple[Path, Path]) -> None:
    edit, told = DIFFERENCES[difference]
    edit(*ends)
    found = as_json(*ends)
    assert [each["subject"] for each in found["differences"]] == [line.partition(":")[0] for line in told]
    assert found["engines"]["transformers"] == "yes"
    assert found["engines"]["vLLM"] == (
        "no: it needs ends of one vocabulary"
        if difference.startswith("vocabulary")
        else "packed, if it passes the self-test there"
    )


def test_what_blocks_a_pair_comes_with_its_remedy_and_an_exit_code(ends: tuple[Path, Path]) -> None:
    edit_config(ends[1], rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rms_norm_eps=1e-3)
    found = as_json(*ends, code=1)
    assert found["pair"] is False
    assert {each["subject"] for each in found["differences"]} == {
        "config.rms_norm_eps",
        "rotary embedding",
    }
    assert all(each["remedy"] for each in found["differences"])
    assert found["engines"]["vLLM"] == "no: it is no pair"
    result = check(*ends)
    assert result.exit_code == 1
    assert "no pair" in result.stdout
    assert 'rope="instruct" or rope="thinking"' in " ".join(result.stdout.split())
    edit_config(ends[1], rms_norm_eps=1e-6)
    assert as_json(*ends, "--rope", "thinking")["pair"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "two checkpoints are checked, an instruct and a thinking one, got 1"),
        (["./nowhere", "./elsewhere"], "there is no checkpoint ./nowhere"),
        (["--rope", "mean"], "rope must be 'instruct' or 'thinking', got 'mean'"),
        (["--tokenizer", "mean"], "tokenizer must be 'instruct' or 'thinking', got 'mean'"),
        (["--dtype", "int8"], "dtype must be 'auto', float32, bfloat16 or float16, got 'int8'"),
    ],
)
def test_mistakes_exit_with_2(arguments: list[str], message: str) -> None:
    result = check(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_one_checkpoint_twice_is_no_pair(ends: tuple[Path, Path]) -> None:
    result = check(ends[0], ends[0])
    assert result.exit_code == 2
    assert "the chat modes of one hybrid model are no pair" in result.stderr


@pytest.mark.parametrize("columns", [40, 100, 300])
def test_it_fits_the_terminal(columns: int, ends: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dami.cli.check.out", Console(width=columns, highlight=False))
    untie(ends[1])
    result = check(*ends)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= columns


def test_a_copy_of_an_end_is_noticed(ends: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(ends[0], tmp_path / "copy")
    assert "are they two checkpoints?" in " ".join(check(ends[0], tmp_path / "copy").stdout.split())


def test_another_architecture_is_told_alone(ends: tuple[Path, Path], tmp_path: Path) -> None:
    pair("gpt2")[0].save_pretrained(tmp_path / "other")
    found = as_json(ends[0], tmp_path / "other", code=1)
    assert [each["subject"] for each in found["differences"] if each["resolution"] is None] == ["config.model_type"]
    assert found["sizes"] is None


def test_an_adapter_may_be_the_other_end(ends: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a hybrid model, too: the model and an adapter trained on it."""
    adapted = get_peft_model(pair("qwen3")[0], LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    assert as_json(ends[0], tmp_path / "adapter")["pair"] is True
    edit_config(ends[0], hidden_size=36)
    found = as_json(ends[0], tmp_path / "adapter", code=1)
    assert found["differences"][0]["ends"].endswith("in the adapter")


@pytest.mark.parametrize("other", ["checkpoint", "adapter"])
def test_an_adapter_may_be_the_instruct_end(other: str, ends: tuple[Path, Path], tmp_path: Path) -> None:
    """Its base is what it names, or `--base`; sizes are those that the pair has when loaded."""
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    for name in ("first", "second"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(ends[0]), config).save_pretrained(tmp_path / name)
    first, second = tmp_path / "first", tmp_path / "second" if other == "adapter" else ends[1]
    tensors = load_file(first / "adapter_model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in tensors.items()}, first / "adapter_model.safetensors")
    found = as_json(first, second)
    assert found["pair"] is True
    assert found["engines"]["vLLM"] == "packed, if it passes the self-test there"
    assert not found["streams"]
    for format in ("pair", "w8d4"):
        model, _ = dami.load_pair(first, second, format=format)
        assert found["sizes"][format] == dami.describe(model).nbytes
    assert "dami pack reads with both ends in memory" in " ".join(check(first, second).stdout.split())
    edit_config(first, base_model_name_or_path="", file="adapter_config.json")
    edit_config(tmp_path / "second", base_model_name_or_path="", file="adapter_config.json")
    assert "does not say what it was trained on: name it, base=" in " ".join(check(first, second).stderr.split())
    assert as_json(first, second, "--base", ends[0]) == found
    edit_config(ends[0], hidden_size=36)
    blocked = as_json(first, second, "--base", ends[0], code=1)["differences"]
    assert any(each["ends"].endswith("in the adapter") for each in blocked)


def test_a_choice_between_ends_needs_two_checkpoints(ends: tuple[Path, Path], tmp_path: Path) -> None:
    get_peft_model(pair("qwen3")[0], LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    result = check(ends[0], tmp_path / "adapter", "--rope", "thinking")
    assert result.exit_code == 2
    assert "rope must be left out with an adapter, which has the rope of its model" in result.stderr
    result = check(*ends, "--base", ends[0])
    assert result.exit_code == 2
    assert "base is for an adapter as the instruct end" in result.stderr


@pytest.mark.parametrize("format", ["pair", "w8d4"])
def test_what_fits_on_no_gpu_takes_several(format: str) -> None:
    found = preview(*map(Checkpoint.find, dami.example_pair()))
    largest = max(GPUS.values())
    assert found.fitting(largest * SHARE)[-1:] == ["MI300X"]
    assert found.fitting(3 * largest) == ["4 × MI300X"]
    assert found.loads(format)


@pytest.fixture
def hub(ends: tuple[Path, Path]) -> Iterator[str]:
    with serving({"someone/instruct": ends[0], "someone/thinking": ends[1], "someone/both": ends[0].parent}) as address:
        yield address


def check_on(hub: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_on(hub, cache, "check", *arguments, "--json")


@pytest.mark.slow
def test_folders_of_one_repository_are_read_in_ranges(
    hub: str, ends: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One end has its weights in two files, which an index names."""
    tensors = load_file(ends[1] / "model.safetensors")
    (ends[1] / "model.safetensors").unlink()
    files = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in {*files.values()}:
        save_file({name: tensors[name] for name in files if files[name] == file}, ends[1] / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (ends[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    folders = ("--subfolder", "instruct", "--thinking-subfolder", "thinking")
    done = check_on(hub, tmp_path_factory.mktemp("hub"), "someone/both", "someone/both", *folders)
    assert done.returncode == 0, done.stderr
    names = {"instruct": "someone/both/instruct", "thinking": "someone/both/thinking"}
    expected = as_json(ends[0].parent, ends[0].parent, *folders)
    assert json.loads(done.stdout) == expected | names == as_json(*ends) | names
    done = check_on(hub, tmp_path_factory.mktemp("hub"), "someone/both", "someone/both", "--subfolder", "nowhere")
    assert done.returncode == 2
    assert "there is no checkpoint someone/both/nowhere" in done.stderr


def test_checkpoints_on_a_hub_are_read_in_ranges(hub: str, ends: tuple[Path, Path], tmp_path: Path) -> None:
    """The same result as on disk; the client of the hub takes its address from the environment of its process."""
    untie(ends[1])

    def bulky(tensors: dict[str, torch.Tensor]) -> None:
        tensors["mtp.weight"] = torch.zeros(1_000_000)  # which neither model runs

    for path in ends:
        edit_tensors(path, bulky)
    done = check_on(hub, tmp_path, "someone/instruct", "someone/thinking")
    assert done.returncode == 0, done.stderr
    names = {"instruct": "someone/instruct", "thinking": "someone/thinking"}
    assert json.loads(done.stdout) == as_json(*ends) | names
    assert 0 < Hub.served < 1_000_000
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
