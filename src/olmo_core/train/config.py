"""The configuration of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from olmo_core.config import Config, DType
from olmo_core.data import VOCAB_SIZE, load_vocabulary
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.memory import expect_room
from olmo_core.nn.transformer import TransformerConfig


@dataclass
class DataConfig(Config):
    """What to train on, and how it is packed."""

    path: str | None = None
    """A text or .jsonl file, or a folder of them; ``None`` is the embedded corpus."""
    sequence_length: int = 512
    """Tokens of a row."""
    batch_size: int = 8
    """Rows of a batch."""
    max_doc_len: int | None = None
    """Longer documents are cut into pieces of this many tokens; ``None`` is a row's length."""
    tokenizer: str | None = None
    """A ``tokenizer.json``, whose tokens the model learns; ``None`` is bytes."""
    held_out: float = 0.05
    """The share of the text, in whole documents, that is not trained on."""


@dataclass
class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101) with warm-up and cosine decay."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Of matrices; vectors and scalars do not decay."""
    warmup_steps: int = 20
    final_lr_fraction: float = 0.1
    """The last step's learning rate over the highest."""
    grad_clip: float | None = 1.0
    """Scale gradients down to at most this total norm."""


@dataclass
class TrainConfig(Config):
    """A run. Everything that its losses depend on stands here."""

    model: TransformerConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 1000
    seed: int = 0
    eval_every: int = 100
    """Steps from one look at the held-out text to the next."""
    eval_batches: int = 16
    """Batches of held-out text in each look but the last, which takes four times as many."""
    save_every: int = 50
    """Steps from one checkpoint to the next."""
    log_every: int = 5
    """Steps from one line of ``metrics.jsonl``'s flush to the next: the device is read then."""
    device: str | None = None
    """``None`` is CUDA if there is a device, else the CPU."""
    autocast: DType | None = None
    """Compute in this type, bfloat16 for example; parameters keep theirs."""
    compile: bool = False
    """Whether to ``torch.compile`` the model: worth its minute on a GPU."""

    def check(self) -> None:
        """:raises OLMoConfigurationError: for values that no run could use."""
        _expect_numbers(self.as_dict())
        self._expect_vocabulary()
        for name in ("steps", "eval_every", "eval_batches", "save_every", "log_every"):
            _expect(getattr(self, name) >= 1, self, name, "must be at least 1")
        _expect(0 <= self.seed < 2**32, self, "seed", "must lie in [0, 2**32 - 1]")
        if self.autocast not in (None, DType.bfloat16, DType.float16):
            raise OLMoConfigurationError(
                f"autocast must be bfloat16, float16 or null, got {self.autocast}: set model.dtype "
                "to compute in another type"
            )
        self._check_data()
        self._check_optimizer()
        # Of Python's memory alone, a block's modules take more than this.
        n_bytes = 10_000 * self.model.n_layers
        expect_room(f"the layers of model.n_layers={self.model.n_layers}", n_bytes, _HOST)
        self.model.layer_blocks()

    def _expect_vocabulary(self) -> None:
        if self.data.tokenizer is None and self.model.vocab_size != VOCAB_SIZE:
            raise OLMoConfigurationError(
                f"model.vocab_size must be {VOCAB_SIZE}, the 256 bytes and the token that ends a "
                f"document, got {self.model.vocab_size}"
            )
        needed = load_vocabulary(self.data.tokenizer).size
        if self.model.vocab_size < needed:
            raise OLMoConfigurationError(
                f"model.vocab_size must be at least {needed}, the tokens of "
                f"{self.data.tokenizer} and the one that ends a document, got "
                f"{self.model.vocab_size}"
            )

    def _check_data(self) -> None:
        data = self.data
        for name in ("sequence_length", "batch_size"):
            _expect(getattr(data, name) >= 1, data, name, "must be at least 1")
        if data.max_doc_len is not None and not 1 <= data.max_doc_len <= data.sequence_length:
            raise OLMoConfigurationError(
                f"data.max_doc_len must lie in [1, data.sequence_length={data.sequence_length}], "
                f"got {data.max_doc_len}"
            )
        _expect(0 < data.held_out < 1, data, "held_out", "must lie in (0, 1)")
        if data.path is not None and not data.path.strip():
            raise OLMoConfigurationError(
                "data.path is empty: name a file or folder, or leave it out for the embedded corpus"
            )

    def _check_optimizer(self) -> None:
        optimizer = self.optimizer
        _expect(optimizer.lr > 0, optimizer, "lr", "must be positive")
        inside = all(0 <= beta < 1 for beta in optimizer.betas)
        _expect(inside, optimizer, "betas", "must lie in [0, 1)")
        for name in ("eps", "weight_decay", "warmup_steps", "final_lr_fraction"):
            _expect(getattr(optimizer, name) >= 0, optimizer, name, "must not be negative")
        clips = optimizer.grad_clip is None or optimizer.grad_clip > 0
        _expect(clips, optimizer, "grad_clip", "must be positive or null")
        _expect(self.model.init_std > 0, self.model, "init_std", "must be positive")


_HOST = torch.device("cpu")
_PREFIX = {DataConfig: "data.", OptimizerConfig: "optimizer.", TransformerConfig: "model."}


def _expect(holds: bool, config: Config, name: str, what: str) -> None:
    if not holds:
        value = getattr(config, name)
        value = list(value) if isinstance(value, tuple) else value
        prefix = _PREFIX.get(type(config), "")
        raise OLMoConfigurationError(f"{prefix}{name} {what}, got {value}")


def _expect_numbers(value: object, where: str = "") -> None:
    """Numbers that computers compute with, whatever they mean: finite, and of 64 bits."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            _expect_numbers(item, f"{where}.{key}".removeprefix("."))
    elif isinstance(value, float) and not math.isfinite(value):
        raise OLMoConfigurationError(f"{where} must be finite, got {value}")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise OLMoConfigurationError(f"{where} must be an integer of 64 bits, got {value}")
