"""Checks whether two checkpoints are the ends of a pair, and how the pair resolves what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dami.loading import policies, published
from dami.loading.checkpoint import Checkpoint
from dami.loading.policies import Choices, Difference, End, Report, both, is_floating
from dami.loading.stored import StoredTensors
from dami.patching.compare import Header, first_names, headers_of, tensor_mismatches
from dami.patching.ties import TIES, untie
from dami.sources import check_end
from dami.upstream import ties_of


@dataclass(frozen=True)
class Match:
    """Two checkpoints, and what differs between them.

    Attributes:
        ends: the instruct end and the thinking end.
        choices: what the user has decided.
        config: the pair's config.
        skeleton: the pair's model without its weights.
        tokenizers: the tokenizers of both ends, None for an end without one.
        generations: how each end generates unless told otherwise.
        stored: the tensors that each end stores.
        sizes: the number of rows of each end's embedding.
        untied: whether an end has a head of its own, so that the pair does.
        report: the differences.
    """

    ends: tuple[Checkpoint, Checkpoint]
    choices: Choices
    config: PreTrainedConfig
    skeleton: PreTrainedModel
    tokenizers: tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None]
    generations: tuple[GenerationConfig, GenerationConfig]
    stored: tuple[StoredTensors, StoredTensors]
    sizes: tuple[int, int]
    untied: bool
    report: Report

    @classmethod
    def of(cls, instruct: Checkpoint, thinking: Checkpoint, choices: Choices | None = None) -> Match:
        """Compares configs, tokenizers and weight file headers.

        Raises:
            ValueError: an end is none, or files are damaged. What blocks the pair is only in the report.
        """
        ends, choices = (instruct, thinking), choices or Choices()
        for end in ends:
            check_end(end.path)
        configs = instruct.config(), thinking.config()
        sizes = _vocabulary_size(configs[0]), _vocabulary_size(configs[1])
        headers = instruct.headers(), thinking.headers()
        alike = configs[0].model_type == configs[1].model_type
        plain = instruct.skeleton()
        own = [end.has_own_head(plain) for end in ends] if alike else [True, True]
        untied = any(own) and any(getattr(config, TIES, False) for config in configs)
        config = policies.resolved_config(configs, choices, max(sizes) if alike else sizes[0], untied)
        skeleton = instruct.skeleton(config)
        ties = [ties_of(skeleton) if untied and not each else {} for each in own]
        stored = (
            StoredTensors.of(skeleton, headers[0], ties[0], instruct.dequantizer()),
            StoredTensors.of(skeleton, headers[1], ties[1], thinking.dequantizer()),
        )
        generations = instruct.generation(), thinking.generation()
        tokenizers = instruct.tokenizer(), thinking.tokenizer()
        matching = published.matching(thinking.name)
        differences = [*policies.settings(configs, choices, untied, matching), *policies.quantisation(ends)]
        differences += policies.weights(ends)
        differences += policies.tokens(tokenizers, choices)
        if alike:
            differences += policies.heads(own)
            differences += policies.vocabularies(sizes)
            differences += policies.dtypes((stored[0].headers, stored[1].headers), choices)
            differences += policies.unused(stored)
            differences += _misshapen(skeleton, stored, sizes)
            differences += _tensors(skeleton, stored, headers, sizes)
        differences += policies.generations(generations)
        report = Report(differences)
        return cls(ends, choices, config, skeleton, tokenizers, generations, stored, sizes, untied, report)

    def check(self) -> None:
        """Raises ValueError if the two are no pair; the message names all that blocks it."""
        if self.report.blocking:
            names = f"{self.ends[0].directory} and {self.ends[1].directory}"
            raise ValueError("\n  ".join([f"{names} do not match:", *self.report.obstacles]))

    @property
    def dtype(self) -> torch.dtype | str:
        """The dtype to load both ends in, as `from_pretrained` takes it."""
        mains = [policies.main_dtype(stored.headers) for stored in self.stored]
        if self.choices.dtype != "auto" or mains[0] == mains[1]:
            return self.choices.dtype
        wider = policies.wider_dtype(*mains)
        return "auto" if wider is None else getattr(torch, wider)

    @property
    def tokenizer(self) -> End:
        """The end whose tokenizer the pair gets."""
        return policies.tokenizer_end(self.tokenizers, self.choices)

    @property
    def lacking(self) -> tuple[int, int] | None:
        """The number of rows of each end's embedding if they differ."""
        return self.sizes if self.sizes[0] != self.sizes[1] else None

    @property
    def sampling(self) -> Mapping[str, Mapping[str, object]]:
        """The sampling parameters of both ends if they differ."""
        found = dict(zip(policies.ENDS, map(policies.sampling_of, self.generations), strict=True))
        return found if found["instruct"] != found["thinking"] else {}

    @property
    def end_ids(self) -> list[int] | None:
        """The ids of the tokens that end an answer, those of both ends, if theirs differ."""
        ids = [policies.end_ids(generation) for generation in self.generations]
        return sorted(ids[0] | ids[1]) if ids[0] != ids[1] else None

    def prepare(self, model: PreTrainedModel) -> nn.Parameter | None:
        """Gives a loaded end the pair's context, the length of its vocabulary and, if the pair has one, its own head.

        The new rows are for the caller to fill. Returns the weight that the head shared until now, as `untie` does.
        """
        size = max(self.sizes)
        if _vocabulary_size(model.config) < size:
            model.resize_token_embeddings(size, mean_resizing=False)
        context, config = policies.CONTEXT, self.config.get_text_config()
        if hasattr(config, context):
            setattr(model.config.get_text_config(), context, getattr(config, context))
        head = model.get_output_embeddings()
        if self.untied and head is not None and head.weight is model.get_input_embeddings().weight:
            return untie(model)
        return None

    def lengthen(self, name: str, base: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both ends of a parameter with as many rows: those that one end lacks are the other's.

        A base of the pair's length whose last rows are still to be filled is filled in place.
        """
        if self.lacking is None or name not in self._vocabulary_tensors or base.dim() == 0:
            return base, target
        short, long = min(self.sizes), max(self.sizes)
        if len(target) == short:
            return base, torch.cat((target.to(base.device, base.dtype), base[short:]))
        if len(base) == short:
            return torch.cat((base, target[short:].to(base.device, base.dtype))), target
        if len(base) == long and self.sizes[0] == short:
            base.detach()[short:] = target[short:].to(base.device, base.dtype)
        return base, target

    @property
    def _vocabulary_tensors(self) -> set[str]:
        return set(vocabulary_tensors(self.skeleton))


def check_distinct(ends: tuple[Checkpoint, Checkpoint]) -> None:
    """Raises ValueError if both ends are one checkpoint."""
    if ends[0].path == ends[1].path:
        raise ValueError(
            f"instruct and thinking must be two checkpoints, got {ends[0].name} twice: the chat modes of one "
            "hybrid model are no pair; the other end may be an adapter trained on it"
        )


def vocabulary_tensors(model: PreTrainedModel) -> Iterator[str]:
    """Yields the names of the tensors that have a row for each token."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    for name, module in model.named_modules():
        if any(module is end for end in ends):
            yield from (f"{name}.{own}" for own, _ in module.named_parameters(recurse=False))


def _vocabulary_size(config: PreTrainedConfig) -> int:
    return getattr(config.get_text_config(), "vocab_size", 0)


def _misshapen(
    skeleton: PreTrainedModel, stored: tuple[StoredTensors, StoredTensors], sizes: tuple[int, int]
) -> Iterator[Difference]:
    """Yields the tensors that an end stores in another shape than its own config says.

    Of the thinking end these are only tensors with a row for each token: others are compared with the instruct end's.
    """
    rows, shapes = set(vocabulary_tensors(skeleton)), headers_of(skeleton)
    for end, each, size in zip(policies.ENDS, stored, sizes, strict=True):
        for name in sorted(each.stored_as):
            (shape, _), (wanted, _) = each.headers[name], shapes[name]
            if name in rows and wanted[0] == max(sizes):
                wanted = [size, *wanted[1:]]
            if shape != wanted and (end == "instruct" or name in rows):
                told = f"{shape} in the files of the {end} end, {wanted} by its config"
                yield Difference(name, told, None, "take files and config of one version")


def _tensors(
    skeleton: PreTrainedModel,
    stored: tuple[StoredTensors, StoredTensors],
    headers: tuple[Mapping[str, Header], Mapping[str, Header]],
    sizes: tuple[int, int],
) -> Iterator[Difference]:
    """Yields the tensors that are in one end only, or whose shapes differ."""
    if not headers[1] or not (headers[0] or stored[1].complete):  # then `patch_model` compares the loaded models
        return
    known = [{**end.headers, **end.converted} for end in stored]
    if not headers[0]:  # not in safetensors, so take the shapes from the model
        shapes = headers_of(skeleton)
        known[0] = {name: shapes[name] for name in first_names(skeleton).values()}
        sizes = max(sizes), sizes[1]
    rows = set(vocabulary_tensors(skeleton))
    for name in rows if sizes[0] != sizes[1] else ():
        for end, size in zip(known, sizes, strict=True):
            shape, dtype = end.get(name, ([], ""))
            if shape[:1] == [size]:
                end[name] = [max(sizes), *shape[1:]], dtype
    for line in tensor_mismatches(known[0], known[1], dtypes=False):
        subject, _, ends = line.partition(": ")
        yield Difference(subject, ends, None, policies.ONE_MODEL)
    for name in known[0].keys() & known[1].keys():  # a dtype may differ in its width only
        found = known[0][name][1], known[1][name][1]
        if found[0] != found[1] and not all(map(is_floating, found)):
            yield Difference(name, both(*found), None, policies.ONE_MODEL)
