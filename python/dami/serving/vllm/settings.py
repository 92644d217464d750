"""The settings of a pair in vLLM, and the checks of a request's arguments."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from vllm.exceptions import VLLMValidationError

from dami.callers import DEFAULT_INTENSITY, TURN, listed
from dami.generation.reading import TAIL
from dami.serving.protocol import SAME
from dami_kernels import formats

KEY = "intensity"
# about λ, in `SamplingParams.extra_args`, in `vllm_xargs` and in a request's body
FIELDS = (KEY, "max_intensity", "prompt_intensity", "prompt_tail", "intensity_schedule", "answer_intensity")
# keys of `extra_args` that vLLM itself reads
VLLM_ARGUMENTS = frozenset({"kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode"})
KEYS = (
    "thinking",
    "thinking_revision",
    "format",
    "default_intensity",
    "prompt_intensity",
    "prompt_tail",
    "intensity_range",
)


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
        default_intensity: λ of requests that name none: a number, a preset or "auto".
        prompt_intensity: λ at which prompts are read: a number, a preset, or "same" for that of the answer.
        prompt_tail: how many tokens at the end of a prompt are read at the λ of the answer; "turn" for all from the
            text of the last user message on, and `TAIL` where there is no chat.
        intensity_range: lowest and highest λ that a request may ask for.
    """

    thinking: str | None = None
    thinking_revision: str | None = None
    format: str | None = None
    default_intensity: float | str = DEFAULT_INTENSITY
    prompt_intensity: float | str = SAME
    prompt_tail: int | str = TAIL
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
        least, greatest = settings.intensity_range
        for name, words in (("default_intensity", "a preset or 'auto'"), ("prompt_intensity", f"a preset or {SAME!r}")):
            value = getattr(settings, name)
            if not isinstance(value, str) and not (_is_finite(value) and least <= value <= greatest):
                raise ValueError(f"{name} must be a number from {least:g} to {greatest:g}, {words}, got {value!r}")
        if settings.prompt_tail != TURN:
            check_tail(settings.prompt_tail, f", or {TURN!r}")
        return settings


def check_tail(tail: Any, otherwise: str = "") -> None:
    """Raises ValueError unless this is a number of tokens; the server answers with status 400.

    Args:
        tail: the value.
        otherwise: what else it may be, for the message.
    """
    if isinstance(tail, bool) or not isinstance(tail, int) or tail < 0:
        raise RequestError(
            f"prompt_tail must be an integer of at least 0{otherwise}, got {tail!r}", parameter="prompt_tail"
        )


def resembles_field(name: str) -> bool:
    """Returns whether an unknown argument was probably meant as one about λ: `intensty`, `Intensity`, `prompt_tial`."""
    cutoffs = {field: 0.7 if KEY in field else 0.85 for field in FIELDS}  # many a name begins with "prompt_"
    return name not in FIELDS and any(
        difflib.get_close_matches(name.lower(), [field], cutoff=cutoff) for field, cutoff in cutoffs.items()
    )


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
        if name in FIELDS or name in VLLM_ARGUMENTS or (others_may_read and not resembles_field(name)):
            continue
        raise RequestError(
            f"extra arguments of a request to a pair must be {listed(FIELDS)}, got {name!r}", parameter=name
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value))
