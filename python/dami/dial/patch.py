"""`Patch`: what `patch_model` keeps on a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dami.dial.program import DialProgram
from dami.dial.state import Dial, ForwardState
from dami.threads import Hold


def device_of(model: nn.Module) -> torch.device:
    """Where a patched model's λ is wanted."""
    return getattr(model, "device", patch_of(model).dial.lam.device)


def patch_of(model: nn.Module) -> Patch:
    """What `patch_model` keeps on a model; TypeError if it is not patched."""
    patch = getattr(model, "dami_patch", None)
    if patch is None:
        raise TypeError(f"model must be patched by dami.patch_model or dami.load_pair, got {type(model).__name__}")
    return patch


@dataclass
class Origin:
    """What is known of a pair's two checkpoints.

    Attributes:
        parents: name and licence of the instruct end and of the thinking end.
        error: ‖W(1) − W_thinking‖ / ‖W_thinking‖ over all that the pair's format stores, where it was measured.
        tokenizer: the pair's, which is saved with it.
    """

    parents: Sequence[Mapping[str, str | None]] = ()
    error: float | None = None
    tokenizer: Any = None


@dataclass(eq=False)
class Patch:
    """What `patch_model` keeps on a model.

    Attributes:
        dial: the λ of all modules, except where a part of them is set apart.
        original: the model's class before.
        trainable: the parameters that required a gradient before.
        estimator: what chooses λ for `generate(intensity="auto")`.
        presets: λ by name, such as "low".
        parts: the dials of the parts that are set apart, the innermost last.
        resting: those that `dami.set_intensity` has set apart, and no block.
        frontier: what both were measured on, as `dami.evaluation.report.summary` says it; {} if nothing was.
        hold: of the thread that runs the model.
        program: turns the dials of the `generate` that is running, if one is.
        running: the forward pass that the model is in.
        attention: the implementation outside of continuous batching, while the model is set up for that; None else.
        checked: whether `check_independence` has passed.
        packs: whether the check of packed rows has, which is continuous batching's.
        origin: what it is a patch of.
        head: the hook of a head that is no part of the patch.
        shared: the weight that the head shared with the embedding before, where it has been given one of its own.
    """

    dial: Dial
    original: type[Any]
    trainable: list[nn.Parameter]
    estimator: Estimator | None = None
    presets: Mapping[str, float] = field(default_factory=dict)
    parts: list[Dial] = field(default_factory=list)
    resting: list[Dial] = field(default_factory=list)
    frontier: Mapping[str, Any] = field(default_factory=dict)
    hold: Hold = field(default_factory=Hold)
    program: DialProgram | None = None
    running: ForwardState = field(default_factory=ForwardState)
    attention: str | None = None
    checked: bool = False
    packs: bool = False
    origin: Origin = field(default_factory=Origin)
    head: RemovableHandle | None = None
    shared: nn.Parameter | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no block, and runs no `generate`."""
        return {**vars(self), "parts": [*self.resting], "program": None}


class Estimator(Protocol):
    """What chooses λ for the prompts of a batch."""

    def estimate(self, model: Any, batch: Mapping[str, Tensor]) -> Sequence[float] | Tensor:
        """λ of every prompt.

        Args:
            model: the patched model that is asked; it may be run, at any λ.
            batch: the tensors that `generate` was given, by name: `input_ids` [B, T] or `inputs_embeds` [B, T, D], and
                mostly `attention_mask` [B, T].

        Returns:
            B finite real numbers.
        """
        ...
