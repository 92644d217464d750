"""Tensor parallelism for packed pairs: transformers' parallel styles, adapted to modules that hold two ends.

The tensors stored along with a weight are split in the same way as the weight, so each process keeps its part of both
ends and interpolates it locally. Kernels take plain tensors, so inside a forward pass each process sees only its own
parts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import ColwiseParallel, EmbeddingParallel, RowwiseParallel

from dami.layers.base import LerpModule
from dami.saving.config import any_layer
from dami.upstream import local_parameters, local_shape_and_offset, parameters_of
from dami_kernels.quantize import GROUP

PREFIX = "dami_"


def use_our_styles(model: nn.Module, plan: dict[str, str]) -> None:
    """Replaces the styles of patched modules in a tensor-parallel plan with ours.

    Raises:
        ValueError: the plan has a style that is not supported for a packed pair.
    """
    patched = {any_layer(name) for name, module in model.named_modules() if isinstance(module, LerpModule)}
    for name in plan.keys() & patched:
        style = ALL_PARALLEL_STYLES[plan[name]]
        if plan[name] == "sequence_parallel":
            raise ValueError(f"{name} cannot be split as {plan[name]!r} in a packed pair: leave it out of the tp_plan")
        ours = {ColwiseParallel: LerpColwise, RowwiseParallel: LerpRowwise, EmbeddingParallel: LerpEmbeddingParallel}
        if type(style) in ours:
            lerp_style = copy.copy(style)
            lerp_style.__class__ = ours[type(style)]
            ALL_PARALLEL_STYLES.register(PREFIX + plan[name], lerp_style)
            plan[name] = PREFIX + plan[name]


class _LerpStyle:
    """Base class of our styles. Modules that are not patched are split as in transformers."""

    whole: tuple[str, ...] = ()  # name suffixes of tensors that every process keeps whole

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return isinstance(module, LerpModule) or super().should_use_local_tensors(module)  # type: ignore[misc]

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        if not (isinstance(module, LerpModule) and param.endswith(self.whole)):
            super().shard_param(module, param, mesh)  # type: ignore[misc]

    def transform_inputs_pre_forward(self, module: nn.Module, args: Any, kwargs: Any, mesh: DeviceMesh) -> Any:
        if isinstance(module, LerpModule) and module.lerp.lam.requires_grad:
            raise ValueError("intensity takes no gradient under tensor parallelism, where a process has a part of it")
        return super().transform_inputs_pre_forward(module, args, kwargs, mesh)  # type: ignore[misc]


class LerpColwise(_LerpStyle, ColwiseParallel):
    """Splits output features. In a low-rank difference, only `up` has them."""

    whole = ("_down",)


class LerpRowwise(_LerpStyle, RowwiseParallel):
    """Splits input features, in whole groups that share a scale. The first process adds the bias."""

    whole = ("_up", "bias", "bias_target")

    def validate_param(self, module: Any, param: str, mesh: DeviceMesh, parameter_name: str | None = None) -> None:
        if param.endswith("_scale") and module.in_features % (GROUP * mesh.size()):
            raise ValueError(
                f"{parameter_name}: {module.in_features} input features cannot be split over {mesh.size()} processes, "
                f"as {GROUP} of them share a scale"
            )

    @contextmanager
    def context_around_forward(self, module: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
        if not isinstance(module, LerpModule):
            with super().context_around_forward(module, mesh):
                yield
            return
        own = parameters_of(module)
        bias = own["bias"]
        if mesh.get_local_rank() > 0:
            own["bias"] = None
        try:
            with local_parameters(module):
                yield
        finally:
            own["bias"] = bias

    def transform_output_post_forward(self, module: nn.Module, output: Tensor, mesh: DeviceMesh) -> Tensor:
        if not isinstance(module, LerpModule):
            return super().transform_output_post_forward(module, output, mesh)
        return (
            DTensor.from_local(output, mesh, [Partial()], run_check=False)
            .redistribute(placements=[Replicate()])
            .to_local()
        )


class LerpEmbeddingParallel(_LerpStyle, EmbeddingParallel):
    """Splits the rows of the table. Each process looks up the tokens it has, and the results are summed."""

    whole = ("_down",)

    def install_forward(self, module: Any, mesh: DeviceMesh) -> Any:
        if not isinstance(module, LerpModule):
            return super().install_forward(module, mesh)
        table = next(parameter for parameter in module.parameters() if isinstance(parameter, DTensor))
        shape, offset = local_shape_and_offset(table, mesh)
        forward = module.forward

        def looked_up(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            own = ids - offset[0]
            elsewhere = (own < 0) | (own >= shape[0])
            with local_parameters(module):
                output = forward(own.masked_fill(elsewhere, 0), *args, **kwargs)
            output = output.masked_fill(elsewhere.unsqueeze(-1), 0)
            return self.transform_output_post_forward(module, output, mesh)

        module.forward = looked_up
        return module
