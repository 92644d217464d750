"""Reads a checkpoint on disk: its config, and the headers and tensors of its files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from dami.loading import adapters
from dami.patching.compare import Header, first_names
from dami.patching.ties import TIES
from dami.sources import local
from dami.upstream import ignored_keys, ties_of

FILES = ["model*.safetensors", adapters.WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja", "*.py", "README.md"]


LEGACY_FILES = ["pytorch_model*.bin", adapters.LEGACY]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        directory: where its files are.
        name: its name on the hub, or the name of its directory or file.
        gguf: name of its GGUF file, None for any other checkpoint.
        trust_remote_code: whether its own modelling code may run.
        download: download options, those named in `sources.DOWNLOAD`.
    """

    directory: Path
    name: str
    gguf: str | None = None
    trust_remote_code: bool = False
    download: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def find(
        cls, source: str | Path, trust_remote_code: bool = False, download: Mapping[str, Any] | None = None
    ) -> Checkpoint:
        """Finds the checkpoint in a directory, a GGUF file or a hub repository, and downloads it if necessary.

        Args:
            source: where it is.
            trust_remote_code: whether its own modelling code may run.
            download: download options, and the `subfolder` of the directory or repository that it is in.
        """
        download = dict(download or {})
        subfolder = download.pop("subfolder", None) or ""
        path = local(source, subfolder)
        if path is not None and path.is_file():
            return cls(path.parent, path.name, path.name, trust_remote_code, download)
        if path is not None:
            return cls(path, path.resolve().name, None, trust_remote_code, download)
        name = f"{source}/{subfolder}".rstrip("/")
        for files in (FILES, LEGACY_FILES):
            patterns = [f"{subfolder}/{pattern}".lstrip("/") for pattern in files]
            directory = Path(snapshot_download(str(source), allow_patterns=patterns, **download), subfolder)
            if any(directory.glob("*.safetensors")):
                break
        if subfolder and not directory.is_dir():
            raise OSError(f"there is no checkpoint {name}")
        return cls(directory, name, None, trust_remote_code, download)

    @classmethod
    def at(cls, source: str | Path, options: Mapping[str, Any]) -> Checkpoint:
        """Finds a checkpoint as `find` does, with the options that `sources.per_end` returns for it."""
        download = {name: value for name, value in options.items() if name != "trust_remote_code"}
        return cls.find(source, bool(options.get("trust_remote_code")), download)

    @property
    def path(self) -> Path:
        """Its directory, or its GGUF file."""
        return self.directory / self.gguf if self.gguf else self.directory

    @property
    def _where(self) -> dict[str, Any]:
        gguf = {"gguf_file": self.gguf} if self.gguf else {}
        # The config may refer to code in another repository, to which the revision does not apply.
        download = {name: value for name, value in self.download.items() if name != "revision"}
        return {"trust_remote_code": self.trust_remote_code, **gguf, **download}

    @property
    def is_adapter(self) -> bool:
        """Whether it is a LoRA adapter rather than a whole model."""
        return (self.directory / adapters.CONFIG).exists()

    def config(self) -> PreTrainedConfig:
        if self.is_adapter:
            raise ValueError(
                f"instruct must be a whole checkpoint, got the adapter {self.directory}: name the checkpoint that it "
                "was trained on, and the adapter as the thinking end"
            )
        return AutoConfig.from_pretrained(self.directory, **self._where)

    def parent(self) -> dict[str, str | None]:
        """Returns its name and the licence stated in its model card."""
        card = self.directory / "README.md"
        data = ModelCard.load(card, ignore_metadata_errors=True).data if card.exists() else None
        return {"name": self.name, "license": data and (data.get("license_name") or data.get("license"))}

    def skeleton(self) -> PreTrainedModel:
        """Returns its model without the weights."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config(), trust_remote_code=self.trust_remote_code)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Returns its tokenizer, or None if it has none."""
        if self.gguf is None and not any(self.directory.glob("*token*")):
            return None
        return AutoTokenizer.from_pretrained(self.directory, **self._where)

    def model(self, **options: Any) -> PreTrainedModel:
        """Loads the checkpoint with transformers; ValueError if that would leave a parameter randomly initialised."""
        if self.gguf and hasattr(transformers, "GgufConfig"):  # newer versions may keep the file's blocks
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            self.directory, output_loading_info=True, **self._where, **options
        )
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(
                f"{self.directory} lacks {len(info['missing_keys'])} tensors: {sorted(info['missing_keys'])}"
            )
        return model.eval()

    def has_own_head(self, skeleton: PreTrainedModel) -> bool:
        """Returns whether its head is untied: by its config or, as in transformers, by stored weights that differ."""
        if not getattr(self.config(), TIES, False):
            return True
        files = {name: file for file in self.files() for name in headers_in(file)}
        prefix = f"{skeleton.base_model_prefix}."
        for tied in ties_of(skeleton).items():
            both = [next((n for n in (name, name.removeprefix(prefix)) if n in files), None) for name in tied]
            if all(both):
                tensors = []
                for name in filter(None, both):
                    with safe_open(files[name], framework="pt") as file:
                        tensors.append(file.get_tensor(name))
                if not torch.equal(*tensors):
                    return True
        return False

    def files(self) -> dict[Path, list[str] | None]:
        """Returns its safetensors files, each with the tensor names its index lists, or None without an index."""
        index = self.directory / "model.safetensors.index.json"
        if not index.exists():
            single = self.directory / "model.safetensors"
            return {single: None} if single.exists() and self.gguf is None else {}
        files: dict[Path, list[str] | None] = {}
        for name, file in json.loads(index.read_text())["weight_map"].items():
            files.setdefault(self.directory / file, []).append(name)  # type: ignore[union-attr]
        return files

    def headers(self) -> dict[str, Header]:
        """Returns shape and dtype of every stored tensor by name, from file headers only; {} if not in safetensors.

        Raises:
            ValueError: files are missing or corrupt, or lack tensors that the index lists; all are named.
        """
        headers: dict[str, Header] = {}
        faults = []
        for file, promised in self.files().items():
            if not file.exists():
                faults.append(f"{file} is missing, the index names it")
                continue
            try:
                found = headers_in(file)
            except (SafetensorError, OSError) as error:
                faults.append(f"{file} is corrupt: {error}")
                continue
            headers |= found
            if absent := set(promised or ()) - found.keys():
                faults.append(f"{file} lacks {sorted(absent)}, which the index promises")
        if faults:
            raise ValueError("\n  ".join([f"the checkpoint {self.directory} is damaged:", *faults]))
        return headers

    def tensors(self, names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """Yields the stored tensors one at a time, as views of their files on the CPU, under their model names."""
        with logging.tqdm(total=len(names), desc=f"Reading {self.directory.name}") as bar:
            for file in self.files():
                with safe_open(file, framework="pt") as tensors:
                    for name in names.keys() & set(tensors.keys()):
                        yield names[name], tensors.get_tensor(name)
                        bar.update()


DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def headers_in(file: Path) -> dict[str, Header]:
    """Returns shape and dtype of every tensor in a safetensors file by name, from the file's header only."""
    with safe_open(file, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
        return {
            name: (list(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype()))
            for name, part in slices.items()
        }


@dataclass(frozen=True)
class StoredTensors:
    """How a checkpoint's stored tensors map to the tensors of the model.

    Attributes:
        names: each tensor's name in the model, by stored name; tied tensors appear once, under the first's name.
        headers: shape and dtype by the name in the model.
        strangers: shape and dtype of tensors unknown to the model, by stored name.
        complete: whether every tensor of the model is stored.
    """

    names: dict[str, str]
    headers: dict[str, Header]
    strangers: dict[str, Header]
    complete: bool

    @classmethod
    def of(cls, skeleton: PreTrainedModel, headers: Mapping[str, Header]) -> StoredTensors:
        """Finds each stored tensor in the model, with or without the base model's prefix."""
        firsts = first_names(skeleton)
        prefix = f"{skeleton.base_model_prefix}."
        ignored = re.compile("|".join(ignored_keys(skeleton) or ["(?!)"]))
        found: dict[str, str] = {}  # stored names by the model's
        strangers = {}
        for name, header in headers.items():
            known = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in firsts), None)
            if known is not None and (known == firsts[known] or firsts[known] not in found):
                found[firsts[known]] = name  # for tied tensors, the first, as in transformers
            elif known is None and not ignored.search(name):
                strangers[name] = header
        return cls(
            names={name: known for known, name in found.items()},
            headers={known: headers[name] for known, name in found.items()},
            strangers=strangers,
            complete=found.keys() == set(firsts.values()),
        )
