"""The training loop: the same losses to the last bit, interrupted or not."""

from __future__ import annotations

import fcntl
import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from olmo_core.data import EOD, PackedBatch, PackedDocuments, load_documents, split_documents
from olmo_core.exceptions import OLMoConfigurationError, OLMoError
from olmo_core.nn.transformer import Transformer
from olmo_core.train.bigram import Bigram, bits_per_byte
from olmo_core.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    random_state,
    retire_newer,
    save_checkpoint,
    set_random_state,
)
from olmo_core.train.config import TrainConfig
from olmo_core.train.folder import remove_run
from olmo_core.train.metrics import Metrics, Row
from olmo_core.train.schedule import cosine_with_warmup
from olmo_core.utils import get_default_device, seed_all

# The last look at the held-out text takes this many times the batches of the others.
FINAL_LOOK = 4


class TrainingError(OLMoError):
    """A run that cannot start or go on."""


class Observer(Protocol):
    """Watches a run; a progress bar for example."""

    def steps(self, rows: list[Row]) -> None:
        """New rows of the metrics, in order."""

    def saved(self, folder: Path) -> None:
        """A checkpoint is complete."""


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    step: int
    held_out: float | None
    """Bits per byte of the held-out text; ``None`` if the run was stopped."""
    bigram: float
    """The bigram model's on the same tokens."""
    checkpoint: Path
    stopped_by: int | None
    """The signal that stopped the run early."""


