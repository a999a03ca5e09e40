"""A run's folder: the one place that writes what a run leaves behind.

Whoever trains in several processes has to let the first alone write.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.train import disk
from olmo_core.train.checkpoint import retire_newer, save_checkpoint
from olmo_core.train.errors import TrainingError
from olmo_core.train.metrics import Metrics, Row

LOCK = ".lock"
METRICS = "metrics.jsonl"
PLOT = "loss.png"
TOKENIZER = "tokenizer.json"
# A process that died before its first checkpoint leaves these: nothing that anyone would miss.
_TRACES = (LOCK, ".probe", ".writing-step-*", f".{METRICS}")
_KEPT = ("step-*", "damaged-step-*", ".old-step-*", METRICS, PLOT, TOKENIZER)


class RunFolder:
    """The folder of one run.

    :param path: made when it is first held, and removed again if nothing was written.
    :param option: the option of ``train`` that names it, for messages.
    """

    def __init__(self, path: Path, *, option: str = "--run") -> None:
        self.path = path
        self.option = option
        self.metrics: Metrics | None = None
        self._is_held = False

    @contextmanager
    def held(self) -> Iterator[RunFolder]:
        """Make the folder, lock it against other processes and try to write; inside another
        ``held`` of the same object it does nothing.

        :raises OLMoConfigurationError: if the folder can't be made, locked or written.
        :raises TrainingError: if another process trains in it.
        """
        if self._is_held:
            yield self
            return
        made = [p for p in (self.path, *self.path.parents) if not os.path.lexists(p)]
        try:
            with self._usable():
                self._is_held = True
                try:
                    yield self
                finally:
                    self._is_held = False
                    # While it is locked: see _lock. Windows wants it closed before.
                    if made and os.name != "nt" and os.listdir(self.path) == [LOCK]:
                        (self.path / LOCK).unlink()
        finally:
            with suppress(OSError):
                if made and os.listdir(self.path) == [LOCK]:
                    (self.path / LOCK).unlink()
                for path in made:
                    path.rmdir()  # refuses, unless it is empty

    def earlier(self) -> list[Path]:
        """What an earlier run has left in the folder, its mere traces apart."""
        return [path for pattern in _KEPT for path in self.path.glob(pattern)]

    def others(self) -> list[str]:
        """The names of files and folders that are no run's."""
        ours = {path for pattern in (*_KEPT, *_TRACES) for path in self.path.glob(pattern)}
        return sorted(path.name for path in self.path.iterdir() if path not in ours)

    def expect_room(self, n_bytes: int) -> None:
        """:raises OLMoConfigurationError: if the disk has less than ``n_bytes`` free."""
        free = shutil.disk_usage(self.path).free
        if free < n_bytes:
            raise OLMoConfigurationError(
                f"the run folder {self.path} has room for {free / 1e6:.3g} MB, and one checkpoint "
                f"takes {n_bytes / 1e6:.3g} MB: free some space, or choose another "
                f"{self.option}"
            )

    def begin(self, step: int, *, overwrite: bool = False) -> None:
        """Make the folder that of a run at ``step``: what comes later in it is set aside."""
        if overwrite:
            for path in self.earlier():
                disk.remove_folder(path) if path.is_dir() else path.unlink()
        retire_newer(self.path, step)
        with _named(self.path / METRICS):
            self.metrics = Metrics(self.path / METRICS, step)

    def append(self, rows: list[Row]) -> None:
        """Add rows to the metrics of a run that has begun.

        :raises TrainingError: if the disk refuses.
        """
        assert self.metrics is not None
        with _named(self.metrics.path):
            self.metrics.append(rows)

    def keep_tokenizer(self, path: Path) -> None:
        """Copy the tokenizer's file, so that the folder alone says what its tokens are."""
        with _named(self.path / TOKENIZER):
            if path.resolve() != (self.path / TOKENIZER).resolve():
                shutil.copyfile(path, self.path / TOKENIZER)

    def save(self, step: int, **content: Any) -> Path:
        """See :func:`~olmo_core.train.checkpoint.save_checkpoint`."""
        return save_checkpoint(self.path, step, **content)

    @contextmanager
    def _usable(self) -> Iterator[None]:
        doing = "made"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            doing = "locked"
            with self._lock():
                doing = "written"
                self._probe()
                doing = ""
                yield
        except OSError as error:
            if not doing:
                raise
            raise OLMoConfigurationError(
                f"the run folder {self.path} can't be {doing}: {error.strerror or error}. Choose "
                f"another with {self.option}"
            ) from error

    def _probe(self) -> None:
        probe = self.path / ".probe"
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)

    def _lock(self) -> IO[bytes]:
        path = self.path / LOCK
        while True:
            file = path.open("ab")
            try:
                if not disk.lock(file):
                    raise TrainingError(
                        f"another process is training in {self.path}: wait for it, or choose "
                        "another folder"
                    )
                # A process that leaves an empty folder removes the file: then lock the next one.
                if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    return file
            except BaseException:
                file.close()
                raise
            file.close()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path} can't be written: {error.strerror or error}. Mend that, then go on with "
            "--resume"
        ) from error
