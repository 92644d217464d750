"""Loads a pair of checkpoints: checks both before reading any weight, then reads the second tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

import dami.loading.quantizer  # noqa: F401  (registers packed pairs with transformers; raises the error if that fails)
from dami.dial.patch import Origin, patch_of
from dami.estimators.attach import attach
from dami.layers.kinds import LerpConv1D, LerpExperts, LerpLinear
from dami.loading import adapters
from dami.loading.checkpoint import FILES, Checkpoint
from dami.loading.match import Match
from dami.patching.model import PairModel
from dami.patching.patch import interpolate, patch_model
from dami.sources import DOWNLOAD as DOWNLOAD
from dami.sources import FOLDER, OPTIONS, SETTINGS, THINKING, check_packed, per_end
from dami.sources import example_pair as example_pair
from dami_kernels import formats

FILES.append(f"{FOLDER}/*")
PARALLEL = ("distributed_config", "tp_plan", "tp_size", "device_mesh")
LOADING = {  # options of `from_pretrained` that mean the same for a pair; any setting of the config is allowed too
    *("attn_implementation", "experts_implementation", "max_memory", "offload_folder", "offload_buffers"),
    *("low_cpu_mem_usage", "use_safetensors", "weights_only", "disable_mmap", "generation_config"),
    *("use_kernels", "allow_all_kernels", "kernel_config", *PARALLEL),
}

Tokenizer = PreTrainedTokenizerBase | Any  # None if the instruct end has none; Any spares most callers the check

logger = logging.get_logger(__name__)


def load_pair(
    instruct: str | Path,
    thinking: str | Path | None = None,
    format: str | None = None,
    *,
    device_map: Any = None,
    dtype: torch.dtype | str = "auto",
    chat_template: Literal["instruct", "thinking"] = "instruct",
    invariant: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[PairModel, Tokenizer]:
    """Loads two checkpoints of one architecture as one patched model, with the instruct end's tokenizer.

    The instruct end is loaded as usual. The thinking end is read tensor by tensor, each directly to the device and
    dtype of its base, so there is never a third copy. Before any weight is read, the configs, tokenizers and weight
    file headers of both ends are compared, and one error reports every mismatch.

    With one argument, it loads a packed pair that `dami.pack` or `dami.save_pair` wrote, in the pair's own format.

    If the packed pair or the thinking end has an `intensity` folder written by `dami train-estimator`, its estimator
    and presets are attached.

    Args:
        instruct: directory, GGUF file or hub name of the λ=0 end; or directory or hub name of a packed pair.
        thinking: likewise for the λ=1 end; or a LoRA adapter on the λ=0 end, as PEFT saves it, which
            `format="lowrank"` keeps unchanged. None if `instruct` is a packed pair.
        format: how embeddings and linear weights are stored, a name of `dami_kernels.formats.names()`. None means
            `"pair"`, or a packed pair's own format.
        device_map: as in transformers' `from_pretrained`. None means the CPU. Only a packed pair can be offloaded.
        dtype: as in `from_pretrained`. "auto" means the dtype of the checkpoints, which must then agree.
        chat_template: the end whose chat template the tokenizer uses by default. If the templates differ, you can
            choose either by name: `tokenizer.apply_chat_template(…, chat_template="thinking")`.
        invariant: as in `patch_model`.
        trust_remote_code: as in `from_pretrained`.
        options: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` and `subfolder`, as in
            `from_pretrained`. They and `trust_remote_code` hold for both ends; with `thinking_` before the name, such
            as `thinking_revision`, for the thinking end instead. And other arguments of `from_pretrained`, such as
            `attn_implementation`, including settings of the config.

    Returns:
        (model, tokenizer): the model as `dami.patch_model` returns it, in evaluation mode; the tokenizer is None if the
        instruct end has none.

    Raises:
        TypeError: an option is unknown, or not supported for a pair.
        ValueError: the ends do not match, a shard is missing, a file is corrupt, or a tensor that differs cannot be
            interpolated. The message names them all.
        OSError: the directory, file or hub name does not exist.
    """
    if chat_template not in ("instruct", "thinking"):
        raise ValueError(f"chat_template must be 'instruct' or 'thinking', got {chat_template!r}")
    formats.get(format or "pair")
    own = per_end(options := {"trust_remote_code": trust_remote_code, **options}, thinking is not None)
    if thinking is not None and (split := set(PARALLEL) & options.keys()):
        raise ValueError(f"{sorted(split)} need a packed pair, which dami.pack makes of two checkpoints")
    first = Checkpoint.at(instruct, own[0])
    _check_options(options, first)
    loaded = {"device_map": device_map, "dtype": dtype, **options}
    if thinking is None:
        return _load_packed(first, format, chat_template, invariant, **loaded)
    ends = first, Checkpoint.at(thinking, own[1])
    if ends[1].is_adapter:
        model, tokenizers = _load_adapted(*ends, format or "pair", invariant, **loaded)
    else:
        match = Match.of(*ends, dtypes=dtype == "auto")
        plain, tokenizers = ends[0].model(**loaded), match.tokenizers
        if match.stored[1].complete:
            tensors = ends[1].tensors(match.stored[1].names)
            model = interpolate(plain, tensors, format or "pair", invariant=invariant, owned=True)
        else:
            logger.warning(f"{thinking} is not stored as the model is: loading it as a second model on the CPU first")
            other = ends[1].model(dtype=plain.dtype, **options)
            model = patch_model(plain, other, format or "pair", invariant=invariant)
    tokenizer = with_both_templates(tokenizers, chat_template)
    patch_of(model).origin = Origin([end.parent() for end in ends], tokenizer=tokenizer)
    return _with_estimator(model, ends[1]), tokenizer


def _check_options(options: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raises TypeError for options that `from_pretrained` would ignore, or that make no sense for two ends."""
    unknown = [name for name in options if name not in LOADING]
    if unknown:
        settings = checkpoint.config().to_dict().keys() - {"quantization_config"}
        unknown = [name for name in unknown if name not in settings]
    if unknown:
        raise TypeError(
            f"options must be settings of the config, or of {sorted({*OPTIONS, *LOADING})}, got {unknown}; "
            f"those of checkpoints hold for the thinking end alone as {THINKING}revision and so on"
        )


def _with_estimator(model: PairModel, where: Checkpoint) -> PairModel:
    """Attaches the estimator and presets stored next to the weights, if there are any, and returns the model."""
    directory = where.directory / FOLDER
    return attach(model, directory) if (directory / SETTINGS).exists() else model


def _load_packed(
    pair: Checkpoint, format: str | None, chat_template: str, invariant: bool, **options: Any
) -> tuple[PairModel, Tokenizer]:
    """Does what `load_pair` does for a packed pair."""
    check_packed(pair.path, format)
    model, tokenizer = cast(PairModel, pair.model(**options)), pair.tokenizer()
    if tokenizer is not None and isinstance(tokenizer.chat_template, dict):
        templates = tokenizer.chat_template
        templates["default"] = templates.get(chat_template, templates["default"])
    patch_of(model).running.invariant = invariant
    for module in model.modules():
        if isinstance(module, (LerpLinear, LerpConv1D, LerpExperts)) and invariant:
            module.lerp.settings["invariant"] = True
    patch_of(model).origin.tokenizer = tokenizer
    return _with_estimator(model, pair), tokenizer


def _load_adapted(
    instruct: Checkpoint, thinking: Checkpoint, format: str, invariant: bool, **options: Any
) -> tuple[PairModel, tuple[Tokenizer, Tokenizer]]:
    """Returns the model and both tokenizers if the λ=1 end is a LoRA adapter on the λ=0 end."""
    adapter = adapters.Adapter.read(thinking.directory)
    mismatches = adapter.mismatches(instruct.skeleton())
    if mismatches:
        raise ValueError("\n  ".join([f"{instruct.directory} and {thinking.directory} do not match:", *mismatches]))
    plain = instruct.model(**options)
    model = interpolate(plain, adapter.tensors(plain), format, invariant=invariant, owned=True)
    return model, (instruct.tokenizer(), thinking.tokenizer())


def with_both_templates(tokenizers: tuple[Tokenizer, Tokenizer], default: str) -> Tokenizer:
    """Returns the instruct end's tokenizer or None, with both ends' chat templates by name if they differ."""
    tokenizer, other = tokenizers
    if tokenizer is not None and other is not None and tokenizer.chat_template != other.chat_template:
        templates = {"instruct": tokenizer.chat_template, "thinking": other.chat_template}
        templates = {name: template for name, template in templates.items() if template}
        tokenizer.chat_template = {"default": templates.get(default, next(iter(templates.values()))), **templates}
    return tokenizer
