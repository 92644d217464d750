"""The class of a patched model: `forward` and `generate` of the original, with an `intensity`."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import transformers
from packaging.version import Version
from torch import Tensor, is_grad_enabled, nn

from dami.callers import CALLERS
from dami.dial.choosing import chosen
from dami.dial.patch import Patch, patch_of
from dami.dial.turning import check_rows, set_intensity, turned
from dami.dial.values import AnyIntensity, Intensity, IntensityLike
from dami.generation.compiled import StepConfig, compiled_call, compiled_step, compiling
from dami.generation.prefill import read_prompts
from dami.generation.steering import programmed
from dami.keywords import OURS, check_keywords, check_settings
from dami.layers.base import LerpModule, Recipe, check_dtypes, rebuild, recipe_of, runs_again
from dami.layers.checkpointing import checkpointing, checkpoints
from dami.layers.peft import check_adapters, guard_merging
from dami.layers.status import Status
from dami.patching.independence import check_independence
from dami.patching.media import check_media, media_by_sequence
from dami.patching.vocabulary import weigh_unshared
from dami.saving.directory import push, save
from dami.upstream import OF_ONE_OBJECT, execution_device, forget_captures, hook_of

if TYPE_CHECKING:  # at run time, the other base class, which is transformers' own, provides them
    from transformers import GenerationMixin, PreTrainedModel
else:
    PreTrainedModel, GenerationMixin = nn.Module, object

M = TypeVar("M", bound=nn.Module)
FUSED_HEADS = {"fused_lm_head": "TRL", "skip_logits": "Liger"}  # an argument of their forwards, by which one knows them


class LerpModel(PreTrainedModel):
    """The methods that patching adds to a model. The patched class inherits from this class, then from the original.

    The original's `forward` and `generate_batch` take one more keyword, `intensity`; its `generate` takes `intensity`,
    `prompt_intensity` and `prompt_tail`.
    """

    dami_patch: Patch

    def forward(self, *args: Any, intensity: AnyIntensity | None = None, **kwargs: Any) -> Any:
        """Like transformers' own, with one λ for the batch, one per sequence, or λ for parts of the model.

        Without `intensity`, λ is what `dami.set_intensity` or a `with dami.intensity(…)` block has set.
        """
        if torch.compiler.is_compiling():
            return self._forward_at(intensity, args, kwargs)
        if intensity is None and runs_again():
            raise RuntimeError(
                "the model runs again in the backward pass, as a checkpoint does it, where λ may be another: "
                "give it λ as an argument, model(…, intensity=…), or checkpoint its layers, "
                "model.gradient_checkpointing_enable()"
            )
        with self.dami_patch.hold:
            return self._forward_at(intensity, args, kwargs)

    def _forward_at(self, intensity: AnyIntensity | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a forward pass. The calling thread must hold the model."""
        check_keywords("forward", kwargs, "intensity")
        patch, sequences = self.dami_patch, _sequences(self, args, kwargs)
        wanted = None
        if intensity is not None:
            wanted = Intensity.parse(intensity, CALLERS["forward"], patch.presets, sequences)
            if wanted.parts:
                with turned(self, wanted):
                    return self._forward_at(None, args, kwargs)
        if patch.program is None:
            check_adapters(self)
        if "logits_processor_args" in kwargs:
            return _packed_forward(self, args, kwargs)
        dial, running = patch.dial, patch.running
        lam = dial.lam.to(self.device) if wanted is None else wanted.to(self.device)
        check_rows(patch, lam, sequences)
        has_media = lam.dim() == 1 and len(lam) > 1 and self._check_mixed(kwargs)
        # does what `dial.turned` and `running.during` do, because these would break a compiled graph
        before = dial.lam, dial.rest, running.sequences, running.tokens
        dial.lam, dial.rest = lam, dial.lam if dial.rest is None else dial.rest
        running.sequences, running.tokens = _batch(args, kwargs)
        try:
            if has_media:
                with media_by_sequence(self, kwargs.get("input_ids", args[0] if args else None)):
                    return self._weighed(self._computed(args, kwargs), lam)
            return self._weighed(self._computed(args, kwargs), lam)
        finally:
            dial.lam, dial.rest, running.sequences, running.tokens = before
            running.forget()

    def _computed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the original's forward, whose layers may be checkpointed."""
        if torch.compiler.is_compiling() or not is_grad_enabled() or not checkpoints(self):
            return super().forward(*args, **kwargs)
        with checkpointing(self):
            return super().forward(*args, **kwargs)

    def _weighed(self, output: Any, lam: Tensor) -> Any:
        """Returns a model's output in which tokens that one end does not know have the odds that λ gives them."""
        if self.dami_patch.origin.vocabulary is not None:
            weigh_unshared(output, lam, self.dami_patch.origin.vocabulary)
        return output

    def _check_mixed(self, kwargs: Mapping[str, Any]) -> bool:
        """Returns whether a batch at several λ has images.

        Raises ValueError if it has any, or audio, whose sequence is unknown, or if the model mixes its sequences.
        """
        has_media = check_media(self, kwargs)
        if not self.dami_patch.checked and not torch.compiler.is_compiling():
            check_independence(self, self.dami_patch.original.forward)
            self.dami_patch.checked = True
        return has_media

    def _mixes(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a batch may be at several λ."""
        try:
            self._check_mixed(kwargs)
        except ValueError:
            return False
        return True

    @property
    def dami(self) -> Status:
        """The pair's status, for you to print: ends, format, bytes, λ, presets, estimator, frontier."""
        return Status(self)

    @property
    def device(self) -> Any:
        """The device the model computes on, even if its parameters are offloaded and so on the meta device."""
        device = next(self.parameters()).device
        is_offloaded = device.type == "meta" and any(hook_of(module) is not None for module in self.modules())
        return (execution_device(self) if is_offloaded else None) or device

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            _check_forward(value)
        super().__setattr__(name, value)
        if name == "peft_config":  # PEFT sets it when it puts an adapter on the model
            guard_merging()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        check_dtypes(self, fn)  # before any module has changed
        return super()._apply(fn, recurse)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # type: ignore[override]
        """Like transformers' own. Writes everything `from_pretrained` needs to load the pair, and a model card."""
        save(self, save_directory, super().save_pretrained, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:  # type: ignore[override]
        """Like transformers' own. Uploads everything that `dami.save_pair` writes."""
        return push(self, repo_id, **options)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Like transformers' own, but raises ValueError if it would change the size of an interpolated embedding."""
        ends: list[Any] = [self.get_input_embeddings(), self.get_output_embeddings()]
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
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        forget_captures(self)
        state = {name: value for name, value in self.__dict__.items() if not name.startswith(OF_ONE_OBJECT)}
        return rebuild, (recipe_of(type(self)),), state


def _check_forward(forward: Callable[..., Any]) -> None:
    """Raises ValueError for a forward, to be put over the model's own, that multiplies by the head's weight itself."""
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)  # its signature may be that of the model's
    if found := [name for name in FUSED_HEADS if code is not None and name in code.co_varnames]:
        raise ValueError(
            f"the forward of a pair cannot give way to one with {found[0]}, that of {FUSED_HEADS[found[0]]}: it reads "
            "the head's weight, which is the instruct end's, and no λ. Use transformers' Trainer without fused losses"
        )


class PairModel(LerpModel, GenerationMixin):
    """A patched causal language model of transformers: `forward` and `generate` take an `intensity`.

    `dami.load_pair` and `dami.patch_model` return an instance of a subclass of this class and the original class.
    """

    def generate(
        self,
        *args: Any,
        intensity: AnyIntensity | None = None,
        prompt_intensity: IntensityLike | None = None,
        prompt_tail: int | Sequence[int] | Tensor | None = None,
        compile: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Like transformers' own.

        Args:
            args, kwargs: as in transformers.
            intensity: λ for all prompts, or one per prompt: numbers, presets, "auto" or schedules; or a mapping from
                parts of the model to these. By default, what `dami.set_intensity` or `with dami.intensity(…)` has set.
            prompt_intensity: λ for reading the prompts, if it differs: a number or a preset, or one per prompt. Prompts
                that begin alike are read once.
            prompt_tail: how many tokens at the end of each prompt are read at `intensity` all the same: one number, or
                one per prompt; 1 by default. At 0, the first token of the answer comes from `prompt_intensity`, too.
            compile: whether to decode by a compiled step, which a GPU captures as a graph. The first call compiles;
                another λ does not compile again.
        """
        if compile is not None and not isinstance(compile, bool):
            raise TypeError(f"compile must be True or False, got {compile!r}")
        check_keywords("generate", kwargs, *OURS)
        check_adapters(self)
        options = inspect.signature(self.dami_patch.original.generate).bind(self, *args, **kwargs).arguments
        options |= options.pop("kwargs", {})
        config = self.generation_config if (given := options.get("generation_config")) is None else given
        if not isinstance(config, transformers.GenerationConfig):
            raise TypeError(
                f"generation_config must be a GenerationConfig, got {config!r}: λ is a keyword, intensity=…"
            )
        check_settings(config)
        prompts = _sequences(self, args, kwargs) or 1
        with self.dami_patch.hold:
            if compile:
                kwargs |= compiled_step(self, options, _batch(args, kwargs)[1])
            each = bool(compile) and (prompts == 1 or self._mixes(kwargs))
            prepared = compiling(self) if compile else nullcontext()
            media = media_by_sequence(self, options.get("inputs", options.get("input_ids")))
            steps = programmed(self, intensity, prompt_intensity, prompt_tail, prompts, options, each)
            with steps, prepared, media:
                return super().generate(*args, **kwargs)

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Like transformers' own. `generate` calls it to read the prompts."""
        prefill = cast(Any, super())._prefill

        def read(ids: Tensor, config: Any, inputs: dict[str, Any]) -> Any:
            return prefill(ids, config, inputs, *args, **kwargs)

        return read_prompts(self, read, input_ids, generation_config, model_kwargs)

    def get_compiled_call(self, compile_config: Any) -> Any:
        """Like transformers' own. `generate` asks for it once, for all steps."""
        ours = isinstance(compile_config, StepConfig)
        return compiled_call(self, self.dami_patch.compiled) if ours else super().get_compiled_call(compile_config)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Like transformers' own. `generate` calls it before each forward pass, so λ is updated here."""
        if self.dami_patch.program is not None:
            self.dami_patch.program.turn(input_ids, prompt=bool(kwargs.get("is_first_iteration")))
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Like transformers' own. Each request to the manager accepts an `intensity`."""
        if Version(transformers.__version__) < Version(BATCHING):
            got = transformers.__version__
            raise ImportError(f"continuous batching of a pair needs transformers>={BATCHING}, got {got}")
        from dami.generation.batching import LerpManager, check_config  # needs that version of transformers

        check_adapters(self)
        original = self.dami_patch.original.init_continuous_batching
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        check_config(given.get("generation_config") or self.generation_config)
        with self.dami_patch.hold:
            return LerpManager.of(super().init_continuous_batching(*args, **kwargs))

    def generate_batch(
        self,
        inputs: Any,
        *args: Any,
        intensity: IntensityLike | None = None,
        prompt_intensity: IntensityLike | None = None,
        prompt_tail: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Like transformers' own.

        Args:
            inputs, args, kwargs: as in transformers.
            intensity: λ for all prompts, or one per prompt: numbers, presets or "auto".
            prompt_intensity: λ for reading the prompts, if it differs: a number or a preset, or one per prompt. Prompts
                that begin alike share what was read at the same λ, whatever their `intensity`.
            prompt_tail: how many tokens at the end of a prompt are read at `intensity` all the same, one number or one
                per prompt; 1 by default.
        """
        from dami.generation.batching import LAM_KEYWORDS, Prompts, check_config, check_prompt, lams_of_prompts, padded

        check_keywords("generate_batch", kwargs, *LAM_KEYWORDS)
        options = inspect.signature(self.dami_patch.original.generate_batch).bind(self, inputs, *args, **kwargs)
        config = options.arguments.get("generation_config") or self.generation_config
        check_config(config)
        for name, value in options.arguments.get("kwargs", {}).items():  # `generate` passes on settings of its config
            if name != "max_new_tokens" and value != getattr(config, name, None):
                raise TypeError(f"generate_batch takes no {name}: settings go into generation_config")
        for place, prompt in enumerate(inputs):  # checked here, because transformers skips requests that it rejects
            check_prompt(self, config, prompt, kwargs.get("max_new_tokens"), f"inputs[{place}]")
        with self.dami_patch.hold:
            wanted = self.dami_patch.dial.lam if intensity is None else intensity
            batch, caller, prompts = padded(inputs, self.device), CALLERS["generate_batch"], len(inputs)
            each = chosen(self, wanted, caller, batch, prompts).each(prompts)
            lams = lams_of_prompts(prompts, each, prompt_intensity, prompt_tail, caller, self)
            return super().generate_batch(Prompts(inputs, lams), *args, **kwargs)


KEYWORDS = {  # keywords that the methods of a patched model accept in addition to transformers' own
    "forward": ("intensity",),
    "generate": ("intensity", "prompt_intensity", "prompt_tail", "compile"),
    "generate_batch": ("intensity", "prompt_intensity", "prompt_tail"),
    "get_compiled_call": (),
    "prepare_inputs_for_generation": (),
    "init_continuous_batching": (),
}


@functools.cache
def patched_model_class(original: Any) -> type[LerpModel]:
    """Returns the class of a patched model. It keeps the original's name, which transformers uses for lookups."""
    ours = PairModel if hasattr(original, "generate") else LerpModel
    members: dict[str, Any] = {"__module__": original.__module__, "__doc__": original.__doc__}
    members["recipe"] = Recipe(patched_model_class, (original,))
    for name, keywords in KEYWORDS.items():
        if hasattr(ours, name):
            members[name] = _with(getattr(ours, name), getattr(original, name), *keywords)
    return type(original.__name__, (ours, original), members)


def _packed_forward(model: LerpModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a forward pass of continuous batching: one row holds the tokens of all sequences, each at its own λ."""
    from dami.generation.attention import one_pass
    from dami.generation.batching import packed_lam
    from dami.generation.rowwise import Rowwise

    running, (lam, kept) = model.dami_patch.running, packed_lam(kwargs)
    on_states = kwargs.pop("on_states", None)
    if on_states is not None:
        kwargs["output_hidden_states"] = True
    sharing = nullcontext() if torch.compiler.is_compiling() else one_pass()
    with sharing, running.during(len(lam), 1, lam, kept), Rowwise() if running.invariant else nullcontext():
        output = model.dami_patch.original.forward(model, *args, **kwargs)
        if on_states is not None:
            on_states(output.hidden_states)
        return model._weighed(output, lam if kept is None else kept)


def twin(model: M, intensity: IntensityLike = 0.0) -> M:
    """Returns another model that shares the weights but has its own λ, so setting one does not affect the other.

    The twin takes almost no memory. It lets a model be its own assistant in assisted decoding, and lets two threads
    generate at the same time. You can create it while another thread runs the model. It works as long as the first
    model stays patched.

    Args:
        model: a patched model.
        intensity: the twin's λ until `set_intensity` changes it: a number or a preset, or one of these per sequence.

    Raises:
        TypeError: the model is not patched, or `intensity` has the wrong type.
        ValueError: `intensity` is not finite, or is not the name of a preset.
    """
    patch = patch_of(model)
    Intensity.parse(intensity, CALLERS["dami.twin"], patch.presets)
    shared = (*model.parameters(), *model.buffers(), *filter(None, [patch.estimator]))
    other = copy.deepcopy(model, {id(each): each for each in shared})
    set_intensity(other, intensity)
    if patch.attention is not None:
        other.set_attn_implementation(patch.attention)  # type: ignore[operator]
        patch_of(other).attention = None
    return other


BATCHING = "5.24"  # the first version of transformers that updates a paged cache before it calls the attention
INPUTS = ("inputs", "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def _sequences(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Returns the batch size: that of the first positional argument, or of the first tensor named in `INPUTS`."""
    inputs = (*args[:1], *(kwargs.get(name) for name in (*INPUTS, model.main_input_name)))
    return next((value.shape[0] for value in inputs if isinstance(value, Tensor)), None)


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Returns how many sequences, and tokens per sequence, a decoder computes; zeros if unknown."""
    inputs = (*(kwargs.get(name) for name in reversed(INPUTS)), *args[:1])
    return next(
        ((value.shape[0], value.shape[1]) for value in inputs if isinstance(value, Tensor) and value.dim() > 1), (0, 0)
    )


def _with(function: Callable[..., Any], original: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """Wraps `function` with the original's signature plus keywords, because transformers inspects signatures."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters[at:at] = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    method.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return method
