"""The sizes of a gated delta net, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from olmo_core.exceptions import OLMoConfigurationError

__all__ = ["GatedDeltaNetSizes"]


@dataclass(frozen=True)
class GatedDeltaNetSizes:
    """The sizes of the layer, checked."""

    d_model: int
    n_heads: int
    n_v_heads: int
    head_k_dim: int
    head_v_dim: int

    @classmethod
    def of(
        cls,
        d_model: int,
        n_heads: int,
        n_v_heads: int | None,
        head_dim: int | None,
        expand_v: float,
    ) -> GatedDeltaNetSizes:
        """:raises OLMoConfigurationError: If the sizes do not fit together."""
        sizes = {"d_model": d_model, "n_heads": n_heads}
        sizes |= {} if n_v_heads is None else {"n_v_heads": n_v_heads}
        sizes |= {} if head_dim is None else {"head_dim": head_dim}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise OLMoConfigurationError(f"{name} must be a positive int, got {size!r}.")
        n_v_heads = n_heads if n_v_heads is None else n_v_heads
        if n_v_heads % n_heads:
            raise OLMoConfigurationError(
                f"n_v_heads must be a multiple of n_heads, got {n_v_heads} and {n_heads}."
            )
        if head_dim is None:
            if d_model % n_heads:
                raise OLMoConfigurationError(
                    f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}. Give "
                    "head_dim to use another width for the heads."
                )
            head_dim = d_model // n_heads
        head_v_dim = head_dim * expand_v
        if not (0 < head_v_dim < math.inf and head_v_dim == int(head_v_dim)):
            raise OLMoConfigurationError(
                f"expand_v must make head_dim * expand_v a positive whole number, got {head_dim} * "
                f"{expand_v} = {head_v_dim}."
            )
        return cls(d_model, n_heads, n_v_heads, head_dim, int(head_v_dim))

    @property
    def key_dim(self) -> int:
        """Channels of the queries, and of the keys."""
        return self.n_heads * self.head_k_dim

    @property
    def value_dim(self) -> int:
        """Channels of the values."""
        return self.n_v_heads * self.head_v_dim

    @property
    def conv_channels(self) -> int:
        """Channels of all convolutions together."""
        return 2 * self.key_dim + self.value_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer."""
        outputs = {
            "w_q": self.key_dim,
            "w_k": self.key_dim,
            "w_v": self.value_dim,
            "w_a": self.n_v_heads,
            "w_b": self.n_v_heads,
            "w_g": self.value_dim,
        }
        sizes = {name: (self.d_model, n) for name, n in outputs.items()}
        return {**sizes, "w_out": (self.value_dim, self.d_model)}

    @property
    def num_projection_weights(self) -> int:
        """Weights of all linear layers together."""
        return sum(n * m for n, m in self.projections.values())
