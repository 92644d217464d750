"""Batches of prompts and the answers read from them."""

from __future__ import annotations

import copy
from typing import Any

import dami
import pytest
import torch
from dami import chat
from dami.evaluation.calibration import calibrate
from dami.prompts import as_prompt, text_of
from dami.thoughts import Reader


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return dami.load_pair(*dami.example_pair(), dtype=torch.float32)  # so that rounding decides no token


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
    texts, batch = chat.encode(pair[1], ["7 + 3 ="], chat_template=None)
    assert texts == ["7 + 3 ="]
    assert pair[1].decode(batch["input_ids"][0]) == "7 + 3 ="


def test_encode_says_what_is_missing(pair: tuple[Any, Any]) -> None:
    tokenizer = copy.deepcopy(pair[1])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat.encode(tokenizer, ["hi"])
    with pytest.raises(ValueError, match="needs the chat template"):
        chat.encode(pair[1], [[{"role": "user", "content": "hi"}]], chat_template=None)


@pytest.mark.parametrize("one", ["7 + 3 =", [{"role": "user", "content": "7 + 3 ="}], [], [7], 7, None])
def test_one_prompt_is_not_several(pair: tuple[Any, Any], one: Any) -> None:
    for call in (
        lambda: chat.ask(*pair, one, 0.5),
        lambda: chat.encode(pair[1], one),
        lambda: chat.numbers_of(*pair, one, 0.5),
        lambda: calibrate(*pair, one, "nowhere"),
    ):
        with pytest.raises(TypeError, match="prompts must be a list of texts or of conversations, got "):
            call()


def test_each_prompt_gets_one_answer(pair: tuple[Any, Any]) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "repetition_penalty": 1.0}
    wanted = chat.ask(*pair, ["7 + 3 =", "8 + 4 ="], 0.0, **options)
    assert chat.ask(*pair, iter(["7 + 3 =", "8 + 4 ="]), 0.0, return_dict_in_generate=True, **options) == wanted
    with pytest.raises(ValueError, match="num_return_sequences must be 1 for one answer per prompt, got 2: repeat"):
        chat.ask(*pair, ["7 + 3 =", "8 + 4 ="], 0.0, num_return_sequences=2, num_beams=2)


def test_a_message_may_be_of_parts_or_only_call(pair: tuple[Any, Any]) -> None:
    tokenizer = copy.deepcopy(pair[1])
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m.content or [] %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    parts = [{"type": "text", "text": "7 +"}, {"type": "text", "text": " 3"}]
    calls: Any = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    talk = as_prompt([{"role": "user", "content": parts}, calls])
    assert chat.render(tokenizer, [talk]) == ["7 + 3"]
    assert chat.last_turns(tokenizer, [talk]) == [len(tokenizer("7 + 3")["input_ids"])]
    assert [text_of(talk), text_of(talk[:1]), text_of("7")] == ["", "7 + 3", "7"]


@pytest.mark.parametrize("wrong", [[], {}, [1], [{"role": "user"}], [{"content": "7"}], [{"role": 1, "content": "7"}]])
def test_what_is_no_prompt_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="a prompt must be a text, or a list of messages with a role and a content"):
        as_prompt(wrong)


