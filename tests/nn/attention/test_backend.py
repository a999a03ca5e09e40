"""Backends, the table that they answer from, and the choice, on machines that are values."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nn.attention.reference import relative
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import (
    Attention,
    AttentionBackendName,
    FusedAttention,
    NormalizedAttention,
    TorchAttentionBackend,
    selection,
)
from olmo_core.nn.attention.attend import attend
from olmo_core.nn.attention.backend import BACKENDS, AutoAttentionBackend
from olmo_core.nn.attention.capabilities import (
    CAPABILITIES,
    Environment,
    Request,
    feature_reasons,
    installation_reasons,
    refusals,
)
from olmo_core.nn.attention.kernels.softmax import Feature, torch_sdpa
from olmo_core.nn.attention.parallel.context import ContextParallel
from olmo_core.nn.attention.ring import (
    RingAttentionLoadBalancerType,
    RingContextParallelStyle,
)
from olmo_core.nn.attention.segments import Segments

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
CU = torch.tensor([0, 2, 6], dtype=torch.int32)

ALL = frozenset(p for c in CAPABILITIES.values() for p in c.packages)
H100, A100, B200 = (Environment("cuda", cc, ALL) for cc in ((9, 0), (8, 0), (10, 0)))
BF16 = Request(torch.bfloat16, 128)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")


def test_every_name_has_a_class_and_a_row() -> None:
    assert set(BACKENDS) == set(CAPABILITIES) == {str(name) for name in AttentionBackendName}
    for name in AttentionBackendName:
        assert name.get_class().name == name
        assert all(reason for reason in CAPABILITIES[name].missing.values())


def test_installation_reasons_name_cause_and_command() -> None:
    on_laptop = installation_reasons(CAPABILITIES["flash_3"], Environment())
    assert len(on_laptop) == 2 and "9.0" in on_laptop[0] and "hopper/" in on_laptop[1]
    bare_h100 = Environment("cuda", (9, 0))
    assert installation_reasons(CAPABILITIES["flash_3"], bare_h100) == on_laptop[1:]
    assert "this one has 8.0" in installation_reasons(CAPABILITIES["te"], A100)[0]
    assert "8.0" not in " ".join(installation_reasons(CAPABILITIES["flash_2"], A100))
    assert installation_reasons(CAPABILITIES["flash_3"], B200)
    assert all(not installation_reasons(c, H100) for c in CAPABILITIES.values())


def test_a_refusal_lists_every_reason() -> None:
    request = Request(torch.float32, 999, frozenset({Feature.dropout}))
    reasons = "\n".join(refusals(CAPABILITIES["flash_4"], Environment(), request))
    for part in ("9.0", "not installed", "dropout", "float32", "999", "multiple of"):
        assert part in reasons
    assert not refusals(CAPABILITIES["torch"], Environment(), Request(torch.float64, 3))


@pytest.mark.parametrize(
    ("env", "request_", "name"),
    [
        (Environment(), Request(torch.float32, 64), "torch"),
        (Environment("mps"), Request(torch.float16, 64), "torch"),
        (H100, BF16, "flash_4"),
        (H100, Request(torch.bfloat16, 128, frozenset({Feature.window})), "flash_4"),
        (Environment("cuda", (9, 0)), BF16, "torch"),
        (Environment("cuda", (9, 0), frozenset({"transformer_engine"})), BF16, "te"),
        (H100, Request(torch.float32, 128), "torch"),
        (H100, Request(torch.bfloat16, 100), "torch"),
        (H100, Request(torch.bfloat16, 128, frozenset({Feature.dropout})), "torch"),
        (A100, BF16, "flash_2"),
        (B200, BF16, "flash_4"),
    ],
)
def test_choice(env: Environment, request_: Request, name: str) -> None:
    choice = selection.choose(env, request_)
    assert choice.name == name and choice.reason
    assert set(choice.refused) == {n for n, c in CAPABILITIES.items() if refusals(c, env, request_)}


def test_choice_passes_over_a_backend_that_fails_its_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        selection, "probe", lambda name, *_: ("broken" if name == "flash_4" else None, True)
    )
    choice = selection.choose(H100, BF16, torch.device("cuda", 0))
    assert choice.name == "te" and choice.refused["flash_4"] == ["broken"] and choice.lasting


def test_probe_reports_instead_of_raising() -> None:
    probe = selection.probe
    good = (None, True)
    assert probe("torch", CPU, torch.float32, 8, {Feature.window, Feature.documents}) == good
    assert probe("torch", CPU, torch.bfloat16, 16) == good
    why, lasting = probe("no_such_kernel", CPU, torch.float32, 8)
    assert why is not None and "its probe failed" in why and lasting


@pytest.mark.parametrize("spoiled", [0, 1, 2, 3])
def test_a_probe_passes_no_nan(spoiled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the output nor in any gradient, whatever the others are."""

    def right_but_for_one(q: Tensor, k: Tensor, v: Tensor, s: Segments, **options: Any) -> Tensor:
        inputs = [q, k, v]
        for i in range(3):
            if i + 1 == spoiled:
                inputs[i] = inputs[i].clone()
                inputs[i].register_hook(lambda grad: grad * math.nan)
        out = attend(*inputs, s, **options)
        return out * math.nan if spoiled == 0 else out

    monkeypatch.setattr(selection, "attend", right_but_for_one)
    monkeypatch.setattr(selection, "_PROBES", {})
    why, _ = selection.probe("torch", CPU, torch.float32, 8)
    assert why is not None and "nan" in why


