"""Batches of prompts and the answers read from them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import dami
import pytest
import torch
from dami import chat


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return dami.load_pair(*dami.example_pair(), dtype=torch.float32)  # so that rounding decides no token


@pytest.mark.parametrize(
    ("said", "thought", "answer"),
    [
        ("73", "", "73"),
        ("<think>1 + 1 = 2</think>2", "1 + 1 = 2", "2"),
        ("1 + 1 = 2</think>2", "1 + 1 = 2", "2"),
        ("<think>1 + 1 =", "1 + 1 =", ""),
        ("<think>\n\n</think>\n\n2", "", "2"),
        ("<think>a</think>no<think>b</think>2", "a</think>nob", "2"),
        ("", "", ""),
    ],
)
def test_split_thought(said: str, thought: str, answer: str) -> None:
    assert chat.split_thought(said) == (thought, answer)


def test_encode_pads_on_the_left_and_ends_with_the_assistants_turn(pair: tuple[Any, Any]) -> None:
    tokenizer = pair[1]
    texts, batch = chat.encode(tokenizer, ["7", [{"role": "user", "content": "What is 70 + 3, pray?"}]])
    assert texts[1] == tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 70 + 3, pray?"}], tokenize=False, add_generation_prompt=True
    )
    mask = batch["attention_mask"]
    assert mask[:, -1].all()
    assert mask[0, 0] == 0
    for row, text in enumerate(texts):
        assert tokenizer.decode(batch["input_ids"][row][mask[row].bool()]) == text


def test_encode_gives_raw_prompts_as_they_are(pair: tuple[Any, Any]) -> None:
    texts, batch = chat.encode(pair[1], ["7 + 3 ="], template=False)
    assert texts == ["7 + 3 ="]
    assert pair[1].decode(batch["input_ids"][0]) == "7 + 3 ="


def test_encode_says_what_is_missing(pair: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        chat.encode(SimpleNamespace(chat_template=None), ["hi"])
    with pytest.raises(ValueError, match="needs the chat template"):
        chat.encode(pair[1], [[{"role": "user", "content": "hi"}]], template=False)


def test_answers_of_counts_up_to_the_end_token_and_reads_the_thought(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    said = ["<think>1 + 1 = 2</think>2", "<think>1 +"]
    rows = [tokenizer(text)["input_ids"] for text in said]
    rows[0].append(tokenizer.eos_token_id)
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    finished, cut = chat.answers_of(model, tokenizer, ids, ["a", "b"], [0.0, 1.0])
    assert (finished.thought, finished.text, finished.tokens, finished.finished) == (
        "1 + 1 = 2",
        "2",
        len(rows[0]),
        True,
    )
    assert (cut.thought, cut.text, cut.tokens, cut.finished) == ("1 +", "", width, False)
    assert (finished.intensity, cut.intensity) == (0.0, 1.0)


def test_a_prompt_may_end_inside_a_thought(pair: tuple[Any, Any]) -> None:
    ids = torch.tensor([pair[1]("1 + 1")["input_ids"]])
    (answer,) = chat.answers_of(*pair, ids, ["a"], None, thinking=[True])
    assert (answer.thought, answer.text, answer.intensity) == ("1 + 1", "", None)


def test_rows_of_one_batch_answer_as_each_alone(pair: tuple[Any, Any]) -> None:
    prompts, lams = ["What is 7 + 3?", "What is the gcd of 12, 18 and 30?"], [0.0, 1.0]
    options = {"do_sample": False, "max_new_tokens": 8}
    together = chat.ask(*pair, prompts, lams, **options)
    alone = [chat.ask(*pair, [prompt], [lam], **options)[0] for prompt, lam in zip(prompts, lams, strict=True)]
    assert together == alone
