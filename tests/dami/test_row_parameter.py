"""Modules of any kind inside a model: right for each row at its λ, or refused by name."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import dami
import pytest
import torch
import torch.nn.functional as F
from dami.layers.row_parameter import RULES, RowParameter, rule
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers import GitConfig, PreTrainedModel, Qwen3ForCausalLM

from tests.dami import architectures
from tests.dami.architectures import merged
from tests.dami.families import VOCABULARY, pair

LAM = [0.0, 0.37, 1.0, 1.2]
WIDTH = 24


class Block(nn.Module):
    """Computes something of [B, T, 24], with random parameters."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class Decay(Block):
    """A parameter used as state-space models do: reshaped, in an exponent, in another dtype, on a part of a tensor."""

    def __init__(self) -> None:
        super().__init__(A_log=(4,), dt_bias=(4,), D=(4,))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (4, 6))
        decay = -torch.exp(self.A_log.float())[None, None, :, None]
        dt = F.softplus(heads.mean(-1) + self.dt_bias)
        return (torch.exp(decay * dt[..., None]) * heads + heads * self.D[..., None]).flatten(2)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Step(Block):
    """One step of a convolution on its cached state, as decoding has it."""

    def __init__(self) -> None:
        super().__init__(kernel=(WIDTH, 1, 3), bias=(WIDTH,))

    def forward(self, x: Tensor) -> Tensor:
        state = x[:, :3].transpose(1, 2)
        y = (state * self.kernel.squeeze(1)).sum(-1) + self.bias
        return x + y[:, None]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.group, self.batch, self.layer = nn.GroupNorm(3, WIDTH), nn.BatchNorm1d(WIDTH), nn.LayerNorm((2, 12))
        self.batch.running_mean = torch.randn(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.batch(self.group(x.transpose(1, 2))).transpose(1, 2)
        return self.layer(y.unflatten(-1, (2, 12))).flatten(2)


class Sinks(Block):
    """What is expanded to the batch, with and without a dimension for it, and what has one value only."""

    def __init__(self) -> None:
        super().__init__(sinks=(6,), token=(1, 1, WIDTH), scale=())

    def forward(self, x: Tensor) -> Tensor:
        sinks = self.sinks.reshape(1, -1, 1).expand(len(x), -1, x.shape[1]).transpose(1, 2)
        joint = torch.cat([x, sinks, self.token.repeat(len(x), x.shape[1], 1)], -1).softmax(-1)
        return joint[..., :WIDTH] * self.scale


class InPlace(Block):
    def __init__(self) -> None:
        super().__init__(gain=(WIDTH,))

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y *= self.gain
        return y


class Positions(Block):
    """Combined with constants before it meets the batch."""

    def __init__(self) -> None:
        super().__init__(slopes=(4, 1), table=(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.slopes * torch.arange(x.shape[1])
        return (x.unflatten(-1, (4, 6)) + bias.t()[..., None]).flatten(2) + self.table[torch.arange(x.shape[1])]


class Buffers(nn.Module):
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Router(Block):
    """A linear layer in all but name, on all tokens in one dimension, and the same by heads."""

    def __init__(self) -> None:
        super().__init__(weight=(WIDTH, WIDTH), heads=(4, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.reshape(-1, WIDTH), self.weight)
        heads = torch.bmm(y.view(-1, 4, 6).transpose(0, 1), self.heads)
        return heads.transpose(0, 1).reshape(x.shape)


class Foreign(nn.Module):
    """Reads another module's weight, which stands at λ = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.inner.weight.dtype), self.inner.weight) @ self.inner.weight.t()


class Gathering(nn.Module):
    """Experts of the old kind: a list of layers, each called on the rows of some tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        chosen, y = self.gate(flat).argmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            y[rows] = expert(flat[rows])
        return y.view(x.shape)


class Transposed(nn.Linear):
    """A linear layer that no kind's operator takes the place of."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.t()


class GatheringToo(Gathering):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Transposed(WIDTH, WIDTH, bias=False) for _ in range(2))


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Permuted(TimeFirst):
    """As many rows as there are tokens, in another order."""

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(len(x) * x.shape[1]).flip(0)
        return self.inner(x.reshape(-1, WIDTH)[order])[order].view(x.shape)


class Quantile(Block):
    """What torch cannot vmap."""

    def __init__(self) -> None:
        super().__init__(gain=(WIDTH,))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain.sort().values[int(self.gain.argmax().item())]


class Rectified(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.PReLU(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x.transpose(1, 2)).transpose(1, 2)


class Attending(nn.Module):
    """`nn.MultiheadAttention`, which reads its projection's weights itself, and a layer that may run past all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.biased = nn.MultiheadAttention(WIDTH, 4, bias=False, add_bias_kv=True)  # time first
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = torch.ones(length, length).triu(1).bool()
        x = self.plain(x, x, x, attn_mask=mask)[0] + self.plain(x, x, x)[1] @ x
        heads = mask.expand(4 * len(x), length, length)
        seen = torch.zeros(len(x), length).bool()
        y = x.transpose(0, 1)
        y = self.biased(y, y, y, attn_mask=heads, key_padding_mask=seen, need_weights=False)[0]
        return self.layer(y.transpose(0, 1))


class Recurrent(nn.Module):
    """Layers that hand a list of all their weights on."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.lstm = nn.LSTM(WIDTH, WIDTH // 2, bidirectional=True)  # time first
        self.rnn = nn.RNN(WIDTH, WIDTH, batch_first=True)
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x, state = self.gru(x)
        y, (h, c) = self.lstm(x.transpose(0, 1))
        x = self.rnn(y.transpose(0, 1), state[:1])[0]
        return x + self.cell(x[:, 0], torch.cat([*(h + c)], -1))[:, None]


class ComputedBias(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, bias=False)
        del self._parameters["bias"]
        self.raw = nn.Parameter(torch.randn(WIDTH))

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        return self.raw.tanh()


class Computed(nn.Module):
    """Weights that are computed of other parameters when they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.spectral = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.conv = parametrizations.weight_norm(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), dim=2)
        self.bias = ComputedBias()

    def forward(self, x: Tensor) -> Tensor:
        return self.bias(self.conv(self.spectral(self.norm(x)).transpose(1, 2)).transpose(1, 2))


class Listed(nn.Module):
    """Parameters of lists, a buffer of two modules, a weight of three dimensions, bags of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ParameterList([torch.randn(WIDTH), torch.randn(WIDTH)])
        self.names = nn.ParameterDict({"gain": torch.randn(WIDTH)})
        self.first, self.second = nn.Module(), nn.Module()
        shared = torch.randn(WIDTH)
        self.first.register_buffer("scale", shared)
        self.second.register_buffer("scale", shared)
        self.bilinear = nn.Bilinear(WIDTH, WIDTH, WIDTH)
        self.bag = nn.EmbeddingBag(50, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bilinear(x * self.several[0] + self.several[1], x * self.names["gain"] * self.first.scale)
        return x + self.second.scale + self.bag((x[:, 0, :3].abs() * 10).long().clamp(max=49))[:, None]


class Counting(nn.Module):
    """A batch norm that has seen another number of batches at each end."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.norm.num_batches_tracked += int(torch.randint(1, 10**6, ()))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Around(nn.Module):
    """Around one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Held(Around):
    """A weight is read from where no patch can be."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH))
        self.weights = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights[0].T + self.layer.bias


class Bags(Around):
    """Bags of tokens of all sequences, one after another."""

    def __init__(self) -> None:
        super().__init__(nn.EmbeddingBag(50, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[..., 0].abs() * 10).long().clamp(max=49)
        return x + self.layer(ids.flatten(), torch.arange(len(x)) * x.shape[1])[:, None]


def ends_with(block: Callable[[], nn.Module]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models with such a block in the place of the first layer's MLP."""
    ends = pair("llama")
    for end in ends:
        end.model.layers[0].mlp = block().eval()
        with torch.no_grad():
            for parameter in end.model.layers[0].mlp.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return ends


def assert_right(block: Callable[[], nn.Module], length: int, intensity: Any = LAM) -> None:
    ends = ends_with(block)
    ids = torch.randint(3, VOCABULARY, (4, length))
    plain = [merged(*ends, lam)(ids).logits for lam in LAM]
    model = dami.patch_model(*ends)
    logits = model(ids, intensity=intensity).logits
    for row, lam in enumerate(intensity if isinstance(intensity, list) else [intensity] * 4):
        torch.testing.assert_close(logits[row], plain[LAM.index(lam)][row], rtol=1e-4, atol=1e-5)
    dami.unpatch_model(model)
    torch.testing.assert_close(model(ids).logits, plain[0])


BLOCKS = [Decay, Convolved, Step, Normed, Sinks, InPlace, Positions, Buffers, Router, Foreign, Rectified]
BLOCKS += [Attending, Recurrent, Computed, Listed, Counting]


@pytest.mark.parametrize("length", [7, 8])
@pytest.mark.parametrize("block", BLOCKS)
@torch.no_grad()
def test_each_row_is_that_of_the_model_merged_at_its_lam(block: type[nn.Module], length: int) -> None:
    assert_right(block, length)


class Scaled(Block):
    """Two functions of one parameter, as in Gemma 3n."""

    def __init__(self) -> None:
        super().__init__(scale=(WIDTH,))

    def forward(self, x: Tensor) -> Tensor:
        return x.type_as(self.scale) * self.scale


@torch.no_grad()
def test_dynamo_runs_every_function_of_a_parameter() -> None:
    """It has compiled code for the first one and run it for the second, too."""
    torch._dynamo.reset()
    model, ids = dami.patch_model(*ends_with(Scaled)), torch.randint(3, VOCABULARY, (4, 7))
    expected = model(ids, intensity=LAM).logits
    model.model.layers[0].mlp.compile(backend="eager")
    torch.testing.assert_close(model(ids, intensity=LAM).logits, expected)


@pytest.mark.parametrize("block", [*BLOCKS, Gathering, GatheringToo, TimeFirst, Permuted, Quantile])
@torch.no_grad()
def test_at_one_lam_anything_is_right(block: type[nn.Module]) -> None:
    assert_right(block, 7, 0.37)


@pytest.mark.parametrize("length", [4, 7, 8, 12])
@pytest.mark.parametrize("block", [Gathering, GatheringToo, TimeFirst, Permuted])
@torch.no_grad()
def test_rows_out_of_order_are_refused(block: type[nn.Module], length: int) -> None:
    model = dami.patch_model(*ends_with(block))
    ids = torch.randint(3, VOCABULARY, (4, length))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.(inner|experts)"):
            model(ids, intensity=LAM)


REACHED = [
    (
        lambda: Around(prune.random_unstructured(nn.Linear(WIDTH, WIDTH), "weight", 0.3)),
        "weight_orig, from which",
    ),
    (
        lambda: Around(weight_norm(nn.Linear(WIDTH, WIDTH))),
        "weight_g, from which WeightNorm computes weight: remove",
    ),
    (lambda: Around(spectral_norm(nn.Linear(WIDTH, WIDTH))), "weight_orig, from which SpectralNorm computes weight"),
    (lambda: Around(torch.jit.script(nn.Linear(WIDTH, WIDTH))), "weight, of a TorchScript module"),
    (Held, r"layer \(Linear\): weight, which model\.layers\.0\.mlp\.weights holds too"),
    (lambda: Block(rows=(WIDTH,)), "rows, a name that patched modules have taken"),
]


@pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm|torch.jit).*")
@pytest.mark.parametrize(("block", "message"), REACHED, ids=[message for _, message in REACHED])
@torch.no_grad()
def test_what_is_read_past_its_attribute_is_refused_while_patching(block: Any, message: str) -> None:
    instruct, thinking = ends_with(block)
    with pytest.raises(ValueError, match=rf"cannot be interpolated:(.|\n)*model\.layers\.0\.mlp.*{message}"):
        dami.patch_model(instruct, thinking)
    assert not hasattr(instruct, "dami_patch")
    thinking.model.layers[0].mlp.load_state_dict(instruct.model.layers[0].mlp.state_dict())
    model = dami.patch_model(instruct, thinking)  # equal ends need no λ
    assert dami.describe(model)


@torch.no_grad()
def test_bags_told_apart_by_offsets_take_one_lam() -> None:
    assert_right(Bags, 7, 0.37)
    model = dami.patch_model(*ends_with(Bags))
    with pytest.raises(ValueError, match=r"layer\.weight cannot have .* \(its bags are of several sequences"):
        model(torch.randint(3, VOCABULARY, (4, 7)), intensity=LAM)


@torch.no_grad()
def test_a_batch_norm_in_training_takes_one_lam() -> None:
    model = dami.patch_model(*ends_with(Counting))
    model.model.layers[0].mlp.train()
    ids = torch.randint(3, VOCABULARY, (4, 7))
    model(ids, intensity=0.5)
    with pytest.raises(ValueError, match=r"norm\..* \(in training it normalises over several sequences: call"):
        model(ids, intensity=LAM)


@torch.no_grad()
def test_what_cannot_be_run_for_each_sequence_is_named() -> None:
    model = dami.patch_model(*ends_with(Quantile))
    with pytest.raises(
        ValueError, match=r"mlp\.gain cannot have one λ per sequence in .*item.* one λ for the whole batch"
    ):
        model(torch.randint(3, VOCABULARY, (4, 7)), intensity=LAM)


@torch.no_grad()
def test_sequences_and_tokens_that_cannot_be_told_apart_are_refused() -> None:
    model = dami.patch_model(*ends_with(Positions))
    with pytest.raises(ValueError, match=r"slopes cannot have .* shape \[4\] may be of 4 sequences or of 4 tokens"):
        model(torch.randint(3, VOCABULARY, (4, 4)), intensity=LAM)


@pytest.fixture
def _rules() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.usefixtures("_rules")
@torch.no_grad()
def test_a_rule_takes_the_place_of_a_function() -> None:
    called = []

    @rule(F.prelu)
    def prelu(input: Tensor, weight: Any) -> Any:
        called.append(weight)
        rows = weight.rows.view(len(input), -1, *[1] * (input.dim() - 2))
        return torch.where(input > 0, input, rows * input)

    assert_right(Rectified, 7)
    assert isinstance(called[0], RowParameter)


@torch.no_grad()
def test_a_model_at_rest_shows_its_base() -> None:
    ends = ends_with(Decay)
    base = ends[0].model.layers[0].mlp.A_log
    model = dami.patch_model(*ends)
    block = model.model.layers[0].mlp
    assert block.A_log is base
    assert model.get_parameter("model.layers.0.mlp.A_log") is base
    with dami.intensity(model, 1.0):
        assert torch.equal(block.A_log, ends[1].model.layers[0].mlp.A_log)
    with dami.intensity(model, LAM):
        assert repr(block.A_log) == "RowParameter(model.layers.0.mlp.A_log, [4], λ [4])"
        assert repr(copy.copy(model.lm_head.weight)).startswith("Parameter")


@torch.no_grad()
def test_a_model_with_parameters_of_its_own_is_copied_generates_and_comes_back() -> None:
    ends = pair("llama")
    for end, value in zip(ends, (0.0, 1.0), strict=True):
        end.bias = nn.Parameter(torch.full((1,), value))
    model = dami.patch_model(*ends)
    names = {row.name: row.kind for row in dami.describe(model).rows}
    assert names["bias"] == "parameters"
    ids = torch.randint(3, VOCABULARY, (4, 7))
    tokens = model.generate(ids, intensity=LAM, max_new_tokens=3, do_sample=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(ids, intensity=LAM, max_new_tokens=3, do_sample=False), tokens)
        with dami.intensity(other, 0.5):
            assert other.bias == 0.5
        assert type(dami.unpatch_model(other)) is type(ends[1])


def test_gradients_reach_intensity_through_any_parameter() -> None:
    ends = ends_with(Decay)
    ids = torch.randint(3, VOCABULARY, (2, 7))
    lam = torch.tensor([0.2, 0.7], requires_grad=True)
    states, wanted = [dict(end.named_parameters()) for end in ends], []
    for row in range(2):
        mine = lam[row].detach().requires_grad_()
        weights = {name: torch.lerp(base, states[1][name], mine) for name, base in states[0].items()}
        logits = torch.func.functional_call(ends[0], weights, (ids[row : row + 1],)).logits
        wanted.append(torch.autograd.grad(logits.square().sum(), mine)[0])
    dami.patch_model(*ends)(ids, intensity=lam).logits.square().sum().backward()
    torch.testing.assert_close(lam.grad, torch.stack(wanted), rtol=1e-3, atol=0)


class Mixed(nn.Module):
    """Combines a parameter of one module with that of another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.decay = nn.Linear(WIDTH, WIDTH), Decay()

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.inner.weight[:, 0] + self.inner.bias * self.decay.D.repeat_interleave(6))


@torch.no_grad()
def test_parameters_at_different_dials_are_combined() -> None:
    ends = ends_with(Mixed)
    ids = torch.randint(3, VOCABULARY, (4, 7))
    model = dami.patch_model(*ends)
    for part in ("*.inner", "*.decay"):
        with dami.intensity(model, {"*": LAM, part: 0.5}):
            mixed = model(ids).logits
        for row, lam in enumerate(LAM):
            with dami.intensity(model, {"*": lam, part: 0.5}):
                torch.testing.assert_close(mixed[row], model(ids).logits[row], rtol=1e-4, atol=1e-5)


class Gated(Qwen3ForCausalLM):
    """Runs on tokens and one more argument."""

    def forward(self, input_ids: Any = None, gate: Any = None, **kwargs: Any) -> Any:
        out = super().forward(input_ids, **kwargs)
        out.logits = out.logits * gate
        return out


@torch.no_grad()
def test_a_model_that_cannot_be_checked_says_so() -> None:
    model, thinking = pair("qwen3")
    for each in (model, thinking):
        each.__class__ = Gated
    ids, lam = torch.tensor([[5, 6, 7], [8, 9, 10]]), [0.0, 1.0]
    wanted = [model(ids[:1], gate=2.0).logits[0], thinking(ids[1:], gate=2.0).logits[0]]
    dami.patch_model(model, thinking)
    with pytest.warns(UserWarning, match=r"^Gated could not be checked for a λ .* alone: .* \(TypeError\("):
        found = model(ids, gate=2.0, intensity=lam).logits
    torch.testing.assert_close(found, torch.stack(wanted))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, gate=2.0, intensity=lam)


@torch.no_grad()
def test_images_take_one_lam_for_the_batch() -> None:
    """How many are of which sequence is not in their shape."""
    model = dami.patch_model(*architectures.pair(GitConfig))
    ids = torch.randint(4, architectures.VOCABULARY, (2, 7))
    images = torch.randn(2, 3, 32, 32)
    model(ids, pixel_values=images, intensity=0.5)
    with pytest.raises(ValueError, match="pixel_values takes one intensity for the batch"):
        model(ids, pixel_values=images, intensity=[0.0, 1.0])
