"""vLLM's own server with a pair: λ in a request's body."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import dami
import pytest
from dami.estimators.files import StoredIntensity

from tests.dami.serving.vllm.pairs import answers, followers

PROMPT = "<|user|>47 + 38 - 12 =<|assistant|>"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return dami.pack(*dami.example_pair(), tmp_path_factory.mktemp("shipped") / "pair", format="int8")


@pytest.fixture(scope="module")
def url(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    settings = {"default_intensity": 1, "intensity_range": [0, 1]}
    options = {
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": "float32",
        "--max-model-len": 512,
        "--max-num-seqs": 8,
        "--block-size": 32,
        "--served-model-name": "pair",
        "--model-loader-extra-config": json.dumps(settings),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(pair), "--enforce-eager"]
    command += [str(part) for option in options.items() for part in option]
    with open(log, "w") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        )
    try:
        for _ in range(1200):
            try:
                urlopen(f"http://127.0.0.1:{port}/health")
                break
            except URLError:
                assert server.poll() is None, log.read_text()[-4000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def sent(url: str, body: dict[str, Any]) -> Any:
    request = Request(url, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    return urlopen(request)


def post(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    try:
        with sent(url, {"model": "pair", "temperature": 0, **body}) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)


def streamed(url: str, body: dict[str, Any]) -> Any:
    """The chunks of a stream, which has begun when this returns."""
    lines = sent(url, {"model": "pair", "stream": True, "return_token_ids": True, **body})

    def chunks() -> Iterator[dict[str, Any]]:
        with lines:
            for line in lines:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])

    return chunks()


def completion(url: str, **body: Any) -> str:
    status, answer = post(f"{url}/completions", {"prompt": PROMPT, "max_tokens": 24, "ignore_eos": True, **body})
    assert status == 200, answer
    return answer["choices"][0]["text"]


@pytest.fixture(scope="module")
def wanted(pair: Any) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair)
    prompt = tokenizer(PROMPT)["input_ids"]
    return lambda lam: tokenizer.decode(answers(pair, [prompt], [lam], 24)[0], skip_special_tokens=True)


@pytest.mark.parametrize("door", ["vllm_xargs", "body"])
def test_completions(url: str, wanted: Any, door: str) -> None:
    for lam in (0, 0.3, 1, "low"):
        body = {"vllm_xargs": {"intensity": lam}} if door == "vllm_xargs" else {"intensity": lam}
        assert completion(url, **body) == wanted(0.4 if lam == "low" else lam)
    assert wanted(0) != wanted(1)


def test_the_default(url: str, wanted: Any) -> None:
    assert completion(url) == wanted(1)


def test_chats(url: str) -> None:
    texts = []
    for lam in (0, 1):
        body = {"messages": [{"role": "user", "content": "47 + 38 - 12 ="}], "max_tokens": 60, "intensity": lam}
        status, answer = post(f"{url}/chat/completions", body)
        assert status == 200, answer
        texts.append(answer["choices"][0]["message"]["content"])
    assert texts[0].isdigit()
    assert len(texts[1]) > 20


WRONG = {
    "0.5": r"intensity must be a number, one of ['high', 'low', 'medium'] or 'auto', got '0.5'",
    (0.5,): "intensity must be one number, got 1: vLLM takes no more",
    -0.1: "intensity must be in 0 to 1 on this server, got -0.1",
    10**12: "intensity must be in 0 to 1 on this server, got 1000000000000",
}


@pytest.mark.parametrize(("value", "message"), WRONG.items())
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_what_is_no_intensity_is_the_client_s_error(url: str, path: str, value: Any, message: str) -> None:
    prompt = {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    value = list(value) if isinstance(value, tuple) else value
    for body in ({"vllm_xargs": {"intensity": value}}, {"intensity": value}):
        status, answer = post(f"{url}/{path}", {**prompt, "max_tokens": 1, **body})
        assert status == 400
        assert message in answer["error"]["message"]


@pytest.mark.parametrize("body", [{"vllm_xargs": {"intensty": 1}}, {"intensty": 1}, {"prompt_intensty": 1}])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_misspelt_intensity_is_the_client_s_error(url: str, path: str, body: dict[str, Any]) -> None:
    prompt = {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    status, answer = post(f"{url}/{path}", {**prompt, "max_tokens": 1, **body})
    assert status == 400
    assert "extra arguments of a request to a pair must be intensity, max_intensity, " in answer["error"]["message"]


def test_two_intensities_are_the_client_s_error(url: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1, "intensity": 0.1, "vllm_xargs": {"intensity": 0.2}}
    status, answer = post(f"{url}/completions", body)
    assert status == 400
    assert "intensity must be given once, got 0.1, and 0.2 in vllm_xargs" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_beams_are_the_client_s_error(url: str, path: str) -> None:
    prompt = {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    body = {**prompt, "max_tokens": 2, "use_beam_search": True, "n": 2, "vllm_xargs": {"intensity": 0.5}}
    status, answer = post(f"{url}/{path}", body)
    assert status == 400
    assert "beam search is not supported with a pair" in answer["error"]["message"]


NAMES = ["", ":auto", ":low", ":medium", ":high", ":0", ":0.3", ":0.5", ":0.7", ":1"]


def test_the_list_of_models_is_a_menu_of_lambda(url: str) -> None:
    with urlopen(f"{url}/models") as response:
        models = {model["id"]: model["intensity"] for model in json.load(response)["data"]}
    assert [*models] == [f"pair{suffix}" for suffix in NAMES]
    assert models["pair"] == {
        "default": 1,
        "prompt": "same",
        "tail": 1,
        "least_tail": 8,
        "range": [0, 1],
        "presets": {"low": 0.4, "medium": 0.6, "high": 0.6},
        "auto": True,
    }
    assert models["pair:low"]["default"] == "low"


def test_names_of_models_carry_lambda(url: str, wanted: Any) -> None:
    for model, lam in (("pair:low", 0.4), ("pair:0.3", 0.3), ("pair", 1)):
        assert completion(url, model=model) == wanted(lam)
    assert completion(url, model="pair:0.3", intensity=0.3) == wanted(0.3)


@pytest.mark.parametrize("model", ["pair:1.1", "pair:lo", "pair:", "other", "other:0.5"])
def test_names_of_no_model(url: str, model: str) -> None:
    status, answer = post(f"{url}/completions", {"prompt": PROMPT, "max_tokens": 1, "model": model})
    assert status == 404
    assert f"The model `{model}` does not exist" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"model": "pair:0.3", "intensity": 0.5}, "model is 'pair:0.3' and intensity 0.5"),
        ({"reasoning_effort": "low", "intensity": 0.5}, "reasoning_effort is low and intensity 0.5"),
        ({"reasoning_effort": "low", "model": "pair:0.3"}, "model is 'pair:0.3' and intensity low"),
        ({"model": "pair:0.3", "max_intensity": 0.5}, "intensity and max_intensity exclude each other"),
    ],
)
def test_lambdas_that_contradict_each_other(url: str, body: dict[str, Any], message: str) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    status, answer = post(f"{url}/chat/completions", {**chat, **body})
    assert status == 400
    assert message in answer["error"]["message"]


def chat(url: str, **body: Any) -> str:
    messages = [{"role": "user", "content": "47 + 38 - 12 ="}]
    status, answer = post(
        f"{url}/chat/completions", {"messages": messages, "max_tokens": 24, "ignore_eos": True, **body}
    )
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


def test_reasoning_effort_is_an_intensity(url: str) -> None:
    for effort, lam in (("none", 0), ("minimal", 0), ("low", 0.4), ("high", 0.6), ("xhigh", 1), ("max", 1)):
        assert chat(url, reasoning_effort=effort) == chat(url, intensity=lam)


def test_the_estimator_chooses(url: str, pair: Any, wanted: Any) -> None:
    model, tokenizer = dami.load_pair(pair)
    estimator = StoredIntensity.load(pair / "intensity").estimator
    lam = estimator.estimate(model, tokenizer(PROMPT, return_tensors="pt")).item()
    assert completion(url, intensity="auto") == completion(url, model="pair:auto") == wanted(lam)
    assert completion(url, intensity="auto", max_intensity=0.05) == wanted(0.05)


class Streams:
    """The tokens of a stream's choices, as far as they have been read."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.chunks = streamed(url, body)
        self.prompt: list[int] = []
        self.tokens: dict[int, list[int]] = {}
        self.lams: dict[int, list[tuple[int, float | None]]] = {}  # with the number of tokens that had come
        self.name = ""
        self.last: dict[str, Any] = {}

    def read(self, until: int | None = None) -> None:
        """Reads so many tokens of each choice at least, or all there are."""
        for chunk in self.chunks:
            self.name, self.last = chunk["id"], chunk
            for choice in chunk["choices"]:
                own = self.tokens.setdefault(choice["index"], [])
                own += choice.get("token_ids") or []
                self.lams.setdefault(choice["index"], []).append((len(own), chunk["intensity"]))
                self.prompt = self.prompt or choice.get("prompt_token_ids") or chunk.get("prompt_token_ids") or []
            if until is not None and self.tokens and min(map(len, self.tokens.values())) >= until:
                return


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_the_dial_is_turned_while_an_answer_streams(url: str, pair: Any, path: str) -> None:
    """Of one of two choices: from there on its tokens are those of the other λ, and nobody else's have changed."""
    body = {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": "47 + 38 ="}]}
    body |= {"max_tokens": 400, "ignore_eos": True, "intensity": 1, "temperature": 1, "top_k": 1}  # n > 1 has to sample
    turned, other = Streams(f"{url}/{path}", {**body, "n": 2}), Streams(f"{url}/{path}", body)
    turned.read(until=5)
    seen = len(turned.tokens[1])
    with sent(f"{url}/requests/{turned.name}/dial", {"intensity": "low", "choice": 1}) as response:
        said = json.load(response)
    assert said == {"id": turned.name, "object": "request.dial", "choices": [1], "intensity": 0.4, "wrap_up": None}
    turned.read()
    other.read()
    prompt, tokens = turned.prompt, turned.tokens[1]

    def followed(tokens: list[int], end: int) -> list[int]:
        """The tokens after each of these where the answer is read at λ = 0.4 from its token with this number on."""
        found = followers(pair, [*prompt, *tokens], lambda place: 1.0 if place < len(prompt) + end else 0.4)
        return found[len(prompt) - 1 : -1]

    assert turned.tokens[0] == other.tokens[0] == followed(other.tokens[0], 400)
    unturned = followed(tokens, 400)
    differs = next(number for number, token in enumerate(tokens) if token != unturned[number])
    ends = [end for end in range(seen, differs) if followed(tokens, end) == tokens]
    assert ends
    assert {lam for _, lam in turned.lams[0]} == {1}
    assert any(
        [lam for _, lam in turned.lams[1]] == [0.4 if count > end + 1 else 1 for count, _ in turned.lams[1]]
        for end in ends
    )


CHAT = {"messages": [{"role": "user", "content": "47 + 38 - 12 ="}]}


@pytest.mark.parametrize(("path", "prompt"), [("completions", {"prompt": PROMPT}), ("chat/completions", CHAT)])
def test_responses_say_the_lambda_that_was_granted(url: str, path: str, prompt: dict[str, Any]) -> None:
    for asked, lam in (({"intensity": 0.3}, 0.3), ({"intensity": "low"}, 0.4), ({}, 1), ({"max_intensity": 0}, 0)):
        status, answer = post(f"{url}/{path}", {**prompt, "max_tokens": 2, "n": 2, "temperature": 1, **asked})
        assert (status, answer["intensity"]) == (200, lam)
        assert {choice.get("intensity", lam) for choice in answer["choices"]} == {lam}


def test_prompts_may_be_granted_different_lambdas(url: str) -> None:
    """By the estimator: then each choice says its own, as with `dami serve`."""
    prompts = [PROMPT, "<|user|>What is the atomic number of iron?<|assistant|>"]
    own = []
    for prompt in prompts:
        _, alone = post(f"{url}/completions", {"prompt": prompt, "max_tokens": 1, "intensity": "auto"})
        own.append(alone["intensity"])
    assert own[0] != own[1]
    _, both = post(f"{url}/completions", {"prompt": prompts, "max_tokens": 1, "intensity": "auto"})
    assert (both["intensity"], [choice["intensity"] for choice in both["choices"]]) == (None, own)


@pytest.mark.parametrize(("path", "prompt"), [("completions", {"prompt": PROMPT}), ("chat/completions", CHAT)])
def test_chunks_say_the_lambda_of_their_last_token(url: str, path: str, prompt: dict[str, Any]) -> None:
    body = {**prompt, "max_tokens": 8, "ignore_eos": True, "stream_options": {"include_usage": True}}
    stream = Streams(f"{url}/{path}", {**body, "intensity": 1, "intensity_schedule": [[4, 0.2]]})
    stream.read()
    assert stream.lams[0] == [
        (count, pytest.approx(max(1 - 0.2 * max(count - 1, 0), 0.2))) for count, _ in stream.lams[0]
    ]
    assert (stream.last["choices"], stream.last["intensity"]) == ([], 1)
    stream = Streams(f"{url}/{path}", {**body, "intensity": 1, "answer_intensity": 0.2})
    stream.read()
    assert stream.lams[0] == [(count, 1 if count < 2 else None) for count, _ in stream.lams[0]]


@pytest.mark.parametrize("door", ["vllm_xargs", "body"])
@pytest.mark.parametrize("parts", [False, True])
def test_a_tail_that_is_the_last_turn(url: str, pair: Any, door: str, parts: bool) -> None:
    """From the text of the last user message on, which begins as the one does that it is compared with."""
    from dami.chat import last_turn
    from transformers import AutoTokenizer

    def messages(last: Any) -> list[dict[str, Any]]:
        said = [("user", "47 + 38 - 12 ="), ("assistant", "73"), ("user", last)]
        return [{"role": role, "content": content} for role, content in said]

    asked = {"prompt_intensity": 0, "prompt_tail": "turn"}
    last = "0 + 84 - 36 ="
    content = [{"type": "text", "text": last}] if parts else last
    body = {"messages": messages(content), "max_tokens": 40, "ignore_eos": True, "intensity": 1, "temperature": 0}
    stream = Streams(f"{url}/chat/completions", body | ({"vllm_xargs": asked} if door == "vllm_xargs" else asked))
    stream.read()
    tokenizer = AutoTokenizer.from_pretrained(pair)
    other = tokenizer.apply_chat_template(messages("1"), add_generation_prompt=True)["input_ids"]
    sequence, prompt = [*stream.prompt, *stream.tokens[0]], len(stream.prompt)
    tail = last_turn(stream.prompt, other)
    assert 5 < tail < prompt - 10
    found = followers(pair, sequence, lambda place: 0.0 if place < prompt - tail else 1.0)
    assert found[prompt - 1 : -1] == stream.tokens[0]


def test_a_text_has_no_last_turn(url: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1, "prompt_intensity": 0, "prompt_tail": "turn"}
    status, answer = post(f"{url}/completions", body)
    assert status == 400
    assert "prompt_tail must be an integer of at least 0, or 'turn' in a chat, got 'turn'" in answer["error"]["message"]


def test_a_thought_is_told_to_wrap_up(url: str) -> None:
    """Which needs a request whose thoughts are followed."""
    body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "intensity": 1}
    for followed in ({}, {"answer_intensity": 0.2}):
        stream = Streams(f"{url}/completions", {**body, **followed})
        stream.read(until=1)
        dial, change = f"{url}/requests/{stream.name}/dial", {"wrap_up": 8}
        if followed:
            with sent(dial, change) as response:
                said = json.load(response)
            assert (said["intensity"], said["wrap_up"]) == (None, 8)
        else:
            with pytest.raises(HTTPError) as refused:
                sent(dial, change)
            assert refused.value.code == 400
            assert (
                "wrap_up needs a request whose λ follows its thoughts in vLLM"
                in json.load(refused.value)["error"]["message"]
            )
        stream.chunks.close()


def test_it_still_answers(url: str, wanted: Any) -> None:
    assert completion(url, intensity=0.5) == wanted(0.5)
