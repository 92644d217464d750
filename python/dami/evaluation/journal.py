"""The journal of a run: its settings and each finished batch of answers, as JSON lines, from which a run can resume."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from dami.evaluation.tasks import Task
from dami.files import write_text

Row = TypeVar("Row")
Answered = TypeVar("Answered", bound=Any)  # a dataclass


def run_settings(model: nn.Module, task: Task, rows: int, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that determine a run's answers, ready for JSON. A file is resumed only if they match."""
    return {
        "weights": fingerprint(model),
        "task": task.name,
        "questions": f"{len(task.questions)} ({zlib.crc32(repr(task.questions).encode()):08x})",
        "rows": rows,
        "seed": seed,
        "options": {key: repr(value) for key, value in sorted(options.items())},
    }


def answered_batches(
    kind: type[Answered],
    batches: Sequence[Sequence[Row]],
    answer: Callable[[Sequence[Row]], list[Answered]],
    path: Path | None,
    settings: Mapping[str, Any],
) -> Iterator[list[Answered]]:
    """Yields answers in order, batch by batch. Answers already in the file come first, all at once.

    Each batch has its own seed, derived from the run's seed and the batch's number, so an interruption does not change
    the answers.

    Args:
        kind: dataclass of an answer, of which each row has one.
        batches: the rows of each batch.
        answer: answers one batch.
        path: a file of JSON lines that each batch is appended to, created if missing; None for no file.
        settings: of the run: those of `run_settings` and the caller's own.

    Raises:
        ValueError: the file belongs to a run with other settings, which the message names, or is not a run's file.
    """
    found = [] if path is None else [kind(**each) for each in resume(path, settings, [len(b) for b in batches])]
    if found:
        yield found
    ends = accumulate(map(len, batches))
    for number, (batch, end) in enumerate(zip(batches, ends, strict=True)):
        if end > len(found):  # the file holds only whole batches
            torch.manual_seed(hash((settings["seed"], number)))  # a hash of integers is the same in every process
            news = answer(batch)
            if path is not None:
                append(path, [asdict(each) for each in news])
            yield news


def fingerprint(model: nn.Module) -> int:
    """Returns a checksum of the first values of every parameter, so that pairs' answers are not mixed up."""
    crc = 0
    for parameter in model.parameters():
        if parameter.device.type != "meta" and parameter.numel():
            first = parameter.detach()[(0,) * (parameter.dim() - 1)].reshape(-1)[:64]  # avoids copying it whole
            crc = zlib.crc32(first.cpu().contiguous().view(torch.uint8).numpy().tobytes(), crc)
    return crc


def append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Appends a batch to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def resume(path: Path, settings: Mapping[str, Any], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Reads the whole batches in a file of JSON lines and cuts off the rest. Writes the settings to a new file.

    Args:
        path: the file, created if missing.
        settings: of the run, ready for JSON.
        sizes: number of lines of each batch.

    Raises:
        ValueError: the file belongs to a run with other settings, which the message names, or is not a run's file.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""  # may end mid-character
    if not text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(dict(settings), ensure_ascii=False) + "\n")
        return []
    head, *lines = text.split("\n")  # the last element may be part of a line
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
