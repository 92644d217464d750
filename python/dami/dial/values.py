"""Parses intensities: `Intensity.parse` does so for every caller, and `dami.callers` lists what each one takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from numbers import Real
from operator import index
from typing import Any

import torch
from torch import Tensor

from dami.callers import AUTO, Caller
from dami.schedules import Schedule

IntensityLike = float | str | Schedule | Sequence[float | str | Schedule] | Tensor  # a string is a preset, or "auto"
Part = str | tuple[str, int | Iterable[int]]  # a group or pattern of modules, in all layers or in some
AnyIntensity = IntensityLike | Mapping[Part, IntensityLike]


@dataclass(eq=False)
class Intensity:
    """A parsed intensity: checked, with presets replaced by their numbers.

    Attributes:
        numbers: [] or [B]: the tensor that was given, else float64 on the CPU; 0 where an estimator or a schedule
            decides.
        auto: indices in [B] for which the estimator chooses.
        schedules: each with the indices in [B] that it is for.
        parts: module pattern, layers and intensity of each part of the model. If there are any, the other attributes
            are unused.
    """

    numbers: Tensor
    auto: Sequence[int] = ()
    schedules: Sequence[tuple[Schedule, list[int]]] = ()
    parts: Sequence[tuple[str, list[int] | None, Intensity]] = ()

    @classmethod
    def parse(
        cls, value: Any, caller: Caller, presets: Mapping[str, float] | None = None, sequences: int | None = None
    ) -> Intensity:
        """Parses an intensity that a caller was given.

        Args:
            value: a kind of intensity that the caller takes: a real number; one per sequence, as a list or other
                sequence, a NumPy array or a tensor, of floats or integers; a preset's name, "auto" or a schedule, for
                all sequences or in a list; a mapping from parts of the model to these; or an iterator, from which the
                first `sequences` entries are taken. Gradients flow through a tensor.
            caller: one of `dami.callers`.
            presets: λ by name.
            sequences: B, if known. Callers that take "auto" or schedules always pass it.

        Raises:
            TypeError: the caller does not take this kind, or it is not an intensity, such as a bool, bytes or a set.
            ValueError: it is NaN or infinite (not checked for a tensor on a GPU, to avoid waiting for the GPU), has two
                or more dimensions or the wrong length, or is not a preset's name.
        """
        if isinstance(value, Mapping):
            caller.check("parts")
            part = caller.of_a_part()
            parts = [(*key, cls.parse(each, part, presets, sequences)) for key, each in _parts(value)]
            return cls(torch.zeros(()), parts=parts)
        if isinstance(value, Iterator) and "iterator" in caller.takes:
            value = list(islice(value, sequences))
            if sequences is not None and len(value) < sequences:
                raise ValueError(
                    f"{caller.argument} must be an iterator with one λ per sequence: it ended, got {len(value)} for "
                    f"{sequences} sequences"
                )
        if isinstance(value, str) and value != AUTO:
            value = _preset(value, caller, presets)
        for_all = isinstance(value, str) or callable(value)  # "auto", or a schedule
        if for_all:
            value = [value] * (sequences or 1)
        auto: list[int] = []
        schedules: dict[int, tuple[Schedule, list[int]]] = {}
        if isinstance(value, Sequence) and not isinstance(value, BYTES):
            entries = list(value)
            for place, each in enumerate(value):
                if callable(each):
                    caller.check("schedule")
                    schedules.setdefault(id(each), (each, []))[1].append(place)
                    entries[place] = 0.0
                elif isinstance(each, str) and each == AUTO:
                    caller.check("auto")
                    auto.append(place)
                    entries[place] = 0.0
                elif isinstance(each, str):
                    entries[place] = _preset(each, caller, presets)
            value = entries
        of_pipelines = (
            f"; a pipeline takes an iterator, {caller.argument}=iter([…])" if "iterator" in caller.takes else ""
        )
        numbers = _checked(value, caller.argument, sequences, f"; {caller.name} takes {caller.wanted}", of_pipelines)
        if numbers.dim() and not for_all and "numbers" not in caller.takes:
            raise ValueError(f"{caller.argument} must be one number, got {len(numbers)}: {caller.name} takes no more")
        return cls(numbers, auto, list(schedules.values()))

    def to(self, device: torch.device) -> Tensor:
        """Returns the numbers as λ: float32 [] or [B]."""
        return self.numbers.to(device, torch.float32)

    def each(self, sequences: int) -> list[float]:
        """Returns the number of every sequence."""
        return self.numbers.expand(sequences).tolist()

    @property
    def one(self) -> float:
        """The only number, rounded to float32."""
        return self.to(torch.device("cpu")).item() + 0.0  # −0 is 0


def as_lam(numbers: Any, device: torch.device, sequences: int | None = None, name: str = "intensity") -> Tensor:
    """Checks numbers that have not been parsed, such as a schedule's, and returns them as float32 [] or [B].

    Args:
        numbers: a real number or one per sequence, as for `Intensity.parse`.
        device: device of the result.
        sequences: B, if known.
        name: name of the argument, for error messages.

    Raises:
        TypeError: `numbers` is anything else, such as a bool, bytes, a set, a mapping, or an array of another dtype.
        ValueError: it is NaN or infinite, or has more than one dimension or the wrong length.
    """
    return _checked(numbers, name, sequences).to(device, torch.float32)


def one_lam(number: Any, name: str) -> float:
    """Checks one λ and returns it rounded to float32. Raises TypeError or ValueError if it is not exactly one λ."""
    lam = as_lam(number, torch.device("cpu"), name=name)
    if lam.dim():
        raise ValueError(f"{name} must be one number, got {len(lam)}")
    return lam.item() + 0.0  # −0 is 0


def shortest(lams: Tensor) -> list[float]:
    """Returns λ as the shortest decimals that are the same float32: 0.4, not 0.40000000596. Takes float32 [B]."""
    return [shortest_of(lam) for lam in lams.tolist()]


@lru_cache(maxsize=1024)  # a server asks for every token
def shortest_of(lam: float) -> float:
    """Returns one λ as `shortest` does."""
    [single] = torch.tensor([lam], dtype=torch.float32).numpy()
    return float(str(single))


BYTES = (str, bytes, bytearray, memoryview)
INTEGERS = {getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}


def _preset(name: str, caller: Caller, presets: Mapping[str, float] | None) -> float:
    caller.preset(name, presets or {})
    return presets[name]  # type: ignore[index]  # there are some now


def _checked(numbers: Any, name: str, sequences: int | None = None, hint: str = "", hint_of_length: str = "") -> Tensor:
    """Checks numbers and returns the given tensor, else float64 [] or [B] on the CPU.

    `hint` ends a TypeError, `hint_of_length` the ValueError for a wrong number of numbers.
    """
    wanted = f"{name} must be a real number, or one per sequence"
    if not isinstance(numbers, Tensor):
        found = torch.tensor(_floats(numbers, wanted, hint), dtype=torch.float64)
    elif numbers.is_floating_point() or numbers.dtype in INTEGERS:
        found = numbers
    else:
        raise TypeError(f"{wanted}, as a tensor of floats or integers, got {numbers.dtype}{hint}")
    if found.dim() > 1 or found.numel() == 0:
        raise ValueError(f"{wanted}, got shape {list(found.shape)}")
    if sequences is not None and found.dim() == 1 and len(found) != sequences:
        raise ValueError(f"{wanted}, got {len(found)} for {sequences} sequences{hint_of_length}")
    looks = found.device.type == "cpu" and not torch.compiler.is_compiling()  # a GPU would have to be waited for
    if looks and not bool(found.float().isfinite().all()):  # infinite too if too large for float32
        raise ValueError(f"{name} must be finite, got {numbers}")
    return found


def _floats(numbers: Any, wanted: str, hint: str) -> Any:
    """Returns a number as a float, or a sequence or array of numbers as a list. Raises TypeError otherwise."""
    if hasattr(numbers, "__array__") and not isinstance(numbers, Real):
        array = numbers.__array__()
        if array.dtype.kind not in "iuf":
            raise TypeError(f"{wanted}, as an array of floats or integers, got {array.dtype}{hint}")
        return array.tolist()
    if not isinstance(numbers, (Real, Sequence)) or isinstance(numbers, BYTES):
        raise TypeError(f"{wanted}, got {type(numbers).__name__}{hint}")
    several = [numbers] if isinstance(numbers, Real) else numbers
    if not all(isinstance(number, Real) and not isinstance(number, bool) for number in several):
        raise TypeError(f"{wanted}, got {numbers!r}{hint}")
    try:
        return float(numbers) if isinstance(numbers, Real) else [float(number) for number in several]
    except OverflowError:
        raise ValueError(f"{wanted}, within the range of floats, got {numbers}") from None


def _parts(intensities: Mapping[Any, Any]) -> list[tuple[tuple[str, list[int] | None], Any]]:
    """Returns the modules and layers that each key of a mapping names, with the key's intensity."""
    if not intensities:
        raise ValueError("intensity must name a part of the model, got an empty mapping")
    parts = []
    for key, value in intensities.items():
        modules, layers = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        wanted = f"intensity must have keys such as 'mlp' or ('*.q_proj', range(4, 8)), got {key!r}"
        if not isinstance(modules, str):
            raise TypeError(wanted)
        try:
            parts.append(((modules, layer_indices(layers)), value))
        except TypeError as error:
            raise TypeError(f"{wanted}: {error}") from None
    return parts


def layer_indices(layers: Any) -> list[int] | None:
    """Returns one or several layer indices as a list. Raises TypeError for anything else."""
    if layers is None:
        return None
    dimensions: Any = getattr(layers, "ndim", 1)
    several = list(layers) if isinstance(layers, Iterable) and dimensions else [layers]
    try:
        if isinstance(layers, (str, bytes)) or any(isinstance(each, bool) for each in several):
            raise TypeError
        return [index(each) for each in several]
    except TypeError:
        raise TypeError(f"layers must be the index of a layer, or several, got {layers!r}") from None


def module_names(modules: Any) -> list[str]:
    """Returns one or several groups or patterns of modules as a list. Raises TypeError for anything else."""
    names = [modules] if isinstance(modules, str) or not isinstance(modules, Iterable) else list(modules)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"modules must be a group, a pattern of names, or several, got {modules!r}")
    return names
