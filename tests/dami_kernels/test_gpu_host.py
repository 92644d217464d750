"""What the host does for a call on a GPU, seen on fake tensors of a device that is not there.

A call that a CUDA graph captures must not wait for the device, and must take memory from torch's allocator only. It
launches on the device of its tensors and on that device's current stream. Compilers see its output's shape and device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import KernelInterface

from dami_kernels import (
    LerpWeight,
    cuda,
    lerp_embedding,
    lerp_experts,
    lerp_layer_norm,
    lerp_linear,
    lerp_linears,
    lerp_rms_norm,
)
from dami_kernels import triton as kernels
from dami_kernels.ops import library
from dami_kernels.tuning import H100
from tests.dami_kernels.triton_targets import stored

GPU = torch.device("cuda:1")
FORMATS = ["pair", "int8", "int4", "w8d4"]
# All that a call may ask of torch: memory from its allocator, views, and copies on the device that make rows dense.
HARMLESS = {"device", "empty", "new_empty", "view", "split", "clone", "cat"}


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.device]]:
    """The kernels that would be launched, and the device that is current then. None is compiled."""
    found: list[tuple[str, torch.device]] = []
    current = [torch.device("cuda:0")]

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor.device)
        yield
        current.pop()

    def launch(kernel: Any, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: found.append((kernel.__name__, current[-1]))

    monkeypatch.setattr(KernelInterface, "__getitem__", launch)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(Tensor, "data_ptr", lambda tensor: 0, raising=False)
    # Torch's own method asks CUDA for the device first, which a torch for CPUs is without.
    monkeypatch.setattr(Tensor, "contiguous", lambda tensor: torch.ops.aten.contiguous(tensor), raising=False)
    monkeypatch.setattr(library, "kernel_of", lambda name, device: getattr(kernels, name))
    for module in ("linear", "experts"):
        monkeypatch.setattr(f"dami_kernels.triton.{module}.device_of", lambda device: H100)
    return found


class Asked(TorchDispatchMode):
    """The operators of torch that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def gapped(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A view of every other number; indexing would ask for the device."""
    whole = on_gpu(*shape[:-1], 2 * shape[-1], dtype=dtype)
    return whole.as_strided(shape, (*whole.stride()[:-1], 2))


def weight(*shape: int, format: str = "pair") -> list[Tensor]:
    return [torch.empty_like(tensor, device=GPU) for tensor in stored(*shape, format=format)]


def calls(M: int, format: str, ragged: bool) -> dict[str, tuple[Any, ...]]:
    """The arguments of every operator, of rows with gaps and of vectors that are views."""
    rows = (gapped(M, dtype=torch.float32), gapped(M, dtype=torch.int32) if ragged else None, 1)
    x, vectors = gapped(M, 128), [gapped(128)] * 2
    both = weight(64, 128, format=format)
    ids, offsets = on_gpu(M, dtype=torch.int64), on_gpu(4, dtype=torch.int32)
    return {
        "lerp_linear": (x, both, [on_gpu(64)] * 2, *rows, format, False),
        "lerp_linears": (x, both + weight(32, 128, format=format), [], *rows, format, True),
        "lerp_experts": (x, weight(4, 64, 128, format=format), [], *rows, offsets, format, False),
        "lerp_embedding": (ids, both, *rows, format, torch.bfloat16, 128),
        "lerp_rms_norm": (x, vectors, *rows, 1e-6, 0.0),
        "lerp_layer_norm": (x, vectors, vectors, *rows, 1e-5),
    }


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("M", "ragged"), [(1, False), (5, True), (3000, False)])
def test_a_call_waits_for_nothing_and_runs_on_its_device(
    launched: list[tuple[str, torch.device]], M: int, format: str, ragged: bool
) -> None:
    for name, args in calls(M, format, ragged).items():
        launched.clear()
        with Asked() as asked:
            y = library.CHECKED[name](*args)
        assert y.device == GPU
        assert launched, name
        assert {device for _, device in launched} == {GPU}, name
        assert asked.names <= HARMLESS, name


def test_waiting_is_seen() -> None:
    """What the test above would find: a copy to the host, and a look at a value."""
    with FakeTensorMode(), Asked() as asked:
        on_gpu(3).cpu()
    assert not asked.names <= HARMLESS
    with FakeTensorMode(), pytest.raises(Exception, match="_local_scalar_dense"):
        on_gpu(1).item()


@pytest.mark.usefixtures("fake", "launched")
def test_the_cuda_kernel_runs_on_its_device_s_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    stand_in = SimpleNamespace(Type=SimpleNamespace(bf16=0), decode=lambda *args: given.append(args[-1]))
    monkeypatch.setattr(cuda, "_cuda", stand_in, raising=False)
    monkeypatch.setattr(cuda, "WHY_NOT", None)
    monkeypatch.setattr(cuda, "device_of", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=f"of {device}"))
    x, both, lam = on_gpu(4, 128), weight(64, 128), on_gpu(4, dtype=torch.float32)
    with Asked() as asked:
        y = cuda.lerp_linear(x, both, [], lam, None, 1, "pair", False)
    assert given == [f"of {GPU}"]
    assert y.device == GPU
    assert asked.names <= HARMLESS


def compiled(
    x: Tensor, ids: Tensor, ends: list[Tensor], vectors: list[Tensor], lam: Tensor, offsets: Tensor
) -> tuple[Tensor, ...]:
    matrix = LerpWeight(tuple(ends), "pair", ends[0].shape, x.dtype)
    pair = LerpWeight(tuple(vectors), "pair", vectors[0].shape, x.dtype)
    experts = LerpWeight(tuple(end.unsqueeze(0) for end in ends), "pair", torch.Size((1, *ends[0].shape)), x.dtype)
    y = lerp_rms_norm(lerp_embedding(ids, matrix, lam), pair, lam) + x
    y = lerp_layer_norm(y, pair, lam)
    return (
        lerp_linear(y, matrix, lam),
        *lerp_linears(y, [matrix, matrix], lam),
        lerp_experts(y, experts, lam, offsets),
    )


def test_compilers_see_every_operator_on_a_gpu() -> None:
    """All in one graph, by fake kernels, without a GPU."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with FakeTensorMode():
        ids, lam, offsets = on_gpu(5, dtype=torch.int64), on_gpu(5, dtype=torch.float32), on_gpu(1, dtype=torch.int32)
        args = on_gpu(5, 128), ids, weight(64, 128), [on_gpu(128)] * 2, lam, offsets
        outputs = torch.compile(compiled, fullgraph=True, backend=backend)(*args)
    assert [(y.device, y.shape, y.dtype) for y in outputs] == [(GPU, (5, 64), torch.bfloat16)] * 4
    (graph,) = graphs
    called = {str(node.target) for node in graph.graph.nodes}
    assert {name for name in kernels.__all__ if f"dami.{name}" in called} == {*kernels.__all__}
