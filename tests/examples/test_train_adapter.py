"""One adapter for the whole dial, learned with transformers' Trainer."""

from __future__ import annotations

import random
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import dami
import pytest
import torch

from tests.dami.families import VOCABULARY, pair

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


def test_the_adapter_learns_at_every_lam_and_the_pair_stays_as_it_is(example: Any, tmp_path: Path) -> None:
    """Of a tiny pair: the same token after each other, whatever λ is."""
    model = dami.patch_model(*pair("qwen3"))
    chance = random.Random(0)
    rows = [[chance.randrange(3, VOCABULARY) for _ in range(6)] for _ in range(32)]
    some = [{"input_ids": row, "labels": [-100] + [7] * 5, "intensity": chance.random()} for row in rows]
    inputs = {"input_ids": torch.tensor(rows[:3])}
    lams = [0.0, 0.5, 1.0]
    with torch.no_grad():
        before = model(**inputs, intensity=lams).logits.log_softmax(-1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    losses = example.train(
        adapted, some, 0, output_dir=str(tmp_path), max_steps=16, per_device_train_batch_size=8, learning_rate=0.02,
        logging_steps=1, use_cpu=True,
    )  # fmt: skip
    assert losses[-1] < 0.6 * losses[0]
    with torch.no_grad():
        after = adapted.eval()(**inputs, intensity=lams).logits.log_softmax(-1)
        assert ((after - before)[..., 7].mean(1) > 1).all()  # at each λ
        assert torch.equal(adapted.unload()(**inputs, intensity=lams).logits.log_softmax(-1), before)


@pytest.mark.slow
def test_the_shipped_pair_learns_new_words(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = example.main(["--questions", "64", "--held-out", "8", "--steps", "40", "--out", str(tmp_path)])
    assert losses[-1] < 0.5 * losses[0]
    assert "λ = 1: 0% of answers in the new words before, " in capsys.readouterr().out
    peft.PeftModel.from_pretrained(dami.load_pair(*dami.example_pair())[0], tmp_path)
