"""The report of a study: one page that needs nothing else, its pictures, and all numbers as JSON."""

from __future__ import annotations

import html
import io
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from dami.doctor import installed, machine
from dami.evaluation.path import Barrier, Similarity, between_neighbours
from dami.evaluation.plots import color
from dami.evaluation.report import ICON, STYLE
from dami.evaluation.statistics import Interval
from dami.evaluation.study import PathResult, Study
from dami.files import write_text, written_file

CONTROL_COLORS = ("#d9822b", "#7a4fa3", "#4c8c4a", "#8c564b")
SMALLEST = 1e-6  # distance from 1 that is drawn
TITLES = {
    "answer": "loss of the right answer",
    "instruct": "loss of the instruct end's answers",
    "thinking": "loss of the thinking end's answers",
    "both": "loss of both ends' answers",
    "error": "error",
}
NOTES = {
    "Path": "Loss is the cross-entropy of given texts, read teacher-forced, in nats per token: the task's "
    "answers, and what either end said itself; “both” is the mean of these two. A barrier is the most that a "
    "loss, or the share of wrong answers, lies above the straight line between its ends (dashed; Entezari et "
    "al.), or above their mean (Frankle et al.); the sag is the most that it lies below. As maxima, all three "
    "are raised by noise. λ below 0 and above 1 do not count for them.",
    "Representations": "Similarity of a layer's states at two λ, for the same tokens: debiased linear CKA, and "
    "the mean cosine. Any network changes continuously with λ, so what tells is how much of the change falls "
    "on one step, and how far that is from a control.",
    "Ablations": "“Only” a part: λ = 1 there and 0 elsewhere. “All but” a part: the other way round. What lies "
    "outside the layers, such as embeddings and the last norm, is in no third of them. A gain is the accuracy "
    "above the end that it starts from.",
}


def write_report(study: Study, directory: str | Path, about: Mapping[str, Any]) -> None:
    """Writes study.json, report.html, and every picture as PNG and SVG.

    Args:
        study: what was found.
        directory: made if need be.
        about: what to show of the run, such as the pair, versions and the command.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    svgs = {}
    for name, figure in figures(study):
        with written_file(directory / f"{name}.png") as file:
            figure.savefig(file, dpi=150)
        picture = io.StringIO()
        figure.savefig(picture, format="svg")
        svgs[name] = picture.getvalue()
        write_text(directory / f"{name}.svg", svgs[name])
    found = json.dumps({"about": dict(about), **asdict(study)}, indent=1, ensure_ascii=False)
    write_text(directory / "study.json", found + "\n")
    write_text(directory / "report.html", page(study, svgs, about))


def circumstances(model: PreTrainedModel, checkout: Path) -> dict[str, str]:
    """Date, device, versions and commit of a run; the commit is of a checkout, if it is one."""
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


def ways_of(study: Study) -> dict[str, PathResult]:
    """All paths by name, the pair's first."""
    return {
        "the pair": study.pair,
        **{f"control: {'/'.join(Path(name).parts[-2:])}": way for name, way in study.controls.items()},
    }


def figures(study: Study) -> Iterator[tuple[str, Any]]:
    """Names and pictures."""
    yield "path", draw_path(study)
    for measure, title in (("cka", "debiased linear CKA"), ("cosine", "mean cosine")):
        yield measure, draw_similarity(study, measure, title)
    yield "ablations", draw_ablations(study)


