"""Checks, before a model runs sequences at several λ, that each λ reaches only its own sequence.

Modules look up the λ of a row by its position, so they rely on the batch being the first dimension of every tensor. A
model with another layout, or one that gathers rows of several sequences, may pass all size checks by coincidence. So
the whole model runs once on a few tokens with λ = NaN for one of two sequences. NaN must not appear in the logits of
the other sequence.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dami.dial.state import Dial
from dami.layers.base import LerpModule
from dami.upstream import hooks_of

NAN = float("nan")
# (tokens, sequence at NaN); tokens are more than the two sequences, as many, and one as in a decoding step
RUNS = tuple((length, poisoned) for length in (3, 2, 1) for poisoned in (1, 0))


def check_independence(model: nn.Module, forward: Any) -> None:
    """Raises ValueError if a λ reaches another sequence, and names a module where it does.

    Runs that fail on tokens alone, or on NaN, are skipped. If all of them fail, it issues a UserWarning.

    Args:
        model: a patched model.
        forward: its class's original forward.
    """
    with _undisturbed(model):
        module = _leaking_module(model, forward)
    if module is not None:
        raise ValueError(
            f"{type(model).__name__} takes one λ for a whole batch only: from {module.lerp.name} "
            f"({module.lerp.original.__name__}) on, rows of several sequences are not told apart"
        )


def _leaking_module(model: nn.Module, forward: Any) -> LerpModule | None:
    modules = [module for module in model.modules() if isinstance(module, LerpModule)]
    if not _leaks(model, forward, modules):
        return None
    while len(modules) > 1:  # find the last module that leaks: NaN from an earlier one may pass through it
        half = len(modules) // 2
        modules = modules[half:] if _leaks(model, forward, modules[half:]) else modules[:half]
    return modules[0]


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Disables a model's hooks and training mode, so that the check triggers no hook and updates no running statistics.

    Hooks that the check's passes install stay: transformers installs those that capture hidden states only once.
    """
    hooks = [hooks for m in model.modules() for hooks in hooks_of(m)]
    kept = [(dict(each), each) for each in hooks]
    training = [(module, module.training) for module in model.modules()]
    try:
        for each in hooks:
            each.clear()
        for module, _ in training:
            module.training = False
        yield
    finally:
        for before, each in kept:
            installed = dict(each)
            each.clear()
            each.update(before | installed)
        for module, was in training:
            module.training = was


@torch.no_grad()
def _leaks(model: Any, forward: Any, modules: Sequence[LerpModule]) -> bool:
    """Returns whether λ = NaN for one sequence in these modules reaches the other's logits; False if nothing runs."""
    running, everyone = model.dami_patch.running, [m for m in model.modules() if isinstance(m, LerpModule)]
    parts, names = [module.lerp.part for module in everyone], inspect.signature(forward).parameters
    failures: list[Exception] = []
    try:
        for length, poisoned in RUNS:
            ids = 3 + torch.arange(2 * length, device=model.device).view(2, length)
            inputs = {name: ids for name in ("input_ids", "decoder_input_ids") if name in names}
            lam = torch.zeros(2, dtype=torch.float32, device=model.device)
            at_rest, turned = Dial(lam), Dial(lam.index_fill(0, torch.tensor([poisoned], device=lam.device), NAN))
            for module in everyone:
                module.lerp.part = turned if module in modules else at_rest
            try:
                with running.during(2, length):
                    logits = forward(model, **inputs, **({"use_cache": False} if "use_cache" in names else {})).logits
            except Exception as error:
                failures.append(error)
                continue
            if logits[1 - poisoned].isnan().any():
                return True
        if len(failures) == len(RUNS) and len(modules) == len(everyone):
            warnings.warn(
                f"{type(model).__name__} could not be checked for a λ that reaches other sequences, as it does not run "
                f"on tokens alone: compare some rows of a mixed batch with the same rows alone ({failures[0]!r})",
                stacklevel=6,
            )
        return False
    finally:
        for module, part in zip(everyone, parts, strict=True):
            module.lerp.part = part
