"""Lists the parameters of a patched model with their kind, format and size in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from dami.dial.patch import patch_of
from dami.layers.base import LerpModule, own_tensors


@dataclass(frozen=True)
class ParameterRow:
    """One parameter of a patched model.

    Attributes:
        name: its qualified name.
        kind: the kind of its module: "linear", "conv1d", "embedding", "rms_norm", "layer_norm" and so on, or the class
            name of a module that is not patched.
        shape: shape of each end.
        dtype: dtype of each end, as the operator takes it.
        format: the format in which its ends are stored, None if they are identical.
        nbytes: bytes of all tensors stored for it; 0 if it is tied.
        tied_to: the name of the parameter it is tied to, None otherwise.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    format: str | None
    nbytes: int
    tied_to: str | None

    @property
    def interpolated(self) -> bool:
        """Whether the ends differ."""
        return self.format is not None


@dataclass(frozen=True)
class Description:
    """All parameters of a patched model, with their format and size; print it to see a table."""

    rows: tuple[ParameterRow, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters of both ends, as stored."""
        return sum(row.nbytes for row in self.rows)

    @property
    def format(self) -> str:
        """The format of embeddings and linear weights. Norms and biases are stored as a "pair" in every format."""
        return min({row.format for row in self.rows if row.format not in (None, "pair")}, default="pair")

    def __str__(self) -> str:
        cells = [("parameter", "kind", "shape", "dtype", "ends", "bytes")]
        for row in self.rows:
            ends = f"interpolated ({row.format})" if row.format else "identical"
            nbytes = f"tied to {row.tied_to}" if row.tied_to else f"{row.nbytes:,}"
            cells.append((row.name, row.kind, "×".join(map(str, row.shape)), row.dtype, ends, nbytes))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        lines.insert(1, "  ".join("─" * width for width in widths))
        interpolated = sum(row.interpolated for row in self.rows)
        lines.append(f"{len(self.rows)} parameters, {interpolated} interpolated, {self.nbytes:,} bytes")
        return "\n".join(lines)


def describe(model: PreTrainedModel) -> Description:
    """Describes every parameter and interpolated buffer of a patched model: its kind, format and size in bytes.

    `print(describe(model))` shows a table; `.rows` holds the same as data.

    Raises:
        TypeError: the model is not patched.
    """
    patch_of(model)
    rows: dict[int, ParameterRow] = {}
    tied: list[ParameterRow] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        lerp = module.lerp if isinstance(module, LerpModule) else None
        added = {name for own, stored in lerp.stored.items() for name in stored.names if name != own} if lerp else set()
        for name, parameter in own_tensors(module):
            stored = lerp.stored.get(name) if lerp else None
            if name in added or not (stored or isinstance(parameter, nn.Parameter)):
                continue
            names = stored.names if stored else (name,)
            first = rows.get(id(parameter))
            row = ParameterRow(
                name=f"{prefix}.{name}" if prefix else name,
                kind=module.kind if isinstance(module, LerpModule) else type(module).__name__,
                shape=tuple(parameter.shape),
                dtype=str(parameter.dtype).removeprefix("torch."),
                format=stored.format if stored else None,
                nbytes=0 if first else sum(dict(own_tensors(module))[tensor].nbytes for tensor in names),
                tied_to=first.name if first else None,
            )
            if first:
                tied.append(row)
            else:
                rows[id(parameter)] = row
    return Description((*rows.values(), *tied))
