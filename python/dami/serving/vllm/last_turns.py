"""Measures the tail of a chat's prompt that is "turn": all tokens from the text of the last user message on."""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

from dami.callers import TURN
from dami.chat import last_turn, otherwise
from dami.serving.protocol import SAME
from dami.serving.vllm.offers import Offer
from dami.serving.vllm.quantization import PairQuantization
from dami.serving.vllm.support import wrap


def install() -> None:
    """Wraps the method that makes prompts of chats."""
    wrap(OpenAIServingChat, "render_chat_request", _render_chat_request)


async def _render_chat_request(original: Any, self: Any, request: Any) -> Any:
    """Replaces "turn" by a number of tokens: from the first one that differs under another last user message."""
    config = self.engine_client.vllm_config
    if PairQuantization.of(config) is None or not _asks(request, Offer.of(config)):
        return await original(self, request)
    request.messages = [_listed(message) for message in request.messages]
    found = await original(self, request)
    if not isinstance(found, tuple):  # an error
        return found
    other = await self.online_renderer.render_chat(request.model_copy(update={"messages": _other(request.messages)}))
    if not isinstance(other, tuple):
        return other
    ids = [self._extract_prompt_components(inputs[0]).token_ids for _, inputs in (found, other)]
    doors = [door for door in (request.model_extra, request.vllm_xargs) if door and door.get("prompt_tail") == TURN]
    if not doors:  # the default
        request.vllm_xargs = {**(request.vllm_xargs or {})}
        doors = [request.vllm_xargs]
    for door in doors:
        door["prompt_tail"] = last_turn(*ids)
    return found


def _asks(request: Any, offer: Offer) -> bool:
    """Returns whether the prompt of a chat has a tail that is its last turn."""
    given = {**(request.vllm_xargs or {}), **(request.model_extra or {})}
    defaults = {name: getattr(offer.settings, name) for name in ("prompt_intensity", "prompt_tail")}
    before, tail = (default if given.get(name) is None else given[name] for name, default in defaults.items())
    return tail == TURN and before != SAME


def _listed(message: Any) -> Any:
    """Returns a message whose parts can be read more than once."""
    content = message.get("content")
    return message if content is None or isinstance(content, str) else {**message, "content": [*content]}


def _other(messages: list[Any]) -> list[Any]:
    """Returns a conversation with another last user message."""
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        return messages
    content = messages[last]["content"]
    text = content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
    return [*otherwise([*messages[:last], {**messages[last], "content": text}, *messages[last + 1 :]])]
