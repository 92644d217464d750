"""What is decided when vLLM is imported or takes several processes: the second model runner, splitting, compiling."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dami.serving.vllm.pairs import LAMS, answers, prompts_of
from tests.dami.serving.vllm.processes import answers_of

PROMPTS = prompts_of(5, 17, 33, 9, 21)


def check(packed: Any, family: str, format: str, options: dict[str, Any], **environment: str) -> None:
    model = packed(family, format)
    job = {"engine": {"model": str(model), **options}, "ask": {"prompts": PROMPTS}}
    tokens, _ = answers_of(job, **environment)
    assert tokens == answers(model, PROMPTS, LAMS, 16)


def test_the_second_model_runner(packed: Any) -> None:
    """Which is the default on GPUs; here Triton's interpreter runs its kernels. Prompts come in pieces."""
    environment = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    check(packed, "qwen3", "int4", {"max_num_batched_tokens": 32}, **environment)


def test_speculation_by_ngrams(packed: Any) -> None:
    """Answers that repeat themselves: drafts are found, and verified at the request's own λ.

    In a process of its own, as vLLM cannot start another engine once this one has loaded numba.
    """
    prompts, model = [prompt * 4 for prompt in prompts_of(5, 7, 6, 4, 8)], packed("qwen3", "int8")
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    options = {"model": str(model), "speculative_config": speculation, "disable_log_stats": False}
    tokens, counted = answers_of({"engine": options, "ask": {"prompts": prompts, "tokens": 48}})
    assert tokens == answers(model, prompts, LAMS, 48)
    assert counted["vllm:spec_decode_num_accepted_tokens"] > 0


@pytest.mark.slow
def test_speculation_by_the_instruct_end(ends: Any, packed: Any) -> None:
    """As a model of its own, which drafts at λ = 0 for all."""
    model = packed("qwen3", "int8")
    speculation = {"method": "draft_model", "model": str(ends("qwen3")[0]), "num_speculative_tokens": 3}
    options = {"model": str(model), "speculative_config": speculation, "disable_log_stats": False}
    options |= {"default_intensity": 0.5}  # whose place in vLLM's config the draft's loader sees as well
    tokens, counted = answers_of({"engine": options, "ask": {"prompts": PROMPTS}})
    assert tokens == answers(model, PROMPTS, LAMS, 16)
    assert counted["vllm:spec_decode_num_accepted_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "format"), [("llama", "int4"), ("mistral", "w8d4"), ("qwen3_moe", "int8"), ("adapted", "lowrank")]
)
def test_tensor_parallelism(packed: Any, family: str, format: str) -> None:
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "max_num_batched_tokens": 32}
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    check(packed, family, format, options, **environment)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "format"), [("qwen3", "int4"), ("mixtral", "int8")])
def test_pipeline_parallelism(packed: Any, family: str, format: str) -> None:
    """Each stage tests itself. The model of qwen3 has its head tied to its embedding, which then are in two stages."""
    options = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp", "max_num_batched_tokens": 32}
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    check(packed, family, format, options, **environment)


@pytest.mark.slow
def test_experts_in_two_processes(packed: Any) -> None:
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "enable_expert_parallel": True}
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    check(packed, "qwen3_moe", "int4", options, **environment)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "format"), [("qwen3", "int4"), ("qwen3_moe", "pair")])
def test_compiled(packed: Any, family: str, format: str, tmp_path: Any) -> None:
    """Once more from what the first run has kept."""
    for _ in range(2):
        check(packed, family, format, {"enforce_eager": False}, VLLM_CACHE_ROOT=str(tmp_path))
