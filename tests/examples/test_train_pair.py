"""The pair that ships, and the tasks it was trained on."""

import json
import random
import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import combinations
from pathlib import Path

import pytest
import torch
from dami.chat import Answer
from dami.evaluation.statistics import wilson
from safetensors.torch import load_file
from transformers import AutoTokenizer

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
@pytest.mark.parametrize("task", ["chain_sum", "leg_counting", "gcd", "calendar_arithmetic", "elements"])
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


def test_elements_are_those_of_the_periodic_table(tasks):
    import elements

    number = {name: place for place, name in enumerate(elements.NAMES, 1)}
    symbol = dict(zip(elements.NAMES, elements.SYMBOLS, strict=True))
    assert len(number) == len({*symbol.values()}) == 100
    known = {"hydrogen": (1, "H"), "iron": (26, "Fe"), "silver": (47, "Ag"), "gold": (79, "Au"), "uranium": (92, "U")}
    assert {name: (number[name], symbol[name]) for name in known} == known
    assert elements.counting_up("22") == [("Ca", "20"), ("Sc", "21"), ("Ti", "22")]
    assert elements.counting_up("Li") == [("1", "H"), ("2", "He"), ("3", "Li")]


def test_questions_kept_from_training_are_other_ones(tasks):
    seeds = {"seen": 7, "unseen": tasks.HELD_OUT_SEED}
    seen, unseen = ({q.text for q in tasks.draw("elements", 2, 4000, seed)} for seed in seeds.values())
    assert (len(seen), len(unseen), seen & unseen) == (360, 120, set())
    drawn = tasks.draw("calendar_arithmetic", 3, 800, seed=7)
    assert 60 < sum(map(tasks.is_reserved, drawn)) < 140


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
            assert 16 <= sum((q.task, q.level) == (task, level) for q in drawn) <= 40


def script(name):
    """A script of the example as a module; ../smollm2 has scripts of the same names."""
    pytest.importorskip("reasoning_gym")
    spec = spec_from_file_location(f"train_pair_{name}", ROOT / "examples" / "train_pair" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measure():
    return script("measure")


def test_training_can_start_halfway_between_the_ends_of_a_pair():
    middle = script("train").midpoint(PAIR)
    ends = [load_file(PAIR / end / "model.safetensors") for end in ("instruct", "thinking")]
    assert middle.keys() == ends[0].keys()
    for name, tensor in middle.items():
        expected = (ends[0][name].double() + ends[1][name].double()) / 2
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-8)


def test_batches_have_the_tasks_levels_and_styles_of_a_stage(tasks):
    train = script("train")
    questions = {(task, level): tasks.draw(task, level, 20, 7) for task in tasks.TASKS for level in tasks.LEVELS}
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "instruct")
    lengths = {}
    for stage in ("instruct", "thinking"):
        data = train.batches(questions, stage, tokenizer, random.Random(0), 1024)
        batches = [next(data) for _ in range(8)]
        assert all(batch["input_ids"].numel() <= 1024 for batch in batches)
        learned = [row[row >= 0] for batch in batches for row in batch["labels"]]
        assert all(row[-1] == tokenizer.eos_token_id for row in learned)
        lengths[stage] = sum(map(len, learned)) / len(learned)
    assert lengths["thinking"] > 3 * lengths["instruct"]


def test_the_estimator_learns_from_questions_that_were_kept_from_training(tasks):
    unseen = script("estimator").draw_unseen(3)
    held_out = {json.loads(line)["question"] for line in (PAIR / "questions.jsonl").read_text().splitlines()}
    assert not {line["question"] for line in unseen} & held_out
    assert {(line["task"], line["level"]) for line in unseen} == {(t, n) for t in tasks.TASKS for n in tasks.LEVELS}
    for line in unseen:
        question = tasks.Question(line["task"], line["level"], line["question"], line["answer"], "")
        assert tasks.is_reserved(question) or line["task"] == "elements"


def test_pooled_rows_count_by_their_questions(measure):
    group = (0.5, "gcd", 1)
    texts = [("7", 3), ("7", 5), ("8", 7), ("", 9)]
    answers = [Answer("?", 0.5, "", text, tokens, True) for text, tokens in texts]
    easy = measure.csv_row(group, [(True, answers[0]), (True, answers[1])])
    hard = measure.csv_row(group, [(True, answers[0]), (False, answers[1]), (False, answers[2]), (False, answers[3])])
    assert (easy["accuracy"], easy["tokens_mean"], hard["well_formed"]) == (1, 4, 0.75)
    point = measure.pool(0.5, [easy, hard])
    assert point.intensity == 0.5
    assert point.accuracy.value == pytest.approx(3 / 6)
    assert point.accuracy[1:] == pytest.approx(wilson(0.5, 6))
    assert point.tokens.value == pytest.approx((2 * 4 + 4 * 6) / 6)
    assert point.well_formed == pytest.approx((2 + 3) / 6)


def test_the_readmes_picture_starts_at_0_and_names_every_intensity_and_the_estimator(measure, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(measure, "save", lambda figure, path: shown.append((figure, path)))
    results = ROOT / "benchmarks" / "results"
    measure.plot(results / "pair_curve.csv", results / "estimators_shipped.csv", tmp_path / "a.svg")
    ((figure, path),) = shown
    assert path == tmp_path / "a.svg"
    (axes,) = figure.axes
    assert (axes.get_xlim()[0], axes.get_ylim()[0]) == (0, 0)
    texts = [text.get_text() for text in axes.texts]
    for lam in ("λ = 0", *(f"{i / 10:g}" for i in range(1, 10)), "λ = 1", "auto, price 0.2 (default)", "auto, price 1"):
        assert lam in texts
    labels = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in combinations(labels, 2))
    assert len(axes.collections) >= 1  # the band
