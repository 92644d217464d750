"""The priority of the process that waits for the workers."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
from dami.serving.vllm import polling, register
from dami.serving.vllm.quantization import PairQuantization
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor


@pytest.mark.parametrize(
    ("device", "executor", "quantization", "lowered"),
    [
        ("cpu", MultiprocExecutor, PairQuantization, [10]),
        ("cuda", MultiprocExecutor, PairQuantization, []),
        ("cpu", UniProcExecutor, PairQuantization, []),  # which computes in this process
        ("cpu", MultiprocExecutor, object, []),
    ],
)
def test_who_polls_beside_the_workers_of_a_pair_gives_way_to_them(
    device: str, executor: Any, quantization: Any, lowered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(os, "nice", called.append)
    engine = SimpleNamespace(
        vllm_config=SimpleNamespace(
            device_config=SimpleNamespace(device_type=device), quant_config=object.__new__(quantization)
        ),
        model_executor=object.__new__(executor),
    )
    polling._run_busy_loop(lambda self: called.append(self), engine)
    assert called == [*lowered, engine]
    register()
    assert EngineCoreProc.run_busy_loop.wrapped_by_dami
