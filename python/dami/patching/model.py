"""The class of a patched model: `forward` and `generate` of the original, with an `intensity`."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import transformers
from packaging.version import Version
from torch import Tensor, is_grad_enabled, nn

from dami.dial import turning as dials
from dami.dial.choosing import named, resolved
from dami.dial.patch import Patch, patch_of
from dami.dial.turning import check_rows
from dami.dial.values import as_lam
from dami.generation.steering import course_of
from dami.keywords import OURS, check_keywords
from dami.layers.base import LerpModule, Recipe, check_dtypes, rebuild, recipe_of, runs_again
from dami.layers.checkpointing import checkpointing, checkpoints
from dami.layers.peft import check_adapters, guard_merging
from dami.patching.independence import check_independence
from dami.saving.directory import push, save

M = TypeVar("M", bound=nn.Module)


class LerpModel(nn.Module):
    """What a patched model has beside the methods of its original class, of which it is the first parent.

    The original's `forward` and `generate_batch` take one more keyword, `intensity`; its `generate` takes `intensity`
    and `prompt_intensity`.
    """

    dami_patch: Patch

    @property
    def device(self) -> Any:
        """Where the model computes: its parameters may be offloaded, and then are on no device."""
        device, hook = next(self.parameters()).device, getattr(self, "_hf_hook", None)
        return hook.execution_device if hook is not None and device.type == "meta" else device

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "peft_config":  # PEFT sets it when it puts an adapter on the model
            guard_merging()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        check_dtypes(self, fn)  # before any module has changed
        return super()._apply(fn, recurse)

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """As transformers' own, with all that `from_pretrained` needs to load the pair, and a model card."""
        save(self, save_directory, super().save_pretrained, **options)  # type: ignore[misc]  # of the other parent

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """As transformers' own, for all that `dami.save_pair` writes."""
        return push(self, repo_id, **options)  # type: ignore[arg-type]

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """As transformers' own where it changes no size; ValueError where it would resize one of two ends."""
        ends: list[Any] = [self.get_input_embeddings(), self.get_output_embeddings()]  # type: ignore[operator]
        now = wanted = ends[0].weight.shape[0]
        if new_num_tokens is not None:
            wanted = new_num_tokens
        if pad_to_multiple_of is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted != now and any(isinstance(module, LerpModule) for module in ends):
            raise ValueError(
                f"new_num_tokens must be {now}, as many as both ends of the pair have, got {wanted}: call "
                "resize_token_embeddings on both models, and patch them then"
            )
        return super().resize_token_embeddings(  # type: ignore[misc]  # of the other parent
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if not name.startswith(OF_ONE_OBJECT)}
        return rebuild, (recipe_of(type(self)),), state


