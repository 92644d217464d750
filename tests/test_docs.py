"""Every code block of the README and the docs runs, and every command they show exists."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import dami
import pytest
import torch
from dami import cli
from dami.chat import ask
from dami.estimators import files, registry  # noqa: F401  # files registers kinds, before a page runs
from dami.evaluation import verifiers
from dami.evaluation.tasks import last_word
from typer.main import get_command

from dami_kernels import formats

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: needs .+ -->\n$")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BUILTINS = {"cd", "export"}


class Block(NamedTuple):
    language: str
    line: int  # of its first line of code, from 1
    code: str
    run: bool


def blocks(text: str) -> Iterator[Block]:
    """Fenced blocks of a page."""
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        yield Block(match[1], before.count("\n") + 2, match[2], not NOT_RUN.search(before))


def commands(block: Block) -> Iterator[tuple[int, list[str]]]:
    """Command lines of a block with their line numbers: of a console session those after a prompt, of a script all."""
    number = block.line
    for line in re.sub(r"\\\n", "  ", block.code).split("\n"):
        shown = line.removeprefix("$ ") if block.language == "console" and line.startswith("$ ") else line
        if block.language != "console" or shown != line:
            lexer = shlex.shlex(shown, posix=True, punctuation_chars="|&;")
            for is_command, words in groupby(lexer, lambda word: not set(word) <= set("|&;")):
                if is_command:
                    yield number, list(words)
        number += 1


def fault(words: list[str]) -> str | None:
    """What is wrong with a command of the docs, if anything."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "dami":
        group = get_command(cli.app)
        chosen = group.commands.get(rest[0]) if rest else None
        if rest and chosen is None and not rest[0].startswith("-"):
            return f"dami has no command {rest[0]}"
        known = {name for p in (chosen or group).params for name in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}
        passes_on = chosen is not None and chosen.name == "bench"
        unknown = [w for w in rest if re.match(r"--?[a-z]", w) and w.partition("=")[0] not in known and not passes_on]
        if unknown:
            return f"dami {rest[0]} has no option {unknown}"
        if chosen is not None and not passes_on:
            try:
                chosen.make_context(chosen.name, list(rest[1:])).close()
            except cli.base.ClickException as error:
                return None if "does not exist" in error.format_message() else error.format_message()
        return None
    if program == "make":
        targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
        wrong = [word for word in rest if "=" not in word and word not in targets]
        return f"the Makefile has no target {wrong}" if wrong else None
    if program.startswith("python"):
        scripts = [word for word in rest if word.endswith(".py")]
        missing = [script for script in scripts if not (ROOT / script).exists()]
        return f"there is no {missing}" if missing else None
    if program in BUILTINS or shutil.which(program) or (ROOT / program).is_file():
        return None
    return f"there is no {program}"


@pytest.mark.filterwarnings("ignore:.*no kernel reads the format 'rows8'")  # as the page about formats says
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python blocks of a page run in order, in one namespace, in an empty directory; `text` blocks are their output."""
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verifiers, "VERIFIERS", dict(verifiers.VERIFIERS))  # a page may register one
    monkeypatch.setattr(formats, "_FORMATS", dict(formats._FORMATS))  # a page may register one
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))  # a page may register one
    namespace = {"__name__": "__main__"}
    printed = ""
    for block in blocks(text):
        if block.language == "python" and block.run:
            capsys.readouterr()
            # Blank lines before the code make a traceback name the page's own lines.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
            printed = capsys.readouterr().out
        elif block.language == "text" and block.run:
            assert block.code == printed, f"{page.name}:{block.line} is not what the code before it prints"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    faults = [
        f"{page.name}:{line}: {' '.join(words)}: {wrong}"
        for block in blocks(page.read_text(encoding="utf-8"))
        if block.language in ("sh", "bash", "console") and block.run
        for line, words in commands(block)
        if (wrong := fault(words))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Links to files of the repository, and to headings of the same page."""
    text = page.read_text(encoding="utf-8")
    prose = FENCE.sub("", text)
    headings = {
        re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", prose, re.M)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("#"):
            assert target[1:] in headings, f"{page.name} has no heading for {target}"
        elif "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), (
                f"{page.name} links to {target}, which is not there"
            )


@pytest.mark.parametrize("page", ["README.md", "docs/server.md"])
def test_the_servers_example_shows_what_lam_does(page: str) -> None:
    """Its question is mostly wrong at λ = 0 and mostly right at the λ shown."""
    text = (ROOT / page).read_text(encoding="utf-8")
    question, answer = re.search(r'"content": "([-+ \d]+) ="', text)[1], "69"  # type: ignore[index]
    assert str(eval(question)) == answer
    lam = float(re.search(r'"intensity": ([.\d]+)}', text)[1])  # type: ignore[index]
    torch.manual_seed(0)
    lams = [0.0] * 20 + [lam] * 20
    said = ask(*dami.load_pair(*dami.example_pair()), [f"{question} ="] * 40, lams)
    right = [last_word(each.text, answer) for each in said]
    assert sum(right[:20]) < 10 < sum(right[20:])


PAGE = """
```python
x = 1
```
text
<!-- not run: needs a download -->
```python
x = y
```
```console
$ dami generate "a | b" -l 0 | head
output
$ make \\
    test ARGS=x
```
"""


def test_blocks_and_commands_are_found() -> None:
    first, second, third = blocks(PAGE)
    assert (first.language, first.line, first.code, first.run) == ("python", 3, "x = 1\n", True)
    assert (second.line, second.run) == (8, False)
    assert [words for _, words in commands(third)] == [
        ["dami", "generate", "a | b", "-l", "0"],
        ["head"],
        ["make", "test", "ARGS=x"],
    ]


@pytest.mark.parametrize(
    "command",
    [
        "dami",
        "dami --version",
        "dami generate hi -l 0 --max-new-tokens=3",
        "dami bench --what",
        "make demo TORCH=x",
        "cd x",
    ],
)
def test_good_commands_pass(command: str) -> None:
    assert fault(shlex.split(command)) is None


@pytest.mark.parametrize(
    "command",
    [
        "dami answer",
        "dami generate --no-such",
        "dami merge -o x",
        "dami generate -l",
        "dami describe --format int3",
        "make nothing",
        "python no/such.py",
        "no-such-program",
    ],
)
def test_bad_commands_are_found(command: str) -> None:
    assert fault(shlex.split(command))
