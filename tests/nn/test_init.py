"""Initialisation: each method's spread, truncation, reproducibility, meta builds and shards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.functional import l2_normalize
from olmo_core.nn.init import InitMethod, copy_into, trunc_normal_

D, N, I = 64, 6, 2  # d_model, num_blocks, block_idx  # noqa: E741


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("method", "output", "expected"),
    [
        (InitMethod.normal, False, 0.02),
        (InitMethod.normal, True, 0.02),
        (InitMethod.normalized, False, D**-0.5),
        (InitMethod.normalized, True, D**-0.5 / math.sqrt(2 * N)),
        (InitMethod.llama, False, 0.02),
        (InitMethod.llama, True, 0.02 / math.sqrt(2 * N)),
        (InitMethod.llama_depth, False, 0.02),
        (InitMethod.llama_depth, True, 0.02 / math.sqrt(2 * (I + 1))),
        (InitMethod.fan_in, False, 300**-0.5),
        (InitMethod.fan_in, True, 300**-0.5),
    ],
)
def test_spread_of_each_method(method: InitMethod, output: bool, expected: float) -> None:
    """Design failure 14: depth scaling was never applied."""
    linear = nn.Linear(300, 400)
    kwargs = {"d_model": D, "block_idx": I, "num_blocks": N, "output": output}
    assert method.get_std(fan_in=300, **kwargs) == pytest.approx(expected)
    method.init_linear_(linear.weight, linear.bias, **kwargs, generator=generator())  # type: ignore[arg-type]
    weight = linear.weight.detach().double()
    assert weight.abs().max() <= 3 * expected * (1 + 1e-6)
    assert weight.abs().max() > 2.9 * expected
    # A normal distribution cut at 3 sigma has a standard deviation of 0.98658 sigma.
    assert weight.std().item() == pytest.approx(0.98658 * expected, rel=0.01)
    assert abs(weight.mean().item()) < 0.02 * expected
    assert torch.equal(linear.bias, torch.zeros(400))


def test_the_base_spread_is_an_option() -> None:
    weight = torch.empty(200, 200)
    InitMethod.llama.init_linear_(
        weight, d_model=D, block_idx=0, num_blocks=1, std=0.5, generator=generator()
    )
    assert weight.std().item() == pytest.approx(0.98658 * 0.5, rel=0.02)


def test_a_generator_makes_it_reproducible() -> None:
    first, second, other = (
        trunc_normal_(torch.empty(8, 8), generator=generator(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    torch.manual_seed(5)
    default = trunc_normal_(torch.empty(8, 8))
    assert torch.equal(default, trunc_normal_(torch.empty(8, 8), generator=generator(5)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_all_dtypes_start_at_the_same_weights(dtype: torch.dtype) -> None:
    expected = trunc_normal_(torch.empty(64, 64), generator=generator())
    weight = trunc_normal_(torch.empty(64, 64, dtype=dtype), generator=generator())
    assert torch.equal(weight, expected.to(dtype))
    assert weight.isfinite().all()


def test_meta_build_equals_cpu_build() -> None:
    def initialised(linear: nn.Linear) -> nn.Linear:
        InitMethod.normal.init_linear_(
            linear.weight,
            linear.bias,
            d_model=D,
            block_idx=0,
            num_blocks=1,
            generator=generator(),
        )
        return linear

    late = initialised(nn.Linear(5, 3, device="meta").to_empty(device="cpu"))
    expected = initialised(nn.Linear(5, 3))
    assert torch.equal(late.weight, expected.weight)
    assert torch.equal(late.bias, expected.bias)
    assert late.weight.requires_grad
    assert initialised(nn.Linear(5, 3, device="meta")).weight.is_meta


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"std": 0.0}, "std must be positive and finite, got 0.0"),
        ({"std": -1.0}, "std must be positive"),
        ({"std": float("nan")}, "std must be positive"),
        ({"block_idx": 6}, r"\[0, num_blocks=6\), got 6"),
        ({"block_idx": -1}, "got -1"),
        ({"num_blocks": 0}, r"num_blocks=0"),
    ],
)
def test_bad_options(kwargs: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"d_model": D, "block_idx": I, "num_blocks": N} | kwargs
    with pytest.raises(OLMoConfigurationError, match=message):
        InitMethod.llama_depth.init_linear_(torch.empty(2, 2), **options)


@pytest.mark.distributed
def test_shards_are_cut_from_the_whole() -> None:
    """One process plays each rank in turn: nothing is sent, so a fake group will do."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    expected = trunc_normal_(torch.empty(10, 6), generator=generator())
    for placement in (Shard(0), Shard(1), Replicate()):
        local = []
        for rank in range(4):
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
            try:
                mesh = init_device_mesh("cpu", (4,))
                empty = torch.empty(10, 6)
                weight = distribute_tensor(empty, mesh, [placement], src_data_rank=None)
                bias = distribute_tensor(torch.ones(10), mesh, [Replicate()], src_data_rank=None)
                InitMethod.normal.init_linear_(
                    weight, bias, d_model=D, block_idx=0, num_blocks=1, generator=generator()
                )
                local.append(weight.to_local())
                assert not bias.to_local().any()
                copy_into(bias, torch.arange(10.0))
                assert torch.equal(bias.to_local(), torch.arange(10.0))
                unit = l2_normalize(weight, dim=1 - placement.dim if placement.is_shard() else 0)  # type: ignore[attr-defined]
                assert unit.placements == (placement,)  # whole vectors: no communication
            finally:
                dist.destroy_process_group()
        if isinstance(placement, Shard):
            assert torch.equal(torch.cat(local, placement.dim), expected)
        else:
            assert all(torch.equal(shard, expected) for shard in local)
