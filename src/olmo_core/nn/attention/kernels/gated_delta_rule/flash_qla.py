"""FlashQLA's gated delta rule (PyPI ``flash-qla``), for calls where it measured faster.

TileLang compiles its kernels with nvcc when they are first needed, 40 to 90 seconds each, once for
each number of heads, and keeps them in a cache on disk. They know keys and values of 128 dims:
wider values are several value heads of the same keys and gates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.apart import apart, on_device
from olmo_core.nn.dispatch import autocast_dtype, cast_for_autocast, is_observed
from olmo_core.nn.functional import largest
from olmo_core.nn.lengths import check_cu_doc_lens

from .flash_qla_machine import machine_refusal
from .flash_qla_times import worth_it
from .library_documents import library_documents
from .op import check_inputs, gated_delta_rule
from .probe import BOUND, Problem, relative_error

_DIM = 128
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_ELEMENTS = 2**31 - 1


def flash_qla_gated_delta_rule(
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
    """:func:`.op.gated_delta_rule` by FlashQLA: the same arguments, the same result.

    Each other ``scale`` compiles the kernels anew. With documents the host waits for their lengths.

    :raises ImportError: If FlashQLA is not installed.
    :raises ValueError: For what the kernels don't know, and as :func:`.op.gated_delta_rule`.
    :raises TypeError: If ``cu_doc_lens`` is not int32.
    """
    check_inputs(q, k, v, g, beta, initial_state, cu_doc_lens, scale)
    q, k, v = cast_for_autocast(q, k, v)
    if (reason := _shape_refusal(q, v)) is not None:
        raise ValueError(f"FlashQLA can't serve this call: {reason}. Use gated_delta_rule.")
    shape, ends, state = v.shape, None, initial_state
    if cu_doc_lens is not None:
        if not checked:
            check_cu_doc_lens(cu_doc_lens, q.shape[0] * q.shape[1], None)
        # It keeps what it derives from lengths by the tensor's identity: these are of this call.
        (q, k, v, g, beta), state, ends = library_documents((q, k, v, g, beta), state, cu_doc_lens)
    parts = shape[3] // _DIM
    if parts > 1:
        v = v.unflatten(3, (parts, _DIM)).flatten(2, 3)
        g, beta = (x.repeat_interleave(parts, dim=2) for x in (g, beta))
    if state is not None:
        state = state.float().unflatten(3, (parts, _DIM)).transpose(2, 3).flatten(1, 2)
    with on_device(q.device), torch.autocast(q.device.type, enabled=False):
        from flash_qla import chunk_gated_delta_rule

        out, states = chunk_gated_delta_rule(
            *map(_packed, (q, k, v, g.float(), beta.float())),
            scale=_DIM**-0.5 if scale is None else float(scale),
            initial_state=None if state is None else _packed(state),
            output_final_state=True,
            use_qk_l2norm_in_kernel=normalize_qk,
            cu_seqlens=ends,
            auto_cp=False,  # its split of a sequence drops states that decayed below e^-10
        )
    for result in (out, states):
        if result.requires_grad:
            result.register_hook(_incoming)
    if ends is not None:
        states = states[-1:]
    states = states.unflatten(1, (shape[2], parts)).transpose(2, 3).flatten(3)
    return out.reshape(shape), states


def _packed(x: Tensor) -> Tensor:
    """Contiguous to those too who look at the strides of dimensions of size 1."""
    return x.contiguous().flatten().view(x.shape)


def _incoming(grad: Tensor | None) -> Tensor | None:
    """What FlashQLA's backward is given of an output, None if only the other one has a gradient.

    Of its own gradients it would leave out, without a word, what depends on its inputs.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "FlashQLA is differentiable once, and create_graph asks for a second derivative. For "
            "double backward use gated_delta_rule_reference."
        )
    return None if grad is None else _packed(grad)


