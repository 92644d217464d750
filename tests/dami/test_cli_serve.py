"""What `dami serve` makes of options, environment and file, and what it tells its server, without a model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from dami import cli
from dami.cli.settings import Given
from dami.serving import app, engine, listening
from torch import nn
from typer.testing import CliRunner, Result

LOCAL = ("localhost", "127.0.0.1", "::1")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings of the servers that were started."""
    settings: list[Any] = []
    pair = nn.Module()
    pair.dami_patch = SimpleNamespace(frontier={}, presets={})
    monkeypatch.setattr(cli.serve, "load", lambda *_, **__: (pair, None))
    monkeypatch.setattr(engine, "Engine", lambda *_: SimpleNamespace(cuda_graphs=False, least_tail=3))
    monkeypatch.setattr(app, "create_app", lambda engine, tokenizer, given: settings.append(given))
    monkeypatch.setattr(listening, "run", lambda *_: 0)
    return settings


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[cli.serve.ServeSettings]:
    """The settings of the servers that would have been started."""
    found: list[cli.serve.ServeSettings] = []

    def note(given: Given[cli.serve.ServeSettings]) -> None:
        found.append(given.settings)
        raise typer.Exit(0)

    monkeypatch.setattr(cli.serve, "check", note)
    return found


def serve(*arguments: str, key: str | None = None, **variables: str) -> Result:
    return CliRunner().invoke(cli.app, ["serve", *arguments], env={"DAMI_API_KEY": key} | variables)


def written(directory: Path, text: str) -> str:
    file = directory / "serve.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_options_come_before_the_environment_and_that_before_the_file(
    found: list[cli.serve.ServeSettings], tmp_path: Path
) -> None:
    file = written(tmp_path, "port = 1\nmax_requests = 1\ndrain = 1\n")
    result = serve("--config", file, "--port", "3", DAMI_PORT="2", DAMI_MAX_REQUESTS="2")
    assert result.exit_code == 0, result.output
    assert [(each.port, each.max_requests, each.drain, each.max_body) for each in found] == [(3, 2, 1, 1 << 20)]
    assert serve(DAMI_CONFIG=file, DAMI_PORT="8000").exit_code == 0  # a default that is asked for
    assert (found[1].port, found[1].drain) == (8000, 1)
    assert serve("--config", file, "--port", "8000").exit_code == 0
    assert found[2].port == 8000


def test_every_setting_can_stand_in_a_file_or_in_the_environment(
    found: list[cli.serve.ServeSettings], tmp_path: Path
) -> None:
    frontier = str(tmp_path / "frontier.json")
    wanted = cli.serve.ServeSettings(
        pair=["one", "two"], host="::1", port=1, api_key=["a,b"], allowed_host=["x", "y"], served_model_name="name",
        default_intensity="auto", prompt_intensity=0.25, prompt_tail="turn", intensity_range=(0.0, 1.5),
        format="int4", dtype="float16", chat_template=0.5,
        max_model_len=100, kv_memory=0.5, max_batch_tokens=2, max_batch_rows=3, max_requests=4, max_body=5,
        read_timeout=6, answer_reserve=8, prefix_cache=False, cuda_graphs=True, invariant=True, target_latency=2.5,
        intensity_floor=0.25, frontier=Path(frontier), drain=7, revision="a", thinking_revision="b", subfolder="c",
        thinking_subfolder="d", cache_dir="e", thinking_cache_dir="f", token="g", thinking_token="h",
        trust_remote_code=True, thinking_trust_remote_code=False, base="i", tokenizer="instruct", rope="thinking",
        max_position_embeddings=9,
    )  # fmt: skip
    values = {each.name: getattr(wanted, each.name) for each in fields(wanted)}
    assert all(values[each.name] != each.default for each in fields(wanted))
    literal = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in literal.items())
    assert serve("--config", written(tmp_path, text)).exit_code == 0
    spelled = {name: ",".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v) for name, v in literal.items()}
    assert serve(**{f"DAMI_{name.upper()}": value for name, value in spelled.items()}).exit_code == 0
    assert found == [wanted, wanted]
    assert serve().exit_code == 0
    assert found[2] == cli.serve.ServeSettings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_model_length = 5", "serve.toml: there is no setting max_model_length: is max_model_len meant?"),
        ("max-model-len = 5", "serve.toml: there is no setting max-model-len: is max_model_len meant?"),
        ("[serve]\nport = 1", "serve.toml: there is no setting serve: is "),
        ("port = 65536", "serve.toml: port: Input should be less than or equal to 65535, got 65536"),
        ("port = 'x'", "serve.toml: port: Input should be a valid integer"),
        ("format = 'int3'", "serve.toml: format: must be one of pair, int8, int4, w8d4, lowrank, got 'int3'"),
        ("intensity_range = [1, 0]", "serve.toml: intensity_range must be two finite numbers, the lower first"),
        ("intensity_range = [1]", "serve.toml: intensity_range"),
        ("default_intensity = nan", "serve.toml: default_intensity: must be a finite number such as 0.5, got 'nan'"),
        ("prompt_tail = -1", "serve.toml: prompt_tail: must be a number of tokens or turn, got '-1'"),
        ("api_key = ''", "serve.toml: api_key must hold printable ASCII"),
        ("port = ", "serve.toml cannot be read: "),
        ("port = 1\nport = 2", "serve.toml cannot be read: "),
    ],
)
def test_what_is_wrong_in_a_file_is_told_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    result = serve("--config", written(tmp_path, text))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.startswith("dami: error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DAMI_MAX_MODEL_LENGTH": "5"}, "there is no setting DAMI_MAX_MODEL_LENGTH: is DAMI_MAX_MODEL_LEN meant?"),
        ({"DAMI_PORT": "tcp://10.0.0.1:80"}, "DAMI_PORT: Input should be a valid integer"),
        ({"DAMI_PORT": ""}, "DAMI_PORT: Input should be a valid integer"),
        ({"DAMI_KV_MEMORY": "-1"}, "DAMI_KV_MEMORY: Input should be greater than or equal to 0, got '-1'"),
        ({"DAMI_CHAT_TEMPLATE": "x"}, "DAMI_CHAT_TEMPLATE: must be instruct, thinking or a finite number, got 'x'"),
        ({"DAMI_INTENSITY_RANGE": "1,0"}, "DAMI_INTENSITY_RANGE must be two finite numbers"),
        ({"DAMI_CONFIG": "/no/such/file"}, "/no/such/file"),
    ],
)
def test_what_is_wrong_in_the_environment_is_told_in_one_line(variables: dict[str, str], message: str) -> None:
    result = serve(**variables)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_docs_example_is_read_as_it_says(found: list[cli.serve.ServeSettings], tmp_path: Path) -> None:
    docs = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    [text] = re.findall("```toml\n(.*?)```", docs, re.DOTALL)
    [commands] = re.findall("```sh\n(.*?)```", docs, re.DOTALL)
    variables = dict(re.findall(r"(DAMI_\w+)=(\S+)", commands))
    result = serve("--config", written(tmp_path, text), *commands.split("serve.toml")[1].split(), key=None, **variables)
    assert result.exit_code == 0, result.output
    assert found == [
        cli.serve.ServeSettings(
            pair=["INSTRUCT", "THINKING"], format="int4", host="0.0.0.0", port=8080, max_model_len=4096, kv_memory=8,
            intensity_range=(0, 1), allowed_host=["dami.example.com"], max_requests=512, api_key=["SECRET"],
        )
    ]  # fmt: skip


