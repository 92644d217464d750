"""Loading a pair: what comes out, what is refused before a weight is read, and what it costs in memory."""

from __future__ import annotations

import fnmatch
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dami
import pytest
import torch
from dami.loading.checkpoint import Checkpoint
from dami.loading.preview import preview
from dami.loading.remote import RemoteCheckpoint
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.dami.families import FAMILIES, batch, pair

HUB_FILES = (
    "consolidated.safetensors",
    "model-00001-of-00002.safetensors",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
)
LAM = [0.0, 0.37, 1.0, 1.2]


def save(model: PreTrainedModel, path: Path, words: int = 9, template: str = "", **options: Any) -> Path:
    """Writes a checkpoint with a tokenizer of its own."""
    model.save_pretrained(path, **options)
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", pad_token="w0")
    tokenizer.chat_template = template or None
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def ends(tmp_path: Path) -> tuple[Path, Path]:
    instruct, thinking = pair("llama")
    return save(instruct, tmp_path / "instruct", template="I"), save(thinking, tmp_path / "thinking", template="T")


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_loaded_pair_is_the_patched_pair(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    instruct, thinking = pair(family)
    paths = save(instruct, tmp_path / "a"), save(thinking, tmp_path / "b", max_shard_size="20KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    model, tokenizer = dami.load_pair(*paths)
    assert "second model" not in caplog.text
    assert not model.training
    assert tokenizer.get_vocab()["w8"] == 8
    dami.patch_model(instruct, thinking)
    mine, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, instruct))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    inputs = batch("left")
    assert torch.equal(model(**inputs, intensity=LAM).logits, instruct(**inputs, intensity=LAM).logits)


def test_dtype_and_chat_template_are_chosen(ends: tuple[Path, Path]) -> None:
    model, tokenizer = dami.load_pair(*ends, dtype=torch.bfloat16, chat_template="thinking")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert tokenizer.get_chat_template() == "T"
    _, tokenizer = dami.load_pair(str(ends[0]), str(ends[1]), attn_implementation="eager")
    assert tokenizer.get_chat_template() == "I"
    assert tokenizer.get_chat_template("thinking") == "T"
    with pytest.raises(ValueError, match="chat_template must be 'instruct' or 'thinking', got 'both'"):
        dami.load_pair(*ends, chat_template="both")  # type: ignore[arg-type]


def test_device_map_places_both_ends(ends: tuple[Path, Path]) -> None:
    model, _ = dami.load_pair(*ends, device_map={"": "cpu"})
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@torch.no_grad()
def test_a_pair_without_tokenizers(ends: tuple[Path, Path]) -> None:
    for path in ends:
        for file in path.glob("*token*"):
            file.unlink()
    _, tokenizer = dami.load_pair(*ends)
    assert tokenizer is None


