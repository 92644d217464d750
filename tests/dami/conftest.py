"""What these tests share. Their models are tiny, so a second thread costs more than it brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dami.generation import compiled


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that compiled decoding has made; they run as they are."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def compile(graph: Any, inputs: Any, wrap: Callable[..., Any]) -> Callable[..., Any]:
        code = backend(graph, inputs)
        wrapped = wrap(lambda arguments: code(*arguments))
        return lambda *arguments: wrapped([*arguments])

    monkeypatch.setattr(compiled, "how", lambda device: {"fullgraph": True, "backend": backend})
    monkeypatch.setattr(compiled, "compiler", lambda options: compile)
    return graphs
