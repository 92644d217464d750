"""Launch parameters of the row-wise operators: the norms and the embedding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from dami_kernels.quantize import GROUP


@dataclass(frozen=True)
class RowConfig:
    """Launch parameters: rows per program, columns it handles at a time, and warps as in Triton."""

    block_m: int
    block_d: int
    num_warps: int


@cache
def row_config(D: int) -> RowConfig:
    """Returns launch parameters for rows of D columns: at least 1024 elements per program, and as many per warp.

    With fewer, a warp would mostly execute what all warps execute alike. Columns are handled in whole
    quantisation groups. Rows of up to 8192 columns are one block.
    """
    block_d = min(max(1 << (D - 1).bit_length(), GROUP), 8192)
    block_m = max(1, 1024 // block_d)
    return RowConfig(block_m, block_d, num_warps=block_m * block_d // 1024)
