"""Prompts read at a λ of their own, and beginnings read once for all λ: token for token against merged models."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import dami
import pytest
import torch
from dami.generation.batching import StepLoad
from dami.generation.pieces import CACHE
from dami.generation.prefixes import Keyed
from dami.generation.reading import Reading
from transformers import GenerationConfig, GptOssConfig, MixtralConfig

from tests.dami import architectures
from tests.dami.families import merged, pair
from tests.dami.serving.test_batching import GREEDY, LAM, NEW, SMALL, batched, config, patched, prompts, run
from tests.dami.serving.test_graphs import CAPTURING, Graph, graphs  # noqa: F401  # a fixture

READ = [0.0, 1.0, 0.3, 0.0, 0.8]  # λ of the prompts
TAILS = [1, 0, 2, 6, 99]


@cache
def plain(family: Any, lam: float) -> Any:
    """A merged model."""
    ends = pair(family) if isinstance(family, str) else architectures.pair(family)
    return merged(*ends, lam, torch.float32).eval()


@torch.no_grad()
def apart(family: Any, prompt: list[int], lam: float, read: float, tail: int = 1, new: int = NEW) -> list[int]:
    """What merged models answer: one at `read` reads the prompt but its tail, and one at `lam` goes on from there."""
    begin, ids = max(0, len(prompt) - tail), torch.tensor([prompt])
    known = logits = None
    for model, piece in ((plain(family, read), ids[:, :begin]), (plain(family, lam), ids[:, begin:])):
        if piece.shape[1]:
            output = model(piece, **{CACHE: known}, use_cache=True)
            known, logits = output[CACHE], output.logits[:, -1]
    said: list[int] = []
    while True:
        said.append(int(logits.argmax()))
        if len(said) == new:
            return said
        output = plain(family, lam)(torch.tensor([said[-1:]]), **{CACHE: known}, use_cache=True)
        known, logits = output[CACHE], output.logits[:, -1]


# softcaps and windows; a window; tied embeddings; learned positions; routers and experts; attention sinks
@pytest.mark.parametrize("family", ["gemma2", "mistral", "qwen3", "gpt2", MixtralConfig, GptOssConfig])
def test_prompts_are_read_at_their_own_lam(family: Any) -> None:
    """In one step for all prompts, and in steps of a few tokens, which cut prompts and tails in pieces."""
    model, asked = patched(family), prompts()
    wanted = [apart(family, *each) for each in zip(asked, LAM, READ, TAILS, strict=True)]
    for tokens in (64, 7):
        pieces = config(max_batch_tokens=tokens)
        said = batched(model, asked, pieces, intensity=LAM, prompt_intensity=READ, prompt_tail=TAILS)
        assert said == wanted
    assert len({*map(tuple, wanted)}) == len(asked)


def test_one_token_at_the_end_is_read_at_the_answers_lam_by_default() -> None:
    model, asked = dami.attach(patched("qwen3"), None, {"low": 0.25}), prompts()
    for read, tail in ((0.0, {}), ("low", {"prompt_tail": 3})):
        number = 0.25 if read == "low" else 0.0
        wanted = [apart("qwen3", p, lam, number, *tail.values()) for p, lam in zip(asked, LAM, strict=True)]
        assert batched(model, asked, SMALL, intensity=LAM, prompt_intensity=read, **tail) == wanted


def test_graphs_read_the_lam_of_each_token(graphs: list[Graph]) -> None:  # noqa: F811
    model, asked = patched("qwen3"), prompts()
    wanted = [apart("qwen3", *each) for each in zip(asked, LAM, READ, TAILS, strict=True)]
    said = batched(model, asked, CAPTURING, intensity=LAM, prompt_intensity=READ, prompt_tail=TAILS)
    assert said == wanted
    assert sum(graph.replays for graph in graphs) >= 4


def test_an_evicted_request_reads_again_at_the_same_lam(evicted: list[int]) -> None:
    model, asked = patched("qwen3"), prompts([9, 10, 11, 12, 13])
    tight = config(num_blocks=12, safety_margin=0.0)
    said, _ = run(model, asked, tight, intensity=LAM, prompt_intensity=READ, prompt_tail=TAILS)
    assert said == [apart("qwen3", *each) for each in zip(asked, LAM, READ, TAILS, strict=True)]
    assert evicted


def test_several_answers_to_a_prompt_share_its_reading() -> None:
    model, asked = patched("qwen3"), prompts([6, 9])
    several = GenerationConfig(do_sample=True, top_k=1, max_new_tokens=NEW, eos_token_id=-1, num_return_sequences=3)
    outputs = model.generate_batch(
        asked, several, SMALL, intensity=[0.2, 0.9], prompt_intensity=0.5, prompt_tail=[2, 0]
    )
    first, second = apart("qwen3", asked[0], 0.2, 0.5, 2), apart("qwen3", asked[1], 0.9, 0.5, 0)
    assert [output.generated_tokens for output in outputs.values()] == [first] * 3 + [second] * 3


def test_the_lam_of_every_token_of_a_sequence() -> None:
    reading = Reading(0.5, ((3, 0.0), (5, 0.2)))
    each = [0.0] * 3 + [0.2] * 2 + [0.5] * 6
    for start, end in itertools.combinations_with_replacement(range(len(each)), 2):
        assert reading.lam(start, end) == each[start:end]
    assert Reading.of_prompt(9, 0.5, 0.0, 2) == Reading(0.5, ((7, 0.0),))
    for same in ((0.5, 2), (None, 2), (0.0, 9), (0.0, 10)):
        assert Reading.of_prompt(9, 0.5, *same) == Reading(0.5)


def test_keys_of_blocks_tell_the_lam_of_every_token_apart() -> None:
    def key(tokens: Sequence[int], reading: Reading, start: int = 0) -> tuple[int, ...]:
        return tuple(Keyed(tokens, reading)[start : start + 4])

    readings = [Reading(lam) for lam in (0.0, 0.5, -0.5, 1e-9, 1.0)]
    readings += [Reading(lam, ((end, before),)) for lam in (0.2, 0.3) for before in (0.0, 1.0) for end in (1, 2, 3)]
    keys = {key(tokens, reading) for tokens in ((1, 2, 3, 4), (2, 1, 3, 1 << 30)) for reading in readings}
    assert len(keys) == 2 * len(readings)
    assert all(-(1 << 31) <= number < 1 << 31 for each in keys for number in each)
    before, after = Reading(0.2, ((4, 0.0),)), Reading(0.7, ((4, 0.0),))
    assert key(range(8), before) == key(range(8), after) == key(range(8), Reading(0.0))
    assert key(range(8), before, 4) == key(range(8), Reading(0.2), 4) != key(range(8), after, 4)
    assert len(Keyed([1, 2, 3], before)[0:4]) == 3  # a block that is not whole looks like it
    joined = Keyed([1, 2], before) + [3, 4]  # noqa: RUF005  # as transformers does
    assert key(joined, joined.reading) == key([1, 2, 3, 4], before)


def test_a_beginning_is_read_once_for_all_lam() -> None:
    model, [common] = patched("qwen3"), prompts([21])
    asked = [common + tail for tail in prompts([3, 1, 7, 3, 4])]
    asked.append(asked[0])  # again, at another λ
    lams, tails = [*LAM, 0.6], [1, 1, 2, 1, 1, 1]
    said, tokens = run(model, asked, intensity=lams, prompt_intensity=[0.0] * 6, prompt_tail=tails)
    assert said == [apart("qwen3", p, lam, 0.0, tail) for p, lam, tail in zip(asked, lams, tails, strict=True)]
    ends = sum(len(prompt) - 20 for prompt in asked) + 6 * (NEW - 1)
    assert tokens == 20 + ends  # but for what fills no block of four tokens, the beginning is read once
    said, tokens = run(model, asked, intensity=lams)
    assert said == [apart("qwen3", prompt, lam, lam) for prompt, lam in zip(asked, lams, strict=True)]
    assert tokens == 6 * 20 + ends


def test_a_block_read_at_two_lam_is_shared_by_those_at_the_same_two() -> None:
    """The prompts end in the middle of a block, whose beginning has another λ."""
    model, [asked] = patched("qwen3"), prompts([23])
    lams, tails = [0.3, 0.3, 0.9, 0.3], [6, 6, 6, 5]
    said, tokens = run(model, [asked] * 4, intensity=lams, prompt_intensity=[1.0] * 4, prompt_tail=tails)
    assert said == [apart("qwen3", asked, lam, 1.0, tail) for lam, tail in zip(lams, tails, strict=True)]
    assert tokens == 20 + 4 * (3 + NEW - 1) + (20 - 16) * 2


def test_a_later_turn_reads_only_what_another_lam_has_read() -> None:
    """λ changes between turns: the history is shared, but for the last turn's end and its answer."""
    model, [first, more] = patched("qwen3"), prompts([21, 5])
    manager = model.init_continuous_batching(GREEDY, SMALL)
    steps: list[StepLoad] = []
    manager.on_step = steps.append
    manager.start()
    try:

        def turn(prompt: list[int], lam: float) -> tuple[list[int], int]:
            before = sum(step.tokens for step in steps)
            manager.add_request(prompt, intensity=lam, prompt_intensity=0.0)
            return manager.get_result(timeout=60).generated_tokens, before

        said, _ = turn(first, 1.0)
        assert said == apart("qwen3", first, 1.0, 0.0)
        second = first + said + more
        answer, before = turn(second, 0.4)
        assert answer == apart("qwen3", second, 0.4, 0.0)
    finally:
        manager.stop()
    assert sum(step.tokens for step in steps) - before == len(second) - 20 + NEW - 1


