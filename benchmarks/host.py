"""Times what a call costs on the host: every operator on operands so small that next to nothing is computed, against
torch's own operator; where the time of one call goes; and a model of eight tiny layers, patched and plain. Then what a
call on a GPU costs on the host, without a GPU: Triton launches into a stand-in for CUDA's driver (benchmarks/stand_in).

A call is timed in a loop of many, with no gradient, as `generate` makes them. Times are the thread's, not the clock's,
so others on the machine disturb them less; run it alone nevertheless.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from dami import materialize, patch_model
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.machine import about, machine
from benchmarks.record import RESULTS, store, text_table
from benchmarks.timing import Times, interleaved
from dami_kernels import (
    LerpWeight,
    launching,
    lerp_embedding,
    lerp_experts,
    lerp_layer_norm,
    lerp_linear,
    lerp_linears,
    lerp_rms_norm,
    native,
    upstream,
)
from dami_kernels.ops import direct, library
from dami_kernels.ops import gpu as gpu_calls

FORMATS = ("pair", "int8", "int4", "w8d4")
SIZE = 64  # of both dimensions of a weight
TORCH, OURS, DISPATCHED = "torch", "dami", "dami, dispatched"
STEPS = "a call of linear pair"
GPU = "on a GPU: "  # begins the cases of launches
GPU_STEPS = f"{GPU}a call of linear pair"
TRITON, LAUNCH = "Triton's launch", "dami, from the dispatcher on"
Calls = dict[str, Callable[[], object]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks host", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each case, about")
    parser.add_argument("--on", nargs="+", choices=("cpu", "gpu"), default=["cpu", "gpu"], help="whose calls")
    parser.add_argument("--calls", type=int, default=1000, help="in one loop")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIRECTORY", help="of host.csv")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    facts = about(machine())
    print(f"{facts['device']}, {facts['isa']}, torch {facts['torch']}, one thread", flush=True)
    with torch.no_grad():
        cpu, gpu = (
            (cases() if "cpu" in options.on else ()),
            (launches() if "gpu" in options.on and can_launch() else ()),
        )
        for case, calls in itertools.chain(cpu, gpu):
            count = options.calls if case != "model" else max(1, options.calls // 100)
            times = interleaved({name: partial(loop, call, count) for name, call in calls.items()}, options.seconds)
            rows = [row(case, name, taken, times) for name, taken in times.items()]
            store([facts | row for row in rows], options.results / "host.csv")
            lines = [[row["method"], row["median_us"], row["p10_us"], row["p90_us"], row["ratio"]] for row in rows]
            print(f"\n{case}\n{text_table([['method', 'µs', 'p10', 'p90', 'ratio'], *lines])}", flush=True)
    return 0


def loop(call: Callable[[], object], count: int) -> float:
    """Measures the seconds per call that this thread runs in a loop of `count` calls, not those it waits for a core."""
    start = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - start) / count


def row(case: str, method: str, taken: Times, all: dict[str, Times]) -> dict[str, object]:
    first = next(iter(all.values()))
    low, median, high = (f"{1e6 * seconds:.2f}" for seconds in (taken.p10, taken.median, taken.p90))
    return {
        "case": case,
        "method": method,
        "median_us": median,
        "p10_us": low,
        "p90_us": high,
        "count": taken.count,
        "ratio": f"{taken.median / first.median:.2f}",
    }


def cases() -> Iterator[tuple[str, Calls]]:
    """Returns each case with its methods. The first method is the baseline. All results are checked."""
    x, lam = torch.randn(1, SIZE), torch.tensor([0.3])
    plain, vector, ids = torch.randn(SIZE, SIZE), torch.randn(SIZE), torch.tensor([7])
    norm, bias = (LerpWeight.pack(vector, vector + 0.1) for _ in range(2))
    for format in FORMATS:
        weight = LerpWeight.pack(plain, plain + 0.1 * torch.randn_like(plain), format)
        merged = weight.materialize(0.3)
        operands = [x, list(weight.tensors), None, lam, None, 1, format, False]
        yield f"linear {format}", checked({
            TORCH: partial(F.linear, x, merged),
            OURS: partial(lerp_linear, x, weight, lam),
            DISPATCHED: partial(torch.ops.dami.lerp_linear.default, *operands),
        })  # fmt: skip
    weight = LerpWeight.pack(plain, plain + 0.1 * torch.randn_like(plain))
    merged = weight.materialize(0.3)
    yield "linears", checked({
        f"{TORCH}, three": lambda: torch.cat([F.linear(x, merged) for _ in range(3)], -1),
        f"{OURS}, three calls": lambda: torch.cat([lerp_linear(x, weight, lam) for _ in range(3)], -1),
        OURS: lambda: torch.cat(lerp_linears(x, [weight] * 3, lam), -1),
    })  # fmt: skip
    yield "embedding", checked({
        TORCH: partial(F.embedding, ids, merged),
        OURS: partial(lerp_embedding, ids, weight, lam),
    })  # fmt: skip
    yield "rms_norm", checked({
        TORCH: partial(F.rms_norm, x, (SIZE,), norm.materialize(0.3), 1e-6),
        OURS: partial(lerp_rms_norm, x, norm, lam, 1e-6),
    })  # fmt: skip
    yield "layer_norm", checked({
        TORCH: partial(F.layer_norm, x, (SIZE,), norm.materialize(0.3), bias.materialize(0.3)),
        OURS: partial(lerp_layer_norm, x, norm, lam, bias),
    })  # fmt: skip
    yield STEPS, steps(x, weight, lam)
    yield "model", model()


def checked(calls: Calls) -> Calls:
    """Returns the calls after checking that their results equal the first one's, up to rounding."""
    results = [call() for call in calls.values()]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-3)
    return calls


