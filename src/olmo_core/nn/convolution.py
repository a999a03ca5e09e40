"""A short causal depthwise convolution over time, with documents and a state for decoding.

Legend of shapes: B batch, T tokens, C channels, k kernel size. Tap ``lag`` reads the input ``lag``
tokens back; its weights are ``weight[:, 0, k - 1 - lag]``, as in ``torch.nn.Conv1d``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.dispatch import is_heard
from olmo_core.nn.functional import compute_dtype
from olmo_core.nn.lengths import check_cu_doc_lens, document_positions, ends_before
from olmo_core.nn.sharded import local

__all__ = ["CausalConv1d", "causal_conv1d", "convolve_streams", "convolve_together"]


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
        :param state: (B, k - 1, C): the inputs before ``x``, zeros if not given. With
            ``cu_doc_lens`` (1, k - 1, C), those before the first document, even if that is empty.
        :returns: (B, T, C), in x's dtype.
        :raises ValueError: If shapes do not fit.
        """
        weight, bias = local(self.weight), local(self.bias)
        self._check(x, weight, cu_doc_lens, state)
        if state is not None and cu_doc_lens is None and x.shape[1] == 1 and not x.is_cuda:
            return self._last(torch.cat((state.to(x.dtype), x), 1))
        silu = self.activation == "silu"
        return causal_conv1d(x, weight, bias, cu_doc_lens=cu_doc_lens, silu=silu, state=state)

    def _check(
        self, x: Tensor, weight: Tensor, cu_doc_lens: Tensor | None, state: Tensor | None
    ) -> None:
        channels = weight.shape[0]  # under tensor parallelism, this rank's
        if x.dim() != 3 or x.shape[-1] != channels:
            raise ValueError(
                f"Expected an input (batch, tokens, {channels}), got {tuple(x.shape)}."
            )
        if state is None:
            return
        past = self.kernel_size - 1
        expected = (x.shape[0] if cu_doc_lens is None else 1, past, x.shape[2])
        if state.shape != expected:
            raise ValueError(
                f"state must hold the {past} inputs before x, of shape {expected}, got "
                f"{tuple(state.shape)}."
            )

    def _last(self, inputs: Tensor) -> Tensor:
        """The output (B, 1, C) for the last of k inputs (B, k, C)."""
        dtype = compute_dtype(inputs.dtype)
        weight, bias = local(self.weight), local(self.bias)
        out = (inputs.to(dtype) * weight.to(dtype).squeeze(1).t()).sum(1, keepdim=True)
        if bias is not None:
            out = out + bias.to(dtype)
        return (F.silu(out) if self.activation == "silu" else out).to(inputs.dtype)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_doc_lens: Tensor | None = None,
    silu: bool = True,
    state: Tensor | None = None,
) -> Tensor:
    """See :class:`CausalConv1d`. Sums in float32 at least; differentiable once.

    One op, :mod:`.attention.kernels.convolution`, except under a compiler for a CPU: that fuses the
    plain expression better than it could call the op.

    :param x: (B, T, C).
    :param weight: (C, 1, k).
    :param bias: (C,), or None.
    :param state: As :meth:`CausalConv1d.forward` takes it.
    :returns: (B, T, C), in x's dtype.
    :raises ValueError: If ``cu_doc_lens`` does not describe the tokens.
    """
    return convolve_streams([(x, weight, bias, state)], cu_doc_lens, silu)[0]


