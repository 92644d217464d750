"""Weights to time: random, as near to each other as published pairs are, and in more copies than the caches hold."""

from __future__ import annotations

import torch
from dami import use_huge_pages
from torch import Tensor, nn

from dami_kernels import LerpWeight, formats

FORMATS = ["pair", *(name for name in formats.names() if name != "pair")]
KERNEL_FORMATS = [name for name in FORMATS if isinstance(formats.get(name), formats.Matrices)]
DISTANCE = 0.03  # spread of target − base relative to base; 0.027 for the published pairs
BLOCK = 1009  # features to pack; the rest repeat them, for speed. A prime, so that no tile repeats
RANK = 64  # of target − base in "lowrank", as in an adapter


class Copies:
    """Copies of one random weight at several places in memory, in every format.

    Attributes:
        ends: (base, target) of every copy.
        weights: the copies of each format. Formats that keep the base or the target share memory with `ends`.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, formats: list[str], count: int
    ) -> None:
        rows, *rest = shape
        block = min(rows, BLOCK if len(shape) == 2 else 11)
        source = device
        if device.type == "meta":  # only shapes are needed, but packing needs values
            source, block = torch.device("cpu"), 1

        def repeat(part: Tensor) -> Tensor:
            whole = torch.empty(rows, *part.shape[1:], dtype=part.dtype, device=device)
            for start in range(0, 0 if whole.is_meta else rows, block):
                whole[start : start + block] = part[: rows - start]
            return whole

        base = torch.randn(block, *rest, device=source) / rest[-1] ** 0.5
        target = torch.randn(block, *rest, device=source).mul_(DISTANCE / rest[-1] ** 0.5).add_(base).to(dtype)
        base = base.to(dtype)
        self.ends = [(repeat(base), repeat(target)) for _ in range(count)]
        self.weights: dict[str, list[LerpWeight]] = {}
        for format in formats:
            if format == "lowrank":
                if len(shape) != 2:
                    continue
                spread = DISTANCE**0.5 / (RANK * rest[-1]) ** 0.25
                low = [(spread * torch.randn(*size, device=device)).to(dtype) for size in ((RANK, *rest), (rows, RANK))]
                stored = [[base, *(tensor.clone() for tensor in low)] for base, _ in self.ends]
            else:
                packed = LerpWeight.pack(base, target, format).tensors
                stored = [[b if t is base else e if t is target else repeat(t) for t in packed] for b, e in self.ends]
            self.weights[format] = [LerpWeight(tuple(t), format, torch.Size(shape), dtype) for t in stored]

    def in_huge_pages(self) -> list[LerpWeight]:
        """Returns copies of the weights in the format `pair` in huge pages; none if the system has no such pages."""
        moved = nn.ModuleList()
        for base, target in self.ends if self.ends[0][0].device.type == "cpu" else ():
            moved.append(layer := nn.Module())
            layer.register_buffer("weight", base.clone())
            layer.register_buffer("weight_target", target.clone())
        if not use_huge_pages(moved):
            return []
        return [LerpWeight(tuple(layer.buffers()), "pair", base.shape, base.dtype) for layer in moved]

    def merged(self) -> list[Tensor]:
        """Returns ordinary weights in place of merged ones, because times do not depend on the values."""
        return [end for ends in self.ends for end in ends]


def count_of(shape: tuple[int, ...], cold_bytes: int) -> int:
    """Returns how many copies take `cold_bytes` in the smallest format, at 1.6 bytes per weight; between 2 and 64."""
    return min(64, max(2, -(-cold_bytes // int(1.6 * torch.Size(shape).numel()))))


def split(weight: LerpWeight, sizes: list[int]) -> list[LerpWeight]:
    """Splits a [N, K] weight along N without a copy, such as q, k and v of a fused one."""
    n, k = weight.shape
    parts = [tensor.split(sizes) if tensor.shape[0] == n else [tensor] * len(sizes) for tensor in weight.tensors]
    return [
        LerpWeight(tensors, weight.format, torch.Size((size, k)), weight.dtype)
        for size, *tensors_list in zip(sizes, *parts, strict=True)
        for tensors in [tuple(tensors_list)]
    ]
