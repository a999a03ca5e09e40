"""Which queries see nothing, on the device, against the dense mask."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from olmo_core.nn.attention.kernels.library_args import (
    batched,
    flat,
    may_have_empty_rows,
    sees_nothing,
    window_offsets,
    without_queries,
)
from olmo_core.nn.attention.segments import Segments

lengths = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=6)


def cumulative(values: list[int]) -> torch.Tensor:
    return torch.tensor([0, *values]).cumsum(0).to(torch.int32)


@given(lengths=lengths, causal=st.booleans())
def test_empty_queries_and_lone_keys(lengths: list[tuple[int, int]], causal: bool) -> None:
    cu_q, cu_k = (cumulative([pair[i] for pair in lengths]) for i in (0, 1))
    s = Segments(cu_q, cu_k, 4, 4, causal)
    n_q, n_k = int(cu_q[-1]), int(cu_k[-1])
    assert torch.equal(sees_nothing(s, n_q), ~s.materialize(n_q, n_k).any(1))
    everything = Segments(cu_q, cu_k, 4, 4, False).materialize(n_q, n_k)
    assert torch.equal(without_queries(s, n_k), ~everything.any(0))


def test_self_attention_has_no_empty_rows() -> None:
    cu = cumulative([3, 2])
    assert not may_have_empty_rows(Segments.documents(cu, 3))
    assert not may_have_empty_rows(Segments.dense(4, 4))
    assert may_have_empty_rows(Segments.dense(4, 3))
    assert may_have_empty_rows(Segments(cu, cu.clone(), 3, 3))


def test_windows_become_inclusive_offsets() -> None:
    assert window_offsets(Segments.dense(9, 9, window=3), -1) == (2, 0)
    assert window_offsets(Segments.dense(9, 9), -1) == (-1, -1)
    assert window_offsets(Segments.dense(9, 9, window=9), None) == (None, None)


def test_flattened_problems_lose_their_batch_of_one() -> None:
    x = torch.ones(1, 4, 2)
    s = Segments.documents(cumulative([4]), 4)
    assert flat(s, x)[0].shape == (4, 2) and batched(s, *flat(s, x))[0].shape == x.shape
    assert flat(Segments.dense(4, 4), x)[0] is x
