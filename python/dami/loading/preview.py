"""What two checkpoints would be as a pair, told from configs, tokenizers, headers and a sample of rows."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dami.layers.base import LerpModule
from dami.layers.kinds import kinds_of, readers, stored_format
from dami.layers.obstacles import obstacles
from dami.loading.adapters import MISFIT, Adapter
from dami.loading.checkpoint import Checkpoint
from dami.loading.match import Match, check_distinct
from dami.loading.policies import Choices, Difference, Report
from dami.loading.stored import StoredTensors
from dami.patching.patch import place_of
from dami.patching.ties import untie
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
        """Returns `fitting(nbytes)`."""
        return fitting(nbytes)

    def loads(self, format: str) -> bool:
        """Returns whether this machine's memory is enough to load the two checkpoints in a format, onto the CPU."""
        return (self.loading or {})[format] <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON can hold it."""
        told = {key: value for key, value in vars(self).items() if key not in ("report", "distances")}
        fits = {format: self.fitting(nbytes) for format, nbytes in (self.sizes or {}).items()}
        differences, distances = self.report.to_dicts(), [asdict(distance) for distance in self.distances]
        return {"pair": self.is_pair, **told, "fits": fits, "differences": differences, "distances": distances}


def fitting(nbytes: float) -> list[str]:
    """Returns the GPUs, the smallest first, that hold so many bytes of weights; or how many of the largest do."""
    fits = [name for name, memory in sorted(GPUS.items(), key=lambda each: each[1]) if nbytes <= SHARE * memory]
    name, memory = max(GPUS.items(), key=lambda each: each[1])
    return fits or [f"{math.ceil(nbytes / (SHARE * memory))} × {name}"]


def preview(
    instruct: Checkpoint, thinking: Checkpoint, choices: Choices | None = None, base: Checkpoint | None = None
) -> Preview:
    """Compares two checkpoints without loading them.

    Args:
        instruct, thinking: the ends; either may be an adapter.
        choices: the user's, where the ends differ.
        base: what the instruct end was trained on, if that is an adapter, as `joining.base_of` finds it.

    Raises:
        ValueError, OSError: an end is none, or files are damaged.
    """
    check_distinct((instruct, thinking))
    choices, base = choices or Choices(), base or instruct
    match = None if thinking.is_adapter else Match.of(base, thinking, choices)
    if match is None:
        choices.check_adapter()
    skeleton = base.skeleton() if match is None else match.skeleton
    names = instruct.name, thinking.name, type(skeleton).__name__
    if match is not None and base.config().model_type != thinking.config().model_type:
        return Preview(*names, match.report)
    config, asked = skeleton.config, choices.dtype if match is None else match.dtype
    dtype = asked if asked != "auto" else getattr(config, "dtype", None) or torch.float32
    numeric = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    adapters = [end for end in (instruct, thinking) if end.is_adapter]
    told, changed = _adapted(adapters, skeleton)
    differences = told if match is None else [*match.report.differences, *told, *_doubts(match)]
    report = Report(differences)
    sizes, parameters, largest = _sizes(skeleton, numeric, None if match is not None else changed)
    streams = match is not None and not adapters and all(stored.complete for stored in match.stored)
    both = 2 * parameters * numeric.itemsize
    whole = both if match is not None and not streams else largest  # an adapter is put on tensor by tensor
    needed = {format: nbytes + whole for format, nbytes in sizes.items()}
    needed["pack"] = min(SHARD, max(sizes.values())) + 4 * largest if streams else whole + max(sizes.values())
    distances = [] if report.blocking or match is None or adapters else list(_distances(match))
    dtype = str(numeric).removeprefix("torch.")
    return Preview(*names, report, parameters, dtype, sizes, needed, streams, distances)


def _adapted(ends: Sequence[Checkpoint], skeleton: PreTrainedModel) -> tuple[list[Difference], set[str]]:
    """Returns what of some adapters does not fit their base, and the names of the parameters that they change."""
    differences: list[Difference] = []
    changed: set[str] = set()
    for end in ends:
        try:
            adapter = Adapter.read(end.directory)
        except ValueError as error:
            differences.append(Difference("adapter", str(error), None, "give a plain LoRA, or a whole checkpoint"))
            continue
        lines = adapter.mismatches(skeleton)
        parted = [line.partition(": ") for line in lines]
        differences += [Difference(subject, told, None, MISFIT) for subject, _, told in parted]
        changed |= {*adapter.names}
        if not lines and adapter.unties(skeleton):
            untie(skeleton)
    return differences, changed


def _sizes(skeleton: PreTrainedModel, dtype: torch.dtype, changed: set[str] | None) -> tuple[dict[str, int], int, int]:
    """Returns the bytes of a pair by format, the parameters of one end, and the bytes of its largest tensor.

    The parameters in `changed` count as differing, every one if it is None. A low-rank pair's size depends on its
    ranks, so it is left out.
    """
    read_by = readers(kinds_of(skeleton, on_meta=True))
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
            if own not in FLOAT_DTYPES or (changed is not None and name not in changed):
                sizes[format] += tensor.numel() * own.itemsize
            else:
                sizes[format] += stored_bytes(format, read_by[id(tensor)], name, tensor, own)
    return sizes, parameters, largest


def stored_bytes(format: str, kind: type[LerpModule], name: str, tensor: Tensor, dtype: torch.dtype) -> int:
    """Returns the bytes of both ends of a tensor in a format.

    Args:
        format: the format asked for.
        kind: the kind of the module that reads the tensor.
        name: the tensor's name.
        tensor: one end, of which the shape counts.
        dtype: of the ends.
    """
    layout = formats.get(stored_format(format, kind, name, tensor)).layout(kind.as_operand(tensor).shape, dtype)
    return sum(torch.Size(shape).numel() * stored.itemsize for shape, stored in layout)


def _doubts(match: Match) -> Iterator[Difference]:
    """Yields the tensors that no λ reaches: if they differ, which only reading them all would tell, they block."""
    for name, line in obstacles(match.skeleton).items():
        if all(name in each.headers for each in match.stored):
            ends = zip(match.ends, match.stored, strict=True)
            base, target = (stored.read(end, name) for end, stored in ends)
            if not torch.equal(base, target):
                told = f"differs, and cannot be interpolated: {line}"
                yield Difference(name, told, None, "take ends in which it is the same")


def _distances(match: Match) -> Iterator[Distance]:
    """Yields the distance of each part of the model, from the first rows of tensors in a few layers."""
    parts: dict[str, list[tuple[str, str]]] = {}
    places = _places(match)
    sampled = [_sampled(each) for each in match.stored]
    for name in sampled[0].keys() & sampled[1].keys() & places.keys():
        layer, part = places[name]
        parts.setdefault(part, []).append((layer, name))
    for part in sorted(parts):
        layers = sorted({layer for layer, _ in parts[part]})
        chosen = {layers[round(i * (len(layers) - 1) / (SAMPLED_LAYERS - 1))] for i in range(SAMPLED_LAYERS)}
        lost = whole = 0.0
        pairs = [
            names
            for layer, name in sorted(parts[part])
            if layer in chosen
            for names in zip(sampled[0][name], sampled[1][name], strict=False)
        ]
        for names in pairs:
            base, target = (
                end.read(name, slice(0, SAMPLED_ROWS)).double() for end, name in zip(match.ends, names, strict=True)
            )
            rows = min(len(base), len(target)) if base.dim() else None
            lost += (target[:rows] - base[:rows]).square().sum().item()
            whole += base[:rows].square().sum().item()
        yield Distance(part, len(pairs), (lost / whole) ** 0.5 if whole else 0.0)


def _sampled(stored: StoredTensors) -> dict[str, list[str]]:
    """Returns, by a tensor's name in the model, the stored tensors that stand for it: of many experts, the first.

    What only transformers dequantises is left out: no rows of it can be read alone.
    """
    found = {own: [name] for own, name in stored.stored_as.items()}
    plain = {own: each for own, each in stored.conversions.items() if each.dtype is None}
    return found | {own: [names[0] for names in each.sources.values()] for own, each in plain.items()}


def _places(match: Match) -> dict[str, tuple[str, str]]:
    """Returns the layer and the part of the model that each tensor is in, by its name."""
    read_by = {module: kind for module, (kind, _) in kinds_of(match.skeleton, on_meta=True).items()}
    found: dict[str, tuple[str, str]] = {}
    for prefix, module in match.skeleton.named_modules():
        layer, part = place_of(match.skeleton, prefix, module, read_by[module])
        for own, _ in module.named_parameters(recurse=False):
            found[f"{prefix}.{own}"] = f"{layer or 0:05}", part
    return found
