"""Changes λ over the steps of one `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dami.dial.state import Dial
from dami.dial.values import as_lam, shortest
from dami.schedules import Schedule


@dataclass(eq=False)
class DialTrack:
    """The λ of one dial over the steps of one `generate` with B prompts.

    Attributes:
        dial: the dial to turn.
        fixed: float32 [] or [B], λ of the sequences without a schedule.
        schedules: each with the indices of its sequences.
        auto: indices of the sequences for which an estimator chooses λ.
    """

    dial: Dial
    fixed: Tensor
    schedules: Sequence[tuple[Schedule, list[int]]]
    auto: Sequence[int] = ()

    def turn(self, step: int, tokens: Tensor) -> None:
        """Sets the dial, to one λ for all rows or one per row, given tokens [rows, step] with n rows per sequence."""
        lam, schedules = self.fixed, self.schedules
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

    def decide(self, chosen: Mapping[int, float]) -> None:
        """Sets λ of the sequences in `auto`, given by index."""
        if self.auto:
            self.fixed = self.fixed.clone()
            self.fixed[list(self.auto)] = self.fixed.new_tensor([chosen[place] for place in self.auto])

    def _ask(self, schedule: Schedule, step: int, rows: Tensor) -> Tensor:
        try:
            return as_lam(schedule(step, rows), self.fixed.device, len(rows))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{schedule} at step {step}, for {len(rows)} rows: {error}") from error


@dataclass(eq=False)
class DialProgram:
    """Turns the dials before every forward pass of one `generate` with B prompts.

    Attributes:
        tracks: one per dial.
        prompt: float32 [] or [B] on the CPU, λ of the prompts before their tails; None for that of the answer.
        tails: how many tokens at the end of each prompt are read at the λ of the answer; 0 to take even the answer's
            first token from a pass at `prompt`.
        undecided: indices of the prompts whose λ an estimator is still to choose.
        starts_empty: whether `generate` was given no cache.
        reading: while the beginnings of prompts are read, the index of each row's prompt; None otherwise.
        divided: whether the prompts have been divided into beginnings and tails, or need not be.
    """

    tracks: list[DialTrack]
    prompt: Tensor | None = None
    tails: Sequence[int] = ()
    undecided: Sequence[int] = ()
    starts_empty: bool = True
    reading: Tensor | None = field(default=None, init=False)
    divided: bool = field(default=False, init=False)
    prompt_length: int | None = field(default=None, init=False)

    def read(self, prompts: Tensor | None = None) -> None:
        """Turns all dials to the λ of the prompts, given the index of each row's prompt, int64 [rows] on the CPU."""
        assert self.prompt is not None
        lam = self.prompt
        if lam.dim() and prompts is not None:
            lam = lam[prompts]
            lam = lam[0] if bool((lam == lam[0]).all()) else lam
        for track in self.tracks:
            track.dial.lam = lam.to(track.fixed.device)

    def decide(self, found: Tensor) -> dict[int, float]:
        """Sets λ of the prompts in `undecided` to as many numbers, and returns these by the prompt's index."""
        chosen = dict(zip(self.undecided, shortest(found), strict=True))
        for track in self.tracks:
            track.decide(chosen)
        self.undecided = ()
        return chosen

    def turn(self, ids: Tensor, prompt: bool) -> None:
        """Turns all dials before a forward pass.

        Args:
            ids: int64 [rows, length], the sequences so far; while the prompt is read, possibly a piece of them.
            prompt: whether this pass reads the prompt.

        Raises:
            ValueError: the prompt is read at once, but its tail should be read at another λ.
        """
        if self.reading is not None:
            self.read(self.reading)
            return
        if not self.divided and any(self.tails):
            raise ValueError(
                "prompt_tail must be 0, so that the whole prompt is read at prompt_intensity, in a decoding loop that "
                f"reads the prompt at once, got {max(self.tails)}"
            )
        if prompt:
            tokens = ids[:, :0]
        else:
            if self.prompt_length is None:
                self.prompt_length = ids.shape[1] - 1  # reading the prompt gave the first token
            tokens = ids[:, self.prompt_length :]
        for track in self.tracks:
            track.turn(tokens.shape[1], tokens.to(track.fixed.device))
            if prompt and self.prompt is not None and not all(self.tails):
                track.dial.lam = self._with_prompts(track.dial.lam, len(ids))

    def _with_prompts(self, lam: Tensor, rows: int) -> Tensor:
        """Returns λ [] or [rows], with that of the prompt in the rows of prompts without a tail."""
        assert self.prompt is not None
        prompt = _of_rows(self.prompt, rows).to(lam.device)
        if not any(self.tails):
            return prompt
        return torch.where(_of_rows(torch.tensor(self.tails) == 0, rows).to(lam.device), prompt, lam)


def _of_rows(values: Tensor, rows: int) -> Tensor:
    """Repeats the value of each prompt for its rows, which are neighbours; leaves one value for all as it is."""
    return values.repeat_interleave(rows // len(values)) if values.numel() > 1 else values
