"""Makes both of vLLM's model runners fill the λ buffers before every forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from dami.serving.vllm.quantization import PairQuantization
from dami.serving.vllm.settings import KEY
from dami.serving.vllm.support import wrap


def install() -> None:
    """Wraps the first runner's methods that have no hook: to prepare a step, and to compute prompt logprobs."""
    wrap(GPUModelRunner, "_prepare_inputs", _prepare_inputs)
    wrap(GPUModelRunner, "_get_prompt_logprobs_dict", _prompt_logprobs)


def requested_intensity(params: Any, pair: PairQuantization) -> float:
    """Returns the λ of a request, or the default for a runner's own warm-up requests, which have none."""
    return ((params and params.extra_args) or {}).get(KEY, pair.settings.default_intensity)


def _prepare_inputs(original: Any, self: Any, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
    """Sets λ in the first runner, whose batch holds the requests in order, each with its number of tokens."""
    prepared = original(self, scheduler_output, num_scheduled_tokens)
    pair = PairQuantization.of(self.vllm_config)
    if pair is not None:
        each = [requested_intensity(self.requests[name].sampling_params, pair) for name in self.input_batch.req_ids]
        tokens = np.repeat(np.array(each, dtype=np.float32), num_scheduled_tokens)
        pair.rows.set(async_tensor_h2d(tokens, self.device), prepared[0])
    return prepared


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
            return with_intensity(resolve_model_state_cls(config, model), pair)
        finally:
            model.get_model_state_cls = state_class

    model.pair = pair
    model.get_model_state_cls = state_class


def with_intensity(base: Any, pair: PairQuantization) -> type:
    """Returns a subclass of a model state that also keeps the λ of each slot of the second runner."""
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    for name in ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"):
        wrap(PromptLogprobsWorker, name, _worker_logprobs)

    class IntensityState(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.intensities = np.full(self.max_num_reqs, pair.settings.default_intensity, dtype=np.float32)
            self.positions_of_tokens = torch.arange(self.max_num_tokens, dtype=torch.int32, device=self.device)

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self.intensities[req_index] = requested_intensity(new_req_data.sampling_params, pair)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
            count, padded = input_batch.num_reqs, input_batch.num_tokens_after_padding
            each = async_tensor_h2d(self.intensities[input_batch.idx_mapping_np[:count]], self.device)
            # with adaptive draft verification, only the device knows how many tokens a request has
            ends = input_batch.query_start_loc[1 : count + 1]
            owner = torch.searchsorted(ends, self.positions_of_tokens[:padded], right=True)
            tokens = each.index_select(0, owner.clamp_(max=count - 1))
            pair.rows.set(tokens, input_batch.logits_indices)
            return super().prepare_inputs(input_batch, req_states)

    IntensityState.__name__ = f"Intensity{base.__name__}"
    return IntensityState
