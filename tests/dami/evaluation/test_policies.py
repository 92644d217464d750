"""What policies give, on tables whose truth is known."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from dami.cli.terminal import outcome_table, verdict
from dami.evaluation import Frontier
from dami.evaluation.policies import at_random, auroc, efficiency_score, lots_between, play, room
from dami.evaluation.statistics import Interval, wilson
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
    assert found.accuracy == (1, *wilson(1, 400))
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
        gain, low, high = (f"{100 * share:+.1f}" for share in outcome.gain)
        right, static = (f"{share.value:.0%}" for share in (outcome.accuracy, outcome.static))
        assert line.split() == [f"{price:g}", right, f"{outcome.tokens.value:.0f}", static, gain, low, "to", high]


def test_a_verdict_says_whether_choosing_pays() -> None:
    outcome, told = play(table(), np.zeros(400)), "on 400 questions held out, at price 0.2,"
    against = "points against one λ for all with as many tokens"
    for gain, said in (
        (Interval(0.2, 0.1, 0.3), f"It pays: {told} +20.0 {against}."),
        (Interval(0.1, -0.1, 0.3), f"No gain that so many can show: {told} +10.0 {against}."),
        (Interval(-0.2, -0.3, -0.1), f"It costs accuracy: {told} -20.0 {against}."),
    ):
        assert verdict(replace(outcome, gain=gain), 0.2, 400) == said


@pytest.mark.parametrize(
    ("accuracy", "tokens", "score"),
    [(0.5, 100.0, 0.0), (0.5, 40.0, 0.6), (0.6, 100.0, 0.6), (0.4, 50.0, -0.5), (0.6, 150.0, 0.1)],
)
def test_the_efficiency_score_counts_a_loss_of_accuracy_more_than_a_gain(
    accuracy: float, tokens: float, score: float
) -> None:
    assert efficiency_score(accuracy, tokens, 0.5, 100.0) == pytest.approx(score)
    assert np.isnan(efficiency_score(accuracy, tokens, 0.0, 100.0))


def test_an_outcome_tells_the_efficiency_and_the_incomplete_answers() -> None:
    frontier = table()
    found = play(frontier, frontier.best_each())
    assert found.aes.value == pytest.approx(1 / 3)  # as accurate as λ=1, a third cheaper
    assert found.incomplete == (0, *wilson(0, 400))  # the table has its scores for shares of complete answers
    assert play(frontier, np.full(400, 0.0)).incomplete.value == pytest.approx(0.5)


def drawn(questions: int, samples: int, chance: np.ndarray, seed: int = 0) -> list[Frontier]:
    """Samples of questions whose chance to be right at each λ is known, [questions, L]."""
    rng = np.random.default_rng(seed)
    tokens = np.tile([10.0, 20.0, 30.0], (questions, 1))
    empty = np.zeros_like(tokens)
    scores = [rng.binomial(1, chance).astype(float) for _ in range(samples)]
    return [Frontier(LAMS, score, tokens, empty, empty, np.zeros(questions, int)) for score in scores]


def test_there_is_no_room_where_all_questions_are_alike() -> None:
    """Although the best answers of each question, known in hindsight, would look far better."""
    samples = drawn(500, 8, np.full((500, 3), 0.5))
    found = room(samples, np.zeros(500), price=0.0)
    means = np.mean([sample.scores for sample in samples], axis=0)
    assert means.max(1).mean() - means.mean(0).max() > 0.1
    assert found.total.value < 0.02


def test_the_room_is_what_knowing_the_questions_is_worth() -> None:
    easy = np.arange(600) % 2 == 0
    samples = drawn(600, 8, np.where(easy[:, None], [1.0, 0.5, 0.0], [0.0, 0.5, 1.0]))
    right, wrong, middle = (np.where(easy, *lams) for lams in ((0.0, 1.0), (1.0, 0.0), (0.5, 0.5)))
    found = room(samples, right, price=0.3)
    static = 0.5 - 0.3 * 10 / 30  # of λ=0
    assert found.total.value == pytest.approx(1 - 0.3 * 20 / 30 - static, abs=0.02)
    assert found.won.value == pytest.approx(1, abs=0.02)
    assert found.total.low < found.total.value < found.total.high
    assert room(samples, wrong, price=0.3).won.high < 0
    assert room(samples, middle, price=0.3).won.high < 0.1
    costly = room(samples, right, price=0.3, extra_tokens=10)
    assert (found.won.value - costly.won.value) * found.total.value == pytest.approx(0.1, abs=1e-9)


def test_samples_of_other_questions_have_no_room() -> None:
    first, second = drawn(4, 2, np.full((4, 3), 0.5))
    with pytest.raises(ValueError, match="samples must be two or more of the same questions and λ, got 2 of"):
        room([first, second.select([0, 1, 2])], np.zeros(4), 0.1)
    with pytest.raises(ValueError, match="samples must be two or more of the same questions and λ, got 1 of"):
        room([first], np.zeros(4), 0.1)
