"""Measures whether a λ pays off: tasks with verifiers, sweeps over λ in mixed batches, and statistics of the frontier.

task = load_task("questions.jsonl")
records = sweep(model, tokenizer, task, intensities=[0.0, 0.5, 1.0], path="run.jsonl")
print(Frontier.of(records).points)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dami.evaluation.frontier import Frontier
    from dami.evaluation.sweeps import Record, read_records, sweep
    from dami.evaluation.tasks import JsonLines, Question, ReasoningGym, Task, load_task
    from dami.evaluation.verifiers import register_verifier

_HOME = {
    "Frontier": "frontier",
    "JsonLines": "tasks",
    "Question": "tasks",
    "ReasoningGym": "tasks",
    "Record": "sweeps",
    "Task": "tasks",
    "load_task": "tasks",
    "read_records": "sweeps",
    "register_verifier": "verifiers",
    "sweep": "sweeps",
}

__all__ = [
    "Frontier",
    "JsonLines",
    "Question",
    "ReasoningGym",
    "Record",
    "Task",
    "load_task",
    "read_records",
    "register_verifier",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that tasks can be read without importing torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'dami.evaluation' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dami.evaluation.{_HOME[name]}"), name)
    globals()[name] = value
    return value
