"""qk-norm and RoPE in one pass: the op, what it computes (``reference``), and its kernels."""

from .op import qk_norm_rope, rope_only, row_stat, unsupported
from .reference import qk_norm_rope_reference

__all__ = ["qk_norm_rope", "qk_norm_rope_reference", "rope_only", "row_stat", "unsupported"]
