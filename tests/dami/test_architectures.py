"""Every causal-LM type of the installed transformers, and the page that lists them.

python -m tests.dami.test_architectures  # writes docs/architectures.md
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dami
import pytest
import torch
import transformers
from dami.layers.base import LerpModule, own_tensors
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.dami.architectures import LAM, LENGTHS, TOLERANCE, VOCABULARY, Verdict, distance, pair, verdict

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
TYPES = {cls.model_type: cls for cls in MODEL_FOR_CAUSAL_LM_MAPPING}
HEAD = """# Architectures

What `dami.patch_model` does with each causal language model of transformers {version}, found by running it.

`python -m tests.dami.test_architectures` writes this page. For every type it builds a small random model, and a second
one that differs from it in each parameter and buffer. It patches the two, runs float32 batches at λ = {lams},
and compares every row with a plain model whose weights were merged at that λ. The batches have {lengths} tokens per
sequence. After the first, four more tokens are generated with the model's cache. A last batch has as many tokens as
sequences, where layouts are easily confused. Gemma's assistants draft one token from random states of another model.
Gemma 3n has a stand-in for its vision tower, which needs timm. The error is the norm of the difference of a row's
logits, divided by the norm of the logits; the table gives the largest.

| result | types | meaning |
|---|---|---|
{counts}

Patching goes by what modules are and compute, never by a type's name ([patching](patching.md)). So models outside this
list, for instance from `trust_remote_code`, do as well as the models here that are built alike. What cannot be told
apart is refused, never guessed.

