"""What an intensity means: numbers, sequences and tensors become λ; mappings become parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from operator import index
from typing import Any

import torch
from torch import Tensor

Intensity = float | str | Sequence[float | str] | Tensor  # a string is the name of a preset, or "auto"


Part = str | tuple[str, int | Iterable[int]]  # a group or pattern of modules, in all layers or in some


def as_lam(intensity: Any, device: torch.device, sequences: int | None = None, name: str = "intensity") -> Tensor:
    """The float32 tensor [] or [B] that a public `intensity` means.

    Args:
        intensity: a real number, or one per sequence: a list, a tuple, another sequence of numbers, an array of NumPy's
            or a tensor, [] or [B], of floats or integers. Gradients flow through a tensor.
        device: where the result is wanted.
        sequences: B, if known.
        name: of the argument, for errors.

    Raises:
        TypeError: anything else, such as a bool, bytes, a set, a mapping, or an array of another dtype.
        ValueError: NaN or infinite, of more than one dimension, or of the wrong length.
    """
    wanted = f"{name} must be {NUMBERS}"
    if isinstance(intensity, Tensor):
        if not intensity.is_floating_point() and intensity.dtype not in INTEGERS:
            raise TypeError(f"{wanted}, as a tensor of floats or integers, got {intensity.dtype}")
        lam = intensity.to(device, torch.float32)
    else:
        lam = torch.tensor(_floats(intensity, name), dtype=torch.float64).float().to(device)  # too large is infinite
    if lam.dim() > 1 or lam.numel() == 0:
        raise ValueError(f"{wanted}, got shape {list(lam.shape)}")
    if sequences is not None and lam.dim() == 1 and len(lam) != sequences:
        raise ValueError(f"{wanted}, got {len(lam)} for {sequences} sequences")
    if not torch.compiler.is_compiling() and not bool(lam.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {intensity}")
    return lam


NUMBERS = "a real number, or one per sequence"


INTEGERS = {getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}


def _floats(intensity: Any, name: str) -> Any:
    """A number as a float, a sequence or an array of numbers as a list; TypeError if it is none of these."""
    wanted = f"{name} must be {NUMBERS}"
    if hasattr(intensity, "__array__") and not isinstance(intensity, Real):
        array = intensity.__array__()
        if array.dtype.kind not in "iuf":
            raise TypeError(f"{wanted}, as an array of floats or integers, got {array.dtype}")
        return array.tolist()
    if not isinstance(intensity, (Real, Sequence)) or isinstance(intensity, (str, bytes, bytearray, memoryview)):
        elsewhere = name == "intensity" and (callable(intensity) or intensity == "auto")
        hint = "; schedules and 'auto' are for generate" if elsewhere else ""
        raise TypeError(f"{wanted}, got {type(intensity).__name__}{hint}")
    numbers = [intensity] if isinstance(intensity, Real) else intensity
    if not all(isinstance(number, Real) and not isinstance(number, bool) for number in numbers):
        raise TypeError(f"{wanted}, got {intensity!r}")
    try:
        return float(intensity) if isinstance(intensity, Real) else [float(number) for number in numbers]
    except OverflowError:
        raise ValueError(f"{wanted}, within the range of floats, got {intensity}") from None


def one_lam(intensity: Any, name: str = "intensity") -> float:
    """The one λ that an `intensity` means, as float32 holds it; TypeError or ValueError if it means none or several."""
    lam = as_lam(intensity, torch.device("cpu"), name=name)
    if lam.dim():
        raise ValueError(f"{name} must be one number, got {len(lam)}")
    return lam.item() + 0.0  # −0 is 0


def parts_of(intensities: Mapping[Any, Any]) -> list[tuple[str, list[int] | None, Any]]:
    """The modules, the layers and the intensity of every part in a mapping, as `intensity` takes it."""
    if not intensities:
        raise ValueError("intensity must name a part of the model, got an empty mapping")
    parts = []
    for key, value in intensities.items():
        modules, layers = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        wanted = f"intensity must have keys such as 'mlp' or ('*.q_proj', range(4, 8)), got {key!r}"
        if not isinstance(modules, str):
            raise TypeError(wanted)
        try:
            parts.append((modules, layer_indices(layers), value))
        except TypeError as error:
            raise TypeError(f"{wanted}: {error}") from None
    return parts


def layer_indices(layers: Any) -> list[int] | None:
    """Indices of layers, of which `intensity` takes one or several; TypeError if they are none."""
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
    """Groups and patterns of modules, of which `intensity` takes one or several; TypeError if they are none."""
    names = [modules] if isinstance(modules, str) or not isinstance(modules, Iterable) else list(modules)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"modules must be a group, a pattern of names, or several, got {modules!r}")
    return names
