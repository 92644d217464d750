"""Implements `dami.pack`, which packs two checkpoints on disk into a pair on disk, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import convert_file_size_to_int
from torch import Tensor
from transformers.utils import logging

from dami.estimators.files import copy_estimator
from dami.files import written_whole
from dami.layers.base import LerpModule
from dami.layers.kinds import kinds_of, readers, stored_format
from dami.layers.obstacles import obstacles, unread
from dami.loading.checkpoint import Checkpoint
from dami.loading.joining import Joining, base_of, origin_of, with_both_templates
from dami.loading.load import load_pair
from dami.loading.match import Match
from dami.loading.policies import CONTEXT, Choices, End, main_dtype, wider_dtype
from dami.loading.remote import left_on_hub
from dami.loading.shards import Shards
from dami.patching.compare import first_names
from dami.saving.config import PackedConfig, by_pattern
from dami.saving.directory import write_pair
from dami.saving.model_card import write_model_card
from dami.sources import OPTIONS, THINKING, per_end, read_object
from dami_kernels import LerpWeight, formats
from dami_kernels.weight import FLOAT_DTYPES

SHARD_SIZE = "1GiB"  # a shard is held in memory until it is written
CARRIED = ("*.py", "LICENSE*", "generation_config.json", "*processor_config.json")  # of the instruct end, copied

T = TypeVar("T")

logger = logging.get_logger(__name__)


def pack(
    instruct: str | Path,
    thinking: str | Path,
    directory: str | Path,
    format: str = "int4",
    *,
    overwrite: bool = False,
    stream: bool = False,
    resume: bool = False,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    max_shard_size: int | str = SHARD_SIZE,
    shard_bytes: int | None = None,
    dtype: torch.dtype | str = "auto",
    tokenizer: End | None = None,
    rope: End | None = None,
    max_position_embeddings: int | None = None,
    **options: Any,
) -> Path:
    """Packs two checkpoints of one architecture into one directory, which `dami.load_pair` loads, and returns it.

    Tensors are read one at a time from the memory-mapped files of both ends, so memory holds at most one shard of the
    output. The directory is written under a temporary name and renamed at the end. An interrupted run leaves
    DIRECTORY.partial, which the next run removes, or goes on from.

    Args:
        instruct, thinking: as in `load_pair`. Checkpoints that cannot be read tensor by tensor (GGUF, an adapter) are
            loaded first, with a warning; both ends are then in memory.
        directory: the directory to write; it must be empty or not exist.
        format: how embeddings and linear weights are stored, a name of `dami_kernels.formats.names()`.
        overwrite: whether to replace an existing directory.
        stream: whether to leave the weights on the hub and read each tensor from there. Neither checkpoint is then on
            disk. A connection that breaks is made again.
        resume: whether to keep the finished files if the run is interrupted, and to go on from those that an earlier
            run of the same ends and arguments has left.
        base: as in `load_pair`.
        trust_remote_code: as in `from_pretrained`.
        max_shard_size: maximum size of a file, unless a single weight is larger: bytes, or a string such as "1GB".
        shard_bytes: the old name of `max_shard_size`.
        dtype, tokenizer, rope, max_position_embeddings: as in `load_pair`. The pair records what was resolved.
        options: options of the checkpoints, as in `load_pair`: `revision`, `token`, `cache_dir`, `force_download`,
            `local_files_only`, `subfolder`, and `thinking_revision` and so on.

    Raises:
        TypeError: an option is unknown.
        ValueError, OSError: as in `load_pair`; or `max_shard_size` is not a size, overwriting the directory would
            remove an end, or it cannot be written; `stream` and the ends cannot be read tensor by tensor; `resume` and
            what an earlier run has left is of other ends or arguments.
        FileExistsError: the directory exists and is not empty.
    """
    formats.get(format)
    directory = Path(directory)
    shard_bytes = shard_bytes or convert_file_size_to_int(max_shard_size)
    options["trust_remote_code"] = trust_remote_code
    own = per_end(unknown := dict(options))
    if unknown:
        raise TypeError(f"options must be of {list(OPTIONS)}, or of these after {THINKING}, got {sorted(unknown)}")
    find = left_on_hub if stream else Checkpoint.at
    ends = find(instruct, own[0]), find(thinking, own[1])
    based = base_of(ends, base, own[0], find)
    choices = Choices(dtype, tokenizer, rope, max_position_embeddings)
    with written_whole(directory, overwrite, [end.path for end in (*ends, based)], resume) as partial:
        joining = Joining.of(ends, based, choices)
        if joining.whole is None and stream:
            raise ValueError(f"stream must be False: {instruct} or {thinking} is not stored as the model is")
        if joining.whole is None:
            logger.warning(f"{instruct} or {thinking} is not stored as the model is: loading both ends first")
            told = {} if max_position_embeddings is None else {CONTEXT: max_position_embeddings}
            options |= {"dtype": choices.dtype, "tokenizer": tokenizer, "rope": rope, **told}
            model, words = load_pair(instruct, thinking, format, base=base, **options)
            write_pair(model, partial, words, shard_bytes)
        else:
            joining.warn()
            packed: dict[str, Any] = {"ends": [end.identity() for end in ends], "format": format}
            packed |= {"max_shard_size": shard_bytes, **{name: str(choice) for name, choice in vars(choices).items()}}
            _pack(joining.whole, partial, format, Shards(partial, shard_bytes, packed))
    return directory


def _pack(match: Match, directory: Path, format: str, shards: Shards) -> None:
    """Writes all files of the packed pair. Peak memory is one shard plus what packing a million weights needs."""
    reader, names, kinds = _Reader(match), list(match.stored[0].headers), _kinds(match)
    lines, idle = obstacles(match.skeleton), unread(match.skeleton)
    doubtful = [name for name in names if name in lines and name not in idle]
    refused = [lines[name] for name in doubtful if not torch.equal(*reader.read(name))]
    if refused:
        raise ValueError(
            "\n  ".join(["these tensors differ between the ends and cannot be interpolated:", *sorted(refused)])
        )
    done = shards.done
    left = logging.tqdm([name for name in names if name not in done], desc=f"Packing {directory.stem}")
    for name, (base, target) in _ahead(reader.read, left):
        kind = kinds[name]
        if kind is None or torch.equal(base, target):
            shards.add(name, None, {name: base})
            continue
        stored = stored_format(format, kind, name, base)
        operands = kind.as_operand(base).contiguous(), kind.as_operand(target).contiguous()
        weight = LerpWeight.pack(*operands, format=stored)
        tensors = zip(formats.get(stored).TENSORS, map(kind.as_operand, weight.tensors), strict=True)
        packed = {name + suffix: tensor.contiguous() for suffix, tensor in tensors}
        shards.add(name, stored, packed, *error_of(weight, operands[1]))
    shards.write()

    firsts, interpolated = first_names(match.skeleton), shards.interpolated
    by_name = {name: interpolated[first] for name, first in firsts.items() if first in interpolated}
    weights = sum(match.skeleton.state_dict()[name].numel() for name in interpolated)
    _describe(match, directory, format, by_pattern(by_name, firsts), shards.error, shards.nbytes, weights)
    shards.close()


def _ahead(read: Callable[[str], T], names: Iterable[str]) -> Iterator[tuple[str, T]]:
    """Yields each name and what is read under it; the next is read meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        coming: tuple[str, Future[T]] | None = None
        for name in names:
            before, coming = coming, (name, pool.submit(read, name))
            if before is not None:
                yield before[0], before[1].result()
        if coming is not None:
            yield coming[0], coming[1].result()


