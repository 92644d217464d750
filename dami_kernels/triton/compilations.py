"""Logs which of these kernels Triton compiles, for which GPU, and how long that takes."""

from __future__ import annotations

import logging
from typing import Any

from triton import knobs

LOG = logging.getLogger("dami_kernels")


def log_compilations() -> None:
    """Starts logging, at level INFO, a line for each kernel that is compiled rather than found in Triton's cache.

    Triton's compiler supports only one listener. If there already is one, it is called first.
    """
    before = knobs.compilation.listener

    def listener(*, src: Any, metadata: dict[str, Any], times: Any, cache_hit: bool, **others: Any) -> None:
        if before is not None:
            before(src=src, metadata=metadata, times=times, cache_hit=cache_hit, **others)
        kernel = getattr(src, "fn", None)
        if kernel is not None and kernel.__module__.startswith(f"{__package__}.") and not cache_hit:
            target = metadata["target"]
            gpu = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
            LOG.info("compiled %s for %s in %.1f s: %s", src.name, gpu, times.total / 1e6, _variant(src, metadata))

    knobs.compilation.listener = listener


def _variant(src: Any, metadata: dict[str, Any]) -> str:
    """Describes a kernel's variant: the type of its first operand, its constants and Triton's options."""
    first, *_ = src.signature.items()
    constants = [(src.fn.arg_names[i], src.constants[i,]) for i in src.fn.constexprs]
    options = [(name, metadata[name]) for name in ("num_warps", "num_stages")]
    return ", ".join(f"{name}={value}" for name, value in [first, *constants, *options])
