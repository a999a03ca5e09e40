"""``olmo-core``: finds the command and turns errors into messages.

A command is a module of this package with a function ``command``. It is imported when it is used:
``olmo-core --help`` does not import torch.
"""

from __future__ import annotations

import errno
import importlib
import sys
from contextlib import suppress
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from olmo_core import __version__
from olmo_core.cli.streams import prepare_streams, silence_stdout
from olmo_core.exceptions import OLMoConfigurationError, OLMoError

COMMANDS = {
    "doctor": "Say which attention backends work on this machine, and what mends the others.",
    "verify": "Check packed = separate = sharded = cached = the float64 reference on this machine.",
    "train": "Train a small language model on packed documents.",
    "generate": "Continue text with a trained model.",
    "bench": "Time and memory of the backends against sequence length.",
}


class _LazyGroup(TyperGroup):
    _writes_help = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        if self._writes_help:
            return TyperCommand(cmd_name, help=COMMANDS[cmd_name])
        module = importlib.import_module(f"olmo_core.cli.{cmd_name}")
        single = typer.Typer(add_completion=False)
        single.command(cmd_name)(module.command)
        return typer.main.get_command(single)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """A mistake that can be named costs one message: exit 2 for what was asked, else 1."""
        prepare_streams()
        try:
            try:
                return super().main(*args, **kwargs)
            finally:
                sys.stdout.flush()  # a full disk is told now, not by a traceback at the exit
        except OLMoError as error:
            _complain(str(error))
            sys.exit(2 if isinstance(error, OLMoConfigurationError) else 1)
        except OSError as error:
            if error.errno != errno.EPIPE:  # whoever read the output has seen enough
                where = "standard output" if error.filename is None else error.filename
                _complain(f"{where}: {error.strerror or error}")
            silence_stdout()
            sys.exit(1)
        except (RuntimeError, MemoryError) as error:
            from olmo_core.memory import ran_out_of_memory

            if not ran_out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or ["no memory is left"])[0]
            _complain(f"out of memory, choose smaller sizes: {reason[:200]}")
            sys.exit(1)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._writes_help = True
        super().format_help(ctx, formatter)
        self._writes_help = False


app = typer.Typer(
    cls=_LazyGroup, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"olmo-core {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Attention layers where packed = separate = sharded = cached = the dense float64 reference."""


def _complain(message: str) -> None:
    with suppress(OSError):
        print(f"Error: {message}", file=sys.stderr, flush=True)
