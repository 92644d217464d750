"""What the server does with a request before the engine has it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dami
import pytest
from dami.serving.protocol import ChatRequest
from dami.serving.service import Service, ServiceSettings


@pytest.fixture
def ends(tmp_path: Path) -> tuple[Path, Path]:
    """The shipped pair, whose ends sample in their own ways."""
    for end, name, own in zip(
        dami.example_pair(),
        ("instruct", "thinking"),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        strict=True,
    ):
        shutil.copytree(end, tmp_path / name)
        file = tmp_path / name / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    return tmp_path / "instruct", tmp_path / "thinking"


def sampling(model: Any, tokenizer: Any, lam: float, **fields: Any) -> Any:
    """How the tokens of a request at λ are drawn."""
    about: dict[str, Any] = {"max_model_len": 64, "controller": None, "load": 0, "death": None, "presets": {}}
    engine: Any = SimpleNamespace(model=model, **about)
    body = ChatRequest(messages=[{"role": "user", "content": "1 + 1 ="}], **fields)
    return Service(engine, tokenizer, ServiceSettings())._sampling(body, 0, lam)


def test_a_request_samples_as_the_end_nearer_to_its_lam(ends: tuple[Path, Path], tmp_path: Path) -> None:
    pair = dami.load_pair(*ends)
    packed = dami.load_pair(dami.pack(*ends, tmp_path / "packed"))
    for model, tokenizer in (pair, packed):
        for lam in (-0.2, 0.0, 0.49):
            own = sampling(model, tokenizer, lam)
            assert (own.temperature, own.top_k, own.top_p) == (0.7, 20, 0.95)
        for lam in (0.5, 1.0, 1.2):
            own = sampling(model, tokenizer, lam)
            assert (own.temperature, own.top_k, own.top_p) == (0.6, 0, 0.9)
        own = sampling(model, tokenizer, 1.0, temperature=0.1, top_k=5)
        assert (own.temperature, own.top_k, own.top_p) == (0.1, 5, 0.9)