| type | class | result | error | reason |
|---|---|---|---|---|
"""
MEANING = {
    "right": f"every row within {TOLERANCE:g} of the merged model",
    "wrong": "not so",
    "refused": "a ValueError at several λ in one batch, which is quoted after the reason; right at one λ for the batch",
    "not built": "transformers does not build or run the plain model from a shrunken config",
}


INDEXER = "the indexer normalises the keys of one sequence after another, and does not tell its norm whose they are"
WHY = {  # they take one λ for a batch only
    "jetmoe": "the experts of its attention get the rows of all sequences sorted by expert, and only their numbers",
    "musicgen": "a sequence is a row for each of its codebooks",
    "musicgen_melody": "a sequence is a row for each of its codebooks",
    "qwen4_exp": INDEXER,
    "qwen4_exp_text": INDEXER,
    "rwkv": "transformers' own step with a state adds tensors [B, 1, H] and [1, B, H], and so mixes the sequences of a "
    "batch at one λ, too",
    "xlnet": "its layers put time before sequences",
}


def row(v: Verdict) -> str:
    error = "" if v.error is None else f"{v.error:.0e}"
    reason = f"{WHY[v.type]}: {v.reason}" if v.result == "refused" else v.reason
    return f"| `{v.type}` | {v.name} | {v.result} | {error} | {reason.replace('|', '¦')} |"


def listed() -> dict[str, tuple[str, str]]:
    """Result and reason of every type on the page."""
    rows = re.findall(r"^\| `(\S+)` \| \w+ \| ([a-z ]+) \| \S* ?\| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    return {type: (result, reason) for type, result, reason in rows}


def of_this_version() -> bool:
    """Whether the page was written with the installed transformers: others have other types, and build others."""
    return f"transformers {transformers.__version__}," in PAGE.read_text()


def test_the_page_lists_every_type() -> None:
    assert not of_this_version() or set(listed()) == set(TYPES)
    results = Counter(result for result, _ in listed().values())
    assert not results["wrong"]
    assert results["right"] > 0.9 * sum(results.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "cls",
    [
        pytest.param(cls, id=name, marks=[pytest.mark.slow] * (place % 12 > 0))
        for place, (name, cls) in enumerate(TYPES.items())
    ],
)  # every twelfth in every run
def test_the_page_says_what_is_so(cls: type[PreTrainedConfig]) -> None:
    found = verdict(cls)
    assert found.result != "wrong", found
    assert not of_this_version() or found.result == listed()[cls.model_type][0], found


# routers, experts, also transposed, A_log, gates, Conv1D, parameters that ignore the default device, other ties
SAVED = {"deepseek_v3", "diffllama", "gpt2", "gpt_oss", "llama4_text", "mamba2", "qwen3_next", "rwkv", "xlm-roberta"}


@torch.no_grad()
def answers(model: PreTrainedModel, ids: Tensor, intensity: Any) -> list[Tensor]:
    """Logits, and those of the tokens generated after them."""
    torch.manual_seed(2)  # some draw random numbers, for hashes
    logits = [model(ids, intensity=intensity).logits]
    if model.can_generate():
        options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, "pad_token_id": 0}
        torch.manual_seed(2)
        new = model.generate(ids, intensity=intensity, max_new_tokens=4, min_new_tokens=4, **options)
        logits.append(torch.stack(new.logits, 1))
    return logits


def operands(model: PreTrainedModel) -> Iterator[Tensor]:
    """All that is stored, as operators read it: Conv1D and the experts of some lie transposed."""
    for module in model.modules():
        placeholders = module.placeholders() if isinstance(module, LerpModule) else ()
        as_operand = module.as_operand if isinstance(module, LerpModule) else lambda tensor: tensor
        yield from (as_operand(tensor) for name, tensor in own_tensors(module) if name not in placeholders)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", [pytest.param("pair", marks=pytest.mark.slow), "w8d4"])
@pytest.mark.parametrize(
    "cls", [pytest.param(TYPES[name], id=name, marks=[pytest.mark.slow] * (name not in SAVED)) for name in TYPES]
)
def test_a_pair_is_loaded_as_it_was_saved_or_packed(cls: type[PreTrainedConfig], format: str, tmp_path: Path) -> None:
    ids = torch.randint(4, VOCABULARY, (len(LAM), LENGTHS[0]))
    try:
        ends = pair(cls)
        ends[0](ids)
        for end, name in zip(ends, ("instruct", "thinking"), strict=True):
            end.save_pretrained(tmp_path / name)
        AutoModelForCausalLM.from_pretrained(tmp_path / "instruct")
    except Exception as error:
        pytest.skip(f"transformers does not build, save and load the plain model: {str(error)[:100]}")
    model, lam = dami.patch_model(*ends, format), LAM
    try:
        expected = answers(model, ids, lam)
    except ValueError:  # one λ for a batch only
        lam = LAM[1]
        expected = answers(model, ids, lam)
    dami.save_pair(model, tmp_path / "saved")
    dami.pack(tmp_path / "instruct", tmp_path / "thinking", tmp_path / "packed", format)
    for name in ("saved", "packed"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        # not the same bits: tensors lie at other addresses, of which those of torch's convolutions depend
        assert all(distance(*both) < 1e-5 for both in zip(answers(loaded, ids, lam), expected, strict=True)), name
        assert str(dami.describe(loaded)) == str(dami.describe(model))
        assert all(operand.is_contiguous() for operand in operands(loaded))
        assert all(parameter.is_contiguous() for parameter in dami.unpatch_model(loaded).parameters())


def write() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    verdicts = []
    for name in sorted(TYPES):
        verdicts.append(verdict(TYPES[name]))
        print(row(verdicts[-1]), flush=True)
    results = Counter(v.result for v in verdicts)
    counts = "\n".join(f"| {name} | {results[name]} | {meaning} |" for name, meaning in MEANING.items())
    lams, lengths = ", ".join(map(str, LAM)), " and then ".join(map(str, LENGTHS))
    head = HEAD.format(version=transformers.__version__, lams=lams, lengths=lengths, counts=counts)
    PAGE.write_text(head + "\n".join(map(row, verdicts)) + "\n")


if __name__ == "__main__":
    write()
