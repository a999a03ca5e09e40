"""The gated delta rule on a CUDA device in half precision: what Triton kernels can serve, and how.

The algebra is that of ``torch_forward`` and ``torch_backward``, the legend of
shapes that of ``chunks``. Products take operands of the inputs' dtype and sum in
float32; states are float32 while they are carried from chunk to chunk; everything around the
inverse of a chunk is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.launch import compile_ahead, shaped_like
from olmo_core.nn.attention.kernels.rows import rows
from olmo_core.nn.attention.kernels.triton_driver import (
    INTERPRETED,
    shared_memory_kib,
    triton_refusal,
)

from .blocks import LEAST_SHARED_KIB
from .chunks import ChunkGrid, RuleInputs
from .probe import Problem, try_kernels
from .torch_forward import Saved

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
    if (reason := triton_refusal(q) or _unfit(q, v)) is not None:
        return reason
    return None if INTERPRETED else _device_reason(q, v)


def _unfit(q: Tensor, v: Tensor) -> str | None:
    """Why not on any device."""
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
    return None


def _tested(gpu: torch.device) -> bool:
    """Whether it is a Hopper, on which the kernels are tested: elsewhere a probe decides."""
    return torch.version.hip is None and torch.cuda.get_device_capability(gpu)[0] == 9


def _device_reason(q: Tensor, v: Tensor) -> str | None:
    """Why not this GPU."""
    gpu, major, minor = q.device, *torch.cuda.get_device_capability(q.device)
    if _tested(gpu):
        return None
    shared = shared_memory_kib(gpu)
    if torch.version.hip is not None or major < 8 or shared < LEAST_SHARED_KIB:
        return (
            f"the kernels need compute capability 8.0 and {LEAST_SHARED_KIB} KiB of shared memory, "
            f"{gpu} has {major}.{minor} and {shared}"
        )
    works, answer = probed(_problem(q, v))
    return None if works else answer


def _problem(q: Tensor, v: Tensor) -> Problem:
    return Problem(q.device, q.dtype, q.shape[3], v.shape[3], v.shape[2] // q.shape[2])


def probe_answer(q: Tensor, v: Tensor) -> str:
    """What a probe said for inputs like these, if one was made: where the kernels are tested, and
    in the interpreter, none is."""
    return _PROBED.get(_problem(q, v), (True, ""))[1]


def probed(problem: Problem) -> tuple[bool, str]:
    """What trying the kernels on a GPU told. Remembered, but for what could not be tried now."""
    answer = _PROBED.get(problem)
    if answer is not None:
        return answer
    if torch.cuda.is_current_stream_capturing():
        return False, "their probe can't run inside a CUDA graph: call the rule once before"
    try:
        answer = _PROBED[problem] = try_kernels(problem, triton_forward, triton_backward)
    except torch.OutOfMemoryError:
        return False, "their probe found no memory"
    return answer


_PROBED: dict[Problem, tuple[bool, str]] = {}


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
    x: RuleInputs, initial_state: Tensor | None, *, save: bool
) -> tuple[Tensor, Tensor, Saved | None]:
    """Like :func:`.torch_forward.chunked_forward`, for what these kernels serve."""
    from .triton_forward import launch_forward

    grid, x, ids = _problem_of(x)
    saved = saved_like(x.q, x.v) if save else None
    if x.q.is_cuda:
        _compile_ahead(x.q.device, grid, x, initial_state, ids, save)
    out, final = launch_forward(grid, x, initial_state, ids, saved)
    return out, final, saved


def triton_backward(
    dout: Tensor, dfinal: Tensor | None, x: RuleInputs, saved: Saved
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Like :func:`.torch_backward.chunked_backward`, after :func:`triton_forward`."""
    from .triton_backward import launch_backward

    grid, x, ids = _problem_of(x)
    (dout,) = rows(dout)
    return launch_backward(grid, dout, dfinal, x, ids, saved)


