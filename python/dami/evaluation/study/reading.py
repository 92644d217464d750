"""Reads given texts in every setting of the study: losses, and states of every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dami.chat import encode
from dami.evaluation.statistics import Array, Places
from dami.evaluation.study.settings import Setting, row_intensities
from dami.evaluation.tasks import Task
from dami.thoughts import Reader

STATES = 8  # most states per question for measuring similarity
TEXT_TOKENS = 256  # most tokens read per text


@dataclass(frozen=True, eq=False)
class TeacherForced:
    """Losses and states of given texts in several settings.

    Attributes:
        losses: cross-entropy in nats, summed over each text's tokens, [questions, settings], by kind of text.
        tokens: of each text, [questions], by kind.
        states: states of every layer at every λ of the path, [L, N, D].
        questions: the question that each of the N states belongs to.
    """

    losses: dict[str, Array]
    tokens: dict[str, NDArray[np.int64]]
    states: list[Tensor]
    questions: NDArray[np.int64]

    def loss(self, kind: str, rows: Places | slice = slice(None)) -> Array:
        """Returns the mean cross-entropy per token of some questions' texts in every setting, in nats, [settings].

        Args:
            kind: of text; "both" is the mean of "instruct" and "thinking".
            rows: indices of the questions.
        """
        if kind == "both":
            return (self.loss("instruct", rows) + self.loss("thinking", rows)) / 2
        return self.losses[kind][rows].sum(0) / max(1, self.tokens[kind][rows].sum())


def read_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    said: Mapping[str, Sequence[str]],
    settings: Sequence[Setting],
    on_question: Callable[[int], None] = lambda done: None,
) -> TeacherForced:
    """Reads texts after their questions with teacher forcing, each in one forward pass with one row per setting.

    Losses cover only the text's tokens. States are taken at evenly spaced positions that predict tokens of the thinking
    end's own text, from the prompt's last token on, in the settings with one λ for the whole model.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        task: the questions.
        said: the text after each question, by kind. One kind is "thinking".
        settings: one row each.
        on_question: called with the number of finished questions.
    """
    lams = row_intensities(settings, model)
    path = [place for place, setting in enumerate(settings) if setting.part is None]
    reader = Reader.of(tokenizer)
    losses = {kind: np.zeros((len(task.questions), len(settings))) for kind in said}
    tokens = {kind: np.zeros(len(task.questions), dtype=np.int64) for kind in said}
    states: list[list[Tensor]] = []
    owners: list[int] = []
    for index, question in enumerate(task.questions):
        (prompt,), batch = encode(tokenizer, [question.question])
        for kind, texts in said.items():
            text = texts[index]
            before = batch["input_ids"][0]
            if kind == "answer" and reader.opens(prompt):
                before = torch.cat([before, _ids(tokenizer, reader.tags.ends[0])])
            after = _ids(tokenizer, text)[:TEXT_TOKENS]
            tokens[kind][index] = n = len(after)
            if not n:
                continue
            wanted = kind == "thinking"
            with torch.inference_mode():
                output = model(
                    input_ids=torch.cat([before, after]).expand(len(settings), -1).to(model.device), intensity=lams,
                    logits_to_keep=n + 1, output_hidden_states=wanted, use_cache=False,
                )  # fmt: skip
            target = after.to(output.logits.device)
            losses[kind][index] = [
                cross_entropy(row[:-1].float(), target, reduction="sum").item() for row in output.logits
            ]
            if wanted:
                at = np.unique(np.linspace(0, n - 1, min(n, STATES)).round().astype(int)) + len(before) - 1
                owners += [index] * len(at)
                states.append([layer[path][:, at].cpu() for layer in output.hidden_states])
        on_question(index + 1)
    return TeacherForced(losses, tokens, [torch.cat(layer, 1) for layer in zip(*states, strict=True)], np.array(owners))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
