"""The modules of a patched model.

A patched module is the original object with its class changed to a subclass of its class. Its parameters stay where
they were, under their own names, as the base end; the target end is registered beside them (`weight_target`). So
isinstance checks, hooks, tied references, `module.weight.dtype`, `.to()` and `state_dict` go on working, and taking the
patch off gives back the very same modules.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from transformers.pytorch_utils import Conv1D

from dami.dial import Dial
from dami.row_parameter import RowParameter, blend
from dami_kernels import LerpWeight, lerp_embedding, lerp_experts, lerp_layer_norm, lerp_linear, lerp_rms_norm
from dami_kernels.weight import FLOAT_DTYPES

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Stored:
    """In which format a patched module keeps both ends of a parameter, and the names of its tensors."""

    format: str
    names: tuple[str, ...]


@dataclass(eq=False)
class Pass:
    """The forward pass that a model is in; its modules share it.

    Attributes:
        sequences: of the batch, a multiple of the number of λ (beams); 0 where it is not known, None outside a pass.
        tokens: of each sequence; 0 where that is not known.
        ordered: whether rows stand in the order of the sequences.
        packed: where tokens of all sequences stand in one row, as in continuous batching, float32 [tokens], λ of each;
            tokens are then taken for sequences.
        kept: float32 [rows], λ of those tokens of a packed row whose logits are wanted, where not all are.
        invariant: whether the bits of a row are to be independent of the others.
    """

    sequences: int | None = None
    tokens: int = 0
    ordered: bool = True
    packed: Tensor | None = None
    kept: Tensor | None = None
    invariant: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no pass."""
        return vars(Pass(invariant=self.invariant))

    @contextmanager
    def out_of_order(self) -> Iterator[None]:
        """For a while rows are not in the order of the sequences, and no module may take them for it."""
        self.ordered = False
        try:
            yield
        finally:
            self.ordered = True

    @contextmanager
    def entered(self) -> Iterator[None]:
        """For a while it is no matter that a module is called outside a pass: it reads its parameters at λ."""
        before, self.sequences = self.sequences, self.sequences or 0
        try:
            yield
        finally:
            self.sequences = before

    def counts(self, rows: int) -> bool:
        """Whether a dimension of this size can be the batch: one sequence, token, or part of a token after another."""
        return self.ordered and (
            not self.sequences or rows == self.sequences or rows % (self.sequences * (self.tokens or 1)) == 0
        )


@dataclass(eq=False)
class Lerp:
    """What a patched module knows beyond the original.

    Attributes:
        dial: its model's, where it reads λ.
        original: its class before.
        settings: keyword arguments of its operator, such as a norm's eps, or a linear layer's `invariant`.
        layer: index of its layer, None outside the layers.
        group: one of `dial.GROUPS`.
        stored: where the ends of every parameter and buffer that is interpolated are, by its name.
        name: the module's, in its model.
        running: the forward pass of its model.
        tokens_at: which dimension of its input the tokens of a packed row are, once it has met one.
        part: the dial that it reads instead, while `dami.intensity` sets its part of the model apart.
    """

    dial: Dial
    original: type[nn.Module]
    settings: dict[str, Any]
    layer: int | None
    group: str
    stored: dict[str, Stored] = field(default_factory=dict)
    name: str = ""
    running: Pass = field(default_factory=Pass)
    tokens_at: int | None = None
    part: Dial | None = None

    @property
    def lam(self) -> Tensor:
        """λ that holds for it, a scalar if it is one, or of each token in a packed row.

        ValueError if its part has one per sequence there.
        """
        packed = self.running.packed
        if self.part is None and packed is not None:
            return packed
        lam = self.dial.lam if self.part is None else self.part.lam
        if lam.dim() == 0:
            return lam
        if packed is not None and len(lam) > 1:
            raise ValueError(f"{self.name} takes one intensity for all requests of a continuous batch, got {len(lam)}")
        return lam if len(lam) > 1 else lam[0]

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no `with` block, and in no pass."""
        return {**vars(self), "part": None}


def placeholder(like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of a shape, and of the dtype and device of `like`, that takes the memory of one number: NaN.

    It stands where a format does not keep the base as it was, for all who ask a parameter what it is.
    """
    return like.new_full((), float("nan")).expand(shape)


