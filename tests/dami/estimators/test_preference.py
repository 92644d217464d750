"""Utilities fitted to preferences: on data with a known best λ, and through a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dami
import numpy as np
import pytest
import torch
from dami.estimators.confidence import signals
from dami.estimators.features import prompt_states, trial_signals
from dami.estimators.files import StoredIntensity
from dami.estimators.preference import Features, PreferenceEstimator, fit
from dami.evaluation import Frontier, load_task
from dami.evaluation.policies import play
from dami.evaluation.presets import presets_of
from dami.evaluation.training import train_estimator
from torch import Tensor

from tests.dami.families import VOCABULARY, pair

LAMS = (0.0, 0.5, 1.0)


def questions(count: int, seed: int) -> tuple[Tensor, Frontier]:
    """Of four features the first tells hard questions, which λ=1 alone gets right, and the second costly ones."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, 4))
    hard, costly = features[:, 0] > 0, features[:, 1] > 0
    chance = np.where(hard[:, None], [0.05, 0.2, 0.95], [0.9, 0.92, 0.95])
    scores = rng.binomial(2, chance) / 2
    tokens = np.where(costly[:, None], [10.0, 60.0, 100.0], [10.0, 12.0, 15.0]) + rng.normal(size=(count, 3))
    empty = np.zeros_like(scores)
    return torch.tensor(features).float(), Frontier(LAMS, scores, tokens, empty, empty, np.zeros(count, int))


@pytest.fixture(scope="module")
def estimator() -> PreferenceEstimator:
    features, frontier = questions(1500, 0)
    weights = fit(features, frontier.scores, frontier.tokens, LAMS)
    return PreferenceEstimator(LAMS, Features((0,)), weights)


def test_it_thinks_where_thinking_pays(estimator: PreferenceEstimator) -> None:
    """At a high price only where it is cheap or needed; at none everywhere that it helps; and it beats static λ."""
    features, frontier = questions(1000, 1)
    hard, costly = (features[:, 0] > 0.3), (features[:, 1] > 0.3)
    easy = features[:, 0] < -0.3
    dear = estimator.at(0.25).choose(features)
    assert (dear[hard] == 1).float().mean() > 0.9
    assert (dear[easy & costly] == 0).float().mean() > 0.9
    tokens = [play(frontier, estimator.at(price).choose(features).double()).tokens.value for price in (2, 0.5, 0.1, 0)]
    assert tokens == sorted(tokens)
    found = play(frontier, dear.double())
    assert found.gain.low > 0.05


