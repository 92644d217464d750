"""Engines for tests: the least that vLLM starts with, and what to ask of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.dami.serving.vllm.pairs import LAMS, merged

OPTIONS = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
    "max_model_len": 128,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 8,
    "block_size": 32,
    "enable_prefix_caching": False,
    "attention_backend": "CPU_MLA",  # of models with MLA: vLLM's own choice on CPUs with AMX takes bfloat16 only
}


def _options(thinking: Path | None, format: str | None, options: dict[str, Any]) -> dict[str, Any]:
    own = ("default_intensity", "intensity_range", "prompt_intensity", "prompt_tail")
    extra = {key: options.pop(key) for key in own if key in options}
    if thinking is not None:
        options["quantization"] = "dami"
        extra |= {"thinking": str(thinking)} | ({"format": format} if format else {})
    return {**OPTIONS, **options, "model_loader_extra_config": extra}


def look_here() -> None:
    """Makes vLLM look at each class of models in this process: it takes a new one, and seconds, to spare a GPU."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


@contextmanager
def engine(model: Path, thinking: Path | None = None, format: str | None = None, **options: Any) -> Iterator[Any]:
    """An engine that serves a packed pair, or two ends; it is gone after the block."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm: Any = None
    try:
        llm = LLM(str(model), **_options(thinking, format, options))
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
        cleanup_dist_env_and_memory()


def ask(llm: Any, prompts: list[list[int]], lams: Sequence[Any] = LAMS, tokens: int = 16, **params: Any) -> list[Any]:
    """Greedy answers of so many tokens to prompts, each at its λ, or with these arguments; None for one without any."""
    from vllm import SamplingParams

    asked = [
        SamplingParams(
            **{"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False, **params},
            extra_args=lam if lam is None or isinstance(lam, dict) else {"intensity": lam},
        )
        for lam in lams
    ]
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)


def vllm_answers(packed: Path, prompts: list[list[int]], lams: Sequence[float], tokens: int) -> list[list[int]]:
    """What vLLM answers greedily with merged models of a packed pair, without the plugin, for each λ."""
    of: dict[float, list[list[int]]] = {}
    for lam in set(lams):
        with TemporaryDirectory() as directory:
            merged(packed, lam).save_pretrained(directory)
            with engine(Path(directory)) as llm:
                of[lam] = tokens_of(ask(llm, prompts, [None] * len(prompts), tokens))
    return [of[lam][number] for number, lam in enumerate(lams)]


def model_of(llm: Any) -> Any:
    """The model that an engine has loaded."""
    (model,) = llm.apply_model(lambda model: model)
    return model


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    """The first answer to each prompt."""
    return [list(output.outputs[0].token_ids) for output in outputs]
