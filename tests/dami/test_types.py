"""What an IDE and mypy know of a pair: `make lint` checks this file's types, and each ignored error must be one."""

from __future__ import annotations

from typing import Any

import dami
import numpy as np
import torch
from dami.patching.model import PairModel
from dami.schedules import linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import assert_type


def test_a_users_program() -> None:
    model, tokenizer = dami.load_pair(*dami.example_pair())
    assert_type(model, PairModel)
    assert_type(tokenizer, PreTrainedTokenizerBase | Any)
    plain: PreTrainedModel = model  # it goes wherever transformers' own do
    batch: Any = tokenizer(["1 + 1 ="], return_tensors="pt")
    model.generate(**batch, intensity=[0.3], prompt_intensity="low", max_new_tokens=1)
    model.generate(**batch, intensity={"*": 0.2, ("mlp", range(4)): linear(1.0, 0.0, steps=4)}, max_new_tokens=1)
    model(**batch, intensity=torch.tensor([1]))
    with dami.intensity(model, 0.5, layers=[0], modules="mlp"):
        model(**batch)
    dami.set_intensity(model, "low")
    assert_type(model.dami.intensity, float | list[float])
    assert_type(dami.twin(model, 0.5), PairModel)
    assert_type(dami.attach(model, None), PairModel)
    assert_type(dami.materialize(model, 0.5), PreTrainedModel)
    assert_type(dami.unpatch_model(plain), PreTrainedModel)


def wrong(model: PairModel, batch: dict[str, torch.Tensor]) -> None:
    """Never run: what mypy is to find."""
    model.generate(intensity={0.5})  # type: ignore[arg-type]
    model.generate(prompt_intensity={"mlp": 0.5})  # type: ignore[arg-type]
    model.forward(intensity=None, **batch).logits  # noqa: B018
    dami.set_intensity(model, {0.5})  # type: ignore[arg-type]
    model.dami.intensities  # type: ignore[attr-defined]  # noqa: B018


def test_numpy_is_taken_as_numbers_are() -> None:
    model = dami.load_pair(*dami.example_pair())[0]
    dami.set_intensity(model, np.float64(0.5))
    assert model.dami.intensity == 0.5
