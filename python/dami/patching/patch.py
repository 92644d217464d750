"""Patching: turns two models into one that runs every sequence at its own λ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dami.dial.patch import Patch, patch_of
from dami.dial.state import Dial, ModuleState, layer_of
from dami.keywords import meant
from dami.layers.base import LerpModule, own_tensors
from dami.layers.classes import reclass
from dami.layers.kinds import LerpConv1D, LerpExperts, LerpLinear, LerpRouted, kinds_of, readers, stored_format
from dami.layers.obstacles import obstacles, unread
from dami.layers.packed import LowRank, Packed, adapted, patch_module
from dami.layers.peft import refuse_adapters
from dami.patching.compare import config_mismatches, first_names, headers_of, tensor_mismatches
from dami.patching.model import PairModel, patched_model_class
from dami.patching.ties import TIES, head_name, tie, untie
from dami.sources import QUANT_METHOD
from dami_kernels import LerpWeight, formats


def patch_model(
    instruct_model: PreTrainedModel, thinking_model: PreTrainedModel, format: str = "pair", *, invariant: bool = False
) -> PairModel:
    """Patches `instruct_model` in place so that each sequence of a batch runs at its own λ, and returns it.

    Every parameter that differs between the two is interpolated, W(λ) = W_instruct + λ (W_thinking − W_instruct).
    Identical parameters stay as they are and add no cost. `format="pair"` shares memory with `thinking_model` if dtype
    and device agree (except for GPT-2's Conv1D, whose weights are stored transposed). All parameters are frozen while
    the model is patched. λ is 0 until you set an intensity. If only one end ties its head to its embedding, the head
    gets a weight of its own until the model is unpatched. For the tied end, this weight is a copy of its embedding.

    Args:
        instruct_model: a causal language model, λ=0.
        thinking_model: another of the same architecture, λ=1. It is not modified, and may be deleted afterwards.
        format: how embeddings and linear weights are stored, a name of `dami_kernels.formats.names()`.
        invariant: makes a linear layer's result for a row bitwise independent of the other rows, their λ and their
            number, at some cost in speed. Whether this holds for the whole model also depends on its attention.

    Raises:
        TypeError: an argument is not a transformers model, or is already patched.
        ValueError: the ends do not match, or parameters that differ cannot be interpolated. The message lists them all,
            and the model is left unchanged.
    """
    for name, model in (("instruct_model", instruct_model), ("thinking_model", thinking_model)):
        if not isinstance(model, PreTrainedModel):
            remedy = ": merge its adapter, merge_and_unload()" if hasattr(model, "merge_and_unload") else ""
            raise TypeError(f"{name} must be a transformers model, got {type(model).__name__}{remedy}")
        if hasattr(model, "dami_patch"):
            raise TypeError(f"{name} must not be patched already: call dami.unpatch_model first")
        refuse_adapters(model, "patch_model", f"merge it into {name}, or put it on the patched model")
        _refuse_offloaded(name, model.state_dict())
    if instruct_model is thinking_model:
        raise ValueError("thinking_model must be another model than instruct_model, got the same one twice")
    mismatches, head_differs = _mismatches(instruct_model, thinking_model)
    if mismatches:
        raise ValueError("\n  ".join(["instruct_model and thinking_model do not match:", *mismatches]))
    shared = untie(instruct_model) if head_differs else None
    try:
        ends = _own_tensors(instruct_model, thinking_model)
        model = interpolate(instruct_model, ends, format, invariant=invariant)
    except BaseException:
        if shared is not None:
            tie(instruct_model, shared)
        raise
    model.dami_patch.shared = shared
    if head_name(model) is not None and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        setattr(model.config.get_text_config(), TIES, False)  # a checkpoint's own head may have overruled its config
    return model


def _refuse_offloaded(name: str, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError if tensors of a model, given by its argument's name and its state, are on no device."""
    offloaded = [each for each, tensor in state.items() if tensor.device.type == "meta"]
    if offloaded:
        raise ValueError(
            f"{name} must be on devices, not offloaded, got {len(offloaded)} tensors on meta: pack the pair, "
            "dami pack INSTRUCT THINKING -o DIRECTORY, and load what can be offloaded, dami.load_pair(DIRECTORY, …)"
        )


def _mismatches(instruct: PreTrainedModel, thinking: PreTrainedModel) -> tuple[list[str], bool]:
    """Returns a line for each mismatch of two models, and whether only the instruct end ties its head."""
    # tensors, not configs, show whether the heads differ
    lines = [
        line for line in config_mismatches(instruct.config, thinking.config) if not line.startswith(f"config.{TIES}:")
    ]
    if type(instruct) is not type(thinking):  # comparing tensors would be pointless
        return [*lines, f"class: {type(instruct).__name__} and {type(thinking).__name__}"], False
    lines += tensor_mismatches(headers_of(instruct), headers_of(thinking))
    if lines:
        return lines, False
    state = thinking.state_dict()
    untied = {
        name: f"{name}: tied to {first} in the instruct end only"
        for name, first in first_names(instruct).items()
        if name != first and not torch.equal(state[name], state[first])
    }
    return [line for name, line in untied.items() if name != head_name(instruct)], head_name(instruct) in untied


def _own_tensors(instruct: PreTrainedModel, thinking: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yields the thinking end's tensors under the instruct end's names, each once.

    A tensor that is tied in the thinking end only is copied, because transformers saves shared tensors once.
    """
    state, own = thinking.state_dict(), {name for name, first in first_names(thinking).items() if name == first}
    for name, first in first_names(instruct).items():
        if name == first:
            yield name, state[name] if name in own else state[name].clone()


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Removes the patch in place and returns the model, with the same modules and parameters as before patching.

    One exception: `w8d4` does not keep the original base, so the weights are then the quantised ones used at λ=0.

    Raises:
        TypeError: the model is not patched, or wraps one that is, as PEFT's and `torch.compile`'s models do.
    """
    patch: Patch = patch_of(model)
    if "dami_patch" not in vars(model):
        raise TypeError(f"model must be the patched model itself, got {type(model).__name__}, which wraps it")
    for module in model.modules():
        if isinstance(module, LerpModule):
            lerp = module.lerp
            for name, stored in lerp.stored.items():
                parameter = module.tensor(name)
                if name not in stored.names:
                    parameter.data = module.as_operand(module.ends(name).unpack()[0].to(parameter.dtype))
                parameter.data = parameter.data.contiguous()
                for added in module.beside(name):
                    delattr(module, added)
            del module.lerp
            reclass(module, lerp.original)
    for parameter in patch.trainable:
        parameter.requires_grad_(True)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == QUANT_METHOD:
        quantizer.remove_quantization_config(model)
    for hook in patch.hooks:
        hook.remove()
    if patch.shared is not None:
        tie(model, patch.shared)
    del model.dami_patch
    reclass(model, patch.original)
    return model


def interpolate(
    model: PreTrainedModel,
    thinking: Iterable[tuple[str, Tensor | LowRank]],
    format: str,
    *,
    invariant: bool = False,
    owned: bool = False,
) -> PairModel:
    """Patches `model` with the other end's tensors, one at a time. The caller has checked names and shapes.

    Args:
        model: the instruct end.
        thinking: names and tensors of the thinking end. Tensors identical to the model's own are dropped immediately.
        format, invariant: as in `patch_model`.
        owned: whether the tensors come from files and the model may be discarded on failure. If so, a target that is
            stored unchanged is copied, and a base that the format replaces is freed immediately.
    """
    formats.get(format)
    state = model.state_dict(keep_vars=True)
    _refuse_offloaded("instruct_model", state)
    kinds = kinds_of(model)
    read_by, lines, idle = readers(kinds), obstacles(model), unread(model)
    packed: dict[int, Packed] = {}  # by the id of the base
    refused = []
    for name, tensor in thinking:
        base = state[name]
        if isinstance(tensor, Tensor):
            target = tensor.detach().to(base.device, base.dtype)
            if torch.equal(base, target):
                continue
        if name in idle:
            continue
        if name in lines:
            refused.append(lines[name])
        else:
            reader = read_by[id(base)]
            chosen = stored_format(format, reader, name, base)
            other = tensor if isinstance(tensor, LowRank) else target
            if owned and chosen == "pair" and isinstance(other, Tensor):
                other = other.clone()  # not a view of a file that may change
            weight = _pack(base, other, reader, chosen)
            packed[id(base)] = Packed.of(weight, reader)
            if owned:
                base.requires_grad_(False).data = packed[id(base)].base
    if refused:
        raise ValueError(
            "\n  ".join(["these tensors differ between the ends and cannot be interpolated:", *sorted(refused)])
        )
    return install(model, kinds, packed, invariant)


def _pack(base: Tensor, other: Tensor | LowRank, reader: type[LerpModule], format: str) -> LerpWeight:
    """Packs both ends of a parameter in the layout of the module that reads it."""
    operand = reader.as_operand(base.detach()).contiguous()
    if isinstance(other, LowRank):
        return adapted(operand, other, format)
    return LerpWeight.pack(operand, reader.as_operand(other).contiguous(), format)


def install(
    model: PreTrainedModel,
    kinds: Mapping[nn.Module, tuple[type[LerpModule], dict[str, Any]]],
    packed: Mapping[int, Packed],
    invariant: bool = False,
) -> PairModel:
    """Changes the class of `model` and of every module that has a parameter in `packed`, which is keyed by id."""
    original: Any = type(model)
    # λ needs a value even while the model is on meta during loading, because reading a parameter uses it
    where = "cpu" if model.device.type == "meta" else model.device
    dial = Dial(torch.zeros((), dtype=torch.float32, device=where))
    patch = Patch(dial, original, [p for p in model.parameters() if p.requires_grad])
    pair: PairModel = reclass(model, cast(Any, patched_model_class(original)))
    pair.dami_patch = patch
    pair.requires_grad_(False)
    running = patch.running
    running.invariant = invariant
    for name, module in list(model.named_modules()):
        differing = {local: packed[id(base)] for local, base in own_tensors(module) if id(base) in packed}
        kind, settings = kinds[module]
        if differing or (kind is LerpRouted and any(id(tensor) in packed for tensor in module.parameters())):
            if invariant and issubclass(kind, (LerpLinear, LerpConv1D, LerpExperts)):
                settings = {**settings, "invariant": True}
            before = patch.original if module is model else type(module)
            place = place_of(model, name, module, kind)
            state = ModuleState(dial, before, settings, *place, name=name, running=running)
            patch_module(module, kind, state, differing)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        patch.hooks.append(head.register_forward_pre_hook(_contiguous))
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel) and inner is not model:
            patch.hooks.append(inner.register_forward_pre_hook(_refuse_intensity, with_kwargs=True))
    return pair


def _refuse_intensity(inner: nn.Module, _: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Raises a TypeError for λ given to a model inside the pair, which would swallow it."""
    for name in keywords:
        if meant(name):
            raise TypeError(
                f"a {type(inner).__name__} inside a pair takes no λ, got {name!r}: call the pair itself, or call this "
                "within dami.intensity(pair, …)"
            )


def _contiguous(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Makes the input of a plain head contiguous.

    The last states of a batch of prompts are a slice. For it, `F.linear` computes one product per row and copies the
    weight for each: gigabytes and seconds for a vocabulary of 50,000 and 100 rows.
    """
    return inputs[0].contiguous(), *inputs[1:]


def place_of(model: PreTrainedModel, name: str, module: nn.Module, kind: type[LerpModule]) -> tuple[int | None, str]:
    """Returns the index of a module's layer (None outside the layers) and its group, one of `dial.MODULE_GROUPS`."""
    layer = layer_of(name)
    if kind.kind in ("rms_norm", "layer_norm"):
        return layer, "norm"
    if kind.kind == "embedding":
        return layer, "embed"
    if module is model.get_output_embeddings():
        return layer, "head"
    if layer is None:
        return layer, "other"
    if "experts" in name.split("."):
        return layer, "experts"
    return layer, "attn" if "att" in name else "mlp"
