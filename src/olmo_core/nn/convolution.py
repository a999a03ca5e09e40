"""A short causal depthwise convolution over time, with documents and a state for decoding.

Legend of shapes: B batch, T tokens, C channels, k kernel size. Tap ``lag`` reads the input ``lag``
tokens back; its weights are ``weight[:, 0, k - 1 - lag]``, as in ``torch.nn.Conv1d``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.dispatch import refuse_second_derivative, register_differentiable
from olmo_core.nn.functional import compute_dtype

__all__ = ["CausalConv1d", "causal_conv1d"]

_LIB = torch.library.Library("olmo_core", "FRAGMENT")
_CALL: dict[str, Callable[..., Any]] = {}

# Floats of a block on a CPU: its k + 2 passes then run in the second-level cache.
_CPU_BLOCK = 128 << 10


class CausalConv1d(nn.Module):
    """``silu(conv(x))``, each channel by itself, each output from the last ``kernel_size`` inputs.

    :param hidden_size: The number of channels.
    :param kernel_size: How many inputs an output sees, its own included.
    :param bias: Whether there is a bias.
    :param activation: ``"silu"``, or None for the bare convolution.
    :param dtype: The dtype of the parameters.
    :param init_device: The device of the parameters.
    :raises OLMoConfigurationError: For a size below 1 or an unknown activation.
    """

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        *,
        bias: bool = False,
        activation: str | None = "silu",
        dtype: torch.dtype = torch.float32,
        init_device: str = "cpu",
    ) -> None:
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("kernel_size", kernel_size)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise OLMoConfigurationError(f"{name} must be a positive int, got {size!r}.")
        if activation not in ("silu", None):
            raise OLMoConfigurationError(f"activation must be 'silu' or None, got {activation!r}.")
        self.hidden_size, self.kernel_size = hidden_size, kernel_size
        self.activation = activation
        options: dict[str, Any] = {"dtype": dtype, "device": init_device}
        self.weight = nn.Parameter(torch.empty(hidden_size, 1, kernel_size, **options))
        self.bias = nn.Parameter(torch.empty(hidden_size, **options)) if bias else None
        if self.weight.device.type != "meta":
            self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, kernel_size={self.kernel_size}, bias={self.bias is not None}"

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights uniformly from +-1/sqrt(kernel_size), as torch's Conv1d does; zero the
        bias."""
        from olmo_core.nn.init import copy_into

        bound = 1 / math.sqrt(self.kernel_size)
        shape, device = self.weight.shape, self.weight.device
        draws = torch.empty(shape, dtype=torch.float32, device=device)
        copy_into(self.weight, draws.uniform_(-bound, bound, generator=generator))
        if self.bias is not None:
            self.bias.zero_()

    def forward(
        self, x: Tensor, cu_doc_lens: Tensor | None = None, *, state: Tensor | None = None
    ) -> Tensor:
        """Convolve.

        :param x: (B, T, C).
        :param cu_doc_lens: (documents + 1,), int32: cumulative document lengths over the flattened
            B * T tokens. No output sees another document's inputs.
        :param state: (B, k - 1, C): the inputs before ``x``, zeros if not given. Only without
            ``cu_doc_lens``.
        :returns: (B, T, C), in x's dtype.
        :raises ValueError: If shapes do not fit, or both a state and lengths are given.
        """
        if x.dim() != 3 or x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"Expected an input (batch, tokens, {self.hidden_size}), got {tuple(x.shape)}."
            )
        silu = self.activation == "silu"
        if state is None:
            return causal_conv1d(x, self.weight, self.bias, cu_doc_lens=cu_doc_lens, silu=silu)
        past = self.kernel_size - 1
        if cu_doc_lens is not None:
            raise ValueError("A state continues one sequence a row: leave cu_doc_lens out.")
        if state.shape != (x.shape[0], past, x.shape[2]):
            raise ValueError(
                f"state must hold the {past} inputs before x, of shape "
                f"{(x.shape[0], past, x.shape[2])}, got {tuple(state.shape)}."
            )
        inputs = torch.cat((state.to(x.dtype), x), 1)
        if x.shape[1] == 1:
            return self._last(inputs)
        return causal_conv1d(inputs, self.weight, self.bias, silu=silu)[:, past:]

    def _last(self, inputs: Tensor) -> Tensor:
        """The output (B, 1, C) for the last of k inputs (B, k, C)."""
        dtype = compute_dtype(inputs.dtype)
        out = (inputs.to(dtype) * self.weight.to(dtype).squeeze(1).t()).sum(1, keepdim=True)
        if self.bias is not None:
            out = out + self.bias.to(dtype)
        return (F.silu(out) if self.activation == "silu" else out).to(inputs.dtype)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_doc_lens: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """See :class:`CausalConv1d`. Sums in float32 at least; differentiable once.

    Eager code runs one op that works through the cache in blocks. A compiler fuses the plain
    expression better than it could call that op.

    :param x: (B, T, C).
    :param weight: (C, 1, k).
    :param bias: (C,), or None.
    :returns: (B, T, C), in x's dtype.
    :raises ValueError: If ``cu_doc_lens`` does not describe the tokens.
    """
    positions, flat = None, x
    if cu_doc_lens is not None:
        # Imported here: the attention package imports this module.
        from olmo_core.nn.lengths import check_cu_doc_lens, document_positions

        total = x.shape[0] * x.shape[1]
        check_cu_doc_lens(cu_doc_lens, total, None)
        flat = x.flatten(0, 1).unsqueeze(0)
        if not torch.compiler.is_compiling():
            positions = document_positions(cu_doc_lens, total)
    if torch.compiler.is_compiling():
        out = _fusible(flat, weight, bias, cu_doc_lens, silu)
    else:
        out = _CALL["causal_conv1d"](flat, weight, bias, positions, silu)
    return out.view(x.shape)


