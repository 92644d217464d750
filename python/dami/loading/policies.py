"""What differs between the ends of a pair, and what the pair does about it.

A difference is resolved where the result is well defined, and blocks the pair otherwise. `check`, loading, packing and
the errors share this list; a packed pair carries it in its config.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from dami.loading.checkpoint import DEQUANTIZABLE, Checkpoint
from dami.loading.stored import StoredTensors
from dami.patching.compare import Header, differing_settings
from dami.patching.ties import TIES
from dami.sources import ENDS as ENDS
from dami.sources import End as End
from dami.sources import check_choice
from dami.thoughts import FAMILIES
from dami_kernels.weight import FLOAT_DTYPES

ROPE = re.compile(  # the configs that hold a setting of the rotary embedding, and the setting
    r"(?:(.*?)\.)??"
    r"(rope_parameters|rope_theta|rope_scaling|rope_local_base_freq|original_max_position_embeddings)(?:\..*)?"
)
CONTEXT = "max_position_embeddings"
ONE_MODEL = "take ends that were trained from one model"
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Choices:
    """What the user has decided where the ends may differ; None leaves it to the policy.

    Attributes:
        dtype: the dtype to compute in, or its name; "auto" means the wider one.
        tokenizer: the end whose tokenizer the pair gets.
        rope: the end whose rotary embedding the pair gets, at every λ.
        context: the longest sequence, in tokens.
    """

    dtype: torch.dtype | str = "auto"
    tokenizer: End | None = None
    rope: End | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if self.dtype != "auto" and dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be 'auto', float32, bfloat16 or float16, got {self.dtype!r}")
        object.__setattr__(self, "dtype", dtype or "auto")
        for name in ("tokenizer", "rope"):
            check_choice(name, getattr(self, name))
        if self.context is not None and not (isinstance(self.context, int) and self.context > 0):
            raise ValueError(f"{CONTEXT} must be a positive number of tokens, got {self.context!r}")

    def check_adapter(self) -> None:
        """Raises ValueError for a choice that needs two whole checkpoints, where the thinking end is an adapter."""
        if chosen := self.between_ends:
            raise ValueError(f"{chosen[0]} must be left out with an adapter, which has the {chosen[0]} of its model")

    @property
    def between_ends(self) -> list[str]:
        """The names of the choices made that need two whole checkpoints."""
        return [name for name in ("tokenizer", "rope") if getattr(self, name) is not None]


@dataclass(frozen=True)
class Difference:
    """One thing in which the ends differ.

    Attributes:
        subject: what differs, such as "vocabulary" or "config.rms_norm_eps".
        ends: what each end has.
        resolution: what the pair does; None if it cannot be a pair like this.
        remedy: what changes the resolution, or removes the obstacle, which never comes without one.
    """

    subject: str
    ends: str
    resolution: str | None = None
    remedy: str = ""

    def __str__(self) -> str:
        told = f"{self.subject}: {self.ends}"
        if self.resolution is not None:
            told += f" → {self.resolution}"
        return f"{told}; {self.remedy}" if self.remedy else told


@dataclass(frozen=True)
class Report:
    """All differences between the ends of a pair."""

    differences: Sequence[Difference] = ()

    @property
    def resolved(self) -> list[Difference]:
        return [each for each in self.differences if each.resolution is not None]

    @property
    def blocking(self) -> list[Difference]:
        return [each for each in self.differences if each.resolution is None]

    @property
    def obstacles(self) -> list[str]:
        """A line for each difference that blocks the pair. A remedy of several in a row stands after the last."""
        after = [each.remedy for each in self.blocking[1:]] + [""]
        return [
            str(replace(each, remedy="") if each.remedy == following else each)
            for each, following in zip(self.blocking, after, strict=True)
        ]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Returns the differences as JSON can hold them."""
        return [asdict(each) for each in self.differences]


def both(instruct: object, thinking: object) -> str:
    """Returns what each end has, as text."""
    return f"{instruct} in the instruct end, {thinking} in the thinking end"


