"""The configuration of a whole model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from olmo_core.config import Config, DType, StrEnum
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention.base import SequenceMixerConfig
from olmo_core.nn.attention.config import AttentionConfig
from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.feed_forward import FeedForwardConfig, FeedForwardType
from olmo_core.nn.init import InitMethod
from olmo_core.nn.layer_norm import LayerNorm, LayerNormConfig, LayerNormType
from olmo_core.nn.transformer.block import (
    NormalizedTransformerBlock,
    PostNormTransformerBlock,
    SandwichNormTransformerBlock,
    TransformerBlock,
)
from olmo_core.nn.transformer.lm_head import LMHead
from olmo_core.nn.transformer.model import Transformer


class TransformerBlockType(StrEnum):
    """The blocks by name."""

    pre_norm = "pre_norm"
    """:class:`~olmo_core.nn.transformer.TransformerBlock`"""
    post_norm = "post_norm"
    """:class:`~olmo_core.nn.transformer.PostNormTransformerBlock`"""
    sandwich_norm = "sandwich_norm"
    """:class:`~olmo_core.nn.transformer.SandwichNormTransformerBlock`"""
    ngpt = "ngpt"
    """:class:`~olmo_core.nn.transformer.NormalizedTransformerBlock`"""


def _rms_norm() -> LayerNormConfig:
    return LayerNormConfig(name=LayerNormType.rms, bias=False)


@dataclass
class TransformerBlockConfig(Config):
    """One kind of block.

    :raises OLMoConfigurationError: on build, if an ``ngpt`` block's parts are not the normalized
        ones.
    """

    name: TransformerBlockType = TransformerBlockType.pre_norm
    """Where the norms stand."""
    sequence_mixer: SequenceMixerConfig = field(
        default_factory=lambda: AttentionConfig(n_heads=8, bias=False)
    )
    """Attention or gated delta net."""
    feed_forward: FeedForwardConfig | None = None
    """The network after it. ``None`` is SwiGLU with a hidden width of 8/3 ``d_model``, rounded up
    to a multiple of 32, normalized in an ``ngpt`` block."""
    layer_norm: LayerNormConfig = field(default_factory=_rms_norm)
    """All norms of the block; ``ngpt`` blocks have none. If it names a ``dtype``, they keep that
    whatever the model's is."""
    alpha_init: float = 0.05
    """Where the eigen learning rates of an ``ngpt`` block start: about 1 / n_layers."""

    def feed_forward_of(self, d_model: int) -> FeedForwardConfig:
        """The feed-forward network of a block of width ``d_model``."""
        if self.feed_forward is not None:
            return self.feed_forward
        # 8/3: three matrices of this width hold what two of width 4 d_model would.
        hidden_size = -(-8 * d_model // (3 * 32)) * 32
        if self.name == TransformerBlockType.ngpt:
            return FeedForwardConfig(hidden_size, name=FeedForwardType.normalized)
        return FeedForwardConfig(hidden_size)

    def num_params(self, d_model: int) -> int:
        """The number of parameters of a block of width ``d_model``."""
        params = self.sequence_mixer.num_params(d_model)
        params += self.feed_forward_of(d_model).num_params(d_model)
        if self.name == TransformerBlockType.ngpt:
            return params + 2 * d_model
        norms = 4 if self.name == TransformerBlockType.sandwich_norm else 2
        return params + norms * self.layer_norm.num_params(d_model)

    def build(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        dtype: DType = DType.float32,
        init_device: str = "cpu",
        cache: BufferCache | None = None,
    ) -> nn.Module:
        """Build block ``layer_idx`` of ``n_layers``.

        :param dtype: of the parameters of mixer and feed-forward network, whatever their own
            configurations say, and of norms whose configuration names none.
        :param cache: where layers share RoPE tables.
        """
        mixer = self.sequence_mixer
        parts: dict[str, Any] = {
            "sequence_mixer": dataclasses.replace(mixer, dtype=dtype).build(  # type: ignore[call-arg]
                d_model,
                layer_idx=layer_idx,
                n_layers=n_layers,
                init_device=init_device,
                cache=cache,
            ),
            "feed_forward": self.feed_forward_of(d_model)
            .replace(dtype=dtype)
            .build(d_model, init_device=init_device),
        }
        if self.name == TransformerBlockType.ngpt:
            return NormalizedTransformerBlock(
                d_model=d_model,
                alpha_init=self.alpha_init,
                dtype=dtype.as_pt(),
                init_device=init_device,
                **parts,
            )
        names = ["sequence_mixer_norm", "feed_forward_norm"]
        if self.name == TransformerBlockType.sandwich_norm:
            names += ["sequence_mixer_post_norm", "feed_forward_post_norm"]
        for name in names:
            parts[name] = _build_norm(self.layer_norm, d_model, dtype, init_device)
        return _CLASSES[self.name](**parts)


_CLASSES: dict[TransformerBlockType, type[TransformerBlock]] = {
    TransformerBlockType.pre_norm: TransformerBlock,
    TransformerBlockType.post_norm: PostNormTransformerBlock,
    TransformerBlockType.sandwich_norm: SandwichNormTransformerBlock,
}


def _build_norm(norm: LayerNormConfig, size: int, dtype: DType, init_device: str) -> LayerNorm:
    return norm.replace(dtype=norm.dtype or dtype).build(size, init_device=init_device)


@dataclass
class TransformerConfig(Config):
    """A decoder-only language model.

    Three gated delta net layers to one of attention::

        TransformerConfig(
            d_model=512, vocab_size=257, n_layers=8, pattern=[0, 0, 0, 1],
            blocks=[
                TransformerBlockConfig(sequence_mixer=GatedDeltaNetConfig(n_heads=4)),
                TransformerBlockConfig(sequence_mixer=AttentionConfig(n_heads=8)),
            ],
        )
    """

    d_model: int
    """Width of the residual stream."""
    vocab_size: int
    n_layers: int
    blocks: list[TransformerBlockConfig] = field(default_factory=lambda: [TransformerBlockConfig()])
    """The kinds of block that the model uses."""
    pattern: list[int] | None = None
    """Indices into ``blocks``, repeated to cover all layers; ``None`` takes the blocks in turn."""
    layer_norm: LayerNormConfig = field(default_factory=_rms_norm)
    """The norm before the output; a model of ``ngpt`` blocks has none."""
    tie_embeddings: bool = False
    """Whether the output matrix is the embedding matrix."""
    embedding_scale: float | None = None
    """Factor of the embeddings where they enter the model; Gemma's is the root of ``d_model``."""
    init_method: InitMethod = InitMethod.normal
    init_std: float = 0.02
    """Of embeddings, and of what ``init_method`` scales from it."""
    loss_chunk_size: int | None = None
    """Compute the loss of this many tokens at a time and their logits again in backward: logits
    of a large vocabulary then never exist all at once."""
    dtype: DType = DType.float32
    """Of all parameters, those of norms apart that name their own."""

    def layer_blocks(self) -> list[TransformerBlockConfig]:
        """The block of each layer.

        :raises OLMoConfigurationError: for sizes below 1, an empty or wrong pattern, or ``ngpt``
            blocks among others.
        """
        for name in ("d_model", "vocab_size", "n_layers"):
            if getattr(self, name) < 1:
                raise OLMoConfigurationError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )
        if not self.blocks:
            raise OLMoConfigurationError("blocks is empty: give at least one kind of block")
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise OLMoConfigurationError(
                f"loss_chunk_size must be at least 1 or null, got {self.loss_chunk_size}"
            )
        pattern = list(range(len(self.blocks))) if self.pattern is None else self.pattern
        if not pattern or not all(0 <= i < len(self.blocks) for i in pattern):
            raise OLMoConfigurationError(
                f"pattern must hold indices of the {len(self.blocks)} blocks (0 to "
                f"{len(self.blocks) - 1}), got {pattern}"
            )
        layers = [self.blocks[pattern[i % len(pattern)]] for i in range(self.n_layers)]
        names = Counter(block.name for block in layers)
        if 0 < names[TransformerBlockType.ngpt] < self.n_layers:
            raise OLMoConfigurationError(
                "ngpt blocks keep the residual stream on the unit sphere and do not mix with "
                f"others, got {dict(names)}: use ngpt for all layers or for none"
            )
        return layers

    @property
    def is_normalized(self) -> bool:
        """Whether this is an nGPT."""
        return self.layer_blocks()[0].name == TransformerBlockType.ngpt

    def num_params(self) -> int:
        """The number of parameters of the model, embeddings included."""
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        blocks = sum(block.num_params(self.d_model) for block in self.layer_blocks())
        if self.is_normalized:
            return embeddings + blocks + self.vocab_size
        return embeddings + blocks + self.layer_norm.num_params(self.d_model)

    def build(self, *, init_device: str = "cpu") -> Transformer:
        """Build the model; :meth:`Transformer.init_weights` then draws its weights.

        :param init_device: where to create the parameters, e.g. "cpu" or "meta".
        :raises OLMoConfigurationError: as :meth:`layer_blocks`, and for parts that do not fit.
        """
        layers, dtype = self.layer_blocks(), self.dtype.as_pt()
        cache = BufferCache()
        norm = None
        if not self.is_normalized:
            norm = _build_norm(self.layer_norm, self.d_model, self.dtype, init_device)
        return Transformer(
            embeddings=nn.Embedding(self.vocab_size, self.d_model, dtype=dtype, device=init_device),
            blocks=[
                block.build(
                    self.d_model,
                    layer_idx=i,
                    n_layers=self.n_layers,
                    dtype=self.dtype,
                    init_device=init_device,
                    cache=cache,
                )
                for i, block in enumerate(layers)
            ],
            lm_head=LMHead(
                d_model=self.d_model,
                vocab_size=self.vocab_size,
                norm=norm,
                tied=self.tie_embeddings,
                scaled=self.is_normalized,
                loss_chunk_size=self.loss_chunk_size,
                dtype=dtype,
                init_device=init_device,
            ),
            embedding_scale=self.embedding_scale,
            init_method=self.init_method,
            init_std=self.init_std,
            config=self,
        )
