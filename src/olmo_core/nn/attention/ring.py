"""Load balancers and styles of context parallelism, at the path that callers know."""

from olmo_core.nn.attention.parallel.balancers import (
    BalancedLoadBalancer,
    RingAttentionLlama3LoadBalancer,
    RingAttentionLoadBalancer,
    RingAttentionLoadBalancerType,
    RingAttentionZigZagLoadBalancer,
    UlyssesLoadBalancer,
)
from olmo_core.nn.attention.parallel.styles import (
    RingContextParallelStyle,
    UlyssesContextParallelStyle,
)

__all__ = [
    "BalancedLoadBalancer",
    "RingAttentionLlama3LoadBalancer",
    "RingAttentionLoadBalancer",
    "RingAttentionLoadBalancerType",
    "RingAttentionZigZagLoadBalancer",
    "RingContextParallelStyle",
    "UlyssesContextParallelStyle",
    "UlyssesLoadBalancer",
]
