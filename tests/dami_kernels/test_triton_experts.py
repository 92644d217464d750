"""What is particular to the Triton kernel of `lerp_experts`: which tile a program takes, and tiles of every kind.

On a GPU (`-m gpu`) these tests run the compiled kernel. Without one, test_triton.py runs them in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from dami_kernels import LerpWeight, reference  # noqa: E402
from dami_kernels.triton import lerp_experts  # noqa: E402
from dami_kernels.triton.experts import _tile_of_expert, row_tiles  # noqa: E402
from dami_kernels.tuning import LinearConfig  # noqa: E402
from tests.dami_kernels.test_experts import ends_of, expert_of_row, merged, pack  # noqa: E402
from tests.marks import slow  # noqa: E402
from tests.tolerance import assert_as_accurate  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
pytestmark = [] if INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
two_formats = pytest.mark.parametrize("format", ["pair", "w8d4", *slow("int8", "int4")])
both_paths = pytest.mark.parametrize("use_blend", [False, True], ids=["two accumulators", "blend"])


def on_device(weight: LerpWeight) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in weight.tensors]


def run(x: Tensor, weight: LerpWeight, lam: Tensor, counts: tuple[int, ...], bias: LerpWeight | None = None) -> Tensor:
    """The kernel on operands that are on the CPU, with λ per row."""
    biases = on_device(bias) if bias else []
    rows = (lam.to(DEVICE), None, 1, ends_of(counts).to(DEVICE))
    return lerp_experts(x.to(DEVICE), on_device(weight), biases, *rows, weight.format, False).cpu()


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the kernel run with tiles of 16 by 16 by 32, and the rest as given."""

    def use(split_k: int = 1, use_blend: bool = False, block_m: int = 16) -> None:
        config = LinearConfig(block_m, 16, 32, block_m, split_k, use_blend, num_warps=4, num_stages=2)
        monkeypatch.setattr("dami_kernels.triton.experts.experts_config", lambda *_: config)

    return use


@triton.jit
def _every_tile_kernel(offsets, found, M, E, BLOCK_M: tl.constexpr, SEGMENTS: tl.constexpr):  # type: ignore[no-untyped-def]
    pid = tl.program_id(0)
    expert, row, end = _tile_of_expert(offsets, pid, M, E, BLOCK_M, SEGMENTS)
    tl.store(found + pid * 3, expert)
    tl.store(found + pid * 3 + 1, row)
    tl.store(found + pid * 3 + 2, end)


def tiles_by_hand(counts: tuple[int, ...], left: int, block_m: int) -> list[tuple[int, int, int]]:
    """(expert, first row, where its rows end) of every tile; what is left is the expert after the last one's."""
    tiles, begin = [], 0
    for expert, count in enumerate((*counts, left)):
        tiles += [(expert, row, begin + count) for row in range(begin, begin + count, block_m)]
        begin += count
    return tiles


def assert_finds_every_tile(counts: tuple[int, ...], left: int, block_m: int) -> None:
    E, M = len(counts), sum(counts) + left
    programs = row_tiles(M, E, block_m)
    expected = tiles_by_hand(counts, left, block_m)
    assert len(expected) <= programs
    found = torch.full((programs, 3), -1, dtype=torch.int32, device=DEVICE)
    segments = 1 << E.bit_length()
    _every_tile_kernel[programs,](ends_of(counts).to(DEVICE), found, M, E, BLOCK_M=block_m, SEGMENTS=segments)
    assert [tuple(tile) for tile in found[: len(expected)].tolist()] == expected
    assert all(expert == segments for expert in found[len(expected) :, 0].tolist())


@settings(deadline=None, max_examples=15)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=9).map(tuple),
    left=st.integers(0, 40),
    block_m=st.sampled_from([16, 32]),
)
def test_programs_find_every_tile_once(counts: tuple[int, ...], left: int, block_m: int) -> None:
    assert_finds_every_tile(counts, left, block_m)


