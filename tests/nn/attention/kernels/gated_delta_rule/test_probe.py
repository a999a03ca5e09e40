"""When the Triton kernels are used on GPUs that nobody tested them on: by a probe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from olmo_core.nn.attention.kernels.gated_delta_rule import triton_rule
from olmo_core.nn.attention.kernels.gated_delta_rule.probe import Problem, try_kernels
from olmo_core.nn.attention.kernels.gated_delta_rule.torch_backward import chunked_backward
from olmo_core.nn.attention.kernels.gated_delta_rule.torch_forward import chunked_forward

PROBLEM = Problem(torch.device("cpu"), torch.bfloat16, 16, 24, 2)


def tell(forward: Callable[..., Any] = chunked_forward, backward: Any = chunked_backward) -> Any:
    return try_kernels(PROBLEM, forward, backward)


def test_agreement_and_each_way_to_be_wrong() -> None:
    works, answer = tell()
    assert works and answer == "their probe agrees with torch to 0.0e+00, forward and backward"

    def wrong_output(*inputs: Any, **options: Any) -> Any:
        out, state, saved = chunked_forward(*inputs, **options)
        return 1.05 * out, state, saved

    def wrong_gate(*inputs: Any, **options: Any) -> Any:
        *grads, dbeta, dinitial = chunked_backward(*inputs, **options)
        return *grads, 1.05 * dbeta, dinitial

    def nothing(*inputs: Any, **options: Any) -> Any:
        out, state, saved = chunked_forward(*inputs, **options)
        return out * float("nan"), state, saved

    def broken(*inputs: Any, **options: Any) -> Any:
        raise RuntimeError("out of resource: shared memory\nand more")

    def no_gate(*inputs: Any, **options: Any) -> Any:
        *grads, dbeta, dinitial = chunked_backward(*inputs, **options)
        return *grads, dbeta * float("nan"), dinitial

    bad = (wrong_output,), (chunked_forward, wrong_gate), (nothing,), (chunked_forward, no_gate)
    for forms in bad:
        works, answer = tell(*forms)
        assert not works and "their probe is off by" in answer
    assert tell(broken) == (
        False,
        "their probe failed: RuntimeError: out of resource: shared memory",
    )


def test_modes_of_the_caller_do_not_reach_it() -> None:
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert tell()[0]


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kib: int) -> None:
    monkeypatch.setattr(triton_rule, "triton_refusal", lambda x: None)
    monkeypatch.setattr(triton_rule, "INTERPRETED", False)
    monkeypatch.setattr(triton_rule, "shared_memory_kib", lambda device: kib)
    monkeypatch.setattr(triton_rule, "_PROBED", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name, form in (("triton_forward", chunked_forward), ("triton_backward", chunked_backward)):
        monkeypatch.setattr(triton_rule, name, form)


def reason(key_dim: int = 16, dtype: torch.dtype = torch.bfloat16) -> str | None:
    q = torch.ones(1, 3, 2, key_dim, dtype=dtype)
    return triton_rule.unsupported(q, q)


def test_hopper_needs_none_and_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, (9, 0), 227)
    monkeypatch.setattr(triton_rule, "try_kernels", lambda *_: pytest.fail("probed"))
    assert reason() is None
    for capability, kib in (((7, 5), 64), ((8, 0), 64)):
        on_gpu(monkeypatch, capability, kib)
        assert "99 KiB of shared memory" in str(reason())
    on_gpu(monkeypatch, (9, 0), 64)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "compute capability 8.0" in str(reason())


@pytest.mark.parametrize(("capability", "kib"), [((8, 0), 163), ((8, 9), 99), ((12, 0), 99)])
def test_elsewhere_each_shape_is_probed_once(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kib: int
) -> None:
    on_gpu(monkeypatch, capability, kib)
    asked: list[Problem] = []

    def count(problem: Problem, *forms: Any) -> tuple[bool, str]:
        asked.append(problem)
        return try_kernels(problem, *forms)

    monkeypatch.setattr(triton_rule, "try_kernels", count)
    q = torch.ones(1, 3, 2, 16, dtype=torch.bfloat16)
    assert triton_rule.probe_answer(q, q) == ""
    for _ in range(2):
        assert reason() is None
    assert "agrees with torch" in triton_rule.probe_answer(q, q)
    assert len(asked) == 1
    reason(key_dim=24)
    reason(dtype=torch.float16)
    assert len(set(asked)) == 3

    def wrong(*inputs: Any, **options: Any) -> tuple[Tensor, ...]:
        return tuple(2 * x for x in chunked_backward(*inputs, **options))

    monkeypatch.setattr(triton_rule, "triton_backward", wrong)
    assert reason() is None  # remembered
    assert "off by" in str(reason(key_dim=32))


def test_what_could_not_be_tried_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, (8, 0), 163)

    def full(*inputs: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(triton_rule, "triton_forward", full)
        assert "no memory" in str(reason())
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert "CUDA graph" in str(reason())
    assert reason() is None
