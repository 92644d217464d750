"""Servers are compared on the same questions, and only if their answers are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import __main__, peers
from benchmarks.check import WrongResult
from benchmarks.peers import engines, models
from benchmarks.peers.engines import Engine, Job, Missing
from benchmarks.record import load

SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
answers = json.loads(sys.argv[2])
class Handler(BaseHTTPRequestHandler):
    def do_GET(self): self.reply({})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = answers[str(body["prompt"])][body["max_tokens"]]
        self.reply({"choices": [{"text": text}], "usage": {"completion_tokens": body["max_tokens"]}})
    def reply(self, answer):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())
    def log_message(self, *_): pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> models.Pair:
    return models.shipped(tmp_path_factory.mktemp("pair"))


def compare(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    options = ["--models", "shipped", "--questions", "5", "--tokens", "6", "--repeats", "2", "--results", str(tmp_path)]
    return __main__.main(["peers", *options, *arguments]), load(tmp_path / "peers.csv")


@pytest.fixture
def copycat(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces `dami serve` by a server that knows the answers, and appends a text to them."""
    added = [""]

    def command(job: Job, port: int) -> tuple[list[str], dict[str, str]]:
        asked = job.pair.questions(peers.ONE, 5)
        right = models.expected(job.pair, asked, 6)
        answers = {str([*each.ids]): ["", *(piece + added[0] for piece in right[each].pieces)] for each in asked}
        return [sys.executable, "-c", SERVER, str(port), json.dumps(answers)], {}

    monkeypatch.setitem(engines.ENGINES, "dami serve", Engine(lambda: "copycat 1", command, engines.greedy))
    return added


def test_a_server_is_asked_and_its_answers_are_checked(
    copycat: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows = compare(tmp_path, "--only", "dami-one")
    assert code == 0
    (row,) = rows
    assert (row["method"], row["engine"], row["processes"]) == ("dami serve, one λ", "copycat 1", "1")
    assert (row["questions"], row["tokens"], row["repeats"], row["equal"]) == ("5", "6", "2", "1.00")
    assert 0 < float(row["lowest"]) <= float(row["answers_per_second"]) <= float(row["highest"])
    assert float(row["tokens_per_second"]) == pytest.approx(6 * float(row["answers_per_second"]), rel=0.01)
    assert float(row["memory_gb"]) > 0
    capsys.readouterr()
    copycat[0] = "!"  # at the very end of each answer, before which some have ended
    code, rows = compare(tmp_path, "--only", "dami-one")
    assert [float(row["equal"]) < 1 for row in rows[1:]] == [True]
    assert code == 0
    copycat[0] = ""


def test_what_is_missing_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "ROOT", tmp_path)
    monkeypatch.setattr(engines, "LLAMA", tmp_path / "llama-server")
    assert compare(tmp_path, "--only", "vllm-plugin", "llama") == (0, [])
    said = capsys.readouterr().out
    assert "vllm-plugin is left out: there is no .venv-serving-*: make test-serving makes it" in said
    assert "llama is left out: there is no llama-server: make llama-server builds it" in said
    (tmp_path / "llama-server").touch()
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(Missing, match="there is no gguf: pip install gguf"):
        engines.llama_version()


def test_a_server_that_fails_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(job: Job, port: int) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-c", "raise SystemExit('no memory')"], {}

    monkeypatch.setitem(engines.ENGINES, "dami serve", Engine(lambda: "broken 1", command, engines.greedy))
    assert compare(tmp_path, "--only", "dami-one") == (1, [])
    assert "dami-one FAILED: " in (said := capsys.readouterr().out)
    assert "no memory" in said


def test_answers_may_part_where_rounding_can_turn_the_choice() -> None:
    right = models.Expected(["a", "ab", "ab\ufffd", "abé"], [1.0, 0.5, 1.0, 1.0], 0.3)
    assert right.check("abé")
    assert not right.check("acx")  # the gap of 0.5 is less than twice 0.3
    with pytest.raises(WrongResult, match=r"'bb' parts from 'abé' at a gap of 1.00e\+00"):
        right.check("bb")
    with pytest.raises(WrongResult, match="parts from"):
        right.check("abx")
    ended = models.Expected(["a", "a", "ab"], [1.0, 1.0, 1.0], 0.3)  # the second token ends the answer
    assert ended.check("ac")
    with pytest.raises(WrongResult, match="parts from"):
        ended.check("c")


def test_the_oracle_depends_on_lam(pair: models.Pair) -> None:
    ends = [AutoModelForCausalLM.from_pretrained(end, dtype=torch.float32) for end in pair.ends]
    state = pair.merged(0.25).state_dict()
    for name, tensor in ends[0].state_dict().items():
        wanted = tensor.double() + 0.25 * (ends[1].state_dict()[name].double() - tensor.double())
        torch.testing.assert_close(state[name].double(), wanted, rtol=1e-6, atol=1e-7)
    (asked,) = pair.questions((0.0,), 1)
    other = models.Question(asked.text, asked.ids, 1.0)
    found = models.expected(pair, [asked, other], 4)
    assert found[asked].pieces != found[other].pieces


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_file_for_llama_cpp_holds_the_same_weights(family: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from benchmarks.peers import gguf_file

    pair = models.smollm2(tmp_path, layers=1) if family == "llama" else models.shipped(tmp_path)
    copy = pair.copy(0.25)
    reader = gguf.GGUFReader(gguf_file.write(copy, tmp_path / "file.gguf"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    plain = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.bfloat16)
    assert len(tensors) == sum(1 for _ in plain.named_parameters())

    def weight(name: str) -> torch.Tensor:
        raw = torch.from_numpy(tensors[name].data.copy())
        return raw.view(torch.bfloat16) if raw.dtype == torch.uint8 else raw

    layer = plain.model.layers[0]
    assert torch.equal(weight("token_embd.weight"), plain.model.embed_tokens.weight)
    assert torch.equal(weight("blk.0.ffn_down.weight"), layer.mlp.down_proj.weight)
    assert torch.equal(weight("blk.0.attn_norm.weight"), layer.input_layernorm.weight.float())
    q = layer.self_attn.q_proj.weight
    if family == "llama":  # its neighbours turn against each other: the halves of each head, shuffled
        q = q.view(9, 2, 32, 576).transpose(1, 2).reshape(576, 576)
    assert torch.equal(weight("blk.0.attn_q.weight"), q)
    words = [
        bytes(reader.fields["tokenizer.ggml.tokens"].parts[i]) for i in reader.fields["tokenizer.ggml.tokens"].data
    ]
    assert len(words) == plain.config.vocab_size
    assert words[766] == b"<think>"
