"""A patched model as one directory, or as an ordinary checkpoint at one λ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import PreTrainedModel

from dami.dial.patch import patch_of
from dami.estimators.files import FOLDER, StoredIntensity
from dami.files import written_whole
from dami.layers.describe import describe
from dami.layers.peft import refuse_adapters
from dami.saving.config import PairConfig, by_pattern
from dami.saving.model_card import write_model_card

SHARD = "4GB"


def save_pair(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
    max_shard_size: int | str = SHARD,
) -> Path:
    """Writes a patched model as one directory, which `dami.load_pair(directory)` loads, and returns it.

    With dami imported, `AutoModelForCausalLM.from_pretrained(directory)` loads it too. The directory takes its name
    when all is written.

    Args:
        model: a patched model.
        directory: where to; it must not exist, or be empty.
        tokenizer: the pair's; by default the one that `load_pair` returned with the model.
        overwrite: replaces a directory that exists.
        max_shard_size: as in `save_pretrained`.

    Raises:
        TypeError: the model is not patched.
        OSError: the directory cannot be written; FileExistsError: there is one with something in it.
    """
    tokenizer = tokenizer or patch_of(model).origin.tokenizer
    with written_whole(directory, overwrite) as partial:
        write_pair(model, partial, tokenizer, max_shard_size)
    return Path(directory)


def write_pair(
    model: PreTrainedModel, directory: str | Path, tokenizer: Any, max_shard_size: int | str = SHARD
) -> None:
    """Writes a patched model and its tokenizer into a directory."""
    if tokenizer is not None and model.should_save_on_this_rank(True):
        tokenizer.save_pretrained(directory)
    model.save_pretrained(directory, max_shard_size=max_shard_size)


def save(
    model: Any, directory: str | Path, save_pretrained: Callable[..., None], push_to_hub: bool = False, **options: Any
) -> None:
    """`save_pretrained` of a patched model: the original's, and a config that says what is stored, and a model card."""
    refuse_adapters(
        model,
        "save_pretrained of a pair",
        "save the adapter with PEFT's own save_pretrained, then take it off, unload()",
    )
    if push_to_hub:
        raise ValueError("push_to_hub must be False for a patched model: call model.push_to_hub(repo_id)")
    config, before = config_of(model), getattr(model.config, "quantization_config", None)
    model.config.quantization_config = config
    try:
        # its own names: to undo a conversion of names, transformers would have to know of what stands beside them
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
        if patch.estimator is not None or patch.presets:
            StoredIntensity(patch.estimator, patch.presets, patch.frontier).save(Path(directory) / FOLDER)


def push(
    model: PreTrainedModel,
    repo_id: str,
    *,
    tokenizer: Any = None,
    commit_message: str = "Upload a packed pair",
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = SHARD,
) -> Any:
    """`push_to_hub` of a patched model: uploads what `save_pair` writes, model card and tokenizer included.

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


def config_of(model: PreTrainedModel) -> PairConfig:
    """The `quantization_config` of a patched model."""
    origin, description = patch_of(model).origin, describe(model)
    stored = {row.name: row.format for row in description.rows if row.format is not None}
    interpolated = by_pattern(stored, (row.name for row in description.rows))
    return PairConfig(description.format, interpolated, origin.parents, origin.error)
