"""Whether a pair gains by other ends, or by λ that changes over the answer: python -m benchmarks.ends PAIR

Every variant answers the same questions at six λ, and is compared with the pair as it is by the worth of the best λ,
averaged over prices, as `dami tails` does. Rows go to `results/ends.csv`.

    swap 0.8     the thinking end is W_I + Δ − U Uᵀ Δ V Vᵀ, with the leading singular directions U, V of W_I that hold
                 this share of its squared singular values
    adapters 4   the linear layers of both ends differ from their ancestor's at this rank; where there is no ancestor,
                 those of the thinking end from the instruct end's
    rise, fall   λ begins or ends at half; between, it changes over as many tokens as answers at λ = 1 take

    shipped      the shipped pair and its questions, sampled
    zoo/NAME     a pair of python -m benchmarks.zoo, sampled
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import dami
import numpy as np
import torch
from dami.chat import answers_of, encode
from dami.evaluation import load_task
from dami.evaluation.statistics import Array, Places, bootstrap
from dami.evaluation.tails import PRICES
from dami.evaluation.tasks import Task
from dami.generation.pieces import generate_in_pieces
from dami.loading.load import example_pair
from dami.schedules import Schedule, linear
from dami.thoughts import Reader
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import commit
from benchmarks.record import RESULTS, store
from benchmarks.subjects import FIFTHS
from benchmarks.zoo import ZOO
from benchmarks.zoo.recipes import PAIRS

ROWS = 480
SHARES, RANKS = (0.5, 0.8), (4, 16)

Answers = tuple[Array, Array]  # scores and tokens, [questions, L] each, means over samples
SUBJECTS = {
    "shipped": "",
    **{f"zoo/{name}": pair.ancestor for name, pair in PAIRS.items() if not pair.rank + len(pair.other)},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=SUBJECTS)
    parser.add_argument("--questions", type=int, default=480, help="how many to ask (%(default)s)")
    parser.add_argument("--samples", type=int, default=2, help="answers to a question at each λ (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    options = parser.parse_args(argv)
    ancestor = SUBJECTS[options.pair]
    folder = ZOO.parent / options.pair if ancestor else example_pair()[0].parent
    tokenizer = AutoTokenizer.from_pretrained(folder / "thinking")
    task = load_task(str(folder / "questions.jsonl"), options.questions, verifier="word")

    def load(end: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / end, dtype="auto")

    def answers(instruct: Any, thinking: Any, lams: Sequence[float | Schedule] = FIFTHS) -> Answers:
        return answered(dami.patch_model(instruct, thinking), tokenizer, task, lams, options.samples)

    found = {"as it is": answers(load("instruct"), load("thinking"))}
    steps = round(found["as it is"][1][:, -1].mean())
    found["rise"] = answers(load("instruct"), load("thinking"), [linear(lam / 2, lam, steps) for lam in FIFTHS])
    found["fall"] = answers(load("instruct"), load("thinking"), [linear(lam, lam / 2, steps) for lam in FIFTHS])
    for share in SHARES:
        thinking = changed(load("thinking"), load("instruct"), partial(swapped, share=share))
        found[f"swap {share:g}"] = answers(load("instruct"), thinking)
    start = f"../ancestors/{ancestor}" if ancestor else "instruct"
    for rank in RANKS:
        ends = (changed(load(end), load(start), partial(at_rank, rank=rank)) for end in ("instruct", "thinking"))
        found[f"adapters {rank}"] = answers(*ends)
    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, dami {dami.__version__}",
        "pair": options.pair,
        "questions": len(task.questions),
        "samples": options.samples,
    }
    store([about | row for row in compared(found)], options.results / "ends.csv")


@torch.no_grad()
def changed(model: Any, start: Any, change: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Replaces the difference of a model's linear layers from those of another, by a function of both in float64."""
    others = dict(start.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":  # tied to the embedding
            before = others[name].weight.double()
            module.weight.copy_(before + change(before, module.weight.double() - before))
    return model


def swapped(before: Tensor, difference: Tensor, share: float) -> Tensor:
    """Returns Δ − U Uᵀ Δ V Vᵀ, with the singular directions that hold a share of the squared singular values."""
    u, values, v = torch.linalg.svd(before, full_matrices=False)
    count = int((values.square().cumsum(0) < share * values.square().sum()).sum()) + 1
    u, v = u[:, :count], v[:count].T
    return difference - u @ (u.T @ difference @ v) @ v.T


def at_rank(before: Tensor, difference: Tensor, rank: int) -> Tensor:
    """Returns the nearest matrix to Δ of a rank."""
    u, values, v = torch.linalg.svd(difference, full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ v[:rank]


def answered(model: Any, tokenizer: Any, task: Task, lams: Sequence[float | Schedule], samples: int) -> Answers:
    """Answers every question at every λ."""
    torch.manual_seed(7)
    asked = [index for index in range(len(task.questions)) for _ in range(samples)]
    size, cells = ROWS // len(lams), []
    for start in track(range(0, len(asked), size), "answers"):
        rows = [(index, lam) for index in asked[start : start + size] for lam in lams]
        prompts = [task.questions[index].question for index, _ in rows]
        with torch.inference_mode():
            texts, batch = encode(tokenizer, prompts)
            ids = generate_in_pieces(model, batch, [lam for _, lam in rows])
        said = answers_of(model, Reader.of(tokenizer), ids, prompts, None, texts)
        cells += [
            (task.score(index, answer.text), answer.tokens) for (index, _), answer in zip(rows, said, strict=True)
        ]
    table = np.array(cells).reshape(len(task.questions), samples, len(lams), 2).mean(1)
    return table[..., 0], table[..., 1]


def compared(found: Mapping[str, Answers]) -> list[dict[str, object]]:
    """Returns a row for every variant and λ, with the worth that the variant wins over the first."""
    (first, (scores, tokens)), *_ = found.items()
    dearest = tokens.mean(0).max()

    def worth(answers: Answers, places: Places) -> float:
        score, cost = (table[places].mean(0) for table in answers)
        return float((score - np.array(PRICES)[:, None] * cost / dearest).max(1).mean())

    def wins(places: Places) -> Array:
        return np.array([worth(answers, places) - worth(found[first], places) for answers in found.values()])

    rows: list[dict[str, object]] = []
    for (name, answers), won in zip(found.items(), bootstrap(wins, len(scores)), strict=True):
        for lam, score, cost in zip(FIFTHS, *(table.mean(0) for table in answers), strict=True):
            print(f"{name}, λ = {lam:g}: {100 * score:.1f} right, {cost:.1f} tokens; worth won {won}")
            row = {"variant": name, "intensity": lam, "accuracy": round(score, 4), "tokens": round(cost, 2)}
            rows.append(row | dict(zip(("won", "won_low", "won_high"), (round(x, 4) for x in won), strict=True)))
    return rows


if __name__ == "__main__":
    main()
