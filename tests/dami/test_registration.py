"""Packed pairs become known to transformers, and transformers is imported whatever state dami is in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BREAK = """
import sys, warnings
from importlib.abc import MetaPathFinder

class Broken(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "dami.layers.kinds":
            raise AttributeError("torch has no attribute 'float5'")

sys.meta_path.insert(0, Broken())
warnings.simplefilter("always")
"""
DAMI_FIRST = "import dami\nimport transformers\nfrom transformers import AutoModelForCausalLM as Auto\n"
TRANSFORMERS_FIRST = "import transformers\nfrom transformers import AutoModelForCausalLM as Auto\nimport dami\n"
USE = """
from transformers import LlamaConfig
small = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
print(Auto.from_config(small).num_parameters())
try:
    dami.load_pair("nowhere")
except AttributeError as error:
    print(error)
"""
ALONE = """
import importlib, os, sys, torch, dami
for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        importlib.import_module(module)
        from transformers.quantizers import auto
        known = [auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING]
        print(module, *("dami" in names for names in known), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("imports", [DAMI_FIRST, TRANSFORMERS_FIRST], ids=["dami first", "transformers first"])
def test_a_broken_dami_leaves_transformers_whole_and_says_so(imports: str) -> None:
    done = run(BREAK + imports + USE)
    parameters, told = done.stdout.splitlines()
    assert int(parameters) > 100
    assert told == "torch has no attribute 'float5'"
    warned = "RuntimeWarning: dami could not make packed pairs known to transformers, which goes on without them: "
    assert done.stderr.count(f"{warned}AttributeError: torch has no attribute 'float5'") == 1


def test_any_module_that_the_quantizer_needs_can_be_the_first() -> None:
    """It is then half imported while it has transformers imported, and that the quantizer."""
    modules = ["dami.saving.config", "dami.layers.kinds", "dami.patching.compare", "dami.loading.quantizer"]
    done = run(ALONE, *modules)
    assert done.stdout.splitlines() == [f"{module} True True" for module in modules], done.stderr
