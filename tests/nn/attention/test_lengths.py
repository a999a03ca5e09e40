"""Lengths are checked once per tensor, and read on the host no more often."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from olmo_core.nn.attention import Attention
from olmo_core.nn.attention.lengths import (
    check_cu_doc_lens,
    check_leftpad,
    document_positions,
    host_lengths,
    leftpad_to_cu_doc_lens,
)
from olmo_core.nn.rope import RoPEConfig


def cu(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_host_lengths_follow_changes_in_place() -> None:
    lengths = cu(0, 3, 8)
    assert host_lengths(lengths) == [0, 3, 8]
    lengths[1] = 5
    assert host_lengths(lengths) == [0, 5, 8]
    with torch.inference_mode():
        inference = cu(0, 3, 8)
    assert host_lengths(inference) == [0, 3, 8]
    with torch.inference_mode():
        inference[1] = 5
    assert host_lengths(inference) == [0, 5, 8]


def test_an_answer_holds_for_its_question_alone() -> None:
    lengths = cu(0, 1, 2)
    for _ in range(2):
        check_cu_doc_lens(lengths, 2, 1)
    with pytest.raises(TypeError, match="must be an int"):
        check_cu_doc_lens(lengths, 2, True)
    with pytest.raises(ValueError, match="must end at"):
        check_cu_doc_lens(lengths, 3, 1)
    with pytest.raises(ValueError, match="must not decrease"):
        check_cu_doc_lens(cu(0, 3, 2), 2, 1)
    check_cu_doc_lens(lengths, 2, 1)
    lengths[1] = 0
    with pytest.raises(ValueError, match="max_doc_len=1"):
        check_cu_doc_lens(lengths, 2, 1)
    with torch.inference_mode():  # without versions, each call asks again
        inference = cu(0, 1, 2)
        check_cu_doc_lens(inference, 2, 1)
        inference[2] = 3
        with pytest.raises(ValueError, match="must end at"):
            check_cu_doc_lens(inference, 2, 1)


def test_all_layers_together_read_a_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    tolist = Tensor.tolist

    def counting(self: Tensor) -> Any:
        nonlocal reads
        reads += 1
        return tolist(self)

    monkeypatch.setattr(Tensor, "tolist", counting)
    layers = [Attention(d_model=8, n_heads=2, window_size=w) for w in (None, 3)]
    lengths, x = cu(0, 4, 10), torch.randn(1, 10, 8, requires_grad=True)
    for _ in range(3):
        y = x
        for layer in layers:
            y = layer(y, cu_doc_lens=lengths)
        y.sum().backward()
    assert reads == 1
    padding = cu(3)
    for layer in layers:
        layer(x, cache_leftpad=padding)
    assert reads == 3  # the padding, and the documents that it makes


def test_what_inference_mode_derives_serves_training() -> None:
    lengths = cu(0, 4, 10)
    layer = Attention(d_model=8, n_heads=2, rope=RoPEConfig())
    x = torch.randn(1, 10, 8)
    with torch.inference_mode():
        layer(x, cu_doc_lens=lengths)
    layer(x, cu_doc_lens=lengths).sum().backward()


def test_document_positions() -> None:
    assert document_positions(cu(0, 3, 3, 4, 6, 6), 6).tolist() == [0, 1, 2, 0, 0, 1]


def test_left_padding_is_documents() -> None:
    assert leftpad_to_cu_doc_lens(cu(2, 0, 5), 5).tolist() == [0, 2, 5, 5, 10, 15, 15]


@pytest.mark.parametrize(
    ("lengths", "longest", "error", "match"),
    [
        (cu(1, 10), None, ValueError, "start at 0"),
        (cu(0, 7, 5, 10), None, ValueError, "not decrease"),
        (cu(0, 5), None, ValueError, "must end at .* 10"),
        (cu(0, 5, 12), None, ValueError, "must end at .* 10"),
        (cu(0, 4, 10), 5, ValueError, "max_doc_len=5"),
        (cu(0), None, ValueError, "one element more"),
        (cu(0, 10)[None], None, ValueError, "1-D"),
        (cu(0, 10).long(), None, TypeError, "int32"),
        (cu(0, 10).float(), None, TypeError, "int32"),
        ([0, 10], None, TypeError, "int32"),
        (cu(0, 10), torch.tensor(10), TypeError, "an int"),
        (cu(0, 10), True, TypeError, "an int"),
        (cu(0, 10), 10.0, TypeError, "an int"),
    ],
)
def test_bad_lengths(lengths: Any, longest: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        check_cu_doc_lens(lengths, 10, longest)


@pytest.mark.parametrize(
    ("leftpad", "error", "match"),
    [
        (cu(0, 11), ValueError, r"in \[0, 10\]"),
        (cu(-1, 0), ValueError, r"in \[0, 10\]"),
        (cu(0), ValueError, r"shape \(2,\)"),
        (cu(0, 1).long(), TypeError, "int32"),
        (3, TypeError, "int32"),
    ],
)
def test_bad_left_padding(leftpad: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        check_leftpad(leftpad, 2, 10)
