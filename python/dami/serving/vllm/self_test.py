"""A self-test at load time, which decides whether a model is served: three sequences, at λ = 0, ½ and 1, in one batch.

It runs the model as it will be served, except for attention, which is computed in plain torch and needs no cache.

1. Nothing reads a pair's parameter past dami's operators. During the test, and before it, such a read gives NaN.
2. Every layer of the pair is reached, so every parameter that differs between the ends is tested.
3. Each sequence gives what the model gives with every layer at that λ in plain torch.
4. With λ = NaN for one sequence, that sequence gives NaN, and no other does: each layer takes each row's own λ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.short_conv import ShortConv
from vllm.v1.attention.backend import CommonAttentionMetadata

from dami.layers.routing import by_expert
from dami.serving.vllm import norms
from dami.serving.vllm.delta_net import PairDeltaNet
from dami.serving.vllm.ends import Ends, ends_in, ends_of, optional_ends
from dami.serving.vllm.methods import ACTIVATIONS, EmbeddingMethod, ExpertsMethod, LinearMethod
from dami.serving.vllm.mla import PairMLA
from dami.serving.vllm.quantization import PairQuantization
from dami.serving.vllm.short_conv import PairShortConv
from dami_kernels import LerpWeight, formats
from dami_kernels.rows import lerp

SEQUENCES = ((0.0, 5), (0.5, 4), (1.0, 4))  # λ and tokens: 13 in all, as no layer has 13 heads, or a multiple
TOKENS = sum(length for _, length in SEQUENCES)
FAILS = "the pair fails its self-test: "


@torch.inference_mode()
def run(model: Any, config: VllmConfig) -> None:
    """Tests a loaded model.

    Raises:
        RuntimeError: if it would not give each request what a merged model gives; the message says what failed.
    """
    test = SelfTest(model, config)
    with test.without_a_cache():
        wanted = test.references()
        test.check_that_all_is_reached()
        found = test.outputs()
        test.check_that_nothing_bypasses(found)
        test.compare(found, wanted)
        test.check_that_rows_are_independent()
    test.rows.clear()


class SelfTest:
    """The tokens of the test, and what is done with them."""

    def __init__(self, model: Any, config: VllmConfig) -> None:
        self.model, self.config = model, config
        self.rows = PairQuantization.of(config).rows  # type: ignore[union-attr]
        device = self.rows.tokens.device
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(config.model_config.get_vocab_size(), (TOKENS,), generator=generator).to(device)
        self.lam = torch.tensor([lam for lam, length in SEQUENCES for _ in range(length)], device=device)
        positions = torch.cat([torch.arange(length) for _, length in SEQUENCES]).to(device)
        self.places = positions.expand(3, -1).contiguous() if config.model_config.uses_mrope else positions
        self.positions = torch.arange(TOKENS, device=device)
        self.layers = {name: layer for name, layer in model.named_modules() if _is_pair(layer)}
        self.reached: set[nn.Module] = set()
        self.steps: dict[str, Any] = {}  # what layers with a cache of their own get to know of the step

    def outputs(self, lam: Tensor | None = None) -> list[Tensor]:
        """Returns hidden states and logits [tokens, …]; the logits are in one of several processes only."""
        self.rows.set(self.lam if lam is None else lam, self.positions)
        with set_forward_context(self.steps or None, self.config, num_tokens=TOKENS):
            states = self.model(self.ids, self.places)
        logits = self.model.compute_logits(states)
        return [states.float()] if logits is None else [states.float(), logits.float()]

    def references(self) -> dict[float, list[Tensor]]:
        """Returns the outputs with every layer at one λ in plain torch, for each λ."""
        found = {}
        for lam, _ in SEQUENCES:
            with plain(self.layers.values(), lam, self._see):
                found[lam] = self.outputs()
        return found

    def _see(self, layer: Any, rows: torch.Size) -> None:
        """Notes that a layer is reached, and how many rows a token has there."""
        first = next((size for size in rows if size > 1), TOKENS)
        if first % TOKENS:
            name = next(name for name, each in self.layers.items() if each is layer)
            raise RuntimeError(f"{FAILS}{name} gets rows of shape {list(rows)} for {TOKENS} tokens; it is not served")
        layer.rows_per_token = rows.numel() // TOKENS
        self.reached.add(layer)

    def check_that_all_is_reached(self) -> None:
        missed = [name for name, layer in self.layers.items() if layer not in self.reached]
        if missed:
            raise RuntimeError(
                f"{FAILS}these layers differ between the ends, and are not computed as a pair's in a pass over text "
                f"(if they are for images, give --language-model-only): {', '.join(missed)}"
            )

    def check_that_nothing_bypasses(self, found: list[Tensor]) -> None:
        if all(x.isfinite().all() for x in found):
            return
        readers: dict[str, list[Any]] = {}
        for layer in self.layers.values():
            for reader, ends in _parts(layer):
                readers.setdefault(reader, []).append(ends)
        for reader, group in readers.items():
            with ExitStack() as stack:
                for ends in group:
                    stack.enter_context(ends.zeroed())
                if all(x.isfinite().all() for x in self.outputs()):
                    raise RuntimeError(f"{FAILS}something reads {reader} past dami's operators; it is not served")
        raise RuntimeError(
            f"{FAILS}it gives NaN, so something is computed from its weights while they are loaded, which a "
            "pair cannot follow; it is not served"
        )

    def compare(self, found: list[Tensor], wanted: dict[float, list[Tensor]]) -> None:
        eps = torch.finfo(self.config.model_config.dtype).eps
        for number, (lam, _) in enumerate(SEQUENCES):
            rows = self.rows_of(number)
            others = [wanted[other] for other, _ in SEQUENCES if other != lam]
            for ours, own, *far in zip(found, wanted[lam], *others, strict=True):
                error, size = ((x[rows].norm(dim=1)) for x in (ours - own, own))
                # rounding may route a token to another expert, so not every row has to agree
                if not (error <= size * max(8 * eps, 1e-3)).float().mean() > 0.5:
                    distance = min((own - other)[rows].norm(dim=1).median() for other in far)
                    raise RuntimeError(
                        f"{FAILS}at λ={lam:g} a token's output is off by {error.median():.3g}, where that at the "
                        f"next λ is {distance:.3g} away; it is not served"
                    )

    def check_that_rows_are_independent(self) -> None:
        for number in range(len(SEQUENCES)):
            rows = self.rows_of(number)
            lam = self.lam.clone()
            lam[rows] = torch.nan
            for ours in self.outputs(lam):
                finite = ours.isfinite().all(1)
                if finite[rows].any() or not finite[lam.isfinite()].all():
                    raise RuntimeError(f"{FAILS}the λ of one request reaches another; it is not served")

    def rows_of(self, number: int) -> slice:
        first = sum(length for _, length in SEQUENCES[:number])
        return slice(first, first + SEQUENCES[number][1])

    @contextmanager
    def without_a_cache(self) -> Iterator[None]:
        """Computes attention in plain torch, and compiles nothing."""
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if isinstance(module, (ShortConv, QwenGatedDeltaNetAttention)):
                    stack.enter_context(self.small_cache(module))
                    if isinstance(module, PairDeltaNet):
                        stack.enter_context(attribute(module, "kernels", partial(without_nan, module.kernels)))
                elif isinstance(module, PairMLA):
                    stack.enter_context(attribute(module, "forward", partial(self.attended_latents, module)))
                elif isinstance(module, AttentionLayerBase):
                    if getattr(type(module), "forward", None) is not Attention.forward:
                        raise RuntimeError(
                            f"the pair cannot be tested: {name} is a {type(module).__name__}, an attention of a kind "
                            "that the self-test does not know; it is not served"
                        )
                    stack.enter_context(attribute(module, "forward", partial(attended, module)))
                if hasattr(module, "do_not_compile"):
                    stack.enter_context(attribute(module, "do_not_compile", True))
            yield

    @contextmanager
    def small_cache(self, layer: Any) -> Iterator[None]:
        """Gives a layer a cache for the test's sequences alone, and tells it of them as vLLM would."""
        lengths = torch.tensor([length for _, length in SEQUENCES], dtype=torch.int32)
        starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        count, device = len(SEQUENCES), self.lam.device
        step = CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(device),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=count,
            num_actual_tokens=TOKENS,
            max_query_len=int(lengths.max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=torch.arange(1, count + 1, dtype=torch.int32, device=device).unsqueeze(1),
            slot_mapping=self.positions,
            is_prefilling=torch.ones(count, dtype=torch.bool),
        )
        build = layer.get_attn_backend().get_builder_cls()
        builder = build(layer.get_kv_cache_spec(self.config), [layer.prefix], self.config, device)
        self.steps[layer.prefix] = builder.build(0, step)
        cache = [  # the first place is for padding
            torch.zeros(count + 1, *shape, dtype=dtype, device=device)
            for shape, dtype in zip(layer.get_state_shape(), layer.get_state_dtype(), strict=True)
        ]
        with attribute(layer, "kv_cache", tuple(cache)):
            yield

    def attended_latents(
        self, attention: Any, q: Tensor, latents: Tensor, k_pe: Tensor, output_shape: Any = None, **rest: Any
    ) -> Tensor:
        """Computes MLA by keys and values of its latents. While λ is tested also by its latents alone, and the mean."""
        keys, heads = attention.qk_nope_head_dim, attention.num_heads
        method = attention.kv_b_proj.quant_method
        method.lams.append(self.rows.tokens[:TOKENS])
        projected = attention.kv_b_proj(latents)[0].view(TOKENS, heads, -1)
        k = torch.cat([projected[..., :keys], k_pe.expand(-1, heads, -1)], -1)
        y = causal(q, k, projected[..., keys:], attention.scale)
        if method.lams:  # nobody took λ: this is a reference
            method.lams.clear()
            return y.flatten(1).to(q.dtype)
        moved = torch.bmm(q[..., :keys].transpose(0, 1), attention.W_UK_T).transpose(0, 1)
        k = torch.cat([latents.unsqueeze(1), k_pe], -1).expand(-1, heads, -1)
        z = causal(torch.cat([moved, q[..., keys:]], -1), k, k[..., : latents.shape[-1]], attention.scale)
        z = torch.bmm(z.to(q.dtype).transpose(0, 1), attention.W_UV).transpose(0, 1)
        return ((y + z.float()) / 2).flatten(1).to(q.dtype)


