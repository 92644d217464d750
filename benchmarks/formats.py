"""What the storage formats lose, and what other group sizes, roundings and bits would: python -m benchmarks.formats

`results/formats.csv` gets ‖error of W(λ)‖ / ‖W(λ)‖ for weights as near to each other as published pairs are (Gaussian,
and with heavier tails) and for the pair that ships with dami; `results/format_quality.csv` what that does to this pair:
the divergence of its next-token distributions and the accuracy of its answers.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import dami
import torch
import torch.nn.functional as F
from dami.chat import encode
from dami.evaluation import Frontier, load_task, sweep
from dami.loading.checkpoint import Checkpoint
from dami.loading.load import example_pair
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.machine import commit
from benchmarks.record import RESULTS, store
from benchmarks.weights import KERNEL_FORMATS
from dami_kernels import LerpWeight
from dami_kernels.quantize import SCALE, dequantize, quantize

LAMS = (0.0, 0.25, 0.5, 0.75, 1.0)
DISTANCE = 0.027  # ‖target − base‖ / ‖base‖ of the published pairs

Ends = tuple[Tensor, Tensor]
Store = Callable[[Ends], tuple[Callable[[float], Tensor], float]]  # both ends → (λ → W(λ) in float64, bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("weights", "pair"), help="both if none is named")
    parser.add_argument("--questions", type=int, default=768, help="held-out questions that the pair is asked")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    options = parser.parse_args()
    what = [options.what] if options.what else ["weights", "pair"]
    torch.manual_seed(0)
    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
    if "weights" in what:
        store([about | row for row in weight_errors()], options.results / "formats.csv")
    if "pair" in what:
        store([about | row for row in quality(options.questions)], options.results / "format_quality.csv")


def weight_errors() -> Iterator[dict]:
    """Measures errors of the formats and of other ways to store the difference, and the size of a lossless one."""
    variants: dict[str, Store] = {name: packed(name) for name in KERNEL_FORMATS}
    for bits in (8, 4, 3, 2):
        for group in (32, 64, 128):
            for rounding in ("widest", "least squares"):
                variants[f"{bits} bits, groups of {group}, {rounding}"] = delta_in(bits, group, rounding)
    variants["1 bit a weight, a scale a matrix (BitDelta)"] = sign_and_mean
    variants["8-bit difference in ulps, escapes listed"] = lossless
    variants["a merged copy at λ, in bfloat16"] = merged_copy
    for source, weights in sources().items():
        for variant, store_ends in variants.items():
            errors, sizes = {lam: [0.0, 0.0] for lam in LAMS}, [0.0, 0]
            for base, target in weights:
                stored, nbytes = store_ends((base, target))
                sizes[0] += nbytes
                sizes[1] += base.numel()
                for lam, sums in errors.items():
                    exact = torch.lerp(base.double(), target.double(), lam)
                    sums[0] += (stored(lam) - exact).square().sum().item()
                    sums[1] += exact.square().sum().item()
            for lam, (error, norm) in errors.items():
                yield {
                    "weights": source,
                    "stored": variant,
                    "bytes_per_weight": f"{sizes[0] / sizes[1]:.4f}",
                    "lam": lam,
                    "error": f"{(error / norm) ** 0.5:.6f}",
                }


def sources() -> dict[str, list[Ends]]:
    """Returns bfloat16 weights to store, by name."""

    def near(sample: Callable[[], Tensor]) -> Ends:
        base = torch.randn(1024, 2560)
        delta = sample()
        return base.bfloat16(), (base + DISTANCE * base.norm() / delta.norm() * delta).bfloat16()

    heavy = torch.distributions.StudentT(torch.tensor(5.0))
    instruct, thinking = (Checkpoint.find(directory).model(dtype="auto") for directory in example_pair())
    shipped = [
        (base.detach(), target.detach())
        for base, target in zip(instruct.parameters(), thinking.parameters(), strict=True)
        if base.dim() == 2 and not torch.equal(base, target)
    ]
    return {
        "Gaussian": [near(lambda: torch.randn(1024, 2560))],
        "Student t, 5 degrees": [near(lambda: heavy.sample((1024, 2560)))],
        "shipped pair": shipped,
    }


def between(base: Tensor, target: Tensor) -> Callable[[float], Tensor]:
    return lambda lam: torch.lerp(base.double(), target.double(), lam)


def packed(format: str) -> Store:
    def run(ends: Ends) -> tuple[Callable[[float], Tensor], float]:
        weight = LerpWeight.pack(*ends, format)
        return between(*weight.unpack()), weight.nbytes

    return run


def delta_in(bits: int, group: int, rounding: str) -> Store:
    """Stores the base unchanged and the difference in codes of so many bits."""

    def run(ends: Ends) -> tuple[Callable[[float], Tensor], float]:
        base, target = (end.float() for end in ends)
        delta = target - base
        if rounding == "least squares":
            codes, scales = quantize(delta, bits, group)
        else:  # the largest weight maps to the largest code; round the others
            groups = F.pad(delta, (0, -delta.shape[1] % group)).unflatten(1, (-1, group))
            scales = (groups.abs().amax(-1) / (2 ** (bits - 1) - 1)).to(SCALE)
            steps = scales.float().unsqueeze(-1).clamp_min(torch.finfo(torch.float32).tiny)
            codes = (groups / steps).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).flatten(1)
        nbytes = ends[0].nbytes + codes.numel() * bits / 8 + scales.nbytes
        return between(base, base + dequantize(codes, scales, base.shape[1])), nbytes

    return run


def sign_and_mean(ends: Ends) -> tuple[Callable[[float], Tensor], float]:
    """Stores as BitDelta (arXiv 2402.10193) does before distillation: signs of the differences, and their mean size."""
    base, target = (end.float() for end in ends)
    delta = target - base
    return between(base, base + delta.abs().mean() * delta.sign()), ends[0].nbytes + base.numel() / 8 + 2


def lossless(ends: Ends) -> tuple[Callable[[float], Tensor], float]:
    """Returns the bytes of storing the target as the base plus an 8-bit number of ulps, with 4-byte exceptions."""

    def in_order(end: Tensor) -> Tensor:
        """Returns bfloat16 values as integers of the same order."""
        bits = end.view(torch.int16).int()
        return torch.where(bits < 0, -32768 - bits, bits)

    ulps = in_order(ends[1]) - in_order(ends[0])
    escapes = ((ulps < -127) | (ulps > 127)).sum().item()
    return between(*ends), ends[0].nbytes + ulps.numel() + 4 * escapes


def merged_copy(ends: Ends) -> tuple[Callable[[float], Tensor], float]:
    """The alternative without these formats: one merged copy for each λ, rounded once."""
    exact = between(*ends)
    return lambda lam: exact(lam).bfloat16().double(), ends[0].nbytes


@torch.inference_mode()
def quality(count: int) -> Iterator[dict]:
    """Measures each format on the shipped pair: answers, sampled as for `pair_curve.csv`, and divergences."""
    directory = example_pair()[0].parent
    task = load_task(str(directory / "questions.jsonl"), count, verifier="word")
    prompts = [str(question.question) for question in task.questions[::8]]
    exact, tokenizer = dami.load_pair(*example_pair())
    answered = {lam: answers(exact, tokenizer, prompts, lam) for lam in LAMS}
    for format in track(KERNEL_FORMATS, "asking the shipped pair"):
        model = dami.load_pair(*example_pair(), format=format)[0]
        frontier = Frontier.of(sweep(model, tokenizer, task, LAMS, rows=264))
        for point in frontier.points:
            yield {
                "format": format,
                "bytes": sum(row.nbytes for row in dami.describe(model).rows),
                "lam": point.intensity,
                "kl": f"{divergence(exact, model, *answered[point.intensity], point.intensity):.6f}",
                "questions": len(frontier),
                "accuracy": f"{point.accuracy.value:.4f}",
                "accuracy_low": f"{point.accuracy.low:.4f}",
                "accuracy_high": f"{point.accuracy.high:.4f}",
                "tokens": f"{point.tokens.value:.2f}",
                "tokens_low": f"{point.tokens.low:.2f}",
                "tokens_high": f"{point.tokens.high:.2f}",
            }


def answers(model: PreTrainedModel, tokenizer: Any, prompts: list[str], lam: float) -> tuple[Tensor, Tensor, int]:
    """Returns the model's greedy answers: ids and attention mask [rows, length], and the prompts' length."""
    batch = encode(tokenizer, prompts)[1]
    ids = model.generate(**batch, intensity=lam, do_sample=False, max_new_tokens=96)
    prompt = batch["input_ids"].shape[1]
    said = ids[:, prompt:] != model.generation_config.pad_token_id
    return ids, torch.cat((batch["attention_mask"], said.long()), 1), prompt


def divergence(
    exact: PreTrainedModel, model: PreTrainedModel, ids: Tensor, mask: Tensor, prompt: int, lam: float
) -> float:
    """Returns the mean KL(exact ‖ model) of the next token along the answers, in nats."""
    logs = []
    for each in (exact, model):
        with dami.intensity(each, lam):
            logits = each(input_ids=ids, attention_mask=mask).logits
        logs.append(logits[:, prompt - 1 : -1].double().log_softmax(-1))
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    return kl[mask[:, prompt:].bool()].mean().item()


if __name__ == "__main__":
    main()
