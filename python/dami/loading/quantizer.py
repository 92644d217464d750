"""Packed pairs for transformers' `from_pretrained`: the quantisation method "dami" of a checkpoint's config.

transformers imports this file while it is being imported itself, so what needs its models is imported in the functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from dami.layers.kinds import kind_on_meta
from dami.saving.config import PairConfig
from dami.sources import METHOD
from dami_kernels import LerpWeight, formats

if TYPE_CHECKING:
    from dami.layers.base import LerpModule
    from dami.patching.compare import Header


@register_quantizer(METHOD)
class PairQuantizer(HfQuantizer):
    """Loads packed pairs: patches the empty model, so that every stored tensor goes straight to its place."""

    quantization_config: PairConfig
    requires_calibration = True  # transformers' word for: it cannot make a pair of the one checkpoint it is given
    is_trainable = False
    is_compileable = True

    @property
    def serialized_names(self) -> dict[str, list[str]]:  # type: ignore[override]  # formats may come later
        return {"": formats.suffixes()}

    def is_serializable(self) -> bool:
        return True

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """What stands beside a parameter is split as the parameter is."""
        super().update_parallel_plan(model, plan)
        if plan and getattr(model.config, "distributed_config", None) is not None:
            from dami.loading.tensor_parallel import use_our_styles

            use_our_styles(model, plan)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Patches the model on the meta device, as the headers of the files say what will come."""
        from dami.layers.base import own_tensors
        from dami.layers.kinds import readers
        from dami.layers.packed import Packed
        from dami.loading.checkpoint import headers_in
        from dami.patching.patch import install

        headers = {name: header for file in checkpoint_files or () for name, header in headers_in(Path(file)).items()}
        kinds = {module: kind_on_meta(module) for module in model.modules()}
        read_by = readers(kinds)
        packed: dict[int, Packed] = {}
        faults = []
        for prefix, module in model.named_modules():
            for local, parameter in own_tensors(module):
                names = _stored_names(model, f"{prefix}.{local}" if prefix else local)
                format = next(filter(None, map(self.quantization_config.format_of, names)), None)
                if format is None or id(parameter) in packed:
                    continue
                suffixes, kind = formats.get(format).TENSORS, read_by[id(parameter)]
                found = [next((headers[n + s] for n in names if n + s in headers), None) for s in suffixes]
                absent = [
                    suffix or "the base" for suffix, header in zip(suffixes, found, strict=True) if header is None
                ]
                if absent:
                    faults.append(f"{names[0]} ({type(module).__name__}): the files lack {', '.join(absent)}")
                    continue
                tensors = [_to_come(h, parameter, s) for s, h in zip(suffixes, found, strict=True) if h]
                operand = kind.as_operand(parameter)
                try:
                    weight = LerpWeight(tuple(map(kind.as_operand, tensors)), format, operand.shape, operand.dtype)
                except ValueError as error:  # of another shape, as the given config has it
                    faults.append(f"{names[0]} ({type(module).__name__}): {error}")
                    continue
                packed[id(parameter)] = Packed.of(weight, kind)
        if faults:
            raise ValueError("\n  ".join(["the packed pair does not fit its model:", *faults]))
        install(model, kinds, packed)
        for module in _patched(model):
            for name in module.placeholders():
                # no parameter until all is loaded: nobody is to look for it in the files, to count or to move it
                module.__dict__[name], module._parameters[name] = module._parameters[name], None
                module.__dict__[name]._is_hf_initialized = True
        for target, source in list(model.all_tied_weights_keys.items()):
            holder, _, local = target.rpartition(".")
            for name in _beside(model.get_submodule(holder), local):
                suffix = name.removeprefix(local)
                model.all_tied_weights_keys[target + suffix] = source + suffix

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """What could not be done on the meta device."""
        from dami.dial.patch import Origin
        from dami.layers.base import LerpModule, placeholder
        from dami.layers.kinds import LerpConv1D, LerpTransposedExperts

        added = set()
        for module in _patched(model):
            for local, stored in module.lerp.stored.items():
                tensors = [module.tensor(name) for name in stored.names]
                added |= {id(module.tensor(name)) for name in _beside(module, local)}
                if isinstance(module, (LerpConv1D, LerpTransposedExperts)):
                    for tensor in tensors:
                        tensor.data = module.as_operand(module.as_operand(tensor.data).contiguous())
                if local not in stored.names:
                    before = module.__dict__.pop(local)
                    like = torch.empty(0, dtype=before.dtype, device=_device_of(module, tensors[0]))
                    shape = _local_shape(before.shape, tensors[0])
                    module._parameters[local] = nn.Parameter(placeholder(like, shape), requires_grad=False)
                    _keep_at_hand(module, local)
        for target, source in model.all_tied_weights_keys.items():  # transformers has tied what is stored
            holder, _, local = target.rpartition(".")
            module = model.get_submodule(holder)
            if isinstance(module, LerpModule) and local in module.placeholders():
                setattr(module, local, model.get_parameter(source))
        patch = model.dami_patch
        patch.trainable = [p for p in model.parameters() if p.is_floating_point() and id(p) not in added]
        patch.dial.lam = torch.zeros((), device=model.device)
        patch.origin = Origin(self.quantization_config.parents, self.quantization_config.error)
        model.requires_grad_(False)


def _device_of(module: nn.Module, tensor: Tensor) -> torch.device:
    """Where a module's tensor is, or is brought to by a hook of accelerate if it is offloaded."""
    return torch.device(module._hf_hook.execution_device) if tensor.is_meta else tensor.device  # type: ignore[union-attr, arg-type]


def _local_shape(shape: torch.Size, stored: Tensor) -> torch.Size:
    """The shape of this process's part of a weight, of which a quantised tensor is `stored`."""
    own = stored.to_local().shape if isinstance(stored, DTensor) else stored.shape
    return torch.Size(n * part // whole for n, part, whole in zip(shape, own, stored.shape, strict=True))


def _keep_at_hand(module: nn.Module, name: str) -> None:
    """Gives a parameter that is in no file to the hooks that bring a module's parameters from there."""
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        weights = getattr(each, "weights_map", None)
        if weights is not None:
            weights.dataset.state_dict[weights.prefix + name] = module.get_parameter(name)


def _stored_names(model: Any, name: str) -> tuple[str, ...]:
    """The names under which a parameter may be stored: its own, with or without the base's prefix, and its ties'."""
    prefix, ties = f"{model.base_model_prefix}.", model.all_tied_weights_keys
    source = ties.get(name, name)
    targets = (target for target, other in ties.items() if other == source)
    return name, source, *targets, prefix + name, name.removeprefix(prefix)


def _to_come(header: Header, parameter: Tensor, suffix: str) -> Tensor:
    """An empty tensor as a stored one will be once it is loaded, on the device of the empty parameter it belongs to.

    That is meta, or the CPU where a model makes a parameter by a function that does not heed the default device.
    """
    shape, stored = header
    dtype = parameter.dtype
    if suffix.endswith("_scale") or not getattr(torch, stored).is_floating_point:
        dtype = getattr(torch, stored)
    return torch.empty(shape, dtype=dtype, device=parameter.device)


def _patched(model: nn.Module) -> list[LerpModule]:
    from dami.layers.base import LerpModule

    return [module for module in model.modules() if isinstance(module, LerpModule)]


def _beside(module: nn.Module, name: str) -> list[str]:
    """Names of what is stored beside a parameter of a module."""
    from dami.layers.base import LerpModule

    stored = module.lerp.stored.get(name) if isinstance(module, LerpModule) else None
    return [tensor for tensor in stored.names if tensor != name] if stored else []