def test_variables_of_others_are_named_and_not_used(found: list[cli.serve.ServeSettings]) -> None:
    """Such as Kubernetes sets for a service of the name dami."""
    result = serve(DAMI_SERVICE_HOST="10.0.0.1", DAMI_CPU_ISA="avx2")
    assert result.exit_code == 0
    assert result.stderr == "not used, for they are no settings: DAMI_SERVICE_HOST\n"
    assert found == [cli.serve.ServeSettings()]


def test_help_of_serve_imports_nothing_heavy() -> None:
    heavy = {"torch", "fastapi", "pydantic_settings", "dami.serving"}
    script = (
        "import sys; from dami.cli import app; app(['serve', '--help'], standalone_mode=False); "
        f"sys.exit(len({heavy} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "DAMI_MAX_MODEL_LEN=4096" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "key", "keys", "hosts"),
    [
        ([], None, (), LOCAL),
        ([], "two words", ("two words",), ()),
        (["--api-key", "a", "--api-key", "b"], "c", ("a", "b"), ()),
        (["--host", "0.0.0.0"], None, (), ()),
        (["--allowed-host", "dami.example"], None, (), (*LOCAL, "dami.example")),
        (["--allowed-host", "dami.example"], "key", ("key",), (*LOCAL, "dami.example")),
    ],
)
def test_keys_and_hosts(
    served: list[Any], arguments: list[str], key: str | None, keys: tuple[str, ...], hosts: tuple[str, ...]
) -> None:
    result = serve(*arguments, key=key)
    assert result.exit_code == 0, result.output
    assert [(each.api_keys, each.allowed_hosts) for each in served] == [(keys, hosts)]
    assert ("anyone who reaches 0.0.0.0" in result.output) == ("0.0.0.0" in arguments)


@pytest.mark.parametrize("captures", [True, False])
def test_says_whether_it_captures_graphs(served: list[Any], monkeypatch: pytest.MonkeyPatch, captures: bool) -> None:
    limits: list[engine.Limits] = []
    monkeypatch.setattr(
        engine,
        "Engine",
        lambda model, given, _: limits.append(given) or SimpleNamespace(cuda_graphs=captures, least_tail=None),
    )
    result = serve("--no-cuda-graphs")
    assert ("captured as CUDA graphs and replayed: --no-cuda-graphs turns this off" in result.output) == captures
    assert serve().exit_code == 0
    assert [each.cuda_graphs for each in limits] == [False, None]


@pytest.mark.parametrize(
    ("arguments", "key", "name"), [(["--api-key", ""], None, "--api-key"), ([], "", "DAMI_API_KEY")]
)
def test_an_empty_key_is_no_key(served: list[Any], arguments: list[str], key: str | None, name: str) -> None:
    result = serve(*arguments, key=key)
    assert result.exit_code == 2
    assert f"{name} must hold printable ASCII" in result.output
    assert "got an empty one" in result.output
    assert not served


def test_a_measured_tail_is_proposed_at_the_start(served: list[Any]) -> None:
    result = serve()
    assert "--prompt-intensity 0 --prompt-tail 3 reads what prompts share once for all λ" in " ".join(
        result.output.split()
    )
    assert (served[0].prompt_intensity, served[0].prompt_tail) == ("same", 1)
    assert "3 is the least that costs nothing" in serve("--prompt-intensity", "0").output
    assert "tokens" not in serve("--prompt-intensity", "0", "--prompt-tail", "3").output
    assert "must be a number of tokens or turn, got 'all'" in serve("--prompt-tail", "all").output
    assert "prompt_intensity must be a number or a preset" in serve("--prompt-intensity", "high").output
