"""λ over the steps of one `generate`."""

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
        dial: what it turns.
        fixed: float32 [] or [B], λ where no schedule says otherwise.
        schedules: each with the sequences it is for.
        prompt: float32 [] or [B], λ while the prompt is read; None if the prompt is nothing special.
    """

    dial: Dial
    fixed: Tensor
    schedules: Sequence[tuple[Schedule, list[int]]]
    prompt: Tensor | None

    def turn(self, step: int, tokens: Tensor) -> None:
        """Turns the dial for tokens [rows, step], n rows to a sequence: to one λ for all, or one for every row."""
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
                lam = lam[:1]  # one for all beams
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
        """Before a forward pass.

        Args:
            ids: int64 [rows, length], the sequences so far, or a piece of them while the prompt is read.
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
