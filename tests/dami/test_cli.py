"""The command line on the pair that ships: every command, and one line for every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import dami
import pytest
import typer
from dami import cli
from dami.cli import demo
from typer.main import get_command
from typer.testing import CliRunner, Result

from dami_kernels import formats

ENDS = dami.example_pair()
SHORT = ["--max-new-tokens", "6"]


def run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(cli.app, [*arguments], input=stdin, env={"COLUMNS": "100"})


def records(result: Result) -> list[dict[str, object]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("command", [[], *([name] for name in get_command(cli.app).commands)])  # type: ignore[attr-defined]
def test_help_names_every_option_in_full_in_a_narrow_terminal(command: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "80"})
    asked = get_command(cli.app)
    for name in command:
        asked = asked.commands[name]  # type: ignore[attr-defined]
    for option in asked.params:
        assert all(name in result.stdout for name in (*option.opts, *option.secondary_opts) if name.startswith("-"))
    if command != ["bench"]:  # whose --help is that of the benchmarks
        assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    for command in ("demo", "generate", "check", "describe", "pack", "merge", "serve", "bench", "doctor"):
        assert f" {command} " in result.stdout


def test_an_interrupted_command_says_that_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dami.evaluation import sweeps

    ask, calls = sweeps.ask, []

    def interrupted(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ask(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sweeps, "ask", interrupted)
    sizes = ("--questions", "8", "--rows", "4", "-l", "0", "-l", "1", "--max-tokens", "2", "--greedy")
    arguments = ("evaluate", *sizes, "-o", str(tmp_path / "out"))
    stopped = run(*arguments)
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith("dami: interrupted; the same command goes on where it stopped\n")
    assert run(*arguments).exit_code == 0
    assert len(calls) == 3 + 2  # of four batches, two were there


def test_no_command_is_told_in_half_a_sentence() -> None:
    told = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "80"}).stdout.partition("Commands:")[2]
    assert all(line.endswith(".") and not line.endswith("...") for line in told.strip().splitlines())


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys; from dami.cli import app; app(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["no-such-command"]])
def test_a_full_disk_is_told_in_one_line(arguments: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "from dami.cli import app; app()", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
        silent = subprocess.run(command, env=environment, stdout=full, stderr=full)
    assert done.returncode == silent.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No such command" in done.stderr if "no-such" in arguments[0] else "No space left on device" in done.stderr


def test_version() -> None:
    assert run("--version").stdout == f"dami {dami.__version__}\n"


def test_the_package_is_the_command() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    shown = subprocess.run([sys.executable, "-m", "dami", "--version"], env=environment, capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (0, f"dami {dami.__version__}\n")


def test_formats() -> None:
    exact, small = (
        records(run("generate", "What is 2 + 3?", "-l", "0.5", "--greedy", "--json", "--format", format))
        for format in ("pair", "w8d4")
    )
    assert small[0]["text"] == exact[0]["text"]
    described = run("describe", "--format", "w8d4")
    assert "w8d4" in described.stdout


def test_the_names_of_formats() -> None:
    assert sorted(cli.options.FORMATS) == formats.names()


def test_generate_shows_intensities_side_by_side() -> None:
    result = run("generate", "What is 2 + 3?", "-l", "0", "-l", "0.25", *SHORT)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if "λ=0 " in line]
    assert "λ=0.25" in line
    assert "What is 2 + 3?" in result.stdout
    assert "\x1b" not in result.stdout


def test_generate_answers_at_three_intensities_unless_told() -> None:
    answers = records(run("generate", "What is 2 + 3?", "--json", *SHORT))
    assert [answer["intensity"] for answer in answers] == [0.0, 0.5, 1.0]
    assert list(answers[0]) == ["prompt", "intensity", "thought", "text", "tokens", "finished"]


def test_intensities_are_shown_as_they_are_written(tmp_path: Path) -> None:
    options = ["-l", "-0.0", "-l", "medium", "-l", "auto", "-l", "2.5"]
    result = run("generate", "What is 2 + 3?", "--json", *options, *SHORT)
    zero, medium, auto, beyond = (json.dumps(answer["intensity"]) for answer in records(result))
    assert (zero, medium, beyond) == ("0.0", "0.6", "2.5")
    assert len(auto) <= 6  # one of 21 λ
    assert "λ = 2.5 lies beyond the two ends: far from them answers are nonsense" in result.stderr
    assert "lies beyond" not in run("generate", "What is 2 + 3?", "-l", "1", *SHORT).stderr


def test_generate_is_repeatable_and_heeds_its_seed() -> None:
    prompts = ["What is 27 + 38 - 14 + 9?"] * 8
    options = ["--json", "-l", "1", "--max-new-tokens", "12"]
    first, again, other = (run("generate", *prompts, *options, "--seed", seed) for seed in ("1", "1", "2"))
    assert records(first) == records(again) != records(other)


def test_generate_greedily_ignores_the_seed() -> None:
    first, other = (
        run("generate", "What is 2 + 3?", "--json", "--greedy", "--seed", seed, *SHORT) for seed in ("1", "2")
    )
    assert records(first) == records(other)


def test_generate_reads_a_file_in_batches(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = ["What is 2 + 3?", "", '{"prompt": "gcd(12, 18)"}', '{"messages": [{"role": "user", "content": "1 + 1"}]}']
    file.write_text("\n".join(lines))
    options = ["--file", str(file), "--json", "-l", "0", "-l", "1", *SHORT]
    together, apart = records(run("generate", *options)), records(run("generate", *options, "--batch-size", "1"))
    assert [(a["prompt"], a["intensity"]) for a in together] == [(a["prompt"], a["intensity"]) for a in apart]
    assert len(together) == 6
    assert [answer["prompt"] for answer in together[::2]] == [
        "What is 2 + 3?",
        "gcd(12, 18)",
        [{"role": "user", "content": "1 + 1"}],
    ]


def test_generate_reads_stdin() -> None:
    answers = records(run("generate", "--json", "-l", "0", *SHORT, stdin="1 + 1\n2 + 2\n"))
    assert [answer["prompt"] for answer in answers] == ["1 + 1", "2 + 2"]


@pytest.mark.parametrize("intensities", [["-l", "1"], ["-l", "0", "-l", "1"]])
def test_generate_streams_the_same_answer(intensities: list[str]) -> None:
    options = ["What is 27 + 38?", "--greedy", *intensities, *SHORT]
    told = records(run("generate", "--json", *options))[-1]
    result = run("generate", "--stream", *options)
    assert result.exit_code == 0, result.output
    assert str(told["text"]) in result.stdout


def test_generate_raw_skips_the_chat_template() -> None:
    with_template, raw = (run("generate", "1 + 1 =", "--json", "--greedy", *SHORT, *flag) for flag in ([], ["--raw"]))
    assert records(with_template) != records(raw)


@pytest.mark.parametrize("template", ["thinking", "0.5"])
def test_generate_takes_a_chat_template_by_name_or_by_lam(template: str) -> None:
    options = ["1 + 1 =", "--json", "--greedy", *SHORT]  # the ends of the shipped pair share one
    assert records(run("generate", *options, "--chat-template", template)) == records(run("generate", *options))


def test_describe_accounts_for_every_parameter() -> None:
    result = run("describe")
    assert result.exit_code == 0, result.output
    model, _ = dami.load_pair(*dami.example_pair())
    description = dami.describe(model)
    assert f"{len(description.rows)} parameters" in result.stdout
    for name in ("q_proj", "gate_proj", "input_layernorm", "embed_tokens", "lm_head"):
        assert name in result.stdout
    assert result.stdout == run("describe", *map(str, dami.example_pair())).stdout
    assert "float32" not in result.stdout
    assert "float32" in run("describe", "--dtype", "float32").stdout


def test_demo_leaves_a_picture_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three λ, of the eleven that it sweeps."""
    assert list(demo.SWEPT) == [n / 10 for n in range(11)]
    monkeypatch.setattr(demo, "SWEPT", [0.0, 0.5, 1.0])
    result = run("demo", "--questions", "2", "--output", str(tmp_path / "new" / "directory"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new" / "directory" / "curve.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "new" / "directory" / "demo.json").read_text())
    assert [p["intensity"] for p in record["points"]] == [0.0, 0.5, 1.0]
    assert record["questions"] == 2
    lams = [answer["intensity"] for answer in record["shown"]]
    assert lams[::3] == [0.0] * 5
    assert lams[1::3] == [1.0] * 5
    assert len(lams[2::3]) == 5  # auto's
    assert 0 <= record["auto"]["accuracy"][0] <= 1
    assert "auto λ=" in result.stdout
    assert "◆" in result.stdout
    # One pair against three copies.
    assert record["copies"]["weights"] / record["patched"]["weights"] == pytest.approx(1.5, rel=0.01)
    assert len(record["copies"]["texts"]) == len(record["patched"]["texts"]) == 15
    both = zip(record["copies"]["answers"], record["patched"]["answers"], strict=True)
    assert len(record["gaps"]) == sum(ours != theirs for ours, theirs in both)
    assert f"{15 - len(record['gaps'])} of 15 greedy answers agree" in " ".join(result.output.split())


