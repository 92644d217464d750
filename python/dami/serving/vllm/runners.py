"""Makes both of vLLM's model runners fill the λ buffers before every forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from dami.serving.vllm.quantization import PairQuantization
from dami.serving.vllm.states import PromptStates
from dami.serving.vllm.support import wrap
from dami.serving.vllm.thoughts import Thoughts
from dami.serving.vllm.trajectories import Trajectory, lams


def install() -> None:
    """Wraps the first runner's methods that have no hook: to prepare a step, and to compute prompt logprobs."""
    wrap(GPUModelRunner, "_prepare_inputs", _prepare_inputs)
    wrap(GPUModelRunner, "_get_prompt_logprobs_dict", _prompt_logprobs)


def trajectory_of(params: Any) -> Trajectory:
    """Returns the trajectory of a request; λ=0 for a runner's own warm-up requests, which have none."""
    return Trajectory.of(params) or Trajectory(0, [(0, 0.0)], 0, 0.0)


def _trajectory(state: Any) -> Trajectory:
    """Returns the trajectory of a request in the first runner, which is kept with its state there."""
    own = vars(state)
    if "dami_trajectory" not in own:
        own["dami_trajectory"] = trajectory_of(state.sampling_params)
    return own["dami_trajectory"]


def running_trajectory(runner: Any, name: str) -> Trajectory | None:
    """Returns the trajectory by which a runner runs a request of this name; None if it knows no such request."""
    if isinstance(runner, GPUModelRunner):
        state = runner.requests.get(name)
        return None if state is None else _trajectory(state)
    slot = runner.req_states.req_id_to_index.get(name)
    return None if slot is None else runner.model_state.trajectories[slot]


def _prepare_inputs(original: Any, self: Any, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
    """Sets λ in the first runner, whose batch holds the requests in order, each with its number of tokens."""
    prepared = original(self, scheduler_output, num_scheduled_tokens)
    pair = PairQuantization.of(self.vllm_config)
    if pair is not None:
        batch = self.input_batch
        trajectories = [_trajectory(self.requests[name]) for name in batch.req_ids]
        starts = batch.num_computed_tokens_cpu[: len(trajectories)]
        tokens = async_tensor_h2d(lams(trajectories, starts, num_scheduled_tokens), self.device)
        _follow(pair, self.vllm_config, tokens, self.input_ids.gpu, trajectories, starts, num_scheduled_tokens)
        pair.rows.set(tokens, prepared[0])
        _begin(pair, trajectories, starts, num_scheduled_tokens)
    return prepared


def _follow(
    pair: PairQuantization,
    config: VllmConfig,
    lam: Tensor,
    ids: Tensor,
    trajectories: Sequence[Trajectory],
    starts: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Changes λ of a step's tokens where it depends on thoughts."""
    if any(trajectory.thinks for trajectory in trajectories):
        pair.thoughts = pair.thoughts or Thoughts(lam.device, config.model_config.max_model_len)
        rows = np.cumsum(counts) - counts
        pair.thoughts.follow(
            lam, ids, zip(trajectories, *(each.tolist() for each in (rows, starts, counts)), strict=True)
        )


def _begin(pair: PairQuantization, trajectories: Sequence[Trajectory], starts: np.ndarray, counts: np.ndarray) -> None:
    """Tells the states of prompts which pilots' prompts end in a step."""
    if isinstance(pair.states, PromptStates):
        last = zip(trajectories, starts + counts, np.cumsum(counts) - 1, strict=True)
        pair.states.begin(
            [(trajectory.pilot, row) for trajectory, end, row in last if trajectory.pilot and end == trajectory.prompt]
        )


def _prompt_logprobs(original: Any, self: Any, hidden_states: Any, *args: Any) -> Any:
    pair = PairQuantization.of(self.vllm_config)
    if pair is None:
        return original(self, hidden_states, *args)
    with pair.rows.of_prompts(hidden_states):
        return original(self, hidden_states, *args)


def _worker_logprobs(original: Any, self: Any, logits_fn: Any, hidden_states: Any, *args: Any) -> Any:
    """Computes prompt logprobs in the second runner, where `logits_fn` is a method of the model."""
    pair = getattr(logits_fn.__self__, "pair", None)
    if pair is None:
        return original(self, logits_fn, hidden_states, *args)
    with pair.rows.of_prompts(hidden_states):
        return original(self, logits_fn, hidden_states, *args)


def attach(model: Any, config: VllmConfig, pair: PairQuantization) -> None:
    """Adds to a model the state class that vLLM's second runner asks it for."""

    def state_class() -> type:
        from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

        del model.get_model_state_cls  # resolve the class as vLLM would without us
        try:
            return with_intensity(resolve_model_state_cls(config, model), config, pair)
        finally:
            model.get_model_state_cls = state_class

    model.pair = pair
    model.get_model_state_cls = state_class


def with_intensity(base: Any, config: VllmConfig, pair: PairQuantization) -> type:
    """Returns a subclass of a model state that also keeps the trajectory of each slot of the second runner."""
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    for name in ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"):
        wrap(PromptLogprobsWorker, name, _worker_logprobs)

    class IntensityState(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.trajectories = [trajectory_of(None)] * self.max_num_reqs
            self.thinking: dict[str, Trajectory] = {}  # by request; some of them have ended
            self.positions_of_tokens = torch.arange(self.max_num_tokens, dtype=torch.int32, device=self.device)

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            trajectory = trajectory_of(new_req_data.sampling_params)
            if trajectory.thinks:  # what has been followed of a request that vLLM has preempted still counts
                known = self.thinking.pop(new_req_data.req_id, trajectory)
                known.turns, trajectory = trajectory.turns, known
                self.thinking[new_req_data.req_id] = trajectory
                if len(self.thinking) > 4 * self.max_num_reqs:
                    del self.thinking[next(iter(self.thinking))]
            self.trajectories[req_index] = trajectory

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
            count, padded = input_batch.num_reqs, input_batch.num_tokens_after_padding
            counts = input_batch.num_scheduled_tokens[:count]
            trajectories = [self.trajectories[slot] for slot in input_batch.idx_mapping_np[:count]]
            begun = input_batch.num_computed_tokens_np[:count]
            known = async_tensor_h2d(lams(trajectories, begun, counts), self.device)
            firsts = async_tensor_h2d(np.cumsum(counts) - counts, self.device)
            # with adaptive draft verification, only the device knows how many tokens a request has: at most `counts`
            starts = input_batch.query_start_loc[: count + 1]
            places = self.positions_of_tokens[:padded]
            owner = torch.searchsorted(starts[1:], places, right=True).clamp_(max=count - 1)
            within = places + (firsts - starts[:-1]).index_select(0, owner)
            tokens = known.index_select(0, within.clamp_(max=len(known) - 1))
            _follow(pair, config, tokens, input_batch.input_ids, trajectories, begun, counts)
            pair.rows.set(tokens, input_batch.logits_indices)
            _begin(pair, trajectories, begun, counts)
            return super().prepare_inputs(input_batch, req_states)

    IntensityState.__name__ = f"Intensity{base.__name__}"
    return IntensityState
