"""``olmo-core doctor``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.text import Text

    from olmo_core.diagnostics.doctor import Report

# Headings narrow enough for one line: feature by feature, with the legend's words.
_SHORT = {
    "window": ("win", "= windows"),
    "documents": ("doc", "= packed documents"),
    "packed_qkv": ("qkv", "= one packed tensor"),
    "kv_cache": ("kv", "= cached keys"),
    "left_padding": ("pad", "= left padding"),
    "dropout": ("drop", "= dropout"),
    "backward": ("bwd", "= gradients"),
    "lse": ("lse", "= merged key blocks"),
    "deterministic": ("det", "= same bits again"),
    "ring_cp": ("ring", "and"),
    "ulysses_cp": ("uly", "= context parallelism"),
}


def command(
    device: Annotated[
        str | None,
        typer.Option("--device", help="Default: CUDA if there is a device, else the CPU."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")
    ] = False,
) -> None:
    """Say which attention backends work on this machine, and what mends the others.

    Every tick is a tiny forward and backward that agreed with a float64 reference. Exits with 0
    unless the torch backend fails, which works everywhere.
    """
    from olmo_core.cli.tables import console
    from olmo_core.utils import checked_device

    report = _examine(checked_device(device))
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        _print(console(), report)
    if not report.healthy:
        raise typer.Exit(1)


def _examine(device: torch.device) -> Report:
    from olmo_core.cli.tables import progress
    from olmo_core.diagnostics.doctor import examine, steps

    with progress() as bar:
        task = bar.add_task("", total=steps())
        return examine(device, lambda name: bar.update(task, advance=1, description=name))


def _print(console: Console, report: Report) -> None:
    console.print(str(report.machine), style="dim")
    _print_backends(console, report)
    _print_extras(console, report)
    _print_choices(console, report)


def _print_backends(console: Console, report: Report) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="attention backends", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("backend", no_wrap=True)
    table.add_column("here", no_wrap=True)
    for name in report.backends[0].features:
        table.add_column(_SHORT.get(name, (name, ""))[0], justify="center", no_wrap=True)
    for row in report.backends:
        ticks = (_tick(t.status if row.works else "absent") for t in row.features.values())
        here = Text("works", "green") if row.works else Text("no", "red")
        table.add_row(row.name, here, *ticks)
    console.print(table)
    console.print("✓ tried and right   – not there   ✗ tried and wrong   · not tried", style="dim")
    legend = [f"{short} {words}" for short, words in _SHORT.values()]
    for i in range(0, len(legend), 4):
        console.print("  ".join(legend[i : i + 4]), style="dim")
    console.print()
    for row in report.backends:
        if not row.works:
            console.print(f"{row.name} ({row.title}): {row.cause}")
            console.print(f"  {row.mend}", style="bold")
            continue
        for status in ("failed", "no"):
            reasons: dict[str, list[str]] = {}
            for name, tick in row.features.items():
                if tick.status == status:
                    reasons.setdefault(tick.why, []).append(_SHORT.get(name, (name, ""))[0])
            for why, names in reasons.items():
                console.print(f"{row.name}: {', '.join(names)}: {why}")


def _tick(status: str) -> Text:
    from rich.text import Text

    mark, style = {
        "yes": ("✓", "green"),
        "no": ("–", "yellow"),
        "failed": ("✗", "bold red"),
        "absent": ("·", "dim"),
    }[status]
    return Text(mark, style)


def _print_extras(console: Console, report: Report) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="optional", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("name", "here", "what for", "why not, and what mends it"):
        table.add_column(heading, overflow="fold")
    for extra in report.extras:
        here, why = Text(extra.version or "works", "green"), Text("")
        if not extra.works:
            here, why = Text("no", "yellow"), Text.assemble(extra.cause, "\n", (extra.mend, "bold"))
        table.add_row(extra.name, here, extra.purpose, why)
    console.print(table)


def _print_choices(console: Console, report: Report) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        title="automatic choice (backend=None)", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading in ("case", "dtype", "backend", "form", "reason"):
        table.add_column(heading, overflow="fold")
    for row in report.choices:
        table.add_row(row.case, row.dtype, row.backend, row.form, row.reason)
    console.print(table)
