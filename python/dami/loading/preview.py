"""What two checkpoints would be as a pair, told from configs, tokenizers, headers and a sample of rows."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dami.layers.kinds import kind_on_meta, readers, stored_format
from dami.layers.obstacles import obstacles
from dami.loading.adapters import Adapter
from dami.loading.checkpoint import Checkpoint, StoredTensors
from dami.loading.match import Match, check_distinct
from dami.loading.policies import Choices, Difference, Report
from dami.patching.patch import place_of
from dami_kernels import formats
from dami_kernels.formats import Matrices
from dami_kernels.weight import FLOAT_DTYPES

GPUS = {  # bytes of memory, as sold
    "RTX 4090": 24e9,
    "RTX 5090": 32e9,
    "L40S": 48e9,
    "A100 80 GB": 80e9,
    "H100": 80e9,
    "H200": 141e9,
    "B200": 180e9,
    "MI300X": 192e9,
}
SHARE = 0.85  # of a GPU's memory, for weights; the rest is for cache and activations
SAMPLED_ROWS, SAMPLED_LAYERS = 64, 3
SHARD = 1 << 30  # bytes that `dami.pack` holds


@dataclass(frozen=True)
class Distance:
    """How far apart the ends are in a part of the model, ‖W_thinking − W_instruct‖ / ‖W_instruct‖, in a sample."""

    part: str
    tensors: int
    relative: float


@dataclass(frozen=True)
class Preview:
    """What two checkpoints would be as a pair.

    Attributes:
        instruct, thinking: names of the ends.
        architecture: the class of the model.
        report: what differs between the ends.
        parameters: how many numbers one end has.
        dtype: the dtype that the pair computes in.
        sizes: bytes of the pair's weights by format.
        loading: bytes of memory that loading the two checkpoints in a format needs, and packing them under "pack".
        streams: whether both ends can be read tensor by tensor; if not, both are in memory while loading or packing.
        distances: by part of the model; empty if the ends are not stored alike.
    """

    instruct: str
    thinking: str
    architecture: str
    report: Report
    parameters: int = 0
    dtype: str = ""
    sizes: Mapping[str, int] | None = None
    loading: Mapping[str, int] | None = None
    streams: bool = True
    distances: Sequence[Distance] = ()

    @property
    def is_pair(self) -> bool:
        return not self.report.blocking

    def fitting(self, nbytes: float) -> list[str]:
        """Returns the GPUs, the smallest first, that hold so many bytes of weights; or how many of the largest do."""
        fits = [name for name, memory in sorted(GPUS.items(), key=lambda each: each[1]) if nbytes <= SHARE * memory]
        name, memory = max(GPUS.items(), key=lambda each: each[1])
        return fits or [f"{math.ceil(nbytes / (SHARE * memory))} × {name}"]

    def loads(self, format: str) -> bool:
        """Returns whether this machine's memory is enough to load the two checkpoints in a format, onto the CPU."""
        return (self.loading or {})[format] <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON can hold it."""
        told = {key: value for key, value in vars(self).items() if key not in ("report", "distances")}
        fits = {format: self.fitting(nbytes) for format, nbytes in (self.sizes or {}).items()}
        differences, distances = self.report.to_dicts(), [asdict(distance) for distance in self.distances]
        return {"pair": self.is_pair, **told, "fits": fits, "differences": differences, "distances": distances}


def preview(instruct: Checkpoint, thinking: Checkpoint, choices: Choices | None = None) -> Preview:
    """Compares two checkpoints without loading them.

    Args:
        instruct, thinking: the ends; the thinking end may be an adapter.
        choices: the user's, where the ends differ.

    Raises:
        ValueError, OSError: an end is none, or files are damaged.
    """
    check_distinct((instruct, thinking))
    if thinking.is_adapter:
        return _of_adapter(instruct, thinking)
    match = Match.of(instruct, thinking, choices)
    names = instruct.name, thinking.name, type(match.skeleton).__name__
    if instruct.config().model_type != thinking.config().model_type:
        return Preview(*names, match.report)
    dtype = match.dtype if match.dtype != "auto" else getattr(match.config, "dtype", None) or torch.float32
    numeric = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    sizes, parameters, largest = _sizes(match.skeleton, numeric)
    streams = all(stored.complete for stored in match.stored)
    both = 2 * parameters * numeric.itemsize
    needed = {format: nbytes + (largest if streams else both) for format, nbytes in sizes.items()}
    needed["pack"] = min(SHARD, max(sizes.values())) + 4 * largest if streams else both + max(sizes.values())
    told = str(numeric).removeprefix("torch.")
    report = Report([*match.report.differences, *_doubts(match)])
    distances = [] if report.blocking else list(_distances(match))
    return Preview(*names, report, parameters, told, sizes, needed, streams, distances)


def _of_adapter(instruct: Checkpoint, thinking: Checkpoint) -> Preview:
    """Returns the preview of a model and an adapter on it."""
    skeleton = instruct.skeleton()
    try:
        lines = Adapter.read(thinking.directory).mismatches(skeleton)
        report = Report([Difference(subject, ends) for subject, _, ends in (line.partition(": ") for line in lines)])
    except ValueError as error:
        report = Report([Difference("adapter", str(error))])
    dtype = getattr(instruct.config(), "dtype", None) or torch.float32
    sizes, parameters, largest = _sizes(skeleton, dtype)
    needed = {format: nbytes + largest for format, nbytes in sizes.items()}
    told = str(dtype).removeprefix("torch.")
    return Preview(
        instruct.name, thinking.name, type(skeleton).__name__, report, parameters, told, sizes, needed, streams=False
    )


def _sizes(skeleton: Any, dtype: torch.dtype) -> tuple[dict[str, int], int, int]:
    """Returns the bytes of a pair by format, the parameters of one end, and the bytes of its largest tensor.

    Every parameter counts as differing. A low-rank pair's size depends on its ranks, so it is left out.
    """
    read_by = readers({module: kind_on_meta(module) for module in skeleton.modules()})
    known = {name: formats.get(name) for name in formats.names()}
    sizes = {name: 0 for name, format in known.items() if isinstance(format, Matrices)}
    seen: set[int] = set()
    parameters = largest = 0
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        parameters += tensor.numel()
        own = dtype if tensor.is_floating_point() else tensor.dtype
        largest = max(largest, tensor.numel() * own.itemsize)
        for format in sizes:
            if own not in FLOAT_DTYPES:
                sizes[format] += tensor.numel() * own.itemsize
                continue
            kind = read_by[id(tensor)]
            layout = formats.get(stored_format(format, kind, name, tensor)).layout(kind.as_operand(tensor).shape, own)
            sizes[format] += sum(torch.Size(shape).numel() * stored.itemsize for shape, stored in layout)
    return sizes, parameters, largest


def _doubts(match: Match) -> Iterator[Difference]:
    """Yields the tensors that no λ reaches: if they differ, which only reading them all would tell, they block."""
    for name, line in obstacles(match.skeleton).items():
        stored = [{own: name for name, owns in each.names.items() for own in owns} for each in match.stored]
        if all(name in each for each in stored):
            ends = zip(match.ends, stored, strict=True)
            base, target = (end.read(names[name]) for end, names in ends)
            if not torch.equal(base, target):
                yield Difference(name, f"differs, and cannot be interpolated: {line}")


def _distances(match: Match) -> Iterator[Distance]:
    """Yields the distance of each part of the model, from the first rows of tensors in a few layers."""
    parts: dict[str, list[tuple[str, str]]] = {}
    places = _places(match)
    stored = [_by_name(each) for each in match.stored]
    for name in stored[0].keys() & stored[1].keys() & places.keys():
        parts.setdefault(places[name][1], []).append((places[name][0], name))
    for part in sorted(parts):
        layers = sorted({layer for layer, _ in parts[part]})
        chosen = {layers[round(i * (len(layers) - 1) / (SAMPLED_LAYERS - 1))] for i in range(SAMPLED_LAYERS)}
        lost = whole = 0.0
        names = sorted(name for layer, name in parts[part] if layer in chosen)
        for name in names:
            base, target = (
                end.read(names[name], slice(0, SAMPLED_ROWS)).double()
                for end, names in zip(match.ends, stored, strict=True)
            )
            rows = min(len(base), len(target)) if base.dim() else None
            lost += (target[:rows] - base[:rows]).square().sum().item()
            whole += base[:rows].square().sum().item()
        yield Distance(part, len(names), (lost / whole) ** 0.5 if whole else 0.0)


def _by_name(stored: StoredTensors) -> dict[str, str]:
    """Returns the stored name of each tensor that can be compared: by the model's name, or its own if converted."""
    return {own: name for name, owns in stored.names.items() for own in owns} | {
        name: name for name in stored.converted
    }


def _places(match: Match) -> dict[str, tuple[str, str]]:
    """Returns the layer and the part of the model that each tensor is in, by its name or its stored name."""
    read_by = {module: kind_on_meta(module)[0] for module in match.skeleton.modules()}
    found: dict[str, tuple[str, str]] = {}
    for prefix, module in match.skeleton.named_modules():
        layer, part = place_of(match.skeleton, prefix, module, read_by[module])
        for own, _ in module.named_parameters(recurse=False):
            found[f"{prefix}.{own}"] = f"{layer or 0:05}", part
    for name in match.stored[0].converted:
        found[name] = "00000", "experts" if "experts" in name else "other"
    return found
