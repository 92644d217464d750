"""The parts of `dami demo`: answers side by side, the accuracy–tokens curve, and the cost against merged copies."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from dami.chat import Answer, answers_of, ask, encode, numbers_of
from dami.cli.terminal import point_table, side_by_side, size
from dami.dial.patch import patch_of
from dami.evaluation.frontier import Frontier
from dami.evaluation.plots import Reached, draw_curve, save_curve
from dami.evaluation.policies import Outcome, play
from dami.evaluation.sweeps import sweep
from dami.evaluation.tasks import JsonLines, Question, last_word, spread
from dami.generation.pieces import generate_in_pieces
from dami.saving.merging import materialize
from dami.sources import example_pair
from dami.tables import FittedTable
from dami.thoughts import Reader
from dami.version import __version__

SHOWN = (0.0, 1.0, "auto")
SHOWN_WITHOUT_ESTIMATOR = (0.0, 0.5, 1.0)
SWEPT = tuple(tenth / 10 for tenth in range(11))
ROWS = 264  # rows per batch of the sweep, enough to keep two cores busy


@dataclass(frozen=True)
class Cost:
    """The cost of answering a set of rows."""

    weights: int  # bytes
    peak: int | None  # peak bytes besides the weights; None if the system doesn't report them
    seconds: float
    answers: list[list[int]]  # the tokens of each row, including its end token
    texts: list[str]


def rising(questions: Sequence[Question], seed: int) -> list[Question]:
    """Picks one question of every level, easiest first, cycling through the tasks."""
    chance = random.Random(seed)
    tasks = sorted({q.task for q in questions})
    chance.shuffle(tasks)
    chosen = []
    for turn, level in enumerate(sorted({q.level for q in questions})):
        of_level = [q for q in questions if q.level == level]
        of_task = [q for q in of_level if q.task == tasks[turn % len(tasks)]]
        chosen.append(chance.choice(of_task or of_level))
    return chosen


def cost_of(
    model: Any, tokenizer: Any, prompts: Sequence[str], intensities: Sequence[float] | None = None, **options: Any
) -> Cost:
    """Answers all prompts at all λ in one greedy batch of a patched model, or each once with an ordinary model."""
    lams = None if intensities is None else [lam for lam in intensities for _ in prompts]
    prompts = [*prompts] * len(intensities or (None,))
    with torch.inference_mode(), measured(model.device) as used:
        full, batch = encode(tokenizer, prompts)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        ids = generate_in_pieces(model, batch, lams, do_sample=False, **options).cpu()
        answers = answers_of(model, Reader.of(tokenizer), ids, prompts, lams, full)
    return Cost(
        weights=sum(tensor.nbytes for tensor in model.parameters()),
        peak=used["peak"],
        seconds=used["seconds"],
        answers=[row[: answer.tokens].tolist() for row, answer in zip(ids, answers, strict=True)],
        texts=[f"{answer.thought}\n{answer.text}" for answer in answers],
    )


def cost_of_all(costs: Sequence[Cost]) -> Cost:
    """Sums the costs of several models that run one after the other while the weights of all stay in memory."""
    return Cost(
        weights=sum(cost.weights for cost in costs),
        peak=None if costs[0].peak is None else max(cost.peak or 0 for cost in costs),
        seconds=sum(cost.seconds for cost in costs),
        answers=[answer for cost in costs for answer in cost.answers],
        texts=[text for cost in costs for text in cost.texts],
    )


def parting(model: Any, tokenizer: Any, prompt: str, answer: Sequence[int], other: Sequence[int]) -> float:
    """Returns how much an ordinary model prefers its own greedy token to the other answer's where they first differ.

    Both answers are token ids including the end token, and neither is a prefix of the other. The result is a difference
    of log-probabilities: 0 is a tie.
    """
    place = next(place for place, (ours, theirs) in enumerate(zip(answer, other, strict=False)) if ours != theirs)
    _, batch = encode(tokenizer, [prompt])
    ids = torch.cat([batch["input_ids"], torch.tensor([answer[:place]], dtype=torch.int64)], 1)
    with torch.inference_mode():
        logits = model(input_ids=ids.to(model.device)).logits[0, -1].float()
    return (logits[answer[place]] - logits[other[place]]).item()


@contextmanager
def measured(device: torch.device) -> Iterator[dict[str, Any]]:
    """Measures wall time and peak memory growth of a `with` block: "seconds", and "peak" in bytes or None.

    On a GPU, memory is what the allocator counts. On Linux, it is the growth of resident memory after freed pages have
    been returned to the system.
    """
    used: dict[str, Any] = {"peak": None}
    gc.collect()
    on_gpu, clear = device.type == "cuda", Path("/proc/self/clear_refs")
    on_linux = os.access(clear, os.W_OK)
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    elif on_linux:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim:
            trim(0)
        clear.write_text("5")  # resets VmHWM
        before = _resident()
    start = time.perf_counter()
    yield used
    if on_gpu:
        torch.cuda.synchronize(device)
    used["seconds"] = time.perf_counter() - start
    if on_gpu:
        used["peak"] = torch.cuda.max_memory_allocated(device) - before
    elif on_linux:
        used["peak"] = _resident() - before


def _resident() -> int:
    """Returns this process's peak resident memory in bytes since VmHWM was reset."""
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def run(
    model: Any, tokenizer: Any, pair: Sequence[str] | None, output: Path, count: int, seed: int, console: Console
) -> None:
    """Runs the demo on a loaded pair, prints the results, and writes curve.png and demo.json to `output`.

    Args:
        model, tokenizer: as `load_pair` returns them.
        pair: the packed pair or the two checkpoints they came from; None for the shipped pair.
        output: directory, created if need be.
        count: number of questions in the sweep.
        seed: seed for choosing questions and for sampling.
        console: where to print.
    """
    output.mkdir(parents=True, exist_ok=True)
    held_out = JsonLines(example_pair()[0].parent / "questions.jsonl", "word")
    shown = rising(held_out.questions, seed)
    held_out.questions = spread(held_out.questions, count)
    # The shipped pair is too small for two threads: next to other processes they would mostly wait for each other.
    with threads(torch.get_num_threads() if pair else 1):
        lams = SHOWN if patch_of(model).estimator else SHOWN_WITHOUT_ESTIMATOR
        answers = show_answers(model, tokenizer, shown, lams, seed, console)
        frontier, auto = show_curve(model, tokenizer, held_out, "auto" in lams, seed, console)
        title = f"{len(frontier)} held-out questions, 95 % intervals"
        save_curve(frontier, output / "curve.png", title, reached(auto))
        patched, copies, gaps = show_price(model, tokenizer, shown, console)
        device = f"{torch.get_num_threads()} CPU threads".replace("1 CPU threads", "1 CPU thread")
    record = {
        "versions": {"dami": __version__, "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else device,
        "seed": seed,
        "shown": [
            asdict(answer) | {"question": asdict(shown[place // len(lams)])} for place, answer in enumerate(answers)
        ],
        "questions": len(frontier),
        "points": [asdict(point) for point in frontier.points],
        "auto": asdict(auto) if auto else None,
        "patched": asdict(patched) | {"tokens": sum(map(len, patched.answers))},
        "copies": asdict(copies) | {"tokens": sum(map(len, copies.answers))},
        "gaps": gaps,
    }
    (output / "demo.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    console.print(f"Picture and numbers: {output / 'curve.png'}, {output / 'demo.json'}", style="dim", soft_wrap=True)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets the number of CPU threads inside a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def show_answers(
    model: Any, tokenizer: Any, shown: Sequence[Question], lams: Sequence[float | str], seed: int, console: Console
) -> list[Answer]:
    """Asks every question at every λ, in one batch, and prints the answers side by side."""
    told = f"{', '.join(f'{lam:g}' if isinstance(lam, float) else lam for lam in lams[:-1])} and {lams[-1]}"
    console.rule(f"One batch, {len(shown) * len(lams)} rows: {len(shown)} questions, each at λ = {told}")
    torch.manual_seed(seed)
    rows = [(question, lam) for question in shown for lam in lams]
    with console.status("answering"):
        answers = ask(model, tokenizer, [q.question for q, _ in rows], [lam for _, lam in rows])
    names = [lam if isinstance(lam, str) else "" for lam in lams]
    for place, question in enumerate(shown):
        several = answers[place * len(lams) :][: len(lams)]
        title = f"level {question.level}, {question.task.replace('_', ' ')}, answer {question.answer}"
        verdicts = [bool(last_word(answer.text, question.answer)) for answer in several]
        console.print(side_by_side(several, console, title, verdicts, names=names))
    return answers


def show_curve(
    model: Any, tokenizer: Any, held_out: JsonLines, auto: bool, seed: int, console: Console
) -> tuple[Frontier, Outcome | None]:
    """Asks every held-out question at the λ of SWEPT, and draws accuracy against tokens.

    With `auto`, also the λ that the pair's estimator chooses for each question, on the very same answers.
    """
    prompts = [question.question for question in held_out.questions]
    chosen = numbers_of(model, tokenizer, prompts, ["auto"] * len(prompts)) if auto else []
    lams = sorted({*SWEPT, *(lam for lam in chosen if not SWEPT[0] <= lam <= SWEPT[-1])})
    console.rule(f"{len(prompts)} held-out questions at {len(lams)} λ, in mixed batches")
    total = len(prompts) * len(lams)
    console.print(f"{total} answers, {ROWS} at once: most of the time that this takes", style="dim")
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("answers", total=total)
        records = sweep(
            model, tokenizer, held_out, lams, rows=ROWS, seed=seed,
            on_batch=lambda news: progress.advance(bar, len(news)),
        )  # fmt: skip
    frontier = Frontier.of(records)
    outcome = play(frontier, chosen) if auto else None
    curve = draw_curve(frontier.points, console.width, reached=reached(outcome))
    console.print(curve, point_table(frontier.points), sep="\n\n")
    if outcome:
        console.print(Text(auto_verdict(frontier, outcome), "bold"))
    return frontier, outcome


def reached(auto: Outcome | None) -> list[Reached]:
    """Returns the point of the estimator's choices, if there is one."""
    return [Reached("auto", auto.tokens, auto.accuracy)] if auto else []


def auto_verdict(frontier: Frontier, auto: Outcome) -> str:
    """Compares the λ that were chosen for each question with λ = 1 for all, and with the best static λ."""
    thinking = frontier.points[-1]
    value, low, high = auto.accuracy
    return (
        f"auto: {value:.1%} right ({low:.1%} to {high:.1%}) with {auto.tokens.value:.0f} tokens, "
        f"{auto.tokens.value / thinking.tokens.value:.2f} of what λ = {thinking.intensity:g} takes for "
        f"{thinking.accuracy.value:.1%}.\nOne λ for all questions and as many tokens: {auto.static.value:.1%}."
    )


def show_price(
    model: Any, tokenizer: Any, shown: Sequence[Question], console: Console
) -> tuple[Cost, Cost, list[float]]:
    """Asks the questions again at the λ of SWEPT, with one patched model and with merged copies, and prints both costs.

    Returns both costs, and how much each copy preferred its own token where two answers differ.
    """
    console.rule("The price")
    prompts = [str(question.question) for question in shown]
    console.print(
        f"The {len(prompts)} questions at {len(SWEPT)} λ again, greedily: in one batch of the patched model, then "
        f"with {len(SWEPT)} merged copies, one after the other",
        style="dim",
    )
    costs, gaps = [], []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("one patched model", total=len(SWEPT) + 1)
        patched = cost_of(model, tokenizer, prompts, SWEPT)
        for place, lam in enumerate(SWEPT):
            progress.update(bar, advance=1, description=f"merged copy, λ = {lam:g}")
            merged = materialize(model, lam)
            costs.append(cost_of(merged, tokenizer, prompts))
            ours = patched.answers[place * len(prompts) :][: len(prompts)]
            gaps += [
                abs(parting(merged, tokenizer, prompt, answer, other))
                for prompt, answer, other in zip(prompts, costs[-1].answers, ours, strict=True)
                if answer != other
            ]
    copies = cost_of_all(costs)
    console.print(
        price_table(patched, copies, len(SWEPT)),
        Text(verdict(patched, copies, len(SWEPT), gaps, model.dtype), "bold"),
        sep="\n",
    )
    return patched, copies, gaps


def price_table(patched: Cost, copies: Cost, count: int) -> FittedTable:
    """Returns a table of the costs of one patched model and of `count` merged copies for the same rows."""

    def row(name: str, cost: Cost, at_once: int) -> tuple[str, ...]:
        working = "unknown" if cost.peak is None else f"+ {size(cost.peak)}"
        return name, f"{cost.seconds:.1f} s", size(cost.weights), working, str(at_once)

    rows = len(patched.answers)
    return FittedTable(
        ("", "time", "weights", "at work", "rows at once"),
        [
            row("one patched model", patched, rows),
            row(f"{count} merged copies, one per λ", copies, rows // count),
        ],
        left=1,
    )


def verdict(patched: Cost, copies: Cost, count: int, gaps: Sequence[float], dtype: torch.dtype) -> str:
    """Returns a summary. `gaps` are the copies' preferences where answers differ, see `parting`."""
    rows = len(patched.answers)
    told = (
        f"{count} λ in one batch: {copies.seconds / patched.seconds:.1f}× the speed of {count} merged copies with "
        f"{patched.weights / copies.weights:.0%} of their weights; {rows - len(gaps)} of {rows} greedy answers agree."
    )
    if gaps:
        most = f"differ by at most {max(gaps):.2g}" if max(gaps) else "are equal"
        told += (
            f"\nWhere the others part ({len(gaps)}), the log-probabilities of two tokens "
            f"{most}: {str(dtype).removeprefix('torch.')} rounds the weights and sums of a merged copy "
            "differently."
        )
    return told
