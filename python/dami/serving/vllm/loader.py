"""Loads a pair into a vLLM model: a packed pair, or two checkpoints that are packed while they are read.

vLLM itself maps names, merges and shards. The model loads once for each tensor of the formats, first all base tensors:
so a pair's additional tensors go through the very code that its weights go through (see `ends.py`).
"""

from __future__ import annotations

import copy
import functools
import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.utils.torch_utils import set_default_torch_dtype

from dami.callers import AUTO
from dami.huge_pages import use_huge_pages
from dami.loading.checkpoint import headers_in
from dami.patching.compare import config_mismatches
from dami.serving.vllm import ends, runners, self_test, support
from dami.serving.vllm.convert import convert
from dami.serving.vllm.files import Files, Located, PackedFiles, Spelling, TwoEnds
from dami.serving.vllm.methods import PairMethod, adopt
from dami.serving.vllm.offers import Offer
from dami.serving.vllm.quantization import QUANT_METHOD, PairQuantization
from dami.serving.vllm.rows import StepIntensities
from dami.serving.vllm.settings import KEYS, PairSettings
from dami.serving.vllm.states import PromptStates
from dami.version import __version__

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
        model = super().load_model(vllm_config, model_config, prefix)
        if vllm_config.device_config.device_type == "cpu":  # a GPU's offloaded weights stay where vLLM has pinned them
            use_huge_pages(model)
        with set_default_torch_dtype(model_config.dtype):
            self_test.run(model, vllm_config)
            self.pair.states = _states(model, vllm_config)
        return model

    def create_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        if self.pair is None:
            return super().create_model(vllm_config, model_config, prefix)
        self.pair.settings = settings = PairSettings.of(self.own)
        Offer.of(vllm_config).check()
        self.files = self._checked_files(model_config, self.pair)
        # compiled code depends on these values, and vLLM caches it by a hash of the config
        vllm_config.additional_config = {
            **vllm_config.additional_config,
            QUANT_METHOD: [__version__, settings.thinking, settings.format],
        }
        self.pair.rows = StepIntensities(vllm_config)  # now, as vLLM builds the parts it leaves out on no device
        model: Any = super().create_model(vllm_config, model_config, prefix)
        if list(getattr(model, "secondary_weights", ())):
            raise ValueError(f"a {type(model).__name__} reads weights from other places, which a pair cannot")
        names: dict[Any, list[str]] = {}  # several of a router that is in its experts, too
        for name, module in model.named_modules(remove_duplicate=False):
            names.setdefault(module, []).append(name)
        for module, own in names.items():
            if isinstance(module, (LinearBase, VocabParallelEmbedding)) and module.weight.dim() == 2:  # no convolution
                method = self.pair.get_quant_method(module, next(filter(self.pair.is_stored, own), own[0]))
                if isinstance(method, PairMethod) and not isinstance(module.quant_method, PairMethod):
                    adopt(module, method)
        for module in model.modules():
            if isinstance(module, VocabParallelEmbedding) and getattr(module.quant_method, "tied_to", None) is not None:
                module.quant_method.share(module)
        runners.attach(model, vllm_config, self.pair)
        return model

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        if self.pair is None:
            return super().load_weights(model, model_config)
        found = ends.find(model)
        for index, weights in enumerate(self.files.passes()):
            with ends.shown(found, index):
                loaded = model.load_weights(weights)
            if index == 0:
                self.track_weights_loading(model, _under_all_names(loaded, model), quantized=True)
        convert(model, found, self.pair.rows)

    def _checked_files(self, model_config: ModelConfig, pair: PairQuantization) -> Files:
        """Finds the files of a pair. Raises ValueError if the settings do not fit it, or two ends do not match."""
        settings = pair.settings
        if (pair.interpolated is None) != (settings.thinking is not None):
            needed = "must name the λ=1 end" if settings.thinking is None else "must be left out of a packed pair"
            raise ValueError(f"thinking in --model-loader-extra-config {needed}, got {settings.thinking!r}")
        if settings.format == "lowrank":
            raise ValueError(
                "format cannot be 'lowrank' for two ends: pack them first, with dami pack --format lowrank"
            )
        base = self._find(str(model_config.model), model_config.revision)
        tied = {"lm_head.weight"} if model_config.hf_config.tie_word_embeddings else set()
        if settings.thinking is None:
            return PackedFiles(base, pair, tied, Spelling(model_config.hf_config))
        revisions = model_config.revision, settings.thinking_revision or model_config.revision
        files = TwoEnds((base, self._find(settings.thinking, revisions[1])), pair, tied, model_config.hf_config)
        configs = [  # as they are stored: vLLM changes its own
            AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=model_config.trust_remote_code)
            for source, revision in zip((model_config.model, settings.thinking), revisions, strict=True)
        ]
        mismatches = config_mismatches(*configs) + files.mismatches()
        if mismatches:
            remedy = "(dami pack resolves some differences: dami check tells which)"
            raise ValueError(
                "\n  ".join([f"{model_config.model} and {settings.thinking} do not match:", *mismatches, remedy])
            )
        return files

    def _find(self, source: str, revision: str | None) -> Located:
        """Finds the file and header of each tensor of a checkpoint, which is downloaded from the hub if need be."""
        _, files, safetensors, _ = self._prepare_weights(source, None, revision, False, None)
        if not safetensors:
            raise ValueError(f"{source} must be stored in safetensors to be an end of a pair, got {files}")
        return {name: (Path(file), header) for file in files for name, header in headers_in(Path(file)).items()}


def _under_all_names(loaded: set[str], model: nn.Module) -> set[str]:
    """Returns the names of parameters that have been loaded, under another name perhaps: some are in two modules."""
    named = [*model.named_parameters(remove_duplicate=False)]
    found = {id(parameter) for name, parameter in named if name in loaded}
    return {name for name, parameter in named if id(parameter) in found}


def _states(model: nn.Module, config: VllmConfig) -> PromptStates | str | None:
    """Returns what "auto" needs: the states of prompts, or why they are not to be had; None without an estimator."""
    offer = Offer.of(config)
    if not offer.layers:
        return None
    try:
        return PromptStates(model, config, offer)
    except ValueError as problem:
        if offer.settings.default_intensity == AUTO:
            raise
        return str(problem)
