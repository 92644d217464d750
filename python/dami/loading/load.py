"""Loads a pair of checkpoints: checks both before reading any weight, then reads the second tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import dami.loading.quantizer  # noqa: F401  (registers packed pairs with transformers; raises the error if that fails)
from dami.dial.patch import Origin, patch_of
from dami.estimators.attach import attach
from dami.layers.kinds import LerpConv1D, LerpExperts, LerpLinear
from dami.loading import adapters
from dami.loading.checkpoint import FILES, Checkpoint
from dami.loading.match import Match, vocabulary_tensors
from dami.loading.policies import CONTEXT, ENDS, Choices, End, copy_rope, translated
from dami.patching.model import PairModel
from dami.patching.patch import interpolate, patch_model
from dami.sources import FOLDER, SETTINGS, check_packed
from dami.sources import example_pair as example_pair
from dami_kernels import formats

FILES.append(f"{FOLDER}/*")
DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only")
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
    chat_template: End = "instruct",
    tokenizer: End | None = None,
    rope: End | None = None,
    invariant: bool = False,
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
        instruct: directory, GGUF file or hub name of the λ=0 end; or directory or hub name of a packed pair.
        thinking: likewise for the λ=1 end; or a LoRA adapter on the λ=0 end, as PEFT saves it, which
            `format="lowrank"` keeps unchanged. None if `instruct` is a packed pair.
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
        trust_remote_code: as in `from_pretrained`.
        options: `revision` (one for both ends, or a pair), `token`, `cache_dir`, `force_download` and
            `local_files_only` for downloads; and arguments of `from_pretrained` such as `attn_implementation`,
            including settings of the config. `max_position_embeddings` is the smaller of the ends' unless given.

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
    downloads = downloads_of({name: options.pop(name) for name in DOWNLOAD if name in options}, thinking is not None)
    if thinking is not None and (split := set(PARALLEL) & options.keys()):
        raise ValueError(f"{sorted(split)} need a packed pair, which dami.pack makes of two checkpoints")
    first = Checkpoint.find(instruct, trust_remote_code, downloads[0])
    _check_options(options, first)
    loaded = {"device_map": device_map, "dtype": dtype, **options}
    chosen = [name for name, end in (("tokenizer", tokenizer), ("rope", rope)) if end is not None]
    if chosen and thinking is None:
        raise ValueError(f"{chosen[0]} must be left out of a packed pair, whose ends were resolved when it was packed")
    if thinking is None:
        return _load_packed(first, format, chat_template, invariant, **loaded)
    ends = first, Checkpoint.find(thinking, trust_remote_code, downloads[1])
    if chosen and ends[1].is_adapter:
        raise ValueError(f"{chosen[0]} must be left out with an adapter, which has the {chosen[0]} of its model")
    if ends[1].is_adapter:
        model, tokenizers = _load_adapted(*ends, format or "pair", invariant, **loaded)
        told = with_both_templates(tokenizers, chat_template)
        patch_of(model).origin = Origin([end.parent() for end in ends], tokenizer=told)
    else:
        match = Match.of(*ends, Choices(dtype, tokenizer, rope, options.get(CONTEXT)))
        match.check()
        for difference in match.report.resolved:
            logger.warning(f"{difference}")
        model = _load_two(match, format or "pair", invariant, device_map, options)
        patch_of(model).origin = origin_of(match, chat_template)
    return _with_estimator(model, ends[1]), patch_of(model).origin.tokenizer


def origin_of(match: Match, chat_template: str) -> Origin:
    """Returns what a pair keeps about its two checkpoints."""
    return Origin(
        [end.parent() for end in match.ends],
        tokenizer=with_both_templates(match.tokenizers, chat_template, match.tokenizer),
        differences=match.report.to_dicts(),
        vocabulary=match.lacking,
        sampling=match.sampling,
    )


def _load_two(match: Match, format: str, invariant: bool, device_map: Any, options: Mapping[str, Any]) -> PairModel:
    """Returns the patched model of two matching checkpoints."""
    plain = _loaded(match, 0, device_map=device_map, dtype=match.dtype, **options)
    shared = match.prepare(plain)
    if match.stored[1].complete:
        model = interpolate(plain, _other_end(match, plain), format, invariant=invariant, owned=True)
    else:
        logger.warning(f"{match.ends[1].name} is not stored as the model is: loading it as a second model on the CPU")
        other = _loaded(match, 1, dtype=plain.dtype, **options)
        match.prepare(other)
        _fill(match, plain, other)
        model = patch_model(plain, other, format, invariant=invariant)
    if shared is not None:
        model.dami_patch.shared = shared
    if match.end_ids is not None and "generation_config" not in options:
        model.generation_config.eos_token_id = match.end_ids
    return model


def _loaded(match: Match, end: int, **options: Any) -> PreTrainedModel:
    """Loads an end, with the rotary embedding that the user has chosen."""
    checkpoint, rope = match.ends[end], match.choices.rope
    if rope not in (None, ENDS[end]):
        config = checkpoint.config()
        copy_rope(match.ends[1 - end].config(), config)
        for name in options.keys() - LOADING - {"device_map", "dtype"}:  # beside a config, they would be the model's
            setattr(config, name, options.pop(name))
        options["config"] = config
    return checkpoint.model(**options)


def _other_end(match: Match, plain: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the thinking end by their names in the model, each as long as the model's."""
    state = plain.state_dict(keep_vars=True)
    for name, tensor in match.ends[1].tensors(match.stored[1].names):
        yield name, match.lengthen(name, state[name], tensor)[1]