def test_answers_of_counts_up_to_the_end_token_and_reads_the_thought(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    said = ["<think>1 + 1 = 2</think>2", "<think>1 +"]
    rows = [tokenizer(text)["input_ids"] for text in said]
    rows[0].append(tokenizer.eos_token_id)
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    finished, cut = chat.answers_of(model, Reader.of(tokenizer), ids, ["a", "b"], [0.0, 1.0], ["", ""])
    assert (finished.thought, finished.text, finished.tokens, finished.finished) == (
        "1 + 1 = 2",
        "2",
        len(rows[0]),
        True,
    )
    assert (cut.thought, cut.text, cut.tokens, cut.finished) == ("1 +", "", width, False)
    assert (finished.intensity, cut.intensity) == (0.0, 1.0)


def test_a_prompt_may_end_inside_a_thought(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    ids = torch.tensor([tokenizer("1 + 1")["input_ids"]])
    (answer,) = chat.answers_of(model, Reader.of(tokenizer), ids, ["a"], None, ["<|assistant|><think>\n"])
    assert (answer.thought, answer.text, answer.intensity) == ("1 + 1", "", None)


TEMPLATES = {"instruct": "I {{ messages[0].content }}", "thinking": "T {{ messages[0].content }}<think>"}


@pytest.mark.parametrize(
    ("chat_template", "begin"),
    [
        ("default", "IIII"),
        ("instruct", "IIII"),
        ("thinking", "TTTT"),
        (0.5, "IITT"),
        (0, "TTTT"),
        (lambda lam: "thinking" if 0.2 < lam < 0.9 else "instruct", "ITTI"),
    ],
)
def test_each_row_goes_through_the_template_of_its_lam(pair: tuple[Any, Any], chat_template: Any, begin: str) -> None:
    tokenizer = copy.deepcopy(pair[1])
    lams = [0.0, 0.3, 0.5, 1.0]
    tokenizer.chat_template = {"default": TEMPLATES["instruct"], **TEMPLATES}
    texts, batch = chat.encode(tokenizer, ["7"] * 4, chat_template, lams)
    assert "".join(text[0] for text in texts) == begin
    for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        assert tokenizer.decode(ids[mask.bool()]) == text
    tokenizer.chat_template = TEMPLATES["thinking"]  # one template for both ends
    assert {text[0] for text in chat.encode(tokenizer, ["7"] * 4, chat_template, lams)[0]} == {"T"}


def test_ask_reads_thoughts_that_the_template_opens(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair[0], copy.deepcopy(pair[1])
    plain = tokenizer.chat_template
    tokenizer.chat_template = {"default": plain, "instruct": plain, "thinking": plain + "<think>"}
    options = {"chat_template": 0.5, "do_sample": False, "max_new_tokens": 60}
    quick, slow = chat.ask(model, tokenizer, ["12 + 30 ="] * 2, [0.0, 1.0], **options)
    assert quick == chat.ask(*pair, ["12 + 30 ="], [0.0], **options)[0]
    assert slow.finished
    assert slow.thought
    assert slow.text
    assert "think>" not in slow.thought + slow.text


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        ("thinker", r"chat_template must be one of \['default', 'instruct', 'thinking'\].*got 'thinker'"),
        (lambda lam: "none", "or depend on λ, got 'none'"),
        (0.5, "needs the intensities of the rows, got None"),
    ],
)
def test_a_bad_template_is_refused(pair: tuple[Any, Any], chat_template: Any, message: str) -> None:
    intensities = [0.5] if callable(chat_template) else None
    with pytest.raises(ValueError, match=message):
        chat.encode(pair[1], ["7"], chat_template, intensities)


THINKS = "{% if not enable_thinking | default(true) %}{{ '<think></think>' }}{% endif %}"


@pytest.mark.parametrize("lam", [1.0, "auto"])
def test_variables_reach_the_chat_template(lam: Any, pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pair
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + THINKS)
    options = {"max_new_tokens": 4, "do_sample": False, "prompt_intensity": 0.0, "prompt_tail": "turn"}
    variables = {"enable_thinking": False}
    (answer,) = chat.ask(model, tokenizer, ["42 + 69"], lam, chat_template_kwargs=variables, **options)
    (text,) = chat.render(tokenizer, ["42 + 69"], **variables)
    assert text.endswith("<think></think>")
    (same,) = chat.ask(model, tokenizer, [text], lam, None, **{**options, "prompt_tail": 7})
    assert (answer.text, answer.intensity) == (same.text, same.intensity)


@pytest.mark.parametrize(
    ("template", "variables", "message"),
    [
        ("default", {"wings": 1}, "chat_template_kwargs must be variables of the chat template, got 'wings'"),
        ("default", {"tokenize": True}, "of the chat template, got 'tokenize'"),
        (None, {"enable_thinking": False}, "chat_template_kwargs need the chat template: drop chat_template=None"),
    ],
)
def test_variables_that_nothing_reads_are_refused(
    template: str | None,
    variables: dict[str, Any],
    message: str,
    pair: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = pair
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + THINKS)
    with pytest.raises(ValueError, match=message):
        chat.ask(model, tokenizer, ["2 + 3"], 0.0, template, chat_template_kwargs=variables)


def test_rows_of_one_batch_answer_as_each_alone(pair: tuple[Any, Any]) -> None:
    prompts, lams = ["What is 7 + 3?", "What is the gcd of 12, 18 and 30?"], [0.0, 1.0]
    options = {"do_sample": False, "max_new_tokens": 8}
    together = chat.ask(*pair, prompts, lams, **options)
    alone = [chat.ask(*pair, [prompt], [lam], **options)[0] for prompt, lam in zip(prompts, lams, strict=True)]
    assert together == alone


TALK = [
    {"role": "system", "content": "You count."},
    {"role": "user", "content": "7 + 3 ="},
    {"role": "assistant", "content": "10"},
    {"role": "user", "content": "12 + 30 ="},
]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}<assistant>"


