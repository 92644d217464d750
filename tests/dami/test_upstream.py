"""transformers' own tests, of its models and of generation, over patched pairs, and what is known to differ.

None of their code is ours: the environment variable TRANSFORMERS_SOURCE names a checkout of transformers, whose tests
run with its own src/; CONTRIBUTING.md tells how. The tests of an architecture run over plain models first, then over
pairs at one λ, and with another in each row. What plain models pass, pairs pass, but for the lines of DIFFERENT.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

SOURCE = Path(os.environ.get("TRANSFORMERS_SOURCE", "nowhere")).resolve()
REPOSITORY = Path(__file__).parents[2]
ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "gemma2", "gpt2"),
    *("mixtral", "qwen3_moe", "gpt_oss", "mamba2", "falcon_mamba"),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SOURCE / "tests/test_modeling_common.py").exists(),
        reason="TRANSFORMERS_SOURCE must name a checkout of transformers, with its src/ and tests/",
    ),
]

# whose models other processes build, or which want a network
ELSEWHERE = "not Integration and not fsdp and not tp_ and not ep_ and not tensor_parallel and not expert_parallel"

FROZEN = "all parameters of a pair are frozen: λ and adapters have gradients"
BY_PLACE = "a row that comes again in another place of a mixed batch, or by another way, has another λ"
TWO_ENDS = "a pair has two ends of each parameter, and its files name both"
# of each difference: names of tests, what they fail with, why, and "mixed" if no other batches differ
DIFFERENT = [
    (
        r"test_training.*|test_gpt2_.*",
        r"does not require grad|requires grad, but the ends are frozen",
        FROZEN,
        "",
    ),
    (r"test_enable_input_require_grads_.*", r"No model with a differentiable loss", FROZEN, ""),
    (r"test_retain_grad_.*", r"can't retain_grad on Tensor that has requires_grad=False", FROZEN, ""),
    (
        r"test_resize_.*",
        r"new_num_tokens must be \d+, as many as both ends",
        "both models are resized before patching",
        "",
    ),
    (
        r"test_can_init_all_missing_weights|test_from_pretrained_no_checkpoint|test_reverse_loading_mapping",
        r"_target",
        TWO_ENDS,
        "",
    ),
    (
        r"test_model_weights_reload_no_missing_tied_weights",
        r"the packed pair does not fit its model",
        "half a pair is no pair: an end that is missing is not initialised",
        "",
    ),
    (
        r"test_load_contiguous_weights",
        r"False is not true",
        "the weights of a Conv1D, and of experts stored as GPT-OSS has them, lie transposed in memory while patched",
        "",
    ),
    (
        r"test_eager_matches_batched_and_grouped_inference.*",
        r"Expected 'mock' to have been called",
        "experts of a pair are computed by a kernel of ours, whatever experts_implementation says",
        "",
    ),
    (
        r"test_inputs_embeds_matches_input_ids.*|test_generate_(continue_)?from_inputs_embeds.*",
        r"not close|Lists differ|not similar enough",
        "embeddings looked up outside a pass are those of λ=0: look them up inside `with dami.intensity(model, …)`",
        "",
    ),
    (r"test_.*_padding_matches_padding_free_with_position_ids", r"not close", BY_PLACE, "mixed"),
    (
        r"test_batching_equivalence|test_left_padding_compatibility",
        r"not close|Batched and Single row",
        BY_PLACE,
        "mixed",
    ),
    (
        r"test_generate_compile_model_forward_fullgraph",
        r"_make_wrapper_subclass",
        "torch.compile does not trace a parameter that is no operator's and has one λ per row: a Tensor subclass",
        "mixed",
    ),
]


@cache
def outcomes(architecture: str, lam: str, folder: Path) -> dict[str, list[str]]:
    """The tests of an architecture, each with how it and its subtests ended that did not pass."""
    report = folder / f"{architecture}-{lam}.xml"
    paths = [SOURCE / "src", Path(__file__).parent, REPOSITORY / "python", REPOSITORY]
    options = f"-q -n 0 -p upstream_plugin -p no:cacheprovider -W ignore -o log_cli=0 --junitxml={report}".split()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", *options, "-k", ELSEWHERE),
            f"tests/models/{architecture}/test_modeling_{architecture}.py",
        ],
        cwd=SOURCE,
        env=os.environ
        | {
            "DAMI_UPSTREAM": lam,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1):  # of pytest: all passed, or some failed
        raise RuntimeError(f"transformers' tests of {architecture} do not run:\n{(done.stdout + done.stderr)[-2000:]}")
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        ends = [f"{end.tag}: {end.get('message')}" for end in case if end.tag in ("failure", "error", "skipped")]
        found.setdefault(case.attrib["name"], []).extend(ends)
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("upstream")


@pytest.mark.parametrize("lam", ["0.0", "0.5", "1.0", "mixed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pair_passes_what_its_models_pass(architecture: str, lam: str, folder: Path) -> None:
    plain, pairs = outcomes(architecture, "plain", folder), outcomes(architecture, lam, folder)
    assert sum(not ends for ends in plain.values()) > 50
    unexpected = [
        f"{name}: {end[:500]}"
        for name, ends in plain.items()
        if all(end.startswith("skipped") for end in ends)
        for end in pairs.get(name, ["missing"])
        if end not in ends
        and not any(
            re.fullmatch(names, name) and re.search(words, end) and only in ("", lam)
            for names, words, _, only in DIFFERENT
        )
    ]
    assert not unexpected, f"transformers {version()}:\n" + "\n".join(unexpected)


@pytest.mark.parametrize(("names", "words"), [line[:2] for line in DIFFERENT])
def test_what_is_listed_is_different(names: str, words: str, folder: Path) -> None:
    """In one architecture at least."""
    found = [
        (name, end) for each in ARCHITECTURES for name, ends in outcomes(each, "mixed", folder).items() for end in ends
    ]
    assert any(re.fullmatch(names, name) and re.search(words, end) for name, end in found)


def version() -> str:
    """Of the checkout."""
    text = (SOURCE / "src/transformers/__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.*)"', text, re.MULTILINE)
    assert found is not None
    return found[1]
