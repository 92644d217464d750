"""A patched model is one thread's at a time: what two would mix is refused, and a twin for each lifts that."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import dami
import pytest
import torch
from transformers import PreTrainedModel, TextIteratorStreamer

from tests.dami.families import pair
from tests.dami.serving.test_batching import GREEDY, SMALL, alone, patched
from tests.dami.serving.test_batching import prompts as requests
from tests.dami.test_generation import prompts

TWIN = r"the model is in use by another thread, .* dami\.twin\(model\)"
BATCHING = r"the model is in use by continuous batching until its manager is stopped: .* dami\.twin\(model\)"
SHORT = {"max_new_tokens": 3, "do_sample": False}

USES: dict[str, Callable[[Any], Any]] = {
    "forward": lambda model: model(**prompts(), intensity=0.5),
    "parts": lambda model: model(**prompts(), intensity={"mlp": 0.5}),
    "generate": lambda model: model.generate(**prompts(), **SHORT),
    "block": lambda model: dami.intensity(model, 0.5).__enter__(),
    "part": lambda model: dami.intensity(model, 0.5, modules="mlp").__enter__(),
    "generate_batch": lambda model: model.generate_batch(requests([4]), GREEDY, SMALL),
    "manager": lambda model: model.init_continuous_batching(GREEDY, SMALL),
}


@pytest.fixture
def model() -> PreTrainedModel:
    return dami.patch_model(*pair("qwen3"))


@pytest.fixture
def other() -> Any:
    """Calls a function in another thread, the same for the whole test."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(timeout=60)


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dami.threads.GRACE", 0.01)


@pytest.mark.parametrize("use", USES)
def test_a_block_is_its_threads(model: PreTrainedModel, other: Any, use: str) -> None:
    with dami.intensity(model, 0.5), dami.intensity(model, 0.2, layers=0):
        with pytest.raises(RuntimeError, match=TWIN):
            other(USES[use], model)
        USES[use](dami.twin(model))
        other(USES[use], other(dami.twin, model))
    assert model.dami_patch.dial.lam == 0
    other(USES[use], model)


@pytest.mark.parametrize("use", USES)
def test_a_pass_is_its_threads(model: PreTrainedModel, other: Any, use: str) -> None:
    """Of a model that another thread is just generating with."""
    tried = []

    def meanwhile(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with pytest.raises(RuntimeError, match=TWIN):
            other(USES[use], model)
        tried.append(other(USES[use], dami.twin(model)))
        return scores

    inputs = prompts()
    wanted = model.generate(**inputs, intensity=0.4, **SHORT)
    found = model.generate(**inputs, intensity=0.4, logits_processor=[meanwhile], **SHORT)
    assert torch.equal(found, wanted)
    assert len(tried) == 3
    other(USES[use], model)


@torch.no_grad()
def test_threads_that_race_are_right_or_refused(model: PreTrainedModel) -> None:
    inputs, lams = prompts(), (0.0, 0.4, 1.0)
    wanted = {lam: model(**inputs, intensity=lam).logits for lam in lams}
    start, refused = threading.Barrier(len(lams)), []

    def work(lam: float) -> int:
        right = 0
        start.wait()
        for _ in range(20):
            try:
                with dami.intensity(model, lam):
                    right += int(torch.equal(model(**inputs).logits, wanted[lam]))
            except RuntimeError as error:  # noqa: PERF203
                refused.append(str(error))
        return right

    with ThreadPoolExecutor(len(lams)) as pool, torch.no_grad():
        right = sum(pool.map(work, lams))
    assert right + len(refused) == 60
    assert all("dami.twin(model)" in message for message in refused)
    assert model.dami_patch.dial.lam == 0


@torch.no_grad()
def test_an_error_lets_go(model: PreTrainedModel, other: Any) -> None:
    for use in (lambda: model(input_ids="no tensor"), lambda: model.generate(**prompts(), intensity="no preset")):
        with pytest.raises((TypeError, ValueError, AttributeError)):
            use()
    with pytest.raises(KeyError), dami.intensity(model, 0.5):
        raise KeyError
    other(USES["generate"], model)


def test_a_block_may_be_left_in_another_thread(model: PreTrainedModel, other: Any) -> None:
    """As a generator is that a server takes up wherever a thread is free."""
    stack = ExitStack()
    other(stack.enter_context, dami.intensity(model, 0.5))
    with pytest.raises(RuntimeError, match=TWIN):
        USES["forward"](model)
    stack.close()
    USES["forward"](model)
    assert model.dami_patch.dial.lam == 0


def test_one_may_go_on_when_the_last_token_has_been_streamed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the usual grace

    class Words:
        def decode(self, ids: Any, **_: Any) -> str:
            return " ".join(map(str, ids)) + " "

    for _ in range(3):
        streamer = TextIteratorStreamer(Words(), timeout=60)
        ids = {"inputs": torch.tensor([[5, 6, 7]]), "streamer": streamer, "intensity": 0.5, **SHORT}
        thread = threading.Thread(target=model.generate, kwargs=ids)
        thread.start()
        assert len("".join(streamer).split()) == 6
        USES["forward"](model)
        thread.join()


def test_continuous_batching_holds_the_model_until_it_is_stopped() -> None:
    model, asked = patched("qwen3"), requests([6, 9])
    wanted = alone(model, asked, [0.3, 0.9])
    manager = model.init_continuous_batching(GREEDY, SMALL)
    manager.start()
    try:
        for use in USES.values():
            with pytest.raises(RuntimeError, match=BATCHING):
                use(model)
        with pytest.raises(RuntimeError, match=BATCHING):
            dami.intensity(model, 0.5).__enter__()
        names = manager.add_requests(asked, intensity=[0.3, 0.9])
        answers = [manager.get_result(timeout=60) for _ in asked]
        with manager.pause(), dami.intensity(model, 0.5):
            pass
        with pytest.raises(RuntimeError, match=BATCHING):
            USES["block"](model)
    finally:
        manager.stop()
    found = {answer.request_id: answer.generated_tokens for answer in answers}
    assert [found[name] for name in names] == wanted
    assert alone(model, asked, [0.3, 0.9]) == wanted


def test_continuous_batching_is_not_started_on_what_another_thread_runs(other: Any) -> None:
    model = patched("qwen3")
    manager = model.init_continuous_batching(GREEDY, SMALL)
    with dami.intensity(model, 0.5):
        with pytest.raises(RuntimeError, match=TWIN):
            other(manager.start)
        manager.start()  # its own thread may, and its block holds
        [prompt] = requests([5])
        manager.add_request(prompt)
        answer = manager.get_result(timeout=60).generated_tokens
        manager.stop()
        assert [answer] == alone(model, [prompt], [0.5])


def test_a_twin_of_a_model_that_is_batched_runs() -> None:
    model, asked = patched("qwen3"), requests([6])
    wanted = alone(model, asked, [0.3])
    before = model.config._attn_implementation
    manager = model.init_continuous_batching(GREEDY, SMALL)
    manager.start()
    try:
        twin = dami.twin(model)
        assert alone(twin, asked, [0.3]) == wanted
        assert twin.config._attn_implementation == before
        manager.add_request(asked[0], intensity=0.3)
        assert manager.get_result(timeout=60).generated_tokens == wanted[0]
    finally:
        manager.stop()
    assert model.dami_patch.attention is None
    model.generate_batch(asked, GREEDY, SMALL, persistent_manager=True)
    assert alone(dami.twin(model), asked, [0.3]) == wanted
    model.destroy_cached_continuous_batching_manager()
