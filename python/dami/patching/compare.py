"""Compares the tensors and configs of two ends, to check that they are models of the same shape."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from dami.sources import TWO_ENDS

Header = tuple[list[int], str]


# settings that may differ between the ends without changing what a forward pass computes
HARMLESS = re.compile(
    r"_name_or_path|name_or_path|transformers_version|(torch_)?dtype|use_cache|return_dict|.*_token_id"
    r"|.*_(dropout|pdrop)(_prob)?|dropout|initializer_range|id2label|label2id|problem_type|max_window_layers"
    r"|task_specific_params|tokenizer_class|output_.*|chunk_size_feed_forward|finetuning_task|_attn_implementation"
    r"|do_sample|temperature|top_[kp]|max_length|max_new_tokens|repetition_penalty|unsloth.*"
)


STRETCHED = ("dynamic", "longrope", "yarn")  # rotary embeddings that depend on max_position_embeddings


def first_names(model: PreTrainedModel) -> dict[str, str]:
    """Maps every tensor name of a model to the first name of the same tensor, which is its own unless it is tied."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}


def headers_of(model: PreTrainedModel) -> dict[str, Header]:
    """Returns the shape and dtype of every parameter and persistent buffer of a model, by name."""
    return {name: (list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in model.state_dict().items()}


def tensor_mismatches(instruct: Mapping[str, Header], thinking: Mapping[str, Header], dtypes: bool = True) -> list[str]:
    """Returns a line for each tensor that is in one end only, or whose shape (or dtype, if `dtypes`) differs."""
    lines = [f"{name}: in the instruct end only" for name in instruct if name not in thinking]
    lines += [f"{name}: in the thinking end only" for name in thinking if name not in instruct]
    for name, header in instruct.items():
        (shape, dtype), (other_shape, other_dtype) = header, thinking.get(name, header)
        if shape != other_shape or (dtypes and dtype != other_dtype):
            lines.append(
                f"{name}: {dtype} {shape} in the instruct end, {other_dtype} {other_shape} in the thinking end"
            )
    return sorted(lines)


def config_mismatches(instruct: PreTrainedConfig, thinking: PreTrainedConfig) -> list[str]:
    """Returns a line for each setting that differs between two configs and changes what a forward pass computes."""
    return [
        f"config.{key}: {values[0]!r} in the instruct end, {values[1]!r} in the thinking end"
        for key, values in differing_settings(instruct, thinking).items()
    ]


def differing_settings(instruct: PreTrainedConfig, thinking: PreTrainedConfig) -> dict[str, tuple[Any, Any]]:
    """Returns both values of each setting that differs and changes what a forward pass computes.

    Settings of a nested config are named with dots, such as `text_config.hidden_size`.
    """
    ends = [_flat(config.to_dict()) for config in (instruct, thinking)]
    for end in ends:  # these describe how a file is read; the loaded weights are plain
        if end.get("quantization_config.quant_method") in ("gguf", TWO_ENDS):
            end.update({key: None for key in end if key.startswith("quantization_config.")})
    if instruct.model_type != thinking.model_type:  # comparing the rest would be pointless
        ends = [{"model_type": config.model_type} for config in (instruct, thinking)]
    types = {value for end in ends for key, value in end.items() if key.endswith("rope_type")}
    harmless = {"max_position_embeddings"} if types.isdisjoint(STRETCHED) else set()
    found = {}
    for key in sorted(ends[0].keys() | ends[1].keys()):
        values = ends[0].get(key), ends[1].get(key)
        unknown = key == "architectures" and None in values
        name = key.rpartition(".")[2]
        if not _same(*values) and not unknown and name not in harmless and not HARMLESS.fullmatch(name):
            found[key] = values
    return found


def _same(ours: object, theirs: object) -> bool:
    """Whether two values of a setting are equal; numbers are, if they may have been the same before float32."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=2**-24)  # GGUF files keep numbers in float32
    return ours == theirs


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + str(key)] = value
    return flat
