"""The state of a patched model's modules: the dial they read λ from, and the forward pass they are in."""

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
    """Holds the λ that modules read.

    Modules share one dial, so one assignment turns it for all of them. λ is a tensor, so a compiled graph accepts a new
    value without recompiling.

    Attributes:
        lam: float32, [] for one λ for every row, or [B] for one per sequence.
        rest: the λ from before a `with` block or a pass turned the dial, to be restored afterwards; None outside them.
    """

    lam: Tensor
    rest: Tensor | None = None

    @contextmanager
    def turned(self, lam: Tensor) -> Iterator[None]:
        """Sets the dial to `lam` for the duration of a `with` block."""
        before = self.lam, self.rest
        self.lam, self.rest = lam, self.lam if self.rest is None else self.rest
        try:
            yield
        finally:
            self.lam, self.rest = before

    def __getstate__(self) -> dict[str, Any]:
        """Gives a copy the λ from outside all blocks and passes, detached from any graph that computed it."""
        lam = self.lam if self.rest is None else self.rest
        return {"lam": lam if lam.is_leaf else lam.detach(), "rest": None}


def layer_of(name: str) -> int | None:
    """Returns the index of the layer that a module of this qualified name is in; None outside the layers."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None


class PatchedModule(nn.Module):
    """A patched module of any kind."""

    lerp: ModuleState


@dataclass(frozen=True)
class StoredEnds:
    """The format in which a patched module stores both ends of a parameter, and the names of the stored tensors."""

    format: str
    names: tuple[str, ...]


@dataclass(eq=False)
class ForwardState:
    """The forward pass that a model is in; all its modules share this object.

    Attributes:
        sequences: number of sequences in the batch, a multiple of the number of λ (beams); 0 if unknown, None outside a
            pass.
        tokens: number of tokens per sequence; 0 if unknown.
        ordered: whether rows are in the order of the sequences.
        packed: float32 [tokens], the λ of each token when the tokens of all sequences are packed into one row, as in
            continuous batching; each token then counts as a sequence. None otherwise.
        kept: float32 [rows], the λ of the tokens in a packed row whose logits are computed; None if all are.
        invariant: whether the bits of a row must not depend on the other rows.
        last: the linear layer that ran last, its input, and how often that input had been changed in place.
        results: for each layer that `layers.siblings` has computed ahead, what its result was computed from, and the
            result.
    """

    sequences: int | None = None
    tokens: int = 0
    ordered: bool = True
    packed: Tensor | None = None
    kept: Tensor | None = None
    invariant: bool = False
    last: tuple[Any, Tensor, int] | None = None
    results: dict[Any, tuple[tuple[Any, ...], Tensor]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the pass: a copy is not in one."""
        return vars(ForwardState(invariant=self.invariant))

    @contextmanager
    def during(
        self, sequences: int, tokens: int, packed: Tensor | None = None, kept: Tensor | None = None
    ) -> Iterator[None]:
        """Marks a `with` block as a pass of `sequences` sequences with `tokens` tokens each."""
        before = self.sequences, self.tokens, self.packed, self.kept
        self.sequences, self.tokens, self.packed, self.kept = sequences, tokens, packed, kept
        try:
            yield
        finally:
            self.sequences, self.tokens, self.packed, self.kept = before
            self.forget()

    @contextmanager
    def out_of_order(self) -> Iterator[None]:
        """Marks a `with` block in which rows are not in the order of the sequences, so modules must not assume it."""
        self.ordered = False
        try:
            yield
        finally:
            self.ordered = True

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Lets modules read their parameters at λ for the duration of a `with` block, even outside a pass."""
        before, self.sequences = self.sequences, self.sequences or 0
        try:
            yield
        finally:
            self.sequences = before
            self.forget()

    def forget(self) -> None:
        """Drops what the layers of a pass have kept for each other."""
        self.last = None
        self.results.clear()

    def are_gathered(self, rows: Tensor) -> bool:
        """Whether rows [n] or [n, K] are of some tokens only, so that whose they are is unknown.

        A slice [:, t] of a tensor [B, T, K] is known by its strides: it has a row of each sequence, in their order.
        """
        if not self.sequences or len(rows) % (self.sequences * (self.tokens or 1)) == 0:
            return False
        return rows.dim() != 2 or len(rows) != self.sequences or rows.stride(0) != self.tokens * rows.shape[1]

    def counts(self, rows: int) -> bool:
        """Whether a dimension of this size can be the batch: its entries are sequences, tokens or parts of tokens."""
        return self.ordered and (
            not self.sequences or rows == self.sequences or rows % (self.sequences * (self.tokens or 1)) == 0
        )


@dataclass(eq=False)
class ModuleState:
    """The state that patching adds to a module.

    Attributes:
        dial: the model's dial, from which the module reads λ.
        original: the module's class before patching.
        settings: keyword arguments of the operator, such as a norm's eps or a linear layer's `invariant`.
        layer: index of the module's layer, None outside the layers.
        group: one of `dial.MODULE_GROUPS`.
        stored: how the ends of each interpolated parameter and buffer are stored, by its name.
        name: the module's qualified name in the model.
        running: the forward pass of the model.
        tokens_at: the input dimension that holds the tokens of a packed row; None until the module has seen one.
        part: the dial to read instead of the model's, while the module is in a part with a λ of its own.
        resting: the value of `part` outside `with dami.intensity(…)` blocks, as set by `dami.set_intensity`.
        ends: cache of `LerpModule.ends`, by the parameter's name.
        siblings: the `layers.siblings.Siblings` group that the module is in.
        alone: whether the module must stay out of such groups, because one that it was in was of no use.
        seen: where its tensors were, and how often changed in place, when it last ran alone.
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
    seen: tuple[tuple[int, int], ...] | None = None

    @property
    def lam(self) -> Tensor:
        """The module's λ: a scalar if there is only one, or one per token in a packed row.

        Raises ValueError if the module's part has one λ per sequence while rows are packed.
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
        """Leaves out `with` blocks and cached tensors: a copy starts without them."""
        return {**vars(self), "part": self.resting, "ends": {}, "siblings": None, "alone": False, "seen": None}
