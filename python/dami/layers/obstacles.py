"""Finds tensors of a model that cannot be interpolated, such as those read where no λ reaches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dami.layers.base import LerpModule, own_tensors
from dami.upstream import FLAT_WEIGHTS, OF_MODULES, hooks_of, pruned_name
from dami_kernels.weight import FLOAT_DTYPES

COUNTING = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)  # norms that count batches


def obstacles(model: nn.Module) -> dict[str, str]:
    """Maps the names of tensors in a model's state that cannot be interpolated to the reason, as a line of an error."""
    past, lines = _read_elsewhere(model), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        holder, _, local = name.rpartition(".")
        owner = model.get_submodule(holder)
        if isinstance(owner, torch.jit.ScriptModule):
            reason: str | None = "of a TorchScript module"
        elif tensor.dtype not in FLOAT_DTYPES:
            reason = f"as {str(tensor.dtype).removeprefix('torch.')}"
        elif local == "lerp" or (hasattr(LerpModule, local) and not hasattr(nn.Module, local)):
            reason = "a name that patched modules have taken"
        else:
            reason = past.get(id(tensor))
        if reason is not None:
            lines[name] = f"{holder or 'the model'} ({type(owner).__name__}): {local}, {reason}"
    return lines


def unread(model: nn.Module) -> set[str]:
    """Returns the names of tensors that only training reads: the number of batches that a norm has seen."""
    named = [(f"{name}." if name else "", m) for name, m in model.named_modules() if isinstance(m, COUNTING)]
    return {f"{prefix}num_batches_tracked" for prefix, _ in named}


def _read_elsewhere(model: nn.Module) -> dict[int, str]:
    """Maps the ids of tensors that are read past their modules' attributes, so not at λ, to how they are read."""
    found: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name in OF_MODULES:
                continue
            if isinstance(module, nn.RNNBase) and name == FLAT_WEIGHTS:
                continue  # rebuilt from the attributes in each forward pass
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            found |= {id(each): f"which {prefix}.{name} holds too" for each in held if isinstance(each, Tensor)}
        for hook in hooks_of(module)[1].values():
            if isinstance(hook, (BasePruningMethod, WeightNorm, SpectralNorm)):
                computed = pruned_name(hook) if isinstance(hook, BasePruningMethod) else hook.name
                remedy = f"from which {type(hook).__name__} computes {computed}: remove that in both models first"
                found |= {id(t): remedy for name, t in own_tensors(module) if name.startswith(f"{computed}_")}
    return found
