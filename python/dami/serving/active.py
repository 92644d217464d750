"""A request from when it has been taken in until it is answered: its choices, and what comes to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from dami.serving.deltas import Delta, Deltas
from dami.serving.detokenizing import Offsets
from dami.serving.engine import Row, Token
from dami.serving.protocol import ChatRequest, CompletionRequest
from dami.serving.schema import FinishReason, Usage


@dataclass(eq=False)
class ActiveChoice:
    """One of a response's choices while it is generated.

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
    reason: FinishReason | None = None

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


News = tuple[ActiveChoice, Delta, list[Token]]  # text that has come to a choice, and the tokens of which it is the text


@dataclass(eq=False)
class ActiveRequest:
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
    choices: list[ActiveChoice]
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def intensity(self) -> float | None:
        """λ granted, if all prompts got the same."""
        granted = {choice.row.intensity for choice in self.choices}
        return granted.pop() if len(granted) == 1 else None

    def cancel(self) -> None:
        for choice in self.choices:
            choice.row.cancel()

    def usage(self) -> Usage:
        tokens = sum(len(choice.tokens) for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "completion_tokens_details": {"reasoning_tokens": sum(map(ActiveChoice.reasoning_tokens, self.choices))},
        }

    async def collect(self) -> None:
        """Lets all choices come to their ends."""

        async def drain(choice: ActiveChoice) -> None:
            async for _ in choice.news():
                pass

        await asyncio.gather(*map(drain, self.choices))

    async def news(self) -> AsyncIterator[News]:
        """What comes to any choice; no faster than it is taken."""
        queue: asyncio.Queue[News | Exception] = asyncio.Queue(1)

        async def pump(choice: ActiveChoice) -> None:
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
