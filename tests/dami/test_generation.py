"""`generate` in all its modes: each row of a mixed batch, token for token, against a plain model merged at its λ."""

from __future__ import annotations

import copy
import threading
from typing import Any

import dami
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import is_optimum_quanto_available

from tests.dami.families import VOCABULARY, batch, merged, pair, references

LAM = [0.0, 0.37, 1.0, 1.2]
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture
def model() -> PreTrainedModel:
    return dami.patch_model(*pair("qwen3"))


def prompts(rows: int = 4) -> dict[str, Tensor]:
    inputs = batch("left", rows)
    del inputs["position_ids"]
    return inputs


def rows_of(model: Any, inputs: dict[str, Any], rows: int, **options: Any) -> list[Tensor]:
    """What `generate` returns, apart for each prompt."""
    torch.manual_seed(3)
    return list(model.generate(**inputs, **options).unflatten(0, (rows, -1)))


def assert_rows_match(model: Any, plain: Any, inputs: dict[str, Any], lams: list[float], **options: Any) -> None:
    """Checks each row of a mixed batch against `plain(λ)`, given the whole batch too, so that chance is the same."""
    for row, tokens in enumerate(rows_of(model, inputs, len(lams), intensity=lams, **options)):
        assert torch.equal(tokens, rows_of(plain(lams[row]), inputs, len(lams), **options)[row]), f"row {row}"


