"""The two kinds of `quantization_config`: how a packed pair is stored, and what makes a pair of one checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from dami.callers import DEFAULT_INTENSITY
from dami.sources import OPTIONS, QUANT_METHOD, TWO_ENDS, End, check_choice
from dami_kernels import formats


class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed pair.

    Attributes:
        format: how embeddings and linear weights are stored.
        interpolated: the format of every parameter that differs between the ends, by name; `*` in a name stands for any
            layer number. All other parameters are the same in both ends.
        parents: name and licence of the two ends: [{"name": …, "license": …}, …]. The licence is None if unknown.
        error: ‖W(1) − W_thinking‖ / ‖W_thinking‖ over everything stored in `format`, None if it was not measured.
        differences: what differed between the ends and how it was resolved: [{"subject": …, "ends": …, …}, …].
        vocabulary: how many tokens each end knows, if one knows more: [instruct, thinking]. None if they agree.
        sampling: the sampling parameters of "instruct" and of "thinking", if they differ.
    """

    def __init__(
        self,
        format: str,
        interpolated: Mapping[str, str],
        parents: Sequence[Mapping[str, str | None]] = (),
        error: float | None = None,
        differences: Sequence[Mapping[str, Any]] = (),
        vocabulary: Sequence[int] | None = None,
        sampling: Mapping[str, Mapping[str, Any]] | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(f"quantization_config of a packed pair has no {sorted(unknown)}: a newer dami may read it")
        for name in {format, *interpolated.values()}:
            formats.get(name)
        self.quant_method: Any = QUANT_METHOD
        self.format = format
        self.interpolated = dict(interpolated)
        self.parents = [dict(parent) for parent in parents]
        self.error = error
        self.differences = [dict(difference) for difference in differences]
        self.vocabulary = None if vocabulary is None else list(vocabulary)
        self.sampling = {end: dict(values) for end, values in (sampling or {}).items()}

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as JSON holds it, without the keys that say that the ends do not differ."""
        optional = "differences", "vocabulary", "sampling"
        return {key: value for key, value in super().to_dict().items() if value or key not in optional}

    def format_of(self, name: str) -> str | None:
        """Returns the format of a parameter, or None if it is the same in both ends."""
        return self.interpolated.get(name) or self.interpolated.get(any_layer(name))


class PairConfig(QuantizationConfigMixin):
    """A `quantization_config` that loads the thinking end too, and makes one patched model of both.

    `AutoModelForCausalLM.from_pretrained(instruct, quantization_config=dami.PairConfig(thinking, format="int4"))` and
    `pipeline(…, model_kwargs={"quantization_config": …})` take it. As a dict, in JSON for example, it has the key
    `quant_method`, "dami-pair", and the arguments as further keys. transformers takes one quantisation for a model, so
    it refuses an instruct end that is quantised itself: `load_pair` and `pack` take that.

    Args:
        thinking: the λ=1 end, as in `load_pair`: a directory, a hub name or a LoRA adapter on the λ=0 end.
        format: how embeddings and linear weights are stored, a name of `dami_kernels.formats.names()`.
        intensity: λ until another is set: a number, or a preset of the thinking end.
        invariant: as in `patch_model`.
        tokenizer: the end whose tokenizer the pair keeps, `model.dami_patch.origin.tokenizer`, as in `load_pair`.
        rope: the end whose rotary embedding both ends get, if theirs differ, as in `load_pair`.
        options: options of the thinking end: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`,
            `subfolder`, `trust_remote_code`. Those of the instruct end are arguments of `from_pretrained`.

    Raises:
        TypeError: an option is unknown.
        ValueError: the format is unknown, or `tokenizer` or `rope` is no end.
    """

    def __init__(
        self,
        thinking: str | Path,
        format: str = "pair",
        *,
        intensity: float | str = DEFAULT_INTENSITY,
        invariant: bool = False,
        tokenizer: End | None = None,
        rope: End | None = None,
        quant_method: str = TWO_ENDS,
        **options: Any,
    ) -> None:
        formats.get(format)
        if unknown := options.keys() - set(OPTIONS):
            raise TypeError(f"PairConfig takes options of {list(OPTIONS)} for the thinking end, got {sorted(unknown)}")
        for name, end in (("tokenizer", tokenizer), ("rope", rope)):
            check_choice(name, end)
        self.quant_method: Any = TWO_ENDS
        self.thinking = str(thinking)
        self.format = format
        self.intensity = intensity
        self.invariant = invariant
        self.tokenizer = tokenizer
        self.rope = rope
        self.options = options

    def to_dict(self) -> dict[str, Any]:
        """Returns the arguments and `quant_method`, but no token, as transformers may write it to a file or a log."""
        own = {name: value for name, value in vars(self).items() if name != "options"}
        own = {name: value for name, value in own.items() if value is not None}
        return own | {name: value for name, value in self.options.items() if name != "token"}


def any_layer(name: str) -> str:
    """Returns a parameter's name with every number between dots replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def by_pattern(formats_by_name: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Returns `formats_by_name`, with a single `*` entry for a parameter that has the same format in all layers.

    Args:
        formats_by_name: the formats of the parameters that differ between the ends.
        names: the names of all parameters of the model.
    """
    layers: dict[str, set[str | None]] = {}
    for name in names:
        layers.setdefault(any_layer(name), set()).add(formats_by_name.get(name))
    alike = {pattern for pattern, found in layers.items() if len(found) == 1}
    return {
        pattern if (pattern := any_layer(name)) in alike else name: format for name, format in formats_by_name.items()
    }
