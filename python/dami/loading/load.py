"""Loads a pair of checkpoints: checks both before reading any weight, then reads the second tensor by tensor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch

import dami.loading.quantizer  # noqa: F401  (registers packed pairs with transformers; raises the error if that fails)
from dami.dial.patch import patch_of
from dami.layers.kinds import LerpConv1D, LerpExperts, LerpLinear
from dami.loading.checkpoint import FILES, Checkpoint
from dami.loading.joining import Joining, Tokenizer, base_of, with_estimator
from dami.loading.policies import CONTEXT, Choices, End
from dami.patching.model import PairModel
from dami.sources import DOWNLOAD as DOWNLOAD
from dami.sources import FOLDER, OPTIONS, THINKING, check_packed, per_end
from dami.sources import example_pair as example_pair
from dami_kernels import formats

FILES.append(f"{FOLDER}/*")
PARALLEL = ("distributed_config", "tp_plan", "tp_size", "device_mesh")
LOADING = {  # options of `from_pretrained` that mean the same for a pair; any setting of the config is allowed too
    *("attn_implementation", "experts_implementation", "max_memory", "offload_folder", "offload_buffers"),
    *("low_cpu_mem_usage", "use_safetensors", "weights_only", "disable_mmap", "generation_config"),
    *("use_kernels", "allow_all_kernels", "kernel_config", *PARALLEL),
}


def load_pair(
    instruct: str | Path,
    thinking: str | Path | None = None,
    format: str | None = None,
    *,
    device_map: Any = None,
    dtype: torch.dtype | str = "auto",
    chat_template: End = "instruct",
    tokenizer: End | None = None,
    rope: End | None = None,
    invariant: bool = False,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[PairModel, Tokenizer]:
    """Loads two checkpoints of one architecture as one patched model, with the pair's tokenizer.

    The instruct end is loaded as usual. The thinking end is read tensor by tensor, each directly to the device and
    dtype of its base, so there is never a third copy. Before any weight is read, the configs, tokenizers and weight
    file headers of both ends are compared. Differences with a well-defined result are resolved, each with a warning
    (`model.dami_patch.origin.differences` keeps them); one error reports all others.

    With one argument, it loads a packed pair that `dami.pack` or `dami.save_pair` wrote, in the pair's own format.

    If the packed pair or the thinking end has an `intensity` folder written by `dami train-estimator`, its estimator
    and presets are attached.

    Args:
        instruct: directory, GGUF file or hub name of the λ=0 end, or of a LoRA adapter as PEFT saves it, which is put
            into its base; or directory or hub name of a packed pair.
        thinking: likewise for the λ=1 end. A LoRA adapter on the λ=0 end, or on its base, is kept unchanged by
            `format="lowrank"`. None if `instruct` is a packed pair.
        format: how embeddings and linear weights are stored, a name of `dami_kernels.formats.names()`. None means
            `"pair"`, or a packed pair's own format.
        device_map: as in transformers' `from_pretrained`. None means the CPU. Only a packed pair can be offloaded.
        dtype: as in `from_pretrained`. "auto" means the dtype of the checkpoints, the wider one if theirs differ.
        chat_template: the end whose chat template the tokenizer uses by default. If the templates differ, you can
            choose either by name: `tokenizer.apply_chat_template(…, chat_template="thinking")`.
        tokenizer: the end whose tokenizer the pair gets if special tokens of the same ids have other names. None means
            the instruct end's, unless only the thinking end's has tokens that mark a thought.
        rope: the end whose rotary embedding both ends get, if theirs differ. None refuses such a pair.
        invariant: as in `patch_model`.
        base: what the adapters were trained on, if the instruct end is one and the base is not what it names.
        trust_remote_code: as in `from_pretrained`.
        options: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` and `subfolder`, as in
            `from_pretrained`. They and `trust_remote_code` hold for both ends; with `thinking_` before the name, such
            as `thinking_revision`, for the thinking end instead. And other arguments of `from_pretrained`, such as
            `attn_implementation`, including settings of the config. `max_position_embeddings` is the smaller of the
            ends' unless given.

    Returns:
        (model, tokenizer): the model as `dami.patch_model` returns it, in evaluation mode; the tokenizer is None if the
        end that it is taken from has none.

    Raises:
        TypeError: an option is unknown, or not supported for a pair.
        ValueError: the ends differ in a way that no policy resolves, a shard is missing, a file is corrupt, or a tensor
            that differs cannot be interpolated. The message names them all.
        OSError: the directory, file or hub name does not exist.
    """
    if chat_template not in ("instruct", "thinking"):
        raise ValueError(f"chat_template must be 'instruct' or 'thinking', got {chat_template!r}")
    formats.get(format or "pair")
    if options.get("weights_only") is False:
        raise ValueError("weights_only must be True, got False: what is pickled in a .bin file could run any code")
    own = per_end(options := {"trust_remote_code": trust_remote_code, **options}, thinking is not None)
    if thinking is not None and (split := set(PARALLEL) & options.keys()):
        raise ValueError(f"{sorted(split)} need a packed pair, which dami.pack makes of two checkpoints")
    first = Checkpoint.at(instruct, own[0])
    second = None if thinking is None else Checkpoint.at(thinking, own[1])
    if second is None and base is not None:
        raise TypeError("base is for two adapters, got a packed pair: leave it out")
    based = first if second is None else base_of((first, second), base, own[0])
    _check_options(options, based)
    choices = Choices(dtype, tokenizer, rope, options.get(CONTEXT))
    if second is None:
        if chosen := choices.between_ends:
            raise ValueError(
                f"{chosen[0]} must be left out of a packed pair, whose ends were resolved when it was packed"
            )
        return _load_packed(first, format, chat_template, invariant, device_map=device_map, dtype=dtype, **options)
    joining = Joining.of((first, second), based, choices)
    joining.warn()
    plain = joining.load(device_map=device_map, dtype=dtype, options=options)
    model = joining.onto(plain, format or "pair", invariant, options)
    patch_of(model).origin.tokenizer = words = joining.tokenizer(chat_template)
    return model, words


def _check_options(options: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raises TypeError for options that `from_pretrained` would ignore, or that make no sense for two ends."""
    unknown = [name for name in options if name not in LOADING]
    if unknown:
        settings = checkpoint.config().to_dict().keys() - {"quantization_config"}
        unknown = [name for name in unknown if name not in settings]
    if unknown:
        known = sorted({*OPTIONS, *LOADING})
        alike = get_close_matches(unknown[0], [*known, *inspect.signature(load_pair).parameters], 1)
        meant = f"; {unknown[0]} may mean {alike[0]}" if alike else ""
        raise TypeError(
            f"options must be settings of the config, or of {known}, got {unknown}{meant}; "
            f"those of checkpoints hold for the thinking end alone as {THINKING}revision and so on"
        )


def _load_packed(
    pair: Checkpoint, format: str | None, chat_template: str, invariant: bool, **options: Any
) -> tuple[PairModel, Tokenizer]:
    """Does what `load_pair` does for a packed pair."""
    check_packed(pair.path, format)
    pair.check()
    model, tokenizer = cast(PairModel, pair.model(**options)), pair.tokenizer()
    if tokenizer is not None and isinstance(tokenizer.chat_template, dict):
        templates = tokenizer.chat_template
        templates["default"] = templates.get(chat_template, templates["default"])
    patch_of(model).running.invariant = invariant
    for module in model.modules():
        if isinstance(module, (LerpLinear, LerpConv1D, LerpExperts)) and invariant:
            module.lerp.settings["invariant"] = True
    patch_of(model).origin.tokenizer = tokenizer
    return with_estimator(model, pair), tokenizer
