"""What a gated delta net remembers while it decodes: the last inputs of its convolutions, and S.

Any number of last tokens up to ``max_rollback`` can be forgotten again without a state for each:
the cache keeps S as it was that many tokens ago, and for each token since then its key k, what it
wrote U and its log decay g, of which S is made: S' = e^g S + outer(k, U).

Shapes as in ``kernels.gated_delta_rule.chunks``; M is ``max_rollback``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_core.nn.attention.decoding.cache import DecodingCache
from olmo_core.nn.dispatch import without_autocast

_RECENT = ("recent_keys", "recent_updates", "recent_log_decays")


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
    :param dtype: Of the convolutions' inputs. All else is float32 at least, and stays so if the
        cache is moved to a narrower dtype.
    :param max_rollback: Most tokens that :meth:`rollback` must be able to forget.
    :raises ValueError: If a size is wrong.
    """

    precise: ClassVar[frozenset[str]] = frozenset({"state", "base_state", *_RECENT})

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
        super().__init__(batch_size, max_seq_len, max_rollback)
        wide = torch.promote_types(dtype, torch.float32)
        state = (batch_size, n_v_heads, head_k_dim, head_v_dim)
        recent = (batch_size, max_rollback)
        past = conv_size - 1 + max_rollback
        self.recent_names = _RECENT if max_rollback else ()
        buffers = {
            "conv_inputs": ((batch_size, past, conv_channels), dtype),
            "state": (state, wide),
        }
        if max_rollback:
            buffers |= {
                "base_state": (state, wide),
                "recent_keys": ((*recent, n_heads, head_k_dim), wide),
                "recent_updates": ((*recent, n_v_heads, head_v_dim), wide),
                "recent_log_decays": ((*recent, n_v_heads), wide),
            }
        self._allocate(batch_size, max_seq_len, device, buffers)

    def past_conv_inputs(self) -> Tensor:
        """The convolutions' last inputs (B, k - 1, channels)."""
        return self.conv_inputs[:, self.max_rollback :]

    @property
    def recent(self) -> tuple[Tensor, ...]:
        """Keys, updates and log decays of the last M tokens, oldest first; nothing if M is 0."""
        return tuple(getattr(self, name) for name in self.recent_names)

    def check_fits(self, k: Tensor, v: Tensor) -> None:
        """:raises ValueError: If the cache was built for other heads than k (B, T, H, K) and v
        (B, T, HV, V) have.
        """
        state, expected = self.state.shape, (v.shape[2], k.shape[3], v.shape[3])
        if state[1:] != expected:
            raise ValueError(
                "The decoding cache was built for a state (value heads, key_dim, value_dim) of "
                f"{tuple(state[1:])}, and the layer has {expected}. Build it with "
                "init_kv_cache_manager."
            )

    def replace(self, new: Mapping[str, Tensor]) -> None:
        """Write new values, all of them computed before, into the buffers of these names."""
        for name, value in new.items():
            getattr(self, name).copy_(value)

    def _restore(self, n_tokens: int) -> None:
        new: dict[str, Tensor] = {}
        for name in ("conv_inputs", *_RECENT):
            history = getattr(self, name)
            # Zeros come in at the far end: they replay to nothing.
            kept, zeros = history[:, :-n_tokens], torch.zeros_like(history[:, :n_tokens])
            new[name] = torch.cat((zeros, kept), 1)
        new["state"] = replay(self.base_state, *(new[name] for name in _RECENT))
        self.replace(new)


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
    with without_autocast(state):
        written = torch.einsum("bthk,bthv->bhkv", keys, updates)
    return torch.addcmul(written, state, whole[..., None, None])
