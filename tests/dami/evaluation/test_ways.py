"""Ways to answer, the tails of prompts, and the search of the ways that are worth most."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dami
import numpy as np
import pytest
import torch
from dami.chat import ask
from dami.cli import app
from dami.dial.patch import patch_of
from dami.estimators import StaticIntensity
from dami.estimators.files import StoredIntensity
from dami.evaluation import Frontier, Record, load_task, sweep, tuning
from dami.evaluation.tails import measure_tails, tails_of
from dami.evaluation.tuning import Tuned, space, tune
from dami.evaluation.ways import Way, ask_in
from typer.testing import CliRunner

QUESTIONS = str(dami.example_pair()[0].parent / "questions.jsonl")
GREEDY = {"do_sample": False, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return dami.load_pair(*dami.example_pair(), dtype=torch.float32)


def test_a_way_answers_as_generate_does_with_its_arguments(pair: tuple[Any, Any]) -> None:
    """All in one batch, each as alone."""
    model, tokenizer = pair
    ways = [
        Way(0.7),
        Way(1.0, answer=0.0),
        Way(0.6, prompt=0.0),
        Way(0.6, answer=0.2, prompt=1.0, tail="turn"),
        Way(1.0, answer=0.0, parts=(("mlp", 0.4),)),
        Way(0.5, prompt=0.2, tail=3, parts=(("attn", 0.9),)),
    ]
    prompts = ["12 + 30 - 4 ="] * len(ways)
    together = ask_in(model, tokenizer, prompts, ways, **GREEDY)
    assert len({answer.thought for answer in together}) > 1
    for way, prompt, found in zip(ways, prompts, together, strict=True):
        given = way.arguments(tokenizer)
        ids, mask = tokenizer(f"<|user|>{prompt}<|assistant|>", return_tensors="pt").values()
        if given.get("prompt_tail") == "turn":
            given["prompt_tail"] = ids.shape[1] - 1
        alone = model.generate(ids, attention_mask=mask, **given, **GREEDY)[0, ids.shape[1] :]
        text = tokenizer.decode(alone[: found.tokens], skip_special_tokens=True)
        assert text.endswith(found.text)
        assert found.thought in text
        assert found.intensity == way.thought


def test_a_way_says_what_it_is() -> None:
    assert Way(0.5).name == "λ=0.5"
    assert Way(0.5, 0.0, 1.0, "turn", (("mlp", 0.25),)).name == "λ=0.5, answer 0, prompt 1 but turn, mlp 0.25"
    assert Way(0.5).is_static
    assert not Way(0.5, prompt=0.0).is_static


def test_a_sweep_reads_its_questions_once(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    task, passes = load_task(QUESTIONS, 2, verifier="word"), []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: passes.append(given[0].shape))
    try:
        records = sweep(model, tokenizer, task, [0.0, 0.5, 1.0], prompt_intensity=0.3, **GREEDY)
    finally:
        hook.remove()
    assert [rows for rows, _ in passes[:3]] == [2, 6, 6]
    assert passes[1][1] == 1
    prompts = [question.question for question in task.questions for _ in range(3)]
    alone = ask(model, tokenizer, prompts, [0.0, 0.5, 1.0] * 2, prompt_intensity=0.3, **GREEDY)
    assert [record.text for record in records] == [answer.text for answer in alone]


def frontier(scores: Sequence[float], tokens: Sequence[float], questions: int = 400) -> Frontier:
    """Answers of ways that are right with these chances, at these lengths."""
    rng = np.random.default_rng(0)
    right = rng.random((questions, 1)) < np.array(scores)  # alike for all ways
    lengths = np.broadcast_to(np.array(tokens, dtype=float), right.shape)
    empty = np.zeros(right.shape)
    return Frontier(
        tuple(map(float, range(len(scores)))), right.astype(float), lengths, empty, empty, np.zeros(questions, np.int64)
    )


def test_a_tail_costs_nothing_if_the_frontier_stays() -> None:
    """λ may mean less behind it, which the cheaper tokens make up for; if the best accuracy falls, it costs."""
    scores, tokens = [0.4, 0.6, 0.8], [10.0, 20.0, 40.0]
    less, worse = ([0.58, 0.8], [19.0, 40.0]), ([0.5, 0.7], [20.0, 40.0])
    lams = (0.0, 0.5, 1.0)
    # λ=0 is that of the prompts, and has no answers of its own
    numbers = (0.0, 1.0, 2.0, 4.0, 5.0, 7.0, 8.0)
    found = frontier([*scores, *worse[0], *less[0]], [*tokens, *worse[1], *less[1]])
    found = Frontier(numbers, found.scores, found.tokens, found.thinking, found.well_formed, found.levels)
    tails = tails_of(found, [1, 8], lams, 0.0)
    assert tails.least == 8
    assert tails.losses[1].worth.low > 0.03
    assert tails.losses[8].worth.value < 0.01
    assert tails.losses[8].accuracy == (0, 0, 0)
    assert [(point.tail, point.intensity) for point in tails.points[:4]] == [
        (None, 0.0),
        (None, 0.5),
        (None, 1.0),
        (1, 0.0),
    ]
    assert tails.points[3].accuracy == tails.points[0].accuracy
    assert tails_of(found, [1], (0.0, 0.5, 1.0), 0.0).least is None


@pytest.mark.parametrize("prompt", [0.0, 1.0])
def test_a_tail_costs_if_only_the_far_end_falls(prompt: float) -> None:
    """Behind the λ of the prompt nothing changes: where that is the best single λ, no worth is lost."""
    scores, tokens, behind = [0.9, 0.6, 0.8], [2.0, 20.0, 40.0], {1: [0.5, 0.2], 8: [0.4, 0.8]}
    lams = (0.0, 0.5, 1.0) if prompt == 0 else (1.0, 0.5, 0.0)
    found = frontier([*scores, *behind[1], *behind[8]], [*tokens, *tokens[1:], *tokens[1:]])
    numbers = (0.0, 1.0, 2.0, 4.0, 5.0, 7.0, 8.0)
    found = Frontier(numbers, found.scores, found.tokens, found.thinking, found.well_formed, found.levels)
    tails = tails_of(found, [1, 8], lams, prompt)
    assert [tails.losses[tail].worth.value for tail in (1, 8)] == [0, 0]
    assert tails.losses[1].accuracy.low > 0.4
    assert tails.losses[8].accuracy.value == 0
    assert tails.least == 8


def test_tails_are_measured_saved_and_resumed(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = pair
    task, told = load_task(QUESTIONS, 3, verifier="word"), []
    how = {"rows": 12, "on_batch": lambda news: told.append(len(news)), **GREEDY}
    estimator, presets = patch_of(model).estimator, model.dami.presets
    found = measure_tails(model, tokenizer, task, tmp_path, [2, "turn"], [0.0, 1.0], **how)
    assert told == [12]  # of 2 λ: whole prompts, and λ=1 with either tail
    assert found.questions == 3
    assert {point.tail for point in found.points} == {None, 2, "turn"}
    lines = (tmp_path / "tails.jsonl").read_text().splitlines()
    (tmp_path / "tails.jsonl").write_text("\n".join(lines[:5]))  # cut off in a batch
    again = measure_tails(model, tokenizer, task, tmp_path, [2, "turn"], [0.0, 1.0], **how)
    assert again == found
    stored = StoredIntensity.load(tmp_path)
    assert (stored.presets, stored.prompt_tail) == (presets, found.least)
    assert type(stored.estimator) is type(estimator)
    assert stored.frontier["prompt tails"] == json.loads((tmp_path / "tails.json").read_text())
    for tails in ([], [0], [True], [1, 1], ["all"], [1.5]):
        with pytest.raises(ValueError, match="tails must be distinct positive numbers of tokens, or 'turn', got"):
            measure_tails(model, tokenizer, task, tmp_path, tails)


def test_a_pair_keeps_what_tail_it_needs(tmp_path: Path) -> None:
    model, tokenizer = dami.load_pair(*dami.example_pair())
    dami.attach(model, None, {})
    StoredIntensity(prompt_tail=4).save(tmp_path / "own")
    dami.attach(model, tmp_path / "own")
    assert model.dami.prompt_tail == 4
    assert "4 tokens of a prompt" in str(model.dami)
    dami.save_pair(model, tmp_path / "saved", tokenizer)
    assert dami.load_pair(tmp_path / "saved")[0].dami.prompt_tail == 4
    StoredIntensity(StaticIntensity(0.5)).save(tmp_path / "none")
    assert dami.attach(model, tmp_path / "none").dami.prompt_tail is None
    file = tmp_path / "own" / "intensity.json"
    for rubbish in ("-1", "true", '"turn"', "1.5"):
        file.write_text(f'{{"estimator": null, "presets": {{}}, "prompt_tail": {rubbish}}}')
        with pytest.raises(ValueError, match="prompt_tail must be an integer of at least 0, or null"):
            dami.attach(model, tmp_path / "own")


def test_the_space_holds_every_way_once_and_static_ones_first() -> None:
    ways = space((0.0, 1.0))
    assert ways[:2] == [Way(0.0), Way(1.0)]
    assert len(ways) == len({way.name for way in ways}) == 2 * 2 * 2  # answer and prompt alike, or at the other λ
    assert len(space((0.0, 0.5, 1.0), ["mlp"])) == 3**4
    assert space((0.0, 1.0), tail="turn")[-1].tail == "turn"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Numbers of ways and questions of each round; answers are right as often as the way's λ of the prompt says."""
    rounds: list[tuple[int, int]] = []

    def answer_in(_: Any, __: Any, task: Any, ways: Any, questions: Any, path: Path, **___: Any) -> list[Record]:
        rounds.append((len(ways), len(questions)))
        rng = np.random.default_rng(len(rounds))
        return [
            Record("t", q, 0, float(n), 0, float(rng.random() < 0.3 + 0.6 * (way.prompt or 0)),
                   round(10 + 90 * way.thought), "", "1", True)
            for q in questions for n, way in ways.items()
        ]  # fmt: skip

    monkeypatch.setattr(tuning, "answer_in", answer_in)
    monkeypatch.setattr(tuning, "_save_presets", lambda *_: None)
    return rounds


