"""Every command takes a packed pair or two checkpoints, and the options of both, wherever they stand on the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dami
import pytest
from dami import cli, sources
from dami.cli.checkpoints import CheckpointSettings, named, refuse_checkpoint
from typer.main import get_command
from typer.testing import CliRunner, Result

ENDS = [str(end) for end in dami.example_pair()]
TAKES_PAIRS = (
    "calibrate",
    "demo",
    "describe",
    "evaluate",
    "generate",
    "merge",
    "pack",
    "serve",
    "study",
    "tails",
    "train-estimator",
    "tune",
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(dami.pack(*ENDS, tmp_path_factory.mktemp("pairs") / "packed", "pair"))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, [*arguments], env={"COLUMNS": "100"})


def output(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_what_is_written_by_pack_answers_as_the_two_do(packed: str) -> None:
    """The words of --pair are told from prompts, before or after them."""
    prompt, how = "What is 2 + 3?", ["-l", "0.5", "--greedy", "--json"]
    two = output("generate", prompt, "--pair", *ENDS, *how)
    assert json.loads(two)["text"]
    for arguments in (
        [prompt, "--pair", packed],
        ["--pair", packed, prompt],
        ["--pair", packed, "--", prompt],
        [f"--pair={packed}", prompt],
        ["--pair", ENDS[0], "--pair", ENDS[1], prompt],
        ["--pair", *ENDS, prompt],
        [f"--pair={Path(packed).parent}", prompt, "--subfolder", "packed"],
    ):
        assert output("generate", *how, *arguments) == two


MEASURES = {
    "evaluate": ["-l", "0", "-l", "1", "--questions", "2", "--verifier", "word", "--max-tokens", "3"],
    "study": ["-l", "0", "-l", "1", "--questions", "4", "--verifier", "word", "--max-tokens", "3"],
    "train-estimator": ["-l", "0", "-l", "1", "--questions", "20", "--samples", "1", "--max-tokens", "3"],
    "demo": ["--questions", "1"],
}
WRITES = {"evaluate": "frontier", "study": "study", "train-estimator": "intensity", "demo": "demo"}


@pytest.mark.parametrize(
    "command", [pytest.param(each, marks=[pytest.mark.slow] if each != "evaluate" else []) for each in MEASURES]
)
def test_what_measures_takes_a_packed_pair(command: str, packed: str, tmp_path: Path) -> None:
    task = [] if command == "demo" else [str(sources.QUESTIONS)]
    output(command, "--pair", packed, *task, *MEASURES[command], "-o", str(tmp_path))
    about = json.loads((tmp_path / f"{WRITES[command]}.json").read_text())
    if command == "evaluate":
        assert (about["pair"], about["format"]) == (packed, "pair")


def test_commands_with_the_pair_as_arguments_take_the_option_too(packed: str, tmp_path: Path) -> None:
    told = output("describe", packed)
    assert output("describe", "--pair", packed) == output("describe", f"--pair={packed}") == told
    assert output("describe", "--pair", *ENDS) == output("describe", *ENDS)
    output("merge", "-l", "0.5", "--pair", packed, "-o", str(tmp_path / "merged"))
    output("pack", "--pair", *ENDS, "-o", str(tmp_path / "again"), "--format", "pair")
    assert (tmp_path / "again" / "config.json").read_text() == Path(packed, "config.json").read_text()


def test_serve_takes_them_as_it_takes_all_its_settings(packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(pair: Any, *_: Any, checkpoints: Any) -> Any:
        asked.append((pair, checkpoints))
        raise ValueError("asked")

    monkeypatch.setattr(cli.serve, "load", load)
    for arguments, variables in (
        (["--pair", *ENDS, "--revision", "v1"], {}),
        ([*ENDS], {"DAMI_REVISION": "v1"}),
        ([], {"DAMI_REVISION": "v1", "DAMI_PAIR": ",".join(ENDS)}),
    ):
        CliRunner().invoke(cli.app, ["serve", "--port", "0", *arguments], env=variables)
    assert asked == [(ENDS, {"revision": "v1"})] * 3


@pytest.mark.parametrize("command", TAKES_PAIRS)
def test_every_option_of_a_checkpoint_is_one_of_every_command(command: str) -> None:
    options = {each.name for each in get_command(cli.app).commands[command].params}  # type: ignore[attr-defined]
    names = ("revision", "subfolder", "cache_dir", "token", "trust_remote_code")
    wanted = {f"{end}{name}" for name in names for end in ("", sources.THINKING)}
    wanted |= {"base", "tokenizer", "rope", "max_position_embeddings"}
    assert wanted == vars(CheckpointSettings()).keys()
    assert wanted <= options


def test_every_command_hands_them_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def note(*_: Any, **options: Any) -> Any:
        asked.append({name: options[name] for name in vars(CheckpointSettings()) if name in options})
        raise ValueError("asked")

    monkeypatch.setattr("dami.loading.load.load_pair", note)
    monkeypatch.setattr("dami.pack", note, raising=False)
    pair = ["--pair", "some/instruct", "some/thinking"]
    words = ["revision=a", "thinking-revision=b", "subfolder=c", "thinking-subfolder=d", "token=e", "thinking-token=f"]
    words += ["cache-dir=g", "thinking-cache-dir=h", "trust-remote-code", "no-thinking-trust-remote-code", "base=i"]
    words += ["tokenizer=thinking", "rope=instruct", "max-position-embeddings=9"]
    options = [f"--{word}" for word in words]
    own = {
        "generate": ["1 + 1"],
        "evaluate": [str(sources.QUESTIONS)],
        "study": [str(sources.QUESTIONS)],
        "train-estimator": [str(sources.QUESTIONS), "-o", str(tmp_path / "new")],
        "calibrate": [str(sources.QUESTIONS), "-o", str(tmp_path / "new")],
        "tune": [str(sources.QUESTIONS), "-o", str(tmp_path / "new")],
        "tails": [str(sources.QUESTIONS), "-o", str(tmp_path / "new")],
        "merge": ["-l", "1", "-o", str(tmp_path / "new")],
        "pack": ["-o", str(tmp_path / "new")],
        "serve": ["--port", "0"],
        "demo": ["-o", str(tmp_path / "new")],
        "describe": [],
    }
    assert own.keys() == {*TAKES_PAIRS}
    for command, more in own.items():
        result = run(command, *pair, *options, *more)
        assert (result.exit_code, result.stderr) == (2, "dami: error: asked\n"), command
    one = {"revision": "a", "subfolder": "c", "token": "e", "cache_dir": "g", "trust_remote_code": True, "base": "i"}
    one |= {"tokenizer": "thinking", "rope": "instruct", "max_position_embeddings": 9}
    other = {"revision": "b", "subfolder": "d", "token": "f", "cache_dir": "h", "trust_remote_code": False}
    assert asked == [one | {f"thinking_{name}": value for name, value in other.items()}] * len(own)


@pytest.mark.parametrize(
    ("words", "ends"),
    [
        (["owner/pair"], 1),
        (["owner/pair", "42 + 69 ="], 1),
        (["owner/pair", "-l", "1"], 1),
        (["owner/pair", "hello"], 1),
        (["owner/pair", "1 + " * 2000], 1),  # too long for the name of a file
        (["owner/pair", "questions.jsonl"], 1),
        (["owner/instruct", "owner/thinking"], 2),
        (["owner/instruct", "."], 2),  # a directory
        (["gpt2", "gpt2-thinking"], 2),  # on the hub only old models have no owner, and no pair
        (["gpt2", "--json"], 1),
        ([ENDS[0], "no/such"], 2),
        ([], 0),
        (["--json"], 0),
    ],
)  # fmt: skip
def test_words_that_name_a_pair(words: list[str], ends: int) -> None:
    assert named(words) == words[:ends]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "hi", "--pair"], "--pair must be followed by PAIR or INSTRUCT THINKING"),
        (["describe", "--pair", "--format", "int4"], "--pair must be followed by PAIR or INSTRUCT THINKING"),
        (["generate", "hi", "--pair", "one"], "no packed pair one: name its directory, or OWNER/NAME on the hub"),
        (["generate", ENDS[0]], "instruct is a checkpoint, not a prompt: name the pair with --pair, as --pair"),
        (["evaluate", ENDS[0]], "instruct is a checkpoint, not a task: name the pair with --pair, as --pair"),
        (["generate", "hi", "--pair", *ENDS, "--pair", ENDS[0]], "two checkpoints, got 3"),
        (["generate", "hi", "--pair", *ENDS, "--subfolder", "x"], "instruct/x is no checkpoint: it has no config.json"),
        (["pack", *ENDS, "-o", "out", "--thinking-subfolder", "x"], "thinking/x is no checkpoint"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_remedy(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_prompt_may_be_longer_than_a_name_and_no_task_is_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for word in ("1 + " * 2000, "a\0b", ""):
        refuse_checkpoint(word, "a prompt")
    with pytest.raises(ValueError, match=r"\. is a checkpoint, not a prompt"):
        refuse_checkpoint(".", "a prompt")


def test_an_option_of_the_thinking_end_needs_two_ends(packed: str) -> None:
    result = run("describe", packed, "--thinking-revision", "v1")
    assert "thinking_revision is for two checkpoints, got a packed pair: leave it out" in result.stderr


def test_a_packed_pair_is_not_packed_again(packed: str, tmp_path: Path) -> None:
    result = run("pack", packed, "-o", str(tmp_path / "new"))
    assert result.exit_code == 2
    assert "two checkpoints are packed, an instruct and a thinking one, got 1" in result.stderr
