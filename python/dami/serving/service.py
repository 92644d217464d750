"""The life of a request: it is checked, tokenised, given its λ, submitted and answered."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from hmac import compare_digest
from typing import Any

from dami.serving.active_request import ActiveChoice, ActiveRequest
from dami.serving.calls import CallReader, grammar_of
from dami.serving.deltas import Deltas, Stop
from dami.serving.detokenizing import Offsets
from dami.serving.engine import Auto, Engine
from dami.serving.formatting import ChatFormat, CompletionFormat, Format
from dami.serving.guidance import guidance_of, span_of
from dami.serving.guiding import Guide, Thoughts
from dami.serving.intensity_policy import IntensityPolicy
from dami.serving.metrics import Metrics
from dami.serving.models import Models
from dami.serving.prompts import Prompts
from dami.serving.protocol import BadRequest, ChatRequest, CompletionRequest, DialRequest
from dami.serving.reading import PromptReading, default_reading, reading_of
from dami.serving.replies import as_json
from dami.serving.sampling import SamplingDefaults, sampling_of
from dami.serving.schema import Dial
from dami.serving.settings import ServiceSettings
from dami.serving.structured import Grammar, Grammars, of_json
from dami.serving.thread_pools import ThreadPools
from dami.serving.token_bytes import TokenBytes
from dami.thoughts import Reader

__all__ = ["Service", "ServiceSettings", "Settings"]
Settings = ServiceSettings  # its old name


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
        self.defaults = SamplingDefaults.of_ends(engine.model)
        self.prompts = Prompts(tokenizer, self.vocabulary, engine.max_model_len, self.defaults[0].max_tokens)
        self.policy = IntensityPolicy(engine, settings, self.metrics)
        self.models = Models(self.policy)
        self.reading = default_reading(settings.prompt_intensity, settings.prompt_tail, engine.presets)
        self.pools = ThreadPools()
        self.chat_format = ChatFormat(settings.name, self.token_bytes)
        self.completion_format = CompletionFormat(settings.name, self.token_bytes)
        self.span = span_of(settings.frontier)
        self.active: dict[str, ActiveRequest] = {}

    async def chat(self, body: ChatRequest, prefix: str = "chatcmpl-") -> ActiveRequest:
        """Begins to answer a conversation. The id of the response begins with `prefix`."""
        self._check(body, 1)
        reading = reading_of(body, self.reading, self.engine.presets, self.settings.intensity_range)
        messages = [message.plain() for message in body.messages]
        size = sum(len(str(value)) for message in messages for value in message.values())
        by_intensity = not isinstance(self.settings.chat_template, str)
        first = "default" if by_intensity else self.settings.chat_template
        options = self.prompts.options(body)
        text, ids = await self.pools.run(size, self.prompts.of_chat, messages, first, None, options)
        self.prompts.room(body, ids)
        if not by_intensity:
            reading = await self.pools.run(size, self.prompts.measured, reading, messages, first, None, options, ids)
        grammar = await self._grammar(body)
        intensities = await self.policy.choose(body, [ids], None if by_intensity else reading)
        if by_intensity:
            template, lam = self.settings.chat_template, intensities[0]
            text, ids = await self.pools.run(size, self.prompts.of_chat, messages, template, lam, options)
            reading = await self.pools.run(size, self.prompts.measured, reading, messages, template, lam, options, ids)
        thoughts = self.thoughts if grammar is None else self.thoughts.closed()
        reader = thoughts.reader
        inside = reader.leaves_open(messages[-1]["content"]) if body.continue_final_message else reader.opens(text)
        return await self._begin(body, prefix, [ids], intensities, reading, thoughts, inside, grammar)

    async def complete(self, body: CompletionRequest) -> ActiveRequest:
        self._check(body, len(body.prompts))
        reading = reading_of(body, self.reading, self.engine.presets, self.settings.intensity_range)
        prompts = [await self.pools.run(len(prompt), self.prompts.of_text, prompt, "prompt") for prompt in body.prompts]
        for prompt in prompts:
            self.prompts.room(body, prompt)
        intensities = await self.policy.choose(body, prompts, reading)
        return await self._begin(body, "cmpl-", prompts, intensities, reading)

    def _check(self, body: ChatRequest | CompletionRequest, prompts: int) -> None:
        """Raises BadRequest if a request with so many prompts asks for what the server cannot grant."""
        self.policy.check(body)
        rows, share = prompts * (body.n or 1), self.engine.limits.share
        if rows > share:
            raise BadRequest(
                f"a request may have {share} sequences at most on this server, n for each prompt, got {rows}",
                "prompt" if prompts > share else "n",
            )
        self.engine.check_room(rows)

    async def _grammar(self, body: ChatRequest) -> Grammar | None:
        """Compiles what a request's answer must match."""
        schema = None if body.response_format is None else body.response_format.schema_of_answer
        field, text = "response_format", None if schema is None else f"start: {of_json(schema)}"
        if body.callable:
            field = "tools"
            text = grammar_of(body.callable, body.forced, body.parallel_tool_calls is not False, schema)
        try:
            return None if text is None else await self.pools.run(1 << 20, self.grammars.of, text)
        except ValueError as problem:
            raise BadRequest(f"{field}: {problem}", field) from problem

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
        rooms = [self.prompts.room(body, prompt) for prompt in prompts]
        lam = self.policy.number(body.answer_intensity) if isinstance(body, ChatRequest) else None
        reserve = self.settings.answer_reserve  # only a chat's guidance depend on the room, and it has one prompt
        guidance = guidance_of(body, rooms[0], self.vocabulary, lam, reserve, self.span, grammar)
        reader = None if thoughts is None else thoughts.reader
        ends = frozenset(() if body.ignore_eos else self.engine.ends) | frozenset(body.stop_token_ids or ())
        seed = secrets.randbits(62) if body.seed is None else body.seed
        stops = [*map(Stop, body.stops)]
        request = ActiveRequest(body, f"{prefix}{secrets.token_hex(12)}", sum(map(len, prompts)), [])
        try:
            for prompt, intensity, room in zip(prompts, intensities, rooms, strict=True):
                for each in range(body.n or 1):
                    guide = Guide(len(prompt), self.vocabulary, guidance, ends, thoughts, inside)
                    sampling = partial(sampling_of, body, self.defaults, seed + each)
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
                    calls = CallReader() if isinstance(body, ChatRequest) and body.callable else None
                    choice = ActiveChoice(len(request.choices), row, guide, deltas, Offsets(self.tokenizer), calls)
                    request.choices.append(choice)
                    await asyncio.sleep(0)  # there may be many sequences: let the event loop run
            for choice in request.choices:
                await self.policy.known(choice.row)
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
            which = name[:64] if body.choice is None else f"{name[:64]}, choice {body.choice}"
            raise BadRequest(f"there is no running request {which}", None, "request_not_found", 404)
        if body.wrap_up is not None and running[0].guide.thoughts is None:
            raise BadRequest("wrap_up is for chat completions: a plain text has no thoughts", "wrap_up")
        self.policy.check_fixed(body.intensity, "intensity")
        lam = self.policy.number(body.intensity)
        for choice in running:
            choice.guide.turn(lam, body.wrap_up)
        indices = [choice.index for choice in running]
        return {"id": name, "object": "request.dial", "choices": indices, "intensity": lam, "wrap_up": body.wrap_up}

    def _owns(self, owner: str, request: ActiveRequest) -> bool:
        """Whether a client may change a request: with the same API key, if there are any."""
        return not self.settings.api_keys or compare_digest(owner.encode(), request.owner.encode())

    def end(self, request: ActiveRequest) -> None:
        """Records an answer's metrics, and cancels what is still being generated."""
        self.active.pop(request.id, None)
        request.cancel()
        self.metrics.cached_tokens.inc(request.cached_tokens())
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
        return await self.pools.run(size, lambda: as_json(form.whole(request)))
