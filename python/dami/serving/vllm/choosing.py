"""Has λ of requests with "auto" chosen before they enter the engine, each by a pilot of its own."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine

from dami.serving.vllm.fields import granted, wanted
from dami.serving.vllm.offers import Offer
from dami.serving.vllm.quantization import PairQuantization
from dami.serving.vllm.requests import PILOT, PILOTS
from dami.serving.vllm.settings import KEY, RequestError
from dami.serving.vllm.states import METHOD
from dami.serving.vllm.support import wrap


def install() -> None:
    """Wraps the methods through which requests enter both of vLLM's engines."""
    wrap(AsyncLLM, "add_request", _add_to_async)
    wrap(LLMEngine, "add_request", _add)
    wrap(LLMEngine, "step", _step)


def _is_auto(config: Any, prompt: Any, params: Any) -> bool:
    """Returns whether λ of a request has to be chosen."""
    if PairQuantization.of(config) is None or not isinstance(params, SamplingParams):
        return False
    given = params.extra_args or {}
    whole = not isinstance(prompt, (EngineCoreRequest, AsyncGenerator))
    return whole and PILOT not in given and wanted(given, Offer.of(config)) is None


def _pilot() -> tuple[str, SamplingParams]:
    """Returns the name and the parameters of a new pilot."""
    name = uuid.uuid4().hex
    PILOTS.add(name)
    final = RequestOutputKind.FINAL_ONLY
    return name, SamplingParams(max_tokens=1, detokenize=False, output_kind=final, extra_args={PILOT: name})


def _at(chosen: float | str, params: SamplingParams, config: Any) -> SamplingParams:
    """Returns a request's parameters at λ that the estimator has chosen, or raises RequestError with why it cannot."""
    if isinstance(chosen, str):
        raise RequestError(chosen, parameter=KEY)
    given: Mapping[str, Any] = params.extra_args or {}
    rest = {name: value for name, value in given.items() if name != "max_intensity"}
    params = params.clone()
    params.extra_args = {**rest, KEY: granted(chosen, given, Offer.of(config))}
    return params


async def _add_to_async(
    original: Any, self: AsyncLLM, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    if _is_auto(self.vllm_config, prompt, params):
        name, pilot = _pilot()
        same = ("lora_request", "priority", "tokenization_kwargs")
        options = {key: kwargs[key] for key in same if key in kwargs}
        async for _ in self.generate(prompt, pilot, f"{request_id}-{name}", **options):
            pass
        [chosen, *_] = await self.collective_rpc(METHOD, args=(name,))
        params = _at(chosen, params, self.vllm_config)
    return await original(self, request_id, prompt, params, *args, **kwargs)


def _add(original: Any, self: LLMEngine, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> str:
    """Adds a request; or its pilot, if λ has to be chosen, and leaves the request to `_step`."""
    if not _is_auto(self.vllm_config, prompt, params):
        return original(self, request_id, prompt, params, *args, **kwargs)
    name, pilot = _pilot()
    waiting = vars(self).setdefault("dami_waiting", {})
    waiting[f"{request_id}-{name}"] = (
        name,
        lambda chosen: original(self, request_id, prompt, _at(chosen, params, self.vllm_config), *args, **kwargs),
    )
    return original(self, f"{request_id}-{name}", prompt, pilot, *args, **kwargs)


def _step(original: Any, self: LLMEngine) -> Any:
    """Adds the requests whose pilots have ended, and keeps the pilots' answers to itself."""
    outputs, waiting, others = original(self), vars(self).get("dami_waiting", {}), []
    for output in outputs:
        if output.request_id in waiting:
            name, add = waiting.pop(output.request_id)
            add(self.collective_rpc(METHOD, args=(name,))[0])
        else:
            others.append(output)
    return others
