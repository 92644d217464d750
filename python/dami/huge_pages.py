"""Weights in huge pages: few rows of x read them faster, as the processor looks up far fewer addresses."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dami_kernels import formats

PAGE = 2 << 20  # bytes of a huge page on x86, and on ARM with pages of 4 KiB
LINE = 64  # bytes: tensors begin at a cache line
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages(model: nn.Module) -> int:
    """Moves the parameters and buffers that are on the CPU into transparent huge pages (Linux).

    Decoding a few sequences waits for the weights, if they are large, and these may then arrive sooner. In the format
    `pair`, the rows of the two ends of a weight lie there in turn, as λ between the ends reads both. Each end is then a
    view whose rows are two rows apart: `torch.save` writes the memory of both for each, and safetensors' `save_file`
    asks for `contiguous()`. Values, parameters and all other strides stay as they are. It costs one copy: the weights
    of a saved pair no longer lie in the file's pages, which other processes share.

    Returns:
        The number of bytes moved; 0 if the system gives no huge pages.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if _is_plain(tensor)}.values()
    places: dict[tuple[object, ...], Place] = {}  # of each view of memory: what was shared stays shared
    size = 0
    for base, target in _pairs(model):
        strides = (*(2 * stride for stride in base.stride()[:-1]), 1)
        places[_view(base)] = size, strides
        places[_view(target)] = size + base.shape[-1] * base.element_size(), strides
        size += 2 * base.nbytes
    for tensor in tensors:
        if _view(tensor) not in places:
            places[_view(tensor)] = size, tensor.stride()
            size += -(-_span(tensor, tensor.stride()) // LINE) * LINE
    pages = _pages(size) if size else None
    if pages is None:
        return 0
    moved: dict[tuple[object, ...], Tensor] = {}
    for tensor in tensors:
        view = _view(tensor)
        if view not in moved:
            begin, strides = places[view]
            there = torch.frombuffer(pages[begin : begin + _span(tensor, strides)], dtype=tensor.dtype)
            moved[view] = there.as_strided(tensor.shape, strides)
            if strides == tensor.stride():  # as it lies, gaps and repetitions included
                there.copy_(tensor.detach().as_strided(there.shape, (1,)))
            else:
                moved[view].copy_(tensor.detach())
        tensor.data = moved[view]
    return size


Place = tuple[int, tuple[int, ...]]  # where a tensor begins in the new memory, in bytes, and its strides there


def _pairs(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the two ends of every weight in the format `pair` whose rows fill whole lines.

    Not those of a weight that several modules share: transformers cannot save it as such a view.
    """
    _, suffix = formats.get("pair").TENSORS
    stored = [
        dict((*each.named_parameters(recurse=False), *each.named_buffers(recurse=False))) for each in model.modules()
    ]
    holders = Counter(_view(tensor) for tensors in stored for tensor in tensors.values() if _is_plain(tensor))
    for tensors in stored:
        for name, base in tensors.items():
            target = tensors.get(name + suffix)
            if target is not None and _are_alike(base, target) and holders[_view(base)] == holders[_view(target)] == 1:
                yield base, target


def _are_alike(base: Tensor, target: Tensor) -> bool:
    """Whether two tensors lie row by row, in rows of whole lines, and have one shape and dtype."""
    if not (_is_plain(base) and _is_plain(target) and base.shape == target.shape and base.dtype == target.dtype):
        return False
    is_matrix = base.dim() > 1 and base.shape[-1] * base.element_size() % LINE == 0
    return is_matrix and base.is_contiguous() and target.is_contiguous()


def _is_plain(tensor: Tensor) -> bool:
    is_strided = type(tensor.data) is Tensor and tensor.layout == torch.strided
    return is_strided and tensor.device.type == "cpu" and tensor.numel() > 0


def _view(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _span(tensor: Tensor, strides: tuple[int, ...]) -> int:
    """Returns the bytes from the first element to the last, if the tensor has such strides."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
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
