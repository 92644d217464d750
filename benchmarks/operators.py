"""Times what is bound by memory at any size, or nearly so: the embedding, the norms, and the experts of a layer.

What counts is the last column: the least time that the memory's bandwidth allows, as a share of the median.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.check import check, check_linear
from benchmarks.machine import Machine
from benchmarks.measure import DTYPES, Method
from benchmarks.shapes import EXPERT_LAYERS, EXPERTS, EXPERTS_PER_TOKEN, LAYERS
from benchmarks.weights import Copies
from dami_kernels import LerpWeight, formats, lerp_embedding, lerp_experts, lerp_layer_norm, lerp_rms_norm, reference

VOCABULARY = LAYERS["Qwen3-4B"]["lm_head"]
HEADS = (32, 128)  # query heads of Qwen3-4B, each normalised separately
EPS = 1e-6
COPIES = 8  # of ids, x and routings, used in rotation, so that caches do not hold what a call needs
DECODE = 64  # most tokens for which the host's share of a call is measured


@dataclass(frozen=True)
class Case:
    """An operator on some tokens, each with its own λ. `shape` is that of the weight."""

    operator: str
    shape: tuple[int, ...]
    tokens: int

    @property
    def is_decode(self) -> bool:
        return self.tokens <= DECODE

    def columns(self) -> dict[str, object]:
        return {"operator": self.operator, "shape": "x".join(map(str, self.shape)), "m": self.tokens, "lam": "distinct"}

    def __str__(self) -> str:
        return f"{self.operator}, weight {list(self.shape)}, {self.tokens} tokens"


def main(argv: list[str] | None = None) -> int:
    parser = measure.parser("operators", __doc__)
    parser.add_argument("--rows", "-m", type=int, nargs="+", default=[1, 16], metavar="M", help="tokens")
    parser.add_argument("--operators", nargs="+", choices=PREPARE, default=list(PREPARE), metavar="OPERATOR")
    options = parser.parse_args(argv)
    dtype = DTYPES[options.dtype]
    weights = measure.SingleEntryCache(lambda shape, here: Copies(shape, dtype, here.device, options.formats, 1))

    def prepare(case: Case, here: Machine) -> tuple[list[Method], int]:
        lam = torch.rand(case.tokens, device=here.device)
        return list(PREPARE[case.operator](case, here, dtype, lam, weights)), COPIES

    return measure.run("operators.csv", options, cases(options), prepare)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    d = VOCABULARY[1]
    shapes = {
        "experts": [(EXPERTS, *shape) for shape in EXPERT_LAYERS.values()],
        "embedding": [VOCABULARY],
        "rms_norm": [(d,), (HEADS[1],)],
        "layer_norm": [(d,)],
    }
    for operator in options.operators:
        for shape in shapes[operator]:
            yield from (Case(operator, shape, tokens) for tokens in options.rows)


def embedding(
    case: Case, here: Machine, dtype: torch.dtype, lam: Tensor, weights: Callable[..., Copies]
) -> Iterator[Method]:
    vocabulary, d = case.shape
    of = weights(case.shape, here)
    ids = [torch.randint(vocabulary, (case.tokens,), device=here.device) for _ in range(COPIES)]
    out = case.tokens * d * dtype.itemsize

    def method(weight: LerpWeight) -> Method:
        def right(y: Tensor) -> None:
            base, target = (end.float() for end in weight_rows(weight, ids[0]))
            oracle = reference.lerp_embedding(torch.arange(case.tokens, device=here.device), (base, target), lam)
            check(y, oracle, torch.lerp(base, target, lam.unsqueeze(1)).to(dtype))

        return Method(
            "lerp_embedding",
            weight.format,
            lambda i: lerp_embedding(ids[i % COPIES], weight, lam),
            case.tokens * weight.nbytes // vocabulary + out,
            0,
            dtype,
            right,
            is_eager=case.is_decode,
        )

    yield from (method(copies[0]) for copies in of.weights.values())
    one = of.merged()[0]
    yield Method(
        "F.embedding, one merged",
        "",
        lambda i: F.embedding(ids[i % COPIES], one),
        2 * out,
        0,
        dtype,
        None,
        case.is_decode,
    )


def weight_rows(weight: LerpWeight, rows: Tensor) -> tuple[Tensor, Tensor]:
    return formats.get(weight.format).unpack(*weight.tensors, columns=weight.shape[-1], rows=rows)


def norm(
    case: Case, here: Machine, dtype: torch.dtype, lam: Tensor, weights: Callable[..., Copies]
) -> Iterator[Method]:
    """Returns both norms. The norm of the heads has several rows per token."""
    (d,) = case.shape
    heads = HEADS[0] if d == HEADS[1] else 1
    xs = [torch.randn(case.tokens, heads, d, device=here.device).to(dtype) for _ in range(COPIES)]
    ends = [(1 + spread * torch.randn(d, device=here.device)).to(dtype) for spread in (0.1, 0.11)]
    weight = LerpWeight.pack(*ends)
    moved = 2 * xs[0].nbytes + weight.nbytes
    if case.operator == "rms_norm":
        ours, oracle, plain = lerp_rms_norm, reference.lerp_rms_norm, F.rms_norm
    else:
        ours, oracle, plain = lerp_layer_norm, reference.lerp_layer_norm, F.layer_norm  # type: ignore[assignment]

    def call(i: int) -> Tensor:
        return ours(xs[i % COPIES], weight, lam, eps=EPS, rows_per_lam=heads)

    def right(y: Tensor) -> None:
        exact = oracle(xs[0], (ends[0], ends[1]), lam.unsqueeze(1), EPS)
        check(y, exact, exact.to(dtype))  # allows only the final rounding

    yield Method(f"lerp_{case.operator}", "pair", call, moved, 0, dtype, right, is_eager=case.is_decode)
    name = f"F.{case.operator}, one merged"
    yield Method(
        name, "", lambda i: plain(xs[i % COPIES], (d,), ends[0], eps=EPS), moved, 0, dtype, None, case.is_decode
    )


def experts(
    case: Case, here: Machine, dtype: torch.dtype, lam: Tensor, weights: Callable[..., Copies]
) -> Iterator[Method]:
    """Returns the experts case. Every token takes eight random experts, so it has eight rows."""
    count, n, k = case.shape
    of = weights(case.shape, here)
    routings = [routing(case.tokens) for _ in range(COPIES)]
    hit = sum(int((offsets.diff(prepend=offsets.new_zeros(1)) > 0).sum()) for offsets, _ in routings) / COPIES
    routings = [(offsets.to(here.device), token.to(here.device)) for offsets, token in routings]
    rows = case.tokens * EXPERTS_PER_TOKEN
    x = torch.randn(rows, k, device=here.device).to(dtype)
    activations = rows * (n + k) * dtype.itemsize
    product = 2 * rows * n * k

    def method(weight: LerpWeight) -> Method:
        def call(i: int) -> Tensor:
            offsets, row_to_lam = routings[i % COPIES]
            return lerp_experts(x, weight, lam, offsets, row_to_lam=row_to_lam)

        def right(y: Tensor) -> None:
            offsets, row_to_lam = routings[0]
            per_row, start = lam[row_to_lam], 0
            for expert, end in enumerate(offsets.tolist()):
                if end > start:
                    one = LerpWeight(
                        tuple(tensor[expert] for tensor in weight.tensors), weight.format, torch.Size((n, k)), dtype
                    )
                    check_linear(y[start:end], x[start:end], one, per_row[start:end])
                start = end

        moved = int(hit * weight.nbytes / count) + activations
        return Method("lerp_experts", weight.format, call, moved, 2 * product, dtype, right, is_eager=case.is_decode)

    yield from (method(copies[0]) for copies in of.weights.values())
    base, target = (end.transpose(1, 2) for end in of.ends[0])
    one_weight = int(hit * n * k * dtype.itemsize)

    def merged(i: int) -> Tensor:
        return F.grouped_mm(x, base, offs=routings[i % COPIES][0])

    def two(i: int) -> Tensor:
        offsets, row_to_lam = routings[i % COPIES]
        ys = (F.grouped_mm(x, end, offs=offsets) for end in (base, target))
        return torch.lerp(*ys, lam[row_to_lam].unsqueeze(1).to(dtype))

    yield Method("F.grouped_mm, one merged", "", merged, one_weight + activations, product, dtype)
    yield Method("two F.grouped_mm + lerp", "", two, 2 * one_weight + activations, 2 * product, dtype)


def routing(tokens: int) -> tuple[Tensor, Tensor]:
    """Chooses random experts. Returns the ends of the experts' rows, int32 [E], and the rows' tokens, int32 [rows]."""
    chosen = torch.rand(tokens, EXPERTS).argsort(1)[:, :EXPERTS_PER_TOKEN].flatten()
    offsets = chosen.bincount(minlength=EXPERTS).cumsum(0)
    token = chosen.argsort(stable=True) // EXPERTS_PER_TOKEN
    return offsets.int(), token.int()


PREPARE = {"experts": experts, "embedding": embedding, "rms_norm": norm, "layer_norm": norm}