def _shape_refusal(q: Tensor, v: Tensor) -> str | None:
    """What its code asserts, or counts on, of tensors on any device."""
    if q.dtype not in _DTYPES:
        return f"its kernels take bfloat16 and float16, not {q.dtype}"
    if q.shape[3] != _DIM:
        return f"key_dim is {_DIM}, not {q.shape[3]}"
    if v.shape[3] % _DIM:
        return f"value_dim is a multiple of {_DIM}, not {v.shape[3]}"
    if q.shape[:3].numel() < 2:
        return f"there are fewer than two keys in {tuple(q.shape)}"
    if v.numel() > _MAX_ELEMENTS:
        return f"its kernels count elements in 32 bits, and v has {v.numel()}"
    return None


def flash_qla_refusal(q: Tensor, v: Tensor) -> str | None:
    """Why FlashQLA doesn't serve inputs like these, or None: then it measured faster, and a probe
    of such a problem, gradients included where they are wanted, agreed with torch. Never raises.

    :param q: (B, T, H, K).
    :param v: (B, T, HV, V).
    """
    if (reason := machine_refusal(q.device)) is not None:
        return reason
    if is_observed((q, v)):
        return "a mode or transform must see the rule as one op"
    if (reason := _shape_refusal(q, v)) is not None:
        return reason
    if (dtype := autocast_dtype(q)) not in (None, q.dtype):
        return f"autocast makes {dtype} of inputs of {q.dtype}"
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or v.requires_grad)
    if (reason := worth_it(q, v, needs_grad)) is not None:
        return reason
    if torch.cuda.is_current_stream_capturing():
        return "it reads lengths on the host, which a CUDA graph can't capture"
    batch, _, key_heads, _ = q.shape
    group = v.shape[2] // key_heads
    problem = Problem(q.device, q.dtype, _DIM, v.shape[3], group, key_heads, batch)
    usable, answer = _probe(problem, needs_grad)
    return None if usable else answer


_PROBED: dict[tuple[Problem, bool], tuple[bool, str]] = {}


def _probe(problem: Problem, gradients: bool) -> tuple[bool, str]:
    """Remembered for all that its kernels are compiled for, but not where memory was wanting: that
    may work later."""
    key = problem, gradients
    if key not in _PROBED:
        try:
            _PROBED[key] = apart(problem.device, lambda: _try(problem, gradients))
        except torch.OutOfMemoryError:
            return False, "its probe found no memory"
    return _PROBED[key]


def _try(problem: Problem, gradients: bool) -> tuple[bool, str]:
    """As the layer calls it: documents without a state, and rows that continue a cache's."""
    try:
        with torch.set_grad_enabled(gradients):
            error = largest(_error(problem, gradients, documents) for documents in (True, False))
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever a compiler or a library does wrong is the answer
        lines = str(e).strip().splitlines() or [""]
        return False, f"its probe failed: {type(e).__name__}: {lines[0][:200]}"
    if not error <= BOUND:
        return False, f"its probe is off by {error:.1e}, more than {BOUND:.0e}"
    ways = "forward and backward" if gradients else "forward"
    return True, f"its probe agrees with torch to {error:.1e}, {ways}"


def _error(problem: Problem, gradients: bool, documents: bool) -> float:
    """The largest relative error of output, state and gradients; float32 runs the torch form."""
    inputs, cu, dout = problem.inputs()
    if not documents:
        v = inputs[2]
        state = torch.linspace(-1, 1, v[:, 0].numel() * _DIM, device=v.device)
        inputs.append(state.view(v.shape[0], v.shape[2], _DIM, v.shape[3]))
    results = []
    for rule, wide in ((flash_qla_gated_delta_rule, False), (gated_delta_rule, True)):
        leaves = [(x.float() if wide else x).clone().requires_grad_(gradients) for x in inputs]
        out, final = rule(
            *leaves[:5],
            initial_state=None if documents else leaves[5],
            cu_doc_lens=cu if documents else None,
            normalize_qk=True,
        )
        results.append([out, final])
        if gradients:
            cotangents = [dout.to(out.dtype), torch.ones_like(final)]
            results[-1] += torch.autograd.grad([out, final], leaves, cotangents)
    return relative_error(*results)
