"""What estimators of λ are worth on a pair: python -m benchmarks.estimators PAIR --training DIRECTORY

Held-out questions are answered at several λ, and every policy is played on these answers, against the static λ that do
best on the very same ones. Rows go to `results/estimators_PAIR.csv` and `results/estimator_signals_PAIR.csv`.

    shipped   the shipped pair and its questions, at eleven λ, four samples of each; the directory is that of
              python examples/train_pair/estimator.py
    smollm2   SmolLM2-135M and its thinking adapter, sums and facts by halves, at six λ, greedily; the directory is
              that of python examples/smollm2/estimator.py
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import dami
import numpy as np
import torch
from dami.dial.patch import patch_of
from dami.estimators.confidence import ConfidenceEstimator, ConfidenceRouter, signals
from dami.estimators.preference import PreferenceEstimator, fit
from dami.evaluation import Frontier, load_task, sweep
from dami.evaluation.policies import at_random, auroc, play
from dami.evaluation.sweeps import Record, read_records
from dami.evaluation.tasks import Task
from dami.evaluation.training import features_of
from dami.generation.pieces import generate_in_pieces
from dami.loading.load import example_pair
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.machine import commit
from benchmarks.record import RESULTS, store

PRICES = (0.1, 0.2, 0.3, 0.5, 1.0)
TRIALS = (1, 3, 20)  # tokens


@dataclass(frozen=True)
class Subject:
    """A pair whose thinking end has an estimator, and the settings for asking it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    lams: list[float]
    samples: int
    rows: int
    options: dict[str, Any] = field(default_factory=dict)


def shipped() -> Subject:
    task = load_task(str(example_pair()[0].parent / "questions.jsonl"), verifier="word")
    task.questions = sorted(task.questions, key=lambda question: question.level)
    return Subject(*dami.load_pair(*example_pair()), task, [tenth / 10 for tenth in range(11)], samples=4, rows=440)


def smollm2() -> Subject:
    example = Path(__file__).resolve().parents[1] / "examples" / "smollm2"
    sys.path.append(str(example))
    from instruct import smollm2_file

    pair = dami.load_pair(smollm2_file(), example / "adapter", format="lowrank", dtype=torch.bfloat16)
    options = {"do_sample": False, "max_new_tokens": 128}
    task = load_task(str(example / "mixed.jsonl"))
    return Subject(*pair, task, [fifth / 5 for fifth in range(6)], samples=1, rows=120, options=options)


SUBJECTS: dict[str, Callable[[], Subject]] = {"shipped": shipped, "smollm2": smollm2}


