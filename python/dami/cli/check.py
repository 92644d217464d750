"""`dami check`: what two checkpoints would be as a pair, without loading them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from dami import sources
from dami.cli.base import app, err, fail, out, user_errors
from dami.cli.checkpoints import TakesPair, takes_checkpoints
from dami.cli.options import DtypeOption
from dami.tables import FittedTable

if TYPE_CHECKING:
    from dami.loading.preview import Preview


@app.command(cls=TakesPair)
@takes_checkpoints
def check(
    ends: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INSTRUCT THINKING]",
            help="Directories or hub names of both ends; either may be an adapter. Default: the shipped pair.",
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    *,
    checkpoints: dict[str, Any],
) -> None:
    """See whether two checkpoints are a pair, in seconds.

    It reads no weights but a few rows: what differs and what a pair does about it, sizes, and what it runs on. The exit
    status is 1 if the two are no pair.
    """
    if ends and len(ends) != 2:
        raise fail(f"two checkpoints are checked, an instruct and a thinking one, got {len(ends)}")
    sides = ends or [str(end) for end in sources.example_pair()]
    with user_errors():
        base = checkpoints.pop("base", None)
        own = sources.per_end(checkpoints)
        sources.check_pair(sides, None, options=own)
    with err.status("loading transformers"):
        from dami.loading.joining import base_of
        from dami.loading.policies import Choices
        from dami.loading.preview import preview
        from dami.loading.remote import left_on_hub
    with user_errors(), err.status("reading configs, tokenizers and headers"):
        context = checkpoints.pop("max_position_embeddings", None)
        ends_found = left_on_hub(sides[0], own[0]), left_on_hub(sides[1], own[1])
        based = base_of(ends_found, base, own[0], left_on_hub)
        found = preview(*ends_found, Choices(dtype, context=context, **checkpoints), based)
    if as_json:
        typer.echo(json.dumps({**found.to_dict(), "engines": engines(found)}, indent=1, ensure_ascii=False))
    else:
        out.print(told(found))
    if not found.is_pair:
        raise typer.Exit(1)


def engines(found: Preview) -> dict[str, str]:
    """Returns, by engine, "yes" or why the pair does not run there."""
    if not found.is_pair:
        return {"transformers": "no: it is no pair", "vLLM": "no: it is no pair"}
    if any(each.subject == "vocabulary" for each in found.report.resolved):
        return {"transformers": "yes", "vLLM": "no: it needs ends of one vocabulary"}
    packed = "packed, " if found.report.resolved or not found.streams else ""
    return {"transformers": "yes", "vLLM": f"{packed}if it passes the self-test there"}


def told(found: Preview) -> RenderableType:
    """Returns everything about a pair as tables."""
    from dami.cli.terminal import size

    head = Text(f"{found.instruct} and {found.thinking}: ")
    head.append("a pair", "bold green") if found.is_pair else head.append("no pair", "bold red")
    parts: list[RenderableType] = [head, Text()]
    blocking = [(each.subject, each.ends, each.remedy) for each in found.report.blocking]
    if blocking:
        parts += [FittedTable(("in the way", "ends", "remedy"), blocking, left=3), Text()]
    resolved = [
        (each.subject, each.ends, f"{each.resolution}" + (f"; {each.remedy}" if each.remedy else ""))
        for each in found.report.resolved
    ]
    if resolved:
        parts += [FittedTable(("differs", "ends", "the pair"), resolved, left=3), Text()]
    if not found.report.differences:
        parts += [Text("Config, tokenizer, generation config and the shapes of all tensors match."), Text()]
    if found.is_pair and found.sizes and found.loading:
        yes = {True: "yes", False: "no"}
        rows = [
            (format, size(nbytes), size(found.loading[format]), found.fitting(nbytes)[0], yes[found.loads(format)])
            for format, nbytes in sorted(found.sizes.items(), key=lambda each: -each[1])
        ]
        parts += [Text(f"Each end has {found.parameters:,} parameters; the pair computes in {found.dtype}."), Text()]
        parts += [FittedTable(("format", "bytes", "to load", "fits on", "loads here"), rows, left=1), Text()]
        how = "tensor by tensor" if found.streams else "with both ends in memory"
        parts += [Text(f"dami pack reads {how} and needs about {size(found.loading['pack'])} of memory."), Text()]
    if found.distances:
        distances = [(each.part, str(each.tensors), f"{each.relative:.2g}") for each in found.distances]
        parts += [FittedTable(("part", "tensors sampled", "relative distance"), distances, left=1), Text()]
        if not any(each.relative for each in found.distances):
            parts += [Text("The sample is identical in both ends: are they two checkpoints?", "yellow"), Text()]
    parts += [Text(f"{engine}: {answer}") for engine, answer in engines(found).items()]
    return Group(*parts)
