"""Continuous batching: every request, token for token, against `generate` of the same model at its λ alone."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

import dami
import numpy as np
import pytest
import torch
import transformers
from dami import upstream
from dami.generation.batching import HONOURED, IDLE, NEUTRAL, LerpManager, StepLoad, check_config
from dami.generation.sampling import Sampler, Sampling
from transformers import (
    AfmoeConfig,
    CohereConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)
from transformers.generation.continuous_batching.requests import RequestState

from dami_kernels import native
from tests.dami import architectures
from tests.dami.architectures import VOCABULARY
from tests.dami.families import pair

LAM = [0.0, 0.37, 1.0, 1.2, -0.4]
LENGTHS = (5, 12, 3, 9, 17)
NEW = 8
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=-1)
SMALL = ContinuousBatchingConfig(page_size=4, num_blocks=64, max_batch_tokens=64)


def config(**changes: Any) -> ContinuousBatchingConfig:
    return dataclasses.replace(SMALL, **changes)


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    return [torch.randint(4, VOCABULARY, (length,)).tolist() for length in lengths]


def alone(model: Any, asked: Sequence[list[int]], lams: Sequence[float], new: int = NEW) -> list[list[int]]:
    """What `generate` answers to each prompt by itself."""
    options = {"do_sample": False, "max_new_tokens": new}
    rows = []
    for prompt, lam in zip(asked, lams, strict=True):
        ids = torch.tensor([prompt])
        full = model.generate(ids, attention_mask=torch.ones_like(ids), intensity=lam, **options)
        rows.append(full[0, len(prompt) :].tolist())
    return rows


def batched(model: Any, asked: list[list[int]], batching: ContinuousBatchingConfig, **options: Any) -> list[list[int]]:
    outputs = model.generate_batch(asked, GREEDY, batching, **options)
    assert [output.error for output in outputs.values()] == [None] * len(asked)
    return [output.generated_tokens for output in outputs.values()]


def run(model: Any, asked: Sequence[list[int]], batching: Any = SMALL, **each: Sequence[Any]) -> tuple[list[Any], int]:
    """What a batch answers that arrives at once, and how many tokens it reads, answers included."""
    manager = model.init_continuous_batching(GREEDY, batching)
    steps: list[StepLoad] = []
    manager.on_step = steps.append
    for place, prompt in enumerate(asked):  # before it starts
        manager.add_request(prompt, str(place), **{name: values[place] for name, values in each.items()})
    manager.start()
    try:
        results = [manager.get_result(timeout=60) for _ in asked]
    finally:
        manager.stop()
    assert [result.error for result in results] == [None] * len(asked)
    said = {int(result.request_id): result.generated_tokens for result in results}
    return [said[place] for place in range(len(asked))], sum(step.tokens for step in steps)


def patched(name: Any, **options: Any) -> Any:
    ends = pair(name) if isinstance(name, str) else architectures.pair(name)
    model = dami.patch_model(*ends, **options)
    model.generation_config.eos_token_id = None
    return model


# softcaps and windows; biases and a window; tied embeddings; learned positions; routers and experts; attention sinks
# routers that read their weight in float32, norms of their own, gates after attention
OTHERS = [Glm4MoeConfig, CohereConfig, AfmoeConfig]
FAMILIES = ["gemma2", "llama", "mistral", "qwen3", "gpt2", MixtralConfig, Qwen3MoeConfig, GptOssConfig, *OTHERS]


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_at_their_own_lam_answer_as_alone(family: Any) -> None:
    """In one step for all prompts, and in steps of a few tokens, which cut prompts in pieces."""
    model, asked = patched(family), prompts()
    wanted = alone(model, asked, LAM)
    before = model.config._attn_implementation
    for tokens in (64, 7):
        assert batched(model, asked, config(max_batch_tokens=tokens), intensity=LAM) == wanted
    assert model.config._attn_implementation == before
    assert alone(model, asked[:1], LAM[:1]) == wanted[:1]


def test_ends_that_are_the_same_answer_alike_at_any_lam() -> None:
    instruct, _ = pair("llama")
    model, asked = dami.patch_model(instruct, copy.deepcopy(instruct)), prompts()
    model.generation_config.eos_token_id = None
    assert batched(model, asked, SMALL, intensity=LAM) == alone(model, asked, LAM)


@pytest.mark.parametrize(("family", "reads"), [("llama", True), ("gemma2", False)])
@pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
def test_keys_are_read_where_they_lie(family: str, reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layer of every step, unless windows slide: then transformers gathers them."""
    model, steps, calls, attention = patched(family), [], [], native.attention
    monkeypatch.setattr(native, "attention", lambda *args: calls.append(args) or attention(*args))
    with model.continuous_batching_context_manager(GREEDY, SMALL) as manager:
        manager.on_step = lambda load: steps.append(load) if load.rows else None
        manager.add_requests(prompts(), intensity=LAM)
        list(islice(manager, len(LAM)))
    assert steps
    assert len(calls) == (len(steps) * model.config.num_hidden_layers if reads else 0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_transformers_own_attention_may_be_kept(family: str, implementation: str) -> None:
    model, asked = patched(family), prompts()
    model.set_attn_implementation(implementation)
    kept = config(auto_switch_to_flash=False, max_batch_tokens=7)
    assert batched(model, asked, kept, intensity=LAM) == alone(model, asked, LAM)


def test_attention_that_forgets_soft_caps_is_refused() -> None:
    model = patched("gemma2")
    with pytest.raises(ValueError, match="'eager' leaves out soft caps in continuous batching: use the default"):
        batched(model, prompts(), config(auto_switch_to_flash=False), intensity=LAM)
    assert model.config._attn_implementation == "eager"
    assert batched(model, prompts()[:1], SMALL, intensity=0.5)


@pytest.mark.parametrize("format", ["int8", "w8d4"])
def test_packed_formats(format: str) -> None:
    model, asked = patched(MixtralConfig, format=format), prompts()
    assert batched(model, asked, config(max_batch_tokens=7), intensity=LAM) == alone(model, asked, LAM)


def test_shipped_pair() -> None:
    model, tokenizer = dami.load_pair(*dami.example_pair(), dtype=torch.float32)
    model.generation_config.eos_token_id = None
    asked = tokenizer([f"<|user|>What is {n} + 69 - 18?<|assistant|>" for n in range(40, 45)])["input_ids"]
    assert batched(model, asked, config(max_batch_tokens=16), intensity=LAM) == alone(model, asked, LAM)


def test_requests_evicted_from_a_full_cache_come_back_at_their_lam(evicted: list[int]) -> None:
    model, asked = patched("qwen3"), prompts([9, 10, 11, 12, 13])
    tight = config(num_blocks=12, safety_margin=0.0)
    said, _ = run(model, asked, tight, intensity=LAM)
    assert said == alone(model, asked, LAM)
    assert evicted


def test_prompts_share_blocks_at_equal_lam_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, [asked] = patched("qwen3"), prompts([21])
    lams = [0.0, 1.0, 1.0, 0.0, 0.3]
    wanted = alone(model, [asked] * 5, lams)
    manager = model.init_continuous_batching(GREEDY, SMALL)
    manager.warmup()
    found = []
    search = manager.batch_processor.cache.search_prefix_match
    monkeypatch.setattr(
        manager.batch_processor.cache, "search_prefix_match", lambda *a: found.append(search(*a)) or found[-1]
    )
    manager.start()
    try:
        answers = []
        for lam in lams:  # each when the one before has ended
            manager.add_request(asked, intensity=lam)
            answers.append(manager.get_result(timeout=30).generated_tokens)
    finally:
        manager.stop(hard_stop=True)
    assert answers == wanted
    assert found == [0, 0, 20, 20, 0]


@pytest.mark.parametrize("token", [-1, 101, 1 << 23, (1 << 23) + 5])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    """No embedding has them."""
    model = patched("qwen3")
    with pytest.raises(ValueError, match=rf"input_ids must be from 0 to 100, got {min(token, 5)} to {max(token, 6)}$"):
        model.init_continuous_batching(GREEDY, SMALL).add_request([5, token, 6], intensity=0.5)


def test_several_answers_to_a_prompt_have_its_lam() -> None:
    model, asked = patched("qwen3"), prompts([6, 9])
    several = GenerationConfig(do_sample=True, top_k=1, max_new_tokens=NEW, eos_token_id=-1, num_return_sequences=3)
    outputs = model.generate_batch(asked, several, SMALL, intensity=[0.2, 0.9])
    first, second = alone(model, asked, [0.2, 0.9])
    assert [output.generated_tokens for output in outputs.values()] == [first] * 3 + [second] * 3


def test_lam_is_that_of_the_dial_where_none_is_given() -> None:
    model, asked = patched("qwen3"), prompts([6, 9])
    with dami.intensity(model, 0.7):
        assert batched(model, asked, SMALL) == alone(model, asked, [0.7, 0.7])
    with dami.intensity(model, [0.7, 0.1]):
        assert batched(model, asked, SMALL) == alone(model, asked, [0.7, 0.1])


def test_names_stand_for_lam() -> None:
    class ByLength:
        def estimate(self, model: Any, batch: Any) -> Any:
            return batch["attention_mask"].sum(1) / 10

    model, asked = dami.attach(patched("qwen3"), ByLength(), {"low": 0.2}), prompts([6, 9, 4])
    assert batched(model, asked, SMALL, intensity=["low", "auto", 0.7]) == alone(model, asked, [0.2, 0.9, 0.7])


def test_a_part_of_the_model_may_stand_at_one_lam() -> None:
    model, asked = patched("qwen3"), prompts([6, 9])
    with dami.intensity(model, 1.0, modules="mlp"):
        assert batched(model, asked, SMALL, intensity=[0.2, 0.9]) == alone(model, asked, [0.2, 0.9])
    with dami.intensity(model, [0.1, 0.2], modules="mlp"):
        outputs = model.generate_batch(asked, GREEDY, SMALL, intensity=[0.2, 0.9])
    assert all("mlp" in o.error and "takes one intensity for all requests" in o.error for o in outputs.values())


def test_a_model_is_checked_whole_inside_a_block_for_a_part() -> None:
    model = patched("qwen3")
    with dami.intensity(model, 1.0, modules="mlp"):
        model.generate_batch(prompts([6]), GREEDY, SMALL)
    [prompt] = prompts([1])  # tells no module where the tokens are
    assert batched(model, [prompt], SMALL, intensity=0.2) == alone(model, [prompt], [0.2])


def test_no_block_outlives_the_lam_of_a_part() -> None:
    """A manager that lives on keeps blocks of prompts, which another λ of a part has not read."""
    model, asked = patched("qwen3"), prompts([21])
    wanted = alone(model, asked, [0.2])
    with dami.intensity(model, 1.0, modules="mlp"):
        part = alone(model, asked, [0.2])
        assert part != wanted
        assert batched(model, asked, SMALL, intensity=0.2, persistent_manager=True) == part
    assert batched(model, asked, SMALL, intensity=0.2, persistent_manager=True) == wanted
    with dami.intensity(model, 1.0, modules="mlp"):
        assert batched(model, asked, SMALL, intensity=0.2, persistent_manager=True) == part
    model.destroy_cached_continuous_batching_manager()


def test_generate_with_a_paged_cache_takes_a_lam_for_each_prompt() -> None:
    model = patched("qwen3")
    ids = torch.randint(4, VOCABULARY, (3, 9))
    options = {"do_sample": False, "max_new_tokens": NEW}
    plain = model.generate(ids, intensity=LAM[:3], **options)
    paged = model.generate(ids, intensity=LAM[:3], cache_implementation="paged", **options)
    assert torch.equal(paged[0] if paged.dim() == 3 else paged, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intensity": lambda step, tokens: 0.5}, "takes one intensity for all steps, got a schedule"),
        ({"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}, "takes prompts of equal length"),
    ],
)
def test_generate_with_a_paged_cache_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"cache_implementation='paged' {message}"):
        patched("qwen3").generate(torch.full((2, 3), 5), cache_implementation="paged", **{"intensity": 0.5, **options})


@pytest.mark.parametrize(
    ("intensity", "error", "message"),
    [
        (float("nan"), ValueError, "intensity must be finite, got nan"),
        ("low", ValueError, "intensity must be a number or a preset, of which the model has none, got"),
        ("auto", TypeError, "add_request takes a number or a preset as intensity, got 'auto', which is for generate, "),
        (True, TypeError, "intensity must be a real number, or one per sequence, got True"),
        ([0.1, 0.2], ValueError, "intensity must be one number, got 2"),
    ],
)
def test_add_request_refuses(intensity: Any, error: type[Exception], message: str) -> None:
    manager = patched("qwen3").init_continuous_batching(GREEDY, SMALL)
    with pytest.raises(error, match=message):
        manager.add_request([5, 6], intensity=intensity)
    assert manager.input_queue.empty()


@pytest.mark.parametrize("name", ["intensty", "promt_intensity"])
def test_misspelt_keywords_are_refused(name: str) -> None:
    manager = patched("qwen3").init_continuous_batching(GREEDY, SMALL)
    takes = "takes λ as intensity, prompt_intensity and prompt_tail"
    with pytest.raises(TypeError, match=f"^add_request {takes}, got '{name}'"):
        manager.add_request([5, 6], **{name: 1.0})
    with pytest.raises(TypeError, match=f"^add_requests {takes}, got '{name}'"):
        manager.add_requests([[5, 6]], **{name: 1.0})
    assert manager.input_queue.empty()


def test_add_requests_takes_whatever_means_one_lam_for_each() -> None:
    model = dami.attach(patched("qwen3"), None, {"low": 0.25})
    manager, asked = model.init_continuous_batching(GREEDY, SMALL), prompts([4, 5])
    cases = (np.array(0.5), [0.5, 0.5]), ("low", [0.25, 0.25]), (["low", 1], [0.25, 1.0]), (None, [0.0, 0.0])
    for intensity, wanted in cases:
        names = manager.add_requests(asked, intensity=intensity)
        queued = [manager.input_queue.get_nowait() for _ in asked]
        found = {state.request_id: state.logit_processor_kwargs["intensity"] for state in queued}
        assert [found[name] for name in names] == wanted
    with pytest.raises(TypeError, match="intensity must be a real number, or one per sequence, got set"):
        manager.add_requests(asked, intensity={0.5})
    assert manager.input_queue.empty()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("stop_strings", ["a"]),
        ("min_new_tokens", 3),
        ("min_length", 3),
        ("num_beams", 2),
        ("repetition_penalty", 1.1),
        ("no_repeat_ngram_size", 1),
        ("bad_words_ids", [[5]]),
        ("forced_bos_token_id", 0),
        ("guidance_scale", 1.5),
        ("max_time", 1.0),
        ("token_healing", True),
        ("output_scores", True),
    ],
)
def test_settings_that_would_be_ignored_are_refused(setting: str, value: Any) -> None:
    model = patched("qwen3")
    wanted = f"generation_config.{setting} must be left out, which continuous batching does not have, got "
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=-1)
    setattr(config, setting, value)
    with pytest.raises(ValueError, match=re.escape(wanted + repr(value))):
        model.generate_batch([[5]], config, SMALL, intensity=0.5)
    with pytest.raises(ValueError, match=re.escape(wanted)):
        model.init_continuous_batching(config, SMALL)
    with pytest.raises(TypeError, match=f"generate_batch takes no {setting}: settings go into generation_config"):
        model.generate_batch([[5]], GREEDY, SMALL, intensity=0.5, **{setting: value})
    setattr(model.generation_config, setting, value)
    with pytest.raises(ValueError, match=re.escape(wanted)):
        model.generate_batch([[5]], None, SMALL, intensity=0.5)