def steps(x: Tensor, weight: LerpWeight, lam: Tensor) -> Calls:
    """Returns a whole call, and parts of it that can be called alone."""
    nothing, all_rows = x[:0], torch.tensor(0.3)
    arguments = (lam, None, None, weight.format, SIZE, False)
    compiled = native._C.linears
    return {
        "whole": partial(lerp_linear, x, weight, lam),
        "is anybody watching?": library.is_eager,
        "from Python on": partial(direct.lerp_linear, False, x, weight, lam),
        "compiled part": partial(compiled, False, x, weight.tensors, (), *arguments),
        "compiled part, no rows": partial(compiled, False, nothing, weight.tensors, (), all_rows, *arguments[1:]),
        "an empty tensor": partial(x.new_empty, (1, SIZE)),
    }


def model() -> Calls:
    """Runs one token of each of four sequences through eight tiny layers."""
    config = Qwen3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=256,
    )  # fmt: skip

    def end() -> Qwen3ForCausalLM:
        model = Qwen3ForCausalLM(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.1, 0.1)
        return model

    instruct, thinking, alone = end(), end(), end()
    patched = patch_model(instruct, thinking)
    ids, lam = torch.randint(0, 256, (4, 1)), torch.tensor([0.1, 0.5, 0.9, 1.0])
    for row, value in enumerate(lam.tolist()):
        expected = materialize(patched, value)(ids[row : row + 1]).logits
        torch.testing.assert_close(patched(ids, intensity=lam).logits[row : row + 1], expected, rtol=1e-3, atol=1e-3)
    return {
        TORCH: partial(alone, ids),
        f"{OURS}, one λ": partial(patched, ids, intensity=0.3),
        f"{OURS}, four λ": partial(patched, ids, intensity=lam),
    }


def can_launch() -> bool:
    """Whether Triton and a C compiler are there, and says so if they are not."""
    found = importlib.util.find_spec("triton") is not None and shutil.which("cc") is not None
    if not found:
        print("\nno launches on a GPU: they need Triton and a C compiler, cc")
    return found


