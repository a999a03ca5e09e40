"""What a device has, and what says that it is used up."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from olmo_core import memory
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.memory import expect_room, memory_of, ran_out_of_memory

CPU = torch.device("cpu")


def test_the_least_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "new", tmp_path / "old"]
    monkeypatch.setattr(memory, "_CGROUPS", [str(file) for file in files])
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY,) * 2)
    whole = memory_of(CPU)
    assert whole is not None and whole > 2**28
    files[0].write_text("max\n")
    assert memory_of(CPU) == whole
    files[1].write_text("5000\n")
    assert memory_of(CPU) == 5000
    monkeypatch.setattr(resource, "getrlimit", lambda what: (400, resource.RLIM_INFINITY))
    assert memory_of(CPU) == 400
    assert memory_of(torch.device("meta")) is None


def test_expect_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_of", lambda device: 2**30)
    expect_room("sizes", 2**30, CPU)
    with pytest.raises(
        OLMoConfigurationError, match=r"^sizes need at least 1.5 GiB .* has 1.0 GiB"
    ):
        expect_room("sizes", 3 * 2**29, CPU)
    with pytest.raises(OLMoConfigurationError, match="inf GiB"):
        expect_room("sizes", 10**400, CPU)


@pytest.mark.parametrize("size", [2**60, 2**62, 2**40])
def test_torch_says_so_in_its_own_words(size: int) -> None:
    for make in (lambda: torch.empty(size, 2**10), lambda: torch.empty(2**60)):
        with pytest.raises(RuntimeError) as error:
            make()
        assert ran_out_of_memory(error.value)


def test_other_errors_are_none() -> None:
    assert ran_out_of_memory(MemoryError()) and ran_out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert not ran_out_of_memory(RuntimeError("shapes")) and not ran_out_of_memory(
        ValueError("out")
    )