class Rotate(LogitsProcessor):
    """A grammar of sorts: after each token only some may follow."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = (torch.arange(VOCABULARY) + input_ids[:, -1:]) % 3 == 0
        return scores.masked_fill(~allowed, -torch.inf)


def allowed(place: int, ids: Tensor) -> list[int]:
    return list(range(5 + 7 * place, 40 + 7 * place))


@pytest.mark.parametrize("family", ["qwen3", "mistral"])  # mistral's attention slides over 4 tokens
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static", "num_beams": 2},
        {"prefill_chunk_size": 2},
        {"guidance_scale": 1.5},
        {"guidance_scale": 1.5, "num_beams": 2},
        {"prefix_allowed_tokens_fn": allowed},
        {"prefix_allowed_tokens_fn": allowed, "num_beams": 3},
        {"logits_processor": LogitsProcessorList([Rotate()])},
        {"logits_processor": LogitsProcessorList([Rotate()]), "num_beams": 2, "num_return_sequences": 2},
        {"sequence_bias": [[[7], 5.0]], "repetition_penalty": 1.3},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    ],
    ids="+".join,
)
def test_every_mode_gives_each_row_the_tokens_of_the_model_merged_at_its_lam(
    family: str, options: dict[str, Any]
) -> None:
    model = dami.patch_model(*pair(family))
    assert_rows_match(model, lambda lam: references(family, lam)[0], prompts(), LAM, **{**GREEDY, **options})


def test_guidance_with_a_negative_prompt_runs_it_at_the_rows_lam(model: PreTrainedModel) -> None:
    inputs, negative = prompts(), prompts()
    inputs |= {"negative_prompt_ids": negative["input_ids"], "negative_prompt_attention_mask": inputs["attention_mask"]}
    assert_rows_match(model, lambda lam: references("qwen3", lam)[0], inputs, LAM, guidance_scale=2.0, **GREEDY)


def test_stopping_criteria_stop_each_row_by_itself(model: PreTrainedModel) -> None:
    def odd(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return ids[:, -1] % 2 == 1

    options = {"max_new_tokens": 8, "do_sample": False, "stopping_criteria": StoppingCriteriaList([odd])}
    inputs = prompts()
    together = model.generate(**inputs, intensity=LAM, **options)
    for row, lam in enumerate(LAM):
        alone = references("qwen3", lam)[0].generate(**inputs, **options)[row]
        length = min(len(alone), together.shape[1])  # the batch ends with its last row
        assert torch.equal(together[row, :length], alone[:length]), f"row {row}"


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache(cache: str) -> None:
    model = dami.patch_model(*(end.cuda() for end in pair("qwen3")))
    inputs = {name: tensor.cuda() for name, tensor in prompts().items()}
    plain = {lam: copy.deepcopy(references("qwen3", lam)[0]).cuda() for lam in LAM}
    assert_rows_match(model, plain.__getitem__, inputs, LAM, cache_implementation=cache, **GREEDY)


@pytest.mark.skipif(is_optimum_quanto_available(), reason="it would run")
def test_a_quantised_cache_needs_what_transformers_needs(model: PreTrainedModel) -> None:
    with pytest.raises(ImportError, match="optimum-quanto"):
        model.generate(**prompts(), intensity=LAM, cache_implementation="quantized", **GREEDY)


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"force_words_ids": [[5]], "num_beams": 2}, "Constrained Beam Search"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.3}, "Group Beam Search"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "Contrastive Search"),
        ({"dola_layers": "low"}, "Dola Generation"),
    ],
    ids=str,
)
def test_modes_that_transformers_gave_up_are_refused_by_it(
    model: PreTrainedModel, options: dict[str, Any], mode: str
) -> None:
    with pytest.raises(ValueError, match=f"{mode} requires `trust_remote_code=True`"):
        model.generate(**prompts(), intensity=LAM, **GREEDY | options)


def test_a_decoding_loop_of_ones_own_tries_several_rows_of_each_sequence(model: PreTrainedModel) -> None:
    """As contrastive search does, whose candidates are copies of a sequence side by side."""

    def best_of_three(model: Any, input_ids: Tensor, logits_processor: Any, **inputs: Any) -> Tensor:
        attention_mask = inputs["attention_mask"]
        tried = model(input_ids, attention_mask=attention_mask).logits[:, -1].topk(3).indices
        ids = torch.cat([input_ids.repeat_interleave(3, 0), tried.view(-1, 1)], 1)
        mask = torch.cat([attention_mask.repeat_interleave(3, 0), torch.ones_like(tried.view(-1, 1))], 1)
        scores = model(ids, attention_mask=mask).logits[:, -1].amax(1).view(-1, 3)
        return ids.view(len(tried), 3, -1)[torch.arange(len(tried)), scores.argmax(1)]

    inputs = prompts()  # padded, as transformers drops a mask of ones
    assert_rows_match(
        model, lambda lam: references("qwen3", lam)[0], inputs, LAM, custom_generate=best_of_three, **GREEDY
    )


class Keep(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("assisted", [False, True])
def test_a_streamer_gets_each_token(model: PreTrainedModel, assisted: bool) -> None:
    ids, streamer = torch.randint(3, VOCABULARY, (1, 5)), Keep()
    more = {"assistant_model": dami.twin(model)} if assisted else {}
    tokens = model.generate(ids, intensity=0.37, streamer=streamer, **more, **GREEDY)
    assert streamer.tokens == tokens[0].tolist()
    assert torch.equal(tokens, references("qwen3", 0.37)[0].generate(ids, **GREEDY))


@pytest.mark.parametrize("assistant", ["plain", "twin", "layers", "prompt"])
def test_assisted_decoding_changes_no_token(model: PreTrainedModel, assistant: str) -> None:
    ids = torch.randint(3, VOCABULARY, (1, 5)).repeat(1, 2)
    options: dict[str, dict[str, Any]] = {
        "plain": {"assistant_model": pair("qwen3")[0]},
        "twin": {"assistant_model": dami.twin(model, 0.0)},
        "layers": {"assistant_early_exit": 1},
        "prompt": {"prompt_lookup_num_tokens": 2},
    }
    options[assistant] |= {"max_new_tokens": 12, "do_sample": False}
    tokens = model.generate(ids, intensity=0.37, **options[assistant])
    assert torch.equal(tokens, references("qwen3", 0.37)[0].generate(ids, max_new_tokens=12, do_sample=False))


@torch.no_grad()
def test_a_twin_shares_all_weights_and_has_its_own_dial(model: PreTrainedModel) -> None:
    inputs = batch("left")
    twin = dami.twin(model, 0.8)
    assert type(twin) is type(model)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    assert {id(b) for b in twin.buffers()} == {id(b) for b in model.buffers()}
    wanted = {lam: model(**inputs, intensity=lam).logits for lam in (0.0, 0.3, 0.8)}
    with dami.intensity(model, 0.3), dami.intensity(model, 0.0, modules="mlp"):
        assert torch.equal(twin(**inputs).logits, wanted[0.8])
    with dami.intensity(twin, 0.3):
        assert torch.equal(model(**inputs).logits, wanted[0.0])
        assert torch.equal(twin(**inputs).logits, wanted[0.3])
    with pytest.raises(TypeError, match="model must be patched"):
        dami.twin(pair("qwen3")[0])


def test_two_threads_generate_at_once_with_a_twin(model: PreTrainedModel) -> None:
    inputs, results = prompts(), {}
    wanted = {lam: model.generate(**inputs, intensity=lam, **GREEDY) for lam in (0.0, 1.0)}

    def work(model: Any, lam: float) -> None:
        results[lam] = [model.generate(**inputs, intensity=lam, **GREEDY) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(m, lam)) for m, lam in ((model, 0.0), (dami.twin(model), 1.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(tokens, wanted[lam]) for lam, several in results.items() for tokens in several)
    assert len(results) == 2


def test_a_copy_leaves_behind_what_was_compiled_for_the_original(model: PreTrainedModel) -> None:
    model._compiled_call = model.__call__
    assert not hasattr(dami.twin(model), "_compiled_call")
    assert not hasattr(copy.deepcopy(model), "_compiled_call")


@torch.no_grad()
def test_prompts_come_by_position_or_not_at_all(model: PreTrainedModel) -> None:
    ids = torch.randint(3, VOCABULARY, (2, 5))
    lam = [0.0, 1.0]
    wanted = model.generate(input_ids=ids, intensity=lam, **GREEDY)
    assert torch.equal(model.generate(ids, intensity=lam, **GREEDY), wanted)
    assert torch.equal(model.generate(inputs=ids, intensity=lam, **GREEDY), wanted)
    plain = references("qwen3", 1.0)[0]
    assert torch.equal(model.generate(intensity=[1.0], **GREEDY), plain.generate(**GREEDY))
    with pytest.raises(ValueError, match="got 2 for 1 sequences"):
        model.generate(intensity=lam, **GREEDY)


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_embeddings_count_the_prompts(model: PreTrainedModel, beams: int) -> None:
    inputs = prompts()
    wanted = model.generate(**inputs, intensity=LAM, num_beams=beams, **GREEDY)[:, -6:]
    with dami.intensity(model, LAM):
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model.generate(**inputs, intensity=LAM, num_beams=beams, **GREEDY), wanted)


def seq2seq() -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(1)
    sizes = {"d_model": 24, "max_position_embeddings": 32, "vocab_size": VOCABULARY}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 40}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    instruct = AutoModelForSeq2SeqLM.from_config(BartConfig(**sizes, **special, forced_eos_token_id=None)).eval()
    with torch.no_grad():
        for parameter in instruct.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        thinking = copy.deepcopy(instruct)
        for parameter in thinking.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return instruct, thinking


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}],
    ids="+".join,
)
def test_an_encoder_runs_at_the_rows_lam_too(options: dict[str, Any]) -> None:
    """Before its rows are expanded to beams; the decoder's positions, [1, T], are shared by all rows."""
    ends = seq2seq()
    plain = {lam: merged(*ends, lam, torch.float32) for lam in LAM}
    inputs = batch("right")
    del inputs["position_ids"]
    assert_rows_match(dami.patch_model(*ends), plain.__getitem__, inputs, LAM, **GREEDY | options)


