"""How large everything is that :mod:`benchmarks.context_parallel` measures."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CPU", "GPU", "TINY", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """Of the times. Tokens are a rank's."""

    tokens: tuple[int, ...]
    """Those with a target first, so that a time limit loses the others."""
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    document: tuple[int, int]
    """The shortest and the longest of the documents of nearly equal length."""
    median_document: int
    """Of the log-normal documents."""
    kernels: tuple[str, ...]
    delta: tuple[int, int, int, int]
    """The delta net: its model's width, heads, and the sizes of a head's keys and values."""
    delta_tokens: tuple[int, ...]
    traced_tokens: int
    planned_documents: int
    train_steps: int
    train_options: tuple[str, ...]
    """Of ``olmo-core train``, beside the steps. The batch has a row for each rank."""
    seconds: float
    """Spent on samples of one number, about."""
    samples: tuple[int, int]
    """Of one number, at least and at most."""


GPU = Sizes(
    tokens=(8192, 32768, 4096, 16384, 65536),
    heads=32,
    kv_heads=8,
    head_dim=128,
    window=4096,
    document=(12288, 24576),
    median_document=1500,
    kernels=("torch", "flash_4"),
    delta=(2048, 16, 128, 256),
    delta_tokens=(1024, 8192, 32768),
    traced_tokens=32768,
    planned_documents=2000,
    train_steps=30,
    train_options=(
        "model.d_model=2048", "model.n_layers=4", "model.dtype=bfloat16", "optimizer.lr=1e-4",
        "model.blocks.0.sequence_mixer.n_heads=16", "data.sequence_length=8192",
        "data.max_doc_len=8192",
    ),
    seconds=0.5,
    samples=(3, 20),
)  # fmt: skip

CPU = Sizes(
    tokens=(256, 1024),
    heads=8,
    kv_heads=4,
    head_dim=32,
    window=128,
    document=(384, 768),
    median_document=100,
    kernels=("torch",),
    delta=(128, 4, 32, 64),
    delta_tokens=(256, 1024),
    traced_tokens=1024,
    planned_documents=2000,
    train_steps=12,
    train_options=("data.sequence_length=512",),
    seconds=0.3,
    samples=(3, 9),
)

TINY = Sizes(
    tokens=(64,),
    heads=8,
    kv_heads=4,
    head_dim=16,
    window=32,
    document=(24, 48),
    median_document=25,
    kernels=("torch",),
    delta=(32, 4, 8, 16),
    delta_tokens=(64,),
    traced_tokens=64,
    planned_documents=20,
    train_steps=4,
    train_options=(
        "model.d_model=16", "model.n_layers=2", "model.blocks.0.sequence_mixer.head_dim=8",
        "data.sequence_length=64", "data.max_doc_len=48",
    ),
    seconds=0.02,
    samples=(1, 3),
)  # fmt: skip