def convolve_together(
    convolutions: Sequence[CausalConv1d],
    xs: Sequence[Tensor],
    cu_doc_lens: Tensor | None = None,
    *,
    states: Sequence[Tensor | None] | None = None,
    checked: bool = False,
) -> list[Tensor]:
    """What each of up to three convolutions gives for its input: in one launch each way on a GPU.

    Modules with hooks are called one by one, and check the lengths themselves.

    :param convolutions: Of one kernel size and activation, all with a bias or none.
    :param xs: (B, T, C) each, with one B and T.
    :param states: As :meth:`CausalConv1d.forward` takes them: for all, or None.
    :param checked: ``cu_doc_lens`` is known to describe the tokens.
    """
    one_token = states is not None and cu_doc_lens is None and xs[0].shape[1] == 1
    states = [None] * len(xs) if states is None else states
    # On a CPU the module has a form for one token.
    if any(is_heard(conv) for conv in convolutions) or (one_token and not xs[0].is_cuda):
        each = zip(convolutions, xs, states, strict=True)
        return [conv(x, cu_doc_lens, state=state) for conv, x, state in each]
    streams = []
    for conv, x, state in zip(convolutions, xs, states, strict=True):
        weight = local(conv.weight)
        conv._check(x, weight, cu_doc_lens, state)
        streams.append((x, weight, local(conv.bias), state))
    return convolve_streams(streams, cu_doc_lens, convolutions[0].activation == "silu", checked)


def convolve_streams(
    streams: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None]],
    cu_doc_lens: Tensor | None,
    silu: bool,
    checked: bool = False,
) -> list[Tensor]:
    """:func:`causal_conv1d` of up to three inputs (x, weight, bias, state), of one B, T and k."""
    # Imported here: the attention package imports this module.
    from olmo_core.nn.attention.kernels.convolution import Stream, short_convolution

    x, weight, _, state = streams[0]
    shapes = [stream[0].shape for stream in streams]
    past, seen = weight.shape[2] - 1, None
    if cu_doc_lens is not None:
        if not checked:
            check_cu_doc_lens(cu_doc_lens, x.shape[0] * x.shape[1], None)
        streams = [(s[0].flatten(0, 1).unsqueeze(0), *s[1:]) for s in streams]
    if torch.compiler.is_compiling() and not x.is_cuda:
        outs = [_fusible(*stream, cu_doc_lens, silu) for stream in streams]
    else:
        if cu_doc_lens is not None:
            seen = _seen(cu_doc_lens, x.shape[0] * x.shape[1], 0 if state is None else past)
        together = [Stream(*stream) for stream in streams]
        outs = short_convolution(together, seen=seen, silu=silu)[0]
    return [out.view(shape) for out, shape in zip(outs, shapes, strict=True)]


def _seen(cu_doc_lens: Tensor, total: int, past: int) -> Tensor:
    """How many earlier tokens each token sees (T,), int32, with ``past`` before the first
    document."""
    seen = document_positions(cu_doc_lens, total).to(torch.int32)
    if not past:
        return seen
    index = torch.arange(total, device=seen.device)
    return torch.where(index < cu_doc_lens[1], seen + past, seen)


def _fusible(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_doc_lens: Tensor | None,
    silu: bool,
) -> Tensor:
    past = 0 if state is None else state.shape[1]
    if state is not None:
        x = torch.cat((state.to(x.dtype), x), 1)
    dtype, tokens = compute_dtype(x.dtype), x.shape[1]
    documents = None
    if cu_doc_lens is not None:
        index = torch.arange(-past, tokens - past, device=x.device, dtype=cu_doc_lens.dtype)
        documents = ends_before(cu_doc_lens[1:-1], index)
        if past:  # of the first document, even if that is empty
            documents = torch.where(index < 0, 0, documents)
    taps = weight.squeeze(1).to(dtype).flip(-1).unbind(-1)
    out = x.to(dtype) * taps[0]
    if bias is not None:
        out = out + bias.to(dtype)
    for lag in range(1, min(len(taps), tokens)):
        earlier = F.pad(x, (0, 0, lag, 0))[:, :tokens].to(dtype)
        if documents is not None:
            other = F.pad(documents[lag:] != documents[:-lag], (lag, 0))
            earlier = earlier.masked_fill(other.unsqueeze(-1), 0)
        out = out + earlier * taps[lag]
    return (F.silu(out) if silu else out).to(x.dtype)[:, past:]
