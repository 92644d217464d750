"""`model.dami`: the description and the current state of a patched model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dami.dial.patch import Estimator, patch_of
from dami.dial.state import PatchedModule
from dami.layers.describe import Description, describe


@dataclass(frozen=True)
class PartStatus:
    """A part of a model with a λ of its own.

    Attributes:
        intensity: its λ, one number or one per sequence.
        modules: the names of its modules.
        groups: the groups that these belong to.
    """

    intensity: float | list[float]
    modules: tuple[str, ...]
    groups: tuple[str, ...]


class Status:
    """The description and the current state of a patched model; print it to see all of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises TypeError if the model is not patched."""
        self._model, self._patch = model, patch_of(model)

    @property
    def ends(self) -> tuple[str | None, str | None]:
        """Names of the instruct end and of the thinking end; None if unknown."""
        names = [parent.get("name") for parent in self._patch.origin.parents]
        return (names[0], names[1]) if len(names) == 2 else (None, None)

    @property
    def description(self) -> Description:
        """Every parameter with its kind, format and size in bytes, as `dami.describe` returns it."""
        return describe(self._model)

    @property
    def format(self) -> str:
        """The format of embeddings and linear weights."""
        return self.description.format

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters of both ends, as stored."""
        return self.description.nbytes

    @property
    def intensity(self) -> float | list[float]:
        """λ of the model without its parts, used if a call sets no other: one number or one per sequence."""
        return _numbers(self._patch.dial.lam)

    @property
    def parts(self) -> tuple[PartStatus, ...]:
        """The parts that have a λ of their own, by `dami.set_intensity` or a `with dami.intensity(…)` block."""
        found = []
        patched = [module for module in self._model.modules() if isinstance(module, PatchedModule)]
        for dial in self._patch.parts:
            modules = [module.lerp for module in patched if module.lerp.part is dial]
            groups = dict.fromkeys(module.group for module in modules)
            found.append(PartStatus(_numbers(dial.lam), tuple(module.name for module in modules), tuple(groups)))
        return tuple(part for part in found if part.modules)  # an inner block may have taken over all modules of a part

    @property
    def presets(self) -> Mapping[str, float]:
        """λ by name."""
        return dict(self._patch.presets)

    @property
    def estimator(self) -> Estimator | None:
        """The estimator that chooses λ for "auto"; None if there is none."""
        return self._patch.estimator

    @property
    def chosen(self) -> Mapping[int, float]:
        """The λ that the estimator chose in the last `generate` that asked it, by the prompt's index in the batch."""
        return dict(self._patch.chosen)

    @property
    def prompt_tail(self) -> int | None:
        """The least `prompt_tail` that was found to cost nothing; None if none was, or none was measured."""
        return self._patch.prompt_tail

    @property
    def frontier(self) -> Mapping[str, Any]:
        """The measurements behind presets and estimator, as `dami evaluate` writes them; {} if there are none."""
        return self._patch.frontier

    def __repr__(self) -> str:
        description, ends = self.description, self.ends
        stored = [row.format for row in description.rows if row.format is not None]
        formats = ", ".join(f"{stored.count(name)} as {name}" for name in dict.fromkeys(stored))
        parts = [f"{part.intensity} in {len(part.modules)} modules ({', '.join(part.groups)})" for part in self.parts]
        points = len(self.frontier.get("points", ()))
        lines = {
            "instruct": ends[0] or "not known",
            "thinking": ends[1] or "not known",
            "format": f"{description.format}; {len(stored)} of {len(description.rows)} parameters differ: {formats}",
            "bytes": f"{description.nbytes:,}",
            "intensity": "; ".join([str(self.intensity), *parts]),
            "presets": ", ".join(f"{name} {lam:g}" for name, lam in self.presets.items()) or "none",
            "estimator": type(self.estimator).__name__ if self.estimator is not None else "none",
            "tail": "not known" if self.prompt_tail is None else f"{self.prompt_tail} tokens of a prompt",
            "frontier": f"measured at {points} λ" if points else "not measured",
        }
        return "\n".join([type(self._model).__name__, *(f"  {name:<10} {text}" for name, text in lines.items())])


def _numbers(lam: Tensor) -> float | list[float]:
    """Returns λ as numbers with the fewest digits that identify a float32: 0.3, not 0.30000001."""
    numbers = [float(str(each)) for each in lam.detach().cpu().reshape(-1).numpy()]
    return numbers if lam.dim() else numbers[0]
