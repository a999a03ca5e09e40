"""How FSDP2 is to wrap a module whose parameters have several dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

__all__ = ["FSDPPolicy", "fsdp_policy"]


@dataclass(frozen=True)
class FSDPPolicy:
    """What to give ``fully_shard``, before it is called on the block around the module.

    ::

        policy = block.attention.fsdp_policy()
        for group in policy.groups:
            fully_shard(group, mesh=mesh, mp_policy=policy.mp_policy)
        fully_shard(block, mesh=mesh, mp_policy=policy.mp_policy)
    """

    groups: list[list[nn.Module]]
    """Modules whose parameters FSDP2 must gather apart, in order: it refuses several dtypes in one
    group. Empty where all have one."""
    mp_policy: MixedPrecisionPolicy
    """Leaves inputs alone: RoPE tables and float32 parameters keep their precision."""


def fsdp_policy(module: nn.Module, dtype: torch.dtype) -> FSDPPolicy:
    """:param dtype: Of the parameters that stay with the block.
    :raises RuntimeError: If one module has parameters of several dtypes.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    holders: dict[torch.dtype, list[nn.Module]] = {}
    for name, part in module.named_modules():
        dtypes = {p.dtype for p in part._parameters.values() if p is not None}
        if len(dtypes) > 1:
            raise RuntimeError(
                f"FSDP2 takes one dtype in a module's parameters, and {name or 'the mixer'} has "
                f"{', '.join(map(str, dtypes))}. Cast them to one."
            )
        for each in dtypes:
            holders.setdefault(each, []).append(part)
    groups: list[list[nn.Module]] = []
    # The module's own parameters, beside its layers, can only be wrapped with it: after the others.
    own = next((p.dtype for p in module._parameters.values() if p is not None), dtype)
    groups += [parts for each, parts in holders.items() if each != own]
    if own != dtype:
        groups.append([module])
    return FSDPPolicy(groups, MixedPrecisionPolicy(cast_forward_inputs=False))
