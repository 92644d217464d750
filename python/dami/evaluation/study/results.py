"""Results of a study, with intervals: of paths between two models, and of parts of the pair."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dami.evaluation.path import Barrier, Similarity, barrier, similarities
from dami.evaluation.statistics import Array, Interval, Places, bootstrap, proportions
from dami.evaluation.study.answers import Trial
from dami.evaluation.study.reading import TeacherForced
from dami.evaluation.study.settings import Setting

TEXTS = ("answer", "instruct", "thinking")
COLUMNS = ("score", "tokens", "thought", "well_formed")


@dataclass(frozen=True)
class PathResult:
    """Results along a path between two models.

    Attributes:
        intensities: L increasing λ, including 0 and 1.
        accuracy, tokens, thoughts, well_formed: of the answers at every λ. All but tokens are shares.
        losses: nats per token at every λ, by kind of text.
        barriers: of each loss, and of the "error", 1 − accuracy.
        similarity: between states at neighbouring λ, and with both ends, by layer.
    """

    intensities: tuple[float, ...]
    accuracy: list[Interval]
    tokens: list[Interval]
    thoughts: list[Interval]
    well_formed: list[Interval]
    losses: dict[str, list[Interval]]
    barriers: dict[str, Barrier]
    similarity: list[Similarity]


@dataclass(frozen=True)
class Ablation:
    """Results with one part of the model at another λ than the rest.

    Attributes:
        name: such as "only MLP": λ = 1 there and 0 elsewhere; "all but MLP" is the reverse.
        accuracy, tokens, thoughts, well_formed: of the answers. All but tokens are shares.
        loss: nats per token of the thinking end's own texts.
        gain: accuracy relative to the end that it starts from, λ = 0 for "only" and λ = 1 for "all but".
        more_tokens: the same for tokens.
    """

    name: str
    accuracy: Interval
    tokens: Interval
    thoughts: Interval
    well_formed: Interval
    loss: Interval
    gain: Interval
    more_tokens: Interval


@dataclass(frozen=True)
class Study:
    """All results of a study.

    Attributes:
        task, questions: the task's name, and the number of questions.
        pair: the path between the pair's ends.
        controls: paths from the instruct end to other models, by name.
        permuted: the modules whose neurons or heads were permuted, by name of the control.
        ablations: of the pair.
    """

    task: str
    questions: int
    pair: PathResult
    controls: dict[str, PathResult]
    permuted: list[str]
    ablations: list[Ablation]


def read_study(path: str | Path) -> Study:
    """Loads a study from its report's `study.json`."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    return Study(
        found["task"],
        found["questions"],
        _path_of(found["pair"]),
        {name: _path_of(control) for name, control in found["controls"].items()},
        found["permuted"],
        [Ablation(**_intervals(each)) for each in found["ablations"]],
    )


def _path_of(found: dict[str, Any]) -> PathResult:
    barriers = {kind: Barrier(**_intervals(each)) for kind, each in found.pop("barriers").items()}
    similarity = [Similarity(**_intervals(each)) for each in found.pop("similarity")]
    lams = tuple(found.pop("intensities"))
    losses = {kind: [Interval(*each) for each in values] for kind, values in found.pop("losses").items()}
    shares = {name: [Interval(*each) for each in values] for name, values in found.items()}
    return PathResult(intensities=lams, losses=losses, barriers=barriers, similarity=similarity, **shares)


def _intervals(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Restores intervals, which JSON stores as lists."""
    return {name: Interval(*value) if isinstance(value, list) else value for name, value in fields.items()}


def _tables(settings: Sequence[Setting], trials: Sequence[Trial]) -> dict[str, Array]:
    """Returns tables of the values of all trials, [questions, settings] each."""
    at = {setting.name: place for place, setting in enumerate(settings)}
    shape = (1 + max(trial.index for trial in trials), len(settings))
    tables = {name: np.zeros(shape) for name in COLUMNS}
    for trial in trials:
        if trial.setting in at:
            for name, table in tables.items():
                table[trial.index, at[trial.setting]] = getattr(trial, name)
    return tables


def path_result(
    lams: tuple[float, ...],
    trials: Sequence[Trial],
    reading: TeacherForced,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> PathResult:
    """Computes the results along a path.

    Args:
        lams: L increasing λ, including 0 and 1.
        trials: answers at these λ, and possibly in other settings.
        reading: of texts, with these λ first.
        on_layer: called with the number of compared layers and their total.
    """
    tables = _tables([Setting(lam) for lam in lams], trials)
    count = len(tables["score"])
    here = slice(len(lams))  # the path's λ come first

    def loss(kind: str) -> Callable[[Places | slice], Array]:
        return lambda rows: reading.loss(kind, rows)[here]

    kinds = (*TEXTS, "both")
    barriers = {kind: barrier(lams, loss(kind), count) for kind in kinds}
    barriers["error"] = barrier(lams, lambda rows: 1 - tables["score"][rows].mean(0), count)
    similarity = []
    for layer, states in enumerate(reading.states):
        similarity += similarities(layer, states.double().numpy(), reading.questions, lams)
        on_layer(layer + 1, len(reading.states))
    return PathResult(
        lams,
        *_summaries(tables),
        {kind: bootstrap(loss(kind), count) for kind in kinds},
        barriers,
        similarity,
    )


def _summaries(tables: Mapping[str, Array]) -> tuple[list[Interval], list[Interval], list[Interval], list[Interval]]:
    """Returns accuracy, tokens, thoughts and well-formed answers in every setting."""
    scores, tokens, thoughts, well_formed = (tables[name] for name in COLUMNS)
    return proportions(scores), _means(tokens), proportions(thoughts), proportions(well_formed)


def _means(table: Array) -> list[Interval]:
    return bootstrap(lambda rows: table[rows].mean(0), len(table))


def ablations(settings: Sequence[Setting], trials: Sequence[Trial], reading: TeacherForced) -> list[Ablation]:
    """Computes the effect of every part, from answers and readings in all settings."""
    tables = _tables(settings, trials)
    ends = np.array([settings.index(Setting(each.intensity if each.part else 0.0)) for each in settings])
    columns = [*_summaries(tables)]
    columns.append(bootstrap(lambda rows: reading.loss("thinking", rows), len(tables["score"])))
    columns += [_means(tables[name] - tables[name][:, ends]) for name in ("score", "tokens")]
    return [
        Ablation(setting.name, *values)
        for setting, *values in zip(settings, *columns, strict=True)
        if setting.part is not None
    ]
