"""RoPE against a float64 reference; tables and positions."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial as partial_function
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.rope import (
    ABFRoPEScalingConfig,
    ComplexRotaryEmbedding,
    FusedRotaryEmbedding,
    PIRoPEScalingConfig,
    RoPEConfig,
    RoPEScalingConfig,
    RoPEType,
    RotaryEmbedding,
    RotaryEmbeddingBase,
    StepwiseRoPEScalingConfig,
    YaRNRoPEScalingConfig,
)
from olmo_core.nn.rope_table import RoPETable

SCALINGS: list[RoPEScalingConfig | None] = [
    None,
    ABFRoPEScalingConfig(),
    PIRoPEScalingConfig(factor=4.0, attention_rescale_factor=1.25),
    StepwiseRoPEScalingConfig(),
    YaRNRoPEScalingConfig(),
]
CPU = torch.device("cpu")


def inputs(
    batch: int = 2,
    length: int = 6,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (4, 2),
) -> tuple[Tensor, Tensor]:
    q, k = (torch.randn(batch, length, h, head_dim).to(dtype).requires_grad_() for h in heads)
    return q, k


def turn(rope: RotaryEmbeddingBase, q: Tensor, k: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """``rope`` of (B, T, H, D), through the module where it takes queries and keys apart."""
    rotate = rope.rotate if isinstance(rope, FusedRotaryEmbedding) else rope
    q_out, k_out = rotate(q, k, head_first=False, **kwargs)
    return q_out, k_out


def reference(rope: RotaryEmbeddingBase, x: Tensor, positions: Tensor) -> Tensor:
    """Rotation of complex numbers in float64, position by position."""
    dim = rope.rotary_dim
    freqs = torch.tensor(
        [rope.theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.double
    )
    factor = 1.0
    if rope.scaling is not None:
        freqs = rope.scaling.compute_inv_freqs(rope.theta, dim)
        factor = rope.scaling.rescale_factor
    angles = positions.double()[..., None, None] * freqs  # (T, 1, R/2) or (B, T, 1, R/2)
    turned = x[..., :dim].double()
    if rope.interleaved:
        pairs = torch.complex(turned[..., 0::2], turned[..., 1::2])
    else:
        pairs = torch.complex(turned[..., : dim // 2], turned[..., dim // 2 :])
    pairs = pairs * torch.polar(torch.full_like(angles, factor), angles)
    if rope.interleaved:
        turned = torch.stack((pairs.real, pairs.imag), -1).flatten(-2)
    else:
        turned = torch.cat((pairs.real, pairs.imag), -1)
    return torch.cat((turned, x[..., dim:].double()), -1)


def assert_equals_reference(
    rope: RotaryEmbeddingBase, q: Tensor, k: Tensor, at: Tensor, eps: float, **kwargs: Any
) -> None:
    for x, y in zip((q, k), turn(rope, q, k, **kwargs), strict=True):
        assert y.dtype == x.dtype
        assert y.shape == x.shape
        expected = reference(rope, x, at)
        bound = 8 * eps
        torch.testing.assert_close(y.double(), expected, rtol=bound, atol=bound)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        (expected_dx,) = torch.autograd.grad(expected, x, dy.double())
        torch.testing.assert_close(dx, expected_dx, rtol=bound, atol=bound)


@given(
    name=st.sampled_from(RoPEType),
    scaling=st.sampled_from(SCALINGS),
    theta=st.sampled_from([10_000, 500_000]),
    partial=st.sampled_from([1.0, 0.5, 0.25]),
    head_dim=st.sampled_from([8, 16, 64]),
    batch=st.integers(1, 3),
    length=st.integers(0, 9),
    offset=st.sampled_from([0, 1, 1000, 5000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    full_precision=st.booleans(),
    index=st.sampled_from(["arange", "shared", "per row", "buffers"]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_equals_the_float64_reference(
    name: RoPEType,
    scaling: RoPEScalingConfig | None,
    theta: int,
    partial: float,
    head_dim: int,
    batch: int,
    length: int,
    offset: int,
    dtype: torch.dtype,
    full_precision: bool,
    index: str,
    index_dtype: torch.dtype,
) -> None:
    rope = RoPEConfig(
        name=name,
        theta=theta,
        scaling=scaling,
        partial_rotary_factor=partial,
        full_precision=full_precision,
    ).build(head_dim)
    q, k = inputs(batch, length, head_dim, dtype)
    eps = torch.finfo(dtype).eps
    positions = torch.arange(length, dtype=index_dtype)
    kwargs: dict[str, Any] = {}
    if index == "shared":
        positions = (positions * 7) % 5 + offset
    elif index == "per row":
        positions = torch.randint(offset, offset + 99, (batch, length), dtype=index_dtype)
    elif index == "buffers":
        buffers = rope.get_buffers(length + offset, CPU, dtype=torch.float64)
        rows = torch.randint(0, length + offset + (length == 0), (length,))
        positions = rows
        kwargs = {f: b[rows] for f, b in buffers._asdict().items() if b is not None}
    if index in ("shared", "per row"):
        kwargs = {"positions": positions, "max_position": offset + 100}
    assert_equals_reference(rope, q, k, positions, eps, **kwargs)


@pytest.mark.parametrize("name", RoPEType)
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_gradcheck(name: RoPEType, partial: float) -> None:
    rope = RoPEConfig(name=name, partial_rotary_factor=partial).build(8)
    q, k = inputs(1, 3, 8, torch.float64, heads=(2, 1))
    f = partial_function(turn, rope)
    assert torch.autograd.gradcheck(f, (q, k))
    assert torch.autograd.gradgradcheck(f, (q, k))


@pytest.mark.parametrize("name", RoPEType)
def test_packed_equals_separate_a_million_tokens_in(name: RoPEType) -> None:
    """Logits depend on distances alone; tables built in float32 are off by 6e-2 here."""
    rope = RoPEConfig(name=name).build(128)
    offset, length = 1_000_000, 8
    q, k = inputs(1, length, 128, heads=(1, 1))

    # The table's frequencies at a few far rows, without the whole table of a gigabyte.
    angles = (torch.arange(length, dtype=torch.float64) + offset)[:, None]
    angles = angles * 500_000 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    if name == RoPEType.complex:
        far: dict[str, Any] = {"freqs_cis": torch.polar(torch.ones_like(angles), angles)}
        far["freqs_cis"] = far["freqs_cis"].to(torch.complex64)
    else:
        angles = torch.cat((angles, angles), -1)
        far = {"pos_sin": angles.sin().float(), "pos_cos": angles.cos().float()}

    def scores(**kwargs: Any) -> Tensor:
        rotated_q, rotated_k = turn(rope, q, k, **kwargs)
        return torch.einsum("bqhd,bkhd->bqk", rotated_q, rotated_k)

    torch.testing.assert_close(scores(**far), scores(), rtol=0, atol=2e-5)


def test_table_is_exact_at_long_offsets() -> None:
    rope = RoPEConfig(theta=10_000).build(2)  # one frequency, 1: the angle is the position
    q = torch.tensor([1.0, 0.0]).expand(1, 1, 1, 2)
    position = 1_000_003
    y, _ = turn(rope, q, q, positions=torch.tensor([position]), max_position=position + 1)
    assert y[0, 0, 0, 0].item() == torch.tensor(math.cos(position)).item()
    assert y[0, 0, 0, 1].item() == torch.tensor(math.sin(position)).item()


def builds_during(action: Callable[[], object]) -> int:
    build = RoPETable._build
    with mock.patch.object(RoPETable, "_build", autospec=True, side_effect=build) as counted:
        action()
    return counted.call_count


def test_warmup_builds_all_that_forward_needs() -> None:
    for dtype in (torch.float32, torch.float64):
        rope = RotaryEmbedding(head_size=8)
        assert builds_during(lambda: rope.warmup_cache(3000, "cpu", dtype)) == 1  # noqa: B023
        q, k = inputs(length=3000, head_dim=8, dtype=dtype, batch=1, heads=(1, 1))
        positions = torch.arange(3000)
        assert builds_during(lambda: turn(rope, q, k)) == 0  # noqa: B023
        assert builds_during(lambda: turn(rope, q, k, positions=positions, max_position=3000)) == 0  # noqa: B023
        assert builds_during(lambda: rope.get_buffers(3000, CPU, dtype)) == 0  # noqa: B023


def test_growing_lengths_build_few_tables() -> None:
    rope = RotaryEmbedding(head_size=8)

    def decode() -> None:
        for length in range(1, 9000, 100):
            rope.get_table(length, CPU)

    assert builds_during(decode) <= 4


def test_caches_are_shared_by_what_a_table_depends_on() -> None:
    """Design failure 8: a cache without head_dim in its key gave wrong tables."""
    cache = BufferCache()
    first = RotaryEmbedding(head_size=8, cache=cache)
    q, k = inputs(head_dim=8)
    assert builds_during(lambda: turn(first, q, k)) == 1
    same = [RotaryEmbedding(head_size=8, cache=cache), RotaryEmbedding(head_size=8, cache=cache)]
    same.append(RotaryEmbedding(head_size=16, partial_rotary_factor=0.5, cache=cache))
    same.append(RotaryEmbedding(head_size=8, full_precision=False, cache=cache))
    for rope in same:
        assert builds_during(lambda: turn(rope, *inputs(head_dim=rope.head_size))) == 0  # noqa: B023
    others = [
        RotaryEmbedding(head_size=16, cache=cache),
        RotaryEmbedding(head_size=8, theta=10_000, cache=cache),
        *[RotaryEmbedding(head_size=8, scaling=scaling, cache=cache) for scaling in SCALINGS[1:]],
        RotaryEmbedding(head_size=8, scaling=PIRoPEScalingConfig(factor=5), cache=cache),
    ]
    for rope in others:
        x = inputs(head_dim=rope.head_size)
        assert builds_during(lambda: turn(rope, *x)) == 1  # noqa: B023
        assert_equals_reference(rope, *x, torch.arange(6), 1e-6)
    assert builds_during(lambda: turn(first, q.double(), k.double())) == 1  # another dtype
    assert len(first.state_dict()) == len(list(first.buffers())) == 0


def test_inference_first_does_not_poison_training() -> None:
    rope = RoPEConfig().build(16)
    q, k = inputs()
    with torch.inference_mode():
        turn(rope, q, k)
    y, _ = turn(rope, q, k)
    y.sum().backward()
    assert q.grad is not None


def test_fake_tensors_do_not_poison_the_cache() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    rope = RoPEConfig().build(16)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(2, 6, 4, 16))
        y, _ = turn(rope, fake, fake)
        assert y.shape == fake.shape
    assert_equals_reference(rope, *inputs(), torch.arange(6), 1e-6)


def test_export_keeps_the_rotation() -> None:
    rope = RoPEConfig().build(16)
    q, k = inputs()
    exported = torch.export.export(rope, (q, k, False)).module()
    torch.testing.assert_close(exported(q, k, False), turn(rope, q, k))


def test_meta_build_to_empty_is_right() -> None:
    with torch.device("meta"):
        rope = RoPEConfig().build(16)
        q = torch.randn(1, 2, 4, 16)
    assert turn(rope, q, q)[0].is_meta
    rope.to_empty(device="cpu")
    assert_equals_reference(rope, *inputs(), torch.arange(6), 1e-6)
    with torch.device("meta"):  # a default device does not reach the table
        RoPEConfig().build(16).get_table(4, CPU)[0].sum().item()


def test_copies_share_the_cache_and_pickles_rebuild_it() -> None:
    rope = RotaryEmbedding(head_size=16)
    q, k = inputs()
    turn(rope, q, k)
    assert builds_during(lambda: turn(copy.deepcopy(rope), q, k)) == 0
    restored = pickle.loads(pickle.dumps(rope))
    assert builds_during(lambda: turn(restored, q, k)) == 1


@pytest.mark.parametrize("full_precision", [True, False])
def test_autocast_changes_nothing(full_precision: bool) -> None:
    rope = RoPEConfig(full_precision=full_precision).build(16)
    for dtype in (torch.float32, torch.bfloat16):
        q, k = inputs(dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            actual = turn(rope, q, k)
        for a, b in zip(actual, turn(rope, q, k), strict=True):
            assert torch.equal(a, b)


def test_full_precision_is_more_precise() -> None:
    q, k = inputs(length=200, dtype=torch.bfloat16)
    errors = []
    for full_precision in (True, False):
        rope = RoPEConfig(full_precision=full_precision).build(16)
        difference = turn(rope, q, k)[0].double() - reference(rope, q, torch.arange(200))
        errors.append(difference.abs().mean().item())
    assert errors[0] < errors[1] / 1.2


def test_mixed_dtypes_rotate_in_the_wider_one() -> None:
    rope = RoPEConfig().build(16)
    q, k = inputs()
    low, high = turn(rope, q.bfloat16(), k.double())
    assert (low.dtype, high.dtype) == (torch.bfloat16, torch.float64)
    torch.testing.assert_close(
        high, reference(rope, k.double(), torch.arange(6)), rtol=1e-14, atol=1e-14
    )


def test_classes_and_buffers_by_name() -> None:
    classes = {
        RoPEType.default: RotaryEmbedding,
        RoPEType.complex: ComplexRotaryEmbedding,
        RoPEType.fused: FusedRotaryEmbedding,
    }
    for name, cls in classes.items():
        rope = RoPEConfig(name=name, partial_rotary_factor=0.5).build(16)
        assert type(rope) is cls
        assert "rotary_dim=8" in repr(rope)
        buffers = rope.get_buffers(5, CPU)
        if name == RoPEType.complex:
            assert buffers.pos_sin is buffers.pos_cos is None
            assert buffers.freqs_cis is not None
            assert buffers.freqs_cis.shape == (5, 4)
        else:
            assert buffers.freqs_cis is None
            assert buffers.pos_sin is not None
            assert buffers.pos_cos is not None
            assert buffers.pos_sin.shape == buffers.pos_cos.shape == (5, 8)
            assert torch.equal(buffers.pos_cos[0], torch.ones(8))
        sin, cos = rope.get_table(5, CPU)
        assert sin.shape == cos.shape
        assert sin.shape[0] >= 5
        assert sin.shape[1] == 4
        q, k = inputs(1, 5)
        given = {f: b for f, b in buffers._asdict().items() if b is not None}
        torch.testing.assert_close(turn(rope, q, k, **given), turn(rope, q, k))


def test_halves_of_a_buffer_may_differ() -> None:
    rope = RoPEConfig().build(4)
    q = torch.randn(1, 3, 1, 4)
    cos, sin = torch.randn(3, 4), torch.randn(3, 4)
    y, _ = turn(rope, q, q, pos_cos=cos, pos_sin=sin)
    half = torch.cat((-q[..., 2:], q[..., :2]), -1)
    torch.testing.assert_close(y, q * cos[:, None] + half * sin[:, None])


@pytest.mark.gpu
def test_cuda_tables_equal_cpu_tables_and_replay_in_graphs() -> None:
    rope = RotaryEmbedding(head_size=16)
    rope.warmup_cache(64, "cuda")  # without an index, as users write it
    q, k = (x.detach().cuda() for x in inputs(length=64))
    assert builds_during(lambda: turn(rope, q, k)) == 0
    assert torch.equal(rope.get_table(64, "cuda")[0].cpu(), rope.get_table(64, CPU)[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = turn(rope, q, k)
    q.normal_()
    graph.replay()
    torch.testing.assert_close(captured, turn(rope, q, k))
    cold = RoPEConfig().build(16)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        q.clone()  # torch warns of an empty graph
        with pytest.raises(RuntimeError, match="call warmup_cache"):
            turn(cold, q, k)
