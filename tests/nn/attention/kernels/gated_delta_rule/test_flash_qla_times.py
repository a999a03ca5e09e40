"""Whose measurement speaks for a call, and what it says."""

from __future__ import annotations

import pytest
import torch

from olmo_core.nn.attention.kernels.gated_delta_rule import flash_qla_times
from olmo_core.nn.attention.kernels.gated_delta_rule.flash_qla_times import Measured

Q = torch.empty(2, 8192, 16, 128, device="meta")
V = torch.empty(2, 8192, 16, 256, device="meta")


def test_the_largest_that_fits_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*times: Measured) -> str | None:
        monkeypatch.setattr(flash_qla_times, "MEASURED", times)
        return flash_qla_times.worth_it(Q, V, False)

    small, large = (Measured(2, t, 16, 16, 256, False, 1.0, 1.2) for t in (4096, 8192))
    assert told(small) is None and told(large) is None
    assert "took 1.00 ms" in str(told(small, large._replace(triton_ms=1.02)))
    assert "no measurement" in str(told(large._replace(batch=4, tokens=4096)))
    assert "no measurement" in str(told(large._replace(tokens=16384)))
    assert "no measurement" in str(told(large._replace(gradients=True)))
    assert "no measurement" in str(told())


def test_what_stands_in_the_table_was_measured() -> None:
    for m in flash_qla_times.MEASURED:
        assert min(m[:5]) > 0 and m.value_heads % m.key_heads == 0 and m.value_dim % 128 == 0
        assert 0 < m.flash_qla_ms < 100 and 0 < m.triton_ms < 100