def test_requests_that_wait_for_a_beginning_go_on_when_its_reader_is_cancelled() -> None:
    model, [common] = patched("qwen3"), prompts([30])
    manager = model.init_continuous_batching(GREEDY, config(max_batch_tokens=7))
    taken: list[int] = []

    def cancel(step: StepLoad) -> None:
        if step.tokens and not taken:
            manager.cancel_request("reader")
        taken.append(step.rows)

    manager.on_step = cancel
    manager.add_request(common, "reader", intensity=0.2)
    for name in ("a", "b"):
        manager.add_request([*common, 5], name, intensity=0.2)
    manager.start()
    try:
        said = [manager.get_result(timeout=60).generated_tokens for _ in "ab"]
    finally:
        manager.stop()
    assert said == [apart("qwen3", [*common, 5], 0.2, 0.2)] * 2


@pytest.mark.parametrize("requests", [200])
def test_many_requests_at_twenty_lam_read_one_beginning_once(requests: int) -> None:
    model, [common] = patched("qwen3"), prompts([500])
    asked = [[*common, 4 + place % 90, 5 + place % 7] for place in range(requests)]
    lams = [place % 20 / 19 for place in range(requests)]
    batching = config(page_size=16, num_blocks=requests + 64, max_batch_tokens=256)
    said, tokens = run(model, asked, batching, intensity=lams, prompt_intensity=[0.0] * requests)
    assert tokens == 496 + requests * (502 - 496 + NEW - 1)
    for place in range(0, requests, 7):
        assert said[place] == apart("qwen3", asked[place], lams[place], 0.0)
    [by_itself], _ = run(model, asked[5:6], batching, intensity=lams[5:], prompt_intensity=[0.0])
    assert by_itself == said[5]


