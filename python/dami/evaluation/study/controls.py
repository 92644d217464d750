"""Controls of the study: paths from the pair's instruct end to another model, for comparison with the pair's own."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dami.chat import encode
from dami.evaluation.permutations import permute
from dami.evaluation.study.settings import module_cells
from dami.evaluation.tasks import Task
from dami.patching.patch import patch_model
from dami.saving.merging import materialize

PERMUTED = "permuted"


def check_tokens(tokenizer: PreTrainedTokenizerBase, control: str) -> None:
    """Raises ValueError if a checkpoint's tokens differ from the pair's."""
    try:
        tokens = AutoTokenizer.from_pretrained(control).get_vocab()
    except (OSError, ValueError) as error:  # their messages do not name the checkpoint
        raise ValueError(f"cannot load the control {control}: {' '.join(str(error).split())}") from error
    if tokens != tokenizer.get_vocab():
        raise ValueError(f"the control {control} must have the pair's tokens, and its tokenizer has others")


def control_pair(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, control: str, task: Task, seed: int
) -> tuple[PreTrainedModel, list[str]]:
    """Returns a patched model from the pair's instruct end to another model, and the modules permuted for it.

    Raises:
        ValueError: the other model does not match the pair, or equals its instruct end.
    """
    instruct = materialize(model, 0.0).eval()
    permuted: list[str] = []
    if control == PERMUTED:
        other = materialize(model, 1.0).eval()
        _, batch = encode(tokenizer, [task.questions[0].question])
        permuted = permute(other, {name: tensor.to(model.device) for name, tensor in batch.items()}, seed)
    else:
        other = AutoModelForCausalLM.from_pretrained(control, dtype=instruct.dtype).eval()
        other.to(model.device)
    patched = patch_model(instruct, other)
    if not module_cells(patched):
        raise ValueError(f"the control {control} must differ from the instruct end")
    return patched, permuted
