"""Measures of a path, against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
from dami.evaluation.path import above_chord, barrier, between_neighbours, cka, compared, similarities
from dami.evaluation.statistics import bootstrap
from hypothesis import given, settings
from hypothesis import strategies as st

RANDOM = np.random.default_rng(0)


def hsic(k: np.ndarray, m: np.ndarray) -> float:
    """The unbiased estimator as Song et al. write it, of two Gram matrices."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    terms = (
        np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    )
    return terms / (n * (n - 3))


def rotation(size: int) -> np.ndarray:
    return np.linalg.qr(RANDOM.normal(size=(size, size)))[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 40), st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_cka_is_the_unbiased_hsic_over_its_norms(n: int, d: int, e: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(n, d)) + 3, random.normal(size=(n, e))
    a, b = x @ x.T, y @ y.T
    assert cka(x, y) == pytest.approx(hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b)), abs=1e-7)
    assert cka(x, y) == pytest.approx(cka(y, x))
    assert abs(cka(x, y)) <= 1 + 1e-12


@pytest.mark.parametrize("features", [7, 200])
def test_cka_does_not_see_rotation_scale_or_place(features: int) -> None:
    x = RANDOM.normal(size=(50, features))
    assert cka(x, x) == pytest.approx(1)
    assert cka(x, -3 * x @ rotation(features) + RANDOM.normal(size=features)) == pytest.approx(1)
    assert cka(x, np.concatenate([x, np.zeros((50, 3))], 1)) == pytest.approx(1)


def test_cka_of_independent_states_is_about_nothing() -> None:
    """Also where there are more features than states, where plain CKA is near 1."""
    x, y = RANDOM.normal(size=(60, 500)), RANDOM.normal(size=(60, 500))
    a, b = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))
    assert (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) > 0.8
    assert abs(cka(x, y)) < 0.1


def test_cka_falls_with_noise() -> None:
    x = RANDOM.normal(size=(80, 20))
    noise = RANDOM.normal(size=x.shape)
    values = [cka(x, x + amount * noise) for amount in (0, 0.1, 0.3, 1, 3)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(("x", "y"), [((5, 3), (6, 3)), ((3, 3), (3, 3)), ((5,), (5, 3))])
def test_cka_tells_of_shapes_that_do_not_fit(x: tuple[int, ...], y: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"N at least 4, got \("):
        cka(np.zeros(x), np.zeros(y))


def test_states_are_compared_with_neighbours_and_both_ends() -> None:
    lams = (-0.5, 0.0, 0.5, 1.0)
    assert compared(lams) == [(0, 1), (1, 2), (2, 3), (2, 1), (3, 1), (0, 3), (1, 3)]
    states = RANDOM.normal(size=(4, 30, 6))
    questions = np.repeat(np.arange(10), 3)
    found = similarities(2, states, questions, lams)
    assert [(each.intensity, each.other) for each in found] == [(lams[i], lams[j]) for i, j in compared(lams)]
    assert {each.layer for each in found} == {2}
    for each, (i, j) in zip(found, compared(lams), strict=True):
        x, y = states[i], states[j]
        cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        for measure, value in ((each.cka, cka(x, y)), (each.cosine, cosines.mean())):
            assert measure.value == pytest.approx(value)
        left = [cka(x[questions != q], y[questions != q]) for q in range(10)]
        error = np.sqrt(9 / 10 * ((left - np.mean(left)) ** 2).sum())
        assert each.cka.value - each.cka.low == pytest.approx(1.959964 * error)
    assert [(s.intensity, s.other) for s in between_neighbours(found, lams)] == [(0.0, 0.5), (0.5, 1.0)]


def test_the_jackknife_covers_the_truth() -> None:
    """The cosine of states that share half their variance, over many draws."""
    covered = 0
    for _ in range(100):
        common = RANDOM.normal(size=(200, 50))
        states = np.stack([common + RANDOM.normal(size=common.shape) for _ in range(2)])
        (first, *_) = similarities(0, states, np.arange(200), (0.0, 1.0))
        covered += first.cosine.low <= 0.5 * (1 - 1 / 200) <= first.cosine.high  # to first order in 1 / features
    assert covered >= 80


@settings(max_examples=50, deadline=None)
@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(-3, 3))
def test_the_barrier_of_a_parabola_is_its_height(start: float, slope: float, height: float) -> None:
    lams = np.array([-0.5, 0, 0.25, 0.5, 0.75, 1, 1.5])
    values = start + slope * lams + 4 * height * lams * (1 - lams)
    found = barrier(lams.tolist(), lambda rows: values, 1)
    assert found.height.value == pytest.approx(max(height, 0), abs=1e-9)
    assert found.sag.value == pytest.approx(max(-height, 0), abs=1e-9)
    assert found.above_mean.value == pytest.approx(values[1:6].max() - (values[1] + values[5]) / 2)
    if height > 1e-3:
        assert found.at == 0.5


def test_a_straight_line_has_no_barrier_whatever_lies_beyond() -> None:
    found = barrier([-1.0, 0.0, 0.5, 1.0, 2.0], lambda rows: np.array([99.0, 1.0, 2.0, 3.0, 99.0]), 1)
    assert found.height == (0, 0, 0)
    assert found.sag == (0, 0, 0)
    assert found.above_mean.value == 1


def test_a_barrier_has_the_interval_of_its_questions() -> None:
    heights = RANDOM.normal(1, 0.5, 400)
    table = np.stack([np.zeros(400), heights, np.zeros(400)], 1)
    found = barrier([0.0, 0.5, 1.0], lambda rows: table[rows].mean(0), 400)
    error = heights.std() / 20
    assert found.height.low == pytest.approx(heights.mean() - 1.96 * error, abs=0.3 * error)
    assert found.height.high == pytest.approx(heights.mean() + 1.96 * error, abs=0.3 * error)


@pytest.mark.parametrize("lams", [[0.0, 0.5], [0.5, 1.0], [0.25]])
def test_a_chord_needs_both_ends(lams: list[float]) -> None:
    with pytest.raises(ValueError, match=r"must hold 0 and 1, got \["):
        above_chord(lams, np.zeros(len(lams)))


def test_the_bootstrap_draws_whole_questions() -> None:
    first = RANDOM.normal(size=50)
    (difference, mean) = bootstrap(lambda rows: np.array([(first - first)[rows].mean(), first[rows].mean()]), 50)
    assert difference == (0, 0, 0)
    assert mean.low < first.mean() < mean.high
