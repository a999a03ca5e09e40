"""The gated delta rule on a CUDA device in half precision: what Triton kernels can serve, and how.

The algebra is that of ``torch_forward`` and ``torch_backward``, the legend of
shapes that of ``chunks``. Products take operands of the inputs' dtype and sum in
float32; states are float32 while they are carried from chunk to chunk; everything around the
inverse of a chunk is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.rows import rows
from olmo_core.nn.attention.kernels.triton_driver import INTERPRETED, triton_refusal

from .chunks import ChunkGrid
from .torch_forward import Saved

__all__ = [
    "saved_like",
    "triton_backward",
    "triton_forward",
    "triton_span_backward",
    "triton_span_forward",
    "unsupported",
]

_CHUNK = 64  # tokens: the row count of one tensor core instruction
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_KEY_DIM = 256
_MAX_ROWS = 65535  # programs along a grid's second dimension


def unsupported(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels can't serve these tensors, or None if they can.

    Asks only what the forward and the backward pass, and fake tensors, know alike.

    :param q: ``(B, T, H, K)``.
    :param v: ``(B, T, HV, V)``.
    """
    if (reason := triton_refusal(q)) is not None:
        return reason
    if q.dtype not in _DTYPES:
        return f"the kernels take bfloat16 and float16, not {q.dtype}"
    if INTERPRETED and q.dtype == torch.bfloat16:
        return "Triton's interpreter has no bfloat16 products"
    if q.shape[3] > _MAX_KEY_DIM:
        return f"key_dim is at most {_MAX_KEY_DIM}, not {q.shape[3]}"
    if q.shape[0] * v.shape[2] > _MAX_ROWS:
        return f"batch x value heads is at most {_MAX_ROWS}, not {q.shape[0]} x {v.shape[2]}"
    if not (q.shape[0] and q.shape[1]):
        return f"there are no tokens in {tuple(q.shape)}"
    return None if INTERPRETED else _device_reason(q.device)


@cache
def _device_reason(device: torch.device) -> str | None:
    """Why not this GPU. Blocks were chosen for Hopper's matrix instructions and shared memory:
    elsewhere they do not compile, or to slow code."""
    major, minor = torch.cuda.get_device_capability(device)
    if major == 9:
        return None
    return f"the kernels are for compute capability 9, {device} has {major}.{minor}"


def saved_like(q: Tensor, v: Tensor) -> Saved:
    """Room for what the backward pass needs: in q's dtype, the inverses float32."""
    grid = _grid(q, v)
    N, R, C = grid.chunks, grid.rows, grid.chunk
    states, updates, inverses = Saved.shapes(grid)
    return Saved(
        q.new_empty(states),
        q.new_empty(updates),
        q.new_empty(inverses, dtype=torch.float32),
        q.new_empty(N, R, C, C),
        q.new_empty(N, R, C, grid.key_dim),
    )


def triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_doc_lens: Tensor | None,
    *,
    scale: float,
    normalize_qk: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Saved | None]:
    """Like :func:`.torch_forward.chunked_forward`, for what these kernels serve."""
    from .triton_forward import launch_forward

    grid = _grid(q, v)
    saved = saved_like(q, v) if save else None
    ids = None if cu_doc_lens is None else grid.document_ids(cu_doc_lens)
    q, k, v = rows(q, k, v)
    out, final = launch_forward(
        grid, q, k, v, g, beta, initial_state, ids, saved, scale, normalize_qk
    )
    return out, final, saved


def triton_backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    saved: Saved,
    cu_doc_lens: Tensor | None,
    *,
    scale: float,
    normalize_qk: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Like :func:`.torch_backward.chunked_backward`, after :func:`triton_forward`."""
    from .triton_backward import launch_backward

    grid = _grid(q, v)
    ids = None if cu_doc_lens is None else grid.document_ids(cu_doc_lens)
    dout, q, k, v = rows(dout, q, k, v)
    return launch_backward(grid, dout, dfinal, q, k, v, g, beta, ids, saved, scale, normalize_qk)


def triton_span_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_doc_lens: Tensor | None,
    incoming: Callable[[Tensor, Tensor], Tensor],
    last_start: int,
    *,
    scale: float,
    normalize_qk: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Saved | None]:
    """Like :func:`.torch_span.chunked_span_forward`, for what these kernels serve."""
    from .triton_forward import launch_forward
    from .triton_span import launch_map

    grid = _grid(q, v)
    saved = saved_like(q, v) if save else None
    ids = None if cu_doc_lens is None else grid.document_ids(cu_doc_lens)
    q, k, v = rows(q, k, v)
    maps: list[Tensor] = []

    def initial(factors: Tensor, w: Tensor, values: Tensor) -> Tensor:
        n, m = launch_map(grid, k, factors, w, values, grid.chunk_of(last_start))
        if ids is not None:  # a document that starts here knows no earlier state
            m.zero_()
        maps.append(m)
        return incoming(n, m)

    out, _ = launch_forward(grid, q, k, v, g, beta, initial, ids, saved, scale, normalize_qk)
    return out, maps[0], saved


def triton_span_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    saved: Saved,
    cu_doc_lens: Tensor | None,
    outgoing: Callable[[Tensor], Tensor],
    first_stop: int,
    *,
    scale: float,
    normalize_qk: bool,
) -> tuple[Tensor, ...]:
    """Like :func:`.torch_span.chunked_span_backward`, after :func:`triton_span_forward`."""
    from .triton_backward import launch_backward

    grid = _grid(q, v)
    ids = None if cu_doc_lens is None else grid.document_ids(cu_doc_lens)
    dout, q, k, v = rows(dout, q, k, v)
    reach = grid.chunk_of(first_stop - 1) + 1
    return launch_backward(
        grid, dout, outgoing, q, k, v, g, beta, ids, saved, scale, normalize_qk, reach
    )[:5]


def _grid(q: Tensor, v: Tensor) -> ChunkGrid:
    return replace(ChunkGrid.of(q, v), chunk=_CHUNK)
