"""Sweeps: every question at every λ, all λ of a question in one mixed batch, each batch on disk when it is done."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dami.chat import ask
from dami.evaluation.tasks import Task, check_distinct
from dami.files import write_text


@dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        task: the task's name.
        index: the question's place in it.
        level: the question's.
        intensity: λ.
        sample: which of the answers to this question at this λ.
        score: from 0 to 1.
        tokens: generated, thought and end token included.
        thought, text: what was said.
        finished: False where it was cut off.
    """

    task: str
    index: int
    level: int
    intensity: float
    sample: int
    score: float
    tokens: int
    thought: str
    text: str
    finished: bool

    @property
    def well_formed(self) -> bool:
        """Whether there is an answer, and it came to its end."""
        return self.finished and bool(self.text)


def sweep(
    model: Any,
    tokenizer: Any,
    task: Task,
    intensities: Sequence[float],
    *,
    path: str | Path | None = None,
    samples: int = 1,
    rows: int = 64,
    seed: int = 0,
    on_batch: Callable[[list[Record]], None] = lambda records: None,
    **options: Any,
) -> list[Record]:
    """Answers every question of a task at every λ, in mixed batches that hold all λ of a question.

    Every batch has a seed of its own, made from `seed` and its place; so what a run gives does not depend on whether it
    was interrupted. Other batch sizes give other samples.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        task: questions and verifier.
        intensities: distinct λ.
        path: a file of JSON lines that each batch is appended to. If it is there, and of this pair with these settings,
            the run goes on where it ended.
        samples: answers to a question at one λ.
        rows: of a batch, at most; but no fewer than λ.
        seed: of the sampling.
        on_batch: is given the records of each batch when it is done, and those found in the file first.
        options: passed to `dami.chat.ask`, and so to `model.generate`.

    Raises:
        ValueError: the file belongs to a run with another pair or other settings; they are named.
    """
    check_distinct(intensities)
    units = [(index, sample) for index in range(len(task.questions)) for sample in range(samples)]
    step = max(1, rows // len(intensities))
    batches = [units[start : start + step] for start in range(0, len(units), step)]
    settings = {
        "weights": fingerprint(model),
        "task": task.name,
        "questions": f"{len(task.questions)} ({zlib.crc32(repr(task.questions).encode()):08x})",
        "intensities": [float(lam) for lam in intensities],
        "samples": samples,
        "rows": rows,
        "seed": seed,
        "options": {key: repr(value) for key, value in sorted(options.items())},
    }
    sizes = [len(batch) * len(intensities) for batch in batches]
    records = [] if path is None else [Record(**found) for found in resume(Path(path), settings, sizes)]
    if records:
        on_batch(records)
    done = len(records)
    for number, batch in enumerate(batches):
        asked = [(index, sample, float(lam)) for index, sample in batch for lam in intensities]
        if done:  # a file holds whole batches
            done -= len(asked)
            continue
        torch.manual_seed(hash((seed, number)))  # of integers, so the same in every process
        prompts = [task.questions[index].question for index, _, _ in asked]
        answers = ask(model, tokenizer, prompts, [lam for _, _, lam in asked], **options)
        news = [
            Record(
                task=task.questions[index].task or task.name,
                index=index,
                level=task.questions[index].level,
                intensity=lam,
                sample=sample,
                score=task.score(index, answer.text),
                tokens=answer.tokens,
                thought=answer.thought,
                text=answer.text,
                finished=answer.finished,
            )
            for (index, sample, lam), answer in zip(asked, answers, strict=True)
        ]
        if path is not None:
            append(Path(path), [asdict(record) for record in news])
        records += news
        on_batch(news)
    return records


def read_records(path: str | Path) -> list[Record]:
    """The records of a sweep's file, whole batches or not."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")  # an answer may hold other ends of lines
    return [Record(**json.loads(line)) for line in lines[1:-1]]


def fingerprint(model: nn.Module) -> int:
    """A checksum of the first numbers of every parameter, so that one pair's answers are not taken for another's."""
    crc = 0
    for parameter in model.parameters():
        if parameter.device.type != "meta" and parameter.numel():
            first = parameter.detach()[(0,) * (parameter.dim() - 1)].reshape(-1)[:64]  # copies no whole parameter
            crc = zlib.crc32(first.cpu().contiguous().view(torch.uint8).numpy().tobytes(), crc)
    return crc


def append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Adds a batch to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def resume(path: Path, settings: dict[str, Any], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """What a file of JSON lines holds of whole batches; the rest is cut off. A new file gets the settings.

    Args:
        path: the file, made if need be.
        settings: of the run, ready for JSON.
        sizes: lines of each of its batches.

    Raises:
        ValueError: the file belongs to a run with other settings, which are named, or is none of a run.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""  # it may end within a letter
    if not text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, ensure_ascii=False) + "\n")
        return []
    head, *lines = text.split("\n")  # and the rest of a line that was cut off
    found = _parsed(head, path, 1)
    differ = [key for key in settings if found.get(key) != settings[key]]
    if differ:
        told = "; ".join(f"{key}: {found.get(key, 'not told')} there, {settings[key]} now" for key in differ)
        raise ValueError(f"path {path} holds a sweep with other settings ({told}): name another file or delete it")
    whole = max((end for end in accumulate(sizes, initial=0) if end < len(lines)), default=0)
    kept = "".join(line + "\n" for line in [head, *lines[:whole]])
    if kept != text:
        write_text(path, kept)
    return [_parsed(line, path, number) for number, line in enumerate(lines[:whole], 2)]


def _parsed(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"path {path} is no file of a sweep, by line {number}: name another file or delete it")
    return found
