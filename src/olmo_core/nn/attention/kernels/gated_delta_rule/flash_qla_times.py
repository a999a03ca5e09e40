"""Where FlashQLA measured faster than the Triton kernels: the policy of its row, as data."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Measured(NamedTuple):
    """Both rules' milliseconds in bfloat16 with keys of 128, in one run on one GPU."""

    batch: int
    tokens: int
    key_heads: int
    value_heads: int
    value_dim: int
    gradients: bool
    """Forward and backward, or forward without what backward needs."""
    flash_qla_ms: float
    triton_ms: float

    def size(self) -> tuple[int, int]:
        """What must not be less for the measurement to speak for a call: tokens, and states."""
        return self.batch * self.tokens, self.batch * self.value_heads

    def speaks_for(self, call: Measured) -> bool:
        kind, asked = (
            (m.value_dim, m.value_heads // m.key_heads, m.gradients) for m in (self, call)
        )
        enough = all(a <= b for a, b in zip(self.size(), call.size(), strict=True))
        return kind == asked and enough


# `python -m benchmarks.flash_qla_gpu` prints these lines: each of one run on an H100, there from an
# idle GPU, so with each rule's launches. In a busy one ours took 0.86 and 3.28 ms of the last two,
# in another run: more than FlashQLA with its launches. Lines without that margin are left out, and
# what is not in this table is not chosen.
MEASURED: tuple[Measured, ...] = (
    Measured(2, 8192, 16, 16, 256, True, 3.23, 2.287),
    Measured(2, 8192, 16, 32, 128, False, 0.78, 1.252),
    Measured(2, 8192, 16, 32, 128, True, 2.601, 3.283),
)

_GAIN = 0.95  # a gain of less than 5% is not worth a minute of compiling


def worth_it(q: Tensor, v: Tensor, needs_grad: bool) -> str | None:
    """Why FlashQLA would not be faster than the Triton kernels, or None if it measured faster.

    The largest measurement speaks that has the call's value_dim and group, and no more tokens and
    states than the call.

    :param q: (B, T, H, K).
    :param v: (B, T, HV, V).
    :param needs_grad: Whether backward follows.
    """
    (batch, tokens, key_heads), (value_heads, value_dim) = q.shape[:3], v.shape[2:]
    call = Measured(batch, tokens, key_heads, value_heads, value_dim, needs_grad, 0.0, 0.0)
    known = [m for m in MEASURED if m.speaks_for(call)]
    work = "forward and backward" if needs_grad else "forward without gradients"
    if not known:
        return (
            f"no measurement speaks for {work} of {batch} x {tokens} tokens with {key_heads} key "
            f"and {value_heads} value heads of {value_dim}"
        )
    most = max(known, key=Measured.size)
    if most.flash_qla_ms <= _GAIN * most.triton_ms:
        return None
    return (
        f"its {work} took {most.flash_qla_ms:.2f} ms where the Triton kernels' took "
        f"{most.triton_ms:.2f}, at {most.batch} x {most.tokens} tokens"
    )
