"""The namespace of this build's operators, so that several versions can be loaded at once."""

import torch

NAMESPACE = "@id@"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator."""
    return f"{NAMESPACE}::{op_name}"
