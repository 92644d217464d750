"""Non-public interfaces of torch, transformers, accelerate, PEFT and lm-eval that dami relies on.

This file lists their private names, and the methods of theirs that dami overrides or replaces. Other files of dami use
them only through this file. Those of vLLM are in `serving/vllm/support.py`, and those of torch that the kernels need in
`dami_kernels/upstream.py`. Each group is checked before its first use. If a package has moved something, the error
names it, the installed version and the versions that work.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from dami.version import __version__
from dami_kernels import upstream
from dami_kernels.upstream import Moved as Moved
from dami_kernels.upstream import Place

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.fx import Graph
    from transformers import CompileConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
    from transformers.generation.continuous_batching.continuous_api import OutputRouter
    from transformers.generation.continuous_batching.input_outputs import (
        ContinuousBatchingAsyncIOs,
        ContinuousBatchingIOs,
    )
    from transformers.generation.continuous_batching.requests import RequestState
    from transformers.generation.continuous_batching.scheduler import Scheduler

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T", bound=Tensor)
C = TypeVar("C", bound="CompileConfig")

TESTED = {
    "torch": "2.13",
    "transformers": "5.23 and 5.24",
    "accelerate": "1.15",
    "peft": "0.21",
    "lm_eval": "0.4.9",
}


def keeping(path: str, *names: str, made: Callable[[Any], Any] = lambda cls: cls()) -> Place:
    """Returns the place of a class whose objects must have attributes of these names; `made` makes an object."""
    return Place(
        path, does=f"keep {', '.join(names)}", proof=lambda cls: all(hasattr(made(cls), name) for name in names)
    )


def _sets_hook(add_hook: Any) -> bool:
    from accelerate.hooks import ModelHook

    return {"_hf_hook", "_old_forward", "forward"} <= vars(add_hook(nn.Identity(), ModelHook())).keys()


def _spares_marked(ones_: Any) -> bool:
    marked, other = torch.zeros(2), torch.zeros(2)
    marked._is_hf_initialized = True  # type: ignore[attr-defined]
    ones_(marked)
    ones_(other)
    return not marked.any() and bool(other.all())


def _calls_checkpoint(layer: Any) -> bool:
    called: list[Any] = []
    module = type("Layer", (layer,), {"forward": lambda self, x: x})().train()
    module.gradient_checkpointing, module._gradient_checkpointing_func = True, lambda *args: called.append(args)
    module(torch.zeros(1))
    return bool(called)


def using(path: str, *names: str) -> Place:
    """Returns the place of a function whose code must mention these attributes."""

    def names_them(function: Any) -> bool:
        code = inspect.unwrap(function).__code__
        return {*names} <= {*code.co_names, *code.co_consts}

    return Place(path, does=f"use {', '.join(names)}", proof=names_them)


BATCHING = "transformers.generation.continuous_batching"
STYLES = "transformers.distributed.tensor_parallel"
CAPTURING = "transformers.utils.output_capturing"

RELIED_ON: dict[str, tuple[Place, ...]] = {
    "dami": (
        keeping("torch.nn:Module", "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"),
        Place("torch.nn:Module._apply", ("self", "fn", "recurse")),
        Place("torch.nn:Module._save_to_state_dict", ("self", "destination", "prefix", "keep_vars")),
        Place("torch.nn:Module._load_from_state_dict", ("self", "state_dict", "prefix", "strict", "missing_keys")),
        Place("torch:Tensor._make_wrapper_subclass"),
        Place("torch:Tensor._version"),
        Place("torch.nn.modules.module:_global_forward_pre_hooks"),
        Place("torch._C:_current_graph_task_id"),
        Place("torch.utils._pytree:tree_flatten", ("tree",)),
        Place("torch.utils._pytree:tree_map", ("func", "tree")),
        Place("torch.utils._pytree:tree_unflatten", ("leaves", "treespec")),
        Place("torch.utils._python_dispatch:TorchDispatchMode.__torch_dispatch__", ("self", "func", "types", "args")),
    ),
    "a patched model": (
        Place("torch.nn:Module._compiled_call_impl"),
        keeping("torch.nn:RNN", "_flat_weights", made=lambda cls: cls(1, 1)),
        Place("torch.nn.utils.prune:BasePruningMethod", ("_tensor_name",)),
        Place("transformers:PreTrainedConfig._attn_implementation"),
        Place("transformers:PreTrainedModel._is_stateful"),
        Place("transformers:PreTrainedModel._tied_weights_keys"),
        Place("transformers:PreTrainedModel.get_parameter_or_buffer"),
        Place("transformers:PreTrainedModel._keys_to_ignore_on_load_unexpected"),
        Place(
            "transformers.modeling_layers:GradientCheckpointingLayer",
            does="call _gradient_checkpointing_func",
            proof=_calls_checkpoint,
        ),
        keeping(
            "transformers.integrations.moe:use_experts_implementation",
            "_apply_gate",
            made=lambda use: use(type("Experts", (nn.Module,), {})),
        ),
        Place("accelerate.hooks:add_hook_to_module", ("module", "hook"), "set _hf_hook and _old_forward", _sets_hook),
    ),
    "the loading of a packed pair": (
        Place(
            "transformers.quantizers.base:HfQuantizer._process_model_before_weight_loading", ("self", "model", "kwargs")
        ),
        Place(
            "transformers.quantizers.base:HfQuantizer._process_model_after_weight_loading", ("self", "model", "kwargs")
        ),
        Place("transformers.quantizers.base:HfQuantizer.update_attn_implementation", ("self", "config")),
        Place(
            "transformers.initialization:ones_",
            does="leave alone what _is_hf_initialized marks",
            proof=_spares_marked,
        ),
    ),
    "an offloaded pair": (
        Place("accelerate.hooks:AlignDevicesHook.__init__", ("execution_device", "weights_map")),
        keeping("accelerate.hooks:AlignDevicesHook", "execution_device", "weights_map"),
        keeping("accelerate.hooks:SequentialHook", "hooks"),
        keeping("accelerate.utils:PrefixedDataset", "dataset", "prefix", made=lambda cls: cls({}, "")),
        keeping("accelerate.utils:OffloadedWeightsLoader", "state_dict", made=lambda cls: cls(state_dict={})),
    ),
    "tensor parallelism of a pair": (
        Place("transformers.quantizers.base:HfQuantizer.update_parallel_plan", ("self", "model", "plan")),
        Place("transformers.distributed.parallel_utils:ALL_PARALLEL_STYLES.register"),
        Place("transformers.distributed.parallel_utils:_use_local_dtensor_params", ("module",)),
        Place(
            "torch.distributed.tensor._utils:compute_local_shape_and_global_offset",
            ("global_shape", "mesh", "placements"),
        ),
        Place(f"{STYLES}:TensorParallelLayer.should_use_local_tensors", ("self", "module")),
        Place(f"{STYLES}:TensorParallelLayer.shard_param", ("self", "module", "param", "mesh")),
        Place(f"{STYLES}:TensorParallelLayer.validate_param", ("self", "module", "param", "mesh", "parameter_name")),
        Place(
            f"{STYLES}:TensorParallelLayer.transform_inputs_pre_forward", ("self", "module", "args", "kwargs", "mesh")
        ),
        Place(f"{STYLES}:TensorParallelLayer.context_around_forward", ("self", "module", "mesh")),
        Place(f"{STYLES}:TensorParallelLayer.transform_output_post_forward", ("self", "module", "output", "mesh")),
        Place(f"{STYLES}:TensorParallelLayer.install_forward", ("self", "module", "mesh")),
        Place(f"{STYLES}:ColwiseParallel", ("transform_inputs_pre_forward",)),
        Place(f"{STYLES}:RowwiseParallel", ("context_around_forward",)),
        Place(f"{STYLES}:EmbeddingParallel", ("install_forward",)),
    ),
    "compiled decoding": (
        Place("torch._dynamo.exc:Unsupported"),
        Place("torch._dynamo.config:recompile_limit"),
        Place("torch._dynamo.config:accumulated_recompile_limit"),
        Place("torch._functorch.config:enable_autograd_cache"),
        Place("torch._inductor.compile_fx:compile_fx", ("inner_compile", "config_patches")),
        Place("torch._inductor.compile_fx:compile_fx_inner"),
        Place("torch._inductor.output_code:CompiledFxGraph", ("current_callable",)),
        Place("torch._inductor.config:post_grad_custom_pre_pass"),
        Place("torch._inductor.custom_graph_pass:CustomGraphPass"),
        Place("torch._inductor.custom_graph_pass:get_hash_for_files", ("paths",)),
        keeping(
            "torch.nn:Module",
            "_forward_hooks_with_kwargs",
            "_forward_hooks_always_called",
            "_forward_pre_hooks_with_kwargs",
        ),
        Place("transformers:CompileConfig._compile_all_devices"),
        Place("transformers:GenerationMixin._supports_default_dynamic_cache"),
        Place(
            "transformers:GenerationMixin._valid_auto_compile_criteria", ("self", "model_kwargs", "generation_config")
        ),
        using("transformers:GenerationMixin._prepare_static_cache", "_previous_max_cache_length"),
        keeping("transformers:GenerationConfig", "max_cache_len"),
    ),
    "a prompt at another intensity": (
        Place("transformers:GenerationMixin._prefill", ("self", "input_ids", "generation_config", "model_kwargs")),
        using("transformers:GenerationMixin._prefill", "_mask_length"),
        using("transformers:GenerationMixin._sample", "_prefill"),
        using("transformers:GenerationMixin._beam_search", "_prefill"),
    ),
    "continuous batching of a pair": (
        Place(
            f"{BATCHING}.continuous_api:ContinuousBatchingManager.__init__",
            ("model", "generation_config", "continuous_batching_config"),
        ),
        Place(
            f"{BATCHING}.continuous_api:ContinuousBatchingManager.add_request",
            ("self", "input_ids", "request_id", "max_new_tokens", "streaming", "eos_token_id"),
        ),
        Place(f"{BATCHING}.continuous_api:ContinuousBatchingManager.add_requests", ("self", "inputs")),
        Place(f"{BATCHING}.continuous_api:ContinuousBatchingManager.pause", ("self",)),
        Place(f"{BATCHING}.continuous_api:ContinuousBatchingManager.start", ("self",)),
        Place(f"{BATCHING}.continuous_api:ContinuousBatchingManager.stop", ("self", "block", "hard_stop")),
        Place(
            f"{BATCHING}.continuous_api:ContinuousBatchingManager.switch_to_cb_friendly_attn",
            ("self", "model", "auto_switch_to_flash"),
        ),
        using(f"{BATCHING}.continuous_api:ContinuousBatchingManager.switch_to_cb_friendly_attn", "_original_attn_impl"),
        using(
            f"{BATCHING}.continuous_api:ContinuousMixin.init_continuous_batching",
            "_cached_continuous_batching_manager",
        ),
        Place(f"{BATCHING}.continuous_api:ContinuousBatchingManager._create_batch_processor", ("self",)),
        Place(
            f"{BATCHING}.continuous_api:ContinuousBatchingManager._generation_loop_body",
            ("self", "batch_processor", "bootstrapping"),
        ),
        Place(f"{BATCHING}.continuous_api:ContinuousBatchingManager._run_generation_loop", ("self",)),
        Place(f"{BATCHING}.continuous_api:ContinuousBatchProcessor", ("inputs_and_outputs", "scheduler")),
        keeping(f"{BATCHING}.continuous_api:OutputRouter", "_lock", "result_handlers"),
        Place(
            f"{BATCHING}.cb_logits_processors:ContinuousBatchingLogitsProcessor",
            ("supported_kwargs", "ignored_kwargs", "fill_defaults", "prepare_tensor_args"),
        ),
        keeping(
            f"{BATCHING}.cb_logits_processors:ContinuousBatchingLogitsProcessorList",
            *("logits_processor", "tensors_required", "supported_keys", "ignored_keys", "do_processing"),
            made=lambda cls: cls([]),
        ),
        Place(
            f"{BATCHING}.cb_logits_processors:ContinuousBatchingLogitsProcessorList.prepare_tensor_args",
            ("self", "requests_in_batch", "arg_storage"),
        ),
        Place(
            f"{BATCHING}.cb_logits_processors:ContinuousBatchingLogitsProcessorList.fill_defaults",
            ("self", "int32_tensor"),
        ),
        Place(f"{BATCHING}.input_outputs:ContinuousBatchingIOs.prepare_batch_update", ("self",)),
        using(f"{BATCHING}.input_outputs:ContinuousBatchingIOs.prepare_batch_update", "requests_in_batch"),
        Place(f"{BATCHING}.input_outputs:ContinuousBatchingAsyncIOs.prepare_batch_update", ("self",)),
        Place(f"{BATCHING}.input_outputs:ContinuousBatchingIOs.get_model_kwargs", ("self", "use_padding")),
        using(
            f"{BATCHING}.input_outputs:ContinuousBatchingIOs.get_model_kwargs", "_bulk_input_tensor", "static_inputs"
        ),
        using(f"{BATCHING}.input_outputs:ContinuousBatchingAsyncIOs.get_model_kwargs", "io_pairs", "device_io"),
        Place(f"{BATCHING}.input_outputs:ContinuousBatchingIOs.prepare_batch_tensors", ("self", "requests_in_batch")),
        using(f"{BATCHING}.input_outputs:ContinuousBatchingIOs.prepare_batch_tensors", "position_offset"),
        using(f"{BATCHING}.input_outputs:ContinuousBatchingIOs.prepare_batch_tensors", "max_kv_read"),
        using(f"{BATCHING}.cache:PagedAttentionCache.update", "block_table", "k_cache", "v_cache"),
        Place(
            f"{BATCHING}.cache_allocators.full_attention:FullAttentionCacheAllocator.get_cache_for_block_table",
            ("self", "layer_idx"),
        ),
        using(
            f"{BATCHING}.cache_allocators.full_attention:FullAttentionCacheAllocator.fill_block_table",
            *("block_table", "block_physical_stride", "tokens_per_page"),
        ),
        Place(f"{BATCHING}.cache_allocators.cache_allocator:CacheAllocator", ("supports_block_table",)),
        Place(f"{BATCHING}.cache:PagedAttentionCache.search_prefix_match", ("self", "request_id", "prompt_ids")),
        Place(f"{BATCHING}.cache:PagedAttentionCache.mark_complete_blocks", ("self", "state", "complete_blocks")),
        Place(f"{BATCHING}.cache:PagedAttentionCache.free_all_requests", ("self", "clear_ledgers")),
        Place(f"{BATCHING}.cache:PagedAttentionCache.compute_free_capacity", ("self",)),
        Place(f"{BATCHING}.cache_allocators.cache_allocator:CacheAllocator", ("num_blocks",)),
        using(f"{BATCHING}.cache_allocators.cache_allocator:CacheAllocator.mark_complete_blocks", "ledger"),
        using(f"{BATCHING}.cache_allocators.cache_allocator:CacheAllocator.match_prefix_blocks", "tokens_per_page"),
        Place(
            f"{BATCHING}.cache_allocators.cache_allocator:compute_block_hash",
            ("parent_hash", "tokens"),
            "tell longer lists of tokens from shorter ones",
            lambda key: key(None, [1, 2]) != key(None, [1]) != key(key(None, [1]), [1]),
        ),
        keeping(f"{BATCHING}.cache_allocators.cache_allocator:BlockLedger", "cached_blocks", "hash_to_block"),
        Place(f"{BATCHING}.scheduler:Scheduler.clear_cancelled_requests", ("self",)),
        Place(f"{BATCHING}.scheduler:Scheduler._get_waiting_candidates", ("self",)),
        Place(f"{BATCHING}.scheduler:Scheduler._process_candidates", ("self", "candidates", "token_budget")),
        Place(
            f"{BATCHING}.requests:RequestState",
            (
                *("initial_tokens", "generated_tokens", "position_offset", "remaining_prefill_tokens", "status"),
                *("is_cpu_offloaded", "logit_processor_kwargs", "create_equivalent_initial_request"),
            ),
        ),
        Place(f"{BATCHING}.requests:RequestState.update_and_check_completion", ("self", "token_id", "logprob")),
        Place(
            f"{BATCHING}.requests:FutureRequestState.__init__",
            ("state", "has_new_token", "complete_blocks", "query_length"),
        ),
    ),
    "an alignment of neurons": (Place("transformers:PreTrainedConfig._experts_implementation"),),
    "PEFT adapters on a pair": (
        Place("peft.tuners.tuners_utils:BaseTuner._check_merge_allowed", ("self",)),
        Place("peft.tuners.tuners_utils:BaseTunerLayer"),
        Place("peft.utils.other:AuxiliaryTrainingWrapper"),
    ),
    "lm-evaluation-harness": (
        Place("lm_eval.models.huggingface:HFLM._model_call", ("self", "inps")),
        Place("lm_eval.models.huggingface:HFLM._model_generate", ("self", "context", "max_length", "stop")),
    ),
}


@functools.cache
def check(group: str) -> None:
    """Raises `Moved` if something in a group of `RELIED_ON` is missing, or does not behave as dami expects."""
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():  # whatever the caller's context is
        upstream.check(group, RELIED_ON[group], TESTED, f"dami {__version__}")


def needs(group: str) -> Callable[[F], F]:
    """Makes a function of this file check a group before it first runs."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            check(group)
            return function(*args, **kwargs)

        return cast(F, run)

    return decorate


