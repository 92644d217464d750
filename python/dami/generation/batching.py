"""Adds λ to transformers' continuous batching. `init_continuous_batching` of a patched model returns a `LerpManager`.

A request's λ, with that of its prompt, is among its `logit_processor_kwargs`, which transformers carries along with
the request (queue, fork, eviction, ranks of a tensor-parallel group). In each step, the λ of every token is written
after the arguments of the logits processors, in static storage, from where `packed_lam` takes it on the device.
"""

from __future__ import annotations

import inspect
import numbers
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching import cb_logits_processors, continuous_api
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState

from dami import upstream
from dami.callers import AUTO, CALLERS, Caller
from dami.dial.patch import patch_of
from dami.dial.values import Intensity
from dami.generation import attention
from dami.generation.choices import Choice, Choices
from dami.generation.courses import course_of
from dami.generation.paging import Tables, can_read_pages
from dami.generation.prefixes import blocks_in_use, key_blocks, read_once
from dami.generation.reading import TAIL, Reading
from dami.generation.sampling import Sampler
from dami.generation.scheduling import let_short_prompts_pass, unblock_after_cancellations
from dami.generation.steering import check_tail, tails_of
from dami.keywords import check_keywords
from dami.layers.base import LerpModule

HONOURED = {
    "max_new_tokens", "max_length", "eos_token_id", "num_return_sequences", "do_sample", "temperature", "top_k",
    "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "suppress_tokens", "remove_invalid_values",
    "renormalize_logits",
}  # fmt: skip  # supported settings of a generation config; from do_sample on, they depend on one row of logits only
IDLE = {
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile",
    "prefill_chunk_size", "continuous_batching_config", "low_memory", "pad_token_id", "bos_token_id",
    "decoder_start_token_id", "return_dict_in_generate", "early_stopping", "length_penalty", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "speculation_type", "assistant_confidence_threshold",
    "assistant_lookbehind", "target_lookbehind", "assistant_early_exit", "assistant_ensemble_weight",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "transformers_version", "_from_model_config",
}  # fmt: skip  # settings that change no token, or only together with another setting
NEUTRAL = {
    "num_beams": 1, "num_beam_groups": 1, "repetition_penalty": 1, "encoder_repetition_penalty": 1, "guidance_scale": 1,
    "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "penalty_alpha": 0, "diversity_penalty": 0,
}  # fmt: skip


LAM_KEYWORDS = ("intensity", "prompt_intensity", "prompt_tail")


@dataclass(frozen=True)
class StepLoad:
    """The load of the generation loop in one step, or while it is idle.

    Attributes:
        waiting: requests that no step has started yet.
        running: requests that hold blocks.
        rows: requests in this step.
        tokens: tokens computed in this step.
        blocks: share of the KV cache that requests hold, 0 to 1.
        seconds: time this step took.
    """

    waiting: int
    running: int
    rows: int
    tokens: int
    blocks: float
    seconds: float


Lams = tuple[float, float | None, int | None]  # a request's `intensity`, `prompt_intensity` and `prompt_tail`


class Prompts(list[Any]):
    """Prompts with their λ, passed through transformers' `generate_batch`."""

    def __init__(self, prompts: Sequence[Any], lams: Sequence[Lams]) -> None:
        super().__init__(prompts)
        self.lams = lams


def lams_of_prompts(
    prompts: int, intensities: Sequence[float], prompt_intensity: Any, prompt_tail: Any, caller: Caller, model: Any
) -> list[Lams]:
    """Returns the λ of each prompt.

    Args:
        prompts: number of prompts.
        intensities: λ of each answer.
        prompt_intensity: λ of the prompts: a number or a preset, or one per prompt; None for that of the answers.
        prompt_tail: as in `tails_of`; None for 1.
        caller: for error messages.
        model: a patched model.

    Raises:
        TypeError, ValueError: an argument is none of these.
    """
    check_tail(prompt_intensity, prompt_tail)
    if prompt_intensity is None:
        return [(lam, None, None) for lam in intensities]
    tails = tails_of(TAIL if prompt_tail is None else prompt_tail, prompts)
    caller = replace(caller, argument="prompt_intensity", takes=caller.takes - {AUTO})
    read = Intensity.parse(prompt_intensity, caller, patch_of(model).presets, prompts).each(prompts)
    return list(zip(intensities, read, tails, strict=True))


