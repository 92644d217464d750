"""How the server draws the tokens of a request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import dami
import pytest
from dami.serving.protocol import ChatRequest
from dami.serving.sampling import SamplingDefaults, sampling_of


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


def sampling(model: Any, lam: float, **fields: Any) -> Any:
    """How the tokens of a request at λ are drawn."""
    body = ChatRequest(messages=[{"role": "user", "content": "1 + 1 ="}], **fields)
    return sampling_of(body, SamplingDefaults.of_ends(model), 0, lam)


def test_a_request_samples_as_the_end_nearer_to_its_lam(ends: tuple[Path, Path], tmp_path: Path) -> None:
    pair, _ = dami.load_pair(*ends)
    packed, _ = dami.load_pair(dami.pack(*ends, tmp_path / "packed"))
    for model in (pair, packed):
        for lam in (-0.2, 0.0, 0.49):
            own = sampling(model, lam)
            assert (own.temperature, own.top_k, own.top_p) == (0.7, 20, 0.95)
        for lam in (0.5, 1.0, 1.2):
            own = sampling(model, lam)
            assert (own.temperature, own.top_k, own.top_p) == (0.6, 0, 0.9)
        own = sampling(model, 1.0, temperature=0.1, top_k=5)
        assert (own.temperature, own.top_k, own.top_p) == (0.1, 5, 0.9)
