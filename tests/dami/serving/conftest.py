from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dami.serving import engine
from transformers.generation.continuous_batching.requests import RequestState

from benchmarks.serving.server import Server, serving

KEY = "a-key-of-these-tests"
POINTS = [
    {"intensity": lam, "accuracy": [share, share - 0.06, share + 0.06], "tokens": [tokens, tokens - 1, tokens + 2]}
    for lam, share, tokens in ((0.0, 0.4, 6), (0.25, 0.58, 18.5), (0.5, 0.7, 31), (0.75, 0.8, 40), (1.0, 0.83, 56))
]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny models take no second thread, and servers that start or stop need not collect all garbage of a test run."""
    monkeypatch.setattr(gc, "collect", lambda generation=2: 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _no_certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No server here speaks TLS, and reading the world's certificates takes a client longer than its request does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SSL_CERT_FILE", raising=False)
        patch.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("certificates")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _short_trial() -> Iterator[None]:
    """Engines in this process try a model out with two tokens, twice, instead of 32, which take half a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "WARMUP", 2)
        yield


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A `dami serve` of the shipped pair, whose answers do not depend on their neighbours. Requests must bring KEY."""
    frontier: Path = tmp_path_factory.mktemp("pair") / "frontier.json"
    frontier.write_text(json.dumps({"points": POINTS}))
    options = ["--invariant", "--api-key", KEY, "--frontier", str(frontier), "--target-latency", "60"]
    with serving(*options, threads=1) as running:
        yield running


@pytest.fixture
def evicted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list with an entry for each request that a full cache has evicted."""
    found: list[int] = []
    original = RequestState.create_equivalent_initial_request

    def noted(self: RequestState) -> RequestState:
        found.append(1)
        return original(self)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", noted)
    return found
