"""The learning rate over a run."""

from __future__ import annotations

import math


def cosine_with_warmup(
    step: int, *, lr: float, steps: int, warmup_steps: int, final_fraction: float
) -> float:
    """Linear from lr / warmup_steps to lr, then half a cosine down to ``final_fraction * lr``.

    (Loshchilov and Hutter, 2017, "SGDR", arXiv:1608.03983.)

    :param step: from 0; the last is ``steps - 1``.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return lr * (final_fraction + (1 - final_fraction) * cosine)
