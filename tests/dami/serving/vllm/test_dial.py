"""The dial in vLLM: presets, "auto", prompts at a λ of their own, and λ that changes while a request runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dami
import numpy as np
import pytest
import torch
from dami.estimators.files import StoredIntensity
from dami.generation.budget import ThoughtLimit
from dami.schedules import bend, switch_after
from dami.serving.guidance import span_of
from dami.serving.guiding import Guidance, Guide, Thoughts
from dami.sources import FOLDER
from dami.thoughts import Reader
from transformers import AutoTokenizer

from tests.dami.serving.vllm.engines import ask, engine, tokens_of
from tests.dami.serving.vllm.pairs import answer_by_place, answers, followers

pytest.importorskip("vllm")

QUESTIONS = ("47 + 38 - 12 =", "gcd(84, 36)", "What is the atomic number of iron?", "63 - 27 + 48 - 15 =")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dami.pack(*dami.example_pair(), tmp_path_factory.mktemp("shipped") / "pair", format="int8")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(dami.example_pair()[0])
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]


@pytest.fixture(scope="module")
def llm(pair: Path) -> Iterator[Any]:
    """Prompts come in pieces of 32 tokens at most, beside others' answers."""
    from vllm.config import ReasoningConfig

    thoughts = ReasoningConfig(reasoning_start_str="<think>", reasoning_end_str="</think>")
    options = {
        "skip_tokenizer_init": False,
        "reasoning_config": thoughts,
        "max_model_len": 512,
        "max_num_batched_tokens": 32,
        "block_size": 32,
        "enable_prefix_caching": True,
    }
    with engine(pair, **options) as llm:
        yield llm


def test_presets(llm: Any, pair: Path, prompts: list[list[int]]) -> None:
    asked = [{"intensity": "low"}, {"max_intensity": 0.7}, {"intensity": "high", "max_intensity": 0.2}]
    presets = StoredIntensity.load(pair / FOLDER).presets
    wanted = answers(pair, prompts[:3], [presets["low"], 0.7, 0.2], 16)
    assert tokens_of(ask(llm, prompts[:3], asked)) == wanted


def read_at(prompt: list[int], before: float, tail: int, lam: float) -> Callable[[int], float]:
    return lambda place: before if place < len(prompt) - tail else lam


def test_a_prompt_is_read_at_a_lambda_of_its_own(llm: Any, pair: Path, prompts: list[list[int]]) -> None:
    asked = [(0.0, 1, 1.0), (0.0, 0, 1.0), (1.0, 7, 0.3), (0.4, 99, 0.8)]
    args = [{"prompt_intensity": before, "prompt_tail": tail, "intensity": lam} for before, tail, lam in asked]
    wanted = [
        answer_by_place(pair, prompt, 24, read_at(prompt, *each)) for prompt, each in zip(prompts, asked, strict=True)
    ]
    assert tokens_of(ask(llm, prompts, args, 24)) == wanted


