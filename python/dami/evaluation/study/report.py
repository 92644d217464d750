"""The report of a study: one self-contained page, its pictures, and all numbers as JSON."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from transformers import PreTrainedModel

from dami.doctor import installed, machine
from dami.evaluation.pages import render
from dami.evaluation.path import Similarity, between_neighbours
from dami.evaluation.study.figures import TEXTS, ends_and_ablations, paths_of, pictures
from dami.evaluation.study.results import Ablation, PathResult, Study
from dami.evaluation.style import save, svg
from dami.files import write_text


def write_study_report(study: Study, directory: str | Path, about: Mapping[str, str]) -> None:
    """Writes study.json, report.html, and every picture as PNG and SVG.

    Args:
        study: the results.
        directory: created if missing.
        about: details of the run to show, such as the pair, versions and the command.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shown = pictures(study)
    for name, picture in shown.items():
        figure = picture.together()
        for suffix in ("png", "svg"):
            save(figure, directory / f"{name}.{suffix}")
    found = json.dumps({"about": dict(about), **asdict(study)}, indent=1, ensure_ascii=False)
    write_text(directory / "study.json", found + "\n")
    page = render(
        "study.html",
        {name: {title: svg(figure) for title, figure in picture.apart().items()} for name, picture in shown.items()},
        title=f"From end to end: {study.task}",
        study=study,
        paths=paths_of(study),
        texts=TEXTS,
        steps={name: worst_step(path) for name, path in paths_of(study).items()},
        layers={name: list(layers_of(path)) for name, path in paths_of(study).items()},
        most=most_of(study),
        rows=ends_and_ablations(study),
        about=about,
    )
    write_text(directory / "report.html", page)


def circumstances(model: PreTrainedModel, checkout: Path) -> dict[str, str]:
    """Returns date, device and versions of a run, and the commit if the code is a checkout."""
    commit = "unknown"
    if (checkout / ".git").exists():
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=checkout, capture_output=True, text=True).stdout.strip() or commit
    facts = machine()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": facts["GPU"] if model.device.type == "cuda" else facts["CPU"],
        "versions": ", ".join(f"{package} {version}" for package, version in installed().items()),
        "commit": commit,
    }


@dataclass(frozen=True)
class Layer:
    """The change of a layer's states along a path.

    Attributes:
        layer: 0 is the embeddings.
        ends: similarity between λ = 0 and 1.
        cka, cosine: the least similar pair of neighbouring λ by each measure.
    """

    layer: int
    ends: Similarity
    cka: Similarity
    cosine: Similarity


def layers_of(path: PathResult) -> Iterator[Layer]:
    """Returns all layers of a path, from the embeddings up."""
    for layer in sorted({each.layer for each in path.similarity}):
        found = [each for each in path.similarity if each.layer == layer]
        steps = between_neighbours(found, path.intensities)
        ends = next(each for each in found if (each.intensity, each.other) == (0.0, 1.0))
        yield Layer(
            layer, ends, min(steps, key=lambda each: each.cka.value), min(steps, key=lambda each: each.cosine.value)
        )


def worst_step(path: PathResult) -> Layer:
    """Returns the layer with the least similarity between neighbouring λ, by CKA."""
    return min(layers_of(path), key=lambda layer: layer.cka.cka.value)


def most_of(study: Study) -> dict[str, Ablation]:
    """Returns the part that alone adds most accuracy, and the one whose absence costs most, if there are parts."""
    only = [each for each in study.ablations if each.name.startswith("only")]
    without = [each for each in study.ablations if each.name.startswith("all but")]
    if not only:
        return {}
    return {
        "only": max(only, key=lambda each: each.gain.value),
        "all but": min(without, key=lambda each: each.gain.value),
    }
