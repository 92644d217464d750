"""λ of a request on its way in: checked, filled in, and made part of what the prefix cache goes by."""

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
    """Wraps the doors that requests come in by."""
    wrap(InputProcessor, "process_inputs", _process_inputs)
    for request in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        wrap(request, "to_sampling_params", _to_sampling_params)
    wrap(BeamSearchOnlineMixin, "beam_search", _refuse_beams)
    wrap(BeamSearchOfflineMixin, "beam_search", _refuse_beams)


def settings_of(config: Any) -> PairSettings:
    """The settings of an engine that serves a pair."""
    extra = config.load_config.model_loader_extra_config
    return PairSettings.of({key: extra[key] for key in KEYS if key in extra})


@cache
def _has_processors() -> bool:
    """Whether a package has brought logits processors, which may read any argument of a request."""
    return bool(entry_points(group="vllm.logits_processors"))


def _process_inputs(original: Any, self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
    """A request with its λ in `extra_args` and, where blocks of other requests are looked up, in `cache_salt`.

    vLLM hashes the salt with the first block, and each block with the one before: no two λ share a block.
    """
    request = original(self, *args, **kwargs)
    if PairQuantization.of(self.vllm_config) is not None and request.sampling_params is not None:
        settings, params = settings_of(self.vllm_config), request.sampling_params
        given = params.extra_args or {}
        check_arguments(given, bool(self.vllm_config.model_config.logits_processors) or _has_processors())
        intensity = settings.checked(given.get(KEY, settings.default_intensity))
        params.extra_args = {**given, KEY: intensity}  # the request's own copy of its parameters
        request.cache_salt = f"{request.cache_salt or ''}|{KEY}={intensity.hex()}"
    return request


def _to_sampling_params(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """`intensity` in a request's body means what it means in its `vllm_xargs`; so does what it was misspelt as."""
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
    """Beams are requests of vLLM's own, made without the λ that was asked for."""
    engine = getattr(self, "llm_engine", None) or self.engine_client
    if PairQuantization.of(engine.vllm_config) is not None:
        raise RequestError(
            "beam search is not supported with a pair: it drops the intensity", parameter="use_beam_search"
        )
    return original(self, *args, **kwargs)
