"""One thread, fixed seeds, and the marks: `gpu` and `slow` say why they skip."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# derandomize: a red build is red again on the next machine. No deadline: first calls are slow.
settings.register_profile(
    "repo",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
settings.load_profile("repo")

# float64 gradcheck is some 40 times slower on two threads than on one.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_cuda = pytest.mark.skip(reason="needs a CUDA device, and torch sees none here")
    slow = pytest.mark.skip(reason="slow: runs with --run-slow (make test-full)")
    for item in items:
        if "distributed" in item.keywords:
            # One of several pytest workers has them all, so that each rank count is started once.
            item.add_marker(pytest.mark.xdist_group("ranks"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_cuda)
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(slow)


@pytest.fixture(autouse=True)
def _free_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Several workers, and their ranks, share one GPU: none keeps what its tests have used."""
    yield
    if torch.cuda.is_available() and {"gpu", "triton"} & {*request.keywords}:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)