def _fusible(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_doc_lens: Tensor | None, silu: bool
) -> Tensor:
    dtype, tokens = compute_dtype(x.dtype), x.shape[1]
    documents = None
    if cu_doc_lens is not None:
        index = torch.arange(tokens, device=x.device, dtype=cu_doc_lens.dtype)
        documents = torch.searchsorted(cu_doc_lens, index, right=True)
    taps = weight.squeeze(1).to(dtype).flip(-1).unbind(-1)
    out = x.to(dtype) * taps[0]
    if bias is not None:
        out = out + bias.to(dtype)
    for lag in range(1, min(len(taps), tokens)):
        past = F.pad(x, (0, 0, lag, 0))[:, :tokens].to(dtype)
        if documents is not None:
            other = F.pad(documents[lag:] != documents[:-lag], (lag, 0))
            past = past.masked_fill(other.unsqueeze(-1), 0)
        out = out + past * taps[lag]
    return (F.silu(out) if silu else out).to(x.dtype)


def _blocks(x: Tensor) -> Iterator[slice]:
    """The tokens of each block of x (B, T, C)."""
    batch, tokens, channels = x.shape
    size = tokens if x.is_cuda else max(16, _CPU_BLOCK // max(1, batch * channels))
    for start in range(0, tokens, max(1, size)):
        yield slice(start, min(start + size, tokens))


def _taps(weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The weights (C,) of each lag, contiguous."""
    return list(weight.squeeze(1).to(dtype).t().flip(0).contiguous().unbind(0))


def _past(
    x: Tensor, block: slice, lag: int, positions: Tensor | None, scratch: Tensor
) -> tuple[slice, Tensor] | None:
    """What the block's tokens see at ``lag``: (the block's rows that see something, their inputs).

    :param scratch: Where inputs are written that have to be masked, as large as the block.
    """
    rows = slice(max(0, lag - block.start), block.stop - block.start)
    if rows.start >= rows.stop:
        return None
    past = x[:, block.start + rows.start - lag : block.stop - lag]
    if positions is not None and lag:
        keep = positions[block][rows].ge(lag).to(scratch.dtype).unsqueeze(-1)
        past = torch.mul(past, keep, out=scratch[:, rows])
    return rows, past


def _convolve(
    x: Tensor,
    taps: list[Tensor],
    bias: Tensor | None,
    block: slice,
    positions: Tensor | None,
    out: Tensor,
    scratch: Tensor,
) -> None:
    """Write the convolution of a block's tokens, before the activation, to ``out``."""
    torch.mul(x[:, block], taps[0], out=out)
    if bias is not None:
        out.add_(bias)
    for lag in range(1, len(taps)):
        seen = _past(x, block, lag, positions, scratch)
        if seen is not None:
            rows, past = seen
            out[:, rows].addcmul_(past.to(out.dtype), taps[lag])


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor | None, silu: bool
) -> Tensor:
    dtype = compute_dtype(x.dtype)
    taps = _taps(weight, dtype)
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = scratch = None
    for block in _blocks(x):
        if sums is None or scratch is None:
            sums = torch.empty(x[:, block].shape, dtype=dtype, device=x.device)
            scratch = torch.empty_like(sums)
        n = block.stop - block.start
        target = result[:, block]
        out = target if dtype == x.dtype else sums[:, :n]
        _convolve(x, taps, bias, block, positions, out, scratch[:, :n])
        if silu:
            F.silu(out, inplace=True)
        if out is not target:
            target.copy_(out)
    return result


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of weight and of a bias, whether there is one or not."""
    dtype = compute_dtype(x.dtype)
    taps = _taps(weight, dtype)
    dx = torch.empty(x.shape, dtype=dtype, device=x.device)
    dtaps = torch.zeros(len(taps), x.shape[-1], dtype=dtype, device=x.device)
    dbias = torch.zeros_like(dtaps[0])
    buffers: list[Tensor] = []
    for block in _blocks(x):
        if not buffers:
            buffers = [torch.empty_like(dx[:, block]) for _ in range(3)]
        dz, scratch, product = (buffer[:, : block.stop - block.start] for buffer in buffers)
        if silu:
            _convolve(x, taps, bias, block, positions, dz, scratch)
            dz.copy_(torch.ops.aten.silu_backward(dy[:, block].to(dtype), dz))
        else:
            dz.copy_(dy[:, block])
        dbias += dz.sum((0, 1))
        torch.mul(dz, taps[0], out=dx[:, block])
        dtaps[0] += torch.mul(dz, x[:, block], out=product).sum((0, 1))
        for lag in range(1, len(taps)):
            seen = _past(x, block, lag, positions, scratch)
            if seen is None:
                continue
            rows, past = seen
            dtaps[lag] += torch.mul(dz[:, rows], past, out=product[:, rows]).sum((0, 1))
            # dz is masked for each lag anew, since the mask shrinks as the lag grows.
            if positions is not None:
                keep = positions[block][rows].ge(lag).to(dtype).unsqueeze(-1)
                grad = torch.mul(dz[:, rows], keep, out=product[:, rows])
            else:
                grad = dz[:, rows]
            first = block.start + rows.start - lag
            dx[:, first : block.stop - lag].addcmul_(grad, taps[lag])
    dweight = dtaps.flip(0).t().unsqueeze(1).contiguous()
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, positions = ctx.saved_tensors  # checkpointing lets them be read once
    dx, dweight, dbias = _CALL["causal_conv1d_backward"](dy, x, weight, bias, positions, ctx.silu)
    return dx, dweight, (None if bias is None else dbias), None, None


def _forward_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _register() -> None:
    inputs = "Tensor x, Tensor weight, Tensor? bias, Tensor? positions, bool silu"
    _LIB.define(f"causal_conv1d({inputs}) -> Tensor")
    _LIB.define(f"causal_conv1d_backward(Tensor dy, {inputs}) -> (Tensor, Tensor, Tensor)")
    refuse = refuse_second_derivative("causal_conv1d", "torch.nn.functional.conv1d with groups")
    for name, run, fake, differentiate, save in (
        ("causal_conv1d", _forward, _forward_fake, _differentiate, _save),
        ("causal_conv1d_backward", _backward, _backward_fake, refuse, None),
    ):
        _CALL[name] = register_differentiable(_LIB, name, run, fake, differentiate, save)


_register()
