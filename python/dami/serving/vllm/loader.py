"""Loads a pair into a vLLM model: a packed pair, or two checkpoints that are packed while they are read.

vLLM itself maps names, merges and shards: a pair's additional tensors go through the same loaders as its weights.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import set_default_torch_dtype

from dami.loading.checkpoint import headers_in
from dami.patching.compare import Header, config_mismatches, tensor_mismatches
from dami.serving.vllm import runners, self_test, support
from dami.serving.vllm.methods import LAM, NORMS, LinearMethod, PairMethod, adopt, suffix_of
from dami.serving.vllm.quantization import QUANT_METHOD, PairQuantization
from dami.serving.vllm.settings import KEYS, PairSettings
from dami.upstream import parameters_of
from dami.version import __version__
from dami_kernels import LerpWeight, formats

LOAD_FORMATS = ("auto", "hf", "safetensors")


@functools.cache
def install() -> None:
    """Registers our loader for the load formats that pairs come in. It leaves other models to vLLM's loader.

    vLLM warns that its own loader is overwritten, for each format in each process. This silences those warnings.
    """
    log = logging.getLogger(register_model_loader.__module__)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        for load_format in LOAD_FORMATS:
            register_model_loader(load_format)(PairLoader)
    finally:
        log.setLevel(before)


class PairLoader(DefaultModelLoader):
    """vLLM's default loader, extended to pairs."""

    def __init__(self, load_config: LoadConfig) -> None:
        extra = load_config.model_loader_extra_config
        self.own = {key: extra[key] for key in KEYS if key in extra} if isinstance(extra, dict) else {}
        if self.own:
            load_config = copy.copy(load_config)
            load_config.model_loader_extra_config = {key: extra[key] for key in extra.keys() - self.own.keys()}
        super().__init__(load_config)
        self.pair: PairQuantization | None = None

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        self.pair = PairQuantization.of(vllm_config) if model_config.quantization == QUANT_METHOD else None
        if self.pair is None:
            if self.own:
                raise ValueError(
                    f"{', '.join(self.own)} of the loader's extra config need a pair: --quantization {QUANT_METHOD}"
                )
            return super().load_model(vllm_config, model_config, prefix)
        support.check_features(vllm_config)
        self.enable_weights_track = True  # makes vLLM check that every parameter comes from the files
        model = super().load_model(vllm_config, model_config, prefix)
        with set_default_torch_dtype(model_config.dtype):
            self_test.run(model, vllm_config)
        return model

    def create_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        if self.pair is None:
            return super().create_model(vllm_config, model_config, prefix)
        self.pair.settings = settings = PairSettings.of(self.own)
        if (self.pair.interpolated is None) != (settings.thinking is not None):
            needed = "must name the λ=1 end" if settings.thinking is None else "must be left out of a packed pair"
            raise ValueError(f"thinking in --model-loader-extra-config {needed}, got {settings.thinking!r}")
        if settings.format == "lowrank":
            raise ValueError(
                "format cannot be 'lowrank' for two ends: pack them first, with dami pack --format lowrank"
            )
        if "lowrank" in (self.pair.interpolated or {}).values():
            found = self._find(str(model_config.model), model_config.revision)
            down = {name: shape for name, (_, (shape, _)) in found.items() if name.endswith("_down")}
            self.pair.ranks = {name.removesuffix("_down"): shape[0] for name, shape in down.items()}
        # compiled code depends on these values, and vLLM caches it by a hash of the config
        vllm_config.additional_config = {
            **vllm_config.additional_config,
            QUANT_METHOD: [__version__, settings.thinking, settings.format],
        }
        model = super().create_model(vllm_config, model_config, prefix)
        for name, module in model.named_modules():
            if isinstance(module, (LinearBase, VocabParallelEmbedding)):
                method = self.pair.get_quant_method(module, name)
                if isinstance(method, PairMethod) and not isinstance(module.quant_method, PairMethod):
                    adopt(module, method)
            self._add_vectors(name, module, self.pair)
        for module in model.modules():
            if isinstance(module, VocabParallelEmbedding) and getattr(module.quant_method, "tied_to", None) is not None:
                module.quant_method.share(module)
        runners.attach(model, vllm_config, self.pair)
        return model

    def _add_vectors(self, name: str, module: Any, pair: PairQuantization) -> None:
        """Adds the thinking end of the vectors to norms and to linear layers with biases."""
        if type(module) in NORMS and getattr(module, "has_weight", True):
            if not pair.keep_pair([f"{name}.weight"]):
                return
            if getattr(module, "variance_size_override", None) is not None:
                raise ValueError(f"{name} norms a part of its input only, which a pair cannot")
            module.__class__ = NORMS[type(module)]
            module.register_buffer(LAM, pair.rows.tokens, persistent=False)
            vector = "weight"
        elif isinstance(module, LinearBase) and parameters_of(module).get("bias") is not None:
            if not pair.keep_pair([f"{part}.bias" for part in pair.parts(name)]):
                return
            if not isinstance(module.quant_method, LinearMethod) or module.skip_bias_add:
                raise ValueError(f"{name} has a bias that differs between the ends and is not added to its own product")
            vector = "bias"
        else:
            return
        base: Any = parameters_of(module)[vector]
        target = nn.Parameter(base.detach().clone(), requires_grad=False)
        set_weight_attrs(target, dict(vars(base)))
        module.register_parameter(f"{vector}_target", target)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        weights = super().get_all_weights(model_config, model)
        if self.pair is None:
            return weights
        if self.pair.settings.thinking is None:
            tied = {"lm_head.weight"} if model_config.hf_config.tie_word_embeddings else set()
            return packed_weights(weights, self.pair, tied)
        return self._two_ends(weights, model_config, self.pair)

    def _two_ends(
        self, weights: Iterator[tuple[str, Tensor]], model_config: ModelConfig, pair: PairQuantization
    ) -> Iterator[tuple[str, Tensor]]:
        """Packs two checkpoints while reading the first. Raises ValueError beforehand, naming all mismatches."""
        sources = str(model_config.model), str(pair.settings.thinking)
        places = [
            self._find(source, revision)
            for source, revision in zip(sources, (model_config.revision, None), strict=True)
        ]
        tied = {"lm_head.weight"} if model_config.hf_config.tie_word_embeddings else set()
        headers = [{name: place[name][1] for name in place.keys() - tied} for place in places]
        configs = model_config.hf_config, AutoConfig.from_pretrained(sources[1])
        mismatches = config_mismatches(configs[0], configs[1]) + tensor_mismatches(headers[0], headers[1])
        if mismatches:
            remedy = "(dami pack resolves some differences: dami check tells which)"
            raise ValueError("\n  ".join([f"{' and '.join(sources)} do not match:", *mismatches, remedy]))
        for name, base in weights:
            if name not in headers[0]:
                continue
            with safe_open(places[1][name][0], framework="pt") as file:
                target = file.get_tensor(name)
            format = pair.format_of(name)
            if format is not None:
                yield from tensors_of(name, LerpWeight.pack(base.contiguous(), target, format))
            elif base.equal(target):
                yield name, base
            else:
                raise ValueError(f"{name} differs between the ends, and vLLM keeps it where a pair cannot reach it")

    def _find(self, source: str, revision: str | None) -> dict[str, tuple[Path, Header]]:
        """Finds the file and header of each tensor of a checkpoint, which is downloaded from the hub if need be."""
        _, files, safetensors, _ = self._prepare_weights(source, None, revision, False, None)
        if not safetensors:
            raise ValueError(f"{source} must be stored in safetensors to be an end of a pair, got {files}")
        return {name: (Path(file), header) for file in files for name, header in headers_in(Path(file)).items()}