@torch.no_grad()
def test_tied_heads_may_be_stored_or_not_and_base_models_without_their_prefix(tmp_path: Path) -> None:
    instruct, thinking = pair("gpt2")
    paths = save(instruct, tmp_path / "a"), save(thinking, tmp_path / "b")

    def as_first_published(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # a mask, once stored
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    edit_tensors(paths[1], as_first_published)
    model, _ = dami.load_pair(*paths)
    inputs = batch("left")
    assert torch.equal(
        model(**inputs, intensity=LAM).logits, dami.patch_model(instruct, thinking)(**inputs, intensity=LAM).logits
    )


@pytest.mark.parametrize("end", [0, 1], ids=["instruct", "thinking"])
@pytest.mark.parametrize("config", ["tied", "untied"])
@torch.no_grad()
def test_a_head_of_its_own_beside_a_tied_one(end: int, config: str, tmp_path: Path) -> None:
    """Loaded and packed, whether its config says so or only its files, which is what transformers goes by."""
    models = pair("qwen3")
    paths = [save(model, tmp_path / str(i)) for i, model in enumerate(models)]
    own = models[end].lm_head.weight + 0.1 * torch.randn_like(models[end].lm_head.weight)
    edit_tensors(paths[end], lambda tensors: tensors.update({"lm_head.weight": own}))
    if config == "untied":
        edit_config(paths[end], tie_word_embeddings=False)
    models[end].lm_head.weight = torch.nn.Parameter(own)
    inputs = batch("left")
    packed = dami.pack(*paths, tmp_path / "packed", "pair")
    for model in (dami.load_pair(*paths)[0], dami.load_pair(packed)[0]):
        for lam, plain in enumerate(models):
            logits = model(**inputs, intensity=float(lam)).logits
            torch.testing.assert_close(logits, plain(**inputs).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_end_that_is_not_in_safetensors_is_loaded_as_a_model(
    ends: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    expected = dami.load_pair(*ends)[0]
    for path in reversed(ends):
        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
        model, _ = dami.load_pair(*ends)
        inputs = batch("left")
        assert torch.equal(model(**inputs, intensity=LAM).logits, expected(**inputs, intensity=LAM).logits)


@pytest.mark.parametrize("end", [0, 1], ids=["instruct", "thinking"])
def test_what_is_pickled_is_never_run(end: int, ends: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(ends[end] / "model.safetensors")
    (ends[end] / "model.safetensors").unlink()
    torch.save({**tensors, "x": Harmful(tmp_path / "harm")}, ends[end] / "pytorch_model.bin")
    for run in (lambda: dami.load_pair(*ends), lambda: dami.pack(*ends, tmp_path / "packed")):
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            run()
    with pytest.raises(ValueError, match="weights_only must be True, got False: what is pickled in"):
        dami.load_pair(*ends, weights_only=False)
    assert not (tmp_path / "harm").exists()


def test_a_bin_in_several_files(ends: tuple[Path, Path], tmp_path: Path) -> None:
    expected = dami.load_pair(*ends)[0]
    for path in ends:
        tensors = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        names = {name: f"pytorch_model-{i % 3 + 1:05}-of-00003.bin" for i, name in enumerate(tensors)}
        for file in {*names.values()}:
            torch.save({name: tensors[name] for name in names if names[name] == file}, path / file)
        index = {"metadata": {"total_size": 0}, "weight_map": names}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    inputs = batch("left")
    for model in (dami.load_pair(*ends)[0], dami.load_pair(dami.pack(*ends, tmp_path / "packed", "pair"))[0]):
        with torch.no_grad():
            assert torch.equal(model(**inputs, intensity=LAM).logits, expected(**inputs, intensity=LAM).logits)


def test_everything_that_does_not_match_is_reported_at_once(
    ends: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    instruct, thinking = ends
    other, _ = pair("llama")
    save(other, thinking, words=7)
    edit_config(
        thinking, rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 5.0}, pad_token_id=5
    )

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = torch.zeros(25)

    edit_tensors(thinking, edit)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_: pytest.fail("read weights"))
    with pytest.raises(ValueError, match="do not match") as caught:
        dami.load_pair(instruct, thinking)
    assert str(caught.value).split("\n  ") == [
        f"{instruct} and {thinking} do not match:",
        "rotary embedding: rope_theta 10000.0 in the instruct end, 5.0 in the thinking end; a row at λ has one rota"
        'tion: choose whose, rope="instruct" or rope="thinking", and measure',
        "config.rms_norm_eps: 1e-06 in the instruct end, 0.001 in the thinking end; take ends that were trained "
        "from one model",
        "tokenizer: 2 tokens have another id or are in one vocabulary only, such as ['w7', 'w8']; take ends of one "
        "tokenizer: a row of weights is one token",
        "model.layers.0.mlp.up_proj.weight: in the instruct end only",
        "model.norm.weight: float32 [24] in the instruct end, float32 [25] in the thinking end; take ends that were "
        "trained from one model",
    ]


def test_another_architecture_is_named_alone(ends: tuple[Path, Path], tmp_path: Path) -> None:
    other = save(pair("gpt2")[0], tmp_path / "other")
    with pytest.raises(ValueError, match="do not match") as caught:
        dami.load_pair(ends[0], other)
    assert str(caught.value).split("\n  ")[1:] == [
        "config.model_type: 'llama' in the instruct end, 'gpt2' in the thinking end; take ends that were trained "
        "from one model"
    ]


@pytest.mark.parametrize("named", ["model.fp16.safetensors", "consolidated.safetensors", None])
def test_an_end_without_weights_is_told_before_any_is_loaded(named: str | None, ends: tuple[Path, Path]) -> None:
    weights = ends[1] / "model.safetensors"
    weights.rename(ends[1] / named) if named else weights.unlink()
    told = "weights: no model.safetensors or pytorch_model.bin in the thinking end; put its weights there under"
    with pytest.raises(ValueError, match=re.escape(told)):
        dami.load_pair(*ends)
    assert not preview(*map(Checkpoint.find, ends)).is_pair


@pytest.mark.parametrize(
    ("folder", "files", "found"),
    [
        ("", ["pytorch_model.bin"], True),
        ("", ["tf_model.h5"], False),
        ("a", ["a/pytorch_model-1.bin"], True),
        ("a", ["pytorch_model.bin"], False),
    ],
)
def test_a_bin_that_stays_on_the_hub_counts_as_weights(
    folder: str, files: list[str], found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dami.loading.remote.list_repo_files", lambda *_, **__: files)
    remote = RemoteCheckpoint(tmp_path, "x/y", download={"revision": "main"}, repository="x/y", subfolder=folder)
    vars(remote)["_files"] = {}  # of safetensors files there is none
    assert remote.has_weights() == found


def test_what_both_ends_lack_is_not_left_at_random(ends: tuple[Path, Path]) -> None:
    for path in ends:
        edit_tensors(path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"instruct lacks 1 tensors: \['model\.norm\.weight'\]"):
        dami.load_pair(*ends)


@pytest.mark.parametrize("end", [0, 1], ids=["instruct", "thinking"])
def test_damaged_checkpoints_are_named(end: int, tmp_path: Path) -> None:
    models = pair("llama")
    paths = [save(model, tmp_path / str(i), max_shard_size="20KB") for i, model in enumerate(models)]
    shards = sorted(paths[end].glob("*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    shards[2].write_bytes(b"\0" * 100)
    index = paths[end] / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.more"] = shards[-1].name
    index.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=f"the checkpoint {re.escape(str(paths[end]))} is damaged") as caught:
        dami.load_pair(*paths)
    faults = sorted(str(caught.value).split("\n  ")[1:])
    assert len(faults) == 4
    assert f"{shards[0]} is missing, the index names it" in faults
    assert any(fault.startswith(f"{shards[1]} is corrupt: ") for fault in faults)
    assert any(fault.startswith(f"{shards[2]} is corrupt: ") for fault in faults)
    assert f"{shards[-1]} lacks ['model.more'], which the index promises" in faults


def test_a_directory_that_does_not_exist(ends: tuple[Path, Path], tmp_path: Path) -> None:
    for source in (tmp_path / "nowhere", "./nowhere", "a/b/c", "model.gguf"):
        with pytest.raises(OSError, match=f"there is no checkpoint {source}"):
            dami.load_pair(ends[0], source)


@pytest.mark.parametrize("legacy", [False, True], ids=["safetensors", "legacy"])
def test_hub_names_are_downloaded_once_and_only_what_is_needed(
    ends: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    if legacy:
        for path in ends:
            torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
            (path / "model.safetensors").unlink()
    asked: list[tuple[str, bool]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        wanted = {p: any(fnmatch.fnmatch(p, q) for q in allow_patterns) for p in HUB_FILES}
        assert not wanted["consolidated.safetensors"]
        asked.append((name, wanted["pytorch_model-00001-of-00002.bin"]))
        assert wanted["pytorch_model.bin"] or wanted["model-00001-of-00002.safetensors"]
        return str(ends[name == "someone/thinking"])

    monkeypatch.setattr("dami.loading.checkpoint.snapshot_download", download)
    model, _ = dami.load_pair("someone/instruct", "someone/thinking")
    assert hasattr(model.lm_head, "weight_target")
    each = [False, True] if legacy else [False]
    assert asked == [(f"someone/{end}", bins) for end in ("instruct", "thinking") for bins in each]


def stand_in(ends: tuple[Path, Path], asked: list[tuple[str, dict[str, Any]]]) -> Callable[..., str]:
    """For huggingface_hub's download: the directories of two ends, and a record of what was asked."""

    def download(name: str, allow_patterns: list[str], **options: Any) -> str:
        asked.append((name, options))
        return str(ends[name == "someone/thinking"])

    return download


@pytest.mark.parametrize("legacy", [False, True], ids=["safetensors", "legacy"])
def test_options_reach_every_download(
    ends: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    if legacy:
        for path in ends:
            torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
            (path / "model.safetensors").unlink()
    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr("dami.loading.checkpoint.snapshot_download", stand_in(ends, asked))
    options = {"token": "hf_secret", "cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    names = [f"someone/{end}" for end in ("instruct", "thinking")]
    times = 2 if legacy else 1  # once more for what is not in safetensors

    def expected(*revisions: str) -> list[tuple[str, dict[str, Any]]]:
        each = zip(names, revisions, strict=True)
        return [(name, {**options, "revision": revision}) for name, revision in each for _ in range(times)]

    dami.load_pair(*names, revision="v1", **options)
    assert asked == expected("v1", "v1")
    asked.clear()
    dami.load_pair(*names, revision=("v1", "v2"), **options)
    assert asked == expected("v1", "v2")
    asked.clear()
    dami.pack(*names, tmp_path / "packed", "pair", revision=("v1", "v2"), **options)
    assert asked == expected("v1", "v2") * (2 if legacy else 1)  # what is packed by loading is found again
    packed = tmp_path / "packed", tmp_path / "packed"
    asked.clear()
    monkeypatch.setattr("dami.loading.checkpoint.snapshot_download", stand_in(packed, asked))
    dami.load_pair("someone/packed", revision="v3", **options)
    assert asked == [("someone/packed", {**options, "revision": "v3"})]


def test_options_reach_the_files_that_a_config_names_elsewhere(
    ends: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code in another repository is downloaded with the same token, from the same cache, at its own revision."""
    asked: dict[str, Any] = {}

    def config(directory: Path, **options: Any) -> Any:
        asked.update(options)
        raise OSError("asked")

    monkeypatch.setattr("dami.loading.checkpoint.AutoConfig.from_pretrained", config)
    with pytest.raises(OSError, match="asked"):
        dami.load_pair(*ends, trust_remote_code=True, token="hf_secret", revision="v1", cache_dir="cache")
    assert asked == {"trust_remote_code": True, "token": "hf_secret", "cache_dir": "cache"}


@pytest.mark.parametrize(
    "option",
    ["revison", "thinking_revison", "variant", "torch_dtype", "use_auth_token", "quantization_config", "config"],
)
def test_an_unknown_option_is_refused(ends: tuple[Path, Path], option: str) -> None:
    with pytest.raises(TypeError, match=rf"options must be settings of the config, or of .*, got \['{option}'\]"):
        dami.load_pair(*ends, **{option: "x"})
    with pytest.raises(TypeError, match=rf"options must be of \['revision', .* after thinking_, got \['{option}'\]"):
        dami.pack(*ends, ends[0].parent / "packed", **{option: "x"})


def test_an_unknown_option_gets_a_guess(ends: tuple[Path, Path]) -> None:
    with pytest.raises(TypeError, match=r"got \['torch_dtype'\]; torch_dtype may mean dtype; those of checkpoints"):
        dami.load_pair(*ends, torch_dtype="auto")


def test_a_setting_of_the_config_is_an_option(ends: tuple[Path, Path]) -> None:
    assert dami.load_pair(*ends, use_cache=False)[0].config.use_cache is False


def test_revisions_are_one_or_two(ends: tuple[Path, Path]) -> None:
    for args, revision in ((ends, ("a", "b", "c")), (ends[:1], ("a", "b"))):
        with pytest.raises(TypeError, match="revision must be one, or a pair for a pair of checkpoints, got"):
            dami.load_pair(*args, revision=revision)


def test_an_option_of_the_thinking_end_needs_one(ends: tuple[Path, Path], tmp_path: Path) -> None:
    packed = dami.pack(*ends, tmp_path / "packed")
    with pytest.raises(TypeError, match="thinking_revision is for two checkpoints, got a packed pair: leave it out"):
        dami.load_pair(packed, thinking_revision="v2")


def test_each_end_has_its_own_options(ends: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr("dami.loading.checkpoint.snapshot_download", stand_in(ends, asked))
    trusted = []
    tokenizer = "dami.loading.checkpoint.AutoTokenizer.from_pretrained"
    monkeypatch.setattr(tokenizer, lambda directory, **options: trusted.append(options["trust_remote_code"]))
    model, _ = dami.load_pair(
        *("someone/instruct", "someone/thinking"),
        **{"revision": "v1", "token": "a", "thinking_token": "b", "cache_dir": "c", "thinking_cache_dir": None},
        **{"trust_remote_code": True, "thinking_trust_remote_code": False, "thinking_local_files_only": True},
    )
    assert asked == [
        ("someone/instruct", {"revision": "v1", "token": "a", "cache_dir": "c"}),
        ("someone/thinking", {"revision": "v1", "token": "b", "cache_dir": None, "local_files_only": True}),
    ]
    assert trusted == [True, False]
    assert model.lm_head.weight_target is not None


def test_both_ends_in_folders_of_one_directory(ends: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    for end in ends:
        end.rename(tmp_path / "both" / end.name)
    where, folders = tmp_path / "both", {"subfolder": "instruct", "thinking_subfolder": "thinking"}
    model, tokenizer = dami.load_pair(where, where, **folders)
    assert tokenizer.get_chat_template("thinking") == "T"
    packed, _ = dami.load_pair(dami.pack(where, where, tmp_path / "out" / "packed", "pair", **folders))
    again, _ = dami.load_pair(tmp_path / "out", subfolder="packed")
    inputs = batch("left")
    with torch.no_grad():
        logits = [each(**inputs, intensity=LAM).logits for each in (model, packed, again)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    with pytest.raises(OSError, match=r"both/nowhere is no checkpoint: it has no config\.json"):
        dami.load_pair(where, where, subfolder="instruct", thinking_subfolder="nowhere")


def test_a_folder_on_the_hub_is_downloaded_alone(ends: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, set[str]]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, {pattern.rpartition("/")[0] for pattern in allow_patterns}))
        return str(ends[0].parent)

    monkeypatch.setattr("dami.loading.checkpoint.snapshot_download", download)
    dami.load_pair("someone/pair", "someone/pair", subfolder="instruct", thinking_subfolder="thinking")
    assert asked == [("someone/pair", {f, f"{f}/intensity"}) for f in ("instruct", "thinking")]
    with pytest.raises(OSError, match="there is no checkpoint someone/pair/other"):
        dami.load_pair("someone/pair", "someone/pair", subfolder="other")


def test_a_tensor_that_cannot_be_interpolated_stops_the_load(
    ends: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dami.layers.obstacles.FLOAT_DTYPES", ())
    with pytest.raises(
        ValueError, match=r"cannot be interpolated:\n  lm_head \(Linear\): weight, as float32\n  model.embed_tokens"
    ):
        dami.load_pair(*ends)


MEASURE = """
import json, re, sys, torch, dami
torch.set_num_threads(1)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
dami.load_pair(sys.argv[3], sys.argv[4])
before = peak()
model, _ = dami.load_pair(sys.argv[1], sys.argv[2])
loaded = peak() - before
model.generate(torch.arange(3, 35).view(4, 8), intensity=[0.0, 0.3, 0.6, 1.0], max_new_tokens=4)
print(json.dumps({"stored": dami.describe(model).nbytes, "loaded": loaded, "used": peak() - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_third_copy_at_any_time(ends: tuple[Path, Path], tmp_path: Path) -> None:
    """Peak resident memory of loading and running a pair, in a process of its own, against the bytes of both ends."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=4000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=6)
    torch.manual_seed(0)
    big = LlamaForCausalLM(config).bfloat16()
    for name in ("a", "b"):
        for parameter in big.parameters():
            parameter.data += 0.01
        big.save_pretrained(tmp_path / name, max_shard_size="50MB")
    command = [sys.executable, "-c", MEASURE, *map(str, (tmp_path / "a", tmp_path / "b", *ends))]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["stored"] > 150e6
    assert measured["loaded"] < 1.25 * measured["stored"], measured  # a third copy would make it 1.5
    assert measured["used"] < 1.25 * measured["stored"], measured
