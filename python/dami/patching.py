"""Patching: two models become one that answers every sequence at its own λ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from dami.dial import Dial, layer_of, patch_of
from dami.layers import (
    Lerp,
    LerpConv1D,
    LerpExperts,
    LerpLinear,
    LerpModule,
    Stored,
    kind_of,
    obstacles,
    own_tensors,
    patched_class,
    placeholder,
    readers,
    reclass,
    stored_format,
    unread,
)
from dami.model import Patch, patched_model_class
from dami.on_top import refuse_adapters
from dami.quantizer import PairQuantizer
from dami_kernels import LerpWeight, formats

Header = tuple[list[int], str]

# what may differ between the ends without changing what a forward pass computes
HARMLESS = re.compile(
    r"_name_or_path|name_or_path|transformers_version|(torch_)?dtype|use_cache|return_dict|.*_token_id"
    r"|.*_(dropout|pdrop)(_prob)?|dropout|initializer_range|id2label|label2id|problem_type|max_window_layers"
    r"|task_specific_params|tokenizer_class|output_.*|chunk_size_feed_forward|finetuning_task|_attn_implementation"
    r"|do_sample|temperature|top_[kp]|max_length|max_new_tokens|repetition_penalty|unsloth.*"
)
TIES = "tie_word_embeddings"
STRETCHED = ("dynamic", "longrope", "yarn")  # rotary embeddings that depend on max_position_embeddings


def patch_model(
    instruct_model: PreTrainedModel, thinking_model: PreTrainedModel, format: str = "pair", *, invariant: bool = False
) -> PreTrainedModel:
    """Patches `instruct_model` in place so that each sequence of a batch runs at its own λ, and returns it.

    Every parameter that differs between the two is interpolated, W(λ) = W_instruct + λ (W_thinking − W_instruct); what
    is identical stays as it is and costs nothing. `format="pair"` shares memory with `thinking_model` where dtype and
    device agree (not for GPT-2's Conv1D, whose weights are stored transposed). All parameters are frozen while patched.
    λ is 0 until `intensity` says otherwise. Where the head of one end is tied to its embedding and that of the other is
    not, the head gets a weight of its own: the tied end's is a copy of its embedding, until the patch is taken off.

    Args:
        instruct_model: a causal language model, λ=0.
        thinking_model: another of the same architecture, λ=1. It is left as it is, and may be deleted.
        format: how embeddings and linear weights are stored, a name of `dami_kernels.formats.names()`.
        invariant: makes what a linear layer computes for a row independent, bit for bit, of the other rows, of their λ
            and of their number, at some cost in speed. Whether the whole model is depends on its attention too.

    Raises:
        TypeError: an argument is not a transformers model, or `instruct_model` is patched already.
        ValueError: the ends do not match, or a parameter that differs cannot be interpolated: all their names are
            listed, and the model is left as it was.
    """
    for name, model in (("instruct_model", instruct_model), ("thinking_model", thinking_model)):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"{name} must be a transformers model, got {type(model).__name__}")
        if hasattr(model, "dami_patch"):
            raise TypeError(f"{name} must not be patched already: call dami.unpatch_model first")
        refuse_adapters(model, "patch_model", f"merge it into {name}, or put it on the patched model")
    mismatches = config_mismatches(instruct_model.config, thinking_model.config)
    mismatches = [
        line for line in mismatches if not line.startswith(f"config.{TIES}:")
    ]  # the heads are looked at below
    if type(instruct_model) is type(thinking_model):  # nothing compares otherwise
        mismatches += tensor_mismatches(headers_of(instruct_model), headers_of(thinking_model))
    else:
        mismatches.append(f"class: {type(instruct_model).__name__} and {type(thinking_model).__name__}")
    if not mismatches:
        firsts, thinking = first_names(instruct_model), thinking_model.state_dict()
        mismatches = [
            f"{name}: tied to {first} in the instruct end only"
            for name, first in firsts.items()
            if name != first and not torch.equal(thinking[name], thinking[first])
        ]
        heads = [line for line in mismatches if line.partition(":")[0] == _head_name(instruct_model)]
        mismatches = [line for line in mismatches if line not in heads]
    if mismatches:
        raise ValueError("\n  ".join(["instruct_model and thinking_model do not match:", *mismatches]))
    shared = _untie(instruct_model) if heads else None
    try:
        own = {name for name, first in first_names(thinking_model).items() if name == first}
        ends = (  # a copy of what only the thinking end shares, for transformers saves what is shared but once
            (name, thinking[name] if name in own else thinking[name].clone())
            for name, first in first_names(instruct_model).items()
            if name == first
        )
        model = interpolate(instruct_model, ends, format, invariant=invariant)
    except BaseException:
        if shared is not None:
            _tie(instruct_model, shared)
        raise
    model.dami_patch.shared = shared  # type: ignore[union-attr]
    if (
        _head_name(model) is not None
        and model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    ):
        setattr(model.config.get_text_config(), TIES, False)  # where a checkpoint's own head has overruled its config
    return model


def _head_name(model: PreTrainedModel) -> str | None:
    """The name of the weight of a model's head."""
    head = model.get_output_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is head), None)


