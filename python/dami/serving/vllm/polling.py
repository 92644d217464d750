"""On a CPU, the process that waits for the workers leaves the cores to them."""

from __future__ import annotations

import os
from typing import Any

from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from dami.serving.vllm.quantization import PairQuantization
from dami.serving.vllm.support import wrap

NICENESS = 10  # a tenth of the share that a worker has of a core which both want


def install() -> None:
    """Wraps the loop of the engine's core."""
    wrap(EngineCoreProc, "run_busy_loop", _run_busy_loop)


def _run_busy_loop(original: Any, self: Any) -> None:
    """Lowers the priority of the loop's thread, which polls for the workers' answers without a pause.

    The workers, which are there by now, keep theirs. On Linux, it is that of the calling thread alone.
    """
    config = self.vllm_config
    on_cpu = config.device_config.device_type == "cpu"
    if on_cpu and isinstance(self.model_executor, MultiprocExecutor) and PairQuantization.of(config) is not None:
        os.nice(NICENESS)
    original(self)
