"""`Dial`: the λ that a patched model's modules read, and the ways to turn it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Real
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dami.sources import check_preset

if TYPE_CHECKING:
    from dami.layers import LerpModule

Intensity = float | str | Sequence[float | str] | Tensor  # a string is the name of a preset, or "auto"
Part = str | tuple[str, int | Iterable[int]]  # a group or pattern of modules, in all layers or in some

GROUPS = ("attn", "embed", "experts", "head", "mlp", "norm", "other")


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


def named(model: nn.Module, intensity: Any) -> Any:
    """An intensity with the model's presets, such as "low", in place of their names; "auto" and all else are left.

    Raises:
        TypeError: the model is not patched.
        ValueError: it has no preset of that name.
    """
    if isinstance(intensity, (list, tuple)):
        return [named(model, each) if isinstance(each, str) else each for each in intensity]
    if not isinstance(intensity, str) or intensity == "auto":
        return intensity
    presets = patch_of(model).presets
    check_preset(intensity, presets)
    return presets[intensity]


@contextmanager
def intensity(
    model: nn.Module,
    intensity: Intensity | Mapping[Part, Intensity],
    layers: int | Iterable[int] | None = None,
    modules: str | Iterable[str] | None = None,
) -> Iterator[None]:
    """Sets λ of a patched model, or of a part of it, for the time of a `with` block.

    A part keeps its λ inside the block whatever `generate(intensity=…)` or an inner block for the whole model says;
    of two blocks that name one module the inner one holds. A copy of the model that is made inside is outside.

    Args:
        model: a patched model.
        intensity: a finite real number, or one per sequence of the batches run inside the block. 0 is the instruct end,
            1 the thinking end, and any other real number lies on the line through both; a preset's name stands for its
            number. Or a mapping of parts of the model to these, such as
            {"*": 0.2, "mlp": 0.5, ("mlp", range(4, 8)): [0.1, 0.9]}; of two that name one module the later holds.
        layers: the index of the layer meant, or several; all, and what lies outside the layers too, if None.
        modules: what is meant in them: "attn", "mlp", "experts", "norm", "embed", "head", "other", or patterns of
            qualified module names such as "*.q_proj"; one or several, each of which must name something there. All if
            None.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted. The model is left as it was.
        RuntimeError: another thread runs the model, or is inside such a block.
    """
    device = device_of(model)
    parts: list[tuple[Any, Any, Any]] = [(modules, layers, intensity)]
    if isinstance(intensity, Mapping):
        if layers is not None or modules is not None:
            raise ValueError("layers and modules are for one intensity: name them in the mapping's keys")
        parts = parts_of(intensity)
    with ExitStack() as stack:
        if not torch.compiler.is_compiling():
            stack.enter_context(patch_of(model).hold)
        for names, indices, value in parts:
            lam = as_lam(named(model, value), device)
            stack.enter_context(separate(model, names, indices)).lam = lam
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where a patched model's λ is wanted."""
    return getattr(model, "device", patch_of(model).dial.lam.device)


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
            parts.append((modules, _indices(layers), value))
        except TypeError as error:
            raise TypeError(f"{wanted}: {error}") from None
    return parts


@contextmanager
def separate(
    model: nn.Module, modules: str | Iterable[str] | None = None, layers: int | Iterable[int] | None = None
) -> Iterator[Dial]:
    """The dial of a part of a patched model, which no other module reads for the time of a `with` block.

    It can be turned inside, and stands where it stood afterwards. The whole model's dial is the patch's own.
    """
    patch = patch_of(model)
    if layers is None and modules is None:
        with patch.dial.turned(patch.dial.lam):
            yield patch.dial
        return
    part = Dial(patch.dial.lam)
    with ExitStack() as stack:
        for module in _chosen(model, layers, modules):
            stack.callback(setattr, module.lerp, "part", module.lerp.part)
            module.lerp.part = part
        stack.callback(patch.parts.remove, part)
        patch.parts.append(part)
        yield part


def check_rows(patch: Any, lam: Tensor, rows: int | None) -> None:
    """Refuses λ, of the whole model and of its parts, that are not one for each row of a forward pass: ValueError.

    Only `generate` may run more: copies of each sequence, which are neighbours.

    Args:
        patch: of the model.
        lam: float32, [] or [B], what the whole model is to run at.
        rows: of the batch, None if not known.
    """
    for each in (lam, *(part.lam for part in patch.parts)):
        if rows is None or each.dim() == 0:
            continue
        if rows != len(each) and (patch.course is None or rows % len(each) != 0):
            raise ValueError(f"intensity must hold one number per sequence, got {len(each)} for {rows} sequences")


def _chosen(
    model: nn.Module, layers: int | Iterable[int] | None, modules: str | Iterable[str] | None
) -> list[LerpModule]:
    """The patched modules that `intensity`'s `layers` and `modules` name: each layer is one of the model's, of which
    nothing may be interpolated, and each name of `modules` says something."""
    from dami.layers import LerpModule

    indices = _indices(layers)
    names = ["*"] if modules is None else _names(modules)
    patched = {name: module for name, module in model.named_modules() if isinstance(module, LerpModule)}
    inside = {name: m for name, m in patched.items() if indices is None or m.lerp.layer in indices}
    found = {
        pattern: [
            module
            for name, module in inside.items()
            if (module.lerp.group == pattern if pattern in GROUPS else fnmatch.fnmatchcase(name, pattern))
        ]
        for pattern in names
    }
    unknown = set(indices or ()) - {layer_of(name) for name, _ in model.named_modules()}
    strangers: list[Any] = sorted(unknown) or [pattern for pattern in found if not found[pattern]]
    if strangers or not names:
        raise ValueError(
            f"layers={layers} and modules={modules!r} name no interpolated module by {strangers}; there are layers "
            f"{sorted({m.lerp.layer for m in patched.values() if m.lerp.layer is not None})} "
            f"and modules {sorted({m.lerp.group for m in patched.values()})}, or patterns such as '*.q_proj'"
        )
    return list(dict.fromkeys(module for several in found.values() for module in several))


def _indices(layers: Any) -> list[int] | None:
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


def _names(modules: Any) -> list[str]:
    """Groups and patterns of modules, of which `intensity` takes one or several; TypeError if they are none."""
    names = [modules] if isinstance(modules, str) or not isinstance(modules, Iterable) else list(modules)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"modules must be a group, a pattern of names, or several, got {modules!r}")
    return names


def layer_of(name: str) -> int | None:
    """Index of the layer that a module of this qualified name is in, None outside the layers."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None


def patch_of(model: nn.Module) -> Any:
    """What `patch_model` keeps on a model; TypeError if it is not patched."""
    patch = getattr(model, "dami_patch", None)
    if patch is None:
        raise TypeError(f"model must be patched by dami.patch_model or dami.load_pair, got {type(model).__name__}")
    return patch
