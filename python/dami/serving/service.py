"""One request's life: checked, tokenised, given its λ, submitted, answered."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from dami.chat import ChatTemplate, render
from dami.generation.sampling import Sampling
from dami.serving.deltas import Delta, Deltas, Stop
from dami.serving.detokenizing import Offsets
from dami.serving.engine import Engine, EngineDead, Row, Token
from dami.serving.gate import check_key
from dami.serving.lanes import Lanes
from dami.serving.metrics import Metrics
from dami.serving.protocol import BadRequest, ChatRequest, CompletionRequest
from dami.serving.responses import as_event, as_json, chunk_of, error, finite_logprob
from dami.serving.token_bytes import TokenBytes
from dami.thoughts import Reader

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a server is told beside its engine.

    Attributes:
        name: of the served model.
        default_intensity: of requests that name none: λ, a preset or "auto".
        intensity_range: the lowest and the highest λ that requests may ask for.
        chat_template: which template conversations go through, as in `dami.chat.render`.
        api_keys: a request must bring one of them; none if there are none.
        allowed_hosts: names that a request's `Host` may have; any if there are none.
        max_body: bytes of a request at most.
        read_timeout: seconds that a client has for a request's headers, and again for its body.
        frontier: of the pair, as `playground.read_frontier` gives it; {} if none is known.

    Raises:
        ValueError: an API key is empty, or holds what a header cannot carry.
    """

    name: str = "dami"
    default_intensity: float | str = 0.5
    intensity_range: tuple[float, float] = (-1.0, 2.0)
    chat_template: ChatTemplate = "default"
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body: int = 1 << 20
    read_timeout: float = 30.0
    frontier: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in self.api_keys:
            check_key(key, "api_keys")


@dataclass(eq=False)
class Choice:
    """One of a response's choices while it comes.

    Attributes:
        index: its place.
        row: where its tokens come from.
        deltas: turns them into text.
        offsets: where they begin in the text.
        tokens: all that have come.
        reason: why it ended.
    """

    index: int
    row: Row
    deltas: Deltas
    offsets: Offsets
    tokens: list[Token] = field(default_factory=list)
    reason: str | None = None

    async def news(self) -> AsyncIterator[tuple[Delta, list[Token]]]:
        """What comes, with the tokens of which it is the text; the last when `reason` is known."""
        fresh: list[Token] = []
        async for tokens in self.row:
            given = Delta()
            for token in tokens:
                self.tokens.append(token)
                fresh.append(token)
                if token.id not in self.row.ends:
                    more = self.deltas.push(token.id)
                    given = Delta(given.thought + more.thought, given.answer + more.answer)
                if self.deltas.stopped:
                    self.row.cancel(complete=True)
                    self.reason = "stop"
                    yield given, fresh
                    return
            if given.thought or given.answer:
                yield given, fresh
                fresh = []
        self.reason = self.row.reason
        yield await asyncio.to_thread(self.deltas.finish, self.reason == "stop"), fresh

    def reasoning_tokens(self) -> int:
        reader, said = self.deltas.reader, self.deltas.said
        if reader is None:
            return 0
        if said is None:  # a stop string ended it
            said = reader.read([token.id for token in self.tokens], inside=self.deltas.given_inside, finished=True)
        return sum(len(segment.ids) for segment in said.segments if segment.kind == "thought")


@dataclass(eq=False)
class Answering:
    """A request that has been taken in.

    Attributes:
        body: what was asked.
        id: of the response.
        prompt_tokens: of all prompts.
        choices: of the response.
        created: seconds since 1970.
    """

    body: ChatRequest | CompletionRequest
    id: str
    prompt_tokens: int
    choices: list[Choice]
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def intensity(self) -> float | None:
        """λ granted, if all prompts got the same."""
        granted = {choice.row.intensity for choice in self.choices}
        return granted.pop() if len(granted) == 1 else None

    def cancel(self) -> None:
        for choice in self.choices:
            choice.row.cancel()

    def usage(self) -> dict[str, Any]:
        tokens = sum(len(choice.tokens) for choice in self.choices)
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
        }
        reasoning = sum(choice.reasoning_tokens() for choice in self.choices)
        return usage | {"completion_tokens_details": {"reasoning_tokens": reasoning}}

    async def collect(self) -> None:
        """Lets all choices come to their ends."""

        async def drain(choice: Choice) -> None:
            async for _ in choice.news():
                pass

        await asyncio.gather(*map(drain, self.choices))

    async def news(self) -> AsyncIterator[tuple[Choice, Delta, list[Token]]]:
        """What comes to any choice; no faster than it is taken."""
        queue: asyncio.Queue[Any] = asyncio.Queue(1)

        async def pump(choice: Choice) -> None:
            try:
                async for delta, tokens in choice.news():
                    await queue.put((choice, delta, tokens))
            except Exception as failure:
                await queue.put(failure)

        pumps = [asyncio.create_task(pump(choice)) for choice in self.choices]
        try:
            running = len(pumps)
            while running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                running -= item[0].reason is not None
                yield item
        finally:
            for task in pumps:
                task.cancel()