def test_every_setting_of_transformers_is_honoured_idle_or_refused() -> None:
    """One that is new there is refused until it is looked at."""
    settings = GenerationConfig().to_dict().keys()
    refused = settings - HONOURED - IDLE
    assert refused >= NEUTRAL.keys()
    assert not HONOURED & IDLE
    neutral = GenerationConfig(**{name: NEUTRAL.get(name) for name in refused})
    check_config(neutral)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"typical_p": 1e-6, "top_k": 1}],
)
def test_settings_that_are_honoured(options: dict[str, Any]) -> None:
    """Sampling so narrow that it takes the likeliest token."""
    model, asked = patched("qwen3"), prompts([6, 9])
    config = GenerationConfig(do_sample=True, max_new_tokens=NEW, eos_token_id=-1, **{"top_k": 0, **options})
    outputs = model.generate_batch(asked, config, SMALL, intensity=[0.2, 0.9])
    assert [output.generated_tokens for output in outputs.values()] == alone(model, asked, [0.2, 0.9])


def test_suppressed_tokens_do_not_come() -> None:
    model, asked = patched("qwen3"), prompts([6, 9])
    [first, _] = alone(model, asked, [0.2, 0.9])
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=-1, suppress_tokens=[first[0]])
    said = [output.generated_tokens for output in model.generate_batch(asked, config, SMALL, intensity=0.2).values()]
    for row, prompt in zip(said, asked, strict=True):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": NEW, "suppress_tokens": [first[0]]}
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), intensity=0.2, **options)
        assert row == wanted[0, len(prompt) :].tolist()


