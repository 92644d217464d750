"""A checkpoint on the hub whose weights stay there: the headers of its files, and its tensors, are read in ranges."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_url, list_repo_files, snapshot_download
from huggingface_hub.utils import (
    EntryNotFoundError,
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
)
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME

from dami.loading.adapters import CONFIG, LEGACY, WEIGHTS
from dami.loading.checkpoint import DTYPES, FILES, LEGACY_FILES, Checkpoint
from dami.patching.compare import Header
from dami.sources import local

PIECE = 64 << 20  # bytes asked for at once: what is read again after a connection breaks
CONNECTIONS = 8  # at a time, for one tensor


@dataclass(frozen=True)
class RemoteCheckpoint(Checkpoint):
    """A checkpoint on the hub, of which only config, tokenizer and index have been downloaded.

    Its `download` has the commit that these are of as the revision, so that the weights are of the same.

    Attributes:
        repository: its name on the hub, without the subfolder.
        subfolder: where in the repository it is.
    """

    repository: str = ""
    subfolder: str = ""

    @cached_property
    def _files(self) -> Mapping[str, tuple[int, Mapping[str, Any]]]:
        """Of each safetensors file in the repository where its tensors begin, and its header; {} if there is none."""
        files = [SAFE_WEIGHTS_NAME] if self.index is None else sorted({*self.index.values()})
        names = [f"{self.subfolder}/{file}".lstrip("/") for file in files]
        try:
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                return dict(zip(names, pool.map(self._header, names), strict=True))
        except EntryNotFoundError:
            if self.index is not None:
                raise
            return {}

    def _header(self, file: str) -> tuple[int, Mapping[str, Any]]:
        size = int.from_bytes(self._range(file, 0, 8), "little")
        header = json.loads(self._range(file, 8, 8 + size))
        header.pop("__metadata__", None)
        return 8 + size, header

    @cached_property
    def stored(self) -> dict[str, Header]:
        return {
            name: (list(told["shape"]), DTYPES.get(told["dtype"], told["dtype"]))
            for _, header in self._files.values()
            for name, told in header.items()
        }

    @cached_property
    def _places(self) -> dict[str, Path]:
        return {name: Path(file) for file, (_, header) in self._files.items() for name in header}

    def stored_rows(self, name: str, rows: slice) -> Tensor:
        file = str(self._places[name])
        begin, header = self._files[file]
        full, dtype = header[name]["shape"], getattr(torch, DTYPES[header[name]["dtype"]])
        first, last, _ = rows.indices(full[0]) if full else (0, 1, 1)
        shape = [last - first, *full[1:]] if full else []
        row = torch.Size(full[1:]).numel() * dtype.itemsize
        data = torch.empty(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8)
        begin += header[name]["data_offsets"][0] + first * row
        pieces = [(begin + at, piece) for at, piece in zip(range(0, len(data), PIECE), data.split(PIECE), strict=False)]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            [*pool.map(lambda piece: self._fill(file, *piece), pieces)]
        return data.view(dtype).view(shape)

    def _fill(self, file: str, begin: int, piece: Tensor) -> None:
        """Fills a tensor of bytes with those of a file from a place on."""
        piece.copy_(torch.frombuffer(bytearray(self._range(file, begin, begin + len(piece))), dtype=torch.uint8))

    def _range(self, file: str, begin: int, end: int) -> bytes:
        """Returns a range of a file, asked for again if a connection breaks or the hub is busy."""
        url = hf_hub_url(self.repository, file, revision=self.download.get("revision"))
        headers = build_hf_headers(token=self.download.get("token")) | {"Range": f"bytes={begin}-{end - 1}"}
        try:
            response = http_backoff("GET", url, headers=headers, follow_redirects=True)
            hf_raise_for_status(response)
        except OSError:
            raise
        except Exception as error:  # of the library underneath, which has changed with versions of the hub's client
            raise OSError(f"{url} cannot be read: {error}") from error
        if response.status_code != HTTPStatus.PARTIAL_CONTENT or len(response.content) != end - begin:
            raise OSError(f"{url} must give bytes {begin} to {end - 1}, got {len(response.content)} bytes")
        return response.content

    def has_weights(self) -> bool:
        if self._files:
            return True
        revision, token = self.download["revision"], self.download.get("token")
        names = list_repo_files(self.repository, revision=revision, token=token)
        return any(fnmatch(name, f"{self.subfolder}/{LEGACY_FILES[0]}".lstrip("/")) for name in names)

    def identity(self) -> list[object]:
        return [self.repository, self.download["revision"], self.subfolder]


def left_on_hub(source: str | Path, options: Mapping[str, Any]) -> Checkpoint:
    """Finds a checkpoint as `Checkpoint.at` does, but leaves the weights of a whole one on the hub."""
    download = {name: value for name, value in options.items() if name != "trust_remote_code"}
    trust = bool(options.get("trust_remote_code"))
    subfolder = download.pop("subfolder", None) or ""
    if local(source, subfolder) is not None:
        return Checkpoint.at(source, options)
    name = f"{source}/{subfolder}".rstrip("/")

    def downloaded(files: Iterable[str]) -> Path:
        patterns = [f"{subfolder}/{file}".lstrip("/") for file in files]
        return Path(snapshot_download(str(source), allow_patterns=patterns, **download))

    snapshot = downloaded(pattern for pattern in FILES if not pattern.endswith(".safetensors"))
    directory = snapshot / subfolder
    if subfolder and not directory.is_dir():
        raise OSError(f"there is no checkpoint {name}")
    if (directory / CONFIG).exists():
        return Checkpoint(downloaded([CONFIG, WEIGHTS, LEGACY]) / subfolder, name, None, trust, download)
    download["revision"] = snapshot.name  # the hub's cache names it after the commit
    return RemoteCheckpoint(directory, name, None, trust, download, str(source), subfolder)
