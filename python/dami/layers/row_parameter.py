"""A parameter when every sequence has its own λ: to a module it is one tensor, but it holds a value per sequence.

A module that uses a parameter in its own way (a decay, a convolution, a scale, a sink) keeps its own forward, but what
it reads as `self.A_log` is a `RowParameter`. Torch passes every function call on it to `__torch_function__`, which runs
the function under `torch.vmap` over the sequences. This covers everything that torch can vmap. A function for which
there is a better way has a rule of its own, of about five lines: see the end of this file.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dami.dial.state import ForwardState
from dami.upstream import storageless, tree_flatten, tree_map, tree_unflatten
from dami_kernels import LerpWeight, lerp_embedding, lerp_linear
from dami_kernels.rows import lerp

RULES: dict[Any, Callable[..., Any]] = {}


def rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function to call instead of these torch functions if one of their arguments is a `RowParameter`.

    It takes the torch function's arguments, and may return NotImplemented to fall back to `torch.vmap`.
    """

    def register(instead: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(functions, instead))
        return instead

    return register


def blend(ends: LerpWeight, lam: Tensor) -> Tensor:
    """Returns a parameter at λ [], or [B, *shape] at λ [B]: computed in float32, exact at both ends, rounded once."""
    base, target = (end.float() for end in (ends.tensors if ends.format == "pair" else ends.unpack()))
    if lam.dim():
        base, target = base.unsqueeze(0), target.unsqueeze(0)
        lam = lam.view(-1, *[1] * (base.dim() - 1))
    return lerp(base, target, lam).to(ends.dtype)


class RowParameter(Tensor):
    """A tensor with the shape of one parameter that holds a value for each of B sequences.

    It has no storage of its own, so code that bypasses torch's functions fails instead of reading one sequence's value
    for all.

    Attributes:
        label: name of the parameter it comes from, for error messages.
        ends: both ends, if it is a stored parameter; None if it was computed from one.
        lam: float32 [B], or [] if all sequences share it: then functions see the blended parameter.
        running: the forward pass. Together with B it tells which tensors have a batch dimension.
    """

    label: str
    lam: Tensor
    running: ForwardState
    ends: LerpWeight | None
    _rows: Tensor | None

    @staticmethod
    def __new__(
        cls, label: str, lam: Tensor, running: ForwardState, ends: LerpWeight | None, rows: Tensor | None = None
    ) -> RowParameter:
        like = ends if rows is None else rows
        assert like is not None
        shape = like.shape if rows is None else like.shape[1:]
        self = storageless(cls, shape, like.dtype, like.device)
        self.label, self.lam, self.running, self.ends, self._rows = label, lam, running, ends, rows
        return self

    @property
    def rows(self) -> Tensor:
        """The values, [B, *shape]; [*shape] if λ is []."""
        if self._rows is None:
            assert self.ends is not None
            self._rows = blend(self.ends, self.lam)
        return self._rows

    def with_rows(self, rows: Tensor) -> RowParameter:
        """Wraps the result of a function that was applied to this parameter for each sequence."""
        return RowParameter(self.label, self.lam, self.running, None, rows)

    def of_batch(self) -> Tensor:
        """Returns an ordinary tensor whose first dimension is the batch; here, that dimension must be 1."""
        if self.dim() == 0 or self.shape[0] != 1:
            raise ValueError(
                f"{self.label}: got shape {list(self.shape)}, where the first dimension must be 1, for the batch"
            )
        return self.rows.flatten(0, 1)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"RowParameter({self.label}, {list(self.shape)}, λ {list(self.lam.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        return _applied(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} goes around torch functions, and cannot read a parameter with one λ per sequence")


