"""Tensor parallelism with two processes on the CPU, started by torchrun as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dami
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.dami.families import _SMALL, batch, pair
from tests.dami.test_checkpoints import save

LAM = [0.0, 0.37, 1.0, 1.2]
NEW = 4
# groups of 32 weights along K have to stay whole
SPLIT = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
CASES = {
    "biases int4": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}, "int4"),
    "untied int8": ("LlamaConfig", {}, "int8"),
    "tied w8d4": ("Qwen3Config", {"tie_word_embeddings": True}, "w8d4"),
    "scaled pair": ("Gemma3TextConfig", {"query_pre_attn_scalar": 16}, "pair"),
    "low rank": ("LlamaConfig", {}, "lowrank"),
}

WORKER = """
import json, sys, torch, dami
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
torch.set_num_threads(1)
directory, *names = sys.argv[1:]
split = {"distributed_config": DistributedConfig(tp_size=2)}
inputs = torch.load(f"{directory}/inputs.pt")
for name in names:
    try:
        model, _ = dami.load_pair(f"{directory}/{name}", **split)
    except ValueError as error:
        refused = str(error)
        continue
    with torch.no_grad():
        logits = model(**inputs, intensity=LAM).logits
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    tokens = model.generate(**prompt, intensity=LAM, max_new_tokens=NEW, do_sample=False)
    try:
        model(**inputs, intensity=torch.tensor(0.5, requires_grad=True))
    except ValueError as error:
        gradient = str(error)
    own = {n: list(p.to_local().shape if hasattr(p, "to_local") else p.shape) for n, p in model.named_parameters()}
    dami.save_pair(model, f"{directory}/{name} again")
    if torch.distributed.get_rank() == 0:
        torch.save((logits, tokens), f"{directory}/{name}.pt")
        json.dump(own, open(f"{directory}/{name}.json", "w"))
if torch.distributed.get_rank() == 0:
    json.dump([refused, gradient], open(f"{directory}/errors.json", "w"))
torch.distributed.destroy_process_group()
"""


def ends_of(config: str, own: dict[str, Any], format: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(1)
    ends = [AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**_SMALL, **SPLIT, **own})) for _ in "ab"]
    with torch.no_grad():
        for base, target in zip(*(end.parameters() for end in ends), strict=True):
            if format != "lowrank":
                base += 0.1 * torch.randn_like(base)
                target.copy_(base + 0.1 * torch.randn_like(base))
            elif base.dim() == 2:
                difference = torch.randn(base.shape, dtype=torch.float64)
                target.copy_(base + 0.003 * difference[:, :2] @ difference[:2])
    return ends[0], ends[1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed pairs, and what two processes have made of them."""
    directory = tmp_path_factory.mktemp("parallel")
    for name, case in CASES.items():
        paths = [save(end, directory / f"{name} {i}") for i, end in enumerate(ends_of(*case))]
        dami.pack(*paths, directory / name, case[2])
    paths = [save(end, directory / f"odd {i}") for i, end in enumerate(pair("llama"))]
    dami.pack(*paths, directory / "odd", "int4")
    torch.save(batch("left"), directory / "inputs.pt")
    script = directory / "worker.py"
    script.write_text(WORKER.replace("LAM", str(LAM)).replace("NEW", str(NEW)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(directory), *CASES, "odd"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_two_processes_answer_as_one(name: str, directory: Path) -> None:
    inputs = torch.load(directory / "inputs.pt")
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    split = torch.load(directory / f"{name}.pt")
    for stored in (name, f"{name} again"):
        model, _ = dami.load_pair(directory / stored)
        torch.testing.assert_close(split[0], model(**inputs, intensity=LAM).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(split[1], model.generate(**prompt, intensity=LAM, max_new_tokens=NEW, do_sample=False))


@pytest.mark.parametrize("name", CASES)
def test_both_ends_are_split_alike(name: str, directory: Path) -> None:
    own = json.loads((directory / f"{name}.json").read_text())
    whole = {key: list(parameter.shape) for key, parameter in dami.load_pair(directory / name)[0].named_parameters()}
    for projection, half in (("up_proj", 0), ("down_proj", 1)):
        stored = {key: shape for key, shape in whole.items() if f"layers.1.mlp.{projection}.weight" in key}
        assert len(stored) > 1
        for key, shape in stored.items():
            halved = [size // 2 if dim == half else size for dim, size in enumerate(shape)]
            factor = {"_down": half == 0, "_up": half == 1}
            kept_whole = any(key.endswith(suffix) and kept for suffix, kept in factor.items())
            assert own[key] == (shape if kept_whole else halved), key


def test_what_cannot_be_split_is_refused(directory: Path) -> None:
    odd, gradient = json.loads((directory / "errors.json").read_text())
    assert odd == (
        "model.layers.0.self_attn.o_proj.weight_delta_scale: 24 input features cannot be split over 2 processes, "
        "as 32 of them share a scale"
    )
    assert gradient.startswith("intensity takes no gradient under tensor parallelism")
    with pytest.raises(ValueError, match=r"\['tp_size'\] need a packed pair, which dami.pack makes"):
        dami.load_pair(directory / "odd 0", directory / "odd 1", tp_size=2)
