"""What is decided when vLLM is imported or takes several processes: the second model runner, splitting, compiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dami
import pytest
import torch
from dami.estimators.files import StoredIntensity

from tests.dami.serving.vllm.pairs import LAMS, answer_by_place, answers, prompts_of
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


ARGUMENTS: list[Any] = [
    {"intensity": "auto"},
    {"intensity": 1.0, "prompt_intensity": 0.0, "prompt_tail": 3},
    {"intensity": 1.0, "intensity_schedule": [[4, 0.0]]},
]


def check_the_dial(options: dict[str, Any], tmp_path: Path, **environment: str) -> None:
    """λ that the estimator chooses, of prompts, and by a schedule."""
    pair = dami.pack(*dami.example_pair(), tmp_path / "pair", format="int8")
    model, tokenizer = dami.load_pair(pair)
    prompt = tokenizer("<|user|>47 + 38 - 12 =<|assistant|>")["input_ids"] * 3
    chosen = (
        StoredIntensity.load(pair / "intensity").estimator.estimate(model, {"input_ids": torch.tensor([prompt])}).item()
    )
    job = {"engine": {"model": str(pair), **options}, "ask": {"prompts": [prompt] * 3, "lams": ARGUMENTS}}
    tokens, _ = answers_of(job, **environment)
    last = len(prompt) - 1
    assert tokens == [
        answers(pair, [prompt], [chosen], 16)[0],
        answer_by_place(pair, prompt, 16, lambda place: 0.0 if place < last - 2 else 1.0),
        answer_by_place(pair, prompt, 16, lambda place: 1.0 - 0.25 * min(max(place - last, 0), 4)),
    ]


def test_the_dial_in_the_second_model_runner(tmp_path: Path) -> None:
    environment = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    check_the_dial({"max_num_batched_tokens": 32, "enable_prefix_caching": True}, tmp_path, **environment)


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
@pytest.mark.parametrize(
    ("family", "format"), [("llama", "int4"), ("mistral", "w8d4"), ("qwen3_moe", "int8"), ("adapted", "lowrank")]
)
def test_tensor_parallelism(packed: Any, family: str, format: str) -> None:
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "max_num_batched_tokens": 32}
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


@pytest.mark.slow
def test_the_dial_of_a_compiled_model(tmp_path: Path) -> None:
    check_the_dial({"enforce_eager": False}, tmp_path, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
