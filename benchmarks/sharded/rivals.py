"""Torch's own context parallelism, which is experimental: for one causal document."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.sharded.clock import Times, slowest
from benchmarks.sharded.job import Job
from benchmarks.sharded.problems import Attention

__all__ = ["Unavailable", "context_parallel"]


class Unavailable(Exception):
    """Why it can't be measured here."""


def context_parallel(job: Job, problem: Attention) -> Times:
    """Scaled dot-product attention inside ``torch.distributed.tensor.experimental``'s context,
    with its load balancing.

    Its ring takes as many kv heads as query heads, so they are repeated, outside what is timed.

    :raises Unavailable: With what torch raised.
    """
    try:
        return _measured(job, problem)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise Unavailable(f"{type(error).__name__}: {lines[0]}") from error


def _measured(job: Job, problem: Attention) -> Times:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import experimental

    mesh = init_device_mesh(job.device.type, (job.n,), mesh_dim_names=("cp",))
    sizes, total = job.sizes, problem.mask.ends[-1]
    q, k, v, dout = (
        torch.randn(1, sizes.heads, total, sizes.head_dim, device=job.device, dtype=job.dtype)
        for _ in range(4)
    )
    # The context cuts its buffers to this rank's shard, and gives the whole back when it ends.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with experimental.context_parallel(
            mesh, buffers=[q, k, v, dout], buffer_seq_dims=[2, 2, 2, 2]
        ):
            q_, k_, v_ = (x.clone().requires_grad_() for x in (q, k, v))

            def forward() -> Tensor:
                return F.scaled_dot_product_attention(q_, k_, v_, is_causal=True)

            def backward(out: Tensor) -> None:
                torch.autograd.grad(out, (q_, k_, v_), dout)

            return slowest(job, forward, backward)
