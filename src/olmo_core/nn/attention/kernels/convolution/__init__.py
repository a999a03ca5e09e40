"""The short causal convolution of up to three tensors at once: the op, and what computes it."""

from .op import ROWS, Stream, short_convolution

__all__ = ["ROWS", "Stream", "short_convolution"]
