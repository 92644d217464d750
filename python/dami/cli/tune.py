"""`dami tune` and `dami tails`: which λ prompt, thought and answer deserve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dami.cli.base import app, load, out, progress_bars, resumable, user_errors
from dami.cli.checkpoints import TakesPair, takes_checkpoints
from dami.cli.measure import QuestionsOption, read_task
from dami.cli.options import (
    DtypeOption,
    FormatOption,
    MaxTokensOption,
    PairOption,
    PromptTailOption,
    RowsOption,
    SeedOption,
    TaskArgument,
    VerifierOption,
    finite,
    lam_option,
    tail,
)
from dami.files import check_directory

GreedyOption = Annotated[bool, typer.Option("--greedy", help="Take the most likely token instead of sampling.")]


def _options(greedy: bool, max_tokens: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {"do_sample": False} if greedy else {}
    return options | ({"max_new_tokens": max_tokens} if max_tokens else {})


@app.command(cls=TakesPair)
@takes_checkpoints
def tune(
    task: TaskArgument = None,
    pair: PairOption = None,
    format: FormatOption = None,
    dtype: DtypeOption = "auto",
    intensity: Annotated[list[float] | None, lam_option("A λ to combine.", "0 to 1 in quarters")] = None,
    part: Annotated[
        list[str] | None,
        typer.Option("--part", metavar="PART", help="A part of the model to try at other λ: attn, mlp … Repeatable."),
    ] = None,
    prompt_tail: PromptTailOption = None,
    candidates: Annotated[int, typer.Option(min=1, help="How many ways to answer to start with.")] = 48,
    finalists: Annotated[int, typer.Option(min=1, help="How many to score on questions held out.")] = 6,
    first: Annotated[
        int, typer.Option(min=1, help="How many questions the first round asks; each round asks twice as many.")
    ] = 8,
    questions: QuestionsOption = None,
    verifier: VerifierOption = None,
    rows: RowsOption = 64,
    max_tokens: MaxTokensOption = None,
    greedy: GreedyOption = False,
    output: Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="Directory for the results.")] = Path(
        "tuning"
    ),
    seed: SeedOption = 0,
    *,
    checkpoints: dict[str, Any],
) -> None:
    """Search λ of the prompt, of the thought and of the answer.

    All ways to answer start with few questions, the better half goes on to more, and those left are scored on questions
    held out. A run that was interrupted goes on where it ended.
    """
    from dami.evaluation.tasks import TO_TUNE, check_distinct, check_enough

    lams = intensity or [quarter / 4 for quarter in range(5)]
    with user_errors():
        check_directory(output)
        check_distinct(lams)
    asked = read_task(task, pair, verifier, questions, seed)
    with user_errors():
        check_enough(asked, TO_TUNE)
    model, tokenizer = load(pair, format, dtype, intensities=lams, checkpoints=checkpoints)
    from dami.cli.terminal import tuned_table
    from dami.evaluation import tuning

    with resumable(), user_errors(), progress_bars() as progress:
        bar = progress.add_task("answers", total=None)
        found = tuning.tune(
            model, tokenizer, asked, output, lams, parts=part or (), tail=1 if prompt_tail is None else prompt_tail,
            candidates=candidates, finalists=finalists, first=first, rows=rows, seed=seed,
            on_batch=lambda news: progress.advance(bar, len(news)), **_options(greedy, max_tokens),
        )  # fmt: skip
    out.print(tuned_table(found))
    for name, way in found.presets.items():
        out.print(f"{name}: {way.name}", soft_wrap=True)
    out.print(f"Picture, numbers: {output / 'tuned.svg'}, tuned.json", style="dim", soft_wrap=True)


@app.command(cls=TakesPair)
@takes_checkpoints
def tails(
    task: TaskArgument = None,
    pair: PairOption = None,
    format: FormatOption = None,
    dtype: DtypeOption = "auto",
    intensity: Annotated[list[float] | None, lam_option("A λ to answer at.", "0 to 1 in quarters")] = None,
    prompt_intensity: Annotated[
        float, typer.Option(parser=finite, metavar="LAMBDA", help="The λ to read prompts at.")
    ] = 0.0,
    tail: Annotated[
        list[str] | None,
        typer.Option(
            "--tail",
            parser=tail,
            metavar="TOKENS|turn",
            help="How much of a prompt to read at the λ of the answer. Repeatable. Default: 1, 8 and turn.",
        ),
    ] = None,
    questions: QuestionsOption = None,
    samples: Annotated[int, typer.Option(min=1, help="How many answers to sample per question, λ and tail.")] = 1,
    verifier: VerifierOption = None,
    rows: RowsOption = 64,
    max_tokens: MaxTokensOption = None,
    greedy: GreedyOption = False,
    output: Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="Directory for the results.")] = Path(
        "tails"
    ),
    seed: SeedOption = 0,
    *,
    checkpoints: dict[str, Any],
) -> None:
    """Find how much of a prompt needs the λ of its answer.

    The least that costs nothing is saved, with the pair's estimator and presets: dami.attach(model, OUTPUT) then lets
    model.dami.prompt_tail tell it. A run that was interrupted goes on where it ended.
    """
    from dami.evaluation.tasks import TO_EVALUATE, check_distinct, check_enough

    lams = intensity or [quarter / 4 for quarter in range(5)]
    with user_errors():
        check_directory(output)
        check_distinct(lams)
    asked = read_task(task, pair, verifier, questions, seed)
    with user_errors():
        check_enough(asked, TO_EVALUATE)
    model, tokenizer = load(pair, format, dtype, intensities=lams, checkpoints=checkpoints)
    from dami.cli.terminal import tail_table
    from dami.evaluation.tails import TAILS, measure_tails

    with resumable(), user_errors(), progress_bars() as progress:
        bar = progress.add_task("answers", total=None)
        found = measure_tails(
            model, tokenizer, asked, output, tail or TAILS, lams, prompt_intensity=prompt_intensity, samples=samples,
            rows=rows, seed=seed, on_batch=lambda news: progress.advance(bar, len(news)),
            **_options(greedy, max_tokens),
        )  # fmt: skip
    out.print(tail_table(found))
    least = "none of those measured" if found.least is None else f"{found.least} tokens"
    out.print(f"The least tail that costs nothing: {least}. Numbers: {output / 'tails.json'}", soft_wrap=True)
