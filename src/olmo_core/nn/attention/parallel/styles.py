"""The two styles of context parallelism, as configs."""

from __future__ import annotations

from dataclasses import dataclass

from olmo_core.config import Config
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention.parallel.balancers import RingAttentionLoadBalancerType

__all__ = ["RingContextParallelStyle", "UlyssesContextParallelStyle"]


@dataclass
class RingContextParallelStyle(Config):
    """Configuration for ring attention-style context parallelism.

    :raises OLMoConfigurationError: For a load balancer that is not a ring's, or a head stride
        below 1.
    """

    load_balancer: RingAttentionLoadBalancerType = RingAttentionLoadBalancerType.zig_zag
    """The type of load balancer to use for ring attention."""

    head_stride: int = 1
    """The stride of the head dimension to process for each iteration of ring attention. A value of
    1 means each iteration will process one k and one v head. A value of 2 will process two k and
    two v heads, etc. A larger stride will reduce the number of communication ops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_balancer == RingAttentionLoadBalancerType.ulysses:
            raise OLMoConfigurationError(
                "RingContextParallelStyle: 'ulysses' is not a ring's load balancer. Choose "
                "zig_zag, llama3 or balanced, or pass uly=UlyssesContextParallelStyle() to "
                "apply_cp() instead."
            )
        if self.head_stride < 1:
            raise OLMoConfigurationError(
                f"RingContextParallelStyle: head_stride must be at least 1, got {self.head_stride}."
            )


@dataclass
class UlyssesContextParallelStyle(Config):
    """Configuration for Ulysses-style context parallelism."""

    @property
    def load_balancer(self) -> RingAttentionLoadBalancerType:
        """The load balancer that shards for this style."""
        return RingAttentionLoadBalancerType.ulysses