def settings(
    configs: tuple[PreTrainedConfig, PreTrainedConfig], choices: Choices, untied: bool, matching: Sequence[str] = ()
) -> Iterator[Difference]:
    """Yields the differences of two configs.

    Args:
        configs: of both ends.
        choices: the user's.
        untied: whether an end has a head of its own while the config of one ties it, so that the configs don't decide.
        matching: names of instruct ends that are known to match this thinking end, for the remedy.
    """
    differing = differing_settings(*configs)
    yield from _rotation({key: differing[key] for key in differing if _of_rope(key)}, choices, matching)
    for key, values in differing.items():
        name = key.rpartition(".")[2]
        told = key.startswith("quantization_config.") or (name == TIES and untied) or name == "vocab_size"
        if not told and not _of_rope(key):  # `quantisation`, `heads` and `vocabularies` tell the others
            yield Difference(f"config.{key}", both(*map(repr, values)), None, ONE_MODEL)
    lengths: list[Any] = [getattr(config.get_text_config(), CONTEXT, None) for config in configs]
    stretched = any(key.rpartition(".")[2] == CONTEXT for key in differing)
    if None not in lengths and lengths[0] != lengths[1] and not stretched:
        chosen = f"{min(lengths)}, the smaller" if choices.context is None else f"{choices.context}, as asked"
        yield Difference("context length", both(*lengths), chosen, f"{CONTEXT}=N sets another")


def _of_rope(key: str) -> bool:
    """Returns whether a setting belongs to the rotary embedding, as the context does where one differs that matters."""
    return ROPE.fullmatch(key) is not None or key.rpartition(".")[2] == CONTEXT


def _rotation(
    differing: Mapping[str, tuple[Any, Any]], choices: Choices, matching: Sequence[str]
) -> Iterator[Difference]:
    """Yields the difference of the rotary embeddings, if there is one."""
    if not differing:
        return
    ends = "; ".join(f"{key.replace('rope_parameters.', '')} {both(*values)}" for key, values in differing.items())
    if choices.rope is not None:
        yield Difference("rotary embedding", ends, f"the {choices.rope} end's, at every λ")
        return
    remedy = 'a row at λ has one rotation: choose whose, rope="instruct" or rope="thinking", and measure'
    if matching:
        remedy += f"; or take an instruct end that matches, {' or '.join(matching)}"
    yield Difference("rotary embedding", ends, None, remedy)


def quantisation(ends: tuple[Checkpoint, Checkpoint]) -> Iterator[Difference]:
    """Yields how the ends are quantised, if one is."""
    quantised = [end for end in ends if end.quantization is not None]
    if not quantised:
        return
    methods = [end.quantization and end.quantization.get("quant_method", "an unnamed method") for end in ends]
    told = both(*(method or "not quantised" for method in methods))
    if unknown := [method for method in methods if method and method not in DEQUANTIZABLE]:
        remedy = f"{unknown[0]} cannot be undone while loading: name the checkpoint that it was quantised from"
        yield Difference("quantisation", told, None, remedy)
        return
    try:
        for end in quantised:
            end.dequantizing()
    except (ImportError, ValueError, TypeError) as error:  # such as a package that has to be installed
        yield Difference("quantisation", told, None, str(error))
    else:
        yield Difference("quantisation", told, "dequantised while reading, as transformers does")


def weights(ends: tuple[Checkpoint, Checkpoint]) -> Iterator[Difference]:
    """Yields the ends that have no weights in a file that transformers reads."""
    for name, end in zip(ENDS, ends, strict=True):
        if not end.has_weights():
            remedy = "put its weights there under one of these names"
            yield Difference("weights", f"no model.safetensors or pytorch_model.bin in the {name} end", None, remedy)


def heads(own: Sequence[bool]) -> Iterator[Difference]:
    """Yields the difference if one end ties its head to its embedding and the other does not."""
    if own[0] != own[1]:
        kinds = ["a weight of its own" if each else "tied to the embedding" for each in own]
        yield Difference("head", both(*kinds), "a weight of its own, for the tied end a copy of its embedding")


def vocabularies(sizes: tuple[int, int]) -> Iterator[Difference]:
    """Yields the difference of the numbers of rows in the embeddings."""
    if sizes[0] != sizes[1]:
        short, long = ENDS if sizes[0] < sizes[1] else ENDS[::-1]
        resolution = (
            f"{max(sizes)} rows; the {short} end gets the {long} end's last {max(sizes) - min(sizes)}, "
            f"which it does not sample: their probability falls to 0 towards it"
        )
        yield Difference("vocabulary", both(*(f"{size} rows" for size in sizes)), resolution)


