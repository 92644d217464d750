"""One engine, mixed λ: every answer is, token for token, that of a model merged at its λ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dami.serving.vllm.engines import ask, engine, tokens_of
from tests.dami.serving.vllm.pairs import LAMS, answers, prompts_of, reference

PROMPTS = prompts_of(5, 17, 33, 9, 61)


@pytest.fixture(scope="module")
def pair(packed: Any) -> Path:
    return packed("qwen3", "int4")


@pytest.fixture(scope="module")
def llm(pair: Path) -> Iterator[Any]:
    """Prompts come in pieces of 32 tokens at most, beside others' answers; prefixes are cached; λ is 0.5 by default."""
    settings = {"default_intensity": 0.5, "intensity_range": [-0.5, 1.5]}
    with engine(pair, max_num_batched_tokens=32, enable_prefix_caching=True, **settings) as llm:
        yield llm


def test_a_mixed_batch_is_that_of_merged_models(llm: Any, pair: Path) -> None:
    assert tokens_of(ask(llm, PROMPTS)) == answers(pair, PROMPTS, LAMS, 16)


def test_the_default_is_settable(llm: Any, pair: Path) -> None:
    assert tokens_of(ask(llm, PROMPTS[:2], [None, 0])) == answers(pair, PROMPTS[:2], [0.5, 0], 16)


def test_several_answers_share_their_request_s_intensity(llm: Any, pair: Path) -> None:
    found = ask(llm, PROMPTS[:2], [0.3, 1.0], n=3, temperature=1, top_k=1)  # n > 1 has to sample
    wanted = answers(pair, PROMPTS[:2], [0.3, 1.0], 16)
    assert [[list(one.token_ids) for one in output.outputs] for output in found] == [[tokens] * 3 for tokens in wanted]


def test_log_probabilities_of_prompts(llm: Any, pair: Path) -> None:
    """Whose rows are not those that are sampled from; in pieces, and past what is cached."""
    for lam, prompt, output in zip(LAMS, PROMPTS, ask(llm, PROMPTS, tokens=4, prompt_logprobs=0), strict=True):
        logits = reference(pair, lam)(torch.tensor([prompt])).logits[0]
        wanted = logits.log_softmax(-1)[range(len(prompt) - 1), prompt[1:]]
        found = [
            position[token].logprob for position, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        ]
        torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-4, rtol=1e-4)


def test_prefixes_are_shared_within_a_lambda_only(llm: Any, pair: Path) -> None:
    first, second = ([*prompts_of(70, seed=5)[0], *tail] for tail in ([7, 8], [9, 10, 11]))
    reused = []
    for lam, prompt in ((0.2, first), (0.2, second), (0.9, first), (0.9, second), (0.2, first)):
        (output,) = ask(llm, [prompt], [lam])
        assert tokens_of([output]) == answers(pair, [prompt], [lam], 16)
        reused.append(output.num_cached_tokens)
    assert reused == [0, 64, 0, 64, 64]


def test_the_client_s_salt_still_counts(llm: Any) -> None:
    (prompt,) = prompts_of(70, seed=6)
    from vllm import SamplingParams

    def cached(salt: str, lam: float) -> int:
        params = SamplingParams(max_tokens=1, detokenize=False, extra_args={"intensity": lam})
        asked = {"prompt_token_ids": prompt, "cache_salt": salt}
        return llm.generate([asked], params, use_tqdm=False)[0].num_cached_tokens

    found = [cached("one", 0.5), cached("one", 0.5), cached("two", 0.5), cached("one", 0.6), cached("one", 0.5)]
    assert found == [0, 64, 0, 0, 64]


def test_the_caller_s_parameters_are_left_alone(llm: Any) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, detokenize=False)
    llm.generate([{"prompt_token_ids": PROMPTS[0]}], params, use_tqdm=False)
    assert params.extra_args is None


WRONG = {
    "auto": "intensity 'auto' needs an estimator, and this pair has none",
    "0.3": "intensity must be a number, a preset, of which the model has none, or 'auto', got '0.3'",
    None: "intensity must be .*, got NoneType; vLLM takes a number, a preset or 'auto'",
    True: "intensity must be .*, got True; vLLM takes a number, a preset or 'auto'",
    (0.3,): "intensity must be one number, got 1: vLLM takes no more",
    math.nan: "intensity must be finite",
    math.inf: "intensity must be finite",
    1.51: "intensity must be in -0.5 to 1.5 on this server, got 1.51",
    -0.6: "intensity must be in -0.5 to 1.5 on this server, got -0.6",
    10**18: "intensity must be in -0.5 to 1.5 on this server, got 1000000000000000000",
}


@pytest.mark.parametrize(("value", "message"), WRONG.items())
def test_what_is_no_intensity_is_refused(llm: Any, value: Any, message: str) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, detokenize=False)
    params.extra_args = {"intensity": list(value) if isinstance(value, tuple) else value}
    with pytest.raises(ValueError, match=message):
        llm.generate([{"prompt_token_ids": PROMPTS[0]}], params, use_tqdm=False)


@pytest.mark.parametrize(
    "name", ["intensty", "Intensity", "prompt_intensty", "lambda", "dami_pilot", "dami_trajectory"]
)
def test_arguments_that_nobody_reads_are_refused(llm: Any, name: str) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, detokenize=False, extra_args={name: 1.0})
    message = f"extra arguments of a request to a pair must be intensity, .* or answer_intensity, got '{name}'"
    with pytest.raises(ValueError, match=message):
        llm.generate([{"prompt_token_ids": PROMPTS[0]}], params, use_tqdm=False)


def test_arguments_that_somebody_reads_pass(llm: Any) -> None:
    from vllm import SamplingParams

    args = {"intensity": 0.5, "kv_cache_report_mode": "incremental"}
    params = SamplingParams(max_tokens=1, detokenize=False, extra_args=args)
    assert llm.generate([{"prompt_token_ids": PROMPTS[0]}], params, use_tqdm=False)


def test_what_was_refused_leaves_the_engine_running(llm: Any, pair: Path) -> None:
    assert tokens_of(ask(llm, PROMPTS[:1], [0.7])) == answers(pair, PROMPTS[:1], [0.7], 16)


def test_beams_are_refused(llm: Any) -> None:
    from vllm.sampling_params import BeamSearchParams

    with pytest.raises(ValueError, match="beam search is not supported with a pair: it drops the intensity"):
        llm.beam_search([{"prompt_token_ids": PROMPTS[0]}], BeamSearchParams(beam_width=2, max_tokens=2))
