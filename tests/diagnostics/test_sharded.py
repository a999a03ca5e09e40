"""What is said of ranks that give no answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from olmo_core.diagnostics import sharded
from olmo_core.diagnostics.ranks import Failure


class Answered:
    """Ranks that have answered already."""

    alive = True

    def __init__(self, *answers: Any) -> None:
        self.answers = answers

    def run(self, *_: Any, **__: Any) -> list[Any]:
        return list(self.answers)


def test_who_raised_is_told_and_not_who_waited_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Failure("no answer in 120 s", follows=True)
    ranks = Answered(late, Failure("ValueError: here", "..."))
    monkeypatch.setitem(sharded._STARTED, 2, ranks)  # type: ignore[arg-type]
    question = ("gqa", "torch", torch.float32, torch.device("cpu"), "zig_zag", "whole")
    with pytest.raises(RuntimeError, match=r"^rank 1 of 2: ValueError: here$"):
        sharded.sharded_answer(*question, ranks=2)
