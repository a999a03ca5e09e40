"""RoPE against transformers and a float64 reference; tables, positions, compilation, errors."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from olmo_core.exceptions import OLMoConfigurationError
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
    for x, y in zip((q, k), rope(q, k, **kwargs), strict=True):
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


def hf_config(rope_type: str, head_dim: int = 64, theta: float = 500_000.0, **kwargs: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=65536,
        rope_parameters={"rope_type": rope_type, "rope_theta": theta, **kwargs},
    )


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(
    ("scaling", "rope_type", "parameters"),
    [
        (PIRoPEScalingConfig(factor=3.0), "linear", {"factor": 3.0}),
        (
            StepwiseRoPEScalingConfig(),  # the defaults are Llama 3.2's
            "llama3",
            {
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            StepwiseRoPEScalingConfig(
                factor=8.0,
                low_freq_proportion=0.5,
                high_freq_proportion=0.125,
                old_context_len=4096,
            ),
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 8.0,
                "original_max_position_embeddings": 4096,
            },
        ),
        (
            YaRNRoPEScalingConfig(),
            "yarn",
            {"factor": 8.0, "original_max_position_embeddings": 8192},
        ),
        (
            YaRNRoPEScalingConfig(factor=40, beta_fast=16, beta_slow=2, old_context_len=4096),
            "yarn",
            {
                "factor": 40.0,
                "beta_fast": 16,
                "beta_slow": 2,
                "original_max_position_embeddings": 4096,
            },
        ),
        (
            YaRNRoPEScalingConfig(factor=0.5, old_context_len=64),
            "yarn",
            {"factor": 0.5, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_scalings_equal_transformers(
    scaling: RoPEScalingConfig, rope_type: str, parameters: dict[str, Any], head_dim: int
) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = hf_config(rope_type, head_dim, **parameters)
    expected, factor = ROPE_INIT_FUNCTIONS[rope_type](config)
    actual = scaling.compute_inv_freqs(500_000, head_dim)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual.float(), expected, rtol=1e-5, atol=0)
    assert scaling.rescale_factor == pytest.approx(factor)


def test_abf_replaces_theta() -> None:
    scaled = RoPEConfig(theta=10_000, scaling=ABFRoPEScalingConfig(new_theta=1e6)).build(16)
    plain = RoPEConfig(theta=1_000_000).build(16)
    q, k = inputs()
    assert torch.equal(scaled(q, k)[0], plain(q, k)[0])


def test_yarn_rescales_by_its_formula() -> None:
    assert YaRNRoPEScalingConfig(factor=8.0).attention_rescale_factor == 0.1 * math.log(8) + 1
    assert YaRNRoPEScalingConfig(factor=1.0).attention_rescale_factor == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_equals_transformers_llama(dtype: torch.dtype, partial: float) -> None:
    from transformers.models.llama.modeling_llama import (
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    # "linear" by 1 is no scaling; unlike "default" it heeds the partial factor.
    config = hf_config("linear", theta=10_000.0, partial_rotary_factor=partial, factor=1.0)
    theirs = LlamaRotaryEmbedding(config)
    q, k = inputs(head_dim=64, length=33, dtype=dtype)
    positions = torch.arange(33)[None] + 100
    cos, sin = theirs(q, positions)
    width = cos.shape[-1]
    expected = apply_rotary_pos_emb(q[..., :width], k[..., :width], cos, sin, unsqueeze_dim=2)
    for name in (RoPEType.default, RoPEType.fused):
        rope = RoPEConfig(
            name=name, theta=10_000, full_precision=False, partial_rotary_factor=partial
        ).build(64)
        actual = rope(q, k, positions=positions.expand(2, -1), max_position=133)
        dy = torch.randn_like(expected[0])
        for a, b, x in zip(actual, expected, (q, k), strict=True):
            # Theirs is built in float32, and off by 1e-5 at position 100 already.
            tolerance = {"rtol": 0.0, "atol": max(5e-5, 5 * torch.finfo(dtype).eps)}
            torch.testing.assert_close(a[..., :width], b, **tolerance)
            assert torch.equal(a[..., width:], x[..., width:])
            (da,) = torch.autograd.grad(a[..., :width], x, dy[:, :, : x.shape[2]])
            (db,) = torch.autograd.grad(b, x, dy[:, :, : x.shape[2]], retain_graph=True)
            torch.testing.assert_close(da, db, **tolerance)


@pytest.mark.parametrize("name", RoPEType)
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_gradcheck(name: RoPEType, partial: float) -> None:
    rope = RoPEConfig(name=name, partial_rotary_factor=partial).build(8)
    q, k = inputs(1, 3, 8, torch.float64, heads=(2, 1))
    assert torch.autograd.gradcheck(rope, (q, k))
    assert torch.autograd.gradgradcheck(rope, (q, k))


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
        rotated_q, rotated_k = rope(q, k, **kwargs)
        return torch.einsum("bqhd,bkhd->bqk", rotated_q, rotated_k)

    torch.testing.assert_close(scores(**far), scores(), rtol=0, atol=2e-5)


def test_table_is_exact_at_long_offsets() -> None:
    rope = RoPEConfig(theta=10_000).build(2)  # one frequency, 1: the angle is the position
    q = torch.tensor([1.0, 0.0]).expand(1, 1, 1, 2)
    position = 1_000_003
    y, _ = rope(q, q, positions=torch.tensor([position]), max_position=position + 1)
    assert y[0, 0, 0, 0].item() == torch.tensor(math.cos(position)).item()
    assert y[0, 0, 0, 1].item() == torch.tensor(math.sin(position)).item()


class Counting(RotaryEmbedding):
    builds = 0

    def _build_table(self, *args: Any) -> Tensor:
        Counting.builds += 1
        return super()._build_table(*args)


def builds_during(action: Callable[[], object]) -> int:
    before = Counting.builds
    action()
    return Counting.builds - before


def test_warmup_builds_all_that_forward_needs() -> None:
    for dtype in (torch.float32, torch.float64):
        rope = Counting(head_dim=8)
        assert builds_during(lambda: rope.warmup_cache(3000, "cpu", dtype)) == 1  # noqa: B023
        q, k = inputs(length=3000, head_dim=8, dtype=dtype, batch=1, heads=(1, 1))
        positions = torch.arange(3000)
        assert builds_during(lambda: rope(q, k)) == 0  # noqa: B023
        assert builds_during(lambda: rope(q, k, positions=positions, max_position=3000)) == 0  # noqa: B023
        assert builds_during(lambda: rope.get_buffers(3000, CPU, dtype)) == 0  # noqa: B023


def test_growing_lengths_build_few_tables() -> None:
    rope = Counting(head_dim=8)

    def decode() -> None:
        for length in range(1, 9000, 100):
            rope.get_table(length, CPU)

    assert builds_during(decode) <= 4


def test_caches_are_shared_by_what_a_table_depends_on() -> None:
    """Design failure 8: a cache without head_dim in its key gave wrong tables."""
    cache = BufferCache()
    first = Counting(head_dim=8, cache=cache)
    q, k = inputs(head_dim=8)
    assert builds_during(lambda: first(q, k)) == 1
    same = [Counting(head_dim=8, cache=cache), Counting(head_dim=8, cache=cache)]
    same.append(Counting(head_dim=16, partial_rotary_factor=0.5, cache=cache))
    same.append(Counting(head_dim=8, full_precision=False, cache=cache))
    for rope in same:
        assert builds_during(lambda: rope(*inputs(head_dim=rope.head_dim))) == 0  # noqa: B023
    others = [
        Counting(head_dim=16, cache=cache),
        Counting(head_dim=8, theta=10_000, cache=cache),
        *[Counting(head_dim=8, scaling=scaling, cache=cache) for scaling in SCALINGS[1:]],
        Counting(head_dim=8, scaling=PIRoPEScalingConfig(factor=5), cache=cache),
    ]
    for rope in others:
        x = inputs(head_dim=rope.head_dim)
        assert builds_during(lambda: rope(*x)) == 1  # noqa: B023
        assert_equals_reference(rope, *x, torch.arange(6), 1e-6)
    assert builds_during(lambda: first(q.double(), k.double())) == 1  # another dtype
    assert len(first.state_dict()) == len(list(first.buffers())) == 0


def test_inference_first_does_not_poison_training() -> None:
    rope = RoPEConfig().build(16)
    q, k = inputs()
    with torch.inference_mode():
        rope(q, k)
    y, _ = rope(q, k)
    y.sum().backward()
    assert q.grad is not None


def test_fake_tensors_do_not_poison_the_cache() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    rope = RoPEConfig().build(16)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(2, 6, 4, 16))
        y, _ = rope(fake, fake)
        assert y.shape == fake.shape
    assert_equals_reference(rope, *inputs(), torch.arange(6), 1e-6)


def test_export_keeps_the_rotation() -> None:
    rope = RoPEConfig().build(16)
    q, k = inputs()
    exported = torch.export.export(rope, (q, k)).module()
    torch.testing.assert_close(exported(q, k), rope(q, k))


def test_meta_build_to_empty_is_right() -> None:
    with torch.device("meta"):
        rope = RoPEConfig().build(16)
        q = torch.randn(1, 2, 4, 16)
    assert rope(q, q)[0].is_meta
    rope.to_empty(device="cpu")
    assert_equals_reference(rope, *inputs(), torch.arange(6), 1e-6)
    with torch.device("meta"):  # a default device does not reach the table
        RoPEConfig().build(16).get_table(4, CPU)[0].sum().item()


def test_copies_share_the_cache_and_pickles_rebuild_it() -> None:
    rope = Counting(head_dim=16)
    q, k = inputs()
    rope(q, k)
    assert builds_during(lambda: copy.deepcopy(rope)(q, k)) == 0
    restored = pickle.loads(pickle.dumps(rope))
    assert builds_during(lambda: restored(q, k)) == 1


@pytest.mark.parametrize("full_precision", [True, False])
def test_autocast_changes_nothing(full_precision: bool) -> None:
    rope = RoPEConfig(full_precision=full_precision).build(16)
    for dtype in (torch.float32, torch.bfloat16):
        q, k = inputs(dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            actual = rope(q, k)
        for a, b in zip(actual, rope(q, k), strict=True):
            assert torch.equal(a, b)


def test_full_precision_is_more_precise() -> None:
    q, k = inputs(length=200, dtype=torch.bfloat16)
    errors = []
    for full_precision in (True, False):
        rope = RoPEConfig(full_precision=full_precision).build(16)
        difference = rope(q, k)[0].double() - reference(rope, q, torch.arange(200))
        errors.append(difference.abs().mean().item())
    assert errors[0] < errors[1] / 1.2


def test_mixed_dtypes_rotate_in_the_wider_one() -> None:
    rope = RoPEConfig().build(16)
    q, k = inputs()
    low, high = rope(q.bfloat16(), k.double())
    assert (low.dtype, high.dtype) == (torch.bfloat16, torch.float64)
    torch.testing.assert_close(
        high, reference(rope, k.double(), torch.arange(6)), rtol=1e-14, atol=1e-14
    )


class Block(nn.Module):
    """A projection and RoPE, as an attention layer calls it, optionally checkpointed."""

    def __init__(self, rope: RotaryEmbeddingBase, checkpointed: bool) -> None:
        super().__init__()
        self.rope = rope
        self.proj = nn.Linear(16, 16)
        self.checkpointed = checkpointed

    def body(self, x: Tensor, positions: Tensor | None) -> Tensor:
        q = self.proj(x)
        bound = None if positions is None else x.shape[1]
        q, k = self.rope(q, q[:, :, :2], positions=positions, max_position=bound)
        return q.sum(2) * k.sum(2)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if self.checkpointed:
            out = checkpoint(self.body, x, positions, use_reentrant=False)
            assert isinstance(out, Tensor)
            return out
        return self.body(x, positions)


@pytest.fixture
def counter() -> Any:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "checkpointed", "indexed"),
    [
        (RoPEType.default, True, False),
        (RoPEType.complex, False, True),
    ],
)
def test_compiles_to_one_graph_with_a_constant_table(
    counter: Any, name: RoPEType, checkpointed: bool, indexed: bool
) -> None:
    block = Block(RoPEConfig(name=name).build(16), checkpointed)
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    frames = []
    for length in (8, 8, 9, 13, 300):
        x = torch.randn(2, length, 4, 16, requires_grad=True)
        positions = torch.arange(length) % 5 if indexed else None
        actual, expected = compiled(x, positions), block(x, positions)
        torch.testing.assert_close(actual, expected)
        (dx,) = torch.autograd.grad(actual.square().sum(), x)
        (expected_dx,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(dx, expected_dx)
        frames.append(counter.frame_count)
    # One static graph and one with a dynamic length.
    assert frames == [1, 1, 2, 2, 2]
    code = "\n".join(graph.code for graph in counter.graphs)
    assert "_constant_table" in code
    for recomputed in ("arange", ".cos(", ".sin(", "float64"):
        assert recomputed not in code


def test_compiled_code_recompiles_once_when_the_table_grows(counter: Any) -> None:
    rope = RoPEConfig().build(4)
    compiled = torch.compile(rope, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for length in (2048, 2049, 5000, 2048, 5):
        q, k = inputs(1, length, 4, heads=(1, 1))
        torch.testing.assert_close(compiled(q, k), rope(q, k))
        frames.append(counter.frame_count)
    assert frames == [1, 2, 3, 3, 3]
    warm = RoPEConfig(theta=10_000).build(4)
    warm.warmup_cache(8192, CPU)
    compiled = torch.compile(warm, backend=counter, fullgraph=True, dynamic=True)
    for length in (3, 2049, 5000, 8192):
        compiled(*inputs(1, length, 4, heads=(1, 1)))
    assert counter.frame_count == 4


def test_layers_that_share_compiled_code_keep_their_own_tables(counter: Any) -> None:
    """Compiled code is cached for a code object, which all layers share: only guards tell them
    apart, and a constant carries none by itself."""
    cache = BufferCache()
    ropes = [
        RoPEConfig().build(16, cache=cache),
        RoPEConfig(theta=10_000).build(16, cache=cache),
        RoPEConfig(scaling=YaRNRoPEScalingConfig(factor=4)).build(16, cache=cache),
        RoPEConfig(scaling=YaRNRoPEScalingConfig(factor=16)).build(16, cache=cache),
        RoPEConfig().build(16),
    ]
    q, k = inputs()
    for rope in ropes:
        compiled = torch.compile(rope, backend=counter, fullgraph=True)
        torch.testing.assert_close(compiled(q, k), rope(q, k))
    assert counter.frame_count == 4  # the first and the last have the same table

    def through_a_function(rope: RotaryEmbeddingBase) -> tuple[Tensor, Tensor]:
        q_out, k_out = rope(q, k)
        return q_out, k_out

    function = torch.compile(through_a_function, backend=counter, fullgraph=True)
    for rope in ropes:
        torch.testing.assert_close(function(rope), rope(q, k))


def test_compile_under_inference_then_train(counter: Any) -> None:
    block = Block(RoPEConfig().build(16), checkpointed=False)
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    x = torch.randn(2, 8, 4, 16, requires_grad=True)
    with torch.inference_mode():
        compiled(x)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(compiled(x), block(x))


def test_the_constant_mark_is_torch_s_own() -> None:
    def marked() -> None: ...

    torch.compiler.assume_constant_result(marked)
    for method in (RotaryEmbeddingBase._constant_table, RotaryEmbeddingBase._num_rows):
        assert method.__dict__ == marked.__dict__ == {"_dynamo_marked_constant": True}


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
        torch.testing.assert_close(rope(q, k, **given), rope(q, k))


def test_halves_of_a_buffer_may_differ() -> None:
    rope = RoPEConfig().build(4)
    q = torch.randn(1, 3, 1, 4)
    cos, sin = torch.randn(3, 4), torch.randn(3, 4)
    y, _ = rope(q, q, pos_cos=cos, pos_sin=sin)
    half = torch.cat((-q[..., 2:], q[..., :2]), -1)
    torch.testing.assert_close(y, q * cos[:, None] + half * sin[:, None])


@pytest.mark.parametrize(
    ("config", "head_dim", "message"),
    [
        (RoPEConfig(), 15, r"even and at least 2, got 15 \* 1.0 = 15"),
        (RoPEConfig(), 0, "even and at least 2"),
        (RoPEConfig(partial_rotary_factor=0.25), 12, r"12 \* 0.25 = 3"),
        (RoPEConfig(partial_rotary_factor=0.01), 16, "at least 2"),
        (RoPEConfig(partial_rotary_factor=0.0), 16, r"must lie in \(0, 1\], got 0.0"),
        (RoPEConfig(partial_rotary_factor=1.5), 16, r"must lie in \(0, 1\], got 1.5"),
        (RoPEConfig(theta=1), 16, "theta must be greater than 1"),
        (RoPEConfig(theta=float("nan")), 16, "theta must be greater than 1"),
        (RoPEConfig(scaling=PIRoPEScalingConfig(factor=0)), 16, "factor must be positive, got 0"),
        (RoPEConfig(scaling=ABFRoPEScalingConfig(new_theta=-1)), 16, "new_theta must be positive"),
        (
            RoPEConfig(scaling=ABFRoPEScalingConfig(attention_rescale_factor=0)),
            16,
            "attention_rescale_factor must be positive",
        ),
        (
            RoPEConfig(scaling=StepwiseRoPEScalingConfig(low_freq_proportion=0.8)),
            16,
            "got 0.8 and 0.25",
        ),
        (
            RoPEConfig(scaling=StepwiseRoPEScalingConfig(low_freq_proportion=-0.1)),
            16,
            "got -0.1 and 0.25",
        ),
        (
            RoPEConfig(scaling=StepwiseRoPEScalingConfig(high_freq_proportion=0)),
            16,
            "high_freq_proportion must be positive",
        ),
        (RoPEConfig(scaling=YaRNRoPEScalingConfig(factor=-2)), 16, "factor must be positive"),
        (RoPEConfig(scaling=YaRNRoPEScalingConfig(beta_slow=33)), 16, "beta_slow <= beta_fast"),
        (RoPEConfig(scaling=YaRNRoPEScalingConfig(old_context_len=0)), 16, "old_context_len"),
        (RoPEConfig(scaling=RoPEScalingConfig()), 16, "abf, pi, stepwise, yarn"),
    ],
)
def test_bad_configs(config: RoPEConfig, head_dim: int, message: str) -> None:
    with pytest.raises(OLMoConfigurationError, match=message):
        config.build(head_dim)


INT = torch.arange(6)
TABLE = torch.ones(6, 16)


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("default", {"positions": INT.float(), "max_position": 6}, TypeError, "torch.float32"),
        ("default", {"positions": INT.bool(), "max_position": 6}, TypeError, "torch.bool"),
        ("default", {"positions": INT}, TypeError, "need max_position"),
        ("default", {"positions": INT, "max_position": INT.max()}, TypeError, "need max_position"),
        ("default", {"positions": INT, "max_position": 6.0}, TypeError, "got 6.0"),
        ("default", {"max_position": 6}, ValueError, "only together with positions"),
        ("default", {"positions": INT[:5], "max_position": 6}, ValueError, r"got \(5,\)"),
        ("default", {"positions": INT[None], "max_position": 6}, ValueError, r"got \(1, 6\)"),
        ("default", {"positions": INT - 1, "max_position": 6}, ValueError, r"lie in \[0, "),
        ("default", {"positions": INT + 9999, "max_position": 6}, ValueError, "max_position=6"),
        ("default", {"positions": INT.to("meta"), "max_position": 6}, ValueError, "on meta"),
        ("default", {"pos_sin": TABLE}, ValueError, "pos_sin and pos_cos together"),
        ("default", {"pos_cos": TABLE}, ValueError, "pos_sin and pos_cos together"),
        ("default", {"freqs_cis": TABLE[:, :8] + 0j}, ValueError, "not freqs_cis"),
        ("complex", {"pos_sin": TABLE, "pos_cos": TABLE}, ValueError, "takes freqs_cis"),
        ("complex", {"freqs_cis": TABLE[:, :8]}, TypeError, "must be complex"),
        ("complex", {"freqs_cis": TABLE + 0j}, ValueError, r"shape \(6, 8\), got \(6, 16\)"),
        (
            "fused",
            {"pos_sin": TABLE, "pos_cos": TABLE, "positions": INT, "max_position": 6},
            ValueError,
            "not both",
        ),
        ("fused", {"pos_sin": TABLE[:5], "pos_cos": TABLE[:5]}, ValueError, r"got \(5, 16\)"),
        ("fused", {"pos_sin": TABLE, "pos_cos": TABLE[:, :8]}, ValueError, r"got \(6, 8\)"),
        ("fused", {"pos_sin": TABLE[None], "pos_cos": TABLE[None]}, ValueError, r"\(1, 6, 16\)"),
        (
            "default",
            {"pos_sin": TABLE.to("meta"), "pos_cos": TABLE.to("meta")},
            ValueError,
            "on meta, the queries on cpu",
        ),
        (
            "default",
            {"pos_sin": TABLE.bfloat16(), "pos_cos": TABLE.bfloat16()},
            OLMoConfigurationError,
            "cast_forward_inputs=False",
        ),
        (
            "default",
            {"pos_sin": TABLE.long(), "pos_cos": TABLE.long()},
            OLMoConfigurationError,
            "torch.int64",
        ),
    ],
)
def test_bad_calls(name: str, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    rope = RoPEConfig(name=RoPEType(name)).build(16)
    with pytest.raises(error, match=message):
        rope(*inputs(), **kwargs)


def test_bad_inputs() -> None:
    rope = RoPEConfig().build(16)
    q, k = inputs()
    for bad_q, bad_k in [(q[0], k[0]), (q[..., :8], k[..., :8]), (q, k[:, :5]), (q, k[..., :8])]:
        with pytest.raises(ValueError, match="RoPE expected q"):
            rope(bad_q, bad_k)
    with pytest.raises(TypeError, match="floating-point"):
        rope(q.long(), k.long())
    tables = rope.get_buffers(6, CPU)
    with pytest.raises(OLMoConfigurationError, match=r"dtype=torch\.float64"):
        rope(q.double(), k.double(), pos_sin=tables.pos_sin, pos_cos=tables.pos_cos)
    low = RoPEConfig(full_precision=False).build(16)
    assert tables.pos_sin is not None
    assert tables.pos_cos is not None
    sin, cos = tables.pos_sin.bfloat16(), tables.pos_cos.bfloat16()
    low(q.bfloat16(), k.bfloat16(), pos_sin=sin, pos_cos=cos)  # a table as coarse as asked for


@pytest.mark.gpu
def test_cuda_tables_equal_cpu_tables_and_replay_in_graphs() -> None:
    rope = Counting(head_dim=16)
    rope.warmup_cache(64, "cuda")  # without an index, as users write it
    q, k = (x.detach().cuda() for x in inputs(length=64))
    assert builds_during(lambda: rope(q, k)) == 0
    assert torch.equal(rope.get_table(64, "cuda")[0].cpu(), rope.get_table(64, CPU)[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rope(q, k)
    q.normal_()
    graph.replay()
    torch.testing.assert_close(captured, rope(q, k))
    cold = RoPEConfig().build(16)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        q.clone()  # torch warns of an empty graph
        with pytest.raises(RuntimeError, match="call warmup_cache"):
            cold(q, k)
