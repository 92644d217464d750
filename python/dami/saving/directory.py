"""Saves a patched model as one directory, and uploads it to the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dami.dial.patch import patch_of
from dami.estimators.files import FOLDER, StoredIntensity
from dami.files import written_whole
from dami.layers.describe import describe
from dami.layers.peft import refuse_adapters
from dami.saving.config import PackedConfig, by_pattern
from dami.saving.model_card import write_model_card

MAX_SHARD_SIZE = "4GB"


def save_pair(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Writes a patched model as one directory, which `dami.load_pair(directory)` loads, and returns it.

    With dami imported, `AutoModelForCausalLM.from_pretrained(directory)` loads it too. The directory is written under a
    temporary name and renamed at the end.

    Args:
        model: a patched model.
        directory: the directory to write; it must be empty or not exist.
        tokenizer: the pair's tokenizer; by default the one that `load_pair` returned with the model.
        overwrite: whether to replace an existing directory.
        max_shard_size: as in `save_pretrained`.

    Raises:
        TypeError: the model is not patched.
        ValueError: it has an adapter, which would be lost.
        OSError: the directory cannot be written; FileExistsError: it exists and is not empty.
    """
    own = patch_of(model).origin.tokenizer
    _refuse_adapters(model, "save_pair")
    with written_whole(directory, overwrite) as partial:
        write_pair(model, partial, tokenizer or own, max_shard_size)
    return Path(directory)


def write_pair(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Writes a patched model and its tokenizer into a directory."""
    if tokenizer is not None and model.should_save_on_this_rank(True):
        tokenizer.save_pretrained(directory)
    model.save_pretrained(directory, max_shard_size=max_shard_size)


def _refuse_adapters(model: Any, what: str) -> None:
    refuse_adapters(model, what, "save the adapter with PEFT's own save_pretrained, then take it off, unload()")


def save(
    model: Any, directory: str | Path, save_pretrained: Callable[..., None], push_to_hub: bool = False, **options: Any
) -> None:
    """Implements `save_pretrained` of a patched model: adds the pair's config and a model card to the original's."""
    _refuse_adapters(model, "save_pretrained of a pair")
    if push_to_hub:
        raise ValueError("push_to_hub must be False for a patched model: call model.push_to_hub(repo_id)")
    config, before = config_of(model), getattr(model.config, "quantization_config", None)
    model.config.quantization_config = config
    try:
        # Keeps the model's own names: transformers cannot undo a name conversion for the tensors that patching adds.
        save_pretrained(directory, **{"save_original_format": False, **options})
    finally:
        model.config.quantization_config = before
        if before is None:
            del model.config.quantization_config
    if model.should_save_on_this_rank(options.get("is_main_process", True)):
        rows = describe(model).rows
        weights = sum(torch.Size(row.shape).numel() for row in rows if row.interpolated and not row.tied_to)
        nbytes = sum(row.nbytes for row in rows)
        write_model_card(directory, config, nbytes, weights, model.dami_patch.origin.tokenizer)
        patch = model.dami_patch
        if patch.estimator is not None or patch.presets or patch.prompt_tail is not None:
            stored = StoredIntensity(patch.estimator, patch.presets, patch.frontier, patch.prompt_tail)
            stored.save(Path(directory) / FOLDER)


def push(
    model: PreTrainedModel,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    commit_message: str = "Upload a packed pair",
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> CommitInfo:
    """Implements `push_to_hub` of a patched model: uploads what `save_pair` writes, with model card and tokenizer.

    The arguments are those of transformers' `push_to_hub` and of `save_pair`.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        directory = save_pair(model, Path(folder) / "pair", tokenizer, max_shard_size=max_shard_size)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def config_of(model: PreTrainedModel) -> PackedConfig:
    """Returns the `quantization_config` of a patched model."""
    origin, description = patch_of(model).origin, describe(model)
    stored = {row.name: row.format for row in description.rows if row.format is not None}
    interpolated = by_pattern(stored, (row.name for row in description.rows))
    kept = origin.differences, origin.vocabulary, origin.sampling
    return PackedConfig(description.format, interpolated, origin.parents, origin.error, *kept)
