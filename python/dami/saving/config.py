"""Defines `PairConfig`, the part of a packed pair's config that describes how it is stored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from dami.sources import QUANT_METHOD
from dami_kernels import formats


class PairConfig(QuantizationConfigMixin):
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
        **_: Any,
    ) -> None:
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
