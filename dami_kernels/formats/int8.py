"""`int8`: the base as it is and the difference in 8 bits. Exact at λ=0; 3.06 bytes for each bfloat16 weight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dami_kernels.formats import ALL, Layout, Rows
from dami_kernels.quantize import code_layout, dequantize, pack_in_blocks, quantize

TENSORS = ("", "_delta", "_delta_scale")


def pack(base: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """base [..., K]; delta int8 [..., K']; scale bfloat16 [..., K' / GROUP]. The base is not copied."""
    return base, *pack_in_blocks(lambda base, target: quantize(target - base, bits=8), base, target)


def unpack(*tensors: Tensor, columns: int, rows: Rows = ALL) -> tuple[Tensor, Tensor]:
    """The base as it is; the target in float32."""
    base, delta, scale = (tensor[rows] for tensor in tensors)
    return base, base.to(torch.float32) + dequantize(delta, scale, columns)


def layout(shape: Sequence[int], dtype: torch.dtype, *_: Tensor) -> Sequence[Layout]:
    return (shape, dtype), *code_layout(shape, bits=8)
