"""A sigmoid gate on the output of attention, before the output projection.

Qiu et al., "Gated Attention for Large Language Models" (2025).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from olmo_core.config import Config, StrEnum
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention.kernels.gates import sigmoid_gate


class GateGranularity(StrEnum):
    """How many gate values there are."""

    headwise = "headwise"
    """One gate value per attention head, broadcast across the head dimension."""
    elementwise = "elementwise"
    """One gate value per output element."""


@dataclass
class GateConfig(Config):
    """Options of the gate."""

    granularity: GateGranularity = GateGranularity.headwise
    """The granularity of gating to use."""
    full_precision: bool = True
    """Whether to apply the gate in float32 at least, whatever the input's dtype."""

    def __post_init__(self) -> None:
        try:
            self.granularity = GateGranularity(self.granularity)
        except ValueError:
            choices = ", ".join(GateGranularity)
            raise OLMoConfigurationError(
                f"A gate's granularity is one of {choices}, got {self.granularity!r}."
            ) from None

    def num_values(self, n_heads: int, head_dim: int) -> int:
        """Gate values per token."""
        return n_heads * (1 if self.granularity == GateGranularity.headwise else head_dim)


def apply_gate(att: Tensor, logits: Tensor, config: GateConfig) -> Tensor:
    """``att * sigmoid(logits)``.

    :param att: ``(batch, seq, heads, head_dim)``.
    :param logits: ``(batch, seq, heads)``, or ``(batch, seq, heads * head_dim)`` elementwise.
    :returns: Like ``att``.
    """
    headwise = config.granularity == GateGranularity.headwise
    logits = logits[..., None] if headwise else logits.view(att.shape)
    return sigmoid_gate(att, logits, rounded=not config.full_precision)
