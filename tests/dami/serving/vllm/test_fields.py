"""What requests say about λ, and the course that comes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from dami.estimators.files import StoredIntensity
from dami.serving.vllm.courses import Course, lams
from dami.serving.vllm.fields import course_of, granted, wanted
from dami.serving.vllm.offers import Offer
from dami.serving.vllm.settings import PairSettings

STATES: Any = SimpleNamespace(layers=(1, 2))
OFFER = Offer(PairSettings(intensity_range=(0.0, 1.0)), StoredIntensity(STATES, {"low": 0.25, "wild": 1.5}))


def offer(**settings: Any) -> Offer:
    return Offer(PairSettings.of({"intensity_range": [0, 1], **settings}), OFFER.stored)


@pytest.mark.parametrize(
    ("given", "settings", "lam"),
    [
        ({}, {}, 0.0),
        ({}, {"default_intensity": "low"}, 0.25),
        ({}, {"default_intensity": "auto"}, None),
        ({"intensity": 0.5}, {"default_intensity": "auto"}, 0.5),
        ({"intensity": "wild"}, {}, 1.5),
        ({"intensity": "auto"}, {}, None),
        ({"max_intensity": 0.5}, {}, 0.5),
        ({"max_intensity": 0.5}, {"default_intensity": "auto"}, None),
        ({"max_intensity": 0.125, "intensity": "low"}, {}, 0.125),
        ({"max_intensity": 0.5, "intensity": "low"}, {}, 0.25),
        ({"max_intensity": 0.5, "intensity": "auto"}, {}, None),
    ],
)
def test_lambda_of_a_request(given: dict[str, Any], settings: dict[str, Any], lam: float | None) -> None:
    assert wanted(given, offer(**settings)) == lam


@pytest.mark.parametrize(
    ("chosen", "given", "lam"), [(1.2, {}, 1.0), (-0.1, {}, 0.0), (0.9, {"max_intensity": 0.5}, 0.5)]
)
def test_a_choice_is_granted_within_what_is_allowed(chosen: float, given: dict[str, Any], lam: float) -> None:
    assert granted(chosen, given, OFFER) == lam


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"intensity": "high"}, r"intensity must be a number, one of \['low', 'wild'\] or 'auto', got 'high'"),
        ({"intensity": "auto"}, "intensity 'auto' cannot be chosen for this kind of request"),
        (
            {"max_intensity": 0.5, "intensity": 0.2},
            "intensity and max_intensity exclude each other, unless intensity is",
        ),
        ({"max_intensity": "low"}, "max_intensity must be a number, got 'low'"),
        ({"max_intensity": 2}, "max_intensity must be in 0 to 1 on this server, got 2"),
        ({"prompt_intensity": 2}, "prompt_intensity must be in 0 to 1 on this server, got 2"),
        ({"prompt_intensity": "auto"}, "vLLM takes a number or a preset as prompt_intensity, got 'auto', which is for"),
        ({"prompt_tail": 3}, "prompt_tail says where prompt_intensity ends, which is that of the answer: give"),
        ({"prompt_intensity": "same", "prompt_tail": 3}, "prompt_tail says where prompt_intensity ends"),
        ({"prompt_intensity": 0, "prompt_tail": True}, "prompt_tail must be an integer of at least 0, got True"),
        ({"prompt_intensity": 0, "prompt_tail": -1}, "prompt_tail must be an integer of at least 0, got -1"),
        ({"intensity_schedule": []}, r"intensity_schedule must be 1 to 64 pairs \[tokens, λ\] in ascending order, got"),
        ({"intensity_schedule": [[0, 0.5]]}, "intensity_schedule must be 1 to 64 pairs"),
        ({"intensity_schedule": [[4, 0.5], [4, 0.6]]}, "intensity_schedule must be 1 to 64 pairs"),
        ({"intensity_schedule": [[n, 0.5] for n in range(1, 66)]}, "intensity_schedule must be 1 to 64 pairs"),
        ({"intensity_schedule": 0.5}, "intensity_schedule must be 1 to 64 pairs"),
        ({"intensity_schedule": [[4, 2]]}, "intensity_schedule must be in 0 to 1 on this server, got 2"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        course_of(given, OFFER, 10)


def test_what_the_pair_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="intensity 'auto' needs an estimator, and this pair has none"):
        wanted({"intensity": "auto"}, Offer(PairSettings()))
    more = Offer(PairSettings(default_intensity="auto"), StoredIntensity(SimpleNamespace(layers=())))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="default_intensity 'auto' needs an estimator that looks at nothing but the states"
    ):
        more.check()
    with pytest.raises(
        ValueError, match="prompt_intensity must be a number or a preset, of which the model has none, got"
    ):
        Offer(PairSettings(prompt_intensity="low")).check()


@pytest.mark.parametrize(
    ("given", "lam"),
    [
        ({"intensity": 0.5}, [0.5] * 10),
        ({"intensity": 0.5, "prompt_intensity": 0}, [0.0] * 5 + [0.5] * 5),
        ({"intensity": 0.5, "prompt_intensity": "low", "prompt_tail": 3}, [0.25] * 3 + [0.5] * 7),
        ({"intensity": 0.5, "prompt_intensity": 0, "prompt_tail": 0}, [0.0] * 6 + [0.5] * 4),
        ({"intensity": 0.5, "prompt_intensity": 0, "prompt_tail": 9}, [0.5] * 10),
        ({"intensity_schedule": [[2, 1.0]], "prompt_intensity": "same"}, [0.0] * 6 + [0.5, 1.0, 1.0, 1.0]),
        ({"intensity_schedule": [[1, 1.0], [3, 0.5]]}, [0.0] * 6 + [1.0, 0.75, 0.5, 0.5]),
    ],
)
def test_a_course(given: dict[str, Any], lam: list[float]) -> None:
    """Of a prompt of 6 tokens: whole, in pieces, among others, and over the wire."""
    params: Any = SimpleNamespace(extra_args=given)
    course_of(given, OFFER, 6).put(params)
    course = Course.of(params)
    assert course is not None
    assert course.lam(0, 10).tolist() == lam
    other = Course(2, [(0, 0.125)], 2, 0.125)
    for start in range(10):
        found = lams([other, course, other], np.array([5, start, 1]), np.array([2, 10 - start, 1]))
        assert found.tolist() == [0.125] * 2 + lam[start:] + [0.125]
    assert params.extra_args.items() >= given.items()


def test_turns_hold_from_their_place_on() -> None:
    course = Course(6, [(0, 0.0), (2, 1.0)], 6, 0.0)
    course.turn(8, 0.25)
    course.turn(9, 0.75)
    course.turn(9, 0.5)
    assert course.lam(5, 11).tolist() == [0.0, 0.5, 1.0, 0.25, 0.5, 0.5]


def test_a_key_has_the_lambda_of_each_token() -> None:
    plain, read = Course(6, [(0, 0.5)], 6, 0.5), Course(6, [(0, 0.5)], 1, 0.0)
    assert plain.key(0, 4) != read.key(0, 4) == Course(9, [(0, 0.0)], 9, 0.0).key(0, 4)
    assert plain.key(4, 8) != read.key(4, 8) != Course(6, [(0, 0.5)], 2, 0.0).key(4, 8)
    assert plain.key(8, 12) == read.key(8, 12) == Course(4, [(0, 0.5)], 4, 0.5).key(0, 4)
