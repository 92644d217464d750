"""Says where the time of a token goes: decoding one sequence by transformers' `generate`, in bfloat16, with a pair of
SmolLM2-135M's shapes, patched, and one plain model; each step by step and compiled, a pair in huge pages too.

The plain model is compiled in the same way, a graph for each kind of layer. Weights are random, as none of the time
depends on them. The parts are what torch's profiler sees, so that their sum is more than the time of a step without it.
The time of compiling is that of the first compiled answer, with nothing on disk, where torch keeps what it compiles.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import dami
import torch
from dami.generation.attention import GROUPED
from dami.generation.compiled import LEAST_ROOM, StepConfig, compiled_call
from dami.generation.repeated_calls import FirstCall
from dami.upstream import for_any_device
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.generate import PROMPT, SHAPE, answer, check_model, prepared, seconds, step
from benchmarks.machine import about, machine
from benchmarks.record import RESULTS, store, text_table
from benchmarks.timing import Times, interleaved

STEP, LEAST = "a step", "weights / bandwidth"
PRODUCTS, ATTENTION, GRAPH = "products, norms, embedding", "attention", "the rest of the compiled graph"
ENTERING, GUARDS, OTHERS, PYTHON = "entering the graph", "guards", "torch's other operators", "Python between operators"
PARTS: dict[str, Callable[[str], bool]] = {  # of a step, by the names of the profiler's events; the first that fits
    ATTENTION: lambda name: "scaled_dot_product" in name or name == "dami::decode_attention",
    PRODUCTS: lambda name: name.startswith("dami::") or name in ("aten::mm", "aten::addmm", "aten::mkldnn_linear"),
    GRAPH: lambda name: "CompiledFxGraph" in name or name == REPEATED,
    GUARDS: lambda name: name == "TorchDynamo Cache Lookup",
    ENTERING: lambda name: name.startswith(("Pregraph", "AOTDispatcher", "Torch-Compiled")),
    OTHERS: lambda name: name.startswith("aten::"),
}
REPEATED = "a repeated call"  # the profiler's events name what torch calls, but not what is called past torch
STATIC = {"cache_implementation": "static", "max_cache_len": LEAST_ROOM}


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
    compiling: dict[str, float] = {}
    with TemporaryDirectory() as folder, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        for (name, lam), model in prepared(torch.bfloat16, options.formats, options.layers, here.device).items():
            if lam == "mixed":  # as "one", for one sequence
                continue
            short = name.split(",")[0]
            if lam is not None:
                check_model(model, ids, lam, name)
            cases[short] = Case(model, lam, {})
            ways = {f"{short}, compiled": model}
            if lam is not None and dami.use_huge_pages(moved := copy.deepcopy(model)):
                ways[f"{short}, compiled, huge pages"] = moved
            for way, its_model in ways.items():
                cases[way] = compiled(its_model, lam)
                taken = seconds(partial(answer, cases[way].model, ids, lam, 2, **cases[way].options))
                check_compiled(cases[way], cases[short], ids)
                if its_model is model:  # a second one finds what the first has left on disk
                    compiling[way] = taken
                    print(f"{short}: compiling took {taken:.0f} s", flush=True)
    steps = {
        name: partial(step, case.model, ids, options.tokens, case.lam, **case.options) for name, case in cases.items()
    }
    times = interleaved(steps, options.seconds)
    bandwidth = max(here.bandwidth() for _ in range(3))
    for name, case in cases.items():
        parts = {STEP: times[name].median, LEAST: nbytes(case) / bandwidth}
        parts |= where(partial(answer, case.model, ids, case.lam, **case.options), options.tokens)
        rows = [
            row(name, part, seconds, times[name], times["plain"], compiling.get(name))
            for part, seconds in parts.items()
        ]
        store([facts | row for row in rows], options.results / "decode.csv")
        lines = [["part", "ms"], *([row["part"], row["ms"]] for row in rows)]
        print(f"\n{name}: {rows[0]['tokens_per_s']} tokens/s, {rows[0]['speedup']}\n{text_table(lines)}", flush=True)
    return 0


def row(
    method: str, part: str, seconds: float, taken: Times, plain: Times, compiling: float | None
) -> dict[str, object]:
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
        "compile_s": f"{compiling:.1f}" if whole and compiling is not None else "",
    }


def compiled(model: Any, lam: str | None) -> Case:
    """Returns how to decode by a compiled step; a plain model, of which this takes a copy, as a patched one."""
    if lam is not None:
        return Case(model, lam, {"compile": True})
    model, known = copy.deepcopy(model), {}
    model.set_attn_implementation(GROUPED)
    model.get_compiled_call = lambda config: compiled_call(model, known)
    return Case(model, lam, {**STATIC, "compile_config": for_any_device(StepConfig())})


def nbytes(case: Case) -> int:
    """Returns the bytes of a model's weights as stored, all of which a step reads: the embedding is also the head."""
    if case.lam is not None:
        return dami.describe(case.model).nbytes
    return sum(parameter.nbytes for parameter in case.model.parameters())


@torch.inference_mode()
def check_compiled(case: Case, by_steps: Case, ids: Tensor) -> None:
    """Raises RuntimeError unless the logits of a compiled step are those of one that is not, but for rounding."""
    given = {"output_logits": True, "return_dict_in_generate": True}
    found, wanted = (
        answer(each.model, ids, each.lam, 2, **each.options, **given).logits[1] for each in (case, by_steps)
    )
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if error > 0.05:
        raise RuntimeError(f"the logits of a compiled step differ from a plain step's by {error:.1%} of the largest")


def where(answer: Callable[[int], object], tokens: int) -> dict[str, float]:
    """Returns the seconds of the parts of a step: what an answer of `tokens` tokens more takes more of them."""
    first, more = (seen(partial(answer, count)) for count in (1, 1 + tokens))
    return {part: max(0.0, more[part] - first[part]) / tokens for part in more}  # what is next to nothing is noise


def seen(call: Callable[[], object]) -> dict[str, float]:
    """Returns the seconds that a call spends in each part."""
    repeat = FirstCall.repeat

    def recorded(*arguments: Any) -> Any:
        with record_function(REPEATED):
            return repeat(*arguments)

    with patch.object(FirstCall, "repeat", recorded), profile(activities=[ProfilerActivity.CPU]) as profiler:
        whole = seconds(call)
    spent = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        part = next((part for part, fits in PARTS.items() if fits(event.key)), None)
        if part is not None:
            spent[part] += 1e-6 * event.self_cpu_time_total
    return {**spent, PYTHON: whole - sum(spent.values())}
