"""`dami check`: what it says about two checkpoints, on disk and on a hub, without reading their weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import dami
import pytest
import torch
from dami import cli
from dami.loading.checkpoint import Checkpoint
from dami.loading.preview import GPUS, SHARE, preview
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from tests.dami.families import pair
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


@pytest.mark.parametrize("format", ["pair", "w8d4"])
def test_what_fits_on_no_gpu_takes_several(format: str) -> None:
    found = preview(*map(Checkpoint.find, dami.example_pair()))
    largest = max(GPUS.values())
    assert found.fitting(largest * SHARE)[-1:] == ["MI300X"]
    assert found.fitting(3 * largest) == ["4 × MI300X"]
    assert found.loads(format)


class Hub(BaseHTTPRequestHandler):
    """The parts of a hub's API that a client uses to read a repository. It counts the bytes of weights it hands out."""

    directories: ClassVar[dict[str, Path]] = {}
    served = 0

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        info = re.fullmatch(r"/api/models/(\w+/\w+)(?:/revision/\w+)?", path)
        tree = re.fullmatch(r"/api/models/(\w+/\w+)/tree/\w+", path)
        file = re.fullmatch(r"/(\w+/\w+)/resolve/\w+/(.+)", path)
        if info:
            names = [{"rfilename": name} for name in self._files(info[1])]
            self._send(json.dumps({"id": info[1], "sha": "0" * 40, "siblings": names}).encode())
        elif tree:
            files = [
                {"type": "file", "path": name, "size": (self.directories[tree[1]] / name).stat().st_size, "oid": "0123"}
                for name in self._files(tree[1])
            ]
            self._send(json.dumps(files).encode())
        elif file and (self.directories[file[1]] / file[2]).exists():
            content = (self.directories[file[1]] / file[2]).read_bytes()
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            part = content[int(span[1]) : int(span[2]) + 1] if span else content
            if file[2].endswith(".safetensors") and self.command == "GET":
                assert span, "the whole file of weights was asked for"
                type(self).served += len(part)
            self._send(part, 206 if span else 200)
        else:
            self._send(b"", 404)

    def _files(self, repository: str) -> list[str]:
        where = self.directories[repository]
        return [each.relative_to(where).as_posix() for each in where.rglob("*") if each.is_file()]

    def _send(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content + self.path.encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(ends: tuple[Path, Path]) -> Iterator[str]:
    Hub.directories = {"someone/instruct": ends[0], "someone/thinking": ends[1], "someone/both": ends[0].parent}
    Hub.served = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def check_on(hub: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_ENDPOINT": hub,
        "HF_HOME": str(cache / "cache"),
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "dami", "check", *arguments, "--json"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


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


def test_base_is_not_for_check() -> None:
    result = check("--base", "somewhere")
    assert result.exit_code == 2
    assert "base is for an adapter as the instruct end, which is not checked: name its base" in " ".join(
        result.output.split()
    )


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
