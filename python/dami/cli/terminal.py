"""Renders answers, costs and parameters for the terminal; the curve is in `plots`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from dami.chat import Answer, ChatTemplate, answers_of, ask, check_variables, encode, numbers_of
from dami.estimators.files import StoredIntensity
from dami.evaluation.calibration import Calibration
from dami.evaluation.frontier import Point
from dami.evaluation.plots import color
from dami.evaluation.policies import Outcome
from dami.evaluation.tails import Tails
from dami.evaluation.tuning import Tuned
from dami.layers.describe import Description, ParameterRow
from dami.prompts import Prompt, text_of
from dami.tables import FittedTable
from dami.thoughts import Reader

LAYER = re.compile(r"\.(\d+)\.")
NARROWEST = 20  # fewest columns in which an answer is readable


def style_of(intensity: float) -> str:
    """Returns the colour of a λ, the same as in the plots."""
    return "rgb({},{},{})".format(*color(intensity))


def fold(text: Text, console: Console, width: int, lines: int, tail: bool = False) -> Text:
    """Wraps `text` to `width` and cuts it to `lines` lines: leaves out the middle, or with `tail` the beginning."""
    wrapped = text.wrap(console, width)
    hidden = len(wrapped) - lines + 1
    if hidden <= 1:
        return Text("\n").join(wrapped)
    head = 0 if tail else (lines - 1) // 2
    note = Text(f"… {hidden} more lines …", style="dim")
    return Text("\n").join([*wrapped[:head], note, *wrapped[head + hidden :]])


def side_by_side(
    answers: Sequence[Answer],
    console: Console,
    title: str | None = None,
    verdicts: Sequence[bool] | None = None,
    lines: int = 7,
    tail: bool = False,
    names: Sequence[str] = (),
) -> RenderableType:
    """Shows the answers to one prompt in columns: λ, tokens, right or wrong, the thought dimmed and folded, the answer.

    Where the console shows no styles, thought and answer are labelled.

    Args:
        answers: one per λ.
        console: where to print; sets the width.
        title: title of the frame.
        verdicts: whether each answer is right, if known.
        lines: number of lines to fold a thought to.
        tail: keep the end of a long thought instead of both ends, for thoughts still being generated.
        names: what to put before each λ, if anything, such as how it was chosen.
    """
    thinks = any(answer.thought for answer in answers)
    labels = ("thought: ", "answer: ") if thinks and not console.is_terminal else ("", "")  # without styles
    inside = console.width - 4
    per_line = max(1, min(len(answers), inside // (NARROWEST + 2)))
    width = (inside - 2 * (per_line - 1)) // per_line
    tables = []
    for start in range(0, len(answers), per_line):
        table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        heads, thoughts, ends = [], [], []
        for place, answer in enumerate(answers[start : start + per_line], start):
            table.add_column(width=width)
            named = f"{names[place]} " if names and names[place] else ""
            head = Text(f"{named}λ={answer.intensity:g}", style=f"bold {style_of(answer.intensity or 0)}")
            if verdicts is not None:
                head.append(*(("  ✓", "bold green") if verdicts[place] else ("  ✗", "bold red")))
            heads.append(head.append(f"  {answer.tokens} tokens", "not bold dim"))
            thought = Text(labels[0] + answer.thought, style="dim italic")
            thoughts.append(fold(thought, console, width, lines, tail) if answer.thought else Text("no thought", "dim"))
            end = Text(labels[1] + answer.text, style="bold")
            ends.append(end if answer.text else Text("…" if tail else "no answer", "dim"))
        for row in (heads, thoughts, ends) if thinks else (heads, ends):
            table.add_row(*row)
        tables.append(table)
    parts: list[RenderableType] = [Text(text_of(answers[0].prompt).strip(), style="bold"), Text()]
    for table in tables:
        parts += [table, Text()]
    return Panel(Group(*parts[:-1]), title=title, title_align="left", box=box.ROUNDED, border_style="dim")


def size(nbytes: float) -> str:
    """Returns a number of bytes in readable form: 3.4 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    intensities: Sequence[float | str],
    chat_template: ChatTemplate | None,
    console: Console,
    **options: Any,
) -> None:
    """Answers one prompt and shows tokens as they come: plain text for one λ, columns for several."""
    prompts = [prompt] * len(intensities)
    if len(intensities) == 1:
        written = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ask(model, tokenizer, prompts, intensities, chat_template, streamer=written, **options)
        return
    variables = options.get("chat_template_kwargs") or {}
    check_variables(tokenizer, chat_template, variables)
    lams = numbers_of(model, tokenizer, prompts, intensities, chat_template, **variables)
    rows, reader = RowStreamer(), Reader.of(tokenizer)
    texts, _ = encode(tokenizer, prompts, chat_template, lams, **variables)

    def columns() -> RenderableType:
        ids = torch.stack(rows.steps[1:], 1) if len(rows.steps) > 1 else torch.empty(len(prompts), 0, dtype=torch.int64)
        answers = answers_of(model, reader, ids, prompts, lams, texts)
        return side_by_side(answers, console, lines=max(4, console.height - 12), tail=True)

    with Live(get_renderable=columns, console=console, refresh_per_second=8):
        ask(model, tokenizer, prompts, lams, chat_template, streamer=rows, **options)