def test_programs_find_every_tile_of_512_experts() -> None:
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 3, (512,), generator=generator) * torch.randint(0, 30, (512,), generator=generator)
    assert_finds_every_tile(tuple(counts[:511].tolist()), left=5, block_m=128)
    assert_finds_every_tile((0,) * 511 + (1,), left=0, block_m=16)


def test_there_are_as_many_programs_as_the_worst_offsets_need() -> None:
    """A row each for all experts but one, or for what is left: so many tiles there are, and no more."""
    for rows in range(1, 70):
        for experts in range(1, 9):
            lone = min(experts, rows - 1)
            counts = (1,) * lone + (0,) * (experts - lone)
            assert row_tiles(rows, experts, 16) == len(tiles_by_hand(counts, rows - lone, 16))


@two_formats
@both_paths
@pytest.mark.parametrize("split_k", [1, 4], ids=["", "split"])
def test_every_kind_of_tile(planned: Callable[..., None], format: str, use_blend: bool, split_k: int) -> None:
    """Experts whose rows are all base, all target, of one λ, all different, or nothing; the last have a second tile."""
    counts = (16, 5, 0, 18, 19)
    lam = torch.cat((torch.zeros(16), torch.ones(5), torch.full((18,), 0.3), torch.linspace(-0.5, 1.5, 19)))
    weight, bias = (
        pack(5, 21, 70, dtype=torch.bfloat16, format=format, distance=0.3),
        pack(5, 21, dtype=torch.bfloat16),
    )
    x = torch.randn(len(lam), 70).bfloat16()
    planned(split_k, use_blend)
    y = run(x, weight, lam, counts, bias)
    oracle = reference.lerp_experts(x, weight.unpack(), lam, expert_of_row(counts), bias.unpack())
    plain = merged(x, weight, lam, counts, bias)
    for rows in torch.arange(len(lam)).split(counts):
        assert_as_accurate(y[rows], oracle[rows], plain[rows])


@pytest.mark.parametrize(
    ("dtype", "format", "counts", "sizes"),
    [
        (torch.bfloat16, "pair", (130, 3, 70), (70, 33)),
        (torch.float16, "w8d4", (1, 0, 1), (130, 160)),
        (torch.float32, "int4", (1, 40), (20, 96)),
    ],
    ids=str,
)
def test_the_plan_s_own_tiles(dtype: torch.dtype, format: str, counts: tuple[int, ...], sizes: tuple[int, int]) -> None:
    """Prefill, where tiles blend, decode, and float32; one λ for the first rows and several for the others."""
    weight, x = pack(len(counts), *sizes, dtype=dtype, format=format), torch.randn(sum(counts), sizes[1]).to(dtype)
    lam = torch.full((len(x),), 0.3)
    lam[131:] = torch.rand(len(lam[131:]))
    oracle = reference.lerp_experts(x, weight.unpack(), lam, expert_of_row(counts))
    assert_as_accurate(run(x, weight, lam, counts), oracle, merged(x, weight, lam, counts))