def _describe(
    match: Match,
    directory: Path,
    format: str,
    interpolated: Mapping[str, str],
    error: float,
    nbytes: int,
    weights: int,
) -> None:
    """Writes all files of a packed pair but its weights."""
    origin = origin_of(match.ends, match)
    tokenizer = with_both_templates(match.tokenizers, "instruct", match.tokenizer)
    kept = origin.differences, origin.vocabulary, origin.sampling
    quantization = PackedConfig(format, interpolated, origin.parents, error, *kept)
    instruct = match.ends[0].directory
    for pattern in CARRIED:
        for file in instruct.glob(pattern):
            shutil.copy(file, directory)
    copy_estimator(match.ends[1].directory, directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if match.end_ids is not None:
        generation = match.ends[0].generation()
        generation.eos_token_id = match.end_ids
        generation.save_pretrained(directory)
    config, before = read_object(instruct / "config.json"), match.ends[0].config().to_dict()
    changed = {key: value for key, value in match.config.to_dict().items() if value != before.get(key)}
    if "rope_parameters" in changed:  # old names of the same settings
        config = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    config |= changed | {"quantization_config": quantization.to_dict()}
    own = config.pop("torch_dtype", None) or config.get("dtype") or main_dtype(match.stored[0].headers)
    config["dtype"] = str(own if match.dtype == "auto" else match.dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_model_card(directory, quantization, nbytes, weights, tokenizer)


def _kinds(match: Match) -> dict[str, type[LerpModule] | None]:
    """Returns, by tensor name, the kind of module that reads the tensor; None if it cannot be interpolated."""
    kinds = readers(kinds_of(match.skeleton, on_meta=True))
    state = match.skeleton.state_dict(keep_vars=True)
    return {name: kinds[id(tensor)] if tensor.dtype in FLOAT_DTYPES else None for name, tensor in state.items()}


class _Reader:
    """Reads the tensors of both ends by their names in the model, alike in dtype and length."""

    def __init__(self, match: Match) -> None:
        self.match = match
        self.mains = [main_dtype(stored.headers) for stored in match.stored]

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns a tensor of both ends: as views of their files if they need no change."""
        ends = zip(self.match.ends, self.match.stored, strict=True)
        base, target = (stored.read(end, name) for end, stored in ends)
        dtype = self._dtype(name)
        if dtype is not None:
            base, target = base.to(dtype), target.to(dtype)
        return self.match.lengthen(name, base, target)

    def _dtype(self, name: str) -> torch.dtype | None:
        """Returns the dtype to store a floating tensor in; None for any other, which stays as it is.

        That is the one asked for, or else the wider of the ends'. What both ends keep wider than their other weights,
        such as a router, is not narrowed.
        """
        own = [stored.headers[name][1] for stored in self.match.stored]
        wider = getattr(torch, wider_dtype(*own) or "")
        if not wider.is_floating_point:
            return None
        asked = self.match.choices.dtype
        special = all(each != main for each, main in zip(own, self.mains, strict=True))
        return wider if asked == "auto" or special or isinstance(asked, str) else asked


def error_of(weight: LerpWeight, target: Tensor) -> tuple[float, float]:
    """Returns the squared Frobenius norms of the stored λ=1 end's error and of that end; zeros if it is exact."""
    lost = whole = 0.0
    if weight.format != "pair":
        for rows, _, kept in formats.float_blocks(weight.format, weight.tensors, weight.shape[-1]):
            exact = target[rows].float()
            lost += (kept - exact).square_().sum().item()
            whole += exact.square().sum().item()
    return lost, whole
