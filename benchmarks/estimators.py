"""What estimators of λ are worth on a pair: python -m benchmarks.estimators PAIR [--training DIRECTORY]

Held-out questions are answered at several λ, and every policy is played on these answers, against the static λ that do
best on the very same ones. Rows go to `results/estimators_PAIR.csv` and `results/estimator_signals_PAIR.csv`, and one
for each estimator that pairs are compared by to `results/estimator_pairs.csv`.

    shipped   the shipped pair and its questions, at eleven λ, eight samples of each; the directory is that of
              python examples/train_pair/estimator.py
    smollm2   SmolLM2-135M and its thinking adapter, sums and facts by halves, at six λ, greedily; the directory is
              that of python examples/smollm2/estimator.py
    smollm2-sampled   the same pair, three samples at temperature 0.8
    zoo/NAME  a pair of python -m benchmarks.zoo, at six λ, eight samples of each; its estimator is trained here
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import datetime, timezone
from pathlib import Path

import dami
import numpy as np
import torch
from dami.dial.patch import Estimator, patch_of
from dami.estimators.calibrated import CalibratedEstimator, Signature
from dami.estimators.confidence import ConfidenceEstimator, ConfidenceRouter, signals
from dami.estimators.preference import PreferenceEstimator, fit
from dami.estimators.signals import SIGNALS
from dami.evaluation import Frontier, sweep
from dami.evaluation.calibration import Unlabelled, agreement_of, calibrate, fitted_to, signals_of
from dami.evaluation.policies import at_random, auroc, play, room
from dami.evaluation.statistics import Interval
from dami.evaluation.sweeps import Record, read_records
from dami.evaluation.tasks import spread
from dami.evaluation.training import features_of
from dami.generation.pieces import generate_in_pieces
from rich.progress import Progress

from benchmarks.machine import commit
from benchmarks.record import RESULTS, store
from benchmarks.subjects import FIFTHS, Subject, names, subject, unlabelled

PRICES = (0.1, 0.2, 0.3, 0.5, 1.0)
PRICE = 0.2  # the default
TRIALS = (1, 3, 20)  # tokens
COUNTED = ", its tokens counted"
LATER = ("incomplete", "aes")  # measures that estimators_PAIR.csv does not have

Policy = tuple[Frontier, np.ndarray, float]  # answers, λ of each question, and extra tokens
Prompts = list[dict[str, torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=names())
    parser.add_argument("--training", type=Path, help="directory of the estimator's training, but for the zoo")
    parser.add_argument("--questions", type=int, help="ask only so many, at six λ, for estimator_pairs.csv alone")
    parser.add_argument("--calibration", type=int, default=128, help="prompts to calibrate on (default: %(default)s)")
    parser.add_argument(
        "--calibrated", action="store_true", help="only the ends, the pair's estimator and the calibration; no times"
    )
    parser.add_argument("--work", type=Path, default=Path("estimators-run"), help="where answers go (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    options = parser.parse_args()
    work = options.work / options.pair
    work.mkdir(parents=True, exist_ok=True)
    asked = subject(options.pair, options.training, work)
    if options.questions:
        asked.task.questions = spread(asked.task.questions, options.questions)  # type: ignore[misc]
        asked = replace(asked, lams=FIFTHS)
    records = answers(asked, work / "records.jsonl")
    frontier = Frontier.of(records)
    preference = patch_of(asked.model).estimator
    assert isinstance(preference, PreferenceEstimator)
    prompts = batches_of_prompts(asked)

    policies = {f"λ = {lam:g}": static_policy(frontier, lam) for lam in (0.0, 1.0)}
    policies |= preference_policies(asked, frontier, preference)
    studied: dict[str, float] = {}
    if not options.calibrated:
        of_trials, studied = confidence_policies(asked, frontier, prompts)
        policies |= taught_policies(asked, frontier, preference) | of_trials
    alone = () if options.calibrated else tuple(SIGNALS)
    calibrated, of_calibration = calibrated_policies(asked, frontier, options.calibration, alone, work / "calibration")
    policies |= of_calibration | oracle_policies(asked, frontier, records)
    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, dami {dami.__version__}",
        "questions": len(frontier),
        "samples": asked.samples,
    }
    rows = [about | {"policy": name} | played(name, *policy) for name, policy in policies.items()]
    estimators: dict[str, Estimator] = {"preference": preference, "calibrated": calibrated}
    times = {} if options.calibrated else overhead(asked, prompts, estimators)
    pair = {"pair": options.pair, "tuned_on": asked.tuned_on}
    samples = [Frontier.of([r for r in records if r.sample == place]) for place in range(asked.samples)]
    compared = [
        row | pair | rooms(samples, policies[name]) | {"time": round(time_of(name, times), 4)}
        for row in rows
        if not (name := str(row["policy"])).startswith(("oracle", "its λ", "best static"))
    ]
    store(compared, options.results / "estimator_pairs.csv")
    for name, value in studied.items():
        print(f"{name:70} {value:.3f}")
    if options.questions or options.calibrated or options.pair.startswith("zoo/"):
        return
    kept = [{key: value for key, value in row.items() if not key.startswith(LATER)} for row in rows]
    store(kept, options.results / f"estimators_{options.pair}.csv")
    studied |= {f"time of the estimate over that of the answers: {name}": share for name, share in times.items()}
    signal_rows: list[dict[str, object]] = [about | {"what": n, "value": round(v, 4)} for n, v in studied.items()]
    store(signal_rows, options.results / f"estimator_signals_{options.pair}.csv")


def time_of(policy: str, times: Mapping[str, float]) -> float:
    """Returns the time of the estimate that a policy needs over that of the answers; nan if it was not measured."""
    return next((share for name, share in times.items() if f"{policy},".startswith(f"{name},")), float("nan"))


def answers(asked: Subject, path: Path) -> list[Record]:
    """Answers all questions at every λ."""
    with Progress() as progress:
        total = len(asked.task.questions) * len(asked.lams) * asked.samples
        bar = progress.add_task("answers", total=total)
        return sweep(
            asked.model, asked.tokenizer, asked.task, asked.lams, path=path, samples=asked.samples,
            rows=asked.rows, seed=7, on_batch=lambda news: progress.advance(bar, len(news)), **asked.options,
        )  # fmt: skip


def batches_of_prompts(asked: Subject) -> Prompts:
    questions, size = asked.task.questions, min(256, asked.rows)
    batches = [questions[start : start + size] for start in range(0, len(questions), size)]
    return [dami.chat.encode(asked.tokenizer, [q.question for q in batch])[1] for batch in batches]


def trained_router(asked: Subject, known: Frontier, preference: PreferenceEstimator) -> PreferenceEstimator:
    """Trains the same estimator on the same answers, with only the two ends to choose from."""
    features = features_of(asked.model, asked.tokenizer, asked.unseen, preference.features, asked.rows)
    ends = [0, len(known.intensities) - 1]
    weights = fit(features, known.scores[:, ends], known.tokens[:, ends], (0.0, 1.0))
    return PreferenceEstimator((0.0, 1.0), preference.features, weights)


def static_policy(frontier: Frontier, lam: float) -> Policy:
    return frontier, np.full(len(frontier), lam), 0.0


def taught_policies(asked: Subject, frontier: Frontier, preference: PreferenceEstimator) -> dict[str, Policy]:
    """Returns what the answers to the training questions teach: the best static λ, and a router."""
    known = Frontier.of(read_records(asked.training / "records.jsonl"))
    best = known.best_static(known, tokens=float(known.tokens[:, -1].mean())).intensity
    policies = {f"best static λ of the training questions: {best:g}": static_policy(frontier, best)}
    router = trained_router(asked, known, preference)
    features = features_of(asked.model, asked.tokenizer, asked.task, preference.features, asked.rows)
    for price in PRICES:
        policies[f"router, price {price:g}"] = frontier, router.at(price).choose(features).double().numpy(), 0.0
    return policies


def preference_policies(asked: Subject, frontier: Frontier, preference: PreferenceEstimator) -> dict[str, Policy]:
    features = features_of(asked.model, asked.tokenizer, asked.task, preference.features, asked.rows)
    policies: dict[str, Policy] = {}
    for price in PRICES:
        chosen = preference.at(price).choose(features).double().numpy().round(6)
        policies[f"preference, price {price:g}"] = frontier, chosen, 0.0
        policies[f"its λ at random, price {price:g}"] = frontier, at_random(frontier, chosen), 0.0
    return policies


def confidence_policies(
    asked: Subject, frontier: Frontier, prompts: Prompts
) -> tuple[dict[str, Policy], dict[str, float]]:
    """Returns the policies that read a short trial answer, and how well its signals predict gains by thinking."""
    policies: dict[str, Policy] = {}
    studied: dict[str, float] = {}
    helped = frontier.scores[:, -1] - frontier.scores[:, 0] > 0.5
    for tokens in TRIALS:
        trials = [signals(asked.model, batch, tokens) for batch in prompts]
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


def calibrated_policies(
    asked: Subject, frontier: Frontier, count: int, alone: Sequence[str], directory: Path
) -> tuple[CalibratedEstimator, dict[str, Policy]]:
    """Calibrates on `count` prompts. Returns the estimator, its policies, and those of signals alone."""
    model, tokenizer, rows = asked.model, asked.tokenizer, asked.rows
    task = Unlabelled.of(unlabelled(asked, count))
    prompts = [question.question for question in task.questions]
    found = calibrate(model, tokenizer, prompts, directory, FIFTHS, rows=rows, **asked.calibration)
    estimator = found.stored.estimator
    assert isinstance(estimator, CalibratedEstimator)
    agreement, _ = agreement_of(read_records(directory / "records.jsonl"), "word")
    policies: dict[str, Policy] = {}
    features = features_of(model, tokenizer, asked.task, estimator.features, rows)
    extra = signal_tokens(frontier, estimator.features)
    for price in PRICES:
        chosen = estimator.at(price).choose(features).double().numpy().round(6)
        policies[f"calibrated, price {price:g}"] = frontier, chosen, extra
    for name in alone:
        read = Signature((name,), estimator.features.tokens)
        fitted = fitted_to(agreement, signals_of(model, tokenizer, task, read, rows), read, PRICE)
        chosen = fitted.choose(features_of(model, tokenizer, asked.task, read, rows)).double().numpy().round(6)
        policies[f"calibrated on {name} alone"] = frontier, chosen, signal_tokens(frontier, read)
    return estimator, policies


def signal_tokens(frontier: Frontier, read: Signature) -> float:
    """Returns the mean number of tokens that are generated to read signals: each needs its own trial answer."""
    trials = sum({"states": 0, "agreement": 2}.get(name, 1) for name in read.names)
    return trials * trial_tokens(frontier, read.tokens)


def oracle_policies(asked: Subject, frontier: Frontier, records: list[Record]) -> dict[str, Policy]:
    """Returns the oracle policies, which know the answers they are scored on, or other samples of them."""
    thinking = float(frontier.tokens[:, -1].mean())
    policies: dict[str, Policy] = {
        f"oracle on its own answers, price {price:g}": (frontier, frontier.best_each(price / thinking), 0.0)
        for price in PRICES
    }
    if asked.samples > 1:
        half = [Frontier.of([record for record in records if record.sample % 2 == side]) for side in (0, 1)]
        for price in PRICES:
            policies[f"oracle on other answers, price {price:g}"] = half[1], half[0].best_each(price / thinking), 0.0
    return policies


def played(name: str, answers: Frontier, lams: np.ndarray, extra: float) -> dict[str, float]:
    """Evaluates a policy, with intervals, and prints the result."""
    outcome = play(answers, lams, extra)
    print(f"{name:60} {outcome.accuracy} right, {outcome.tokens} tokens, gain {outcome.gain}")
    columns: dict[str, float] = {}
    for each in fields(outcome):
        columns |= flat(each.name, getattr(outcome, each.name))
    return columns


def trial_tokens(frontier: Frontier, tokens: int) -> float:
    """Returns the mean length of trial answers, which are the truncated answers of λ=0."""
    return float(np.minimum(frontier.tokens[:, 0], tokens).mean())


def rooms(samples: list[Frontier], policy: Policy) -> dict[str, float]:
    """Returns the room for choosing λ, and what of it a policy wins; nothing if there is one sample of each answer."""
    if len(samples) == 1:
        return dict.fromkeys([f"{key}{end}" for key in ("room", "won") for end in ("", "_low", "_high")], float("nan"))
    found = room(samples, policy[1], PRICE, policy[2])
    return flat("room", found.total) | flat("won", found.won)


def flat(name: str, interval: Interval) -> dict[str, float]:
    """Returns an interval as three columns."""
    return {f"{name}{end}": round(value, 4) for end, value in zip(("", "_low", "_high"), interval, strict=True)}


def overhead(asked: Subject, prompts: Prompts, estimators: Mapping[str, Estimator]) -> dict[str, float]:
    """Measures the time of each estimate relative to that of the answers at its λ, with medians of three."""
    shares = {}
    simple = {"confidence, trial of 3": ConfidenceEstimator(3), "confidence router, trial of 3": ConfidenceRouter(3)}
    for name, estimator in (dict(estimators) | simple).items():
        ratios = []
        for batch in prompts[:3]:
            start = time.perf_counter()
            lams = torch.as_tensor(estimator.estimate(asked.model, batch)).tolist()
            middle = time.perf_counter()
            generate_in_pieces(asked.model, batch, lams, **asked.options)
            ratios.append((middle - start) / (time.perf_counter() - middle))
        shares[name] = float(np.median(ratios))
    return shares


if __name__ == "__main__":
    main()