def test_the_last_turn_begins_with_the_text_of_the_last_user_message(pair: tuple[Any, Any]) -> None:
    tokenizer = copy.deepcopy(pair[1])
    tokenizer.chat_template = PLAIN
    prompts: list[Any] = [TALK, TALK[:2], "0 + 5 =", TALK[:1], [*TALK[:1], {"role": "user", "content": "0"}]]
    for prompt, turn in zip(prompts, chat.last_turns(tokenizer, prompts), strict=True):
        (text,) = chat.render(tokenizer, [prompt])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        before, after = tokenizer.decode(ids[: len(ids) - turn]), tokenizer.decode(ids[len(ids) - turn :])
        assert before + after == text
        if prompt == TALK[:1]:
            assert before == ""  # no user said anything
        else:
            assert before.endswith("<user>")
            assert "<user>" not in after
    with pytest.raises(ValueError, match=r"^prompt_tail='turn' needs the chat template"):
        chat.ask(*pair, ["7"], 0.5, None, prompt_intensity=0.0, prompt_tail="turn")


def test_ask_reads_beginnings_at_another_lam(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair[0], copy.deepcopy(pair[1])
    tokenizer.chat_template = PLAIN
    prompts: list[Any] = [TALK, TALK[:2], TALK]
    options = {"do_sample": False, "max_new_tokens": 20}
    how = {"prompt_intensity": [0.2, 0.0, 0.2], **options}
    turns = chat.last_turns(tokenizer, prompts)
    passes: list[Any] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: passes.append(given[0].shape))
    found = chat.ask(model, tokenizer, prompts, [0.3, 0.7, 1.0], prompt_tail="turn", **how)
    hook.remove()
    assert [rows for rows, _ in passes[:2]] == [2, 3]
    assert passes[1][1] == max(turns)
    assert found == chat.ask(model, tokenizer, prompts, [0.3, 0.7, 1.0], prompt_tail=turns, **how)
    mixed = chat.ask(model, tokenizer, prompts, [0.3, 0.7, 1.0], prompt_tail=["turn", 2, turns[2]], **how)
    assert (mixed[0], mixed[2]) == (found[0], found[2])
    texts, batch = chat.encode(tokenizer, prompts)
    ids = model.generate(**batch, intensity=[0.3, 0.7, 1.0], prompt_tail=turns, **how)[:, batch["input_ids"].shape[1] :]
    assert chat.answers_of(model, Reader.of(tokenizer), ids, prompts, [0.3, 0.7, 1.0], texts) == found
    whole = chat.ask(model, tokenizer, prompts, [0.3, 0.7, 1.0], prompt_tail=1000, **how)
    assert whole == chat.ask(model, tokenizer, prompts, [0.3, 0.7, 1.0], **options)


def test_auto_behind_a_beginning_at_0_costs_one_token_more(pair: tuple[Any, Any]) -> None:
    """The shipped estimator reads no prompt a second time, and chooses what it would have chosen."""
    model, tokenizer = pair
    prompts, options = ["What is 12 + 30 - 4?", "7 + 3 ="], {"do_sample": False, "max_new_tokens": 12}
    lams = chat.numbers_of(model, tokenizer, prompts, "auto")
    length = chat.encode(tokenizer, prompts)[1]["input_ids"].shape[1]
    passes: list[Any] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: passes.append(tuple(given[0].shape)))
    try:
        found = chat.ask(model, tokenizer, prompts, ["auto", "auto"], prompt_intensity=0.0, **options)
    finally:
        hook.remove()
    assert passes[:3] == [(2, length - 1), (2, 1), (2, 1)]
    assert [answer.intensity for answer in found] == lams
    assert found == chat.ask(model, tokenizer, prompts, lams, prompt_intensity=0.0, **options)
    assert model.dami.chosen == dict(enumerate(lams))
    templates = {"chat_template": lambda lam: "default", "prompt_intensity": 0.0}  # λ before the prompt
    assert [each.intensity for each in chat.ask(model, tokenizer, prompts, "auto", **templates, **options)] == lams


def test_a_streamed_answer_has_as_much_room_as_another(pair: tuple[Any, Any]) -> None:
    class Streamer:
        tokens = 0

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.numel()

        def end(self) -> None:
            pass

    model = dami.twin(pair[0])
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.update(max_new_tokens=None, eos_token_id=None)
    model.config.max_position_embeddings, before = 48, model.config.max_position_embeddings
    try:
        streamer = Streamer()
        (answer,) = chat.ask(model, pair[1], ["7 + 3 ="], 0.0, streamer=streamer, do_sample=False)
        assert answer.tokens > 20
        assert streamer.tokens == 48
        assert chat.ask(model, pair[1], ["7 + 3 ="], 0.0, do_sample=False) == [answer]
        with pytest.raises(ValueError, match="max_new_tokens must be given with compile=True"):
            chat.ask(model, pair[1], ["7 + 3 ="], 0.0, compile=True)
        with pytest.raises(ValueError, match="prompts must leave room for an answer in 48 tokens, got"):
            chat.ask(model, pair[1], ["7 " * 50], 0.0)
    finally:
        model.config.max_position_embeddings = before