class Service:
    """Answers requests.

    Args:
        engine: what generates.
        tokenizer: the pair's.
        settings: of the server.
    """

    def __init__(self, engine: Engine, tokenizer: Any, settings: Settings) -> None:
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.metrics = Metrics(lambda: engine.load, lambda: engine.death is None, engine.controller)
        self.reader, self.token_bytes = Reader.of(tokenizer), TokenBytes(tokenizer)
        self.vocabulary = engine.model.get_input_embeddings().num_embeddings
        self.most_characters = engine.max_model_len * max(map(len, tokenizer.get_vocab()))
        self.lanes = Lanes()
        self.defaults = sampling_defaults(engine.model)
        self.created = int(time.time())

    def model_object(self) -> dict[str, Any]:
        """The model as OpenAI describes one, and what can be asked of its dial."""
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self.created,
            "owned_by": "dami",
            "max_model_len": self.engine.max_model_len,
            "intensity": {
                "default": self.settings.default_intensity,
                "range": list(self.settings.intensity_range),
                "presets": self.engine.presets,
                "auto": self.engine.twin is not None,
                "frontier": bool(self.settings.frontier),
            },
        }

    async def chat(self, body: ChatRequest) -> Answering:
        self._check(body, 1)
        messages = [message.plain() for message in body.messages]
        size = sum(len(text) for message in messages for text in message.values())
        by_intensity = not isinstance(self.settings.chat_template, str)
        first = "default" if by_intensity else self.settings.chat_template
        text, ids = await self.lanes.run(size, self._encode_chat, messages, first, None)
        self._room(body, ids)
        intensities = await self._choose(body, [ids])
        if by_intensity:
            template = self.settings.chat_template
            text, ids = await self.lanes.run(size, self._encode_chat, messages, template, intensities[0])
        return await self._begin(body, "chatcmpl", [ids], intensities, self.reader, self.reader.opens(text))

    async def complete(self, body: CompletionRequest) -> Answering:
        self._check(body, len(body.prompts))
        prompts = [await self.lanes.run(len(prompt), self._encode, prompt, "prompt") for prompt in body.prompts]
        for prompt in prompts:
            self._room(body, prompt)
        return await self._begin(body, "cmpl", prompts, await self._choose(body, prompts), None, False)

    def _check(self, body: ChatRequest | CompletionRequest, prompts: int) -> None:
        if body.model not in (None, self.settings.name):
            raise BadRequest(
                f"model must be {self.settings.name!r}, got {body.model!r}", "model", "model_not_found", 404
            )
        effort = getattr(body, "reasoning_effort", None)
        field, presets = "intensity" if effort is None else "reasoning_effort", self.engine.presets
        if isinstance(body.intensity, str) and body.intensity != "auto" and body.intensity not in presets:
            known = f"it has {', '.join(sorted(presets))}" if presets else "it has none"
            raise BadRequest(f"{field} {body.intensity!r} is not a preset of this pair: {known}", field)
        if body.intensity == "auto" and self.engine.twin is None:
            raise BadRequest("intensity 'auto' needs an estimator, and this pair has none", "intensity")
        low, high = self.settings.intensity_range
        for name, value in ((field, body.intensity), ("max_intensity", body.max_intensity)):
            if isinstance(value, float) and not low <= value <= high:
                raise BadRequest(f"{name} must be in {low:g} to {high:g} on this server, got {value:g}", name)
        rows, share = prompts * (body.n or 1), self.engine.limits.share
        if rows > share:
            raise BadRequest(
                f"a request may have {share} sequences at most on this server, n for each prompt, got {rows}",
                "prompt" if prompts > share else "n",
            )
        self.engine.check_room(rows)

    async def _choose(self, body: ChatRequest | CompletionRequest, prompts: Sequence[list[int]]) -> list[float]:
        """The λ that each prompt of a request gets."""
        asked: float | str = self.settings.default_intensity
        if body.intensity is not None:
            asked = body.intensity
        elif body.max_intensity is not None and asked != "auto":
            asked = body.max_intensity
        if asked == "auto":
            low, high = self.settings.intensity_range
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

    def _encode_chat(
        self, messages: list[dict[str, str]], template: ChatTemplate, intensity: float | None
    ) -> tuple[str, list[int]]:
        lams = None if intensity is None else [intensity]
        try:
            text = self._render(messages, template, lams)
        except BadRequest as problem:
            renamed = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
            try:  # a developer is the system to templates that do not know the role
                text = self._render(renamed, template, lams)
            except BadRequest:
                raise problem from None
        return text, self._encode(text, "messages", add_special_tokens=False)

    def _render(self, messages: list[dict[str, str]], template: ChatTemplate, lams: list[float] | None) -> str:
        """A conversation as text, which has what every system, developer and tool has said."""
        try:
            [text] = render(self.tokenizer, [messages], template, lams)
        except Exception as problem:  # templates raise what they like
            raise BadRequest(f"messages do not fit the chat template: {problem}", "messages") from problem
        marks = {
            place: f"qx{place:04d}xq"  # no template has reason to change it
            for place, message in enumerate(messages)
            if message["role"] not in ("user", "assistant") and message["content"].strip()
        }
        if marks:
            marked = [m | {"content": marks.get(place, m["content"])} for place, m in enumerate(messages)]
            try:
                [text_of_marks] = render(self.tokenizer, [marked], template, lams)
            except Exception:  # it looks into the contents
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
        if len(prompt) > self.most_characters:  # tokenising it would take long
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
        """How many tokens the answer to a prompt may have."""
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
        return wanted or min(most - len(prompt), self.defaults["max_tokens"] or most)

    async def _begin(
        self,
        body: ChatRequest | CompletionRequest,
        prefix: str,
        prompts: Sequence[list[int]],
        intensities: Sequence[float],
        reader: Reader | None,
        inside: bool,
    ) -> Answering:
        """Submits all rows of a request, or none."""
        rooms = [self._room(body, prompt) for prompt in prompts]
        ends = frozenset(() if body.ignore_eos else self.engine.ends) | frozenset(body.stop_token_ids or ())
        seed = secrets.randbits(62) if body.seed is None else body.seed
        sampling = {name: self._setting(body, name) for name in ("temperature", "top_p", "top_k")}
        stops = [*map(Stop, body.stops)]
        answering = Answering(body, f"{prefix}-{secrets.token_hex(12)}", sum(map(len, prompts)), [])
        try:
            for prompt, intensity, room in zip(prompts, intensities, rooms, strict=True):
                for each in range(body.n or 1):
                    row = self.engine.submit(
                        prompt,
                        intensity,
                        Sampling(**sampling, seed=seed + each, logprobs=body.wanted_logprobs),
                        room,
                        ends,
                    )
                    deltas = Deltas(self.tokenizer, reader, inside, stops)
                    choice = Choice(len(answering.choices), row, deltas, Offsets(self.tokenizer))
                    answering.choices.append(choice)
                    await asyncio.sleep(0)  # there may be many
        except BaseException:
            answering.cancel()
            raise
        for intensity in intensities:
            self.metrics.intensity.observe(intensity)
        self.metrics.prompt_tokens.inc(answering.prompt_tokens)
        return answering

    def _setting(self, body: ChatRequest | CompletionRequest, name: str) -> Any:
        value = getattr(body, name)
        value = self.defaults[name] if value is None else value
        return max(value, 0)  # a top_k of −1 is vLLM's word for none

    def end(self, answering: Answering) -> None:
        """Counts an answer that has come to its end, or cuts it off."""
        answering.cancel()
        now = time.monotonic()
        for choice in answering.choices:
            row, tokens = choice.row, len(choice.tokens)
            self.metrics.finished.labels(choice.reason or "cancelled").inc()
            self.metrics.generated_tokens.inc(tokens)
            if row.first_token is not None:
                self.metrics.first_token.observe(row.first_token - row.arrival)
                if tokens > 1:
                    self.metrics.per_token.observe((now - row.first_token) / (tokens - 1))
            self.metrics.whole.observe(now - row.arrival)

    def common(self, answering: Answering, kind: str, choice: Choice | None = None) -> dict[str, Any]:
        """What a response has, and each of its chunks, which is of one choice."""
        return {
            "id": answering.id,
            "object": kind,
            "created": answering.created,
            "model": self.settings.name,
            "intensity": answering.intensity if choice is None else choice.row.intensity,
        }

    async def chat_events(self, answering: Answering) -> AsyncIterator[str]:
        for choice in answering.choices:
            common = self.common(answering, "chat.completion.chunk", choice)
            yield as_event(common | {"choices": [chunk_of(choice.index, {"role": "assistant", "content": ""})]})
        async for choice, delta, tokens in answering.news():
            content = {"reasoning_content": delta.thought, "content": delta.answer}
            chunk = chunk_of(choice.index, {key: text for key, text in content.items() if text}, choice.reason)
            if answering.body.wanted_logprobs is not None:
                chunk["logprobs"] = self.chat_logprobs(tokens)
            yield as_event(self.common(answering, "chat.completion.chunk", choice) | {"choices": [chunk]})

    async def completion_events(self, answering: Answering) -> AsyncIterator[str]:
        async for choice, delta, tokens in answering.news():
            chunk = {"index": choice.index, "text": delta.answer, "logprobs": None, "finish_reason": choice.reason}
            if answering.body.wanted_logprobs is not None:
                chunk["logprobs"] = self.completion_logprobs(choice, tokens)
            yield as_event(self.common(answering, "text_completion", choice) | {"choices": [chunk]})

    async def events(self, answering: Answering) -> AsyncIterator[str]:
        """All server-sent events of an answer."""
        chat = isinstance(answering.body, ChatRequest)
        options = answering.body.stream_options
        try:
            async for event in self.chat_events(answering) if chat else self.completion_events(answering):
                yield event
            if options is not None and options.include_usage:
                common = self.common(answering, "chat.completion.chunk" if chat else "text_completion")
                yield as_event(common | {"choices": [], "usage": await asyncio.to_thread(answering.usage)})
            yield "data: [DONE]\n\n"
        except EngineDead as dead:
            yield f"data: {bytes(error(500, f'the engine has died: {dead}').body).decode()}\n\n"

    async def collected(self, answering: Answering, whole: Callable[[Answering], dict[str, Any]]) -> bytes:
        """A whole response as JSON."""
        await answering.collect()
        size = sum(len(choice.tokens) for choice in answering.choices) * (1 + (answering.body.wanted_logprobs or 0))
        return await self.lanes.run(size, lambda: as_json(whole(answering)))

    def chat_response(self, answering: Answering) -> dict[str, Any]:
        choices = []
        for choice in answering.choices:
            said = choice.deltas.said  # None where a stop string ended it
            thought = choice.deltas.thought.text if said is None else said.thought
            message = {"role": "assistant", "content": choice.deltas.answer.text if said is None else said.answer}
            if thought:
                message["reasoning_content"] = thought
            logprobs = None if answering.body.wanted_logprobs is None else self.chat_logprobs(choice.tokens)
            choices.append(
                {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}
            )
        return self.common(answering, "chat.completion") | {"choices": choices, "usage": answering.usage()}

    def completion_response(self, answering: Answering) -> dict[str, Any]:
        choices = []
        for choice in answering.choices:
            logprobs = None
            if answering.body.wanted_logprobs is not None:
                logprobs = self.completion_logprobs(choice, choice.tokens)
            said = {"text": choice.deltas.answer.text, "intensity": choice.row.intensity}
            choices.append({"index": choice.index, **said, "logprobs": logprobs, "finish_reason": choice.reason})
        return self.common(answering, "text_completion") | {"choices": choices, "usage": answering.usage()}

    def chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text, spelled = self.token_bytes.text(token), list(self.token_bytes(token))
            return {"token": text, "logprob": finite_logprob(logprob), "bytes": spelled}

        return {
            "content": [
                entry(token.id, token.logprobs.chosen) | {"top_logprobs": [entry(*each) for each in token.logprobs.top]}
                for token in tokens
                if token.logprobs is not None
            ]
        }

    def completion_logprobs(self, choice: Choice, tokens: Sequence[Token]) -> dict[str, Any]:
        """Those of a choice's next tokens."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            if token.logprobs is None:
                continue
            top: dict[str, float] = {}
            for each, logprob in ({token.id: token.logprobs.chosen} | dict(token.logprobs.top)).items():
                text = self.token_bytes.text(each)
                top[f"token_id:{each}" if text in top else text] = finite_logprob(logprob)
            found["tokens"].append(self.token_bytes.text(token.id))
            found["token_logprobs"].append(finite_logprob(token.logprobs.chosen))
            found["top_logprobs"].append(top)
            found["text_offset"].append(choice.offsets.push(token.id))
        return found


def sampling_defaults(model: Any) -> dict[str, Any]:
    """How tokens are drawn where a request does not say: as the model's generation config has it."""
    config = model.generation_config
    sampled = config.do_sample is not False

    def of(name: str, otherwise: float) -> Any:
        value = getattr(config, name, None)
        return value if sampled and value is not None else otherwise

    return {
        "temperature": of("temperature", 1.0),
        "top_p": of("top_p", 1.0),
        "top_k": of("top_k", 0),
        "max_tokens": config.max_new_tokens,
    }


class Gone(Exception):
    """The client has left."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work comes to, which is given up when the client has gone.

    Raises:
        Gone: it has.
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
