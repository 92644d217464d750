"""Weights that move into huge pages stay what they are, and calls read them where they are now."""

from __future__ import annotations

import copy
import mmap
import re
from pathlib import Path

import pytest
import torch
from dami import huge_pages, patch_model, use_huge_pages
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

NONE = huge_pages._pages(1) is None


def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()


@pytest.mark.skipif(NONE, reason="this system gives no huge pages")
@pytest.mark.parametrize("format", ["pair", "w8d4"])
@torch.inference_mode()
def test_a_pair_in_huge_pages_gives_the_same_bits(format: str) -> None:
    model = patch_model(*models(), format)
    ids = torch.randint(3, 99, (3, 7))
    before = model(ids, intensity=[0.0, 0.4, 1.0]).logits
    names = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    assert use_huge_pages(model) > 0
    for name, parameter in model.named_parameters():
        assert parameter is names[name][0]
        assert parameter.data_ptr() != names[name][1]
        assert parameter.data_ptr() % huge_pages.LINE == 0
    assert torch.equal(model(ids, intensity=[0.0, 0.4, 1.0]).logits, before)


@pytest.mark.skipif(NONE, reason="this system gives no huge pages")
def test_the_memory_is_of_a_kind_that_huge_pages_are_for() -> None:
    module = nn.Linear(30, 40)
    assert use_huge_pages(module)
    address, permissions, inside = module.weight.data_ptr(), "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
            permissions = found[3] if inside else permissions
        elif inside and line.startswith("VmFlags:"):
            assert "hg" in line.split()
    assert permissions.endswith("p")  # private: memory that is shared has a setting of its own, which is off by default


@pytest.mark.skipif(NONE, reason="this system gives no huge pages")
@pytest.mark.parametrize("format", ["pair", "int4"])
def test_a_moved_pair_is_saved_and_loaded(format: str, tmp_path: Path) -> None:
    model = patch_model(*models(), format)
    use_huge_pages(model)
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "pair")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pair")
    use_huge_pages(again)
    ids = torch.randint(3, 99, (2, 5))
    with torch.inference_mode():
        want = model(ids, intensity=[0.2, 1.0]).logits
        assert torch.equal(twin(ids, intensity=[0.2, 1.0]).logits, want)
        assert torch.equal(again(ids, intensity=[0.2, 1.0]).logits, want)


@pytest.mark.skipif(NONE, reason="this system gives no huge pages")
def test_rows_of_the_two_ends_lie_in_turn() -> None:
    """But not those of a weight with shorter rows, with another layout, or that several modules share."""
    shapes = {"matrix": (5, 32), "experts": (3, 2, 16), "short": (4, 7), "vector": (64,), "shared": (2, 16)}
    module = nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.randn(shape)))
        module.register_buffer(f"{name}_target", torch.randn(shape))
    module.turned, module.turned_target = nn.Parameter(torch.randn(32, 16).t()), nn.Parameter(torch.randn(16, 32))
    module.twin = nn.Module()
    module.twin.weight = module.shared
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers())
    want = {name: tensor.detach().clone() for name, tensor in tensors}
    strides = {name: tensor.stride() for name, tensor in tensors}
    assert use_huge_pages(module)
    for name, tensor in want.items():
        assert torch.equal(getattr(module, name), tensor)
    for name, strides_in_turn in {"matrix": (64, 1), "experts": (64, 32, 1)}.items():
        base, target = getattr(module, name), getattr(module, f"{name}_target")
        assert base.stride() == target.stride() == strides_in_turn
        assert target.data_ptr() - base.data_ptr() == base.shape[-1] * base.element_size()
    for name in want.keys() - {"matrix", "matrix_target", "experts", "experts_target"}:
        assert getattr(module, name).stride() == strides[name]


@pytest.mark.skipif(NONE, reason="this system gives no huge pages")
def test_views_keep_their_strides_and_what_is_shared_stays_shared() -> None:
    module = nn.Module()
    whole = torch.randn(40, 24)
    module.a = nn.Parameter(whole[3:17, 1::2])
    module.b = nn.Parameter(whole[3:17, 1::2])
    module.c = nn.Parameter(whole.t())
    module.register_buffer("empty", torch.empty(0, 3))
    want = [parameter.detach().clone() for parameter in module.parameters()]
    strides = [parameter.stride() for parameter in module.parameters()]
    assert use_huge_pages(module)
    assert [parameter.stride() for parameter in module.parameters()] == strides
    assert all(torch.equal(parameter, wanted) for parameter, wanted in zip(module.parameters(), want, strict=True))
    assert module.a.data_ptr() == module.b.data_ptr()


def test_a_system_without_huge_pages_leaves_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(huge_pages, "SETTING", setting)
    module = nn.Linear(3, 4)
    before = module.weight.data_ptr()
    assert use_huge_pages(module) == 0
    monkeypatch.setattr(huge_pages, "SETTING", tmp_path / "missing")
    assert use_huge_pages(module) == 0
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert use_huge_pages(module) == 0
    assert use_huge_pages(nn.Module()) == 0
    assert module.weight.data_ptr() == before