def check_dtypes(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Refuses what `.to()` and its like are about to do to a module if no operator could take its weights then."""
    kinds = {(parameter.dtype, parameter.device) for parameter in module.parameters() if parameter.is_floating_point()}
    for dtype, device in kinds:
        wanted = fn(torch.empty(0, dtype=dtype, device=device)).dtype
        if wanted not in FLOAT_DTYPES:
            raise TypeError(
                f"a patched model computes in float32, bfloat16 or float16, got {wanted}: for a model in {wanted} make "
                "a merged copy, dami.materialize(model, intensity), and convert that"
            )


def runs_again() -> bool:
    """Whether this thread is in a backward pass, where what runs forward has run before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class LerpModule(nn.Module):
    """What all patched modules share. A subclass is a kind: which modules it patches, and their forward.

    A kind's forward takes the ends of `operands` to an operator. All that a module reads beside, or another module
    reads of it, is at λ: `module.name` is the blended tensor, or a `RowParameter` if each sequence has its own λ.
    """

    kind: ClassVar[str]
    replaces: ClassVar[type[nn.Module] | None] = None
    operands: ClassVar[tuple[str, ...]] = ("weight", "bias")
    lerp: Lerp

    @classmethod
    def fit(cls, module: nn.Module) -> dict[str, Any] | None:
        """Settings of the operator that computes what `module` does, or None if this kind does not fit."""
        return {} if cls.replaces is not None and isinstance(module, cls.replaces) else None

    @staticmethod
    def as_operand(tensor: Tensor) -> Tensor:
        """A parameter, or a stored tensor, between the module's shape and the operator's: its own inverse."""
        return tensor

    def ends(self, name: str) -> LerpWeight:
        """Both ends of a parameter as the operators take them; one tensor stands for both where they are identical."""
        stored = self.lerp.stored.get(name, Stored("pair", (name, name)))
        parameter = self.as_operand(self.tensor(name))
        tensors = tuple(self.as_operand(self.tensor(tensor)) for tensor in stored.names)
        return LerpWeight(tensors, stored.format, parameter.shape, parameter.dtype)

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer as it is stored."""
        return self._parameters[name] if name in self._parameters else self._buffers[name]  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        lerp = self.__dict__.get("lerp")
        if lerp is None or name not in lerp.stored:
            return super().__getattr__(name)
        if "_hf_hook" in self.__dict__ and sys._getframe(1).f_globals["__name__"].startswith("accelerate."):
            return super().__getattr__(name)  # its hooks put the stored tensors in their places and take them away
        lam, outside = lerp.lam, lerp.running.sequences is None
        if outside and (name in self.operands or (lam.dim() == 0 and lam.item() == 0)):
            return super().__getattr__(name)  # for all who look at a model that does not run: the base, λ = 0
        ends = self.ends(name)
        if name in self.operands or lam.dim():
            value: Tensor = RowParameter(f"{lerp.name}.{name}", lam.to(ends.device), lerp.running, ends)
        else:
            value = blend(ends, lam.to(ends.device))
        return self.as_operand(value)

    def bias_ends(self) -> LerpWeight | None:
        return None if self._parameters.get("bias") is None else self.ends("bias")

    def rows(self, x: Tensor, features: int = 1) -> tuple[Tensor, dict[str, Any]]:
        """`x` with its rows in the order of the sequences, and the operator's arguments that give each row its λ.

        Args:
            x: its first dimension is the batch, B sequences or any multiple (beams of one sequence are neighbours), or
                1 for what all sequences share, such as the positions [1, T]: it is then expanded to B.
            features: how many trailing dimensions are not rows.
        """
        lam, running = self.lerp.lam.to(x.device), self.lerp.running
        if running.sequences is None and runs_again():
            raise RuntimeError(
                f"{self.lerp.name} runs again in the backward pass, where it does not know the λ it ran at: checkpoint "
                "layers by model.gradient_checkpointing_enable(), or the whole model, model(…, intensity=…)"
            )
        if lam.dim() and running.packed is not None:
            return x, self._packed_rows(x, lam, features)
        if isinstance(x, RowParameter):
            x = x.of_batch()
        if lam.dim() == 0:
            return x, {"lam": lam}
        flat = x.dim() <= features + 1
        if x.shape[0] == 1 and not flat:
            x = x.expand(lam.shape[0], *x.shape[1:])
        count = x.shape[0] if x.dim() > features else 1
        # rows [n, K] of fewer tokens than all were gathered: nobody knows from where
        gathered = flat and running.sequences and count % (running.sequences * (running.tokens or 1)) != 0
        if count % lam.shape[0] != 0 or gathered or not running.counts(count):
            raise ValueError(
                f"intensity must hold one number per sequence, got {lam.shape[0]} for an input of shape "
                f"{list(x.shape)} of {self.lerp.name}"
            )
        return x, {"lam": lam, "rows_per_lam": x.shape[: x.dim() - features].numel() // lam.shape[0]}

    def _packed_rows(self, x: Tensor, lam: Tensor, features: int) -> dict[str, Any]:
        """The operator's arguments for `x` of a packed row, whose tokens are one of the dimensions before the features.

        Which one is seen at the first row, by `dami.serving.batching.check_packed`, whose number of tokens is no other
        dimension's.
        """
        if self.lerp.group == "head" and self.lerp.running.kept is not None:
            lam = self.lerp.running.kept
        lead, tokens = x.shape[: x.dim() - features], len(lam)
        if self.lerp.tokens_at is None and lead.count(tokens) == 1:
            self.lerp.tokens_at = lead.index(tokens)
        at = self.lerp.tokens_at
        if at is None or at >= len(lead) or lead[at] != tokens:
            raise ValueError(
                f"{self.lerp.name} cannot tell the {tokens} tokens of a packed row, each at its own intensity, in an "
                f"input of shape {list(x.shape)}"
            )
        outer, inner = lead[:at].numel(), lead[at + 1 :].numel()
        if outer == 1:
            return {"lam": lam, "rows_per_lam": inner}
        rows = torch.arange(tokens, dtype=torch.int32, device=x.device)
        return {"lam": lam, "row_to_lam": rows.repeat_interleave(inner).repeat(outer)}

    def placeholders(self) -> list[str]:
        """Names of the parameters that are placeholders."""
        return [name for name, stored in self.lerp.stored.items() if name not in stored.names]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As any module's, for `.to()` and its like; but scales keep their dtype, and placeholders take no memory."""
        check_dtypes(self, fn)
        scales = {id(parameter) for name, parameter in self._parameters.items() if name.endswith("_scale")}
        placeholders = {id(self.tensor(name)) for name in self.placeholders()}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) in placeholders:
                return placeholder(fn(tensor.new_empty(())), tensor.shape)
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in scales else moved

        return super()._apply(move, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As any module's; but placeholders are not part of a state."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.placeholders():
            destination.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: Any) -> None:
        missing: list[str] = lists[0]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        missing[:] = [name for name in missing if name.removeprefix(prefix) not in self.placeholders()]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        model = "dami_patch" in self.__dict__  # it has parameters of its own
        return _rebuild, (_kind_of(type(self)), self.lerp.original, model), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As any module's; but a deep copy has given placeholders all the memory that they stand for."""
        super().__setstate__(state)
        for name in self.placeholders():
            tensor = self.tensor(name)
            if any(tensor.stride()):
                tensor.data = placeholder(tensor, tensor.shape)


