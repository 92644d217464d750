"""What `dami serve` tells its server, without a model: the keys, and the names by which it may be called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from dami import cli
from dami.serving import app, engine, listening
from typer.testing import CliRunner, Result

LOCAL = ("localhost", "127.0.0.1", "::1")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings of the servers that were started."""
    settings: list[Any] = []
    monkeypatch.setattr(
        cli.serve, "load", lambda *_: (SimpleNamespace(dami_patch=SimpleNamespace(frontier={}, presets={})), None)
    )
    monkeypatch.setattr(engine, "Engine", lambda *_: None)
    monkeypatch.setattr(app, "create_app", lambda engine, tokenizer, given: settings.append(given))
    monkeypatch.setattr(listening, "run", lambda *_: 0)
    return settings


def serve(*arguments: str, key: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, ["serve", *arguments], env={"DAMI_API_KEY": key})


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


@pytest.mark.parametrize(
    ("arguments", "key", "name"), [(["--api-key", ""], None, "--api-key"), ([], "", "DAMI_API_KEY")]
)
def test_an_empty_key_is_no_key(served: list[Any], arguments: list[str], key: str | None, name: str) -> None:
    result = serve(*arguments, key=key)
    assert result.exit_code == 2
    assert f"{name} must hold printable ASCII" in result.output
    assert "got an empty one" in result.output
    assert not served
