"""How commands name a pair: --pair, and the options of its checkpoints and of what they differ in."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from dami import sources
from dami.cli.options import one_of

PAIR = "--pair"
OWNER_AND_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # a repository on the hub


class TakesPair(typer.core.TyperCommand):
    """A command that takes `--pair PAIR` or `--pair INSTRUCT THINKING`, whatever stands on the line after it.

    Click has options of a fixed number of values only. So the words of `--pair` are told apart here: each becomes a
    `--pair=` of its own, or a plain argument where the command takes the pair as arguments.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        words, rest = args[:end], args[end:]
        option = any(PAIR in each.opts for each in self.params)
        while PAIR in words:
            place = words.index(PAIR)
            ends = named(words[place + 1 :])
            if any(word.startswith(f"{PAIR}=") for word in words):  # a --pair for each end
                ends = ends[:1]
            if not ends:
                raise typer.BadParameter(f"{PAIR} must be followed by PAIR or INSTRUCT THINKING")
            words[place : place + 1 + len(ends)] = [f"{PAIR}={end}" for end in ends]
        if not option:
            words = [word.removeprefix(f"{PAIR}=") for word in words]
        return super().parse_args(ctx, words + rest)


def named(words: Sequence[str]) -> list[str]:
    """Returns those of the words after `--pair` that name the pair: a packed pair, or an instruct and a thinking end.

    What is on disk tells how many. On the hub only an OWNER/NAME can be a packed pair: it is one unless the next word
    is a checkpoint on disk or an OWNER/NAME too.
    """
    first, second = ("" if word.startswith("-") else word for word in [*words[:2], "", ""][:2])
    if not (first and second):
        return [first] if first else []
    if on_disk(first):
        alone = _is_packed(first)
    else:
        alone = "/" in first and not (on_disk(second) or OWNER_AND_NAME.fullmatch(second))
    return [first] if alone else [first, second]


def on_disk(source: str) -> bool:
    """Returns whether there is a file or directory of this name; a long text is none."""
    return os.path.exists(os.path.expanduser(source))


def refuse_checkpoint(word: str, wanted: str) -> None:
    """Raises ValueError if a word on the line is the directory of a checkpoint, where something else is wanted."""
    if word and any(os.path.isfile(os.path.join(word, name)) for name in ("config.json", sources.ADAPTER)):
        raise ValueError(f"{word} is a checkpoint, not {wanted}: name the pair with {PAIR}, as {PAIR} {word}")


def _is_packed(source: str) -> bool:
    try:
        return sources.packed_format(Path(source).expanduser()) is not None
    except ValueError:  # loading will report it
        return False


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """The options of a pair's checkpoints and of what they differ in, as `load_pair` takes them. None if not given."""

    revision: Annotated[str | None, typer.Option(help="The branch, tag or commit of both ends on the hub.")] = None
    thinking_revision: Annotated[str | None, typer.Option(help="That of the thinking end, if another.")] = None
    subfolder: Annotated[str | None, typer.Option(help="The folder of both ends in their repositories.")] = None
    thinking_subfolder: Annotated[str | None, typer.Option(help="That of the thinking end, if another.")] = None
    cache_dir: Annotated[str | None, typer.Option(help="The directory for downloads. Default: the hub's cache.")] = None
    thinking_cache_dir: Annotated[str | None, typer.Option(help="That of the thinking end, if another.")] = None
    token: Annotated[
        str | None, typer.Option(help="A token of the hub. Default: HF_TOKEN, or that of hf auth login.")
    ] = None
    thinking_token: Annotated[str | None, typer.Option(help="That of the thinking end, if another.")] = None
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Let both ends run code of their own.")
    ] = None
    thinking_trust_remote_code: Annotated[
        bool | None,
        typer.Option(
            "--thinking-trust-remote-code/--no-thinking-trust-remote-code", help="Whether the thinking end may."
        ),
    ] = None
    base: Annotated[
        str | None, typer.Option(help="The checkpoint that the adapters were trained on, if not what they name.")
    ] = None
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="END",
            help="Where special tokens have other names: the tokenizer of instruct, or of thinking.",
            autocompletion=one_of(*sources.ENDS),
        ),
    ] = None
    rope: Annotated[
        str | None,
        typer.Option(
            metavar="END",
            help="Where the rotary embeddings differ: both ends get that of instruct, or of thinking.",
            autocompletion=one_of(*sources.ENDS),
        ),
    ] = None
    max_position_embeddings: Annotated[
        int | None, typer.Option(min=1, help="The longest sequence, in tokens. Default: the smaller of both ends'.")
    ] = None

    def given(self) -> dict[str, Any]:
        """Returns the options that were given, by name."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(CheckpointSettings)}
        return {name: value for name, value in values.items() if value is not None}


def takes_checkpoints(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `CheckpointSettings`, which it gets as its argument `checkpoints`, by name."""
    hints = get_type_hints(command, include_extras=True)
    own = [each for each in inspect.signature(command).parameters.values() if each.name != "checkpoints"]
    more = dataclasses.fields(CheckpointSettings)
    more_hints = get_type_hints(CheckpointSettings, include_extras=True)

    @functools.wraps(command)
    def called(**values: Any) -> None:
        settings = CheckpointSettings(**{each.name: values.pop(each.name) for each in more})
        command(**values, checkpoints=settings.given())

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [each.replace(annotation=hints[each.name], kind=keyword) for each in own]
    parameters += [
        inspect.Parameter(each.name, keyword, default=each.default, annotation=more_hints[each.name]) for each in more
    ]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {each.name: each.annotation for each in parameters}
    return called
