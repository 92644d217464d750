"""Computes the images of a batch at several λ: those of each sequence at its own.

Images come as one tensor for the whole batch, in the order of the sequences. The places that the tokens keep for them
tell how many are whose.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dami.layers.base import LerpModule
from dami.layers.per_sequence import alone, number_of_lam

MEDIA = re.compile("pixel|image|video|audio|input_features|input_values")
ARGUMENTS = re.compile("pixel_values(_videos)?|(image|video)_grid_thw|image_sizes")  # those understood here
READ = ("pooler_output", "deepstack_features")  # what language models take from the result
UNKNOWN = "{} takes one intensity for the batch: whose it is, its shape does not tell"
METHODS = {  # of a model that computes media for its language model, and the config's names of their token's id
    "get_image_features": ("image_token_id", "image_token_index"),
    "get_video_features": ("video_token_id", "video_token_index"),
}


def check_media(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Returns whether a batch at several λ has media; raises ValueError if it is not known whose they are."""
    given = [name for name in kwargs if MEDIA.search(name) and kwargs[name] is not None]
    given = [name for name in given if name != model.main_input_name]
    known = not torch.compiler.is_compiling() and _holders(model)
    for name in given:
        if not (known and ARGUMENTS.fullmatch(name)):
            raise ValueError(UNKNOWN.format(name))
    return bool(given)


@contextmanager
def media_by_sequence(model: Any, input_ids: Any) -> Iterator[None]:
    """Lets a model compute images and videos sequence by sequence, for the duration of a `with` block.

    `generate` computes them before the first pass: at the λ at which the prompts are read.
    """
    changed = []
    try:
        for name, module in _holders(model):
            token = next((t for key in METHODS[name] if (t := getattr(model.config, key, None)) is not None), None)
            compute = getattr(module, name)
            each = functools.partial(_each, model, compute, input_ids, token)
            vars(module)[name] = functools.update_wrapper(each, compute)  # transformers looks at its arguments
            changed.append((module, name))
        yield
    finally:
        for module, name in changed:
            del vars(module)[name]


def _holders(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the parts of a model that compute media, with the names of their methods for that."""
    return [
        (name, module)
        for module in model.modules()
        if module is not model
        for name in METHODS
        if callable(getattr(type(module), name, None))
    ]


def _each(model: Any, compute: Callable[..., Any], input_ids: Any, token: int | None, *args: Any, **kwargs: Any) -> Any:
    """Computes the media of each λ's sequences, and joins the results.

    Args:
        model: the patched model.
        compute: how it computes media.
        input_ids: int64 [B, T], the tokens.
        token: the id of those that keep places for media; None if unknown.
        args, kwargs: what `compute` takes: first the pixels of all images, [images, …] or [patches, …]. Other tensors
            with a row for each image are split as the images are.
    """
    patch = model.dami_patch
    modules, running = [each for each in model.modules() if isinstance(each, LerpModule)], patch.running
    program = None if running.sequences is not None else patch.program
    if program is not None and program.prompt is not None:
        program.read()
    elif program is not None:
        program.turn(input_ids, prompt=True)
    number = number_of_lam(modules)
    if number is None:
        with running.entered():
            return compute(*args, **kwargs)
    if unknown := [name for name, each in kwargs.items() if isinstance(each, Tensor) and not ARGUMENTS.fullmatch(name)]:
        raise ValueError(UNKNOWN.format(unknown[0]))
    pixels, *rest = args or [kwargs.pop(next(name for name in kwargs if name.startswith("pixel_values")))]
    tensors = [each for each in (*rest, *kwargs.values()) if isinstance(each, Tensor)]
    known = isinstance(input_ids, Tensor) and token is not None
    images = _images_of_each((input_ids == token).sum(1) if known else None, number, pixels, tensors)
    per_image = _patches(pixels, tensors)
    found = []
    for at, (first, last) in enumerate(images):
        if first == last:
            continue
        rows = slice(sum(per_image[:first]), sum(per_image[:last]))
        own = [_rows(each, slice(first, last), len(per_image)) for each in rest]
        named = {key: _rows(each, slice(first, last), len(per_image)) for key, each in kwargs.items()}
        with alone(modules, running, at, 0):
            found.append(compute(pixels[rows], *own, **named))
    return _joined(found)


def _patches(pixels: Tensor, tensors: Sequence[Tensor]) -> list[int]:
    """Returns how many rows of `pixels` each image has: a grid [images, 3] tells it, or else it is one."""
    grid = next((each for each in tensors if each.dim() == 2 and each.shape[1] == 3), None)
    if grid is not None and int(grid.prod(1).sum()) == len(pixels):
        return [int(each) for each in grid.prod(1)]
    return [1] * len(pixels)


def _images_of_each(
    counts: Tensor | None, number: int, pixels: Tensor, tensors: Sequence[Tensor]
) -> list[tuple[int, int]]:
    """Returns the first image of each λ's sequences, and the one after the last.

    The tokens that an image takes are in proportion to its area: to its grid or its size if there are any, and else
    the same for all.

    Raises:
        ValueError: the images of one sequence do not end where its tokens do.
    """
    sizes = next((each for each in tensors if each.dim() == 2 and each.shape[1] in (2, 3)), None)
    areas = torch.ones(len(pixels)) if sizes is None else sizes.prod(1)
    wanted = torch.zeros(1) if counts is None else counts.view(number, -1).sum(1)
    ends = areas.double().cumsum(0) * (float(wanted.sum()) / float(areas.sum()))
    places, at = [], 0
    for end in wanted.double().cumsum(0).tolist():
        first = at
        while at < len(ends) and float(ends[at]) < end + 0.5:
            at += 1
        if at > 0 and abs(float(ends[at - 1]) - end) > 1e-6 * max(1.0, end):
            break
        places.append((first, at))
    if len(places) != number or at != len(ends):
        raise ValueError(
            f"the {len(ends)} images of a batch at several intensities must be told apart by the tokens that each "
            f"sequence keeps for them, got {wanted.long().tolist()} tokens: use one intensity for the batch"
        )
    return places


def _rows(value: Any, rows: slice, images: int) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == images else value


def _joined(parts: Sequence[Any]) -> Any:
    """Joins the results for the images of several sequences as the result for all of them."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return type(first)(**{key: _joined([part[key] for part in parts]) for key in first if key in READ})
    if isinstance(first, (tuple, list)) and all(isinstance(each, Tensor) for each in first):
        return type(first)(tensor for part in parts for tensor in part)  # one for each image
    if isinstance(first, (tuple, list)):  # one for each layer
        return type(first)(_joined(each) for each in zip(*parts, strict=True))
    return first
