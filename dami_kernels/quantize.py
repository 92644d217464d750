"""Symmetric quantisation in groups along the last dimension, with the scale that minimises the squared error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32  # weights that share a scale
SCALE = torch.bfloat16  # in float16, the scales of 8-bit differences would be subnormal
BLOCK = 1 << 20  # weights quantised at a time; bounds the extra memory and keeps temporaries in the caches

# The initial scale of a group maps its largest weight to the largest code. A smaller scale clips that weight but
# represents the others better. A slightly larger one can help when the largest weight is not an outlier.
_STRETCHES = (0.85, 0.92, 1.0, 1.08)


def quantize(values: Tensor, bits: int, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Returns codes and scales such that values ≈ codes · scales, in groups along the last dimension.

    Tries several initial scales s. Each gives codes q = round(v / s). The least-squares scale for these codes,
    Σ v q / Σ q² rounded to bfloat16, gives the final codes. The result with the smallest error is kept.

    Args:
        values: float32 [..., K], finite.
        bits: 2 to 8; codes lie in [−2^(bits−1), 2^(bits−1) − 1].
        group: number of values that share a scale.

    Returns:
        codes: int8 [..., K'], K' = K rounded up to whole groups; 0 beyond K.
        scales: bfloat16 [..., K' / group]. Scales may be negative, because the largest weight takes the
            largest code, which is negative.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    groups = F.pad(values, (0, -values.shape[-1] % group))
    groups = groups.unflatten(-1, (groups.shape[-1] // group, group))
    widest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best_codes = torch.zeros_like(groups)
    best_scale = torch.zeros_like(widest)
    best_error = groups.square().sum(-1, keepdim=True)

    def codes_of(scale: Tensor) -> Tensor:
        inverse = torch.where(scale == 0, 0.0, 1 / scale)  # a group of zeros
        return (groups * inverse).round_().clamp_(low, high)

    for stretch in _STRETCHES:
        codes = codes_of(widest * (stretch / low))
        fitted = (groups * codes).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True).clamp_min(1)
        scale = fitted.to(SCALE).float()
        codes = codes_of(scale)
        error = (codes * scale).sub_(groups).square_().sum(-1, keepdim=True)
        better = error < best_error
        best_codes = torch.where(better, codes, best_codes)
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_codes.to(torch.int8).flatten(-2), best_scale.squeeze(-1).to(SCALE)


def dequantize(codes: Tensor, scales: Tensor, columns: int) -> Tensor:
    """Returns codes · scales in float32 without the padding, [..., columns]."""
    group = codes.shape[-1] // max(1, scales.shape[-1])
    # By index, as Inductor (torch 2.13) compiles the product of whole groups wrongly where only a part is used.
    of_column = torch.arange(columns, device=codes.device) // group
    return codes[..., :columns].float() * scales.float()[..., of_column]


def code_layout(shape: Sequence[int], bits: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Returns shape and dtype of the codes and of the scales for values of this shape. Two 4-bit codes share a byte."""
    groups = -(-shape[-1] // GROUP)
    codes = torch.int8 if bits == 8 else torch.uint8
    return ((*shape[:-1], groups * GROUP * bits // 8), codes), ((*shape[:-1], groups), SCALE)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Packs 4-bit codes into uint8 [..., K'/2]: 8 + code 2i in the low nibble of byte i, 8 + code 2i+1 in the high."""
    unsigned = (codes + 8).to(torch.uint8)
    return unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: returns int8 codes [..., K']."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2).to(torch.int8) - 8


def row_blocks(rows: int, weights: int) -> Iterator[slice]:
    """Yields slices of `rows` rows of `weights` weights each, about `BLOCK` weights per slice; at least one slice."""
    step = max(1, BLOCK // max(1, weights))
    for start in range(0, max(1, rows), step):
        yield slice(start, start + step)


def pack_in_blocks(
    pack: Callable[[Tensor, Tensor], tuple[Tensor, ...]], base: Tensor, target: Tensor
) -> tuple[Tensor, ...]:
    """Packs both ends in float32, a block of rows at a time, into preallocated tensors, to save memory.

    Raises:
        ValueError: a weight is not finite.
    """
    stored: tuple[Tensor, ...] = ()
    for rows in row_blocks(base.shape[0], base.shape[1:].numel()):
        ends = base[rows].float(), target[rows].float()
        for name, end in zip(("base", "target"), ends, strict=True):
            if not end.isfinite().all():
                raise ValueError(f"{name} must be finite to be quantised, got Inf or NaN among its values")
        parts = pack(*ends)
        if not stored:
            stored = tuple(part.new_empty(base.shape[0], *part.shape[1:]) for part in parts)
        for tensor, part in zip(stored, parts, strict=True):
            tensor[rows] = part
    return stored
