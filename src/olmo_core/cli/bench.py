"""``olmo-core bench``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from olmo_core.cli.tables import path_of
from olmo_core.exceptions import OLMoConfigurationError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from olmo_core.diagnostics.bench import Measurement, Plan
    from olmo_core.diagnostics.bench_cases import BenchCase, Settings


def command(
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", "-b", help="Only this backend; may be given several times."),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            "--case", "-c", help="full, window, documents or decode; may be given several times."
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option("--tokens", "-t", help="A sequence length; may be given several times."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bfloat16, float16, float32 or float64.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Default: CUDA if there is a device, else the CPU."),
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Rows.")] = None,
    heads: Annotated[int | None, typer.Option("--heads", help="Query heads.")] = None,
    kv_heads: Annotated[
        int | None, typer.Option("--kv-heads", help="Key and value heads; a divisor of --heads.")
    ] = None,
    head_dim: Annotated[int | None, typer.Option("--head-dim", help="Width of a head.")] = None,
    window: Annotated[int | None, typer.Option("--window", help="Keys of the window case.")] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Time for each median, about.")
    ] = None,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers/--no-peers", help="Time SDPA, FlexAttention and transformers in the same run."
        ),
    ] = True,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", parser=path_of("--json"), help="Write every number to a file."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            parser=path_of("--plot"),
            help="Draw a PNG (needs matplotlib).",
        ),
    ] = None,
) -> None:
    """Time and memory of the backends against sequence length, beside what one would write without.

    Ctrl-C keeps what was measured.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler talks on standard error

    from olmo_core.cli import tables
    from olmo_core.diagnostics import bench, contenders, machine
    from olmo_core.diagnostics.bench_cases import expect_problems_fit
    from olmo_core.nn.attention.capabilities import CAPABILITIES
    from olmo_core.utils import checked_device

    backends = [machine.checked_backend(name) for name in backend or ()]
    where = checked_device(device)
    sizes = {
        "batch": batch,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "head_dim": head_dim,
        "window": window,
        "seconds": seconds,
    }
    settings = _settings(where, dtype, tokens, sizes)
    cases = _cases(case)
    expect_problems_fit(cases, settings, where)
    for option, path in (("--json", json_file), ("--plot", plot)):
        if path is not None:
            machine.checked_output(option, path)
    if plot is not None:
        _check_plot(plot)

    absent = contenders.absent_backends(where, settings)
    who = contenders.contenders([n for n in backends or CAPABILITIES if n not in absent], peers)
    if not any(not c.is_peer for c in who):
        reasons = "".join(f"\n  {name}: {absent[name]}" for name in backends)
        raise OLMoConfigurationError(f"No backend to time can run here:{reasons}")

    console = tables.console()
    facts = machine.describe(where)
    console.print(str(facts), style="dim")
    console.print(str(settings))
    rows, interrupted = _run(bench.plan(who, cases, settings.tokens), settings, where)
    _print(console, rows)
    _print_absent(console, rows, absent)
    if json_file is not None:
        tables.write_json(
            json_file,
            {
                "machine": facts.as_dict(),
                "settings": str(settings),
                "absent": absent,
                "rows": [row.as_dict() for row in rows],
            },
        )
    if plot is not None and any(row.forward_ms is not None for row in rows):
        from olmo_core.diagnostics.bench_plot import draw

        with tables.named(plot):
            draw(plot, rows, f"{facts.device_name}, torch {facts.torch}\n{settings}", absent)
        console.print(f"plot: {plot}")
    if interrupted:
        console.print("interrupted: the rest was not measured")
        raise typer.Exit(130)
    if all(row.forward_ms is None for row in rows):
        console.print("Nothing could be measured here: see the reasons above.")
        raise typer.Exit(1)


