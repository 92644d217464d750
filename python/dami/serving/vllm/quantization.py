"""The quantisation method "dami" in vLLM: which weights of a model are a pair, and in which format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from dami.saving.config import any_layer
from dami.serving.vllm import methods, support
from dami.serving.vllm.rows import StepIntensities
from dami.serving.vllm.settings import PairSettings
from dami.sources import QUANT_METHOD

EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?:\d+\.)?(?P<weight>\w+?)(?:\.weight)?")

MERGED = {  # what vLLM merges in models that do not say so
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}


class PairQuantization(QuantizationConfig):
    """The `quantization_config` of a packed pair. Without one, all parameters are pairs, made of two checkpoints.

    Attributes:
        interpolated: as in `dami.saving.config.PackedConfig`; None if all parameters are interpolated.
        settings: the user's settings; set by the loader.
        ranks: ranks of the stored low-rank differences; set by the loader.
        originals: the checkpoint's name of each of its parameters, by vLLM's name.
        rows: the λ of a step; set by the loader before it builds the model.
        states: what "auto" needs, as `states.PromptStates`; or why there is none; set by the loader.
        thoughts: what `thoughts.Thoughts` follows; None until a request needs it.
        stored: the format of every checkpoint parameter that the model keeps as a pair, by vLLM's name.
    """

    rows: StepIntensities

    def __init__(self, interpolated: Mapping[str, str] | None = None) -> None:
        super().__init__()
        support.check_installation()
        self.interpolated = interpolated
        self.settings = PairSettings()
        self.ranks: dict[str, int] = {}
        self.originals: dict[str, str] = {}
        self.stored: dict[str, str] = {}
        self.states: Any = None
        self.thoughts: Any = None

    @staticmethod
    def register() -> None:
        """Registers the method if it is not registered yet."""
        if QUANT_METHOD not in QUANTIZATION_METHODS:
            register_quantization_config(QUANT_METHOD)(PairQuantization)

    @staticmethod
    def of(config: VllmConfig) -> PairQuantization | None:
        """Returns the pair that an engine serves, or None if it serves an ordinary model."""
        return config.quant_config if isinstance(config.quant_config, PairQuantization) else None

    def get_name(self) -> Any:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # the oldest capability that the tests compile the Triton kernels for

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PairQuantization:
        if config.get("vocabulary"):
            raise ValueError(f"both ends of a pair must have one vocabulary in vLLM, got {config['vocabulary']} rows")
        return cls(config["interpolated"])

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Renames the checkpoint's parameters as the model will. vLLM calls it before it builds the layers."""
        self.originals = {
            new: original for known, original in self.originals.items() for new in hf_to_vllm_mapper.apply_list([known])
        }

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            formats = self._of_experts(layer, prefix)
            return methods.ExpertsMethod(layer.moe_config, self.rows, formats) if any(formats.values()) else None
        if not isinstance(layer, (LinearBase, VocabParallelEmbedding)):
            return None
        parts = self.parts(prefix)
        weights, biases = ([f"{part}.{name}" for part in parts] for name in ("weight", "bias"))
        format = self._keep(weights, router=isinstance(layer, GateLinear))
        if format is None and any(map(self.interpolated_as, biases)):  # only a pair's method can add such a bias
            self.stored.update(dict.fromkeys(weights, "pair"))
            format = "pair"
        linear = isinstance(layer, LinearBase)
        if format is None:
            return UnquantizedLinearMethod() if linear else UnquantizedEmbeddingMethod()
        ranks = [self.ranks.get(f"{part}.weight", 0) for part in parts]
        return (methods.LinearMethod if linear else methods.EmbeddingMethod)(self.rows, format, ranks)

    def parts(self, prefix: str) -> list[str]:
        """Returns vLLM's names of the modules in the checkpoint that it has merged into this one, or this one's."""
        parent, _, name = prefix.rpartition(".")
        if f"{prefix}.weight" in self.originals:
            return [prefix]
        merged = {**MERGED, **self.packed_modules_mapping}.get(name, [name])
        return [f"{parent}.{part}" if parent else part for part in merged]

    def is_stored(self, prefix: str) -> bool:
        """Returns whether the checkpoint has the weight of a module by this name, or parts of it."""
        return any(f"{part}.weight" in self.originals for part in self.parts(prefix))

    def _of_experts(self, layer: Any, prefix: str) -> dict[str, str | None]:
        """Returns the formats of the two weights of experts, which the checkpoint may store one by one."""
        down = {layer.ckpt_down_proj_name, "down_proj", "w2_weight"}
        of: dict[str, list[str]] = {"gate_up_proj": [], "down_proj": []}
        for name in self.originals:
            match = EXPERT.fullmatch(name)
            if match and match["experts"] == prefix and not match["weight"].endswith("bias"):
                of["down_proj" if match["weight"] in down else "gate_up_proj"].append(name)
        return {weight: self._keep(names or [f"{prefix}.{weight}"]) for weight, names in of.items()}

    def _keep(self, names: Iterable[str], router: bool = False) -> str | None:
        """Returns the common format of parameters that vLLM merges, and records it; None if their ends are the same."""
        names = list(names)
        if self.interpolated is None:
            format = "pair" if router else self.settings.format or "pair"
        else:
            found = set(filter(None, map(self.interpolated_as, names)))
            if len(found) > 1:
                raise ValueError(f"{', '.join(names)} must be stored in one format to be merged, got {sorted(found)}")
            if not found:
                return None
            format = found.pop()
        self.stored.update(dict.fromkeys(names, format))
        return format

    def interpolated_as(self, name: str) -> str | None:
        """Returns the format of a parameter in a packed pair's files, or None if both ends are the same."""
        interpolated, name = self.interpolated or {}, self.originals.get(name, name)
        return interpolated.get(name) or interpolated.get(any_layer(name))

    def formats(self) -> dict[str, str]:
        """Returns the format in which vLLM keeps each weight whose layer dami created, by the checkpoint's name."""
        return {self.originals.get(name, name): format for name, format in self.stored.items()}
