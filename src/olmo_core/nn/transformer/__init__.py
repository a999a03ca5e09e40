"""A small language model built from any mix of the sequence mixers."""

from olmo_core.nn.transformer.block import (
    NormalizedTransformerBlock,
    PostNormTransformerBlock,
    SandwichNormTransformerBlock,
    TransformerBlock,
)
from olmo_core.nn.transformer.config import (
    TransformerBlockConfig,
    TransformerBlockType,
    TransformerConfig,
)
from olmo_core.nn.transformer.generation import generate
from olmo_core.nn.transformer.init import InitMethod
from olmo_core.nn.transformer.lm_head import LMHead
from olmo_core.nn.transformer.model import Transformer

__all__ = [
    "InitMethod",
    "LMHead",
    "NormalizedTransformerBlock",
    "PostNormTransformerBlock",
    "SandwichNormTransformerBlock",
    "Transformer",
    "TransformerBlock",
    "TransformerBlockConfig",
    "TransformerBlockType",
    "TransformerConfig",
    "generate",
]
