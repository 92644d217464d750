"""The file of a run: what was asked, and every batch of answers when it is done, as JSON lines; a run goes on there."""

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
    """What decides the answers of any run, ready for JSON: only a run with the same goes on with a file."""
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
    """Answers in order, batch by batch, but those that the file has, which come first, all at once.

    Every batch has a seed of its own, made from the run's and its place; so what a run gives does not depend on whether
    it was interrupted.

    Args:
        kind: dataclass of an answer, one for each row.
        batches: the rows of each.
        answer: asks one batch.
        path: a file of JSON lines, made if need be, that each batch is appended to; None for no file.
        settings: of the run, as `run_settings` and more of the caller's.

    Raises:
        ValueError: the file belongs to a run with other settings, which are named, or is none of a run.
    """
    found = [] if path is None else [kind(**each) for each in resume(path, settings, [len(b) for b in batches])]
    if found:
        yield found
    ends = accumulate(map(len, batches))
    for number, (batch, end) in enumerate(zip(batches, ends, strict=True)):
        if end > len(found):  # a file holds whole batches
            torch.manual_seed(hash((settings["seed"], number)))  # of integers, so the same in every process
            news = answer(batch)
            if path is not None:
                append(path, [asdict(each) for each in news])
            yield news


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


def resume(path: Path, settings: Mapping[str, Any], sizes: Sequence[int]) -> list[dict[str, Any]]:
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
        write_text(path, json.dumps(dict(settings), ensure_ascii=False) + "\n")
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
