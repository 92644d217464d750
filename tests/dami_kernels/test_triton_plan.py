"""The heuristics, for every linear of the models in the benchmarks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dami_kernels.tuning import (
    H100,
    Device,
    LinearConfig,
    LinearEntry,
    device_of,
    linear_candidates,
    linear_config,
    load_table,
    row_config,
    row_span,
    save_table,
    table_path,
)

DEVICES = {  # A100 SXM, H100 SXM, B200, MI300X, RTX 4090
    "sm_80": Device("sm_80", processors=108, shared=166912),
    "sm_90": H100,
    "sm_100": Device("sm_100", processors=148, shared=232448),
    "gfx942": Device("gfx942", processors=304, shared=65536),
    "sm_89": Device("sm_89", processors=128, shared=101376),
}
# (N, K) of q, k, o, gate, down, the head, and of qkv and gate/up fused.
MODELS = {
    "Qwen3-4B": [
        *[(4096, 2560), (1024, 2560), (2560, 4096), (9728, 2560), (2560, 9728), (151936, 2560)],
        *[(6144, 2560), (19456, 2560)],
    ],
    "Qwen3-30B-A3B": [(4096, 2048), (512, 2048), (2048, 4096), (128, 2048), (151936, 2048), (5120, 2048)],
    "Llama-3.1-8B": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096), (6144, 4096)],
    "SmolLM2-135M": [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576), (960, 576), (3072, 576)],
}
SHAPES = [*sorted({shape for shapes in MODELS.values() for shape in shapes}), (4097, 2561), (1, 1), (50257, 1000)]
ROWS = [*range(1, 19), 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 512, 1000, 1024, 2048, 4096, 16384]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def plan(M: int, N: int, K: int, dtype: torch.dtype = torch.bfloat16, device: Device = H100) -> LinearConfig:
    return linear_config(M, N, K, dtype, "pair", device)


def programs(config: LinearConfig, M: int, N: int) -> int:
    return -(-M // config.block_m) * -(-N // config.block_n) * config.split_k


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_are_legal(dtype: torch.dtype, device: Device) -> None:
    for M, (N, K) in itertools.product(ROWS, SHAPES):
        config = plan(M, N, K, dtype, device)
        sizes = (config.block_m, config.block_n, config.block_k, config.split_k, config.num_warps)
        assert all(size & (size - 1) == 0 for size in sizes), config
        assert min(config.block_m, config.block_n, config.block_k) >= 16, config  # what tl.dot takes at least
        stage = (config.block_m + 2 * config.block_n) * config.block_k * dtype.itemsize
        assert config.num_stages >= 2, config
        assert stage * (1 if device.is_amd else config.num_stages) <= device.shared, config
        threads = config.num_warps * (64 if device.is_amd else 32)
        assert config.block_m * config.block_n <= 128 * threads, config
        assert 2 * config.mixed_m * config.block_n <= 128 * threads, config  # half its registers hold accumulators
        # Splits of this many steps each cover K, and none of them is empty but by rounding.
        steps = -(-K // (config.block_k * config.split_k))
        assert steps * config.block_k * config.split_k >= K
        assert config.split_k == 1 or steps >= 4, config


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_the_device_has_work(device: Device) -> None:
    """Three quarters of the processors, unless the smallest tile and the shortest splits give no more programs."""
    for M, (N, K) in itertools.product(ROWS, SHAPES):
        config = plan(M, N, K, device=device)
        if programs(config, M, N) < device.processors * 3 // 4:
            assert -(-K // (config.block_k * config.split_k * 2)) <= 4, (M, N, K, config)


def test_every_number_of_rows() -> None:
    """One shape at every M: a tile never has more rows than it must, and there are few kernels to compile."""
    configs = {M: plan(M, 4096, 2560) for M in range(1, 16385)}
    for M, config in configs.items():
        assert config.block_m <= max(16, 2 * M - 1)
        assert config.use_blend == (config.block_m < M)
    assert len(set(configs.values())) <= 9


def test_a_decode_step_reads_the_weights_once() -> None:
    for M, (N, K) in itertools.product(range(1, 129), SHAPES):
        assert plan(M, N, K).block_m >= M


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
@pytest.mark.parametrize("shapes", MODELS.values(), ids=MODELS.keys())
def test_a_model_compiles_few_kernels(shapes: list[tuple[int, int]], device: Device) -> None:
    """However its batches grow and shrink: a compilation takes a second or two of someone's first request."""
    configs = {plan(M, N, K, device=device) for M, (N, K) in itertools.product(ROWS, shapes)}
    assert len({replace(config, split_k=1) for config in configs}) <= 12


