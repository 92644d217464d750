"""The pairs that are served, merged copies of them for servers that know no λ, and what both have to answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import dami
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.check import WrongResult
from benchmarks.generate import SHAPE
from benchmarks.serving.questions import questions

WIDTH = 0.02  # standard deviation of random weights, and of their differences: at other λ the answers are others


@dataclass(frozen=True)
class Question:
    """A prompt, as text and as token ids, and the λ to answer it at."""

    text: str
    ids: tuple[int, ...]
    lam: float


@dataclass(frozen=True)
class Pair:
    """Both ends of a pair on disk, and a folder for what is made of them."""

    name: str
    ends: tuple[Path, Path]
    folder: Path

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.ends[0])

    def merged(self, lam: float) -> Any:
        """Returns the plain float32 model at λ: the oracle."""
        model = AutoModelForCausalLM.from_pretrained(self.ends[0], dtype=torch.float32)
        target = load_file(self.ends[1] / "model.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.lerp_(target[name].float(), lam)
        model.generation_config = GenerationConfig(pad_token_id=0)  # greedy, and without an end
        return model.eval()

    def copy(self, lam: float) -> Path:
        """Returns the directory of a merged copy in bfloat16, which it writes the first time."""
        directory = self.folder / f"{self.name}-{lam:g}"
        if not directory.exists():
            self.merged(lam).to(torch.bfloat16).save_pretrained(directory)
            self.tokenizer.save_pretrained(directory)
        return directory

    def questions(self, lams: Sequence[float], count: int) -> list[Question]:
        """Returns held-out questions of the shipped pair, at these λ by turns."""
        texts = [f"<|user|>{each.text}<|assistant|>" for each in questions(count)]  # as the chat template does
        ids = [tuple(self.tokenizer(text)["input_ids"]) for text in texts]
        return [Question(text, ids[i], lams[i % len(lams)]) for i, text in enumerate(texts)]


def shipped(folder: Path) -> Pair:
    """Returns the pair that comes with dami: a Qwen3 model of 1.8 million parameters."""
    return Pair("shipped", tuple(map(Path, dami.example_pair())), folder)  # type: ignore[arg-type]


def smollm2(folder: Path, layers: int | None = None) -> Pair:
    """Returns a pair of SmolLM2-135M's shapes with random weights in bfloat16, and the shipped pair's tokenizer.

    The tokenizer has a word `w17000` for each token that it lacks.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE | {"num_hidden_layers": layers or SHAPE["num_hidden_layers"]}, eos_token_id=1, pad_token_id=0
    )
    ends = (folder / "smollm2-instruct", folder / "smollm2-thinking")
    tokenizer = AutoTokenizer.from_pretrained(dami.example_pair()[0])
    for end in ends:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(end)
        tokenizer.save_pretrained(end)
        stored = json.loads((end / "tokenizer.json").read_text())
        words = {f"w{i}": i for i in range(len(tokenizer), config.vocab_size)}
        stored["model"]["vocab"] |= words | {added["content"]: added["id"] for added in stored["added_tokens"]}
        (end / "tokenizer.json").write_text(json.dumps(stored))
    return Pair("SmolLM2-135M's shapes", ends, folder)


@dataclass(frozen=True)
class Expected:
    """The oracle's greedy answer.

    Attributes:
        pieces: its text up to each token.
        gaps: how much each token's logit is above the second best.
        error: how far plain PyTorch's logits in bfloat16 are from the oracle's, at most.
    """

    pieces: list[str]
    gaps: list[float]
    error: float

    def check(self, text: str) -> bool:
        """Returns whether an answer is the oracle's, up to the oracle's first token that the text does not show.

        That is an end token, after which neither says anything that means something; and where texts part later, the
        answers may have parted at a token that is not shown.

        Raises:
            WrongResult: it is another, and where they part, rounding is no excuse: the oracle's first choice is ahead
                of its second by more than twice the error of plain PyTorch, which is what both can be off by.
        """
        for before, piece, gap in zip(["", *self.pieces], self.pieces, self.gaps, strict=False):
            if piece == before:
                return True
            if not text.startswith(piece.rstrip("\ufffd")):  # what stands for the first bytes of a character
                if gap > 2 * self.error:
                    raise WrongResult(f"{text!r:.80} parts from {self.pieces[-1]!r:.80} at a gap of {gap:.2e}")
                return False
        return text == self.pieces[-1]


@torch.inference_mode()
def expected(pair: Pair, questions: Sequence[Question], tokens: int) -> dict[Question, Expected]:
    """Returns the answers of this many tokens that are right, each by a plain merged model in float32."""
    found: dict[Question, Expected] = {}
    for lam in dict.fromkeys(question.lam for question in questions):
        exact = pair.merged(lam)
        rounded = AutoModelForCausalLM.from_pretrained(pair.copy(lam), dtype=torch.bfloat16).eval()
        asked = [question for question in questions if question.lam == lam]
        inputs = padded([question.ids for question in asked])
        told = exact.generate(**inputs, max_new_tokens=tokens, output_logits=True, return_dict_in_generate=True)
        logits = torch.stack(told.logits, 1)
        seen = torch.nn.functional.pad(inputs["attention_mask"], (0, tokens), value=1)
        places = (seen.cumsum(1) - 1).clamp(min=0)
        again = rounded(told.sequences, attention_mask=seen, position_ids=places, logits_to_keep=tokens + 1).logits
        errors = (again[:, :-1].float() - logits).abs().amax((1, 2)).tolist()
        best = logits.topk(2).values
        gaps = (best[..., 0] - best[..., 1]).tolist()
        for row, question in enumerate(asked):
            answer = told.sequences[row, -tokens:].tolist()
            pieces = [pair.tokenizer.decode(answer[: i + 1], skip_special_tokens=True) for i in range(tokens)]
            found[question] = Expected(pieces, gaps[row], errors[row])
    return found


def padded(prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Returns prompts as inputs of `generate`, int64 [prompts, length], padded on the left."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}