class LerpManager(continuous_api.ContinuousBatchingManager):
    """transformers' manager, with a λ for each request."""

    parts: dict[str, Any]  # λ of the modules that had a λ of their own, by `dami.intensity`, when the loop began
    sampler: Sampler | None
    _original_attn_impl: str | None  # type: ignore[assignment]  # transformers': the model's attention before setup
    on_step: Callable[[StepLoad], None] | None

    @classmethod
    def of(cls, manager: continuous_api.ContinuousBatchingManager) -> LerpManager:
        """Turns a patched model's manager into an instance of this class.

        Raises:
            ImportError: this version of transformers lacks something that is needed.
            ValueError: the model cannot run packed rows at several λ.
        """
        if isinstance(manager, cls):
            return manager
        upstream.check("continuous batching of a pair")
        manager.__class__ = cls
        lerped = cast(LerpManager, manager)
        lerped.parts = {}
        lerped.sampler = lerped.on_step = None
        lerped.logit_processor = LerpProcessors(manager.logit_processor.logits_processor)
        try:
            check_packed(manager.model)
            lerped.switch_to_cb_friendly_attn(manager.model, manager.continuous_batching_config.auto_switch_to_flash)
        except BaseException:
            if lerped._original_attn_impl is not None:
                manager.model.set_attn_implementation(lerped._original_attn_impl)
            raise
        return lerped

    def sample_per_request(self) -> None:
        """Lets each request set its own `Sampling`, by `add_request(…, sampling=…)`, and ask for log-probabilities.

        Call it before `start`, on a manager that decodes greedily and batches synchronously.
        """
        kept = None
        if self.captures:
            rows, vocabulary = self.continuous_batching_config.max_requests_per_batch, _head_of(self.model)
            kept = torch.zeros(cast(int, rows), vocabulary, dtype=torch.float32, device=self.model.device)
        self.sampler = Sampler(kept)
        self.logit_processor = LerpProcessors([*self.logit_processor.logits_processor, *self.sampler.processors])

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        super().switch_to_cb_friendly_attn(model, auto_switch_to_flash)
        chosen = upstream.attention_of(model)
        if auto_switch_to_flash and chosen in ("sdpa", "paged|eager"):
            original = self._original_attn_impl or chosen
            model.set_attn_implementation(self._attention(patch_of(model).running.invariant))
            self._original_attn_impl = original
        elif chosen == "paged|eager" and getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
            raise ValueError("attn_implementation 'eager' leaves out soft caps in continuous batching: use the default")
        patch_of(model).attention = self._original_attn_impl

    @property
    def captures(self) -> bool:
        """Whether steps are captured as CUDA graphs."""
        return any(self.continuous_batching_config.cuda_graph_booleans)

    def _attention(self, invariant: bool) -> str:
        if invariant and self.captures:
            raise ValueError("use_cuda_graph must be False for a pair loaded with invariant=True, got True")
        return attention.INVARIANT if invariant else attention.CAPTURED if self.captures else attention.NAME

    def _reads_pages(self, processor: continuous_api.ContinuousBatchProcessor) -> bool:
        """Whether attention is dami's own, and can read keys and values where they lie in the cache."""
        own = upstream.attention_of(cast(Any, self.model)) in (attention.NAME, attention.INVARIANT)
        return own and can_read_pages(processor)

    def start(self) -> None:
        """Like transformers' own. Raises RuntimeError if another thread runs the model."""
        if self.is_running():
            super().start()  # reports that it is running already
        else:
            patch_of(self.model).hold.start_batching(super().start)

    def stop(self, *args: Any, **options: Any) -> None:
        super().stop(*args, **options)
        patch_of(self.model).attention = self._original_attn_impl

    def _run_generation_loop(self, *args: Any, **options: Any) -> None:
        with patch_of(self.model).hold.batching():
            super()._run_generation_loop(*args, **options)

    @contextmanager
    def pause(self) -> Iterator[None]:
        with super().pause(), patch_of(self.model).hold.paused():
            yield

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        *args: Any,
        intensity: float | str | None = None,
        prompt_intensity: float | str | None = None,
        prompt_tail: int | None = None,
        choice: Choice | None = None,
        **options: Any,
    ) -> str | None:
        """Like transformers' own.

        Args:
            input_ids: token ids of the prompt, at least one, all in the model's vocabulary.
            intensity: λ of the request, a finite number or a preset's name; by default, the model's current λ.
            prompt_intensity: λ at which the prompt is read, a number or a preset; by default, `intensity`. Requests
                at any `intensity` share the blocks of a prompt's beginning that was read at the same λ.
            prompt_tail: how many tokens at the end of the prompt are read at `intensity` all the same; 1 by default.
                With 0, the answer's first token follows from `prompt_intensity`.
            choice: chooses λ when the prompt has been read, at `intensity`; it has the tail. None to choose nothing.
            request_id, max_new_tokens, args, options: as in transformers. Without `max_new_tokens`, the config's
                `max_length` applies as it does in `generate`.

        Raises:
            TypeError, ValueError: `intensity` or `prompt_intensity` is not one finite number or a preset,
                `prompt_tail` is not an integer of at least 0, the prompt is not a list of the model's tokens that
                leaves room for an answer, or this manager does not allow a choice.
        """
        caller = CALLERS["add_request"]
        check_keywords("add_request", options, *LAM_KEYWORDS)
        check_tail(prompt_intensity, prompt_tail)
        lam, [tail] = self._parse(intensity, caller).one, tails_of(TAIL if prompt_tail is None else prompt_tail, 1)
        read = None
        if prompt_intensity is not None:
            read = self._parse(prompt_intensity, replace(caller, argument="prompt_intensity")).one
        room = check_prompt(self.model, self.generation_config, input_ids, max_new_tokens, "input_ids")
        if choice is not None:
            if not self.can_choose(choice.tail):
                raise ValueError(f"choice must be None for this manager, which has no use for one, got {choice!r}")
            options["choice"] = choice
        options |= Reading.of_prompt(len(input_ids), lam, read, tail).arguments
        return super().add_request(input_ids, request_id, room, *args, **options)

    def can_choose(self, tail: int) -> bool:
        """Whether a request may choose its λ when its prompt is read, and go back by so many tokens.

        A captured step shows no states, an asynchronous one has begun the next, and a cache of sliding windows has
        lost what the tokens before a longer tail saw.
        """
        if self.batch_processor is None:
            self.warmup()
        kinds = cast(Any, self.batch_processor).cache.cache_allocators
        return (
            not self.captures
            and not self.continuous_batching_config.use_async_batching
            and (tail <= 1 or all(each.supports_block_sharing for each in kinds.values()))
        )

    def add_requests(
        self,
        inputs: list[list[int]],
        *args: Any,
        intensity: Any = None,
        prompt_intensity: Any = None,
        prompt_tail: Any = None,
        **options: Any,
    ) -> list[str]:
        """Like transformers' own, with the arguments of `add_request`, each one for all prompts or one per prompt.

        Raises:
            TypeError, ValueError: `intensity`, `prompt_intensity` or `prompt_tail` is none of these.
        """
        check_keywords("add_requests", options, *LAM_KEYWORDS)
        caller, prompts = CALLERS["add_requests"], len(inputs)
        if isinstance(inputs, Prompts):
            lams = inputs.lams
        else:
            each = self._parse(intensity, caller, prompts).each(prompts)
            lams = lams_of_prompts(prompts, each, prompt_intensity, prompt_tail, caller, self.model)
        ids = [""] * prompts
        for lam in dict.fromkeys(lams):
            places = [place for place, each in enumerate(lams) if each == lam]
            options |= dict(zip(LAM_KEYWORDS, lam, strict=True))
            alike = super().add_requests([inputs[place] for place in places], *args, **options)
            for place, name in zip(places, alike, strict=True):
                ids[place] = name
        return ids

    def _parse(self, intensity: Any, caller: Caller, prompts: int | None = None) -> Intensity:
        """Parses the λ of requests; by default, it is the model's current λ."""
        patch = patch_of(self.model)
        return Intensity.parse(patch.dial.lam if intensity is None else intensity, caller, patch.presets, prompts)

    def _create_batch_processor(self) -> continuous_api.ContinuousBatchProcessor:
        before = self.batch_processor
        processor = super()._create_batch_processor()
        if processor is not before:
            key_blocks(processor)
            read_once(processor)
            upstream.widen_arguments(processor.inputs_and_outputs, Choices(processor).arguments)
            if self._reads_pages(processor):
                upstream.widen_arguments(processor.inputs_and_outputs, Tables(processor).arguments)
            let_short_prompts_pass(processor.scheduler)
            unblock_after_cancellations(processor.scheduler)
            if self.sampler is not None:
                self.sampler.report_through(processor.inputs_and_outputs)
        modules = [module for module in self.model.modules() if isinstance(module, LerpModule) and module.lerp.part]
        parts = {module.lerp.name: module.lerp.lam.tolist() for module in modules}
        if processor is before and parts != self.parts:
            processor.cache.free_all_requests(clear_ledgers=True)  # its blocks were computed at another λ
        self.parts = parts
        return processor

    def _generation_loop_body(
        self, batch_processor: continuous_api.ContinuousBatchProcessor, bootstrapping: bool
    ) -> bool:
        start, before = time.perf_counter(), self.current_batch
        goes_on = super()._generation_loop_body(batch_processor, bootstrapping)
        if self.on_step is not None:
            scheduler, stepped = batch_processor.scheduler, self.current_batch > before
            states = cast(Any, batch_processor.inputs_and_outputs).requests_in_batch if stepped else []
            self.on_step(
                StepLoad(
                    waiting=self.input_queue.qsize() + len(scheduler.waiting_requests),
                    running=len(scheduler.active_requests),
                    rows=len(states),
                    tokens=sum(state.query_length for state in states),
                    blocks=blocks_in_use(batch_processor.cache),
                    seconds=time.perf_counter() - start if stepped else 0.0,
                )
            )
        return goes_on


