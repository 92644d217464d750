from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from transformers.generation.continuous_batching import continuous_api


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny models take no second thread, and a manager that stops need not collect all garbage of a test run."""
    monkeypatch.setattr(continuous_api, "gc", SimpleNamespace(collect=lambda: 0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
