"""Takes the states of prompts from the steps that read them, and has the pair's estimator choose λ by them.

A request with "auto" is preceded by a pilot: the same prompt at λ=0, and one token. It has to be a request of its own,
because vLLM gives a request its first token in the step that reads the end of its prompt, and goes on from there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.v1.worker.worker_base import WorkerBase

from dami.dial.values import one_lam, shortest
from dami.serving.vllm.offers import Offer
from dami.serving.vllm.quantization import PairQuantization
from dami.serving.vllm.self_test import SelfTest

METHOD = "dami_chosen"  # of vLLM's workers


def install() -> None:
    """Adds the method by which vLLM's workers tell λ."""
    setattr(WorkerBase, METHOD, _chosen)


def _chosen(self: WorkerBase, pilot: str) -> float | str:
    """Returns λ that the estimator chooses for the prompt of a pilot; or why it cannot."""
    states: Any = PairQuantization.of(self.vllm_config).states  # type: ignore[union-attr]
    return states if isinstance(states, str) else states.choose(pilot)


class PromptStates:
    """The states of layers at the last tokens of the pilots' prompts.

    They are copied in every step into buffers with fixed addresses, so captured graphs copy them, too.

    Args:
        model: a loaded model that has passed the self-test.
        config: vLLM's.
        offer: what the pair offers, with an estimator that has `layers`.

    Raises:
        ValueError: the model does not show the states of its layers, or the options do not allow it.
    """

    def __init__(self, model: Any, config: VllmConfig, offer: Offer) -> None:
        self.estimator: Any = offer.stored.estimator
        if config.speculative_config is not None or config.parallel_config.data_parallel_size > 1:
            raise ValueError("intensity 'auto' is not supported with speculation or data parallelism in vLLM")
        layers, self._state = _shown(model, config)
        self._layers = [layer % (len(layers) + 1) for layer in offer.layers]
        if 0 in self._layers:
            raise ValueError("the pair's estimator looks at the embedding, which is not shown in vLLM")
        self._most, width = config.scheduler_config.max_num_seqs, config.model_config.get_hidden_size()
        device = next(model.parameters()).device
        self._rows = torch.zeros(self._most, dtype=torch.int64, device=device)
        self._found = {
            layer: torch.zeros(self._most, width, dtype=config.model_config.dtype, device=device)
            for layer in self._layers
        }
        self._due: list[str] = []
        self._seen: dict[str, Tensor] = {}
        for layer in self._found:
            (model if layer == len(layers) else layers[layer - 1]).register_forward_hook(partial(self._copy, layer))

    def _copy(self, layer: int, module: nn.Module, inputs: Any, output: Any) -> None:
        states = output if isinstance(output, Tensor) else self._state(output)
        torch.index_select(states.flatten(0, -2), 0, self._rows, out=self._found[layer])

    def begin(self, pilots: Sequence[tuple[str, int]]) -> None:
        """Prepares a step.

        Args:
            pilots: the pilots whose prompts end in it, and the row of the last token of each.
        """
        self._keep()
        if pilots:
            self._rows[: len(pilots)] = torch.tensor([row for _, row in pilots], device=self._rows.device)
            self._due = [name for name, _ in pilots]

    def _keep(self) -> None:
        """Keeps what the last step has shown, and looks at the first row again, which every step has."""
        if not self._due:
            return
        for place, name in enumerate(self._due):
            self._seen[name] = torch.cat([self._found[layer][place].float() for layer in self._layers])
        self._due = []
        self._rows.zero_()
        while len(self._seen) > 4 * self._most:  # pilots whose clients have left
            del self._seen[next(iter(self._seen))]

    def choose(self, pilot: str) -> float:
        """Returns λ that the estimator chooses for the prompt of a pilot that has ended."""
        self._keep()
        seen = self._seen.pop(pilot).cpu().unsqueeze(0)
        [lam] = shortest(torch.tensor([one_lam(self.estimator.choose(seen).item(), "the estimator's choice")]))
        return lam


@torch.inference_mode()
def _shown(model: Any, config: VllmConfig) -> tuple[nn.ModuleList, Callable[[Any], Tensor]]:
    """Returns the layers of a model, and what turns the output of one into the state after it.

    It is the sum of both parts of the output, or the first, whichever the model's last norm turns into its output.

    Raises:
        ValueError: there are no such layers, or it is neither.
    """
    depth = config.model_config.hf_text_config.num_hidden_layers
    found = [
        (owner, layers)
        for owner in model.modules()
        for layers in owner.children()
        if isinstance(layers, nn.ModuleList) and len(layers) == depth
    ]
    if found:
        owner, layers = found[0]
        outputs: list[Any] = []
        test = SelfTest(model, config)
        handle = layers[-1].register_forward_hook(lambda module, inputs, output: outputs.append(copy.deepcopy(output)))
        with test.without_a_cache():
            wanted = test.outputs()[0]
        handle.remove()
        fits = [state for state in STATES if any(_is_close(y, wanted) for y in _normed(owner, layers, state, *outputs))]
        test.rows.clear()
        if fits:
            return layers, fits[0]
    raise ValueError(f"the states of the layers of a {type(model).__name__} are not known")


STATES: tuple[Callable[[Any], Tensor], ...] = (lambda output: output[0] + output[1], lambda output: output[0])


def _normed(owner: nn.Module, layers: nn.Module, state: Callable[[Any], Tensor], output: Any) -> Iterator[Tensor]:
    """Yields what each module beside the layers makes of the state after the last of them."""
    for module in owner.children():
        if module is not layers:
            try:
                yield module(state(output) if isinstance(output, tuple) else output)
            except Exception:
                continue


def _is_close(y: Any, wanted: Tensor) -> bool:
    if not isinstance(y, Tensor) or y.numel() != wanted.numel():
        return False
    tolerance = 8 * torch.finfo(y.dtype).eps
    return bool((y.float().view_as(wanted) - wanted).norm() <= wanted.norm() * max(tolerance, 1e-3))