def _axes(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    for each in axes.flat:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_path(study: Study) -> Any:
    """Losses, accuracy, tokens and thoughts along every path, with intervals, and the chords between the ends."""
    figure, axes = _axes(2, 3, (12.5, 7), sharex=True)
    panels: list[tuple[str, Callable[[PathResult], list[Interval]], float]] = [
        *((f"{TITLES[kind]}, nats a token", lambda way, kind=kind: way.losses[kind], 1.0)
          for kind in ("answer", "instruct", "thinking")),
        ("right answers, %", lambda way: way.accuracy, 100.0),
        ("tokens per answer", lambda way: way.tokens, 1.0),
        ("answers with a thought, %", lambda way: way.thoughts, 100.0),
    ]  # fmt: skip
    for place, (panel, (title, values_of, scale)) in enumerate(zip(axes.flat, panels, strict=True)):
        for end in (0, 1):
            panel.axvline(end, color="0.85", lw=1, zorder=0)
        for (name, way), shade in zip(ways_of(study).items(), _shades(study), strict=True):
            values = scale * np.array(values_of(way))
            panel.plot(way.intensities, values[:, 0], "o-", color=shade, ms=3, lw=1.4, label=name)
            panel.fill_between(way.intensities, values[:, 1], values[:, 2], color=shade, alpha=0.15, lw=0)
            if place < 4:
                ends = [values[way.intensities.index(end), 0] for end in (0.0, 1.0)]
                panel.plot([0, 1], ends, "--", color=shade, lw=1, alpha=0.7)
        panel.set_title(title, fontsize=10)
        panel.set_ylim(bottom=0)
    for panel in axes[1]:
        panel.set_xlabel("intensity λ")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{study.task}: {study.questions} questions, bands hold 95 %")
    return figure


def _shades(study: Study) -> list[str]:
    return ["0.2", *(CONTROL_COLORS[i % len(CONTROL_COLORS)] for i in range(len(study.controls)))]


def draw_similarity(study: Study, measure: str, title: str) -> Any:
    """How far a measure of `Similarity` falls short of 1, to both ends and between neighbours, a line for a layer."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    ways = ways_of(study)
    figure, axes = _axes(3, len(ways), (1.5 + 4 * len(ways), 9), sharex=True, sharey="row")
    depth = max(each.layer for each in study.pair.similarity)
    scale: Any = ScalarMappable(Normalize(0, max(depth, 1)), colormaps["viridis"])
    for column, (name, way) in enumerate(ways.items()):
        axes[0, column].set_title(name, fontsize=10)
        for layer in range(depth + 1):
            found = [each for each in way.similarity if each.layer == layer]
            for row, end in enumerate((0.0, 1.0)):
                _line(axes[row, column], _to_end(found, end), measure, scale.to_rgba(layer))
            steps = set(zip(way.intensities, way.intensities[1:], strict=False))
            neighbours = [each for each in found if (each.intensity, each.other) in steps]
            middles = {(each.intensity + each.other) / 2: each for each in neighbours}
            _line(axes[2, column], middles, measure, scale.to_rgba(layer))
        axes[2, column].set_xlabel("intensity λ")
    for row, what in enumerate(("with λ = 0", "with λ = 1", "from λ to the next")):
        axes[row, 0].set_ylabel(f"1 − {title}\n{what}")
        axes[row, 0].set_yscale("log")
        for panel in axes[row]:
            panel.minorticks_off()
    figure.colorbar(scale, ax=axes, label="layer; 0 is the embeddings", aspect=50, shrink=0.6)
    return figure


def _to_end(found: Sequence[Similarity], end: float) -> dict[float, Similarity]:
    """Similarities with an end, by the other λ."""
    return {each.intensity: each for each in found if each.other == end}


def _line(panel: Any, by_lam: Mapping[float, Similarity], measure: str, shade: Any) -> None:
    lams = sorted(by_lam)
    values = np.maximum(1 - np.array([getattr(by_lam[lam], measure) for lam in lams]), SMALLEST)
    panel.plot(lams, values[:, 0], ".-", color=shade, lw=1, ms=3)
    panel.fill_between(lams, values[:, 1], values[:, 2], color=shade, alpha=0.12, lw=0)


def _rows(study: Study) -> list[tuple[str, dict[str, Interval]]]:
    """The ends and the ablations, each end before those that start from it."""
    rows = []
    for end, start in ((0.0, "only"), (1.0, "all but")):
        at = study.pair.intensities.index(end)
        columns = {
            "accuracy": study.pair.accuracy,
            "tokens": study.pair.tokens,
            "thoughts": study.pair.thoughts,
            "well_formed": study.pair.well_formed,
            "loss": study.pair.losses["thinking"],
        }
        rows.append((f"λ = {end:g}", {name: values[at] for name, values in columns.items()}))
        rows += [(each.name, vars(each)) for each in study.ablations if each.name.startswith(start)]
    return rows


def draw_ablations(study: Study) -> Any:
    """Accuracy, tokens and thoughts of every ablation, with intervals, between lines that mark the ends."""
    rows = _rows(study)
    figure, axes = _axes(1, 3, (12.5, 1 + 0.32 * len(rows)), sharey=True)
    columns = {"accuracy": "right answers, %", "tokens": "tokens per answer", "thoughts": "answers with a thought, %"}
    for panel, (column, title) in zip(axes.flat, columns.items(), strict=True):
        for place, (name, values) in enumerate(rows):
            value, low, high = (number * (100 if title.endswith("%") else 1) for number in values[column])
            reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
            shade = tuple(c / 255 for c in color(0.0 if name == "λ = 0" or name.startswith("only") else 1.0))
            mark = "D" if name.startswith("λ") else "o"
            panel.errorbar(value, -place, xerr=reach, fmt=mark, ms=5, color=shade, elinewidth=1)
            if name.startswith("λ"):
                panel.axvline(value, color=shade, lw=1, ls="--", alpha=0.5)
        panel.set_title(title, fontsize=10)
    axes[0, 0].set_yticks([-place for place in range(len(rows))], [name for name, _ in rows])
    return figure


def page(study: Study, svgs: Mapping[str, str], about: Mapping[str, Any]) -> str:
    """The report as HTML."""
    title = f"From end to end: {study.task}"
    pictures = {name: svg[svg.index("<svg") :] for name, svg in svgs.items()}
    facts = [(key, str(value)) for key, value in {**about, "questions": study.questions}.items()]
    if study.permuted:
        facts.append(("permuted for the control", ", ".join(study.permuted)))
    sections = {
        "Path": pictures["path"] + _barriers(study),
        "Representations": _layers(study) + pictures["cka"] + pictures["cosine"],
        "Ablations": pictures["ablations"] + _ablations(study),
    }
    body = "".join(f"<h2>{name}</h2><p>{NOTES[name]}</p>{text}" for name, text in sections.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"{ICON}<style>{STYLE}</style><h1>{html.escape(title)}</h1>{_table((), facts)}{body}</html>\n"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "<tr>" + "".join(f"<th>{html.escape(each)}</th>" for each in heads) + "</tr>" if heads else ""
    body = "".join(
        f"<tr><th>{html.escape(first)}</th>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for first, *cells in rows
    )
    return f"<table>{head}{body}</table>"


def _barriers(study: Study) -> str:
    def cells(found: Barrier, share: bool) -> list[str]:
        heights = (_told(each, share) for each in (found.height, found.above_mean, found.sag))
        height, above_mean, sag = heights
        return [height, f"{found.at:g}" if found.height.value > 0 else "–", above_mean, sag]

    rows = [
        (f"{name}: {TITLES[kind]}", *cells(found, kind == "error"))
        for name, way in ways_of(study).items()
        for kind, found in way.barriers.items()
    ]
    return _table(("", "barrier", "at λ", "above the ends' mean", "sag"), rows)


def _layers(study: Study) -> str:
    """For every layer the ends' similarity, and the least between neighbours."""
    rows = []
    for name, way in ways_of(study).items():
        for layer in sorted({each.layer for each in way.similarity}):
            found = [each for each in way.similarity if each.layer == layer]
            steps = between_neighbours(found, way.intensities)
            ends = _to_end(found, 1.0)[0.0]
            cells = [f"{name}: layer {layer}"]
            for measure in ("cka", "cosine"):
                least = min(steps, key=lambda each: getattr(each, measure).value)
                cells += [
                    _close(getattr(ends, measure)),
                    f"{_close(getattr(least, measure))}, {least.intensity:g} to {least.other:g}",
                ]
            rows.append(cells)
    heads = ("", "CKA of the ends", "least CKA of neighbours", "cosine of the ends", "least cosine of neighbours")
    return _table(heads, rows)


def _ablations(study: Study) -> str:
    rows = []
    for name, values in _rows(study):
        gain, more = values.get("gain"), values.get("more_tokens")
        rows.append(
            (
                name,
                _told(values["accuracy"], True),
                _told(gain, True) if gain else "",
                f"{values['tokens'].value:.0f} ({values['tokens'].low:.0f} to {values['tokens'].high:.0f})",
                f"{more.value:+.0f} ({more.low:+.0f} to {more.high:+.0f})" if more else "",
                _told(values["thoughts"], True),
                _told(values["well_formed"], True),
                _told(values["loss"], False),
            )
        )
    heads = (
        "",
        "right",
        "gain",
        "tokens",
        "more tokens",
        "with a thought",
        "well formed",
        "loss of thinking's answers",
    )
    return _table(heads, rows)


def _told(found: Interval, share: bool) -> str:
    form = "{:.0%} ({:.0%} to {:.0%})" if share else "{:.3f} ({:.3f} to {:.3f})"
    return form.format(*found)


def _close(found: Interval) -> str:
    """A number near 1, with the digits that differ from it."""
    return "{:.5f} ({:.5f} to {:.5f})".format(*found)
