"""A run's ranks as ``torchrun`` starts them: one process a device.

They hold one model between them and take one batch together: that of one process, whose losses they
have. Decisions are made in common: each collective is called by all ranks or by none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from olmo_core.data import IGNORE_INDEX, PackedBatch
from olmo_core.distributed.launched import join_started
from olmo_core.distributed.together import from_first_rank, gather, together
from olmo_core.exceptions import OLMoConfigurationError, OLMoError
from olmo_core.nn.attention.ring import RingContextParallelStyle, UlyssesContextParallelStyle
from olmo_core.nn.fsdp import fsdp_policy
from olmo_core.nn.transformer import Transformer
from olmo_core.train.errors import TrainingError
from olmo_core.train.parallel.degrees import Degrees, Style
from olmo_core.train.parallel.ranks import Ranks, Tokens

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ManyRanks", "join"]

T = TypeVar("T")
PATIENCE = timedelta(minutes=10)
"""How long a rank waits for the others."""


def join() -> ManyRanks:
    """Join the other processes that ``torchrun`` has started."""
    join_started(PATIENCE, on_gpus=torch.cuda.is_available())
    return ManyRanks()


class ManyRanks(Ranks):
    """The ranks of the default process group.

    What a rank draws in a step (for dropout) depends on the seed, the step and its data rank alone,
    so that checkpoints need no generator's state and a run goes on with any number of ranks. Ranks
    of one data rank draw the same: they hold other heads or tokens.
    """

    def __init__(self, degrees: Degrees | None = None) -> None:
        super().__init__(degrees)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._balancer: Any = None

    @property
    def share(self) -> tuple[int, int]:
        return self.rank // (self.degrees.cp * self.degrees.tp), self.degrees.data

    @contextmanager
    def together(self) -> Iterator[None]:
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        with self._agreeing():
            together(lambda: self._tell(own))

    def on_first(self, function: Callable[..., T], *args: Any, **keywords: Any) -> T:
        with self._agreeing():
            return from_first_rank(lambda: function(*args, **keywords))

    @contextmanager
    def _agreeing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.agreed = error
            raise

    def _tell(self, own: Exception | None) -> None:
        """Raise what this rank has met; where it is not the first, with its number."""
        if own is None:
            return
        if self.is_first:
            raise own
        if isinstance(own, OLMoError):
            raise type(own)(f"rank {self.rank}: {own}") from own
        raise TrainingError(f"rank {self.rank}: {type(own).__name__}: {own}") from own

    def expect_same(self, **facts: object) -> None:
        digests = {
            name: hashlib.sha256(str(fact).encode()).digest() for name, fact in facts.items()
        }
        first, *others = gather(digests)
        with self.together():
            for rank, theirs in enumerate(others, 1):
                if differ := [name for name in facts if theirs[name] != first[name]]:
                    raise OLMoConfigurationError(
                        f"rank {rank} has another {' and '.join(differ)} than rank 0: all ranks "
                        "must be started with the same options, and find the same files"
                    )

    def highest(self, number: int | None) -> int | None:
        largest = torch.tensor([-1 if number is None else number])
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return None if largest.item() < 0 else int(largest)

    def mean(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        mean: list[float] = (total / self.size).tolist()
        return mean

    def device(self, name: str | None) -> torch.device:
        device = super().device(name)
        if device.type == "cuda" and device.index is not None:
            raise OLMoConfigurationError(
                f"device={name} would be that of all {self.size} ranks: device=cuda gives each "
                "its own"
            )
        return device

    def share_model(self, model: Transformer, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        of, kind = self.degrees, device.type
        mesh = init_device_mesh(kind, (of.fsdp, of.tp), mesh_dim_names=("fsdp", "tp"))
        try:
            if of.tp > 1:
                model.apply_tp(mesh["tp"])
            if of.style is not None:
                grid = (of.data, of.ring, of.ulysses, of.tp)
                names = ("data", "ring", "ulysses", "tp")
                self._share_sequences(model, init_device_mesh(kind, grid, mesh_dim_names=names))
        except (ValueError, RuntimeError) as error:
            raise OLMoConfigurationError(
                f"{self.size} ranks can't share the model: {error}"
            ) from error
        _share_parameters(model, mesh["fsdp"])

    def _share_sequences(self, model: Transformer, mesh: DeviceMesh) -> None:
        style, ulysses = self.degrees.style, UlyssesContextParallelStyle()
        assert style is not None
        if style == Style.ulysses:
            cp = mesh["ulysses"]
            model.apply_cp(cp, uly=ulysses)
        elif self.degrees.ulysses == 1:
            cp = mesh["ring"]
            model.apply_cp(cp, ring=RingContextParallelStyle(style))
        else:
            cp = mesh["ring", "ulysses"]
            model.apply_cp(cp, ring=RingContextParallelStyle(style), uly=ulysses)
        self._balancer = style.build(cp)

    def settle(self, model: Transformer) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def shard(self, batch: PackedBatch) -> Tokens:
        if self._balancer is None:
            return super().shard(batch)
        # Ring styles take documents of one row. Labels were made before: the successor of a shard's
        # last token lies on another rank.
        (ids, labels), lengths = self._balancer.batch_shard_by_document(
            inputs=[batch.input_ids.view(1, -1), batch.labels.view(1, -1)],
            seq_dims=[1, 1],
            cu_doc_lens=batch.doc_lens.cu_doc_lens,
            pad_values=[0, IGNORE_INDEX],
        )
        return Tokens(ids, labels, lengths)

    def seed(self, seed: int, step: int) -> None:
        text = f"{seed}:{step}:{self.share[0]}"
        digest = hashlib.sha256(text.encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def random_state(self, seed: int, device: torch.device) -> dict[str, Tensor]:
        return {"rng.seed": torch.tensor(seed)}

    def close(self) -> None:
        dist.destroy_process_group()


def _share_parameters(model: Transformer, mesh: DeviceMesh) -> None:
    """FSDP2, block by block; embeddings and head stay together with the model."""
    from torch.distributed.fsdp import fully_shard

    dtype = model.embeddings.weight.dtype
    for part in (*model.blocks, model.lm_head):
        for child in part.children():
            policy = fsdp_policy(child, dtype)
            for group in policy.groups:
                fully_shard(group, mesh=mesh, mp_policy=policy.mp_policy)
        # The head is not called as a module, but for its loss.
        whole = model if part is model.lm_head else part
        fully_shard(whole, mesh=mesh, mp_policy=policy.mp_policy)
