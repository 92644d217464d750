"""Writes the weights of a packed pair file by file, and goes on where an interrupted run has stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

RECORD = ".packing.jsonl"  # first what is packed, then a line for each file that is complete


@dataclass
class Shard:
    """A file of the packed pair.

    Attributes:
        tensors: names of the tensors in it.
        parameters: the format of each parameter in it, None if both ends are the same.
        nbytes: of its tensors.
        lost, whole: squared norms of the λ=1 end's error and of that end, over all that is quantised.
    """

    tensors: list[str] = field(default_factory=list)
    parameters: dict[str, str | None] = field(default_factory=dict)
    nbytes: int = 0
    lost: float = 0.0
    whole: float = 0.0


class Shards:
    """Writes safetensors files of limited size and their index, named as transformers names them.

    Attributes:
        written: the files that are complete.
        interpolated: the formats of the parameters that differ between the ends, by name.
        nbytes: bytes of all tensors.
        error: ‖W(1) − W_thinking‖ / ‖W_thinking‖ over all that is quantised.
    """

    def __init__(self, directory: Path, limit: int, packed: Mapping[str, Any]) -> None:
        """Takes over the files that an interrupted run of the same has left in the directory.

        Args:
            directory: where to write.
            limit: bytes of a file at most, unless a single weight takes more.
            packed: what is packed and how, as JSON holds it.

        Raises:
            ValueError: a run of something else has left the files.
        """
        self.directory, self.limit = directory, limit
        self.record = directory / RECORD
        self.written = self._left(dict(packed))
        self.shard, self.held = Shard(), dict[str, Tensor]()
        for file in {*directory.glob("*.safetensors")} - {self._file(i) for i in range(len(self.written))}:
            file.unlink()
        lines = [packed, *map(asdict, self.written)]
        self.record.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def _left(self, packed: dict[str, Any]) -> list[Shard]:
        """Returns the files of an interrupted run."""
        lines = self.record.read_text().splitlines(keepends=True) if self.record.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        if whole and (differing := sorted(key for key in packed if whole[0].get(key) != packed[key])):
            raise ValueError(
                f"{self.directory} is of a run that differs in {', '.join(differing)}: remove it, or do not resume"
            )
        shards = [Shard(**line) for line in whole[1:]]
        missing = (i for i, shard in enumerate(shards) if not self._is_complete(i, shard))
        return shards[: next(missing, len(shards))]

    def _is_complete(self, number: int, shard: Shard) -> bool:
        file = self._file(number)
        return file.exists() and file.stat().st_size > shard.nbytes

    def _file(self, number: int) -> Path:
        return self.directory / f"{number:05}.safetensors"

    @property
    def done(self) -> set[str]:
        """The names of the parameters that are in complete files."""
        return {name for shard in self.written for name in shard.parameters}

    @property
    def interpolated(self) -> dict[str, str]:
        stored = {name: format for shard in self.written for name, format in shard.parameters.items()}
        return {name: format for name, format in stored.items() if format is not None}

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.written)

    @property
    def error(self) -> float:
        lost, whole = (sum(getattr(shard, name) for shard in self.written) for name in ("lost", "whole"))
        return (lost / whole) ** 0.5 if whole else 0.0

    def add(
        self, name: str, format: str | None, tensors: Mapping[str, Tensor], lost: float = 0.0, whole: float = 0.0
    ) -> None:
        """Adds the tensors of a parameter, which go into one file. If they do not fit, first writes those held."""
        more = sum(tensor.nbytes for tensor in tensors.values())
        if self.held and self.shard.nbytes + more > self.limit:
            self.write()
        self.held |= tensors
        self.shard.tensors += tensors
        self.shard.parameters[name] = format
        self.shard.nbytes += more
        self.shard.lost += lost
        self.shard.whole += whole

    def write(self) -> None:
        """Writes the tensors held so far, if there are any."""
        if not self.held:
            return
        save_file(self.held, self._file(len(self.written)), metadata={"format": "pt"})
        self.written.append(self.shard)
        with self.record.open("a") as file:
            file.write(f"{json.dumps(asdict(self.shard))}\n")
        self.shard, self.held = Shard(), {}

    def close(self) -> None:
        """Gives the files their names, and writes the index."""
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self.written):
            name = f"model-{number + 1:05}-of-{len(self.written):05}.safetensors"
            self._file(number).rename(self.directory / name)
            weight_map |= dict.fromkeys(shard.tensors, name)
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
        (self.directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        self.record.unlink()
