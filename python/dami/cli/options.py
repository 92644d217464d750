"""Options that several commands share, and the parsers of their values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dami import sources
from dami.callers import TURN, from_text

FORMATS = ("pair", "int8", "int4", "w8d4", "lowrank")  # as dami_kernels.formats.names(), which would import torch


def one_of(*words: str) -> Callable[[str], list[str]]:
    """Returns a completion for one of these words."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def intensity_names(context: typer.Context, incomplete: str) -> list[str]:
    """Completes the presets of the pair on the command line, and auto if it has an estimator."""
    positional = any(each.name == "pair" and each.param_type_name == "argument" for each in context.command.params)
    pair = context.params.get("pair") or (positional and context.args)  # if the line ends with an option
    pair = pair or [str(end) for end in sources.example_pair()]
    try:
        folders = [context.params.get(f"{end}subfolder") for end in ("", sources.THINKING)]
        where = sources.local(pair[-1], folders[0] if len(pair) == 1 else folders[1] or folders[0])
        presets, has_estimator = sources.stored_names(where) if where is not None else ([], False)
    except (ValueError, OSError):  # the command will report it
        return []
    return one_of(*presets, *(["auto"] if has_estimator else []))(incomplete)


def finite(text: str) -> float:
    """Reads a λ."""
    value = number_or_name(str(text))  # a default is a number already
    if isinstance(value, str):
        raise typer.BadParameter(f"must be a finite number such as 0.5, got {text!r}")
    return value


def number_or_name(text: str) -> float | str:
    """Reads a λ, or the name of a preset, or "auto"."""
    try:
        return from_text(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def tail(text: str) -> int | str:
    """Reads how much of a prompt is its tail: a number of tokens, or "turn"."""
    if text == TURN or (text.isascii() and text.isdigit()):
        return text if text == TURN else int(text)
    raise typer.BadParameter(f"must be a number of tokens or turn, got {text!r}")


def positive(text: str) -> float:
    """Reads a temperature."""
    value = finite(text)
    if value <= 0:
        raise typer.BadParameter(f"must be above 0, got {text!r}; --greedy takes the likeliest token")
    return value


def format_name(text: str) -> str:
    """Reads the name of a storage format."""
    if text not in FORMATS:
        raise typer.BadParameter(f"must be one of {', '.join(FORMATS)}, got {text!r}")
    return text


def template(text: str) -> str | float:
    """Reads a chat template's name, or the λ from which to use the thinking end's."""
    if text in ("instruct", "thinking"):
        return text
    try:
        return finite(text)
    except typer.BadParameter as error:
        raise typer.BadParameter(f"must be instruct, thinking or a finite number, got {text!r}") from error


def json_object(text: str) -> dict[str, Any]:
    """Reads an object in JSON."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"must be a JSON object, got {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise typer.BadParameter(f"must be a JSON object, got {text!r}")
    return found


def lam_option(help: str, default: str) -> Any:
    """Returns the option -l of a command that asks at several λ."""
    text = f"{help} Repeatable. Default: {default}."
    return typer.Option("--intensity", "-l", parser=finite, metavar="LAMBDA", help=text)


PromptIntensityOption = Annotated[
    Any,  # a number or a name: typer takes no unions
    typer.Option(
        parser=number_or_name,
        metavar="λ|NAME",
        help="The λ to read prompts at, once for all λ of their answers. Default: that of the answer.",
    ),
]


PromptTailOption = Annotated[
    Any,  # a number or a word
    typer.Option(
        parser=tail,
        metavar="TOKENS|turn",
        help="How much at the end of a prompt is read at the λ of the answer nevertheless: tokens, or all from the "
        "last user message on. Default: 1.",
        autocompletion=one_of(TURN),
    ),
]


PairOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pair",
        metavar="PAIR | INSTRUCT THINKING",
        help="A packed pair or two checkpoints: directories or hub names. Default: the shipped pair.",
    ),
]


EndsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PAIR | INSTRUCT THINKING]", help="A packed pair or two checkpoints. Default: the shipped pair."
    ),
]


TaskArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[TASK]",
        help="A file of questions (.jsonl), or a dataset of reasoning-gym. Default: the shipped pair's questions.",
    ),
]


FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        parser=format_name,
        metavar="NAME",
        help=f"How to store the pair: {', '.join(FORMATS)}.",
        autocompletion=one_of(*FORMATS),
    ),
]


DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="auto|NAME",
        help="The dtype to compute in: bfloat16, float16 or float32. Default: the checkpoints' own, float32 for "
        "a GGUF file.",
        autocompletion=one_of("auto", "bfloat16", "float16", "float32"),
    ),
]


ChatTemplateOption = Annotated[
    Any,  # a name or a λ: typer takes no unions
    typer.Option(
        parser=template,
        metavar="NAME|λ",
        help="The chat template: instruct, thinking, or the λ from which to use thinking's. Default: the pair's own.",
        autocompletion=one_of("instruct", "thinking"),
    ),
]


ChatTemplateKwargsOption = Annotated[
    Any,  # a dict: typer has no such option
    typer.Option(
        parser=json_object,
        metavar="JSON",
        help='Variables of the chat template, as {"enable_thinking": false}.',
    ),
]


def reading(prompt_intensity: float | str | None, prompt_tail: int | str | None) -> dict[str, Any]:
    """Returns how `dami.chat.ask` is to read prompts: only what the user has set."""
    given = {"prompt_intensity": prompt_intensity, "prompt_tail": prompt_tail}
    return {name: value for name, value in given.items() if value is not None}


SeedOption = Annotated[int, typer.Option(help="Seed for sampling.")]


VerifierOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE.py:FUNCTION",
        help="How to judge answers to questions that name no verifier: math (math-verify), word (the last word), "
        "contains, or a function of your own, of a file or as MODULE:FUNCTION.",
        autocompletion=one_of("math", "word", "contains"),
    ),
]


RowsOption = Annotated[int, typer.Option(min=1, help="Rows in a batch. All λ of a question share one.")]


MaxTokensOption = Annotated[
    int | None,
    typer.Option(min=1, help="The most tokens in an answer. Default: as the pair says, or as many as it has room for."),
]


OutputOption = Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="Directory to write.")]


OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a directory that exists.")]
