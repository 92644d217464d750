"""What a request's arguments say about λ: checked, and made into its trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dami.callers import AUTO, TURN
from dami.generation.reading import TAIL
from dami.serving.fields import Point
from dami.serving.protocol import POINTS, SAME
from dami.serving.vllm.offers import Offer
from dami.serving.vllm.settings import KEY, RequestError, check_tail
from dami.serving.vllm.trajectories import Trajectory
from dami.thoughts import Reader

SCHEDULE = TypeAdapter(list[Point])
TAG = 32  # tokens at the end of a prompt, among which a start tag would be


def wanted(given: Mapping[str, Any], offer: Offer) -> float | None:
    """Returns λ that a request asks for; None for what the estimator chooses.

    Raises:
        RequestError: it asks for what it cannot have.
    """
    default, most = offer.settings.default_intensity, given.get("max_intensity")
    if most is None:
        return offer.lam_or_auto(given.get(KEY, default))
    if isinstance(most, str):
        raise RequestError(f"max_intensity must be a number, got {most!r}", parameter="max_intensity")
    most = offer.lam(most, "max_intensity")
    asked = given.get(KEY, default if default == AUTO else most)
    if KEY in given and not isinstance(asked, str):
        raise RequestError(
            f"{KEY} and max_intensity exclude each other, unless {KEY} is a preset or {AUTO!r}",
            parameter="max_intensity",
        )
    lam = offer.lam_or_auto(asked)
    return None if lam is None else min(lam, most)


def granted(chosen: float, given: Mapping[str, Any], offer: Offer) -> float:
    """Returns λ of a request for which the estimator has chosen this one."""
    low, high = offer.settings.intensity_range
    return min(max(chosen, low), high, given.get("max_intensity", high))


def trajectory_of(
    given: Mapping[str, Any], offer: Offer, prompt: Sequence[int], budget: int | None = None, tokenizer: Any = None
) -> Trajectory:
    """Returns the trajectory of a request.

    Args:
        given: its arguments.
        offer: what the pair offers.
        prompt: the tokens of its prompt.
        budget: the most tokens of its thoughts, on which λ is to bend; None for no limit.
        tokenizer: the engine's, which a request needs whose λ depends on thoughts; None if it has none.

    Raises:
        RequestError: it asks for what it cannot have.
    """
    lam = wanted(given, offer)
    if lam is None:
        raise RequestError(f"{KEY} {AUTO!r} cannot be chosen for this kind of request", parameter=KEY)
    before, tail = _reading(given, offer)
    points = [(0, lam), *_schedule(given, offer)]
    if len(points) > 1 and not offer.moves:
        raise RequestError("intensity_schedule is not supported with speculation", parameter="intensity_schedule")
    trajectory = Trajectory(len(prompt), points, tail, lam if before is None else before)
    return _with_thoughts(trajectory, given, offer, prompt, budget, tokenizer)


def _with_thoughts(
    trajectory: Trajectory,
    given: Mapping[str, Any],
    offer: Offer,
    prompt: Sequence[int],
    budget: int | None,
    tokenizer: Any,
) -> Trajectory:
    """Returns a trajectory that also depends on thoughts, if it is to."""
    name, answer = "answer_intensity", None
    if name in given:
        answer = offer.lam(given[name], name)
        if tokenizer is None or not offer.moves:
            lacking = "without a tokenizer" if offer.moves else "with speculation"
            raise RequestError(f"{name} is not supported {lacking}", parameter=name)
    if tokenizer is None or not offer.moves or (answer is None and budget is None):
        return trajectory
    reader, start, end = _thoughts(tokenizer)
    inside = reader.opens("".join(map(reader.text, prompt[-TAG:])))
    return replace(trajectory, budget=budget, span=offer.span, answer=answer, start=start, end=end, inside=inside)


@lru_cache(1)
def _thoughts(tokenizer: Any) -> tuple[Reader, list[int], list[int]]:
    """Returns what finds thoughts, and the tokens of the tags around one."""
    reader = Reader.of(tokenizer)
    start, end = (tokenizer.encode(tag, add_special_tokens=False) for tag in (reader.tags.start, reader.tags.ends[0]))
    return reader, [*start], [*end]


def _reading(given: Mapping[str, Any], offer: Offer) -> tuple[float | None, int]:
    """Returns λ of a prompt before its tail, None for that of its answer, and the length of the tail."""
    asked, tail = given.get("prompt_intensity", offer.settings.prompt_intensity), given.get("prompt_tail")
    lam = None if isinstance(asked, str) and asked == SAME else offer.lam(asked, "prompt_intensity")
    if tail is None:
        default = offer.settings.prompt_tail
        return lam, default if isinstance(default, int) else TAIL
    if lam is None:
        raise RequestError(
            "prompt_tail says where prompt_intensity ends, which is that of the answer: give prompt_intensity, or "
            "leave out prompt_tail",
            parameter="prompt_tail",
        )
    check_tail(tail, f", or {TURN!r} in a chat")  # where it has been measured by now
    return lam, tail


def _schedule(given: Mapping[str, Any], offer: Offer) -> list[tuple[int, float]]:
    """Returns the points of a schedule, none if there is none."""
    if "intensity_schedule" not in given:
        return []
    name, asked = "intensity_schedule", given["intensity_schedule"]
    try:
        points = SCHEDULE.validate_python(asked)
    except ValidationError:
        points = []
    if not 1 <= len(points) <= POINTS or any(after[0] <= before[0] for before, after in pairwise(points)):
        raise RequestError(
            f"{name} must be 1 to {POINTS} pairs [tokens, λ] in ascending order, got {asked!r}", parameter=name
        )
    return [(tokens, offer.lam(lam, name)) for tokens, lam in points]
