"""Sets λ for a `generate` call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from dami.callers import CALLERS, PROMPT, TURN
from dami.dial.choosing import asked, estimates
from dami.dial.patch import device_of, patch_of
from dami.dial.program import DialProgram, DialTrack
from dami.dial.turning import separate
from dami.dial.values import Intensity, as_lam
from dami.generation.pieces import CACHE
from dami.upstream import check


@contextmanager
def programmed(
    model: nn.Module,
    intensity: Any,
    prompt_intensity: Any,
    prompt_tail: Any,
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
        prompt_tail: as for `tails_of`; or None, which is 1.
        prompts: number of prompts.
        options: arguments of `generate` by name.
        each: whether to give every prompt a λ of its own even if there is only one λ, so that λ always has one shape.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it is and what it must be.
    """
    patch = patch_of(model)
    device = device_of(model)
    wanted = None if intensity is None else Intensity.parse(intensity, CALLERS["generate"], patch.presets, prompts)
    prompt, tails = _of_prompts(model, prompt_intensity, prompt_tail, prompts)
    auto = sorted(asked(wanted)) if wanted is not None else []
    before = patch.program

    def shaped(lam: Tensor) -> Tensor:
        return lam.repeat(prompts) if each and lam.dim() == 0 else lam

    for apart in patch.parts:
        as_lam(apart.lam, device, prompts)
    waits = bool(auto) and prompt is not None and _can_wait(model, prompt, tails, auto, options)
    found = estimates(model, options, prompts, auto) if auto and not waits else None
    with ExitStack() as stack:
        tracks = []
        whole = stack.enter_context(separate(model))
        if wanted is None or (prompt is not None and wanted.parts):
            tracks.append(DialTrack(whole, shaped(as_lam(whole.lam, device, prompts)), []))
        elif not wanted.parts:
            tracks.append(DialTrack(whole, shaped(wanted.to(device)), wanted.schedules, wanted.auto))
        for modules, layers, part in wanted.parts if wanted is not None else ():
            dial = stack.enter_context(separate(model, modules, layers))
            tracks.append(DialTrack(dial, shaped(part.to(device)), part.schedules, part.auto))
        _refuse(
            model,
            options,
            prompt is not None or any(track.schedules for track in tracks),
            mixed=any(track.fixed.numel() > 1 for track in tracks),
            divided=any(tails),
        )
        patch.program = program = DialProgram(tracks, prompt, tails, auto, options.get(CACHE) is None)
        stack.callback(setattr, patch, "program", before)
        if found is not None:
            patch.chosen = program.decide(found)
        if prompt is None:
            program.turn(torch.empty(prompts, 0, dtype=torch.int64), prompt=True)
        else:
            program.read()  # an encoder runs before any pass
        yield


def _of_prompts(model: nn.Module, intensity: Any, tail: Any, prompts: int) -> tuple[Tensor | None, list[int]]:
    """Returns `prompt_intensity` as float32 [] or [prompts] on the CPU, or None, and the tail of every prompt."""
    check_tail(intensity, tail)
    if intensity is None:
        return None, []
    check("a prompt at another intensity")
    parsed = Intensity.parse(intensity, PROMPT, patch_of(model).presets, prompts)
    return parsed.to(torch.device("cpu")), tails_of(1 if tail is None else tail, prompts)


def check_tail(intensity: Any, tail: Any) -> None:
    """Raises ValueError if there is a `prompt_tail` without a `prompt_intensity`."""
    if intensity is None and tail is not None:
        raise ValueError(
            "prompt_tail says where prompt_intensity ends, and needs one: give prompt_intensity, or leave out "
            f"prompt_tail={tail!r}"
        )


def tails_of(tail: Any, prompts: int) -> list[int]:
    """Parses `prompt_tail`: how many tokens at the end of each prompt are read at the λ of the answer.

    Args:
        tail: an integer of at least 0, or one per prompt: a sequence, an array or a tensor of integers.
        prompts: number of prompts.

    Raises:
        TypeError, ValueError: it is anything else.
    """
    wanted = "prompt_tail must be an integer of at least 0, or one per prompt"
    several = tail.tolist() if hasattr(tail, "tolist") else tail
    if several == TURN:
        raise TypeError(f"{wanted}, got {tail!r}, which is for callers that are given messages, such as dami.chat.ask")
    one = isinstance(several, (str, bytes)) or not isinstance(several, Sequence)
    try:
        numbers = [_count(each) for each in ([several] if one else several)]
    except TypeError:
        raise TypeError(f"{wanted}, got {tail!r}") from None
    if not one and len(numbers) != prompts:
        raise ValueError(f"{wanted}, got {len(numbers)} for {prompts} prompts")
    if min(numbers) < 0:
        raise ValueError(f"{wanted}, got {min(numbers)}")
    return numbers * prompts if one else numbers


def _count(number: Any) -> int:
    if isinstance(number, bool):
        raise TypeError
    return index(number)


def _can_wait(
    model: Any, prompt: Tensor, tails: Sequence[int], auto: Sequence[int], options: Mapping[str, Any]
) -> bool:
    """Whether the estimator can go on from the beginnings of prompts: if they are read at λ=0, and it knows how to."""
    patch = patch_of(model)
    return (
        getattr(patch.estimator, "takes_cache", False)
        and not patch.running.invariant  # which asks about each prompt alone
        and not model.config.is_encoder_decoder
        and options.get(CACHE) is None
        and all(tails)
        and not bool(prompt.expand(len(tails))[list(auto)].any())
    )


SEVERAL_STEPS_IN_ONE = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def option(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """Returns a setting of one `generate`: as its arguments say, or its generation config."""
    config = options.get("generation_config") or model.generation_config
    return options.get(name, getattr(config, name, None))


def _refuse(model: Any, options: Mapping[str, Any], changing: bool, mixed: bool, divided: bool) -> None:
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
    if divided and options.get("custom_generate") is not None:
        raise ValueError(
            "custom_generate takes prompt_tail=0, as only transformers' own loops read the end of a prompt by itself"
        )
    if (changing or mixed) and option(model, options, "token_healing"):
        raise ValueError("token_healing takes one intensity for all prompts, as it generates for each alone")
