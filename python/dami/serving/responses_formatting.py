"""Formats answers as OpenAI's Responses API does: whole or as events."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

from dami.serving.active_request import ActiveRequest
from dami.serving.calls import Call
from dami.serving.engine import EngineDead
from dami.serving.formatting import Format
from dami.serving.replies import as_event
from dami.serving.responses_protocol import ResponsesRequest
from dami.serving.responses_schema import ItemStatus, OutputItem, ResponseObject, ResponseUsage

PARTS = {"reasoning": "reasoning_text", "message": "output_text"}  # the type of an item's text
LOGPROBS: dict[str, dict[str, Any]] = {
    "reasoning": {},
    "message": {"logprobs": []},
}  # a message has none


class ResponsesFormat(Format):
    """A response whose output is a thought, a message and calls.

    Args:
        name: the served model's name.
        asked: the request.
    """

    def __init__(self, name: str, asked: ResponsesRequest) -> None:
        self.name, self.asked = name, asked

    def whole(self, request: ActiveRequest) -> ResponseObject:
        said, items = request.choices[0].said(), list[OutputItem]()
        if said.thought:
            items.append(text_item("reasoning", said.thought))
        if said.answer:
            items.append(text_item("message", said.answer))
        items += [call_item(call) for call in said.calls]
        return self._ended(request, items)

    async def events(self, request: ActiveRequest) -> AsyncIterator[str]:
        output = Output()
        yield output.event("response.created", response=self._response(request, "in_progress", []))
        yield output.event("response.in_progress", response=self._response(request, "in_progress", []))
        try:
            async for choice, said, _, _ in request.news():
                for event in output.add("reasoning", said.thought, choice.intensity):
                    yield event
                for event in output.add("message", said.answer, choice.intensity):
                    yield event
                for call in said.calls:
                    for event in output.call(call):
                        yield event
            response = await asyncio.to_thread(self._ended, request, output.items)
            for event in output.close(output.items[-1]["status"] if output.items else "completed"):
                yield event
            yield output.event(f"response.{response['status']}", response=response)
        except EngineDead as dead:
            failed = self._response(request, "failed", output.items)
            failed["error"] = {"code": "server_error", "message": f"the engine has died: {dead}"}
            yield output.event("response.failed", response=failed)

    def _ended(self, request: ActiveRequest, items: list[OutputItem]) -> ResponseObject:
        """Returns the response to a request that has ended. Its last item is incomplete if the answer was cut off."""
        cut = request.choices[0].reason == "length"
        for item in items:
            item["status"] = "incomplete" if cut and item is items[-1] else "completed"
        response = self._response(request, "incomplete" if cut else "completed", items)
        response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        response["usage"] = usage_of(request)
        return response

    def _response(
        self, request: ActiveRequest, status: Literal["in_progress", "completed", "incomplete", "failed"], items: Any
    ) -> ResponseObject:
        asked = self.asked
        text, reasoning, choice = asked.text, asked.reasoning, asked.tool_choice
        format = {"type": "text"} if text is None or text.format is None else plain(text.format)
        return {
            "id": request.id,
            "object": "response",
            "created_at": request.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": asked.model or self.name,
            "intensity": request.intensity,
            "output": items,
            "usage": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None if reasoning is None else reasoning.effort, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": format},
            "tool_choice": plain(choice) if hasattr(choice, "model_dump") else choice or "auto",
            "tools": [plain(tool) for tool in asked.tools or ()],
            "top_p": asked.top_p,
            "truncation": "disabled",
        }


class Output:
    """The output of a response while it grows, and the events that tell of it.

    Attributes:
        items: its items so far; the last may be open.
    """

    def __init__(self) -> None:
        self.items: list[OutputItem] = []
        self._open = False
        self._events = 0

    def event(self, kind: str, **fields: Any) -> str:
        """Returns the next event."""
        self._events += 1
        return f"event: {kind}\n" + as_event({"type": kind, "sequence_number": self._events - 1, **fields})

    def add(self, kind: Literal["reasoning", "message"], text: str, intensity: float) -> Iterator[str]:
        """Adds text of a thought or a message, whose last token came at λ."""
        if not text:
            return
        if not self._open or self.items[-1]["type"] != kind:
            yield from self.close()
            yield from self._begin({**text_item(kind), "content": []})
            self.items[-1] = text_item(kind, id=self.items[-1]["id"])
            yield self._of_part("response.content_part.added", part=self._part())
        self._part()["text"] += text
        yield self._of_part(f"response.{PARTS[kind]}.delta", delta=text, intensity=intensity, **LOGPROBS[kind])

    def call(self, call: Call) -> Iterator[str]:
        """Adds a call, which comes whole."""
        yield from self.close()
        item = call_item(call)
        yield from self._begin({**item, "arguments": "", "status": "in_progress"})
        self.items[-1] = item
        yield self._of_item("response.function_call_arguments.delta", delta=call.arguments)
        yield self._of_item("response.function_call_arguments.done", arguments=call.arguments)
        yield from self.close()

    def close(self, status: ItemStatus = "completed") -> Iterator[str]:
        """Ends the open item, if there is one."""
        if not self._open:
            return
        self._open, item = False, self.items[-1]
        item["status"] = status
        if item["type"] != "function_call":
            part, kind = self._part(), item["type"]
            yield self._of_part(f"response.{PARTS[kind]}.done", text=part["text"], **LOGPROBS[kind])
            yield self._of_part("response.content_part.done", part=part)
        yield self.event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def _begin(self, item: Any) -> Iterator[str]:
        self.items.append(item)
        self._open = True
        yield self.event("response.output_item.added", output_index=len(self.items) - 1, item=item)

    def _part(self) -> Any:
        """Returns the text of the open item, which has no other part."""
        return self.items[-1]["content"][0]  # type: ignore[typeddict-item]

    def _of_item(self, kind: str, **fields: Any) -> str:
        return self.event(kind, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, **fields)

    def _of_part(self, kind: str, **fields: Any) -> str:
        return self._of_item(kind, content_index=0, **fields)


def text_item(kind: Literal["reasoning", "message"], text: str = "", id: str | None = None) -> OutputItem:
    """Returns an item with a thought or a message."""
    part: Any = {"type": PARTS[kind], "text": text}
    if kind == "reasoning":
        ident = id or f"rs_{secrets.token_hex(12)}"
        return {"id": ident, "type": "reasoning", "summary": [], "status": "in_progress", "content": [part]}
    part["annotations"] = []
    ident = id or f"msg_{secrets.token_hex(12)}"
    return {"id": ident, "type": "message", "role": "assistant", "status": "in_progress", "content": [part]}


def call_item(call: Call) -> OutputItem:
    """Returns an item with a call."""
    return {
        "id": f"fc_{secrets.token_hex(12)}",
        "type": "function_call",
        "status": "completed",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def usage_of(request: ActiveRequest) -> ResponseUsage:
    """Returns the tokens of a request that has ended."""
    usage = request.usage()
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {**usage["completion_tokens_details"]},
        "total_tokens": usage["total_tokens"],
    }


def plain(given: Any) -> Any:
    """Returns a part of a request as it came."""
    return given.model_dump(by_alias=True, exclude_none=True)
