"""The intensities that requests to a pair in vLLM can ask for: numbers in a range, the pair's presets, and "auto"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from vllm.config import VllmConfig

from dami.callers import AUTO, CALLERS, Caller
from dami.dial.values import Intensity
from dami.estimators.files import StoredIntensity
from dami.serving.guidance import span_of
from dami.serving.protocol import SAME
from dami.serving.vllm.settings import KEY, KEYS, PairSettings, RequestError
from dami.sources import FOLDER, SETTINGS


@dataclass(frozen=True)
class Offer:
    """What requests to a pair can ask for.

    Attributes:
        settings: the user's.
        stored: the pair's presets and estimator.
        moves: whether λ can change while a request runs.
        limits: whether vLLM can end a thought that has used up its budget.
    """

    settings: PairSettings
    stored: StoredIntensity = field(default_factory=StoredIntensity)
    moves: bool = True
    limits: bool = False

    @classmethod
    def of(cls, config: VllmConfig) -> Offer:
        """Returns the offer of an engine that serves a pair.

        Raises:
            OSError, ValueError: the pair's folder of presets and estimator cannot be read.
        """
        model, extra = config.model_config, config.load_config.model_loader_extra_config
        settings = PairSettings.of({key: extra[key] for key in KEYS if key in extra})
        source, revision = settings.thinking or str(model.model), settings.thinking_revision or model.revision
        stored = _stored(source, revision, config.load_config.download_dir)
        reasoning = config.reasoning_config
        moves = config.speculative_config is None
        return cls(settings, stored, moves, reasoning is not None and reasoning.enabled)

    @property
    def presets(self) -> Mapping[str, float]:
        return self.stored.presets

    @property
    def span(self) -> float:
        """Over how many tokens λ of a thought bends; 0 if it does not."""
        return span_of(self.stored.frontier)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose states at a prompt's last token the estimator looks at; none if it needs anything else."""
        return tuple(getattr(self.stored.estimator, "layers", ()))

    def check(self) -> None:
        """Raises ValueError if the user's settings name a preset or an estimator that the pair lacks."""
        self.lam_or_auto(self.settings.default_intensity, "default_intensity")
        if self.settings.prompt_intensity != SAME:
            self.lam(self.settings.prompt_intensity, "prompt_intensity")

    def lam(self, value: Any, name: str = KEY) -> float:
        """Returns λ as the kernels take it, rounded to float32, of a number or a preset.

        Args:
            value: the number, or the preset's name.
            name: the field that it came in.

        Raises:
            RequestError: it is neither, or is out of range; the server answers with status 400.
        """
        caller = CALLERS["vLLM"]
        return self._parsed(value, replace(caller, argument=name, takes=caller.takes - {AUTO})).one

    def lam_or_auto(self, value: Any, name: str = KEY) -> float | None:
        """Returns λ as `lam` does, but None for "auto". Raises RequestError if the pair cannot have it chosen, too."""
        parsed = self._parsed(value, replace(CALLERS["vLLM"], argument=name))
        if not parsed.auto:
            return parsed.one
        if self.stored.estimator is None:
            raise RequestError(f"{name} 'auto' needs an estimator, and this pair has none", parameter=name)
        if not self.layers:
            raise RequestError(
                f"{name} 'auto' needs an estimator that looks at nothing but the states of a prompt, and this pair's "
                "needs more: it needs dami's own server",
                parameter=name,
            )
        return None

    def _parsed(self, value: Any, caller: Caller) -> Intensity:
        name, (low, high) = caller.argument, self.settings.intensity_range
        try:
            parsed = Intensity.parse(value, caller, self.presets, 1)
        except (TypeError, ValueError) as problem:
            raise RequestError(str(problem), parameter=name) from problem
        if not isinstance(value, str) and not low <= parsed.one <= high:
            raise RequestError(f"{name} must be in {low:g} to {high:g} on this server, got {value}", parameter=name)
        return parsed


@lru_cache
def _stored(source: str, revision: str | None, cache: str | None) -> StoredIntensity:
    """Reads what a pair's directory, or its repository on the hub, holds in the folder of presets and estimator."""
    path = Path(source).expanduser()
    if not path.is_dir():
        path = Path(snapshot_download(source, revision=revision, cache_dir=cache, allow_patterns=f"{FOLDER}/*"))
    folder = path / FOLDER
    return StoredIntensity.load(folder) if (folder / SETTINGS).exists() else StoredIntensity()
