"""How the prompt of a request is read: at which λ, and from where on at that of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dami.callers import AUTO, CALLERS, TURN
from dami.dial.values import Intensity
from dami.generation.reading import TAIL
from dami.serving.protocol import SAME, BadRequest, ChatRequest, CompletionRequest

CALLER = replace(CALLERS["dami serve"], argument="prompt_intensity", takes=CALLERS["dami serve"].takes - {AUTO})


@dataclass(frozen=True)
class PromptReading:
    """How a prompt is read.

    Attributes:
        intensity: λ of the prompt before its tail; None for that of the answer.
        tail: tokens at the end of the prompt that are read at the λ of the answer; "turn" for all from the text of the
            last user message on.
    """

    intensity: float | None
    tail: int | str


def default_reading(intensity: float | str, tail: int | str, presets: Mapping[str, float]) -> PromptReading:
    """Returns how prompts are read whose requests say nothing about it.

    Raises:
        TypeError, ValueError: the intensity is not a number, a preset or "same"; or the tail is not an integer of at
            least 0 or "turn".
    """
    if tail != TURN and (isinstance(tail, (bool, str)) or not isinstance(tail, int) or tail < 0):
        raise ValueError(f"prompt_tail must be an integer of at least 0, or {TURN!r}, got {tail!r}")
    lam = None if intensity == SAME else Intensity.parse(intensity, CALLER, presets).one
    return PromptReading(lam, tail)


def reading_of(
    body: ChatRequest | CompletionRequest,
    default: PromptReading,
    presets: Mapping[str, float],
    allowed: tuple[float, float],
) -> PromptReading:
    """Returns how a request's prompts are read.

    Args:
        body: the request.
        default: for what it leaves out. A text has no turns, so a tail of "turn" is `TAIL` there.
        presets: λ by name.
        allowed: lowest and highest λ that a request may ask for.

    Raises:
        BadRequest: it asks for what this server or this pair does not have.
    """
    lam, tail = default.intensity, default.tail
    if body.prompt_intensity == SAME:
        lam = None
    elif body.prompt_intensity is not None:
        try:
            lam = Intensity.parse(body.prompt_intensity, CALLER, presets).one
        except (TypeError, ValueError) as problem:
            raise BadRequest(f"{problem} ({SAME!r} means that of the answer)", "prompt_intensity") from problem
        if not allowed[0] <= lam <= allowed[1]:
            bounds = f"{allowed[0]:g} to {allowed[1]:g}"
            raise BadRequest(
                f"prompt_intensity must be in {bounds} on this server, got {body.prompt_intensity}", "prompt_intensity"
            )
    if lam is None and body.prompt_tail is not None:
        raise BadRequest(
            "prompt_tail says where prompt_intensity ends, which is that of the answer: give prompt_intensity, or "
            "leave out prompt_tail",
            "prompt_tail",
        )
    if isinstance(body, CompletionRequest):
        tail = TAIL if tail == TURN else tail
        if body.prompt_tail == TURN:
            raise BadRequest("prompt_tail must be a number for a text, which has no turns, got 'turn'", "prompt_tail")
    return PromptReading(lam, tail if body.prompt_tail is None else body.prompt_tail)


def proposal(tail: int | None, reading: PromptReading) -> str | None:
    """Returns what to tell who starts a server about reading prompts, if there is anything to tell.

    Args:
        tail: the fewest tokens that cost the pair nothing, as measured; None if nobody has measured it.
        reading: what the server does.
    """
    if tail is None:
        return None
    if reading.intensity is None:
        last = "token" if tail == 1 else f"{tail} tokens"
        return (
            f"this pair answers as well if prompts are read at λ=0 except for their last {last}: "
            f"--prompt-intensity 0 --prompt-tail {tail} reads what prompts share once for all λ"
        )
    if isinstance(reading.tail, int) and reading.tail < tail:
        return f"this pair answers worse with --prompt-tail {reading.tail}: {tail} is the least that costs nothing"
    return None
