"""`Patch`: what `patch_model` keeps on a model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dami.dial.program import DialProgram
from dami.dial.state import Dial, ForwardState
from dami.threads import Hold


def device_of(model: nn.Module) -> torch.device:
    """Returns the device on which a patched model needs λ."""
    return getattr(model, "device", patch_of(model).dial.lam.device)


def patch_of(model: nn.Module) -> Patch:
    """Returns the `Patch` that `patch_model` keeps on a model. Raises TypeError if the model is not patched."""
    patch = getattr(model, "dami_patch", None)
    if patch is None:
        raise TypeError(f"model must be patched by dami.patch_model or dami.load_pair, got {type(model).__name__}")
    return patch


@dataclass
class Origin:
    """What is known about the two checkpoints of a pair.

    Attributes:
        parents: name and licence of the instruct end and of the thinking end.
        error: ‖W(1) − W_thinking‖ / ‖W_thinking‖ over all weights stored in the pair's format; None if not measured.
        tokenizer: the pair's tokenizer, which is saved with it.
        differences: what differs between the two and how it was resolved, as `loading.policies.Difference` has it.
        vocabulary: how many tokens the instruct end and the thinking end know, if one knows more; None if they agree.
        sampling: the sampling parameters of "instruct" and "thinking", if they differ.
    """

    parents: Sequence[Mapping[str, str | None]] = ()
    error: float | None = None
    tokenizer: Any = None
    differences: Sequence[Mapping[str, Any]] = ()
    vocabulary: tuple[int, int] | None = None
    sampling: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(eq=False)
class Patch:
    """What `patch_model` keeps on a model.

    Attributes:
        dial: holds the λ of all modules, except those in a part with a λ of its own.
        original: the model's class before patching.
        trainable: the parameters that required a gradient before patching.
        estimator: chooses λ for `generate(intensity="auto")`.
        presets: λ by name, such as "low".
        parts: the dials of the parts with a λ of their own, the innermost last.
        resting: the dials among these that `dami.set_intensity` created, not a `with` block.
        frontier: the measurements behind presets and estimator, as `dami.evaluation.report.summary` returns them; {}
            if there are none.
        prompt_tail: the least `prompt_tail` that was found to cost nothing; None if none was, or none was measured.
        hold: the hold of the thread that runs the model.
        program: turns the dials during `generate`; None if no `generate` is running.
        running: the forward pass that the model is in.
        attention: the attention implementation to restore after continuous batching; None if the model is not set up
            for it.
        checked: whether `check_independence` has passed.
        packs: whether the check of packed rows, for continuous batching, has passed.
        origin: the checkpoints that the model was made from.
        hooks: those on modules that are not part of the patch.
        shared: the weight that the head shared with the embedding, if patching gave the head a weight of its own.
        chosen: λ that the estimator chose in the last `generate` that asked it, by the prompt's index.
        compiled: what `generation.compiled` has compiled, by the structure of the layer or model then.
    """

    dial: Dial
    original: type[Any]
    trainable: list[nn.Parameter]
    estimator: Estimator | None = None
    presets: Mapping[str, float] = field(default_factory=dict)
    parts: list[Dial] = field(default_factory=list)
    resting: list[Dial] = field(default_factory=list)
    frontier: Mapping[str, Any] = field(default_factory=dict)
    prompt_tail: int | None = None
    hold: Hold = field(default_factory=Hold)
    program: DialProgram | None = None
    running: ForwardState = field(default_factory=ForwardState)
    attention: str | None = None
    checked: bool = False
    packs: bool = False
    origin: Origin = field(default_factory=Origin)
    hooks: list[RemovableHandle] = field(default_factory=list)
    shared: nn.Parameter | None = None
    chosen: Mapping[int, float] = field(default_factory=dict)
    compiled: dict[Hashable, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out `with` blocks and a running `generate`: a copy is in neither; and compiled graphs."""
        return {**vars(self), "parts": [*self.resting], "program": None, "compiled": {}}


class Estimator(Protocol):
    """Chooses λ for the prompts of a batch.

    An estimator with an attribute `takes_cache` that is true is spared what `generate` reads at λ=0 anyway, because of
    `prompt_intensity=0`. It then finds a cache of the prompts' first tokens in the batch, under the name that the
    model's forward pass gives it, and may add to it.

    An estimator may have `layers` and `choose`, if nothing decides but the states at a prompt's last token, at λ=0:
    `choose` takes them as float32 [B, features], those of each of the `layers` one after the other, and returns λ [B].
    A server that reads prompts at λ=0 then asks it in passing (`dami.estimators.features.prompt_states` are the same).
    """

    def estimate(self, model: Any, batch: Mapping[str, Tensor]) -> Sequence[float] | Tensor:
        """Returns λ for every prompt.

        Args:
            model: the patched model; the estimator may run it, at any λ.
            batch: the tensors that `generate` was given, by name: `input_ids` [B, T] or `inputs_embeds` [B, T, D], and
                usually `attention_mask` [B, T].

        Returns:
            B finite real numbers.
        """
        ...