def packed_weights(
    weights: Iterator[tuple[str, Tensor]], pair: PairQuantization, tied: AbstractSet[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a packed pair under vLLM's names.

    A weight that both ends share is made a pair if vLLM merges it with one that differs.

    Raises:
        ValueError: at the end, if a parameter kept as a pair is missing, except for the `tied` ones. vLLM would not
            notice if another part of the same merged weight was loaded.
    """
    awaited, suffixes = set(), formats.suffixes()
    for name in pair.stored.keys() - tied:
        format = pair.interpolated_as(name)
        awaited |= {name + suffix for suffix in (formats.get(format).TENSORS if format else ("",))}
    for name, tensor in weights:
        awaited.discard(name)
        own = next((name.removesuffix(s) for s in suffixes if name.endswith(s) and _stores(pair, name, s)), None)
        format = pair.format_of(own or name)
        if own is not None:
            yield own + suffix_of(name.removeprefix(own)), tensor
        elif format is None or _stores(pair, name, ""):
            yield name, tensor
        else:
            yield from tensors_of(name, LerpWeight.pack(tensor, tensor, format))
    if awaited:
        raise ValueError(f"the packed pair lacks {', '.join(sorted(awaited))}")


def _stores(pair: PairQuantization, name: str, suffix: str) -> bool:
    """Returns whether a stored tensor belongs to an interpolated parameter under this suffix."""
    format = pair.interpolated_as(name.removesuffix(suffix))
    return format is not None and suffix in formats.get(format).TENSORS


def tensors_of(name: str, weight: LerpWeight) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a packed weight under vLLM's names."""
    for suffix, tensor in zip(formats.get(weight.format).TENSORS, weight.tensors, strict=True):
        yield name + suffix_of(suffix), tensor
