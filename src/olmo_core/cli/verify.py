"""``olmo-core verify``."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from olmo_core.cli.tables import path_of
from olmo_core.exceptions import OLMoConfigurationError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.text import Text

    from olmo_core.diagnostics.verify import Cell, Outcome

_FAILURES_IN_FULL = 20


def command(
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", "-b", help="Only this backend; may be given several times."),
    ] = None,
    mixer: Annotated[
        list[str] | None,
        typer.Option(
            "--mixer",
            "-m",
            help="Only this class (attention, normalized, fused, gated_delta_net, kernel) or "
            "layer; may be given several times.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Default: CUDA if there is a device, else the CPU."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="float32 and bfloat16, and fewer layers.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", parser=path_of("--json"), help="Write every cell to a file."
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            help="Processes that share the work, where kernels take long to compile. With more "
            "than one, a crash in a library costs one cell.",
        ),
    ] = 1,
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            min=2,
            help="Ranks that share the sharded cells: processes of this machine, 2 by default; "
            "under torchrun all that it has started.",
        ),
    ] = None,
) -> None:
    """Check the promise on this machine: packed = separate = sharded = cached = the float64
    reference.

    Every row is a layer and a property, every column a dtype. A cell is an error and the bound that
    it must keep: a few times the error that a plain implementation has in the same precision
    against float64. Exits with 1 if a cell fails.
    """
    # cuBLAS is deterministic only if it is told before its first call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    import torch

    from olmo_core.cli import tables
    from olmo_core.diagnostics import machine as machines
    from olmo_core.diagnostics import verify
    from olmo_core.diagnostics.sharded import use_ranks
    from olmo_core.diagnostics.torchrun import started_ranks
    from olmo_core.distributed.launched import number_started
    from olmo_core.utils import checked_device

    where, started = checked_device(device), number_started()
    if started > 1:
        where = torch.device(where.type)  # each rank's own
        if os.environ["RANK"] != "0":
            with started_ranks(where):
                return  # this rank has served the first, which alone reads the options and speaks

    most = 4 * (os.cpu_count() or 1)
    if jobs > most:
        raise OLMoConfigurationError(
            f"--jobs {jobs} is more than four processes a core: choose at most {most}."
        )
    backends = [machines.checked_backend(name) for name in backend or ()]
    if started > 1 and ranks not in (None, started):
        raise OLMoConfigurationError(
            f"--ranks {ranks}, but torchrun has started {started}: leave --ranks out."
        )
    n = started if started > 1 else ranks or 2
    if started == 1 and n > most:
        raise OLMoConfigurationError(
            f"--ranks {n} is more than four processes a core: choose at most {most}."
        )
    todo = verify.cells(mixer or None, backends or None, quick=quick, ranks=n)
    if not todo:
        raise OLMoConfigurationError(
            "Nothing to verify: the gated delta net runs on the torch backend alone."
        )
    if json_file is not None:
        machines.checked_output("--json", json_file)

    start = time.perf_counter()
    console = tables.console()
    facts = machines.describe(where)
    with started_ranks(where) if started > 1 else nullcontext() as others:
        if others is not None:
            use_ranks(others, n)
        console.print(str(facts), style="dim")
        outcomes, interrupted = _run(todo, where, jobs, n)
    _print_tables(console, outcomes)
    _print_skipped(console, outcomes)
    failed = _print_failed(console, outcomes, n)
    passed = sum(o.status == "passed" for o in outcomes)
    seconds = time.perf_counter() - start
    verdict = f"{passed} cells passed, {failed} failed, {len(outcomes) - passed - failed} skipped"
    style = "bold red" if failed or not passed else "bold green"
    console.print(f"{verdict} in {seconds:.0f} s", style=style)
    if json_file is not None:
        rows = [o.as_dict() for o in outcomes]
        tables.write_json(json_file, {"machine": facts.as_dict(), "cells": rows})
    if interrupted:
        console.print(f"interrupted: {len(todo) - len(outcomes)} cells were not checked")
        raise typer.Exit(130)
    if not passed and not failed:
        console.print("Nothing could be checked here: see the reasons above.")
    if failed or not passed:
        raise typer.Exit(1)


def _run(
    todo: list[Cell], device: torch.device, jobs: int, ranks: int
) -> tuple[list[Outcome], bool]:
    """The outcomes so far, in the order of the cells, and whether the user stopped."""
    from olmo_core.cli.tables import progress

    outcomes: dict[Cell, Outcome] = {}
    interrupted = False
    with progress() as bar:
        task = bar.add_task("", total=len(todo))
        with closing(_checked(todo, device, jobs, ranks)) as checked:
            try:
                for outcome in checked:
                    outcomes[outcome.cell] = outcome
                    bar.update(task, advance=1, description=str(outcome.cell)[:44])
            except KeyboardInterrupt:
                interrupted = True
    return [outcomes[cell] for cell in todo if cell in outcomes], interrupted


def _checked(
    todo: list[Cell], device: torch.device, jobs: int, ranks: int
) -> Generator[Outcome, None, None]:
    from olmo_core.diagnostics.verify import run
    from olmo_core.diagnostics.verify_processes import run_in_processes
    from olmo_core.distributed.launched import number_started

    mine = list(todo)
    if jobs > 1:
        # Ranks that torchrun has started answer this process alone.
        mine = [cell for cell in todo if cell.is_sharded and number_started() > 1]
        others = [cell for cell in todo if not (cell.is_sharded and number_started() > 1)]
        yield from run_in_processes(others, device, jobs, partial(run, ranks=ranks))
    yield from run(mine, device, ranks)


def _print_tables(console: Console, outcomes: list[Outcome]) -> None:
    """One table for each backend of which something ran: rows in the order of the cells."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from olmo_core.config import DType

    ran = [o for o in outcomes if o.status != "skipped"]
    for backend in dict.fromkeys(o.cell.backend for o in ran):
        mine = [o for o in ran if o.cell.backend == backend]
        dtypes = list(dict.fromkeys(o.cell.dtype for o in mine))
        table = Table(
            title=f"{backend}: error ≤ bound",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column("mixer", no_wrap=True)
        table.add_column("property", no_wrap=len(dtypes) < 5)
        for dtype in dtypes:
            table.add_column(str(DType.from_pt(dtype)), no_wrap=True)
        rows: dict[tuple[str, str], dict[torch.dtype, Text]] = {}
        for o in mine:
            rows.setdefault((o.cell.mixer, o.cell.title), {})[o.cell.dtype] = _cell(o)
        above = None
        for (mixer, title), row in rows.items():
            if above is not None and mixer != above:
                table.add_section()
            name = "" if mixer == above else mixer
            table.add_row(name, title, *(row.get(d, Text("skipped", "dim")) for d in dtypes))
            above = mixer
        console.print(table)


def _cell(o: Outcome) -> Text:
    from rich.text import Text

    from olmo_core.cli.tables import number

    style = "green" if o.status == "passed" else "bold red"
    if o.error is None or o.bound is None:
        return Text("raised", style)
    sign = "≤" if o.status == "passed" else ">"
    return Text(f"{number(o.error)} {sign} {number(o.bound, 0)}", style)


def _print_skipped(console: Console, outcomes: list[Outcome]) -> None:
    """Every reason once for each backend, and what it is about where that is not everything."""
    skipped = [o for o in outcomes if o.status == "skipped"]
    if skipped:
        console.print("skipped, and why", style="bold")
    for backend in dict.fromkeys(o.cell.backend for o in skipped):
        mine = [o for o in skipped if o.cell.backend == backend]
        console.print(f"{backend}: {len(mine)} cells")
        for reason in dict.fromkeys(r for o in mine for r in o.reasons):
            about = [o for o in mine if reason in o.reasons]
            titles = list(dict.fromkeys(o.cell.title for o in about))
            what = f"{', '.join(titles)}: " if len(about) < len(mine) and len(titles) < 4 else ""
            console.print(f"  - {what}{reason}", style="dim")


def _print_failed(console: Console, outcomes: list[Outcome], ranks: int) -> int:
    from olmo_core.cli.tables import number

    failed = [o for o in outcomes if o.status == "failed"]
    for o in failed[:_FAILURES_IN_FULL]:
        console.print(f"FAILED {o.cell}", style="bold red")
        for reason in o.reasons:
            console.print(f"  {reason}")
        if o.error is not None and o.bound is not None:
            allowed = f"and {number(o.bound)} is allowed"
            console.print(f"  {o.tensor} is off by {number(o.error)}, {allowed}")
    if len(failed) > _FAILURES_IN_FULL:
        rest = len(failed) - _FAILURES_IN_FULL
        console.print(f"and {rest} more: see the table, or --json FILE", style="bold red")
    for mixer, backend in dict.fromkeys((o.cell.mixer, o.cell.backend) for o in failed):
        again = f"olmo-core verify --mixer {mixer} --backend {backend}"
        if ranks != 2 and any(o.cell.is_sharded for o in failed):
            again += f" --ranks {ranks}"
        console.print(f"again: {again}")
    return len(failed)
