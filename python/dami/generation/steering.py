"""Sets λ for a `generate` call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dami.callers import CALLERS, PROMPT
from dami.dial.choosing import chosen
from dami.dial.patch import device_of, patch_of
from dami.dial.program import DialProgram, DialTrack
from dami.dial.turning import separate
from dami.dial.values import Intensity, as_lam


@contextmanager
def programmed(
    model: nn.Module,
    intensity: Any,
    prompt_intensity: Any,
    prompts: int,
    options: Mapping[str, Any],
    each: bool = False,
) -> Iterator[None]:
    """Sets the λ of a patched model for one `generate`, whose forward passes run inside the `with` block.

    Args:
        model: a patched model.
        intensity: a number, a preset's name, "auto", a schedule, or one of them per prompt; a mapping from parts of the
            model to these; an iterator, whose first values are used; or None, which keeps λ as it is.
        prompt_intensity: a number, or one per prompt, for reading the prompts; or None.
        prompts: number of prompts.
        options: arguments of `generate` by name.
        each: whether to give every prompt a λ of its own even if there is only one λ, so that λ always has one shape.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it is and what it must be.
    """
    patch = patch_of(model)
    device = device_of(model)
    wanted = None if intensity is None else chosen(model, intensity, CALLERS["generate"], options, prompts)
    prompt = None
    if prompt_intensity is not None:
        prompt = Intensity.parse(prompt_intensity, PROMPT, patch.presets, prompts).to(device)
    before = patch.program

    def shaped(lam: Tensor) -> Tensor:
        return lam.repeat(prompts) if each and lam.dim() == 0 else lam

    for apart in patch.parts:
        as_lam(apart.lam, device, prompts)
    with ExitStack() as stack:
        tracks = []
        whole = stack.enter_context(separate(model))
        if wanted is None or (prompt is not None and wanted.parts):
            tracks.append(DialTrack(whole, shaped(as_lam(whole.lam, device, prompts)), [], prompt))
        elif not wanted.parts:
            tracks.append(DialTrack(whole, shaped(wanted.to(device)), wanted.schedules, prompt))
        for modules, layers, part in wanted.parts if wanted is not None else ():
            dial = stack.enter_context(separate(model, modules, layers))
            tracks.append(DialTrack(dial, shaped(part.to(device)), part.schedules, prompt))
        _refuse(
            model,
            options,
            prompt is not None or any(track.schedules for track in tracks),
            mixed=any(track.fixed.numel() > 1 for track in tracks),
        )
        patch.program = DialProgram(tracks)
        stack.callback(setattr, patch, "program", before)
        patch.program.turn(torch.empty(prompts, 0, dtype=torch.int64), prompt=True)  # an encoder runs before any pass
        yield


SEVERAL_STEPS_IN_ONE = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def option(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """Returns a setting of one `generate`: as its arguments say, or its generation config."""
    config = options.get("generation_config") or model.generation_config
    return options.get(name, getattr(config, name, None))


def _refuse(model: Any, options: Mapping[str, Any], changing: bool, mixed: bool) -> None:
    """Raises ValueError for options that would run at a λ other than the requested one."""

    several = "assistant_model" if options.get("assistant_model") is not None else None
    several = several or next((name for name in SEVERAL_STEPS_IN_ONE if option(model, options, name)), None)
    if changing and several:
        raise ValueError(
            f"{several} takes one intensity for all steps, as it checks tokens of several steps in one forward pass: "
            "got a schedule or a prompt_intensity"
        )
    if option(model, options, "cache_implementation") == "paged":
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
    if (changing or mixed) and option(model, options, "token_healing"):
        raise ValueError("token_healing takes one intensity for all prompts, as it generates for each alone")
