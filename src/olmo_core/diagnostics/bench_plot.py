"""The plot of ``bench``: time against length, a panel for each case."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from olmo_core.diagnostics.bench import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

_PANELS_A_ROW = 2


def draw(path: Path, rows: Sequence[Measurement], title: str, absent: Mapping[str, str]) -> None:
    """Write a PNG. Backends are solid lines, peers dashed; those that are absent stand below.

    :param absent: The reason for each.
    :raises ImportError: Without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [r for r in rows if r.forward_ms is not None]
    cases = list(dict.fromkeys(r.case for r in measured))
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r.name for r in measured))}
    caption = [f"not here: {name}: {reason}" for name, reason in absent.items()]
    caption = [line for text in caption for line in textwrap.wrap(text, 160)]
    n_rows = -(-len(cases) // _PANELS_A_ROW)
    below = 0.2 + 0.15 * len(caption)  # inches
    height = 3.2 * n_rows + 0.6 + below
    figure = Figure(figsize=(10, height))
    FigureCanvasAgg(figure)
    for i, case in enumerate(cases):
        axes = figure.add_subplot(n_rows, min(len(cases), _PANELS_A_ROW), i + 1)
        _panel(axes, case, [r for r in measured if r.case == case], colors)
    figure.suptitle(title, fontsize=9)
    figure.text(0.02, 0.1 / height, "\n".join(caption), fontsize=7, va="bottom")
    figure.tight_layout(rect=(0, below / height, 1, 1))
    figure.savefig(path, dpi=130)


def _panel(axes: Axes, case: str, rows: list[Measurement], colors: Mapping[str, str]) -> None:
    for name, color in colors.items():
        mine = [r for r in rows if r.name == name]
        times = [r.forward_ms if r.both_ms is None else r.both_ms for r in mine]
        style = "--" if any(r.is_peer for r in mine) else "-"
        if mine:
            tokens = [float(r.tokens) for r in mine]
            drawn = [t for t in times if t is not None]
            axes.plot(tokens, drawn, style, marker="o", ms=3, color=color, label=name)
    what = "forward" if all(r.both_ms is None for r in rows) else "forward + backward"
    axes.set_title(f"{case}: {what}, ms", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({r.tokens for r in rows})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(which="both", labelsize=7)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=7)