@pytest.mark.parametrize("wrong", [-1, [1, -1]])
def test_a_negative_tail_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="prompt_tail must be an integer of at least 0, or one per prompt, got"):
        patched("qwen3").generate_batch(prompts([4, 5]), GREEDY, SMALL, prompt_intensity=0.0, prompt_tail=wrong)


@pytest.mark.parametrize("wrong", [True, 1.0, "turn", [1, None]])
def test_a_tail_that_is_no_integer_is_refused(wrong: Any) -> None:
    model = patched("qwen3")
    with pytest.raises(TypeError, match="prompt_tail must be an integer of at least 0, or one per prompt, got"):
        model.generate_batch(prompts([4, 5]), GREEDY, SMALL, prompt_intensity=0.0, prompt_tail=wrong)
    with pytest.raises(TypeError, match="prompt_tail must be an integer of at least 0"):
        model.init_continuous_batching(GREEDY, SMALL).add_request([5], prompt_intensity=0.0, prompt_tail=wrong)


def test_another_number_of_tails_or_prompt_intensities_is_refused() -> None:
    model, asked = patched("qwen3"), prompts([4, 5])
    with pytest.raises(ValueError, match=r"prompt_tail must be .* one per prompt, got 3 for 2 prompts"):
        model.generate_batch(asked, GREEDY, SMALL, prompt_intensity=0.0, prompt_tail=[1, 2, 3])
    with pytest.raises(ValueError, match="prompt_intensity must be a real number, or one per sequence, got 3 for 2"):
        model.generate_batch(asked, GREEDY, SMALL, prompt_intensity=[0.0, 1.0, 0.5])
    needs = "prompt_tail says where prompt_intensity ends, and needs one: .* or leave out prompt_tail=2"
    with pytest.raises(ValueError, match=needs):
        model.generate_batch(asked, GREEDY, SMALL, prompt_tail=2)
    with pytest.raises(ValueError, match=needs):
        model.init_continuous_batching(GREEDY, SMALL).add_request([5], prompt_tail=2)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (float("nan"), ValueError, "prompt_intensity must be finite, got nan"),
        ("low", ValueError, "prompt_intensity must be a number or a preset, of which the model has none, got 'low'"),
        ("auto", TypeError, "takes a number or a preset as prompt_intensity, got 'auto'"),
        ([0.1, 0.2], ValueError, "prompt_intensity must be one number, got 2"),
    ],
)
def test_add_request_refuses_a_prompt_intensity(wrong: Any, error: type[Exception], message: str) -> None:
    manager = patched("qwen3").init_continuous_batching(GREEDY, SMALL)
    with pytest.raises(error, match=message):
        manager.add_request([5, 6], intensity=0.5, prompt_intensity=wrong)
    assert manager.input_queue.empty()
