"""Estimators of a user's own: registered, saved with a pair, and found again by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import dami
import pytest
import torch
from dami.estimators import registry
from dami.estimators.files import StoredIntensity
from torch import Tensor

from tests.dami.families import batch, pair


@dataclass(frozen=True)
class ByLength:
    """A dataclass is stored as it is."""

    tokens: int = 20

    def estimate(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return (batch["attention_mask"].sum(1) / self.tokens).clamp(0, 1)


class Linear:
    """One with weights says itself what is stored."""

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name, self.weight = name, weight

    def estimate(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["input_ids"].float() @ self.weight

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"name": self.name}, {"weight": self.weight}

    @classmethod
    def from_state(cls, settings: dict[str, Any], weights: Mapping[str, Tensor]) -> Linear:
        return cls(settings["name"], weights["weight"])


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))


@pytest.mark.parametrize("estimator", [ByLength(13), Linear("mine", torch.randn(7))], ids=["dataclass", "weights"])
def test_a_registered_estimator_is_saved_with_a_pair_and_loaded_again(estimator: Any, tmp_path: Path) -> None:
    assert dami.register_estimator("mine")(type(estimator)) is type(estimator)
    model = dami.attach(dami.patch_model(*pair("qwen3")), estimator)
    dami.save_pair(model, tmp_path / "pair")
    loaded, _ = dami.load_pair(tmp_path / "pair")
    found, inputs = loaded.dami.estimator, batch("left")
    assert type(found) is type(estimator)
    assert torch.equal(found.estimate(loaded, inputs), estimator.estimate(model, inputs))


def test_a_kind_that_nobody_registered_is_named(tmp_path: Path) -> None:
    dami.register_estimator("mine")(ByLength)
    StoredIntensity(ByLength()).save(tmp_path)
    registry._KINDS.pop("mine")
    with pytest.raises(
        ValueError, match=r"intensity.json must hold .*kind must be one of \[.*'confidence'.*got 'mine'"
    ):
        StoredIntensity.load(tmp_path)


def test_an_installed_package_brings_its_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dami.register_estimator("mine")(ByLength)
    StoredIntensity(ByLength(7)).save(tmp_path / "stored")
    registry._KINDS.pop("mine")
    (tmp_path / "their_estimators.py").write_text(
        "import dami\nfrom tests.dami.estimators import test_registry\n"
        "dami.register_estimator('mine')(test_registry.ByLength)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = EntryPoint("mine", "their_estimators", "dami.estimators")
    monkeypatch.setattr(registry, "entry_points", lambda group: [found] if group == "dami.estimators" else [])
    assert StoredIntensity.load(tmp_path / "stored").estimator == ByLength(7)


def test_what_cannot_be_registered_or_stored_is_named(tmp_path: Path) -> None:
    class Nothing:
        pass

    class Bare:
        def estimate(self, model: Any, batch: Any) -> list[float]:
            return [0.5]

    with pytest.raises(TypeError, match=r"estimator must have a method estimate\(model, batch\), got Nothing"):
        dami.register_estimator("nothing")(Nothing)
    with pytest.raises(TypeError, match=r"estimator must be a dataclass, or have state.* from_state.*, got Bare"):
        dami.register_estimator("bare")(Bare)
    with pytest.raises(ValueError, match="kind must be a new name, got 'static', which is StaticIntensity's"):
        dami.register_estimator("static")(ByLength)
    dami.register_estimator("mine")(ByLength)
    dami.register_estimator("mine")(ByLength)  # a cell of a notebook that runs again
    with pytest.raises(TypeError, match=r"estimator must have settings that JSON can hold, got ByLength\(tokens="):
        StoredIntensity(ByLength(torch.tensor(3))).save(tmp_path)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())
