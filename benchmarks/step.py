"""Times one decoder step of a model of Qwen3-4B's shapes, with random weights and a λ of its own for every row.

Everything but attention is there: the embedding, the norms, all linear layers, activations, residuals and the head, on
one new token for each row. Attention costs the same whatever the weights are; the queries pass in its place.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import lams, measure
from benchmarks.check import check
from benchmarks.machine import Machine
from benchmarks.measure import DTYPES, Method
from benchmarks.weights import KERNEL_FORMATS, Copies, split
from dami_kernels import LerpWeight, lerp_embedding, lerp_linear, lerp_linears, lerp_rms_norm, reference

MODEL = "Qwen3-4B"
HIDDEN, INNER, VOCABULARY, LAYERS = 2560, 9728, 151936, 36
HEADS, KEY_HEADS, HEAD = 32, 8, 128
EPS = 1e-6
CHECKED_VOCABULARY = 4096  # number of logits that are checked


@dataclass(frozen=True)
class Layer:
    """The weights of a decoder layer. In plain models, `qkv` and `gate_up` have one fused weight."""

    qkv: list[LerpWeight]
    o: LerpWeight
    gate_up: list[LerpWeight]
    down: LerpWeight
    norms: tuple[LerpWeight, LerpWeight, LerpWeight, LerpWeight]  # before attention, of queries, of keys, after it


@dataclass(frozen=True, eq=False)
class Model:
    layers: list[Layer]
    norm: LerpWeight
    embedding: LerpWeight  # and the head


class Operators(Protocol):
    """The operators that a step consists of."""

    def embed(self, ids: Tensor, weight: LerpWeight) -> Tensor: ...

    def norm(self, x: Tensor, weight: LerpWeight) -> Tensor: ...

    def linear(self, x: Tensor, weight: LerpWeight) -> Tensor: ...

    def linears(self, x: Tensor, weights: list[LerpWeight]) -> tuple[Tensor, ...]: ...


def step(ops: Operators, model: Model, ids: Tensor) -> Tensor:
    """Returns the logits [M, vocabulary] of one token for each of M rows."""
    rows = len(ids)
    x = ops.embed(ids, model.embedding)
    for layer in model.layers:
        before, of_queries, of_keys, after = layer.norms
        q, k, _ = ops.linears(ops.norm(x, before), layer.qkv)
        q = ops.norm(q.unflatten(1, (HEADS, HEAD)), of_queries)
        ops.norm(k.unflatten(1, (KEY_HEADS, HEAD)), of_keys)
        x = x + ops.linear(q.reshape(rows, HEADS * HEAD), layer.o)
        gate, up = ops.linears(ops.norm(x, after), layer.gate_up)
        x = x + ops.linear(F.silu(gate) * up, layer.down)
    return ops.linear(ops.norm(x, model.norm), model.embedding)


class Ours:
    """The operators, one λ for each row."""

    def __init__(self, lam: Tensor) -> None:
        self.lam = lam

    def embed(self, ids: Tensor, weight: LerpWeight) -> Tensor:
        return lerp_embedding(ids, weight, self.lam)

    def norm(self, x: Tensor, weight: LerpWeight) -> Tensor:
        return lerp_rms_norm(x, weight, self.lam, EPS, rows_per_lam=x.shape[1:-1].numel())

    def linear(self, x: Tensor, weight: LerpWeight) -> Tensor:
        return lerp_linear(x, weight, self.lam)

    def linears(self, x: Tensor, weights: list[LerpWeight]) -> tuple[Tensor, ...]:
        return lerp_linears(x, weights, self.lam)


class OneEnd:
    """Plain PyTorch on one end of a pair (0 base, 1 target), which stands in for a merged model."""

    def __init__(self, end: int) -> None:
        self.end = end

    def embed(self, ids: Tensor, weight: LerpWeight) -> Tensor:
        return F.embedding(ids, weight.tensors[self.end])

    def norm(self, x: Tensor, weight: LerpWeight) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight.tensors[self.end], EPS)

    def linear(self, x: Tensor, weight: LerpWeight) -> Tensor:
        return F.linear(x, weight.tensors[self.end])

    def linears(self, x: Tensor, weights: list[LerpWeight]) -> tuple[Tensor, ...]:
        """Computes one product, because the weights are adjacent in memory."""
        sizes = [weight.shape[0] for weight in weights]
        first = weights[0].tensors[self.end]
        fused = first.as_strided((sum(sizes), first.shape[1]), first.stride())
        return F.linear(x, fused).split(sizes, 1)


class Oracle:
    """The step in float64."""

    def __init__(self, lam: Tensor) -> None:
        self.lam = lam

    def embed(self, ids: Tensor, weight: LerpWeight) -> Tensor:
        return reference.lerp_embedding(ids, weight.unpack(), self.lam)

    def norm(self, x: Tensor, weight: LerpWeight) -> Tensor:
        lam = self.lam.reshape(-1, *[1] * (x.dim() - 2))
        return reference.lerp_rms_norm(x, weight.unpack(), lam, EPS)

    def linear(self, x: Tensor, weight: LerpWeight) -> Tensor:
        return reference.lerp_linear(x, weight.unpack(), self.lam)

    def linears(self, x: Tensor, weights: list[LerpWeight]) -> tuple[Tensor, ...]:
        return tuple(self.linear(x, weight) for weight in weights)


class Merged(Oracle):
    """Plain PyTorch on weights that are merged for a single row."""

    def embed(self, ids: Tensor, weight: LerpWeight) -> Tensor:
        return super().embed(ids, weight).to(weight.dtype)

    def norm(self, x: Tensor, weight: LerpWeight) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight.materialize(self.lam.item()), EPS)

    def linear(self, x: Tensor, weight: LerpWeight) -> Tensor:
        return F.linear(x, weight.materialize(self.lam.item()))


@cache
def check_step(model: Model, device: torch.device, rows: int) -> None:
    """Checks the operators' contract for a whole step of `rows` rows: on two rows, with the first layer and part of
    the vocabulary."""
    known, _ = split(model.embedding, [CHECKED_VOCABULARY, VOCABULARY - CHECKED_VOCABULARY])
    model = Model(model.layers[:1], model.norm, known)
    ids = torch.randint(CHECKED_VOCABULARY, (rows,), device=device)
    lam = torch.linspace(0.1, 0.9, rows, device=device)
    sample = torch.tensor(sorted({0, rows - 1}), device=device)
    y = step(Ours(lam), model, ids)[sample]
    ids, lam = ids[sample], lam[sample]
    plain = torch.cat([step(Merged(lam[i : i + 1]), model, ids[i : i + 1]) for i in range(len(sample))])
    check(y, step(Oracle(lam), model, ids), plain, 1.2)


@dataclass(frozen=True)
class Case:
    """A batch of rows, one new token each."""

    layers: int
    rows: int

    def columns(self) -> dict[str, object]:
        return {"model": MODEL, "layers": self.layers, "m": self.rows, "lam": "distinct"}

    def __str__(self) -> str:
        return f"a step of {self.layers} of {LAYERS} layers of {MODEL}, and its head, M={self.rows}"


def main(argv: list[str] | None = None) -> int:
    parser = measure.parser("step", __doc__)
    parser.add_argument("--rows", "-m", type=int, nargs="+", default=[1, 16, 64], metavar="M", help="sequences")
    parser.add_argument("--layers", type=int, default=LAYERS if torch.cuda.is_available() else 2)
    options = parser.parse_args(argv)
    if options.compile_only:
        options.layers = 1  # the other layers use the same kernels
    models: dict[str, Model] = {}

    def prepare(case: Case, here: Machine) -> tuple[list[Method], int]:
        if not models:
            models.update(random_models(case.layers, DTYPES[options.dtype], here.device, options.formats))
        lam = lams.make("distinct", case.rows).lam.to(here.device)
        ids = torch.randint(VOCABULARY, (case.rows,), device=here.device)
        return list(methods(models, ids, lam, DTYPES[options.dtype])), 1

    return measure.run("step.csv", options, cases(options), prepare)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    return (Case(options.layers, rows) for rows in options.rows)


def random_models(layers: int, dtype: torch.dtype, device: torch.device, formats: list[str]) -> dict[str, Model]:
    """Creates a model per format, sharing bases. `pair` is always included, as its ends are the plain models."""
    formats = [format for format in {"pair": 0, **dict.fromkeys(formats)} if format in KERNEL_FORMATS]

    def weights(n: int, k: int) -> dict[str, LerpWeight]:
        return {format: only for format, (only,) in Copies((n, k), dtype, device, formats, 1).weights.items()}

    def norm(d: int) -> LerpWeight:
        ends = (1 + spread * torch.randn(d, device=device) for spread in (0.1, 0.11))
        return LerpWeight.pack(*(end.to(dtype) for end in ends))

    heads = [HEADS * HEAD, KEY_HEADS * HEAD, KEY_HEADS * HEAD]
    built: dict[str, list[Layer]] = {format: [] for format in formats}
    for _ in range(layers):
        qkv, o = weights(sum(heads), HIDDEN), weights(HIDDEN, HEADS * HEAD)
        gate_up, down = weights(2 * INNER, HIDDEN), weights(HIDDEN, INNER)
        norms = norm(HIDDEN), norm(HEAD), norm(HEAD), norm(HIDDEN)
        for format, layer in built.items():
            two = split(gate_up[format], [INNER, INNER])
            layer.append(Layer(split(qkv[format], heads), o[format], two, down[format], norms))
    embedding, last = weights(VOCABULARY, HIDDEN), norm(HIDDEN)
    return {format: Model(built[format], last, embedding[format]) for format in formats}


def methods(models: dict[str, Model], ids: Tensor, lam: Tensor, dtype: torch.dtype) -> Iterator[Method]:
    rows = len(ids)

    def linear_bytes(model: Model) -> int:
        of_layers = (w.nbytes for layer in model.layers for w in (*layer.qkv, layer.o, *layer.gate_up, layer.down))
        return sum(of_layers) + model.embedding.nbytes

    plain = models["pair"]
    merged_bytes = linear_bytes(plain) // 2
    operations = rows * merged_bytes // dtype.itemsize * 2

    def ours(format: str) -> Method:
        model = models[format]
        return Method(
            "lerp",
            format,
            lambda i: step(Ours(lam), model, ids),
            linear_bytes(model),
            2 * operations,
            dtype,
            lambda _: check_step(model, ids.device, rows),
            is_eager=True,
        )

    yield from map(ours, models)
    base = OneEnd(0)
    merged = Method("one merged model", "", lambda i: step(base, plain, ids), merged_bytes, operations, dtype)
    yield replace(merged, is_eager=True)
    if rows > 1:  # the cost of two λ in a batch with merged copies
        halves = ids.chunk(2)
        yield replace(
            merged,
            name="two merged models, half of the rows each",
            call=lambda i: [step(OneEnd(end), plain, half) for end, half in enumerate(halves)],
            moved=2 * merged_bytes,
        )
