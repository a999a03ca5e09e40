"""The gated delta net: linear attention whose state does not grow with the sequence."""

from olmo_core.nn.attention.gated_delta_net.config import GatedDeltaNetConfig
from olmo_core.nn.attention.gated_delta_net.layer import GatedDeltaNet

__all__ = ["GatedDeltaNet", "GatedDeltaNetConfig"]
