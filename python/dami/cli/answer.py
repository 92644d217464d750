"""`dami generate` and `dami demo`: answer questions in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dami.cli.base import app, err, fail, load, out, user_errors
from dami.cli.checkpoints import TakesPair, refuse_checkpoint, takes_checkpoints
from dami.cli.options import (
    ChatTemplateKwargsOption,
    ChatTemplateOption,
    DtypeOption,
    FormatOption,
    PairOption,
    PromptIntensityOption,
    PromptTailOption,
    SeedOption,
    intensity_names,
    number_or_name,
    positive,
    reading,
)
from dami.files import check_directory
from dami.prompts import Prompt, as_prompt


@app.command(cls=TakesPair)
@takes_checkpoints
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="Directory for the picture and the numbers.")
    ] = Path("demo-output"),
    pair: PairOption = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions in the sweep. Each is asked at 11 λ.")] = 120,
    seed: SeedOption = 0,
    *,
    checkpoints: dict[str, Any],
) -> None:
    """See the idea work.

    A batch at three λ, the curve of accuracy and tokens, and the price against merged copies.
    """
    with user_errors():
        check_directory(output)
    model, tokenizer = load(pair, checkpoints=checkpoints)
    from dami.cli.demo import run

    with user_errors():
        run(model, tokenizer, pair, output, questions, seed, out)


PromptsArgument = Annotated[list[str] | None, typer.Argument(help="The prompts. Or give a file, or pipe them in.")]
FileOption = Annotated[
    Path | None,
    typer.Option(
        "--file", "-f", exists=True, dir_okay=False, readable=True, help="Read the prompts from a file, one per line."
    ),
]
IntensityOption = Annotated[
    list[str] | None,
    typer.Option(
        "--intensity",
        "-l",
        parser=number_or_name,
        metavar="λ|NAME",
        help="The λ to answer at: a number, a preset (low, medium, high) or auto. Repeatable. Default: 0, 0.5 and 1.",
        autocompletion=intensity_names,
    ),
]
StreamOption = Annotated[bool, typer.Option("--stream", help="Show tokens as they come.")]
AsJsonOption = Annotated[bool, typer.Option("--json", help="Print each answer as a JSON object on a line.")]
RawOption = Annotated[bool, typer.Option("--raw", help="Send prompts as they are, without the chat template.")]
MaxNewTokensOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="The most tokens to generate, thought included. Default: as the pair says, or as many as it has room for.",
    ),
]
GreedyOption = Annotated[bool, typer.Option("--greedy", help="Take the most likely token instead of sampling.")]
TemperatureOption = Annotated[
    float | None,
    typer.Option(parser=positive, metavar="NUMBER", help="Sampling temperature. Default: as the pair says."),
]
TopPOption = Annotated[
    float | None, typer.Option(min=0, max=1, help="Sample from the likeliest tokens that hold this probability.")
]
TopKOption = Annotated[int | None, typer.Option(min=0, help="Sample from this many likeliest tokens. 0 means all.")]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Compile the decoding step first. Pays for long answers.")
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="The most rows in a batch. A prompt takes one row per λ.")]


@app.command(cls=TakesPair)
@takes_checkpoints
def generate(
    prompts: PromptsArgument = None,
    file: FileOption = None,
    intensity: IntensityOption = None,
    prompt_intensity: PromptIntensityOption = None,
    prompt_tail: PromptTailOption = None,
    pair: PairOption = None,
    format: FormatOption = None,
    dtype: DtypeOption = "auto",
    stream: StreamOption = False,
    as_json: AsJsonOption = False,
    chat_template: ChatTemplateOption = None,
    chat_template_kwargs: ChatTemplateKwargsOption = None,
    raw: RawOption = False,
    max_new_tokens: MaxNewTokensOption = None,
    greedy: GreedyOption = False,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 64,
    compile: CompileOption = False,
    *,
    checkpoints: dict[str, Any],
) -> None:
    """Answer prompts at several λ at once, side by side.

    A line of a file or of stdin is a prompt; one that starts with { is a JSON object with "prompt" or "messages".
    """
    if stream and as_json:
        raise fail("--stream and --json exclude each other")
    options: dict[str, Any] = sampling_options(
        max_new_tokens, greedy, {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    )
    options |= {"compile": True} if compile else {}
    options |= reading(prompt_intensity, prompt_tail)
    options |= {"chat_template_kwargs": chat_template_kwargs} if chat_template_kwargs else {}
    if raw and chat_template is not None:
        raise fail("--raw excludes --chat-template")
    put_through = None if raw else "default" if chat_template is None else chat_template
    asked = read_prompts(prompts or [], file, pair or [])
    lams: list[Any] = intensity or [0.0, 0.5, 1.0]
    model, tokenizer = load(pair, format, dtype, intensities=lams, checkpoints=checkpoints)

    import torch

    from dami.chat import ask
    from dami.cli import terminal

    torch.manual_seed(seed)
    if stream:
        for prompt in asked:
            with user_errors():
                terminal.stream(model, tokenizer, prompt, lams, put_through, out, **options)
        return
    step = max(1, batch_size // len(lams))
    for start in range(0, len(asked), step):
        rows = [(prompt, lam) for prompt in asked[start : start + step] for lam in lams]
        with user_errors(), err.status(f"{len(rows)} rows in one batch"):
            answers = ask(
                model, tokenizer, [prompt for prompt, _ in rows], [lam for _, lam in rows], put_through, **options
            )
        for place in range(0, len(answers), len(lams)):
            if as_json:
                for answer in answers[place : place + len(lams)]:
                    typer.echo(json.dumps(asdict(answer), ensure_ascii=False))
            else:
                out.print(terminal.side_by_side(answers[place : place + len(lams)], out))


def sampling_options(max_new_tokens: int | None, greedy: bool, given: Mapping[str, float | None]) -> dict[str, Any]:
    """Returns the sampling options for `generate`: only those that the user has set."""
    sampling = {name: value for name, value in given.items() if value is not None}
    if greedy and sampling:
        raise fail(f"--greedy excludes --{', --'.join(sorted(sampling)).replace('_', '-')}")
    length = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    return {**length, **sampling, **({"do_sample": not greedy} if greedy or sampling else {})}


def read_prompts(prompts: list[str], file: Path | None, pair: Sequence[str] = ()) -> list[Prompt]:
    """Reads prompts from the command line, or else from a file, or else from stdin.

    `pair` is what `--pair` took: if that is two words, the second may have been meant as a prompt.
    """
    taken = f"; --pair has taken {pair[1]!r} for the thinking end" if len(pair) == 2 else ""
    if prompts and file:
        raise fail("prompts come as arguments or with --file, got both")
    if prompts:
        with user_errors():
            for prompt in prompts:
                refuse_checkpoint(prompt, "a prompt")
            return [as_prompt(prompt) for prompt in prompts]
    source = str(file) if file else "stdin"
    if file is None and sys.stdin.isatty():
        raise fail(f"no prompts: give them as arguments, with --file or on stdin{taken}")
    with user_errors():
        try:
            text = (file.read_bytes() if file else sys.stdin.buffer.read()).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} must be text in UTF-8: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise fail(f"no prompts: {source} is empty{taken}")
    return [read_prompt(line.removesuffix("\r"), f"{source}, line {number}") for number, line in lines]


def read_prompt(line: str, place: str) -> Prompt:
    """Returns the prompt of a line: the text, or a JSON object's "prompt" (or "question") or "messages"."""
    if not line.lstrip().startswith("{"):
        return line
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise fail(f"{place} starts with {{ but is not JSON: {error}") from error
    for key in ("prompt", "question", "messages"):
        if key in record:
            try:
                return as_prompt(record[key])
            except ValueError as error:
                raise fail(f"{place}: {error}") from error
    raise fail(f'{place} must have "prompt" or "messages", got {list(record)}')
