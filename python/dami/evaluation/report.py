"""The report of a sweep: numbers, pictures, and every question with its answers at every λ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dami.evaluation.findings import Findings, verdict
from dami.evaluation.frontier import Frontier
from dami.evaluation.pages import render
from dami.evaluation.plots import Reached, curve_figure, curve_figures
from dami.evaluation.policies import Outcome, play
from dami.evaluation.statistics import Interval
from dami.evaluation.style import save, svg
from dami.evaluation.sweeps import Record
from dami.evaluation.tasks import TO_EVALUATE, Task, check_enough
from dami.files import write_text
from dami.prompts import text_of


def write_report(
    task: Task,
    records: Sequence[Record],
    directory: Path,
    about: Mapping[str, object],
    chosen: Sequence[float] | None = None,
) -> Frontier:
    """Writes frontier.json, frontier.png, frontier.svg and a self-contained report.html.

    Args:
        task: the task whose questions were answered.
        records: of the task's sweep.
        directory: created if missing.
        about: settings to show, such as the pair and the format.
        chosen: λ that an estimator chooses for every question of the task, if there is one.

    Raises:
        ValueError: fewer than 2 questions, because λ are chosen on one half and scored on the other.
    """
    check_enough(task, TO_EVALUATE)
    directory.mkdir(parents=True, exist_ok=True)
    frontier = Frontier.of(records)
    findings = Findings.of(frontier)
    outcome = None if chosen is None else _played(frontier, chosen)
    reached = [Reached("estimator", outcome.tokens, outcome.accuracy)] if outcome else []
    figure = curve_figure(frontier, f"{task.name}: {len(frontier)} questions, 95 % intervals", reached)
    for suffix in ("png", "svg"):
        save(figure, directory / f"frontier.{suffix}")
    about = {**about, "verifier": ", ".join(verifiers_of(task))}
    found = {**about, **findings.to_json()} | ({"estimator": asdict(outcome)} if outcome else {})
    write_text(directory / "frontier.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    page = render(
        "evaluation.html",
        {title: svg(figure) for title, figure in curve_figures(frontier, reached).items()},
        title=f"{task.name} over λ",
        findings=findings,
        said=_said(findings, outcome),
        about=about,
        questions=_questions(task, records, chosen),
    )
    write_text(directory / "report.html", page)
    return frontier


def summary(frontier: Frontier) -> dict[str, Any]:
    """Returns all that the report says about a frontier, ready for JSON."""
    return Findings.of(frontier).to_json()


def verifiers_of(task: Task) -> list[str]:
    """Returns the names of the verifiers that judge a task's answers."""
    return sorted({question.verifier for question in task.questions} - {""}) or [f"that of {task.name}"]


def _played(frontier: Frontier, chosen: Sequence[float]) -> Outcome:
    """Evaluates an estimator's λ, clipped to the measured range."""
    within = np.clip(np.asarray(chosen)[: len(frontier)], frontier.intensities[0], frontier.intensities[-1])
    return play(frontier, within)


def _said(findings: Findings, outcome: Outcome | None) -> dict[str, str]:
    """Describes in words what the numbers of single λ do not show."""
    best, (score, tokens), band = findings.best_static, findings.oracle, findings.transition
    said = {
        "best static λ": f"{best.intensity:g}, chosen on one half of the questions; on the other "
        f"{_percent(best.accuracy)} right with {best.tokens.value:.0f} tokens per answer",
        "each question at its own best λ": f"{score:.0%} right with {tokens:.0f} tokens per answer: an upper bound, "
        "which picks lucky samples too",
        "area under the frontier": f"{_percent(findings.hypervolume)}: the mean, over budgets of tokens, of the best "
        "accuracy within them",
        "thoughts appear": "at every λ alike" if band is None else f"from λ = {band[0]:.2f} to {band[1]:.2f}",
        "accuracy rises with λ": f"steps from λ to λ: {verdict(findings.monotone_accuracy)}",
        "tokens rise with λ": f"steps from λ to λ: {verdict(findings.monotone_tokens)}",
        "each λ pays more than its neighbours' chord": verdict(findings.convexity),
    }
    if outcome is not None:
        said["estimator"] = (
            f"{_percent(outcome.accuracy)} right with {outcome.tokens.value:.0f} tokens per answer; static λ reach "
            f"{_percent(outcome.static)} with as many: a gain of {_points(outcome.gain)}"
        )
    return said


def _percent(found: Interval) -> str:
    return f"{found.value:.0%} ({found.low:.0%} to {found.high:.0%})"


def _points(found: Interval) -> str:
    return "{:+.0f} ({:+.0f} to {:+.0f}) points".format(*(100 * each for each in found)).replace("-", "−")


@dataclass(frozen=True)
class AskedQuestion:
    """A question as shown on the page.

    Attributes:
        asked: the user's last message.
        answer, verifier: the right answer, and the verifier that judges by it.
        records: the answers, by increasing λ.
        chosen: λ that an estimator chose.
    """

    asked: str
    answer: str
    verifier: str
    records: Sequence[Record]
    chosen: float | None


def _questions(task: Task, records: Sequence[Record], chosen: Sequence[float] | None) -> list[AskedQuestion]:
    by_question: dict[int, list[Record]] = {}
    for record in records:
        by_question.setdefault(record.index, []).append(record)
    shown = []
    for index, said in sorted(by_question.items()):
        question = task.questions[index]
        said = sorted(said, key=lambda record: (record.intensity, record.sample))
        choice = None if chosen is None else round(chosen[index], 2)
        shown.append(AskedQuestion(text_of(question.question), question.answer, question.verifier, said, choice))
    return shown
