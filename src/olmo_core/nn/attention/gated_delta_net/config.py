"""The options of a gated delta net, as data."""

from __future__ import annotations

from dataclasses import dataclass

from olmo_core.config import DType
from olmo_core.nn.attention.base import SequenceMixerConfig
from olmo_core.nn.attention.gated_delta_net.layer import GatedDeltaNet
from olmo_core.nn.attention.gated_delta_net.sizes import GatedDeltaNetSizes
from olmo_core.nn.buffer_cache import BufferCache


@SequenceMixerConfig.register("gated_delta_net")
@dataclass
class GatedDeltaNetConfig(SequenceMixerConfig[GatedDeltaNet]):
    """Configuration for :class:`GatedDeltaNet`, which describes the options."""

    n_heads: int = 16
    """The number of attention heads."""
    n_v_heads: int | None = None
    """The number of value heads; ``n_heads`` if None. If it is larger, grouped value attention is
    applied: it makes the state larger, whose size, unlike that of a KV cache, does not grow with
    the sequence."""
    head_dim: int | None = None
    """The dimension of each head; ``d_model // n_heads`` if None."""
    expand_v: float = 2.0
    """``head_v_dim = head_dim * expand_v``, which makes the state larger as well."""
    allow_neg_eigval: bool = True
    """Allow negative eigenvalues in the recurrent dynamics."""
    conv_size: int = 4
    """The kernel size of the short convolution."""
    conv_bias: bool = False
    """Whether to use bias in the short convolution."""
    norm_eps: float = 1e-5
    """The epsilon value for the normalization layer."""
    dtype: DType = DType.float32
    """The default data type to use for parameters."""

    def num_params(self, d_model: int) -> int:
        """The number of params that the GatedDeltaNet will have once built.

        :param d_model: The model dimensionality.
        """
        sizes = GatedDeltaNetSizes.of(
            d_model, self.n_heads, self.n_v_heads, self.head_dim, self.expand_v
        )
        convolutions = sizes.conv_channels * (self.conv_size + bool(self.conv_bias))
        gates_and_norm = 2 * sizes.n_v_heads + sizes.head_v_dim
        return sizes.num_projection_weights + convolutions + gates_and_norm

    def build(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        init_device: str = "cpu",
        cache: BufferCache | None = None,
    ) -> GatedDeltaNet:
        """Build the GatedDeltaNet module.

        :param d_model: The model dimensionality.
        :param layer_idx: The layer index (unused).
        :param n_layers: The total number of layers (unused).
        :param init_device: The device to initialize the parameters on, e.g. "cpu", "meta".
        :param cache: Optional buffer cache (unused).
        :raises OLMoConfigurationError: If an option is wrong.
        """
        return GatedDeltaNet(
            d_model=d_model,
            n_heads=self.n_heads,
            n_v_heads=self.n_v_heads,
            head_dim=self.head_dim,
            expand_v=self.expand_v,
            allow_neg_eigval=self.allow_neg_eigval,
            conv_size=self.conv_size,
            conv_bias=self.conv_bias,
            norm_eps=self.norm_eps,
            dtype=DType(self.dtype).as_pt(),
            init_device=init_device,
        )
