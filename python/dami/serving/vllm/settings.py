"""The settings of a pair in vLLM, and the checks of a request's arguments."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from vllm.exceptions import VLLMValidationError

from dami.callers import AUTO, CALLERS, DEFAULT_INTENSITY
from dami.dial.values import Intensity
from dami_kernels import formats

KEY = "intensity"  # in `SamplingParams.extra_args`, in `vllm_xargs` and in a request's body
# keys of `extra_args` that vLLM itself reads
VLLM_ARGUMENTS = frozenset({"kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode"})
KEYS = ("thinking", "thinking_revision", "format", "default_intensity", "intensity_range")


class RequestError(VLLMValidationError, ValueError):
    """An error in a request: vLLM's server answers with status 400; elsewhere it is a ValueError."""

    def __init__(self, message: str, parameter: str) -> None:
        VLLMValidationError.__init__(self, message, parameter=parameter)


@dataclass(frozen=True)
class PairSettings:
    """Our keys of `--model-loader-extra-config`.

    Attributes:
        thinking: directory or hub name of the λ=1 end; None for a packed pair.
        thinking_revision: its branch, tag or commit; None for vLLM's `--revision`, which is that of the λ=0 end.
        format: storage format for two ends, one of `dami_kernels.formats.names()`; None for a packed pair.
        default_intensity: λ of requests that name none.
        intensity_range: lowest and highest λ that a request may ask for.
    """

    thinking: str | None = None
    thinking_revision: str | None = None
    format: str | None = None
    default_intensity: float = DEFAULT_INTENSITY
    intensity_range: tuple[float, float] = (-1.0, 2.0)

    @classmethod
    def of(cls, extra: dict[str, Any]) -> PairSettings:
        """Reads the settings from a loader's extra config, whose other keys are vLLM's.

        Raises:
            ValueError: if a value has the wrong type or is not allowed; the message names the key.
        """
        own = {key: extra[key] for key in KEYS if key in extra}
        if "thinking" in own and not isinstance(own["thinking"], str):
            raise ValueError(f"thinking must be a directory or a hub name, got {own['thinking']!r}")
        if "thinking_revision" in own:
            if not isinstance(own["thinking_revision"], str):
                raise ValueError(f"thinking_revision must be a branch, tag or commit, got {own['thinking_revision']!r}")
            if "thinking" not in own:
                raise ValueError("thinking_revision is of an end: give it together with thinking only")
        if "format" in own:
            formats.get(own["format"])
            if "thinking" not in own:
                raise ValueError("format is a packed pair's own: give it together with thinking only")
        if "intensity_range" in own:
            ends = own["intensity_range"]
            fits = isinstance(ends, (list, tuple)) and len(ends) == 2 and all(map(_is_finite, ends))
            if not fits or not ends[0] <= ends[1]:
                raise ValueError(f"intensity_range must be two finite numbers [least, greatest], got {ends!r}")
            own["intensity_range"] = float(ends[0]), float(ends[1])
        settings = cls(**own)
        settings.checked(settings.default_intensity, "default_intensity")
        return settings

    def checked(self, value: Any, name: str = KEY) -> float:
        """Returns λ as the kernels take it: rounded to float32.

        Raises:
            ValueError: if it is not a number, not finite, or out of range; the server answers with status 400.
        """
        least, greatest = self.intensity_range
        try:
            lam = Intensity.parse(value, CALLERS["vLLM"]).numbers.item()
        except (TypeError, ValueError):
            lam = math.nan
        if not least <= lam <= greatest:
            hint = "; an estimator needs dami's own server" if isinstance(value, str) and value == AUTO else ""
            raise RequestError(
                f"{name} must be a number from {least:g} to {greatest:g}, got {value!r}{hint}", parameter=name
            )
        return float(np.float32(lam)) + 0.0  # turns −0.0 into 0.0


def resembles_key(name: str) -> bool:
    """Returns whether an unknown argument was probably meant as λ: `intensty`, `Intensity`, `prompt_intensity`."""
    return name != KEY and bool(difflib.get_close_matches(name.lower(), [KEY], cutoff=0.7))


def check_arguments(given: Iterable[str], others_may_read: bool) -> None:
    """Refuses arguments that nothing reads: a request with a misspelt λ would silently run at the default.

    Args:
        given: names in `extra_args`, or in `vllm_xargs`.
        others_may_read: whether the engine has the user's own logits processors, whose arguments we don't know. Then
            only names that resemble λ's are refused.

    Raises:
        RequestError: if there is such an argument, which the message names; the server answers with status 400.
    """
    for name in given:
        if name == KEY or name in VLLM_ARGUMENTS or (others_may_read and not resembles_key(name)):
            continue
        raise RequestError(
            f"extra arguments of a request to a pair must be {KEY!r} alone, got {name!r}", parameter=name
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value))
