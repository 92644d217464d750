"""A LoRA adapter as the instruct end, and as the thinking end a checkpoint that differs from its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dami
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.dami.families import batch
from tests.dami.test_policies import ends as ends  # a fixture
from tests.dami.test_policies import resized, to_dtype, untie

peft = pytest.importorskip("peft")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # PEFT adds the product of factors to the output, dami to the weight


@pytest.fixture
def adapted(ends: tuple[Path, Path], tmp_path: Path) -> Any:
    """PEFT's model of an adapter on the instruct end, saved in the folder "adapter"."""
    plain = AutoModelForCausalLM.from_pretrained(ends[0])
    model = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return model.eval()


@torch.no_grad()
def test_the_base_of_the_instruct_end_may_be_the_thinking_end(
    adapted: Any, ends: tuple[Path, Path], tmp_path: Path
) -> None:
    model, _ = dami.load_pair(tmp_path / "adapter", ends[0])
    inputs = batch("left")
    torch.testing.assert_close(model(**inputs, intensity=0.0).logits, adapted(**inputs).logits, **CLOSE)
    with adapted.disable_adapter():
        torch.testing.assert_close(model(**inputs, intensity=1.0).logits, adapted(**inputs).logits, **CLOSE)
    with pytest.raises(ValueError, match="must be two checkpoints, got adapter twice"):
        dami.load_pair(tmp_path / "adapter", tmp_path / "adapter")


@torch.no_grad()
def test_differences_to_the_base_are_resolved(adapted: Any, ends: tuple[Path, Path], tmp_path: Path) -> None:
    resized(ends[1], 110)
    untie(ends[1])
    to_dtype(ends[1], torch.bfloat16)
    model, _ = dami.load_pair(tmp_path / "adapter", ends[1])
    inputs = batch("left")
    told = {each["subject"] for each in model.dami_patch.origin.differences}
    assert {"vocabulary", "head", "dtype"} <= told
    logits = model(**inputs, intensity=0.0).logits
    torch.testing.assert_close(logits[..., :101], adapted(**inputs).logits, **CLOSE)
    assert (logits[..., 101:] == float("-inf")).all()
    expected, _ = dami.load_pair(*ends)
    assert torch.equal(model(**inputs, intensity=1.0).logits, expected(**inputs, intensity=1.0).logits)
    packed, _ = dami.load_pair(dami.pack(tmp_path / "adapter", ends[1], tmp_path / "packed", "pair"))
    assert torch.equal(packed(**inputs, intensity=0.3).logits, model(**inputs, intensity=0.3).logits)
    assert packed.dami_patch.origin.differences == model.dami_patch.origin.differences
