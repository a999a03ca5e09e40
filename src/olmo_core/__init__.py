"""Attention and other sequence mixers for transformers; see :mod:`olmo_core.nn.attention`."""

__version__ = "0.1.0"
