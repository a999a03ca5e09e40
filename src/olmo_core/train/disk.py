"""Files that last: synced, replaced at once, locked by one process."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["digest", "hide", "lock", "remove_folder", "sync", "sync_folder"]


def sync(path: Path) -> None:
    """Return once the file's bytes are on the disk."""
    with path.open("r+b") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return once the folder's names are on the disk."""
    if os.name == "nt":
        return  # Windows opens no folders, and needs no sync of them
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def hide(folder: Path) -> Path:
    """Rename a folder to ``.old-NAME``: at once, so that nobody finds half of it."""
    hidden = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    return hidden


def remove_folder(folder: Path) -> None:
    """Remove a folder: for readers it is whole until it is absent."""
    with suppress(OSError):  # what stays behind is no harm, and goes the next time
        shutil.rmtree(folder if folder.name.startswith(".") else hide(folder))


def lock(file: IO[Any]) -> bool:
    """Lock a file until it is closed or the process dies; ``False`` if another process has it.

    :raises OSError: where files can't be locked.
    """
    try:
        import fcntl
    except ImportError:
        return _lock_windows(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _lock_windows(file: IO[Any]) -> bool:
    import msvcrt

    locking: Any = msvcrt  # its names exist on Windows alone
    try:
        locking.locking(file.fileno(), locking.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True