class RowStreamer:
    """A streamer for many rows. Keeps what `generate` passes it: first the prompts, then the tokens of each step."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.steps.append(tokens)

    def end(self) -> None:
        pass


def parameters(description: Description) -> RenderableType:
    """Returns a table of all parameters, with alike layers in one row, and the pair's size against merged copies."""
    alike: dict[ParameterRow, list[tuple[int, ParameterRow]]] = {}
    for row in description.rows:
        number = LAYER.search(row.name)
        common = replace(row, name=LAYER.sub(".{}.", row.name, count=1))
        alike.setdefault(common, []).append((int(number[1]) if number else 0, row))
    lines = []
    for pattern, rows in alike.items():
        name = pattern.name.format(runs([layer for layer, _ in rows]))
        ends = f"{pattern.format or 'identical'} {pattern.dtype}"
        weight = f"{sum(row.nbytes for _, row in rows):,}"
        if pattern.tied_to:
            name, weight = f"{name} = {pattern.tied_to}", "tied"
        lines.append((name, pattern.kind, "×".join(map(str, pattern.shape)), ends, weight))
    table = FittedTable(("parameter", "kind", "shape", "ends", "bytes"), lines, left=4, breaks=".")
    one = sum(math.prod(r.shape) * getattr(torch, r.dtype).itemsize for r in description.rows if not r.tied_to)
    pair = description.nbytes
    total = Text(f"{len(description.rows)} parameters, {sum(r.interpolated for r in description.rows)} interpolated. ")
    total.append(f"This pair: {size(pair)}, {pair / one:.2f}× one model, at any number of λ. ", "bold")
    total.append(f"Merged copies: {size(one)} for each λ, {size(3 * one)} for 3, {size(11 * one)} for 11.")
    return Group(table, Text(), total)