@torch.no_grad()
def test_an_encoder_decoders_forward_counts_its_sequences() -> None:
    ends = seq2seq()
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (4, 7)), "decoder_input_ids": torch.randint(3, 9, (4, 3))}
    model = dami.patch_model(*copy.deepcopy(ends))
    logits = model(**inputs, intensity=LAM).logits
    for row, lam in enumerate(LAM):
        torch.testing.assert_close(logits[row], merged(*ends, lam, torch.float32)(**inputs).logits[row])
    with dami.intensity(model, LAM):
        encoded = model.get_encoder()(inputs["input_ids"])
    with pytest.raises(ValueError, match="got 3 for 4 sequences"):
        model(encoder_outputs=encoded, decoder_input_ids=inputs["decoder_input_ids"], intensity=LAM[:3])


def test_a_pipeline_takes_one_lam_or_one_per_prompt() -> None:
    model, tokenizer = dami.load_pair(*dami.example_pair(), dtype=torch.float32)
    asked = [f"<|user|>{question}<|assistant|>" for question in ("7 + 3 =", "gcd(12, 18) =", "8 - 3 =")]
    lams = [0.0, 0.5, 1.0]
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}

    def said(**how: Any) -> list[str]:
        return [answer["generated_text"] for (answer,) in generate(asked, **options, **how)]

    alone = {lam: said(intensity=lam) for lam in lams}
    assert len({tuple(answers) for answers in alone.values()}) > 1
    wanted = [alone[lam][i] for i, lam in enumerate(lams)]
    for size in (1, 2, 3):
        assert said(intensity=iter(lams), batch_size=size) == wanted
    alone = {lam: said(prompt_intensity=lam, intensity=0.5) for lam in lams}
    wanted = [alone[lam][i] for i, lam in enumerate(lams)]
    assert said(prompt_intensity=iter(lams), intensity=0.5, batch_size=2) == wanted
    with pytest.raises(ValueError, match="got 1 for 2 sequences"):
        said(intensity=iter(lams[:1]), batch_size=2)
    with pytest.raises(ValueError, match=r"intensity must be an iterator .* it ended, got 0 for 1 sequences"):
        said(intensity=iter(lams[:2]))
    with pytest.raises(
        ValueError, match=r"got 2 for 1 sequences; a pipeline takes an iterator, intensity=iter\(\[…\]\)"
    ):
        generate(["a", "b"], intensity=[0.0, 1.0])


@pytest.mark.parametrize("name", ["intensity", "prompt_intensity", "intensty"])
def test_lam_in_a_generation_config_is_refused(name: str) -> None:
    model, inputs = dami.patch_model(*pair("llama")), batch("left")
    for config in (GenerationConfig(**{name: 0.5}), None):
        with pytest.raises(TypeError, match=rf"generate takes \w+ as an argument, .*, got '{name}' in its config"):
            model.generate(**inputs, generation_config=config)
        setattr(model.generation_config, name, 0.5)


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_lam_is_no_second_argument_of_generate(lam: float) -> None:
    with pytest.raises(
        TypeError, match=f"generation_config must be a GenerationConfig, got {lam}: λ is a keyword, inten"
    ):
        dami.patch_model(*pair("llama")).generate(batch("left")["input_ids"], lam)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_healing": True}, "token_healing takes one intensity for all prompts"),
    ],
)
def test_what_cannot_be_mixed_is_refused(model: PreTrainedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts(), intensity=LAM, **options, **GREEDY)
