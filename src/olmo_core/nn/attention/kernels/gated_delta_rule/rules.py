"""Who computes the gated delta rule for a call: the table of implementations, best first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.table import Choice, Row, choose

from .fla import fla_gated_delta_rule, fla_usable
from .flash_qla import flash_qla_gated_delta_rule, flash_qla_refusal
from .op import gated_delta_rule
from .triton_rule import unsupported

Rule = Callable[..., tuple[Tensor, Tensor]]
"""Called as :func:`.op.gated_delta_rule` is."""


def _fla_refusal(q: Tensor, v: Tensor) -> str | None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"fla takes half precision, not {q.dtype}"
    usable, reason = fla_usable(q.device, group=v.shape[2] // q.shape[2])
    return None if usable else reason


def _refusal(q: Tensor, v: Tensor) -> str | None:
    return unsupported(q, v)


RULES: tuple[Row[Rule], ...] = (
    Row(
        "flash_qla",
        flash_qla_gated_delta_rule,
        "it measured faster for such a call, and its probe agrees with torch; its kernels compile "
        "for 40 to 90 s each when they are first needed, and are kept on disk",
        flash_qla_refusal,
    ),
    Row("triton", gated_delta_rule, "its kernels serve these inputs here", _refusal),
    Row("fla", fla_gated_delta_rule, "its probe agrees with torch, both ways", _fla_refusal),
    Row("torch", gated_delta_rule, "runs anywhere, in any dtype"),
)
"""The op runs Triton kernels or plain torch by itself; the others' functions stand beside it."""


def choose_rule(q: Tensor, v: Tensor) -> Choice[Rule]:
    """The implementation for inputs like ``q`` (B, T, H, K) and ``v`` (B, T, HV, V), and why.

    It may be another where gradients are recorded than under ``no_grad``, with other rounding.
    """
    if torch.compiler.is_compiling():
        return Choice(RULES[-1], "one op of a compiled graph, which runs what suits it")
    return choose(RULES, q, v)
