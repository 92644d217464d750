"""What a sweep found, to look through: numbers, a picture, and every question with its answers at every λ."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dami.evaluation.frontier import Frontier, Step
from dami.evaluation.plots import color, save_curve
from dami.evaluation.policies import play
from dami.evaluation.sweeps import Record
from dami.evaluation.tasks import TO_EVALUATE, Task, check_enough
from dami.files import write_text

ICON = """<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>\
<circle cx='8' cy='8' r='7' fill='rgb(59,76,192)'/><path d='M8 1a7 7 0 0 1 0 14z' fill='rgb(180,4,38)'/></svg>">"""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
details { border-left: 3px solid #ddd; margin: .5rem 0; padding-left: .8rem; }
summary { cursor: pointer; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .5rem; overflow-wrap: anywhere; }
.right { color: #06752b; } .wrong { color: #b00020; }
.lam { color: white; border-radius: .3rem; padding: 0 .35rem; }
svg { max-width: 100%; height: auto; }
"""


def write_report(
    task: Task,
    records: Sequence[Record],
    directory: Path,
    about: dict[str, Any],
    chosen: Sequence[float] | None = None,
) -> Frontier:
    """Writes frontier.json, frontier.png, frontier.svg and report.html, which needs no other file.

    Args:
        task: whose questions were asked.
        records: of its sweep.
        directory: made if need be.
        about: settings to show, such as the pair and the format.
        chosen: λ that an estimator gives every question of the task, if there is one.

    Raises:
        ValueError: fewer than 2 questions, of which λ are chosen on one half and scored on the other.
    """
    check_enough(task, TO_EVALUATE)
    directory.mkdir(parents=True, exist_ok=True)
    frontier = Frontier.of(records)
    title = f"{task.name}: {len(frontier)} questions, 95 % intervals"
    for suffix in ("png", "svg"):
        save_curve(frontier, directory / f"frontier.{suffix}", title)
    found = about | summary(frontier)
    if chosen is not None:
        found["estimator"] = asdict(play(frontier, _within(frontier, chosen)))
    write_text(directory / "frontier.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_text(directory / "report.html", page(task, records, frontier, about, chosen))
    return frontier


def summary(frontier: Frontier) -> dict[str, Any]:
    """All that is said about a frontier, ready for JSON."""
    chosen_on, scored_on = frontier.halves()
    score, tokens = frontier.oracle()
    return {
        "questions": len(frontier),
        "points": [asdict(point) for point in frontier.points],
        "best static λ, chosen on one half and scored on the other": asdict(chosen_on.best_static(scored_on)),
        "per-question oracle, accuracy and tokens": [score, tokens],
        "hypervolume": frontier.hypervolume(),
        "transition band": frontier.transition(),
        "accuracy, from λ to λ": [asdict(step) for step in frontier.monotone_accuracy()],
        "tokens, from λ to λ": [asdict(step) for step in frontier.monotone_tokens()],
        "accuracy above the neighbours' chord": [asdict(step) for step in frontier.convexity()],
    }


def verdict(steps: Sequence[Step]) -> str:
    """Which steps are sure to go down: what refutes monotonicity, or convexity."""
    down = [f"{step.start:g} to {step.end:g}" for step in steps if step.change.high < 0]
    up = sum(step.change.low > 0 for step in steps)
    return f"{up} of {len(steps)} surely up, " + (f"surely down: {', '.join(down)}" if down else "none surely down")


def page(
    task: Task,
    records: Sequence[Record],
    frontier: Frontier,
    about: dict[str, Any],
    chosen: Sequence[float] | None = None,
) -> str:
    """The report as HTML."""
    picture = io.StringIO()
    save_curve(frontier, picture, f"{task.name}: {len(frontier)} questions, 95 % intervals")
    svg = picture.getvalue()
    rows = "".join(
        f"<tr><td>{_badge(p.intensity)}</td><td>{_percent(p.accuracy)}</td><td>{p.tokens.value:.0f} "
        f"({p.tokens.low:.0f} to {p.tokens.high:.0f})</td><td>{p.thinking:.0%}</td><td>{p.well_formed:.0%}</td></tr>"
        for p in frontier.points
    )
    chosen_on, scored_on = frontier.halves()
    best, (score, tokens) = chosen_on.best_static(scored_on), frontier.oracle()
    band = frontier.transition()
    facts = {
        **{key: str(value) for key, value in about.items()},
        "best static λ": f"{best.intensity:g}, chosen on one half; on the other {_percent(best.accuracy)} right, "
        f"{best.tokens.value:.0f} tokens",
        "per-question oracle": f"{score:.0%} right, {tokens:.0f} tokens: a bound, which picks lucky samples too",
        "hypervolume": str(frontier.hypervolume()),
        "thoughts appear": "everywhere alike" if band is None else f"from λ = {band[0]:.2f} to {band[1]:.2f}",
        "accuracy rises with λ": verdict(frontier.monotone_accuracy()),
        "tokens rise with λ": verdict(frontier.monotone_tokens()),
        "accuracy above its neighbours' chord": verdict(frontier.convexity()),
    }
    if chosen is not None:
        outcome = play(frontier, _within(frontier, chosen))
        facts["estimator"] = (
            f"{_percent(outcome.accuracy)} right, {outcome.tokens.value:.0f} tokens; static λ reach "
            f"{_percent(outcome.static)} with as many: gain {outcome.gain}"
        )
    listed = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    by_question: dict[int, list[Record]] = {}
    for record in records:
        by_question.setdefault(record.index, []).append(record)
    questions = "".join(
        _question(task, index, answers, None if chosen is None else chosen[index])
        for index, answers in sorted(by_question.items())
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(task.name)} over λ</title>'
        f"{ICON}<style>{STYLE}</style><h1>{html.escape(task.name)} over λ</h1>{svg[svg.index('<svg') :]}"
        "<table><tr><th>λ</th><th>right</th><th>tokens</th><th>with a thought</th><th>well formed</th></tr>"
        f"{rows}</table><table>{listed}</table><h2>Questions</h2>{questions}</html>\n"
    )


def _within(frontier: Frontier, chosen: Sequence[float]) -> NDArray[np.float64]:
    """λ that an estimator chose, of every question of a frontier, no further out than was measured."""
    return np.clip(np.asarray(chosen)[: len(frontier)], frontier.intensities[0], frontier.intensities[-1])


def _question(task: Task, index: int, answers: Sequence[Record], chosen: float | None) -> str:
    question = task.questions[index]
    asked = question.question if isinstance(question.question, str) else question.question[-1]["content"]
    marks = " ".join(_badge(record.intensity, record.score) for record in answers)
    said = "".join(
        f"<details><summary>{_badge(record.intensity, record.score)} {record.tokens} tokens: "
        f"{html.escape(record.text[:100] or 'no answer')}</summary>"
        f"<pre>{html.escape(record.thought)}</pre><pre>{html.escape(record.text)}</pre></details>"
        for record in answers
    )
    choice = "" if chosen is None else f"<p>The estimator's choice: {_badge(round(chosen, 2))}</p>"
    return (
        f"<details><summary>{marks} {html.escape(asked[:100])}</summary><pre>{html.escape(asked)}</pre>"
        f"<p>Wanted: {html.escape(question.answer)}</p>{choice}{said}</details>"
    )


def _badge(intensity: float, score: float | None = None) -> str:
    badge = f'<span class="lam" style="background:rgb{color(intensity)}">{intensity:g}</span>'
    if score is None:
        return badge
    return badge + (' <span class="right">✓</span>' if score >= 0.5 else ' <span class="wrong">✗</span>')


def _percent(interval: Any) -> str:
    return f"{interval.value:.0%} ({interval.low:.0%} to {interval.high:.0%})"
