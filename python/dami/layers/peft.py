"""PEFT adapters on a patched model: refuses those that would change only one of its two ends."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from dami.layers.base import LerpModule
from dami.upstream import adapter_classes, before_merging


def adapted_modules(model: nn.Module) -> list[str]:
    """Returns the names of the modules that PEFT has wrapped in an adapter."""
    if "peft" not in sys.modules:
        return []
    adapters = adapter_classes()
    return [name for name, module in model.named_modules() if isinstance(module, adapters)]


def refuse_adapters(model: nn.Module, what: str, remedy: str) -> None:
    """Raises ValueError if the model has an adapter, which `what` would lose or take for a part of the pair."""
    names = adapted_modules(model)
    wrapped = hasattr(model, "get_base_model")  # by PEFT, as for prompt tuning, which changes no module
    if names or wrapped:
        got = f"one on {names[0]} and others" if names else type(model).__name__
        raise ValueError(f"{what} takes a model without PEFT adapters, got {got}: {remedy}")


def guard_merging() -> None:
    """Makes PEFT refuse to merge an adapter into a patched model: it would merge into the λ=0 end only."""
    before_merging(_refuse_merging)


def _refuse_merging(model: nn.Module) -> None:
    if any(isinstance(module, LerpModule) for module in model.modules()):
        raise ValueError(
            "an adapter cannot be merged into a patched model: it would be in the instruct end only. Leave it on top, "
            "where it is the same at every intensity, or merge it into both models before patching"
        )


def check_adapters(model: Any) -> None:
    """Raises ValueError for PEFT adapters that read or change a layer's weight, as a patched layer has two."""
    for name, config in getattr(model, "peft_config", {}).items():
        settings, method = config.to_dict(), config.peft_type.value
        odd = [] if method == "IA3" else [method]
        if method == "LORA":
            odd = more_than_lora(settings | {"peft_type": method})
            if settings["init_lora_weights"] not in UNCHANGED:
                odd.append(f"init_lora_weights={settings['init_lora_weights']!r}")
            if settings["bias"] != "none":
                odd.append(f"bias={settings['bias']!r}")
        if settings.get("modules_to_save"):
            odd.append(f"modules_to_save={settings['modules_to_save']!r}")
        if odd:
            raise ValueError(
                f"the adapter {name!r} uses {', '.join(odd)}; known to leave the weights alone, of which a patched "
                "layer has two, are plain LoRA with init_lora_weights=True and IA3: use them, on a pair loaded afresh"
            )
        if any(getattr(module, "merged", False) for module in model.modules()):
            raise ValueError(
                f"the adapter {name!r} is merged into the instruct end only: call unmerge_adapter(), "
                "or merge it into both models before patching"
            )


LORA_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?")


# Settings that leave an adapter as base + up · down: they say which weights it has, how it scales, how it was trained.
PLAIN_LORA = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "lora_dropout", "fan_in_fan_out", "bias"),
    *("modules_to_save", "init_lora_weights", "runtime_config", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # for initialisation only
}


UNCHANGED = (True, False, "gaussian", "orthogonal", "eva", "mica")  # initialisations that leave the base alone


def more_than_lora(config: Mapping[str, Any]) -> list[str]:
    """Returns the settings of a PEFT config, as "name=value", that may make it more than a low-rank difference."""
    if config.get("peft_type") != "LORA":
        return [f"peft_type={config.get('peft_type')!r}"]
    return [f"{name}={value!r}" for name, value in config.items() if value and name not in PLAIN_LORA]