class LerpLinear(LerpModule, nn.Linear):
    """`nn.Linear` at λ."""

    kind = "linear"
    replaces = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        x, rows = self.rows(input)
        return lerp_linear(x, self.ends("weight"), bias=self.bias_ends(), **self.lerp.settings, **rows)


class LerpConv1D(LerpModule, Conv1D):
    """transformers' `Conv1D` at λ: a linear layer whose weight is [K, N].

    While patched, what is stored keeps that orientation and lies transposed in memory, as the operator reads it.
    """

    kind = "conv1d"
    replaces = Conv1D

    @staticmethod
    def as_operand(tensor: Tensor) -> Tensor:
        return tensor.t() if tensor.dim() == 2 else tensor

    def forward(self, x: Tensor) -> Tensor:
        x, rows = self.rows(x)
        return lerp_linear(x, self.ends("weight"), bias=self.bias_ends(), **self.lerp.settings, **rows)


class LerpEmbedding(LerpModule, nn.Embedding):
    """`nn.Embedding` at λ. A subclass that scales the result, as Gemma's does, goes on doing so."""

    kind = "embedding"
    replaces = nn.Embedding

    @classmethod
    def fit(cls, module: nn.Module) -> dict[str, Any] | None:
        return {} if isinstance(module, nn.Embedding) and module.max_norm is None else None

    def forward(self, input: Tensor) -> Tensor:
        ids, rows = self.rows(input, features=0)
        return lerp_embedding(ids, self.ends("weight"), **rows)


