"""The gated delta net, at the path that callers know."""

from olmo_core.nn.attention.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig

__all__ = ["GatedDeltaNet", "GatedDeltaNetConfig"]
