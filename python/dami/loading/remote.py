"""A checkpoint on the hub whose weights stay there: headers, and some rows of a tensor, are read in ranges."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_url, parse_safetensors_file_metadata, snapshot_download
from huggingface_hub.utils import (
    EntryNotFoundError,
    SafetensorsFileMetadata,
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from dami.loading.adapters import CONFIG, LEGACY, WEIGHTS
from dami.loading.checkpoint import DTYPES, FILES, Checkpoint
from dami.patching.compare import Header
from dami.sources import local


@dataclass(frozen=True)
class RemoteCheckpoint(Checkpoint):
    """A checkpoint on the hub, of which only config, tokenizer and index have been downloaded.

    Attributes:
        repository: its name on the hub, without the subfolder.
        subfolder: where in the repository it is.
    """

    repository: str = ""
    subfolder: str = ""

    @cached_property
    def _files(self) -> Mapping[str, SafetensorsFileMetadata]:
        """What the headers tell, by the file's name in the repository; {} if there is no safetensors file."""

        def read(name: str) -> SafetensorsFileMetadata:
            revision, token = self.download.get("revision"), self.download.get("token")
            return parse_safetensors_file_metadata(self.repository, name, revision=revision, token=token)

        index = self.directory / SAFE_WEIGHTS_INDEX_NAME
        if index.exists():
            files = sorted({*json.loads(index.read_text())["weight_map"].values()})
        else:
            files = [SAFE_WEIGHTS_NAME]
        names = [f"{self.subfolder}/{file}".lstrip("/") for file in files]
        try:
            with ThreadPoolExecutor() as pool:
                return dict(zip(names, pool.map(read, names), strict=True))
        except EntryNotFoundError:
            if index.exists():
                raise
            return {}

    @cached_property
    def stored(self) -> dict[str, Header]:
        return {
            name: (list(info.shape), DTYPES.get(info.dtype, info.dtype))
            for file in self._files.values()
            for name, info in file.tensors.items()
        }

    @cached_property
    def _places(self) -> dict[str, Path]:
        return {name: Path(file) for file, found in self._files.items() for name in found.tensors}

    def stored_rows(self, name: str, rows: slice) -> Tensor:
        file = str(self._places[name])
        info = self._files[file].tensors[name]
        dtype = getattr(torch, DTYPES[info.dtype])
        first, last, _ = rows.indices(info.shape[0]) if info.shape else (0, 1, 1)
        shape = [last - first, *info.shape[1:]] if info.shape else []
        row = torch.Size(info.shape[1:]).numel() * dtype.itemsize
        begin = self._data(file) + info.data_offsets[0] + first * row
        read = self._range(file, begin, begin + torch.Size(shape).numel() * dtype.itemsize)
        return torch.frombuffer(bytearray(read), dtype=dtype).view(shape)

    @cached_property
    def _begins(self) -> dict[str, int]:
        return {}

    def _data(self, file: str) -> int:
        """Returns the place in a file where its tensors begin."""
        if file not in self._begins:
            self._begins[file] = 8 + int.from_bytes(self._range(file, 0, 8), "little")
        return self._begins[file]

    def _range(self, file: str, begin: int, end: int) -> bytes:
        url = hf_hub_url(self.repository, file, revision=self.download.get("revision"))
        headers = build_hf_headers(token=self.download.get("token")) | {"Range": f"bytes={begin}-{end - 1}"}
        response = get_session().get(url, headers=headers, follow_redirects=True)
        hf_raise_for_status(response)
        return response.content[: end - begin]


def preview_of(source: str | Path, options: Mapping[str, Any]) -> Checkpoint:
    """Finds a checkpoint as `Checkpoint.at` does, but leaves the weights of a whole one on the hub."""
    download = {name: value for name, value in options.items() if name != "trust_remote_code"}
    trust = bool(options.get("trust_remote_code"))
    subfolder = download.pop("subfolder", None) or ""
    if local(source, subfolder) is not None:
        return Checkpoint.at(source, options)
    name = f"{source}/{subfolder}".rstrip("/")

    def downloaded(files: Iterable[str]) -> Path:
        patterns = [f"{subfolder}/{file}".lstrip("/") for file in files]
        return Path(snapshot_download(str(source), allow_patterns=patterns, **download), subfolder)

    directory = downloaded(pattern for pattern in FILES if not pattern.endswith(".safetensors"))
    if subfolder and not directory.is_dir():
        raise OSError(f"there is no checkpoint {name}")
    if (directory / CONFIG).exists():
        return Checkpoint(downloaded([CONFIG, WEIGHTS, LEGACY]), name, None, trust, download)
    return RemoteCheckpoint(directory, name, None, trust, download, str(source), subfolder)
