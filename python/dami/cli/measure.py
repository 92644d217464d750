"""`dami evaluate`, `dami train-estimator` and `dami study`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dami import sources
from dami.cli.base import CHECKOUT, app, err, fail, load, out, progress_bars, resumable, user_errors
from dami.cli.checkpoints import TakesPair, refuse_checkpoint, takes_checkpoints
from dami.cli.options import (
    DtypeOption,
    FormatOption,
    MaxTokensOption,
    OutputOption,
    PairOption,
    PromptIntensityOption,
    PromptTailOption,
    RowsOption,
    SeedOption,
    TaskArgument,
    VerifierOption,
    lam_option,
    reading,
)
from dami.files import check_directory
from dami.prompts import Prompt

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from dami.evaluation.tasks import Task


def read_task(task: str | None, pair: Sequence[str] | None, verifier: str | None, count: int | None, seed: int) -> Task:
    """Loads the questions, by default those of the shipped pair."""
    from dami.evaluation.tasks import load_task

    if task is None and pair is not None:
        raise fail(
            "a task is needed for a pair of your own: a file of questions (.jsonl), or a dataset of reasoning-gym"
        )
    with user_errors():
        refuse_checkpoint(task or "", "a task")
        return load_task(task or str(sources.QUESTIONS), count, seed, **({"verifier": verifier} if verifier else {}))


QuestionsOption = Annotated[
    int | None, typer.Option(min=1, help="How many questions to ask. Default: all in a file, 100 of a dataset.")
]


@app.command(cls=TakesPair)
@takes_checkpoints
def evaluate(
    task: TaskArgument = None,
    pair: PairOption = None,
    format: FormatOption = None,
    dtype: DtypeOption = "auto",
    intensity: Annotated[list[float] | None, lam_option("A λ to ask at.", "0 to 1 in tenths")] = None,
    prompt_intensity: PromptIntensityOption = None,
    prompt_tail: PromptTailOption = None,
    questions: QuestionsOption = None,
    samples: Annotated[int, typer.Option(min=1, help="How many answers to sample per question and λ.")] = 1,
    verifier: VerifierOption = None,
    rows: RowsOption = 64,
    max_tokens: MaxTokensOption = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the most likely token instead of sampling.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="Directory for the results.")] = Path(
        "evaluation"
    ),
    seed: SeedOption = 0,
    *,
    checkpoints: dict[str, Any],
) -> None:
    """Ask every question at every λ, and report the frontier.

    The report is a picture, numbers, and all answers as a page. A run that was interrupted goes on where it ended.
    """
    from rich.live import Live
    from rich.text import Text

    from dami.evaluation.tasks import TO_EVALUATE, check_distinct, check_enough

    lams = intensity or [tenth / 10 for tenth in range(11)]
    with user_errors():
        check_directory(output)
        check_distinct(lams)
    asked = read_task(task, pair, verifier, questions, seed)
    with user_errors():
        check_enough(asked, TO_EVALUATE)
    model, tokenizer = load(pair, format, dtype, intensities=lams, checkpoints=checkpoints)
    from dami.cli.terminal import point_table
    from dami.dial.patch import patch_of
    from dami.evaluation.frontier import Frontier
    from dami.evaluation.report import write_report
    from dami.evaluation.sweeps import Record, sweep
    from dami.layers.describe import describe

    options = reading(prompt_intensity, prompt_tail) | ({"do_sample": False} if greedy else {})
    if max_tokens:
        options["max_new_tokens"] = max_tokens
    records: list[Record] = []
    total = len(asked.questions) * samples * len(lams)

    with resumable(), user_errors(), Live(console=err, transient=True) as live:

        def show(news: list[Record]) -> None:
            records.extend(news)
            live.update(point_table(Frontier.of(records).points, Text(f"{len(records)} of {total} answers", "dim")))

        sweep(
            model, tokenizer, asked, lams,
            path=output / "records.jsonl", samples=samples, rows=rows, seed=seed, on_batch=show, **options,
        )  # fmt: skip
        named = " and ".join(pair) if pair else "the shipped pair"
        about = {"pair": named, "format": describe(model).format, "samples": samples}
        about |= {name.replace("_", " "): value for name, value in reading(prompt_intensity, prompt_tail).items()}
        chosen = None
        if patch_of(model).estimator is not None:
            chosen = chosen_lams(model, tokenizer, [question.question for question in asked.questions], rows)
        frontier = write_report(asked, records, output, about, chosen)
    out.print(point_table(frontier.points))
    out.print(
        f"Page, picture, numbers: {output / 'report.html'}, frontier.svg, frontier.json", style="dim", soft_wrap=True
    )


def chosen_lams(model: Any, tokenizer: Any, prompts: Sequence[Prompt], rows: int) -> list[float]:
    """Returns the λ that the pair's estimator chooses for each prompt, in batches of `rows`."""
    from dami.chat import numbers_of

    batches = [prompts[start : start + rows] for start in range(0, len(prompts), rows)]
    return [lam for batch in batches for lam in numbers_of(model, tokenizer, batch, ["auto"] * len(batch))]


