"""Decodes in pieces, and removes finished rows from the batch between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import GenerateDecoderOnlyOutput

from dami.callers import AUTO
from dami.dial.patch import patch_of
from dami.schedules import Schedule
from dami.upstream import is_stateful

PIECE = 16  # tokens: few enough to waste little on finished rows, many enough to make the overhead negligible
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"  # its name in 5.24
KNOWN = {"do_sample", "max_new_tokens", "min_p", "repetition_penalty", "temperature", "top_k", "top_p"}
OfRows = Sequence[float | str | Schedule]  # λ of each row; a string is "auto"


def generate_in_pieces(
    model: Any,
    batch: Mapping[str, Tensor],
    intensities: OfRows | Mapping[Any, OfRows] | None = None,
    prompt_intensity: Any = None,
    prompt_tail: Any = None,
    **options: Any,
) -> Tensor:
    """Generates what `model.generate` does, at a cost set by the total number of tokens, not by the longest answer.

    Answers at different λ differ widely in length, and `generate` computes every row until the last one has ended.

    Args:
        model: a patched model, or an ordinary one with `intensities` None.
        batch: `input_ids` and `attention_mask`, int64 [rows, length], padded on the left.
        intensities: λ, "auto" or a schedule, one per row; or a mapping from parts of the model to these.
        prompt_intensity, prompt_tail: as in `generate`.
        options: options of `generate`, only those in `KNOWN`. Without `max_new_tokens`, an answer is as long as `room`
            says.

    Returns:
        The generated tokens, int64 [rows, tokens]. Ignore what follows a row's end token.

    Raises:
        ValueError: an option is not in `KNOWN`, and so may behave differently in pieces; or as in `room`.
    """
    if options.keys() - KNOWN:
        raise ValueError(f"options must be of {sorted(KNOWN)}, got {sorted(options.keys() - KNOWN)}")
    ids, seen = batch["input_ids"], batch["attention_mask"]
    length, all_rows, out = ids.shape[1], len(ids), []
    limit = room(model, length, options.pop("max_new_tokens", None))
    ends = end_tokens(model).to(ids.device)
    rows, cache, told = torch.arange(all_rows, device=ids.device), None, 0
    parts = intensities if isinstance(intensities, Mapping) else {} if intensities is None else {None: intensities}
    lams: dict[Any, list[Any]] = {part: list(values) for part, values in parts.items()}
    if prompt_intensity is not None or prompt_tail is not None:
        options |= {"prompt_intensity": prompt_intensity, "prompt_tail": prompt_tail}
    most = PIECE if _can_shrink(model) else limit
    while told < limit:
        if lams:
            of_rows = {part: _continued(values, rows.tolist(), ids[:, length:]) for part, values in lams.items()}
            options["intensity"] = of_rows.get(None, of_rows)
        piece = model.generate(
            input_ids=ids, attention_mask=seen, max_new_tokens=min(most, limit - told), return_dict_in_generate=True,
            num_beams=1, num_return_sequences=1, **{CACHE: cache}, **options,
        )  # fmt: skip
        if told == 0:
            options = {name: value for name, value in options.items() if not name.startswith("prompt_")}
            lams = {part: _chosen(model, values) for part, values in lams.items()}
        ids, cache = piece.sequences, piece[CACHE]
        news = ids[:, length + told :]
        out.append(ids.new_full((all_rows, news.shape[1]), model.generation_config.pad_token_id or 0))
        out[-1][rows] = news
        told += news.shape[1]
        seen = torch.nn.functional.pad(seen, (0, news.shape[1]), value=1)
        running = ~torch.isin(ids[:, length:], ends).any(1)
        if not running.any():
            break
        if not running.all():
            rows, ids, seen = rows[running], ids[running], seen[running]
            cache.batch_select_indices(running.nonzero().flatten())
    return torch.cat(out, 1)


def room(model: Any, length: int, wanted: int | None = None) -> int:
    """Returns the most tokens of an answer to prompts of `length` tokens.

    These are as many as are wanted, or else as the model's generation config says, as far as the model's context has
    room for them; if neither says anything, all that have room.

    Raises:
        ValueError: there is no room for an answer, or nothing that limits it.
    """
    config = model.generation_config
    wanted = wanted or config.max_new_tokens
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    limits += [] if wanted else [config.max_length]
    most = min((limit for limit in limits if limit), default=None)
    if most is not None and length >= most:
        raise ValueError(f"prompts must leave room for an answer in {most} tokens, got {length}")
    if most is None and wanted is None:
        raise ValueError("max_new_tokens must be given: the model does not say how many tokens it takes")
    return min(limit for limit in (wanted, most and most - length) if limit)


def _chosen(model: Any, lams: Sequence[Any]) -> list[Any]:
    """Replaces "auto" by what the estimator has chosen for each row."""
    return [
        patch_of(model).chosen[row] if isinstance(lam, str) and lam == AUTO else lam for row, lam in enumerate(lams)
    ]


def _continued(lams: Sequence[Any], rows: Sequence[int], said: Tensor) -> list[Any]:
    """Returns λ of some rows for their next piece, given the tokens that they have said, int64 [rows, tokens]."""
    if said.shape[1] == 0:
        return [lams[row] for row in rows]
    schedules: dict[int, Any] = {}
    for place, row in enumerate(rows):
        if callable(lams[row]):
            schedules.setdefault(id(lams[row]), (lams[row], []))[1].append(place)
    later = {key: _Later(schedule, said[places]) for key, (schedule, places) in schedules.items()}
    return [later.get(id(lams[row]), lams[row]) for row in rows]


class _Later:
    """A schedule that goes on after tokens of an earlier call, int64 [rows, tokens]."""

    def __init__(self, schedule: Schedule, said: Tensor) -> None:
        self.schedule, self.said = schedule, said

    def __call__(self, step: int, tokens: Tensor) -> float | Tensor:
        return self.schedule(self.said.shape[1] + step, torch.cat([self.said, tokens], 1))


def end_tokens(model: Any) -> Tensor:
    """Returns the ids of the tokens that end an answer, int64 [any number]."""
    ids = model.generation_config.eos_token_id
    return torch.tensor([] if ids is None else [ids] if isinstance(ids, int) else ids, dtype=torch.int64)


def _can_shrink(model: Any) -> bool:
    """Returns whether rows can be removed from the model's cache: only if it holds nothing but keys and values."""
    layers = DynamicCache(config=model.config).layers
    return not is_stateful(model) and all(isinstance(layer, DynamicLayer) for layer in layers)
