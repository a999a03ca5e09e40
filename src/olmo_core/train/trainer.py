"""The training loop: the same losses to the last bit, interrupted or not."""

from __future__ import annotations

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

from olmo_core.data import (
    PackedBatch,
    PackedDocuments,
    data_files,
    load_documents,
    load_vocabulary,
    split_documents,
)
from olmo_core.memory import ran_out_of_memory
from olmo_core.train.bigram import Bigram, bits_per_byte
from olmo_core.train.checkpoint import Checkpoint
from olmo_core.train.config import TrainConfig
from olmo_core.train.errors import TrainingError
from olmo_core.train.folder import RunFolder
from olmo_core.train.metrics import Row
from olmo_core.train.optimizer import adamw, clip_gradients
from olmo_core.train.parallel import storage
from olmo_core.train.parallel.ranks import Ranks
from olmo_core.train.resume import TEXTS, expect_same_settings, expect_same_texts
from olmo_core.train.schedule import cosine_with_warmup
from olmo_core.train.sizes import checkpoint_bytes, expect_it_fits
from olmo_core.utils import seed_all

# The last look at the held-out text takes this many times the batches of the others.
FINAL_LOOK = 4


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
    :param ranks: the processes that train together, each with a trainer of the same arguments; by
        default this one alone. The batch is that of one process, whatever the number.
    :raises OLMoError: for a configuration, folder, data or checkpoint that does not fit. On several
        ranks all raise it.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path | RunFolder,
        *,
        checkpoint: Checkpoint | None = None,
        overwrite: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = Ranks() if ranks is None else ranks
        self.config = config
        self.folder = run if isinstance(run, RunFolder) else RunFolder(run)
        self.overwrite = overwrite
        self.stop_signal: int | None = None
        self.step = 0
        with self.ranks.together():
            config.check()
            self.ranks.degrees.expect_rows(config)
            if checkpoint is not None:
                expect_same_settings(checkpoint, config)
            self.device = self.ranks.device(config.device)
            self.skipped = [] if config.data.path is None else data_files(config.data.path).skipped
            expect_it_fits(config, self.device, self.ranks.degrees)
            self.model = config.model.build(init_device="meta")
        self.ranks.expect_same(configuration=config)
        with self.ranks.together():
            self.ranks.share_model(self.model, self.device)
        with self.ranks.entered_by_first(self.folder.held()):
            self.ranks.on_first(self.folder.expect_room, checkpoint_bytes(config))
            with self.ranks.together():
                self._load_data()
            self.ranks.expect_same(text=self.digests)
            self._init_weights()
            if checkpoint is not None:
                self._restore(checkpoint)
        self.forward = torch.compile(self.model) if config.compile else self.model

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder.path

    def fit(self, observer: Observer) -> Summary:
        """Train to the last step, or until :attr:`stop_signal` is set.

        :raises TrainingError: if loss, gradients or weights are not finite, or for a lack of memory
            or of a compiler.
        :raises CheckpointError: if a checkpoint cannot be written.
        """
        held = self.ranks.entered_by_first(self.folder.held())
        room = _room_to_compile(self.config)
        with held, room, _deterministic(self.device), _named_failures(self.config):
            self.ranks.on_first(self._begin)
            if self.step == 0:
                self._save()
            self._train(observer)
            return self.ranks.on_first(self._summary)

    def _begin(self) -> None:
        self.folder.begin(self.step, overwrite=self.overwrite)
        if self.config.data.tokenizer is not None:
            self.folder.keep_tokenizer(Path(self.config.data.tokenizer))

    def _load_data(self) -> None:
        data = self.config.data
        self.vocabulary = load_vocabulary(data.tokenizer)
        train, held_out = split_documents(load_documents(data.path), data.held_out)
        self.data = self._pack(train)
        self.held_out = self._pack(held_out)
        digests = (_digest(texts, self.vocabulary.digest) for texts in (train, held_out))
        self.digests = dict(zip(TEXTS, digests, strict=True))
        self.bigram = Bigram(self.data.stream, self.vocabulary.size)

    def _init_weights(self) -> None:
        seed_all(self.config.seed)
        self.model = self.model.to_empty(device=self.device)
        self.model.init_weights(seed=self.config.seed)
        self.optimizer = adamw(self.model.parameters(), self.config.optimizer)

    def _train(self, observer: Observer) -> None:
        config, started, stopping = self.config, time.monotonic(), False
        pending: list[Row] = []
        while self.step < config.steps and not stopping:
            row = self._train_step()
            pending.append(row | {"seconds": time.monotonic() - started})
            # Read once: a signal that comes later in this step counts after the next.
            self.stop_signal = self.ranks.highest(self.stop_signal)
            stopping = self.stop_signal is not None
            last = self.step == config.steps
            look = last or self.step % config.eval_every == 0
            save = last or stopping or self.step % config.save_every == 0
            if look:
                batches = config.eval_batches * (FINAL_LOOK if last else 1)
                pending[-1]["held_out"] = self.evaluate(batches)
            if look or save or self.step % config.log_every == 0:
                self._record(pending, observer)
                pending.clear()
            if save:
                folder = self._save()
                if self.ranks.is_first:
                    observer.saved(folder)

    def _record(self, pending: list[Row], observer: Observer) -> None:
        rows = [_on_host(row) for row in pending]
        losses = self.ranks.mean([row["loss"] for row in rows])
        rows = [row | {"loss": loss} for row, loss in zip(rows, losses, strict=True)]
        with self.ranks.together():
            self._expect_finite(rows)
        self.ranks.on_first(self.folder.append, rows)
        if self.ranks.is_first:
            observer.steps(rows)

    def _summary(self) -> Summary:
        assert self.folder.metrics is not None
        done, rows = self.step >= self.config.steps, self.folder.metrics.rows
        return Summary(
            step=self.step,
            held_out=rows[-1].get("held_out") if done and rows else None,
            bigram=self.bigram_bits_per_byte(FINAL_LOOK * self.config.eval_batches),
            checkpoint=self.run / f"step-{self.step:08d}",
            stopped_by=None if done else self.stop_signal,
        )

    @torch.no_grad()
    def evaluate(self, batches: int) -> float:
        """Bits per byte of the first ``batches`` batches of held-out text."""
        self.model.eval()
        nats, n_bytes = 0.0, 0
        for batch in self.held_out.one_epoch(batches, share=self.ranks.share):
            nats += float(self._total_loss(batch))
            n_bytes += batch.num_bytes
        self.ranks.settle(self.model)
        self.model.train()
        (mean,) = self.ranks.mean([nats])
        return bits_per_byte(mean * self.ranks.degrees.fsdp, n_bytes)

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
        self.ranks.seed(self.config.seed, self.step)
        batch = self.data.batch(self.step, share=self.ranks.share)
        # The mean of all ranks' losses is the batch's, and of their gradients its gradient.
        labels = torch.full((), max(batch.num_labels, 1), device=self.device)
        loss = self._total_loss(batch) * self.ranks.degrees.fsdp / labels
        loss.backward()
        norm = clip_gradients(self.model.parameters(), optimizer.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.normalize_matrices()
        self.step += 1
        return {"step": self.step, "loss": loss.detach(), "grad_norm": norm.detach(), "lr": lr}

    def _total_loss(self, batch: PackedBatch) -> Tensor:
        """Of this rank's tokens, summed."""
        tokens = self.ranks.shard(batch).to(self.device)
        with self._autocast():
            loss: Tensor = self.forward(
                tokens.input_ids, labels=tokens.labels, loss_reduction="sum", **tokens.lengths
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
            vocabulary=self.vocabulary,
        )

    def _expect_finite(self, rows: Iterable[Row]) -> None:
        names = {"loss": "loss", "grad_norm": "gradient", "held_out": "loss on the held-out text"}
        for row in rows:
            for key, name in names.items():
                if key in row and not math.isfinite(row[key]):
                    raise TrainingError(
                        f"the {name} of step {row['step']} is {row[key]}: training diverged. "
                        f"{self._advice()}"
                    )

    def _advice(self) -> str:
        return f"Start a new run with a lower optimizer.lr (now {self.config.optimizer.lr:g})."

    def _save(self) -> Path:
        with self.ranks.together():
            try:
                return storage.save(
                    self.folder,
                    self.ranks,
                    self.step,
                    config=self.config.as_config_dict(),
                    extra=self.digests,
                    **self._state(),
                )
            except TrainingError as error:
                raise TrainingError(f"{error}. {self._advice()}") from error

    def _restore(self, checkpoint: Checkpoint) -> None:
        with self.ranks.together():
            expect_same_texts(checkpoint, self.digests, self.config.data.path)
        storage.restore(checkpoint, self.ranks, **self._state())
        self.step = checkpoint.step

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "seed": self.config.seed,
            "device": self.device,
        }


def _digest(documents: list[bytes], vocabulary: str) -> str:
    digest = hashlib.sha256(vocabulary.encode())
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
def _room_to_compile(config: TrainConfig) -> Iterator[None]:
    """Graphs for every layer. FSDP's hooks end a graph before each block, and blocks share their
    code, of which the compiler keeps 8 graphs by default and then, with a warning, computes
    eagerly. Each kind of layer takes up to four: with and without gradients, of one shape and of
    any."""
    if not config.compile:
        yield
        return
    import torch._dynamo.config as dynamo

    graphs = max(dynamo.recompile_limit, 4 * config.model.n_layers)
    with dynamo.patch(recompile_limit=graphs):
        yield


@contextmanager
def _named_failures(config: TrainConfig) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or ["no memory"])[0][:200]
        if ran_out_of_memory(error):
            raise TrainingError(
                f"out of memory: {reason}. Choose a smaller data.batch_size, "
                "data.sequence_length or model, or set model.loss_chunk_size"
            ) from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise TrainingError(
                f"the model can't be compiled here: {reason}. Leave out compile=true"
            ) from error
        raise
