"""Settings of the rows of a study's batch: one λ for the whole model, or another λ in one part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from dami.layers.base import LerpModule

ModuleCell = tuple[str, int | None]  # group of modules, and layer
Place = tuple[str, tuple[int, ...]] | str  # a group in some layers or everywhere, in the form of `dami.intensity`

GROUPS = {
    "attention": ("attn",),
    "MLP": ("mlp", "experts"),
    "norms": ("norm",),
    "embeddings": ("embed", "head"),
    "other": ("other",),
}
THIRDS = ("first third", "middle third", "last third")


@dataclass(frozen=True)
class Setting:
    """One λ for the whole model, or λ = 1 in one part and 0 elsewhere, or the reverse.

    Attributes:
        intensity: λ outside the part.
        part: a key of `model_parts`, whose λ is 1 − intensity. None for the whole model.
    """

    intensity: float
    part: str | None = None

    @property
    def name(self) -> str:
        if self.part is None:
            return f"{self.intensity:g}"
        return f"{'all but' if self.intensity else 'only'} {self.part}"


def model_parts(model: nn.Module) -> dict[str, frozenset[ModuleCell]]:
    """Returns the parts of a patched model for ablations: thirds of its layers, and groups of its modules.

    Modules outside the layers, such as embeddings and the last norm, are in no third.
    """
    cells = module_cells(model)
    layers = sorted({layer for _, layer in cells if layer is not None})
    found = {name: [cell for cell in cells if cell[0] in groups] for name, groups in GROUPS.items()}
    for name, third in zip(THIRDS, np.array_split(np.array(layers, dtype=int), 3), strict=True):
        found[name] = [cell for cell in cells if cell[1] in third.tolist()]
    names = (*THIRDS, *GROUPS)
    return {name: frozenset(found[name]) for name in names if found[name] and len(found[name]) < len(cells)}


def module_cells(model: nn.Module) -> list[ModuleCell]:
    """Returns the distinct groups and layers of all interpolated modules."""
    return list(dict.fromkeys((m.lerp.group, m.lerp.layer) for m in model.modules() if isinstance(m, LerpModule)))


def row_intensities(settings: Sequence[Setting], model: nn.Module) -> dict[Place, list[float]]:
    """Returns the intensities that `generate(intensity=…)` and `forward` take, with one row per setting."""
    cells, parts = module_cells(model), model_parts(model)
    layers: dict[tuple[str, tuple[float, ...]], list[int | None]] = {}
    for cell in cells:
        lams = tuple(
            1 - each.intensity if each.part is not None and cell in parts[each.part] else each.intensity
            for each in settings
        )
        layers.setdefault((cell[0], lams), []).append(cell[1])
    # A group without layers means all its modules. It comes first, because later entries take precedence.
    whole = {group: list(lams) for (group, lams), indices in layers.items() if None in indices}
    inside = {
        (group, tuple(index for index in indices if index is not None)): list(lams)
        for (group, lams), indices in layers.items()
    }
    return whole | {key: lams for key, lams in inside.items() if key[1]}
