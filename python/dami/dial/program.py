"""Changes λ over the steps of one `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dami.dial.state import Dial
from dami.dial.values import as_lam
from dami.schedules import Schedule


@dataclass(eq=False)
class DialTrack:
    """The λ of one dial over the steps of one `generate` with B prompts.

    Attributes:
        dial: the dial to turn.
        fixed: float32 [] or [B], λ of the sequences without a schedule.
        schedules: each with the indices of its sequences.
        prompt: float32 [] or [B], λ while the prompt is read; None to read it at the same λ as the rest.
    """

    dial: Dial
    fixed: Tensor
    schedules: Sequence[tuple[Schedule, list[int]]]
    prompt: Tensor | None

    def turn(self, step: int, tokens: Tensor) -> None:
        """Sets the dial, to one λ for all rows or one per row, given tokens [rows, step] with n rows per sequence."""
        lam, schedules = self.fixed, self.schedules
        if step == 0 and self.prompt is not None:
            lam, schedules = self.prompt, []
        if lam.dim() and len(tokens) % len(lam) == 0 and (len(lam) > 1 or schedules):
            lam = lam.repeat_interleave(len(tokens) // len(lam))
        for schedule, places in schedules:
            of_sequence = lam.view(len(self.fixed), -1)
            rows = tokens.unflatten(0, of_sequence.shape)[places].flatten(0, 1)
            answer = self._ask(schedule, step, rows)
            of_sequence[places] = answer.expand(len(rows)).view(len(places), -1)
            if answer.dim() == 0 and len(self.fixed) == 1:
                lam = lam[:1]  # one λ for all beams
        self.dial.lam = lam

    def _ask(self, schedule: Schedule, step: int, rows: Tensor) -> Tensor:
        try:
            return as_lam(schedule(step, rows), self.fixed.device, len(rows))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{schedule} at step {step}, for {len(rows)} rows: {error}") from error


@dataclass(eq=False)
class DialProgram:
    """Turns the dials before every forward pass of one `generate`."""

    tracks: list[DialTrack]
    prompt_length: int | None = field(default=None, init=False)

    def turn(self, ids: Tensor, prompt: bool) -> None:
        """Turns all dials before a forward pass.

        Args:
            ids: int64 [rows, length], the sequences so far; while the prompt is read, possibly a piece of them.
            prompt: whether this pass reads the prompt.
        """
        if prompt:
            tokens = ids[:, :0]
        else:
            if self.prompt_length is None:
                self.prompt_length = ids.shape[1] - 1  # reading the prompt gave the first token
            tokens = ids[:, self.prompt_length :]
        for track in self.tracks:
            track.turn(tokens.shape[1], tokens.to(track.fixed.device))
