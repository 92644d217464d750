"""Sets λ for one `generate` call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from dami.dial.choosing import named, resolved
from dami.dial.course import Course, Line
from dami.dial.patch import device_of, patch_of
from dami.dial.turning import separate
from dami.dial.values import as_lam, parts_of
from dami.schedules import Schedule


@contextmanager
def course_of(
    model: nn.Module, intensity: Any, prompt_intensity: Any, prompts: int, options: Mapping[str, Any]
) -> Iterator[None]:
    """Sets the λ of a patched model for one `generate`, whose forward passes run inside the `with` block.

    Args:
        model: a patched model.
        intensity: a number, a preset's name, "auto", a schedule, or one of them per prompt; a mapping of parts of the
            model to these; an iterator, of which the first are taken; or None, for λ as it is.
        prompt_intensity: a number, or one per prompt, for reading the prompts; or None.
        prompts: how many there are.
        options: arguments of `generate` by name.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    patch = patch_of(model)
    device = device_of(model)
    if isinstance(intensity, Iterator):
        intensity = list(islice(intensity, prompts))
    parts: list[tuple[Any, Any, Any]] = [(None, None, intensity)]
    if isinstance(intensity, Mapping):
        parts = parts_of(intensity)
    parts = [(modules, layers, resolved(model, value, options, prompts)) for modules, layers, value in parts]
    prompt = prompt_intensity if prompt_intensity is None else named(model, prompt_intensity)
    prompt = prompt if prompt is None else as_lam(prompt, device, prompts, "prompt_intensity")
    before = patch.course
    for part in patch.parts:
        as_lam(part.lam, device, prompts)
    with ExitStack() as stack:
        lines = []
        whole = stack.enter_context(separate(model))
        if prompt is not None and isinstance(intensity, Mapping):
            lines.append(Line(whole, as_lam(whole.lam, device, prompts), [], prompt))
        for modules, layers, value in parts:
            dial = whole if modules is None else stack.enter_context(separate(model, modules, layers))
            fixed, schedules = _split(dial.lam if value is None else value, device, prompts)
            lines.append(Line(dial, fixed, schedules, prompt))
        _refuse(
            model,
            options,
            prompt is not None or any(line.schedules for line in lines),
            mixed=any(line.fixed.numel() > 1 for line in lines),
        )
        patch.course = Course(lines)
        stack.callback(setattr, patch, "course", before)
        patch.course.turn(torch.empty(prompts, 0, dtype=torch.int64), prompt=True)  # an encoder runs before any pass
        yield


def _split(value: Any, device: torch.device, prompts: int) -> tuple[Tensor, list[tuple[Schedule, list[int]]]]:
    """What is fixed of an intensity, and its schedules, each with the prompts it is for."""
    values = [value] * prompts if callable(value) else value
    if not isinstance(values, Sequence) or isinstance(values, str) or not any(map(callable, values)):
        return as_lam(value, device, prompts), []
    fixed = as_lam([0.0 if callable(each) else each for each in values], device, prompts)
    places: dict[int, list[int]] = {}
    for place, each in enumerate(values):
        if callable(each):
            places.setdefault(id(each), []).append(place)
    return fixed, [(values[several[0]], several) for several in places.values()]


SEVERAL_STEPS_IN_ONE = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def _refuse(model: Any, options: Mapping[str, Any], changing: bool, mixed: bool) -> None:
    """Refuses what would run at another λ than asked for: ValueError."""

    def option(name: str) -> Any:
        config = options.get("generation_config") or model.generation_config
        return options.get(name, getattr(config, name, None))

    several = "assistant_model" if options.get("assistant_model") is not None else None
    several = several or next((name for name in SEVERAL_STEPS_IN_ONE if option(name)), None)
    if changing and several:
        raise ValueError(
            f"{several} takes one intensity for all steps, as it checks tokens of several steps in one forward pass: "
            "got a schedule or a prompt_intensity"
        )
    if option("cache_implementation") == "paged":
        if changing:
            raise ValueError(
                "cache_implementation='paged' takes one intensity for all steps, got a schedule or a prompt_intensity"
            )
        mask = options.get("attention_mask")
        if isinstance(mask, Tensor) and not bool(mask.all()):
            raise ValueError(
                "cache_implementation='paged' takes prompts of equal length, as it reads padding as text: "
                "call model.generate_batch with a list of prompts"
            )
    if (changing or mixed) and option("token_healing"):
        raise ValueError("token_healing takes one intensity for all prompts, as it generates for each alone")
