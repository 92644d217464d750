"""Prompts: what a user asks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

Prompt = str | list[dict[str, Any]]  # a user's question, or a conversation in the form chat templates take


def as_prompt(value: Any) -> Prompt:
    """Returns the value if it is a prompt.

    Raises:
        ValueError: it is neither a string nor a list of messages.
    """
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_message, value))):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a prompt must be text that UTF-8 can hold, got {value!r:.80}") from error
        return value
    raise ValueError(f"a prompt must be a text, or a list of messages with a role and a content, got {value!r:.80}")


def as_prompts(values: Any) -> list[Prompt]:
    """Returns several prompts as a list. Raises TypeError if it is one prompt, whose letters or messages are none."""
    one = isinstance(values, (str, Mapping)) or not isinstance(values, Iterable)
    prompts = [] if one else [*values]
    if not prompts or not all(isinstance(prompt, (str, list)) for prompt in prompts):
        raise TypeError(f"prompts must be a list of texts or of conversations, got {values!r:.80}")
    return prompts


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    if isinstance(content, list):  # of parts, such as texts and images
        return all(isinstance(part, dict) for part in content)
    return isinstance(content, str) or (content is None and bool(value.get("tool_calls")))


def text_of(prompt: Prompt) -> str:
    """Returns a prompt's text: for a conversation, that of its last message."""
    content = prompt if isinstance(prompt, str) else prompt[-1].get("content") or ""
    return content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content)