class LerpLayerNorm(LerpModule, nn.LayerNorm):
    """`nn.LayerNorm` over the last dimension at λ, with or without a bias."""

    kind = "layer_norm"
    replaces = nn.LayerNorm

    @classmethod
    def fit(cls, module: nn.Module) -> dict[str, Any] | None:
        fits = isinstance(module, nn.LayerNorm) and module.weight is not None and module.weight.dim() == 1
        return {"eps": module.eps} if fits else None

    def forward(self, input: Tensor) -> Tensor:
        x, rows = self.rows(input)
        return lerp_layer_norm(x, self.ends("weight"), bias=self.bias_ends(), **self.lerp.settings, **rows)


class LerpRMSNorm(LerpModule):
    """An RMS norm of any spelling at λ: any module of one vector `weight` that computes x/rms(x)·(offset + weight)."""

    kind = "rms_norm"

    @classmethod
    def fit(cls, module: nn.Module) -> dict[str, Any] | None:
        """Finds eps and offset by running the module on random input: many classes, one formula."""
        parameters = dict(module.named_parameters())
        weight = parameters.get("weight")
        takes = len(inspect.signature(type(module).forward).parameters)
        if len(parameters) != 1 or weight is None or weight.dim() != 1 or takes != 2:  # self and x, and no gate
            return None
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(weight.shape, generator=generator).to(weight.device)
        numbers = [v for v in vars(module).values() if isinstance(v, (int, float)) and not isinstance(v, bool)]
        epsilons = [float(number) for number in numbers if 0 < number < float("inf")]
        for eps in (*epsilons, torch.finfo(torch.float32).eps):  # the last is torch's own where it is given none
            # as large as eps makes it: the mean square and eps weigh the same
            x = torch.randn(3, *weight.shape, generator=generator).to(weight.device) * eps**0.5
            try:
                y = type(module).forward(with_parameters(module, {"weight": w}), x)
            except Exception:  # another module altogether, with another signature
                return None
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            for offset in (0.0, 1.0):
                if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, normed * (offset + w), rtol=1e-4):
                    return {"eps": eps, "offset": offset}
        return None

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.tensor("weight").dtype:  # a float32 residual: each spelling has its own dtype for the result
            with self.lerp.running.entered():
                return super().forward(x)
        x, rows = self.rows(x)
        return lerp_rms_norm(x, self.ends("weight"), **self.lerp.settings, **rows)


