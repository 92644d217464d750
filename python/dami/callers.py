"""The table of which callers take which kinds of intensity, and its error messages. Nothing here needs torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

AUTO = "auto"
TURN = "turn"  # a prompt_tail: from the last user message on
DEFAULT_INTENSITY = 0.0  # if none is given: the instruct end, under whose name a pair is served and saved

INTENSITY_KINDS = {  # as error messages name them
    "number": "a number",
    "numbers": "one per sequence",
    "preset": "a preset",
    "auto": "'auto'",
    "schedule": "a schedule",
    "parts": "a mapping of parts",
    "iterator": "an iterator",
}


@dataclass(frozen=True)
class Caller:
    """A function or command that takes an intensity.

    Attributes:
        name: its name as users write it.
        takes: the kinds of `INTENSITY_KINDS` that it takes.
        argument: the name of its argument for the intensity.
    """

    name: str
    takes: frozenset[str]
    argument: str = "intensity"

    @property
    def wanted(self) -> str:
        """The kinds that it takes, in words."""
        return listed(words for kind, words in INTENSITY_KINDS.items() if kind in self.takes)

    def check(self, kind: str, got: str | None = None) -> None:
        """Raises TypeError if it does not take a kind, saying what it takes and which callers take that kind."""
        if kind not in self.takes:
            others = listed((each.name for each in CALLERS.values() if kind in each.takes), "and")
            got = got or INTENSITY_KINDS[kind]
            whose = others if self.argument == "intensity" else f"the intensity of {others}"
            raise TypeError(f"{self.name} takes {self.wanted} as {self.argument}, got {got}, which is for {whose}")

    def preset(self, name: str, presets: Collection[str]) -> None:
        """Raises TypeError if it takes no presets, ValueError if there is no preset of this name."""
        self.check("preset", repr(name))
        if name not in presets:
            known = f"one of {sorted(presets)}" if presets else "a preset, of which the model has none,"
            choice = f"a number, {known} or 'auto'" if AUTO in self.takes else f"a number or {known}"
            raise ValueError(f"{self.argument} must be {choice.removesuffix(',')}, got {name!r}")

    def of_a_part(self) -> Caller:
        """Returns the caller for an intensity within a mapping of parts."""
        return replace(self, name=f"{self.name}, for a part,", takes=self.takes - {"parts", "iterator"})


def listed(words: Iterable[str], last: str = "or") -> str:
    """Joins words into a list for a sentence: 'a, b or c'."""
    *rest, end = words
    return f"{', '.join(rest)} {last} {end}" if rest else end


_ONE = frozenset({"number", "preset"})
_EACH = _ONE | {"numbers"}

CALLERS = {
    caller.name: caller
    for caller in (
        Caller("generate", _EACH | {"auto", "schedule", "parts", "iterator"}),
        Caller("forward", _EACH | {"parts"}),
        Caller("dami.intensity", _EACH | {"parts"}),
        Caller("dami.set_intensity", _EACH | {"parts"}),
        Caller("generate_batch", _EACH | {"auto"}),
        Caller("add_request", _ONE),
        Caller("add_requests", _EACH),
        Caller("dami.chat.ask", _EACH | {"auto"}),
        Caller("dami.twin", _EACH),
        Caller("dami.materialize", _ONE),
        Caller("dami generate", _ONE | {"auto"}),
        Caller("dami merge", _ONE),
        Caller("dami serve", _ONE | {"auto"}),
        Caller("vLLM", _ONE | {"auto"}),
    )
}
PROMPT = Caller("generate", _EACH | {"iterator"}, "prompt_intensity")


def from_text(text: str) -> float | str:
    """Parses an intensity from a command line: a finite number, the name of a preset, or "auto".

    Raises:
        ValueError: it is none of these.
    """
    if text.isidentifier() and text.lower() not in ("nan", "inf", "infinity"):
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"must be a finite number such as 0.5, got {text!r}")
    return value + 0.0  # no −0
