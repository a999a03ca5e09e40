"""What a mixer knows of the ranks that it shares a sequence with, as plain values.

No mesh, no group and no tensor is kept, so a module with one copies, pickles and compiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from olmo_core.nn.attention.parallel.balancers import RingAttentionLoadBalancerType
from olmo_core.nn.attention.parallel.op import Shard
from olmo_core.nn.attention.parallel.plan import WHOLE

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from olmo_core.nn.attention.parallel.styles import (
        RingContextParallelStyle,
        UlyssesContextParallelStyle,
    )


@dataclass(frozen=True)
class ContextParallel:
    """A rank's place: in a ring, in a Ulysses group, or in a Ulysses group inside a ring."""

    load_balancer: RingAttentionLoadBalancerType
    """That shards for it."""
    layout: str
    """Its layout's name; :data:`.WHOLE` for Ulysses alone, where nothing is dealt over a ring."""
    head_stride: int
    ring_degree: int
    ring_rank: int
    ring_group: str
    """Groups go by name; "" where there is none."""
    ulysses_degree: int
    ulysses_rank: int
    ulysses_group: str
    everyone: str
    """The group of all ranks that share the sequence."""

    @classmethod
    def from_mesh(
        cls,
        cp_mesh: DeviceMesh,
        ring: RingContextParallelStyle | None = None,
        uly: UlyssesContextParallelStyle | None = None,
    ) -> ContextParallel:
        """This process's place in a mesh.

        Makes no process group but the one of all ranks of a two-dimensional mesh, which every
        process of the job must come to.

        :param cp_mesh: One dimension for one style; for both (ring, Ulysses).
        :raises ValueError: If no style is given, or the mesh has not as many dimensions as styles.
        :raises RuntimeError: If this build of torch has no ``torch.distributed``.
        """
        if not dist.is_available():
            raise RuntimeError(
                "Context parallelism needs torch.distributed, which this build of torch has not. "
                "Install one that has it."
            )
        if ring is None and uly is None:
            raise ValueError(
                "Context parallelism needs a style, got ring=None and uly=None. Pass "
                "ring=RingContextParallelStyle(...) or uly=UlyssesContextParallelStyle()."
            )
        if not hasattr(cp_mesh, "ndim") or not hasattr(cp_mesh, "get_group"):
            raise TypeError(f"cp_mesh must be a DeviceMesh, got {type(cp_mesh).__name__}.")
        styles = (ring is not None) + (uly is not None)
        if cp_mesh.ndim != styles:
            raise ValueError(
                f"A mesh for {styles} style{'s' * (styles > 1)} has as many dimensions, got "
                f"{cp_mesh.ndim}. Take the one that shards the sequence, mesh['cp'], for one "
                "style, and (ring, Ulysses) for both."
            )
        if styles == 2 and not cp_mesh.mesh_dim_names:
            raise ValueError(
                "A mesh of two dimensions needs names for them, to make the group of all its ranks:"
                " init_device_mesh(..., mesh_dim_names=('ring', 'ulysses'))."
            )
        degrees = [cp_mesh.size(dim) for dim in range(styles)]
        ranks = [cp_mesh.get_local_rank(dim) for dim in range(styles)]
        groups = [cp_mesh.get_group(dim).group_name for dim in range(styles)]
        everyone = groups[0] if styles == 1 else cp_mesh._flatten().get_group().group_name
        places = list(zip(degrees, ranks, groups, strict=True))
        of_ring = (1, 0, "") if ring is None else places[0]
        of_ulysses = (1, 0, "") if uly is None else places[-1]
        kind = RingAttentionLoadBalancerType
        balancer = kind.ulysses if ring is None else kind(ring.load_balancer)
        return cls(
            balancer,
            WHOLE if ring is None else balancer.layout.name,
            1 if ring is None else ring.head_stride,
            *of_ring,
            *of_ulysses,
            everyone,
        )

    @property
    def degree(self) -> int:
        """How many ranks share a sequence."""
        return self.ring_degree * self.ulysses_degree

    def rotates(self, window: int) -> bool:
        """Whether keys go round a ring; elsewhere they are gathered.

        A function of the layer alone: never of the documents, which would be each rank's own.
        """
        return self.load_balancer == RingAttentionLoadBalancerType.zig_zag and window < 0

    def shard(
        self, lengths: Tensor | None, *, local: bool, window: int, scale: float, kernel: str
    ) -> Shard:
        """What the ops of a call are told. The outermost one agrees with all ranks.

        :param lengths: Cumulative lengths of the whole sequence; None for one document a row.
        :param local: Whether they are the zig-zag shard's instead.
        """
        group = self.ulysses_group or self.ring_group
        return Shard(
            lengths, self.layout, local, window, self.head_stride, scale, kernel, group,
            self.everyone,
        )  # fmt: skip
