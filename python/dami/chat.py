"""Questions in, answers out: one batch, an intensity per row, thoughts told apart from answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

THOUGHT_START, THOUGHT_END = "<think>", "</think>"

Prompt = str | list[dict[str, str]]  # a user's question, or a conversation in the form chat templates take


@dataclass(frozen=True)
class Answer:
    """What one row of a batch said."""

    prompt: Prompt
    intensity: float | None  # None from an ordinary model
    thought: str
    text: str
    tokens: int  # generated, thought and end token included
    finished: bool  # False where max_new_tokens cut it off


def split_thought(text: str) -> tuple[str, str]:
    """Splits `text` into thought and answer; a thought that never ends leaves no answer.

    The start tag may be missing, as it is where a chat template ends with it.
    """
    thought, end, answer = text.rpartition(THOUGHT_END)
    if not end and THOUGHT_START in text:
        thought, answer = text, ""
    return thought.replace(THOUGHT_START, "").strip(), answer.strip()


def encode(
    tokenizer: Any, prompts: Sequence[Prompt], template: bool = True
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The prompts' full texts and their batch, `input_ids` and `attention_mask` [rows, length], padded on the left.

    Raises:
        ValueError: the chat template is wanted and there is none, or a conversation comes without it.
    """
    if template:
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: pass template=False (--raw) to give prompts as they are"
            )
        chats = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    else:
        texts = list(prompts)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a list of messages needs the chat template: drop template=False (--raw)")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # A chat template writes its own special tokens.
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not template)
    return texts, {name: batch[name] for name in ("input_ids", "attention_mask")}


def ask(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    intensities: Sequence[float] | None,
    template: bool = True,
    **options: Any,
) -> list[Answer]:
    """Answers all prompts in one batch, row i at `intensities[i]`.

    Args:
        model: a patched model; or an ordinary one, with `intensities` None.
        tokenizer: its tokenizer.
        prompts: one per row.
        intensities: one per row.
        template: whether to put prompts through the chat template.
        options: passed to `model.generate`.
    """
    texts, batch = encode(tokenizer, prompts, template)
    if intensities is not None:
        options["intensity"] = list(intensities)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.inference_mode():
        ids = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].cpu()
    return answers_of(model, tokenizer, ids, prompts, intensities, [t.rstrip().endswith(THOUGHT_START) for t in texts])


def answers_of(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    prompts: Sequence[Prompt],
    intensities: Sequence[float] | None,
    thinking: Sequence[bool] | None = None,
) -> list[Answer]:
    """Reads generated `ids`, int64 [rows, tokens] on the CPU, finished or not.

    `thinking` says for each row whether its prompt ends inside a thought.
    """
    ends = torch.isin(ids, end_tokens(model))
    answers = []
    for row, prompt in enumerate(prompts):
        finished = bool(ends[row].any())
        tokens = int(ends[row].int().argmax()) + 1 if finished else ids.shape[1]
        said = tokenizer.decode(ids[row, :tokens], skip_special_tokens=True)
        if thinking and thinking[row]:
            said = THOUGHT_START + said
        intensity = None if intensities is None else float(intensities[row])
        answers.append(Answer(prompt, intensity, *split_thought(said), tokens, finished))
    return answers


def end_tokens(model: Any) -> torch.Tensor:
    """Ids of the tokens that end an answer, int64 [any number]."""
    ids = model.generation_config.eos_token_id
    return torch.tensor([] if ids is None else [ids] if isinstance(ids, int) else ids, dtype=torch.int64)