def _fill(match: Match, plain: PreTrainedModel, other: PreTrainedModel) -> None:
    """Gives each of two loaded models the rows of the vocabulary that only the other has."""
    short, long = (plain, other) if match.sizes[0] < match.sizes[1] else (other, plain)
    rows, states = slice(min(match.sizes), None), (short.state_dict(), long.state_dict())
    for name in vocabulary_tensors(plain) if match.lacking is not None else ():
        states[0][name][rows] = states[1][name][rows].to(states[0][name].device)


def downloads_of(options: Mapping[str, Any], two: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the download options of the instruct end and of the thinking end; TypeError if one is unknown."""
    if unknown := options.keys() - set(DOWNLOAD):
        raise TypeError(f"options must be of {list(DOWNLOAD)}, got {sorted(unknown)}")
    revision = options.get("revision")
    revisions = revision if isinstance(revision, (tuple, list)) else (revision, revision)
    if len(revisions) != 2 or not (two or revisions is not revision):
        raise TypeError(f"revision must be one, or a pair for a pair of checkpoints, got {revision!r}")
    if revision is None:
        return dict(options), dict(options)
    return {**options, "revision": revisions[0]}, {**options, "revision": revisions[1]}


def _check_options(options: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raises TypeError for options that `from_pretrained` would ignore, or that make no sense for two ends."""
    unknown = [name for name in options if name not in LOADING]
    if unknown:
        settings = checkpoint.config().to_dict().keys() - {"quantization_config"}
        unknown = [name for name in unknown if name not in settings]
    if unknown:
        raise TypeError(
            f"options must be settings of the config, or of {sorted({*DOWNLOAD, *LOADING})}, got {unknown}; "
            "what load_pair cannot find by itself, such as a subfolder, download first and name its directory"
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


def with_both_templates(tokenizers: tuple[Tokenizer, Tokenizer], default: str, end: End = "instruct") -> Tokenizer:
    """Returns one end's tokenizer or None, with both ends' chat templates by name if they differ.

    The other end's template gets this tokenizer's names of its special tokens.
    """
    own = ENDS.index(end)
    tokenizer, other = tokenizers[own], tokenizers[1 - own]
    if tokenizer is None or other is None or tokenizer.chat_template == other.chat_template:
        return tokenizer
    templates: dict[str, Any] = {end: tokenizer.chat_template, ENDS[1 - own]: other.chat_template}
    if isinstance(other.chat_template, str):
        templates[ENDS[1 - own]] = translated(other.chat_template, other, tokenizer)
    templates = {name: templates[name] for name in ENDS if templates[name]}
    tokenizer.chat_template = {"default": templates.get(default, next(iter(templates.values()))), **templates}
    return tokenizer
