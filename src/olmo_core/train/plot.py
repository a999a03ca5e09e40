"""The loss curve as a picture."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

from olmo_core.train.metrics import Row


def plot_losses(rows: list[Row], bigram: float, path: Path, title: str) -> bool:
    """Draw bits per byte over steps: training, held-out text, and the bigram model.

    :param rows: of ``metrics.jsonl``.
    :param bigram: the bigram model's bits per byte on the held-out text.
    :returns: ``False``, and nothing is drawn, where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    train = [(row["step"], row["loss"] / math.log(2)) for row in rows if "loss" in row]
    held_out = [(row["step"], row["held_out"]) for row in rows if "held_out" in row]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="0.75", linewidth=0.8, label="training batch")
    if held_out:
        label = f"held-out text ({held_out[-1][1]:.2f} at the end)"
        axes.plot(*zip(*held_out, strict=True), color="C0", marker="o", markersize=3, label=label)
    axes.axhline(bigram, color="C3", linestyle="--", label=f"bigram model ({bigram:.2f})")
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.set_title(title, parse_math=False)  # a folder may be called $x$
    # The first steps start at 8 bits and would squeeze the rest of the curve.
    low = min([value for _, value in train + held_out] + [bigram])
    axes.set_ylim(max(0.0, low - 0.2), bigram + 1.5)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that the font does not have
        figure.savefig(path, dpi=130)
    return True
