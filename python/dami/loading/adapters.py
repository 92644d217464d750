"""Reads LoRA adapters, as PEFT saves them, to use as an end of a pair: base + up · down."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dami.layers.packed import LowRank
from dami.layers.peft import LORA_FACTOR, UNCHANGED, more_than_lora
from dami.patching.compare import first_names
from dami.patching.ties import head_name
from dami.sources import ADAPTER, read_object

CONFIG, WEIGHTS, LEGACY = ADAPTER, "adapter_model.safetensors", "adapter_model.bin"
MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?")  # DoRA's
MISFIT = "name the checkpoint that the adapter was trained on"  # what to do if it does not fit
_SUBTRACTED = ("pissa", "olora")  # initialisations that subtract from the base what can be recomputed


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk.

    Attributes:
        directory: where it is stored.
        config: the contents of its adapter_config.json.
        factors: its A and B tensors, by the name of the parameter they change.
        whole: the tensors it replaces entirely, by the parameter's name; of an adapted embedding, which PEFT saves too,
            what the factors are added to.
        magnitudes: DoRA's magnitude of each output, by the name of the parameter.
    """

    directory: Path
    config: dict[str, Any]
    factors: dict[str, dict[str, Tensor]]
    whole: dict[str, Tensor]
    magnitudes: dict[str, Tensor]

    @classmethod
    def read(cls, directory: Path) -> Adapter:
        """Reads the adapter in a directory.

        Raises:
            ValueError: it is not a LoRA, or has parts that are not low-rank differences; they are named.
            OSError: a file is missing.
        """
        config = read_object(directory / CONFIG)
        odd = more_than_lora({**config, "use_dora": False})
        initialisation = config.get("init_lora_weights", True)
        if initialisation not in (*UNCHANGED, *_SUBTRACTED):
            odd.append(f"init_lora_weights={initialisation!r}, which has changed the weights under the adapter")
        if odd:
            raise ValueError(
                f"the adapter {directory} must be a plain LoRA, got {', '.join(odd)}: where PEFT can, merge it into "
                "its base with merge_and_unload(), save the model, and give that as the thinking end"
            )
        factors: dict[str, dict[str, Tensor]] = {}
        whole, magnitudes = {}, {}
        for name, tensor in _stored(directory).items():
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            match = LORA_FACTOR.fullmatch(name)
            if match:
                kind = (match["embedding"] or "") + match["factor"]
                factors.setdefault(f"{match['module']}.weight", {})[kind] = tensor
            elif match := MAGNITUDE.fullmatch(name):
                magnitudes[f"{match['module']}.weight"] = tensor
            else:
                whole[name] = tensor
        return cls(directory, config, factors, whole, magnitudes)

    @property
    def names(self) -> list[str]:
        """The names of the parameters that it changes."""
        return sorted({*self.factors, *self.whole})

    def mismatches(self, model: PreTrainedModel) -> list[str]:
        """Returns a line for every tensor of the adapter that does not fit `model`."""
        firsts, state = first_names(model), model.state_dict()
        tied = [first for name, first in firsts.items() if name != first]
        lines = []
        for name in sorted({*self.names, *self.magnitudes}):
            if name not in state:
                lines.append(f"{name}: in the adapter only")
            elif (name in tied or firsts[name] != name) and name not in _head_and_embedding(model):
                lines.append(f"{name}: tied in the model, adapted alone")
            elif name in self.whole and self.whole[name].shape != state[name].shape:
                shapes = list(state[name].shape), list(self.whole[name].shape)
                lines.append(f"{name}: {shapes[0]} in the instruct end, {shapes[1]} in the adapter")
            elif name in self.factors and len(self.factors[name]) != 2:
                lines.append(f"{name}: the adapter has only one of its factors")
            elif name in self.factors:
                low = self._low_rank(name)
                shape = [low.up.shape[0], low.down.shape[1]]
                if sorted(shape) != sorted(state[name].shape) or low.up.shape[1] != low.down.shape[0]:
                    lines.append(f"{name}: {list(state[name].shape)} in the instruct end, {shape} in the adapter")
        return lines

    def unties(self, model: PreTrainedModel) -> bool:
        """Whether it changes an embedding or a head that are one tensor in the model, and so makes them two."""
        return not _head_and_embedding(model).isdisjoint(self.names)

    def tensors(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor | LowRank]]:
        """Yields what differs from the base, by the parameter's name: whole tensors and low-rank differences.

        `model` is the base.
        """
        for name in self.names:
            yield name, self.end(name, model) if self._is_whole(name, model) else self._difference(name, model)

    def apply(self, model: PreTrainedModel) -> None:
        """Puts it into the base, whose parameters it changes."""
        state = model.state_dict(keep_vars=True)
        for name in self.names:
            state[name].data = self.end(name, model)

    def low_rank(self, name: str, model: PreTrainedModel) -> LowRank | None:
        """Returns its difference to the base's matrix, of rank 0 if it does not change it; None if that is whole."""
        if self._is_whole(name, model) or model.get_parameter(name).dim() != 2:
            return None
        if name in self.factors:
            return self._difference(name, model)
        weight = _in_rows(model, name)
        return LowRank(weight.new_empty(0, weight.shape[1]), weight.new_empty(len(weight), 0))

    def end(self, name: str, model: PreTrainedModel) -> Tensor:
        """Returns what it makes of a parameter of the base, in its shape and dtype.

        DoRA's weight is m · V / ‖V‖ with V = base + up · down, where m and ‖V‖ are of each output.
        """
        base = model.get_parameter(name).detach()
        whole = self.whole.get(name, base).to(base)
        if name not in self.factors:
            return whole
        low = self._difference(name, model)
        rows = (whole.t() if isinstance(_holder(model, name), Conv1D) else whole).float()
        value = torch.addmm(rows, low.up.to(rows), low.down.to(rows))
        if name in self.magnitudes:
            of_outputs = 0 if "embedding_A" in self.factors[name] else 1
            norm = value.norm(dim=of_outputs, keepdim=True)
            value *= self.magnitudes[name].to(rows).view_as(norm) / norm
        if isinstance(_holder(model, name), Conv1D):
            value = value.t()
        return value.to(base.dtype).contiguous()

    def _is_whole(self, name: str, model: PreTrainedModel) -> bool:
        if name in self.magnitudes or name not in self.factors:
            return name in self.magnitudes or name in self.whole
        base = model.get_parameter(name).detach()
        return name in self.whole and not torch.equal(self.whole[name].to(base), base)

    def _difference(self, name: str, model: PreTrainedModel) -> LowRank:
        """Returns up · down, in the layout [outputs, inputs].

        PiSSA and OLoRA subtract the adapter's initial state from the base before training. That state is recomputed
        from the base, as PEFT does when it loads such an adapter.
        """
        low = self._low_rank(name)
        if self.config.get("init_lora_weights") not in _SUBTRACTED or "A" not in self.factors[name]:  # an embedding's
            return low
        first = self._first_state(name, model)
        return LowRank(low.down.to(first.up), low.up.to(first.up)).minus(first)

    def _first_state(self, name: str, model: PreTrainedModel) -> LowRank:
        """Returns what was subtracted: PiSSA's part of largest singular values, or OLoRA's first columns of QR."""
        rank = len(self.factors[name]["A"])
        weight = _in_rows(model, name).float()
        if self.config["init_lora_weights"] == "pissa":
            U, S, V = torch.linalg.svd(weight, full_matrices=False)
            return LowRank(V[:rank], U[:, :rank] * S[:rank])
        Q, R = torch.linalg.qr(weight)
        return LowRank(R[:rank], Q[:, :rank] * self._scale(name, rank))

    def _low_rank(self, name: str) -> LowRank:
        """Returns A [R, K] and B [N, R], scaled. For an embedding [V, D], A is [R, V] and B [D, R], so they swap."""
        factors = self.factors[name]
        if "embedding_A" in factors:
            down, up = factors["embedding_B"].t(), factors["embedding_A"].t()
        else:
            down, up = factors["A"], factors["B"]
        return LowRank(down, up * self._scale(name, len(down)))

    def _scale(self, name: str, rank: int) -> float:
        patterns = self.config.get("alpha_pattern") or {}
        module = name.removesuffix(".weight")
        matching = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha = next(matching, self.config["lora_alpha"])
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)


def _stored(directory: Path) -> dict[str, Tensor]:
    """Returns the tensors of an adapter's file; what is pickled is never run."""
    legacy = (directory / LEGACY).exists() and not (directory / WEIGHTS).exists()
    file = directory / (LEGACY if legacy else WEIGHTS)
    try:
        return torch.load(file, map_location="cpu", weights_only=True) if legacy else load_file(file)
    except OSError:
        raise
    except Exception as error:  # torch raises several kinds for a damaged file
        raise ValueError(f"{file} cannot be read: {error}") from error


def _head_and_embedding(model: PreTrainedModel) -> set[str]:
    """Returns the names of the head's and of the embedding's weight where they are tied, else nothing."""
    head, firsts = head_name(model), first_names(model)
    return {head, firsts[head]} if head is not None and firsts.get(head, head) != head else set()


def _holder(model: PreTrainedModel, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _in_rows(model: PreTrainedModel, name: str) -> Tensor:
    """Returns a parameter in the layout [outputs, inputs], that of an embedding as it is."""
    weight = model.get_parameter(name).detach()
    return weight.t() if isinstance(_holder(model, name), Conv1D) else weight