def _head_of(model: Any) -> int:
    """Returns how many logits a model computes for a token."""
    return model.get_output_embeddings().weight.shape[0]


class LerpProcessors(cb_logits_processors.ContinuousBatchingLogitsProcessorList):
    """transformers' list of logits processors, with the λ of every token of a step as an additional last row.

    λ cannot be a processor of its own, because processors see only the requests that get a token in the step.
    """

    def __init__(self, processors: Iterable[Any]) -> None:
        """Takes `processors` from transformers' own list, which has already dropped those it does not support."""
        super().__init__(LogitsProcessorList())
        self.logits_processor.extend(processors)
        per_request = [each for each in self.logits_processor if isinstance(each, ContinuousBatchingLogitsProcessor)]
        for each in per_request:
            self.supported_keys |= each.supported_kwargs
            self.ignored_keys |= {*each.ignored_kwargs}
        self.supported_keys |= {"intensity": float, "earlier": tuple, "choice": Choice}
        self.tensors_required = len(per_request) + 1
        self.do_processing = len(self.logits_processor) > 0

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        super().fill_defaults(int32_tensor)
        int32_tensor[-1].zero_()

    def prepare_tensor_args(self, requests_in_batch: list[FutureRequestState], arg_storage: Tensor) -> Tensor:
        for request in requests_in_batch:
            course = course_of(request.state)
            if course is not None and request.has_new_token:
                course.follow(request.state)
        super().prepare_tensor_args(requests_in_batch, arg_storage)
        lam: list[float] = []
        for request in requests_in_batch:
            end = request.state.position_offset  # which counts the tokens of this step already
            lam += Reading.of(request.state).lam(end - request.query_length, end)
        arg_storage[-1, : len(lam)] = torch.tensor(lam, dtype=torch.float32).view(torch.int32).to(arg_storage.device)
        return arg_storage


