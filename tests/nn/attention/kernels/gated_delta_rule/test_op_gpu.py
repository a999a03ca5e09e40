"""The gated delta rule and its layer on a CUDA device, against float64 on the same device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from olmo_core.nn.attention.gated_delta_net import GatedDeltaNet
from olmo_core.nn.attention.kernels.gated_delta_rule import gated_delta_rule
from olmo_core.nn.attention.kernels.gated_delta_rule.reference import gated_delta_rule_reference

pytestmark = pytest.mark.gpu


def make(group: int) -> list[Tensor]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(2, 150, *shape, device="cuda", dtype=torch.float64)

    heads = 2 * group
    gates = [-0.3 * randn(heads).abs(), 2 * randn(heads).sigmoid()]
    return [randn(2, 32), randn(2, 32), randn(heads, 64), *gates]


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("documents", [False, True])
def test_outputs_and_gradients(
    dtype: torch.dtype, bound: float, group: int, documents: bool
) -> None:
    cu = torch.tensor([0, 1, 70, 220, 300], dtype=torch.int32, device="cuda")
    q, k, v, g, beta = make(group)
    gates = torch.float64 if dtype == torch.float64 else torch.float32
    low = [x.to(dtype) for x in (q, k, v)] + [x.to(gates) for x in (g, beta)]
    results = []
    for rule, inputs in (
        (gated_delta_rule, low),
        (gated_delta_rule_reference, [x.double() for x in low]),
    ):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, _ = rule(*leaves, normalize_qk=True, cu_doc_lens=cu if documents else None)
        cotangent = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out).to(out.dtype)
        results.append((out, *torch.autograd.grad(out, leaves, cotangent)))
    for got, want in zip(*results, strict=True):
        assert (got.double() - want).norm() <= bound * want.norm()


def test_decoding_replays_in_a_cuda_graph() -> None:
    layer = GatedDeltaNet(d_model=64, n_heads=2, head_dim=16, init_device="cuda")
    layer.requires_grad_(False)
    x = torch.randn(2, 12, 64, device="cuda")
    want = layer(x)
    layer.init_kv_cache_manager(2, 32, max_rollback=2)
    cache = layer.kv_cache_manager
    assert cache is not None
    token = x[:, :1].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(token)  # warms up cuBLAS outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    cache.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(token)
    outs = []
    for t in range(12):
        cache.reserve(1)
        token.copy_(x[:, t : t + 1])
        graph.replay()
        outs.append(out.clone())
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-4, atol=1e-5)