def test_a_pair_is_packed_described_and_merged(tmp_path: Path) -> None:
    instruct, thinking = map(str, dami.example_pair())
    packed, merged = tmp_path / "packed", tmp_path / "merged"
    result = run("pack", instruct, thinking, "-o", str(packed), "--format", "w8d4")
    assert result.exit_code == 0, result.output
    assert "Load it with dami.load_pair(" in " ".join(result.stdout.split())
    assert re.search(r"packed: \d\.\d MB\. ", " ".join(result.stdout.split()))
    again = run("pack", instruct, thinking, "-o", str(packed))
    assert again.exit_code == 2
    assert "exists already" in " ".join(again.stderr.split())
    assert run("pack", instruct, thinking, "-o", str(packed), "--overwrite").exit_code == 0
    assert "int4" in run("describe", str(packed)).stdout
    assert run("merge", str(packed), "--intensity", "0.8", "-o", str(merged)).exit_code == 0
    card = (merged / "README.md").read_text()
    assert "# instruct and thinking, merged at λ = 0.8" in card
    assert "the weights 0.2 · W(0) + 0.8 · W(1)" in card
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config
    assert (merged / "tokenizer.json").exists()
    assert run("merge", instruct, thinking, "-l", "0.8", "-o", str(merged)).exit_code == 2
    refused = run("merge", instruct, thinking, "-l", "auto", "-o", str(tmp_path / "auto"))
    assert "dami merge takes a number or a preset as intensity, got 'auto'" in refused.stderr
    assert "λ=0.4." in run("merge", instruct, thinking, "-l", "low", "-o", str(tmp_path / "low")).stdout
    assert "merged at λ = 0.4" in (tmp_path / "low" / "README.md").read_text()


