"""Which queries see nothing, on the device, against the dense mask."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from olmo_core.nn.attention.kernels.softmax.library_args import (
    batched,
    empty_forward,
    flat,
    flat_lse,
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


def test_problems_with_lengths_are_flattened_and_answers_are_not() -> None:
    q = torch.ones(2, 4, 3, 5)
    s = Segments.documents(cumulative([7, 1]), 7)
    (flat_q,) = flat(s, q)
    assert flat_q.shape == (8, 3, 5) and flat_q.data_ptr() == q.data_ptr()
    out, lse = batched(s, q, flat_q, torch.zeros(3, 8))
    assert out.shape == q.shape and lse.shape == (1, 3, 8)
    assert torch.equal(flat_lse(s, lse), lse[0])
    empty, nothing = empty_forward(q, s)
    assert empty.shape == q.shape and nothing.shape == (1, 3, 8)
    dense = Segments.dense(4, 4)
    assert flat(dense, q)[0] is q and flat_lse(dense, lse) is lse
    assert batched(dense, q, q, lse) == (q, lse)
    assert empty_forward(q, dense)[1].shape == (2, 3, 4)
