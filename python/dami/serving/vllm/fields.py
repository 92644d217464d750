"""What a request's arguments say about λ: checked, and made into its course."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dami.callers import AUTO
from dami.serving.protocol import POINTS, SAME, Point
from dami.serving.vllm.courses import Course
from dami.serving.vllm.offers import Offer
from dami.serving.vllm.settings import KEY, RequestError, check_tail

SCHEDULE = TypeAdapter(list[Point])


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


def course_of(given: Mapping[str, Any], offer: Offer, prompt: int) -> Course:
    """Returns the course of a request whose prompt has so many tokens.

    Raises:
        RequestError: it asks for what it cannot have.
    """
    lam = wanted(given, offer)
    if lam is None:
        raise RequestError(f"{KEY} {AUTO!r} cannot be chosen for this kind of request", parameter=KEY)
    before, tail = _reading(given, offer)
    return Course(prompt, [(0, lam), *_schedule(given, offer)], tail, lam if before is None else before)


def _reading(given: Mapping[str, Any], offer: Offer) -> tuple[float | None, int]:
    """Returns λ of a prompt before its tail, None for that of its answer, and the length of the tail."""
    asked, tail = given.get("prompt_intensity", offer.settings.prompt_intensity), given.get("prompt_tail")
    lam = None if isinstance(asked, str) and asked == SAME else offer.lam(asked, "prompt_intensity")
    if tail is None:
        return lam, offer.settings.prompt_tail
    check_tail(tail)
    if lam is None:
        raise RequestError(
            "prompt_tail says where prompt_intensity ends, which is that of the answer: give prompt_intensity, or "
            "leave out prompt_tail",
            parameter="prompt_tail",
        )
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
