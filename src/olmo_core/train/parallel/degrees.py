"""How many ranks share what."""

from __future__ import annotations

from dataclasses import dataclass

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention.parallel.balancers import RingAttentionLoadBalancerType
from olmo_core.train.config import TrainConfig

__all__ = ["Degrees", "deal"]

Style = RingAttentionLoadBalancerType


@dataclass(frozen=True)
class Degrees:
    """The ranks of a run as a grid: data x ring x ulysses x tp, neighbours along the last.

    Ranks that differ in ``tp`` alone hold the same tokens and share each layer's heads and columns.
    Those of one ring and Ulysses group share the rows of one data rank. Parameters are sharded over
    all ranks but those of one tp group.
    """

    data: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    style: Style | None = None
    """The load balancer that shards sequences; None where none is sharded."""

    @property
    def cp(self) -> int:
        """How many ranks share a sequence, each with other tokens."""
        return self.ring * self.ulysses

    @property
    def fsdp(self) -> int:
        """How many ranks share the parameters."""
        return self.data * self.cp

    def expect_rows(self, config: TrainConfig) -> None:
        """:raises OLMoConfigurationError: if the data ranks can't deal a batch's rows."""
        rows = config.data.batch_size
        if rows % self.data:
            raise OLMoConfigurationError(
                f"data.batch_size={rows} rows can't be dealt to {self.data} ranks of data: choose "
                f"a multiple of {self.data}, or let ranks share rows with --cp or --tp-degree"
            )

    def __str__(self) -> str:
        parts = [f"{self.data} of data"] if self.data > 1 else []
        if self.cp > 1:
            inside = f" ({self.ring} x {self.ulysses} of Ulysses)"
            hybrid = self.style != Style.ulysses and self.ulysses > 1
            parts.append(f"{self.cp} of context by {self.style}" + (inside if hybrid else ""))
        if self.tp > 1:
            parts.append(f"{self.tp} of tensors")
        return " x ".join(parts) or "1"


def deal(
    ranks: int,
    *,
    cp: str | None = None,
    cp_degree: int | None = None,
    ulysses_degree: int | None = None,
    tp_degree: int | None = None,
) -> Degrees:
    """What the options of ``train`` make of ``ranks`` processes.

    :param cp: a load balancer's name.
    :param cp_degree: how many ranks share a sequence; all that ``tp_degree`` leaves if not given.
    :param ulysses_degree: how many of them share a ring's shard.
    :param tp_degree: how many ranks share each layer.
    :raises OLMoConfigurationError: if they don't fit together.
    """
    given = {"--cp-degree": cp_degree, "--ulysses-degree": ulysses_degree}
    for name, degree in {**given, "--tp-degree": tp_degree}.items():
        if degree is not None and degree < 1:
            raise OLMoConfigurationError(f"{name} must be at least 1, got {degree}")
    if cp is not None and cp not in list(Style):
        raise OLMoConfigurationError(f"--cp must be one of {', '.join(Style)}, got {cp!r}")
    if cp is None:
        for name, degree in given.items():
            if degree is not None and degree > 1:
                raise OLMoConfigurationError(
                    f"{name}={degree} needs --cp, which says how sequences are sharded: one of "
                    f"{', '.join(Style)}"
                )
    tp = tp_degree or 1
    if ranks == 1 and (cp is not None or tp > 1):
        raise OLMoConfigurationError(
            "--cp and --tp-degree are about several processes, and this is one. Start as many as "
            "you have devices: torchrun --nproc-per-node 2 -m olmo_core train ..."
        )
    if ranks % tp:
        raise _misfit(ranks, f"--tp-degree {tp}")
    shared = 1 if cp is None else cp_degree or ranks // tp
    if ranks % (tp * shared):
        raise _misfit(ranks, f"--cp-degree {shared}" + (f" x --tp-degree {tp}" if tp > 1 else ""))
    data = ranks // (tp * shared)
    if cp is None or shared == 1:
        return Degrees(data, tp=tp)
    style = Style(cp)
    if style == Style.ulysses:
        if ulysses_degree not in (None, shared):
            raise OLMoConfigurationError(
                f"--ulysses-degree {ulysses_degree} is not the --cp-degree, {shared}, of "
                "--cp ulysses, where all ranks of a sequence are one Ulysses group. Leave it out, "
                "or choose a ring around it: --cp zig_zag, llama3 or balanced"
            )
        return Degrees(data, 1, shared, tp, style)
    inner = ulysses_degree or 1
    if shared % inner:
        raise OLMoConfigurationError(
            f"--cp-degree {shared} is a ring of Ulysses groups, and --ulysses-degree {inner} does "
            "not divide it"
        )
    return Degrees(data, shared // inner, inner, tp, style)


def _misfit(ranks: int, what: str) -> OLMoConfigurationError:
    return OLMoConfigurationError(
        f"{ranks} ranks can't be dealt to {what}, which must divide them: change that, or "
        "torchrun's --nproc-per-node (and --nnodes)"
    )