class LerpExperts(LerpModule):
    """Fused experts of transformers' interface (`transformers.integrations.moe`) at λ: weights [E, N, K].

    The router is interpolated as any layer is, so a token's own λ decides which experts it goes to, and then at which λ
    they compute for it.
    """

    kind = "experts"
    operands = tuple(name + end for end in ("", "_bias") for name in ("gate_up_proj", "up_proj", "down_proj"))
    transposed = False

    @classmethod
    def fit(cls, module: nn.Module) -> dict[str, Any] | None:
        takes = len(inspect.signature(type(module).forward).parameters)  # self, hidden states, indices, weights
        described = all(hasattr(module, name) for name in ("has_gate", "has_bias", "_apply_gate"))
        fits = described and takes == 4
        return {} if fits and getattr(module, "is_transposed", None) is cls.transposed else None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x, rows = self.rows(hidden_states)
        up, down = "gate_up_proj" if self.has_gate else "up_proj", "down_proj"
        k = top_k_index.shape[-1]
        expert, pair = top_k_index.reshape(-1).sort(stable=True)  # pairs of a token and an expert, by expert
        token = pair // k
        each = torch.arange(len(self.tensor(up)), device=x.device)
        where = {"expert_offsets": torch.searchsorted(expert, each, right=True, out_int32=True), "lam": rows["lam"]}
        if "rows_per_lam" in rows:
            where["row_to_lam"] = (token // rows["rows_per_lam"]).int()
        x = lerp_experts(
            x[token].to(self.tensor(up).dtype), self.ends(up), bias=self._bias(up), **where, **self.lerp.settings
        )
        with self.lerp.running.out_of_order():
            x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        x = lerp_experts(x, self.ends(down), bias=self._bias(down), **where, **self.lerp.settings)
        y = torch.empty_like(x)
        y[pair] = x  # each token's k rows side by side again
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1, 1)
        return y.unflatten(0, (-1, k)).sum(1).to(hidden_states.dtype)

    def _bias(self, name: str) -> LerpWeight | None:
        return self.ends(f"{name}_bias") if self.has_bias else None


class LerpTransposedExperts(LerpExperts):
    """The same with weights [E, K, N], as GPT-OSS has them; they lie transposed in memory while patched."""

    transposed = True

    @staticmethod
    def as_operand(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2) if tensor.dim() == 3 else tensor


class LerpParameters(LerpModule):
    """Any other module: its own forward, which reads its parameters and buffers at λ."""

    kind = "parameters"
    operands = ()

    @classmethod
    def fit(cls, module: nn.Module) -> dict[str, Any] | None:
        return {}


KINDS: tuple[type[LerpModule], ...] = (
    LerpLinear,
    LerpConv1D,
    LerpEmbedding,
    LerpLayerNorm,
    LerpRMSNorm,
    LerpExperts,
    LerpTransposedExperts,
    LerpParameters,  # last: it fits everything
)


def with_parameters(module: nn.Module, parameters: Mapping[str, Any]) -> nn.Module:
    """A shallow copy of a module that holds other parameters; the module itself is left alone."""
    probe = nn.Module.__new__(type(module))
    probe.__dict__ = copy.copy(module.__dict__)
    probe._parameters = dict(parameters)
    return probe


def kind_of(module: nn.Module) -> tuple[type[LerpModule], dict[str, Any]]:
    """The kind that computes what `module` does, with the operator's settings."""
    if "forward" in vars(module) and "_old_forward" not in vars(module):  # it no longer asks its class
        return LerpParameters, {}
    stored = {*module._parameters, *module._buffers}
    for kind in KINDS[:-1]:
        if any(isinstance(getattr(module, name, None), Tensor) and name not in stored for name in kind.operands):
            continue  # computed of other parameters, as a pruned weight is
        settings = kind.fit(module)
        if settings is not None and (kind.replaces in (None, type(module)) or _reaches(kind, module)):
            return kind, settings
    return LerpParameters, {}


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of a module, those of its children aside."""
    return [(name, t) for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None]


def obstacles(model: nn.Module) -> dict[str, str]:
    """Tensors of a model's state that cannot be interpolated, by name, and why: as a line of an error."""
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
    """Names of tensors that only training reads: how many batches a norm has seen."""
    norms = nn.modules.batchnorm._NormBase
    named = [(f"{name}." if name else "", m) for name, m in model.named_modules() if isinstance(m, norms)]
    return {f"{prefix}num_batches_tracked" for prefix, _ in named}


