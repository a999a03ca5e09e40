"""Weights of Hugging Face's transformers and of GGUF files, in and out."""

from olmo_core.hf.config import PretrainedError
from olmo_core.hf.load import load_config, load_mixer, load_model

__all__ = ["PretrainedError", "load_config", "load_mixer", "load_model"]
