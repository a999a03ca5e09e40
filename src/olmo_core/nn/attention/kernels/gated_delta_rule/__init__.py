"""The gated delta rule: the op, what it computes (``reference``), and what computes it."""

from .chunks import RuleInputs
from .op import gated_delta_rule
from .step import gated_delta_rule_step_, normalize
from .triton_rule import rule_ahead

__all__ = ["RuleInputs", "gated_delta_rule", "gated_delta_rule_step_", "normalize", "rule_ahead"]
