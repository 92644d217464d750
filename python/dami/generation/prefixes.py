"""Shares the KV cache of prompts that begin alike, among tokens that were read at the same λ only.

transformers looks up a block by a hash of its tokens and of the block before it. Here the λ of each token enters that
hash. So the beginning of a prompt that was read at `prompt_intensity` serves answers at any λ, and nothing that was
read at one λ is ever taken for another.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Iterable
from typing import Any

from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.requests import RequestState

from dami import upstream
from dami.generation.choices import settled
from dami.generation.courses import course_of
from dami.generation.reading import Reading


class Keyed(list[int]):
    """Tokens of a sequence. A slice that is whole ends with the bits of the λ of its tokens, so that a key has both."""

    def __init__(self, tokens: Iterable[int], reading: Reading) -> None:
        super().__init__(tokens)
        self.reading = reading

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        if isinstance(at, slice) and len(found) == at.stop - at.start:
            lam = self.reading.lam(at.start, at.stop)
            found += struct.unpack(f"<{len(lam)}i", struct.pack(f"<{len(lam)}f", *lam))
        return found

    def __add__(self, more: list[int]) -> Keyed:  # type: ignore[override]
        return Keyed([*self, *more], self.reading)


def key_blocks(processor: ContinuousBatchProcessor) -> None:
    """Makes requests share blocks of the KV cache only if each token of them was read at the same λ."""
    cache, scheduler = processor.cache, processor.scheduler
    search, mark = cache.search_prefix_match, cache.mark_complete_blocks

    def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
        state = scheduler.waiting_requests[request_id]
        known = Keyed(prompt_ids[: settled(state) + 1], Reading.of(state))
        shared = search(request_id, known)  # but for its last token
        course = course_of(state)
        if course is not None and not course.tokens:
            course.shared = shared
        return shared

    def mark_complete_blocks(state: RequestState, complete_blocks: dict[str, int]) -> None:
        if complete_blocks and cache.allow_block_sharing:
            known = min(state.position_offset, settled(state))
            tokens = (state.initial_tokens + state.generated_tokens)[:known]
            state = copy.copy(state)
            state.initial_tokens, state.generated_tokens = Keyed(tokens, Reading.of(state)), []
        mark(state, complete_blocks)

    upstream.replace_method(cache, "search_prefix_match", search_prefix_match)
    upstream.replace_method(cache, "mark_complete_blocks", mark_complete_blocks)


def read_once(processor: ContinuousBatchProcessor) -> None:
    """Lets a request wait while another one reads a block that both begin with.

    transformers lets it in at once and reads the block again: it finds only blocks that are complete. The request
    waits no longer than it would take to read the block.
    """
    if processor.cache.use_prefix_sharing:
        upstream.filter_waiting(processor.scheduler, Followers(processor).held_back)


class Followers:
    """The waiting requests that can soon share blocks, which other requests are reading."""

    def __init__(self, processor: ContinuousBatchProcessor) -> None:
        self.scheduler = processor.scheduler
        [self.blocks] = processor.cache.cache_allocators.values()  # only full attention shares blocks
        self.known: dict[str, tuple[RequestState, list[int]]] = {}  # the keys of a prompt's blocks, by request

    def held_back(self, waiting: list[RequestState]) -> list[RequestState]:
        """Returns the waiting requests, in their order, without those that have to wait for others."""
        active = self.scheduler.active_requests.values()
        if len(active) >= self.scheduler.max_requests_per_batch:
            return waiting  # no room for any
        reading = [state for state in active if not state.generated_tokens]
        self.known = {state.request_id: (state, self._keys(state)) for state in (*reading, *waiting)}
        complete = self.blocks.ledger.hash_to_block
        underway = {key for state in reading for key in self.known[state.request_id][1] if key not in complete}
        let_in = []
        for state in waiting:
            keys = [] if state.is_cpu_offloaded else self.known[state.request_id][1]  # which is read already
            first = next((place for place, key in enumerate(keys) if key not in complete), len(keys))
            if first < len(keys) and keys[first] in underway:
                continue
            underway.update(keys[first:])
            let_in.append(state)
        return let_in

    def _keys(self, state: RequestState) -> list[int]:
        """Returns the keys of the blocks that another request with the same prompt could share."""
        before, keys = self.known.get(state.request_id, (None, []))
        if before is state:
            return keys
        page = self.blocks.tokens_per_page
        tokens = Keyed(state.initial_tokens[: settled(state) + 1], Reading.of(state))
        return upstream.block_keys(tokens, page, (len(tokens) - 1) // page)


def blocks_in_use(cache: PagedAttentionCache) -> float:
    """Returns the share of a KV cache that requests hold, 0 to 1, without blocks cached for future prompts."""
    kept = sum(len(each.ledger.cached_blocks) / each.num_blocks for each in cache.cache_allocators.values())
    return round(1.0 - cache.compute_free_capacity() - kept, 6) + 0.0  # −0 is 0