def test_max_length_counts_the_prompt() -> None:
    model, asked = patched("qwen3"), prompts([3, 9])
    config = GenerationConfig(do_sample=False, max_length=11, eos_token_id=-1)
    said = [output.generated_tokens for output in model.generate_batch(asked, config, SMALL, intensity=0.5).values()]
    assert said == [alone(model, asked[:1], [0.5], 8)[0], alone(model, asked[1:], [0.5], 2)[0]]
    asked = [list(np.array(prompt)) for prompt in asked]
    shorter = model.generate_batch(asked, config, SMALL, intensity=0.5, max_new_tokens=2).values()
    assert [output.generated_tokens for output in shorter] == [row[:2] for row in said]
    with pytest.raises(ValueError, match=r"max_length less the 11 tokens of inputs\[0\] must be at least 1, got 0"):
        model.generate_batch(prompts([11]), config, SMALL, intensity=0.5)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "must be a list of token ids, one at least, got none"),
        ("ab", TypeError, "must be a list of token ids, one at least, got 'ab'"),
        ([True], TypeError, r"must be a list of token ids, one at least, got \[True\]"),
        ([1.5], TypeError, r"must be a list of token ids, one at least, got \[1.5\]"),
        (torch.tensor([5]), TypeError, r"must be a list of token ids, one at least, got tensor"),
        ([5, 101], ValueError, "must be from 0 to 100, got 5 to 101"),
        ([-1, 5], ValueError, "must be from 0 to 100, got -1 to 5"),
    ],
)
def test_bad_prompts_are_refused(prompt: Any, error: type[Exception], message: str) -> None:
    model = patched("qwen3")
    with pytest.raises(error, match=rf"inputs\[1\] {message}"):
        model.generate_batch([[5], prompt], GREEDY, SMALL, intensity=0.5)
    manager = model.init_continuous_batching(GREEDY, SMALL)
    with pytest.raises(error, match=f"input_ids {message}"):
        manager.add_request(prompt, intensity=0.5)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        manager.add_request([5], max_new_tokens=0)
    assert manager.input_queue.empty()


