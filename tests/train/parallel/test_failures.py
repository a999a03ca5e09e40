"""What one rank meets, all raise; what does not fit is refused at the door on every rank."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from gloo_ranks import errors_on_ranks, on_ranks
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.train.checkpoint import checkpoint_folders, find_checkpoint
from olmo_core.train.config import TrainConfig
from olmo_core.train.errors import TrainingError
from olmo_core.train.folder import RunFolder
from olmo_core.train.parallel.degrees import deal
from olmo_core.train.parallel.many import ManyRanks
from olmo_core.train.trainer import Trainer
from train.parallel.runs import Watch, curve, small, train, write_corpus

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def dealt(rank: int, n: int, options: dict[str, Any]) -> None:
    ManyRanks().deal(**options)


def built(rank: int, n: int, config: TrainConfig, run: Path, options: dict[str, Any]) -> None:
    Trainer(config, run, ranks=ManyRanks(deal(n, **options)))


DOORS: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "rows": (["data.batch_size=3"], {}, "data.batch_size=3 rows can't be dealt to 2 ranks"),
    "heads for tp": (
        ["model.blocks.1.sequence_mixer.n_heads=1", "model.blocks.1.sequence_mixer.n_kv_heads=1"],
        {"tp_degree": 2}, "can't deal n_heads=1 to 2 ranks",
    ),
    "heads for Ulysses": (
        ["model.blocks.0.sequence_mixer.n_heads=1"], {"cp": "ulysses"}, "Ulysses can't deal 1",
    ),
    "dropout in a ring": (
        ["model.blocks.1.sequence_mixer.dropout=0.1"], {"cp": "balanced"}, "dropout",
    ),
    "a value": (["steps=0"], {}, "steps must be at least 1"),
    "no data": (["data.path=/nowhere.txt"], {}, "/nowhere.txt does not exist"),
    "a device": (["device=abacus"], {}, "device 'abacus' can't be used"),
}  # fmt: skip


@pytest.mark.parametrize("name", DOORS)
def test_doors(corpus: Path, tmp_path: Path, name: str) -> None:
    changes, options, message = DOORS[name]
    run = tmp_path / "run"
    errors = errors_on_ranks(2, built, small(corpus, *changes), run, options)
    assert errors[0] == errors[1] and message in str(errors[0])
    assert not run.exists()


def test_ranks_that_do_not_fit() -> None:
    errors = errors_on_ranks(2, dealt, {"tp_degree": 3})
    assert errors[0] == errors[1] and "2 ranks can't be dealt to --tp-degree 3" in str(errors[0])


def meets(rank: int, n: int, who: int, error: Exception) -> list[str]:
    """Both ways in which one rank's error reaches all; the group serves on."""
    ranks = ManyRanks()
    said = []
    for attempt in ("together", "on_first"):
        with pytest.raises(Exception) as caught:
            if attempt == "together":
                with ranks.together():
                    if rank == who:
                        raise error
            elif ranks.on_first(_raise, error):
                raise AssertionError
        assert caught.value is ranks.agreed
        if rank == who and attempt == "together":
            where = caught.value if who == 0 else caught.value.__cause__
            assert where is error  # with its traceback
        said.append(f"{type(caught.value).__name__}: {caught.value}")
    assert ranks.on_first(lambda: rank) == 0
    assert ranks.highest(7 if rank == who else None) == 7 and ranks.highest(None) is None
    assert ranks.highest(0 if rank == who else None) == 0
    assert ranks.mean([float(rank), 3.0]) == [(n - 1) / 2, 3.0]
    return said


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("who", "error", "message"),
    [
        (0, TrainingError("full"), "TrainingError: full"),
        (1, TrainingError("full"), "TrainingError: rank 1: full"),
        (1, OLMoConfigurationError("bad"), "OLMoConfigurationError: rank 1: bad"),
        (1, KeyError("k"), "TrainingError: rank 1: KeyError: 'k'"),
        (0, ValueError("v"), "ValueError: v"),
    ],
)
def test_an_error_reaches_all(who: int, error: Exception, message: str) -> None:
    first, *others = on_ranks(2, meets, who, error)
    assert first == others[0] and first[0] == message
    assert first[1] == f"{type(error).__name__}: {error}"