def check_config(config: GenerationConfig) -> None:
    """Raises ValueError for settings of a generation config that continuous batching would ignore."""
    for name, value in config.to_dict().items():
        unused = value is None or value is False or value == NEUTRAL.get(name)
        if not unused and name not in HONOURED | IDLE:
            raise ValueError(
                f"generation_config.{name} must be left out, which continuous batching does not have, got {value!r}"
            )


def check_prompt(
    model: Any, config: GenerationConfig, prompt: Any, max_new_tokens: int | None, name: str
) -> int | None:
    """Returns how many tokens the answer to a prompt may have, None for no limit.

    Raises:
        TypeError, ValueError: the prompt, called `name` in the message, is not a list of token ids, or leaves no room.
    """
    wanted = f"{name} must be a list of token ids, one at least"
    kinds = {*map(type, prompt)} if isinstance(prompt, (list, tuple)) else {bool}
    if not all(issubclass(kind, numbers.Integral) and kind is not bool for kind in kinds):
        raise TypeError(f"{wanted}, got {prompt!r:.60}")
    if not prompt:
        raise ValueError(f"{wanted}, got none")
    vocabulary = model.get_input_embeddings().num_embeddings
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        raise ValueError(f"{name} must be from 0 to {vocabulary - 1}, got {min(prompt)} to {max(prompt)}")
    limit, room = "max_new_tokens", config.max_new_tokens if max_new_tokens is None else max_new_tokens
    if room is None and config.max_length is not None:
        limit, room = f"max_length less the {len(prompt)} tokens of {name}", config.max_length - len(prompt)
    if room is not None and room < 1:
        raise ValueError(f"{limit} must be at least 1, got {room}")
    return room


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Returns prompts as inputs of `generate`: `input_ids` and `attention_mask` [prompts, length], left-padded."""
    length = max(map(len, prompts), default=0)
    ids = [[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def packed_lam(inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Returns the λ of every token of a packed row, float32 [tokens], and of the tokens whose logits are kept.

    The second is None if `logits_to_keep` is not a tensor. Tokens that only pad the row have any λ.

    Args:
        inputs: the arguments that continuous batching passes to the model's forward pass.
    """
    lam = inputs["logits_processor_args"][-1].view(torch.float32)
    kept = inputs.get("logits_to_keep")
    return lam, lam[kept] if isinstance(kept, Tensor) else None