def test_bench_runs_the_checkouts_benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    script = tmp_path / "benchmarks" / "__main__.py"
    script.write_text("import pathlib, sys; pathlib.Path('ran').write_text(' '.join(sys.argv[1:])); sys.exit(3)")
    monkeypatch.setattr(cli.machine, "CHECKOUT", tmp_path)
    assert run("bench", "--quick", "-n", "1").exit_code == 3
    assert (tmp_path / "ran").read_text() == "--quick -n 1"


def test_bench_outside_a_checkout_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli.machine, "CHECKOUT", tmp_path)
    result = run("bench")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "make bench" in result.stderr


LINES = {
    "no-json.jsonl": "1 + 1",
    "empty.jsonl": "\n",
    "words.jsonl": '{"question": "?", "answer": "Tuesday"}',
    "bad-prompt": '{"prompt": 5}',
    "no-content": '{"messages": [{"role": "user", "content": null}]}',
    "half-a-letter": '{"prompt": "\\ud800"}',
    "binary": b"\xff\xfe",
    "frontier.json": "{}",
}


def test_what_needs_no_model_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    for name, text in LINES.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    for end in ("instruct", "thinking"):
        shutil.copytree(ENDS[0].parent / end, tmp_path / "pair" / end)
    (tmp_path / "nothing").mkdir()
    port = socket.create_server(("127.0.0.1", 0))
    taken = port.getsockname()[1]
    mistakes = {
        "describe --format int3": "'--format': must be one of pair, int8, int4, w8d4, lowrank, got 'int3'",
        "pack --format int3 -o new": "'--format': must be one of pair, int8, int4, w8d4, lowrank, got 'int3'",
        "generate hi -l foo": "intensity must be a number, one of ['high', 'low', 'medium'] or 'auto', got 'foo'",
        "generate hi -l auto --pair pair/thinking pair/instruct": 'intensity="auto" needs an estimator',
        "generate hi --pair no/such/path pair/thinking": "there is no checkpoint no/such/path",
        "generate hi --pair nothing pair/thinking": "nothing is no checkpoint: it has no config.json",
        "generate --file bad-prompt": "bad-prompt, line 1: a prompt must be a text, or a list of messages",
        "generate --file no-content": "no-content, line 1: a prompt must be a text, or a list of messages",
        "generate --file half-a-letter": "half-a-letter, line 1: a prompt must be text that UTF-8 can hold",
        "generate --file binary": "binary must be text in UTF-8: 'utf-8' codec can't decode",
        "describe pair/instruct": "thinking must be given: pair/instruct is a checkpoint, not a packed pair",
        "demo -o binary": "'binary' is a file",
        "demo -o binary/out": "binary/out cannot be a directory: ",
        "evaluate no-json.jsonl": "no-json.jsonl:1 must be a JSON object with question",
        "evaluate empty.jsonl": "empty.jsonl must hold questions, and is empty",
        "evaluate words.jsonl": "words.jsonl:1: the verifier 'math' cannot judge the answer 'Tuesday'",
        "evaluate no-such.jsonl": "No such file or directory: 'no-such.jsonl'",
        "evaluate empty.jsonl --pair pair/instruct nothing": "empty.jsonl must hold questions",
        "evaluate --pair a b": "a task is needed for a pair of your own",
        "evaluate -l 1 -l 1": "intensities must be distinct numbers, one at least, got [1.0, 1.0]",
        "evaluate -o binary/out": "binary/out cannot be a directory: ",
        "evaluate --questions 1": "questions must be at least 2, got 1",
        "study --questions 3": "questions must be at least 4, got 3",
        "study -l 0 -l 0.5": "intensities must be distinct and hold 0 and 1, got [0.0, 0.5]",
        "study --control no/such/path": "there is no checkpoint no/such/path",
        "calibrate --prompts 5 -o new": "prompts must be at least 20, got 5",
        "calibrate --compare letters -o new": "compare must be one of ['math', 'text', 'word'], got 'letters'",
        "train-estimator --questions 2 -o new": "questions must be at least 20, got 2",
        "train-estimator -o binary/out": "binary/out cannot be a directory: ",
        "pack pair/instruct pair/thinking -o pair --overwrite": "pair must not be overwritten: pair/instruct, which is",
        "pack pair/instruct pair/thinking -o pair": "pair exists already: name another directory, or overwrite it",
        "merge pair/instruct pair/thinking -l 1 -o pair --overwrite": "pair must not be overwritten: pair/instruct",
        f"serve --port {taken}": f"cannot listen on 127.0.0.1 port {taken}: Address already in use",
        "serve --host no.such.host.invalid": "cannot listen on no.such.host.invalid port 8000: ",
        "serve --frontier frontier.json": "frontier.json must be a frontier.json of dami evaluate: KeyError: 'points'",
        "serve --default-intensity foo --port 0": "one of ['high', 'low', 'medium'] or 'auto', got 'foo'",
        "serve --target-latency -1 --port 0": "target_latency must be finite and above 0, got -1.0",
    }
    script = """
import sys
from dami.cli import app
for line in sys.stdin:
    code = app(line.split(), standalone_mode=False)
    print(code, "torch" in sys.modules, file=sys.stderr)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], input="\n".join(mistakes), cwd=tmp_path, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    port.close()
    told = done.stderr.splitlines()
    assert told[1::2] == ["2 False"] * len(mistakes), done.stderr
    for (command, message), line in zip(mistakes.items(), told[::2], strict=True):
        assert line.startswith("dami: error: "), command
        assert message in line, command
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-command"], "No such command"),
        (["generate", "hi", "--no-such-option"], "No such option"),
        (["evaluate", "x.jsonl", "-l", "abc"], "must be a finite number such as 0.5, got 'abc'"),
        (["generate", "hi", "-l", "nan"], "must be a finite number such as 0.5, got 'nan'"),
        (["generate", "hi", "-l", "inf"], "must be a finite number such as 0.5, got 'inf'"),
        (["generate"], "no prompts: stdin is empty"),
        (["generate", "--pair", "my-piar", "x"], "stdin is empty; --pair has taken 'x' for the thinking end"),
        (["generate", "--file", "no/such/file"], "no/such/file"),
        (["generate", "hi", "--file", __file__], "prompts come as arguments or with --file, got both"),
        (["generate", "hi", "--stream", "--json"], "--stream and --json exclude each other"),
        (["generate", "hi", "--greedy", "--top-p", "0.5"], "--greedy excludes --top-p"),
        (["generate", "hi", "--raw", "--chat-template", "thinking"], "--raw excludes --chat-template"),
        (["generate", "hi", "--chat-template", "thinker"], "must be instruct, thinking or a finite number"),
        (["generate", "hi", "--temperature", "0"], "'--temperature': must be above 0, got '0'"),
        (["generate", "hi", "--top-p", "2"], "--top-p"),
        (["generate", "hi", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "hi", "--pair", "./no/such", "./directory"], "no/such"),
        (["generate", "hi", "--pair", "one"], "there is no packed pair one"),
        (["describe", "one", "two", "three"], "a pair is one packed directory or two checkpoints, got 3"),
        (["pack", "one", "-o", "there"], "two checkpoints are packed, an instruct and a thinking one, got 1"),
        (
            ["generate", "hi", "--pair", str(ENDS[0]), str(ENDS[0]), "-l", "high"],
            "a preset, of which the model has none",
        ),
        (["pack", "./no/such", "./directory", "-o", "there"], "there is no checkpoint ./no/such"),
        (
            ["merge", "one", "two", "three", "-o", "there", "-l", "1"],
            "a pair is one packed directory or two checkpoints",
        ),
        (["merge", "one", "-o", "there"], "Missing option '--intensity'"),
        (["describe", "./no/such", "./directory"], "no/such"),
        (["describe", "--dtype", "int8"], "--dtype must be auto, bfloat16, float16 or float32, got 'int8'"),
        (["demo", "--output", __file__], "is a file"),
        (["demo", "--questions", "0"], "--questions"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("dami: error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{1 + 1}", "stdin, line 2 starts with { but is not JSON"),
        ('{"ask": "1 + 1"}', 'stdin, line 2 must have "prompt" or "messages", got [\'ask\']'),
    ],
)
def test_a_bad_line_is_named(line: str, message: str) -> None:
    result = run("generate", stdin=f"1 + 1\n{line}\n")
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_conversation_that_the_template_does_not_take_is_told() -> None:
    result = run("generate", "-l", "0", stdin='{"messages": [{"role": "system", "content": "Be brief."}]}\n')
    assert result.exit_code == 2
    assert (
        "the chat template does not take these messages: This model knows the roles user and assistant" in result.stderr
    )


def test_a_pair_that_cannot_be_asked_is_told(tmp_path: Path) -> None:
    for end in ENDS:
        shutil.copytree(end, tmp_path / end.name, ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    pair = [str(tmp_path / end.name) for end in ENDS]
    result = run("generate", "hi", "--pair", *pair)
    assert result.exit_code == 2
    assert (
        f"a tokenizer is needed, and {pair[0]} and {pair[1]} have none: put its files into {pair[0]}" in result.stderr
    )
    assert run("describe", *pair).exit_code == 0


def test_prompts_are_wanted_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    with pytest.raises(typer.Exit):
        cli.answer.read_prompts([], None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "c"], "a pair is one packed directory or two checkpoints, got 3"),
        (["--intensity-range", "1", "0"], "--intensity-range must be two finite numbers, the lower first"),
        (["--default-intensity", "1e999"], "must be a finite number such as 0.5, got '1e999'"),
        (["--default-intensity", "huge"], "must be a number, one of ['high', 'low', 'medium'] or 'auto', got 'huge'"),
        (["--max-model-len", "100000"], "max_model_len must be at most 512, got 100000"),
        (["--kv-memory", "-1"], "should be greater than or equal to 0"),
    ],
)
def test_serve_refuses(arguments: list[str], message: str) -> None:
    result = run("serve", "--kv-memory", "0.01", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_serve_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = run("serve")
    assert result.exit_code == 2
    assert "dami serve needs uvicorn: pip install 'fastapi>=0.115' 'uvicorn>=0.34'" in " ".join(result.output.split())
