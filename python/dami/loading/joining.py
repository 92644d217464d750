"""Joins two checkpoints: checks that they are the ends of a pair, and puts the second onto the model of the first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from dami.dial.patch import Origin, patch_of
from dami.estimators.attach import attach
from dami.layers.packed import LowRank
from dami.loading import adapters
from dami.loading.adapters import Adapter
from dami.loading.checkpoint import Checkpoint
from dami.loading.match import Match
from dami.patching.model import PairModel
from dami.patching.patch import interpolate, patch_model
from dami.patching.ties import untie
from dami.sources import FOLDER, SETTINGS

Tokenizer = PreTrainedTokenizerBase | Any  # None if the instruct end has none; Any spares most callers the check

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Joining:
    """Two ends that match. Either may be a LoRA adapter.

    Attributes:
        ends: the instruct end and the thinking end.
        base: the checkpoint whose model is loaded: the instruct end, or what its adapter was trained on.
        adapters: of each end the adapter that it is, or None.
        match: what is known of two whole checkpoints; None if the thinking end is an adapter.
    """

    ends: tuple[Checkpoint, Checkpoint]
    base: Checkpoint
    adapters: tuple[Adapter | None, Adapter | None]
    match: Match | None

    @classmethod
    def of(cls, ends: tuple[Checkpoint, Checkpoint], base: Checkpoint, dtypes: bool = True) -> Joining:
        """Checks two ends. `dtypes` as in `Match.of`. Raises ValueError: they do not match; every mismatch is named."""
        read = tuple(Adapter.read(end.directory) if end.is_adapter else None for end in ends)
        for adapter in filter(None, read):
            if mismatches := adapter.mismatches(base.skeleton()):
                names = f"{base.directory} and {adapter.directory}"
                raise ValueError("\n  ".join([f"{names} do not match:", *mismatches]))
        match = Match.of(base, ends[1], dtypes) if read[1] is None else None
        return cls(ends, base, (read[0], read[1]), match)

    @property
    def whole(self) -> Match | None:
        """The match of two whole checkpoints, both stored as the model is; None for any others."""
        stored = self.match is not None and all(each.complete for each in self.match.stored)
        return self.match if stored and self.adapters[0] is None else None

    def tokenizer(self, chat_template: str = "instruct") -> Tokenizer:
        """Returns the instruct end's tokenizer or None, with both ends' chat templates by name if they differ."""
        if self.match is not None and self.base is self.ends[0]:
            return with_both_templates(self.match.tokenizers, chat_template)
        first, second = (end.tokenizer() for end in self.ends)
        return with_both_templates((first or self.base.tokenizer(), second), chat_template)

    def onto(self, plain: PreTrainedModel, format: str, invariant: bool, options: Mapping[str, Any]) -> PairModel:
        """Patches the base's model, with the thinking end's estimator and presets if there are any.

        Args:
            plain: the base's model.
            format, invariant: as in `patch_model`.
            options: how to load the thinking end as a model, if it is not stored as the model is.
        """
        first, second = self.adapters
        shared = untie(plain) if any(each.unties(plain) for each in (first, second) if each) else None
        if second is not None:
            tensors = second.tensors(plain) if first is None else _between(first, second, plain, format)
            model = interpolate(plain, tensors, format, invariant=invariant, owned=True)
        else:
            if first is not None:
                first.apply(plain)
            model = self._whole_onto(plain, format, invariant, options, shared is None)
        patch = patch_of(model)
        patch.origin, patch.shared = (
            Origin([end.parent() for end in self.ends]),
            patch.shared if shared is None else shared,
        )
        return with_estimator(model, self.ends[1])

    def _whole_onto(
        self, plain: PreTrainedModel, format: str, invariant: bool, options: Mapping[str, Any], as_stored: bool
    ) -> PairModel:
        """Does it for a whole thinking end. `as_stored` tells whether the model's tensors are those that are stored."""
        thinking, match = self.ends[1], self.match
        if as_stored and match is not None and match.stored[1].complete:
            tensors = thinking.tensors(match.stored[1].names)
            return interpolate(plain, tensors, format, invariant=invariant, owned=True)
        logger.warning(f"{thinking.name} is not stored as the model is: loading it as a second model on the CPU first")
        other = thinking.model(dtype=plain.dtype, **options)
        return patch_model(plain, other, format, invariant=invariant)


def base_of(ends: tuple[Checkpoint, Checkpoint], base: str | Path | None, options: Mapping[str, Any]) -> Checkpoint:
    """Finds the checkpoint whose model is loaded: the instruct end, or what its adapter was trained on.

    Args:
        ends: both ends.
        base: what the adapters were trained on, if it is not what they name.
        options: those of the instruct end; `revision` and `subfolder` do not apply to the base of an adapter.

    Raises:
        TypeError: `base` is given, and the instruct end is no adapter.
        ValueError: adapters were trained on different bases.
    """
    instruct, thinking = ends
    if not instruct.is_adapter:
        if base is not None:
            raise TypeError(f"base is for an adapter as the instruct end, which {instruct.path} is not: leave it out")
        return instruct
    configs = [json.loads((end.directory / adapters.CONFIG).read_text()) for end in ends if end.is_adapter]
    names = [config.get("base_model_name_or_path") for config in configs]
    if base is None and len({*names}) > 1:
        raise ValueError(
            f"{instruct.directory} and {thinking.directory} must be adapters on one base, got "
            f"{names[0]!r} and {names[1]!r}: if these are the same, name it, base=…"
        )
    elsewhere = {name: value for name, value in options.items() if name not in ("revision", "subfolder")}
    if base is None and configs[0].get("revision"):
        elsewhere["revision"] = configs[0]["revision"]
    if base is None and not names[0]:
        raise ValueError(f"the adapter {instruct.directory} does not say what it was trained on: name it, base=…")
    try:
        return Checkpoint.at(base or names[0], elsewhere)
    except OSError as error:
        raise OSError(f"{instruct.directory} is an adapter, and its base cannot be found: {error}; base=…") from error


def _between(
    first: Adapter, second: Adapter, model: PreTrainedModel, format: str
) -> Iterator[tuple[str, Tensor | LowRank]]:
    """Puts one adapter into the model, tensor by tensor, and yields what the other makes of each on the same base.

    With `format="lowrank"` the difference keeps its rank: that of both adapters together.
    """
    state = model.state_dict(keep_vars=True)
    for name in dict.fromkeys((*first.names, *second.names)):
        mine, other = first.end(name, model), second.end(name, model)
        low = [adapter.low_rank(name, model) for adapter in (first, second)]
        state[name].data = mine
        if format == "lowrank" and low[0] is not None and low[1] is not None:
            yield name, low[1].minus(low[0])
        else:
            yield name, other


def with_estimator(model: PairModel, where: Checkpoint) -> PairModel:
    """Attaches the estimator and presets stored next to the weights, if there are any, and returns the model."""
    directory = where.directory / FOLDER
    return attach(model, directory) if (directory / SETTINGS).exists() else model


def with_both_templates(tokenizers: tuple[Tokenizer, Tokenizer], default: str) -> Tokenizer:
    """Returns the instruct end's tokenizer or None, with both ends' chat templates by name if they differ."""
    tokenizer, other = tokenizers
    if tokenizer is not None and other is not None and tokenizer.chat_template != other.chat_template:
        templates = {"instruct": tokenizer.chat_template, "thinking": other.chat_template}
        templates = {name: template for name, template in templates.items() if template}
        tokenizer.chat_template = {"default": templates.get(default, next(iter(templates.values()))), **templates}
    return tokenizer