@torch.compiler.disable  # Dynamo takes code that it has compiled for one function for another as well
def _applied(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs a function, of whose arguments one at least is a `RowParameter`."""
    blended = partial(tree_map, lambda x: x.rows if isinstance(x, RowParameter) and x.lam.dim() == 0 else x)
    args, kwargs = blended(args), blended(kwargs)
    first = next((leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, RowParameter)), None)
    if first is None:
        return func(*args, **kwargs)
    try:
        if first.running.packed is not None:
            return _packed(func, args, kwargs, first)
        result = RULES[func](*args, **kwargs) if func in RULES else NotImplemented
        return _vmapped(func, args, kwargs) if result is NotImplemented else result
    except Exception as error:
        name = getattr(func, "__qualname__", str(func))
        raise ValueError(
            f"{first.label} cannot have one λ per sequence in {name} ({error}); use one λ for the whole batch"
        ) from error


METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_meta", "is_cuda")
    ),
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.is_complex),
}


ALIGNED = re.compile(
    r"_*[ri]?(add|sub|rsub|mul|div|truediv|true_divide|pow|maximum|minimum|where|lerp|matmul|bmm|baddbmm)_*"
)

# functions that index along a dimension, so splitting the batch into sequences would change the result
ALONG = re.compile(r"_*(index_\w+|scatter\w*|gather|take\w*|put|roll|flip|sort|cumsum|cumprod)_*")


def batch_dim(tensor: Tensor, parameter: RowParameter, func: Any) -> int | None:
    """Returns which dimension of an ordinary tensor is the batch, usually the first; None if there is none.

    If a function aligns the shapes of its arguments, a dimension where the parameter is larger than 1 is not the batch.
    The batch can then be the second dimension, as in products of groups of heads, [G, B·T, K] · [G, K, N].
    """
    batch, running = len(parameter.lam), parameter.running
    if isinstance(tensor, nn.Parameter) or tensor.dim() == 0:
        return None
    at = 0
    if ALIGNED.fullmatch(func.__name__) and tensor.dim() == parameter.dim() and parameter.shape[0] > 1:
        at = 1
        if tensor.dim() < 3 or tensor.shape[0] not in (1, parameter.shape[0]):
            return None
    size = tensor.shape[at]
    if size == 1 or size % batch != 0 or not running.counts(size):
        return None
    flat = tensor.dim() == 2 and re.fullmatch("_*r?(linear|matmul|mm|addmm)_*", func.__name__) is not None
    if flat and running.are_gathered(tensor):
        raise ValueError(f"rows of shape {list(tensor.shape)} are not those of all tokens")
    if size == running.tokens and tensor.dim() < 3 and running.sequences != 1:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} may be of {size} sequences or of {size} tokens")
    return at


def _vmapped(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs `func` for each sequence; returns a `RowParameter`, or an ordinary tensor if an argument has a batch."""
    leaves, spec = tree_flatten((args, kwargs))
    first = next(leaf for leaf in leaves if isinstance(leaf, RowParameter))
    inplace = func.__name__.endswith("_") and not func.__name__.endswith("__")
    if func is Tensor.__setitem__ or (inplace and isinstance(args[0], RowParameter)):
        raise ValueError("it works in place")
    mapped: dict[int, Tensor] = {}
    at = per_sequence = 0
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, RowParameter):
            mapped[index] = leaf.rows
        elif isinstance(leaf, Tensor) and (found := batch_dim(leaf, first, func)) is not None:
            if leaf.dim() < first.dim():
                raise ValueError(f"a tensor of the batch, {list(leaf.shape)}, has fewer dimensions than the parameter")
            if per_sequence and found != at:
                raise ValueError("the batch is not in one place in all its arguments")
            at = found
            mapped[index] = leaf.unflatten(at, (len(first.lam), -1)).movedim(at, 0)
            per_sequence = mapped[index].shape[1 + at]

    if per_sequence and ALONG.fullmatch(func.__name__):
        raise ValueError("it may work along the batch")

    def one(*tensors: Tensor) -> Any:
        inner = list(leaves)
        for index, tensor in zip(mapped, tensors, strict=True):
            inner[index] = tensor
        inner_args, inner_kwargs = tree_unflatten(inner, spec)
        return func(*inner_args, **inner_kwargs)

    def result(rows: Any) -> Any:
        if not isinstance(rows, Tensor):
            return rows
        if not per_sequence:
            return first.with_rows(rows)
        if rows.dim() < 2 + at or rows.shape[1 + at] != per_sequence:
            raise ValueError(f"its result has shape {list(rows.shape[1:])} for a sequence, not {per_sequence} first")
        return rows.movedim(0, at).flatten(at, at + 1).contiguous()

    results = tree_map(result, torch.vmap(one)(*mapped.values()))
    return args[0] if inplace else results


ELEMENTWISE = re.compile(r"_*[ri]?(add|sub|mul|div|truediv|true_divide|pow|maximum|minimum)_*")
CASTS = {Tensor.to, Tensor.type, Tensor.float, Tensor.type_as}