def test_generate_batch_of_nothing_is_nothing() -> None:
    assert patched("qwen3").generate_batch([], GREEDY, SMALL, intensity=0.5) == {}


def test_generate_batch_refuses_another_number_of_lam() -> None:
    with pytest.raises(ValueError, match="intensity must be a real number, or one per sequence, got 3 for 2 sequences"):
        patched("qwen3").generate_batch(prompts([4, 5]), GREEDY, SMALL, intensity=[0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("BloomConfig", "BloomForCausalLM cannot be batched continuously at several λ: one reaches other sequences"),
        ("FalconConfig", "query_key_value.weight cannot have one λ per sequence in .*matmul"),
        ("BertConfig", r"cls.predictions.transform.dense cannot tell the 9 tokens of a packed row"),
    ],
)
def test_models_that_cannot_be_packed_are_refused(name: str, message: str) -> None:
    model = patched(getattr(transformers, name))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        model.init_continuous_batching(GREEDY, SMALL)
    assert model.config._attn_implementation == before


def test_a_manager_that_lives_on_is_found_again() -> None:
    model, asked = patched("qwen3"), prompts([6, 9])
    wanted = alone(model, asked, [0.2, 0.9])
    for _ in range(2):
        assert batched(model, asked, SMALL, intensity=[0.2, 0.9], persistent_manager=True) == wanted
    model.destroy_cached_continuous_batching_manager()


