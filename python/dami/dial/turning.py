"""`Dial`: the λ that a patched model's modules read, and the ways to turn it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dami.dial.choosing import named
from dami.dial.patch import device_of, patch_of
from dami.dial.state import GROUPS, Dial, PatchedModule, layer_of
from dami.dial.values import Intensity, Part, as_lam, layer_indices, module_names, parts_of


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
) -> list[PatchedModule]:
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
