"""A checkpoint on the hub whose weights stay there: headers, and some rows of a tensor, are read in ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata, hf_hub_url, snapshot_download
from huggingface_hub.utils import (
    NotASafetensorsRepoError,
    SafetensorsFileMetadata,
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)
from torch import Tensor

from dami.loading.adapters import CONFIG
from dami.loading.checkpoint import DTYPES, FILES, Checkpoint
from dami.patching.compare import Header
from dami.sources import local


@dataclass(frozen=True)
class RemoteCheckpoint(Checkpoint):
    """A checkpoint on the hub, of which only config, tokenizer and index have been downloaded."""

    @cached_property
    def _files(self) -> Mapping[str, SafetensorsFileMetadata]:
        revision, token = self.download.get("revision"), self.download.get("token")
        try:
            return get_safetensors_metadata(self.name, revision=revision, token=token).files_metadata
        except NotASafetensorsRepoError:
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
        url = hf_hub_url(self.name, file, revision=self.download.get("revision"))
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
    small = [f"{subfolder}/{pattern}".lstrip("/") for pattern in FILES if not pattern.endswith(".safetensors")]
    directory = Path(snapshot_download(str(source), allow_patterns=small, **download), subfolder)
    if (directory / CONFIG).exists():
        return Checkpoint.at(source, options)
    if subfolder and not directory.is_dir():
        raise OSError(f"there is no checkpoint {source}/{subfolder}")
    name = f"{source}/{subfolder}".rstrip("/")
    return RemoteCheckpoint(directory, name, None, trust, download, str(source), subfolder)
