"""Turns the dial of a request while it runs: λ changes from its next token on, in all of vLLM's processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.worker_base import WorkerBase

from dami.serving.vllm.offers import Offer
from dami.serving.vllm.quantization import PairQuantization
from dami.serving.vllm.runners import running_trajectory
from dami.serving.vllm.settings import KEY, RequestError
from dami.serving.vllm.trajectories import Trajectory

METHOD = "dami_turn"  # of vLLM's engine core, and of its workers


def install() -> None:
    """Adds the methods through which a turn reaches the scheduler and the workers."""
    setattr(EngineCore, METHOD, _turn)
    setattr(WorkerBase, METHOD, _turn_in_worker)


async def turn(engine: Any, names: Sequence[str], intensity: float | None, wrap_up: int | None = None) -> None:
    """Changes requests from their next token on.

    Args:
        engine: vLLM's `AsyncLLM`, which serves a pair.
        names: vLLM's internal names of the requests; those that have ended are passed over.
        intensity: λ as `Offer.lam` returns it; None to leave it.
        wrap_up: how many more tokens a thought may have, over which λ bends; None to leave its budget.

    Raises:
        RequestError: the engine speculates, so the next place is not known; λ of this pair does not bend; or nobody
            follows the requests' thoughts.
    """
    offer = Offer.of(engine.vllm_config)
    if not offer.moves:
        raise RequestError("intensity of a running request cannot be changed with speculation", parameter=KEY)
    if wrap_up is not None and not offer.span:
        raise RequestError(
            "wrap_up bends λ of a thought, and does so only if the pair has a frontier that shows no valley",
            parameter="wrap_up",
        )
    states = engine.output_processor.request_states
    running = {name: states[name].trajectory for name in names}
    if wrap_up is not None and not all(trajectory.thinks for trajectory in running.values()):
        raise RequestError(
            "wrap_up needs a request whose λ follows its thoughts in vLLM: one that had answer_intensity or "
            "thinking_token_budget",
            parameter="wrap_up",
        )
    for name, place in await engine.engine_core.call_utility_async(METHOD, [*names], intensity, wrap_up):
        running[name].turn(place, intensity, wrap_up)


def _turn(self: EngineCore, names: list[str], intensity: float | None, wrap_up: int | None) -> list[tuple[str, int]]:
    """Turns requests in the scheduler, whose prefix cache has to know it, and in the workers, between two steps.

    Returns:
        the requests that were running, and the place of each from which the change holds.
    """
    turned = []
    for name in names:
        request = self.scheduler.requests.get(name)
        trajectory = None if request is None else Trajectory.of(request.sampling_params)
        if trajectory is None or request.is_finished():
            continue
        # the next place that no step has been told to read, which the first token of the answer precedes
        place = max(request.num_computed_tokens, request.num_tokens - 1, request.num_prompt_tokens)
        trajectory.turn(place, intensity, wrap_up)
        trajectory.put(request.sampling_params)
        request.block_hashes.clear()  # those before the place will be the same
        request.update_block_hashes()
        turned.append((name, place))
    self.collective_rpc(METHOD, args=(turned, intensity, wrap_up))
    return turned


def _turn_in_worker(
    self: WorkerBase, turned: list[tuple[str, int]], intensity: float | None, wrap_up: int | None
) -> None:
    thoughts: Any = PairQuantization.of(self.vllm_config).thoughts  # type: ignore[union-attr]
    for name, place in turned:
        trajectory = running_trajectory(self.model_runner, name)
        if trajectory is None:  # the request will bring it
            continue
        trajectory.turn(place, intensity, wrap_up)
        if wrap_up is not None and thoughts is not None:
            thoughts.wrap_up(trajectory, wrap_up)
