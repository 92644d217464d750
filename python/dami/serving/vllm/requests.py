"""Handles the λ of incoming requests: checks it, fills in the default, and makes it part of the prefix-cache key."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.v1.engine.input_processor import InputProcessor

from dami.serving.vllm.quantization import PairQuantization
from dami.serving.vllm.settings import KEY, KEYS, PairSettings, RequestError, check_arguments, resembles_key
from dami.serving.vllm.support import wrap


def install() -> None:
    """Wraps the methods through which requests enter vLLM."""
    wrap(InputProcessor, "process_inputs", _process_inputs)
    for request in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        wrap(request, "to_sampling_params", _to_sampling_params)
    wrap(BeamSearchOnlineMixin, "beam_search", _refuse_beams)
    wrap(BeamSearchOfflineMixin, "beam_search", _refuse_beams)


def settings_of(config: Any) -> PairSettings:
    """Returns the settings of an engine that serves a pair."""
    extra = config.load_config.model_loader_extra_config
    return PairSettings.of({key: extra[key] for key in KEYS if key in extra})


@cache
def _has_processors() -> bool:
    """Returns whether an installed package adds logits processors, which may read any argument of a request."""
    return bool(entry_points(group="vllm.logits_processors"))


def _process_inputs(original: Any, self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
    """Puts a request's λ into `extra_args`, and into `cache_salt`, which the prefix cache uses.

    vLLM hashes the salt with the first block, and each block with the one before it. So requests at different λ share
    no block.
    """
    request = original(self, *args, **kwargs)
    if PairQuantization.of(self.vllm_config) is not None and request.sampling_params is not None:
        settings, params = settings_of(self.vllm_config), request.sampling_params
        given = params.extra_args or {}
        check_arguments(given, bool(self.vllm_config.model_config.logits_processors) or _has_processors())
        intensity = settings.checked(given.get(KEY, settings.default_intensity))
        params.extra_args = {**given, KEY: intensity}  # safe: the request has its own copy of the parameters
        request.cache_salt = f"{request.cache_salt or ''}|{KEY}={intensity.hex()}"
    return request


def _to_sampling_params(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Treats `intensity` in a request's body, and misspellings of it, as if they were in `vllm_xargs`."""
    params, extra = original(self, *args, **kwargs), self.model_extra or {}
    misspelt = {name: value for name, value in extra.items() if resembles_key(name)}
    if misspelt:
        params.extra_args = {**(params.extra_args or {}), **misspelt}
    if KEY in extra:
        given = params.extra_args or {}
        if given.get(KEY, extra[KEY]) != extra[KEY]:
            raise RequestError(
                f"{KEY} must be given once, got {extra[KEY]!r}, and {given[KEY]!r} in vllm_xargs", parameter=KEY
            )
        params.extra_args = {**given, KEY: extra[KEY]}
    return params


def _refuse_beams(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuses beam search with a pair: vLLM makes new requests for the beams and drops the λ."""
    engine = getattr(self, "llm_engine", None) or self.engine_client
    if PairQuantization.of(engine.vllm_config) is not None:
        raise RequestError(
            "beam search is not supported with a pair: it drops the intensity", parameter="use_beam_search"
        )
    return original(self, *args, **kwargs)
