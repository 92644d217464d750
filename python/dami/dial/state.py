"""What the modules of a patched model know: where they read λ, and the forward pass they are in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

MODULE_GROUPS = ("attn", "embed", "experts", "head", "mlp", "norm", "other")


@dataclass(eq=False)
class Dial:
    """Where modules read λ.

    Modules share the object, so that turning it is one assignment; λ itself stays a tensor, so that a compiled graph
    takes a new one without recompiling.

    Attributes:
        lam: float32, [] for every row, or [B], one per sequence.
        rest: where it stood before a `with` block or a pass turned it, and will stand again; None while it is there.
    """

    lam: Tensor
    rest: Tensor | None = None

    @contextmanager
    def turned(self, lam: Tensor) -> Iterator[None]:
        """Reads `lam` for the time of a `with` block."""
        before = self.lam, self.rest
        self.lam, self.rest = lam, self.lam if self.rest is None else self.rest
        try:
            yield
        finally:
            self.lam, self.rest = before

    def __getstate__(self) -> dict[str, Any]:
        """A copy stands where this dial will once all blocks and passes are left; a computed λ is its value there."""
        lam = self.lam if self.rest is None else self.rest
        return {"lam": lam if lam.is_leaf else lam.detach(), "rest": None}


def layer_of(name: str) -> int | None:
    """Index of the layer that a module of this qualified name is in, None outside the layers."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None


class PatchedModule(nn.Module):
    """A module of a patched model, whatever it computes."""

    lerp: ModuleState


@dataclass(frozen=True)
class StoredEnds:
    """In which format a patched module keeps both ends of a parameter, and the names of its tensors."""

    format: str
    names: tuple[str, ...]


@dataclass(eq=False)
class ForwardState:
    """The forward pass that a model is in; its modules share it.

    Attributes:
        sequences: of the batch, a multiple of the number of λ (beams); 0 where it is not known, None outside a pass.
        tokens: of each sequence; 0 where that is not known.
        ordered: whether rows stand in the order of the sequences.
        packed: where tokens of all sequences stand in one row, as in continuous batching, float32 [tokens], λ of each;
            tokens are then taken for sequences.
        kept: float32 [rows], λ of those tokens of a packed row whose logits are wanted, where not all are.
        invariant: whether the bits of a row are to be independent of the others.
        last: the linear layer that ran last, its input and how often that had been changed in place.
    """

    sequences: int | None = None
    tokens: int = 0
    ordered: bool = True
    packed: Tensor | None = None
    kept: Tensor | None = None
    invariant: bool = False
    last: tuple[Any, Tensor, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no pass."""
        return vars(ForwardState(invariant=self.invariant))

    @contextmanager
    def during(
        self, sequences: int, tokens: int, packed: Tensor | None = None, kept: Tensor | None = None
    ) -> Iterator[None]:
        """A pass of so many sequences and tokens of each, for the time of a `with` block."""
        before = self.sequences, self.tokens, self.packed, self.kept
        self.sequences, self.tokens, self.packed, self.kept = sequences, tokens, packed, kept
        try:
            yield
        finally:
            self.sequences, self.tokens, self.packed, self.kept = before

    @contextmanager
    def out_of_order(self) -> Iterator[None]:
        """For a while rows are not in the order of the sequences, and no module may take them for it."""
        self.ordered = False
        try:
            yield
        finally:
            self.ordered = True

    @contextmanager
    def entered(self) -> Iterator[None]:
        """For a while it is no matter that a module is called outside a pass: it reads its parameters at λ."""
        before, self.sequences = self.sequences, self.sequences or 0
        try:
            yield
        finally:
            self.sequences = before

    def counts(self, rows: int) -> bool:
        """Whether a dimension of this size can be the batch: one sequence, token, or part of a token after another."""
        return self.ordered and (
            not self.sequences or rows == self.sequences or rows % (self.sequences * (self.tokens or 1)) == 0
        )


@dataclass(eq=False)
class ModuleState:
    """What a patched module knows beyond the original.

    Attributes:
        dial: its model's, where it reads λ.
        original: its class before.
        settings: keyword arguments of its operator, such as a norm's eps, or a linear layer's `invariant`.
        layer: index of its layer, None outside the layers.
        group: one of `dial.MODULE_GROUPS`.
        stored: where the ends of every parameter and buffer that is interpolated are, by its name.
        name: the module's, in its model.
        running: the forward pass of its model.
        tokens_at: which dimension of its input the tokens of a packed row are, once it has met one.
        part: the dial that it reads instead, while its part of the model is set apart.
        resting: what `part` is outside of `with dami.intensity(…)` blocks, as `dami.set_intensity` has set it.
        ends: what `LerpModule.ends` has made of the stored tensors, by the parameter's name.
        siblings: the `layers.siblings.Siblings` that it is one of.
        alone: whether it is to be none of any, as it was one in vain.
    """

    dial: Dial
    original: type[nn.Module]
    settings: dict[str, Any]
    layer: int | None
    group: str
    stored: dict[str, StoredEnds] = field(default_factory=dict)
    name: str = ""
    running: ForwardState = field(default_factory=ForwardState)
    tokens_at: int | None = None
    part: Dial | None = None
    resting: Dial | None = None
    ends: dict[str, Any] = field(default_factory=dict)
    siblings: Any = None
    alone: bool = False

    @property
    def lam(self) -> Tensor:
        """λ that holds for it, a scalar if it is one, or of each token in a packed row.

        ValueError if its part has one per sequence there.
        """
        packed = self.running.packed
        if self.part is None and packed is not None:
            return packed
        lam = self.dial.lam if self.part is None else self.part.lam
        if lam.dim() == 0:
            return lam
        if packed is not None and len(lam) > 1:
            raise ValueError(f"{self.name} takes one intensity for all requests of a continuous batch, got {len(lam)}")
        return lam if len(lam) > 1 else lam[0]

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no `with` block, and in no pass."""
        return {**vars(self), "part": self.resting, "ends": {}, "siblings": None}