def _packed(func: Any, args: Any, kwargs: Any, first: RowParameter) -> Any:
    """Runs `func` in a packed row, where each token has its own λ, if it is known to act token by token."""
    name, tokens = func.__name__, len(first.lam)
    operands = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and not isinstance(x, RowParameter)]
    in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    if func is F.linear:
        return _packed_linear(*args, **kwargs)
    if func in CASTS and first.ends is not None and first.ends.format == "pair":
        dtype = func(torch.empty(0, dtype=first.dtype), *args[1:], **kwargs).dtype
        ends = LerpWeight(tuple(end.to(dtype) for end in first.ends.tensors), "pair", first.ends.shape, dtype)
        return RowParameter(first.label, first.lam, first.running, ends)
    if not operands and not in_place:
        return _vmapped(func, args, kwargs)
    if not ELEMENTWISE.fullmatch(name) or (in_place and isinstance(args[0], RowParameter)):
        raise ValueError("tokens of several sequences stand in one row")
    of_tokens = [x for x in operands if x.dim()]
    lead = {2 if x.shape[:2] == (1, tokens) else 1 if x.shape[:1] == (tokens,) else 0 for x in of_tokens}
    features = max(x.dim() for x in of_tokens) - max(lead) if of_tokens else first.dim()
    outer = first.shape[: max(0, first.dim() - features)]  # must be dimensions of size 1, which broadcast over tokens
    if len(lead) > 1 or 0 in lead or outer.numel() != 1:
        raise ValueError(f"operands {[list(x.shape) for x in operands]} do not begin with the {tokens} tokens")

    def aligned(x: Any) -> Any:
        """Returns a parameter's values for each token, followed by as many dimensions as the operands have."""
        if not isinstance(x, RowParameter):
            return x
        shape = x.shape[x.dim() - features :] if x.dim() > features else (*[1] * (features - x.dim()), *x.shape)
        return x.rows.view(tokens, *shape)

    return func(*tree_map(aligned, args), **tree_map(aligned, kwargs))


