"""The tensors of a pair in the order in which vLLM loads them: for each tensor of a format, the whole checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Protocol

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from dami.patching.compare import Header, tensor_mismatches
from dami.serving.vllm.quantization import PairQuantization
from dami_kernels import LerpWeight, formats

# whose experts are [experts, K, N] on the hub, which vLLM undoes in whatever it loads
TRANSPOSED = {"gpt_oss", "qwen3_vl_moe"}

Located = dict[str, tuple[Path, Header]]


class Files(Protocol):
    """What a pair is loaded from."""

    def passes(self) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Yields the i-th tensor of every parameter by the checkpoint's name, for i = 0, 1, …"""


class PackedFiles:
    """A packed pair."""

    def __init__(self, files: Located, pair: PairQuantization, tied: AbstractSet[str], spelling: Spelling) -> None:
        """
        Args:
            files: file and header of each stored tensor.
            pair: the pair, which gets to know the parameters.
            tied: parameters that need not be stored.
            spelling: how vLLM knows the parameters.

        Raises:
            ValueError: if a tensor of an interpolated parameter is missing.
        """
        self.spelling = spelling
        self.files, self.pair, self.tied = files, pair, tied
        self.names = list(dict.fromkeys(_owner(pair, name) for name in files))
        known = {name: self._experts(name) for name in self.names} | dict.fromkeys(tied - {*self.names}, 1)
        pair.originals = {new: name for name, count in known.items() for new in self.spelling.names(name, count)}
        pair.ranks = {
            name.removesuffix("_down"): shape[0]
            for name, (_, (shape, _)) in files.items()
            if name.endswith("_down") and pair.interpolated_as(name.removesuffix("_down")) == "lowrank"
        }
        self._check(self.names)

    def _experts(self, name: str) -> int:
        """Returns how many experts a parameter holds, if it holds experts."""
        format = self.pair.interpolated_as(name)
        shape, _ = self.files[name + (formats.get(format).TENSORS[0] if format else "")][1]
        return shape[0] if shape else 1

    def _check(self, names: Iterable[str]) -> None:
        """Checks that parameters are stored whole. vLLM would not notice if another part of a merged weight was."""
        names = set(names) - self.tied
        tensors = {name: formats.get(self.pair.interpolated_as(name) or "pair").TENSORS for name in names}
        stored = {name: suffixes if self.pair.interpolated_as(name) else ("",) for name, suffixes in tensors.items()}
        lacking = {name + suffix for name, suffixes in stored.items() for suffix in suffixes} - self.files.keys()
        if lacking:
            raise ValueError(f"the packed pair lacks {', '.join(sorted(lacking))}")

    def passes(self) -> Iterator[Iterator[tuple[str, Tensor]]]:
        kept = self.pair.formats()
        self._check(kept)
        used = {*kept.values(), *filter(None, map(self.pair.interpolated_as, self.names))}
        for index in range(_count(used)):
            yield self._pass(index, kept)

    def _pass(self, index: int, kept: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
        def wanted(name: str) -> str | None:
            """Returns the stored tensor that is needed for a parameter in this pass."""
            format = self.pair.interpolated_as(name)
            if format is None:
                return name if index == 0 or kept.get(name, "pair") != "pair" else None
            suffixes = formats.get(format).TENSORS
            return name + suffixes[index] if index < len(suffixes) else None

        needed = {stored: name for name in self.names if (stored := wanted(name)) is not None}
        for stored, tensor in read(self.files, needed):
            name = needed[stored]
            format = kept.get(name, "pair")
            if format != "pair" and self.pair.interpolated_as(name) is None:  # merged with one that differs
                parts = LerpWeight.pack(tensor, tensor, format).tensors
                if index < len(parts):
                    yield from self.spelling.parts(name, parts[index])
            else:
                yield from self.spelling.parts(name, tensor)


class Spelling:
    """How checkpoints on the hub, which vLLM knows, call what transformers calls otherwise or puts together."""

    def __init__(self, config: PreTrainedConfig) -> None:
        mapping = get_checkpoint_conversion_mapping(config.model_type) or []
        self.renamings = [each.reverse_transform() for each in mapping if type(each) is WeightRenaming]
        if config.get_text_config() is not config:  # a language model within another: vLLM knows these names too
            self.renamings = []
        self.experts = {}  # names of the parts that one expert has in a parameter of all experts
        for each in mapping:
            target, parts = each.target_patterns[0], each.source_patterns
            if isinstance(each, WeightConverter) and parts == [target]:  # stored transposed, which vLLM would undo
                parts = [target.replace("experts.", "experts.*.") + ".weight"]
                if target.endswith("gate_up_proj"):
                    parts = [parts[0].replace("gate_up", part) for part in ("gate", "up")]
            if isinstance(each, WeightConverter) and all(".experts.*." in part for part in parts):
                self.experts[target] = parts

    def names(self, name: str, experts: int) -> list[str]:
        """Returns the names of a parameter's parts on the hub, expert by expert where it holds experts."""
        fused = next((target for target in self.experts if name.endswith(target)), None)
        parts = [name]
        if fused is not None:
            each = [part.replace("*", str(number)) for number in range(experts) for part in self.experts[fused]]
            parts = [name.removesuffix(fused) + part for part in each]
        for renaming in self.renamings:
            parts = [renaming.rename_source_key(part)[0] for part in parts]
        return parts

    def parts(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yields the parts of a parameter [experts, parts · N, K], or the parameter itself, by their names."""
        names = self.names(name, tensor.shape[0] if tensor.dim() else 1)
        if len(names) == 1:
            yield names[0], tensor
            return
        rows = tensor.flatten(0, 1).chunk(len(names))
        yield from zip(names, rows, strict=True)


def _owner(pair: PairQuantization, name: str) -> str:
    """Returns the parameter that a stored tensor belongs to."""
    for suffix in formats.suffixes():
        format = pair.interpolated_as(name.removesuffix(suffix)) if name.endswith(suffix) else None
        if format is not None and suffix in formats.get(format).TENSORS:
            return name.removesuffix(suffix)
    return name


class TwoEnds:
    """Two checkpoints, which are packed while the first is read."""

    def __init__(
        self,
        files: tuple[Located, Located],
        pair: PairQuantization,
        tied: AbstractSet[str],
        config: PreTrainedConfig,
    ) -> None:
        """
        Args:
            files: file and header of each tensor of both ends.
            pair: the pair, which gets to know the parameters.
            tied: parameters to skip if they are stored.
            config: config of either end.
        """
        self.files, self.pair = files, pair
        self.headers = [{name: end[name][1] for name in end.keys() - tied} for end in files]
        pair.originals = {name: name for name in self.headers[0]}
        shapes = {
            name: shape
            for name, (shape, _) in self.headers[0].items()
            if config.model_type in TRANSPOSED and name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        }
        hidden = config.get_text_config().hidden_size
        self.transposed = shapes.keys()
        by_rows = any(_lies_by_rows(name, shape, hidden) for name, shape in shapes.items())  # one kind may be square
        self.to_transpose = shapes.keys() if by_rows else set()

    def mismatches(self) -> list[str]:
        """Returns a line for each tensor that is in one end only, or differs in shape or dtype."""
        instruct, thinking = self.headers
        return tensor_mismatches(instruct, thinking)

    def passes(self) -> Iterator[Iterator[tuple[str, Tensor]]]:
        kept = self.pair.formats()
        later: dict[str, tuple[Tensor, ...]] = {}  # what quantised formats store besides the first tensor
        for index in range(_count(set(kept.values()))):
            yield self._pass(index, kept, later)

    def _pass(
        self, index: int, kept: dict[str, str], later: dict[str, tuple[Tensor, ...]]
    ) -> Iterator[tuple[str, Tensor]]:
        names = [name for name in self.files[0] if name in self.headers[0]]
        quantised = [name for name in names if kept.get(name, "pair") != "pair"]
        if index == 0:
            for name, base in self._read(0, names):
                if name in kept and kept[name] != "pair":
                    target = next(self._read(1, [name]))[1]
                    turned = name in self.transposed
                    base, target = (end.mT if turned else end for end in (base, target))
                    parts = LerpWeight.pack(base.contiguous(), target.contiguous(), kept[name]).tensors
                    base, *rest = (part.mT if turned else part for part in parts)
                    later[name] = tuple(rest)
                yield name, base
            return
        if index == 1:
            yield from self._read(1, [name for name in names if name not in later])
        for name in quantised:
            if index - 1 < len(later[name]):
                yield name, later[name][index - 1]

    def _read(self, end: int, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in read(self.files[end], names):
            yield name, tensor.mT if name in self.to_transpose else tensor


def _lies_by_rows(name: str, shape: Sequence[int], hidden: int) -> bool:
    """Returns whether experts are stored [experts, N, K], as transformers saves those of Qwen3-VL."""
    own, other = (2, 1) if name.endswith("gate_up_proj") else (1, 2)  # where the hidden size then is
    return shape[own] == hidden != shape[other]


def _count(used: Iterable[str]) -> int:
    """Returns how many tensors the formats have at most."""
    return max(len(formats.get(format).TENSORS) for format in {"pair", *used})


def read(files: Located, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Reads tensors file by file."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(files[name][0], []).append(name)
    for path, own in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name in own:
                yield name, file.get_tensor(name)
