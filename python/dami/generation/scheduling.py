"""Which requests a step of continuous batching takes: short prompts do not queue behind long ones."""

from __future__ import annotations

from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import Scheduler

from dami import upstream

SHARE = 0.5  # of the tokens that a step has left for prompts: for short ones, before the first in the queue


def let_short_prompts_pass(scheduler: Scheduler) -> None:
    """Reads short prompts before long ones that came earlier, as far as they fit into half of a step.

    transformers reads prompts one after the other, as they came. A long one takes all tokens of many steps, and others
    that are done in one would have to wait. The first in the queue keeps the other half, so it is never starved.
    """
    upstream.order_candidates(scheduler, in_order)


def in_order(candidates: list[RequestState], tokens: int) -> list[RequestState]:
    """Returns the requests that a step may take in the order in which it should.

    Args:
        candidates: those that decode, then those that read prompts, as they came.
        tokens: those of the step.
    """
    decoding = [state for state in candidates if state.status == RequestStatus.DECODING]
    reading = [state for state in candidates if state.status != RequestStatus.DECODING]
    room = SHARE * (tokens - len(decoding))
    passing, others = list[RequestState](), reading[:1]
    for state in reading[1:]:
        if len(state.remaining_prefill_tokens) <= room:
            room -= len(state.remaining_prefill_tokens)
            passing.append(state)
        else:
            others.append(state)
    return [*decoding, *passing, *others]


def unblock_after_cancellations(scheduler: Scheduler) -> None:
    """Admits waiting requests when a cancellation frees blocks, as transformers does when a request ends."""
    clear = scheduler.clear_cancelled_requests

    def clear_cancelled_requests() -> list[RequestState]:
        cancelled = clear()
        if cancelled:
            scheduler.block_new_requests = False
        return cancelled

    upstream.replace_method(scheduler, "clear_cancelled_requests", clear_cancelled_requests)
