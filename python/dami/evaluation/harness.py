"""lm-evaluation-harness with the model "dami": python -m dami.evaluation.harness --model dami --model_args pair=…,…

Arguments: `pair`, a packed pair, or `instruct` and `thinking`; `intensity`, a number or "auto"; `format`; the options
of both checkpoints, such as `revision` and `thinking_revision`; and those of the harness's model "hf" for batches,
lengths and templates. The model "hf" itself takes a packed pair, or a model that PairConfig has loaded.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

import dami
from dami.sources import OPTIONS, THINKING
from dami.upstream import check
from dami_kernels.installation import needs

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(needs("dami.evaluation.harness", "lm_eval", "eval")) from error

check("lm-evaluation-harness")


@register_model("dami")
class DamiLM(HFLM):
    """A patched model with one intensity for all requests, or with an estimator that chooses it per request."""

    def __init__(
        self,
        pair: str | None = None,
        instruct: str | None = None,
        thinking: str | None = None,
        intensity: float | str = 0.0,
        format: str = "pair",
        device: str | None = None,
        dtype: str = "auto",
        **options: Any,
    ) -> None:
        """Loads the pair.

        Raises:
            TypeError: an option is unknown.
            ValueError: neither a packed pair nor two ends are given, or the intensity is neither a number nor "auto".
        """
        known = {*inspect.signature(HFLM.__init__).parameters, *OPTIONS, *(THINKING + name for name in OPTIONS)}
        if unknown := options.keys() - known:
            raise TypeError(f'the model "dami" has no {sorted(unknown)}: it takes {sorted(known - {"self", "kwargs"})}')
        if bool(pair) == bool(instruct and thinking) or (pair and (instruct or thinking)):
            raise ValueError(
                f"pair must be a packed pair, or instruct and thinking two checkpoints, got pair={pair}, "
                f"instruct={instruct}, thinking={thinking}"
            )
        if intensity != "auto":
            try:
                intensity = float(intensity)
            except ValueError as error:
                raise ValueError(f'intensity must be a number or "auto", got {intensity!r}') from error
        ours = [name for name in options if name.removeprefix(THINKING) in OPTIONS]
        loaded: dict[str, Any] = {"device_map": device, "dtype": dtype, **{name: options.pop(name) for name in ours}}
        if not pair:
            loaded["format"] = format
        model, tokenizer = dami.load_pair(str(pair or instruct), thinking, **loaded)
        self.intensity = intensity
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)

    def _turned(self) -> AbstractContextManager[None]:
        if isinstance(self.intensity, str):
            raise ValueError('intensity="auto" chooses λ where text is generated; this task asks for likelihoods')
        return dami.intensity(self.model, self.intensity)

    def _model_call(self, *args: Any, **options: Any) -> Tensor:
        with self._turned():
            return super()._model_call(*args, **options)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        # The pair's generation_config.json may set max_new_tokens, which would take precedence over max_length.
        options["max_new_tokens"] = max_length - context.shape[1]
        return super()._model_generate(context, max_length, stop, intensity=self.intensity, **options)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
