from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_core.data import (
    doc_lens_from_attention_mask,
    doc_lens_from_cu_seqlens,
    doc_lens_from_lengths,
    doc_lens_from_position_ids,
    leftpad_from_attention_mask,
)

lengths_lists = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)


@settings(derandomize=True, deadline=None)
@given(lengths=lengths_lists, extra=st.integers(0, 5))
def test_lengths(lengths: list[int], extra: int) -> None:
    size = len(lengths) + 1 + extra
    cu, longest = doc_lens_from_lengths(lengths, total=sum(lengths), size=size)
    assert cu.dtype == torch.int32 and cu.shape == (size,)
    assert cu.diff().tolist() == lengths + [0] * extra
    assert longest == max(lengths)


@settings(derandomize=True, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_position_ids_give_back_the_lengths(lengths: list[int]) -> None:
    positions = torch.cat([torch.arange(n) for n in lengths])
    cu, longest = doc_lens_from_position_ids(positions[None])
    assert cu.diff().tolist() == lengths and cu[0] == 0 and longest == max(lengths)
    assert torch.equal(cu, doc_lens_from_lengths(torch.tensor(lengths)).cu_doc_lens)


def test_position_ids_may_cross_a_row() -> None:
    cu, longest = doc_lens_from_position_ids(torch.tensor([[0, 1, 0, 1], [2, 3, 0, 0]]))
    assert cu.tolist() == [0, 2, 6, 7, 8] and longest == 4


def test_attention_mask_with_padding_and_packed_documents() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 2, 3, 0], [1, 1, 1, 1, 1]])
    cu, longest = doc_lens_from_attention_mask(mask)
    assert cu.tolist() == [0, 2, 5, 7, 8, 9, 10, 15] and longest == 5
    assert torch.equal(
        doc_lens_from_attention_mask(mask[::2].bool())[0], torch.tensor([0, 2, 5, 10])
    )


def test_leftpad() -> None:
    mask = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]])
    leftpad = leftpad_from_attention_mask(mask)
    assert leftpad.dtype == torch.int32 and leftpad.tolist() == [2, 0, 1]


BAD = {
    "negative length": (lambda: doc_lens_from_lengths([3, -1]), r"lengths\[1\] is -1"),
    "no documents": (lambda: doc_lens_from_lengths([]), "no tokens"),
    "only empty documents": (lambda: doc_lens_from_lengths([0, 0]), "no tokens"),
    "fractional length": (lambda: doc_lens_from_lengths([2.5]), "must be integers"),
    "boolean length": (lambda: doc_lens_from_lengths([True]), "must be integers"),
    "float tensor": (lambda: doc_lens_from_lengths(torch.ones(2)), "torch.float32"),
    "2-D lengths": (lambda: doc_lens_from_lengths(torch.ones(2, 2, dtype=torch.int)), "1-D"),
    "wrong sum": (lambda: doc_lens_from_lengths([3, 4], total=8), "sum to 7.*8 tokens"),
    "too many documents": (lambda: doc_lens_from_lengths([1, 1, 1], size=3), "2 documents"),
    "beyond int32": (lambda: doc_lens_from_lengths([2**31]), "int32"),
    "positions skip": (
        lambda: doc_lens_from_position_ids(torch.tensor([0, 1, 3])),
        "token 2 has 3",
    ),
    "positions start late": (
        lambda: doc_lens_from_position_ids(torch.tensor([[4, 5]])),
        "token 0 has 4 at the beginning",
    ),
    "float positions": (lambda: doc_lens_from_position_ids(torch.zeros(3)), "integers"),
    "no positions": (lambda: doc_lens_from_position_ids(torch.zeros(1, 0).long()), "empty"),
    "3-D positions": (
        lambda: doc_lens_from_position_ids(torch.zeros(3, 1, 4).long()),
        "1-D or 2-D",
    ),
    "mask with a hole": (lambda: doc_lens_from_attention_mask(torch.tensor([[1, 0, 1]])), "holes"),
    "document twice": (lambda: doc_lens_from_attention_mask(torch.tensor([[1, 2, 1]])), "row 0"),
    "negative mask": (lambda: doc_lens_from_attention_mask(torch.tensor([[1, -1]])), "negative"),
    "additive mask": (lambda: doc_lens_from_attention_mask(torch.zeros(1, 4)), "float32"),
    "4-D mask": (lambda: doc_lens_from_attention_mask(torch.ones(1, 1, 2, 2).long()), "2-D"),
    "right padding": (
        lambda: leftpad_from_attention_mask(torch.tensor([[1, 0]])),
        "not on the left",
    ),
    "empty row": (lambda: leftpad_from_attention_mask(torch.tensor([[1, 1], [0, 0]])), "row 1"),
    "packed row": (lambda: leftpad_from_attention_mask(torch.tensor([[1, 2]])), "0 and 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_cumulative_lengths_of_collators() -> None:
    wanted = doc_lens_from_lengths([3, 0, 5], total=8)
    for lengths in ([0, 3, 3, 8], torch.tensor([[0, 3, 3, 8]]), torch.tensor([0, 3, 3, 8]).int()):
        found = doc_lens_from_cu_seqlens(lengths, total=8)
        assert torch.equal(found.cu_doc_lens, wanted.cu_doc_lens)
        assert found.cu_doc_lens.dtype == torch.int32
        assert found.max_doc_len == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([0], r"must start at 0 and not decrease, got \[0\]"),
        ([1, 4], r"must start at 0"),
        ([0, 4, 3], r"not decrease, got \[0, 4, 3\]"),
        ([0, 4], "lengths sum to 4, but there are 8 tokens"),
        ([0.0, 8.0], "cu_seqlens must be integers"),
        ([[0, 4], [0, 4]], r"in one row, got shape \(2, 2\)"),
    ],
)
def test_bad_cumulative_lengths(wrong: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        doc_lens_from_cu_seqlens(torch.tensor(wrong), total=8)
