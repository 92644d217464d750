"""What the plugin checks before it serves: vLLM itself, its options, the files, and the model it has loaded."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from itertools import starmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dami_kernels.upstream import Place
from tests.dami.serving.vllm import pairs
from tests.dami.serving.vllm.engines import engine
from tests.moving import break_place, ways

vllm = pytest.importorskip("vllm")

from dami.serving.vllm import register, support  # noqa: E402
from dami.serving.vllm.offers import Offer  # noqa: E402
from dami.serving.vllm.settings import PairSettings, check_arguments  # noqa: E402


def test_this_vllm_fits() -> None:
    assert support.FAULTS == []


BROKEN = [(place, way) for place in starmap(Place, support.RELIED_ON.items()) for way in ways(place)]


@pytest.mark.parametrize(("place", "way"), BROKEN)
def test_what_has_moved_is_named(place: Place, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = break_place(monkeypatch, place, way)
    assert said in "\n".join(support.faults())


def test_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        support,
        "RELIED_ON",
        {
            "vllm.no_such_module:x": (),
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner.no_such": (),
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs": ("self", "no_such_parameter"),
            "vllm.v1.core.sched.output:NewRequestData": ("no_such_field", "sampling_params"),
        },
    )
    module, method, parameter, field = support.faults()
    assert module == "has no vllm.no_such_module:x: No module named 'vllm.no_such_module'"
    assert "has no attribute 'no_such'" in method
    assert re.match(
        "has no no_such_parameter in .*GPUModelRunner._prepare_inputs, but self, scheduler_output", parameter
    )
    assert re.match("has no no_such_field in .*NewRequestData, but", field)


def test_another_vllm_serves_no_pair_and_all_else(packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register()  # for the tests that come after
    monkeypatch.setattr(support, "FAULTS", ["has no vllm.somewhere:something"])
    register()  # does nothing, and raises nothing
    with (
        pytest.raises(
            Exception, match=r"dami's plugin fits vLLM 0.32 and 0.33, and this is vllm.*, which\n  has no .*something"
        ),
        engine(packed("qwen3", "int8")),
    ):
        pass


def test_a_module_that_has_moved_breaks_no_other_model() -> None:
    """Each module of vLLM that the plugin imports anywhere, in turn: vLLM is loaded, and then the module is gone."""
    done = subprocess.run([sys.executable, "-m", "tests.dami.serving.vllm.moved"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    tried = done.stdout.splitlines()
    assert len(tried) > 20
    assert not [line for line in tried if not line.endswith(": refused")], done.stdout


def test_the_loader_is_registered_without_a_warning_for_models_that_are_no_pairs() -> None:
    from dami.serving.vllm import loader
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    told: list[logging.LogRecord] = []
    log, handler = logging.getLogger("vllm.model_executor.model_loader"), logging.Handler(logging.WARNING)
    handler.emit = told.append  # type: ignore[method-assign]
    level = log.level
    log.addHandler(handler)
    try:
        loader.install.__wrapped__()
    finally:
        log.removeHandler(handler)
    assert (told, log.level) == ([], level)
    for load_format in loader.LOAD_FORMATS:
        assert type(get_model_loader(LoadConfig(load_format=load_format))) is loader.PairLoader


def test_a_plugin_that_cannot_be_imported_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("dami.serving.vllm.support")
    monkeypatch.setitem(sys.modules, "dami.serving.vllm.support", None)
    said = "vLLM goes on without dami's plugin, which could not be imported: ModuleNotFoundError: "
    with pytest.warns(RuntimeWarning, match=said):
        register()


def test_arguments_of_processors_of_the_user_s_are_theirs() -> None:
    check_arguments(["intensity", "kv_transfer_params"], others_may_read=False)
    check_arguments(["their_own"], others_may_read=True)
    for name, others_may_read in (("their_own", False), ("intensty", True)):
        with pytest.raises(ValueError, match=f"must be intensity, .* got '{name}'"):
            check_arguments([name], others_may_read)


def config(**changed: Any) -> Any:
    """As much of a config as is checked, with some of it changed: `parallel_config__pipeline_parallel_size=2`."""
    made = SimpleNamespace(
        model_config=SimpleNamespace(
            runner_type="generate",
            is_moe=True,
            use_mla=False,
            is_hybrid=False,
            enable_prompt_embeds=False,
            head_dtype=torch.float32,
            dtype=torch.float32,
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            data_parallel_size=1,
            use_sequence_parallel_moe=False,
            enable_eplb=False,
            use_ubatching=False,
            enable_batch_sharded_sampling=False,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        speculative_config=None,
        lora_config=None,
    )
    for path, value in changed.items():
        *parents, name = path.split("__")
        owner = made
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)
    return made


def test_plain_options_pass() -> None:
    support.check_features(config())
    support.check_features(config(speculative_config=SimpleNamespace(method="ngram")))
    support.check_features(config(model_config__is_moe=False, lora_config=object()))
    support.check_features(config(model_config__is_moe=False, parallel_config__data_parallel_size=2))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model_config__runner_type": "pooling"}, "the runner pooling"),
        ({"model_config__enable_prompt_embeds": True}, "prompt embeddings"),
        ({"model_config__head_dtype": torch.float64}, "an output layer in torch.float64"),
        ({"lora_config": object()}, "LoRA for a model with experts"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "speculation by eagle3"),
        ({"speculative_config": SimpleNamespace(method="mtp")}, "speculation by mtp"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config__data_parallel_size": 2}, "data-parallel experts"),
        ({"parallel_config__use_sequence_parallel_moe": True}, "sequence-parallel experts"),
        ({"parallel_config__enable_eplb": True}, "EPLB"),
        ({"parallel_config__use_ubatching": True}, "DBO"),
        ({"parallel_config__enable_batch_sharded_sampling": True}, "batch-sharded sampling"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "fast prefill by shared KV"),
    ],
)
def test_what_is_not_supported_is_named(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"a pair in vLLM does not support .*{named}"):
        support.check_features(config(**changed))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"thinking": 3}, "thinking must be a directory or a hub name, got 3"),
        ({"thinking": "x", "thinking_revision": 3}, "thinking_revision must be a branch, tag or commit, got 3"),
        ({"thinking_revision": "main"}, "thinking_revision is of an end: give it together with thinking only"),
        ({"thinking": "x", "format": "int3"}, "format must be one of"),
        ({"format": "int4"}, "format is a packed pair's own"),
        ({"intensity_range": [0, "1"]}, "intensity_range must be two finite numbers"),
        ({"intensity_range": [1, 0]}, "intensity_range must be two finite numbers"),
        ({"intensity_range": 1}, "intensity_range must be two finite numbers"),
        ({"default_intensity": 3}, "default_intensity must be a number from -1 to 2, a preset or 'auto', got 3"),
        ({"prompt_intensity": None}, "prompt_intensity must be a number from -1 to 2, a preset or 'same', got None"),
        ({"prompt_tail": -1}, "prompt_tail must be an integer of at least 0, or 'turn', got -1"),
        ({"prompt_tail": "turns"}, "prompt_tail must be an integer of at least 0, or 'turn', got 'turns'"),
    ],
)
def test_settings_that_are_wrong(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairSettings.of(extra)


def test_a_tied_output_layer_has_its_format_under_another_name_too(packed: Any) -> None:
    """As inside a model of text and images, where vLLM gives it a prefix. It is not stored."""
    from dami.loading.checkpoint import headers_in
    from dami.serving.vllm.files import PackedFiles, Spelling
    from dami.serving.vllm.quantization import PairQuantization
    from transformers import AutoConfig
    from vllm.model_executor.models.utils import WeightsMapper

    directory = packed("qwen3", "int8")
    config = AutoConfig.from_pretrained(directory)
    pair = PairQuantization(config.quantization_config["interpolated"])
    stored = {name: (file, each) for file in directory.glob("*.safetensors") for name, each in headers_in(file).items()}
    assert not any(name.startswith("lm_head") for name in stored)
    PackedFiles(stored, pair, {"lm_head.weight"}, Spelling(config))
    pair.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"lm_head.": "language_model.lm_head."}))
    assert pair.interpolated_as("language_model.lm_head.weight") == "int8"


@pytest.mark.parametrize(("own", "wanted"), [({}, "v1"), ({"thinking_revision": "v2"}, "v2")])
def test_both_ends_have_a_revision(own: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thinking end's is vLLM's own, if it is not named."""
    from dami.serving.vllm.loader import PairLoader

    looked_up = []

    def find(self: PairLoader, source: str, revision: str | None) -> dict[str, Any]:
        looked_up.append((source, revision))
        if source == "T":
            raise FileNotFoundError
        return {}

    monkeypatch.setattr(PairLoader, "_find", find)
    config: Any = SimpleNamespace(model="I", revision="v1", hf_config=SimpleNamespace(tie_word_embeddings=False))
    pair: Any = SimpleNamespace(interpolated=None, settings=PairSettings.of({"thinking": "T"} | own))
    with pytest.raises(FileNotFoundError):
        PairLoader._checked_files(object.__new__(PairLoader), config, pair)
    assert looked_up == [("I", "v1"), ("T", wanted)]