def disagrees(rank: int, n: int, config: TrainConfig, run: Path, about: str) -> None:
    other = Path(str(config.data.path)).with_name(f"other-{rank}.txt")
    if about == "text":  # the same path, as on the disks of two machines
        other.write_text("a node of its own has another text. " * (40 + rank))
        config = config.merge(["data.path=text.jsonl"])
        load = Trainer._load_data

        def load_other(trainer: Trainer) -> None:
            trainer.config = config.merge([f"data.path={other}"])
            load(trainer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_load_data", load_other)
            patch.setattr("olmo_core.train.trainer.data_files", lambda path: _None)
            Trainer(config, run, ranks=ManyRanks(deal(n)))
    Trainer(config.merge([f"steps={5 + rank}"]), run, ranks=ManyRanks(deal(n)))


class _None:
    skipped: list[Path] = []


@pytest.mark.parametrize("about", ["configuration", "text"])
def test_ranks_must_agree(corpus: Path, tmp_path: Path, about: str) -> None:
    errors = errors_on_ranks(2, disagrees, small(corpus), tmp_path / "run", about)
    assert errors[0] == errors[1]
    assert f"rank 1 has another {about} than rank 0" in str(errors[0])


def full_disk(rank: int, n: int, config: TrainConfig, run: Path, where: str) -> None:
    """Of the rank that writes the metrics, or of another that writes its part of a checkpoint."""
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuses(*args: Any, **keywords: Any) -> Any:
        if len(checkpoint_folders(run)) > 1 and rank == (0 if where == "metrics" else 1):
            raise full
        return take(*args, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        if where == "metrics":
            take: Any = RunFolder.append
            patch.setattr(RunFolder, "append", refuses)
        else:
            from olmo_core.train import sharded_checkpoint

            take = sharded_checkpoint.digest
            patch.setattr(sharded_checkpoint, "digest", refuses)
        train(rank, n, config, run, {})


@pytest.mark.parametrize("where", ["metrics", "checkpoint"])
def test_a_disk_that_is_full_on_one_rank(corpus: Path, tmp_path: Path, where: str) -> None:
    run = tmp_path / "run"
    config = small(corpus, "steps=12", "save_every=2")
    errors = errors_on_ranks(2, full_disk, config, run, where)
    assert errors[0] == errors[1] and "No space left" in str(errors[0])
    assert find_checkpoint(run)[1] == []  # whatever is there is whole
    on_ranks(2, train, config, run, {})
    assert curve(run)[-1]["step"] == 12


def diverges(rank: int, n: int, config: TrainConfig, run: Path, options: dict[str, Any]) -> None:
    trainer = Trainer(config, run, ranks=ManyRanks(deal(n, **options)))
    take = trainer.optimizer.step

    def spoil() -> None:
        take()
        if trainer.step == 2 and rank == 1:  # of this rank's shard alone
            with torch.no_grad():
                trainer.model.embeddings.weight.to_local().fill_(float("nan"))  # type: ignore[attr-defined]

    trainer.optimizer.step = spoil  # type: ignore[method-assign,assignment]
    trainer.fit(Watch())


@pytest.mark.parametrize("change", ["save_every=3", "save_every=100"])
def test_divergence_on_one_rank(corpus: Path, tmp_path: Path, change: str) -> None:
    """Seen in a checkpoint's values, or in the next loss."""
    config = small(corpus, change, "steps=9", "eval_every=100")
    errors = errors_on_ranks(2, diverges, config, tmp_path, {"cp": "llama3"})
    assert "diverged. Start a new run with a lower optimizer.lr" in str(errors[0])
    assert errors[0] == errors[1]
    for folder in checkpoint_folders(tmp_path):
        assert find_checkpoint(folder)[0].model()["embeddings.weight"].isfinite().all()


def locked(rank: int, n: int, config: TrainConfig, run: Path) -> None:
    if rank == 1:  # another process
        with RunFolder(run).held():
            torch.distributed.barrier()
            built(rank, n, config, run, {})
    torch.distributed.barrier()
    built(rank, n, config, run, {})


def test_one_rank_locks_the_folder_for_all(corpus: Path, tmp_path: Path) -> None:
    errors = errors_on_ranks(2, locked, small(corpus), tmp_path)
    assert errors[0] == errors[1] and "another process is training in" in str(errors[0])
