"""Reads LoRA adapters, as PEFT saves them, to use as the λ=1 end: target = base + up · down."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dami.layers.packed import LowRank
from dami.layers.peft import LORA_FACTOR, UNCHANGED, more_than_lora
from dami.patching.compare import first_names
from dami.sources import ADAPTER

CONFIG, WEIGHTS = ADAPTER, "adapter_model.safetensors"
_SUBTRACTED = ("pissa", "olora")  # initialisations that subtract from the base what can be recomputed


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk.

    Attributes:
        directory: where it is stored.
        config: the contents of its adapter_config.json.
        factors: its A and B tensors, by the name of the parameter they change.
        whole: the tensors it replaces entirely, by the parameter's name.
    """

    directory: Path
    config: dict[str, Any]
    factors: dict[str, dict[str, Tensor]]
    whole: dict[str, Tensor]

    @classmethod
    def read(cls, directory: Path) -> Adapter:
        """Reads the adapter in a directory.

        Raises:
            ValueError: it is not a LoRA, or has parts that are not low-rank differences; they are named.
            OSError: a file is missing.
        """
        config = json.loads((directory / CONFIG).read_text())
        odd = more_than_lora(config)
        initialisation = config.get("init_lora_weights", True)
        if initialisation not in (*UNCHANGED, *_SUBTRACTED):
            odd.append(f"init_lora_weights={initialisation!r}, which has changed the weights under the adapter")
        if odd:
            raise ValueError(
                f"the adapter {directory} must be a plain LoRA, got {', '.join(odd)}: where PEFT can, merge it into "
                "its base with merge_and_unload(), save the model, and give that as the thinking end"
            )
        factors: dict[str, dict[str, Tensor]] = {}
        whole = {}
        for name, tensor in load_file(directory / WEIGHTS).items():
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            match = LORA_FACTOR.fullmatch(name)
            if match:
                kind = (match["embedding"] or "") + match["factor"]
                factors.setdefault(f"{match['module']}.weight", {})[kind] = tensor
            else:
                whole[name] = tensor
        return cls(directory, config, factors, whole)

    def mismatches(self, model: PreTrainedModel) -> list[str]:
        """Returns a line for every tensor of the adapter that does not fit `model`."""
        firsts, state = first_names(model), model.state_dict()
        tied = [first for name, first in firsts.items() if name != first]
        lines = []
        for name in sorted({*self.factors, *self.whole}):
            if name not in state:
                lines.append(f"{name}: in the adapter only")
            elif name in tied or firsts[name] != name:
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

    def tensors(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor | LowRank]]:
        """Yields what differs from the base, by the parameter's name: whole tensors and low-rank differences.

        PiSSA and OLoRA subtract the adapter's initial state from the base before training. That state is recomputed
        from the base, as PEFT does when it loads such an adapter. `model` is the base.
        """
        yield from self.whole.items()
        subtracted = self.config.get("init_lora_weights") in _SUBTRACTED
        for name in self.factors:
            low = self._low_rank(name)
            if subtracted and "A" in self.factors[name]:  # not an embedding's
                first = self._first_state(name, model)
                down, up = (factor.to(first.up) for factor in (low.down, low.up))
                low = LowRank(torch.cat((down, first.down)), torch.cat((up, -first.up), 1))
            yield name, low

    def _first_state(self, name: str, model: PreTrainedModel) -> LowRank:
        """Returns what was subtracted: PiSSA's part of largest singular values, or OLoRA's first columns of QR."""
        holder, rank = model.get_submodule(name.removesuffix(".weight")), len(self.factors[name]["A"])
        weight = model.get_parameter(name).detach().float()
        if isinstance(holder, Conv1D):
            weight = weight.t()
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
