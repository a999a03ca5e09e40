"""A small language model built from any mix of the sequence mixers."""

from olmo_core.nn.transformer.block import (
    NormalizedTransformerBlock,
    PostNormTransformerBlock,
    TransformerBlock,
)
from olmo_core.nn.transformer.config import (
    TransformerBlockConfig,
    TransformerBlockType,
    TransformerConfig,
)
from olmo_core.nn.transformer.generation import generate
from olmo_core.nn.transformer.init import InitMethod
from olmo_core.nn.transformer.model import Transformer

__all__ = [
    "InitMethod",
    "NormalizedTransformerBlock",
    "PostNormTransformerBlock",
    "Transformer",
    "TransformerBlock",
    "TransformerBlockConfig",
    "TransformerBlockType",
    "TransformerConfig",
    "generate",
]
