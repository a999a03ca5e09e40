"""The documents of a whole sequence, from the keywords that a load balancer gave a rank."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo_core.distributed.collectives import gather_rows
from olmo_core.nn.attention.parallel.agreement import same_everywhere
from olmo_core.nn.attention.parallel.balancers import RingAttentionLoadBalancerType
from olmo_core.nn.attention.parallel.context import ContextParallel
from olmo_core.nn.attention.parallel.plan import WHOLE
from olmo_core.nn.attention.parallel.readings import read
from olmo_core.nn.lengths import can_be_read, check_cu_doc_lens, ends_before

_OF_Q_AND_K = (
    "cu_doc_lens_q",
    "cu_doc_lens_k",
    "max_doc_len_q",
    "max_doc_len_k",
    "local_k_slice",
)
_KEYWORDS = {
    RingAttentionLoadBalancerType.zig_zag: ("cu_doc_lens", "max_doc_len"),
    RingAttentionLoadBalancerType.ulysses: ("cu_doc_lens", "max_doc_len"),
    RingAttentionLoadBalancerType.llama3: _OF_Q_AND_K,
    RingAttentionLoadBalancerType.balanced: (),
}
"""What each load balancer returns beside ``global_cu_doc_lens``."""


class ShardDocuments(NamedTuple):
    """The documents of the sequence that ranks share, as the schedules take them."""

    lengths: Tensor | None
    """Cumulative, int32; None for one document a row."""
    local: bool = False
    """Whether they are a zig-zag shard's: the whole sequence's over the ring."""
    longest: int | None = None
    """For Ulysses alone, an upper bound of the longest document."""


def lengths_of(keywords: Mapping[str, Any]) -> Any:
    """The keyword that ranks agree on first: the truth, or what it is derived from."""
    names = ("global_cu_doc_lens", "cu_doc_lens", "cu_doc_lens_q")
    return next((keywords[n] for n in names if keywords.get(n) is not None), None)


def read_shard_documents(
    context: ContextParallel, batch: int, rows: int, device: torch.device, **keywords: Any
) -> ShardDocuments:
    """Check a load balancer's keywords and fold them into one value.

    ``global_cu_doc_lens`` is the truth, and whatever else is given must say the same. Without it
    the others serve: zig-zag's and Ulysses' follow from one rank's; llama3's need one message, in
    eager mode alone.

    :param batch: Rows of the batch.
    :param rows: This rank's tokens in each.
    :param keywords: See :meth:`Attention.forward`.
    :raises ValueError: If keywords are missing, are another load balancer's, or contradict each
        other.
    :raises TypeError: If lengths are not int32 tensors.
    """
    given = {name: value for name, value in keywords.items() if value is not None}
    whole = given.pop("global_cu_doc_lens", None)
    kind = context.load_balancer
    if strangers := [name for name in given if name not in _KEYWORDS[kind]]:
        raise ValueError(
            f"{', '.join(strangers)} do not describe a shard of the {kind} load balancer, which "
            f"returns {', '.join((*_KEYWORDS[kind], 'global_cu_doc_lens'))}. Pass what it returned."
        )
    for name, value in keywords.items():
        if isinstance(value, Tensor) and value.device != device:
            raise ValueError(f"{name} must be on the input's device, {device}, got {value.device}.")
    if whole is not None:
        _check_type(whole, "global_cu_doc_lens")
    rows *= context.ulysses_degree  # of the shard that the layout deals, or of the whole sequence
    if kind == RingAttentionLoadBalancerType.llama3:
        return _from_q_and_k(context, rows, device, whole, given)
    if not given:
        return ShardDocuments(whole)

    cu, longest = given.get("cu_doc_lens"), given.get("max_doc_len")
    if cu is None:
        if whole is None:
            raise ValueError(
                f"max_doc_len={longest} was given without cu_doc_lens, so no document would be "
                "masked. Pass cu_doc_lens too."
            )
        if context.layout == WHOLE:
            check_cu_doc_lens(whole, batch * rows, longest, "global_cu_doc_lens")
        return ShardDocuments(whole, longest=longest)
    check_cu_doc_lens(cu, batch * rows, longest)
    local = context.layout != WHOLE
    if whole is None:
        return ShardDocuments(cu, local and context.ring_degree > 1, longest)
    factor = context.ring_degree if local else 1
    same = cu.shape == whole.shape and (cu * factor == whole).all()
    of_shard = f"a zig-zag shard's, 1/{factor} of the second" if local else "the whole sequence's"
    _require(
        same,
        "cu_doc_lens and global_cu_doc_lens describe different documents. The first are "
        f"{of_shard}: pass what the load balancer returned.",
    )
    return ShardDocuments(whole, longest=longest)


def _from_q_and_k(
    context: ContextParallel,
    rows: int,
    device: torch.device,
    whole: Tensor | None,
    given: dict[str, Any],
) -> ShardDocuments:
    if not given:
        return ShardDocuments(whole)
    cu_q, cu_k = given.get("cu_doc_lens_q"), given.get("cu_doc_lens_k")
    if cu_q is None or cu_k is None:
        raise ValueError(
            f"{', '.join(given)} were given without cu_doc_lens_q and cu_doc_lens_k, and no "
            "document would be masked. Pass what the load balancer returned."
        )
    check_cu_doc_lens(cu_q, rows, given.get("max_doc_len_q"), "cu_doc_lens_q")
    _check_type(cu_k, "cu_doc_lens_k")
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            "cu_doc_lens_q and cu_doc_lens_k must have one entry for each segment, got shapes "
            f"{tuple(cu_q.shape)} and {tuple(cu_k.shape)}."
        )
    keys = given.get("local_k_slice")
    if keys is not None:
        check_cu_doc_lens(cu_k, keys.stop - keys.start, given.get("max_doc_len_k"), "cu_doc_lens_k")
    if whole is None:
        if not can_be_read(cu_q):
            raise ValueError(
                "Three different sequences can give a rank the same llama3 keywords, so in a "
                "compiled graph the layer needs global_cu_doc_lens too. The load balancer returns "
                "it with the others."
            )
        return ShardDocuments(_complete(context, rows, device, cu_q, cu_k))

    first = context.ring_rank * rows
    at = torch.zeros(rows + 1, dtype=torch.bool, device=device)
    ends = at.index_fill(0, cu_q.long(), True)
    wanted = at.index_fill(0, (whole.clamp(first, first + rows) - first).long(), True)
    wanted[0] = wanted[rows] = True
    starts = whole[ends_before(whole, first + cu_q[:-1]) - 1]
    reach = torch.where(cu_q.diff() > 0, first + cu_q[1:] - starts, 0)
    good = (ends == wanted).all() & (cu_k.diff() == reach).all()
    if keys is not None:
        good = good & (starts[0] == keys.start) & (first + rows == keys.stop)
    _require(
        good, "cu_doc_lens_q, cu_doc_lens_k or local_k_slice do not describe this rank's part of "
        "global_cu_doc_lens. Pass what the load balancer returned on this rank."
    )  # fmt: skip
    return ShardDocuments(whole)


def _complete(
    context: ContextParallel, rows: int, device: torch.device, cu_q: Tensor, cu_k: Tensor
) -> Tensor:
    """The whole sequence's lengths, from each rank's: a byte a row says where documents start."""
    queries, keys = read(cu_q), read(cu_k)

    def compute() -> Tensor:
        same_everywhere(
            rows, f"{rows} rows of the {context.load_balancer} layout", context.everyone, device
        )
        starts = torch.zeros(rows, dtype=torch.uint8)
        for (a, b), (c, d) in zip(pairwise(queries.values), pairwise(keys.values), strict=True):
            # A span with more keys than queries goes on with a document of another rank.
            if a < b and d - c == b - a:
                starts[a] = 1
        everyone = gather_rows(starts.to(device), context.ring_group)
        ends = everyone.flatten().nonzero().flatten()
        return torch.cat([ends, ends.new_tensor([everyone.numel()])]).to(torch.int32)

    key = ("whole", context.everyone, context.ring_group, rows, keys.digest())
    whole = queries.derive(key, compute)
    queries.agreed.add(key)
    return whole


def _check_type(lengths: Any, name: str) -> None:
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int32:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(
            f"{name} must be a torch.int32 tensor, got {got}. Use {name}.to(torch.int32)."
        )


def _require(good: Tensor | bool, message: str) -> None:
    """Raise, or where the values are not the host's to read assert on the device."""
    if isinstance(good, Tensor) and (good.is_cuda or not can_be_read(good)):
        torch._assert_async(good, message)
    elif not good:
        raise ValueError(message)
