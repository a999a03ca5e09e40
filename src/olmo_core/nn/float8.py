"""Float8 projections under tensor parallelism, by torchao's parallel styles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from olmo_core.distributed.utils import goes_over_gloo

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["float8_styles"]


def float8_styles(
    layer: nn.Module, names: Iterable[str], mesh: DeviceMesh, output_layout: Any = None
) -> Mapping[str, tuple[Any, Any]]:
    """torchao's (column, row) parallel styles of those projections of a layer that are float8 ones.

    Where a layer has converted only some, the others are not in the result.

    :param names: Of the projections. The layer may lack some: those are None.
    :raises RuntimeError: If torchao is missing, none of the projections is a float8 one, or the
        ranks can't send each other the gradients of a sharded output, which are float8.
    :raises ValueError: If one scales in a way that torchao's styles don't follow.
    """
    try:
        from torchao.float8.float8_linear import Float8Linear
        from torchao.float8.float8_tensor_parallel import (
            Float8ColwiseParallel,
            Float8RowwiseParallel,
        )
    except ImportError as error:
        raise RuntimeError(
            "float8_enabled=True needs torchao, which can't be imported here. Run: pip install "
            "torchao"
        ) from error
    linears = {name: w for name in names if (w := getattr(layer, name, None)) is not None}
    float8 = {name: w for name, w in linears.items() if isinstance(w, Float8Linear)}
    kind = type(layer).__name__
    if not float8:
        raise RuntimeError(
            f"float8_enabled=True, but none of {kind}'s projections ({', '.join(linears)}) is a "
            "float8 one. Call torchao.float8.convert_to_float8_training on it first."
        )
    if output_layout is not None and output_layout.is_shard() and goes_over_gloo(mesh):
        raise RuntimeError(
            "gloo can't gather float8 tensors, such as the gradients of a sharded output. Use "
            "output_layout=None, float8_enabled=False, or ranks on GPUs (NCCL)."
        )
    for name, linear in float8.items():
        if odd := _odd_scaling(linear.config):
            raise ValueError(
                f"torchao's parallel styles scale a whole tensor, dynamically, and {name} of "
                f"{kind} has {odd}. Use float8_enabled=False: the layer stays float8, with its "
                "own scaling."
            )
    return dict.fromkeys(float8, (Float8ColwiseParallel, Float8RowwiseParallel))


def _odd_scaling(config: Any) -> str:
    """What the styles, which cast inputs and gradients before the projection does, would not do."""
    casts = ((what, cast) for what, cast in vars(config).items() if what.startswith("cast_config"))
    for what, cast in casts:
        if cast.scaling_type.value != "dynamic":
            return f"{what}.scaling_type={cast.scaling_type.value}"
        if cast.scaling_granularity.value != "tensorwise":
            return f"{what}.scaling_granularity={cast.scaling_granularity.value}"
    if config.round_scales_to_power_of_2:
        return "round_scales_to_power_of_2=True"
    return ""
