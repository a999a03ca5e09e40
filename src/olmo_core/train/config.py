"""The configuration of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from olmo_core.config import Config, DType
from olmo_core.exceptions import OLMoConfigurationError
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
        at_least_one = ["steps", "eval_every", "eval_batches", "save_every", "log_every"]
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise OLMoConfigurationError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )
        data, optimizer = self.data, self.optimizer
        for name in ("sequence_length", "batch_size"):
            if getattr(data, name) < 1:
                raise OLMoConfigurationError(
                    f"data.{name} must be at least 1, got {getattr(data, name)}"
                )
        if data.max_doc_len is not None and not 1 <= data.max_doc_len <= data.sequence_length:
            raise OLMoConfigurationError(
                f"data.max_doc_len must lie in [1, data.sequence_length={data.sequence_length}], "
                f"got {data.max_doc_len}"
            )
        if not 0 < data.held_out < 1:
            raise OLMoConfigurationError(f"data.held_out must lie in (0, 1), got {data.held_out}")
        if not optimizer.lr > 0:
            raise OLMoConfigurationError(f"optimizer.lr must be positive, got {optimizer.lr}")
        if not all(0 <= beta < 1 for beta in optimizer.betas):
            raise OLMoConfigurationError(
                f"optimizer.betas must lie in [0, 1), got {list(optimizer.betas)}"
            )
        for name in ("eps", "weight_decay", "warmup_steps", "final_lr_fraction"):
            if not getattr(optimizer, name) >= 0:
                raise OLMoConfigurationError(
                    f"optimizer.{name} must not be negative, got {getattr(optimizer, name)}"
                )
        if optimizer.grad_clip is not None and not optimizer.grad_clip > 0:
            raise OLMoConfigurationError(
                f"optimizer.grad_clip must be positive or null, got {optimizer.grad_clip}"
            )
        if not 0 <= self.seed < 2**32:
            raise OLMoConfigurationError(f"seed must lie in [0, 2**32 - 1], got {self.seed}")
        self.model.layer_blocks()
