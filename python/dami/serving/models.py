"""The served model as OpenAI's API describes it, under each of the names that carry λ."""

from __future__ import annotations

import time

from dami.serving.intensity_policy import IntensityPolicy
from dami.serving.model_names import names_of
from dami.serving.schema import Model


class Models:
    """Describes the served model.

    Args:
        policy: knows which λ it can be asked for.
    """

    def __init__(self, policy: IntensityPolicy) -> None:
        self.policy, self.created = policy, int(time.time())

    def all(self) -> list[Model]:
        """Returns the model under each of the names that carry λ, itself first."""
        engine, settings = self.policy.engine, self.policy.settings
        auto = engine.twin is not None
        return [*map(self.named, names_of(settings.name, engine.presets, auto, settings.intensity_range))]

    def named(self, model: str) -> Model:
        """Returns the model of this name, with the intensities it can be asked for.

        Raises:
            BadRequest: there is no such model.
        """
        carried, engine, settings = self.policy.carried(model), self.policy.engine, self.policy.settings
        return {
            "id": model,
            "object": "model",
            "created": self.created,
            "owned_by": "dami",
            "max_model_len": engine.max_model_len,
            "intensity": {
                "default": settings.default_intensity if carried is None else carried,
                "prompt": settings.prompt_intensity,
                "tail": settings.prompt_tail,
                "least_tail": engine.least_tail,
                "range": list(settings.intensity_range),
                "presets": engine.presets,
                "auto": engine.twin is not None,
                "frontier": bool(settings.frontier),
            },
        }
