"""The demo's pieces: choosing questions, judging, intervals, points, costs, plots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import dami
import pytest
import torch
from dami.chat import Answer, encode
from dami.cli import demo, terminal
from dami.evaluation import Frontier, Question, plots
from dami.evaluation.frontier import Interval, Point
from dami.evaluation.policies import play
from rich.console import Console
from transformers import AutoModelForCausalLM

from tests.dami.evaluation.test_frontier import RISING, records
from tests.dami.families import merged

QUESTIONS = [
    Question(f"{task} {level} {n}", str(n), task, level)
    for task in ("gcd", "sum")
    for level in (1, 2, 3)
    for n in range(4)
]


def answer(intensity: float, text: str, tokens: int = 5, thought: str = "") -> Answer:
    return Answer("?", intensity, thought, text, tokens, True)


def point(intensity: float, accuracy: float, tokens: float) -> Point:
    return Point(
        intensity,
        Interval(accuracy, accuracy - 0.1, accuracy + 0.1),
        Interval(tokens, tokens - 4, tokens + 4),
        0.5,
        1.0,
    )


CURVE = [point(0.0, 0.2, 10.0), point(0.5, 0.5, 40.0), point(1.0, 0.8, 90.0)]


def test_rising_takes_one_question_of_each_level_and_tasks_by_turns() -> None:
    chosen = demo.rising(QUESTIONS, seed=0)
    assert [q.level for q in chosen] == [1, 2, 3]
    assert chosen[0].task != chosen[1].task
    assert chosen == demo.rising(QUESTIONS, seed=0)
    assert chosen != demo.rising(QUESTIONS, seed=1)


def test_measured_sees_memory_that_was_held_and_given_back() -> None:
    with demo.measured(torch.device("cpu")) as used:
        torch.ones(32 * 2**20, dtype=torch.uint8)
    assert used["seconds"] > 0
    if used["peak"] is not None:  # a system that tells
        assert 30 * 2**20 < used["peak"] < 60 * 2**20


@pytest.mark.parametrize("terminal_", [True, False])
def test_a_thought_is_labelled_where_no_style_tells_it(terminal_: bool) -> None:
    console = Console(width=80, force_terminal=terminal_)
    with console.capture() as captured:
        console.print(terminal.side_by_side([answer(0.0, "93"), answer(1.0, "93", thought="111 93")], console))
    for label in ("thought: 111 93", "answer: 93"):
        assert (label in captured.get()) != terminal_
    assert "no thought" in captured.get()
    with console.capture() as captured:
        console.print(terminal.side_by_side([answer(0.0, "93")], console))
    assert "answer:" not in captured.get()


def test_the_price_names_both_sides_and_how_many_answers_agree() -> None:
    patched = demo.Cost(7_000_000, 5_000_000, 2.0, [[1], [2], [3], [4]], ["a", "b", "c", "d"])
    copies = demo.Cost(14_000_000, None, 9.0, [[1], [9], [3], [4]], ["a", "c", "c", "d"])
    table = printed(demo.price_table(patched, copies, 2), 80).splitlines()
    assert table[1].split() == ["one", "patched", "model", "2.0", "s", "7.0", "MB", "+", "5.0", "MB", "4"]
    assert table[2].split() == ["2", "merged", "copies,", "one", "per", "λ", "9.0", "s", "14.0", "MB", "unknown", "2"]
    line = demo.verdict(patched, copies, 2, [0.0625], torch.bfloat16)
    for part in ("2 λ", "4.5×", "50%", "3 of 4", "the others part (1)", "at most 0.062", "bfloat16 rounds"):
        assert part in line
    assert "log-probabilities of two tokens are equal:" in demo.verdict(patched, copies, 2, [0.0], torch.bfloat16)
    line = demo.verdict(patched, copies, 2, [], torch.bfloat16)
    assert line.endswith("4 of 4 greedy answers agree.")


def test_the_picture_is_a_png_of_a_readable_size(tmp_path: Path) -> None:
    plots.save_curve(Frontier.of(records(*RISING)), tmp_path / "curve.png", "title")
    content = (tmp_path / "curve.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[place : place + 4], "big") for place in (16, 20))
    assert width >= 1200
    assert height >= 500


@pytest.mark.parametrize("levels", range(1, 8))
def test_the_picture_has_a_shade_for_any_number_of_levels(tmp_path: Path, levels: int) -> None:
    of_levels = [replace(record, level=record.index % levels) for record in records(*RISING)]
    plots.save_curve(Frontier.of(of_levels), tmp_path / "curve.svg", "title")
    assert (tmp_path / "curve.svg").stat().st_size > 1000


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_drawn_curve_fits_and_puts_points_where_they_belong(width: int) -> None:
    lines = plots.draw_curve(CURVE, width).plain.split("\n")
    assert max(map(len, lines)) <= width
    dots = [(y, x) for y, line in enumerate(lines) for x, sign in enumerate(line) if sign == "●"]
    assert len(dots) == 3
    by_tokens = sorted(dots, key=lambda dot: dot[1])
    assert [y for y, _ in by_tokens] == sorted((y for y, _ in dots), reverse=True)  # more tokens, higher up
    for (y, x), p in zip(by_tokens, CURVE, strict=True):
        assert lines[y][x + 1 :].startswith(f"{p.intensity:g}")


def test_a_curve_of_one_value_can_be_drawn() -> None:
    assert plots.draw_curve([point(0.0, 0.1, 3.0)], 80).plain.count("●") == 1


def test_a_policy_is_a_diamond_with_its_name() -> None:
    reached = plots.Reached("auto", Interval(40.0, 38.0, 42.0), Interval(0.95, 0.93, 0.97))  # above all others
    lines = plots.draw_curve(CURVE, 80, reached=[reached]).plain.split("\n")
    (at,) = [(y, line.index("◆auto")) for y, line in enumerate(lines) if "◆" in line]
    (half,) = [(y, line.index("●0.5")) for y, line in enumerate(lines) if "●0.5" in line]
    assert at[1] == half[1]  # of as many tokens
    assert 0 < at[0] < half[0]  # right more often, and on the picture


def test_the_demo_says_what_choosing_is_worth() -> None:
    frontier = Frontier.of(records(*RISING))
    outcome = play(frontier, [0.5] * len(frontier))
    told = demo.auto_verdict(frontier, outcome)
    thinking = frontier.points[-1]
    accuracy = "{:.1%} right ({:.1%} to {:.1%})".format(*outcome.accuracy)
    for part in (accuracy, f"{thinking.accuracy.value:.1%}", f"{outcome.static.value:.1%}"):
        assert part in told
    assert f"{outcome.tokens.value / thinking.tokens.value:.2f} of what λ = 1 takes" in told


def test_how_a_lam_was_chosen_stands_before_it() -> None:
    answers = [answer(0.0, "a"), answer(0.4, "b")]
    text = printed(terminal.side_by_side(answers, Console(width=80), names=["", "auto"]), 80)
    assert "auto λ=0.4" in text
    assert "auto λ=0 " not in text


def test_colors_run_from_cool_to_warm_and_stay_at_the_ends() -> None:
    assert plots.color(0.0) == plots.color(-3.0) == plots.COLORS[0]
    assert plots.color(0.5) == plots.COLORS[1]
    assert plots.color(1.0) == plots.color(2.0) == plots.COLORS[2]


def printed(renderable: object, width: int) -> str:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("count", [1, 3, 11])
def test_answers_stand_side_by_side_at_any_width(width: int, count: int) -> None:
    answers = [answer(k / 10, f"answer{k}", 100 + k, f"start{k} " + "and on " * 199 + f"end{k}") for k in range(count)]
    text = printed(terminal.side_by_side(answers, Console(width=width), "title", [True] * count), width)
    assert max(map(len, text.splitlines())) <= width
    for k in range(count):
        for part in (f"λ={k / 10:g}", f"{100 + k} tokens", f"start{k}", f"end{k}", f"answer{k}"):
            assert part in text
    assert text.count("✓") == count
    assert "more lines" in text


def test_a_thought_in_the_making_shows_its_end() -> None:
    answers = [answer(0.5, "", 100, "start " + "and on " * 199 + "end")]
    text = printed(terminal.side_by_side(answers, Console(width=80), tail=True), 80)
    assert "start" not in text
    assert "end" in text
    assert "no answer" not in text


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (3_430_000, "3.4 MB"), (512_000_000, "512 MB"), (2e15, "2000 TB")]
)
def test_size(nbytes: float, text: str) -> None:
    assert terminal.size(nbytes) == text


@pytest.mark.parametrize(("numbers", "text"), [([0], "0"), ([0, 1, 2], "0-2"), ([0, 2, 3, 7], "0,2-3,7"), ([], "")])
def test_runs(numbers: list[int], text: str) -> None:
    assert terminal.runs(numbers) == text


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any, list[Any]]:
    """The pair, its tokenizer and its two ends, in float32, where the order of a sum decides between no two tokens."""
    model, tokenizer = dami.load_pair(*dami.example_pair(), dtype=torch.float32)
    return (
        model,
        tokenizer,
        [AutoModelForCausalLM.from_pretrained(end, dtype=model.dtype) for end in dami.example_pair()],
    )


def test_one_batch_and_merged_copies_are_asked_the_same(shipped: tuple[Any, Any, list[Any]]) -> None:
    model, tokenizer, ends = shipped
    prompts, lams = ["What is 2 + 3?", "gcd(12, 18)"], (0.0, 0.4, 1.0)
    patched = demo.cost_of(model, tokenizer, prompts, lams, max_new_tokens=4)
    each = [demo.cost_of(merged(*ends, lam, torch.float32), tokenizer, prompts, max_new_tokens=4) for lam in lams]
    copies = demo.cost_of_all(each)
    assert patched.weights == 2 * copies.weights / 3
    assert patched.texts == copies.texts
    assert patched.answers == copies.answers
    assert len(patched.texts) == 6
    assert patched.seconds > 0
    assert copies.seconds == sum(cost.seconds for cost in each) > 0
    assert patched.peak is None or copies.peak == max(cost.peak for cost in each)


def test_a_parting_is_the_difference_of_log_probabilities(shipped: tuple[Any, Any, list[Any]]) -> None:
    _, tokenizer, (instruct, _) = shipped
    (answer,) = demo.cost_of(instruct, tokenizer, ["gcd(84, 36) ="]).answers
    assert len(answer) > 1
    other = [answer[0], (answer[1] + 1) % len(tokenizer), *answer[2:]]
    gap = demo.parting(instruct, tokenizer, "gcd(84, 36) =", answer, other)
    _, batch = encode(tokenizer, ["gcd(84, 36) ="])
    ids = torch.cat([batch["input_ids"], torch.tensor([answer])], 1)
    likely = instruct(input_ids=ids).logits[0, -len(answer)].double().log_softmax(-1)  # of the second token
    assert gap > 0  # the greedy choice
    torch.testing.assert_close(gap, (likely[answer[1]] - likely[other[1]]).item(), rtol=1e-4, atol=1e-4)