@torch.no_grad()
def check_packed(model: Any) -> None:
    """Runs three sequences as one packed row, with λ = NaN for the second: only its own logits must become NaN.

    Raises:
        ValueError: other logits become NaN or its own do not, or a module does not support packed rows.
    """
    patch = patch_of(model)
    if patch.packs:
        return
    before = upstream.attention_of(model)
    sizes = {value for value in model.config.get_text_config().to_dict().values() if isinstance(value, int)}
    tokens = next(number for number in count(9) if number not in sizes)  # for `LerpModule._packed_rows`
    lengths = (tokens - 3, 2, 1)
    begins = torch.tensor([0, tokens - 3, tokens - 1, tokens], dtype=torch.int32, device=model.device)
    lam = torch.tensor([0.0, float("nan"), 1.0], dtype=torch.float32, device=model.device)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    last = {"logits_to_keep": begins[1:].long() - 1} if keeps else {}
    model.set_attn_implementation(attention.NAME)
    apart = [(m.lerp, m.lerp.part) for m in model.modules() if isinstance(m, LerpModule)]
    try:
        for lerp, _ in apart:
            lerp.part = None  # a single λ for this module would hide errors in assigning tokens
        logits = model(
            input_ids=torch.arange(3, 3 + tokens, device=model.device).unsqueeze(0),
            position_ids=torch.tensor([[place for length in lengths for place in range(length)]], device=model.device),
            cu_seq_lens_q=begins,
            cu_seq_lens_k=begins,
            logits_processor_args=lam.repeat_interleave(begins.diff()).view(torch.int32).unsqueeze(0),
            use_cache=False,
            **last,
        ).logits
    finally:
        for lerp, part in apart:
            lerp.part = part
        model.set_attn_implementation(before)
    missing = logits[0].isnan()
    reached = torch.tensor([False, bool(apart), False], device=model.device)  # ends that are the same have no λ
    if not last:
        reached = reached.repeat_interleave(begins.diff())
    if not torch.equal(missing.all(1), reached) or not torch.equal(missing.any(1), reached):
        raise ValueError(
            f"{type(model).__name__} cannot be batched continuously at several λ: one reaches other sequences"
        )
    patch.packs = True
