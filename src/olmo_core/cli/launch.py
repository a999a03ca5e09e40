"""A command under ``torchrun``: one rank speaks, and the launcher learns what went wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from olmo_core.exceptions import OLMoConfigurationError, OLMoError

if TYPE_CHECKING:
    from olmo_core.train.parallel.ranks import Ranks

__all__ = ["command_line", "joined"]


@contextmanager
def joined(**degrees: Any) -> Iterator[Ranks]:
    """The processes that ``torchrun`` has started, or this one alone.

    :param degrees: how they share a run, see :func:`.deal`.
    :raises OLMoConfigurationError: if that can't be.
    """
    from olmo_core.distributed.launched import lost_another, number_started
    from olmo_core.train.parallel.many import join
    from olmo_core.train.parallel.ranks import Ranks

    if number_started() == 1:
        ranks = Ranks()
        ranks.deal(**degrees)
        yield ranks
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().initialize()
    ranks = join()
    try:
        ranks.deal(**degrees)
        yield ranks
        ranks.close()
    except typer.Exit:
        ranks.close()
        raise
    except Exception as error:
        if lost_another(error):
            time.sleep(1)  # the launcher names who ended first
            raise OLMoError(
                f"rank {ranks.rank} lost another rank, which failed or was ended: see its own "
                "message. Then go on with --resume"
            ) from error
        _record(error)
        if error is not ranks.agreed:
            raise
        ranks.close()
        if ranks.is_first:
            raise
        raise typer.Exit(2 if isinstance(error, OLMoConfigurationError) else 1) from error


def _record(error: Exception) -> None:
    """Leave an error where the launcher looks for it: one that can be named, without its way."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        if isinstance(error, OLMoError):
            raise type(error)(str(error)) from None
        raise error
    except Exception as told:
        get_error_handler().record_exception(told)


def command_line(ranks: Ranks) -> str:
    """What starts ``train`` with these ranks again."""
    if ranks.size == 1:
        return "olmo-core train"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    nodes = f"--nnodes {ranks.size // local} " if ranks.size > local else ""
    options = " ".join(["torchrun", f"{nodes}--nproc-per-node {local}", "-m olmo_core train"])
    of = ranks.degrees
    if of.style is not None:
        options += f" --cp {of.style} --cp-degree {of.cp}"
        if of.ring > 1 and of.ulysses > 1:
            options += f" --ulysses-degree {of.ulysses}"
    return options + (f" --tp-degree {of.tp}" if of.tp > 1 else "")