def triton_span_forward(
    x: RuleInputs, incoming: Callable[[Tensor, Tensor], Tensor], last_start: int, *, save: bool
) -> tuple[Tensor, Tensor, Saved | None]:
    """Like :func:`.torch_span.chunked_span_forward`, for what these kernels serve."""
    from .triton_forward import launch_forward
    from .triton_span import launch_map

    grid, x, ids = _problem_of(x)
    saved = saved_like(x.q, x.v) if save else None
    maps: list[Tensor] = []

    def initial(factors: Tensor, w: Tensor, values: Tensor) -> Tensor:
        n, m = launch_map(grid, x.k, factors, w, values, grid.chunk_of(last_start))
        if ids is not None:  # a document that starts here knows no earlier state
            m.zero_()
        maps.append(m)
        return incoming(n, m)

    out, _ = launch_forward(grid, x, initial, ids, saved)
    return out, maps[0], saved


def triton_span_backward(
    dout: Tensor,
    x: RuleInputs,
    saved: Saved,
    outgoing: Callable[[Tensor], Tensor],
    first_stop: int,
) -> tuple[Tensor, ...]:
    """Like :func:`.torch_span.chunked_span_backward`, after :func:`triton_span_forward`."""
    from .triton_backward import launch_backward

    grid, x, ids = _problem_of(x)
    reach = grid.chunk_of(first_stop - 1) + 1
    (dout,) = rows(dout)
    return launch_backward(grid, dout, outgoing, x, ids, saved, reach)[:5]


def _problem_of(x: RuleInputs) -> tuple[ChunkGrid, RuleInputs, Tensor | None]:
    """The grid, inputs whose strides the kernels take, and each token's document."""
    grid = _grid(x.q, x.v)
    ids = None if x.cu_doc_lens is None else grid.document_ids(x.cu_doc_lens)
    q, k, v = rows(x.q, x.k, x.v)
    return grid, x._replace(q=q, k=k, v=v), ids


def rule_ahead(device: torch.device, x: RuleInputs, save: bool) -> None:
    """Start to compile what :func:`triton_forward` of meta tensors like ``x`` will launch, and its
    backward for ``save``; not where a probe decides whether it will."""
    if _unfit(x.q, x.v) is not None or not _tested(device):
        return
    grid = _grid(x.q, x.v)
    ids = None if x.cu_doc_lens is None else grid.document_ids(x.cu_doc_lens)
    _compile_ahead(device, grid, x, None, ids, save)


def _compile_ahead(
    device: torch.device, grid: ChunkGrid, x: RuleInputs, initial_state: Tensor | None,
    ids: Tensor | None, save: bool,
) -> None:  # fmt: skip
    """Start to compile the forward kernels, and backward's for ``save``. The class names neither
    the batch, nor the length, nor where documents end."""

    def call() -> None:
        from .triton_backward import launch_backward
        from .triton_forward import launch_forward

        *shapes, initial, shaped_ids = shaped_like(*x.tensors, initial_state, ids)
        shaped = RuleInputs.of(shapes, None, x.scale, x.normalize_qk)
        saved = saved_like(shaped.q, shaped.v) if save else None
        launch_forward(grid, shaped, initial, shaped_ids, saved)
        if saved is not None:
            dout = shaped.v.new_empty(shaped.v.shape)
            launch_backward(grid, dout, None, shaped, shaped_ids, saved)

    sizes = grid.key_heads, grid.group, grid.key_dim, grid.value_dim
    options = ids is None, initial_state is None, x.normalize_qk, save
    key = ("gated_delta_rule", *sizes, x.q.dtype, x.g.dtype, x.beta.dtype, *options)
    compile_ahead(key, device, call)


def _grid(q: Tensor, v: Tensor) -> ChunkGrid:
    return replace(ChunkGrid.of(q, v), chunk=_CHUNK)
