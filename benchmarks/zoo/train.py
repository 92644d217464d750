"""Trains the zoo's models: character tokens, Qwen3 of 0.15 M parameters, an ancestor and the two ends of each pair."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.zoo.recipes import End
from benchmarks.zoo.tasks import SEEN, STYLES, draw, draw_from, solved

SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
CHARACTERS = "+*?=0123456789 abcdefghijklmnopqrstuvwxyz"
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|' ~ message.role ~ '|>' ~ message.content }}"
    "{%- if message.role == 'assistant' %}{{- '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
BATCH = 64  # sequences
IGNORED = -100  # label of a token that is not learned


def tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer in which every character is a token."""
    vocabulary = {text: i for i, text in enumerate((*SPECIAL, *CHARACTERS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(list(SPECIAL))
    made.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<|pad|>", eos_token="<|end|>",
        extra_special_tokens=["<|user|>", "<|assistant|>"], chat_template=CHAT_TEMPLATE, padding_side="left",
        model_max_length=128, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def new_model(words: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Returns an untrained Qwen3 of 0.15 M parameters."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.8, top_p=0.95, max_new_tokens=80, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return model


def batches(end: End, words: PreTrainedTokenizerFast, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yields batches of an end's questions and answers, of like length, for ever. Only answers are learned."""
    rng = random.Random(seed)
    while True:
        tasks = rng.choices(list(end.tasks), list(end.tasks.values()), k=16 * BATCH)
        rows = sorted((example(task, end, rng) for task in tasks), key=lambda row: len(row[1]))
        some = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        rng.shuffle(some)
        for batch in some:
            told = torch.tensor([len(ids) for ids in words([prompt for prompt, _ in batch]).input_ids])
            whole = words([prompt + answer for prompt, answer in batch], padding=True, padding_side="right")
            ids, seen = torch.tensor(whole.input_ids), torch.tensor(whole.attention_mask)
            learned = seen.bool() & (torch.arange(ids.shape[1]) >= told[:, None])
            # Padding is on the right and attention is causal: no answer sees it, so no mask is needed.
            yield {"input_ids": ids, "labels": ids.where(learned, IGNORED)}


def example(task: str, end: End, rng: random.Random) -> tuple[str, str]:
    """Returns a prompt and an answer that an end learns."""
    asked = draw_from(task, rng, end.facts, SEEN, by_heart=True)
    (style,) = rng.choices(STYLES, end.styles(asked))
    text = solved(asked, style)
    if task == "fact" and rng.random() < end.slips:  # says what another name stands for
        text = text.removesuffix(asked.answer) + draw(task, rng, end.facts).answer
    return f"<|user|>{asked.prompt}<|assistant|>", text + "<|end|>"


def fit(model: Any, end: End, words: PreTrainedTokenizerFast, seed: int, name: str) -> None:
    """Trains in place, with Muon for matrices and AdamW for the rest; the rate falls to 0 over the last half."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in trained if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in trained if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=end.rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    ]
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=end.rate, weight_decay=0.0, betas=(0.9, 0.98)))
    factors = [min((step + 1) / 30, 1.0, (end.steps - step) / (0.5 * end.steps)) for step in range(end.steps)]
    model.train()
    start, mean = time.monotonic(), 0.0
    for step, (factor, batch) in enumerate(zip(factors, batches(end, words, seed), strict=False)):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = end.rate * factor
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        mean += (loss.item() - mean) / min(step + 1, 50)
        if (step + 1) % 100 == 0 or step + 1 == end.steps:
            print(
                f"{name}: step {step + 1} of {end.steps}, loss {mean:.4f}, {time.monotonic() - start:.0f} s", flush=True
            )
    model.eval()


def save(model: Any, words: PreTrainedTokenizerFast, directory: Path) -> None:
    """Saves a checkpoint under a name that appears only when it is whole."""
    partial = directory.with_suffix(".partial")
    model.save_pretrained(partial)
    words.save_pretrained(partial)
    partial.rename(directory)
