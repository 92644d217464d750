"""Every architecture and every format, packed or from two ends, against merged models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dami
import pytest
from dami.serving.vllm import loader
from transformers import AutoTokenizer

from tests.dami.serving.vllm import pairs
from tests.dami.serving.vllm.engines import ask, engine, tokens_of
from tests.dami.serving.vllm.pairs import LAMS, answer_by_place, answers, prompts_of

PROMPTS = prompts_of(5, 17, 33, 9, 21)


@pytest.mark.parametrize(
    ("family", "format"),
    [("llama", "pair"), ("qwen3", "int8"), ("mistral", "w8d4"), ("qwen3_moe", "int4"), ("adapted", "lowrank")],
)
def test_a_packed_pair(packed: Any, family: str, format: str) -> None:
    with engine(packed(family, format)) as llm:
        assert tokens_of(ask(llm, PROMPTS)) == answers(packed(family, format), PROMPTS, LAMS, 16)


@pytest.mark.parametrize(("family", "format"), [("qwen2", "int8"), ("qwen3_moe", "pair")])
def test_two_ends(ends: Any, packed: Any, family: str, format: str) -> None:
    with engine(*ends(family), format=None if format == "pair" else format) as llm:
        assert tokens_of(ask(llm, PROMPTS)) == answers(packed(family, format), PROMPTS, LAMS, 16)


def test_what_is_the_same_in_both_ends(tmp_path: Any) -> None:
    """Parts of merged weights and biases, norms, whole layers: alone in the files, and found in their places."""
    same = ("k_proj", "up_proj", "q_proj.bias", "layers.0.input_layernorm", "o_proj.weight", "embed_tokens")
    pair = pairs.pack(pairs.write_ends("llama", tmp_path, same), "int4")
    with engine(pair) as llm:
        assert tokens_of(ask(llm, PROMPTS)) == answers(pair, PROMPTS, LAMS, 16)


def test_the_shipped_pair(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(dami.example_pair()[0])
    chats = [[{"role": "user", "content": question}] for question in ("47 + 38 - 12 =", "gcd(84, 36)") for _ in LAMS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    pair = dami.pack(*dami.example_pair(), tmp_path / "pair", format="pair")
    wanted = answers(pair, prompts, LAMS * 2, 48)
    with engine(pair) as llm:
        assert tokens_of(ask(llm, prompts, LAMS * 2, 48)) == wanted
    with engine(*dami.example_pair(), default_intensity=1) as llm:
        assert tokens_of(ask(llm, prompts[:1], [None], 48)) == wanted[3:4]


def test_weights_move_into_huge_pages(packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Any] = []
    monkeypatch.setattr(loader, "use_huge_pages", moved.append)
    with engine(packed("llama", "pair")) as llm:
        llm.apply_model(lambda model: moved.remove(model))
    assert not moved


def test_requests_that_are_preempted(packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of 13 blocks cannot hold all requests: some are thrown out and read again, each token at its λ."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    preempt = Scheduler._preempt_request

    def counted(*args: Any, **options: Any) -> Any:
        preempted.append(args)
        return preempt(*args, **options)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    pair, prompts = packed("qwen3", "int8"), prompts_of(*[60] * 6)
    moving = {"intensity": 0.7, "prompt_intensity": 0.1, "intensity_schedule": [[4, 0.3]]}
    wanted = answers(pair, prompts[:3], LAMS[:3], 48)
    for prompt in prompts[3:]:
        wanted.append(answer_by_place(pair, prompt, 48, lambda at: 0.1 if at < 59 else 0.7 - 0.1 * min(at - 59, 4)))
    with engine(pair, num_gpu_blocks_override=13) as llm:
        assert tokens_of(ask(llm, prompts, [*LAMS[:3], *[moving] * 3], 48)) == wanted
    assert {args[1].sampling_params.extra_args.get("prompt_intensity") for args in preempted} >= {0.1}