class Trainer:
    """One run in one folder.

    :param config: see :class:`TrainConfig`.
    :param run: the folder for checkpoints and ``metrics.jsonl``; made if it is missing.
    :param checkpoint: where to go on, of a run with the same model.
    :param overwrite: whether :meth:`fit` first removes what an earlier run left in the folder.
    :raises OLMoError: for a configuration, data or checkpoint that does not fit.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        *,
        checkpoint: Checkpoint | None = None,
        overwrite: bool = False,
    ) -> None:
        config.check()
        self.config = config
        self.run = run
        self.overwrite = overwrite
        self.device = get_device(config.device)
        self.stop_signal: int | None = None
        self.step = 0

        train, held_out = split_documents(load_documents(config.data.path), config.data.held_out)
        self.data = self._pack(train)
        self.held_out = self._pack(held_out)
        self.data_digest = _digest(train)
        self.bigram = Bigram(self.data.stream)

        seed_all(config.seed)
        self.model = config.model.build(init_device="meta").to_empty(device=self.device)
        self.model.init_weights(seed=config.seed)
        self.optimizer = _adamw(self.model, config)
        if checkpoint is not None:
            self._restore(checkpoint)
        self.forward = torch.compile(self.model) if config.compile else self.model

    def fit(self, observer: Observer) -> Summary:
        """Train to the last step, or until :attr:`stop_signal` is set.

        :raises TrainingError: if the loss is not finite.
        :raises CheckpointError: if a checkpoint cannot be written.
        """
        config = self.config
        self.run.mkdir(parents=True, exist_ok=True)
        with _only_one_process(self.run), _deterministic(self.device):
            if self.overwrite:
                remove_run(self.run)
            retire_newer(self.run, self.step)
            metrics = Metrics(self.run / "metrics.jsonl", self.step)
            if self.step == 0:
                self._save()
            started, stopping = time.monotonic(), False
            pending: list[Row] = []
            while self.step < config.steps and not stopping:
                row = self._train_step()
                pending.append(row | {"seconds": time.monotonic() - started})
                # Read once: a signal that comes later in this step counts after the next.
                stopping = self.stop_signal is not None
                last = self.step == config.steps
                look = last or self.step % config.eval_every == 0
                save = last or stopping or self.step % config.save_every == 0
                if look:
                    batches = config.eval_batches * (FINAL_LOOK if last else 1)
                    pending[-1]["held_out"] = self.evaluate(batches)
                if look or save or self.step % config.log_every == 0:
                    rows = [_on_host(row) for row in pending]
                    pending.clear()
                    self._expect_finite(rows)
                    metrics.append(rows)
                    observer.steps(rows)
                if save:
                    observer.saved(self._save())
            done = self.step >= config.steps
            held_out = metrics.rows[-1].get("held_out") if done and metrics.rows else None
            return Summary(
                step=self.step,
                held_out=held_out,
                bigram=self.bigram_bits_per_byte(FINAL_LOOK * config.eval_batches),
                checkpoint=self.run / f"step-{self.step:08d}",
                stopped_by=None if done else self.stop_signal,
            )

    @torch.no_grad()
    def evaluate(self, batches: int) -> float:
        """Bits per byte of the first ``batches`` batches of held-out text."""
        self.model.eval()
        nats, n_bytes = 0.0, 0
        for batch in self.held_out.one_epoch(batches):
            nats += float(self._loss(batch.to(self.device), "sum"))
            n_bytes += int(((batch.labels >= 0) & (batch.labels != EOD)).sum())
        self.model.train()
        return bits_per_byte(nats, n_bytes)

    def bigram_bits_per_byte(self, batches: int) -> float:
        """The bigram model's, of the same tokens as :meth:`evaluate`."""
        return self.bigram.bits_per_byte(self.held_out.one_epoch(batches))

    def _train_step(self) -> Row:
        optimizer = self.config.optimizer
        lr = cosine_with_warmup(
            self.step,
            lr=optimizer.lr,
            steps=self.config.steps,
            warmup_steps=optimizer.warmup_steps,
            final_fraction=optimizer.final_lr_fraction,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self._loss(self.data.batch(self.step).to(self.device), "mean")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), optimizer.grad_clip or math.inf
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.normalize_matrices()
        self.step += 1
        return {"step": self.step, "loss": loss.detach(), "grad_norm": norm.detach(), "lr": lr}

    def _loss(self, batch: PackedBatch, reduction: str) -> Tensor:
        with self._autocast():
            loss: Tensor = self.forward(
                batch.input_ids,
                labels=batch.labels,
                loss_reduction=reduction,
                **batch.doc_lens._asdict(),
            )
        return loss

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.config.autocast.as_pt())

    def _pack(self, documents: list[bytes]) -> PackedDocuments:
        data = self.config.data
        return PackedDocuments(
            documents,
            batch_size=data.batch_size,
            sequence_length=data.sequence_length,
            max_doc_len=data.max_doc_len,
            seed=self.config.seed,
        )

    def _expect_finite(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if not math.isfinite(row["loss"]):
                raise TrainingError(
                    f"the loss of step {row['step']} is {row['loss']}: training diverged. Start a "
                    f"new run with a lower optimizer.lr (now {self.config.optimizer.lr:g})."
                )

    def _save(self) -> Path:
        training = random_state(self.device)
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                training[f"optimizer.{key}.{name}"] = value
        return save_checkpoint(
            self.run,
            self.step,
            model=self.model.state_dict(),
            training=training,
            config=self.config.as_config_dict(),
            extra={"data_sha256": self.data_digest},
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.extra.get("data_sha256") != self.data_digest:
            raise CheckpointError(
                f"{checkpoint.folder} was trained on other text or another split than "
                f"{self.config.data.path or 'the embedded corpus'} holds now: put the data back, "
                "or start a new run in another folder"
            )
        try:
            self.model.load_state_dict(checkpoint.model())
        except RuntimeError as error:
            raise CheckpointError(
                f"{checkpoint.folder} does not fit the model: {error}. Leave out overrides of "
                "model.*, or start a new run in another folder"
            ) from error
        training = checkpoint.training()
        parameters = dict(self.model.named_parameters())
        for key, value in training.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                field, _, name = rest.partition(".")
                self.optimizer.state[parameters[name]][field] = value.to(self.device)
        set_random_state(training, self.device)
        self.step = checkpoint.step


def _adamw(model: Transformer, config: TrainConfig) -> torch.optim.AdamW:
    optimizer = config.optimizer
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": optimizer.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=model.device.type in ("cpu", "cuda"),
    )


def get_device(name: str | None) -> torch.device:
    if name is None:
        return get_default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise OLMoConfigurationError(f"device {name!r} cannot be used here: {reason}") from error
    return device


def _digest(documents: list[bytes]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document).to_bytes(8, "little") + document)
    return digest.hexdigest()


def _on_host(row: Row) -> Row:
    return {k: float(v) if isinstance(v, Tensor) else v for k, v in row.items()}


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Choose kernels that give the same bits each time. The CPU's do anyway."""
    before = torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _only_one_process(run: Path) -> Iterator[None]:
    """Two processes in one folder would overwrite each other. The lock dies with the process."""
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(
                f"another process is training in {run}: wait for it, or choose another folder"
            ) from error
        yield