def _read_elsewhere(model: nn.Module) -> dict[int, str]:
    """Tensors that are read past their modules' attributes, where no λ reaches them, by id, and how."""
    found: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            if isinstance(module, nn.RNNBase) and name == "_flat_weights":
                continue  # made anew of the attributes in each forward pass
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            found |= {id(each): f"which {prefix}.{name} holds too" for each in held if isinstance(each, Tensor)}
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (BasePruningMethod, WeightNorm, SpectralNorm)):
                computed = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
                remedy = f"from which {type(hook).__name__} computes {computed}: remove that in both models first"
                found |= {id(t): remedy for name, t in own_tensors(module) if name.startswith(f"{computed}_")}
    return found


def readers(kinds: Mapping[nn.Module, tuple[type[LerpModule], dict[str, Any]]]) -> dict[int, type[LerpModule]]:
    """The kind that reads a tensor, by its id: of several modules that share one, the kind whose operator does."""
    found: dict[int, type[LerpModule]] = {}
    for module, (kind, _) in kinds.items():
        for name, tensor in own_tensors(module):
            reader = kind if name in kind.operands else LerpParameters
            if found.get(id(tensor), LerpParameters) is LerpParameters:
                found[id(tensor)] = reader
    return found


def stored_format(format: str, reader: type[LerpModule], name: str, tensor: Tensor) -> str:
    """How both ends of a tensor are stored where `format` is asked for: what no operator reads stays a pair."""
    quantised = reader is not LerpParameters and tensor.dim() > 1 and not name.endswith("bias")
    return format if quantised else "pair"


def _reaches(kind: type[LerpModule], module: nn.Module) -> bool:
    """Whether the forward of a subclass goes through its parent's, which is the one that a patch replaces."""

    class Reached(Exception):
        pass

    def forward(*_: Any) -> Tensor:
        raise Reached

    cls = type(module)
    probe = with_parameters(module, module._parameters)
    probe.__class__ = type(cls.__name__, (cls, type("Probe", (kind,), {"forward": forward})), {})
    try:
        type(probe).forward(probe, torch.zeros(1, 1, dtype=torch.long))
    except Reached:
        return True
    except Exception:
        return False
    return False


@functools.cache
def patched_class(kind: type[LerpModule], original: Any) -> type[LerpModule]:
    """The class of a patched module: a subclass of the original's whose innermost forward is the kind's."""
    if original is kind.replaces:
        return kind
    # a subclass keeps its own forward, which calls its parent's; a norm's forward is replaced as a whole
    bases = (kind, original) if kind.replaces is None else (original, kind)
    return type(f"Lerp{original.__name__}", bases, {"__module__": original.__module__})


def _kind_of(cls: type[LerpModule]) -> type[LerpModule]:
    return next(base for base in cls.__mro__ if base in KINDS)


def _rebuild(kind: type[LerpModule], original: Any, model: bool) -> LerpModule:
    from dami.model import patched_model_class

    if model:
        original = patched_model_class(original)
    cls = patched_class(kind, original)  # type: ignore[arg-type]  # mypy takes a class for its instance
    return cls.__new__(cls)


def reclass(module: nn.Module, cls: type[M]) -> M:
    """Changes a module's class in place, and what accelerate's hooks have kept of the old one."""
    module.__class__ = cls
    if "_old_forward" in module.__dict__:
        module._old_forward = cls.forward.__get__(module)
    return cast(M, module)
