"""Optional things that ``doctor`` tries: each probe uses its thing, and may raise anything."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

import torch

__all__ = ["EXTRAS", "Extra"]


@dataclass(frozen=True)
class Extra:
    """Something optional on this machine."""

    name: str
    purpose: str
    works: bool
    version: str
    cause: str
    mend: str


Probe = Callable[[torch.device], tuple[str, str]]
"""From the device to a version and the cause of failure, both possibly empty."""


def _triton(device: torch.device) -> tuple[str, str]:
    if find_spec("triton") is None:
        return "", "not installed: it comes with the CUDA builds of torch"
    import triton
    from triton.runtime import driver

    driver.active.get_current_target()
    return triton.__version__, ""


def _rope_qk_norm(device: torch.device) -> tuple[str, str]:
    from olmo_core.nn.attention.kernels import rope_qk_norm as kernels

    q, k = torch.randn(1, 5, 4, 64, device=device), torch.randn(1, 5, 2, 64, device=device)
    if reason := kernels.unsupported(q, k):
        return "", reason
    angle = torch.randn(5, 32, device=device)
    answers = []
    for form in (kernels.qk_norm_rope, kernels.qk_norm_rope_reference):
        inputs = [x.clone().requires_grad_() for x in (q, k)]
        out = form(*inputs, eps=1e-5, per_head=False, sin=angle.sin(), cos=angle.cos())
        grads = torch.autograd.grad(out, inputs, [torch.ones_like(x) for x in out])
        answers.append(torch.cat([x.flatten() for x in (*out, *grads)]))
    return "", _off((answers[0] - answers[1]).abs().max().item())


def _decode(device: torch.device) -> tuple[str, str]:
    from olmo_core.nn.attention.kernels.decode import triton_split_kv

    q = torch.randn(1, 1, 2, 64, device=device)
    cache, new = (torch.randn(1, n, 1, 64, device=device) for n in (40, 1))
    if reason := triton_split_kv.unsupported(q, cache):
        return "", reason
    seqlen, leftpad = (torch.tensor(x, device=device, dtype=torch.int32) for x in (29, [3]))
    out = triton_split_kv.split_kv(q, new, new, cache, cache, seqlen, leftpad, scale=0.125)
    keys = torch.cat([cache[:, 3:29], new], dim=1).transpose(1, 2)
    want = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys, keys, scale=0.125, enable_gqa=True
    ).transpose(1, 2)
    return "", _off((out - want).abs().max().item())


def _gated_delta_rule(device: torch.device) -> tuple[str, str]:
    from olmo_core.nn.attention.kernels.gated_delta_rule import gated_delta_rule
    from olmo_core.nn.attention.kernels.gated_delta_rule import triton_rule as kernels

    q, k, v = (torch.randn(1, 70, 2, 64, device=device).half() for _ in range(3))
    if reason := kernels.unsupported(q, v):
        return "", reason
    version = kernels.probe_answer(q, v)
    gates = -torch.rand(1, 70, 2, device=device), torch.rand(1, 70, 2, device=device)
    answers = []
    for wide in (False, True):  # float32 runs the torch form
        inputs = [x.float() if wide else x for x in (q, k, v)]
        leaves = [x.clone().requires_grad_() for x in (*inputs, *gates)]
        out, _ = gated_delta_rule(*leaves, normalize_qk=True)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        answers.append(torch.cat([x.flatten().float() for x in (out, *grads)]))
    error = ((answers[0] - answers[1]).norm() / answers[1].norm()).item()
    return version, "" if error < 1e-2 else f"its result is off by {error:.1e}"


def _convolution(device: torch.device) -> tuple[str, str]:
    from olmo_core.nn.attention.kernels.convolution import ROWS, Stream

    streams = [Stream(*(torch.randn(s, device=device) for s in ((2, 50, 64), (64, 1, 4))))]
    if reason := ROWS[0].refusal(streams):
        return "", reason
    dy = torch.randn(2, 50, 64, device=device)
    answers = []
    for row in (ROWS[0], ROWS[-1]):
        dx, dweight, *_ = row.run.backward([dy], streams, None, True)
        answers.append(torch.cat([*row.run.forward(streams, None, True)[0], *dx[0]]))
        answers[-1] = torch.cat([answers[-1].flatten(), dweight[0].flatten()])
    return "", _off((answers[0] - answers[1]).abs().max().item())


def _gates(device: torch.device) -> tuple[str, str]:
    from olmo_core.nn.attention.kernels.gates import GATED_NORM

    leaves = [torch.randn(s, device=device).requires_grad_() for s in ((50, 64), (50, 64), (64,))]
    if reason := GATED_NORM[0].refusal(*leaves, 1e-5):
        return "", reason
    answers = []
    for row in (GATED_NORM[0], GATED_NORM[-1]):
        out = row.run(*leaves, 1e-5)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        answers.append(torch.cat([x.flatten() for x in (out, *grads)]))
    return "", _off((answers[0] - answers[1]).abs().max().item())


def _off(error: float) -> str:
    return "" if error < 1e-4 else f"its result is off by {error:.1e}"


def _fla(device: torch.device) -> tuple[str, str]:
    if find_spec("fla") is None:
        return "", 'not installed: pip install "olmo-attention[fla]"'
    from olmo_core.nn.attention.kernels.gated_delta_rule.fla import fla_usable

    usable, why = fla_usable(device)
    return metadata.version("flash-linear-attention"), "" if usable else why


def _flash_qla(device: torch.device) -> tuple[str, str]:
    if find_spec("flash_qla") is None:
        return "", 'not installed: pip install "olmo-attention[flash-qla]"'
    from olmo_core.nn.attention.kernels.gated_delta_rule.flash_qla_machine import machine_refusal

    # Its probe compiles for minutes: that is left to the first call that it may serve.
    return metadata.version("flash-qla"), machine_refusal(device) or ""


def _matplotlib(device: torch.device) -> tuple[str, str]:
    if find_spec("matplotlib") is None:
        return "", "not installed"
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    FigureCanvasAgg(Figure(figsize=(1, 1))).print_png(io.BytesIO())
    return matplotlib.__version__, ""


def _transformers(device: torch.device) -> tuple[str, str]:
    if find_spec("transformers") is None:
        return "", "not installed"
    from transformers import AttentionInterface

    assert AttentionInterface is not None
    return metadata.version("transformers"), ""


_NOTHING = "nothing to do: torch's form computes the same"

EXTRAS: dict[str, tuple[str, Probe, str]] = {
    "triton": ("compiles the next five", _triton, "use a machine with a GPU, and torch for CUDA"),
    "rope_qk_norm": ("qk-norm and RoPE in one pass", _rope_qk_norm, _NOTHING),
    "decode": ("decoding over split keys", _decode, _NOTHING),
    "gated_delta_rule": ("gated delta net, where its probe agrees", _gated_delta_rule, _NOTHING),
    "convolution": ("gated delta net's convolution in one pass", _convolution, _NOTHING),
    "gates": ("gates and gated norms in one pass", _gates, _NOTHING),
    "fla": ("gated delta net, elsewhere", _fla, _NOTHING),
    "flash_qla": (
        "gated delta net, where it measured faster and a probe at the first call agrees, which "
        "compiles 40-90 s a kernel; excludes flash-attn 4",
        _flash_qla,
        _NOTHING,
    ),
    "matplotlib": ("plots of train and bench", _matplotlib, 'pip install "olmo-attention[plot]"'),
    "transformers": ("Hugging Face checkpoints", _transformers, 'pip install "olmo-attention[hf]"'),
}
"""By name: what it is for, its probe, and what mends it."""