@pytest.mark.parametrize("D", [1, 2, 16, 17, 32, 64, 127, 128, 576, 2560, 4096, 4097, 8193, 65536])
def test_rows_are_covered(D: int) -> None:
    config = row_config(D)
    assert config.block_d & (config.block_d - 1) == 0
    assert config.block_d % 32 == 0  # whole groups of codes
    assert config.block_m & (config.block_m - 1) == 0
    assert config.block_d >= D or config.block_d == 8192
    assert config.block_m * config.block_d == 1024 * config.num_warps
    assert 1 <= config.num_warps <= 8


def test_the_interpreter_plays_an_h100() -> None:
    assert device_of(torch.device("cpu")) == H100


def test_every_format_keeps_the_two_sums_of_a_thread_together() -> None:
    for device, M, (N, K) in itertools.product(DEVICES.values(), ROWS, SHAPES):
        for format in ("int8", "int4", "w8d4"):
            config = linear_config(M, N, K, torch.bfloat16, format, device)
            assert config.block_n >= 64
            assert config.block_k % 32 == 0
            assert config.mixed_m <= config.block_m


@pytest.mark.parametrize("M", [257, 1024, 16384])
def test_rows_of_many_lams_take_their_tile_at_once(M: int) -> None:
    """On an H100: a tile that takes 64 rows at a time would go through its weights four times as often."""
    for N, K in SHAPES:
        config = linear_config(M, N, K, torch.bfloat16, "pair", H100, mixes_lams=True)
        assert config.mixed_m == config.block_m <= 128
        assert config.use_blend  # where a tile has one λ after all
        for format in ("int8", "int4", "w8d4"):
            config = linear_config(M, N, K, torch.bfloat16, format, H100, mixes_lams=True)
            assert config.mixed_m == config.block_m or K % 16
            if M == 16384 and K % 16 == 0 and N >= 1024:
                assert (config.block_m, config.block_n) == (256, 64)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_codes_of_few_rows_go_by_group(device: Device) -> None:
    """Whole steps of four groups: up to 16 rows one for each warp; in bfloat16 on sm_90 up to 64, one for each lane.

    With codes at both ends a step has twice as many on sm_90 and sm_100, and on sm_90 9 rows are already taken by lane.
    """
    for M, (N, K), dtype, format in itertools.product(ROWS, SHAPES, DTYPES, ("pair", "int8", "int4", "w8d4")):
        config = linear_config(M, N, K, dtype, format, device)
        is_coded = format != "pair" and dtype != torch.float32 and not device.is_amd
        by_lane = dtype == torch.bfloat16 and device.arch == "sm_90"
        most = 64 if by_lane else 16
        assert config.by_group == (is_coded and K % 128 == 0 and most >= M)
        if config.by_group:
            is_long = format == "w8d4" and device.has_wide_mma
            sizes = (8, 32, 64) if is_long and by_lane else (8, 16, 32, 64)
            assert config.block_m == next(rows for rows in sizes if rows >= M)
            assert config.block_k == (256 if is_long and K % 256 == 0 else 128)
            assert (config.block_n, config.num_warps) in ([(64, 4)] if config.block_m <= 16 else [(64, 4), (128, 8)])
            assert not config.use_blend
        if config.by_group and config.block_m <= 32:
            tiles = -(-N // config.block_n)
            assert tiles * config.split_k >= 2 * device.processors or 8 * config.split_k > K // 128


@pytest.mark.parametrize(("N", "features"), [(4096, 64), (16384, 128), (19456, 64), (151936, 128)])
def test_twice_the_features_are_taken_where_rounds_stay_full(N: int, features: int) -> None:
    """19456 features are 152 tiles of 128: two rounds of 132 processors, of which three do with 64."""
    assert linear_config(64, N, 2560, torch.bfloat16, "w8d4", H100).block_n == features


def test_an_invariant_plan_knows_no_rows() -> None:
    for format, dtype, (N, K) in itertools.product(("pair", "int4"), DTYPES, SHAPES):
        configs = {linear_config(M, N, K, dtype, format, H100, True) for M in ROWS}
        assert len(configs) == 1
        assert not configs.pop().use_blend


@pytest.mark.parametrize(
    ("M", "rows_per_lam", "span"),
    [
        (4096, 1024, 4096),  # tiles end there anyway
        (4000, 1000, 1000),  # one more tile, and three mixed ones less
        (4096, 4096, 4096),
        (4096, 1, 4096),  # λ of every row
        (4096, 128, 4096),  # all tiles mixed by two, which is what tiles half full would cost
        (4160, 160, 160),
    ],
)
def test_tiles_end_where_lam_changes_if_that_costs_less(M: int, rows_per_lam: int, span: int) -> None:
    config = replace(plan(4096, 4096, 2560), block_m=256, use_blend=True)
    assert row_span(M, rows_per_lam, config) == span
    assert row_span(M, rows_per_lam, replace(config, use_blend=False)) == M


@pytest.mark.parametrize("format", ["pair", "w8d4"])
@pytest.mark.parametrize("M", [1, 64, 4096])
def test_candidates_are_distinct_and_begin_with_the_plan(M: int, format: str) -> None:
    candidates = linear_candidates(M, 4096, 2560, torch.bfloat16, format, H100)
    assert candidates[0] == linear_config(M, 4096, 2560, torch.bfloat16, format, H100)
    assert 4 <= len(set(candidates)) == len(candidates) <= 100


def test_a_table_decides_for_its_shapes_and_the_nearest_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A made-up one: no GPU was measured for it."""
    monkeypatch.setattr("dami_kernels.tuning.tables.TABLES", tmp_path)
    device = replace(H100, name="Some GPU")
    base = plan(1, 4096, 2560)
    entries = [LinearEntry(M, 4096, 2560, torch.bfloat16, "pair", replace(base, num_stages=M)) for M in (2, 32)]
    save_table(table_path(device.name), entries)
    load_table.cache_clear()
    linear_config.cache_clear()
    with caplog.at_level("INFO", "dami_kernels"):
        chosen = [linear_config(M, 4096, 2560, torch.bfloat16, "pair", device).num_stages for M in (1, 7, 8, 4096)]
    assert chosen == [2, 2, 32, 32]
    assert linear_config(8, 4096, 2560, torch.float16, "pair", device) == plan(8, 4096, 2560, torch.float16)
    assert linear_config(8, 4096, 2560, torch.bfloat16, "pair", device, True).block_m == 64
    of_many_lams = linear_config(4096, 4096, 2560, torch.bfloat16, "pair", device, mixes_lams=True)
    assert of_many_lams == linear_config(4096, 4096, 2560, torch.bfloat16, "pair", H100, mixes_lams=True)
    assert [record.message.split(",")[0] for record in caplog.records] == ["lerp_linear on Some GPU: tiles as measured"]
    load_table.cache_clear()
    linear_config.cache_clear()


def test_no_table_ships_and_the_rules_say_so(caplog: pytest.LogCaptureFixture) -> None:
    load_table.cache_clear()
    with caplog.at_level("INFO", "dami_kernels"):
        assert load_table("Unknown GPU") == {}
    assert "tiles by heuristic, there is no table" in caplog.text
