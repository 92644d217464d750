"""An engine in a process of its own, for what is decided when vLLM is imported: `python -m …`.

Reads a job from stdin, {"engine": …, "ask": …}, the arguments of `engine` and `ask`; writes the answers to stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[4]


def answers_of(job: dict[str, Any], **environment: str) -> tuple[list[list[int]], dict[str, int]]:
    """Runs a job in a new process with these environment variables; the answers' tokens, and what vLLM has counted."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(job),
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    tokens, counted = json.loads(done.stdout.splitlines()[-1])
    return tokens, counted


def interpret_triton() -> None:
    """Makes vLLM take the machine for one with Triton, whose interpreter then runs its second runner's kernels."""
    import triton.backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return False

    triton.backends.backends["cpu"] = type("Backend", (), {"compiler": None, "driver": Driver})()


if __name__ == "__main__":
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        interpret_triton()
    from tests.dami.serving.vllm.engines import ask, engine, tokens_of

    job = json.load(sys.stdin)
    with engine(**job["engine"]) as llm:
        tokens = tokens_of(ask(llm, **job["ask"]))
        metrics = [] if job["engine"].get("disable_log_stats", True) else llm.get_metrics()
        print(json.dumps([tokens, {metric.name: metric.value for metric in metrics if hasattr(metric, "value")}]))
