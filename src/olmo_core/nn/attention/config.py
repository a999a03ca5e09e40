"""The options of attention layers, as data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from olmo_core.config import Config, DType, StrEnum
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention.attention import Attention, NormalizedAttention
from olmo_core.nn.attention.backend import AttentionBackendName
from olmo_core.nn.attention.base import SequenceMixer, SequenceMixerConfig
from olmo_core.nn.attention.fused_attention import FusedAttention
from olmo_core.nn.attention.gate import GateConfig, GateGranularity
from olmo_core.nn.attention.softmax_attention import AttentionShape
from olmo_core.nn.layer_norm import LayerNormConfig
from olmo_core.nn.rope import RoPEConfig

if TYPE_CHECKING:
    from olmo_core.nn.buffer_cache import BufferCache

__all__ = [
    "AttentionBackendName",
    "AttentionConfig",
    "AttentionType",
    "GateConfig",
    "GateGranularity",
    "SlidingWindowAttentionConfig",
]


class AttentionType(StrEnum):
    """An enumeration of the different attention implementations."""

    default = "default"
    """:class:`Attention`"""
    fused = "fused"
    """:class:`FusedAttention`"""
    normalized = "normalized"
    """:class:`NormalizedAttention`"""


@dataclass
class SlidingWindowAttentionConfig(Config):
    """Which layers use sliding window attention, and with which windows."""

    pattern: list[int]
    """The window sizes, repeated to cover all layers; -1 is full attention. With
    ``[4096, 4096, 4096, -1]`` every fourth layer is full. A window counts keys, the query's own
    included."""
    force_full_attention_on_first_layer: bool = True
    """Whether the first layer is full whatever the pattern, which then starts at the second."""
    force_full_attention_on_last_layer: bool = True
    """Whether the last layer is full whatever the pattern."""

    def __post_init__(self) -> None:
        good = isinstance(self.pattern, (list, tuple)) and len(self.pattern) > 0
        if not good or any(
            isinstance(w, bool) or not isinstance(w, int) or not (w == -1 or w > 0)
            for w in self.pattern
        ):
            raise OLMoConfigurationError(
                "A window pattern is a list of window sizes, each -1 (full attention) or a "
                f"positive int, got {self.pattern!r}."
            )

    def _window(self, layer_idx: int, n_layers: int) -> int:
        if not 0 <= layer_idx < n_layers:
            raise ValueError(f"layer_idx must be in [0, {n_layers}), got {layer_idx}.")
        first = self.force_full_attention_on_first_layer
        if (first and layer_idx == 0) or (
            self.force_full_attention_on_last_layer and layer_idx == n_layers - 1
        ):
            return -1
        return self.pattern[(layer_idx - first) % len(self.pattern)]

    def _warn_without_effect(self, n_layers: int) -> None:
        """Say so if the pattern has windows and none of ``n_layers`` layers gets one."""
        if any(w != -1 for w in self.pattern) and not any(
            self.should_use_swa(i, n_layers) for i in range(n_layers)
        ):
            warnings.warn(
                f"The window pattern {list(self.pattern)} reaches none of {n_layers} layers: the "
                "first and the last are full by default. Set "
                "force_full_attention_on_first_layer=False or "
                "force_full_attention_on_last_layer=False.",
                UserWarning,
                stacklevel=3,
            )

    def should_use_swa(self, layer_idx: int, n_layers: int) -> bool:
        """Whether the layer uses sliding window attention.

        :raises ValueError: If there is no such layer.
        """
        return self._window(layer_idx, n_layers) != -1

    def get_window_size(self, layer_idx: int, n_layers: int) -> int:
        """The window of a layer that has one.

        :raises ValueError: If the layer is full, or there is no such layer.
        """
        window = self._window(layer_idx, n_layers)
        if window == -1:
            raise ValueError(
                f"Layer {layer_idx} of {n_layers} has no window: it uses full attention. Ask "
                "should_use_swa first."
            )
        return window


@SequenceMixerConfig.register("attention")
@dataclass
class AttentionConfig(SequenceMixerConfig[SequenceMixer]):
    """A configuration class for easily building any of the different attention modules.

    See :class:`Attention`, :class:`FusedAttention` and :class:`NormalizedAttention` for the
    options. None means the default of the class.
    """

    name: AttentionType = AttentionType.default
    """The name of the implementation."""
    n_heads: int = 16
    n_kv_heads: int | None = None
    head_dim: int | None = None
    bias: bool | None = None
    gate: GateConfig | None = None
    rope: RoPEConfig | None = None
    clip_qkv: float | None = None
    qk_norm: LayerNormConfig | None = None
    dropout: float | None = None
    use_flash: bool | None = None
    backend: AttentionBackendName | None = None
    dtype: DType = DType.float32
    sliding_window: SlidingWindowAttentionConfig | None = None
    use_head_qk_norm: bool | None = None

    def num_params(self, d_model: int) -> int:
        """The number of params that the attention implementation will have once built.

        :param d_model: The model dimensionality.
        """
        shape = AttentionShape.of(d_model, self.n_heads, self.n_kv_heads, self.head_dim)
        name = AttentionType(self.name)
        bias = name != AttentionType.normalized and self.bias is not False
        q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        outputs = [q, kv, kv]
        if self.gate is not None:
            outputs.append(self.gate.num_values(shape.n_heads, shape.head_dim))
        params = sum(n * (d_model + bias) for n in outputs) + d_model * (q + bias)
        if self.qk_norm is not None:
            sizes = (shape.head_dim, shape.head_dim) if self.use_head_qk_norm else (q, kv)
            params += sum(self.qk_norm.num_params(size) for size in sizes)
        if name == AttentionType.normalized:
            params += q + kv
        return params

    def build(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        init_device: str = "cpu",
        cache: BufferCache | None = None,
    ) -> SequenceMixer:
        """Build the corresponding attention module.

        :param d_model: The model dimensionality.
        :param layer_idx: The layer, which decides whether it has a window.
        :param init_device: The device to initialize the parameters on, e.g. "cpu", "meta".
        :raises OLMoConfigurationError: If an option is wrong, or one that the class lacks.
        :raises ValueError: If there is no such layer.
        """
        if not 0 <= layer_idx < n_layers:
            raise ValueError(f"layer_idx must be in [0, {n_layers}), got {layer_idx}.")
        window = None
        if self.sliding_window is not None:
            if self.sliding_window.should_use_swa(layer_idx, n_layers):
                window = self.sliding_window.get_window_size(layer_idx, n_layers)
            elif layer_idx == 0:
                self.sliding_window._warn_without_effect(n_layers)
        options: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "n_heads", "n_kv_heads", "head_dim", "bias", "gate", "rope", "clip_qkv", "qk_norm",
                "dropout", "use_flash", "backend", "use_head_qk_norm",
            )
        }  # fmt: skip
        options["window_size"] = window
        options = {name: value for name, value in options.items() if value is not None}
        match AttentionType(self.name):
            case AttentionType.default:
                cls: Any = Attention
                lacks: tuple[str, ...] = ()
            case AttentionType.fused:
                cls = FusedAttention
                lacks = (
                    "n_kv_heads",
                    "head_dim",
                    "gate",
                    "qk_norm",
                    "use_flash",
                    "use_head_qk_norm",
                )
            case AttentionType.normalized:
                cls = NormalizedAttention
                lacks = ("head_dim", "bias", "gate", "clip_qkv", "dropout", "use_head_qk_norm")
        refused = [name for name in lacks if options.get(name)]
        if refused:
            raise OLMoConfigurationError(
                f"{cls.__name__} has no option {', '.join(refused)}. Leave it out, or use "
                f"name='{AttentionType.default}'."
            )
        options = {name: value for name, value in options.items() if name not in lacks}
        return cls(
            d_model=d_model,
            dtype=DType(self.dtype).as_pt(),
            init_device=init_device,
            cache=cache,
            **options,
        )
