"""Activation checkpointing: recomputes layers in the backward pass at the λ of the forward pass.

By the time of the backward pass, the forward pass is over and the dial has been turned back. So the checkpoint
functions are wrapped during the forward pass: they pass λ on as an argument, and restore the pass around the
recomputation.
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
    """Returns where a model's modules keep their checkpoint functions: the dict that holds each, and its key."""
    return [(vars(module), name) for module in model.modules() for name in CHECKPOINTS if name in vars(module)]


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Wraps a patched model's checkpoint functions during a pass, so that recomputation sees the same pass."""
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
    """Returns a wrapper of checkpoint functions that runs the checkpointed function in the model's current pass.

    Every λ is passed to the checkpoint as an argument, because with `use_reentrant=True` only arguments get gradients.
    """
    patch, thread = model.dami_patch, threading.get_ident()
    dials = [patch.dial, *patch.parts]
    lams = [dial.lam for dial in dials]
    noted = [(patch.running, name, getattr(patch.running, name)) for name in ("sequences", "tokens")]
    noted += [
        (module.lerp, "part", module.lerp.part) for module in model.modules() if isinstance(module, PatchedModule)
    ]

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with patch.hold.of(thread), ExitStack() as stack:  # for a GPU, autograd uses its own threads
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
