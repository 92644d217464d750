"""The pair that ships, and the tasks it was trained on."""

import json
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAIR = ROOT / "python" / "dami" / "data" / "pair"
sys.path.insert(0, str(ROOT / "examples" / "train_pair"))


@pytest.fixture(scope="module")
def tasks():
    pytest.importorskip("reasoning_gym")
    import tasks

    return tasks


def test_size_and_files():
    files = [path for path in PAIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    for end in ("instruct", "thinking"):
        names = {path.name for path in (PAIR / end).iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names


def test_tokenizer_keeps_text_digits_and_thoughts():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PAIR / "instruct")
    for text in ("<think>47 + 38 = 85\n-4 - 9 = -13</think>-13", "gcd(84, 36)", "Grüße, λ = ½?"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert all(token.strip().isdecimal() is False or len(token) == 1 for token in map(tokenizer.decode, ids))
    assert len(tokenizer("<think></think>").input_ids) == 2
    chat = [{"role": "user", "content": "4 + 5 =\n"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>4 + 5 =<|assistant|>"


@pytest.mark.parametrize("level", range(1, 6))
@pytest.mark.parametrize("task", ["chain_sum", "leg_counting", "gcd", "calendar_arithmetic"])
def test_solutions_reach_the_answer(tasks, task, level):
    rng = random.Random(0)
    for question in tasks.draw(task, level, 100, seed=7):
        steps = tasks.solve(question)
        # The greatest common divisor is what the last division divides by.
        last = steps[-1].work.split(" mod ")[-1] if task == "gcd" else steps[-1].result
        assert last == question.answer
        assert tasks.score(task, question.answer, question.answer) == 1.0
        for style in tasks.STYLES:
            text, slips = tasks.write_solution(question, style, rng)
            assert text.rpartition("</think>")[2] == question.answer
            assert style == "check" or not slips


def test_checks_expose_slips(tasks):
    rng = random.Random(0)
    for question in tasks.draw("chain_sum", 5, 20, seed=7):
        text, slips = tasks.write_solution(question, "check", rng, slip_rate=1.0)
        slipped = [line for line in text.removeprefix("<think>").split("\n") if line.endswith(" no")]
        assert len(slips) == len(slipped) == len(tasks.solve(question))
        for (start, end), line in zip(slips, slipped, strict=True):
            work, check = (part.split(" = ") for part in line.removesuffix(" no").split(", "))
            assert text[start:end] == work[1]
            assert eval(work[0]) != int(work[1])
            assert eval(check[0]) == int(check[1])
            assert work[0].split()[0] != check[1]


def test_held_out_questions_are_the_shipped_ones(tasks):
    shipped = [json.loads(line) for line in (PAIR / "questions.jsonl").read_text().splitlines()]
    drawn = tasks.draw_held_out(40)
    assert [q["question"] for q in shipped] == [q.text for q in drawn]
    assert [q["answer"] for q in shipped] == [q.answer for q in drawn]
    assert len({q.text for q in drawn}) == len(drawn)
    for task in tasks.TASKS:
        for level in tasks.LEVELS:
            assert 20 <= sum((q.task, q.level) == (task, level) for q in drawn) <= 40