def _untie(model: PreTrainedModel) -> nn.Parameter:
    """Gives the head of a model a weight of its own, a copy, and returns the one it shared."""
    head = model.get_output_embeddings()
    shared = head.weight
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    _note_ties(model, False)
    return shared


def _tie(model: PreTrainedModel, shared: nn.Parameter) -> None:
    """Takes back `_untie`."""
    model.get_output_embeddings().weight = shared
    _note_ties(model, True)


def _note_ties(model: PreTrainedModel, tied: bool) -> None:
    setattr(model.config.get_text_config(), TIES, tied)
    setattr(model.config, TIES, tied)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Takes a patch off, in place, and returns the model: the very same modules and parameters as before it.

    Only where the format has not kept the base as it was, `w8d4`, its weights are those that λ=0 ran with.
    """
    patch: Patch = patch_of(model)
    for module in model.modules():
        if isinstance(module, LerpModule):
            lerp = module.lerp
            for name, stored in lerp.stored.items():
                parameter = module.tensor(name)
                if name not in stored.names:
                    parameter.data = module.as_operand(module.ends(name).unpack()[0].to(parameter.dtype))
                parameter.data = parameter.data.contiguous()
                for added in stored.names:
                    if added != name:
                        delattr(module, added)
            del module.lerp
            reclass(module, lerp.original)
    for parameter in patch.trainable:
        parameter.requires_grad_(True)
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, PairQuantizer):
        quantizer.remove_quantization_config(model)
    if patch.head is not None:
        patch.head.remove()
    if patch.shared is not None:
        _tie(model, patch.shared)
    del model.dami_patch
    reclass(model, patch.original)
    return model


@dataclass(frozen=True)
class LowRank:
    """The λ=1 end of a weight as base + up · down: down [R, K], up [N, R] for an operand of shape [N, K]."""

    down: Tensor
    up: Tensor


def interpolate(
    model: PreTrainedModel,
    thinking: Iterable[tuple[str, Tensor | LowRank]],
    format: str,
    *,
    invariant: bool = False,
    owned: bool = False,
) -> PreTrainedModel:
    """Patches `model` with the other end's tensors, one at a time; all checks of names and shapes are behind us.

    Args:
        model: the instruct end.
        thinking: names and tensors of the thinking end. Those identical to the model's own are dropped at once.
        format, invariant: as in `patch_model`.
        owned: whether the tensors come from files and nobody needs the model if this fails. Then a target that is kept
            as it is is copied, and a base that its format replaces is let go at once.
    """
    formats.get(format)
    state = model.state_dict(keep_vars=True)
    offloaded = [name for name, base in state.items() if base.device.type == "meta"]
    if offloaded:
        raise ValueError(
            f"instruct_model must be on devices, not offloaded, got {len(offloaded)} tensors on meta: pack the pair, "
            "dami pack INSTRUCT THINKING -o DIRECTORY, and load what can be offloaded, dami.load_pair(DIRECTORY, …)"
        )
    kinds = {module: kind_of(module) for module in model.modules()}
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
            base_end = reader.as_operand(base.detach()).contiguous()
            if isinstance(tensor, LowRank):
                weight = _adapted(base_end, tensor, chosen)
            else:
                if owned and chosen == "pair":
                    target = target.clone()  # not a view of a file that may change
                weight = LerpWeight.pack(base_end, reader.as_operand(target).contiguous(), chosen)
            packed[id(base)] = Packed.of(weight, reader)
            if owned:
                base.requires_grad_(False).data = packed[id(base)].base
    if refused:
        raise ValueError(
            "\n  ".join(["these tensors differ between the ends and cannot be interpolated:", *sorted(refused)])
        )

    return install(model, kinds, packed, invariant)


def install(
    model: PreTrainedModel,
    kinds: Mapping[nn.Module, tuple[type[LerpModule], dict[str, Any]]],
    packed: Mapping[int, Packed],
    invariant: bool = False,
) -> PreTrainedModel:
    """Changes the class of `model`, and of its modules of which a parameter, known by its id, was packed."""
    # λ is a number even while the model is loaded, on meta: whoever asks for a parameter is given it at that
    dial = Dial(torch.zeros((), device="cpu" if model.device.type == "meta" else model.device))
    patch = Patch(dial, type(model), [p for p in model.parameters() if p.requires_grad])
    reclass(model, patched_model_class(type(model))).dami_patch = patch  # type: ignore[arg-type]
    model.requires_grad_(False)
    running = patch.running
    running.invariant = invariant
    for name, module in list(model.named_modules()):
        differing = {local: packed[id(base)] for local, base in own_tensors(module) if id(base) in packed}
        if differing:
            kind, settings = kinds[module]
            if invariant and issubclass(kind, (LerpLinear, LerpConv1D, LerpExperts)):
                settings = {**settings, "invariant": True}
            original = patch.original if module is model else type(module)
            place = _place(model, name, module, kind)
            _patch_module(module, kind, Lerp(dial, original, settings, *place, name=name, running=running), differing)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        patch.head = head.register_forward_pre_hook(_contiguous)
    return model


def _contiguous(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Before a plain head: the last states of a batch of prompts are a slice, which `F.linear` takes as one product for
    each row, with a copy of the weight for each: gigabytes and seconds for a vocabulary of 50,000 and 100 rows."""
    return inputs[0].contiguous(), *inputs[1:]


