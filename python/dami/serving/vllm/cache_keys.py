"""Shares vLLM's KV cache among tokens that were read at the same λ only.

vLLM looks up a block by a hash of its tokens, of the block before it, and of extra keys. Here λ of its tokens becomes
one of those. So the beginning of a prompt that was read at `prompt_intensity` serves answers at any λ, and nothing that
was read at one λ is ever taken for another.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core import block_pool, kv_cache_utils

from dami.serving.vllm.support import wrap
from dami.serving.vllm.trajectories import Trajectory


def install() -> None:
    """Wraps the function that gives a block its extra keys, here and where vLLM has imported it."""
    for module in (kv_cache_utils, block_pool):
        wrap(module, "generate_block_hash_extra_keys", _extra_keys)


def _extra_keys(original: Any, request: Any, start: int, end: int, *rest: Any) -> Any:
    keys, following = original(request, start, end, *rest)
    trajectory = Trajectory.of(request.sampling_params)
    if trajectory is not None:
        keys = (*(keys or ()), ("intensity", trajectory.key(start, end)))
    return keys, following
