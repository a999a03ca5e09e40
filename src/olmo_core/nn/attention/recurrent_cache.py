"""What a gated delta net remembers while it decodes: the last inputs of its convolutions, and S.

Any number of last tokens up to ``max_rollback`` can be forgotten again without a state for each:
the cache keeps S as it was that many tokens ago, and for each token since then its key k, what it
wrote U and its log decay g, of which S is made: S' = e^g S + outer(k, U).

Shapes as in ``kernels.gated_delta_rule.chunks``; M is ``max_rollback``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_core.nn.attention.base import DecodingCache
from olmo_core.nn.attention.kernels.gated_delta_rule import (
    gated_delta_rule,
    gated_delta_rule_step_,
    normalize,
)
from olmo_core.utils import runs_eagerly

__all__ = ["RecurrentCache", "replay"]


class RecurrentCache(DecodingCache):
    """The cache of one gated delta net.

    Its memory does not grow with the sequence. Buffers, none of them in the state dict:
    ``conv_inputs`` (B, k - 1 + M, channels), ``state`` (B, HV, K, V), ``cache_leftpad`` (B,) int32,
    ``cache_seqlens``, int32 without dimensions, and if M > 0 ``base_state`` (B, HV, K, V),
    ``recent_keys`` (B, M, H, K), ``recent_updates`` (B, M, HV, V) and ``recent_log_decays``
    (B, M, HV).

    :param batch_size: Rows of the batch.
    :param max_seq_len: Most tokens of a row, left padding included.
    :param conv_channels: Channels of all convolutions together.
    :param conv_size: Their kernel size.
    :param dtype: Of the convolutions' inputs; states are float32 at least.
    :param max_rollback: Most tokens that :meth:`rollback` must be able to forget.
    :raises ValueError: If there is no room for a token.
    """

    conv_inputs: Tensor
    state: Tensor
    base_state: Tensor
    recent_keys: Tensor
    recent_updates: Tensor
    recent_log_decays: Tensor

    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        *,
        conv_channels: int,
        conv_size: int,
        n_heads: int,
        n_v_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        max_rollback: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "max_seq_len": max_seq_len}
        if not all(isinstance(n, int) and n > 0 for n in sizes.values()):
            raise ValueError(
                "A decoding cache needs room for a row and a token at least, got "
                f"batch_size={batch_size}, max_seq_len={max_seq_len}."
            )
        if max_rollback < 0:
            raise ValueError(f"max_rollback must not be negative, got {max_rollback}.")
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        self.max_rollback, self.conv_past = max_rollback, conv_size - 1
        wide = torch.promote_types(dtype, torch.float32)
        state = (batch_size, n_v_heads, head_k_dim, head_v_dim)
        recent = (batch_size, max_rollback)
        buffers = {
            "conv_inputs": ((batch_size, self.conv_past + max_rollback, conv_channels), dtype),
            "state": (state, wide),
            "cache_leftpad": ((batch_size,), torch.int32),
            "cache_seqlens": ((), torch.int32),
        }
        if max_rollback:
            buffers |= {
                "base_state": (state, wide),
                "recent_keys": ((*recent, n_heads, head_k_dim), wide),
                "recent_updates": ((*recent, n_v_heads, head_v_dim), wide),
                "recent_log_decays": ((*recent, n_v_heads), wide),
            }
        # Buffers made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            for name, (shape, kind) in buffers.items():
                buffer = torch.zeros(shape, device=device, dtype=kind)
                self.register_buffer(name, buffer, persistent=False)
        self.host_seqlen = self.restorable = 0
        self.has_leftpad = False

    def reserve(self, n_tokens: int) -> None:
        """See :meth:`DecodingCache.reserve`."""
        super().reserve(n_tokens)
        self.restorable = min(self.max_rollback, self.restorable + n_tokens)

    def reset(self) -> None:
        """Forget everything, and keep the memory."""
        for buffer in self.buffers():
            buffer.zero_()
        self.host_seqlen = self.restorable = 0
        self.has_leftpad = False

    def past_conv_inputs(self) -> Tensor:
        """The convolutions' last inputs (B, k - 1, channels)."""
        return self.conv_inputs[:, self.max_rollback :]

    @torch.no_grad()
    def advance(
        self, conv_inputs: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
    ) -> Tensor:
        """The rule's output (B, T, HV, V) for T tokens that continue the stored ones.

        A prompt goes through the chunked rule; a single token, and the last M ones, whose updates
        are kept, step by step.

        :param conv_inputs: (B, T, channels), what the convolutions saw.
        :param q: And ``k``, ``v``, ``g``, ``beta``: as for :func:`gated_delta_rule`, which
            normalises q and k.
        """
        tokens = q.shape[1]
        if runs_eagerly(q.device):
            self.reserve(tokens)
        stepped = 1 if tokens == 1 else min(tokens, self.max_rollback)
        head = tokens - stepped
        outs, updates = [], []
        if head:
            q_, k_, v_, g_, beta_ = (x[:, :head] for x in (q, k, v, g, beta))
            out, state = gated_delta_rule(
                q_, k_, v_, g_, beta_, initial_state=self.state, normalize_qk=True
            )
            outs.append(out)
            self.state.copy_(state)
            if stepped:
                self._start_base()
        for t in range(head, tokens):
            q_, k_, v_, g_, beta_ = (x[:, t] for x in (q, k, v, g, beta))
            out, update = gated_delta_rule_step_(
                q_, k_, v_, g_, beta_, self.state, normalize_qk=True
            )
            outs.append(out.unsqueeze(1))
            updates.append(update)
        if self.max_rollback:
            keys = normalize(k[:, head:].to(self.state.dtype))
            self._remember(keys, torch.stack(updates, 1), g[:, head:])
        _shift_in(self.conv_inputs, conv_inputs)
        self.cache_seqlens.add_(tokens)
        return torch.cat(outs, 1)

    @property
    def _histories(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.recent_keys, self.recent_updates, self.recent_log_decays

    def _start_base(self) -> None:
        """Build on the present state: all earlier tokens are final."""
        self.base_state.copy_(self.state)
        for history in self._histories:
            history.zero_()

    def _remember(self, *recent: Tensor) -> None:
        """Keep what the last tokens wrote; what falls out of the last M goes to the base state."""
        joined = [torch.cat(pair, 1) for pair in zip(self._histories, recent, strict=True)]
        old = (x[:, : -self.max_rollback] for x in joined)
        self.base_state.copy_(replay(self.base_state, *old))
        for history, x in zip(self._histories, joined, strict=True):
            history.copy_(x[:, -self.max_rollback :])

    @torch.no_grad()
    def rollback(self, n_tokens: int) -> None:
        """See :meth:`DecodingCache.rollback`."""
        if not 0 <= n_tokens <= self.host_seqlen:
            raise ValueError(f"Can't forget {n_tokens} of {self.host_seqlen} tokens.")
        if n_tokens > self.restorable:
            raise ValueError(
                f"Can't forget {n_tokens} tokens: the cache was built with max_rollback="
                f"{self.max_rollback} and can now restore {self.restorable}. Raise max_rollback."
            )
        if not n_tokens:
            return
        for history in (self.conv_inputs, *self._histories):
            # Zeros come in at the far end: they replay to nothing.
            kept = history[:, :-n_tokens]
            history.copy_(torch.cat((torch.zeros_like(history[:, :n_tokens]), kept), 1))
        self.state.copy_(replay(self.base_state, *self._histories))
        self.cache_seqlens.sub_(n_tokens)
        self.host_seqlen -= n_tokens
        self.restorable -= n_tokens


def replay(state: Tensor, keys: Tensor, updates: Tensor, log_decays: Tensor) -> Tensor:
    """The state after known updates: S' = e^g S + outer(k, U) for each token, as one product.

    :param state: (B, HV, K, V).
    :param keys: (B, T, H, K).
    :param updates: (B, T, HV, V).
    :param log_decays: (B, T, HV).
    """
    # The sum of all later g, added up from the end: a difference of sums would cancel.
    later = F.pad(log_decays, (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
    decay, whole = later[:, 1:].exp(), later[:, 0].exp()
    keys = keys.repeat_interleave(updates.shape[2] // keys.shape[2], dim=2) * decay.unsqueeze(-1)
    with torch.autocast(state.device.type, enabled=False):
        written = torch.einsum("bthk,bthv->bhkv", keys, updates)
    return torch.addcmul(written, state, whole[..., None, None])


def _shift_in(history: Tensor, new: Tensor) -> None:
    """Append ``new`` along dim 1, dropping as many of the oldest."""
    size = history.shape[1]
    if size:
        history.copy_(torch.cat((history, new.to(history.dtype)), 1)[:, -size:])
