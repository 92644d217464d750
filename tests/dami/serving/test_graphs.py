"""Steps as captured graphs, against a stand-in for CUDA's that records operations on the CPU and runs them again.

Like a graph, it runs no Python of the step again: whatever a step decided on the host, or left in a tensor that does
not stay, would be wrong in the next. And like a capture, it refuses to read a tensor on the host.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import dami
import pytest
import torch
from dami.generation import attention
from dami.generation.sampling import Logprobs, Sampling
from dami.serving import engine
from dami.serving.engine import Engine, Limits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GptOssConfig, MixtralConfig
from transformers.generation.continuous_batching import initialization, model_runner

from tests.dami.serving.test_batching import GREEDY, LAM, alone, batched, config, patched, prompts

READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal", "is_nonzero")


class Graph(TorchDispatchMode):
    """Records the operations inside its `with` block. `replay` runs them on the same tensors, in the same memory."""

    made: list[Graph] = []  # noqa: RUF012 (emptied for each test)

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        self.made.append(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in READS, f"{func} waits for the device"
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def reset(self) -> None:
        self.operations.clear()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Makes transformers capture steps on the CPU. Returns the graphs."""

    @contextmanager
    def capturing(graph: Graph, stream: Any, pool: Any) -> Iterator[None]:
        with monkeypatch.context() as patch, graph:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            yield

    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(initialization, "get_accelerator_graph_name", lambda: "Graph")
    monkeypatch.setattr(model_runner, "create_accelerator_graph", Graph)
    monkeypatch.setattr(model_runner, "accelerator_graph_capture_context", capturing)
    monkeypatch.setattr(model_runner, "get_memory_pools", lambda: (None, None))
    monkeypatch.setattr(model_runner, "memory_pool_context", lambda pool: nullcontext())
    monkeypatch.setattr(engine, "can_capture", lambda device: True)
    return Graph.made


CAPTURING = config(use_cuda_graph=True, q_padding_interval_size=16, kv_padding_interval_size=64)


# softcaps and windows; a window; routers and experts; attention sinks
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral", "gpt2", MixtralConfig, GptOssConfig])
def test_replayed_steps_answer_as_alone(family: Any, graphs: list[Graph]) -> None:
    model, asked = patched(family), prompts()
    wanted = alone(model, asked, LAM)
    assert batched(model, asked, CAPTURING, intensity=LAM) == wanted
    assert sum(graph.replays for graph in graphs) >= 4


def test_a_graph_is_replayed_at_another_lam(graphs: list[Graph]) -> None:
    model, asked = patched("qwen3"), prompts()
    manager = model.init_continuous_batching(GREEDY, CAPTURING)
    manager.start()
    try:
        for lams in (LAM, LAM[::-1], [0.5] * 5):
            for name, prompt, lam in zip("abcde", asked, lams, strict=True):
                manager.add_request(prompt, f"{name}{lam}", intensity=lam)
            results = {(result := manager.get_result()).request_id: result.generated_tokens for _ in asked}
            answers = [results[f"{name}{lam}"] for name, lam in zip("abcde", lams, strict=True)]
            assert answers == alone(dami.twin(model), asked, lams)
            captured = len(graphs)
        assert len(graphs) == captured
    finally:
        manager.stop(block=True)


async def served(model: Any, cuda_graphs: bool) -> list[tuple[list[int], list[Logprobs | None]]]:
    """What an engine answers to greedy and sampled requests, some with log-probabilities."""
    asked = prompts()
    settings = [
        Sampling(temperature=0.0),
        Sampling(1.0, 0.9, 5, 7, 3),
        Sampling(0.7, seed=3),
        Sampling(0.0, logprobs=0),
    ]
    async with Engine(model, Limits(kv_memory=0.001, max_batch_tokens=32, cuda_graphs=cuda_graphs)) as running:
        rows = [
            running.submit(prompt, lam, sampling, 8, frozenset())
            for prompt, lam, sampling in zip(asked, LAM, settings, strict=False)
        ]
        answers = []
        for row in rows:
            tokens = [token async for news in row for token in news]
            answers.append(([token.id for token in tokens], [token.logprobs for token in tokens]))
        return answers


def test_a_server_samples_and_reports_probabilities_from_replayed_steps(graphs: list[Graph]) -> None:
    model, state = patched("qwen3"), torch.get_rng_state()
    plain = asyncio.run(served(model, cuda_graphs=False))
    assert not graphs
    torch.set_rng_state(state)
    captured = asyncio.run(served(model, cuda_graphs=True))
    assert sum(graph.replays for graph in graphs) > 4
    for (tokens, logprobs), (wanted, wanted_logprobs) in zip(captured, plain, strict=True):
        assert tokens == wanted
        for found, expected in zip(logprobs, wanted_logprobs, strict=True):
            assert (found is None) == (expected is None)
            if found is not None and expected is not None:
                assert found.chosen == pytest.approx(expected.chosen, abs=1e-4)
                assert [token for token, _ in found.top] == [token for token, _ in expected.top]


def test_a_server_captures_on_a_gpu_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Engine(patched("qwen3"), Limits(kv_memory=0.001)).cuda_graphs
    with pytest.raises(ValueError, match="cuda_graphs must be False for a model on cpu, got True"):
        Engine(patched("qwen3"), Limits(kv_memory=0.001, cuda_graphs=True))


def test_a_server_with_graphs(graphs: list[Graph]) -> None:
    limits = Limits(kv_memory=0.001, max_batch_tokens=32)
    assert Engine(patched("qwen3"), limits).cuda_graphs
    assert graphs  # captured before the first request
    assert not Engine(patched("qwen3"), dataclasses.replace(limits, cuda_graphs=False)).cuda_graphs
    assert not Engine(patched("qwen3", invariant=True), limits).cuda_graphs
    with pytest.raises(ValueError, match="cuda_graphs must be False for bits that do not depend on other requests"):
        Engine(patched("qwen3", invariant=True), dataclasses.replace(limits, cuda_graphs=True))
    with pytest.raises(
        ValueError, match="use_cuda_graph must be False for a pair loaded with invariant=True, got True"
    ):
        patched("qwen3", invariant=True).init_continuous_batching(GREEDY, config(use_cuda_graph=True))


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 4}, {"softcap": 2.0}, {"s_aux": torch.tensor([-1.0, 0.5, 2.0, 0.0])}], ids=str
)
def test_the_attention_of_graphs_is_the_attention(options: dict[str, Any]) -> None:
    """With padding after the last sequence: of queries, keys, lengths. What it holds reaches nobody."""
    queries, keys = [3, 1, 1, 6, 1], [9, 20, 1, 6, 33]
    q = torch.randn(1, 4, sum(queries), 8)
    k, v = torch.randn(2, 1, 2, sum(keys), 8).unbind()
    begins = [torch.tensor([0, *torch.tensor(of).cumsum(0)], dtype=torch.int32) for of in (queries, keys)]
    wanted, _ = attention.packed_attention(
        None, q, k, v, None, cu_seq_lens_q=begins[0], cu_seq_lens_k=begins[1], **options
    )
    nan = [torch.cat([x, torch.full((1, x.shape[1], 21, 8), float("nan"))], 2) for x in (q, k, v)]
    padded = [torch.cat([each, each[-1:].repeat(4)]) for each in begins]
    with Graph():
        found, _ = attention.captured_attention(
            None, *nan, None, cu_seq_lens_q=padded[0], cu_seq_lens_k=padded[1], max_length_k=64, **options
        )
    torch.testing.assert_close(found[:, : sum(queries)], wanted, rtol=1e-5, atol=1e-5)
