"""The gated delta net as a layer: mathematics, documents, parameters, dtypes, compilation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from olmo_core.config import DType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention.base import SequenceMixerConfig
from olmo_core.nn.attention.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from olmo_core.nn.attention.kernels.gated_delta_rule import rules
from olmo_core.nn.attention.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from olmo_core.nn.init import InitMethod

D_MODEL = 24


def build(dtype: torch.dtype = torch.float64, **options: object) -> GatedDeltaNet:
    options = {"n_heads": 2, "n_v_heads": 4, "head_dim": 8, **options}
    layer = GatedDeltaNet(d_model=D_MODEL, dtype=dtype, **options)
    with torch.no_grad():
        layer.A_log.sub_(2)  # decays near 1: the past matters
        layer.o_norm.weight.uniform_(0.5, 1.5)
        for name, parameter in layer.named_parameters():
            if name.endswith("bias") and name != "dt_bias":
                parameter.uniform_(-1, 1)
    return layer


def reference(layer: GatedDeltaNet, x: Tensor) -> Tensor:
    """The layer's definition for rows of one document each, by torch's own functions."""
    past = layer.conv_size - 1

    def mixed(linear: torch.nn.Linear, conv: torch.nn.Module, heads: int) -> Tensor:
        y = F.pad(linear(x).transpose(1, 2), (past, 0))
        y = F.conv1d(y, conv.weight, conv.bias, groups=y.shape[1])
        return F.silu(y).transpose(1, 2).unflatten(-1, (heads, -1))

    q = mixed(layer.w_q, layer.q_conv1d, layer.n_heads)
    k = mixed(layer.w_k, layer.k_conv1d, layer.n_heads)
    v = mixed(layer.w_v, layer.v_conv1d, layer.n_v_heads)
    beta = torch.sigmoid(layer.w_b(x)) * (2 if layer.allow_neg_eigval else 1)
    g = -layer.A_log.exp() * F.softplus(layer.w_a(x) + layer.dt_bias)
    o, _ = gated_delta_rule_reference(q, k, v, g, beta, normalize_qk=True)
    eps = layer.o_norm.eps
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps) * layer.o_norm.weight
    gate = F.silu(layer.w_g(x)).unflatten(-1, (layer.n_v_heads, -1))
    return layer.w_out((o * gate).flatten(2))


def outputs(fn: Callable[[Tensor], Tensor], x: Tensor, layer: GatedDeltaNet) -> dict[str, Tensor]:
    """The output and the gradients of the input and of every parameter, by a fixed cotangent."""
    x = x.detach().requires_grad_()
    y = fn(x)
    parameters = dict(layer.named_parameters())
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad(y, [x, *parameters.values()], cotangent)
    return dict(zip(["y", "x", *parameters], (y.detach(), *grads), strict=True))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    errors = {
        n: ((got[n].double() - w.double()).norm() / w.double().norm()).item()
        for n, w in want.items()
    }
    wrong = {n: e for n, e in errors.items() if not e <= bound}
    assert not wrong, f"relative errors above {bound}: {wrong}"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_v_heads": None, "expand_v": 1.5, "allow_neg_eigval": False},
        {"conv_bias": True, "conv_size": 3, "norm_eps": 1e-2},
        {"conv_size": 1, "expand_v": 0.5},
        {"head_dim": None, "n_heads": 3, "n_v_heads": 9},
    ],
)
def test_equals_its_definition(options: dict[str, object]) -> None:
    layer = build(**options)
    x = torch.randn(2, 70, D_MODEL, dtype=torch.float64)
    want = outputs(lambda x: reference(layer, x), x, layer)
    assert_same(outputs(layer, x, layer), want, 1e-12)


@pytest.mark.parametrize("ends", [[0, 1, 2, 5, 5, 40, 41, 84], [0, 84], [0, 21, 42, 63, 84]])
def test_packed_equals_separate(ends: list[int]) -> None:
    layer = build()
    x = torch.randn(2, 42, D_MODEL, dtype=torch.float64)
    cu = torch.tensor(ends, dtype=torch.int32)

    def separate(x: Tensor) -> Tensor:
        lengths = (cu[1:] - cu[:-1]).tolist()
        pieces = x.reshape(1, 84, D_MODEL).split(lengths, 1)
        return torch.cat([layer(p) for p in pieces if p.shape[1]], 1).view(x.shape)

    want = outputs(separate, x, layer)
    assert_same(outputs(lambda x: layer(x, cu), x, layer), want, 1e-12)


def test_nothing_leaks_between_documents() -> None:
    layer = build()
    x = torch.randn(1, 50, D_MODEL, dtype=torch.float64)
    cu = torch.tensor([0, 20, 50], dtype=torch.int32)
    other = x.clone()
    other[:, :20] = 7 * torch.randn_like(other[:, :20])
    want, got = layer(x, cu)[:, 20:], layer(other, cu)[:, 20:]
    # Not to the bit: a chunk's decays are differences of sums that began before the document.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_left_padding_equals_no_padding() -> None:
    layer = build(conv_bias=True)
    x = torch.randn(3, 30, D_MODEL, dtype=torch.float64)
    leftpad = torch.tensor([0, 7, 30], dtype=torch.int32)
    y = layer(x, cache_leftpad=leftpad)
    for row, pad in enumerate(leftpad.tolist()):
        assert not y[row, :pad].any()
        if pad < 30:
            want = layer(x[row : row + 1, pad:])[0]
            torch.testing.assert_close(y[row, pad:], want, rtol=0, atol=1e-13)
    poisoned = x.masked_fill((torch.arange(30) < leftpad[:, None])[..., None], math.nan)
    assert torch.equal(layer(poisoned, cache_leftpad=leftpad), y)


def test_keywords_of_attention_layers_have_no_effect() -> None:
    layer = build()
    x = torch.randn(1, 9, D_MODEL, dtype=torch.float64)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    table = torch.zeros(9, 8)
    got = layer(
        x,
        cu_doc_lens=cu,
        max_doc_len=5,
        max_doc_len_q=None,
        max_doc_len_k=3,
        pos_sin=table,
        pos_cos=table,
        freqs_cis=table,
        local_k_slice=None,
        global_cu_doc_lens=None,
        cache_leftpad=None,
    )
    assert torch.equal(got, layer(x, cu))


@pytest.mark.parametrize("documents", [False, True])
def test_compiles_whole_and_once(documents: bool) -> None:
    layer = build()
    x = torch.randn(1, 64, D_MODEL, dtype=torch.float64)
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, example)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for ends in ([0, 20, 64, 64], [0, 1, 2, 64], [0, 64, 64, 64]):
        cu = torch.tensor(ends, dtype=torch.int32) if documents else None
        want = outputs(lambda x, cu=cu: layer(x, cu), x, layer)
        assert_same(outputs(lambda x, cu=cu: compiled(x, cu), x, layer), want, 1e-12)
    assert len(graphs) == 1


@pytest.mark.slow
def test_inductor_equals_eager() -> None:
    layer = build(torch.float32)
    x = torch.randn(2, 40, D_MODEL)
    compiled = torch.compile(layer, fullgraph=True)
    assert_same(outputs(compiled, x, layer), outputs(layer, x, layer), 1e-5)


def test_activation_checkpointing_changes_nothing() -> None:
    layer = build()
    x = torch.randn(2, 30, D_MODEL, dtype=torch.float64)
    cu = torch.tensor([0, 11, 60], dtype=torch.int32)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(layer, x, cu, use_reentrant=False)

    assert_same(outputs(checkpointed, x, layer), outputs(lambda x: layer(x, cu), x, layer), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    exact = build(torch.float64)
    layer = build(dtype)
    layer.load_state_dict(exact.state_dict())
    exact.load_state_dict({n: p.double() for n, p in layer.state_dict().items()})
    assert layer.A_log.dtype == layer.dt_bias.dtype == layer.o_norm.weight.dtype == torch.float32
    assert layer.q_conv1d.weight.dtype == dtype
    x = torch.randn(2, 50, D_MODEL).to(dtype)
    want = outputs(exact, x.double(), exact)
    # The dozen roundings on the way, each of eps / 2 at most: measured 2 eps on outputs.
    assert_same(outputs(layer, x, layer), want, 8 * torch.finfo(dtype).eps)


def test_autocast() -> None:
    layer = build(torch.float32)
    x = torch.randn(2, 50, D_MODEL)
    want = outputs(layer, x, layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    assert_same(outputs(cast, x, layer), want, 8 * torch.finfo(torch.bfloat16).eps)


def test_float64_stays_float64() -> None:
    layer = build(torch.float64)
    assert all(p.dtype == torch.float64 for p in layer.parameters())


NAMES = {
    "w_q.weight": (16, D_MODEL),
    "w_k.weight": (16, D_MODEL),
    "w_v.weight": (64, D_MODEL),
    "w_a.weight": (4, D_MODEL),
    "w_b.weight": (4, D_MODEL),
    "w_g.weight": (64, D_MODEL),
    "w_out.weight": (D_MODEL, 64),
    "A_log": (4,),
    "dt_bias": (4,),
    "q_conv1d.weight": (16, 1, 4),
    "k_conv1d.weight": (16, 1, 4),
    "v_conv1d.weight": (64, 1, 4),
    "o_norm.weight": (16,),
}


def test_state_dict_names_and_shapes() -> None:
    layer = build()
    layer.init_kv_cache_manager(1, 8, max_rollback=2)
    assert {n: tuple(p.shape) for n, p in layer.state_dict().items()} == NAMES


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_v_heads": 8, "expand_v": 1.0, "conv_bias": True},
        {"head_dim": 5, "conv_size": 2, "allow_neg_eigval": False, "dtype": "bfloat16"},
    ],
)
def test_config(options: dict[str, object]) -> None:
    config = GatedDeltaNetConfig(n_heads=4, **options)
    layer = config.build(32, layer_idx=0, n_layers=2)
    assert config.num_params(32) == sum(p.numel() for p in layer.parameters())
    assert layer.w_q.weight.dtype == DType(config.dtype).as_pt()
    data = config.as_config_dict()
    assert data["type"] == "gated_delta_net"
    assert SequenceMixerConfig.from_dict(data) == config


def test_flops_are_those_of_the_definition() -> None:
    """Forward operations by hand for sizes where each is a different number; times 3."""
    layer = build(n_heads=2, n_v_heads=4, head_dim=8, expand_v=2.0, conv_size=4)
    projections = 2 * D_MODEL * (16 + 16 + 64 + 4 + 4 + 64 + 64)
    convolutions = 2 * 4 * (16 + 16 + 64)
    recurrence = 3 * 2 * 4 * 8 * 16
    norm = 6 * 64
    assert layer.num_flops_per_token(128) == 3 * (projections + convolutions + recurrence + norm)
    assert layer.num_flops_per_token(8192) == layer.num_flops_per_token(128)


def test_meta_build_equals_cpu_build() -> None:
    options = {"init_method": InitMethod.llama_depth, "block_idx": 1, "num_blocks": 4}
    layers = []
    for device in ("cpu", "meta"):
        layer = GatedDeltaNet(d_model=D_MODEL, n_heads=2, conv_bias=True, init_device=device)
        layer = layer.to_empty(device="cpu") if device == "meta" else layer
        generator = torch.Generator().manual_seed(5)
        layer.init_weights(d_model=D_MODEL, generator=generator, **options)
        layers.append(layer.state_dict())
    assert layers[0].keys() == layers[1].keys()
    assert all(torch.equal(layers[0][n], layers[1][n]) for n in layers[0])


def test_weights_start_where_they_should() -> None:
    layer = GatedDeltaNet(d_model=64, n_heads=64, head_dim=4, expand_v=1.0)
    for _ in range(2):  # the constructor's start, then init_weights'
        decay = layer.A_log.exp()
        assert decay.min() >= 0.01 and 8 < decay.max() <= 16
        dt = F.softplus(layer.dt_bias)
        assert 0.999e-3 <= dt.min() < 5e-3 and 3e-2 < dt.max() <= 0.1001
        assert torch.equal(layer.o_norm.weight, torch.ones(4))
        assert 0.4 < layer.q_conv1d.weight.abs().max() <= 0.5
        layer.init_weights(
            init_method=InitMethod.llama, d_model=64, block_idx=0, num_blocks=8, std=0.02
        )
    assert abs(layer.w_q.weight.std() / 0.02 - 1) < 0.1
    assert abs(layer.w_out.weight.std() / (0.02 / 4) - 1) < 0.1


def test_parallelism_that_is_refused() -> None:
    layer = build()
    with pytest.raises(ValueError, match="needs a style"):
        layer.apply_cp(None)
    with pytest.raises(TypeError, match="must be a DeviceMesh, got NoneType"):
        layer.apply_cp(None, uly=object())
    with pytest.raises(TypeError, match="tp_mesh must be a DeviceMesh"):
        layer.apply_tp(None)


def test_the_choice_of_the_rule_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(torch.bfloat16)
    q = torch.zeros(1, 2, 2, 8, dtype=torch.bfloat16)
    v = torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16)
    assert layer.choose_rule(q, v).name == "torch"
    assert "not on cpu" in str(layer.choose_rule(q, v))
    monkeypatch.setattr(rules, "unsupported", lambda q, v: None)
    assert layer.choose_rule(q, v).name == "triton"
    assert layer.choose_rule(q, v).run is rules.gated_delta_rule
    monkeypatch.setattr(rules, "unsupported", lambda q, v: "no kernels")
    monkeypatch.setattr(rules, "fla_usable", lambda device, group: (group == 2, "not here"))
    choice = layer.choose_rule(q, v)
    assert choice.name == "fla" and "not triton, since no kernels" in str(choice)
    assert "half precision, not torch.float32" in str(layer.choose_rule(q.float(), v.float()))
    assert "not fla, since not here" in str(layer.choose_rule(q, v[:, :, :2]))
    flash_qla, triton, fla, plain = rules.RULES
    fla = dataclasses.replace(fla, run=lambda *_, **__: (_[2] * 0, None))
    monkeypatch.setattr(rules, "RULES", (flash_qla, triton, fla, plain))
    assert not layer(torch.randn(1, 5, D_MODEL).bfloat16()).any()


BAD_OPTIONS: dict[str, tuple[dict[str, object], str]] = {
    "no heads": ({"n_heads": 0}, "n_heads must be a positive int"),
    "half a head": ({"n_heads": 2.5}, "n_heads must be a positive int"),
    "no value heads": ({"n_v_heads": 0}, "n_v_heads must be a positive int"),
    "fewer value heads": ({"n_v_heads": 1}, "multiple of n_heads"),
    "uneven value heads": ({"n_v_heads": 3}, "multiple of n_heads"),
    "no head_dim": ({"head_dim": 0}, "head_dim must be a positive int"),
    "uneven width": ({"n_heads": 5, "n_v_heads": None, "head_dim": None}, "multiple of n_heads"),
    "half a value": ({"expand_v": 1.3}, "positive whole number"),
    "negative expansion": ({"expand_v": -1.0}, "positive whole number"),
    "no convolution": ({"conv_size": 0}, "kernel_size must be a positive int"),
    "no epsilon": ({"norm_eps": 0.0}, "norm_eps must be positive"),
    "integers": ({"dtype": torch.int32}, "floating dtype"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_refused(case: str) -> None:
    options, message = BAD_OPTIONS[case]
    options = {"n_heads": 2, "n_v_heads": 4, "head_dim": 8, **options}
    with pytest.raises(OLMoConfigurationError, match=message):
        GatedDeltaNet(d_model=D_MODEL, **options)


X = torch.zeros(2, 6, D_MODEL)
CU = torch.tensor([0, 5, 12], dtype=torch.int32)
PAD = torch.tensor([0, 2], dtype=torch.int32)
BAD_CALLS: dict[str, tuple[tuple[object, ...], dict[str, object], type[Exception], str]] = {
    "no tensor": ((1,), {}, TypeError, "floating tensor"),
    "integers": ((X.long(),), {}, TypeError, "floating tensor"),
    "two dimensions": ((X[0],), {}, ValueError, "input of shape"),
    "another width": ((X[..., :8],), {}, ValueError, "input of shape"),
    "no tokens": ((X[:, :0],), {}, ValueError, "no tokens"),
    "another dtype": ((X.double(),), {}, TypeError, "the layer"),
    "another device": ((X.to("meta"),), {}, ValueError, "input is on meta"),
    "lengths as a list": ((X, [0, 12]), {}, TypeError, "int32 tensor"),
    "lengths as int64": ((X, CU.long()), {}, TypeError, "int32"),
    "lengths of two dimensions": ((X, CU[None]), {}, ValueError, "1-D"),
    "lengths from 1": ((X, CU + 1), {}, ValueError, "start at 0"),
    "lengths that end early": ((X, CU[:2]), {}, ValueError, "must end at"),
    "lengths past the end": ((X, 2 * CU), {}, ValueError, "must end at"),
    "decreasing lengths": ((X, CU[[0, 2, 1, 2]]), {}, ValueError, "not decrease"),
    "lengths elsewhere": ((X, CU.to("meta")), {}, ValueError, "cu_doc_lens must be on"),
    "padding as a list": ((X,), {"cache_leftpad": [0, 2]}, TypeError, "int32 tensor"),
    "padding as int64": ((X,), {"cache_leftpad": PAD.long()}, TypeError, "int32"),
    "padding of one row": ((X,), {"cache_leftpad": PAD[:1]}, ValueError, "must have shape"),
    "negative padding": ((X,), {"cache_leftpad": -PAD}, ValueError, r"must be in \[0, 6\]"),
    "too much padding": ((X,), {"cache_leftpad": 4 * PAD}, ValueError, r"must be in \[0, 6\]"),
    "padding elsewhere": (
        (X,),
        {"cache_leftpad": PAD.to("meta")},
        ValueError,
        "cache_leftpad must be on",
    ),
    "documents and padding": ((X, CU), {"cache_leftpad": PAD}, ValueError, "both given"),
    "a shard's queries": ((X,), {"cu_doc_lens_q": CU}, ValueError, "context-parallel shard"),
    "a shard's keys": ((X,), {"cu_doc_lens_k": CU}, ValueError, "context-parallel shard"),
    "a shard's slice": ((X,), {"local_k_slice": slice(3)}, ValueError, "context-parallel shard"),
    "global lengths": ((X,), {"global_cu_doc_lens": CU}, ValueError, "context-parallel shard"),
    "a misspelled keyword": ((X,), {"cu_doc_len": CU}, TypeError, "Did you mean 'cu_doc_lens'"),
    "an unknown keyword": ((X,), {"mask": None}, TypeError, "unexpected keyword argument 'mask'"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused_before_anything_is_computed(case: str) -> None:
    layer = build(torch.float32)
    ran = []
    for module in layer.children():
        module.register_forward_pre_hook(lambda m, _: ran.append(m))
    args, kwargs, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        layer(*args, **kwargs)
    assert not ran