def dtypes(headers: tuple[Mapping[str, Header], Mapping[str, Header]], choices: Choices) -> Iterator[Difference]:
    """Yields the difference of the ends' main dtypes, or else tensors whose dtypes differ."""
    mains = main_dtype(headers[0]), main_dtype(headers[1])
    if None in mains:
        return
    if mains[0] != mains[1]:
        wider = wider_dtype(*mains)
        if choices.dtype == "auto":
            yield Difference("dtype", both(*mains), f"{wider}, which holds both", "dtype=… sets another")
        else:
            yield Difference("dtype", both(*mains), f"{str(choices.dtype).removeprefix('torch.')}, as asked")
        return
    for name in sorted(headers[0].keys() & headers[1].keys()):
        found = headers[0][name][1], headers[1][name][1]
        if found[0] != found[1] and all(map(is_floating, found)):
            yield Difference(name, both(*found), "in the model's dtype")


def is_floating(dtype: str) -> bool:
    """Returns whether the name of a dtype is that of a floating one."""
    return getattr(getattr(torch, dtype, None), "is_floating_point", False)


def main_dtype(headers: Mapping[str, Header]) -> str | None:
    """Returns the floating dtype that most numbers of a checkpoint are stored in; None if there are none."""
    counts: dict[str, int] = {}
    for shape, dtype in headers.values():
        if is_floating(dtype):
            counts[dtype] = counts.get(dtype, 0) + torch.Size(shape).numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else None


def wider_dtype(instruct: str | None, thinking: str | None) -> str | None:
    """Returns the narrowest dtype that holds every number of both: float32 for bfloat16 and float16."""
    if instruct is None or thinking is None:
        return instruct or thinking
    wider = torch.promote_types(getattr(torch, instruct), getattr(torch, thinking))
    return str(wider).removeprefix("torch.")


def unused(stored: tuple[StoredTensors, StoredTensors]) -> Iterator[Difference]:
    """Yields the tensors that the files hold and neither model runs, such as an MTP head's."""
    names = [set(each.unused) for each in stored]
    for where, some in (
        ("in both ends", names[0] & names[1]),
        ("in the instruct end only", names[0] - names[1]),
        ("in the thinking end only", names[1] - names[0]),
    ):
        if some:
            listed = ", ".join(sorted(some)[:5]) + (f" and {len(some) - 5} more" if len(some) > 5 else "")
            yield Difference("unused tensors", f"{listed} {where}", "dropped: transformers does not run them")


def tokens(
    tokenizers: tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None], choices: Choices
) -> Iterator[Difference]:
    """Yields the tokens in which two tokenizers differ. An end without a tokenizer matches any."""
    if tokenizers[0] is None or tokenizers[1] is None:
        return
    ends = tokenizers[0], tokenizers[1]
    vocabularies = [tokenizer.get_vocab() for tokenizer in ends]
    words = [{number: word for word, number in vocabulary.items()} for vocabulary in vocabularies]
    differ = sorted(n for n in words[0].keys() | words[1].keys() if words[0].get(n) != words[1].get(n))
    if not differ:
        return
    special = [tokenizer.added_tokens_decoder.keys() for tokenizer in ends]
    ordinary = [n for n in differ for i in (0, 1) if n in words[i] and n not in special[i]]
    if ordinary:
        named = sorted({words[i][n] for n in ordinary for i in (0, 1) if n in words[i]})
        told = f"{len(differ)} tokens have another id or are in one vocabulary only, such as {named[:5]}"
        yield Difference("tokenizer", told, None, "take ends of one tokenizer: a row of weights is one token")
        return
    chosen = tokenizer_end(tokenizers, choices)
    for subject, numbers in (
        ("renamed tokens", [n for n in differ if n in words[0] and n in words[1]]),
        ("added tokens", [n for n in differ if n not in words[0] or n not in words[1]]),
    ):
        if numbers:
            shown = "; ".join(f"{n} is {both(*(words[i].get(n, 'no token') for i in (0, 1)))}" for n in numbers[:2])
            more = f"; and {len(numbers) - 2} more" if len(numbers) > 2 else ""
            resolution = f"the {chosen} end's tokenizer; the chat template of the other with the names of the same ids"
            remedy = f'tokenizer="{ENDS[1 - ENDS.index(chosen)]}" takes the other'
            yield Difference(subject, shown + more, resolution, remedy)