def test_one_intensity_has_one_key() -> None:
    checked = Offer(PairSettings()).lam
    for number in (0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5)):  # whatever else is a number in dami
        assert checked(number) == 0.5
    assert checked(torch.tensor(1)) == checked(np.int64(1)) == 1.0
    assert checked(0.1) == checked(float(torch.tensor(0.1)))  # as the kernels take it
    assert str(checked(-0.0)) == "0.0"


def test_ends_that_do_not_match(ends: Any) -> None:
    with (
        pytest.raises(
            Exception, match=r"do not match:\n(.|\n)*config.model_type: 'qwen3' in the instruct end, 'llama'"
        ),
        engine(ends("qwen3")[0], ends("llama")[1]),
    ):
        pass


def test_an_end_that_is_missing(ends: Any, packed: Any) -> None:
    with (
        pytest.raises(Exception, match="must name the λ=1 end, got None"),
        engine(ends("qwen3")[0], quantization="dami"),
    ):
        pass
    with (
        pytest.raises(Exception, match="need a pair: --quantization dami"),
        engine(ends("qwen3")[0], default_intensity=0.5),
    ):
        pass
    with (
        pytest.raises(Exception, match="must be left out of a packed pair"),
        engine(packed("qwen3", "int8"), ends("qwen3")[1]),
    ):
        pass