def test_cancelled_requests_free_their_blocks_and_let_others_in() -> None:
    """A request that was let in alone holds the cache; others wait until it is cancelled."""
    model, asked = patched("qwen3"), prompts([9, 10, 11])
    [wanted] = alone(model, asked[2:], [0.5], 32)
    long = GenerationConfig(do_sample=False, max_new_tokens=32, eos_token_id=-1)
    manager = model.init_continuous_batching(long, config(num_blocks=14, allow_block_sharing=False, safety_margin=0.0))
    manager.warmup()
    cache, scheduler = manager.batch_processor.cache, manager.batch_processor.scheduler
    manager.on_step = lambda _: [manager.cancel_request(name) for name in "ab"]  # the first has begun by then
    for name, prompt in zip("abc", asked, strict=True):
        manager.add_request(prompt, name, intensity=0.5)
    manager.start()
    try:
        answer = manager.get_result(timeout=30)
        assert (answer.request_id, answer.error) == ("c", None)
        assert answer.generated_tokens == wanted
    finally:
        manager.stop()
    assert not scheduler.active_requests
    assert not scheduler.waiting_requests
    assert cache.compute_free_capacity() == 1


def test_waiting_requests_go_on_when_the_one_that_blocks_them_is_cancelled() -> None:
    """transformers lets nobody in after an eviction until a request has ended; a cancelled one must count as that."""
    manager = patched("qwen3").init_continuous_batching(GREEDY, SMALL)
    manager.warmup()
    scheduler = manager.batch_processor.scheduler
    scheduler.add_waiting_request(RequestState("a", [5]))
    scheduler.block_new_requests = True
    scheduler.set_request_cancellation("b")
    scheduler.clear_cancelled_requests()
    assert scheduler.block_new_requests
    scheduler.set_request_cancellation("a")
    scheduler.clear_cancelled_requests()
    assert not scheduler.block_new_requests


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dami.patching.model.BATCHING", "99.0")
    with pytest.raises(ImportError, match=r"continuous batching of a pair needs transformers>=99.0, got 5"):
        patched("qwen3").init_continuous_batching(GREEDY, SMALL)


