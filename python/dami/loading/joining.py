"""Joins two checkpoints: checks that they are the ends of a pair, and puts the second onto the model of the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from dami.dial.patch import Origin, patch_of
from dami.estimators.attach import attach
from dami.layers.packed import LowRank
from dami.loading import adapters
from dami.loading.adapters import Adapter
from dami.loading.checkpoint import Checkpoint
from dami.loading.match import Match, check_distinct, vocabulary_tensors
from dami.loading.policies import ENDS, Choices, End, copy_rope, tokenizer_end, translated
from dami.patching.model import PairModel
from dami.patching.patch import interpolate, patch_model
from dami.patching.ties import untie
from dami.sources import FOLDER, SETTINGS, read_object

Tokenizer = PreTrainedTokenizerBase | Any  # None if the instruct end has none; Any spares most callers the check

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Joining:
    """Two ends that match. Either may be a LoRA adapter.

    Attributes:
        ends: the instruct end and the thinking end.
        base: the checkpoint whose model is loaded: the instruct end, or what its adapter was trained on.
        adapters: of each end the adapter that it is, or None.
        match: what differs between two whole checkpoints, of which the base is the first, and how it is resolved; None
            if the thinking end is an adapter.
    """

    ends: tuple[Checkpoint, Checkpoint]
    base: Checkpoint
    adapters: tuple[Adapter | None, Adapter | None]
    match: Match | None

    @classmethod
    def of(cls, ends: tuple[Checkpoint, Checkpoint], base: Checkpoint, choices: Choices | None = None) -> Joining:
        """Checks two ends.

        Args:
            ends: the instruct end and the thinking end.
            base: as in the class.
            choices: the user's, where the ends differ.

        Raises:
            ValueError: they do not match; every mismatch is named. Or there is nothing to choose.
        """
        check_distinct(ends)
        if ends[1].is_adapter and choices is not None:
            choices.check_adapter()
        read = tuple(Adapter.read(end.directory) if end.is_adapter else None for end in ends)
        for adapter in filter(None, read):
            if mismatches := adapter.mismatches(base.skeleton()):
                names = f"{base.directory} and {adapter.directory}"
                raise ValueError(
                    "\n  ".join([f"{names} do not match:", *mismatches[:-1], f"{mismatches[-1]}; {adapters.MISFIT}"])
                )
        match = Match.of(base, ends[1], choices) if read[1] is None else None
        if match is not None:
            match.check()
        return cls(ends, base, (read[0], read[1]), match)

    @property
    def whole(self) -> Match | None:
        """The match of two whole checkpoints, both stored as the model is; None for any others."""
        stored = self.match is not None and all(each.complete for each in self.match.stored)
        return self.match if stored and self.adapters[0] is None else None

    def warn(self) -> None:
        """Tells how each difference is resolved."""
        for difference in () if self.match is None else self.match.report.resolved:
            logger.warning(f"{difference}")

    def tokenizer(self, chat_template: str = "instruct") -> Tokenizer:
        """Returns the pair's tokenizer or None, with both ends' chat templates by name if they differ."""
        if self.match is not None and self.base is self.ends[0]:
            return with_both_templates(self.match.tokenizers, chat_template, self.match.tokenizer)
        first, second = (end.tokenizer() for end in self.ends)
        tokenizers = first or self.base.tokenizer(), second
        chosen = "instruct" if self.match is None else tokenizer_end(tokenizers, self.match.choices)
        return with_both_templates(tokenizers, chat_template, chosen)

    def load(self, *, device_map: Any, dtype: torch.dtype | str, options: Mapping[str, Any]) -> PreTrainedModel:
        """Loads the base's model: in the dtype that holds both ends if `dtype` is "auto"."""
        if self.match is None:
            return self.base.model(device_map=device_map, dtype=dtype, **options)
        return _loaded(self.match, 0, device_map=device_map, dtype=self.match.dtype, **options)

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
        patch.origin = origin_of(self.ends, self.match)
        if shared is not None:
            patch.shared = shared
        return with_estimator(model, self.ends[1])

    def _whole_onto(
        self, plain: PreTrainedModel, format: str, invariant: bool, options: Mapping[str, Any], as_stored: bool
    ) -> PairModel:
        """Does it for a whole thinking end. `as_stored` tells whether the model's tensors are those that are stored."""
        match = self.match
        assert match is not None
        shared = match.prepare(plain)
        if as_stored and match.stored[1].complete:
            model = interpolate(plain, _other_end(match, plain), format, invariant=invariant, owned=True)
        else:
            name = match.ends[1].name
            logger.warning(f"{name} is not stored as the model is: loading it as a second model on the CPU first")
            other = _loaded(match, 1, dtype=plain.dtype, **options)
            match.prepare(other)
            _fill(match, plain, other)
            model = patch_model(plain, other, format, invariant=invariant)
        if shared is not None:
            model.dami_patch.shared = shared
        if match.end_ids is not None and "generation_config" not in options:
            model.generation_config.eos_token_id = match.end_ids
        return model


