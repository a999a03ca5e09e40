"""What FlashQLA needs of a machine, found out without an import."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from olmo_core.nn.attention.kernels.gated_delta_rule import flash_qla_machine as machine


def test_a_machine_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"flash_qla", "tilelang"}
    versions = {"apache-tvm-ffi": "0.1.12", "nvidia-cuda-nvcc": "13.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise machine.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(machine, "find_spec", lambda name: name if name in here else None)
    monkeypatch.setattr(machine.metadata, "version", version)
    monkeypatch.setattr(
        machine.metadata, "requires", lambda name: ["torch", "apache-tvm-ffi<0.1.13,>=0.1.11"]
    )
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, "/nowhere")

    def ask() -> Any:
        return machine._package_refusal.__wrapped__(())

    monkeypatch.delitem(sys.modules, "flash_qla", raising=False)
    assert ask() is None
    for missing in sorted(here):
        here.discard(missing)
        assert 'pip install "olmo-attention[flash-qla]"' in ask()
        here.add(missing)
    versions["apache-tvm-ffi"] = "0.1.15.post2"
    assert "older than 0.1.13, and 0.1.15.post2 is here, as flash-attn 4" in ask()
    del versions["apache-tvm-ffi"]
    assert ask() == "it needs apache-tvm-ffi, which is not installed"
    versions["apache-tvm-ffi"] = "0.1.12"
    del versions["nvidia-cuda-nvcc"]
    assert "compiles with nvcc, and there is none: set CUDA_HOME" in ask()
    assert not {"flash_qla", "tilelang"} & set(sys.modules)


def test_nvcc_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert not machine._has_nvcc()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert machine._has_nvcc()


def test_an_answer_names_where_nvcc_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setattr(machine, "find_spec", lambda name: name)
    monkeypatch.setattr(machine, "_clash", lambda: None)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine.metadata, "version", lambda name: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    machine._package_refusal.cache_clear()
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert "set CUDA_HOME" in str(machine.machine_refusal(torch.device("cuda", 0)))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert machine.machine_refusal(torch.device("cuda", 0)) is None
    machine._package_refusal.cache_clear()
