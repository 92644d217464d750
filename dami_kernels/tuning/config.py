"""Launch parameters of a linear kernel, and what may take its place."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class LinearConfig:
    """Launch parameters of the kernel of `lerp_linear`.

    Attributes:
        block_m, block_n, block_k: rows, features and inner size of a tile.
        mixed_m: rows that a tile with several λ handles at a time. Its two accumulators take twice the registers.
        split_k: number of splits along the inner size. The last one of a tile sums their results.
        use_blend: whether a tile with a single λ blends the weight instead of keeping two accumulators.
        num_warps, num_stages: as in Triton.
        by_group: whether codes are taken four groups at a time. Tiles of up to 16 rows then have a group for each of
            four warps, and scale its sums; those of 32 and 64 one for each of the four lanes that share a feature. A
            step has one or two times four groups, and K whole steps.
    """

    block_m: int
    block_n: int
    block_k: int
    mixed_m: int
    split_k: int
    use_blend: bool
    num_warps: int
    num_stages: int
    by_group: bool = False


class Route(str, Enum):
    """How `lerp_linear` is computed.

    KERNEL: our kernel.
    PRODUCTS: two products of the library, of the base and of the second matrix, with float32 results, and a lerp.
    BLEND: for rows at one λ, the weight blended in pieces and rounded once, and a product of the library with each.
    """

    KERNEL = "kernel"
    PRODUCTS = "products"
    BLEND = "blend"
