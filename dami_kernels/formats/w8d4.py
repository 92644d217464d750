"""`w8d4`: the base in 8 bits, the difference in 4. Two models in 1.63 bytes a weight, less than one in bfloat16 takes.

The difference is taken from the base as it is stored, not from the one that came, so its codes make up for the base's
rounding too. Where the ends are close, the error is therefore least at λ=1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dami_kernels.formats import ALL, Layout, Rows
from dami_kernels.quantize import code_layout, dequantize, pack_in_blocks, pack_nibbles, quantize, unpack_nibbles

TENSORS = ("_base", "_base_scale", "_delta", "_delta_scale")


def pack(base: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """base int8 [..., K'] and its scale [..., K' / GROUP]; delta uint8 [..., K'/2] and its scale [..., K' / GROUP]."""

    def both(base: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        codes, scales = quantize(base, bits=8)
        difference, difference_scales = quantize(target - dequantize(codes, scales, base.shape[-1]), bits=4)
        return codes, scales, pack_nibbles(difference), difference_scales

    return pack_in_blocks(both, base, target)


def unpack(*tensors: Tensor, columns: int, rows: Rows = ALL) -> tuple[Tensor, Tensor]:
    """Both ends in float32."""
    base, scale, delta, delta_scale = (tensor[rows] for tensor in tensors)
    unpacked = dequantize(base, scale, columns)
    return unpacked, unpacked + dequantize(unpack_nibbles(delta), delta_scale, columns)


def layout(shape: Sequence[int], dtype: torch.dtype, *_: Tensor) -> Sequence[Layout]:
    return *code_layout(shape, bits=8), *code_layout(shape, bits=4)
