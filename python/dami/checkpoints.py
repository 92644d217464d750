"""Loading a pair of checkpoints: both are checked before any weight is read, the second is read tensor by tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from dami import adapters
from dami.patching import (
    Header,
    config_mismatches,
    first_names,
    headers_of,
    interpolate,
    patch_model,
    tensor_mismatches,
)
from dami_kernels import formats

FILES = ["model*.safetensors", adapters.WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja"]
LEGACY_FILES = ["pytorch_model*.bin"]

logger = logging.get_logger(__name__)


def example_pair() -> tuple[Path, Path]:
    """Directories of the pair that ships with dami: its instruct end and its thinking end."""
    pair = Path(__file__).parent / "data" / "pair"
    return pair / "instruct", pair / "thinking"


def load_pair(
    instruct: str | Path,
    thinking: str | Path,
    format: str = "pair",
    *,
    device_map: Any = None,
    dtype: torch.dtype | str = "auto",
    chat_template: Literal["instruct", "thinking"] = "instruct",
    invariant: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """Loads two checkpoints of one architecture as one patched model, with the instruct end's tokenizer.

    The instruct end is loaded as usual; the thinking end is read tensor by tensor, each going straight to the device
    and dtype of its base, so that no third copy exists at any time. Everything that does not match is reported at once,
    from the configs, the tokenizers and the headers of the weight files, before any weight is read.

    Args:
        instruct: directory, GGUF file or hub name of the λ=0 end.
        thinking: likewise of the λ=1 end; or a LoRA adapter on the λ=0 end, as PEFT saves it, which `format="lowrank"`
            keeps as it is.
        format: how embeddings and linear weights are stored, a name of `dami_kernels.formats.names()`.
        device_map: as in transformers' `from_pretrained`. The CPU if None.
        dtype: as there; "auto" is the dtype of the checkpoints, which then must agree.
        chat_template: the end whose chat template the tokenizer gets.
        invariant: as in `patch_model`.
        options: any other arguments of `from_pretrained`, such as `attn_implementation`.

    Returns:
        (model, tokenizer): the model as `dami.patch_model` returns it, in evaluation mode; the tokenizer is None if the
        instruct end comes without one.

    Raises:
        ValueError: the ends do not match, a shard is missing, a file is corrupt, or a tensor that differs cannot be
            interpolated; the message names them all.
        OSError: there is no such directory, file or hub name.
    """
    if chat_template not in ("instruct", "thinking"):
        raise ValueError(f"chat_template must be 'instruct' or 'thinking', got {chat_template!r}")
    formats.get(format)
    ends = (Checkpoint.find(instruct), Checkpoint.find(thinking))
    if (ends[1].directory / adapters.CONFIG).exists():
        loaded = {"device_map": device_map, "dtype": dtype, **options}
        return _load_adapted(*ends, format, chat_template, invariant, **loaded)
    configs = [end.config() for end in ends]
    tokenizers = [end.tokenizer() for end in ends]
    skeleton = _skeleton(configs[0])
    headers = [end.headers() for end in ends]
    stored = [Stored.of(skeleton, header) for header in headers]

    mismatches = config_mismatches(*configs) + vocabulary_mismatches(*tokenizers)
    if configs[0].model_type == configs[1].model_type and headers[1]:
        known = [{**end.headers, **end.strangers} for end in stored]
        if not headers[0]:  # not in safetensors: its shapes are the model's
            shapes = headers_of(skeleton)
            known[0] = {name: shapes[name] for name in first_names(skeleton).values()}
        mismatches += tensor_mismatches(known[0], known[1], dtypes=dtype == "auto" and bool(headers[0]))
        if stored[1].complete:
            both = stored[0].strangers.keys() & stored[1].strangers.keys()
            mismatches += [f"{name}: in both ends, but not in the model" for name in sorted(both)]
    if mismatches:
        raise ValueError("\n  ".join([f"{instruct} and {thinking} do not match:", *mismatches]))

    model = ends[0].model(device_map=device_map, dtype=dtype, **options)
    if stored[1].complete:
        interpolate(model, ends[1].tensors(stored[1].names), format, invariant=invariant, owned=True)
    else:
        logger.warning(f"{thinking} is not stored as the model is: loading it as a second model on the CPU first")
        patch_model(model, ends[1].model(dtype=model.dtype, **options), format, invariant=invariant)
    tokenizer = tokenizers[0]
    if chat_template == "thinking" and tokenizer is not None and tokenizers[1] is not None:
        tokenizer.chat_template = tokenizers[1].chat_template
    return model, tokenizer


def _load_adapted(
    instruct: Checkpoint, thinking: Checkpoint, format: str, chat_template: str, invariant: bool, **options: Any
) -> tuple[Any, Any]:
    """`load_pair` where the λ=1 end is a LoRA adapter on the λ=0 end."""
    adapter = adapters.Adapter.read(thinking.directory)
    mismatches = adapter.mismatches(_skeleton(instruct.config()))
    if mismatches:
        raise ValueError("\n  ".join([f"{instruct.directory} and {thinking.directory} do not match:", *mismatches]))
    model, tokenizer = instruct.model(**options), instruct.tokenizer()
    interpolate(model, adapter.tensors(), format, invariant=invariant, owned=True)
    if chat_template == "thinking" and tokenizer is not None and (own := thinking.tokenizer()) is not None:
        tokenizer.chat_template = own.chat_template
    return model, tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        directory: where its files are.
        gguf: name of its GGUF file, None for any other.
    """

    directory: Path
    gguf: str | None = None

    @classmethod
    def find(cls, source: str | Path) -> Checkpoint:
        """The checkpoint in a directory, a GGUF file or a hub repository, which is downloaded if need be."""
        path = Path(source).expanduser()
        if path.is_file() and path.suffix == ".gguf":
            return cls(path.parent, path.name)
        if path.is_dir():
            return cls(path)
        if path.is_absolute() or str(source).startswith((".", "~")) or path.suffix == ".gguf" or len(path.parts) > 2:
            raise OSError(f"there is no checkpoint {source}")
        directory = Path(snapshot_download(str(source), allow_patterns=FILES))
        if not any(directory.glob("*.safetensors")):
            directory = Path(snapshot_download(str(source), allow_patterns=LEGACY_FILES))
        return cls(directory)

    @property
    def _where(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf} if self.gguf else {}

    def config(self) -> PreTrainedConfig:
        return AutoConfig.from_pretrained(self.directory, **self._where)

    def tokenizer(self) -> Any:
        """Its tokenizer, or None if it comes without one."""
        if self.gguf is None and not any(self.directory.glob("*token*")):
            return None
        return AutoTokenizer.from_pretrained(self.directory, **self._where)

    def model(self, **options: Any) -> PreTrainedModel:
        """The checkpoint as transformers loads it; ValueError if that would leave a parameter at random."""
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            self.directory, output_loading_info=True, **self._where, **options
        )
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(
                f"{self.directory} lacks {len(info['missing_keys'])} tensors: {sorted(info['missing_keys'])}"
            )
        return model.eval()

    def files(self) -> dict[Path, list[str] | None]:
        """Its safetensors files, each with the names its index promises, None where there is no index."""
        index = self.directory / "model.safetensors.index.json"
        if not index.exists():
            single = self.directory / "model.safetensors"
            return {single: None} if single.exists() and self.gguf is None else {}
        files: dict[Path, list[str] | None] = {}
        for name, file in json.loads(index.read_text())["weight_map"].items():
            files.setdefault(self.directory / file, []).append(name)  # type: ignore[union-attr]
        return files

    def headers(self) -> dict[str, Header]:
        """Shape and dtype of every stored tensor by name, from the files' headers only; {} if it is not in safetensors.

        Raises:
            ValueError: files are missing or corrupt, or lack what the index promises; all are named.
        """
        headers: dict[str, Header] = {}
        faults = []
        for file, promised in self.files().items():
            if not file.exists():
                faults.append(f"{file} is missing, the index names it")
                continue
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                        part = tensors.get_slice(name)
                        headers[name] = (list(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype()))
                    absent = set(promised or ()) - set(tensors.keys())
            except (SafetensorError, OSError) as error:
                faults.append(f"{file} is corrupt: {error}")
                continue
            if absent:
                faults.append(f"{file} lacks {sorted(absent)}, which the index promises")
        if faults:
            raise ValueError("\n  ".join([f"the checkpoint {self.directory} is damaged:", *faults]))
        return headers

    def tensors(self, names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors on the CPU, views of their files, one at a time, each under its name in the model."""
        with logging.tqdm(total=len(names), desc=f"Reading {self.directory.name}") as bar:
            for file in self.files():
                with safe_open(file, framework="pt") as tensors:
                    for name in names.keys() & set(tensors.keys()):
                        yield names[name], tensors.get_tensor(name)
                        bar.update()


DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def vocabulary_mismatches(instruct: Any, thinking: Any) -> list[str]:
    """One line if two tokenizers give tokens different ids; an end without a tokenizer matches any."""
    if instruct is None or thinking is None:
        return []
    ends = [tokenizer.get_vocab() for tokenizer in (instruct, thinking)]
    differ = sorted(token for token in ends[0].keys() | ends[1].keys() if ends[0].get(token) != ends[1].get(token))
    if not differ:
        return []
    return [f"tokenizer: {len(differ)} tokens have another id or are in one vocabulary only, such as {differ[:5]}"]


def _skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@dataclass(frozen=True)
class Stored:
    """What a checkpoint's stored tensors are in the model.

    Attributes:
        names: the model's name of each tensor, by the stored name; of tied ones only one, under the first's name.
        headers: shape and dtype by the model's name.
        strangers: shape and dtype of what the model does not know, by the stored name.
        complete: whether every tensor of the model is there.
    """

    names: dict[str, str]
    headers: dict[str, Header]
    strangers: dict[str, Header]
    complete: bool

    @classmethod
    def of(cls, skeleton: PreTrainedModel, headers: Mapping[str, Header]) -> Stored:
        """Finds each stored tensor in the model, with or without the prefix of the base model."""
        firsts = first_names(skeleton)
        prefix = f"{skeleton.base_model_prefix}."
        ignored = re.compile("|".join(skeleton._keys_to_ignore_on_load_unexpected or ["(?!)"]))
        found: dict[str, str] = {}  # stored name by the model's
        strangers = {}
        for name, header in headers.items():
            known = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in firsts), None)
            if known is not None and (known == firsts[known] or firsts[known] not in found):
                found[firsts[known]] = name  # of tied ones the first, as transformers takes it
            elif known is None and not ignored.search(name):
                strangers[name] = header
        return cls(
            names={name: known for known, name in found.items()},
            headers={known: headers[name] for known, name in found.items()},
            strangers=strangers,
            complete=found.keys() == set(firsts.values()),
        )
