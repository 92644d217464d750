"""Functions that a model may call, and its calls, as they stand in requests."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr, field_validator

from dami.serving.fields import Strict

TOOLS = 128  # maximum tools of a request, and calls of a message

Name = Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Mode = Literal["none", "auto", "required"]


class Function(Strict):
    """A function: its parameters are a JSON schema of an object."""

    name: Name
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """Returns the tool as chat templates take it."""
        return {"type": self.type, "function": self.function.model_dump(exclude={"strict"}, exclude_none=True)}


class FunctionName(Strict):
    name: Name


class NamedTool(Strict):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: FunctionName


class FunctionCall(Strict):
    name: Name
    arguments: StrictStr

    @field_validator("arguments")
    @classmethod
    def _is_an_object(cls, text: str) -> str:
        try:
            given = json.loads(text)
        except ValueError as problem:
            raise ValueError(f"must be the JSON of an object: {problem}") from None
        if not isinstance(given, dict):
            raise ValueError(f"must be the JSON of an object, got {text[:64]!r}")
        return text


class ToolCall(Strict):
    """A call in an earlier answer."""

    id: StrictStr
    type: Literal["function"] = "function"
    function: FunctionCall
    index: StrictInt | None = None  # which a stream gives, and which is its place

    def plain(self) -> dict[str, Any]:
        """Returns the call as chat templates take it, with its arguments as an object."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}
