"""What is said about a frontier, on data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from dami.evaluation import Frontier, Record
from dami.evaluation.frontier import hull_at
from dami.evaluation.statistics import Z95, wilson
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray


def records(
    accuracy: list[float],
    tokens: list[float],
    questions: int = 200,
    thinking: list[float] | None = None,
    samples: int = 1,
) -> list[Record]:
    """λ evenly from 0 to 1; the given shares of questions are right and have a thought, the easiest first."""
    lams, shares = np.linspace(0, 1, len(accuracy)).tolist(), thinking or [1.0] * len(accuracy)
    rng = np.random.default_rng(0)
    return [
        Record(
            "t", index, 1 + index % 2, lam, sample, float(index < right * questions), round(cost + rng.integers(-2, 3)),
            "hm" if index < share * questions else "", "x", True,
        )
        for index in range(questions)
        for lam, right, cost, share in zip(lams, accuracy, tokens, shares, strict=True)
        for sample in range(samples)
    ]  # fmt: skip


RISING = ([0.2, 0.5, 0.7, 0.8], [10.0, 20.0, 30.0, 40.0])


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (3, 10), (57, 120)])
def test_wilson_solves_its_equation(right: int, count: int) -> None:
    """The ends are the proportions π at which the observed one is just z standard deviations away."""
    for end in wilson(right / count, count):
        assert 0 <= end <= 1
        assert (right / count - end) ** 2 == pytest.approx(Z95**2 * end * (1 - end) / count, abs=1e-12)


def test_points_are_means_with_intervals() -> None:
    frontier = Frontier.of(records(*RISING, thinking=[0, 0.1, 0.9, 1], samples=2))
    assert len(frontier) == 200
    for point, accuracy, tokens in zip(frontier.points, *RISING, strict=True):
        assert point.accuracy.value == pytest.approx(accuracy)
        assert point.accuracy[1:] == wilson(point.accuracy.value, 200)
        assert point.tokens.low <= point.tokens.value <= point.tokens.high
        assert abs(point.tokens.value - tokens) < 0.5
    assert [point.thinking for point in frontier.points] == [0, 0.1, 0.9, 1]
    assert frontier.of_level(1).scores.shape == (100, 4)


def test_bootstrap_intervals_hold_what_they_promise() -> None:
    """Those of a mean are as wide as the normal distribution says."""
    rng = np.random.default_rng(1)
    values = rng.normal(5, 2, (400, 1))
    nothing = np.zeros((400, 1))
    frontier = Frontier((0.0,), nothing, values, nothing, nothing, np.zeros(400, int))
    (interval,) = frontier.interval(lambda scores, tokens: tokens)
    half = Z95 * values.std() / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.1)


def test_differences_are_surer_than_sides() -> None:
    frontier = Frontier.of(records([0.5, 0.6], [10, 10]))
    (step,) = frontier.monotone_accuracy()
    assert step.change.low > 0
    first, second = frontier.points
    assert first.accuracy.high > second.accuracy.low


def test_an_incomplete_question_is_left_out() -> None:
    some = records(*RISING)
    assert len(Frontier.of(some[:-1])) == 199
    with pytest.raises(ValueError, match="records must hold a question answered at every λ, got 0 records"):
        Frontier.of([])


def test_a_frontier_that_rises_less_and_less() -> None:
    frontier = Frontier.of(records(*RISING))
    assert all(step.change.low > 0 for step in frontier.monotone_accuracy())
    assert all(step.change.low > 0 for step in frontier.monotone_tokens())
    assert all(step.change.value > 0 for step in frontier.convexity())


def test_a_frontier_as_published_is_neither_monotone_nor_convex() -> None:
    """In kind as of the 4B pair in arXiv 2510.10977: tokens fall first, accuracy falls last, and leaps between."""
    frontier = Frontier.of(records([0.47, 0.52, 0.56, 0.8, 0.7], [151, 168, 124, 176, 228]))
    assert frontier.monotone_accuracy()[-1].change.high < 0
    assert frontier.monotone_tokens()[1].change.high < 0
    chords = [step.change.value for step in frontier.convexity()]
    assert np.isnan(chords[0])
    assert chords[2] > 0


def test_the_best_static_lam_is_chosen_here_and_scored_there() -> None:
    frontier = Frontier.of(records([0.2, 0.8, 0.8, 0.7], [10, 20, 30, 40]))
    here, there = frontier.halves(seed=1)
    assert len(here) == len(there) == 100
    choice = here.best_static(there)
    assert choice.intensity == pytest.approx(1 / 3)  # the cheaper of equals
    assert choice.accuracy.value == there.scores[:, 1].mean()
    assert here.best_static(there, tokens=15).intensity == 0
    with pytest.raises(ValueError, match=r"tokens must allow the cheapest λ, \d+\.\d, got 5\.0"):
        here.best_static(there, tokens=5)


def test_the_oracle_takes_the_cheapest_of_the_right_ones() -> None:
    frontier = Frontier.of(records([0.2, 0.5, 0.7, 0.6], [10, 20, 30, 40]))
    score, tokens = frontier.oracle()
    assert score == pytest.approx(0.7)
    assert tokens == pytest.approx(0.2 * 10 + 0.3 * 20 + 0.2 * 30 + 0.3 * 10, abs=1)
    assert frontier.oracle(price=1)[1] == pytest.approx(10, abs=1)


def test_two_lam_by_lot_reach_what_lies_between() -> None:
    frontier = Frontier.of(records([0.2, 0.1, 0.8], [10, 20, 30]))
    cost = frontier.tokens.mean(0)
    middle = (cost[0] + cost[2]) / 2
    assert frontier.accuracy_at(middle).value == pytest.approx(0.5)
    assert frontier.accuracy_at(100).value == pytest.approx(0.8)
    assert np.isnan(frontier.accuracy_at(1).value)


points = st.lists(st.tuples(st.floats(0, 1), st.floats(1, 100)), min_size=1, max_size=8)


@given(points, st.floats(0, 120))
def test_the_hull_lies_on_or_above_every_point_and_is_concave(points: list[tuple[float, float]], at: float) -> None:
    scores, tokens = (np.array(column) for column in zip(*points, strict=True))
    for score, cost in points:
        assert hull_at(scores, tokens, cost) >= score - 1e-9
    xs: NDArray[np.float64] = np.linspace(tokens.min(), tokens.max(), 9)
    ys = np.array([hull_at(scores, tokens, float(x)) for x in xs])
    assert (np.diff(ys) >= -1e-9).all()
    assert (np.diff(ys, 2) <= 1e-9).all()
    value = hull_at(scores, tokens, at)
    assert np.isnan(value) == (at < tokens.min())


def test_hypervolume_is_the_area_under_the_staircase() -> None:
    frontier = Frontier.of(records([0.5, 1.0], [10, 20]))
    cheap, dear = frontier.tokens.mean(0)
    assert frontier.hypervolume().value == pytest.approx(0.5 * (dear - cheap) / dear)
    assert frontier.hypervolume(40).value == pytest.approx((0.5 * (dear - cheap) + (40 - dear)) / 40)
    assert frontier.hypervolume(cheap).value == 0


def test_the_transition_band_is_where_thoughts_appear() -> None:
    low, high = Frontier.of(records([0.5] * 5, [10] * 5, thinking=[0, 0, 0.5, 1, 1])).transition() or (0.0, 0.0)
    assert low == pytest.approx(0.3)
    assert high == pytest.approx(0.7)
    assert Frontier.of(records([0.5] * 2, [10] * 2)).transition() is None