# torch: needed by every part of dami

check("dami")

from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # noqa: E402  (checked above)
from torch.utils._pytree import tree_flatten as tree_flatten  # noqa: E402
from torch.utils._pytree import tree_map as tree_map  # noqa: E402
from torch.utils._pytree import tree_unflatten as tree_unflatten  # noqa: E402

PARAMETERS = "_parameters"  # attribute of a module
OF_MODULES = (PARAMETERS, "_buffers", "_modules")  # attributes that hold what is registered in a module
FLAT_WEIGHTS = "_flat_weights"  # attribute of torch's recurrent layers, rebuilt from their parameters in each pass
OF_ONE_OBJECT = ("_compiled_call", "_cached_continuous_batching_manager")  # attributes of a model that copies leave out


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Returns a module's own dict of parameters by name, including those registered as None: not a copy."""
    return module._parameters


def has_pre_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that run before its forward and could change its input."""
    return bool(module._forward_pre_hooks or torch.nn.modules.module._global_forward_pre_hooks)


def changes_of(tensor: Tensor) -> int:
    """Returns how often a tensor was changed in place. Raises RuntimeError for an inference tensor: it has no count."""
    return tensor._version


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Returns a module's own dict of buffers, as `parameters_of` does."""
    return module._buffers


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """Returns a module's hooks that run after its forward, and those that run before it."""
    return module._forward_hooks, module._forward_pre_hooks


