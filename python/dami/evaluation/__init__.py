"""Whether a λ pays: questions with verifiers, sweeps over λ in mixed batches, and what can be said about the frontier.

task = load_task("questions.jsonl")
records = sweep(model, tokenizer, task, intensities=[0.0, 0.5, 1.0], path="run.jsonl")
print(Frontier.of(records).points)
"""

from dami.evaluation.frontier import Frontier
from dami.evaluation.sweeps import Record, read_records, sweep
from dami.evaluation.tasks import JsonLines, Question, ReasoningGym, Task, load_task

__all__ = ["Frontier", "JsonLines", "Question", "ReasoningGym", "Record", "Task", "load_task", "read_records", "sweep"]
