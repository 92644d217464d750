"""The table of published pairs, which the code of `dami check` makes of recorded configs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dami.loading.published import FILE, PublishedPair, matching, pairs, recorded_config

from tools.pairs import HEAD, line, recorded_preview

PAGE = (Path(__file__).parents[1] / "docs" / "pairs.md").read_text(encoding="utf-8")
ROTATION = "rotary embedding"


def named(pair: PublishedPair) -> str:
    return f"{pair.instruct} {pair.thinking}"


@pytest.mark.parametrize("pair", pairs(), ids=named)
def test_the_page_says_what_the_code_says(pair: PublishedPair) -> None:
    assert line(pair) in PAGE.splitlines()


def test_the_page_has_a_row_for_each_pair_and_no_other() -> None:
    rows = PAGE.partition(HEAD)[2].strip().partition("\n\n")[0].splitlines()
    assert len(rows) == len(pairs())
    assert len({(pair.instruct, pair.thinking) for pair in pairs()}) == len(rows)


@pytest.mark.parametrize(
    ("instruct", "thinking", "subjects", "blocked"),
    [
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Thinking-2507", [], False),
        ("Qwen/Qwen2.5-Math-1.5B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", ["context length", "head"], False),
        ("Qwen/Qwen2.5-Math-7B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", ["context length"], False),
        ("Qwen/Qwen2.5-7B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", [ROTATION, "context length"], True),
        ("Qwen/Qwen3-8B", "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", [ROTATION], True),
        ("microsoft/phi-4", "microsoft/Phi-4-reasoning", [ROTATION, "context length"], True),
    ],
)
def test_what_recorded_configs_differ_in(instruct: str, thinking: str, subjects: list[str], blocked: bool) -> None:
    pair = next(each for each in pairs() if (each.instruct, each.thinking) == (instruct, thinking))
    found, compared = recorded_preview(pair)
    assert found is not None
    assert compared
    assert [each.subject for each in found.report.differences] == subjects
    assert bool(found.report.blocking) == blocked


def test_a_wrong_parent_is_told_the_right_one() -> None:
    assert matching("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B") == ["Qwen/Qwen2.5-Math-7B"]
    assert matching("elsewhere/DeepSeek-R1-Distill-Qwen-7B") == ["Qwen/Qwen2.5-Math-7B"]
    assert matching("microsoft/Phi-4-reasoning") == []
    pair = next(each for each in pairs() if each.instruct == "Qwen/Qwen2.5-7B-Instruct")
    found, _ = recorded_preview(pair)
    assert found is not None
    assert "take an instruct end that matches, Qwen/Qwen2.5-Math-7B" in found.report.blocking[0].remedy


@pytest.mark.parametrize(
    ("instruct", "billions"),
    [("Qwen/Qwen3-4B-Instruct-2507", 4.0), ("LiquidAI/LFM2.5-1.2B-Instruct", 1.17), ("microsoft/phi-4", 14.7)],
)
def test_sizes_are_those_of_the_model_cards(instruct: str, billions: float) -> None:
    found, _ = recorded_preview(next(pair for pair in pairs() if pair.instruct == instruct))
    assert found is not None
    assert found.parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_every_recorded_config_belongs_to_a_pair() -> None:
    names = {name for pair in pairs() for name in (pair.instruct, pair.thinking)}
    assert json.loads(FILE.read_text(encoding="utf-8"))["configs"].keys() <= names
    assert recorded_config("nobody/nothing") is None