@app.command("train-estimator", cls=TakesPair)
@takes_checkpoints
def train_estimator(
    output: OutputOption,
    task: TaskArgument = None,
    pair: PairOption = None,
    format: FormatOption = None,
    dtype: DtypeOption = "auto",
    intensity: Annotated[list[float] | None, lam_option("A λ to ask at.", "0 to 1 in fifths")] = None,
    router: Annotated[bool, typer.Option("--router", help="Choose only between the two ends.")] = False,
    trial: Annotated[int, typer.Option(min=0, help="Also read this many tokens of a trial answer.")] = 0,
    price: Annotated[
        float, typer.Option(min=0, help="The accuracy gain that is worth as many tokens as the thinking end takes.")
    ] = 0.2,
    questions: QuestionsOption = None,
    samples: Annotated[int, typer.Option(min=1, help="How many answers to sample per question and λ.")] = 2,
    verifier: VerifierOption = None,
    rows: RowsOption = 64,
    max_tokens: MaxTokensOption = None,
    seed: SeedOption = 0,
    *,
    checkpoints: dict[str, Any],
) -> None:
    """Learn from answers which λ a prompt deserves.

    Questions like those to come are answered at several λ, and what was learned is measured on some that were held out.
    dami.attach(model, OUTPUT) then lets intensity="auto" choose. Named `intensity` inside a packed pair or a thinking
    end, OUTPUT is loaded with it. A run that was interrupted goes on where it ended.
    """
    from dami.evaluation.tasks import TO_TRAIN, check_distinct, check_enough

    if router and intensity:
        raise fail("--router asks at the two ends: leave --intensity out")
    lams = [0.0, 1.0] if router else intensity or [fifth / 5 for fifth in range(6)]
    asked = read_task(task, pair, verifier, questions, seed)
    with user_errors():
        check_directory(output)
        check_distinct(lams)
        check_enough(asked, TO_TRAIN)
    model, tokenizer = load(pair, format, dtype, intensities=lams, checkpoints=checkpoints)
    from dami.cli.terminal import outcome_table, stored_at, verdict
    from dami.evaluation.training import train_estimator

    with resumable(), user_errors(), progress_bars() as progress:
        bar = progress.add_task("answers", total=len(asked.questions) * samples * len(lams))
        trained = train_estimator(
            model, tokenizer, asked, output, lams, samples=samples, trial=trial, price=price, rows=rows, seed=seed,
            on_batch=lambda news: progress.advance(bar, len(news)),
            **({"max_new_tokens": max_tokens} if max_tokens else {}),
        )  # fmt: skip
    out.print(outcome_table(trained.outcomes, price))
    if price in trained.outcomes:
        out.print(verdict(trained.outcomes[price], price, trained.held_out))
    out.print(stored_at(output, trained.stored, price), style="dim", soft_wrap=True)


def stages(bars: Progress) -> Callable[[str, int, int], None]:
    """Returns a progress callback that shows each stage of a study as a bar of its own."""
    shown: dict[str, TaskID] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in shown:
            shown[stage] = bars.add_task(stage, total=total)
        bars.update(shown[stage], completed=done)

    return progress


@app.command(cls=TakesPair)
@takes_checkpoints
def study(
    task: TaskArgument = None,
    pair: PairOption = None,
    format: FormatOption = None,
    dtype: DtypeOption = "auto",
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            metavar="permuted|CHECKPOINT",
            help="Another way from the instruct end: to the thinking end with its neurons and heads permuted, or to a "
            "checkpoint. May be given several times.",
        ),
    ] = None,
    intensity: Annotated[list[float] | None, lam_option("A λ on the path.", "−0.2 to 1.2 in tenths")] = None,
    questions: Annotated[int, typer.Option(min=1, help="How many questions to ask.")] = 100,
    verifier: VerifierOption = None,
    rows: RowsOption = 256,
    max_tokens: MaxTokensOption = None,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the most likely token.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="Directory for the results.")] = Path(
        "study"
    ),
    seed: SeedOption = 0,
    *,
    checkpoints: dict[str, Any],
) -> None:
    """Study the path between the ends, and each part alone.

    States, loss and accuracy along the path, against controls; and each part of the model by itself at λ = 1.
    A run that was interrupted goes on where it ended.
    """
    from dami.evaluation.tasks import TO_STUDY, check_distinct, check_enough

    asked = read_task(task, pair, verifier, questions, seed)
    with user_errors():
        check_directory(output)
        check_enough(asked, TO_STUDY)
        if intensity:
            check_distinct(intensity, (0.0, 1.0))
        for each in set(control or ()) - {"permuted"}:
            sources.local(each)
    model, tokenizer = load(pair, format, dtype, intensities=intensity or (), checkpoints=checkpoints)
    from dami.evaluation import study as studies
    from dami.evaluation.report import verifiers_of
    from dami.evaluation.study.report import circumstances, write_study_report
    from dami.layers.describe import describe

    options: dict[str, Any] = {"do_sample": sample}
    if max_tokens:
        options["max_new_tokens"] = max_tokens
    with resumable(), user_errors(), progress_bars() as bars:
        found = studies.study(
            model, tokenizer, asked, output, controls=control or (), intensities=intensity or studies.PATH, rows=rows,
            seed=seed, progress=stages(bars), **options,
        )  # fmt: skip
    about = {
        "pair": " and ".join(pair) if pair else "the shipped pair",
        "format": describe(model).format,
        "verifier": ", ".join(verifiers_of(asked)),
        "answers": "sampled" if sample else "greedy",
        **circumstances(model, CHECKOUT),
        "command": shlex.join(["dami", *sys.argv[1:]]),
    }
    write_study_report(found, output, about)
    out.print(f"Page, pictures, numbers: {output / 'report.html'}, path.svg, study.json", style="dim", soft_wrap=True)
