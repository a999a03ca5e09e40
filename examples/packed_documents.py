"""Documents packed into one row: what a model of transformers makes of them, and what ours does.

    python examples/packed_documents.py

Four documents stand in one row, with positions that restart and an attention mask of ones, as data
collators give them. Each document's logits should be those that it has alone. Tiny random models,
a few seconds on a CPU; needs transformers.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OlmoHybridConfig, OlmoHybridForCausalLM
from transformers.utils import logging

from olmo_core.data import doc_lens_from_lengths
from olmo_core.hf import load_model, patch_gdn, register

LENGTHS = [7, 30, 1, 26]
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "eos_token_id": None,
}


def show(name: str, model: Any) -> None:
    """Print how far packed logits are from separate ones."""
    torch.manual_seed(0)
    ids = torch.randint(100, (1, sum(LENGTHS)))
    packed = {
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "attention_mask": torch.ones_like(ids),
    }
    alone = torch.cat([model(piece).logits for piece in ids.split(LENGTHS, dim=1)], dim=1)

    def error(logits: Tensor) -> str:
        return f"{float((logits - alone).abs().max()):8.1e}"

    print(f"{name} (logits up to {float(alone.abs().max()):.1f}); packed minus separate:")
    print(f"  transformers                        {error(model(ids, **packed).logits)}")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = load_model(folder)
    lens = doc_lens_from_lengths(LENGTHS)
    print(f"  loaded into this library            {error(ours(ids, **lens._asdict()))}")
    register()
    model.set_attn_implementation("olmo_core")
    if "Hybrid" in name:
        patch_gdn(model)
    print(f"  transformers on this library's ops  {error(model(ids, **packed).logits)}")


@torch.no_grad()
def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(1)
    show("Llama", LlamaForCausalLM(LlamaConfig(**SIZES)).eval())
    show("OlmoHybrid", OlmoHybridForCausalLM(OlmoHybridConfig(**SIZES)).eval())


if __name__ == "__main__":
    main()