def test_a_prefix_is_read_once_for_all_lambdas(llm: Any, pair: Path, prompts: list[list[int]]) -> None:
    """200 requests with one prefix of 490 tokens at 20 λ; each answer is that of the request alone."""
    prefix = (prompts[0] * 100)[:490]
    lams = [round(0.05 * step, 2) for step in range(20)]
    asked = [[*prefix, *prompts[number % 4][-3 - number // 40 :]] for number in range(200)]
    args = [{"prompt_intensity": 0, "intensity": lams[number % 20]} for number in range(200)]
    found = ask(llm, asked, args, 3)
    read = sum(len(output.prompt_token_ids) - output.num_cached_tokens for output in found)
    rest = sum(len(prompt) - 490 // 32 * 32 for prompt in asked)
    assert read <= 490 // 32 * 32 + rest
    alone = answer_by_place(pair, asked[57], 3, read_at(asked[57], 0.0, 1, lams[17]))
    assert tokens_of(found)[57] == alone


def test_what_was_read_at_another_lambda_is_not_shared(llm: Any, pair: Path, prompts: list[list[int]]) -> None:
    """Blocks of a whole prompt at λ=0 serve where that is `prompt_intensity`; those of its answer at λ do not."""
    prompt = prompts[3] * 3
    blocks = (len(prompt) - 1) // 32 * 32
    found = [
        ask(llm, [prompt], [args], 40)[0] for args in ({"intensity": 0}, {"intensity": 0.9, "prompt_intensity": 0})
    ]
    assert [output.num_cached_tokens for output in found] == [0, blocks]
    longer = [*prompt, *found[1].outputs[0].token_ids, *prompts[0]]
    assert ask(llm, [longer], [{"intensity": 0.9}], 1)[0].num_cached_tokens == 0
    again = ask(llm, [longer], [{"intensity": 0.1, "prompt_intensity": 0}], 8)[0]
    assert again.num_cached_tokens == blocks
    assert tokens_of([again]) == [answer_by_place(pair, longer, 8, read_at(longer, 0.0, 1, 0.1))]


def test_the_estimator_chooses(llm: Any, pair: Path, prompts: list[list[int]]) -> None:
    """By the states that dami's own features are, of a prompt in pieces, and reads the prompt for it once."""
    model, _ = dami.load_pair(pair)
    estimator = StoredIntensity.load(pair / FOLDER).estimator
    chosen = [round(estimator.estimate(model, {"input_ids": torch.tensor([prompt])}).item(), 4) for prompt in prompts]
    assert len(set(chosen)) > 1
    assert tokens_of(ask(llm, prompts, ["auto"] * 4)) == answers(pair, prompts, chosen, 16)
    asked = {"intensity": "auto", "max_intensity": 0.1, "prompt_intensity": 0}
    long = [prompt * 3 for prompt in prompts]
    found = ask(llm, long, [asked] * 4)
    for prompt, output in zip(long, found, strict=True):
        lam = min(estimator.estimate(model, {"input_ids": torch.tensor([prompt])}).item(), 0.1)
        assert output.num_cached_tokens == (len(prompt) - 1) // 32 * 32  # which the pilot has read
        assert tokens_of([output]) == [
            answer_by_place(pair, prompt, 16, read_at(prompt, 0.0, 1, float(np.float32(lam))))
        ]


def test_a_schedule(llm: Any, pair: Path, prompts: list[list[int]]) -> None:
    """Straight lines between points, over a prompt at a λ of its own; λ of the k-th token is that of k others."""
    points = [[4, 0.2], [12, 1.0]]
    args = {"intensity": 1.0, "intensity_schedule": points, "prompt_intensity": 0.0}

    def lam(place: int) -> float:
        given = place + 1 - len(prompts[0])
        line = float(np.float32(np.interp(given, [0, 4, 12], [1.0, 0.2, 1.0])))
        return 0.0 if place < len(prompts[0]) - 1 else line

    wanted = answer_by_place(pair, prompts[0], 24, lam)
    assert tokens_of(ask(llm, prompts[:1], [args], 24)) == [wanted]
    assert tokens_of(ask(llm, prompts[:1], [args], 24)) == [wanted]  # from cached blocks


def turned_after(
    llm: Any, prompt: list[int], asked: dict[str, dict[str, Any]], tokens: int, *change: Any
) -> dict[str, list[int]]:
    """What requests answer together, by their names, the first of which is changed after so many tokens."""
    from vllm import SamplingParams

    core, done = llm.llm_engine.engine_core.engine_core, {}
    for name, args in asked.items():
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False, extra_args=args)
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            found = output.outputs[0].token_ids
            if output.request_id == next(iter(asked)) and len(found) == tokens:
                names = [name for name in core.scheduler.requests if name.startswith(f"{output.request_id}-")]
                assert core.dami_turn(names, *change) == [(names[0], len(prompt) + tokens - 1)]
            if output.finished:
                done[output.request_id] = list(found)
    return done


def test_the_dial_is_turned_while_a_request_runs(llm: Any, pair: Path, prompts: list[list[int]]) -> None:
    """After 5 tokens; and what the prefix cache then knows of the request is right."""
    prompt = prompts[3]
    done = turned_after(llm, prompt, {"0": {"intensity": 1.0}, "1": {"intensity": 0.3}}, 5, 0.0, None)
    turned = len(prompt) + 4  # where the fifth token stands, which is read next
    assert done["0"] == answer_by_place(pair, prompt, 40, lambda place: 1.0 if place < turned else 0.0)
    assert done["0"] != answers(pair, [prompt], [1.0], 40)[0]
    assert done["1"] == answers(pair, [prompt], [0.3], 40)[0]
    longer = [*prompt, *done["0"], 7]
    assert tokens_of(ask(llm, [longer], [1.0], 8)) == answers(pair, [longer], [1.0], 8)


def test_a_thought_wraps_up_while_it_runs(llm: Any, pair: Path, prompts: list[list[int]]) -> None:
    """By the law of dami's own server, which follows the same tokens here."""
    prompt, args = prompts[3], {"intensity": 1.0, "answer_intensity": 0.25}
    found = turned_after(llm, prompt, {"2": args}, 5, None, 8)["2"]
    tokenizer = AutoTokenizer.from_pretrained(dami.example_pair()[0])
    tags = Thoughts.of(Reader.of(tokenizer))
    guidance = Guidance(answer_intensity=0.25, span=span_of(StoredIntensity.load(pair / FOLDER).frontier))
    guide = Guide(len(prompt), len(tokenizer), guidance, frozenset(), tags)
    guide.begin(1.0)
    lams = [1.0] * len(prompt)
    for number, token in enumerate(found, 1):
        if number == 5:
            guide.turn(wrap_up=8)
        guide.tokens.append(token)
        guide.decide([token])
        lams.append(float(np.float32(guide.intensity)))
    assert len({*lams}) > 5
    assert followers(pair, [*prompt, *found], lambda place: lams[place])[len(prompt) - 1 : -1] == found


def test_lambda_follows_thoughts(llm: Any, pair: Path, prompts: list[list[int]]) -> None:
    """As in dami's own `generate`: λ of answers after a thought, and of thoughts that near the end of their budgets."""
    model, tokenizer = dami.load_pair(pair)
    start, end = (tokenizer.encode(tag, add_special_tokens=False) for tag in ("<think>", "</think>"))
    span = span_of(StoredIntensity.load(pair / FOLDER).frontier)

    def wanted(prompt: list[int], schedule: Any, *processors: Any) -> list[int]:
        options = {"do_sample": False, "max_new_tokens": 40, "logits_processor": [*processors]}
        return model.generate(torch.tensor([prompt]), intensity=schedule, **options)[0, len(prompt) :].tolist()

    def found(args: dict[str, Any], **params: Any) -> list[list[int]]:
        return tokens_of(ask(llm, prompts, [args] * 4, 40, ignore_eos=False, **params))

    after = [wanted(prompt, switch_after(end, 1.0, 0.25)) for prompt in prompts]
    assert found({"intensity": 1.0, "answer_intensity": 0.25}) == after
    for budget in (24, 12):
        bent = [
            wanted(prompt, bend(1.0, budget, start, end, span=span), ThoughtLimit(len(prompt), budget, start, end))
            for prompt in prompts
        ]
        assert found({"intensity": 1.0}, thinking_token_budget=budget) == bent
        assert all(end[0] in tokens[: budget + 2] for tokens in bent)
