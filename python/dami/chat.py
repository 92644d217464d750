"""Answers prompts in one batch, with an intensity per row, and separates thoughts from answers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from dami.callers import AUTO, CALLERS, TURN
from dami.dial.choosing import estimates
from dami.dial.patch import patch_of
from dami.dial.values import Intensity, IntensityLike
from dami.generation.pieces import KNOWN, end_tokens, generate_in_pieces, room
from dami.generation.steering import option
from dami.prompts import Prompt, as_prompts, text_of
from dami.thoughts import Reader

ChatTemplate = str | float | Callable[[float], str]


@dataclass(frozen=True)
class Answer:
    """The answer in one row of a batch."""

    prompt: Prompt
    intensity: float | None  # None for an ordinary model
    thought: str
    text: str
    tokens: int  # number generated, including the thought and the end token
    finished: bool  # False if max_new_tokens cut it off


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    chat_template: ChatTemplate | None = "default",
    intensities: Sequence[float] | None = None,
    **options: Any,
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Returns the prompts' full texts and their batch: `input_ids` and `attention_mask` [rows, length], left-padded.

    The arguments are those of `render`, which makes the texts.
    """
    prompts = as_prompts(prompts)
    texts = render(tokenizer, prompts, chat_template, intensities, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # A chat template adds its own special tokens.
    raw = chat_template is None
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=raw)
    return texts, {name: batch[name] for name in ("input_ids", "attention_mask")}


def render(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    chat_template: ChatTemplate | None = "default",
    intensities: Sequence[float] | None = None,
    **options: Any,
) -> list[str]:
    """Applies the chat template to prompts, and returns their full texts.

    Args:
        tokenizer: a pair's tokenizer; if the chat templates of the two ends differ, it holds both by name.
        prompts: one per row.
        chat_template: the template to apply: "instruct", "thinking", or the tokenizer's own "default". To choose by the
            λ of each row, pass a number, to use the thinking end's template at that λ and above and the instruct end's
            below, or a callable from λ to a name. None leaves prompts as they are.
        intensities: one per row, needed if the template depends on λ.
        options: passed to `apply_chat_template`, such as variables of the template.

    Raises:
        ValueError: the tokenizer has no such chat template, or it does not take the messages; λ is needed and missing;
            or a prompt is a list of messages and `chat_template` is None.
    """
    if chat_template is None:
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) < len(prompts):
            raise ValueError("a list of messages needs the chat template: drop chat_template=None (--raw)")
        return texts
    lams = [None] * len(prompts) if intensities is None else intensities
    rendered = []
    for prompt, lam in zip(prompts, lams, strict=True):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        given = {"chat_template": _template(tokenizer, chat_template, lam), "add_generation_prompt": True, **options}
        try:
            rendered.append(tokenizer.apply_chat_template(messages, tokenize=False, **given))
        except Exception as error:  # templates can raise anything
            raise ValueError(f"the chat template does not take these messages: {error}") from error
    return cast(list[str], rendered)  # strings, because of tokenize=False


def not_variables(tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Any]) -> list[str]:
    """Returns the names among some variables that the tokenizer's chat templates do not read."""
    templates = tokenizer.chat_template or ""
    text = "\n".join(templates.values()) if isinstance(templates, dict) else templates
    taken = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
    return [name for name in given if name in taken or not re.search(rf"\b{re.escape(name)}\b", text)]


def check_variables(
    tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate | None, given: Mapping[str, Any]
) -> None:
    """Raises ValueError for variables of a chat template that do not apply."""
    if given and chat_template is None:
        raise ValueError("chat_template_kwargs need the chat template: drop chat_template=None (--raw)")
    if foreign := not_variables(tokenizer, given):
        raise ValueError(f"chat_template_kwargs must be variables of the chat template, got {foreign[0]!r}")


