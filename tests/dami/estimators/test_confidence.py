"""Signals of confidence against a plain computation with the two ends as two models, and the λ made of them."""

from __future__ import annotations

import math

import dami
import pytest
import torch
from dami.estimators.confidence import ConfidenceEstimator, ConfidenceRouter, Signals, confidence, signals
from torch import Tensor
from transformers import PreTrainedModel

from tests.dami.families import VOCABULARY, pair

NAMES = ("confidence", "thinking_confidence", "entropy", "divergence")


def plain_signals(ends: tuple[PreTrainedModel, PreTrainedModel], prompt: Tensor, tokens: int) -> dict[str, float]:
    """One prompt without padding, token by token, from the probabilities of two ordinary models."""
    ids, rows = prompt[None], []
    for _ in range(tokens):
        p, q = (end(ids).logits[0, -1].double().softmax(-1) for end in ends)
        token = int(p.argmax())
        middle = (p + q) / 2
        rows.append(
            (
                p[token].log(),
                q[token].log(),
                -(p * p.log()).sum(),
                (p * (p / middle).log() + q * (q / middle).log()).sum() / 2,
            )
        )
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
        if token == ends[0].generation_config.eos_token_id:
            break
    means = torch.tensor(rows).mean(0)
    return dict(zip(NAMES, (means[0].exp(), means[1].exp(), means[2], means[3]), strict=True))


@pytest.mark.parametrize("tokens", [1, 6])
@torch.no_grad()
def test_signals_are_those_of_the_two_ends(tokens: int) -> None:
    """Whatever the padding, and for an answer that ends before the others."""
    ends, (instruct, thinking) = pair("qwen3"), pair("qwen3")
    prompts = [torch.randint(3, VOCABULARY, (length,)) for length in (7, 3, 5)]
    first = int(ends[0](prompts[1][None]).logits[0, -1].argmax())
    for model in (*ends, instruct):
        model.generation_config.eos_token_id = first  # the second prompt's answer is over at once
    width = max(map(len, prompts))
    batch = {
        "input_ids": torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts]),
        "attention_mask": torch.stack([torch.arange(width) >= width - len(p) for p in prompts]).long(),
    }
    found = signals(dami.patch_model(instruct, thinking), batch, tokens)
    for i, prompt in enumerate(prompts):
        for name, value in plain_signals(ends, prompt, tokens).items():
            assert getattr(found, name)[i].item() == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    torch.testing.assert_close(found.gap, (found.confidence / found.thinking_confidence).log())
    assert (found.divergence <= math.log(2)).all()


def test_ends_that_agree_diverge_nowhere() -> None:
    instruct, thinking = pair("qwen3")
    with torch.no_grad():
        for ours, theirs in zip(instruct.parameters(), thinking.parameters(), strict=True):
            theirs.copy_(ours)
        thinking.lm_head.weight[0] += 1e-4
    found = signals(dami.patch_model(instruct, thinking), {"input_ids": torch.randint(3, VOCABULARY, (2, 5))}, 3)
    assert (found.divergence.abs() < 1e-6).all()
    assert (found.gap.abs() < 1e-3).all()


def test_a_sure_end_answers_itself_and_an_unsure_one_thinks_more_where_the_other_begins_alike() -> None:
    nothing = torch.zeros(5)
    sure = torch.tensor([1.0, 0.5, 0.5, 1e-9, 0.25])
    known = Signals(sure, torch.tensor([0.1, 0.5, 0.9, 0.0, 0.125]), nothing, nothing)
    assert ConfidenceEstimator().choose(known).tolist() == pytest.approx(
        [0, 0.8 * (1 - 0.5**8), 0.8 * (1 - 0.5**8), 0.5, 0.65 * (1 - 0.25**8)]
    )
    assert ConfidenceEstimator(doubt=1, apart=0.2, alike=1.0).choose(known)[4] == pytest.approx(0.75 * 0.6)


def test_generate_asks_it_for_every_prompt() -> None:
    model = dami.patch_model(*pair("qwen3"))
    estimator = ConfidenceEstimator(tokens=4, doubt=0.1)  # for models as unsure as random ones
    batch = {"input_ids": torch.randint(3, VOCABULARY, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    lams = estimator.estimate(model, batch)
    assert ((lams >= 0) & (lams <= 1)).all()
    assert len(set(lams.tolist())) == 3
    dami.attach(model, estimator)
    options = {"max_new_tokens": 5, "do_sample": False}
    auto = model.generate(**batch, intensity="auto", **options)
    assert torch.equal(auto, model.generate(**batch, intensity=lams, **options))


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_router_believes_what_the_instruct_end_is_sure_of(tokens: int) -> None:
    model = dami.patch_model(*pair("qwen3"))
    batch = {"input_ids": torch.randint(3, VOCABULARY, (5, 6)), "attention_mask": torch.ones(5, 6, dtype=torch.long)}
    batch["attention_mask"][0, :2] = 0
    found = confidence(model, batch, tokens)
    torch.testing.assert_close(found, signals(model, batch, tokens).confidence)
    sure = found.median().item()
    lams = ConfidenceRouter(tokens, sure).estimate(model, batch)
    assert lams.tolist() == [float(c < sure) for c in found.tolist()]
    assert 0 < lams.sum() < 5


@pytest.mark.parametrize(("settings", "message"), [({"tokens": 0}, "tokens must be"), ({"sure": 1.0}, "sure must be")])
def test_a_router_that_makes_no_sense_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConfidenceRouter(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch must have input_ids for a trial answer, got \['inputs_embeds'\]"):
        ConfidenceRouter().estimate(dami.patch_model(*pair("qwen3")), {"inputs_embeds": torch.zeros(1, 3, 24)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens must be a positive integer, got 0"),
        ({"tokens": 2.5}, r"tokens must be a positive integer, got 2\.5"),
        ({"doubt": 0.0}, r"doubt must be positive, got 0\.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConfidenceEstimator(**settings)  # type: ignore[arg-type]


def test_embeddings_cannot_be_tried() -> None:
    model = dami.patch_model(*pair("qwen3"))
    with pytest.raises(ValueError, match=r"batch must have input_ids for a trial answer, got \['inputs_embeds'\]"):
        ConfidenceEstimator().estimate(model, {"inputs_embeds": torch.zeros(1, 3, 24)})
