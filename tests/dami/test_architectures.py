"""Every causal-LM type of the installed transformers, and the page that lists them.

python -m tests.dami.test_architectures  # writes docs/architectures.md
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.dami.architectures import LAM, LENGTHS, TOLERANCE, Verdict, verdict

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
TYPES = {cls.model_type: cls for cls in MODEL_FOR_CAUSAL_LM_MAPPING}
HEAD = """# Architectures

What `dami.patch_model` does with each causal language model of transformers {version}, found by running it.
`python -m tests.dami.test_architectures` writes this page: it builds a small random model of every type, and another at
some distance in each parameter and buffer, and compares every row of one float32 batch at λ = {lams}
with a plain model whose weights were merged at that λ. The batch has {lengths} tokens each, then four more
are generated with the model's cache, and at last it has as many tokens as sequences, where layouts are easily confused.
The error is the norm of the difference of a row's logits over the norm of the logits, the worst of all.

| result | types | meaning |
|---|---|---|
{counts}

Patching is by what modules are and compute, never by a type's name ([patching](patching.md)), so models outside this
list, from `trust_remote_code` for instance, fare as those here that are built alike. What cannot be told apart is
refused, never guessed.

| type | class | result | error | reason |
|---|---|---|---|---|
"""
MEANING = {
    "right": f"every row within {TOLERANCE:g} of the merged model",
    "wrong": "not so",
    "refused": "a ValueError at several λ in one batch, with the reason quoted; at one λ for the batch right as well",
    "not built": "transformers does not build or run the plain model from a shrunken config on tokens alone",
}


def row(v: Verdict) -> str:
    error = "" if v.error is None else f"{v.error:.0e}"
    return f"| `{v.type}` | {v.name} | {v.result} | {error} | {v.reason.replace('|', '¦')} |"


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
@pytest.mark.parametrize("cls", TYPES.values(), ids=TYPES)
def test_the_page_says_what_is_so(cls: type[PreTrainedConfig]) -> None:
    found = verdict(cls)
    assert found.result != "wrong", found
    assert not of_this_version() or found.result == listed()[cls.model_type][0], found


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
