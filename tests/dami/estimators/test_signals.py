"""Signals of a prompt against a plain computation with an ordinary model."""

from __future__ import annotations

import dami
import numpy as np
import pytest
import torch
from dami.estimators.confidence import signals
from dami.estimators.features import prompt_states
from dami.estimators.signals import SIGNALS, agreement
from torch import Tensor

from tests.dami.families import VOCABULARY, pair


def left_padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts]),
        "attention_mask": torch.stack([torch.arange(width) >= width - len(p) for p in prompts]).long(),
    }


@torch.no_grad()
def plain_entropies(model: torch.nn.Module, prompt: Tensor, tokens: int) -> list[float]:
    ids, found = prompt[None], []
    for _ in range(tokens):
        p = model(ids).logits[0, -1].double().softmax(-1)
        found.append(float(-(p * p.log()).sum()))
        ids = torch.cat([ids, p.argmax()[None, None]], 1)
        if int(p.argmax()) == model.generation_config.eos_token_id:
            break
    return found


def test_the_shape_of_the_entropy_is_that_of_the_instruct_end() -> None:
    """Whatever the padding, and for an answer of one token, which has neither slope nor roughness."""
    plain, (instruct, thinking) = pair("qwen3")[0], pair("qwen3")
    prompts = [torch.randint(3, VOCABULARY, (length,)) for length in (7, 3, 5)]
    first = int(plain(prompts[1][None]).logits[0, -1].argmax())
    plain.generation_config.eos_token_id = instruct.generation_config.eos_token_id = first
    model, batch = dami.patch_model(instruct, thinking), left_padded(prompts)
    shapes, doubts = (SIGNALS[name](model, batch, 6) for name in ("entropy shape", "doubt"))
    for row, prompt in enumerate(prompts):
        known = plain_entropies(plain, prompt, 6)
        slope = np.polyfit(np.arange(len(known)), known, 1)[0] if len(known) > 1 else 0.0
        roughness = np.abs(np.diff(known)).mean() if len(known) > 1 else 0.0
        np.testing.assert_allclose(shapes[row], [np.mean(known), slope, roughness], rtol=1e-3, atol=1e-5)
        assert doubts[row, 1] == pytest.approx(np.mean(known), rel=1e-3)
    found = signals(model, batch, 6)
    torch.testing.assert_close(doubts[:, 0], found.confidence.log())
    torch.testing.assert_close(SIGNALS["divergence"](model, batch, 6), torch.stack([found.gap, found.divergence], 1))
    layers = (round(model.config.num_hidden_layers * 2 / 3), model.config.num_hidden_layers)
    torch.testing.assert_close(SIGNALS["states"](model, batch, 6), prompt_states(model, batch, layers))


def test_two_samples_agree_as_far_as_they_begin_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dami.patch_model(*pair("qwen3"))
    model.generation_config.eos_token_id = 1
    said = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 8], [4, 1, 0, 0], [4, 1, 0, 0], [4, 1, 0, 0], [4, 5, 6, 1]])
    prompts = torch.full((3, 2), 3)
    monkeypatch.setattr(model, "generate", lambda **given: torch.cat([prompts.repeat_interleave(2, 0), said], 1))
    assert agreement(model, {"input_ids": prompts}, 4)[:, 0].tolist() == [0.5, 1.0, 0.25]


def test_samples_of_a_prompt_are_drawn_side_by_side() -> None:
    model, batch = dami.patch_model(*pair("qwen3")), left_padded([torch.randint(3, VOCABULARY, (n,)) for n in (4, 6)])
    found = agreement(model, batch, 3)
    assert found.shape == (2, 1)
    assert ((found >= 0) & (found <= 1)).all()