def test_a_fit_is_reproducible_and_leaves_torch_alone() -> None:
    features, frontier = questions(50, 2)
    before = torch.random.get_rng_state()
    first, second = (fit(features, frontier.scores, frontier.tokens, LAMS, seed=3) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(weight.requires_grad for weight in first.values())


def test_budgets_choose_the_price(estimator: PreferenceEstimator) -> None:
    with_budgets = PreferenceEstimator(
        LAMS, estimator.features, estimator.weights, 0.2, {0.0: 50.0, 0.1: 30.0, 1.0: 9.0}
    )
    assert with_budgets.within(60).price == 0.0
    assert with_budgets.within(30).price == 0.1
    with pytest.raises(ValueError, match=r"tokens must be at least 9\.0, got 5"):
        with_budgets.within(5)
    with pytest.raises(ValueError, match="tokens must be measured, and no budget has been, got 5"):
        estimator.within(5)


def test_prompt_states_are_the_instruct_ends_whatever_the_padding() -> None:
    ends, model = pair("qwen3"), dami.patch_model(*pair("qwen3"))
    prompts = [torch.randint(3, VOCABULARY, (length,)) for length in (7, 3)]
    for side in ((4, 0), (0, 4)):
        batch = {
            "input_ids": torch.stack([prompts[0], torch.nn.functional.pad(prompts[1], side)]),
            "attention_mask": torch.stack([torch.ones(7), torch.nn.functional.pad(torch.ones(3), side)]).long(),
        }
        found = prompt_states(model, batch, (1, -1))
        for row, prompt in zip(found, prompts, strict=True):
            states = ends[0](prompt[None], output_hidden_states=True).hidden_states
            torch.testing.assert_close(row, torch.cat([states[1][0, -1], states[-1][0, -1]]).detach())
    with pytest.raises(ValueError, match=r"layers must be from -3 to 2 for this model, got \[3\]"):
        prompt_states(model, batch, (0, 3))


def test_a_trial_adds_its_signals() -> None:
    model = dami.patch_model(*pair("qwen3"))
    batch = {"input_ids": torch.randint(3, VOCABULARY, (2, 5))}
    read = Features.of(model, trial=3)
    assert read.layers == (1, 2)
    known = signals(model, batch, 3)
    found = read(model, batch)
    torch.testing.assert_close(found[:, -4:], trial_signals(model, batch, 3))
    torch.testing.assert_close(found[:, -4], known.confidence.log())
    torch.testing.assert_close(found[:, -2], known.entropy)
    torch.testing.assert_close(found[:, :-4], prompt_states(model, batch, (1, 2)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """An estimator for the shipped pair, of a few questions with short answers."""
    model, tokenizer = dami.load_pair(*dami.example_pair())
    task = load_task(str(dami.example_pair()[0].parent / "questions.jsonl"), 20)
    directory = tmp_path_factory.mktemp("run") / "intensity"
    trained = train_estimator(
        model, tokenizer, task, directory, LAMS, samples=1, trial=2, price=0.3, rows=36, max_new_tokens=8
    )
    assert trained.stored.frontier["questions"] == 20
    return model, tokenizer, directory


def test_what_is_trained_comes_with_the_pair(trained: tuple[Any, Any, Path], tmp_path: Path) -> None:
    """From its directory, through a packed pair and a saved one, it gives the same λ."""
    model, tokenizer, directory = trained
    batch = tokenizer(["<|user|>4 + 5 =<|assistant|>", "<|user|>gcd(4, 6) =<|assistant|>"], return_tensors="pt",
                      padding=True, padding_side="left")  # fmt: skip
    estimator = dami.attach(model, directory).dami_patch.estimator
    lams = estimator.estimate(model, batch)
    assert set(lams.tolist()) <= set(np.float32(np.linspace(0, 1, 21)).tolist())
    assert estimator.price == 0.3
    assert len(estimator.budgets) == 14
    assert model.dami_patch.presets.keys() == {"low", "medium", "high"}
    options = {"max_new_tokens": 4, "do_sample": False}
    auto = model.generate(**batch, intensity="auto", **options)
    assert torch.equal(auto, model.generate(**batch, intensity=lams, **options))

    saved = dami.save_pair(model, tmp_path / "saved", tokenizer)
    assert {file.name for file in (saved / "intensity").iterdir()} == {
        "intensity.json", "estimator.safetensors", "frontier.json",
    }  # fmt: skip
    other, _ = dami.load_pair(saved)
    assert other.dami_patch.presets == model.dami_patch.presets
    assert other.dami_patch.frontier == model.dami_patch.frontier
    assert torch.equal(other.dami_patch.estimator.estimate(other, batch), lams)


@pytest.mark.parametrize(
    "estimator",
    [
        None,
        dami.estimators.StaticIntensity(0.3),
        dami.estimators.confidence.ConfidenceEstimator(tokens=3),
        dami.estimators.confidence.ConfidenceRouter(sure=0.7),
    ],
)
def test_every_kind_is_stored(estimator: Any, tmp_path: Path) -> None:
    StoredIntensity(estimator, {"low": 0.2}).save(tmp_path)
    found = StoredIntensity.load(tmp_path)
    assert found.estimator == estimator
    assert found.presets == {"low": 0.2}
    assert found.frontier == {}


def test_another_kind_cannot_be_stored_and_rubbish_cannot_be_read(tmp_path: Path) -> None:
    class Mine:
        def estimate(self, model: Any, batch: Any) -> list[float]:
            return [0.5]

    with pytest.raises(TypeError, match=r"estimator must be one of the kinds \[.*\] to be saved, got Mine: register"):
        StoredIntensity(Mine()).save(tmp_path)
    with pytest.raises(FileNotFoundError):
        StoredIntensity.load(tmp_path)
    for rubbish in ("{", "[]", '{"estimator": {"kind": "oracle"}, "presets": {}}', '{"estimator": null}'):
        (tmp_path / "intensity.json").write_text(rubbish)
        with pytest.raises(ValueError, match="must hold an estimator's settings and presets"):
            StoredIntensity.load(tmp_path)


def test_presets_are_the_cheapest_lam_with_their_share() -> None:
    scores = np.tile([0.2, 0.62, 0.5, 0.9, 1.0, 1.0], (10, 1))
    tokens = np.tile([10.0, 40.0, 30.0, 50.0, 60.0, 55.0], (10, 1))
    frontier = Frontier((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), scores, tokens, scores, scores, np.zeros(10, int))
    assert presets_of(frontier) == {"low": 0.2, "medium": 0.6, "high": 1.0}


def test_mistakes_are_named(estimator: PreferenceEstimator, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"price must be a number of at least 0, got -1"):
        estimator.at(-1)
    with pytest.raises(ValueError, match="the estimator reads 4 features of a prompt, got 5: it was fitted to another"):
        estimator.choose(torch.zeros(2, 5))
    features, frontier = questions(5, 2)
    with pytest.raises(ValueError, match=r"scores and tokens must be \[5 questions, 2 λ or more\], as features and"):
        fit(features, frontier.scores[:4], frontier.tokens, LAMS)
    with pytest.raises(ValueError, match="for 1 intensities"):
        fit(features, frontier.scores[:, :1], frontier.tokens[:, :1], LAMS[:1])
    task = load_task(str(dami.example_pair()[0].parent / "questions.jsonl"), 20)
    with pytest.raises(ValueError, match=r"held_out must leave questions on either side, got 0\.0 of 20"):
        train_estimator(None, None, task, tmp_path, held_out=0.0)
    task.questions = task.questions[:19]
    with pytest.raises(ValueError, match="questions must be at least 20, got 19"):
        train_estimator(None, None, task, tmp_path / "none")
    assert not (tmp_path / "none").exists()
