"""Checks whether two checkpoints are the ends of a pair."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dami.loading.checkpoint import Checkpoint, StoredTensors
from dami.patching.compare import config_mismatches, first_names, headers_of, tensor_mismatches
from dami.patching.ties import TIES
from dami.sources import check_end
from dami.upstream import ties_of


@dataclass(frozen=True)
class Match:
    """Two matching checkpoints.

    Attributes:
        ends: the instruct end and the thinking end.
        skeleton: the instruct end's model without its weights.
        tokenizers: the tokenizers of both ends, None for an end without one.
        stored: the tensors that each end stores.
    """

    ends: tuple[Checkpoint, Checkpoint]
    skeleton: PreTrainedModel
    tokenizers: tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None]
    stored: tuple[StoredTensors, StoredTensors]

    @classmethod
    def of(cls, instruct: Checkpoint, thinking: Checkpoint, dtypes: bool = True) -> Match:
        """Compares configs, tokenizers and weight file headers. If `dtypes`, the dtypes have to agree too.

        Raises:
            ValueError: they do not match (the message names every mismatch), or files are damaged.
        """
        ends = instruct, thinking
        for end in ends:
            check_end(end.path)
        configs = [end.config() for end in ends]
        tokenizers = instruct.tokenizer(), thinking.tokenizer()
        skeleton = instruct.skeleton()
        headers = [end.headers() for end in ends]
        stored = StoredTensors.of(skeleton, headers[0]), StoredTensors.of(skeleton, headers[1])

        own_heads = [end.has_own_head(skeleton) for end in ends]
        mismatches = config_mismatches(configs[0], configs[1]) + vocabulary_mismatches(*tokenizers)
        if configs[0].model_type == configs[1].model_type and headers[1]:
            known = [{**end.headers, **end.strangers} for end in stored]
            if not headers[0]:  # not in safetensors, so take the shapes from the model
                shapes = headers_of(skeleton)
                known[0] = {name: shapes[name] for name in first_names(skeleton).values()}
            mismatches += tensor_mismatches(known[0], known[1], dtypes=dtypes and bool(headers[0]))
            if stored[1].complete:
                both = stored[0].strangers.keys() & stored[1].strangers.keys()
                mismatches += [f"{name}: in both ends, but not in the model" for name in sorted(both)]
        if any(own_heads) and any(getattr(config, TIES, False) for config in configs):
            # The configs may tie a head that has a weight of its own, so they do not decide whether the heads match.
            apart = {f"config.{TIES}", *ties_of(skeleton)}
            mismatches = [line for line in mismatches if line.partition(":")[0] not in apart]
            stored = replace(stored[0], complete=False), replace(stored[1], complete=False)
        if mismatches:
            names = f"{instruct.directory} and {thinking.directory}"
            raise ValueError("\n  ".join([f"{names} do not match:", *mismatches]))
        return cls(ends, skeleton, tokenizers, stored)


def vocabulary_mismatches(
    instruct: PreTrainedTokenizerBase | None, thinking: PreTrainedTokenizerBase | None
) -> list[str]:
    """Returns one line if two tokenizers give tokens different ids. An end without a tokenizer matches any."""
    if instruct is None or thinking is None:
        return []
    ends = [tokenizer.get_vocab() for tokenizer in (instruct, thinking)]
    differ = sorted(token for token in ends[0].keys() | ends[1].keys() if ends[0].get(token) != ends[1].get(token))
    if not differ:
        return []
    return [f"tokenizer: {len(differ)} tokens have another id or are in one vocabulary only, such as {differ[:5]}"]
