"""The interface's seven length keywords, checked and folded into one :class:`Segments`."""

from __future__ import annotations

from torch import Tensor

from olmo_core.nn.attention.lengths import check_cu_doc_lens
from olmo_core.nn.attention.segments import Segments

__all__ = ["fold"]


def fold(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    cu_doc_lens: Tensor | None = None,
    cu_doc_lens_q: Tensor | None = None,
    cu_doc_lens_k: Tensor | None = None,
    max_doc_len: int | None = None,
    max_doc_len_q: int | None = None,
    max_doc_len_k: int | None = None,
    local_k_slice: slice | None = None,
) -> tuple[Segments, Tensor, Tensor]:
    """The segments of a call, and the keys and values they are about.

    :param q: ``(batch, t_q, ...)``.
    :param k: ``(batch, t_k, ...)``.
    :param v: Like ``k``.
    :param window: In keys, or -1.
    :returns: The segments; keys and values, where ``local_k_slice`` cuts them flattened.
    :raises ValueError: If keywords are missing, contradict each other or do not fit the tensors.
    :raises TypeError: If one is of the wrong type.
    """
    differ = (cu_doc_lens_q, cu_doc_lens_k, max_doc_len_q, max_doc_len_k, local_k_slice)
    if cu_doc_lens is not None and any(x is not None for x in differ):
        raise ValueError(
            "Pass either cu_doc_lens (queries and keys alike) or cu_doc_lens_q with cu_doc_lens_k, "
            "not both."
        )
    if (cu_doc_lens_q is None) != (cu_doc_lens_k is None):
        raise ValueError("cu_doc_lens_q and cu_doc_lens_k are required together.")
    for cu, longest, name in (
        (cu_doc_lens, max_doc_len, "max_doc_len"),
        (cu_doc_lens_q, max_doc_len_q, "max_doc_len_q"),
        (cu_doc_lens_k, max_doc_len_k, "max_doc_len_k"),
        (cu_doc_lens_k, local_k_slice, "local_k_slice"),
    ):
        if cu is None and longest is not None:
            raise ValueError(
                f"{name} was given without the lengths that it is about, and no document would be "
                f"masked. Pass {'cu_doc_lens' if cu_doc_lens_q is None else 'cu_doc_lens_k'} too."
            )

    if cu_doc_lens is None and cu_doc_lens_q is None:
        return Segments.dense(q.shape[1], k.shape[1], window=window), k, v

    total_q, total_k = (x.shape[0] * x.shape[1] for x in (q, k))
    if cu_doc_lens is not None:
        _check_device(cu_doc_lens, q)
        check_cu_doc_lens(cu_doc_lens, total_q, max_doc_len)
        if total_k != total_q:
            raise ValueError(
                f"cu_doc_lens needs as many keys as queries, got {total_k} and {total_q}. Pass "
                "cu_doc_lens_q and cu_doc_lens_k instead."
            )
        longest = total_q if max_doc_len is None else min(max_doc_len, total_q)
        return Segments.documents(cu_doc_lens, longest, window=window), k, v

    assert cu_doc_lens_q is not None and cu_doc_lens_k is not None
    if local_k_slice is not None:
        k, v = (x.flatten(0, 1)[None, local_k_slice] for x in (k, v))
        total_k = k.shape[1]
    if cu_doc_lens_q.shape != cu_doc_lens_k.shape:
        raise ValueError(
            "cu_doc_lens_q and cu_doc_lens_k must have one entry for each segment, got shapes "
            f"{tuple(cu_doc_lens_q.shape)} and {tuple(cu_doc_lens_k.shape)}."
        )
    for cu, total, bound, name in (
        (cu_doc_lens_q, total_q, max_doc_len_q, "cu_doc_lens_q"),
        (cu_doc_lens_k, total_k, max_doc_len_k, "cu_doc_lens_k"),
    ):
        _check_device(cu, q)
        check_cu_doc_lens(cu, total, bound, name)
    max_q = total_q if max_doc_len_q is None else max_doc_len_q
    max_k = total_k if max_doc_len_k is None else max_doc_len_k
    return Segments(cu_doc_lens_q, cu_doc_lens_k, max_q, max_k, True, window), k, v


def _check_device(cu: Tensor, like: Tensor) -> None:
    if isinstance(cu, Tensor) and cu.device != like.device:
        raise ValueError(
            f"Document lengths must be on the input's device, {like.device}, got {cu.device}."
        )
