"""Sets the λ that a patched model's modules read: `intensity`, `set_intensity` and what they share."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from dami.callers import CALLERS
from dami.dial.patch import Patch, device_of, patch_of
from dami.dial.state import MODULE_GROUPS, Dial, PatchedModule, layer_of
from dami.dial.values import AnyIntensity, Intensity, layer_indices, module_names

Modules = str | Iterable[str] | None  # groups and patterns of names
Layers = int | Iterable[int] | None  # indices


@contextmanager
def intensity(
    model: nn.Module,
    intensity: AnyIntensity,
    layers: Layers = None,
    modules: Modules = None,
) -> Iterator[None]:
    """Sets λ of a patched model, or of a part of it, for the duration of a `with` block.

    Inside the block, a part keeps its λ even if `generate(intensity=…)` or an inner block sets another for the whole
    model. If two blocks name the same module, the inner one wins. A copy made inside the block is not affected by it.

    Args:
        model: a patched model.
        intensity: a finite real number, or one per sequence of the batches run inside the block. 0 is the instruct end,
            1 the thinking end, and any other real number lies on the line through both; a preset's name stands for its
            number. Or a mapping from parts of the model to these, such as
            {"*": 0.2, "mlp": 0.5, ("mlp", range(4, 8)): [0.1, 0.9]}; if two keys name the same module, the later wins.
        layers: the index of a layer, or several. None selects all layers and the modules outside the layers.
        modules: which modules in these layers: "attn", "mlp", "experts", "norm", "embed", "head", "other", or patterns
            of qualified module names such as "*.q_proj"; one or several, each of which must match a module
            there. None selects all.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, what it got and what it takes. The model
            is unchanged.
        RuntimeError: another thread runs the model, or is inside such a block.
    """
    patch = patch_of(model)
    wanted = Intensity.parse(intensity, CALLERS["dami.intensity"], patch.presets)
    if wanted.parts and (layers is not None or modules is not None):
        raise ValueError("layers and modules are for one intensity: name them in the mapping's keys")
    with nullcontext() if torch.compiler.is_compiling() else patch.hold, turned(model, wanted, modules, layers):
        yield


def set_intensity(model: nn.Module, intensity: AnyIntensity) -> None:
    """Sets λ of a patched model until the next call.

    A `with dami.intensity(…)` block and the `intensity` of a call override this λ without changing it. A copy keeps it;
    a twin, a saved pair and an unpatched model do not. (λ is not an attribute to assign to, because a wrapper of the
    model, such as PEFT's, would keep the attribute for itself.)

    Args:
        model: a patched model.
        intensity: a number or a preset, or one of these per sequence of the batches to come; or a mapping from parts of
            the model to these, as in `dami.intensity`, where "*" is the whole model. A part keeps its λ even if a call
            sets another for the whole model. Parts set by an earlier call and not named in this one follow the whole
            model again.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, what it got and what it takes. The model
            is unchanged.
        RuntimeError: inside a `with dami.intensity(…)` block or a `generate`, or while another thread runs the model.
    """
    patch, device = patch_of(model), device_of(model)
    wanted = Intensity.parse(intensity, CALLERS["dami.set_intensity"], patch.presets)
    whole, apart = patch.dial.lam, list[tuple[list[PatchedModule], Dial]]()
    for names, layers, part in wanted.parts or [("*", None, wanted)]:
        if names == "*" and layers is None:
            whole, apart = part.to(device), []
        else:
            apart.append((_chosen(model, layers, names), Dial(part.to(device))))
    with patch.hold:
        if patch.dial.rest is not None or len(patch.parts) > len(patch.resting):
            raise RuntimeError(
                "set_intensity sets λ for good: call it outside of `with dami.intensity(…)` blocks and of generate"
            )
        for module in model.modules():
            if isinstance(module, PatchedModule):
                module.lerp.part = module.lerp.resting = None
        for modules, dial in apart:
            for module in modules:
                module.lerp.part = module.lerp.resting = dial
        patch.dial.lam, patch.resting = whole, [dial for _, dial in apart]
        patch.parts = [*patch.resting]


@contextmanager
def turned(
    model: nn.Module,
    wanted: Intensity,
    modules: Modules = None,
    layers: Layers = None,
) -> Iterator[None]:
    """Sets a patched model, or a part of it, to a parsed intensity for the duration of a `with` block."""
    device = device_of(model)
    with ExitStack() as stack:
        whole: Sequence[tuple[Modules, Layers, Intensity]] = [(modules, layers, wanted)]
        for names, indices, part in wanted.parts or whole:
            stack.enter_context(separate(model, names, indices)).lam = part.to(device)
        yield


@contextmanager
def separate(model: nn.Module, modules: Modules = None, layers: Layers = None) -> Iterator[Dial]:
    """Gives a part of a patched model a dial of its own for the duration of a `with` block, and yields it.

    You can turn the dial inside the block; afterwards everything is as it was. For the whole model, yields the patch's
    own dial.
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


def check_rows(patch: Patch, lam: Tensor, rows: int | None) -> None:
    """Raises ValueError if λ of the whole model or of a part does not hold one number per row of a forward pass.

    Only `generate` may run a multiple of that many rows: adjacent copies of each sequence.

    Args:
        patch: the model's patch.
        lam: float32, [] or [B], the λ for the whole model.
        rows: number of rows in the batch, None if unknown.
    """
    for each in (lam, *(part.lam for part in patch.parts)):
        if rows is None or each.dim() == 0:
            continue
        if rows != len(each) and (patch.program is None or rows % len(each) != 0):
            raise ValueError(f"intensity must hold one number per sequence, got {len(each)} for {rows} sequences")


def _chosen(model: nn.Module, layers: Layers, modules: Modules) -> list[PatchedModule]:
    """Returns the patched modules that `layers` and `modules` of `intensity` select.

    Every layer must exist in the model, with or without interpolated modules; every name in `modules` must match.
    """
    indices = layer_indices(layers)
    names = ["*"] if modules is None else module_names(modules)
    patched = {name: module for name, module in model.named_modules() if isinstance(module, PatchedModule)}
    inside = {name: m for name, m in patched.items() if indices is None or m.lerp.layer in indices}
    found = {
        pattern: [
            module
            for name, module in inside.items()
            if (module.lerp.group == pattern if pattern in MODULE_GROUPS else fnmatch.fnmatchcase(name, pattern))
        ]
        for pattern in names
    }
    unknown = set(indices or ()) - {layer_of(name) for name, _ in model.named_modules()}
    strangers: Sequence[int | str] = sorted(unknown) or [pattern for pattern in found if not found[pattern]]
    if strangers or not names:
        raise ValueError(
            f"layers={layers} and modules={modules!r} name no interpolated module by {strangers}; there are layers "
            f"{sorted({m.lerp.layer for m in patched.values() if m.lerp.layer is not None})} "
            f"and modules {sorted({m.lerp.group for m in patched.values()})}, or patterns such as '*.q_proj'"
        )
    return list(dict.fromkeys(module for several in found.values() for module in several))