def test_a_search_halves_its_ways_and_doubles_its_questions(answers: list[tuple[int, int]], tmp_path: Path) -> None:
    task = load_task(QUESTIONS, 200, verifier="word")
    found = tune(None, None, task, tmp_path, candidates=40, finalists=5, first=10, held_out=0.25)  # type: ignore[arg-type]
    assert found.searched == [(40, 10), (20, 20), (10, 40)]
    assert answers[:-1] == [(40, 10), (20, 10), (10, 20)]
    assert answers[-1][1] == 50
    assert answers[-1][0] == len(found.finalists) <= 10
    best = max(found.finalists, key=lambda each: each.gain.value)
    assert best.way.prompt == 1  # which the answers made good
    assert best.gain.low > 0.2
    assert found.presets["high"].prompt == 1
    assert Tuned.load(tmp_path) == found
    assert (tmp_path / "tuned.svg").exists()
    assert (tmp_path / "tuned.png").exists()
    few = load_task(QUESTIONS, 40, verifier="word")
    found = tune(None, None, few, tmp_path, candidates=40, finalists=2, first=15, seed=1)  # type: ignore[arg-type]
    assert found.searched == [(40, 15), (20, 20)]  # no more questions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "candidates must be at least 1, got 0"),
        ({"finalists": 0}, "finalists must be at least 1, got 0"),
        ({"first": 0}, "first must be at least 1, got 0"),
        ({"held_out": 1.0}, "held_out must leave questions on either side, got 1.0 of 20"),
        ({"intensities": [0.5, 0.5]}, "intensities must be distinct"),
    ],
)
def test_a_search_refuses_what_cannot_be(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tune(None, None, load_task(QUESTIONS, 20, verifier="word"), tmp_path, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="questions must be at least 16, got 3"):
        tune(None, None, load_task(QUESTIONS, 3, verifier="word"), tmp_path)  # type: ignore[arg-type]


def test_both_commands(tmp_path: Path) -> None:
    few = ["--questions", "16", "-l", "0", "-l", "1", "--max-tokens", "12", "--greedy"]
    tuned = CliRunner().invoke(app, ["tune", *few, "--candidates", "6", "--finalists", "2", "-o", str(tmp_path / "a")])
    assert tuned.exit_code == 0, tuned.output
    assert "gain over single λ" in tuned.output
    assert "low: λ=" in tuned.output
    assert {"tuned.json", "tuned.svg", "intensity.json", "round-1.jsonl", "held-out.jsonl"} <= {
        file.name for file in (tmp_path / "a").iterdir()
    }
    again = CliRunner().invoke(app, ["tune", *few, "--candidates", "6", "--finalists", "2", "-o", str(tmp_path / "a")])
    assert again.exit_code == 0, again.output
    assert again.output.splitlines()[-3:] == tuned.output.splitlines()[-3:]
    found = CliRunner().invoke(
        app, ["tails", *few[2:], "--questions", "2", "--tail", "turn", "-o", str(tmp_path / "b")]
    )
    assert found.exit_code == 0, found.output
    assert "The least tail that costs nothing: none of those measured." in found.output
    bad = CliRunner().invoke(app, ["tails", "--tail", "some", "-o", str(tmp_path / "b")])
    assert bad.exit_code == 2
    assert "must be a number of tokens or turn, got 'some'" in bad.output
