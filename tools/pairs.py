"""The table of published pairs in docs/pairs.md: python -m tools.pairs

It is made of the recorded configs in `python/dami/data/pairs.json`, by the code that `dami check` runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from dami.loading.checkpoint import Checkpoint
from dami.loading.preview import Preview, preview
from dami.loading.published import PublishedPair, pairs, recorded_config

HEAD = """| command | parameters | licence | what differs | weights fit on |
| --- | --- | --- | --- | --- |"""


def table() -> str:
    """Returns the table in Markdown."""
    return "\n".join([HEAD, *map(line, pairs())])


def line(pair: PublishedPair) -> str:
    """Returns the row of a pair. What no recorded config shows is not claimed."""
    found, compared = recorded_preview(pair)
    licence = pair.license if pair.license_checked else f"{pair.license} (unchecked)"
    command = f"`dami check {pair.instruct} {pair.thinking}`"
    cells = [command, "not recorded", licence, _differs(found, compared, pair), ""]
    if found is not None and found.sizes is not None:
        cells[1] = f"{found.parameters / 1e9:.1f} B"
        cells[4] = ", ".join(f"`{format}` {found.fitting(size)[0]}" for format, size in by_size(found))
    return f"| {' | '.join(cells)} |"


def by_size(found: Preview) -> list[tuple[str, int]]:
    """Returns formats and bytes, the largest first."""
    return sorted((found.sizes or {}).items(), key=lambda each: -each[1])


def _differs(found: Preview | None, compared: bool, pair: PublishedPair) -> str:
    told = []
    if found is None or not compared:
        told.append("configs not recorded")
    else:
        told += [f"**no pair** by {each.subject}: {each.ends}" for each in found.report.blocking]
        told += [f"{each.subject}: {each.resolution}" for each in found.report.resolved]
    return "; ".join([*told, *filter(None, [pair.note])]) or "nothing in the config"


def recorded_preview(pair: PublishedPair) -> tuple[Preview | None, bool]:
    """Returns what the recorded configs of a pair tell, and whether both ends' are recorded.

    With one config the sizes are told; with none, nothing.
    """
    configs = [recorded_config(name) for name in (pair.instruct, pair.thinking)]
    known = [config for config in configs if config is not None]
    if not known:
        return None, False
    with TemporaryDirectory() as folder:
        ends = []
        for name, config in zip((pair.instruct, pair.thinking), configs, strict=True):
            directory = Path(folder) / name
            directory.mkdir(parents=True)
            (directory / "config.json").write_text(json.dumps(config or known[0]))
            (directory / "pytorch_model.bin").touch()  # for the weights, which nothing opens
            ends.append(Checkpoint.find(directory))
        return preview(ends[0], ends[1]), len(known) == 2


if __name__ == "__main__":
    print(table())
