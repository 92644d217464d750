"""Measured launch parameters: a JSON file for each GPU in `tables/`, looked up by the nearest number of rows."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from dami_kernels.tuning.config import LinearConfig, Route

TABLES = Path(__file__).parent / "tables"
LOG = logging.getLogger("dami_kernels")


@dataclass(frozen=True)
class LinearEntry:
    """The fastest measured configuration for x [M, K] and weights with N features in total.

    Attributes:
        config: the Triton kernel's configuration.
        prefers_cuda: whether the CUDA C++ kernel was faster.
        one, mixed: the fastest route where all rows have one λ, and where every row has its own.
    """

    M: int
    N: int
    K: int
    dtype: torch.dtype
    format: str
    config: LinearConfig
    prefers_cuda: bool = False
    one: Route = Route.KERNEL
    mixed: Route = Route.KERNEL


def table_path(device_name: str) -> Path:
    """Returns the path of a GPU's table, given its name in torch."""
    return TABLES / f"{device_name.replace(' ', '_').replace('/', '_')}.json"


def save_table(path: Path, entries: Iterable[LinearEntry]) -> None:
    """Writes a table, sorted, one entry per line."""
    lines = [{**asdict(entry), "dtype": str(entry.dtype).removeprefix("torch.")} for entry in entries]
    lines.sort(key=lambda line: (line["format"], line["dtype"], line["N"], line["K"], line["M"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n")


@cache
def load_table(device_name: str) -> dict[tuple[int, int, torch.dtype, str], list[LinearEntry]]:
    """Returns a GPU's entries by (N, K, dtype, format), or none if it has no table. Logs which table it loads."""
    path = table_path(device_name)
    table: dict[tuple[int, int, torch.dtype, str], list[LinearEntry]] = {}
    if not path.exists():
        LOG.info("lerp_linear on %s: tiles by heuristic, there is no table %s", device_name, path)
        return table
    for line in json.loads(path.read_text()):
        parsed = {"dtype": getattr(torch, line["dtype"]), "config": LinearConfig(**line["config"])}
        routes = {name: Route(line[name]) for name in ("one", "mixed") if name in line}
        entry = LinearEntry(**{**line, **parsed, **routes})
        table.setdefault((entry.N, entry.K, entry.dtype, entry.format), []).append(entry)
    LOG.info("lerp_linear on %s: tiles as measured, %s", device_name, path)
    return table


def nearest(entries: list[LinearEntry], M: int) -> LinearEntry:
    """Returns the entry whose number of rows is nearest to M by ratio. On a tie, the one with more rows wins."""
    return min(entries, key=lambda entry: (abs(math.log(entry.M / M)), -entry.M))
