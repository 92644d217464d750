"""Published pairs, and the settings of their configs that decide whether they are one: `data/pairs.json`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "data" / "pairs.json"
ROTATION = ("rope_theta", "rope_scaling", "hidden_size", "num_hidden_layers", "model_type")


@dataclass(frozen=True)
class PublishedPair:
    """A pair on the hub.

    Attributes:
        instruct, thinking: names of the ends.
        license: of both ends, or of each.
        license_checked: whether a model card was read.
        note: what else is known of it.
    """

    instruct: str
    thinking: str
    license: str
    license_checked: bool
    note: str


@functools.cache
def _contents() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def pairs() -> list[PublishedPair]:
    """Returns the published pairs that we know."""
    return [PublishedPair(**each) for each in _contents()["pairs"]]


def recorded_config(name: str) -> Mapping[str, Any] | None:
    """Returns the recorded settings of a checkpoint's config, None if there are none."""
    found = _contents()["configs"].get(name)
    return None if found is None else found["config"]


def matching(thinking: str) -> list[str]:
    """Returns the instruct ends that are known to have the rotary embedding of a thinking end.

    Args:
        thinking: its name on the hub, or that of a directory called like it.
    """
    last = thinking.rpartition("/")[2]
    found = []
    for pair in pairs():
        ends = recorded_config(pair.instruct), recorded_config(pair.thinking)
        if pair.thinking.rpartition("/")[2] == last and None not in ends:
            kept = [{key: end.get(key) for key in ROTATION} for end in ends if end is not None]
            if kept[0] == kept[1]:
                found.append(pair.instruct)
    return found