def launches() -> Iterator[tuple[str, Calls]]:
    """Returns each case of a call on a GPU. Nothing is computed; the launches are compared by tests."""
    from benchmarks.stand_in import by_triton, playing_gpu
    from dami_kernels import triton

    with playing_gpu():

        def case(call: Callable[[], object], kernel: Callable[[], object]) -> Calls:
            methods: Calls = {TRITON: by_triton(call), LAUNCH: kernel, OURS: call}
            for method in methods.values():
                method(), method()
            return methods

        x, lam, rows = torch.randn(1, SIZE).bfloat16(), torch.tensor([0.3]), (torch.tensor([0.3]), None, 1)
        for format in FORMATS:
            weight = random(SIZE, SIZE, format=format)
            operands = x, list(weight.tensors), [], *rows, format, False
            yield (
                f"{GPU}linear {format}",
                case(partial(lerp_linear, x, weight, lam), partial(triton.lerp_linear, *operands)),
            )
        weight, long = random(SIZE, 2048, format="w8d4"), torch.randn(1, 2048).bfloat16()
        operands = long, list(weight.tensors), [], *rows, "w8d4", False
        yield (
            f"{GPU}linear w8d4, K in four parts",
            case(partial(lerp_linear, long, weight, lam), partial(triton.lerp_linear, *operands)),
        )
        weight, norm = random(SIZE, SIZE), random(SIZE)
        operands = x, list(weight.tensors) * 3, [], *rows, "pair", False
        yield (
            f"{GPU}linears",
            case(partial(lerp_linears, x, [weight] * 3, lam), partial(triton.lerp_linears, *operands)),
        )
        experts, offsets = random(4, SIZE, SIZE), torch.tensor([0, 1, 1, 1], dtype=torch.int32)
        yield (
            f"{GPU}experts",
            case(
                partial(lerp_experts, x, experts, lam, offsets),
                partial(triton.lerp_experts, x, list(experts.tensors), [], *rows, offsets, "pair", False),
            ),
        )
        ids = torch.tensor([7])
        yield (
            f"{GPU}embedding",
            case(
                partial(lerp_embedding, ids, weight, lam),
                partial(triton.lerp_embedding, ids, list(weight.tensors), *rows, "pair", weight.dtype, SIZE),
            ),
        )
        yield (
            f"{GPU}rms_norm",
            case(
                partial(lerp_rms_norm, x, norm, lam),
                partial(triton.lerp_rms_norm, x, list(norm.tensors), *rows, 1e-6, 0.0),
            ),
        )
        yield (
            f"{GPU}layer_norm",
            case(
                partial(lerp_layer_norm, x, norm, lam, norm),
                partial(triton.lerp_layer_norm, x, list(norm.tensors), list(norm.tensors), *rows, 1e-5),
            ),
        )
        yield GPU_STEPS, launch_steps(x, weight, lam)


def random(*shape: int, format: str = "pair") -> LerpWeight:
    base = torch.randn(shape)
    return LerpWeight.pack(base.bfloat16(), (base + 0.1 * torch.randn(shape)).bfloat16(), format)


def launch_steps(x: Tensor, weight: LerpWeight, lam: Tensor) -> Calls:
    """Returns a whole call on a GPU, and parts of it that can be called alone."""
    arguments = (x, weight.tensors, (), lam, None, None, weight.format, SIZE, False)
    operands = (x, (weight.tensors,), None, lam, None)
    launching.forget()
    y = lerp_linear(x, weight, lam)
    ((step, *_),) = launching._calls.values()
    facts = partial(launching._C.facts, launching.DEVICE_TYPE, False, operands)
    _, addresses = facts()
    (launch,) = step.launches
    return {
        "whole": partial(lerp_linear, x, weight, lam),
        "is anybody watching?": library.is_eager,
        "from Python on": partial(direct.lerp_linear, False, x, weight, lam),
        "look-up and launch": partial(gpu_calls.linears, False, *arguments),
        "what the operands are": facts,
        "what Triton's state is": upstream.triton_state,
        "output and launch": partial(step.run, addresses, step.y),
        "an empty tensor": partial(torch.empty_like, y),
        "Triton's compiled launcher": partial(
            launch.launch, *launch.grid, 0, *launch.kernel, *addresses, y.data_ptr(), *launch.others
        ),
    }
