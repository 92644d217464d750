"""PEFT adapters on top of a patched model: what they may do, and what would reach one of its two ends only."""

from __future__ import annotations

import functools
import sys

from torch import nn

from dami.layers import LerpModule


def adapted_modules(model: nn.Module) -> list[str]:
    """Names of the modules over which PEFT has put an adapter."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapters = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [name for name, module in model.named_modules() if isinstance(module, adapters)]


def refuse_adapters(model: nn.Module, what: str, remedy: str) -> None:
    """ValueError if there is an adapter on the model, which `what` would lose or mistake for a part of the pair."""
    if names := adapted_modules(model):
        raise ValueError(f"{what} takes a model without PEFT adapters, got one on {names[0]} and others: {remedy}")


def guard_merging() -> None:
    """Makes PEFT refuse to merge an adapter into a patched model, whose λ=0 end alone it would find."""
    from peft.tuners.tuners_utils import BaseTuner

    original = BaseTuner._check_merge_allowed
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def check(self: BaseTuner) -> None:
        if any(isinstance(module, LerpModule) for module in self.model.modules()):
            raise ValueError(
                "an adapter cannot be merged into a patched model: it would be in the instruct end only. Leave it on "
                "top, where it is the same at every intensity, or merge it into both models before patching"
            )
        original(self)

    BaseTuner._check_merge_allowed = check  # type: ignore[method-assign]
