"""Wrong results that have been seen in attention libraries: none may come back.

Each test names one. Those of the load balancers are in ``test_ring.py``, those that end in an error
also in ``test_bad_calls.py``.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from nn.attention.reference import relative
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import (
    Attention,
    AttentionBackend,
    AttentionConfig,
    FusedAttention,
    GateConfig,
    NormalizedAttention,
)
from olmo_core.nn.attention.parallel.layout import ZigZagLayout
from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.init import InitMethod
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.rope import RoPEConfig, RoPEType

D, H = 16, 2
CPU = torch.device("cpu")


def layer(**kwargs: Any) -> Attention:
    return Attention(**{"d_model": D, "n_heads": H, **kwargs})


def cumulative(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def one_by_one(mixer: Attention, x: Tensor, *lengths: int) -> Tensor:
    return torch.cat([mixer(piece) for piece in x.split(lengths, dim=1)], dim=1)


def test_1_sharded_rope_buffers_with_documents_are_applied_row_by_row() -> None:
    """Positions restarted at the boundaries of the shard.

    A zig-zag shard holds the first and the last chunk of each document, so its rows are no run of
    positions, and restarting the count anywhere changes the scores.
    """
    mixer = layer(rope=RoPEConfig(theta=100.0), dtype=torch.float64, bias=False)
    positions = ZigZagLayout().positions([0, 12, 32], 2, 0)
    table = mixer.rope.get_buffers(32, CPU)
    sin, cos = table.pos_sin.double()[positions], table.pos_cos.double()[positions]
    x = torch.randn(1, 16, D, dtype=torch.float64, requires_grad=True)
    cu = cumulative(6, 10)
    out = mixer(x, cu_doc_lens=cu, pos_sin=sin, pos_cos=cos)

    def rotated(weight: Tensor) -> Tensor:
        heads = (x @ weight.T).view(1, 16, H, D // H)
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return heads * cos[:, None] + turned * sin[:, None]

    mask = torch.zeros(16, 16, dtype=torch.bool)
    for a, b in pairwise(cu.tolist()):
        mask[a:b, a:b] = torch.ones(b - a, b - a, dtype=torch.bool).tril()
    values = (x @ mixer.w_v.weight.T).view(1, 16, H, D // H)
    q, k = rotated(mixer.w_q.weight), rotated(mixer.w_k.weight)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (D // H) ** -0.5
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, values).reshape(1, 16, D)
    expected = expected @ mixer.w_out.weight.T

    cotangent = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, cotangent)
    (expected_grad,) = torch.autograd.grad(expected, x, cotangent)
    assert relative(out, expected) < 1e-6
    assert relative(grad, expected_grad) < 1e-6


def test_3_documents_are_masked_without_max_doc_len() -> None:
    mixer, x = layer(), torch.randn(1, 10, D)
    assert relative(mixer(x, cu_doc_lens=cumulative(3, 7)), one_by_one(mixer, x, 3, 7)) < 1e-6
    with pytest.raises(ValueError, match="cu_doc_lens"):
        mixer(x, max_doc_len=7)


def test_3_documents_with_a_kv_cache_are_refused() -> None:
    mixer = layer().eval()
    mixer.init_kv_cache_manager(1, 16)
    with pytest.raises(ValueError, match="cu_doc_lens"), torch.no_grad():
        mixer(torch.randn(1, 10, D), cu_doc_lens=cumulative(3, 7))


@pytest.mark.parametrize("make", [layer, lambda **k: FusedAttention(d_model=D, n_heads=H, **k)])
def test_4_dropout_is_off_in_eval(make: Any) -> None:
    mixer, x = make(dropout=0.5), torch.randn(1, 32, D)
    assert not torch.equal(mixer(x), mixer(x))
    mixer.eval()
    assert torch.equal(mixer(x), mixer(x))
    plain = make()
    plain.load_state_dict(mixer.state_dict())
    assert relative(mixer(x), plain(x)) < 1e-6


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_5_the_kv_cache_keeps_the_modules_dtype(dtype: torch.dtype, window: int | None) -> None:
    mixer = layer(dtype=dtype, window_size=window).eval()
    mixer.init_kv_cache_manager(1, 8)
    cache = mixer.kv_cache_manager
    assert cache is not None
    with torch.no_grad():
        assert mixer(torch.randn(1, 4, D, dtype=dtype)).dtype == dtype
    stored = [b for name, b in cache.named_buffers() if name in ("k_cache", "v_cache")]
    assert [b.dtype for b in stored] == [dtype, dtype]


@pytest.mark.parametrize("window", [None, 3])
def test_5_decoding_past_the_end_raises_and_drops_nothing(window: int | None) -> None:
    mixer = layer(window_size=window).eval()
    mixer.init_kv_cache_manager(1, 6)
    x = torch.randn(1, 7, D)
    with torch.no_grad():
        full = mixer(x[:, :5])
        with pytest.raises(RuntimeError):
            mixer(x[:, 5:])
        last = mixer(x[:, 5:6])
        mixer.kv_cache_manager = None
        expected = mixer(x[:, :6])
    assert relative(torch.cat([full, last], dim=1), expected) < 1e-6


@pytest.mark.parametrize(
    ("d_model", "options"),
    [
        (16, {"n_heads": 2, "n_kv_heads": 4}),
        (16, {"n_heads": 2, "n_kv_heads": 0}),
        (100, {"n_heads": 8}),
    ],
)
def test_6_heads_that_do_not_fit_are_refused(d_model: int, options: dict[str, int]) -> None:
    with pytest.raises(OLMoConfigurationError):
        Attention(d_model=d_model, **options)


@pytest.mark.parametrize("window", [None, 3])
def test_7_left_padding_counts_without_a_cache(window: int | None) -> None:
    mixer = layer(rope=RoPEConfig(), window_size=window)
    x = torch.randn(2, 8, D)
    out = mixer(x, cache_leftpad=torch.tensor([3, 0], dtype=torch.int32))
    assert (out[0, :3] == 0).all()
    assert relative(out[:1, 3:], mixer(x[:1, 3:])) < 1e-6
    assert relative(out[1:], mixer(x[1:])) < 1e-6


def test_8_a_shared_rope_cache_tells_head_dims_apart() -> None:
    cache = BufferCache()
    x = torch.randn(1, 8, D)
    for n_heads in (1, 2, 4):
        torch.manual_seed(n_heads)
        shared = layer(n_heads=n_heads, rope=RoPEConfig(theta=100.0), cache=cache)
        torch.manual_seed(n_heads)
        alone = layer(n_heads=n_heads, rope=RoPEConfig(theta=100.0))
        assert torch.equal(shared(x), alone(x))


def test_8_layers_of_one_kind_share_a_table() -> None:
    """An empty cache was falsy, and so never shared."""
    cache = BufferCache()
    x = torch.randn(1, 8, D)
    layer(rope=RoPEConfig(), cache=cache)(x)

    def stored() -> set[int]:
        return {tensor.data_ptr() for tensor in cache._buffers.values()}

    first = stored()
    assert first
    layer(rope=RoPEConfig(), cache=cache)(x)
    assert stored() == first


@pytest.mark.parametrize("ends", [[0, 5], [0, 5, 12], [0, 6, 4, 8], [2, 8]])
@pytest.mark.parametrize("window", [None, 3])
def test_9_lengths_that_do_not_describe_the_input(ends: list[int], window: int | None) -> None:
    """Past the end was accepted; short of it left output rows unwritten."""
    with pytest.raises(ValueError, match="cu_doc_lens"):
        layer(window_size=window)(
            torch.randn(1, 8, D), cu_doc_lens=torch.tensor(ends, dtype=torch.int32)
        )


@pytest.mark.parametrize("leftpad", [[0], [2], [0, 3, 1]])
def test_10_left_padding_is_never_taken_for_a_truth_value(leftpad: list[int]) -> None:
    mixer = layer().eval()
    x = torch.randn(len(leftpad), 6, D)
    pad = torch.tensor(leftpad, dtype=torch.int32)
    with torch.no_grad():
        expected = mixer(x, cache_leftpad=pad)
        mixer.init_kv_cache_manager(len(leftpad), 6)
        prefill = mixer(x[:, :4], cache_leftpad=pad)
        steps = [mixer(x[:, t : t + 1]) for t in (4, 5)]
    assert relative(torch.cat([prefill, *steps], dim=1), expected) < 1e-6


@pytest.mark.parametrize(
    "capability",
    [
        "assert_supported",
        "assert_supports_swa",
        "assert_supports_ring_cp",
        "assert_supports_ulysses_cp",
        "assert_supports_packed_qkv",
        "assert_supports_kv_cache",
    ],
)
def test_11_a_backend_that_states_no_capability_has_none(capability: str) -> None:
    class Forgetful(AttentionBackend):
        """Says nothing about itself."""

    with pytest.raises(RuntimeError):
        getattr(Forgetful, capability)()


GATE = GateConfig(full_precision=True)
HEAD_NORM = LayerNormConfig(name=LayerNormType.rms, full_precision=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: layer(rope=RoPEConfig(), gate=GATE, qk_norm=HEAD_NORM, dtype=torch.float64),
        lambda: layer(rope=RoPEConfig(name=RoPEType.complex), window_size=3, dtype=torch.float64),
        lambda: NormalizedAttention(
            d_model=D, n_heads=H, rope=RoPEConfig(), qk_norm=HEAD_NORM, dtype=torch.float64
        ),
        lambda: FusedAttention(
            d_model=D, n_heads=H, rope=RoPEConfig(name=RoPEType.fused), dtype=torch.float64
        ),
    ],
    ids=["gate and norm", "complex and window", "normalized", "fused"],
)
def test_13_float64_is_computed_in_float64(make: Any) -> None:
    """Float32 can hardly see a step of 1e-7, so its output would not follow the gradient."""
    mixer = make()
    for parameter in mixer.parameters():  # norms start at one and NormalizedAttention has its own
        parameter.data = parameter.data.double()
    x = torch.randn(1, 6, D, dtype=torch.float64, requires_grad=True)
    direction, cotangent = torch.randn(2, 1, 6, D, dtype=torch.float64)
    out = mixer(x, cu_doc_lens=cumulative(2, 4))
    assert out.dtype == torch.float64
    (grad,) = torch.autograd.grad(out, x, cotangent)
    step = 1e-7
    with torch.no_grad():
        up = mixer(x + step * direction, cu_doc_lens=cumulative(2, 4))
        down = mixer(x - step * direction, cu_doc_lens=cumulative(2, 4))
    measured = ((up - down) * cotangent).sum() / (2 * step)
    assert relative((grad * direction).sum(), measured) < 1e-6


def test_14_init_scales_outputs_with_depth() -> None:
    mixer = layer(d_model=256, n_heads=4)
    settings: dict[str, Any] = {"d_model": 256, "block_idx": 3, "num_blocks": 8}
    expected = {
        InitMethod.normal: (0.02, 0.02),
        InitMethod.normalized: (1 / 16, 1 / 16 / 4),
        InitMethod.llama: (0.02, 0.02 / 4),
        InitMethod.llama_depth: (0.02, 0.02 / math.sqrt(8)),
        InitMethod.fan_in: (1 / 16, 1 / 16),
    }
    shrinkage = 0.98658  # what truncation at three standard deviations leaves of one
    for method, (inner, output) in expected.items():
        mixer.init_weights(init_method=method, **settings)
        assert mixer.w_q.weight.std().item() == pytest.approx(inner * shrinkage, rel=0.02)
        assert mixer.w_out.weight.std().item() == pytest.approx(output * shrinkage, rel=0.02)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("norm", list(LayerNormType))
def test_14_num_params_counts_qk_norm_under_gqa(norm: LayerNormType, per_head: bool) -> None:
    config = AttentionConfig(
        n_heads=4, n_kv_heads=2, qk_norm=LayerNormConfig(name=norm), use_head_qk_norm=per_head
    )
    mixer = config.build(D, layer_idx=0, n_layers=1)
    assert config.num_params(D) == sum(p.numel() for p in mixer.parameters())


def test_no_mask_is_kept_for_every_length() -> None:
    cache = BufferCache()
    mixer = layer(window_size=4, rope=RoPEConfig(), cache=cache)
    for seq in range(1, 40):
        mixer(torch.randn(1, seq, D))
    assert len(cache._buffers) <= 2
    assert all(tensor.shape[-1] <= D for tensor in cache._buffers.values())
    assert list(mixer.buffers()) == []


@pytest.mark.parametrize("name", [RoPEType.default, RoPEType.complex])
def test_a_first_forward_under_inference_mode_does_not_poison_training(name: RoPEType) -> None:
    mixer = layer(rope=RoPEConfig(name=name))
    x = torch.randn(1, 8, D)
    with torch.inference_mode():
        first = mixer(x)
    second = mixer(x)
    second.sum().backward()
    assert torch.equal(first, second)


def test_decoding_builds_no_table_after_warm_up() -> None:
    cache = BufferCache()
    mixer = layer(rope=RoPEConfig(), cache=cache).eval()
    mixer.init_kv_cache_manager(1, 64)
    mixer.rope.warmup_cache(64, CPU)
    before = {key: tensor.data_ptr() for key, tensor in cache._buffers.items()}
    with torch.no_grad():
        mixer(torch.randn(1, 60, D))
        for _ in range(4):
            mixer(torch.randn(1, 1, D))
    assert {key: tensor.data_ptr() for key, tensor in cache._buffers.items()} == before
