"""The short causal convolution of up to three tensors at once: the op, and what computes it."""

from .op import ROWS, Stream, convolution_ahead, short_convolution

__all__ = ["ROWS", "Stream", "convolution_ahead", "short_convolution"]