def _adapted(base: Tensor, difference: LowRank, format: str) -> LerpWeight:
    """Base and base + up · down: as they are in the format `lowrank`, as two whole ends in any other."""
    down, up = (factor.to(base.device) for factor in (difference.down, difference.up))
    if format == "lowrank":
        factors = (factor.to(base.dtype).contiguous() for factor in (down, up))
        return LerpWeight((base, *factors), format, base.shape, base.dtype)
    return LerpWeight.pack(base, torch.addmm(base.float(), up.float(), down.float()).to(base.dtype), format)


@dataclass(frozen=True)
class Packed:
    """Both ends of a parameter, packed, in the orientation of its module.

    Attributes:
        weight: the operand.
        base: what takes the parameter's place: the base, or a placeholder where the format does not keep it.
        beside: what becomes parameters beside it, by suffix; one tied to another shares them.
    """

    weight: LerpWeight
    base: Tensor
    beside: dict[str, nn.Parameter]

    @classmethod
    def of(cls, weight: LerpWeight, kind: type[LerpModule]) -> Packed:
        tensors = dict(zip(formats.get(weight.format).TENSORS, map(kind.as_operand, weight.tensors), strict=True))
        base = tensors.pop("", None)
        if base is None:
            shape = kind.as_operand(torch.empty(weight.shape, device="meta")).shape
            base = placeholder(torch.empty(0, dtype=weight.dtype, device=weight.device), shape)
        beside = {suffix: nn.Parameter(tensor, requires_grad=False) for suffix, tensor in tensors.items()}
        return cls(weight, base, beside)


def _patch_module(original: nn.Module, kind: type[LerpModule], lerp: Lerp, differing: Mapping[str, Packed]) -> None:
    """Changes a module's class and registers, beside each tensor that differs, what its format stores."""
    module = reclass(original, patched_class(kind, type(original)))  # type: ignore[arg-type]
    module.lerp = lerp
    for name, packed in differing.items():
        base = module.tensor(name)
        base.data = packed.base
        for suffix, parameter in packed.beside.items():
            if isinstance(base, nn.Parameter):
                module.register_parameter(name + suffix, parameter)
            else:
                module.register_buffer(name + suffix, parameter.data)
        format = packed.weight.format
        lerp.stored[name] = Stored(format, tuple(name + suffix for suffix in formats.get(format).TENSORS))


def first_names(model: PreTrainedModel) -> dict[str, str]:
    """The name of every tensor of a model, with the first name of the tensor it is tied to, or its own."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}


def _place(model: PreTrainedModel, name: str, module: nn.Module, kind: type[LerpModule]) -> tuple[int | None, str]:
    """Index of a module's layer, None outside the layers, and its group, one of `dial.GROUPS`."""
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


