"""Takes vLLM's modules away, one by one, and calls the plugin as vLLM would: python -m tests.dami.serving.vllm.moved

A line for each: "refused" if the plugin came back and a pair would be refused by name, else what happened.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from pathlib import Path

import dami
import dami.loading.quantizer
from vllm.model_executor.layers.quantization import get_quantization_config

PLUGIN = Path(dami.__file__).parent / "serving" / "vllm"


def imported() -> list[str]:
    """The modules of vLLM that the plugin's files name."""
    found = set()
    for file in PLUGIN.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                found.add(node.module)
    return sorted(found)


def without(module: str) -> str:
    sys.modules[module] = None  # type: ignore[assignment]
    from dami.serving.vllm import register

    try:
        register()
        register()  # as in a process that loads its plugins again
    except BaseException as error:
        return f"register() raised {type(error).__name__}: {error}"
    try:
        get_quantization_config("dami").from_config({"interpolated": {}})
    except RuntimeError as error:
        last = module.rpartition(".")[2]
        return "refused" if last in str(error) else f"the refusal does not name it: {error}"
    except ValueError as error:  # vLLM's own, where the registry itself is gone
        return "refused" if "quantization" in module else f"{error}"
    return "a pair would be served"


for module in imported():  # as vLLM would have, wherever it is now
    importlib.import_module(module)
get_quantization_config("fp8")  # imports all that vLLM's own methods want
for module in imported():
    if os.fork() == 0:
        print(f"{module}: {without(module)}", flush=True)
        os._exit(0)
    os.wait()