def base_of(
    ends: tuple[Checkpoint, Checkpoint],
    base: str | Path | None,
    options: Mapping[str, Any],
    find: Callable[[str | Path, Mapping[str, Any]], Checkpoint] = Checkpoint.at,
) -> Checkpoint:
    """Finds the checkpoint whose model is loaded: the instruct end, or what its adapter was trained on.

    Args:
        ends: both ends.
        base: what the adapters were trained on, if it is not what they name.
        options: those of the instruct end; `revision` and `subfolder` do not apply to the base of an adapter.
        find: finds a checkpoint, with such options.

    Raises:
        TypeError: `base` is given, and the instruct end is no adapter.
        ValueError: adapters were trained on different bases.
    """
    instruct, thinking = ends
    if not instruct.is_adapter:
        if base is not None:
            raise TypeError(f"base is for an adapter as the instruct end, which {instruct.path} is not: leave it out")
        return instruct
    configs = [read_object(end.directory / adapters.CONFIG) for end in ends if end.is_adapter]
    names = [config.get("base_model_name_or_path", "") for config in configs]
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
        return find(base or names[0], elsewhere)
    except OSError as error:
        raise OSError(f"{instruct.directory} is an adapter, and its base cannot be found: {error}; base=…") from error


def origin_of(ends: tuple[Checkpoint, Checkpoint], match: Match | None) -> Origin:
    """Returns what a pair keeps about its two checkpoints, but for the tokenizer."""
    parents = [end.parent() for end in ends]
    if match is None:
        return Origin(parents)
    return Origin(parents, None, None, match.report.to_dicts(), match.lacking, match.sampling)


def with_estimator(model: PairModel, where: Checkpoint) -> PairModel:
    """Attaches the estimator and presets stored next to the weights, if there are any, and returns the model."""
    directory = where.directory / FOLDER
    return attach(model, directory) if (directory / SETTINGS).exists() else model


def with_both_templates(tokenizers: tuple[Tokenizer, Tokenizer], default: str, end: End = "instruct") -> Tokenizer:
    """Returns one end's tokenizer or None, with both ends' chat templates by name if they differ.

    The other end's template gets this tokenizer's names of its special tokens.
    """
    own = ENDS.index(end)
    tokenizer, other = tokenizers[own], tokenizers[1 - own]
    if tokenizer is None or other is None or tokenizer.chat_template == other.chat_template:
        return tokenizer
    templates: dict[str, Any] = {end: tokenizer.chat_template, ENDS[1 - own]: other.chat_template}
    if isinstance(other.chat_template, str):
        templates[ENDS[1 - own]] = translated(other.chat_template, other, tokenizer)
    templates = {name: templates[name] for name in ENDS if templates[name]}
    tokenizer.chat_template = {"default": templates.get(default, next(iter(templates.values()))), **templates}
    return tokenizer


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


def _loaded(match: Match, end: int, **options: Any) -> PreTrainedModel:
    """Loads an end, with the rotary embedding that the user has chosen."""
    checkpoint, rope = match.ends[end], match.choices.rope
    if rope not in (None, ENDS[end]):
        config = checkpoint.config()
        copy_rope(match.ends[1 - end].config(), config)
        for name in options.keys() & config.to_dict().keys() - {"dtype"}:  # beside a config, they would be the model's
            setattr(config, name, options.pop(name))
        options["config"] = config
    return checkpoint.model(**options)


def _other_end(match: Match, plain: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the thinking end by their names in the model, each as long as the model's."""
    state = plain.state_dict(keep_vars=True)
    for name, tensor in match.stored[1].tensors(match.ends[1]):
        yield name, match.lengthen(name, state[name], tensor)[1]


def _fill(match: Match, plain: PreTrainedModel, other: PreTrainedModel) -> None:
    """Gives each of two loaded models the rows of the vocabulary that only the other has."""
    short, long = (plain, other) if match.sizes[0] < match.sizes[1] else (other, plain)
    rows, states = slice(min(match.sizes), None), (short.state_dict(), long.state_dict())
    for name in vocabulary_tensors(plain) if match.lacking is not None else ():
        states[0][name][rows] = states[1][name][rows].to(states[0][name].device)
