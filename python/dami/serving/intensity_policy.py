"""Which λ a request is granted: what it may ask for, and what it gets."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from typing import Any

from dami.callers import CALLERS
from dami.dial.values import Intensity
from dami.serving.engine import Auto, Engine, EstimatorFailed, Row
from dami.serving.metrics import Metrics
from dami.serving.model_names import intensity_in
from dami.serving.protocol import MIDDLE, BadRequest, ChatRequest, CompletionRequest
from dami.serving.reading import PromptReading
from dami.serving.settings import ServiceSettings

logger = logging.getLogger(__name__)


class IntensityPolicy:
    """Grants λ.

    Args:
        engine: the engine that generates.
        settings: the server's settings.
        metrics: counts the requests that get less than they asked for.
    """

    def __init__(self, engine: Engine, settings: ServiceSettings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics

    def check(self, body: ChatRequest | CompletionRequest) -> None:
        """Raises BadRequest if the server cannot grant what a request asks for. Its intensity becomes what it means."""
        field = "intensity" if getattr(body, "reasoning_effort", None) is None else "reasoning_effort"
        if field == "reasoning_effort" and body.intensity not in self.engine.presets:
            body.intensity = MIDDLE.get(str(body.intensity), body.intensity)
        self._check(body.intensity, field)
        self._check(body.max_intensity, "max_intensity")
        carried = None if body.model is None else self.carried(body.model)
        if carried is not None:
            if body.intensity not in (None, carried):
                raise BadRequest(f"model is {body.model!r} and {field} {getattr(body, field)}", field)
            if body.max_intensity is not None and isinstance(carried, float):
                raise BadRequest(f"model is {body.model!r}, which excludes max_intensity", "max_intensity")
            body.intensity = carried
        for _, lam in body.intensity_schedule or ():
            self._check(lam, "intensity_schedule")
        self.check_fixed(getattr(body, "answer_intensity", None), "answer_intensity")

    def carried(self, model: str) -> float | str | None:
        """Returns the λ that a model's name carries, if any.

        Raises:
            BadRequest: there is no such model.
        """
        try:
            carried = intensity_in(model, self.settings.name)
            self._check(carried, "intensity")
        except (BadRequest, ValueError) as problem:
            text = f"{problem}" if isinstance(problem, ValueError) else f"there is no model {model!r}: {problem}"
            raise BadRequest(text, "model", "model_not_found", 404) from problem
        return carried

    def check_fixed(self, value: float | str | None, field: str) -> None:
        """Raises BadRequest unless an intensity is a number or a preset that the server can grant."""
        if value == "auto":
            raise BadRequest(f"{field} must be a number or a preset, got 'auto'", field)
        self._check(value, field)

    def _check(self, value: float | str | None, field: str) -> None:
        """Raises BadRequest if the server cannot grant an intensity, which came in this field."""
        if value is None:
            return
        try:
            Intensity.parse(value, CALLERS["dami serve"], self.engine.presets, 1)
        except (TypeError, ValueError) as problem:
            raise BadRequest(f"{problem}" if field == "intensity" else f"{field}: {problem}", field) from problem
        if value == "auto" and self.engine.twin is None:
            raise BadRequest("intensity 'auto' needs an estimator, and this pair has none", field)
        low, high = self.settings.intensity_range
        if isinstance(value, float) and not low <= value <= high:
            raise BadRequest(f"{field} must be in {low:g} to {high:g} on this server, got {value:g}", field)

    def number(self, intensity: float | str | None) -> float | None:
        """Returns the λ that a preset stands for, or the number itself."""
        return self.engine.presets[intensity] if isinstance(intensity, str) else intensity

    async def choose(
        self, body: ChatRequest | CompletionRequest, prompts: Sequence[list[int]], reading: PromptReading | None
    ) -> list[Any]:
        """Returns the λ granted to each prompt of a request, or an `Auto` if the engine can choose it in passing.

        Args:
            body: the request.
            prompts: its prompts.
            reading: how they are read; None if λ has to be known before.
        """
        asked: float | str = self.settings.default_intensity
        if body.intensity is not None:
            asked = body.intensity
        elif body.max_intensity is not None and asked != "auto":
            asked = body.max_intensity
        if asked == "auto":
            low, high = self.settings.intensity_range
            alone = body.n in (None, 1)
            if reading is not None and alone and self.engine.chooses(reading.intensity, int(reading.tail)):
                most = high if body.max_intensity is None else min(high, body.max_intensity)
                return [Auto(low, most, self.engine.grant(math.inf, True))] * len(prompts)
            try:
                found = await asyncio.gather(*map(self.engine.estimate, prompts))
            except Exception as problem:
                logger.exception("the estimator failed")
                raise BadRequest(f"the estimator failed: {problem}", code="estimator_failed", status=500) from problem
            values = [min(max(value, low), high) for value in found]
        else:
            values = [float(self.engine.presets[asked] if isinstance(asked, str) else asked)] * len(prompts)
        if body.max_intensity is not None:
            values = [min(value, body.max_intensity) for value in values]
        adjustable = asked == "auto" or body.max_intensity is not None
        granted = [self.engine.grant(value, adjustable) for value in values]
        self.metrics.lowered.inc(sum(less < value for less, value in zip(granted, values, strict=True)))
        return granted

    async def known(self, row: Row) -> None:
        """Waits until the λ of a row is known."""
        await row.granted.wait()
        if isinstance(row.failure, EstimatorFailed):
            raise BadRequest(f"the estimator failed: {row.failure}", code="estimator_failed", status=500)
        if row.failure is not None:
            raise row.failure