def test_another_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(LerpManager.__mro__[1], "_generation_loop_body")
    upstream.check.cache_clear()
    with pytest.raises(ImportError, match=r"has no \S+:ContinuousBatchingManager._generation_loop_body"):
        patched("qwen3").init_continuous_batching(GREEDY, SMALL)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_with_invariant_no_bit_depends_on_the_others(family: str) -> None:
    """Logits of each step, bit for bit: alone in one step, and with neighbours at other λ in steps of a few tokens."""
    model = patched(family, invariant=True)
    asked = prompts()

    def logits(batching: ContinuousBatchingConfig, *rows: int) -> list[torch.Tensor]:
        seen: dict[int, list[torch.Tensor]] = {row: [] for row in rows}
        manager = model.init_continuous_batching(GREEDY, batching)
        manager.sample_per_request()

        class Seeing(Sampler):
            def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
                self.requests = [request.state.request_id for request in requests_with_new_token]
                return super().prepare_tensor_args(requests_with_new_token)

            def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
                for request, row in zip(self.requests, scores, strict=False):
                    seen[int(request)].append(row.clone())
                return super().__call__(scores, tensor_arg)

        manager.sampler.__class__ = Seeing
        manager.start()
        try:
            for row in rows:
                manager.add_request(asked[row], str(row), intensity=LAM[row], sampling=Sampling(temperature=0))
            for _ in rows:
                assert manager.get_result(timeout=60).error is None
        finally:
            manager.stop()
        return [torch.stack(seen[row]) for row in rows]

    together = logits(config(max_batch_tokens=7), *range(5))
    for row in range(5):
        [by_itself] = logits(SMALL, row)
        assert torch.equal(by_itself, together[row])
