"""The settings of a server, apart from its engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dami.callers import DEFAULT_INTENSITY
from dami.chat import ChatTemplate
from dami.generation.reading import TAIL
from dami.serving.admission import check_key
from dami.serving.protocol import SAME


@dataclass(frozen=True)
class ServiceSettings:
    """The settings of a server, apart from its engine.

    Attributes:
        name: the served model's name.
        default_intensity: the intensity of requests that name none: λ, a preset or "auto".
        prompt_intensity: λ at which prompts are read: a number, a preset, or "same" for that of the answer.
        prompt_tail: how many tokens at the end of a prompt are read at the λ of the answer; or "turn", for all from the
            text of the last user message on.
        intensity_range: the lowest and the highest λ that requests may ask for.
        chat_template: the template to render conversations with, as in `dami.chat.render`.
        api_keys: each request must bring one of these keys. If empty, no key is needed.
        allowed_hosts: the names allowed in a request's `Host`. If empty, any name is.
        max_body: the maximum size of a request, in bytes.
        read_timeout: the seconds a client has to send a request's headers, and again its body.
        answer_reserve: how many of its tokens an answer keeps from its thought. If 0, the thought may take all of them.
        frontier: the pair's frontier, as `playground.read_frontier` returns it; {} if none is known.

    Raises:
        ValueError: if an API key is empty or holds characters that a header cannot carry.
    """

    name: str = "dami"
    default_intensity: float | str = DEFAULT_INTENSITY
    prompt_intensity: float | str = SAME
    prompt_tail: int | str = TAIL
    intensity_range: tuple[float, float] = (-1.0, 2.0)
    chat_template: ChatTemplate = "default"
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body: int = 1 << 20
    read_timeout: float = 30.0
    answer_reserve: int = 0
    frontier: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in self.api_keys:
            check_key(key, "api_keys")
