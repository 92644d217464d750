"""What `dami demo` measures: answers side by side, the accuracy–tokens curve, and the price against merged copies."""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import math
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from dami.chat import Answer, ask
from dami.checkpoints import Checkpoint, example_pair
from dami.plots import draw_curve, save_curve
from dami.terminal import side_by_side, size, style_of

SHOWN = (0.0, 0.5, 1.0)
SWEPT = tuple(tenth / 10 for tenth in range(11))
ROWS = 264  # of a batch of the sweep: enough to fill two cores
Z95 = 1.959964  # half-width of a 95 % interval in standard deviations


@dataclass(frozen=True)
class Question:
    """A question with its answer; `level` is its difficulty."""

    task: str
    level: int
    question: str
    answer: str


@dataclass(frozen=True)
class Point:
    """One λ of the sweep, over all its questions; low and high are ends of 95 % intervals."""

    intensity: float
    questions: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    tokens: float  # mean per answer
    tokens_low: float
    tokens_high: float
    accuracy_by_level: dict[int, float]


@dataclass(frozen=True)
class Cost:
    """What serving a set of rows took."""

    weights: int  # bytes
    peak: int | None  # bytes beyond the weights at the highest point, None where the system does not tell
    seconds: float
    tokens: int
    texts: list[str]


def read_questions(path: Path) -> list[Question]:
    """Reads questions, one JSON object a line."""
    return [Question(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


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


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """`count` questions at even distances, so that a file in order of task and level gives of each alike; by level."""
    count = min(count, len(questions))
    return sorted((questions[i * len(questions) // count] for i in range(count)), key=lambda q: q.level)


def is_right(answer: str, wanted: str) -> bool:
    """Whether the last number of `answer` is `wanted`, or its last word where that is no number."""
    pattern = r"-?\d+" if re.fullmatch(r"-?\d+", wanted) else r"\w+"
    return re.findall(pattern, answer.replace(",", ""))[-1:] == [wanted]


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson's), which stays inside [0, 1] and does not vanish at its ends.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)
    """
    p, z2n = right / count, Z95**2 / count
    middle = p + z2n / 2
    half = Z95 * math.sqrt(p * (1 - p) / count + z2n / (4 * count))
    return max(0.0, (middle - half) / (1 + z2n)), min(1.0, (middle + half) / (1 + z2n))


def summarise(questions: Sequence[Question], answers: Sequence[Answer]) -> list[Point]:
    """One point per λ, in rising order; `answers[i]` answers `questions[i]`."""
    points = []
    for intensity in sorted({a.intensity for a in answers if a.intensity is not None}):
        pairs = [(q, a) for q, a in zip(questions, answers, strict=True) if a.intensity == intensity]
        right = [(q.level, is_right(a.text, q.answer)) for q, a in pairs]
        tokens = [a.tokens for _, a in pairs]
        mean = statistics.fmean(tokens)
        half = Z95 * statistics.stdev(tokens) / math.sqrt(len(tokens)) if len(tokens) > 1 else 0.0
        by_level = {
            level: statistics.fmean(r for at, r in right if at == level) for level in sorted({at for at, _ in right})
        }
        total = sum(r for _, r in right)
        low, high = wilson(total, len(right))
        points.append(
            Point(intensity, len(right), total / len(right), low, high, mean, mean - half, mean + half, by_level)
        )
    return points


def sweep(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    intensities: Sequence[float],
    rows: int,
    on_batch: Callable[[int], None] = lambda rows: None,
    **options: Any,
) -> tuple[list[Question], list[Answer]]:
    """Asks every question at every λ, in mixed batches of at most `rows` rows that hold all λ of a question.

    Returns:
        The question and the answer of every row. `on_batch` is told the rows of each batch when it is done.
    """
    step = max(1, rows // len(intensities))
    asked, answers = [], []
    for start in range(0, len(questions), step):
        batch = [(q, lam) for q in questions[start : start + step] for lam in intensities]
        answers += ask(model, tokenizer, [q.question for q, _ in batch], [lam for _, lam in batch], **options)
        asked += [q for q, _ in batch]
        on_batch(len(batch))
    return asked, answers


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
    held_out = read_questions(example_pair()[0].parent / "questions.jsonl")

    shown = rising(held_out, seed)
    console.rule(f"One batch, {len(shown) * len(SHOWN)} rows: {len(shown)} questions, each at λ = 0, 0.5 and 1")
    torch.manual_seed(seed)
    with console.status("answering"):
        asked, answers = sweep(model, tokenizer, shown, SHOWN, rows=len(shown) * len(SHOWN))
    for start in range(0, len(answers), len(SHOWN)):
        question, several = asked[start], answers[start : start + len(SHOWN)]
        title = f"level {question.level}, {question.task.replace('_', ' ')}, answer {question.answer}"
        verdicts = [is_right(answer.text, question.answer) for answer in several]
        console.print(side_by_side(several, console, title, verdicts))

    chosen = spread(held_out, count)
    console.rule(f"{len(chosen)} held-out questions at {len(SWEPT)} λ, in mixed batches")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("answers", total=len(chosen) * len(SWEPT))
        rows, said = sweep(model, tokenizer, chosen, SWEPT, ROWS, lambda done: progress.advance(task, done))
    points = summarise(rows, said)
    console.print(draw_curve(points, console.width), point_table(points), sep="\n\n")
    save_curve(points, output / "curve.png", f"{len(chosen)} held-out questions, 95 % intervals")

    console.rule("The price")
    prompts = [question.question for question in shown]
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
            asdict(answer) | {"question": asdict(question)} for question, answer in zip(asked, answers, strict=True)
        ],
        "points": [asdict(point) for point in points],
        "patched": asdict(patched),
        "copies": asdict(copies),
    }
    (output / "demo.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    console.print(f"Picture and numbers: {output / 'curve.png'}, {output / 'demo.json'}", style="dim")


def point_table(points: Sequence[Point]) -> Table:
    """One row per λ: right answers with their interval, and tokens."""
    table = Table(box=None, pad_edge=False)
    for name in ("λ", "right", "95 % interval", "tokens", "95 % interval"):
        table.add_column(name, justify="right", header_style="dim")
    for p in points:
        table.add_row(
            Text(f"{p.intensity:g}", f"bold {style_of(p.intensity)}"),
            f"{p.accuracy:.0%}",
            f"{p.accuracy_low:.0%} to {p.accuracy_high:.0%}",
            f"{p.tokens:.0f}",
            f"{p.tokens_low:.0f} to {p.tokens_high:.0f}",
        )
    return table


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
