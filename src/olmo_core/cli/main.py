"""``olmo-core``: finds the command and turns errors into messages.

A command is a module of this package with a function ``command``. It is imported when it is used:
``olmo-core --help`` does not import torch.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from olmo_core import __version__
from olmo_core.exceptions import OLMoConfigurationError, OLMoError

COMMANDS = {
    "doctor": "Say which attention backends work on this machine, and what mends the others.",
    "verify": "Check packed = separate = cached = the dense float64 reference on this machine.",
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
        single.command(cmd_name)(_with_messages(module.command))
        return typer.main.get_command(single)

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
    """Attention layers where packed = separate = cached = the dense float64 reference."""


def _with_messages(command: Callable[..., Any]) -> Callable[..., Any]:
    """A mistake that the library names costs one message: exit 2 for what was asked, else 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except OLMoError as error:
            print(f"Error: {error}", file=sys.stderr)
            raise typer.Exit(2 if isinstance(error, OLMoConfigurationError) else 1) from error

    return run
