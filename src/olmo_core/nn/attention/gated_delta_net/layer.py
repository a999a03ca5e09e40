"""Gated delta net: a sequence mixer whose state does not grow with the sequence.

Shapes in comments: B batch, T tokens, H key heads, HV value heads, K head_k_dim, V head_v_dim.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention.base import SequenceMixer
from olmo_core.nn.attention.gated_delta_net.ahead import compile_layer_ahead, first_of_its_kind
from olmo_core.nn.attention.gated_delta_net.cache import RecurrentCache
from olmo_core.nn.attention.gated_delta_net.shard import check_value_heads, mix_shard
from olmo_core.nn.attention.gated_delta_net.sizes import GatedDeltaNetSizes
from olmo_core.nn.attention.gated_delta_net.step import advance
from olmo_core.nn.attention.gated_delta_net.token import advance_token
from olmo_core.nn.attention.inputs import check_names, read_call
from olmo_core.nn.attention.kernels.gated_delta_rule.rules import Rule, choose_rule
from olmo_core.nn.attention.kernels.gates import decay_gates, gated_rms_norm
from olmo_core.nn.attention.kernels.table import Choice
from olmo_core.nn.attention.parallel.documents import ShardDocuments
from olmo_core.nn.attention.parallel.relayout import from_contiguous, to_contiguous
from olmo_core.nn.convolution import CausalConv1d, convolve_together
from olmo_core.nn.dispatch import is_heard
from olmo_core.nn.functional import compute_dtype
from olmo_core.nn.init import InitMethod, copy_into
from olmo_core.nn.layer_norm import RMSNorm
from olmo_core.nn.linear import apply_linear
from olmo_core.nn.projections import project
from olmo_core.nn.sharded import is_sharded, local, mask_rows, replicated_like
from olmo_core.nn.tensor_parallel import TensorParallel, TensorParallelTable

if TYPE_CHECKING:
    from olmo_core.nn.attention.parallel.context import ContextParallel

# Keywords of attention's forward that a delta net serves, or refuses; and that change nothing here.
_SERVED = (
    "cache_leftpad",
    "cu_doc_lens_q",
    "cu_doc_lens_k",
    "local_k_slice",
    "global_cu_doc_lens",
)
_BOUNDS = ("max_doc_len", "max_doc_len_q", "max_doc_len_k")
_NO_EFFECT = ("pos_sin", "pos_cos", "freqs_cis")

_WHOLE_OUTPUT = (
    "A gated delta net that shares its sequence (apply_cp) moves its output's rows, which a "
    "sharded or DTensor output does not allow. Call apply_tp without output_layout "
    "and use_local_output."
)

# exp(A_log) starts uniform in (_A_MIN, 16): at 0 its logarithm would be -inf, for good.
_A_MIN, _A_MAX = 1e-2, 16.0
# softplus(dt_bias) starts log-uniform in this range, as in Mamba-2 (arXiv:2405.21060).
_DT_MIN, _DT_MAX = 1e-3, 1e-1


class GatedDeltaNet(SequenceMixer):
    """The layer implementation for Gated Delta Networks (https://arxiv.org/abs/2412.06464).

    A linear attention variant that uses a gated delta rule for recurrent state updates, providing
    efficient O(n) sequence modeling::

        q, k, v = silu(conv(w_q x)), silu(conv(w_k x)), silu(conv(w_v x))
        beta = sigmoid(w_b x), times 2 with allow_neg_eigval
        g = -exp(A_log) * softplus(w_a x + dt_bias)
        o = gated_delta_rule(q / |q|, k / |k|, v, g, beta)
        y = w_out(rms_norm(o) * silu(w_g x))

    It needs no extra package, and uses what kernels there are: see :meth:`choose_rule`.

    :param d_model: The model hidden size.
    :param n_heads: The number of attention heads.
    :param n_v_heads: The number of value heads, a multiple of ``n_heads``. If ``None``, defaults to
        ``n_heads``. Value head ``h`` reads the keys of head ``h * n_heads // n_v_heads``.
    :param head_dim: The dimension of each head. If ``None``, defaults to ``d_model // n_heads``.
    :param expand_v: The expansion ratio for the value dim.
    :param allow_neg_eigval: Allow negative eigenvalues: beta is multiplied by 2. Reference:
        `Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues
        <https://arxiv.org/abs/2411.12537>`_.
    :param conv_size: The kernel size of the short convolution.
    :param conv_bias: Whether to use bias in the short convolution.
    :param norm_eps: The epsilon value for the normalization layer.
    :param dtype: The default data type to use for parameters. ``A_log``, ``dt_bias`` and ``o_norm``
        are float32 at least.
    :param init_device: The device to initialize weights on.
    :raises OLMoConfigurationError: If an option is wrong.
    """

    kv_cache_manager: RecurrentCache | None

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        n_v_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        allow_neg_eigval: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
        dtype: torch.dtype = torch.float32,
        init_device: str = "cpu",
    ) -> None:
        super().__init__()
        sizes = GatedDeltaNetSizes.of(d_model, n_heads, n_v_heads, head_dim, expand_v)
        self._sizes = sizes
        if not dtype.is_floating_point:
            raise OLMoConfigurationError(f"dtype must be a floating dtype, got {dtype}.")
        if not 0 < norm_eps < math.inf:
            raise OLMoConfigurationError(f"norm_eps must be positive, got {norm_eps}.")
        self.d_model, self.n_heads, self.n_v_heads = d_model, n_heads, sizes.n_v_heads
        self.head_k_dim, self.head_v_dim = sizes.head_k_dim, sizes.head_v_dim
        self.allow_neg_eigval = allow_neg_eigval
        self.conv_size = conv_size

        def linear(name: str) -> nn.Linear:
            return nn.Linear(*sizes.projections[name], False, init_device, dtype)

        def conv(channels: int) -> CausalConv1d:
            return CausalConv1d(
                channels, conv_size, bias=conv_bias, dtype=dtype, init_device=init_device
            )

        self.w_q, self.w_k, self.w_v = linear("w_q"), linear("w_k"), linear("w_v")
        self.w_a, self.w_b, self.w_g = linear("w_a"), linear("w_b"), linear("w_g")
        self.w_out = linear("w_out")
        self.q_conv1d, self.k_conv1d = conv(sizes.key_dim), conv(sizes.key_dim)
        self.v_conv1d = conv(sizes.value_dim)
        wide: dict[str, Any] = {"dtype": compute_dtype(dtype), "device": init_device}
        self.A_log = nn.Parameter(torch.empty(self.n_v_heads, **wide))
        self.dt_bias = nn.Parameter(torch.empty(self.n_v_heads, **wide))
        self.o_norm = RMSNorm(
            size=self.head_v_dim,
            eps=norm_eps,
            bias=False,
            dtype=compute_dtype(dtype),
            init_device=init_device,
        )
        if self.A_log.device.type != "meta":
            self._reset_gates()

    def forward(self, x: Tensor, cu_doc_lens: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Apply gated delta network sequence mixing to the input.

        :param x: The input of shape ``(batch_size, seq_len, d_model)``.
        :param cu_doc_lens: Cumulative document lengths in the input ``x``, a 1D ``torch.int32``
            tensor that should always have one more element than there are documents (the first
            element in the tensor should always be ``0``). State and convolution start anew with
            each document.
        :param kwargs: ``cache_leftpad``, how many leading tokens of each row are padding,
            ``(batch_size,)`` int32: they change nothing and their output is zero. What attention
            layers take besides has no effect here (RoPE buffers, and on one rank ``max_doc_len*``)
            or is refused without context parallelism (``cu_doc_lens_q``, ``cu_doc_lens_k``,
            ``local_k_slice``, ``global_cu_doc_lens``). After :meth:`apply_cp` the keywords are what
            the load balancer returned with the shard ``x``.
        :returns: The output with shape ``(batch_size, seq_len, d_model)``.
        :raises TypeError: For any other keyword, or an argument of the wrong type.
        :raises ValueError: If arguments do not fit the layer or each other.
        :raises RuntimeError: If the decoding cache would overflow.
        """
        check_names("GatedDeltaNet", kwargs, _SERVED, _BOUNDS, _NO_EFFECT)
        context = self.context
        served = _SERVED if context is None else (*_SERVED, *_BOUNDS)
        keywords: dict[str, Any] = {name: kwargs.get(name) for name in served}
        call = read_call(
            x,
            weight=self.w_out.weight,
            d_model=self.d_model,
            cache=self.kv_cache_manager,
            parameters=self.parameters(),
            context=context,
            tensor_parallel=self.tensor_parallel,
            cu_doc_lens=cu_doc_lens,
            **keywords,
        )
        padding = call.padding
        if cu_doc_lens is not None:
            cu_doc_lens = cu_doc_lens.contiguous()
        if padding is not None:
            x = mask_rows(x, padding)
        if x.is_cuda and context is None and self.kv_cache_manager is None:
            self._compile_ahead(x, cu_doc_lens, padding)
        shard = None
        if context is not None:
            assert isinstance(call.segments, ShardDocuments)
            shard = context.shard(
                call.segments.lengths, local=call.segments.local, window=self.conv_size,
                scale=self.head_k_dim**-0.5, kernel=str(self._sizes),
            )  # fmt: skip
            # All ranks that share the heads move the same rows: a gradient that they have summed.
            rows = x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]
            rows, shard = to_contiguous(rows, context, shard)
            x = replicated_like(rows, x)
        linears = (self.w_q, self.w_k, self.w_v, self.w_a, self.w_b, self.w_g)
        *projected, a, b, gate = project(linears, x)
        A_log, dt_bias = local(self.A_log), local(self.dt_bias)
        cache, out = self.kv_cache_manager, None
        if cache is not None:
            out = advance_token(
                cache, projected, a, b, A_log, dt_bias, convolutions=self._convolutions,
                head_dims=(self.head_k_dim, self.head_v_dim), double=self.allow_neg_eigval,
                padding=padding, leftpad=call.cache_leftpad,
            )  # fmt: skip
        if out is None:
            g, beta = decay_gates(a, b, A_log, dt_bias, padding, double=self.allow_neg_eigval)
            if context is not None and shard is not None:
                sizes = self._own_sizes(self.tensor_parallel)
                out = mix_shard(
                    context, shard, projected, g, beta, sizes=sizes,
                    convolutions=self._convolutions, choose_rule=self.choose_rule,
                )  # fmt: skip
            elif cache is None:
                q, k, v = self._convolve(projected, cu_doc_lens)
                rule = self.choose_rule(q, v).run
                out, _ = rule(
                    q, k, v, g, beta, cu_doc_lens=cu_doc_lens, normalize_qk=True, checked=True
                )
            else:
                q, k, v = self._convolve(projected, None, cache.past_conv_inputs())
                out = advance(
                    cache, torch.cat(projected, -1), q, k, v, g, beta,
                    choose_rule=self.choose_rule, leftpad=call.cache_leftpad,
                )  # fmt: skip
        y = apply_linear(self.w_out, self._gated_norm(out, gate))
        if context is not None and shard is not None:
            y = from_contiguous(y, context, shard)
        return y if padding is None else y.masked_fill(padding.unsqueeze(-1), 0)

    def choose_rule(self, q: Tensor, v: Tensor) -> Choice[Rule]:
        """The implementation of the gated delta rule for inputs like ``q`` and ``v``, and why."""
        return choose_rule(q, v)

    @property
    def _convolutions(self) -> tuple[CausalConv1d, CausalConv1d, CausalConv1d]:
        return self.q_conv1d, self.k_conv1d, self.v_conv1d

    def _compile_ahead(self, x: Tensor, cu_doc_lens: Tensor | None, padding: Tensor | None) -> None:
        if not first_of_its_kind(self, x, cu_doc_lens, padding):
            return
        save = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        compile_layer_ahead(
            x, cu_doc_lens, padding, sizes=self._own_sizes(self.tensor_parallel),
            convolutions=self._convolutions, gates=(self.A_log, self.dt_bias), norm=self.o_norm,
            double=self.allow_neg_eigval, save=save,
        )  # fmt: skip

    def _convolve(
        self, projected: list[Tensor], cu_doc_lens: Tensor | None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (B, T, H, K) and v (B, T, HV, V) from the projections, given their past."""
        past = None if state is None else state.split([y.shape[-1] for y in projected], -1)
        q, k, v = convolve_together(
            self._convolutions, projected, cu_doc_lens, states=past, checked=True
        )
        q, k = (y.unflatten(-1, (-1, self.head_k_dim)) for y in (q, k))
        return q, k, v.unflatten(-1, (-1, self.head_v_dim))

    def _gated_norm(self, out: Tensor, gate: Tensor) -> Tensor:
        """rms_norm(o) * silu(gate), computed in float32 at least: (B, T, HV * V)."""
        gate = gate.unflatten(-1, (-1, self.head_v_dim))
        norm = self.o_norm
        if type(norm) is RMSNorm and norm.weight is not None and not is_heard(norm):
            return gated_rms_norm(out, gate, local(norm.weight), norm.eps).flatten(2)
        dtype = compute_dtype(out.dtype)
        return (norm(out.to(dtype)) * F.silu(gate.to(dtype))).to(gate.dtype).flatten(2)

    def tensor_parallel_table(self) -> TensorParallelTable:
        return TensorParallelTable(
            columns=("w_q", "w_k", "w_v", "w_a", "w_b", "w_g"),
            rows=("w_out",),
            shards=("A_log", "dt_bias", "q_conv1d", "k_conv1d", "v_conv1d"),
            replicas=("o_norm",),
            counts={"n_heads": self.n_heads, "n_v_heads": self.n_v_heads},
        )

    def check_cp(self, context: ContextParallel) -> None:
        super().check_cp(context)
        self._check_both(context, self.tensor_parallel)

    def check_tp(self, place: TensorParallel) -> None:
        super().check_tp(place)
        if self.context is not None:
            self._check_both(self.context, place)

    def _check_both(self, context: ContextParallel, place: TensorParallel | None) -> None:
        sizes = self._own_sizes(place)
        check_value_heads(sizes.n_heads, sizes.n_v_heads, context.ulysses_degree)
        if place is not None and not place.whole_output:
            raise RuntimeError(_WHOLE_OUTPUT)

    def _own_sizes(self, place: TensorParallel | None) -> GatedDeltaNetSizes:
        """The layer's, with the heads that each rank of a tensor-parallel group has."""
        n = 1 if place is None else place.degree
        return replace(self._sizes, n_heads=self.n_heads // n, n_v_heads=self.n_v_heads // n)

    def init_kv_cache_manager(
        self, batch_size: int, max_seq_len: int, *, max_rollback: int = 0
    ) -> None:
        """Initialize the recurrent state for decoding, which :meth:`forward` then uses. For
        inference only.

        :param batch_size: Rows of the batch.
        :param max_seq_len: Most tokens of a row, left padding included. The memory does not depend
            on it.
        :param max_rollback: Most tokens that the cache must be able to forget again.
        :raises ValueError: If a size is wrong.
        :raises RuntimeError: If the layer is sharded.
        """
        self.refuse_cache_under_cp()
        sizes = self._own_sizes(self.tensor_parallel)
        self.kv_cache_manager = RecurrentCache(
            batch_size,
            max_seq_len,
            conv_channels=sizes.conv_channels,
            conv_size=self.conv_size,
            n_heads=sizes.n_heads,
            n_v_heads=sizes.n_v_heads,
            head_k_dim=self.head_k_dim,
            head_v_dim=self.head_v_dim,
            device=self.w_out.weight.device,
            dtype=self.w_out.weight.dtype,
            max_rollback=max_rollback,
        )

    @torch.no_grad()
    def init_weights(
        self,
        *,
        init_method: InitMethod,
        d_model: int,
        block_idx: int,
        num_blocks: int,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw the weights anew: see :class:`InitMethod`.

        Convolutions start as torch's, the norm as the identity, ``exp(A_log)`` uniform up to 16 and
        ``softplus(dt_bias)`` log-uniform between 0.001 and 0.1, as in Mamba-2.
        """
        init_method = InitMethod(init_method)
        for name in self._sizes.projections:
            init_method.init_linear_(
                getattr(self, name).weight,
                None,
                d_model=d_model,
                block_idx=block_idx,
                num_blocks=num_blocks,
                std=std,
                output=name == "w_out",
                generator=generator,
            )
        for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d):
            conv.reset_parameters(generator)
        self.o_norm.reset_parameters()
        self._reset_gates(generator)

    @torch.no_grad()
    def _reset_gates(self, generator: torch.Generator | None = None) -> None:
        uniform, other = (
            torch.rand(self.n_v_heads, generator=generator, device=self.A_log.device)
            for _ in range(2)
        )
        copy_into(self.A_log, (_A_MIN + (_A_MAX - _A_MIN) * uniform).log())
        dt = torch.exp(math.log(_DT_MIN) + math.log(_DT_MAX / _DT_MIN) * other)
        copy_into(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def num_flops_per_token(self, seq_len: int) -> int:
        """Compute FLOPs per token for Gated Delta Net, forward and backward.

        A multiply-add counts as two operations, the backward pass as twice the forward. This
        accounts for the linear projections, 6 per weight; the short convolutions, 6 per channel and
        tap; the recurrence, 18 per element of the state (S^T k, the update and S^T q: what the
        definition needs, not what a chunked kernel computes); and the gated RMS norm, 18 per value.
        The length has no effect.
        """
        sizes = self._sizes
        state = self.n_v_heads * self.head_k_dim * self.head_v_dim
        return (
            6 * sizes.num_projection_weights
            + 6 * sizes.conv_channels * self.conv_size
            + 18 * state
            + 18 * sizes.value_dim
        )