def headers_of(model: PreTrainedModel) -> dict[str, Header]:
    """Shape and dtype of every parameter and persistent buffer of a model, by name."""
    return {name: (list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in model.state_dict().items()}


def tensor_mismatches(instruct: Mapping[str, Header], thinking: Mapping[str, Header], dtypes: bool = True) -> list[str]:
    """One line for each tensor that is in one end only or has another shape, or another dtype if `dtypes` count."""
    lines = [f"{name}: in the instruct end only" for name in instruct if name not in thinking]
    lines += [f"{name}: in the thinking end only" for name in thinking if name not in instruct]
    for name, header in instruct.items():
        (shape, dtype), (other_shape, other_dtype) = header, thinking.get(name, header)
        if shape != other_shape or (dtypes and dtype != other_dtype):
            lines.append(
                f"{name}: {dtype} {shape} in the instruct end, {other_dtype} {other_shape} in the thinking end"
            )
    return sorted(lines)


def config_mismatches(instruct: PreTrainedConfig, thinking: PreTrainedConfig) -> list[str]:
    """One line for each setting that differs between two configs and changes what a forward pass computes."""
    ends = [_flat(config.to_dict()) for config in (instruct, thinking)]
    for end in ends:
        if end.get("quantization_config.quant_method") == "gguf":  # of the file: the loaded weights are plain
            end.update({key: None for key in end if key.startswith("quantization_config.")})
    if instruct.model_type != thinking.model_type:  # nothing else compares
        ends = [{"model_type": config.model_type} for config in (instruct, thinking)]
    types = {value for end in ends for key, value in end.items() if key.endswith("rope_type")}
    harmless = {"max_position_embeddings"} if types.isdisjoint(STRETCHED) else set()
    lines = []
    for key in sorted(ends[0].keys() | ends[1].keys()):
        values = [end.get(key) for end in ends]
        unknown = key == "architectures" and None in values
        name = key.rpartition(".")[2]
        if values[0] != values[1] and not unknown and name not in harmless and not HARMLESS.fullmatch(name):
            lines.append(f"config.{key}: {values[0]!r} in the instruct end, {values[1]!r} in the thinking end")
    return lines


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + str(key)] = value
    return flat


@dataclass(frozen=True)
class ParameterRow:
    """One parameter of a patched model.

    Attributes:
        name: its qualified name.
        kind: of the module it belongs to: "linear", "conv1d", "embedding", "rms_norm", "layer_norm", or the class name
            of a module that is not patched.
        shape: of either end.
        dtype: of either end, as the operator takes it.
        format: how its ends are stored, None where they are identical.
        nbytes: bytes of all that is stored for it; 0 where it is tied.
        tied_to: the name of the parameter it is tied to, None otherwise.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    format: str | None
    nbytes: int
    tied_to: str | None

    @property
    def interpolated(self) -> bool:
        """Whether the ends differ."""
        return self.format is not None


@dataclass(frozen=True)
class Description:
    """Every parameter of a patched model, how it is stored and what it weighs; printable."""

    rows: tuple[ParameterRow, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters of both ends, as stored."""
        return sum(row.nbytes for row in self.rows)

    def __str__(self) -> str:
        cells = [("parameter", "kind", "shape", "dtype", "ends", "bytes")]
        for row in self.rows:
            ends = f"interpolated ({row.format})" if row.format else "identical"
            nbytes = f"tied to {row.tied_to}" if row.tied_to else f"{row.nbytes:,}"
            cells.append((row.name, row.kind, "×".join(map(str, row.shape)), row.dtype, ends, nbytes))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        lines.insert(1, "  ".join("─" * width for width in widths))
        interpolated = sum(row.interpolated for row in self.rows)
        lines.append(f"{len(self.rows)} parameters, {interpolated} interpolated, {self.nbytes:,} bytes")
        return "\n".join(lines)


def describe(model: PreTrainedModel) -> Description:
    """Every parameter of a patched model, and every buffer that is interpolated: its kind, its format, its bytes.

    `print(describe(model))` shows a table; `.rows` holds the same as data.

    Raises:
        TypeError: the model is not patched.
    """
    patch_of(model)
    rows: dict[int, ParameterRow] = {}
    tied: list[ParameterRow] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        lerp = module.lerp if isinstance(module, LerpModule) else None
        added = {name for own, stored in lerp.stored.items() for name in stored.names if name != own} if lerp else set()
        for name, parameter in own_tensors(module):
            stored = lerp.stored.get(name) if lerp else None
            if name in added or not (stored or isinstance(parameter, nn.Parameter)):
                continue
            names = stored.names if stored else (name,)
            first = rows.get(id(parameter))
            row = ParameterRow(
                name=f"{prefix}.{name}" if prefix else name,
                kind=module.kind if isinstance(module, LerpModule) else type(module).__name__,
                shape=tuple(parameter.shape),
                dtype=str(parameter.dtype).removeprefix("torch."),
                format=stored.format if stored else None,
                nbytes=0 if first else sum(dict(own_tensors(module))[tensor].nbytes for tensor in names),
                tied_to=first.name if first else None,
            )
            if first:
                tied.append(row)
            else:
                rows[id(parameter)] = row
    return Description((*rows.values(), *tied))
