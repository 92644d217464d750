"""The kinds of patched modules.

A patched module is the original object with its class changed to a subclass of the original class. Its parameters keep
their places and names, as the base end; the target end is registered beside them (`weight_target`). So isinstance
checks, hooks, tied references, `module.weight.dtype`, `.to()` and `state_dict` keep working, and unpatching gives back
the very same modules.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dami.layers.base import LerpModule, own_tensors, placeholder
from dami.layers.per_sequence import alone, number_of_lam
from dami.layers.routing import by_expert
from dami.layers.siblings import pays, together
from dami.upstream import OF_MODULES, PARAMETERS, buffers_of, describes_experts, gated, is_wrapped, parameters_of
from dami_kernels import LerpWeight, lerp_embedding, lerp_experts, lerp_layer_norm, lerp_linear, lerp_rms_norm


@functools.cache
def arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of the arguments of a class's forward, self among them."""
    return tuple(inspect.signature(forward).parameters)


class LerpLinear(LerpModule, nn.Linear):
    """`nn.Linear` at λ."""

    kind = "linear"
    replaces = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        x, rows = self.rows(input)
        in_pass = not torch.compiler.is_compiling() and self.lerp.running.sequences is not None
        if in_pass and pays(x) and not torch.is_grad_enabled() and type(x) is Tensor and not x.is_inference():
            y = together(self, x, rows)
            if y is not None:
                return y
        return lerp_linear(x, self.ends("weight"), bias=self.bias_ends(), **self.lerp.settings, **rows)


class LerpConv1D(LerpModule, Conv1D):
    """transformers' `Conv1D` at λ: a linear layer whose weight is [K, N].

    While patched, stored tensors keep that shape, but their memory is transposed, as the operator reads it.
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
    """`nn.Embedding` at λ. A subclass that scales the result, such as Gemma's, still does so."""

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
    """Any RMS norm at λ: any module with one vector `weight` that computes x/rms(x)·(offset + weight)."""

    kind = "rms_norm"

    @classmethod
    def fit(cls, module: nn.Module) -> dict[str, Any] | None:
        """Finds eps and offset by running the module on random input, as many classes implement this formula."""
        weight = parameters_of(module).get("weight")
        if weight is None or weight.dim() != 1 or len([*module.parameters()]) != 1:
            return None
        if len(arguments(type(module).forward)) != 2:  # self and x, and no gate
            return None
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight.device)
        numbers = [v for v in vars(module).values() if isinstance(v, (int, float)) and not isinstance(v, bool)]
        epsilons = [float(number) for number in numbers if 0 < number < float("inf")]
        for eps in (*epsilons, torch.finfo(torch.float32).eps):  # the last is torch's default
            # scaled so that the mean square and eps are about equal
            x = torch.randn(3, *weight.shape, generator=generator, dtype=torch.float32).to(weight.device) * eps**0.5
            try:
                y = type(module).forward(with_parameters(module, {"weight": w}), x)
            except Exception:  # not a norm: it has another signature
                return None
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            for offset in (0.0, 1.0):
                if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, normed * (offset + w), rtol=1e-4):
                    return {"eps": eps, "offset": offset}
        return None

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.tensor("weight").dtype:  # a float32 residual: norms differ in the dtype that they return
            with self.lerp.running.entered():
                return super().forward(x)
        x, rows = self.rows(x)
        return lerp_rms_norm(x, self.ends("weight"), **self.lerp.settings, **rows)


class LerpExperts(LerpModule):
    """Fused experts with transformers' interface (`transformers.integrations.moe`) at λ: weights [E, N, K].

    The router is interpolated like any other layer, so a token's λ decides which experts it goes to as well as the λ
    at which they compute.
    """

    kind = "experts"
    operands = tuple(name + end for end in ("", "_bias") for name in ("gate_up_proj", "up_proj", "down_proj"))
    transposed = False

    @classmethod
    def fit(cls, module: nn.Module) -> dict[str, Any] | None:
        if not describes_experts(module) or getattr(module, "is_transposed", None) is not cls.transposed:
            return None
        return {} if len(arguments(type(module).forward)) == 4 else None  # self, hidden states, indices, weights

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x, rows = self.rows(hidden_states)
        up, down = "gate_up_proj" if self.has_gate else "up_proj", "down_proj"
        k = top_k_index.shape[-1]
        _, pair, offsets = by_expert(top_k_index, len(self.tensor(up)))
        token = pair // k
        where = {"expert_offsets": offsets, "lam": rows["lam"]}
        if "rows_per_lam" in rows:
            where["row_to_lam"] = (token // rows["rows_per_lam"]).int()
        x = lerp_experts(
            x[token].to(self.tensor(up).dtype), self.ends(up), bias=self._bias(up), **where, **self.lerp.settings
        )
        with self.lerp.running.out_of_order():
            x = gated(self, x) if self.has_gate else self.act_fn(x)
        x = lerp_experts(x, self.ends(down), bias=self._bias(down), **where, **self.lerp.settings)
        y = torch.empty_like(x)
        y[pair] = x  # puts each token's k rows next to each other again
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1, 1)
        return y.unflatten(0, (-1, k)).sum(1).to(hidden_states.dtype)

    def _bias(self, name: str) -> LerpWeight | None:
        return self.ends(f"{name}_bias") if self.has_bias else None


class LerpTransposedExperts(LerpExperts):
    """Fused experts with weights [E, K, N], such as GPT-OSS's; their memory is transposed while patched."""

    transposed = True

    @staticmethod
    def as_operand(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2) if tensor.dim() == 3 else tensor


