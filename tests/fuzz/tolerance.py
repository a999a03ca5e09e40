"""How far a result may be from the truth: a few times as far as the plain computation is.

The truth is the oracle in float64, the plain computation the oracle in the case's own dtype. So a
layer that rounds where a plain one would not is found in float64 and float32; in half precision
only what is worse than rounding everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fuzz.build import Draws

__all__ = ["compare"]

TIMES_REFERENCE = 8
"""How many times the reference's own error a result may be off by."""
SAMPLES = 6
"""How many such computations there are at most."""
FLOOR = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
"""What it may be off by at least, relative to the norm of the output, or of all gradients."""


def compare(
    draws: Draws,
    dtype: torch.dtype,
    what: list[str],
    got: list[Tensor],
    inputs: dict[str, Tensor],
    by_oracle: Callable[[dict[str, Tensor], torch.dtype], list[Tensor]],
) -> None:
    """Compare results with the truth.

    A plain computation may be lucky; so where the first does not explain an error, more are made,
    of inputs that are off by a rounding.

    :param dtype: In which plain computations are made.
    :param what: Names of the results, the output first, then gradients.
    :param inputs: All that the results are computed of.
    :param by_oracle: Computes them of such inputs in a dtype.
    :raises AssertionError: If a result is further from the truth than plain computations are.
    """
    want = by_oracle({name: t.double() for name, t in inputs.items()}, torch.float64)
    assert [t.shape for t in got] == [t.shape for t in want]
    assert got[0].dtype == dtype
    errors = distances(got, want)
    norms = [float(t.detach().norm()) for t in want]
    scales = [norms[0], *[math.hypot(*norms[1:])] * len(norms[1:])]
    reference = [0.0] * len(want)
    for sample in range(SAMPLES):
        near = {name: draws.rounded(t, dtype) if sample else t for name, t in inputs.items()}
        reference = list(map(max, reference, distances(by_oracle(near, dtype), want)))
        allowed = [TIMES_REFERENCE * r + FLOOR[dtype] * s for r, s in zip(reference, scales)]
        wrong = [i for i, error in enumerate(errors) if not error <= allowed[i]]  # NaN is wrong
        if not wrong:
            return
    i = wrong[0]
    raise AssertionError(
        f"{what[i]} is off by {errors[i]:.2g} of {norms[i]:.2g}; plain computations "
        f"in {dtype} are off by {reference[i]:.2g}, so {allowed[i]:.2g} would be allowed"
    )


def distances(a: list[Tensor], b: list[Tensor]) -> list[float]:
    return [float((x.detach().double() - y.detach()).norm()) for x, y in zip(a, b)]
