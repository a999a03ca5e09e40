"""Seeding, devices, rank helpers and the buffer cache."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from olmo_core.distributed.utils import (
    get_full_tensor,
    get_rank,
    get_world_size,
    is_distributed,
)
from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.utils import get_default_device, seed_all


def test_seed_all_seeds_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_all(7)
    first = draw()
    assert draw() != first
    seed_all(7)
    assert draw() == first


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_bad_seeds(seed: int) -> None:
    with pytest.raises(ValueError, match="seed must lie in"):
        seed_all(seed)


def test_default_device() -> None:
    assert get_default_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_rank_helpers_without_a_process_group() -> None:
    assert not is_distributed()
    assert (get_rank(), get_world_size()) == (0, 1)
    x = torch.ones(2)
    assert get_full_tensor(x) is x


def test_rank_helpers_with_a_process_group(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert is_distributed()
        assert (get_rank(), get_world_size()) == (0, 1)
        x = torch.arange(6.0)
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(x, mesh, [Shard(0)])
        full = get_full_tensor(sharded)
        assert type(full) is torch.Tensor
        assert torch.equal(full, x)
        without_data = DTensor.from_local(x.to("meta"), mesh, [Shard(0)], run_check=False)
        assert get_full_tensor(without_data).is_meta
    finally:
        dist.destroy_process_group()


def test_buffer_cache_is_truthy_and_namespaced() -> None:
    cache = BufferCache()
    assert cache
    assert len(cache) == 0
    one, two = cache.with_namespace("one"), cache.with_namespace("two")
    one["x"] = torch.zeros(1)
    two["x"] = torch.ones(1)
    assert (one["x"].item(), two["x"].item()) == (0, 1)
    assert "x" not in cache
    assert list(one) == ["x"]
    assert cache.with_namespace("one")["x"] is one["x"]
    assert "x" not in one.with_namespace("one")
    del one["x"]
    assert len(one) == 0
    assert len(two) == 1


def test_buffer_cache_survives_copies_but_not_pickling() -> None:
    cache = BufferCache().with_namespace("n")
    cache["x"] = torch.zeros(1)
    assert copy.deepcopy(cache)["x"] is cache["x"]
    restored = pickle.loads(pickle.dumps([cache, cache]))
    assert restored[0] is restored[1]
    assert len(restored[0]) == 0
    restored[0]["x"] = torch.ones(1)
    assert "n" in repr(restored[0])
