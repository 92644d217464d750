"""Says where the time of a token goes: decoding one sequence by transformers' `generate`, in bfloat16, with a pair of
SmolLM2-135M's shapes, patched, step by step and compiled, against one plain model.

Weights are random, as none of the time depends on them. The parts are what torch's profiler sees, so that their sum is
more than the time of a step without it. Compiling takes minutes the first time; torch keeps the results on disk.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.generate import PROMPT, SHAPE, answer, check_model, prepared, seconds, step
from benchmarks.machine import about, machine
from benchmarks.record import RESULTS, store, text_table
from benchmarks.timing import Times, interleaved

STEP, LEAST = "a step", "weights / bandwidth"
PRODUCTS, ATTENTION, GRAPH = "products, norms, embedding", "attention", "the rest of the compiled graph"
ENTERING, GUARDS, OTHERS, PYTHON = "entering the graph", "guards", "torch's other operators", "Python between operators"
PARTS: dict[str, Callable[[str], bool]] = {  # of a step, by the names of the profiler's events; the first that fits
    PRODUCTS: lambda name: name.startswith("dami::") or name in ("aten::mm", "aten::addmm", "aten::mkldnn_linear"),
    ATTENTION: lambda name: "scaled_dot_product" in name,
    GRAPH: lambda name: "CompiledFxGraph" in name,
    GUARDS: lambda name: name == "TorchDynamo Cache Lookup",
    ENTERING: lambda name: name.startswith(("Pregraph", "AOTDispatcher", "Torch-Compiled")),
    OTHERS: lambda name: name.startswith("aten::"),
}


class Case(NamedTuple):
    """A way to decode: a model, its kind of λ, and options of `generate`."""

    model: Any
    lam: str | None
    options: dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks decode", description=__doc__)
    add = parser.add_argument
    add("--formats", nargs="+", default=["pair", "w8d4"], metavar="FORMAT")
    add("--tokens", type=int, default=32, help="of an answer, from the second on")
    add("--layers", type=int, default=SHAPE["num_hidden_layers"])
    add("--threads", type=int, help="of the CPU; default: as PyTorch chooses")
    add("--seconds", type=float, default=60.0, help="of timing, about")
    add("--results", type=Path, default=RESULTS, metavar="DIRECTORY", help="of decode.csv")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    here = machine()
    facts = about(here)
    print(f"{facts['device']}, {facts['isa']}, torch {facts['torch']}, {torch.get_num_threads()} threads", flush=True)
    ids = torch.randint(3, SHAPE["vocab_size"], (1, PROMPT), device=here.device)
    cases: dict[str, Case] = {}
    for (name, lam), model in prepared(torch.bfloat16, options.formats, options.layers, here.device).items():
        short = name.split(",")[0]
        if lam == "mixed":  # as "one", for one sequence
            continue
        cases[short] = Case(model, lam, {})
        if lam is not None:
            check_model(model, ids, lam, name)
            cases[f"{short}, compiled"] = Case(model, lam, {"compile": True})
            taken = seconds(partial(check_compiled, model, ids))
            print(f"{short}: compiling and the first answers took {taken:.0f} s", flush=True)
    steps = {
        name: partial(step, case.model, ids, options.tokens, case.lam, **case.options) for name, case in cases.items()
    }
    times = interleaved(steps, options.seconds)
    bandwidth = max(here.bandwidth() for _ in range(3))
    for name, case in cases.items():
        parts = {STEP: times[name].median, LEAST: nbytes(case.model) / bandwidth}
        parts |= where(partial(answer, case.model, ids, case.lam, **case.options), options.tokens)
        rows = [row(name, part, seconds, times[name], times["plain"]) for part, seconds in parts.items()]
        store([facts | row for row in rows], options.results / "decode.csv")
        lines = [["part", "ms"], *([row["part"], row["ms"]] for row in rows)]
        print(f"\n{name}: {rows[0]['tokens_per_s']} tokens/s, {rows[0]['speedup']}\n{text_table(lines)}", flush=True)
    return 0


def row(method: str, part: str, seconds: float, taken: Times, plain: Times) -> dict[str, object]:
    whole = part == STEP
    return {
        "dtype": "bf16",
        "batch": 1,
        "method": method,
        "part": part,
        "ms": f"{1e3 * seconds:.3f}",
        "p10_ms": f"{1e3 * taken.p10:.3f}" if whole else "",
        "p90_ms": f"{1e3 * taken.p90:.3f}" if whole else "",
        "count": taken.count if whole else "",
        "tokens_per_s": f"{1 / seconds:.1f}" if whole else "",
        "speedup": f"{plain.median / seconds:.2f}" if whole else "",
    }


def nbytes(model: Any) -> int:
    """Returns the bytes of a model's weights, all of which a step reads: the embedding is also the head."""
    return sum(parameter.nbytes for parameter in model.parameters())


@torch.inference_mode()
def check_compiled(model: Any, ids: Tensor) -> None:
    """Raises RuntimeError unless the first tokens of a compiled answer are those of one that is not."""
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "intensity": 0.3}
    plain, compiled = (
        model.generate(ids, output_logits=True, return_dict_in_generate=True, compile=compile, **options).logits
        for compile in (False, True)
    )
    error = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(plain[:2], compiled[:2], strict=True))
    if error > 0.05:  # the second logits are the first of a compiled step
        raise RuntimeError(f"the logits of a compiled step differ from a plain step's by {error:.1%} of the largest")


def where(answer: Callable[[int], object], tokens: int) -> dict[str, float]:
    """Returns the seconds of the parts of a step: what an answer of `tokens` tokens more takes more of them."""
    first, more = (seen(partial(answer, count)) for count in (1, 1 + tokens))
    return {part: (more[part] - first[part]) / tokens for part in more}


def seen(call: Callable[[], object]) -> dict[str, float]:
    """Returns the seconds that a call spends in each part."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        whole = seconds(call)
    spent = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        part = next((part for part, fits in PARTS.items() if fits(event.key)), None)
        if part is not None:
            spent[part] += 1e-6 * event.self_cpu_time_total
    return {**spent, PYTHON: whole - sum(spent.values())}
