"""`dami describe`, `dami pack` and `dami merge`: inspect a pair, pack it, or merge it at one λ."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any

import typer

from dami import sources
from dami.callers import CALLERS
from dami.cli.base import app, err, fail, load, out, resumable, user_errors
from dami.cli.checkpoints import TakesPair, takes_checkpoints
from dami.cli.options import (
    FORMATS,
    DtypeOption,
    EndsArgument,
    FormatOption,
    OutputOption,
    OverwriteOption,
    format_name,
    number_or_name,
    one_of,
)
from dami.files import check_new, written_whole


@app.command(cls=TakesPair)
@takes_checkpoints
def describe(
    ends: EndsArgument = None,
    format: FormatOption = None,
    dtype: DtypeOption = "auto",
    *,
    checkpoints: dict[str, Any],
) -> None:
    """Show every parameter of a pair and how it is stored.

    The last line compares the bytes with those of merged copies.
    """
    model, _ = load(ends, format, dtype, checkpoints=checkpoints, asks=False)
    import dami
    from dami.cli.terminal import parameters

    out.print(parameters(dami.describe(model)))


@app.command(cls=TakesPair)
@takes_checkpoints
def pack(
    output: OutputOption,
    ends: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INSTRUCT THINKING]", help="Directories or hub names of both ends. Default: the shipped pair."
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            parser=format_name,
            metavar="NAME",
            help="How to store the pair.",
            autocompletion=one_of(*FORMATS),
        ),
    ] = "int4",
    dtype: DtypeOption = "auto",
    overwrite: OverwriteOption = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read the weights from the hub as they are packed; download no checkpoint.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="If interrupted, keep what is finished; and go on from what is left.")
    ] = False,
    *,
    checkpoints: dict[str, Any],
) -> None:
    """Pack two checkpoints into one directory.

    It works tensor by tensor, never with both models in memory. Load the directory, or share it.
    """
    instruct, thinking = ends if ends and len(ends) == 2 else sources.example_pair()
    if ends and len(ends) != 2:
        raise fail(f"two checkpoints are packed, an instruct and a thinking one, got {len(ends)}")
    with user_errors():
        sources.check_pair([str(instruct), str(thinking)], format, options=sources.per_end(dict(checkpoints)))
        check_new(output, overwrite, [instruct, thinking])
    with err.status("loading torch and transformers"):
        import dami
        from dami.cli.terminal import size
    with resumable() if resume else nullcontext(), user_errors():
        run: dict[str, Any] = {"overwrite": overwrite, "stream": stream, "resume": resume, "dtype": dtype}
        dami.pack(instruct, thinking, output, format, **run, **checkpoints)
    total = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    out.print(f"{output}: {size(total)}. Load it with dami.load_pair({str(output)!r}).")


@app.command(cls=TakesPair)
@takes_checkpoints
def merge(
    output: OutputOption,
    intensity: Annotated[
        Any,
        typer.Option("--intensity", "-l", parser=number_or_name, metavar="λ|NAME", help="A number, or a preset."),
    ],
    ends: EndsArgument = None,
    overwrite: OverwriteOption = False,
    *,
    checkpoints: dict[str, Any],
) -> None:
    """Write an ordinary checkpoint of a pair at one λ.

    Where one λ is enough, a merged checkpoint is faster than a pair.
    """
    inputs = ends or [str(end) for end in sources.example_pair()]
    with user_errors():
        check_new(output, overwrite, inputs)
    caller = CALLERS["dami merge"]
    model, tokenizer = load(  # on the CPU, as each weight is read once
        ends, intensities=[intensity], caller=caller, device="cpu", checkpoints=checkpoints, asks=False
    )
    from dami.saving.merging import write_merged

    with user_errors(), written_whole(output, overwrite, inputs) as partial:
        lam = write_merged(model, partial, tokenizer, intensity)
    out.print(f"{output}: an ordinary checkpoint at λ={lam:g}.")
