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

from tests.dami.serving.vllm.pairs import answers

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
        "--max-model-len": 128,
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
        for _ in range(480):
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


def post(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = Request(url, json.dumps({"model": "pair", "temperature": 0, **body}).encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urlopen(request) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)


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
    for lam in (0, 0.3, 1):
        body = {"vllm_xargs": {"intensity": lam}} if door == "vllm_xargs" else {"intensity": lam}
        assert completion(url, **body) == wanted(lam)
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


@pytest.mark.parametrize("value", ["auto", "0.5", [0.5], -0.1, 1.1, 10**12])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_what_is_no_intensity_is_the_client_s_error(url: str, path: str, value: Any) -> None:
    prompt = {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    for body in ({"vllm_xargs": {"intensity": value}}, {"intensity": value}):
        status, answer = post(f"{url}/{path}", {**prompt, "max_tokens": 1, **body})
        assert status == 400
        assert "intensity must be a number from 0 to 1, got" in answer["error"]["message"]


@pytest.mark.parametrize("body", [{"vllm_xargs": {"intensty": 1}}, {"intensty": 1}, {"prompt_intensity": 1}])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_misspelt_intensity_is_the_client_s_error(url: str, path: str, body: dict[str, Any]) -> None:
    prompt = {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    status, answer = post(f"{url}/{path}", {**prompt, "max_tokens": 1, **body})
    assert status == 400
    assert "extra arguments of a request to a pair must be 'intensity' alone, got " in answer["error"]["message"]


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


def test_it_still_answers(url: str, wanted: Any) -> None:
    assert completion(url, intensity=0.5) == wanted(0.5)
