"""Tensor parallelism: the ranks of a group share a layer's heads or hidden columns.

``apply_tp`` is written once, over a table that each layer declares. The input becomes a replicated
``DTensor``, so that its gradient is summed over the ranks once and not once a projection; column
projections give each rank its heads as a plain tensor; the row projection sums what the ranks made
of them (Shoeybi et al., "Megatron-LM", 2019). Every parameter becomes a DTensor on the mesh: fused
optimizers and gradient clipping refuse those beside plain ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from olmo_core.distributed.utils import goes_over_gloo
from olmo_core.nn.float8 import float8_styles
from olmo_core.nn.sharded import is_sharded
from olmo_core.nn.sum_over_ranks import sum_over_ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["SharesWidth", "TensorParallel", "TensorParallelTable"]


@dataclass(frozen=True)
class TensorParallel:
    """A rank's place in a tensor-parallel group, as plain values: it copies and pickles."""

    degree: int
    rank: int
    group: str
    """By name."""
    whole_output: bool
    """Whether the layer gives a plain tensor with all tokens."""

    @classmethod
    def from_mesh(cls, tp_mesh: DeviceMesh, *, whole_output: bool = True) -> TensorParallel:
        """This process's place in a mesh of one dimension.

        :raises TypeError: If ``tp_mesh`` is no mesh.
        :raises ValueError: If it has several dimensions.
        """
        if not hasattr(tp_mesh, "ndim") or not hasattr(tp_mesh, "get_group"):
            raise TypeError(f"tp_mesh must be a DeviceMesh, got {type(tp_mesh).__name__}.")
        if tp_mesh.ndim != 1:
            raise ValueError(
                f"tp_mesh must have one dimension, got {tp_mesh.ndim}. Take the one that shares "
                "the layers: mesh['tp']."
            )
        group = tp_mesh.get_group().group_name
        return cls(tp_mesh.size(), tp_mesh.get_local_rank(), group, whole_output)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the group, differentiably."""
        return sum_over_ranks(x, self.group)

    def of_packed(self, rows: Tensor, parts: int = 3) -> Tensor:
        """This rank's rows of a matrix, or of a bias, whose rows are ``parts`` equal blocks of
        heads."""
        mine = rows.unflatten(0, (parts, self.degree, -1))[:, self.rank]
        return mine.flatten(0, 1)


@dataclass(frozen=True)
class TensorParallelTable:
    """How a layer's parameters are dealt to the ranks."""

    columns: tuple[str, ...]
    """Linear layers of which each rank has a part of the outputs. Optional ones may be None."""
    rows: tuple[str, ...]
    """Linear layers of which each rank has a part of the inputs; their outputs are summed."""
    shards: tuple[str, ...] = ()
    """Parameters, or modules with all of theirs, of which each rank has a part of dimension 0."""
    replicas: tuple[str, ...] = ()
    """Parameters, or modules with all of theirs, that each rank has whole."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What the number of ranks must divide, by name."""
    float8: bool = True
    """Whether the projections may be float8 ones."""


