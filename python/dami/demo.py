"""What `dami demo` measures: answers side by side, the accuracy–tokens curve, and the price against merged copies."""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import os
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import nn

from dami import __version__
from dami.chat import ask
from dami.checkpoints import Checkpoint, example_pair
from dami.evaluation.frontier import Frontier
from dami.evaluation.sweeps import sweep
from dami.evaluation.tasks import JsonLines, Question, last_word, spread
from dami.plots import draw_curve, save_curve
from dami.terminal import point_table, side_by_side, size

SHOWN = (0.0, 0.5, 1.0)
SWEPT = tuple(tenth / 10 for tenth in range(11))
ROWS = 264  # of a batch of the sweep: enough to fill two cores


@dataclass(frozen=True)
class Cost:
    """What serving a set of rows took."""

    weights: int  # bytes
    peak: int | None  # bytes beyond the weights at the highest point, None where the system does not tell
    seconds: float
    tokens: int
    texts: list[str]


def rising(questions: Sequence[Question], seed: int) -> list[Question]:
    """One question of every level, easiest first, the tasks by turns."""
    chance = random.Random(seed)
    tasks = sorted({q.task for q in questions})
    chance.shuffle(tasks)
    chosen = []
    for turn, level in enumerate(sorted({q.level for q in questions})):
        of_level = [q for q in questions if q.level == level]
        of_task = [q for q in of_level if q.task == tasks[turn % len(tasks)]]
        chosen.append(chance.choice(of_task or of_level))
    return chosen


def merged_copy(instruct: nn.Module, thinking: nn.Module, intensity: float) -> nn.Module:
    """An ordinary model with the weights at λ, blended in float32 and rounded once: what we do without."""
    merged = copy.deepcopy(instruct)
    with torch.no_grad():
        for ours, theirs in zip(merged.parameters(), thinking.parameters(), strict=True):
            ours.copy_(torch.lerp(ours.float(), theirs.float(), intensity))
    return merged


def cost_of_patched(
    model: Any, tokenizer: Any, prompts: Sequence[str], intensities: Sequence[float], **options: Any
) -> Cost:
    """Every prompt at every λ, greedily, in one batch of one patched model."""
    rows = [(prompt, lam) for lam in intensities for prompt in prompts]
    return _cost(model, tokenizer, [p for p, _ in rows], [lam for _, lam in rows], **options)


def cost_of_copies(copies: Iterable[Any], tokenizer: Any, prompts: Sequence[str], **options: Any) -> Cost:
    """The same rows with a merged copy per λ, one batch each; `weights` are those of all copies together."""
    costs = [_cost(merged, tokenizer, prompts, None, **options) for merged in copies]
    return Cost(
        weights=sum(cost.weights for cost in costs),
        peak=None if costs[0].peak is None else max(cost.peak or 0 for cost in costs),
        seconds=sum(cost.seconds for cost in costs),
        tokens=sum(cost.tokens for cost in costs),
        texts=[text for cost in costs for text in cost.texts],
    )


def _cost(
    model: Any, tokenizer: Any, prompts: Sequence[str], intensities: Sequence[float] | None, **options: Any
) -> Cost:
    with measured(model.device) as used:
        answers = ask(model, tokenizer, prompts, intensities, do_sample=False, **options)
    weights = sum(tensor.nbytes for tensor in model.parameters())
    texts = [f"{a.thought}\n{a.text}" for a in answers]
    return Cost(weights, used["peak"], used["seconds"], sum(a.tokens for a in answers), texts)


