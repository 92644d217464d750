"""Handles heads that are tied to the embedding in one end only."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

TIES = "tie_word_embeddings"


def head_name(model: PreTrainedModel) -> str | None:
    """Returns the name of the weight of a model's head; None if it has none, or a head for each codebook."""
    head = model.get_output_embeddings()
    named = ((name, module) for name, module in model.named_modules() if hasattr(module, "weight"))
    return next((f"{name}.weight" for name, module in named if module is head), None)


def untie(model: PreTrainedModel) -> nn.Parameter:
    """Gives a model's head its own copy of the weight, and returns the shared one."""
    head = model.get_output_embeddings()
    shared = head.weight
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    _note_ties(model, False)
    return shared


def tie(model: PreTrainedModel, shared: nn.Parameter) -> None:
    """Undoes `untie`."""
    model.get_output_embeddings().weight = shared
    _note_ties(model, True)


def _note_ties(model: PreTrainedModel, tied: bool) -> None:
    setattr(model.config.get_text_config(), TIES, tied)
    setattr(model.config, TIES, tied)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
