"""Reads prompts in two passes: their beginnings at `prompt_intensity`, their tails at the λ of the answer.

The keys and values of a beginning depend on its tokens and their λ only. So equal beginnings of a batch are read once,
in a pass with one row for each, and what the cache then holds is copied to all rows that begin so.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from dami.dial.choosing import estimated
from dami.dial.patch import patch_of
from dami.dial.program import DialProgram
from dami.dial.state import Dial
from dami.generation.pieces import CACHE
from dami.upstream import mask_width, replace_method

WHOLE = "prompt_tail must be 0, so that the whole prompt is read at prompt_intensity, {}"
PLAIN = {DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer}  # keys and values only
IDS, EMBEDS, MASK, PLACES = "input_ids", "inputs_embeds", "attention_mask", "position_ids"
Columns = Mapping[str, Tensor]  # what has an entry for every token: ids or embeddings, mask, position ids …


@dataclass(frozen=True)
class Prompts:
    """A batch of R rows, n for each prompt, that is to be read.

    Attributes:
        model: the patched model.
        read: transformers' `_prefill`.
        config: of the generation.
        ids: int64 [R, length], or [R, 0] if there are embeddings.
        columns: [R, length, …] each.
        others: the other inputs of the model by name, the cache among them.
    """

    model: Any
    read: Callable[..., Any]
    config: GenerationConfig
    ids: Tensor
    columns: Columns
    others: dict[str, Any]

    @property
    def program(self) -> DialProgram:
        program = patch_of(self.model).program
        assert program is not None
        return program

    @property
    def length(self) -> int:
        return self.columns[EMBEDS if EMBEDS in self.columns else IDS].shape[1]

    @property
    def of(self) -> Tensor:
        """The index of each row's prompt, int64 [R] on the CPU."""
        count = len(self.program.tails)
        return torch.arange(count).repeat_interleave(len(self.ids) // count)

    @property
    def ends(self) -> Tensor:
        """The column at which each row's tail begins, int64 [R] on the CPU."""
        return (self.length - torch.tensor(self.program.tails).clamp(min=1)).clamp(min=0)[self.of]

    def hold(self, start: int, ends: Tensor) -> bool:
        """Whether there is a token in the columns from `start` to the ends of some rows."""
        columns = torch.arange(self.length)
        there = (columns >= start) & (columns < ends[:, None])
        mask = self.columns.get(MASK)
        return bool((there if mask is None else there & mask[:, -self.length :].bool().cpu()).any())

    @property
    def lams(self) -> list[Tensor]:
        """The λ of beginnings that differ by row, float32 [R] each."""
        both = (self.program.prompt, *(dial.lam for dial in self._set_around()))
        return [lam[self.of.to(lam.device)] for lam in both if lam is not None and lam.numel() > 1]

    def _set_around(self) -> list[Dial]:
        """The dials of parts whose λ was set around the call, and holds for beginnings, too."""
        turned = {track.dial for track in self.program.tracks}
        return [dial for dial in patch_of(self.model).parts if dial not in turned]

    @contextmanager
    def only(self, rows: Sequence[int]) -> Iterator[None]:
        """Restricts λ to some rows, for passes over these alone."""
        prompts = self.of[list(rows)]
        with ExitStack() as stack:
            for dial in self._set_around():
                if dial.lam.numel() > 1:
                    stack.enter_context(dial.turned(dial.lam[prompts.to(dial.lam.device)]))
            yield

    def begin(self, rows: Sequence[int], columns: Columns, cache: Cache) -> Cache:
        """Reads beginnings at `prompt_intensity` into a cache, and returns that.

        Args:
            rows: indices of rows with these beginnings.
            columns: of the beginnings.
            cache: what to add to.
        """
        inputs = {**self.others, **columns, CACHE: cache}
        ids = inputs.pop(IDS, self.ids[: len(rows), :0])
        tokens = _cached_tokens(cache) + columns[EMBEDS if EMBEDS in columns else IDS].shape[1]
        with self.only(rows):
            self.program.reading = self.of[list(rows)]
            try:
                held = self.read(ids, self.config, inputs).get(CACHE)
            finally:
                self.program.reading = None
        if held is None or (_counts(held) and _cached_tokens(held) != tokens):
            raise ValueError(
                WHOLE.format(f"for {type(self.model).__name__}, whose cache does not hold what it has read")
            )
        return held

    def end(self, first: int, cache: Cache) -> Any:
        """Reads all from a column on, with the beginnings in the cache, at the λ of the answer."""
        if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
            return self._read(slice(first, self.length), cache)
        for column in range(first, self.length):  # some of these states only go on by one token at a time
            output = self._read(slice(column, column + 1), cache)
        return output

    def _read(self, at: slice, cache: Cache) -> Any:
        """Reads some columns of all rows, after those in the cache."""
        inputs = {name: x[:, : x.shape[1] - self.length + at.stop] for name, x in self.columns.items() if name != IDS}
        if EMBEDS in inputs and not _counts(cache):
            inputs[EMBEDS] = inputs[EMBEDS][:, at]  # transformers takes off what the cache holds, if it counts that
        return self.read(self.ids[:, at], self.config, {**self.others, **inputs, CACHE: cache})

    def choose(self, cache_of: Callable[[list[int]], Cache] | None = None) -> None:
        """Has the estimator choose λ where it still must.

        Args:
            cache_of: returns a cache of its own for some rows' beginnings, read at λ=0.
        """
        patch, program = patch_of(self.model), self.program
        if not program.undecided:
            return
        of = self.of.tolist()
        rows = [of.index(prompt) for prompt in program.undecided]
        batch: dict[str, Any] = {name: x[rows] for name, x in self.columns.items()}
        if cache_of is not None:
            batch[CACHE] = cache_of(rows)
        program.read(self.of[rows])  # parts of the model, too
        with self.only(rows):
            patch.chosen = program.decide(estimated(self.model, batch, len(rows)))


def read_prompts(
    model: Any, read: Callable[..., Any], ids: Tensor, config: GenerationConfig, inputs: dict[str, Any]
) -> Any:
    """Does what transformers' `_prefill` does, with the beginnings of prompts at `prompt_intensity`.

    Args:
        model: a patched model.
        read: transformers' `_prefill`.
        ids: int64 [R, length], n rows for each prompt, or [R, 0] if there are embeddings.
        config: of the generation.
        inputs: the other inputs of the model by name, the cache among them.

    Raises:
        ValueError: the prompts cannot be divided; the message says why.
    """
    program = patch_of(model).program
    if program is None or program.divided or not any(program.tails) or model.config.is_encoder_decoder:
        if program is not None:
            program.divided = True
        return read(ids, config, inputs)
    cache: Any = inputs.get(CACHE)
    columns, others = _columns(ids, inputs)
    prompts = Prompts(model, read, config, ids, columns, others)
    reason = _indivisible(prompts, cache)
    if reason is not None:
        raise ValueError(WHOLE.format(reason))
    program.divided = True
    past = 0 if program.starts_empty else _cached_tokens(cache)
    start = past if past and _mask_width(prompts) == prompts.length else 0
    ends = prompts.ends.clamp(min=start)
    if not prompts.hold(start, ends):
        prompts.choose()
        return read(ids, config, inputs)
    differ = len(ends.unique()) > 1
    if not program.starts_empty:
        reason = "a cache was given"
    elif not {type(layer) for layer in cache.layers} <= PLAIN:
        reason = f"the cache of {type(model).__name__} holds more than keys and values"
    elif differ and PLACES not in columns:
        reason = f"{type(model).__name__} takes no position_ids"
    else:
        return _read_apart(prompts, cache)
    if differ:
        raise ValueError(f"prompt_tail must be one number for all prompts, as {reason}, got {list(program.tails)}")
    return _read_in_place(prompts, cache, start, int(ends[0]), shares=program.starts_empty)


def _columns(ids: Tensor, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Separates what has an entry for every token of R rows, [R, length, …], from the other inputs."""
    given = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    columns = {name: x.expand(len(ids), *x.shape[1:]) if x.shape[:1] == (1,) else x for name, x in given.items()}
    if EMBEDS not in columns:
        columns[IDS] = ids
    return columns, {name: x for name, x in inputs.items() if name not in given}


def _indivisible(prompts: Prompts, cache: Any) -> str | None:
    """Says for what the prompts cannot be divided into beginnings and tails; None if they can."""
    name = type(prompts.model).__name__
    if cache is None:
        return f"for {name} without a cache of transformers' own, as with use_cache=False"
    if getattr(prompts.model.config, "is_decoder", True) is False:
        return f"for {name} with is_decoder=False, where tokens see those after them"
    widths = {prompts.length, _mask_width(prompts)}
    for other, x in prompts.columns.items():
        if x.dim() != (3 if other == EMBEDS else 2) or len(x) != len(prompts.ids) or x.shape[1] not in widths:
            return f"with {other}, whose shape {list(x.shape)} does not tell what belongs to which token"
    media = [key for key, x in prompts.others.items() if isinstance(x, Mapping) and x]
    return f"with {media[0]}, which does not tell what belongs to which token" if media else None


def _mask_width(prompts: Prompts) -> int:
    mask = prompts.columns.get(MASK)
    return mask_width(prompts.config) if mask is None else mask.shape[1]


def _cached_tokens(cache: Cache) -> int:
    """Returns how many tokens a cache holds; 0 if it does not count them."""
    return int(cache.get_seq_length()) if _counts(cache) else 0


def _counts(cache: Cache) -> bool:
    return any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def _read_in_place(prompts: Prompts, cache: Cache, start: int, end: int, shares: bool) -> Any:
    """Reads all rows' columns from `start` to `end` into the model's own cache, whatever it holds, and then the tails.

    Args:
        prompts: the batch.
        cache: the model's cache.
        start: number of columns that the cache holds already.
        end: the column at which all tails begin.
        shares: whether to read equal beginnings once.
    """
    rest = prompts.length - end
    columns = {name: x[:, : x.shape[1] - rest] for name, x in prompts.columns.items()}
    if IDS in columns:
        columns[IDS] = columns[IDS][:, start:]
    rows = place = [*range(len(prompts.ids))]
    if shares:
        rows, place = _distinct([*columns.values(), *prompts.lams], [True] * len(rows))
    cache = prompts.begin(rows, {name: x[rows] for name, x in columns.items()}, cache)

    def cache_of(of: list[int]) -> Cache:
        return _reordered(copy.deepcopy(cache), [place[row] for row in of], prompts.ids.device)

    prompts.choose(cache_of)
    if len(rows) < len(prompts.ids):
        _reordered(cache, place, prompts.ids.device)
    return prompts.end(end, cache)


def _reordered(cache: Any, rows: Sequence[int], device: torch.device) -> Cache:
    """Gives a cache these of its rows."""
    cache.reorder_cache(torch.tensor(rows, device=device))
    return cache


def _read_apart(prompts: Prompts, cache: Cache) -> Any:
    """Reads beginnings of any lengths into a cache apart, of keys and values only, and then all tails in one pass.

    Beginnings are aligned at their ends, so that equal ones are found whatever follows them.
    """
    ends = prompts.ends
    first, last = int(ends.min()), int(ends.max())
    rows, place, begun = _aligned(prompts, ends)
    own = Beginnings.of(prompts.begin(rows, begun, DynamicCache()), torch.tensor(place), ends)

    def cache_of(of: list[int]) -> Cache:
        taken = DynamicCache()
        own.copy(taken, of, int(ends[of].min()))
        return taken

    prompts.choose(cache_of)
    if first > 0:
        own.copy(cache, range(len(place)), first)
    with own.kept(cache, first, prompts.length) if first < last else nullcontext():
        return prompts.end(first, cache)


def _aligned(prompts: Prompts, ends: Tensor) -> tuple[list[int], list[int], Columns]:
    """Finds the distinct beginnings: a row of each, which of them each row has, and their columns, padded on the left.

    Columns that are padding in all of them are left out.
    """
    width = int(ends.max())
    at = torch.arange(width) - (width - ends)[:, None]  # the columns of each row, negative before its first
    columns = {name: _taken(x, at.clamp(min=0)) for name, x in prompts.columns.items()}
    given = columns.pop(MASK, None)
    seen = (at >= 0).to(prompts.ids.device)
    mask = seen.long() if given is None else given * seen
    skip = int(mask.any(0).int().argmax()) if PLACES in columns else 0
    columns = {name: x.masked_fill(_like(mask == 0, x), 0)[:, skip:] for name, x in columns.items()}
    mask = mask[:, skip:]
    rows, place = _distinct([*columns.values(), mask, *prompts.lams], mask.any(1).tolist())
    if given is not None or not bool(mask.all()):
        columns[MASK] = mask
    return rows, place, {name: x[rows] for name, x in columns.items()}


def _distinct(tensors: Sequence[Tensor], counts: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Finds the rows that are equal in all tensors: the first row of each kind, and each row's kind.

    Rows that do not count may be of any kind.
    """
    on_host = [x.detach().cpu().contiguous().view(len(x), -1).view(torch.uint8).numpy() for x in tensors]
    keys = [b"".join(x[row].tobytes() for x in on_host) for row in range(len(counts))]
    firsts: dict[bytes, int] = {}
    for row, key in enumerate(keys):
        if counts[row]:
            firsts.setdefault(key, row)
    kinds = {key: kind for kind, key in enumerate(firsts)}
    return [*firsts.values()], [kinds.get(key, 0) for key in keys]


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """Returns [R, columns] with as many dimensions as x, [R, columns, …]."""
    return mask.view(*mask.shape, *[1] * (x.dim() - 2))


def _taken(x: Tensor, at: Tensor) -> Tensor:
    """Takes columns of every row: [R, length, …] and int64 [R, columns] on the CPU give [R, columns, …]."""
    return x[torch.arange(len(x))[:, None], at]


@dataclass(frozen=True)
class Beginnings:
    """Keys and values of the distinct beginnings of R rows.

    Attributes:
        layers: keys and values by layer, [beginnings, heads, width, size] each, aligned at their ends.
        place: int64 [R], which beginning each row has.
        ends: int64 [R], the column of each row that follows it.
    """

    layers: Mapping[int, tuple[Tensor, Tensor]]
    place: Tensor
    ends: Tensor

    @classmethod
    def of(cls, cache: Any, place: Tensor, ends: Tensor) -> Beginnings:
        """Takes them from a cache that holds nothing else."""
        held = {index: layer for index, layer in enumerate(cache.layers) if layer.is_initialized}  # some use another's
        return cls({index: (layer.keys, layer.values) for index, layer in held.items()}, place, ends)

    def copy(self, to: Cache, rows: Sequence[int], width: int) -> None:
        """Adds the first columns of some rows to an empty cache."""
        for layer in self.layers:
            keys, values = self._taken(layer, list(rows), torch.arange(width))
            to.update(keys, values, layer)

    def _taken(self, layer: int, rows: list[int], columns: Tensor) -> Iterator[Tensor]:
        """Yields keys and values of some rows' columns, [rows, heads, columns, size] each."""
        for x in self.layers[layer]:
            shift = x.shape[2] - self.ends[rows][:, None]
            at = (columns + shift).clamp(0, x.shape[2] - 1)  # padding may take any
            yield x.transpose(1, 2)[self.place[rows][:, None], at].transpose(1, 2)

    @contextmanager
    def kept(self, cache: Cache, first: int, length: int) -> Iterator[None]:
        """Keeps the columns of beginnings in a pass that computes all columns from `first` on, for a `with` block."""
        columns = torch.arange(first, length)
        stays = columns < self.ends[:, None]
        update, done = cache.update, Counter[int]()

        def keep(keys: Tensor, values: Tensor, layer: int, *args: Any, **more: Any) -> Any:
            at = slice(done[layer], done[layer] + keys.shape[2])
            done[layer] = at.stop
            stay = stays[:, None, at, None].to(keys.device)
            mine = self._taken(layer, [*range(len(keys))], columns[at])
            keys, values = (torch.where(stay, a, b) for a, b in zip(mine, (keys, values), strict=True))
            return update(keys, values, layer, *args, **more)

        replace_method(cache, "update", keep)
        try:
            yield
        finally:
            del cache.update