def _is_pair(layer: Any) -> bool:
    method = getattr(layer, "quant_method", None)
    return (
        isinstance(layer, (norms.PairNorm, PairShortConv, PairDeltaNet))
        or isinstance(method, (LinearMethod, EmbeddingMethod, ExpertsMethod))
        or hasattr(layer, "sinks_at_rows")
    )


def _parts(layer: Any) -> Iterator[tuple[str, Ends]]:
    """Yields the ends that a layer, or a module below it, reads, each with a name to say."""
    for part in (layer, *layer.children()):
        for name, ends in ends_in(part).items():
            yield f"{name} of {type(part).__name__}", ends


def without_nan(kernels: Any, *inputs: Tensor) -> None:
    """Calls kernels for all rows but those of NaN, as some kernels multiply the rows of other sequences by zero."""
    *rows, output = inputs
    lost = torch.stack([~x.isfinite().all(1) for x in rows]).any(0)
    kernels(*(x.nan_to_num() for x in rows), output)
    output[: len(lost)][lost] = torch.nan


def attended(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, *shape: Any, output_dtype: Any = None, **rest: Any
) -> Tensor:
    """Computes an attention without a cache."""
    q = query.reshape(TOKENS, attention.num_heads, -1)
    k, v = (x.reshape(TOKENS, attention.num_kv_heads, -1) for x in (key, value))
    plain = partial(causal, q, k, v, attention.impl.scale)
    own = getattr(attention.impl, "sinks", None)
    y = attention.sinks_at_rows.at_rows(plain) if hasattr(attention, "sinks_at_rows") else plain(own)
    return y.flatten(1).to(output_dtype or query.dtype)


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
    """Computes softmax(scale · q · kᵀ) · v [tokens, heads, …] within each sequence, where no token sees later ones."""
    lengths = [length for _, length in SEQUENCES]
    parts = zip(*(x.float().transpose(0, 1).split(lengths, 1) for x in (query, key, value)), strict=True)
    return torch.cat([_attention(q, k, v, scale, sinks) for q, k, v in parts], 1).transpose(0, 1)


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
    """Computes the attention of one sequence [heads, tokens, …]; a sink is one more key, with a value of zeros."""
    count = query.shape[1]
    mask = query.new_full((query.shape[0], count, count), -torch.inf).triu(1)
    if sinks is not None:
        mask = torch.cat([mask, sinks.float().view(-1, 1, 1).expand(-1, count, 1)], 2)
        key, value = (F.pad(x, (0, 0, 0, 1)) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of an object inside a `with` block."""
    before = owner.__dict__.get(name, owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is owner:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def plain(layers: Any, lam: float, see: Any) -> Iterator[None]:
    """Makes layers compute at one λ in plain torch and float32, and tell `see` of themselves and their rows' shape."""
    with ExitStack() as stack:
        for layer in layers:
            own: Any = {"lam": torch.tensor(lam), "see": partial(see, layer)}
            method = getattr(layer, "quant_method", None)
            if isinstance(method, (LinearMethod, EmbeddingMethod)):
                stack.enter_context(attribute(method, "apply", partial(_linear, **own)))
            if isinstance(method, EmbeddingMethod):
                stack.enter_context(attribute(method, "embedding", partial(_embedding, **own)))
            if isinstance(method, ExpertsMethod):
                stack.enter_context(attribute(method, "apply", partial(_experts, **own)))
            if isinstance(layer, (PairShortConv, PairDeltaNet)):
                stack.enter_context(layer.at(**own))
            if hasattr(layer, "sinks_at_rows"):
                stack.enter_context(layer.sinks_at_rows.at(**own))
            if hasattr(layer, "routing"):
                stack.enter_context(layer.routing.at(own["lam"]))
            if isinstance(layer, norms.PairNorm):
                stack.enter_context(attribute(layer, "normed", partial(_norm, layer, **own)))
        yield


def _product(x: Tensor, weight: LerpWeight, lam: Tensor) -> Tensor:
    """Computes x · W(λ)ᵀ in float32, a block of rows of W at a time."""
    lam = lam.to(x.device)
    blocks = formats.float_blocks(weight.format, weight.tensors, weight.shape[-1])
    return torch.cat([F.linear(x.float(), lerp(base, target, lam)) for _, base, target in blocks], -1)


def _vector(ends: LerpWeight, lam: Tensor) -> Tensor:
    """Computes a vector at λ in float32."""
    base, target = (end.float() for end in ends.tensors)
    return lerp(base, target, lam.to(base.device))


def _linear(layer: Any, x: Tensor, bias: Tensor | None = None, *, lam: Tensor, see: Any) -> Tensor:
    see(x.shape[:-1])
    y = _product(x, ends_of(layer, "weight"), lam)
    if bias is not None:
        y = y + _vector(ends_of(layer, "bias"), lam)
    return y.to(x.dtype)


def _embedding(layer: Any, ids: Tensor, *, lam: Tensor, see: Any) -> Tensor:
    see(ids.shape)
    weight = ends_of(layer, "weight")
    base, target = formats.get(weight.format).unpack(*weight.tensors, columns=weight.shape[-1], rows=ids)
    return lerp(base.float(), target.float(), lam.to(ids.device)).to(weight.dtype)


def _experts(
    layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *rest: Any, lam: Tensor, see: Any, **options: Any
) -> Tensor:
    see(x.shape[:-1])
    y = x.new_zeros(x.shape, dtype=torch.float32)
    count = layer.local_num_experts
    expert, pairs, _ = by_expert(topk_ids, count, layer.expert_map)
    for which, index in zip(expert.tolist(), pairs.tolist(), strict=True):
        if which < count:
            token, slot = divmod(index, topk_ids.shape[-1])
            row = ACTIVATIONS[layer.activation](_expert(layer, "w13", which, x[token], lam))
            y[token] += topk_weights[token, slot] * _expert(layer, "w2", which, row, lam)
    return y.to(x.dtype)


def _expert(layer: Any, name: str, which: int, x: Tensor, lam: Tensor) -> Tensor:
    """Computes one product of one expert in float32."""
    experts, bias = ends_of(layer, f"{name}_weight"), optional_ends(layer, f"{name}_bias")
    tensors = tuple(tensor[which] for tensor in experts.tensors)
    y = _product(x, LerpWeight(tensors, experts.format, experts.shape[1:], experts.dtype), lam)
    return y if bias is None else y + _vector(bias, lam)[which]


def _norm(norm: Any, x: Tensor, *, lam: Tensor, see: Any) -> Tensor:
    see(x.shape[:-1])
    bias = optional_ends(norm, "bias")
    vectors = _vector(ends_of(norm, "weight"), lam), None if bias is None else _vector(bias, lam)
    return norms.normed(x, *vectors, norm.centred, norm.eps, norm.offset)
