"""What is known of a pair's λ as files: an estimator, presets, and the frontier that both were measured on.

A directory with `intensity.json`, `frontier.json` and, for an estimator with weights, `estimator.safetensors`. In a
packed pair, or beside the thinking end, it is called `intensity`, and comes with the pair.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dami.dial.patch import Estimator
from dami.estimators import StaticIntensity
from dami.estimators.confidence import ConfidenceEstimator, ConfidenceRouter
from dami.estimators.preference import Features, PreferenceEstimator
from dami.files import write_text, written_file
from dami.sources import FOLDER, SETTINGS

WEIGHTS, FRONTIER = "estimator.safetensors", "frontier.json"
KINDS: dict[str, type[Any]] = {
    "static": StaticIntensity,
    "confidence": ConfidenceEstimator,
    "confidence router": ConfidenceRouter,
    "preference": PreferenceEstimator,
}


@dataclass(frozen=True, eq=False)
class Stored:
    """What a directory holds.

    Attributes:
        estimator: None if there is none.
        presets: λ by name.
        frontier: what it was measured on, as `dami.evaluation.report.summary` says it; {} if nothing was.
    """

    estimator: Estimator | None = None
    presets: Mapping[str, float] = field(default_factory=dict)
    frontier: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: str | PathLike[str]) -> Stored:
        """Reads a directory.

        Raises:
            OSError: there is none.
            ValueError: it holds something else; the file is named.
        """
        directory = Path(directory)
        file = directory / SETTINGS
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            estimator = settings["estimator"] and _estimator(directory, **settings["estimator"])
            presets = {str(name): float(lam) for name, lam in settings["presets"].items()}
        except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{file} must hold an estimator's settings and presets: {error!r}") from error
        frontier = directory / FRONTIER
        return cls(estimator, presets, json.loads(frontier.read_text(encoding="utf-8")) if frontier.exists() else {})

    def save(self, directory: str | Path) -> Path:
        """Writes a directory, which is made if need be, and returns it.

        Raises:
            TypeError: an estimator of another kind, which only its own code could save.
        """
        directory = Path(directory)
        kind = next((kind for kind, cls in KINDS.items() if type(self.estimator) is cls), None)
        if self.estimator is not None and kind is None:
            raise TypeError(
                f"estimator must be one of dami's {sorted(KINDS)} to be saved, got {type(self.estimator).__name__}: "
                "take it off with dami.attach(model, None)"
            )
        directory.mkdir(parents=True, exist_ok=True)
        estimator: dict[str, Any] | None = None
        if isinstance(self.estimator, PreferenceEstimator):
            with written_file(directory / WEIGHTS) as file:
                save_file(dict(self.estimator.weights), file)
            estimator = {
                "kind": kind,
                **asdict(self.estimator),
                "budgets": [*map(list, self.estimator.budgets.items())],
            }
            del estimator["weights"]
        elif self.estimator is not None:
            estimator = {"kind": kind, **asdict(self.estimator)}  # type: ignore[call-overload]  # a dataclass, by KINDS
        if self.frontier:
            write_text(directory / FRONTIER, json.dumps(self.frontier, indent=1, ensure_ascii=False) + "\n")
        settings = {"estimator": estimator, "presets": dict(self.presets)}
        write_text(directory / SETTINGS, json.dumps(settings, indent=1) + "\n")  # last: it is what is looked for
        return directory


def copy_estimator(pair: Path, to: Path) -> None:
    """Copies the folder `intensity` of one pair's directory to another's, if there is one; records of sweeps stay."""
    for name in (SETTINGS, WEIGHTS, FRONTIER):
        if (pair / FOLDER / name).exists():
            (to / FOLDER).mkdir(exist_ok=True)
            shutil.copy(pair / FOLDER / name, to / FOLDER)


def _estimator(directory: Path, kind: str, **settings: Any) -> Estimator:
    if kind == "preference":
        settings |= {
            "intensities": tuple(settings["intensities"]),
            "features": Features(tuple(settings["features"]["layers"]), settings["features"]["trial"]),
            "budgets": {float(price): float(tokens) for price, tokens in settings["budgets"]},
            "weights": load_file(directory / WEIGHTS),
        }
    return KINDS[kind](**settings)
