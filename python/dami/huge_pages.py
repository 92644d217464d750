"""Weights in huge pages: few rows of x read them faster, as the processor looks up far fewer addresses."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor, nn

PAGE = 2 << 20  # bytes of a huge page on x86, and on ARM with pages of 4 KiB
LINE = 64  # bytes: tensors begin at a cache line
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages(model: nn.Module) -> int:
    """Moves the parameters and buffers that are on the CPU into transparent huge pages (Linux).

    Decoding a few sequences waits for the weights, if they are large, and these may then arrive sooner. It costs one
    copy: the weights of a saved pair no longer lie in the file's pages, which other processes share. Values,
    parameters and strides stay as they are.

    Returns:
        The number of bytes moved; 0 if the system gives no huge pages.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if _is_plain(tensor)}.values()
    at: dict[tuple[object, ...], int] = {}  # where each view of memory goes: what was shared stays shared
    size = 0
    for tensor in tensors:
        if at.setdefault(_view(tensor), size) == size:
            size += -(-_span(tensor) // LINE) * LINE
    pages = _pages(size) if size else None
    if pages is None:
        return 0
    moved: dict[tuple[object, ...], Tensor] = {}
    for tensor in tensors:
        view = _view(tensor)
        if view not in moved:
            there = torch.frombuffer(pages[at[view] : at[view] + _span(tensor)], dtype=tensor.dtype)
            there.copy_(tensor.detach().as_strided(there.shape, (1,)))  # as it lies, gaps and repetitions included
            moved[view] = there.as_strided(tensor.shape, tensor.stride())
        tensor.data = moved[view]
    return size


def _is_plain(tensor: Tensor) -> bool:
    is_strided = type(tensor.data) is Tensor and tensor.layout == torch.strided
    return is_strided and tensor.device.type == "cpu" and tensor.numel() > 0


def _view(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _span(tensor: Tensor) -> int:
    """Returns the bytes from a tensor's first element to its last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


def _pages(size: int) -> memoryview | None:
    """Returns so many bytes of new memory that begin at a huge page, or None if there are none to be had."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or not SETTING.exists() or "[never]" in SETTING.read_text():
        return None
    # Private memory: by default mmap's is shared, which systems keep in small pages (`shmem_enabled`).
    memory = mmap.mmap(-1, -(-size // PAGE) * PAGE + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
    return memoryview(memory)[begin : begin + size]
