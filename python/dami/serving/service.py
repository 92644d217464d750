"""The life of a request: it is checked, tokenised, given its λ, submitted and answered."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import re
import secrets
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hmac import compare_digest
from typing import Any, TypeVar

from fastapi import Request
from transformers import GenerationConfig

from dami.callers import CALLERS, DEFAULT_INTENSITY, TURN
from dami.chat import ChatTemplate, last_turn, otherwise, render
from dami.dial.patch import patch_of
from dami.dial.values import Intensity
from dami.generation.reading import TAIL
from dami.generation.sampling import Sampling
from dami.serving.active import ActiveChoice, ActiveRequest
from dami.serving.deltas import Deltas, Stop
from dami.serving.detokenizing import Offsets
from dami.serving.engine import Auto, Engine, EstimatorFailed, Row
from dami.serving.formatting import ChatFormat, CompletionFormat, Format
from dami.serving.gate import check_key
from dami.serving.guiding import Guide, Thoughts, Wishes
from dami.serving.lanes import Lanes
from dami.serving.metrics import Metrics
from dami.serving.model_names import intensity_in, names_of
from dami.serving.protocol import MIDDLE, SAME, SHARES, BadRequest, ChatRequest, CompletionRequest, DialRequest
from dami.serving.reading import PromptReading, default_reading, reading_of
from dami.serving.responses import as_json
from dami.serving.schema import Dial, Model
from dami.serving.structured import Grammar, Grammars
from dami.serving.token_bytes import TokenBytes
from dami.thoughts import Reader

T = TypeVar("T")

logger = logging.getLogger(__name__)


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


Settings = ServiceSettings  # its old name


@dataclass(frozen=True)
class SamplingDefaults:
    """The sampling parameters and the maximum number of tokens for requests that don't set them."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = None

    @classmethod
    def of(cls, config: GenerationConfig) -> SamplingDefaults:
        """Takes the defaults from a model's generation config, and those it lacks from OpenAI's API."""
        names = ("temperature", "top_p", "top_k") if config.do_sample is not False else ()
        said = {name: getattr(config, name, None) for name in names} | {"max_tokens": config.max_new_tokens}
        return cls(**{name: value for name, value in said.items() if value is not None})

    @classmethod
    def of_ends(cls, model: Any) -> tuple[SamplingDefaults, SamplingDefaults]:
        """Takes those of the instruct end and of the thinking end; a pair keeps both where they differ."""
        instruct, sampling = cls.of(model.generation_config), patch_of(model).origin.sampling
        return instruct, cls.of(GenerationConfig(**sampling["thinking"])) if sampling else instruct


