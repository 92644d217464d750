"""`Dial`: the λ that a patched model's modules read, and the ways to turn it."""

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
    patch = patch_of(model)
    wanted = Intensity.parse(intensity, CALLERS["dami.intensity"], patch.presets)
    if wanted.parts and (layers is not None or modules is not None):
        raise ValueError("layers and modules are for one intensity: name them in the mapping's keys")
    with nullcontext() if torch.compiler.is_compiling() else patch.hold, turned(model, wanted, modules, layers):
        yield


def set_intensity(model: nn.Module, intensity: AnyIntensity) -> None:
    """Sets λ of a patched model, until it is set anew.

    A `with dami.intensity(…)` block and the `intensity` of a call come before it, and leave it as it was. A copy and a
    twin keep it; a saved pair and an unpatched model do not. (It is no attribute to assign to: a wrapper of the model,
    such as PEFT's, would keep that to itself.)

    Args:
        model: a patched model.
        intensity: a number or a preset, or one of these per sequence of the batches to come; or a mapping of parts of
            the model to these, as `dami.intensity` takes it, where "*" is the whole model. A part keeps its λ whatever
            a call says of the whole model. What an earlier call has set apart and this one does not name follows the
            whole model again.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted. The model is left as it was.
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
    """A patched model, or a part of it, at an intensity for the time of a `with` block."""
    device = device_of(model)
    with ExitStack() as stack:
        whole: Sequence[tuple[Modules, Layers, Intensity]] = [(modules, layers, wanted)]
        for names, indices, part in wanted.parts or whole:
            stack.enter_context(separate(model, names, indices)).lam = part.to(device)
        yield


@contextmanager
def separate(model: nn.Module, modules: Modules = None, layers: Layers = None) -> Iterator[Dial]:
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


def check_rows(patch: Patch, lam: Tensor, rows: int | None) -> None:
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
        if rows != len(each) and (patch.program is None or rows % len(each) != 0):
            raise ValueError(f"intensity must hold one number per sequence, got {len(each)} for {rows} sequences")


def _chosen(model: nn.Module, layers: Layers, modules: Modules) -> list[PatchedModule]:
    """The patched modules that `intensity`'s `layers` and `modules` name: each layer is one of the model's, of which
    nothing may be interpolated, and each name of `modules` says something."""
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
