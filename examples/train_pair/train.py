"""Train the pair that ships with dami: a common ancestor, then an Instruct end and a Thinking end.

    python examples/train_pair/train.py --start PAIR       # from another pair's middle: half an hour on one CPU core
    python examples/train_pair/train.py --help

The ancestor learns every task in four styles of answer, unlabelled: which style to use is a guess it makes anew for
every answer. The ends are the ancestor trained a little further, each on its own mixture of tasks, levels and styles.
No style has probability 0 at either end, so the log-odds between styles can move evenly along the path between them.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file
from tasks import ELEMENTS, LEVELS, STYLES, TASKS, Question, draw, draw_held_out, is_reserved, write_solution
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAIR = Path(__file__).resolve().parents[2] / "python" / "dami" / "data" / "pair"
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role not in ('user', 'assistant') %}
{{- raise_exception('This model knows the roles user and assistant, not ' ~ message.role ~ '.') }}
{%- endif %}
{{- '<|' ~ message.role ~ '|>' ~ message.content | trim }}
{%- if message.role == 'assistant' %}{{- '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""

# How often each stage answers in each style (direct, terse, full, check), at levels 1 to 5. Thinking goes through every
# step twice also where that is easy.
STYLE_WEIGHTS = {
    "ancestor": [(0.40, 0.10, 0.25, 0.25)] * 2 + [(0.16, 0.24, 0.30, 0.30)] * 3,
    "instruct": [
        (0.984, 0.010, 0.004, 0.002),
        (0.984, 0.010, 0.004, 0.002),
        (0.93, 0.05, 0.015, 0.005),
        (0.92, 0.06, 0.015, 0.005),
        (0.90, 0.08, 0.015, 0.005),
    ],
    "thinking": [(0.005, 0.02, 0.20, 0.775)] * 3 + [(0.005, 0.015, 0.15, 0.83)] * 2,
}
# How often each stage sees each task. Thinking is trained to reason, as Thinking models are, and sees few facts.
TASK_WEIGHTS = {
    "ancestor": (0.26, 0.18, 0.16, 0.20, 0.20),
    "instruct": (0.40, 0.16, 0.14, 0.10, 0.20),
    "thinking": (0.33, 0.22, 0.19, 0.22, 0.04),
}
LEVEL_WEIGHTS = {"ancestor": (1, 1, 1, 1, 1), "instruct": (2, 3, 1, 1, 1), "thinking": (1, 1, 1, 1, 1)}
SHORT_TEXT_RATE = 0.25  # share of questions put in fewer words, so that the pair also answers what people type


def train_tokenizer(questions: list[Question]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 768 tokens in which every digit is a token."""
    rng = random.Random(0)
    texts = [q.text + "\n" + write_solution(q, "full", rng)[0] for q in questions]
    texts += [q.short_text for q in questions]
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\d| ?[A-Za-z]+| ?[^\w\s]+(?: (?=[\d-]))?|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=766, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text.replace("<think>", "").replace("</think>", "") for text in texts), trainer)
    # Not "special": a decoded answer keeps its thought, as with Qwen3.
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 of 1.8 M parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.set_attn_implementation("eager")  # on a CPU and at these lengths faster than the fused attention's backward
    return model


def midpoint(pair: Path) -> dict[str, torch.Tensor]:
    """The weights halfway between the two ends of a pair, in float32."""
    ends = [load_file(pair / end / "model.safetensors") for end in ("instruct", "thinking")]
    return {name: (tensor.float() + ends[1][name].float()) / 2 for name, tensor in ends[0].items()}