class Service:
    """Answers requests.

    Args:
        engine: the engine that generates.
        tokenizer: the pair's tokenizer.
        settings: the server's settings.
    """

    def __init__(self, engine: Engine, tokenizer: Any, settings: ServiceSettings) -> None:
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.metrics = Metrics(lambda: engine.load, lambda: engine.death is None, engine.controller)
        self.thoughts, self.token_bytes = Thoughts.of(Reader.of(tokenizer)), TokenBytes(tokenizer)
        self.vocabulary = engine.model.get_input_embeddings().num_embeddings
        self.grammars = Grammars(tokenizer, self.vocabulary)
        self.most_characters = engine.max_model_len * max(map(len, tokenizer.get_vocab()))
        self.reading = default_reading(settings.prompt_intensity, settings.prompt_tail, engine.presets)
        self.lanes = Lanes()
        self.chat_format = ChatFormat(settings.name, self.token_bytes)
        self.completion_format = CompletionFormat(settings.name, self.token_bytes)
        self.defaults = SamplingDefaults.of_ends(engine.model)
        self.span = span_of(settings.frontier)
        self.created = int(time.time())
        self.active: dict[str, ActiveRequest] = {}

    def models(self) -> list[Model]:
        """Returns the model under each of the names that carry λ, itself first."""
        engine, settings = self.engine, self.settings
        auto = engine.twin is not None
        return [*map(self.model_object, names_of(settings.name, engine.presets, auto, settings.intensity_range))]

    def model_object(self, model: str) -> Model:
        """Returns the model of this name in OpenAI's format, with the intensities it can be asked for.

        Raises:
            BadRequest: there is no such model.
        """
        carried = self._named(model)
        return {
            "id": model,
            "object": "model",
            "created": self.created,
            "owned_by": "dami",
            "max_model_len": self.engine.max_model_len,
            "intensity": {
                "default": self.settings.default_intensity if carried is None else carried,
                "prompt": self.settings.prompt_intensity,
                "tail": self.settings.prompt_tail,
                "least_tail": self.engine.least_tail,
                "range": list(self.settings.intensity_range),
                "presets": self.engine.presets,
                "auto": self.engine.twin is not None,
                "frontier": bool(self.settings.frontier),
            },
        }

    async def chat(self, body: ChatRequest) -> ActiveRequest:
        self._check(body, 1)
        reading = self._reading(body)
        messages = [message.plain() for message in body.messages]
        size = sum(len(text) for message in messages for text in message.values())
        by_intensity = not isinstance(self.settings.chat_template, str)
        first = "default" if by_intensity else self.settings.chat_template
        options = self._template_options(body)
        text, ids = await self.lanes.run(size, self._encode_chat, messages, first, None, options)
        self._room(body, ids)
        if not by_intensity:
            reading = await self.lanes.run(size, self._measured, reading, messages, first, None, options, ids)
        grammar = await self._grammar(body)
        intensities = await self._choose(body, [ids], None if by_intensity else reading)
        if by_intensity:
            template, lam = self.settings.chat_template, intensities[0]
            text, ids = await self.lanes.run(size, self._encode_chat, messages, template, lam, options)
            reading = await self.lanes.run(size, self._measured, reading, messages, template, lam, options, ids)
        reader = self.thoughts.reader
        inside = reader.leaves_open(messages[-1]["content"]) if body.continue_final_message else reader.opens(text)
        return await self._begin(body, "chatcmpl", [ids], intensities, reading, self.thoughts, inside, grammar)

    async def complete(self, body: CompletionRequest) -> ActiveRequest:
        self._check(body, len(body.prompts))
        reading = self._reading(body)
        prompts = [await self.lanes.run(len(prompt), self._encode, prompt, "prompt") for prompt in body.prompts]
        for prompt in prompts:
            self._room(body, prompt)
        intensities = await self._choose(body, prompts, reading)
        return await self._begin(body, "cmpl", prompts, intensities, reading)

    def _reading(self, body: ChatRequest | CompletionRequest) -> PromptReading:
        return reading_of(body, self.reading, self.engine.presets, self.settings.intensity_range)

    def _measured(
        self,
        reading: PromptReading,
        messages: list[dict[str, str]],
        template: ChatTemplate,
        intensity: float | None,
        options: Mapping[str, Any],
        ids: list[int],
    ) -> PromptReading:
        """Returns a reading whose tail is a number of tokens; "turn" is all of them without a user message."""
        if reading.tail != TURN:
            return reading
        _, other = self._encode_chat([*otherwise(messages)], template, intensity, options)
        return replace(reading, tail=last_turn(ids, other))

    def _check(self, body: ChatRequest | CompletionRequest, prompts: int) -> None:
        field = "intensity" if getattr(body, "reasoning_effort", None) is None else "reasoning_effort"
        if field == "reasoning_effort" and body.intensity not in self.engine.presets:
            body.intensity = MIDDLE.get(str(body.intensity), body.intensity)
        self._check_intensity(body.intensity, field)
        self._check_intensity(body.max_intensity, "max_intensity")
        carried = None if body.model is None else self._named(body.model)
        if carried is not None:
            if body.intensity not in (None, carried):
                raise BadRequest(f"model is {body.model!r} and {field} {getattr(body, field)}", field)
            if body.max_intensity is not None and isinstance(carried, float):
                raise BadRequest(f"model is {body.model!r}, which excludes max_intensity", "max_intensity")
            body.intensity = carried
        for _, lam in body.intensity_schedule or ():
            self._check_intensity(lam, "intensity_schedule")
        self._check_fixed(getattr(body, "answer_intensity", None), "answer_intensity")
        rows, share = prompts * (body.n or 1), self.engine.limits.share
        if rows > share:
            raise BadRequest(
                f"a request may have {share} sequences at most on this server, n for each prompt, got {rows}",
                "prompt" if prompts > share else "n",
            )
        self.engine.check_room(rows)

    def _named(self, model: str) -> float | str | None:
        """Returns the λ that a model's name carries, if any."""
        try:
            carried = intensity_in(model, self.settings.name)
            self._check_intensity(carried, "intensity")
        except (BadRequest, ValueError) as problem:
            text = f"{problem}" if isinstance(problem, ValueError) else f"there is no model {model!r}: {problem}"
            raise BadRequest(text, "model", "model_not_found", 404) from problem
        return carried

    def _check_intensity(self, value: float | str | None, field: str) -> None:
        """Raises BadRequest if the server cannot grant an intensity, which came in this field."""
        if value is None:
            return
        try:
            Intensity.parse(value, CALLERS["dami serve"], self.engine.presets, 1)
        except (TypeError, ValueError) as problem:
            raise BadRequest(f"{problem}" if field == "intensity" else f"{field}: {problem}", field) from problem
        if value == "auto" and self.engine.twin is None:
            raise BadRequest("intensity 'auto' needs an estimator, and this pair has none", field)
        low, high = self.settings.intensity_range
        if isinstance(value, float) and not low <= value <= high:
            raise BadRequest(f"{field} must be in {low:g} to {high:g} on this server, got {value:g}", field)

    async def _choose(
        self, body: ChatRequest | CompletionRequest, prompts: Sequence[list[int]], reading: PromptReading | None
    ) -> list[Any]:
        """Returns the λ granted to each prompt of a request, or an `Auto` if the engine can choose it in passing.

        Args:
            body: the request.
            prompts: its prompts.
            reading: how they are read; None if λ has to be known before.
        """
        asked: float | str = self.settings.default_intensity
        if body.intensity is not None:
            asked = body.intensity
        elif body.max_intensity is not None and asked != "auto":
            asked = body.max_intensity
        if asked == "auto":
            low, high = self.settings.intensity_range
            alone = body.n in (None, 1)
            if reading is not None and alone and self.engine.chooses(reading.intensity, int(reading.tail)):
                most = high if body.max_intensity is None else min(high, body.max_intensity)
                return [Auto(low, most, self.engine.grant(math.inf, True))] * len(prompts)
            try:
                found = await asyncio.gather(*map(self.engine.estimate, prompts))
            except Exception as problem:
                logger.exception("the estimator failed")
                raise BadRequest(f"the estimator failed: {problem}", code="estimator_failed", status=500) from problem
            values = [min(max(value, low), high) for value in found]
        else:
            values = [float(self.engine.presets[asked] if isinstance(asked, str) else asked)] * len(prompts)
        if body.max_intensity is not None:
            values = [min(value, body.max_intensity) for value in values]
        adjustable = asked == "auto" or body.max_intensity is not None
        granted = [self.engine.grant(value, adjustable) for value in values]
        self.metrics.lowered.inc(sum(less < value for less, value in zip(granted, values, strict=True)))
        return granted

    def _template_options(self, body: ChatRequest) -> dict[str, Any]:
        """Returns the options of a request for its chat template."""
        given = body.chat_template_kwargs or {}
        templates = self.tokenizer.chat_template or ""
        text = "\n".join(templates.values()) if isinstance(templates, dict) else templates
        taken = inspect.signature(self.tokenizer.apply_chat_template).parameters
        for name in given:
            if name in taken or name == "messages" or not re.search(rf"\b{re.escape(name)}\b", text):
                raise BadRequest(
                    f"chat_template_kwargs must be variables of the chat template, got {name[:64]!r}",
                    "chat_template_kwargs",
                )
        goes_on = bool(body.continue_final_message)
        return {**given, "add_generation_prompt": not goes_on, "continue_final_message": goes_on}

    async def _grammar(self, body: ChatRequest) -> Grammar | None:
        """Compiles what a request's answer must match."""
        schema = None if body.response_format is None else body.response_format.schema_of_answer
        if schema is None:
            return None
        try:
            return await self.lanes.run(1 << 20, self.grammars.of_schema, schema)
        except ValueError as problem:
            raise BadRequest(f"response_format: {problem}", "response_format") from problem

    def _wishes(self, body: ChatRequest | CompletionRequest, room: int, grammar: Grammar | None) -> Wishes:
        """Returns what a request with room for so many tokens wants of them."""
        biases = body.biases
        if biases and max(biases) >= self.vocabulary:
            raise BadRequest(
                f"logit_bias has the id {max(biases)}, and the vocabulary {self.vocabulary} ids", "logit_bias"
            )
        return Wishes(
            biases,
            body.presence_penalty or 0.0,
            body.frequency_penalty or 0.0,
            body.intensity_schedule or (),
            self._number(body.answer_intensity) if isinstance(body, ChatRequest) else None,
            self._budget(body, room) if isinstance(body, ChatRequest) else None,
            self.span,
            grammar,
        )

    def _budget(self, body: ChatRequest, room: int) -> int | None:
        """Returns the most tokens that the thoughts of an answer may have, which has room for so many in all."""
        budgets = [] if body.thinking_token_budget is None else [body.thinking_token_budget]
        share = SHARES.get(body.reasoning_effort or "")
        if share is not None and (body.wanted_tokens is not None or share == 0):
            budgets.append(int(share * room))
        if self.settings.answer_reserve:
            budgets.append(max(room - self.settings.answer_reserve, 0))
        return min(budgets, default=None)

    def _encode_chat(
        self,
        messages: list[dict[str, str]],
        template: ChatTemplate,
        intensity: float | None,
        options: Mapping[str, Any],
    ) -> tuple[str, list[int]]:
        lams = None if intensity is None else [intensity]
        try:
            text = self._render(messages, template, lams, options)
        except BadRequest as problem:
            renamed = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
            try:  # a template may lack the developer role: try the system's
                text = self._render(renamed, template, lams, options)
            except BadRequest:
                raise problem from None
        return text, self._encode(text, "messages", add_special_tokens=False)

    def _render(
        self,
        messages: list[dict[str, str]],
        template: ChatTemplate,
        lams: list[float] | None,
        options: Mapping[str, Any],
    ) -> str:
        """Renders a conversation, and checks that no system, developer or tool message is left out."""
        try:
            [text] = render(self.tokenizer, [messages], template, lams, **options)
        except Exception as problem:  # templates can raise anything
            raise BadRequest(f"messages do not fit the chat template: {problem}", "messages") from problem
        marks = {
            place: f"qx{place:04d}xq"  # no template has a reason to change this
            for place, message in enumerate(messages)
            if message["role"] not in ("user", "assistant") and message["content"].strip()
        }
        if marks:
            marked = [m | {"content": marks.get(place, m["content"])} for place, m in enumerate(messages)]
            try:
                [text_of_marks] = render(self.tokenizer, [marked], template, lams, **options)
            except Exception:  # the template depends on the contents
                return text
            for place, mark in marks.items():
                if mark not in text_of_marks:
                    role = messages[place]["role"]
                    raise BadRequest(f"messages[{place}]: the chat template leaves out the role {role!r}", "messages")
        return text

    def _encode(self, prompt: str | list[int], param: str, add_special_tokens: bool = True) -> list[int]:
        if not isinstance(prompt, str):
            if max(prompt) >= self.vocabulary:
                raise BadRequest(f"prompt has the id {max(prompt)}, the vocabulary has {self.vocabulary}", param)
            return prompt
        if len(prompt) > self.most_characters:  # tokenising would take too long
            raise BadRequest(
                f"the prompt has {len(prompt)} characters, and this server takes {self.most_characters}, which is "
                f"{self.engine.max_model_len} of the longest tokens",
                param,
                "context_length_exceeded",
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as problem:
            raise BadRequest(f"the prompt is not text: {problem}", param) from problem
        return self.tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]

    def _room(self, body: ChatRequest | CompletionRequest, prompt: list[int]) -> int:
        """Returns the maximum number of tokens in the answer to a prompt."""
        wanted, most = body.wanted_tokens, self.engine.max_model_len
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
        return wanted or min(most - len(prompt), self.defaults[0].max_tokens or most)

    async def _begin(
        self,
        body: ChatRequest | CompletionRequest,
        prefix: str,
        prompts: Sequence[list[int]],
        intensities: Sequence[float | Auto],
        reading: PromptReading,
        thoughts: Thoughts | None = None,
        inside: bool = False,
        grammar: Grammar | None = None,
    ) -> ActiveRequest:
        """Submits all sequences of a request, or none."""
        rooms = [self._room(body, prompt) for prompt in prompts]
        wishes = self._wishes(body, rooms[0], grammar)  # only those of a chat depend on the room, and it has one prompt
        reader = None if thoughts is None else thoughts.reader
        ends = frozenset(() if body.ignore_eos else self.engine.ends) | frozenset(body.stop_token_ids or ())
        seed = secrets.randbits(62) if body.seed is None else body.seed
        stops = [*map(Stop, body.stops)]
        request = ActiveRequest(body, f"{prefix}-{secrets.token_hex(12)}", sum(map(len, prompts)), [])
        try:
            for prompt, intensity, room in zip(prompts, intensities, rooms, strict=True):
                for each in range(body.n or 1):
                    guide = Guide(len(prompt), self.vocabulary, wishes, ends, thoughts, inside)
                    sampling = partial(self._sampling, body, seed + each)
                    row = self.engine.submit(
                        prompt,
                        intensity,
                        sampling if isinstance(intensity, Auto) else sampling(intensity),
                        room,
                        ends,
                        reading.intensity,
                        int(reading.tail),
                        guide,
                    )
                    deltas = Deltas(self.tokenizer, reader, inside, stops)
                    choice = ActiveChoice(len(request.choices), row, guide, deltas, Offsets(self.tokenizer))
                    request.choices.append(choice)
                    await asyncio.sleep(0)  # there may be many sequences: let the event loop run
            for choice in request.choices:
                await self._granted(choice.row)
        except BaseException:
            request.cancel()
            raise
        self.active[request.id] = request
        for choice in request.choices[:: body.n or 1]:
            self.metrics.intensity.observe(choice.row.intensity)
            self.metrics.lowered.inc(choice.row.lowered)
        self.metrics.prompt_tokens.inc(request.prompt_tokens)
        return request

    def turn(self, name: str, owner: str, body: DialRequest) -> Dial:
        """Changes a running request from its next token on.

        Args:
            name: the id of its response.
            owner: who wants it; only the request's own may.
            body: the change.
        """
        request = self.active.get(name)
        choices = [] if request is None or not self._owns(owner, request) else request.choices
        running = [each for each in choices if body.choice in (None, each.index) and each.row.name in self.engine.rows]
        if not running:
            which = name[:64] if body.choice is None else f"{name[:64]}, choice {body.choice},"
            raise BadRequest(f"there is no running request {which}", None, "request_not_found", 404)
        if body.wrap_up is not None and running[0].guide.thoughts is None:
            raise BadRequest("wrap_up is for chat completions: a plain text has no thoughts", "wrap_up")
        self._check_fixed(body.intensity, "intensity")
        lam = self._number(body.intensity)
        for choice in running:
            choice.guide.turn(lam, body.wrap_up)
        indices = [choice.index for choice in running]
        return {"id": name, "object": "request.dial", "choices": indices, "intensity": lam, "wrap_up": body.wrap_up}

    def _owns(self, owner: str, request: ActiveRequest) -> bool:
        """Whether a client may change a request: with the same API key, if there are any."""
        return not self.settings.api_keys or compare_digest(owner.encode(), request.owner.encode())

    def _number(self, intensity: float | str | None) -> float | None:
        """Returns the λ that a preset stands for, or the number itself."""
        return self.engine.presets[intensity] if isinstance(intensity, str) else intensity

    def _check_fixed(self, value: float | str | None, field: str) -> None:
        """Raises BadRequest unless an intensity is a number or a preset that the server can grant."""
        if value == "auto":
            raise BadRequest(f"{field} must be a number or a preset, got 'auto'", field)
        self._check_intensity(value, field)

    async def _granted(self, row: Row) -> None:
        """Waits until the λ of a row is known."""
        await row.granted.wait()
        if isinstance(row.failure, EstimatorFailed):
            raise BadRequest(f"the estimator failed: {row.failure}", code="estimator_failed", status=500)
        if row.failure is not None:
            raise row.failure

    def _sampling(self, body: ChatRequest | CompletionRequest, seed: int, intensity: float) -> Sampling:
        """Returns how the tokens of a sequence at λ are drawn."""
        settings = {name: self._setting(body, name, intensity) for name in ("temperature", "top_p", "top_k")}
        return Sampling(**settings, seed=seed, logprobs=body.wanted_logprobs)

    def _setting(self, body: ChatRequest | CompletionRequest, name: str, intensity: float) -> Any:
        """Returns a sampling parameter of a request: by default that of the end nearer to its λ."""
        value = getattr(body, name)
        value = getattr(self.defaults[intensity >= 0.5], name) if value is None else value
        return max(value, 0)  # vLLM writes "no top_k" as −1

    def end(self, request: ActiveRequest) -> None:
        """Records an answer's metrics, and cancels what is still being generated."""
        self.active.pop(request.id, None)
        request.cancel()
        now = time.monotonic()
        for reason, count in Counter(choice.reason or "cancelled" for choice in request.choices).items():
            self.metrics.finished.labels(reason).inc(count)
        self.metrics.generated_tokens.inc(sum(len(choice.tokens) for choice in request.choices))
        for choice in request.choices:
            row, tokens = choice.row, len(choice.tokens)
            if row.first_token is not None:
                self.metrics.first_token.observe(row.first_token - row.arrival)
                if tokens > 1:
                    self.metrics.per_token.observe((now - row.first_token) / (tokens - 1))
            self.metrics.whole.observe(now - row.arrival)

    async def collected(self, request: ActiveRequest, form: Format) -> bytes:
        """Waits for the whole response and returns it as JSON."""
        await request.collect()
        size = sum(len(choice.tokens) for choice in request.choices) * (1 + (request.body.wanted_logprobs or 0))
        return await self.lanes.run(size, lambda: as_json(form.whole(request)))


def span_of(frontier: Mapping[str, Any]) -> float | None:
    """Returns over how many tokens λ bends: the mean length of the longest answers of a frontier, if one is known."""
    return max((point["tokens"][0] for point in frontier.get("points", ())), default=None)


class Gone(Exception):
    """The client has left."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work` and returns its result, but cancels it if the client disconnects.

    Raises:
        Gone: if the client has disconnected.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = working, _ = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
