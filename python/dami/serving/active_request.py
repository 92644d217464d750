"""A request that is being answered: its choices, and the text that arrives for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dami.serving.calls import Call, CallReader, calls_in
from dami.serving.deltas import Delta, Deltas
from dami.serving.detokenizing import Offsets
from dami.serving.engine import CHUNK, Row, Token
from dami.serving.guiding import Guide
from dami.serving.protocol import ChatRequest, CompletionRequest
from dami.serving.schema import FinishReason, Usage


class Said(NamedTuple):
    """Text of a thought and of an answer, without the calls in it, and these."""

    thought: str
    answer: str
    calls: Sequence[Call] = ()


@dataclass(eq=False)
class ActiveChoice:
    """One choice of a response while it is being generated.

    Attributes:
        index: its index in the response.
        row: the row that generates its tokens.
        guide: the row's course, which can still be changed.
        deltas: turns the tokens into text.
        offsets: computes where each token begins in the text.
        calls: separates calls from its answer; None if it may call nothing.
        tokens: all tokens so far.
        reason: why it ended.
    """

    index: int
    row: Row
    guide: Guide
    deltas: Deltas
    offsets: Offsets
    calls: CallReader | None = None
    tokens: list[Token] = field(default_factory=list)
    reason: FinishReason | None = None

    async def news(self) -> AsyncIterator[tuple[Said, list[Token]]]:
        """Yields new text with its tokens, or many tokens without any. `reason` is set before the last item."""
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
                    yield self._said(given, last=True), fresh
                    return
            said = self._said(given)
            if any(said) or len(fresh) >= CHUNK:
                yield said, fresh
                fresh = []
        self.reason = self.row.reason
        yield self._said(await asyncio.to_thread(self.deltas.finish, self.reason == "stop"), last=True), fresh

    def _said(self, given: Delta, last: bool = False) -> Said:
        """Separates the calls from new text of the answer."""
        if self.calls is None:
            return Said(*given)
        text, calls = self.calls.push(given.answer)
        rest, more = self.calls.finish() if last else ("", [])
        return Said(given.thought, text + rest, calls + more)

    def said(self) -> Said:
        """Returns all that has been said, when the choice has ended."""
        said = self.deltas.said  # None if a stop string ended it
        thought = self.deltas.thought.text if said is None else said.thought
        answer = self.deltas.answer.text if said is None else said.answer
        text, calls = (answer, []) if self.calls is None else calls_in(answer)
        return Said(thought, text, calls)

    @property
    def intensity(self) -> float:
        """λ of the step that gave its last token; before the first, λ as granted."""
        return self.tokens[-1].intensity if self.tokens else self.row.intensity

    def reasoning_tokens(self) -> int:
        reader, said = self.deltas.reader, self.deltas.said
        if reader is None:
            return 0
        if said is None:  # a stop string ended it
            said = reader.read([token.id for token in self.tokens], inside=self.deltas.given_inside, finished=True)
        return sum(len(segment.ids) for segment in said.segments if segment.kind == "thought")


# a choice, its new text, the tokens of that text, and why the choice has ended if that was its last
News = tuple[ActiveChoice, Said, list[Token], FinishReason | None]


@dataclass(eq=False)
class ActiveRequest:
    """A request that has been submitted to the engine.

    Attributes:
        body: the request's body.
        id: the response's id.
        prompt_tokens: number of tokens of all prompts together.
        choices: the response's choices.
        owner: who has sent it.
        created: seconds since 1970.
    """

    body: ChatRequest | CompletionRequest
    id: str
    prompt_tokens: int
    choices: list[ActiveChoice]
    owner: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    _beginning: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def intensity(self) -> float | None:
        """The λ granted, or None if the prompts got different ones."""
        granted = {choice.row.intensity for choice in self.choices}
        return granted.pop() if len(granted) == 1 else None

    def cached_tokens(self) -> int:
        """Returns how many tokens of its prompts were not read. A prompt counts once, however many choices it has."""
        firsts = self.choices[:: self.body.n or 1]
        return sum(choice.guide.shared for choice in firsts)

    def cancel(self) -> None:
        for choice in self.choices:
            choice.row.cancel()

    def usage(self) -> Usage:
        tokens = sum(len(choice.tokens) for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens()},
            "completion_tokens_details": {"reasoning_tokens": sum(map(ActiveChoice.reasoning_tokens, self.choices))},
        }

    async def _begin(self) -> None:
        """Waits for a turn of the event loop in which no other choice begins: each may have tokens already."""
        async with self._beginning:
            await asyncio.sleep(0)

    async def collect(self) -> None:
        """Waits until all choices have ended."""

        async def drain(choice: ActiveChoice) -> None:
            await self._begin()
            async for _ in choice.news():
                pass

        await asyncio.gather(*map(drain, self.choices))

    async def news(self) -> AsyncIterator[News]:
        """Yields the news of all choices, no faster than the caller takes them."""
        if len(self.choices) == 1:  # needs no task of its own, which each token would have to wake
            [choice] = self.choices
            async for said, tokens in choice.news():
                yield choice, said, tokens, choice.reason
            return
        queue: asyncio.Queue[News | Exception] = asyncio.Queue(1)

        async def pump(choice: ActiveChoice) -> None:
            try:
                await self._begin()
                async for said, tokens in choice.news():
                    await queue.put((choice, said, tokens, choice.reason))
            except Exception as failure:
                await queue.put(failure)

        pumps = [asyncio.create_task(pump(choice)) for choice in self.choices]
        try:
            running = len(pumps)
            while running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                running -= item[3] is not None
                yield item
        finally:
            for task in pumps:
                task.cancel()
