"""Load balancers: shards of all ranks, put together by the layout's spans, are the padded input."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention.parallel.layout import token_index
from olmo_core.nn.attention.ring import (
    BalancedLoadBalancer,
    RingAttentionLlama3LoadBalancer,
    RingAttentionLoadBalancer,
    RingAttentionLoadBalancerType,
    RingAttentionZigZagLoadBalancer,
    RingContextParallelStyle,
    UlyssesContextParallelStyle,
    UlyssesLoadBalancer,
)

BALANCERS = [
    RingAttentionZigZagLoadBalancer,
    RingAttentionLlama3LoadBalancer,
    UlyssesLoadBalancer,
    BalancedLoadBalancer,
]
PAD = -1


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def padded_documents(x: list[int], cu: list[int], padded_cu: list[int]) -> list[int]:
    """Written without the library: each document of ``x`` followed by its padding."""
    out: list[int] = []
    cu = cu + [cu[-1]] * (len(padded_cu) - len(cu))
    for (a, b), (c, d) in zip(pairwise(cu), pairwise(padded_cu), strict=True):
        out += x[a:b] + [PAD] * ((d - c) - (b - a))
    return out


def shard_all(
    balancer: type[RingAttentionLoadBalancer], n: int, x: Tensor, cu: Tensor | None, **kwargs: Any
) -> list[tuple[Tensor, dict[str, Any]]]:
    out = []
    for rank in range(n):
        build = balancer(cp_rank=rank, cp_world_size=n)
        common = {"inputs": [x], "seq_dims": [1], "pad_values": [PAD], **kwargs}
        if cu is None:
            out.append((build.batch_shard(**common)[0], {}))
        else:
            shards, more = build.batch_shard_by_document(cu_doc_lens=cu, **common)
            out.append((shards[0], more))
    return out


documents = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(lambda ls: sum(ls) > 0)


@pytest.mark.parametrize("balancer", BALANCERS)
@given(lengths=documents, n=st.integers(1, 4), multiple=st.none() | st.integers(1, 9))
def test_shards_by_document_together_are_the_padded_input(
    balancer: type[RingAttentionLoadBalancer], lengths: list[int], n: int, multiple: int | None
) -> None:
    cu = cumulative(lengths)
    x = torch.arange(int(cu[-1]))[None]
    shards = shard_all(balancer, n, x, cu, length_multiple=multiple)

    global_cu = shards[0][1]["global_cu_doc_lens"].tolist()
    expected = padded_documents(x[0].tolist(), cu.tolist(), global_cu)
    whole = torch.full((global_cu[-1],), -7)
    for (local, more), spans in zip(shards, balancer.layout.spans(global_cu, n), strict=True):
        assert more["global_cu_doc_lens"].tolist() == global_cu
        assert local.shape == (1, global_cu[-1] // n)
        whole[token_index(spans)] = local[0]
        if multiple is not None and balancer is not UlyssesLoadBalancer:
            assert local.shape[1] % multiple == 0
        if multiple is not None and balancer is UlyssesLoadBalancer:
            assert global_cu[-1] % multiple == 0
    assert whole.tolist() == expected
    assert [t for t in expected if t != PAD] == x[0].tolist()


@pytest.mark.parametrize("balancer", [b for b in BALANCERS if b is not UlyssesLoadBalancer])
@given(
    lengths=documents,
    n=st.integers(1, 4),
    u=st.integers(1, 3),
    multiple=st.none() | st.integers(1, 5),
)
def test_with_ulysses_inside_each_ring_shard_is_cut(
    balancer: type[RingAttentionLoadBalancer],
    lengths: list[int],
    n: int,
    u: int,
    multiple: int | None,
) -> None:
    cu = cumulative(lengths)
    x = torch.arange(int(cu[-1]))[None]
    for rank in range(n):
        parts = [
            balancer(
                cp_rank=rank, cp_world_size=n, ulysses_rank=i, ulysses_degree=u
            ).batch_shard_by_document(
                inputs=[x], seq_dims=[1], cu_doc_lens=cu, pad_values=[PAD], length_multiple=multiple
            )
            for i in range(u)
        ]
        rows = [shards[0].shape[1] for shards, _ in parts]
        assert len(set(rows)) == 1 and rows[0] % (multiple or 1) == 0
        global_cu = parts[0][1]["global_cu_doc_lens"].tolist()
        whole = torch.tensor(padded_documents(x[0].tolist(), cu.tolist(), global_cu))
        spans = balancer.layout.spans(global_cu, n)[rank]
        assert torch.equal(torch.cat([s[0][0] for s, _ in parts]), whole[token_index(spans)])
        for _, more in parts:
            assert more["global_cu_doc_lens"].tolist() == global_cu
            if "cu_doc_lens" in more:
                assert int(more["cu_doc_lens"][-1]) == u * rows[0]
            if "cu_doc_lens_q" in more:
                assert int(more["cu_doc_lens_q"][-1]) == u * rows[0]


def test_the_balanced_balancer_returns_the_global_lengths_alone() -> None:
    for _, more in shard_all(BalancedLoadBalancer, 2, torch.arange(9)[None], cumulative([2, 7])):
        assert list(more) == ["global_cu_doc_lens"]
        assert more["global_cu_doc_lens"].tolist() == [0, 2, 9, 10]


@pytest.mark.parametrize(
    "balancer", [RingAttentionZigZagLoadBalancer, UlyssesLoadBalancer, BalancedLoadBalancer]
)
@given(total=st.integers(1, 50), n=st.integers(1, 4), multiple=st.none() | st.integers(1, 9))
def test_whole_sequences_together_are_the_padded_input(
    balancer: type[RingAttentionLoadBalancer], total: int, n: int, multiple: int | None
) -> None:
    x = torch.arange(3 * total).view(3, total)
    shards = shard_all(balancer, n, x, None, length_multiple=multiple)
    padded = sum(local.shape[1] for local, _ in shards)
    assert padded % (multiple or 1) == 0 and padded - total < 2 * n * (multiple or 1)
    whole = torch.full((3, padded), -7)
    for (local, _), spans in zip(shards, balancer.layout.spans([0, padded], n), strict=True):
        whole[:, token_index(spans)] = local
    assert torch.equal(whole[:, :total], x)
    assert (whole[:, total:] == PAD).all()


@given(lengths=documents, n=st.integers(1, 4))
def test_zig_zag_returns_its_local_lengths(lengths: list[int], n: int) -> None:
    cu = cumulative(lengths)
    x = torch.arange(int(cu[-1]))[None]
    for local, more in shard_all(RingAttentionZigZagLoadBalancer, n, x, cu):
        local_cu = more["cu_doc_lens"]
        assert local_cu.dtype == torch.int32 and int(local_cu[-1]) == local.shape[1]
        assert torch.equal(local_cu * n, more["global_cu_doc_lens"])
        assert more["max_doc_len"] == int(local_cu.diff().max())


@given(lengths=documents, n=st.integers(1, 4), multiple=st.none() | st.integers(1, 9))
def test_llama3_lengths_describe_each_ranks_queries_and_keys(
    lengths: list[int], n: int, multiple: int | None
) -> None:
    cu = cumulative(lengths)
    x = torch.arange(int(cu[-1]))[None]
    shards = shard_all(RingAttentionLlama3LoadBalancer, n, x, cu, length_multiple=multiple)
    global_cu = shards[0][1]["global_cu_doc_lens"].tolist()
    document_of = [i for i, (a, b) in enumerate(pairwise(global_cu)) for _ in range(b - a)]
    for rank, (local, more) in enumerate(shards):
        first, keys = rank * local.shape[1], more["local_k_slice"]
        cu_q, cu_k = more["cu_doc_lens_q"].tolist(), more["cu_doc_lens_k"].tolist()
        assert cu_q[-1] == local.shape[1] and cu_k[-1] == keys.stop - keys.start
        assert more["max_doc_len_q"] == max(b - a for a, b in pairwise(cu_q))
        assert more["max_doc_len_k"] == max(b - a for a, b in pairwise(cu_k))
        for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
            # Bottom-right causal: the last query and the last key are the same token, and the keys
            # reach back to the start of the document.
            assert first + q1 == keys.start + k1
            document = document_of[first + q0]
            assert {document_of[first + q] for q in range(q0, q1)} == {document}
            assert keys.start + k0 == global_cu[document]


def test_failure_2_llama3_keeps_every_token() -> None:
    """40 tokens on two ranks with a local multiple of 16 are two shards of 32, not one of 16."""
    x = torch.arange(40)[None]
    shards = shard_all(
        RingAttentionLlama3LoadBalancer, 2, x, cumulative([25, 15]), length_multiple=16
    )
    assert [local.shape[1] for local, _ in shards] == [32, 32]
    whole = torch.cat([local[0] for local, _ in shards])
    assert whole.tolist() == [*range(40), *[PAD] * 24]
    assert shards[0][1]["global_cu_doc_lens"].tolist() == [0, 25, 40, 64]


def test_failure_9_ulysses_pads_with_a_last_document() -> None:
    (_, first), (_, second) = shard_all(
        UlyssesLoadBalancer, 2, torch.arange(7)[None], cumulative([3, 4]), length_multiple=6
    )
    for more in (first, second):
        assert more["cu_doc_lens"].tolist() == [0, 3, 7, 12] and more["max_doc_len"] == 5


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("ends", [[0, 5], [0, 5, 12], [1, 10], [0, 6, 4, 10], [0]])
def test_failure_9_lengths_that_do_not_describe_the_input(
    balancer: type[RingAttentionLoadBalancer], ends: list[int]
) -> None:
    cu = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_doc_lens must"):
        shard_all(balancer, 2, torch.arange(10)[None], cu)


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.int8, torch.int16, torch.int64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    ],
)
def test_lengths_are_integers_of_any_type(
    balancer: type[RingAttentionLoadBalancer], dtype: torch.dtype
) -> None:
    cu, x = cumulative([3, 6]), torch.arange(9)[None]
    expected = shard_all(balancer, 2, x, cu)
    for (shard, more), (want, want_more) in zip(
        shard_all(balancer, 2, x, cu.to(dtype)), expected, strict=True
    ):
        assert torch.equal(shard, want) and more.keys() == want_more.keys()
        for name, value in more.items():
            same = want_more[name]
            if isinstance(value, torch.Tensor):
                assert value.dtype == torch.int32 and torch.equal(value, same)
            else:
                assert value == same
    for bad, message in ((cu.float(), "float32"), (cu.bool(), "bool"), ([0, 9], "list")):
        with pytest.raises(TypeError, match=f"a tensor of integers, got .*{message}"):
            shard_all(balancer, 2, x, bad)
    wraps = torch.tensor([0, 2**32 + 9])  # 9 in 32 bits
    with pytest.raises(ValueError, match="must end at"):
        shard_all(balancer, 2, x, wraps)


@pytest.mark.parametrize("balancer", BALANCERS)
def test_inputs_of_every_shape_and_dtype_are_cut_alike(
    balancer: type[RingAttentionLoadBalancer],
) -> None:
    cu = cumulative([3, 6])
    tokens, mask = torch.arange(9)[None], torch.ones(1, 9, dtype=torch.bool)
    embedded = torch.arange(9.0)[None, :, None].expand(1, 9, 4).clone().requires_grad_()
    table = torch.arange(9.0)[:, None].expand(9, 2)
    whole_gradient = torch.zeros(1, 9, 4)
    for rank in range(2):
        shards, _ = balancer(cp_rank=rank, cp_world_size=2).batch_shard_by_document(
            inputs=[tokens, mask, embedded, table],
            seq_dims=[1, 1, -2, 0],
            cu_doc_lens=cu,
            pad_values=[-1, False, -1.0, -1.0],
        )
        assert [s.dtype for s in shards] == [torch.int64, torch.bool, torch.float32, torch.float32]
        assert torch.equal(shards[2][..., 0], shards[0].float())
        assert torch.equal(shards[3][:, 0], shards[0][0].float())
        assert torch.equal(shards[1], shards[0] >= 0)
        (gradient,) = torch.autograd.grad(shards[2].sum(), embedded)
        whole_gradient += gradient
    assert torch.equal(whole_gradient, torch.ones(1, 9, 4))


@pytest.mark.parametrize(
    ("balancer", "multiple", "total"),
    [
        (RingAttentionZigZagLoadBalancer, None, 12),
        (RingAttentionZigZagLoadBalancer, 5, 20),
        (RingAttentionLlama3LoadBalancer, None, 10),
        (RingAttentionLlama3LoadBalancer, 8, 16),
        (UlyssesLoadBalancer, None, 10),
        (UlyssesLoadBalancer, 5, 10),
        (BalancedLoadBalancer, None, 10),
        (BalancedLoadBalancer, 5, 10),
        (BalancedLoadBalancer, 4, 16),
    ],
)
def test_pad_returns_the_tensor_and_how_much_was_added(
    balancer: type[RingAttentionLoadBalancer], multiple: int | None, total: int
) -> None:
    x = torch.arange(18).view(2, 9)
    padded, added = balancer(cp_rank=0, cp_world_size=2).pad(x, 1, -1, length_multiple=multiple)
    assert padded.shape == (2, total) and added == total - 9
    assert torch.equal(padded[:, :9], x) and (padded[:, 9:] == -1).all()


def test_pad_returns_a_fitting_tensor_itself() -> None:
    x = torch.arange(8)
    padded, added = UlyssesLoadBalancer(cp_rank=0, cp_world_size=2).pad(x, 0, -1)
    assert padded is x and added == 0


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no inputs": ({"inputs": [], "seq_dims": []}, "inputs is empty"),
    "seq_dims": ({"seq_dims": [1, 1]}, "seq_dims must have one dimension for each input"),
    "seq_dim out of range": ({"seq_dims": [2]}, r"seq_dims\[0\] is 2"),
    "pad_values": ({"pad_values": [0, 0]}, "pad_values must have one value for each input"),
    "padding without values": ({"pad_values": None}, "pad_values is None"),
    "multiple": ({"length_multiple": 0}, "length_multiple must be at least 1"),
    "lengths differ": (
        {
            "inputs": [torch.zeros(1, 9), torch.zeros(1, 8)],
            "seq_dims": [1, 1],
            "pad_values": [0, 0],
        },
        "same length",
    ),
    "empty": ({"inputs": [torch.zeros(1, 0)]}, "at least 1"),
}


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(balancer: type[RingAttentionLoadBalancer], case: str) -> None:
    changed, message = BAD_CALLS[case]
    good: dict[str, Any] = {"inputs": [torch.zeros(1, 9)], "seq_dims": [1], "pad_values": [0]}
    build = balancer(cp_rank=0, cp_world_size=2)
    with pytest.raises(ValueError, match=message):
        build.batch_shard_by_document(cu_doc_lens=cumulative([4, 5]), **{**good, **changed})
    if balancer is not RingAttentionLlama3LoadBalancer:
        with pytest.raises(ValueError, match=message):
            build.batch_shard(**{**good, **changed})


@pytest.mark.parametrize("balancer", BALANCERS)
def test_by_document_refuses_a_batch(balancer: type[RingAttentionLoadBalancer]) -> None:
    with pytest.raises(ValueError, match="batch of one"):
        balancer(cp_rank=0, cp_world_size=2).batch_shard_by_document(
            inputs=[torch.zeros(2, 8)], seq_dims=[1], cu_doc_lens=cumulative([8])
        )


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_rank_outside_the_group(
    balancer: type[RingAttentionLoadBalancer], rank: int, size: int
) -> None:
    with pytest.raises(ValueError, match="cp_rank must be in"):
        balancer(cp_rank=rank, cp_world_size=size)
    if balancer is not UlyssesLoadBalancer:
        with pytest.raises(ValueError, match="ulysses_rank must be in"):
            balancer(cp_rank=0, cp_world_size=2, ulysses_rank=rank, ulysses_degree=size)


def test_llama3_without_documents_raises() -> None:
    with pytest.raises(RuntimeError, match="batch_shard_by_document"):
        RingAttentionLlama3LoadBalancer(cp_rank=0, cp_world_size=2).batch_shard(
            inputs=[torch.zeros(1, 8)], seq_dims=[1]
        )


class FakeMesh:
    """Rank 3 of 4, or place (1, 2) of a 2 x 3 mesh."""

    def __init__(self, ndim: int = 1):
        self.ndim = ndim

    def size(self, dim: int | None = None) -> int:
        return 4 if dim is None else (2, 3)[dim]

    def get_local_rank(self, dim: int | None = None) -> int:
        return 3 if dim is None else (1, 2)[dim]


@pytest.mark.parametrize(
    ("name", "cls"), list(zip(RingAttentionLoadBalancerType, BALANCERS, strict=True))
)
def test_build_takes_rank_and_size_from_the_mesh(
    name: RingAttentionLoadBalancerType, cls: type[RingAttentionLoadBalancer]
) -> None:
    balancer = name.build(FakeMesh())
    assert type(balancer) is cls
    assert (balancer.cp_rank, balancer.cp_world_size) == (3, 4)


@pytest.mark.parametrize("name", ["zig_zag", "llama3", "balanced"])
def test_build_takes_a_ring_and_ulysses_inside_it(name: str) -> None:
    balancer = RingAttentionLoadBalancerType(name).build(FakeMesh(ndim=2))
    assert (balancer.cp_rank, balancer.cp_world_size) == (1, 2)
    assert (balancer.ulysses_rank, balancer.ulysses_degree) == (2, 3)


@pytest.mark.parametrize(("name", "ndim"), [("ulysses", 2), ("zig_zag", 3), ("balanced", 0)])
def test_build_refuses_other_meshes(name: str, ndim: int) -> None:
    with pytest.raises(ValueError, match=f"got {ndim} for {name}"):
        RingAttentionLoadBalancerType(name).build(FakeMesh(ndim))


@pytest.mark.distributed
def test_build_takes_a_real_mesh(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("cp",))
        balancer = RingAttentionLoadBalancerType.llama3.build(mesh)
        assert (balancer.cp_rank, balancer.cp_world_size) == (0, 1)
    finally:
        dist.destroy_process_group()


def test_styles() -> None:
    assert RingContextParallelStyle().load_balancer == RingAttentionLoadBalancerType.zig_zag
    named = RingContextParallelStyle("llama3", head_stride=2)
    assert named.load_balancer is RingAttentionLoadBalancerType.llama3
    assert RingContextParallelStyle.from_dict(named.as_config_dict()) == named
    style = UlyssesContextParallelStyle()
    assert style.load_balancer is RingAttentionLoadBalancerType.ulysses
    assert UlyssesContextParallelStyle.from_dict(style.as_config_dict()) == style


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"load_balancer": "ulysses"}, "UlyssesContextParallelStyle"),
        ({"load_balancer": "zigzag"}, "expected .*zig_zag, llama3.*balanced.* got 'zigzag'"),
        ({"head_stride": 0}, "head_stride must be at least 1, got 0"),
    ],
)
def test_bad_styles(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(OLMoConfigurationError, match=message):
        RingContextParallelStyle(**kwargs)
