"""flash-linear-attention's gated delta rule, where it works here.

It needs a CUDA device and a Triton that compiles it correctly, backward included: on Hopper with
Triton 3.4 to 3.7.0 its backward refuses to run. So a tick is a small problem computed forward and
backward and compared with the plain torch form, never an import.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .library_documents import library_documents
from .op import gated_delta_rule
from .probe import BOUND, Problem, relative_error


def fla_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_doc_lens: Tensor | None = None,
    normalize_qk: bool = False,
    checked: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`.op.gated_delta_rule` by fla: the same arguments, the same result.

    :raises ImportError: If fla is not installed.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    shape = v.shape
    lengths: dict[str, Any] = {}
    if cu_doc_lens is not None:
        (q, k, v, g, beta), initial_state, lengths["cu_seqlens"] = library_documents(
            (q, k, v, g, beta), initial_state, cu_doc_lens
        )
    out, states = chunk_gated_delta_rule(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        g.float(),
        beta.float(),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=None if initial_state is None else initial_state.float(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=normalize_qk,
        **lengths,
    )
    return out.view(shape), (states if cu_doc_lens is None else states[-1:])


def fla_usable(device: torch.device | str, *, group: int = 1) -> tuple[bool, str]:
    """Whether :func:`fla_gated_delta_rule` computes correctly here, and why (not). Never raises.

    :param device: Where it would run.
    :param group: Value heads per key head.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return False, f"fla runs on CUDA devices, not on {device.type}"
    return _refusal(device) or _probe(str(device), group)


def _refusal(device: torch.device) -> tuple[bool, str] | None:
    """What fla's backward refuses. Its probe would find that too, after a minute of tuning."""
    if torch.cuda.get_device_capability(device)[0] != 9 or find_spec("tilelang") is not None:
        return None
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return False, "fla needs Triton, which is not installed"
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if not (3, 4) <= release < (3, 7, 1):
        return None
    return False, (
        f"fla's backward refuses Triton {version} on Hopper, which compiles it wrongly: install "
        "Triton 3.7.1 or newer, or tilelang"
    )


def _probe(device: str, group: int) -> tuple[bool, str]:
    """Remembered, but for what failed for want of memory: that may work later."""
    try:
        return _probed(device, group)
    except torch.OutOfMemoryError:
        return False, "fla's probe found no memory"


@cache
def _probed(device: str, group: int) -> tuple[bool, str]:
    try:
        with torch.enable_grad(), torch.inference_mode(False):
            error = _measure(device, group)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever a library does wrong is the answer
        lines = str(e).strip().splitlines() or [""]
        return False, f"fla's probe failed: {type(e).__name__}: {lines[0][:200]}"
    if not error <= BOUND:
        return False, f"fla's probe is off by {error:.1e}, more than {BOUND:.0e}"
    return True, f"fla's probe agrees with torch to {error:.1e}, forward and backward"


def _measure(device: str, group: int) -> float:
    """The largest relative error of outputs and gradients on a problem with two documents."""
    problem = Problem(torch.device(device), torch.bfloat16, 64, 64, group)
    inputs, cu, cotangent = problem.inputs()
    results = []
    for rule in (fla_gated_delta_rule, gated_delta_rule):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, _ = rule(*leaves, cu_doc_lens=cu, normalize_qk=True)
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    return relative_error(*results)