class LerpRouted(LerpModule):
    """Experts with a forward of their own, which gathers the rows of each expert: one sequence after another at its λ.

    They are known by the arguments of transformers' experts. Nothing else would tell the λ of a gathered row.
    """

    kind = "routed"
    operands = ()

    @classmethod
    def fit(cls, module: nn.Module) -> dict[str, Any] | None:
        return (
            {} if arguments(type(module).forward) == ("self", "hidden_states", "top_k_index", "top_k_weights") else None
        )

    def forward(self, *given: Tensor) -> Tensor:
        modules, running = [each for each in self.modules() if isinstance(each, LerpModule)], self.lerp.running
        number = None if running.packed is not None else number_of_lam(modules)
        if number is None:
            return super().forward(*given)
        for x in given:
            if x.shape[0] % number != 0 or not running.counts(x.shape[0]):
                raise ValueError(f"{self.lerp.name} got rows {list(x.shape)} that are not of all {number} sequences")
        results = []
        for at, parts in enumerate(zip(*(x.chunk(number) for x in given), strict=True)):
            with alone(modules, running, at, running.tokens):
                results.append(super().forward(*parts))
        return torch.cat(results)


class LerpParameters(LerpModule):
    """Any other module: keeps its own forward, which reads its parameters and buffers at λ."""

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
    LerpRouted,
    LerpParameters,  # last: it fits everything
)


def with_parameters(module: nn.Module, parameters: Mapping[str, Any]) -> nn.Module:
    """Returns a shallow copy of a module that holds other parameters, and leaves the module itself unchanged."""
    probe = nn.Module.__new__(type(module))
    vars(probe).update(vars(module))
    vars(probe)[PARAMETERS] = dict(parameters)
    return probe


def kind_of(module: nn.Module) -> tuple[type[LerpModule], dict[str, Any]]:
    """Returns the kind that computes what `module` does, with the operator's settings."""
    if "forward" in vars(module) and not is_wrapped(module):  # its class's forward is not called
        return LerpParameters, {}
    stored = {*parameters_of(module), *buffers_of(module)}
    for kind in KINDS[:-1]:
        if any(isinstance(getattr(module, name, None), Tensor) and name not in stored for name in kind.operands):
            continue  # computed from other parameters, such as a pruned weight
        settings = kind.fit(module)
        if settings is not None and (kind.replaces in (None, type(module)) or _reaches(kind, module)):
            return kind, settings
    return LerpParameters, {}


def kinds_of(model: nn.Module, on_meta: bool = False) -> dict[nn.Module, tuple[type[LerpModule], dict[str, Any]]]:
    """Returns `kind_of`, or `kind_on_meta`, of every module of a model. Modules that are alike are looked at once."""
    find = kind_on_meta if on_meta else kind_of
    known: dict[Any, tuple[type[LerpModule], dict[str, Any]]] = {}
    found = {}
    for module in model.modules():
        key = _alike(module)
        if key not in known:
            known[key] = find(module)
        kind, settings = known[key]
        found[module] = kind, {**settings}
    return found


def _alike(module: nn.Module) -> Any:
    """Returns what a module without children has in common with those of the same kind; of any other, the module."""
    if next(module.children(), None) is not None:
        return module
    tensors = tuple((name, t.shape, t.dtype, t.device) for name, t in own_tensors(module))
    values = []
    for name, value in vars(module).items():
        if name in OF_MODULES or (isinstance(value, (dict, set)) and not value):  # a module has many empty ones
            continue
        values.append((name, value if isinstance(value, (bool, int, float, str)) else id(value)))
    return type(module), tensors, tuple(values)


def readers(kinds: Mapping[nn.Module, tuple[type[LerpModule], dict[str, Any]]]) -> dict[int, type[LerpModule]]:
    """Maps each tensor's id to the kind that reads it; if modules share it, to one whose operator takes it, if any."""
    found: dict[int, type[LerpModule]] = {}
    for module, (kind, _) in kinds.items():
        for name, tensor in own_tensors(module):
            reader = kind if name in kind.operands else LerpParameters
            if found.get(id(tensor), LerpParameters) is LerpParameters:
                found[id(tensor)] = reader
    return found


def stored_format(format: str, reader: type[LerpModule], name: str, tensor: Tensor) -> str:
    """Returns the format for storing a tensor's ends when `format` is asked for: "pair" if no operator reads it."""
    quantised = reader is not LerpParameters and tensor.dim() > 1 and not name.endswith("bias")
    return format if quantised else "pair"


def _reaches(kind: type[LerpModule], module: nn.Module) -> bool:
    """Whether a subclass's forward calls the parent's forward, which patching replaces."""

    class Reached(Exception):
        pass

    def forward(*_: Any) -> Tensor:
        raise Reached

    cls = type(module)
    probe = with_parameters(module, parameters_of(module))
    probe.__class__ = type(cls.__name__, (cls, type("Probe", (kind,), {"forward": forward})), {})
    try:
        type(probe).forward(probe, torch.zeros(1, 1, dtype=torch.long))
    except Reached:
        return True
    except Exception:
        return False
    return False


def kind_on_meta(module: nn.Module) -> tuple[type[LerpModule], dict[str, Any]]:
    """Returns `kind_of` for a module on the meta device, using a copy on the CPU that takes no memory."""
    with torch.device("cpu"):
        parameters = {
            name: None if parameter is None else placeholder(torch.empty(0, dtype=parameter.dtype), parameter.shape)
            for name, parameter in parameters_of(module).items()
        }
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # while a model is loading, the default is its dtype
        try:
            return kind_of(with_parameters(module, parameters))
        finally:
            torch.set_default_dtype(before)
