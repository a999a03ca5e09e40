"""When fla's kernels are used: by what they refuse, then by a probe."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from olmo_core.nn.attention.kernels.gated_delta_rule import fla


def test_a_failing_probe_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    fla._probed.cache_clear()

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("refuses to run on this GPU\nand more")

    monkeypatch.setattr(fla, "fla_gated_delta_rule", broken)
    usable, reason = fla._probe("cpu", 1)
    assert not usable and reason == "fla's probe failed: RuntimeError: refuses to run on this GPU"
    fla._probed.cache_clear()
    monkeypatch.setattr(fla, "fla_gated_delta_rule", fla.gated_delta_rule)
    assert fla._probe("cpu", 2)[0]
    fla._probed.cache_clear()
    wrong = lambda *x, **o: fla.gated_delta_rule(*x, **{**o, "scale": 1.0})  # noqa: E731
    monkeypatch.setattr(fla, "fla_gated_delta_rule", wrong)
    usable, reason = fla._probe("cpu", 1)
    assert not usable and "is off by" in reason
    fla._probed.cache_clear()


def test_a_probe_without_memory_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fla._probed.cache_clear()

    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(fla, "fla_gated_delta_rule", full)
        assert fla._probe("cpu", 1) == (False, "fla's probe found no memory")
    monkeypatch.setattr(fla, "fla_gated_delta_rule", fla.gated_delta_rule)
    assert fla._probe("cpu", 1)[0]
    fla._probed.cache_clear()


@pytest.mark.parametrize(
    ("capability", "triton", "tilelang", "refused"),
    [
        ((9, 0), "3.6.0", False, True),
        ((9, 0), "3.4.0", False, True),
        ((9, 0), "3.3.1", False, False),
        ((9, 0), "3.7.0+git1", False, True),
        ((9, 0), "3.7.1", False, False),
        ((9, 0), "3.6.0", True, False),
        ((8, 0), "3.6.0", False, False),
        ((9, 0), None, False, True),
    ],
)
def test_what_is_known_to_fail_is_not_tried(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    triton: str | None,
    tilelang: bool,
    refused: bool,
) -> None:
    def version(name: str) -> str:
        assert name == "triton"
        if triton is None:
            raise metadata.PackageNotFoundError(name)
        return triton

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fla.metadata, "version", version)
    monkeypatch.setattr(fla, "find_spec", lambda name: object() if tilelang else None)
    monkeypatch.setattr(fla, "_probe", lambda device, group: (True, "probed"))
    usable, reason = fla.fla_usable("cuda")
    assert usable is not refused
    assert reason == "probed" if not refused else "install" in reason
