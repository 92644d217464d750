"""Handles the λ of incoming requests: checks it, and gives each request its trajectory."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.v1.engine.input_processor import InputProcessor

from dami.serving.vllm.fields import trajectory_of
from dami.serving.vllm.offers import Offer
from dami.serving.vllm.quantization import PairQuantization
from dami.serving.vllm.settings import RequestError, check_arguments
from dami.serving.vllm.support import wrap
from dami.serving.vllm.trajectories import Trajectory

# a pilot's name in its `extra_args`: a request that only shows the states of its prompt at λ=0
PILOT = "dami_pilot"
PILOTS: set[str] = set()  # those that this process is about to send


def install() -> None:
    """Wraps the methods through which requests enter vLLM."""
    wrap(InputProcessor, "process_inputs", _process_inputs)
    wrap(BeamSearchOnlineMixin, "beam_search", _refuse_beams)
    wrap(BeamSearchOfflineMixin, "beam_search", _refuse_beams)


@cache
def _has_processors() -> bool:
    """Returns whether an installed package adds logits processors, which may read any argument of a request."""
    return bool(entry_points(group="vllm.logits_processors"))


def _process_inputs(original: Any, self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
    """Gives a request its trajectory, which the prefix cache uses, too."""
    request = original(self, *args, **kwargs)
    config, params = self.vllm_config, request.sampling_params
    if PairQuantization.of(config) is not None and params is not None:
        given = params.extra_args or {}
        pilot = given.get(PILOT)
        if pilot in PILOTS:
            PILOTS.remove(pilot)
            trajectory = Trajectory(len(request.prompt_token_ids), [(0, 0.0)], 0, 0.0, pilot=pilot)
        else:
            check_arguments(given, bool(config.model_config.logits_processors) or _has_processors())
            budget = params.thinking_token_budget
            trajectory = trajectory_of(given, Offer.of(config), request.prompt_token_ids, budget, self.tokenizer)
        trajectory.put(params)  # safe: the request has its own copy of the parameters
        if config.kv_transfer_config is not None:  # a connector may have keys of its own, from the tokens and the salt
            request.cache_salt = f"{request.cache_salt or ''}|{trajectory.salt}"
    return request


def _refuse_beams(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuses beam search with a pair: vLLM makes new requests for the beams and drops the λ."""
    engine = getattr(self, "llm_engine", None) or self.engine_client
    if PairQuantization.of(engine.vllm_config) is not None:
        raise RequestError(
            "beam search is not supported with a pair: it drops the intensity", parameter="use_beam_search"
        )
    return original(self, *args, **kwargs)
