"""What the options make of a number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.train.config import TrainConfig
from olmo_core.train.parallel.degrees import Degrees, Style, deal
from olmo_core.train.presets import get_preset

GOOD: list[tuple[int, dict[str, Any], Degrees, str]] = [
    (1, {}, Degrees(), "1"),
    (1, {"tp_degree": 1}, Degrees(), "1"),
    (4, {}, Degrees(4), "4 of data"),
    (2, {"cp": "zig_zag"}, Degrees(1, 2, 1, 1, Style.zig_zag), "2 of context by zig_zag"),
    (4, {"cp": "ulysses", "tp_degree": 2}, Degrees(1, 1, 2, 2, Style.ulysses),
     "2 of context by ulysses x 2 of tensors"),
    (4, {"cp": "ulysses", "ulysses_degree": 4}, Degrees(1, 1, 4, 1, Style.ulysses),
     "4 of context by ulysses"),
    (8, {"cp": "llama3", "cp_degree": 4, "ulysses_degree": 2}, Degrees(2, 2, 2, 1, Style.llama3),
     "2 of data x 4 of context by llama3 (2 x 2 of Ulysses)"),
    (2, {"cp": "balanced", "ulysses_degree": 2}, Degrees(1, 1, 2, 1, Style.balanced),
     "2 of context by balanced (1 x 2 of Ulysses)"),
    (4, {"cp": "balanced", "cp_degree": 1}, Degrees(4), "4 of data"),
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "options", "degrees", "text"), GOOD)
def test_the_grid(ranks: int, options: dict[str, Any], degrees: Degrees, text: str) -> None:
    dealt = deal(ranks, **options)
    assert dealt == degrees and str(dealt) == text
    assert dealt.data * dealt.cp * dealt.tp == dealt.fsdp * dealt.tp == ranks


BAD: list[tuple[int, dict[str, Any], str]] = [
    (1, {"cp": "zig_zag"}, "about several processes, and this is one. Start .*torchrun"),
    (1, {"tp_degree": 2}, "about several processes"),
    (2, {"cp": "zigzag"}, "--cp must be one of zig_zag, llama3, ulysses, balanced, got 'zigzag'"),
    (2, {"cp_degree": 2}, "--cp-degree=2 needs --cp"),
    (2, {"ulysses_degree": 2}, "--ulysses-degree=2 needs --cp"),
    (2, {"tp_degree": 0}, "--tp-degree must be at least 1, got 0"),
    (2, {"cp": "llama3", "cp_degree": -1}, "--cp-degree must be at least 1, got -1"),
    (4, {"tp_degree": 3}, "4 ranks can't be dealt to --tp-degree 3"),
    (4, {"cp": "llama3", "cp_degree": 3}, "4 ranks can't be dealt to --cp-degree 3"),
    (4, {"cp": "llama3", "cp_degree": 4, "tp_degree": 2}, "--cp-degree 4 x --tp-degree 2"),
    (4, {"cp": "ulysses", "ulysses_degree": 2}, "2 is not the --cp-degree, 4, of --cp ulysses"),
    (4, {"cp": "zig_zag", "ulysses_degree": 3}, "--ulysses-degree 3 does not divide it"),
]


@pytest.mark.parametrize(("ranks", "options", "message"), BAD)
def test_what_does_not_fit(ranks: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OLMoConfigurationError, match=message):
        deal(ranks, **options)


def test_rows() -> None:
    config: TrainConfig = get_preset("tiny").merge(["data.batch_size=6"])
    Degrees(3, 2, 2, 2).expect_rows(config)
    with pytest.raises(OLMoConfigurationError, match=r"data.batch_size=6 rows .* 4 ranks of data"):
        Degrees(4).expect_rows(config)
