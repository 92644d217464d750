"""Turns the dial of a request while it runs: λ changes from its next token on, in all of vLLM's processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.worker_base import WorkerBase

from dami.serving.vllm.courses import Course
from dami.serving.vllm.offers import Offer
from dami.serving.vllm.runners import running_course
from dami.serving.vllm.settings import KEY, RequestError

METHOD = "dami_turn"  # of vLLM's engine core, and of its workers


def install() -> None:
    """Adds the methods through which a turn reaches the scheduler and the workers."""
    setattr(EngineCore, METHOD, _turn)
    setattr(WorkerBase, METHOD, _turn_in_worker)


async def turn(engine: Any, names: Sequence[str], intensity: float) -> None:
    """Sets λ of requests from their next token on.

    Args:
        engine: vLLM's `AsyncLLM`, which serves a pair.
        names: vLLM's internal names of the requests; those that have ended are passed over.
        intensity: λ as `Offer.lam` returns it.

    Raises:
        RequestError: the engine speculates, so the next place is not known.
    """
    if not Offer.of(engine.vllm_config).moves:
        raise RequestError("intensity of a running request cannot be changed with speculation", parameter=KEY)
    await engine.engine_core.call_utility_async(METHOD, [*names], intensity)


def _turn(self: EngineCore, names: list[str], intensity: float) -> None:
    """Turns requests in the scheduler, whose prefix cache has to know it, and in the workers, between two steps."""
    turns = []
    for name in names:
        request = self.scheduler.requests.get(name)
        course = None if request is None else Course.of(request.sampling_params)
        if course is None or request.is_finished():
            continue
        # the next place that no step has been told to read, which the first token of the answer precedes
        place = max(request.num_computed_tokens, request.num_tokens - 1, request.num_prompt_tokens)
        course.turn(place, intensity)
        course.put(request.sampling_params)
        request.block_hashes.clear()  # those before the place will be the same
        request.update_block_hashes()
        turns.append((name, place, intensity))
    self.collective_rpc(METHOD, args=(turns,))


def _turn_in_worker(self: WorkerBase, turns: list[tuple[str, int, float]]) -> None:
    for name, place, intensity in turns:
        course = running_course(self.model_runner, name)
        if course is not None:  # else the request will bring it
            course.turn(place, intensity)