@contextmanager
def measured(device: torch.device) -> Iterator[dict[str, Any]]:
    """Wall time and growth of memory at its peak inside a `with` block: "seconds", and "peak" in bytes or None.

    On a GPU as the allocator counts; on Linux as resident memory grows, freed pages having been given back first.
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
    """Bytes of this process's highest resident memory since VmHWM was reset."""
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def run(
    model: Any, tokenizer: Any, pair: tuple[str, str] | None, output: Path, count: int, seed: int, console: Console
) -> None:
    """Runs the demo on a loaded pair, prints what it finds, and leaves curve.png and demo.json in `output`.

    Args:
        model, tokenizer: as `load_pair` returns them.
        pair: where they came from, None for the pair that ships.
        output: directory, made if need be.
        count: questions of the sweep.
        seed: of the choice of questions and of the sampling.
        console: where to print.
    """
    output.mkdir(parents=True, exist_ok=True)
    held_out = JsonLines(example_pair()[0].parent / "questions.jsonl", "word")

    shown = rising(held_out.questions, seed)
    console.rule(f"One batch, {len(shown) * len(SHOWN)} rows: {len(shown)} questions, each at λ = 0, 0.5 and 1")
    torch.manual_seed(seed)
    rows = [(question, lam) for question in shown for lam in SHOWN]
    with console.status("answering"):
        answers = ask(model, tokenizer, [q.question for q, _ in rows], [lam for _, lam in rows])
    for place, question in enumerate(shown):
        several = answers[place * len(SHOWN) :][: len(SHOWN)]
        title = f"level {question.level}, {question.task.replace('_', ' ')}, answer {question.answer}"
        verdicts = [bool(last_word(answer.text, question.answer)) for answer in several]
        console.print(side_by_side(several, console, title, verdicts))

    held_out.questions = spread(held_out.questions, count)
    console.rule(f"{len(held_out.questions)} held-out questions at {len(SWEPT)} λ, in mixed batches")
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("answers", total=len(held_out.questions) * len(SWEPT))
        records = sweep(
            model, tokenizer, held_out, SWEPT, rows=ROWS, seed=seed,
            on_batch=lambda news: progress.advance(bar, len(news)),
        )  # fmt: skip
    frontier = Frontier.of(records)
    console.print(draw_curve(frontier.points, console.width), point_table(frontier.points), sep="\n\n")
    save_curve(frontier, output / "curve.png", f"{len(frontier)} held-out questions, 95 % intervals")

    console.rule("The price")
    prompts = [str(question.question) for question in shown]
    with console.status("answering greedily, in one batch and with merged copies"):
        patched = cost_of_patched(model, tokenizer, prompts, SWEPT)
        ends = [Checkpoint.find(end).model(dtype=model.dtype).to(model.device) for end in pair or example_pair()]
        copies = cost_of_copies((merged_copy(ends[0], ends[1], lam) for lam in SWEPT), tokenizer, prompts)
    console.print(
        price_table(patched, copies, len(SWEPT)), Text(verdict(patched, copies, len(SWEPT)), "bold"), sep="\n"
    )

    record = {
        "versions": {"dami": __version__, "torch": torch.__version__},
        "device": torch.cuda.get_device_name()
        if model.device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads",
        "seed": seed,
        "shown": [
            asdict(answer) | {"question": asdict(question)} for (question, _), answer in zip(rows, answers, strict=True)
        ],
        "questions": len(frontier),
        "points": [asdict(point) for point in frontier.points],
        "patched": asdict(patched),
        "copies": asdict(copies),
    }
    (output / "demo.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    console.print(f"Picture and numbers: {output / 'curve.png'}, {output / 'demo.json'}", style="dim", soft_wrap=True)


def price_table(patched: Cost, copies: Cost, count: int) -> Table:
    """What one patched model and `count` merged copies took for the same rows."""
    rows = len(patched.texts)
    table = Table(box=None, pad_edge=False)
    for name in ("", "time", "weights", "at work", "rows at once"):
        table.add_column(name, justify="right" if name else "left", header_style="dim")
    for name, cost, at_once in (
        ("one patched model", patched, rows),
        (f"{count} merged copies, one per λ", copies, rows // count),
    ):
        working = "unknown" if cost.peak is None else f"+ {size(cost.peak)}"
        table.add_row(name, f"{cost.seconds:.1f} s", size(cost.weights), working, str(at_once))
    return table


def verdict(patched: Cost, copies: Cost, count: int) -> str:
    """The line that proves the point."""
    same = sum(a == b for a, b in zip(patched.texts, copies.texts, strict=True))
    return (
        f"{count} λ in one batch: {copies.seconds / patched.seconds:.1f}× the speed of {count} merged copies with "
        f"{patched.weights / copies.weights:.0%} of their weights; {same} of {len(patched.texts)} greedy answers agree."
    )
