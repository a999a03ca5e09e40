"""The language model.

B: batch, T: sequence length, d: width of the residual stream (``d_model``), V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from olmo_core.config import Config
from olmo_core.nn.attention.base import SequenceMixer
from olmo_core.nn.attention.decoding.cache import DecodingCache
from olmo_core.nn.attention.parallel.context import ContextParallel
from olmo_core.nn.functional import l2_normalize
from olmo_core.nn.init import InitMethod, trunc_normal_
from olmo_core.nn.tensor_parallel import SharesWidth, TensorParallel
from olmo_core.nn.transformer.block import NormalizedTransformerBlock, TransformerBlock
from olmo_core.nn.transformer.lm_head import LMHead

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from olmo_core.nn.attention.ring import RingContextParallelStyle, UlyssesContextParallelStyle


class Transformer(nn.Module):
    """A decoder-only language model of parts that are built already.

    :class:`TransformerConfig` describes one and builds it.

    :param embeddings: (V, d).
    :param blocks: what stands between embeddings and head, in order; all ``ngpt`` or none.
    :param lm_head: the head.
    :param embedding_scale: factor of the embeddings, rounded to their dtype first, as in Gemma.
    :param init_method: how :meth:`init_weights` draws the blocks' matrices.
    :param init_std: of embeddings, and of what ``init_method`` scales from it.
    :param config: what the model was built from, for those who write it to a file.
    """

    def __init__(
        self,
        *,
        embeddings: nn.Embedding,
        blocks: Iterable[nn.Module],
        lm_head: LMHead,
        embedding_scale: float | None = None,
        init_method: InitMethod = InitMethod.normal,
        init_std: float = 0.02,
        config: Config | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.init_method, self.init_std = init_method, init_std
        self.embedding_scale = embedding_scale
        self.embeddings = embeddings
        self.blocks = nn.ModuleList(blocks)
        self.lm_head = lm_head
        self.max_rollback = 0

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    @property
    def mixers(self) -> list[SequenceMixer]:
        """The sequence mixer of each layer."""
        return [block.sequence_mixer for block in self._blocks()]

    def forward(
        self,
        input_ids: Tensor,
        *,
        cu_doc_lens: Tensor | None = None,
        max_doc_len: int | None = None,
        labels: Tensor | None = None,
        ignore_index: int = -100,
        loss_reduction: str = "mean",
        logits_to_keep: int = 0,
        cache_leftpad: Tensor | None = None,
        **mixer_kwargs: Any,
    ) -> Tensor:
        """Logits, or the loss if ``labels`` are given.

        While a decoding cache exists (:meth:`init_kv_cache`), ``input_ids`` continue what was given
        before.

        :param input_ids: (B, T) integers below V.
        :param cu_doc_lens: (N + 1,) int32, cumulative lengths of N documents over the flattened
            B * T: nothing passes from one to another.
        :param max_doc_len: an upper bound of the longest document.
        :param labels: (B, T) int64, the token that follows each input.
        :param ignore_index: the label that counts for nothing.
        :param loss_reduction: "mean" over labels that count, or "sum".
        :param logits_to_keep: compute only the logits of each row's last tokens, this many; 0 is
            all.
        :param cache_leftpad: (B,) int32, padding tokens before each row's first.
        :param mixer_kwargs: whatever else all mixers take, such as a load balancer's lengths.
        :returns: (B, T or ``logits_to_keep``, V) logits in the model's dtype, or the scalar
            cross-entropy in nats, float32 at least.
        :raises ValueError: if shapes, dtypes or options do not fit.
        """
        _check_ids("input_ids", input_ids)
        if labels is not None:
            _check_ids("labels", labels)
            if labels.shape != input_ids.shape or labels.dtype != torch.int64:
                raise ValueError(
                    f"labels must be int64 of input_ids' shape {tuple(input_ids.shape)}, got "
                    f"{labels.dtype} of shape {tuple(labels.shape)}"
                )
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        if cu_doc_lens is not None:
            mixer_kwargs["cu_doc_lens"] = cu_doc_lens
        if max_doc_len is not None:
            mixer_kwargs["max_doc_len"] = max_doc_len
        if cache_leftpad is not None:
            mixer_kwargs["cache_leftpad"] = cache_leftpad

        if not torch.compiler.is_compiling():  # where counts would be constants of the graph
            self._check_caches_agree()
        x = self.embeddings(input_ids)
        if self.embedding_scale is not None:
            x = x * torch.tensor(self.embedding_scale, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, **mixer_kwargs)
        if labels is None:
            if logits_to_keep:
                x = x[:, -logits_to_keep:]
            return self.lm_head(x, self.embeddings.weight)
        total = self.lm_head.loss(x, self.embeddings.weight, labels, ignore_index)
        if loss_reduction == "sum":
            return total
        return total / (labels != ignore_index).sum().clamp(min=1)

    def apply_cp(
        self,
        cp_mesh: DeviceMesh,
        ring: RingContextParallelStyle | None = None,
        uly: UlyssesContextParallelStyle | None = None,
    ) -> None:
        """:meth:`SequenceMixer.apply_cp` of every layer, or of none if one can't be sharded so.

        :meth:`forward` then takes this rank's shard of ``input_ids`` and ``labels``, with the load
        balancer's keywords. The mean loss is over the shard's labels: for the whole batch's ask for
        ``loss_reduction="sum"``, and divide by the labels of all ranks.
        """
        context = ContextParallel.from_mesh(cp_mesh, ring, uly)
        for mixer in self.mixers:
            mixer.check_cp(context)
        for mixer in self.mixers:
            mixer.use_cp(context)

    def apply_tp(self, tp_mesh: DeviceMesh) -> None:
        """:meth:`SequenceMixer.apply_tp` of every layer and of its feed-forward network, or of none
        if one can't be dealt so.

        The residual stream, its norms, the embeddings and the head stay whole on every rank:
        :meth:`forward` takes the same tokens on all of them, and gives the same result.

        :raises ValueError: If the number of ranks does not divide the heads or the hidden size.
        """
        place = TensorParallel.from_mesh(tp_mesh)
        parts: list[SharesWidth] = []
        for block in self._blocks():
            parts += [block.sequence_mixer, block.feed_forward]
        for part in parts:
            part.check_tp(place)
        for part in parts:
            part.apply_tp(tp_mesh)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Draw all parameters anew.

        A model that was built on ``meta`` and moved with ``to_empty`` then equals one built on the
        CPU.

        :param seed: of a generator of its own; ``None`` draws from torch's.
        """
        d_model, blocks = self.embeddings.embedding_dim, self._blocks()
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        trunc_normal_(self.embeddings.weight, std=self.init_std, generator=generator)
        for i, block in enumerate(blocks):
            block.init_weights(
                init_method=self.init_method,
                d_model=d_model,
                block_idx=i,
                num_blocks=len(blocks),
                std=self.init_std,
                generator=generator,
            )
        if self.lm_head.w_out is not None:
            # As wide as what it multiplies needs: logits start with a standard deviation below 1.
            std = min(self.init_std, d_model**-0.5)
            trunc_normal_(self.lm_head.w_out.weight, std=std, generator=generator)
        self.lm_head.reset_parameters()
        self.normalize_matrices()

    @torch.no_grad()
    def normalize_matrices(self) -> None:
        """Put the matrices of an nGPT back on the unit sphere: call it after each optimizer step.

        Other models are left as they are.
        """
        normalized = [b for b in self.blocks if isinstance(b, NormalizedTransformerBlock)]
        if not normalized:
            return
        for block in normalized:
            block.normalize_matrices()
        self.embeddings.weight.copy_(l2_normalize(self.embeddings.weight))
        if self.lm_head.w_out is not None:
            self.lm_head.w_out.weight.copy_(l2_normalize(self.lm_head.w_out.weight))

    def num_params(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def num_flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations per token of forward and backward at length ``seq_len``.

        6 for each parameter that multiplies (a multiply-add is two; backward is twice forward),
        plus what the mixers do beyond their projections. Norms and the embedding look-up are left
        out.
        """
        flops = sum(mixer.num_flops_per_token(seq_len) for mixer in self.mixers)
        for block in self._blocks():
            flops += block.feed_forward.num_flops_per_token(seq_len)
        return flops + 6 * self.embeddings.weight.numel()

    def init_kv_cache(self, batch_size: int, max_seq_len: int, *, max_rollback: int = 0) -> None:
        """Start decoding: every layer allocates its cache or recurrent state.

        :param batch_size: rows that decode together.
        :param max_seq_len: most tokens of a row, left padding included.
        :param max_rollback: most tokens that :meth:`rollback` must be able to forget.
        """
        try:
            for mixer in self.mixers:
                mixer.init_kv_cache_manager(batch_size, max_seq_len, max_rollback=max_rollback)
        except BaseException:
            self.drop_kv_cache()
            raise
        self.max_rollback = max_rollback

    def reset_kv_cache(self) -> None:
        """Forget all tokens and keep the memory.

        :raises RuntimeError: without a cache, as :meth:`rollback`.
        """
        for cache in self._caches():
            cache.reset()

    def rollback(self, n_tokens: int) -> None:
        """Forget the last ``n_tokens`` of each row, rejected draft tokens for example.

        All layers do, or none.

        :raises ValueError: if that is more than ``max_rollback``, or than was given.
        """
        caches = self._caches()
        if not 0 <= n_tokens <= self.max_rollback:
            raise ValueError(
                f"cannot forget {n_tokens} tokens: the caches were made for at most "
                f"{self.max_rollback}. Call init_kv_cache with a larger max_rollback."
            )
        self._check_caches_agree()
        for cache in caches:
            cache.check_rollback(n_tokens)
        for cache in caches:
            cache.rollback(n_tokens)

    def drop_kv_cache(self) -> None:
        """Leave decoding and free the memory."""
        for mixer in self.mixers:
            mixer.kv_cache_manager = None

    @contextmanager
    def decoding(
        self, batch_size: int, max_seq_len: int, *, max_rollback: int = 0
    ) -> Iterator[Transformer]:
        """:meth:`init_kv_cache`, and :meth:`drop_kv_cache` on the way out."""
        self.init_kv_cache(batch_size, max_seq_len, max_rollback=max_rollback)
        try:
            yield self
        finally:
            self.drop_kv_cache()

    def _blocks(self) -> list[TransformerBlock | NormalizedTransformerBlock]:
        return cast("list[TransformerBlock | NormalizedTransformerBlock]", list(self.blocks))

    def _caches(self) -> list[DecodingCache]:
        caches = [mixer.kv_cache_manager for mixer in self.mixers]
        made = [cache for cache in caches if cache is not None]
        if len(made) < len(caches):
            raise RuntimeError("there is no decoding cache: call init_kv_cache first")
        return made

    def _check_caches_agree(self) -> None:
        """A call that failed between two layers has advanced the first one's cache alone."""
        caches = [mixer.kv_cache_manager for mixer in self.mixers]
        held = [None if cache is None else cache.host_seqlen for cache in caches]
        if len(set(held)) > 1:
            raise RuntimeError(
                f"the layers' decoding caches hold different numbers of tokens, {held}: an earlier "
                "call failed between two layers, or some layers have no cache. Call "
                "reset_kv_cache or init_kv_cache and start anew."
            )


def _check_ids(name: str, ids: Tensor) -> None:
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name} must be (batch, tokens) integers (int64 or int32), got {ids.dtype} of shape "
            f"{tuple(ids.shape)}"
        )
