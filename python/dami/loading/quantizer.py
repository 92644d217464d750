"""Lets transformers' `from_pretrained` load pairs, as the quantisation methods "dami" and "dami-pair".

This file may be imported while transformers itself is being imported. So modules that need transformers' models are
imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from dami.layers.kinds import kinds_of
from dami.saving.config import PackedConfig, PairConfig
from dami.sources import QUANT_METHOD, TWO_ENDS
from dami.upstream import check, execution_device, keep_from_initialization, parameters_of
from dami_kernels import LerpWeight, formats
from dami_kernels.weight import FLOAT_DTYPES

if TYPE_CHECKING:
    from dami.layers.base import LerpModule
    from dami.layers.packed import Packed
    from dami.loading.checkpoint import Checkpoint
    from dami.patching.compare import Header

logger = logging.get_logger(__name__)

check("the loading of a packed pair")
register_quantization_config(QUANT_METHOD)(PackedConfig)
register_quantization_config(TWO_ENDS)(PairConfig)


class OfPairs(HfQuantizer):
    """What the loading of a packed pair and of two ends have in common."""

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Refuses a dtype that no operator computes in."""
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16 for a pair, got {dtype}")
        return dtype


@register_quantizer(QUANT_METHOD)
class PairQuantizer(OfPairs):
    """Loads packed pairs: patches the empty model, so that every stored tensor is loaded straight into place."""

    quantization_config: PackedConfig
    requires_calibration = True  # tells transformers that it cannot make a pair from one ordinary checkpoint
    is_trainable = True  # not the pair, but an adapter on top of it
    is_compileable = True

    @property
    def serialized_names(self) -> dict[str, list[str]]:  # type: ignore[override]  # formats may come later
        return {"": formats.suffixes()}

    def is_serializable(self) -> bool:
        return True

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Splits the tensors stored along with a parameter in the same way as the parameter."""
        super().update_parallel_plan(model, plan)
        if plan and _is_split(model):
            from dami.loading.tensor_parallel import use_our_styles

            use_our_styles(model, plan)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Patches the model on the meta device, using the file headers to know which tensors to expect."""
        from dami.layers.base import LerpModule
        from dami.layers.kinds import readers
        from dami.loading.checkpoint import headers_in
        from dami.patching.patch import install

        if _is_split(model):
            check("tensor parallelism of a pair")
        headers = {name: header for file in checkpoint_files or () for name, header in headers_in(Path(file)).items()}
        kinds = kinds_of(model, on_meta=True)
        install(model, kinds, self._packed(model, headers, readers(kinds)))
        for module in _patched(model):
            for name in module.placeholders():
                # not a parameter until loading ends, so that transformers does not look for it, count it or move it
                vars(module)[name], parameters_of(module)[name] = module.tensor(name), None
                keep_from_initialization(vars(module)[name])
        for target, source in list(model.all_tied_weights_keys.items()):
            holder, _, local = target.rpartition(".")
            module = model.get_submodule(holder)
            for name in module.beside(local) if isinstance(module, LerpModule) else ():
                suffix = name.removeprefix(local)
                model.all_tied_weights_keys[target + suffix] = source + suffix

    def _packed(
        self, model: Any, headers: Mapping[str, Header], read_by: Mapping[int, type[LerpModule]]
    ) -> dict[int, Packed]:
        """Returns empty tensors for each interpolated parameter in the files, by the id of the model's parameter.

        Raises:
            ValueError: tensors are missing or do not fit; every fault is named.
        """
        from dami.layers.base import own_tensors

        packed: dict[int, Packed] = {}
        faults = []
        for prefix, module in model.named_modules():
            for local, parameter in own_tensors(module):
                names = _stored_names(model, f"{prefix}.{local}" if prefix else local)
                format = next(filter(None, map(self.quantization_config.format_of, names)), None)
                if format is None or id(parameter) in packed:
                    continue
                try:
                    packed[id(parameter)] = _to_come(parameter, names, format, headers, read_by[id(parameter)])
                except ValueError as error:
                    faults.append(f"{names[0]} ({type(module).__name__}): {error}")
        if faults:
            raise ValueError("\n  ".join(["the packed pair does not fit its model:", *faults]))
        return packed

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Does the work that is impossible on the meta device."""
        from dami.dial.patch import Origin
        from dami.layers.base import LerpModule, placeholder, supply_placeholders
        from dami.layers.kinds import LerpConv1D, LerpTransposedExperts

        added = set()
        for module in _patched(model):
            for local, stored in module.lerp.stored.items():
                tensors = [module.tensor(name) for name in stored.names]
                added |= {id(module.tensor(name)) for name in module.beside(local)}
                if isinstance(module, (LerpConv1D, LerpTransposedExperts)):
                    for tensor in tensors:
                        tensor.data = module.as_operand(module.as_operand(tensor.data).contiguous())
                if local not in stored.names:
                    before = module.__dict__.pop(local)
                    like = torch.empty(0, dtype=before.dtype, device=_device_of(module, tensors[0]))
                    shape = _local_shape(before.shape, tensors[0])
                    parameters_of(module)[local] = nn.Parameter(placeholder(like, shape), requires_grad=False)
            supply_placeholders(module)
        for target, source in model.all_tied_weights_keys.items():  # transformers ties stored tensors only
            holder, _, local = target.rpartition(".")
            module = model.get_submodule(holder)
            if isinstance(module, LerpModule) and local in module.placeholders():
                setattr(module, local, model.get_parameter(source))
        patch = model.dami_patch
        patch.trainable = [p for p in model.parameters() if p.is_floating_point() and id(p) not in added]
        patch.dial.lam = torch.zeros((), dtype=torch.float32, device=model.device)
        config = self.quantization_config
        sizes = None if config.vocabulary is None else (config.vocabulary[0], config.vocabulary[1])
        patch.origin = Origin(config.parents, config.error, None, config.differences, sizes, config.sampling)
        model.requires_grad_(False)


@register_quantizer(TWO_ENDS)
class TwoEndsQuantizer(OfPairs):
    """Loads the thinking end after the instruct end, which transformers loads, and patches the model."""

    quantization_config: PairConfig
    is_trainable = True

    def update_attn_implementation(self, config: Any) -> Any:
        """Gives the config the thinking end's rotary embedding, if chosen: transformers calls this before all else."""
        from dami.loading.policies import copy_rope

        thinking = self._thinking() if self.quantization_config.rope == "thinking" else None
        if thinking is not None and not thinking.is_adapter and thinking.config().model_type == config.model_type:
            copy_rope(thinking.config(), config)
        return config

    def _thinking(self) -> Checkpoint:
        from dami.loading.checkpoint import Checkpoint

        return Checkpoint.at(self.quantization_config.thinking, self.quantization_config.options)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Checks that the ends match, before any weight is read."""
        from dami.loading.checkpoint import Checkpoint
        from dami.loading.joining import Joining
        from dami.loading.policies import Choices

        own = self.quantization_config
        if _is_split(model):
            raise ValueError("tp_plan needs a packed pair, which dami.pack makes of two checkpoints")
        if not checkpoint_files:
            raise ValueError("quantization_config=PairConfig(…) needs an instruct end that is read from files")
        where, named = Path(checkpoint_files[0]).parent, Path(model.config.name_or_path)
        name = named.resolve().name if named.exists() else str(named)
        instruct = Checkpoint(where, name, trust_remote_code=type(model).is_remote_code())
        if not any(where.glob("*token*")):  # transformers downloads it apart from the model
            logger.warning(f"{name} has no tokenizer beside its weights: whether the vocabularies match is not checked")
        thinking = self._thinking()
        # transformers has chosen the dtype: where another than the instruct end's is asked for, both ends get it.
        dtype = model.config.dtype
        asked = str(dtype).removeprefix("torch.") not in {kept for _, kept in instruct.headers().values()}
        self.joining = Joining.of(
            (instruct, thinking), instruct, Choices(dtype if asked else "auto", own.tokenizer, own.rope)
        )
        match = self.joining.match
        if match is not None and match.dtype not in ("auto", dtype):
            raise ValueError(f"{name} is in {dtype}, which does not hold {thinking.name}: use dtype={match.dtype}")
        self.joining.warn()

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        from dami.dial.turning import set_intensity

        config = self.quantization_config
        self.remove_quantization_config(model)
        self.joining.onto(model, config.format, config.invariant, {})
        model.dami_patch.origin.tokenizer = self.joining.tokenizer()
        set_intensity(model, config.intensity)

    def is_serializable(self) -> bool:
        return True


def _is_split(model: Any) -> bool:
    """Returns whether the model is split over several processes."""
    return getattr(model.config, "distributed_config", None) is not None


def _device_of(module: nn.Module, tensor: Tensor) -> torch.device:
    """Returns the device of a module's tensor or, if it is offloaded, the device accelerate's hook moves it to."""
    return (execution_device(module) if tensor.is_meta else None) or tensor.device


def _local_shape(shape: torch.Size, stored: Tensor) -> torch.Size:
    """Returns the shape of this process's part of a weight; `stored` is one of its quantised tensors."""
    own = stored.to_local().shape if isinstance(stored, DTensor) else stored.shape
    return torch.Size(n * part // whole for n, part, whole in zip(shape, own, stored.shape, strict=True))


def _stored_names(model: Any, name: str) -> tuple[str, ...]:
    """Returns the names a parameter may be stored under: its own, with or without base prefix, and tied names."""
    prefix, ties = f"{model.base_model_prefix}.", model.all_tied_weights_keys
    source = ties.get(name, name)
    targets = (target for target, other in ties.items() if other == source)
    return name, source, *targets, prefix + name, name.removeprefix(prefix)


def _to_come(
    parameter: Tensor, names: Sequence[str], format: str, headers: Mapping[str, Header], kind: type[LerpModule]
) -> Packed:
    """Returns both ends of a parameter as empty tensors shaped as in the files.

    Raises ValueError if tensors are missing or do not fit.

    Args:
        parameter: the empty model's parameter.
        names: the names it may be stored under.
        format: the format it is stored in.
        headers: the headers of all tensors in the files.
        kind: the kind of the module that reads it.
    """
    from dami.layers.packed import Packed

    suffixes = formats.get(format).TENSORS
    found = {suffix: next((headers[n + suffix] for n in names if n + suffix in headers), None) for suffix in suffixes}
    if absent := [suffix or "the base" for suffix, header in found.items() if header is None]:
        raise ValueError(f"the files lack {', '.join(absent)}")
    tensors = [_empty(header, parameter, suffix) for suffix, header in found.items() if header is not None]
    operand = kind.as_operand(parameter)
    weight = LerpWeight(tuple(map(kind.as_operand, tensors)), format, operand.shape, operand.dtype)
    return Packed.of(weight, kind)


def _empty(header: Header, parameter: Tensor, suffix: str) -> Tensor:
    """Returns an empty tensor like the stored one once loaded, on the device of the empty parameter it belongs to.

    This device is meta, or the CPU if the model creates the parameter by a function that ignores the default device.
    """
    shape, stored = header
    dtype = parameter.dtype
    if suffix.endswith("_scale") or not getattr(torch, stored).is_floating_point:
        dtype = getattr(torch, stored)
    return torch.empty(shape, dtype=dtype, device=parameter.device)


def _patched(model: nn.Module) -> list[LerpModule]:
    from dami.layers.base import LerpModule

    return [module for module in model.modules() if isinstance(module, LerpModule)]
