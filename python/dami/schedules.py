"""λ over the steps of decoding: schedules, and what turns a model's dials while `generate` runs.

A schedule is a callable `schedule(step, tokens) -> λ`:

    step    how many tokens have been generated; 0 while the prompt is read
    tokens  int64 [rows, step], what its rows have generated so far, on the model's device; rows that have ended are
            padded, and the beams of a sequence are rows of their own
    λ       a real number for all its rows, or a tensor [rows]

It is asked before every forward pass, and must not remember anything between calls: beams change places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from dami.dial import Dial, as_lam, device_of, named, parts_of, patch_of, separate
from dami.sources import check_estimator

Schedule = Callable[[int, Tensor], float | Tensor]


@dataclass(frozen=True)
class linear:
    """From `start` to `end` in equal parts over the first `steps` tokens, and `end` from there on."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def __call__(self, step: int, tokens: Tensor) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@dataclass(frozen=True)
class switch_after:
    """One λ up to and including the tokens `ids` in what a row generates, and another after them.

    Args:
        ids: a token, or several in a row, such as `tokenizer.encode("</think>", add_special_tokens=False)`.
        before: λ until a row has generated them: the thought.
        after: λ from there on: the answer.
    """

    ids: int | Sequence[int]
    before: float
    after: float

    def __post_init__(self) -> None:
        ids = (self.ids,) if isinstance(self.ids, int) else tuple(self.ids)
        if not ids:
            raise ValueError("ids must hold at least one token, got none")
        object.__setattr__(self, "ids", ids)

    def __call__(self, step: int, tokens: Tensor) -> float | Tensor:
        ids = tokens.new_tensor(self.ids)
        if step < len(ids):
            return self.before
        passed = (tokens.unfold(1, len(ids), 1) == ids).all(2).any(1)
        return torch.where(passed, self.after, self.before)


@dataclass(eq=False)
class Line:
    """The λ of one dial over the steps of one `generate` with B prompts.

    Attributes:
        dial: what it turns.
        fixed: float32 [] or [B], λ where no schedule says otherwise.
        schedules: each with the sequences it is for.
        prompt: float32 [] or [B], λ while the prompt is read; None if the prompt is nothing special.
    """

    dial: Dial
    fixed: Tensor
    schedules: list[tuple[Schedule, list[int]]]
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
class Course:
    """Turns the dials before every forward pass of one `generate`."""

    lines: list[Line]
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
        for line in self.lines:
            line.turn(tokens.shape[1], tokens.to(line.fixed.device))


