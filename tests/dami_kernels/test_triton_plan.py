"""The heuristics, for every linear of the models in the benchmarks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from dami_kernels.tuning import H100, Device, LinearConfig, device_of, linear_config, row_config

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


@pytest.mark.parametrize("D", [1, 64, 127, 128, 576, 2560, 4096, 4097, 65536])
def test_rows_are_covered(D: int) -> None:
    config = row_config(D)
    assert config.block_d & (config.block_d - 1) == 0
    assert config.block_m & (config.block_m - 1) == 0
    assert config.block_d >= D or config.block_d == 4096
    assert config.block_m * config.block_d == 256 * config.num_warps
    assert 1 <= config.num_warps <= 16


def test_the_interpreter_plays_an_h100() -> None:
    assert device_of(torch.device("cpu")) == H100