def _template(tokenizer: PreTrainedTokenizerBase, wanted: ChatTemplate, lam: float | None) -> str:
    """Returns the text of the template for a row at λ."""
    templates = tokenizer.chat_template
    if not templates:
        raise ValueError(
            "the tokenizer has no chat template: pass chat_template=None (--raw) to give prompts as they are"
        )
    if not isinstance(templates, dict):
        templates = dict.fromkeys(("default", "instruct", "thinking"), templates)  # both ends share it
    if not isinstance(wanted, str):
        if lam is None:
            raise ValueError("a chat_template that depends on λ needs the intensities of the rows, got None")
        wanted = wanted(lam) if callable(wanted) else "thinking" if lam >= wanted else "instruct"
    if wanted not in templates:
        raise ValueError(f"chat_template must be one of {sorted(templates)}, or depend on λ, got {wanted!r}")
    return templates[wanted]


def ask(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    intensities: IntensityLike | None,
    chat_template: ChatTemplate | None = "default",
    prompt_intensity: IntensityLike | None = None,
    prompt_tail: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Answer]:
    """Answers all prompts in one batch, each at its own λ.

    Args:
        model: a patched model; or an ordinary one, with `intensities` None.
        tokenizer: the model's tokenizer.
        prompts: one per row.
        intensities: for all rows or one per row: a number, a preset's name, or "auto".
        chat_template: as in `render`. If it depends on λ, the estimator gets prompts in the instruct end's template.
        prompt_intensity: λ of the prompts before their tails, as in `generate`.
        prompt_tail: as in `generate`, or "turn", for all rows or in a list: from the text of the last user message on.
        chat_template_kwargs: variables of the chat template, such as {"enable_thinking": False}.
        options: passed to `model.generate`. Without `max_new_tokens`, an answer has as many tokens at most as the
            model's generation config says, or else as fit into its context.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it is and what it must be.
    """
    prompts, variables = as_prompts(prompts), chat_template_kwargs or {}
    check_variables(tokenizer, chat_template, variables)
    wanted: Sequence[float | str] | None = None
    with torch.inference_mode():
        if intensities is not None:
            wanted = _wanted(model, tokenizer, prompts, intensities, chat_template, prompt_intensity, variables)
        lams: Any = wanted  # numbers, if the template depends on them
        texts, batch = encode(tokenizer, prompts, chat_template, lams, **variables)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        given: dict[str, Any] = {} if wanted is None else {"intensity": wanted}
        if prompt_intensity is not None or prompt_tail is not None:
            tails = _tails(tokenizer, prompts, prompt_tail, chat_template, lams, variables)
            given |= {"prompt_intensity": prompt_intensity, "prompt_tail": tails}
        if options.keys() <= KNOWN:
            ids = generate_in_pieces(model, batch, given.pop("intensity", None), **given, **options)
        else:
            length = batch["input_ids"].shape[1]
            if options.keys().isdisjoint(("max_length", "generation_config")):
                told = options.get("max_new_tokens") or model.generation_config.max_new_tokens
                if options.get("compile") and told is None:
                    raise ValueError("max_new_tokens must be given with compile=True, which makes room for all of them")
                options["max_new_tokens"] = room(model, length, told)
            if (several := option(model, options, "num_return_sequences") or 1) != 1:
                raise ValueError(
                    f"num_return_sequences must be 1 for one answer per prompt, got {several}: repeat prompts"
                )
            generated = model.generate(**batch, **given, **options)
            ids = getattr(generated, "sequences", generated)[:, length:]
    if wanted is not None:
        lams = [patch_of(model).chosen[row] if isinstance(lam, str) else lam for row, lam in enumerate(wanted)]
    return answers_of(model, Reader.of(tokenizer), ids.cpu(), prompts, lams, texts)


def _wanted(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    intensities: IntensityLike,
    chat_template: ChatTemplate | None,
    prompt_intensity: IntensityLike | None,
    variables: Mapping[str, Any],
) -> list[float | str]:
    """Returns λ of every row: numbers, and "auto" where `generate` can ask the estimator about the very prompts."""
    if prompt_intensity is None or not (chat_template is None or isinstance(chat_template, str)):
        return [*numbers_of(model, tokenizer, prompts, intensities, chat_template, **variables)]
    parsed = Intensity.parse(intensities, CALLERS["dami.chat.ask"], patch_of(model).presets, len(prompts))
    return [AUTO if row in parsed.auto else lam for row, lam in enumerate(parsed.each(len(prompts)))]


