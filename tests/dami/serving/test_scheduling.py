"""Short prompts beside long ones: they pass, and the long ones still get on."""

from __future__ import annotations

from typing import Any

from dami.generation.batching import StepLoad
from dami.generation.scheduling import in_order
from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from tests.dami.serving.test_batching import alone, config, patched, prompts

ONE = GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1)


def run(model: Any, asked: dict[str, list[int]], tokens: int) -> dict[str, tuple[list[int], int]]:
    """The answers in the order in which they came, each with the number of steps until then."""
    manager = model.init_continuous_batching(ONE, config(num_blocks=256, max_batch_tokens=tokens))
    steps: list[StepLoad] = []
    manager.on_step = steps.append
    for name, prompt in asked.items():
        manager.add_request(prompt, name, intensity=0.5)
    manager.start()
    said: dict[str, tuple[list[int], int]] = {}
    try:
        for _ in asked:
            result = manager.get_result(timeout=60)
            said[result.request_id] = result.generated_tokens, sum(step.tokens > 0 for step in steps)
    finally:
        manager.stop()
    return said


def test_a_short_prompt_passes_long_ones_and_answers_as_alone() -> None:
    model, [*giants, short] = patched("qwen3"), prompts([50, 55, 60, 3])
    said = run(model, dict(zip("abcd", [*giants, short], strict=True)), 16)
    assert [*said] == ["d", "a", "b", "c"]
    assert [said[name][0] for name in "abcd"] == alone(model, [*giants, short], [0.5] * 4, 1)


def test_a_long_prompt_is_not_starved_by_short_ones() -> None:
    """It gets half of each step: 60 tokens in 8 steps, or in 9 if the order is noticed a step late."""
    model, [giant, *shorts] = patched("qwen3"), prompts([60, *[6] * 40])
    said = run(model, {"giant": giant} | {str(place): prompt for place, prompt in enumerate(shorts)}, 16)
    assert said["giant"][1] <= 9
    assert len(said) == 41


def test_the_order_of_a_step() -> None:
    def state(length: int, status: RequestStatus = RequestStatus.PENDING) -> RequestState:
        made = RequestState(str(length), [5] * length)
        made._status = status
        return made

    decoding = [state(9, RequestStatus.DECODING), state(8, RequestStatus.DECODING)]
    giant, another = state(99, RequestStatus.PREFILLING), state(98)
    shorts = [state(4), state(3), state(2)]
    assert in_order([*decoding, giant, another, *shorts], 18) == [
        *decoding,
        shorts[0],
        shorts[1],
        giant,
        another,
        shorts[2],
    ]
    assert in_order([*decoding, shorts[0], giant], 18) == [*decoding, shorts[0], giant]
    assert in_order([], 18) == []
    assert in_order([giant], 0) == [giant]
