"""Activation checkpointing: what runs a second time, in the backward pass, runs at the λ of its first.

By then the pass is over and the dial has been turned back. So what checkpoints is wrapped for the time of a pass: it
hands λ on as an argument, and the pass is set up again around what runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from dami.dial.state import PatchedModule
from dami.upstream import CHECKPOINTS


def checkpoints(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a model's modules keep what checkpoints them."""
    return [(vars(module), name) for module in model.modules() for name in CHECKPOINTS if name in vars(module)]


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """For the time of a pass, what a patched model's checkpoints run again will run in this pass."""
    found = [(holder, name, holder[name]) for holder, name in checkpoints(model)]
    checkpointed = _in_this_pass(model)
    try:
        for holder, name, checkpoint in found:
            holder[name] = partial(checkpointed, checkpoint)
        yield
    finally:
        for holder, name, checkpoint in found:
            holder[name] = checkpoint


def _in_this_pass(model: Any) -> Callable[..., Any]:
    """A call of a checkpoint such that its function finds the pass that the model is in now, whenever it runs.

    Every λ is an argument of the checkpoint, whose arguments alone have gradients with `use_reentrant=True`.
    """
    patch, thread = model.dami_patch, threading.get_ident()
    dials = [patch.dial, *patch.parts]
    lams = [dial.lam for dial in dials]
    noted = [(patch.running, name, getattr(patch.running, name)) for name in ("sequences", "tokens")]
    noted += [
        (module.lerp, "part", module.lerp.part) for module in model.modules() if isinstance(module, PatchedModule)
    ]

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with patch.hold.of(thread), ExitStack() as stack:  # on a GPU, autograd has threads of its own
            for dial, lam in zip(dials, args, strict=False):
                stack.enter_context(dial.turned(lam))
            for holder, name, value in noted:
                if (now := getattr(holder, name)) is not value:
                    stack.callback(setattr, holder, name, now)
                    setattr(holder, name, value)
            return function(*args[len(dials) :], **kwargs)

    def checkpointed(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(run, function), *lams, *args, **kwargs)

    return checkpointed
