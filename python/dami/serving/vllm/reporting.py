"""Tells the λ of answers in vLLM's responses: a field `intensity`, in the places where `dami serve` has it.

Each output of vLLM's engine gets the trajectory of its request. A whole response then says the λ that its request was
granted; a chunk says the λ at which its last token was generated, or null where λ follows thoughts on the device.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from dami.dial.values import shortest_of
from dami.serving.vllm.settings import KEY
from dami.serving.vllm.support import wrap
from dami.serving.vllm.trajectories import Trajectory


def install() -> None:
    """Wraps the methods that make outputs, and those that make responses of them."""
    wrap(OutputProcessor, "add_request", _add_request)
    wrap(RequestState, "_new_completion_output", _new_completion_output)
    wrap(OpenAIServingChat, "chat_completion_full_generator", _whole_chat)
    wrap(OpenAIServingChat, "chat_completion_stream_generator", _chat_stream)
    wrap(OpenAIServingCompletion, "request_output_to_completion_response", _whole_completion)
    wrap(OpenAIServingCompletion, "completion_stream_generator", _completion_stream)


def _add_request(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    original(self, request, *args, **kwargs)
    self.request_states[request.request_id].trajectory = Trajectory.of(request.sampling_params)


def _new_completion_output(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    output = original(self, *args, **kwargs)
    output.trajectory = self.trajectory
    return output


def _trajectory(output: Any) -> Trajectory | None:
    return getattr(output, "trajectory", None)  # an output that vLLM has made of others has none


def granted(trajectories: Iterable[Trajectory]) -> float | None:
    """Returns λ that requests were granted; None if they differ."""
    lams = {shortest_of(trajectory.points[0][1]) for trajectory in trajectories}
    return lams.pop() if len(lams) == 1 else None


class Results:
    """The results of a request as they come, and the λ of each of its choices so far.

    Args:
        results: vLLM's, or pairs of a prompt's number and a result.
        choices: how many choices a prompt has.
    """

    def __init__(self, results: Any, choices: int) -> None:
        self._results, self._choices = results, choices
        self.trajectories: dict[int, Trajectory] = {}
        self._tokens: Counter[int] = Counter()

    async def __aiter__(self) -> AsyncIterator[Any]:
        async with aclosing(self._results) as results:
            async for each in results:
                prompt, result = each if isinstance(each, tuple) else (0, each)
                for output in result.outputs:
                    trajectory, index = _trajectory(output), prompt * self._choices + output.index
                    if trajectory is not None:
                        self.trajectories[index] = trajectory
                        self._tokens[index] += len(output.token_ids)
                yield each

    def lam(self, index: int) -> float | None:
        """Returns λ at which the last token of a choice was generated; None if it is not known."""
        trajectory = self.trajectories.get(index)
        if trajectory is None:  # a chunk before the choice's first token
            return granted(self.trajectories.values())
        place = trajectory.prompt - 2 + max(self._tokens[index], 1)
        if trajectory.thinks and place >= trajectory.prompt:
            return None
        return shortest_of(trajectory.lam(place, place + 1).item())

    def told(self, event: str) -> str:
        """Returns an event of a stream with λ in its chunk, if it has one."""
        if not self.trajectories or not event.startswith("data: {"):
            return event
        chunk = json.loads(event.removeprefix("data: "))
        if "choices" not in chunk:  # an error
            return event
        choices = chunk["choices"]
        chunk[KEY] = self.lam(choices[0]["index"]) if choices else granted(self.trajectories.values())
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


async def _whole_chat(original: Any, self: Any, request: Any, results: Any, *args: Any, **kwargs: Any) -> Any:
    seen = Results(results, request.n or 1)
    response = await original(self, request, seen, *args, **kwargs)
    if seen.trajectories and hasattr(response, "choices"):
        response.intensity = granted(seen.trajectories.values())
    return response


async def _chat_stream(
    original: Any, self: Any, request: Any, results: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[str]:
    seen = Results(results, request.n or 1)
    async with aclosing(original(self, request, seen, *args, **kwargs)) as events:
        async for event in events:
            yield seen.told(event)


def _whole_completion(original: Any, self: Any, results: Any, *args: Any, **kwargs: Any) -> Any:
    """Adds λ to each choice, too, because prompts may have been granted different ones."""
    response = original(self, results, *args, **kwargs)
    trajectories = [_trajectory(output) for result in results for output in result.outputs]
    found = [trajectory for trajectory in trajectories if trajectory is not None]
    if found:
        for choice, trajectory in zip(response.choices, found, strict=True):
            choice.intensity = granted([trajectory])
        response.intensity = granted(found)
    return response


async def _completion_stream(
    original: Any, self: Any, request: Any, prompts: Any, results: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[str]:
    seen = Results(results, request.n or 1)
    async with aclosing(original(self, request, prompts, seen, *args, **kwargs)) as events:
        async for event in events:
            yield seen.told(event)
