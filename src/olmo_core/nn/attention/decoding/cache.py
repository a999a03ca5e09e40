"""What every decoding cache is: buffers of a batch of rows, and how many tokens they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from olmo_core.nn.lengths import can_be_read, check_leftpad
from olmo_core.utils import runs_eagerly


class DecodingCache(nn.Module, ABC):
    """What a mixer remembers of the tokens before: keys and values, or a recurrent state.

    While a mixer's ``kv_cache_manager`` is one of these, its ``forward`` appends the tokens that it
    is given to it. All rows of the batch advance together; rows of different length are padded on
    the left.

    A call changes the counts, and the padding, in one place and last, :meth:`update_seqlen`: one
    that is refused or fails before leaves the cache as it was.

    :param batch_size: Rows of the batch.
    :param max_seq_len: Most tokens of a row, left padding included.
    :param max_rollback: Most tokens that :meth:`rollback` must be able to forget.
    :raises ValueError: If a size is wrong.
    """

    precise: ClassVar[frozenset[str]] = frozenset()
    """Buffers that are float32 at least, whatever the cache is moved to."""

    cache_leftpad: Tensor
    """Leading padding tokens of each row: ``(batch,)``, int32."""
    cache_seqlens: Tensor
    """Tokens of each row so far, left padding included: int32, no dimensions."""
    host_seqlen: int
    """The same, counted on the host."""
    restorable: int
    """How many of them can be forgotten again."""
    has_leftpad: bool

    def __init__(self, batch_size: int, max_seq_len: int, max_rollback: int = 0) -> None:
        super().__init__()
        _check_sizes(batch_size, max_seq_len)
        if not _is_int(max_rollback) or max_rollback < 0:
            raise ValueError(f"max_rollback must not be negative, got {max_rollback}.")
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        self.max_rollback = max_rollback
        self.most_restorable = max_rollback

    def _allocate(
        self,
        batch_size: int,
        max_seq_len: int,
        device: torch.device | str,
        buffers: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    ) -> None:
        """Start anew with zeros of those shapes and dtypes, and with the counters."""
        _check_sizes(batch_size, max_seq_len)
        counters = {"cache_leftpad": (batch_size,), "cache_seqlens": ()}
        shapes = {**buffers, **{name: (size, torch.int32) for name, size in counters.items()}}
        # Buffers made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            made = {n: torch.zeros(s, device=device, dtype=d) for n, (s, d) in shapes.items()}
        for name, buffer in made.items():
            self.register_buffer(name, buffer, persistent=False)
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        self.host_seqlen, self.restorable, self.has_leftpad = 0, 0, False

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> DecodingCache:
        before = dict(self._buffers)
        with torch.inference_mode(False):
            super()._apply(fn, recurse)
            for name in self.precise & before.keys():
                old, new = before[name], self._buffers[name]
                assert old is not None and new is not None
                dtype = torch.promote_types(new.dtype, torch.float32)
                if new.dtype != dtype:  # from the original: what was rounded stays rounded
                    self._buffers[name] = old.to(new.device, dtype)
            seqlens = before["cache_seqlens"]
            if seqlens is not None and seqlens.is_meta and not self.cache_seqlens.is_meta:
                self.reset()  # to_empty leaves whatever lay in memory
        return self

    def reset(self) -> None:
        """Forget everything, and keep the memory."""
        for buffer in self.buffers():
            buffer.zero_()
        self.host_seqlen, self.restorable, self.has_leftpad = 0, 0, False

    def check_rollback(self, n_tokens: int) -> None:
        """:raises ValueError: If :meth:`rollback` can't forget ``n_tokens`` tokens."""
        if not 0 <= n_tokens <= self.host_seqlen:
            raise ValueError(f"Can't forget {n_tokens} of {self.host_seqlen} tokens.")
        if n_tokens > self.restorable:
            raise ValueError(
                f"Can't forget {n_tokens} tokens: the cache was built to forget at most "
                f"{self.max_rollback} tokens and can now restore {self.restorable}. Raise "
                "max_rollback."
            )

    @torch.no_grad()
    def rollback(self, n_tokens: int) -> None:
        """Forget the last ``n_tokens`` tokens of each row, rejected draft tokens for example.

        Where all tokens are forgotten, the left padding is too.

        :raises ValueError: If fewer tokens were stored, or fewer can be restored.
        """
        self.check_rollback(n_tokens)
        if not n_tokens:
            return
        self._restore(n_tokens)
        self.cache_seqlens.sub_(n_tokens)
        # On the device: a captured step that nobody counted is missing on the host alone.
        self.cache_leftpad.mul_(self.cache_seqlens > 0)
        self.host_seqlen -= n_tokens
        self.restorable -= n_tokens

    @abstractmethod
    def _restore(self, n_tokens: int) -> None:
        """Put all but the counters back to where they were ``n_tokens`` tokens ago."""

    def current_position(self) -> Tensor:
        """The tokens stored so far in each row, left padding included: int32, no dimensions."""
        return self.cache_seqlens

    def host_position(self) -> int | None:
        """:meth:`current_position` where the host reads it for nothing, and now: on a CPU, outside
        compiled and traced code."""
        seqlens = self.cache_seqlens
        return int(seqlens) if seqlens.is_cpu and can_be_read(seqlens) else None

    def record_leftpad(self, leftpad: Tensor) -> None:
        """Set how many leading tokens of each row are padding: ``(batch,)``, int32.

        :raises ValueError: If it does not fit, or tokens are stored already.
        :raises TypeError: If it is no int32 tensor.
        """
        self._check_leftpad(leftpad)
        self.cache_leftpad.copy_(leftpad)
        self.has_leftpad = True

    def _check_leftpad(self, leftpad: Tensor) -> None:
        check_leftpad(leftpad, self.batch_size, self.max_seq_len)
        if not runs_eagerly(self.cache_seqlens.device):
            torch._assert_async(
                self.cache_seqlens == 0, "cache_leftpad belongs to the first tokens after a reset"
            )
        elif self.host_seqlen:
            raise ValueError(
                "cache_leftpad belongs to the first tokens after a reset, and the decoding "
                f"cache already holds {self.host_seqlen} tokens a row."
            )

    def check_room(self, n_tokens: int) -> None:
        """:raises RuntimeError: If the next ``n_tokens`` tokens of each row do not fit."""
        if self.host_seqlen + n_tokens > self.max_seq_len:
            raise RuntimeError(
                f"The decoding cache holds {self.host_seqlen} of at most {self.max_seq_len} tokens "
                f"a row, and {n_tokens} more came. Build it with a larger max_seq_len, or reset() "
                "it."
            )

    def reserve(self, n_tokens: int) -> None:
        """Count the next ``n_tokens`` tokens of each row on the host, which never waits.

        For a compiled or captured loop, which counts on the device alone: it calls this before each
        step. In eager mode :meth:`update_seqlen` counts on both.

        :raises RuntimeError: If the cache would overflow.
        """
        self.check_room(n_tokens)
        restorable = min(self.most_restorable, self.restorable + n_tokens)
        # Past Module.__setattr__, which looks for parameters, at each step of each layer.
        vars(self).update(host_seqlen=self.host_seqlen + n_tokens, restorable=restorable)

    def update_seqlen(self, n_tokens: int, leftpad: Tensor | None = None) -> None:
        """Advance all rows by ``n_tokens``, which have been stored.

        :param leftpad: The left padding that came with them, where they are the first.
        :raises RuntimeError: If the cache overflows.
        """
        if runs_eagerly(self.cache_seqlens.device):
            self.reserve(n_tokens)
        if leftpad is not None:
            self.cache_leftpad.copy_(leftpad)
            self.has_leftpad = True
        self.cache_seqlens.add_(n_tokens)

    def padding_of(self, leftpad: Tensor | None) -> Tensor | None:
        """The left padding ``(batch,)`` during a call that was given ``leftpad``; None for none."""
        if leftpad is None and self.has_leftpad:
            return self.cache_leftpad
        return leftpad

    def admit(
        self, x: Tensor, leftpad: Tensor | None, *, parameters: Iterable[Tensor]
    ) -> Tensor | None:
        """Check a call at the layer's door, before anything is computed. Changes nothing.

        :param x: The next tokens, ``(batch, seq, d_model)``.
        :param leftpad: Their left padding, with the first tokens alone.
        :param parameters: The layer's: none may want a gradient.
        :returns: Which tokens are left padding, ``(batch, seq)`` bool; None if there is none.
        :raises ValueError: If batch or padding do not fit.
        :raises TypeError: If the padding is no int32 tensor.
        :raises RuntimeError: If the tokens do not fit, or gradients are wanted.
        """
        if x.shape[0] != self.batch_size:
            raise ValueError(
                f"The decoding cache was built for a batch of {self.batch_size}, got "
                f"{x.shape[0]} rows."
            )
        if leftpad is not None:
            self._check_leftpad(leftpad)
        if runs_eagerly(x.device):
            self.check_room(x.shape[1])
            if torch._C._functorch.peek_interpreter_stack() or forward_ad._current_level >= 0:
                raise RuntimeError(
                    "A decoding cache is for inference: what it stores has no tangent and no batch "
                    "dimension of vmap. Call the model outside torch.func's transforms and "
                    "forward-mode differentiation, or set kv_cache_manager = None."
                )
        if torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in parameters)
        ):
            raise RuntimeError(
                "A decoding cache is for inference: what it stores has no gradient. Call the model "
                "under torch.no_grad() or torch.inference_mode(), or set kv_cache_manager = None."
            )
        if leftpad is None and not self.has_leftpad:
            return None
        leftpad = self.cache_leftpad if leftpad is None else leftpad
        index = torch.arange(x.shape[1], device=x.device) + self.cache_seqlens
        return index < leftpad[:, None]


def _check_sizes(batch_size: int, max_seq_len: int) -> None:
    if not all(_is_int(n) and n > 0 for n in (batch_size, max_seq_len)):
        raise ValueError(
            "A decoding cache needs room for a row and a token at least, got "
            f"batch_size={batch_size}, max_seq_len={max_seq_len}."
        )


def _is_int(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool)
