"""What policies give, on tables whose truth is known."""

from __future__ import annotations

import io

import numpy as np
import pytest
from dami.cli.terminal import outcome_table
from dami.evaluation import Frontier
from dami.evaluation.policies import at_random, auroc, lots_between, play
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

LAMS = (0.0, 0.5, 1.0)


def table(questions: int = 400, easy: float = 0.5) -> Frontier:
    """Easy questions are right at every λ, hard ones only at λ=1; λ costs 10, 20, 30 tokens."""
    is_easy = np.arange(questions) < easy * questions
    scores = np.stack([is_easy, is_easy, np.ones(questions, bool)], 1).astype(float)
    tokens = np.tile([10.0, 20.0, 30.0], (questions, 1))
    return Frontier(LAMS, scores, tokens, scores, scores, is_easy.astype(int))


def test_knowing_which_questions_are_hard_beats_every_lot() -> None:
    frontier = table()
    found = play(frontier, frontier.best_each())
    assert found.accuracy == (1, 1, 1)
    assert found.tokens.value == 20
    assert found.static.value == pytest.approx(0.75)  # half of all at λ=1
    assert found.gain.value == pytest.approx(0.25)
    assert 0.24 < found.gain.low < found.gain.high <= 0.25 + 1e-9  # share of hard questions p: gain p (1 − p)
    assert found.over_thinking.value == 0
    assert found.tokens_saved.value == 10
    assert play(frontier, frontier.best_each(), extra_tokens=5).tokens.value == 25


def test_a_static_policy_gains_nothing() -> None:
    frontier = table()
    for place, lam in enumerate(LAMS):
        found = play(frontier, np.full(400, lam))
        assert found.accuracy.value == pytest.approx(frontier.scores.mean(0)[place])
        assert found.gain.value <= 1e-12
    dealt = play(frontier, at_random(frontier, frontier.best_each()))
    assert dealt.tokens.value == pytest.approx(20)
    assert dealt.gain.value == pytest.approx(0)


def test_what_is_cheaper_than_every_static_lam_is_held_against_the_cheapest() -> None:
    even = np.arange(200) % 2 == 0
    scores = np.stack([even, ~even], 1).astype(float)
    tokens = np.where(scores > 0, 10.0, 30.0)  # right answers are short
    found = play(Frontier((0.0, 1.0), scores, tokens, scores, scores, even.astype(int)), scores)
    assert (found.accuracy.value, found.tokens.value) == (1, 10)
    assert found.static.value == pytest.approx(0.5)
    assert found.gain.low <= found.gain.value == pytest.approx(0.5)
    assert all(np.isfinite(value) for value in found.gain)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_a_lot_between_neighbours_has_the_mean_that_was_chosen(lams: list[float]) -> None:
    lots = lots_between((0.0, 0.3, 1.0), np.array(lams))
    np.testing.assert_allclose(lots.sum(1), 1)
    np.testing.assert_allclose(lots @ [0.0, 0.3, 1.0], lams, atol=1e-12)
    assert ((lots > 0).sum(1) <= 2).all()


@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30).filter(
        lambda cases: len({positive for _, positive in cases}) == 2
    )
)
def test_auroc_counts_pairs(cases: list[tuple[int, bool]]) -> None:
    signal, positive = map(np.array, zip(*cases, strict=True))
    pairs = np.sign(np.subtract.outer(signal[positive], signal[~positive]))
    assert auroc(signal, positive) == pytest.approx(((pairs + 1) / 2).mean())
    assert auroc(-signal, positive) == pytest.approx(1 - auroc(signal, positive))


def test_auroc_needs_both_kinds() -> None:
    assert np.isnan(auroc([1.0, 2.0], [True, True]))


def test_what_cannot_be_played_is_refused() -> None:
    with pytest.raises(ValueError, match=r"policy must have shape \[400\] or \[400, 3\], got \[399\]"):
        play(table(), np.zeros(399))
    with pytest.raises(ValueError, match=r"policy must choose λ from 0 to 1, as measured, got -0\.5 to 1"):
        play(table(), np.linspace(-0.5, 1, 400))


def test_outcomes_are_shown_by_price_with_the_estimators_own_in_bold() -> None:
    frontier = table()
    outcomes = {price: play(frontier, np.full(len(frontier), lam)) for price, lam in ((0.1, 1.0), (0.5, 0.0))}
    shown = outcome_table(outcomes, 0.5)
    assert shown.marked == {1}  # in bold
    console = Console(width=200, file=io.StringIO())
    console.print(shown)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    for line, (price, outcome) in zip(lines[1:], outcomes.items(), strict=True):
        assert line.split()[0] == f"{price:g}"
        for value in (outcome.accuracy, outcome.tokens, outcome.static, outcome.gain):
            assert str(value) in line
