"""Calls of functions in answers, as Hermes, Qwen and models after them write them.

A call is `<tool_call>`, an object of JSON with a name and arguments, and `</tool_call>`. What has this form and is no
call stays text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dami.serving.structured import of_json
from dami.serving.tools import Function

OPEN, CLOSE = "<tool_call>", "</tool_call>"
OTHERS = "<function="  # calls in which this stands have another form between the same tags
NONE = {"type": "object", "additionalProperties": False}  # of a function without parameters


def writes_calls(template: str) -> bool:
    """Whether the models of a chat template write calls in this form."""
    return OPEN in template and OTHERS not in template


@dataclass(frozen=True)
class Call:
    """A call of a function.

    Attributes:
        name: the function's name.
        arguments: its arguments, as the JSON of an object.
        id: tells the call from others.
    """

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


class CallReader:
    """Separates the calls in an answer from its text, as it comes."""

    def __init__(self) -> None:
        self._held = ""  # possibly the beginning of a call, with the space before it
        self._said = False  # whether any text has come

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Adds text, and returns the text and the calls that can be given."""
        self._held += text
        said, calls = "", list[Call]()
        while (begin := self._held.find(OPEN)) >= 0 and (end := self._held.find(CLOSE, begin)) >= 0:
            call = _call(self._held[begin + len(OPEN) : end])
            if call is None:
                said += self._give(end + len(CLOSE))
                continue
            said += self._give(begin)
            self._held = self._held[end + len(CLOSE) - begin :]
            calls.append(call)
        if begin < 0:
            begin = len(self._held) - max((n for n in range(1, len(OPEN)) if self._held.endswith(OPEN[:n])), default=0)
        said += self._give(len(self._held[:begin].rstrip()))
        return said, calls

    def finish(self) -> tuple[str, list[Call]]:
        """Returns the rest, at the end of the answer. Its last call may lack the end tag."""
        begin = self._held.find(OPEN)
        call = None if begin < 0 else _call(self._held[begin + len(OPEN) :])
        if call is None:
            return self._give(len(self._held)), []
        return self._give(begin), [call]

    def _give(self, end: int) -> str:
        """Returns the first `end` held characters, without the space at their end, or at the beginning of all text."""
        given, self._held = self._held[:end].rstrip(), self._held[end:]
        given = given if self._said else given.lstrip()
        self._said |= bool(given)
        return given


def calls_in(answer: str) -> tuple[str, list[Call]]:
    """Returns the text of a whole answer, and its calls."""
    reader = CallReader()
    (text, calls), (rest, last) = reader.push(answer), reader.finish()
    return text + rest, calls + last


def _call(text: str) -> Call | None:
    """Returns the call that stands between the tags, if it is one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    match found:
        case {"name": str(name), "arguments": dict(arguments)}:
            return Call(name, json.dumps(arguments, ensure_ascii=False))
    return None


def grammar_of(
    functions: Sequence[Function], forced: bool, several: bool, schema: dict[str, Any] | None = None
) -> str | None:
    """Returns the grammar of an answer, in llguidance's dialect of Lark; None if any text will do.

    Args:
        functions: those that may be called.
        forced: whether the answer must be a call.
        several: whether there may be several calls.
        schema: the JSON schema of an answer without a call; None for any text.
    """
    if not (forced or schema is not None or any(function.strict for function in functions) or not several):
        return None
    rules = [f"call_{place}: {_rule(function)}" for place, function in enumerate(functions)]
    rules.append("call: " + " | ".join(f"call_{place}" for place in range(len(functions))))
    rules.append(f'calls: "{OPEN}" call' + (f' ("\\n{OPEN}" call)*' if several else ""))
    if forced:
        rules.append("start: calls")
    elif schema is not None:
        rules += ["start: calls | answer", f"answer: {of_json(schema)}"]
    else:  # a lazy head ends with the first tag
        rules += [r"TEXT: /(.|\n)*/", f'head[lazy]: TEXT "{OPEN}"']
        rules.append("start: (head call)* TEXT" if several else "start: TEXT | head call")
    return "\n".join(rules)


def _rule(function: Function) -> str:
    """Returns the rule of a call, from its start tag on."""
    before, after = f'\n{{"name": "{function.name}", "arguments": ', "}\n" + CLOSE
    return f"{json.dumps(before)} {of_json(function.parameters or NONE)} {json.dumps(after)}"