@both_paths
def test_a_nan_lam_stays_in_its_row(planned: Callable[..., None], use_blend: bool) -> None:
    """Wherever in its tile it is; its neighbours are blended otherwise then, not worse."""
    counts = (20, 12)
    weight, x, lam = pack(2, 16, 40), torch.randn(32, 40), torch.full((32,), 0.3)
    planned(use_blend=use_blend)
    expected = run(x, weight, lam, counts)
    for bad in (0, 15, 19, 20):
        with_nan = lam.clone()
        with_nan[bad] = torch.nan
        y = run(x, weight, with_nan, counts)
        others = torch.arange(32) != bad
        assert y[bad].isnan().all()
        torch.testing.assert_close(y[others], expected[others], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_split_is_the_same_every_time(planned: Callable[..., None]) -> None:
    counts, dtype = (3, 0, 18), torch.bfloat16
    weight, bias, x, lam = pack(3, 21, 150, dtype=dtype), pack(3, 21, dtype=dtype), torch.randn(21, 150), torch.rand(21)
    planned(split_k=4)
    y = run(x.to(dtype), weight, lam, counts, bias)
    assert all(torch.equal(y, run(x.to(dtype), weight, lam, counts, bias)) for _ in range(2))


@pytest.mark.parametrize("split_k", [1, 4], ids=["", "split"])
def test_rows_after_the_last_expert_s_are_zero(planned: Callable[..., None], split_k: int) -> None:
    """Several tiles of them, of NaN and with λ of NaN."""
    weight, bias, x, lam = pack(2, 21, 150), pack(2, 21), torch.randn(60, 150), torch.rand(60)
    x[20:], lam[20:] = torch.nan, torch.nan
    planned(split_k)
    y = run(x, weight, lam, (3, 17), bias)
    assert y[:20].isfinite().all()
    assert y[:20].count_nonzero() == y[:20].numel()
    assert torch.equal(y[20:], torch.zeros(40, 21))


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter can be asked what was read")
def test_only_what_is_needed_is_read(planned: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an expert at λ=0 the base alone, at λ=1 the target alone, and nothing of one without rows."""
    from triton.runtime.interpreter import InterpreterBuilder

    read: list[int] = []
    load = InterpreterBuilder.create_masked_load

    def recording(builder: InterpreterBuilder, pointers: Any, mask: Any, *options: Any) -> Any:
        read.extend(np.broadcast_to(pointers.data, mask.data.shape)[mask.data].tolist())
        return load(builder, pointers, mask, *options)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", recording)
    weight = pack(4, 16, 40)
    planned()
    run(torch.randn(9, 40), weight, torch.tensor([0.0] * 3 + [1.0] * 4 + [0.5] * 2), (3, 4, 0, 2))
    addresses = torch.tensor(read)
    counts = [[int(((addresses - e.data_ptr()) // e.nbytes == 0).sum()) for e in end] for end in weight.tensors]
    assert counts == [[640, 0, 0, 640], [0, 640, 0, 640]]


def test_offsets_beyond_32_bits() -> None:
    """Experts that start 2³¹ elements and more into their tensor."""
    stride = 2**30 + 8
    memory = np.zeros(stride * 2 + 5 * 40, np.int16)  # of which only the pages that are written to exist
    data = torch.from_numpy(memory).to(DEVICE).view(torch.bfloat16)
    weight = data.as_strided((3, 5, 40), (stride, 40, 1)).copy_(torch.randn(3, 5, 40))
    x, lam = torch.randn(4, 40, dtype=torch.bfloat16, device=DEVICE), torch.rand(4, device=DEVICE)
    rest = ([], lam, None, 1, ends_of((1, 1, 2)).to(DEVICE), "pair", False)
    assert torch.equal(lerp_experts(x, [weight] * 2, *rest), lerp_experts(x, [weight.contiguous()] * 2, *rest))


@two_formats
def test_invariant(format: str) -> None:
    """A row alone, and among so many rows that another plan would be taken: the same bits."""
    counts = (150, 30)
    weight, x, lam = pack(2, 20, 70, dtype=torch.bfloat16, format=format), torch.randn(180, 70), torch.full((180,), 0.3)
    lam[100:120] = torch.tensor([0.0, 1.0]).repeat(10)
    x, tensors = x.bfloat16().to(DEVICE), on_device(weight)

    def invariant(rows: slice, counts: tuple[int, ...]) -> Tensor:
        arguments = (lam[rows].to(DEVICE), None, 1, ends_of(counts).to(DEVICE), format, True)
        return lerp_experts(x[rows], tensors, [], *arguments)

    y = invariant(slice(None), counts)
    for row in (0, 101, 102, 149):
        assert torch.equal(invariant(slice(row, row + 1), (1, 0))[0], y[row])
    assert torch.equal(invariant(slice(150, 180), (0, 30)), y[150:])
