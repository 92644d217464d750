"""Decoding in pieces against one `generate` of all rows."""

from __future__ import annotations

from typing import Any

import dami
import pytest
import torch
import transformers
from dami.generation import pieces as decoding
from dami.generation.pieces import generate_in_pieces, room

from tests.dami.families import VOCABULARY, pair

LAMS = [0.0, 0.3, 1.0, 0.5, -0.2]


def prompts() -> dict[str, torch.Tensor]:
    mask = torch.arange(7) >= torch.tensor([0, 3, 5, 1, 2])[:, None]
    return {"input_ids": torch.randint(3, VOCABULARY, (5, 7)), "attention_mask": mask.long()}


@pytest.mark.parametrize("lams", [LAMS, {"*": LAMS, "mlp": LAMS[::-1], ("attn", (1,)): LAMS[2:] + LAMS[:2]}])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2"])
def test_pieces_say_what_one_generate_says(family: str, lams: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With global and sliding attention, with and without rotary positions, where rows end in different pieces."""
    monkeypatch.setattr(decoding, "PIECE", 3)
    model = dami.patch_model(*pair(family))
    batch, options = prompts(), {"do_sample": False, "max_new_tokens": 11}
    whole = model.generate(**batch, intensity=lams, **options, eos_token_id=[])[:, 7:]
    model.generation_config.eos_token_id = [int(whole[0, 1]), int(whole[3, 4]), int(whole[2, 7])]
    found = generate_in_pieces(model, batch, lams, **options)
    for row, wanted in zip(found.tolist(), whole.tolist(), strict=True):
        at = [i for i, token in enumerate(wanted) if token in model.generation_config.eos_token_id]
        end = at[0] + 1 if at else len(wanted)
        assert row[:end] == wanted[:end]


def test_a_model_with_states_runs_in_one_piece() -> None:
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    config.update({"pad_token_id": 0, "eos_token_id": 2})
    model = transformers.MambaForCausalLM(config).eval()
    batch, options = prompts(), {"do_sample": False, "max_new_tokens": 40}
    assert torch.equal(generate_in_pieces(model, batch, **options), model.generate(**batch, **options)[:, 7:])


def test_sampling_is_reproducible_and_an_ordinary_model_will_do() -> None:
    model, batch = pair("qwen3")[0], prompts()
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        drawn.append(generate_in_pieces(model, batch, do_sample=True, temperature=2.0, max_new_tokens=20))
    assert torch.equal(*drawn)


def test_an_option_that_pieces_would_change_is_refused() -> None:
    with pytest.raises(ValueError, match=r"options must be of \[.*\], got \['min_new_tokens'\]"):
        generate_in_pieces(pair("qwen3")[0], prompts(), min_new_tokens=3)


def test_an_answer_has_the_room_that_the_model_has() -> None:
    """Published generation configs say nothing of a length, where transformers would generate 20 tokens."""
    model = pair("qwen3")[0]  # of 64 tokens
    model.generation_config.eos_token_id = None
    batch = prompts()
    assert room(model, 7) == generate_in_pieces(model, batch, do_sample=False).shape[1] == 57
    assert room(model, 60, 40) == 4
    model.generation_config.max_length = 27
    assert room(model, 7) == 20
    assert room(model, 7, 30) == 30
    model.generation_config.max_new_tokens = 5
    assert room(model, 60) == 4
    assert room(model, 7) == generate_in_pieces(model, batch, do_sample=False).shape[1] == 5
    with pytest.raises(ValueError, match="prompts must leave room for an answer in 64 tokens, got 64"):
        generate_in_pieces(model, {name: each.repeat(1, 10)[:, :64] for name, each in batch.items()})
    endless = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(ValueError, match="max_new_tokens must be given: the model does not say"):
        room(endless, 7)
    assert room(endless, 7, 9) == 9
