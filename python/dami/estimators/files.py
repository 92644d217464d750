"""Stores an estimator, presets, and the frontier they were measured on.

They are stored in a directory with `intensity.json`, `frontier.json` and, for an estimator with weights,
`estimator.safetensors`. In a packed pair, or in the thinking end's directory, this directory is called `intensity` and
is loaded with the pair.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dami.dial.patch import Estimator
from dami.estimators import calibrated, confidence, preference  # noqa: F401  # registers their estimators
from dami.estimators.registry import estimator_of, state_of
from dami.files import write_text, written_file
from dami.sources import FOLDER, SETTINGS

WEIGHTS, FRONTIER = "estimator.safetensors", "frontier.json"


@dataclass(frozen=True, eq=False)
class StoredIntensity:
    """The contents of a directory.

    Attributes:
        estimator: the estimator, or None.
        presets: λ by name.
        frontier: the measured frontier, as `dami.evaluation.report.summary` returns it; {} if none was measured.
        prompt_tail: the least `prompt_tail` that was found to cost nothing; None if none was, or none was measured.
    """

    estimator: Estimator | None = None
    presets: Mapping[str, float] = field(default_factory=dict)
    frontier: Mapping[str, Any] = field(default_factory=dict)
    prompt_tail: int | None = None

    @classmethod
    def load(cls, directory: str | PathLike[str]) -> StoredIntensity:
        """Reads a directory.

        Raises:
            OSError: it does not exist.
            ValueError: a file has the wrong contents; the message names it.
        """
        directory = Path(directory)
        file = directory / SETTINGS
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            estimator = settings["estimator"] and _estimator(directory, **settings["estimator"])
            presets = {str(name): float(lam) for name, lam in settings["presets"].items()}
            tail = settings.get("prompt_tail")
            if not (tail is None or (type(tail) is int and tail >= 0)):
                raise ValueError(f"prompt_tail must be an integer of at least 0, or null, got {tail!r}")
        except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{file} must hold an estimator's settings and presets: {error!r}") from error
        frontier = directory / FRONTIER
        measured = json.loads(frontier.read_text(encoding="utf-8")) if frontier.exists() else {}
        return cls(estimator, presets, measured, tail)

    def save(self, directory: str | Path) -> Path:
        """Writes a directory, creating it if necessary, and returns it.

        Raises:
            TypeError: the estimator's class is not registered, or JSON cannot hold its settings.
        """
        directory = Path(directory)
        estimator: dict[str, Any] | None = None
        weights: Mapping[str, Tensor] = {}
        if self.estimator is not None:
            kind, state, weights = state_of(self.estimator)
            estimator = {"kind": kind, **state}
        try:
            tail = {} if self.prompt_tail is None else {"prompt_tail": self.prompt_tail}
            settings = json.dumps({"estimator": estimator, "presets": dict(self.presets), **tail}, indent=1)
        except TypeError as error:
            raise TypeError(f"estimator must have settings that JSON can hold, got {self.estimator}: {error}") from None
        directory.mkdir(parents=True, exist_ok=True)
        if weights:
            with written_file(directory / WEIGHTS) as file:
                file.write_bytes(save(dict(weights)))  # save_file lets nobody but the owner read
        if self.frontier:
            write_text(directory / FRONTIER, json.dumps(self.frontier, indent=1, ensure_ascii=False) + "\n")
        write_text(directory / SETTINGS, settings + "\n")  # last, because readers look for this file
        return directory


def copy_estimator(pair: Path, to: Path) -> None:
    """Copies the `intensity` folder of one pair's directory to another's, if it exists, without records of sweeps."""
    for name in (SETTINGS, WEIGHTS, FRONTIER):
        if (pair / FOLDER / name).exists():
            (to / FOLDER).mkdir(exist_ok=True)
            shutil.copy(pair / FOLDER / name, to / FOLDER)


def _estimator(directory: Path, kind: str, **settings: Any) -> Estimator:
    weights = directory / WEIGHTS
    return estimator_of(kind, settings, load_file(weights) if weights.exists() else {})
