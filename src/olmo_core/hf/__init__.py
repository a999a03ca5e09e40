"""Weights of Hugging Face's transformers and of GGUF files, in and out."""

from olmo_core.hf.config import PretrainedError
from olmo_core.hf.export import save_model
from olmo_core.hf.interface import register
from olmo_core.hf.load import load_config, load_mixer, load_model
from olmo_core.hf.patch_gdn import patch_gdn
from olmo_core.hf.smollm2 import smollm2_path
from olmo_core.hf.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "PretrainedError",
    "Tokenizer",
    "load_config",
    "load_mixer",
    "load_model",
    "load_tokenizer",
    "patch_gdn",
    "register",
    "save_model",
    "smollm2_path",
]
