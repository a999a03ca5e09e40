"""Whether one implementation of the gated delta rule agrees with another on a device, both ways.

Kernels that were never run on a kind of GPU, or that depend on which compiler made them, are tried
on a small problem of the shapes they are asked for, before they may serve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.apart import apart
from olmo_core.nn.functional import largest

from .chunks import RuleInputs
from .torch_backward import chunked_backward
from .torch_forward import chunked_forward

# Twice what bfloat16 rounding of inputs, states and results leaves on the problem.
BOUND = 3e-2
_TOKENS = 150


@dataclass(frozen=True)
class Problem:
    """What kernels may be compiled for, and so what an answer holds for."""

    device: torch.device
    dtype: torch.dtype
    key_dim: int
    value_dim: int
    group: int
    """Value heads per key head."""
    key_heads: int = 2
    batch: int = 1

    def inputs(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """q, k, v, g and beta of two documents a row, their cumulative lengths, and an output's
        gradient."""
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            size = (self.batch, _TOKENS, *shape)
            return torch.randn(size, generator=generator).to(self.device)

        heads, values = self.key_heads, self.key_heads * self.group
        shapes = (heads, self.key_dim), (heads, self.key_dim), (values, self.value_dim)
        halves = [randn(*shape).to(self.dtype) for shape in shapes]
        gates = [-randn(values).abs(), randn(values).sigmoid()]
        ends = [row * _TOKENS + end for row in range(self.batch) for end in (70, _TOKENS)]
        cu = torch.tensor([0, *ends], dtype=torch.int32, device=self.device)
        return [*halves, *gates], cu, randn(values, self.value_dim).to(self.dtype)


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest norm of a difference over the norm of what is wanted; NaN if any is."""
    pairs = [(a.double(), b.double()) for a, b in zip(got, want, strict=True)]
    return largest(((a - b).norm() / b.norm()).item() for a, b in pairs)


def try_kernels(
    problem: Problem, forward: Callable[..., Any], backward: Callable[..., Any]
) -> tuple[bool, str]:
    """Whether kernels agree with the torch form, with documents and without, and the sentence that
    says so.

    :param forward: Like :func:`.torch_forward.chunked_forward`.
    :param backward: Like :func:`.torch_backward.chunked_backward`.
    :raises torch.OutOfMemoryError: If there was no memory for it.
    """
    return apart(problem.device, lambda: _try(problem, forward, backward))


def _try(
    problem: Problem, forward: Callable[..., Any], backward: Callable[..., Any]
) -> tuple[bool, str]:
    try:
        cases = (True, False)
        error = largest(_error(problem, forward, backward, documents) for documents in cases)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever a compiler or GPU does wrong is the answer
        lines = str(e).strip().splitlines() or [""]
        return False, f"their probe failed: {type(e).__name__}: {lines[0][:200]}"
    if not error <= BOUND:
        return False, f"their probe is off by {error:.1e}, more than {BOUND:.0e}"
    return True, f"their probe agrees with torch to {error:.1e}, forward and backward"


@torch.no_grad()
def _error(
    problem: Problem, forward: Callable[..., Any], backward: Callable[..., Any], documents: bool
) -> float:
    inputs, cu, dout = problem.inputs()
    lengths = cu if documents else None
    x = RuleInputs.of(inputs, lengths, problem.key_dim**-0.5, True)
    forms: list[tuple[Callable[..., Any], Callable[..., Any]]]
    forms, answers = [(forward, backward), (chunked_forward, chunked_backward)], []
    for run, back in forms:
        out, state, saved = run(x, None, save=True)
        grads = back(dout, None, x, saved)
        answers.append([out, state, *grads[:5]])
    return relative_error(*answers)
