"""The blocks of a transformer: a sequence mixer and a feed-forward network on a residual stream.

B: batch, T: sequence length, d: width of the residual stream (``d_model``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention.base import SequenceMixer
from olmo_core.nn.feed_forward import FeedForward
from olmo_core.nn.functional import l2_normalize
from olmo_core.nn.init import InitMethod
from olmo_core.nn.layer_norm import LayerNorm


class TransformerBlock(nn.Module):
    """Pre-norm: h = x + mixer(norm(x)); y = h + feed_forward(norm(h))."""

    def __init__(
        self,
        *,
        sequence_mixer: SequenceMixer,
        feed_forward: FeedForward,
        sequence_mixer_norm: LayerNorm,
        feed_forward_norm: LayerNorm,
    ) -> None:
        super().__init__()
        self.sequence_mixer = sequence_mixer
        self.sequence_mixer_norm = sequence_mixer_norm
        self.feed_forward = feed_forward
        self.feed_forward_norm = feed_forward_norm

    def forward(self, x: Tensor, **mixer_kwargs: Any) -> Tensor:
        """(B, T, d) -> (B, T, d); keywords go to the mixer."""
        h = x + self.sequence_mixer(self.sequence_mixer_norm(x), **mixer_kwargs)
        return h + self.feed_forward(self.feed_forward_norm(h))

    def init_weights(
        self,
        *,
        init_method: InitMethod,
        d_model: int,
        block_idx: int,
        num_blocks: int,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw all parameters anew; norms return to where they start."""
        for part in (self.sequence_mixer, self.feed_forward):
            part.init_weights(
                init_method=init_method,
                d_model=d_model,
                block_idx=block_idx,
                num_blocks=num_blocks,
                std=std,
                generator=generator,
            )
        for child in self.children():
            if isinstance(child, LayerNorm):
                child.reset_parameters()


class PostNormTransformerBlock(TransformerBlock):
    """OLMo 2's reordered norm: h = x + norm(mixer(x)); y = h + norm(feed_forward(h)).

    (arXiv:2501.00656, section 3.3.)
    """

    def forward(self, x: Tensor, **mixer_kwargs: Any) -> Tensor:
        """(B, T, d) -> (B, T, d); keywords go to the mixer."""
        h = x + self.sequence_mixer_norm(self.sequence_mixer(x, **mixer_kwargs))
        return h + self.feed_forward_norm(self.feed_forward(h))


class SandwichNormTransformerBlock(TransformerBlock):
    """Gemma 2's norms before and after each part (arXiv:2408.00118, section 2):

    h = x + post_norm(mixer(norm(x))); y = h + post_norm(feed_forward(norm(h))).
    """

    def __init__(
        self,
        *,
        sequence_mixer_post_norm: LayerNorm,
        feed_forward_post_norm: LayerNorm,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        self.sequence_mixer_post_norm = sequence_mixer_post_norm
        self.feed_forward_post_norm = feed_forward_post_norm

    def forward(self, x: Tensor, **mixer_kwargs: Any) -> Tensor:
        """(B, T, d) -> (B, T, d); keywords go to the mixer."""
        mixed = self.sequence_mixer(self.sequence_mixer_norm(x), **mixer_kwargs)
        h = x + self.sequence_mixer_post_norm(mixed)
        return h + self.feed_forward_post_norm(self.feed_forward(self.feed_forward_norm(h)))


class NormalizedTransformerBlock(nn.Module):
    """nGPT: the residual stream stays on the unit sphere (arXiv:2410.01131, equations 10 and 11).

    h = norm(x + a_m * (norm(mixer(x)) - x)); y = norm(h + a_f * (norm(feed_forward(h)) - h)),
    with norm(x) = x / |x| and the learned eigen learning rates a of each dimension. They start at
    ``alpha_init`` and are stored as ``mixer_alpha`` and ``feed_forward_alpha`` at the scale d^-1/2
    of the other parameters, so that one learning rate suits all.

    :raises OLMoConfigurationError: if the mixer cannot normalize its matrices.
    """

    def __init__(
        self,
        *,
        d_model: int,
        sequence_mixer: SequenceMixer,
        feed_forward: FeedForward,
        alpha_init: float = 0.05,
        dtype: torch.dtype = torch.float32,
        init_device: str = "cpu",
    ) -> None:
        super().__init__()
        for part in (sequence_mixer, feed_forward):
            if not hasattr(part, "normalize_matrices"):
                raise OLMoConfigurationError(
                    "an ngpt block needs parts with normalized matrices, "
                    f"{type(part).__name__} has none: choose the normalized attention and "
                    "feed-forward, or another block"
                )
        self.alpha_init = alpha_init
        self.alpha_scale = d_model**-0.5
        self.sequence_mixer = sequence_mixer
        self.feed_forward = feed_forward
        self.mixer_alpha = nn.Parameter(torch.empty(d_model, dtype=dtype, device=init_device))
        self.feed_forward_alpha = nn.Parameter(torch.empty_like(self.mixer_alpha))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set both eigen learning rates to where they start."""
        self.mixer_alpha.fill_(self.alpha_scale)
        self.feed_forward_alpha.fill_(self.alpha_scale)

    def forward(self, x: Tensor, **mixer_kwargs: Any) -> Tensor:
        """(B, T, d) -> (B, T, d), unit vectors to unit vectors; keywords go to the mixer."""
        h = self._step(x, self.sequence_mixer(x, **mixer_kwargs), self.mixer_alpha)
        return self._step(h, self.feed_forward(h), self.feed_forward_alpha)

    def _step(self, x: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
        rate = (alpha * (self.alpha_init / self.alpha_scale)).to(x.dtype)
        # Under autocast a target is narrower than the stream.
        return l2_normalize(torch.lerp(x, l2_normalize(target.to(x.dtype)), rate))

    def init_weights(
        self,
        *,
        init_method: InitMethod,
        d_model: int,
        block_idx: int,
        num_blocks: int,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw all parameters anew, normalized."""
        for part in (self.sequence_mixer, self.feed_forward):
            part.init_weights(
                init_method=init_method,
                d_model=d_model,
                block_idx=block_idx,
                num_blocks=num_blocks,
                std=std,
                generator=generator,
            )
        self.reset_parameters()
        self.normalize_matrices()

    def normalize_matrices(self) -> None:
        """Put every matrix back on the sphere: call it after each optimizer step."""
        self.sequence_mixer.normalize_matrices()  # type: ignore[operator]
        self.feed_forward.normalize_matrices()  # type: ignore[operator]