Policy = tuple[Frontier, np.ndarray, float]  # answers, λ of each question, and extra tokens
Prompts = list[dict[str, torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=SUBJECTS)
    parser.add_argument("--training", type=Path, required=True, help="directory of the estimator's training")
    parser.add_argument("--work", type=Path, default=Path("estimators-run"), help="where answers go (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    options = parser.parse_args()
    subject = SUBJECTS[options.pair]()
    options.work.mkdir(parents=True, exist_ok=True)
    records = answers(subject, options.work / "records.jsonl")
    frontier = Frontier.of(records)
    known = Frontier.of(read_records(options.training / "records.jsonl"))
    preference = patch_of(subject.model).estimator
    assert isinstance(preference, PreferenceEstimator)
    prompts = batches_of_prompts(subject)

    policies = static_policies(frontier, known)
    policies |= preference_policies(subject, frontier, preference, trained_router(subject, known, preference, options))
    of_trials, studied = confidence_policies(subject, frontier, prompts)
    policies |= of_trials | oracle_policies(subject, frontier, records)
    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, dami {dami.__version__}",
        "questions": len(frontier),
        "samples": subject.samples,
    }
    rows = [about | {"policy": name} | played(name, *policy) for name, policy in policies.items()]
    store(rows, options.results / f"estimators_{options.pair}.csv")
    studied |= overhead(subject, prompts, preference)
    for name, value in studied.items():
        print(f"{name:70} {value:.3f}")
    signal_rows: list[dict[str, object]] = [about | {"what": n, "value": round(v, 4)} for n, v in studied.items()]
    store(signal_rows, options.results / f"estimator_signals_{options.pair}.csv")


def answers(subject: Subject, path: Path) -> list[Record]:
    """Answers all questions at every λ."""
    with Progress() as progress:
        total = len(subject.task.questions) * len(subject.lams) * subject.samples
        bar = progress.add_task("answers", total=total)
        return sweep(
            subject.model, subject.tokenizer, subject.task, subject.lams, path=path, samples=subject.samples,
            rows=subject.rows, seed=7, on_batch=lambda news: progress.advance(bar, len(news)), **subject.options,
        )  # fmt: skip


def batches_of_prompts(subject: Subject) -> Prompts:
    questions, size = subject.task.questions, min(256, subject.rows)
    batches = [questions[start : start + size] for start in range(0, len(questions), size)]
    return [dami.chat.encode(subject.tokenizer, [q.question for q in batch])[1] for batch in batches]


def trained_router(
    subject: Subject, known: Frontier, preference: PreferenceEstimator, options: argparse.Namespace
) -> PreferenceEstimator:
    """Trains the same estimator on the same answers, with only the two ends to choose from."""
    task = load_task(str(options.training / "unseen.jsonl"), verifier="word")
    features = features_of(subject.model, subject.tokenizer, task, preference.features, subject.rows)
    ends = [0, len(known.intensities) - 1]
    weights = fit(features, known.scores[:, ends], known.tokens[:, ends], (0.0, 1.0))
    return PreferenceEstimator((0.0, 1.0), preference.features, weights)


def static_policies(frontier: Frontier, known: Frontier) -> dict[str, Policy]:
    """Returns the policies of both ends, and of the λ that did best on the training questions."""
    best = known.best_static(known, tokens=float(known.tokens[:, -1].mean())).intensity
    names = {"λ = 0": 0.0, "λ = 1": 1.0, f"best static λ of the training questions: {best:g}": best}
    return {name: (frontier, np.full(len(frontier), lam), 0.0) for name, lam in names.items()}


def preference_policies(
    subject: Subject, frontier: Frontier, preference: PreferenceEstimator, router: PreferenceEstimator
) -> dict[str, Policy]:
    features = features_of(subject.model, subject.tokenizer, subject.task, preference.features, subject.rows)
    policies: dict[str, Policy] = {}
    for price in PRICES:
        chosen = preference.at(price).choose(features).double().numpy().round(6)
        policies[f"preference, price {price:g}"] = frontier, chosen, 0.0
        policies[f"its λ at random, price {price:g}"] = frontier, at_random(frontier, chosen), 0.0
    for price in PRICES:
        policies[f"router, price {price:g}"] = frontier, router.at(price).choose(features).double().numpy(), 0.0
    return policies


def confidence_policies(
    subject: Subject, frontier: Frontier, prompts: Prompts
) -> tuple[dict[str, Policy], dict[str, float]]:
    """Returns the policies that read a short trial answer, and how well its signals predict gains by thinking."""
    policies: dict[str, Policy] = {}
    studied: dict[str, float] = {}
    helped = frontier.scores[:, -1] - frontier.scores[:, 0] > 0.5
    for tokens in TRIALS:
        trials = [signals(subject.model, batch, tokens) for batch in prompts]
        confidence, router = ConfidenceEstimator(tokens), ConfidenceRouter(tokens)
        chosen = np.concatenate([confidence.choose(trial).double().numpy() for trial in trials])
        ends = np.concatenate([router.choose(trial.confidence).double().numpy() for trial in trials])
        for name, lams in (("confidence", chosen), ("confidence router", ends)):
            policies[f"{name}, trial of {tokens}"] = frontier, lams, 0.0
            policies[f"{name}, trial of {tokens}, its tokens counted"] = frontier, lams, trial_tokens(frontier, tokens)
        for name in ("confidence", "thinking_confidence", "entropy", "divergence", "gap"):
            value = np.concatenate([getattr(trial, name).numpy() for trial in trials])
            studied[f"AUROC of {name} for the benefit of thinking, trial of {tokens}"] = auroc(value, helped)
    return policies, studied


def oracle_policies(subject: Subject, frontier: Frontier, records: list[Record]) -> dict[str, Policy]:
    """Returns the oracle policies, which know the answers they are scored on, or other samples of them."""
    thinking = float(frontier.tokens[:, -1].mean())
    policies: dict[str, Policy] = {
        f"oracle on its own answers, price {price:g}": (frontier, frontier.best_each(price / thinking), 0.0)
        for price in PRICES
    }
    if subject.samples > 1:
        half = [Frontier.of([record for record in records if record.sample % 2 == side]) for side in (0, 1)]
        for price in PRICES:
            policies[f"oracle on other answers, price {price:g}"] = half[1], half[0].best_each(price / thinking), 0.0
    return policies


def played(name: str, answers: Frontier, lams: np.ndarray, extra: float) -> dict[str, object]:
    """Evaluates a policy, with intervals, and prints the result."""
    outcome = play(answers, lams, extra)
    print(f"{name:50} {outcome.accuracy} right, {outcome.tokens} tokens, gain {outcome.gain}")
    return {
        f"{key}{suffix}": round(value, 4)
        for key in ("accuracy", "tokens", "static", "gain", "over_thinking", "tokens_saved")
        for suffix, value in zip(("", "_low", "_high"), getattr(outcome, key), strict=True)
    }


def trial_tokens(frontier: Frontier, tokens: int) -> float:
    """Returns the mean length of trial answers, which are the truncated answers of λ=0."""
    return float(np.minimum(frontier.tokens[:, 0], tokens).mean())


def overhead(subject: Subject, prompts: Prompts, preference: PreferenceEstimator) -> dict[str, float]:
    """Measures the time of each estimate relative to that of the answers at its λ, with medians of three."""
    shares = {}
    estimators = {"preference": preference, "confidence, trial of 3": ConfidenceEstimator(3)}
    for name, estimator in (estimators | {"confidence router, trial of 3": ConfidenceRouter(3)}).items():
        ratios = []
        for batch in prompts[:3]:
            start = time.perf_counter()
            lams = estimator.estimate(subject.model, batch).tolist()
            middle = time.perf_counter()
            generate_in_pieces(subject.model, batch, lams, **subject.options)
            ratios.append((middle - start) / (time.perf_counter() - middle))
        shares[f"time of the estimate over that of the answers: {name}"] = float(np.median(ratios))
    return shares


if __name__ == "__main__":
    main()
