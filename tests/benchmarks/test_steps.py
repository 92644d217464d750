"""Where a step's time goes is what a profiler has seen of the generating thread, by the file it was in."""

from __future__ import annotations

from benchmarks.serving.steps import REST, parts_of

LOOP = "process;thread (0x1);LerpManager._generation_loop_body (dami/generation/batching.py:234)"


def test_samples_are_counted_by_where_they_end() -> None:
    lines = [
        f"{LOOP};forward (transformers/models/qwen3/modeling_qwen3.py:1);lerp_linear (dami_kernels/ops/direct.py:35) 7",
        f"{LOOP};_attend (dami/generation/attention.py:191) 5",
        f"{LOOP};forward (transformers/models/qwen3/modeling_qwen3.py:82) 2",
        f"{LOOP};update (transformers/generation/continuous_batching/cache.py:410) 3",
        f"{LOOP};update_batch (transformers/generation/continuous_batching/continuous_api.py:9) 4",
        f"{LOOP};_call_impl (torch/nn/modules/module.py:1783) 1",
        f"{LOOP};wait (threading.py:331) 100",
        "process;MainThread;run (asyncio/runners.py:190);take (dami/serving/engine.py:99) 100",
    ]
    assert parts_of(lines) == {
        "our kernels, with the check of their operands": 7,
        "attention, with its products": 5,
        "transformers: the model, with its activations and rotations": 2,
        "transformers: the KV cache": 3,
        "transformers: batching": 4,
        REST: 1,
    }
