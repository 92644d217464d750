"""Turns conversations and texts into the tokens of prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dami.callers import TURN
from dami.chat import ChatTemplate, last_turn, not_variables, otherwise, render
from dami.serving.calls import OPEN, writes_calls
from dami.serving.protocol import BadRequest, ChatRequest, CompletionRequest
from dami.serving.reading import PromptReading


class Prompts:
    """Makes the prompts of a model.

    Args:
        tokenizer: the pair's tokenizer.
        vocabulary: number of token ids that the model takes.
        max_model_len: maximum tokens of prompt and answer together.
        max_tokens: maximum tokens of an answer whose request does not say; None for as many as there is room for.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, max_model_len: int, max_tokens: int | None) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.max_model_len, self.max_tokens = max_model_len, max_tokens
        self.most_characters = max_model_len * max(map(len, tokenizer.get_vocab()))

    def options(self, body: ChatRequest) -> dict[str, Any]:
        """Returns the options of a request for its chat template: its variables, and the functions it may call.

        Raises:
            BadRequest: the template has no place for them, or its models write calls that this server cannot read.
        """
        given = body.chat_template_kwargs or {}
        if foreign := not_variables(self.tokenizer, given):
            raise BadRequest(
                f"chat_template_kwargs must be variables of the chat template, got {foreign[0][:64]!r}",
                "chat_template_kwargs",
            )
        goes_on = bool(body.continue_final_message)
        options = {**given, "add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        if not body.callable:
            return options
        templates = self.tokenizer.chat_template or ""
        text = "\n".join(templates.values()) if isinstance(templates, dict) else templates
        if not re.search(r"\btools\b", text):
            raise BadRequest("tools: the chat template of this pair has no place for them", "tools")
        tag = self.tokenizer.encode(OPEN, add_special_tokens=False)
        if not writes_calls(text) or OPEN not in self.tokenizer.decode(tag, skip_special_tokens=True):
            raise BadRequest(f"tools: this server reads calls as {OPEN}, and this pair writes them otherwise", "tools")
        return options | {"tools": [tool.plain() for tool in body.tools or ()]}

    def of_chat(
        self,
        messages: list[dict[str, Any]],
        template: ChatTemplate,
        intensity: float | None,
        options: Mapping[str, Any],
    ) -> tuple[str, list[int]]:
        """Returns the text of a conversation and its tokens.

        Args:
            messages: the conversation.
            template: the chat template, as in `dami.chat.render`.
            intensity: λ, if the template depends on it.
            options: as `options` returns them.

        Raises:
            BadRequest: the template does not take the conversation, or leaves a message out.
        """
        lams = None if intensity is None else [intensity]
        try:
            text = self._render(messages, template, lams, options)
        except BadRequest as problem:
            renamed = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
            try:  # a template may lack the developer role: try the system's
                text = self._render(renamed, template, lams, options)
            except BadRequest:
                raise problem from None
        return text, self.of_text(text, "messages", add_special_tokens=False)

    def of_text(self, prompt: str | list[int], param: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the tokens of a prompt, which came in the field `param`."""
        if not isinstance(prompt, str):
            if max(prompt) >= self.vocabulary:
                raise BadRequest(f"prompt has the id {max(prompt)}, the vocabulary has {self.vocabulary}", param)
            return prompt
        if len(prompt) > self.most_characters:  # tokenising would take too long
            raise BadRequest(
                f"the prompt has {len(prompt)} characters, and this server takes {self.most_characters}, which is "
                f"{self.max_model_len} of the longest tokens",
                param,
                "context_length_exceeded",
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as problem:
            raise BadRequest(f"the prompt is not text: {problem}", param) from problem
        return self.tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]

    def measured(
        self,
        reading: PromptReading,
        messages: list[dict[str, Any]],
        template: ChatTemplate,
        intensity: float | None,
        options: Mapping[str, Any],
        ids: list[int],
    ) -> PromptReading:
        """Returns a reading whose tail is a number of tokens; "turn" is all of them without a user message."""
        if reading.tail != TURN:
            return reading
        _, other = self.of_chat([*otherwise(messages)], template, intensity, options)
        return replace(reading, tail=last_turn(ids, other))

    def room(self, body: ChatRequest | CompletionRequest, prompt: list[int]) -> int:
        """Returns the maximum number of tokens in the answer to a prompt.

        Args:
            body: its request.
            prompt: its tokens.

        Raises:
            BadRequest: there is no room for the answer, or no prompt.
        """
        wanted, most = body.wanted_tokens, self.max_model_len
        if not prompt:
            raise BadRequest("the prompt must hold at least one token", body.prompt_field)
        if len(prompt) + (wanted or 1) > most:
            field = "max_completion_tokens" if getattr(body, "max_completion_tokens", None) else "max_tokens"
            raise BadRequest(
                f"the prompt has {len(prompt)} tokens, {wanted or 1} more are wanted, and this server takes "
                f"{most} together",
                field if len(prompt) < most else body.prompt_field,
                "context_length_exceeded",
            )
        return wanted or min(most - len(prompt), self.max_tokens or most)

    def _render(
        self,
        messages: list[dict[str, Any]],
        template: ChatTemplate,
        lams: list[float] | None,
        options: Mapping[str, Any],
    ) -> str:
        """Renders a conversation, and checks that no tool, no call, and nothing from another role is left out."""
        try:
            [text] = render(self.tokenizer, [messages], template, lams, **options)
        except ValueError as problem:
            raise BadRequest(str(problem), "messages") from problem
        for tool in options.get("tools", ()):
            if (name := tool["function"]["name"]) not in text:
                raise BadRequest(f"tools: the chat template leaves out {name!r}", "tools")
        marks = {
            place: f"qx{place:04d}xq"  # no template has a reason to change this
            for place, message in enumerate(messages)
            if "tool_calls" in message or (message["role"] not in ("user", "assistant") and message["content"].strip())
        }
        if marks:
            marked = [_marked(m, marks[place]) if place in marks else m for place, m in enumerate(messages)]
            try:
                [text_of_marks] = render(self.tokenizer, [marked], template, lams, **options)
            except ValueError:  # the template depends on the contents
                return text
            for place, mark in marks.items():
                if mark not in text_of_marks:
                    what = "its calls" if "tool_calls" in messages[place] else f"the role {messages[place]['role']!r}"
                    raise BadRequest(f"messages[{place}]: the chat template leaves out {what}", "messages")
        return text


def _marked(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """Returns a message with a mark in place of the functions that it calls, or else of its content."""
    if "tool_calls" not in message:
        return message | {"content": mark}
    calls = [call | {"function": call["function"] | {"name": mark}} for call in message["tool_calls"]]
    return message | {"tool_calls": calls}
