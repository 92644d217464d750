"""The ridge regression against a plain one, on data with a known best λ, and its storage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dami.estimators.calibrated import STRENGTHS, CalibratedEstimator, Signature, fit
from dami.estimators.files import StoredIntensity
from dami.evaluation import Frontier
from dami.evaluation.policies import play
from torch import Tensor

LAMS = (0.0, 0.5, 1.0)


def prompts(count: int, seed: int, tells: bool = True) -> tuple[list[Tensor], np.ndarray, np.ndarray]:
    """Two kinds of signals, of which one number tells hard prompts, which λ=1 alone gets right, or none does."""
    rng = np.random.default_rng(seed)
    hard = rng.random(count) < 0.5
    scores = rng.binomial(4, np.where(hard[:, None], [0.05, 0.2, 0.9], [0.9, 0.9, 0.9])) / 4
    tokens = np.tile([10.0, 60.0, 100.0], (count, 1)) + rng.normal(size=(count, 3))
    doubt = np.where(hard if tells else rng.random(count) < 0.5, 2.0, -1.0) + 0.3 * rng.normal(size=count)
    signals = [torch.tensor(rng.normal(size=(count, 40))).float(), torch.tensor(doubt)[:, None].float()]
    return signals, scores, tokens


def estimator(weights: dict[str, Tensor], price: float = 0.2) -> CalibratedEstimator:
    return CalibratedEstimator(LAMS, Signature(("states", "doubt")), weights, price)


def test_it_thinks_where_the_signals_say_so_and_beats_static_lam() -> None:
    fitted = fit(*prompts(100, 0))
    signals, scores, tokens = prompts(600, 1)
    empty = np.zeros_like(scores)
    frontier = Frontier(LAMS, scores, tokens, empty, empty, np.zeros(600, int))
    found = play(frontier, estimator(fitted.weights).choose(torch.cat(signals, 1)).double())
    assert found.gain.low > 0.15
    seen = [
        play(frontier, estimator(fitted.weights, price).choose(torch.cat(signals, 1)).double()) for price in (0, 0.3, 2)
    ]
    assert [each.tokens.value for each in seen] == sorted([each.tokens.value for each in seen], reverse=True)


def test_signals_that_say_nothing_leave_the_best_static_lam() -> None:
    signals, scores, tokens = prompts(100, 2, tells=False)
    chosen = estimator(fit(signals, scores, tokens).weights).choose(torch.cat(signals, 1))
    best = LAMS[int((scores.mean(0) - 0.2 * tokens.mean(0) / tokens[:, -1].mean()).argmax())]
    assert (chosen == best).float().mean() > 0.9


def test_what_is_left_out_is_predicted_by_a_fit_to_the_others() -> None:
    """One prompt at a time, by the normal equations with an intercept that is not shrunk."""
    signals, scores, tokens = prompts(25, 3)
    fitted = fit(signals, scores, tokens)
    widths = torch.tensor([40.0] * 40 + [1.0])
    x = torch.cat(signals, 1).double()
    x = (x - x.mean(0)) / ((x.std(0) + 1e-6) * (2 * widths).double().sqrt())
    for target, found in (
        (scores - scores.mean(1, keepdims=True), fitted.gain),
        (tokens / tokens[:, -1].mean(), fitted.cost),
    ):
        errors = []
        for strength in STRENGTHS:
            left_out = np.stack([plain_ridge(x.numpy(), target, row, strength * len(x)) for row in range(len(x))])
            errors.append(((left_out - target) ** 2).sum())
            if np.allclose(left_out, found, atol=1e-8):
                chosen = errors[-1]
        assert chosen <= min(errors) + 1e-9


def plain_ridge(x: np.ndarray, target: np.ndarray, row: int, strength: float) -> np.ndarray:
    others = np.arange(len(x)) != row
    design = np.column_stack([x[others], np.ones(others.sum())])
    penalty = strength * np.diag([*np.ones(x.shape[1]), 0.0])
    slopes = np.linalg.solve(design.T @ design + penalty, design.T @ target[others])
    return np.append(x[row], 1.0) @ slopes


def test_it_is_stored(tmp_path: Path) -> None:
    signals, scores, tokens = prompts(40, 4)
    made = CalibratedEstimator(
        LAMS, Signature(("states", "doubt"), 5), fit(signals, scores, tokens).weights, 0.4, {0.1: 9.0}
    )
    StoredIntensity(made).save(tmp_path)
    found = StoredIntensity.load(tmp_path).estimator
    assert isinstance(found, CalibratedEstimator)
    assert (found.intensities, found.features, found.price, found.budgets) == (LAMS, made.features, 0.4, {0.1: 9.0})
    assert torch.equal(found.choose(torch.cat(signals, 1)), made.choose(torch.cat(signals, 1)))
    assert found.within(9.0).price == 0.1
    assert not found.takes_cache  # its trial answer is generated from the whole prompt


def test_mistakes_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"names must be of \['agreement', 'divergence', .*\], one at least, got \['mood'\]"
    ):
        Signature(("mood",))
    with pytest.raises(ValueError, match="tokens must be a positive integer, got 0"):
        Signature(("doubt",), 0)
    signals, scores, tokens = prompts(30, 5)
    with pytest.raises(
        ValueError, match=r"signals, scores and tokens must be of the same prompts, at two λ or more, got"
    ):
        fit([signals[0][:29], signals[1]], scores, tokens)
    with pytest.raises(ValueError, match="two λ or more"):
        fit(signals, scores[:, :1], tokens[:, :1])
    weights = fit(signals, scores, tokens).weights
    with pytest.raises(
        ValueError, match="the estimator reads 41 features of a prompt, got 40: it was fitted to another"
    ):
        estimator(weights).choose(signals[0])
