"""vLLM's OpenAI server with a pair: models' names that carry λ, fields about λ, and requests that are turned."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from vllm.config import VllmConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.api_router import router
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMNotFoundError

from dami.dial.values import shortest_of
from dami.serving.model_names import intensity_in, names_of
from dami.serving.protocol import EFFORTS, MIDDLE, SHARES, DialRequest
from dami.serving.vllm.offers import Offer
from dami.serving.vllm.quantization import PairQuantization
from dami.serving.vllm.settings import FIELDS, KEY, RequestError, resembles_field
from dami.serving.vllm.support import wrap
from dami.serving.vllm.turning import turn

# the pair of the server in this process, under each of its names
SERVED: dict[str, Offer] = {}
DIAL = "/v1/requests/{name}/dial"


def install() -> None:
    """Wraps the methods that know models' names and those that read a request's body, and adds the dial's route."""
    if DIAL not in {getattr(route, "path", None) for route in router.routes}:
        router.add_api_route(DIAL, _dial, methods=["POST"], include_in_schema=False)
    wrap(OpenAIServingModels, "__init__", _init)
    wrap(OpenAIServingModels, "is_base_model", _is_base_model)
    wrap(OpenAIServingModels, "show_available_models", _show_available_models)
    for request in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        wrap(request, "to_sampling_params", _to_sampling_params)


def _init(original: Any, self: Any, engine_client: Any, *args: Any, **kwargs: Any) -> None:
    original(self, engine_client, *args, **kwargs)
    config: VllmConfig = engine_client.vllm_config
    if PairQuantization.of(config) is not None:
        SERVED.update({model.name: Offer.of(config) for model in self.base_model_paths})


def _carried(model: str | None) -> tuple[Offer | None, float | str | None]:
    """Returns the pair that a model's name stands for, None for another model; and λ that the name carries, if any."""
    for name, offer in SERVED.items():
        if not model:
            return offer, None  # the server's own
        try:
            carried = None if model in SERVED else intensity_in(model, name)
            if carried is not None:
                offer.lam_or_auto(carried)
        except ValueError:
            continue
        return offer, carried
    return None, None


def _is_base_model(original: Any, self: Any, model_name: str) -> bool:
    return original(self, model_name) or _carried(model_name)[0] is not None


async def _show_available_models(original: Any, self: Any) -> Any:
    """Lists a pair under each of the names that carry λ, with the intensities it can be asked for, as `dami serve`."""
    models = await original(self)
    cards, models.data = models.data, []
    for card in cards:
        offer = SERVED.get(card.id)
        if offer is None:
            models.data.append(card)
            continue
        settings, auto = offer.settings, bool(offer.layers)
        for name in names_of(card.id, offer.presets, auto, settings.intensity_range):
            carried = intensity_in(name, card.id)
            intensity = {
                "default": settings.default_intensity if carried is None else carried,
                "prompt": settings.prompt_intensity,
                "tail": settings.prompt_tail,
                "least_tail": offer.stored.prompt_tail,
                "range": list(settings.intensity_range),
                "presets": dict(offer.presets),
                "auto": auto,
            }
            models.data.append(card.model_copy(update={"id": name, "intensity": intensity}))
    return models


def _to_sampling_params(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Treats what a request's body says about λ, or seems to, as if it were in `vllm_xargs`."""
    params, body = original(self, *args, **kwargs), self.model_extra or {}
    given = dict(params.extra_args or {})
    for name, value in body.items():
        if value is not None and (name in FIELDS or resembles_field(name)):
            if given.get(name, value) != value:
                raise RequestError(
                    f"{name} must be given once, got {value!r}, and {given[name]!r} in vllm_xargs", parameter=name
                )
            given[name] = value
    offer, carried = _carried(self.model)
    if offer is not None:
        effort = getattr(self, "reasoning_effort", None) or getattr(getattr(self, "reasoning", None), "effort", None)
        if effort is not None:
            meant = EFFORTS.get(effort, effort)
            _agree(given, meant, f"reasoning_effort is {effort}", "reasoning_effort")
            given[KEY] = meant if meant in offer.presets else MIDDLE.get(str(meant), meant)
            asked = [getattr(self, name, None) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens")]
            _limit(params, offer, SHARES.get(effort), any(asked))
        if carried is not None:
            field = KEY if effort is None else "reasoning_effort"
            _agree(given, carried, f"model is {self.model!r}", field)
            given[KEY] = carried
    params.extra_args = given or None
    return params


def _limit(params: Any, offer: Offer, share: float | None, asked: bool) -> None:
    """Leaves thoughts a share of a request's tokens, if it has asked for a number, and vLLM can end a thought there."""
    if offer.limits and share is not None and (asked or share == 0):
        budgets = [int(share * params.max_tokens), params.thinking_token_budget]
        params.thinking_token_budget = min(budget for budget in budgets if budget is not None)


def _agree(given: dict[str, Any], meant: float | str, said: str, field: str) -> None:
    """Raises RequestError if a request also asks for another λ than something else that it says means."""
    if given.get(KEY, meant) != meant:
        raise RequestError(f"{said} and {KEY} {given[KEY]}", parameter=field)


async def _dial(name: str, body: DialRequest, raw_request: Request) -> dict[str, Any]:
    """Changes a running request from its next token on, as `dami serve` does."""
    engine = raw_request.app.state.engine_client
    choices = _running(engine, name) if PairQuantization.of(engine.vllm_config) is not None else {}
    running = [index for index in choices if body.choice in (None, index)]
    if not running:
        which = name[:64] if body.choice is None else f"{name[:64]}, choice {body.choice}"
        raise VLLMNotFoundError(f"there is no running request {which}")
    lam = None if body.intensity is None else Offer.of(engine.vllm_config).lam(body.intensity)
    await turn(engine, [choices[index] for index in running], lam, body.wrap_up)
    said = None if lam is None else shortest_of(lam)
    return {"id": name, "object": "request.dial", "choices": running, "intensity": said, "wrap_up": body.wrap_up}


def _running(engine: Any, name: str) -> dict[int, str]:
    """Returns vLLM's own names of the choices of a response that are running, by index."""
    found, output = {}, engine.output_processor
    for outer, inner in output.external_req_ids.items():
        response, _, prompt = outer.rpartition("-")
        if outer == name or (response == name and prompt.isdecimal()):
            for each in inner:
                state = output.request_states[each]
                per_prompt = state.parent_req.n if state.parent_req else 1
                found[(0 if outer == name else int(prompt)) * per_prompt + state.request_index] = each
    return dict(sorted(found.items()))
