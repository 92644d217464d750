"""How the tensors that a checkpoint stores become those of its model, and how these are read, one at a time."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.quantizers import HfQuantizer
from transformers.utils import logging

from dami.loading.checkpoint import Checkpoint
from dami.patching.compare import Header, first_names, headers_of
from dami.upstream import ignored_keys

READERS = 8  # threads that read what one tensor of the model is made from


@dataclass(frozen=True)
class Conversion:
    """What transformers makes of stored tensors while it loads, such as one weight of all experts of a layer.

    Attributes:
        converter: how, one of transformers' own.
        name: of the tensor in the model, or of the first one if it makes several.
        sources: the stored names by the pattern of the converter that they match, in the order that it takes.
        model: the model without its weights.
        dtype: that of what it dequantises, None if it does not dequantise.
    """

    converter: WeightConverter
    name: str
    sources: Mapping[str, list[str]]
    model: PreTrainedModel
    dtype: str | None = None

    @property
    def stored_names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    def made(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Returns the tensors of the model by name; `read` returns a stored tensor by name."""
        with ThreadPoolExecutor(READERS) as pool:
            return self._converted({name: pool.submit(read, name) for name in self.stored_names})

    def headers(self, stored: Mapping[str, Header]) -> dict[str, Header]:
        """Returns shape and dtype of what it makes by name; {} if that cannot be told from those of stored tensors."""
        if self.dtype is not None:  # decompressing reads the shape from a tensor
            return {self.name: (list(self.model.state_dict()[self.name].shape), self.dtype)}
        try:
            found = self._converted({name: _empty(stored[name]) for name in self.stored_names})
        except Exception:  # a converter reads values, or misses tensors
            return {}
        return {name: (list(made.shape), str(made.dtype).removeprefix("torch.")) for name, made in found.items()}

    def _converted(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.name, name, pattern, given[name])
        found = converter.convert(self.name, model=self.model, config=self.model.config)
        firsts = first_names(self.model)
        return {firsts.get(name, name): made[0] if isinstance(made, list) else made for name, made in found.items()}


def _empty(header: Header) -> Tensor:
    shape, dtype = header
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


@dataclass(frozen=True)
class StoredTensors:
    """How a checkpoint's stored tensors map to the tensors of the model.

    Attributes:
        names: each tensor's names in the model, by stored name. Tied tensors appear once, under the first's name,
            unless the pair unties them.
        conversions: how a tensor of the model is made from several stored ones, or from a part of one, by its name.
        headers: shape and dtype by the name in the model.
        converted: shape and dtype of tensors from which only transformers can make the model's, by stored name.
        unused: the stored names of tensors that transformers does not read either.
        complete: whether every tensor of the model can be read by itself.
    """

    names: dict[str, list[str]]
    conversions: dict[str, Conversion]
    headers: dict[str, Header]
    converted: dict[str, Header]
    unused: list[str]
    complete: bool

    @classmethod
    def of(
        cls,
        skeleton: PreTrainedModel,
        headers: Mapping[str, Header],
        ties: Mapping[str, str] | None = None,
        dequantizing: tuple[HfQuantizer, str] | None = None,
    ) -> StoredTensors:
        """Finds each stored tensor in the model, with or without the base model's prefix.

        Args:
            skeleton: the model without its weights.
            headers: shape and dtype by stored name.
            ties: weights that this checkpoint ties but the skeleton does not, by name, with their sources.
            dequantizing: what undoes its quantisation, and the dtype that its weights have then.
        """
        firsts = first_names(skeleton)
        found, conversions, unused = _in_model(skeleton, headers, firsts, dequantizing)
        for target, source in (ties or {}).items():
            if source in found or target in found:
                found[target] = found[source] = found.get(source) or found[target]
        names: dict[str, list[str]] = {}
        for known, name in found.items():
            names.setdefault(name, []).append(known)
        names = {name: names[name] for name in headers if name in names}
        own = {known: headers[name] for name, owns in names.items() for known in owns}
        shapes = headers_of(skeleton)
        made: dict[str, Conversion] = {}
        converted: dict[str, Header] = {}
        for conversion in conversions:
            told = conversion.headers(headers)
            own |= told
            if told and all(name in shapes and shapes[name][0] == shape for name, (shape, _) in told.items()):
                made |= dict.fromkeys(told, conversion)
            elif not told:
                converted |= {name: headers[name] for name in conversion.stored_names}
        complete = found.keys() | made.keys() == set(firsts.values())
        if dequantizing is not None and not complete:  # then transformers loads it whole
            return cls({}, {}, {}, {}, [], False)
        return cls(names, made, own, converted, unused, complete)

    def read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """Returns a tensor of the model by its name, on the CPU, from the checkpoint's files."""
        conversion = self.conversions.get(name)
        if conversion is None:
            return checkpoint.read(self.stored_as[name])
        return conversion.made(checkpoint.read)[name]

    @property
    def stored_as(self) -> dict[str, str]:
        """The stored name of each tensor that is stored as the model has it, by its name in the model."""
        return {own: name for name, owns in self.names.items() for own in owns}

    def tensors(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors of the model one at a time under each of their names."""
        with logging.tqdm(total=len(self.headers), desc=f"Reading {checkpoint.directory.name}") as bar:
            for name in sorted(self.names, key=checkpoint.place):  # file by file
                tensor = checkpoint.read(name)
                for own in self.names[name]:
                    yield own, tensor
                    bar.update()
            for conversion in {id(each): each for each in self.conversions.values()}.values():
                for own, tensor in conversion.made(checkpoint.read).items():
                    yield own, tensor
                    bar.update()


def _in_model(
    skeleton: PreTrainedModel,
    stored: Iterable[str],
    firsts: Mapping[str, str],
    dequantizing: tuple[HfQuantizer, str] | None = None,
) -> tuple[dict[str, str], list[Conversion], list[str]]:
    """Finds what stored tensors are in the model, as transformers does while it loads.

    What is dequantised comes in float32, so that it is rounded once, to the pair's dtype.

    Returns:
        the stored names of those that are the model's, by the first name there; the conversions of others; and the
        stored names of those that transformers does not read.
    """
    quantizer, dtype = dequantizing or (None, None)
    if quantizer is not None:
        skeleton = copy.deepcopy(skeleton).float()
    mapping = get_model_conversion_mapping(skeleton, hf_quantizer=quantizer)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    ignored = re.compile("|".join(ignored_keys(skeleton) or ["(?!)"]))
    model = skeleton.base_model_prefix, dict(firsts)
    found: dict[str, str] = {}
    converted: dict[str, dict[str, list[str]]] = {}
    unused = []
    for name in sorted(stored, key=dot_natural_key):  # the order in which transformers collects what it joins
        known, pattern = rename_source_key(name, renamings, converters, *model)
        if known not in firsts:  # it is not to be renamed then, but for the prefix of the base model
            known, pattern = rename_source_key(name, [], [], *model)
        if known not in firsts:
            unused += [] if ignored.search(name) else [name]
        elif pattern is not None:
            converted.setdefault(known, {}).setdefault(pattern, []).append(name)
        elif known == firsts[known] or firsts[known] not in found:  # of tied tensors the first, as in transformers
            found[firsts[known]] = name
    for known, each in list(converted.items()) if quantizer is not None else ():
        [first, *others] = [name for names in each.values() for name in names]
        if not others and rename_source_key(first, renamings, [], *model)[0] == known:  # not quantised
            found[firsts[known]] = first
            del converted[known]
    conversions = [
        Conversion(by_pattern[next(iter(each))], known, each, skeleton, dtype) for known, each in converted.items()
    ]
    return found, conversions, unused