@functools.cache
def patched_model_class(original: Any) -> type[LerpModel]:
    """The class of a patched model. It keeps its name, by which transformers looks up a good deal."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, intensity: Any = None, **kwargs: Any) -> Any:
        check_keywords("forward", kwargs, "intensity")
        if isinstance(intensity, Mapping):
            with dials.intensity(self, intensity):
                return forward(self, *args, **kwargs)
        if self.dami_patch.course is None:
            check_adapters(self)
        if "logits_processor_args" in kwargs:
            return _packed_forward(self, original.forward, args, kwargs)
        sequences = _sequences(self, args, kwargs)
        dial = self.dami_patch.dial
        lam = dial.lam.to(self.device) if intensity is None else as_lam(named(self, intensity), self.device, sequences)
        check_rows(self.dami_patch, lam, sequences)
        if lam.dim() == 1 and len(lam) > 1:
            media = [n for n in kwargs if MEDIA.search(n) and n != self.main_input_name and kwargs[n] is not None]
            if media:
                raise ValueError(f"{media[0]} takes one intensity for the batch: whose it is, its shape does not tell")
            if not self.dami_patch.checked and not torch.compiler.is_compiling():
                check_independence(self, original.forward)
                self.dami_patch.checked = True
        running, (batch, tokens) = self.dami_patch.running, _batch(args, kwargs)
        before = dial.lam, dial.rest, running.sequences, running.tokens
        dial.lam, dial.rest = lam, dial.lam if dial.rest is None else dial.rest
        running.sequences, running.tokens = batch, tokens
        try:
            if torch.compiler.is_compiling() or not is_grad_enabled() or not checkpoints(self):
                return original.forward(self, *args, **kwargs)
            with checkpointing(self):
                return original.forward(self, *args, **kwargs)
        finally:
            dial.lam, dial.rest, running.sequences, running.tokens = before

    @functools.wraps(original.forward)
    def held_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        if kwargs.get("intensity") is None and runs_again():
            raise RuntimeError(
                "the model runs again in the backward pass, as a checkpoint does it, where λ may be another: "
                "give it λ as an argument, model(…, intensity=…), or checkpoint its layers, "
                "model.gradient_checkpointing_enable()"
            )
        with self.dami_patch.hold:
            return forward(self, *args, **kwargs)

    members: dict[str, Any] = {"__module__": original.__module__, "__doc__": original.__doc__}
    members["recipe"] = Recipe(patched_model_class, (original,))
    members["forward"] = _with(held_forward, original.forward, "intensity")
    if hasattr(original, "generate"):

        @functools.wraps(original.generate)
        def generate(self: Any, *args: Any, intensity: Any = None, prompt_intensity: Any = None, **kwargs: Any) -> Any:
            check_keywords("generate", kwargs, *OURS)
            check_adapters(self)
            options = inspect.signature(original.generate).bind(self, *args, **kwargs).arguments
            options |= options.pop("kwargs", {})
            prompts = _sequences(self, args, kwargs) or 1
            with self.dami_patch.hold, course_of(self, intensity, prompt_intensity, prompts, options):
                return original.generate(self, *args, **kwargs)

        @functools.wraps(original.prepare_inputs_for_generation)
        def prepare_inputs_for_generation(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.dami_patch.course is not None:
                self.dami_patch.course.turn(input_ids, prompt=bool(kwargs.get("is_first_iteration")))
            return original.prepare_inputs_for_generation(self, input_ids, *args, **kwargs)

        @functools.wraps(original.init_continuous_batching)
        def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
            if Version(transformers.__version__) < Version(BATCHING):
                got = transformers.__version__
                raise ImportError(f"continuous batching of a pair needs transformers>={BATCHING}, got {got}")
            from dami.generation.batching import LerpManager, check_config  # which needs that transformers

            check_adapters(self)
            given = inspect.signature(original.init_continuous_batching).bind(self, *args, **kwargs).arguments
            check_config(given.get("generation_config") or self.generation_config)
            with self.dami_patch.hold:
                return LerpManager.of(original.init_continuous_batching(self, *args, **kwargs))

        @functools.wraps(original.generate_batch)
        def generate_batch(self: Any, inputs: Any, *args: Any, intensity: Any = None, **kwargs: Any) -> Any:
            from dami.generation.batching import Prompts, check_config, check_prompt, padded

            check_keywords("generate_batch", kwargs, "intensity")
            options = inspect.signature(original.generate_batch).bind(self, inputs, *args, **kwargs).arguments
            config = options.get("generation_config") or self.generation_config
            check_config(config)
            for name, value in options.get("kwargs", {}).items():  # `generate` hands on what is in its config
                if name != "max_new_tokens" and value != getattr(config, name, None):
                    raise TypeError(f"generate_batch takes no {name}: settings go into generation_config")
            for place, prompt in enumerate(inputs):  # here, as transformers goes on without a request that it refuses
                check_prompt(self, config, prompt, kwargs.get("max_new_tokens"), f"inputs[{place}]")
            with self.dami_patch.hold:
                lam = self.dami_patch.dial.lam
                if intensity is not None:
                    lam = resolved(self, intensity, padded(inputs, self.device), len(inputs))
                lam = as_lam(lam, torch.device("cpu"), len(inputs)).expand(len(inputs))
                return original.generate_batch(self, Prompts(inputs, lam.tolist()), *args, **kwargs)

        members["init_continuous_batching"] = init_continuous_batching
        members["generate_batch"] = _with(generate_batch, original.generate_batch, "intensity")
        members["generate"] = _with(generate, original.generate, "intensity", "prompt_intensity")
        members["prepare_inputs_for_generation"] = prepare_inputs_for_generation
    return type(original.__name__, (LerpModel, original), members)


def _packed_forward(model: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pass of continuous batching: tokens of all sequences in one row, each at its sequence's λ."""
    from dami.generation.batching import packed_lam
    from dami.generation.rowwise import Rowwise

    running, (lam, kept) = model.dami_patch.running, packed_lam(kwargs)
    before = running.sequences, running.tokens, running.packed, running.kept
    running.sequences, running.tokens, running.packed, running.kept = len(lam), 1, lam, kept
    try:
        with Rowwise() if running.invariant else nullcontext():
            return forward(model, *args, **kwargs)
    finally:
        running.sequences, running.tokens, running.packed, running.kept = before


def twin(model: M, intensity: Any = 0.0) -> M:
    """Another model of the same weights, with a dial of its own: what it runs at does not concern the first.

    It takes next to no memory. With it a model can be its own assistant in assisted decoding, and two threads can
    generate at once; it may be made while another thread runs the model. It is of use as long as the first stays
    patched.

    Args:
        model: a patched model.
        intensity: where its dial stands, until `intensity` says otherwise: a real number, or one per sequence.

    Raises:
        TypeError: the model is not patched, or `intensity` is no number.
        ValueError: `intensity` is not finite.
    """
    patch = patch_of(model)
    lam = as_lam(intensity, dials.device_of(model))
    shared = (*model.parameters(), *model.buffers(), *filter(None, [patch.estimator]))
    other = copy.deepcopy(model, {id(each): each for each in shared})
    patch_of(other).dial.lam = lam
    if patch.attention is not None:
        other.set_attn_implementation(patch.attention)  # type: ignore[operator]
        patch_of(other).attention = None
    return other


OF_ONE_OBJECT = ("_compiled_call", "_cached_continuous_batching_manager")  # attributes that no copy has
BATCHING = "5.24"  # from which on transformers updates a paged cache before it calls the attention
MEDIA = re.compile("pixel|image|video|audio|input_features|input_values")
INPUTS = ("inputs", "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def _sequences(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Size of the batch: of the first positional argument, or of the first tensor of these names."""
    inputs = (*args[:1], *(kwargs.get(name) for name in (*INPUTS, model.main_input_name)))
    return next((value.shape[0] for value in inputs if isinstance(value, Tensor)), None)


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Sequences and tokens of each that a decoder computes, where they can be told; 0 else."""
    inputs = (*(kwargs.get(name) for name in reversed(INPUTS)), *args[:1])
    return next(
        ((value.shape[0], value.shape[1]) for value in inputs if isinstance(value, Tensor) and value.dim() > 1), (0, 0)
    )


def _with(function: Callable[..., Any], original: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """Gives `function` the original's signature and more keywords: transformers reads signatures."""
    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters[at:at] = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function
