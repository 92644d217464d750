"""One adapter for the whole dial, learned with transformers' Trainer."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import dami
import pytest
import torch

peft = pytest.importorskip("peft")
FILE = Path(__file__).resolve().parents[2] / "examples" / "train_adapter" / "train.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = spec_from_file_location("train_adapter", FILE)
    assert spec is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def test_a_batch_has_a_lam_for_each_sequence(example: Any) -> None:
    some = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "intensity": 0.25},
        {"input_ids": [8], "labels": [8], "intensity": 1.0},
    ]
    batch = {name: tensor.tolist() for name, tensor in example.collate(some, 0).items()}
    assert batch == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "intensity": [0.25, 1.0],
    }


def test_it_learns_at_drawn_lams_and_the_pair_stays_as_it_is(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--questions", "12", "--held-out", "2", "--steps", "8", "--batch", "4", "--out", str(tmp_path)]
    losses = example.main(arguments)
    assert losses[-1] < 0.8 * losses[0]
    assert "λ = 0.5: 0% of answers in the new words before" in capsys.readouterr().out
    model, tokenizer = dami.load_pair(*dami.example_pair(), dtype=torch.float32)
    inputs: Any = tokenizer("What is 2 + 3?", return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs, intensity=0.5).logits
        adapted = peft.PeftModel.from_pretrained(model, tmp_path)
        assert not torch.equal(adapted(**inputs, intensity=0.5).logits, before)
        assert torch.equal(adapted.unload()(**inputs, intensity=0.5).logits, before)
