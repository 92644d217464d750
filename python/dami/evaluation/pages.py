"""HTML reports: templates and number formatting. A page is self-contained."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from textwrap import shorten
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dami.evaluation.plots import color
from dami.evaluation.statistics import Interval

Figures = Mapping[str, "str | Mapping[str, str]"]  # SVG elements by title, or by section and title


def render(template: str, figures: Figures, **values: object) -> str:
    """Renders a page.

    Args:
        template: name of a template in `templates`.
        figures: SVG elements that the template shows. Only these are not escaped.
        values: everything else that it shows.
    """
    return _environment().get_template(template).render(figures=_marked(figures), **values)


def _marked(figures: Figures) -> dict[str, Any]:
    return {name: Markup(each) if isinstance(each, str) else _marked(each) for name, each in figures.items()}


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dami.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": number,
        "span": span,
        "excerpt": excerpt,
        "badge": badge_style,
        "percent": percent,
    }
    return environment


def number(found: Interval | float, form: str = "{:.3g}") -> str:
    """Formats a number or an interval's estimate, with a format such as "{:.2f}". Zero has no sign."""
    text = form.format(found.value if isinstance(found, Interval) else found)
    return (text if float(text) else form.format(0.0)).replace("-", "−")


def percent(found: Interval) -> Interval:
    """Formats a share in percent."""
    return Interval(*(100 * each for each in found))


def span(found: Interval, form: str = "{:.3g}") -> str:
    """Formats the bounds of an interval."""
    return f"{number(found.low, form)} to {number(found.high, form)}"


def excerpt(text: str, width: int = 120) -> str:
    """Returns the beginning of a text on one line, cut between words. A word longer than the line is cut too."""
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    short = shorten(line, width, placeholder=" …", break_long_words=False)
    return short if len(short) > width // 2 else line[: width - 1] + "…"


def badge_style(intensity: float) -> str:
    """Returns the colours of a λ badge: its background and a readable text colour."""
    rgb = color(intensity)
    bright = sum(share * (channel / 255) ** 2.2 for share, channel in zip((0.2126, 0.7152, 0.0722), rgb, strict=True))
    return f"background: rgb{rgb}; color: {'black' if bright > 0.18 else 'white'}"