def test_a_choice_made_without_memory_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed for want of memory may work later: neither probe nor choice remembers it."""
    full = True

    def measure(name: str, *_: Any) -> float:
        if full and name == "flash_4":
            raise torch.OutOfMemoryError("none left")
        return 0.0

    monkeypatch.setattr(selection, "_measure", measure)
    monkeypatch.setattr(selection, "_PROBES", {})
    monkeypatch.setattr(selection, "_CHOSEN", {})
    monkeypatch.setattr(Environment, "detect", classmethod(lambda cls, device=None: H100))
    asked = (None, torch.device("cuda", 0), torch.bfloat16, 128, (), True)
    assert selection.kernel_for(*asked) == "te"
    full = False
    assert selection.kernel_for(*asked) == "flash_4"
    full = True
    assert selection.kernel_for(*asked) == "flash_4"


def test_two_gpus_of_one_machine_have_a_choice_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_measure", lambda *_: 0.0)
    monkeypatch.setattr(selection, "_PROBES", {})
    monkeypatch.setattr(selection, "_CHOSEN", {})

    def detect(cls: type, device: torch.device) -> Environment:
        return H100 if device.index == 0 else A100

    monkeypatch.setattr(Environment, "detect", classmethod(detect))
    chosen = [
        selection.kernel_for(None, torch.device("cuda", n), torch.bfloat16, 128, (), True)
        for n in (0, 1)
    ]
    assert chosen == ["flash_4", "flash_2"]


def test_times_are_those_of_one_run() -> None:
    run = json.loads((ROOT / "benchmarks/results/kernels_gpu.json").read_text())
    for name, row in CAPABILITIES.items():
        for case, ms in row.measured.get((9, 0), {}).items():
            assert ms == run[f"{name} {case} 2 x 8192"]["graph_fb_ms"], (name, case)


CALLS: dict[Feature, Any] = {
    Feature.window: lambda build: build(window_size=2)(torch.randn(1, 6, 16)),
    Feature.documents: lambda build: build()(torch.randn(1, 6, 16), cu_doc_lens=CU),
    Feature.left_padding: lambda build: build()(torch.randn(1, 6, 16), cache_leftpad=CU[1:2]),
    Feature.packed_qkv: lambda build: FusedAttention(d_model=16, n_heads=2, backend="torch")(
        torch.randn(1, 6, 16)
    ),
    Feature.dropout: lambda build: build(dropout=0.5)(torch.randn(1, 6, 16)),
    Feature.backward: lambda build: build()(torch.randn(1, 6, 16)),
    Feature.kv_cache: lambda build: build().init_kv_cache_manager(1, 8),
}


@pytest.mark.parametrize("feature", [*CALLS, Feature.deterministic])
@pytest.mark.parametrize("backend", ["torch", None])
def test_what_a_row_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, feature: Feature, backend: str | None
) -> None:
    row = replace(CAPABILITIES["torch"], missing={feature: "the test took it"})
    monkeypatch.setattr(torch_sdpa, "CAPABILITIES", row)
    monkeypatch.setattr(selection, "_CHOSEN", {})
    if feature == Feature.packed_qkv and backend is None:
        backend = "torch"

    def build(**options: Any) -> Attention:
        return Attention(d_model=16, n_heads=2, backend=backend, **options)

    ask = CALLS.get(feature, CALLS[Feature.backward])
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(feature == Feature.deterministic)
    try:
        with pytest.raises(RuntimeError, match=f"no {feature}: the test took it"):
            ask(build)
        if feature in (Feature.backward, Feature.deterministic):
            with torch.no_grad():
                torch.use_deterministic_algorithms(False)
                ask(build)
    finally:
        torch.use_deterministic_algorithms(deterministic)


def test_features_are_answered_from_the_table() -> None:
    for name, cls in BACKENDS.items():
        for feature, check in (
            (Feature.window, cls.assert_supports_swa),
            (Feature.packed_qkv, cls.assert_supports_packed_qkv),
            (Feature.kv_cache, cls.assert_supports_kv_cache),
            (Feature.ring_cp, cls.assert_supports_ring_cp),
            (Feature.ulysses_cp, cls.assert_supports_ulysses_cp),
        ):
            reasons = feature_reasons(CAPABILITIES[name], [feature])
            if reasons:
                with pytest.raises(RuntimeError, match=str(feature)):
                    check()
            else:
                check()


@no_gpu
def test_a_backend_built_directly_raises_without_its_gpu() -> None:
    for name in ("flash_2", "flash_3", "flash_4", "te"):
        with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
            AttentionBackendName(name).build(head_dim=8, n_heads=2)
        with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
            AttentionBackendName(name).assert_supported()
    AttentionBackendName.torch.assert_supported()


@no_gpu
def test_a_layer_falls_back_with_a_warning_when_it_resolves() -> None:
    selection._CHOSEN.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = Attention(d_model=16, n_heads=2, backend="flash_3")
    assert type(layer.backend) is BACKENDS["flash_3"]
    x = torch.randn(1, 4, 16)
    with pytest.warns(UserWarning, match="Falling back to the torch backend"):
        out = layer(x)
    plain = Attention(d_model=16, n_heads=2, backend="torch")
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(out, plain(x))


def test_the_default_resolves_at_the_first_call() -> None:
    layer = Attention(d_model=16, n_heads=2, init_device="meta")
    assert type(layer.backend) is AutoAttentionBackend
    layer.backend.assert_supports_swa()


def test_use_flash_is_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match="flash_2"):
        layer = Attention(d_model=16, n_heads=2, use_flash=True)
    assert layer.backend.name == "flash_2"
    assert Attention(d_model=16, n_heads=2, use_flash=False).backend.name is None
    with pytest.warns(DeprecationWarning), pytest.raises(OLMoConfigurationError, match="flash_2"):
        Attention(d_model=16, n_heads=2, use_flash=True, backend="torch")


def test_packed_qkv_equals_three_tensors() -> None:
    backend = TorchAttentionBackend(head_dim=4, n_heads=2, window_size=(2, 0))
    qkv = torch.randn(2, 7, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 3, 14], dtype=torch.int32)
    outs = [backend(x, cu_doc_lens=cu) for x in (qkv, qkv.unbind(2))]
    assert torch.equal(*outs)
    grads = [torch.autograd.grad(o.square().sum(), qkv)[0] for o in outs]
    assert torch.equal(*grads)


def test_query_and_key_lengths_that_differ() -> None:
    """A shard of two documents: its queries are the last ones of the keys that it needs."""
    backend = TorchAttentionBackend(head_dim=4, n_heads=2)
    q, k, v = (torch.randn(1, 12, 2, 4, dtype=torch.float64) for _ in range(3))
    cu = torch.tensor([0, 7, 12], dtype=torch.int32)
    whole = backend((q, k, v), cu_doc_lens=cu)
    shard = backend(
        (q[:, 5:10], k, v),
        cu_doc_lens_q=torch.tensor([0, 2, 5], dtype=torch.int32),
        cu_doc_lens_k=torch.tensor([0, 7, 10], dtype=torch.int32),
        max_doc_len_q=3, max_doc_len_k=7, local_k_slice=slice(0, 10),
    )  # fmt: skip
    assert relative(shard, whole[:, 5:10]) < 1e-14


def qkv(t: int = 6) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, t, 2, 4) for _ in range(3))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        ((torch.randn(1, 6, 2, 2, 4),), {}, ValueError, "Packed qkv"),
        ((torch.randn(1, 6, 2, 4),), {}, ValueError, "Packed qkv"),
        (((*qkv()[:2], torch.randn(1, 6, 3, 4)),), {}, ValueError, "v must have shape"),
        ((tuple(x[..., :3] for x in qkv()),), {}, ValueError, "q must have shape"),
        ((tuple(x[:, :0] for x in qkv()),), {}, ValueError, "empty"),
        ((qkv(),), {"max_doc_len": 6}, ValueError, "the lengths that it is about"),
        ((qkv(),), {"max_doc_len_q": 6}, ValueError, "the lengths that it is about"),
        ((qkv(),), {"local_k_slice": slice(0, 3)}, ValueError, "the lengths that it is about"),
        ((qkv(),), {"cu_doc_lens_q": CU}, ValueError, "required together"),
        ((qkv(),), {"cu_doc_lens": CU, "cu_doc_lens_q": CU}, ValueError, "not both"),
        ((qkv(),), {"cu_doc_lens_q": CU, "cu_doc_lens_k": CU[:2]}, ValueError, "each segment"),
        ((qkv(),), {"cu_doc_lens": CU, "max_doc_len": 3}, ValueError, "max_doc_len=3"),
        ((qkv(),), {"cu_doc_lens": CU.to("meta")}, ValueError, "input's device"),
        (((qkv(5)[0], *qkv()[1:]),), {"cu_doc_lens": CU}, ValueError, "must end at"),
    ],
)
def test_bad_calls(args: Any, kwargs: Any, error: type[Exception], match: str) -> None:
    backend = TorchAttentionBackend(head_dim=4, n_heads=2)
    with pytest.raises(error, match=match):
        backend(*args, **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"head_dim": 0, "n_heads": 2},
        {"head_dim": 4, "n_heads": 3, "n_kv_heads": 2},
        {"head_dim": 4, "n_heads": 2, "n_kv_heads": 0},
        {"head_dim": 4, "n_heads": 2, "dropout_p": 1.0},
        {"head_dim": 4, "n_heads": 2, "window_size": (3, 3)},
        {"head_dim": 4, "n_heads": 2, "window_size": (-2, 0)},
        {"head_dim": 4, "n_heads": 2, "window_size": (5, -1)},
    ],
)
def test_bad_options(kwargs: Any) -> None:
    with pytest.raises(OLMoConfigurationError, match="got"):
        TorchAttentionBackend(**kwargs)


def test_apply_cp_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """What works is tests/nn/attention/parallel."""
    backend = TorchAttentionBackend(head_dim=4, n_heads=2)
    with pytest.raises(ValueError, match="needs a style"):
        backend.apply_cp(None)
    with pytest.raises(TypeError, match="cp_mesh must be a DeviceMesh, got NoneType"):
        backend.apply_cp(None, ring=RingContextParallelStyle())
    row = CAPABILITIES["torch"]
    monkeypatch.setattr(type(backend), "_capabilities", lambda: replace(
        row, missing={Feature.ring_cp: "the test took it"}
    ))  # fmt: skip
    with pytest.raises(RuntimeError, match="no ring_cp: the test took it"):
        backend.check_cp(RING)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"needs torch\.distributed"):
        backend.apply_cp(None, ring=RingContextParallelStyle())


RING = ContextParallel(
    RingAttentionLoadBalancerType.zig_zag, "zig_zag", 1, 2, 0, "ring", 1, 0, "", "ring"
)


@pytest.mark.parametrize("cls", [Attention, FusedAttention, NormalizedAttention])
def test_options_set_after_build_are_the_backends(cls: type[Any]) -> None:
    """Dropout that could not be switched off, and a window that changed nothing."""

    def build(**options: Any) -> Any:
        torch.manual_seed(0)
        return cls(d_model=16, n_heads=2, **options)

    x = torch.randn(2, 9, 16)
    layer = build(window_size=4)
    for window in (2, None, 3, 100):
        layer.window_size = window
        assert layer.window_size == window and layer.backend.window == (window or -1)
        torch.testing.assert_close(layer(x), build(window_size=window)(x))
        flops = build(window_size=window).num_flops_per_token(50)
        assert layer.num_flops_per_token(50) == flops
    layer.backend.window_size = (1, 0)
    assert layer.window_size == 2
    layer.window_size = None
    layer.dropout_p = 0.5
    assert layer.backend.dropout_p == 0.5 and not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train().dropout_p = 0.0
    torch.testing.assert_close(layer(x), build()(x))
    layer.softmax_scale = 0.1
    q, k, v = torch.randn(3, 1, 4, 2, 8)
    other = TorchAttentionBackend(head_dim=8, n_heads=2, scale=0.1)
    torch.testing.assert_close(layer.backend((q, k, v)), other((q, k, v)))
    for name, wrong in (
        ("window_size", 0), ("window_size", 2.0), ("window_size", True), ("dropout_p", 1.0),
        ("dropout_p", -0.1), ("softmax_scale", 0.0), ("softmax_scale", math.nan),
    ):  # fmt: skip
        before = getattr(layer, name)
        with pytest.raises(OLMoConfigurationError, match=name):
            setattr(layer, name, wrong)
        assert getattr(layer, name) == before
    for wrong in ((3, 3), (-2, 0), 4):
        with pytest.raises(OLMoConfigurationError, match="window_size is"):
            layer.backend.window_size = wrong


def test_an_option_set_after_compilation_counts() -> None:
    layer = Attention(d_model=16, n_heads=2).eval()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 16)
    for window in (None, 2, 5):
        layer.window_size = window
        torch.testing.assert_close(compiled(x), layer(x))
