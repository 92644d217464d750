"""Generates the model card (README.md) of a packed pair or of a merged checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedTokenizerBase

from dami.saving.config import PackedConfig
from dami_kernels import formats

TEXT = """---
{data}
---

# {instruct} and {thinking}, packed as `{format}`

Two checkpoints in one, for `dami`, of the Python package dami-kernels: every sequence of a batch is answered at its own
reasoning intensity λ, with the weights W(λ) = W(0) + λ (W(1) − W(0)) that are interpolated while they are read.

| λ | checkpoint | licence |
|---|---|---|
{ends}

## How to use it

```python
import dami

model, tokenizer = dami.load_pair("path or name of this repository", device_map="auto")
chats = [[{{"role": "user", "content": "What is 12 * 13?"}}]] * 3
batch = tokenizer.apply_chat_template(
    chats, add_generation_prompt=True, padding=True, padding_side="left", return_tensors="pt", return_dict=True
)
model.generate(**batch, intensity=[0.0, 0.5, 1.0], max_new_tokens=512)
```

λ=0 is the instruct end, λ=1 the thinking end, and any number between or beyond is a model on the line through both.
With `import dami` before it, `AutoModelForCausalLM.from_pretrained` loads the pair as well.{templates}

## How it is stored

{stored} The pair takes {nbytes:,} bytes; {weights:,} numbers of either end are interpolated.{error}
{differences}"""
MERGED = """---
{data}
---

# {instruct} and {thinking}, merged at λ = {lam}

An ordinary checkpoint, which `transformers` loads: the weights {rest} · W(0) + {lam} · W(1) of two others, written by
`dami merge` of the package dami-kernels.

| λ | checkpoint | licence |
|---|---|---|
{ends}
"""
HUB = "https://huggingface.co"
DIFFERENCES = """
## How the ends differ

| what | instruct and thinking | the pair |
|---|---|---|
{rows}
"""
TEMPLATES = """ The instruct end's chat template is used unless another is
named: `tokenizer.apply_chat_template(…, chat_template="thinking")`."""


def write_model_card(
    directory: str | Path, config: PackedConfig, nbytes: int, weights: int, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Writes the README.md of a packed pair.

    Args:
        directory: the pair's directory.
        config: the pair's `quantization_config`.
        nbytes: total bytes of the stored tensors.
        weights: how many numbers of either end are interpolated.
        tokenizer: the pair's tokenizer.
    """
    error = (
        ""
        if config.error is None
        else f" Measured while packing, against the thinking checkpoint's W: ‖W(1) − W‖ / ‖W‖ = {config.error:.2g}."
    )
    templates = getattr(tokenizer, "chat_template", None)
    both = isinstance(templates, dict) and "thinking" in templates
    text = TEXT.format(
        **_ends(config.parents),
        format=config.format,
        templates=TEMPLATES if both else "",
        stored=" ".join((formats.get(config.format).__doc__ or "").split("\n\n")[0].split()),
        nbytes=nbytes,
        weights=weights,
        error=error,
        differences=_differences(config.differences),
    )
    (Path(directory) / "README.md").write_text(text, encoding="utf-8")


def _differences(differences: Sequence[Mapping[str, Any]]) -> str:
    """Returns the section about what differed between the ends and how it was resolved; nothing if they agreed."""
    keys = "subject", "ends", "resolution"
    rows = ["| " + " | ".join(str(each[key]).replace("|", r"\|") for key in keys) + " |" for each in differences]
    return DIFFERENCES.format(rows="\n".join(rows)) if rows else ""


def write_merged_card(directory: str | Path, parents: Sequence[Mapping[str, str | None]] | None, lam: float) -> None:
    """Writes the README.md of an ordinary checkpoint at one λ.

    Args:
        directory: the checkpoint's directory.
        parents: name and licence of both ends, None if unknown.
        lam: λ.
    """
    text = MERGED.format(**_ends(parents), lam=f"{lam:g}", rest=f"{round(1 - lam, 9):g}")
    (Path(directory) / "README.md").write_text(text, encoding="utf-8")


def _ends(parents: Sequence[Mapping[str, str | None]] | None) -> dict[str, str]:
    """Returns what both cards say about the ends: metadata, names, and the rows of a table."""
    parents = parents or [{"name": "an instruct model"}, {"name": "a thinking model"}]
    names, licences = ([parent.get(key) for parent in parents] for key in ("name", "license"))
    on_hub = [name for name in names if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name)]
    same = len(set(licences)) == 1 and licences[0]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=licences[0] if same else "other" if any(licences) else None,
        license_name=" and ".join(licence or "unknown" for licence in licences) if any(licences) and not same else None,
        base_model=on_hub or None,
        base_model_relation="merge" if on_hub else None,
        tags=["dami", "model-interpolation", "reasoning"],
    )
    rows = "\n".join(
        f"| {lam} | {f'[{name}]({HUB}/{name})' if name in on_hub else name} | {licence or 'not stated'} |"
        for lam, name, licence in zip((0, 1), names, licences, strict=True)
    )
    return {"data": data.to_yaml(), "instruct": str(names[0]), "thinking": str(names[1]), "ends": rows}
