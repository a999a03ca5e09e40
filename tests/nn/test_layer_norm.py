"""Norms against torch, transformers and a dense float64 reference, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from olmo_core.config import DType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.functional import l2_normalize
from olmo_core.nn.layer_norm import (
    CuTeRMSNorm,
    FusedRMSNorm,
    L2Norm,
    LayerNorm,
    LayerNormConfig,
    LayerNormType,
    QwenRMSNorm,
    RMSNorm,
)

CLASSES = {
    LayerNormType.default: LayerNorm,
    LayerNormType.rms: RMSNorm,
    LayerNormType.fused_rms: FusedRMSNorm,
    LayerNormType.l2_norm: L2Norm,
    LayerNormType.qwen_rms: QwenRMSNorm,
    LayerNormType.cute_rms: CuTeRMSNorm,
}
RMS_TYPES = [t for t, cls in CLASSES.items() if issubclass(cls, RMSNorm)]


def randomise(norm: LayerNorm) -> LayerNorm:
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=0.5)
    return norm


def reference(norm: LayerNorm, x: Tensor) -> Tensor:
    """Every norm as its formula says, in float64."""
    x = x.double()
    if isinstance(norm, L2Norm):
        return x / x.square().sum(-1, keepdim=True).sqrt()
    if type(norm) is LayerNorm:
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    if norm.weight is not None:
        y = y * norm.weight.double()
    if norm.bias is not None:
        y = y + norm.bias.double()
    return y


def grads(y: Tensor, dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, dy.to(y.dtype))


@given(
    name=st.sampled_from(LayerNormType),
    shape=st.lists(st.integers(1, 5), max_size=3),
    size=st.integers(1, 33),
    dtype=st.sampled_from(DType),
    param_dtype=st.sampled_from(DType),
    affine=st.booleans(),
    bias=st.booleans(),
    full_precision=st.booleans(),
)
def test_equals_the_float64_reference(
    name: LayerNormType,
    shape: list[int],
    size: int,
    dtype: DType,
    param_dtype: DType,
    affine: bool,
    bias: bool,
    full_precision: bool,
) -> None:
    options: dict[str, Any] = {"name": name, "full_precision": full_precision}
    if name != LayerNormType.l2_norm:
        options |= {"elementwise_affine": affine, "bias": affine and bias, "dtype": param_dtype}
    norm = randomise(LayerNormConfig(**options).build(size))
    x = torch.randn(*shape, size).add_(0.1).to(dtype.as_pt()).requires_grad_()
    y, expected = norm(x), reference(norm, x)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    dy = torch.randn(y.shape, dtype=torch.float64)
    inputs = (x, *norm.parameters())
    # With a width of one a mean is exact but its difference from x is pure rounding.
    bound = 10 * torch.finfo(dtype.as_pt()).eps * (1 if full_precision else 4)
    if full_precision and param_dtype == dtype:
        bound = 4 * torch.finfo(dtype.as_pt()).eps
    torch.testing.assert_close(y.double(), expected, rtol=bound, atol=4 * bound)
    gradients = zip(grads(y, dy, *inputs), grads(expected, dy, *inputs), strict=True)
    worst = max(torch.finfo(d.as_pt()).eps for d in (dtype, param_dtype))
    for actual, wanted in gradients:
        scale = wanted.abs().max().item() + 1
        torch.testing.assert_close(actual, wanted, rtol=0, atol=16 * scale * worst)


@pytest.mark.parametrize("name", LayerNormType)
def test_float64_stays_float64(name: LayerNormType) -> None:
    """Design failure 13: float64 inputs were silently computed in float32."""
    norm = randomise(LayerNormConfig(name=name).build(16)).double()
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm(x), reference(norm, x), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(norm, (x,))
    # float32 parameters beside a float64 input do not lower it either.
    norm = norm.float()
    torch.testing.assert_close(norm(x), reference(norm, x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_equals_torch(dtype: torch.dtype) -> None:
    norm = randomise(LayerNorm(size=24, dtype=dtype, full_precision=False))
    x = torch.randn(5, 24, dtype=dtype)
    assert torch.equal(norm(x), F.layer_norm(x, (24,), norm.weight, norm.bias, norm.eps))
    rms = randomise(RMSNorm(size=24, bias=False))
    x = x.float()
    torch.testing.assert_close(rms(x), F.rms_norm(x, (24,), rms.weight, rms.eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norms_equal_transformers(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    pairs: list[tuple[type[RMSNorm], Callable[..., nn.Module]]] = [
        (QwenRMSNorm, LlamaRMSNorm),
        (QwenRMSNorm, Qwen3RMSNorm),
        (RMSNorm, Olmo2RMSNorm),
        (FusedRMSNorm, Olmo2RMSNorm),
        (CuTeRMSNorm, Olmo2RMSNorm),
    ]
    for ours_class, theirs_class in pairs:
        ours = randomise(ours_class(size=32, eps=1e-6, bias=False, dtype=dtype))
        theirs = theirs_class(32, eps=1e-6).to(dtype)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(7, 32, dtype=dtype, requires_grad=True)
        y, expected = ours(x), theirs(x)
        assert torch.equal(y, expected)
        dy = torch.randn_like(y)
        for a, b in zip(
            grads(y, dy, x, ours.weight),  # type: ignore[arg-type]
            grads(expected, dy, x, theirs.weight),  # type: ignore[arg-type]
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_qwen_rounds_before_the_weight() -> None:
    """The one difference between the two orders, which checkpoints depend on."""
    x = torch.randn(64, 32).bfloat16()
    weight = torch.randn(32)
    rms, qwen = RMSNorm(size=32, bias=False), QwenRMSNorm(size=32, bias=False)
    for norm in (rms, qwen):
        norm.load_state_dict({"weight": weight})
    normalised = RMSNorm(size=32, elementwise_affine=False)(x)
    assert torch.equal(qwen(x), (normalised.float() * weight).bfloat16())
    assert not torch.equal(qwen(x), rms(x))


@pytest.mark.parametrize("name", [t for t in LayerNormType if t != LayerNormType.l2_norm])
def test_full_precision_is_more_precise(name: LayerNormType) -> None:
    x = torch.randn(64, 128).bfloat16() * 3
    errors = []
    for full_precision in (True, False):
        norm = LayerNormConfig(name=name, full_precision=full_precision).build(128)
        errors.append((norm(x).double() - reference(norm, x)).abs().mean().item())
    if name == LayerNormType.default:  # torch's kernel accumulates in float32 either way
        assert errors[0] <= errors[1]
    else:
        assert errors[0] < errors[1]


@pytest.mark.parametrize("name", LayerNormType)
@pytest.mark.parametrize("full_precision", [True, False])
def test_autocast_keeps_the_input_dtype(name: LayerNormType, full_precision: bool) -> None:
    norm = LayerNormConfig(name=name, full_precision=full_precision).build(16)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(3, 16, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y = norm(x)
        assert y.dtype == dtype
        if full_precision:
            assert torch.equal(y, norm(x))


@given(
    name=st.sampled_from(LayerNormType),
    size=st.integers(1, 64),
    affine=st.sampled_from([None, True, False]),
    bias=st.sampled_from([None, True, False]),
)
def test_num_params_is_exact(
    name: LayerNormType, size: int, affine: bool | None, bias: bool | None
) -> None:
    config = LayerNormConfig(name=name, elementwise_affine=affine, bias=bias)
    try:
        norm = config.build(size)
    except OLMoConfigurationError:
        with pytest.raises(OLMoConfigurationError):
            config.num_params(size)
        return
    assert type(norm) is CLASSES[name]
    if name == LayerNormType.l2_norm or affine is False:
        expected = 0
    else:
        expected = size if bias is False else 2 * size
    assert config.num_params(size) == expected == sum(p.numel() for p in norm.parameters())


def test_none_means_the_default_of_the_class() -> None:
    norm = LayerNormConfig().build(8)
    assert (norm.eps, norm.full_precision) == (1e-5, True)
    assert norm.weight is not None
    assert norm.weight.dtype == torch.float32
    assert norm.bias is not None
    assert set(RMSNorm(size=8).state_dict()) == {"weight", "bias"}
    assert "eps=1e-05" in repr(norm)


@pytest.mark.parametrize("name", [t for t in LayerNormType if t != LayerNormType.l2_norm])
def test_meta_build_equals_cpu_build(name: LayerNormType) -> None:
    config = LayerNormConfig(name=name)
    norm = config.build(8, init_device="meta").to_empty(device="cpu")
    for parameter in norm.parameters():
        nn.init.constant_(parameter, float("nan"))
    norm.reset_parameters()
    expected = config.build(8).state_dict()
    assert norm.state_dict().keys() == expected.keys()
    for key, value in norm.state_dict().items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize("name", LayerNormType)
def test_compiles_to_one_graph(name: LayerNormType) -> None:
    norm = randomise(LayerNormConfig(name=name).build(8))
    x = torch.randn(2, 8, requires_grad=True)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    dy = torch.randn(2, 8)
    torch.testing.assert_close(compiled(x), norm(x))
    torch.testing.assert_close(grads(compiled(x), dy, x), grads(norm(x), dy, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_l2_normalize_never_gives_nan(dtype: torch.dtype) -> None:
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    x = torch.tensor(
        [[0, 0], [tiny, tiny], [huge, huge], [1, -1], [-0.0, 0]], dtype=dtype, requires_grad=True
    )
    for dim in (0, 1):
        y = l2_normalize(x, dim=dim)
        assert y.dtype == dtype
        assert y.isfinite().all()
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.isfinite().all() or dtype != torch.float16
        assert not gradient.isnan().any()
    y = l2_normalize(x)
    assert torch.equal(y[0], torch.zeros(2, dtype=dtype))
    torch.testing.assert_close(y[3], torch.tensor([0.5**0.5, -(0.5**0.5)], dtype=dtype))


def test_l2_normalize_gradients() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: l2_normalize(t, dim=0), (x,))
    assert torch.autograd.gradgradcheck(l2_normalize, (x,))
    torch.testing.assert_close(l2_normalize(x), F.normalize(x, dim=-1))
    zero = torch.zeros(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(l2_normalize(zero).sum(), zero)
    assert torch.equal(gradient, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "l2_norm", "bias": True}, "l2_norm has neither"),
        ({"name": "l2_norm", "elementwise_affine": True}, "l2_norm has neither"),
        ({"name": "l2_norm", "eps": 1e-5}, "l2_norm has neither"),
        ({"name": "rms", "bias": True, "elementwise_affine": False}, "drop one of the two"),
        ({"name": "rms", "eps": -1e-5}, "eps must not be negative"),
        ({"name": "rms", "eps": float("nan")}, "eps must not be negative"),
        ({"name": "layer"}, "LayerNormConfig.name: expected LayerNormType"),
        ({"dtype": "int8"}, "LayerNormConfig.dtype: expected DType"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OLMoConfigurationError, match=message):
        LayerNormConfig(**options).build(8)


def test_bad_sizes_and_inputs() -> None:
    with pytest.raises(OLMoConfigurationError, match="size must be at least 1, got 0"):
        LayerNormConfig().build(0)
    with pytest.raises(OLMoConfigurationError, match="must be floating-point"):
        LayerNorm(size=4, dtype=torch.int32)
    for name in LayerNormType:
        norm = LayerNormConfig(name=name).build(4)
        with pytest.raises(ValueError, match=r"last dimension of 4, got .*\(2, 3\)"):
            norm(torch.randn(2, 3))
        with pytest.raises(TypeError, match=r"floating-point inputs, got torch\.int64"):
            norm(torch.ones(2, 4, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # QuACK's own, at import
@pytest.mark.parametrize("name", RMS_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_kernels_equal_the_plain_path(name: LayerNormType, dtype: torch.dtype, bias: bool) -> None:
    config = LayerNormConfig(name=name, bias=bias, dtype=DType.from_pt(dtype))
    norm = randomise(config.build(256, init_device="cuda"))
    x = torch.randn(64, 256, device="cuda", dtype=dtype, requires_grad=True)
    y, expected = norm(x), reference(norm, x)
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=bound, atol=4 * bound)
    dy = torch.randn(y.shape, device="cuda")
    inputs = (x, *norm.parameters())
    for a, b in zip(grads(y, dy, *inputs), grads(expected, dy, *inputs), strict=True):
        scale = b.abs().max().item() + 1
        torch.testing.assert_close(a, b, rtol=0, atol=16 * scale * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["rms", "qwen_rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_op_takes_the_same_steps(name: str, dtype: torch.dtype) -> None:
    layer = LayerNormConfig(name=name, bias=False, dtype=DType.from_pt(dtype)).build(24)  # type: ignore[arg-type]
    assert isinstance(layer, RMSNorm) and layer.weight is not None
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
    x = torch.randn(5, 24, dtype=dtype, requires_grad=True)
    assert layer._is_one_op(x)
    got = layer(x)
    want = layer._normalize(x) * layer.weight
    assert torch.equal(got, want)
    inputs = [x, layer.weight]
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), inputs),
        torch.autograd.grad(want.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)
    for other in (x.bfloat16(), x.double() if dtype == torch.float32 else x.float()):
        assert not layer._is_one_op(other)
