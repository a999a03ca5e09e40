"""Reading parameters that are sharded over the ranks of one tensor-parallel group.

Between the projections of a tensor-parallel layer everything is a plain tensor of this rank's heads
or columns; a ``DTensor`` lives at the edges. A DTensor is known by its attributes: importing its
module takes 0.6 s.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

__all__ = ["is_sharded", "local", "local_input", "mask_rows", "replicated_like"]

T = TypeVar("T", Tensor, "Tensor | None")


def is_sharded(x: object) -> bool:
    """Whether ``x`` is a ``DTensor``."""
    if type(x) is Tensor or type(x) is nn.Parameter:
        return False
    return hasattr(x, "placements") and hasattr(x, "device_mesh")


def local(parameter: T, like: Tensor | None = None) -> T:
    """This rank's part of a parameter, as a plain tensor; a plain one as it is.

    The parameter's gradient is whole: a replicated one's is summed over the ranks, which each use
    it for other heads.

    :param like: What the parameter is to meet. Where that is a DTensor, so is the result.
    :raises RuntimeError: If it is sharded over more than one dimension of ranks: by FSDP, which has
        not gathered it.
    """
    if parameter is None or type(parameter) is nn.Parameter:  # as almost always
        return parameter
    if not is_sharded(parameter) or is_sharded(like):
        return parameter
    if len(parameter.placements) != 1:  # type: ignore[attr-defined]
        raise RuntimeError(
            f"A parameter is sharded over {parameter.device_mesh}, so FSDP has not "  # type: ignore[attr-defined]
            "gathered it. Call the module that fully_shard was given, not a part of it."
        )
    if parameter.placements[0].is_shard():  # type: ignore[attr-defined]
        return parameter.to_local()  # type: ignore[attr-defined, no-any-return, unused-ignore]
    from torch.distributed.tensor import Partial

    # Without the redistribution the gradient would stay a partial sum on each rank.
    whole = parameter.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return whole.to_local(grad_placements=[Partial()])


def local_input(x: Tensor) -> Tensor:
    """A replicated input as a plain tensor, whose gradient is this rank's part of the sum."""
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import Partial

    return x.to_local(grad_placements=[Partial()])  # type: ignore[attr-defined]


def replicated_like(y: Tensor, x: Tensor) -> Tensor:
    """``y``, the same on all ranks, as a DTensor where ``x`` is one."""
    if not is_sharded(x):
        return y
    from torch.distributed.tensor import DTensor

    mesh, placements = x.device_mesh, x.placements  # type: ignore[attr-defined]
    return DTensor.from_local(y, mesh, placements, run_check=False)


def mask_rows(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` (B, T, d) with zeros where ``mask`` (B, T), a plain tensor, is True."""
    return x.masked_fill(replicated_like(mask.unsqueeze(-1), x), 0)