def test_a_tensor_that_is_missing(packed: Any, tmp_path: Path) -> None:
    shutil.copytree(packed("qwen3", "int8"), tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight_delta_scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"pair lacks model.layers.1.mlp.up_proj.weight_delta_scale$"), engine(tmp_path):
        pass


def test_an_attention_that_the_self_test_does_not_know_is_refused(packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSeek's (MLA): it stands beside vLLM's ordinary one, and without a cache gives zeros."""
    from vllm.model_executor.layers.attention import Attention

    class OtherAttention(Attention):
        def forward(self, query: Any, *rest: Any, **options: Any) -> Any:
            return torch.zeros_like(query)

    monkeypatch.setattr("vllm.model_executor.models.qwen3.Attention", OtherAttention)
    with (
        pytest.raises(
            Exception, match=r"model\.layers\.0\.self_attn\.attn is a OtherAttention, an attention of a kind"
        ),
        engine(packed("qwen3", "int8")),
    ):
        pass


@pytest.mark.parametrize("base", ["MLAAttention", "MambaMixer2"])
def test_the_self_test_knows_every_attention_of_vllm(base: str) -> None:
    from vllm.model_executor.layers.attention import Attention, MLAAttention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

    kind = {"MLAAttention": MLAAttention, "MambaMixer2": MambaMixer2}[base]
    assert issubclass(kind, AttentionLayerBase)
    assert kind.forward is not Attention.forward


def test_a_plain_model_is_served_as_ever(ends: Any) -> None:
    from vllm import SamplingParams

    prompts = pairs.prompts_of(5, 9)
    instruct = ends("qwen3")[0]
    model = pairs.AutoModelForCausalLM.from_pretrained(instruct)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, extra_args={"intensity": 7})
    with engine(instruct) as llm:
        found = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        assert [list(o.outputs[0].token_ids) for o in found] == [pairs.answer(model, prompt, 8) for prompt in prompts]


def test_parameters_are_called_as_on_the_hub() -> None:
    from dami.serving.vllm.files import Spelling

    up = torch.randn(3, 10, 4)
    gates, values = up.chunk(2, 1)
    spelling = Spelling(pairs.FAMILIES["mixtral"]())
    found = dict(spelling.parts("model.layers.0.mlp.experts.gate_up_proj", up))
    assert len(found) == 6
    for number in range(3):
        expert = f"model.layers.0.block_sparse_moe.experts.{number}"
        assert torch.equal(found[f"{expert}.w1.weight"], gates[number])
        assert torch.equal(found[f"{expert}.w3.weight"], values[number])
    assert spelling.names("model.layers.0.mlp.gate.weight", 3) == ["model.layers.0.block_sparse_moe.gate.weight"]
    within = Spelling(pairs.FAMILIES["qwen3_vl_moe"]())  # whose experts are stored transposed
    assert within.names("model.language_model.layers.0.mlp.experts.gate_up_proj", 1) == [
        f"model.language_model.layers.0.mlp.experts.0.{part}_proj.weight" for part in ("gate", "up")
    ]
    assert Spelling(pairs.FAMILIES["qwen3"]()).names("model.norm.weight", 64) == ["model.norm.weight"]


@pytest.mark.parametrize(("centred", "offset"), [(False, 0.0), (False, 1.0), (True, 0.0)])
def test_a_norm_is_known_by_what_it_computes(centred: bool, offset: float) -> None:
    from dami.serving.vllm import norms

    class Norm(torch.nn.Module):
        def __init__(self, shift: float = 0.0) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(48))
            self.epsilon, self.shift = 1e-5, shift

        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = x + residual
            return norms.normed(x, self.weight, None, centred, self.epsilon, offset) + self.shift, x

    class Alone(Norm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x, torch.zeros_like(x))[0]

    class Gated(Alone):
        def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x) * (1 if z is None else z.sigmoid())

    found = {"centred": centred, "eps": 1e-5, "offset": offset}
    with torch.no_grad():
        assert norms.fit(Alone()) == {**found, "second": None, "returns": 1}
        assert norms.fit(Gated()) == {**found, "second": "sigmoid", "returns": 1}
        assert norms.fit(Alone(shift=1.0)) is None
        assert norms.fit(Norm()) is None  # which wants a residual always
