"""λ chosen by what a request's own prompt shows: the states it sees, the answer after it, and what all that costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dami.estimators.features import prompt_states
from dami.generation.choices import Choice
from torch import Tensor

from tests.dami.serving.test_batching import GREEDY, LAM, NEW, config, patched, prompts, run
from tests.dami.serving.test_graphs import CAPTURING, Graph, graphs  # noqa: F401  # a fixture
from tests.dami.serving.test_prefixes import TAILS, apart

LAYERS = (1, 2, -1)


def choices(lams: list[float], tails: list[int], seen: dict[int, Tensor]) -> list[Choice]:
    def chooses(place: int) -> Callable[[Tensor], dict[str, Any]]:
        return lambda states: seen.update({place: states.clone()}) or {"intensity": lams[place]}

    return [Choice(LAYERS, chooses(place), tail) for place, tail in enumerate(tails)]


@pytest.mark.parametrize("tokens", [64, 7])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_lam_is_chosen_by_the_states_at_the_end_of_the_prompt(family: str, tokens: int) -> None:
    """Prompts and tails are read in one piece, or in several."""
    model, asked, seen = patched(family), prompts(), dict[int, Tensor]()
    apart_from_others = config(max_batch_tokens=tokens, allow_block_sharing=False)
    said, read = run(model, asked, apart_from_others, intensity=[0.0] * 5, choice=choices(LAM, TAILS, seen))
    assert said == [apart(family, p, lam, 0.0, tail) for p, lam, tail in zip(asked, LAM, TAILS, strict=True)]
    for place, prompt in enumerate(asked):
        wanted = prompt_states(model, {"input_ids": torch.tensor([prompt])}, LAYERS)
        torch.testing.assert_close(seen[place], wanted)
    again = [min(max(1, tail), len(prompt)) for prompt, tail in zip(asked, TAILS, strict=True)]
    assert read == sum(map(len, asked)) + sum(again) + 5 * (NEW - 1)


def test_a_choice_costs_the_tail_alone() -> None:
    """An answer of 30 tokens to a prompt of 60: 5 % at most, in tokens and in steps."""
    model, asked = patched("qwen3"), prompts([60])
    _, plain = run(model, asked, intensity=[0.0])
    seen = dict[int, Tensor]()
    _, chosen = run(model, asked, intensity=[0.0], choice=choices([0.7], [1], seen))
    assert chosen - plain == 1
    assert (chosen - plain) / (60 + 30) <= 0.05


def test_a_prompt_that_chooses_shares_what_is_settled() -> None:
    """What it reads again is no one else's: not even where the prompt ends with a block."""
    model, [asked] = patched("qwen3"), prompts([24])
    seen = dict[int, Tensor]()
    lams, tails = [0.3, 1.0, 0.3], [1, 6, 1]
    said, read = run(model, [asked] * 3, intensity=[0.0] * 3, choice=choices(lams, tails, seen))
    assert said == [apart("qwen3", asked, lam, 0.0, tail) for lam, tail in zip(lams, tails, strict=True)]
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(seen[0], seen[2])
    shared = [20, 16, 20]  # whole blocks of four before the tail
    assert read == 24 + sum(24 - each for each in shared[1:]) + sum(tails) + 3 * (NEW - 1)
    plain, _ = run(model, [asked] * 3, intensity=lams, prompt_intensity=[0.0] * 3, prompt_tail=tails)
    assert plain == said


def test_an_evicted_request_chooses_once(evicted: list[int]) -> None:
    model, asked, seen = patched("qwen3"), prompts([9, 10, 11, 12, 13]), dict[int, Tensor]()
    made = choices(LAM, TAILS, seen)
    said, _ = run(model, asked, config(num_blocks=12, safety_margin=0.0), intensity=[0.0] * 5, choice=made)
    assert said == [apart("qwen3", p, lam, 0.0, tail) for p, lam, tail in zip(asked, LAM, TAILS, strict=True)]
    assert evicted


def test_a_window_allows_a_tail_of_one() -> None:
    model, asked, seen = patched("mistral"), prompts([9]), dict[int, Tensor]()
    said, _ = run(model, asked, intensity=[0.0], choice=choices([0.8], [1], seen))
    assert said == [apart("mistral", asked[0], 0.8, 0.0)]
    with pytest.raises(ValueError, match="choice must be None for this manager, which has no use for one, got Choice"):
        run(model, asked, intensity=[0.0], choice=choices([0.8], [2], seen))


def test_captured_steps_choose_nothing(graphs: list[Graph]) -> None:  # noqa: F811
    manager: Any = patched("qwen3").init_continuous_batching(GREEDY, CAPTURING)
    with pytest.raises(ValueError, match="choice must be None for this manager"):
        manager.add_request([5, 6], intensity=0.0, choice=choices([0.8], [1], {})[0])


def test_requests_without_a_choice_see_no_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that need no states keep none of them in memory."""
    model, asked = patched("qwen3"), prompts([6])
    kept: list[bool] = []
    forward = model.dami_patch.original.forward

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(bool(kwargs.get("output_hidden_states")))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(model.dami_patch.original, "forward", spy)
    run(model, asked, intensity=[0.0], choice=choices([0.8], [1], {}))
    assert kept == [False, True, *[False] * NEW]  # the first is the check of packed rows
