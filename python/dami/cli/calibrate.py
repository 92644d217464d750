"""`dami calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dami import sources
from dami.cli.answer import read_prompts
from dami.cli.base import app, fail, load, out, progress_bars, resumable, user_errors
from dami.cli.checkpoints import TakesPair, refuse_checkpoint, takes_checkpoints
from dami.cli.options import (
    DtypeOption,
    FormatOption,
    MaxTokensOption,
    OutputOption,
    PairOption,
    RowsOption,
    SeedOption,
    lam_option,
    one_of,
)
from dami.files import check_directory


@app.command(cls=TakesPair)
@takes_checkpoints
def calibrate(
    output: OutputOption,
    prompts: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="Prompts, one per line, as dami generate --file takes them. Default: questions of the shipped pair.",
        ),
    ] = None,
    pair: PairOption = None,
    format: FormatOption = None,
    dtype: DtypeOption = "auto",
    intensity: Annotated[list[float] | None, lam_option("A λ to try.", "0 to 1 in fifths")] = None,
    count: Annotated[int, typer.Option("--prompts", min=1, help="How many prompts to ask, at most.")] = 128,
    samples: Annotated[int, typer.Option(min=1, help="How many answers to sample per prompt and λ.")] = 4,
    compare: Annotated[
        str,
        typer.Option(
            metavar="word|math|text",
            help="What answers are compared by: word (the last number, or else the last word), math (math-verify) or "
            "text (all of it).",
            autocompletion=one_of("word", "math", "text"),
        ),
    ] = "word",
    price: Annotated[
        float, typer.Option(min=0, help="The accuracy gain that is worth as many tokens as the thinking end takes.")
    ] = 0.2,
    rows: RowsOption = 64,
    max_tokens: MaxTokensOption = None,
    seed: SeedOption = 0,
    *,
    checkpoints: dict[str, Any],
) -> None:
    """Learn without answers which λ a prompt deserves.

    50 to 200 prompts like those to come are answered at several λ. That shows at which λ answers come to their end, and
    what most answers to a prompt say counts as right. dami.attach(model, OUTPUT) then lets intensity="auto" choose. A
    run that was interrupted goes on where it ended.
    """
    if prompts is None and pair is not None:
        raise fail("prompts are needed for a pair of your own: a file with one per line")
    lams = intensity or [fifth / 5 for fifth in range(6)]
    with user_errors():
        refuse_checkpoint(str(prompts or ""), "a file of prompts")
        check_directory(output)
    asked = read_prompts([], prompts or sources.QUESTIONS)
    asked = [asked[place * len(asked) // min(count, len(asked))] for place in range(min(count, len(asked)))]
    from dami.evaluation.consensus import check_comparable
    from dami.evaluation.tasks import TO_TRAIN, check_distinct

    with user_errors():
        check_distinct(lams)
        check_comparable(compare)
    if len(asked) < TO_TRAIN:
        raise fail(f"prompts must be at least {TO_TRAIN}, got {len(asked)}")
    options: dict[str, Any] = {"max_new_tokens": max_tokens} if max_tokens else {}
    model, tokenizer = load(pair, format, dtype, intensities=lams, checkpoints=checkpoints)
    from dami.cli.terminal import health_table, stored_at
    from dami.evaluation.calibration import calibrate

    with resumable(), user_errors(), progress_bars() as progress:
        bar = progress.add_task("answers", total=len(asked) * samples * len(lams))
        found = calibrate(
            model, tokenizer, asked, output, lams, samples=samples, compare=compare, price=price, rows=rows, seed=seed,
            on_batch=lambda news: progress.advance(bar, len(news)), **options,
        )  # fmt: skip
    out.print(health_table(found))
    out.print(stored_at(output, found.stored, price), style="dim", soft_wrap=True)