def tokenizer_end(
    tokenizers: tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None], choices: Choices
) -> End:
    """Returns the end whose tokenizer the pair gets.

    By default that is the instruct end, unless only the thinking end's has tokens that mark a thought.
    """
    if choices.tokenizer is not None:
        return choices.tokenizer
    if tokenizers[0] is None or tokenizers[1] is None:
        return "instruct"
    marks = {mark for tags in FAMILIES for mark in (tags.start, *tags.ends)}
    known = [marks & tokenizer.get_vocab().keys() for tokenizer in (tokenizers[0], tokenizers[1])]
    return "thinking" if known[1] - known[0] else "instruct"


def translated(template: str, source: PreTrainedTokenizerBase, to: PreTrainedTokenizerBase) -> str:
    """Returns a chat template of one tokenizer that gives, in another with the same ids, the same special tokens."""
    names = {word: _named(number, to) for word, number in source.get_added_vocab().items()}
    names = {word: name for word, name in names.items() if name not in (None, word)}
    if names:
        longest_first = sorted(names, key=len, reverse=True)
        template = re.sub("|".join(map(re.escape, longest_first)), lambda word: str(names[word[0]]), template)
    first = ""
    for variable in ("bos_token", "eos_token", "pad_token", "unk_token"):
        word, other = getattr(source, variable), getattr(to, variable)
        meant = names.get(word, word) or ""
        if meant != (other or "") and re.search(rf"\b{variable}\b", template):
            first += f"{{%- set {variable} = {json.dumps(meant, ensure_ascii=False)} -%}}"
    return first + template


def _named(number: int, tokenizer: PreTrainedTokenizerBase) -> str | None:
    added = tokenizer.added_tokens_decoder.get(number)
    return None if added is None else str(added)


def generations(configs: tuple[GenerationConfig, GenerationConfig]) -> Iterator[Difference]:
    """Yields the differences of the ends' end tokens and sampling defaults."""
    ids = [end_ids(config) for config in configs]
    if ids[0] != ids[1]:
        told = both(*(sorted(each) or "none" for each in ids))
        union = f"any of {sorted(ids[0] | ids[1])}"
        yield Difference("end tokens", told, union, "generate(eos_token_id=…) sets others")
    sampling = [sampling_of(config) for config in configs]
    if sampling[0] != sampling[1]:
        resolution = "the instruct end's are the default, in dami serve the nearer end's; the pair's config keeps both"
        yield Difference("sampling", both(*sampling), resolution, "arguments of generate set others")


def end_ids(config: GenerationConfig) -> set[int]:
    """Returns the ids of the tokens that end an answer."""
    ids = config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else {*ids}


def sampling_of(config: GenerationConfig) -> dict[str, Any]:
    """Returns the sampling parameters that a generation config sets."""
    values = {name: getattr(config, name, None) for name in SAMPLING}
    return {name: value for name, value in values.items() if value is not None}


def resolved_config(
    configs: tuple[PreTrainedConfig, PreTrainedConfig], choices: Choices, size: int, untied: bool
) -> PreTrainedConfig:
    """Returns the pair's config: a copy of the instruct end's with every difference resolved."""
    config = copy.deepcopy(configs[0])
    text, other = config.get_text_config(), configs[1].get_text_config()
    if choices.rope == "thinking":
        copy_rope(configs[1], config)
    lengths: list[Any] = [getattr(each, CONTEXT, None) for each in (text, other)]
    if choices.context is not None:
        setattr(text, CONTEXT, choices.context)
    elif None not in lengths and not any(key.rpartition(".")[2] == CONTEXT for key in differing_settings(*configs)):
        setattr(text, CONTEXT, min(lengths))
    if text.vocab_size != size:
        for each in (text, config):
            if hasattr(each, "vocab_size"):
                each.vocab_size = size
    if untied:
        for each in (text, config):
            setattr(each, TIES, False)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def copy_rope(source: PreTrainedConfig, to: PreTrainedConfig) -> None:
    """Gives a config the rotary embedding of another."""
    for key in filter(_of_rope, differing_settings(source, to)):
        match = ROPE.fullmatch(key)
        outer, name = (match[1] or "", match[2]) if match is not None else (key.rpartition(".")[0], CONTEXT)
        holders: list[Any] = [source, to]
        for part in filter(None, outer.split(".")):
            holders = [getattr(each, part) for each in holders]
        setattr(holders[1], name, copy.deepcopy(getattr(holders[0], name)))
