"""How `lerp_experts` is cut up, for the experts of published mixtures from 1 to 16384 tokens."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from dami_kernels.tuning import H100, Device, LinearConfig, experts_config
from tests.dami_kernels.test_triton_plan import DEVICES


class Experts(NamedTuple):
    """Experts, how many of them a token goes to, and the sizes of their weights."""

    E: int
    active: int
    N: int
    K: int


MODELS = {  # gate and up fused, down
    "Qwen3-30B-A3B": [Experts(128, 8, 1536, 2048), Experts(128, 8, 2048, 768)],
    "gpt-oss-20b": [Experts(32, 4, 5760, 2880), Experts(32, 4, 2880, 2880)],
}
SHAPES = [shape for shapes in MODELS.values() for shape in shapes]
TOKENS = [1, 2, 3, 4, 8, 16, 32, 64, 100, 128, 256, 512, 1000, 1024, 2048, 4096, 8192, 16384]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FORMATS = ["pair", "int8", "int4", "w8d4"]
every_device = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())


def plan(
    tokens: int,
    shape: Experts,
    dtype: torch.dtype = torch.bfloat16,
    format: str = "pair",
    device: Device = H100,
    invariant: bool = False,
) -> LinearConfig:
    return experts_config(tokens * shape.active, shape.E, shape.N, shape.K, dtype, format, device, invariant)


@every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_tiles_are_legal(dtype: torch.dtype, format: str, device: Device) -> None:
    for tokens, shape, invariant in itertools.product(TOKENS, SHAPES, (False, True)):
        config = plan(tokens, shape, dtype, format, device, invariant)
        sizes = (config.block_m, config.block_n, config.block_k, config.split_k, config.num_warps)
        assert all(size & (size - 1) == 0 for size in sizes), config
        assert min(config.block_m, config.block_n) >= (8 if config.by_group else 16), config
        assert config.block_k >= (16 if format == "pair" else 32), config


@every_device
@pytest.mark.parametrize("shapes", MODELS.values(), ids=MODELS.keys())
def test_a_model_compiles_few_kernels(shapes: list[Experts], device: Device) -> None:
    configs = {plan(tokens, shape, device=device) for tokens, shape in itertools.product(TOKENS, shapes)}
    assert len({replace(config, split_k=1) for config in configs}) <= 8


@every_device
def test_the_device_has_work(device: Device) -> None:
    """Three quarters of the processors at least, if the tokens go to different experts."""
    for tokens, shape in itertools.product(TOKENS, SHAPES):
        config = plan(tokens, shape, device=device)
        tiles = min(shape.E, tokens * shape.active) * -(-shape.N // config.block_n)
        assert tiles * config.split_k >= device.processors * 3 // 4, (tokens, shape, config)


def test_an_expert_s_weight_is_read_once_in_decode() -> None:
    """While experts have up to 64 rows on average, a tile has room for twice as many."""
    for tokens, shape in itertools.product(TOKENS, SHAPES):
        share = tokens * shape.active / shape.E
        config = plan(tokens, shape)
        assert config.block_m >= min(128, 2 * share)
        assert config.block_m <= max(16, min(128, 4 * share))
        assert config.use_blend == (share > 128)


def test_few_rows_of_one_expert_split_k() -> None:
    assert plan(1, Experts(1, 1, 512, 4096)).split_k > 1


@every_device
@pytest.mark.parametrize("format", FORMATS)
def test_an_invariant_plan_knows_no_rows(format: str, device: Device) -> None:
    for shape in (*SHAPES, Experts(1, 1, 512, 4096)):
        plans = {plan(tokens, shape, format=format, device=device, invariant=True) for tokens in TOKENS}
        assert len(plans) == 1
        assert not plans.pop().use_blend
