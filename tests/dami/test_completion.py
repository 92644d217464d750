"""Completion in a shell: names that the command line knows, quickly, and nothing where a pair cannot be read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dami import cli
from dami.sources import FOLDER, SETTINGS
from typer.main import get_command

PROGRAM = """
import sys
from dami.cli import app
try:
    app(prog_name="dami")
finally:
    sys.stderr.write(str("torch" in sys.modules))
"""


def completed(line: str) -> list[str]:
    """What bash would offer for the last word of a line."""
    variables = {
        "_DAMI_COMPLETE": "complete_bash",
        "COMP_WORDS": f"dami {line}",
        "COMP_CWORD": str(line.count(" ") + 1),
    }
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.stderr == "False"
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("pa", ["pack"]),
        ("describe --format i", ["int8", "int4"]),
        ("pack --format w", ["w8d4"]),
        ("evaluate --verifier ", ["math", "word", "contains"]),
        ("study --dtype b", ["bfloat16"]),
        ("generate --chat-template t", ["thinking"]),
        ("serve --default-intensity ", ["low", "medium", "high", "auto"]),
        ("generate -l 0 -l h", ["high"]),
        ("generate --pair no/such pair -l ", []),
        ("serve --served", ["--served-model-name"]),
    ],
)
def test_names_are_completed_without_torch(line: str, words: list[str]) -> None:
    assert completed(line) == words


def test_presets_are_those_of_the_pair_that_is_named(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    file = tmp_path / FOLDER / SETTINGS
    file.write_text('{"presets": {"little": 0.1}}')
    (tmp_path / "config.json").write_text("{}")
    assert completed(f"generate --pair x {tmp_path} -l ") == ["little"]
    assert completed(f"serve {tmp_path} --default-intensity ") == ["little"]
    file.write_text("no JSON")
    assert completed(f"generate --pair x {tmp_path} -l ") == []


def test_verifiers_and_formats_are_those_that_there_are() -> None:
    from dami.evaluation.verifiers import VERIFIERS

    from dami_kernels import formats

    assert sorted(completed("evaluate --verifier ")) == sorted(VERIFIERS)
    assert sorted(completed("describe --format ")) == sorted(formats.names())


def test_a_script_for_the_shell_is_shown() -> None:
    # Typer's own switch: otherwise it looks which shell has started the tests, and refuses sh.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    command = [sys.executable, "-c", PROGRAM, "--show-completion", "bash"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "_DAMI_COMPLETE=complete_bash" in done.stdout
    assert {"--install-completion", "--show-completion"} <= {
        each for p in get_command(cli.app).params for each in p.opts
    }
