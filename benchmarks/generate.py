"""Times decoding by transformers' `generate`: a pair of SmolLM2-135M's shapes, patched, against one plain model.

Weights are random, as none of the time depends on them. A row is the time of a step, from the second token on: tokens/s
are B over it. λ is "mixed" where every sequence has its own. Models in huge pages are there where the system has them.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dami import materialize, patch_model, use_huge_pages
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.check import WrongResult, check
from benchmarks.machine import about, machine
from benchmarks.measure import DTYPES
from benchmarks.record import RESULTS, store, text_table
from benchmarks.timing import interleaved

PROMPT = 32  # tokens
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks generate", description=__doc__)
    add = parser.add_argument
    add("--batch", "-b", type=int, nargs="+", default=[1, 4, 16], metavar="B", help="sequences")
    add("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"], metavar="DTYPE")
    add("--formats", nargs="+", default=["pair", "w8d4"], metavar="FORMAT")
    add("--tokens", type=int, default=16, help="of an answer, from the second on")
    add("--layers", type=int, default=SHAPE["num_hidden_layers"])
    add("--threads", type=int, help="of the CPU; default: as PyTorch chooses")
    add("--seconds", type=float, default=30.0, help="of timing for each case, about")
    add("--results", type=Path, default=RESULTS, metavar="DIRECTORY", help="of generate.csv")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    here = machine()
    facts = about(here)
    print(f"{facts['device']}, {facts['isa']}, torch {facts['torch']}, {torch.get_num_threads()} threads", flush=True)
    for dtype in options.dtypes:
        models = prepared(DTYPES[dtype], options.formats, options.layers, here.device)
        models |= in_huge_pages(models)
        for batch in options.batch:
            ids = torch.randint(3, SHAPE["vocab_size"], (batch, PROMPT), device=here.device)
            for (name, lam), model in models.items():
                if lam is not None:
                    check_model(model, ids, lam, name)
            steps = {name: partial(step, model, ids, options.tokens, lam) for (name, lam), model in models.items()}
            times = interleaved(steps, options.seconds)
            plain = times["plain"].median
            rows = [
                {
                    "dtype": dtype,
                    "batch": batch,
                    "method": name,
                    "median_ms": f"{1e3 * taken.median:.3f}",
                    "p10_ms": f"{1e3 * taken.p10:.3f}",
                    "p90_ms": f"{1e3 * taken.p90:.3f}",
                    "count": taken.count,
                    "tokens_per_s": f"{batch / taken.median:.1f}",
                    "ratio": f"{taken.median / plain:.2f}",
                }
                for name, taken in times.items()
            ]
            store([facts | row for row in rows], options.results / "generate.csv")
            lines = [
                [row[key] for key in ("method", "median_ms", "p10_ms", "p90_ms", "tokens_per_s", "ratio")]
                for row in rows
            ]
            print(f"\n{dtype}, B={batch}", flush=True)
            print(text_table([["method", "ms a step", "p10", "p90", "tokens/s", "ratio"], *lines]), flush=True)
    return 0


def prepared(
    dtype: torch.dtype, formats: list[str], layers: int, device: torch.device
) -> dict[tuple[str, str | None], Any]:
    """Returns the models by name and kind of λ. The plain model has none."""
    plain = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers})).to(device, dtype).eval()
    models: dict[tuple[str, str | None], Any] = {("plain", None): plain}
    for format in formats:
        instruct, thinking = copy.deepcopy(plain), copy.deepcopy(plain)
        with torch.no_grad():
            for parameter in thinking.parameters():
                parameter.add_(0.003 * torch.randn_like(parameter))
        patched = patch_model(instruct, thinking, format)
        models |= {(f"{format}, one λ", "one"): patched, (f"{format}, mixed λ", "mixed"): patched}
    return models


def in_huge_pages(models: dict[tuple[str, str | None], Any]) -> dict[tuple[str, str | None], Any]:
    """Returns copies of the models in huge pages, without those at one λ; none where the system has no such pages."""
    moved = {
        (f"{name}, huge pages", lam): copy.deepcopy(model) for (name, lam), model in models.items() if lam != "one"
    }
    return {key: model for key, model in moved.items() if use_huge_pages(model)}


@torch.inference_mode()
def check_model(model: Any, ids: Tensor, lam: str, name: str) -> None:
    """Raises WrongResult unless the first sequence's logits are those of a copy merged at its λ, but for rounding."""
    intensity = intensities(lam, len(ids))
    y = model(ids, intensity=intensity).logits[:1]
    merged = materialize(model, intensity[0])
    plain = merged(ids[:1]).logits
    try:
        check(y, merged.double()(ids[:1]).logits, plain, factor=2)  # the copy's weights are rounded once more
    except WrongResult as error:
        raise WrongResult(f"{name}: {error}") from None


def intensities(lam: str, sequences: int) -> list[float]:
    return [0.3 if lam == "one" else (i + 1) / (sequences + 1) for i in range(sequences)]


def step(model: Any, ids: Tensor, tokens: int, lam: str | None, **options: Any) -> float:
    """Measures the seconds of a decoding step. `options` are for `generate`."""
    taken = [seconds(partial(answer, model, ids, lam, count, **options)) for count in (1, 1 + tokens)]
    return (taken[1] - taken[0]) / tokens


def answer(model: Any, ids: Tensor, lam: str | None, tokens: int, **options: Any) -> Any:
    """Generates so many tokens, greedily."""
    if lam is not None:
        options["intensity"] = 0.3 if lam == "one" else intensities(lam, len(ids))
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None, **options)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