def runs(numbers: Sequence[int]) -> str:
    """Abbreviates increasing integers: 0-5,7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def point_table(points: Sequence[Point], title: Text | None = None) -> FittedTable:
    """Returns a table with one row per λ: accuracy and tokens, with their intervals."""
    rows = [
        (
            Text(f"{p.intensity:g}", f"bold {style_of(p.intensity)}"),
            f"{p.accuracy.value:.0%}",
            f"{p.accuracy.low:.0%} to {p.accuracy.high:.0%}",
            f"{p.tokens.value:.0f}",
            f"{p.tokens.low:.0f} to {p.tokens.high:.0f}",
        )
        for p in points
    ]
    return FittedTable(("λ", "right", "95 % interval", "tokens", "95 % interval"), rows, title=title)


def tail_table(found: Tails) -> FittedTable:
    """Returns a table with one row per tail: accuracy and tokens at every λ, and what the tail costs."""
    lams = list(dict.fromkeys(point.intensity for point in found.points))
    tails = list(dict.fromkeys(point.tail for point in found.points))
    rows = []
    for tail in tails:
        at = [point for point in found.points if point.tail == tail]
        lost = ("", "") if tail is None else map(str, found.losses[tail])
        cells = [f"{point.accuracy.value:.0%} @ {point.tokens.value:.0f}" for point in at]
        rows.append(("all" if tail is None else str(tail), *cells, *lost))
    farthest = max(lams, key=lambda lam: abs(lam - found.prompt_intensity))
    heads = ("tail", *(f"λ={lam:g}" for lam in lams), "worth lost", f"accuracy lost at λ={farthest:g}")
    return FittedTable(heads, rows)


def tuned_table(found: Tuned) -> FittedTable:
    """Returns a table with one row per way to answer, on the questions held out from the search."""
    heads = ("way", "accuracy", "tokens", "gain over single λ")
    ways = sorted(found.finalists, key=lambda each: each.tokens.value)
    return FittedTable(heads, [(w.way.name, str(w.accuracy), str(w.tokens), str(w.gain)) for w in ways])


def health_table(found: Calibration) -> FittedTable:
    """Returns a table with one row per λ of a calibration. Marks the usable λ."""
    heads = ("λ", "comes to its end", "thinks", "tokens", "as most answers say", "95 % interval")
    rows = [
        (
            Text(f"{p.intensity:g}", f"bold {style_of(p.intensity)}"),
            f"{p.well_formed:.0%}",
            f"{p.thinking:.0%}",
            f"{p.tokens.value:.0f}",
            f"{p.accuracy.value:.0%}",
            f"{p.accuracy.low:.0%} to {p.accuracy.high:.0%}",
        )
        for p in found.points
    ]
    usable = frozenset(place for place, point in enumerate(found.points) if point.intensity in found.usable)
    return FittedTable(heads, rows, marked=usable)


def outcome_table(outcomes: Mapping[float, Outcome], price: float) -> FittedTable:
    """Returns a table with one row per price of a token: what an estimator reaches. Marks its own price."""
    heads = ("price", "right", "tokens", "one λ for all, as many tokens", "gain, points", "95 % interval")
    rows = [
        (
            f"{each:g}",
            f"{outcome.accuracy.value:.0%}",
            f"{outcome.tokens.value:.0f}",
            f"{outcome.static.value:.0%}",
            f"{100 * outcome.gain.value:+.1f}",
            f"{100 * outcome.gain.low:+.1f} to {100 * outcome.gain.high:+.1f}",
        )
        for each, outcome in outcomes.items()
    ]
    return FittedTable(heads, rows, marked=frozenset(i for i, each in enumerate(outcomes) if each == price))


def verdict(outcome: Outcome, price: float, questions: int) -> str:
    """Says whether choosing λ pays, by what an estimator reaches at its price on so many questions held out."""
    gain = outcome.gain
    found = "It pays" if gain.low > 0 else "It costs accuracy" if gain.high < 0 else "No gain that so many can show"
    points = f"{100 * gain.value:+.1f} points against one λ for all with as many tokens"
    return f"{found}: on {questions} questions held out, at price {price:g}, {points}."


def stored_at(output: Path, stored: StoredIntensity, price: float) -> str:
    """Says what a directory now holds, and how it is used."""
    presets = ", ".join(f"{name} λ={lam:g}" for name, lam in stored.presets.items())
    return (
        f"{output}: an estimator at price {price:g}; {presets}. To use it, dami.attach(model, {str(output)!r}), "
        "or copy it into the packed pair or the thinking end's directory as a folder named intensity."
    )
