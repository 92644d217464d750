"""Prompts: what a user asks."""

from __future__ import annotations

import json
from typing import Any

Prompt = str | list[dict[str, str]]  # a user's question, or a conversation in the form chat templates take


def as_prompt(value: Any) -> Prompt:
    """Returns the value if it is a prompt.

    Raises:
        ValueError: it is neither a string nor a list of messages.
    """
    messages = isinstance(value, list) and all(isinstance(each, dict) and "role" in each for each in value)
    if isinstance(value, str) or (messages and value):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a prompt must be text that UTF-8 can hold, got {value!r:.80}") from error
        return value
    raise ValueError(f"a prompt must be a text, or a list of messages with a role and a content, got {value!r:.80}")