def _tails(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    tail: Any,
    chat_template: ChatTemplate | None,
    intensities: Sequence[float] | None,
    variables: Mapping[str, Any],
) -> Any:
    """Replaces "turn" in a `prompt_tail` by numbers of tokens."""
    several = [tail] * len(prompts) if isinstance(tail, str) else tail
    if not isinstance(several, (list, tuple)) or TURN not in several:
        return tail
    turns = last_turns(tokenizer, prompts, chat_template, intensities, **variables)
    return [turn if each == TURN else each for each, turn in zip(several, turns, strict=False)]


def last_turns(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    chat_template: ChatTemplate | None = "default",
    intensities: Sequence[float] | None = None,
    **options: Any,
) -> list[int]:
    """Returns how many tokens each prompt has from the text of its last user message on.

    These are the tokens from the first one on that would be another if this message began otherwise. A prompt without a
    user message counts as a whole.

    Args:
        tokenizer, prompts, chat_template, intensities, options: as in `render`.

    Raises:
        ValueError: `chat_template` is None, so that there are no messages; or as in `render`.
    """
    if chat_template is None:
        raise ValueError(
            "prompt_tail='turn' needs the chat template: drop chat_template=None (--raw), or pass a number"
        )
    lams = intensities and [*intensities] * 2
    texts = render(tokenizer, [*prompts, *map(otherwise, prompts)], chat_template, lams, **options)
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [*map(last_turn, rows[: len(prompts)], rows[len(prompts) :])]


def last_turn(ids: Sequence[int], other: Sequence[int]) -> int:
    """Returns how many tokens a prompt has from the first one on that it has not `otherwise`; all if there is none."""
    return len(ids) - next((place for place, (a, b) in enumerate(zip(ids, other)) if a != b), 0)  # noqa: B905


def otherwise(prompt: Prompt) -> Prompt:
    """Returns a prompt with another last user message, which differs from the first letter on."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        return prompt
    other = "1" if text_of([messages[last]]).lstrip().startswith("0") else "0"
    content = other if isinstance(messages[last]["content"], str) else [{"type": "text", "text": other}]
    return [*messages[:last], {**messages[last], "content": content}, *messages[last + 1 :]]


def numbers_of(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    intensities: IntensityLike,
    chat_template: ChatTemplate | None = "default",
    **options: Any,
) -> list[float]:
    """Returns λ of every row, with presets and "auto" replaced by their numbers. `options` are those of `render`."""
    prompts = as_prompts(prompts)
    wanted = Intensity.parse(intensities, CALLERS["dami.chat.ask"], patch_of(model).presets, len(prompts))
    lams = wanted.each(len(prompts))
    if wanted.auto:
        fixed = chat_template if chat_template is None or isinstance(chat_template, str) else "instruct"
        _, batch = encode(tokenizer, prompts, fixed, **options)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        found = estimates(model, batch, len(prompts), wanted.auto)
        for place, lam in zip(wanted.auto, found.numpy(), strict=True):
            lams[place] = float(str(lam))  # the shortest decimal: 0.4, not 0.40000000596
    return lams


def answers_of(
    model: Any,
    reader: Reader,
    ids: torch.Tensor,
    prompts: Sequence[Prompt],
    intensities: Sequence[float] | None,
    texts: Sequence[str],
) -> list[Answer]:
    """Parses generated `ids`, int64 [rows, tokens] on the CPU, finished or not; `texts` are the prompts' full texts."""
    ends = torch.isin(ids, end_tokens(model))
    answers = []
    for row, prompt in enumerate(prompts):
        finished = bool(ends[row].any())
        tokens = int(ends[row].int().argmax()) + 1 if finished else ids.shape[1]
        said = reader.read(ids[row, :tokens].tolist(), inside=reader.opens(texts[row]), finished=finished)
        intensity = None if intensities is None else float(intensities[row])
        answers.append(Answer(prompt, intensity, said.thought, said.answer, tokens, finished))
    return answers