def _packed_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer that is not an `nn.Linear`, such as a router."""
    ends = [each.ends if isinstance(each, RowParameter) else None for each in (weight, bias)]
    if not isinstance(weight, RowParameter) or ends[0] is None or (bias is not None and ends[1] is None):
        raise ValueError("its weight or bias is not a parameter as it was stored")
    if input.shape[:-1].numel() != len(weight.lam):
        raise ValueError(f"its input {list(input.shape)} is not one row of {len(weight.lam)} tokens")
    return lerp_linear(input, ends[0], weight.lam, bias=ends[1], rows_per_lam=1, invariant=weight.running.invariant)


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """Returns the sizes that a function got as one argument or as several."""
    return sizes if isinstance(sizes[0], int) else tuple(sizes[0])


@rule(Tensor.expand, Tensor.broadcast_to, torch.broadcast_to)
def _expand(parameter: RowParameter, *sizes: Any) -> Any:
    """Returns an ordinary tensor if the first dimension is expanded to the batch: attention sinks, query tokens."""
    shape, batch, running = _sizes(sizes), len(parameter.lam), parameter.running
    grows = len(shape) > parameter.dim() or parameter.shape[0] == 1
    if not grows or shape[0] % batch != 0 or not running.counts(shape[0]):
        return NotImplemented
    if shape[0] == running.tokens and len(shape) < 3:
        raise ValueError(f"the {shape[0]} of {list(shape)} may be sequences or tokens")
    lead = len(shape) - parameter.dim()
    rows = parameter.rows.view(batch, *[1] * (lead - 1), *parameter.shape[0 if lead else 1 :])
    return rows.repeat_interleave(shape[0] // batch, 0).expand(shape)


@rule(Tensor.expand_as)
def _expand_as(parameter: RowParameter, other: Tensor) -> Any:
    return parameter.expand(other.shape)


@rule(Tensor.repeat)
def _repeat(parameter: RowParameter, *sizes: Any) -> Any:
    times = _sizes(sizes)
    lead = parameter[(None,) * (len(times) - parameter.dim())] if len(times) > parameter.dim() else parameter
    if lead.shape[0] != 1 or times[0] == 1:
        return NotImplemented
    return lead.expand(times[0], *lead.shape[1:]).repeat(1, *times[1:])


@rule(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """A linear layer that is not an `nn.Linear`, such as a router: passes both ends to the operator, unblended."""
    if not isinstance(weight, RowParameter) or weight.ends is None or isinstance(input, RowParameter):
        return NotImplemented
    if batch_dim(input, weight, F.linear) != 0 or input.dtype != weight.dtype:
        return NotImplemented
    y = lerp_linear(input, weight.ends, weight.lam, rows_per_lam=input.shape[:-1].numel() // len(weight.lam))
    return y if bias is None else y + bias


@rule(F.embedding)
def _embedding(input: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: Any = None, **_: Any) -> Any:
    if not isinstance(weight, RowParameter) or weight.ends is None or max_norm is not None:
        return NotImplemented
    if batch_dim(input, weight, F.embedding) != 0:
        return NotImplemented
    return lerp_embedding(input, weight.ends, weight.lam, rows_per_lam=input.numel() // len(weight.lam))


def _each(value: Any, parameter: RowParameter, at: int) -> Sequence[Any]:
    """Splits an argument by sequence: an ordinary tensor along dimension `at`, its batch, and a `RowParameter` into its
    values. Anything else goes to every sequence whole."""
    batch = len(parameter.lam)
    if isinstance(value, RowParameter):
        return value.rows.unbind()
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        if value.shape[at] % batch != 0 or not parameter.running.counts(value.shape[at]):
            raise ValueError(f"dimension {at} of {list(value.shape)} is not the batch")
        return value.chunk(batch, at)
    if isinstance(value, (list, tuple)):
        return list(zip(*(_each(item, parameter, at) for item in value), strict=True))
    return [value] * batch


def _per_sequence(func: Any, given: Mapping[str, Any], parameter: RowParameter, places: Mapping[str, int]) -> list[Any]:
    """Returns the results of `func` for each sequence; `places` holds the batch dimension of each argument."""
    split = {name: _each(given[name], parameter, at) for name, at in places.items() if given.get(name) is not None}
    split |= {name: _each(value, parameter, 0) for name, value in given.items() if isinstance(value, RowParameter)}
    return [func(**{**given, **{name: each[row] for name, each in split.items()}}) for row in range(len(parameter.lam))]


ATTENTION = inspect.signature(F.multi_head_attention_forward)


@rule(F.multi_head_attention_forward)
def _multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    """Runs `nn.MultiheadAttention` for each sequence: the batch is the second dimension of query, key and value."""
    given = ATTENTION.bind(*args, **kwargs).arguments
    parameter = next(value for value in given.values() if isinstance(value, RowParameter))
    query, mask = given["query"], given.get("attn_mask")
    if isinstance(query, RowParameter) or query.dim() != 3 or given.get("static_k") is not None:
        return NotImplemented
    if mask is not None and mask.dim() == 3:  # one mask per head of each sequence
        given["attn_mask"] = parameter.with_rows(mask.unflatten(0, (len(parameter.lam), -1)))
    places = {"query": 1, "key": 1, "value": 1, "key_padding_mask": 0}
    outputs, weights = zip(*_per_sequence(F.multi_head_attention_forward, given, parameter, places), strict=True)
    return torch.cat(outputs, 1), None if weights[0] is None else torch.cat(weights)


BATCH_NORM = inspect.signature(F.batch_norm)


@rule(F.batch_norm)
def _batch_norm(*args: Any, **kwargs: Any) -> Any:
    given = BATCH_NORM.bind(*args, **kwargs).arguments
    if given.get("training"):
        raise ValueError("in training it normalises over several sequences: call model.eval()")
    if isinstance(given["input"], RowParameter):
        return NotImplemented
    parameter = next(value for value in given.values() if isinstance(value, RowParameter))
    return torch.cat(_per_sequence(F.batch_norm, given, parameter, {"input": 0}))


def _recurrent(function: Any, input: Any, hx: Any, weights: Any, *options: Any) -> Any:
    """Runs `nn.RNN`, `nn.LSTM` or `nn.GRU` for each sequence; the last option says whether the batch comes first."""
    if not isinstance(weights, (list, tuple)) or isinstance(input, RowParameter):
        raise ValueError("a packed sequence has its tokens in the order of time")
    parameter = next(weight for weight in weights if isinstance(weight, RowParameter))
    at = 0 if options[-1] else 1
    parts = zip(_each(input, parameter, at), _each(hx, parameter, 1), _each(weights, parameter, 0), strict=True)
    outputs, *states = zip(*(function(*part, *options) for part in parts), strict=True)
    return torch.cat(outputs, at), *(torch.cat(state, 1) for state in states)


for _function in (torch.gru, torch.lstm, torch.rnn_tanh, torch.rnn_relu):
    rule(_function)(partial(_recurrent, _function))


@rule(F.embedding_bag)
def _embedding_bag(input: Tensor, weight: Tensor, offsets: Any = None, *args: Any, **kwargs: Any) -> Any:
    if offsets is not None:
        raise ValueError("its bags are of several sequences, told apart by offsets")
    return NotImplemented
