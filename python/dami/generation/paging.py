"""Lets attention on the CPU read keys and values where they lie in the cache, which transformers does on GPUs only.

Otherwise transformers gathers the keys and values of all sequences in every layer of every step. Where it has a table
of each sequence's blocks, it leaves reading and writing the cache to the attention.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState

from dami import upstream
from dami_kernels import native


def can_read_pages(processor: ContinuousBatchProcessor) -> bool:
    """Whether attention can read the pages of a cache: on a CPU with our kernels, without sliding windows."""
    cache = processor.cache
    return (
        native.WHY_NOT is None
        and processor.model_device.type == "cpu"
        and cache.dtype in native.DTYPES
        and all(each.supports_block_table for each in cache.cache_allocators.values())
    )


class Tables:
    """The tables of the blocks of a step's sequences. With them, transformers need not list the places of all keys."""

    def __init__(self, processor: ContinuousBatchProcessor) -> None:
        self._outputs: Any = processor.inputs_and_outputs
        self._allocators = list(processor.cache.cache_allocators.values())
        prepare = self._outputs.prepare_batch_tensors

        def prepare_batch_tensors(requests_in_batch: list[FutureRequestState], *args: Any, **options: Any) -> None:
            prepare(requests_in_batch, *args, **{**options, "max_kv_read": 0})

        upstream.replace_method(self._outputs, "prepare_batch_tensors", prepare_batch_tensors)

    def arguments(self) -> dict[str, Any]:
        """Returns what the step has to tell the model: int32 [sequences, most blocks] for each kind of layer."""
        names = [request.state.request_id for request in self._outputs.requests_in_batch]
        return {"block_table": [_table(each, names) for each in self._allocators]}


def _table(allocator: Any, names: list[str]) -> torch.Tensor:
    rows = [allocator.block_table[name] for name in names]
    most = max(map(len, rows))
    blocks = torch.tensor([row + [0] * (most - len(row)) for row in rows], dtype=torch.int32)
    return blocks * (allocator.block_physical_stride // allocator.tokens_per_page)
