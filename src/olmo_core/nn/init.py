"""How weights start.

Every method draws from a normal distribution truncated at three standard deviations, and zeroes
biases. The draws are float32 whatever the parameter's dtype, and whole whatever its sharding: a
bfloat16 model, a sharded one and one that was built on ``meta`` start at the same weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from olmo_core.config import StrEnum
from olmo_core.exceptions import OLMoConfigurationError

__all__ = ["InitMethod", "copy_into", "trunc_normal_"]


class InitMethod(StrEnum):
    """Chooses the standard deviation of each matrix."""

    normal = "normal"
    """``std`` for every matrix."""

    normalized = "normalized"
    """d_model^-1/2, and for outputs also / sqrt(2 * num_blocks), as in nGPT (arXiv:2410.01131)."""

    llama = "llama"
    """``std``, and for outputs / sqrt(2 * num_blocks)."""

    llama_depth = "llama_depth"
    """``std``, and for outputs / sqrt(2 * (block_idx + 1))."""

    fan_in = "fan_in"
    """1 / sqrt(fan_in), with each matrix's own number of inputs."""

    def get_std(
        self,
        *,
        fan_in: int,
        d_model: int,
        block_idx: int,
        num_blocks: int,
        std: float = 0.02,
        output: bool = False,
    ) -> float:
        """The standard deviation, before truncation, of one matrix; see :meth:`init_linear_`."""
        if not 0 < std < math.inf:
            raise OLMoConfigurationError(f"std must be positive and finite, got {std}")
        if not 0 <= block_idx < num_blocks:
            raise OLMoConfigurationError(
                f"block_idx must lie in [0, num_blocks={num_blocks}), got {block_idx}"
            )
        if self == InitMethod.fan_in:
            return 1 / math.sqrt(fan_in)
        if self == InitMethod.normalized:
            std = 1 / math.sqrt(d_model)
        if not output or self == InitMethod.normal:
            return std
        depth = block_idx + 1 if self == InitMethod.llama_depth else num_blocks
        return std / math.sqrt(2 * depth)

    @torch.no_grad()
    def init_linear_(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        d_model: int,
        block_idx: int,
        num_blocks: int,
        std: float = 0.02,
        output: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """Initialise a linear layer in place.

        :param weight: (out_features, in_features); may be a ``DTensor``.
        :param bias: Set to zero.
        :param d_model: The width of the residual stream.
        :param block_idx: Which block the matrix belongs to, from 0.
        :param num_blocks: How many blocks the model has.
        :param std: The base standard deviation of ``normal``, ``llama`` and ``llama_depth``.
        :param output: Whether the matrix writes to the residual stream (``w_out``, ``w2``).
        :param generator: On the weight's device, in the same state on every rank. Without it
            torch's default generator has to be seeded alike on every rank.
        :raises OLMoConfigurationError: For ``std`` <= 0 or ``block_idx`` out of range.
        """
        width = self.get_std(
            fan_in=weight.shape[-1],
            d_model=d_model,
            block_idx=block_idx,
            num_blocks=num_blocks,
            std=std,
            output=output,
        )
        trunc_normal_(weight, std=width, generator=generator)
        if bias is not None:
            bias.zero_()


@torch.no_grad()
def trunc_normal_(
    weight: Tensor, *, std: float = 0.02, generator: torch.Generator | None = None
) -> Tensor:
    """Fill ``weight`` with normal draws truncated at ``3 * std``; returns it.

    :param weight: Any shape and floating-point dtype; may be a ``DTensor``.
    :param generator: On the weight's device, in the same state on every rank.
    """
    # In bfloat16 torch's uniform_ returns the ends of its interval, whose erfinv is infinite.
    values = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    nn.init.trunc_normal_(values, std=std, a=-3 * std, b=3 * std, generator=generator)
    copy_into(weight, values)
    return weight


@torch.no_grad()
def copy_into(param: Tensor, values: Tensor) -> None:
    """Write ``values``, whole and the same on every rank, into ``param``, which may be a shard.

    :param param: A tensor or a ``DTensor``.
    :param values: A tensor of ``param``'s whole shape.
    """
    # A DTensor is known by its attributes: importing its module takes 0.6 s.
    if hasattr(param, "device_mesh") and hasattr(param, "placements"):
        from torch.distributed.tensor import distribute_tensor

        # src_data_rank=None: each rank cuts its own copy, nothing is sent.
        shard = distribute_tensor(values, param.device_mesh, param.placements, src_data_rank=None)
        param.to_local().copy_(shard.to_local())  # type: ignore[attr-defined]
    else:
        param.copy_(values)
