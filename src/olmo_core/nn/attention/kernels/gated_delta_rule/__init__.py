"""The gated delta rule: the op, what it computes (``reference``), and what computes it."""

from .op import gated_delta_rule
from .step import gated_delta_rule_step_, normalize

__all__ = ["gated_delta_rule", "gated_delta_rule_step_", "normalize"]