@contextmanager
def course_of(
    model: nn.Module, intensity: Any, prompt_intensity: Any, prompts: int, options: Mapping[str, Any]
) -> Iterator[None]:
    """Sets the λ of a patched model for one `generate`, whose forward passes run inside the `with` block.

    Args:
        model: a patched model.
        intensity: a number, a preset's name, "auto", a schedule, or one of them per prompt; a mapping of parts of the
            model to these; an iterator, of which the first are taken; or None, for λ as it is.
        prompt_intensity: a number, or one per prompt, for reading the prompts; or None.
        prompts: how many there are.
        options: arguments of `generate` by name.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    patch = patch_of(model)
    device = device_of(model)
    if isinstance(intensity, Iterator):
        intensity = list(islice(intensity, prompts))
    parts: list[tuple[Any, Any, Any]] = [(None, None, intensity)]
    if isinstance(intensity, Mapping):
        parts = parts_of(intensity)
    parts = [(modules, layers, resolved(model, value, options, prompts)) for modules, layers, value in parts]
    prompt = prompt_intensity if prompt_intensity is None else named(model, prompt_intensity)
    prompt = prompt if prompt is None else as_lam(prompt, device, prompts, "prompt_intensity")
    before = patch.course
    for part in patch.parts:
        as_lam(part.lam, device, prompts)
    with ExitStack() as stack:
        lines = []
        whole = stack.enter_context(separate(model))
        if prompt is not None and isinstance(intensity, Mapping):
            lines.append(Line(whole, as_lam(whole.lam, device, prompts), [], prompt))
        for modules, layers, value in parts:
            dial = whole if modules is None else stack.enter_context(separate(model, modules, layers))
            fixed, schedules = _split(dial.lam if value is None else value, device, prompts)
            lines.append(Line(dial, fixed, schedules, prompt))
        _refuse(
            model,
            options,
            prompt is not None or any(line.schedules for line in lines),
            mixed=any(line.fixed.numel() > 1 for line in lines),
        )
        patch.course = Course(lines)
        stack.callback(setattr, patch, "course", before)
        patch.course.turn(torch.empty(prompts, 0, dtype=torch.int64), prompt=True)  # an encoder runs before any pass
        yield


def _split(value: Any, device: torch.device, prompts: int) -> tuple[Tensor, list[tuple[Schedule, list[int]]]]:
    """What is fixed of an intensity, and its schedules, each with the prompts it is for."""
    values = [value] * prompts if callable(value) else value
    if not isinstance(values, Sequence) or isinstance(values, str) or not any(map(callable, values)):
        return as_lam(value, device, prompts), []
    fixed = as_lam([0.0 if callable(each) else each for each in values], device, prompts)
    places: dict[int, list[int]] = {}
    for place, each in enumerate(values):
        if callable(each):
            places.setdefault(id(each), []).append(place)
    return fixed, [(values[several[0]], several) for several in places.values()]


def resolved(model: nn.Module, intensity: Any, batch: Mapping[str, Any], prompts: int) -> Any:
    """An intensity with numbers for presets' names, and what the estimator chooses wherever it says "auto".

    Args:
        model: a patched model.
        intensity: anything that `generate` takes.
        batch: arguments of `generate` by name; the estimator is given the tensors, for the prompts that want it only.
        prompts: how many there are.

    Raises:
        ValueError: there is no estimator, or no such preset.
    """
    value = named(model, intensity)
    values = [value] * prompts if isinstance(value, str) else value
    places = [i for i, each in enumerate(values) if isinstance(each, str)] if isinstance(values, list) else []
    if not places:
        return value
    if len(values) != prompts:
        raise ValueError(f"intensity must be a real number, or one per sequence, got {len(values)} for {prompts}")
    patch = patch_of(model)
    estimator = patch.estimator
    check_estimator(estimator)
    inputs = {
        "input_ids" if name == "inputs" else name: tensor[places] if tensor.shape[:1] == (prompts,) else tensor
        for name, tensor in batch.items()
        if isinstance(tensor, Tensor)
    }
    groups = [inputs]
    if patch.running.invariant:  # λ must not depend on the other prompts either
        groups = [_alone(inputs, row, len(places)) for row in range(len(places))]
    several = len(places) // len(groups)
    chosen = [
        as_lam(estimator.estimate(model, group), torch.device("cpu"), several).expand(several) for group in groups
    ]
    for place, lam in zip(places, torch.cat(chosen).tolist(), strict=True):
        values[place] = lam
    return values


def _alone(batch: Mapping[str, Tensor], row: int, prompts: int) -> dict[str, Tensor]:
    """A prompt of a batch by itself, without padding."""
    alone = {
        name: tensor[row : row + 1] if tensor.shape[:1] == (prompts,) else tensor for name, tensor in batch.items()
    }
    mask = alone.get("attention_mask")
    if mask is None:
        return alone
    seen = mask[0].bool()
    return {name: x[:, seen] if x.shape[:2] == mask.shape else x for name, x in alone.items()}


SEVERAL_STEPS_IN_ONE = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def _refuse(model: Any, options: Mapping[str, Any], changing: bool, mixed: bool) -> None:
    """Refuses what would run at another λ than asked for: ValueError."""

    def option(name: str) -> Any:
        config = options.get("generation_config") or model.generation_config
        return options.get(name, getattr(config, name, None))

    several = "assistant_model" if options.get("assistant_model") is not None else None
    several = several or next((name for name in SEVERAL_STEPS_IN_ONE if option(name)), None)
    if changing and several:
        raise ValueError(
            f"{several} takes one intensity for all steps, as it checks tokens of several steps in one forward pass: "
            "got a schedule or a prompt_intensity"
        )
    if option("cache_implementation") == "paged":
        if changing:
            raise ValueError(
                "cache_implementation='paged' takes one intensity for all steps, got a schedule or a prompt_intensity"
            )
        mask = options.get("attention_mask")
        if isinstance(mask, Tensor) and not bool(mask.all()):
            raise ValueError(
                "cache_implementation='paged' takes prompts of equal length, as it reads padding as text: "
                "call model.generate_batch with a list of prompts"
            )
    if (changing or mixed) and option("token_healing"):
        raise ValueError("token_healing takes one intensity for all prompts, as it generates for each alone")
