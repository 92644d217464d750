"""How the tokens of a request are drawn: as it says, and for the rest as the end nearer to its λ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from dami.dial.patch import patch_of
from dami.generation.sampling import Sampling
from dami.serving.protocol import ChatRequest, CompletionRequest


@dataclass(frozen=True)
class SamplingDefaults:
    """The sampling parameters and the maximum number of tokens for requests that don't set them."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = None

    @classmethod
    def of(cls, config: GenerationConfig) -> SamplingDefaults:
        """Takes the defaults from a model's generation config, and those it lacks from OpenAI's API."""
        names = ("temperature", "top_p", "top_k") if config.do_sample is not False else ()
        said = {name: getattr(config, name, None) for name in names} | {"max_tokens": config.max_new_tokens}
        return cls(**{name: value for name, value in said.items() if value is not None})

    @classmethod
    def of_ends(cls, model: Any) -> tuple[SamplingDefaults, SamplingDefaults]:
        """Takes those of the instruct end and of the thinking end; a pair keeps both where they differ."""
        instruct, sampling = cls.of(model.generation_config), patch_of(model).origin.sampling
        return instruct, cls.of(GenerationConfig(**sampling["thinking"])) if sampling else instruct


def sampling_of(
    body: ChatRequest | CompletionRequest,
    ends: tuple[SamplingDefaults, SamplingDefaults],
    seed: int,
    intensity: float,
) -> Sampling:
    """Returns how the tokens of a sequence at λ are drawn.

    Args:
        body: its request.
        ends: the defaults of the instruct end and of the thinking end.
        seed: determines each draw, together with the length of the sequence.
        intensity: λ.
    """

    def setting(name: str) -> Any:
        value = getattr(body, name)
        value = getattr(ends[intensity >= 0.5], name) if value is None else value
        return max(value, 0)  # vLLM writes "no top_k" as −1

    settings = {name: setting(name) for name in ("temperature", "top_p", "top_k")}
    return Sampling(**settings, seed=seed, logprobs=body.wanted_logprobs)