@needs("a patched model")
def pruned_name(pruning: Any) -> str:
    """Returns the name of the parameter that a hook of `torch.nn.utils.prune` computes."""
    return pruning._tensor_name


def in_backward() -> bool:
    """Whether this thread is in a backward pass."""
    return torch._C._current_graph_task_id() != -1


def storageless(cls: type[T], shape: torch.Size, dtype: torch.dtype, device: torch.device) -> T:
    """Returns a tensor of a subclass that has no storage of its own."""
    return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


# accelerate: hooks that move a module's parameters to the device where it computes

HOOKED = "_hf_hook"  # attribute of a module that has a hook


def hook_of(module: nn.Module) -> Any:
    """Returns accelerate's hook on a module, or None."""
    return vars(module).get(HOOKED)


@needs("a patched model")
def is_wrapped(module: nn.Module) -> bool:
    """Whether accelerate has wrapped a module's forward in one of its own."""
    return "_old_forward" in vars(module)


def rewrap(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Makes accelerate's wrapper of a module's forward, if there is one, call another forward."""
    if is_wrapped(module):
        module._old_forward = forward.__get__(module)


def asked_by_hook(module: nn.Module) -> bool:
    """Whether a hook of accelerate is reading an attribute; to be called by the module's `__getattr__`."""
    return HOOKED in vars(module) and sys._getframe(2).f_globals["__name__"].startswith("accelerate.")


@needs("an offloaded pair")
def execution_device(module: nn.Module) -> torch.device | None:
    """Returns the device on which an offloaded module computes, by the first hook that sets one; None if none does.

    accelerate's `cpu_offload` and `disk_offload` set it only on the modules that have parameters of their own.
    """
    for each in module.modules():
        hook = hook_of(each)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


@needs("an offloaded pair")
def offloading(module: nn.Module) -> Iterator[tuple[MutableMapping[str, Tensor], str, int | str | torch.device]]:
    """Yields where hooks get a module's weights: a mapping by name, the prefix of its names, and the device to use."""
    hook = hook_of(module)
    for each in getattr(hook, "hooks", (hook,)):  # several in sequence, or one
        weights = getattr(each, "weights_map", None)
        if weights is not None:
            held = getattr(weights, "dataset", weights)
            held = getattr(held, "state_dict", held)  # a loader from files looks there first
            yield held, getattr(weights, "prefix", ""), each.execution_device


# transformers: models

# attributes that hold checkpoint functions: of transformers' layers, and of torch's wrappers, which FSDP uses
CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")


@needs("a patched model")
def attention_of(model: PreTrainedModel) -> str:
    """Returns the name of the attention implementation that a model uses."""
    return model.config._attn_implementation


@needs("a patched model")
def is_stateful(model: nn.Module) -> bool:
    """Whether a model's cache holds more than keys and values."""
    return getattr(model, "_is_stateful", False)


@needs("a patched model")
def ties_of(model: PreTrainedModel) -> dict[str, str]:
    """Maps the names of weights that a model ties, if its config asks for it, to the names of their sources."""
    return dict(model._tied_weights_keys or {})


@needs("a patched model")
def tie_weights(model: PreTrainedModel) -> None:
    """Ties weights as the config asks. transformers keeps all models from doing that while it loads one."""
    for target, source in model.all_tied_weights_keys.items():
        holder, _, name = target.rpartition(".")
        setattr(model.get_submodule(holder), name, model.get_parameter_or_buffer(source))


@needs("a patched model")
def ignored_keys(model: PreTrainedModel) -> list[str]:
    """Returns patterns of the tensors that a model's checkpoints may hold but the model does not read."""
    return list(model._keys_to_ignore_on_load_unexpected or ())


def describes_experts(module: nn.Module) -> bool:
    """Whether a module of experts has the attributes that transformers' implementations of experts need."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "_apply_gate"))


def gated(experts: Any, x: Tensor) -> Tensor:
    """Applies the gate of a module of experts to the product of its first weights."""
    return experts._apply_gate(x)


@needs("an alignment of neurons")
def compute_experts_one_by_one(config: PreTrainedConfig) -> None:
    """Makes a model compute its experts with its own code, which works in any dtype."""
    config._experts_implementation = "eager"


@needs("the loading of a packed pair")
def keep_from_initialization(tensor: Tensor) -> None:
    """Marks a tensor so that transformers does not initialise it."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]


# transformers: tensor parallelism


@needs("tensor parallelism of a pair")
def local_parameters(module: nn.Module) -> AbstractContextManager[None]:
    """Replaces a module's parameters with this process's parts of them for the duration of a `with` block."""
    from transformers.distributed.parallel_utils import _use_local_dtensor_params

    return _use_local_dtensor_params(module)


@needs("tensor parallelism of a pair")
def local_shape_and_offset(tensor: DTensor, mesh: DeviceMesh) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shape of this process's part of a tensor, and its offset in the tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)


# transformers: compiled decoding

HOOKS = "_forward_hooks"  # attribute of a module
HOOKS_AROUND = (  # attributes that hold the hooks which run before and after a module's forward
    HOOKS,
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
CAPTURES = "_output_capturing_hooks_installed"  # attribute of a model whose modules have hooks that record outputs
LAYER_INDEX = "layer_idx"  # attribute of the modules of a layer that read or write the cache
KEPT_BY_GENERATE = ("_previous_max_cache_length",)  # attributes of a model that `generate` sets


@needs("compiled decoding")
def for_any_device(config: C) -> C:
    """Makes transformers compile on the CPU, too."""
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


def captures_outputs(hook: Callable[..., Any]) -> bool:
    """Whether transformers has put a hook on a module to record outputs, such as attention weights."""
    return getattr(hook, "__module__", None) == CAPTURING


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run before or after a module's forward, other than those which record outputs."""
    after = [*module._forward_hooks.values(), *torch.nn.modules.module._global_forward_hooks.values()]
    return has_pre_hooks(module) or not all(map(captures_outputs, after))


def forget_captures(model: nn.Module) -> None:
    """Takes off the hooks that record outputs, which no pickle can hold; transformers puts them on when needed."""
    modules = [*model.modules()]
    if not any(CAPTURES in vars(module) for module in modules):
        return
    for module in modules:
        vars(module).pop(CAPTURES, None)
        hooks = vars(module)[HOOKS]
        for key in [key for key, hook in hooks.items() if captures_outputs(hook)]:
            del hooks[key]


@needs("compiled decoding")
def unsupported() -> type[Exception]:
    """Returns the error that torch raises where it cannot make one graph of a function."""
    from torch._dynamo.exc import Unsupported

    return Unsupported


@needs("compiled decoding")
def without_recompile_limit() -> AbstractContextManager[Any]:
    """Lets torch compile a function for any number of batch sizes and cache lengths; it would fail at the ninth."""
    from torch._dynamo import config

    return config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize)


@needs("compiled decoding")
def compiler(options: dict[str, Any]) -> Callable[..., Any]:
    """Returns torch's compiler: (graph, inputs, wrap) → what it makes of a graph, as a backend of `torch.compile` does.

    `wrap` is called with the code itself, without what torch does before and after it, and returns what takes its
    place. Code takes a list of arguments, which it empties, and returns a sequence of results.
    """
    from torch._functorch import config
    from torch._inductor import compile_fx

    def compile(graph: Any, inputs: Any, wrap: Callable[..., Any]) -> Any:
        def compile_inner(*args: Any, **named: Any) -> Any:
            compiled: Any = compile_fx.compile_fx_inner(*args, **named)
            compiled.current_callable = wrap(compiled.current_callable)
            return compiled

        with config.patch(enable_autograd_cache=False):  # what it restores does not come from `compile_inner`
            return compile_fx.compile_fx(graph, inputs, inner_compile=compile_inner, config_patches=options)

    return compile


@needs("compiled decoding")
def graph_pass(change: Callable[[Graph], None]) -> dict[str, Any]:
    """Returns the option by which torch's compiler calls a function with each graph before it makes code of it."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Pass(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            change(graph)

        def uuid(self) -> Any:
            return get_hash_for_files((inspect.getfile(change),))

    return {"post_grad_custom_pre_pass": Pass()}


@needs("compiled decoding")
def compiles_steps(model: Any, config: CompileConfig) -> bool:
    """Whether transformers compiles the steps of a model with a static cache."""
    from transformers import StaticCache

    if not model._supports_default_dynamic_cache():
        return False
    cache = StaticCache(config=model.config, max_cache_len=1)
    wanted = copy.copy(model.generation_config)
    wanted.compile_config, wanted.disable_compile = config, False
    return model._valid_auto_compile_criteria({"cache": cache, "past_key_values": cache}, wanted)


# transformers: the pass that reads a prompt


@needs("a prompt at another intensity")
def mask_width(config: GenerationConfig) -> int:
    """Returns the width of the attention mask that `generate` has dropped, as it held no padding; -1 if it has not."""
    return getattr(config, "_mask_length", -1)


# transformers: continuous batching


def replace_method(owner: Any, name: str, method: Callable[..., Any]) -> None:
    """Makes one object of transformers call a function of dami instead of its method."""
    assert callable(getattr(owner, name))
    setattr(owner, name, method)


@needs("continuous batching of a pair")
def widen_arguments(
    outputs: ContinuousBatchingIOs | ContinuousBatchingAsyncIOs, more: Callable[[], dict[str, Any]]
) -> None:
    """Makes a step pass the arguments of the logits processors for each token; transformers does for each sequence.

    Args:
        outputs: what prepares the arguments of a step.
        more: returns further arguments of a step.
    """
    pairs = getattr(outputs, "io_pairs", None)
    for inputs in [outputs] if pairs is None else [pair.device_io for pair in pairs]:
        _widen(inputs, more)


def _widen(inputs: Any, more: Callable[[], dict[str, Any]]) -> None:
    narrow = inputs.get_model_kwargs

    def get_model_kwargs(*args: Any, **options: Any) -> Any:
        arguments = narrow(*args, **options)
        tokens = arguments["input_ids"].shape[1]
        arguments["logits_processor_args"] = inputs._bulk_input_tensor[inputs.static_inputs :, :tokens]
        return arguments | more()

    replace_method(inputs, "get_model_kwargs", get_model_kwargs)


@needs("continuous batching of a pair")
def filter_waiting(scheduler: Scheduler, kept: Callable[[list[RequestState]], list[RequestState]]) -> None:
    """Makes a scheduler consider only the requests that `kept` returns of those that wait."""
    all_of_them = scheduler._get_waiting_candidates
    replace_method(scheduler, "_get_waiting_candidates", lambda: kept(all_of_them()))


@needs("continuous batching of a pair")
def order_candidates(scheduler: Scheduler, ordered: Callable[[list[RequestState], int], list[RequestState]]) -> None:
    """Makes a scheduler take requests in the order that `ordered` gives them, which also gets the step's tokens."""
    process = scheduler._process_candidates

    def process_candidates(candidates: list[RequestState], token_budget: int, *args: Any) -> Any:
        return process(ordered(candidates, token_budget), token_budget, *args)

    replace_method(scheduler, "_process_candidates", process_candidates)


@needs("continuous batching of a pair")
def block_keys(tokens: list[int], page: int, blocks: int) -> list[int]:
    """Returns the keys by which transformers looks up a sequence's first `blocks` blocks, of `page` tokens each."""
    from transformers.generation.continuous_batching.cache_allocators.cache_allocator import compute_block_hash

    keys: list[int] = []
    for start in range(0, blocks * page, page):
        keys.append(compute_block_hash(keys[-1] if keys else None, tokens[start : start + page]))
    return keys


@needs("continuous batching of a pair")
def forget_handler(router: OutputRouter, request_id: str) -> None:
    """Undoes `register_result_handler`."""
    with router._lock:
        router.result_handlers.pop(request_id, None)


# PEFT


@needs("PEFT adapters on a pair")
def adapter_classes() -> tuple[type[nn.Module], ...]:
    """Returns the classes of modules with which PEFT wraps others."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return cast(tuple[type[nn.Module], ...], (BaseTunerLayer, AuxiliaryTrainingWrapper))


@needs("PEFT adapters on a pair")
def before_merging(guard: Callable[[nn.Module], None]) -> None:
    """Makes PEFT call `guard` with a model before it merges an adapter into it; later calls change nothing."""
    from peft.tuners.tuners_utils import BaseTuner

    original = BaseTuner._check_merge_allowed
    if hasattr(original, "guarded_by_dami"):
        return

    @functools.wraps(original)
    def guarded(self: BaseTuner) -> None:
        guard(self.model)
        original(self)

    guarded.guarded_by_dami = True  # type: ignore[attr-defined]
    BaseTuner._check_merge_allowed = guarded  # type: ignore[method-assign]