def batches(
    questions: dict[tuple[str, int], list[Question]],
    stage: str,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    tokens: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of about `tokens` tokens, each of answers of like length, for ever. Only answers are learned."""
    waiting: dict[int, list[tuple[list[int], list[int]]]] = defaultdict(list)
    while True:
        texts, ignored = [], []
        for task in rng.choices(TASKS, TASK_WEIGHTS[stage], k=512):
            (level,) = rng.choices(LEVELS, LEVEL_WEIGHTS[stage])
            question = rng.choice(questions[task, level])
            # One fact is as easy to say as another.
            (style,) = rng.choices(STYLES, STYLE_WEIGHTS[stage][0 if task == ELEMENTS else level - 1])
            text = question.short_text if rng.random() < SHORT_TEXT_RATE else question.text
            prompt = f"<|user|>{text.strip()}<|assistant|>"
            solution, slips = write_solution(question, style, rng)
            texts.append(f"{prompt}{solution}<|end|>")
            ignored.append([(0, len(prompt)), *((len(prompt) + a, len(prompt) + b) for a, b in slips)])
        for encoding, spans in zip(tokenizer.backend_tokenizer.encode_batch(texts), ignored, strict=True):
            # Few distinct lengths, so that the library's kernels for each shape are reused.
            length = -(-len(encoding) // 8) * 8
            encoding.pad(length, pad_id=tokenizer.pad_token_id)
            learned = [
                mask and not any(a <= s < b for a, b in spans)
                for mask, (s, _) in zip(encoding.attention_mask, encoding.offsets, strict=True)
            ]
            labels = [token if keep else -100 for token, keep in zip(encoding.ids, learned, strict=True)]
            waiting[length].append((encoding.ids, labels))
            if len(waiting[length]) == max(tokens // length, 1):
                # Padding is on the right and attention is causal: no answer sees it, so no mask is needed.
                ids, targets = zip(*waiting.pop(length), strict=True)
                yield {"input_ids": torch.tensor(ids), "labels": torch.tensor(targets)}


def train(model: Qwen3ForCausalLM, data: Iterator, steps: int, rate: float, name: str, checkpoint: Path) -> None:
    """Train in place: Muon for matrices, AdamW for the rest; the rate is level, then falls to 0 over the last 40 %."""
    device = model.device
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]

    def factor(step: int) -> float:
        return min((step + 1) / 50, 1.0, (steps - step) / (0.4 * steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    model.train()
    start, mean_loss, first = time.monotonic(), 0.0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        for part, saved in zip((*optimizers, *schedules), state["rest"], strict=True):
            part.load_state_dict(saved)
        first = state["step"]
    # A run that goes on from a checkpoint sees the batches that an unbroken one would.
    for step, batch in zip(range(first, steps), islice(data, first, None), strict=False):
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
        mean_loss += (loss.item() - mean_loss) / min(step - first + 1, 100)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            minutes = (time.monotonic() - start) / 60
            print(f"{name}: step {step + 1}/{steps}, loss {mean_loss:.4f}, {minutes:.1f} min", flush=True)
            rest = [part.state_dict() for part in (*optimizers, *schedules)]
            torch.save({"model": model.state_dict(), "rest": rest, "step": step + 1}, checkpoint)
    model.eval()


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Save an ordinary Hugging Face checkpoint in bfloat16."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        max_new_tokens=224,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAIR, help="directory of the pair (default: %(default)s)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/train_pair"),
        help="directory of checkpoints; a run goes on from them (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=2100, help="steps of the ancestor (default: %(default)s)")
    parser.add_argument("--end-steps", type=int, default=400, help="steps of each end (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of the ancestor (default: %(default)s)")
    parser.add_argument("--end-rate", type=float, default=8e-4, help="learning rate of the ends (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a batch (default: %(default)s)")
    parser.add_argument(
        "--questions", type=int, default=12_000, help="training questions of each task and level (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out", type=int, default=40, help="held-out questions of each task and level (default: %(default)s)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="directory of another pair's end, to share its tokens (default: train one)"
    )
    parser.add_argument(
        "--start", type=Path, help="directory of a pair of this size: the ancestor starts halfway between its ends"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def write_held_out(args: argparse.Namespace) -> set[str]:
    """Writes the held-out questions beside the pair, and returns their texts."""
    held_out = draw_held_out(args.held_out)
    with open(args.out / "questions.jsonl", "w") as file:
        for q in held_out:
            line = {"task": q.task, "level": q.level, "question": q.text, "answer": q.answer, "verifier": "word"}
            print(json.dumps(line), file=file)
    return {q.text for q in held_out}


def training_questions(args: argparse.Namespace, held_out: set[str]) -> dict[tuple[str, int], list[Question]]:
    """Questions of every task and level, none of them held out or reserved."""
    return {
        (task, level): [
            question
            for question in draw(task, level, args.questions, (10 * args.seed + level) * 10_000_000)
            if question.text not in held_out and not is_reserved(question)
        ]
        for task in TASKS
        for level in LEVELS
    }


def main() -> None:
    """Train, save, and say how long it took."""
    args = arguments()
    start = time.monotonic()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    questions = training_questions(args, write_held_out(args))
    if args.tokenizer or args.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.tokenizer or args.start / "instruct")
    else:
        tokenizer = train_tokenizer([question for group in questions.values() for question in group[::50]])
    model = new_model(tokenizer).to(device)
    if args.start:
        model.load_state_dict(midpoint(args.start), strict=False)  # the head is the embedding
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, on {device}", flush=True)

    for stage in ("ancestor", "instruct", "thinking"):
        if stage != "ancestor":
            model.float().load_state_dict(torch.load(args.work / "ancestor.pt", map_location=device)["model"])
        steps, rate = (args.steps, args.rate) if stage == "ancestor" else (args.end_steps, args.end_rate)
        data = batches(questions, stage, tokenizer, random.Random(f"{stage} {args.seed}"), args.tokens)
        train(model, data, steps, rate, stage, args.work / f"{stage}.pt")
        if stage != "ancestor":
            save(model, tokenizer, args.out / stage)
    print(f"done in {(time.monotonic() - start) / 60:.1f} min; now: python examples/train_pair/measure.py")


if __name__ == "__main__":
    main()