def _settings(
    device: torch.device,
    dtype: str | None,
    tokens: list[int] | None,
    sizes: dict[str, int | float | None],
) -> Settings:
    from dataclasses import replace

    from olmo_core.config import DType
    from olmo_core.diagnostics.bench_cases import (
        MAX_SECONDS,
        MAX_SIZE,
        checked_tokens,
        default_settings,
    )

    for name, size in sizes.items():
        if size is not None and not size > 0:
            raise OLMoConfigurationError(f"{name} must be positive, got {size}.")
        limit = MAX_SECONDS if name == "seconds" else MAX_SIZE
        if size is not None and size > limit:
            raise OLMoConfigurationError(f"{name} must be at most {limit}, got {size}.")
    given = {name: size for name, size in sizes.items() if size is not None}
    default = default_settings(device)
    if "n_heads" in given and "n_kv_heads" not in given:
        given["n_kv_heads"] = given["n_heads"]
    settings = replace(default, **given)  # type: ignore[arg-type]
    if settings.n_heads % settings.n_kv_heads:
        raise OLMoConfigurationError(
            f"--heads must be a multiple of --kv-heads, got {settings.n_heads} and "
            f"{settings.n_kv_heads}."
        )
    if batch := given.get("batch"):
        settings = replace(settings, decode_batch=int(batch))
    if dtype is not None:
        try:
            settings = replace(settings, dtype=DType(dtype).as_pt())
        except ValueError:
            raise OLMoConfigurationError(
                f"--dtype {dtype}: choose from {', '.join(DType)}."
            ) from None
    if tokens:
        if min(tokens) < 2:
            raise OLMoConfigurationError(f"--tokens must be at least 2, got {min(tokens)}.")
        if max(tokens) > MAX_SIZE:
            raise OLMoConfigurationError(f"--tokens must be at most {MAX_SIZE}, got {max(tokens)}.")
        settings = replace(settings, tokens=checked_tokens(tokens))
    return settings


def _cases(names: list[str] | None) -> list[BenchCase]:
    from olmo_core.diagnostics.bench_cases import BenchCase

    try:
        return [BenchCase(name) for name in dict.fromkeys(names or BenchCase)]
    except ValueError:
        wrong = [n for n in names or () if n not in list(BenchCase)]
        raise OLMoConfigurationError(
            f"--case {wrong[0]}: choose from {', '.join(BenchCase)}."
        ) from None


def _check_plot(path: Path) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise OLMoConfigurationError(
            '--plot needs matplotlib, which is not installed: pip install "olmo-attention[plot]"'
        )
    if path.suffix.lower() != ".png":
        raise OLMoConfigurationError(f"--plot {path}: the plot is a PNG, name it *.png.")


def _run(
    todo: list[Plan], settings: Settings, device: torch.device
) -> tuple[list[Measurement], bool]:
    """The measurements so far, and whether the user stopped."""
    from olmo_core.cli.tables import progress
    from olmo_core.diagnostics.bench import run

    rows: list[Measurement] = []
    with progress() as bar:
        task = bar.add_task(str(todo[0]), total=len(todo))
        try:
            for i, row in enumerate(run(todo, settings, device)):
                rows.append(row)
                coming = str(todo[i + 1]) if i + 1 < len(todo) else ""
                bar.update(task, advance=1, description=coming)
        except KeyboardInterrupt:
            return rows, True
    return rows, False


def _print(console: Console, rows: list[Measurement]) -> None:
    from rich import box
    from rich.table import Table

    from olmo_core.cli.tables import number

    measured = [r for r in rows if r.forward_ms is not None]
    for case in dict.fromkeys(r.case for r in measured):
        decode = case == "decode"
        mine = [r for r in measured if r.case == case]
        table = Table(title=case, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("tokens", justify="right")
        table.add_column("who")
        rates = ("GB/s",) if decode else ("fwd + bwd ms", "TFLOP/s")
        for heading in ("step ms" if decode else "forward ms", *rates, "peak MB", "max error"):
            table.add_column(heading, justify="right")
        above = None
        for r in mine:
            if above not in (None, r.tokens):
                table.add_section()
            speed = (r.gb_per_s,) if decode else (r.both_ms, r.tflops)
            numbers = [_plain(x) for x in (r.forward_ms, *speed, r.peak_mb)]
            error = "" if r.error is None else number(r.error)
            style = "" if not r.is_peer else "dim"
            tokens = str(r.tokens) if r.tokens != above else ""
            table.add_row(tokens, r.name, *numbers, error, style=style)
            above = r.tokens
        console.print(table)
    if measured:
        at = max(r.error_tokens or 0 for r in measured)
        console.print(
            f"max error: worst row of output and gradients against float64, at up to {at} tokens. "
            "Peers are dim.",
            style="dim",
        )


def _plain(x: float | None) -> str:
    """Three significant digits."""
    if x is None:
        return ""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def _print_absent(console: Console, rows: list[Measurement], absent: dict[str, str]) -> None:
    reasons: dict[tuple[str, str], list[Measurement]] = {}
    for r in rows:
        if r.reason:
            reasons.setdefault((r.name, r.reason), []).append(r)
    for (name, reason), mine in reasons.items():
        cases = ", ".join(dict.fromkeys(r.case for r in mine))
        console.print(f"not measured: {name} ({cases}): {reason}")
    for name, reason in absent.items():
        console.print(f"not here: {name}: {reason}")