class SharesWidth(nn.Module):
    """A layer that can share its heads, or hidden columns, with other ranks."""

    tensor_parallel: TensorParallel | None = None
    """This rank's place among those that share the layer, after :meth:`apply_tp`."""

    def tensor_parallel_table(self) -> TensorParallelTable:
        """How :meth:`apply_tp` deals the parameters. A layer without one can't be dealt."""
        raise RuntimeError(
            f"{type(self).__name__} does not support tensor parallelism: it has no "
            "tensor_parallel_table(). Write one, or shard its parameters instead (FSDP)."
        )

    def apply_tp(
        self,
        tp_mesh: DeviceMesh,
        input_layout: Any = None,
        output_layout: Any = None,
        use_local_output: bool = True,
        float8_enabled: bool = False,
    ) -> None:
        """Prepare the layer for tensor parallelism: each rank then computes a part of its heads, or
        hidden columns.

        All ranks of the mesh must call ``forward`` and backward together. Lengths, left padding and
        RoPE buffers describe the gathered sequence. Parameters become DTensors, which rank 0's
        values are dealt to. Apply it before FSDP, activation checkpointing and compilation, and
        before or after :meth:`apply_cp`.

        :param tp_mesh: The mesh's dimension for it: ``mesh["tp"]``.
        :param input_layout: How the input lies on the ranks: ``Shard(1)`` for a part of the
            sequence, ``Replicate()`` if not given.
        :param output_layout: The same for the output.
        :param use_local_output: Give the output as a plain tensor, not a DTensor.
        :param float8_enabled: Use torchao's parallel styles for those projections that
            ``torchao.float8.convert_to_float8_training`` has converted. They cast gradients before
            a bias sees them.
        :raises ValueError: If the number of ranks does not divide the heads, or if torchao's styles
            don't follow a projection's scaling.
        :raises TypeError: If ``tp_mesh`` is no mesh.
        :raises RuntimeError: If the layer is dealt already, has a decoding cache or parameters that
            no rank's part is known of, if torchao, or a float8 projection, is missing, or if a
            layout is sharded and the ranks share a GPU.
        """
        whole = use_local_output and (output_layout is None or output_layout.is_replicate())
        place = TensorParallel.from_mesh(tp_mesh, whole_output=whole)
        if tp_mesh.device_type != "cpu" and goes_over_gloo(tp_mesh):
            for name, layout in (("input", input_layout), ("output", output_layout)):
                if layout is not None and layout.is_shard():
                    raise RuntimeError(
                        f"{name}_layout={layout} needs a GPU for each rank (NCCL): these ranks' "
                        "messages go over gloo, whose gathering of DTensors in a GPU's memory "
                        f"ends the process. Use {name}_layout=None."
                    )
        self.check_tp(place)
        table = self.tensor_parallel_table()
        if float8_enabled and not table.float8:
            raise RuntimeError(
                f"{type(self).__name__} has no float8 under tensor parallelism. Use Attention, "
                "whose projections are apart, or float8_enabled=False."
            )
        float8: Mapping[str, Any] = {}
        if float8_enabled:
            names = (*table.columns, *table.rows)
            float8 = float8_styles(self, names, tp_mesh, output_layout)
        _deal(
            self, table, tp_mesh, input_layout, float8,
            {"output_layouts": output_layout, "use_local_output": use_local_output},
        )  # fmt: skip
        self.use_tp(place)

    def check_tp(self, place: TensorParallel) -> None:
        """The errors of :meth:`apply_tp`, before anything is changed."""
        name, table = type(self).__name__, self.tensor_parallel_table()
        if self.tensor_parallel is not None:
            raise RuntimeError(f"apply_tp was called twice on one {name}.")
        for what, count in table.counts.items():
            if count % place.degree:
                raise ValueError(
                    f"{name} can't deal {what}={count} to {place.degree} ranks: the number of "
                    f"ranks must divide it. Use a mesh whose size divides {count}."
                )
        named = _parameters(self, (*table.columns, *table.rows, *table.shards, *table.replicas))
        if unknown := [n for n, _ in self.named_parameters() if n not in named]:
            raise RuntimeError(
                f"{name} has parameters that apply_tp does not know how to deal: "
                f"{', '.join(unknown)}. Add them after apply_tp, or override "
                "tensor_parallel_table()."
            )
        if dealt := [n for n, p in self.named_parameters() if is_sharded(p)]:
            raise RuntimeError(
                f"Parameters of {name} are sharded already: {', '.join(dealt)}. Call apply_tp "
                "first, then fully_shard."
            )

    def use_tp(self, place: TensorParallel) -> None:
        """What :meth:`apply_tp` does once the parameters are dealt."""
        self.tensor_parallel = place


def _parameters(module: nn.Module, names: tuple[str, ...]) -> list[str]:
    """The full names of the parameters that ``names``, of parameters or modules, stand for."""
    own = [n for n, _ in module.named_parameters()]
    return [n for n in own if any(n == name or n.startswith(f"{name}.") for name in names)]


def _own(_: nn.Module, args: Any, out: Tensor) -> Tensor:
    """A DTensor's part without the mark of a view, of which FSDP2 warns: nobody has the whole."""
    return out if is_sharded(out) else torch.ops.aten._unsafe_view(out, out.shape)


def _deal(
    module: nn.Module,
    table: TensorParallelTable,
    mesh: DeviceMesh,
    input_layout: Any,
    float8: Mapping[str, tuple[Any, Any]],
    outputs: dict[str, Any],
) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plain = (ColwiseParallel, RowwiseParallel)
    layout, whole = input_layout or Replicate(), (Replicate(),)

    def gather(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x  # the layer says what it takes
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, (layout,), run_check=False)
        return x.redistribute(placements=whole)

    # torch's PrepareModuleInput takes no call with a second positional argument.
    def prepare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (gather(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "x": gather(kwargs["x"])} if "x" in kwargs else kwargs

    module.register_forward_pre_hook(prepare, with_kwargs=True)
    present = [n for n in table.columns if getattr(module, n, None) is not None]
    plan = {name: float8.get(name, plain)[0]() for name in present}
    plan |= {name: float8.get(name, plain)[1](**outputs) for name in table.rows}
    parallelize_module(module, mesh, plan)
    for name in table.rows:
        module.get_submodule(name).register_forward_hook(_own)
    for names, placement in ((table.shards, Shard(0)), (table.replicas, Replicate())):
        for name in _parameters(module, names):
            path, _, last = name.rpartition(".")
            parameter = module.get_parameter(name)
            dealt = distribute_tensor(parameter.detach(), mesh, [placement])
            setattr(module.get_submodule(path), last, nn.Parameter(dealt, parameter.requires_grad))
